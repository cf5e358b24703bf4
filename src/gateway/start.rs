//! From a configuration to a running server, and from SIGTERM to its end.

use super::connections::Connections;
use super::download::Downloads;
use super::egress::Egress;
use super::forward::NodeTlsForms;
use super::live::{Live, LiveEgress, Tls};
use super::reload::{Fixed, Stores};
use super::threads::{Seat, Threads};
use super::upgrade::{From, Signals, Successor, Upgrade};
use super::{Gateway, Shared, admin, door, egress, reload, upgrade};
use crate::admission::Admission;
use crate::config::Config;
use crate::forward::Clients;
use crate::limiter::Limiter;
use crate::limiter::fleet::{self, Fleet};
use crate::limiter::memory::Memory;
use crate::privacypass::{self, Origin};
use crate::telemetry::{AccessLog, Metrics};
use crate::tls;
use crate::upstream::{Nodes, Observer};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use parking_lot::Mutex;
use pingora_core::listeners::{L4BufferSettings, ListenerConfig};
use pingora_core::server::configuration::{Opt, ServerConf};
use pingora_core::server::{ExecutionPhase, RunArgs, Server, ShutdownWatch};
use pingora_core::services::background::{BackgroundService, background_service};
use pingora_core::services::listening::Service;
use sd_notify::NotifyState;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

