//! Whether the gateway goes on as it began: for minutes, at half of what it can, requests of all endpoints come over kept
//! connections of HTTP/1.1 and HTTP/2 and over new ones, while it is reloaded with another configuration every ten seconds,
//! and one of its two nodes is restarted every twenty. Every request has to be answered with 200, and memory has to stay what
//! it was.

use std::cell::{Cell, RefCell};
use std::fmt::{self, Display};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Method;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval_at};

use crate::Error;
use crate::backend::{FALL, HEALTH, Leaves, Node};
use crate::configuration::{Configuration, limit, node};
use crate::load::{Generator, Head, Plan, Sender};
use crate::requests::{KIB, MIB, RECIPIENT, SENDER, Way, body};
use crate::results::median;
use crate::servers::{self, Place, Server};
use crate::support::encode::{self, SenderId};
use crate::{process, report};

/// The place of this in docs/performance.md.
const PLACE: &str = "soak";

/// How requests come: each way has the same share of what the gateway can.
const WAYS: [Way; 3] = [Way::Http1, Way::Http2, Way::New];

/// The part of what the gateway answers when it has no rest that it is given.
const PART: f64 = 0.5;

/// How long each way is measured for that.
const CALIBRATION: Duration = Duration::from_secs(3);

/// Between two reloads, two restarts of nodes, two looks at memory, and two lines of progress.
const RELOAD_EVERY: Duration = Duration::from_secs(10);
const RESTART_EVERY: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_secs(1);
const TELL_EVERY: usize = 10;

/// How long a node is gone.
const GONE: Duration = Duration::from_secs(1);

/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// How long a reload may take that was asked for at the end.
const RELOADED_WITHIN: Duration = Duration::from_secs(5);

/// What memory may be more than it was: a part of that, and octets.
const GROWTH: f64 = 1.05;
const SPARE: f64 = 4.0 * MIB as f64;

/// Looks at memory that there have to be.
const LEAST: usize = 20;

/// Groups, and members and clients, that requests are of.
const GROUPS: usize = 64;

/// Failures that are told.
const TOLD: usize = 10;

/// How long is soaked.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// How long it takes, beside some seconds before it
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
}

/// A request, over and over.
struct Ask {
    head: Arc<Head>,
    body: Bytes,
}

/// What is sent, to whom, and what has come of it.
struct Load {
    generator: Arc<Generator>,
    server: Server,
    asks: Vec<Ask>,
    tally: Tally,
}

/// What has come of requests.
#[derive(Default)]
struct Tally {
    answered: AtomicU64,
    failed: AtomicU64,
    /// Microseconds after it was due that an answer came at most, since this was last told.
    latest: AtomicU64,
    /// The first that failed, and why.
    failures: Mutex<Vec<String>>,
}

impl Tally {
    fn fail(&self, way: Way, error: &dyn Display) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut failures = self.failures.lock();
        if failures.len() < TOLD {
            let failure = format!("{way}: {error}");
            eprintln!("soak: {failure}");
            failures.push(failure);
        }
    }
}

/// What is looked at when all is over.
struct Outcome {
    minutes: f64,
    /// Requests a second, of each way.
    rates: [f64; 3],
    answered: u64,
    failed: u64,
    reloads: u32,
    /// What the gateway says of the configurations that it has had, less the first.
    reloaded: f64,
    restarts: u32,
    /// Octets, once a second.
    memory: Vec<f64>,
}

