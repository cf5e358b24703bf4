use super::*;
use crate::limiter::TopUp;
use proptest::prelude::*;
use std::sync::Arc;
use std::time::Duration;

const SECOND: u64 = 1_000_000_000;

fn store(budget: usize) -> Memory {
    Memory::new(budget, prometheus::IntCounter::new("overflowed", "overflowed").unwrap()).unwrap()
}

/// What a hash makes of a number: keys are spread (splitmix64, twice).
fn key(n: u64) -> Key {
    let mix = |n: u64| {
        let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let n = (n ^ n >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let n = (n ^ n >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        n ^ n >> 31
    };
    Key(u128::from(mix(n)) << 64 | u128::from(mix(n ^ 0x5555_5555_5555)))
}

fn check(n: u64, burst: u32) -> Check {
    let gcra = Gcra::new(1, Duration::from_secs(1), burst).unwrap();
    Check {
        key: key(n),
        gcra,
        cost: 1,
        enforce: true,
        exempt: false,
        on_failure: Default::default(),
        overflow: Key(0),
        top_up: None,
    }
}

fn ask<L: Locks>(store: &Memory<L>, now: u64, checks: &[Check]) -> (bool, Vec<Outcome>) {
    ask_with(store, now, checks, &[], true)
}

fn ask_with<L: Locks>(
    store: &Memory<L>,
    now: u64,
    checks: &[Check],
    seconds: &[TopUp],
    charge: bool,
) -> (bool, Vec<Outcome>) {
    let mut outcomes = Outcomes::new();
    let pass = store.decide(now, &Ask { checks, seconds, charge, partition: 0 }, &mut outcomes);
    (pass, outcomes.to_vec())
}

#[test]
fn a_refused_request_is_charged_to_none() {
    let store = store(1 << 20);
    let (wide, narrow) = (check(1, 3), check(2, 1));
    assert!(ask(&store, SECOND, &[wide, narrow]).0);
    for _ in 0..10 {
        let (pass, outcomes) = ask(&store, SECOND, &[wide, narrow]);
        assert!(!pass);
        assert_eq!(outcomes, [Outcome::Allowed, Outcome::Refused(Some(Duration::from_secs(1)))]);
    }
    assert!(ask(&store, SECOND, &[wide]).0);
    assert!(ask(&store, SECOND, &[wide]).0);
    assert!(!ask(&store, SECOND, &[wide]).0, "ten refusals took nothing, two requests took the rest");
}

#[test]
fn shadows_change_nothing() {
    let store = store(1 << 20);
    let shadow = Check { enforce: false, ..check(1, 1) };
    assert_eq!(ask(&store, SECOND, &[shadow, check(2, 9)]).1, [Outcome::Allowed; 2]);
    let (pass, outcomes) = ask(&store, SECOND, &[shadow, check(2, 9)]);
    assert!(pass);
    assert_eq!(outcomes, [Outcome::Refused(Some(Duration::from_secs(1))), Outcome::Allowed]);
}

#[test]
fn a_token_tops_up_into_a_second_limit() {
    let store = store(1 << 20);
    let first = check(1, 1);
    let second = check(9, 2);
    let seconds = [TopUp { key: second.key, gcra: second.gcra, overflow: Key(1) }];
    let with = || ask_with(&store, SECOND, &[Check { top_up: Some(0), ..first }], &seconds, true);
    assert_eq!(with().1, [Outcome::Allowed]);
    assert_eq!(with().1, [Outcome::ToppedUp]);
    assert_eq!(with().1, [Outcome::ToppedUp]);
    assert!(!with().0);
    assert!(!ask(&store, SECOND, &[first]).0);
}

#[test]
fn asking_without_charging_takes_nothing() {
    let store = store(1 << 20);
    for _ in 0..5 {
        assert!(ask_with(&store, SECOND, &[check(1, 1)], &[], false).0);
    }
    assert!(ask(&store, SECOND, &[check(1, 1)]).0);
    assert!(!ask(&store, SECOND, &[check(1, 1)]).0);
}

#[test]
fn what_is_owed_is_paid_first() {
    let store = store(1 << 20);
    let one = check(1, 3);
    store.charge(SECOND, &[Check { cost: 5, ..one }]);
    let (pass, outcomes) = ask(&store, SECOND, &[one]);
    assert!(!pass);
    assert_eq!(outcomes, [Outcome::Refused(Some(Duration::from_secs(3)))], "five of three are taken, and one more");
    assert!(ask(&store, 4 * SECOND, &[one]).0);
}

#[test]
fn at_32_octets_a_key_every_key_has_room() {
    fill(20_000);
    fill(1_000_000);
}

fn fill(keys: usize) {
    let store = store(32 * keys);
    assert!(store.octets() <= 32 * keys, "{}", store.octets());
    for n in 0..keys as u64 {
        assert!(ask(&store, SECOND, &[check(n, 1)]).0);
    }
    assert_eq!(store.overflowed.get(), 0);
    // And each is known by itself, wherever it was moved to.
    for n in 0..keys as u64 {
        assert!(!ask(&store, SECOND, &[check(n, 1)]).0, "{n}");
    }
    for n in 0..keys as u64 {
        assert!(ask(&store, 2 * SECOND, &[check(n, 1)]).0, "{n}");
    }
}

#[test]
fn of_any_budget_a_table_takes_no_more_and_not_much_less() {
    for budget in [64 << 10, 1 << 20, 5_000_000, 64 << 20, 127 << 20, 200_000_000, 320_000_000, 3 << 30] {
        let store = store(budget);
        assert!(store.octets() <= budget, "{} of {budget}", store.octets());
        assert!(store.octets() > budget * 7 / 8, "{} of {budget}", store.octets());
        let one = check(budget as u64, 1);
        assert!(ask(&store, SECOND, &[one]).0 && !ask(&store, SECOND, &[one]).0);
    }
}

#[test]
fn a_flood_grows_nothing_and_resets_nobody() {
    let store = store(64 << 10);
    let octets = store.octets();
    let capacity = store.capacity();
    assert!(octets <= 64 << 10);
    // Known keys have spent two of their three cells, at different times.
    let known: Vec<_> = (0..50).map(|i| check(i, 3)).collect();
    for (i, one) in known.iter().enumerate() {
        let at = SECOND + i as u64 * 1000;
        assert!(ask(&store, at, &[*one]).0 && ask(&store, at, &[*one]).0);
    }
    let made_up = |i: usize| Check { overflow: Key(77), ..check(1_000_000 + i as u64, 3) };
    let now = SECOND + 100_000;
    let let_in = (0..capacity * 20).filter(|i| ask(&store, now, &[made_up(*i)]).0).count();
    assert!(let_in <= capacity - known.len() + 3, "free places, and the burst of the overflow bucket: {let_in}");
    assert!(let_in > capacity * 9 / 10, "{let_in} of {capacity}");
    assert_eq!(store.overflowed.get() as usize, capacity * 20 - let_in + 3);
    assert_eq!(store.octets(), octets);
    // Not late: the third cell is theirs. Not early: the fourth comes when it would have come.
    assert!(known.iter().all(|one| ask(&store, now, &[*one]).0), "late");
    for (i, one) in known.iter().enumerate() {
        let at = SECOND + i as u64 * 1000;
        assert!(!ask(&store, at + SECOND - 1, &[*one]).0, "early");
        assert!(ask(&store, at + SECOND, &[*one]).0, "late");
    }
}

#[test]
fn two_keys_of_one_request_never_share_a_place() {
    let store = store(1);
    let a = check(1, 1);
    let b = check(2, 1);
    assert!(ask(&store, SECOND, &[a, b]).0);
    assert!(!ask(&store, SECOND, &[a]).0);
    assert!(!ask(&store, SECOND, &[b]).0);
}

#[test]
fn threads_on_one_key_admit_exactly_the_burst() {
    let store = store(1 << 20);
    let checks = [check(1, 1000), check(2, 700), check(3, 900)];
    let admitted: usize = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..4).map(|_| scope.spawn(|| (0..1000).filter(|_| ask(&store, SECOND, &checks).0).count())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert_eq!(admitted, 700);
    let rest = |one: Check| (0..2000).filter(|_| ask(&store, SECOND, &[one]).0).count();
    assert_eq!((rest(checks[0]), rest(checks[2])), (300, 200), "the refused ones were charged nowhere");
}

#[test]
fn who_comes_late_forgives_nothing() {
    // Pairs of threads read the clock, and get the locks in the other order.
    let store = Memory::<ParkingLot>::with_locks(4096, 1, prometheus::IntCounter::new("o", "o").unwrap()).unwrap();
    let keys: Vec<_> = (0..120).map(|n| check(n, 2)).collect();
    for round in 1..50 {
        let at = round * 5 * SECOND;
        for one in &keys {
            assert!(ask(&store, at, &[*one]).0 && ask(&store, at, &[*one]).0);
            // Both cells are taken, whatever time it was when this one looked at the clock.
            for early in [0, 1, SECOND, 2 * SECOND, 4 * SECOND] {
                assert!(!ask(&store, at - early, &[*one]).0);
            }
        }
    }
}

// === The model: a map without bound, one request after another ===

#[derive(Clone, Default)]
struct Model(HashMap<Key, u64>);

impl Model {
    fn decide(&mut self, now: u64, checks: &[Check], seconds: &[TopUp], charge: bool) -> (bool, Vec<Outcome>) {
        let mut after = self.0.clone();
        let mut pass = true;
        let mut outcomes = vec![];
        for check in checks {
            let mut ask = |key: Key, gcra: Gcra| {
                let tat = after.get(&key).copied().unwrap_or(0);
                gcra.take(tat, now, check.cost).map(|new| after.insert(key, new))
            };
            let second = check.top_up.map(|at| seconds[usize::from(at)]);
            let outcome = match (ask(check.key, check.gcra), second) {
                (Ok(_), _) => Outcome::Allowed,
                (Err(_), Some(second)) if ask(second.key, second.gcra).is_ok() => Outcome::ToppedUp,
                (Err(TooMany::Wait(wait)), _) => Outcome::Refused(Some(wait)),
                (Err(TooMany::Never), _) => Outcome::Refused(None),
            };
            pass &= !check.enforce || !matches!(outcome, Outcome::Refused(_));
            outcomes.push(outcome);
        }
        if pass && charge {
            self.0 = after;
        }
        (pass, outcomes)
    }
}

/// A limit's check on one of a few keys, and its second limit.
fn some_check() -> impl Strategy<Value = (Check, Option<TopUp>)> {
    (0u64..40, 1u32..6, 1u32..8, any::<bool>(), prop::option::of(40u64..60)).prop_map(
        |(n, burst, cost, enforce, second)| {
            // A key has one rate: the burst follows from the key.
            let burst = burst.min(1 + n as u32 % 5);
            let top_up = second.map(|n| TopUp { key: key(n), gcra: check(n, 2).gcra, overflow: Key(1) });
            (Check { cost, enforce, ..check(n * 8 + u64::from(burst), burst) }, top_up)
        },
    )
}

proptest! {
    #[test]
    fn decides_as_the_model_does(
        requests in prop::collection::vec(
            (0u64..2_000_000_000, prop::collection::vec(some_check(), 1..5), prop::bool::weighted(0.9)), 1..150),
    ) {
        // Room for some hundreds of keys in a single shard: they meet, move, and free each other's places.
        let store = Memory::<ParkingLot>::with_locks(
            16 << 10, 1, prometheus::IntCounter::new("o", "o").unwrap()).unwrap();
        let mut model = Model::default();
        let mut now = 1;
        for (pause, checks, charge) in requests {
            now += pause;
            let mut seconds = vec![];
            let checks: Vec<Check> = checks
                .into_iter()
                .map(|(check, second)| {
                    let top_up = second.map(|_| seconds.len() as u16);
                    seconds.extend(second);
                    Check { top_up, ..check }
                })
                .collect();
            let said = ask_with(&store, now, &checks, &seconds, charge);
            prop_assert_eq!(said, model.decide(now, &checks, &seconds, charge));
            prop_assert_eq!(store.overflowed.get(), 0);
        }
    }
}

// === Threads that meet, under every schedule that shuttle tries ===

struct Shuttle;

/// A table of the least size, in as many shards as may be.
fn small<L: Locks>(shards: usize) -> Memory<L> {
    Memory::with_locks(shards << 17, shards, prometheus::IntCounter::new("overflowed", "overflowed").unwrap()).unwrap()
}

impl Locks for Shuttle {
    type Mutex<T: Send> = shuttle::sync::Mutex<T>;
    type Guard<'a, T: Send + 'a> = shuttle::sync::MutexGuard<'a, T>;

    fn mutex<T: Send>(of: T) -> Self::Mutex<T> {
        shuttle::sync::Mutex::new(of)
    }

    fn lock<T: Send>(mutex: &Self::Mutex<T>) -> Self::Guard<'_, T> {
        mutex.lock().unwrap()
    }
}

/// A request, and what was said of it.
type Answered = (Vec<Check>, (bool, Vec<Outcome>));

/// Whether some order of all threads' requests, each thread's own kept, gives the answers that were given.
fn has_an_order(model: &Model, now: u64, threads: &[&[Answered]]) -> bool {
    threads.iter().all(|thread| thread.is_empty())
        || (0..threads.len()).any(|i| {
            let Some(((checks, answer), rest)) = threads[i].split_first() else { return false };
            let mut model = model.clone();
            let mut threads = threads.to_vec();
            threads[i] = rest;
            model.decide(now, checks, &[], true) == *answer && has_an_order(&model, now, &threads)
        })
}

#[test]
fn under_any_schedule_there_is_an_order_that_explains_all_answers() {
    let run = || {
        // Requests that share keys in different orders, in two shards; with a refusal that takes back what it took.
        let store = Arc::new(small::<Shuttle>(2));
        let (a, b, c) = (check(1, 2), check(2, 1), check(3, 2));
        let shadow = Check { enforce: false, ..b };
        let scripts = [vec![vec![a, b], vec![c, a]], vec![vec![b, a], vec![shadow, c]], vec![vec![c, b], vec![a]]];
        let threads: Vec<_> = scripts
            .into_iter()
            .map(|script| {
                let store = store.clone();
                shuttle::thread::spawn(move || {
                    script.into_iter().map(|checks| (checks.clone(), ask(&store, SECOND, &checks))).collect::<Vec<_>>()
                })
            })
            .collect();
        let answers: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        let answers: Vec<_> = answers.iter().map(Vec::as_slice).collect();
        assert!(has_an_order(&Model::default(), SECOND, &answers), "{answers:?}");
    };
    shuttle::check_random(run, 2_000);
    shuttle::check_pct(run, 1_000, 3);
}

#[test]
fn under_any_schedule_one_key_admits_its_burst() {
    let run = || {
        let store = Arc::new(small::<Shuttle>(1));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let store = store.clone();
                shuttle::thread::spawn(move || (0..3).filter(|_| ask(&store, SECOND, &[check(1, 5)]).0).count())
            })
            .collect();
        let admitted: usize = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
        assert_eq!(admitted, 5);
    };
    shuttle::check_random(run, 2_000);
}

#[test]
fn another_table_takes_over_what_one_knows() {
    let before = store(1 << 20);
    for n in 0..2000 {
        assert!(ask(&before, SECOND, &[check(n, 3)]).0);
    }
    for octets in [4 << 20, 256 << 10] {
        let after = store(octets);
        after.absorb(&before, SECOND);
        for n in 0..2000 {
            let left = (0..5).filter(|_| ask(&after, SECOND, &[check(n, 3)]).0).count();
            assert_eq!(left, 2, "one of three was taken before");
        }
    }
}
