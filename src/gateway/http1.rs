//! HTTP/1.1 with those who come in: one request after the other on a connection, each served by the rules of a door.
//!
//! Reading has bounds and clocks of its own. A head has its time from its first octet (the first one of a connection from the
//! handshake), a connection that nothing is under way on its own; an answer that its client does not read, too. What cannot be
//! read as a request is answered with the same documents as what is refused. Where an answer goes out before the request was all
//! in, the connection is read on for a while before it is closed: to close on unread octets makes the kernel reset it, and
//! destroys the answer on its way.

use super::answer;
use super::exchange::{self, Answer as AnswerBody, PIECES_AT_ONCE, Rules};
use super::session::{Rest, Session};
use super::stream::{Clock, Connection};
use crate::forward::Stop;
use crate::http1::{Answer, Chunks, End, Framing, Request, Share, Taken, skip_empty_lines, split};
use crate::problem::Refusal;
use crate::tls::{READ, RECORD, Read, Sink, TlsStream};
use bytes::{Bytes, BytesMut};
use http::{Method, Response, Version, header};
use hyper::body::{Body as _, Frame};
use parking_lot::Mutex;
use pingora_core::protocols::Stream;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};

/// Octets of a body that nobody wants that are passed over, so that the next request can follow.
const SKIPPED: u64 = 16 * 1024;

/// How long, and how long between two reads, an answered connection is read on.
const LINGER: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(1));

/// Connections that linger at once, at most.
const LINGERING: usize = 1024;

static LINGERERS: AtomicUsize = AtomicUsize::new(0);

const GO_ON: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// What a connection goes over.
pub(super) trait Transport: AsyncBufRead + AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Takes what has come, at most so many octets: none, where no more comes. Where nothing has yet, so much is read.
    fn poll_take(&mut self, cx: &mut Context<'_>, most: usize, read: Read) -> Poll<io::Result<Bytes>>;

    /// Reads so much; where that is nothing, what was read before and not taken is to be had: pending, with nobody to wake, where
    /// there is none.
    fn poll_octets(&mut self, cx: &mut Context<'_>, read: Read, into: &mut dyn Sink) -> Poll<io::Result<()>>;

    /// Reads what comes after the end, and looks at nothing of it: how many octets, 0 where no more come.
    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>>;
}

impl Transport for TlsStream<Stream> {
    fn poll_take(&mut self, cx: &mut Context<'_>, most: usize, read: Read) -> Poll<io::Result<Bytes>> {
        self.poll_take(cx, most, read)
    }

    fn poll_octets(&mut self, cx: &mut Context<'_>, read: Read, into: &mut dyn Sink) -> Poll<io::Result<()>> {
        self.poll_octets(cx, read, into)
    }

    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.poll_discard(cx)
    }
}

/// That of the provider's own nodes on the loopback.
impl Transport for BufReader<Stream> {
    fn poll_take(&mut self, cx: &mut Context<'_>, most: usize, _: Read) -> Poll<io::Result<Bytes>> {
        let mut this = Pin::new(self);
        let came = ready!(this.as_mut().poll_fill_buf(cx))?;
        let taken = Bytes::copy_from_slice(came.get(..most).unwrap_or(came));
        this.consume(taken.len());
        Poll::Ready(Ok(taken))
    }

    fn poll_octets(&mut self, cx: &mut Context<'_>, read: Read, into: &mut dyn Sink) -> Poll<io::Result<()>> {
        if read == Read::Nothing && self.buffer().is_empty() {
            return Poll::Pending;
        }
        let mut this = Pin::new(self);
        if let Some(read) = into.poll_read_from(cx, this.as_mut()) {
            return read;
        }
        let taken = into.put(ready!(this.as_mut().poll_fill_buf(cx))?);
        this.consume(taken);
        Poll::Ready(Ok(()))
    }

    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        Transport::poll_take(self, cx, READ, Read::Amply).map_ok(|taken| taken.len())
    }
}

/// Where what comes is.
#[derive(Debug)]
enum At {
    /// Before a head, or in it.
    Head(End),
    /// In a body of which so many octets are to come.
    Length(u64),
    /// In a body in chunks.
    Chunked(Chunks),
    /// In a body of which nothing can be told.
    Unreadable,
    /// All of a request has come.
    Done,
}

