//! Where authenticators are verified: on threads of their own, which run when no other has something to do (SCHED_IDLE), so
//! that dear tokens hold up nobody who brings none: a niceness of 10 made others wait for milliseconds. What waits is bounded
//! by the time it will take, and more is refused at once; so is what has waited for longer all the same, as on a machine that
//! is busy with something else.
//!
//! Such a thread may be kept from running at any moment, so it takes no lock that others wait for: jobs come to it by a queue
//! without locks, and what it has found out goes by another to a thread of the usual priority, which tells the requests.

use super::token::of_type;
use crossbeam_queue::ArrayQueue;
use privacypass::TokenType;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::thread::Thread;
use std::time::{Duration, Instant};
use thread_priority::{
    NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy, thread_native_id,
};
use tokio::sync::oneshot;

/// Jobs that may wait, however short they are.
const MOST_WAITING: usize = 4096;

/// The longest that a job is thought to take: what took longer was not at work all the time.
const LONGEST: u64 = 5_000_000;

/// A request waits so much longer than its turn should take: for the job itself, and for a machine that is busy.
const GRACE: Duration = Duration::from_millis(100);

/// A thread that was not woken looks for itself.
const LOOK: Duration = Duration::from_millis(50);

/// Too much is waiting, or the pool has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Busy;

/// What a thread does, and what is then to be told.
type Job = Box<dyn FnOnce() -> Told + Send>;
type Told = Box<dyn FnOnce() + Send>;

/// The threads, and what waits for them.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    load: Arc<Load>,
    threads: usize,
    max_wait: Duration,
    /// Nanoseconds of work that may wait.
    bound: u64,
}

#[derive(Debug)]
struct Shared {
    jobs: Inbox<Job>,
    told: Inbox<Told>,
    ended: AtomicBool,
}

/// A queue without locks, and the threads that take from it.
struct Inbox<T> {
    queue: ArrayQueue<T>,
    takers: std::sync::OnceLock<Vec<Taker>>,
}

struct Taker {
    thread: Thread,
    asleep: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Load {
    /// Nanoseconds that the jobs which wait or run will take together.
    waiting: AtomicU64,
    /// Nanoseconds that a job of a type takes, as measured.
    cost: [AtomicU64; 3],
}

// === impl Inbox ===

impl<T> std::fmt::Debug for Inbox<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox").field("waiting", &self.queue.len()).finish_non_exhaustive()
    }
}

impl<T> Inbox<T> {
    fn new(size: usize) -> Self {
        Self { queue: ArrayQueue::new(size), takers: std::sync::OnceLock::new() }
    }

    /// Puts it in, and wakes one who sleeps.
    fn push(&self, of: T) -> Result<(), T> {
        self.queue.push(of)?;
        // Either we see that a taker sleeps, or it sees what is in the queue.
        fence(Ordering::SeqCst);
        let takers = self.takers.get().map_or(&[][..], Vec::as_slice);
        if let Some(taker) = takers.iter().find(|taker| taker.asleep.swap(false, Ordering::SeqCst)) {
            taker.thread.unpark();
        }
        Ok(())
    }

    /// Takes the next. None: nobody will put one in any more.
    fn take(&self, asleep: &AtomicBool, ended: &AtomicBool) -> Option<T> {
        loop {
            if let Some(of) = self.queue.pop() {
                return Some(of);
            }
            asleep.store(true, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            match self.queue.pop() {
                None if ended.load(Ordering::Relaxed) => return None,
                None => std::thread::park_timeout(LOOK),
                Some(of) => {
                    asleep.store(false, Ordering::SeqCst);
                    return Some(of);
                }
            }
            asleep.store(false, Ordering::SeqCst);
        }
    }
}

// === impl Load ===

impl Load {
    fn took(&self, kind: TokenType, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(LONGEST).min(LONGEST);
        let cost = of_type(&self.cost, kind);
        let before = cost.load(Ordering::Relaxed);
        // One that is lost among many is no matter.
        cost.store((before * 15 + took) / 16, Ordering::Relaxed);
    }
}

/// What a job adds to the load, until it is done or dropped.
struct Share(Arc<Load>, u64);

impl Drop for Share {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(self.1, Ordering::Relaxed);
    }
}

