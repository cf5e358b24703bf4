//! A connection of another provider's server, after its handshake, as hyper gets it: rustls over what Pingora accepted.
//!
//! hyper reads request heads without a time limit for the whole, answers what is no HTTP with an empty page of its own, waits for
//! ever for a client that does not read, and closes a connection the moment it has answered. This stream mends the four. While
//! an HTTP/1.1 head is awaited it holds a clock and a bound for it, and answers with our own documents; a write that stands still
//! has a clock; and where an answer went out before the request was all in, it reads on for a while before it closes, because to
//! close on unread octets makes the kernel reset the connection and destroys the answer on its way.

use super::fields::forwarded_for;
use super::frames::Frames;
use super::live::ListenerTls;
use crate::admission::PeerIdentity;
use crate::config::Timeouts;
use crate::problem::Refusal;
use crate::tls;
use atomic_waker::AtomicWaker;
use bytes::{Buf, Bytes};
use prometheus::IntCounter;
use rustls::pki_types::CertificateDer;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::Sleep;

/// A connection with a certificate lives no longer than this.
const LONGEST: Duration = Duration::from_secs(366 * 86_400);

/// Octets of a request head at most.
pub(super) const MAX_HEAD: usize = 64 * 1024;

/// Octets that an HTTP/2 connection begins with (RFC 9113 §3.4): its preface and the head of a SETTINGS frame.
const H2_PREFACE: usize = 24 + 9;

/// Octets that are read at once of what is not looked at.
const LINGER_READ: usize = 16 * 1024;

/// How long, and how long between two reads, an answered connection is read on.
const LINGER: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(1));

/// Connections that linger at once, at most.
const LINGERING: usize = 1024;

static LINGERERS: AtomicUsize = AtomicUsize::new(0);

/// What is known of a connection, for all its requests.
#[derive(Debug)]
pub(super) struct Connection {
    /// Who is at the other end.
    pub(super) client: SocketAddr,
    /// That, as the Delivery Service is told.
    pub(super) forwarded_for: Box<str>,
    /// The name the client asked for.
    pub(super) sni: Option<String>,
    /// What its certificate says.
    pub(super) identity: Option<PeerIdentity>,
    /// HTTP/2 by ALPN.
    pub(super) h2: bool,
    /// The listener it came in at.
    pub(super) listener: SocketAddr,
    /// Its certificate, and those that it is said to chain by.
    pub(super) chain: Vec<CertificateDer<'static>>,
    /// What the listener trusted then.
    pub(super) trust: Option<[u8; 32]>,
    /// When its certificate ends.
    pub(super) until: Option<SystemTime>,
    /// What was negotiated, for the Delivery Service, if that is told.
    pub(super) tls: Option<Box<str>>,
    /// Whether it has to end, and who waits for that.
    ends: AtomicU8,
    waits: AtomicWaker,
    /// How far an HTTP/1.1 connection is: see [`Phase`].
    phase: AtomicU8,
    /// For how long it may wait for a further request, in milliseconds.
    keepalive: AtomicU64,
    linger: AtomicBool,
    /// A write waits (HTTP/2, where what was answered is written after its request is over).
    is_writing: AtomicBool,
    /// When the answer that is under way has to be over, in milliseconds from `born`; 0: that is not said (HTTP/1.1).
    late: AtomicU64,
    born: Instant,
    /// Requests under way on it, and all so far.
    requests: AtomicUsize,
    so_far: AtomicUsize,
    open: prometheus::IntGauge,
}

/// What a connection is told: see [`Connection::cut`] and [`Connection::close`].
const CUT: u8 = 1;
const CLOSE: u8 = 2;

/// How a connection has to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Now.
    Cut,
    /// Once nothing is under way on it.
    Close,
}

/// Waits for the end that a connection has to have. It is asked with each wake-up of a connection, so that it does little.
pub(super) struct Ends<'a> {
    connection: &'a Connection,
    /// When its certificate is over.
    until: Option<Pin<Box<Sleep>>>,
    closes: bool,
}

