//! The gateway as a Privacy Pass Origin (RFC 9576, RFC 9577, RFC 9578): what it challenges with, which tokens it takes, and
//! which it has taken.
//!
//! Nothing is stored for a challenge. Its redemption context is derived from a secret, the origin and the epoch, so every
//! gateway that shares the secret sends, and accepts, the same ones: those of this epoch and of the one before. A spent
//! token needs to be remembered only as long.
//!
//! A token's way: read ([`Token`]), known by its challenge and its key ([`Challenges`], [`Issuer`], [`Key`]), verified on
//! threads of their own ([`Pool`]), taken in hand ([`Spent`]). What costs more comes later.

mod challenge;
pub mod client;
pub(crate) mod directory;
pub(crate) mod https;
mod issuer;
mod key;
mod pool;
mod refused;
mod spent;
mod token;

pub use challenge::{BoundTo, Challenges, Purpose, quoted_challenge};
pub use directory::{Directory, MEDIA_TYPE};
pub use issuer::Issuer;
pub use key::{Key, KeyError, MOST_KEYS};
pub use pool::{Busy, Pool};
pub use spent::{Reservation, Spent, WithoutStore};
pub use token::{TYPES, Token, credential, has_credential, is_private_token, type_of};

use crate::limiter::fleet::{self, Fleet};
use crate::problem::TokenProblem;
use arc_swap::ArcSwap;
use http::{HeaderMap, HeaderValue};
use prometheus::{Histogram, IntCounter, IntGauge};
use refused::Refused;
use spent::Place;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What an operator says of an Origin.
#[derive(Debug)]
pub struct Settings {
    /// `origin_info` of its challenges.
    pub origin: String,
    /// A challenge is accepted in its epoch and the next.
    pub epoch: Duration,
    /// What challenges are bound to.
    pub bound_to: BoundTo,
    /// What their contexts are derived from, the same on all nodes of a fleet. None: random.
    pub secret: Option<Vec<u8>>,
    /// Whose tokens are taken.
    pub issuers: Vec<Issuer>,
    /// Where spent tokens are kept.
    pub spent: SpentIn,
    /// Spent tokens that this node remembers at most.
    pub spent_tokens: usize,
    /// Threads that verify.
    pub threads: usize,
    /// As long as a token may wait for its turn.
    pub max_wait: Duration,
}

/// Where spent tokens are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SpentIn {
    /// In this node's memory.
    Memory,
    /// In this node's memory, and in files in this directory.
    Files(PathBuf),
    /// In the store that a fleet keeps its limits in.
    Fleet(WithoutStore),
}

/// What is counted of an Origin.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Tokens redeemed, of types 1, 2 and 5.
    pub redeemed: [IntCounter; 3],
    /// How long it takes from a token to whether it is good, its wait for a thread included.
    pub seconds: Histogram,
    /// Tokens refused because too many were waiting.
    pub shed: IntCounter,
    /// Tokens known for refused, refused again from memory.
    pub refused_again: IntCounter,
    /// Spent tokens that are remembered on this node.
    pub spent: IntGauge,
    /// Of each issuer with a directory, by name.
    pub directories: prometheus::IntCounterVec,
    /// When they were last heard of, in seconds since the Unix epoch.
    pub heard: prometheus::IntGaugeVec,
}

/// What is counted of an issuer's directory.
#[derive(Debug, Clone)]
struct DirectoryMetrics {
    ok: IntCounter,
    failed: IntCounter,
    heard: IntGauge,
}

impl Metrics {
    fn directory(&self, issuer: &Issuer) -> DirectoryMetrics {
        DirectoryMetrics {
            ok: self.directories.with_label_values(&[issuer.name(), "ok"]),
            failed: self.directories.with_label_values(&[issuer.name(), "failed"]),
            heard: self.heard.with_label_values(&[issuer.name()]),
        }
    }
}

