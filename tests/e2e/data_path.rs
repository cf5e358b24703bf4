//! The way of a request and of its answer: from a client that hyper serves to a node that our own code asks, and back. What is
//! cut off, late, early, slow or silent on either side is seen as that on the other, and nothing is kept for it longer than its
//! time.

use crate::harness::{Gateway, Setup, ca, large_message, message_in, send_message};
use crate::support::client::{raw_tls, tls_config};
use crate::support::delivery;
use crate::support::ds::Ds;
use crate::support::frames::{Answer, Connection};
use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use http::Method;
use rustls::pki_types::ServerName;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// How long anything may take that is to happen at all.
const PATIENCE: Duration = Duration::from_secs(10);

/// The harness's times, and a second for connections that nothing is under way on.
const KEPT: &str = "headers = \"1s\"\nbody_idle = \"1s\"\nbody_total = \"3s\"\nshutdown = \"5s\"\nkeepalive = \"1s\"";

const IN_FLIGHT: &str = "moh_gateway_requests_in_flight";

async fn in_time<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.expect("it hangs")
}

/// Waits until something is so.
async fn becomes(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn pause(millis: u64) {
    tokio::time::sleep(Duration::from_millis(millis)).await;
}

/// Octets no two runs of which are alike.
fn octets(count: usize) -> Vec<u8> {
    (0..count).map(|n| (n % 251) as u8).collect()
}

/// A body of so many octets that is decided at once.
fn body_of(total: usize) -> Vec<u8> {
    let mut body = message_in(b"data path", 1);
    let more = total.saturating_sub(body.len());
    body.extend(octets(more));
    body
}

// === HTTP/1.1 by hand ===

async fn connect(gateway: &Gateway, alpn: &str) -> TlsStream<TcpStream> {
    raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &[alpn], None).await.unwrap()
}

fn head(more: &str) -> String {
    format!(
        "POST /group_operation HTTP/1.1\r\nHost: ds.b.example\r\nContent-Type: application/octet-stream\r\n{more}\r\n"
    )
}

/// A whole request.
fn posted(body: &[u8]) -> Vec<u8> {
    [head(&format!("Content-Length: {}\r\n", body.len())).as_bytes(), body].concat()
}

/// A field of a head; the first, where there are more.
fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// A message that came whole.
struct Heard {
    head: String,
    body: Vec<u8>,
}

impl Heard {
    /// Its status, of HTTP/1.1.
    fn status(&self) -> u16 {
        let Some(line) = self.head.strip_prefix("HTTP/1.1 ") else { panic!("no HTTP/1.1: {}", self.head) };
        line[..3].parse().unwrap()
    }
}