/// Soaks a gateway, says how it went, and writes that into the document.
pub async fn run(common: &crate::Arguments, arguments: &Arguments) -> Result<(), Error> {
    let document = common.docs.join("performance.md");
    if !common.quick {
        report::split(&document, PLACE)?;
    }
    let seconds = arguments.minutes * 60.0;
    if seconds < LEAST as f64 {
        return Err(format!("--minutes {}: {LEAST} s are the least", arguments.minutes).into());
    }
    let place = Place::make(common.gateway.as_deref()).await?;
    let mut nodes = [
        Node::start(Ipv4Addr::new(127, 0, 3, 1), Leaves::Announced).await?,
        Node::start(Ipv4Addr::new(127, 0, 3, 2), Leaves::AtOnce).await?,
    ];
    let configurations = [configuration(&nodes, false), configuration(&nodes, true)];
    let generator = Arc::new(Generator::new(&place.ca_pem)?);
    let server = place.start_gateway("soak", &configurations[0], process::SERVERS, &generator).await?;
    let load = Arc::new(Load { generator, server, asks: asks()?, tally: Tally::default() });
    let mut rates = [0.0; 3];
    for (rate, way) in rates.iter_mut().zip(WAYS) {
        let all = saturated(&load, way).await?;
        *rate = all * PART / WAYS.len() as f64;
        eprintln!("{way}: {all:.0} requests/s alone, of which {rate:.0} are sent");
    }
    load.tally.answered.store(0, Ordering::Relaxed);
    load.tally.latest.store(0, Ordering::Relaxed);

    let (reloads, restarts, looks) = (Cell::new(0), Cell::new(0), RefCell::new(vec![]));
    let [first, second, third] = [0, 1, 2].map(|n| send(&load, WAYS[n], move || Plan::steady(rates[n], seconds)));
    tokio::select! {
        sent = async { tokio::try_join!(first, second, third) } => {
            sent?;
        }
        disturbed = async {
            tokio::try_join!(
                keep_reloading(&place, &load.server, &configurations, &reloads),
                keep_restarting(&mut nodes, &restarts),
                keep_looking(&load, seconds, (&reloads, &restarts), &looks),
            )
        } => {
            disturbed?;
        }
    }

    let outcome = Outcome {
        minutes: arguments.minutes,
        rates,
        answered: load.tally.answered.load(Ordering::Relaxed),
        failed: load.tally.failed.load(Ordering::Relaxed),
        reloads: reloads.get(),
        reloaded: reloaded(&load.server, reloads.get()).await?,
        restarts: restarts.get(),
        memory: looks.into_inner(),
    };
    let line = format!("{outcome} ({}.)", servers::machine("two cores"));
    println!("{line}");
    if !common.quick {
        report::write(&document, PLACE, &line)?;
        eprintln!("written: {}", document.display());
    }
    let wrong = outcome.wrong();
    if wrong.is_empty() {
        return Ok(());
    }
    Err(load.server.failed(&wrong.join("; "), &load.tally.failures.lock().join("\n")))
}

/// Two nodes and some limits that never bite; or the same nodes in another order, and limits with other rates.
fn configuration(nodes: &[Node; 2], other: bool) -> Configuration {
    let [first, second] = nodes;
    let mut nodes = [node(first.addr, "http1"), node(second.addr, "h2c")];
    if other {
        nodes.reverse();
    }
    let health = format!(
        "[delivery_service.health]\ncheck = \"http\"\npath = \"{HEALTH}\"\ninterval = \"500ms\"\ntimeout = \"2s\"\n\
         rise = 1\nfall = {FALL}\n"
    );
    let (in_groups, of_targets): (&[&str], &[&str]) = (
        &["group_operation", "welcome_information", "external_commit_information"],
        &["connection_request", "deliver_message", "connection_key_packages"],
    );
    let rate = if other { "9000000/s" } else { "10000000/s" };
    let limits: [(&[&str], &[&str]); 6] = [
        (&[], &["ip"]),
        (&[], &["ip", "endpoint"]),
        (in_groups, &["group"]),
        (in_groups, &["member"]),
        (in_groups, &["ip", "group", "member"]),
        (of_targets, &["target"]),
    ];
    let limits = limits.iter().enumerate();
    let limits = limits.map(|(n, (endpoints, key))| limit(&format!("limit-{n}"), endpoints, key, rate, 100_000_000));
    // All of it is in use soon: what then still grows is something else.
    Configuration { memory: 8, ..Configuration::of(health + &nodes.concat(), limits.collect()) }
}

