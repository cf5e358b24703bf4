//! Session tickets that a fleet shares (RFC 8446 §4.6.1): whoever has the secret takes what another has given, and
//! keeps nothing.
//!
//! A ticket's key is derived from the secret, from what the listener trusts and from the time, so nodes need not tell
//! each other of keys. Who learns the secret can make tickets, and so come as any client; what was sent in sessions
//! stays unread, as a resumed one has a key exchange of its own, too (psk_dhe_ke).

use arc_swap::ArcSwapOption;
use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::error::Unspecified;
use aws_lc_rs::hkdf;
use rustls::server::ProducesTickets;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Makes tickets and takes them.
#[derive(Debug)]
pub struct Tickets {
    secret: hkdf::Prk,
    binding: [u8; 32],
    /// Seconds.
    rotation: u64,
    keys: ArcSwapOption<Keys>,
}

/// The keys of a time.
#[derive(Debug)]
struct Keys {
    epoch: u64,
    previous: Key,
    current: Key,
    next: Key,
}

#[derive(Debug)]
struct Key {
    name: [u8; NAME],
    aead: RandomizedNonceKey,
}

/// Octets of a key's name, with which a ticket begins.
const NAME: usize = 8;
/// Octets of a key.
const KEY: usize = 32;
/// The longest ticket. One holds the chain of its client's certificates.
const MAX_TICKET: usize = 16 * 1024;
/// RFC 8446 §4.6.1: seven days are the most that a ticket lives.
const MAX_LIFETIME: u64 = 7 * 24 * 3600;
/// Seconds by which another node's clock may be ahead.
const SKEW: u64 = 60;

/// A number of octets to derive.
struct Octets(usize);

impl hkdf::KeyType for Octets {
    fn len(&self) -> usize {
        self.0
    }
}

impl Tickets {
    /// Tickets by a secret of 32 octets or more, that the nodes of a fleet share or that is this process's. A new key
    /// comes every `rotation` (a second to 84 hours), and a ticket is good until the key after its own goes out of use:
    /// for one to two of these.
    ///
    /// `binding` stands for what the listener trusts and asks for. A ticket that was given under another is not taken,
    /// so that nobody who is no longer trusted comes in by one.
    pub fn new(secret: impl AsRef<[u8]>, rotation: Duration, binding: [u8; 32]) -> Self {
        let secret = hkdf::Salt::new(hkdf::HKDF_SHA256, b"moh-gateway").extract(secret.as_ref());
        let rotation = rotation.as_secs().clamp(1, MAX_LIFETIME / 2);
        Self { secret, binding, rotation, keys: ArcSwapOption::empty() }
    }

    fn epoch(&self, now: u64) -> u64 {
        now / self.rotation
    }

    /// Seconds until the next epoch: one at least.
    fn left(&self, now: u64) -> u64 {
        self.rotation - now % self.rotation
    }

    fn derive(&self, epoch: u64) -> Result<Key, Unspecified> {
        let (rotation, epoch) = (self.rotation.to_be_bytes(), epoch.to_be_bytes());
        let info: [&[u8]; 4] = [b"moh-gateway ticket", &self.binding, &rotation, &epoch];
        let mut octets = [0; KEY + NAME];
        self.secret.expand(&info, Octets(KEY + NAME))?.fill(&mut octets)?;
        let (key, name) = octets.split_first_chunk::<KEY>().ok_or(Unspecified)?;
        let name = *name.first_chunk::<NAME>().ok_or(Unspecified)?;
        Ok(Key { name, aead: RandomizedNonceKey::new(&AES_256_GCM, key)? })
    }

    /// The keys of a time. Threads that meet at its beginning derive the same.
    fn keys(&self, now: u64) -> Result<Arc<Keys>, Unspecified> {
        let epoch = self.epoch(now);
        if let Some(keys) = &*self.keys.load()
            && keys.epoch == epoch
        {
            return Ok(keys.clone());
        }
        let keys = Arc::new(Keys {
            epoch,
            previous: self.derive(epoch.saturating_sub(1))?,
            current: self.derive(epoch)?,
            next: self.derive(epoch.saturating_add(1))?,
        });
        self.keys.store(Some(keys.clone()));
        Ok(keys)
    }

