//! Nodes of a Delivery Service that die, freeze, come back, fall ill and are full, while requests keep coming; and nodes at a
//! Unix socket, behind TLS, and by name.

use crate::harness::{Gateway, Setup, message_in, send_message};
use crate::support::client::Client;
use crate::support::ds::Ds;
use crate::support::ds_process::{self, DsProcess};
use crate::support::pki::{Ca, Identity};
use bytes::Bytes;
use http::{Method, Request, Response, Version};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// How long anything may take that is to happen soon.
const PATIENCE: Duration = Duration::from_secs(5);

/// No test: what a [`DsProcess`] runs.
#[test]
#[ignore = "a process of its own, started by other tests"]
fn ds_process() {
    ds_process::run();
}

/// Configuration of nodes; a test says what it needs beyond `node(...)`s.
fn setup_of(delivery: &'static str, more: &str) -> Setup {
    Setup { delivery, ..Setup::of_nodes(&[]) }.with(more)
}

fn node(address: impl std::fmt::Display, protocol: &str, more: &str) -> String {
    format!("[[delivery_service.node]]\naddress = \"{address}\"\nprotocol = \"{protocol}\"\n{more}\n")
}

fn healthy(node: SocketAddr) -> String {
    format!("moh_gateway_node_healthy{{node=\"{node}\"}}")
}

async fn ejections(gateway: &Gateway, node: SocketAddr) -> f64 {
    gateway.metric(&format!("moh_gateway_node_ejections_total{{node=\"{node}\"}}")).await
}

async fn status(client: &Client, group: &str) -> u16 {
    let body = message_in(group.as_bytes(), 1);
    client.send(Method::POST, "/group_operation", body).await.unwrap().status.as_u16()
}

/// Waits until something is so.
async fn becomes(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

// === Under load ===

/// So many groups there are.
const GROUPS: usize = 48;

/// A group's requests are told apart by their leaf.
fn body_of(id: usize) -> Vec<u8> {
    message_in(format!("group {}", id % GROUPS).as_bytes(), id as u32)
}

/// A request that was made, and its answer.
#[derive(Debug)]
struct Made {
    id: usize,
    begun: Instant,
    ended: Instant,
    /// Its status, and whether it is a problem document that says so too.
    answer: Result<(u16, bool), String>,
}

impl Made {
    fn group(&self) -> usize {
        self.id % GROUPS
    }

    fn is_good(&self) -> bool {
        matches!(self.answer, Ok((200, _)))
    }
}

async fn make(client: &Client, id: usize) -> Made {
    let begun = Instant::now();
    let name = id.to_string();
    let answer =
        client.send_with(Method::POST, "/group_operation", &[(ds_process::REQUEST, name.as_str())], body_of(id)).await;
    let answer = answer.map_err(|error| error.to_string()).map(|answer| {
        let is_problem = answer.header("content-type") == Some("application/problem+json")
            && answer.json()["status"] == answer.status.as_u16();
        (answer.status.as_u16(), is_problem)
    });
    Made { id, begun, ended: Instant::now(), answer }
}

/// Requests of all groups by clients of both versions, one after the other each, until [`Load::end`].
struct Load {
    made: Arc<Mutex<Vec<Made>>>,
    over: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

impl Load {
    const TASKS: usize = 8;

    fn start(gateway: &Gateway) -> Load {
        let mut load = Load { made: Arc::default(), over: Arc::default(), tasks: JoinSet::new() };
        // Those before told where the groups are.
        let next = Arc::new(AtomicUsize::new(GROUPS));
        let clients = [Arc::new(gateway.peer().http1()), Arc::new(gateway.peer().http2())];
        for client in clients.iter().cycle().take(Load::TASKS) {
            let (client, next) = (client.clone(), next.clone());
            let (made, over) = (load.made.clone(), load.over.clone());
            load.tasks.spawn(async move {
                while !over.load(SeqCst) {
                    let one = make(&client, next.fetch_add(1, SeqCst)).await;
                    made.lock().unwrap().push(one);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            });
        }
        load
    }

    /// Waits until so many more requests have been answered.
    async fn goes_on(&self, more: usize) {
        let count = || self.made.lock().unwrap().len();
        let enough = count() + more;
        becomes("requests are answered", || count() >= enough).await;
    }

    /// Lets the last ones end.
    async fn end(mut self) -> Vec<Made> {
        self.over.store(true, SeqCst);
        while let Some(task) = self.tasks.join_next().await {
            task.unwrap();
        }
        std::mem::take(&mut *self.made.lock().unwrap())
    }
}

/// Three nodes, a gateway in front of them, and where each group is at home.
struct Three {
    nodes: [DsProcess; 3],
    gateway: Gateway,
    homes: Vec<usize>,
}

impl Three {
    async fn start(protocol: &str, delivery: &'static str, more: &str) -> Three {
        let nodes = [DsProcess::start().await, DsProcess::start().await, DsProcess::start().await];
        let tables: String = nodes.iter().map(|process| node(process.addr(), protocol, "")).collect();
        let gateway = Gateway::start(setup_of(delivery, &(more.to_owned() + "\n" + &tables))).await;
        let client = gateway.peer();
        for id in 0..GROUPS {
            assert!(make(&client, id).await.is_good());
        }
        let found = found(&nodes);
        let homes: Vec<usize> = (0..GROUPS).map(|id| found[&id][0]).collect();
        assert!((0..3).all(|node| homes.contains(&node)), "spread over all: {homes:?}");
        Three { nodes, gateway, homes }
    }

    fn groups_of(&self, node: usize) -> Vec<usize> {
        (0..GROUPS).filter(|group| self.homes[*group] == node).collect()
    }

    /// Waits until a node has got requests of all its groups, beyond those it had.
    async fn has_its_groups(&self, node: usize, before: usize) {
        let groups = self.groups_of(node);
        becomes("its groups return", || {
            let lines = &self.nodes[node].lines()[before..];
            let ids: Vec<usize> = lines.iter().map(|line| line.id.parse::<usize>().unwrap() % GROUPS).collect();
            groups.iter().all(|group| ids.contains(group))
        })
        .await;
    }

    /// Holds every request against what the nodes wrote, and returns those that failed: of groups of `spoiled` only.
    fn judge<'a>(&self, made: &'a [Made], spoiled: usize) -> Vec<&'a Made> {
        let found = found(&self.nodes);
        let mut failed = vec![];
        for one in made {
            let processed = found.get(&one.id).map_or(&[][..], Vec::as_slice);
            assert!(processed.len() <= 1, "{one:?} was processed by {processed:?}");
            match one.answer {
                Ok((200, _)) => assert_eq!(processed.len(), 1, "{one:?} was processed by nobody"),
                Ok((502..=504, true)) => {
                    assert_eq!(self.homes[one.group()], spoiled, "{one:?}: its node was well");
                    failed.push(one);
                }
                _ => panic!("no answer of a gateway: {one:?}"),
            }
        }
        let known = made.len() + GROUPS;
        assert!(found.keys().all(|id| *id < known), "nobody made them: {:?}", found.keys().max());
        failed
    }

    /// Requests of `groups` that were begun in that time and were good: where they were processed.
    fn processed<'a>(
        &self,
        made: &'a [Made],
        from: Instant,
        to: Instant,
        groups: impl Fn(usize) -> bool + 'a,
    ) -> impl Iterator<Item = (usize, usize)> + 'a {
        let found = found(&self.nodes);
        made.iter()
            .filter(move |one| one.begun >= from && one.begun < to && one.is_good() && groups(one.group()))
            .map(move |one| (one.group(), found[&one.id][0]))
    }
}

