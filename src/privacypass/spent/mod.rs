//! Which tokens are spent. A token is taken in hand before its request goes on, and is then nobody else's: it is spent when
//! its request is on its way to the Delivery Service, and given back if it does not come so far.
//!
//! Where that is kept is the operator's choice: in this node's memory, bounded; in files too, which outlive the process; or
//! in the store of a fleet, which decides for all its nodes.

mod journal;
mod memory;

use super::unix_now;
use crate::limiter::fleet::{Fleet, Gone};
use crate::problem::TokenProblem;
use journal::Journal;
use memory::{Memory, Print};
use parking_lot::Mutex;
use privacypass::Nonce;
use prometheus::{IntCounter, IntGauge};
use siphasher::sip128::SipHasher24;
use smallvec::SmallVec;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
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

/// The spent tokens, and those in hand.
#[derive(Debug)]
pub struct Spent {
    memory: Mutex<Memory>,
    journal: Option<Journal>,
    fleet: Option<(Arc<Fleet>, WithoutStore)>,
    keys: (u64, u64),
    held: IntGauge,
}

/// A token in hand: no other request can use it. Kept, it is spent; dropped, it may be used again.
#[derive(Debug)]
pub struct Reservation {
    spent: Arc<Spent>,
    nonce: Nonce,
    epoch: u64,
    /// In this node's memory.
    here: bool,
    /// In this node's files, or on its way there.
    written: bool,
    claim: Claim,
    kept: bool,
    counter: Option<IntCounter>,
}

/// What a fleet's store has of a token in hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Claim {
    None,
    /// It has been asked for this, and has not answered.
    Asked(u64),
    Made(u64),
}

impl Spent {
    /// Remembers at most `capacity` tokens; `held` says how many it does. Hashes are under `keys`.
    pub fn new(capacity: usize, keys: (u64, u64), held: IntGauge) -> Self {
        Self { memory: Mutex::new(Memory::new(capacity)), journal: None, fleet: None, keys, held }
    }

    /// Keeps them in files in `dir` too, and begins with those that are there; `current` is the epoch now. `mark` tells
    /// files that are under other keys. What was written is kept for so long at least, whatever the clock says.
    ///
    /// # Errors
    /// What cannot be read or written.
    pub fn with_files(mut self, dir: &Path, mark: [u8; 16], current: u64, keep_for: Duration) -> std::io::Result<Self> {
        let (journal, spent) = Journal::open(dir, mark, current.saturating_sub(1), keep_for)?;
        let memory = self.memory.get_mut();
        spent.into_iter().for_each(|(epoch, prints)| memory.load(epoch, prints));
        self.held.set(memory.len() as i64);
        self.journal = Some(journal);
        Ok(self)
    }

    /// Whether a fleet's store decides.
    pub fn is_of_a_fleet(&self) -> bool {
        self.fleet.is_some()
    }

    /// Has a fleet's store decide.
    pub fn with_fleet(mut self, fleet: Arc<Fleet>, without: WithoutStore) -> Self {
        self.fleet = Some((fleet, without));
        self
    }

    fn print(&self, nonce: &Nonce) -> Print {
        SipHasher24::new_with_keys(self.keys.0, self.keys.1).hash(nonce).as_u128()
    }

    /// Why a token cannot be redeemed, if it is known here: it is spent or in hand, or will be given back.
    pub fn problem(&self, nonce: &Nonce) -> Option<TokenProblem> {
        let print = self.print(nonce);
        self.memory.lock().problem(print)
    }

