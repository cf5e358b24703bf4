//! What was measured, and what it comes to: medians of turns, and of what they have in relation to each other.

use std::collections::BTreeMap;
use std::fmt;

use crate::load::Cost;
use crate::memory::Memory;
use crate::requests::{Case, Way};
use crate::servers::Kind;

/// The 99th of a hundred among the parts of waits.
pub const P99: usize = 1;

/// What p99 may be beside the better peer's.
pub const WAIT_BAR: f64 = 1.1;

/// Everything, turn by turn.
#[derive(Debug, Default)]
pub struct Results {
    pub costs: BTreeMap<(Kind, Case), Vec<Cost>>,
    /// Microseconds at half load, of each turn: p50, p99 and p99.9.
    pub waits: BTreeMap<(Kind, Case), Vec<[f64; 3]>>,
    /// Requests a second that half load was.
    pub rates: BTreeMap<Case, Vec<f64>>,
    pub memory: BTreeMap<Kind, Vec<Memory>>,
}

/// A median, and the least and the most beside it.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    /// Of two that were measured in the same turns.
    pub fn of(ours: &[f64], theirs: &[f64], how: fn(f64, f64) -> f64) -> Spread {
        let mut each: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| how(*ours, *theirs)).collect();
        each.sort_by(f64::total_cmp);
        Spread { median: each[each.len() / 2], least: each[0], most: each[each.len() - 1] }
    }

    pub fn ratio(ours: &[f64], theirs: &[f64]) -> Spread {
        Spread::of(ours, theirs, |ours, theirs| ours / theirs)
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} ({:.2}–{:.2})", self.median, self.least, self.most)
    }
}

/// The middle one.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What the gateway may cost beside each peer.
pub fn bars(way: Way) -> [(Kind, f64); 2] {
    match way {
        Way::Http1 => [(Kind::Nginx, 1.0), (Kind::HaProxy, 1.0)],
        Way::Http2 => [(Kind::Nginx, 1.0), (Kind::HaProxy, 1.15)],
        Way::New => [(Kind::Nginx, 0.8), (Kind::HaProxy, 0.8)],
    }
}

impl Results {
    /// Those that were measured, in their order.
    pub fn cases(&self) -> impl Iterator<Item = Case> {
        self.rates.keys().copied()
    }

    /// Of each turn.
    pub fn costs(&self, kind: Kind, case: Case, what: fn(&Cost) -> f64) -> Vec<f64> {
        self.costs[&(kind, case)].iter().map(what).collect()
    }

    /// Of each turn: 0 is p50, 1 p99, 2 p99.9.
    pub fn waits(&self, kind: Kind, case: Case, part: usize) -> Vec<f64> {
        self.waits[&(kind, case)].iter().map(|round| round[part]).collect()
    }

    /// Of each time.
    pub fn memory(&self, kind: Kind, what: fn(&Memory) -> f64) -> Vec<f64> {
        self.memory[&kind].iter().map(what).collect()
    }

    /// What a request costs, as a part of what it costs a peer.
    pub fn cost_beside(&self, kind: Kind, peer: Kind, case: Case) -> Spread {
        let of = |kind| self.costs(kind, case, |cost| cost.micros);
        Spread::ratio(&of(kind), &of(peer))
    }

    /// The gateway's p99, as a part of that of the peer that has the lower one.
    pub fn wait_beside_better(&self, case: Case) -> (Kind, Spread) {
        beside_better(|kind| self.waits(kind, case, P99))
    }
}

/// The gateway's, as a part of that of the peer that has less.
pub fn beside_better(of: impl Fn(Kind) -> Vec<f64>) -> (Kind, Spread) {
    let nginx_is_better = median(&of(Kind::Nginx)) <= median(&of(Kind::HaProxy));
    let better = if nginx_is_better { Kind::Nginx } else { Kind::HaProxy };
    (better, Spread::ratio(&of(Kind::Gateway), &of(better)))
}
