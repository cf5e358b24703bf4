//! What a request costs the gateway when there is more of something: limits, keys, connections, nodes of the Delivery
//! Service, threads. One of these grows and the rest stays as it is; each series has a gateway for each of its rows, and they
//! take turns on the servers' core, round by round, another first each time.
//!
//! Where there are more than two cores, what is answered by as many threads as cores is measured too: on two, what sends
//! takes as much of the machine as the gateway.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::Error;
use crate::configuration::{Configuration, limit, node};
use crate::load::{Cost, Generator, Sender};
use crate::requests::{Bodies, Groups, KIB, MIB, Way};
use crate::results::{Spread, median};
use crate::servers::{self, Place, Server};
use crate::{memory, process, report};

/// The place of this in docs/performance.md.
const PLACE: &str = "growth";

/// Where requests go.
const ENDPOINT: &[&str] = &["group_operation"];

/// Keys of limits, no two of them alike.
const KEYS: [&[&str]; 15] = [
    &["group"],
    &["ip"],
    &["member"],
    &["endpoint"],
    &["ip", "group"],
    &["ip", "member"],
    &["ip", "endpoint"],
    &["group", "member"],
    &["group", "endpoint"],
    &["member", "endpoint"],
    &["ip", "group", "member"],
    &["ip", "group", "endpoint"],
    &["ip", "member", "endpoint"],
    &["group", "member", "endpoint"],
    &["ip", "group", "member", "endpoint"],
];

/// Limits where these do not grow.
const LIMITS: usize = 10;

/// Groups that are drawn from where nodes grow: each node is to have some.
const GROUPS: u64 = 10_000;

/// Octets of what fills a table with keys: the least that a whole request has.
const SHORT: usize = 256;

/// Octets of the limits' memory for each key: more than the 32 that it takes.
const ROOM: u64 = 40;

/// Decisions that had no room for their key.
const OVERFLOWED: &str = "moh_gateway_limit_overflow_decisions_total";

/// What is measured beside what always is.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// With 10,000,000 keys too, which take some minutes to be there
    #[arg(long)]
    full: bool,
    /// How long one table may take to be filled; what is not in it then is left out, and the row says so
    #[arg(long, value_name = "MINUTES", default_value_t = 20.0)]
    fill: f64,
    /// Cores of this machine that may be used: with more than two, the throughput of several threads is measured
    #[arg(long, default_value_t = 2)]
    cores: usize,
}

/// One thing that grows, and what that does.
struct Series {
    title: &'static str,
    /// What is counted in its rows.
    unit: &'static str,
    rows: Vec<Measured>,
}

/// A row that is to be measured.
struct Row {
    name: String,
    server: Server,
    bodies: Bodies,
    idle: Vec<Option<Sender>>,
    costs: Vec<Cost>,
}

/// A row, of each round.
struct Measured {
    name: String,
    costs: Vec<Cost>,
    /// Octets that the gateway held at the end.
    memory: f64,
}

/// What all series are measured with.
struct Bench {
    place: Place,
    generator: Arc<Generator>,
    rounds: usize,
    seconds: f64,
}

/// Measures all series one after the other, prints them, and writes them into the document.
pub fn run(common: &crate::Arguments, arguments: &Arguments) -> Result<(), Error> {
    let document = common.docs.join("performance.md");
    if !common.quick {
        report::split(&document, PLACE)?;
    }
    let (rounds, seconds) = if common.quick { (2, 0.4) } else { (9, 0.5) };
    let rounds = common.rounds.unwrap_or(rounds).max(1);
    let bench = async || {
        let place = Place::make(common.gateway.as_deref()).await?;
        let generator = Arc::new(Generator::new(&place.ca_pem)?);
        Ok::<_, Error>(Bench { place, generator, rounds, seconds })
    };
    process::pin(std::process::id(), process::OTHERS)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let all = async { bench().await?.all(arguments, common.quick).await };
    let mut measured = crate::run_to_its_end(&runtime, all)?;
    if arguments.cores > 2 {
        let half = (arguments.cores / 2).max(2);
        process::pin(std::process::id(), &range(half, arguments.cores))?;
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(arguments.cores - half).enable_all().build()?;
        let throughput = async { bench().await?.throughput(half).await };
        measured.push(crate::run_to_its_end(&runtime, throughput)?);
    }
    let report = markdown(&measured, rounds, seconds, arguments.cores);
    println!("{report}");
    if !common.quick {
        report::write(&document, PLACE, report.trim_end())?;
        eprintln!("written: {}", document.display());
    }
    Ok(())
}

