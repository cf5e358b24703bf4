//! Which tokens are spent. A token is taken in hand before its request goes on, and is then nobody else's: it is spent when
//! its request is on its way to the Delivery Service, and given back if it does not come so far.
//!
//! Where that is kept is the operator's choice: in this node's memory, bounded; in files too, which outlive the process; or
//! in the store of a fleet, which decides for all its nodes. The choice may change while tokens are taken: the memory stays the
//! same and knows what is in hand, other files begin with all that it knows, and a store that decided before is asked too for
//! tokens that may have been spent there. Files that have not all of it yet say so, and nobody begins with them.

mod journal;
mod memory;

use super::unix_now;
use crate::limiter::fleet::{Fleet, Gone};
use crate::problem::TokenProblem;
use journal::Journal;
use memory::{Change, Memory, Print, Prints};
use parking_lot::{Mutex, MutexGuard};
use privacypass::Nonce;
use prometheus::{IntCounter, IntGauge};
use siphasher::sip128::SipHasher24;
use smallvec::SmallVec;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// A fleet's nodes remember a token longer than any of their clocks takes it.
const MARGIN: Duration = Duration::from_secs(120);

/// Between looks whether an epoch needs its room.
const LOOK: Duration = Duration::from_secs(10);

/// No request waits longer until its token is written to a file.
const DISK: Duration = Duration::from_secs(1);

/// What holds while the fleet's store does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WithoutStore {
    /// No token is redeemed.
    #[default]
    Closed,
    /// This node decides by what it has seen: a token may be spent once on each.
    Local,
}

/// Where spent tokens are kept beside the memory.
#[derive(Debug)]
pub(super) enum Place {
    /// Nowhere.
    Memory,
    /// In files in a directory, whose names have a mark of what hashes are under. What was written is kept for so long at
    /// least, whatever the clock says.
    Files { dir: PathBuf, mark: [u8; 16], keep_for: Duration },
    /// In the store of a fleet, which decides.
    Fleet(Arc<Fleet>, WithoutStore),
}

/// The spent tokens, and those in hand.
#[derive(Debug)]
pub struct Spent {
    state: Mutex<State>,
    /// Files that were opened, as long as anybody has them. Held while tokens move elsewhere: one move at a time.
    opened: Mutex<Vec<Weak<Journal>>>,
    keys: (u64, u64),
    held: IntGauge,
}

#[derive(Debug)]
struct State {
    memory: Memory,
    places: Arc<Places>,
    /// How many are held is said of this one, and of no other.
    in_use: bool,
}

/// Where spent tokens are kept beside the memory, and were.
#[derive(Debug, Clone, Default)]
struct Places {
    journal: Option<Arc<Journal>>,
    store: Option<Store>,
    /// Stores that decided before, which are asked first.
    former: Vec<Former>,
    /// Those that came after. So who has a token in hand has all files that hold it.
    next: OnceLock<Arc<Places>>,
}

/// A store that decided before.
#[derive(Debug, Clone)]
struct Former {
    store: Store,
    /// The last epoch whose tokens may have been spent in it.
    until: u64,
    left: Instant,
}

/// The store of a fleet.
#[derive(Debug, Clone)]
struct Store {
    fleet: Arc<Fleet>,
    without: WithoutStore,
}

/// A token in hand: no other request can use it. Kept, it is spent; dropped, it may be used again.
#[derive(Debug)]
pub struct Reservation {
    spent: Arc<Spent>,
    /// Where spent tokens were kept when it was taken in hand.
    places: Arc<Places>,
    nonce: Nonce,
    epoch: u64,
    /// In this node's memory.
    here: bool,
    /// The files that it is in, or on its way to.
    written: SmallVec<[Arc<Journal>; 1]>,
    /// What stores know it by, once one was asked; and those that have it, or may.
    name: Option<u64>,
    claims: SmallVec<[Claim; 1]>,
    kept: bool,
    counter: Option<IntCounter>,
}

/// What a fleet's store has of a token in hand.
#[derive(Debug)]
struct Claim {
    fleet: Arc<Fleet>,
    /// It has said so; or it was asked, and has not answered.
    made: bool,
}

/// A token on its way back.
struct Back {
    print: Print,
    epoch: u64,
    /// It is in this node's memory, and so in all files that were used since it was taken in hand.
    here: bool,
    places: Arc<Places>,
    /// Where it is not, the files that it was written to.
    written: SmallVec<[Arc<Journal>; 1]>,
    /// Files that have it for given back, and how many copies had been made to them then.
    free: SmallVec<[(Weak<Journal>, u64); 2]>,
}

// === impl Places ===

impl Places {
    /// Those that come after these. Tokens of epochs up to `until` may have been spent in the store that decided so far.
    fn succeed(&self, journal: Option<Arc<Journal>>, store: Option<Store>, until: u64) -> Self {
        let decides = |of: &Store| store.as_ref().is_some_and(|now| now.fleet.shares_tokens_with(&of.fleet));
        let mut former = self.former.clone();
        former.extend(self.store.clone().map(|store| Former { store, until, left: Instant::now() }));
        former.retain(|of| !decides(&of.store));
        Self { journal, store, former, next: OnceLock::new() }
    }

