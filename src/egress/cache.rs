//! What was learnt by asking, kept for as long as it is good. One question at a time about each thing, whoever waits
//! for it, and a bounded number of questions in all; a failure is remembered for a moment, so that what does not answer
//! is not asked by every request. What is a little old is used at once, and asked about again meanwhile.

use super::discovery::Error;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// As long as a failure is remembered.
pub(super) const FAILED: Duration = Duration::from_secs(10);

/// An answer, and what it is good for until when.
#[derive(Debug, Clone)]
pub(super) struct Known<V> {
    pub(super) value: V,
    /// Until then it is used.
    pub(super) fresh: Instant,
    /// Until then it is used at once, and asked again meanwhile.
    pub(super) soon: Instant,
    /// Until then it is used where it is asked again and there is no answer.
    pub(super) last: Instant,
}

/// What a question comes to, once it has.
type Told<V> = watch::Receiver<Option<Result<V, Error>>>;

#[derive(Debug)]
struct Entry<V> {
    known: Option<Known<V>>,
    /// And until when that holds.
    failed: Option<(Error, Instant)>,
    asking: Option<Told<V>>,
    used: Instant,
}

impl<V> Entry<V> {
    fn known(&self, now: Instant) -> Option<&Known<V>> {
        self.known.as_ref().filter(|known| now < known.last)
    }

    fn failed(&self, now: Instant) -> Option<Error> {
        self.failed.filter(|(_, until)| now < *until).map(|(error, _)| error)
    }
}

/// What is known, by name.
#[derive(Debug)]
pub(super) struct Cache<V> {
    table: Mutex<HashMap<String, Entry<V>>>,
    /// Entries at most; those that are being asked about are never dropped.
    most: usize,
    places: Arc<Semaphore>,
}

/// A question under way. When it is dropped it has ended, in whatever way.
struct Asking<V: Clone> {
    cache: Arc<Cache<V>>,
    key: String,
    result: Option<Result<Known<V>, Error>>,
    tell: watch::Sender<Option<Result<V, Error>>>,
    _place: OwnedSemaphorePermit,
}

/// What there is to do for one who wants to know.
enum Step<V> {
    Answer(Result<V, Error>),
    Wait(Told<V>),
}

impl<V: Clone> Cache<V> {
    /// Nothing is known. `most` entries, `at_once` questions.
    pub(super) fn new(most: usize, at_once: usize) -> Arc<Self> {
        Arc::new(Self { table: Mutex::default(), most, places: Arc::new(Semaphore::new(at_once)) })
    }

    /// What is known of `key`, or what asking comes to. Who does not wait for it any more does not end the question. To
    /// be called on a tokio runtime.
    ///
    /// # Errors
    /// What asking has come to, now or a moment ago. [`Error::Busy`]: too much is being asked.
    pub(super) async fn find<F>(
        self: &Arc<Self>,
        key: &str,
        now: Instant,
        ask: impl FnOnce() -> F + Send,
    ) -> Result<V, Error>
    where
        V: Send + Sync + 'static,
        F: Future<Output = Result<Known<V>, Error>> + Send + 'static,
    {
        let (step, asking) = self.step(key, now);
        // Begun here, where the table is not locked: if the runtime is ending the question is dropped at once.
        if let Some(mut asking) = asking {
            let answer = ask();
            tokio::spawn(async move {
                // Told to all who wait when this is dropped.
                let asking = &mut asking;
                asking.result = Some(answer.await);
            });
        }
        match step {
            Step::Answer(answer) => answer,
            Step::Wait(mut told) => {
                let told = told.wait_for(Option::is_some).await.ok().and_then(|told| (*told).clone());
                told.unwrap_or(Err(Error::Unreachable))
            }
        }
    }

