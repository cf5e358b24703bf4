//! A request from its head to the end of its answer, for either door. The order of the steps is here, and what a door does in
//! each is its [`Rules`]: what it admits, where that goes next, with what head, what of the answer passes, and what is noted.
//!
//! An answer is a body that whoever writes it asks for its octets: as it does so the node's are read, and the request's own body
//! is moved on. Whatever ends a request early (its client, its connection, a deadline) drops it, and with it what was held for it.

use super::Shared;
use super::answer;
use super::session::{Session, Upload};
use super::stream::OnIt;
use crate::forward::{ConnectError, Error, Exchange, Head, Peer, Source as _, Stop};
use crate::http1::length_of;
use crate::problem::Refusal;
use bytes::Bytes;
use http::{Method, Response, StatusCode, Version, header, response};
use hyper::body::{Body, Frame, SizeHint};
use std::borrow::BorrowMut;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::time::Sleep;

/// Pieces of an answer that one poll of whoever writes it takes, so that a fast node leaves time for others.
pub(super) const PIECES_AT_ONCE: usize = 32;

/// Places that are tried at most.
const MOST_TRIES: usize = 17;

/// What is to be done with a request that has failed.
pub(super) enum Failed {
    /// It is asked where it may go next.
    Again,
    /// This is answered.
    Refuse(Refusal),
    /// Nobody is there to be answered.
    Abort,
}

/// How far a request was when it failed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    /// All of its body had come.
    pub(super) body_was_in: bool,
    /// It can be sent again from its beginning.
    pub(super) can_be_sent_again: bool,
}

/// What a door does with requests.
pub(super) trait Rules: Send + Sync + Sized + 'static {
    /// What is kept of a request while it is under way.
    type Ctx: Ctx;

    /// What all requests share.
    fn shared(&self) -> &Arc<Shared>;

    /// A request whose head is in.
    fn begin(&self, session: &Session) -> Self::Ctx;

    /// Decides: an answer of the gateway's own, or none, and it goes on.
    fn admit(
        &self,
        session: &mut Session,
        ctx: &mut Self::Ctx,
    ) -> impl Future<Output = Result<Option<Response<Bytes>>, Refusal>> + Send;

    /// What is sent, wherever it goes.
    fn head(&self, session: &Session, ctx: &mut Self::Ctx) -> Result<Head, Refusal>;

    /// Where it goes next, and when that is.
    fn peer(&self, ctx: &mut Self::Ctx) -> impl Future<Output = Result<(Peer, Instant), Refusal>> + Send;

    /// There is no connection. None: another place is asked for.
    fn unconnected(&self, error: &ConnectError, ctx: &mut Self::Ctx) -> Option<Refusal>;

    /// There is one, `kept` from before or not; the next thing is to send.
    fn connected(&self, kept: bool, ctx: &mut Self::Ctx);

    /// There is no answer.
    fn failed(&self, error: Error, way: Way, ctx: &mut Self::Ctx) -> Failed;

    /// The head of an answer is there.
    fn answered(&self, head: &mut response::Parts, ctx: &mut Self::Ctx) -> Result<(), Refusal>;

    /// More of an answer's body is.
    fn pass(&self, octets: usize, ctx: &mut Self::Ctx) -> Result<(), Refusal>;

    /// Whether trailers of an answer do.
    fn passes_trailers(&self, ctx: &Self::Ctx) -> bool;

    /// A refusal is what is answered.
    fn refused(&self, refusal: &Refusal, ctx: &mut Self::Ctx);
}

/// What a door keeps of a request. Dropped, it is accounted for.
pub(super) trait Ctx: Send + Sync + 'static {
    /// What follows on the connection cannot be told from this request: it ends with the answer.
    fn broken(&self) -> bool;
    /// When the answer has to be over, whatever comes of it.
    fn until(&self) -> Option<Instant> {
        None
    }
    /// For how long its body may stand still.
    fn idle(&self) -> Duration;
    /// For how long a client may not read.
    fn patience(&self) -> Duration;
    /// The answer has this status.
    fn status(&mut self, status: StatusCode);
    /// Octets of its body that came, and of the answer's that went.
    fn octets(&mut self, came: u64, went: u64);
    /// It did not come to its end: nobody was there any more, or the answer broke off. `refusal` is what would have been
    /// answered.
    fn aborted(&mut self, refusal: Option<&Refusal>);
}

/// The client has gone, or an answer cannot be had for it: its connection, or its stream, ends.
#[derive(Debug, thiserror::Error)]
#[error("there is nobody to answer, or nothing")]
pub(super) struct Gone;

