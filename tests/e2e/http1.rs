//! HTTP/1.1 as RFC 9110 and RFC 9112 have it, in octets written by hand: what is a request and where it ends, what is
//! none, and what an answer has.

use crate::harness::{Gateway, Setup, ca, message_in};
use crate::support::client::raw_tls;
use crate::support::delivery;
use crate::support::ds::Ds;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;

const PATIENCE: Duration = Duration::from_secs(10);

const IN_FLIGHT: &str = "moh_gateway_requests_in_flight";

async fn in_time<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.expect("it hangs")
}

async fn pause(millis: u64) {
    tokio::time::sleep(Duration::from_millis(millis)).await;
}

async fn start() -> (Ds, Gateway) {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    (ds, gateway)
}

async fn write(stream: &mut TlsStream<TcpStream>, octets: &[u8]) {
    in_time(stream.write_all(octets)).await.unwrap();
    in_time(stream.flush()).await.unwrap();
}

/// A connection on which this is written.
async fn open(gateway: &Gateway, octets: &[u8]) -> TlsStream<TcpStream> {
    let mut stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["http/1.1"], None).await.unwrap();
    write(&mut stream, octets).await;
    stream
}

// === Requests ===

fn head(more: &str) -> String {
    format!(
        "POST /group_operation HTTP/1.1\r\nHost: ds.b.example\r\nContent-Type: application/octet-stream\r\n{more}\r\n"
    )
}

/// A request that the gateway answers itself.
fn get(more: &str) -> String {
    format!("GET /.well-known/mimi/ds-domain HTTP/1.1\r\nHost: ds.b.example\r\n{more}\r\n")
}

/// The `n`th body, of this length at least.
fn body(n: u32, length: usize) -> Vec<u8> {
    let mut body = message_in(b"http1", n);
    body.resize(body.len().max(length), 7);
    body
}

fn posted(body: &[u8]) -> Vec<u8> {
    [head(&format!("Content-Length: {}\r\n", body.len())).as_bytes(), body].concat()
}

/// In chunks of so many octets, and the last chunk.
fn chunks(body: &[u8], size: usize) -> Vec<u8> {
    let chunk = |data: &[u8]| [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat();
    let mut octets: Vec<u8> = body.chunks(size).flat_map(chunk).collect();
    octets.extend(b"0\r\n\r\n");
    octets
}

fn chunked(chunks: &[u8]) -> Vec<u8> {
    [head("Transfer-Encoding: chunked\r\n").as_bytes(), chunks].concat()
}

/// The bodies that a DS got, in order.
fn bodies(ds: &Ds) -> Vec<Vec<u8>> {
    ds.requests().into_iter().map(|request| request.body).collect()
}

// === Answers ===

struct Heard {
    head: String,
    body: Vec<u8>,
    /// With the empty line after them.
    trailers: String,
}

impl Heard {
    fn status(&self) -> u16 {
        assert!(self.head.starts_with("HTTP/1."), "{}", self.head);
        self.head[9..12].parse().unwrap()
    }

    fn closes(&self) -> bool {
        fields(&self.head, "connection") == ["close"]
    }
}

/// The values of a field, in order.
fn fields<'a>(head: &'a str, name: &str) -> Vec<&'a str> {
    let all = head.lines().filter_map(|line| line.split_once(':'));
    all.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).collect()
}

async fn read_until(stream: &mut (impl AsyncRead + Unpin), end: &str) -> io::Result<String> {
    let mut octets: Vec<u8> = vec![];
    while !octets.ends_with(end.as_bytes()) {
        octets.push(stream.read_u8().await?);
    }
    String::from_utf8(octets).map_err(io::Error::other)
}

/// The next message of a connection. An error: it does not come, or not to its end, or is framed in no way or in two.
async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Heard> {
    let head = read_until(stream, "\r\n\r\n").await?;
    let (mut body, mut trailers): (Vec<u8>, String) = Default::default();
    let bodiless = ["HTTP/1.1 1", "HTTP/1.1 204", "HTTP/1.1 304"].iter().any(|line| head.starts_with(line));
    match (&fields(&head, "content-length")[..], &fields(&head, "transfer-encoding")[..]) {
        _ if bodiless => {}
        ([length], []) => {
            body.resize(length.parse::<usize>().map_err(io::Error::other)?, 0);
            stream.read_exact(&mut body).await?;
        }
        ([], ["chunked"]) => loop {
            let line = read_until(stream, "\r\n").await?;
            let size = usize::from_str_radix(line.trim_end(), 16).map_err(io::Error::other)?;
            if size == 0 {
                while trailers != "\r\n" && !trailers.ends_with("\r\n\r\n") {
                    trailers += &read_until(stream, "\r\n").await?;
                }
                break;
            }
            let at = body.len();
            body.resize(at + size, 0);
            stream.read_exact(&mut body[at..]).await?;
            if stream.read_u16().await? != u16::from_be_bytes(*b"\r\n") {
                return Err(io::Error::other("no end of a chunk"));
            }
        },
        framings => return Err(io::Error::other(format!("{framings:?}: {head}"))),
    }
    Ok(Heard { head, body, trailers })
}