/// A connection, as whoever serves it and the body of the request on it share it. Both are the same task.
struct Wire {
    stream: Box<dyn Transport>,
    /// What has come and is no piece of a body yet.
    buffer: BytesMut,
    at: At,
    /// What is still to be said before a body comes.
    go_on: &'static [u8],
    /// The last piece of a body may be a large one.
    ample: Option<Share>,
}

/// How a request is waited for.
struct Waiting<'a> {
    clock: &'a mut Clock,
    /// It is the connection's first: its time is from the handshake on.
    is_first: bool,
    /// Some of its head has come.
    has_begun: bool,
    /// The time for its head.
    headers: Duration,
}

/// The body of a request that is being served.
pub(super) struct Body(Arc<Mutex<Wire>>);

// === impl Wire ===

impl Wire {
    /// Takes more of what comes into the buffer. 0: no more comes.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        // What comes with a head is kept for longer than what comes later.
        self.ample = None;
        let came = ready!(self.stream.poll_take(cx, READ, Read::Octets(RECORD)))?;
        let octets = came.len();
        if self.buffer.is_empty() {
            self.buffer = BytesMut::from(came);
        } else {
            self.buffer.extend_from_slice(&came);
        }
        Poll::Ready(Ok(octets))
    }

    /// Takes what comes: more than a record only while few do.
    fn poll_take(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<io::Result<Bytes>> {
        // What was taken before is with its node.
        self.ample = None;
        let ample = Share::of_requests();
        let read = if ample.is_some() { Read::Amply } else { Read::Octets(RECORD) };
        let came = ready!(self.stream.poll_take(cx, most, read))?;
        self.ample = ample.filter(|_| came.len() > RECORD);
        Poll::Ready(Ok(came))
    }

    /// Waits for a request. None: none comes, and there is nothing to say about it.
    fn poll_request(
        &mut self,
        cx: &mut Context<'_>,
        waits: &mut Waiting<'_>,
    ) -> Poll<Result<Option<Request>, Refusal>> {
        let mut end = match &mut self.at {
            At::Head(end) => std::mem::take(end),
            At::Done => End::default(),
            At::Length(_) | At::Chunked(_) | At::Unreadable => return Poll::Ready(Ok(None)),
        };
        let request = loop {
            skip_empty_lines(&mut self.buffer);
            if !self.buffer.is_empty() {
                if !std::mem::replace(&mut waits.has_begun, true) && !waits.is_first {
                    // Most heads come whole, and need no clock.
                    waits.clock.stop();
                }
                match Request::take(&mut self.buffer, &mut end) {
                    Ok(None) => {}
                    Ok(Some(request)) => break request,
                    Err(why) => return Poll::Ready(Err(Refusal::BadHttp(why))),
                }
            }
            match self.poll_fill(cx) {
                Poll::Ready(Ok(1..)) => {}
                Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Ok(None)),
                Poll::Pending => {
                    self.at = At::Head(end);
                    self.give_back();
                    if !waits.clock.is_set() {
                        waits.clock.set(Instant::now() + waits.headers);
                    }
                    ready!(waits.clock.poll(cx));
                    // Where nothing was asked, nothing is answered.
                    return Poll::Ready(if waits.has_begun { Err(Refusal::TooSlow) } else { Ok(None) });
                }
            }
        };
        self.at = match request.framing {
            Some(Framing::Length(0)) => At::Done,
            Some(Framing::Length(length)) => At::Length(length),
            Some(Framing::Chunked) => At::Chunked(Chunks::default()),
            Some(Framing::UntilEnd) | None => At::Unreadable,
        };
        self.go_on = if request.awaits_continue && self.buffer.is_empty() { GO_ON } else { b"" };
        self.give_back();
        Poll::Ready(Ok(Some(request)))
    }

    /// More of a body. None: that was all.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Stop>>> {
        loop {
            match &mut self.at {
                At::Head(_) | At::Done => return Poll::Ready(None),
                At::Unreadable => {
                    return Poll::Ready(Some(Err(broken("it cannot be told where the body ends"))));
                }
                At::Length(rest) if !self.buffer.is_empty() => {
                    let (piece, left) = split(&mut self.buffer, *rest);
                    *rest = left;
                    self.has_come(left == 0);
                    return Poll::Ready(Some(Ok(piece)));
                }
                At::Chunked(chunks) => match chunks.take(&mut self.buffer) {
                    Ok(Taken::Data(piece)) => {
                        let is_done = chunks.is_done();
                        self.has_come(is_done);
                        return Poll::Ready(Some(Ok(piece)));
                    }
                    // Trailers say nothing that anybody has checked.
                    Ok(Taken::End(_)) => {
                        self.has_come(true);
                        return Poll::Ready(None);
                    }
                    Ok(Taken::Nothing) => {}
                    Err(why) => {
                        self.at = At::Unreadable;
                        return Poll::Ready(Some(Err(broken(why))));
                    }
                },
                At::Length(_) => {}
            }
            ready!(self.poll_say_go_on(cx));
            let most = match &self.at {
                At::Length(rest) => usize::try_from(*rest).unwrap_or(READ),
                _ => READ,
            };
            let came = match self.poll_take(cx, most) {
                Poll::Pending => {
                    self.give_back();
                    return Poll::Pending;
                }
                Poll::Ready(Ok(came)) if !came.is_empty() => came,
                Poll::Ready(_) => {
                    self.at = At::Unreadable;
                    let refusal = Refusal::BadHttp("the body broke off");
                    return Poll::Ready(Some(Err(Stop { refusal, broken: true, gone: true })));
                }
            };
            match &mut self.at {
                At::Length(rest) => {
                    *rest = rest.saturating_sub(came.len() as u64);
                    let is_done = *rest == 0;
                    self.has_come(is_done);
                    return Poll::Ready(Some(Ok(came)));
                }
                _ if self.buffer.is_empty() => self.buffer = BytesMut::from(came),
                _ => self.buffer.extend_from_slice(&came),
            }
        }
    }

    /// Some of a body has come; all of it, if it is done.
    fn has_come(&mut self, is_done: bool) {
        if is_done {
            self.at = At::Done;
        }
        self.give_back();
    }

    /// Gives the room for what has come back, where nothing is in it: whoever waits takes none.
    fn give_back(&mut self) {
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
    }

    /// Tells a client that waits for it that its body is wanted.
    fn poll_say_go_on(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.go_on.is_empty() {
            return Poll::Ready(());
        }
        while !self.go_on.is_empty() {
            match ready!(Pin::new(&mut *self.stream).poll_write(cx, self.go_on)) {
                Ok(written @ 1..) => self.go_on = self.go_on.get(written..).unwrap_or_default(),
                // Whoever reads will see it.
                _ => self.go_on = b"",
            }
        }
        Pin::new(&mut *self.stream).poll_flush(cx).map(drop)
    }

    /// Whether a client whose request has come, and that has not been answered, is there no more.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !matches!(self.at, At::Done) {
            return Poll::Pending;
        }
        // What has come stays where it is, and no more is read until it is taken.
        match ready!(Pin::new(&mut *self.stream).poll_fill_buf(cx)) {
            Ok([]) | Err(_) => Poll::Ready(()),
            Ok(_) => Poll::Pending,
        }
    }
}