/// An Origin.
pub struct Origin {
    challenges: ArcSwap<Challenges>,
    secret: Vec<u8>,
    /// Nobody else has the secret: it ends with this.
    own_secret: bool,
    /// Nothing else would be the same after a change of it: files, and what is remembered.
    epoch: Duration,
    /// Whoever waits for one that was exchanged has it until it is done.
    pool: ArcSwap<Pool>,
    refused: Refused,
    spent: Arc<Spent>,
    metrics: Metrics,
    /// Where directories are asked. None before the first of them, and when another Origin is in use.
    directories: parking_lot::Mutex<Option<Asking>>,
}

/// Where directories are asked, for as long as this is there.
type Asking = (tokio::runtime::Handle, tokio::sync::oneshot::Sender<()>);

/// What Origins know of spent tokens, as long as there are any: at the end of the process.
static ALL_SPENT: parking_lot::Mutex<Vec<Weak<Spent>>> = parking_lot::Mutex::new(Vec::new());

impl std::fmt::Debug for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Origin").field("challenges", &self.challenges.load()).finish_non_exhaustive()
    }
}

/// A key of 128 bits for a purpose of its own, out of the secret.
fn derive(secret: &[u8], purpose: &[u8]) -> [u8; 16] {
    let hmac = aws_lc_rs::hmac::sign(&aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret), purpose);
    let mut key = [0; 16];
    key.iter_mut().zip(hmac.as_ref()).for_each(|(to, from)| *to = *from);
    key
}

fn halves(key: [u8; 16]) -> (u64, u64) {
    let both = u128::from_be_bytes(key);
    ((both >> 64) as u64, both as u64)
}

fn missing(what: &str) -> std::io::Error {
    std::io::Error::other(format!("there is no {what}"))
}

/// Where an operator has spent tokens kept, for challenges under a secret.
fn place(
    spent: SpentIn,
    fleet: Option<Arc<Fleet>>,
    secret: &[u8],
    epoch: Duration,
    keep_for: Duration,
) -> std::io::Result<Place> {
    Ok(match spent {
        SpentIn::Memory => Place::Memory,
        SpentIn::Files(dir) => {
            let mark = [&b"moh-gateway spent tokens of "[..], &epoch.as_nanos().to_be_bytes()].concat();
            Place::Files { dir, mark: derive(secret, &mark), keep_for }
        }
        SpentIn::Fleet(without) => Place::Fleet(fleet.ok_or_else(|| missing("[limits.redis]"))?, without),
    })
}

// === impl Origin ===

impl Origin {
    /// An Origin at work: its threads are started, its files read, its issuers' directories asked. What it holds is said from
    /// [`Origin::begin`] on.
    ///
    /// # Errors
    /// What is not to be had: threads, files, randomness, or the fleet that spent tokens should be kept with.
    pub fn start(settings: Settings, fleet: Option<Arc<Fleet>>, metrics: Metrics) -> std::io::Result<Self> {
        let own_secret = settings.secret.is_none();
        let secret = match settings.secret {
            Some(secret) => secret,
            None => crate::config::random::<32>().ok_or_else(|| missing("randomness"))?.to_vec(),
        };
        let challenges = Challenges::new(
            settings.origin,
            settings.epoch,
            settings.bound_to,
            &secret,
            settings.issuers.into_iter().map(Arc::new).collect(),
        );
        let keys = halves(derive(&secret, b"moh-gateway spent tokens"));
        let spent = Arc::new(Spent::new(settings.spent_tokens, keys, metrics.spent.clone()));
        let (epoch, keep_for) = (settings.epoch, challenges.accepted_for());
        spent.begin_in(place(settings.spent, fleet, &secret, epoch, keep_for)?, challenges.epoch_at(unix_now()))?;
        Spent::keep_room(&spent, settings.epoch)?;
        let bad = crate::config::random().ok_or_else(|| missing("randomness"))?;
        let origin = Self {
            challenges: ArcSwap::from_pointee(challenges),
            secret,
            own_secret,
            epoch: settings.epoch,
            pool: ArcSwap::from_pointee(Pool::start(settings.threads, settings.max_wait)?),
            refused: Refused::new(halves(bad)),
            spent,
            metrics,
            directories: parking_lot::Mutex::default(),
        };
        let challenges = origin.challenges.load_full();
        let asking = origin.begin_to_ask(&challenges)?;
        origin.ask_directories(asking, &challenges, &[]);
        let mut all = ALL_SPENT.lock();
        all.retain(|spent| spent.strong_count() > 0);
        all.push(Arc::downgrade(&origin.spent));
        Ok(origin)
    }