/// The next answer. Each has a date (RFC 9110 §6.6.1), once and in the one form that may be sent (§5.6.7).
async fn answer(stream: &mut (impl AsyncRead + Unpin), what: &str) -> Heard {
    let heard = in_time(read_message(stream)).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    let dates = fields(&heard.head, "date");
    assert_eq!(dates.len(), 1, "{what}: {}", heard.head);
    assert_eq!(httpdate::fmt_http_date(httpdate::parse_http_date(dates[0]).unwrap()), dates[0], "{what}");
    heard
}

async fn answered(stream: &mut (impl AsyncRead + Unpin), statuses: &[u16], what: &str) -> Vec<Heard> {
    let mut all = vec![];
    for (n, status) in statuses.iter().enumerate() {
        let heard = answer(stream, &format!("{what}, the {n}th answer")).await;
        assert_eq!(heard.status(), *status, "{what}, the {n}th answer: {}", heard.head);
        all.push(heard);
    }
    all
}

/// Of a DS that says how many messages the group has then, from its first.
fn are_in_order(all: &[Heard]) {
    for (n, heard) in (1u64..).zip(all) {
        assert_eq!(delivery::Answer::decode(&heard.body).unwrap().payload, n.to_be_bytes());
    }
}

/// Nothing comes but an end that is said: one without `close_notify` is an error.
async fn ends(stream: &mut (impl AsyncRead + Unpin), what: &str) {
    let mut more = vec![];
    let end = in_time(stream.read_to_end(&mut more)).await;
    assert!(matches!(end, Ok(0)), "{what}: {end:?}, {}", String::from_utf8_lossy(&more));
}

fn is_refused(heard: &Heard, statuses: &[u16], what: &str) {
    assert!(statuses.contains(&heard.status()), "{what}: {}", heard.head);
    assert_eq!(fields(&heard.head, "content-type"), ["application/problem+json"], "{what}");
    let document: serde_json::Value = serde_json::from_slice(&heard.body).unwrap();
    assert_eq!(document["status"], heard.status(), "{what}");
}

/// These octets, and a request behind them that is none any more: one refusal, whole, and the end.
async fn refused(gateway: &Gateway, octets: impl AsRef<[u8]>, statuses: &[u16]) {
    let octets = octets.as_ref();
    let what = format!("{:?}", String::from_utf8_lossy(&octets[..octets.len().min(300)]));
    let mut stream = open(gateway, b"").await;
    // It may be over before all of it is written.
    let _ = in_time(stream.write_all(&[octets, &posted(&body(0, 0))].concat())).await;
    let _ = in_time(stream.flush()).await;
    let heard = answer(&mut stream, &what).await;
    is_refused(&heard, statuses, &what);
    assert!(heard.closes(), "{what}: {}", heard.head);
    ends(&mut stream, &what).await;
}

// === Nodes by hand ===

/// What comes of a stream, with a pause after each 64 KiB.
fn slowly(mut from: impl AsyncRead + Send + Unpin + 'static, millis: u64) -> DuplexStream {
    let (read, mut write) = tokio::io::duplex(64 << 10);
    tokio::spawn(async move {
        while let Ok(1..) = tokio::io::copy(&mut (&mut from).take(64 << 10), &mut write).await {
            pause(millis).await;
        }
    });
    read
}

/// A node that keeps what it was sent and says what it is told to. It closes where that has `connection: close`.
struct Node {
    says: Arc<Mutex<Vec<u8>>>,
    heard: Arc<Mutex<Vec<Heard>>>,
}

impl Node {
    /// With a gateway in front of it. It waits so long after each 64 KiB that it reads.
    async fn start(millis: u64) -> (Node, Gateway) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let setup = Setup::of_nodes(&[listener.local_addr().unwrap()]);
        let gateway = Gateway::start(Setup { timeouts: "", ..setup }).await;
        let node = Node { says: Arc::default(), heard: Arc::default() };
        let (says, heard) = (node.says.clone(), node.heard.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (says, heard) = (says.clone(), heard.clone());
                tokio::spawn(async move {
                    let (read, mut write) = stream.into_split();
                    let mut read = slowly(read, millis);
                    while let Ok(message) = read_message(&mut read).await {
                        heard.lock().unwrap().push(message);
                        let octets = says.lock().unwrap().clone();
                        let closes = octets.windows(17).take(1_000).any(|part| part == b"connection: close");
                        if write.write_all(&octets).await.is_err() || closes {
                            return;
                        }
                    }
                });
            }
        });
        (node, gateway)
    }

    fn say(&self, octets: impl AsRef<[u8]>) {
        *self.says.lock().unwrap() = octets.as_ref().to_vec();
    }

    /// The last request.
    fn last(&self) -> Heard {
        self.heard.lock().unwrap().pop().unwrap()
    }
}

// === Where a request begins and ends ===

