//! HTTP/1.1 as a client (RFC 9112): one request and its answer on a connection, and the next one when both are over.
//!
//! An [`Exchange`] owns its connection and does all of its work where it is asked for the answer: it writes the
//! request, reads the answer, and watches the clocks. Head and first piece of a body leave in one write. What the
//! other side writes is framed strictly: what could be read in two ways is no answer.

use super::{Error, Head, Source, Stop, Times};
use crate::http1::{
    Bad, Chunks, End, Framing, Outgoing, Share, Taken, is_of_connection, length_of, name_and_value, options, put_field,
    put_length, split,
};
use bytes::{BufMut, Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName};
use http::{Method, StatusCode, Version, response};
use hyper::body::Frame;
use std::future::{Future, poll_fn};
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// Pieces of a request's body that one poll takes, so that a fast sender leaves time for others.
const PIECES_AT_ONCE: usize = 32;
/// Octets of an answer's head.
const HEAD_MAX: usize = 64 * 1024;
/// Fields of an answer's head.
const FIELDS_MAX: usize = 128;
/// Answers before the answer (1xx).
const INFORMATIONAL_MAX: u8 = 16;
/// What is read at once of a head.
const READ_HEAD: usize = 4 * 1024;
/// What is read at once of a body, at first.
const READ_BODY: usize = 16 * 1024;
/// What is read at once of a body that fills all the room it is given.
const READ_BODY_MAX: usize = 64 * 1024;
/// With less room than this a read gets a new buffer.
const READ_MIN: usize = 1024;

/// What a connection goes over: TCP, or TLS on it.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// Any [`Io`].
pub type Stream = Box<dyn Io>;

/// A connection on which nothing is under way.
pub struct Connection {
    stream: Stream,
    /// The clock of whatever is waited for, made when something first is, and kept from request to request.
    sleep: Option<Pin<Box<Sleep>>>,
    /// The clock holds the waker of the request that is under way.
    is_watched: bool,
    /// What connections to the same peer go by.
    pub(super) key: u128,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Connection {
    /// A connection on a stream that is there and speaks HTTP/1.1.
    pub fn new(stream: Stream) -> Self {
        Self { stream, sleep: None, is_watched: false, key: 0 }
    }

    /// Nothing has come on it: it is neither closed nor has the other side said anything unasked.
    pub fn is_usable(&mut self) -> bool {
        let stream = &mut self.stream;
        let mut octet = [0];
        // a task that has used up its budget would be told "pending" whatever has come
        let read = tokio::task::unconstrained(poll_fn(|cx| {
            Pin::new(&mut *stream).poll_read(cx, &mut ReadBuf::new(&mut octet))
        }));
        pin!(read).poll(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// Waits until `deadline`. The clock runs on from an earlier one: most deadlines are taken back before they are
    /// due, and setting a clock costs more than its going off too early once in a while.
    fn poll_deadline(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        self.is_watched = true;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if sleep.deadline() > deadline {
            sleep.as_mut().reset(deadline);
        }
        loop {
            ready!(sleep.as_mut().poll(cx));
            if sleep.deadline() >= deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(deadline);
        }
    }

    /// Lets go of the request that was under way: the clock would keep its task, and wake it.
    fn rest(&mut self) {
        if let Some(sleep) = &mut self.sleep
            && std::mem::take(&mut self.is_watched)
        {
            let sleep = tokio::task::unconstrained(sleep.as_mut());
            let _ = pin!(sleep).poll(&mut Context::from_waker(Waker::noop()));
        }
    }
}

/// A request and its answer on a connection.
pub struct Exchange<S> {
    connection: Connection,
    source: S,
    upload: Upload,
    answer: Answer,
    /// The connection was kept from before.
    is_reused: bool,
    /// See [`Times::read`].
    read: Duration,
    /// See [`Times::write`].
    write: Duration,
    /// Until when something has to be read.
    read_until: Option<Instant>,
    /// What time it is, where that is known, as long as it is asked for the first time.
    pub(super) now: Option<Instant>,
}

impl<S> std::fmt::Debug for Exchange<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exchange").finish_non_exhaustive()
    }
}

impl<S: Source> Exchange<S> {
    /// A request on `connection`, which was kept from before if it is `reused`. Nothing is written until it is polled.
    pub fn begin(connection: Connection, reused: bool, head: &Head, source: S, times: Times) -> Self {
        let upload = Upload::new(head, source.length(), source.is_done());
        let answer = Answer::new(head.method == Method::HEAD);
        let Times { read, write, .. } = times;
        Self { connection, source, upload, answer, is_reused: reused, read, write, read_until: None, now: None }
    }

    /// Waits for the answer's head, and moves the body on meanwhile. To be asked until it is there, and not again.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, Error>> {
        if !matches!(self.answer.phase, Phase::Head) {
            return Poll::Ready(Err(broken("the answer's head has been there before")));
        }
        let head = self.try_poll_head(cx);
        self.now = None;
        let head = ready!(head);
        match &head {
            // from now on the clock is that of the body
            Ok(_) => self.read_until = None,
            Err(_) => self.answer.phase = Phase::Failed,
        }
        Poll::Ready(head)
    }

    /// Waits for more of the answer's body, or its trailers, and moves the request's body on meanwhile. None: that
    /// was all.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if matches!(self.answer.phase, Phase::Done | Phase::Failed) {
            return Poll::Ready(None);
        }
        let frame = ready!(self.try_poll_frame(cx));
        if frame.is_err() {
            self.answer.phase = Phase::Failed;
        }
        Poll::Ready(frame.transpose())
    }

    /// The head has said that nothing follows it, or all that follows has been given out.
    pub fn is_answered(&self) -> bool {
        matches!(self.answer.phase, Phase::Done)
    }

    /// The request's body again, which then goes no further.
    pub fn into_source(self) -> S {
        self.source
    }

    /// The request's body.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// All of the request is written, and its body has ended.
    pub fn is_sent(&self) -> bool {
        self.upload.is_over && self.upload.failure.is_none()
    }

    /// The connection, if another request may follow on it: this one is all written, its answer all read, and neither
    /// side has said otherwise.
    pub fn into_kept(self) -> Option<Connection> {
        let is_kept = self.is_answered() && self.is_sent() && self.answer.may_be_kept && self.answer.buffer.is_empty();
        let mut connection = self.connection;
        is_kept.then(|| {
            connection.rest();
            connection
        })
    }

    fn try_poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, Error>> {
        self.drive_upload(cx)?;
        loop {
            if let Some(parts) = self.answer.take_head()? {
                return Poll::Ready(Ok(parts));
            }
            match self.answer.poll_read(cx, &mut self.connection.stream) {
                // the head's clock runs on, however much of it has come
                Poll::Ready(Ok(1..)) => {}
                Poll::Ready(Ok(0)) => {
                    return Poll::Ready(Err(self.lost("the connection was closed before an answer".to_owned())));
                }
                Poll::Ready(Err(error)) if is_reset(&error) => {
                    return Poll::Ready(Err(self.lost(format!("the connection was lost before an answer: {error}"))));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Error::Broken(error.to_string()))),
                Poll::Pending => return self.poll_clock(cx).map(Err),
            }
        }
    }

    fn try_poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame<Bytes>>, Error>> {
        self.drive_upload(cx)?;
        loop {
            match self.answer.take_frame()? {
                Came::Frame(frame) => return Poll::Ready(Ok(Some(frame))),
                Came::All => return Poll::Ready(Ok(None)),
                Came::Nothing => {}
            }
            match self.answer.poll_read(cx, &mut self.connection.stream) {
                Poll::Ready(Ok(1..)) => self.read_until = None,
                Poll::Ready(Ok(0)) if matches!(self.answer.phase, Phase::UntilEnd) => {
                    self.answer.phase = Phase::Done;
                    return Poll::Ready(Ok(None));
                }
                Poll::Ready(Ok(0)) => {
                    return Poll::Ready(Err(broken("the connection was closed in the middle of an answer")));
                }
                Poll::Ready(Err(error)) => {
                    return Poll::Ready(Err(Error::Broken(format!(
                        "the connection was lost in the middle of an answer: {error}"
                    ))));
                }
                Poll::Pending => return self.poll_clock(cx).map(Err),
            }
        }
    }

    /// Why there is no answer on a connection that is gone.
    fn lost(&mut self, why: String) -> Error {
        if self.is_reused && !self.answer.has_begun {
            return Error::Closed;
        }
        Error::Broken(self.upload.failure.take().unwrap_or(why))
    }

    /// Where nothing can be read: waits until that has lasted for too long, or the writing that holds it up.
    fn poll_clock(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let is_over = self.upload.is_over;
        let (until, limit) = if is_over {
            (&mut self.read_until, self.read)
        } else if self.upload.is_blocked {
            (&mut self.upload.outgoing.until, self.write)
        } else {
            return Poll::Pending;
        };
        let deadline = match *until {
            Some(deadline) => deadline,
            None => {
                // a time that long does not end
                let now = self.now.take().unwrap_or_else(Instant::now);
                let Some(deadline) = now.checked_add(limit) else { return Poll::Pending };
                *until = Some(deadline);
                deadline
            }
        };
        ready!(self.connection.poll_deadline(cx, deadline));
        Poll::Ready(match self.upload.failure.take() {
            Some(failure) if matches!(self.answer.phase, Phase::Head) => Error::Broken(failure),
            _ if is_over => Error::ReadTimedOut,
            _ => Error::WriteTimedOut,
        })
    }

    /// Writes what can be written now. That writing fails is noted and no error yet: the answer may be there already.
    fn drive_upload(&mut self, cx: &mut Context<'_>) -> Result<(), Error> {
        if self.upload.is_over {
            return Ok(());
        }
        if let Some(refused) = self.upload.refused {
            return Err(broken(refused));
        }
        // What is not taken is not added to.
        let mut is_blocked = std::mem::take(&mut self.upload.is_blocked);
        let mut pieces = PIECES_AT_ONCE;
        loop {
            let mut waits = false;
            while !waits && !is_blocked && self.upload.outgoing.has_room() {
                if pieces == 0 {
                    break;
                }
                pieces -= 1;
                waits = self.take_piece(cx)?;
            }
            match self.upload.outgoing.poll_write(cx, &mut self.connection.stream) {
                Poll::Ready(Ok(())) => is_blocked = false,
                Poll::Ready(Err(error)) => {
                    self.upload.give_up(&error);
                    return Ok(());
                }
                Poll::Pending => {
                    self.upload.is_blocked = true;
                    return Ok(());
                }
            }
            if waits || self.upload.outgoing.is_ended() {
                break;
            }
            if pieces == 0 {
                cx.waker().wake_by_ref();
                return Ok(());
            }
        }
        match self.upload.outgoing.poll_flush(cx, &mut self.connection.stream) {
            Poll::Ready(Ok(())) if self.upload.outgoing.is_ended() => self.upload.finish(),
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => self.upload.give_up(&error),
            Poll::Pending => self.upload.is_blocked = true,
        }
        Ok(())
    }

    /// Takes the next piece of the body, or its end. True: neither is there yet.
    fn take_piece(&mut self, cx: &mut Context<'_>) -> Result<bool, Error> {
        if self.source.is_done() {
            self.upload.outgoing.end().map_err(of_request)?;
            return Ok(false);
        }
        match self.source.poll_chunk(cx) {
            Poll::Ready(Some(Ok(piece))) => {
                let is_vectored = self.connection.stream.is_write_vectored();
                self.upload.outgoing.add(piece, is_vectored).map_err(of_request)?;
                if self.source.is_done() {
                    self.upload.outgoing.end().map_err(of_request)?;
                }
                Ok(false)
            }
            Poll::Ready(Some(Err(stop))) => Err(stopped(stop)),
            Poll::Ready(None) => self.upload.outgoing.end().map(|()| false).map_err(of_request),
            Poll::Pending => Ok(true),
        }
    }
}