    /// These, and those that came after.
    fn since(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |places| places.next.get().map(|next| &**next))
    }

    /// Stores in which a token of an epoch may be spent, in the order in which they are asked.
    fn stores(&self, epoch: u64) -> SmallVec<[Store; 2]> {
        let former = self.former.iter().filter(|of| epoch <= of.until).map(|of| &of.store);
        former.chain(&self.store).cloned().collect()
    }

    /// Whether no token of an epoch is taken without the stores: then they know all, and this node need not.
    fn decide_alone(&self, epoch: u64) -> bool {
        self.store.is_some() && self.stores(epoch).iter().all(|of| of.without == WithoutStore::Closed)
    }
}

// === impl State ===

impl State {
    /// Puts others in use. The answer is what was.
    fn exchange(&mut self, places: Places) -> Arc<Places> {
        let next = Arc::new(places);
        let before = std::mem::replace(&mut self.places, next.clone());
        // Nothing else does.
        let _ = before.next.set(next);
        before
    }

    /// Has stores asked no more in which no token can be that is still taken: by those that came; or, where none comes, when
    /// the clock says so and as much time has passed, for a clock may jump ahead. The answer is what is not needed any more.
    fn forget_former(&mut self, current: u64, epoch: Duration) -> Option<Arc<Places>> {
        let oldest = self.memory.oldest();
        // The one that it was left in, and two that it may be known in.
        let long_ago = |of: &Former| of.left.elapsed() >= epoch.saturating_mul(3);
        let is_over = |of: &Former| of.until < oldest || (of.until.saturating_add(1) < current && long_ago(of));
        if !self.places.former.iter().any(is_over) {
            return None;
        }
        let mut places = Places::clone(&self.places);
        places.former.retain(|of| !is_over(of));
        Some(self.exchange(places))
    }
}

// === impl Spent ===

impl Spent {
    /// Remembers at most `capacity` tokens; `held` says how many it does, once it is in use. Hashes are under `keys`.
    pub fn new(capacity: usize, keys: (u64, u64), held: IntGauge) -> Self {
        let state = State { memory: Memory::new(capacity), places: Arc::default(), in_use: false };
        Self { state: Mutex::new(state), opened: Mutex::default(), keys, held }
    }

    /// Keeps them in files in `dir` too, and begins with those that are there; `current` is the epoch now. `mark` tells
    /// files that are under other keys. What was written is kept for so long at least, whatever the clock says.
    ///
    /// # Errors
    /// What cannot be read or written; or others were being copied to them, and are not all there.
    pub fn with_files(self, dir: &Path, mark: [u8; 16], current: u64, keep_for: Duration) -> std::io::Result<Self> {
        self.begin_in(Place::Files { dir: dir.into(), mark, keep_for }, current)?;
        Ok(self)
    }

    /// It is in use from now on: how many it holds is said.
    pub(super) fn begin(&self) {
        let mut state = self.state.lock();
        state.in_use = true;
        self.say(&state);
    }

    /// It is in use no more. What is in hand is spent, or given back, all the same.
    pub(super) fn leave(&self) {
        let mut state = self.state.lock();
        state.in_use = false;
        self.held.set(0);
    }

    fn say(&self, state: &State) {
        if state.in_use {
            self.held.set(state.memory.len() as i64);
        }
    }

    /// Remembers at most so many from now on, and forgets none.
    pub(super) fn set_capacity(&self, capacity: usize) {
        self.state.lock().memory.set_capacity(capacity);
    }

    /// Keeps them here from the start on: nothing is known yet but what files have.
    ///
    /// # Errors
    /// What cannot be read or written; or others were being copied to the files, and are not all there.
    pub(super) fn begin_in(&self, place: Place, current: u64) -> std::io::Result<()> {
        self.put(place, current, true)
    }

    /// Keeps them elsewhere from now on; `current` is the epoch now. What is known stays known: other files begin with it, and
    /// it is joined by what they held. A store that has decided so far is asked as well for tokens of epochs that have begun, and
    /// of the next, which clocks may be ahead in. What is in hand is given back, or spent, wherever it is then.
    ///
    /// # Errors
    /// What cannot be read or written: then all is as it was, and other files say that they have not all of it.
    pub(super) fn move_to(&self, place: Place, current: u64) -> std::io::Result<()> {
        self.put(place, current, false)
    }

    fn put(&self, place: Place, current: u64, at_start: bool) -> std::io::Result<()> {
        let mut opened = self.opened.lock();
        opened.retain(|journal| journal.strong_count() > 0);
        let mut found = vec![];
        let (journal, store) = match place {
            Place::Memory => (None, None),
            Place::Fleet(fleet, without) => (None, Some(Store { fleet, without })),
            Place::Files { dir, mark, keep_for } => {
                // Those that were left may be had by a request still.
                let known = opened.iter().filter_map(Weak::upgrade).find(|journal| journal.is_in(&dir));
                let journal = match known {
                    Some(journal) => journal,
                    None => {
                        let oldest = current.saturating_sub(1);
                        let (journal, spent) = match at_start {
                            true => Journal::open(&dir, mark, oldest, keep_for)?,
                            false => Journal::open_to_copy(&dir, mark, oldest, keep_for)?,
                        };
                        found = spent;
                        let journal = Arc::new(journal);
                        opened.push(Arc::downgrade(&journal));
                        journal
                    }
                };
                (Some(journal), None)
            }
        };
        let before = self.places();
        let is_same = |of: &Arc<Journal>| before.journal.as_ref().is_some_and(|old| Arc::ptr_eq(old, of));
        let begins = store.as_ref().map(|store| store.fleet.clone());
        let begins = begins.filter(|of| before.store.as_ref().is_none_or(|old| !Arc::ptr_eq(&old.fleet, of)));
        let copied = journal.clone().filter(|of| !at_start && !is_same(of));
        let mut state = match &copied {
            Some(journal) => self.copied_to(journal, &found)?,
            None => self.state.lock(),
        };
        // From here on nothing fails.
        found.into_iter().for_each(|(epoch, prints)| state.memory.load(epoch, prints));
        let until = current.max(state.memory.latest()).saturating_add(1);
        let next = state.places.succeed(journal, store, until);
        let over = state.exchange(next);
        self.say(&state);
        drop(state);
        // Not while the lock is held.
        drop(over);
        if let Some(Err(e)) = copied.map(|journal| journal.sync()) {
            tracing::warn!("{e}: if the machine loses its power now, spent tokens may not all be there");
        }
        if let Some(fleet) = begins {
            fleet.warn_of_eviction();
        }
        Ok(())
    }

