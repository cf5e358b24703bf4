//! An Issuer's directory (RFC 9578 §4): where it says which keys it has. It is asked by HTTPS, cached as its answers say,
//! and asked again before they run out. An issuer that does not answer keeps the keys that it was last heard of with, over
//! restarts too where there is a directory to keep them in.

use super::issuer::Issuer;
use super::key::{Key, MOST_KEYS};
use super::token::BASE64URL;
use super::{DirectoryMetrics, unix_now};
use base64::Engine as _;
use http::{Request, Response, StatusCode, header};
use http_cache_semantics::{AfterResponse, BeforeRequest, CachePolicy};
use reqwest::Url;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The media type of a directory.
const MEDIA_TYPE: &str = "application/private-token-issuer-directory";

/// Octets of a directory that are read.
const MOST: usize = 64 << 10;

/// For a whole answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers are taken for fresh for so long at least and at most, and for as long as the last where they do not say.
const FRESH: (Duration, Duration, Duration) =
    (Duration::from_secs(10), Duration::from_secs(24 * 3600), Duration::from_secs(3600));

/// Between attempts to reach one that does not answer: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// Where a directory is, and how it is known for the issuer's.
#[derive(Debug, Clone)]
pub struct Directory {
    /// An https URL.
    pub url: Url,
    /// TLS towards it.
    pub tls: rustls::ClientConfig,
    /// The roots that its certificate must chain to, in PEM; none: the system's.
    pub ca: Option<Vec<u8>>,
    /// The file that its last answer is kept in.
    pub file: Option<PathBuf>,
}

/// The document, of which what is not known is nothing to us.
#[derive(Debug, Deserialize)]
struct Document {
    #[serde(rename = "token-keys")]
    token_keys: Vec<TokenKey>,
}

#[derive(Debug, Deserialize)]
struct TokenKey {
    #[serde(rename = "token-type")]
    kind: u16,
    #[serde(rename = "token-key")]
    key: String,
    #[serde(rename = "not-before", default)]
    from: u64,
}

impl Directory {
    /// Whether it is the same, asked in the same way.
    pub fn is(&self, other: &Self) -> bool {
        self.url == other.url && self.ca == other.ca && self.file == other.file
    }
}

/// The keys of a type in a directory, each with its `not-before`. Those that cannot be read are left out.
fn keys_of(issuer: &Issuer, document: &[u8]) -> Result<Vec<(Key, Duration)>, String> {
    let document: Document = serde_json::from_slice(document).map_err(|e| format!("it is no directory: {e}"))?;
    let mut keys = vec![];
    for of in document.token_keys.iter().filter(|of| of.kind == issuer.kind() as u16).take(MOST_KEYS) {
        let octets = BASE64URL.decode(&of.key).map_err(|_| "it is no base64url".to_owned());
        match octets.and_then(|octets| Key::blind_rsa(&octets).map_err(|e| e.to_string())) {
            Ok(key) => keys.push((key, Duration::from_secs(of.from))),
            Err(e) => tracing::warn!(issuer = issuer.name(), "a key of its directory is left out: {e}"),
        }
    }
    if keys.is_empty() {
        return Err(format!("it has no key for tokens of type {}", issuer.kind() as u16));
    }
    Ok(keys)
}

/// What was last heard, so that it can be asked whether it is still so.
struct Heard {
    policy: CachePolicy,
    body: Vec<u8>,
}

/// Keeps the keys of an issuer, for as long as somebody uses it.
pub(super) async fn keep(issuer: std::sync::Weak<Issuer>, grace: Duration, metrics: DirectoryMetrics) {
    let Some((directory, client)) = begin(&issuer, grace) else { return };
    let mut heard: Option<Heard> = None;
    let mut pause = PAUSE.0;
    loop {
        let asked = match &client {
            Ok(client) => ask(client, &directory.url, heard.take()).await,
            Err(e) => Err((e.clone(), None)),
        };
        let Some(issuer) = issuer.upgrade() else { return };
        let used = asked.and_then(|now| match keys_of(&issuer, &now.body) {
            Ok(keys) => Ok((now, keys)),
            Err(e) => Err((e, None)),
        });
        let wait = match used {
            Ok((now, keys)) => {
                let ids = issuer.key_ids();
                issuer.replace(keys, unix_now(), grace);
                if issuer.key_ids() != ids {
                    tracing::info!(
                        issuer = issuer.name(),
                        keys = issuer.key_ids().len(),
                        "its directory has other keys"
                    );
                }
                if let Some(file) = &directory.file
                    && let Err(e) = write(file, &now.body)
                {
                    tracing::warn!(
                        "{}: {e}; without it, no key after a restart while the issuer is down",
                        file.display()
                    );
                }
                metrics.ok.inc();
                metrics.heard.set(i64::try_from(unix_now().as_secs()).unwrap_or_default());
                pause = PAUSE.0;
                let wait = refresh_in(&now.policy);
                heard = Some(now);
                wait
            }
            Err((e, before)) => {
                metrics.failed.inc();
                let keys = issuer.key_ids().len();
                tracing::warn!(issuer = issuer.name(), url = %directory.url, keys, "its directory: {e}; the keys stay");
                heard = before;
                (pause, pause = (pause * 2).min(PAUSE.1)).0
            }
        };
        drop(issuer);
        tokio::time::sleep(wait).await;
    }
}