#[tokio::test]
async fn a_request_may_be_cut_after_any_octet() {
    let (ds, gateway) = start().await;
    let both = [body(1, 0), body(2, 0)];
    let size = format!("{:X};x=\"y;\"\r\n", both[0].len());
    let first = [size.as_bytes(), &both[0], b"\r\n0\r\nX-Trailer: z\r\n\r\n"].concat();
    let octets = [&b"\r\n"[..], &chunked(&first), &posted(&both[1])].concat();
    let mut stream = open(&gateway, b"").await;
    for cut in 1..=octets.len() {
        write(&mut stream, &octets[..cut]).await;
        pause(1).await;
        write(&mut stream, &octets[cut..]).await;
        answered(&mut stream, &[200, 200], &format!("cut after {cut}")).await;
    }
    for octet in &octets {
        write(&mut stream, &[*octet]).await;
        tokio::task::yield_now().await;
    }
    answered(&mut stream, &[200, 200], "octet by octet").await;
    let got = bodies(&ds);
    assert_eq!((got.len(), ds.begun()), (2 * (octets.len() + 1), got.len()));
    assert!(got.chunks(2).all(|pair| *pair == both));
}

#[tokio::test]
async fn requests_in_one_write_are_answered_in_order() {
    for (count, length) in [(50, 0), (20, 5_000)] {
        let (ds, gateway) = start().await;
        let sent: Vec<Vec<u8>> = (0..count).map(|n| body(n, length)).collect();
        let request = |body: &Vec<u8>| [posted(body), chunked(&chunks(body, 999))].concat();
        let octets: Vec<u8> = sent.iter().flat_map(request).collect();
        let mut stream = open(&gateway, &octets).await;
        are_in_order(&answered(&mut stream, &vec![200; 2 * sent.len()], "in one write").await);
        let got = bodies(&ds);
        assert_eq!(got.len(), 2 * sent.len());
        assert!(got.chunks(2).zip(&sent).all(|(pair, sent)| pair[0] == *sent && pair[1] == *sent));
    }
}

#[tokio::test]
async fn what_follows_a_refused_request_that_is_all_there_is_the_next() {
    let (ds, gateway) = start().await;
    let nowhere = head("Content-Length: 4\r\n").replace("/group_operation", "/nope");
    let cases = [
        posted(b"\0\x09\0\0"),
        posted(&posted(&body(99, 0))),
        chunked(&chunks(b"\0\x09\0\0", 3)),
        chunked(b"0\r\n\r\n"),
        [nowhere.as_bytes(), b"\r\n\r\n"].concat(),
        // Without a length there is no body (RFC 9112 §6.3).
        head("").into_bytes(),
        head("Content-Length: 0\r\n").into_bytes(),
    ];
    let mut stream = open(&gateway, b"").await;
    for refused in &cases {
        let what = String::from_utf8_lossy(refused);
        write(&mut stream, &[&refused[..], &posted(&body(1, 0))].concat()).await;
        let heard = answer(&mut stream, &what).await;
        is_refused(&heard, &[400, 404], &what);
        assert!(!heard.closes(), "{what}: {}", heard.head);
        answered(&mut stream, &[200], &what).await;
    }
    assert_eq!(ds.begun(), cases.len());
    assert!(bodies(&ds).iter().all(|got| *got == body(1, 0)));
}

#[tokio::test]
async fn a_request_is_taken_while_another_is_not_answered_yet() {
    let (ds, gateway) = start().await;
    let third = posted(&body(3, 0));
    let (begun, rest) = third.split_at(third.len() - 20);
    ds.hang(true);
    let mut stream = open(&gateway, &posted(&body(1, 0))).await;
    assert!(ds.until(|ds| ds.complete() == 1).await);
    write(&mut stream, &posted(&body(2, 0))).await;
    pause(20).await;
    write(&mut stream, begun).await;
    pause(50).await;
    assert_eq!(ds.begun(), 1, "what is not safe is not done at once with another (RFC 9112 §9.3.2)");
    ds.hang(false);
    let mut all = answered(&mut stream, &[200, 200], "early").await;
    write(&mut stream, rest).await;
    all.extend(answered(&mut stream, &[200], "the rest").await);
    are_in_order(&all);
    assert!(bodies(&ds) == [body(1, 0), body(2, 0), body(3, 0)]);
}

/// In pieces of any length.
fn cut<'a>(rng: &mut StdRng, mut rest: &'a [u8]) -> Vec<&'a [u8]> {
    let most = rest.len() / rng.random_range(1..=40usize) + 1;
    let mut pieces = vec![];
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rng.random_range(1..=most).min(rest.len()));
        pieces.push(piece);
        rest = after;
    }
    pieces
}