fn broken(why: &'static str) -> Stop {
    Stop { refusal: Refusal::BadHttp(why), broken: true, gone: false }
}

// === impl Body ===

impl Body {
    /// More of it, never an empty piece, and whether all of it has come. None: that was all.
    pub(super) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<(Option<Result<Bytes, Stop>>, bool)> {
        let mut wire = self.0.lock();
        let chunk = ready!(wire.poll_body(cx));
        Poll::Ready((chunk, matches!(wire.at, At::Done)))
    }

    /// All of it has come.
    pub(super) fn is_done(&self) -> bool {
        matches!(self.0.lock().at, At::Done)
    }

    /// Passes over what is there of it, as long as that is not much: how many octets. Its client is not told to go on.
    pub(super) fn skip(&mut self) -> u64 {
        let mut wire = self.0.lock();
        let mut skipped = 0;
        while skipped < SKIPPED && wire.go_on.is_empty() {
            match wire.poll_body(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Some(Ok(piece))) => skipped += piece.len() as u64,
                _ => break,
            }
        }
        skipped
    }
}

// === serving ===

/// Serves all requests on a connection, until it ends.
pub(super) async fn serve<R: Rules>(rules: Arc<R>, connection: Arc<Connection>, stream: Box<dyn Transport>) {
    let at = At::Head(End::default());
    let wire = Arc::new(Mutex::new(Wire { stream, buffer: BytesMut::new(), at, go_on: b"", ample: None }));
    let mut clock = Clock::default();
    // Looked at once for a request: with its answer, for the next.
    let of = |rules: &R| rules.shared().live.load().timeouts;
    let mut timeouts = of(&rules);
    clock.set(Instant::now() + timeouts.headers);
    let mut is_first = true;
    loop {
        let headers = timeouts.headers;
        let mut waits = Waiting { clock: &mut clock, is_first, has_begun: false, headers };
        is_first = false;
        let request = poll_fn(|cx| {
            let mut wire = wire.lock();
            // Whoever waits is told by the end of its connection; what has begun is served.
            if connection.closes() && !waits.has_begun && wire.buffer.is_empty() {
                return Poll::Ready(Ok(None));
            }
            wire.poll_request(cx, &mut waits)
        });
        let request = match request.await {
            Ok(Some(request)) => request,
            Ok(None) => break,
            Err(refusal) => {
                tracing::debug!(client = %connection.client, "no request: {}", refusal.reason());
                connection.linger();
                if refuse(&wire, &refusal, &mut clock, timeouts.body_total).await.is_err() {
                    return;
                }
                break;
            }
        };
        clock.stop();
        let said = Said::of(&request);
        // It has its place in the connection: to make one for each costs more than to have it.
        let answered = {
            let wire = &wire;
            let mut serving = pin!(serve_one(rules.clone(), request, &connection, wire));
            poll_fn(move |cx| match serving.as_mut().poll(cx) {
                Poll::Pending => wire.lock().poll_gone(cx).map(|()| None),
                Poll::Ready(answered) => Poll::Ready(answered.ok()),
            })
            .await
        };
        // Nothing was said that could be taken for an answer.
        let Some(answered) = answered else { break };
        // Others may read more at once while this is written.
        wire.lock().ample = None;
        timeouts = of(&rules);
        let mut writing = Writing::of(answered, &said, &connection, &wire, &mut clock, timeouts.body_total);
        let closes = writing.answer.closes;
        let Ok(has_come) = poll_fn(|cx| writing.poll(cx)).await else { return };
        drop(writing);
        if closes || !has_come {
            break;
        }
        clock.set(Instant::now() + timeouts.keepalive);
    }
    let Some(wire) = Arc::into_inner(wire) else { return };
    end(wire.into_inner().stream, &connection).await;
}

