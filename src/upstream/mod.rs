//! The Delivery Service's nodes: which one a request goes to.
//!
//! Each address of a node is a [`Member`]. Requests of a group go to one member (consistent hash, Pingora's ketama
//! ring), so that a DS may keep a group's state where it is; those without a group go in turn, by weight. While a
//! group's member is out (`member.rs` says when) its requests go to the next on the ring, and come back when it does:
//! with a slow start little by little, each group once. What is read for a request is exchanged whole by a reload
//! ([`Nodes::reload`]) or when names have other addresses; members that stay keep how they stand.

mod health;
mod member;
mod queue;
mod resolve;
mod ring;
mod settings;
#[cfg(test)]
mod testing;

pub use member::{Member, Tried};
pub use queue::{Permit, QueueFull};
pub use settings::{Check, Health, MAX_NODES, NodeSettings, NodeTls, Place, Settings, Target};

use arc_swap::ArcSwap;
use member::{Clock, Fit};
use parking_lot::Mutex;
use resolve::{Answer, Name};
use ring::Layout;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Members there may be at most, of all nodes; addresses beyond are left out.
const MAX_MEMBERS: usize = 4096;

/// Between look-ups while a name has never had an address: the first time, and twice as long each time.
const RETRY: Duration = Duration::from_secs(1);

/// Is told what becomes of members, in the order in which it happens. It must not call back: locks are held.
pub trait Observer: Send + Sync {
    /// A member is left out, `why`: `refused` or `failed`.
    fn ejected(&self, node: &str, why: &'static str);
    /// It is back.
    fn returned(&self, node: &str);
    /// Active checks find it ill, or healthy again. Members are healthy before they are checked.
    fn healthy(&self, node: &str, healthy: bool);
    /// These are the members now. Of those that were before, what was said of them still holds.
    fn members(&self, labels: &[String]);
}

/// The nodes at work.
pub struct Nodes {
    current: ArcSwap<Current>,
    /// Counts requests without a group.
    turn: AtomicU64,
    clock: Clock,
    observer: Arc<dyn Observer>,
    /// Of those who exchange what is current.
    known: Mutex<Known>,
    /// Names are to be looked up now.
    to_resolve: Notify,
    /// Members or checks are others.
    to_check: Notify,
}

/// What a request reads.
struct Current {
    settings: Arc<Settings>,
    members: Vec<Arc<Member>>,
    layout: Arc<Layout>,
}

/// What is known from before.
#[derive(Default)]
struct Known {
    /// The last addresses of names.
    addresses: HashMap<Name, Vec<SocketAddr>>,
    /// Members that are new from now on have not been there from the start.
    started: bool,
    last_id: u64,
}

impl std::fmt::Debug for Nodes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let current = self.current.load();
        f.debug_struct("Nodes")
            .field("settings", &current.settings)
            .field("members", &current.members)
            .finish_non_exhaustive()
    }
}

impl Nodes {
    /// Nodes as configured, all of them in; those at names from the first look-up on ([`Nodes::resolve_now`]).
    pub fn new(settings: Settings, observer: Arc<dyn Observer>) -> Arc<Self> {
        let current = Current {
            layout: Arc::new(Layout::new(&[], settings.by_group)),
            settings: Arc::new(settings),
            members: vec![],
        };
        let nodes = Arc::new(Self {
            turn: AtomicU64::new(0),
            clock: Clock::start(),
            observer,
            known: Mutex::default(),
            to_resolve: Notify::new(),
            to_check: Notify::new(),
            current: ArcSwap::from_pointee(current),
        });
        nodes.publish(&mut nodes.known.lock(), nodes.settings(), Instant::now());
        nodes
    }

    /// The settings.
    pub fn settings(&self) -> Arc<Settings> {
        self.current.load().settings.clone()
    }

    /// The members, in the order of the configuration.
    pub fn members(&self) -> Vec<Arc<Member>> {
        self.current.load().members.clone()
    }

    /// Whether there is a member that a request could go to.
    pub fn any_usable(&self) -> bool {
        let (now, current) = (self.clock.at(Instant::now()), self.current.load());
        current.members.iter().any(|member| member.look(now, 0, &current.settings) != Fit::Out)
    }

