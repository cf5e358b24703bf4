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
use rustls::pki_types::CertificateDer;
use rustls::server::ProducesTickets;
use std::fmt;
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
    check: Option<Check>,
}

/// Whether a client's chain is good for a session to go on.
struct Check(Box<Accepts>);

/// Whether a chain is accepted.
type Accepts = dyn Fn(&[CertificateDer<'_>]) -> bool + Send + Sync;

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Check")
    }
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
        Self { secret, binding, rotation, keys: ArcSwapOption::empty(), check: None }
    }

    /// Of a session that has a client's certificate, a ticket is taken only where `check` accepts the chain, the
    /// certificate itself first. Otherwise there is a full handshake, to which the client brings the certificate it has
    /// now: rustls would go on with the old one, and hand out new tickets with it.
    ///
    /// `check` is called in the handshake, and more than once where a client offers several tickets.
    pub fn with_check(self, check: impl Fn(&[CertificateDer<'_>]) -> bool + Send + Sync + 'static) -> Self {
        Self { check: Some(Check(Box::new(check))), ..self }
    }

    /// Whether what a ticket held is good for a session now. What cannot be read is not.
    fn goes_on(&self, session: &[u8]) -> bool {
        let Some(Check(check)) = &self.check else { return true };
        match client_chain(session) {
            Ok(Some(chain)) => check(&chain),
            Ok(None) => true,
            Err(Unspecified) => false,
        }
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
        let session = self.open(cipher, now()).ok()?;
        self.goes_on(&session).then_some(session)
    }
}

// === sessions ===

/// What is left to be read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, octets: usize) -> Result<&'a [u8], Unspecified> {
        let (taken, rest) = self.0.split_at_checked(octets).ok_or(Unspecified)?;
        self.0 = rest;
        Ok(taken)
    }

    /// What comes after its length, which has so many octets.
    fn vector(&mut self, octets_of_length: usize) -> Result<&'a [u8], Unspecified> {
        let length = self.take(octets_of_length)?.iter().fold(0, |length, octet| (length << 8) | usize::from(*octet));
        self.take(length)
    }

    fn flag(&mut self) -> Result<bool, Unspecified> {
        match self.take(1)? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(Unspecified),
        }
    }
}

