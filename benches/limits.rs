//! What limits' state costs: in this node's memory beside two other stores, and in a fleet's Redis beside Redis itself.
//!
//! - `check`: one check of one key of 1, 1,000 and 10,000,000, in [`Memory`] (`ours`), in governor's keyed DashMap store and
//!   in pingora-limits' `Rate`, which is a sketch and holds no key. A *hit* is of a key that is there, a *miss* of one never
//!   seen. Each reads a clock once a check at least: theirs inside, ours as `Limiter` does, beside the call. `key and clock
//!   alone` is what of a figure is the bench's own. governor keeps what has expired until it is told to look for it: it is
//!   told between misses, on time that is not counted, so that its table does not grow without end. By *two threads*, the
//!   throughput is that of both.
//! - `five limits`: the five checks of a request as one decision.
//! - memory per key: what 10,000,000 keys take, and how many found no room at 32 octets a key. Printed before the rest.
//! - redis: decisions of five limits a second, strict and leased, beside `INCR` over the same client, and beside
//!   redis-benchmark with the same script and as many keys. Two rounds, one measurement after the other. A server is
//!   started for it, if `redis-server`, `redis-cli` and `redis-benchmark` are on the PATH.
//!
//! A filter that has `memory` or `redis` in it runs that part; any other leaves both out. With `--test`, as without
//! `--bench`, there are 100,000 keys for 10,000,000, and the redis part takes a moment.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group};
use governor::{DefaultKeyedRateLimiter, Quota};
use moh_gateway::limiter::fleet::{Fleet, Mode, Settings};
use moh_gateway::limiter::gcra::Gcra;
use moh_gateway::limiter::memory::Memory;
use moh_gateway::limiter::{Ask, Check, Decided, Key, Limiter, OnFailure, Outcomes};
use moh_gateway::telemetry::Metrics;
use pingora_limits::rate::Rate;
use prometheus::IntCounter;
use redis::aio::MultiplexedConnection;
use std::cell::LazyCell;
use std::hint::black_box;
use std::num::NonZeroU32;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// The program's own.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What a cell takes to come back: a missed key has expired after as long.
const CELL: Duration = Duration::from_millis(1);

/// So generous that nothing is refused.
const BURST: u32 = 3_000_000_000;

/// Cells that keys are filled with: they are there for an hour.
const LIVE: NonZeroU32 = NonZeroU32::new(3_600_000).unwrap();

/// Keys counted from here are in no table.
const UNSEEN: u64 = 1 << 40;

// === Arguments ===

/// Whether Criterion runs each benchmark once, to see that it does.
fn is_test() -> bool {
    let given = |name: &str| std::env::args().any(|arg| arg == name);
    given("--test") || !given("--bench")
}

/// The filter, as Criterion sees it.
fn filter() -> Option<String> {
    const VALUED: [&str; 20] = [
        "-c",
        "--color",
        "--colour",
        "-s",
        "--save-baseline",
        "-b",
        "--baseline",
        "--baseline-lenient",
        "--load-baseline",
        "--format",
        "--profile-time",
        "--sample-size",
        "--warm-up-time",
        "--measurement-time",
        "--nresamples",
        "--noise-threshold",
        "--confidence-level",
        "--significance-level",
        "--plotting-backend",
        "--output-format",
    ];
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        if VALUED.contains(&arg.as_str()) {
            args.next();
        } else if !arg.starts_with('-') {
            return Some(arg);
        }
    }
    None
}

/// As many keys as a large table has.
fn many() -> u64 {
    if is_test() { 100_000 } else { 10_000_000 }
}

// === Keys ===

/// The `n`th number of splitmix64.
#[inline]
fn mix(n: u64) -> u64 {
    let z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The `n`th key.
#[inline]
fn key(n: u64) -> u128 {
    u128::from(mix(2 * n)) << 64 | u128::from(mix(2 * n + 1))
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(mix(seed) | 1)
    }

    #[inline]
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0) * u128::from(end)) >> 64) as u64
    }
}

/// All of `keys` in random order, some of a few often: read in sequence, so that this costs next to nothing.
fn shuffled(keys: u64) -> Vec<u32> {
    let mut random = Random::new(keys);
    let mut order: Vec<u32> = (0..keys.max(1 << 20)).map(|n| (n % keys) as u32).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, random.below(i as u64 + 1) as usize);
    }
    order
}

