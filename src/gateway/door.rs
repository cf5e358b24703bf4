//! The door of a listener: takes what Pingora accepted, does the TLS handshake within its time, and hands the stream on
//! to Pingora's proxy; and tells the stream when the head of a request is awaited.

use super::Shared;
use super::stream::{Connection, FederationStream};
use crate::tls;
use async_trait::async_trait;
use pingora_core::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp};
use pingora_core::protocols::Stream;
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::http::v2::server::H2Options;
use pingora_core::server::ShutdownWatch;
use pingora_proxy::HttpProxy;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio_rustls::TlsAcceptor;

/// A listener's application.
pub(super) struct Door {
    pub(super) requests: Arc<Requests>,
    pub(super) acceptor: TlsAcceptor,
    pub(super) shared: Arc<Shared>,
}

#[async_trait]
impl ServerApp for Door {
    async fn process_new(self: &Arc<Self>, stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        let client = client_of(&stream)?;
        let timeouts = &self.shared.timeouts;
        let handshake = tokio::time::timeout(timeouts.tls_handshake, self.acceptor.accept(stream)).await;
        let result = |label| self.shared.metrics.handshakes.with_label_values(&[label]).inc();
        let stream = match handshake {
            Ok(Ok(stream)) => stream,
            Ok(Err(e)) => {
                result("failed");
                tracing::debug!(%client, "TLS handshake: {e}");
                return None;
            }
            Err(_) => {
                result("timeout");
                return None;
            }
        };
        result("ok");
        let connection = {
            let (_, session) = stream.get_ref();
            let identity = session.peer_certificates().and_then(<[_]>::first).map(tls::identity);
            let sni = session.server_name().map(str::to_owned);
            let h2 = session.alpn_protocol() == Some(b"h2");
            Arc::new(Connection::new(client, sni, identity, h2, self.shared.metrics.connections.clone()))
        };
        let stream = FederationStream::new(stream, connection, timeouts.headers);
        self.requests.process_new(Box::new(stream), shutdown).await
    }

    async fn cleanup(&self) {
        ServerApp::cleanup(&*self.requests).await;
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

/// Pingora's proxy, with a word to the stream before each request, and a deadline that a request may set itself.
pub(super) struct Requests(pub(super) Arc<HttpProxy<super::Gateway>>);

#[async_trait]
impl HttpServerApp for Requests {
    async fn process_new_http(
        self: &Arc<Self>,
        session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        if let Some(connection) = session.digest().and_then(super::connection_of) {
            connection.await_head();
        }
        let (watch, mut deadline) = tokio::sync::watch::channel(None);
        let request = WATCH.scope(Watch(Arc::new(watch)), self.0.process_new_http(session, shutdown));
        tokio::select! {
            biased;
            done = request => done,
            () = passed(&mut deadline) => None,
        }
    }

    fn h2_options(&self) -> Option<H2Options> {
        self.0.h2_options()
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        self.0.server_options()
    }

    async fn http_cleanup(&self) {
        self.0.http_cleanup().await;
    }
}

fn client_of(stream: &Stream) -> Option<SocketAddr> {
    let digest = stream.get_socket_digest()?;
    digest.peer_addr().and_then(|address| address.as_inet()).copied()
}
