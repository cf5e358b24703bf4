//! The door of a listener: takes what Pingora accepted, if its source may have another connection, does the TLS handshake
//! within its time, and hands the stream on to Pingora's proxy; and tells the stream when the head of a request is awaited.

use super::Shared;
use super::connections::{Why, may_stay};
use super::frames::Frames;
use super::live::{ListenerTls, Live};
use super::proxy_protocol;
use super::stream::{Connection, FederationStream};
use async_trait::async_trait;
use pingora_core::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp};
use pingora_core::protocols::Stream;
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::http::v2::server::H2Options;
use pingora_core::server::ShutdownWatch;
use pingora_proxy::{HttpProxy, ProxyHttp};
use rustls::HandshakeKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_rustls::server::TlsStream;

/// Octets of a client's chain at most, and certificates in it.
const LARGEST_CHAIN: usize = 16 * 1024;
const LONGEST_CHAIN: usize = 8;

/// A listener's application.
pub(super) struct Door {
    pub(super) proxy: Arc<HttpProxy<super::Gateway>>,
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
    ) -> Option<TlsStream<Stream>> {
        let handshake = tokio::time::timeout_at(deadline.into(), listener.acceptor.accept(stream)).await;
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
        let _open = connections.open(&live).map_err(|why| self.refused(why)).ok()?;
        let client = self.client(&mut stream, &listener, deadline).await?;
        let (_of_ip, handshake) = connections.from(&live, client.ip()).map_err(|why| self.refused(why)).ok()?;
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
        let _of_peer = connections.of(&live, &connection).map_err(|why| self.refused(why)).ok()?;
        let _entry = connections.keep(&connection);
        // A reload that came between has not seen it.
        let now = self.shared.live.load_full();
        if !Arc::ptr_eq(&now, &live) && !may_stay(&now, &connection) {
            self.shared.metrics.connections_cut.inc();
            return None;
        }
        let frames = connection.h2.then(|| Frames::new(now.http2.control));
        let abuse = self.shared.metrics.connections_refused.with_label_values(&["http2-abuse"]);
        let id = stream.get_ref().0.id();
        let frames = frames.map(|of| (of, abuse));
        let stream = FederationStream::new(stream, id, connection.clone(), now.timeouts.headers, frames);
        let requests = Arc::new(Requests::new(self.proxy.clone(), &now));
        drop((live, now, listener));
        tokio::select! {
            left = requests.process_new(Box::new(stream), shutdown) => left,
            () = connection.is_over() => {
                self.shared.metrics.connections_cut.inc();
                None
            }
        }
    }

    async fn cleanup(&self) {
        self.shared.leave_time().await;
        self.proxy.http_cleanup().await;
    }
}

tokio::task_local! {
    /// The deadline of the request that this task is about.
    pub(super) static WATCH: Watch;
}

/// A deadline for a request as a whole. Where a node has answered and the rest of an HTTP/2 body does not come, Pingora
/// waits for it without a clock, and holds the node's connection as long: past its deadline a request is dropped, which
/// resets its stream.
#[derive(Debug, Clone)]
pub(super) struct Watch(Arc<tokio::sync::watch::Sender<Option<Instant>>>);

impl Watch {
    /// Sets the deadline, or takes it away.
    pub(super) fn until(&self, deadline: Option<Instant>) {
        self.0.send_replace(deadline);
    }
}

async fn passed(deadline: &mut tokio::sync::watch::Receiver<Option<Instant>>) {
    loop {
        let until = *deadline.borrow_and_update();
        let changed = match until {
            None => deadline.changed().await,
            Some(until) => tokio::select! {
                () = tokio::time::sleep_until(until.into()) => return,
                changed = deadline.changed() => changed,
            },
        };
        if changed.is_err() {
            // The request is over and cannot be late any more.
            std::future::pending::<()>().await;
        }
    }
}

/// Pingora's proxy for one connection, with a word to its stream before each request, and a deadline that a request may set
/// itself.
pub(super) struct Requests<P> {
    proxy: Arc<HttpProxy<P>>,
    http2: H2Options,
    options: HttpServerOptions,
}

impl<P> Requests<P> {
    pub(super) fn new(proxy: Arc<HttpProxy<P>>, live: &Live) -> Self {
        let mut http2 = H2Options::default();
        http2
            .max_concurrent_streams(live.http2.max_streams)
            .max_header_list_size(live.http2.max_header_list)
            .initial_window_size(256 * 1024)
            .initial_connection_window_size(1024 * 1024);
        Self { proxy, http2, options: server_options(live.timeouts.keepalive) }
    }
}

/// What Pingora does with connections and methods.
pub(super) fn server_options(keepalive: Duration) -> HttpServerOptions {
    let mut options = HttpServerOptions::default();
    // CONNECT is a method like others here: no endpoint has it.
    options.allow_connect_method_proxying = true;
    options.h2_idle_timeout = Some(keepalive);
    options
}

#[async_trait]
impl<P> HttpServerApp for Requests<P>
where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync,
{
    async fn process_new_http(
        self: &Arc<Self>,
        session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        if let Some(connection) = session.digest().and_then(super::connection_of) {
            connection.await_head();
        }
        let (watch, mut deadline) = tokio::sync::watch::channel(None);
        let request = WATCH.scope(Watch(Arc::new(watch)), self.proxy.process_new_http(session, shutdown));
        tokio::select! {
            biased;
            done = request => done,
            () = passed(&mut deadline) => None,
        }
    }

    fn h2_options(&self) -> Option<H2Options> {
        Some(self.http2.clone())
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.options)
    }

    async fn http_cleanup(&self) {
        self.proxy.http_cleanup().await;
    }
}

pub(super) fn client_of(stream: &Stream) -> Option<SocketAddr> {
    let digest = stream.get_socket_digest()?;
    digest.peer_addr().and_then(|address| address.as_inet()).copied()
}
