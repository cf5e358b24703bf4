//! HTTPS towards issuers, as a client of them: no redirect, no proxy, and answers that are bounded in time and size.

use http::{HeaderMap, header};
use std::time::Duration;

/// Octets of an answer that are read.
const MOST: usize = 64 << 10;

/// What asks, for whole answers within `patience`.
pub(crate) fn client(tls: rustls::ClientConfig, patience: Duration) -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .https_only(true)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .timeout(patience)
}

/// All of what went wrong: reqwest's own word says little.
pub(crate) fn reason(e: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(e), |e| e.source()).map(ToString::to_string);
    causes.collect::<Vec<_>>().join(": ")
}

/// An answer's body.
pub(crate) async fn body(answer: &mut reqwest::Response) -> Result<Vec<u8>, String> {
    let mut octets = vec![];
    while let Some(part) = answer.chunk().await.map_err(|e| reason(&e))? {
        octets.extend_from_slice(&part);
        if octets.len() > MOST {
            return Err(format!("it has over {MOST} octets"));
        }
    }
    Ok(octets)
}

/// Whether an answer is of a media type, its parameters aside.
pub(crate) fn expect_type(headers: &HeaderMap, media_type: &str) -> Result<(), String> {
    let of = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match of.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(media_type) {
        true => Ok(()),
        false => Err(format!("it answers with {of:?}, not {media_type}")),
    }
}
