//! The connections to peers: those that are kept for the next request, and those that many requests are under way on.

use super::connect::{self, connect};
use super::{ConnectError, Exchange, Head, Peer, Protocol, Source, Times, http1, http2};
use crate::upstream::Target;
use parking_lot::Mutex;
use siphasher::sip128::Hasher128 as _;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hash as _, Hasher};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Idle connections of HTTP/1.1 to a peer, at most.
const MOST_IDLE: usize = 1024;

/// And to all of them.
const MOST_IDLE_IN_ALL: usize = 16_384;

/// Parts of the table, each with its lock.
const SHARDS: usize = 16;

/// No connection is waited for any longer, whatever is configured: an addition of times is not to overflow.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Idle connections that are looked at before they are put back for others to take.
const LOOK_AT: usize = 64;

/// What connections go by: a keyed hash of address, TLS and protocol, so long that no two are the same.
type Key = u128;

/// Takes what is a hash already.
#[derive(Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, octets: &[u8]) {
        for octet in octets {
            self.0 = self.0.rotate_left(8) ^ u64::from(*octet);
        }
    }

    fn write_u128(&mut self, n: u128) {
        // The shard is chosen by the lower half.
        self.0 = (n >> 64) as u64;
    }
}

type Keys = HashMap<Key, Entry, BuildHasherDefault<AsIs>>;

/// The connections to all peers, for all threads.
#[derive(Default)]
pub struct Clients {
    shards: [Mutex<Keys>; SHARDS],
    /// Idle connections of HTTP/1.1.
    idle: Arc<AtomicUsize>,
}

/// An idle connection of HTTP/1.1.
struct Idle {
    connection: http1::Connection,
    since: Instant,
    _counted: Counted,
}

/// One of the idle connections that are counted.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(all: &Arc<AtomicUsize>) -> Option<Self> {
        let more = |n: usize| (n < MOST_IDLE_IN_ALL).then(|| n.saturating_add(1));
        all.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Self(all.clone()))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The connections to a peer.
#[derive(Default)]
struct Entry {
    /// For how long an idle one is kept, as was said last.
    keepalive: Duration,
    /// Of HTTP/1.1, the one that was put there last at the back.
    idle: VecDeque<Idle>,
    http2: Vec<http2::Connection>,
    /// Connections that are being made, of HTTP/2 as far as is known.
    making: Vec<Making>,
    /// TLS negotiated HTTP/1.1 last.
    is_http1: bool,
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.idle.is_empty() && self.http2.is_empty() && self.making.is_empty()
    }
}

/// A connection that is being made.
struct Making {
    /// Who makes it, among those that do.
    by: watch::Sender<Made>,
    /// Requests that it will have room for, beyond those that wait for it.
    room: usize,
}

/// What came of a connection.
#[derive(Clone)]
enum Made {
    NotYet,
    /// There is one. It may be of HTTP/1.1, for one request only.
    Yes,
    No(Arc<ConnectError>),
}

/// What a request gets.
enum Step<'a> {
    Idle(Idle),
    Place(http2::Slot),
    /// What is no use any more, to be dropped without the lock. There may be others.
    Useless(#[expect(dead_code, reason = "to be dropped")] Useless),
    Wait(watch::Receiver<Made>),
    /// To make a connection.
    Make(Maker<'a>),
}

enum Useless {
    Http1(#[expect(dead_code, reason = "to be dropped")] VecDeque<Idle>),
    Http2(#[expect(dead_code, reason = "to be dropped")] http2::Connection),
}

/// Who makes a connection that others may wait for. Dropped, it says that nothing came of it: one of them is next.
struct Maker<'a> {
    clients: &'a Clients,
    key: Key,
    keepalive: Duration,
    /// None where nobody waits.
    by: Option<watch::Sender<Made>>,
}

impl Maker<'_> {
    /// Says what came of it.
    fn end(mut self, made: Made, connection: Option<&http2::Connection>) {
        let Some(by) = self.by.take() else { return };
        if let Made::Yes = made {
            let mut keys = self.clients.shard(self.key).lock();
            let entry = keys.entry(self.key).or_default();
            entry.keepalive = self.keepalive;
            entry.making.retain(|making| !making.by.same_channel(&by));
            entry.is_http1 = connection.is_none();
            // Beyond so many it is for the requests that have a place on it.
            entry.http2.extend(connection.filter(|_| entry.http2.len() < MOST_IDLE).cloned());
        } else {
            self.leave(&by);
        }
        by.send_replace(made);
    }

    fn leave(&self, by: &watch::Sender<Made>) {
        if let Some(entry) = self.clients.shard(self.key).lock().get_mut(&self.key) {
            entry.making.retain(|making| !making.by.same_channel(by));
        }
    }
}

impl Drop for Maker<'_> {
    fn drop(&mut self) {
        if let Some(by) = self.by.take() {
            self.leave(&by);
        }
    }
}

