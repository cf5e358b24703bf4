//! A federation in five seconds: two Delivery Service nodes, a token issuer and the gateway on the loopback, and real MLS
//! clients of three providers who talk through them, in both dialects. Every step says what the gateway was expected to
//! decide and what it did; the exit code is 0 if the two never differed.
//!
//! `make demo`, or `cargo run --example demo -- --help`.
#![allow(unreachable_pub)]

mod ledger;
mod play;
mod stage;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use ledger::Ledger;
use stage::Stage;

/// What can go wrong outside of the gateway's decisions.
type Error = support::client::Error;

/// Plays a federation of messaging providers through a moh-gateway, and checks each of its decisions.
#[derive(Debug, Parser)]
struct Arguments {
    /// The gateway to start [default: the moh-gateway that was built beside this demo]
    #[arg(long, value_name = "PATH")]
    gateway: Option<PathBuf>,
    /// Leaves everything running at the end, with commands to try, until Ctrl-C
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    match demo(&Arguments::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every decision was the expected one. However this ends, dropped halfway or unwound by a panic, the stage ends with
/// it, and the gateway with the stage.
async fn demo(arguments: &Arguments) -> Result<bool, Error> {
    let (mut stage, good) = tokio::select! {
        played = play(arguments) => played?,
        () = interrupted() => return Err("interrupted".into()),
    };
    if arguments.keep {
        stage.print_commands();
        interrupted().await;
    }
    stage.strike().await;
    Ok(good)
}

/// What is running afterwards, and whether every decision was the expected one.
async fn play(arguments: &Arguments) -> Result<(Stage, bool), Error> {
    let stage = Stage::set(arguments.gateway.as_deref()).await?;
    let mut ledger = Ledger::new();
    let played = play::play(&stage, &mut ledger).await;
    ledger.print_table();
    let good = played.is_ok() && ledger.is_good();
    if !good {
        eprintln!("\nThe end of the gateway's log:\n{}\n", stage.log());
    }
    played.map(|()| (stage, good))
}

/// Waits for Ctrl-C, or a request to end.
async fn interrupted() {
    let wait_for = async |kind| match signal(kind) {
        Ok(mut signal) => signal.recv().await,
        Err(_) => std::future::pending().await,
    };
    tokio::select! {
        _ = wait_for(SignalKind::interrupt()) => (),
        _ = wait_for(SignalKind::terminate()) => (),
        _ = wait_for(SignalKind::hangup()) => (),
    }
}