/// Where requests were processed, as often as they were; each with the body it was made with.
fn found(nodes: &[DsProcess]) -> HashMap<usize, Vec<usize>> {
    let mut found: HashMap<usize, Vec<usize>> = HashMap::new();
    for (node, process) in nodes.iter().enumerate() {
        for line in process.lines() {
            let id: usize = line.id.parse().unwrap();
            assert!(line.body == body_of(id), "request {id} has another's body");
            found.entry(id).or_default().push(node);
        }
    }
    found
}

/// Without checks: it is the requests that find out.
const PASSIVE: &str = "connect_timeout = \"500ms\"\nread_timeout = \"2s\"\neject_for = \"100ms\"\neject_max = \"400ms\"\n\
                       slow_start = \"300ms\"";
const SLOW_START: Duration = Duration::from_millis(300);

async fn a_node_is_killed_and_comes_back(protocol: &str) {
    let mut three = Three::start(protocol, PASSIVE, "").await;
    let start = Instant::now();
    let load = Load::start(&three.gateway);
    load.goes_on(200).await;
    let began = Instant::now();
    three.nodes[0].kill();
    let dead = Instant::now();
    tokio::time::sleep(Duration::from_secs(1)).await;
    load.goes_on(200).await;
    let before = three.nodes[0].lines().len();
    let back = Instant::now();
    three.nodes[0].start_again().await;
    three.has_its_groups(0, before).await;
    tokio::time::sleep(SLOW_START).await;
    let settled = Instant::now();
    load.goes_on(300).await;
    let made = load.end().await;

    let failed = three.judge(&made, 0);
    let late: Vec<_> = failed.iter().filter(|one| one.begun > dead + Duration::from_secs(1)).collect();
    assert!(late.is_empty(), "{:?} after it died, and later: {late:?}", late[0].begun - dead);
    assert!(failed.iter().all(|one| one.ended >= began), "none before: {failed:?}");
    // Others took over its groups, and only these moved.
    let away: Vec<_> = three.processed(&made, dead, back, |group| three.homes[group] == 0).collect();
    assert!(!away.is_empty() && away.iter().all(|(_, node)| *node != 0), "{away:?}");
    let now = Instant::now();
    for (group, node) in three.processed(&made, start, now, |group| three.homes[group] != 0) {
        assert_eq!(node, three.homes[group], "group {group}");
    }
    let home: Vec<_> = three.processed(&made, settled, now, |group| three.homes[group] == 0).collect();
    assert!(!home.is_empty() && home.iter().all(|(_, node)| *node == 0), "they stay: {home:?}");
}