async fn read_line(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<String> {
    let mut line = vec![];
    while !line.ends_with(b"\r\n") {
        line.push(stream.read_u8().await?);
    }
    line.truncate(line.len() - 2);
    String::from_utf8(line).map_err(io::Error::other)
}

/// The head of a message, with the empty line after it.
async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<String> {
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    String::from_utf8(head).map_err(io::Error::other)
}

async fn read_length(stream: &mut (impl AsyncRead + Unpin), length: &str) -> io::Result<Vec<u8>> {
    let length = length.parse::<usize>().map_err(io::Error::other)?;
    let mut body = vec![0u8; length];
    stream.read_exact(&mut body).await?;
    Ok(body)
}

async fn read_chunks(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut body = vec![];
    loop {
        let line = read_line(stream).await?;
        let size = usize::from_str_radix(&line, 16).map_err(io::Error::other)?;
        if size == 0 {
            // Trailers, and the empty line.
            while !read_line(stream).await?.is_empty() {}
            return Ok(body);
        }
        let at = body.len();
        body.resize(at + size, 0u8);
        stream.read_exact(&mut body[at..]).await?;
        if !read_line(stream).await?.is_empty() {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

/// The next message of a connection. An error: it does not come, or not to its end.
async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Heard> {
    let head = read_head(stream).await?;
    let body = match field(&head, "content-length") {
        Some(length) => read_length(stream, length).await?,
        None => read_chunks(stream).await?,
    };
    Ok(Heard { head, body })
}

/// Reads to an end that is said: an error is one that is not (no `close_notify`).
async fn reads_to_end(stream: &mut (impl AsyncRead + Unpin), what: &str) {
    let mut more = vec![];
    let end = in_time(stream.read_to_end(&mut more)).await;
    assert!(matches!(end, Ok(0)), "{what}: {end:?}, {}", String::from_utf8_lossy(&more));
}

// === HTTP/2 by the h2 crate ===

/// A client whose streams have this window.
async fn h2_over(stream: TlsStream<TcpStream>, window: u32) -> SendRequest<Bytes> {
    let handshake = h2::client::Builder::new().initial_window_size(window).handshake::<_, Bytes>(stream);
    let (client, connection) = in_time(handshake).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The head of a request whose length is not said.
fn post() -> http::Request<()> {
    http::Request::post("https://ds.b.example/group_operation")
        .header("content-type", "application/octet-stream")
        .body(())
        .unwrap()
}

async fn ask(client: &SendRequest<Bytes>, body: Vec<u8>) -> ResponseFuture {
    let mut client = in_time(client.clone().ready()).await.unwrap();
    let (response, mut send) = client.send_request(post(), false).unwrap();
    send.send_data(Bytes::from(body), true).unwrap();
    response
}

// === Nodes by hand ===

/// A node that reads a request on each connection, says what it was told to, and closes.
struct Node {
    addr: SocketAddr,
    says: Arc<Mutex<Vec<u8>>>,
    connections: Arc<AtomicUsize>,
    closed: Arc<AtomicUsize>,
}

impl Node {
    async fn start(says: &str) -> Node {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let node = Node {
            addr: listener.local_addr().unwrap(),
            says: Arc::new(Mutex::new(says.as_bytes().to_vec())),
            connections: Arc::default(),
            closed: Arc::default(),
        };
        let (says, connections, closed) = (node.says.clone(), node.connections.clone(), node.closed.clone());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                connections.fetch_add(1, SeqCst);
                let (says, closed) = (says.clone(), closed.clone());
                tokio::spawn(async move {
                    // All of it, so that to close resets nothing.
                    if read_message(&mut stream).await.is_err() {
                        return;
                    }
                    let octets = says.lock().unwrap().clone();
                    let _ = stream.write_all(&octets).await;
                    drop(stream);
                    closed.fetch_add(1, SeqCst);
                });
            }
        });
        node
    }

    fn say(&self, says: &str) {
        *self.says.lock().unwrap() = says.as_bytes().to_vec();
    }

    fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }

    fn closed(&self) -> usize {
        self.closed.load(SeqCst)
    }
}

/// The body of a request to a node of h2c, which is not looked at.
async fn read_away(request: http::Request<h2::RecvStream>) {
    let mut body = request.into_body();
    while let Some(Ok(chunk)) = body.data().await {
        let _ = body.flow_control().release_capacity(chunk.len());
    }
}

/// A node of h2c that closes each connection without a word, a moment after it has answered one request on it. How many it took,
/// and how many it has closed.
async fn closing_h2c_node() -> (SocketAddr, Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (connections, closed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counts = (connections.clone(), closed.clone());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (connections, closed) = counts.clone();
            connections.fetch_add(1, SeqCst);
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                let Some(Ok((request, mut respond))) = connection.accept().await else { return };
                tokio::spawn(async move {
                    read_away(request).await;
                    let mut answer = respond.send_response(http::Response::new(()), false).unwrap();
                    answer.send_data(Bytes::from_static(b"ok"), true).unwrap();
                });
                let moment = Duration::from_millis(200);
                let _ = tokio::time::timeout(moment, poll_fn(|cx| connection.poll_closed(cx))).await;
                drop(connection);
                closed.fetch_add(1, SeqCst);
            });
        }
    });
    (address, connections, closed)
}

/// How long after the last octet of an answer its end comes.
const END_AFTER: Duration = Duration::from_millis(50);

