//! A connection of HTTP/2: who is on it, what it takes, and the task that drives it.

use crate::copying::copy;
use crate::forward::http1;
use bytes::{BufMut as _, Bytes};
use h2::client::{Builder, SendRequest};
use parking_lot::Mutex;
use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tokio::time::Sleep;

/// What a peer may send on a stream before it is taken.
const STREAM_WINDOW: u32 = 256 << 10;

/// The least that it may send on all streams.
const CONNECTION_WINDOW: u32 = 8 << 20;

/// The most that a window can be (RFC 9113 §6.9.1).
const MAX_WINDOW: u32 = (1 << 31) - 1;

/// Octets of an answer's fields, and of its trailers.
const MAX_FIELDS: u32 = 64 << 10;

/// Octets of a request's body that wait to be written, beside what a socket holds.
const MOST_UNWRITTEN: usize = 256 << 10;

/// Streams that were reset, and for how long they are remembered: what still comes on them is dropped. What comes on
/// others that are closed counts as an error of the other side's, and so many of these end the connection, with all the
/// requests on it. Who gives up many requests is not to bring that about.
const MOST_RESET: usize = 4096;
const REMEMBER_RESET: Duration = Duration::from_secs(5);
const MOST_ERRORS: usize = 16_384;

/// For a connection that nobody uses any more to say so to the other side.
const LEAVE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });

/// Times in atomics are since this.
static START: LazyLock<std::time::Instant> = LazyLock::new(std::time::Instant::now);

