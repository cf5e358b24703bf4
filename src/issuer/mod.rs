//! An Issuer for development (RFC 9578): tokens of all three types for anyone who asks, a directory, and keys that rotate. It
//! knows no Attester, so it is none for production: what keeps strangers from having as many tokens as they like is not here.
//!
//! Keys of a type follow one another. The next is in the directory before its time (`not-before`), and the previous one
//! goes on issuing for a while after it, so that whoever was challenged before a rotation gets a token all the same; in the
//! files that gateways read it stays for as long as these may take its tokens.

mod keys;
mod server;

pub use keys::{IssueError, KeyMaking, LONGEST_REQUEST};
pub use server::{Serve, ServeError, serve};

use crate::files;
use crate::privacypass::{MEDIA_TYPE, MOST_KEYS, TYPES};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use keys::{Kept, Pair};
use parking_lot::{Mutex, RwLock};
use privacypass::TokenType;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where token requests go.
pub const REQUEST_PATH: &str = "/token-request";

/// Where the directory is (RFC 9578 §4).
pub const DIRECTORY_PATH: &str = "/.well-known/private-token-issuer-directory";

/// The file of the private keys.
const KEYS: &str = "keys.json";

/// What is wrong with the directory that keys are in.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be read or written.
    #[error("{}: {source}", file.display())]
    Io {
        /// A file or directory in it.
        file: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// It is not what it should be.
    #[error("{}: {why}", file.display())]
    Content {
        /// A file in it.
        file: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A key cannot be made.
    #[error(transparent)]
    Key(#[from] KeyMaking),
}

fn at(file: &Path) -> impl FnOnce(std::io::Error) -> StateError {
    move |source| StateError::Io { file: file.into(), source }
}

/// An Issuer: its keys, of which some are used now.
#[derive(Debug)]
pub struct Issuer {
    dir: PathBuf,
    /// A key is used for so long. None: for ever.
    rotate: Option<Duration>,
    /// A key that issues no more stays in the gateways' files for so long.
    keep: Duration,
    /// Held while keys are made; what the files have.
    written: Mutex<Vec<(PathBuf, String)>>,
    /// Of all types, those of later times first.
    pairs: RwLock<Vec<Pair>>,
}

/// What its directory says, and for how many seconds that is so.
#[derive(Debug)]
pub struct Directory {
    /// The document.
    pub document: String,
    /// `max-age`.
    pub fresh: u64,
}

impl Issuer {
    /// An issuer with its keys in `dir`, which are made where there are none. One that another has followed stays in the
    /// gateways' files for `keep`. Times are in seconds since the Unix epoch.
    ///
    /// # Errors
    /// What cannot be read, written or made.
    pub fn open(dir: &Path, rotate: Option<Duration>, keep: Duration, now: u64) -> Result<Self, StateError> {
        std::fs::create_dir_all(dir).map_err(at(dir))?;
        let file = dir.join(KEYS);
        let pairs = match std::fs::read(&file) {
            Ok(octets) => {
                let bad = |why: String| StateError::Content { file: file.clone(), why };
                let kept: Vec<Kept> = serde_json::from_slice(&octets).map_err(|e| bad(e.to_string()))?;
                kept.iter().map(Pair::restore).collect::<Result<_, _>>().map_err(|e| bad(e.to_string()))?
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => vec![],
            Err(e) => return Err(at(&file)(e)),
        };
        let (pairs, written) = (RwLock::new(pairs), Mutex::default());
        let issuer = Self { dir: dir.into(), rotate, keep, written, pairs };
        issuer.advance(now, false)?;
        Ok(issuer)
    }

    /// Does what the time asks for: makes keys that are to come, lets those go that are over. `at_once`: the next keys are
    /// used from now on. Whether anything has changed.
    ///
    /// # Errors
    /// A key cannot be made, or the files cannot be written; then it is tried again the next time.
    pub fn advance(&self, now: u64, at_once: bool) -> Result<bool, StateError> {
        // One at a time: two would make different keys for the same time. What only looks need not wait.
        let guard = if at_once { Some(self.written.lock()) } else { self.written.try_lock() };
        let Some(mut written) = guard else { return Ok(false) };
        let mut pairs = self.pairs.read().clone();
        // Each is put before the others: in the order of their numbers, at last.
        for kind in TYPES.into_iter().rev() {
            let newest = |pairs: &[Pair]| pairs.iter().filter(|p| p.public.kind() == kind).map(|p| p.from).max();
            if newest(&pairs).is_none() {
                Self::make(&mut pairs, kind, now)?;
            }
            if at_once {
                match pairs.iter_mut().find(|pair| pair.public.kind() == kind && pair.from > now) {
                    Some(next) => next.from = now,
                    None => Self::make(&mut pairs, kind, now)?,
                }
            }
            if let (Some(rotate), Some(newest)) = (self.rotate, newest(&pairs))
                && newest + self.overlap() <= now
            {
                Self::make(&mut pairs, kind, (newest + rotate.as_secs()).max(now + self.overlap()))?;
            }
        }
        pairs.sort_by_key(|pair| std::cmp::Reverse(pair.from));
        let gone = self.overlap() + self.keep.as_secs();
        pairs = without_followed(pairs, now, gone);
        let all = self.files(&pairs, now);
        if *written == all {
            return Ok(false);
        }
        all.iter().try_for_each(|(path, text)| files::replace(path, text.as_bytes()).map_err(at(path)))?;
        *written = all;
        *self.pairs.write() = pairs;
        Ok(true)
    }

    /// Those that issue, or will.
    fn issuing(&self, now: u64) -> Vec<Pair> {
        without_followed(self.pairs.read().clone(), now, self.overlap())
    }

    /// A next key is known for so long before its time, and a previous one used for so long after.
    fn overlap(&self) -> u64 {
        (self.rotate.unwrap_or(Duration::from_secs(3600)).as_secs() / 2).max(1)
    }

    /// One octet of its ID says which key a request is for: it differs from others' of its type.
    fn make(pairs: &mut Vec<Pair>, kind: TokenType, from: u64) -> Result<(), StateError> {
        loop {
            let pair = Pair::generate(kind, from)?;
            let taken = |other: &Pair| other.public.kind() == kind && other.truncated_id() == pair.truncated_id();
            if !pairs.iter().any(taken) {
                // Of those of one second, the latest is first.
                pairs.insert(0, pair);
                return Ok(());
            }
        }
    }

    /// The private keys; and for each type what a gateway's `key_file` is: the key that is used now first, then the next, then
    /// those before.
    fn files(&self, pairs: &[Pair], now: u64) -> Vec<(PathBuf, String)> {
        let kept: Vec<Kept> = pairs.iter().map(Pair::keep).collect();
        let private = (self.dir.join(KEYS), serde_json::to_string_pretty(&kept).unwrap_or_default());
        let of_gateways = TYPES.map(|kind| {
            let of_kind: Vec<_> = pairs.iter().filter(|pair| pair.public.kind() == kind).collect();
            let (to_come, come): (Vec<_>, Vec<_>) = of_kind.into_iter().partition(|pair| pair.from > now);
            let (now, before) = come.split_at_checked(1).unwrap_or_default();
            // A gateway takes so many of an issuer.
            let keys = [now, &to_come, before].concat().into_iter().take(MOST_KEYS);
            let lines: Vec<_> = keys.map(Pair::key_file).collect();
            (self.key_file(kind), lines.join("\n") + "\n")
        });
        [private].into_iter().chain(of_gateways).collect()
    }

    /// What a gateway's `key_file` names: of the VOPRF types it holds private keys.
    pub fn key_file(&self, kind: TokenType) -> PathBuf {
        let ending = if kind == TokenType::Public { "pem" } else { "keys" };
        self.dir.join(format!("type-{}.{ending}", kind as u16))
    }

    /// The directory (RFC 9578 §4): preferred keys first. A client takes the first whose time has come.
    pub fn directory(&self, now: u64) -> Directory {
        let pairs = self.issuing(now);
        let keys: Vec<_> = pairs
            .iter()
            .map(|pair| {
                serde_json::json!({
                    "token-type": pair.public.kind() as u16,
                    "token-key": URL_SAFE.encode(pair.public.token_key()),
                    "not-before": pair.from,
                })
            })
            .collect();
        let document = serde_json::json!({ "issuer-request-uri": REQUEST_PATH, "token-keys": keys }).to_string();
        // A next key is in it for half of a rotation before its time: to hear of it in a quarter is soon enough.
        let fresh = self.rotate.map_or(3600, |rotate| rotate.as_secs() / 4).clamp(1, 86_400);
        let to_come = pairs.iter().map(|pair| pair.from).filter(|from| *from > now).min();
        Directory { document, fresh: to_come.map_or(fresh, |from| fresh.min(from - now)) }
    }

    /// Answers a token request.
    ///
    /// # Errors
    /// Why it does not.
    pub async fn issue(&self, request: &[u8], now: u64) -> Result<Vec<u8>, IssueError> {
        let (kind, id) = keys::asked_for(request)?;
        let pairs = self.issuing(now);
        let mut used = pairs.iter().filter(|pair| pair.public.kind() == kind && pair.from <= now);
        used.find(|pair| pair.truncated_id() == id).ok_or(IssueError::NoKey)?.issue(request).await
    }
}

/// Those that none of their type has followed for so long.
fn without_followed(mut pairs: Vec<Pair>, now: u64, for_seconds: u64) -> Vec<Pair> {
    let mut followed: Vec<TokenType> = vec![];
    pairs.retain(|pair| {
        let kind = pair.public.kind();
        let over = followed.contains(&kind);
        if pair.from + for_seconds <= now {
            followed.push(kind);
        }
        !over
    });
    pairs
}

/// The media types of issuance (RFC 9578 §8.3).
pub mod media_type {
    /// Of a directory.
    pub const DIRECTORY: &str = super::MEDIA_TYPE;
    /// Of a token request.
    pub const REQUEST: &str = "application/private-token-request";
    /// Of a token response.
    pub const RESPONSE: &str = "application/private-token-response";
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::privacypass::Key;

    fn types_from(issuer: &Issuer, now: u64) -> Vec<(u64, u64)> {
        let document: serde_json::Value = serde_json::from_str(&issuer.directory(now).document).unwrap();
        let keys = document["token-keys"].as_array().unwrap();
        keys.iter().map(|key| (key["token-type"].as_u64().unwrap(), key["not-before"].as_u64().unwrap())).collect()
    }

    #[test]
    fn keys_follow_one_another() {
        let dir = tempfile::tempdir().unwrap();
        let open =
            |now| Issuer::open(dir.path(), Some(Duration::from_secs(100)), Duration::from_secs(200), now).unwrap();
        let issuer = open(1000);
        assert_eq!(types_from(&issuer, 1000), [(1, 1000), (2, 1000), (5, 1000)]);
        assert!(!issuer.advance(1049, false).unwrap());
        assert!(issuer.advance(1050, false).unwrap(), "the next are known half of their time before");
        assert_eq!(types_from(&issuer, 1050), [(1, 1100), (2, 1100), (5, 1100), (1, 1000), (2, 1000), (5, 1000)]);
        assert_eq!((issuer.directory(1000).fresh, issuer.directory(1090).fresh), (25, 10));
        let in_file =
            |issuer: &Issuer, kind| Key::read_all(kind, &std::fs::read(issuer.key_file(kind)).unwrap()).unwrap();
        for kind in TYPES {
            assert_eq!(in_file(&issuer, kind).len(), 2, "{kind:?}");
        }
        let first = issuer.directory(1050).document;
        drop(issuer);
        let again = open(1051);
        assert_eq!(again.directory(1050).document, first, "they outlive the process");
        let first = TYPES.map(|kind| *in_file(&again, kind)[0].id());
        let first_ids = first;
        assert!(!again.advance(1099, false).unwrap());
        assert!(again.advance(1100, false).unwrap(), "the files name the next first, once its time has come");
        for (kind, first) in TYPES.into_iter().zip(first) {
            let ids: Vec<_> = in_file(&again, kind).iter().map(|key| *key.id()).collect();
            assert!(ids[0] != first && ids[1] == first, "{kind:?}");
        }
        again.advance(1150, false).unwrap();
        assert!(types_from(&again, 1150).iter().all(|(_, from)| *from >= 1100), "the previous ones issue no more");
        for (kind, first) in TYPES.into_iter().zip(first) {
            assert!(in_file(&again, kind).iter().any(|key| *key.id() == first), "and their tokens are taken");
        }
        let before = again.directory(1160).document;
        for _ in 0..2 {
            again.advance(1160, true).unwrap();
            let keys = types_from(&again, 1160);
            assert!(keys.iter().all(|(_, from)| *from <= 1160), "the next are used at once: {keys:?}");
        }
        let first = |document: &str| {
            let document: serde_json::Value = serde_json::from_str(document).unwrap();
            document["token-keys"][0]["token-key"].clone()
        };
        assert_ne!(first(&again.directory(1160).document), first(&before), "and named first");
        drop(again);
        let late = open(5000);
        assert!(TYPES.iter().all(|kind| !in_file(&late, *kind).iter().any(|key| first_ids.contains(key.id()))));
        assert!(types_from(&late, 5000).iter().any(|(_, from)| *from <= 5000), "there is always one to use");
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(dir.path().join(KEYS)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "private keys are nobody else's");
    }
}
