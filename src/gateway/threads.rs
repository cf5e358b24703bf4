//! The threads that serve: a listener's service runs on a runtime of its own, and a reload that says another number of threads
//! begins another one beside it. From then on the new one accepts; what the old one has accepted stays with it to its end, so
//! that no connection notices. Its threads are kept, and used again should their number come back: connections to nodes that
//! were opened there are shared by all.
//!
//! Each crew has a descriptor of the listening socket that is its own alone, for Pingora closes it when it ends. The table that
//! a successor is given says that of the crew which accepts now.

use async_trait::async_trait;
use parking_lot::Mutex;
use pingora_core::apps::ServerApp;
use pingora_core::protocols::Stream;
use pingora_core::server::{Fds, ListenFds, ShutdownWatch};
use pingora_core::services::Service as _;
use pingora_core::services::listening::Service;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use std::collections::HashMap;
use std::io::{Error, IoSliceMut, Result};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{IntoRawFd as _, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Handle};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How long a crew may take to see that it is to accept no more.
const STOPS_WITHIN: Duration = Duration::from_secs(1);

/// How long a listener may take until it listens. Whoever asks is told then that it does: it has been said why it does not.
const OPENS_WITHIN: Duration = Duration::from_secs(10);

/// A listener's service, on threads whose number may change.
pub(super) struct Threads<A> {
    name: String,
    address: SocketAddr,
    app: Arc<A>,
    /// Adds the listener to what Pingora makes of the application.
    listen: fn(&mut Service<Seat<A>>, &str),
    threads: watch::Receiver<usize>,
    /// How many listeners do not listen yet; this is one of them until it does.
    opening: Arc<AtomicUsize>,
    /// By how many threads they have.
    runtimes: HashMap<usize, Handle>,
}

/// An application for as long as one crew accepts for it: what its service is told when that is over is not for the connections.
pub(super) struct Seat<A> {
    app: Arc<A>,
    shutdown: ShutdownWatch,
}

/// Those who accept.
struct Crew {
    threads: usize,
    /// Told, they accept no more.
    over: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> ServerApp for Seat<A> {
    async fn process_new(self: &Arc<Self>, stream: Stream, _: &ShutdownWatch) -> Option<Stream> {
        self.app.process_new(stream, &self.shutdown).await
    }
}

/// A runtime of so many threads, which end with the process. Where the system gives no thread tokio panics: in one of our own, so
/// that it is an error here.
fn runtime(threads: usize) -> Result<Handle> {
    let (tell, told) = mpsc::channel();
    let serve = move || {
        let mut builder = if threads > 1 { Builder::new_multi_thread() } else { Builder::new_current_thread() };
        if threads > 1 {
            builder.worker_threads(threads);
        }
        match builder.thread_name("serve").enable_all().build() {
            Ok(runtime) => {
                let _ = tell.send(Ok(runtime.handle().clone()));
                // One thread is this one; of several, this one only sees to it that they stay.
                runtime.block_on(std::future::pending::<()>());
            }
            Err(e) => drop(tell.send(Err(e))),
        }
    };
    let name = if threads > 1 { "serving" } else { "serve" };
    std::thread::Builder::new().name(name.into()).spawn(serve)?;
    told.recv().unwrap_or_else(|_| Err(Error::other(format!("the system does not give {threads} threads"))))
}

// === impl Threads ===

impl<A: ServerApp + Send + Sync + 'static> Threads<A> {
    /// # Errors
    /// There are not so many threads to be had as are wanted now.
    pub(super) fn new(
        name: String,
        address: SocketAddr,
        app: A,
        listen: fn(&mut Service<Seat<A>>, &str),
        threads: watch::Receiver<usize>,
        opening: &Arc<AtomicUsize>,
    ) -> Result<Self> {
        let first = *threads.borrow();
        let runtimes = HashMap::from([(first, runtime(first)?)]);
        opening.fetch_add(1, Ordering::Relaxed);
        let opening = opening.clone();
        Ok(Self { name, address, app: Arc::new(app), listen, threads, opening, runtimes })
    }

    /// Waits until the listener's socket is there: Pingora puts it into the table once it listens.
    async fn listens(&self, fds: &ListenFds) {
        let (address, until) = (self.address.to_string(), Instant::now() + OPENS_WITHIN);
        while fds.lock().get(&address).is_none() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.opening.fetch_sub(1, Ordering::Relaxed);
    }