#[tokio::test]
async fn a_node_is_killed_and_comes_back_over_http1() {
    a_node_is_killed_and_comes_back("http1").await;
}

#[tokio::test]
async fn a_node_is_killed_and_comes_back_over_h2c() {
    a_node_is_killed_and_comes_back("h2c").await;
}

const CHECKED: &str = "connect_timeout = \"500ms\"\nread_timeout = \"1s\"\neject_for = \"100ms\"\neject_max = \"400ms\"\n\
                       slow_start = \"300ms\"";
const HTTP_CHECK: &str = "[delivery_service.health]\ncheck = \"http\"\npath = \"/healthz\"\ninterval = \"100ms\"\n\
                          timeout = \"300ms\"\nrise = 2\nfall = 2";

async fn a_node_freezes_and_goes_on(protocol: &str) {
    let three = Three::start(protocol, CHECKED, HTTP_CHECK).await;
    let frozen = &three.nodes[1];
    let health = healthy(frozen.addr());
    three.gateway.until_metric(&health, |n| n == 1.0).await;
    let load = Load::start(&three.gateway);
    load.goes_on(200).await;
    let began = Instant::now();
    frozen.freeze();
    three.gateway.until_metric(&health, |n| n == 0.0).await;
    let out = Instant::now();
    load.goes_on(200).await;
    // All that wait for it have had their answer.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = frozen.lines().len();
    let thawed = Instant::now();
    frozen.thaw();
    three.gateway.until_metric(&health, |n| n == 1.0).await;
    three.has_its_groups(1, before).await;
    tokio::time::sleep(SLOW_START).await;
    let settled = Instant::now();
    load.goes_on(300).await;
    let made = load.end().await;

    assert!(out - began < Duration::from_secs(3), "{:?} until it is seen", out - began);
    let failed = three.judge(&made, 1);
    let late: Vec<_> = failed.iter().filter(|one| one.begun > out).collect();
    assert!(late.is_empty(), "it was known not to answer: {late:?}");
    assert!(failed.iter().all(|one| one.ended >= began), "none before: {failed:?}");
    let away: Vec<_> = three.processed(&made, out, thawed, |group| three.homes[group] == 1).collect();
    assert!(!away.is_empty() && away.iter().all(|(_, node)| *node != 1), "{away:?}");
    let home: Vec<_> = three.processed(&made, settled, Instant::now(), |group| three.homes[group] == 1).collect();
    assert!(!home.is_empty() && home.iter().all(|(_, node)| *node == 1), "they stay: {home:?}");
}

#[tokio::test]
async fn a_node_freezes_and_goes_on_over_http1() {
    a_node_freezes_and_goes_on("http1").await;
}

#[tokio::test]
async fn a_node_freezes_and_goes_on_over_h2c() {
    a_node_freezes_and_goes_on("h2c").await;
}

async fn a_node_is_restarted_by_its_operator(protocol: &str) {
    let mut three = Three::start(protocol, PASSIVE, "").await;
    let load = Load::start(&three.gateway);
    load.goes_on(200).await;
    let began = Instant::now();
    three.nodes[2].terminate().await;
    let ended = Instant::now();
    load.goes_on(100).await;
    let before = three.nodes[2].lines().len();
    let back = Instant::now();
    three.nodes[2].start_again().await;
    three.has_its_groups(2, before).await;
    tokio::time::sleep(SLOW_START).await;
    let settled = Instant::now();
    load.goes_on(200).await;
    let made = load.end().await;

    // A request may meet a connection that is just being closed; each client has one under way at most.
    let failed = three.judge(&made, 2);
    assert!(failed.len() <= Load::TASKS, "{failed:?}");
    let late: Vec<_> = failed.iter().filter(|one| one.begun > ended + Duration::from_millis(200)).collect();
    assert!(late.is_empty(), "{late:?}");
    assert!(failed.iter().all(|one| one.ended >= began), "none before: {failed:?}");
    let away: Vec<_> = three.processed(&made, ended, back, |group| three.homes[group] == 2).collect();
    assert!(!away.is_empty() && away.iter().all(|(_, node)| *node != 2), "{away:?}");
    let home: Vec<_> = three.processed(&made, settled, Instant::now(), |group| three.homes[group] == 2).collect();
    assert!(!home.is_empty() && home.iter().all(|(_, node)| *node == 2), "{home:?}");
}

