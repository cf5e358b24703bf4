//! The listener for operators: `/metrics`, `/healthz`, `/readyz`, and `POST /reload`. On loopback, unless they say otherwise.

use super::{Shared, reload};
use crate::upstream::Target;
use async_trait::async_trait;
use http::{Response, StatusCode, header};
use pingora_core::apps::http_app::ServeHttp;
use pingora_core::protocols::http::ServerSession;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::oneshot;

/// The listener's application.
pub(super) struct Admin {
    pub(super) shared: Arc<Shared>,
    pub(super) reloads: reload::Later,
}

/// A node that does not accept a connection in this time is not ready.
const PROBE: Duration = Duration::from_secs(1);

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let request = session.req_header();
        if request.uri.path() == "/reload" {
            return match request.method {
                // A page in an operator's browser is no operator.
                http::Method::POST if request.headers.contains_key(header::ORIGIN) => {
                    text(StatusCode::FORBIDDEN, "text/plain", b"not from a browser\n".to_vec())
                }
                http::Method::POST => self.reload().await,
                _ => not_allowed("POST"),
            };
        }
        if request.method != http::Method::GET && request.method != http::Method::HEAD {
            return not_allowed("GET, HEAD");
        }
        // This listener may be there before the others.
        let opening = self.shared.opening.load(Ordering::Relaxed) > 0;
        match request.uri.path() {
            "/healthz" | "/readyz" if opening => {
                text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", b"starting\n".to_vec())
            }
            "/healthz" => text(StatusCode::OK, "text/plain", b"ok\n".to_vec()),
            "/readyz" => match self.ready().await {
                Ok(nodes) => text(StatusCode::OK, "text/plain", format!("ready: {nodes} nodes accept\n").into_bytes()),
                Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{why}\n").into_bytes()),
            },
            "/metrics" => {
                let metrics = &self.shared.metrics;
                let lost = self.shared.access_log.lost();
                metrics.log_lines_lost.inc_by(lost.saturating_sub(metrics.log_lines_lost.get()));
                text(StatusCode::OK, "text/plain; version=0.0.4", metrics.render())
            }
            _ => text(StatusCode::NOT_FOUND, "text/plain", b"/metrics, /healthz, /readyz, POST /reload\n".to_vec()),
        }
    }
}

impl Admin {
    /// Has the configuration read again: 200 with the generation in use, or 422 with all that is wrong.
    async fn reload(&self) -> Response<Vec<u8>> {
        let (answer, outcome) = oneshot::channel();
        let asked = match self.reloads.get() {
            Some(reloads) => reloads.send(answer).await.is_ok(),
            None => false,
        };
        let outcome = if asked { outcome.await.ok() } else { None };
        match outcome {
            Some(Ok(generation)) => {
                text(StatusCode::OK, "text/plain", format!("reloaded: generation {generation}\n").into_bytes())
            }
            Some(Err(errors)) => {
                let said = errors.join("\n") + "\n";
                text(StatusCode::UNPROCESSABLE_ENTITY, "text/plain", said.into_bytes())
            }
            None => text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", b"not now\n".to_vec()),
        }
    }

    /// Ready is who can forward: a node that is not left out accepts a connection now.
    async fn ready(&self) -> Result<usize, &'static str> {
        if self.shared.draining.load(Ordering::Relaxed) {
            return Err("draining");
        }
        let nodes = self.shared.nodes.members();
        let probes: Vec<_> = nodes
            .into_iter()
            .map(|node| {
                tokio::spawn(async move {
                    let connects = async {
                        match &node.target {
                            Target::Inet(address) => tokio::net::TcpStream::connect(address).await.is_ok(),
                            Target::Unix(path) => tokio::net::UnixStream::connect(path).await.is_ok(),
                        }
                    };
                    tokio::time::timeout(PROBE, connects).await.unwrap_or(false)
                })
            })
            .collect();
        let mut accepting = 0;
        for probe in probes {
            accepting += usize::from(probe.await.unwrap_or(false));
        }
        if accepting > 0 && self.shared.nodes.any_usable() {
            Ok(accepting)
        } else {
            Err("no Delivery Service node accepts a connection")
        }
    }
}

fn not_allowed(allow: &'static str) -> Response<Vec<u8>> {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "text/plain", format!("{allow} only\n").into_bytes());
    response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static(allow));
    response
}

fn text(status: StatusCode, content_type: &'static str, body: Vec<u8>) -> Response<Vec<u8>> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let length = header::HeaderValue::from(response.body().len());
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response.headers_mut().insert(header::CONTENT_LENGTH, length);
    response
}
