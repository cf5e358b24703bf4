//! Limits' state: how many cells a key has left, decided for all limits of a request at once.
//!
//! [`gcra`] is the algorithm, in one place, with time as an argument. A [`Limiter`] is where keys' state lives: in the
//! [`memory`] of this node, or in a store that a [`fleet`] of nodes shares. It is asked with the [`Check`]s of a whole
//! request and answers for all of them: they pass together or not at all, and what does not pass is charged to none of
//! those that enforce. [`in_flight`] counts what is under way.

pub mod fleet;
pub mod gcra;
pub mod in_flight;
pub mod locks;
pub mod memory;

use fleet::Fleet;
use gcra::Gcra;
use in_flight::InFlight;
use memory::Memory;
use smallvec::SmallVec;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A keyed 128-bit hash of a limit, its rate, and the attributes in its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub u128);

impl Key {
    /// Which of so many shards its state is in.
    #[inline]
    fn shard(self, shards: usize) -> usize {
        ((u64::from(self.0 as u32) * shards as u64) >> 32) as usize
    }
}

/// Nanoseconds, as clocks and limits count them.
#[inline]
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A node's clock: nanoseconds since it was made; never 0, which has always passed.
#[derive(Debug, Clone, Copy)]
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    #[inline]
    fn at(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.0)).saturating_add(1)
    }

    fn now(&self) -> u64 {
        self.at(Instant::now())
    }
}

/// What holds for a limit while the fleet's store does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// This node limits by itself, from its own memory.
    #[default]
    Local,
    /// It lets everyone pass.
    Open,
    /// It lets nobody pass.
    Closed,
}

/// What is asked of one limit.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// Whose state.
    pub key: Key,
    /// The rate and the burst.
    pub gcra: Gcra,
    /// Cells the request takes.
    pub cost: u32,
    /// Whether a refusal refuses the request; a shadow's does not.
    pub enforce: bool,
    /// A token lets the request past it: it does not refuse, and still what it says must be known.
    pub exempt: bool,
    /// What holds without the store.
    pub on_failure: OnFailure,
    /// Which overflow bucket stands in when the store has no room for the key: one a limit.
    pub overflow: Key,
    /// The second limit, asked where the first refuses and a token was brought: its place among [`Ask::seconds`].
    pub top_up: Option<u16>,
}

/// The second limit of a [`Check`].
#[derive(Debug, Clone, Copy)]
pub struct TopUp {
    /// Whose state.
    pub key: Key,
    /// The rate and the burst.
    pub gcra: Gcra,
    /// Which overflow bucket stands in.
    pub overflow: Key,
}

/// What is asked for a request.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// Of each limit.
    pub checks: &'a [Check],
    /// Second limits of these.
    pub seconds: &'a [TopUp],
    /// Take the cells, if all pass.
    pub charge: bool,
    /// Stands for the request's provider, where a store is partitioned by it.
    pub partition: u64,
}

/// What one limit says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It lets the request pass.
    Allowed,
    /// The second limit does, where the first would not.
    ToppedUp,
    /// It does not. None: it never will, the cost is above the burst.
    Refused(Option<Duration>),
    /// Its store does not answer, and it lets nobody pass without.
    Unavailable,
}

/// Who decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Decided {
    /// The store that the limits are kept in.
    #[default]
    ByStore,
    /// This node, by what each limit says of a store that does not answer.
    WithoutStore,
}

/// What each limit of a request says, in the order they were asked.
pub type Outcomes = SmallVec<[Outcome; 12]>;

/// Where the state of limits lives. It outlives the policy: a reload finds again what it does not change.
#[derive(Debug)]
pub struct Limiter {
    memory: Arc<Memory>,
    in_flight: InFlight,
    fleet: Option<Arc<Fleet>>,
    clock: Clock,
}

// === impl Ask ===

impl<'a> Ask<'a> {
    /// These checks, charged if all pass; no second limits, and one provider.
    pub fn of(checks: &'a [Check]) -> Self {
        Self { checks, seconds: &[], charge: true, partition: 0 }
    }

    /// The second limit of a check.
    #[inline]
    pub fn second(&self, check: &Check) -> Option<&'a TopUp> {
        self.seconds.get(usize::from(check.top_up?))
    }

    /// All keys that are asked about.
    #[inline]
    fn keys(&self) -> impl Iterator<Item = Key> {
        self.checks.iter().map(|check| check.key).chain(self.seconds.iter().map(|second| second.key))
    }
}

// === impl Outcome ===

impl Outcome {
    /// Whether the request may pass, as far as this limit goes.
    #[inline]
    pub fn passes(&self) -> bool {
        matches!(self, Self::Allowed | Self::ToppedUp)
    }
}

/// Whether all enforced limits let a request pass.
fn all_pass(checks: &[Check], outcomes: &Outcomes) -> bool {
    checks.iter().zip(outcomes).all(|(check, outcome)| !check.enforce || outcome.passes())
}

// === impl Limiter ===

impl Limiter {
    /// Limits in this node's memory; in a fleet's store if there is one, with the memory to fall back to.
    pub fn new(memory: Memory, fleet: Option<Arc<Fleet>>) -> Self {
        Self { memory: Arc::new(memory), in_flight: InFlight::default(), fleet, clock: Clock::start() }
    }

