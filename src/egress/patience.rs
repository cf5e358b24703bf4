//! What other providers have asked for with `Retry-After` (RFC 9110 §10.2.3): to be left alone for a while, altogether
//! or in one matter. Whoever goes on sending is one whom they limit harder, or shut out.

use parking_lot::Mutex;
use siphasher::sip128::{Hasher128 as _, SipHasher13};
use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::{Duration, Instant, SystemTime};

/// Waits that are remembered; about 6 MiB.
const MOST: usize = 65_536;

/// As long as anybody is waited for: a mistake of theirs does not cut them off for a day.
const LONGEST: Duration = Duration::from_secs(3600);

/// Service Unavailable: for all that is sent to a provider.
const UNAVAILABLE: u16 = 503;

/// Too Many Requests (RFC 6585 §4): for what was asked for.
const TOO_MANY: u16 = 429;

/// Whom nothing is to be sent to, and until when. Providers and matters are known by keyed hashes.
#[derive(Debug)]
pub struct Patience {
    keys: (u64, u64),
    most: usize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    until: HashMap<u128, Instant>,
    /// The same, the first to end first.
    order: BTreeSet<(Instant, u128)>,
}

impl Table {
    fn hold(&mut self, of: u128, until: Instant, now: Instant, most: usize) {
        if self.until.get(&of).is_some_and(|before| *before >= until) {
            return;
        }
        if let Some(before) = self.until.remove(&of) {
            self.order.remove(&(before, of));
        }
        // What has ended is nothing; and if that is not enough, what ends first gives way.
        while let Some(&(first, of)) = self.order.first()
            && (first <= now || self.order.len() >= most)
        {
            self.order.pop_first();
            self.until.remove(&of);
        }
        self.until.insert(of, until);
        self.order.insert((until, of));
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self::new()
    }
}

impl Patience {
    /// Nobody has asked for anything.
    pub fn new() -> Self {
        Self::with(MOST)
    }

    fn with(most: usize) -> Self {
        let random = RandomState::new();
        Self { keys: (random.hash_one(0u8), random.hash_one(1u8)), most, table: Mutex::default() }
    }

    /// For how long no such request may be sent: to this provider, whose name is compared without regard to case, for
    /// this endpoint, about a group or target of which `key` is the hash. None: it may.
    pub fn wait(&self, provider: &str, endpoint: &str, key: Option<u128>, now: Instant) -> Option<Duration> {
        let of = [self.provider(provider), self.matter(provider, endpoint, key)];
        let table = self.table.lock();
        let until = of.iter().filter_map(|of| table.until.get(of)).max()?;
        until.checked_duration_since(now).filter(|wait| !wait.is_zero())
    }

    /// Notes an answer to such a request: its status and its `Retry-After`, if it has one. 503 is about all that is
    /// sent to the provider, 429 about such requests; other statuses are about nothing. A field that is neither seconds
    /// nor a date (which is held against `wall`) is left alone, and no wait is longer than an hour. Of two, the one
    /// that ends later holds.
    #[allow(clippy::too_many_arguments, reason = "what a request was, what came, and both clocks")]
    pub fn note(
        &self,
        provider: &str,
        endpoint: &str,
        key: Option<u128>,
        status: u16,
        retry_after: Option<&str>,
        now: Instant,
        wall: SystemTime,
    ) {
        let of = match status {
            UNAVAILABLE => self.provider(provider),
            TOO_MANY => self.matter(provider, endpoint, key),
            _ => return,
        };
        if let Some(wait) = retry_after.and_then(|field| read(field, wall)) {
            self.table.lock().hold(of, now + wait, now, self.most);
        }
    }

    fn provider(&self, provider: &str) -> u128 {
        self.named(provider).finish128().as_u128()
    }

    fn matter(&self, provider: &str, endpoint: &str, key: Option<u128>) -> u128 {
        let mut hasher = self.named(provider);
        hasher.write(endpoint.as_bytes());
        hasher.write_u8(0xff);
        if let Some(key) = key {
            hasher.write(&key.to_be_bytes());
        }
        hasher.finish128().as_u128()
    }

    fn named(&self, provider: &str) -> SipHasher13 {
        let mut hasher = SipHasher13::new_with_keys(self.keys.0, self.keys.1);
        provider.bytes().for_each(|octet| hasher.write_u8(octet.to_ascii_lowercase()));
        // No text has this octet.
        hasher.write_u8(0xff);
        hasher
    }
}