#[tokio::test]
async fn a_node_is_restarted_by_its_operator_over_http1() {
    a_node_is_restarted_by_its_operator("http1").await;
}

#[tokio::test]
async fn a_node_is_restarted_by_its_operator_over_h2c() {
    a_node_is_restarted_by_its_operator("h2c").await;
}

// === Who is asked ===

/// A node that takes connections and closes each of them once it has read something.
async fn closing_node() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 64]).await;
            });
        }
    });
    address
}

/// A group whose home is this node, of those that answer.
async fn group_of(gateway: &Gateway, ds: &Ds) -> String {
    let client = gateway.peer();
    for n in 0..100 {
        let (group, before) = (format!("any {n}"), ds.complete());
        assert_eq!(status(&client, &group).await, 200);
        if ds.complete() > before {
            return group;
        }
    }
    panic!("{ds:?} has no group");
}

#[tokio::test]
async fn who_answers_nobody_is_left_out() {
    for h2c in [false, true] {
        let nodes = [Ds::start().await, Ds::start().await];
        let delivery = "read_timeout = \"300ms\"\neject_for = \"30s\"\neject_after = 3";
        let setup = Setup { delivery, ..Setup::of_nodes(&nodes.each_ref().map(|ds| ds.addr)) };
        let gateway = Gateway::start(if h2c { setup.h2c() } else { setup }).await;
        let group = group_of(&gateway, &nodes[0]).await;
        let client = gateway.peer();
        let mut answers = vec![];
        // Three in a row: an answer in between begins them anew.
        for hangs in [true, true, false, true, true, true, true, true] {
            nodes[0].hang(hangs);
            answers.push(status(&client, &group).await);
        }
        assert_eq!(answers, [504, 504, 200, 504, 504, 504, 200, 200]);
        assert_eq!(ejections(&gateway, nodes[0].addr).await, 1.0);
        assert_eq!(ejections(&gateway, nodes[1].addr).await, 0.0);
        nodes[0].hang(false);
    }
}

#[tokio::test]
async fn who_breaks_off_is_left_out() {
    let (ds, closing) = (Ds::start().await, closing_node().await);
    let delivery = "read_timeout = \"1s\"\neject_for = \"30s\"\neject_after = 4";
    let gateway = Gateway::start(Setup { delivery, ..Setup::of_nodes(&[closing, ds.addr]) }).await;
    let client = gateway.peer();
    let mut failed = 0;
    for n in 0..60 {
        match status(&client, &format!("any {n}")).await {
            200 => {}
            502 => failed += 1,
            other => panic!("{other}"),
        }
    }
    assert_eq!(failed, 4, "and then it has no group any more");
    assert_eq!(ds.complete(), 56);
    assert_eq!(ejections(&gateway, closing).await, 1.0);
}

