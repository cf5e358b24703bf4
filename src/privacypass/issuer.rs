//! An Issuer whose tokens of one type are taken: its name, and the keys of it that are trusted now.

use super::directory::Directory;
use super::key::Key;
use arc_swap::ArcSwap;
use privacypass::TokenType;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

/// A key is taken so long before the time that its directory gives: clocks differ.
const LEEWAY: Duration = Duration::from_secs(60);

/// As many keys are trusted at most that an issuer's directory has no more.
const MOST_GONE: usize = 64;

/// Seconds between two times that a token of a key which is not known has a directory asked.
const SOON: u64 = 60;

/// An issuer, for tokens of one type.
#[derive(Debug)]
pub struct Issuer {
    name: String,
    kind: TokenType,
    directory: Option<Directory>,
    keys: ArcSwap<Vec<Trusted>>,
    /// Told when its directory is to be asked at once.
    ask: Notify,
    /// When a stranger last had it asked, in seconds.
    asked_soon: AtomicU64,
}

/// A key, and when it is trusted; times since the Unix epoch.
#[derive(Debug, Clone)]
struct Trusted {
    key: Arc<Key>,
    /// Its directory's `not-before`.
    from: Duration,
    /// Its directory has it no more: its tokens are taken as long as challenges that named it are.
    until: Option<Duration>,
}

impl Issuer {
    /// An issuer by its `issuer_name`, with keys of one type from a file. Challenges name the first.
    pub fn of_keys(name: String, kind: TokenType, keys: Vec<Key>) -> Self {
        let trust = |key| Trusted { key: Arc::new(key), from: Duration::ZERO, until: None };
        let keys = keys.into_iter().filter(|key| key.kind() == kind).map(trust).collect();
        Self {
            name,
            kind,
            directory: None,
            keys: ArcSwap::from_pointee(keys),
            ask: Notify::new(),
            asked_soon: AtomicU64::new(0),
        }
    }

    /// An issuer whose keys its directory tells.
    pub fn of_directory(name: String, kind: TokenType, directory: Directory) -> Self {
        Self {
            name,
            kind,
            directory: Some(directory),
            keys: ArcSwap::default(),
            ask: Notify::new(),
            asked_soon: AtomicU64::new(0),
        }
    }

    /// `issuer_name` of the challenge.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The type of its tokens.
    pub fn kind(&self) -> TokenType {
        self.kind
    }

    /// Where its keys come from, if not from a file.
    pub fn directory(&self) -> Option<&Directory> {
        self.directory.as_ref()
    }

    /// Has its directory asked at once.
    pub fn ask_now(&self) {
        self.ask.notify_one();
    }

