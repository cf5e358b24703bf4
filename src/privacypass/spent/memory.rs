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
    /// Those of them that files had for spent which came later: they stay so, whoever had them in hand then.
    staying: BTreeMap<u64, Prints>,
    /// The latest epoch that was ever now: a clock that is behind, or set back, must not ask for what was let go.
    latest: u64,
    capacity: usize,
    /// What has changed since a copy was begun, as long as one is made.
    changes: Option<Vec<Change>>,
}

/// A token that was taken in hand, or given back, while a copy was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) print: Print,
    pub(super) epoch: u64,
    pub(super) taken: bool,
}

impl Memory {
    /// Remembers at most `capacity` tokens.
    pub(super) fn new(capacity: usize) -> Self {
        let (epochs, staying) = (BTreeMap::new(), BTreeMap::new());
        Self { epochs, returning: Prints::new(), staying, latest: 0, capacity, changes: None }
    }

    /// Remembers at most so many from now on. What there is stays; room that was made already is as it was.
    pub(super) fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity;
    }

    pub(super) fn len(&self) -> usize {
        self.epochs.values().map(HashSet::len).sum()
    }

    /// The latest epoch that was ever now.
    pub(super) fn latest(&self) -> u64 {
        self.latest
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
        let kept = self.staying.split_off(&self.oldest());
        over.extend(std::mem::replace(&mut self.staying, kept).into_values());
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
        self.note(print, epoch, true);
        Ok(())
    }

    /// Tokens that were spent before a restart, or that others have written down, whether or not there is room for so many: to
    /// leave one out would be to take it again. One that is in hand stays spent.
    pub(super) fn load(&mut self, epoch: u64, mut prints: Prints) {
        match self.epochs.entry(epoch) {
            Entry::Vacant(vacant) => {
                // Where there is no such memory it grows later.
                let _ = prints.try_reserve(self.capacity.saturating_sub(prints.len()));
                vacant.insert(prints);
            }
            Entry::Occupied(mut known) => {
                let both: Prints = prints.into_iter().filter(|print| !known.get_mut().insert(*print)).collect();
                if !both.is_empty() {
                    self.returning.retain(|print| !both.contains(print));
                    self.staying.entry(epoch).or_default().extend(both);
                }
            }
        }
    }

    /// Whether a token is spent, whatever becomes of a request that has it in hand.
    pub(super) fn stays(&self, print: Print, epoch: u64) -> bool {
        self.staying.get(&epoch).is_some_and(|prints| prints.contains(&print))
    }

    /// Gives a token back, unless it stays spent.
    pub(super) fn remove(&mut self, print: Print, epoch: u64) {
        self.returning.remove(&print);
        if self.stays(print, epoch) {
            return;
        }
        if self.epochs.get_mut(&epoch).is_some_and(|prints| prints.remove(&print)) {
            self.note(print, epoch, false);
        }
    }

    fn note(&mut self, print: Print, epoch: u64, taken: bool) {
        if let Some(changes) = &mut self.changes {
            changes.push(Change { print, epoch, taken });
        }
    }

    /// What is known now, by epoch, to be copied elsewhere. What changes from now on is noted, until [`Memory::end_copy`].
    pub(super) fn begin_copy(&mut self) -> Vec<(u64, Vec<Print>)> {
        self.changes = Some(vec![]);
        let known = self.epochs.range(self.oldest()..);
        known.map(|(epoch, prints)| (*epoch, prints.iter().copied().collect())).collect()
    }

    /// What has changed since this was asked last, in the order in which it has.
    pub(super) fn changes(&mut self) -> Vec<Change> {
        self.changes.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Nothing is noted any more.
    pub(super) fn end_copy(&mut self) {
        self.changes = None;
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

    #[test]
    fn another_capacity_forgets_nothing() {
        let mut memory = Memory::new(2);
        memory.insert(1, 5, 5).unwrap();
        memory.insert(2, 5, 5).unwrap();
        assert_eq!(memory.insert(3, 5, 5), Err(TokenProblem::StoreFull));
        memory.set_capacity(3);
        memory.insert(3, 5, 5).unwrap();
        memory.set_capacity(1);
        assert_eq!(memory.insert(4, 5, 5), Err(TokenProblem::StoreFull));
        assert!((1..=3).all(|print| memory.insert(print, 5, 5) == Err(TokenProblem::Spent)));
        assert_eq!((memory.lack_room([5, 6, 7]).1, memory.len()), (1, 3));
    }

    #[test]
    fn what_changes_while_a_copy_is_made_is_noted() {
        let mut memory = Memory::new(10);
        memory.insert(1, 4, 5).unwrap();
        memory.insert(2, 5, 5).unwrap();
        assert!(memory.changes().is_empty(), "nobody makes one");
        assert_eq!(memory.begin_copy(), [(4, vec![1]), (5, vec![2])]);
        memory.insert(3, 5, 5).unwrap();
        memory.remove(3, 5);
        memory.remove(3, 5);
        memory.remove(1, 4);
        assert_eq!(memory.insert(2, 5, 5), Err(TokenProblem::Spent));
        let change = |print, epoch, taken| Change { print, epoch, taken };
        assert_eq!(memory.changes(), [change(3, 5, true), change(3, 5, false), change(1, 4, false)]);
        assert!(memory.changes().is_empty());
        // What is loaded joins what is known, and both are not given back.
        memory.returning(2);
        memory.load(5, [2, 7].into_iter().collect());
        memory.load(6, [8].into_iter().collect());
        assert!(memory.stays(2, 5) && !memory.stays(7, 5) && !memory.stays(2, 6));
        memory.remove(2, 5);
        assert_eq!((memory.problem(2), memory.changes()), (Some(TokenProblem::Spent), vec![]));
        assert!(memory.contains(2) && memory.contains(7) && memory.contains(8) && memory.len() == 3);
        memory.insert(9, 6, 6).unwrap();
        memory.end_copy();
        assert!(memory.changes().is_empty());
        // Of an epoch that is over nothing need be copied.
        memory.insert(10, 7, 7).unwrap();
        assert!(memory.begin_copy().iter().all(|(epoch, _)| *epoch >= 6));
        memory.make_room([]);
        assert!(memory.staying.is_empty());
    }
}