/// A request on its way out.
struct Upload {
    outgoing: Outgoing,
    /// Nothing is taken at present.
    is_blocked: bool,
    /// Nothing is to be written any more: that was all, or it has failed.
    is_over: bool,
    /// Why it was given up.
    failure: Option<String>,
    /// Why it must not be sent at all.
    refused: Option<&'static str>,
}

impl Upload {
    fn new(head: &Head, length: Option<u64>, is_done: bool) -> Self {
        let is_chunked = length.is_none() && !is_done;
        let length = length.unwrap_or(0);
        let target = head.target.as_str();
        let fields: usize = head.fields.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
        let line = head.method.as_str().len() + target.len() + head.authority.len();
        let mut front = Outgoing::room(line + fields + 96, Some(length));
        front.put_slice(head.method.as_str().as_bytes());
        // a query alone is a target without a path to `http`, and none to HTTP
        front.put_slice(if target.starts_with(['/', '*']) { b" " } else { b" /" });
        front.put_slice(target.as_bytes());
        front.put_slice(b" HTTP/1.1\r\n");
        put_field(&mut front, b"host", head.authority.as_bytes());
        for (name, value) in &head.fields {
            // a second one of these would make two requests of one
            if matches!(*name, header::HOST | header::CONTENT_LENGTH | header::TRANSFER_ENCODING) {
                continue;
            }
            put_field(&mut front, name.as_str().as_bytes(), value.as_bytes());
        }
        if is_chunked {
            front.put_slice(b"transfer-encoding: chunked\r\n");
        } else if length > 0 || matches!(head.method, Method::POST | Method::PUT | Method::PATCH) {
            put_length(&mut front, length);
        }
        front.put_slice(b"\r\n");
        let is_authority = !head.authority.is_empty() && head.authority.bytes().all(|octet| octet.is_ascii_graphic());
        let framing = if is_chunked { Framing::Chunked } else { Framing::Length(length) };
        Self {
            outgoing: Outgoing::new(front, framing, is_done && !is_chunked && length == 0, Share::of_requests),
            is_blocked: false,
            is_over: false,
            failure: None,
            refused: if is_authority { None } else { Some("the request's authority is none") },
        }
    }

    /// All is out.
    fn finish(&mut self) {
        self.is_over = true;
        self.outgoing.clear();
    }

    /// Nothing more of it can be written.
    fn give_up(&mut self, error: &io::Error) {
        self.finish();
        self.failure = Some(format!("the request could not be written: {error}"));
    }
}

/// Where an answer is.
enum Phase {
    /// Before its head, or in it.
    Head,
    /// In a body of which so many octets are to come.
    Length(u64),
    /// In a body in chunks.
    Chunked(Chunks),
    /// In a body that ends with the connection.
    UntilEnd,
    /// All of it was given out.
    Done,
    /// It has come to nothing.
    Failed,
}

/// What there was to take of an answer.
enum Came {
    Frame(Frame<Bytes>),
    /// Nothing, until more is read.
    Nothing,
    /// Nothing, and nothing will come.
    All,
}

/// An answer on its way in.
struct Answer {
    buffer: BytesMut,
    phase: Phase,
    /// Of a head.
    end: End,
    /// What is read at once.
    step: usize,
    /// Answers before it.
    informational: u8,
    /// An octet of it has come.
    has_begun: bool,
    /// It is to `HEAD`.
    is_bodyless: bool,
    /// The other side keeps the connection.
    may_be_kept: bool,
}

impl Answer {
    fn new(is_bodyless: bool) -> Self {
        Self {
            buffer: BytesMut::new(),
            phase: Phase::Head,
            end: End::default(),
            step: READ_HEAD,
            informational: 0,
            has_begun: false,
            is_bodyless,
            may_be_kept: false,
        }
    }

    /// Reads more: where it is known how much is to come, no more than that.
    fn poll_read(&mut self, cx: &mut Context<'_>, stream: &mut Stream) -> Poll<io::Result<usize>> {
        let most = match self.phase {
            Phase::Length(rest) => usize::try_from(rest).unwrap_or(usize::MAX),
            _ => usize::MAX,
        };
        let wanted = most.min(self.step);
        let read = if wanted <= READ_HEAD {
            // Whoever waits for an answer has no room for it.
            let mut room = [const { MaybeUninit::uninit() }; READ_HEAD];
            let mut came = ReadBuf::uninit(room.get_mut(..wanted).unwrap_or_default());
            ready!(Pin::new(stream).poll_read(cx, &mut came))?;
            self.buffer.extend_from_slice(came.filled());
            came.filled().len()
        } else {
            if self.buffer.capacity() - self.buffer.len() < wanted.min(READ_MIN) {
                self.buffer.reserve(wanted);
            }
            let room = most.min(self.buffer.capacity() - self.buffer.len());
            let mut limited = (&mut self.buffer).limit(room);
            ready!(pin!(stream.read_buf(&mut limited)).poll(cx))?
        };
        if read > 0 {
            self.has_begun = true;
        }
        if read >= self.step && !matches!(self.phase, Phase::Head) {
            self.step = (self.step * 2).min(READ_BODY_MAX);
        }
        Poll::Ready(Ok(read))
    }

    /// Takes the head, once it is there, and those before it (1xx) out of the way.
    fn take_head(&mut self) -> Result<Option<response::Parts>, Error> {
        loop {
            if self.buffer.iter().zip(b"HTTP/1.").any(|(is, should)| is != should) {
                return Err(broken("what came is no HTTP/1"));
            }
            let Some(end) = self.end.find(&self.buffer).map_err(of_answer)? else {
                if self.buffer.len() > HEAD_MAX {
                    return Err(broken("the answer's head is too long"));
                }
                return Ok(None);
            };
            if end > HEAD_MAX {
                return Err(broken("the answer's head is too long"));
            }
            let head = self.buffer.split_to(end).freeze();
            if let Some(parts) = self.read_head(&head)? {
                return Ok(Some(parts));
            }
            self.informational += 1;
            if self.informational > INFORMATIONAL_MAX {
                return Err(broken("too many answers before the answer"));
            }
        }
    }

