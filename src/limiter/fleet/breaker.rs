//! The breaker between requests and a store that does not answer: while it is open no request waits for the store.

use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use tokio::sync::Notify;

/// Failures in a row that open it.
const FAILURES: u32 = 3;

/// Closed: requests go to the store. Open: they do not, until whoever keeps the connection has heard an answer.
#[derive(Debug)]
pub(super) struct Breaker {
    open: AtomicBool,
    failures: AtomicU32,
    opened: Notify,
    /// 1 while requests go to the store that is in use.
    up: prometheus::IntGauge,
    /// That is this one. Held while something is said, so that the last word is that of the one in use.
    in_use: Mutex<bool>,
    times_opened: prometheus::IntCounter,
}

impl Breaker {
    /// Open, until somebody has heard an answer. Nothing is said of it before it is in use.
    pub(super) fn new(up: prometheus::IntGauge, times_opened: prometheus::IntCounter) -> Self {
        Self {
            open: AtomicBool::new(true),
            failures: AtomicU32::new(0),
            opened: Notify::new(),
            up,
            in_use: Mutex::new(false),
            times_opened,
        }
    }

    /// Nothing is said of it any more.
    pub(super) fn retire(&self) {
        let mut in_use = self.in_use.lock();
        *in_use = false;
        self.up.set(0);
    }

    /// How it stands is said from now on, after another was retired.
    pub(super) fn begin(&self) {
        *self.in_use.lock() = true;
        self.say();
    }

    /// Says how it stands now, which may be later than what has changed: who says it last says what is.
    fn say(&self) {
        let in_use = self.in_use.lock();
        if *in_use {
            self.up.set(i64::from(!self.is_open()));
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// The store has answered.
    pub(super) fn succeeded(&self) {
        if self.failures.load(Ordering::Relaxed) > 0 {
            self.failures.store(0, Ordering::Relaxed);
        }
    }

    /// It has not answered, or with an error.
    pub(super) fn failed(&self) {
        if self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURES {
            self.open();
        }
    }

    /// The connection is gone, or as good as gone.
    pub(super) fn open(&self) {
        if !self.open.swap(true, Ordering::Relaxed) {
            self.say();
            self.times_opened.inc();
        }
        self.opened.notify_one();
    }

    /// The store answers again.
    pub(super) fn close(&self) {
        self.failures.store(0, Ordering::Relaxed);
        self.open.store(false, Ordering::Relaxed);
        self.say();
    }

    /// Waits until it opens.
    pub(super) async fn opened(&self) {
        while !self.is_open() {
            self.opened.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_of_one_that_is_not_in_use() {
        let up = prometheus::IntGauge::new("up", "up").unwrap();
        let breaker = || Breaker::new(up.clone(), prometheus::IntCounter::new("n", "n").unwrap());
        let (old, thrown_away, new) = (breaker(), breaker(), breaker());
        old.close();
        assert_eq!(up.get(), 0, "it is not in use yet");
        old.begin();
        assert_eq!(up.get(), 1);
        // A reload has begun with another, and was refused.
        thrown_away.close();
        thrown_away.open();
        drop(thrown_away);
        assert_eq!(up.get(), 1);
        old.retire();
        assert_eq!(up.get(), 0);
        new.begin();
        assert_eq!(up.get(), 0, "it has not been heard yet");
        new.close();
        old.open();
        assert_eq!(up.get(), 1);
        new.open();
        old.close();
        assert_eq!(up.get(), 0);
    }

    #[test]
    fn failures_in_a_row_open_it() {
        let up = prometheus::IntGauge::new("up", "up").unwrap();
        let breaker = Breaker::new(up.clone(), prometheus::IntCounter::new("n", "n").unwrap());
        assert!(breaker.is_open(), "nothing has been heard yet");
        breaker.begin();
        breaker.close();
        for _ in 0..10 {
            breaker.failed();
            breaker.failed();
            breaker.succeeded();
        }
        assert!(!breaker.is_open() && up.get() == 1);
        (0..FAILURES).for_each(|_| breaker.failed());
        assert!(breaker.is_open() && up.get() == 0);
    }
}