    /// A ticket: name of its key, nonce, what is encrypted, tag.
    fn seal(&self, plain: &[u8], now: u64) -> Result<Vec<u8>, Unspecified> {
        if plain.len() + NAME + NONCE_LEN + AES_256_GCM.tag_len() > MAX_TICKET {
            return Err(Unspecified);
        }
        let keys = self.keys(now)?;
        let Key { name, aead } = &keys.current;
        let mut sealed = plain.to_vec();
        let nonce = aead.seal_in_place_append_tag(Aad::from(*name), &mut sealed)?;
        let nonce: &[u8; NONCE_LEN] = nonce.as_ref();
        Ok([&name[..], &nonce[..], &sealed[..]].concat())
    }

    fn open(&self, ticket: &[u8], now: u64) -> Result<Vec<u8>, Unspecified> {
        if ticket.len() > MAX_TICKET {
            return Err(Unspecified);
        }
        let (name, rest) = ticket.split_first_chunk::<NAME>().ok_or(Unspecified)?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>().ok_or(Unspecified)?;
        let keys = self.keys(now)?;
        let next = (self.left(now) <= SKEW).then_some(&keys.next);
        let mut all = [Some(&keys.current), Some(&keys.previous), next].into_iter().flatten();
        let key = all.find(|key| key.name == *name).ok_or(Unspecified)?;
        let mut octets = sealed.to_vec();
        let length = key.aead.open_in_place(Nonce::from(nonce), Aad::from(*name), &mut octets)?.len();
        octets.truncate(length);
        Ok(octets)
    }