/// A node of h2c whose answers end with an empty frame, a moment after all the octets of their length. How many it could end, and
/// how many were reset before.
async fn late_ending_node(body: Bytes) -> (SocketAddr, Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (ended, reset) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counts = (ended.clone(), reset.clone());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (body, counts) = (body.clone(), counts.clone());
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                while let Some(Ok((request, respond))) = connection.accept().await {
                    let (ended, reset) = counts.clone();
                    tokio::spawn(end_late(request, respond, body.clone(), ended, reset));
                }
            });
        }
    });
    (address, ended, reset)
}

async fn end_late(
    request: http::Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
    body: Bytes,
    ended: Arc<AtomicUsize>,
    reset: Arc<AtomicUsize>,
) {
    read_away(request).await;
    let head = http::Response::builder().header("content-length", body.len().to_string()).body(()).unwrap();
    let mut answer = respond.send_response(head, false).unwrap();
    answer.send_data(body, false).unwrap();
    let was_reset = tokio::time::timeout(END_AFTER, poll_fn(|cx| answer.poll_reset(cx))).await.is_ok();
    if was_reset || answer.send_data(Bytes::new(), true).is_err() {
        reset.fetch_add(1, SeqCst);
    } else {
        ended.fetch_add(1, SeqCst);
    }
}

/// A node that has had enough of a request after so many octets of its body: it answers, and closes.
async fn node_that_has_enough(enough: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                if read_head(&mut stream).await.is_err() || stream.read_exact(&mut vec![0u8; enough]).await.is_err() {
                    return;
                }
                let answer = "HTTP/1.1 413 Content Too Large\r\nContent-Length: 6\r\nConnection: close\r\n\r\nenough";
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    address
}

// === Connections that nothing is under way on ===

/// Whoever is silent from now on is left in a second, more or less, and is told.
async fn ends_in_a_second(stream: &mut (impl AsyncRead + Unpin), what: &str) {
    let began = Instant::now();
    reads_to_end(stream, what).await;
    let took = began.elapsed();
    assert!(took > Duration::from_millis(600), "{what}: it was not kept: {took:?}");
    assert!(took < Duration::from_secs(3), "{what}: it was kept for longer: {took:?}");
}

#[tokio::test]
async fn a_silent_connection_of_http1_is_kept_for_its_time_and_no_longer() {
    let ds = Ds::start().await;
    let setup = Setup { timeouts: KEPT, delivery: "read_timeout = \"5s\"", ..Setup::of(&ds) };
    let gateway = Gateway::start(setup).await;

    // It takes longer than a head may.
    ds.set_delay(Duration::from_millis(1_500));
    let mut slow = connect(&gateway, "http/1.1").await;
    let began = Instant::now();
    slow.write_all(&posted(&send_message())).await.unwrap();
    assert!(ds.until(|ds| ds.complete() == 1).await);
    ds.set_delay(Duration::ZERO);
    let after_a_slow_answer = async {
        assert_eq!(in_time(read_message(&mut slow)).await.unwrap().status(), 200);
        assert!(began.elapsed() > Duration::from_millis(1_400), "{:?}", began.elapsed());
        ends_in_a_second(&mut slow, "after a slow answer").await;
    };
    let after_a_quick_one = async {
        let mut quick = connect(&gateway, "http/1.1").await;
        quick.write_all(&posted(&send_message())).await.unwrap();
        assert_eq!(in_time(read_message(&mut quick)).await.unwrap().status(), 200);
        ends_in_a_second(&mut quick, "after a quick answer").await;
    };
    let after_a_slow_body = async {
        let mut dripping = connect(&gateway, "http/1.1").await;
        dripping.write_all(head("Content-Length: 400\r\n").as_bytes()).await.unwrap();
        for piece in large_message(400).chunks(100) {
            pause(400).await;
            dripping.write_all(piece).await.unwrap();
            dripping.flush().await.unwrap();
        }
        assert_eq!(in_time(read_message(&mut dripping)).await.unwrap().status(), 200);
        ends_in_a_second(&mut dripping, "after a slow body").await;
    };
    tokio::join!(after_a_slow_answer, after_a_quick_one, after_a_slow_body);
    assert_eq!(ds.complete(), 3);
}