    /// A runtime of so many threads: one there is, or another.
    fn runtime(&mut self, threads: usize) -> Result<Handle> {
        if let Some(known) = self.runtimes.get(&threads) {
            return Ok(known.clone());
        }
        let made = runtime(threads)?;
        self.runtimes.insert(threads, made.clone());
        Ok(made)
    }

    /// Begins to accept on so many threads, with the socket in a table, or one that is then in it.
    fn begin(&mut self, threads: usize, fds: ListenFds, shutdown: &ShutdownWatch) -> Result<Crew> {
        let handle = self.runtime(threads)?;
        let seat = Seat { app: self.app.clone(), shutdown: shutdown.clone() };
        let mut service = Service::new(self.name.clone(), seat);
        (self.listen)(&mut service, &self.address.to_string());
        let (over, until) = watch::channel(false);
        let accepting = handle.spawn(async move { service.start_service(Some(fds), until, 1).await });
        Ok(Crew { threads, over, accepting })
    }

    /// Another crew, for the one that accepts so far.
    fn exchange(&mut self, threads: usize, fds: &ListenFds, shutdown: &ShutdownWatch) -> Result<Crew> {
        let address = self.address.to_string();
        let socket = another(fds, &address)?;
        // What can fail comes before the socket is nobody's but Pingora's.
        self.runtime(threads)?;
        let number = socket.into_raw_fd();
        let mut own = Fds::new();
        own.add(address.clone(), number);
        let crew = self.begin(threads, Arc::new(Mutex::new(own)), shutdown)?;
        fds.lock().add(address, number);
        Ok(crew)
    }
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> pingora_core::services::Service for Threads<A> {
    async fn start_service(&mut self, fds: Option<ListenFds>, mut shutdown: ShutdownWatch, _: usize) {
        let fds = fds.unwrap_or_else(|| Arc::new(Mutex::new(Fds::new())));
        let first = *self.threads.borrow_and_update();
        let mut crew = match self.begin(first, fds.clone(), &shutdown) {
            Ok(crew) => crew,
            Err(e) => {
                tracing::error!(address = %self.address, "there are no threads to accept on: {e}");
                return;
            }
        };
        self.listens(&fds).await;
        let mut told = false;
        loop {
            tokio::select! {
                over = shutdown.changed() => if over.is_err() || *shutdown.borrow() {
                    break;
                },
                ended = &mut crew.accepting, if !told => {
                    told = true;
                    tracing::error!(address = %self.address, "connections are accepted no more: {ended:?}");
                }
                Ok(()) = self.threads.changed() => {
                    let threads = *self.threads.borrow_and_update();
                    if threads == crew.threads {
                        continue;
                    }
                    match self.exchange(threads, &fds, &shutdown) {
                        Ok(next) => {
                            tracing::info!(address = %self.address, threads, "connections are accepted on other threads");
                            let before = std::mem::replace(&mut crew, next);
                            before.over.send_replace(true);
                            told = false;
                        }
                        Err(e) => {
                            tracing::error!(address = %self.address, threads, "the threads stay as they are: {e}");
                        }
                    }
                }
            }
        }
        crew.over.send_replace(true);
        if !told {
            // What it has accepted until then is served.
            let _ = tokio::time::timeout(STOPS_WITHIN, &mut crew.accepting).await;
        }
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
fn another(fds: &ListenFds, address: &str) -> Result<OwnedFd> {
    let mut one = Fds::new();
    {
        let table = fds.lock();
        let number = table.get(address).ok_or_else(|| Error::other("its socket is not known"))?;
        one.add(address.to_owned(), *number);
    }
    let id: [u8; 16] = crate::config::random().ok_or_else(|| Error::other("no randomness"))?;
    // In a directory that is this user's alone, so that nobody else sends us one.
    let dir = std::env::temp_dir().join(format!("moh-gateway-{}", hex::encode(id)));
    std::fs::DirBuilder::new().mode(0o700).create(&dir)?;
    let path = dir.join("socket");
    let received = UnixListener::bind(&path).and_then(|listener| {
        // It waits in the listener's queue until it is taken.
        one.send_to_sock(path.display().to_string().as_str())?;
        receive(&listener.accept()?.0)
    });
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_dir(&dir);
    received
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
