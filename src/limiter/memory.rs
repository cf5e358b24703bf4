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
use memmap2::MmapMut;
use smallvec::SmallVec;
use std::collections::HashMap;

/// Eight octets, as the table has them.
type Word = [u8; 8];

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

/// What the system gives memory in: a shard is some of these.
const PAGE: usize = 4096;

/// A large page: what a shard is in a table that has many of them.
const LARGE: usize = 2 << 20;

/// What a shard is in a smaller one: of fewer buckets, some would be full long before all are.
const SMALL: usize = 16 * PAGE;

/// Nanoseconds for which a shard that was found full is taken to be so.
const FULL_FOR: u64 = 1_000_000;

/// The buckets behind one lock.
struct Shard {
    /// Whole pages, so that a bucket begins with a cache line. Zeroed memory is free places.
    table: MmapMut,
    /// The latest time that was decided at. A clock is read before the locks are had: who comes late decides at the time of
    /// who came before, lest an entry that one took to have passed be live to the next.
    seen: u64,
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

/// Where a key belongs: a shard among those held, and its two buckets there.
#[derive(Debug, Clone, Copy)]
struct Spot {
    held: u32,
    first: u32,
    second: u32,
    words: (u64, u64),
}

/// Where the state of a key is, or may be put: a bucket, and a word in that.
#[derive(Debug, Clone, Copy)]
enum Slot {
    Place { bucket: usize, at: usize },
    Overflow,
}

type Guards<'a, L> = SmallVec<[<L as Locks>::Guard<'a, Shard>; 12]>;

/// Where the keys of a request belong, in their order.
type Spots = SmallVec<[Spot; 12]>;

/// Octets of a table whose memory comes at once, at most: a larger one is exchanged for another at a reload, and both would be there.
const MOST_AT_ONCE: usize = 256 << 20;

// === impl Shard ===

impl Shard {
    /// Free buckets for so many shards. Their memory is there from the start if it is to come `at_once` and the system can give it: else
    /// it comes page by page, and a request waits for one to be cleared.
    fn tables(shards: usize, octets: usize, at_once: bool) -> std::io::Result<Vec<MmapMut>> {
        let tables: std::io::Result<Vec<_>> = (0..shards).map(|_| MmapMut::map_anon(octets)).collect();
        let tables = tables?;
        // In large pages a check of a table that is in no cache takes two thirds of the time (docs/limits.md): what else has
        // to be fetched is the page tables. Where there are none it works without. Those of small shards are for several, which the
        // system has put next to each other; before all are there it cannot give them.
        #[cfg(target_os = "linux")]
        for table in &tables {
            let _ = table.advise(memmap2::Advice::HugePage);
        }
        #[cfg(target_os = "linux")]
        if at_once {
            for table in &tables {
                let _ = table.advise(memmap2::Advice::PopulateWrite);
            }
        }
        Ok(tables)
    }

    fn new(table: MmapMut) -> Self {
        Self { table, seen: 0, full_until: 0 }
    }

    #[inline]
    fn bucket(&self, bucket: usize) -> Option<&Bucket> {
        self.table.as_chunks().0.as_chunks().0.get(bucket)
    }

    #[inline]
    fn bucket_mut(&mut self, bucket: usize) -> Option<&mut Bucket> {
        self.table.as_chunks_mut().0.as_chunks_mut().0.get_mut(bucket)
    }

    /// Puts a key into a place of `bucket`, which is `first` of its buckets or the other.
    #[inline]
    fn put(&mut self, first: usize, bucket: usize, at: usize, (high, low): (u64, u64), tat: u64) {
        if let Some([a, b, time]) = self.bucket_mut(bucket).and_then(|b| b.get_mut(at..at + PLACE)) {
            (*a, *b, *time) = (high.to_ne_bytes(), low.to_ne_bytes(), tat.to_ne_bytes());
        }
        if bucket != first
            && let Some(bucket) = self.bucket_mut(first)
        {
            bucket[SPILLED] = tat.max(number(bucket[SPILLED])).to_ne_bytes();
        }
    }
}

#[inline]
fn number(word: Word) -> u64 {
    u64::from_ne_bytes(word)
}

