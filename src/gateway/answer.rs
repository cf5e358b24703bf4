//! Answers of the gateway's own, at either door, and whom a request names.

use super::stream::Connection;
use crate::problem::Refusal;
use bytes::Bytes;
use http::{Method, header};
use pingora_core::{Error, ErrorType, Result};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::Session;
use std::time::Duration;

/// The one authority that a request names, with its port if it has one: `:authority`, or `Host`.
pub(super) fn authority(request: &RequestHeader) -> std::result::Result<&str, Refusal> {
    let mut hosts = request.headers.get_all(header::HOST).iter();
    let host = match (request.uri.authority(), hosts.next()) {
        (Some(authority), _) => authority.as_str(),
        (None, Some(host)) => host.to_str().map_err(|_| Refusal::Misdirected("Host"))?,
        (None, None) => return Err(Refusal::BadHttp("the request has no Host")),
    };
    match hosts.next() {
        Some(_) => Err(Refusal::BadHttp("the request has two Host fields")),
        None => Ok(host),
    }
}

/// A refusal as an answer, and its document.
pub(super) fn refusal(refusal: &Refusal) -> Result<(ResponseHeader, Bytes)> {
    let mut response = ResponseHeader::build(refusal.status(), Some(8))?;
    for (name, value) in refusal.headers() {
        response.append_header(name, value)?;
    }
    response.insert_header(header::CONTENT_TYPE, "application/problem+json")?;
    Ok((response, Bytes::from(refusal.document())))
}

/// How an answer goes out.
pub(super) struct How<'a> {
    pub(super) connection: Option<&'a Connection>,
    /// What follows on the connection cannot be told from this request.
    pub(super) broken: bool,
    /// No connection is kept for a further request.
    pub(super) draining: bool,
    /// As long as a client has that does not read.
    pub(super) within: Duration,
}

/// Writes an answer, within a time: a client that does not read is not waited for. Where octets of the request are still to
/// come, or cannot be told from the next one's, the connection ends with it.
pub(super) async fn write(
    session: &mut Session,
    how: How<'_>,
    mut response: ResponseHeader,
    body: Bytes,
) -> Result<()> {
    response.insert_header(header::CONTENT_LENGTH, body.len())?;
    let cut_short = how.broken || !session.as_mut().is_body_done();
    if cut_short && let Some(connection) = how.connection {
        connection.linger();
    }
    if cut_short || how.draining {
        session.set_keepalive(None);
    }
    // The answer to HEAD says how long it would be, and that is all (RFC 9110 §9.3.2).
    let head_only = session.req_header().method == Method::HEAD;
    let write = async {
        session.write_response_header(Box::new(response), head_only).await?;
        if head_only {
            return Ok(());
        }
        session.write_response_body(Some(body), true).await
    };
    match tokio::time::timeout(how.within, write).await {
        Ok(written) => written,
        Err(_) => Error::e_explain(ErrorType::WriteTimedout, "the client does not read").map_err(Error::into_down),
    }
}