/// What an issuer is asked with; and its keys as they were before the last restart.
fn begin(issuer: &std::sync::Weak<Issuer>, grace: Duration) -> Option<(Directory, Result<reqwest::Client, String>)> {
    let issuer = issuer.upgrade()?;
    let directory = issuer.directory()?.clone();
    if let Some(file) = directory.file.as_deref().filter(|file| file.exists()) {
        match std::fs::read(file).map_err(|e| e.to_string()).and_then(|document| keys_of(&issuer, &document)) {
            Ok(keys) => issuer.replace(keys, unix_now(), grace),
            Err(e) => tracing::warn!("{}: {e}", file.display()),
        }
    }
    let client = reqwest::Client::builder()
        .tls_backend_preconfigured(directory.tls.clone())
        .https_only(true)
        .redirect(reqwest::redirect::Policy::none())
        .timeout(PATIENCE)
        .build();
    Some((directory, client.map_err(|e| reason(&e))))
}

/// All of what went wrong: reqwest's own word says little.
fn reason(e: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(e), |e| e.source()).map(ToString::to_string);
    causes.collect::<Vec<_>>().join(": ")
}

/// When to ask again: when a fifth of its time is left.
fn refresh_in(policy: &CachePolicy) -> Duration {
    let (least, most, otherwise) = FRESH;
    let said = policy.is_storable().then(|| policy.time_to_live(SystemTime::now())).filter(|left| !left.is_zero());
    (said.unwrap_or(otherwise).clamp(least, most) * 4 / 5).max(least)
}

/// Asks, whether it is still so where something was heard before.
async fn ask(client: &reqwest::Client, url: &Url, heard: Option<Heard>) -> Result<Heard, (String, Option<Heard>)> {
    let plain = Request::get(url.as_str()).header(header::ACCEPT, MEDIA_TYPE).body(());
    let plain = plain.map_err(|e| (e.to_string(), None))?;
    // It is asked before what was heard is stale, and asked for the difference all the same.
    let later = SystemTime::now() + 2 * FRESH.1;
    let headers = match heard.as_ref().map(|heard| heard.policy.before_request(&plain, later)) {
        Some(BeforeRequest::Stale { request, .. }) => request.headers,
        Some(BeforeRequest::Fresh(_)) | None => plain.headers().clone(),
    };
    match fetch(client, url, headers).await {
        Ok((head, body)) => {
            let Some(before) = heard else { return Ok(Heard { policy: CachePolicy::new(&plain, &head), body }) };
            let not_modified = head.status() == StatusCode::NOT_MODIFIED;
            let (AfterResponse::Modified(policy, _) | AfterResponse::NotModified(policy, _)) =
                before.policy.after_response(&plain, &head, SystemTime::now());
            Ok(Heard { policy, body: if not_modified { before.body } else { body } })
        }
        Err(e) => Err((e, heard)),
    }
}

/// An answer, bounded: a directory, or that it is what it was.
async fn fetch(
    client: &reqwest::Client,
    url: &Url,
    headers: header::HeaderMap,
) -> Result<(Response<()>, Vec<u8>), String> {
    let mut answer = client.get(url.clone()).headers(headers).send().await.map_err(|e| reason(&e))?;
    let mut head = Response::new(());
    *head.status_mut() = answer.status();
    *head.headers_mut() = answer.headers().clone();
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::NOT_MODIFIED => return Ok((head, vec![])),
        other => return Err(format!("it answers {other}")),
    }
    let media_type =
        answer.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = media_type.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case(MEDIA_TYPE) {
        return Err(format!("it answers with {media_type:?}"));
    }
    let mut body = vec![];
    while let Some(part) = answer.chunk().await.map_err(|e| reason(&e))? {
        body.extend_from_slice(&part);
        if body.len() > MOST {
            return Err(format!("it has over {MOST} octets"));
        }
    }
    Ok((head, body))
}

/// Writes a file whole or not at all.
fn write(path: &Path, octets: &[u8]) -> std::io::Result<()> {
    if std::fs::read(path).is_ok_and(|before| before == octets) {
        return Ok(());
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let new = path.with_extension("new");
    std::fs::write(&new, octets)?;
    std::fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(status: u16, fields: &[(&str, &str)]) -> Response<()> {
        let mut response = Response::builder().status(status);
        for (name, value) in fields {
            response = response.header(*name, *value);
        }
        response.body(()).unwrap()
    }

    #[test]
    fn an_answer_says_when_to_ask_again() {
        let request = Request::get("https://i.example/").body(()).unwrap();
        let seconds =
            |fields: &[(&str, &str)]| refresh_in(&CachePolicy::new(&request, &answered(200, fields))).as_secs();
        // A fifth before its end, a second lost to the clock at most.
        assert!((799..=800).contains(&seconds(&[("cache-control", "max-age=1000")])));
        assert!((399..=400).contains(&seconds(&[("cache-control", "max-age=1000"), ("age", "500")])));
        assert_eq!(seconds(&[("cache-control", "max-age=1")]), 10, "not all the time");
        assert_eq!(seconds(&[("cache-control", "max-age=99999999")]), 24 * 3600 * 4 / 5, "nor never");
        for silent in [&[][..], &[("cache-control", "no-store")], &[("cache-control", "max-age=0")]] {
            assert_eq!(seconds(silent), 2880, "{silent:?}");
        }
    }
}
