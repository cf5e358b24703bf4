//! The generic cell rate algorithm (ITU-T I.371), as governor has it, with time as an argument.
//!
//! A key's state is one number: its theoretical arrival time, at which it has all its burst again. It has no window, so
//! there is no edge at which twice the rate gets through; and a state whose time has passed says no more than none.
//! governor's own type decides one key at a time and charges it as it decides, which cannot be all or nothing for several
//! limits; the arithmetic is the same, and a property test holds the two together.

use std::time::Duration;

/// A rate and a burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gcra {
    /// What a cell takes to come back, in nanoseconds of 2^16 parts: an octet's time may be less than a nanosecond.
    cell: u64,
    /// Nanoseconds a whole burst takes to come back.
    window: u64,
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

/// Bits of [`Gcra::cell`] below a nanosecond.
const FRACTION: u32 = 16;

impl Gcra {
    /// `rate` cells in `period`, `burst` at once; a cell takes whole nanoseconds, rounded down, as governor has it, if it takes a
    /// microsecond or more, and parts of one below. None where a cell would take
    /// no time, there is no burst, or a burst takes more than a century to come back: beyond that the clock's 64 bits would
    /// saturate, and a saturated limit is none.
    pub fn new(rate: u32, period: Duration, burst: u32) -> Option<Self> {
        let cell = period.as_nanos().checked_div(u128::from(rate)).filter(|cell| *cell > 0)?;
        if cell < 1000 {
            return Self::of_octets(u64::from(rate), period, burst);
        }
        Self::of_cell(cell.checked_shl(FRACTION)?, burst)
    }

    /// As [`Gcra::new`], of cells that are octets, which take parts of a nanosecond: up to 65,536 of them in one.
    pub fn of_octets(rate: u64, period: Duration, burst: u32) -> Option<Self> {
        let cell = period.as_nanos().checked_shl(FRACTION)?.checked_div(u128::from(rate)).filter(|cell| *cell > 0)?;
        Self::of_cell(cell, burst)
    }

    fn of_cell(cell: u128, burst: u32) -> Option<Self> {
        const CENTURY: u128 = 100 * 366 * 86_400 * 1_000_000_000;
        let window = cell.checked_mul(u128::from(burst))?.checked_add((1 << FRACTION) - 1)? >> FRACTION;
        let fits = burst > 0 && window <= CENTURY;
        fits.then_some(Self { cell: u64::try_from(cell).ok()?, window: u64::try_from(window).ok()?, burst })
    }

    /// Cells that may be taken at once.
    pub fn burst(&self) -> u32 {
        self.burst
    }

    /// How long a whole burst takes to come back.
    pub fn window(&self) -> Duration {
        Duration::from_nanos(self.window)
    }

    /// Nanoseconds that `cost` cells take to come back, rounded up.
    #[inline]
    pub fn increment(&self, cost: u32) -> u64 {
        let parts = u128::from(self.cell) * u128::from(cost) + ((1 << FRACTION) - 1);
        u64::try_from(parts >> FRACTION).unwrap_or(u64::MAX)
    }

    /// Nanoseconds that a cell takes to come back, with their fraction.
    pub fn cell(&self) -> f64 {
        self.cell as f64 / f64::from(1 << FRACTION)
    }

    /// Cells a key has, if `cost` of them are to be had in `wait`.
    pub fn left(&self, cost: u32, wait: Duration) -> u32 {
        let lacking = (wait.as_nanos() << FRACTION).div_ceil(u128::from(self.cell.max(1)));
        cost.saturating_sub(u32::try_from(lacking).unwrap_or(u32::MAX))
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
        let tat = self.charge(tat, now, cost);
        let latest = now.saturating_add(self.window);
        if tat <= latest { Ok(tat) } else { Err(TooMany::Wait(Duration::from_nanos(tat - latest))) }
    }

    /// Takes `cost` cells, whether or not there are so many: what has been used already is owed.
    #[inline]
    pub fn charge(&self, tat: u64, now: u64, cost: u32) -> u64 {
        tat.max(now).saturating_add(self.increment(cost))
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

    proptest! {
        /// Cells of less than a nanosecond: never more than the rate, and less by no more than what rounding takes.
        #[test]
        fn octets_hold_their_rate(rate in 1u64..20_000_000_000, sizes in prop::collection::vec(1u32..5_000_000, 1..200)) {
            let burst = 5_000_000;
            let Some(gcra) = Gcra::of_octets(rate, Duration::from_secs(1), burst) else { return Ok(()) };
            let (mut tat, mut now, mut taken) = (0, 1u64, 0u128);
            for size in &sizes {
                match gcra.take(tat, now, *size) {
                    Ok(new) => tat = new,
                    Err(TooMany::Wait(wait)) => {
                        now += wait.as_nanos() as u64;
                        tat = gcra.take(tat, now, *size).expect("who waits as told is let in");
                    }
                    Err(TooMany::Never) => unreachable!("no size is above the burst"),
                }
                taken += u128::from(*size);
                let fair = u128::from(burst) + u128::from(rate) * u128::from(now) / 1_000_000_000 + 1;
                // The cell is rounded down to a 65,536th of a nanosecond.
                prop_assert!(taken <= fair + fair * u128::from(rate) / (1_000_000_000 << 16) + 1, "{} of {}", taken, fair);
            }
        }
    }

    #[test]
    fn what_is_left_follows_from_the_wait() {
        let gcra = Gcra::new(1, Duration::from_secs(1), 5).unwrap();
        let tat = gcra.take(0, 1, 3).unwrap();
        let Err(TooMany::Wait(wait)) = gcra.take(tat, 1, 4) else { panic!("two are left") };
        assert_eq!(gcra.left(4, wait), 2);
    }

    #[test]
    fn no_rate_is_no_limit() {
        assert!(Gcra::new(0, Duration::from_secs(1), 1).is_none());
        assert!(Gcra::new(1, Duration::from_secs(1), 0).is_none());
        assert!(Gcra::new(u32::MAX, Duration::from_nanos(1), 1).is_none());
        assert!(Gcra::new(1, Duration::from_secs(86_400), u32::MAX).is_none(), "it would let everything through");
    }
}