    /// What to do, and the question to be asked if there is one.
    fn step(self: &Arc<Self>, key: &str, now: Instant) -> (Step<V>, Option<Asking<V>>) {
        let mut table = self.table.lock();
        let mut usable = None;
        let mut at_once = false;
        if let Some(entry) = table.get_mut(key) {
            entry.used = now;
            let known = entry.known(now);
            usable = known.map(|known| known.value.clone());
            at_once = known.is_some_and(|known| now < known.soon);
            let fresh = known.is_some_and(|known| now < known.fresh);
            match (usable.clone(), entry.failed(now)) {
                (Some(value), failed) if fresh || failed.is_some() => return (Step::Answer(Ok(value)), None),
                (None, Some(error)) => return (Step::Answer(Err(error)), None),
                _ => {}
            }
            if let Some(told) = &entry.asking {
                let step = match usable.filter(|_| at_once) {
                    Some(value) => Step::Answer(Ok(value)),
                    None => Step::Wait(told.clone()),
                };
                return (step, None);
            }
        }
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            return (Step::Answer(usable.ok_or(Error::Busy)), None);
        };
        if table.len() >= self.most && !table.contains_key(key) {
            make_room(&mut table, self.most, now);
        }
        let (tell, told) = watch::channel(None);
        let nothing = || Entry { known: None, failed: None, asking: None, used: now };
        table.entry(key.to_owned()).or_insert_with(nothing).asking = Some(told.clone());
        let asking = Asking { cache: self.clone(), key: key.to_owned(), result: None, tell, _place: place };
        let step = match usable.filter(|_| at_once) {
            Some(value) => Step::Answer(Ok(value)),
            None => Step::Wait(told),
        };
        (step, Some(asking))
    }

    /// Notes what a question has come to, and says what is to be made of it.
    fn note(&self, key: &str, result: Result<Known<V>, Error>, now: Instant) -> Result<V, Error> {
        let mut table = self.table.lock();
        let Some(entry) = table.get_mut(key) else { return result.map(|known| known.value) };
        entry.asking = None;
        match result {
            Ok(known) => {
                let value = known.value.clone();
                entry.failed = None;
                entry.known = Some(known);
                Ok(value)
            }
            Err(error) => {
                entry.failed = Some((error, now + FAILED));
                if matches!(error, Error::BadAnswer(_)) {
                    // It was reached, and does not say any more what it said.
                    entry.known = None;
                }
                entry.known(now).map(|known| known.value.clone()).ok_or(error)
            }
        }
    }
}

/// Drops what is as good as nothing. If there is still no room, drops a sixteenth, so that not every newcomer has all
/// entries looked through: of those of which nothing is known, then of the others, those that were used longest ago.
fn make_room<V>(table: &mut HashMap<String, Entry<V>>, most: usize, now: Instant) {
    table.retain(|_, entry| entry.asking.is_some() || entry.known(now).is_some() || entry.failed(now).is_some());
    if table.len() < most {
        return;
    }
    let order = |entry: &Entry<V>| (entry.known(now).is_some(), entry.used);
    let mut orders: Vec<_> = table.values().filter(|entry| entry.asking.is_none()).map(order).collect();
    let last = most / 16;
    if last >= orders.len() {
        table.retain(|_, entry| entry.asking.is_some());
        return;
    }
    let (_, &mut last_out, _) = orders.select_nth_unstable(last);
    let mut left = last + 1;
    table.retain(|_, entry| {
        let stays = entry.asking.is_some() || order(entry) > last_out || left == 0;
        left -= usize::from(!stays);
        stays
    });
}