// === impl Pool ===

impl Pool {
    /// A pool of `threads`, in which nothing waits longer than `max_wait` for its turn.
    ///
    /// # Errors
    /// There are no threads to be had.
    pub fn start(threads: usize, max_wait: Duration) -> std::io::Result<Self> {
        let threads = threads.max(1);
        // As measured on one machine: where they begin.
        let cost = [900_000, 20_000, 40_000].map(AtomicU64::new);
        let bound = max_wait.as_nanos().saturating_mul(threads as u128);
        // Its end is that of its threads, also of those that there are when one more is not to be had.
        let pool = Self {
            shared: Arc::new(Shared {
                jobs: Inbox::new(MOST_WAITING),
                // Each job is told of once, and those at work are few.
                told: Inbox::new(2 * MOST_WAITING),
                ended: AtomicBool::new(false),
            }),
            load: Arc::new(Load { waiting: AtomicU64::new(0), cost }),
            threads,
            max_wait,
            bound: u64::try_from(bound).unwrap_or(u64::MAX),
        };
        let workers = (0..threads).map(|n| {
            spawn(format!("tokens-{n}"), &pool.shared, |shared, asleep| {
                // Where it is not allowed, workers are like others.
                let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
                let _ = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, idle);
                while let Some(job) = shared.jobs.take(asleep, &shared.ended) {
                    // A fault of ours is not to end the thread: its job's request gets an answer as its half is dropped.
                    if let Ok(told) = catch_unwind(AssertUnwindSafe(job))
                        && let Err(told) = shared.told.push(told)
                    {
                        told();
                    }
                }
            })
        });
        let workers = workers.collect::<std::io::Result<_>>()?;
        let teller = spawn("told-tokens".into(), &pool.shared, |shared, asleep| {
            while let Some(told) = shared.told.take(asleep, &shared.ended) {
                told();
            }
        })?;
        // Until they are known nobody is woken, and they look for themselves.
        let _ = (pool.shared.jobs.takers.set(workers), pool.shared.told.takers.set(vec![teller]));
        Ok(pool)
    }

    /// Whether [`Pool::start`] would make another like it.
    pub fn is_of(&self, threads: usize, max_wait: Duration) -> bool {
        (self.threads, self.max_wait) == (threads.max(1), max_wait)
    }

    /// Does a token's work on one of the threads. Where its request has gone away meanwhile, it is not done.
    ///
    /// # Errors
    /// [`Busy`]: its turn would not come in time, or has not.
    pub async fn run<T: Send + 'static>(
        &self,
        kind: TokenType,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Busy> {
        let cost = of_type(&self.load.cost, kind).load(Ordering::Relaxed);
        let before = self.load.waiting.fetch_add(cost, Ordering::Relaxed);
        let share = Share(self.load.clone(), cost);
        if before > self.bound {
            return Err(Busy);
        }
        let (done, answer) = oneshot::channel();
        let job = move || -> Told {
            if done.is_closed() {
                return Box::new(|| ());
            }
            let began = Instant::now();
            let of = work();
            share.0.took(kind, began.elapsed());
            drop(share);
            // To wake a task takes locks of its runtime.
            Box::new(move || drop(done.send(of)))
        };
        self.shared.jobs.push(Box::new(job)).map_err(|_| Busy)?;
        match tokio::time::timeout(self.max_wait + GRACE, answer).await {
            Ok(Ok(of)) => Ok(of),
            Ok(Err(_)) | Err(_) => Err(Busy),
        }
    }
}

impl Drop for Pool {
    /// Nobody waits for it any more: threads end with what they have.
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
    }
}

