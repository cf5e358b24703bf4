//! Who may come in: recipient, sender, limits, tokens; in this order, and with one answer, a [`Decision`].
//!
//! Policy is plain data, resolved from the configuration. A limit's key is a keyed hash of the limit and of the attributes
//! it names; the raw identifiers are not kept. An attribute that a request does not have is hashed as absent: all who lack
//! it share one state, so that leaving something out is never a way around a limit.
//!
//! There are limits of two kinds: a [`Limit`] has a rate, of requests or of the octets of their bodies, and its state is a
//! [`Limiter`]'s; a [`Concurrency`] is how many requests may be under way at once.

mod identity;
mod keys;
mod policy;

pub use identity::{PeerIdentity, Peers, Pin, bind_sender, identify};
pub use policy::{Concurrency, KeyParts, Limit, Policy, Scope, TokenUse, Unit};

use crate::dialect::{self, Member, Operation};
use crate::limiter::in_flight::Ticket;
use crate::limiter::{Ask, Check, Decided, Key, Limiter, Outcome, Outcomes, TopUp, gcra::Gcra};
use crate::problem::Violated;
use keys::{Hasher, Mix, Salt};
use smallvec::SmallVec;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A request, as the limits see it.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The source address.
    pub ip: IpAddr,
    /// The provider that the channel authenticates, in lower case.
    pub provider: Option<&'a str>,
    /// The pattern (`*.a.example`) that its certificate holds it by, if not by itself: then quotas are of that.
    pub pattern: Option<&'a str>,
    /// What is asked.
    pub operation: &'static Operation,
    /// The MLS group.
    pub group: Option<&'a [u8]>,
    /// The sending member.
    pub member: Option<Member<'a>>,
    /// The user or client it is for.
    pub target: Option<&'a [u8]>,
    /// Cells it takes of limits that count requests.
    pub cost: u32,
    /// Octets of its body: as declared, else as many as have come.
    pub octets: u32,
    /// When it first asked.
    pub at: Instant,
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
    /// The store of these limits does not answer, and without it they let nobody pass.
    Unavailable {
        /// The limits' names.
        policies: Vec<String>,
    },
}

/// Tokens of a source that may fail to verify in a minute.
pub const BAD_TOKENS: u32 = 60;

/// What each limit that was asked said, for [`Admission::account`].
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Places in the policy.
    of: Places,
    /// Places of those that a token lets past.
    exempt: Places,
    said: Outcomes,
    by: Decided,
}

/// Which limits cover a request.
type Places = SmallVec<[u16; 12]>;

/// Requests under way that a request counts among: it is one of them until this is dropped.
pub type Tickets = SmallVec<[Ticket; 2]>;

/// Limits of octets that a request has passed, for what of its body was not in when it did.
#[derive(Debug, Clone, Default)]
pub struct Owing {
    checks: SmallVec<[Check; 1]>,
    partition: u64,
}

impl Owing {
    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.checks.is_empty()
    }
}

/// How often a limit said what.
#[derive(Debug, Clone)]
pub struct LimitCounters {
    /// It let a request pass.
    pub allowed: prometheus::IntCounter,
    /// It did not.
    pub refused: prometheus::IntCounter,
    /// It did not, but a token did.
    pub topped_up: prometheus::IntCounter,
    /// It did not, but for a token that does not matter.
    pub exempted: prometheus::IntCounter,
    /// It was decided without the store that it belongs to.
    pub without_store: prometheus::IntCounter,
}

/// The limits at work. A reload makes another one, over the same [`Limiter`].
pub struct Admission {
    policy: Policy,
    /// Of the limits with a rate, in their order, then of those of concurrency.
    counters: Vec<LimitCounters>,
    limiter: Arc<Limiter>,
    hasher: Hasher,
    secret: [u8; 16],
    /// For each limit with a rate.
    bound: Vec<Bound>,
    /// For each limit of concurrency.
    concurrency: Vec<Mix>,
}

/// A limit, with what makes its keys.
struct Bound {
    mix: Mix,
    salt: Salt,
    second: Mix,
    overrides: HashMap<String, (Gcra, Salt)>,
}