    /// Chooses a member, by the hash of a group where there is one: none that the request has been to, none that is
    /// out.
    pub fn choose(&self, group: Option<u128>, tried: &Tried) -> Option<Arc<Member>> {
        self.choose_at(Instant::now(), group, tried).0
    }

    /// As [`Nodes::choose`], at a time that is known; with the settings that it was chosen by.
    pub fn choose_at(&self, now: Instant, group: Option<u128>, tried: &Tried) -> (Option<Arc<Member>>, Arc<Settings>) {
        let (now, current) = (self.clock.at(now), self.current.load());
        let chosen = match group.filter(|_| current.settings.by_group && current.members.len() > 1) {
            Some(group) => {
                let walk = current.layout.of_group(group).map(|member| (member, group));
                current.choose(now, tried, group, walk)
            }
            None => {
                // Another turn for each that is out: what is theirs is so shared out evenly.
                let turns = std::iter::repeat_with(|| self.turn.fetch_add(1, Ordering::Relaxed));
                let turns = turns.map_while(|turn| Some((current.layout.of_turn(turn)?, u128::from(turn))));
                let beyond = u128::from(self.turn.load(Ordering::Relaxed));
                current.choose(now, tried, beyond, turns.take(current.layout.turns()))
            }
        };
        (chosen, current.settings.clone())
    }

    /// Other settings, from now on. Members at the same targets, spoken to in the same way, keep how they stand, and
    /// requests under way at others end there. Names that are new have members once they are looked up, which
    /// [`Nodes::run`] does at once and [`Nodes::resolve_ahead`] did before.
    pub fn reload(&self, settings: Settings) {
        let mut known = self.known.lock();
        let names: HashSet<Name> = settings.names().into_iter().collect();
        known.addresses.retain(|name, _| names.contains(name));
        known.started = true;
        self.publish(&mut known, Arc::new(settings), Instant::now());
        drop(known);
        self.to_resolve.notify_one();
    }

    /// Looks up the names of settings that are not in use yet, so that at the reload to them their nodes have members.
    pub async fn resolve_ahead(&self, settings: &Settings) {
        let names = settings.names().into_iter();
        let new = {
            let known = self.known.lock();
            names.filter(|name| !known.addresses.contains_key(name)).collect()
        };
        let answers = resolve::look_up(new).await;
        // Those in use may be without one of them too.
        self.resolved(answers, Instant::now());
    }

    /// Looks all names up. A name whose look-up fails keeps the addresses that it had.
    pub async fn resolve_now(&self) {
        let answers = resolve::look_up(self.settings().names()).await;
        self.resolved(answers, Instant::now());
    }

    fn resolved(&self, answers: Vec<Answer>, now: Instant) {
        let mut known = self.known.lock();
        if known.learn(answers) {
            self.publish(&mut known, self.settings(), now);
        }
        known.started = true;
    }

    /// Looks names up again from time to time, and runs the active checks. It does not end.
    pub async fn run(self: Arc<Self>) {
        tokio::join!(self.keep_resolving(), health::keep_checking(&self));
    }

    async fn keep_resolving(&self) {
        let mut pause = RETRY;
        loop {
            let settings = self.settings();
            // A short time would be one without an end to look-ups.
            let every = settings.resolve_every.max(Duration::from_millis(100));
            let wait = if self.is_without(&settings) { pause.min(every) } else { every };
            drop(settings);
            pause = tokio::select! {
                () = tokio::time::sleep(wait) => pause.saturating_mul(2).min(every),
                () = self.to_resolve.notified() => RETRY,
            };
            self.resolve_now().await;
            if !self.is_without(&self.settings()) {
                pause = RETRY;
            }
        }
    }

    /// Whether a name has no address yet.
    fn is_without(&self, settings: &Settings) -> bool {
        let known = self.known.lock();
        settings.names().iter().any(|name| !known.addresses.contains_key(name))
    }

