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

use crate::limiter::fleet::Fleet;
use crate::problem::TokenProblem;
use arc_swap::ArcSwap;
use http::{HeaderMap, HeaderValue};
use prometheus::{Histogram, IntCounter, IntGauge};
use refused::Refused;
use std::path::PathBuf;
use std::sync::Arc;
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
    /// Nothing else would be the same after a change of it: files, and what is remembered.
    epoch: Duration,
    pool: Pool,
    refused: Refused,
    spent: Arc<Spent>,
    metrics: Metrics,
    /// Where directories are asked. None before the first of them.
    directories: parking_lot::Mutex<Option<(tokio::runtime::Handle, tokio::sync::oneshot::Sender<()>)>>,
}

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

// === impl Origin ===

impl Origin {
    /// An Origin at work: its threads are started, its files read, its issuers' directories asked.
    ///
    /// # Errors
    /// What is not to be had: threads, files, randomness, or the fleet that spent tokens should be kept with.
    pub fn start(settings: Settings, fleet: Option<Arc<Fleet>>, metrics: Metrics) -> std::io::Result<Self> {
        let missing = |what: &str| std::io::Error::other(format!("there is no {what}"));
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
        let spent = Spent::new(settings.spent_tokens, keys, metrics.spent.clone());
        let spent = match settings.spent {
            SpentIn::Memory => spent,
            SpentIn::Files(dir) => {
                let mark = [&b"moh-gateway spent tokens of "[..], &settings.epoch.as_nanos().to_be_bytes()].concat();
                let (mark, current) = (derive(&secret, &mark), challenges.epoch_at(unix_now()));
                spent.with_files(&dir, mark, current, challenges.accepted_for())?
            }
            SpentIn::Fleet(without) => {
                let fleet = fleet.ok_or_else(|| missing("[limits.redis]"))?;
                fleet.warn_of_eviction();
                spent.with_fleet(fleet, without)
            }
        };
        let spent = Arc::new(spent);
        Spent::keep_room(&spent, settings.epoch)?;
        let bad = crate::config::random().ok_or_else(|| missing("randomness"))?;
        let origin = Self {
            challenges: ArcSwap::from_pointee(challenges),
            secret,
            epoch: settings.epoch,
            pool: Pool::start(settings.threads, settings.max_wait)?,
            refused: Refused::new(halves(bad)),
            spent,
            metrics,
            directories: parking_lot::Mutex::default(),
        };
        let challenges = origin.challenges.load_full();
        origin.ask_directories(&challenges, &[])?;
        Ok(origin)
    }

    /// Asks the directories of all issuers but those that are asked already.
    fn ask_directories(&self, of: &Challenges, already: &[Arc<Issuer>]) -> std::io::Result<()> {
        let mut handle = self.directories.lock();
        for issuer in of.issuers().iter().filter(|issuer| issuer.directory().is_some()) {
            if already.iter().any(|one| Arc::ptr_eq(one, issuer)) {
                issuer.ask_now();
                continue;
            }
            if handle.is_none() {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                let (end, ended) = tokio::sync::oneshot::channel::<()>();
                *handle = Some((runtime.handle().clone(), end));
                std::thread::Builder::new().name("directories".into()).spawn(move || {
                    // Until the Origin is dropped, and the sender with it.
                    let _ = runtime.block_on(ended);
                })?;
            }
            if let Some((handle, _)) = &*handle {
                let metrics = self.metrics.directory(issuer);
                handle.spawn(directory::keep(Arc::downgrade(issuer), of.accepted_for(), metrics));
            }
        }
        Ok(())
    }

    /// Whether [`Origin::reload`] can make this of it: the epoch and the secret stay. What is spent is known by them.
    pub fn can_become(&self, settings: &Settings) -> bool {
        settings.epoch == self.epoch && settings.secret.as_ref().is_none_or(|secret| *secret == self.secret)
    }

    /// Whether spent tokens are kept in the store of a fleet.
    pub fn is_of_a_fleet(&self) -> bool {
        self.spent.is_of_a_fleet()
    }

    /// Takes over what a configuration says of issuers, origin and bindings; the rest takes a restart. Directories are asked
    /// at once. Issuers keep what their directories have said so far.
    ///
    /// # Errors
    /// The epoch or the secret is another: what is spent is known by them. Or there are no threads to be had.
    pub fn reload(&self, settings: Settings) -> std::io::Result<()> {
        if !self.can_become(&settings) {
            return Err(std::io::Error::other("another epoch or secret takes a restart"));
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
        self.ask_directories(&challenges, before.issuers())?;
        self.challenges.store(Arc::new(challenges));
        Ok(())
    }

    /// Waits, for a second or two at most, until tokens that were given back are so for everyone: before the process ends.
    pub fn settle(&self) {
        self.spent.settle();
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
        let Ok((verifies, token)) = self.pool.run(kind, move || (key.verifies(&token), token)).await else {
            timer.stop_and_discard();
            self.metrics.shed.inc();
            return Err(TokenProblem::Busy);
        };
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
