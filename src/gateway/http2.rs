//! HTTP/2 with those who come in, which h2 speaks: requests on a connection are served by the rules of a door.
//!
//! All of a connection is one task: its frames, and the requests that are under way on it. h2 waits for ever for a client that has
//! yet to begin, or does not read, and answers frames by itself that nobody else sees. The [`Stream`] it reads mends the first two
//! with clocks, and counts frames; how long an answer waits for its client to have room for it is bounded here.

use super::exchange::{self, Answer, PIECES_AT_ONCE, Rules};
use super::flow::{May, Pace};
use super::frames::Frames;
use super::http1::Transport;
use super::session::{Rest, Session};
use super::stream::{Clock, Connection, End, Ends, OnIt};
use crate::config::Http2;
use crate::forward::poll_room;
use crate::http1::{date, is_of_connection};
use crate::tls::{Read, Sink};
use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use h2::server::{Builder, SendResponse};
use h2::{Reason, SendStream};
use http::{HeaderName, Request, Response, header, response};
use hyper::body::{Body as _, Frame};
use pingora_core::server::ShutdownWatch;
use prometheus::IntCounter;
use std::future::poll_fn;
use std::io;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Octets of a body that may be on their way on a stream, and on a connection: what may have to be held of them. Room is given back
/// when octets have gone on, so that uploads whose nodes stand still take room of those beside them: there is some for eight.
///
/// A stream's is of two frames: nobody sends less than one because there is no more room, and h2, which says that half of it is free
/// again, does so for each. With room for more, or said for two at a time, half as much again was held of 64 uploads.
const STREAM_WINDOW: u32 = 2 * FRAME;
const CONNECTION_WINDOW: u32 = 8 * STREAM_WINDOW;

/// Octets of a DATA frame at most. Whoever sends as many has them read as one.
pub(super) const FRAME: u32 = 32 * 1024;

/// How long a client may take to hear that its connection ends.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Octets that a connection begins with (RFC 9113 §3.4): its preface and the head of a SETTINGS frame.
const PREFACE: usize = 24 + 9;

/// Serves all requests on a connection, until it ends: whether it had to. `shutdown` says that no more is accepted, and the client
/// is told then.
pub(super) async fn serve<R: Rules, T: Transport>(
    rules: Arc<R>,
    connection: Arc<Connection>,
    stream: Stream<T>,
    settings: Http2,
    keepalive: Duration,
    mut shutdown: ShutdownWatch,
) -> Option<End> {
    let mut h2 = Builder::new();
    h2.max_concurrent_streams(settings.max_streams)
        .max_header_list_size(settings.max_header_list)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME);
    let begin = |request: Request<h2::RecvStream>, respond: SendResponse<Bytes>| {
        let (head, body) = request.into_parts();
        // In a place of its own: each future that it is handed on by would have one for it.
        let session = Box::new(Session::new(head, Rest::of(body, &connection), connection.clone()));
        let answer = AssertUnwindSafe(answer(rules.clone(), session, connection.begin(), respond));
        // What would end one request does not end those beside it.
        answer.catch_unwind().map(drop)
    };
    let mut ends = Ends::of(&connection);
    let mut idle = pin!(is_idle_for(&connection, keepalive));
    let mut told = pin!(told(&mut shutdown));
    let mut handshake = h2.handshake(stream);
    let mut serving = tokio::select! {
        biased;
        serving = &mut handshake => serving.ok()?,
        // Nothing is under way on it.
        end = poll_fn(|cx| ends.poll(cx)) => return Some(end).filter(|end| *end == End::Cut),
        () = told.as_mut() => return None,
        () = idle.as_mut() => return None,
    };
    drop(handshake);
    let mut under_way = FuturesUnordered::new();
    let mut pace = Pace::default();
    let mut serve = |cx: &mut Context<'_>, is_told: bool| -> Poll<()> {
        if is_told {
            serving.graceful_shutdown();
        }
        // What they have to say goes out with what comes in.
        while let Poll::Ready(Some(())) = under_way.poll_next_unpin(cx) {}
        while let Poll::Ready(accepted) = serving.poll_accept(cx) {
            match accepted {
                Some(Ok((request, respond))) => under_way.push(begin(request, respond)),
                Some(Err(_)) | None => return Poll::Ready(()),
            }
        }
        let held_up = connection.flow.held_up();
        // What these have to say, h2 asks for.
        while let Poll::Ready(Some(())) = under_way.poll_next_unpin(cx) {}
        if connection.flow.held_up() < held_up {
            // Maybe it was not read for that.
            cx.waker().wake_by_ref();
        }
        pace.end_turn(cx, &connection.flow);
        Poll::Pending
    };
    tokio::select! {
        biased;
        // Whoever keeps all busy hears it too.
        () = told => {}
        end = poll_fn(|cx| ends.poll(cx)) => if end == End::Cut {
            return Some(end);
        },
        () = poll_fn(|cx| serve(cx, false)) => return None,
        () = idle => {}
    }
    // Whoever does not acknowledge that it was told is not waited for, once nothing is under way.
    let mut quiet = pin!(is_idle_for(&connection, LAST_WORDS));
    let mut is_told = true;
    loop {
        tokio::select! {
            () = poll_fn(|cx| serve(cx, std::mem::take(&mut is_told))) => return None,
            () = quiet.as_mut() => return None,
            end = poll_fn(|cx| ends.poll(cx)) => if end == End::Cut {
                return Some(end);
            },
        }
    }
}