impl<'a> Ends<'a> {
    pub(super) fn of(connection: &'a Connection) -> Self {
        let until = connection.until.map(|until| {
            // It is good for all of its last second (RFC 5280 §4.1.2.5).
            let left = (until + Duration::from_secs(1)).duration_since(SystemTime::now()).unwrap_or_default();
            // The clock may be set; and nothing waits for a century.
            Box::pin(tokio::time::sleep(left.min(LONGEST)))
        });
        Self { connection, until, closes: false }
    }

    /// Its peer is not admitted any more, or its certificate is over; or it is to close, which is said once.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let told = |connection: &Connection, closes: &mut bool| {
            let ends = connection.ends.load(Ordering::Acquire);
            if ends & CUT != 0 {
                return Poll::Ready(End::Cut);
            }
            if ends & CLOSE != 0 && !std::mem::replace(closes, true) {
                return Poll::Ready(End::Close);
            }
            Poll::Pending
        };
        if let Some(until) = &mut self.until
            && until.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(End::Cut);
        }
        if let Poll::Ready(end) = told(self.connection, &mut self.closes) {
            return Poll::Ready(end);
        }
        self.connection.waits.register(cx.waker());
        told(self.connection, &mut self.closes)
    }
}

/// How far an HTTP/1.1 connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    /// The head of a request is awaited, or being read.
    Head,
    /// It is in.
    Request,
    /// All of the answer has been given to hyper, which has yet to write it out.
    Answered,
}

/// A request under way on a connection.
pub(super) struct OnIt(pub(super) Arc<Connection>);

impl Drop for OnIt {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::Relaxed);
        // Of HTTP/1.1 there is one at a time.
        self.0.set_phase(Phase::Answered);
    }
}

impl Connection {
    /// A connection after its handshake, counted in `open` until it is dropped.
    pub(super) fn new(
        client: SocketAddr,
        listener: SocketAddr,
        session: &rustls::ServerConnection,
        of: &ListenerTls,
        says_tls: bool,
        open: prometheus::IntGauge,
    ) -> Self {
        let chain: Vec<_> =
            session.peer_certificates().unwrap_or_default().iter().map(|der| der.clone().into_owned()).collect();
        let mut connection = Self::plain(client, listener, open);
        connection.sni = session.server_name().map(str::to_owned);
        connection.identity = chain.first().map(tls::identity);
        connection.h2 = session.alpn_protocol() == Some(b"h2");
        connection.trust = of.trust;
        connection.until = chain.first().and_then(tls::not_after);
        connection.chain = chain;
        connection.tls = says_tls.then(|| negotiated(session).into());
        connection
    }

    /// A connection without TLS, of a node of this provider.
    pub(super) fn plain(client: SocketAddr, listener: SocketAddr, open: prometheus::IntGauge) -> Self {
        open.inc();
        Self {
            client,
            forwarded_for: forwarded_for(client.ip()).into(),
            sni: None,
            identity: None,
            h2: false,
            listener,
            trust: None,
            until: None,
            chain: vec![],
            tls: None,
            ends: AtomicU8::new(0),
            waits: AtomicWaker::new(),
            phase: AtomicU8::new(Phase::Head as u8),
            keepalive: AtomicU64::new(0),
            linger: AtomicBool::new(false),
            is_writing: AtomicBool::new(false),
            late: AtomicU64::new(0),
            born: Instant::now(),
            requests: AtomicUsize::new(0),
            so_far: AtomicUsize::new(0),
            open,
        }
    }

    /// Ends it, whatever is under way on it.
    pub(super) fn cut(&self) {
        self.tell(CUT);
    }

    /// Ends it once nothing is under way on it.
    pub(super) fn close(&self) {
        self.tell(CLOSE);
    }

    fn tell(&self, end: u8) {
        self.ends.fetch_or(end, Ordering::Release);
        self.waits.wake();
    }

    fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            head if head == Phase::Head as u8 => Phase::Head,
            request if request == Phase::Request as u8 => Phase::Request,
            _ => Phase::Answered,
        }
    }

    fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// The head of a request is in; the connection may wait for so long for another, once this one is over.
    pub(super) fn begin(self: &Arc<Self>, keepalive: Duration) -> OnIt {
        self.linger.store(false, Ordering::Relaxed);
        self.late.store(0, Ordering::Relaxed);
        self.keepalive.store(u64::try_from(keepalive.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.so_far.fetch_add(1, Ordering::Relaxed);
        self.set_phase(Phase::Request);
        OnIt(self.clone())
    }

    /// The answer that is under way has to be over by then, however slowly its client reads.
    pub(super) fn late_at(&self, until: Instant) {
        let after = u64::try_from(until.saturating_duration_since(self.born).as_millis()).unwrap_or(u64::MAX);
        self.late.store(after.max(1), Ordering::Relaxed);
    }

    /// How many requests there were on it.
    pub(super) fn so_far(&self) -> usize {
        self.so_far.load(Ordering::Relaxed)
    }

    /// Requests are under way on it, or what was answered waits for its client.
    pub(super) fn is_busy(&self) -> bool {
        self.requests.load(Ordering::Relaxed) > 0 || self.is_writing.load(Ordering::Relaxed)
    }

    /// Its answer has broken off: it is not to look as if it were whole.
    pub(super) fn break_off(&self) {
        self.linger.store(false, Ordering::Relaxed);
    }

    /// The answer is out before the request was in: read on before closing.
    pub(super) fn linger(&self) {
        self.linger.store(!self.h2, Ordering::Relaxed);
    }
}

/// Version, cipher suite and key exchange, as a field says them.
fn negotiated(session: &rustls::ServerConnection) -> String {
    let version = match session.protocol_version() {
        Some(rustls::ProtocolVersion::TLSv1_3) => "TLSv1.3",
        _ => "unknown",
    };
    let suite = session.negotiated_cipher_suite().map(|suite| format!("{:?}", suite.suite())).unwrap_or_default();
    let group = session.negotiated_key_exchange_group().map(|group| format!("{:?}", group.name())).unwrap_or_default();
    format!("version={version};cipher={suite};group={group}")
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.dec();
    }
}

/// How far an own answer to a head is.
#[derive(Debug)]
enum Head {
    /// None is due.
    Reading { octets: usize },
    /// It is being written.
    Refusing { answer: Bytes },
    /// It is out; nothing more is read or written.
    Refused,
}

/// What the stream is over: TLS, or for the provider's own nodes on the loopback what Pingora accepted.
pub(super) trait Transport: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Transport for T {}

/// A clock that is wound as seldom as can be: most of what it is for comes long before.
#[derive(Default)]
pub(super) struct Clock {
    until: Option<Instant>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Clock {
    pub(super) fn set(&mut self, until: Instant) {
        self.until = Some(until);
    }

    pub(super) fn is_set(&self) -> bool {
        self.until.is_some()
    }

    pub(super) fn stop(&mut self) {
        self.until = None;
    }

    /// Whether its time has come; else the task is woken when it does.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(until) = self.until else { return Poll::Pending };
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until.into())));
        loop {
            if sleep.deadline() > until.into() {
                sleep.as_mut().reset(until.into());
            }
            ready!(sleep.as_mut().poll(cx));
            if Instant::now() >= until {
                return Poll::Ready(());
            }
            // It was for something that has come since.
            sleep.as_mut().reset(until.into());
        }
    }
}

/// The stream.
pub(super) struct FederationStream<T: Transport> {
    inner: Option<T>,
    connection: Arc<Connection>,
    /// For a head; and until something of what is written is taken.
    head_timeout: Duration,
    write_timeout: Duration,
    /// HTTP/2: its frames, and who is told that they are too many.
    frames: Option<(Frames, IntCounter)>,
    /// For what is read.
    clock: Clock,
    /// For what is written.
    write_clock: Clock,
    head: Head,
}

impl<T: Transport> std::fmt::Debug for FederationStream<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FederationStream").field("client", &self.connection.client).finish_non_exhaustive()
    }
}

fn closed() -> io::Error {
    io::ErrorKind::NotConnected.into()
}

/// A refusal as HTTP/1.1 octets, for requests that never became one.
fn plain(refusal: &Refusal) -> Bytes {
    let document = refusal.document();
    let status = refusal.status();
    let mut answer = format!(
        "HTTP/1.1 {} {}\r\ncontent-type: application/problem+json\r\ncontent-length: {}\r\ncache-control: no-store\r\n\
         connection: close\r\n\r\n",
        status.as_u16(),
        status.canonical_reason().unwrap_or_default(),
        document.len()
    )
    .into_bytes();
    answer.extend(document);
    answer.into()
}