    /// Writes all that the memory knows, and these files lack, to them; `found` is what they hold. The answer is the state,
    /// locked, of which nothing is left to write; what was copied is on the disk. Until then they are marked as not all there.
    fn copied_to(&self, journal: &Journal, found: &[(u64, Prints)]) -> std::io::Result<MutexGuard<'_, State>> {
        journal.begin_copy()?;
        let is_found = |epoch: u64, print: Print| found.iter().any(|(of, held)| *of == epoch && held.contains(&print));
        let (known, oldest) = {
            let mut state = self.state.lock();
            (state.memory.begin_copy(), state.memory.oldest())
        };
        let mut written = known.into_iter().try_for_each(|(epoch, mut prints)| {
            prints.retain(|print| !is_found(epoch, *print));
            journal.write_all(&prints, epoch, oldest, true)
        });
        let mut synced = false;
        loop {
            let mut state = self.state.lock();
            let mut changes = state.memory.changes();
            if written.is_err() || (synced && changes.is_empty()) {
                state.memory.end_copy();
                return written.and_then(|()| journal.copied()).map(|()| state);
            }
            // Tokens go on being taken meanwhile: fewer each time, for this takes less and less long.
            drop(state);
            // What they held is spent, also where a request gives it back that has it in hand.
            changes.retain(|change| change.taken || !is_found(change.epoch, change.print));
            written = write_changes(journal, &changes, oldest);
            if !std::mem::replace(&mut synced, true) {
                written = written.and_then(|()| journal.sync());
            }
        }
    }

    fn places(&self) -> Arc<Places> {
        self.state.lock().places.clone()
    }

    fn print(&self, nonce: &Nonce) -> Print {
        SipHasher24::new_with_keys(self.keys.0, self.keys.1).hash(nonce).as_u128()
    }

    /// Why a token cannot be redeemed, if it is known here: it is spent or in hand, or will be given back.
    pub fn problem(&self, nonce: &Nonce) -> Option<TokenProblem> {
        let print = self.print(nonce);
        self.state.lock().memory.problem(print)
    }

    /// Makes room for tokens of the epochs that are accepted at a time since the Unix epoch, and of the next. It takes
    /// milliseconds, once an epoch. Stores that were asked for tokens of epochs that are over are let go, also where no token has
    /// come since.
    pub fn make_room(&self, epoch: Duration, now: Duration) {
        let current = (now.as_nanos() / epoch.as_nanos().max(1)) as u64;
        let (lack, capacity, former) = {
            let mut state = self.state.lock();
            let (lack, capacity) = state.memory.lack_room([current.saturating_sub(1), current, current + 1]);
            (lack, capacity, state.forget_former(current, epoch))
        };
        // Without, it grows as it is used.
        let rooms: SmallVec<[_; 3]> =
            lack.into_iter().filter_map(|of| Some((of, Memory::room(capacity).ok()?))).collect();
        let over = self.state.lock().memory.make_room(rooms);
        // Not while the lock is held.
        drop((over, former));
    }

    /// Makes room in time, on a thread of its own, for as long as `this` is used.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn keep_room(this: &Arc<Self>, epoch: Duration) -> std::io::Result<()> {
        this.make_room(epoch, unix_now());
        let spent = Arc::downgrade(this);
        std::thread::Builder::new().name("spent-room".into()).spawn(move || {
            loop {
                std::thread::sleep((epoch / 4).min(LOOK));
                let Some(spent) = spent.upgrade() else { return };
                spent.make_room(epoch, unix_now());
            }
        })?;
        Ok(())
    }

    /// Waits, for a second each at most, until all that was given back is so where it is kept, and was.
    pub fn settle(&self) {
        let places = self.places();
        let is_in_use = |of: &Arc<Journal>| places.journal.as_ref().is_some_and(|now| Arc::ptr_eq(now, of));
        let mut journals: Vec<_> = match self.opened.try_lock_for(DISK) {
            Some(opened) => opened.iter().filter_map(Weak::upgrade).filter(|of| !is_in_use(of)).collect(),
            None => vec![],
        };
        journals.extend(places.journal.clone());
        // What is given back in one of them goes to the next then. Who does not answer is not asked again.
        for _ in 0..journals.len() {
            journals.retain(|journal| journal.settle(DISK));
        }
        for store in places.stores(0) {
            store.fleet.settle(DISK);
        }
    }

    /// Takes a token of `epoch` in hand on this node; `current` is the epoch now.
    ///
    /// # Errors
    /// [`TokenProblem::Spent`], [`TokenProblem::StoreUnavailable`] (it is on its way back), [`TokenProblem::StoreFull`],
    /// [`TokenProblem::Expired`].
    pub fn reserve(this: &Arc<Self>, nonce: Nonce, epoch: u64, current: u64) -> Result<Reservation, TokenProblem> {
        let print = this.print(&nonce);
        let (taken, places) = {
            let mut state = this.state.lock();
            let taken = state.memory.insert(print, epoch, current);
            this.say(&state);
            (taken, state.places.clone())
        };
        let here = match taken {
            Ok(()) => true,
            // The fleet's store knows more than this node has room for, and without it no token is taken.
            Err(TokenProblem::StoreFull) if places.decide_alone(epoch) => false,
            Err(problem) => return Err(problem),
        };
        Ok(Reservation {
            spent: this.clone(),
            places,
            nonce,
            epoch,
            here,
            written: SmallVec::new(),
            name: None,
            claims: SmallVec::new(),
            kept: false,
            counter: None,
        })
    }

    /// Gives a token back on this node, in files first: or another request that takes it in hand could write before.
    fn give_back(this: &Arc<Self>, mut back: Back) {
        let (journal, copies, oldest) = {
            let mut state = this.state.lock();
            let journal = match back.here {
                // Files that tokens were moved to since have it for spent.
                true if state.memory.stays(back.print, back.epoch) => return,
                true => back.left(),
                false => back.written.pop(),
            };
            let Some(journal) = journal else {
                if back.here {
                    state.memory.remove(back.print, back.epoch);
                    this.say(&state);
                }
                return;
            };
            if back.here {
                state.memory.returning(back.print);
            }
            let copies = journal.copies();
            (journal, copies, state.memory.oldest())
        };
        back.free.push((Arc::downgrade(&journal), copies));
        let (print, epoch, spent) = (back.print, back.epoch, Arc::downgrade(this));
        journal.write(print, epoch, oldest, false, move |written| {
            if let Err(e) = written {
                tracing::error!("a token that was given back is spent after a restart: {e}");
            }
            if let Some(spent) = spent.upgrade() {
                Self::give_back(&spent, back);
            }
        });
    }
}