/// Answers a request.
pub(super) fn serve<R: Rules>(
    rules: Arc<R>,
    mut session: impl BorrowMut<Session> + Send,
    on_it: OnIt,
) -> impl Future<Output = Result<Response<Answer<R>>, Gone>> + Send {
    let ctx = rules.begin(session.borrow());
    let mut under_way = Box::new(UnderWay { rules, ctx, exchange: None, peer: None, went: 0, late: None, on_it });
    // An `async fn` would keep a second place for each of what it is given.
    async move {
        let session = session.borrow_mut();
        let UnderWay { rules, ctx, .. } = &mut *under_way;
        match rules.admit(session, ctx).await {
            Ok(None) => forward(session, under_way).await,
            Ok(Some(own)) => Ok(own_answer(session, under_way, own)),
            Err(refusal) => Ok(refuse(session, under_way, &refusal)),
        }
    }
}

async fn forward<R: Rules>(
    session: &mut Session,
    mut under_way: Box<UnderWay<R>>,
) -> Result<Response<Answer<R>>, Gone> {
    let mut head = match under_way.rules.head(session, &mut under_way.ctx) {
        Ok(head) => Some(head),
        Err(refusal) => return Ok(refuse(session, under_way, &refusal)),
    };
    for _ in 0..MOST_TRIES {
        let Some(sent) = &head else { break };
        let UnderWay { rules, ctx, .. } = &mut *under_way;
        let (peer, now) = match rules.peer(ctx).await {
            Ok(peer) => peer,
            Err(refusal) => return Ok(refuse(session, under_way, &refusal)),
        };
        session.set_out();
        let mut now = Some(now.into());
        let (link, kept) = match rules.shared().clients.link_at(&peer, &mut now).await {
            Ok(link) => link,
            Err(e) => match rules.unconnected(&e, ctx) {
                Some(refusal) => return Ok(refuse(session, under_way, &refusal)),
                None => continue,
            },
        };
        rules.connected(kept, ctx);
        let upload = session.upload(ctx.idle(), link.may_leave_untouched());
        // What is read of it from now on is on its way.
        let exchange = under_way.exchange.insert(link.begin(kept, sent, upload, peer.times, now));
        under_way.late = under_way.ctx.until().map(|until| Box::pin(tokio::time::sleep_until(until.into())));
        let late = &mut under_way.late;
        let answered = std::future::poll_fn(|cx| {
            let answered = exchange.poll_head(cx);
            // Nobody asks what it said any more: an upload takes its time, and there may be many.
            if !exchange.source().can_be_sent_again() && head.take().is_some() {
                session.forget();
            }
            match answered {
                Poll::Pending if is_late(late, cx) => Poll::Ready(Err(Error::ReadTimedOut)),
                answered => answered,
            }
        });
        let answered = answered.await;
        let body_was_in = exchange.source().is_done();
        match answered {
            Ok(answer) => {
                return Ok(pass_on(session, under_way, peer, answer, body_was_in));
            }
            Err(e) => {
                let Some(exchange) = under_way.exchange.take() else { break };
                let can_be_sent_again = session.take_back(exchange.into_source());
                let way = Way { body_was_in, can_be_sent_again };
                let UnderWay { rules, ctx, .. } = &mut *under_way;
                match rules.failed(e, way, ctx) {
                    Failed::Again if can_be_sent_again => {}
                    Failed::Refuse(refusal) => return Ok(refuse(session, under_way, &refusal)),
                    Failed::Again => return Ok(refuse(session, under_way, &Refusal::BadGateway)),
                    Failed::Abort => {
                        under_way.ctx.octets(session.came(), 0);
                        under_way.ctx.aborted(None);
                        return Err(Gone);
                    }
                }
            }
        }
    }
    Ok(refuse(session, under_way, &Refusal::BadGateway))
}

fn is_late(late: &mut Option<Pin<Box<Sleep>>>, cx: &mut Context<'_>) -> bool {
    late.as_mut().is_some_and(|late| late.as_mut().poll(cx).is_ready())
}

