//! A connection of another provider's server, or of a node of this one: what is known of it, for all its requests, and when it has
//! to end.

use super::fields::forwarded_for;
use super::flow::Flow;
use super::live::ListenerTls;
use crate::admission::PeerIdentity;
use crate::tls::{self, TlsStream};
use atomic_waker::AtomicWaker;
use pingora_core::protocols::Stream;
use rustls::pki_types::CertificateDer;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant, SystemTime};
use tokio::time::Sleep;

/// A connection with a certificate lives no longer than this.
const LONGEST: Duration = Duration::from_secs(366 * 86_400);

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
    linger: AtomicBool,
    /// A write waits (HTTP/2, where what was answered is written after its request is over).
    is_writing: AtomicBool,
    /// What of its bodies is on its way (HTTP/2).
    pub(super) flow: Flow,
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
    /// Who is woken by what is said first.
    waits: Option<Waker>,
}

impl<'a> Ends<'a> {
    pub(super) fn of(connection: &'a Connection) -> Self {
        let until = connection.until.map(|until| {
            // It is good for all of its last second (RFC 5280 §4.1.2.5).
            let left = (until + Duration::from_secs(1)).duration_since(SystemTime::now()).unwrap_or_default();
            // The clock may be set; and nothing waits for a century.
            Box::pin(tokio::time::sleep(left.min(LONGEST)))
        });
        Self { connection, until, closes: false, waits: None }
    }

    /// Its peer is not admitted any more, or its certificate is over; or it is to close, which is said once.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let told = |ends: u8, closes: &mut bool| {
            if ends & CUT != 0 {
                return Poll::Ready(End::Cut);
            }
            if ends & CLOSE != 0 && !std::mem::replace(closes, true) {
                return Poll::Ready(End::Close);
            }
            Poll::Pending
        };
        let said = || self.connection.ends.load(Ordering::Acquire);
        if let Some(until) = &mut self.until
            && pin!(tokio::task::unconstrained(until.as_mut())).poll(cx).is_ready()
        {
            return Poll::Ready(End::Cut);
        }
        let ends = said();
        if let Poll::Ready(end) = told(ends, &mut self.closes) {
            return Poll::Ready(end);
        }
        // As long as nothing has been said, nobody has taken the waker.
        if ends == 0 && self.waits.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        self.connection.waits.register(cx.waker());
        self.waits = Some(cx.waker().clone());
        told(said(), &mut self.closes)
    }
}

/// A request under way on a connection.
pub(super) struct OnIt(pub(super) Arc<Connection>);

impl Drop for OnIt {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connection {
    /// A connection after its handshake, counted in `open` until it is dropped.
    pub(super) fn new(
        client: SocketAddr,
        listener: SocketAddr,
        stream: &TlsStream<Stream>,
        of: &ListenerTls,
        says_tls: bool,
        open: prometheus::IntGauge,
    ) -> Self {
        let session = stream.session();
        let chain: Vec<_> =
            session.peer_certificates().unwrap_or_default().iter().map(|der| der.clone().into_owned()).collect();
        let mut connection = Self::plain(client, listener, open);
        connection.sni = stream.server_name().map(str::to_owned);
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
            linger: AtomicBool::new(false),
            is_writing: AtomicBool::new(false),
            flow: Flow::default(),
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

    /// It is to end once nothing is under way on it.
    pub(super) fn closes(&self) -> bool {
        self.ends.load(Ordering::Acquire) & CLOSE != 0
    }

    /// The head of a request is in.
    pub(super) fn begin(self: &Arc<Self>) -> OnIt {
        self.linger.store(false, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        // There is one who begins them.
        self.so_far.store(self.so_far() + 1, Ordering::Relaxed);
        OnIt(self.clone())
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

    /// What is answered waits for its client, or no more (HTTP/2).
    pub(super) fn is_writing(&self, is_so: bool) {
        self.is_writing.store(is_so, Ordering::Relaxed);
    }

    /// It is read on before it is closed.
    pub(super) fn lingers(&self) -> bool {
        self.linger.load(Ordering::Relaxed)
    }
}

/// Who is at the other end of a connection.
pub(super) fn client_of(stream: &Stream) -> Option<SocketAddr> {
    let digest = stream.get_socket_digest()?;
    digest.peer_addr().and_then(|address| address.as_inet()).copied()
}

/// Version, cipher suite and key exchange, as a field says them.
fn negotiated(session: &rustls::CommonState) -> String {
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
            // Whoever sends so much that the task's budget is used up is not to have more time for it.
            ready!(pin!(tokio::task::unconstrained(sleep.as_mut())).poll(cx));
            if Instant::now() >= until {
                return Poll::Ready(());
            }
            // It was for something that has come since.
            sleep.as_mut().reset(until.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::task::Wake;

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Woken {
        fn take(&self) -> usize {
            self.0.swap(0, Ordering::Relaxed)
        }
    }

    #[test]
    fn whoever_waits_for_an_end_is_woken_for_each() {
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let connection = Connection::plain(address, address, prometheus::IntGauge::new("o", "o").unwrap());
        let (woken, other) = (Arc::new(Woken::default()), Arc::new(Woken::default()));
        let (waker, others) = (Waker::from(woken.clone()), Waker::from(other.clone()));
        let mut ends = Ends::of(&connection);
        let mut poll = |waker: &Waker| ends.poll(&mut Context::from_waker(waker));
        assert!(poll(&waker).is_pending() && poll(&waker).is_pending());
        assert!(poll(&others).is_pending(), "by another task");
        connection.close();
        assert_eq!((woken.take(), other.take()), (0, 1));
        assert_eq!(poll(&waker), Poll::Ready(End::Close));
        assert!(poll(&waker).is_pending());
        // Who said so may wake late, when that has been heard.
        connection.waits.wake();
        assert_eq!(woken.take(), 1);
        assert!(poll(&waker).is_pending());
        connection.cut();
        assert_eq!(woken.take(), 1);
        assert_eq!(poll(&waker), Poll::Ready(End::Cut));
    }

    #[tokio::test]
    async fn a_clock_goes_off_for_a_task_that_has_used_up_its_budget() {
        let gone_off = poll_fn(|cx| {
            while pin!(tokio::task::consume_budget()).poll(cx).is_ready() {}
            let mut clock = Clock::default();
            clock.set(Instant::now() - Duration::from_millis(50));
            Poll::Ready(clock.poll(cx).is_ready())
        });
        assert!(gone_off.await);
    }
}