impl Bench {
    async fn all(&self, arguments: &Arguments, quick: bool) -> Result<Vec<Series>, Error> {
        Ok(vec![
            self.limits().await?,
            self.keys(arguments, quick).await?,
            self.connections().await?,
            self.nodes().await?,
            self.threads(arguments.cores).await?,
        ])
    }

    async fn limits(&self) -> Result<Series, Error> {
        let mut rows = vec![];
        for count in [1, 10, 100, 1000] {
            rows.push(self.row("limits", &thousands(count), &self.configuration(count as usize)).await?);
        }
        self.measure("Limits that cover a request, of different keys", "limits", rows).await
    }

    async fn keys(&self, arguments: &Arguments, quick: bool) -> Result<Series, Error> {
        let counts: &[u64] = match (quick, arguments.full) {
            (true, _) => &[1, 1000, 100_000],
            (false, false) => &[1, 1000, 100_000, 1_000_000],
            (false, true) => &[1, 1000, 100_000, 1_000_000, 10_000_000],
        };
        let mut rows = vec![];
        for &count in counts {
            // Many keys are asked for seldom and have to stay until they are; few must not come to their burst.
            let (rate, burst) = if count > 1000 { ("1/h", 800_000) } else { ("1/m", 40_000_000) };
            let configuration = Configuration {
                memory: (count * ROOM).div_ceil(MIB as u64).max(64),
                ..Configuration::of(self.own_node(), limit("keys", ENDPOINT, &["group"], rate, burst))
            };
            let mut row = self.row("keys", &thousands(count), &configuration).await?;
            let (begin, within) = (Instant::now(), Duration::from_secs_f64(arguments.fill * 60.0));
            eprintln!("keys, {}: to be filled, for {} min at most", row.name, arguments.fill);
            let filled = self.generator.fill(&row.server, Groups::new(count, SHORT)?, within).await;
            let filled = filled.map_err(|error| row.server.failed(&"to fill its table", &error))?;
            let took = begin.elapsed().as_secs_f64();
            eprintln!("keys, {}: {filled} in {took:.0} s", row.name);
            if filled < count {
                row.name = format!("{}, all that came in {} min", thousands(filled), arguments.fill);
            }
            row.bodies = Bodies::Drawn(Arc::new(Groups::new(filled, KIB)?));
            rows.push(row);
        }
        self.measure("Keys of one limit, drawn for each request and all live", "keys", rows).await
    }

    async fn connections(&self) -> Result<Series, Error> {
        let mut descriptors = process::descriptors()?.saturating_sub(crate::SPARE);
        let mut rows = vec![];
        for count in [1, 10, 100, 1000, 10_000] {
            if count > descriptors {
                eprintln!(
                    "peers: descriptors are for {descriptors} idle connections more, and not for {count}: ulimit -n"
                );
            }
            let count = count.min(descriptors);
            descriptors -= count;
            let mut row = self.row("connections", &thousands(count as u64), &self.configuration(LIMITS)).await?;
            let idle = self.generator.idle(row.server.addr, count).await;
            row.idle = idle.map_err(|error| row.server.failed(&"idle connections", &error))?;
            rows.push(row);
        }
        self.measure("Connections that are idle beside the 16 that work", "idle", rows).await
    }

    async fn nodes(&self) -> Result<Series, Error> {
        let addresses = self.place.backend.also(1000).await?;
        let groups = Arc::new(Groups::new(GROUPS, KIB)?);
        let mut rows = vec![];
        for count in [1, 10, 100, 1000] {
            let nodes: String = addresses.iter().take(count).map(|address| node(*address, "http1")).collect();
            let configuration = Configuration { delivery_service: nodes, ..self.configuration(LIMITS) };
            let mut row = self.row("nodes", &thousands(count as u64), &configuration).await?;
            row.bodies = Bodies::Drawn(groups.clone());
            rows.push(row);
        }
        self.measure("Nodes of the Delivery Service, over HTTP/1.1, each asked for groups of its own", "nodes", rows)
            .await
    }

    async fn threads(&self, cores: usize) -> Result<Series, Error> {
        let both = format!("{},{}", process::SERVERS, process::OTHERS);
        let places = [
            (1, process::SERVERS, "1"),
            (2, process::SERVERS, "2, on one core"),
            (2, both.as_str(), "2, on two cores, of which what sends has one too"),
        ];
        let mut rows = vec![];
        for (threads, on, name) in places {
            let configuration = Configuration { threads, ..self.configuration(LIMITS) };
            rows.push(self.row_on(on, "threads", name, &configuration).await?);
        }
        let title = match cores {
            0..=2 => "Threads, and what a request costs (what more of them answer takes a larger machine to be seen)",
            _ => "Threads, and what a request costs",
        };
        self.measure(title, "threads", rows).await
    }

