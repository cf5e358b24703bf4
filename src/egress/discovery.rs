//! Where a provider's Delivery Service is: the provider says its name, by HTTPS at a well-known place, and DNS has its
//! addresses. Both are kept, for as long as the answer says and for a minute, and used for a while where there is no
//! newer answer.
//!
//! The provider, its answer, where that redirects to, and all of DNS are a stranger's: what is asked, followed and read
//! is bounded, and no address is connected to that is not public. Only what the operator has said of a provider is
//! taken as it is, and only for that provider.

use super::cache::{Cache, Known};
use super::is_public;
use super::resolver::{Guard, Resolver};
use crate::privacypass::https::{self, reason};
use crate::wire::ProviderName;
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_cache_semantics::{CacheOptions, CachePolicy};
use reqwest::Url;
use rustls::RootCertStore;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Where a provider says it, on its own domain.
const PATH: &str = "/.well-known/mimi/ds-domain";

/// What it says it as.
const MEDIA_TYPE: &str = "text/plain";

/// Octets of its answer: a name, and an end of line.
const LONGEST: usize = 255;

/// Redirects that are followed.
const REDIRECTS: usize = 3;

/// Providers of which something is kept.
const PROVIDERS: usize = 10_000;

/// Providers that are asked at once, and names that are resolved for whom they lead to.
const AT_ONCE: usize = 64;

/// An answer is taken for fresh for so long at least and at most.
const FRESH: (Duration, Duration) = (Duration::from_secs(60), DAY);

/// For so long where it does not say.
const UNSAID: Duration = Duration::from_secs(3600);

/// As long as what is not fresh any more is used while there is nothing newer.
const DAY: Duration = Duration::from_secs(24 * 3600);

/// As long as addresses are used before the name is resolved again, and as long as they are used while it is. The
/// system's resolver does not tell for how long they are good.
const RESOLVED: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(600));

/// What an operator says of discovery.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Providers that are not looked up, or not like others.
    pub peers: Vec<StaticPeer>,
    /// The roots that others' servers chain to.
    pub roots: Arc<RootCertStore>,
    /// The certificate shown to them.
    pub identity: Option<crate::tls::Certificate>,
    /// For a question with all its redirects; and again for the resolution of the name that it is answered with.
    pub timeout: Duration,
    /// Whether addresses that are not public are connected to: in a federation on a network of its own. Without it,
    /// only those of [`StaticPeer`]s are.
    pub allow_private: bool,
}

/// What an operator says of a provider. Nothing of it is checked: it is the operator's word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticPeer {
    /// Its name, compared without regard to case.
    pub provider: String,
    /// The domain of its Delivery Service. None: the provider is asked.
    pub ds_domain: Option<String>,
    /// Where to connect for the provider and its Delivery Service. None: where their names lead to.
    pub address: Option<SocketAddr>,
}

/// A provider's Delivery Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its domain, in lower case: `Host`, SNI, and what its certificate must be for.
    pub ds_domain: String,
    /// Where it is: at least one address, in the order in which they are to be tried. They were checked: to connect to
    /// anything else, to the name for instance, is to connect to what was not.
    pub addresses: Vec<SocketAddr>,
}

/// Why a provider's Delivery Service is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No valid domain name, or an IP address.
    #[error("no provider can have this name")]
    NotAProvider,
    /// It cannot be resolved or connected to, its certificate is not good, or it does not answer in time, or with what
    /// passes (429, 5xx).
    #[error("the provider cannot be reached")]
    Unreachable,
    /// It answers, and not with the name of a Delivery Service.
    #[error("the provider does not say where its Delivery Service is: {0}")]
    BadAnswer(&'static str),
    /// It is, or sends us, where strangers must not send us.
    #[error("the provider is at no public address")]
    PrivateAddress,
    /// Too many providers are being asked. It may be tried again soon.
    #[error("too many providers are being looked up")]
    Busy,
}

/// Why there can be no discovery with these settings.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A static peer has a name that is none.
    #[error("{0:?} is no domain name")]
    Name(String),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] crate::tls::Error),
    /// The HTTP client.
    #[error("no HTTP client: {0}")]
    Http(#[from] reqwest::Error),
}

/// A static peer, ready for use.
struct Peer {
    ds_domain: Option<Arc<str>>,
    address: Option<SocketAddr>,
    /// Asks it at its address. No other question leads there: a redirect of a stranger's, say.
    client: Option<reqwest::Client>,
}

/// Finds Delivery Services.
pub struct Discovery {
    peers: HashMap<String, Peer>,
    client: reqwest::Client,
    resolver: Resolver,
    timeout: Duration,
    /// Domains of Delivery Services, by provider.
    domains: Arc<Cache<Arc<str>>>,
    /// By the domain of the Delivery Service.
    found: Arc<Cache<Arc<Found>>>,
}

impl std::fmt::Debug for Discovery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Discovery").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