/// How long `Retry-After` asks to wait; none where it asks for nothing, or cannot be read.
fn read(field: &str, wall: SystemTime) -> Option<Duration> {
    let field = field.trim_matches([' ', '\t']);
    let wait = match field.bytes().all(|octet| octet.is_ascii_digit()) {
        // More digits than a number has are many seconds all the same.
        true if !field.is_empty() => Duration::from_secs(field.parse().unwrap_or(u64::MAX)),
        _ => httpdate::parse_http_date(field).ok()?.duration_since(wall).ok()?,
    };
    Some(wait.min(LONGEST)).filter(|wait| !wait.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A wall clock at the date of RFC 9110's examples.
    fn wall() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777)
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let seconds = |field: &str| read(field, wall()).map(|wait| wait.as_secs());
        for (field, wait) in [
            ("120", 120),
            (" 7\t", 7),
            ("007", 7),
            ("3600", 3600),
            ("3601", 3600),
            ("18446744073709551616", 3600),
            ("99999999999999999999999999999999999999999", 3600),
            ("Sun, 06 Nov 1994 08:50:37 GMT", 60),
            ("Sunday, 06-Nov-94 08:50:37 GMT", 60),
            ("Sun Nov  6 08:50:37 1994", 60),
            ("Fri, 31 Dec 9999 23:59:59 GMT", 3600),
        ] {
            assert_eq!(seconds(field), Some(wait), "{field}");
        }
        for field in [
            "",
            " ",
            "0",
            "000",
            "-1",
            "+1",
            "1.5",
            "1 2",
            "1,2",
            "0x10",
            "soon",
            "\u{661}",
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49:36 GMT",
            "Thu, 01 Jan 1970 00:00:00 GMT",
            "Sun, 06 Nov 1994 08:50:37 UTC",
            "Mon, 06 Nov 1994 08:50:37 GMT",
            "Sun, 06 Nov 1994",
            "Fri, 31 Dec 0000 23:59:59 GMT",
        ] {
            assert_eq!(seconds(field), None, "{field:?}");
        }
    }

    #[test]
    fn who_is_busy_is_left_alone_and_others_are_not() {
        let (patience, now) = (Patience::new(), Instant::now());
        let note = |provider, endpoint, key, status, field| {
            patience.note(provider, endpoint, key, status, Some(field), now, wall());
        };
        let wait = |provider, endpoint, key| patience.wait(provider, endpoint, key, now);
        assert_eq!(wait("b.example", "e", Some(1)), None);
        note("B.example", "e", Some(1), 429, "30");
        assert_eq!(wait("b.Example", "e", Some(1)), Some(30 * SECOND));
        assert_eq!(wait("c.example", "e", Some(1)), None);
        assert_eq!(wait("b.example", "f", Some(1)), None);
        assert_eq!(wait("b.example", "e", Some(2)), None);
        assert_eq!(wait("b.example", "e", None), None);
        // The whole provider, and what is longer holds.
        note("b.example", "f", None, 503, "10");
        assert_eq!(wait("b.example", "g", Some(7)), Some(10 * SECOND));
        assert_eq!(wait("b.example", "e", Some(1)), Some(30 * SECOND));
        assert_eq!(wait("c.example", "e", Some(1)), None);
        note("b.example", "e", Some(1), 429, "5");
        assert_eq!(wait("b.example", "e", Some(1)), Some(30 * SECOND));
        note("b.example", "e", Some(1), 503, "Sun, 06 Nov 1994 08:50:37 GMT");
        assert_eq!(wait("b.example", "e", None), Some(60 * SECOND));
        // It ends.
        assert_eq!(patience.wait("b.example", "e", Some(1), now + 59 * SECOND), Some(SECOND));
        assert_eq!(patience.wait("b.example", "e", Some(1), now + 60 * SECOND), None);
        // What says nothing.
        for status in [200, 301, 413, 500, 502, 504] {
            note("d.example", "e", None, status, "30");
        }
        patience.note("d.example", "e", None, 503, None, now, wall());
        patience.note("d.example", "e", None, 429, Some("soon"), now, wall());
        assert_eq!(wait("d.example", "e", None), None);
    }

    #[test]
    fn a_full_table_gives_way() {
        let (patience, now) = (Patience::with(3), Instant::now());
        let note = |key, field: &str, now| patience.note("b.example", "e", Some(key), 429, Some(field), now, wall());
        let known = |key, now| patience.wait("b.example", "e", Some(key), now).is_some();
        [(1, "30"), (2, "20"), (3, "10")].into_iter().for_each(|(key, field)| note(key, field, now));
        // All are live: the one that ends first gives way.
        note(4, "40", now);
        assert!(known(1, now) && known(2, now) && !known(3, now) && known(4, now));
        // What is known already takes no room.
        note(1, "35", now);
        assert!(known(1, now) && known(2, now) && known(4, now));
        // What has ended makes room.
        let later = now + 36 * SECOND;
        note(5, "10", later);
        note(6, "10", later);
        assert!(known(4, later) && known(5, later) && known(6, later));
        let sizes = || {
            let table = patience.table.lock();
            (table.until.len(), table.order.len())
        };
        assert_eq!(sizes(), (3, 3));
        (0..1000).for_each(|key| note(key, "3600", later));
        assert_eq!(sizes(), (3, 3));
        note(1, "1", now + 10_800 * SECOND);
        assert_eq!(sizes(), (1, 1), "what has ended is dropped");
    }
}
