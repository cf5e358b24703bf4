//! The threads that serve: a listener's service runs on a runtime of its own, and a reload that says another number of threads
//! begins another one beside it. From then on the new one accepts; what the old one has accepted stays with it to its end, so
//! that no connection notices. The old one's threads are kept, asleep: connections to nodes that were opened there are shared
//! by all.

use async_trait::async_trait;
use parking_lot::Mutex;
use pingora_core::apps::ServerApp;
use pingora_core::protocols::Stream;
use pingora_core::server::{Fds, ListenFds, ShutdownWatch};
use pingora_core::services::Service as _;
use pingora_core::services::listening::Service;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use std::io::{Error, IoSliceMut, Result};
use std::mem::{ManuallyDrop, MaybeUninit};
use std::net::SocketAddr;
use std::os::fd::{IntoRawFd as _, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{oneshot, watch};

/// A listener's service, on threads whose number may change.
pub(super) struct Threads<A> {
    name: String,
    address: SocketAddr,
    app: Arc<A>,
    /// Adds the listener to what Pingora makes of the application.
    listen: fn(&mut Service<Seat<A>>, &str),
    threads: watch::Receiver<usize>,
}

/// An application for as long as one runtime accepts for it: what its service is told when that is over is not for the
/// connections.
pub(super) struct Seat<A> {
    app: Arc<A>,
    shutdown: ShutdownWatch,
}

/// Threads, and what ends their accepting.
struct Crew {
    accept: watch::Sender<bool>,
    /// They end with the process, for what was accepted on them may go on until then.
    _kept: ManuallyDrop<Kept>,
}

/// What a runtime would end with.
enum Kept {
    One(#[expect(dead_code, reason = "its being there is what it is for")] oneshot::Sender<()>),
    Many(#[expect(dead_code, reason = "its being there is what it is for")] Runtime),
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> ServerApp for Seat<A> {
    async fn process_new(self: &Arc<Self>, stream: Stream, _: &ShutdownWatch) -> Option<Stream> {
        self.app.process_new(stream, &self.shutdown).await
    }
}

/// A runtime of so many threads.
fn runtime(threads: usize) -> Result<(Handle, Kept)> {
    if threads > 1 {
        let runtime = Builder::new_multi_thread().worker_threads(threads).thread_name("serve").enable_all().build()?;
        return Ok((runtime.handle().clone(), Kept::Many(runtime)));
    }
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    let (end, ended) = oneshot::channel::<()>();
    std::thread::Builder::new().name("serve".into()).spawn(move || drop(runtime.block_on(ended)))?;
    Ok((handle, Kept::One(end)))
}

// === impl Threads ===

impl<A: ServerApp + Send + Sync + 'static> Threads<A> {
    pub(super) fn new(
        name: String,
        address: SocketAddr,
        app: A,
        listen: fn(&mut Service<Seat<A>>, &str),
        threads: watch::Receiver<usize>,
    ) -> Self {
        Self { name, address, app: Arc::new(app), listen, threads }
    }

    /// Begins to accept on so many threads.
    fn begin(&self, threads: usize, fds: &ListenFds, shutdown: &ShutdownWatch) -> Result<Crew> {
        let (handle, kept) = runtime(threads)?;
        let seat = Seat { app: self.app.clone(), shutdown: shutdown.clone() };
        let mut service = Service::new(self.name.clone(), seat);
        (self.listen)(&mut service, &self.address.to_string());
        let (accept, until) = watch::channel(false);
        let fds = fds.clone();
        handle.spawn(async move { service.start_service(Some(fds), until, 1).await });
        Ok(Crew { accept, _kept: ManuallyDrop::new(kept) })
    }

    /// Another crew accepts from now on.
    async fn exchange(&self, crew: Crew, threads: usize, fds: &ListenFds, shutdown: &ShutdownWatch) -> Crew {
        let address = self.address.to_string();
        let next = match another(fds, &address).await {
            Ok(socket) => {
                // The one in the table is given to a successor too, and the old one is closed with its crew.
                fds.lock().add(address, socket.into_raw_fd());
                self.begin(threads, fds, shutdown)
            }
            Err(e) => Err(e),
        };
        match next {
            Ok(next) => {
                tracing::info!(address = %self.address, threads, "connections are accepted on other threads");
                crew.accept.send_replace(true);
                next
            }
            Err(e) => {
                tracing::error!(address = %self.address, threads, "the threads stay as they are: {e}");
                crew
            }
        }
    }
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> pingora_core::services::Service for Threads<A> {
    async fn start_service(&mut self, fds: Option<ListenFds>, mut shutdown: ShutdownWatch, _: usize) {
        let fds = fds.unwrap_or_else(|| Arc::new(Mutex::new(Fds::new())));
        let mut threads = *self.threads.borrow_and_update();
        let mut crew = match self.begin(threads, &fds, &shutdown) {
            Ok(crew) => crew,
            Err(e) => {
                tracing::error!(address = %self.address, "there are no threads to accept on: {e}");
                return;
            }
        };
        loop {
            tokio::select! {
                told = shutdown.changed() => if told.is_err() || *shutdown.borrow() {
                    break;
                },
                Ok(()) = self.threads.changed() => {
                    let now = *self.threads.borrow_and_update();
                    if now != threads {
                        crew = self.exchange(crew, now, &fds, &shutdown).await;
                        threads = now;
                    }
                }
            }
        }
        crew.accept.send_replace(true);
        self.app.cleanup().await;
    }

    fn name(&self) -> &str {
        &self.name
    }

    /// Of the service itself, which only waits.
    fn threads(&self) -> Option<usize> {
        Some(1)
    }

    fn listen_addresses(&self) -> Option<Vec<String>> {
        Some(vec![self.address.to_string()])
    }
}

/// Another descriptor of a listening socket, of which only the number is known: it is sent to ourselves, as it is to a
/// successor.
async fn another(fds: &ListenFds, address: &str) -> Result<OwnedFd> {
    let gone = || Error::other("its socket is not known");
    let number = *fds.lock().get(address).ok_or_else(gone)?;
    let mut one = Fds::new();
    one.add(address.to_owned(), number);
    let id: [u8; 16] = crate::config::random().ok_or_else(|| Error::other("no randomness"))?;
    tokio::task::spawn_blocking(move || {
        // In a directory that is this user's alone, so that nobody else sends us one.
        let dir = std::env::temp_dir().join(format!("moh-gateway-{}", hex::encode(id)));
        std::fs::DirBuilder::new().mode(0o700).create(&dir)?;
        let path = dir.join("socket");
        let received = UnixListener::bind(&path).and_then(|listener| {
            let at = path.display().to_string();
            std::thread::scope(|scope| {
                let sent = scope.spawn(move || one.send_to_sock(at.as_str()));
                let received = listener.accept().and_then(|(stream, _)| receive(&stream));
                match sent.join() {
                    Ok(Ok(_)) => received,
                    Ok(Err(e)) => Err(e.into()),
                    Err(_) => Err(Error::other("it could not be sent")),
                }
            })
        });
        let _ = std::fs::remove_file(&path);
        let _ = std::fs::remove_dir(&dir);
        received
    })
    .await
    .map_err(Error::other)?
}

fn receive(stream: &std::os::unix::net::UnixStream) -> Result<OwnedFd> {
    let mut octets = [0; 2048];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut octets)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut sockets = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
        _ => None,
    });
    sockets.next().and_then(|mut sockets| sockets.next()).ok_or_else(|| Error::other("no socket came"))
}