/// The client's chain in what rustls 0.23 writes of a session (`ServerSessionValue` in its `msgs/persist.rs`). All of
/// it is read to its end, so that what another rustls writes is an error, and not a session without a certificate.
fn client_chain(session: &[u8]) -> Result<Option<Vec<CertificateDer<'_>>>, Unspecified> {
    let mut session = Reader(session);
    // The name that was asked for.
    if session.flag()? {
        session.vector(1)?;
    }
    // Version and cipher suite.
    session.take(2 + 2)?;
    // The secret; whether it is an extended one of TLS 1.2.
    session.vector(1)?;
    session.flag()?;
    let list = if session.flag()? { Some(session.vector(3)?) } else { None };
    // ALPN.
    if session.flag()? {
        session.vector(1)?;
    }
    // What the application adds; when it began; what is added to the age of its ticket.
    session.vector(2)?;
    session.take(8 + 4)?;
    if !session.0.is_empty() {
        return Err(Unspecified);
    }
    let Some(list) = list else { return Ok(None) };
    let (mut list, mut chain) = (Reader(list), vec![]);
    while !list.0.is_empty() {
        chain.push(CertificateDer::from(list.vector(3)?));
    }
    // Who has no certificate has no list.
    if chain.is_empty() { Err(Unspecified) } else { Ok(Some(chain)) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Ca, client, handshake};
    use super::*;
    use crate::tls::{CertificateStore, provider, server_config};
    use parking_lot::Mutex;
    use rustls::server::WebPkiClientVerifier;
    use rustls::{ClientConfig, HandshakeKind, ServerConfig};
    use std::sync::atomic::{AtomicBool, Ordering};

    const HOUR: Duration = Duration::from_secs(3600);
    /// The beginning of an epoch.
    const THEN: u64 = 3600 * 500_000;

    fn tickets(secret: u8, binding: u8) -> Tickets {
        Tickets::new([secret; 32], HOUR, [binding; 32])
    }

    fn octets(chain: &[CertificateDer<'_>]) -> Vec<Vec<u8>> {
        chain.iter().map(|der| der.to_vec()).collect()
    }

    /// A listener to which clients may come with a certificate.
    fn listener(ca: &Ca, tickets: Arc<dyn ProducesTickets>) -> Arc<ServerConfig> {
        let store = Arc::new(CertificateStore::new(vec![ca.issue(&["a.example"]).certificate()]).unwrap());
        let builder = WebPkiClientVerifier::builder_with_provider(ca.roots(), Arc::new(provider()));
        let verifier = builder.allow_unauthenticated().build().unwrap();
        Arc::new(server_config(store, Some(verifier), Some(tickets)).unwrap())
    }

    fn is_resumed(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> bool {
        let (_, server) = handshake(client.clone(), server.clone(), "a.example").unwrap();
        server.handshake_kind() == Some(HandshakeKind::Resumed)
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
        let visitor = client(&ca, None, &[]);
        assert!(!is_resumed(&visitor, &one));
        assert!(is_resumed(&visitor, &other));
        assert!(is_resumed(&visitor, &one));
        assert!(!is_resumed(&visitor, &bound), "another binding");
        let stranger = client(&ca, None, &[]);
        assert!(!is_resumed(&stranger, &none));
        assert!(!is_resumed(&stranger, &none), "no tickets");
    }

    #[test]
    fn a_session_goes_on_while_its_certificate_is_good() {
        let ca = Ca::new("ca");
        let issued = ca.below("below").issue(&["b.example"]);
        let shown = octets(&issued.chain());
        assert_eq!(shown.len(), 3);
        let good = Arc::new(AtomicBool::new(true));
        let check = {
            let (shown, good) = (shown.clone(), good.clone());
            move |chain: &[CertificateDer<'_>]| octets(chain) == shown && good.load(Ordering::Relaxed)
        };
        let server = listener(&ca, Arc::new(tickets(1, 1).with_check(check)));
        let visitor = client(&ca, Some(&issued), &[]);
        assert!(!is_resumed(&visitor, &server));
        assert!(is_resumed(&visitor, &server), "rustls writes sessions in another way than they are read here");
        let (_, resumed) = handshake(visitor.clone(), server.clone(), "a.example").unwrap();
        assert_eq!(octets(resumed.peer_certificates().unwrap()), shown);

        good.store(false, Ordering::Relaxed);
        for _ in 0..2 {
            let (_, full) = handshake(visitor.clone(), server.clone(), "a.example").unwrap();
            assert_ne!(full.handshake_kind(), Some(HandshakeKind::Resumed));
            assert_eq!(octets(full.peer_certificates().unwrap()), shown, "the client showed it again");
        }
        // Who has none is not asked about.
        let nobody = client(&ca, None, &[]);
        assert!(!is_resumed(&nobody, &server));
        assert!(is_resumed(&nobody, &server));

        good.store(true, Ordering::Relaxed);
        assert!(is_resumed(&visitor, &server), "tickets of full handshakes");
        let unchecked = listener(&ca, Arc::new(tickets(1, 1)));
        assert!(is_resumed(&visitor, &unchecked));
    }

    /// Keeps the sessions that rustls writes.
    #[derive(Debug, Default)]
    struct Sessions(Mutex<Vec<Vec<u8>>>);

    impl ProducesTickets for Sessions {
        fn enabled(&self) -> bool {
            true
        }

        fn lifetime(&self) -> u32 {
            60
        }

        fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
            self.0.lock().push(plain.to_vec());
            Some(vec![0])
        }

        fn decrypt(&self, _: &[u8]) -> Option<Vec<u8>> {
            None
        }
    }

    #[test]
    fn sessions_are_read_whole_or_not() {
        let ca = Ca::new("ca");
        let issued = ca.issue(&["b.example"]);
        for identity in [Some(&issued), None] {
            let sessions = Arc::new(Sessions::default());
            handshake(client(&ca, identity, &[]), listener(&ca, sessions.clone()), "a.example").unwrap();
            let session = sessions.0.lock().first().unwrap().clone();
            let read = client_chain(&session).unwrap().map(|chain| octets(&chain));
            assert_eq!(read, identity.map(|issued| octets(&issued.chain())));
            for length in 0..session.len() {
                assert!(client_chain(&session[..length]).is_err(), "{length}");
            }
            assert!(client_chain(&[&session[..], &[0]].concat()).is_err());
        }

        let written = |chain: &[u8]| [&[0, 3, 4, 0x13, 1, 1, 7, 0][..], chain, &[0; 1 + 2 + 8 + 4]].concat();
        assert!(matches!(client_chain(&written(&[0])), Ok(None)));
        let one = written(&[1, 0, 0, 4, 0, 0, 1, 9]);
        assert_eq!(octets(&client_chain(&one).unwrap().unwrap()), [[9_u8]]);
        for (chain, why) in [
            (&[0; 0][..], "no flag"),
            (&[2], "no flag"),
            (&[1, 0, 0, 0], "nobody"),
            (&[1, 0, 0, 4, 0, 0, 2, 9], "more than the list"),
            (&[1, 0, 0, 5, 0, 0, 1, 9, 0], "something behind"),
            (&[1, 0xff, 0xff, 0xff, 0, 0, 1, 9], "more than there is"),
        ] {
            assert!(client_chain(&written(chain)).is_err(), "{why}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_no_session() {
        let (checked, unchecked) = (tickets(1, 1).with_check(|_| true), tickets(1, 1));
        for garbage in [&b"session"[..], b"", &[0; 64], &[1; 64], &[0xff; 300]] {
            let ticket = checked.encrypt(garbage).unwrap();
            assert_eq!(checked.decrypt(&ticket), None);
            assert_eq!(unchecked.decrypt(&ticket).as_deref(), Some(garbage));
        }
        assert!(format!("{checked:?}").contains("Check"));
    }
}
