//! The Delivery Service's nodes: which one a request goes to.
//!
//! Requests of a group go to one node (consistent hash, Pingora's ketama ring), so that a DS may keep a group's state
//! where it is; those without a group go in turn. A node that refuses a connection is left out for a while, and the
//! group's requests go to the next on the ring, as they do when a node is taken out of the configuration.

use parking_lot::Mutex;
use pingora_ketama::{Bucket, Continuum};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What the configuration says of the Delivery Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Its nodes.
    pub nodes: Vec<NodeSettings>,
    /// Whether a group keeps its node.
    pub by_group: bool,
    /// For a connection to a node.
    pub connect_timeout: Duration,
    /// Between two reads of an answer.
    pub read_timeout: Duration,
    /// For a write to a node.
    pub write_timeout: Duration,
    /// For an idle connection to a node.
    pub keepalive: Duration,
    /// How long a node that refuses is left out.
    pub eject_for: Duration,
}

/// A node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeSettings {
    /// Where it is.
    pub address: SocketAddr,
    /// HTTP/2 with prior knowledge; else HTTP/1.1.
    pub h2c: bool,
    /// Its share of the groups.
    pub weight: u32,
}

/// The nodes at work.
pub struct Nodes {
    settings: Settings,
    ring: Continuum,
    turn: AtomicUsize,
    /// Until when a node is left out.
    ejected: Vec<Mutex<Option<Instant>>>,
}

impl std::fmt::Debug for Nodes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nodes").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// Nodes there may be at most.
pub const MAX_NODES: usize = 256;

/// A bit for each node a request has been to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tried([u64; MAX_NODES / 64]);

impl Tried {
    fn has(self, node: usize) -> bool {
        self.0.get(node / 64).is_none_or(|bits| bits >> (node % 64) & 1 == 1)
    }

    /// Notes that a request has been to a node.
    pub fn note(&mut self, node: usize) {
        if let Some(bits) = self.0.get_mut(node / 64) {
            *bits |= 1 << (node % 64);
        }
    }

    /// Takes a node off: it has left the request untouched, and may have it again.
    pub fn forget(&mut self, node: usize) {
        if let Some(bits) = self.0.get_mut(node / 64) {
            *bits &= !(1 << (node % 64));
        }
    }

    /// Whether it has been to any.
    pub fn any(self) -> bool {
        self.count() > 0
    }

    fn count(self) -> usize {
        self.0.iter().map(|bits| bits.count_ones() as usize).sum()
    }
}

