//! Keys of limits' states: keyed hashes of the attributes that a limit's key names. Raw identifiers are not kept.
//!
//! An attribute is hashed once for a request, whatever number of limits ask for it; a limit mixes the hashes with secret
//! factors of its own. One that a request does not have is hashed as absent: all who lack it share a state. A state belongs
//! to a limit's name and to its rate: a reload that changes neither finds it again, and no state is read by another rate.

use super::{KeyParts, Subject};
use crate::dialect::Member;
use crate::limiter::Key;
use crate::limiter::gcra::Gcra;
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
    /// Every limit's key holds the provider.
    by_provider: bool,
}

impl Hasher {
    /// A hasher for limits with these keys. IPv6 sources are one by their first `ipv6_prefix` bits. `by_provider`: every limit
    /// counts each provider's requests apart, whatever its key asks for.
    pub(super) fn new(
        secret: [u8; 16],
        keys: impl Iterator<Item = KeyParts> + Clone,
        ipv6_prefix: u8,
        by_provider: bool,
    ) -> Self {
        let both = u128::from_le_bytes(secret);
        let any = |part: fn(&KeyParts) -> bool| keys.clone().any(|key| part(&key));
        let wanted = KeyParts {
            ip: any(|key| key.ip),
            provider: by_provider || any(|key| key.provider || key.group || key.member || key.target),
            group: any(|key| key.group),
            member: any(|key| key.member),
            target: any(|key| key.target),
            endpoint: any(|key| key.endpoint),
        };
        Self { keys: ((both >> 64) as u64, both as u64), wanted, ipv6_prefix, by_provider }
    }

    /// How a limit makes its keys; `second` for its second limit.
    pub(super) fn mix(&self, limit: &str, second: bool, parts: KeyParts) -> Mix {
        Mix::new(self.keys, limit, second, parts, self.by_provider)
    }

    /// What a rate adds to a key.
    pub(super) fn salt(&self, gcra: &Gcra) -> Salt {
        let numbers = [u128::from(gcra.increment(1)), gcra.window().as_nanos(), u128::from(gcra.burst())];
        let octets: Vec<u8> = numbers.iter().flat_map(|n| n.to_be_bytes()).collect();
        Salt(SipHasher24::new_with_keys(!self.keys.0, self.keys.1).hash(&octets).as_u128())
    }

    /// What an answer says of whose quota it is: the same for the same, and no more.
    pub(super) fn partition(&self, key: Key) -> u64 {
        SipHasher24::new_with_keys(self.keys.0, !self.keys.1).hash(&key.0.to_be_bytes()).as_u128() as u64
    }

    /// Of the attributes of a request, what stands for its provider.
    pub(super) fn provider_of(parts: &[u128; PARTS]) -> u64 {
        parts[1] as u64
    }

    /// A hash for logs: stable within the process, meaningless outside.
    pub(super) fn pseudonym(&self, octets: &[u8]) -> u128 {
        SipHasher24::new_with_keys(self.keys.0, self.keys.1 ^ 1).hash(octets).as_u128()
    }

    /// The key of a source alone, outside of all limits.
    pub(super) fn source_key(&self, ip: IpAddr) -> Key {
        Key(self.sip(9, &self.source(ip).to_be_bytes()))
    }

    /// The overflow bucket of sources that bring bad tokens.
    pub(super) fn bad_tokens(&self) -> Key {
        Key(self.sip(9 | ABSENT, &[]))
    }

    /// The key of a source's handshakes.
    pub(super) fn handshake_key(&self, ip: IpAddr) -> Key {
        Key(self.sip(10, &self.source(ip).to_be_bytes()))
    }

    /// The overflow bucket of sources that begin handshakes.
    pub(super) fn handshakes(&self) -> Key {
        Key(self.sip(10 | ABSENT, &[]))
    }

    /// The key of a source's open connections.
    pub(super) fn open_key(&self, ip: IpAddr) -> Key {
        Key(self.sip(11, &self.source(ip).to_be_bytes()))
    }

