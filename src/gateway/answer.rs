//! Answers of the gateway's own, at either door, and whom a request names.

use super::fields::all;
use crate::problem::Refusal;
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderValue, Response, StatusCode, header};

/// The one authority that a request names, with its port if it has one: `:authority`, or `Host`. Where both are there they are
/// to be the same (RFC 9113 §8.3.1).
pub(super) fn authority(request: &Parts) -> Result<&str, Refusal> {
    let mut hosts = all(&request.headers, &header::HOST);
    let host = match (request.uri.authority(), hosts.next()) {
        (Some(authority), Some(host)) if !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()) => {
            return Err(Refusal::BadHttp("Host is another than the target's authority"));
        }
        (Some(authority), _) => authority.as_str(),
        (None, Some(host)) => host.to_str().map_err(|_| Refusal::Misdirected("Host"))?,
        (None, None) => return Err(Refusal::BadHttp("the request has no Host")),
    };
    match hosts.next() {
        Some(_) => Err(Refusal::BadHttp("the request has two Host fields")),
        None => Ok(host),
    }
}

/// A refusal as an answer.
pub(super) fn refusal(refusal: &Refusal) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(refusal.document()));
    *response.status_mut() = refusal.status();
    for (name, value) in refusal.headers() {
        response.headers_mut().append(name, value);
    }
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    response
}

/// What the gateway answers from what it knows.
pub(super) fn known(content_type: &'static str, body: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = Response::new(body.into());
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
