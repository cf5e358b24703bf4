//! Connections of those who mean harm: handshakes, connections and HTTP/2 frames over their bounds, and load balancers that
//! say who the client is. Everybody else is served all the while.

use crate::harness::{Gateway, Setup, a_example, ca, large_message, message_in, send_message};
use crate::support::client::{raw_tls, tls_config};
use crate::support::ds::{Ds, Recorded};
use crate::support::frames::{self, Answer, Connection, Frame, request};
use crate::support::pki::Identity;
use crate::support::proxy_protocol::{self as proxy, Header};
use http::Method;
use rustls::pki_types::ServerName;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// How long anything may take that is to happen at once.
const PATIENCE: Duration = Duration::from_secs(5);

/// A handshake is given so long.
const HANDSHAKE: &str = "headers = \"1s\"\nbody_idle = \"1s\"\nbody_total = \"3s\"\ntls_handshake = \"500ms\"";

/// Addresses of load balancers, for [`balanced`]; nobody else's.
const BALANCERS: &str = "proxy_protocol = [\"127.0.0.64/26\"]";

/// A balancer's.
const BALANCER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 70);

/// An address of a client. The harness's own clients come from 127.0.0.1.
fn ip(last: u8) -> Ipv4Addr {
    assert!((11..64).contains(&last), "of no balancer");
    Ipv4Addr::new(127, 0, 0, last)
}

/// A connection without TLS yet, from this address.
async fn connect_from(source: Ipv4Addr, gateway: &Gateway) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((source, 0).into())?;
    let stream = socket.connect(gateway.addr).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// TLS over a connection that is there.
async fn tls_over(stream: TcpStream, alpn: &str, identity: Option<&Identity>) -> io::Result<TlsStream<TcpStream>> {
    let connector = TlsConnector::from(Arc::new(tls_config(Some(&ca().pem()), &[alpn], identity)));
    let name = ServerName::try_from("ds.b.example").unwrap();
    tokio::time::timeout(PATIENCE, connector.connect(name, stream)).await.expect("a handshake that ends")
}

/// Sends an HTTP/1.1 request and reads its whole answer; the connection stays.
async fn exchange(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), head: &str, body: &[u8]) -> io::Result<u16> {
    let exchange = async {
        let length = body.len();
        let head = format!("{head} HTTP/1.1\r\nHost: ds.b.example\r\nContent-Type: application/octet-stream\r\n");
        stream.write_all(&[format!("{head}Content-Length: {length}\r\n\r\n").as_bytes(), body].concat()).await?;
        stream.flush().await?;
        let mut answer = vec![];
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await?);
        }
        let answer = String::from_utf8(answer).unwrap().to_lowercase();
        let length = answer.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut content = vec![0; length.map_or(0, |length| length.trim().parse().unwrap())];
        stream.read_exact(&mut content).await?;
        let status = answer.strip_prefix("http/1.1 ").unwrap();
        Ok::<u16, io::Error>(status[..3].parse().unwrap())
    };
    tokio::time::timeout(PATIENCE, exchange).await.expect("an answer, or an end")
}

/// A connection that has been served a request, and is kept.
struct Visit(TlsStream<TcpStream>);

impl Visit {
    /// An error: the gateway closed the connection, before the handshake or after.
    async fn over(stream: TcpStream, identity: Option<&Identity>) -> io::Result<Visit> {
        let mut visit = Visit(tls_over(stream, "http/1.1", identity).await?);
        visit.again().await?;
        Ok(visit)
    }

    async fn from(source: Ipv4Addr, gateway: &Gateway) -> io::Result<Visit> {
        Visit::over(connect_from(source, gateway).await?, None).await
    }

    /// Asks what the gateway answers by itself.
    async fn again(&mut self) -> io::Result<()> {
        assert_eq!(exchange(&mut self.0, "GET /.well-known/mimi/ds-domain", b"").await?, 200);
        Ok(())
    }
}