/// A way through keys in random order, round and round.
struct Walk<'a> {
    order: &'a [u32],
    at: usize,
}

impl<'a> Walk<'a> {
    fn new(order: &'a [u32], at: usize) -> Self {
        Self { order, at }
    }

    #[inline]
    fn next(&mut self) -> u128 {
        self.at = if self.at + 1 < self.order.len() { self.at + 1 } else { 0 };
        key(u64::from(self.order[self.at]))
    }
}

/// A clock of its own, 100 ns a reading, at the price of the node's: what expires does so whatever a reading takes.
struct Clock {
    started: Instant,
    now: u64,
}

impl Clock {
    fn new() -> Self {
        Self { started: Instant::now(), now: 1 }
    }

    #[inline]
    fn now(&mut self) -> u64 {
        black_box(u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX).saturating_add(1));
        self.now += 100;
        self.now
    }
}

// === Stores ===

fn counter() -> IntCounter {
    IntCounter::new("overflowed", "overflowed").unwrap()
}

/// A check that costs `cost`, for its key to be put in.
fn asking(gcra: Gcra, cost: u32) -> Check {
    Check {
        key: Key(0),
        gcra,
        cost,
        enforce: true,
        exempt: false,
        on_failure: OnFailure::Local,
        overflow: Key(1),
        top_up: None,
    }
}

fn gcra() -> Gcra {
    Gcra::new(1, CELL, BURST).unwrap()
}

/// Our table, of so many octets, with `keys` in it.
fn filled(budget: u64, keys: u64) -> (Memory, IntCounter) {
    let overflowed = counter();
    let memory = Memory::new(budget as usize, overflowed.clone()).unwrap();
    let mut check = asking(gcra(), LIVE.get());
    let mut outcomes = Outcomes::new();
    for n in 0..keys {
        check.key = Key(key(n));
        assert!(memory.decide(1, &Ask::of(&[check]), &mut outcomes));
    }
    (memory, overflowed)
}

/// Room for twice the keys, and for those that miss.
fn roomy(keys: u64) -> u64 {
    64 * keys + (1 << 20)
}

fn filled_governor(keys: u64) -> DefaultKeyedRateLimiter<u128> {
    let quota = Quota::with_period(CELL).unwrap().allow_burst(NonZeroU32::new(BURST).unwrap());
    let store = DefaultKeyedRateLimiter::dashmap(quota);
    (0..keys).for_each(|n| assert!(store.check_key_n(&key(n), LIVE).unwrap().is_ok()));
    store
}

/// What two threads take that run the same at once.
fn by_two(run: impl Fn(usize) + Sync) -> Duration {
    let (run, barrier) = (&run, &Barrier::new(2));
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|thread| {
            scope.spawn(move || {
                barrier.wait();
                let started = Instant::now();
                run(thread);
                started.elapsed()
            })
        });
        threads.map(|thread| thread.join().unwrap()).into_iter().max().unwrap()
    })
}

// === Checks ===

fn alone(group: &mut BenchmarkGroup<'_, WallTime>, keys: u64, order: &[u32]) {
    let (mut walk, mut clock) = (Walk::new(order, 0), Clock::new());
    group.throughput(Throughput::Elements(1));
    group.bench_function(BenchmarkId::new("key and clock alone", keys), |b| {
        b.iter(|| (black_box(walk.next()), clock.now()));
    });
}

/// What this machine takes to read a word of a table as large as ours, where each read depends on the one before: no check
/// of a key that is in no cache can take less.
fn bare(group: &mut BenchmarkGroup<'_, WallTime>, keys: u64) {
    let words = LazyCell::new(|| (0..keys * 8).map(key).map(|key| key as u64).collect::<Vec<_>>());
    let (mut at, mut n) = (0, 0u64);
    group.throughput(Throughput::Elements(1));
    group.bench_function(BenchmarkId::new("one read of as much memory", keys), |b| {
        let words = &*words;
        b.iter(|| {
            n += 1;
            at = ((words[at] ^ n) % words.len() as u64) as usize;
            black_box(at)
        });
    });
}

