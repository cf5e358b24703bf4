//! Limits that a fleet of gateways shares: their state in Redis or Valkey.
//!
//! Two modes. *Strict*: one script decides all limits of a request, in one round trip and on the server's clock; the fleet
//! admits exactly what one node would. *Leased* ([`leases`]): a node takes a batch of a limit's cells at once and decides by
//! itself until they are used up. Both read and write the same states, so that nodes of either mode may share a store.
//!
//! A key's state expires by itself, once it says no more than none. All keys of a request are in one slot of a Redis
//! Cluster, by their hash tag: that of the fleet, or that of the request's provider.
//!
//! [`store`] keeps the connections, on a thread of its own. Nobody waits for a store that does not answer: its `breaker`
//! opens, and [`Gone`] is the answer.

mod breaker;
mod denials;
mod leases;
mod store;

pub use store::Gone;

use super::gcra::Gcra;
use super::{Ask, Check, Clock, Key, Outcome, Outcomes, all_pass, nanos};
use denials::Denials;
use leases::Leases;
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::{Call, Remote, Script};
use tokio::sync::Semaphore;

/// How a fleet decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Every request asks the store.
    Strict,
    /// The fleet has no limits in common, only the tokens that are spent.
    TokensOnly,
    /// A node takes cells in batches.
    Leased {
        /// A batch is a limit's burst divided by this.
        share: u32,
        /// What a node has not used for so long it gives back.
        idle: Duration,
    },
}

/// TLS towards the store. Two are equal whose roots are.
#[derive(Debug, Clone)]
pub struct Tls {
    /// For a single server.
    pub config: Arc<rustls::ClientConfig>,
    /// The roots, in PEM: for a cluster.
    pub ca_pem: Vec<u8>,
}

impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        self.ca_pem == other.ca_pem
    }
}

/// The store, and how it is used.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Hosts and ports: the nodes of a cluster to ask first, or servers of which the first that answers is used.
    pub nodes: Vec<(String, u16)>,
    /// A Redis Cluster.
    pub cluster: bool,
    /// TLS, if it is spoken.
    pub tls: Option<Tls>,
    /// User, for an ACL.
    pub username: Option<String>,
    /// Password.
    pub password: Option<String>,
    /// What keys begin with.
    pub prefix: String,
    /// Keys of a provider are in a slot of their own.
    pub partition_by_provider: bool,
    /// As long as a request waits for the store at most.
    pub timeout: Duration,
    /// Connections to a single server.
    pub connections: usize,
    /// How it decides.
    pub mode: Mode,
    /// Keys of which a node remembers something at most: what it has leased, what it knows to be refused.
    pub keys: usize,
}

/// What is counted of the store.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// 1 while requests go to the store.
    pub up: prometheus::IntGauge,
    /// How often it was given up.
    pub opened: prometheus::IntCounter,
    /// Calls that were answered.
    pub ok: prometheus::IntCounter,
    /// Calls answered with an error, or by the end of the connection.
    pub errors: prometheus::IntCounter,
    /// Calls not answered in time.
    pub timeouts: prometheus::IntCounter,
    /// Calls not made, because it is known not to answer.
    pub skipped: prometheus::IntCounter,
    /// How long calls take.
    pub seconds: prometheus::Histogram,
}

/// Before the attempts to give a token back.
const PAUSES_MS: [u64; 6] = [0, 250, 1000, 5000, 30_000, 120_000];

/// Tokens that wait to be given back. More have one attempt each.
const GIVING_BACK: usize = 10_000;

/// For so long the thread goes on when a reload has put another store in this one's place.
const LAST: Duration = Duration::from_secs(10);

/// What the nodes of a fleet share.
pub struct Fleet {
    shared: Arc<Shared>,
    runtime: tokio::runtime::Handle,
    giving_back: Arc<Semaphore>,
    /// Its thread ends after this is dropped: by this, and by whoever gives a token back yet.
    end: Arc<tokio::sync::oneshot::Sender<()>>,
}

struct Shared {
    remote: Remote,
    decide: Script,
    lease: Script,
    spend: Script,
    unspend: Script,
    forgets: Script,
    denials: Denials,
    leases: Option<Leases>,
    clock: Clock,
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fleet").field("settings", self.shared.remote.settings()).finish_non_exhaustive()
    }
}

/// Microseconds, with three digits of a fraction.
struct Micros(u64);

