//! What a request costs beside others: moh-gateway with ten limits, NGINX with a limit by address, HAProxy with a table of groups
//! that it reads from the body, and a bare Pingora proxy are sent the same requests over TLS 1.3, by turns in one run, in front
//! of the same backend. Printed, and written into docs/performance.md, is what each spends of a core on a request, how many it
//! answers, how long they wait at half load, and what memory it takes; and docs/peers.svg is drawn.
//!
//! The servers have one core, of which they use one thread each, one after the other; what sends and answers has another:
//! `make bench-peers`.
//!
//! With the same means: what a request costs when there is more of everything (`make bench-growth`), and whether the gateway
//! goes on as it began (`make soak`).
// Lengths are its own, and a panic is an end like others.
#![allow(unreachable_pub, clippy::indexing_slicing)]

mod backend;
mod bare;
mod configuration;
mod drawing;
mod growth;
mod load;
mod memory;
mod process;
mod report;
mod requests;
mod results;
mod servers;
mod soak;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use tokio::runtime::Runtime;

use load::Generator;
use requests::{Case, MIB};
use results::Results;
use servers::{Kind, Place};

/// What can go wrong.
type Error = support::client::Error;

/// That of the gateway, for the bare proxy too.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Turns that servers take in a round: what else the machine does comes and goes within seconds, and by shorter turns it comes to
/// all.
const TURNS: u32 = 6;

/// And those in which waits are measured: of some thousand requests, one that stood still for a moment is the 99th of a hundred.
const WAITS: u32 = 2 * TURNS;

/// By how much a turn of large bodies is longer.
const LARGE: f64 = 6.0;

/// Seconds for which a server is sent requests before it is measured.
const WARM: f64 = 0.3;

/// Descriptors that what sends needs beside its idle connections.
const SPARE: usize = 1000;

/// Compares moh-gateway with NGINX, HAProxy and a bare Pingora proxy.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// The gateway to start [default: the moh-gateway that was built beside this program]
    #[arg(long, value_name = "PATH", global = true)]
    gateway: Option<PathBuf>,
    /// How often everything is measured, in turn [default: 9, or 2 with --quick]
    #[arg(long, global = true)]
    rounds: Option<usize>,
    /// Shorter measurements, which are printed and written nowhere; of a soak, that it is written nowhere
    #[arg(long, global = true)]
    quick: bool,
    /// Measures only the cases whose names begin so ("HTTP/1.1, 1 KiB", "HTTP/2"), or "memory"; the tables of these are printed,
    /// and written nowhere. May be given more than once
    #[arg(long, value_name = "CASE")]
    only: Vec<String>,
    /// Where performance.md is, and the picture goes
    #[arg(long, value_name = "PATH", default_value = "docs", global = true)]
    docs: PathBuf,
}

/// What this program is when it is no comparison.
#[derive(Debug, Subcommand)]
enum Role {
    /// The bare Pingora proxy, which the comparison starts
    Bare(bare::Arguments),
    /// What a request costs when there is more of limits, keys, connections, nodes and threads
    Growth(growth::Arguments),
    /// Whether all is answered, and memory stays what it was, for some minutes in which much is changed
    Soak(soak::Arguments),
}

