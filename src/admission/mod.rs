//! Who may come in: recipient, sender, limits, tokens; in this order, and with one answer, a [`Decision`].
//!
//! Policy is plain data, resolved from the configuration once. A limit's key is a keyed hash of the limit and of the
//! attributes it names; the raw identifiers are not kept. An attribute that a request does not have is hashed as absent:
//! all who lack it share one state, so that leaving something out is never a way around a limit.

mod identity;
mod keys;

pub use identity::{PeerIdentity, Peers, bind_sender};
use keys::{Hasher, Mix};

use crate::dialect::{self, Member, Operation};
use crate::limiter::{Check, Outcome, Outcomes, Store, TopUp, gcra::Gcra};
use crate::problem::Violated;
use smallvec::SmallVec;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What of a request a limit's key is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeyParts {
    /// The source address, IPv6 by prefix.
    pub ip: bool,
    /// The authenticated provider.
    pub provider: bool,
    /// The MLS group.
    pub group: bool,
    /// The sending member of the group.
    pub member: bool,
    /// The user or client it is for.
    pub target: bool,
    /// The endpoint.
    pub endpoint: bool,
}

/// What a Privacy Pass token does for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TokenUse {
    /// Nothing.
    #[default]
    Off,
    /// There is no request without one.
    Required,
    /// Where the limit is exceeded, one lets the request into this second limit.
    TopUp(Gcra),
}

/// A limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// Its name in the configuration, in metrics and in answers.
    pub name: String,
    /// A bit for each operation it covers, by [`Operation::id`].
    pub covers: u128,
    /// What its key is made of.
    pub key: KeyParts,
    /// Rate and burst.
    pub gcra: Gcra,
    /// Other rates and bursts, for authenticated providers by name, in lower case.
    pub overrides: Vec<(String, Gcra)>,
    /// Whether it refuses; a shadow only counts.
    pub enforce: bool,
    /// What a token does.
    pub token: TokenUse,
}

impl Limit {
    /// Rate and burst for a provider, if it is authenticated.
    #[inline]
    fn gcra_for(&self, provider: Option<&str>) -> Gcra {
        let own = |provider| self.overrides.iter().find(|(name, _)| name == provider);
        provider.and_then(own).map_or(self.gcra, |(_, gcra)| *gcra)
    }

    /// Whether it covers an operation.
    #[inline]
    pub fn covers(&self, operation: &Operation) -> bool {
        self.covers >> operation.id & 1 == 1
    }
}

/// All limits, and what tokens do at endpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// The limits.
    pub limits: Vec<Limit>,
    /// What tokens do at an endpoint, by its operations' IDs; the default is nothing.
    pub endpoint_tokens: Vec<(u8, TokenUse)>,
    /// Bits of an IPv6 source address that are one source.
    pub ipv6_prefix: u8,
}

/// A request, as the limits see it.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The source address.
    pub ip: IpAddr,
    /// The provider that the channel authenticates, in lower case.
    pub provider: Option<&'a str>,
    /// What is asked.
    pub operation: &'static Operation,
    /// The MLS group.
    pub group: Option<&'a [u8]>,
    /// The sending member.
    pub member: Option<Member<'a>>,
    /// The user or client it is for.
    pub target: Option<&'a [u8]>,
    /// Cells it takes.
    pub cost: u32,
}

/// What the limits say of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// All that enforce let it pass.
    Pass {
        /// A token was needed for it, and used.
        topped_up: bool,
    },
    /// Some do not.
    Refuse {
        /// Which do not.
        violated: Vec<Violated>,
        /// Whether all of these would let a token past.
        token_helps: bool,
    },
}

/// Tokens of a source that may fail to verify in a minute.
pub const BAD_TOKENS: u32 = 60;

/// What each limit that was asked said: by its place in the policy.
pub type Tally = SmallVec<[(usize, Outcome); 12]>;

/// How often a limit said what.
#[derive(Debug, Clone)]
pub struct LimitCounters {
    /// It let a request pass.
    pub allowed: prometheus::IntCounter,
    /// It did not.
    pub refused: prometheus::IntCounter,
    /// It did not, but a token did.
    pub topped_up: prometheus::IntCounter,
}