/// The client says nothing more: neither a request, nor that it has seen a PING.
async fn is_left(client: &mut Connection, what: &str) {
    let began = Instant::now();
    let end = client.ended(Duration::from_secs(8)).await;
    let took = began.elapsed();
    let Some(end) = end else { panic!("{what}: it is still open after {took:?}") };
    assert!(took > Duration::from_millis(600), "{what}: it was not kept: {took:?}");
    assert_eq!(end.goaway, Some(0), "{what}: it is not told why");
}

#[tokio::test]
async fn a_silent_connection_of_http2_ends_though_it_acknowledges_nothing() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup { timeouts: KEPT, ..Setup::of(&ds) }).await;
    let without_a_request = async {
        let mut client = Connection::open(connect(&gateway, "h2").await, &[]).await.unwrap();
        is_left(&mut client, "without a request").await;
    };
    let after_a_request = async {
        let mut client = Connection::open(connect(&gateway, "h2").await, &[]).await.unwrap();
        client.post(1, "/group_operation", &send_message()).await.unwrap();
        assert_eq!(client.answer(1).await, Answer::Status(200));
        is_left(&mut client, "after a request").await;
    };
    tokio::join!(without_a_request, after_a_request);
    gateway.until_metric("moh_gateway_connections", |n| n == 0.0).await;
}

// === Clients ===

/// A request whose answer is one octet, which every window has room for.
async fn is_answered_an_octet(client: &SendRequest<Bytes>) {
    let response = in_time(ask(client, send_message()).await).await.unwrap();
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    let mut got = vec![];
    while let Some(chunk) = in_time(body.data()).await {
        got.extend_from_slice(&chunk.unwrap());
    }
    assert_eq!(got, b"x");
}

#[tokio::test]
async fn a_window_that_is_never_opened_ends_its_own_stream() {
    // One comes from the node in several pieces, and one is there at once.
    for answer in [40_000, 10_000] {
        a_window_is_never_opened(answer).await;
    }
}

async fn a_window_is_never_opened(answer: usize) {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    ds.set_response(200, &[], octets(answer));
    let client = h2_over(connect(&gateway, "h2").await, 1).await;
    let began = Instant::now();
    let large = in_time(ask(&client, send_message()).await).await.unwrap();
    assert_eq!(large.status(), 200);
    let mut large = large.into_body();
    let first = in_time(large.data()).await;
    assert!(matches!(&first, Some(Ok(octet)) if octet.len() == 1), "{first:?}");

    ds.set_response(200, &[], "x");
    is_answered_an_octet(&client).await;
    gateway.until_metric(IN_FLIGHT, |n| n == 1.0).await;

    let end = in_time(large.data()).await;
    let took = began.elapsed();
    assert!(matches!(&end, Some(Err(e)) if e.is_reset() && e.is_remote()), "{end:?}");
    assert!(took > Duration::from_millis(2_500), "it had its time: {took:?}");
    assert!(took < Duration::from_secs(5), "it is held for {took:?}");
    gateway.until_metric(IN_FLIGHT, |n| n == 0.0).await;

    // Nothing else on the connection is ended with it.
    is_answered_an_octet(&client).await;
    let lines = gateway.access_log(3).await;
    let decisions: Vec<&str> = lines.iter().map(|line| line["decision"].as_str().unwrap()).collect();
    assert_eq!(decisions, ["forwarded", "aborted", "forwarded"]);
}

#[tokio::test]
async fn a_window_that_is_opened_by_an_octet_at_a_time_is_not_waited_for_without_end() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    ds.set_response(200, &[], octets(10_000));
    let client = h2_over(connect(&gateway, "h2").await, 1).await;
    let began = Instant::now();
    let mut body = in_time(ask(&client, send_message()).await).await.unwrap().into_body();
    let end = loop {
        match in_time(body.data()).await {
            Some(Ok(octet)) => body.flow_control().release_capacity(octet.len()).unwrap(),
            end => break end,
        }
        pause(100).await;
        assert!(began.elapsed() < Duration::from_secs(6), "it is held as long as its client likes");
    };
    assert!(matches!(&end, Some(Err(e)) if e.is_reset() && e.is_remote()), "{end:?}");
    gateway.until_metric(IN_FLIGHT, |n| n == 0.0).await;
    assert_eq!(gateway.access_log(1).await[0]["decision"], "aborted");
}