/// What is asked of the limits for a request.
#[derive(Default)]
struct Asked {
    checks: SmallVec<[Check; 12]>,
    seconds: SmallVec<[TopUp; 1]>,
    of: Places,
    exempt: Places,
    partition: u64,
}

impl std::fmt::Debug for Admission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admission").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// A check of this node's own, outside of all limits.
fn own_check(key: Key, gcra: Gcra, overflow: Key) -> Check {
    let on_failure = Default::default();
    Check { key, gcra, cost: 1, enforce: true, exempt: false, on_failure, overflow, top_up: None }
}

// === impl Admission ===

impl Admission {
    /// Limits at work, with their state in `limiter`. `secret` keys the hashes. `counters` are in the order of the limits,
    /// those with a rate first.
    pub fn new(policy: Policy, limiter: Arc<Limiter>, secret: [u8; 16], counters: Vec<LimitCounters>) -> Self {
        let by_provider = limiter.is_partitioned_by_provider();
        let hasher = Hasher::new(secret, policy.scopes().map(|scope| scope.key), policy.ipv6_prefix, by_provider);
        let bind = |limit: &Limit| Bound {
            mix: hasher.mix(&limit.scope.name, false, limit.scope.key),
            salt: hasher.salt(&limit.gcra),
            second: hasher.mix(&limit.scope.name, true, limit.scope.key),
            overrides: limit.overrides.iter().map(|(name, g)| (name.clone(), (*g, hasher.salt(g)))).collect(),
        };
        let bound = policy.limits.iter().map(bind).collect();
        let mix = |limit: &Concurrency| hasher.mix(&limit.scope.name, false, limit.scope.key);
        let concurrency = policy.concurrency.iter().map(mix).collect();
        Self { bound, concurrency, policy, counters, limiter, hasher, secret }
    }

    /// The policy.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// A keyed hash of octets, for logs and for choosing a node: stable within the process, meaningless outside.
    pub fn pseudonym(&self, octets: &[u8]) -> u128 {
        self.hasher.pseudonym(octets)
    }

    /// Counts a request among those under way, until its tickets are dropped. A limit of concurrency that is exceeded is
    /// asked before all others: to be refused costs it nothing else.
    ///
    /// # Errors
    /// The limits it exceeds.
    pub fn enter(&self, subject: &Subject<'_>) -> Result<Tickets, Vec<Violated>> {
        let (mut tickets, mut violated) = (Tickets::new(), vec![]);
        if self.policy.concurrency.is_empty() {
            return Ok(tickets);
        }
        let parts = self.hasher.parts(subject);
        // Theirs come after those of the limits with a rate.
        let first = self.policy.limits.len();
        for ((i, limit), mix) in (first..).zip(&self.policy.concurrency).zip(&self.concurrency) {
            if !limit.scope.covers(subject.operation, subject.ip) {
                continue;
            }
            let key = mix.key(&parts, Salt::NONE);
            let most = limit.most_for(subject.provider);
            let ticket = self.limiter.in_flight().enter(key, if limit.scope.enforce { most } else { u32::MAX });
            let counters = self.counters.get(i);
            if ticket.as_ref().is_some_and(|ticket| ticket.count <= most) {
                counters.inspect(|counters| counters.allowed.inc());
            } else {
                counters.inspect(|counters| counters.refused.inc());
                if limit.scope.enforce {
                    violated.push(Violated {
                        policy: limit.scope.name.clone(),
                        quota: u64::from(most),
                        unit: Unit::Concurrent,
                        window: None,
                        left: 0,
                        partition: self.hasher.partition(key),
                        // When one of them ends, which nobody knows.
                        retry_after: Some(Duration::from_secs(1)),
                    });
                }
            }
            tickets.extend(ticket);
        }
        if violated.is_empty() { Ok(tickets) } else { Err(violated) }
    }