/// What of a request's head says how it is answered. (What a function like [`serve`] holds it has a place for, though it is handed on.)
struct Said {
    method: Method,
    version: Version,
    keeps: bool,
    takes_trailers: bool,
}

impl Said {
    fn of(request: &Request) -> Self {
        let Request { parts, keeps, takes_trailers, .. } = request;
        Self { method: parts.method.clone(), version: parts.version, keeps: *keeps, takes_trailers: *takes_trailers }
    }
}

/// Serves a request.
fn serve_one<R: Rules>(
    rules: Arc<R>,
    request: Request,
    connection: &Arc<Connection>,
    wire: &Arc<Mutex<Wire>>,
) -> impl Future<Output = Result<Response<AnswerBody<R>>, exchange::Gone>> + Send + use<R> {
    let on_it = connection.begin();
    let Request { parts, framing, .. } = request;
    let rest = if framing == Some(Framing::Length(0)) { Rest::None } else { Rest::Http1(Body(wire.clone())) };
    exchange::serve(rules, Session::new(parts, rest, connection.clone()), on_it)
}

/// There is nobody to answer, or no answer to its end.
struct Gone;

/// Answers what is no request.
async fn refuse(wire: &Mutex<Wire>, refusal: &Refusal, clock: &mut Clock, limit: Duration) -> Result<(), Gone> {
    let (head, body) = answer::refusal(refusal).into_parts();
    let mut answer = Answer::new(&head, Some(body.len() as u64), (&Method::GET, Version::HTTP_11), true);
    answer.outgoing.add(body, true).and_then(|()| answer.outgoing.end()).map_err(|_| Gone)?;
    clock.stop();
    poll_fn(|cx| poll_out(wire, &mut answer, clock, (limit, None), cx)).await.map(drop)
}

/// An answer that is being written.
struct Writing<'a, R: Rules> {
    wire: &'a Mutex<Wire>,
    answer: Answer,
    body: AnswerBody<R>,
    takes_trailers: bool,
    clock: &'a mut Clock,
    /// For some of it to be taken.
    limit: Duration,
}