/// A connection for one request, or a place on one.
pub enum Link {
    /// Of HTTP/1.1.
    Http1(http1::Connection),
    /// Of HTTP/2.
    Http2(http2::Slot),
}

impl Link {
    /// A request may be left untouched ([`super::Error::Untouched`]), and then be sent again.
    pub fn may_leave_untouched(&self) -> bool {
        matches!(self, Self::Http2(_))
    }

    /// Begins with a request. `kept`: the connection was there before, and may have been closed meanwhile. `now`: what time it is,
    /// or was a moment ago, where that is known.
    pub fn begin<S: Source>(
        self,
        kept: bool,
        head: &Head,
        source: S,
        times: Times,
        now: Option<Instant>,
    ) -> Exchange<S> {
        match self {
            Self::Http1(connection) => {
                let mut exchange = Box::new(http1::Exchange::begin(connection, kept, head, source, times));
                exchange.now = now;
                Exchange::Http1(exchange)
            }
            Self::Http2(slot) => Exchange::Http2(Box::new(http2::Exchange::begin(slot, kept, head, source, times))),
        }
    }
}

/// What is spoken: without TLS nothing is negotiated.
fn protocol(peer: &Peer) -> Protocol {
    match peer.protocol {
        Protocol::Either if peer.tls.is_none() => Protocol::Http1,
        protocol => protocol,
    }
}

fn key(peer: &Peer) -> Key {
    let mut hasher = connect::hasher();
    match &peer.at {
        Target::Inet(address) => {
            hasher.write_u8(0);
            address.hash(&mut hasher);
        }
        Target::Unix(path) => {
            let path = path.as_os_str().as_encoded_bytes();
            hasher.write_u8(1);
            hasher.write_u64(path.len() as u64);
            hasher.write(path);
        }
    }
    peer.tls.as_ref().map(|tls| tls.digest()).hash(&mut hasher);
    protocol(peer).hash(&mut hasher);
    hasher.finish128().into()
}