    /// A thread to ask directories on, if there are any and none asks yet.
    fn begin_to_ask(&self, of: &Challenges) -> std::io::Result<Option<Asking>> {
        let has_directories = of.issuers().iter().any(|issuer| issuer.directory().is_some());
        if !has_directories || self.directories.lock().is_some() {
            return Ok(None);
        }
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("directories".into());
        let runtime = fleet::runtime(thread, move || async move {
            // Until the sender is dropped.
            let _ = ended.await;
        })?;
        Ok(Some((runtime, end)))
    }

    /// Asks the directories of all issuers but those that are asked already: of these at once. On a new thread none is.
    fn ask_directories(&self, new: Option<Asking>, of: &Challenges, already: &[Arc<Issuer>]) {
        let mut directories = self.directories.lock();
        let is_new = new.is_some();
        if is_new {
            *directories = new;
        }
        let Some((runtime, _)) = &*directories else { return };
        for issuer in of.issuers().iter().filter(|issuer| issuer.directory().is_some()) {
            if !is_new && already.iter().any(|one| Arc::ptr_eq(one, issuer)) {
                issuer.ask_now();
            } else {
                let metrics = self.metrics.directory(issuer);
                runtime.spawn(directory::keep(Arc::downgrade(issuer), of.accepted_for(), metrics));
            }
        }
    }

    /// Of directories that are asked no more nothing is said. Who asks them still says it to nobody.
    fn forget_heard(&self, before: &Challenges, now: Option<&Challenges>) {
        let with_directories = |of: &Challenges| {
            of.issuers().iter().filter(|issuer| issuer.directory().is_some()).cloned().collect::<Vec<_>>()
        };
        let now = now.map(with_directories).unwrap_or_default();
        for gone in with_directories(before).iter().filter(|of| now.iter().all(|issuer| issuer.name() != of.name())) {
            // Two may have one name, for tokens of two types.
            let _ = self.metrics.heard.remove_label_values(&[gone.name()]);
        }
    }

    /// It is in use from now on, after another was left: what it holds is said.
    pub fn begin(&self) {
        self.spent.begin();
    }

    /// Another is in use from now on, or none. Requests in it end as they would, and it may be reloaded and begin again: for
    /// [`Origin::known_for`] it knows tokens that would be taken twice by whoever does not. Its directories are asked no more.
    pub fn leave(&self, next: Option<&Arc<Self>>) {
        self.spent.leave();
        *self.directories.lock() = None;
        let next = next.map(|next| next.challenges.load_full());
        self.forget_heard(&self.challenges.load(), next.as_deref());
    }

    /// As long as tokens may be taken that it knows for spent, when it is left: the epoch now, and two, for clocks may be ahead.
    pub fn known_for(&self) -> Duration {
        self.epoch.saturating_mul(3)
    }

    /// Whether [`Origin::reload`] can make this of it: the epoch and the secret stay. What is spent is known by them. A secret
    /// that others have, too, does not stay where none is named: what is then known of spent tokens ends with the process, and
    /// challenges are not to outlive it.
    pub fn can_become(&self, settings: &Settings) -> bool {
        let same = settings.secret.as_ref().map_or(self.own_secret, |secret| *secret == self.secret);
        same && settings.epoch == self.epoch
    }

