//! Whether tokens are a way to exhaust a gateway: requests without a token are sent at a steady rate, alone, then beside a
//! flood of requests without the token that they need, then beside a flood of bad tokens, each for a challenge and a key that
//! are right, from ever new addresses, so that each has to be verified. Printed is how long the first have to wait. The
//! connections of a flood are opened before: what handshakes cost is another question.
//!
//! The gateway has one core, and what sends and answers has another: `make flood`.
// Lengths are its own, and a panic is an end like others.
#![allow(unreachable_pub, clippy::indexing_slicing)]

#[path = "../../tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Parser;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use privacypass::TokenType;
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use tokio::net::TcpSocket;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use support::client::{Client, tls_config};
use support::ds::Ds;
use support::pki::Ca;
use support::tokens::{Issuer, authorization, challenges};
use support::{encode, program};

type Error = support::client::Error;

/// The rest of the configuration is the gateway's defaults; conf/gateway.toml explains every key.
const CONFIGURATION: &str = r#"# Written by the flood.
[provider]
names = ["b.example"]
ds_domain = "ds.b.example"

[[listener]]
address = "{listener}"

[[certificate]]
chain = "ds.b.example.pem"
key = "ds.b.example.key"

[[delivery_service.node]]
address = "{node}"

[endpoints.connection_request]
token = "required"

[[limit]]
name = "ip"
key = ["ip"]
rate = "100000/s"
burst = 100000

[privacy_pass]
threads = 1

{issuer}
[admin]
address = "{admin}"

[access_log]
path = "off"

[runtime]
threads = 1
"#;

/// Connections of those who bring no token.
const CONNECTIONS: usize = 4;

/// Tokens of one address, of which the gateway verifies no more in a minute.
const OF_AN_ADDRESS: u32 = 60;

/// Sends a moh-gateway a flood of bad tokens, and measures what becomes of requests that bring none.
#[derive(Debug, Parser)]
struct Arguments {
    /// The gateway to start [default: the moh-gateway that was built beside this program]
    #[arg(long, value_name = "PATH")]
    gateway: Option<PathBuf>,
    /// The type of the bad tokens
    #[arg(long = "type", default_value_t = 2)]
    kind: u16,
    /// Requests without a token, in a second
    #[arg(long, default_value_t = 1000)]
    rate: u32,
    /// Requests of the flood, in a second
    #[arg(long, default_value_t = 2000)]
    flood: u32,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// How often each is measured, in turn
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

/// What is sent beside those who bring no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Beside {
    Nothing,
    NoTokens,
    BadTokens,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Threads that are made later inherit it.
    pin(std::process::id(), 1);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    match runtime.map_err(Error::from).and_then(|runtime| runtime.block_on(flood(&arguments))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flood: {error}");
            ExitCode::FAILURE
        }
    }
}

fn pin(process: u32, core: u32) {
    let pinned = Command::new("taskset").args(["-apc", &core.to_string(), &process.to_string()]).output();
    if !pinned.is_ok_and(|output| output.status.success()) {
        eprintln!("flood: taskset does not pin process {process} to core {core}: the figures will differ");
    }
}