/// The limits at work.
pub struct Admission {
    policy: Policy,
    counters: Vec<LimitCounters>,
    store: Arc<dyn Store>,
    hasher: Hasher,
    /// For each limit: its key, and its second limit's.
    mixes: Vec<(Mix, Mix)>,
    started: Instant,
}

impl std::fmt::Debug for Admission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admission").field("policy", &self.policy).finish_non_exhaustive()
    }
}

// === impl Policy ===

impl Policy {
    /// Overflow buckets a store needs: one for each limit, and one for each second limit it may have: its own, or an
    /// endpoint's; and one for bad tokens.
    pub fn overflow_buckets(&self) -> usize {
        self.limits.len() * OVERFLOWS + 1
    }

    /// What a token does for `limit` at `operation`: as the limit says, else as the endpoint does.
    fn token_use(&self, limit: &Limit, operation: &Operation) -> TokenUse {
        match limit.token {
            TokenUse::Off => self.endpoint_token(operation),
            own => own,
        }
    }

    fn endpoint_token(&self, operation: &Operation) -> TokenUse {
        let of = self.endpoint_tokens.iter().find(|(id, _)| *id == operation.id);
        of.map_or(TokenUse::Off, |(_, token)| *token)
    }

    /// Whether there is no request of this operation without a token.
    pub fn token_required(&self, operation: &Operation) -> bool {
        self.endpoint_token(operation) == TokenUse::Required
            || self.limits.iter().any(|l| l.token == TokenUse::Required && l.enforce && l.covers(operation))
    }

    /// Whether a token may ever do anything.
    pub fn uses_tokens(&self) -> bool {
        self.endpoint_tokens.iter().any(|(_, token)| *token != TokenUse::Off)
            || self.limits.iter().any(|l| l.token != TokenUse::Off)
    }
}

// === impl Admission ===

impl Admission {
    /// Limits at work, with their state in `store`. `secret` keys the hashes. `counters` are in the order of the limits.
    pub fn new(policy: Policy, store: Arc<dyn Store>, secret: [u8; 16], counters: Vec<LimitCounters>) -> Self {
        let hasher = Hasher::new(secret, policy.limits.iter().map(|limit| limit.key), policy.ipv6_prefix);
        let mix = |(i, limit): (usize, &Limit)| [false, true].map(|second| hasher.mix(i, second, limit.key)).into();
        let mixes = policy.limits.iter().enumerate().map(mix).collect();
        Self { policy, counters, store, hasher, mixes, started: Instant::now() }
    }

    /// The policy.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// A keyed hash of octets, for logs and for choosing a node: stable within the process, meaningless outside.
    pub fn pseudonym(&self, octets: &[u8]) -> u128 {
        self.hasher.pseudonym(octets)
    }

    /// Asks all limits that cover a request together. `token`: one was brought and is good, so where a limit refuses, its
    /// second limit is asked. `charge`: take the cells, if all pass. The tally is for [`Admission::account`], once for a
    /// request, however often it was asked about.
    pub fn decide(&self, subject: &Subject<'_>, token: bool, charge: bool) -> (Decision, Tally) {
        self.decide_at(self.now(), subject, token, charge)
    }

