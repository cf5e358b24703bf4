//! From a configuration to a running server, and from SIGTERM to its end.

use super::{Gateway, Shared, admin, door, reload};
use crate::admission::Admission;
use crate::config::Config;
use crate::limiter::Limiter;
use crate::limiter::fleet::Fleet;
use crate::limiter::memory::Memory;
use crate::privacypass::Origin;
use crate::telemetry::{AccessLog, Metrics};
use crate::tls;
use crate::upstream::Nodes;
use arc_swap::ArcSwap;
use pingora_core::listeners::{L4BufferSettings, ListenerConfig};
use pingora_core::protocols::http::v2::server::H2Options;
use pingora_core::server::configuration::ServerConf;
use pingora_core::server::{ExecutionPhase, RunArgs, Server};
use pingora_core::services::listening::Service;
use pingora_proxy::HttpProxy;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio_rustls::TlsAcceptor;

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
    /// The system gives no randomness.
    #[error("the system gives no randomness")]
    Randomness,
}

/// Runs a gateway until it is told to stop: SIGTERM lets the requests under way end first, SIGINT does not. SIGHUP has the
/// limits read again from the configuration in `file`.
///
/// # Errors
/// [`StartError`].
pub fn run(config: Config, file: &Path) -> std::result::Result<(), StartError> {
    let (server, shared) = server(config)?;
    reload::on_hangup(file.into(), shared.clone()).map_err(|e| StartError::Io("SIGHUP", e))?;
    let phases = server.watch_execution_phase();
    let draining = shared.clone();
    std::thread::spawn(move || drain(phases, &draining));
    server.run(RunArgs::default());
    shared.access_log.close();
    Ok(())
}

/// Ends the process once it has been told to stop and no connection is left; Pingora would wait for all of its grace period,
/// however little there is to wait for. At the end of that, `run` returns and the process ends all the same.
fn drain(mut phases: tokio::sync::broadcast::Receiver<ExecutionPhase>, shared: &Shared) {
    loop {
        match phases.blocking_recv() {
            Ok(ExecutionPhase::ShutdownGracePeriod) => break,
            Ok(ExecutionPhase::GracefulTerminate) => shared.draining.store(true, Ordering::Relaxed),
            Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
            Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
        }
    }
    tracing::info!(requests = shared.metrics.in_flight.get(), "stopping: requests under way may end");
    shared.draining.store(true, Ordering::Relaxed);
    // A connection is closed once all that HTTP/2 was given to send is sent; a request has ended before that.
    while shared.metrics.connections.get() > 0 || shared.metrics.in_flight.get() > 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
    if let Some(origin) = &shared.privacy_pass {
        origin.settle();
    }
    shared.access_log.close();
    std::process::exit(0);
}

fn server(config: Config) -> std::result::Result<(Server, Arc<Shared>), StartError> {
    // Pingora panics where it cannot bind; said before, it is an error.
    for address in config.listeners.iter().map(|l| l.address).chain([config.admin]) {
        std::net::TcpListener::bind(address).map_err(|e| StartError::Listen(address, e))?;
    }
    let metrics = Metrics::new(&config.peers.named)?;
    // For what makes its own TLS configuration: a cluster's connections to the store of limits.
    let _ = tls::provider().install_default();
    let counters = metrics.limits(&config.policy);
    metrics.generation.set(1);
    let memory = Memory::new(config.limit_memory, metrics.limits_overflowed.clone());
    let memory = memory.map_err(|e| StartError::Io("limits.memory", e))?;
    let (fleet, secret) = match config.limit_store {
        Some((settings, secret)) => {
            let fleet = Fleet::start(settings, metrics.store()?).map_err(|e| StartError::Io("limits.redis", e))?;
            (Some(Arc::new(fleet)), secret)
        }
        None => (None, crate::config::random().ok_or(StartError::Randomness)?),
    };
    let privacy_pass = match config.privacy_pass {
        Some(settings) => {
            let origin = Origin::start(settings, fleet.clone(), metrics.privacy_pass()?);
            Some(origin.map_err(|e| StartError::Io("privacy_pass", e))?)
        }
        None => None,
    };
    let limiter = Arc::new(Limiter::new(memory, fleet.filter(|fleet| fleet.keeps_limits())));
    let shared = Arc::new(Shared {
        admission: ArcSwap::from_pointee(Admission::new(config.policy, limiter, secret, counters)),
        provider: config.provider,
        peers: config.peers,
        timeouts: config.timeouts,
        max_body: config.max_body,
        privacy_pass,
        nodes: Nodes::new(config.upstream),
        access_log: AccessLog::open(&config.access_log).map_err(StartError::AccessLog)?,
        metrics,
        draining: AtomicBool::new(false),
    });

    let conf = ServerConf {
        threads: config.threads,
        work_stealing: config.threads > 1,
        upstream_keepalive_pool_size: 1024,
        grace_period_seconds: Some(config.timeouts.shutdown.as_secs().max(1)),
        graceful_shutdown_timeout_seconds: Some(1),
        max_retries: 16,
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    for listener in &config.listeners {
        let mut proxy = HttpProxy::new(Gateway(shared.clone()), server.configuration.clone());
        proxy.h2_options = Some(h2_options());
        let mut options = pingora_core::apps::HttpServerOptions::default();
        // CONNECT is a method like others here: no endpoint has it.
        options.allow_connect_method_proxying = true;
        options.h2_idle_timeout = Some(config.timeouts.keepalive);
        proxy.server_options = Some(options);
        proxy.handle_init_modules();
        let tls = tls::server_config(config.certificates.clone(), &listener.client_auth)?;
        let door = door::Door {
            requests: Arc::new(door::Requests(Arc::new(proxy))),
            acceptor: TlsAcceptor::from(Arc::new(tls)),
            shared: shared.clone(),
        };
        let mut service = Service::new(format!("federation {}", listener.address), door);
        // rustls has buffers of its own, of the size of its records.
        let buffers = L4BufferSettings::unbuffered();
        service.add_listener(ListenerConfig::tcp(listener.address.to_string()).l4_buffer(buffers));
        server.add_service(service);
    }
    let mut admin = Service::new("admin".to_owned(), admin::Admin(shared.clone()));
    admin.threads = Some(1);
    admin.add_tcp(&config.admin.to_string());
    server.add_service(admin);
    Ok((server, shared))
}

fn h2_options() -> H2Options {
    let mut options = H2Options::default();
    options
        .max_concurrent_streams(100)
        .max_header_list_size(16 * 1024)
        .initial_window_size(256 * 1024)
        .initial_connection_window_size(1024 * 1024);
    options
}