#[tokio::test]
async fn requests_at_random_are_what_was_sent() {
    let (ds, gateway) = start().await;
    let mut rng = StdRng::seed_from_u64(9112);
    let (mut sent, mut heard) = (vec![], vec![]);
    for sequence in 0..100 {
        let mut stream = open(&gateway, b"").await;
        for depth in [1, 2, 3, rng.random_range(4..8usize)] {
            let mut octets: Vec<u8> = vec![];
            for _ in 0..depth {
                let length = [100, 1_000, 30_000][rng.random_range(0..3usize)];
                let mut body = body(sent.len() as u32, rng.random_range(0..length));
                rng.fill(body.get_mut(100..).unwrap_or_default());
                body.iter_mut().skip(100).for_each(|octet| *octet = b"\r\n0aP:;\0"[usize::from(*octet % 8)]);
                octets.extend("\r\n".repeat(rng.random_range(0..2usize)).bytes());
                if rng.random_bool(0.5) {
                    octets.extend(posted(&body));
                } else {
                    octets.extend(chunked(b""));
                    for data in cut(&mut rng, &body) {
                        let zeros = "0".repeat(rng.random_range(0..4usize));
                        let extension = ["", ";x", ";x=y;z", ";x=\"\\\";\""][rng.random_range(0..4usize)];
                        octets.extend(format!("{zeros}{:x}{extension}\r\n", data.len()).bytes());
                        octets.extend([data, b"\r\n"].concat());
                    }
                    let last = ["0\r\n\r\n", "00;x\r\n\r\n", "0\r\nX-Trailer: y\r\n\r\n"];
                    octets.extend(last[rng.random_range(0..3usize)].bytes());
                }
                sent.push(body);
            }
            for piece in cut(&mut rng, &octets) {
                write(&mut stream, piece).await;
                if rng.random_bool(0.05) {
                    pause(1).await;
                }
            }
            heard.extend(answered(&mut stream, &vec![200; depth], &format!("sequence {sequence}")).await);
        }
    }
    are_in_order(&heard);
    let got = bodies(&ds);
    assert_eq!((got.len(), ds.begun()), (sent.len(), sent.len()));
    assert_eq!(got.iter().zip(&sent).position(|(got, sent)| got != sent), None);
}

// === Heads ===

#[tokio::test]
async fn what_a_head_may_have() {
    let (_ds, gateway) = start().await;
    let filled = |length: usize| get(&format!("X: {}\r\n", "y".repeat(length - get("X: \r\n").len())));
    let fields = "X:|X: \t |X:a|X:\ta b\t |X: a\r\nX: b|!#$%&'*+-.^_`~09azAZ: a|X: \"\\\"\", (a), \u{e9}";
    let mut cases: Vec<String> = fields.split('|').map(|field| get(&format!("{field}\r\n"))).collect();
    cases.extend(["\r\n", "\r\n\r\n\r\n"].map(|empty| empty.to_owned() + &get("")));
    cases.push(get("").replace("Host: ds.b.example", "hOST:DS.B.Example"));
    cases.extend([get(&"X: y\r\n".repeat(99)), filled(60_000), filled(64 << 10)]);
    let mut stream = open(&gateway, b"").await;
    for case in &cases {
        write(&mut stream, case.as_bytes()).await;
        let heard = answered(&mut stream, &[200], case).await;
        assert_eq!(heard[0].body, b"ds.b.example", "{case}");
        assert!(!heard[0].closes(), "{case}: {}", heard[0].head);
    }
    refused(&gateway, get(&"X: y\r\n".repeat(100)), &[400]).await;
    refused(&gateway, filled((64 << 10) + 1), &[400]).await;
    // What has no end is not waited for.
    for endless in ["y", "y: z\r\n"] {
        refused(&gateway, format!("GET / HTTP/1.1\r\nX: {}", endless.repeat(80_000)), &[400]).await;
    }
    refused(&gateway, format!("GET /{}", "y".repeat(80_000)), &[400]).await;
}

#[tokio::test]
async fn a_head_that_cannot_be_read_is_refused_and_the_last() {
    let (ds, gateway) = start().await;
    let fields = "X: a\rb|X: a\r|\rX: a|X: a\0b|X\0: a|X: a\r\n b|X: a\r\n\tb|X: a\r\n | X: a|X : a|X\t: a|: a|X|\
                  X Y: a|X(Y): a|X: a\nY: b|\n|Host: ds.b.example";
    for field in fields.split('|') {
        refused(&gateway, head(&format!("{field}\r\n")), &[400]).await;
    }
    let lines = "POST  /group_operation HTTP/1.1|POST /group_operation  HTTP/1.1|POST /group_operation HTTP/1.1 |\
                 \x20POST /group_operation HTTP/1.1|POST\t/group_operation\tHTTP/1.1|POST /group operation HTTP/1.1|\
                 POST /group\x01operation HTTP/1.1|POST /group_operation\0 HTTP/1.1|POST /group_operation\x7f HTTP/1.1|\
                 POST /group_operation\r HTTP/1.1|PO(ST /group_operation HTTP/1.1|/group_operation HTTP/1.1|\
                 POST HTTP/1.1|POST /group_operation|POST||\nPOST /group_operation HTTP/1.1|\
                 \rPOST /group_operation HTTP/1.1|\r\n POST /group_operation HTTP/1.1";
    for line in lines.split('|') {
        refused(&gateway, head("").replace("POST /group_operation HTTP/1.1", line), &[400]).await;
    }
    refused(&gateway, head("X: a\n"), &[400]).await;
    refused(&gateway, head("\n"), &[400]).await;
    refused(&gateway, head("").replacen("\r\n", "\n", 1), &[400]).await;
    refused(&gateway, head("").replace("\r\n", "\n"), &[400]).await;
    refused(&gateway, head("").replace("Host: ds.b.example\r\n", ""), &[400]).await;
    for version in ["http/1.1", "HTTP/1.2", "HTTP/2.0", "HTTP/0.9", "HTTP/1.1.1", "HTTP/11", "HTTP/1,1", "FTP/1.1"] {
        refused(&gateway, head("").replace("HTTP/1.1", version), &[400, 505]).await;
    }
    refused(&gateway, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[400, 505]).await;
    assert_eq!(ds.begun(), 0);
}