    /// Nanoseconds of this limiter's clock; never 0, which has always passed.
    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX).saturating_add(1)
    }

    fn decide_at(&self, now: u64, subject: &Subject<'_>, token: bool, charge: bool) -> (Decision, Tally) {
        let mut checks: SmallVec<[Check; 12]> = SmallVec::new();
        let mut asked: SmallVec<[(usize, TokenUse); 12]> = SmallVec::new();
        let parts = self.hasher.parts(subject);
        for (i, (limit, (mix, second))) in self.policy.limits.iter().zip(&self.mixes).enumerate() {
            if !limit.covers(subject.operation) {
                continue;
            }
            let token_use = self.policy.token_use(limit, subject.operation);
            let top_up = match token_use {
                TokenUse::TopUp(gcra) if token => {
                    // An endpoint's second limit is the endpoint's alone: others have other rates.
                    let endpoint = if limit.token == TokenUse::Off { 1 + endpoint_place(subject.operation) } else { 0 };
                    Some(TopUp { key: second.key_at(&parts, endpoint), gcra, overflow: OVERFLOWS * i + 1 + endpoint })
                }
                _ => None,
            };
            checks.push(Check {
                key: mix.key(&parts),
                gcra: limit.gcra_for(subject.provider),
                cost: subject.cost,
                enforce: limit.enforce,
                overflow: OVERFLOWS * i,
                top_up,
            });
            asked.push((i, token_use));
        }
        let mut outcomes = Outcomes::new();
        let pass = checks.is_empty() || self.store.decide(now, &checks, charge, &mut outcomes);
        let tally: Tally = asked.iter().map(|(i, _)| *i).zip(outcomes.iter().copied()).collect();
        if pass {
            let topped_up = outcomes.contains(&Outcome::ToppedUp);
            return (Decision::Pass { topped_up }, tally);
        }
        let mut token_helps = true;
        let mut violated = Vec::new();
        for ((i, token_use), outcome) in asked.iter().zip(&outcomes) {
            let (Some(limit), Outcome::Refused(wait)) = (self.policy.limits.get(*i), outcome) else { continue };
            if limit.enforce {
                let gcra = limit.gcra_for(subject.provider);
                token_helps &= matches!(token_use, TokenUse::TopUp(_));
                violated.push(Violated {
                    policy: limit.name.clone(),
                    burst: u64::from(gcra.burst()),
                    window: crate::problem::seconds_up(gcra.window()),
                    retry_after: *wait,
                });
            }
        }
        (Decision::Refuse { violated, token_helps }, tally)
    }

    /// Whether a source may try a token, or (`charge`) that one of its tokens did not verify: [`BAD_TOKENS`] a minute, and as
    /// many at once.
    ///
    /// # Errors
    /// The limit it exceeds.
    pub fn token_attempt(&self, ip: IpAddr, charge: bool) -> Result<(), Violated> {
        let Some(gcra) = Gcra::new(BAD_TOKENS, Duration::from_secs(60), BAD_TOKENS) else { return Ok(()) };
        let check = Check {
            key: self.hasher.source_key(ip),
            gcra,
            cost: 1,
            enforce: true,
            overflow: self.policy.limits.len() * OVERFLOWS,
            top_up: None,
        };
        let mut outcomes = Outcomes::new();
        if self.store.decide(self.now(), &[check], charge, &mut outcomes) {
            return Ok(());
        }
        let retry_after = outcomes.first().and_then(|outcome| match outcome {
            Outcome::Refused(wait) => *wait,
            Outcome::Allowed | Outcome::ToppedUp => None,
        });
        Err(Violated { policy: "bad-tokens".into(), burst: u64::from(BAD_TOKENS), window: 60, retry_after })
    }

    /// Counts what the limits said of a request: refusals always, the rest only of requests that none refused.
    pub fn account(&self, tally: &Tally) {
        let enforces = |i: usize| self.policy.limits.get(i).is_some_and(|limit| limit.enforce);
        let refused = tally.iter().any(|(i, outcome)| matches!(outcome, Outcome::Refused(_)) && enforces(*i));
        for (i, outcome) in tally {
            let Some(counters) = self.counters.get(*i) else { continue };
            match outcome {
                Outcome::Refused(_) => counters.refused.inc(),
                Outcome::Allowed if !refused => counters.allowed.inc(),
                Outcome::ToppedUp if !refused => {
                    counters.refused.inc();
                    counters.topped_up.inc();
                }
                Outcome::Allowed | Outcome::ToppedUp => {}
            }
        }
    }
}

/// Endpoints there may be at most, for overflow buckets of their own.
const ENDPOINTS: usize = 32;

/// Overflow buckets of a limit: its own, its second limit's, and each endpoint's second limit's.
const OVERFLOWS: usize = 2 + ENDPOINTS;