async fn flood(arguments: &Arguments) -> Result<(), Error> {
    let kind = match arguments.kind {
        1 => TokenType::PrivateP384,
        2 => TokenType::Public,
        5 => TokenType::PrivateRistretto255,
        _ => return Err("types are 1, 2 and 5".into()),
    };
    let dir = TempDir::with_prefix("moh-gateway-flood-")?;
    let ca = Ca::new("Federation of the flood");
    ca.issue(&["b.example", "ds.b.example"]).write(dir.path(), "ds.b.example");
    let issuer = Issuer::of("issuer.example", kind);
    issuer.write(dir.path(), "key");
    let ds = Ds::start().await;
    let [addr, admin] = program::free_addresses()?;
    let configuration = CONFIGURATION
        .replace("{listener}", &addr.to_string())
        .replace("{admin}", &admin.to_string())
        .replace("{node}", &ds.addr.to_string())
        .replace("{issuer}", &issuer.table("key"));
    let mut gateway = program::start(&program::find(arguments.gateway.as_deref())?, dir.path(), &configuration)?;
    program::ready(&mut gateway, admin, dir.path()).await?;
    pin(gateway.id().ok_or("the gateway has ended")?, 0);

    let tls = Arc::new(tls_config(Some(&ca.pem()), &["h2"], None));
    let clients: Vec<_> = (0..CONNECTIONS).map(|_| Arc::new(Client::tls(addr, &ca.pem()))).collect();
    for client in &clients {
        assert_eq!(deliver(client).await?, 200);
    }
    let challenged = clients[0].send(Method::POST, "/connection_request", request()).await?;
    let challenge = challenges(&challenged.headers).into_iter().next().ok_or("no challenge")?;
    let like = Arc::new(issuer.token(&challenge)?);

    let (mut waits, mut answers) = (BTreeMap::<Beside, Vec<[f64; 3]>>::new(), BTreeMap::<_, u32>::new());
    for round in 0..arguments.rounds {
        for beside in [Beside::Nothing, Beside::NoTokens, Beside::BadTokens] {
            eprintln!("round {} of {}: {beside:?}", round + 1, arguments.rounds);
            let stop = Arc::new(AtomicBool::new(false));
            let of_flood = if beside == Beside::Nothing { 0 } else { arguments.flood * (arguments.seconds + 1) };
            let strangers = strangers(addr, &tls, of_flood).await?;
            let bad_like = Some(like.clone()).filter(|_| beside == Beside::BadTokens);
            let flood = tokio::spawn(send(strangers, bad_like, arguments.flood, stop.clone()));
            // It is to be under way.
            tokio::time::sleep(Duration::from_millis(300)).await;
            let measured = measure(&clients, arguments.rate, arguments.seconds).await;
            stop.store(true, Ordering::Relaxed);
            for (status, n) in flood.await?? {
                *answers.entry((beside, status)).or_default() += n;
            }
            waits.entry(beside).or_default().push(measured?);
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }
    gateway.kill().await?;
    print(arguments, &waits, &answers);
    Ok(())
}

/// Without a token.
async fn deliver(client: &Client) -> Result<u16, Error> {
    let message = vec![0, 1, 0, 2, 1, b'g', 0, 0, 0, 0, 0, 0, 0, 0];
    let mut body = encode::queueing_request("a.example", "b.example", b"bob's queue", &message);
    body.resize(1024, 0);
    Ok(client.send(Method::POST, "/deliver_message", body).await?.status.as_u16())
}

/// What needs a token.
fn request() -> Vec<u8> {
    encode::queueing_request("a.example", "b.example", b"bob's queue", &[0, 1, 0, 2, 1, b'g', 0, 0, 0, 0, 0, 0, 0, 0])
}

/// Requests at a steady rate, each sent when it is due, whatever became of those before it; milliseconds that the median,
/// the 99th and the 99.9th in a hundred took from then.
async fn measure(clients: &[Arc<Client>], rate: u32, seconds: u32) -> Result<[f64; 3], Error> {
    let (mut tasks, mut turn) = (JoinSet::new(), clients.iter().cycle());
    let mut due = paced(rate, rate * seconds);
    while let (Some(due), Some(client)) = (due.recv().await, turn.next()) {
        let client = client.clone();
        tasks.spawn(async move { Ok::<_, Error>((deliver(&client).await?, due.elapsed())) });
    }
    let mut took = vec![];
    while let Some(done) = tasks.join_next().await {
        let (status, elapsed) = done??;
        if status != 200 {
            return Err(format!("a request without a token was answered {status}").into());
        }
        took.push(elapsed.as_secs_f64() * 1000.0);
    }
    took.sort_by(f64::total_cmp);
    Ok([0.5, 0.99, 0.999].map(|part| took[((took.len() - 1) as f64 * part) as usize]))
}

/// The flood: connections from addresses of their own, opened before anything is measured.
async fn strangers(
    addr: SocketAddr,
    tls: &Arc<rustls::ClientConfig>,
    requests: u32,
) -> Result<Vec<SendRequest<Full<Bytes>>>, Error> {
    static ADDRESS: AtomicU32 = AtomicU32::new(0);
    let mut strangers = vec![];
    for n in (0..requests.div_ceil(OF_AN_ADDRESS)).map(|_| ADDRESS.fetch_add(1, Ordering::Relaxed)) {
        let socket = TcpSocket::new_v4()?;
        let from = Ipv4Addr::new(127, 64 + (n / (250 * 250)) as u8, (n / 250 % 250) as u8, 1 + (n % 250) as u8);
        socket.bind(SocketAddr::new(IpAddr::V4(from), 0))?;
        let name = ServerName::try_from("ds.b.example")?;
        let stream = TlsConnector::from(tls.clone()).connect(name, socket.connect(addr).await?).await?;
        let (send, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        strangers.push(send);
    }
    Ok(strangers)
}

/// Sends the flood at a steady rate, each request over the next connection, until it is told to stop. What was answered how
/// often.
async fn send(
    strangers: Vec<SendRequest<Full<Bytes>>>,
    bad_like: Option<Arc<Vec<u8>>>,
    rate: u32,
    stop: Arc<AtomicBool>,
) -> Result<BTreeMap<u16, u32>, Error> {
    let mut due = paced(rate, u32::MAX);
    let (mut tasks, mut turn) = (JoinSet::new(), strangers.iter().cycle());
    while !stop.load(Ordering::Relaxed) {
        let (Some(_), Some(stranger)) = (due.recv().await, turn.next()) else { break };
        let mut of =
            Request::post("https://ds.b.example/connection_request").header("content-type", "application/octet-stream");
        if let Some(like) = &bad_like {
            // A nonce and an authenticator that nobody has seen; a number that is less than any modulus.
            let mut token = (**like).clone();
            aws_lc_rs::rand::fill(&mut token[2..34]).map_err(|_| "no randomness")?;
            aws_lc_rs::rand::fill(&mut token[99..]).map_err(|_| "no randomness")?;
            token[98] = 0;
            of = of.header("authorization", authorization(&token));
        }
        let (mut stranger, request) = (stranger.clone(), of.body(Full::new(Bytes::from(request())))?);
        tasks.spawn(async move {
            let answer = stranger.send_request(request).await?;
            let status = answer.status().as_u16();
            answer.into_body().collect().await?;
            Ok::<_, hyper::Error>(status)
        });
    }
    let mut answers = BTreeMap::new();
    while let Some(done) = tasks.join_next().await {
        *answers.entry(done??).or_default() += 1;
    }
    Ok(answers)
}

/// So many times, at a steady rate. The runtime's clock counts milliseconds, which is longer than what is measured.
fn paced(rate: u32, times: u32) -> tokio::sync::mpsc::UnboundedReceiver<Instant> {
    let (tell, told) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        let begin = Instant::now() + Duration::from_millis(10);
        for n in 0..times {
            let due = begin + Duration::from_secs_f64(f64::from(n) / f64::from(rate));
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if tell.send(due).is_err() {
                return;
            }
        }
    });
    told
}

