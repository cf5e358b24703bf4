//! Which tokens are spent. A token is taken in hand before its request goes on, and is then nobody else's: it is spent when
//! its request is on its way to the Delivery Service, and given back if it does not come so far.
//!
//! Where that is kept is the operator's choice: in this node's memory, bounded; in files too, which outlive the process; or
//! in the store of a fleet, which decides for all its nodes.

mod journal;
mod memory;

use crate::limiter::fleet::{Fleet, Gone};
use crate::problem::TokenProblem;
use journal::Journal;
use memory::{Memory, Print};
use parking_lot::Mutex;
use privacypass::Nonce;
use prometheus::{IntCounter, IntGauge};
use siphasher::sip128::SipHasher24;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// A fleet's nodes remember a token longer than any of their clocks takes it.
const MARGIN: Duration = Duration::from_secs(120);

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
    journal: Option<Arc<Journal>>,
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
    /// In the fleet's store, by this number.
    claim: Option<u64>,
    kept: bool,
    counter: Option<IntCounter>,
}

impl Spent {
    /// Remembers at most `capacity` tokens; `held` says how many it does. Hashes are under `keys`.
    pub fn new(capacity: usize, keys: (u64, u64), held: IntGauge) -> Self {
        Self { memory: Mutex::new(Memory::new(capacity)), journal: None, fleet: None, keys, held }
    }

    /// Keeps them in files in `dir` too, and begins with those that are there; `current` is the epoch now. `mark` tells
    /// files that are under other keys.
    ///
    /// # Errors
    /// What cannot be read or written.
    pub fn with_files(mut self, dir: &Path, mark: [u8; 16], current: u64) -> std::io::Result<Self> {
        let (journal, spent) = Journal::open(dir, mark, current.saturating_sub(1))?;
        let memory = self.memory.get_mut();
        for (epoch, prints) in spent {
            for print in prints {
                // There may be more than before the restart there was room for: then it is full.
                let _ = memory.insert(print, epoch, current);
            }
        }
        self.held.set(memory.len() as i64);
        let journal = Arc::new(journal);
        Journal::keep(&journal)?;
        self.journal = Some(journal);
        Ok(self)
    }

    /// Has a fleet's store decide.
    pub fn with_fleet(mut self, fleet: Arc<Fleet>, without: WithoutStore) -> Self {
        self.fleet = Some((fleet, without));
        self
    }

    fn print(&self, nonce: &Nonce) -> Print {
        SipHasher24::new_with_keys(self.keys.0, self.keys.1).hash(nonce).as_u128()
    }

    /// Whether a token is known here for spent or in hand.
    pub fn contains(&self, nonce: &Nonce) -> bool {
        let print = self.print(nonce);
        self.memory.lock().contains(print)
    }

    /// Takes a token of `epoch` in hand on this node; `current` is the epoch now. May write to a file.
    ///
    /// # Errors
    /// [`TokenProblem::Spent`], [`TokenProblem::StoreFull`], [`TokenProblem::Expired`],
    /// [`TokenProblem::StoreUnavailable`].
    pub fn reserve(this: &Arc<Self>, nonce: Nonce, epoch: u64, current: u64) -> Result<Reservation, TokenProblem> {
        let print = this.print(&nonce);
        let (taken, oldest) = {
            let mut memory = this.memory.lock();
            let taken = memory.insert(print, epoch, current);
            this.held.set(memory.len() as i64);
            (taken, memory.oldest())
        };
        let mut here = true;
        match taken {
            Ok(()) => {}
            // The fleet's store knows more than this node has room for.
            Err(TokenProblem::StoreFull) if this.fleet.is_some() => here = false,
            Err(problem) => return Err(problem),
        }
        if let Some(journal) = &this.journal
            && let Err(e) = journal.write(print, epoch, oldest, true)
        {
            tracing::error!("no token is redeemed: {e}");
            this.memory.lock().remove(print, epoch);
            return Err(TokenProblem::StoreUnavailable);
        }
        Ok(Reservation { spent: this.clone(), nonce, epoch, here, claim: None, kept: false, counter: None })
    }
}