impl Clients {
    /// None to anybody yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn shard(&self, key: Key) -> &Mutex<Keys> {
        let [first, ..] = &self.shards;
        self.shards.get(key as usize % SHARDS).unwrap_or(first)
    }

    /// As [`Clients::link_at`], now.
    #[cfg(test)]
    pub async fn link(&self, peer: &Peer) -> Result<(Link, bool), ConnectError> {
        self.link_at(peer, &mut None).await
    }

    /// A connection for a request, and whether it was there before. `now`: what time it is, where that is known; afterwards, if
    /// nothing was waited for.
    ///
    /// # Errors
    /// There is none, and none can be made; or the one that is waited for cannot.
    pub async fn link_at(&self, peer: &Peer, now: &mut Option<Instant>) -> Result<(Link, bool), ConnectError> {
        let key = key(peer);
        let mut until = None;
        loop {
            match self.step(key, peer, *now.get_or_insert_with(Instant::now)) {
                Step::Idle(Idle { mut connection, .. }) => {
                    if connection.is_usable() {
                        return Ok((Link::Http1(connection), true));
                    }
                }
                Step::Place(mut slot) => {
                    if slot.is_open() {
                        return Ok((Link::Http2(slot), true));
                    }
                }
                Step::Useless(_) => {}
                Step::Wait(mut making) => {
                    *now = None;
                    let until = *until.get_or_insert_with(|| Instant::now() + peer.times.connect.min(LONGEST));
                    let made = making.wait_for(|made| !matches!(made, Made::NotYet));
                    let made = Box::pin(tokio::time::timeout_at(until, made)).await;
                    let made = made.map_err(|_| ConnectError::TimedOut)?;
                    // Who made it may be gone: then this is next, or another is.
                    if let Ok(Made::No(e)) = made.as_deref() {
                        return Err(again(e));
                    }
                }
                Step::Make(maker) => {
                    *now = None;
                    let until = until.unwrap_or_else(|| Instant::now() + peer.times.connect.min(LONGEST));
                    // Few requests need one: they have no room for it.
                    let made = Box::pin(tokio::time::timeout_at(until, make(peer))).await;
                    return match made.unwrap_or(Err(ConnectError::TimedOut)) {
                        Ok(New::Http1(mut connection)) => {
                            connection.key = key;
                            maker.end(Made::Yes, None);
                            Ok((Link::Http1(connection), false))
                        }
                        Ok(New::Http2(connection, slot)) => {
                            maker.end(Made::Yes, Some(&connection));
                            Ok((Link::Http2(slot), false))
                        }
                        Err(e) => {
                            maker.end(Made::No(Arc::new(again(&e))), None);
                            Err(e)
                        }
                    };
                }
            }
        }
    }

    /// What there is for a request now.
    fn step(&self, key: Key, peer: &Peer, now: Instant) -> Step<'_> {
        let mut keys = self.shard(key).lock();
        let keepalive = peer.times.keepalive;
        let maker = |by| Step::Make(Maker { clients: self, key, keepalive, by });
        let entry = if protocol(peer) == Protocol::Http1 {
            let Some(entry) = keys.get_mut(&key) else {
                return maker(None);
            };
            entry
        } else {
            keys.entry(key).or_default()
        };
        entry.keepalive = keepalive;
        if let Some(idle) = entry.idle.pop_back() {
            if now.saturating_duration_since(idle.since) < entry.keepalive {
                return Step::Idle(idle);
            }
            // The others have been there for longer.
            let mut old = std::mem::take(&mut entry.idle);
            old.push_back(idle);
            return Step::Useless(Useless::Http1(old));
        }
        if protocol(peer) == Protocol::Http1 {
            return maker(None);
        }
        if let Some(at) = entry.http2.iter().position(http2::Connection::is_gone) {
            return Step::Useless(Useless::Http2(entry.http2.swap_remove(at)));
        }
        if let Some(slot) = entry.http2.iter().find_map(|connection| connection.slot(peer.streams)) {
            return Step::Place(slot);
        }
        let (by, receiver) = watch::channel(Made::NotYet);
        if !entry.is_http1 {
            if let Some(making) = entry.making.iter_mut().find(|making| making.room > 0) {
                making.room = making.room.saturating_sub(1);
                return Step::Wait(making.by.subscribe());
            }
            entry.making.push(Making { by: by.clone(), room: peer.streams.saturating_sub(1) });
        }
        drop(receiver);
        maker(Some(by))
    }

    /// Takes a finished exchange, and keeps its connection for another if that is possible.
    pub fn keep<S: Source>(&self, peer: &Peer, exchange: Exchange<S>) {
        // That of HTTP/2 gives its place back as it is dropped.
        let Exchange::Http1(exchange) = exchange else {
            return;
        };
        let Some(connection) = exchange.into_kept() else {
            return;
        };
        let Some(counted) = Counted::new(&self.idle) else {
            return;
        };
        let key = connection.key;
        let idle = Idle { connection, since: Instant::now(), _counted: counted };
        let mut keys = self.shard(key).lock();
        let entry = keys.entry(key).or_default();
        entry.keepalive = peer.times.keepalive;
        if entry.idle.len() < MOST_IDLE {
            entry.idle.push_back(idle);
        } else {
            drop(keys);
            drop(idle);
        }
    }

    /// Drops what has been idle for too long, and what has ended. To be called about once a second.
    pub fn sweep(&self) {
        for shard in &self.shards {
            let keys: Vec<Key> = shard.lock().keys().copied().collect();
            for key in keys {
                sweep(shard, key);
            }
        }
    }
}

