//! The generic cell rate algorithm (ITU-T I.371), as governor has it, with time as an argument.
//!
//! A key's state is one number: its theoretical arrival time, at which it has all its burst again. It has no window, so
//! there is no edge at which twice the rate gets through; and a state whose time has passed says no more than none.
//! governor's own type decides one key at a time and charges it as it decides, which cannot be all or nothing for several
//! limits; the arithmetic is the same, and a property test holds the two together.

use std::time::Duration;

/// A rate and a burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gcra {
    /// Nanoseconds a cell takes to come back.
    cell: u64,
    /// Cells that may be taken at once.
    burst: u32,
}

/// A key may not take so many cells now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TooMany {
    /// It may after this time.
    Wait(Duration),
    /// It may never take so many at once.
    Never,
}

impl Gcra {
    /// `rate` cells in `period`, `burst` at once. None where a cell would take no time, there is no burst, or a burst takes
    /// more than a century to come back: beyond that the clock's 64 bits would saturate, and a saturated limit is none.
    pub fn new(rate: u32, period: Duration, burst: u32) -> Option<Self> {
        const CENTURY: u128 = 100 * 366 * 86_400 * 1_000_000_000;
        let cell = period.as_nanos().checked_div(u128::from(rate)).filter(|cell| *cell > 0)?;
        let fits = burst > 0 && cell.checked_mul(u128::from(burst)).is_some_and(|window| window <= CENTURY);
        fits.then_some(Self { cell: u64::try_from(cell).ok()?, burst })
    }

    /// Cells that may be taken at once.
    pub fn burst(&self) -> u32 {
        self.burst
    }

    /// How long a whole burst takes to come back.
    pub fn window(&self) -> Duration {
        Duration::from_nanos(self.cell.saturating_mul(u64::from(self.burst)))
    }

    /// Takes `cost` cells at `now` from a key whose theoretical arrival time is `tat`: its new one.
    ///
    /// # Errors
    /// [`TooMany`] where it has not so many.
    #[inline]
    pub fn take(&self, tat: u64, now: u64, cost: u32) -> Result<u64, TooMany> {
        if cost > self.burst {
            return Err(TooMany::Never);
        }
        let tat = tat.max(now).saturating_add(self.cell.saturating_mul(u64::from(cost)));
        let latest = now.saturating_add(self.cell.saturating_mul(u64::from(self.burst)));
        if tat <= latest { Ok(tat) } else { Err(TooMany::Wait(Duration::from_nanos(tat - latest))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use governor::clock::FakeRelativeClock;
    use governor::{Quota, RateLimiter};
    use proptest::prelude::*;
    use std::num::NonZeroU32;

    proptest! {
        /// governor is the oracle: the same arrivals and costs, the same answers.
        #[test]
        fn decides_as_governor_does(
            rate in 1u32..1000, burst in 1u32..50,
            arrivals in prop::collection::vec((0u64..3_000_000_000, 1u32..60), 1..200),
        ) {
            let clock = FakeRelativeClock::default();
            let quota = Quota::with_period(Duration::from_secs(1) / rate).unwrap()
                .allow_burst(NonZeroU32::new(burst).unwrap());
            let oracle = RateLimiter::direct_with_clock(quota, clock.clone());
            let ours = Gcra::new(rate, Duration::from_secs(1), burst).unwrap();
            let (mut now, mut tat) = (0u64, 0u64);
            for (pause, cost) in arrivals {
                now += pause;
                clock.advance(Duration::from_nanos(pause));
                let theirs = matches!(oracle.check_n(NonZeroU32::new(cost).unwrap()), Ok(Ok(())));
                let taken = ours.take(tat, now, cost);
                prop_assert_eq!(taken.is_ok(), theirs, "at {} of {}", cost, now);
                match taken {
                    Ok(new) => tat = new,
                    // Who waits exactly as long as told is let in, and not a nanosecond earlier.
                    Err(TooMany::Wait(wait)) => {
                        let then = now + wait.as_nanos() as u64;
                        prop_assert!(ours.take(tat, then, cost).is_ok());
                        prop_assert!(ours.take(tat, then - 1, cost).is_err());
                    }
                    Err(TooMany::Never) => prop_assert!(cost > burst),
                }
            }
        }
    }

    #[test]
    fn no_rate_is_no_limit() {
        assert!(Gcra::new(0, Duration::from_secs(1), 1).is_none());
        assert!(Gcra::new(1, Duration::from_secs(1), 0).is_none());
        assert!(Gcra::new(u32::MAX, Duration::from_nanos(1), 1).is_none());
        assert!(Gcra::new(1, Duration::from_secs(86_400), u32::MAX).is_none(), "it would let everything through");
    }
}