/// Comes again and again until it is let in.
async fn is_let_in(source: Ipv4Addr, gateway: &Gateway) -> Visit {
    let until = Instant::now() + PATIENCE;
    loop {
        match Visit::from(source, gateway).await {
            Ok(visit) => return visit,
            Err(error) => assert!(Instant::now() < until, "{source} is kept out: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Reads until the other side closes; nothing that it says is an answer.
async fn is_closed(mut stream: impl AsyncRead + Unpin) {
    let mut octets = vec![];
    let end = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut octets)).await;
    assert!(end.is_ok(), "it is still open");
    assert!(!octets.starts_with(b"HTTP/"), "{}", String::from_utf8_lossy(&octets));
}

fn series(reason: &str) -> String {
    format!("moh_gateway_connections_refused_total{{reason=\"{reason}\"}}")
}

async fn refused(gateway: &Gateway, reason: &str) -> f64 {
    gateway.metric(&series(reason)).await
}

/// The connection by which the harness saw that the gateway listens is over: it counts among none of the others.
async fn started(setup: Setup) -> Gateway {
    let gateway = Gateway::start(setup).await;
    gateway.until_metric("moh_gateway_tls_handshakes_total{result=\"failed\"}", |n| n >= 1.0).await;
    gateway
}

async fn serves(gateway: &Gateway, ds: &Ds) {
    let before = ds.complete();
    let response = gateway.peer().send(Method::POST, "/group_operation", send_message()).await.unwrap();
    assert_eq!(response.status, 200);
    assert_eq!(ds.complete(), before + 1);
}

/// No connection is left behind, whoever closed it.
async fn all_are_gone(gateway: &Gateway) {
    gateway.until_metric("moh_gateway_connections", |n| n == 0.0).await;
}

// === Handshakes ===

#[tokio::test]
async fn handshakes_over_the_rate_of_an_address() {
    let ds = Ds::start().await;
    let rate = "[connections]\nhandshakes_per_ip = \"1/h\"\nhandshakes_burst = 3";
    let gateway = started(Setup::of(&ds).with(rate)).await;
    for _ in 0..3 {
        Visit::from(ip(11), &gateway).await.unwrap();
    }
    for n in 1..=3u8 {
        assert!(Visit::from(ip(11), &gateway).await.is_err(), "over its rate");
        gateway.until_metric(&series("handshake-rate"), |refused| refused == f64::from(n)).await;
    }
    Visit::from(ip(12), &gateway).await.expect("another address has a rate of its own");
    // What is no handshake is one all the same: it took what one takes.
    for _ in 0..3 {
        let mut stream = connect_from(ip(13), &gateway).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: ds.b.example\r\n\r\n").await.unwrap();
        is_closed(stream).await;
    }
    assert!(Visit::from(ip(13), &gateway).await.is_err());
    serves(&gateway, &ds).await;
    all_are_gone(&gateway).await;
}

#[tokio::test]
async fn who_waits_may_shake_hands_again() {
    let ds = Ds::start().await;
    let rate = "[connections]\nhandshakes_per_ip = \"2/s\"\nhandshakes_burst = 2";
    let gateway = started(Setup::of(&ds).with(rate)).await;
    let began = Instant::now();
    let mut visits = 0;
    while Visit::from(ip(11), &gateway).await.is_ok() {
        visits += 1;
        assert!(visits < 20, "there is no rate");
    }
    assert!(visits >= 2, "the burst");
    is_let_in(ip(11), &gateway).await;
    assert!(began.elapsed() < PATIENCE, "half a second each: {:?}", began.elapsed());
    assert!(refused(&gateway, "handshake-rate").await >= 1.0);
}

#[tokio::test]
async fn handshakes_in_flight() {
    let ds = Ds::start().await;
    let setup = Setup::of(&ds).with("[connections]\nhandshakes_at_once = 2");
    let gateway = started(Setup { timeouts: "tls_handshake = \"10s\"", ..setup }).await;
    let mut before = is_let_in(ip(14), &gateway).await;
    let silent = [connect_from(ip(11), &gateway).await.unwrap(), connect_from(ip(12), &gateway).await.unwrap()];
    let until = Instant::now() + PATIENCE;
    while Visit::from(ip(13), &gateway).await.is_ok() {
        assert!(Instant::now() < until, "there is room for a third");
    }
    assert!(refused(&gateway, "handshakes-at-once").await >= 1.0);
    before.again().await.expect("connections that have shaken hands are not in the way, nor held up");
    drop(silent);
    is_let_in(ip(13), &gateway).await;
}

#[tokio::test]
async fn one_address_does_not_hold_up_the_handshakes_of_others() {
    let ds = Ds::start().await;
    let setup = Setup::of(&ds).with("[connections]\nhandshakes_at_once = 64");
    let gateway = started(Setup { timeouts: "tls_handshake = \"10s\"", ..setup }).await;
    let mut silent = vec![];
    for _ in 0..20 {
        silent.push(connect_from(ip(11), &gateway).await.unwrap());
    }
    // A share of one address is a sixteenth, or eight.
    gateway.until_metric(&series("handshakes-at-once"), |n| n == 12.0).await;
    is_let_in(ip(12), &gateway).await;
    assert!(Visit::from(ip(11), &gateway).await.is_err(), "it has its share");
}

#[tokio::test]
async fn strangers_leave_room_for_those_who_show_a_certificate() {
    let ds = Ds::start().await;
    let gateway = started(Setup::of(&ds).with("[connections]\nmax = 8")).await;
    let mut open = vec![];
    for _ in 0..6 {
        open.push(is_let_in(ip(11), &gateway).await);
    }
    assert!(Visit::from(ip(12), &gateway).await.is_err(), "three quarters are theirs");
    assert_eq!(refused(&gateway, "max").await, 1.0);
    let peer = gateway.peer();
    assert_eq!(peer.send(Method::POST, "/group_operation", send_message()).await.unwrap().status, 200);
}

#[tokio::test]
async fn a_handshake_has_its_time() {
    let ds = Ds::start().await;
    let gateway = started(Setup { timeouts: HANDSHAKE, ..Setup::of(&ds) }).await;
    let timeouts = "moh_gateway_tls_handshakes_total{result=\"timeout\"}";
    let began = Instant::now();
    let silent = connect_from(ip(11), &gateway).await.unwrap();
    // A record that says it has 512 octets, of which an octet comes now and then: the time is for all of the handshake.
    let drips = connect_from(ip(12), &gateway).await.unwrap();
    let (read, mut write) = drips.into_split();
    let dripping = tokio::spawn(async move {
        let record: Vec<u8> = [&[22u8, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3][..], &[7; 32], &[0; 400]].concat();
        for octet in record {
            if write.write_all(&[octet]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    is_closed(silent).await;
    is_closed(read).await;
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    gateway.until_metric(timeouts, |n| n == 2.0).await;
    dripping.abort();
    serves(&gateway, &ds).await;
}

// === Connections ===

#[tokio::test]
async fn connections_of_an_address() {
    let ds = Ds::start().await;
    let gateway = started(Setup::of(&ds).with("[connections]\nper_ip = 2")).await;
    let mut first = Visit::from(ip(11), &gateway).await.unwrap();
    let second = Visit::from(ip(11), &gateway).await.unwrap();
    for _ in 0..3 {
        assert!(Visit::from(ip(11), &gateway).await.is_err(), "a third");
    }
    gateway.until_metric(&series("per-ip"), |n| n == 3.0).await;
    Visit::from(ip(12), &gateway).await.expect("another address");
    first.again().await.expect("those that are open stay");
    drop(second);
    is_let_in(ip(11), &gateway).await;
    // HTTP/2 connections and those that are in their handshake are connections too.
    let stream = tls_over(connect_from(ip(13), &gateway).await.unwrap(), "h2", None).await.unwrap();
    let _h2 = Connection::open(stream, &[]).await.unwrap();
    let _silent = connect_from(ip(13), &gateway).await.unwrap();
    let until = Instant::now() + PATIENCE;
    while Visit::from(ip(13), &gateway).await.is_ok() {
        assert!(Instant::now() < until, "they do not count");
    }
    serves(&gateway, &ds).await;
}

#[tokio::test]
async fn connections_of_a_provider() {
    let ds = Ds::start().await;
    let gateway = started(Setup::of(&ds).with("[connections]\nper_provider = 2")).await;
    // A provider has more certificates than one, and more addresses.
    let (a, again_a, c) = (a_example(), a_example(), ca().issue(&["c.example"]));
    let visit = async |last: u8, identity: Option<&Identity>| {
        Visit::over(connect_from(ip(last), &gateway).await?, identity).await
    };
    let mut first = visit(11, Some(&a)).await.unwrap();
    let second = visit(12, Some(&again_a)).await.unwrap();
    assert!(visit(13, Some(&a)).await.is_err(), "a third of the provider");
    gateway.until_metric(&series("per-provider"), |n| n == 1.0).await;
    let _others = [visit(13, Some(&c)).await.unwrap(), visit(13, Some(&c)).await.unwrap()];
    assert!(visit(13, Some(&c)).await.is_err(), "it has as many, and no more");
    for _ in 0..3 {
        visit(13, None).await.expect("who shows no certificate is of no provider");
    }
    first.again().await.expect("those that are open stay");
    drop(second);
    let until = Instant::now() + PATIENCE;
    while visit(13, Some(&a)).await.is_err() {
        assert!(Instant::now() < until, "who has left still counts");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn connections_of_all() {
    let ds = Ds::start().await;
    // Who is exempt from limits per address takes a place like others.
    let gateway = started(Setup::of(&ds).with("[connections]\nmax = 3\nexempt = [\"127.0.0.0/8\"]")).await;
    let mut held = vec![];
    for last in 11..14 {
        held.push(is_let_in(ip(last), &gateway).await);
    }
    assert!(Visit::from(ip(14), &gateway).await.is_err(), "a fourth");
    assert!(Visit::from(ip(11), &gateway).await.is_err());
    gateway.until_metric(&series("max"), |n| n == 2.0).await;
    for visit in &mut held {
        visit.again().await.unwrap();
    }
    held.pop();
    is_let_in(ip(14), &gateway).await;
    drop(held);
    all_are_gone(&gateway).await;
    serves(&gateway, &ds).await;
}

#[tokio::test]
async fn exempt_networks() {
    let ds = Ds::start().await;
    let limits =
        "[connections]\nper_ip = 1\nhandshakes_per_ip = \"1/h\"\nhandshakes_burst = 2\nexempt = [\"127.0.0.32/30\"]";
    let gateway = started(Setup::of(&ds).with(limits)).await;
    let mut held = vec![];
    for n in 0..10 {
        held.push(Visit::from(ip(33), &gateway).await.unwrap_or_else(|error| panic!("number {n}: {error}")));
    }
    let _held = Visit::from(ip(36), &gateway).await.expect("next to the network");
    assert!(Visit::from(ip(36), &gateway).await.is_err());
    assert_eq!(refused(&gateway, "per-ip").await + refused(&gateway, "handshake-rate").await, 1.0);
}

// === PROXY protocol ===

/// A gateway behind balancers; handshakes have half a second.
async fn balanced(ds: &Ds, more: &str) -> Gateway {
    started(Setup { timeouts: HANDSHAKE, ..Setup::of(ds) }.listener(BALANCERS).with(more)).await
}

/// What comes from a balancer first, and then TLS.
async fn behind(header: &[u8], gateway: &Gateway) -> io::Result<TlsStream<TcpStream>> {
    let mut stream = connect_from(BALANCER, gateway).await?;
    stream.write_all(header).await?;
    tls_over(stream, "http/1.1", None).await
}

/// The address that the DS is told; in quotes or not, and without a port.
fn forwarded_for(request: &Recorded) -> String {
    let [value] = &request.headers.get_all("forwarded").iter().collect::<Vec<_>>()[..] else { panic!("one field") };
    let mut parts = value.to_str().unwrap().split([';', ',']).filter_map(|part| part.trim().strip_prefix("for="));
    let node = parts.next().unwrap().trim_matches('"');
    assert!(parts.next().is_none(), "one client: {value:?}");
    match node.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap().to_owned(),
        None => node.split(':').next().unwrap().to_owned(),
    }
}

/// Sends a request to the DS, and says for whom it was.
async fn forwarded(stream: &mut TlsStream<TcpStream>, ds: &Ds) -> String {
    let before = ds.complete();
    assert_eq!(exchange(stream, "POST /group_operation", &send_message()).await.unwrap(), 200);
    assert_eq!(ds.complete(), before + 1);
    forwarded_for(&ds.requests().pop().unwrap())
}

fn v4() -> SocketAddr {
    "203.0.113.7:4711".parse().unwrap()
}

fn v6(text: &str) -> SocketAddr {
    SocketAddr::new(text.parse().unwrap(), 4711)
}

#[tokio::test]
async fn a_balancer_says_who_the_client_is() {
    let ds = Ds::start().await;
    let gateway = balanced(&ds, "").await;
    let client = Header::proxy(v4());
    let with_tlvs = client
        .clone()
        .tlv(proxy::PP2_TYPE_ALPN, b"h2")
        .tlv(proxy::PP2_TYPE_AUTHORITY, b"ds.b.example")
        .tlv(proxy::PP2_TYPE_UNIQUE_ID, &[9; 64])
        .tlv(proxy::PP2_TYPE_CUSTOM, b"")
        .tlv(proxy::PP2_TYPE_NOOP, &[0; 20]);
    let balancer = BALANCER.to_string();
    for (what, header, expected) in [
        ("TCP4", client.clone(), "203.0.113.7"),
        ("TCP6", Header::proxy(v6("2001:db8::7")), "2001:db8::7"),
        ("TCP4 with TLVs", with_tlvs.clone(), "203.0.113.7"),
        ("TCP6 with TLVs", Header::proxy(v6("2001:db8::8")).tlv(proxy::PP2_TYPE_NOOP, b"..."), "2001:db8::8"),
        ("LOCAL", Header::local(), balancer.as_str()),
        ("LOCAL with a TLV", Header::local().tlv(proxy::PP2_TYPE_NOOP, &[0; 9]), balancer.as_str()),
        ("LOCAL with addresses, which are nobody's", client.clone().command(proxy::LOCAL), balancer.as_str()),
        ("no family", Header::of(proxy::PROXY, proxy::UNSPEC, vec![]), balancer.as_str()),
    ] {
        let mut stream = behind(&header.encode(), &gateway).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        for _ in 0..2 {
            assert_eq!(forwarded(&mut stream, &ds).await, expected, "{what}");
        }
    }

    // In pieces, and in one with the TLS that follows.
    let mut stream = connect_from(BALANCER, &gateway).await.unwrap();
    for octet in with_tlvs.encode() {
        stream.write_all(&[octet]).await.unwrap();
    }
    let mut stream = tls_over(stream, "http/1.1", None).await.unwrap();
    assert_eq!(forwarded(&mut stream, &ds).await, "203.0.113.7");
    let stream = connect_from(BALANCER, &gateway).await.unwrap();
    let mut first = with_tlvs.encode();
    let connector = TlsConnector::from(Arc::new(tls_config(Some(&ca().pem()), &["http/1.1"], None)));
    let connecting = connector.connect_with(ServerName::try_from("ds.b.example").unwrap(), stream, |session| {
        session.write_tls(&mut first).unwrap();
    });
    assert!(first.len() > with_tlvs.encode().len() + 100, "the ClientHello is in it");
    {
        let stream = connecting.get_ref().unwrap();
        stream.writable().await.unwrap();
        assert_eq!(stream.try_write(&first).unwrap(), first.len());
    }
    let mut stream = connecting.await.unwrap();
    assert_eq!(forwarded(&mut stream, &ds).await, "203.0.113.7");

    // A client of a Unix socket has no address: it is refused, or it is the balancer.
    if let Ok(mut stream) = behind(&Header::unix().encode(), &gateway).await {
        assert_eq!(forwarded(&mut stream, &ds).await, balancer);
    }

    // HTTP/2 is no different.
    let mut stream = connect_from(BALANCER, &gateway).await.unwrap();
    stream.write_all(&client.encode()).await.unwrap();
    let mut h2 = Connection::open(tls_over(stream, "h2", None).await.unwrap(), &[]).await.unwrap();
    h2.post(1, "/group_operation", &send_message()).await.unwrap();
    assert_eq!(h2.answer(1).await, Answer::Status(200));
    assert_eq!(forwarded_for(&ds.requests().pop().unwrap()), "203.0.113.7");
}

#[tokio::test]
async fn what_is_no_header_of_a_balancer() {
    let ds = Ds::start().await;
    let gateway = balanced(&ds, "").await;
    let client = Header::proxy(v4());
    let signature = *b"\r\n\r\n\0\r\nQUIT\r";
    let too_long = [client.clone().length(u16::MAX).encode(), vec![0; usize::from(u16::MAX)]].concat();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("none at all", vec![]),
        ("one of version 1", proxy::version_1(v4())),
        ("another signature", Header { signature, ..client.clone() }.encode()),
        ("version 3", client.clone().command(0x31).encode()),
        ("version 1 in the form of 2", client.clone().command(0x11).encode()),
        ("an unknown command", client.clone().command(0x22).encode()),
        ("an unknown family", client.clone().family(0x41).encode()),
        ("too short for its addresses", client.clone().length(11).encode()),
        ("TCP6 with addresses of TCP4", client.clone().family(proxy::TCP6).encode()),
        ("as long as the length can say", too_long),
        ("two", [client.encode(), client.encode()].concat()),
    ];
    for (what, octets) in cases {
        let mut stream = connect_from(BALANCER, &gateway).await.unwrap();
        // It may be closed while this is written.
        let _ = stream.write_all(&octets).await;
        if let Ok(mut stream) = tls_over(stream, "http/1.1", None).await {
            let client = forwarded(&mut stream, &ds).await;
            panic!("{what} is taken, for {client}");
        }
    }
    // Of two headers the first is good, and the second is no TLS.
    gateway.until_metric(&series("proxy-protocol"), |n| n == 10.0).await;
    assert_eq!(ds.begun(), 0);
    let mut stream = behind(&client.encode(), &gateway).await.expect("a good one after all of them");
    assert_eq!(forwarded(&mut stream, &ds).await, "203.0.113.7");
}

#[tokio::test]
async fn a_header_has_its_time() {
    let ds = Ds::start().await;
    let gateway = balanced(&ds, "").await;
    let header = Header::proxy(v4()).tlv(proxy::PP2_TYPE_NOOP, &[0; 200]).encode();
    let began = Instant::now();
    let mut stalled = vec![];
    for cut in [0, 1, 12, 15, 16, 30, header.len()] {
        let mut stream = connect_from(BALANCER, &gateway).await.unwrap();
        stream.write_all(&header[..cut]).await.unwrap();
        stalled.push(stream);
    }
    let (read, mut write) = connect_from(BALANCER, &gateway).await.unwrap().into_split();
    let dripping = tokio::spawn(async move {
        for octet in header {
            if write.write_all(&[octet]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    for stream in stalled {
        is_closed(stream).await;
    }
    is_closed(read).await;
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    dripping.abort();
    serves(&gateway, &ds).await;
}

#[tokio::test]
async fn a_header_from_elsewhere_is_no_tls() {
    let ds = Ds::start().await;
    let gateway = balanced(&ds, "").await;
    for source in [ip(11), ip(63)] {
        let mut stream = connect_from(source, &gateway).await.unwrap();
        stream.write_all(&Header::proxy(v4()).encode()).await.unwrap();
        assert!(tls_over(stream, "http/1.1", None).await.is_err(), "{source} says who it is");
    }
    let mut visit = Visit::from(ip(11), &gateway).await.expect("without one it is a client");
    assert_eq!(forwarded(&mut visit.0, &ds).await, ip(11).to_string());
    assert_eq!(ds.complete(), 1);
    assert_eq!(refused(&gateway, "proxy-protocol").await, 0.0);
    // Where no balancers are named, theirs is one more address.
    let gateway = started(Setup::of(&ds)).await;
    assert!(behind(&Header::proxy(v4()).encode(), &gateway).await.is_err());
    let mut stream = behind(&[], &gateway).await.unwrap();
    assert_eq!(forwarded(&mut stream, &ds).await, BALANCER.to_string());
}

#[tokio::test]
async fn limits_behind_a_balancer_are_its_clients() {
    let ds = Ds::start().await;
    let limits = "[connections]\nper_ip = 2\nhandshakes_per_ip = \"1/h\"\nhandshakes_burst = 4";
    let gateway = balanced(&ds, limits).await;
    let visit = async |client: SocketAddr| {
        let mut stream = connect_from(BALANCER, &gateway).await?;
        stream.write_all(&Header::proxy(client).encode()).await?;
        Visit::over(stream, None).await
    };
    // All at once from one address of a balancer, more than an address may have.
    let mut held = vec![];
    for last in 1..=8 {
        let client = SocketAddr::from(([203, 0, 113, last], 4711));
        held.push(visit(client).await.unwrap_or_else(|error| panic!("{client}: {error}")));
    }
    assert_eq!(refused(&gateway, "per-ip").await, 0.0);
    // A client has as many as others, from whichever of its ports.
    let first = v6("2001:db8:0:1::1");
    held.push(visit(first).await.unwrap());
    held.push(visit(v6("2001:db8:0:1:ffff::2")).await.unwrap());
    assert!(visit(first).await.is_err(), "a /64 is one client");
    gateway.until_metric(&series("per-ip"), |n| n == 1.0).await;
    visit(v6("2001:db8:0:2::1")).await.expect("another /64");
    for _ in 0..4 {
        visit(v4_of(99)).await.expect("within its rate");
        all_but(&gateway, held.len()).await;
    }
    assert!(visit(v4_of(99)).await.is_err(), "over its rate");
    gateway.until_metric(&series("handshake-rate"), |n| n >= 1.0).await;
    visit(v4_of(100)).await.expect("another client");
}

fn v4_of(last: u8) -> SocketAddr {
    SocketAddr::from(([203, 0, 113, last], 4711))
}

/// Waits until so many connections are open, and no more.
async fn all_but(gateway: &Gateway, open: usize) {
    gateway.until_metric("moh_gateway_connections", |n| n == open as f64).await;
}

// === HTTP/2 ===

/// Fifty control frames, and ten a second: twenty-five resets.
const FEW_FRAMES: &str = "[http2]\ncontrol_frames = \"10/s\"\ncontrol_burst = 50";

async fn h2(gateway: &Gateway) -> Connection {
    let stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["h2"], None).await.unwrap();
    Connection::open(stream, &[]).await.unwrap()
}

/// Asks what the gateway answers by itself.
async fn discovers(h2: &mut Connection, stream: u32) -> Answer {
    h2.send(&Frame::headers(stream, true, &request("GET", "/.well-known/mimi/ds-domain"))).await.unwrap();
    h2.answer(stream).await
}

/// The streams of a client: odd numbers.
fn streams(first: u32, count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(move |n| first + 2 * n)
}

#[tokio::test]
async fn rapid_reset() {
    let ds = Ds::start().await;
    // Ten resets: h2 has a bound of its own, of twenty that it had no time to look at.
    let few = "[http2]\ncontrol_frames = \"10/s\"\ncontrol_burst = 20";
    let gateway = Gateway::start(Setup::of(&ds).with(few)).await;
    let peer = gateway.peer();
    assert_eq!(peer.send(Method::POST, "/group_operation", send_message()).await.unwrap().status, 200);
    ds.hang(true);
    let mut before = refused(&gateway, "http2-abuse").await;
    // A head that is taken back, and a whole request that is on its way to the DS when it is.
    for body in [None, Some(send_message())] {
        let begun = ds.begun();
        let mut h2 = h2(&gateway).await;
        for stream in streams(1, 2_000) {
            let mut octets = Frame::headers(stream, false, &request("POST", "/group_operation")).encode();
            if let Some(body) = &body {
                octets.extend(Frame::data(stream, true, body.as_slice()).encode());
            }
            octets.extend(Frame::rst_stream(stream, frames::CANCEL).encode());
            if h2.write(&octets).await.is_err() {
                break;
            }
        }
        assert!(h2.ended(PATIENCE).await.is_some(), "2000 resets, and it is open");
        gateway.until_metric(&series("http2-abuse"), |n| n == before + 1.0).await;
        before += 1.0;
        assert!(ds.begun() - begun <= 200, "{} of 2000 got to the DS", ds.begun() - begun);
    }
    ds.hang(false);
    assert_eq!(peer.send(Method::POST, "/group_operation", send_message()).await.unwrap().status, 200);
    assert_eq!(peer.connections(), 1, "another connection is not touched");
    gateway.until_metric("moh_gateway_requests_in_flight", |n| n == 0.0).await;
}

#[tokio::test]
async fn a_client_may_cancel() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds).with(FEW_FRAMES)).await;
    let mut h2 = h2(&gateway).await;
    for stream in streams(1, 5) {
        h2.send(&Frame::headers(stream, false, &request("POST", "/group_operation"))).await.unwrap();
        h2.send(&Frame::rst_stream(stream, frames::CANCEL)).await.unwrap();
    }
    for stream in streams(11, 20) {
        h2.post(stream, "/group_operation", &send_message()).await.unwrap();
        assert_eq!(h2.answer(stream).await, Answer::Status(200));
    }
    // By default a whole page of requests may be cancelled.
    let other = Gateway::start(Setup::of(&ds)).await;
    let mut h2 = self::h2(&other).await;
    for (n, stream) in streams(1, 66).enumerate() {
        // Others in between: nobody cancels all that he begins.
        if n % 11 == 10 {
            assert_eq!(discovers(&mut h2, stream).await, Answer::Status(200));
            continue;
        }
        h2.send(&Frame::headers(stream, false, &request("POST", "/group_operation"))).await.unwrap();
        h2.send(&Frame::rst_stream(stream, frames::CANCEL)).await.unwrap();
    }
    for gateway in [&gateway, &other] {
        assert_eq!(refused(gateway, "http2-abuse").await, 0.0);
    }
}

#[tokio::test]
async fn heads_that_never_end() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    serves(&gateway, &ds).await;
    let before = gateway.resident();
    let mut peak = before;
    let fields = frames::hpack(&[("x-long", "y".repeat(16_000).as_str())]);
    // Nothing, an octet, or a field; at most 64 MiB of it.
    for (fragment, at_once, times) in [(vec![], 1000, 1000), (vec![0], 1000, 1000), (fields, 16, 256)] {
        let mut h2 = h2(&gateway).await;
        h2.send(&Frame::headers_begun(1, frames::hpack(&request("POST", "/group_operation")))).await.unwrap();
        let octets = Frame::continuation(1, false, fragment).encode().repeat(at_once);
        for _ in 0..times {
            if h2.write(&octets).await.is_err() {
                break;
            }
            peak = peak.max(gateway.resident());
        }
        assert!(h2.ended(PATIENCE).await.is_some(), "it reads on and on");
        peak = peak.max(gateway.resident());
    }
    let grown = peak.saturating_sub(before) / 1024;
    assert!(grown < 16 * 1024, "{grown} KiB for heads that never ended");
    assert_eq!(ds.begun(), 1);
    serves(&gateway, &ds).await;
}

#[tokio::test]
async fn what_a_head_may_have() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds).with("[http2]\nmax_header_list = \"4KiB\"\nmax_streams = 5")).await;
    let mut h2 = h2(&gateway).await;
    assert_eq!(h2.setting(frames::MAX_HEADER_LIST_SIZE), Some(4096));
    assert_eq!(h2.setting(frames::MAX_CONCURRENT_STREAMS), Some(5));
    // RFC 9113 §10.5.1: a field counts 32 octets more than it has.
    for (stream, length, good) in [(1, 3_000, true), (3, 6_000, false), (5, 60_000, false)] {
        let value = "y".repeat(length);
        let mut fields = request("POST", "/group_operation").to_vec();
        fields.push(("x-long", value.as_str()));
        let block = frames::hpack(&fields);
        let mut h2 = self::h2(&gateway).await;
        let (first, rest) = block.split_at(block.len().min(16_384));
        let flags = if rest.is_empty() { frames::END_HEADERS } else { 0 };
        let mut octets = Frame::new(frames::HEADERS, flags, stream, first).encode();
        let mut rest = rest.chunks(16_384).peekable();
        while let Some(fragment) = rest.next() {
            octets.extend(Frame::continuation(stream, rest.peek().is_none(), fragment).encode());
        }
        octets.extend(Frame::data(stream, true, send_message()).encode());
        let _ = h2.write(&octets).await;
        let answer = h2.answer(stream).await;
        if good {
            assert_eq!(answer, Answer::Status(200));
        } else {
            assert!(matches!(answer, Answer::Status(431 | 400) | Answer::Reset(_) | Answer::Gone(_)), "{answer:?}");
        }
    }
    assert_eq!(ds.begun(), 1);
    assert_eq!(discovers(&mut h2, 1).await, Answer::Status(200), "the connections of others go on");
}

#[tokio::test]
async fn frames_that_move_no_request_on() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds).with(FEW_FRAMES)).await;
    let mut bystander = h2(&gateway).await;
    let mut before = refused(&gateway, "http2-abuse").await;
    for (what, frame) in [
        ("PING", Frame::ping(*b"annoying")),
        ("SETTINGS", Frame::settings(&[])),
        ("SETTINGS that change something", Frame::settings(&[(frames::INITIAL_WINDOW_SIZE, 70_000)])),
        ("PRIORITY", Frame::priority(1)),
        ("WINDOW_UPDATE of the connection", Frame::window_update(0, 1)),
        ("WINDOW_UPDATE of a stream", Frame::window_update(1, 1)),
        ("empty DATA", Frame::data(1, false, [0u8; 0])),
        ("PRIORITY_UPDATE, of RFC 9218", Frame::new(0x10, 0, 0, *b"\0\0\0\x01u=1")),
        ("unknown", Frame::new(0xfa, 0xff, 0, *b"who knows")),
    ] {
        let mut h2 = h2(&gateway).await;
        // For what is about a stream: one whose body has not ended.
        h2.send(&Frame::headers(1, false, &request("POST", "/group_operation"))).await.unwrap();
        h2.flood(&frame.encode().repeat(10), 2_000).await;
        assert!(h2.ended(PATIENCE).await.is_some(), "20000 times {what}");
        gateway.until_metric(&series("http2-abuse"), |n| n == before + 1.0).await;
        before += 1.0;
    }
    assert_eq!(ds.begun(), 0);
    assert_eq!(discovers(&mut bystander, 1).await, Answer::Status(200), "other connections are not touched");
    serves(&gateway, &ds).await;
    drop(bystander);
    gateway.until_metric("moh_gateway_requests_in_flight", |n| n == 0.0).await;
    all_are_gone(&gateway).await;
}