/// Drops what there is of a peer's that is no use any more. Nothing is dropped or looked at under the lock.
fn sweep(shard: &Mutex<Keys>, key: Key) {
    let mut old = Vec::new();
    let mut ended = Vec::new();
    let keepalive;
    {
        let mut keys = shard.lock();
        let Some(entry) = keys.get_mut(&key) else {
            return;
        };
        keepalive = entry.keepalive;
        while let Some(idle) = entry.idle.pop_front_if(|idle| idle.since.elapsed() >= keepalive) {
            old.push(idle);
        }
        let is_useless = |connection: &mut http2::Connection| connection.is_gone() || connection.is_idle_for(keepalive);
        ended.extend(entry.http2.extract_if(.., is_useless));
    }
    drop((old, ended));
    let mut at = 0;
    loop {
        let mut some: VecDeque<Idle> = {
            let mut keys = shard.lock();
            let Some(entry) = keys.get_mut(&key) else {
                return;
            };
            let end = entry.idle.len().min(at + LOOK_AT);
            if at >= end {
                if entry.is_empty() {
                    keys.remove(&key);
                }
                return;
            }
            entry.idle.drain(at..end).collect()
        };
        some.retain_mut(|idle| idle.connection.is_usable());
        let looked_at = some.len();
        let mut keys = shard.lock();
        let entry = keys.entry(key).or_default();
        entry.keepalive = keepalive;
        // Where they were, as far as that is still there: the order is by time.
        let mut later = entry.idle.split_off(at.min(entry.idle.len()));
        entry.idle.append(&mut some);
        entry.idle.append(&mut later);
        at += looked_at;
    }
}

/// A new connection.
enum New {
    Http1(http1::Connection),
    Http2(http2::Connection, http2::Slot),
}

async fn make(peer: &Peer) -> Result<New, ConnectError> {
    let (stream, is_http2) = connect(peer).await?;
    if !is_http2 {
        return Ok(New::Http1(http1::Connection::new(stream)));
    }
    let refused = |e: io::Error| ConnectError::Refused(e);
    let connection = http2::Connection::new(stream, peer.tls.is_some(), peer.streams);
    let connection = connection.await.map_err(|e| refused(io::Error::other(e)))?;
    let slot =
        connection.slot(peer.streams).ok_or_else(|| refused(io::Error::other("no place on a new connection")))?;
    Ok(New::Http2(connection, slot))
}

