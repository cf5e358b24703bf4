//! The door of a listener: takes what Pingora accepted, if its source may have another connection, does the TLS handshake
//! within its time, and has the requests that come on it served ([`http1`], [`http2`]).

use super::connections::{Why, may_stay};
use super::exchange::Rules;
use super::frames::Frames;
use super::http1::{self, Transport};
use super::live::{ListenerTls, Live};
use super::stream::{Connection, End, Ends, client_of};
use super::{Gateway, Shared, http2, proxy_protocol};
use crate::tls::TlsStream;
use async_trait::async_trait;
use pingora_core::apps::ServerApp;
use pingora_core::protocols::Stream;
use pingora_core::server::ShutdownWatch;
use prometheus::IntCounter;
use rustls::HandshakeKind;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Instant;

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
    ) -> Option<TlsStream<Stream>> {
        let handshake =
            tokio::time::timeout_at(deadline.into(), TlsStream::accept(listener.config.clone(), stream)).await;
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
        let stream = Box::new(self.handshake(stream, &listener, client, deadline).await?);
        drop(handshake);

        let connection = Arc::new(Connection::new(
            client,
            self.address,
            &stream,
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
        let resumed = stream.session().handshake_kind() == Some(HandshakeKind::Resumed);
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
        let abuse = || self.shared.metrics.connections_refused.with_label_values(&["http2-abuse"]);
        let frames = connection.h2.then(|| (Frames::new(now.http2.control), abuse()));
        let cut = Some(self.shared.metrics.connections_cut.clone());
        let serving = Serving { rules: self.rules.clone(), connection: connection.clone(), frames, cut };
        let shutdown = shutdown.clone();
        // A task of its own holds nothing of what the handshake needed, and is polled without what is around this.
        tokio::spawn(async move {
            let _counted = (open, of_ip, of_peer, entry);
            serving.until_its_end(stream, &now, shutdown).await;
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
    /// The frames of HTTP/2, and who counts those whose are too many.
    pub(super) frames: Option<(Frames, IntCounter)>,
    /// Counts those that had to end.
    pub(super) cut: Option<IntCounter>,
}

impl<R: Rules> Serving<R> {
    /// Serves all requests on a connection. `shutdown` says that no more is accepted: over HTTP/2 the client is told then, over
    /// HTTP/1.1 with the next answer, or once those that wait are closed.
    pub(super) async fn until_its_end<T: Transport>(self, stream: Box<T>, live: &Live, shutdown: ShutdownWatch) {
        let Self { rules, connection, frames, cut } = self;
        let timeouts = &live.timeouts;
        let end = if connection.h2 {
            let stream = http2::Stream::new(stream, connection.clone(), timeouts.headers, timeouts.body_total, frames);
            // Connections of HTTP/1.1, most of which wait, have no room for it.
            Box::pin(http2::serve(rules, connection, stream, live.http2, timeouts.keepalive, shutdown)).await
        } else {
            let mut ends = Ends::of(&connection);
            let mut serving = pin!(http1::serve(rules, connection.clone(), stream));
            poll_fn(|cx| {
                if serving.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(None);
                }
                match ready!(ends.poll(cx)) {
                    End::Cut => Poll::Ready(Some(End::Cut)),
                    End::Close => {
                        // It sees that itself, when it is asked; and then says that it has ended, or who wakes it.
                        cx.waker().wake_by_ref();
                        Poll::Pending
                    }
                }
            })
            .await
        };
        if let (Some(End::Cut), Some(cut)) = (end, cut) {
            cut.inc();
        }
    }
}