impl<V: Clone> Drop for Asking<V> {
    fn drop(&mut self) {
        // Without a result it was called off: by a fault of ours, or the end of the runtime.
        let result = self.result.take().unwrap_or(Err(Error::Unreachable));
        let told = self.cache.note(&self.key, result, Instant::now());
        self.tell.send_replace(Some(told));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Notify;

    const SECOND: Duration = Duration::from_secs(1);
    const HOUR: Duration = Duration::from_secs(3600);

    /// Good for a minute, used for an hour, the last resort for a day.
    fn known(value: u32, from: Instant) -> Known<u32> {
        Known { value, fresh: from + 60 * SECOND, soon: from + HOUR, last: from + 24 * HOUR }
    }

    /// Asks, and has this for an answer.
    async fn find(
        cache: &Arc<Cache<u32>>,
        key: &str,
        now: Instant,
        asked: &Arc<AtomicUsize>,
        answer: Result<Known<u32>, Error>,
    ) -> Result<u32, Error> {
        let asked = asked.clone();
        let ask = move || async move {
            asked.fetch_add(1, Ordering::SeqCst);
            answer
        };
        cache.find(key, now, ask).await
    }

    /// Until what is asked in the background has been.
    async fn settled(cache: &Arc<Cache<u32>>) {
        while cache.table.lock().values().any(|entry| entry.asking.is_some()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn counter() -> Arc<AtomicUsize> {
        Arc::new(AtomicUsize::new(0))
    }

    #[tokio::test]
    async fn what_is_known_is_used_for_as_long_as_it_is_good() {
        let (cache, asked, now) = (Cache::new(10, 2), counter(), Instant::now());
        let count = || asked.load(Ordering::SeqCst);
        assert_eq!(find(&cache, "a", now, &asked, Ok(known(1, now))).await, Ok(1));
        assert_eq!(find(&cache, "a", now + 59 * SECOND, &asked, Ok(known(9, now))).await, Ok(1));
        assert_eq!(count(), 1, "fresh");
        // A little old: used, and asked again meanwhile.
        let later = now + 60 * SECOND;
        assert_eq!(find(&cache, "a", later, &asked, Ok(known(2, later))).await, Ok(1));
        settled(&cache).await;
        assert_eq!((find(&cache, "a", later, &asked, Ok(known(9, later))).await, count()), (Ok(2), 2));
        // Old: waited for.
        let later = later + HOUR;
        assert_eq!((find(&cache, "a", later, &asked, Ok(known(3, later))).await, count()), (Ok(3), 3));
    }

    #[tokio::test]
    async fn without_an_answer_what_is_old_is_the_last_resort() {
        let (cache, asked, now) = (Cache::new(10, 2), counter(), Instant::now());
        let count = || asked.load(Ordering::SeqCst);
        let old = |last: Instant| Ok(Known { value: 1, fresh: now, soon: now, last });
        assert_eq!(find(&cache, "a", now, &asked, old(now + HOUR)).await, Ok(1));
        let failed = || Err(Error::Unreachable);
        assert_eq!((find(&cache, "a", now + SECOND, &asked, failed()).await, count()), (Ok(1), 2));
        // For a moment not even asked again.
        assert_eq!((find(&cache, "a", now + SECOND, &asked, failed()).await, count()), (Ok(1), 2));
        // Not for ever.
        assert_eq!(find(&cache, "b", now, &asked, old(now)).await, Ok(1));
        assert_eq!((find(&cache, "b", now, &asked, failed()).await, count()), (Err(Error::Unreachable), 4));
    }

    #[tokio::test]
    async fn an_answer_that_is_wrong_takes_the_place_of_what_was_right() {
        let (cache, asked, now) = (Cache::new(10, 2), counter(), Instant::now());
        assert_eq!(find(&cache, "a", now, &asked, Ok(known(1, now))).await, Ok(1));
        let (later, wrong) = (now + 2 * HOUR, Error::BadAnswer("wrong"));
        assert_eq!(find(&cache, "a", later, &asked, Err(wrong)).await, Err(wrong));
    }

    #[tokio::test]
    async fn a_failure_is_remembered_for_a_moment() {
        let (cache, asked, now) = (Cache::new(10, 2), counter(), Instant::now());
        let count = || asked.load(Ordering::SeqCst);
        let failed = Err(Error::PrivateAddress);
        assert_eq!(find(&cache, "a", now, &asked, failed).await, Err(Error::PrivateAddress));
        assert_eq!(find(&cache, "a", now + FAILED / 2, &asked, Ok(known(1, now))).await, Err(Error::PrivateAddress));
        assert_eq!(count(), 1);
        assert_eq!(find(&cache, "b", now, &asked, Ok(known(2, now))).await, Ok(2), "another is asked");
        let later = Instant::now() + FAILED;
        assert_eq!((find(&cache, "a", later, &asked, Ok(known(1, later))).await, count()), (Ok(1), 3));
    }

    #[tokio::test]
    async fn one_question_for_all_who_wait_and_no_more_than_fit() {
        let (cache, asked, now) = (Cache::<u32>::new(10, 2), counter(), Instant::now());
        let go = Arc::new(Notify::new());
        let waiting = |key: &'static str| {
            let (cache, asked, go) = (cache.clone(), asked.clone(), go.clone());
            tokio::spawn(async move {
                let ask = move || async move {
                    asked.fetch_add(1, Ordering::SeqCst);
                    go.notified().await;
                    Ok(known(7, now))
                };
                cache.find(key, now, ask).await
            })
        };
        let (gone, others) = (waiting("a"), (0..20).map(|_| waiting("a")).collect::<Vec<_>>());
        let b = waiting("b");
        while asked.load(Ordering::SeqCst) < 2 {
            tokio::task::yield_now().await;
        }
        // The one whose question it was does not wait for it.
        gone.abort();
        assert_eq!(find(&cache, "c", now, &asked, Ok(known(1, now))).await, Err(Error::Busy));
        go.notify_one();
        go.notify_one();
        for of in others.into_iter().chain([b]) {
            assert_eq!(of.await.unwrap(), Ok(7));
        }
        assert_eq!(asked.load(Ordering::SeqCst), 2);
        assert_eq!(find(&cache, "c", now, &asked, Ok(known(1, now))).await, Ok(1), "there are places again");
    }

    #[tokio::test]
    async fn a_fault_of_ours_is_no_end() {
        async fn fault() -> Result<Known<u32>, Error> {
            panic!("a fault, as this test wants it")
        }
        let (cache, now) = (Cache::new(10, 1), Instant::now());
        assert_eq!(cache.find("a", now, fault).await, Err(Error::Unreachable));
        let right = || std::future::ready(Ok(known(1, now)));
        assert_eq!(cache.find("b", now, right).await, Ok(1), "its place is free");
        assert_eq!(cache.find("a", Instant::now() + FAILED, right).await, Ok(1));
    }

    #[tokio::test]
    async fn a_full_table_gives_way_to_what_is_new() {
        let (cache, asked, now) = (Cache::new(32, 1), counter(), Instant::now());
        let at = |n: u32| now + n * Duration::from_millis(1);
        for n in 0..32 {
            let answer = if n == 30 || n == 31 { Err(Error::Unreachable) } else { Ok(known(n, now)) };
            let _ = find(&cache, &n.to_string(), at(n), &asked, answer).await;
        }
        // Used again.
        assert_eq!(find(&cache, "0", at(40), &asked, Ok(known(9, now))).await, Ok(0));
        assert_eq!(find(&cache, "new", at(41), &asked, Ok(known(100, now))).await, Ok(100));
        let has = |key: &str| cache.table.lock().contains_key(key);
        // 3 have gone: the failures, and the one that was used longest ago.
        assert!(!has("30") && !has("31") && !has("1") && has("0") && has("2") && has("new"));
        assert_eq!(cache.table.lock().len(), 30);
        for n in 0..1000 {
            let _ = find(&cache, &format!("x{n}"), at(50 + n), &asked, Ok(known(n, now))).await;
            assert!(cache.table.lock().len() <= 32);
        }
        // What nobody can use is dropped first.
        let later = now + 48 * HOUR;
        assert_eq!(find(&cache, "later", later, &asked, Ok(known(1, later))).await, Ok(1));
        assert!(cache.table.lock().len() <= 32);
    }
}