/// Answers a request on its stream.
#[expect(clippy::manual_async_fn, reason = "which would keep a second place for what it is given, and there are many")]
fn answer<R: Rules>(
    rules: Arc<R>,
    session: Box<Session>,
    on_it: OnIt,
    mut respond: SendResponse<Bytes>,
) -> impl Future<Output = ()> + Send {
    async move {
        let answered = {
            let mut serving = pin!(exchange::serve(rules, session, on_it));
            poll_fn(|cx| match serving.as_mut().poll(cx) {
                Poll::Ready(answered) => Poll::Ready(answered.ok()),
                // Its client may not want it any more.
                Poll::Pending => respond.poll_reset(cx).map(|_| None),
            })
            .await
        };
        if let Some((body, stream)) = begin_answer(answered, respond) {
            send(body, stream).await;
        }
    }
}

/// Sends the head of an answer: what follows it, if anything does.
fn begin_answer<R: Rules>(
    answered: Option<Response<Answer<R>>>,
    mut respond: SendResponse<Bytes>,
) -> Option<(Answer<R>, SendStream<Bytes>)> {
    let Some(answered) = answered else {
        respond.send_reset(Reason::INTERNAL_ERROR);
        return None;
    };
    let (mut head, body) = answered.into_parts();
    finish(&mut head, body.length().filter(|_| !body.is_end_stream()));
    let is_over = body.is_end_stream();
    // Whoever is not there any more is not answered.
    let stream = respond.send_response(Response::from_parts(head, ()), is_over).ok()?;
    if is_over { None } else { Some((body, stream)) }
}

/// Fields of a connection are not HTTP/2's (RFC 9113 §8.2.2); and an answer says when it was sent, and how long it is where that
/// is known.
fn finish(head: &mut response::Parts, length: Option<u64>) {
    let of_connection: Vec<HeaderName> = head.headers.keys().filter(|name| is_of_connection(name)).cloned().collect();
    for name in of_connection {
        head.headers.remove(name);
    }
    if !head.headers.contains_key(header::DATE) {
        head.headers.insert(header::DATE, date());
    }
    if let Some(length) = length
        && !head.headers.contains_key(header::CONTENT_LENGTH)
    {
        head.headers.insert(header::CONTENT_LENGTH, length.into());
    }
}

