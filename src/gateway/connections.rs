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
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// Why a connection is refused: a label in metrics.
pub(super) type Why = &'static str;

/// All that are open, and all handshakes under way.
#[derive(Default)]
pub(super) struct Connections {
    open: Arc<AtomicU32>,
    handshakes: Arc<AtomicU32>,
    known: Arc<Known>,
}

#[derive(Default)]
struct Known {
    next: AtomicU64,
    by_id: Mutex<HashMap<u64, Weak<Connection>>>,
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
        self.open.load(Ordering::Relaxed)
    }

    /// One more of all, however many there are.
    pub(super) fn open_anyway(&self) -> Option<Counted> {
        Counted::one(&self.open, u32::MAX)
    }

    /// One more of a source, which begins a handshake.
    pub(super) fn from(&self, live: &Live, ip: IpAddr) -> Result<(Option<Ticket>, Counted), Why> {
        let limits = &live.connections;
        let exempt = limits.exempt.iter().any(|network| network.contains(&ip.to_canonical()));
        let ticket = match exempt {
            true => None,
            false => Some(live.admission.open_of_ip(ip, limits.per_ip).ok_or("per-ip")?),
        };
        let handshake = Counted::one(&self.handshakes, limits.handshakes_at_once).ok_or("handshakes-at-once")?;
        if !exempt && !live.admission.handshake(ip, limits.handshakes_per_ip) {
            return Err("handshake-rate");
        }
        Ok((ticket, handshake))
    }

    /// One more of a provider, by the first name of its certificate.
    pub(super) fn of(&self, live: &Live, connection: &Connection) -> Result<Option<Ticket>, Why> {
        match connection.identity.as_ref().and_then(|identity| identity.dns_names.first()) {
            Some(name) => {
                let ticket = live.admission.open_of_provider(name, live.connections.per_provider);
                ticket.map(Some).ok_or("per-provider")
            }
            None => Ok(None),
        }
    }

    /// Keeps a connection in mind. One without a certificate need not be.
    pub(super) fn keep(&self, connection: &Arc<Connection>) -> Option<Entry> {
        connection.identity.as_ref()?;
        let id = self.known.next.fetch_add(1, Ordering::Relaxed);
        self.known.by_id.lock().insert(id, Arc::downgrade(connection));
        Some(Entry { known: self.known.clone(), id })
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
    let Some(identity) = &connection.identity else { return true };
    let Some(listener) = live.tls.door(connection.listener) else { return true };
    live.peers.admits_any(identity) && (listener.trust == connection.trust || listener.trusts(&connection.chain))
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
