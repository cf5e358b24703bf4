//! Which tokens this node has seen spent: keyed hashes of their nonces, for as long as their epoch is accepted, and no more
//! than a fixed number of them. When that is reached, nothing can be redeemed until an epoch ends: to forget a nonce would
//! be to take its token twice.

use crate::problem::TokenProblem;
use std::collections::{BTreeMap, HashSet};

/// A keyed hash of a nonce. Of a million, two are alike with a probability of 2^-89.
pub(super) type Print = u128;

/// The spent tokens, and those in hand.
#[derive(Debug)]
pub(super) struct Memory {
    epochs: BTreeMap<u64, HashSet<Print>>,
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

    /// Whether a token is spent or in hand.
    pub(super) fn contains(&self, print: Print) -> bool {
        self.epochs.values().any(|prints| prints.contains(&print))
    }

    /// Takes a token of `epoch` in hand; `current` is the epoch now: those before the previous one are let go.
    ///
    /// # Errors
    /// [`TokenProblem::Spent`], [`TokenProblem::StoreFull`], [`TokenProblem::Expired`].
    pub(super) fn insert(&mut self, print: Print, epoch: u64, current: u64) -> Result<(), TokenProblem> {
        self.latest = self.latest.max(current);
        let oldest = self.oldest();
        self.epochs.retain(|epoch, _| *epoch >= oldest);
        if epoch < oldest {
            return Err(TokenProblem::Expired);
        }
        if self.contains(print) {
            return Err(TokenProblem::Spent);
        }
        if self.len() >= self.capacity {
            return Err(TokenProblem::StoreFull);
        }
        // All of its room at once: to make more while requests wait would take milliseconds.
        let capacity = self.capacity;
        self.epochs.entry(epoch).or_insert_with(|| HashSet::with_capacity(capacity)).insert(print);
        Ok(())
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
        assert!(!memory.contains(1), "epoch 5 is over");
        assert_eq!(memory.insert(1, 5, 6), Err(TokenProblem::Expired), "also for a clock that is behind");
        assert!(memory.contains(2));
    }
}