#[tokio::test]
async fn an_upload_that_its_client_resets_is_never_a_whole_one() {
    for h2c in [false, true] {
        for reason in [h2::Reason::NO_ERROR, h2::Reason::CANCEL] {
            let what = format!("{reason:?}, h2c: {h2c}");
            let ds = Ds::start().await;
            let setup = Setup::of(&ds);
            let gateway = Gateway::start(if h2c { setup.h2c() } else { setup }).await;
            let client = h2_over(connect(&gateway, "h2").await, 1 << 16).await;
            let mut client = in_time(client.ready()).await.unwrap();
            let (_response, mut body) = client.send_request(post(), false).unwrap();
            body.send_data(Bytes::from(large_message(500)), false).unwrap();
            assert!(ds.until(|ds| ds.body_bytes_seen() >= 500).await, "{what}: it is not on its way");
            body.send_reset(reason);
            assert!(ds.until(|ds| ds.broken() + ds.complete() > 0).await, "{what}: the DS is left waiting");
            gateway.until_metric(IN_FLIGHT, |n| n == 0.0).await;
            pause(200).await;
            assert_eq!((ds.begun(), ds.broken(), ds.complete()), (1, 1, 0), "{what}: begun, broken, complete");
            assert_ne!(gateway.access_log(1).await[0]["decision"], "forwarded", "{what}");
        }
    }
}

#[tokio::test]
async fn two_requests_in_one_write_are_answered_in_order() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let mut stream = connect(&gateway, "http/1.1").await;
    let (first, second) = (message_in(b"pipeline", 1), message_in(b"pipeline", 2));
    stream.write_all(&[posted(&first), posted(&second)].concat()).await.unwrap();
    stream.flush().await.unwrap();
    for n in 1..=2u64 {
        let heard = in_time(read_message(&mut stream)).await.unwrap();
        assert_eq!(heard.status(), 200, "{}", heard.head);
        // The DS says how many messages the group has then.
        let answer = delivery::Answer::decode(&heard.body).unwrap();
        assert_eq!(answer.payload, n.to_be_bytes());
    }
    pause(100).await;
    let bodies: Vec<Vec<u8>> = ds.requests().into_iter().map(|request| request.body).collect();
    assert!(bodies == [first, second], "each once, in order: {} requests", bodies.len());
    assert_eq!(ds.begun(), 2);
}