fn ours(group: &mut BenchmarkGroup<'_, WallTime>, keys: u64, order: &[u32]) {
    let store = LazyCell::new(|| filled(roomy(keys), keys));
    let (mut walk, mut clock, mut unseen) = (Walk::new(order, 0), Clock::new(), UNSEEN);
    let (mut checks, mut outcomes) = ([asking(gcra(), 1)], Outcomes::new());
    group.throughput(Throughput::Elements(1));
    group.bench_function(BenchmarkId::new("hit, ours", keys), |b| {
        let (memory, _) = &*store;
        b.iter(|| {
            checks[0].key = Key(walk.next());
            assert!(memory.decide(clock.now(), &Ask::of(&checks), &mut outcomes));
        });
    });
    group.bench_function(BenchmarkId::new("miss, ours", keys), |b| {
        let (memory, _) = &*store;
        b.iter(|| {
            unseen += 1;
            checks[0].key = Key(key(unseen));
            assert!(memory.decide(clock.now(), &Ask::of(&checks), &mut outcomes));
        });
    });
    let places = [AtomicUsize::new(0), AtomicUsize::new(order.len() / 2)];
    group.throughput(Throughput::Elements(2));
    group.bench_function(BenchmarkId::new("hit by two threads, ours", keys), |b| {
        let (memory, overflowed) = &*store;
        b.iter_custom(|iters| {
            by_two(|thread| {
                let mut walk = Walk::new(order, places[thread].load(Ordering::Relaxed));
                let (mut clock, mut outcomes) = (Clock::new(), Outcomes::new());
                let mut checks = [asking(gcra(), 1)];
                for _ in 0..iters {
                    checks[0].key = Key(walk.next());
                    assert!(memory.decide(clock.now(), &Ask::of(&checks), &mut outcomes));
                }
                places[thread].store(walk.at, Ordering::Relaxed);
            })
        });
        assert_eq!(overflowed.get(), 0, "there is room for all");
    });
}

fn governor(group: &mut BenchmarkGroup<'_, WallTime>, keys: u64, order: &[u32]) {
    let store = LazyCell::new(|| filled_governor(keys));
    let (mut walk, mut unseen, mut expired) = (Walk::new(order, 0), UNSEEN, 0);
    group.throughput(Throughput::Elements(1));
    group.bench_function(BenchmarkId::new("hit, governor", keys), |b| {
        let store = &*store;
        b.iter(|| assert!(store.check_key(&walk.next()).is_ok()));
    });
    group.bench_function(BenchmarkId::new("miss, governor", keys), |b| {
        let store = &*store;
        // As many as are in our table when all before them have expired, or what a large table does not grow for.
        let most = (keys / 10).max(10_000);
        b.iter_custom(|iters| {
            let (mut left, mut took) = (iters, Duration::ZERO);
            while left > 0 {
                let misses = left.min(most - expired);
                let started = Instant::now();
                for _ in 0..misses {
                    unseen += 1;
                    assert!(store.check_key(&key(unseen)).is_ok());
                }
                took += started.elapsed();
                (left, expired) = (left - misses, expired + misses);
                if expired == most {
                    std::thread::sleep(3 * CELL);
                    store.retain_recent();
                    expired = 0;
                }
            }
            took
        });
    });
    let places = [AtomicUsize::new(0), AtomicUsize::new(order.len() / 2)];
    group.throughput(Throughput::Elements(2));
    group.bench_function(BenchmarkId::new("hit by two threads, governor", keys), |b| {
        let store = &*store;
        b.iter_custom(|iters| {
            by_two(|thread| {
                let mut walk = Walk::new(order, places[thread].load(Ordering::Relaxed));
                (0..iters).for_each(|_| assert!(store.check_key(&walk.next()).is_ok()));
                places[thread].store(walk.at, Ordering::Relaxed);
            })
        });
    });
}

fn pingora(group: &mut BenchmarkGroup<'_, WallTime>, keys: u64, order: &[u32]) {
    let store = Rate::new(Duration::from_secs(1));
    let (mut walk, mut unseen) = (Walk::new(order, 0), UNSEEN);
    let check = |key: u128| (store.observe(&key, 1), store.rate(&key));
    group.throughput(Throughput::Elements(1));
    group.bench_function(BenchmarkId::new("hit, pingora", keys), |b| b.iter(|| check(walk.next())));
    group.bench_function(BenchmarkId::new("miss, pingora", keys), |b| {
        b.iter(|| {
            unseen += 1;
            check(key(unseen))
        });
    });
}

