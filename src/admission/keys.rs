//! Keys of limits' states: keyed hashes of the attributes that a limit's key names. Raw identifiers are not kept.
//!
//! An attribute is hashed once for a request, whatever number of limits ask for it; a limit mixes the hashes with secret
//! factors of its own. One that a request does not have is hashed as absent: all who lack it share a state.

use super::{KeyParts, Subject};
use crate::dialect::Member;
use crate::limiter::Key;
use siphasher::sip128::{SipHasher13, SipHasher24};
use std::net::IpAddr;

/// Attributes that keys are made of: ip, provider, group, member, target, endpoint.
const PARTS: usize = 6;

/// In a tag: the attribute is absent.
const ABSENT: u64 = 1 << 32;

/// Hashes the attributes of requests, under a secret.
#[derive(Debug)]
pub(super) struct Hasher {
    keys: (u64, u64),
    /// Attributes that any limit's key asks for.
    wanted: KeyParts,
    ipv6_prefix: u8,
}

impl Hasher {
    /// A hasher for limits with these keys. IPv6 sources are one by their first `ipv6_prefix` bits.
    pub(super) fn new(secret: [u8; 16], keys: impl Iterator<Item = KeyParts> + Clone, ipv6_prefix: u8) -> Self {
        let both = u128::from_le_bytes(secret);
        let any = |part: fn(&KeyParts) -> bool| keys.clone().any(|key| part(&key));
        let wanted = KeyParts {
            ip: any(|key| key.ip),
            provider: any(|key| key.provider || key.group || key.member || key.target),
            group: any(|key| key.group),
            member: any(|key| key.member),
            target: any(|key| key.target),
            endpoint: any(|key| key.endpoint),
        };
        Self { keys: ((both >> 64) as u64, both as u64), wanted, ipv6_prefix }
    }

    /// How the limit at a place in the policy makes its keys; `second` for its second limit.
    pub(super) fn mix(&self, limit: usize, second: bool, parts: KeyParts) -> Mix {
        Mix::new(self.keys, limit, second, parts)
    }

    /// A hash for logs: stable within the process, meaningless outside.
    pub(super) fn pseudonym(&self, octets: &[u8]) -> u128 {
        SipHasher24::new_with_keys(self.keys.0, self.keys.1 ^ 1).hash(octets).as_u128()
    }

    /// The key of a source alone, outside of all limits.
    pub(super) fn source_key(&self, ip: IpAddr) -> Key {
        Key(self.sip(9, &self.source(ip).to_be_bytes()))
    }

    /// The attributes of a request that any limit asks for, hashed once for all limits.
    #[inline]
    pub(super) fn parts(&self, subject: &Subject<'_>) -> [u128; PARTS] {
        let hash = |tag: u64, octets: Option<&[u8]>| match octets {
            Some(octets) => self.sip(tag, octets),
            None => self.sip(tag | ABSENT, &[]),
        };
        let wanted = self.wanted;
        let mut parts = [0; PARTS];
        let [ip, provider, group, member, target, endpoint] = &mut parts;
        if wanted.ip {
            *ip = self.sip(1, &self.source(subject.ip).to_be_bytes());
        }
        if wanted.provider {
            *provider = hash(2, subject.provider.map(str::as_bytes));
        }
        if wanted.group || wanted.member {
            *group = hash(3, subject.group);
        }
        if wanted.member {
            // A leaf index says nothing without its group.
            let mut of_group = [0; 32];
            let (in_group, id) = of_group.split_at_mut(16);
            in_group.copy_from_slice(&group.to_be_bytes());
            let tag = match subject.member {
                Some(Member::LeafIndex(leaf)) => {
                    id.copy_from_slice(&u128::from(leaf).to_be_bytes());
                    4
                }
                Some(Member::KeyPackageRef(octets)) => {
                    id.copy_from_slice(&self.sip(5, octets).to_be_bytes());
                    5
                }
                Some(Member::UserKeyHash(octets)) => {
                    id.copy_from_slice(&self.sip(6, octets).to_be_bytes());
                    6
                }
                None => 4 | ABSENT,
            };
            *member = self.sip(tag, &of_group);
        }
        if wanted.target {
            *target = hash(7, subject.target);
        }
        if wanted.endpoint {
            *endpoint = self.sip(8, subject.operation.endpoint.as_bytes());
        }
        parts
    }

    #[inline]
    fn sip(&self, tag: u64, octets: &[u8]) -> u128 {
        SipHasher13::new_with_keys(self.keys.0 ^ tag, self.keys.1).hash(octets).as_u128()
    }

    /// A source: an IPv4 address, mapped or not, or an IPv6 prefix.
    fn source(&self, ip: IpAddr) -> u128 {
        match ip.to_canonical() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().to_bits(),
            IpAddr::V6(ip) => {
                let host_bits = 128u32.saturating_sub(u32::from(self.ipv6_prefix));
                let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
                ip.to_bits() & mask
            }
        }
    }
}

/// How a limit makes a key of a request's hashed attributes: a sum of products with secret factors. The attributes are
/// outputs of a keyed hash that nobody outside sees, so keys of different attributes meet as seldom as random ones, at the
/// price of a multiplication each and not of another hash.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mix {
    base: u128,
    factors: [u128; PARTS],
    /// For what is not an attribute.
    secret: u128,
}

impl Mix {
    fn new(keys: (u64, u64), limit: usize, second: bool, parts: KeyParts) -> Self {
        let secret = |n: u64| {
            let mut octets = [0; 24];
            let numbers = [limit as u64, u64::from(second), n];
            octets.chunks_mut(8).zip(numbers).for_each(|(to, from)| to.copy_from_slice(&from.to_be_bytes()));
            SipHasher24::new_with_keys(!keys.0, !keys.1).hash(&octets).as_u128()
        };
        // One provider must not spend another's quota by naming its groups.
        let provider = parts.provider || parts.group || parts.member || parts.target;
        // A member's hash holds its group already.
        let used = [parts.ip, provider, parts.group, parts.member, parts.target, parts.endpoint];
        let mut factors = [0; PARTS];
        factors.iter_mut().zip(used).zip(1..).for_each(|((factor, used), n)| {
            if used {
                // Odd: no two values of an attribute have one product.
                *factor = secret(n) | 1;
            }
        });
        Self { base: secret(0), factors, secret: secret(1 + PARTS as u64) | 1 }
    }

    #[inline]
    pub(super) fn key(&self, parts: &[u128; PARTS]) -> Key {
        let products = self.factors.iter().zip(parts).map(|(factor, part)| factor.wrapping_mul(*part));
        Key(products.fold(self.base, u128::wrapping_add))
    }

    /// The key of the second limit that is one endpoint's alone; 0 for one that is not.
    pub(super) fn key_at(&self, parts: &[u128; PARTS], endpoint: usize) -> Key {
        Key(self.key(parts).0.wrapping_add(self.secret.wrapping_mul(endpoint as u128)))
    }
}