// === Framing ===

#[tokio::test]
async fn a_framing_that_is_none_is_refused_and_the_last() {
    let (ds, gateway) = start().await;
    let lengths = "|+5|-1|0x10|5,5|5 5|5.0|5;|1e1|five|18446744073709551616|18446744073709551621|\
                   9999999999999999999999999999999999999999|5\r\nContent-Length: 6|6\r\nContent-Length: 5|\
                   5\r\nContent-Length: +5|5\r\nContent-Length:";
    for length in lengths.split('|') {
        refused(&gateway, head(&format!("Content-Length: {length}\r\n")) + "hello", &[400]).await;
    }
    let codings = "|gzip|chunked, gzip|gzip, chunked|identity|xchunked|chunkedx|\"chunked\"|\x0bchunked|chunked;q=1|\
                   chunked, chunked|chunked\r\nTransfer-Encoding: chunked|chunked\r\nTransfer-Encoding: identity|\
                   gzip\r\nTransfer-Encoding: chunked";
    for coding in codings.split('|') {
        let octets = head(&format!("Transfer-Encoding: {coding}\r\n")) + "5\r\nhello\r\n0\r\n\r\n";
        refused(&gateway, octets, &[400]).await;
    }
    let old = head("Transfer-Encoding: chunked\r\n").replace("HTTP/1.1", "HTTP/1.0");
    refused(&gateway, [old.as_bytes(), &chunks(&body(1, 0), 10)].concat(), &[400]).await;
    assert_eq!(ds.begun(), 0);
}

#[tokio::test]
async fn two_framings_are_one_request_and_the_last() {
    let (ds, gateway) = start().await;
    let body = body(1, 0);
    let whole = chunks(&body, 10);
    for content in [&whole[..], b"0\r\n\r\n"] {
        for length in ["0", "5", "1000000", "x", &content.len().to_string()] {
            let (length, coding) = (format!("Content-Length: {length}\r\n"), "Transfer-Encoding: chunked\r\n");
            for fields in [format!("{length}{coding}"), format!("{coding}{length}")] {
                let before = ds.complete();
                let mut stream = open(&gateway, &[head(&fields).as_bytes(), content, &posted(&body)].concat()).await;
                let heard = answer(&mut stream, &fields).await;
                if heard.status() != 200 {
                    is_refused(&heard, &[400], &fields);
                }
                assert!(heard.closes(), "{fields}: {}", heard.head);
                ends(&mut stream, &fields).await;
                assert_eq!(ds.complete() - before, usize::from(heard.status() == 200), "{fields}");
            }
        }
    }
    for got in ds.requests() {
        assert!(got.body == body, "{:?}", String::from_utf8_lossy(&got.body));
        assert!(!got.headers.contains_key("content-length") || !got.headers.contains_key("transfer-encoding"));
    }
}

#[tokio::test]
async fn a_body_is_taken_in_any_of_its_forms() {
    let (node, gateway) = Node::start(0).await;
    node.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let body = body(1, 0xab);
    assert_eq!(body.len(), 0xab);
    let with_length = ["171\r\nContent-Length: 171", "\t 171 \t", "000171"]
        .map(|length| [head(&format!("content-length:{length}\r\n")).as_bytes(), &body].concat());
    let coded = ["chunked", "Chunked", "CHUNKED", "\t chunked \t"]
        .map(|coding| [head(&format!("TRANSFER-encoding:{coding}\r\n")).as_bytes(), &chunks(&body, 10)].concat());
    let long = format!("ab;x={}", "y".repeat(1_000));
    let sizes = "ab|AB|aB|00ab|00000000000000ab|ab;x|ab;x=y|ab;x=\"y\"|ab;x=\"y;\\\"z\\\\\"|ab;x;y=z|ab ; x = y";
    let last =
        "0|000|0;x=y|0\r\nX-Secret: z|0\r\nX-Secret: z\r\nContent-Length: 5\r\nTransfer-Encoding: gzip\r\nHost: c";
    let written = |size: &str, last: &str| {
        chunked(&[size.as_bytes(), b"\r\n", &body, b"\r\n", last.as_bytes(), b"\r\n\r\n"].concat())
    };
    let of_size = sizes.split('|').chain([&long[..]]).map(|size| written(size, "0"));
    let with_last = last.split('|').map(|last| written("ab", last));
    let cut = [1, 2, 16, 100].map(|size| chunked(&chunks(&body, size)));
    let mut stream = open(&gateway, b"").await;
    for octets in with_length.into_iter().chain(coded).chain(of_size).chain(with_last).chain(cut) {
        let what = String::from_utf8_lossy(&octets);
        write(&mut stream, &octets).await;
        assert!(!answered(&mut stream, &[200], &what).await[0].closes(), "{what}");
        let got = node.last();
        assert!(got.body == body, "{what}");
        assert!(got.trailers.trim().is_empty() && fields(&got.head, "x-secret").is_empty(), "{what}: {}", got.trailers);
        assert_eq!(fields(&got.head, "host"), ["ds.b.example"], "{what}");
    }
}

