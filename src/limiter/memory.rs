//! The state of limits on a single node: a table of fixed size, given once and never grown.
//!
//! A key has 24 octets: its hash and its theoretical arrival time. Keys are spread over shards, each behind a lock of its
//! own. Within its shard a key may be in one of two buckets of five places, and when both are full of others, one of these
//! goes to its own other bucket: at 32 octets a key, four fifths of all places, every key finds room. A bucket
//! is two cache lines, and says until when any key that belongs there may be in its other one: as a rule one bucket is read.
//!
//! An entry whose time has passed is as good as a free place. When there is none, a new key shares its limit's overflow
//! bucket: whoever floods the table with made-up keys neither grows it nor makes it forget a key it knows, and gets no more
//! than one key's rate for it.
//!
//! The shards of a request's keys are locked in ascending order, the overflow last: requests that share keys cannot wait
//! for each other in a circle, and none sees another's half-made decision.

use super::gcra::{Gcra, TooMany};
use super::locks::{Locks, ParkingLot};
use super::{Ask, Check, Key, Outcome, Outcomes};
use smallvec::SmallVec;
use std::collections::HashMap;

/// Eight octets of which a bucket is made.
type Word = u64;

/// Words of a place: the hash (two halves) and the theoretical arrival time; a time of 0 has always passed.
const PLACE: usize = 3;

/// Places of a bucket.
const PLACES: usize = 5;

/// Words of a bucket: its places, and the time until which a key that belongs here first may be in its second bucket.
const BUCKET: usize = 16;

/// Where in a bucket that time is.
const SPILLED: usize = PLACES * PLACE;

type Bucket = [Word; BUCKET];

/// Shards of a store; one of a small budget has fewer.
const SHARDS: usize = 1024;

/// Nanoseconds for which a shard that was found full is taken to be so.
const FULL_FOR: u64 = 1_000_000;

/// The buckets behind one lock.
struct Shard {
    words: Box<[Word]>,
    /// Words before the first bucket: a bucket begins with a cache line.
    offset: usize,
    /// Until when no room is looked for among others' places, because none was found.
    full_until: u64,
}

/// The in-memory store of limits' state.
pub struct Memory<L: Locks = ParkingLot> {
    shards: Box<[L::Mutex<Shard>]>,
    /// Theoretical arrival times of overflow buckets, by their limit's key for it.
    overflow: L::Mutex<HashMap<Key, u64>>,
    /// Buckets of a shard.
    buckets: usize,
    overflowed: prometheus::IntCounter,
}

impl<L: Locks> std::fmt::Debug for Memory<L> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("capacity", &self.capacity()).finish_non_exhaustive()
    }
}

/// Where the state of a key is, or may be put: a shard among those held, a bucket in it, a word in that.
#[derive(Debug, Clone, Copy)]
enum Slot {
    Place { held: usize, bucket: usize, at: usize },
    Overflow,
}

type Guards<'a, L> = SmallVec<[(usize, <L as Locks>::Guard<'a, Shard>); 8]>;

/// Two halves of a key.
#[inline]
fn halves(key: Key) -> (Word, Word) {
    ((key.0 >> 64) as u64, key.0 as u64)
}

// === impl Shard ===

impl Shard {
    /// Free buckets. Zeroed memory is free places: the system gives it page by page, as it is used.
    fn new(buckets: usize) -> Self {
        let words = vec![0; (buckets + 1) * BUCKET].into_boxed_slice();
        let offset = words.as_ptr().align_offset(size_of::<Bucket>()).min(BUCKET);
        Self { words, offset, full_until: 0 }
    }

    #[inline]
    fn bucket(&self, bucket: usize) -> Option<&Bucket> {
        self.words.get(self.offset..)?.as_chunks::<BUCKET>().0.get(bucket)
    }

