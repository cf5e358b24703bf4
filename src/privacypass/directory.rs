//! An Issuer's directory (RFC 9578 §4): where it says which keys it has. It is asked by HTTPS, cached as its answers say,
//! and asked again before they run out. An issuer that does not answer keeps the keys that it was last heard of with, over
//! restarts too where there is a directory to keep them in.

use super::https::{self, reason};
use super::issuer::Issuer;
use super::key::{Key, MOST_KEYS};
use super::token::BASE64URL;
use super::{DirectoryMetrics, unix_now};
use base64::Engine as _;
use http::{Request, Response, StatusCode, header};
use http_cache_semantics::{AfterResponse, BeforeRequest, CacheOptions, CachePolicy};
use privacypass::TokenType;
use reqwest::Url;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

/// The media type of a directory (RFC 9578 §8.3).
pub const MEDIA_TYPE: &str = "application/private-token-issuer-directory";

/// For a whole answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers are taken for fresh for so long at least and at most.
const FRESH: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(24 * 3600));

/// For so long where they do not say, and where they say that they are stale or not to be kept.
const UNSAID: (Duration, Duration) = (Duration::from_secs(3600), Duration::from_secs(60));

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
#[serde(rename_all = "kebab-case")]
pub(crate) struct Document {
    /// Where token requests go: a URI, or a path.
    #[serde(default)]
    pub(crate) issuer_request_uri: String,
    token_keys: Vec<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct TokenKey {
    token_type: u16,
    token_key: String,
    not_before: Option<u64>,
}

impl Document {
    /// The keys of a type, as they are published, each with its `not-before` in seconds since the Unix epoch. What is no
    /// base64url is none.
    pub(crate) fn keys(&self, kind: TokenType) -> impl Iterator<Item = (Option<Vec<u8>>, u64)> {
        // An entry that is not as we know them may be of a type that we do not know.
        let read = self.token_keys.iter().filter_map(|of| TokenKey::deserialize(of).ok());
        let of_kind = read.filter(move |of| of.token_type == kind as u16);
        of_kind.map(|of| (BASE64URL.decode(&of.token_key).ok(), of.not_before.unwrap_or(0)))
    }
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
    for (octets, from) in document.keys(issuer.kind()).take(MOST_KEYS) {
        let octets = octets.ok_or_else(|| "it is no base64url".to_owned());
        match octets.and_then(|octets| Key::blind_rsa(&octets).map_err(|e| e.to_string())) {
            Ok(key) => keys.push((key, Duration::from_secs(from))),
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
    /// It says how long it is fresh.
    says: bool,
    body: Vec<u8>,
}

/// What is kept over a restart: what the directory said last, and the keys that it has no more and that are trusted yet.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    document: String,
    /// Each as it was published, and until when, in seconds since the Unix epoch.
    gone: Vec<(String, u64)>,
}

/// Keeps the keys of an issuer, for as long as somebody uses it, whatever its directory answers.
pub(super) async fn keep(issuer: Weak<Issuer>, grace: Duration, metrics: DirectoryMetrics) {
    while tokio::spawn(keep_on(issuer.clone(), grace, metrics.clone())).await.is_err() {
        tracing::error!("an issuer's directory could not be read: this is a fault of ours");
        tokio::time::sleep(PAUSE.1).await;
    }
}

async fn keep_on(issuer: Weak<Issuer>, grace: Duration, metrics: DirectoryMetrics) {
    let Some((directory, client)) = begin(&issuer, grace) else { return };
    let mut heard: Option<Heard> = None;
    let mut pause = PAUSE.0;
    loop {
        let asked = match &client {
            Ok(client) => ask(client, &directory.url, heard.as_ref()).await,
            Err(e) => Err(e.clone()),
        };
        let Some(issuer) = issuer.upgrade() else { return };
        let used = asked.and_then(|now| Ok((keys_of(&issuer, &now.body)?, now)));
        let wait = match used {
            Ok((keys, now)) => {
                let ids = issuer.key_ids();
                issuer.replace(keys, vec![], unix_now(), grace);
                if issuer.key_ids() != ids {
                    tracing::info!(
                        issuer = issuer.name(),
                        keys = issuer.key_ids().len(),
                        "its directory has other keys"
                    );
                }
                if let Some(file) = &directory.file
                    && let Err(e) = write(file, &issuer, &now.body)
                {
                    tracing::warn!(
                        "{}: {e}; without it, no key after a restart while the issuer is down",
                        file.display()
                    );
                }
                metrics.ok.inc();
                metrics.heard.set(i64::try_from(unix_now().as_secs()).unwrap_or_default());
                pause = PAUSE.0;
                let wait = refresh_in(&now);
                heard = Some(now);
                wait
            }
            Err(e) => {
                metrics.failed.inc();
                let keys = issuer.key_ids().len();
                tracing::warn!(issuer = issuer.name(), url = %directory.url, keys, "its directory: {e}; the keys stay");
                (pause, pause = (pause * 2).min(PAUSE.1)).0
            }
        };
        // Not held meanwhile: who does not use it any more lets it go.
        let again = Arc::downgrade(&issuer);
        drop(issuer);
        wait_for(&again, wait).await;
    }
}

/// Waits, unless it is to be asked at once.
async fn wait_for(issuer: &Weak<Issuer>, wait: Duration) {
    let until = tokio::time::Instant::now() + wait;
    while let Some(left) = until.checked_duration_since(tokio::time::Instant::now()).filter(|left| !left.is_zero()) {
        let Some(issuer) = issuer.upgrade() else { return };
        // Held for a while at most.
        if tokio::time::timeout(left.min(Duration::from_secs(10)), issuer.asked_now()).await.is_ok() {
            return;
        }
    }
}

/// What an issuer is asked with; and its keys as they were before the last restart.
fn begin(issuer: &Weak<Issuer>, grace: Duration) -> Option<(Directory, Result<reqwest::Client, String>)> {
    let issuer = issuer.upgrade()?;
    let directory = issuer.directory()?.clone();
    if let Some(file) = directory.file.as_deref().filter(|file| file.exists()) {
        match read(file, &issuer) {
            Ok((keys, gone)) => issuer.replace(keys, gone, unix_now(), grace),
            Err(e) => tracing::warn!("{}: {e}", file.display()),
        }
    }
    let client = https::client(directory.tls.clone(), PATIENCE).build();
    Some((directory, client.map_err(|e| reason(&e))))
}

/// When to ask again: when a fifth of its time is left.
fn refresh_in(heard: &Heard) -> Duration {
    let (least, most) = FRESH;
    let left = heard.policy.is_storable().then(|| heard.policy.time_to_live(SystemTime::now()));
    let fresh = match left.filter(|left| !left.is_zero()) {
        Some(left) => left,
        None if heard.says => UNSAID.1,
        None => UNSAID.0,
    };
    (fresh.clamp(least, most) * 4 / 5).max(least)
}

/// What an answer says of its freshness, kept for ourselves alone.
fn policy(request: &Request<()>, head: &mut Response<()>) -> (CachePolicy, bool) {
    // An age beyond all time would overflow where it is added to.
    let age = head.headers().get(header::AGE).and_then(|age| age.to_str().ok()).and_then(|age| age.parse::<u64>().ok());
    if age.is_none_or(|age| age > 366 * 86_400) {
        head.headers_mut().remove(header::AGE);
    }
    let says =
        [header::CACHE_CONTROL, header::EXPIRES, header::PRAGMA].iter().any(|name| head.headers().contains_key(name));
    let options = CacheOptions { shared: false, ..CacheOptions::default() };
    (CachePolicy::new_options(request, head, SystemTime::now(), options), says)
}

/// Asks, whether it is still so where something was heard before.
async fn ask(client: &reqwest::Client, url: &Url, heard: Option<&Heard>) -> Result<Heard, String> {
    let plain = Request::get(url.as_str()).header(header::ACCEPT, MEDIA_TYPE).body(()).map_err(|e| e.to_string())?;
    // It is asked before what was heard is stale, and asked for the difference all the same.
    let later = SystemTime::now() + 2 * FRESH.1;
    let headers = match heard.map(|heard| heard.policy.before_request(&plain, later)) {
        Some(BeforeRequest::Stale { request, .. }) => request.headers,
        Some(BeforeRequest::Fresh(_)) | None => plain.headers().clone(),
    };
    let (mut head, body) = fetch(client, url, headers).await?;
    let not_modified = head.status() == StatusCode::NOT_MODIFIED;
    let (policy, says) = policy(&plain, &mut head);
    let Some(before) = heard.filter(|_| not_modified) else { return Ok(Heard { policy, says, body }) };
    let (AfterResponse::Modified(policy, _) | AfterResponse::NotModified(policy, _)) =
        before.policy.after_response(&plain, &head, SystemTime::now());
    Ok(Heard { policy, says: says || before.says, body: before.body.clone() })
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
    https::expect_type(answer.headers(), MEDIA_TYPE)?;
    let body = https::body(&mut answer).await?;
    Ok((head, body))
}

type Keys = Vec<(Key, Duration)>;

/// Reads what was kept.
fn read(path: &Path, issuer: &Issuer) -> Result<(Keys, Keys), String> {
    let octets = std::fs::read(path).map_err(|e| e.to_string())?;
    let kept: Kept = serde_json::from_slice(&octets).map_err(|e| e.to_string())?;
    let gone = kept.gone.iter().filter_map(|(key, until)| {
        let octets = BASE64URL.decode(key).ok()?;
        Some((Key::blind_rsa(&octets).ok()?, Duration::from_secs(*until)))
    });
    Ok((keys_of(issuer, kept.document.as_bytes())?, gone.collect()))
}

/// Writes what is to be kept.
fn write(path: &Path, issuer: &Issuer, document: &[u8]) -> std::io::Result<()> {
    let gone = issuer.gone().into_iter().map(|(key, until)| (BASE64URL.encode(key.token_key()), until.as_secs()));
    let kept = Kept { document: String::from_utf8_lossy(document).into_owned(), gone: gone.collect() };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    crate::files::replace(path, &serde_json::to_vec(&kept)?)
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
        let seconds = |fields: &[(&str, &str)]| {
            let (policy, says) = policy(&request, &mut answered(200, fields));
            refresh_in(&Heard { policy, says, body: vec![] }).as_secs()
        };
        // A fifth before its end, a second lost to the clock at most.
        assert!((799..=800).contains(&seconds(&[("cache-control", "max-age=1000")])));
        assert!((799..=800).contains(&seconds(&[("cache-control", "private, max-age=1000"), ("set-cookie", "a=b")])));
        assert!((399..=400).contains(&seconds(&[("cache-control", "max-age=1000"), ("age", "500")])));
        assert_eq!(seconds(&[("cache-control", "max-age=1")]), 10, "not all the time");
        assert_eq!(seconds(&[("cache-control", "max-age=99999999")]), 24 * 3600 * 4 / 5, "nor never");
        assert_eq!(seconds(&[]), 2880);
        for stale in [
            &[("cache-control", "no-store")][..],
            &[("cache-control", "max-age=0")],
            &[("cache-control", "max-age=300"), ("age", "300")],
            &[("expires", "0")],
        ] {
            assert_eq!(seconds(stale), 48, "{stale:?}");
        }
        for beyond in ["18446744073709551615", "99999999999999999999", "-1", "x"] {
            assert!(seconds(&[("cache-control", "max-age=1000"), ("age", beyond)]) >= 799, "{beyond}");
            let both = seconds(&[("cache-control", &format!("max-age={beyond}")), ("age", beyond)]);
            assert!((10..=24 * 3600).contains(&both), "{beyond}");
        }
    }

    #[test]
    fn what_is_not_known_in_a_directory_is_left_out() {
        let document: Document = serde_json::from_str(
            r#"{"token-keys": [{"token-type": 2, "token-key": "AAEC", "not-before": null}, 7, {"token-type": 2},
                {"token-type": "new"}, {"token-type": 2, "token-key": "*", "not-before": 9, "x": 1},
                {"token-type": 1, "token-key": "AAEC"}], "more": {}}"#,
        )
        .unwrap();
        let keys: Vec<_> = document.keys(TokenType::Public).collect();
        assert_eq!(keys, [(Some(vec![0, 1, 2]), 0), (None, 9)]);
    }
}
