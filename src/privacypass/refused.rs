//! Tokens that were refused, so that the same one again costs nothing: those that did not verify, and for a moment those
//! that another node has. A table of a fixed size: a newer one takes an older one's place, which is then checked once more.

use privacypass::Nonce;
use siphasher::sip128::SipHasher13;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Tokens that are remembered; half a MiB.
const SLOTS: usize = 1 << 16;

/// As long as a token is not asked for again that another node has: it may have been given back.
pub(super) const A_MOMENT: u64 = 2;

/// Hashes of tokens, under a secret: nobody can make one that is taken for another.
#[derive(Debug)]
pub(super) struct Refused {
    keys: (u64, u64),
    slots: Box<[AtomicU64]>,
}

impl Refused {
    /// None is known; `keys` are secret.
    pub(super) fn new(keys: (u64, u64)) -> Self {
        Self { keys, slots: (0..SLOTS).map(|_| AtomicU64::new(0)).collect() }
    }

    /// A token of a nonce that another node has, at about this time. One that does not verify is noted by all its octets.
    pub(super) fn elsewhere(nonce: &Nonce, now: Duration) -> [u8; 40] {
        let mut of = [0; 40];
        of.iter_mut()
            .zip(nonce.iter().chain(&(now.as_secs() / A_MOMENT).to_be_bytes()))
            .for_each(|(to, from)| *to = *from);
        of
    }

    fn place(&self, token: &[u8]) -> (Option<&AtomicU64>, u64) {
        let hash = SipHasher13::new_with_keys(self.keys.0, self.keys.1).hash(token);
        (self.slots.get(hash.h1 as usize % SLOTS), hash.h2 | 1)
    }

    /// Whether this token, to the last octet, was refused.
    pub(super) fn contains(&self, token: &[u8]) -> bool {
        let (slot, print) = self.place(token);
        slot.is_some_and(|slot| slot.load(Ordering::Relaxed) == print)
    }

    /// It was refused.
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
        let known = Refused::new((1, 2));
        assert!(!known.contains(b"one"));
        known.insert(b"one");
        assert!(known.contains(b"one") && !known.contains(b"two"));
        (0u32..1_000_000).for_each(|n| known.insert(&n.to_be_bytes()));
        assert!(known.contains(&999_999u32.to_be_bytes()));
        let at = |seconds| Refused::elsewhere(&[7; 32], Duration::from_secs(seconds));
        known.insert(&at(100));
        assert!(known.contains(&at(101)) && !known.contains(&at(102)), "for a moment");
    }
}