/// Requests of all endpoints, half of them messages of 1 KiB.
fn asks() -> Result<Vec<Ask>, Error> {
    let head = |method: Method, path: &str| Ok::<_, Error>(Arc::new(Head::of(&method, path)?));
    let operation = head(Method::POST, "/group_operation")?;
    let welcome = head(Method::GET, "/welcome_information")?;
    let external_commit = head(Method::GET, "/external_commit_information")?;
    let key = head(Method::GET, "/verification_key")?;
    let connection = head(Method::POST, "/connection_request")?;
    let delivery = head(Method::POST, "/deliver_message")?;
    let connection_packages = head(Method::POST, "/connection_key_packages")?;
    let group_packages = head(Method::POST, "/group_key_packages")?;
    let mut asks = vec![];
    for n in 0..GROUPS {
        let (group, user) = (format!("group-{n}"), format!("user-{n}"));
        let of_group = |kind: u8| {
            let id = SenderId::UserKeyHash(user.as_bytes().to_vec());
            let fields = encode::vector(group.as_bytes());
            encode::ds_request(SENDER, RECIPIENT, &id, kind, &fields, &[0x5a; 64])
        };
        // mls10, mls_private_message, the group, its epoch, an application message.
        let to_queue = |octets: usize| {
            let message = encode::concat(&[
                &[0, 1, 0, 2],
                &encode::vector(group.as_bytes()),
                &[0, 0, 0, 0, 0, 0, 0, 1, 1],
                &vec![0x5a; octets],
            ]);
            encode::queueing_request(SENDER, RECIPIENT, user.as_bytes(), &message)
        };
        let clients: Vec<String> = (0..10).map(|client| format!("{user}-client-{client}")).collect();
        let clients: Vec<&[u8]> = clients.iter().map(String::as_bytes).collect();
        let mut ask = |head: &Arc<Head>, body: Vec<u8>| asks.push(Ask { head: head.clone(), body: Bytes::from(body) });
        for others in 0..8 {
            ask(&operation, body(KIB, n)?);
            match others {
                0 => ask(&operation, body(64 * KIB, n)?),
                1 => ask(&welcome, of_group(encode::WELCOME_INFO)),
                2 => ask(&external_commit, of_group(encode::EXTERNAL_COMMIT_INFO)),
                3 => ask(&key, encode::verification_key_request(SENDER, RECIPIENT)),
                4 => ask(&connection, to_queue(2 * KIB)),
                5 => ask(&delivery, to_queue(16 * KIB)),
                6 => {
                    let request = encode::connection_key_package_request(SENDER, RECIPIENT, user.as_bytes());
                    ask(&connection_packages, request);
                }
                _ => {
                    let group = group.as_bytes();
                    ask(&group_packages, encode::group_key_package_request(SENDER, RECIPIENT, group, &clients));
                }
            }
        }
    }
    Ok(asks)
}

/// Requests a second that are answered if they come this way alone, as many as can.
async fn saturated(load: &Arc<Load>, way: Way) -> Result<f64, Error> {
    let before = load.tally.answered.load(Ordering::Relaxed);
    send(load, way, || Plan::Saturate(Instant::now() + CALIBRATION)).await?;
    if load.tally.failed.load(Ordering::Relaxed) > 0 {
        return Err(load.server.failed(&way, &load.tally.failures.lock().join("\n")));
    }
    let answered = load.tally.answered.load(Ordering::Relaxed) - before;
    Ok(answered as f64 / CALIBRATION.as_secs_f64())
}

/// Has what is planned sent in one way. The plan is made once its connections are there.
async fn send(load: &Arc<Load>, way: Way, plan: impl FnOnce() -> Plan) -> Result<(), Error> {
    let kept = load.generator.connections(load.server.addr, way).await?;
    let (plan, workers, mut tasks) = (Arc::new(plan()), kept.len(), JoinSet::new());
    for (worker, kept) in kept.into_iter().enumerate() {
        // Each begins with another request.
        tasks.spawn(work(load.clone(), way, kept, plan.clone(), worker * 17));
    }
    plan.pace(workers).await?;
    while let Some(done) = tasks.join_next().await {
        done?;
    }
    Ok(())
}

/// A worker: one request after the other, until there is no further.
async fn work(load: Arc<Load>, way: Way, mut kept: Option<Sender>, plan: Arc<Plan>, mut turn: usize) {
    let to = load.server.addr;
    while let Some(due) = plan.next().await {
        let Ask { head, body } = &load.asks[turn % load.asks.len()];
        turn += 1;
        let sent = load.generator.send(to, &mut kept, head, body.clone());
        let sent = tokio::time::timeout(ANSWER_WITHIN, sent).await;
        match sent.unwrap_or_else(|_| Err(format!("no answer in {ANSWER_WITHIN:?}").into())) {
            Ok(()) => {
                load.tally.answered.fetch_add(1, Ordering::Relaxed);
                load.tally.latest.fetch_max(due.elapsed().as_micros() as u64, Ordering::Relaxed);
            }
            Err(error) => {
                load.tally.fail(way, &error);
                // What has failed is not sent on any more. Without another, each request has a connection of its own.
                kept = load.generator.open(to, way).await.ok().flatten();
            }
        }
    }
}

