//! Requests under way, by key: how many there are at once of a provider, a target, whatever a limit is keyed by.
//!
//! A count is held by its request's [`Ticket`] and ends with it, however the request ends. There are no more keys than
//! requests under way. It is this node's own count: one kept elsewhere would outlive the node that counted.

use super::Key;
use super::locks::{Locks, ParkingLot};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

const SHARDS: usize = 64;

/// The counts of a node.
#[derive(Clone)]
pub struct InFlight(Arc<[<ParkingLot as Locks>::Mutex<HashMap<Key, u32>>]>);

/// One of the requests under way of a key.
pub struct Ticket {
    counts: InFlight,
    key: Key,
    /// How many there are, with this one.
    pub count: u32,
}

impl std::fmt::Debug for InFlight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InFlight").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticket").field("count", &self.count).finish_non_exhaustive()
    }
}

impl Default for InFlight {
    fn default() -> Self {
        Self((0..SHARDS).map(|_| ParkingLot::mutex(HashMap::new())).collect())
    }
}

impl InFlight {
    fn shard(&self, key: Key) -> Option<&<ParkingLot as Locks>::Mutex<HashMap<Key, u32>>> {
        self.0.get(key.shard(SHARDS))
    }

    /// One more, if there are no more than `most` with it.
    pub fn enter(&self, key: Key, most: u32) -> Option<Ticket> {
        let mut counts = self.shard(key)?.lock();
        let count = counts.get(&key).copied().unwrap_or(0).checked_add(1).filter(|count| *count <= most)?;
        counts.insert(key, count);
        drop(counts);
        Some(Ticket { counts: self.clone(), key, count })
    }

    /// How many keys have any.
    pub fn keys(&self) -> usize {
        self.0.iter().map(|shard| shard.lock().len()).sum()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let Some(shard) = self.counts.shard(self.key) else { return };
        if let Entry::Occupied(mut count) = shard.lock().entry(self.key) {
            match count.get().checked_sub(1) {
                None | Some(0) => {
                    count.remove();
                }
                Some(rest) => *count.get_mut() = rest,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_end_with_their_tickets() {
        let counts = InFlight::default();
        let (a, b) = (counts.enter(Key(1), 2).unwrap(), counts.enter(Key(1), 2).unwrap());
        assert_eq!((a.count, b.count, counts.keys()), (1, 2, 1));
        assert!(counts.enter(Key(1), 2).is_none());
        drop(a);
        assert_eq!(counts.enter(Key(1), 2).unwrap().count, 2);
        drop(b);
        assert_eq!(counts.keys(), 0, "nothing is kept of who has nothing under way");
    }
}
