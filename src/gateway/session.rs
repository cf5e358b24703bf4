//! A request that has come in, as both doors see it: its head, and its body as far as it has come.
//!
//! What is read of a body before the decision is held here and sent first; the rest goes on as it comes ([`Upload`]), within its
//! bound and its times.

use super::flow::Since;
use super::http1;
use super::peek::content_length;
use super::stream::{Clock, Connection};
use crate::forward::{Source, Stop};
use crate::http1::Share;
use crate::problem::Refusal;
use bytes::Bytes;
use h2::RecvStream;
use http::Version;
use http::request::Parts;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

/// A body's bounds: of octets, and of time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Body {
    bound: u64,
    passed: u64,
    until: Instant,
}

impl Body {
    /// A body of at most `bound` octets, all of it in by a time.
    pub(super) fn new(bound: u64, until: Instant) -> Self {
        Self { bound, passed: 0, until }
    }

    /// When all of it must be in.
    pub(super) fn until(&self) -> Instant {
        self.until
    }

    /// Octets it may have.
    pub(super) fn bound(&self) -> u64 {
        self.bound
    }

    /// Some of it passes.
    fn pass(&mut self, octets: usize) -> Result<(), Refusal> {
        self.passed = self.passed.saturating_add(octets as u64);
        if self.passed > self.bound { Err(Refusal::TooLarge) } else { Ok(()) }
    }
}

/// Octets over HTTP/2 that are held in a place of their size.
const SMALL: usize = 4 * 1024;

/// The body of a request over HTTP/2.
pub(super) struct Http2 {
    stream: RecvStream,
    connection: Arc<Connection>,
    /// Octets that were given out last. As long as they are on their way, their sender has no room for more: none is asked for
    /// before they are gone.
    given: usize,
    /// It is decided on: what is given out is on its way to a node.
    has_set_out: bool,
    since: Option<Since>,
}

/// The rest of a body.
#[derive(Default)]
pub(super) enum Rest {
    /// All of it has come.
    #[default]
    None,
    /// Over HTTP/1.1.
    Http1(http1::Body),
    /// Over HTTP/2.
    Http2(Box<Http2>),
}

/// A request that has come in.
pub(super) struct Session {
    pub(super) head: Parts,
    /// When its head was in.
    pub(super) began: Instant,
    pub(super) connection: Arc<Connection>,
    /// What holds for its body.
    pub(super) body: Body,
    /// The rest of its body.
    rest: Rest,
    /// What has come of it, and is held.
    held: Bytes,
    came: u64,
}

impl Session {
    pub(super) fn new(head: Parts, rest: Rest, connection: Arc<Connection>) -> Self {
        let began = Instant::now();
        Self { head, began, connection, body: Body::new(0, began), rest, held: Bytes::new(), came: 0 }
    }

    /// All of its body has come.
    pub(super) fn body_is_in(&self) -> bool {
        matches!(self.rest, Rest::None)
    }

    /// Octets of its body that have come.
    pub(super) fn came(&self) -> u64 {
        self.came
    }

    /// "HTTP/2" or "HTTP/1.1".
    pub(super) fn http(&self) -> &'static str {
        if self.head.version == Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" }
    }

    /// More of its body, which is then for the caller to hold. None: that was all of it.
    pub(super) fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Stop>>> {
        let chunk = ready!(self.rest.poll_chunk(cx));
        if let Some(Ok(chunk)) = &chunk {
            self.came += chunk.len() as u64;
        }
        Poll::Ready(chunk)
    }

    /// Passes over what is there of a body that nobody wants, where the next request comes behind it.
    pub(super) fn skip_body(&mut self) {
        if let Rest::Http1(body) = &mut self.rest {
            self.came += body.skip();
            if body.is_done() {
                self.rest = Rest::None;
            }
        }
    }

    /// These octets came before all others, and are to be sent on.
    pub(super) fn hold(&mut self, octets: Bytes) {
        self.held = octets;
    }

    /// What of it is held.
    pub(super) fn held(&self) -> &[u8] {
        &self.held
    }

    /// It is decided on: its body is on its way to a node.
    pub(super) fn set_out(&mut self) {
        if let Rest::Http2(body) = &mut self.rest {
            body.set_out();
        }
    }

    /// The body, to be sent on from its beginning. `idle` is how long more of it may take to come; `may_come_back`: it may have to
    /// be sent again though not all of it is there.
    pub(super) fn upload(&mut self, idle: Duration, may_come_back: bool) -> Upload {
        let rest = std::mem::take(&mut self.rest);
        let length = match &rest {
            Rest::None => Some(self.held.len() as u64),
            _ => content_length(&self.head),
        };
        let held = std::mem::take(&mut self.held);
        let is_all = matches!(rest, Rest::None);
        let again = if is_all || may_come_back { Again::new(&held, is_all) } else { None };
        let held = Some(held).filter(|held| !held.is_empty());
        let (body, came) = (self.body, self.came);
        Upload { again, held, rest, length, body, idle, clock: Clock::default(), came, taken: false }
    }

    /// Lets go of its fields, and of what it asked for: all of it may be in one place.
    pub(super) fn forget(&mut self) {
        (self.head.uri, self.head.headers) = Default::default();
    }

    /// Takes a body back, to be sent from its beginning again; false: some of it is not held any more.
    pub(super) fn take_back(&mut self, upload: Upload) -> bool {
        self.came = upload.came;
        self.rest = upload.rest;
        self.held = match upload.held {
            Some(held) => held,
            None => upload.again.map(|again| again.octets).unwrap_or_default(),
        };
        !upload.taken
    }
}

