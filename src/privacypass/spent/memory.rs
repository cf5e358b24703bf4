//! Which tokens this node has seen spent: keyed hashes of their nonces, for as long as their epoch is accepted, and no more
//! than a fixed number of them. When that is reached, nothing can be redeemed until an epoch ends: to forget a nonce would
//! be to take its token twice.

use crate::problem::TokenProblem;
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
    /// The latest epoch that was ever now: a clock that is behind, or set back, must not ask for what was let go.
    latest: u64,
    capacity: usize,
}

impl Memory {
    /// Remembers at most `capacity` tokens.
    pub(super) fn new(capacity: usize) -> Self {
        Self { epochs: BTreeMap::new(), latest: 0, capacity }
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
    /// There is no such memory.
    pub(super) fn room(capacity: usize) -> Result<Prints, TokenProblem> {
        let mut room = Prints::new();
        room.try_reserve(capacity).map_err(|_| TokenProblem::StoreFull)?;
        Ok(room)
    }

    /// Whether an epoch has no room yet; how much it needs.
    pub(super) fn lacks_room(&self, epoch: u64) -> Option<usize> {
        (epoch >= self.oldest() && !self.epochs.contains_key(&epoch)).then_some(self.capacity)
    }

    /// Gives an epoch its room; the answer is what is not needed any more, to be dropped when nobody waits.
    pub(super) fn make_room(&mut self, epoch: u64, room: Prints) -> Vec<Prints> {
        let kept = self.epochs.split_off(&self.oldest());
        let mut over: Vec<_> = std::mem::replace(&mut self.epochs, kept).into_values().collect();
        match self.epochs.entry(epoch) {
            Entry::Vacant(vacant) => {
                vacant.insert(room);
            }
            Entry::Occupied(_) => over.push(room),
        }
        over
    }

    /// Whether a token is spent or in hand.
    pub(super) fn contains(&self, print: Print) -> bool {
        self.epochs.values().any(|prints| prints.contains(&print))
    }

    /// Takes a token of `epoch` in hand; `current` is the epoch now.
    ///
    /// # Errors
    /// [`TokenProblem::Spent`], [`TokenProblem::StoreFull`], [`TokenProblem::Expired`].
    pub(super) fn insert(&mut self, print: Print, epoch: u64, current: u64) -> Result<(), TokenProblem> {
        self.latest = self.latest.max(current);
        let oldest = self.oldest();
        if epoch < oldest {
            return Err(TokenProblem::Expired);
        }
        if self.contains(print) {
            return Err(TokenProblem::Spent);
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
    pub(super) fn load(&mut self, epoch: u64, prints: Prints) {
        self.epochs.entry(epoch).or_default().extend(prints);
    }

    /// Gives a token back.
    pub(super) fn remove(&mut self, print: Print, epoch: u64) {
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
        let over = memory.make_room(8, Memory::room(2).unwrap());
        assert!(over.len() == 1 && !memory.contains(1), "epoch 5 is over");
        assert_eq!(memory.insert(1, 5, 6), Err(TokenProblem::Expired), "also for a clock that is behind");
        assert!(memory.contains(2));
        assert_eq!((memory.lacks_room(9), memory.lacks_room(8), memory.lacks_room(5)), (Some(2), None, None));
        memory.load(7, (10..20).collect());
        assert_eq!(memory.insert(4, 7, 7), Err(TokenProblem::StoreFull), "more than there is room for is full");
        assert_eq!(memory.insert(19, 7, 7), Err(TokenProblem::Spent));
        assert_eq!(Memory::room(usize::MAX / 64).unwrap_err(), TokenProblem::StoreFull);
    }
}