#[tokio::test]
async fn a_client_may_ask_whether_anybody_is_there() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds).with("[http2]\ncontrol_frames = \"100/s\"\ncontrol_burst = 20")).await;
    let mut h2 = h2(&gateway).await;
    // Three times the burst, and half of the rate.
    for n in 0..60u64 {
        h2.send(&Frame::ping(n.to_be_bytes())).await.unwrap();
        let answer = h2.until(|frame| frame.kind == frames::PING).await.expect("an answer, not an end");
        assert_eq!(answer, Frame::new(frames::PING, frames::ACK, 0, n.to_be_bytes()));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(discovers(&mut h2, 1).await, Answer::Status(200));
    assert_eq!(refused(&gateway, "http2-abuse").await, 0.0);
}

#[tokio::test]
async fn who_reads_and_writes_much_is_no_enemy() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup { timeouts: "", ..Setup::of(&ds) }.with(FEW_FRAMES)).await;
    const ALL: usize = 8 << 20;
    ds.set_response(200, &[], vec![7u8; ALL]);
    // Windows of 16 KiB, opened again with every frame that is read: more than a thousand WINDOW_UPDATEs.
    let stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["h2"], None).await.unwrap();
    let mut h2 = Connection::open(stream, &[(frames::INITIAL_WINDOW_SIZE, 16_384)]).await.unwrap();
    h2.post(1, "/group_operation", &send_message()).await.unwrap();
    let (mut read, mut updates) = (0, 0);
    loop {
        let frame = h2.until(|frame| frame.stream == 1).await;
        let frame = frame.unwrap_or_else(|| panic!("{h2:?} after {read} octets and {updates} updates"));
        assert_ne!(frame.kind, frames::RST_STREAM, "{:?}", frame.error_code());
        if frame.kind == frames::DATA {
            read += frame.payload.len();
        }
        if frame.ends_stream() {
            break;
        }
        if frame.kind == frames::DATA && !frame.payload.is_empty() {
            let increment = frame.payload.len() as u32;
            let both = [Frame::window_update(0, increment).encode(), Frame::window_update(1, increment).encode()];
            h2.write(&both.concat()).await.unwrap();
            updates += 2;
        }
    }
    assert_eq!(read, ALL);
    assert!(updates > 1_000, "{updates}");

    // An upload in thousands of small frames.
    ds.clear_response();
    let (client, body) = (gateway.peer(), large_message(4 << 20));
    let upload = client.begin(Method::POST, "/group_operation", &[], Some(body.len() as u64)).await.unwrap();
    for piece in body.chunks(1_024) {
        upload.write(piece.to_vec()).await.unwrap();
    }
    assert_eq!(upload.finish().await.unwrap().status, 200);
    assert!(ds.requests().pop().unwrap().body == body);

    // Bodies whose end comes in an empty frame of its own, as many clients send it.
    for (n, stream) in streams(3, 100).enumerate() {
        h2.send(&Frame::headers(stream, false, &request("POST", "/group_operation"))).await.unwrap();
        h2.send(&Frame::data(stream, false, message_in(b"g", n as u32))).await.unwrap();
        h2.send(&Frame::data(stream, true, [0u8; 0])).await.unwrap();
        assert_eq!(h2.answer(stream).await, Answer::Status(200), "number {n}");
    }
    assert_eq!(refused(&gateway, "http2-abuse").await, 0.0);
}

