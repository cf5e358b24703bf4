//! Which tokens this node has seen spent: keyed hashes of their nonces, for as long as their epoch is accepted, and no more
//! than a fixed number of them. When that is reached, nothing can be redeemed until an epoch ends: to forget a nonce would
//! be to take its token twice.

use crate::problem::TokenProblem;
use smallvec::SmallVec;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};

/// A keyed hash of a nonce. Of a million, two are alike with a probability of 2^-89.
pub(super) type Print = u128;

/// The tokens of an epoch.
pub(super) type Prints = HashSet<Print>;

/// The spent tokens, and those in hand.
#[derive(Debug)]
pub(super) struct Memory {
    epochs: BTreeMap<u64, Prints>,
    /// Those of them that will be given back.
    returning: Prints,
    /// The latest epoch that was ever now: a clock that is behind, or set back, must not ask for what was let go.
    latest: u64,
    capacity: usize,
}

impl Memory {
    /// Remembers at most `capacity` tokens.
    pub(super) fn new(capacity: usize) -> Self {
        Self { epochs: BTreeMap::new(), returning: Prints::new(), latest: 0, capacity }
    }

    pub(super) fn len(&self) -> usize {
        self.epochs.values().map(HashSet::len).sum()
    }

    /// The oldest epoch whose tokens may still be redeemed.
    pub(super) fn oldest(&self) -> u64 {
        self.latest.saturating_sub(1)
    }

    /// Room for the tokens of an epoch, all of it at once: to make more while requests wait would take milliseconds. To be
    /// made before the lock is taken that others wait for.
    ///
    /// # Errors
    /// [`TokenProblem::StoreFull`]: there is no such memory.
    pub(super) fn room(capacity: usize) -> Result<Prints, TokenProblem> {
        let mut room = Prints::new();
        room.try_reserve(capacity).map_err(|_| TokenProblem::StoreFull)?;
        Ok(room)
    }

    /// Of these epochs, those that have no room yet; and how much each needs.
    pub(super) fn lack_room(&self, epochs: [u64; 3]) -> (SmallVec<[u64; 3]>, usize) {
        let lacks = |epoch: &u64| *epoch >= self.oldest() && !self.epochs.contains_key(epoch);
        (epochs.into_iter().filter(lacks).collect(), self.capacity)
    }

    /// Gives epochs their room; the answer is what is not needed any more, to be dropped when nobody waits.
    pub(super) fn make_room(&mut self, rooms: impl IntoIterator<Item = (u64, Prints)>) -> Vec<Prints> {
        let kept = self.epochs.split_off(&self.oldest());
        let mut over: Vec<_> = std::mem::replace(&mut self.epochs, kept).into_values().collect();
        for (epoch, room) in rooms {
            match self.epochs.entry(epoch) {
                Entry::Vacant(vacant) => {
                    vacant.insert(room);
                }
                Entry::Occupied(_) => over.push(room),
            }
        }
        over
    }

    fn contains(&self, print: Print) -> bool {
        self.epochs.values().any(|prints| prints.contains(&print))
    }

    /// Why a token cannot be taken in hand, if it is known here.
    pub(super) fn problem(&self, print: Print) -> Option<TokenProblem> {
        // One that is on its way back is not spent: its client is to try again.
        let known =
            || if self.returning.contains(&print) { TokenProblem::StoreUnavailable } else { TokenProblem::Spent };
        self.contains(print).then(known)
    }

    /// It will be given back.
    pub(super) fn returning(&mut self, print: Print) {
        self.returning.insert(print);
    }

    /// Takes a token of `epoch` in hand; `current` is the epoch now.
    ///
    /// # Errors
    /// [`TokenProblem::Spent`], [`TokenProblem::StoreUnavailable`], [`TokenProblem::StoreFull`], [`TokenProblem::Expired`].
    pub(super) fn insert(&mut self, print: Print, epoch: u64, current: u64) -> Result<(), TokenProblem> {
        self.latest = self.latest.max(current);
        let oldest = self.oldest();
        if epoch < oldest {
            return Err(TokenProblem::Expired);
        }
        if let Some(problem) = self.problem(print) {
            return Err(problem);
        }
        // Those of epochs that are over count no more, though their room may not be given back yet.
        if self.epochs.range(oldest..).map(|(_, prints)| prints.len()).sum::<usize>() >= self.capacity {
            return Err(TokenProblem::StoreFull);
        }
        self.epochs.entry(epoch).or_default().insert(print);
        Ok(())
    }

    /// Tokens that were spent before a restart, whether or not there is room for so many: to leave one out would be to take
    /// it again.
    pub(super) fn load(&mut self, epoch: u64, mut prints: Prints) {
        // Where there is no such memory it grows later.
        let _ = prints.try_reserve(self.capacity.saturating_sub(prints.len()));
        self.epochs.insert(epoch, prints);
    }

    /// Gives a token back.
    pub(super) fn remove(&mut self, print: Print, epoch: u64) {
        self.returning.remove(&print);
        if let Some(prints) = self.epochs.get_mut(&epoch) {
            prints.remove(&print);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spent_once_given_back_forgotten_with_its_epoch() {
        let mut memory = Memory::new(2);
        memory.insert(1, 5, 5).unwrap();
        assert_eq!(memory.insert(1, 5, 5), Err(TokenProblem::Spent));
        memory.remove(1, 5);
        memory.insert(1, 5, 5).unwrap();
        assert_eq!(memory.insert(1, 5, 6), Err(TokenProblem::Spent));
        memory.insert(2, 6, 6).unwrap();
        assert_eq!(memory.insert(3, 6, 6), Err(TokenProblem::StoreFull), "full is not forgetful");
        assert_eq!(memory.insert(1, 5, 6), Err(TokenProblem::Spent));
        memory.insert(3, 7, 7).unwrap();
        let over = memory.make_room([(8, Memory::room(2).unwrap())]);
        assert!(over.len() == 1 && !memory.contains(1), "epoch 5 is over");
        assert_eq!(memory.insert(1, 5, 6), Err(TokenProblem::Expired), "also for a clock that is behind");
        assert!(memory.contains(2));
        assert_eq!(memory.lack_room([9, 8, 5]), (SmallVec::from_slice(&[9]), 2));
        memory.load(7, (10..20).collect());
        assert_eq!(memory.insert(4, 7, 7), Err(TokenProblem::StoreFull), "more than there is room for is full");
        assert_eq!(memory.insert(19, 7, 7), Err(TokenProblem::Spent));
        memory.returning(19);
        assert_eq!(memory.insert(19, 7, 7), Err(TokenProblem::StoreUnavailable), "not yet, and not spent");
        memory.remove(19, 7);
        assert_eq!(memory.problem(19), None);
        assert_eq!(Memory::room(usize::MAX / 64).unwrap_err(), TokenProblem::StoreFull);
    }
}