impl std::fmt::Display for Micros {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}

fn window(gcra: &Gcra) -> Micros {
    Micros(nanos(gcra.window()))
}

/// A runtime on a thread of its own, which ends with what `main` makes; the answer is how others have it do something. It is made
/// there, too: were there no thread to be had, it would be dropped here, where another may run, and that is a panic.
///
/// # Errors
/// There is no thread or runtime to be had.
pub(crate) fn runtime<F: Future<Output = ()> + 'static>(
    thread: std::thread::Builder,
    main: impl FnOnce() -> F + Send + 'static,
) -> std::io::Result<tokio::runtime::Handle> {
    let (tell, told) = std::sync::mpsc::channel();
    thread.spawn(move || match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => {
            let _ = tell.send(Ok(runtime.handle().clone()));
            runtime.block_on(main());
        }
        Err(e) => drop(tell.send(Err(e))),
    })?;
    told.recv().map_err(std::io::Error::other)?
}

// === impl Fleet ===

impl Fleet {
    /// Begins to connect, on a thread of its own. Until that has come to something the store does not answer.
    ///
    /// # Errors
    /// There is no thread or runtime to be had.
    pub fn start(settings: Settings, metrics: Metrics) -> std::io::Result<Self> {
        let (leases, wants) = match settings.mode {
            Mode::Strict | Mode::TokensOnly => (None, None),
            Mode::Leased { share, idle } => {
                let (leases, wants) = Leases::new(share, idle, settings.keys);
                (Some(leases), Some(wants))
            }
        };
        let shared = Arc::new(Shared {
            denials: Denials::new(settings.keys),
            remote: Remote::new(settings, metrics),
            decide: Script::new(include_str!("decide.lua")),
            lease: Script::new(include_str!("lease.lua")),
            // What is spent is there, until it is forgotten; given back by whom it was taken. Who asks twice, as a store may
            // turn out to be one that was asked by another name, has it. (MGET: an ACL user needs it anyway.)
            spend: Script::new(
                "return {(redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) or redis.call('MGET', KEYS[1])[1] == \
                 ARGV[1]) and 1 or 0}",
            ),
            unspend: Script::new(
                "return {redis.call('MGET', KEYS[1])[1] == ARGV[1] and redis.call('DEL', KEYS[1]) or 0}",
            ),
            forgets: Script::new(include_str!("forgets.lua")),
            leases,
            clock: Clock::start(),
        });
        let own = shared.clone();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("limits-store".into());
        let runtime = runtime(thread, move || async move {
            if let Some(wants) = wants {
                tokio::spawn(leases::negotiate(own.clone(), wants));
                tokio::spawn(leases::give_back(own.clone()));
            }
            tokio::select! {
                () = own.remote.keep(&own) => {}
                // Nobody asks any more. What is leased and not used goes back first.
                () = async {
                    let _ = ended.await;
                    tokio::time::sleep(LAST).await;
                } => {}
            }
        })?;
        Ok(Self { shared, runtime, giving_back: Arc::new(Semaphore::new(GIVING_BACK)), end: Arc::new(end) })
    }

    pub(super) fn is_partitioned_by_provider(&self) -> bool {
        self.shared.remote.settings().partition_by_provider
    }