#[tokio::test]
async fn a_body_in_ten_pieces_arrives_octet_for_octet() {
    for h2c in [false, true] {
        let ds = Ds::start().await;
        let setup = Setup::of(&ds);
        let gateway = Gateway::start(if h2c { setup.h2c() } else { setup }).await;

        let body = body_of(10_000);
        let mut stream = connect(&gateway, "http/1.1").await;
        stream.write_all(head("Content-Length: 10000\r\n").as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        for piece in body.chunks(1_000) {
            pause(20).await;
            stream.write_all(piece).await.unwrap();
            stream.flush().await.unwrap();
        }
        assert_eq!(in_time(read_message(&mut stream)).await.unwrap().status(), 200);
        assert!(ds.requests()[0].body == body, "with a length, h2c: {h2c}");

        // On the same connection.
        let body = body_of(20_000);
        stream.write_all(head("Transfer-Encoding: chunked\r\n").as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        for piece in body.chunks(2_000) {
            pause(20).await;
            let chunk = [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat();
            stream.write_all(&chunk).await.unwrap();
            stream.flush().await.unwrap();
        }
        stream.write_all(b"0\r\n\r\n").await.unwrap();
        stream.flush().await.unwrap();
        assert_eq!(in_time(read_message(&mut stream)).await.unwrap().status(), 200);
        assert!(ds.requests()[1].body == body, "chunked, h2c: {h2c}");

        let body = body_of(30_000);
        let client = h2_over(connect(&gateway, "h2").await, 1 << 16).await;
        let mut client = in_time(client.ready()).await.unwrap();
        let (response, mut send) = client.send_request(post(), false).unwrap();
        for (n, piece) in body.chunks(3_000).enumerate() {
            pause(20).await;
            send.send_data(Bytes::copy_from_slice(piece), n == 9).unwrap();
        }
        assert_eq!(in_time(response).await.unwrap().status(), 200);
        assert!(ds.requests()[2].body == body, "frames, h2c: {h2c}");
        assert_eq!((ds.begun(), ds.complete(), ds.broken()), (3, 3, 0));
    }
}

#[tokio::test]
async fn who_offers_an_upgrade_is_answered_and_told_the_end() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup { timeouts: KEPT, ..Setup::of(&ds) }).await;
    let body = send_message();
    let fields = format!("Content-Length: {}\r\nConnection: upgrade\r\nUpgrade: x\r\n", body.len());
    let mut stream = connect(&gateway, "http/1.1").await;
    stream.write_all(&[head(&fields).as_bytes(), &body].concat()).await.unwrap();
    let heard = in_time(read_message(&mut stream)).await.unwrap();
    assert_eq!(heard.status(), 200, "{}", heard.head);
    reads_to_end(&mut stream, "an end without close_notify").await;
    let requests = ds.requests();
    assert_eq!(requests.len(), 1);
    assert!(requests[0].body == body && !requests[0].headers.contains_key("upgrade"));
}

// === Nodes ===

#[tokio::test]
async fn an_answer_whose_end_comes_late_is_whole_and_not_reset() {
    const TIMES: usize = 20;
    let body = Bytes::from(octets(1_000));
    let (address, ended, reset) = late_ending_node(body.clone()).await;
    let gateway = Gateway::start(Setup::of_nodes(&[address]).h2c()).await;
    let client = gateway.peer().http1();
    for n in 0..TIMES {
        let response = client.send(Method::POST, "/group_operation", send_message()).await.unwrap();
        assert_eq!(response.status, 200, "{}", response.text());
        assert!(response.body == body, "the {n}th: {} octets", response.body.len());
    }
    becomes("the node is done with all", || ended.load(SeqCst) + reset.load(SeqCst) == TIMES).await;
    assert_eq!((ended.load(SeqCst), reset.load(SeqCst)), (TIMES, 0), "ended, and reset");
    let lines = gateway.access_log(TIMES).await;
    assert_eq!(lines.len(), TIMES);
    assert!(lines.iter().all(|line| line["decision"] == "forwarded" && line["body_out"] == 1_000), "{lines:?}");
    assert_eq!(client.connections(), 1, "none was the end of its connection");
}

#[tokio::test]
async fn a_node_of_http_1_0_is_answered_for_as_http_1_1() {
    let node = Node::start("HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
    let gateway = Gateway::start(Setup::of_nodes(&[node.addr])).await;
    let mut stream = connect(&gateway, "http/1.1").await;
    for n in 1..=2 {
        stream.write_all(&posted(&send_message())).await.unwrap();
        let heard = in_time(read_message(&mut stream)).await.unwrap();
        assert!(heard.head.starts_with("HTTP/1.1 200 "), "the {n}th: {}", heard.head);
        assert_eq!(heard.body, b"ok");
        assert_ne!(field(&heard.head, "connection"), Some("close"), "{}", heard.head);
    }
    assert_eq!(node.connections(), 2);
}

#[tokio::test]
async fn what_a_node_says_is_passed_on_whole_or_seen_to_be_broken() {
    const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let node = Node::start("").await;
    // It is asked again, however often it fails.
    let setup = Setup { delivery: "read_timeout = \"2s\"\neject_after = 100", ..Setup::of_nodes(&[node.addr]) };
    let gateway = Gateway::start(setup).await;
    let ask = async |http1: bool| {
        // One whose answer is cut off is the end of its connection.
        let client = if http1 { gateway.peer().http1() } else { gateway.peer().http2() };
        client.send(Method::POST, "/group_operation", send_message()).await
    };

    let with_a_trailer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n\
                          3\r\nabc\r\n2\r\nde\r\n0\r\nx-sum: 5\r\n\r\n";
    let after_hints = "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde";
    for says in [with_a_trailer, after_hints] {
        node.say(says);
        for http1 in [true, false] {
            let response = ask(http1).await.unwrap();
            assert_eq!((response.status.as_u16(), response.text().as_str()), (200, "abcde"), "{says}");
        }
    }

    let bad_heads = [
        "HTTP/1.1 200 OK\r\nContent-Length: 3, 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Len",
        "",
    ];
    let bad_bodies = [
        format!("{CHUNKED}zz\r\nabc\r\n0\r\n\r\n"),
        format!("{CHUNKED}3\r\nabc\r\nzz\r\nabc\r\n0\r\n\r\n"),
        format!("{CHUNKED}3\r\nabcd\r\n0\r\n\r\n"),
        format!("{CHUNKED}5\r\nabc"),
        format!("{CHUNKED}3\r\nabc\r\n"),
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc".to_owned(),
    ];
    let bad_heads = bad_heads.iter().map(|says| (*says, true));
    for (says, is_told) in bad_heads.chain(bad_bodies.iter().map(|says| (says.as_str(), false))) {
        node.say(says);
        for http1 in [true, false] {
            match ask(http1).await {
                Ok(response) => {
                    assert_eq!(response.status, 502, "HTTP/1.1: {http1}, {says:?}: {}", response.text());
                    assert_eq!(response.header("content-type"), Some("application/problem+json"));
                    assert_eq!(response.json()["status"], 502);
                }
                Err(error) => {
                    assert!(!is_told, "HTTP/1.1: {http1}, {says:?}: {error}");
                    assert!(!error.to_string().contains("in time"), "HTTP/1.1: {http1}, {says:?}: it hangs");
                }
            }
        }
    }

    node.say(after_hints);
    for http1 in [true, false] {
        assert_eq!(ask(http1).await.unwrap().status, 200, "what was broken breaks nothing else");
    }
    gateway.until_metric(IN_FLIGHT, |n| n == 0.0).await;
}

#[tokio::test]
async fn a_connection_that_its_node_has_closed_is_not_used_again() {
    const TIMES: usize = 4;
    let node = Node::start("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    let gateway = Gateway::start(Setup::of_nodes(&[node.addr])).await;
    let client = gateway.peer();
    for n in 1..=TIMES {
        let response = client.send(Method::POST, "/group_operation", send_message()).await.unwrap();
        assert_eq!((response.status.as_u16(), response.text().as_str()), (200, "ok"), "the {n}th");
        becomes("it closes", || node.closed() == n).await;
        pause(100).await;
    }
    assert_eq!(node.connections(), TIMES);

    let (address, connections, closed) = closing_h2c_node().await;
    let gateway = Gateway::start(Setup::of_nodes(&[address]).h2c()).await;
    let client = gateway.peer();
    for n in 1..=TIMES {
        let response = client.send(Method::POST, "/group_operation", send_message()).await.unwrap();
        assert_eq!((response.status.as_u16(), response.text().as_str()), (200, "ok"), "the {n}th, h2c");
        becomes("it closes", || closed.load(SeqCst) == n).await;
        pause(100).await;
    }
    assert_eq!(connections.load(SeqCst), TIMES);
}

#[tokio::test]
async fn an_answer_that_comes_before_its_request_is_in() {
    const ALL: usize = 1 << 20;
    let address = node_that_has_enough(500).await;
    let gateway = Gateway::start(Setup::of_nodes(&[address])).await;
    let body = body_of(ALL);
    for goes_on in [false, true] {
        let (mut read, mut write) = tokio::io::split(connect(&gateway, "http/1.1").await);
        let request = posted(&body);
        let begun = request.len() - ALL + 500;
        write.write_all(&request[..begun]).await.unwrap();
        write.flush().await.unwrap();
        let writer = tokio::spawn(async move {
            if goes_on {
                let _ = write.write_all(&request[begun..]).await;
                let _ = write.flush().await;
            }
            // Its side stays open.
            pause(8_000).await;
            drop(write);
        });
        let heard = in_time(read_message(&mut read)).await.unwrap();
        assert_eq!(heard.status(), 413, "goes on: {goes_on}: {}", heard.head);
        assert_eq!(heard.body, b"enough");
        match field(&heard.head, "connection") {
            Some("close") => reads_to_end(&mut read, "it is not told the end").await,
            // All of it was taken before the node's answer was seen: another request may follow.
            other => assert!(goes_on && other.is_none(), "goes on: {goes_on}: {}", heard.head),
        }
        writer.abort();
    }
    let lines = gateway.access_log(2).await;
    assert_eq!(lines.len(), 2);
    assert!(lines.iter().all(|line| line["decision"] == "forwarded" && line["status"] == 413), "{lines:?}");
}

// === Large answers ===

/// More than sockets hold.
const LARGE: usize = 8 << 20;

/// What a slow client reads at once.
const STEP: usize = 64 << 10;

/// A connection whose client's socket holds little: what is not read cannot be written.
async fn connect_narrowly(gateway: &Gateway, alpn: &str) -> TlsStream<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4 * STEP as u32).unwrap();
    let stream = socket.connect(gateway.addr).await.unwrap();
    let connector = TlsConnector::from(Arc::new(tls_config(Some(&ca().pem()), &[alpn], None)));
    let name = ServerName::try_from("ds.b.example").unwrap();
    in_time(connector.connect(name, stream)).await.unwrap()
}

#[tokio::test]
async fn a_large_answer_to_a_slow_reader_takes_no_memory() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let large = octets(LARGE);
    // What a connection and its buffers take is there already; as for an answer of this size, it is not.
    ds.set_response(200, &[], octets(2 * STEP));
    for _ in 0..3 {
        for client in [gateway.peer().http1(), gateway.peer().http2()] {
            let response = client.send(Method::POST, "/group_operation", send_message()).await.unwrap();
            assert_eq!((response.status.as_u16(), response.body.len()), (200, 2 * STEP));
        }
    }
    ds.set_response(200, &[], large.clone());

    let before = gateway.resident();
    let mut peak = before;
    let mut stream = connect_narrowly(&gateway, "http/1.1").await;
    stream.write_all(&posted(&send_message())).await.unwrap();
    let head = in_time(read_head(&mut stream)).await.unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert_eq!(field(&head, "content-length"), Some(LARGE.to_string().as_str()), "{head}");
    let mut piece = vec![0u8; STEP];
    for (n, expected) in large.chunks(STEP).enumerate() {
        in_time(stream.read_exact(&mut piece)).await.unwrap();
        assert!(piece[..] == *expected, "over HTTP/1.1, the {n}th piece");
        peak = peak.max(gateway.resident());
        pause(20).await;
    }
    // It is over: the next one is answered.
    ds.set_response(200, &[], "x");
    stream.write_all(&posted(&send_message())).await.unwrap();
    assert_eq!(in_time(read_message(&mut stream)).await.unwrap().body, b"x");
    drop(stream);
    let grown = peak.saturating_sub(before) / 1024;
    assert!(grown <= 2 * 1024, "{grown} KiB over HTTP/1.1");

    ds.set_response(200, &[], large.clone());
    let before = gateway.resident();
    let mut peak = before;
    let client = h2_over(connect_narrowly(&gateway, "h2").await, STEP as u32).await;
    let response = in_time(ask(&client, send_message()).await).await.unwrap();
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    let (mut got, mut next) = (0, STEP);
    while let Some(chunk) = in_time(body.data()).await {
        let chunk = chunk.unwrap();
        assert!(large.get(got..got + chunk.len()) == Some(&chunk[..]), "over HTTP/2, after {got} octets");
        got += chunk.len();
        if got >= next {
            next += STEP;
            peak = peak.max(gateway.resident());
            pause(20).await;
        }
        body.flow_control().release_capacity(chunk.len()).unwrap();
    }
    assert_eq!(got, LARGE);
    let grown = peak.saturating_sub(before) / 1024;
    assert!(grown <= 2 * 1024, "{grown} KiB over HTTP/2");
    gateway.until_metric(IN_FLIGHT, |n| n == 0.0).await;
    assert!(gateway.access_log(9).await.iter().all(|line| line["decision"] == "forwarded"));
}