    /// With a core for each thread, up to so many of them; what sends has the cores from there on.
    async fn throughput(&self, half: usize) -> Result<Series, Error> {
        let mut rows = vec![];
        let doubled = std::iter::successors(Some(1usize), |threads| threads.checked_mul(2));
        for threads in doubled.take_while(|threads| *threads <= half) {
            let configuration = Configuration { threads, ..self.configuration(LIMITS) };
            let name = format!("{threads}, each on a core of its own");
            rows.push(self.row_on(&range(0, threads), "throughput", &name, &configuration).await?);
        }
        self.measure("Throughput by threads: requests a second are what to look at", "threads", rows).await
    }

    /// So many limits, and the backend for a node.
    fn configuration(&self, limits: usize) -> Configuration {
        let limits = KEYS.into_iter().cycle().take(limits).enumerate();
        let limits = limits.map(|(n, key)| limit(&format!("limit-{n}"), ENDPOINT, key, "10000000/s", 100_000_000));
        Configuration::of(self.own_node(), limits.collect())
    }

    fn own_node(&self) -> String {
        node(self.place.backend.addr, "http1")
    }

    async fn row(&self, series: &str, name: &str, configuration: &Configuration) -> Result<Row, Error> {
        self.row_on(process::SERVERS, series, name, configuration).await
    }

    async fn row_on(&self, cores: &str, series: &str, name: &str, configuration: &Configuration) -> Result<Row, Error> {
        let file = format!("{series}-{name}").replace([' ', ','], "-");
        let server = self.place.start_gateway(&file, configuration, cores, &self.generator).await?;
        let bodies = Bodies::Turns(self.generator.bodies(KIB)?);
        Ok(Row { name: name.to_owned(), server, bodies, idle: vec![], costs: vec![] })
    }

    async fn measure(&self, title: &'static str, unit: &'static str, mut rows: Vec<Row>) -> Result<Series, Error> {
        for round in 0..=self.rounds {
            let mut told = vec![];
            for turn in 0..rows.len() {
                let of = (round + turn) % rows.len();
                let row = &mut rows[of];
                let cost = self.generator.saturate_with(&row.server, Way::Http1, &row.bodies, self.seconds).await;
                let cost = cost.map_err(|error| row.server.failed(&format!("{unit}: {}", row.name), &error))?;
                told.push(format!("{} {:.1} µs", row.name, cost.micros));
                // By the first, connections to nodes are open and what is read often is in caches.
                if round > 0 {
                    row.costs.push(cost);
                }
            }
            eprintln!("{unit}, round {round} of {}: {}", self.rounds, told.join("; "));
        }
        let mut measured = vec![];
        for Row { name, server, idle, costs, .. } in rows {
            let closed = idle.iter().flatten().filter(|kept| memory::is_closed(kept)).count();
            if closed > 0 {
                return Err(server.failed(&name, &format!("{closed} of {} idle connections were closed", idle.len())));
            }
            let overflowed = server.metric(OVERFLOWED).await?;
            if overflowed > 0.0 {
                return Err(server.failed(&name, &format!("{overflowed} decisions had no room for their key")));
            }
            measured.push(Measured { name, costs, memory: server.memory("VmRSS")? as f64 });
        }
        Ok(Series { title, unit, rows: measured })
    }
}

/// Cores from one to before another, as taskset names them.
fn range(from: usize, to: usize) -> String {
    format!("{from}-{}", to.saturating_sub(1))
}

/// 10000000 as 10,000,000.
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut written = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            written.push(',');
        }
        written.push(digit);
    }
    written
}

fn markdown(all: &[Series], rounds: usize, seconds: f64, cores: usize) -> String {
    let machine = servers::machine(&format!("{cores} cores"));
    let mut text = format!("{rounds} rounds of {seconds} s in turn; {machine}.\n");
    for Series { title, unit, rows } in all {
        let micros = |row: &Measured| -> Vec<f64> { row.costs.iter().map(|cost| cost.micros).collect() };
        let of_each = |row: &Measured, what: fn(&Cost) -> f64| median(&row.costs.iter().map(what).collect::<Vec<_>>());
        let cells = rows.iter().map(|row| {
            vec![
                row.name.clone(),
                report::figure(median(&micros(row))),
                Spread::ratio(&micros(row), &micros(&rows[0])).to_string(),
                format!("{:.0}", of_each(row, |cost| cost.rate)),
                format!("{:.0}", of_each(row, |cost| cost.busy * 100.0)),
                report::figure(row.memory / MIB as f64),
            ]
        });
        let head = [*unit, "µs a request", "× the first row", "requests/s", "% of a core", "memory, MiB"];
        text += &format!("\n{title}:\n\n{}", report::table(&head, false, &[], cells.collect()));
    }
    text
}