impl Reservation {
    /// Takes the token in hand for the whole fleet, where there is one, for as long as it is to be remembered.
    ///
    /// # Errors
    /// [`TokenProblem::Spent`], [`TokenProblem::StoreUnavailable`], [`TokenProblem::StoreFull`].
    pub async fn claim(mut self, remember: Duration) -> Result<Self, TokenProblem> {
        let Some((fleet, without)) = self.spent.fleet.clone() else { return Ok(self) };
        let Some(claim) = crate::config::random().map(u64::from_be_bytes) else {
            return Err(TokenProblem::StoreUnavailable);
        };
        // Noted before it is asked: who goes away while the store decides gives it back all the same.
        self.claim = Some(claim);
        match fleet.spend(&self.nonce, claim, remember + MARGIN).await {
            Ok(true) => Ok(self),
            Ok(false) => {
                // Another node has it, and this one need not ask again.
                self.claim = None;
                self.kept = true;
                Err(TokenProblem::Spent)
            }
            Err(Gone) if without == WithoutStore::Local => match self.here {
                true => Ok(self),
                false => Err(TokenProblem::StoreFull),
            },
            Err(Gone) => Err(TokenProblem::StoreUnavailable),
        }
    }

    /// Counts it, once it is spent.
    pub fn counted_by(mut self, counter: &IntCounter) -> Self {
        self.counter = Some(counter.clone());
        self
    }

    /// Spends the token.
    pub fn keep(mut self) {
        self.kept = true;
        self.counter.iter().for_each(IntCounter::inc);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let spent = &self.spent;
        if self.here {
            let print = spent.print(&self.nonce);
            let oldest = {
                let mut memory = spent.memory.lock();
                memory.remove(print, self.epoch);
                spent.held.set(memory.len() as i64);
                memory.oldest()
            };
            if let Some(journal) = &spent.journal
                && let Err(e) = journal.write(print, self.epoch, oldest, false)
            {
                tracing::error!("a token that was given back is spent after a restart: {e}");
            }
        }
        if let (Some(claim), Some((fleet, _))) = (self.claim, &spent.fleet) {
            fleet.unspend(&self.nonce, claim);
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
        let first = Spent::reserve(&spent, [1; 32], 5, 5).unwrap();
        assert_eq!(Spent::reserve(&spent, [1; 32], 5, 5).unwrap_err(), TokenProblem::Spent, "in hand");
        drop(first);
        assert_eq!(spent.held.get(), 0);
        Spent::reserve(&spent, [1; 32], 5, 5).unwrap().keep();
        assert!(spent.contains(&[1; 32]));
        assert_eq!((Spent::reserve(&spent, [1; 32], 5, 6).unwrap_err(), spent.held.get()), (TokenProblem::Spent, 1));
    }

    #[test]
    fn of_many_at_once_one_wins() {
        let spent = Arc::new(spent(10));
        let won = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| Spent::reserve(&spent, [9; 32], 1, 1).map(Reservation::keep).is_ok()))
                .collect();
            threads.into_iter().map(|t| usize::from(t.join().unwrap())).sum::<usize>()
        });
        assert_eq!(won, 1);
    }

    #[test]
    fn files_outlive_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Arc::new(spent(10).with_files(dir.path(), [3; 16], 5).unwrap());
        let first = open();
        Spent::reserve(&first, [1; 32], 5, 5).unwrap().keep();
        Spent::reserve(&first, [2; 32], 4, 5).unwrap().keep();
        drop(Spent::reserve(&first, [3; 32], 5, 5).unwrap());
        drop(first);
        let again = open();
        assert_eq!(again.held.get(), 2);
        assert_eq!(Spent::reserve(&again, [1; 32], 5, 5).unwrap_err(), TokenProblem::Spent);
        assert_eq!(Spent::reserve(&again, [2; 32], 4, 5).unwrap_err(), TokenProblem::Spent);
        assert!(Spent::reserve(&again, [3; 32], 5, 5).is_ok(), "it was given back");
    }
}
