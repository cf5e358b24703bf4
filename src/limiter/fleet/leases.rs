//! Leases: a node takes a batch of a limit's cells from the store at once and decides by itself until they are used up.
//!
//! A request whose keys all hold cells waits for no network; the next batch is asked for when half of one is left. Only a
//! key that this node holds nothing of, and does not know to be refused, waits for an answer. All asked for at one time go
//! to the store in one call.
//!
//! What is leased is charged when it is taken. So in any time the fleet admits what the rate and the burst allow in that
//! time, and what its nodes held at its beginning: at most one batch a node (or the cost of a request, if that is more).
//! What a node has not used for a while it gives back; what it held when it ended comes back at the limit's rate.

use super::store::{Call, Gone};
use super::{Shared, nanos, window};
use crate::limiter::gcra::Gcra;
use crate::limiter::{Ask, Key, Outcome, Outcomes, all_pass};
use parking_lot::{Mutex, MutexGuard};
use smallvec::SmallVec;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

const SHARDS: usize = 64;

/// Keys in one call at most.
const TOGETHER: usize = 256;

/// A node that got less than it wanted asks for the key again no sooner than this after there may be more: by then there is
/// more than a single cell, as a rule. Who is refused meanwhile is told of a time after it.
const PACE: Duration = Duration::from_millis(100);

/// What this node holds of a key.
struct Lease {
    cells: u32,
    gcra: Gcra,
    partition: u64,
    /// When cells were last taken.
    used: u64,
    /// When the store has as many as `denied` at once, as far as it said.
    denied_until: u64,
    denied: u32,
    /// Until when that is believed: other nodes give back what they do not use.
    believed_until: u64,
    /// Until when no more is asked for before it is needed: the store had less than was wanted.
    quiet_until: u64,
    /// An answer is awaited.
    asked: bool,
}

/// What is asked of the store.
pub(super) struct Want {
    key: Key,
    gcra: Gcra,
    partition: u64,
    /// Below 0: given back.
    cells: i64,
    /// As many as are needed at once, with those that are held.
    need: u32,
    held: u32,
}

/// All that this node holds.
pub(super) struct Leases {
    shards: Box<[Mutex<HashMap<Key, Lease>>]>,
    room: usize,
    share: u32,
    idle: Duration,
    wants: UnboundedSender<Want>,
    /// An answer has come.
    answered: Notify,
}

type Guards<'a> = SmallVec<[(usize, MutexGuard<'a, HashMap<Key, Lease>>); 8]>;

/// What this node can say of a key by itself.
enum Known {
    /// It holds as much.
    Held,
    /// The store has not as much.
    Denied(Duration),
    /// It costs more than there ever is.
    Never,
    /// Nothing.
    Nothing,
}

/// What came of an attempt.
enum Tried {
    Decided(bool),
    Waiting,
    NoRoom,
}

impl Leases {
    /// For so many keys at most; and what is asked of the store.
    pub(super) fn new(share: u32, idle: Duration, keys: usize) -> (Self, UnboundedReceiver<Want>) {
        let (wants, asked) = unbounded_channel();
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        let leases = Self { shards, room: (keys / SHARDS).max(1), share, idle, wants, answered: Notify::new() };
        (leases, asked)
    }

    fn batch(&self, gcra: &Gcra) -> u32 {
        gcra.burst().div_ceil(self.share.max(1)).max(1)
    }

    pub(super) async fn decide(
        &self,
        shared: &Shared,
        deadline: Instant,
        ask: &Ask<'_>,
        outcomes: &mut Outcomes,
    ) -> Result<bool, Gone> {
        loop {
            let answered = self.answered.notified();
            tokio::pin!(answered);
            // What is answered from here on is not missed.
            answered.as_mut().enable();
            let up = !shared.remote.breaker.is_open();
            match self.attempt(shared.clock.now(), up, ask, outcomes) {
                Tried::Decided(pass) => return Ok(pass),
                Tried::Waiting if !up => {
                    shared.remote.metrics.skipped.inc();
                    return Err(Gone::UNASKED);
                }
                Tried::NoRoom => return Err(Gone::UNASKED),
                Tried::Waiting => {}
            }
            if tokio::time::timeout_at(deadline.into(), answered).await.is_err() {
                return Err(Gone::UNASKED);
            }
        }
    }

    fn lock(&self, keys: impl Iterator<Item = Key>) -> Guards<'_> {
        let mut wanted: SmallVec<[usize; 24]> = keys.map(|key| key.shard(SHARDS)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        wanted.into_iter().filter_map(|i| Some((i, self.shards.get(i)?.lock()))).collect()
    }