    /// Exchanges what is current.
    fn publish(&self, known: &mut Known, settings: Arc<Settings>, now: Instant) {
        let before = self.current.load_full();
        let members = self.build(known, &settings, &before.members, now);
        part(&before.members, &members);
        members.iter().for_each(|member| member.hold_to(&settings, now));

        let shape = |members: &[Arc<Member>]| -> Vec<_> {
            members.iter().map(|member| (member.target.on_ring(), member.weight)).collect()
        };
        let (was, is) = (shape(&before.members), shape(&members));
        let layout = match was == is && before.settings.by_group == settings.by_group {
            true => before.layout.clone(),
            false => Arc::new(Layout::new(&is, settings.by_group)),
        };
        let labels: Vec<String> = members.iter().map(|member| member.label().to_owned()).collect();
        self.current.store(Arc::new(Current { settings, members, layout }));
        if before.members.iter().map(|member| member.label()).ne(labels.iter().map(String::as_str)) {
            self.observer.members(&labels);
        }
        self.to_check.notify_one();
    }

    /// The members that settings come to. Each target is one: of two nodes there, the first.
    fn build(&self, known: &mut Known, settings: &Settings, before: &[Arc<Member>], now: Instant) -> Vec<Arc<Member>> {
        let before: HashMap<&Target, &Arc<Member>> = before.iter().map(|member| (&member.target, member)).collect();
        let mut taken = HashSet::new();
        let mut members = vec![];
        for node in &settings.nodes {
            for target in known.targets(&node.place) {
                if !taken.insert(target.clone()) {
                    tracing::debug!(node = node.name, "another node is at {target}: it is one with that");
                    continue;
                }
                if members.len() >= MAX_MEMBERS {
                    tracing::warn!(node = node.name, "{target} is left out: {MAX_MEMBERS} addresses are the most");
                    return members;
                }
                members.push(before.get(&target).and_then(|member| member.succeed(node)).unwrap_or_else(|| {
                    known.last_id += 1;
                    let since = known.started.then_some(now);
                    Arc::new(Member::new(known.last_id, node, target, self.clock, self.observer.clone(), since))
                }));
            }
        }
        members
    }
}

/// Members that are not among those of now leave.
fn part(before: &[Arc<Member>], now: &[Arc<Member>]) {
    let now: HashMap<&Target, u64> = now.iter().map(|member| (&member.target, member.id)).collect();
    for member in before {
        let there = now.get(&member.target);
        if there != Some(&member.id) {
            member.leave(there.is_some());
        }
    }
}

impl Known {
    /// Where a node is, as far as is known.
    fn targets(&self, place: &Place) -> Vec<Target> {
        match place {
            Place::Address(address) => vec![Target::Inet(*address)],
            Place::Unix(path) => vec![Target::Unix(path.clone())],
            Place::Name { host, port } => {
                let found = self.addresses.get(&(host.clone(), *port));
                found.into_iter().flatten().copied().map(Target::Inet).collect()
            }
        }
    }

    /// Takes answers in; whether there is something new in them.
    fn learn(&mut self, answers: Vec<Answer>) -> bool {
        let mut new = false;
        for ((host, port), found) in answers {
            match found {
                Ok(found) => {
                    let before = self.addresses.get(&(host.clone(), port));
                    if before != Some(&found) {
                        tracing::info!("{host}:{port} is at {found:?}");
                        self.addresses.insert((host, port), found);
                        new = true;
                    }
                }
                Err(e) => {
                    let kept = self.addresses.get(&(host.clone(), port)).map_or(0, Vec::len);
                    tracing::warn!(kept, "{host} cannot be looked up: {e}");
                }
            }
        }
        new
    }
}