#[tokio::test]
async fn who_goes_on_refusing_is_asked_less_and_less() {
    let (gone, ds) = (Ds::start().await, Ds::start().await);
    let delivery = "connect_timeout = \"1s\"\neject_for = \"200ms\"\neject_max = \"60s\"";
    let gateway = Gateway::start(Setup { delivery, ..Setup::of_nodes(&[gone.addr, ds.addr]) }).await;
    let group = group_of(&gateway, &gone).await;
    gone.stop().await;
    let client = gateway.peer();
    let (began, before) = (Instant::now(), ejections(&gateway, gone.addr).await);
    // Asked at 0, 0.2, 0.6 and 1.4 s: after 200 ms each time it would be eight times.
    while began.elapsed() < Duration::from_millis(1_600) {
        assert_eq!(status(&client, &group).await, 200, "the other node has it");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let asked = ejections(&gateway, gone.addr).await - before;
    assert!((2.0..=5.0).contains(&asked), "{asked} times");
}

#[tokio::test]
async fn a_check_finds_who_is_ill() {
    for protocol in ["http1", "h2c"] {
        let nodes = [DsProcess::start().await, DsProcess::start().await];
        let tables: String = nodes.iter().map(|process| node(process.addr(), protocol, "")).collect();
        let setup = setup_of("read_timeout = \"1s\"", &(HTTP_CHECK.to_owned() + "\n" + &tables));
        let gateway = Gateway::start(setup).await;
        for process in &nodes {
            gateway.until_metric(&healthy(process.addr()), |n| n == 1.0).await;
        }
        let client = gateway.peer();
        let mut id = 0;
        let mut each_group = async |expected: u16| {
            for _ in 0..GROUPS {
                assert_eq!(make(&client, id).await.answer.unwrap().0, expected);
                id += 1;
            }
        };
        each_group(200).await;
        assert!(nodes.iter().all(|process| !process.lines().is_empty()), "both have groups");
        assert_eq!(found(&nodes).len(), GROUPS, "checks are no requests");
        // Answers 500 where its health is asked for, and everything else as before.
        nodes[0].sick(true);
        gateway.until_metric(&healthy(nodes[0].addr()), |n| n == 0.0).await;
        let before = nodes[0].lines().len();
        each_group(200).await;
        assert_eq!(nodes[0].lines().len(), before, "it is left out");
        assert_eq!(gateway.metric(&healthy(nodes[1].addr())).await, 1.0);
        // Nobody is well: that is said at once.
        nodes[1].sick(true);
        gateway.until_metric(&healthy(nodes[1].addr()), |n| n == 0.0).await;
        let refused = client.send(Method::POST, "/group_operation", send_message()).await.unwrap();
        assert_eq!(refused.status, 503);
        assert!(refused.header("retry-after").unwrap().parse::<u32>().unwrap() >= 1);
        assert_eq!(gateway.operator("/readyz").await.unwrap().status, 503);
        for process in &nodes {
            process.sick(false);
            gateway.until_metric(&healthy(process.addr()), |n| n == 1.0).await;
        }
        each_group(200).await;
        assert!(nodes[0].lines().len() > before, "its groups are back");
    }
}

#[tokio::test]
async fn a_check_finds_who_is_frozen() {
    let nodes = [DsProcess::start().await, DsProcess::start().await];
    let tables: String = nodes.iter().map(|process| node(process.addr(), "http1", "")).collect();
    let setup = setup_of("read_timeout = \"1s\"", &(HTTP_CHECK.to_owned() + "\n" + &tables));
    let gateway = Gateway::start(setup).await;
    gateway.until_metric(&healthy(nodes[0].addr()), |n| n == 1.0).await;
    nodes[0].freeze();
    gateway.until_metric(&healthy(nodes[0].addr()), |n| n == 0.0).await;
    let client = gateway.peer();
    for id in 0..GROUPS {
        assert!(make(&client, id).await.is_good(), "nobody waits for it: nobody was there to find out");
    }
    assert_eq!(nodes[1].lines().len(), GROUPS);
    nodes[0].thaw();
    gateway.until_metric(&healthy(nodes[0].addr()), |n| n == 1.0).await;
    for id in GROUPS..2 * GROUPS {
        assert!(make(&client, id).await.is_good());
    }
    assert!(!nodes[0].lines().is_empty(), "its groups are back");
}

#[tokio::test]
async fn a_check_by_a_connection() {
    let (gone, ds) = (Ds::start().await, Ds::start().await);
    let check =
        "[delivery_service.health]\ncheck = \"tcp\"\ninterval = \"100ms\"\ntimeout = \"300ms\"\nrise = 2\nfall = 2";
    let gateway = Gateway::start(Setup::of_nodes(&[gone.addr, ds.addr]).with(check)).await;
    for node in [&gone, &ds] {
        gateway.until_metric(&healthy(node.addr), |n| n == 1.0).await;
    }
    gone.stop().await;
    gateway.until_metric(&healthy(gone.addr), |n| n == 0.0).await;
    let before = ejections(&gateway, gone.addr).await;
    let client = gateway.peer();
    for n in 0..20 {
        assert_eq!(status(&client, &format!("any {n}")).await, 200);
    }
    assert_eq!(ds.complete(), 20);
    assert_eq!(ejections(&gateway, gone.addr).await, before, "no request had to find out");
    let back = Ds::start_at(gone.addr, gone.delivery.clone()).await;
    gateway.until_metric(&healthy(back.addr), |n| n == 1.0).await;
    let connections = back.connections();
    assert!(back.until(|ds| ds.connections() > connections + 1).await, "it is looked at again and again");
    assert_eq!((back.begun(), ds.begun()), (0, 20), "a check by a connection is no request");
    group_of(&gateway, &back).await;
}

#[tokio::test]
async fn weights_in_turn() {
    let nodes = [Ds::start().await, Ds::start().await];
    let tables = node(nodes[0].addr, "http1", "weight = 3") + &node(nodes[1].addr, "http1", "weight = 1");
    let gateway = Gateway::start(setup_of("balance = \"round-robin\"", &tables)).await;
    let client = gateway.peer();
    for n in 1..=10 {
        for _ in 0..4 {
            assert_eq!(status(&client, "one group").await, 200);
        }
        assert_eq!(nodes.each_ref().map(Ds::complete), [3 * n, n], "of any four, three");
    }
}

// === Full nodes ===

#[tokio::test]
async fn one_at_a_node_one_that_waits_and_no_third() {
    for h2c in [false, true] {
        let ds = Ds::start().await;
        ds.hang(true);
        let delivery = "read_timeout = \"30s\"\nmax_requests = 1\nqueue = 1\nqueue_timeout = \"30s\"";
        let setup = Setup { delivery, ..Setup::of(&ds) };
        let gateway = Gateway::start(if h2c { setup.h2c() } else { setup }).await;
        let send = |version_1: bool| {
            let client = if version_1 { gateway.peer().http1() } else { gateway.peer() };
            async move { client.send(Method::POST, "/group_operation", send_message()).await.unwrap() }
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(send(true));
        assert!(ds.until(|ds| ds.complete() == 1).await);
        // Whichever is later finds no place.
        tasks.spawn(send(false));
        tasks.spawn(send(true));
        let refused = tokio::time::timeout(PATIENCE, tasks.join_next()).await.expect("no wait").unwrap().unwrap();
        assert_eq!(refused.status, 503);
        assert_eq!(refused.header("content-type"), Some("application/problem+json"));
        assert!(refused.header("retry-after").unwrap().parse::<u32>().unwrap() >= 1);
        // Nor does a fourth, and the second has not gone anywhere.
        assert_eq!(send(false).await.status, 503);
        assert_eq!((ds.begun(), tasks.len()), (1, 2));
        ds.hang(false);
        for answer in tasks.join_all().await {
            assert_eq!(answer.status, 200);
        }
        assert_eq!(ds.complete(), 2);
        // There is room again.
        assert_eq!(send(true).await.status, 200);
    }
}

#[tokio::test]
async fn who_waits_does_not_wait_for_ever() {
    let ds = Ds::start().await;
    ds.hang(true);
    let delivery = "read_timeout = \"30s\"\nmax_requests = 1\nqueue = 10\nqueue_timeout = \"300ms\"";
    let gateway = Gateway::start(Setup { delivery, ..Setup::of(&ds) }).await;
    let (first, second) = (gateway.peer(), gateway.peer());
    let first = tokio::spawn(async move { first.send(Method::POST, "/group_operation", send_message()).await });
    assert!(ds.until(|ds| ds.complete() == 1).await);
    let began = Instant::now();
    let refused = second.send(Method::POST, "/group_operation", send_message()).await.unwrap();
    assert_eq!(refused.status, 503);
    assert!(refused.header("retry-after").is_some());
    assert!(began.elapsed() >= Duration::from_millis(290), "{:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    // One that gives up leaves its place, when its wait would have ended at the latest.
    let gone = second.send(Method::POST, "/group_operation", send_message());
    assert!(tokio::time::timeout(Duration::from_millis(100), gone).await.is_err());
    gateway.until_metric("moh_gateway_requests_in_flight", |n| n == 1.0).await;
    ds.hang(false);
    assert_eq!(first.await.unwrap().unwrap().status, 200);
    assert_eq!(second.send(Method::POST, "/group_operation", send_message()).await.unwrap().status, 200);
    gateway.until_metric("moh_gateway_requests_in_flight", |n| n == 0.0).await;
    assert_eq!(ds.begun(), 2, "who was refused, or has gone, was not sent");
}

#[tokio::test]
async fn without_a_queue_nobody_waits() {
    let ds = Ds::start().await;
    ds.hang(true);
    let delivery = "read_timeout = \"30s\"\nmax_requests = 1\nqueue = 0\nqueue_timeout = \"30s\"";
    let gateway = Gateway::start(Setup { delivery, ..Setup::of(&ds) }).await;
    let client = gateway.peer();
    let first = tokio::spawn(async move { client.send(Method::POST, "/group_operation", send_message()).await });
    assert!(ds.until(|ds| ds.complete() == 1).await);
    let client = gateway.peer().timeout(PATIENCE);
    for _ in 0..3 {
        assert_eq!(client.send(Method::POST, "/group_operation", send_message()).await.unwrap().status, 503);
    }
    ds.hang(false);
    assert_eq!(first.await.unwrap().unwrap().status, 200);
    assert_eq!(client.send(Method::POST, "/group_operation", send_message()).await.unwrap().status, 200);
}

// === Where nodes are ===

/// What a small node was asked.
#[derive(Debug, Clone)]
struct Seen {
    version: Version,
    host: String,
    body: Bytes,
    /// The name in the handshake.
    sni: Option<String>,
    /// The client's certificate, DER.
    certificate: Option<Vec<u8>>,
}

type AllSeen = Arc<Mutex<Vec<Seen>>>;

/// Serves a connection: every request is noted, and answered with its body.
async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    sni: Option<String>,
    certificate: Option<Vec<u8>>,
    seen: AllSeen,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (sni, certificate, seen) = (sni.clone(), certificate.clone(), seen.clone());
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await?.to_bytes();
            let host = head.headers.get("host").map(|host| host.to_str().unwrap().to_owned());
            let host = host.or_else(|| head.uri.authority().map(ToString::to_string)).unwrap_or_default();
            seen.lock().unwrap().push(Seen { version: head.version, host, body: body.clone(), sni, certificate });
            Ok::<_, hyper::Error>(Response::new(Full::new(body)))
        }
    });
    let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
}

