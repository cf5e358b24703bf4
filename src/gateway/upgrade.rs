//! A new program takes over from the one that runs: on SIGUSR2 the gateway starts its own binary again, which checks the
//! configuration, makes all that it needs, and then waits at a Unix socket for the listening sockets. Only when it waits
//! there are they sent (Pingora does that), so that a binary or a configuration that is no good costs nothing: the running
//! gateway goes on as if it had not been asked. A connection that the kernel has already accepted for a listening socket is
//! one of a socket that both have, so none is lost between the two.

use async_trait::async_trait;
use pingora_core::server::{ShutdownSignal, ShutdownSignalWatch};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// How long a successor may take until it waits for the sockets.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// What is needed to start a successor.
pub(super) struct Upgrade {
    program: PathBuf,
    config: PathBuf,
    /// Where it is given the listening sockets, in a directory that is this user's alone: who can connect there could take
    /// part in what is for us.
    pub(super) socket: PathBuf,
}

impl Upgrade {
    /// For a gateway that runs with a configuration; `from` is the socket at which it was given its own listening sockets.
    pub(super) fn new(config: &Path, from: Option<&Path>) -> std::io::Result<Self> {
        let socket = match from {
            Some(socket) => socket.to_owned(),
            None => directory()?.join("upgrade.sock"),
        };
        // Asked now: once the file is replaced, the system says another name.
        Ok(Self { program: std::env::current_exe()?, config: std::path::absolute(config)?, socket })
    }

    /// Starts a successor and waits until it is ready for the sockets; or says why it is not.
    async fn successor(&self) -> Result<Child, String> {
        match std::fs::remove_file(&self.socket) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("{}: {e}", self.socket.display()));
            }
            _ => {}
        }
        let mut command = Command::new(&self.program);
        command.args(["run", "--config"]).arg(&self.config).arg("--upgrade").arg(&self.socket);
        let mut child = command.spawn().map_err(|e| format!("{}: {e}", self.program.display()))?;
        let until = Instant::now() + READY_WITHIN;
        while !self.socket.exists() {
            match child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => return Err(format!("it ended: {status}")),
                Err(e) => return Err(e.to_string()),
            }
            if Instant::now() > until {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("it is not ready after {READY_WITHIN:?}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(child)
    }
}

/// Takes away what is left of the socket, where nobody comes after.
pub(super) fn clean(socket: &Path) {
    let _ = std::fs::remove_file(socket);
    if let Some(dir) = socket.parent().filter(|dir| dir.starts_with(std::env::temp_dir())) {
        // Only if it is empty, as our own is.
        let _ = std::fs::remove_dir(dir);
    }
}

/// A directory of this user alone: the one that systemd made for the service, or one of our own.
fn directory() -> std::io::Result<PathBuf> {
    // Of several, the first.
    let given = std::env::var_os("RUNTIME_DIRECTORY").and_then(|dirs| std::env::split_paths(&dirs).next());
    if let Some(dir) = given.filter(|dir| dir.is_absolute()) {
        return Ok(dir);
    }
    let id: [u8; 8] = crate::config::random().ok_or_else(|| std::io::Error::other("no randomness"))?;
    let dir = std::env::temp_dir().join(format!("moh-gateway-{}", hex::encode(id)));
    std::fs::DirBuilder::new().mode(0o700).create(&dir)?;
    Ok(dir)
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
            tokio::select! {
                () = came(&mut terminate) => return ShutdownSignal::GracefulTerminate,
                () = came(&mut quit) => return ShutdownSignal::GracefulTerminate,
                () = came(&mut interrupt) => return ShutdownSignal::FastShutdown,
                () = came(&mut upgrade) => {
                    tracing::info!(program = %self.0.program.display(), "starting a successor");
                    match self.0.successor().await {
                        Ok(child) => {
                            tracing::info!(pid = child.id(), "a successor is ready: it gets the listening sockets");
                            return ShutdownSignal::GracefulUpgrade;
                        }
                        Err(why) => tracing::error!("no successor, going on as before: {why}"),
                    }
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