fn checks(c: &mut Criterion) {
    let mut group = c.benchmark_group("check");
    for keys in [1, 1_000, many()] {
        let order = shuffled(keys);
        // One after the other: each store is gone before the next is filled.
        alone(&mut group, keys, &order);
        bare(&mut group, keys);
        ours(&mut group, keys, &order);
        governor(&mut group, keys, &order);
        pingora(&mut group, keys, &order);
    }
    group.finish();
}

fn five_limits(c: &mut Criterion) {
    let mut group = c.benchmark_group("five limits");
    for keys in [1_000, many()] {
        let order = shuffled(keys);
        let store = LazyCell::new(|| filled(roomy(keys), keys));
        let (mut walk, mut clock) = (Walk::new(&order, 0), Clock::new());
        let (mut checks, mut outcomes) = ([asking(gcra(), 1); 5], Outcomes::new());
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("hits, ours", keys), |b| {
            let (memory, _) = &*store;
            b.iter(|| {
                checks.iter_mut().for_each(|check| check.key = Key(walk.next()));
                assert!(memory.decide(clock.now(), &Ask::of(&checks), &mut outcomes));
            });
        });
    }
    group.finish();
}

// === Memory per key ===

/// Octets of this process that are in memory.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// A hundred million made-up keys against a table that holds a fiftieth of them, and a thousand keys it knows: printed is
/// what became of it, and that a known key is let through early or late ends the run.
fn flood() {
    let (budget, made_up) = (64u64 << 20, if is_test() { 5_000_000 } else { 100_000_000 });
    let gcra = Gcra::new(1, Duration::from_secs(3600), 2).unwrap();
    let overflowed = counter();
    let memory = Memory::new(budget as usize, overflowed.clone()).unwrap();
    let mut outcomes = Outcomes::new();
    let mut ask = |n: u64, now: u64| {
        let check = Check { key: Key(key(n)), gcra, ..asking(gcra, 1) };
        memory.decide(now, &Ask::of(&[check]), &mut outcomes)
    };
    let second = 1_000_000_000u64;
    // One of two cells is taken, each at a time of its own.
    for known in 0..1000 {
        assert!(ask(known, second + known));
    }
    let (resident_before, started) = (resident(), Instant::now());
    let let_in = (0..made_up).filter(|n| ask(UNSEEN + n, 2 * second + n)).count();
    let took = started.elapsed();
    let grown = resident().saturating_sub(resident_before);
    let now = 10 * second;
    assert!((0..1000).all(|known| ask(known, now)), "late");
    for known in 0..1000 {
        assert!(!ask(known, second + known + 3600 * second - 1), "early");
        assert!(ask(known, second + known + 3600 * second), "late");
    }
    println!("flood of {made_up} made-up keys at a table of {} octets:", memory.octets());
    println!("  {let_in} found a place or the overflow bucket's cells, {} decisions fell to that", overflowed.get());
    println!("  resident memory grew by {grown} octets, {:.0} ns a decision", took.as_nanos() as f64 / made_up as f64);
    println!("  of 1000 known keys none was early, none late");
    assert!(grown < budget + (4 << 20) && memory.octets() <= budget as usize);
}

fn memory_per_key() {
    let keys = many();
    let of_each = |octets: u64| octets as f64 / keys as f64;
    println!("memory per key, of {keys} keys:");
    let before = resident();
    let (memory, overflowed) = filled(32 * keys, keys);
    println!("  ours      {:5.1} octets, {:5.1} as the system sees it", of_each(memory.octets() as u64), {
        of_each(resident().saturating_sub(before))
    });
    let (capacity, without) = (memory.capacity(), overflowed.get());
    println!("            {without} keys found no room among {capacity} places");
    // Ours stays: what it gave back would hide what the next one takes.
    let before = resident();
    let store = filled_governor(keys);
    println!("  governor                {:5.1} as the system sees it", of_each(resident().saturating_sub(before)));
    drop((memory, store));
}