/// Writes what has changed, in its order.
fn write_changes(journal: &Journal, changes: &[Change], oldest: u64) -> std::io::Result<()> {
    for same in changes.chunk_by(|one, next| (one.epoch, one.taken) == (next.epoch, next.taken)) {
        let Some(first) = same.first() else { continue };
        let prints: Vec<_> = same.iter().map(|change| change.print).collect();
        journal.write_all(&prints, first.epoch, oldest, first.taken)?;
    }
    Ok(())
}

// === impl Back ===

impl Back {
    /// Files that may have it for spent yet: also those to which it was copied after they had it for given back.
    fn left(&self) -> Option<Arc<Journal>> {
        let is_free = |of: &Arc<Journal>| {
            let of = (Arc::as_ptr(of), of.copies());
            self.free.iter().any(|(free, copies)| (free.as_ptr(), *copies) == of)
        };
        self.places.since().filter_map(|places| places.journal.as_ref()).find(|of| !is_free(of)).cloned()
    }
}

// === impl Reservation ===

impl Reservation {
    /// Takes the token in hand for whoever else is to know of it: the files, or the whole fleet, where it is to be remembered
    /// for so long.
    ///
    /// # Errors
    /// [`TokenProblem::Spent`]: another node has it; [`TokenProblem::StoreUnavailable`], [`TokenProblem::StoreFull`].
    pub async fn claim(mut self, remember: Duration) -> Result<Self, TokenProblem> {
        let mut places = self.places.clone();
        loop {
            for store in places.stores(self.epoch) {
                self.ask(&store, remember).await?;
            }
            if let Some(journal) = &places.journal {
                self.write(journal).await?;
            }
            // Who takes it where tokens have been moved to meanwhile is to know of it, too.
            let now = self.spent.places();
            if Arc::ptr_eq(&places, &now) {
                return Ok(self);
            }
            // What other files held this node knows by now, though it had no room for this one.
            if !self.here && self.spent.problem(&self.nonce).is_some() {
                return Err(TokenProblem::Spent);
            }
            places = now;
        }
    }

    async fn write(&mut self, journal: &Arc<Journal>) -> Result<(), TokenProblem> {
        if self.written.iter().any(|of| Arc::ptr_eq(of, journal)) {
            return Ok(());
        }
        let (told, written) = oneshot::channel();
        let oldest = self.spent.state.lock().memory.oldest();
        // Noted before: who goes away meanwhile, or will not wait, gives it back all the same.
        self.written.push(journal.clone());
        journal.write(self.spent.print(&self.nonce), self.epoch, oldest, true, |result| drop(told.send(result)));
        match tokio::time::timeout(DISK, written).await {
            Ok(Ok(Ok(()))) => Ok(()),
            other => {
                let why = match other {
                    Ok(Ok(Err(e))) => e.to_string(),
                    _ => "the disk does not answer".into(),
                };
                tracing::error!("a token is not redeemed: {why}");
                Err(TokenProblem::StoreUnavailable)
            }
        }
    }

