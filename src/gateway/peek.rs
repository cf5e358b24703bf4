//! Peek: reading just enough of a body to decide, within its time and within what may be held.

use super::answer;
use super::fields::all;
use super::live::Live;
use super::session::{Body, Session};
use crate::config::host_of;
use crate::copying::copy;
use crate::dialect::{Endpoint, Head};
use crate::forward::Stop;
use crate::http1::length_of;
use crate::problem::Refusal;
use crate::wire;
use bytes::{Bytes, BytesMut};
use http::request::Parts;
use http::{HeaderValue, header};
use prometheus::IntGauge;
use std::future::poll_fn;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// Counts what is held of a body, for as long as it is, or is waited for what is said of it.
#[derive(Debug)]
pub(super) struct Counted<'a> {
    gauge: &'a IntGauge,
    octets: i64,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.gauge.sub(self.octets);
    }
}

impl Counted<'_> {
    fn add(&mut self, octets: usize) {
        let octets = i64::try_from(octets).unwrap_or(i64::MAX);
        self.gauge.add(octets);
        self.octets = self.octets.saturating_add(octets);
    }
}

/// What has come of a body. Most often one read is all, and it is not copied.
#[derive(Debug)]
struct Held<'a> {
    first: Bytes,
    more: BytesMut,
    counted: Counted<'a>,
}

impl<'a> Held<'a> {
    fn new(gauge: &'a IntGauge) -> Self {
        Self { first: Bytes::new(), more: BytesMut::new(), counted: Counted { gauge, octets: 0 } }
    }

    /// All that has come.
    fn octets(&self) -> &[u8] {
        if self.more.is_empty() { &self.first } else { &self.more }
    }

    /// All that has come, to be sent on.
    fn into_whole(self) -> (Bytes, Counted<'a>) {
        (if self.more.is_empty() { self.first } else { self.more.freeze() }, self.counted)
    }

    fn push(&mut self, chunk: Bytes) {
        self.counted.add(chunk.len());
        if self.first.is_empty() {
            self.first = chunk;
        } else {
            if self.more.is_empty() {
                self.more.reserve(self.first.len() + chunk.len());
                copy(&self.first, &mut self.more);
            }
            self.more.reserve(chunk.len());
            copy(&chunk, &mut self.more);
        }
    }
}

/// A body must be octets as they are: a coding would let the Delivery Service read others than the gateway did.
fn check_content(request: &Parts, endpoint: &Endpoint) -> Result<(), Refusal> {
    if all(&request.headers, &header::CONTENT_ENCODING).next().is_some() {
        return Err(Refusal::WrongContentType { accept: endpoint.content_type });
    }
    let wrong = Refusal::WrongContentType { accept: endpoint.content_type };
    let mut types = all(&request.headers, &header::CONTENT_TYPE);
    match (endpoint.content_type, types.next(), types.next()) {
        (None, _, None) => Ok(()),
        (Some(wanted), Some(said), None) => {
            let essence = said.as_bytes().split(|b| *b == b';').next().unwrap_or_default().trim_ascii();
            essence.eq_ignore_ascii_case(wanted.as_bytes()).then_some(()).ok_or(wrong)
        }
        _ => Err(wrong),
    }
}

/// What an endpoint's reader takes of a head. `parameter` is the path's, decoded.
pub(super) fn head<'a>(request: &'a Parts, parameter: &'a str) -> Head<'a> {
    let mut from = all(&request.headers, &header::FROM);
    let from = match (from.next(), from.next()) {
        (Some(one), None) => Some(one.as_bytes()),
        _ => None,
    };
    Head { host: answer::authority(request).map_or("", host_of), from, parameter }
}

/// The one length that the request says its body has.
pub(super) fn content_length(request: &Parts) -> Option<u64> {
    length_of(all(&request.headers, &header::CONTENT_LENGTH).next()?.as_bytes())
}

/// A request is framed in one way that every server reads alike, and takes none of the fields away that we checked.
pub(super) fn check_framing(request: &Parts) -> Result<(), Refusal> {
    let all = |name| all(&request.headers, name);
    let digits = |value: &HeaderValue| !value.is_empty() && value.as_bytes().iter().all(u8::is_ascii_digit);
    if all(&header::CONTENT_LENGTH).count() > 1 || !all(&header::CONTENT_LENGTH).all(digits) {
        return Err(Refusal::BadHttp("Content-Length is not one number"));
    }
    if !all(&header::TRANSFER_ENCODING).all(|value| value.as_bytes().eq_ignore_ascii_case(b"chunked"))
        || all(&header::TRANSFER_ENCODING).count() > 1
    {
        return Err(Refusal::BadHttp("Transfer-Encoding is not chunked alone"));
    }
    // Empty elements of a list mean nothing (RFC 9110 §5.6.1).
    let known = |token: &[u8]| {
        [&b""[..], b"close", b"keep-alive", b"te", b"upgrade", b"http2-settings"]
            .iter()
            .any(|known| token.trim_ascii().eq_ignore_ascii_case(known))
    };
    if !all(&header::CONNECTION).all(|value| value.as_bytes().split(|b| *b == b',').all(known)) {
        return Err(Refusal::BadHttp("Connection names a field that is not of the connection"));
    }
    Ok(())
}

