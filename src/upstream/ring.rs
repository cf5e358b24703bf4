//! Which members a group or a turn comes to, one after the other, however they stand: nginx's ring (ketama) for groups,
//! an order by weight for turns.

use pingora_ketama::{Bucket, Continuum};
use std::collections::HashMap;
use std::net::SocketAddr;

/// Points of the ring, or turns, that are looked at for a request. With members out that have nearly all of them, those
/// that have the rest are found without the ring.
const LOOKS: usize = 512;

/// The weight of all members together, at most: each has 160 points on the ring for 1 of it.
const HEAVIEST: u64 = 16 << 10;

/// Ring and order, in which members are known by their place in a list.
pub(super) struct Layout {
    ring: Option<Continuum>,
    /// Whose each point of the ring is.
    points: Box<[u16]>,
    /// Whose each turn is.
    order: Box<[u16]>,
}

impl Layout {
    /// Of members by where they are on the ring and their weights, of which there are fewer than 2^16; with a ring or
    /// without.
    pub(super) fn new(members: &[(SocketAddr, u32)], by_group: bool) -> Self {
        let weights = scaled(members.iter().map(|(_, weight)| *weight));
        let order = order(&weights);
        // One member has all groups.
        let ring = (by_group && members.len() > 1).then(|| {
            let buckets = members.iter().zip(&weights).map(|((address, _), weight)| Bucket::new(*address, *weight));
            Continuum::new(&buckets.collect::<Vec<_>>())
        });
        let points = ring.as_ref().map(|ring| points(ring, members)).unwrap_or_default();
        Self { ring, points, order }
    }

    /// The members at a group's point of the ring and at those that follow it: none where there is no ring.
    pub(super) fn of_group(&self, group: u128) -> impl Iterator<Item = usize> {
        let first = self.ring.as_ref().map_or(0, |ring| ring.node_idx(&group.to_be_bytes()));
        let (after, before) = (self.points.get(first..), self.points.get(..first));
        let all = after.into_iter().chain(before).flatten();
        all.take(LOOKS).map(|member| usize::from(*member))
    }

    /// Turns that are looked at for a request.
    pub(super) fn turns(&self) -> usize {
        self.order.len().saturating_mul(2).min(LOOKS)
    }

    /// The member whose turn it is.
    pub(super) fn of_turn(&self, turn: u64) -> Option<usize> {
        let turns = u64::try_from(self.order.len()).ok()?;
        let turn = usize::try_from(turn.checked_rem(turns)?).ok()?;
        self.order.get(turn).map(|member| usize::from(*member))
    }
}

/// Weights that can be had: at least 1 each, and not too much together.
fn scaled(weights: impl Iterator<Item = u32> + Clone) -> Vec<u32> {
    let sum: u64 = weights.clone().map(u64::from).sum();
    let scale = |weight: u32| match sum > HEAVIEST {
        true => u32::try_from(u64::from(weight).saturating_mul(HEAVIEST) / sum).unwrap_or(u32::MAX),
        false => weight,
    };
    weights.map(|weight| scale(weight).max(1)).collect()
}

/// Whose each point of a ring is: it knows addresses.
fn points(ring: &Continuum, members: &[(SocketAddr, u32)]) -> Box<[u16]> {
    let places: HashMap<SocketAddr, u16> = members.iter().map(|(address, _)| *address).zip(0..).collect();
    let mut next = 0;
    let mut points = vec![];
    while let Some(place) = ring.get_addr(&mut next).and_then(|address| places.get(address)) {
        points.push(*place);
        if next == 0 {
            break;
        }
    }
    points.into_boxed_slice()
}

