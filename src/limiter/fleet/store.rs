//! The connections to the store, and who keeps them: a task that connects, asks the store whether it answers, and connects
//! anew when it does not.
//!
//! A connection is dropped rather than waited for: a partition may have left it a time-out of the system's that is longer
//! than the trouble. What a frozen store has been sent before that, it may still do when it goes on; that charges a limit
//! for requests which were decided otherwise, and never the reverse.

use super::breaker::Breaker;
use super::{Metrics, Settings, Shared};
use arc_swap::ArcSwapOption;
use redis::aio::MultiplexedConnection;
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{Route, RoutingInfo, SingleNodeRoutingInfo, SlotAddr};
use redis::{Cmd, ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo, ServerErrorKind, Value};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Pause before the next attempt to connect.
const PAUSE: Duration = Duration::from_millis(100);

/// An attempt to connect is given up after this.
const CONNECT: Duration = Duration::from_millis(250);

/// What is said of who is not heard from.
const LATE: &str = "it does not answer in time";

/// Between questions whether a store still answers.
const WATCH: Duration = Duration::from_millis(500);

/// Requests that may be with the store at once: what it has not answered is remembered until it does.
const IN_FLIGHT: usize = 8192;

/// The store does not answer, or not in time, or with an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone {
    /// It was asked, and may do it yet.
    pub asked: bool,
}

impl Gone {
    /// It was not even asked.
    pub(super) const UNASKED: Self = Self { asked: false };
}

/// A script, as the store knows it and as we do.
#[derive(Debug)]
pub(super) struct Script {
    source: &'static str,
    hash: String,
}

/// A connection.
#[derive(Clone)]
enum Link {
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
}

/// The store.
pub(super) struct Remote {
    settings: Settings,
    links: ArcSwapOption<Vec<Link>>,
    next: AtomicUsize,
    permits: Semaphore,
    pub(super) breaker: Breaker,
    pub(super) metrics: Metrics,
}

/// What a script is called with.
pub(super) struct Call {
    pub(super) keys: Vec<Vec<u8>>,
    pub(super) args: Vec<u8>,
    /// Where in `args` each of them ends.
    pub(super) ends: Vec<usize>,
}

// === impl Script ===

impl Script {
    pub(super) fn new(source: &'static str) -> Self {
        Self { source, hash: redis::Script::new(source).get_hash().to_owned() }
    }

    fn command(&self, by_hash: bool, call: &Call) -> Cmd {
        let mut command = Cmd::new();
        match by_hash {
            true => command.arg("EVALSHA").arg(&self.hash),
            false => command.arg("EVAL").arg(self.source),
        };
        command.arg(call.keys.len());
        call.keys.iter().for_each(|key| {
            command.arg(key);
        });
        let mut from = 0;
        for end in &call.ends {
            command.arg(call.args.get(from..*end).unwrap_or_default());
            from = *end;
        }
        command
    }
}

// === impl Call ===

impl Call {
    pub(super) fn new() -> Self {
        Self { keys: vec![], args: Vec::with_capacity(128), ends: vec![] }
    }

    /// An argument.
    pub(super) fn arg(&mut self, arg: impl std::fmt::Display) {
        use std::io::Write;
        // Writing to a Vec does not fail.
        let _ = write!(self.args, "{arg}");
        self.ends.push(self.args.len());
    }
}

// === impl Remote ===