impl Nodes {
    /// Nodes as configured, all of them in.
    pub fn new(settings: Settings) -> Self {
        let buckets: Vec<_> = settings.nodes.iter().map(|n| Bucket::new(n.address, n.weight.max(1))).collect();
        let ejected = settings.nodes.iter().map(|_| Mutex::new(None)).collect();
        Self { ring: Continuum::new(&buckets), turn: AtomicUsize::new(0), ejected, settings }
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The address of a node, for a person.
    pub fn address(&self, node: usize) -> Option<String> {
        self.settings.nodes.get(node).map(|node| node.address.to_string())
    }

    /// Chooses a node, by the hash of a group where there is one; none that the request has been to, none that is out.
    pub fn choose(&self, group: Option<u128>, tried: Tried) -> Option<(usize, NodeSettings)> {
        self.choose_at(Instant::now(), group, tried)
    }

    fn choose_at(&self, now: Instant, group: Option<u128>, tried: Tried) -> Option<(usize, NodeSettings)> {
        let nodes = &self.settings.nodes;
        let fit = |node: &usize| !tried.has(*node) && !self.is_out(*node, now);
        let index = |address: &SocketAddr| nodes.iter().position(|n| n.address == *address);
        let chosen = match group {
            // A ring has many points of each node; once every node has been seen, there is none.
            Some(hash) if self.settings.by_group && nodes.len() > 1 => {
                let mut point = self.ring.node_idx(&hash.to_be_bytes());
                let mut walk = std::iter::from_fn(|| self.ring.get_addr(&mut point));
                let mut seen = Tried::default();
                loop {
                    let Some(node) = walk.next().and_then(index) else { break None };
                    if fit(&node) {
                        break Some(node);
                    }
                    seen.note(node);
                    if seen.count() >= nodes.len() {
                        break None;
                    }
                }
            }
            _ => {
                let turn = self.turn.fetch_add(1, Ordering::Relaxed);
                (0..nodes.len()).map(|i| turn.wrapping_add(i) % nodes.len()).find(fit)
            }
        };
        chosen.and_then(|node| Some((node, *nodes.get(node)?)))
    }

    fn is_out(&self, node: usize, now: Instant) -> bool {
        self.ejected.get(node).is_some_and(|until| until.lock().is_some_and(|until| now < until))
    }

    /// Leaves a node out for a while: it refused a connection.
    pub fn eject(&self, node: usize) {
        if let Some(until) = self.ejected.get(node) {
            *until.lock() = Some(Instant::now() + self.settings.eject_for);
        }
    }

    /// Takes a node in again: it accepted a connection.
    pub fn restore(&self, node: usize) {
        if let Some(until) = self.ejected.get(node) {
            let mut until = until.lock();
            if until.is_some() {
                *until = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn nodes(n: u8, by_group: bool) -> Nodes {
        let nodes = (1..=n)
            .map(|i| NodeSettings { address: SocketAddr::from(([127, 0, 0, i], 80)), h2c: false, weight: 1 })
            .collect();
        let second = Duration::from_secs(1);
        Nodes::new(Settings {
            nodes,
            by_group,
            connect_timeout: second,
            read_timeout: second,
            write_timeout: second,
            keepalive: second,
            eject_for: second,
        })
    }

    #[test]
    fn a_group_keeps_its_node_and_groups_are_spread() {
        let nodes = nodes(3, true);
        let mut of_node = HashMap::new();
        for group in 0..300u128 {
            let (node, _) = nodes.choose(Some(group), Tried::default()).unwrap();
            for _ in 0..3 {
                assert_eq!(nodes.choose(Some(group), Tried::default()).unwrap().0, node);
            }
            *of_node.entry(node).or_insert(0) += 1;
        }
        assert!(of_node.values().all(|n| *n > 50), "{of_node:?}");
    }

    #[test]
    fn the_next_node_takes_over_and_only_its_groups_move() {
        let nodes = nodes(3, true);
        let home: Vec<_> = (0..100).map(|g| nodes.choose(Some(g), Tried::default()).unwrap().0).collect();
        nodes.eject(1);
        for (group, home) in home.iter().enumerate() {
            let now = nodes.choose(Some(group as u128), Tried::default()).unwrap().0;
            assert_eq!(now == *home, *home != 1);
        }
        nodes.restore(1);
        for (group, home) in home.iter().enumerate() {
            assert_eq!(nodes.choose(Some(group as u128), Tried::default()).unwrap().0, *home);
        }
    }

    #[test]
    fn when_all_are_out_there_is_none() {
        for by_group in [true, false] {
            let nodes = nodes(3, by_group);
            (0..3).for_each(|node| nodes.eject(node));
            assert_eq!(nodes.choose(Some(7), Tried::default()), None);
            assert_eq!(nodes.choose(None, Tried::default()), None);
            let later = Instant::now() + Duration::from_secs(2);
            assert!(nodes.choose_at(later, Some(7), Tried::default()).is_some());
        }
    }

    #[test]
    fn many_nodes_are_all_of_them_nodes() {
        let nodes = nodes(200, true);
        (0..199).for_each(|node| nodes.eject(node));
        assert_eq!(nodes.choose(Some(7), Tried::default()).unwrap().0, 199, "the only one left");
        nodes.eject(199);
        assert_eq!(nodes.choose(Some(7), Tried::default()), None);
    }

    #[test]
    fn without_a_group_in_turn() {
        let nodes = nodes(3, true);
        let turns: Vec<_> = (0..6).map(|_| nodes.choose(None, Tried::default()).unwrap().0).collect();
        assert_eq!(turns, [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn nobody_is_tried_twice() {
        let nodes = nodes(2, true);
        let mut tried = Tried::default();
        let (first, _) = nodes.choose(Some(1), tried).unwrap();
        tried.note(first);
        let (second, _) = nodes.choose(Some(1), tried).unwrap();
        assert_ne!(first, second);
        tried.note(second);
        assert_eq!(nodes.choose(Some(1), tried), None);
    }
}
