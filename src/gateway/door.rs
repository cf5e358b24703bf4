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

/// Pingora's proxy, with a word to the stream before each request.
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
        self.0.process_new_http(session, shutdown).await
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