impl Rest {
    /// That of a request over HTTP/2.
    pub(super) fn of(body: RecvStream, connection: &Arc<Connection>) -> Self {
        if body.is_end_stream() {
            return Self::None;
        }
        Self::Http2(Box::new(Http2 {
            stream: body,
            connection: connection.clone(),
            given: 0,
            has_set_out: false,
            since: None,
        }))
    }

    /// More of what comes, never an empty piece. None: that was all.
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Stop>>> {
        let (chunk, ends) = match self {
            Self::None => return Poll::Ready(None),
            Self::Http1(body) => ready!(body.poll_chunk(cx)),
            Self::Http2(body) => {
                let chunk = ready!(body.poll_chunk(cx));
                let ends = body.stream.is_end_stream();
                (chunk, ends)
            }
        };
        if ends || !matches!(chunk, Some(Ok(_))) {
            *self = Self::None;
        }
        Poll::Ready(chunk)
    }
}

impl Http2 {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Stop>>> {
        self.give_room_back();
        loop {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => {
                    self.given = data.len();
                    self.since = self.has_set_out.then(|| self.connection.flow.sets_out());
                    // A little of what h2 has read at once would keep all of that.
                    let data = if data.len() < SMALL { Bytes::copy_from_slice(&data) } else { data };
                    return Poll::Ready(Some(Ok(data)));
                }
                Some(Err(e)) => return Poll::Ready(Some(Err(stop(&e)))),
                // Trailers say nothing that anybody has checked.
                None => return Poll::Ready(None),
            }
        }
    }

    fn set_out(&mut self) {
        if !std::mem::replace(&mut self.has_set_out, true) && self.given > 0 {
            self.since = Some(self.connection.flow.sets_out());
        }
    }

    fn give_room_back(&mut self) {
        let given = std::mem::take(&mut self.given);
        if given > 0 {
            if let Some(since) = self.since.take() {
                self.connection.flow.is_gone(since);
            }
            // Nobody needs it where the stream is gone.
            let _ = self.stream.flow_control().release_capacity(given);
        }
    }
}

impl Drop for Http2 {
    fn drop(&mut self) {
        self.give_room_back();
    }
}

/// Why a body has broken off.
fn stop(e: &h2::Error) -> Stop {
    let refusal = Refusal::BadHttp("the body's framing is wrong, or it broke off");
    Stop { refusal, broken: true, gone: e.is_reset() || e.is_io() || e.is_go_away() }
}

/// Octets of all bodies that are kept, though there is more of them to come, so that they can be sent again.
const MOST_AGAIN: usize = 64 * 1024;
static AGAIN: AtomicUsize = AtomicUsize::new(0);

/// What is given out first of a body, to be sent again where need be.
struct Again {
    octets: Bytes,
    _share: Option<Share>,
}

impl Again {
    /// A body that is all there, or of which little is, can be sent again. Of others there is a share to be had: as soon as more
    /// has gone, they cannot be sent again anyway.
    fn new(octets: &Bytes, is_all: bool) -> Option<Self> {
        let share = match is_all || octets.len() <= SMALL {
            true => None,
            false => Some(Share::new(&AGAIN, octets.len(), MOST_AGAIN)?),
        };
        Some(Self { octets: octets.clone(), _share: share })
    }
}

/// A request's body on its way.
pub(super) struct Upload {
    /// For as long as it can all be sent again.
    again: Option<Again>,
    /// What is given out first, until it is.
    held: Option<Bytes>,
    rest: Rest,
    length: Option<u64>,
    body: Body,
    idle: Duration,
    /// For more of it, while that is awaited.
    clock: Clock,
    came: u64,
    /// Some of what is not kept has been given out.
    taken: bool,
}

impl Upload {
    /// Octets of it that have come.
    pub(super) fn came(&self) -> u64 {
        self.came
    }

    /// It can be sent from its beginning.
    pub(super) fn can_be_sent_again(&self) -> bool {
        !self.taken
    }
}

impl Source for Upload {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Stop>>> {
        let chunk = match self.held.take() {
            Some(held) => {
                self.taken |= self.again.is_none();
                Some(Ok(held))
            }
            None => match self.rest.poll_chunk(cx) {
                Poll::Pending => {
                    if !self.clock.is_set() {
                        self.clock.set((Instant::now() + self.idle).min(self.body.until));
                    }
                    ready!(self.clock.poll(cx));
                    self.rest = Rest::None;
                    self.taken = true;
                    return Poll::Ready(Some(Err(Refusal::TooSlow.into())));
                }
                Poll::Ready(chunk) => {
                    self.clock.stop();
                    // What has broken off is not all there, either.
                    self.taken |= matches!(chunk, Some(Err(_)));
                    if let Some(Ok(chunk)) = &chunk {
                        self.taken = true;
                        self.again = None;
                        self.came += chunk.len() as u64;
                        // However little it waits each time.
                        if !matches!(self.rest, Rest::None) && Instant::now() > self.body.until {
                            self.rest = Rest::None;
                            return Poll::Ready(Some(Err(Refusal::TooSlow.into())));
                        }
                    }
                    chunk
                }
            },
        };
        Poll::Ready(match chunk {
            Some(Ok(chunk)) => match self.body.pass(chunk.len()) {
                Ok(()) => Some(Ok(chunk)),
                Err(refusal) => Some(Err(refusal.into())),
            },
            other => other,
        })
    }

    fn length(&self) -> Option<u64> {
        self.length
    }

    fn is_done(&self) -> bool {
        self.held.is_none() && matches!(self.rest, Rest::None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_have_a_bound() {
        let mut body = Body::new(10, Instant::now());
        assert_eq!(body.pass(10), Ok(()));
        assert_eq!(body.pass(1), Err(Refusal::TooLarge));
    }
}