    #[inline]
    fn bucket_mut(&mut self, bucket: usize) -> Option<&mut Bucket> {
        self.words.get_mut(self.offset..)?.as_chunks_mut::<BUCKET>().0.get_mut(bucket)
    }

    /// Puts a key into a place of `bucket`, which is `first` of its buckets or the other.
    #[inline]
    fn put(&mut self, first: usize, bucket: usize, at: usize, (high, low): (Word, Word), tat: u64) {
        if let Some([a, b, time]) = self.bucket_mut(bucket).and_then(|b| b.get_mut(at..at + PLACE)) {
            (*a, *b, *time) = (high, low, tat);
        }
        if bucket != first
            && let Some(spilled) = self.bucket_mut(first).map(|b| &mut b[SPILLED])
        {
            *spilled = tat.max(*spilled);
        }
    }
}

/// The word at which a live entry of a key begins, and its time.
#[inline]
fn live(bucket: &Bucket, (high, low): (Word, Word), now: u64) -> Option<(usize, u64)> {
    let (places, _) = bucket.as_chunks::<PLACE>();
    let found = places.iter().position(|[a, b, tat]| *a == high && *b == low && *tat > now)?;
    Some((found * PLACE, places.get(found)?[2]))
}

/// The word at which the first free place begins.
#[inline]
fn free(bucket: &Bucket, now: u64) -> Option<usize> {
    let (places, _) = bucket.as_chunks::<PLACE>();
    places.iter().position(|[_, _, tat]| *tat <= now).map(|place| place * PLACE)
}

/// How many places are free.
#[inline]
fn count_free(bucket: &Bucket, now: u64) -> usize {
    bucket.as_chunks::<PLACE>().0.iter().filter(|[_, _, tat]| *tat <= now).count()
}

// === impl Memory ===

impl Memory {
    /// A table of at most `budget` octets. `overflowed` counts decisions that fell to an overflow bucket.
    pub fn new(budget: usize, overflowed: prometheus::IntCounter) -> Self {
        Self::with_locks(budget, SHARDS, overflowed)
    }
}

impl<L: Locks> Memory<L> {
    /// As [`Memory::new`], with other locks, and `shards` of them at most.
    pub fn with_locks(budget: usize, shards: usize, overflowed: prometheus::IntCounter) -> Self {
        // Of few buckets, some shards would be full long before all are.
        let shards = shards.min(budget / (256 * size_of::<Bucket>())).max(1);
        let room = (budget / shards).saturating_sub(size_of::<L::Mutex<Shard>>()) / size_of::<Bucket>();
        // A shard has a bucket's room more than buckets, to begin with a cache line.
        let buckets = room.saturating_sub(1).max(1);
        Self {
            shards: (0..shards).map(|_| L::mutex(Shard::new(buckets))).collect(),
            overflow: L::mutex(HashMap::new()),
            buckets,
            overflowed,
        }
    }

    /// How many keys have room.
    pub fn capacity(&self) -> usize {
        self.buckets * self.shards.len() * PLACES
    }

    /// Octets the table takes, all told.
    pub fn octets(&self) -> usize {
        self.shards.len() * ((self.buckets + 1) * size_of::<Bucket>() + size_of::<L::Mutex<Shard>>())
    }

    #[inline]
    fn shard_of(&self, key: Key) -> usize {
        ((u64::from(key.0 as u32) * self.shards.len() as u64) >> 32) as usize
    }

    /// The two buckets a key may be in. They come from other bits than the shard, and say nothing of each other.
    #[inline]
    fn buckets_of(&self, (high, low): (Word, Word)) -> (usize, usize) {
        let scale = |bits: u64| ((u128::from(bits) * self.buckets as u128) >> 64) as usize;
        let (first, second) = (scale(high), scale(low));
        if first == second { (first, (first + 1) % self.buckets) } else { (first, second) }
    }

