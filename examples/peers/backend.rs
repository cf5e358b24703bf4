//! The backend of all servers: it reads a whole body, keeps nothing of it, and answers 200. HTTP/1.1 and h2c on one port of the
//! loopback, and on a Unix socket.
//!
//! It is no NGINX with `return 200`: that answers before it has read a body, and then closes connections that a proxy still
//! sends on.
//!
//! A soak has nodes that are restarted under load, as an operator restarts them who wants no request to fail.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::Error;

/// What a node is asked at by checks.
pub const HEALTH: &str = "/healthz";

/// Checks that fail in a row, and a node is left out.
pub const FALL: u32 = 2;

/// How long after a node has said that it goes requests may still be on their way to it; and how long whoever has just
/// connected may take to say something.
const ON_THE_WAY: Duration = Duration::from_millis(500);

/// How long a node may take to end what is under way.
const END_WITHIN: Duration = Duration::from_secs(10);

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

    /// So many more addresses of it, each with a port of its own, and none of those that requests come from.
    pub async fn also(&self, addresses: u16) -> Result<Vec<SocketAddr>, Error> {
        let mut also = vec![];
        for n in 0..addresses {
            let ip = Ipv4Addr::new(127, 0, 4 + (n / 250) as u8, 1 + (n % 250) as u8);
            let listener = TcpListener::bind((ip, 0)).await?;
            also.push(listener.local_addr()?);
            tokio::spawn(by_tcp(listener, self.seen.clone()));
        }
        Ok(also)
    }

    /// Octets of bodies that have come so far.
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }
}

/// How a node leaves, so that no request fails for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaves {
    /// Over HTTP/1.1 nothing says what it has begun: its checks fail first, and when it is asked nothing any more it closes.
    Announced,
    /// Over h2c it stops to accept at once, and tells those who are connected (GOAWAY).
    AtOnce,
}

/// A node that can be restarted.
pub struct Node {
    pub addr: SocketAddr,
    leaves: Leaves,
    standing: Arc<Standing>,
    /// None, while it is gone.
    running: Option<Running>,
}

/// How a node stands with those who check it.
#[derive(Default)]
struct Standing {
    leaving: AtomicBool,
    /// Checks that were told so.
    told: AtomicU32,
    seen: Arc<AtomicU64>,
}

/// What a node does until it is told to stop.
struct Running {
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl Node {
    /// One at this address of the loopback, which should be another than connections come from.
    pub async fn start(ip: Ipv4Addr, leaves: Leaves) -> Result<Node, Error> {
        let listener = TcpListener::bind((ip, 0)).await?;
        let (addr, standing) = (listener.local_addr()?, Arc::<Standing>::default());
        let running = Some(Running::begin(listener, standing.clone()));
        Ok(Node { addr, leaves, standing, running })
    }

    /// Leaves, and is back at its address after this time.
    pub async fn restart(&mut self, gone: Duration) -> Result<(), Error> {
        let (addr, standing) = (self.addr, &self.standing);
        if self.leaves == Leaves::Announced {
            standing.told.store(0, Ordering::Relaxed);
            standing.leaving.store(true, Ordering::Relaxed);
            let until = Instant::now() + END_WITHIN;
            while standing.told.load(Ordering::Relaxed) < FALL {
                if Instant::now() > until {
                    return Err(format!("node {addr}: nobody has asked whether it is well in {END_WITHIN:?}").into());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tokio::time::sleep(ON_THE_WAY).await;
        }
        let Some(running) = self.running.take() else { return Err(format!("node {addr} is gone already").into()) };
        // It waits for this for as long as it runs.
        let _ = running.stop.send(());
        let ended = tokio::time::timeout(END_WITHIN, running.serving).await;
        ended.map_err(|_| format!("node {addr} has not ended what is under way in {END_WITHIN:?}"))??;
        tokio::time::sleep(gone).await;
        let listener =
            TcpListener::bind(addr).await.map_err(|error| format!("node {addr} does not come back: {error}"))?;
        self.standing.leaving.store(false, Ordering::Relaxed);
        self.running = Some(Running::begin(listener, self.standing.clone()));
        Ok(())
    }
}

impl Running {
    fn begin(listener: TcpListener, standing: Arc<Standing>) -> Running {
        let (stop, stopped) = oneshot::channel();
        Running { stop, serving: tokio::spawn(serve_until(stopped, listener, standing)) }
    }
}

/// Serves until it is told to stop: then it closes its port, and ends connections once what is under way on them is done.
async fn serve_until(mut stopped: oneshot::Receiver<()>, listener: TcpListener, standing: Arc<Standing>) {
    let connections = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = &mut stopped => break,
        };
        if let Ok((stream, _)) = accepted {
            serve_gracefully(stream, &connections, standing.clone());
        }
    }
    // Whoever is in the queue has connected: with the port as it is, their connections would be reset.
    if let Ok(listener) = listener.into_std() {
        while let Ok((stream, _)) = listener.accept() {
            if stream.set_nonblocking(true).is_ok()
                && let Ok(stream) = TcpStream::from_std(stream)
            {
                serve_gracefully(stream, &connections, standing.clone());
            }
        }
    }
    tokio::time::sleep(ON_THE_WAY).await;
    connections.shutdown().await;
}

fn serve_gracefully(stream: TcpStream, connections: &GracefulShutdown, standing: Arc<Standing>) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| answer_of_node(request, standing.clone()));
    let connection =
        auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).into_owned();
    let connection = connections.watch(connection);
    tokio::spawn(async move {
        let _ = connection.await;
    });
}

async fn answer_of_node(
    request: Request<Incoming>,
    standing: Arc<Standing>,
) -> Result<Response<Full<Bytes>>, hyper::Error> {
    if request.uri().path() != HEALTH {
        return answer(request, standing.seen.clone()).await;
    }
    let mut response = Response::new(Full::default());
    if standing.leaving.load(Ordering::Relaxed) {
        standing.told.fetch_add(1, Ordering::Relaxed);
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    Ok(response)
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