/// How much is measured.
struct Extent {
    rounds: usize,
    /// Of each turn.
    seconds: f64,
    /// Idle, at once.
    connections: usize,
    /// How often memory is looked at.
    memory: usize,
    /// What is measured of costs and waits.
    cases: Vec<Case>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.role {
        Some(Role::Bare(bare)) => bare::run(bare),
        Some(Role::Growth(growth)) => growth::run(&arguments, growth),
        Some(Role::Soak(soak)) => beside(soak::run(&arguments, soak)),
        None => beside(compare(&arguments)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peers: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs something on the core that the servers do not have, in one thread.
fn beside(what: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    process::pin(std::process::id(), process::OTHERS)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    run_to_its_end(&runtime, what)
}

/// Runs something until it has ended, or is interrupted: dropped halfway, it ends the servers too.
fn run_to_its_end<T>(runtime: &Runtime, what: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    runtime.block_on(async {
        tokio::select! {
            done = what => done,
            _ = tokio::signal::ctrl_c() => Err("interrupted".into()),
        }
    })
}

async fn compare(arguments: &Arguments) -> Result<(), Error> {
    let document = arguments.docs.join("performance.md");
    let is_written = !arguments.quick && arguments.only.is_empty();
    if is_written {
        // Said now, and not when all is measured.
        report::split(&document, report::PEERS)?;
    }
    let extent = extent(arguments)?;
    let (rounds, seconds) = (extent.rounds, extent.seconds);
    let setting = format!("{rounds} rounds of {TURNS} turns of {seconds} s; {}", servers::setting()?);
    eprintln!("{setting}");
    let place = Place::make(arguments.gateway.as_deref()).await?;
    let generator = Arc::new(Generator::new(&place.ca_pem)?);
    let mut results = Results::default();
    measure(&place, &generator, &extent, &mut results).await?;
    for time in 0..extent.memory {
        for kind in Kind::COMPARED {
            eprintln!("memory, {} of {}: {}", time + 1, extent.memory, kind.name());
            let memory = memory::measure(&place, &generator, kind, extent.connections).await?;
            results.memory.entry(kind).or_default().push(memory);
        }
    }
    let report = report::markdown(&results, &setting);
    println!("{report}");
    if is_written {
        let picture = arguments.docs.join("peers.svg");
        drawing::draw(&results, &picture)?;
        let report = format!("{report}\n![Costs and waits beside those of the peers](peers.svg)");
        report::write(&document, report::PEERS, &report)?;
        eprintln!("written: {} and {}", document.display(), picture.display());
    }
    Ok(())
}

fn extent(arguments: &Arguments) -> Result<Extent, Error> {
    let (rounds, seconds, connections, memory) =
        if arguments.quick { (2, 0.15, 1000, 1) } else { (9, 0.25, 10_000, 7) };
    let rounds = arguments.rounds.unwrap_or(rounds).max(1);
    let most = process::descriptors()?.saturating_sub(SPARE);
    if most < connections {
        eprintln!("peers: descriptors are for {most} idle connections and no more: ulimit -n");
    }
    let is_wanted = |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|only| name.starts_with(only));
    let cases: Vec<_> = Case::ALL.into_iter().filter(|case| is_wanted(&case.to_string())).collect();
    let memory = if is_wanted("memory") { memory } else { 0 };
    if cases.is_empty() && memory == 0 {
        let all = Case::ALL.map(|case| format!("{:?}", case.to_string())).join(", ");
        return Err(format!("nothing is called what --only says: there are {all} and \"memory\"").into());
    }
    Ok(Extent { rounds, seconds, connections: connections.min(most), memory, cases })
}

/// What requests cost and how long they wait: each case by all servers, one after the other, and another first each time. In each
/// round they are started anew: what one process has by chance for as long as it lives, its server's figures are not to have.
async fn measure(
    place: &Place,
    generator: &Arc<Generator>,
    extent: &Extent,
    results: &mut Results,
) -> Result<(), Error> {
    let Some(first) = extent.cases.first() else { return Ok(()) };
    for round in 0..extent.rounds {
        let mut kinds = Kind::ALL;
        kinds.rotate_left(round % Kind::ALL.len());
        let mut servers = vec![];
        for kind in kinds {
            let server = place.start(kind, generator).await?;
            // What a process does once is not for requests.
            let warm = generator.saturate(&server, *first, WARM).await;
            warm.map_err(|error| server.failed(first, &error))?;
            servers.push(server);
        }
        for case in extent.cases.iter().copied() {
            // Bodies of megabytes are few in a second, and too few for more turns.
            let (seconds, turns, at_half_load, waits) = match case.size < MIB {
                true => (extent.seconds, TURNS, extent.seconds, WAITS),
                false => (LARGE * extent.seconds, 1, 2.0 * LARGE * extent.seconds, 1),
            };
            let mut rates = BTreeMap::<Kind, f64>::new();
            for turn in 0..turns {
                let mut told = vec![];
                for server in &servers {
                    let cost = generator.saturate(server, case, seconds).await;
                    let cost = cost.map_err(|error| server.failed(&case, &error))?;
                    told.push(format!("{} {:.1} µs", server.kind.name(), cost.micros));
                    if Kind::COMPARED.contains(&server.kind) {
                        *rates.entry(server.kind).or_default() += cost.rate / f64::from(turns);
                    }
                    results.costs.entry((server.kind, case)).or_default().push(cost);
                }
                eprintln!("round {}.{} of {}, {case}: {}", round + 1, turn + 1, extent.rounds, told.join(", "));
                servers.rotate_left(1);
            }
            let lowest = rates.into_values().fold(f64::INFINITY, f64::min);
            for _ in 0..waits {
                for server in servers.iter().filter(|server| Kind::COMPARED.contains(&server.kind)) {
                    let waits = generator.half_load(server, case, lowest / 2.0, at_half_load).await;
                    let waits = waits.map_err(|error| server.failed(&case, &error))?;
                    results.waits.entry((server.kind, case)).or_default().push(waits);
                }
                servers.rotate_left(1);
            }
            results.rates.entry(case).or_default().push(lowest / 2.0);
        }
    }
    Ok(())
}