    /// Asks all limits that cover a request together. `token`: one was brought and is good, so where a limit refuses, its
    /// second limit is asked. `charge`: take the cells, if all pass. The tally is for [`Admission::account`], once for a
    /// request, however often it was asked about.
    pub async fn decide(&self, subject: &Subject<'_>, token: bool, charge: bool) -> (Decision, Tally) {
        let mut asked = Asked::default();
        self.ask(subject, token, &mut asked);
        if asked.checks.is_empty() {
            return (Decision::Pass { topped_up: false }, Tally::default());
        }
        let mut outcomes = Outcomes::new();
        let ask = Ask { checks: &asked.checks, seconds: &asked.seconds, charge, partition: asked.partition };
        let said = self.limiter.decide(subject.at, &ask, &mut outcomes).await;
        self.decided(subject, token, &mut asked, outcomes, said)
    }

    /// As [`Admission::decide`], where nobody else has to be asked; none: limits are kept in a fleet's store.
    pub fn decide_at_once(&self, subject: &Subject<'_>, token: bool, charge: bool) -> Option<(Decision, Tally)> {
        let mut asked = Asked::default();
        self.ask(subject, token, &mut asked);
        if asked.checks.is_empty() {
            return Some((Decision::Pass { topped_up: false }, Tally::default()));
        }
        let mut outcomes = Outcomes::new();
        let ask = Ask { checks: &asked.checks, seconds: &asked.seconds, charge, partition: asked.partition };
        let said = self.limiter.decide_at_once(subject.at, &ask, &mut outcomes)?;
        Some(self.decided(subject, token, &mut asked, outcomes, said))
    }

    #[inline]
    fn decided(
        &self,
        subject: &Subject<'_>,
        token: bool,
        asked: &mut Asked,
        outcomes: Outcomes,
        (pass, by): (bool, Decided),
    ) -> (Decision, Tally) {
        let tally =
            Tally { of: std::mem::take(&mut asked.of), exempt: std::mem::take(&mut asked.exempt), said: outcomes, by };
        let decision = match pass {
            true => Decision::Pass { topped_up: token && self.took_a_token(&tally) },
            false => self.refusal(subject, &asked.checks, &tally),
        };
        (decision, tally)
    }

    /// Whether a limit that enforces has let a request pass for a token only.
    fn took_a_token(&self, tally: &Tally) -> bool {
        let past = |i: &u16, outcome: &Outcome| match outcome {
            Outcome::ToppedUp => true,
            Outcome::Allowed => false,
            Outcome::Refused(_) | Outcome::Unavailable => tally.exempt.contains(i),
        };
        tally.of.iter().zip(&tally.said).any(|(i, outcome)| past(i, outcome) && self.enforces(*i))
    }

    fn enforces(&self, i: u16) -> bool {
        self.policy.limits.get(usize::from(i)).is_some_and(|limit| limit.scope.enforce)
    }

    #[inline]
    fn ask(&self, subject: &Subject<'_>, token: bool, asked: &mut Asked) {
        let parts = self.hasher.parts(subject);
        asked.partition = Hasher::provider_of(&parts);
        for (i, (limit, bound)) in self.policy.limits.iter().zip(&self.bound).enumerate() {
            if !limit.scope.covers(subject.operation, subject.ip) {
                continue;
            }
            let place = u16::try_from(i).unwrap_or(u16::MAX);
            let token_use = self.policy.token_use(limit, subject.operation);
            // It is charged where it allows, and does not matter where it refuses.
            let exempt = token && token_use == TokenUse::Exempt;
            if exempt {
                asked.exempt.push(place);
            }
            let top_up = match token_use {
                TokenUse::TopUp(gcra) if token => {
                    // An endpoint's second limit is the endpoint's alone: others have other rates.
                    let endpoint = if limit.token == TokenUse::Off { 1 + endpoint_place(subject.operation) } else { 0 };
                    let (second, salt) = (bound.second.at(endpoint), self.hasher.salt(&gcra));
                    asked.seconds.push(TopUp { key: second.key(&parts, salt), gcra, overflow: second.overflow(salt) });
                    u16::try_from(asked.seconds.len() - 1).ok()
                }
                _ => None,
            };
            let own = subject.provider.filter(|_| !bound.overrides.is_empty()).and_then(|p| bound.overrides.get(p));
            let (gcra, salt) = own.copied().unwrap_or((limit.gcra, bound.salt));
            asked.checks.push(Check {
                key: bound.mix.key(&parts, salt),
                gcra,
                cost: if limit.unit == Unit::Octets { subject.octets } else { subject.cost },
                enforce: limit.scope.enforce && !exempt,
                exempt: exempt && limit.scope.enforce,
                on_failure: limit.on_store_failure,
                overflow: bound.mix.overflow(salt),
                top_up,
            });
            asked.of.push(place);
        }
    }

