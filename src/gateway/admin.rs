//! The listener for operators: `/metrics`, `/healthz`, `/readyz`. On loopback, unless they say otherwise.

use super::Shared;
use async_trait::async_trait;
use http::{Response, StatusCode, header};
use pingora_core::apps::http_app::ServeHttp;
use pingora_core::protocols::http::ServerSession;
use std::sync::Arc;
use std::time::Duration;

/// The listener's application.
pub(super) struct Admin(pub(super) Arc<Shared>);

/// A node that does not accept a connection in this time is not ready.
const PROBE: Duration = Duration::from_secs(1);

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let request = session.req_header();
        if request.method != http::Method::GET && request.method != http::Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "text/plain", b"GET only\n".to_vec());
        }
        match request.uri.path() {
            "/healthz" => text(StatusCode::OK, "text/plain", b"ok\n".to_vec()),
            "/readyz" => match self.ready().await {
                Ok(nodes) => text(StatusCode::OK, "text/plain", format!("ready: {nodes} nodes accept\n").into_bytes()),
                Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{why}\n").into_bytes()),
            },
            "/metrics" => {
                let metrics = &self.0.metrics;
                let lost = self.0.access_log.lost();
                metrics.log_lines_lost.inc_by(lost.saturating_sub(metrics.log_lines_lost.get()));
                text(StatusCode::OK, "text/plain; version=0.0.4", metrics.render())
            }
            _ => text(StatusCode::NOT_FOUND, "text/plain", b"/metrics, /healthz, /readyz\n".to_vec()),
        }
    }
}

impl Admin {
    /// Ready is who can forward: a node accepts a connection now.
    async fn ready(&self) -> Result<usize, &'static str> {
        let nodes = &self.0.nodes.settings().nodes;
        let probes: Vec<_> = nodes
            .iter()
            .map(|node| {
                let address = node.address;
                tokio::spawn(async move {
                    let connect = tokio::net::TcpStream::connect(address);
                    tokio::time::timeout(PROBE, connect).await.is_ok_and(|connected| connected.is_ok())
                })
            })
            .collect();
        let mut accepting = 0;
        for probe in probes {
            accepting += usize::from(probe.await.unwrap_or(false));
        }
        if accepting > 0 { Ok(accepting) } else { Err("no Delivery Service node accepts a connection") }
    }
}

fn text(status: StatusCode, content_type: &'static str, body: Vec<u8>) -> Response<Vec<u8>> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let length = header::HeaderValue::from(response.body().len());
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response.headers_mut().insert(header::CONTENT_LENGTH, length);
    response
}