fn print(arguments: &Arguments, waits: &BTreeMap<Beside, Vec<[f64; 3]>>, answers: &BTreeMap<(Beside, u16), u32>) {
    println!(
        "{} requests a second without a token, beside {} a second of others; {} rounds of {} s in turn; bad tokens of type {}",
        arguments.rate, arguments.flood, arguments.rounds, arguments.seconds, arguments.kind
    );
    println!("{:<12}{:>10}{:>10}{:>10}   answers to the flood", "beside", "p50 ms", "p99 ms", "p99.9 ms");
    let median = |beside: &Beside, part: usize| {
        let mut of: Vec<f64> = waits[beside].iter().map(|round| round[part]).collect();
        of.sort_by(f64::total_cmp);
        of[of.len() / 2]
    };
    for beside in waits.keys() {
        let of = answers.iter().filter(|((of, _), _)| of == beside);
        let told: Vec<_> = of.map(|((_, status), n)| format!("{n} × {status}")).collect();
        let [p50, p99, p999] = [0, 1, 2].map(|part| median(beside, part));
        println!("{:<12}{p50:>10.3}{p99:>10.3}{p999:>10.3}   {}", format!("{beside:?}"), told.join(", "));
    }
    let all: Vec<_> = waits
        .iter()
        .map(|(beside, rounds)| {
            let rounds: Vec<_> = rounds.iter().map(|round| format!("{:.2}", round[1])).collect();
            format!("{beside:?} {}", rounds.join(" "))
        })
        .collect();
    println!("p99 of each round, ms: {}", all.join("; "));
    let nothing = median(&Beside::Nothing, 1);
    println!(
        "p99 beside bad tokens is {:.2} times that beside nothing; beside requests without tokens {:.2} times",
        median(&Beside::BadTokens, 1) / nothing,
        median(&Beside::NoTokens, 1) / nothing
    );
}