    /// Decides with what is held; what is missing is asked for. While the store is not `up` what it has refused is not
    /// known to be refused still.
    fn attempt(&self, now: u64, up: bool, ask: &Ask<'_>, outcomes: &mut Outcomes) -> Tried {
        let mut guards = self.lock(ask.keys());
        let known = |guards: &Guards<'_>, key: Key, gcra: &Gcra, cost: u32| {
            if cost > gcra.burst() {
                return Known::Never;
            }
            match shard(guards, key).and_then(|shard| shard.get(&key)) {
                Some(lease) if lease.cells >= cost => Known::Held,
                Some(lease) if up && lease.believed_until > now && cost >= lease.denied => {
                    let more = gcra.increment(cost - lease.denied);
                    Known::Denied(Duration::from_nanos(lease.denied_until.saturating_sub(now).saturating_add(more)))
                }
                _ => Known::Nothing,
            }
        };
        outcomes.clear();
        let mut taken: SmallVec<[(Key, Gcra, u32); 12]> = SmallVec::new();
        let mut missing: SmallVec<[(Key, Gcra, u32); 12]> = SmallVec::new();
        for check in ask.checks {
            let first = known(&guards, check.key, &check.gcra, check.cost);
            let refused = match first {
                Known::Held => {
                    taken.push((check.key, check.gcra, check.cost));
                    outcomes.push(Outcome::Allowed);
                    continue;
                }
                // A shadow changes nothing, and so not that the rest is known.
                Known::Nothing if !up && !check.enforce && !check.exempt => {
                    outcomes.push(Outcome::Allowed);
                    continue;
                }
                Known::Nothing => {
                    missing.push((check.key, check.gcra, check.cost));
                    outcomes.push(Outcome::Allowed);
                    continue;
                }
                Known::Denied(wait) => Outcome::Refused(Some(wait)),
                Known::Never => Outcome::Refused(None),
            };
            let second = ask.second(check).map(|t| (t, known(&guards, t.key, &t.gcra, check.cost)));
            outcomes.push(match second {
                Some((second, Known::Held)) => {
                    taken.push((second.key, second.gcra, check.cost));
                    Outcome::ToppedUp
                }
                Some((second, Known::Nothing)) => {
                    missing.push((second.key, second.gcra, check.cost));
                    Outcome::ToppedUp
                }
                Some((_, Known::Denied(_) | Known::Never)) | None => refused,
            });
        }
        // What is known to be refused needs no answer for the rest.
        if !all_pass(ask.checks, outcomes) {
            return Tried::Decided(false);
        }
        if !missing.is_empty() && !up {
            return Tried::Waiting;
        }
        if !missing.is_empty() {
            return self.want(&mut guards, now, ask.partition, &missing);
        }
        if ask.charge {
            for (key, gcra, cost) in taken {
                let Some(lease) = shard_mut(&mut guards, key).and_then(|shard| shard.get_mut(&key)) else { continue };
                lease.cells = lease.cells.saturating_sub(cost);
                lease.used = now;
                let batch = self.batch(&gcra);
                if up && lease.cells < batch.div_ceil(2) && !lease.asked && lease.quiet_until <= now {
                    self.send(key, lease, batch, 1);
                }
            }
        }
        Tried::Decided(true)
    }

    fn want(&self, guards: &mut Guards<'_>, now: u64, partition: u64, missing: &[(Key, Gcra, u32)]) -> Tried {
        for (key, gcra, cost) in missing {
            let Some(shard) = shard_mut(guards, *key) else { return Tried::NoRoom };
            if shard.len() >= self.room && !shard.contains_key(key) {
                return Tried::NoRoom;
            }
            let lease = shard.entry(*key).or_insert(Lease {
                cells: 0,
                gcra: *gcra,
                partition,
                used: now,
                denied_until: 0,
                denied: 0,
                believed_until: 0,
                quiet_until: 0,
                asked: false,
            });
            lease.used = now;
            if !lease.asked {
                self.send(*key, lease, self.batch(gcra).max(*cost), *cost);
            }
        }
        Tried::Waiting
    }

    fn send(&self, key: Key, lease: &mut Lease, up_to: u32, need: u32) {
        lease.asked = true;
        let _ = self.wants.send(Want {
            key,
            gcra: lease.gcra,
            partition: lease.partition,
            cells: i64::from(up_to.saturating_sub(lease.cells)).max(1),
            need,
            held: lease.cells,
        });
    }

    /// What the store has answered: cells granted, and until when there are no more of them. None: it has not.
    fn answered(&self, want: &Want, sent: u64, answer: Option<(i64, i64)>) {
        let Some(mut shard) = self.shards.get(want.key.shard(SHARDS)).map(Mutex::lock) else { return };
        let Some(lease) = shard.get_mut(&want.key) else { return };
        lease.asked = false;
        let Some((granted, wait)) = answer else { return };
        lease.cells = lease.cells.saturating_add(u32::try_from(granted).unwrap_or(0));
        let pace = nanos(PACE);
        if granted < want.cells {
            lease.quiet_until = sent.saturating_add(pace);
        }
        if let Ok(wait @ 1..) = u64::try_from(wait) {
            lease.denied_until = sent.saturating_add(wait.saturating_mul(1000)).saturating_add(pace);
            lease.believed_until = lease.denied_until.min(sent.saturating_add(nanos(self.idle)));
            lease.denied = want.need;
        }
    }

    /// Forgets what was refused, and holds what it holds.
    pub(super) fn clear(&self) {
        self.shards.iter().for_each(|shard| shard.lock().values_mut().for_each(|lease| lease.believed_until = 0));
    }

    /// What has not been used for a while.
    fn idle(&self, now: u64) -> Vec<Want> {
        let idle = nanos(self.idle);
        let mut wants = vec![];
        for shard in &self.shards {
            shard.lock().retain(|key, lease| {
                let keep = lease.asked || now.saturating_sub(lease.used) < idle;
                if !keep && lease.cells > 0 {
                    wants.push(Want {
                        key: *key,
                        gcra: lease.gcra,
                        partition: lease.partition,
                        cells: -i64::from(std::mem::take(&mut lease.cells)),
                        need: 0,
                        held: 0,
                    });
                }
                keep || lease.believed_until > now
            });
        }
        wants
    }
}