/// The answer of whom the request went to.
fn pass_on<R: Rules>(
    session: &mut Session,
    mut under_way: Box<UnderWay<R>>,
    peer: Peer,
    mut head: response::Parts,
    body_is_in: bool,
) -> Response<Answer<R>> {
    let UnderWay { rules, ctx, peer: whose, .. } = &mut *under_way;
    if let Err(refusal) = rules.answered(&mut head, ctx) {
        under_way.exchange = None;
        return refuse(session, under_way, &refusal);
    }
    *whose = Some(peer);
    ctx.status(head.status);
    // A node of HTTP/1.0 is this gateway's own business.
    head.version = Version::HTTP_11;
    let draining = rules.shared().draining.load(Ordering::Relaxed);
    if !body_is_in {
        // The answer must arrive, though the body is not in.
        session.connection.linger();
    }
    end_with(&mut head, session, draining || !body_is_in);
    let length = head.headers.get(header::CONTENT_LENGTH).and_then(|length| length_of(length.as_bytes()));
    let is_over = under_way.exchange.as_ref().is_none_or(Exchange::is_answered);
    if is_over {
        under_way.end();
        return Response::from_parts(head, Answer::over(under_way));
    }
    Response::from_parts(head, Answer::new(under_way, What::Passes { length }, session))
}

/// A refusal, as an answer.
fn refuse<R: Rules>(session: &mut Session, mut under_way: Box<UnderWay<R>>, refusal: &Refusal) -> Response<Answer<R>> {
    let UnderWay { rules, ctx, .. } = &mut *under_way;
    rules.refused(refusal, ctx);
    own_answer(session, under_way, answer::refusal(refusal))
}

/// An answer of the gateway's own. Where octets of the request are still to come, or cannot be told from the next one's, the
/// connection ends with it.
fn own_answer<R: Rules>(
    session: &mut Session,
    mut under_way: Box<UnderWay<R>>,
    own: Response<Bytes>,
) -> Response<Answer<R>> {
    let (mut head, body) = own.into_parts();
    let UnderWay { rules, ctx, .. } = &mut *under_way;
    if !ctx.broken() {
        session.skip_body();
    }
    ctx.octets(session.came(), 0);
    ctx.status(head.status);
    let cut_short = ctx.broken() || !session.body_is_in();
    if cut_short {
        session.connection.linger();
    }
    let draining = rules.shared().draining.load(Ordering::Relaxed);
    end_with(&mut head, session, cut_short || draining);
    head.headers.insert(header::CONTENT_LENGTH, body.len().into());
    // The answer to HEAD says how long it would be, and that is all (RFC 9110 §9.3.2).
    if session.head.method == Method::HEAD || body.is_empty() {
        return Response::from_parts(head, Answer::over(under_way));
    }
    Response::from_parts(head, Answer::new(under_way, What::Own(body), session))
}

/// Says so where the connection ends with this answer. HTTP/2 has its own ways.
fn end_with(head: &mut response::Parts, session: &Session, ends: bool) {
    if ends && session.head.version < Version::HTTP_2 {
        head.headers.insert(header::CONNECTION, http::HeaderValue::from_static("close"));
    }
}

/// What is under way.
struct UnderWay<R: Rules> {
    rules: Arc<R>,
    ctx: R::Ctx,
    exchange: Option<Exchange<Upload>>,
    /// Whose answer passes.
    peer: Option<Peer>,
    went: u64,
    /// When all of it has to be over, where that is said.
    late: Option<Pin<Box<Sleep>>>,
    on_it: OnIt,
}

impl<R: Rules> UnderWay<R> {
    /// The answer is over: its connection may have another request.
    fn end(&mut self) {
        if let Some(exchange) = self.exchange.take() {
            self.ctx.octets(exchange.source().came(), self.went);
            if let Some(peer) = &self.peer {
                self.rules.shared().clients.keep(peer, exchange);
            }
        }
    }

    /// The answer breaks off.
    fn break_off(&mut self, refusal: Option<&Refusal>) {
        if let Some(exchange) = self.exchange.take() {
            self.ctx.octets(exchange.source().came(), self.went);
        }
        self.on_it.0.break_off();
        self.ctx.aborted(refusal);
    }
}

impl<R: Rules> Drop for UnderWay<R> {
    fn drop(&mut self) {
        // Dropped on the way.
        if let Some(exchange) = &self.exchange {
            self.ctx.octets(exchange.source().came(), self.went);
        }
    }
}

/// An answer's body.
pub(super) struct Answer<R: Rules> {
    /// None: it is over.
    under_way: Option<Box<UnderWay<R>>>,
    what: What,
    /// How long its client may not read, over HTTP/2; over HTTP/1.1 the connection has a clock.
    patience: Option<Duration>,
    /// When it has to be over, where that is said.
    until: Option<Instant>,
}