/// Has the gateway read the other configuration, again and again.
async fn keep_reloading(
    place: &Place,
    server: &Server,
    configurations: &[Configuration; 2],
    reloads: &Cell<u32>,
) -> Result<(), Error> {
    let mut ticks = interval_at(tokio::time::Instant::now() + RELOAD_EVERY, RELOAD_EVERY);
    for configuration in configurations.iter().cycle().skip(1) {
        ticks.tick().await;
        place.reload(server, configuration).await?;
        reloads.set(reloads.get() + 1);
    }
    Ok(())
}

/// Has one node after the other restarted.
async fn keep_restarting(nodes: &mut [Node; 2], restarts: &Cell<u32>) -> Result<(), Error> {
    let mut ticks = interval_at(tokio::time::Instant::now() + RESTART_EVERY, RESTART_EVERY);
    loop {
        for node in nodes.iter_mut() {
            ticks.tick().await;
            node.restart(GONE).await?;
            restarts.set(restarts.get() + 1);
        }
    }
}

/// Looks at the gateway's memory, and tells how it goes.
async fn keep_looking(
    load: &Load,
    seconds: f64,
    (reloads, restarts): (&Cell<u32>, &Cell<u32>),
    looks: &RefCell<Vec<f64>>,
) -> Result<(), Error> {
    let mut ticks = interval_at(tokio::time::Instant::now() + LOOK_EVERY, LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let tally = &load.tally;
    for look in 1.. {
        ticks.tick().await;
        let memory = load.server.memory("VmRSS")? as f64;
        looks.borrow_mut().push(memory);
        if look % TELL_EVERY == 0 {
            eprintln!(
                "{look} of {seconds:.0} s: {} answered, {} failed, {:.0} ms late at most, {:.1} MiB; {} reloads, {} restarts",
                tally.answered.load(Ordering::Relaxed),
                tally.failed.load(Ordering::Relaxed),
                tally.latest.swap(0, Ordering::Relaxed) as f64 / 1000.0,
                memory / MIB as f64,
                reloads.get(),
                restarts.get(),
            );
        }
    }
    Ok(())
}

/// How many configurations have come into use since the first, once they are as many as were asked for, or a while has passed.
async fn reloaded(server: &Server, reloads: u32) -> Result<f64, Error> {
    let until = Instant::now() + RELOADED_WITHIN;
    loop {
        let reloaded = server.metric("moh_gateway_config_generation").await? - 1.0;
        if reloaded >= f64::from(reloads) || Instant::now() > until {
            return Ok(reloaded);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

impl Outcome {
    /// The median of a fifth of the time; the first is 0.
    fn fifth(&self, n: usize) -> f64 {
        let at = |n: usize| self.memory.len() * n / 5;
        self.memory.get(at(n)..at(n + 1)).filter(|fifth| !fifth.is_empty()).map_or(f64::NAN, median)
    }

    /// What should not be.
    fn wrong(&self) -> Vec<String> {
        let (before, after) = (self.fifth(1), self.fifth(4));
        let said = [
            (self.failed > 0, format!("{} of {} requests failed", self.failed, self.answered + self.failed)),
            (self.answered == 0, "nothing was answered".to_owned()),
            (
                self.reloaded < f64::from(self.reloads),
                format!("{} of {} reloads came into use", self.reloaded, self.reloads),
            ),
            (self.memory.len() < LEAST, format!("memory was looked at {} times", self.memory.len())),
            (after > before * GROWTH + SPARE, "memory has grown".to_owned()),
        ];
        said.into_iter().filter_map(|(is_so, wrong)| is_so.then_some(wrong)).collect()
    }
}

impl Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wrong = self.wrong();
        let [http1, http2, new] = self.rates;
        write!(
            f,
            "{} min at {:.0} requests a second ({http1:.0} over HTTP/1.1, {http2:.0} over HTTP/2, {new:.0} over new \
             connections), {} reloads, {} restarts of nodes: {} requests answered with 200, {} failed; memory {:.1} MiB in \
             the second fifth, {:.1} in the last: {}.",
            self.minutes,
            self.rates.iter().sum::<f64>(),
            self.reloads,
            self.restarts,
            self.answered,
            self.failed,
            self.fifth(1) / MIB as f64,
            self.fifth(4) / MIB as f64,
            if wrong.is_empty() { "passed".to_owned() } else { format!("**failed** ({})", wrong.join("; ")) }
        )
    }
}