/// The place of an operation's endpoint among all of them.
fn endpoint_place(operation: &Operation) -> usize {
    dialect::endpoints().position(|endpoint| endpoint.name == operation.endpoint).unwrap_or(ENDPOINTS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limiter::memory::Memory;

    fn operation(name: &str) -> &'static Operation {
        dialect::operations().find(|o| o.name == name).unwrap()
    }

    fn limit(name: &str, key: KeyParts, burst: u32) -> Limit {
        let gcra = Gcra::new(1, Duration::from_secs(10), burst).unwrap();
        Limit {
            name: name.into(),
            covers: u128::MAX,
            key,
            gcra,
            overrides: vec![],
            enforce: true,
            token: TokenUse::Off,
        }
    }

    fn admission(limits: Vec<Limit>) -> Admission {
        let policy = Policy { limits, endpoint_tokens: vec![], ipv6_prefix: 64 };
        let overflowed = prometheus::IntCounter::new("o", "o").unwrap();
        let store = Memory::new(1 << 20, policy.overflow_buckets(), overflowed);
        Admission::new(policy, Arc::new(store), [7; 16], vec![])
    }

    fn subject<'a>(ip: &str, provider: Option<&'a str>, group: &'a [u8], leaf: u32) -> Subject<'a> {
        Subject {
            ip: ip.parse().unwrap(),
            provider,
            operation: operation("send_message"),
            group: Some(group),
            member: Some(Member::LeafIndex(leaf)),
            target: None,
            cost: 1,
        }
    }

    const NOW: u64 = 1_000_000_000;

    fn passes(admission: &Admission, subject: &Subject<'_>) -> bool {
        matches!(admission.decide_at(NOW, subject, false, true).0, Decision::Pass { .. })
    }

    #[test]
    fn members_are_members_of_a_group() {
        let parts = KeyParts { member: true, ..KeyParts::default() };
        let admission = admission(vec![limit("member", parts, 1)]);
        assert!(passes(&admission, &subject("192.0.2.1", None, b"one", 1)));
        assert!(!passes(&admission, &subject("192.0.2.1", None, b"one", 1)));
        assert!(passes(&admission, &subject("192.0.2.1", None, b"one", 2)), "another member goes on");
        assert!(passes(&admission, &subject("192.0.2.1", None, b"two", 1)), "the same leaf of another group");
    }

    #[test]
    fn one_provider_cannot_spend_anothers_quota() {
        let parts = KeyParts { group: true, ..KeyParts::default() };
        let admission = admission(vec![limit("group", parts, 1)]);
        assert!(passes(&admission, &subject("192.0.2.1", Some("evil.example"), b"one", 1)));
        assert!(!passes(&admission, &subject("192.0.2.1", Some("evil.example"), b"one", 1)));
        assert!(passes(&admission, &subject("192.0.2.1", Some("a.example"), b"one", 1)));
        assert!(passes(&admission, &subject("192.0.2.1", None, b"one", 1)), "nor can who is not authenticated");
    }

    #[test]
    fn what_is_absent_is_shared() {
        let parts = KeyParts { member: true, ..KeyParts::default() };
        let admission = admission(vec![limit("member", parts, 1)]);
        let nobody = Subject { member: None, group: None, ..subject("192.0.2.1", None, b"", 0) };
        assert!(passes(&admission, &nobody));
        assert!(!passes(&admission, &nobody));
    }

    #[test]
    fn sources_are_prefixes() {
        let parts = KeyParts { ip: true, ..KeyParts::default() };
        let admission = admission(vec![limit("ip", parts, 1)]);
        assert!(passes(&admission, &subject("2001:db8::1", None, b"g", 1)));
        assert!(!passes(&admission, &subject("2001:db8::ffff:1", None, b"g", 1)));
        assert!(passes(&admission, &subject("2001:db8:0:1::1", None, b"g", 1)));
        assert!(passes(&admission, &subject("192.0.2.1", None, b"g", 1)));
        assert!(!passes(&admission, &subject("::ffff:192.0.2.1", None, b"g", 1)), "a mapped address is the address");
        assert!(passes(&admission, &subject("192.0.2.2", None, b"g", 1)));
    }

    #[test]
    fn parts_cannot_be_shifted_into_each_other() {
        let parts = KeyParts { group: true, target: true, ..KeyParts::default() };
        let admission = admission(vec![limit("both", parts, 1)]);
        let base = subject("192.0.2.1", None, b"ab", 1);
        assert!(passes(&admission, &Subject { target: Some(b"c"), ..base }));
        assert!(passes(&admission, &Subject { group: Some(b"a"), target: Some(b"bc"), ..base }));
    }

    #[test]
    fn cost_counts_and_beyond_the_burst_is_never() {
        let parts = KeyParts { ip: true, ..KeyParts::default() };
        let admission = admission(vec![limit("ip", parts, 5)]);
        let base = subject("192.0.2.1", None, b"g", 1);
        let Decision::Refuse { violated, .. } = admission.decide_at(NOW, &Subject { cost: 6, ..base }, false, true).0
        else {
            panic!("six cells of five");
        };
        assert_eq!(violated[0].retry_after, None);
        assert!(passes(&admission, &Subject { cost: 5, ..base }));
        assert!(!passes(&admission, &base));
    }

    #[test]
    fn a_token_helps_only_past_limits_that_take_one() {
        let second = Gcra::new(1, Duration::from_secs(10), 1).unwrap();
        let ip = KeyParts { ip: true, ..KeyParts::default() };
        let group = KeyParts { group: true, ..KeyParts::default() };
        let top_up = Limit { token: TokenUse::TopUp(second), ..limit("group", group, 1) };
        let admission = admission(vec![limit("ip", ip, 3), top_up]);
        let request = subject("192.0.2.1", None, b"g", 1);
        let ask = |token| admission.decide_at(NOW, &request, token, true).0;
        assert_eq!(ask(false), Decision::Pass { topped_up: false });
        assert!(matches!(ask(false), Decision::Refuse { token_helps: true, .. }));
        assert_eq!(ask(true), Decision::Pass { topped_up: true });
        assert!(matches!(ask(true), Decision::Refuse { token_helps: true, .. }), "the second limit is one, too");
        let Decision::Pass { .. } = admission.decide_at(NOW, &subject("192.0.2.1", None, b"h", 1), false, true).0
        else {
            panic!("the third of three from this source");
        };
        let Decision::Refuse { violated, token_helps } = ask(false) else { panic!("both are exceeded") };
        assert_eq!(violated.len(), 2);
        assert!(!token_helps);
    }

    #[test]
    fn endpoints_have_second_limits_of_their_own() {
        let generous = TokenUse::TopUp(Gcra::new(1, Duration::from_secs(10), 100).unwrap());
        let strict = TokenUse::TopUp(Gcra::new(1, Duration::from_secs(10), 1).unwrap());
        let policy = Policy {
            limits: vec![limit("ip", KeyParts { ip: true, ..KeyParts::default() }, 1)],
            endpoint_tokens: vec![(operation("send_message").id, generous), (operation("verification_key").id, strict)],
            ipv6_prefix: 64,
        };
        let store = Memory::new(1 << 20, policy.overflow_buckets(), prometheus::IntCounter::new("o", "o").unwrap());
        let admission = Admission::new(policy, Arc::new(store), [7; 16], vec![]);
        let message = subject("192.0.2.1", None, b"g", 1);
        let key = Subject { operation: operation("verification_key"), group: None, member: None, ..message };
        let pass = |subject| matches!(admission.decide_at(NOW, subject, true, true).0, Decision::Pass { .. });
        assert!((0..20).all(|_| pass(&message)));
        assert!(pass(&key));
        assert!(!pass(&key));
        assert!((0..20).all(|_| pass(&message)), "what one endpoint's second limit let in is not another's");
    }

    #[test]
    fn named_providers_have_rates_of_their_own() {
        let large = Gcra::new(1, Duration::from_secs(10), 3).unwrap();
        let parts = KeyParts { provider: true, ..KeyParts::default() };
        let admission = admission(vec![Limit { overrides: vec![("a.example".into(), large)], ..limit("p", parts, 1) }]);
        let count = |provider| (0..5).filter(|_| passes(&admission, &subject("192.0.2.1", provider, b"g", 1))).count();
        assert_eq!(count(Some("a.example")), 3);
        assert_eq!(count(Some("c.example")), 1);
        assert_eq!(count(None), 1, "who is not authenticated has no name");
    }

    #[test]
    fn a_shadow_requires_no_token() {
        let shadow = Limit { enforce: false, token: TokenUse::Required, ..limit("s", KeyParts::default(), 1) };
        let policy = Policy { limits: vec![shadow], endpoint_tokens: vec![], ipv6_prefix: 64 };
        assert!(!policy.token_required(operation("send_message")));
    }
}
