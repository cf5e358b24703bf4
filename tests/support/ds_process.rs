//! A Delivery Service node as a process of its own, which can be killed, frozen and started again at its address.
//!
//! The process is the test binary itself, told to run one ignored test ([`TEST`]), which calls [`run`]. It answers every
//! request with 200, HTTP/1.1 and h2c, and before it does it has noted the request in a file: that file tells what it did,
//! however it ended. `GET /healthz` is answered too and not noted.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};

use super::program::own_ip;

/// The test that the process runs.
pub const TEST: &str = "nodes::ds_process";

/// The field that names a request in the file.
pub const REQUEST: &str = "x-request";

const ADDRESS: &str = "MOH_GATEWAY_TEST_DS_ADDRESS";
const FOLDER: &str = "MOH_GATEWAY_TEST_DS_FOLDER";

/// Before a request is noted, and between that and its answer: there is always one that a signal meets.
const WORK: Duration = Duration::from_millis(2);

/// A request that was processed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Its [`REQUEST`] field.
    pub id: String,
    pub body: Vec<u8>,
}

/// A running process. It ends with the test.
pub struct DsProcess {
    addr: SocketAddr,
    dir: tempfile::TempDir,
    child: Child,
}

impl fmt::Debug for DsProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DsProcess({}, pid {})", self.addr, self.child.id())
    }
}

/// A port that no one else is given, below the ephemeral ones and above those of redis.rs and their buses: nothing takes it
/// while a node is down.
fn free_port() -> SocketAddr {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port: u16 = rand::random_range(30_000..32_768);
        let free = std::net::TcpListener::bind((own_ip(), port)).is_ok();
        if free && GIVEN.lock().unwrap().insert(port) {
            return SocketAddr::from((own_ip(), port));
        }
    }
}

fn spawn(addr: SocketAddr, dir: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([TEST, "--exact", "--ignored", "--nocapture"]);
    command.env(ADDRESS, addr.to_string()).env(FOLDER, dir);
    // It ends when its standard input does: with this process, however that ends.
    let log = File::create(dir.join("log")).unwrap();
    command.stdin(Stdio::piped()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

impl DsProcess {
    /// A node at an address of its own, which accepts connections.
    pub async fn start() -> DsProcess {
        let (addr, dir) = (free_port(), tempfile::tempdir().unwrap());
        let child = spawn(addr, dir.path());
        let mut process = DsProcess { addr, dir, child };
        process.wait_until_it_accepts().await;
        process
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it at once (SIGKILL); once this returns, connections are refused.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it as an operator would (SIGTERM): requests under way are answered first.
    pub async fn terminate(&mut self) {
        self.signal("-TERM");
        let until = Instant::now() + Duration::from_secs(10);
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < until, "{self:?} does not end: {}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Starts it again after [`DsProcess::kill`] or [`DsProcess::terminate`], in the same place with the same file.
    pub async fn start_again(&mut self) {
        self.child = spawn(self.addr, self.dir.path());
        self.wait_until_it_accepts().await;
    }

    /// Stops it as it is (SIGSTOP): connections stay, the kernel even accepts new ones, and nothing answers.
    pub fn freeze(&self) {
        self.signal("-STOP");
        let stat = format!("/proc/{}/stat", self.pid());
        let until = Instant::now() + Duration::from_secs(5);
        while !std::fs::read_to_string(&stat).unwrap().contains(") T ") {
            assert!(Instant::now() < until, "{self:?} does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lets it go on after [`DsProcess::freeze`] (SIGCONT).
    pub fn thaw(&self) {
        self.signal("-CONT");
    }

    /// Answers `/healthz` with 500, or with 200 again.
    pub fn sick(&self, sick: bool) {
        let mark = sick_mark(self.dir.path());
        if sick { std::fs::write(mark, "").unwrap() } else { std::fs::remove_file(mark).unwrap() }
    }

    /// The requests that it processed so far, in order, in all its lives.
    pub fn lines(&self) -> Vec<Line> {
        let text = std::fs::read_to_string(self.dir.path().join("lines")).unwrap_or_default();
        let line = |line: &str| {
            let (id, body) = line.split_once(' ').unwrap();
            Line { id: id.to_owned(), body: hex::decode(body).unwrap() }
        };
        // What is after the last line's end is being written.
        text.rfind('\n').map_or("", |end| &text[..end]).lines().map(line).collect()
    }

    /// What it said, in its last life.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.pid().to_string()]).status().unwrap();
        assert!(status.success(), "{self:?} takes no {signal}");
    }

    async fn wait_until_it_accepts(&mut self) {
        let until = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(self.addr).await.is_err() {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < until, "{ended:?}: {}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for DsProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn sick_mark(folder: &Path) -> PathBuf {
    folder.join("sick")
}

/// What the process does: it serves until it is told to end. Without the environment that [`DsProcess`] gives it, nothing.
pub fn run() {
    let (Ok(address), Ok(folder)) = (std::env::var(ADDRESS), std::env::var(FOLDER)) else { return };
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(serve(address.parse().unwrap(), folder.into()));
    std::process::exit(0);
}

async fn serve(address: SocketAddr, folder: PathBuf) {
    let mut told_to_end = signal(SignalKind::terminate()).unwrap();
    let lines = OpenOptions::new().create(true).append(true).open(folder.join("lines")).unwrap();
    let (lines, folder): (Arc<File>, Arc<Path>) = (Arc::new(lines), folder.into());
    let listener = TcpListener::bind(address).await.unwrap();
    let connections = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = told_to_end.recv() => break,
        };
        let Ok((stream, _)) = accepted else { continue };
        let _ = stream.set_nodelay(true);
        let (lines, folder) = (lines.clone(), folder.clone());
        let service = service_fn(move |request| answer(request, lines.clone(), folder.clone()));
        let connection =
            auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).into_owned();
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            let _ = connection.await;
        });
    }
    drop(listener);
    let _ = tokio::time::timeout(Duration::from_secs(5), connections.shutdown()).await;
}

async fn answer(
    request: Request<Incoming>,
    lines: Arc<File>,
    folder: Arc<Path>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let mut response = Response::new(Full::default());
    if head.uri.path() == "/healthz" {
        if sick_mark(&folder).exists() {
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        }
        return Ok(response);
    }
    // A request that breaks off was not made.
    let Ok(body) = body.collect().await else {
        *response.status_mut() = StatusCode::BAD_REQUEST;
        return Ok(response);
    };
    tokio::time::sleep(WORK).await;
    let id = head.headers.get(REQUEST).map_or("-", |id| id.to_str().unwrap());
    // One write: a line is whole or not there.
    (&*lines).write_all(format!("{id} {}\n", hex::encode(body.to_bytes())).as_bytes()).unwrap();
    tokio::time::sleep(WORK).await;
    Ok(response)
}