#[tokio::test]
async fn a_wrong_chunk_is_the_end_of_its_request_and_of_the_connection() {
    let (ds, gateway) = start().await;
    let begun = body(1, 0);
    // Before it is decided, and when it is on its way.
    for before in [vec![], [format!("{:x}\r\n", begun.len()).as_bytes(), &begun, b"\r\n"].concat()] {
        let wrong = "\r\nabc\r\n|;x\r\nabc\r\n|g\r\nabc\r\n| 3\r\nabc\r\n|3 3\r\nabc\r\n|-3\r\nabc\r\n|+3\r\nabc\r\n|\
                     0x3\r\nabc\r\n|10000000000000003\r\nabc\r\n|3\nabc\r\n|3\rabc\r\n|3;x\nabc\r\n|\
                     3;x=\"\n\"\r\nabc\r\n|3\r\nabcd\r\n|3\r\nab\r\n0\r\n\r\n|3\r\nabc0\r\n\r\n|3\r\nabc\n0\r\n\r\n|\
                     3\r\nabc\r0\r\n\r\n|0\n\r\n|0\n\n|0\r\n\n|0\r\nX: y\n\r\n|0;x\n\r\n";
        for wrong in wrong.split('|') {
            refused(&gateway, chunked(&[&before[..], wrong.as_bytes()].concat()), &[400]).await;
        }
        let endless =
            [("3;", "y"), ("0;", "y"), ("3;x=\"", "y"), ("3;x", ";x=y"), ("0\r\nX: ", "y"), ("0\r\n", "X: y\r\n")];
        for (start, more) in endless {
            let endless = start.to_owned() + &more.repeat(70_000);
            refused(&gateway, chunked(&[&before[..], endless.as_bytes()].concat()), &[400]).await;
        }
        // More than any body may have.
        let large = [&before[..], b"ffffffffffffffff\r\nabc"].concat();
        refused(&gateway, chunked(&large), &[400, 413]).await;
    }
    assert!(ds.until(|ds| ds.begun() == ds.broken()).await, "{} begun, {} broken", ds.begun(), ds.broken());
    assert_eq!(ds.complete(), 0);
}

#[tokio::test]
async fn a_body_that_breaks_off_is_no_request() {
    let (ds, gateway) = start().await;
    let body = body(1, 300);
    for whole in [posted(&body), chunked(&chunks(&body, 100))] {
        for missing in [4, 5, 6, 7, 8, 111, 200, 290, 300] {
            for said in [true, false] {
                let what = format!("{missing} are missing, and that is said: {said}");
                let mut stream = open(&gateway, &whole[..whole.len() - missing]).await;
                let mut octets = vec![];
                if said {
                    stream.shutdown().await.unwrap();
                    in_time(stream.read_to_end(&mut octets)).await.unwrap_or_else(|error| panic!("{what}: {error}"));
                }
                let text = String::from_utf8_lossy(&octets);
                assert!(text.is_empty() || text.starts_with("HTTP/1.1 400 "), "{what}: {text}");
            }
        }
    }
    gateway.until_metric(IN_FLIGHT, |n| n == 0.0).await;
    assert!(ds.until(|ds| ds.begun() == ds.broken()).await, "{} begun, {} broken", ds.begun(), ds.broken());
    assert_eq!(ds.complete(), 0);
}

// === Connections ===

#[tokio::test]
async fn a_connection_is_kept_or_ended_as_was_said() {
    let (ds, gateway) = start().await;
    let body = body(1, 0);
    let cases = [
        ("HTTP/1.1", "", false),
        ("HTTP/1.1", "Connection: keep-alive\r\n", false),
        ("HTTP/1.1", "Connection: close\r\n", true),
        ("HTTP/1.1", "connection:CLOSE\r\n", true),
        ("HTTP/1.1", "Connection: keep-alive ,Close\r\n", true),
        ("HTTP/1.1", "Connection: keep-alive\r\nConnection: close\r\n", true),
        ("HTTP/1.0", "", true),
        ("HTTP/1.0", "Connection: close\r\n", true),
    ];
    for (version, option, last) in cases {
        for (path, status) in [("/group_operation", 200), ("/nope", 404)] {
            let what = format!("{version} {path} {option}");
            let before = ds.begun();
            let head = head(&format!("{option}Content-Length: {}\r\n", body.len()));
            let head = head.replace("HTTP/1.1", version).replace("/group_operation", path);
            let mut stream = open(&gateway, &[head.as_bytes(), &body, head.as_bytes(), &body].concat()).await;
            let heard = answered(&mut stream, &[status; 2][usize::from(last)..], &what).await;
            if last {
                assert!(heard[0].closes() || version == "HTTP/1.0", "{what}: {}", heard[0].head);
                ends(&mut stream, &what).await;
            }
            assert!(last || heard.iter().all(|heard| !heard.closes()), "{what}: {}", heard[0].head);
            assert_eq!(ds.begun() - before, if status == 200 { heard.len() } else { 0 }, "{what}");
        }
    }
}

