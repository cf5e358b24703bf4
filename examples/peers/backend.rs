//! The backend of all servers: it reads a whole body, keeps nothing of it, and answers 200. HTTP/1.1 and h2c on one port of the
//! loopback, and on a Unix socket.
//!
//! It is no NGINX with `return 200`: that answers before it has read a body, and then closes connections that a proxy still
//! sends on.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};

use crate::Error;

/// A running backend. It ends with the runtime.
pub struct Backend {
    pub addr: SocketAddr,
    seen: Arc<AtomicU64>,
}

impl Backend {
    /// One at a free port, and at this path.
    pub async fn start(socket: &Path) -> Result<Backend, Error> {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let unix = UnixListener::bind(socket).map_err(|error| format!("{}: {error}", socket.display()))?;
        let (addr, seen) = (tcp.local_addr()?, Arc::<AtomicU64>::default());
        tokio::spawn(by_tcp(tcp, seen.clone()));
        tokio::spawn(by_unix(unix, seen.clone()));
        Ok(Backend { addr, seen })
    }

    /// Octets of bodies that have come so far.
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }
}

async fn by_tcp(listener: TcpListener, seen: Arc<AtomicU64>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        serve(stream, seen.clone());
    }
}

async fn by_unix(listener: UnixListener, seen: Arc<AtomicU64>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        serve(stream, seen.clone());
    }
}

fn serve(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, seen: Arc<AtomicU64>) {
    tokio::spawn(async move {
        let service = service_fn(move |request| answer(request, seen.clone()));
        let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
    });
}

async fn answer(request: Request<Incoming>, seen: Arc<AtomicU64>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let mut body = request.into_body();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            seen.fetch_add(data.len() as u64, Ordering::Relaxed);
        }
    }
    Ok(Response::new(Full::new(Bytes::from_static(b"ok"))))
}