    /// Reads a head. None: it is one before the answer's.
    fn read_head(&mut self, head: &Bytes) -> Result<Option<response::Parts>, Error> {
        let mut room = [const { MaybeUninit::uninit() }; FIELDS_MAX];
        let mut read = httparse::Response::new(&mut []);
        let parsed = httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut read, head, &mut room);
        match parsed {
            Ok(httparse::Status::Complete(end)) if end == head.len() => {}
            Ok(_) => return Err(broken("the answer's head: lines end in two ways")),
            Err(error) => return Err(Error::Broken(format!("the answer's head: {error}"))),
        }
        let version = match read.version {
            Some(1) => Version::HTTP_11,
            Some(0) => Version::HTTP_10,
            _ => return Err(broken("the answer's version is neither HTTP/1.1 nor HTTP/1.0")),
        };
        let Some(status) = read.code.and_then(|code| StatusCode::from_u16(code).ok()) else {
            return Err(broken("the answer's status is none"));
        };
        if status == StatusCode::SWITCHING_PROTOCOLS {
            return Err(broken("it switches protocols unasked"));
        }
        if status.is_informational() {
            return Ok(None);
        }
        let mut fields = Fields::default();
        fields.map.reserve(read.headers.len());
        for field in read.headers.iter() {
            fields.add(head, field)?;
        }
        let Fields { mut map, length, is_chunked, closes, keeps, named } = fields;
        for name in named {
            // the framing's own is no one's to take away
            if name != header::CONTENT_LENGTH {
                map.remove(name);
            }
        }
        if is_chunked && (length.is_some() || version != Version::HTTP_11) {
            return Err(broken("the answer's body is framed in two ways"));
        }
        self.may_be_kept = !closes && (version == Version::HTTP_11 || keeps);
        self.step = READ_BODY;
        let is_empty = status == StatusCode::NO_CONTENT;
        self.phase = if is_empty || self.is_bodyless || status == StatusCode::NOT_MODIFIED {
            if is_empty {
                // what says that a body follows where none may is not asked again
                self.may_be_kept &= !is_chunked && length.unwrap_or(0) == 0;
                map.remove(header::CONTENT_LENGTH);
            }
            Phase::Done
        } else if is_chunked {
            Phase::Chunked(Chunks::default())
        } else {
            match length {
                Some(0) => Phase::Done,
                Some(length) => Phase::Length(length),
                None => {
                    self.may_be_kept = false;
                    Phase::UntilEnd
                }
            }
        };
        let mut parts = http::Response::new(()).into_parts().0;
        parts.status = status;
        parts.version = version;
        parts.headers = map;
        Ok(Some(parts))
    }

    /// Takes what is there of the body.
    fn take_frame(&mut self) -> Result<Came, Error> {
        match self.phase {
            Phase::Head => Err(broken("the answer's head is to be asked for first")),
            Phase::Done | Phase::Failed => Ok(Came::All),
            Phase::Chunked(_) => self.take_chunked(),
            Phase::UntilEnd | Phase::Length(_) if self.buffer.is_empty() => Ok(Came::Nothing),
            Phase::UntilEnd => Ok(Came::Frame(Frame::data(self.buffer.split().freeze()))),
            Phase::Length(rest) => {
                let (piece, rest) = split(&mut self.buffer, rest);
                self.phase = if rest == 0 { Phase::Done } else { Phase::Length(rest) };
                Ok(Came::Frame(Frame::data(piece)))
            }
        }
    }

    fn take_chunked(&mut self) -> Result<Came, Error> {
        let Phase::Chunked(chunks) = &mut self.phase else { return Ok(Came::All) };
        let taken = chunks.take(&mut self.buffer).map_err(of_answer)?;
        if chunks.is_done() {
            self.phase = Phase::Done;
        }
        Ok(match taken {
            Taken::Data(piece) => Came::Frame(Frame::data(piece)),
            Taken::Nothing => Came::Nothing,
            Taken::End(trailers) if trailers.is_empty() => Came::All,
            Taken::End(trailers) => Came::Frame(Frame::trailers(trailers)),
        })
    }
}

/// The fields of a head, and what those of them say that are the connection's.
#[derive(Default)]
struct Fields {
    /// What is passed on.
    map: HeaderMap,
    length: Option<u64>,
    is_chunked: bool,
    closes: bool,
    keeps: bool,
    /// What `Connection` names.
    named: Vec<HeaderName>,
}

impl Fields {
    fn add(&mut self, head: &Bytes, field: &httparse::Header<'_>) -> Result<(), Error> {
        let (name, value) = name_and_value(head, field).map_err(of_answer)?;
        match name {
            header::CONTENT_LENGTH => {
                let Some(length) = length_of(value.as_bytes()) else {
                    return Err(broken("the answer's Content-Length is no length"));
                };
                match self.length {
                    Some(before) if before != length => return Err(broken("the answer has two lengths")),
                    Some(_) => {}
                    None => {
                        self.length = Some(length);
                        self.map.append(name, value);
                    }
                }
            }
            header::TRANSFER_ENCODING => {
                if self.is_chunked || !value.as_bytes().eq_ignore_ascii_case(b"chunked") {
                    return Err(broken("the answer's Transfer-Encoding is not chunked alone"));
                }
                self.is_chunked = true;
            }
            header::CONNECTION => {
                for option in options(&value) {
                    if option.eq_ignore_ascii_case(b"close") {
                        self.closes = true;
                    } else if option.eq_ignore_ascii_case(b"keep-alive") {
                        self.keeps = true;
                    } else if let Ok(named) = HeaderName::from_bytes(option) {
                        if self.named.len() >= FIELDS_MAX {
                            return Err(broken("the answer's Connection names too many fields"));
                        }
                        self.named.push(named);
                    }
                }
            }
            name if is_of_connection(&name) => {}
            name => {
                self.map.append(name, value);
            }
        }
        Ok(())
    }
}

/// The other side has gone.
fn is_reset(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::NotConnected
            | ErrorKind::UnexpectedEof
    )
}

/// What is wrong with what the other side has written.
fn of_answer(why: Bad) -> Error {
    Error::Broken(format!("the answer: {why}"))
}

/// What is wrong with the request's own body.
fn of_request(why: Bad) -> Error {
    Error::Broken(format!("the request: {why}"))
}

fn broken(why: &str) -> Error {
    Error::Broken(why.to_owned())
}

