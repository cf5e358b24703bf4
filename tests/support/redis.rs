//! Real Redis for tests: a server, one with TLS and a limited user, a cluster of three, and a proxy in front that loses,
//! delays and refuses. They need `redis-server` and `redis-cli` (7.0 or newer) on the PATH.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::pki::Ca;
use super::program::own_ip;

/// What the user of [`Redis::start_tls`] may do. 7.0 has no `client|setinfo` and would refuse to start with it.
const LIMITED_USER: &[&str] = &["~moh:*", "+evalsha", "+eval", "+ping", "+hello", "+time", "+mget", "+set", "+del"];

/// How much a direction of a [`FaultProxy`] keeps before it stops reading.
const QUEUE: usize = 4 << 20;

/// A port that no one else is given, free together with the one 10 000 above, which is the bus of a cluster's node.
/// Both are below the ephemeral ports, so that nothing takes them while a server is down.
fn free_port() -> SocketAddr {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let bind = |port: u16| std::net::TcpListener::bind((own_ip(), port));
    loop {
        let port = rand::random_range(10_000..20_000);
        let free = (bind(port), bind(port + 10_000));
        if free.0.is_ok() && free.1.is_ok() && GIVEN.lock().unwrap().insert(port) {
            return SocketAddr::from((own_ip(), port));
        }
    }
}

/// A running redis-server. It ends with the test.
pub struct Redis {
    addr: SocketAddr,
    /// The server's folder: its log, certificates, a cluster's state.
    dir: tempfile::TempDir,
    args: Vec<String>,
    cli_args: Vec<String>,
    child: Mutex<Child>,
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redis({})", self.addr)
    }
}

impl Redis {
    /// A server for anyone, without a password.
    pub async fn start() -> Redis {
        Redis::start_with(&[]).await
    }

    /// A server with more arguments, such as `--user`. `--requirepass` is given to redis-cli too; what else redis-cli
    /// needs then, it is told by [`Redis::cli_args`].
    pub async fn start_with(more: &[&str]) -> Redis {
        let addr = free_port();
        let mut args = vec!["--port".to_owned(), addr.port().to_string()];
        args.extend(more.iter().map(|&arg| arg.to_owned()));
        let password = more.iter().position(|&arg| arg == "--requirepass").map(|at| more[at + 1].to_owned());
        let cli_args = password.map_or(vec![], |password| vec!["-a".to_owned(), password]);
        Redis::launch(addr, tempfile::tempdir().unwrap(), args, cli_args).await
    }

    /// A server that speaks TLS only, with a certificate of `ca` for localhost, its address and 127.0.0.1. This user may
    /// run a limiter's scripts on keys `moh:*` and no more; redis-cli is a user of its own, which may do anything.
    pub async fn start_tls(ca: &Ca, user: &str, password: &str) -> Redis {
        let (addr, dir) = (free_port(), tempfile::tempdir().unwrap());
        let (chain, key) = ca.issue(&["localhost", &own_ip().to_string(), "127.0.0.1"]).write(dir.path(), "redis");
        let root = ca.write(dir.path(), "ca");
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let (port, secret) = (addr.port().to_string(), format!(">{password}"));
        let (root, chain, key) = (text(&root), text(&chain), text(&key));
        let mut args = vec!["--port", "0", "--tls-port", &port, "--tls-auth-clients", "no"];
        args.extend(["--tls-cert-file", &chain, "--tls-key-file", &key, "--tls-ca-cert-file", &root]);
        args.extend(["--user", "default", "off"]);
        args.extend(["--user", "tests", "on", "nopass", "~*", "&*", "+@all"]);
        args.extend(["--user", user, "on", &secret]);
        args.extend(LIMITED_USER);
        let args = args.into_iter().map(str::to_owned).collect();
        let cli_args = ["--tls", "--cacert", &root, "--user", "tests", "--pass", "any"].map(str::to_owned).to_vec();
        Redis::launch(addr, dir, args, cli_args).await
    }

    async fn launch(addr: SocketAddr, dir: tempfile::TempDir, args: Vec<String>, cli_args: Vec<String>) -> Redis {
        let child = Mutex::new(spawn(addr, dir.path(), &args));
        let redis = Redis { addr, dir, args, cli_args, child };
        redis.wait_until_it_answers().await;
        redis
    }