#[tokio::test]
async fn http_1_0_is_not_answered_in_chunks() {
    let (node, gateway) = Node::start(0).await;
    let ask = async |says: &str| {
        node.say(says);
        let old = head("Content-Length: 200\r\n").replace("HTTP/1.1", "HTTP/1.0");
        let mut stream = open(&gateway, &[old.as_bytes(), &body(1, 200)].concat()).await;
        let mut octets = vec![];
        let end = in_time(stream.read_to_end(&mut octets)).await;
        (end, String::from_utf8(octets).unwrap())
    };
    let (end, text) =
        ask("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n").await;
    assert!(end.is_ok(), "{end:?} after {text}");
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert_eq!((&head[9..12], body), ("200", "abcde"), "{head}");
    assert_eq!(fields(head, "transfer-encoding").len(), 0, "{head}");
    // What a node breaks off does not look as if it were whole (RFC 9112 §9.8).
    let broken = "HTTP/1.1 200 OK\r\nconnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n";
    let (end, text) = ask(broken).await;
    assert!(end.is_err() || text.get(9..12) == Some("502"), "{text}");
}

#[tokio::test]
async fn who_waits_for_100_continue_is_told_once() {
    let (ds, gateway) = start().await;
    let body = body(1, 500);
    let (length, whole) = (format!("Content-Length: {}\r\n", body.len()), chunks(&body, 100));
    let mut stream = open(&gateway, b"").await;
    for (framing, content) in [(&length[..], &body), ("Transfer-Encoding: chunked\r\n", &whole)] {
        for expected in ["100-continue", "100-Continue"] {
            let head = head(&format!("{framing}Expect: {expected}\r\n"));
            write(&mut stream, head.as_bytes()).await;
            let told = in_time(read_until(&mut stream, "\r\n\r\n")).await.unwrap();
            assert_eq!(told, "HTTP/1.1 100 Continue\r\n\r\n");
            for piece in content.chunks(100) {
                pause(1).await;
                write(&mut stream, piece).await;
            }
            answered(&mut stream, &[200], expected).await;
            write(&mut stream, &[head.as_bytes(), content].concat()).await;
            answered(&mut stream, &[200], "with its body").await;
        }
    }
    // One of HTTP/1.0 does not know it (RFC 9110 §10.1.1).
    let old = head(&format!("{length}Expect: 100-continue\r\n")).replace("HTTP/1.1", "HTTP/1.0");
    write(&mut stream, old.as_bytes()).await;
    let told = tokio::time::timeout(Duration::from_millis(100), stream.read_u8()).await;
    assert!(told.is_err(), "{told:?}");
    write(&mut stream, &body).await;
    answered(&mut stream, &[200], "HTTP/1.0").await;
    let got = bodies(&ds);
    assert!(got.len() == 9 && got.iter().all(|got| *got == body), "{} requests", got.len());

    let mut stream = open(&gateway, &[head(&format!("{length}Expect: x-other\r\n")).as_bytes(), &body].concat()).await;
    let heard = answer(&mut stream, "another expectation").await;
    assert!([200, 417].contains(&heard.status()), "{}", heard.head);
}

#[tokio::test]
async fn an_answer_to_head_has_no_body() {
    let (_ds, gateway) = start().await;
    for path in ["/group_operation", "/nope", "/.well-known/mimi/ds-domain"] {
        let asked = format!("HEAD {path} HTTP/1.1\r\nHost: ds.b.example\r\n\r\n");
        let mut stream = open(&gateway, &[asked.as_bytes(), &posted(&body(1, 0))].concat()).await;
        let refusal = in_time(read_until(&mut stream, "\r\n\r\n")).await.unwrap();
        assert!(refusal.starts_with("HTTP/1.1 40"), "{path}: {refusal}");
        let lengths = fields(&refusal, "content-length");
        assert!(lengths.len() == 1 && lengths[0] != "0", "{path}: {refusal}");
        match &fields(&refusal, "connection")[..] {
            ["close"] => ends(&mut stream, path).await,
            _ => drop(answered(&mut stream, &[200], path).await),
        }
    }
}

#[tokio::test]
async fn who_goes_away_ends_the_request() {
    let ds = Ds::start().await;
    ds.hang(true);
    let gateway = Gateway::start(Setup { delivery: "read_timeout = \"60s\"", ..Setup::of(&ds) }).await;
    for (n, more) in [(1, &b""[..]), (2, &b"POST /group_op"[..]), (3, &posted(&body(9, 0))[..])] {
        let stream = open(&gateway, &[&posted(&body(n, 0))[..], more].concat()).await;
        assert!(ds.until(|ds| ds.complete() == n as usize).await);
        gateway.until_metric(IN_FLIGHT, |n| n == 1.0).await;
        drop(stream);
        gateway.until_metric(IN_FLIGHT, |n| n == 0.0).await;
    }
    assert_eq!(ds.begun(), 3);
}