/// The same error once more, for another request.
fn again(e: &ConnectError) -> ConnectError {
    let of = |e: &io::Error| match e.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(e.kind(), e.to_string()),
    };
    match e {
        ConnectError::Refused(e) => ConnectError::Refused(of(e)),
        ConnectError::TimedOut => ConnectError::TimedOut,
        ConnectError::Tls(e) => ConnectError::Tls(of(e)),
        ConnectError::OfThisProcess(e) => ConnectError::OfThisProcess(of(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Tls;
    use super::super::connect::testing::*;
    use super::*;
    use bytes::Bytes;
    use h2::RecvStream;
    use h2::server::{self, SendResponse};
    use http::{Method, Request, Response};
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    const SHORT: Duration = Duration::from_millis(100);

    async fn begin(clients: &Clients, peer: &Peer) -> Exchange<Body> {
        let (link, kept) = clients.link(peer).await.unwrap();
        link.begin(kept, &head(Method::GET), Body::none(), peer.times, None)
    }

    /// The number of the connection that a request was answered on.
    async fn finish(clients: &Clients, peer: &Peer, mut exchange: Exchange<Body>) -> usize {
        let got = answer(&mut exchange).await.unwrap();
        clients.keep(peer, exchange);
        got.head.headers.get("connection-number").unwrap().to_str().unwrap().parse().unwrap()
    }

    async fn ask(clients: &Clients, peer: &Peer) -> usize {
        let exchange = begin(clients, peer).await;
        finish(clients, peer, exchange).await
    }

    /// A server of HTTP/1.1, which counts its connections. It closes each after the answer if it `closes`.
    async fn http1(tls: Option<Arc<rustls::ServerConfig>>, closes: bool) -> (SocketAddr, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (at, connections) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let count = connections.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (n, tls) = (count.fetch_add(1, Ordering::Relaxed), tls.clone());
                tokio::spawn(async move {
                    let mut stream: http1::Stream = match tls {
                        None => Box::new(stream),
                        Some(tls) => match TlsAcceptor::from(tls).accept(stream).await {
                            Ok(stream) => Box::new(stream),
                            Err(_) => return,
                        },
                    };
                    let mut read = vec![];
                    while let Ok(octet) = stream.read_u8().await {
                        read.push(octet);
                        if read.ends_with(b"\r\n\r\n") {
                            read.clear();
                            let answer =
                                format!("HTTP/1.1 200 OK\r\nconnection-number: {n}\r\ncontent-length: 2\r\n\r\nok");
                            stream.write_all(answer.as_bytes()).await.unwrap();
                            if closes {
                                break;
                            }
                        }
                    }
                });
            }
        });
        (at, connections)
    }

    async fn number(n: usize, _: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
        respond.send_response(Response::builder().header("connection-number", n).body(()).unwrap(), true).unwrap();
    }

    fn is_empty(clients: &Clients) -> bool {
        clients.idle.load(Ordering::Relaxed) == 0 && clients.shards.iter().all(|shard| shard.lock().is_empty())
    }

    #[tokio::test]
    async fn connections_are_kept_and_the_last_is_the_first() {
        let (at, connections) = http1(None, false).await;
        let (clients, peer) = (Clients::new(), peer(at, Protocol::Http1));
        assert_eq!(ask(&clients, &peer).await, 0);
        assert_eq!(ask(&clients, &peer).await, 0);
        let (first, second) = (begin(&clients, &peer).await, begin(&clients, &peer).await);
        assert_eq!(finish(&clients, &peer, first).await, 0);
        assert_eq!(finish(&clients, &peer, second).await, 1);
        assert_eq!(ask(&clients, &peer).await, 1);
        assert!(clients.link(&peer).await.unwrap().1);
        // Without TLS there is nothing to negotiate.
        let (_, kept) = clients.link(&Peer { protocol: Protocol::Either, ..peer.clone() }).await.unwrap();
        assert!(kept);
        assert_eq!(connections.load(Ordering::Relaxed), 2);
        assert!(!clients.link(&peer).await.unwrap().1, "all are taken");
    }

    #[tokio::test]
    async fn what_was_closed_is_not_given_out() {
        let (at, connections) = http1(None, true).await;
        let (clients, peer) = (Clients::new(), peer(at, Protocol::Http1));
        for n in 0..3 {
            assert_eq!(ask(&clients, &peer).await, n);
            tokio::time::sleep(SHORT).await;
        }
        assert_eq!(connections.load(Ordering::Relaxed), 3);
        clients.sweep();
        assert!(is_empty(&clients));
    }

    #[tokio::test]
    async fn connections_are_kept_for_so_long() {
        let (at, _) = http1(None, false).await;
        let (at_http2, _) = http2(server::Builder::new(), None, number).await;
        let clients = Clients::new();
        for mut peer in [peer(at, Protocol::Http1), peer(at_http2, Protocol::Http2)] {
            ask(&clients, &peer).await;
            clients.sweep();
            assert!(!is_empty(&clients));
            assert_eq!(ask(&clients, &peer).await, 0);
            peer.times.keepalive = SHORT;
            // One that is in use is not idle.
            let used = begin(&clients, &peer).await;
            tokio::time::sleep(2 * SHORT).await;
            clients.sweep();
            assert_eq!(finish(&clients, &peer, used).await, 0);
            assert_eq!(ask(&clients, &peer).await, 0);
            tokio::time::sleep(2 * SHORT).await;
            if peer.protocol == Protocol::Http1 {
                assert_eq!(ask(&clients, &peer).await, 1, "it is too old, even if nobody has swept");
                tokio::time::sleep(2 * SHORT).await;
            }
            clients.sweep();
            assert!(is_empty(&clients));
        }
    }

    #[tokio::test]
    async fn a_sweep_keeps_the_order() {
        let (at, _) = http1(None, false).await;
        let (clients, peer) = (Clients::new(), peer(at, Protocol::Http1));
        let mut many = vec![];
        for _ in 0..LOOK_AT * 2 + 5 {
            many.push(begin(&clients, &peer).await);
        }
        let mut order = vec![];
        for exchange in many {
            order.push(finish(&clients, &peer, exchange).await);
        }
        clients.sweep();
        assert_eq!(clients.idle.load(Ordering::Relaxed), order.len());
        let mut held = vec![];
        while let Some(n) = order.pop() {
            let exchange = begin(&clients, &peer).await;
            held.push((n, exchange));
        }
        for (n, exchange) in held {
            assert_eq!(finish(&clients, &peer, exchange).await, n);
        }
    }

    #[tokio::test]
    async fn no_more_are_kept_than_may_be() {
        let (at, _) = http1(None, false).await;
        let (clients, peer) = (Clients::new(), peer(at, Protocol::Http1));
        clients.idle.store(MOST_IDLE_IN_ALL - 1, Ordering::Relaxed);
        let (first, second) = (begin(&clients, &peer).await, begin(&clients, &peer).await);
        finish(&clients, &peer, first).await;
        finish(&clients, &peer, second).await;
        assert_eq!(clients.idle.load(Ordering::Relaxed), MOST_IDLE_IN_ALL);
        assert!(clients.link(&peer).await.unwrap().1);
        assert!(!clients.link(&peer).await.unwrap().1);
    }

    #[tokio::test]
    async fn only_equal_peers_share() {
        let made = certificate(&["localhost", "127.0.0.1"]);
        let tls = |name| Tls::new(std::slice::from_ref(&made.certificate), None, name, Protocol::Http1).unwrap();
        let (at, _) = http1(Some(super::super::connect::testing::server(&made, &[], None)), false).await;
        let clients = Clients::new();
        let with = |name| Peer { tls: Some(tls(name)), ..peer(at, Protocol::Http1) };
        assert_eq!(ask(&clients, &with("localhost")).await, 0);
        assert_eq!(ask(&clients, &with("localhost")).await, 0, "made anew, and equal");
        assert_eq!(ask(&clients, &with("127.0.0.1")).await, 1);
        assert_ne!(key(&with("localhost")), key(&peer(at, Protocol::Http1)));
        let unix = |path: &str| key(&Peer { at: Target::Unix(path.into()), ..peer(at, Protocol::Http1) });
        assert!(unix("/a") == unix("/a") && unix("/a") != unix("/b"));
        assert_ne!(key(&peer(at, Protocol::Http1)), key(&peer(at, Protocol::Http2)));
    }

    #[tokio::test]
    async fn first_requests_make_one_connection_and_more_if_it_is_full() {
        for (requests, streams, expected) in [(50, 100, 1), (50, 50, 1), (50, 20, 3), (5, 1, 5)] {
            let (at, connections) = http2(server::Builder::new(), None, number).await;
            let clients = Arc::new(Clients::new());
            let peer = Peer { streams, ..peer(at, Protocol::Http2) };
            let mut links = tokio::task::JoinSet::new();
            for _ in 0..requests {
                let (clients, peer) = (clients.clone(), peer.clone());
                links.spawn(async move { begin(&clients, &peer).await });
            }
            let exchanges = links.join_all().await;
            for exchange in exchanges {
                finish(&clients, &peer, exchange).await;
            }
            assert_eq!(connections.load(Ordering::Relaxed), expected, "{requests} {streams}");
            // And then all is free.
            assert!(clients.link(&peer).await.unwrap().1);
            assert_eq!(connections.load(Ordering::Relaxed), expected);
        }
    }

    #[tokio::test]
    async fn what_is_negotiated_is_found_out() {
        let made = certificate(&["localhost"]);
        let tls = Tls::new(std::slice::from_ref(&made.certificate), None, "localhost", Protocol::Either).unwrap();
        let server = |alpn| super::super::connect::testing::server(&made, alpn, None);
        let (at, connections) = http1(Some(server(&["http/1.1"])), false).await;
        let (at_http2, connections_http2) =
            http2(server::Builder::new(), Some(server(&["h2", "http/1.1"])), number).await;
        for (at, connections, expected) in [(at, connections, 10), (at_http2, connections_http2, 1)] {
            let clients = Clients::new();
            let peer = Peer { tls: Some(tls.clone()), ..peer(at, Protocol::Either) };
            for _ in 0..2 {
                let b = || begin(&clients, &peer);
                let ten = tokio::join!(b(), b(), b(), b(), b(), b(), b(), b(), b(), b());
                for exchange in <[Exchange<Body>; 10]>::from(ten) {
                    finish(&clients, &peer, exchange).await;
                }
                assert_eq!(connections.load(Ordering::Relaxed), expected);
            }
        }
    }

    #[tokio::test]
    async fn who_waits_for_a_connection_that_fails_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = accepted.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(SHORT).await;
                drop(stream);
            }
        });
        let tls = Tls::new(&[], None, "localhost", Protocol::Http2).unwrap();
        let clients = Clients::new();
        let mut peer = Peer { tls: Some(tls), ..peer(at, Protocol::Http2) };
        let links = tokio::join!(clients.link(&peer), clients.link(&peer), clients.link(&peer));
        for link in <[_; 3]>::from(links) {
            assert!(matches!(link, Err(ConnectError::Tls(_))));
        }
        assert_eq!(accepted.load(Ordering::Relaxed), 1);
        peer.times.connect = SHORT / 2;
        let links = tokio::join!(clients.link(&peer), clients.link(&peer));
        for link in <[_; 2]>::from(links) {
            assert!(matches!(link, Err(ConnectError::TimedOut)));
        }
        clients.sweep();
        assert!(is_empty(&clients));
    }

    #[tokio::test]
    async fn who_gives_up_leaves_it_to_another() {
        let made = certificate(&["localhost"]);
        let config = super::super::connect::testing::server(&made, &["h2"], None);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tls = Tls::new(std::slice::from_ref(&made.certificate), None, "localhost", Protocol::Http2).unwrap();
        let peer = Peer { tls: Some(tls), ..peer(listener.local_addr().unwrap(), Protocol::Http2) };
        let clients = Clients::new();
        let gives_up = tokio::time::timeout(SHORT, clients.link(&peer));
        let serve = async {
            let first = listener.accept().await.unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            let stream = TlsAcceptor::from(config).accept(stream).await.unwrap();
            (first, stream)
        };
        let (given_up, link, _served) = tokio::join!(gives_up, clients.link(&peer), serve);
        assert!(given_up.is_err());
        assert!(matches!(link, Ok((Link::Http2(_), false))));
    }

    #[tokio::test]
    async fn a_connection_that_goes_away_gets_no_more() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (clients, peer) = (Clients::new(), peer(listener.local_addr().unwrap(), Protocol::Http2));
        let serve = async {
            let mut connection = h2::server::handshake(listener.accept().await.unwrap().0).await.unwrap();
            let (request, respond) = connection.accept().await.unwrap().unwrap();
            connection.graceful_shutdown();
            number(0, request, respond).await;
            assert!(connection.accept().await.is_none());
        };
        let (n, ()) = tokio::join!(ask(&clients, &peer), serve);
        assert_eq!(n, 0);
        let (link, _) = tokio::join!(clients.link(&peer), listener.accept());
        assert!(!link.unwrap().1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn servers_that_go_away_all_the_time_lose_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = Peer { streams: 3, ..peer(listener.local_addr().unwrap(), Protocol::Http2) };
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    let mut served = 0;
                    while let Some(Ok((request, respond))) = connection.accept().await {
                        tokio::spawn(number(0, request, respond));
                        served += 1;
                        if served == 20 {
                            connection.graceful_shutdown();
                        }
                    }
                });
            }
        });
        let clients = Arc::new(Clients::new());
        let mut askers = tokio::task::JoinSet::new();
        for _ in 0..16 {
            let (clients, peer) = (clients.clone(), peer.clone());
            askers.spawn(async move {
                for _ in 0..100 {
                    let mut exchange = begin(&clients, &peer).await;
                    while let Err(e) = answer(&mut exchange).await {
                        assert!(matches!(e, super::super::Error::Untouched), "{e}");
                        exchange = begin(&clients, &peer).await;
                    }
                    clients.sweep();
                }
            });
        }
        askers.join_all().await;
        // Places are all given back.
        for shard in &clients.shards {
            for entry in shard.lock().values() {
                assert!(entry.making.is_empty());
                assert!(entry.http2.iter().all(|connection| connection.is_idle_for(Duration::ZERO)));
            }
        }
    }

    #[test]
    fn connections_are_for_all_threads() {
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (servers, makes) = (tokio::runtime::Runtime::new().unwrap(), runtime());
        let clients = Arc::new(Clients::new());
        let (at, _) = servers.block_on(http1(None, false));
        let (at_http2, _) = servers.block_on(http2(server::Builder::new(), None, number));
        for peer in [peer(at, Protocol::Http1), peer(at_http2, Protocol::Http2)] {
            assert_eq!(makes.block_on(ask(&clients, &peer)), 0);
            let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
            std::thread::scope(|scope| {
                let makes = &makes;
                // It goes on to be driven there.
                scope.spawn(move || makes.block_on(stopped));
                assert_eq!(runtime().block_on(ask(&clients, &peer)), 0);
                stop.send(()).unwrap();
            });
        }
        // Its runtime is gone, and so is it.
        drop(makes);
        let next = runtime();
        assert_eq!(next.block_on(ask(&clients, &peer(at_http2, Protocol::Http2))), 1);
    }
}
