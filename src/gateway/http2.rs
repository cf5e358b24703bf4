//! HTTP/2 with those who come in, which hyper and h2 speak: requests on a connection are served by the rules of a door.
//!
//! hyper waits for ever for a client that has yet to begin, or does not read, and sees no frame that h2 answers by itself. The
//! [`Stream`] it reads mends the first two with clocks, and counts frames; [`Patient`] bounds how long what is answered waits for
//! its client.

use super::exchange::{self, Patient, Rules};
use super::frames::Frames;
use super::session::{Rest, Session};
use super::stream::{Clock, Connection, End, Ends};
use crate::config::Http2;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use pingora_core::server::ShutdownWatch;
use prometheus::IntCounter;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Octets of a body that may be on their way on a stream, and on a connection: what may have to be held of it.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 512 * 1024;

/// How long a client may take to hear that its connection ends.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Octets that a connection begins with (RFC 9113 §3.4): its preface and the head of a SETTINGS frame.
const PREFACE: usize = 24 + 9;

/// Serves all requests on a connection, until it ends: whether it had to. `shutdown` says that no more is accepted, and the client
/// is told then.
pub(super) async fn serve<R: Rules, T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    rules: Arc<R>,
    connection: Arc<Connection>,
    stream: Stream<T>,
    settings: Http2,
    keepalive: Duration,
    mut shutdown: ShutdownWatch,
) -> Option<End> {
    let of_requests = connection.clone();
    let service = service_fn(move |request: http::Request<_>| {
        let (head, body) = request.into_parts();
        let session = Session::new(head, Rest::of(body), of_requests.clone());
        // hyper has room for it in each connection, also while there is none.
        Box::pin(exchange::serve(rules.clone(), session, of_requests.begin()))
            as Pin<Box<dyn Future<Output = _> + Send>>
    });
    let mut serve = http2::Builder::new(PatientExecutor);
    serve
        .max_concurrent_streams(settings.max_streams)
        .max_header_list_size(settings.max_header_list)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    let mut ends = Ends::of(&connection);
    // In a place of its own: a task would have room for the stream twice.
    let mut serving = Box::pin(serve.serve_connection(TokioIo::new(stream), service));
    let idle = is_idle_for(&connection, keepalive);
    tokio::select! {
        biased;
        _ = serving.as_mut() => return None,
        end = poll_fn(|cx| ends.poll(cx)) => if end == End::Cut {
            return Some(end);
        },
        () = told(&mut shutdown) => {}
        () = idle => {}
    }
    serving.as_mut().graceful_shutdown();
    // Whoever does not acknowledge that it was told is not waited for, once nothing is under way.
    let mut quiet = pin!(is_idle_for(&connection, LAST_WORDS));
    loop {
        tokio::select! {
            _ = serving.as_mut() => return None,
            () = quiet.as_mut() => return None,
            end = poll_fn(|cx| ends.poll(cx)) => if end == End::Cut {
                return Some(end);
            },
        }
    }
}

/// Ends once no request has been under way, and no answer waited for its client, for so long, or for half as long again.
async fn is_idle_for(connection: &Connection, keepalive: Duration) {
    let half = (keepalive / 2).max(Duration::from_millis(1));
    let mut quiet = 0;
    let mut seen = connection.so_far();
    while quiet < 2 {
        tokio::time::sleep(half).await;
        let now = connection.so_far();
        quiet = if connection.is_busy() || now != seen { 0 } else { quiet + 1 };
        seen = now;
    }
}

async fn told(watch: &mut tokio::sync::watch::Receiver<bool>) {
    // Whoever would say so is gone with the process.
    if watch.wait_for(|told| *told).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Runs the streams of a connection.
#[derive(Debug, Clone, Copy)]
struct PatientExecutor;

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for PatientExecutor {
    fn execute(&self, stream: F) {
        tokio::spawn(Patient::new(Box::pin(stream)));
    }
}

/// What hyper reads and writes.
pub(super) struct Stream<T> {
    /// None: it has been abused.
    inner: Option<T>,
    connection: Arc<Connection>,
    /// Until something of what is written is taken.
    write_timeout: Duration,
    /// Its frames, and who is told that they are too many; a node of this provider has none counted.
    frames: Option<(Frames, IntCounter)>,
    /// For the preface, while that is awaited.
    clock: Clock,
    /// Octets of it that have come.
    begun: usize,
    write_clock: Clock,
}

impl<T> Stream<T> {
    /// `headers`: the time there is to begin; `write_timeout`: until something of what is written is taken.
    pub(super) fn new(
        inner: T,
        connection: Arc<Connection>,
        headers: Duration,
        write_timeout: Duration,
        frames: Option<(Frames, IntCounter)>,
    ) -> Self {
        let mut clock = Clock::default();
        clock.set(Instant::now() + headers);
        Self { inner: Some(inner), connection, write_timeout, frames, clock, begun: 0, write_clock: Clock::default() }
    }

    /// What comes of a write: one that stands still has its time.
    fn timed<R>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        self.connection.is_writing(written.is_pending());
        if written.is_ready() {
            self.write_clock.stop();
            return written;
        }
        if !self.write_clock.is_set() {
            self.write_clock.set(Instant::now() + self.write_timeout);
        }
        ready!(self.write_clock.poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

fn closed() -> io::Error {
    io::ErrorKind::NotConnected.into()
}

impl<T: AsyncRead + Unpin> AsyncRead for Stream<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let Some(inner) = this.inner.as_mut() else { return Poll::Ready(Err(closed())) };
        match Pin::new(inner).poll_read(cx, buf)? {
            Poll::Ready(()) => {}
            // That is over once the connection has begun.
            Poll::Pending => return this.clock.poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into())),
        }
        let came = buf.filled().get(before..).unwrap_or_default();
        if this.clock.is_set() {
            this.begun += came.len();
            if this.begun >= PREFACE {
                this.clock.stop();
            }
        }
        if let Some((frames, refused)) = &mut this.frames
            && frames.came(came).is_err()
        {
            refused.inc();
            // Nothing of it is looked at any more.
            buf.set_filled(before);
            this.inner = None;
            return Poll::Ready(Err(io::Error::other("too many frames that move no request on")));
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Stream<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let Some(inner) = this.inner.as_mut() else { return Poll::Ready(Err(closed())) };
        let written = Pin::new(inner).poll_write_vectored(cx, bufs);
        let written = ready!(this.timed(cx, written))?;
        if let Some((frames, _)) = &mut this.frames {
            frames.sent(written);
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let Some(inner) = this.inner.as_mut() else { return Poll::Ready(Err(closed())) };
        let flushed = Pin::new(inner).poll_flush(cx);
        this.timed(cx, flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let Some(inner) = this.inner.as_mut() else { return Poll::Ready(Ok(())) };
        let shut = Pin::new(inner).poll_shutdown(cx);
        this.timed(cx, shut)
    }
}