pub(super) fn millis() -> u64 {
    u64::try_from(START.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// A connection. Its task ends when nobody has it any more, nor a request on it.
#[derive(Clone)]
pub(in crate::forward) struct Connection(Arc<Shared>);

pub(super) struct Shared {
    pub(super) send: SendRequest<Bytes>,
    pub(super) https: bool,
    /// Requests under way, or promised a place.
    under_way: AtomicUsize,
    /// Those that the other side takes at once, as far as is known.
    pub(super) limit: AtomicUsize,
    /// It takes no more requests. Its task says so too.
    gone: Arc<AtomicBool>,
    /// When the last request left it.
    idle_since: AtomicU64,
    /// When something of an answer came last.
    pub(super) heard: AtomicU64,
    /// Dropped with all of this, which tells the task.
    _alive: oneshot::Sender<()>,
}

/// Says that the connection has ended, however that comes: its runtime may be gone.
struct Ended(Arc<AtomicBool>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Connection {
    /// Speaks HTTP/2 on a new connection, with so many requests at once; its task runs on the runtime that this is
    /// called in.
    pub(in crate::forward) async fn new(stream: http1::Stream, https: bool, streams: usize) -> Result<Self, h2::Error> {
        // Else a few answers that nobody takes would hold up all others on the connection.
        let all = u32::try_from(streams).unwrap_or(u32::MAX).saturating_mul(STREAM_WINDOW);
        let gone = Arc::new(AtomicBool::new(false));
        let wire = Arc::new(Mutex::new(Wire {
            stream,
            gone: gone.clone(),
            unwritten: Vec::new(),
            written: 0,
            has_failed: false,
            clock: None,
        }));
        let handshake = Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(all.clamp(CONNECTION_WINDOW, MAX_WINDOW))
            .max_header_list_size(MAX_FIELDS)
            .max_send_buffer_size(MOST_UNWRITTEN)
            .max_concurrent_reset_streams(MOST_RESET)
            .reset_stream_duration(REMEMBER_RESET)
            .max_local_error_reset_streams(Some(MOST_ERRORS))
            .enable_push(false)
            .handshake::<_, Bytes>(Gathers(wire.clone()));
        let (send, connection) = handshake.await?;
        let (alive, left) = oneshot::channel();
        let ended = Ended(gone.clone());
        tokio::spawn(async move {
            let _ended = ended;
            let mut connection = pin!(connection);
            let mut driven = pin!(poll_fn(|cx| {
                let end = connection.as_mut().poll(cx);
                // What is not taken now is the next time.
                let _ = wire.lock().poll_write_out(cx);
                end
            }));
            tokio::select! {
                biased;
                end = &mut driven => {
                    if let Err(e) = end {
                        tracing::debug!("a connection of HTTP/2 ends: {e}");
                    }
                }
                _ = left => {
                    // The other side may not read.
                    let _ = tokio::time::timeout(LEAVE, driven).await;
                }
            }
        });
        Ok(Self(Arc::new(Shared {
            send,
            https,
            under_way: AtomicUsize::new(0),
            limit: AtomicUsize::new(usize::MAX),
            gone,
            idle_since: AtomicU64::new(millis()),
            heard: AtomicU64::new(millis()),
            _alive: alive,
        })))
    }

    /// A place for a request, if fewer than `most` are under way.
    pub(in crate::forward) fn slot(&self, most: usize) -> Option<Slot> {
        let most = most.max(1).min(self.0.limit.load(Ordering::Relaxed));
        let more = |n: usize| (n < most).then(|| n.saturating_add(1));
        self.0.under_way.fetch_update(Ordering::AcqRel, Ordering::Relaxed, more).ok()?;
        Some(Slot { connection: self.0.clone(), send: None })
    }

    /// It takes no more requests.
    pub(in crate::forward) fn is_gone(&self) -> bool {
        self.0.gone.load(Ordering::Acquire)
    }

    /// Nothing has been under way on it for so long.
    pub(in crate::forward) fn is_idle_for(&self, time: Duration) -> bool {
        self.0.under_way.load(Ordering::Acquire) == 0
            && Duration::from_millis(millis().saturating_sub(self.0.idle_since.load(Ordering::Relaxed))) >= time
    }
}

/// What a connection goes over, as h2 and the task that drives it share it: they are the same task.
///
/// h2 writes each frame by itself, and flushes it. What it writes before it waits is gathered, and leaves at once.
///
/// A write that fails is no error before all is read that the other side has said: a connection that is closed behind a GOAWAY
/// would else be one that broke off, and nobody would know which requests were left untouched.
struct Wire {
    stream: http1::Stream,
    gone: Arc<AtomicBool>,
    /// What is gathered, from here on: a place that all connections of a thread share, while there is something.
    unwritten: Vec<u8>,
    written: usize,
    has_failed: bool,
    clock: Option<Pin<Box<Sleep>>>,
}

/// A [`Wire`], for h2.
struct Gathers(Arc<Mutex<Wire>>);

/// Octets that are gathered at most.
const MOST_GATHERED: usize = 64 << 10;

thread_local! {
    static ROOM: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// How long may pass until the end of a connection is seen that takes no more.
const LAST_READ: Duration = Duration::from_secs(1);

impl Wire {
    /// Gathers octets, as many as there is room for: how many.
    fn gather(&mut self, octets: &[u8]) -> usize {
        if self.unwritten.capacity() == 0 {
            self.unwritten = ROOM.take();
            self.unwritten.reserve_exact(MOST_GATHERED);
        }
        let room = MOST_GATHERED.saturating_sub(self.unwritten.len());
        copy(octets, &mut (&mut self.unwritten).limit(room))
    }

    /// Writes out what is gathered, as far as it is taken.
    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let rest = self.unwritten.get(self.written..).unwrap_or_default();
            if self.has_failed || rest.is_empty() {
                break;
            }
            match ready!(Pin::new(&mut self.stream).poll_write(cx, rest)) {
                Ok(0) => self.fail(cx, &io::ErrorKind::WriteZero.into()),
                Ok(octets) => self.written += octets,
                Err(e) => self.fail(cx, &e),
            }
        }
        if self.unwritten.capacity() > 0 {
            self.unwritten.clear();
            ROOM.set(std::mem::take(&mut self.unwritten));
            self.written = 0;
        }
        if !self.has_failed
            && let Err(e) = ready!(Pin::new(&mut self.stream).poll_flush(cx))
        {
            self.fail(cx, &e);
        }
        Poll::Ready(())
    }

    fn fail(&mut self, cx: &mut Context<'_>, e: &io::Error) {
        tracing::debug!("a connection of HTTP/2 takes no more: {e}");
        self.has_failed = true;
        self.gone.store(true, Ordering::Release);
        // What is to be read is read next.
        cx.waker().wake_by_ref();
    }
}

impl AsyncRead for Gathers {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let wire = &mut *self.0.lock();
        let read = Pin::new(&mut wire.stream).poll_read(cx, buf);
        if !wire.has_failed || read.is_ready() {
            return read;
        }
        let clock = wire.clock.get_or_insert_with(|| Box::pin(tokio::time::sleep(LAST_READ)));
        clock.as_mut().poll(cx).map(|()| Err(io::ErrorKind::BrokenPipe.into()))
    }
}

impl AsyncWrite for Gathers {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut wire = self.0.lock();
        if wire.unwritten.len() >= MOST_GATHERED {
            ready!(wire.poll_write_out(cx));
        }
        if wire.has_failed {
            return Poll::Ready(Ok(bufs.iter().map(|buf| buf.len()).sum()));
        }
        Poll::Ready(Ok(bufs.iter().map(|buf| wire.gather(buf)).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Whoever drives the connection does it.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut wire = self.0.lock();
        ready!(wire.poll_write_out(cx));
        if wire.has_failed { Poll::Ready(Ok(())) } else { Pin::new(&mut wire.stream).poll_shutdown(cx) }
    }
}

impl Shared {
    pub(super) fn retire(&self) {
        self.gone.store(true, Ordering::Release);
    }
}

/// The place of a request on a connection.
pub struct Slot {
    /// What it was looked at with, to be sent with.
    pub(super) send: Option<SendRequest<Bytes>>,
    pub(super) connection: Arc<Shared>,
}

impl Slot {
    /// Whether a request can be sent, as far as is known. Else the connection gets no more.
    pub(in crate::forward) fn is_open(&mut self) -> bool {
        // What has sent nothing never waits: this is whether the other side is going away, or has gone.
        let send = self.send.get_or_insert_with(|| self.connection.send.clone());
        let ready = send.poll_ready(&mut Context::from_waker(Waker::noop()));
        let open = !matches!(ready, Poll::Ready(Err(_))) && !self.connection.gone.load(Ordering::Acquire);
        if !open {
            self.connection.retire();
        }
        open
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.connection.idle_since.store(millis(), Ordering::Relaxed);
        self.connection.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}