/// A node at a socket in the file system.
fn unix_node(path: &Path) -> AllSeen {
    let (listener, seen) = (UnixListener::bind(path).unwrap(), AllSeen::default());
    let all = seen.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, None, None, all.clone()));
        }
    });
    seen
}

/// A node that speaks TLS, and wants certificates of `clients`, if that is said.
async fn tls_node(identity: &Identity, clients: Option<&Ca>, alpn: &[&str]) -> (SocketAddr, AllSeen) {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap();
    let builder = match clients {
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
            builder.with_client_cert_verifier(verifier)
        }
        None => builder.with_no_client_auth(),
    };
    let chain = CertificateDer::pem_slice_iter(identity.chain_pem.as_bytes()).map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).unwrap();
    let mut config = builder.with_single_cert(chain, key).unwrap();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, seen) = (listener.local_addr().unwrap(), AllSeen::default());
    let all = seen.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, all) = (acceptor.clone(), all.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let session = stream.get_ref().1;
                let sni = session.server_name().map(str::to_owned);
                let certificate = session.peer_certificates().and_then(<[_]>::first).map(|first| first.to_vec());
                serve(stream, sni, certificate, all).await;
            });
        }
    });
    (address, seen)
}

fn der(identity: &Identity) -> Vec<u8> {
    CertificateDer::from_pem_slice(identity.chain_pem.as_bytes()).unwrap().to_vec()
}