/// Turns by weight, each member's spread evenly over all; members of the same weight in the order that they have.
fn order(weights: &[u32]) -> Box<[u16]> {
    let divisor = weights.iter().copied().fold(0, greatest_common_divisor).max(1);
    let mut turns: Vec<(u64, u16)> = vec![];
    for (weight, member) in weights.iter().map(|weight| u64::from(weight / divisor)).zip(0..) {
        // The middles of as many equal parts.
        turns.extend((0..weight).map(|turn| (((2 * turn + 1) << 32) / (2 * weight), member)));
    }
    turns.sort_unstable();
    turns.into_iter().map(|(_, member)| member).collect()
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::address;
    use super::*;
    use siphasher::sip128::SipHasher24;

    fn layout(weights: &[u32]) -> Layout {
        let members: Vec<_> = weights.iter().zip(1..).map(|(weight, i)| (address(i), *weight)).collect();
        Layout::new(&members, true)
    }

    fn shares<const N: usize>(members: impl Iterator<Item = usize>) -> [usize; N] {
        members.fold([0; N], |mut shares, member| {
            shares[member] += 1;
            shares
        })
    }

    #[test]
    fn groups_are_where_the_ring_has_them() {
        let layout = layout(&[1, 2, 3]);
        let ring = layout.ring.as_ref().unwrap();
        assert!(layout.points.len() > 900, "160 points for each 1 of weight, but for a few that coincide");
        for group in 0..1000u128 {
            let of_ring = ring.node(&group.to_be_bytes()).unwrap();
            assert_eq!(address(layout.of_group(group).next().unwrap() as u16 + 1), of_ring);
        }
    }

    #[test]
    fn groups_are_shared_out_by_weight() {
        let layout = layout(&[1, 2, 3]);
        // Hashes of groups, as requests have them.
        let hash = |group: u128| SipHasher24::new().hash(&group.to_be_bytes());
        let groups = (0..6000).map(|group| u128::from(hash(group)));
        let shares: [usize; 3] = shares(groups.map(|group| layout.of_group(group).next().unwrap()));
        for (share, weight) in shares.iter().zip(1..) {
            assert!((700 * weight..1300 * weight).contains(share), "{shares:?}");
        }
    }

    #[test]
    fn the_walk_goes_round_the_ring_once_and_no_further_than_it_may() {
        let two = layout(&[1, 1]);
        for group in 0..100 {
            let walk: Vec<_> = two.of_group(group).collect();
            assert_eq!(walk.len(), two.points.len());
            assert!(walk.contains(&0) && walk.contains(&1));
        }
        assert_eq!(layout(&[9, 9, 9]).of_group(7).count(), LOOKS);
    }

    #[test]
    fn turns_by_weight_and_evenly() {
        assert_eq!(*layout(&[1, 1, 1]).order, [0, 1, 2]);
        assert_eq!(*layout(&[4, 4, 4]).order, [0, 1, 2]);
        assert_eq!(*layout(&[4, 2]).order, [0, 1, 0]);
        let layout = layout(&[5, 3, 2]);
        for round in 0..4u64 {
            let turns: [usize; 3] = shares((0..10).map(|turn| layout.of_turn(round * 10 + turn).unwrap()));
            assert_eq!(turns, [5, 3, 2]);
        }
        let runs = layout.order.windows(3).filter(|three| three[0] == three[1] && three[1] == three[2]).count();
        assert_eq!(runs, 0, "{:?}", layout.order);
    }

    #[test]
    fn nobody_and_one() {
        let nobody = layout(&[]);
        assert_eq!((nobody.of_turn(7), nobody.of_group(7).next(), nobody.turns()), (None, None, 0));
        let one = layout(&[3]);
        assert_eq!((one.of_turn(7), one.of_group(7).next()), (Some(0), None), "it needs no ring");
        assert!(Layout::new(&[(address(1), 1), (address(2), 1)], false).of_group(7).next().is_none());
    }

    #[test]
    fn weights_have_a_bound_and_nobody_is_left_out() {
        let weights = scaled([256, 256, 1].into_iter().chain(std::iter::repeat_n(256, 1000)));
        assert_eq!(weights.len(), 1003);
        assert_eq!((weights[0], weights[2]), (16, 1));
        assert!(weights.iter().map(|weight| u64::from(*weight)).sum::<u64>() <= HEAVIEST + 1003);
        assert_eq!(scaled([1, 0, 256].into_iter()), [1, 1, 256]);
    }
}
