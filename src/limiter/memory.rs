//! The state of limits on a single node: a table of fixed size, given once and never grown.
//!
//! A key has 24 octets: its hash and its theoretical arrival time. Keys are spread over shards, each behind a lock of its
//! own, and within a shard over buckets of eight places. An entry whose time has passed is as good as a free place. When
//! all eight places of a bucket are live, a new key shares its limit's overflow bucket: whoever floods the table with
//! made-up keys neither grows it nor makes it forget a key it knows, and gets no more than one key's rate for it.
//!
//! The shards of a request's keys are locked in ascending order, the overflow last: requests that share keys cannot wait
//! for each other in a circle, and none sees another's half-made decision.

use super::gcra::{Gcra, TooMany};
use super::{Check, Key, Outcome, Outcomes, Store};
use parking_lot::{Mutex, MutexGuard};
use smallvec::SmallVec;

/// Hash (two halves) and theoretical arrival time; a time of 0 has always passed.
type Place = [u64; 3];

const PLACES: usize = 8;
const SHARDS: usize = 1024;

/// The buckets behind one lock.
type Shard = Box<[[Place; PLACES]]>;

/// The in-memory [`Store`].
pub struct Memory {
    shards: Box<[Mutex<Shard>]>,
    /// Theoretical arrival times of the overflow buckets, one a limit.
    overflow: Mutex<Box<[u64]>>,
    buckets: u64,
    overflowed: prometheus::IntCounter,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("capacity", &self.capacity()).finish_non_exhaustive()
    }
}

/// Where the state of a key was found, or may be put.
enum Slot {
    Place { shard: usize, bucket: usize, place: usize },
    Overflow(usize),
}

type Guards<'a> = SmallVec<[(usize, MutexGuard<'a, Shard>); 8]>;

impl Memory {
    /// A table of at most `budget` octets, and `overflow` overflow buckets beside it. `overflowed` counts decisions that
    /// fell to one of these.
    pub fn new(budget: usize, overflow: usize, overflowed: prometheus::IntCounter) -> Self {
        let buckets = (budget / size_of::<[Place; PLACES]>() / SHARDS).max(1);
        // Zeroed memory is a table of free places: the system gives it page by page, as it is used.
        let shard = || Mutex::new(vec![[[0u64; 3]; PLACES]; buckets].into_boxed_slice());
        Self {
            shards: (0..SHARDS).map(|_| shard()).collect(),
            overflow: Mutex::new(vec![0; overflow].into_boxed_slice()),
            buckets: buckets as u64,
            overflowed,
        }
    }

    /// How many keys have room.
    pub fn capacity(&self) -> usize {
        self.buckets as usize * SHARDS * PLACES
    }

    fn shard_of(key: Key) -> usize {
        key.0 as usize % SHARDS
    }

    fn lock(&self, checks: &[Check]) -> Guards<'_> {
        let mut wanted: SmallVec<[usize; 24]> = checks
            .iter()
            .flat_map(|check| [Some(check.key), check.top_up.map(|second| second.key)])
            .flatten()
            .map(Self::shard_of)
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        wanted.into_iter().filter_map(|i| Some((i, self.shards.get(i)?.lock()))).collect()
    }

    /// The place of `key` and its theoretical arrival time, 0 if it has none.
    #[inline]
    fn find(&self, guards: &Guards<'_>, key: Key, now: u64, overflow: usize) -> (Slot, u64) {
        let shard = Self::shard_of(key);
        // The shard is taken from the low bits, the bucket from the high ones: neither says anything of the other.
        let bucket = (((key.0 >> 64) * u128::from(self.buckets)) >> 64) as usize;
        let (high, low) = ((key.0 >> 64) as u64, key.0 as u64);
        let mut free = None;
        let places = guards.iter().find(|(i, _)| *i == shard).and_then(|(_, table)| table.get(bucket));
        for (place, &[a, b, tat]) in places.into_iter().flatten().enumerate() {
            if (a, b) == (high, low) && tat > now {
                return (Slot::Place { shard, bucket, place }, tat);
            }
            if free.is_none() && tat <= now {
                free = Some(place);
            }
        }
        match free {
            Some(place) => (Slot::Place { shard, bucket, place }, 0),
            None => (Slot::Overflow(overflow), 0),
        }
    }

    fn set(guards: &mut Guards<'_>, slot: &Slot, key: Key, tat: u64) {
        let Slot::Place { shard, bucket, place } = *slot else { return };
        let table = guards.iter_mut().find(|(i, _)| *i == shard).map(|(_, table)| table);
        if let Some(entry) = table.and_then(|table| table.get_mut(bucket)).and_then(|places| places.get_mut(place)) {
            *entry = [(key.0 >> 64) as u64, key.0 as u64, tat];
        }
    }
}