/// The body of a request at an endpoint, of a type that is read there and of no more octets than it may have, as far as its
/// head says.
pub(super) fn body(session: &Session, endpoint: &Endpoint, live: &Live) -> Result<Body, Refusal> {
    let request = &session.head;
    check_content(request, endpoint)?;
    let bound = live.max_body.iter().find(|(name, _)| *name == endpoint.name);
    let body =
        Body::new(bound.map_or(endpoint.max_body, |(_, bound)| *bound), session.began + live.timeouts.body_total);
    if content_length(request).is_some_and(|length| length > body.bound()) {
        return Err(Refusal::TooLarge);
    }
    Ok(body)
}

/// What is read at which endpoint, and what holds for it.
#[derive(Clone, Copy)]
pub(super) struct Reading<'a> {
    pub(super) endpoint: &'static Endpoint,
    /// The parameter of the path, decoded.
    pub(super) parameter: &'a str,
    pub(super) live: &'a Live,
    /// Octets of all bodies that are held.
    pub(super) gauge: &'a IntGauge,
}

/// Reads a body until its endpoint's reader has decided. What was read is then the session's ([`Session::held`]), and is what is
/// sent on first. `waited` is lengthened by what was spent waiting for the client.
pub(super) async fn peek<'a>(
    session: &mut Session,
    reading: &Reading<'a>,
    waited: &mut Duration,
) -> Result<Counted<'a>, Stop> {
    let mut held = Held::new(reading.gauge);
    let read = fill(&mut held, session, reading, waited).await;
    let (octets, counted) = held.into_whole();
    session.hold(octets);
    read.map(|()| counted)
}

async fn fill(
    held: &mut Held<'_>,
    session: &mut Session,
    reading: &Reading<'_>,
    waited: &mut Duration,
) -> Result<(), Stop> {
    let Reading { endpoint, live, .. } = *reading;
    let (timeouts, most) = (&live.timeouts, live.holding.of(endpoint.name));
    let mut share = None;
    let deadline = session.body.until();
    let mut need = 0;
    loop {
        if session.body_is_in() && !held.octets().is_empty() {
            // Whether it is enough is seen when it is read.
            return Ok(());
        }
        if held.octets().len() >= need {
            match endpoint.read(&head(&session.head, reading.parameter), held.octets()) {
                Ok(_) => return Ok(()),
                Err(wire::Error::Incomplete { need: more, .. }) => need = more,
                Err(malformed) => return Err(Refusal::Malformed(malformed).into()),
            }
        }
        if need > most {
            return Err(Refusal::TooLarge.into());
        }
        // One that holds something and waits for more is one of a bounded number, of all and of its source; others go on.
        if !held.octets().is_empty() {
            let too_much = || Refusal::TooMuchHeld { retry_after: timeouts.body_idle };
            if reading.gauge.get() > live.holding.total {
                return Err(too_much().into());
            }
            if share.is_none() {
                let connection = &session.connection;
                let peer = connection.identity.as_ref().and_then(|identity| identity.dns_names.first());
                let (ip, most) = (connection.client.ip(), live.holding.of_a_source());
                share = Some(live.admission.waiting(ip, peer.map(String::as_str), most).ok_or_else(too_much)?);
            }
        }
        let read = match once(|cx| session.poll_body(cx)).await {
            // Most often it is there.
            Poll::Ready(read) => read,
            Poll::Pending => {
                let began = Instant::now();
                let patience = timeouts.body_idle.min(deadline.saturating_duration_since(began));
                // In a place of its own, which most requests have no need of.
                let read = Box::pin(tokio::time::timeout(patience, poll_fn(|cx| session.poll_body(cx)))).await;
                *waited += began.elapsed();
                read.map_err(|_| Refusal::TooSlow)?
            }
        };
        match read {
            Some(Ok(chunk)) => held.push(chunk),
            // The body ended: what is missing will not come.
            None => return Err(Refusal::Malformed(still_missing(session, reading, held)).into()),
            Some(Err(Stop { gone: true, broken, .. })) => {
                let refusal = Refusal::Malformed(still_missing(session, reading, held));
                return Err(Stop { refusal, broken, gone: true });
            }
            Some(Err(stop)) => return Err(stop),
        }
    }
}

/// Whether something is there now.
async fn once<T>(mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
    poll_fn(|cx| Poll::Ready(poll(cx))).await
}

fn still_missing(session: &Session, reading: &Reading<'_>, held: &Held<'_>) -> wire::Error {
    match reading.endpoint.read(&head(&session.head, reading.parameter), held.octets()) {
        Err(error) => error,
        Ok(_) => wire::Error::Malformed { field: "body", offset: held.octets().len(), reason: "cut short" },
    }
}
