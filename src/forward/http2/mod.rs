//! HTTP/2, as a client speaks it, on the `h2` crate: an exchange, on one of its [`connection`]s.
//!
//! A connection is driven by a task of its own; a request on it is moved on by who waits for its answer, as one of
//! HTTP/1.1 is.

mod connection;

pub(super) use connection::{Connection, Slot};

use super::{Error, Head, Source, Stop, Times};
use bytes::Bytes;
use connection::{Shared, millis};
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Method, Request, StatusCode, Uri, Version, header, response};
use hyper::body::Frame;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// Chunks that are moved, in either direction, before others have their turn.
const TURN: usize = 32;

/// A request and its answer. To drop it before its end takes the request back (`CANCEL`).
pub struct Exchange<S: Source> {
    source: S,
    times: Times,
    /// Where the stream waits for others to end, by the other side's limit.
    opening: Option<SendRequest<Bytes>>,
    /// Until the body is all out.
    upload: Option<Upload>,
    answer: Answer,
    clock: Clock,
    begun: u64,
    // The last one to be dropped: its place is free when its streams are.
    slot: Slot,
}

struct Upload {
    stream: SendStream<Bytes>,
    /// What has been taken of the source, and not yet sent.
    chunk: Bytes,
}

enum Answer {
    Head {
        response: ResponseFuture,
        to_head: bool,
    },
    /// `given`: octets that were given out last, room for which is not yet given back.
    Body {
        stream: RecvStream,
        given: usize,
    },
    Over,
    Failed(Option<Error>),
}

/// How far the upload is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Moved {
    /// All is out, or nobody wants the rest.
    Done,
    /// It waits for the source; or it is not its turn.
    Source,
    /// It waits for the other side.
    Window,
}

impl<S: Source> Exchange<S> {
    pub(super) fn begin(mut slot: Slot, kept: bool, head: &Head, source: S, times: Times) -> Self {
        let begun = millis();
        let failed = |slot, source, e| Self {
            source,
            times,
            opening: None,
            upload: None,
            answer: Answer::Failed(Some(e)),
            clock: Clock::default(),
            begun,
            slot,
        };
        let empty = source.is_done() || source.length() == Some(0);
        let length = if empty { 0 } else { source.length().unwrap_or(0) };
        let request = match request(slot.connection.https, head, empty, length) {
            Ok(request) => request,
            Err(e) => {
                return failed(slot, source, Error::Broken(format!("the request cannot be sent: {e}")));
            }
        };
        let mut send = slot.send.take().unwrap_or_else(|| slot.connection.send.clone());
        let sent = send.send_request(request, empty);
        match sent {
            Ok((response, stream)) => Self {
                source,
                times,
                opening: Some(send),
                upload: (!empty).then(|| Upload { stream, chunk: Bytes::new() }),
                answer: Answer::Head { response, to_head: head.method == Method::HEAD },
                clock: Clock::default(),
                begun,
                slot,
            },
            Err(e) => {
                // That a new connection takes none is the other side's fault, unless it is only going away.
                let unsent = kept && !is_ours(&e) || e.is_go_away() && e.is_remote();
                let e = error(&slot.connection, &e, unsent);
                failed(slot, source, e)
            }
        }
    }

    /// As [`super::Exchange::poll_head`].
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, Error>> {
        let head = ready!(self.poll_response(cx));
        if head.is_err() {
            self.fail();
        }
        Poll::Ready(head)
    }