    /// Another one that goes on from this: with another table, which takes over what this one's knows, or another store.
    /// Requests under way are counted together.
    pub fn succeed(&self, memory: Option<Memory>, fleet: Option<Arc<Fleet>>) -> Self {
        let memory = match memory {
            Some(memory) => {
                memory.absorb(&self.memory, self.clock.now());
                Arc::new(memory)
            }
            None => self.memory.clone(),
        };
        Self { memory, in_flight: self.in_flight.clone(), fleet, clock: self.clock }
    }

    /// As [`Limiter::decide`], where nobody else has to be asked; none: limits are kept in a fleet's store.
    pub fn decide_at_once(&self, at: Instant, ask: &Ask<'_>, outcomes: &mut Outcomes) -> Option<(bool, Decided)> {
        let here = self.fleet.is_none();
        here.then(|| (self.memory.decide(self.clock.at(at), ask, outcomes), Decided::ByStore))
    }

    /// Asks all checks of a request together. Charges them, if that is asked for and every enforced one lets the request
    /// pass: those that do, and of the shadows those that would. Returns whether all enforced ones do. `at` is when the
    /// request first asked: it waits for a store no longer than its time-out after that, however often it asks.
    pub async fn decide(&self, at: Instant, ask: &Ask<'_>, outcomes: &mut Outcomes) -> (bool, Decided) {
        match &self.fleet {
            None => (self.memory.decide(self.clock.at(at), ask, outcomes), Decided::ByStore),
            Some(fleet) => match fleet.decide(at, ask, outcomes).await {
                Ok(pass) => (pass, Decided::ByStore),
                Err(fleet::Gone { .. }) => (self.decide_without_store(at, ask, outcomes), Decided::WithoutStore),
            },
        }
    }

    /// Asks this node's own memory, wherever limits are kept.
    pub fn decide_here(&self, ask: &Ask<'_>, outcomes: &mut Outcomes) -> bool {
        self.memory.decide(self.clock.now(), ask, outcomes)
    }

    #[cold]
    fn decide_without_store(&self, at: Instant, ask: &Ask<'_>, outcomes: &mut Outcomes) -> bool {
        let local: SmallVec<[Check; 12]> =
            ask.checks.iter().filter(|check| check.on_failure == OnFailure::Local).copied().collect();
        let closed = ask.checks.iter().any(|check| check.enforce && check.on_failure == OnFailure::Closed);
        let mut said = Outcomes::new();
        let here = Ask { checks: &local, charge: ask.charge && !closed, ..*ask };
        self.memory.decide(self.clock.at(at), &here, &mut said);
        let mut said = said.into_iter();
        outcomes.clear();
        outcomes.extend(ask.checks.iter().map(|check| match check.on_failure {
            OnFailure::Local => said.next().unwrap_or(Outcome::Unavailable),
            OnFailure::Open => Outcome::Allowed,
            OnFailure::Closed => Outcome::Unavailable,
        }));
        all_pass(ask.checks, outcomes)
    }

    /// Charges what has been used already, whether or not there is so much. A fleet's store hears of it later.
    pub fn charge(&self, ask: &Ask<'_>) {
        let now = self.clock.now();
        match &self.fleet {
            None => self.memory.charge(now, ask.checks),
            Some(fleet) => {
                let (memory, checks) = (self.memory.clone(), ask.checks.to_vec());
                fleet.charge(ask, move || memory.charge(now, &checks));
            }
        }
    }

    /// Requests under way, by key.
    pub fn in_flight(&self) -> &InFlight {
        &self.in_flight
    }

    /// Whether the state of each provider's requests is apart from others'.
    pub fn is_partitioned_by_provider(&self) -> bool {
        self.fleet.as_ref().is_some_and(|fleet| fleet.is_partitioned_by_provider())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_its_store_each_limit_does_as_it_says() {
        let overflowed = prometheus::IntCounter::new("o", "o").unwrap();
        let limiter = Limiter::new(Memory::new(1 << 20, overflowed).unwrap(), None);
        let gcra = Gcra::new(1, Duration::from_secs(3600), 2).unwrap();
        let check = |n, on_failure| Check {
            key: Key(n),
            gcra,
            cost: 1,
            enforce: true,
            exempt: false,
            on_failure,
            overflow: Key(0),
            top_up: None,
        };
        let decide = |checks: &[Check]| {
            let mut outcomes = Outcomes::new();
            let pass = limiter.decide_without_store(Instant::now(), &Ask::of(checks), &mut outcomes);
            (pass, outcomes.to_vec())
        };
        let (local, open) = (check(1, OnFailure::Local), check(2, OnFailure::Open));
        let closed = check(3, OnFailure::Closed);
        for _ in 0..5 {
            let (pass, outcomes) = decide(&[local, open, closed]);
            assert!(!pass);
            assert_eq!(outcomes, [Outcome::Allowed, Outcome::Allowed, Outcome::Unavailable]);
        }
        let shadow = Check { enforce: false, ..closed };
        assert!(decide(&[open, local, shadow]).0, "the five took nothing");
        assert!(decide(&[open, local]).0);
        let (pass, outcomes) = decide(&[open, local]);
        assert!(!pass && outcomes[0] == Outcome::Allowed && matches!(outcomes[1], Outcome::Refused(Some(_))));
        assert!((0..9).all(|_| decide(&[open]).0));
    }
}
