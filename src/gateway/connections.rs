//! Connections before there is a request on them: who may open how many, and who may keep theirs.
//!
//! A count is held by its guard and ends with it, however the connection ends. Connections with a client certificate are
//! known, so that a reload can end those of a peer that is no longer admitted.

use super::live::Live;
use super::stream::Connection;
use crate::limiter::in_flight::Ticket;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// Connections of this provider's own nodes at most.
const MOST_EGRESS: u32 = 4096;

/// Why a connection is refused: a label in metrics.
pub(super) type Why = &'static str;

/// All that are open, and all handshakes under way.
#[derive(Default)]
pub(super) struct Connections {
    open: Arc<AtomicU32>,
    /// Of these, those after their handshake whose peers have shown no certificate.
    strangers: Arc<AtomicU32>,
    handshakes: Arc<AtomicU32>,
    egress: Arc<AtomicU32>,
    known: Arc<Known>,
}

#[derive(Default)]
struct Known {
    next: AtomicU64,
    by_id: Mutex<HashMap<u64, Weak<Connection>>>,
    /// All are to close, those to come too.
    closes: AtomicBool,
}

/// One of those that are counted.
pub(super) struct Counted(Arc<AtomicU32>);

impl Counted {
    fn one(counter: &Arc<AtomicU32>, most: u32) -> Option<Self> {
        let more = |count: u32| count.checked_add(1).filter(|count| *count <= most);
        counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self(counter.clone()))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts of a source.
#[derive(Default)]
pub(super) struct OfSource {
    _ip: Option<Ticket>,
    _network: Option<Ticket>,
}

/// Counts of a handshake under way.
pub(super) struct Handshake {
    _all: Counted,
    _of_source: Option<Ticket>,
}

/// The count of whom a connection is from. It is held, and not looked at.
#[expect(dead_code, reason = "what is counted ends with this")]
pub(super) enum OfPeer {
    Stranger(Counted),
    Provider(Ticket),
}

/// In the place of a provider's name, which it is not, for those who may send in none.
const NOBODY: &str = "!";

/// A connection that is known, until this is dropped.
pub(super) struct Entry {
    known: Arc<Known>,
    id: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.known.by_id.lock().remove(&self.id);
    }
}

impl Connections {
    /// One more of all.
    pub(super) fn open(&self, live: &Live) -> Result<Counted, Why> {
        Counted::one(&self.open, live.connections.max).ok_or("max")
    }

    /// How many are open, with those that have not shaken hands yet.
    pub(super) fn count(&self) -> u32 {
        self.open.load(Ordering::Relaxed) + self.egress.load(Ordering::Relaxed)
    }

    /// One more of this provider's own nodes, which take no place of others'.
    pub(super) fn open_egress(&self) -> Option<Counted> {
        Counted::one(&self.egress, MOST_EGRESS)
    }

    /// One more of a source, which begins a handshake.
    pub(super) fn from(&self, live: &Live, ip: IpAddr) -> Result<(OfSource, Handshake), Why> {
        let (limits, admission) = (&live.connections, &live.admission);
        if limits.exempt.iter().any(|network| network.contains(&ip.to_canonical())) {
            let all = Counted::one(&self.handshakes, limits.handshakes_at_once).ok_or("handshakes-at-once")?;
            return Ok((OfSource::default(), Handshake { _all: all, _of_source: None }));
        }
        let of_source = OfSource {
            _ip: Some(admission.open_of_ip(ip, limits.per_ip).ok_or("per-ip")?),
            // Who has many prefixes has not as many times as much.
            _network: match admission.open_of_network(ip, limits.per_ip.saturating_mul(4)) {
                Some(ticket) => ticket,
                None => return Err("per-ip"),
            },
        };
        // Before the counts that are shared with others.
        if !admission.handshake(ip, limits.handshakes_per_ip) {
            return Err("handshake-rate");
        }
        // Not even a few sources may hold up all others by handshakes that they do not go on with.
        let share = (limits.handshakes_at_once / 16).max(8);
        let one = admission.handshake_of_ip(ip, share).ok_or("handshakes-at-once")?;
        let all = Counted::one(&self.handshakes, limits.handshakes_at_once).ok_or("handshakes-at-once")?;
        Ok((of_source, Handshake { _all: all, _of_source: Some(one) }))
    }

    /// One more of a provider, by the first name of its certificate; or of strangers, who leave a quarter of all to those who
    /// have shown one. Who may not send in any of its names counts for none of them.
    pub(super) fn of(&self, live: &Live, connection: &Connection) -> Result<OfPeer, Why> {
        let limits = &live.connections;
        let Some(identity) = &connection.identity else {
            let most = (limits.max - limits.max / 4).max(1);
            return Counted::one(&self.strangers, most).map(OfPeer::Stranger).ok_or("max");
        };
        let name = identity.dns_names.first().filter(|_| live.peers.admits_any(identity));
        let name = name.map_or(NOBODY, String::as_str);
        live.admission.open_of_provider(name, limits.per_provider).map(OfPeer::Provider).ok_or("per-provider")
    }

    /// Keeps a connection in mind.
    pub(super) fn keep(&self, connection: &Arc<Connection>) -> Entry {
        let id = self.known.next.fetch_add(1, Ordering::Relaxed);
        self.known.by_id.lock().insert(id, Arc::downgrade(connection));
        if self.known.closes.load(Ordering::SeqCst) {
            connection.close();
        }
        Entry { known: self.known.clone(), id }
    }

    /// Ends all connections, each once nothing is under way on it.
    pub(super) fn close_all(&self) {
        self.known.closes.store(true, Ordering::SeqCst);
        let all: Vec<_> = self.known.by_id.lock().values().filter_map(Weak::upgrade).collect();
        all.iter().for_each(|connection| connection.close());
    }

    /// Ends the connections whose peers are not admitted any more; says how many.
    pub(super) fn review(&self, live: &Live) -> u64 {
        let all: Vec<_> = self.known.by_id.lock().values().filter_map(Weak::upgrade).collect();
        let unwanted = all.iter().filter(|connection| !may_stay(live, connection));
        unwanted.map(|connection| connection.cut()).count() as u64
    }
}

/// Whether a connection would be taken now: its peer may send, and its certificate is trusted.
pub(super) fn may_stay(live: &Live, connection: &Connection) -> bool {
    let egress = live.egress.as_ref().filter(|egress| egress.settings.address == connection.listener);
    let listener = match egress {
        // Nodes of this provider: without TLS on the loopback, or by their certificates.
        Some(egress) => match &egress.tls {
            Some(tls) => tls,
            None => return connection.identity.is_none(),
        },
        None => match live.tls.door(connection.listener) {
            Some(tls) => tls,
            None => return true,
        },
    };
    let Some(identity) = &connection.identity else { return !listener.required };
    let trusted = listener.trust == connection.trust || listener.trusts(&connection.chain);
    trusted && (egress.is_some() || live.peers.admits_any(identity))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_end_with_their_guards() {
        let counter = Arc::new(AtomicU32::new(0));
        let (a, b) = (Counted::one(&counter, 2).unwrap(), Counted::one(&counter, 2).unwrap());
        assert!(Counted::one(&counter, 2).is_none());
        drop(a);
        assert!(Counted::one(&counter, 2).is_some());
        drop(b);
        assert_eq!(counter.load(Ordering::Relaxed), 0);
    }
}