    /// Says so once, if the store may forget what is spent: tokens are kept in it.
    pub fn warn_of_eviction(&self) {
        let shared = self.shared.clone();
        self.runtime.spawn(async move {
            let mut call = Call::new();
            call.keys.push(shared.name(Key(0), 0));
            // Whoever may not ask is not told.
            for _ in 0..60 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let deadline = Instant::now() + shared.remote.settings().timeout;
                match shared.remote.call(&shared.forgets, &call, deadline).await.as_deref() {
                    Ok([1]) => {
                        tracing::warn!(
                            "the store of spent tokens may evict them when it is full, and they could be spent again: \
                             its maxmemory-policy should be noeviction"
                        );
                        return;
                    }
                    Ok(_) => return,
                    Err(Gone { .. }) => {}
                }
            }
        });
    }

    /// Whether limits are kept in it.
    pub fn keeps_limits(&self) -> bool {
        self.shared.remote.settings().mode != Mode::TokensOnly
    }

    /// Whether both know tokens by the same names in the same store, as far as settings tell.
    pub fn shares_tokens_with(&self, other: &Self) -> bool {
        let (own, other) = (self.shared.remote.settings(), other.shared.remote.settings());
        (&own.nodes, own.cluster, &own.prefix) == (&other.nodes, other.cluster, &other.prefix)
    }

    /// Limits ask it no more: whether it is up is not said from now on.
    pub fn retire(&self) {
        self.shared.remote.breaker.retire();
    }

    /// Limits ask it from now on: whether it is up is said, after another was retired; of one that was only started it is not.
    pub fn begin(&self) {
        self.shared.remote.breaker.begin();
    }

    /// Whether the store answers, as far as is known.
    pub fn is_up(&self) -> bool {
        !self.shared.remote.breaker.is_open()
    }

    pub(super) async fn decide(&self, at: Instant, ask: &Ask<'_>, outcomes: &mut Outcomes) -> Result<bool, Gone> {
        let deadline = at + self.shared.remote.settings().timeout;
        match &self.shared.leases {
            None => self.shared.decide_strictly(deadline, ask, outcomes).await,
            Some(leases) => leases.decide(&self.shared, deadline, ask, outcomes).await,
        }
    }

    /// Spends a Privacy Pass token, by its nonce, as `claim`; it is remembered for so long. Whether nobody else had.
    ///
    /// # Errors
    /// The store does not answer: it may or may not be spent, and is to be given back.
    pub async fn spend(&self, nonce: &[u8; 32], claim: u64, remember: Duration) -> Result<bool, Gone> {
        let mut call = self.shared.token(nonce, claim);
        call.arg(remember.as_millis());
        let deadline = Instant::now() + self.shared.remote.settings().timeout;
        self.shared.remote.call(&self.shared.spend, &call, deadline).await.map(|answer| answer == [1])
    }

    /// Gives back what was spent as `claim`; nobody waits for it. `answered`: the store has said that it was. Where it has not,
    /// it may do so later than it hears of this, and is told again. What it does not hear of for minutes stays spent. It is told
    /// also when this is dropped meanwhile.
    pub fn unspend(&self, nonce: &[u8; 32], claim: u64, answered: bool) {
        let (call, shared) = (self.shared.token(nonce, claim), self.shared.clone());
        let permit = self.giving_back.clone().try_acquire_owned();
        let end = self.end.clone();
        self.runtime.spawn(async move {
            // The thread goes on for as long.
            let _end = end;
            // Where many wait already, there is one attempt.
            let attempts = if permit.is_ok() { PAUSES_MS.len() } else { 1 };
            for pause in PAUSES_MS.iter().take(attempts) {
                tokio::time::sleep(Duration::from_millis(*pause)).await;
                let deadline = Instant::now() + shared.remote.settings().timeout;
                match shared.remote.call(&shared.unspend, &call, deadline).await.as_deref() {
                    Ok([0]) if !answered => {}
                    Ok(_) => return,
                    Err(Gone { .. }) => {}
                }
            }
        });
    }

    /// Waits until all that is to be given back is so, for so long at most.
    pub fn settle(&self, at_most: Duration) {
        let until = Instant::now() + at_most;
        while self.giving_back.available_permits() < GIVING_BACK && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Charges what has been used already; nobody waits for it. `otherwise` if the store does not answer.
    pub(super) fn charge(&self, ask: &Ask<'_>, otherwise: impl FnOnce() + Send + 'static) {
        let call = self.shared.call(ask, 2);
        let shared = self.shared.clone();
        let deadline = Instant::now() + self.shared.remote.settings().timeout;
        self.runtime.spawn(async move {
            if shared.remote.call(&shared.decide, &call, deadline).await.is_err() {
                otherwise();
            }
        });
    }
}

// === impl Shared ===

impl Shared {
    /// The name of a state in the store. Keys of one request have one hash tag, which is what a cluster chooses the slot by.
    fn name(&self, key: Key, partition: u64) -> Vec<u8> {
        let settings = self.remote.settings();
        let mut name = Vec::with_capacity(settings.prefix.len() + 36);
        name.extend(settings.prefix.as_bytes());
        match settings.partition_by_provider {
            true => name.extend(format!(":{{{partition:016x}}}:").bytes()),
            false => name.extend(b":{limits}:"),
        }
        name.extend(key.0.to_be_bytes());
        name
    }