impl Discovery {
    /// Nothing is known yet.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn new(settings: Settings) -> Result<Self, SetupError> {
        let Settings { peers, roots, identity, timeout, allow_private } = settings;
        let tls = crate::tls::client_config(roots, identity)?;
        let resolver = Resolver::new(allow_private);
        let client = |fixed| {
            let guard = Guard { fixed, resolver: resolver.clone() };
            // A connection that was kept would be to what was checked then.
            https::client(tls.clone(), timeout).pool_max_idle_per_host(0).dns_resolver(guard).build()
        };
        let lower = |name: String| domain_name(name.as_bytes()).ok_or(SetupError::Name(name));
        let mut by_name = HashMap::new();
        for StaticPeer { provider, ds_domain, address } in peers {
            let provider = lower(provider)?;
            let ds_domain: Option<Arc<str>> = ds_domain.map(lower).transpose()?.map(Arc::from);
            let client = match (&ds_domain, address) {
                (None, Some(address)) => Some(client(Some((provider.clone(), address)))?),
                _ => None,
            };
            by_name.insert(provider, Peer { ds_domain, address, client });
        }
        Ok(Self {
            peers: by_name,
            client: client(None)?,
            resolver,
            timeout,
            domains: Cache::new(PROVIDERS, AT_ONCE),
            found: Cache::new(PROVIDERS, AT_ONCE),
        })
    }

    /// The Delivery Service of a provider: at once where it is known, else as soon as the provider and DNS have
    /// answered, or have had their time. To be called on a tokio runtime; what is begun there goes on if nobody waits
    /// for it any more.
    ///
    /// # Errors
    /// [`Error`]. What fails is not tried again for 10 seconds.
    pub async fn find(&self, provider: &str) -> Result<Arc<Found>, Error> {
        self.find_at(provider, Instant::now()).await
    }

    async fn find_at(&self, provider: &str, now: Instant) -> Result<Arc<Found>, Error> {
        let provider = domain_name(provider.as_bytes()).ok_or(Error::NotAProvider)?;
        let peer = self.peers.get(&provider);
        let timeout = self.timeout;
        let ds_domain = match peer.and_then(|peer| peer.ds_domain.clone()) {
            Some(ds_domain) => ds_domain,
            None => {
                let client = peer.and_then(|peer| peer.client.as_ref()).unwrap_or(&self.client).clone();
                let of = provider.clone();
                self.domains.find(&provider, now, move || ask(client, of, timeout)).await?
            }
        };
        if let Some(address) = peer.and_then(|peer| peer.address) {
            return Ok(Arc::new(Found { ds_domain: ds_domain.to_string(), addresses: vec![address] }));
        }
        let (resolver, of) = (self.resolver.clone(), ds_domain.clone());
        self.found.find(&ds_domain, now, move || locate(resolver, of, timeout)).await
    }
}

/// A domain name in lower case, of those that can be a provider's. None: it is none, or the number of a host. The last
/// label of a name is no number: whatever ends in one is read as an IPv4 address in one of its spellings (`127.1`,
/// `0x7f.1`, `2130706433`) by those who resolve names, and by the URL standard ("ends in a number").
pub(crate) fn domain_name(octets: &[u8]) -> Option<String> {
    let name = ProviderName::from_bytes(octets).ok()?.to_string();
    let last = name.rsplit('.').next().unwrap_or_default();
    let hexadecimal = |digits: &str| digits.bytes().all(|octet| octet.is_ascii_hexdigit());
    let number = last.bytes().all(|octet| octet.is_ascii_digit()) || last.strip_prefix("0x").is_some_and(hexadecimal);
    (!number).then_some(name)
}

/// Resolves the domain of a Delivery Service, in time.
async fn locate(resolver: Resolver, ds_domain: Arc<str>, timeout: Duration) -> Result<Known<Arc<Found>>, Error> {
    let addresses = tokio::time::timeout(timeout, resolver.resolve(&ds_domain)).await;
    let addresses = addresses.unwrap_or(Err(Error::Unreachable))?;
    let now = Instant::now();
    let value = Arc::new(Found { ds_domain: ds_domain.to_string(), addresses });
    Ok(Known { value, fresh: now + RESOLVED.0, soon: now + RESOLVED.1, last: now + DAY })
}

/// Asks a provider for the domain of its Delivery Service, in time.
async fn ask(client: reqwest::Client, provider: String, timeout: Duration) -> Result<Known<Arc<str>>, Error> {
    let answer = tokio::time::timeout(timeout, fetch(&client, &provider)).await;
    let answer = answer.unwrap_or_else(|_| {
        tracing::debug!(provider, "it does not answer in time");
        Err(Error::Unreachable)
    });
    let (ds_domain, fresh) = answer?;
    let fresh = Instant::now() + fresh;
    Ok(Known { value: ds_domain.into(), fresh, soon: fresh + DAY, last: fresh + DAY })
}

