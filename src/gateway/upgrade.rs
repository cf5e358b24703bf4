//! A new program takes over from the one that runs: on SIGUSR2 the gateway starts its own binary again, which checks the
//! configuration, makes all that it needs, and then waits at a Unix socket for the listening sockets. Only when it waits
//! there are they sent (Pingora does that), so that a binary or a configuration that is no good costs nothing: the running
//! gateway goes on as if it had not been asked. A connection that the kernel has already accepted for a listening socket is
//! one of a socket that both have, so none is lost between the two.

use async_trait::async_trait;
use parking_lot::Mutex;
use pingora_core::server::{ShutdownSignal, ShutdownSignalWatch};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// How long a successor may take until it waits for the sockets.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// What a successor is told.
#[derive(Debug, Clone)]
pub struct From {
    /// Where it is given the listening sockets.
    pub socket: PathBuf,
    /// The addresses that its predecessor listens at.
    pub addresses: Vec<SocketAddr>,
}

/// What is needed to start a successor.
pub(super) struct Upgrade {
    program: PathBuf,
    config: PathBuf,
    /// Where it is given the listening sockets.
    pub(super) socket: PathBuf,
    addresses: Vec<SocketAddr>,
    /// The one that was started.
    pub(super) successor: Successor,
}

/// A successor, once there is one.
pub(super) type Successor = Arc<Mutex<Option<Child>>>;

/// Whether a successor that had the sockets has ended: then nobody serves any more when this process ends.
pub(super) fn has_failed(successor: &Successor) -> bool {
    let mut successor = successor.lock();
    match successor.as_mut().map(Child::try_wait) {
        Some(Ok(Some(status))) => {
            tracing::error!(%status, "the successor has ended");
            true
        }
        _ => false,
    }
}

/// From now on SIGHUP and SIGUSR2 do not end the process, as they would by themselves. Who sends them before there is anything
/// to reload or to succeed is not heard.
pub(super) fn outlive_signals() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    // What is registered stays so for as long as the process lives.
    let _ = signal(SignalKind::hangup())?;
    let _ = signal(SignalKind::user_defined2())?;
    Ok(())
}

/// The program that this process was started from, by the name that leads to it: once the file is replaced, or the link on its
/// way there, the system says another.
fn program() -> std::io::Result<PathBuf> {
    let exact = std::env::current_exe()?;
    let said = std::env::args_os().next().map(PathBuf::from).filter(|said| said.is_absolute());
    Ok(said.filter(|said| said.canonicalize().is_ok_and(|said| said == exact)).unwrap_or(exact))
}

impl Upgrade {
    /// For a gateway that runs with a configuration, and listens at these addresses; `from` is what it was told as a successor.
    pub(super) fn new(config: &Path, addresses: Vec<SocketAddr>, from: Option<&From>) -> std::io::Result<Self> {
        let socket = match from {
            Some(from) => from.socket.clone(),
            None => {
                // systemd's directory for the service, if there is one; of several, the first.
                let given = std::env::var_os("RUNTIME_DIRECTORY").and_then(|dirs| std::env::split_paths(&dirs).next());
                let base = given.filter(|dir| dir.is_absolute()).unwrap_or_else(std::env::temp_dir);
                let id: [u8; 16] = crate::config::random().ok_or_else(|| std::io::Error::other("no randomness"))?;
                base.join(format!("moh-gateway-{}", hex::encode(id))).join("socket")
            }
        };
        let config = std::path::absolute(config)?;
        Ok(Self { program: program()?, config, socket, addresses, successor: Successor::default() })
    }

    /// Makes the directory of the socket, which is this user's alone: who can connect there could take part in what is for us.
    /// One that is there already is somebody else's.
    fn make_directory(&self) -> Result<(), String> {
        clean(&self.socket);
        let dir = self.socket.parent().unwrap_or(Path::new("/"));
        std::fs::DirBuilder::new().mode(0o700).create(dir).map_err(|e| format!("{}: {e}", dir.display()))
    }

    /// Starts a successor and waits until it is ready for the sockets; or says why it is not.
    async fn succeed(&self) -> Result<u32, String> {
        self.make_directory()?;
        let addresses: Vec<_> = self.addresses.iter().map(ToString::to_string).collect();
        let mut command = Command::new(&self.program);
        command.args(["run", "--config"]).arg(&self.config).arg("--upgrade").arg(&self.socket);
        command.arg("--inherits").arg(addresses.join(","));
        let child = command.spawn().map_err(|e| format!("{}: {e}", self.program.display()))?;
        let pid = child.id();
        *self.successor.lock() = Some(child);
        let until = Instant::now() + READY_WITHIN;
        while !self.socket.exists() {
            match self.successor.lock().as_mut().map(Child::try_wait) {
                Some(Ok(None)) => {}
                Some(Ok(Some(status))) => return Err(format!("it ended: {status}")),
                Some(Err(e)) => return Err(e.to_string()),
                None => return Err("it is gone".into()),
            }
            if Instant::now() > until {
                return Err(format!("it is not ready after {READY_WITHIN:?}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(pid)
    }

    /// Ends a successor that is not to be one.
    fn give_up(&self) {
        if let Some(mut child) = self.successor.lock().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        clean(&self.socket);
    }
}

/// Takes away the socket and its directory.
pub(super) fn clean(socket: &Path) {
    let _ = std::fs::remove_file(socket);
    if let Some(dir) = socket.parent() {
        // Only if it is empty.
        let _ = std::fs::remove_dir(dir);
    }
}

/// The signals that end the process, or have another follow it.
pub(super) struct Signals(pub(super) Upgrade);

#[async_trait]
impl ShutdownSignalWatch for Signals {
    async fn recv(&self) -> ShutdownSignal {
        let listen = |kind| signal(kind).inspect_err(|e| tracing::error!("signals: {e}")).ok();
        let mut terminate = listen(SignalKind::terminate());
        let mut quit = listen(SignalKind::quit());
        let mut interrupt = listen(SignalKind::interrupt());
        let mut upgrade = listen(SignalKind::user_defined2());
        loop {
            let end = async {
                tokio::select! {
                    () = came(&mut terminate) => ShutdownSignal::GracefulTerminate,
                    () = came(&mut quit) => ShutdownSignal::GracefulTerminate,
                    () = came(&mut interrupt) => ShutdownSignal::FastShutdown,
                }
            };
            tokio::pin!(end);
            tokio::select! {
                end = &mut end => return end,
                () = came(&mut upgrade) => {}
            }
            tracing::info!(program = %self.0.program.display(), "starting a successor");
            let succeeded = tokio::select! {
                // To be told to end comes before to be told to be followed.
                end = &mut end => {
                    self.0.give_up();
                    return end;
                }
                succeeded = self.0.succeed() => succeeded,
            };
            match succeeded {
                Ok(pid) => {
                    tracing::info!(pid, "a successor is ready: it gets the listening sockets");
                    return ShutdownSignal::GracefulUpgrade;
                }
                Err(why) => {
                    self.0.give_up();
                    tracing::error!("no successor, going on as before: {why}");
                }
            }
        }
    }
}

async fn came(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}