// === Answers of nodes ===

#[tokio::test]
async fn however_a_node_frames_its_answer_the_next_one_is_in_step() {
    let (node, gateway) = Node::start(0).await;
    let cases = [
        ("200 OK\r\nContent-Length: 5\r\n\r\nabcde", 200, "abcde"),
        ("200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n", 200, "abcde"),
        ("200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n1\r\na\r\n0004;x\r\nbcde\r\n0\r\nX: y\r\n\r\n", 200, "abcde"),
        ("200 OK\r\nconnection: close\r\n\r\nabcde", 200, "abcde"),
        ("200 OK\r\nContent-Length: 0\r\n\r\n", 200, ""),
        ("200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 200, ""),
        ("204 No Content\r\n\r\n", 204, ""),
        ("304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304, ""),
        ("304 Not Modified\r\n\r\n", 304, ""),
        ("299 \r\nContent-Length: 5\r\n\r\nabcde", 299, "abcde"),
    ];
    let mut stream = open(&gateway, b"").await;
    for (says, status, body_of) in cases {
        node.say(format!("HTTP/1.1 {says}"));
        write(&mut stream, &[posted(&body(1, 0)), get("").into_bytes()].concat()).await;
        let heard = answered(&mut stream, &[status, 200], says).await;
        assert_eq!((&heard[0].body[..], &heard[1].body[..]), (body_of.as_bytes(), &b"ds.b.example"[..]), "{says}");
        assert!(heard.iter().all(|heard| !heard.closes()), "{says}: {}", heard[0].head);
        assert!(heard[0].trailers.trim().is_empty(), "{says}: {}", heard[0].trailers);
        let framed = |name: &str| !fields(&heard[0].head, name).is_empty();
        assert!(status < 300 || !framed("transfer-encoding"), "{says}: {}", heard[0].head);
        assert!(status != 204 || !framed("content-length") && !framed("transfer-encoding"), "{}", heard[0].head);
    }
}

#[tokio::test]
async fn what_is_said_of_one_connection_is_not_said_of_the_other() {
    let (node, gateway) = Node::start(0).await;
    node.say(
        "HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nSet-Cookie: b=1\r\n\
         Connection: x-thing, keep-alive\r\nX-Thing: 1\r\nKeep-Alive: timeout=5\r\n\
         Proxy-Connection: keep-alive\r\nUpgrade: x\r\nX-Other: 2\r\n\
         Set-Cookie: a=2\r\nContent-Length: 2\r\n\r\nok",
    );
    let option =
        "Connection: keep-alive, te\r\nKeep-Alive: timeout=5\r\nProxy-Connection: x\r\nTE: trailers\r\nX-Other: 2\r\n";
    let mut stream =
        open(&gateway, &[head(&format!("{option}Content-Length: 200\r\n")).as_bytes(), &body(1, 200)].concat()).await;
    let passed = answered(&mut stream, &[200], option).await.remove(0);
    for head in [&passed.head, &node.last().head] {
        for name in ["x-thing", "keep-alive", "proxy-connection", "upgrade", "te"] {
            assert_eq!(fields(head, name).len(), 0, "{name}: {head}");
        }
        assert!(!fields(head, "connection").concat().contains("x-thing"), "{head}");
        assert_eq!(fields(head, "x-other"), ["2"], "{head}");
    }
    assert_eq!(fields(&passed.head, "date"), ["Sun, 06 Nov 1994 08:49:37 GMT"]);
    assert_eq!(fields(&passed.head, "set-cookie"), ["b=1", "a=2"], "in the node's order");

    // Of our own answers, and of a node's without one, the date is now.
    node.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    for request in [get("").into_bytes(), head("").into_bytes(), posted(&body(1, 0)), b"GET /\r\n\r\n".to_vec()] {
        write(&mut stream, &request).await;
        let heard = answer(&mut stream, "a date").await;
        let date = httpdate::parse_http_date(fields(&heard.head, "date")[0]).unwrap();
        let age = SystemTime::now().duration_since(date).unwrap();
        assert!(age < Duration::from_secs(5), "{age:?}: {}", heard.head);
    }
}

#[tokio::test]
async fn eight_mebibytes_each_way_at_any_pace() {
    let mut large = body(1, 0);
    large.extend((large.len()..8 << 20).map(|n| (n % 251) as u8));
    let length = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", large.len());
    let coding = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let pieces = chunks(&large, 70_001);
    let with_length = (posted(&large), [length.as_bytes(), &large].concat());
    let in_chunks = (chunked(&pieces), [coding.as_bytes(), &pieces].concat());
    for millis in [0, 2] {
        let (node, gateway) = Node::start(millis).await;
        for (request, says) in [&with_length, &in_chunks] {
            node.say(says);
            let mut stream = slowly(open(&gateway, request).await, millis);
            let heard = answered(&mut stream, &[200], &format!("{millis} ms")).await;
            assert!(heard[0].body == large, "{millis} ms: {} octets came back", heard[0].body.len());
            assert!(node.last().body == large, "{millis} ms");
        }
    }
}