    async fn ask(&mut self, store: &Store, remember: Duration) -> Result<(), TokenProblem> {
        if self.claims.iter().any(|claim| Arc::ptr_eq(&claim.fleet, &store.fleet)) {
            return Ok(());
        }
        // This node would have to remember it, for the time in which the store does not answer, and has no room.
        if !self.here && store.without == WithoutStore::Local {
            return Err(TokenProblem::StoreFull);
        }
        // The same for all: two of them may be one that has two names.
        let Some(name) = self.name.or_else(|| crate::config::random().map(u64::from_be_bytes)) else {
            return Err(TokenProblem::StoreUnavailable);
        };
        self.name = Some(name);
        // Noted before it is asked: who goes away while the store decides gives it back all the same.
        self.claims.push(Claim { fleet: store.fleet.clone(), made: false });
        let answer = store.fleet.spend(&self.nonce, name, remember + MARGIN).await;
        match answer {
            Ok(true) => {
                self.claims.iter_mut().for_each(|claim| claim.made |= Arc::ptr_eq(&claim.fleet, &store.fleet));
                Ok(())
            }
            Ok(false) => {
                // Another node has it. It may yet give it back, so it is not for this one to remember.
                self.claims.pop();
                Err(TokenProblem::Spent)
            }
            Err(Gone { asked }) => {
                if !asked {
                    self.claims.pop();
                }
                match store.without {
                    WithoutStore::Local => Ok(()),
                    WithoutStore::Closed => Err(TokenProblem::StoreUnavailable),
                }
            }
        }
    }

    /// Counts it, once it is spent.
    pub fn counted_by(mut self, counter: &IntCounter) -> Self {
        self.counter = Some(counter.clone());
        self
    }

    /// Spends the token: what happens to its request from now on, the Delivery Service may have begun to process it.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    /// The Delivery Service says that it has left the request untouched: if no other will have it, the token is given back.
    pub fn unkeep(&mut self) {
        self.kept = false;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.kept {
            self.counter.iter().for_each(IntCounter::inc);
            return;
        }
        let print = self.spent.print(&self.nonce);
        // Files that tokens were moved to meanwhile have it for spent: so it is wherever it was asked for.
        if self.here && self.spent.state.lock().memory.stays(print, self.epoch) {
            return;
        }
        // The one that was asked first decides, and hears of it last.
        for claim in self.claims.iter().rev() {
            self.name.iter().for_each(|name| claim.fleet.unspend(&self.nonce, *name, claim.made));
        }
        let back = Back {
            print,
            epoch: self.epoch,
            here: self.here,
            places: self.places.clone(),
            written: std::mem::take(&mut self.written),
            free: SmallVec::new(),
        };
        Spent::give_back(&self.spent, back);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limiter::fleet::{Mode, Settings};

    fn spent(capacity: usize) -> Spent {
        let spent = Spent::new(capacity, (1, 2), IntGauge::new("spent", "spent").unwrap());
        spent.begin();
        spent
    }

    #[test]
    fn kept_or_given_back() {
        let spent = Arc::new(spent(10));
        let mut first = Spent::reserve(&spent, [1; 32], 5, 5).unwrap();
        assert_eq!(Spent::reserve(&spent, [1; 32], 5, 5).unwrap_err(), TokenProblem::Spent, "in hand");
        first.keep();
        first.unkeep();
        drop(first);
        assert_eq!(spent.held.get(), 0);
        Spent::reserve(&spent, [1; 32], 5, 5).unwrap().keep();
        assert_eq!(spent.problem(&[1; 32]), Some(TokenProblem::Spent));
        assert_eq!((Spent::reserve(&spent, [1; 32], 5, 6).unwrap_err(), spent.held.get()), (TokenProblem::Spent, 1));
    }

    #[test]
    fn of_many_at_once_one_wins() {
        let spent = Arc::new(spent(10));
        let won = std::thread::scope(|scope| {
            let win = || Spent::reserve(&spent, [9; 32], 1, 1).map(|mut token| token.keep()).is_ok();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(win)).collect();
            threads.into_iter().map(|t| usize::from(t.join().unwrap())).sum::<usize>()
        });
        assert_eq!(won, 1);
    }

