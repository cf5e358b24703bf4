//! Parts of what there may be so much of at once: octets that are held for speed alone, connections that are a courtesy.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Octets of one body that are in hand at once where that is fewer calls to the kernel.
const AMPLE: usize = 64 * 1024;

/// Octets of all requests' bodies that may be in hand so, and of all answers'.
const MOST_AMPLE: usize = 256 * 1024;

/// Those that are now.
static OF_REQUESTS: AtomicUsize = AtomicUsize::new(0);
static OF_ANSWERS: AtomicUsize = AtomicUsize::new(0);

/// A part of what there may be of something at once, until it is dropped.
#[derive(Debug)]
pub struct Share {
    of: &'static AtomicUsize,
    by: usize,
}

impl Share {
    /// `by` more of it, if that is not more than `most` in all.
    pub fn new(of: &'static AtomicUsize, by: usize, most: usize) -> Option<Self> {
        let more = |all: usize| all.checked_add(by).filter(|all| *all <= most);
        of.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self { of, by })
    }

    /// Room for 64 KiB of a request's body, for as long as these are moved: others have a record, or a piece, at a time.
    pub fn of_requests() -> Option<Self> {
        Self::new(&OF_REQUESTS, AMPLE, MOST_AMPLE)
    }

    /// The same, of an answer's: whoever does not read theirs takes nothing from requests.
    pub fn of_answers() -> Option<Self> {
        Self::new(&OF_ANSWERS, AMPLE, MOST_AMPLE)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.of.fetch_sub(self.by, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_more_than_there_may_be() {
        static ALL: AtomicUsize = AtomicUsize::new(0);
        let (a, b) = (Share::new(&ALL, 2, 5).unwrap(), Share::new(&ALL, 3, 5).unwrap());
        assert!(Share::new(&ALL, 1, 5).is_none());
        drop(a);
        assert!(Share::new(&ALL, 2, 5).is_some());
        assert!(Share::new(&ALL, usize::MAX, usize::MAX).is_none());
        drop(b);
        assert_eq!(ALL.load(Ordering::Relaxed), 0);
    }
}