/// A thread that takes from an inbox, and how it is woken.
fn spawn(
    name: String,
    shared: &Arc<Shared>,
    work: impl FnOnce(&Shared, &AtomicBool) + Send + 'static,
) -> std::io::Result<Taker> {
    let (shared, asleep) = (shared.clone(), Arc::new(AtomicBool::new(false)));
    let own = asleep.clone();
    let handle = std::thread::Builder::new().name(name).spawn(move || work(&shared, &own))?;
    Ok(Taker { thread: handle.thread().clone(), asleep })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const KIND: TokenType = TokenType::Public;

    fn is_pending<F: Future + Unpin>(future: &mut F) -> bool {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        std::pin::Pin::new(future).poll(&mut context).is_pending()
    }

    #[tokio::test]
    async fn what_would_wait_too_long_is_refused_at_once() {
        let pool = Arc::new(Pool::start(1, Duration::from_millis(1)).unwrap());
        of_type(&pool.load.cost, KIND).store(400_000, Ordering::Relaxed);
        let (go, held) = mpsc::channel::<()>();
        let own = pool.clone();
        let first = tokio::spawn(async move { own.run(KIND, move || held.recv()).await });
        while pool.load.waiting.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        // 400 µs each: one runs, two wait, and a fourth would wait for more than a millisecond.
        let mut waiting: Vec<_> = (1..=2).map(|n| Box::pin(pool.run(KIND, move || n))).collect();
        assert!(waiting.iter_mut().all(is_pending));
        assert_eq!(pool.run(KIND, || 3).await, Err(Busy));
        drop(waiting.pop());
        go.send(()).unwrap();
        assert_eq!(waiting.remove(0).await, Ok(1));
        first.await.unwrap().unwrap().unwrap();
        while pool.load.waiting.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(pool.run(KIND, || 4).await, Ok(4), "once there is room again");
    }

    #[tokio::test]
    async fn what_has_waited_too_long_is_refused_too() {
        let pool = Pool::start(1, Duration::from_millis(1)).unwrap();
        let (go, held) = mpsc::channel::<()>();
        let began = Instant::now();
        assert_eq!(pool.run(KIND, move || held.recv().is_ok()).await, Err(Busy), "it does not come to an end");
        assert!((GRACE..Duration::from_secs(5)).contains(&began.elapsed()));
        // Nobody waits for it any more, and it is not done.
        let (tell, told) = mpsc::channel::<()>();
        assert_eq!(pool.run(KIND, move || tell.send(())).await, Err(Busy));
        go.send(()).unwrap();
        assert_eq!(pool.run(KIND, || 4).await, Ok(4));
        assert!(told.recv().is_err());
    }

    #[test]
    fn its_end_is_that_of_its_threads() {
        let pool = Pool::start(2, Duration::from_secs(1)).unwrap();
        let shared = Arc::downgrade(&pool.shared);
        drop(pool);
        let until = Instant::now() + Duration::from_secs(10);
        while shared.strong_count() > 0 {
            assert!(Instant::now() < until, "they go on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[tokio::test]
    async fn a_fault_in_a_job_ends_no_thread() {
        let pool = Pool::start(1, Duration::from_secs(1)).unwrap();
        assert_eq!(pool.run(KIND, || panic!("as a test")).await.map(|(): ()| ()), Err(Busy));
        assert_eq!(pool.run(KIND, || 4).await, Ok(4));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn many_at_once_are_all_answered() {
        let pool = Arc::new(Pool::start(2, Duration::from_secs(5)).unwrap());
        for round in 0..20 {
            let tasks: Vec<_> = (0..200)
                .map(|n| {
                    let pool = pool.clone();
                    tokio::spawn(async move { pool.run(KIND, move || n).await })
                })
                .collect();
            for (n, task) in tasks.into_iter().enumerate() {
                assert_eq!(task.await.unwrap(), Ok(n), "round {round}");
            }
        }
    }
}