    #[cold]
    fn refusal(&self, subject: &Subject<'_>, checks: &[Check], tally: &Tally) -> Decision {
        let mut token_helps = true;
        let (mut violated, mut unavailable) = (Vec::new(), Vec::new());
        for ((i, check), outcome) in tally.of.iter().zip(checks).zip(&tally.said) {
            let limit = self.policy.limits.get(usize::from(*i)).filter(|_| check.enforce);
            let Some(limit) = limit else { continue };
            match outcome {
                Outcome::Unavailable => unavailable.push(limit.scope.name.clone()),
                Outcome::Refused(wait) => {
                    let token_use = self.policy.token_use(limit, subject.operation);
                    token_helps &= token_use.helps();
                    violated.push(self.violated(&limit.scope.name, limit.unit, check, *wait));
                }
                Outcome::Allowed | Outcome::ToppedUp => {}
            }
        }
        match violated.is_empty() {
            true => Decision::Unavailable { policies: unavailable },
            false => Decision::Refuse { violated, token_helps },
        }
    }

    fn violated(&self, policy: &str, unit: Unit, check: &Check, wait: Option<Duration>) -> Violated {
        Violated {
            policy: policy.to_owned(),
            quota: u64::from(check.gcra.burst()),
            unit,
            window: Some(crate::problem::seconds_up(check.gcra.window()).max(1)),
            left: u64::from(wait.map_or(0, |wait| check.gcra.left(check.cost, wait))),
            partition: self.hasher.partition(check.key),
            retry_after: wait,
        }
    }

    /// The limits of octets that a request has been charged to, for one whose body's length is not known before it is in.
    pub fn owing(&self, subject: &Subject<'_>, tally: &Tally) -> Owing {
        let octets = |i: u16| self.policy.limits.get(usize::from(i)).is_some_and(|limit| limit.unit == Unit::Octets);
        if !tally.of.iter().any(|i| octets(*i)) {
            return Owing::default();
        }
        let mut asked = Asked::default();
        // As it was asked: with a token, if one did something.
        self.ask(subject, tally.said.contains(&Outcome::ToppedUp), &mut asked);
        let ask = Ask { seconds: &asked.seconds, ..Ask::of(&asked.checks) };
        let charged = asked.checks.iter().zip(&tally.said).zip(&asked.of).filter(|(_, i)| octets(**i));
        let checks = charged.filter_map(|((check, outcome), _)| match outcome {
            Outcome::Allowed => Some(Check { top_up: None, ..*check }),
            Outcome::ToppedUp => {
                let TopUp { key, gcra, overflow } = *ask.second(check)?;
                Some(Check { key, gcra, overflow, top_up: None, ..*check })
            }
            Outcome::Refused(_) | Outcome::Unavailable => None,
        });
        Owing { checks: checks.collect(), partition: asked.partition }
    }

    /// Charges octets that came after the decision, whether or not there are so many: they have been taken.
    pub fn owe(&self, owing: &mut Owing, octets: u64) {
        let cost = u32::try_from(octets).unwrap_or(u32::MAX);
        owing.checks.iter_mut().for_each(|check| check.cost = cost);
        if octets > 0 && !owing.is_empty() {
            self.limiter.charge(&Ask { partition: owing.partition, ..Ask::of(&owing.checks) });
        }
    }

    /// Another policy over the same states: what a limit has counted is kept where neither its name, its key nor its rate
    /// is another.
    pub fn succeed(&self, policy: Policy, counters: Vec<LimitCounters>) -> Self {
        Self::new(policy, self.limiter.clone(), self.secret, counters)
    }

    /// The secret that its keys are hashed under.
    pub fn secret(&self) -> [u8; 16] {
        self.secret
    }

