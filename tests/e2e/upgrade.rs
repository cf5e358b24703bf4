//! One process follows another: a successor takes over the listening sockets under load, and nobody outside notices; one
//! that is no good changes nothing; and a process that is told to end does so without a request lost.

use crate::harness::{Setup, binary, ca, config, message_in, send_message};
use crate::support::client::{Client, Error, Response, raw_tls};
use crate::support::ds::Ds;
use crate::support::program::free_address;
use bytes::Bytes;
use http::{Method, StatusCode};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixDatagram};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::client::TlsStream;

/// How long anything may take that is bound to happen. A process that has handed its listening sockets on takes
/// connections for five seconds more.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until something holds.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "it does not come to that: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Sends a signal to a process.
fn signal(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

/// A gateway with a `gateway.toml` of any content in a folder of its own, and with whatever follows it. All of them end
/// with the test.
pub struct Process {
    pub admin: SocketAddr,
    pub dir: TempDir,
    child: Child,
}

impl Process {
    /// Runs a program with `gateway.toml` of a folder, and waits until it takes connections at its listeners.
    pub async fn start(program: &Path, dir: TempDir, admin: SocketAddr, listeners: &[SocketAddr]) -> Process {
        let stderr = std::fs::File::create(dir.path().join("stderr")).unwrap();
        let child = Command::new(program)
            .args(["run", "--config"])
            .arg(dir.path().join("gateway.toml"))
            .env("NOTIFY_SOCKET", dir.path().join("notify"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut process = Process { admin, dir, child };
        let until = Instant::now() + PATIENCE;
        loop {
            if process.is_up(listeners).await {
                return process;
            }
            let ended = process.child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < until, "it does not start: {ended:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn is_up(&self, listeners: &[SocketAddr]) -> bool {
        for listener in listeners {
            if TcpStream::connect(listener).await.is_err() {
                return false;
            }
        }
        self.operator("/healthz").await.is_ok_and(|response| response.status == 200)
    }

    async fn operator(&self, path: &str) -> Result<Response, Error> {
        Client::plain(self.admin).http1().send(Method::GET, path, "").await
    }

    /// The value of a metric; 0 where there is none yet.
    pub async fn metric(&self, series: &str) -> f64 {
        let text = self.operator("/metrics").await.unwrap().text();
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or(0.0)
    }

    /// Waits until a metric has this value, for five seconds at most: it is counted when a request has ended.
    pub async fn until_metric(&self, series: &str, expected: f64) {
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            let value = self.metric(series).await;
            if value == expected {
                return;
            }
            assert!(Instant::now() < until, "{series} is {value}, not {expected}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default()
    }

    /// The process that was started first.
    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All processes that run with this configuration, but for those that have ended.
    fn pids(&self) -> Vec<u32> {
        let config = self.dir.path().join("gateway.toml");
        let config = config.as_os_str().as_encoded_bytes();
        let is_ours = |pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|octet| *octet == 0).any(|argument| argument == config)
        };
        let entries = std::fs::read_dir("/proc").unwrap();
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        pids.filter(is_ours).collect()
    }

    /// Waits for the end of the process that was started first.
    async fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        until("the process ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Whoever follows could be about to have a successor too.
        let until = Instant::now() + Duration::from_secs(2);
        loop {
            let left = self.pids();
            if left.is_empty() || Instant::now() > until {
                break;
            }
            for pid in left {
                let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).stderr(Stdio::null()).status();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if std::thread::panicking() {
            eprintln!("--- the stderr of all processes:\n{}", self.stderr());
        }
    }
}

/// A gateway as systemd runs it: it says when it is ready, and who is.
struct Service {
    process: Process,
    addr: SocketAddr,
    notify: UnixDatagram,
    /// All that was heard, line by line.
    heard: Vec<String>,
}

impl Service {
    async fn start(program: &Path, setup: &Setup) -> Service {
        let dir = tempfile::tempdir().unwrap();
        let notify = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        let (addr, admin) = (free_address(), free_address());
        config(dir.path(), addr, admin, setup);
        let process = Process::start(program, dir, admin, &[addr]).await;
        let mut service = Service { process, addr, notify, heard: vec![] };
        // It need not say that it is itself.
        let pid = service.ready().await;
        assert!(pid.is_none_or(|pid| pid == service.process.pid()), "{pid:?}");
        service
    }

    /// Waits for the next message; the place of its first line in what was heard.
    async fn hear(&mut self) -> usize {
        let mut message = vec![0; 4096];
        let received = tokio::time::timeout(PATIENCE, self.notify.recv(&mut message)).await;
        let length = received.unwrap_or_else(|_| panic!("nothing more was said than {:?}", self.heard)).unwrap();
        let first = self.heard.len();
        self.note(&message[..length]);
        first
    }

    fn note(&mut self, message: &[u8]) {
        self.heard.extend(String::from_utf8(message.to_vec()).unwrap().lines().map(str::to_owned));
    }

    /// Whether a process has said so up to now.
    fn says_that_it_stops(&mut self) -> bool {
        let mut message = vec![0; 4096];
        while let Ok(length) = self.notify.try_recv(&mut message) {
            self.note(&message[..length]);
        }
        self.heard.iter().any(|line| line == "STOPPING=1")
    }

    /// Waits until a process says that it is ready: which one, if it says so.
    async fn ready(&mut self) -> Option<u32> {
        let mut pid = None;
        loop {
            let first = self.hear().await;
            let lines = &self.heard[first..];
            if let Some(said) = lines.iter().find_map(|line| line.strip_prefix("MAINPID=")) {
                pid = Some(said.parse().unwrap());
            }
            if lines.iter().any(|line| line == "READY=1") {
                return pid;
            }
        }
    }

    /// Has a process start a successor, and waits until that is ready.
    async fn upgrade(&mut self, pid: u32) -> u32 {
        signal(pid, "-USR2");
        let successor = self.ready().await.expect("a successor says who it is");
        assert_ne!(successor, pid);
        assert!(self.process.pids().contains(&successor), "it says that it is somebody else");
        successor
    }

    /// Waits until only this process is left of all.
    async fn only(&self, pid: u32) {
        until("all others end", || self.process.pids() == [pid]).await;
    }

    fn client(&self) -> Client {
        client(self.addr)
    }

    async fn serves(&self) {
        for client in [self.client().http1(), self.client().http2()] {
            assert_eq!(client.send(Method::POST, "/group_operation", send_message()).await.unwrap().status, 200);
        }
    }
}

fn client(addr: SocketAddr) -> Client {
    Client::tls(addr, &ca().pem())
}

// === Load ===

/// How a client comes.
enum Manner {
    /// By a connection that it keeps.
    Keeps(Arc<Client>),
    /// It closes each connection after a request, and resumes its TLS session with the next (HTTP/1.1).
    Closes(Arc<Client>),
    /// As a new client for each request, over HTTP/2 or not.
    New(bool),
}

/// Requests that go on and on, each with a body of its own.
struct Load {
    addr: SocketAddr,
    stop: AtomicBool,
    requests: AtomicU32,
    /// Requests answered with 200, by client.
    answered: Vec<AtomicUsize>,
    failed: Mutex<Vec<String>>,
}

/// HTTP's normal course: the connection was closed before anything of the request was written, so there was none.
fn was_never_sent(error: &Error) -> bool {
    error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled)
}

impl Load {
    /// Begins with one client for each manner.
    fn begin(addr: SocketAddr) -> (Arc<Load>, JoinSet<()>) {
        let shared = Arc::new(client(addr).http2());
        let manners = [
            Manner::Keeps(Arc::new(client(addr).http1())),
            Manner::Keeps(Arc::new(client(addr).http1())),
            Manner::Keeps(Arc::new(client(addr).http2())),
            Manner::Keeps(shared.clone()),
            Manner::Keeps(shared),
            Manner::Closes(Arc::new(client(addr).http1())),
            Manner::New(false),
            Manner::New(true),
        ];
        let load = Arc::new(Load {
            addr,
            stop: AtomicBool::new(false),
            requests: AtomicU32::new(0),
            answered: manners.iter().map(|_| AtomicUsize::new(0)).collect(),
            failed: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        for (n, manner) in manners.into_iter().enumerate() {
            tasks.spawn(load.clone().go_on_as(n, manner));
        }
        (load, tasks)
    }

    async fn go_on_as(self: Arc<Load>, n: usize, manner: Manner) {
        let (name, pause) = match &manner {
            Manner::Keeps(client) if client.is_http1() => ("kept HTTP/1.1", 1),
            Manner::Keeps(_) => ("kept HTTP/2", 1),
            Manner::Closes(_) => ("closed HTTP/1.1", 5),
            Manner::New(_) => ("new client", 5),
        };
        while !self.stop.load(SeqCst) {
            let number = self.requests.fetch_add(1, SeqCst);
            match self.request(&manner, body(number)).await {
                Ok(StatusCode::OK) => {
                    self.answered[n].fetch_add(1, SeqCst);
                }
                Ok(status) => self.failed.lock().unwrap().push(format!("{number}, {name}: {status}")),
                Err(error) => self.failed.lock().unwrap().push(format!("{number}, {name}: {error:?}")),
            }
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn request(&self, manner: &Manner, body: Vec<u8>) -> Result<StatusCode, Error> {
        const PATH: &str = "/group_operation";
        let mut tries = 0;
        loop {
            let body = body.clone();
            let answer = match manner {
                Manner::Keeps(client) => client.send(Method::POST, PATH, body).await,
                Manner::Closes(client) => client.send_with(Method::POST, PATH, &[("connection", "close")], body).await,
                Manner::New(true) => client(self.addr).http2().send(Method::POST, PATH, body).await,
                Manner::New(false) => client(self.addr).http1().send(Method::POST, PATH, body).await,
            };
            match answer {
                Err(error) if was_never_sent(&error) && tries < 20 => tries += 1,
                answer => return answer.map(|response| response.status),
            }
        }
    }

    /// Waits until every client has had as many more answers.
    async fn goes_on(&self, more: usize) {
        let now = || self.answered.iter().map(|n| n.load(SeqCst)).collect::<Vec<_>>();
        let before = now();
        let until = Instant::now() + PATIENCE;
        while now().iter().zip(&before).any(|(now, before)| *now < before + more) {
            let failed = self.failed.lock().unwrap().clone();
            assert!(failed.is_empty() && Instant::now() < until, "{:?} after {before:?}: {failed:#?}", now());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends it: every request has been answered with 200, and the node has had each once.
    async fn was_served(self: Arc<Load>, tasks: JoinSet<()>, ds: &Ds) {
        self.stop.store(true, SeqCst);
        tasks.join_all().await;
        let (total, failed) = (self.requests.load(SeqCst), self.failed.lock().unwrap().clone());
        assert!(failed.is_empty(), "{} of {total} requests: {failed:#?}", failed.len());
        let answered: usize = self.answered.iter().map(|n| n.load(SeqCst)).sum();
        assert_eq!(answered, total as usize);
        let mut seen: HashMap<Vec<u8>, usize> = HashMap::new();
        for request in ds.requests() {
            *seen.entry(request.body).or_default() += 1;
        }
        for number in 0..total {
            assert_eq!(seen.remove(&body(number)), Some(1), "how often the node had request {number} of {total}");
        }
        assert!(seen.is_empty(), "the node had {} requests that nobody sent", seen.len());
    }
}

/// The body of the request of this number: no other is like it.
fn body(number: u32) -> Vec<u8> {
    message_in(format!("group {}", number % 64).as_bytes(), number)
}

/// For load from one address, and a machine that has other things to do.
fn under_load(ds: &Ds) -> Setup {
    let setup = Setup {
        timeouts: "shutdown = \"10s\"",
        delivery: "connect_timeout = \"5s\"\nread_timeout = \"30s\"",
        ..Setup::of(ds)
    };
    setup.with("[connections]\nexempt = [\"127.0.0.0/8\"]")
}

#[tokio::test]
async fn nobody_notices_an_upgrade() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "done");
    let mut service = Service::start(Path::new(binary()), &under_load(&ds)).await;
    let old = service.process.pid();
    let (load, clients) = Load::begin(service.addr);
    load.goes_on(20).await;
    let new = service.upgrade(old).await;
    load.goes_on(20).await;
    assert!(service.process.ended().await.success());
    assert_eq!(service.process.pids(), [new]);
    // By the successor alone.
    load.goes_on(20).await;
    load.was_served(clients, &ds).await;
}

#[tokio::test]
async fn a_successor_has_successors_too() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "done");
    let mut service = Service::start(Path::new(binary()), &under_load(&ds)).await;
    let (load, clients) = Load::begin(service.addr);
    let mut all = vec![service.process.pid()];
    // A listener's socket goes from threads to threads, and from process to process.
    let file = service.process.dir.path().join("gateway.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("threads = 2"));
    std::fs::write(&file, text.replace("threads = 2", "threads = 3")).unwrap();
    let admin = Client::plain(service.process.admin).http1();
    assert_eq!(admin.send(Method::POST, "/reload", "").await.unwrap().status, 200);
    for _ in 0..3 {
        // Those before it still have connections.
        load.goes_on(5).await;
        let newest = service.upgrade(*all.last().unwrap()).await;
        assert!(!all.contains(&newest));
        all.push(newest);
    }
    assert!(service.process.ended().await.success());
    service.only(*all.last().unwrap()).await;
    load.goes_on(20).await;
    load.was_served(clients, &ds).await;
}

// === What is under way, and what is idle ===

/// An HTTP/1.1 connection that has been used, and is kept.
async fn idle_http1(addr: SocketAddr) -> TlsStream<TcpStream> {
    let mut stream = raw_tls(addr, "ds.b.example", &ca().pem(), &["http/1.1"], None).await.unwrap();
    let request = b"GET /.well-known/mimi/ds-domain HTTP/1.1\r\nHost: ds.b.example\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = vec![];
    while !answer.ends_with(b"\r\n\r\nds.b.example") {
        answer.push(stream.read_u8().await.unwrap());
    }
    let answer = String::from_utf8(answer).unwrap().to_lowercase();
    assert!(answer.starts_with("http/1.1 200") && !answer.contains("connection: close"), "{answer}");
    stream
}

/// It is closed, and nothing is said on it.
async fn is_closed(mut stream: TlsStream<TcpStream>) {
    let mut rest = vec![];
    // With TLS's own end or without.
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("it is still open");
    assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest));
}

/// An HTTP/2 connection, and what becomes of it.
type Http2 = (h2::client::SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>);

/// An HTTP/2 connection that has been used, and is kept.
async fn idle_http2(addr: SocketAddr) -> Http2 {
    let stream = raw_tls(addr, "ds.b.example", &ca().pem(), &["h2"], None).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = http::Request::get("https://ds.b.example/.well-known/mimi/ds-domain").body(()).unwrap();
    let mut client = client.ready().await.unwrap();
    let (response, _) = client.send_request(request, true).unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    while let Some(piece) = body.data().await {
        let piece = piece.unwrap();
        body.flow_control().release_capacity(piece.len()).unwrap();
    }
    (client, connection)
}

/// It is told to open no more streams, and ends.
async fn goes_away((client, connection): Http2) {
    let _ = tokio::time::timeout(PATIENCE, connection).await.expect("it is still open").unwrap();
    let error = client.ready().await.expect_err("no stream may be opened any more");
    let told = error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR);
    assert!(told, "without GOAWAY: {error}");
}

/// Requests over both versions of HTTP that are with the node, which answers none.
async fn under_way(ds: &Ds, addr: SocketAddr) -> JoinSet<Result<Response, Error>> {
    ds.hang(true);
    let before = ds.complete();
    let mut requests = JoinSet::new();
    for client in [client(addr).http1(), client(addr).http2()] {
        let client = client.timeout(Duration::from_secs(30));
        requests.spawn(async move { client.send(Method::POST, "/group_operation", send_message()).await });
    }
    assert!(ds.until(|ds| ds.complete() == before + 2).await, "the node has them");
    requests
}

/// They are all under way still, and then answered.
async fn are_answered(ds: &Ds, mut requests: JoinSet<Result<Response, Error>>) {
    assert!(requests.try_join_next().is_none(), "one has ended before the node has answered");
    ds.hang(false);
    for response in requests.join_all().await {
        let response = response.unwrap();
        assert_eq!(response.status, 200);
        if response.version == http::Version::HTTP_11 {
            assert_eq!(response.header("connection"), Some("close"), "nobody is invited to send another");
        }
    }
}

#[tokio::test]
async fn requests_under_way_end_with_the_process_that_has_them() {
    let ds = Ds::start().await;
    let mut service = Service::start(Path::new(binary()), &under_load(&ds)).await;
    let old = service.process.pid();
    let (http1, http2) = (idle_http1(service.addr).await, idle_http2(service.addr).await);
    let requests = under_way(&ds, service.addr).await;
    let new = service.upgrade(old).await;
    // The old one has begun to end.
    is_closed(http1).await;
    goes_away(http2).await;
    assert!(service.process.pids().contains(&old), "it waits for its requests");
    // Connections are its successor's now, to whom the node is as slow.
    let newcomer = service.client();
    let plain = [("content-type", "")];
    let answer = newcomer.send_with(Method::GET, "/.well-known/mimi/ds-domain", &plain, "").await.unwrap();
    assert_eq!(answer.status, 200);
    are_answered(&ds, requests).await;
    assert!(service.process.ended().await.success());
    assert_eq!(service.process.pids(), [new]);
    assert_eq!(ds.complete(), 2, "each once");
}

// === systemd ===

#[tokio::test]
async fn systemd_is_told_who_is_ready() {
    let ds = Ds::start().await;
    let mut service = Service::start(Path::new(binary()), &under_load(&ds)).await;
    let new = service.upgrade(service.process.pid()).await;
    assert!(service.process.ended().await.success());
    service.serves().await;
    // The end of the old one is not that of the service.
    assert!(!service.says_that_it_stops(), "{:?}", service.heard);
    signal(new, "-TERM");
    while !service.says_that_it_stops() {
        service.hear().await;
    }
    until("the successor ends", || service.process.pids().is_empty()).await;
    assert!(client(service.addr).send(Method::GET, "/", "").await.is_err(), "nobody listens any more");
}

// === Successors that are no good ===

/// Puts a program in the place of another, whole.
fn put(program: &Path, make: impl FnOnce(&Path)) {
    let beside = program.with_extension("new");
    make(&beside);
    std::fs::rename(&beside, program).unwrap();
}

/// The gateway itself. A copy is made by another process: none of ours is then found to have a program open for writing.
fn gateway(at: &Path) {
    if std::fs::hard_link(binary(), at).is_err() {
        assert!(Command::new("cp").arg(binary()).arg(at).status().unwrap().success());
    }
}

fn file(content: &'static str, mode: u32) -> impl FnOnce(&Path) {
    move |at: &Path| {
        std::fs::write(at, content).unwrap();
        std::fs::set_permissions(at, std::fs::Permissions::from_mode(mode)).unwrap();
    }
}

#[tokio::test]
async fn a_successor_that_is_no_good_changes_nothing() {
    let ds = Ds::start().await;
    let place = tempfile::tempdir().unwrap();
    let program: PathBuf = place.path().join("moh-gateway");
    put(&program, gateway);
    let mut service = Service::start(&program, &under_load(&ds)).await;
    let old = service.process.pid();
    let kept = [service.client().http1(), service.client().http2()];
    let config = service.process.dir.path().join("gateway.toml");
    let good = std::fs::read_to_string(&config).unwrap();
    let errors = |service: &Service| service.process.stderr().lines().filter(|line| line.contains("ERROR")).count();
    let broken: [&dyn Fn(); 5] = [
        &|| std::fs::write(&config, "[oh no").unwrap(),
        // It can be read, and a file that it names cannot.
        &|| std::fs::write(&config, good.replace("client_ca = \"ca.pem\"", "client_ca = \"nowhere\"")).unwrap(),
        &|| {
            std::fs::write(&config, &good).unwrap();
            put(&program, file("#!/bin/sh\nexit 1\n", 0o755));
        },
        &|| put(&program, file("this is no program", 0o755)),
        &|| std::fs::remove_file(&program).unwrap(),
    ];
    for (n, break_it) in broken.iter().enumerate() {
        for client in &kept {
            assert_eq!(client.send(Method::POST, "/group_operation", send_message()).await.unwrap().status, 200);
        }
        break_it();
        let before = errors(&service);
        signal(old, "-USR2");
        until(&format!("it says why not, for the {n}th time"), || errors(&service) > before).await;
        until("nobody else is left", || service.process.pids() == [old]).await;
        service.serves().await;
    }
    for client in &kept {
        assert_eq!(client.send(Method::POST, "/group_operation", send_message()).await.unwrap().status, 200);
        assert_eq!(client.connections(), 1, "not even a connection was lost");
    }
    assert!(!service.says_that_it_stops());

    put(&program, gateway);
    let new = service.upgrade(old).await;
    assert!(service.process.ended().await.success());
    assert_eq!(service.process.pids(), [new]);
    service.serves().await;
}

// === SIGTERM ===

#[tokio::test]
async fn sigterm_ends_what_is_idle_and_waits_for_the_rest() {
    let ds = Ds::start().await;
    let setup = Setup { timeouts: "shutdown = \"60s\"", ..under_load(&ds) };
    let mut service = Service::start(Path::new(binary()), &setup).await;
    let (http1, http2) = (idle_http1(service.addr).await, idle_http2(service.addr).await);
    let requests = under_way(&ds, service.addr).await;
    signal(service.process.pid(), "-TERM");
    is_closed(http1).await;
    goes_away(http2).await;
    assert_eq!(service.process.pids(), [service.process.pid()], "it waits for its requests");
    are_answered(&ds, requests).await;
    let began = Instant::now();
    assert!(service.process.ended().await.success());
    assert!(began.elapsed() < Duration::from_secs(5), "nothing was left: {:?}", began.elapsed());
}

#[tokio::test]
async fn sigterm_is_the_end_at_once_where_nothing_is_under_way() {
    let ds = Ds::start().await;
    for connections in [false, true] {
        let setup = Setup { timeouts: "shutdown = \"60s\"", ..under_load(&ds) };
        let mut service = Service::start(Path::new(binary()), &setup).await;
        let idle = match connections {
            true => Some((idle_http1(service.addr).await, idle_http2(service.addr).await)),
            false => None,
        };
        let began = Instant::now();
        signal(service.process.pid(), "-TERM");
        assert!(service.process.ended().await.success());
        let took = began.elapsed();
        assert!(took < Duration::from_secs(5), "idle connections, {connections}: {took:?}");
        if let Some((http1, http2)) = idle {
            is_closed(http1).await;
            goes_away(http2).await;
        }
    }
}

#[tokio::test]
async fn sigterm_waits_no_longer_than_it_is_to() {
    let ds = Ds::start().await;
    let setup = Setup { timeouts: "shutdown = \"2s\"", ..under_load(&ds) };
    let mut service = Service::start(Path::new(binary()), &setup).await;
    let requests = under_way(&ds, service.addr).await;
    let began = Instant::now();
    signal(service.process.pid(), "-TERM");
    assert!(service.process.ended().await.success());
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(1900), "they had their time: {took:?}");
    assert!(took < Duration::from_secs(8), "and no more: {took:?}");
    for answer in requests.join_all().await {
        let answer = answer.map(|response| response.status);
        assert!(!matches!(answer, Ok(StatusCode::OK)), "the node has not answered");
    }
}