/// Sends an answer's body, as its client has room for it. If that takes too long, its stream is cancelled: it is dropped without
/// an end. Until all of it is with h2 its request is under way.
async fn send<R: Rules>(mut body: Answer<R>, mut stream: SendStream<Bytes>) {
    let (patience, until) = (body.patience(), body.until());
    let mut clock = Clock::default();
    let mut piece = Bytes::new();
    let is_sent = poll_fn(|cx| {
        for _ in 0..PIECES_AT_ONCE {
            if piece.is_empty() {
                let frame = match Pin::new(&mut body).poll_frame(cx) {
                    Poll::Ready(frame) => frame,
                    Poll::Pending => return stream.poll_reset(cx).map(|_| false),
                };
                match frame.map(|frame| frame.map(Frame::into_data)) {
                    Some(Ok(Ok(data))) => piece = data,
                    Some(Ok(Err(trailers))) => {
                        let trailers = trailers.into_trailers().unwrap_or_default();
                        return Poll::Ready(stream.send_trailers(trailers).is_ok());
                    }
                    Some(Err(_)) => {
                        stream.send_reset(Reason::INTERNAL_ERROR);
                        return Poll::Ready(false);
                    }
                    None => return Poll::Ready(stream.send_data(Bytes::new(), true).is_ok()),
                }
            }
            let room = match piece.len() {
                0 => 0,
                octets => match poll_room(&mut stream, cx, octets) {
                    Poll::Ready(Some(room)) => room,
                    // It is reset, or its connection is gone.
                    Poll::Ready(None) => return Poll::Ready(false),
                    Poll::Pending => {
                        if !clock.is_set() {
                            let patient = Instant::now() + patience;
                            clock.set(until.map_or(patient, |until| until.min(patient)));
                        }
                        return clock.poll(cx).map(|()| false);
                    }
                },
            };
            let now = piece.split_to(room.min(piece.len()));
            if piece.is_empty() {
                // Not before: whoever has room for an octet at a time would never be late.
                clock.stop();
            }
            let is_last = piece.is_empty() && body.is_end_stream();
            if now.is_empty() && !is_last {
                continue;
            }
            let is_taken = stream.send_data(now, is_last).is_ok();
            if is_last || !is_taken {
                return Poll::Ready(is_taken);
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    });
    if is_sent.await {
        body.is_sent();
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

/// What h2 reads and writes.
pub(super) struct Stream<T> {
    /// None: it has been abused.
    inner: Option<Box<T>>,
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
        inner: Box<T>,
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

/// What goes to h2 of what comes, where frames are counted.
struct Passed<'a, 'b> {
    buf: &'a mut ReadBuf<'b>,
    frames: &'a mut Frames,
    is_full: bool,
    are_too_many: bool,
}

impl Sink for Passed<'_, '_> {
    fn put(&mut self, octets: &[u8]) -> usize {
        let room = self.buf.remaining();
        let Ok(taken) = self.frames.came(octets, room) else {
            self.are_too_many = true;
            return 0;
        };
        // h2 makes room for a frame whose head it has.
        self.is_full = self.frames.left() > room - taken;
        self.buf.put(octets.get(..taken).unwrap_or_default())
    }

    fn is_full(&self) -> bool {
        self.is_full || self.are_too_many || self.buf.remaining() == 0
    }
}

impl<T: Transport> AsyncRead for Stream<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let Some(inner) = this.inner.as_mut() else { return Poll::Ready(Err(closed())) };
        let flow = &this.connection.flow;
        let may = flow.may_read();
        // Though nothing may, what was read before is to be had.
        let read = if let May::Read(read) = may { read } else { Read::Nothing };
        let (polled, left) = match &mut this.frames {
            Some((frames, refused)) => {
                let mut passed = Passed { buf: &mut *buf, frames, is_full: false, are_too_many: false };
                let polled = inner.poll_octets(cx, read, &mut passed)?;
                if passed.are_too_many {
                    refused.inc();
                    // Nothing of it is looked at any more.
                    buf.set_filled(before);
                    this.inner = None;
                    return Poll::Ready(Err(io::Error::other("too many frames that move no request on")));
                }
                (polled, frames.left())
            }
            None => (inner.poll_octets(cx, read, buf)?, 0),
        };
        match polled {
            Poll::Ready(()) => {}
            Poll::Pending if may == May::TakeTurns => {
                // It is woken once all others were, and those whom the system has something for.
                let _ = pin!(tokio::task::yield_now()).poll(cx);
                return Poll::Pending;
            }
            Poll::Pending if may == May::Wait => return Poll::Pending,
            // That is over once the connection has begun.
            Poll::Pending => return this.clock.poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into())),
        }
        let came = buf.filled().len() - before;
        flow.came(came, left);
        if this.clock.is_set() {
            this.begun += came;
            if this.begun >= PREFACE {
                this.clock.stop();
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: Transport> AsyncWrite for Stream<T> {
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