/// A whole request over each version, twice.
async fn forwards(gateway: &Gateway, seen: &AllSeen, version: Version) {
    let before = seen.lock().unwrap().len();
    for client in [gateway.peer().http1(), gateway.peer()] {
        for _ in 0..2 {
            let response = client.send(Method::POST, "/group_operation", send_message()).await.unwrap();
            assert_eq!(response.status, 200, "{}", response.text());
            assert_eq!(response.body, send_message());
        }
    }
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), before + 4);
    for one in &seen[before..] {
        assert_eq!((one.version, one.host.as_str()), (version, "ds.b.example"));
        assert_eq!(one.body, send_message());
    }
}

const DELIVERY: &str = "connect_timeout = \"2s\"\nread_timeout = \"2s\"";

#[tokio::test]
async fn a_node_at_a_unix_socket() {
    for (protocol, version) in [("http1", Version::HTTP_11), ("h2c", Version::HTTP_2)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ds.sock");
        let seen = unix_node(&path);
        let table = node(format!("unix:{}", path.display()), protocol, "");
        let gateway = Gateway::start(setup_of(DELIVERY, &table)).await;
        forwards(&gateway, &seen, version).await;
    }
    // Where nobody is, nobody answers; and it is one node among others.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ds.sock");
    let ds = Ds::start().await;
    let table = node(format!("unix:{}", path.display()), "http1", "");
    let gateway = Gateway::start(setup_of(DELIVERY, &(table.clone() + &node(ds.addr, "http1", "")))).await;
    let client = gateway.peer();
    for n in 0..20 {
        assert_eq!(status(&client, &format!("any {n}")).await, 200);
    }
    assert_eq!(ds.complete(), 20);
    let alone = Gateway::start(setup_of(DELIVERY, &table)).await;
    assert_eq!(status(&alone.peer(), "any").await, 502);
}

#[tokio::test]
async fn a_node_behind_tls() {
    let ca = Ca::new("internal");
    let identity = ca.issue(&["ds.internal"]);
    for (protocol, version) in [("http1", Version::HTTP_11), ("h2", Version::HTTP_2)] {
        // As most servers do, it speaks both.
        let (address, seen) = tls_node(&identity, None, &["h2", "http/1.1"]).await;
        let dir = tempfile::tempdir().unwrap();
        ca.write(dir.path(), "ds-ca");
        let tls = "tls = { ca = \"ds-ca.pem\", name = \"ds.internal\" }";
        let gateway = Gateway::start_in(dir, setup_of(DELIVERY, &node(address, protocol, tls))).await;
        forwards(&gateway, &seen, version).await;
        for one in seen.lock().unwrap().iter() {
            assert_eq!(one.sni.as_deref(), Some("ds.internal"));
            assert_eq!(one.certificate, None);
        }
    }
}

