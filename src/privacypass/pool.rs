//! Where authenticators are verified: on threads of their own, which run when no other has something to do (SCHED_IDLE), so
//! that dear tokens hold up nobody who brings none: a niceness of 10 made others wait for milliseconds. What waits is bounded
//! by the time it will take, and more is refused at once.

use super::token::of_type;
use crossbeam_channel::{Receiver, Sender};
use privacypass::TokenType;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use thread_priority::{
    NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy, thread_native_id,
};
use tokio::sync::oneshot;

/// Jobs that may wait, however short they are.
const MOST_WAITING: usize = 4096;

/// The longest that a job is thought to take: what took longer was not at work all the time.
const LONGEST: u64 = 5_000_000;

/// Too much is waiting, or the pool has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Busy;

type Job = Box<dyn FnOnce() + Send>;

/// The threads, and what waits for them.
#[derive(Debug)]
pub struct Pool {
    queue: Sender<Job>,
    load: Arc<Load>,
    bound: u64,
}

#[derive(Debug)]
struct Load {
    /// Nanoseconds that the jobs which wait or run will take together.
    waiting: AtomicU64,
    /// Nanoseconds that a job of a type takes, as measured: of types 1, 2, 5.
    cost: [AtomicU64; 3],
}

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

impl Pool {
    /// A pool of `threads`, in which nothing waits longer than `max_wait` for its turn.
    ///
    /// # Errors
    /// There are no threads to be had.
    pub fn start(threads: usize, max_wait: Duration) -> std::io::Result<Self> {
        let (queue, jobs) = crossbeam_channel::bounded(MOST_WAITING);
        for n in 0..threads.max(1) {
            let jobs: Receiver<Job> = jobs.clone();
            std::thread::Builder::new().name(format!("tokens-{n}")).spawn(move || {
                // Where it is not allowed, workers are like others.
                let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
                let _ = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, idle);
                // A fault of ours is not to end the thread: its job's request gets an answer as its half is dropped.
                jobs.iter().for_each(|job| drop(catch_unwind(AssertUnwindSafe(job))));
            })?;
        }
        // As measured on one machine: where they begin.
        let cost = [900_000, 20_000, 40_000].map(AtomicU64::new);
        let bound = max_wait.as_nanos().saturating_mul(threads.max(1) as u128);
        let load = Arc::new(Load { waiting: AtomicU64::new(0), cost });
        Ok(Self { queue, load, bound: u64::try_from(bound).unwrap_or(u64::MAX) })
    }

    /// Drops what takes long to drop on one of the threads; here, if they have too much to do.
    pub fn drop_there(&self, what: impl Send + 'static) {
        let _ = self.queue.try_send(Box::new(move || drop(what)));
    }

    /// Does a token's work on one of the threads. Where its request has gone away meanwhile, it is not done.
    ///
    /// # Errors
    /// [`Busy`]: its turn would not come in time.
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
        let job = move || {
            if done.is_closed() {
                return;
            }
            let began = Instant::now();
            let of = work();
            share.0.took(kind, began.elapsed());
            drop(share);
            // Whoever asked may be gone; what comes of that is its drop's.
            let _ = done.send(of);
        };
        self.queue.try_send(Box::new(job)).map_err(|_| Busy)?;
        answer.await.map_err(|_| Busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const KIND: TokenType = TokenType::Public;

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
        for one in &mut waiting {
            assert!(futures_poll(one).is_none());
        }
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
    async fn a_fault_in_a_job_ends_no_thread() {
        let pool = Pool::start(1, Duration::from_secs(1)).unwrap();
        assert_eq!(pool.run(KIND, || panic!("as a test")).await.map(|(): ()| ()), Err(Busy));
        assert_eq!(pool.run(KIND, || 4).await, Ok(4));
    }

    fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::Pin::new(future).poll(&mut context) {
            std::task::Poll::Ready(of) => Some(of),
            std::task::Poll::Pending => None,
        }
    }
}
