//! What a limit lets through, measured: a gateway with one limit is sent three loads over TLS, each from a fresh start, and
//! what was offered and what was admitted is drawn beside what the limit allows: burst + rate · t.
//!
//! `make picture`, or `cargo run --release --example picture -- --out docs/limits.svg` where the gateway is built.
#![allow(unreachable_pub)]

mod drawing;
mod gateway;
mod load;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use gateway::Place;
use load::{Load, Run};

/// What can go wrong beside the gateway's decisions.
type Error = support::client::Error;

/// Requests that the limit of the picture lets pass in a second.
const RATE: u32 = 50;

/// Requests that it lets pass at once.
const BURST: u32 = 100;

/// Seconds that a burst takes to come back: a fixed window of the same quota.
const WINDOW: f64 = BURST as f64 / RATE as f64;

/// The most that may have been admitted so many seconds after the first request.
fn bound(seconds: f64) -> f64 {
    f64::from(BURST) + f64::from(RATE) * seconds
}

/// Sends a moh-gateway three loads, and draws what its limit admits of them.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where the picture goes (SVG)
    #[arg(long, value_name = "PATH", default_value = "docs/limits.svg")]
    out: PathBuf,
    /// The gateway to start [default: the moh-gateway that was built beside this program]
    #[arg(long, value_name = "PATH")]
    gateway: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Dropped halfway, it ends the gateway too.
    let drawn = tokio::select! {
        drawn = picture(&arguments) => drawn,
        _ = tokio::signal::ctrl_c() => Err("interrupted".into()),
    };
    match drawn {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("picture: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn picture(arguments: &Arguments) -> Result<(), Error> {
    let place = Place::make(arguments.gateway.as_deref()).await?;
    let mut runs = Vec::new();
    for load in Load::all() {
        eprintln!("{}: {}", load.name, load.title);
        let gateway = place.open().await?;
        let run = load.drive(&gateway.clients().await?).await?;
        gateway.close().await?;
        eprintln!("{}: offered in {:.2} s, all answered after {:.2} s", run.load.name, run.offered_in(), run.ended);
        check(&run);
        runs.push(run);
    }
    print_table(&runs);
    drawing::draw(&runs, &arguments.out)?;
    eprintln!("drawn: {}", arguments.out.display());
    Ok(())
}

/// Never more than the bound. Answers come after decisions, so it holds at the time of every answer, however late that is;
/// one more is for rounding. And where there is always more to admit, nearly as much as the bound.
fn check(run: &Run) {
    let name = run.load.name;
    for (count, at) in (1u32..).zip(&run.admitted) {
        assert!(f64::from(count) <= bound(*at) + 1.0, "{name}: {count} admitted in {at:.3} s");
    }
    let (admitted, bound) = (run.admitted.len(), bound(run.ended));
    assert!(!run.load.floods || admitted as f64 >= 0.95 * bound, "{name}: {admitted} admitted of {bound:.0}");
}

fn print_table(runs: &[Run]) {
    println!("{:<8}{:>9}{:>10}{:>9}{:>8}{:>14}", "load", "offered", "admitted", "refused", "bound", "fixed window");
    for run in runs {
        let (offered, admitted) = (run.offered.len(), run.admitted.len());
        let fixed = run.fixed_window().map_or_else(|| "-".to_owned(), |admitted| admitted.len().to_string());
        println!(
            "{:<8}{offered:>9}{admitted:>10}{:>9}{:>8.0}{fixed:>14}",
            run.load.name,
            offered - admitted,
            bound(run.ended)
        );
    }
}