impl<T: Transport> FederationStream<T> {
    pub(super) fn new(
        inner: T,
        connection: Arc<Connection>,
        timeouts: &Timeouts,
        frames: Option<(Frames, IntCounter)>,
    ) -> Self {
        let mut clock = Clock::default();
        clock.set(Instant::now() + timeouts.headers);
        Self {
            inner: Some(inner),
            connection,
            head_timeout: timeouts.headers,
            write_timeout: timeouts.body_total,
            frames,
            clock,
            write_clock: Clock::default(),
            head: Head::Reading { octets: 0 },
        }
    }

    /// A head is awaited.
    fn awaits_head(&self) -> bool {
        !self.connection.h2 && self.connection.phase() == Phase::Head
    }

    /// The whole of an answer is written out: the head of another request is awaited, for as long as the connection is kept.
    fn await_head(&mut self) {
        self.connection.set_phase(Phase::Head);
        self.head = Head::Reading { octets: 0 };
        self.clock.set(Instant::now() + Duration::from_millis(self.connection.keepalive.load(Ordering::Relaxed)));
    }

    /// What comes of a write: one that stands still has its time.
    fn timed<R>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        let connection = &self.connection;
        if connection.h2 {
            connection.is_writing.store(written.is_pending(), Ordering::Relaxed);
        }
        if written.is_ready() {
            self.write_clock.stop();
            return written;
        }
        if !self.write_clock.is_set() {
            let until = Instant::now() + self.write_timeout;
            let late = match connection.late.load(Ordering::Relaxed) {
                0 => until,
                after => connection.born + Duration::from_millis(after),
            };
            self.write_clock.set(until.min(late));
        }
        ready!(self.write_clock.poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    fn count(&mut self, written: usize) {
        if let Some((frames, _)) = &mut self.frames {
            frames.sent(written);
        }
    }

    fn refuse(&mut self, refusal: &Refusal) {
        self.connection.linger();
        self.clock.stop();
        self.head = Head::Refusing { answer: plain(refusal) };
    }

    /// Drives an own answer out.
    fn poll_refusing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(inner) = self.inner.as_mut() else { return Poll::Ready(Err(closed())) };
        if let Head::Refusing { answer } = &mut self.head {
            while !answer.is_empty() {
                let written = ready!(Pin::new(&mut *inner).poll_write(cx, answer))?;
                if written == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                answer.advance(written);
            }
            ready!(Pin::new(inner).poll_flush(cx))?;
            self.head = Head::Refused;
        }
        Poll::Ready(Ok(()))
    }

    /// A read of an HTTP/2 connection, whose frames are counted.
    fn poll_read_frames(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        if self.clock.is_set() {
            ready!(self.poll_read_preface(cx, buf))?;
        } else {
            let Some(inner) = self.inner.as_mut() else { return Poll::Ready(Err(closed())) };
            ready!(Pin::new(inner).poll_read(cx, buf))?;
        }
        if let Some((frames, refused)) = &mut self.frames
            && frames.came(buf.filled().get(before..).unwrap_or_default()).is_err()
        {
            refused.inc();
            // Nothing of it is looked at any more.
            buf.set_filled(before);
            self.inner = None;
            return Poll::Ready(Err(io::Error::other("too many frames that move no request on")));
        }
        Poll::Ready(Ok(()))
    }

