//! Tokens that did not verify, so that the same one again costs nothing. A table of a fixed size: a newer one takes an
//! older one's place, which is then verified once more.

use siphasher::sip128::SipHasher13;
use std::sync::atomic::{AtomicU64, Ordering};

/// Tokens that are remembered; half a MiB.
const SLOTS: usize = 1 << 16;

/// Hashes of tokens, under a secret: nobody can make one that is taken for another.
#[derive(Debug)]
pub(super) struct KnownBad {
    keys: (u64, u64),
    slots: Box<[AtomicU64]>,
}

impl KnownBad {
    /// None is known; `keys` are secret.
    pub(super) fn new(keys: (u64, u64)) -> Self {
        Self { keys, slots: (0..SLOTS).map(|_| AtomicU64::new(0)).collect() }
    }

    fn place(&self, token: &[u8]) -> (Option<&AtomicU64>, u64) {
        let hash = SipHasher13::new_with_keys(self.keys.0, self.keys.1).hash(token);
        (self.slots.get(hash.h1 as usize % SLOTS), hash.h2 | 1)
    }

    /// Whether this token, to the last octet, is known not to verify.
    pub(super) fn contains(&self, token: &[u8]) -> bool {
        let (slot, print) = self.place(token);
        slot.is_some_and(|slot| slot.load(Ordering::Relaxed) == print)
    }

    /// It does not verify.
    pub(super) fn insert(&self, token: &[u8]) {
        if let (Some(slot), print) = self.place(token) {
            slot.store(print, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_bad_is_known() {
        let known = KnownBad::new((1, 2));
        assert!(!known.contains(b"one"));
        known.insert(b"one");
        assert!(known.contains(b"one") && !known.contains(b"two"));
        (0u32..1_000_000).for_each(|n| known.insert(&n.to_be_bytes()));
        assert!(known.contains(&999_999u32.to_be_bytes()));
    }
}