    /// Whether a source may try a token, or (`charge`) that one of its tokens did not verify: [`BAD_TOKENS`] a minute, and as
    /// many at once. This node's own count, wherever limits are kept.
    ///
    /// # Errors
    /// The limit it exceeds.
    pub fn token_attempt(&self, ip: IpAddr, charge: bool) -> Result<(), Violated> {
        let Some(gcra) = Gcra::new(BAD_TOKENS, Duration::from_secs(60), BAD_TOKENS) else { return Ok(()) };
        let check = own_check(self.hasher.source_key(ip), gcra, self.hasher.bad_tokens());
        let mut outcomes = Outcomes::new();
        if self.limiter.decide_here(&Ask { charge, ..Ask::of(&[check]) }, &mut outcomes) {
            return Ok(());
        }
        let retry_after = outcomes.first().and_then(|outcome| match outcome {
            Outcome::Refused(wait) => *wait,
            _ => None,
        });
        Err(self.violated("bad-tokens", Unit::Requests, &check, retry_after))
    }

    /// Whether a source may begin another handshake, and that it does. This node's own count, wherever limits are kept.
    pub fn handshake(&self, ip: IpAddr, gcra: Gcra) -> bool {
        let check = own_check(self.hasher.handshake_key(ip), gcra, self.hasher.handshakes());
        self.limiter.decide_here(&Ask { charge: true, ..Ask::of(&[check]) }, &mut Outcomes::new())
    }

    /// Counts a connection among those that are open of an address.
    pub fn open_of_ip(&self, ip: IpAddr, most: u32) -> Option<Ticket> {
        self.limiter.in_flight().enter(self.hasher.open_key(ip), most)
    }

    /// Counts a connection among those that are open of a network: for IPv6, whose sources may have many prefixes, by /48. Some of
    /// nothing for other addresses; none where there are too many.
    pub fn open_of_network(&self, ip: IpAddr, most: u32) -> Option<Option<Ticket>> {
        match self.hasher.network_key(ip) {
            Some(key) => self.limiter.in_flight().enter(key, most).map(Some),
            None => Some(None),
        }
    }

    /// Counts a handshake among those under way of an address.
    pub fn handshake_of_ip(&self, ip: IpAddr, most: u32) -> Option<Ticket> {
        self.limiter.in_flight().enter(self.hasher.under_way_key(ip), most)
    }

    /// Counts a request among those of a source whose bodies are held and waited for: of a peer that shows a certificate by the
    /// first name in it, of others by address.
    pub fn waiting(&self, ip: IpAddr, peer: Option<&str>, most: u32) -> Option<Ticket> {
        self.limiter.in_flight().enter(self.hasher.waiting_key(ip, peer), most)
    }

    /// Counts a connection among those that are open of a provider.
    pub fn open_of_provider(&self, provider: &str, most: u32) -> Option<Ticket> {
        self.limiter.in_flight().enter(self.hasher.open_provider_key(provider), most)
    }

    /// Counts what the limits said of a request: refusals always, the rest only of requests that none refused.
    pub fn account(&self, tally: &Tally) {
        let said = || tally.of.iter().zip(&tally.said);
        let refuses = |i: &u16| self.enforces(*i) && !tally.exempt.contains(i);
        let refused = said().any(|(i, outcome)| !outcome.passes() && refuses(i));
        for (i, outcome) in said() {
            let Some(counters) = self.counters.get(usize::from(*i)) else { continue };
            if tally.by == Decided::WithoutStore {
                counters.without_store.inc();
            }
            match outcome {
                Outcome::Refused(_) | Outcome::Unavailable => {
                    counters.refused.inc();
                    if !refused && tally.exempt.contains(i) {
                        counters.exempted.inc();
                    }
                }
                Outcome::Allowed if !refused => counters.allowed.inc(),
                Outcome::ToppedUp if !refused => {
                    counters.refused.inc();
                    counters.topped_up.inc();
                }
                Outcome::Allowed | Outcome::ToppedUp => {}
            }
        }
    }

    /// The state of the limits.
    pub fn limiter(&self) -> &Arc<Limiter> {
        &self.limiter
    }
}