    /// Makes room for tokens of the epochs that are accepted at a time since the Unix epoch, and of the next. It takes
    /// milliseconds, once an epoch.
    pub fn make_room(&self, epoch: Duration, now: Duration) {
        let current = (now.as_nanos() / epoch.as_nanos().max(1)) as u64;
        let (lack, capacity) = self.memory.lock().lack_room([current.saturating_sub(1), current, current + 1]);
        // Without, it grows as it is used.
        let rooms: SmallVec<[_; 3]> =
            lack.into_iter().filter_map(|of| Some((of, Memory::room(capacity).ok()?))).collect();
        let over = self.memory.lock().make_room(rooms);
        // Not while the lock is held.
        drop(over);
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

    /// Waits, for a second at most, until all that was given back is so.
    pub fn settle(&self) {
        if let Some(journal) = &self.journal {
            journal.settle(DISK);
        }
        if let Some((fleet, _)) = &self.fleet {
            fleet.settle(DISK);
        }
    }

    /// Takes a token of `epoch` in hand on this node; `current` is the epoch now.
    ///
    /// # Errors
    /// [`TokenProblem::Spent`], [`TokenProblem::StoreUnavailable`] (it is on its way back), [`TokenProblem::StoreFull`],
    /// [`TokenProblem::Expired`].
    pub fn reserve(this: &Arc<Self>, nonce: Nonce, epoch: u64, current: u64) -> Result<Reservation, TokenProblem> {
        let print = this.print(&nonce);
        let taken = {
            let mut memory = this.memory.lock();
            let taken = memory.insert(print, epoch, current);
            this.held.set(memory.len() as i64);
            taken
        };
        let here = match taken {
            Ok(()) => true,
            // The fleet's store knows more than this node has room for.
            Err(TokenProblem::StoreFull) if this.fleet.is_some() => false,
            Err(problem) => return Err(problem),
        };
        let (spent, claim) = (this.clone(), Claim::None);
        Ok(Reservation { spent, nonce, epoch, here, written: false, claim, kept: false, counter: None })
    }

    fn release(&self, print: Print, epoch: u64) {
        let mut memory = self.memory.lock();
        memory.remove(print, epoch);
        self.held.set(memory.len() as i64);
    }
}

impl Reservation {
    /// Takes the token in hand for whoever else is to know of it: the files, or the whole fleet, where it is to be remembered
    /// for so long.
    ///
    /// # Errors
    /// [`TokenProblem::Spent`]: another node has it; [`TokenProblem::StoreUnavailable`], [`TokenProblem::StoreFull`].
    pub async fn claim(mut self, remember: Duration) -> Result<Self, TokenProblem> {
        if self.spent.journal.is_some() {
            self.write().await?;
        }
        if self.spent.fleet.is_some() {
            self.ask_fleet(remember).await?;
        }
        Ok(self)
    }

    async fn write(&mut self) -> Result<(), TokenProblem> {
        let (told, written) = oneshot::channel();
        let oldest = self.spent.memory.lock().oldest();
        if let Some(journal) = &self.spent.journal {
            // Noted before: who goes away meanwhile, or will not wait, gives it back all the same.
            self.written = true;
            journal.write(self.spent.print(&self.nonce), self.epoch, oldest, true, |result| drop(told.send(result)));
        }
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

    async fn ask_fleet(&mut self, remember: Duration) -> Result<(), TokenProblem> {
        let Some((fleet, without)) = self.spent.fleet.clone() else { return Ok(()) };
        let Some(claim) = crate::config::random().map(u64::from_be_bytes) else {
            return Err(TokenProblem::StoreUnavailable);
        };
        // Noted before it is asked: who goes away while the store decides gives it back all the same.
        self.claim = Claim::Asked(claim);
        match fleet.spend(&self.nonce, claim, remember + MARGIN).await {
            Ok(true) => {
                self.claim = Claim::Made(claim);
                Ok(())
            }
            Ok(false) => {
                // Another node has it. It may yet give it back, so it is not for this one to remember.
                self.claim = Claim::None;
                Err(TokenProblem::Spent)
            }
            Err(Gone { asked }) => {
                if !asked {
                    self.claim = Claim::None;
                }
                match (without, self.here) {
                    (WithoutStore::Local, true) => Ok(()),
                    (WithoutStore::Local, false) => Err(TokenProblem::StoreFull),
                    (WithoutStore::Closed, _) => Err(TokenProblem::StoreUnavailable),
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
        let spent = &self.spent;
        if self.here {
            let (print, epoch) = (spent.print(&self.nonce), self.epoch);
            match &spent.journal {
                // Given back in the files first: or another request that takes it in hand could write before.
                Some(journal) if self.written => {
                    let oldest = {
                        let mut memory = spent.memory.lock();
                        memory.returning(print);
                        memory.oldest()
                    };
                    let spent = Arc::downgrade(spent);
                    journal.write(print, epoch, oldest, false, move |written| {
                        if let Err(e) = written {
                            tracing::error!("a token that was given back is spent after a restart: {e}");
                        }
                        if let Some(spent) = spent.upgrade() {
                            spent.release(print, epoch);
                        }
                    });
                }
                _ => spent.release(print, epoch),
            }
        }
        if let Some((fleet, _)) = &spent.fleet {
            match self.claim {
                Claim::None => {}
                Claim::Asked(claim) => fleet.unspend(&self.nonce, claim, false),
                Claim::Made(claim) => fleet.unspend(&self.nonce, claim, true),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spent(capacity: usize) -> Spent {
        Spent::new(capacity, (1, 2), IntGauge::new("spent", "spent").unwrap())
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
}