    /// Takes over what a configuration says: issuers, origin and bindings, where spent tokens are kept and how many, and what
    /// verifies. Directories are asked at once. Issuers keep what their directories have said so far; no token that is spent
    /// or in hand is taken again, and none is lost that is on its way.
    ///
    /// # Errors
    /// The epoch or the secret is another: what is spent is known by them. Or what is not to be had: threads, files, or the
    /// fleet. Then nothing has changed.
    pub fn reload(&self, settings: Settings, fleet: Option<Arc<Fleet>>) -> std::io::Result<()> {
        if !self.can_become(&settings) {
            return Err(std::io::Error::other("another epoch or secret is another Origin's"));
        }
        let before = self.challenges.load_full();
        let succeed = |new: Issuer| {
            let of_name = |old: &&Arc<Issuer>| old.name() == new.name() && old.kind() == new.kind();
            let (Some(old), Some(directory)) = (before.issuers().iter().find(of_name), new.directory()) else {
                return Arc::new(new);
            };
            if old.directory().is_some_and(|of| of.is(directory)) {
                return old.clone();
            }
            // Until its directory has answered.
            new.inherit(old);
            Arc::new(new)
        };
        let issuers = settings.issuers.into_iter().map(succeed).collect();
        let challenges = Challenges::new(settings.origin, self.epoch, settings.bound_to, &self.secret, issuers);
        let place = place(settings.spent, fleet, &self.secret, self.epoch, challenges.accepted_for())?;
        let pool = match self.pool.load().is_of(settings.threads, settings.max_wait) {
            true => None,
            false => Some(Pool::start(settings.threads, settings.max_wait)?),
        };
        let asking = self.begin_to_ask(&challenges)?;
        self.spent.move_to(place, challenges.epoch_at(unix_now()))?;
        // From here on nothing fails.
        self.ask_directories(asking, &challenges, before.issuers());
        self.forget_heard(&before, Some(&challenges));
        self.spent.set_capacity(settings.spent_tokens);
        if let Some(pool) = pool {
            self.pool.store(Arc::new(pool));
        }
        self.challenges.store(Arc::new(challenges));
        Ok(())
    }

    /// Waits, for some seconds at most, until tokens that were given back are so for everyone: before the process ends.
    pub fn settle(&self) {
        Self::settle_all();
    }

    /// As [`Origin::settle`], where none may be in use: of all that there are, also of those that were left.
    pub fn settle_all() {
        let all: Vec<_> = ALL_SPENT.lock().iter().filter_map(Weak::upgrade).collect();
        all.iter().for_each(|spent| spent.settle());
    }

    /// `WWW-Authenticate`: a fresh challenge for each issuer and type. None: no issuer has a key now.
    pub fn challenge(&self, purpose: &Purpose<'_>) -> Option<HeaderValue> {
        self.challenges.load().www_authenticate(purpose, unix_now())
    }

    /// Takes the token of a request: its key is trusted, its challenge digest is one that this origin would send now for
    /// this purpose, its authenticator right and its nonce unspent. The dear checks come after the cheap ones. The token is
    /// in hand: it is spent when the reservation is kept, and may be used again when that is dropped.
    ///
    /// # Errors
    /// Which of these does not hold, or that there is no token; or that it cannot be told now.
    pub async fn redeem(&self, headers: &HeaderMap, purpose: &Purpose<'_>) -> Result<Reservation, TokenProblem> {
        let octets = token::credential(headers)?.ok_or(TokenProblem::Missing)?;
        let token = Token::read(octets)?;
        let kind = token.kind();
        let known = {
            let challenges = self.challenges.load();
            challenges.recognise(&token, purpose, unix_now()).inspect_err(|problem| {
                if *problem == TokenProblem::UnknownKey {
                    // Another node may have heard of it before.
                    let of_kind = challenges.issuers().iter().filter(|issuer| issuer.kind() == kind);
                    of_kind.for_each(|issuer| issuer.ask_soon(unix_now()));
                }
            })?
        };
        let elsewhere = Refused::elsewhere(token.nonce(), unix_now());
        let again = match (self.refused.contains(token.octets()), self.refused.contains(&elsewhere)) {
            (true, _) => Some(TokenProblem::BadAuthenticator),
            (false, true) => Some(TokenProblem::Spent),
            (false, false) => self.spent.problem(token.nonce()),
        };
        if let Some(problem) = again {
            self.metrics.refused_again.inc();
            return Err(problem);
        }
        let timer = self.metrics.seconds.start_timer();
        let nonce = *token.nonce();
        let key = known.key;
        let pool = self.pool.load_full();
        let Ok((verifies, token)) = pool.run(kind, move || (key.verifies(&token), token)).await else {
            timer.stop_and_discard();
            self.metrics.shed.inc();
            return Err(TokenProblem::Busy);
        };
        drop(pool);
        if !verifies {
            self.refused.insert(token.octets());
            return Err(TokenProblem::BadAuthenticator);
        }
        let in_hand = Spent::reserve(&self.spent, nonce, known.epoch, known.current).inspect_err(|problem| {
            if *problem == TokenProblem::Expired {
                SET_BACK.call_once(|| {
                    tracing::error!(
                        "the clock was set back: until it comes to where it was tokens are refused as expired, or until a restart"
                    );
                });
            }
        })?;
        let reservation = in_hand.claim(known.remember).await;
        if matches!(reservation, Err(TokenProblem::Spent)) {
            self.refused.insert(&elsewhere);
        }
        drop(timer);
        Ok(reservation?.counted_by(token::of_type(&self.metrics.redeemed, kind)))
    }
}