enum What {
    /// The gateway's own, still to go.
    Own(Bytes),
    /// The other side's, of so many octets if that is known.
    Passes {
        length: Option<u64>,
    },
    Over,
}

impl<R: Rules> Answer<R> {
    fn new(under_way: Box<UnderWay<R>>, what: What, session: &Session) -> Self {
        let patience = session.connection.h2.then(|| under_way.ctx.patience());
        let until = under_way.ctx.until();
        Self { under_way: Some(under_way), what, patience, until }
    }

    /// One without a body.
    fn over(under_way: Box<UnderWay<R>>) -> Self {
        drop(under_way);
        Self { under_way: None, what: What::Over, patience: None, until: None }
    }

    /// Octets of all of it, where that is known.
    pub(super) fn length(&self) -> Option<u64> {
        self.size_hint().exact()
    }

    /// When it has to be over, where that is said.
    pub(super) fn until(&self) -> Option<Instant> {
        self.until
    }

    /// How long its client may not read, over HTTP/2.
    pub(super) fn patience(&self) -> Duration {
        self.patience.unwrap_or_default()
    }

    /// Its client has had room for all of it (HTTP/2).
    pub(super) fn is_sent(&mut self) {
        self.under_way = None;
    }

    /// All of it has been given out. Over HTTP/2 its request is under way until [`Answer::is_sent`].
    fn is_over(&mut self) {
        self.what = What::Over;
        if self.patience.is_none() {
            self.under_way = None;
        }
    }

    fn poll_passing(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Gone>>> {
        let Some(under_way) = &mut self.under_way else { return Poll::Ready(None) };
        let Some(exchange) = &mut under_way.exchange else { return Poll::Ready(None) };
        let frame = match exchange.poll_frame(cx) {
            // However much of it comes.
            Poll::Ready(Some(Ok(_))) if self.until.is_some_and(|until| until < Instant::now()) => {
                Some(Err(Error::ReadTimedOut))
            }
            Poll::Pending if is_late(&mut under_way.late, cx) => Some(Err(Error::ReadTimedOut)),
            frame => ready!(frame),
        };
        let frame = match frame {
            Some(Ok(frame)) if frame.is_trailers() && !under_way.rules.passes_trailers(&under_way.ctx) => None,
            frame => frame,
        };
        let refusal = match frame {
            Some(Ok(frame)) => {
                let octets = frame.data_ref().map_or(0, Bytes::len);
                under_way.went += octets as u64;
                let is_over = exchange.is_answered();
                let UnderWay { rules, ctx, .. } = &mut **under_way;
                match rules.pass(octets, ctx) {
                    Ok(()) => {
                        if is_over {
                            under_way.end();
                            self.is_over();
                        }
                        return Poll::Ready(Some(Ok(frame)));
                    }
                    Err(refusal) => Some(refusal),
                }
            }
            None => {
                under_way.end();
                self.is_over();
                return Poll::Ready(None);
            }
            Some(Err(Error::ReadTimedOut | Error::WriteTimedOut)) => Some(Refusal::GatewayTimeout),
            Some(Err(Error::Stopped(Stop { gone: true, .. }))) => None,
            Some(Err(Error::Stopped(stop))) => Some(stop.refusal),
            Some(Err(_)) => Some(Refusal::BadGateway),
        };
        // Half an answer cannot be mended; the client sees that it is cut short.
        under_way.break_off(refusal.as_ref());
        self.under_way = None;
        self.what = What::Over;
        Poll::Ready(Some(Err(Gone)))
    }
}

impl<R: Rules> Drop for Answer<R> {
    fn drop(&mut self) {
        // An answer of the gateway's own is what it is, taken or not.
        if let Some(under_way) = self.under_way.as_mut().filter(|under_way| under_way.peer.is_some()) {
            under_way.break_off(None);
        }
    }
}

impl<R: Rules> Body for Answer<R> {
    type Data = Bytes;
    type Error = Gone;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Gone>>> {
        let this = self.get_mut();
        match &mut this.what {
            What::Own(body) => {
                let body = std::mem::take(body);
                this.is_over();
                Poll::Ready(Some(Ok(Frame::data(body))))
            }
            What::Passes { .. } => this.poll_passing(cx),
            What::Over => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.what, What::Over)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.what {
            What::Own(body) => SizeHint::with_exact(body.len() as u64),
            What::Passes { length: Some(length) } => SizeHint::with_exact(*length),
            What::Passes { length: None } => SizeHint::default(),
            What::Over => SizeHint::with_exact(0),
        }
    }
}