impl Current {
    /// The first of `candidates`, each with what a share of its requests is drawn by, that may have the request; else
    /// one that should not quite yet; else whoever is left.
    fn choose(
        &self,
        now: u64,
        tried: &Tried,
        key: u128,
        candidates: impl Iterator<Item = (usize, u128)>,
    ) -> Option<Arc<Member>> {
        let settings = &self.settings;
        let mut reserve = None;
        for (member, key) in candidates {
            let Some(member) = self.members.get(member).filter(|member| !tried.has(member)) else { continue };
            match member.look(now, key, settings) {
                Fit::In if member.begin(now, settings) => return Some(member.clone()),
                Fit::In | Fit::Reserve => reserve = reserve.or(Some(member)),
                Fit::Out => {}
            }
        }
        // Not everyone need have been among them.
        let others = self.members.iter().filter(|member| !tried.has(member));
        let others = others.map(|member| ((member.look(now, key, settings), member.rank(key)), member));
        let other = others.filter(|((fit, _), _)| *fit != Fit::Out).max_by_key(|(order, _)| *order);
        let chosen = match (reserve, other) {
            (Some(reserve), None | Some(((Fit::Reserve, _), _))) => reserve,
            (_, Some((_, other))) => other,
            (None, None) => return None,
        };
        // Whoever else tries it just now.
        let _ = chosen.begin(now, settings);
        Some(chosen.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{SECOND, Told, address, node, node_at, nodes, settings, tls_of_nobody, until};
    use super::*;
    use std::io;

    struct Case {
        nodes: Arc<Nodes>,
        told: Arc<Told>,
        began: Instant,
    }

    impl Case {
        fn new(settings: Settings) -> Self {
            let told = Arc::new(Told::default());
            let nodes = Nodes::new(settings, told.clone());
            Self { nodes, told, began: Instant::now() }
        }

        fn of(n: u16) -> Self {
            Self::new(settings(nodes(n)))
        }

        fn at(&self, seconds: f64) -> Instant {
            self.began + SECOND.mul_f64(seconds)
        }

        fn choose(&self, seconds: f64, group: Option<u128>) -> Option<String> {
            let chosen = self.nodes.choose_at(self.at(seconds), group, &Tried::default()).0;
            chosen.map(|member| member.label().to_owned())
        }

        fn homes(&self, seconds: f64) -> Vec<String> {
            (0..300).map(|group| self.choose(seconds, Some(group)).unwrap()).collect()
        }

        fn member(&self, label: &str) -> Arc<Member> {
            self.nodes.members().into_iter().find(|member| member.label() == label).unwrap()
        }

        fn labels(&self) -> Vec<String> {
            self.nodes.members().iter().map(|member| member.label().to_owned()).collect()
        }

        /// A node refuses a request that it has just been given.
        fn refused(&self, label: &str, seconds: f64) {
            self.member(label).refused_at(self.at(seconds), &self.nodes.settings(), self.at(seconds - 0.01));
        }

        fn resolved(&self, seconds: f64, host: &str, found: Option<&[u16]>) {
            let found = match found {
                Some(found) => Ok(found.iter().map(|i| address(*i)).collect()),
                None => Err(io::ErrorKind::TimedOut.into()),
            };
            self.nodes.resolved(vec![((host.to_owned(), 80), found)], self.at(seconds));
        }
    }

    fn label(i: u16) -> String {
        address(i).to_string()
    }

    fn named(host: &str) -> NodeSettings {
        node_at(&format!("{host}:80"), Place::Name { host: host.to_owned(), port: 80 })
    }

    #[test]
    fn a_group_keeps_its_node_and_groups_are_spread() {
        let case = Case::of(3);
        let homes = case.homes(0.0);
        for _ in 0..3 {
            assert_eq!(case.homes(0.0), homes);
        }
        for i in 1..=3 {
            let share = homes.iter().filter(|home| **home == label(i)).count();
            assert!(share > 50, "{share} of 300");
        }
        assert_eq!(Case::of(3).homes(0.0), homes, "on another gateway too");
    }

    #[test]
    fn the_next_node_takes_over_and_only_its_groups_move() {
        let case = Case::of(3);
        let homes = case.homes(0.0);
        case.refused(&label(2), 1.0);
        for (home, now) in homes.iter().zip(case.homes(1.5)) {
            assert_eq!(now == *home, *home != label(2));
        }
        case.member(&label(2)).accepted_at(case.at(1.6));
        assert_eq!(case.homes(1.6), homes);
    }

    #[test]
    fn when_all_are_out_there_is_none() {
        for by_group in [true, false] {
            let case = Case::new(Settings { by_group, ..settings(nodes(3)) });
            (1..=3).for_each(|i| case.refused(&label(i), 1.0));
            assert_eq!(case.choose(1.5, Some(7)), None);
            assert_eq!(case.choose(1.5, None), None);
            for _ in 0..9 {
                assert!(case.choose(2.5, Some(7)).is_some(), "who is tried already takes more, if there is no other");
            }
        }
        let case = Case::of(1);
        assert!(case.nodes.any_usable());
        case.nodes.members()[0].refused(&case.nodes.settings(), Instant::now());
        assert!(!case.nodes.any_usable());
    }

    #[test]
    fn many_nodes_are_all_of_them_nodes() {
        let case = Case::of(300);
        (1..300).for_each(|i| case.refused(&label(i), 1.0));
        for group in [Some(7), Some(8), None] {
            assert_eq!(case.choose(1.5, group), Some(label(300)), "the only one left");
        }
        case.refused(&label(300), 1.0);
        assert_eq!(case.choose(1.5, Some(7)), None);
    }

    #[test]
    fn without_a_group_in_turn_and_by_weight() {
        let turns =
            |case: &Case, seconds, n| -> Vec<_> { (0..n).map(|_| case.choose(seconds, None).unwrap()).collect() };
        let case = Case::of(3);
        assert_eq!(turns(&case, 0.0, 6), [1, 2, 3, 1, 2, 3].map(label));
        case.refused(&label(1), 1.0);
        assert_eq!(turns(&case, 1.5, 4), [2, 3, 2, 3].map(label), "its turns are everybody's");
        let mut weighted = nodes(2);
        weighted[0].weight = 3;
        let case = Case::new(Settings { by_group: false, ..settings(weighted) });
        let shares =
            |case: &Case, group: Option<u128>| (0..400).filter(|_| case.choose(0.0, group) == Some(label(1))).count();
        assert_eq!((shares(&case, None), shares(&case, Some(7))), (300, 300), "groups in turn too, if so configured");
    }

    #[test]
    fn nobody_is_tried_twice() {
        let case = Case::of(2);
        for group in [Some(1), None] {
            let mut tried = Tried::default();
            let first = case.nodes.choose(group, &tried).unwrap();
            tried.note(&first);
            let second = case.nodes.choose(group, &tried).unwrap();
            assert_ne!(first.id, second.id);
            tried.note(&second);
            assert!(case.nodes.choose(group, &tried).is_none());
            tried.forget(&first);
            assert_eq!(case.nodes.choose(group, &tried).unwrap().id, first.id);
        }
    }

    #[test]
    fn groups_return_little_by_little_and_each_once() {
        let case = Case::new(Settings { slow_start: Some(10 * SECOND), ..settings(nodes(3)) });
        let homes = case.homes(0.0);
        case.refused(&label(2), 1.0);
        let theirs = homes.iter().filter(|home| **home == label(2)).count();
        let mut before = 0;
        for second in 2..=12 {
            let now = case.homes(f64::from(second));
            case.member(&label(2)).accepted_at(case.at(f64::from(second)));
            let back = now.iter().filter(|now| **now == label(2)).count();
            for (home, now) in homes.iter().zip(&now) {
                assert!(home == now || *home == label(2), "nobody else moves");
            }
            assert!(back >= before, "{back} after {before}");
            before = back;
            if second == 7 {
                assert!((theirs / 4..=theirs * 3 / 4).contains(&back), "half the time has passed: {back} of {theirs}");
            }
        }
        assert_eq!(case.homes(12.0), homes);
        // Turns come back in the same way.
        case.refused(&label(2), 20.0);
        case.member(&label(2)).accepted_at(case.at(21.0));
        let turns = |seconds| (0..900).filter(|_| case.choose(seconds, None) == Some(label(2))).count();
        assert_eq!(turns(21.0), 0);
        assert!((90..240).contains(&turns(26.0)), "half of a share of a third, and its share of what is left");
        assert_eq!(turns(31.0), 300);
        // Nobody else is to be had.
        case.refused(&label(2), 40.0);
        case.member(&label(2)).accepted_at(case.at(41.0));
        case.refused(&label(1), 41.0);
        case.refused(&label(3), 41.0);
        assert!(case.homes(41.0).iter().all(|home| *home == label(2)));
        assert_eq!(turns(41.0), 900);
    }

    #[test]
    fn one_request_at_a_time_tries_who_was_out() {
        let case = Case::of(3);
        let homes = case.homes(0.0);
        case.refused(&label(2), 1.0);
        let back = |seconds| case.homes(seconds).iter().filter(|now| **now == label(2)).count();
        assert_eq!((back(2.1), back(2.2), back(3.2)), (1, 0, 1));
        case.member(&label(2)).accepted_at(case.at(3.3));
        assert_eq!(case.homes(3.3), homes);
    }

    #[test]
    fn a_reload_keeps_how_members_stand() {
        let case = Case::new(Settings { slow_start: Some(10 * SECOND), ..settings(nodes(3)) });
        let ids = |case: &Case| -> Vec<u64> { case.nodes.members().iter().map(|member| member.id).collect() };
        let before = ids(&case);
        assert_eq!(case.told.take(), [format!("members {} {} {}", label(1), label(2), label(3))]);
        let now = Instant::now();
        case.member(&label(2)).refused_at(now, &case.nodes.settings(), now - SECOND);
        assert_eq!(case.told.take().len(), 1);
        let mut other = settings(nodes(3));
        other.nodes[1].weight = 7;
        other.nodes[1].name = "ds2:80".into();
        other.eject_for = 5 * SECOND;
        case.nodes.reload(other.clone());
        assert_eq!(ids(&case), before);
        assert_eq!((case.member(&label(2)).weight, case.member(&label(2)).name.as_str()), (7, "ds2:80"));
        assert!((0..100).all(|group| case.choose(0.0, Some(group)) != Some(label(2))), "it is out as it was");
        assert_eq!(*case.nodes.settings(), other);
        assert_eq!(case.told.take(), [""; 0], "the members are who they were");
        // One goes, one comes, and one is spoken to in another way.
        let mut others = nodes(4);
        others.remove(0);
        others[0].tls = Some(Arc::new(tls_of_nobody(1)));
        case.nodes.reload(settings(others.clone()));
        let after = ids(&case);
        assert_eq!(after[1], before[2]);
        assert!(!before.contains(&after[0]) && !before.contains(&after[2]));
        let told = case.told.take();
        assert_eq!(told[0], format!("returned {}", label(2)), "another is there now, which is well");
        assert_eq!(told[1], format!("members {} {} {}", label(2), label(3), label(4)));
        others[0].tls = Some(Arc::new(tls_of_nobody(1)));
        case.nodes.reload(settings(others.clone()));
        assert_eq!(ids(&case), after, "the same TLS, read again");
        others[0].tls = Some(Arc::new(tls_of_nobody(2)));
        case.nodes.reload(settings(others));
        assert_ne!(ids(&case)[0], after[0]);
    }

    #[test]
    fn who_is_new_starts_slowly_but_not_all_at_the_start() {
        let slow = |n| Settings { slow_start: Some(600 * SECOND), ..settings(nodes(n)) };
        let case = Case::new(slow(2));
        let homes = case.homes(0.0);
        assert!(homes.contains(&label(1)) && homes.contains(&label(2)));
        case.nodes.reload(slow(3));
        assert_eq!(case.homes(0.0), homes);
        assert!(case.homes(3600.0).contains(&label(3)));
    }

    #[test]
    fn a_target_is_one_member() {
        let mut twice = nodes(2);
        twice.push(node(address(1)));
        twice.push(named("ds.example"));
        let case = Case::new(settings(twice));
        case.resolved(0.0, "ds.example", Some(&[2, 3]));
        assert_eq!(case.labels(), [1, 2, 3].map(label));
    }

    #[test]
    fn names_have_the_addresses_that_they_have_now() {
        let case = Case::new(Settings { slow_start: Some(10 * SECOND), ..settings(vec![named("ds.example")]) });
        assert!(case.nodes.choose(Some(7), &Tried::default()).is_none());
        case.resolved(1.0, "ds.example", Some(&[1, 2]));
        assert_eq!(case.labels(), [1, 2].map(label));
        assert!(case.homes(1.0).contains(&label(2)), "those of the first look-up are there from the start");
        let (first, second) = (case.member(&label(1)), case.member(&label(2)));
        case.refused(&label(1), 1.1);
        case.resolved(1.2, "ds.example", None);
        assert_eq!(case.labels(), [1, 2].map(label), "a look-up that fails changes nothing");
        case.resolved(1.3, "ds.example", Some(&[1, 3]));
        assert_eq!(case.labels(), [1, 3].map(label));
        assert_eq!(case.member(&label(1)).id, first.id);
        assert_eq!(case.choose(1.3, Some(7)), Some(label(3)), "it starts slowly, and is the only one");
        second.accepted();
        case.resolved(1.4, "ds.example", Some(&[1, 2, 3]));
        assert_ne!(case.member(&label(2)).id, second.id, "who was gone is new");
        let told = case.told.take();
        let members = |of: &[u16]| {
            let labels: Vec<_> = of.iter().map(|i| label(*i)).collect();
            format!("members {}", labels.join(" "))
        };
        let ejected = format!("ejected {} refused", label(1));
        assert_eq!(told, [members(&[1, 2]), ejected, members(&[1, 3]), members(&[1, 2, 3])]);
    }

    #[test]
    fn a_reload_keeps_the_addresses_of_names_and_forgets_others() {
        let case = Case::new(settings(vec![named("a.example"), named("b.example")]));
        case.resolved(0.0, "a.example", Some(&[1]));
        case.resolved(0.0, "b.example", Some(&[2]));
        assert!(!case.nodes.is_without(&case.nodes.settings()));
        case.nodes.reload(settings(vec![named("b.example"), named("c.example")]));
        assert_eq!(case.labels(), [label(2)]);
        assert!(case.nodes.is_without(&case.nodes.settings()));
        case.nodes.reload(settings(vec![named("a.example")]));
        assert!(case.labels().is_empty(), "what was not asked for is not known");
    }

    #[tokio::test]
    async fn names_are_looked_up_at_the_start_ahead_and_while_it_runs() {
        let case = Case::new(settings(vec![named("localhost")]));
        case.nodes.resolve_now().await;
        assert!(!case.labels().is_empty());
        let other = settings(vec![named("127.0.0.9")]);
        case.nodes.resolve_ahead(&other).await;
        assert!(!case.labels().contains(&"127.0.0.9:80".to_owned()));
        case.nodes.reload(other);
        assert_eq!(case.labels(), ["127.0.0.9:80"]);
        let run = tokio::spawn(case.nodes.clone().run());
        case.nodes.reload(settings(vec![named("127.0.0.8")]));
        until(|| case.labels() == ["127.0.0.8:80"]).await;
        run.abort();
    }

    #[tokio::test]
    async fn another_bound_of_requests_is_that_of_members_that_stay() {
        let bounded = |max_requests| Settings { max_requests, queue: 1, ..settings(nodes(1)) };
        let case = Case::new(bounded(Some(1)));
        let member = case.member(&label(1));
        let settings = case.nodes.settings();
        let held = member.enter(&settings).await.unwrap().unwrap();
        let waits = {
            let (member, settings) = (member.clone(), settings.clone());
            tokio::spawn(async move { member.enter(&settings).await })
        };
        tokio::task::yield_now().await;
        case.nodes.reload(bounded(Some(2)));
        let second = waits.await.unwrap().unwrap().unwrap();
        case.nodes.reload(bounded(None));
        assert!(member.enter(&case.nodes.settings()).await.unwrap().is_none());
        drop((held, second));
    }

    #[test]
    fn unix_sockets_are_nodes_like_others() {
        let unix = |path: &str| node_at(&format!("unix:{path}"), Place::Unix(path.into()));
        let case = Case::new(settings(vec![unix("/run/a.sock"), unix("/run/b.sock"), node(address(1))]));
        let homes = case.homes(0.0);
        for label in case.labels() {
            assert!(homes.iter().filter(|home| **home == label).count() > 50, "{label}");
        }
    }
}