#[tokio::test]
async fn streams_over_their_number() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds).with("[http2]\nmax_streams = 5")).await;
    let mut h2 = h2(&gateway).await;
    assert_eq!(h2.setting(frames::MAX_CONCURRENT_STREAMS), Some(5));
    for stream in streams(1, 6) {
        h2.send(&Frame::headers(stream, false, &request("POST", "/group_operation"))).await.unwrap();
    }
    match h2.answer(11).await {
        Answer::Reset(code) => assert!([frames::REFUSED_STREAM, frames::PROTOCOL_ERROR].contains(&code), "{code}"),
        other => panic!("a sixth: {other:?}"),
    }
    // The five were not touched: their bodies do not come, and they are told so.
    assert_eq!(h2_answers(&mut h2, streams(1, 5).collect()).await, [408; 5]);
    let until = Instant::now() + PATIENCE;
    for stream in streams(13, 1_000) {
        match discovers(&mut h2, stream).await {
            Answer::Status(200) => break,
            other => assert!(Instant::now() < until, "there is no room again: {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(ds.begun(), 0);
}

/// The status of the answers to these requests, in whichever order they come.
async fn h2_answers(h2: &mut Connection, mut streams: Vec<u32>) -> Vec<u16> {
    let mut answers = vec![];
    while !streams.is_empty() {
        let frame = h2.until(|frame| frame.kind == frames::HEADERS).await.expect("an answer, not an end");
        streams.retain(|stream| *stream != frame.stream);
        answers.push(frame.status().unwrap());
    }
    answers
}

#[tokio::test]
async fn what_breaks_the_protocol_ends_its_connection() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let mut bystander = h2(&gateway).await;
    let head = Frame::headers(1, false, &request("POST", "/group_operation"));
    let cases: Vec<(&str, Vec<Frame>)> = vec![
        ("DATA on a stream that is not there", vec![Frame::data(1, false, *b"x")]),
        ("a stream of the server's", vec![Frame::headers(2, true, &request("GET", "/verification_key"))]),
        ("stream 0", vec![Frame::headers(0, true, &request("GET", "/verification_key"))]),
        ("a PING of seven octets", vec![Frame::new(frames::PING, 0, 0, *b"seven..")]),
        ("SETTINGS of five octets", vec![Frame::new(frames::SETTINGS, 0, 0, *b"five.")]),
        ("SETTINGS that nobody may have", vec![Frame::settings(&[(frames::INITIAL_WINDOW_SIZE, 1 << 31)])]),
        ("a window over 2^31 - 1", vec![Frame::window_update(0, (1 << 31) - 1)]),
        ("a frame larger than was agreed", vec![head.clone(), Frame::data(1, false, [0u8; 32 * 1024 + 1])]),
        ("another frame within a head", vec![Frame::headers_begun(1, [0u8; 1]), Frame::ping([0; 8])]),
        ("CONTINUATION of nothing", vec![head.clone(), Frame::continuation(1, true, [0u8; 0])]),
        ("what is no HPACK", vec![Frame::new(frames::HEADERS, frames::END_HEADERS, 1, [0xffu8; 20])]),
    ];
    for (what, sent) in cases {
        let mut h2 = h2(&gateway).await;
        let octets: Vec<u8> = sent.iter().flat_map(Frame::encode).collect();
        let _ = h2.write(&octets).await;
        let end = h2.ended(PATIENCE).await;
        assert!(end.is_some(), "{what}");
        assert_ne!(end.unwrap().goaway, Some(0), "{what}: it says why, if it says anything");
    }
    assert_eq!(ds.begun(), 0);
    assert_eq!(discovers(&mut bystander, 1).await, Answer::Status(200));
    serves(&gateway, &ds).await;
}