    /// Has its directory asked, if it was not for a while: somebody knows a key that we do not.
    pub fn ask_soon(&self, now: Duration) {
        let (now, before) = (now.as_secs(), self.asked_soon.load(Ordering::Relaxed));
        let again = before.saturating_add(SOON);
        if self.directory.is_some()
            && now >= again
            && self.asked_soon.compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            self.ask.notify_one();
        }
    }

    /// Waits until its directory is to be asked at once.
    pub(super) async fn asked_now(&self) {
        self.ask.notified().await;
    }

    /// Begins with what another has heard.
    pub(super) fn inherit(&self, other: &Self) {
        self.keys.store(other.keys.load_full());
    }

    /// The keys that are trusted but gone from its directory, and until when.
    pub(super) fn gone(&self) -> Vec<(Arc<Key>, Duration)> {
        self.keys.load().iter().filter_map(|trusted| Some((trusted.key.clone(), trusted.until?))).collect()
    }

    /// The IDs of its keys.
    pub fn key_ids(&self) -> Vec<[u8; 32]> {
        self.keys.load().iter().map(|trusted| *trusted.key.id()).collect()
    }

    /// The key that a challenge names: the first whose time has come. A key that is gone from its directory is better than
    /// none.
    pub fn advertised(&self, now: Duration) -> Option<Arc<Key>> {
        let keys = self.keys.load();
        let mut come =
            keys.iter().filter(|trusted| trusted.from <= now && trusted.until.is_none_or(|until| now < until));
        let of = come.clone().find(|trusted| trusted.until.is_none()).or_else(|| come.next());
        of.map(|trusted| trusted.key.clone())
    }

    /// The key with this ID, if it is trusted now.
    pub fn key(&self, id: &[u8; 32], now: Duration) -> Option<Arc<Key>> {
        let trusted = |one: &&Trusted| one.from <= now + LEEWAY && one.until.is_none_or(|until| now < until);
        self.keys.load().iter().filter(trusted).find(|one| one.key.id() == id).map(|one| one.key.clone())
    }

    /// What its directory says now: keys, in its order, with their `not-before`. Those it has no more are trusted for
    /// `grace`, which is as long as challenges that named them are accepted: a rotation refuses no token. `gone` were so before
    /// a restart.
    pub fn replace(&self, keys: Vec<(Key, Duration)>, gone: Vec<(Key, Duration)>, now: Duration, grace: Duration) {
        let mut before = self.keys.load().to_vec();
        before.extend(gone.into_iter().map(|(key, until)| Trusted {
            key: Arc::new(key),
            from: Duration::ZERO,
            until: Some(until.min(now + grace)),
        }));
        let fresh = keys.into_iter().map(|(key, from)| {
            let known = before.iter().find(|one| one.key.id() == key.id());
            let key = known.map_or_else(|| Arc::new(key), |one| one.key.clone());
            Trusted { key, from, until: None }
        });
        let mut after: Vec<_> = fresh.collect();
        let gone = before.iter().filter(|old| after.iter().all(|new| new.key.id() != old.key.id()));
        let gone: Vec<_> = gone
            .map(|old| Trusted { until: old.until.or(Some(now + grace)), ..old.clone() })
            .filter(|old| old.until.is_some_and(|until| now < until))
            .take(MOST_GONE)
            .collect();
        after.extend(gone);
        self.keys.store(Arc::new(after));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> Key {
        Key::voprf(TokenType::PrivateRistretto255, &[n; 32]).unwrap()
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_key_is_named_in_its_time_and_taken_a_while_longer() {
        let issuer = Issuer::of_keys("i".into(), TokenType::PrivateRistretto255, vec![]);
        assert!(issuer.advertised(seconds(0)).is_none());
        let (one, two) = (*key(1).id(), *key(2).id());
        let named = |now| issuer.advertised(seconds(now)).map(|key| *key.id());
        let taken = |id, now| issuer.key(id, seconds(now)).is_some();
        // The next comes first in the list, and is not named before its time.
        issuer.replace(vec![(key(2), seconds(1000)), (key(1), seconds(0))], vec![], seconds(500), seconds(100));
        assert_eq!((named(500), named(1000)), (Some(one), Some(two)));
        assert!(taken(&one, 500) && !taken(&two, 900) && taken(&two, 950));
        // The old one is gone from the directory.
        issuer.replace(vec![(key(2), seconds(1000))], vec![], seconds(1200), seconds(100));
        assert_eq!(named(1200), Some(two));
        assert!(taken(&one, 1299) && !taken(&one, 1300));
        // Being gone is no news the second time.
        issuer.replace(vec![(key(2), seconds(1000))], vec![], seconds(1290), seconds(100));
        assert!(taken(&one, 1299) && !taken(&one, 1300));
        issuer.replace(vec![(key(2), seconds(1000))], vec![], seconds(1300), seconds(100));
        assert_eq!(issuer.key_ids(), [two]);
        // A directory of nothing but the future: what was good before goes on.
        issuer.replace(vec![(key(3), seconds(2000))], vec![], seconds(1400), seconds(100));
        assert_eq!((named(1400), named(2000)), (Some(two), Some(*key(3).id())));
        // After a restart.
        let again = Issuer::of_keys("i".into(), TokenType::PrivateRistretto255, vec![]);
        again.replace(vec![(key(3), seconds(1400))], vec![(key(2), seconds(1500))], seconds(1450), seconds(100));
        assert!(again.key(&two, seconds(1499)).is_some() && again.key(&two, seconds(1500)).is_none());
    }
}