    /// A read while an HTTP/2 connection has yet to begin: hyper waits for that without a clock.
    fn poll_read_preface(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let Some(inner) = self.inner.as_mut() else { return Poll::Ready(Err(closed())) };
        match Pin::new(inner).poll_read(cx, buf)? {
            Poll::Ready(()) => {
                let read = buf.filled().len() - before;
                match &mut self.head {
                    Head::Reading { octets } if *octets + read < H2_PREFACE => *octets += read,
                    _ => self.clock.stop(),
                }
                Poll::Ready(Ok(()))
            }
            Poll::Pending => self.clock.poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into())),
        }
    }

    /// A read while a head is awaited: within its time, within its bound. The first head's time began with the
    /// connection, a later one's begins with its first octet.
    fn poll_read_head(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            match &mut self.head {
                Head::Refused => return Poll::Ready(Ok(())),
                Head::Refusing { .. } => {
                    let refusing = self.poll_refusing(cx);
                    ready!(self.timed(cx, refusing))?;
                }
                Head::Reading { octets } => {
                    let before = buf.filled().len();
                    let Some(inner) = self.inner.as_mut() else { return Poll::Ready(Err(closed())) };
                    match Pin::new(inner).poll_read(cx, buf)? {
                        Poll::Ready(()) => {
                            let first = *octets == 0;
                            *octets += buf.filled().len() - before;
                            // Most heads come whole, and need no clock.
                            if first && self.connection.keepalive.load(Ordering::Relaxed) > 0 {
                                self.clock.stop();
                            }
                            return Poll::Ready(Ok(()));
                        }
                        Poll::Pending => {
                            if *octets > 0 && !self.clock.is_set() {
                                self.clock.set(Instant::now() + self.head_timeout);
                            }
                            ready!(self.clock.poll(cx));
                            if *octets == 0 {
                                // Nothing was asked, so nothing is answered.
                                self.head = Head::Refused;
                            } else {
                                self.refuse(&Refusal::TooSlow);
                            }
                        }
                    }
                }
            }
        }
    }
}

impl<T: Transport> AsyncRead for FederationStream<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.awaits_head() {
            return this.poll_read_head(cx, buf);
        }
        if this.connection.h2 {
            return this.poll_read_frames(cx, buf);
        }
        match this.inner.as_mut() {
            Some(inner) => Pin::new(inner).poll_read(cx, buf),
            None => Poll::Ready(Err(closed())),
        }
    }
}

impl<T: Transport> AsyncWrite for FederationStream<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        // What is written before a head was in is hyper's page for what it could not read.
        if this.awaits_head() {
            if let Head::Reading { octets } = this.head {
                // It is hyper that holds no more of one.
                this.refuse(&Refusal::BadHttp(match octets {
                    ..MAX_HEAD => "the request head cannot be read, or its fields are too many",
                    _ => "the request head is larger than 64 KiB",
                }));
            }
            let refusing = this.poll_refusing(cx);
            ready!(this.timed(cx, refusing))?;
            return Poll::Ready(Ok(bufs.iter().map(|buf| buf.len()).sum()));
        }
        let Some(inner) = this.inner.as_mut() else { return Poll::Ready(Err(closed())) };
        let written = Pin::new(inner).poll_write_vectored(cx, bufs);
        let written = ready!(this.timed(cx, written))?;
        this.count(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let Some(inner) = this.inner.as_mut() else { return Poll::Ready(Err(closed())) };
        let flushed = Pin::new(inner).poll_flush(cx);
        ready!(this.timed(cx, flushed))?;
        // hyper has written all that it was given before it flushes.
        if !this.connection.h2 && this.connection.phase() == Phase::Answered {
            this.await_head();
            // hyper reads on when there is something to read, and not before: nobody else would wind the clock.
            if this.clock.poll(cx).is_ready() {
                cx.waker().wake_by_ref();
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let Some(inner) = this.inner.as_mut() else { return Poll::Ready(Ok(())) };
        let shut = Pin::new(inner).poll_shutdown(cx);
        this.timed(cx, shut)
    }
}

impl<T: Transport> Drop for FederationStream<T> {
    fn drop(&mut self) {
        if !self.connection.linger.load(Ordering::Relaxed) {
            return;
        }
        let (Some(inner), Ok(runtime)) = (self.inner.take(), tokio::runtime::Handle::try_current()) else { return };
        if LINGERERS.fetch_add(1, Ordering::Relaxed) < LINGERING {
            let connection = self.connection.clone();
            runtime.spawn(async move {
                linger(inner).await;
                drop(connection);
                LINGERERS.fetch_sub(1, Ordering::Relaxed);
            });
        } else {
            LINGERERS.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Says that nothing more will come, and reads what still does, into nothing.
async fn linger(mut stream: impl Transport) {
    let (total, idle) = LINGER;
    let _ = tokio::time::timeout(total, async {
        if stream.shutdown().await.is_err() {
            return;
        }
        let mut nothing = vec![0; LINGER_READ];
        while let Ok(Ok(1..)) = tokio::time::timeout(idle, stream.read(&mut nothing)).await {}
    })
    .await;
}
