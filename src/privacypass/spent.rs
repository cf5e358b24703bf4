//! Which tokens are spent: nonces, for as long as their epoch is accepted, and no more than a fixed number of them. When
//! that is reached, nothing can be redeemed until an epoch ends: to forget a nonce would be to take its token twice.

use crate::problem::TokenProblem;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

type Nonce = [u8; 32];

/// The spent tokens, and those in hand.
#[derive(Debug)]
pub struct Spent {
    epochs: Mutex<Epochs>,
    capacity: usize,
}

#[derive(Debug, Default)]
struct Epochs {
    nonces: BTreeMap<u64, HashSet<Nonce>>,
    /// The latest epoch that was ever now: a clock that is behind, or set back, must not ask for what was let go.
    latest: u64,
}

/// A token in hand: no other request can use it. Kept, it is spent; dropped, it may be used again.
#[derive(Debug)]
pub struct Reservation {
    store: Arc<Spent>,
    epoch: u64,
    nonce: Nonce,
    kept: bool,
}

impl Spent {
    /// Remembers at most `capacity` tokens.
    pub fn new(capacity: usize) -> Self {
        Self { epochs: Mutex::default(), capacity }
    }

    /// Whether a token is spent or in hand.
    pub fn contains(&self, nonce: &Nonce) -> bool {
        self.epochs.lock().nonces.values().any(|nonces| nonces.contains(nonce))
    }

    /// Takes a token of `epoch` in hand; `current` is the epoch now: those before the previous one are let go.
    ///
    /// # Errors
    /// [`TokenProblem::Spent`], [`TokenProblem::StoreFull`], [`TokenProblem::Expired`].
    pub fn reserve(this: &Arc<Self>, nonce: Nonce, epoch: u64, current: u64) -> Result<Reservation, TokenProblem> {
        let mut epochs = this.epochs.lock();
        epochs.latest = epochs.latest.max(current);
        let oldest = epochs.latest.saturating_sub(1);
        epochs.nonces.retain(|epoch, _| *epoch >= oldest);
        if epoch < oldest {
            return Err(TokenProblem::Expired);
        }
        if epochs.nonces.values().any(|nonces| nonces.contains(&nonce)) {
            return Err(TokenProblem::Spent);
        }
        if epochs.nonces.values().map(HashSet::len).sum::<usize>() >= this.capacity {
            return Err(TokenProblem::StoreFull);
        }
        epochs.nonces.entry(epoch).or_default().insert(nonce);
        Ok(Reservation { store: this.clone(), epoch, nonce, kept: false })
    }
}

impl Reservation {
    /// Spends the token.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.kept
            && let Some(nonces) = self.store.epochs.lock().nonces.get_mut(&self.epoch)
        {
            nonces.remove(&self.nonce);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spent_once_given_back_forgotten_with_its_epoch() {
        let store = Arc::new(Spent::new(2));
        let first = Spent::reserve(&store, [1; 32], 5, 5).unwrap();
        assert_eq!(Spent::reserve(&store, [1; 32], 5, 5).unwrap_err(), TokenProblem::Spent, "in hand");
        drop(first);
        Spent::reserve(&store, [1; 32], 5, 5).unwrap().keep();
        assert_eq!(Spent::reserve(&store, [1; 32], 5, 6).unwrap_err(), TokenProblem::Spent);
        Spent::reserve(&store, [2; 32], 6, 6).unwrap().keep();
        assert_eq!(
            Spent::reserve(&store, [3; 32], 6, 6).unwrap_err(),
            TokenProblem::StoreFull,
            "full is not forgetful"
        );
        assert_eq!(Spent::reserve(&store, [1; 32], 5, 6).unwrap_err(), TokenProblem::Spent);
        Spent::reserve(&store, [3; 32], 7, 7).unwrap().keep();
        assert!(!store.contains(&[1; 32]), "epoch 5 is over");
        let behind = Spent::reserve(&store, [1; 32], 5, 6);
        assert_eq!(behind.unwrap_err(), TokenProblem::Expired, "also for a clock that is behind");
        assert!(store.contains(&[2; 32]));
    }

    #[test]
    fn of_many_at_once_one_wins() {
        let store = Arc::new(Spent::new(10));
        let won = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| Spent::reserve(&store, [9; 32], 1, 1).map(Reservation::keep).is_ok()))
                .collect();
            threads.into_iter().map(|t| usize::from(t.join().unwrap())).sum::<usize>()
        });
        assert_eq!(won, 1);
    }
}