#[tokio::test]
async fn a_node_that_wants_to_know_the_gateway() {
    let ca = Ca::new("internal");
    let (identity, own) = (ca.issue(&["ds.internal"]), ca.issue(&["gw.internal"]));
    for (protocol, alpn, version) in [("http1", "http/1.1", Version::HTTP_11), ("h2", "h2", Version::HTTP_2)] {
        let (address, seen) = tls_node(&identity, Some(&ca), &[alpn]).await;
        let dir = tempfile::tempdir().unwrap();
        ca.write(dir.path(), "ds-ca");
        own.write(dir.path(), "gw");
        let tls = "tls = { ca = \"ds-ca.pem\", name = \"ds.internal\", certificate = \"gw.pem\", key = \"gw.key\" }";
        let gateway = Gateway::start_in(dir, setup_of(DELIVERY, &node(address, protocol, tls))).await;
        forwards(&gateway, &seen, version).await;
        for one in seen.lock().unwrap().iter() {
            assert_eq!(one.certificate.as_deref(), Some(&der(&own)[..]));
        }
    }
    // Without one, and with one that the node does not take, it sees no request.
    let (address, seen) = tls_node(&identity, Some(&ca), &["http/1.1"]).await;
    for more in ["", ", certificate = \"gw.pem\", key = \"gw.key\""] {
        let dir = tempfile::tempdir().unwrap();
        ca.write(dir.path(), "ds-ca");
        Ca::new("others").issue(&["gw.internal"]).write(dir.path(), "gw");
        let tls = format!("tls = {{ ca = \"ds-ca.pem\", name = \"ds.internal\"{more} }}");
        let gateway = Gateway::start_in(dir, setup_of(DELIVERY, &node(address, "http1", &tls))).await;
        assert_eq!(status(&gateway.peer(), "any").await, 502, "{tls}");
    }
    assert!(seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn who_is_not_the_node_that_is_meant() {
    let (ca, others) = (Ca::new("internal"), Ca::new("others"));
    let yesterday = |params: &mut rcgen::CertificateParams| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    };
    for (what, identity) in [
        ("another name", ca.issue(&["other.internal"])),
        ("another authority", others.issue(&["ds.internal"])),
        ("a certificate that has expired", ca.issue_with(&["ds.internal"], yesterday)),
    ] {
        for (protocol, alpn) in [("http1", "http/1.1"), ("h2", "h2")] {
            let (address, seen) = tls_node(&identity, None, &[alpn]).await;
            let dir = tempfile::tempdir().unwrap();
            ca.write(dir.path(), "ds-ca");
            let tls = "tls = { ca = \"ds-ca.pem\", name = \"ds.internal\" }";
            let gateway = Gateway::start_in(dir, setup_of(DELIVERY, &node(address, protocol, tls))).await;
            let response = gateway.peer().send(Method::POST, "/group_operation", send_message()).await.unwrap();
            assert_eq!(response.status, 502, "{what}");
            assert_eq!(response.json()["status"], 502);
            assert!(seen.lock().unwrap().is_empty(), "{what}: a request for another");
        }
    }
    // Nor is one that speaks no TLS, which gets nothing in the clear.
    let ds = Ds::start().await;
    let dir = tempfile::tempdir().unwrap();
    ca.write(dir.path(), "ds-ca");
    let tls = "tls = { ca = \"ds-ca.pem\", name = \"ds.internal\" }";
    let gateway = Gateway::start_in(dir, setup_of(DELIVERY, &node(ds.addr, "http1", tls))).await;
    assert_eq!(status(&gateway.peer(), "any").await, 502);
    assert_eq!(ds.begun(), 0);
}

#[tokio::test]
async fn a_node_by_its_name() {
    let ds = Ds::start().await;
    // Where the name has an IPv6 address too, that is a node which refuses.
    let table = node(format!("localhost:{}", ds.addr.port()), "http1", "");
    let gateway = Gateway::start(setup_of(DELIVERY, &table)).await;
    let client = gateway.peer();
    for n in 0..20 {
        assert_eq!(status(&client, &format!("any {n}")).await, 200);
    }
    assert_eq!(ds.complete(), 20);
    // Beside another of the same service.
    let other = Ds::start().await;
    let gateway = Gateway::start(setup_of(DELIVERY, &(table + &node(other.addr, "http1", "")))).await;
    let client = gateway.peer();
    for n in 0..40 {
        assert_eq!(status(&client, &format!("any {n}")).await, 200);
    }
    assert!(ds.complete() > 20 && other.complete() > 0, "{} and {}", ds.complete(), other.complete());
    assert_eq!(ds.complete() + other.complete(), 60);
}