    fn lock(&self, keys: impl Iterator<Item = Key>) -> Guards<'_, L> {
        let mut wanted: SmallVec<[usize; 24]> = keys.map(|key| self.shard_of(key)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        wanted.into_iter().filter_map(|i| Some((i, L::lock(self.shards.get(i)?)))).collect()
    }

    /// The place of `key` and its theoretical arrival time, 0 if it has none.
    #[inline]
    fn find(&self, guards: &mut Guards<'_, L>, key: Key, now: u64) -> (Slot, u64) {
        let words = halves(key);
        let index = self.shard_of(key);
        let Some(held) = guards.iter().position(|(i, _)| *i == index) else { return (Slot::Overflow, 0) };
        let Some((_, shard)) = guards.get_mut(held) else { return (Slot::Overflow, 0) };
        let (first, second) = self.buckets_of(words);
        let Some(bucket) = shard.bucket(first) else { return (Slot::Overflow, 0) };
        if let Some((at, tat)) = live(bucket, words, now) {
            return (Slot::Place { held, bucket: first, at }, tat);
        }
        let mut room = free(bucket, now).map(|at| (first, at));
        let spilled = bucket[SPILLED] > now;
        if !spilled && room.is_some() && (count_free(bucket, now) > 1 || first == second) {
            let Some((bucket, at)) = room else { return (Slot::Overflow, 0) };
            return (Slot::Place { held, bucket, at }, 0);
        }
        if let Some(bucket) = shard.bucket(second) {
            if spilled && let Some((at, tat)) = live(bucket, words, now) {
                return (Slot::Place { held, bucket: second, at }, tat);
            }
            // The last place of a bucket is for keys that have no other.
            if count_free(bucket, now) > usize::from(room.is_some()) {
                room = free(bucket, now).map(|at| (second, at));
            }
        }
        match room.or_else(|| self.make_room(shard, [first, second], now)) {
            Some((bucket, at)) => (Slot::Place { held, bucket, at }, 0),
            None => (Slot::Overflow, 0),
        }
    }

    /// Both buckets of a new key are full of others: moves one of these to its own other bucket, or if these are all full,
    /// one of theirs first.
    #[cold]
    fn make_room(&self, shard: &mut Shard, full: [usize; 2], now: u64) -> Option<(usize, usize)> {
        if shard.full_until > now {
            return None;
        }
        for from in full {
            for at in (0..SPILLED).step_by(PLACE) {
                if self.move_on(shard, from, at, now) {
                    return Some((from, at));
                }
            }
        }
        for from in full {
            for at in (0..SPILLED).step_by(PLACE) {
                let (_, to) = self.other_bucket(shard, from, at)?;
                for further in (0..SPILLED).step_by(PLACE) {
                    if to != from && self.move_on(shard, to, further, now) && self.move_on(shard, from, at, now) {
                        return Some((from, at));
                    }
                }
            }
        }
        // A flood must not make us look again and again.
        shard.full_until = now.saturating_add(FULL_FOR);
        None
    }

    /// Of a key in a place: the bucket it belongs to first, and the one of its two that it is not in.
    fn other_bucket(&self, shard: &Shard, from: usize, at: usize) -> Option<(usize, usize)> {
        let [high, low] = *shard.bucket(from)?.get(at..)?.first_chunk()?;
        let (first, second) = self.buckets_of((high, low));
        Some((first, if first == from { second } else { first }))
    }

    /// Moves a key to its other bucket, if that has room.
    fn move_on(&self, shard: &mut Shard, from: usize, at: usize, now: u64) -> bool {
        let Some((first, to)) = self.other_bucket(shard, from, at) else { return false };
        let Some(free) = shard.bucket(to).filter(|_| to != from).and_then(|bucket| free(bucket, now)) else {
            return false;
        };
        let Some(&[high, low, tat]) = shard.bucket(from).and_then(|b| b.get(at..)?.first_chunk()) else { return false };
        shard.put(first, to, free, (high, low), tat);
        // Not in two places at any time that anyone sees: the shard is locked.
        shard.put(from, from, at, (0, 0), 0);
        true
    }