    /// Seconds for which a ticket of now is good.
    fn lifetime_at(&self, now: u64) -> u64 {
        (self.rotation + self.left(now)).min(MAX_LIFETIME)
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(self.lifetime_at(now())).unwrap_or(0)
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.seal(plain, now()).ok()
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        self.open(cipher, now()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Ca, client, handshake};
    use super::*;
    use crate::tls::{CertificateStore, server_config};
    use rustls::HandshakeKind;

    const HOUR: Duration = Duration::from_secs(3600);
    /// The beginning of an epoch.
    const THEN: u64 = 3600 * 500_000;

    fn tickets(secret: u8, binding: u8) -> Tickets {
        Tickets::new([secret; 32], HOUR, [binding; 32])
    }

    #[test]
    fn a_fleet_with_one_secret() {
        let (one, other) = (tickets(1, 1), tickets(1, 1));
        let ticket = one.seal(b"session", THEN).unwrap();
        assert_eq!(other.open(&ticket, THEN).unwrap(), b"session");
        assert_ne!(ticket, one.seal(b"session", THEN).unwrap());
        assert!(!ticket.windows(7).any(|octets| octets == b"session"));
        for stranger in [tickets(2, 1), tickets(1, 2), Tickets::new([1; 32], HOUR * 2, [1; 32])] {
            assert!(stranger.open(&ticket, THEN).is_err(), "another secret, another binding, another rotation");
        }
        let public = one.encrypt(b"session").unwrap();
        assert_eq!(other.decrypt(&public).unwrap(), b"session");
        assert!(one.enabled());
    }

    #[test]
    fn keys_rotate() {
        let (one, other) = (tickets(1, 1), tickets(1, 1));
        for (given, taken, good) in [
            (THEN, THEN + 3599, true),
            (THEN, THEN + 3600, true),
            (THEN, THEN + 7199, true),
            (THEN, THEN + 7200, false),
            (THEN + 3599, THEN + 7199, true),
            (THEN + 3599, THEN + 7200, false),
            // Clocks that differ.
            (THEN, THEN - 60, true),
            (THEN, THEN - 61, false),
            (THEN + 3600, THEN - 1, false),
            (THEN, THEN - 1, true),
        ] {
            let ticket = one.seal(b"session", given).unwrap();
            assert_eq!(other.open(&ticket, taken).is_ok(), good, "{given} {taken}");
            assert_eq!(one.open(&ticket, taken).is_ok(), good, "{given} {taken}");
        }
        assert_eq!([THEN, THEN + 3599].map(|now| one.lifetime_at(now)), [7200, 3601]);
        assert!((3601..=7200).contains(&one.lifetime()));
        let slow = Tickets::new([1; 32], HOUR * 24 * 365, [1; 32]);
        assert!((1..=MAX_LIFETIME).contains(&slow.lifetime_at(THEN)));
        let zero = Tickets::new([1; 32], Duration::ZERO, [1; 32]);
        assert_eq!(zero.lifetime_at(THEN), 2);
        assert!(zero.open(&zero.seal(b"session", 0).unwrap(), 0).is_ok());
        assert!(zero.seal(b"session", u64::MAX).is_ok());
    }

    #[test]
    fn garbage_is_no_ticket() {
        let tickets = tickets(1, 1);
        let ticket = tickets.seal(b"session", THEN).unwrap();
        for length in 0..ticket.len() {
            assert!(tickets.open(&ticket[..length], THEN).is_err(), "{length}");
        }
        for at in 0..ticket.len() {
            let mut other = ticket.clone();
            other[at] ^= 1;
            assert!(tickets.open(&other, THEN).is_err(), "{at}");
        }
        assert!(tickets.open(&[&ticket[..], &[0]].concat(), THEN).is_err());
        assert!(tickets.open(&[0; MAX_TICKET + 1], THEN).is_err());
        assert!(tickets.seal(&[0; MAX_TICKET], THEN).is_err(), "it would not be taken");
        let longest = vec![7; MAX_TICKET - NAME - NONCE_LEN - 16];
        assert_eq!(tickets.open(&tickets.seal(&longest, THEN).unwrap(), THEN).unwrap(), longest);
        assert!(tickets.seal(&[&longest[..], &[7]].concat(), THEN).is_err());
        assert_eq!(tickets.open(&tickets.seal(b"", THEN).unwrap(), THEN).unwrap(), b"");
    }

    #[test]
    fn nothing_secret_is_shown() {
        let tickets = Tickets::new([0xab; 32], HOUR, [0; 32]);
        let ticket = tickets.seal(b"session", THEN).unwrap();
        let shown = format!("{tickets:?}");
        assert!(!ticket.is_empty() && !shown.contains("171, 171"), "{shown}");
    }

    #[test]
    fn sessions_are_resumed_on_another_node() {
        let ca = Ca::new("ca");
        let store = Arc::new(CertificateStore::new(vec![ca.issue(&["a.example"]).certificate()]).unwrap());
        let server = |tickets: Option<Tickets>| {
            let tickets = tickets.map(|tickets| Arc::new(tickets) as Arc<dyn ProducesTickets>);
            Arc::new(server_config(store.clone(), None, tickets).unwrap())
        };
        let (one, other) = (server(Some(tickets(1, 1))), server(Some(tickets(1, 1))));
        let (bound, none) = (server(Some(tickets(1, 2))), server(None));
        let kind = |client: &Arc<_>, server: &Arc<_>| {
            let (_, server) = handshake(Arc::clone(client), Arc::clone(server), "a.example").unwrap();
            server.handshake_kind().unwrap()
        };
        let full =
            |kind: HandshakeKind| kind == HandshakeKind::Full || kind == HandshakeKind::FullWithHelloRetryRequest;
        let visitor = client(&ca, None, &[]);
        assert!(full(kind(&visitor, &one)));
        assert_eq!(kind(&visitor, &other), HandshakeKind::Resumed);
        assert_eq!(kind(&visitor, &one), HandshakeKind::Resumed);
        assert!(full(kind(&visitor, &bound)), "another binding");
        let stranger = client(&ca, None, &[]);
        assert!(full(kind(&stranger, &none)));
        assert!(full(kind(&stranger, &none)), "no tickets");
    }
}
