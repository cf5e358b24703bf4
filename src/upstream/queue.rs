//! A bound on the requests under way at a node, and the queue of those that wait for it: first come, first served,
//! bounded in number and in time.

use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// Why a request has no place at a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueFull {
    /// As many wait as may.
    #[error("as many requests wait for the node as may")]
    Full,
    /// It has waited for as long as it may.
    #[error("no place at the node became free in time")]
    Timeout,
}

/// A place at a node; it is free again when this is dropped.
pub struct Permit {
    /// None: it was never used.
    gate: Option<Arc<Gate>>,
}

impl std::fmt::Debug for Permit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Permit").finish_non_exhaustive()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(gate) = self.gate.take() {
            let mut line = gate.0.lock();
            line.under_way = line.under_way.saturating_sub(1);
            gate.call(&mut line);
        }
    }
}

/// What requests to a node pass.
pub(super) struct Gate(Mutex<Line>);

#[derive(Default)]
struct Line {
    /// None: as many as come.
    bound: Option<u32>,
    under_way: u32,
    /// Nobody waits while there is a free place. Some may have stopped waiting.
    waiting: VecDeque<oneshot::Sender<Permit>>,
}

impl Gate {
    /// A gate that nobody has passed.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::default()))
    }

    /// From now on so many may be under way at once. Those that are beyond it may end.
    pub(super) fn bound(self: &Arc<Self>, most: Option<u32>) {
        let mut line = self.0.lock();
        line.bound = most.map(|most| most.max(1));
        self.call(&mut line);
    }

    /// A place, if need be after waiting for `patience` behind fewer than `queue` others; none where there is no bound.
    pub(super) async fn enter(self: &Arc<Self>, queue: u32, patience: Duration) -> Result<Option<Permit>, QueueFull> {
        let called = {
            let mut line = self.0.lock();
            let Some(bound) = line.bound else { return Ok(None) };
            if line.under_way < bound {
                line.under_way += 1;
                return Ok(Some(self.permit()));
            }
            let queue = usize::try_from(queue).unwrap_or(usize::MAX);
            if line.waiting.len() >= queue {
                line.waiting.retain(|waiting| !waiting.is_closed());
            }
            if line.waiting.len() >= queue {
                return Err(QueueFull::Full);
            }
            let (call, called) = oneshot::channel();
            line.waiting.push_back(call);
            called
        };
        match tokio::time::timeout(patience, called).await {
            Ok(Ok(permit)) => Ok(Some(permit)),
            // There is no bound any more.
            Ok(Err(_)) => Ok(None),
            Err(_) => Err(QueueFull::Timeout),
        }
    }

    fn permit(self: &Arc<Self>) -> Permit {
        Permit { gate: Some(self.clone()) }
    }

    /// Gives free places to those that wait.
    fn call(self: &Arc<Self>, line: &mut Line) {
        let Some(bound) = line.bound else {
            line.waiting.clear();
            return;
        };
        while line.under_way < bound
            && let Some(next) = line.waiting.pop_front()
        {
            match next.send(self.permit()) {
                Ok(()) => line.under_way += 1,
                // It does not wait any more. The lock is held that the permit would take.
                Err(mut unused) => drop(unused.gate.take()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    const LONG: Duration = Duration::from_secs(10);

    fn gate(bound: Option<u32>) -> Arc<Gate> {
        let gate = Gate::new();
        gate.bound(bound);
        gate
    }

    fn waiting(gate: &Gate) -> usize {
        gate.0.lock().waiting.iter().filter(|waiting| !waiting.is_closed()).count()
    }

    async fn until(what: impl Fn() -> bool) {
        let end = Instant::now() + LONG;
        while !what() {
            assert!(Instant::now() < end);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn without_a_bound_there_is_no_permit() {
        assert!(gate(None).enter(0, LONG).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn places_are_free_again_in_the_order_of_those_who_wait() {
        let gate = gate(Some(1));
        let first = gate.enter(9, LONG).await.unwrap().unwrap();
        let served = Arc::new(Mutex::new(vec![]));
        let mut tasks = vec![];
        for i in 0..5 {
            let (gate_of, served) = (gate.clone(), served.clone());
            tasks.push(tokio::spawn(async move {
                let permit = gate_of.enter(9, LONG).await.unwrap().unwrap();
                served.lock().push(i);
                drop(permit);
            }));
            until(|| waiting(&gate) == i + 1).await;
        }
        drop(first);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*served.lock(), [0, 1, 2, 3, 4]);
        assert_eq!(gate.0.lock().under_way, 0);
    }

    #[tokio::test]
    async fn the_queue_is_bounded_in_number_and_in_time() {
        let gate = gate(Some(1));
        let _held = gate.enter(0, LONG).await.unwrap().unwrap();
        assert_eq!(gate.enter(0, LONG).await.unwrap_err(), QueueFull::Full);
        let began = Instant::now();
        assert_eq!(gate.enter(1, Duration::from_millis(20)).await.unwrap_err(), QueueFull::Timeout);
        assert!(began.elapsed() >= Duration::from_millis(20));
        let waits = tokio::spawn({
            let gate = gate.clone();
            async move { gate.enter(1, LONG).await.map(|permit| permit.is_some()) }
        });
        until(|| waiting(&gate) == 1).await;
        assert_eq!(gate.enter(1, LONG).await.unwrap_err(), QueueFull::Full, "who has given up leaves a place, once");
        waits.abort();
    }

    #[tokio::test]
    async fn who_goes_away_while_waiting_takes_no_place() {
        let gate = gate(Some(1));
        let held = gate.enter(0, LONG).await.unwrap().unwrap();
        let waits = tokio::spawn({
            let gate = gate.clone();
            async move { gate.enter(2, LONG).await.map(drop) }
        });
        until(|| waiting(&gate) == 1).await;
        waits.abort();
        assert!(waits.await.unwrap_err().is_cancelled());
        drop(held);
        assert_eq!(gate.0.lock().under_way, 0);
        // Called, and gone before it heard of it.
        let held = gate.enter(0, LONG).await.unwrap().unwrap();
        let mut waits = Box::pin(gate.enter(2, LONG));
        tokio::select! {
            biased;
            _ = &mut waits => unreachable!(),
            () = std::future::ready(()) => {}
        }
        drop(held);
        assert_eq!(gate.0.lock().under_way, 1);
        drop(waits);
        assert_eq!(gate.0.lock().under_way, 0);
    }

    #[tokio::test]
    async fn another_bound_takes_effect_at_once() {
        let gate = gate(Some(1));
        let held = gate.enter(0, LONG).await.unwrap().unwrap();
        let enter = || {
            let gate = gate.clone();
            tokio::spawn(async move { gate.enter(9, LONG).await.unwrap() })
        };
        let second = enter();
        until(|| waiting(&gate) == 1).await;
        gate.bound(Some(2));
        let second = second.await.unwrap().unwrap();
        gate.bound(Some(1));
        let third = enter();
        until(|| waiting(&gate) == 1).await;
        drop(held);
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert_eq!(waiting(&gate), 1, "one is under way, and more may not");
        drop(second);
        let third = third.await.unwrap().unwrap();
        let fourth = enter();
        until(|| waiting(&gate) == 1).await;
        gate.bound(None);
        assert!(fourth.await.unwrap().is_none());
        drop(third);
        gate.bound(Some(1));
        assert!(gate.enter(0, LONG).await.unwrap().is_some(), "what has ended is not under way");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn never_more_than_may() {
        let gate = gate(Some(3));
        let (now, most) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(0)));
        let tasks: Vec<_> = (0..200)
            .map(|i| {
                let (gate, now, most) = (gate.clone(), now.clone(), most.clone());
                tokio::spawn(async move {
                    let patience = if i % 3 == 0 { Duration::from_micros(50) } else { LONG };
                    let Ok(permit) = gate.enter(1000, patience).await else { return };
                    {
                        let mut now = now.lock();
                        *now += 1;
                        let mut most = most.lock();
                        *most = (*most).max(*now);
                    }
                    tokio::task::yield_now().await;
                    *now.lock() -= 1;
                    drop(permit);
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert!((1..=3).contains(&*most.lock()));
        assert_eq!(gate.0.lock().under_way, 0);
    }
}