/// The word at which a live entry of a key begins, and its time.
#[inline]
fn live(bucket: &Bucket, (high, low): (u64, u64), now: u64) -> Option<(usize, u64)> {
    let places = bucket.as_chunks::<PLACE>().0.iter().enumerate();
    let mut entries = places.map(|(place, [a, b, tat])| (place, number(*a), number(*b), number(*tat)));
    let (place, _, _, tat) = entries.find(|(_, a, b, tat)| *a == high && *b == low && *tat > now)?;
    Some((place * PLACE, tat))
}

/// The word at which the first free place begins.
#[inline]
fn free(bucket: &Bucket, now: u64) -> Option<usize> {
    let (places, _) = bucket.as_chunks::<PLACE>();
    places.iter().position(|[_, _, tat]| number(*tat) <= now).map(|place| place * PLACE)
}

/// How many places are free.
#[inline]
fn count_free(bucket: &Bucket, now: u64) -> usize {
    bucket.as_chunks::<PLACE>().0.iter().filter(|[_, _, tat]| number(*tat) <= now).count()
}

// === impl Memory ===

impl Memory {
    /// A table of at most `budget` octets, or the least there is. `overflowed` counts decisions that fell to an overflow bucket.
    ///
    /// # Errors
    /// The system does not give so much memory.
    pub fn new(budget: usize, overflowed: prometheus::IntCounter) -> std::io::Result<Self> {
        Self::with_locks(budget, SHARDS, overflowed)
    }
}

impl<L: Locks> Memory<L> {
    /// As [`Memory::new`], with other locks, and `shards` of them at most.
    ///
    /// # Errors
    /// The system does not give so much memory.
    pub fn with_locks(budget: usize, shards: usize, overflowed: prometheus::IntCounter) -> std::io::Result<Self> {
        let lock = size_of::<L::Mutex<Shard>>();
        let (large, small) = (budget / (LARGE + lock), budget / (SMALL + lock));
        let shards = if large >= 64 { large } else { small }.clamp(1, shards);
        let octets = ((budget / shards).saturating_sub(lock) / PAGE).max(1) * PAGE;
        let at_once = octets.saturating_mul(shards) <= MOST_AT_ONCE;
        let tables = Shard::tables(shards, octets, at_once)?;
        let shards = tables.into_iter().map(|table| L::mutex(Shard::new(table))).collect();
        let buckets = octets / size_of::<Bucket>();
        Ok(Self { shards, overflow: L::mutex(HashMap::new()), buckets, overflowed })
    }

    /// How many keys have room.
    pub fn capacity(&self) -> usize {
        self.buckets * self.shards.len() * PLACES
    }

    /// Octets the table takes, all told.
    pub fn octets(&self) -> usize {
        self.shards.len() * (self.buckets * size_of::<Bucket>() + size_of::<L::Mutex<Shard>>())
    }

    /// The two buckets a key may be in. They come from other bits than the shard, and say nothing of each other.
    #[inline]
    fn buckets_of(&self, (high, low): (u64, u64)) -> (usize, usize) {
        let scale = |bits: u64| ((u128::from(bits) * self.buckets as u128) >> 64) as usize;
        let (first, second) = (scale(high), scale(low));
        if first == second { (first, (first + 1) % self.buckets) } else { (first, second) }
    }