// === Redis ===

const SCRIPT: &str = include_str!("../src/limiter/fleet/decide.lua");

/// What a key of redis-benchmark begins with: it has as many octets as one of ours.
const NAME: &str = "moh:{limits}:key:";

const ROUNDS: usize = 2;

/// Threads of the runtime that asks. The store's connections have another one, and there is the server.
const WORKERS: usize = 1;

/// How much is measured.
struct Extent {
    keys: u64,
    seconds: Duration,
    /// Of redis-benchmark; the second is with `-P 16`.
    requests: [u64; 2],
}

/// A redis-server, as long as this lives.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// None if there is none to be started.
    fn start() -> Option<Self> {
        for program in ["redis-server", "redis-cli", "redis-benchmark"] {
            Command::new(program).arg("--version").output().ok()?;
        }
        let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let child = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--daemonize", "no"])
            .args(["--save", "", "--appendonly", "no"])
            .current_dir(std::env::temp_dir())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { child, port };
        let until = Instant::now() + Duration::from_secs(10);
        while server.cli(&["PING"]) != "PONG" {
            assert!(Instant::now() < until, "redis-server does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(server)
    }

    fn run(&self, program: &str, args: &[&str]) -> String {
        let port = self.port.to_string();
        let output = Command::new(program)
            .args(["-h", "127.0.0.1", "-p", &port])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn cli(&self, args: &[&str]) -> String {
        self.run("redis-cli", args)
    }

    /// Requests a second, by redis-benchmark.
    fn benchmark(&self, options: &[&str], command: &[String]) -> f64 {
        let command = command.iter().map(String::as_str);
        let args: Vec<&str> = options.iter().copied().chain(["-c", "64", "--csv"]).chain(command).collect();
        let printed = self.run("redis-benchmark", &args);
        let rate = printed.lines().last().and_then(|line| line.split("\",\"").nth(1)?.parse().ok());
        rate.unwrap_or_else(|| panic!("redis-benchmark printed {printed:?}"))
    }

    /// Five limits' keys and arguments, as the script wants them; `number` is what a key ends with.
    fn command(sha: &str, gcra: &Gcra, number: impl Fn(usize) -> String) -> Vec<String> {
        let micros = |nanos: u128| format!("{}.{:03}", nanos / 1000, nanos % 1000);
        let mut command = vec!["EVALSHA".to_owned(), sha.to_owned(), "5".to_owned()];
        command.extend((0..5).map(|n| format!("{NAME}{}", number(n))));
        command.push("1".to_owned());
        for _ in 0..5 {
            command.extend([micros(u128::from(gcra.increment(1))), micros(gcra.window().as_nanos())]);
            command.extend(["1".to_owned(), "0".to_owned()]);
        }
        command
    }

    /// Fills the keys of redis-benchmark, and those of `INCR`: what is measured finds states that are there.
    fn fill(&self, keys: u64, gcra: &Gcra) {
        const FILL: &str = "local time = redis.call('TIME')
            local now = (time[1] - 1767225600) * 1000000 + time[2]
            local tat = string.format('%.3f', now + ARGV[2] * 1000)
            for n = 0, ARGV[1] - 1 do
                local number = string.format('%012d', n)
                redis.call('SET', ARGV[3] .. number, tat, 'PX', ARGV[2])
                redis.call('SET', 'incr:' .. number, 1)
            end
            return 'OK'";
        let millis = gcra.increment(1) / 1_000_000;
        let filled = self.cli(&["EVAL", FILL, "0", &keys.to_string(), &millis.to_string(), NAME]);
        assert_eq!(filled, "OK");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A limiter of a fleet that is connected, whose keys begin so, and the counter of its calls that were answered.
fn fleet(port: u16, prefix: &str, mode: Mode) -> (Arc<Limiter>, IntCounter) {
    let metrics = Metrics::new(&[]).unwrap().store().unwrap();
    let answered = metrics.ok.clone();
    let settings = Settings {
        nodes: vec![("127.0.0.1".to_owned(), port)],
        cluster: false,
        tls: None,
        username: None,
        password: None,
        prefix: prefix.to_owned(),
        partition_by_provider: false,
        timeout: Duration::from_secs(1),
        connections: 2,
        mode,
        keys: 100_000,
    };
    let fleet = Fleet::start(settings, metrics).unwrap();
    let until = Instant::now() + Duration::from_secs(5);
    while !fleet.is_up() {
        assert!(Instant::now() < until, "the fleet's store does not answer");
        std::thread::sleep(Duration::from_millis(10));
    }
    (Arc::new(Limiter::new(Memory::new(1 << 20, counter()).unwrap(), Some(Arc::new(fleet)))), answered)
}

/// Decides once, of five limits with keys of their own each; `n` gives the number of a limit's key.
async fn decide_five(limiter: &Limiter, checks: &mut [Check; 5], outcomes: &mut Outcomes, mut n: impl FnMut() -> u64) {
    for (limit, check) in (0..).zip(checks.iter_mut()) {
        check.key = Key(key(5 * n() + limit));
    }
    let (pass, by) = limiter.decide(Instant::now(), &Ask::of(checks), outcomes).await;
    assert!(pass && by == Decided::ByStore, "{pass} {by:?}: {outcomes:?}");
}

/// Puts all keys into the store.
async fn fill(limiter: &Arc<Limiter>, keys: u64, gcra: Gcra) {
    const TASKS: usize = 128;
    let mut tasks = JoinSet::new();
    for task in 0..TASKS as u64 {
        let limiter = limiter.clone();
        tasks.spawn(async move {
            let (mut checks, mut outcomes) = ([asking(gcra, 1); 5], Outcomes::new());
            for n in (task..keys / 5).step_by(TASKS) {
                decide_five(&limiter, &mut checks, &mut outcomes, || n).await;
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

/// Decisions a second of so many tasks, each of which asks again once it has its answer.
async fn decisions(limiter: &Arc<Limiter>, tasks: usize, keys: u64, gcra: Gcra, time: Duration) -> f64 {
    let (mut set, started) = (JoinSet::new(), Instant::now());
    for task in 0..tasks {
        let (limiter, mut random) = (limiter.clone(), Random::new(task as u64));
        set.spawn(async move {
            let (mut checks, mut outcomes, mut done) = ([asking(gcra, 1); 5], Outcomes::new(), 0u64);
            while started.elapsed() < time {
                decide_five(&limiter, &mut checks, &mut outcomes, || random.below(keys / 5)).await;
                done += 1;
                // Where nobody waits for the store, others get their turn.
                tokio::task::coop::consume_budget().await;
            }
            done
        });
    }
    rate(set, started).await
}

/// As [`decisions`], with an `INCR` for each over connections like those of a fleet.
async fn increments(links: &[MultiplexedConnection], tasks: usize, keys: u64, time: Duration) -> f64 {
    let (mut set, started) = (JoinSet::new(), Instant::now());
    for task in 0..tasks {
        let (mut link, mut random) = (links[task % links.len()].clone(), Random::new(task as u64));
        set.spawn(async move {
            let mut done = 0u64;
            while started.elapsed() < time {
                let name = format!("incr:{:012}", random.below(keys));
                let count: i64 = redis::cmd("INCR").arg(name).query_async(&mut link).await.unwrap();
                assert!(count > 0);
                done += 1;
            }
            done
        });
    }
    rate(set, started).await
}

async fn rate(mut tasks: JoinSet<u64>, started: Instant) -> f64 {
    let mut done = 0;
    while let Some(of_one) = tasks.join_next().await {
        done += of_one.unwrap();
    }
    done as f64 / started.elapsed().as_secs_f64()
}

/// Connections as a fleet's are made.
async fn connect(port: u16) -> Vec<MultiplexedConnection> {
    let mut links = vec![];
    for _ in 0..2 {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let config = redis::AsyncConnectionConfig::new().set_response_timeout(None).set_pipeline_buffer_size(1024);
        let info = redis::RedisConnectionInfo::default().set_skip_set_lib_name();
        let (link, driver) = MultiplexedConnection::new_with_config(&info, stream, config).await.unwrap();
        tokio::spawn(driver);
        links.push(link);
    }
    links
}

fn redis() {
    let extent = match is_test() {
        true => Extent { keys: 1_000, seconds: Duration::from_millis(100), requests: [2_000, 2_000] },
        false => Extent { keys: 1_000_000, seconds: Duration::from_secs(3), requests: [200_000, 400_000] },
    };
    let Some(server) = Server::start() else {
        println!("redis: left out, redis-server, redis-cli and redis-benchmark are not all on the PATH");
        return;
    };
    // What a key is charged it has for the whole run: no state expires, and none is refused.
    let cold = Gcra::new(1, Duration::from_secs(3600), 100_000).unwrap();
    // Batches of 100 cells, of which there are always more.
    let hot = Gcra::new(100_000, Duration::from_secs(1), 1_000).unwrap();
    let hot_keys = 1_000.min(extent.keys);
    let sha = server.cli(&["SCRIPT", "LOAD", SCRIPT]);
    server.fill(extent.keys, &cold);
    let once = Server::command(&sha, &cold, |n| format!("{n:012}"));
    let answer = server.cli(&once.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(answer.split_whitespace().collect::<Vec<_>>(), ["0"; 5], "the script lets five limits pass");
    let command = Server::command(&sha, &cold, |_| "__rand_int__".to_owned());

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build().unwrap();
    // Other rates are other states.
    let (strict, _) = fleet(server.port, "moh", Mode::Strict);
    let (leased, calls) = fleet(server.port, "hot", Mode::Leased { share: 10, idle: Duration::from_secs(1) });
    runtime.block_on(fill(&strict, extent.keys, cold));
    let links = runtime.block_on(connect(server.port));

    const NAMES: [&str; 8] = [
        "strict, 64 tasks",
        "strict, 256 tasks",
        "leased, 64 tasks, hot keys",
        "leased, 256 tasks, hot keys",
        "INCR, 64 tasks",
        "INCR, 256 tasks",
        "redis-benchmark -c 64",
        "redis-benchmark -c 64 -P 16",
    ];
    let mut rates = [[0.0; ROUNDS]; NAMES.len()];
    let mut per_call = [[0.0; ROUNDS]; 2];
    for round in 0..ROUNDS {
        for (i, tasks) in [64, 256].into_iter().enumerate() {
            rates[i][round] = runtime.block_on(decisions(&strict, tasks, extent.keys, cold, extent.seconds));
            let (before, started) = (calls.get(), Instant::now());
            rates[2 + i][round] = runtime.block_on(decisions(&leased, tasks, hot_keys, hot, extent.seconds));
            let decided = rates[2 + i][round] * started.elapsed().as_secs_f64();
            per_call[i][round] = decided / (calls.get() - before).max(1) as f64;
            rates[4 + i][round] = runtime.block_on(increments(&links, tasks, extent.keys, extent.seconds));
            let (number, keys) = (extent.requests[i].to_string(), extent.keys.to_string());
            let pipeline = ["1", "16"][i];
            rates[6 + i][round] = server.benchmark(&["-n", &number, "-r", &keys, "-P", pipeline], &command);
        }
    }

    println!("\nredis: decisions of five limits a second (INCR: commands), among {} keys", extent.keys);
    println!("{:30}{:>12}{:>12}{:>12}{:>12}{:>12}", "", "round 1", "round 2", "mean", "of -P 1", "of -P 16");
    let mean = |row: usize| rates[row].iter().sum::<f64>() / ROUNDS as f64;
    for (row, name) in NAMES.iter().enumerate() {
        let [first, second] = rates[row];
        let (mean, of_one, of_many) = (mean(row), mean(row) / mean(6), mean(row) / mean(7));
        println!("{name:30}{first:12.0}{second:12.0}{mean:12.0}{of_one:12.2}{of_many:12.2}");
    }
    for (tasks, [first, second]) in [64, 256].into_iter().zip(per_call) {
        println!("leased, {tasks} tasks: {first:.1} and {second:.1} decisions for each call of Redis");
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(50)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3));
    targets = checks, five_limits
}

fn main() {
    let filter = filter();
    let listed = std::env::args().any(|arg| arg == "--list");
    let wanted = |part: &str| !listed && filter.as_ref().is_none_or(|filter| filter.contains(part));
    if wanted("memory") {
        memory_per_key();
        flood();
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
    if wanted("redis") {
        redis();
    }
}
