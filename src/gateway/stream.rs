//! A connection of another provider's server, after its handshake, as Pingora gets it: rustls over what Pingora accepted.
//!
//! Pingora reads request heads with a time limit for each read and none for the whole, answers what is no HTTP with an
//! empty page of its own, and closes a connection the moment it has answered. This stream mends the three. While an
//! HTTP/1.1 head is being read it holds a clock and a bound for the whole head, and answers with our own documents; and
//! where an answer went out before the request was all in, it reads on for a while before it closes, because to close on
//! unread octets makes the kernel reset the connection and destroys the answer on its way.

use super::frames::Frames;
use super::live::ListenerTls;
use crate::admission::PeerIdentity;
use crate::problem::Refusal;
use crate::tls;
use async_trait::async_trait;
use bytes::{Buf, Bytes, BytesMut};
use pingora_core::protocols::l4::socket::SocketAddr as PingoraAddr;
use pingora_core::protocols::raw_connect::ProxyDigest;
use pingora_core::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID,
    UniqueIDType,
};
use prometheus::IntCounter;
use rustls::pki_types::CertificateDer;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Sleep;

/// A connection with a certificate lives no longer than this.
const LONGEST: Duration = Duration::from_secs(366 * 86_400);

/// Octets of a request head at most.
const MAX_HEAD: usize = 64 * 1024;

/// Octets that an HTTP/2 connection begins with (RFC 9113 §3.4): its preface and the head of a SETTINGS frame.
const H2_PREFACE: usize = 24 + 9;

/// Octets a read gives at most while a body is held back: see [`Connection::hold`].
const HELD_READ: usize = 16 * 1024;