impl Store for Memory {
    fn decide(&self, now: u64, checks: &[Check], charge: bool, outcomes: &mut Outcomes) -> bool {
        outcomes.clear();
        let mut guards = self.lock(checks);
        let mut overflow: Option<MutexGuard<'_, Box<[u64]>>> = None;
        // What is charged is written at once and taken back if a later limit refuses: two keys of one request that find
        // the same free place must not both be put there.
        let mut charged: SmallVec<[(Slot, Key, u64, u64); 12]> = SmallVec::new();
        let mut pass = true;

        for check in checks {
            let mut ask = |key: Key, gcra: Gcra, bucket: usize| -> Result<(), TooMany> {
                let (slot, mut tat) = self.find(&guards, key, now, bucket);
                if let Slot::Overflow(bucket) = slot {
                    self.overflowed.inc();
                    let times = overflow.get_or_insert_with(|| self.overflow.lock());
                    tat = times.get(bucket).copied().unwrap_or(0);
                }
                let new = gcra.take(tat, now, check.cost)?;
                match slot {
                    Slot::Place { .. } => Self::set(&mut guards, &slot, key, new),
                    Slot::Overflow(bucket) => {
                        if let Some(time) = overflow.as_mut().and_then(|times| times.get_mut(bucket)) {
                            *time = new;
                        }
                    }
                }
                charged.push((slot, key, tat, new));
                Ok(())
            };
            let outcome = match ask(check.key, check.gcra, check.overflow) {
                Ok(()) => Outcome::Allowed,
                Err(refusal) => {
                    let topped_up = check.top_up.is_some_and(|t| ask(t.key, t.gcra, t.overflow).is_ok());
                    match refusal {
                        _ if topped_up => Outcome::ToppedUp,
                        TooMany::Wait(wait) => Outcome::Refused(Some(wait)),
                        TooMany::Never => Outcome::Refused(None),
                    }
                }
            };
            pass &= !check.enforce || !matches!(outcome, Outcome::Refused(_));
            outcomes.push(outcome);
        }

        if !(charge && pass) {
            for (slot, key, before, _) in charged.into_iter().rev() {
                match slot {
                    Slot::Place { .. } => Self::set(&mut guards, &slot, key, before),
                    Slot::Overflow(bucket) => {
                        if let Some(time) = overflow.as_mut().and_then(|times| times.get_mut(bucket)) {
                            *time = before;
                        }
                    }
                }
            }
        }
        pass
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const SECOND: u64 = 1_000_000_000;

    fn store(budget: usize) -> Memory {
        Memory::new(budget, 4, prometheus::IntCounter::new("overflowed", "overflowed").unwrap())
    }

    fn check(key: u128, burst: u32) -> Check {
        let gcra = Gcra::new(1, Duration::from_secs(1), burst).unwrap();
        Check { key: Key(key << 64 | key), gcra, cost: 1, enforce: true, overflow: 0, top_up: None }
    }

    fn ask(store: &Memory, now: u64, checks: &[Check]) -> (bool, Vec<Outcome>) {
        let mut outcomes = Outcomes::new();
        let pass = store.decide(now, checks, true, &mut outcomes);
        (pass, outcomes.to_vec())
    }

    #[test]
    fn a_refused_request_is_charged_to_none() {
        let store = store(1 << 20);
        let (wide, narrow) = (check(1, 3), check(2, 1));
        assert!(ask(&store, SECOND, &[wide, narrow]).0);
        for _ in 0..10 {
            let (pass, outcomes) = ask(&store, SECOND, &[wide, narrow]);
            assert!(!pass);
            assert_eq!(outcomes, [Outcome::Allowed, Outcome::Refused(Some(Duration::from_secs(1)))]);
        }
        assert!(ask(&store, SECOND, &[wide]).0);
        assert!(ask(&store, SECOND, &[wide]).0);
        assert!(!ask(&store, SECOND, &[wide]).0, "ten refusals took nothing, two requests took the rest");
    }

    #[test]
    fn shadows_change_nothing() {
        let store = store(1 << 20);
        let shadow = Check { enforce: false, ..check(1, 1) };
        assert_eq!(ask(&store, SECOND, &[shadow, check(2, 9)]).1, [Outcome::Allowed; 2]);
        let (pass, outcomes) = ask(&store, SECOND, &[shadow, check(2, 9)]);
        assert!(pass);
        assert_eq!(outcomes, [Outcome::Refused(Some(Duration::from_secs(1))), Outcome::Allowed]);
    }

    #[test]
    fn a_token_tops_up_into_a_second_limit() {
        let store = store(1 << 20);
        let first = check(1, 1);
        let second = check(9, 2);
        let with =
            Check { top_up: Some(super::super::TopUp { key: second.key, gcra: second.gcra, overflow: 1 }), ..first };
        assert_eq!(ask(&store, SECOND, &[with]).1, [Outcome::Allowed]);
        assert_eq!(ask(&store, SECOND, &[with]).1, [Outcome::ToppedUp]);
        assert_eq!(ask(&store, SECOND, &[with]).1, [Outcome::ToppedUp]);
        assert!(!ask(&store, SECOND, &[with]).0);
        assert!(!ask(&store, SECOND, &[first]).0);
    }

    #[test]
    fn asking_without_charging_takes_nothing() {
        let store = store(1 << 20);
        let mut outcomes = Outcomes::new();
        for _ in 0..5 {
            assert!(store.decide(SECOND, &[check(1, 1)], false, &mut outcomes));
        }
        assert!(ask(&store, SECOND, &[check(1, 1)]).0);
        assert!(!ask(&store, SECOND, &[check(1, 1)]).0);
    }

    #[test]
    fn a_flood_grows_nothing_and_resets_nobody() {
        let store = store(1); // one bucket a shard
        let capacity = store.capacity();
        let known: Vec<_> = (0..50u128).map(|i| check(i * 7 + 1, 1)).collect();
        for one in &known {
            assert!(ask(&store, SECOND, &[*one]).0);
        }
        let made_up = |i: u128| check(1_000_000 + i, 1);
        let let_in = (0..capacity as u128 * 4).filter(|i| ask(&store, SECOND, &[made_up(*i)]).0).count();
        assert_eq!(let_in, capacity - known.len() + 1, "free places, and one cell of the overflow bucket");
        for one in &known {
            assert!(!ask(&store, SECOND, &[*one]).0, "a known key was forgotten");
        }
        // A second later all have their cell again: the known ones in their places.
        for one in &known {
            assert!(ask(&store, 2 * SECOND, &[*one]).0);
            assert!(!ask(&store, 2 * SECOND, &[*one]).0);
        }
    }

    #[test]
    fn two_keys_of_one_request_never_share_a_place() {
        let store = store(1);
        let a = check(1, 1);
        let b = Check { key: Key(a.key.0 + (1 << 64)), ..a }; // same shard, same bucket
        assert!(ask(&store, SECOND, &[a, b]).0);
        assert!(!ask(&store, SECOND, &[a]).0);
        assert!(!ask(&store, SECOND, &[b]).0);
    }

    #[test]
    fn threads_on_one_key_admit_exactly_the_burst() {
        let store = store(1 << 20);
        let checks = [check(1, 1000), check(2, 700), check(3, 900)];
        let admitted: usize = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..4).map(|_| scope.spawn(|| (0..1000).filter(|_| ask(&store, SECOND, &checks).0).count())).collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!(admitted, 700);
        let rest = |one: Check| (0..2000).filter(|_| ask(&store, SECOND, &[one]).0).count();
        assert_eq!((rest(checks[0]), rest(checks[2])), (300, 200), "the refused ones were charged nowhere");
    }
}