fn shard<'a>(guards: &'a Guards<'_>, key: Key) -> Option<&'a HashMap<Key, Lease>> {
    let wanted = key.shard(SHARDS);
    guards.iter().find(|(i, _)| *i == wanted).map(|(_, shard)| &**shard)
}

fn shard_mut<'a>(guards: &'a mut Guards<'_>, key: Key) -> Option<&'a mut HashMap<Key, Lease>> {
    let wanted = key.shard(SHARDS);
    guards.iter_mut().find(|(i, _)| *i == wanted).map(|(_, shard)| &mut **shard)
}

/// Asks the store for what is wanted: all that is wanted at one time in one call.
pub(super) async fn negotiate(shared: Arc<Shared>, mut wants: UnboundedReceiver<Want>) {
    let mut together = Vec::with_capacity(TOGETHER);
    while wants.recv_many(&mut together, TOGETHER).await > 0 {
        // Keys of one call are in one slot.
        together.sort_unstable_by_key(|want: &Want| want.partition);
        while let Some(first) = together.first() {
            let partition = first.partition;
            let rest = together.split_off(together.partition_point(|want| want.partition == partition));
            let own = std::mem::replace(&mut together, rest);
            let shared = shared.clone();
            tokio::spawn(async move { shared.negotiate(own).await });
        }
    }
}

/// Gives back what nobody uses.
pub(super) async fn give_back(shared: Arc<Shared>) {
    let Some(leases) = &shared.leases else { return };
    loop {
        tokio::time::sleep(leases.idle / 4).await;
        for want in leases.idle(shared.clock.now()) {
            let _ = leases.wants.send(want);
        }
    }
}

impl Shared {
    async fn negotiate(&self, wants: Vec<Want>) {
        let Some(leases) = &self.leases else { return };
        let mut call = Call::new();
        for want in &wants {
            call.keys.push(self.name(want.key, want.partition));
            call.arg(format_args!("{:.12}", want.gcra.cell() / 1000.0));
            call.arg(window(&want.gcra));
            call.arg(want.cells);
            call.arg(want.need.saturating_sub(want.held));
        }
        let (sent, deadline) = (self.clock.now(), Instant::now() + self.remote.settings().timeout);
        let answers = self.remote.call(&self.lease, &call, deadline).await.unwrap_or_default();
        let (pairs, _) = answers.as_chunks::<2>();
        for (i, want) in wants.iter().enumerate().filter(|(_, want)| want.cells > 0) {
            leases.answered(want, sent, pairs.get(i).map(|[granted, wait]| (*granted, *wait)));
        }
        leases.answered.notify_waiters();
    }
}
