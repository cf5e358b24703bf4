//! What the store has refused, and until when: so long, this node refuses it by itself.
//!
//! A state's time grows, so a key that has no cell now has none before the time that was said: a flood that is refused does
//! not reach the store. But an operator may empty it, and nodes that lease give back what they do not use: after a second the
//! store is asked again. When it was away nothing is remembered of it.

use super::{Check, Key, Outcome, Outcomes, is_final, nanos};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::time::Duration;

const SHARDS: usize = 64;

/// As long as a refusal is believed at most.
const BELIEVED: u64 = 1_000_000_000;

/// Nanoseconds for which no room is made in a shard that was found full.
const FULL_FOR: u64 = 10_000_000;

/// Times are nanoseconds of this node's clock.
#[derive(Default)]
struct Shard {
    /// By key: until when the refusal is believed, and when it has a cell again.
    until: HashMap<Key, (u64, u64)>,
    full_until: u64,
}

/// What is refused.
pub(super) struct Denials {
    shards: Box<[Mutex<Shard>]>,
    /// Keys of a shard at most. Which are not remembered the store is asked about again.
    room: usize,
}

impl Denials {
    /// For so many keys at most.
    pub(super) fn new(keys: usize) -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), room: (keys / SHARDS).max(1) }
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        self.shards.iter().for_each(|shard| shard.lock().until.clear());
    }

    /// Refuses a request that the store would refuse.
    pub(super) fn refuse(&self, now: u64, checks: &[Check], outcomes: &mut Outcomes) -> bool {
        outcomes.clear();
        let mut refused = false;
        for check in checks {
            let shard = self.shards.get(check.key.shard(SHARDS));
            let until = shard.and_then(|shard| shard.lock().until.get(&check.key).copied());
            outcomes.push(match until {
                Some((believed, until)) if believed > now && is_final(check) && check.cost <= check.gcra.burst() => {
                    refused = true;
                    let more = check.gcra.increment(check.cost.saturating_sub(1));
                    Outcome::Refused(Some(Duration::from_nanos(until.saturating_sub(now).saturating_add(more))))
                }
                _ => Outcome::Allowed,
            });
        }
        refused
    }

    /// Notes what the store has refused, when it was asked at `sent`.
    pub(super) fn learn(&self, sent: u64, checks: &[Check], outcomes: &Outcomes) {
        for (check, outcome) in checks.iter().zip(outcomes) {
            let Outcome::Refused(Some(wait)) = outcome else { continue };
            // Of a request that costs more it says nothing about one that costs less.
            if check.cost != 1 || !is_final(check) {
                continue;
            }
            let Some(mut shard) = self.shards.get(check.key.shard(SHARDS)).map(Mutex::lock) else { continue };
            if shard.until.len() >= self.room && shard.full_until <= sent {
                shard.until.retain(|_, (believed, _)| *believed > sent);
                shard.full_until = sent.saturating_add(FULL_FOR);
            }
            if shard.until.len() < self.room {
                let until = sent.saturating_add(nanos(*wait));
                shard.until.insert(check.key, (until.min(sent.saturating_add(BELIEVED)), until));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limiter::gcra::Gcra;

    fn check(key: u128, cost: u32) -> Check {
        let gcra = Gcra::new(1, Duration::from_secs(1), 5).unwrap();
        Check {
            key: Key(key),
            gcra,
            cost,
            enforce: true,
            exempt: false,
            on_failure: Default::default(),
            overflow: Key(0),
            top_up: None,
        }
    }

    #[test]
    fn refuses_for_a_second_at_most_and_says_how_long_it_will_be() {
        let denials = Denials::new(1000);
        let mut outcomes = Outcomes::new();
        let second = Duration::from_secs(1);
        let told = 5 * second;
        let checks = [check(1, 1), check(2, 1)];
        assert!(!denials.refuse(1, &checks, &mut outcomes));
        outcomes[1] = Outcome::Refused(Some(told));
        denials.learn(100, &checks, &outcomes);
        assert!(denials.refuse(200, &checks, &mut outcomes));
        assert_eq!(outcomes[..], [Outcome::Allowed, Outcome::Refused(Some(told - Duration::from_nanos(100)))]);
        assert!(denials.refuse(1_000_000_099, &checks, &mut outcomes));
        assert!(!denials.refuse(1_000_000_100, &checks, &mut outcomes));
        assert!(!denials.refuse(200, &[Check { enforce: false, ..check(2, 1) }], &mut outcomes), "a shadow");
        assert!(!denials.refuse(200, &[check(2, 6)], &mut outcomes), "that is refused for good, and by the store");
        assert!(denials.refuse(200, &[check(2, 3)], &mut outcomes));
        assert_eq!(outcomes[0], Outcome::Refused(Some(7 * second - Duration::from_nanos(100))));
    }

    #[test]
    fn of_what_costs_more_it_learns_nothing_and_it_has_a_bound() {
        let denials = Denials::new(64);
        let mut outcomes = Outcomes::new();
        outcomes.push(Outcome::Refused(Some(Duration::from_secs(1))));
        denials.learn(1, &[check(1, 2)], &outcomes);
        assert!(!denials.refuse(2, &[check(1, 1)], &mut outcomes.clone()));
        for n in 0..10_000u128 {
            denials.learn(1, &[check(n << 13 | n, 1)], &outcomes);
        }
        assert!(denials.shards.iter().all(|shard| shard.lock().until.len() <= 1));
    }
}
