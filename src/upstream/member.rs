//! A member: an address of a node, and how it stands.
//!
//! What a request reads of it are atomics; what changes it, which is rare, takes a lock and says so. A member is out
//! while active checks find it ill, and while it is ejected: at once when it refuses a connection, and when so many
//! requests in a row had no answer. When an ejection's time is over one request at a time may try (half open): a
//! success ends it, another failure is the next in a row, and out for twice as long. A report of a request that began
//! before the last ejection is no news, however late it comes. Who returns is given its share little by little.

use super::Observer;
use super::queue::{Gate, Permit, QueueFull};
use super::settings::{Health, NodeSettings, NodeTls, Settings, Target};
use parking_lot::Mutex;
use smallvec::SmallVec;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A clock of the process: nanoseconds since it was made; never 0, which stands for no time at all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock(Instant);

impl Clock {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    pub(super) fn at(self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.0)).saturating_add(1)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Spreads octets that differ a little (splitmix64).
fn mix(mut of: u64) -> u64 {
    of = (of ^ (of >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    of = (of ^ (of >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    of ^ (of >> 31)
}

/// An address of a node, as requests go to it. It does not change; how it stands is shared by all that were made for
/// the same target one after the other.
pub struct Member {
    /// Of no other member of this process, and kept over reloads.
    pub id: u64,
    /// Its node, as it is configured.
    pub name: String,
    /// Where it is.
    pub target: Target,
    /// HTTP/2, without TLS with prior knowledge; else HTTP/1.1.
    pub http2: bool,
    /// How it is spoken TLS to, if it is.
    pub tls: Option<Arc<NodeTls>>,
    /// Its share of groups and turns.
    pub weight: u32,
    state: Arc<State>,
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Member").field("id", &self.id).field("label", &self.label()).finish_non_exhaustive()
    }
}

struct State {
    label: String,
    seed: u64,
    clock: Clock,
    observer: Arc<dyn Observer>,
    gate: Arc<Gate>,
    healthy: AtomicBool,
    /// It is, or was last, ejected for answers that did not come.
    out_for_answers: AtomicBool,
    /// Until when it is ejected; 0: it is not. A time that has passed: half open.
    out_until: AtomicU64,
    /// When it was last tried while half open; 0: not yet.
    tried_at: AtomicU64,
    /// Since when it is given back its share; 0: since ever.
    slow_from: AtomicU64,
    /// Requests in a row that it has not answered.
    unanswered: AtomicU32,
    standing: Mutex<Standing>,
}

/// What is read only where something changes.
#[derive(Default)]
struct Standing {
    why: Option<Why>,
    /// Ejections in a row.
    in_a_row: u32,
    ejected_at: Option<Instant>,
    /// It is one of those that are checked.
    checked: bool,
    /// Checks in a row that succeeded while it was ill.
    rises: u32,
    /// And that failed while it was healthy.
    falls: u32,
    /// It is no member any more, and nobody is told of it.
    gone: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    Refused,
    Failed,
}

impl Why {
    fn label(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// Whether a member may have a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fit {
    /// No.
    Out,
    /// If there is no other.
    Reserve,
    /// Yes.
    In,
}

impl Member {
    /// A new one. `since`: it is given its share from then on little by little, where that is configured.
    pub(super) fn new(
        id: u64,
        node: &NodeSettings,
        target: Target,
        clock: Clock,
        observer: Arc<dyn Observer>,
        since: Option<Instant>,
    ) -> Self {
        let state = State {
            label: target.to_string(),
            seed: target.seed(),
            clock,
            observer,
            gate: Gate::new(),
            out_for_answers: AtomicBool::new(false),
            healthy: AtomicBool::new(true),
            out_until: AtomicU64::new(0),
            tried_at: AtomicU64::new(0),
            slow_from: AtomicU64::new(since.map_or(0, |since| clock.at(since))),
            unanswered: AtomicU32::new(0),
            standing: Mutex::default(),
        };
        Self::of(id, node, target, node.tls.clone(), Arc::new(state))
    }

    fn of(id: u64, node: &NodeSettings, target: Target, tls: Option<Arc<NodeTls>>, state: Arc<State>) -> Self {
        Self { id, name: node.name.clone(), target, http2: node.http2, tls, weight: node.weight.max(1), state }
    }

    /// This one, as other settings have it; none where it is another to them: connections to it cannot be used.
    pub(super) fn succeed(self: &Arc<Self>, node: &NodeSettings) -> Option<Arc<Self>> {
        if self.http2 != node.http2 || self.tls != node.tls {
            return None;
        }
        if self.name == node.name && self.weight == node.weight.max(1) {
            return Some(self.clone());
        }
        let (target, tls, state) = (self.target.clone(), self.tls.clone(), self.state.clone());
        Some(Arc::new(Self::of(self.id, node, target, tls, state)))
    }

    /// Its address, for metrics and for a person.
    pub fn label(&self) -> &str {
        &self.state.label
    }

    /// A place for a request, where their number is bounded; it is free again when the permit is dropped.
    ///
    /// # Errors
    /// [`QueueFull`]: too many wait, or it has waited too long.
    pub async fn enter(&self, settings: &Settings) -> Result<Option<Permit>, QueueFull> {
        if settings.max_requests.is_none() {
            return Ok(None);
        }
        self.state.gate.enter(settings.queue, settings.queue_timeout).await
    }

    /// A connection was made or reused: an ejection for refusing one ends.
    pub fn accepted(&self) {
        if self.state.out_until.load(Ordering::Relaxed) != 0 {
            self.accepted_at(Instant::now());
        }
    }

    /// A connection was refused, or was not made in time. `since`: when the member was chosen for the request, or just
    /// before.
    pub fn refused(&self, settings: &Settings, since: Instant) {
        self.refused_at(Instant::now(), settings, since);
    }

    /// It accepted a request and did not answer it in time, or at all. `since` as for [`Member::refused`].
    pub fn failed(&self, settings: &Settings, since: Instant) {
        self.failed_at(Instant::now(), settings, since);
    }

    /// It answered: what it did not answer is counted anew, and if it was tried, it is back.
    pub fn answered(&self) {
        let state = &self.state;
        if state.unanswered.load(Ordering::Relaxed) != 0 || state.out_until.load(Ordering::Relaxed) != 0 {
            self.answered_at(Instant::now());
        }
    }

    pub(super) fn accepted_at(&self, now: Instant) {
        let mut standing = self.state.standing.lock();
        if standing.why == Some(Why::Refused) {
            self.state.take_back(&mut standing, now);
        }
    }

    pub(super) fn refused_at(&self, now: Instant, settings: &Settings, since: Instant) {
        let mut standing = self.state.standing.lock();
        if standing.is_news(since) {
            self.state.eject(&mut standing, now, settings, Why::Refused);
        }
    }

    pub(super) fn failed_at(&self, now: Instant, settings: &Settings, since: Instant) {
        let state = &self.state;
        let mut standing = state.standing.lock();
        if !standing.is_news(since) {
            return;
        }
        let unanswered = state.unanswered.load(Ordering::Relaxed).saturating_add(1);
        state.unanswered.store(unanswered, Ordering::Relaxed);
        if settings.eject_after != 0 && (standing.why.is_some() || unanswered >= settings.eject_after) {
            state.eject(&mut standing, now, settings, Why::Failed);
        }
    }

    pub(super) fn answered_at(&self, now: Instant) {
        let state = &self.state;
        let mut standing = state.standing.lock();
        state.unanswered.store(0, Ordering::Relaxed);
        // Answers of requests that began before still come in while it is out: many nodes refuse new ones while they
        // stop.
        if standing.why.is_some() && state.clock.at(now) >= state.out_until.load(Ordering::Relaxed) {
            state.take_back(&mut standing, now);
        }
    }

    /// A check of it has succeeded, or not. The answer is whether it is healthy, where that has changed.
    pub(super) fn checked_at(&self, now: Instant, succeeded: bool, health: &Health) -> Option<bool> {
        let state = &self.state;
        let mut standing = state.standing.lock();
        if !standing.checked {
            return None;
        }
        let healthy = state.healthy.load(Ordering::Relaxed);
        if healthy == succeeded {
            (standing.rises, standing.falls) = (0, 0);
            return None;
        }
        let (count, enough) = match succeeded {
            true => (&mut standing.rises, health.rise),
            false => (&mut standing.falls, health.fall),
        };
        *count = count.saturating_add(1);
        if *count < enough {
            return None;
        }
        if succeeded {
            state.recover(&mut standing, now);
            // It has accepted connections, one after the other.
            if standing.why == Some(Why::Refused) {
                state.take_back(&mut standing, now);
            }
        } else {
            standing.falls = 0;
            state.healthy.store(false, Ordering::Relaxed);
            state.tell(&standing, |observer, label| observer.healthy(label, false));
        }
        Some(succeeded)
    }

    /// Settings hold for it from now on. Who is not checked is healthy.
    pub(super) fn hold_to(&self, settings: &Settings, now: Instant) {
        self.state.gate.bound(settings.max_requests);
        let mut standing = self.state.standing.lock();
        standing.checked = settings.health.is_some();
        if !standing.checked {
            (standing.rises, standing.falls) = (0, 0);
            if !self.state.healthy.load(Ordering::Relaxed) {
                self.state.recover(&mut standing, now);
            }
        }
    }

    /// It is no member any more; requests under way end there. `succeeded`: another is now at its address, and stands
    /// well.
    pub(super) fn leave(&self, succeeded: bool) {
        let state = &self.state;
        let mut standing = state.standing.lock();
        if succeeded && standing.why.is_some() {
            state.tell(&standing, |observer, label| observer.returned(label));
        }
        if succeeded && !state.healthy.load(Ordering::Relaxed) {
            state.tell(&standing, |observer, label| observer.healthy(label, true));
        }
        standing.gone = true;
        standing.checked = false;
    }

    /// Whether it may have a request, by what the request is known by: a group, or a turn.
    pub(super) fn look(&self, now: u64, key: u128, settings: &Settings) -> Fit {
        let state = &self.state;
        let until = state.out_until.load(Ordering::Relaxed);
        if !state.healthy.load(Ordering::Relaxed) || now < until {
            return Fit::Out;
        }
        if until != 0 && state.is_being_tried(now, settings) {
            return Fit::Reserve;
        }
        match settings.slow_start {
            Some(slow) if !state.has_back(now, key, slow) => Fit::Reserve,
            _ => Fit::In,
        }
    }

    /// A request goes to it; false: another is trying it just now.
    pub(super) fn begin(&self, now: u64, settings: &Settings) -> bool {
        let state = &self.state;
        if state.out_until.load(Ordering::Relaxed) == 0 {
            return true;
        }
        let tried = state.tried_at.load(Ordering::Relaxed);
        if state.is_being_tried(now, settings) {
            return false;
        }
        state.tried_at.compare_exchange(tried, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Where it is among members for a key, where the ring has not said.
    pub(super) fn rank(&self, key: u128) -> u64 {
        draw(key, self.state.seed)
    }
}

/// A number that is always the same for a key and a member, and another for others.
fn draw(key: u128, seed: u64) -> u64 {
    mix(mix(key as u64 ^ seed).wrapping_add((key >> 64) as u64))
}

impl Standing {
    /// Whether a request that began then says something that the last ejection did not know.
    fn is_news(&self, since: Instant) -> bool {
        self.ejected_at.is_none_or(|at| since > at)
    }
}

impl State {
    /// Tells the observer, in the order in which it happened: the lock is held.
    fn tell(&self, standing: &Standing, what: impl FnOnce(&dyn Observer, &str)) {
        if !standing.gone {
            what(&*self.observer, &self.label);
        }
    }

    fn eject(&self, standing: &mut Standing, now: Instant, settings: &Settings, why: Why) {
        let times = 1u32.checked_shl(standing.in_a_row).unwrap_or(u32::MAX);
        let out_for = settings.eject_for.saturating_mul(times).min(settings.eject_max);
        standing.in_a_row = standing.in_a_row.saturating_add(1);
        standing.why = Some(why);
        self.out_for_answers.store(matches!(why, Why::Failed), Ordering::Relaxed);
        standing.ejected_at = Some(now);
        let until = self.clock.at(now).saturating_add(nanos(out_for));
        self.unanswered.store(0, Ordering::Relaxed);
        self.tried_at.store(0, Ordering::Relaxed);
        self.slow_from.store(until, Ordering::Relaxed);
        self.out_until.store(until, Ordering::Relaxed);
        self.tell(standing, |observer, label| observer.ejected(label, why.label()));
    }

    /// An ejection is over. Its share comes back from the time on that it could have been tried, so that nobody who has
    /// gone back to it goes away again.
    fn take_back(&self, standing: &mut Standing, now: Instant) {
        standing.why = None;
        standing.in_a_row = 0;
        self.slow_from.fetch_min(self.clock.at(now), Ordering::Relaxed);
        self.out_until.store(0, Ordering::Relaxed);
        self.tell(standing, |observer, label| observer.returned(label));
    }

    /// It is not ill any more.
    fn recover(&self, standing: &mut Standing, now: Instant) {
        standing.rises = 0;
        self.slow_from.fetch_max(self.clock.at(now), Ordering::Relaxed);
        self.healthy.store(true, Ordering::Relaxed);
        self.tell(standing, |observer, label| observer.healthy(label, true));
    }

    /// Whether a request has gone to it since the ejection was over, and may still be connecting.
    fn is_being_tried(&self, now: u64, settings: &Settings) -> bool {
        let tried = self.tried_at.load(Ordering::Relaxed);
        // One that was ejected for answers that did not come is tried for as long as an answer may take.
        let for_answer =
            if self.out_for_answers.load(Ordering::Relaxed) { settings.read_timeout } else { Duration::ZERO };
        tried != 0 && now < tried.saturating_add(nanos(settings.connect_timeout + for_answer))
    }

    /// Whether a key is of the share that it has back.
    fn has_back(&self, now: u64, key: u128, slow: Duration) -> bool {
        let (from, slow) = (self.slow_from.load(Ordering::Relaxed), nanos(slow));
        let since = now.saturating_sub(from);
        if from == 0 || since >= slow {
            return true;
        }
        u128::from(draw(key, self.seed) >> 32) < (u128::from(since) << 32) / u128::from(slow.max(1))
    }
}

/// The members that a request has been to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tried(SmallVec<[u64; 4]>);

impl Tried {
    /// Notes that it has been to one.
    pub fn note(&mut self, member: &Member) {
        if !self.has(member) {
            self.0.push(member.id);
        }
    }

    /// Takes one off: it has left the request untouched, and may have it again.
    pub fn forget(&mut self, member: &Member) {
        self.0.retain(|id| *id != member.id);
    }

    /// Whether it has been to any.
    pub fn any(&self) -> bool {
        !self.0.is_empty()
    }

    pub(super) fn has(&self, member: &Member) -> bool {
        self.0.contains(&member.id)
    }
}

#[cfg(test)]
mod tests {
    use super::super::settings::Check;
    use super::super::testing::{SECOND, Told, address, node, settings, tls_of_nobody};
    use super::*;

    const LABEL: &str = "127.0.0.1:80";

    struct Case {
        member: Arc<Member>,
        told: Arc<Told>,
        settings: Settings,
        began: Instant,
    }

    impl Case {
        fn new() -> Self {
            let (clock, told) = (Clock::start(), Arc::new(Told::default()));
            let node = node(address(1));
            let target = Target::Inet(address(1));
            let member = Arc::new(Member::new(1, &node, target, clock, told.clone(), None));
            Self { member, told, settings: settings(vec![node]), began: clock.0 }
        }

        fn at(&self, seconds: f64) -> Instant {
            self.began + SECOND.mul_f64(seconds)
        }

        fn fit(&self, seconds: f64) -> Fit {
            self.of(seconds, 7)
        }

        fn of(&self, seconds: f64, group: u128) -> Fit {
            self.member.look(self.member.state.clock.at(self.at(seconds)), group, &self.settings)
        }

        fn begin(&self, seconds: f64) -> bool {
            self.member.begin(self.member.state.clock.at(self.at(seconds)), &self.settings)
        }

        /// A request that was given to it at `since` is refused.
        fn refused(&self, since: f64, seconds: f64) {
            self.member.refused_at(self.at(seconds), &self.settings, self.at(since));
        }

        fn failed(&self, since: f64, seconds: f64) {
            self.member.failed_at(self.at(seconds), &self.settings, self.at(since));
        }
    }

    #[test]
    fn who_refuses_is_out_for_twice_as_long_each_time() {
        let mut case = Case::new();
        case.settings.eject_max = 5 * SECOND;
        assert_eq!(case.fit(1.0), Fit::In);
        let mut now = 1.0;
        for out_for in [1.0, 2.0, 4.0, 5.0, 5.0] {
            case.refused(now - 0.1, now);
            assert_eq!(case.fit(now + out_for - 0.01), Fit::Out);
            assert_eq!(case.fit(now + out_for + 0.01), Fit::In, "it may be tried");
            now += out_for + 0.2;
        }
        assert_eq!(case.told.take(), vec![format!("ejected {LABEL} refused"); 5]);
        case.member.accepted_at(case.at(now));
        assert_eq!(case.told.take(), [format!("returned {LABEL}")]);
        case.refused(now + 0.1, now + 0.2);
        assert_eq!(case.fit(now + 1.1), Fit::Out);
        assert_eq!(case.fit(now + 1.3), Fit::In, "it begins anew");
    }

    #[test]
    fn a_connection_ends_an_ejection_for_refusing_one_before_its_time() {
        let case = Case::new();
        case.refused(0.9, 1.0);
        case.member.accepted_at(case.at(1.1));
        assert_eq!(case.fit(1.1), Fit::In);
        case.refused(0.95, 1.2);
        assert_eq!(case.fit(1.2), Fit::In, "that request began before");
    }

    #[test]
    fn what_began_before_an_ejection_is_no_news() {
        let case = Case::new();
        case.refused(0.0, 1.0);
        for late in [1.1, 2.5, 9.0] {
            case.refused(0.9, late);
            case.failed(0.9, late);
        }
        assert_eq!(case.fit(2.1), Fit::In);
        assert_eq!(case.told.take().len(), 1);
    }

    #[test]
    fn so_many_unanswered_in_a_row() {
        let case = Case::new();
        for _ in 0..3 {
            case.failed(1.0, 1.1);
            case.failed(1.0, 1.2);
            case.member.answered_at(case.at(1.3));
        }
        assert_eq!(case.fit(1.3), Fit::In);
        (0..3).for_each(|_| case.failed(1.3, 1.4));
        assert_eq!(case.fit(1.5), Fit::Out);
        assert_eq!(case.told.take(), [format!("ejected {LABEL} failed")]);
        case.member.accepted_at(case.at(1.6));
        case.member.answered_at(case.at(1.6));
        assert_eq!(case.fit(1.6), Fit::Out, "that it accepts was never in doubt; an answer may be one of long ago");
        // The one that tries it is not answered either.
        assert_eq!(case.fit(2.5), Fit::In);
        case.failed(2.5, 2.6);
        assert_eq!(case.fit(4.5), Fit::Out);
        assert_eq!(case.fit(4.7), Fit::In);
        case.member.accepted_at(case.at(4.7));
        case.member.answered_at(case.at(4.8));
        assert_eq!(case.told.take(), [format!("ejected {LABEL} failed"), format!("returned {LABEL}")]);
        case.failed(4.8, 4.9);
        assert_eq!(case.fit(4.9), Fit::In, "and counted anew");
    }

    #[test]
    fn any_number_of_unanswered_where_that_is_wanted() {
        let mut case = Case::new();
        case.settings.eject_after = 0;
        (0..99).for_each(|_| case.failed(1.0, 1.1));
        assert_eq!(case.fit(1.1), Fit::In);
    }

    #[test]
    fn one_at_a_time_tries() {
        let case = Case::new();
        assert!(case.begin(0.5) && case.begin(0.5), "who is in is not tried");
        case.refused(0.9, 1.0);
        assert_eq!(case.fit(2.1), Fit::In);
        assert!(case.begin(2.1));
        assert!(!case.begin(2.2));
        assert_eq!(case.fit(2.2), Fit::Reserve);
        assert_eq!(case.fit(3.2), Fit::In, "nothing was heard of that one");
        assert!(case.begin(3.2));
        case.member.accepted_at(case.at(3.3));
        assert_eq!(case.fit(3.3), Fit::In);
        assert!(case.begin(3.3) && case.begin(3.3));
    }

    #[test]
    fn groups_come_back_little_by_little_and_each_once() {
        let mut case = Case::new();
        case.settings.slow_start = Some(10 * SECOND);
        let groups: Vec<u128> = (0..1000).collect();
        assert!(groups.iter().all(|group| case.of(0.5, *group) == Fit::In), "not at the start");
        case.refused(0.9, 1.0);
        assert!(groups.iter().all(|group| case.of(2.0, *group) == Fit::Reserve), "its time is over just now");
        case.member.accepted_at(case.at(2.5));
        let mut back = vec![false; groups.len()];
        for tenth in 1..=100 {
            let now = 2.0 + f64::from(tenth) / 10.0;
            for group in &groups {
                let is_in = case.of(now, *group) == Fit::In;
                assert!(is_in || !back[*group as usize], "{group} goes away again");
                back[*group as usize] = is_in;
            }
            let count = back.iter().filter(|back| **back).count();
            let expected = tenth as usize * 10;
            assert!(count.abs_diff(expected) < 60, "{count} after {tenth} of 100");
        }
        assert!(back.iter().all(|back| *back));
    }

    #[test]
    fn checks_make_it_ill_and_well() {
        let case = Case::new();
        let mut settings = case.settings.clone();
        let health = Health { check: Check::Tcp, interval: SECOND, timeout: SECOND, rise: 2, fall: 3 };
        let check = |seconds: f64, succeeded| case.member.checked_at(case.at(seconds), succeeded, &health);
        assert_eq!(check(0.0, false), None, "nobody has said that it is checked");
        settings.health = Some(health.clone());
        case.member.hold_to(&settings, case.at(0.0));
        for succeeded in [false, false, true, false, false] {
            assert_eq!(check(1.0, succeeded), None);
        }
        assert_eq!(check(1.0, false), Some(false));
        assert_eq!(case.fit(1.0), Fit::Out);
        for succeeded in [true, false, true] {
            assert_eq!(check(2.0, succeeded), None);
        }
        assert_eq!(case.fit(2.0), Fit::Out);
        assert_eq!(check(2.0, true), Some(true));
        assert_eq!(case.fit(2.0), Fit::In);
        assert_eq!(case.told.take(), [format!("healthy {LABEL} false"), format!("healthy {LABEL} true")]);
        // It refused, was found ill, and is well again: that it accepts is known.
        case.refused(2.9, 3.0);
        for _ in 0..3 {
            check(3.1, false);
        }
        for _ in 0..2 {
            check(3.2, true);
        }
        assert_eq!(case.fit(3.2), Fit::In);
        // Without checks nobody is ill.
        for _ in 0..3 {
            check(3.3, false);
        }
        assert_eq!(case.fit(3.3), Fit::Out);
        settings.health = None;
        case.member.hold_to(&settings, case.at(3.4));
        assert_eq!(case.fit(3.4), Fit::In);
        for _ in 0..9 {
            check(3.5, false);
        }
        assert_eq!(case.fit(3.5), Fit::In, "a check that was under way");
    }

    #[test]
    fn who_is_ill_comes_back_slowly_too() {
        let mut case = Case::new();
        let health = Health { check: Check::Tcp, interval: SECOND, timeout: SECOND, rise: 1, fall: 1 };
        case.settings.slow_start = Some(10 * SECOND);
        case.settings.health = Some(health.clone());
        case.member.hold_to(&case.settings, case.at(0.0));
        case.member.checked_at(case.at(1.0), false, &health);
        case.member.checked_at(case.at(2.0), true, &health);
        let count = |seconds| (0..1000).filter(|group| case.of(seconds, *group) == Fit::In).count();
        assert_eq!((count(2.0), count(12.0)), (0, 1000));
        assert!((400..600).contains(&count(7.0)));
    }

    #[test]
    fn nobody_is_told_of_who_is_gone() {
        let case = Case::new();
        case.refused(0.9, 1.0);
        case.member.leave(false);
        case.member.accepted_at(case.at(1.1));
        assert_eq!(case.told.take(), [format!("ejected {LABEL} refused")]);
        let case = Case::new();
        case.refused(0.9, 1.0);
        case.member.leave(true);
        assert_eq!(case.told.take()[1..], [format!("returned {LABEL}")], "another is there, which is well");
    }

    #[test]
    fn a_successor_stands_as_it_did() {
        let case = Case::new();
        let same = case.member.succeed(&node(address(1))).unwrap();
        assert!(Arc::ptr_eq(&same, &case.member));
        let mut heavier = node(address(1));
        heavier.weight = 3;
        let successor = case.member.succeed(&heavier).unwrap();
        assert_eq!((successor.id, successor.weight), (case.member.id, 3));
        case.refused(0.9, 1.0);
        let now = case.member.state.clock.at(case.at(1.1));
        assert_eq!(successor.look(now, 7, &case.settings), Fit::Out);
        let mut other = node(address(1));
        other.http2 = true;
        assert!(case.member.succeed(&other).is_none());
        let mut other = node(address(1));
        other.tls = Some(Arc::new(tls_of_nobody(1)));
        assert!(case.member.succeed(&other).is_none());
    }

    #[test]
    fn nobody_is_tried_twice() {
        let case = Case::new();
        let mut tried = Tried::default();
        assert!(!tried.any());
        tried.note(&case.member);
        tried.note(&case.member);
        assert!(tried.any() && tried.has(&case.member));
        tried.forget(&case.member);
        assert_eq!(tried, Tried::default());
    }

    #[tokio::test]
    async fn requests_under_way_are_bounded_where_that_is_wanted() {
        let mut case = Case::new();
        assert!(case.member.enter(&case.settings).await.unwrap().is_none());
        case.settings.max_requests = Some(1);
        case.member.hold_to(&case.settings, case.at(0.0));
        let permit = case.member.enter(&case.settings).await.unwrap().unwrap();
        assert_eq!(case.member.enter(&case.settings).await.unwrap_err(), QueueFull::Full);
        drop(permit);
        assert!(case.member.enter(&case.settings).await.unwrap().is_some());
    }
}
