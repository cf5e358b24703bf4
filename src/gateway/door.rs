//! The door of a listener: takes what Pingora accepted, if its source may have another connection, does the TLS handshake
//! within its time, and has hyper serve the requests that come on it.

use super::connections::{Why, may_stay};
use super::exchange::{self, Patient, Rules};
use super::frames::Frames;
use super::live::ListenerTls;
use super::proxy_protocol;
use super::stream::{Connection, End, Ends, FederationStream, MAX_HEAD, Transport};
use super::{Gateway, Shared};
use crate::config::Http2;
use async_trait::async_trait;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use pingora_core::apps::ServerApp;
use pingora_core::protocols::Stream;
use pingora_core::server::ShutdownWatch;
use prometheus::IntCounter;
use rustls::HandshakeKind;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::server::TlsStream;

/// Octets of a body that may be on their way on a stream of HTTP/2, and on a connection: what may have to be held of it.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 512 * 1024;

/// How long a client of HTTP/2 may take to hear that its connection ends.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Octets of a client's chain at most, and certificates in it.
const LARGEST_CHAIN: usize = 16 * 1024;
const LONGEST_CHAIN: usize = 8;

/// A listener's application.
pub(super) struct Door {
    pub(super) rules: Arc<Gateway>,
    pub(super) address: SocketAddr,
    pub(super) shared: Arc<Shared>,
}

impl Door {
    fn refused(&self, why: Why) {
        self.shared.metrics.connections_refused.with_label_values(&[why]).inc();
    }

    /// Whom a connection is from: who is at the other end, or whom a load balancer says it is for.
    async fn client(&self, stream: &mut Stream, listener: &ListenerTls, deadline: Instant) -> Option<SocketAddr> {
        let peer = client_of(stream)?;
        let ip = peer.ip().to_canonical();
        if !listener.proxy_protocol.iter().any(|network| network.contains(&ip)) {
            return Some(peer);
        }
        match tokio::time::timeout_at(deadline.into(), proxy_protocol::read(stream)).await {
            Ok(Ok(said)) => Some(said.unwrap_or(peer)),
            Ok(Err(e)) => {
                tracing::debug!(%peer, "PROXY protocol: {e}");
                self.refused("proxy-protocol");
                None
            }
            Err(_) => {
                self.refused("proxy-protocol");
                None
            }
        }
    }

    async fn handshake(
        &self,
        stream: Stream,
        listener: &ListenerTls,
        client: SocketAddr,
        deadline: Instant,
    ) -> Option<TlsStream<Direct>> {
        let handshake = tokio::time::timeout_at(deadline.into(), listener.acceptor.accept(Direct(stream))).await;
        let result = |label| self.shared.metrics.handshakes.with_label_values(&[label]).inc();
        match handshake {
            Ok(Ok(stream)) => {
                result("ok");
                Some(stream)
            }
            Ok(Err(e)) => {
                result("failed");
                tracing::debug!(%client, "TLS handshake: {e}");
                None
            }
            Err(_) => {
                result("timeout");
                None
            }
        }
    }
}

#[async_trait]
impl ServerApp for Door {
    async fn process_new(self: &Arc<Self>, mut stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        let live = self.shared.live.load_full();
        let listener = live.tls.door(self.address)?.clone();
        let deadline = Instant::now() + live.timeouts.tls_handshake;
        let connections = &self.shared.connections;
        let open = connections.open(&live).map_err(|why| self.refused(why)).ok()?;
        let client = self.client(&mut stream, &listener, deadline).await?;
        let (of_ip, handshake) = connections.from(&live, client.ip()).map_err(|why| self.refused(why)).ok()?;
        let stream = self.handshake(stream, &listener, client, deadline).await?;
        drop(handshake);

        let connection = Arc::new(Connection::new(
            client,
            self.address,
            stream.get_ref().1,
            &listener,
            live.fields.tls.is_some(),
            self.shared.metrics.connections.clone(),
        ));
        // The whole of it is kept, and told to who asks; rustls takes 64 KiB of what has nothing to do with the certificate.
        let octets: usize = connection.chain.iter().map(|certificate| certificate.len()).sum();
        if octets > LARGEST_CHAIN || connection.chain.len() > LONGEST_CHAIN {
            self.refused("certificate-chain");
            return None;
        }
        // A resumed session brings its certificate from before, which nobody has looked at since: it may have ended, or what
        // it chains to.
        let resumed = stream.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed);
        if resumed && !connection.chain.is_empty() && !listener.trusts(&connection.chain) {
            self.refused("certificate-expired");
            return None;
        }
        let of_peer = connections.of(&live, &connection).map_err(|why| self.refused(why)).ok()?;
        let entry = connections.keep(&connection);
        // A reload that came between has not seen it.
        let now = self.shared.live.load_full();
        if !Arc::ptr_eq(&now, &live) && !may_stay(&now, &connection) {
            self.shared.metrics.connections_cut.inc();
            return None;
        }
        let frames = connection.h2.then(|| Frames::new(now.http2.control));
        let abuse = self.shared.metrics.connections_refused.with_label_values(&["http2-abuse"]);
        let frames = frames.map(|of| (of, abuse));
        let stream = FederationStream::new(stream, connection.clone(), &now.timeouts, frames);
        let cut = Some(self.shared.metrics.connections_cut.clone());
        let serving = Serving { rules: self.rules.clone(), connection: connection.clone(), http2: now.http2, cut };
        let keepalive = now.timeouts.keepalive;
        let shutdown = shutdown.clone();
        // A task of its own holds nothing of what the handshake needed, and is polled without what is around this.
        tokio::spawn(async move {
            let _counted = (open, of_ip, of_peer, entry);
            serving.until_its_end(stream, keepalive, shutdown).await;
        });
        None
    }

    async fn cleanup(&self) {
        self.shared.leave_time().await;
    }
}