    /// As [`super::Exchange::poll_frame`].
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let frame = ready!(self.poll_body(cx));
        match &frame {
            Some(Err(_)) => self.fail(),
            None => self.answer = Answer::Over,
            Some(Ok(_)) => {}
        }
        Poll::Ready(frame)
    }

    /// As [`super::Exchange::is_answered`].
    pub fn is_answered(&self) -> bool {
        matches!(self.answer, Answer::Over)
    }

    /// The request's body.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// The request's body, of an exchange that is over or given up.
    pub fn into_source(self) -> S {
        self.source
    }

    /// Drops what is left of the stream, which resets it.
    fn fail(&mut self) {
        self.opening = None;
        self.upload = None;
        self.answer = Answer::Failed(None);
    }

    fn poll_response(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, Error>> {
        if let Answer::Failed(e) = &mut self.answer {
            return Poll::Ready(Err(e.take().unwrap_or_else(over)));
        }
        let moved = self.poll_upload(cx).map_err(Error::Stopped)?;
        let Answer::Head { response, to_head } = &mut self.answer else {
            return Poll::Ready(Err(over()));
        };
        let Poll::Ready(answer) = Pin::new(response).poll(cx) else {
            if moved == Moved::Done {
                self.clock.read_within(self.times.read);
            }
            return self.poll_clock(cx).map(Err);
        };
        let to_head = *to_head;
        let (parts, stream) = answer.map_err(|e| error(&self.slot.connection, &e, false))?.into_parts();
        let connection = &self.slot.connection;
        connection.heard.store(millis(), Ordering::Relaxed);
        // Its settings have come before.
        let limit = connection.send.current_max_send_streams();
        connection.limit.store(limit, Ordering::Relaxed);
        if limit == 0 {
            // It takes no more, and is not kept in the way of one that does.
            connection.retire();
        }
        self.clock.read = None;
        let bare = to_head || matches!(parts.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        self.answer = if bare || stream.is_end_stream() { Answer::Over } else { Answer::Body { stream, given: 0 } };
        Poll::Ready(Ok(parts))
    }

    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match &mut self.answer {
            Answer::Over => return Poll::Ready(None),
            Answer::Failed(e) => return Poll::Ready(Some(Err(e.take().unwrap_or_else(over)))),
            Answer::Head { .. } => return Poll::Ready(Some(Err(over()))),
            Answer::Body { stream, given } if *given > 0 => {
                // What was given out is gone when more is asked for. h2 says no only to what it has not given.
                let _ = stream.flow_control().release_capacity(std::mem::take(given));
            }
            Answer::Body { .. } => {}
        }
        if let Err(stop) = self.poll_upload(cx) {
            return Poll::Ready(Some(Err(Error::Stopped(stop))));
        }
        let Answer::Body { stream, given } = &mut self.answer else {
            return Poll::Ready(Some(Err(over())));
        };
        for _ in 0..TURN {
            match stream.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) if data.is_empty() => {}
                Poll::Ready(Some(Ok(data))) => {
                    self.slot.connection.heard.store(millis(), Ordering::Relaxed);
                    self.clock.read = None;
                    *given = data.len();
                    if stream.is_end_stream() {
                        self.answer = Answer::Over;
                    }
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Poll::Ready(Some(Err(e))) => {
                    return Poll::Ready(Some(Err(broken(&self.slot.connection, &e))));
                }
                Poll::Ready(None) => match stream.poll_trailers(cx) {
                    Poll::Ready(Ok(Some(trailers))) if !trailers.is_empty() => {
                        self.answer = Answer::Over;
                        return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                    }
                    Poll::Ready(Ok(_)) => return Poll::Ready(None),
                    Poll::Ready(Err(e)) => {
                        return Poll::Ready(Some(Err(broken(&self.slot.connection, &e))));
                    }
                    Poll::Pending => return self.poll_read_clock(cx),
                },
                Poll::Pending => return self.poll_read_clock(cx),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_read_clock<T>(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<T, Error>>> {
        self.clock.read_within(self.times.read);
        self.poll_clock(cx).map(|e| Some(Err(e)))
    }

    /// What has taken too long.
    fn poll_clock(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let late = ready!(self.clock.poll(cx));
        // Nothing at all has come since: it may have been cut off, and others would wait here as long.
        if self.slot.connection.heard.load(Ordering::Relaxed) <= self.begun {
            self.slot.connection.retire();
        }
        Poll::Ready(late)
    }

    /// Moves the body on. That the other side does not want it is no error: it is for the answer to say why.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Result<Moved, Stop> {
        let moved = self.poll_send(cx)?;
        match moved {
            Moved::Window => self.clock.write_within(self.times.write),
            Moved::Source => self.clock.write = None,
            Moved::Done => {
                self.clock.write = None;
                self.upload = None;
            }
        }
        Ok(moved)
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Result<Moved, Stop> {
        if let Some(send) = &mut self.opening {
            // An error is the connection's, which may yet answer this.
            if send.poll_ready(cx).is_pending() {
                return Ok(Moved::Window);
            }
            self.opening = None;
        }
        let Some(Upload { stream, chunk }) = &mut self.upload else {
            return Ok(Moved::Done);
        };
        for _ in 0..TURN {
            if chunk.is_empty() {
                match self.source.poll_chunk(cx) {
                    Poll::Ready(Some(Ok(next))) => *chunk = next,
                    Poll::Ready(Some(Err(stop))) => {
                        stream.send_reset(Reason::CANCEL);
                        return Err(stop);
                    }
                    Poll::Ready(None) => {
                        let _ = stream.send_data(Bytes::new(), true);
                        return Ok(Moved::Done);
                    }
                    Poll::Pending => {
                        return Ok(if stream.poll_reset(cx).is_pending() { Moved::Source } else { Moved::Done });
                    }
                }
                if chunk.is_empty() {
                    continue;
                }
            }
            let room = match poll_room(stream, cx, chunk.len()) {
                Poll::Ready(Some(room)) => room,
                Poll::Ready(None) => return Ok(Moved::Done),
                Poll::Pending => return Ok(Moved::Window),
            };
            let piece = chunk.split_to(room.min(chunk.len()));
            let last = chunk.is_empty() && self.source.is_done();
            self.clock.write = None;
            if stream.send_data(piece, last).is_err() || last {
                return Ok(Moved::Done);
            }
        }
        cx.waker().wake_by_ref();
        Ok(Moved::Source)
    }
}

/// Waits for room on a stream for some of a piece: for how many octets. None: it is reset, or its connection is gone.
pub(crate) fn poll_room(stream: &mut SendStream<Bytes>, cx: &mut Context<'_>, piece: usize) -> Poll<Option<usize>> {
    let mut room = stream.capacity();
    while room == 0 {
        stream.reserve_capacity(piece);
        match ready!(stream.poll_capacity(cx)) {
            Some(Ok(granted)) => room = granted,
            Some(Err(_)) | None => return Poll::Ready(None),
        }
    }
    Poll::Ready(Some(room))
}

/// The head of a request of HTTP/2.
fn request(https: bool, head: &Head, empty: bool, length: u64) -> Result<Request<()>, http::Error> {
    let scheme = if https { Scheme::HTTPS } else { Scheme::HTTP };
    let authority = Authority::try_from(head.authority.as_str())?;
    let uri = Uri::builder().scheme(scheme).authority(authority).path_and_query(head.target.clone()).build()?;
    let mut request = Request::new(());
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = uri;
    *request.version_mut() = Version::HTTP_2;
    let fields = request.headers_mut();
    fields.reserve(head.fields.len() + 1);
    for (name, value) in &head.fields {
        fields.append(name.clone(), value.clone());
    }
    // RFC 9110 §8.6
    let expected = matches!(head.method, Method::POST | Method::PUT | Method::PATCH);
    if length > 0 || (empty && expected) {
        request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok(request)
}

/// h2 does not take what it was given: the connection is as good as before.
fn is_ours(e: &h2::Error) -> bool {
    !e.is_io() && !e.is_go_away() && e.reason().is_none()
}

/// What an error of h2's means for a request that there is no answer to; `unsent`: nothing of it was sent.
fn error(connection: &Shared, e: &h2::Error, unsent: bool) -> Error {
    let broken = broken(connection, e);
    let refused = e.is_reset() && e.reason() == Some(Reason::REFUSED_STREAM);
    let gone = e.is_go_away() && e.reason() == Some(Reason::NO_ERROR);
    if unsent || (e.is_remote() && (refused || gone)) { Error::Untouched } else { broken }
}

/// What it means once there is an answer.
fn broken(connection: &Shared, e: &h2::Error) -> Error {
    if !e.is_reset() && !is_ours(e) {
        connection.retire();
    }
    Error::Broken(format!("HTTP/2: {e}"))
}

/// For who asks when there is nothing more to come.
fn over() -> Error {
    Error::Broken("the exchange is over".to_owned())
}

/// Until when something must have come, or gone. There is one timer, made when something has to be waited for, and set
/// anew only when it goes off or is late: most never do.
#[derive(Default)]
struct Clock {
    read: Option<Instant>,
    write: Option<Instant>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Clock {
    fn read_within(&mut self, time: Duration) {
        if self.read.is_none() {
            self.read = Instant::now().checked_add(time);
        }
    }

    fn write_within(&mut self, time: Duration) {
        if self.write.is_none() {
            self.write = Instant::now().checked_add(time);
        }
    }

    /// What has taken too long.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let Some(until) = self.read.into_iter().chain(self.write).min() else {
            return Poll::Pending;
        };
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        if sleep.deadline() > until {
            sleep.as_mut().reset(until);
        }
        loop {
            ready!(sleep.as_mut().poll(cx));
            let now = Instant::now();
            if until <= now {
                let write = self.write.is_some_and(|until| until <= now);
                return Poll::Ready(if write { Error::WriteTimedOut } else { Error::ReadTimedOut });
            }
            sleep.as_mut().reset(until);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::connect::testing::*;
    use super::super::{Clients, Exchange as Any, Peer, Protocol};
    use super::*;
    use h2::server::{self, SendResponse};
    use http::{HeaderMap, HeaderName, Response};
    use std::future::poll_fn;
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::mpsc;

    const SHORT: Duration = Duration::from_millis(150);

    async fn begin(clients: &Clients, peer: &Peer, method: Method, body: Body) -> Any<Body> {
        let (link, kept) = clients.link(peer).await.unwrap();
        link.begin(kept, &head(method), body, peer.times, None)
    }

    async fn ask(clients: &Clients, peer: &Peer, method: Method, body: Body) -> Result<Whole, Error> {
        answer(&mut begin(clients, peer, method, body).await).await
    }

    async fn read(mut body: RecvStream) -> Result<Vec<u8>, h2::Error> {
        let mut all = vec![];
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len()).unwrap();
            all.extend_from_slice(&data);
        }
        Ok(all)
    }

    async fn send(stream: &mut SendStream<Bytes>, mut data: Bytes, end: bool) {
        while !data.is_empty() {
            stream.reserve_capacity(data.len());
            let Some(Ok(room)) = poll_fn(|cx| stream.poll_capacity(cx)).await else { return };
            let piece = data.split_to(room.min(data.len()));
            let last = end && data.is_empty();
            stream.send_data(piece, last).unwrap();
        }
    }

    fn status(code: u16) -> Response<()> {
        Response::builder().status(code).body(()).unwrap()
    }

    /// Answers with what it was sent, and with how that looked.
    async fn echo(_: usize, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
        let (parts, body) = request.into_parts();
        let length = parts.headers.get(header::CONTENT_LENGTH).map(|length| length.to_str().unwrap().to_owned());
        let seen = format!("{} {} {length:?} {}", parts.method, parts.uri, parts.headers.len());
        let body = read(body).await.unwrap();
        respond.send_informational(status(103)).unwrap();
        let answer = Response::builder().header("seen", seen).body(()).unwrap();
        let mut stream = respond.send_response(answer, false).unwrap();
        send(&mut stream, body.into(), false).await;
        let trailers = HeaderMap::from_iter([(HeaderName::from_static("sum"), HeaderValue::from_static("1"))]);
        stream.send_trailers(trailers).unwrap();
    }

    fn seen(answer: &Whole) -> &str {
        answer.head.headers.get("seen").unwrap().to_str().unwrap()
    }

    #[tokio::test]
    async fn requests_and_answers_are_whole() {
        let (at, connections) = http2(server::Builder::new(), None, echo).await;
        let (clients, peer) = (Clients::new(), peer(at, Protocol::Http2));
        let body = || Body::new(1000, 300, true, End::Well);
        let got = ask(&clients, &peer, Method::POST, body()).await.unwrap();
        assert_eq!(seen(&got), r#"POST http://localhost:81/path?query Some("1000") 1"#);
        assert_eq!((got.body.len(), got.body.get(250)), (1000, Some(&250)));
        assert_eq!(got.trailers.unwrap().get("sum").unwrap(), "1");
        assert_eq!(got.head.version, Version::HTTP_2);
        let got = ask(&clients, &peer, Method::PUT, Body::new(1000, 300, false, End::Known)).await.unwrap();
        assert_eq!(seen(&got), "PUT http://localhost:81/path?query None 0");
        assert_eq!(got.body.len(), 1000);
        let got = ask(&clients, &peer, Method::GET, Body::none()).await.unwrap();
        assert_eq!(seen(&got), "GET http://localhost:81/path?query None 0");
        let got = ask(&clients, &peer, Method::POST, Body::none()).await.unwrap();
        assert_eq!(seen(&got), r#"POST http://localhost:81/path?query Some("0") 1"#);
        let got = ask(&clients, &peer, Method::POST, Body::new(0, 1, true, End::Well)).await.unwrap();
        assert_eq!(seen(&got), r#"POST http://localhost:81/path?query Some("0") 1"#);
        let mut head = head(Method::GET);
        head.fields.push((http::HeaderName::from_static("x-field"), HeaderValue::from_static("x")));
        let (link, kept) = clients.link(&peer).await.unwrap();
        assert!(kept);
        let got = answer(&mut link.begin(kept, &head, Body::none(), peer.times, None)).await.unwrap();
        assert_eq!(seen(&got), "GET http://localhost:81/path?query None 1");
        assert_eq!(connections.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn over_tls_the_scheme_is_https() {
        let made = certificate(&["localhost"]);
        let (at, _) = http2(server::Builder::new(), Some(server(&made, &["h2"], None)), echo).await;
        for protocol in [Protocol::Http2, Protocol::Either] {
            let tls = super::super::Tls::new(std::slice::from_ref(&made.certificate), None, "localhost", protocol);
            let peer = Peer { tls: Some(tls.unwrap()), ..peer(at, protocol) };
            let got = ask(&Clients::new(), &peer, Method::GET, Body::none()).await.unwrap();
            assert!(seen(&got).starts_with("GET https://localhost:81/path?query "), "{}", seen(&got));
        }
    }

    #[tokio::test]
    async fn much_goes_through_small_windows() {
        let mut settings = server::Builder::new();
        settings.initial_window_size(1000).max_send_buffer_size(4000);
        let (at, _) = http2(settings, None, echo).await;
        let (clients, peer) = (Clients::new(), peer(at, Protocol::Http2));
        for (piece, length, end) in [(1 << 20, true, End::Known), (77_777, false, End::Well), (100, true, End::Well)] {
            let body = Body::new(1 << 20, piece, length, end);
            let got = ask(&clients, &peer, Method::POST, body).await.unwrap();
            assert!(got.body.iter().enumerate().all(|(n, octet)| *octet == (n % 251) as u8));
            assert_eq!(got.body.len(), 1 << 20);
            assert!(got.trailers.is_some());
        }
    }

    #[tokio::test]
    async fn nothing_follows_some_heads() {
        async fn serve(_: usize, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
            let head = request.method() == Method::HEAD;
            let code =
                if head { 200 } else { request.headers().get("code").unwrap().to_str().unwrap().parse().unwrap() };
            let mut answer = status(code);
            if head {
                answer.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("5"));
            }
            respond.send_response(answer, true).unwrap();
        }
        let (at, _) = http2(server::Builder::new(), None, serve).await;
        let (clients, peer) = (Clients::new(), peer(at, Protocol::Http2));
        for (method, code) in [(Method::HEAD, 200), (Method::GET, 204), (Method::GET, 304), (Method::GET, 200)] {
            let mut head = head(method);
            head.fields.push((http::HeaderName::from_static("code"), HeaderValue::from(code)));
            let (link, kept) = clients.link(&peer).await.unwrap();
            let mut exchange = link.begin(kept, &head, Body::none(), peer.times, None);
            let parts = poll_fn(|cx| exchange.poll_head(cx)).await.unwrap();
            assert_eq!(parts.status, code);
            assert!(exchange.is_answered());
            assert!(poll_fn(|cx| exchange.poll_frame(cx)).await.is_none());
            clients.keep(&peer, exchange);
        }
    }

    /// Answers at once, or resets the stream, or waits for all of it; and says how the stream ends.
    async fn early(answers: bool, reset: Option<Reason>) -> (SocketAddr, mpsc::UnboundedReceiver<Reason>) {
        let (tell, told) = mpsc::unbounded_channel();
        let (at, _) = http2(server::Builder::new(), None, move |_, request, mut respond: SendResponse<Bytes>| {
            let tell = tell.clone();
            async move {
                if let Some(reason) = reset {
                    return respond.send_reset(reason);
                }
                if answers {
                    let mut stream = respond.send_response(status(413), false).unwrap();
                    send(&mut stream, vec![b'x'; 100_000].into(), true).await;
                }
                if let Err(e) = read(request.into_body()).await {
                    let _ = tell.send(e.reason().unwrap());
                }
            }
        })
        .await;
        (at, told)
    }

    #[tokio::test]
    async fn an_answer_may_come_before_the_request_ends() {
        for (octets, end) in [(10, End::Never), (1 << 20, End::Never), (1 << 20, End::Well)] {
            let (at, mut told) = early(true, None).await;
            let (clients, peer) = (Clients::new(), peer(at, Protocol::Http2));
            let mut exchange = begin(&clients, &peer, Method::POST, Body::new(octets, 5000, false, end)).await;
            let got = answer(&mut exchange).await.unwrap();
            assert_eq!((got.head.status.as_u16(), got.body.len()), (413, 100_000));
            drop(exchange);
            if end == End::Never {
                assert_eq!(told.recv().await, Some(Reason::CANCEL));
            }
        }
    }

    #[tokio::test]
    async fn a_reset_without_error_after_an_answer_is_none() {
        for end in [End::Never, End::Well] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let (clients, peer) = (Clients::new(), peer(listener.local_addr().unwrap(), Protocol::Http2));
            let mut exchange = begin(&clients, &peer, Method::POST, Body::new(1 << 20, 5000, false, end)).await;
            let serve = async {
                let mut raw = Raw::accept(&listener).await;
                let stream = raw.request().await;
                raw.write(1, 4, stream, &[0x88]).await;
                raw.write(0, 0, stream, b"one ").await;
                raw.write(0, 1, stream, b"two").await;
                raw.write(3, 0, stream, &[0; 4]).await;
                // All of it is there before any is read.
                tokio::time::sleep(SHORT).await;
                raw
            };
            let read = async {
                tokio::time::sleep(SHORT).await;
                answer(&mut exchange).await
            };
            let (got, _raw) = tokio::join!(read, serve);
            assert_eq!(got.unwrap().body, b"one two");
            assert!(clients.link(&peer).await.unwrap().1);
        }
    }

    #[tokio::test]
    async fn who_gives_up_much_does_others_no_harm() {
        let (at, connections) = http2(server::Builder::new(), None, |_, request, mut respond| async move {
            let patient = request.headers().contains_key("patient");
            let mut stream = respond.send_response(status(200), false).unwrap();
            let octets = if patient { 1 } else { 1 << 20 };
            send(&mut stream, vec![b'x'; octets].into(), false).await;
            if patient {
                tokio::time::sleep(SECOND).await;
                stream.send_data(Bytes::from_static(b"end"), true).unwrap();
            }
        })
        .await;
        let (clients, peer) = (Clients::new(), peer(at, Protocol::Http2));
        let (link, kept) = clients.link(&peer).await.unwrap();
        let mut patient = head(Method::GET);
        patient.fields.push((http::HeaderName::from_static("patient"), HeaderValue::from_static("1")));
        let mut patient = link.begin(kept, &patient, Body::none(), peer.times, None);
        let patient = async { answer(&mut patient).await.unwrap() };
        let impatient = async {
            for _ in 0..40 {
                let mut all = vec![];
                for _ in 0..50 {
                    all.push(begin(&clients, &peer, Method::GET, Body::none()).await);
                }
                for exchange in &mut all {
                    poll_fn(|cx| exchange.poll_head(cx)).await.unwrap();
                }
            }
        };
        let (patient, ()) = tokio::join!(patient, impatient);
        assert_eq!(patient.body, b"xend");
        assert_eq!(connections.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn a_head_that_cannot_be_sent_costs_no_connection() {
        let (at, _) = http2(server::Builder::new(), None, echo).await;
        let (clients, peer) = (Clients::new(), peer(at, Protocol::Http2));
        ask(&clients, &peer, Method::GET, Body::none()).await.unwrap();
        let mut wrong = head(Method::GET);
        wrong.fields.push((header::CONNECTION, HeaderValue::from_static("close")));
        let nowhere = Head { authority: "no authority".to_owned(), ..head(Method::GET) };
        for head in [wrong, nowhere] {
            let (link, kept) = clients.link(&peer).await.unwrap();
            assert!(kept);
            let got = answer(&mut link.begin(kept, &head, Body::none(), peer.times, None)).await;
            assert!(matches!(got, Err(Error::Broken(_))), "{got:?}");
        }
        assert!(clients.link(&peer).await.unwrap().1);
    }

    #[tokio::test]
    async fn what_is_given_up_is_reset() {
        let (at, mut told) = early(false, None).await;
        let (clients, peer) = (Clients::new(), peer(at, Protocol::Http2));
        let mut exchange = begin(&clients, &peer, Method::POST, Body::new(10, 5, true, End::Never)).await;
        assert!(tokio::time::timeout(SHORT, answer(&mut exchange)).await.is_err());
        drop(exchange);
        assert_eq!(told.recv().await, Some(Reason::CANCEL));
        // And what its sender has not ended.
        let got = ask(&clients, &peer, Method::POST, Body::new(10, 5, true, End::Stops)).await;
        assert!(matches!(got, Err(Error::Stopped(Stop { broken: true, .. }))), "{got:?}");
        assert_eq!(told.recv().await, Some(Reason::CANCEL));
        // The connection is as good as before.
        assert!(clients.link(&peer).await.unwrap().1);
    }

    #[tokio::test]
    async fn only_what_was_refused_is_untouched() {
        for (reason, untouched) in [
            (Reason::REFUSED_STREAM, true),
            (Reason::INTERNAL_ERROR, false),
            (Reason::NO_ERROR, false),
            (Reason::CANCEL, false),
        ] {
            for body in [Body::none(), Body::new(1 << 20, 5000, true, End::Well), Body::new(9, 9, true, End::Never)] {
                let (at, _told) = early(false, Some(reason)).await;
                let (clients, peer) = (Clients::new(), peer(at, Protocol::Http2));
                match ask(&clients, &peer, Method::POST, body).await.unwrap_err() {
                    Error::Untouched => assert!(untouched, "{reason}"),
                    Error::Broken(text) => assert!(!untouched, "{reason}: {text}"),
                    e => panic!("{reason}: {e}"),
                }
            }
        }
    }

    /// A server that does as it is told, frame by frame.
    struct Raw(TcpStream);

    impl Raw {
        async fn accept(listener: &TcpListener) -> Self {
            let mut stream = listener.accept().await.unwrap().0;
            stream.read_exact(&mut [0; 24]).await.unwrap();
            let mut raw = Self(stream);
            raw.write(4, 0, 0, &[]).await;
            raw
        }

        async fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
            let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
            frame.extend([kind, flags]);
            frame.extend(stream.to_be_bytes());
            frame.extend(payload);
            self.0.write_all(&frame).await.unwrap();
        }

        /// Until there is a head of a request: on which stream.
        async fn request(&mut self) -> u32 {
            loop {
                let mut head = [0; 9];
                self.0.read_exact(&mut head).await.unwrap();
                let [a, b, c, kind, _, stream @ ..] = head;
                let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
                self.0.read_exact(&mut payload).await.unwrap();
                if kind == 1 {
                    return u32::from_be_bytes(stream);
                }
            }
        }

        async fn answer(&mut self, stream: u32) {
            self.write(1, 5, stream, &[0x88]).await;
        }

        async fn go_away(&mut self, last: u32, reason: u32) {
            self.write(7, 0, 0, &[last.to_be_bytes(), reason.to_be_bytes()].concat()).await;
        }
    }

    #[tokio::test]
    async fn what_a_goaway_leaves_out_is_untouched() {
        for (reason, answered) in [(0, true), (0, false), (2, true)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let (clients, peer) = (Clients::new(), peer(listener.local_addr().unwrap(), Protocol::Http2));
            let mut first = begin(&clients, &peer, Method::POST, Body::none()).await;
            let mut second = begin(&clients, &peer, Method::POST, Body::none()).await;
            let mut raw = Raw::accept(&listener).await;
            assert_eq!((raw.request().await, raw.request().await), (1, 3));
            raw.go_away(1, reason).await;
            let second = answer(&mut second).await.unwrap_err();
            assert_eq!(matches!(second, Error::Untouched), reason == 0, "{second}");
            // The next request gets another connection, while the first is still under way.
            let (next, other) = tokio::join!(begin(&clients, &peer, Method::GET, Body::none()), Raw::accept(&listener));
            if answered {
                raw.answer(1).await;
                answer(&mut first).await.unwrap();
            } else {
                drop(raw);
                let e = answer(&mut first).await.unwrap_err();
                assert!(matches!(e, Error::Broken(_)), "it may have been begun with: {e}");
            }
            drop((next, other));
        }
    }

    #[tokio::test]
    async fn what_has_been_answered_was_touched() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (clients, peer) = (Clients::new(), peer(listener.local_addr().unwrap(), Protocol::Http2));
        let mut exchange = begin(&clients, &peer, Method::GET, Body::none()).await;
        let mut raw = Raw::accept(&listener).await;
        let stream = raw.request().await;
        raw.write(1, 4, stream, &[0x88]).await;
        poll_fn(|cx| exchange.poll_head(cx)).await.unwrap();
        raw.write(3, 0, stream, &[0, 0, 0, 7]).await;
        let e = poll_fn(|cx| exchange.poll_frame(cx)).await.unwrap().unwrap_err();
        assert!(matches!(e, Error::Broken(_)), "{e}");
        // It is over, and says so.
        assert!(poll_fn(|cx| exchange.poll_frame(cx)).await.unwrap().is_err() && !exchange.is_answered());
    }

    #[tokio::test]
    async fn what_a_closed_connection_was_not_sent_is_untouched() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (clients, peer) = (Clients::new(), peer(listener.local_addr().unwrap(), Protocol::Http2));
        let mut exchange = begin(&clients, &peer, Method::GET, Body::none()).await;
        let mut raw = Raw::accept(&listener).await;
        let stream = raw.request().await;
        raw.answer(stream).await;
        answer(&mut exchange).await.unwrap();
        let (link, kept) = clients.link(&peer).await.unwrap();
        drop(raw);
        tokio::time::sleep(SHORT).await;
        let mut late = link.begin(kept, &head(Method::POST), Body::none(), peer.times, None);
        assert!(matches!(answer(&mut late).await, Err(Error::Untouched)));
        // And it is not given out again.
        let (link, _) = tokio::join!(clients.link(&peer), Raw::accept(&listener));
        assert!(!link.unwrap().1);
    }

    #[tokio::test]
    async fn clocks() {
        async fn slow(_: usize, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
            // Room for the request, but no answer; or only the beginning of one.
            let body = request.headers().contains_key("begin").then(|| {
                let mut stream = respond.send_response(status(200), false).unwrap();
                stream.send_data(Bytes::from_static(b"x"), false).unwrap();
                stream
            });
            let _ = read(request.into_body()).await;
            let () = std::future::pending().await;
            drop(body);
        }
        let (at, connections) = http2(server::Builder::new(), None, slow).await;
        let (clients, mut quick) = (Clients::new(), peer(at, Protocol::Http2));
        quick.times.read = SHORT;
        for body in [Body::none(), Body::new(1 << 20, 5000, true, End::Well)] {
            let got = ask(&clients, &quick, Method::POST, body).await;
            assert!(matches!(got, Err(Error::ReadTimedOut)), "{got:?}");
        }
        // A connection that nothing comes on is given up.
        assert_eq!(connections.load(Ordering::Relaxed), 2);
        // The sender may take its time.
        let waiting = ask(&clients, &quick, Method::POST, Body::new(10, 5, true, End::Never));
        assert!(tokio::time::timeout(4 * SHORT, waiting).await.is_err());
        // The answer may not.
        let (link, kept) = clients.link(&quick).await.unwrap();
        let mut head = head(Method::GET);
        head.fields.push((http::HeaderName::from_static("begin"), HeaderValue::from_static("1")));
        let mut exchange = link.begin(kept, &head, Body::none(), quick.times, None);
        poll_fn(|cx| exchange.poll_head(cx)).await.unwrap();
        assert!(poll_fn(|cx| exchange.poll_frame(cx)).await.unwrap().unwrap().is_data());
        let e = poll_fn(|cx| exchange.poll_frame(cx)).await.unwrap().unwrap_err();
        assert!(matches!(e, Error::ReadTimedOut), "{e}");

        // Nobody takes the body.
        let mut closed = server::Builder::new();
        closed.initial_window_size(0);
        let (at, _) = http2(closed, None, |_, request, respond| async move {
            let () = std::future::pending().await;
            drop::<(Request<RecvStream>, SendResponse<Bytes>)>((request, respond));
        })
        .await;
        let mut quick = peer(at, Protocol::Http2);
        quick.times.write = SHORT;
        let got = ask(&clients, &quick, Method::POST, Body::new(1 << 20, 5000, true, End::Well)).await;
        assert!(matches!(got, Err(Error::WriteTimedOut)), "{got:?}");
    }

    #[tokio::test]
    async fn the_servers_limit_is_kept() {
        let mut settings = server::Builder::new();
        settings.max_concurrent_streams(1);
        let (at, connections) = http2(settings, None, |_, request, mut respond: SendResponse<Bytes>| async move {
            let _ = read(request.into_body()).await;
            tokio::time::sleep(SHORT).await;
            respond.send_response(status(200), true).unwrap();
        })
        .await;
        let (clients, peer) = (Clients::new(), peer(at, Protocol::Http2));
        let body = || Body::new(1000, 100, true, End::Well);
        // Nobody knows the limit yet: what is too much is refused, or waits.
        let (first, second) =
            tokio::join!(ask(&clients, &peer, Method::POST, body()), ask(&clients, &peer, Method::POST, body()));
        first.unwrap();
        assert!(matches!(second, Ok(_) | Err(Error::Untouched)), "{second:?}");
        assert_eq!(connections.load(Ordering::Relaxed), 1);
        // Now it is known.
        let first = begin(&clients, &peer, Method::POST, body()).await;
        let second = begin(&clients, &peer, Method::POST, body()).await;
        for mut exchange in [first, second] {
            answer(&mut exchange).await.unwrap();
        }
        assert_eq!(connections.load(Ordering::Relaxed), 2);
    }

    /// Tasks that are left of what a client has done, without any of the server's.
    #[test]
    fn nothing_is_left_behind() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
            let mut peer = peer(at, Protocol::Http2);
            peer.times.read = SHORT;
            let clients = Clients::new();
            // It accepts, and does not read.
            let got = ask(&clients, &peer, Method::POST, Body::new(30_000, 1000, true, End::Well)).await;
            assert!(matches!(got, Err(Error::ReadTimedOut)), "{got:?}");
            let begun = begin(&clients, &peer, Method::POST, Body::new(10, 10, true, End::Never)).await;
            assert!(alive() > 0);
            drop(clients);
            tokio::time::sleep(SHORT).await;
            assert_eq!(alive(), 1, "a request is under way");
            drop(begun);
            tokio::time::timeout(5 * SECOND, async {
                while alive() > 0 {
                    tokio::time::sleep(SHORT).await;
                }
            })
            .await
            .unwrap();
        });
    }
}
