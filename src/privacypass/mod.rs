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
mod directory;
mod issuer;
mod key;
mod known_bad;
mod pool;
mod spent;
mod token;

pub use challenge::{BoundTo, Challenges, Purpose, quoted_challenge};
pub use directory::Directory;
pub use issuer::Issuer;
pub use key::{Key, KeyError, MOST_KEYS};
pub use pool::{Busy, Pool};
pub use spent::{Reservation, Spent, WithoutStore};
pub use token::{TYPES, Token, has_credential, is_private_token, type_of};

use crate::limiter::fleet::Fleet;
use crate::problem::TokenProblem;
use arc_swap::ArcSwap;
use http::{HeaderMap, HeaderValue};
use known_bad::KnownBad;
use privacypass::TokenType;
use prometheus::{Histogram, IntCounter, IntGauge};
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
    /// Tokens known not to verify, refused from memory.
    pub known_bad: IntCounter,
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

    fn redeemed(&self, kind: TokenType) -> &IntCounter {
        let [p384, blind_rsa, ristretto255] = &self.redeemed;
        match kind {
            TokenType::PrivateP384 => p384,
            TokenType::Public => blind_rsa,
            TokenType::PrivateRistretto255 => ristretto255,
        }
    }
}

/// An Origin.
pub struct Origin {
    challenges: ArcSwap<Challenges>,
    secret: Vec<u8>,
    pool: Pool,
    known_bad: Arc<KnownBad>,
    spent: Arc<Spent>,
    metrics: Metrics,
    /// Where directories are asked. None before the first of them.
    directories: parking_lot::Mutex<Option<tokio::runtime::Handle>>,
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
                spent.with_files(&dir, derive(&secret, &mark), challenges.epoch_at(unix_now()))?
            }
            SpentIn::Fleet(without) => spent.with_fleet(fleet.ok_or_else(|| missing("[limits.redis]"))?, without),
        };
        let bad = crate::config::random().ok_or_else(|| missing("randomness"))?;
        let origin = Self {
            challenges: ArcSwap::from_pointee(challenges),
            secret,
            pool: Pool::start(settings.threads, settings.max_wait)?,
            known_bad: Arc::new(KnownBad::new(halves(bad))),
            spent: Arc::new(spent),
            metrics,
            directories: parking_lot::Mutex::default(),
        };
        origin.ask_directories(&[])?;
        Ok(origin)
    }

    /// Asks the directories of all issuers but those that are asked already.
    fn ask_directories(&self, already: &[Arc<Issuer>]) -> std::io::Result<()> {
        let challenges = self.challenges.load_full();
        let mut handle = self.directories.lock();
        for issuer in challenges.issuers().iter().filter(|issuer| issuer.directory().is_some()) {
            if already.iter().any(|one| Arc::ptr_eq(one, issuer)) {
                continue;
            }
            if handle.is_none() {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                *handle = Some(runtime.handle().clone());
                std::thread::Builder::new()
                    .name("directories".into())
                    .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
            }
            if let Some(handle) = &*handle {
                let metrics = self.metrics.directory(issuer);
                handle.spawn(directory::keep(Arc::downgrade(issuer), challenges.accepted_for(), metrics));
            }
        }
        Ok(())
    }

    /// Takes over what a configuration says of issuers, origin, epoch and bindings; the rest takes a restart. Issuers whose
    /// directory is what it was keep what they have heard.
    ///
    /// # Errors
    /// There are no threads to be had.
    pub fn reload(&self, settings: Settings) -> std::io::Result<()> {
        let before = self.challenges.load_full();
        let same = |new: &Issuer| {
            let directory = new.directory()?;
            let is = |old: &&Arc<Issuer>| {
                old.name() == new.name()
                    && old.kind() == new.kind()
                    && old.directory().is_some_and(|of| of.is(directory))
            };
            before.issuers().iter().find(is).cloned()
        };
        let issuers = settings.issuers.into_iter().map(|new| same(&new).unwrap_or_else(|| Arc::new(new))).collect();
        let secret = settings.secret.unwrap_or_else(|| self.secret.clone());
        let challenges = Challenges::new(settings.origin, settings.epoch, settings.bound_to, &secret, issuers);
        self.challenges.store(Arc::new(challenges));
        self.ask_directories(before.issuers())
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
        let known = self.challenges.load().recognise(&token, purpose, unix_now())?;
        if self.known_bad.contains(token.octets()) {
            self.metrics.known_bad.inc();
            return Err(TokenProblem::BadAuthenticator);
        }
        if self.spent.contains(token.nonce()) {
            return Err(TokenProblem::Spent);
        }
        let timer = self.metrics.seconds.start_timer();
        let (spent, known_bad, key) = (self.spent.clone(), self.known_bad.clone(), known.key);
        let work = move || {
            if !key.verifies(&token) {
                known_bad.insert(token.octets());
                return Err(TokenProblem::BadAuthenticator);
            }
            Spent::reserve(&spent, *token.nonce(), known.epoch, known.current)
        };
        let Ok(taken) = self.pool.run(kind, work).await else {
            timer.stop_and_discard();
            self.metrics.shed.inc();
            return Err(TokenProblem::Busy);
        };
        let reservation = taken?.claim(known.remember).await?;
        drop(timer);
        Ok(reservation.counted_by(self.metrics.redeemed(kind)))
    }
}

fn unix_now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