    /// Locks the shards of all keys, in ascending order, and has their first buckets fetched from memory at one time: one after
    /// another they would take as long each. Returns the time to decide at. `guards` and `spots` are empty before: they are
    /// large, and made where they stay.
    #[inline]
    fn lock<'a>(
        &'a self,
        now: u64,
        keys: impl Iterator<Item = Key>,
        guards: &mut Guards<'a, L>,
        spots: &mut Spots,
    ) -> u64 {
        // The shards, and below each whose it is. A shard has less than 2^32 buckets: they would be half a tebioctet.
        let mut order: SmallVec<[u64; 12]> = SmallVec::new();
        for (key, place) in keys.zip(0..) {
            let words = ((key.0 >> 64) as u64, key.0 as u64);
            let (first, second) = self.buckets_of(words);
            order.push((key.shard(self.shards.len()) as u64) << 32 | place);
            spots.push(Spot { held: u32::MAX, first: first as u32, second: second as u32, words });
        }
        order.sort_unstable();
        let mut last = None;
        for entry in &order {
            let (shard, place) = ((entry >> 32) as usize, *entry as u32 as usize);
            if last != Some(shard) {
                let Some(lock) = self.shards.get(shard) else { continue };
                guards.push(L::lock(lock));
                last = Some(shard);
            }
            if let Some(spot) = spots.get_mut(place) {
                spot.held = guards.len() as u32 - 1;
            }
        }
        // A bucket is two cache lines. Nothing else is done here: the processor looks only so far ahead.
        let mut fetched = 0;
        for spot in spots.iter() {
            let bucket = guards.get(spot.held as usize).and_then(|shard| shard.bucket(spot.first as usize));
            fetched ^= bucket.map_or(0, |words| words[0][0] ^ words[SPILLED][0]);
        }
        std::hint::black_box(fetched);
        let now = guards.iter().fold(now, |now, shard| now.max(shard.seen));
        guards.iter_mut().for_each(|shard| shard.seen = now);
        now
    }

    /// The place of a key and its theoretical arrival time, 0 if it has none.
    #[inline]
    fn find(&self, guards: &mut Guards<'_, L>, spot: &Spot, now: u64) -> (Slot, u64) {
        let (first, second, words) = (spot.first as usize, spot.second as usize, spot.words);
        let Some(shard) = guards.get_mut(spot.held as usize) else { return (Slot::Overflow, 0) };
        let Some(bucket) = shard.bucket(first) else { return (Slot::Overflow, 0) };
        if let Some((at, tat)) = live(bucket, words, now) {
            return (Slot::Place { bucket: first, at }, tat);
        }
        let spilled = number(bucket[SPILLED]) > now;
        let mut room = free(bucket, now).map(|at| (first, at));
        if !spilled
            && let Some((bucket, at)) = room
            && shard.bucket(first).is_some_and(|bucket| count_free(bucket, now) > 1)
        {
            return (Slot::Place { bucket, at }, 0);
        }
        if let Some(bucket) = shard.bucket(second) {
            if spilled && let Some((at, tat)) = live(bucket, words, now) {
                return (Slot::Place { bucket: second, at }, tat);
            }
            // The last place of a bucket is for keys that have no other.
            if count_free(bucket, now) > usize::from(room.is_some()) {
                room = free(bucket, now).map(|at| (second, at));
            }
        }
        match room.or_else(|| self.make_room(shard, [first, second], now)) {
            Some((bucket, at)) => (Slot::Place { bucket, at }, 0),
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
        let (first, second) = self.buckets_of((number(high), number(low)));
        Some((first, if first == from { second } else { first }))
    }

    /// Moves a key to its other bucket, if that has room.
    fn move_on(&self, shard: &mut Shard, from: usize, at: usize, now: u64) -> bool {
        let Some((first, to)) = self.other_bucket(shard, from, at) else { return false };
        let Some(free) = shard.bucket(to).filter(|_| to != from).and_then(|bucket| free(bucket, now)) else {
            return false;
        };
        let Some(&[high, low, tat]) = shard.bucket(from).and_then(|b| b.get(at..)?.first_chunk()) else { return false };
        shard.put(first, to, free, (number(high), number(low)), number(tat));
        // Not in two places at any time that anyone sees: the shard is locked.
        shard.put(from, from, at, (0, 0), 0);
        true
    }

    #[inline]
    fn set(guards: &mut Guards<'_, L>, spot: &Spot, slot: Slot, tat: u64) {
        let Slot::Place { bucket, at } = slot else { return };
        if let Some(shard) = guards.get_mut(spot.held as usize) {
            shard.put(spot.first as usize, bucket, at, spot.words, tat);
        }
    }

    /// Asks all checks together at `now` (nanoseconds of the node's clock, never 0). Charges them, if that is asked for and
    /// every enforced one lets the request pass: those that do, and of the shadows those that would. Returns whether all
    /// enforced ones do.
    pub fn decide(&self, now: u64, ask: &Ask<'_>, outcomes: &mut Outcomes) -> bool {
        outcomes.clear();
        let (mut guards, mut spots) = (Guards::<L>::new(), Spots::new());
        let now = self.lock(now, ask.keys(), &mut guards, &mut spots);
        let (first_spots, second_spots) = spots.split_at(ask.checks.len().min(spots.len()));
        let mut overflow: Option<L::Guard<'_, HashMap<Key, u64>>> = None;
        // What is charged is written at once and taken back if a later limit refuses: two keys of one request that find
        // the same free place must not both be put there. By key, for a later one may make an earlier one move.
        let mut charged: SmallVec<[(Charged<'_>, u64); 12]> = SmallVec::new();
        let mut pass = true;

        for (check, spot) in ask.checks.iter().zip(first_spots) {
            let mut take = |spot, gcra: &Gcra, bucket| -> Result<(), TooMany> {
                let (slot, mut tat) = self.find(&mut guards, spot, now);
                if let Slot::Overflow = slot {
                    self.overflowed.inc();
                    let times = overflow.get_or_insert_with(|| L::lock(&self.overflow));
                    tat = times.get(bucket).copied().unwrap_or(0);
                    let new = gcra.take(tat, now, check.cost)?;
                    remember(times, *bucket, new, now);
                    charged.push((Charged::Overflow(bucket), tat));
                } else {
                    let new = gcra.take(tat, now, check.cost)?;
                    Self::set(&mut guards, spot, slot, new);
                    charged.push((Charged::Key(spot), tat));
                }
                Ok(())
            };
            let outcome = match take(spot, &check.gcra, &check.overflow) {
                Ok(()) => Outcome::Allowed,
                Err(refusal) => {
                    let second = ask.second(check).zip(check.top_up.and_then(|at| second_spots.get(usize::from(at))));
                    let topped_up = second.is_some_and(|(t, spot)| take(spot, &t.gcra, &t.overflow).is_ok());
                    match refusal {
                        _ if topped_up => Outcome::ToppedUp,
                        TooMany::Wait(wait) => Outcome::Refused(Some(wait)),
                        TooMany::Never => Outcome::Refused(None),
                    }
                }
            };
            pass &= !check.enforce || outcome.passes();
            outcomes.push(outcome);
        }

        if !(ask.charge && pass) {
            for (what, before) in charged.into_iter().rev() {
                match what {
                    Charged::Overflow(bucket) => {
                        overflow.as_mut().map(|times| times.insert(*bucket, before));
                    }
                    Charged::Key(spot) => {
                        if let (slot @ Slot::Place { .. }, 1..) = self.find(&mut guards, spot, now) {
                            Self::set(&mut guards, spot, slot, before);
                        }
                    }
                }
            }
        }
        pass
    }

    /// Takes over what another table knows at `now`: each key has the later of its two times. What is charged there while this
    /// goes on may be missed. Where there is no room for all, those that come last have none, and their limits' overflow
    /// buckets are there for them.
    pub fn absorb(&self, other: &Self, now: u64) {
        for shard in &other.shards {
            // Copied out, so that no request there waits for what is done here.
            let mut entries: Vec<(Key, u64)> = vec![];
            {
                let shard = L::lock(shard);
                let buckets = (0..other.buckets).filter_map(|bucket| shard.bucket(bucket));
                for place in buckets.flat_map(|bucket| bucket.as_chunks::<PLACE>().0) {
                    let [high, low, tat] = place.map(number);
                    if tat > now {
                        entries.push((Key(u128::from(high) << 64 | u128::from(low)), tat));
                    }
                }
            }
            for (key, tat) in entries {
                let (mut guards, mut spots) = (Guards::<L>::new(), Spots::new());
                let now = self.lock(now, std::iter::once(key), &mut guards, &mut spots);
                for spot in &spots {
                    if let (slot @ Slot::Place { .. }, known) = self.find(&mut guards, spot, now) {
                        Self::set(&mut guards, spot, slot, tat.max(known));
                    }
                }
            }
        }
        let theirs: Vec<_> = L::lock(&other.overflow).iter().map(|(bucket, tat)| (*bucket, *tat)).collect();
        let mut times = L::lock(&self.overflow);
        for (bucket, tat) in theirs {
            let known = times.get(&bucket).copied().unwrap_or(0);
            remember(&mut times, bucket, tat.max(known), now);
        }
    }

    /// Charges what has been used already, whether or not there is so much.
    pub fn charge(&self, now: u64, checks: &[Check]) {
        let (mut guards, mut spots) = (Guards::<L>::new(), Spots::new());
        let now = self.lock(now, checks.iter().map(|check| check.key), &mut guards, &mut spots);
        for (check, spot) in checks.iter().zip(&spots) {
            match self.find(&mut guards, spot, now) {
                (slot @ Slot::Place { .. }, tat) => {
                    Self::set(&mut guards, spot, slot, check.gcra.charge(tat, now, check.cost));
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

/// What a decision has written.
enum Charged<'a> {
    Key(&'a Spot),
    Overflow(&'a Key),
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