impl<'a, R: Rules> Writing<'a, R> {
    fn of(
        answered: Response<AnswerBody<R>>,
        said: &Said,
        connection: &Connection,
        wire: &'a Mutex<Wire>,
        clock: &'a mut Clock,
        limit: Duration,
    ) -> Self {
        let (head, body) = answered.into_parts();
        let says_close = head.headers.get(header::CONNECTION).is_some_and(|value| value == "close");
        let closes = !said.keeps || says_close || connection.closes();
        let answer = Answer::new(&head, body.length(), (&said.method, said.version), closes);
        Self { wire, answer, body, takes_trailers: said.takes_trailers, clock, limit }
    }

    /// Whether all of the request has come, once all of its answer has gone.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Gone>> {
        let mut pieces = PIECES_AT_ONCE;
        loop {
            let waits = loop {
                if self.body.is_end_stream() {
                    if !self.answer.outgoing.is_ended() {
                        self.answer.outgoing.end().map_err(|_| Gone)?;
                    }
                    break false;
                }
                // What is no part of an answer, but has to end with it, is read away.
                if pieces == 0 || !(self.answer.outgoing.is_ended() || self.answer.outgoing.has_room()) {
                    break false;
                }
                pieces -= 1;
                match Pin::new(&mut self.body).poll_frame(cx) {
                    Poll::Ready(Some(Ok(frame))) => self.take(frame)?,
                    Poll::Ready(None) if self.body.is_end_stream() => {}
                    Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(Err(Gone)),
                    Poll::Pending => break true,
                }
            };
            let until = (self.limit, self.body.until());
            let has_come = ready!(poll_out(self.wire, &mut self.answer, self.clock, until, cx))?;
            if self.body.is_end_stream() && self.answer.outgoing.is_ended() {
                return Poll::Ready(Ok(has_come));
            }
            if waits {
                // Whoever is not there any more needs no rest of it.
                return self.wire.lock().poll_gone(cx).map(|()| Err(Gone));
            }
            if pieces == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    fn take(&mut self, frame: Frame<Bytes>) -> Result<(), Gone> {
        let outgoing = &mut self.answer.outgoing;
        if outgoing.is_ended() {
            return Ok(());
        }
        let taken = match frame.into_data() {
            Ok(data) => outgoing.add(data, true),
            Err(frame) => match frame.into_trailers() {
                Ok(trailers) if self.takes_trailers => outgoing.end_with(&trailers),
                _ => Ok(()),
            },
        };
        taken.map_err(|_| Gone)
    }
}

/// Writes what there is of an answer, within its time: so long for some of it to be taken, and all of it until then. Then it says
/// whether all of the request has come.
fn poll_out(
    wire: &Mutex<Wire>,
    answer: &mut Answer,
    clock: &mut Clock,
    (limit, until): (Duration, Option<Instant>),
    cx: &mut Context<'_>,
) -> Poll<Result<bool, Gone>> {
    let mut wire = wire.lock();
    if wire.go_on.len() == GO_ON.len() {
        // Too late to say so.
        wire.go_on = b"";
    }
    // What has been begun to be said is said first.
    let written = match wire.poll_say_go_on(cx) {
        Poll::Ready(()) => {
            let stream = &mut *wire.stream;
            match answer.outgoing.poll_write(cx, stream) {
                Poll::Ready(Ok(())) => answer.outgoing.poll_flush(cx, stream),
                other => other,
            }
        }
        Poll::Pending => Poll::Pending,
    };
    if let Poll::Ready(written) = written {
        clock.stop();
        return Poll::Ready(written.map(|()| matches!(wire.at, At::Done)).map_err(|_| Gone));
    }
    let deadline = *answer.outgoing.until.get_or_insert_with(|| {
        let stands_still = Instant::now() + limit;
        until.map_or(stands_still, |until| until.min(stands_still)).into()
    });
    clock.set(deadline.into());
    clock.poll(cx).map(|()| Err(Gone))
}

/// Ends a connection in good order: says so, and where its client may still be writing reads on.
async fn end(mut stream: Box<dyn Transport>, connection: &Connection) {
    let (total, idle) = LINGER;
    if tokio::time::timeout(total, stream.shutdown()).await.is_err() || !connection.lingers() {
        return;
    }
    let Some(lingers) = Share::new(&LINGERERS, 1, LINGERING) else { return };
    // What is counted of the connection is not for as long.
    tokio::spawn(async move {
        let _lingers = lingers;
        let _ = tokio::time::timeout(total, async {
            let mut read = async || poll_fn(|cx| stream.poll_discard(cx)).await;
            while let Ok(Ok(1..)) = tokio::time::timeout(idle, read()).await {}
        })
        .await;
    });
}