    /// A spent token, by whom.
    fn token(&self, nonce: &[u8; 32], claim: u64) -> Call {
        let mut call = Call::new();
        call.keys.push([self.remote.settings().prefix.as_bytes(), b":spent:", nonce].concat());
        call.arg(format_args!("{claim:016x}"));
        call
    }

    /// All checks of a request, for the script that decides.
    fn call(&self, ask: &Ask<'_>, mode: u8) -> Call {
        let mut call = Call::new();
        call.arg(mode);
        for check in ask.checks {
            call.keys.push(self.name(check.key, ask.partition));
            call.arg(Micros(check.gcra.increment(check.cost)));
            call.arg(window(&check.gcra));
            call.arg(u8::from(check.enforce));
            call.arg(u8::from(ask.second(check).is_some()));
            if let Some(second) = ask.second(check) {
                call.keys.push(self.name(second.key, ask.partition));
                call.arg(Micros(second.gcra.increment(check.cost)));
                call.arg(window(&second.gcra));
            }
        }
        call
    }

    /// The store is back, and perhaps with less than it knew.
    fn forget(&self) {
        self.denials.clear();
        if let Some(leases) = &self.leases {
            leases.clear();
        }
    }

    /// What a request would ask, of a state of nobody's: whether the store does what it is there for.
    fn probe(&self) -> (&Script, Call) {
        let mut call = Call::new();
        call.keys.push(self.name(Key(0), 0));
        call.arg(1);
        call.arg(1);
        call.arg(1000);
        call.arg(0);
        call.arg(0);
        (&self.decide, call)
    }

    async fn decide_strictly(&self, deadline: Instant, ask: &Ask<'_>, outcomes: &mut Outcomes) -> Result<bool, Gone> {
        let up = !self.remote.breaker.is_open();
        if up && self.denials.refuse(self.clock.now(), ask.checks, outcomes) {
            return Ok(false);
        }
        let call = self.call(ask, u8::from(ask.charge));
        let sent = self.clock.now();
        let answers = self.remote.call(&self.decide, &call, deadline).await?;
        if answers.len() != ask.checks.len() {
            return Err(Gone::UNASKED);
        }
        outcomes.clear();
        outcomes.extend(ask.checks.iter().zip(&answers).map(|(check, answer)| match *answer {
            0 => Outcome::Allowed,
            -1 => Outcome::ToppedUp,
            _ if check.cost > check.gcra.burst() => Outcome::Refused(None),
            wait => Outcome::Refused(Some(Duration::from_micros(u64::try_from(wait).unwrap_or(1)))),
        }));
        self.denials.learn(sent, ask.checks, outcomes);
        Ok(all_pass(ask.checks, outcomes))
    }
}

/// A check whose refusal nothing makes up for.
fn is_final(check: &Check) -> bool {
    check.enforce && check.top_up.is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store that nobody is.
    fn nobody() -> Fleet {
        let settings = Settings {
            nodes: vec![("127.0.0.1".into(), 1)],
            cluster: false,
            tls: None,
            username: None,
            password: None,
            prefix: "nobody".into(),
            partition_by_provider: false,
            timeout: Duration::from_millis(50),
            connections: 1,
            mode: Mode::TokensOnly,
            keys: 16,
        };
        Fleet::start(settings, crate::telemetry::Metrics::new(&[]).unwrap().store().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn a_thread_that_is_not_to_be_had_is_an_error_also_inside_a_runtime() {
        // More than there is room for in an address space.
        let thread = || std::thread::Builder::new().name("of-a-test".into());
        assert!(runtime(thread().stack_size(1 << 60), || async {}).is_err());
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let main = move || async move {
            let _ = ended.await;
        };
        let there = runtime(thread(), main).unwrap();
        let name = there.spawn(async { std::thread::current().name().map(str::to_owned) }).await.unwrap();
        assert_eq!(name.as_deref(), Some("of-a-test"));
        drop(end);
    }

    #[test]
    fn a_token_is_given_back_also_when_the_store_is_left() {
        let fleet = nobody();
        let end = Arc::downgrade(&fleet.end);
        fleet.unspend(&[1; 32], 7, true);
        drop(fleet);
        std::thread::sleep(Duration::from_millis(100));
        assert!(end.upgrade().is_some(), "its thread goes on");
        let fleet = nobody();
        let end = Arc::downgrade(&fleet.end);
        drop(fleet);
        assert!(end.upgrade().is_none(), "where nothing is left to do it ends");
    }
}