/// Why the gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// TLS cannot be set up.
    #[error("TLS: {0}")]
    Tls(#[from] tls::Error),
    /// Metrics cannot be registered.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The access log cannot be opened.
    #[error("access log: {0}")]
    AccessLog(std::io::Error),
    /// An address cannot be listened at.
    #[error("{0}: {1}")]
    Listen(std::net::SocketAddr, std::io::Error),
    /// There is no memory for limits, their store cannot be begun with, or signals cannot be listened for.
    #[error("{0}: {1}")]
    Io(&'static str, std::io::Error),
    /// The door to other providers cannot be made.
    #[error("egress: {0}")]
    Egress(String),
    /// Downloads cannot be made.
    #[error("proxy_download: {0}")]
    Download(String),
    /// The successor ended, and this process has given it the listening sockets.
    #[error("the successor has ended")]
    Successor,
    /// The system gives no randomness.
    #[error("the system gives no randomness")]
    Randomness,
}

/// Runs a gateway until it is told to stop: SIGTERM lets the requests under way end first, SIGINT does not. SIGHUP has the
/// configuration in `file` read again; SIGUSR2 starts a successor, which takes over the listening sockets. `from` is what this
/// process was told if it is one itself.
///
/// # Errors
/// [`StartError`].
pub fn run(config: Config, file: &Path, from: Option<&From>) -> std::result::Result<(), StartError> {
    upgrade::outlive_signals().map_err(|e| StartError::Io("signals", e))?;
    warn_of_descriptors(&config);
    let upgrade = Upgrade::new(file, addresses(&config), from).map_err(|e| StartError::Io("upgrade", e))?;
    let (fixed, stores) = (Fixed::of(&config), Stores::of(&config));
    let (asker, asked) = (reload::Later::default(), config.admin);
    let (server, shared) = server(config, &upgrade, from, asker.clone())?;
    let reloads = reload::start(file.into(), shared.clone(), fixed, stores).map_err(|e| StartError::Io("SIGHUP", e))?;
    let _ = asker.set(reloads);
    let phases = server.watch_execution_phase();
    let (draining, socket, successor) = (shared.clone(), upgrade.socket.clone(), upgrade.successor.clone());
    let of_watch = successor.clone();
    std::thread::spawn(move || watch(phases, &draining, asked, &socket, &of_watch));
    server.run(RunArgs { shutdown_signal: Box::new(Signals(upgrade)) });
    shared.access_log.close();
    if shared.succeeded.load(Ordering::Relaxed) && upgrade::has_failed(&successor) {
        return Err(StartError::Successor);
    }
    Ok(())
}

/// All addresses that are listened at.
fn addresses(config: &Config) -> Vec<SocketAddr> {
    let egress = config.egress.as_ref().map(|egress| egress.address);
    config.listeners.iter().map(|listener| listener.address).chain(egress).chain([config.admin]).collect()
}

/// Says so where the system gives fewer descriptors than connections may take: each has one, and one to a node.
fn warn_of_descriptors(config: &Config) {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft: Option<u64> = files.and_then(|line| line.split_whitespace().next()?.parse().ok());
    let wanted = u64::from(config.connections.max) * 2;
    if let Some(soft) = soft.filter(|soft| *soft < wanted) {
        tracing::warn!(
            "{soft} open files are the most here, and {} connections may take twice as many: LimitNOFILE= in systemd, ulimit -n; \
             or a smaller connections.max",
            config.connections.max
        );
    }
}

/// Tells systemd what it waits for, and ends the process once it has been told to stop and no connection is left; Pingora
/// would wait for all of its grace period, however little there is to wait for. At the end of that, `run` returns and the
/// process ends all the same.
fn watch(
    mut phases: Receiver<ExecutionPhase>,
    shared: &Shared,
    admin: SocketAddr,
    socket: &Path,
    successor: &Successor,
) {
    let mut succeeded = false;
    loop {
        match phases.blocking_recv() {
            Ok(ExecutionPhase::Running) => say_ready(shared, admin),
            Ok(ExecutionPhase::GracefulUpgradeCloseTimeout) => {
                succeeded = true;
                shared.succeeded.store(true, Ordering::Relaxed);
            }
            Ok(ExecutionPhase::ShutdownGracePeriod) => break,
            Ok(ExecutionPhase::GracefulTerminate) => shared.draining.store(true, Ordering::Relaxed),
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
    upgrade::clean(socket);
    if !succeeded {
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
    }
    tracing::info!(requests = shared.metrics.in_flight.get(), "stopping: requests under way may end");
    shared.draining.store(true, Ordering::Relaxed);
    // A connection is closed once all that HTTP/2 was given to send is sent; a request has ended before that.
    let is_busy =
        || shared.connections.count() > 0 || shared.metrics.connections.get() > 0 || shared.metrics.in_flight.get() > 0;
    // With a successor nobody waits for this process: what is under way may end, however long it may take.
    let until = Instant::now() + shared.live.load().timeouts.shutdown;
    let mut quiet = 0;
    // One that was accepted a moment ago is not counted yet.
    while quiet < 10 && (succeeded || Instant::now() < until) {
        quiet = if is_busy() { 0 } else { quiet + 1 };
        std::thread::sleep(Duration::from_millis(10));
    }
    let failed = succeeded && upgrade::has_failed(successor);
    Origin::settle_all();
    shared.access_log.close();
    std::process::exit(i32::from(failed));
}

/// `READY=1` and `MAINPID`, once all listeners accept: a successor is then the service.
fn say_ready(shared: &Shared, admin: SocketAddr) {
    let mut at = admin;
    if at.ip().is_unspecified() {
        at.set_ip(if at.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    }
    let until = Instant::now() + Duration::from_secs(10);
    let opens = || {
        shared.opening.load(Ordering::Relaxed) > 0
            || std::net::TcpStream::connect_timeout(&at, Duration::from_secs(1)).is_err()
    };
    while opens() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
    let status = NotifyState::Status("generation 1 of the configuration");
    let _ = sd_notify::notify(&[NotifyState::MainPid(std::process::id()), NotifyState::Ready, status]);
    tracing::info!("ready");
}

impl Shared {
    /// Once no connection is accepted any more: leaves those that are kept for a further request time for it, which is answered
    /// with `connection: close`. To close one at once would be to lose a request that is on its way. With a successor
    /// there is more time: nobody waits for this process to end.
    pub(super) async fn leave_time(&self) {
        self.draining.store(true, Ordering::Relaxed);
        let half = self.live.load().timeouts.shutdown / 2;
        let most = if self.succeeded.load(Ordering::Relaxed) { half } else { half.min(Duration::from_secs(1)) };
        let until = Instant::now() + most;
        while self.connections.count() > 0 && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.connections.close_all();
    }

    /// Metrics of the store of a fleet, which may come with a reload.
    pub(super) fn store_metrics(&self) -> std::result::Result<fleet::Metrics, prometheus::Error> {
        once(&self.store_metrics, || self.metrics.store())
    }

    /// Metrics of the Origin, which may come with a reload.
    pub(super) fn privacy_pass_metrics(&self) -> std::result::Result<privacypass::Metrics, prometheus::Error> {
        once(&self.privacy_pass_metrics, || self.metrics.privacy_pass())
    }
}

/// Metrics that are registered when they are first asked for, which only the start and reloads do: one after the other.
fn once<T: Clone, E>(
    metrics: &OnceLock<T>,
    register: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    if let Some(known) = metrics.get() {
        return Ok(known.clone());
    }
    let registered = register()?;
    Ok(metrics.get_or_init(|| registered).clone())
}

/// Metrics of what becomes of nodes.
struct NodeMetrics {
    metrics: Metrics,
    /// The nodes there are.
    known: Mutex<Vec<String>>,
}

impl Observer for NodeMetrics {
    fn ejected(&self, node: &str, why: &'static str) {
        self.metrics.ejections.with_label_values(&[node]).inc();
        tracing::warn!(%node, why, "a Delivery Service node is left out");
    }

    fn returned(&self, node: &str) {
        tracing::info!(%node, "a Delivery Service node is back");
    }

    fn healthy(&self, node: &str, healthy: bool) {
        self.metrics.node_healthy.with_label_values(&[node]).set(i64::from(healthy));
        if healthy {
            tracing::info!(%node, "a Delivery Service node is healthy");
        } else {
            tracing::warn!(%node, "a Delivery Service node is not healthy, and left out");
        }
    }

    fn members(&self, labels: &[String]) {
        self.metrics.nodes.set(i64::try_from(labels.len()).unwrap_or(i64::MAX));
        let mut known = self.known.lock();
        for gone in known.iter().filter(|label| !labels.contains(label)) {
            let _ = self.metrics.node_healthy.remove_label_values(&[gone.as_str()]);
        }
        for new in labels.iter().filter(|label| !known.contains(label)) {
            self.metrics.node_healthy.with_label_values(&[new.as_str()]).set(1);
        }
        *known = labels.to_vec();
    }
}

/// Resolves nodes again, checks them, and closes connections to them that nobody needs.
struct NodeKeeper(Arc<Shared>);

/// Between two looks at connections that are kept.
const SWEEP: Duration = Duration::from_secs(1);

#[async_trait]
impl BackgroundService for NodeKeeper {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        tokio::select! {
            () = self.0.nodes.clone().run() => {}
            () = keep_sweeping(&self.0) => {}
            _ = shutdown.changed() => {}
        }
    }
}

async fn keep_sweeping(shared: &Shared) {
    loop {
        tokio::time::sleep(SWEEP).await;
        shared.clients.sweep();
    }
}

fn server(
    mut config: Config,
    upgrade: &Upgrade,
    from: Option<&From>,
    reloads: reload::Later,
) -> std::result::Result<(Server, Arc<Shared>), StartError> {
    // Pingora panics where it cannot bind; said before, it is an error. What is in use may be the predecessor's.
    let egress = config.egress.as_ref().map(|egress| egress.address);
    let is_inherited = |address: &SocketAddr| from.is_some_and(|from| from.addresses.contains(address));
    for address in addresses(&config).into_iter().filter(|address| !is_inherited(address)) {
        std::net::TcpListener::bind(address).map_err(|e| StartError::Listen(address, e))?;
    }
    let addresses: Vec<_> = config.listeners.iter().map(|l| l.address).collect();
    let metrics = Metrics::new(&config.peers.named)?;
    // For what makes its own TLS configuration: a cluster's connections to the store of limits.
    let _ = tls::provider().install_default();
    let counters = metrics.limits(&config.policy);
    metrics.generation.set(1);
    let memory = Memory::new(config.limit_memory, metrics.limits_overflowed.clone());
    let memory = memory.map_err(|e| StartError::Io("limits.memory", e))?;
    let store_metrics = OnceLock::new();
    let (fleet, secret) = match config.limit_store.clone() {
        Some((settings, secret)) => {
            let of_store = once(&store_metrics, || metrics.store())?;
            let fleet = Fleet::start(settings, of_store).map_err(|e| StartError::Io("limits.redis", e))?;
            fleet.begin();
            (Some(Arc::new(fleet)), secret)
        }
        None => (None, crate::config::random().ok_or(StartError::Randomness)?),
    };
    let privacy_pass_metrics = OnceLock::new();
    let privacy_pass = match config.privacy_pass.take() {
        Some(settings) => {
            let metrics = once(&privacy_pass_metrics, || metrics.privacy_pass())?;
            let origin = Origin::start(settings, fleet.clone(), metrics);
            Some(Arc::new(origin.map_err(|e| StartError::Io("privacy_pass", e))?))
        }
        None => None,
    };
    let limiter = Arc::new(Limiter::new(memory, fleet.clone().filter(|fleet| fleet.keeps_limits())));
    let admission = Arc::new(Admission::new(config.policy.clone(), limiter, secret, counters));
    let own_secret = crate::config::random().ok_or(StartError::Randomness)?;
    let tls = Arc::new(Tls::new(&config, own_secret)?);
    let egress_door = LiveEgress::new(&config, None).map_err(|e| StartError::Egress(e.to_string()))?;
    let downloads = Downloads::of(config.proxy_download.as_ref(), None);
    let downloads = downloads.map_err(|e| StartError::Download(e.to_string()))?;
    let access_log = AccessLog::open(&config.access_log).map_err(StartError::AccessLog)?;
    let nodes = Nodes::new(
        config.upstream.clone(),
        Arc::new(NodeMetrics { metrics: metrics.clone(), known: Mutex::default() }),
    );
    resolve(&nodes)?;
    let (threads, admin) = (config.threads, config.admin);
    let timeouts = config.timeouts;
    // As long as any request may take; `watch` ends the process before, unless there is a successor.
    let download = config.proxy_download.as_ref().map(|download| download.within).unwrap_or_default();
    let longest = timeouts.shutdown.max(timeouts.body_total + config.upstream.read_timeout * 2).max(download);
    let live = Live::new(config, admission, privacy_pass, fleet, tls, egress_door, downloads);
    let shared = Arc::new(Shared {
        live: ArcSwap::from_pointee(live),
        nodes: nodes.clone(),
        node_tls: NodeTlsForms::default(),
        clients: Clients::new(),
        connections: Connections::default(),
        privacy_pass_metrics,
        store_metrics,
        own_secret,
        access_log,
        metrics,
        draining: AtomicBool::new(false),
        succeeded: AtomicBool::new(false),
        threads: tokio::sync::watch::Sender::new(threads),
        opening: Arc::default(),
    });

    let conf = ServerConf {
        // By this Pingora sizes its pools; services that only wait have one, those of listeners others ([`Threads`]).
        threads,
        work_stealing: false,
        grace_period_seconds: Some(longest.as_secs().max(1)),
        graceful_shutdown_timeout_seconds: Some(1),
        upgrade_sock: upgrade.socket.display().to_string(),
        ..ServerConf::default()
    };
    let options = Opt { upgrade: from.is_some(), ..Opt::default() };
    let mut server = Server::new_with_opt_and_conf(options, conf);
    for address in addresses {
        let door = door::Door { rules: Arc::new(Gateway(shared.clone())), address, shared: shared.clone() };
        let listen = |service: &mut Service<Seat<door::Door>>, address: &str| {
            // rustls has buffers of its own, of the size of its records.
            let buffers = L4BufferSettings::unbuffered();
            service.add_listener(ListenerConfig::tcp(address.to_owned()).l4_buffer(buffers));
        };
        let name = format!("federation {address}");
        let service = Threads::new(name, address, door, listen, shared.threads.subscribe(), &shared.opening);
        server.add_service(service.map_err(|e| StartError::Io("runtime.threads", e))?);
    }
    if let Some(address) = egress {
        let door = egress::EgressDoor { rules: Arc::new(Egress(shared.clone())), address, shared: shared.clone() };
        let listen = |service: &mut Service<Seat<egress::EgressDoor>>, address: &str| {
            let buffers = L4BufferSettings::unbuffered();
            service.add_listener(ListenerConfig::tcp(address.to_owned()).l4_buffer(buffers));
        };
        let name = format!("egress {address}");
        let service = Threads::new(name, address, door, listen, shared.threads.subscribe(), &shared.opening);
        server.add_service(service.map_err(|e| StartError::Io("runtime.threads", e))?);
    }
    let mut keeper = background_service("nodes", NodeKeeper(shared.clone()));
    keeper.threads = Some(1);
    server.add_service(keeper);
    let mut service = Service::new("admin".to_owned(), admin::Admin { shared: shared.clone(), reloads });
    service.threads = Some(1);
    service.add_tcp(&admin.to_string());
    server.add_service(service);
    // A successor gets the listening sockets here: all that may fail has been done, for its predecessor goes then.
    server.bootstrap();
    Ok((server, shared))
}

/// Nodes that are named are resolved before there are requests.
fn resolve(nodes: &Arc<Nodes>) -> std::result::Result<(), StartError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| StartError::Io("nodes", e))?;
    runtime.block_on(nodes.resolve_now());
    // Not to wait for an answer of the system's that does not come.
    runtime.shutdown_background();
    Ok(())
}