    /// The key of the open connections of an IPv6 network.
    pub(super) fn network_key(&self, ip: IpAddr) -> Option<Key> {
        match ip.to_canonical() {
            IpAddr::V4(_) => None,
            IpAddr::V6(ip) => Some(Key(self.sip(13, &(ip.to_bits() >> 80).to_be_bytes()))),
        }
    }

    /// The key of a source's handshakes under way.
    pub(super) fn under_way_key(&self, ip: IpAddr) -> Key {
        Key(self.sip(14, &self.source(ip).to_be_bytes()))
    }

    /// The key of a source's requests whose bodies are waited for.
    pub(super) fn waiting_key(&self, ip: IpAddr, peer: Option<&str>) -> Key {
        Key(match peer {
            Some(peer) => self.sip(17, peer.as_bytes()),
            None => self.sip(18, &self.source(ip).to_be_bytes()),
        })
    }

    /// The key of a provider's open connections.
    pub(super) fn open_provider_key(&self, provider: &str) -> Key {
        Key(self.sip(12, provider.as_bytes()))
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
            *provider = hash(2, subject.pattern.or(subject.provider).map(str::as_bytes));
        }
        if wanted.group || wanted.member {
            *group = hash(3, subject.group);
        }
        // A user is one in all groups.
        let user = subject.member.filter(|_| wanted.member).and_then(|user| match user {
            Member::Uri(uri) => Some(self.sip(15, &uri.normal())),
            Member::SignatureKey(octets) => Some(self.sip(16, octets)),
            Member::LeafIndex(_) | Member::KeyPackageRef(_) | Member::UserKeyHash(_) => None,
        });
        if let Some(user) = user {
            *member = user;
        } else if wanted.member {
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
                Some(Member::Uri(_) | Member::SignatureKey(_)) | None => 4 | ABSENT,
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
    overflow: u128,
}

/// What a rate adds to the keys of its states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Salt(u128);

impl Salt {
    /// Of what has no rate.
    pub(super) const NONE: Self = Self(0);
}

impl Mix {
    fn new(keys: (u64, u64), limit: &str, second: bool, parts: KeyParts, by_provider: bool) -> Self {
        // A limit that asks for other attributes is another limit.
        let asks = [parts.ip, parts.provider, parts.group, parts.member, parts.target, parts.endpoint];
        let secret = |n: u8| {
            let mut octets = vec![n, u8::from(second)];
            octets.extend(asks.map(u8::from));
            octets.extend(limit.as_bytes());
            SipHasher24::new_with_keys(!keys.0, !keys.1).hash(&octets).as_u128()
        };
        // One provider must not spend another's quota by naming its groups.
        let provider = by_provider || parts.provider || parts.group || parts.member || parts.target;
        // A member's hash holds its group already, where it is one of a group.
        let used = [parts.ip, provider, parts.group, parts.member, parts.target, parts.endpoint];
        let mut factors = [0; PARTS];
        factors.iter_mut().zip(used).zip(1..).for_each(|((factor, used), n)| {
            if used {
                // Odd: no two values of an attribute have one product.
                *factor = secret(n) | 1;
            }
        });
        let own = 1 + PARTS as u8;
        Self { base: secret(0), factors, secret: secret(own) | 1, overflow: secret(own + 1) }
    }

    /// The key of a state at a rate.
    #[inline]
    pub(super) fn key(&self, parts: &[u128; PARTS], salt: Salt) -> Key {
        let products = self.factors.iter().zip(parts).map(|(factor, part)| factor.wrapping_mul(*part));
        Key(products.fold(self.base, u128::wrapping_add).wrapping_add(salt.0))
    }

    /// The key that stands in for all that find no room.
    #[inline]
    pub(super) fn overflow(&self, salt: Salt) -> Key {
        Key(self.overflow.wrapping_add(salt.0))
    }

    /// The limit that is one endpoint's alone; 0 for one that is not.
    #[inline]
    pub(super) fn at(&self, endpoint: usize) -> Self {
        let shift = self.secret.wrapping_mul(endpoint as u128);
        Self { base: self.base.wrapping_add(shift), overflow: self.overflow.wrapping_add(shift), ..*self }
    }
}