/// Follows a provider to its answer: the domain of its Delivery Service, and for how long that is fresh.
async fn fetch(client: &reqwest::Client, provider: &str) -> Result<(String, Duration), Error> {
    let mut url = Url::parse(&format!("https://{provider}{PATH}")).map_err(|_| Error::NotAProvider)?;
    if url.host_str() != Some(provider) {
        // An A-label that is none.
        return Err(Error::NotAProvider);
    }
    // The redirects are followed here, so that nothing is asked that was not looked at.
    for _ in 0..=REDIRECTS {
        let answer = client.get(url.clone()).header(header::ACCEPT, MEDIA_TYPE).send().await;
        let answer = answer.map_err(|e| failure(provider, &e))?;
        match answer.status() {
            StatusCode::OK => return read(provider, &url, answer).await,
            StatusCode::MOVED_PERMANENTLY
            | StatusCode::FOUND
            | StatusCode::SEE_OTHER
            | StatusCode::TEMPORARY_REDIRECT
            | StatusCode::PERMANENT_REDIRECT => url = redirected(&url, answer.headers())?,
            status => {
                tracing::debug!(provider, "it answers {status}");
                return Err(match status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
                    true => Error::Unreachable,
                    false => Error::BadAnswer("its status is not 200"),
                });
            }
        }
    }
    Err(Error::BadAnswer("it redirects too often"))
}

/// Where a redirect leads, if it may.
fn redirected(from: &Url, headers: &HeaderMap) -> Result<Url, Error> {
    let location = headers.get(header::LOCATION).and_then(|location| location.to_str().ok());
    let to = location.and_then(|location| from.join(location).ok());
    let to = to.ok_or(Error::BadAnswer("it redirects to what is no URL"))?;
    if to.scheme() != "https" || to.port_or_known_default() != Some(443) {
        return Err(Error::BadAnswer("it redirects to what is not HTTPS on port 443"));
    }
    if !to.username().is_empty() || to.password().is_some() {
        return Err(Error::BadAnswer("it redirects to a URL with credentials"));
    }
    // An address in a URL is connected to without a resolver that would look at it. The URL has it in its one spelling.
    let host = to.host_str().unwrap_or_default();
    if let Ok(ip) = host.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Err(match is_public(ip) {
            true => Error::BadAnswer("it redirects to an address"),
            false => Error::PrivateAddress,
        });
    }
    match domain_name(host.as_bytes()) {
        Some(_) => Ok(to),
        None => Err(Error::BadAnswer("it redirects to what is no domain name")),
    }
}

/// Reads an answer.
async fn read(provider: &str, url: &Url, mut answer: reqwest::Response) -> Result<(String, Duration), Error> {
    https::expect_type(answer.headers(), MEDIA_TYPE)
        .map_err(|_| Error::BadAnswer("its content type is not text/plain"))?;
    let mut head = Response::new(());
    *head.headers_mut() = answer.headers().clone();
    let fresh = fresh_for(url, head);
    let mut body = vec![];
    while let Some(part) = answer.chunk().await.map_err(|e| failure(provider, &e))? {
        if body.len() + part.len() > LONGEST {
            return Err(Error::BadAnswer("it is longer than any domain name"));
        }
        body.extend_from_slice(&part);
    }
    let line = body.strip_suffix(b"\n").map_or(&*body, |line| line.strip_suffix(b"\r").unwrap_or(line));
    let ds_domain = domain_name(line).ok_or(Error::BadAnswer("it is no domain name"))?;
    Ok((ds_domain, fresh))
}

/// For how long an answer of 200 is fresh (RFC 9111), within bounds.
fn fresh_for(url: &Url, mut head: Response<()>) -> Duration {
    let headers = head.headers_mut();
    let fields = [header::CACHE_CONTROL, header::EXPIRES, header::PRAGMA];
    if !fields.iter().any(|name| headers.contains_key(name)) {
        return UNSAID;
    }
    // An age beyond all time would overflow where it is added to.
    let age = headers.get(header::AGE).and_then(|age| age.to_str().ok()).and_then(|age| age.parse::<u64>().ok());
    if age.is_none_or(|age| age > 366 * 86_400) {
        headers.remove(header::AGE);
    }
    let Ok(request) = Request::get(url.as_str()).body(()) else { return UNSAID };
    let (options, now) = (CacheOptions { shared: false, ..CacheOptions::default() }, SystemTime::now());
    let policy = CachePolicy::new_options(&request, &head, now, options);
    let fresh = if policy.is_storable() { policy.time_to_live(now) } else { Duration::ZERO };
    fresh.clamp(FRESH.0, FRESH.1)
}

/// What it means that a request has failed.
fn failure(provider: &str, e: &reqwest::Error) -> Error {
    let first: &(dyn std::error::Error + 'static) = e;
    tracing::debug!(provider, "it cannot be asked: {}", reason(first));
    // What the resolver has said is somewhere below.
    let mut causes = std::iter::successors(Some(first), |e| e.source());
    causes.find_map(|cause| cause.downcast_ref::<Error>()).copied().unwrap_or(Error::Unreachable)
}

#[cfg(test)]
#[path = "discovery_tests.rs"]
mod tests;