    fn set(&self, guards: &mut Guards<'_, L>, slot: Slot, key: Key, tat: u64) {
        let Slot::Place { held, bucket, at } = slot else { return };
        if let Some((_, shard)) = guards.get_mut(held) {
            let words = halves(key);
            shard.put(self.buckets_of(words).0, bucket, at, words, tat);
        }
    }

    /// Asks all checks together at `now` (nanoseconds of the node's clock, never 0). Charges them, if that is asked for and
    /// every enforced one lets the request pass: those that do, and of the shadows those that would. Returns whether all
    /// enforced ones do.
    pub fn decide(&self, now: u64, ask: &Ask<'_>, outcomes: &mut Outcomes) -> bool {
        outcomes.clear();
        let mut guards = self.lock(ask.keys());
        let mut overflow: Option<L::Guard<'_, HashMap<Key, u64>>> = None;
        // What is charged is written at once and taken back if a later limit refuses: two keys of one request that find
        // the same free place must not both be put there. By key, for a later one may make an earlier one move.
        let mut charged: SmallVec<[(bool, Key, u64); 12]> = SmallVec::new();
        let mut pass = true;

        for check in ask.checks {
            let mut take = |key: Key, gcra: &Gcra, bucket: Key| -> Result<(), TooMany> {
                let (slot, mut tat) = self.find(&mut guards, key, now);
                if let Slot::Overflow = slot {
                    self.overflowed.inc();
                    let times = overflow.get_or_insert_with(|| L::lock(&self.overflow));
                    tat = times.get(&bucket).copied().unwrap_or(0);
                    let new = gcra.take(tat, now, check.cost)?;
                    remember(times, bucket, new, now);
                    charged.push((true, bucket, tat));
                } else {
                    let new = gcra.take(tat, now, check.cost)?;
                    self.set(&mut guards, slot, key, new);
                    charged.push((false, key, tat));
                }
                Ok(())
            };
            let outcome = match take(check.key, &check.gcra, check.overflow) {
                Ok(()) => Outcome::Allowed,
                Err(refusal) => {
                    let topped_up = ask.second(check).is_some_and(|t| take(t.key, &t.gcra, t.overflow).is_ok());
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

        if !(ask.charge && pass) {
            for (overflowed, key, before) in charged.into_iter().rev() {
                if overflowed {
                    overflow.as_mut().map(|times| times.insert(key, before));
                } else if let (slot @ Slot::Place { .. }, tat) = self.find(&mut guards, key, now)
                    && tat > now
                {
                    self.set(&mut guards, slot, key, before);
                }
            }
        }
        pass
    }

    /// Charges what has been used already, whether or not there is so much.
    pub fn charge(&self, now: u64, checks: &[Check]) {
        let mut guards = self.lock(checks.iter().map(|check| check.key));
        for check in checks {
            match self.find(&mut guards, check.key, now) {
                (slot @ Slot::Place { .. }, tat) => {
                    self.set(&mut guards, slot, check.key, check.gcra.charge(tat, now, check.cost));
                }
                (Slot::Overflow, _) => {
                    self.overflowed.inc();
                    let mut times = L::lock(&self.overflow);
                    let tat = times.get(&check.overflow).copied().unwrap_or(0);
                    remember(&mut times, check.overflow, check.gcra.charge(tat, now, check.cost), now);
                }
            }
        }
    }
}

/// Notes the time of an overflow bucket. There is one for each limit and rate; those of limits that a reload took away go
/// once their time has passed.
fn remember(times: &mut HashMap<Key, u64>, bucket: Key, tat: u64, now: u64) {
    const MANY: usize = 4096;
    if times.len() >= MANY && !times.contains_key(&bucket) {
        times.retain(|_, tat| *tat > now);
    }
    times.insert(bucket, tat);
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