    /// Where it listens: with TLS if it was started so.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `host:port`, for a URL.
    pub fn url_addr(&self) -> String {
        self.addr.to_string()
    }

    pub fn pid(&self) -> u32 {
        self.child.lock().unwrap().id()
    }

    /// What it wrote.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Stops it as it is: connections stay, the kernel even accepts new ones, and nothing answers.
    pub fn stop(&self) {
        self.signal("-STOP");
        let stat = format!("/proc/{}/stat", self.pid());
        let until = std::time::Instant::now() + Duration::from_secs(5);
        while !std::fs::read_to_string(&stat).unwrap().contains(") T ") {
            assert!(std::time::Instant::now() < until, "it does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lets it go on after [`Redis::stop`].
    pub fn cont(&self) {
        self.signal("-CONT");
    }

    /// Ends it at once, stopped or not; once this returns, connections are refused.
    pub fn kill(&self) {
        let mut child = self.child.lock().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Starts it again with nothing in it, in the same place with the same arguments; ends it before if need be.
    pub async fn restart(&self) {
        self.kill();
        *self.child.lock().unwrap() = spawn(self.addr, self.dir.path(), &self.args);
        self.wait_until_it_answers().await;
    }

    /// What redis-cli is given beside the address, in place of what it was given so far: `-a`, `--tls`, `--user`.
    pub fn cli_args(&mut self, args: &[&str]) {
        self.cli_args = args.iter().map(|&arg| arg.to_owned()).collect();
    }

    /// The answer to a command, by redis-cli; an error is an answer too. Panics if there is none within five seconds.
    pub async fn cli(&self, args: &[&str]) -> String {
        let answer = self.try_cli(args, Duration::from_secs(5)).await;
        answer.unwrap_or_else(|error| panic!("{self:?} {args:?}: {error}"))
    }

    async fn try_cli(&self, args: &[&str], limit: Duration) -> Result<String, String> {
        let (host, port) = (self.addr.ip().to_string(), self.addr.port().to_string());
        let output = tokio::process::Command::new("redis-cli")
            .args(["-h", &host, "-p", &port])
            .args(&self.cli_args)
            .args(args)
            .env_remove("REDISCLI_AUTH")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(limit, output).await.map_err(|_| "no answer".to_owned())?.unwrap();
        let text = |octets: &[u8]| String::from_utf8_lossy(octets).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// How many commands it has run. Those that scripts call count, and so do redis-cli's: each reading adds one to the
    /// next, or two where redis-cli logs in.
    pub async fn commands_processed(&self) -> u64 {
        field(&self.cli(&["INFO", "stats"]).await, "total_commands_processed:").unwrap()
    }

    /// How often it has run this command (`evalsha`, `script|load`), by scripts too; those that failed count, those
    /// that were refused do not.
    pub async fn calls_of(&self, command: &str) -> u64 {
        let stats = self.cli(&["INFO", "commandstats"]).await;
        field(&stats, &format!("cmdstat_{}:calls=", command.to_lowercase())).unwrap_or(0)
    }

    fn signal(&self, signal: &str) {
        let mut child = self.child.lock().unwrap();
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
    }

    async fn wait_until_it_answers(&self) {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            // A refusal without a password is an answer.
            let answer = self.try_cli(&["PING"], Duration::from_secs(1)).await;
            if answer.as_ref().is_ok_and(|answer| !answer.starts_with("LOADING")) {
                return;
            }
            let ended = self.child.lock().unwrap().try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < until, "{ended:?}, {answer:?}: {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SIGKILL ends a stopped process too.
        let _ = child.kill();
        let _ = child.wait();
        if std::thread::panicking() {
            eprintln!("--- the log of {self:?}:\n{}", self.log());
        }
    }
}

fn spawn(addr: SocketAddr, dir: &Path, args: &[String]) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
    Command::new("redis-server")
        .args(["--bind", &addr.ip().to_string(), "--protected-mode", "no", "--daemonize", "no"])
        .args(["--save", "", "--appendonly", "no", "--loglevel", "warning", "--dir"])
        .arg(dir)
        .args(args)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// The number after `name` at the start of a line.
fn field(info: &str, name: &str) -> Option<u64> {
    let value = info.lines().find_map(|line| line.strip_prefix(name))?;
    value.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// A Redis Cluster of three masters, without replicas.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Redis>,
}

impl Cluster {
    /// Returns once every node says that the cluster is well: after two seconds or so. A node that is lost for two
    /// seconds makes the others answer `CLUSTERDOWN` until some seconds after it is back.
    pub async fn start() -> Cluster {
        Cluster::start_with(&[]).await
    }

    /// As [`Cluster::start`], with more arguments for each node.
    pub async fn start_with(more: &[&str]) -> Cluster {
        let ip = own_ip().to_string();
        // A node's own guess of its address is that of an outgoing connection: 127.0.0.1.
        let mut args = vec!["--cluster-enabled", "yes", "--cluster-announce-ip", &ip, "--cluster-node-timeout", "2000"];
        args.extend(more);
        let nodes = tokio::join!(Redis::start_with(&args), Redis::start_with(&args), Redis::start_with(&args));
        let cluster = Cluster { nodes: vec![nodes.0, nodes.1, nodes.2] };
        let slots = [("0", "5460"), ("5461", "10922"), ("10923", "16383")];
        for (i, (first, last)) in slots.into_iter().enumerate() {
            cluster.expect_ok(i, &["CLUSTER", "SET-CONFIG-EPOCH", &(i + 1).to_string()]).await;
            cluster.expect_ok(i, &["CLUSTER", "ADDSLOTSRANGE", first, last]).await;
        }
        for (i, j) in [(0, 1), (0, 2), (1, 2)] {
            let port = cluster.nodes[j].addr().port().to_string();
            cluster.expect_ok(i, &["CLUSTER", "MEET", &ip, &port]).await;
        }
        cluster.wait_until_well().await;
        cluster
    }

    /// Waits until every node says that the cluster is well: after [`Redis::restart`] or [`Redis::cont`] of one too.
    pub async fn wait_until_well(&self) {
        let until = Instant::now() + Duration::from_secs(20);
        for node in &self.nodes {
            loop {
                let info = node.cli(&["CLUSTER", "INFO"]).await;
                if info.contains("cluster_state:ok") && field(&info, "cluster_known_nodes:") == Some(3) {
                    break;
                }
                assert!(Instant::now() < until, "{node:?}: {info}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }

    pub fn addrs(&self) -> Vec<SocketAddr> {
        self.nodes.iter().map(Redis::addr).collect()
    }

    /// A node, to stop or to count.
    pub fn node(&self, i: usize) -> &Redis {
        &self.nodes[i]
    }

    /// [`Redis::cli`] of a node. It does not follow `MOVED`, unless `-c` comes first.
    pub async fn cli(&self, i: usize, args: &[&str]) -> String {
        self.nodes[i].cli(args).await
    }

    async fn expect_ok(&self, i: usize, args: &[&str]) {
        assert_eq!(self.cli(i, args).await, "OK", "{args:?}");
    }
}

/// What a [`FaultProxy`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Copies.
    Pass,
    /// A partition: connections stay up, new ones too, and nothing passes, not even an end. What was under way is lost;
    /// the connections that lost octets are closed when it is over.
    Blackhole,
    /// What the server sends arrives so much later: latency, with the throughput as before.
    Delay(Duration),
    /// Connections are closed, new ones at once.
    Refuse,
}

/// A TCP proxy, by default one that copies. It ends with its connections when it is dropped.
#[derive(Debug)]
pub struct FaultProxy {
    addr: SocketAddr,
    state: watch::Sender<State>,
    accepted: Arc<AtomicUsize>,
    acceptor: JoinHandle<()>,
}

#[derive(Debug, Clone, Copy)]
struct State {
    mode: Mode,
    /// How often connections were to be closed: a connection that sees another number than at its start is one of them.
    cuts: usize,
}

impl FaultProxy {
    /// A proxy on a port of its own, at the address that certificates of [`Redis::start_tls`] are for.
    pub async fn start(target: SocketAddr) -> FaultProxy {
        let listener = TcpListener::bind((own_ip(), 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (state, watched) = watch::channel(State { mode: Mode::Pass, cuts: 0 });
        let accepted = Arc::new(AtomicUsize::new(0));
        let acceptor = tokio::spawn(accept(listener, target, watched, accepted.clone()));
        FaultProxy { addr, state, accepted, acceptor }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on it does this.
    pub fn set(&self, mode: Mode) {
        self.state.send_modify(|state| {
            state.mode = mode;
            state.cuts += usize::from(mode == Mode::Refuse);
        });
    }

    /// How many connections were accepted, those that were closed at once included.
    pub fn connections(&self) -> usize {
        self.accepted.load(SeqCst)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        // The connections end with the sender of their state.
        self.acceptor.abort();
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, state: watch::Receiver<State>, accepted: Arc<AtomicUsize>) {
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        accepted.fetch_add(1, SeqCst);
        let State { mode, cuts } = *state.borrow();
        if mode != Mode::Refuse {
            tokio::spawn(connection(client, target, state.clone(), cuts));
        }
    }
}

/// One connection: the server hears of it once the partition is over, if there is one.
async fn connection(mut client: TcpStream, target: SocketAddr, mut state: watch::Receiver<State>, cuts: usize) {
    let _ = client.set_nodelay(true);
    if !outlasts_the_partition(&mut client, &mut state, cuts).await {
        return;
    }
    let Ok(mut server) = TcpStream::connect(target).await else { return };
    let _ = server.set_nodelay(true);
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    // The end of either direction is the end of both: Redis and its clients close no half.
    tokio::select! {
        () = pump(from_client, to_server, state.clone(), cuts, false) => {}
        () = pump(from_server, to_client, state, cuts, true) => {}
    }
}

/// Waits for the end of a partition in which the connection began, and says whether it lost nothing.
async fn outlasts_the_partition(client: &mut TcpStream, state: &mut watch::Receiver<State>, cuts: usize) -> bool {
    let (mut lost, mut ended, mut buffer) = (false, false, [0; 4096]);
    loop {
        let now = *state.borrow_and_update();
        if now.cuts != cuts || now.mode != Mode::Blackhole {
            return now.cuts == cuts && !lost;
        }
        tokio::select! {
            biased;
            changed = state.changed() => if changed.is_err() {
                return false;
            },
            read = client.read(&mut buffer), if !ended => match read {
                Ok(1..) => lost = true,
                _ => ended = true,
            },
        }
    }
}

/// One direction of a connection. Returns when the connection is over.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut state: watch::Receiver<State>,
    cuts: usize,
    from_server: bool,
) {
    let mut queue: VecDeque<(Instant, Bytes)> = VecDeque::new();
    let (mut queued, mut lost, mut ended, mut buffer) = (0, false, false, vec![0; 16 << 10]);
    loop {
        // In this order: what is read or due after a change is dealt with as the change wants it.
        tokio::select! {
            biased;
            changed = state.changed() => {
                let now = *state.borrow_and_update();
                if changed.is_err() || now.cuts != cuts || (lost && now.mode != Mode::Blackhole) {
                    return;
                }
                if now.mode == Mode::Blackhole {
                    lost |= !queue.is_empty();
                    queue.clear();
                    queued = 0;
                }
            }
            written = deliver(&mut to, queue.front()) => {
                let Ok(written) = written else { return };
                queued -= written;
                if let Some((_, octets)) = queue.front_mut() {
                    octets.advance(written);
                }
                queue.pop_front_if(|(_, octets)| octets.is_empty());
            }
            read = from.read(&mut buffer), if !ended && queued < QUEUE => {
                let mode = state.borrow().mode;
                match (read, mode) {
                    (Ok(0) | Err(_), _) => ended = true,
                    (Ok(_), Mode::Blackhole) => lost = true,
                    (Ok(n), mode) => {
                        let delay = if let Mode::Delay(delay) = mode && from_server { delay } else { Duration::ZERO };
                        queue.push_back((Instant::now() + delay, Bytes::copy_from_slice(&buffer[..n])));
                        queued += n;
                    }
                }
            }
        }
        if ended && queue.is_empty() && state.borrow().mode != Mode::Blackhole {
            return;
        }
    }
}

/// Writes as much as it can of what comes next, once it is due. Nothing is written if this is given up.
async fn deliver(to: &mut WriteHalf<'_>, next: Option<&(Instant, Bytes)>) -> io::Result<usize> {
    let Some((due, octets)) = next else { return std::future::pending().await };
    // The timer's grain is a millisecond: only what is delayed goes through it.
    if *due > Instant::now() {
        tokio::time::sleep_until(*due).await;
    }
    to.write(octets).await
}
