//! The commands: `run`, `check`, `explain`; and for trying tokens `issuer` and `token`.

mod explain;
mod issuer;
mod token;

use crate::config::Config;
use clap::{Args, Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The gateway in front of MIMI/MLS Delivery Services.
///
/// Terminates federation TLS, reads just enough of each request to know group, sender and recipient, refuses what is not
/// for this provider or not theirs to send, holds everyone to their limits, takes Privacy Pass tokens, and forwards the
/// rest untouched.
#[derive(Debug, Parser)]
#[command(name = "moh-gateway", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the gateway until SIGTERM (requests under way end first) or SIGINT (at once)
    ///
    /// SIGHUP reads the configuration again. SIGUSR2 starts this binary again, as the file is then, and hands it the
    /// listening sockets: a new version takes over without a request lost.
    Run(Run),
    /// Check a configuration and the files it names, say all that is wrong, and exit
    Check(ConfigFile),
    /// Say what the gateway makes of a request, offline
    Explain(explain::Explain),
    /// For development: run a Privacy Pass Issuer that gives tokens to anyone
    Issuer(issuer::Issuer),
    /// Have a gateway challenge a request, get a token for it, and print the Authorization line
    Token(token::Token),
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    file: ConfigFile,
    /// Take over from a running gateway, which SIGUSR2 has told to start this one: the socket that it sends listening
    /// sockets to
    #[arg(long, value_name = "SOCKET", hide = true, requires = "inherits")]
    upgrade: Option<PathBuf>,
    /// The addresses that the running gateway listens at
    #[arg(long, value_name = "ADDRESS", hide = true, requires = "upgrade", value_delimiter = ',')]
    inherits: Vec<std::net::SocketAddr>,
}

#[derive(Debug, Args)]
struct ConfigFile {
    /// The configuration; conf/gateway.toml explains every key
    #[arg(long, short, value_name = "FILE")]
    config: PathBuf,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(how) => run(&how),
        Command::Check(file) => match load(&file) {
            Some(config) => {
                let (listeners, limits) = (config.listeners.len(), config.policy.scopes().count());
                let nodes = config.upstream.nodes.len();
                println!("{}: ok: {listeners} listeners, {nodes} nodes, {limits} limits", file.config.display());
                ExitCode::SUCCESS
            }
            None => ExitCode::FAILURE,
        },
        Command::Explain(explain) => explain.run(),
        Command::Issuer(issuer) => issuer.run(),
        Command::Token(token) => token.run(),
    }
}

fn load(file: &ConfigFile) -> Option<Config> {
    let config = Config::load(&file.config).map_err(|errors| errors.iter().for_each(|e| eprintln!("{e}"))).ok()?;
    config.hints.iter().for_each(|hint| eprintln!("{hint} (a hint)"));
    Some(config)
}

fn run(how: &Run) -> ExitCode {
    log_to_stderr();
    let file = &how.file;
    let Some(config) = load(file) else { return ExitCode::FAILURE };
    for listener in &config.listeners {
        tracing::info!(address = %listener.address, "listening for other providers");
    }
    if let Some(egress) = &config.egress {
        tracing::info!(address = %egress.address, "listening for this provider's own nodes");
    }
    tracing::info!(address = %config.admin, "listening for operators: /metrics /healthz /readyz /reload");
    let from = how
        .upgrade
        .as_ref()
        .map(|socket| crate::gateway::From { socket: socket.clone(), addresses: how.inherits.clone() });
    match crate::gateway::run(config, &file.config, from.as_ref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("moh-gateway: {e}");
            ExitCode::FAILURE
        }
    }
}

/// What the program says of itself; `RUST_LOG` says how much.
fn log_to_stderr() {
    // What these say, strangers have them say, as often as they like.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,pingora_core=off,hyper=off,h2=off,rustls=off"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

/// A file, or what is wrong with it.
fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}