/// HTTP on one connection, by the rules of a door.
pub(super) struct Serving<R> {
    pub(super) rules: Arc<R>,
    pub(super) connection: Arc<Connection>,
    pub(super) http2: Http2,
    /// Counts those that had to end.
    pub(super) cut: Option<IntCounter>,
}

impl<R: Rules> Serving<R> {
    /// Serves all requests on a connection. `shutdown` says that no more is accepted: over HTTP/2 the client is told then, over
    /// HTTP/1.1 with the next answer, or once those that wait are closed.
    pub(super) async fn until_its_end<T: Transport>(
        self,
        stream: FederationStream<T>,
        keepalive: Duration,
        mut shutdown: ShutdownWatch,
    ) {
        let (rules, connection) = (self.rules.clone(), self.connection.clone());
        let service = service_fn(move |request| {
            let (rules, connection) = (rules.clone(), connection.clone());
            // Now, and not when it is first polled: hyper reads on before that.
            let on_it = connection.begin(rules.shared().live.load().timeouts.keepalive);
            // hyper has room for it in each connection, also while there is none.
            Box::pin(exchange::serve(rules, request, connection, on_it)) as Pin<Box<dyn Future<Output = _> + Send>>
        });
        let mut ends = Ends::of(&self.connection);
        if !self.connection.h2 {
            let mut serve = http1::Builder::new();
            // As for fields, hyper takes 100 of them.
            serve.max_buf_size(MAX_HEAD);
            // In a place of its own: a task would have room for the stream twice.
            let mut serving = Box::pin(serve.serve_connection(TokioIo::new(stream), service));
            poll_fn(|cx| {
                if serving.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(());
                }
                match ready!(ends.poll(cx)) {
                    End::Cut => self.has_to_end(),
                    End::Close => {
                        serving.as_mut().graceful_shutdown();
                        // It says then that it has ended, or who wakes it.
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                }
                Poll::Ready(())
            })
            .await;
            return;
        }
        let mut serve = http2::Builder::new(PatientExecutor);
        serve
            .max_concurrent_streams(self.http2.max_streams)
            .max_header_list_size(self.http2.max_header_list)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let mut serving = Box::pin(serve.serve_connection(TokioIo::new(stream), service));
        let idle = self.is_idle_for(keepalive);
        tokio::select! {
            biased;
            _ = serving.as_mut() => return,
            end = poll_fn(|cx| ends.poll(cx)) => if end == End::Cut {
                self.has_to_end();
                return;
            },
            () = told(&mut shutdown) => {}
            () = idle => {}
        }
        serving.as_mut().graceful_shutdown();
        // Whoever does not acknowledge that it was told is not waited for, once nothing is under way.
        let mut quiet = pin!(self.is_idle_for(LAST_WORDS));
        loop {
            tokio::select! {
                _ = serving.as_mut() => return,
                () = quiet.as_mut() => return,
                end = poll_fn(|cx| ends.poll(cx)) => if end == End::Cut {
                    self.has_to_end();
                    return;
                },
            }
        }
    }

    /// It is counted before it ends.
    fn has_to_end(&self) {
        if let Some(cut) = &self.cut {
            cut.inc();
        }
    }

    /// Ends once no request has been under way, and no answer waited for its client, for so long, or for half as long again.
    async fn is_idle_for(&self, keepalive: Duration) {
        let half = (keepalive / 2).max(Duration::from_millis(1));
        let mut quiet = 0;
        let mut seen = self.connection.so_far();
        while quiet < 2 {
            tokio::time::sleep(half).await;
            let now = self.connection.so_far();
            quiet = if self.connection.is_busy() || now != seen { 0 } else { quiet + 1 };
            seen = now;
        }
    }
}

async fn told(watch: &mut tokio::sync::watch::Receiver<bool>) {
    // Whoever would say so is gone with the process.
    if watch.wait_for(|told| *told).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Runs the streams of a connection.
#[derive(Debug, Clone, Copy)]
struct PatientExecutor;

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for PatientExecutor {
    fn execute(&self, stream: F) {
        tokio::spawn(Patient::new(Box::pin(stream)));
    }
}

pub(super) fn client_of(stream: &Stream) -> Option<SocketAddr> {
    let digest = stream.get_socket_digest()?;
    digest.peer_addr().and_then(|address| address.as_inet()).copied()
}

/// What Pingora accepted, where what is one piece is sent as one: rustls hands on whatever it has as a list, which costs the kernel
/// more than a piece does.
pub(super) struct Direct(Stream);

impl AsyncRead for Direct {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Direct {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().0).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let stream = Pin::new(&mut self.get_mut().0);
        let mut filled = bufs.iter().filter(|buf| !buf.is_empty());
        match (filled.next(), filled.next()) {
            (Some(one), None) => stream.poll_write(cx, one),
            _ => stream.poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_shutdown(cx)
    }
}