impl Remote {
    pub(super) fn new(settings: Settings, metrics: Metrics) -> Self {
        let breaker = Breaker::new(metrics.up.clone(), metrics.opened.clone());
        Self {
            settings,
            links: ArcSwapOption::empty(),
            next: AtomicUsize::new(0),
            permits: Semaphore::new(IN_FLIGHT),
            breaker,
            metrics,
        }
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Calls a script, for an answer until `deadline`.
    pub(super) async fn call(&self, script: &Script, call: &Call, deadline: Instant) -> Result<Vec<i64>, Gone> {
        // What is asked when there is no time for an answer would be charged for nothing, and say nothing of the store.
        let time = deadline.saturating_duration_since(Instant::now());
        if self.breaker.is_open() || time < self.settings.timeout / 4 {
            self.metrics.skipped.inc();
            return Err(Gone::UNASKED);
        }
        let link = {
            let links = self.links.load();
            let links = links.as_ref().filter(|links| !links.is_empty()).ok_or(Gone::UNASKED)?;
            links.get(self.next.fetch_add(1, Ordering::Relaxed) % links.len()).cloned().ok_or(Gone::UNASKED)?
        };
        let Ok(_permit) = self.permits.try_acquire() else {
            self.metrics.skipped.inc();
            return Err(Gone::UNASKED);
        };
        let _timer = self.metrics.seconds.start_timer();
        let answer = tokio::time::timeout_at(deadline.into(), ask(link, script, call)).await;
        match answer {
            Ok(Ok(answer)) => {
                self.metrics.ok.inc();
                self.breaker.succeeded();
                Ok(answer)
            }
            Ok(Err(e)) => {
                self.metrics.errors.inc();
                tracing::debug!("the limits' store: {e}");
                match e.is_unrecoverable_error() || e.is_connection_dropped() {
                    true => self.breaker.open(),
                    false => self.breaker.failed(),
                }
                Err(Gone { asked: true })
            }
            Err(_) => {
                self.metrics.timeouts.inc();
                if time > self.settings.timeout / 2 {
                    self.breaker.failed();
                }
                Err(Gone { asked: true })
            }
        }
    }

    /// Keeps the connections, for as long as the process lives.
    pub(super) async fn keep(&self, shared: &Shared) {
        let mut said = false;
        loop {
            let mut drivers = JoinSet::new();
            match self.find_one_that_answers(&mut drivers, shared).await {
                Err(e) => {
                    if !std::mem::replace(&mut said, true) {
                        tracing::warn!(
                            "the limits' store cannot be used: {e}; each limit does as its on_store_failure says"
                        );
                    }
                }
                Ok(links) => {
                    tracing::info!(connections = links.len(), "the limits' store answers");
                    self.links.store(Some(Arc::new(links.clone())));
                    shared.forget();
                    self.breaker.close();
                    let why = self.watch(&links, &mut drivers, shared).await;
                    self.breaker.open();
                    self.links.store(None);
                    tracing::warn!("the limits' store {why}; each limit does as its on_store_failure says");
                    said = true;
                }
            }
            drop(drivers);
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Connects to the cluster, or to the first server that does what requests ask of it: one that is frozen or only a
    /// replica does not.
    async fn find_one_that_answers(&self, drivers: &mut JoinSet<()>, shared: &Shared) -> Result<Vec<Link>, String> {
        let servers = match self.settings.cluster {
            true => vec![None],
            false => self.settings.nodes.iter().map(Some).collect(),
        };
        let mut why = "no node is named".to_owned();
        for server in servers {
            let links = match server {
                None => self.connect_cluster().await.map(|link| vec![link]),
                Some((host, port)) => self.connect(host, *port, drivers).await,
            };
            let answers = match links {
                Ok(links) => self.answers(&links, shared).await.map(|()| links),
                Err(e) => Err(e),
            };
            match answers {
                Ok(links) => return Ok(links),
                Err(e) => why = server.map_or_else(|| e.clone(), |(host, port)| format!("{host}:{port}: {e}")),
            }
            drivers.abort_all();
            while drivers.join_next().await.is_some() {}
        }
        Err(why)
    }

    /// Until the store does not answer any more: how that was noticed.
    async fn watch(&self, links: &[Link], drivers: &mut JoinSet<()>, shared: &Shared) -> &'static str {
        loop {
            let died = async {
                match drivers.is_empty() {
                    true => std::future::pending().await,
                    false => drivers.join_next().await,
                }
            };
            tokio::select! {
                _ = died => return "has closed a connection",
                () = self.breaker.opened() => return "does not answer",
                () = tokio::time::sleep(WATCH) => {
                    if self.answers(links, shared).await.is_err() {
                        return "does not answer";
                    }
                }
            }
        }
    }

    /// Whether the store does what requests ask of it, in the time that they have.
    async fn answers(&self, links: &[Link], shared: &Shared) -> Result<(), String> {
        // They all lead to one server; that one has ended is noticed by itself.
        let Some(link) = links.first() else { return Err("there is no connection".into()) };
        let (script, call) = shared.probe();
        match tokio::time::timeout(self.settings.timeout, ask(link.clone(), script, &call)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(e)) => Err(e.to_string()),
            Err(_) => Err(LATE.into()),
        }
    }

    async fn connect(&self, host: &str, port: u16, drivers: &mut JoinSet<()>) -> Result<Vec<Link>, String> {
        let mut links = vec![];
        while links.len() < self.settings.connections.max(1) {
            match tokio::time::timeout(CONNECT, self.connect_one(host, port, drivers)).await {
                Ok(Ok(link)) => links.push(Link::Single(link)),
                Ok(Err(e)) => return Err(e.to_string()),
                Err(_) => return Err(LATE.into()),
            }
        }
        Ok(links)
    }

    async fn connect_cluster(&self) -> Result<Link, String> {
        match tokio::time::timeout(2 * CONNECT, self.cluster()).await {
            Ok(Ok(link)) => Ok(Link::Cluster(link)),
            Ok(Err(e)) => Err(e.to_string()),
            Err(_) => Err(LATE.into()),
        }
    }

    async fn connect_one(
        &self,
        host: &str,
        port: u16,
        drivers: &mut JoinSet<()>,
    ) -> Result<MultiplexedConnection, Box<dyn std::error::Error + Send + Sync>> {
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        // Our own clock, in `call`, is the one that counts.
        let config = redis::AsyncConnectionConfig::new().set_response_timeout(None).set_pipeline_buffer_size(1024);
        let redis = self.redis_info();
        match &self.settings.tls {
            None => {
                let (link, driver) = MultiplexedConnection::new_with_config(&redis, stream, config).await?;
                drivers.spawn(driver);
                Ok(link)
            }
            Some(tls) => {
                let name = rustls::pki_types::ServerName::try_from(host.to_owned())?;
                let stream = tokio_rustls::TlsConnector::from(tls.config.clone()).connect(name, stream).await?;
                let (link, driver) = MultiplexedConnection::new_with_config(&redis, stream, config).await?;
                drivers.spawn(driver);
                Ok(link)
            }
        }
    }

    fn redis_info(&self) -> RedisConnectionInfo {
        let mut info = RedisConnectionInfo::default().set_skip_set_lib_name();
        if let Some(username) = &self.settings.username {
            info = info.set_username(username);
        }
        if let Some(password) = &self.settings.password {
            info = info.set_password(password);
        }
        info
    }

    async fn cluster(&self) -> redis::RedisResult<ClusterConnection> {
        let settings = &self.settings;
        let nodes: redis::RedisResult<Vec<_>> = settings
            .nodes
            .iter()
            .map(|(host, port)| {
                let address = match &settings.tls {
                    None => ConnectionAddr::Tcp(host.clone(), *port),
                    Some(_) => {
                        ConnectionAddr::TcpTls { host: host.clone(), port: *port, insecure: false, tls_params: None }
                    }
                };
                address.into_connection_info()
            })
            .collect();
        // Nothing is sent twice: a call whose answer was lost may have been done.
        let mut builder = ClusterClient::builder(nodes?)
            .connection_timeout(CONNECT)
            .response_timeout(settings.timeout)
            .retries(0)
            .tcp_settings(redis::io::tcp::TcpSettings::default().set_nodelay(true));
        if let Some(tls) = &settings.tls {
            builder = builder.certs(redis::TlsCertificates { client_tls: None, root_cert: Some(tls.ca_pem.clone()) });
        }
        if let Some(username) = &settings.username {
            builder = builder.username(username.clone());
        }
        if let Some(password) = &settings.password {
            builder = builder.password(password.clone());
        }
        builder.build()?.get_async_connection().await
    }
}

/// Asks over a connection. A store that does not know the script is sent it.
async fn ask(mut link: Link, script: &Script, call: &Call) -> redis::RedisResult<Vec<i64>> {
    let known = link.send(script.command(true, call), call).await;
    match known {
        Err(e) if e.kind() == redis::ErrorKind::Server(ServerErrorKind::NoScript) => {
            link.send(script.command(false, call), call).await
        }
        other => other,
    }
}

impl Link {
    async fn send(&mut self, command: Cmd, call: &Call) -> redis::RedisResult<Vec<i64>> {
        let value = match self {
            Self::Single(link) => link.send_packed_command(&command).await?,
            Self::Cluster(link) => {
                let key = call.keys.first().map_or(&[][..], Vec::as_slice);
                let mut tries = 0;
                loop {
                    let to = SingleNodeRoutingInfo::SpecificNode(Route::with_key(key, SlotAddr::Master));
                    let sent = link.route_command(command.clone(), RoutingInfo::SingleNode(to)).await;
                    match sent {
                        // A slot has moved: the node has done nothing, and the map of slots is being read anew.
                        Err(e) if has_moved(&e) && tries < 5 => {
                            tries += 1;
                            tokio::time::sleep(Duration::from_millis(2)).await;
                        }
                        other => break other?,
                    }
                }
            }
        };
        match value.extract_error()? {
            Value::Array(items) => items
                .into_iter()
                .map(|item| match item {
                    Value::Int(n) => Ok(n),
                    _ => Err((redis::ErrorKind::UnexpectedReturnType, "not a number").into()),
                })
                .collect(),
            _ => Err((redis::ErrorKind::UnexpectedReturnType, "not a list").into()),
        }
    }
}

fn has_moved(e: &redis::RedisError) -> bool {
    matches!(
        e.kind(),
        redis::ErrorKind::Server(
            ServerErrorKind::Moved | ServerErrorKind::Ask | ServerErrorKind::TryAgain | ServerErrorKind::ClusterDown
        )
    )
}