fn stopped(stop: Stop) -> Error {
    Error::Stopped(stop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http1::{EXTENSIONS_MAX, JOINED, TRAILER_FIELDS_MAX, TRAILERS_MAX};
    use crate::problem::Refusal;
    use http::HeaderValue;
    use proptest::prelude::*;
    use std::collections::VecDeque;
    use std::io::IoSlice;
    use std::sync::{Arc, Mutex};
    use std::task::Wake;
    use tokio::io::AsyncWriteExt;

    const TIMES: Times = Times {
        connect: Duration::from_secs(1),
        read: Duration::from_secs(60),
        write: Duration::from_secs(10),
        keepalive: Duration::from_secs(1),
    };

    enum Step {
        Piece(Vec<u8>),
        /// Pending once.
        Later,
        /// Pending for good.
        Never,
        Stop,
    }

    struct Body {
        steps: VecDeque<Step>,
        length: Option<u64>,
        /// Says that it is done with its last piece, and not only when asked again.
        tells: bool,
    }

    impl Source for Body {
        fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Stop>>> {
            match self.steps.pop_front() {
                Some(Step::Piece(piece)) => Poll::Ready(Some(Ok(piece.into()))),
                Some(Step::Later) => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                Some(Step::Never) => {
                    self.steps.push_front(Step::Never);
                    Poll::Pending
                }
                Some(Step::Stop) => Poll::Ready(Some(Err(Refusal::TooLarge.into()))),
                None => {
                    self.tells = true;
                    Poll::Ready(None)
                }
            }
        }

        fn length(&self) -> Option<u64> {
            self.length
        }

        fn is_done(&self) -> bool {
            self.tells && self.steps.is_empty()
        }
    }

    fn body(length: Option<u64>, steps: impl IntoIterator<Item = Step>) -> Body {
        Body { steps: steps.into_iter().collect(), length, tells: true }
    }

    fn no_body() -> Body {
        body(None, [])
    }

    fn piece(octets: &[u8]) -> Step {
        Step::Piece(octets.to_vec())
    }

    enum Read {
        Data(Vec<u8>),
        End,
        Error(ErrorKind),
    }

    /// What a [`Script`] has seen.
    #[derive(Default)]
    struct Seen {
        written: Vec<u8>,
        writes: Vec<usize>,
        flushes: usize,
        /// The room of every read.
        rooms: Vec<usize>,
    }

    /// A stream that does as it is told; with nothing to read any more it is pending.
    #[derive(Default)]
    struct Script {
        reads: VecDeque<Read>,
        seen: Arc<Mutex<Seen>>,
        is_vectored: bool,
        /// Octets that a write takes at most.
        most: Option<usize>,
        /// Octets that are taken in all.
        in_all: Option<usize>,
        /// What a write comes to that would exceed `in_all`; it is pending otherwise.
        fails: Option<ErrorKind>,
        /// So many flushes are pending before one is not.
        pending_flushes: usize,
    }

    impl Script {
        fn answering(answer: &[u8]) -> Self {
            Self { reads: [Read::Data(answer.to_vec())].into(), ..Self::default() }
        }

        fn reading(reads: impl IntoIterator<Item = Read>) -> Self {
            Self { reads: reads.into_iter().collect(), ..Self::default() }
        }

        fn take(&mut self, octets: &[u8]) -> Poll<io::Result<usize>> {
            let mut seen = self.seen.lock().unwrap();
            let left = self.in_all.unwrap_or(usize::MAX).saturating_sub(seen.written.len());
            let taken = octets.len().min(self.most.unwrap_or(usize::MAX)).min(left);
            if taken == 0 {
                return self.fails.map_or(Poll::Pending, |kind| Poll::Ready(Err(kind.into())));
            }
            seen.written.extend_from_slice(&octets[..taken]);
            seen.writes.push(taken);
            Poll::Ready(Ok(taken))
        }
    }

    impl AsyncRead for Script {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            self.seen.lock().unwrap().rooms.push(to.remaining());
            match self.reads.pop_front() {
                Some(Read::Data(mut data)) => {
                    let rest = data.split_off(data.len().min(to.remaining()));
                    to.put_slice(&data);
                    if !rest.is_empty() {
                        self.reads.push_front(Read::Data(rest));
                    }
                    Poll::Ready(Ok(()))
                }
                Some(Read::End) => {
                    self.reads.push_front(Read::End);
                    Poll::Ready(Ok(()))
                }
                Some(Read::Error(kind)) => Poll::Ready(Err(kind.into())),
                None => Poll::Pending,
            }
        }
    }

    impl AsyncWrite for Script {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
            self.as_mut().get_mut().take(octets)
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            parts: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            assert!(self.is_vectored);
            self.as_mut().get_mut().take(&parts.iter().flat_map(|part| part.iter().copied()).collect::<Vec<_>>())
        }

        fn is_write_vectored(&self) -> bool {
            self.is_vectored
        }

        fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.seen.lock().unwrap().flushes += 1;
            if self.pending_flushes > 0 {
                self.pending_flushes -= 1;
                return Poll::Pending;
            }
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn head(method: Method) -> Head {
        let fields = vec![(HeaderName::from_static("x-a"), HeaderValue::from_static("1"))];
        Head { method, target: "/p?q=1".parse().unwrap(), authority: "ds.example:8443".to_owned(), fields }
    }

    fn on(script: Script, method: Method, source: Body) -> (Exchange<Body>, Arc<Mutex<Seen>>) {
        let seen = script.seen.clone();
        (Exchange::begin(Connection::new(Box::new(script)), false, &head(method), source, TIMES), seen)
    }

    fn reused(script: Script, source: Body) -> Exchange<Body> {
        Exchange::begin(Connection::new(Box::new(script)), true, &head(Method::POST), source, TIMES)
    }

    async fn head_of(exchange: &mut Exchange<Body>) -> Result<response::Parts, Error> {
        poll_fn(|cx| exchange.poll_head(cx)).await
    }

    async fn frame_of(exchange: &mut Exchange<Body>) -> Option<Result<Frame<Bytes>, Error>> {
        poll_fn(|cx| exchange.poll_frame(cx)).await
    }

    async fn rest_of(exchange: &mut Exchange<Body>) -> Result<(Vec<u8>, Option<HeaderMap>), Error> {
        let (mut data, mut trailers) = (Vec::new(), None);
        while let Some(frame) = frame_of(exchange).await {
            match frame?.into_data() {
                Ok(octets) => {
                    assert!(trailers.is_none() && !octets.is_empty());
                    data.extend_from_slice(&octets);
                }
                Err(frame) => trailers = Some(frame.into_trailers().unwrap()),
            }
        }
        assert!(exchange.is_answered());
        Ok((data, trailers))
    }

    /// An answer, its body, its trailers, and whether the connection is kept.
    type Whole = (response::Parts, Vec<u8>, Option<HeaderMap>, bool);

    async fn whole(mut exchange: Exchange<Body>) -> Result<Whole, Error> {
        let parts = head_of(&mut exchange).await?;
        let (data, trailers) = rest_of(&mut exchange).await?;
        Ok((parts, data, trailers, exchange.into_kept().is_some()))
    }

    /// An answer to `method` after which the connection ends.
    async fn read_to(method: Method, answer: &[u8]) -> Result<Whole, Error> {
        whole(on(Script::reading([Read::Data(answer.to_vec()), Read::End]), method, no_body()).0).await
    }

    async fn read(answer: &str) -> Result<Whole, Error> {
        read_to(Method::GET, answer.as_bytes()).await
    }

    fn is_broken<T>(result: &Result<T, Error>) -> bool {
        matches!(result, Err(Error::Broken(_)))
    }

    fn poll_once<T>(poll: impl FnOnce(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        poll(&mut Context::from_waker(Waker::noop()))
    }

    const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    const LINES: &str = "/p?q=1 HTTP/1.1\r\nhost: ds.example:8443\r\nx-a: 1\r\n";

    async fn sent(method: Method, source: Body, is_vectored: bool) -> (String, Vec<usize>) {
        let script = Script { is_vectored, ..Script::answering(OK) };
        let (exchange, seen) = on(script, method, source);
        assert!(whole(exchange).await.unwrap().3);
        let seen = seen.lock().unwrap();
        assert_eq!(seen.flushes, 1);
        (String::from_utf8(seen.written.clone()).unwrap(), seen.writes.clone())
    }

    #[tokio::test]
    async fn a_small_request_is_one_write() {
        for is_vectored in [false, true] {
            let (written, writes) = sent(Method::POST, body(Some(3), [piece(b"abc")]), is_vectored).await;
            assert_eq!(written, format!("POST {LINES}content-length: 3\r\n\r\nabc"));
            assert_eq!(writes.len(), 1);

            let (written, writes) =
                sent(Method::POST, body(None, [piece(b"abc"), piece(b"0123456789")]), is_vectored).await;
            let chunks = "3\r\nabc\r\na\r\n0123456789\r\n0\r\n\r\n";
            assert_eq!(written, format!("POST {LINES}transfer-encoding: chunked\r\n\r\n{chunks}"));
            assert_eq!(writes.len(), 1);

            // an empty piece is not the end
            let source = body(None, [piece(b""), piece(b"a"), piece(b""), piece(b"b")]);
            let (written, _) = sent(Method::POST, source, is_vectored).await;
            assert!(written.ends_with("\r\n\r\n1\r\na\r\n1\r\nb\r\n0\r\n\r\n"));

            // an end that is known only when asked for
            let source = Body { tells: false, ..body(None, [piece(b"abc")]) };
            let (written, writes) = sent(Method::PUT, source, is_vectored).await;
            assert!(written.ends_with("\r\n\r\n3\r\nabc\r\n0\r\n\r\n"));
            assert_eq!(writes.len(), 1);

            for method in [Method::GET, Method::HEAD, Method::DELETE, Method::OPTIONS] {
                for length in [None, Some(0)] {
                    let (written, writes) = sent(method.clone(), body(length, []), is_vectored).await;
                    assert_eq!(written, format!("{method} {LINES}\r\n"));
                    assert_eq!(writes.len(), 1);
                }
            }
            for method in [Method::POST, Method::PUT, Method::PATCH] {
                for length in [None, Some(0)] {
                    let (written, writes) = sent(method.clone(), body(length, []), is_vectored).await;
                    assert_eq!(written, format!("{method} {LINES}content-length: 0\r\n\r\n"));
                    assert_eq!(writes.len(), 1);
                }
            }
        }
    }

    #[tokio::test]
    async fn a_large_piece_is_not_copied() {
        let large = vec![b'x'; JOINED + 1];
        for (is_vectored, count) in [(true, 1), (false, 2)] {
            let source = body(Some(large.len() as u64), [piece(&large)]);
            let (written, writes) = sent(Method::POST, source, is_vectored).await;
            assert_eq!(writes.len(), count);
            assert_eq!(writes[count - 1], if count == 1 { written.len() } else { large.len() });
            assert!(written.ends_with(std::str::from_utf8(&large).unwrap()));
        }
        for (is_vectored, count) in [(true, 1), (false, 3)] {
            let (written, writes) = sent(Method::POST, body(None, [piece(&large)]), is_vectored).await;
            assert_eq!(writes.len(), count);
            assert!(written.ends_with("x\r\n0\r\n\r\n"));
            assert!(written.contains("\r\n\r\n1001\r\nxx"));
        }
    }

    #[tokio::test]
    async fn later_pieces_are_a_write_each_and_writes_may_be_short() {
        let steps = || [piece(b"ab"), Step::Later, piece(b"cde"), Step::Later, piece(b"f"), Step::Later];
        for (is_vectored, most, length) in [
            (true, None, None),
            (false, None, None),
            (true, Some(1), None),
            (false, Some(1), None),
            (true, Some(3), Some(6)),
            (false, None, Some(6)),
        ] {
            let script = Script { is_vectored, most, ..Script::default() };
            let (mut exchange, seen) = on(script, Method::POST, body(length, steps()));
            for _ in 0..4 {
                assert!(poll_once(|cx| exchange.poll_head(cx)).is_pending());
            }
            assert!(exchange.is_sent());
            let seen = seen.lock().unwrap();
            let written = std::str::from_utf8(&seen.written).unwrap();
            if length.is_some() {
                assert_eq!(written, format!("POST {LINES}content-length: 6\r\n\r\nabcdef"));
            } else {
                let chunks = "2\r\nab\r\n3\r\ncde\r\n1\r\nf\r\n0\r\n\r\n";
                assert_eq!(written, format!("POST {LINES}transfer-encoding: chunked\r\n\r\n{chunks}"));
            }
            if most.is_none() {
                // head and first piece, two more, and the last chunk
                assert_eq!(seen.writes.len(), if length.is_some() { 3 } else { 4 });
            }
        }
    }

    #[tokio::test]
    async fn pieces_that_are_there_are_one_write_where_there_is_a_share_for_it_or_they_are_the_last() {
        const PIECE: usize = 16 * 1024;
        let pieces = |count: usize| (0..count).map(|n| piece(&vec![b'a' + n as u8; PIECE]));
        // how many pieces, whether their length is said, the room of a write, whether there is a share, and how many writes
        // these are
        for (count, is_said, most, is_ample, writes) in [
            (4, true, None, false, Some(1)),
            // all but the last four are a write each
            (6, true, None, false, Some(3)),
            // four at a time
            (6, true, None, true, Some(2)),
            (9, true, None, true, Some(3)),
            (4, false, None, true, Some(4)),
            (4, true, Some(1_000), true, None),
            (6, true, Some(PIECE + 7), true, None),
        ] {
            let taken: Vec<_> = if is_ample { vec![] } else { std::iter::from_fn(Share::of_requests).collect() };
            let script = Script { is_vectored: true, most, ..Script::default() };
            let length = is_said.then_some((count * PIECE) as u64);
            let (mut exchange, seen) = on(script, Method::POST, body(length, pieces(count)));
            while !exchange.is_sent() {
                assert!(poll_once(|cx| exchange.poll_head(cx)).is_pending());
            }
            let seen = seen.lock().unwrap();
            let body: Vec<u8> = seen.written.iter().skip_while(|octet| **octet != b'\n').copied().collect();
            for n in 0..count {
                let octet = b'a' + n as u8;
                let run = body.windows(PIECE).position(|window| window.iter().all(|one| *one == octet));
                assert!(run.is_some(), "{count} {is_said} {most:?}: piece {n} is not whole");
            }
            if let Some(length) = length {
                assert!(seen.written.ends_with(&vec![b'a' + count as u8 - 1; PIECE]));
                let head = seen.written.len() - length as usize;
                assert!(seen.written[..head].ends_with(b"\r\n\r\n"));
            }
            assert!(writes.is_none_or(|writes| seen.writes.len() == writes), "{count}: {:?}", seen.writes);
            drop(taken);
        }
    }

    #[tokio::test]
    async fn a_head_goes_out_before_a_body_that_is_not_there() {
        let (mut exchange, seen) = on(Script::default(), Method::POST, body(Some(1), [Step::Never]));
        assert!(poll_once(|cx| exchange.poll_head(cx)).is_pending());
        assert!(!exchange.is_sent());
        assert!(seen.lock().unwrap().written.ends_with(b"content-length: 1\r\n\r\n"));
        assert_eq!(seen.lock().unwrap().flushes, 1);
        // nothing is flushed where nothing is written
        assert!(poll_once(|cx| exchange.poll_head(cx)).is_pending());
        assert_eq!(seen.lock().unwrap().flushes, 1);
    }

    #[tokio::test]
    async fn a_flush_that_waits_is_asked_again() {
        let script = Script { pending_flushes: 2, ..Script::default() };
        let (mut exchange, seen) = on(script, Method::GET, no_body());
        for (flushes, is_sent) in [(1, false), (2, false), (3, true), (3, true)] {
            assert!(poll_once(|cx| exchange.poll_head(cx)).is_pending());
            assert_eq!((seen.lock().unwrap().flushes, exchange.is_sent()), (flushes, is_sent));
        }
        assert_eq!(seen.lock().unwrap().writes.len(), 1);
    }

    #[derive(Default)]
    struct Woken(Mutex<usize>);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            *self.0.lock().unwrap() += 1;
        }
    }

    #[tokio::test]
    async fn a_fast_sender_leaves_time() {
        let steps = (0..PIECES_AT_ONCE * 2 + 1).map(|_| piece(&[b'x'; JOINED]));
        let (mut exchange, seen) = on(Script::default(), Method::POST, body(None, steps));
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        for polled in 1..=3 {
            assert!(exchange.poll_head(&mut Context::from_waker(&waker)).is_pending());
            let left = (PIECES_AT_ONCE * 2 + 1).saturating_sub(PIECES_AT_ONCE * polled);
            assert_eq!(exchange.source().steps.len(), left);
            assert_eq!(*woken.0.lock().unwrap(), polled.min(2));
            assert_eq!(exchange.is_sent(), polled == 3);
            // an answer is looked for in every one
            assert_eq!(seen.lock().unwrap().rooms.len(), polled);
        }
    }

    #[tokio::test]
    async fn a_source_gives_as_much_as_it_has_said() {
        for (length, given, tells) in
            [(3, "ab", true), (3, "ab", false), (3, "abcd", true), (0, "a", true), (3, "", true), (3, "", false)]
        {
            let steps = (!given.is_empty()).then(|| piece(given.as_bytes()));
            let source = Body { tells, ..body(Some(length), steps) };
            let (mut exchange, seen) = on(Script::answering(OK), Method::POST, source);
            assert!(is_broken(&head_of(&mut exchange).await), "{length} {given}");
            assert!(!exchange.is_answered() && exchange.into_kept().is_none());
            assert!(!String::from_utf8_lossy(&seen.lock().unwrap().written).contains("abcd"));
        }
        // one more after the answer has begun
        let source = body(Some(2), [piece(b"ab"), Step::Later, piece(b"c")]);
        let script = Script::answering(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n1");
        let (mut exchange, _) = on(script, Method::POST, source);
        head_of(&mut exchange).await.unwrap();
        assert!(matches!(frame_of(&mut exchange).await, Some(Err(Error::Broken(_)))));
        assert!(frame_of(&mut exchange).await.is_none());
        assert!(!exchange.is_answered());
        assert!(exchange.into_kept().is_none());
    }

    #[tokio::test]
    async fn a_head_has_one_host_and_one_framing() {
        let mut doubled = head(Method::POST);
        for name in [header::HOST, header::CONTENT_LENGTH, header::TRANSFER_ENCODING] {
            doubled.fields.push((name, HeaderValue::from_static("7")));
        }
        doubled.target = http::uri::PathAndQuery::from_static("?q");
        let script = Script::answering(OK);
        let seen = script.seen.clone();
        let connection = Connection::new(Box::new(script));
        whole(Exchange::begin(connection, false, &doubled, no_body(), TIMES)).await.unwrap();
        let lines = "POST /?q HTTP/1.1\r\nhost: ds.example:8443\r\nx-a: 1\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(seen.lock().unwrap().written, lines.as_bytes());

        for authority in ["", "a b", "a\r\nx: y", "a\0", "ä"] {
            let script = Script::answering(OK);
            let seen = script.seen.clone();
            let head = Head { authority: authority.to_owned(), ..head(Method::GET) };
            let connection = Connection::new(Box::new(script));
            assert!(is_broken(&whole(Exchange::begin(connection, false, &head, no_body(), TIMES)).await));
            assert!(seen.lock().unwrap().written.is_empty(), "{authority}");
        }
    }

    #[tokio::test]
    async fn framing_that_is_accepted() {
        for (answer, data, is_kept) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "abc", true),
            ("HTTP/1.1 200\r\ncontent-length: 003\r\n\r\nabc", "abc", true),
            ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc", "abc", true),
            ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "", true),
            ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc", "abc", false),
            ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: x, Close\r\n\r\nabc", "abc", false),
            ("HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\nabc", "abc", false),
            ("HTTP/1.0 200 OK\r\ncontent-length: 3\r\nconnection: Keep-Alive\r\n\r\nabc", "abc", true),
            ("HTTP/1.0 200 OK\r\n\r\nabc", "abc", false),
            ("HTTP/1.0 200 OK\r\nconnection: keep-alive\r\n\r\nabc", "abc", false),
            ("HTTP/1.1 200 OK\r\n\r\nabc", "abc", false),
            ("HTTP/1.1 200 OK\r\n\r\n", "", false),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "abc", true),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "", true),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3 \t;a=\"b\"\r\nabc\r\n00\r\n\r\n", "abc", true),
            (
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n000000000000000A\r\n0123456789\r\n0;x\r\n\r\n",
                "0123456789",
                true,
            ),
            // what comes behind the answer is not its
            ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabcd", "abc", false),
            ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", "", false),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n\r\n", "abc", false),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: y\r\n\r\n\r\n", "", false),
            ("HTTP/1.1 204 No Content\r\n\r\n", "", true),
            ("HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n", "", true),
            ("HTTP/1.1 204 No Content\r\ncontent-length: 3\r\n\r\n", "", false),
            ("HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked\r\n\r\n", "", false),
            ("HTTP/1.1 304 Not Modified\r\ncontent-length: 3\r\n\r\n", "", true),
            ("HTTP/1.1 304 Not Modified\r\n\r\n", "", true),
            ("HTTP/1.1 304 Not Modified\r\n\r\nabc", "", false),
        ] {
            let (parts, body, _, kept) = read(answer).await.unwrap_or_else(|error| panic!("{answer}: {error}"));
            assert_eq!((std::str::from_utf8(&body).unwrap(), kept), (data, is_kept), "{answer}");
            assert!(!parts.headers.contains_key("transfer-encoding") && !parts.headers.contains_key("connection"));
            assert!(parts.headers.get_all("content-length").iter().count() <= 1);
            let is_length = answer.to_lowercase().contains("content-length") && parts.status != 204;
            assert_eq!(parts.headers.contains_key("content-length"), is_length, "{answer}");
        }
    }

    #[tokio::test]
    async fn framing_that_is_refused() {
        for fields in [
            "content-length: 3\r\ncontent-length: 4",
            "content-length: 3, 3",
            "content-length: +3",
            "content-length: -3",
            "content-length: 3a",
            "content-length: 0x3",
            "content-length: 3 3",
            "content-length:",
            "content-length: 18446744073709551616",
            "content-length: 99999999999999999999999999",
            "content-length: 3\r\ntransfer-encoding: chunked",
            "transfer-encoding: chunked\r\ncontent-length: 3",
            "transfer-encoding: gzip, chunked",
            "transfer-encoding: chunked, chunked",
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
            "transfer-encoding: identity",
            "transfer-encoding:",
            "transfer-encoding: xchunked",
            "transfer-encoding : chunked",
            "content-length : 3",
            "content-length: 3\r\n x",
            "x: a\r\n b",
            " x: a",
            "x",
            ": a",
            "x: a\0b",
            "x: a\rb",
            "content-length: 3\n\nx: y",
        ] {
            for status in ["200 OK", "204 No Content", "304 Not Modified"] {
                let answer = format!("HTTP/1.1 {status}\r\n{fields}\r\n\r\nabc");
                assert!(is_broken(&read(&answer).await), "{answer}");
            }
        }
        for answer in [
            "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            "HTTP/1.2 200 OK\r\n\r\n",
            "HTTP/2 200 OK\r\n\r\n",
            "HTTP/2.0 200 OK\r\n\r\n",
            "http/1.1 200 OK\r\n\r\n",
            "\r\nHTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1  200 OK\r\n\r\n",
            "HTTP/1.1 2000 OK\r\n\r\n",
            "HTTP/1.1 20 OK\r\n\r\n",
            "HTTP/1.1 099 OK\r\n\r\n",
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
            "SSH-2.0-x\r\n\r\n",
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1 200 OK\n\n",
        ] {
            assert!(is_broken(&read(answer).await), "{answer}");
        }
    }

    #[tokio::test]
    async fn heads_have_an_end() {
        let field =
            |length: usize| format!("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx: {}\r\n\r\n", "a".repeat(length));
        let others = field(0).len();
        assert!(read(&field(HEAD_MAX - others)).await.is_ok());
        assert!(is_broken(&read(&field(HEAD_MAX - others + 1)).await));
        // without an end: it is not read for ever
        let (mut exchange, seen) = on(
            Script::answering(&[b"HTTP/1.1 200 OK\r\nx: ".as_slice(), &[b'a'; 1 << 20]].concat()),
            Method::GET,
            no_body(),
        );
        assert!(is_broken(&head_of(&mut exchange).await));
        assert!(seen.lock().unwrap().rooms.iter().sum::<usize>() < 4 * HEAD_MAX);

        let fields = |count| format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: y\r\n".repeat(count));
        assert!(read(&fields(FIELDS_MAX)).await.is_ok());
        assert!(is_broken(&read(&fields(FIELDS_MAX + 1)).await));
        let named = |count| format!("HTTP/1.1 200 OK\r\nconnection: {}\r\n\r\n", "a,".repeat(count));
        assert!(read(&named(FIELDS_MAX)).await.is_ok());
        assert!(is_broken(&read(&named(FIELDS_MAX + 1)).await));
    }

    #[tokio::test]
    async fn what_is_the_connections_stays_here() {
        let (parts, ..) = read(
            "HTTP/1.1 200 OK\r\nx-named: 1\r\nconnection: X-Named, keep-alive, content-length\r\n\
             keep-alive: timeout=5\r\nproxy-connection: x\r\nproxy-authenticate: Basic\r\nte: x\r\n\
             trailer: y\r\nupgrade: h2c\r\nset-cookie: a\r\n\
             set-cookie: b\r\nx-obs: \u{e4}\r\ncontent-length: 0\r\n\r\n",
        )
        .await
        .unwrap();
        let names: Vec<_> = parts.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        let expected: [(&str, &[u8]); 5] = [
            ("proxy-authenticate", b"Basic"),
            ("set-cookie", b"a"),
            ("set-cookie", b"b"),
            ("x-obs", "\u{e4}".as_bytes()),
            ("content-length", b"0"),
        ];
        assert_eq!(names.len(), expected.len());
        assert!(expected.iter().all(|field| names.contains(field)), "{names:?}");
        assert_eq!((parts.status, parts.version), (StatusCode::OK, Version::HTTP_11));
    }

    #[tokio::test]
    async fn an_answer_to_head_has_no_body() {
        for fields in ["content-length: 300", "transfer-encoding: chunked", "x: y"] {
            let answer = format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n");
            let (mut exchange, _) = on(Script::answering(answer.as_bytes()), Method::HEAD, no_body());
            let parts = head_of(&mut exchange).await.unwrap();
            assert_eq!(parts.headers.contains_key("content-length"), fields.contains("length"));
            assert!(exchange.is_answered());
            assert!(frame_of(&mut exchange).await.is_none());
            assert!(exchange.into_kept().is_some());
        }
    }

    #[tokio::test]
    async fn answers_before_the_answer_are_passed_over() {
        let early = "HTTP/1.1 103 Early Hints\r\nlink: x\r\nconnection: close\r\n\r\n";
        let answers = |count| format!("{}{}", early.repeat(count), std::str::from_utf8(OK).unwrap());
        for count in [1, 2, usize::from(INFORMATIONAL_MAX)] {
            let (parts, _, _, kept) = read(&answers(count)).await.unwrap();
            assert_eq!((parts.status, parts.headers.len(), kept), (StatusCode::OK, 1, true));
        }
        assert!(is_broken(&read(&answers(usize::from(INFORMATIONAL_MAX) + 1)).await));
        // one alone is a word of an answer
        let script = Script::reading([Read::Data(b"HTTP/1.1 100 Continue\r\n\r\n".to_vec()), Read::End]);
        assert!(is_broken(&whole(reused(script, no_body())).await));
    }

    const CHUNKED: &[u8] = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\
        3;x=y\r\nabc\r\n1A\r\nabcdefghijklmnopqrstuvwxyz\r\n0;z\r\nx-sum: 1\r\nx-b: 2\r\ncontent-length: 9\r\n\r\n";
    const CHUNKED_PLAIN: &[u8] =
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";

    #[tokio::test]
    async fn chunks_may_be_cut_anywhere() {
        for first in 0..=CHUNKED.len() {
            for second in first..=CHUNKED.len() {
                let cuts = [&CHUNKED[..first], &CHUNKED[first..second], &CHUNKED[second..]];
                let reads = cuts.iter().filter(|cut| !cut.is_empty()).map(|cut| Read::Data(cut.to_vec()));
                let (_, data, trailers, kept) =
                    whole(on(Script::reading(reads), Method::GET, no_body()).0).await.unwrap();
                assert_eq!(data, b"abcabcdefghijklmnopqrstuvwxyz");
                let trailers = trailers.unwrap();
                assert_eq!(
                    (trailers.len(), &trailers["x-sum"], &trailers["x-b"]),
                    (2, &"1".parse().unwrap(), &"2".parse().unwrap())
                );
                assert!(kept);
            }
        }
        for answer in [CHUNKED, CHUNKED_PLAIN] {
            for end in 0..answer.len() {
                // cut off for good: never whole
                let reads = [&answer[..end]].into_iter().filter(|cut| !cut.is_empty());
                let reads = reads.map(|cut| Read::Data(cut.to_vec())).chain([Read::End]);
                assert!(is_broken(&whole(on(Script::reading(reads), Method::GET, no_body()).0).await), "{end}");
            }
            let octets = answer.iter().map(|octet| Read::Data(vec![*octet]));
            assert!(whole(on(Script::reading(octets), Method::GET, no_body()).0).await.unwrap().3);
        }
    }

    #[tokio::test]
    async fn the_end_of_chunks_is_known_with_the_last() {
        let (mut exchange, _) = on(Script::answering(CHUNKED_PLAIN), Method::GET, no_body());
        head_of(&mut exchange).await.unwrap();
        assert_eq!(frame_of(&mut exchange).await.unwrap().unwrap().data_ref().unwrap(), "abc");
        assert!(!exchange.is_answered());
        assert_eq!(frame_of(&mut exchange).await.unwrap().unwrap().data_ref().unwrap(), "de");
        assert!(exchange.is_answered());
        assert!(exchange.into_kept().is_some());
    }

    #[tokio::test]
    async fn chunks_that_are_refused() {
        let many = |extension: usize| format!("1;{}\r\na\r\n0\r\n\r\n", "x".repeat(extension));
        let trailers = |count: usize| format!("0\r\n{}\r\n", "x: y\r\n".repeat(count));
        let long = |length: usize| format!("0\r\nx: {}\r\n\r\n", "y".repeat(length));
        let chunked =
            async |chunks: &str| read(&format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{chunks}")).await;
        for chunks in [
            "\r\nabc",
            ";x\r\n",
            "g\r\n",
            "-1\r\na",
            "0x1\r\na\r\n0\r\n\r\n",
            " 1\r\na\r\n0\r\n\r\n",
            "1 \r\na\r\n0\r\n\r\n",
            "1 1\r\na\r\n0\r\n\r\n",
            "1\na\r\n0\r\n\r\n",
            "1;x\na\r\n0\r\n\r\n",
            "1;\0\r\na\r\n0\r\n\r\n",
            "1;x\rx\r\na\r\n0\r\n\r\n",
            "1\r\na\n0\r\n\r\n",
            "1\r\nab\r\n0\r\n\r\n",
            "1\r\na0\r\n\r\n",
            "00000000000000001\r\na\r\n0\r\n\r\n",
            "10000000000000001\r\na\r\n0\r\n\r\n",
            "ffffffffffffffff\r\na",
            "1\r\na\r\n0\r\n",
            "1\r\na\r\n",
            "0\r\n\n",
            "0\r\nx: y\n\r\n",
            "0\r\nx: y\n\n\r\n\r\n",
            "0\r\nx\r\n\r\n",
            "0\r\nx: y\r\n z\r\n\r\n",
            "0\r\nx y: z\r\n\r\n",
        ] {
            assert!(is_broken(&chunked(chunks).await), "{chunks}");
        }
        let extension = usize::from(EXTENSIONS_MAX) - 1;
        assert!(chunked(&many(extension)).await.is_ok());
        assert!(is_broken(&chunked(&many(extension + 2)).await));
        // of all of them together
        assert!(is_broken(&chunked(&"1;xxxxxxx\r\na\r\n".repeat(EXTENSIONS_MAX.into())).await));
        assert_eq!(chunked(&trailers(TRAILER_FIELDS_MAX)).await.unwrap().2.unwrap().len(), TRAILER_FIELDS_MAX);
        assert!(is_broken(&chunked(&trailers(TRAILER_FIELDS_MAX + 1)).await));
        assert!(chunked(&long(TRAILERS_MAX - 7)).await.is_ok());
        assert!(is_broken(&chunked(&long(TRAILERS_MAX - 6)).await));
        assert!(is_broken(&chunked(&format!("0\r\nx: {}", "y".repeat(TRAILERS_MAX))).await));
        // the connection's own: none are left
        let (_, _, trailers, kept) =
            chunked("0\r\nconnection: close\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
        assert!(trailers.is_none() && kept);
    }

    #[tokio::test]
    async fn no_more_is_read_than_is_to_come() {
        let reads = [b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n".to_vec(), vec![b'a'; 4999], vec![b'b'; 2]];
        let (exchange, seen) = on(Script::reading(reads.map(Read::Data)), Method::GET, no_body());
        let (_, data, _, kept) = whole(exchange).await.unwrap();
        assert_eq!((data.len(), data.last(), kept), (5000, Some(&b'b'), true));
        assert_eq!(seen.lock().unwrap().rooms.last(), Some(&1));

        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n".to_vec();
        let reads = [answer, b"0123456789x".to_vec()];
        let (exchange, seen) = on(Script::reading(reads.map(Read::Data)), Method::GET, no_body());
        assert!(whole(exchange).await.unwrap().3);
        assert_eq!(seen.lock().unwrap().rooms.last(), Some(&10));

        // what is said costs no memory
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\na", u64::MAX);
        let reads = [Read::Data(head.into_bytes()), Read::Data(vec![b'a'; 1 << 20]), Read::End];
        let (exchange, seen) = on(Script::reading(reads), Method::GET, no_body());
        assert!(is_broken(&whole(exchange).await));
        let rooms = seen.lock().unwrap().rooms.clone();
        assert!(rooms.iter().all(|room| *room <= 2 * READ_BODY_MAX), "{rooms:?}");
        assert!(rooms.len() < 40, "{}", rooms.len());
    }

    #[tokio::test]
    async fn an_answer_may_be_over_before_the_request() {
        let script = Script::answering(b"HTTP/1.1 413 No\r\ncontent-length: 2\r\n\r\nno");
        let (mut exchange, _) = on(script, Method::POST, body(Some(9), [piece(b"a"), Step::Never]));
        assert_eq!(head_of(&mut exchange).await.unwrap().status, 413);
        assert_eq!(rest_of(&mut exchange).await.unwrap().0, b"no");
        assert!(exchange.is_answered() && !exchange.is_sent() && !exchange.source().is_done());
        assert!(exchange.into_kept().is_none());

        // the body moves on while the answer's comes
        let reads = [OK_OF_FOUR.to_vec(), b"ab".to_vec(), b"cd".to_vec()].map(Read::Data);
        let steps = [piece(b"1"), Step::Later, piece(b"2"), Step::Later, piece(b"3")];
        let (exchange, seen) = on(Script::reading(reads), Method::POST, body(Some(3), steps));
        let (_, data, _, kept) = whole(exchange).await.unwrap();
        assert_eq!((data.as_slice(), kept), (b"abcd".as_slice(), true));
        assert!(seen.lock().unwrap().written.ends_with(b"\r\n\r\n123"));
    }

    const OK_OF_FOUR: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n";

    #[tokio::test]
    async fn an_answer_is_read_although_writing_fails() {
        for kind in [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset] {
            let failing = |reads: Vec<Read>| Script { in_all: Some(20), fails: Some(kind), ..Script::reading(reads) };
            let early = b"HTTP/1.1 413 No\r\ncontent-length: 2\r\n\r\nno".to_vec();
            let (mut exchange, _) = on(failing(vec![Read::Data(early)]), Method::POST, body(Some(1), [piece(b"a")]));
            assert_eq!(head_of(&mut exchange).await.unwrap().status, 413);
            assert_eq!(rest_of(&mut exchange).await.unwrap().0, b"no");
            assert!(!exchange.is_sent());
            assert!(exchange.into_kept().is_none());

            for last in [Read::End, Read::Error(ErrorKind::ConnectionReset)] {
                let (exchange, _) = on(failing(vec![last]), Method::POST, body(Some(1), [piece(b"a")]));
                let Err(Error::Broken(why)) = whole(exchange).await else { panic!() };
                assert!(why.contains("could not be written"), "{why}");
            }
            for last in [Read::End, Read::Error(ErrorKind::ConnectionReset)] {
                let exchange = reused(failing(vec![last]), body(Some(1), [piece(b"a")]));
                assert!(matches!(whole(exchange).await, Err(Error::Closed)));
            }
        }
    }

    #[tokio::test]
    async fn a_connection_that_ends() {
        for last in [|| Read::End, || Read::Error(ErrorKind::ConnectionReset), || Read::Error(ErrorKind::UnexpectedEof)]
        {
            assert!(matches!(whole(reused(Script::reading([last()]), no_body())).await, Err(Error::Closed)));
            assert!(is_broken(&whole(on(Script::reading([last()]), Method::GET, no_body()).0).await));
            for begun in [b"H".as_slice(), b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\na"] {
                let exchange = reused(Script::reading([Read::Data(begun.to_vec()), last()]), no_body());
                assert!(is_broken(&whole(exchange).await));
            }
        }
        // not closed, but no answer either
        let exchange = reused(Script::reading([Read::Error(ErrorKind::InvalidData)]), no_body());
        assert!(is_broken(&whole(exchange).await));
        // a body that ends with the connection does not end with its loss
        let reads = [Read::Data(b"HTTP/1.1 200 OK\r\n\r\nabc".to_vec()), Read::Error(ErrorKind::UnexpectedEof)];
        assert!(is_broken(&whole(on(Script::reading(reads), Method::GET, no_body()).0).await));
    }

    #[tokio::test]
    async fn a_body_that_stops_stops_all() {
        let (mut exchange, _) = on(Script::default(), Method::POST, body(None, [piece(b"a"), Step::Stop]));
        assert!(matches!(head_of(&mut exchange).await, Err(Error::Stopped(Stop { refusal: Refusal::TooLarge, .. }))));
        assert!(exchange.into_kept().is_none());

        let source = body(None, [piece(b"a"), Step::Later, Step::Stop]);
        let (mut exchange, seen) = on(Script::answering(OK_OF_FOUR), Method::POST, source);
        assert_eq!(head_of(&mut exchange).await.unwrap().status, 200);
        assert!(matches!(frame_of(&mut exchange).await, Some(Err(Error::Stopped(_)))));
        assert!(!exchange.is_answered());
        assert!(seen.lock().unwrap().written.ends_with(b"\r\n\r\n1\r\na\r\n"), "it does not look whole");
    }

    async fn seconds<T>(future: impl Future<Output = T>) -> (T, u64) {
        let begun = Instant::now();
        let output = future.await;
        (output, begun.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_does_not_come() {
        let (mut exchange, _) = on(Script::default(), Method::POST, body(Some(1), [piece(b"a")]));
        let (head, took) = seconds(head_of(&mut exchange)).await;
        assert!(matches!(head, Err(Error::ReadTimedOut)));
        assert_eq!(took, 60);

        // octet by octet: the head's time is for all of it
        let (near, mut far) = tokio::io::duplex(1024);
        tokio::spawn(async move {
            for octet in b"HTTP/1.1 200 OK\r\n".iter().cycle() {
                tokio::time::sleep(Duration::from_secs(25)).await;
                if far.write_all(&[*octet]).await.is_err() {
                    break;
                }
            }
        });
        let mut exchange = Exchange::begin(Connection::new(Box::new(near)), false, &head_for_get(), no_body(), TIMES);
        let (head, took) = seconds(head_of(&mut exchange)).await;
        assert!(matches!(head, Err(Error::ReadTimedOut)));
        assert_eq!(took, 60);
    }

    fn head_for_get() -> Head {
        head(Method::GET)
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_has_its_time_between_two_reads() {
        let (near, mut far) = tokio::io::duplex(1024);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(50)).await;
            far.write_all(OK_OF_FOUR).await.unwrap();
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_secs(50)).await;
                far.write_all(b"a").await.unwrap();
            }
            tokio::time::sleep(Duration::from_secs(1000)).await;
        });
        let mut exchange = Exchange::begin(Connection::new(Box::new(near)), false, &head_for_get(), no_body(), TIMES);
        let (rest, took) = seconds(async {
            head_of(&mut exchange).await.unwrap();
            rest_of(&mut exchange).await
        })
        .await;
        assert!(matches!(rest, Err(Error::ReadTimedOut)));
        assert_eq!(took, 4 * 50 + 60);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_awaited_of_who_is_not_asked_yet() {
        let (mut exchange, _) = on(Script::default(), Method::POST, body(Some(2), [piece(b"a"), Step::Never]));
        let waited = tokio::time::timeout(Duration::from_secs(3600), head_of(&mut exchange)).await;
        assert!(waited.is_err());
        // then the body goes on, and only from now on is an answer awaited
        exchange.source.steps = [piece(b"b")].into();
        let (head, took) = seconds(head_of(&mut exchange)).await;
        assert!(matches!(head, Err(Error::ReadTimedOut)));
        assert_eq!(took, 60);
    }

    #[tokio::test(start_paused = true)]
    async fn a_side_that_does_not_read() {
        let stuck = || Script { in_all: Some(20), ..Script::default() };
        let (mut exchange, _) = on(stuck(), Method::POST, body(Some(1), [piece(b"a")]));
        let (head, took) = seconds(head_of(&mut exchange)).await;
        assert!(matches!(head, Err(Error::WriteTimedOut)));
        assert_eq!(took, 10);

        let script = Script { pending_flushes: usize::MAX, ..Script::default() };
        let (head, took) = seconds(whole(on(script, Method::GET, no_body()).0)).await;
        assert!(matches!(head, Err(Error::WriteTimedOut)));
        assert_eq!(took, 10);

        // in the middle of an answer, too
        let script = Script { reads: [Read::Data(OK_OF_FOUR.to_vec())].into(), ..stuck() };
        let (mut exchange, _) = on(script, Method::POST, body(Some(1), [piece(b"a")]));
        assert_eq!(head_of(&mut exchange).await.unwrap().status, 200);
        let (frame, took) = seconds(frame_of(&mut exchange)).await;
        assert!(matches!(frame, Some(Err(Error::WriteTimedOut))));
        assert_eq!(took, 10);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_taken_late_is_taken() {
        let all = format!("POST {LINES}content-length: 2\r\n\r\na").len();
        let script = Script { in_all: Some(all), pending_flushes: 1, ..Script::default() };
        let (mut exchange, _) = on(script, Method::POST, body(Some(2), [piece(b"a"), Step::Never]));
        // the clock of the flush runs, and stops when it is done
        assert!(poll_once(|cx| exchange.poll_head(cx)).is_pending());
        assert!(tokio::time::timeout(Duration::from_secs(3600), head_of(&mut exchange)).await.is_err());
        // and begins anew where nothing more is taken
        exchange.source.steps = [piece(b"b")].into();
        let (head, took) = seconds(head_of(&mut exchange)).await;
        assert!(matches!(head, Err(Error::WriteTimedOut)));
        assert_eq!(took, 10);
    }

    #[tokio::test(start_paused = true)]
    async fn no_answer_comes_where_writing_has_failed() {
        let script = Script { in_all: Some(20), fails: Some(ErrorKind::BrokenPipe), ..Script::default() };
        let (head, took) = seconds(whole(reused(script, no_body()))).await;
        let Err(Error::Broken(why)) = head else { panic!() };
        assert!(why.contains("could not be written"), "{why}");
        assert_eq!(took, 60);
    }

    #[tokio::test(start_paused = true)]
    async fn a_side_that_reads_slowly_has_time_for_every_write() {
        let (near, mut far) = tokio::io::duplex(64);
        let served = tokio::spawn(async move {
            let mut octets = Vec::new();
            while !octets.ends_with(&[b'z'; 200]) {
                tokio::time::sleep(Duration::from_secs(9)).await;
                far.read_buf(&mut (&mut octets).limit(64)).await.unwrap();
            }
            far.write_all(OK).await.unwrap();
            far
        });
        let source = body(Some(200), [piece(&[b'z'; 200])]);
        let exchange = Exchange::begin(Connection::new(Box::new(near)), false, &head(Method::POST), source, TIMES);
        let (answer, took) = seconds(whole(exchange)).await;
        assert!(answer.unwrap().3);
        assert!(took > 3 * 9);
        served.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_is_carried_over_and_right() {
        const WAITS: [u64; 4] = [5, 20, 55, 10];
        let (near, mut far) = tokio::io::duplex(4096);
        tokio::spawn(async move {
            let mut octets = Vec::new();
            for wait in WAITS {
                octets.clear();
                while !octets.ends_with(b"\r\n\r\n") {
                    far.read_buf(&mut octets).await.unwrap();
                }
                tokio::time::sleep(Duration::from_secs(wait)).await;
                far.write_all(OK).await.unwrap();
            }
            tokio::time::sleep(Duration::from_secs(1000)).await;
        });
        let mut connection = Connection::new(Box::new(near));
        for (number, wait) in WAITS.into_iter().enumerate() {
            let mut exchange = Exchange::begin(connection, number > 0, &head_for_get(), no_body(), TIMES);
            let (head, took) = seconds(head_of(&mut exchange)).await;
            assert_eq!((head.unwrap().status.as_u16(), took), (200, wait));
            connection = exchange.into_kept().unwrap();
            assert!(connection.is_usable());
            assert!(connection.sleep.is_some());
        }
        // one that is earlier than what the clock is set to
        assert!(connection.sleep.as_ref().unwrap().deadline() > Instant::now() + Duration::from_secs(7));
        let times = Times { read: Duration::from_secs(7), ..TIMES };
        let mut exchange = Exchange::begin(connection, true, &head_for_get(), no_body(), times);
        let (head, took) = seconds(head_of(&mut exchange)).await;
        assert!(matches!(head, Err(Error::ReadTimedOut)));
        assert_eq!(took, 7);
        // and one that never comes
        let times = Times { read: Duration::MAX, ..TIMES };
        let connection = Connection::new(Box::new(Script::default()));
        let mut exchange = Exchange::begin(connection, false, &head_for_get(), no_body(), times);
        assert!(tokio::time::timeout(Duration::from_secs(1 << 20), head_of(&mut exchange)).await.is_err());
    }

    #[tokio::test]
    async fn a_connection_at_rest_keeps_no_task() {
        let (near, mut far) = tokio::io::duplex(4096);
        let mut exchange = Exchange::begin(Connection::new(Box::new(near)), false, &head_for_get(), no_body(), TIMES);
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        assert!(exchange.poll_head(&mut Context::from_waker(&waker)).is_pending());
        far.write_all(OK).await.unwrap();
        let Poll::Ready(Ok(_)) = exchange.poll_head(&mut Context::from_waker(&waker)) else { panic!() };
        drop(waker);
        assert!(Arc::strong_count(&woken) > 1, "the clock has it");
        let connection = exchange.into_kept().unwrap();
        assert_eq!(Arc::strong_count(&woken), 1);
        assert!(connection.sleep.is_some());
    }

    #[tokio::test]
    async fn a_connection_is_usable_while_nothing_has_come() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut connection = Connection::new(Box::new(near));
        assert!(connection.is_usable() && connection.is_usable());
        far.write_all(b"a").await.unwrap();
        assert!(!connection.is_usable());

        let (near, far) = tokio::io::duplex(64);
        let mut connection = Connection::new(Box::new(near));
        drop(far);
        assert!(!connection.is_usable());
        let script = Script::reading([Read::Error(ErrorKind::ConnectionReset)]);
        assert!(!Connection::new(Box::new(script)).is_usable());

        // also where the task has no budget left
        let (near, far) = tokio::io::duplex(64);
        let mut connection = Connection::new(Box::new(near));
        drop(far);
        poll_fn(|cx| {
            while let Poll::Ready(left) = tokio::task::coop::poll_proceed(cx) {
                left.made_progress();
            }
            Poll::Ready(())
        })
        .await;
        assert!(!connection.is_usable());
    }

    #[tokio::test]
    async fn heads_are_asked_for_once_and_first() {
        let (mut exchange, _) = on(Script::answering(OK), Method::GET, no_body());
        assert!(matches!(frame_of(&mut exchange).await, Some(Err(Error::Broken(_)))));
        assert!(is_broken(&head_of(&mut exchange).await));
        let (mut exchange, _) = on(Script::answering(OK_OF_FOUR), Method::GET, no_body());
        assert!(head_of(&mut exchange).await.is_ok());
        assert!(is_broken(&head_of(&mut exchange).await));
    }

    #[tokio::test]
    async fn over_tcp_one_after_the_other() {
        const COUNT: usize = 3;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let large = vec![b'l'; 300_000];
        let expected = large.clone();
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut octets = BytesMut::new();
            for _ in 0..COUNT {
                let ends: [&[u8]; 2] = [b"\r\n0\r\n\r\n", b"content-length: 300000\r\n\r\n"];
                while !octets.ends_with(ends[0]) {
                    assert!(stream.read_buf(&mut octets).await.unwrap() > 0);
                }
                assert!(octets.starts_with(b"POST /p?q=1 HTTP/1.1\r\n"));
                assert!(octets.len() > expected.len());
                octets.clear();
                stream.write_all(b"HTTP/1.1 200 OK\r\n").await.unwrap();
                stream.write_all(ends[1]).await.unwrap();
                stream.write_all(&expected).await.unwrap();
            }
        });
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let mut connection = Connection::new(Box::new(stream));
        for number in 0..COUNT {
            assert!(connection.is_usable());
            let steps = [piece(b"small"), Step::Later, piece(&large), piece(b"x")];
            let mut exchange = Exchange::begin(connection, number > 0, &head(Method::POST), body(None, steps), TIMES);
            assert_eq!(head_of(&mut exchange).await.unwrap().headers["content-length"], "300000");
            assert_eq!(rest_of(&mut exchange).await.unwrap().0, large);
            connection = exchange.into_kept().unwrap();
        }
        served.await.unwrap();
        // the other side has closed: found out when it is looked at, or used
        let exchange = Exchange::begin(connection, true, &head_for_get(), no_body(), TIMES);
        assert!(matches!(whole(exchange).await, Err(Error::Closed)));
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
    }

    /// `octets` in pieces of the sizes that `cuts` says, over and over.
    fn cut(mut octets: &[u8], cuts: &[usize]) -> Vec<Read> {
        let mut reads = Vec::new();
        for size in cuts.iter().cycle() {
            if octets.is_empty() {
                break;
            }
            let (now, then) = octets.split_at((*size).min(octets.len()));
            reads.push(Read::Data(now.to_vec()));
            octets = then;
        }
        reads
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// What is written in chunks is what is read of them, however both are cut.
        #[test]
        fn what_is_written_is_read(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 1..8),
            cuts in prop::collection::vec(1_usize..50, 1..8),
            most in 1_usize..100,
            is_vectored: bool,
        ) {
            let data = pieces.concat();
            let script = Script { is_vectored, most: Some(most), ..Script::answering(OK) };
            let steps = pieces.into_iter().map(Step::Piece);
            let (exchange, seen) = on(script, Method::POST, body(None, steps));
            prop_assert!(run(whole(exchange)).is_ok());
            let written = std::mem::take(&mut seen.lock().unwrap().written);
            let chunks = written.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
            let mut answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked".to_vec();
            answer.extend_from_slice(&written[chunks..]);
            let (exchange, _) = on(Script::reading(cut(&answer, &cuts)), Method::GET, no_body());
            let (_, read, _, kept) = run(whole(exchange)).unwrap();
            prop_assert_eq!(read, data);
            prop_assert!(kept);
        }

        /// Whatever comes, and however it is cut, it comes to the same, and to an end.
        #[test]
        fn cuts_change_nothing(
            answer in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..300),
                (
                    prop::sample::select(vec![CHUNKED, CHUNKED_PLAIN, OK_OF_FOUR, b"HTTP/1.1 200 OK\r\n\r\n"]),
                    prop::collection::vec(any::<u8>(), 0..20),
                    prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
                ).prop_map(|(answer, more, changes)| {
                    let mut answer = [answer, &more].concat();
                    for (at, octet) in changes {
                        let at = at.index(answer.len());
                        answer[at] = octet;
                    }
                    answer
                }),
            ],
            cuts in prop::collection::vec(1_usize..40, 1..8),
        ) {
            let told = |cuts: &[usize]| {
                let reads = cut(&answer, cuts).into_iter().chain([Read::End]);
                let whole = run(whole(on(Script::reading(reads), Method::GET, no_body()).0));
                whole.map(|(parts, data, trailers, _)| (parts.status, parts.headers, data, trailers)).ok()
            };
            let at_once = told(&[usize::MAX]);
            prop_assert_eq!(&at_once, &told(&cuts));
            prop_assert!(at_once.is_none() || answer.starts_with(b"HTTP/1."));
        }
    }
}