/// Said once.
static SET_BACK: std::sync::Once = std::sync::Once::new();

/// The time since the Unix epoch.
pub fn unix_now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Vectors that another implementation issued. They hold others' data and are not in this project: `$MOH_VECTORS` says where
/// they are. (`tests/interop` has another implementation itself.)
#[cfg(test)]
pub(crate) mod vectors {
    pub(crate) fn vectors(name: &str) -> Vec<serde_json::Value> {
        let Ok(dir) = std::env::var("MOH_VECTORS") else {
            eprintln!("MOH_VECTORS is not set: the vectors are not read");
            return vec![];
        };
        let text = std::fs::read(format!("{dir}/privacypass/{name}_go.json")).unwrap();
        let vectors: Vec<_> = serde_json::from_slice(&text).unwrap();
        assert!(!vectors.is_empty());
        vectors
    }

    pub(crate) fn octets(vector: &serde_json::Value, field: &str) -> Vec<u8> {
        hex::decode(vector[field].as_str().unwrap()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use privacypass::TokenType;
    use std::sync::mpsc;

    const KIND: TokenType = TokenType::PrivateRistretto255;

    fn settings(secret: Option<&[u8]>, spent: SpentIn) -> Settings {
        Settings {
            origin: "o.example".into(),
            epoch: Duration::from_secs(3600),
            bound_to: BoundTo::Origin,
            secret: secret.map(<[u8]>::to_vec),
            issuers: vec![Issuer::of_keys("i.example".into(), KIND, vec![Key::voprf(KIND, &[1; 32]).unwrap()])],
            spent,
            spent_tokens: 10,
            threads: 1,
            max_wait: Duration::from_secs(5),
        }
    }

    fn start(settings: Settings) -> std::io::Result<Origin> {
        let metrics = crate::telemetry::Metrics::new(&[]).unwrap();
        Origin::start(settings, None, metrics.privacy_pass().unwrap())
    }

    #[test]
    fn a_secret_that_others_have_ends_where_none_is_named() {
        let memory = |secret: Option<&'static [u8]>| settings(secret, SpentIn::Memory);
        let own = start(memory(None)).unwrap();
        assert!(own.can_become(&memory(None)) && !own.can_become(&memory(Some(b"secret"))));
        let named = start(memory(Some(b"secret"))).unwrap();
        assert!(named.can_become(&memory(Some(b"secret"))));
        assert!(!named.can_become(&memory(Some(b"another"))) && !named.can_become(&memory(None)));
        let longer = Settings { epoch: Duration::from_secs(7200), ..memory(Some(b"secret")) };
        assert!(!named.can_become(&longer) && named.reload(longer, None).is_err());
    }

    #[test]
    fn two_origins_have_files_in_one_directory() {
        let dir = tempfile::tempdir().unwrap();
        let files = |secret: &'static [u8]| settings(Some(secret), SpentIn::Files(dir.path().into()));
        let one = start(files(b"one")).unwrap();
        let (now, nonce) = (one.challenges.load().epoch_at(unix_now()), [1; 32]);
        let spend = |origin: &Origin| {
            let token = Spent::reserve(&origin.spent, nonce, now, now)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(token.claim(Duration::from_secs(60)))?.keep();
            Ok::<_, TokenProblem>(())
        };
        spend(&one).unwrap();
        let two = start(files(b"two")).unwrap();
        spend(&two).unwrap();
        let error = start(files(b"one")).unwrap_err().to_string();
        assert!(error.contains("another gateway has it"), "{error}");
        drop(one);
        let again = start(files(b"one")).unwrap();
        assert_eq!(spend(&again), Err(TokenProblem::Spent));
        assert_eq!(spend(&two), Err(TokenProblem::Spent));
    }

    #[test]
    fn directories_are_asked_and_spoken_of_as_long_as_their_tokens_are_taken() {
        use prometheus::core::Collector as _;
        let metrics = crate::telemetry::Metrics::new(&[]).unwrap().privacy_pass().unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let tls = tls.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
        let of = |secret: &[u8], names: &[&str]| {
            let directory =
                || Directory { url: "https://127.0.0.1:1/".parse().unwrap(), tls: tls.clone(), ca: None, file: None };
            let issuers = names.iter().map(|name| Issuer::of_directory((*name).into(), KIND, directory()));
            Settings { issuers: issuers.collect(), ..settings(Some(secret), SpentIn::Memory) }
        };
        let start = |settings| Arc::new(Origin::start(settings, None, metrics.clone()).unwrap());
        let said = || {
            // Where there is nothing to be said that is an error.
            let text = prometheus::TextEncoder::new().encode_to_string(&metrics.heard.collect()).unwrap_or_default();
            ["a", "b", "c"]
                .into_iter()
                .filter(|name| text.contains(&format!("{{issuer=\"{name}\"}}")))
                .collect::<String>()
        };
        let one = start(of(b"one", &["a", "b"]));
        assert_eq!(said(), "ab");
        one.reload(of(b"one", &["b"]), None).unwrap();
        assert_eq!(said(), "b");
        let two = start(of(b"two", &["b", "c"]));
        one.leave(Some(&two));
        assert!(said() == "bc" && one.directories.lock().is_none());
        two.leave(None);
        assert_eq!(said(), "");
        one.reload(of(b"one", &["b"]), None).unwrap();
        assert!(said() == "b" && one.directories.lock().is_some());
    }

    #[tokio::test]
    async fn a_reload_exchanges_the_pool_and_the_number_of_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let files = || settings(Some(b"secret"), SpentIn::Files(dir.path().into()));
        let origin = start(files()).unwrap();
        let (go, held) = mpsc::channel::<()>();
        let before = origin.pool.load_full();
        let waits = before.clone();
        let under_way = tokio::spawn(async move { waits.run(KIND, move || held.recv().is_ok()).await });
        // The same again is no other.
        origin.reload(files(), None).unwrap();
        assert!(Arc::ptr_eq(&before, &origin.pool.load_full()));
        for (n, other) in [
            Settings { threads: 2, ..files() },
            Settings { max_wait: Duration::from_secs(4), threads: 2, ..files() },
            Settings { spent_tokens: 1, ..files() },
        ]
        .into_iter()
        .enumerate()
        {
            let pool = origin.pool.load_full();
            origin.reload(other, None).unwrap();
            assert!(!Arc::ptr_eq(&pool, &origin.pool.load_full()), "{n}");
            assert_eq!(origin.pool.load_full().run(KIND, || 7).await, Ok(7), "{n}: while the first is at work");
        }
        drop(before);
        go.send(()).unwrap();
        assert_eq!(under_way.await.unwrap(), Ok(true));
        let now = origin.challenges.load().epoch_at(unix_now());
        Spent::reserve(&origin.spent, [1; 32], now, now).unwrap().keep();
        assert_eq!(Spent::reserve(&origin.spent, [2; 32], now, now).unwrap_err(), TokenProblem::StoreFull);
        // What is not to be had changes nothing.
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let pool = origin.pool.load_full();
        let elsewhere = Settings { spent: SpentIn::Files(file), ..files() };
        assert!(origin.reload(elsewhere, None).is_err());
        assert!(origin.reload(Settings { spent: SpentIn::Fleet(WithoutStore::Closed), ..files() }, None).is_err());
        assert!(Arc::ptr_eq(&pool, &origin.pool.load_full()));
        assert_eq!(Spent::reserve(&origin.spent, [2; 32], now, now).unwrap_err(), TokenProblem::StoreFull);
    }
}