/// Octets of an answer that wait for more of it, and as many as they go out with then: those of a TLS record.
const JOINED: usize = 4 * 1024;
const RECORD: usize = 16 * 1024;

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
    /// Tells that it has to end.
    cut: Notify,
    reading_head: AtomicBool,
    /// How many heads were awaited so far.
    heads: AtomicUsize,
    hold: AtomicBool,
    linger: AtomicBool,
    open: prometheus::IntGauge,
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
        open.inc();
        let off = || AtomicBool::new(false);
        let chain: Vec<_> =
            session.peer_certificates().unwrap_or_default().iter().map(|der| der.clone().into_owned()).collect();
        Self {
            client,
            sni: session.server_name().map(str::to_owned),
            identity: chain.first().map(tls::identity),
            h2: session.alpn_protocol() == Some(b"h2"),
            listener,
            trust: of.trust,
            until: chain.first().and_then(tls::not_after),
            chain,
            tls: says_tls.then(|| negotiated(session).into()),
            cut: Notify::new(),
            reading_head: off(),
            heads: AtomicUsize::new(0),
            hold: off(),
            linger: off(),
            open,
        }
    }

    /// A connection without TLS, of a node of this provider.
    pub(super) fn plain(client: SocketAddr, listener: SocketAddr, open: prometheus::IntGauge) -> Self {
        open.inc();
        let off = || AtomicBool::new(false);
        Self {
            client,
            sni: None,
            identity: None,
            h2: false,
            listener,
            trust: None,
            until: None,
            chain: vec![],
            tls: None,
            cut: Notify::new(),
            reading_head: off(),
            heads: AtomicUsize::new(0),
            hold: off(),
            linger: off(),
            open,
        }
    }

    /// Ends it, whatever is under way on it.
    pub(super) fn cut(&self) {
        self.cut.notify_one();
    }

    /// Waits until it has to end: its peer is not admitted any more, or its certificate is over.
    pub(super) async fn is_over(&self) {
        match self.until {
            Some(until) => {
                // It is good for all of its last second (RFC 5280 §4.1.2.5).
                let left = (until + Duration::from_secs(1)).duration_since(SystemTime::now()).unwrap_or_default();
                // The clock may be set; and nothing waits for a century.
                let _ = tokio::time::timeout(left.min(LONGEST), self.cut.notified()).await;
            }
            None => self.cut.notified().await,
        }
    }

    /// The head of a request is awaited (HTTP/1.1).
    pub(super) fn await_head(&self) {
        self.linger.store(false, Ordering::Relaxed);
        self.heads.fetch_add(1, Ordering::Relaxed);
        self.reading_head.store(!self.h2, Ordering::Relaxed);
    }

    /// The head of a request is in.
    pub(super) fn head_is_in(&self) {
        self.reading_head.store(false, Ordering::Relaxed);
    }

    /// Gives small reads while a body is held: Pingora's replay buffer has 64 KiB, and drops what it has without a word
    /// when a read goes over that.
    pub(super) fn hold(&self, hold: bool) {
        self.hold.store(hold && !self.h2, Ordering::Relaxed);
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
pub(super) trait Transport: AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static> Transport for T {}

/// The stream.
pub(super) struct FederationStream<T: Transport> {
    inner: Option<T>,
    /// Its descriptor.
    id: UniqueIDType,
    connection: Arc<Connection>,
    proxy_digest: Arc<ProxyDigest>,
    socket_digest: Arc<SocketDigest>,
    head_timeout: Duration,
    /// HTTP/2: its frames, and who is told that they are too many.
    frames: Option<(Frames, IntCounter)>,
    clock: Option<Pin<Box<Sleep>>>,
    head: Head,
    /// Which of the connection's heads this is about.
    nth: usize,
    /// What is written and waits to be sent.
    waiting: BytesMut,
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
        id: UniqueIDType,
        connection: Arc<Connection>,
        head_timeout: Duration,
        frames: Option<(Frames, IntCounter)>,
    ) -> Self {
        // Pingora knows no per-connection data of ours, but passes this on to every request, over HTTP/2 too.
        let response = Box::new(http::Response::new(()).into_parts().0.into());
        let proxy_digest = Arc::new(ProxyDigest::new(response, Some(Box::new(connection.clone()))));
        let socket_digest = SocketDigest::from_raw_fd(id);
        // Known already: no getpeername for each request.
        let _ = socket_digest.peer_addr.set(Some(PingoraAddr::Inet(connection.client)));
        Self {
            inner: Some(inner),
            id,
            connection,
            proxy_digest,
            socket_digest: Arc::new(socket_digest),
            head_timeout,
            frames,
            clock: Some(Box::pin(tokio::time::sleep(head_timeout))),
            head: Head::Reading { octets: 0 },
            nth: 1,
            waiting: BytesMut::new(),
        }
    }

    fn count(&mut self, written: usize) {
        if let Some((frames, _)) = &mut self.frames {
            frames.sent(written);
        }
    }

    fn refuse(&mut self, refusal: &Refusal) {
        self.connection.linger();
        self.clock = None;
        self.head = Head::Refusing { answer: plain(refusal) };
    }

    /// Has octets of an answer wait for more of it: Pingora flushes where there is no more, or none that is known to come, so
    /// that a head goes out with its body, in one record and one send (HTTP/1.1).
    fn poll_join(&mut self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.waiting.len() + buf.len() > JOINED {
            let Some(inner) = self.inner.as_mut() else { return Poll::Ready(Err(closed())) };
            if self.waiting.is_empty() {
                return Pin::new(inner).poll_write(cx, buf);
            }
            // What waits fills a record with what follows it.
            if self.waiting.len() < RECORD {
                let fits = buf.get(..RECORD - self.waiting.len()).unwrap_or(buf);
                self.waiting.extend_from_slice(fits);
                return Poll::Ready(Ok(fits.len()));
            }
            ready!(self.poll_send_waiting(cx))?;
            return self.poll_join(cx, buf);
        }
        self.waiting.extend_from_slice(buf);
        Poll::Ready(Ok(buf.len()))
    }

    /// Sends what waits.
    fn poll_send_waiting(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.waiting.is_empty() {
            let Some(inner) = self.inner.as_mut() else { return Poll::Ready(Err(closed())) };
            let written = ready!(Pin::new(inner).poll_write(cx, &self.waiting))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.waiting.advance(written);
        }
        // Idle connections are many.
        self.waiting = BytesMut::new();
        Poll::Ready(Ok(()))
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
        if self.clock.is_some() {
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

    /// A read while an HTTP/2 connection has yet to begin: Pingora waits for that without a clock.
    fn poll_read_preface(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let Some(inner) = self.inner.as_mut() else { return Poll::Ready(Err(closed())) };
        match Pin::new(inner).poll_read(cx, buf)? {
            Poll::Ready(()) => {
                let read = buf.filled().len() - before;
                match &mut self.head {
                    Head::Reading { octets } if *octets + read < H2_PREFACE => *octets += read,
                    _ => self.clock = None,
                }
                Poll::Ready(Ok(()))
            }
            Poll::Pending => match self.clock.as_mut().map(|clock| clock.as_mut().poll(cx)) {
                Some(Poll::Ready(())) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
                _ => Poll::Pending,
            },
        }
    }

    /// A read while a head is awaited: within its time, within its bound. The first head's time began with the
    /// connection, a later one's begins with its first octet.
    fn poll_read_head(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let nth = self.connection.heads.load(Ordering::Relaxed);
        if nth != self.nth && matches!(self.head, Head::Reading { .. }) {
            (self.nth, self.clock, self.head) = (nth, None, Head::Reading { octets: 0 });
        }
        loop {
            match &mut self.head {
                Head::Refused => return Poll::Ready(Ok(())),
                Head::Refusing { .. } => ready!(self.poll_refusing(cx))?,
                Head::Reading { octets } => {
                    let before = buf.filled().len();
                    let Some(inner) = self.inner.as_mut() else { return Poll::Ready(Err(closed())) };
                    match Pin::new(inner).poll_read(cx, buf)? {
                        Poll::Ready(()) => {
                            *octets += buf.filled().len() - before;
                            if *octets <= MAX_HEAD {
                                return Poll::Ready(Ok(()));
                            }
                            buf.set_filled(before);
                            self.refuse(&Refusal::BadHttp("the request head is larger than 64 KiB"));
                        }
                        Poll::Pending => {
                            // Most heads come whole, and need no clock.
                            if *octets > 0 && self.clock.is_none() {
                                self.clock = Some(Box::pin(tokio::time::sleep(self.head_timeout)));
                            }
                            let late = self.clock.as_mut().map(|clock| clock.as_mut().poll(cx));
                            match late {
                                Some(Poll::Ready(())) if *octets == 0 => {
                                    // Nothing was asked, so nothing is answered.
                                    self.head = Head::Refused;
                                }
                                Some(Poll::Ready(())) => self.refuse(&Refusal::TooSlow),
                                _ => return Poll::Pending,
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
        if this.connection.reading_head.load(Ordering::Relaxed) {
            return this.poll_read_head(cx, buf);
        }
        if this.connection.h2 {
            return this.poll_read_frames(cx, buf);
        }
        let Some(inner) = this.inner.as_mut() else { return Poll::Ready(Err(closed())) };
        if !this.connection.hold.load(Ordering::Relaxed) || buf.remaining() <= HELD_READ {
            return Pin::new(inner).poll_read(cx, buf);
        }
        let mut small = ReadBuf::new(buf.initialize_unfilled_to(HELD_READ));
        ready!(Pin::new(inner).poll_read(cx, &mut small))?;
        let read = small.filled().len();
        buf.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl<T: Transport> AsyncWrite for FederationStream<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        // What is written before a head was in is Pingora's page for what it could not read.
        if this.connection.reading_head.load(Ordering::Relaxed) {
            if matches!(this.head, Head::Reading { .. }) {
                this.refuse(&Refusal::BadHttp("the request head cannot be read, or its fields are too many"));
            }
            ready!(this.poll_refusing(cx))?;
            return Poll::Ready(Ok(buf.len()));
        }
        if !this.connection.h2 {
            return this.poll_join(cx, buf);
        }
        match this.inner.as_mut() {
            Some(inner) => {
                let written = ready!(Pin::new(inner).poll_write(cx, buf))?;
                this.count(written);
                Poll::Ready(Ok(written))
            }
            None => Poll::Ready(Err(closed())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send_waiting(cx))?;
        match this.inner.as_mut() {
            Some(inner) => Pin::new(inner).poll_flush(cx),
            None => Poll::Ready(Err(closed())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send_waiting(cx))?;
        match this.inner.as_mut() {
            Some(inner) => Pin::new(inner).poll_shutdown(cx),
            None => Poll::Ready(Ok(())),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        match this.inner.as_mut() {
            Some(inner) if this.connection.h2 && !this.connection.reading_head.load(Ordering::Relaxed) => {
                let written = ready!(Pin::new(inner).poll_write_vectored(cx, bufs))?;
                this.count(written);
                Poll::Ready(Ok(written))
            }
            _ => {
                let first = bufs.iter().find(|buf| !buf.is_empty()).map_or(&[][..], |buf| &**buf);
                Pin::new(this).poll_write(cx, first)
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
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
        let mut nothing = vec![0; HELD_READ];
        while let Ok(Ok(1..)) = tokio::time::timeout(idle, stream.read(&mut nothing)).await {}
    })
    .await;
}

// === What Pingora asks of a stream ===

#[async_trait]
impl<T: Transport> Shutdown for FederationStream<T> {
    async fn shutdown(&mut self) {
        let _ = tokio::time::timeout(LINGER.1, tokio::io::AsyncWriteExt::shutdown(self)).await;
    }
}

impl<T: Transport> UniqueID for FederationStream<T> {
    fn id(&self) -> UniqueIDType {
        self.id
    }
}

impl<T: Transport> Ssl for FederationStream<T> {
    fn selected_alpn_proto(&self) -> Option<ALPN> {
        Some(if self.connection.h2 { ALPN::H2 } else { ALPN::H1 })
    }
}

impl<T: Transport> GetTimingDigest for FederationStream<T> {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        vec![]
    }
}

impl<T: Transport> GetProxyDigest for FederationStream<T> {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        Some(self.proxy_digest.clone())
    }
}

impl<T: Transport> GetSocketDigest for FederationStream<T> {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        Some(self.socket_digest.clone())
    }
}

#[async_trait]
impl<T: Transport> Peek for FederationStream<T> {}