/// The place of an operation's endpoint among all of them.
fn endpoint_place(operation: &Operation) -> usize {
    dialect::endpoints().position(|endpoint| endpoint.name == operation.endpoint).unwrap_or(usize::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limiter::OnFailure;
    use crate::limiter::memory::Memory;
    use std::task::{Context, Poll, Waker};

    fn operation(name: &str) -> &'static Operation {
        dialect::operations().find(|o| o.name == name).unwrap()
    }

    fn limit(name: &str, key: KeyParts, burst: u32) -> Limit {
        Limit {
            scope: Scope { name: name.into(), covers: u128::MAX, key, enforce: true, exempt: vec![] },
            unit: Unit::Requests,
            gcra: Gcra::new(1, Duration::from_secs(1000), burst).unwrap(),
            overrides: vec![],
            token: TokenUse::Off,
            on_store_failure: OnFailure::Local,
        }
    }

    fn of(policy: Policy) -> Admission {
        let memory = Memory::new(1 << 20, prometheus::IntCounter::new("o", "o").unwrap()).unwrap();
        Admission::new(policy, Arc::new(Limiter::new(memory, None)), [7; 16], vec![])
    }

    fn admission(limits: Vec<Limit>) -> Admission {
        of(Policy { limits, ipv6_prefix: 64, ..Policy::default() })
    }

    /// A decision in this node's memory waits for nothing.
    fn decide(admission: &Admission, subject: &Subject<'_>, token: bool) -> Decision {
        let decision = std::pin::pin!(admission.decide(subject, token, true));
        match decision.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready((decision, _)) => decision,
            Poll::Pending => panic!("it waits"),
        }
    }

    fn subject<'a>(ip: &str, provider: Option<&'a str>, group: &'a [u8], leaf: u32) -> Subject<'a> {
        Subject {
            ip: ip.parse().unwrap(),
            provider,
            pattern: None,
            operation: operation("send_message"),
            group: Some(group),
            member: Some(Member::LeafIndex(leaf)),
            target: None,
            cost: 1,
            octets: 0,
            at: Instant::now(),
        }
    }

    fn passes(admission: &Admission, subject: &Subject<'_>) -> bool {
        matches!(decide(admission, subject, false), Decision::Pass { .. })
    }

    #[test]
    fn all_names_of_a_pattern_are_one_bearers() {
        let key = KeyParts { group: true, ..KeyParts::default() };
        let admission = admission(vec![limit("l", key, 2)]);
        let named = |provider, pattern| Subject { pattern, ..subject("192.0.2.1", Some(provider), b"g", 1) };
        assert!(passes(&admission, &named("r1.evil.example", Some("*.evil.example"))));
        assert!(passes(&admission, &named("r2.evil.example", Some("*.evil.example"))));
        assert!(
            !passes(&admission, &named("r3.evil.example", Some("*.evil.example"))),
            "another name, the same certificate"
        );
        assert!(passes(&admission, &named("r3.evil.example", None)), "one that has a certificate of its own");
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
        let Decision::Refuse { violated, .. } = decide(&admission, &Subject { cost: 6, ..base }, false) else {
            panic!("six cells of five");
        };
        assert_eq!(violated[0].retry_after, None);
        assert!(passes(&admission, &Subject { cost: 5, ..base }));
        assert!(!passes(&admission, &base));
    }

    #[test]
    fn a_token_helps_only_past_limits_that_take_one() {
        let second = Gcra::new(1, Duration::from_secs(1000), 1).unwrap();
        let ip = KeyParts { ip: true, ..KeyParts::default() };
        let group = KeyParts { group: true, ..KeyParts::default() };
        let top_up = Limit { token: TokenUse::TopUp(second), ..limit("group", group, 1) };
        let admission = admission(vec![limit("ip", ip, 3), top_up]);
        let request = subject("192.0.2.1", None, b"g", 1);
        let ask = |token| decide(&admission, &request, token);
        assert_eq!(ask(false), Decision::Pass { topped_up: false });
        assert!(matches!(ask(false), Decision::Refuse { token_helps: true, .. }));
        assert_eq!(ask(true), Decision::Pass { topped_up: true });
        assert!(matches!(ask(true), Decision::Refuse { token_helps: true, .. }), "the second limit is one, too");
        let Decision::Pass { .. } = decide(&admission, &subject("192.0.2.1", None, b"h", 1), false) else {
            panic!("the third of three from this source");
        };
        let Decision::Refuse { violated, token_helps } = ask(false) else { panic!("both are exceeded") };
        assert_eq!(violated.len(), 2);
        assert!(!token_helps);
    }

    #[test]
    fn endpoints_have_second_limits_of_their_own() {
        let generous = TokenUse::TopUp(Gcra::new(1, Duration::from_secs(1000), 100).unwrap());
        let strict = TokenUse::TopUp(Gcra::new(1, Duration::from_secs(1000), 1).unwrap());
        let policy = Policy {
            limits: vec![limit("ip", KeyParts { ip: true, ..KeyParts::default() }, 1)],
            endpoint_tokens: vec![(operation("send_message").id, generous), (operation("verification_key").id, strict)],
            ipv6_prefix: 64,
            ..Policy::default()
        };
        let admission = of(policy);
        let message = subject("192.0.2.1", None, b"g", 1);
        let key = Subject { operation: operation("verification_key"), group: None, member: None, ..message };
        let pass = |subject| matches!(decide(&admission, subject, true), Decision::Pass { .. });
        assert!((0..20).all(|_| pass(&message)));
        assert!(pass(&key));
        assert!(!pass(&key));
        assert!((0..20).all(|_| pass(&message)), "what one endpoint's second limit let in is not another's");
    }

    #[test]
    fn named_providers_have_rates_of_their_own() {
        let large = Gcra::new(1, Duration::from_secs(1000), 3).unwrap();
        let parts = KeyParts { provider: true, ..KeyParts::default() };
        let admission = admission(vec![Limit { overrides: vec![("a.example".into(), large)], ..limit("p", parts, 1) }]);
        let count = |provider| (0..5).filter(|_| passes(&admission, &subject("192.0.2.1", provider, b"g", 1))).count();
        assert_eq!(count(Some("a.example")), 3);
        assert_eq!(count(Some("c.example")), 1);
        assert_eq!(count(None), 1, "who is not authenticated has no name");
    }

    #[test]
    fn a_shadow_requires_no_token() {
        let mut shadow = Limit { token: TokenUse::Required, ..limit("s", KeyParts::default(), 1) };
        let ip = "192.0.2.1".parse().unwrap();
        assert!(admission(vec![shadow.clone()]).policy().token_required(operation("send_message"), ip));
        shadow.scope.enforce = false;
        assert!(!admission(vec![shadow]).policy().token_required(operation("send_message"), ip));
    }

    #[test]
    fn networks_may_be_left_out() {
        let mut one = limit("ip", KeyParts { ip: true, ..KeyParts::default() }, 1);
        one.scope.exempt = vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
        let admission = admission(vec![one]);
        let count = |ip| (0..5).filter(|_| passes(&admission, &subject(ip, None, b"g", 1))).count();
        assert_eq!((count("192.0.2.77"), count("2001:db8::1"), count("::ffff:192.0.2.1")), (5, 5, 5));
        assert_eq!((count("192.0.3.1"), count("2001:db9::1")), (1, 1));
    }

    #[test]
    fn octets_are_counted_and_what_came_later_is_owed() {
        let mut octets = limit("octets", KeyParts { provider: true, ..KeyParts::default() }, 1);
        octets.unit = Unit::Octets;
        octets.gcra = Gcra::of_octets(1, Duration::from_secs(1000), 1000).unwrap();
        let admission = admission(vec![octets, limit("ip", KeyParts { ip: true, ..KeyParts::default() }, 100)]);
        let of = |octets| Subject { octets, ..subject("192.0.2.1", Some("a.example"), b"g", 1) };
        assert!(passes(&admission, &of(600)));
        let Decision::Refuse { violated, .. } = decide(&admission, &of(600), false) else { panic!("1200 of 1000") };
        assert_eq!((violated.len(), violated[0].unit, violated[0].left), (1, Unit::Octets, 400));
        assert!(passes(&admission, &of(400)));
        assert!(!passes(&admission, &of(1)));
        let other = Subject { provider: Some("b.example"), ..of(10) };
        let mut decided = std::pin::pin!(admission.decide(&other, false, true));
        let Poll::Ready((_, tally)) = decided.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
            panic!("it waits");
        };
        let mut owing = admission.owing(&other, &tally);
        assert!(!owing.is_empty());
        admission.owe(&mut owing, 5000);
        let Decision::Refuse { violated, .. } = decide(&admission, &other, false) else { panic!("5010 of 1000") };
        let wait = violated[0].retry_after.unwrap();
        assert!(wait > Duration::from_secs(4_000_000) && wait < Duration::from_secs(4_020_000), "{wait:?}");
    }

    #[test]
    fn a_request_is_under_way_until_its_tickets_are_dropped() {
        let scope = |name: &str, enforce| Scope {
            name: name.into(),
            covers: u128::MAX,
            key: KeyParts { provider: true, ..KeyParts::default() },
            enforce,
            exempt: vec!["10.0.0.0/8".parse().unwrap()],
        };
        let concurrency = vec![
            Concurrency { scope: scope("two", true), most: 2, overrides: vec![("large.example".into(), 3)] },
            Concurrency { scope: scope("trial", false), most: 1, overrides: vec![] },
        ];
        let admission = of(Policy { concurrency, ipv6_prefix: 64, ..Policy::default() });
        let of = |provider| subject("192.0.2.1", Some(provider), b"g", 1);
        let (a, b) = (admission.enter(&of("a.example")).unwrap(), admission.enter(&of("a.example")).unwrap());
        let refused = admission.enter(&of("a.example")).unwrap_err();
        assert_eq!((refused.len(), refused[0].policy.as_str(), refused[0].quota), (1, "two", 2));
        assert!(admission.enter(&of("b.example")).is_ok());
        drop(a);
        let c = admission.enter(&of("a.example")).unwrap();
        assert!(admission.enter(&of("a.example")).is_err());
        drop((b, c));
        let held: Vec<_> = (0..4).map(|_| admission.enter(&of("large.example"))).collect();
        assert_eq!(held.iter().filter(|entered| entered.is_ok()).count(), 3);
        let exempt: Vec<_> =
            (0..9).map(|_| admission.enter(&subject("10.1.1.1", Some("a.example"), b"g", 1))).collect();
        assert!(exempt.iter().all(Result::is_ok));
        drop((held, exempt));
        assert_eq!(admission.limiter().in_flight().keys(), 0);
    }

    #[test]
    fn a_reload_keeps_what_it_does_not_change() {
        let ip = KeyParts { ip: true, ..KeyParts::default() };
        let before = admission(vec![limit("kept", ip, 2), limit("gone", ip, 9), limit("changed", ip, 2)]);
        let request = subject("192.0.2.1", None, b"g", 1);
        assert!(passes(&before, &request) && passes(&before, &request));
        assert!(!passes(&before, &request));
        // Another order, one less, one more, one with another burst.
        let limits = vec![limit("changed", ip, 3), limit("new", ip, 5), limit("kept", ip, 2)];
        let after = before.succeed(Policy { limits, ipv6_prefix: 64, ..Policy::default() }, vec![]);
        let Decision::Refuse { violated, .. } = decide(&after, &request, false) else { panic!("kept was used up") };
        assert_eq!(violated.iter().map(|v| v.policy.as_str()).collect::<Vec<_>>(), ["kept"]);
        let limits = vec![limit("changed", ip, 3)];
        let fresh = before.succeed(Policy { limits, ipv6_prefix: 64, ..Policy::default() }, vec![]);
        assert_eq!((0..5).filter(|_| passes(&fresh, &request)).count(), 3, "another rate is another limit");
    }

    #[test]
    fn partitions_are_the_same_for_the_same() {
        let parts = KeyParts { member: true, ..KeyParts::default() };
        let admission = admission(vec![limit("member", parts, 1)]);
        let partition = |leaf| {
            let one = subject("192.0.2.1", None, b"g", leaf);
            passes(&admission, &one);
            let Decision::Refuse { violated, .. } = decide(&admission, &one, false) else { panic!("two of one") };
            violated[0].partition
        };
        assert_eq!(partition(1), partition(1));
        assert_ne!(partition(1), partition(2));
    }
}