    #[tokio::test]
    async fn files_outlive_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Arc::new(spent(3).with_files(dir.path(), [3; 16], 5, Duration::ZERO).unwrap());
        let first = open();
        let take = async |of: &Arc<Spent>, nonce, epoch| {
            Spent::reserve(of, [nonce; 32], epoch, 5).unwrap().claim(Duration::from_secs(1)).await.unwrap()
        };
        take(&first, 1, 5).await.keep();
        take(&first, 2, 4).await.keep();
        drop(take(&first, 3, 5).await);
        while first.problem(&[3; 32]).is_some() {
            tokio::task::yield_now().await;
        }
        drop(first);
        let again = open();
        assert_eq!(again.held.get(), 2);
        assert_eq!(Spent::reserve(&again, [1; 32], 5, 5).unwrap_err(), TokenProblem::Spent);
        assert_eq!(Spent::reserve(&again, [2; 32], 4, 5).unwrap_err(), TokenProblem::Spent);
        take(&again, 3, 5).await.keep();
        drop(again);
        let smaller = Arc::new(spent(1).with_files(dir.path(), [3; 16], 5, Duration::ZERO).unwrap());
        assert_eq!(smaller.held.get(), 3, "more than there is room for now");
        assert_eq!(Spent::reserve(&smaller, [4; 32], 5, 5).unwrap_err(), TokenProblem::StoreFull);
        assert_eq!(Spent::reserve(&smaller, [3; 32], 5, 5).unwrap_err(), TokenProblem::Spent);
    }

    async fn take(of: &Arc<Spent>, nonce: u8) -> Reservation {
        Spent::reserve(of, [nonce; 32], 5, 5).unwrap().claim(Duration::from_secs(1)).await.unwrap()
    }

    fn files(dir: &tempfile::TempDir) -> Place {
        Place::Files { dir: dir.path().into(), mark: [3; 16], keep_for: Duration::ZERO }
    }

    async fn until_free(of: &Spent, nonce: u8) {
        while let Some(problem) = of.problem(&[nonce; 32]) {
            assert_eq!(problem, TokenProblem::StoreUnavailable, "{nonce} is not spent");
            tokio::task::yield_now().await;
        }
    }

    /// Which of these are spent after a restart.
    fn read(dir: &tempfile::TempDir, nonces: impl IntoIterator<Item = u8>) -> Vec<u8> {
        let read = spent(10).with_files(dir.path(), [3; 16], 5, Duration::ZERO).unwrap();
        nonces.into_iter().filter(|nonce| read.problem(&[*nonce; 32]).is_some()).collect()
    }

    #[tokio::test]
    async fn other_files_begin_with_all_that_is_known() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let of = Arc::new(spent(20));
        take(&of, 1).await.keep();
        let (mut kept, back) = (take(&of, 2).await, take(&of, 3).await);
        of.move_to(files(&one), 5).unwrap();
        take(&of, 4).await.keep();
        let (mut kept_later, back_later) = (take(&of, 5).await, take(&of, 6).await);
        let same = of.places();
        of.move_to(files(&one), 5).unwrap();
        assert!(Arc::ptr_eq(same.journal.as_ref().unwrap(), of.places().journal.as_ref().unwrap()));
        drop(same);
        of.move_to(files(&two), 5).unwrap();
        take(&of, 7).await.keep();
        for nonce in 1..=7 {
            assert_eq!(Spent::reserve(&of, [nonce; 32], 5, 5).unwrap_err(), TokenProblem::Spent, "{nonce}, or in hand");
        }
        kept.keep();
        kept_later.keep();
        drop((kept, back, kept_later, back_later));
        until_free(&of, 3).await;
        until_free(&of, 6).await;
        assert_eq!(of.held.get(), 5);
        drop(of);
        assert_eq!(read(&two, 1..=8), [1, 2, 4, 5, 7]);
        assert_eq!(read(&one, 1..=8), [1, 2, 4, 5], "and what was given back is so where it was in hand");
    }

    #[tokio::test]
    async fn what_other_files_held_is_spent() {
        let dir = tempfile::tempdir().unwrap();
        let before = Arc::new(spent(10).with_files(dir.path(), [3; 16], 5, Duration::ZERO).unwrap());
        take(&before, 1).await.keep();
        take(&before, 2).await.keep();
        drop(before);
        let of = Arc::new(spent(10));
        take(&of, 2).await.keep();
        take(&of, 3).await.keep();
        of.move_to(files(&dir), 5).unwrap();
        assert_eq!(of.held.get(), 3);
        assert_eq!(Spent::reserve(&of, [1; 32], 5, 5).unwrap_err(), TokenProblem::Spent);
        // Into memory alone, where they stay.
        of.move_to(Place::Memory, 5).unwrap();
        assert_eq!(Spent::reserve(&of, [1; 32], 5, 5).unwrap_err(), TokenProblem::Spent);
        take(&of, 4).await.keep();
        drop(of);
        assert_eq!(read(&dir, 1..=4), [1, 2, 3]);
    }

    #[tokio::test]
    async fn files_that_a_request_has_still_are_the_same_when_they_come_back() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let of = Arc::new(spent(10));
        of.move_to(files(&one), 5).unwrap();
        let (back, mut kept) = (take(&of, 1).await, take(&of, 2).await);
        let began = std::time::Instant::now();
        of.move_to(files(&two), 5).unwrap();
        take(&of, 3).await.keep();
        of.move_to(files(&one), 5).unwrap();
        assert!(began.elapsed() < Duration::from_secs(1), "nobody was waited for");
        kept.keep();
        drop((back, kept));
        until_free(&of, 1).await;
        drop(of);
        assert_eq!((read(&one, 1..=3), read(&two, 1..=3)), (vec![2, 3], vec![2, 3]));
    }

    #[tokio::test]
    async fn a_place_that_is_not_to_be_had_changes_nothing() {
        let (one, not) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let of = Arc::new(spent(10));
        of.move_to(files(&one), 5).unwrap();
        std::fs::write(not.path().join("file"), "").unwrap();
        let place = Place::Files { dir: not.path().join("file"), mark: [3; 16], keep_for: Duration::ZERO };
        assert!(of.move_to(place, 5).unwrap_err().to_string().contains("file"));
        // What is of no use is found while it is read.
        std::fs::write(not.path().join("spent-0303030303030303-5-0"), "what is none of ours").unwrap();
        assert!(of.move_to(files(&not), 5).unwrap_err().to_string().contains("no file of spent tokens"));
        take(&of, 1).await.keep();
        drop(take(&of, 2).await);
        until_free(&of, 2).await;
        drop(of);
        assert_eq!(read(&one, 1..=2), [1]);
    }

    #[tokio::test]
    async fn what_other_files_held_stays_spent_where_a_request_gives_it_back() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let before = Arc::new(spent(10).with_files(one.path(), [3; 16], 5, Duration::ZERO).unwrap());
        for nonce in 1..=3 {
            take(&before, nonce).await.keep();
        }
        drop(before);
        let of = Arc::new(spent(10));
        of.move_to(files(&two), 5).unwrap();
        let (first, second) = (take(&of, 1).await, take(&of, 2).await);
        of.move_to(files(&one), 5).unwrap();
        drop(first);
        of.move_to(Place::Memory, 5).unwrap();
        drop(second);
        assert!((1..=3).all(|nonce| of.problem(&[nonce; 32]) == Some(TokenProblem::Spent)));
        assert_eq!(of.held.get(), 3);
        drop(of);
        assert_eq!(read(&one, 1..=3), [1, 2, 3]);
    }

    #[tokio::test]
    async fn what_is_copied_after_it_was_given_back_is_given_back_again() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let of = Arc::new(spent(10));
        of.move_to(files(&one), 5).unwrap();
        let mut token = take(&of, 1).await;
        of.move_to(files(&two), 5).unwrap();
        // The first files have it for given back, and then again for spent.
        let (print, places) = (of.print(&[1; 32]), token.places.clone());
        let first = places.journal.clone().unwrap();
        let free: SmallVec<[_; 2]> = [(Arc::downgrade(&first), first.copies())].into_iter().collect();
        first.write(print, 5, 4, false, drop);
        of.move_to(files(&one), 5).unwrap();
        token.keep();
        drop((token, first));
        Spent::give_back(&of, Back { print, epoch: 5, here: true, places, written: SmallVec::new(), free });
        until_free(&of, 1).await;
        drop(of);
        assert_eq!((read(&one, [1]), read(&two, [1])), (vec![], vec![]));
    }

    #[tokio::test]
    async fn files_to_which_not_all_could_be_copied_are_not_begun_with() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let of = Arc::new(spent(10));
        of.move_to(files(&two), 5).unwrap();
        let mut first = take(&of, 1).await;
        of.move_to(files(&one), 5).unwrap();
        take(&of, 2).await.keep();
        // The name of the file that is written next is taken.
        let taken = two.path().join("spent-0303030303030303-5-1");
        std::fs::create_dir(&taken).unwrap();
        assert!(of.move_to(files(&two), 5).unwrap_err().to_string().contains("-5-1: "));
        take(&of, 3).await.keep();
        first.keep();
        drop(first);
        let begun = spent(10).with_files(two.path(), [3; 16], 5, Duration::ZERO);
        assert!(begun.unwrap_err().to_string().contains("not all there"));
        std::fs::remove_dir(&taken).unwrap();
        of.move_to(files(&two), 5).unwrap();
        take(&of, 4).await.keep();
        assert!(!two.path().join("spent-0303030303030303-unfinished").exists());
        of.settle();
        drop(of);
        assert_eq!((read(&one, 1..=5), read(&two, 1..=5)), (vec![1, 2, 3], vec![1, 2, 3, 4]));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn moves_while_tokens_are_taken_lose_none() {
        fn nonce(worker: u8, n: u32) -> Nonce {
            let mut nonce = [worker; 32];
            nonce[..4].copy_from_slice(&n.to_be_bytes());
            nonce
        }
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let of = Arc::new(spent(100_000));
        let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                let (of, over) = (of.clone(), over.clone());
                tokio::spawn(async move {
                    let mut n = 0u32;
                    while !over.load(std::sync::atomic::Ordering::Relaxed) {
                        let token = Spent::reserve(&of, nonce(worker, n), 5, 5).unwrap();
                        let mut token = token.claim(Duration::from_secs(1)).await.unwrap();
                        tokio::time::sleep(Duration::from_micros(200)).await;
                        if !n.is_multiple_of(3) {
                            token.keep();
                        }
                        n += 1;
                    }
                    n
                })
            })
            .collect();
        for n in 0..20 {
            let place = match n % 4 {
                0 => Place::Memory,
                2 => files(&two),
                _ => files(&one),
            };
            let of = of.clone();
            tokio::task::spawn_blocking(move || of.move_to(place, 5).unwrap()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        let mut taken = vec![];
        for worker in workers {
            taken.push(worker.await.unwrap());
        }
        let all = || (0..4u8).zip(&taken).flat_map(|(worker, n)| (0..*n).map(move |n| (n, nonce(worker, n))));
        assert!(taken.iter().all(|n| *n > 5), "{taken:?}");
        for (_, nonce) in all().filter(|(n, _)| n % 3 == 0) {
            while of.problem(&nonce).is_some() {
                tokio::task::yield_now().await;
            }
        }
        drop(of);
        let read = spent(100_000).with_files(one.path(), [3; 16], 5, Duration::ZERO).unwrap();
        for (n, nonce) in all() {
            assert_eq!(read.problem(&nonce).is_some(), n % 3 != 0, "{n} of {taken:?}");
        }
    }

    #[test]
    fn only_the_one_in_use_says_how_many_it_holds() {
        let held = IntGauge::new("spent", "spent").unwrap();
        let of = || Arc::new(Spent::new(10, (1, 2), held.clone()));
        let (one, two) = (of(), of());
        let take = |of: &Arc<Spent>, nonce| Spent::reserve(of, [nonce; 32], 5, 5).unwrap();
        one.begin();
        let back = take(&one, 1);
        take(&one, 2).keep();
        take(&two, 1).keep();
        assert_eq!(held.get(), 2);
        one.leave();
        assert_eq!(held.get(), 0);
        two.begin();
        drop(back);
        assert_eq!(held.get(), 1);
        two.leave();
        one.begin();
        assert_eq!(held.get(), 1);
    }

    #[test]
    fn another_number_of_tokens() {
        let of = Arc::new(spent(1));
        Spent::reserve(&of, [1; 32], 5, 5).unwrap().keep();
        assert_eq!(Spent::reserve(&of, [2; 32], 5, 5).unwrap_err(), TokenProblem::StoreFull);
        of.set_capacity(2);
        Spent::reserve(&of, [2; 32], 5, 5).unwrap().keep();
        of.set_capacity(1);
        assert_eq!(Spent::reserve(&of, [3; 32], 5, 5).unwrap_err(), TokenProblem::StoreFull);
        assert_eq!(Spent::reserve(&of, [1; 32], 5, 5).unwrap_err(), TokenProblem::Spent);
    }

    /// A store that nobody is.
    fn nobody(prefix: &str) -> Arc<Fleet> {
        let settings = Settings {
            nodes: vec![("127.0.0.1".into(), 1)],
            cluster: false,
            tls: None,
            username: None,
            password: None,
            prefix: prefix.into(),
            partition_by_provider: false,
            timeout: Duration::from_millis(50),
            connections: 1,
            mode: Mode::TokensOnly,
            keys: 16,
        };
        let metrics = crate::telemetry::Metrics::new(&[]).unwrap().store().unwrap();
        Arc::new(Fleet::start(settings, metrics).unwrap())
    }

    #[tokio::test]
    async fn a_store_of_before_is_asked_for_as_long_as_tokens_may_be_spent_in_it() {
        let of = Arc::new(spent(10));
        let spend = async |nonce: u8, epoch: u64| {
            let token = Spent::reserve(&of, [nonce; 32], epoch, epoch)?;
            token.claim(Duration::from_secs(1)).await?.keep();
            Ok::<_, TokenProblem>(())
        };
        let unavailable = Err(TokenProblem::StoreUnavailable);
        let first = nobody("first");
        let gone = Arc::downgrade(&first);
        of.move_to(Place::Fleet(first, WithoutStore::Closed), 5).unwrap();
        assert_eq!(spend(1, 5).await, unavailable);
        of.move_to(Place::Memory, 5).unwrap();
        assert_eq!((spend(1, 5).await, spend(2, 6).await), (unavailable, unavailable), "it may know them");
        assert_eq!(spend(3, 7).await, Ok(()), "it cannot");
        let second = Duration::from_secs(1);
        of.make_room(second, 7 * second);
        assert!(gone.upgrade().is_some(), "tokens of epoch 6 are still taken");
        assert_eq!(spend(4, 8).await, Ok(()));
        of.make_room(second, 8 * second);
        assert!(gone.upgrade().is_none());

        of.move_to(Place::Fleet(nobody("second"), WithoutStore::Local), 8).unwrap();
        assert_eq!(spend(5, 8).await, Ok(()));
        // By other settings it is the same store.
        of.move_to(Place::Fleet(nobody("second"), WithoutStore::Closed), 8).unwrap();
        assert!(of.places().former.is_empty());
        assert_eq!(spend(6, 8).await, unavailable);
        of.move_to(Place::Fleet(nobody("third"), WithoutStore::Local), 8).unwrap();
        of.move_to(Place::Fleet(nobody("fourth"), WithoutStore::Local), 10).unwrap();
        assert_eq!(of.places().former.iter().map(|of| of.until).collect::<Vec<_>>(), [9, 11]);
        assert_eq!((spend(6, 9).await, spend(7, 10).await), (unavailable, Ok(())));
        of.move_to(Place::Fleet(nobody("second"), WithoutStore::Local), 10).unwrap();
        assert_eq!(of.places().former.iter().map(|of| of.until).collect::<Vec<_>>(), [11, 11]);
        assert_eq!(Spent::reserve(&of, [7; 32], 10, 10).unwrap_err(), TokenProblem::Spent, "wherever it was");
    }
    #[tokio::test]
    async fn a_store_of_before_is_let_go_by_the_clock_where_no_token_comes() {
        let of = spent(10);
        let store = nobody("former");
        let gone = Arc::downgrade(&store);
        of.move_to(Place::Fleet(store, WithoutStore::Closed), 5).unwrap();
        of.move_to(Place::Memory, 5).unwrap();
        let (second, milli) = (Duration::from_secs(1), Duration::from_millis(1));
        of.make_room(second, 99 * second);
        assert!(gone.upgrade().is_some(), "the clock has jumped");
        std::thread::sleep(5 * milli);
        of.make_room(milli, 7 * milli);
        assert!(gone.upgrade().is_some(), "tokens of epoch 6 are still taken");
        of.make_room(milli, 8 * milli);
        assert!(gone.upgrade().is_none());
    }

    #[tokio::test]
    async fn without_room_a_token_is_taken_only_where_the_stores_decide_alone() {
        let of = Arc::new(spent(1));
        of.move_to(Place::Fleet(nobody("one"), WithoutStore::Local), 5).unwrap();
        Spent::reserve(&of, [1; 32], 5, 5).unwrap().keep();
        let full = TokenProblem::StoreFull;
        assert_eq!(Spent::reserve(&of, [2; 32], 5, 5).unwrap_err(), full, "it would have to be remembered");
        of.move_to(Place::Fleet(nobody("two"), WithoutStore::Closed), 5).unwrap();
        assert_eq!(Spent::reserve(&of, [2; 32], 5, 5).unwrap_err(), full, "the one before is asked yet");
        Spent::reserve(&of, [3; 32], 7, 7).unwrap().keep();
        assert!(!Spent::reserve(&of, [2; 32], 7, 7).unwrap().here);
    }
}
