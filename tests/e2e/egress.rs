//! What this provider's own nodes send to others: a.example's gateway takes it from them, and b.example's gateway is whom it
//! goes to. In both roles it is the binary.

use crate::harness::{Gateway, Setup, a_example, binary, ca, large_message, limit, message_in, send_message};
use crate::support::client::{Client, Response, raw_tls};
use crate::support::ds::Ds;
use crate::support::encode;
use crate::support::pki::{Ca, Identity};
use crate::support::program::free_address;
use crate::upgrade::Process;
use http::Method;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

const TYPE: &str = "tag:moh-gateway.example,2026:problem:";
const QUOTA_EXCEEDED: &str = "https://iana.org/assignments/http-problem-types#quota-exceeded";
const DISCOVERY: &str = "/.well-known/mimi/ds-domain";

// === a.example, which sends ===

/// The gateway of a.example.
struct Sender {
    process: Process,
    egress: SocketAddr,
}

/// Writes its configuration, and the files that it names. `lines` are of `[egress]`, `more` comes after it.
fn configure(dir: &Path, listener: SocketAddr, admin: SocketAddr, ds: SocketAddr, lines: &str, more: &str) {
    ca().write(dir, "ca");
    ca().issue(&["ds.a.example", "a.example"]).write(dir, "a");
    let text = format!(
        r#"
[provider]
names = ["a.example"]
ds_domain = "ds.a.example"
[[listener]]
address = "{listener}"
[[certificate]]
chain = "a.pem"
key = "a.key"
[admin]
address = "{admin}"
[access_log]
path = "access.log"
[limits]
memory = "1MiB"
[runtime]
threads = 2
[timeouts]
body_total = "5s"
shutdown = "2s"
[delivery_service]
[[delivery_service.node]]
address = "{ds}"
[egress]
ca = "ca.pem"
connect_timeout = "5s"
read_timeout = "2s"
discovery_timeout = "5s"
{lines}
{more}
"#
    );
    std::fs::write(dir.join("gateway.toml"), text).unwrap();
}

/// What it shows to others, where it does not go without saying.
const IDENTITY: &str = "certificate = \"a.pem\"\nkey = \"a.key\"";

impl Sender {
    async fn start(peers: &str) -> Sender {
        // Its own Delivery Service sends; it gets nothing.
        let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
        Sender::start_in(tempfile::tempdir().unwrap(), nobody, IDENTITY, peers).await
    }

    async fn start_in(dir: tempfile::TempDir, ds: SocketAddr, lines: &str, peers: &str) -> Sender {
        let (listener, admin, egress) = (free_address(), free_address(), free_address());
        let lines = format!("address = \"{egress}\"\n{lines}");
        configure(dir.path(), listener, admin, ds, &lines, peers);
        let process = Process::start(Path::new(binary()), dir, admin, &[listener, egress]).await;
        Sender { process, egress }
    }

    /// A node of a.example that has something for this provider.
    fn node(&self, to: &str) -> Client {
        Client::plain(self.egress).http1().authority(to)
    }

    /// Waits until as many requests have ended so.
    async fn counts(&self, result: &str, requests: u32) {
        let series = format!("moh_gateway_egress_requests_total{{result=\"{result}\"}}");
        self.process.until_metric(&series, f64::from(requests)).await;
    }
}

/// A provider that is at an address, and is asked for its Delivery Service there.
fn at(provider: &str, address: SocketAddr) -> String {
    format!("[[egress.peer]]\nprovider = \"{provider}\"\naddress = \"{address}\"\n")
}

/// A provider of whom all is known.
fn known(provider: &str, ds_domain: &str, address: SocketAddr) -> String {
    at(provider, address) + &format!("ds_domain = \"{ds_domain}\"\n")
}

/// A `send_message` from one provider to another.
fn message(from: &str, to: &str) -> Vec<u8> {
    // As send_message() has it, but for the providers.
    let whole = send_message();
    let rest = whole.strip_prefix(&encode::header("a.example", "b.example")[..]).unwrap();
    [encode::header(from, to), rest.to_vec()].concat()
}

async fn post(client: &Client, body: impl Into<bytes::Bytes>) -> Response {
    client.send(Method::POST, "/group_operation", body).await.unwrap()
}

async fn ask(client: &Client) -> Response {
    client.send_with(Method::GET, DISCOVERY, &[("content-type", "")], "").await.unwrap()
}

fn is_problem(response: &Response, status: u16, reason: &str) {
    assert_eq!(response.status, status, "{}", response.text());
    assert_eq!(response.header("content-type"), Some("application/problem+json"));
    let document = response.json();
    assert_eq!(document["status"], status);
    assert_eq!(document["type"], format!("{TYPE}{reason}"), "{document}");
    assert!(document["title"].as_str().is_some_and(|title| !title.is_empty()));
}

// === b.example, which receives ===

/// A gateway of b.example to which only other providers' servers come.
fn required(ds: &Ds) -> Setup {
    Setup { client_certificates: "required", ..Setup::of(ds) }
}

fn requests(endpoint: &str, decision: &str, reason: &str) -> String {
    format!("moh_gateway_requests_total{{decision=\"{decision}\",endpoint=\"{endpoint}\",reason=\"{reason}\"}}")
}

/// Waits until a gateway has said so often where its Delivery Service is.
async fn was_asked(b: &Gateway, times: f64) {
    b.until_metric(&requests("ds_domain", "answered", ""), |n| n == times).await;
}

// === From node to node ===

#[tokio::test]
async fn a_message_reaches_another_provider_and_its_answer_comes_back() {
    let (ds_a, ds_b) = (Ds::start().await, Ds::start().await);
    for h2c in [false, true] {
        let setup = required(&ds_b);
        let b = Gateway::start(if h2c { setup.h2c() } else { setup }).await;
        let dir = tempfile::tempdir().unwrap();
        let a = Sender::start_in(dir, ds_a.addr, IDENTITY, &at("b.example", b.addr)).await;
        ds_b.set_response(207, &[("content-type", "application/x-ds"), ("x-ds", "kept")], vec![0u8, 1, 2, 255]);
        let node = a.node("b.example");
        let key = encode::verification_key_request("a.example", "b.example");
        let all = [
            (Method::POST, "/group_operation", send_message()),
            (Method::GET, "/verification_key", key),
            (Method::POST, "/group_operation", message_in(b"another group", 3)),
        ];
        for (method, path, body) in all.clone() {
            let before = ds_b.complete();
            let response = node.send(method.clone(), path, body.clone()).await.unwrap();
            assert_eq!(response.status, 207, "{}", response.text());
            assert_eq!(&response.body[..], [0, 1, 2, 255], "octet for octet");
            assert_eq!(response.header("content-type"), Some("application/x-ds"));
            assert_eq!(response.header("x-ds"), Some("kept"));
            assert_eq!(ds_b.complete(), before + 1);
            let got = ds_b.requests().pop().unwrap();
            assert_eq!((&got.method, got.path.as_str()), (&method, path));
            assert_eq!(got.body, body, "octet for octet");
            let provider: Vec<_> = got.headers.get_all("x-moh-provider").iter().collect();
            assert_eq!(provider, ["a.example"], "its certificate says so");
            let host = got.authority.clone().or_else(|| Some(got.headers.get("host")?.to_str().unwrap().to_owned()));
            assert_eq!(host.as_deref(), Some("ds.b.example"));
        }
        assert_eq!(node.connections(), 1, "a node's connection is kept");
        let forwarded = |endpoint| requests(endpoint, "forwarded", "");
        b.until_metric(&forwarded("group_operation"), |n| n == 2.0).await;
        b.until_metric(&forwarded("verification_key"), |n| n == 1.0).await;
        was_asked(&b, 1.0).await;
        a.counts("forwarded", 3).await;

        let lines = || std::fs::read_to_string(a.process.dir.path().join("access.log")).unwrap_or_default();
        crate::upgrade::until("there is a line for each", || lines().lines().count() == all.len()).await;
        for (line, (_, path, body)) in lines().lines().zip(&all) {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(line["egress"], true);
            assert_eq!(line["provider"], "b.example");
            assert_eq!(line["endpoint"], path.trim_start_matches('/'));
            assert_eq!(line["decision"], "forwarded");
            assert_eq!(line["status"], 207);
            assert_eq!(line["body_in"], body.len());
        }
    }
    assert_eq!(ds_a.begun(), 0, "nothing comes back but the answers");
}

#[tokio::test]
async fn a_provider_is_asked_once_where_its_service_is() {
    let ds = Ds::start().await;
    let b = Gateway::start(required(&ds)).await;
    let a = Sender::start(&at("b.example", b.addr)).await;
    let mut nodes = JoinSet::new();
    for n in 0..30 {
        let node = a.node(if n % 2 == 0 { "b.example" } else { "B.Example:443" });
        nodes.spawn(async move { post(&node, message_in(b"many at once", n)).await.status });
    }
    assert!(nodes.join_all().await.iter().all(|status| *status == 200));
    let node = a.node("b.example");
    for n in 30..40 {
        assert_eq!(post(&node, message_in(b"and then more", n)).await.status, 200);
    }
    a.counts("forwarded", 40).await;
    b.until_metric(&requests("group_operation", "forwarded", ""), |n| n == 40.0).await;
    was_asked(&b, 1.0).await;
    assert_eq!(ds.complete(), 40);
}

#[tokio::test]
async fn nodes_ask_where_a_service_is_here() {
    let ds = Ds::start().await;
    let b = Gateway::start(required(&ds)).await;
    let a = Sender::start(&at("b.example", b.addr)).await;
    let node = a.node("b.example");
    for _ in 0..3 {
        let response = ask(&node).await;
        assert_eq!(response.status, 200, "{}", response.text());
        assert_eq!(response.header("content-type"), Some("text/plain"));
        assert_eq!(response.text(), "ds.b.example");
    }
    assert_eq!(post(&node, send_message()).await.status, 200);
    a.counts("answered", 3).await;
    a.counts("forwarded", 1).await;
    was_asked(&b, 1.0).await;
}

#[tokio::test]
async fn large_bodies_are_passed_on_as_they_come() {
    const ALL: usize = 7 << 20;
    let ds = Ds::start().await;
    let b = Gateway::start(Setup { timeouts: "", ..required(&ds) }).await;
    let a = Sender::start(&at("b.example", b.addr)).await;
    let body = large_message(ALL);
    let answer: Vec<u8> = (0..ALL).map(|n| (n % 251) as u8).collect();
    ds.set_response(200, &[], answer.clone());
    for length in [Some(ALL as u64), None] {
        let before = ds.body_bytes_seen();
        let node = a.node("b.example");
        let upload = node.begin(Method::POST, "/group_operation", &[], length).await.unwrap();
        upload.write(body[..20].to_vec()).await.unwrap();
        upload.write(body[20..400_000].to_vec()).await.unwrap();
        assert!(ds.until(|ds| ds.body_bytes_seen() >= before + 400_000).await, "the other node has what was sent");
        for piece in body[400_000..].chunks(1 << 16) {
            upload.write(piece.to_vec()).await.unwrap();
        }
        let response = upload.finish().await.unwrap();
        assert_eq!(response.status, 200, "{}", response.text());
        assert!(response.body == answer, "octet for octet");
        assert!(ds.requests().pop().unwrap().body == body, "octet for octet");
    }
    assert_eq!(ds.complete(), 2);
}

// === What does not leave ===

#[tokio::test]
async fn what_is_not_ours_to_send_is_not_sent() {
    let ds = Ds::start().await;
    let b = Gateway::start(required(&ds)).await;
    let a = Sender::start(&at("b.example", b.addr)).await;
    let node = a.node("b.example");

    is_problem(&post(&node, message("a.example", "c.example")).await, 421, "misdirected");
    for ourselves in ["a.example", "A.example:443", "ds.a.example"] {
        is_problem(&post(&a.node(ourselves), message("a.example", "a.example")).await, 421, "misdirected");
        is_problem(&ask(&a.node(ourselves)).await, 421, "misdirected");
    }
    a.counts("misdirected", 7).await;
    for other in ["c.example", "b.example", "ds.a.example"] {
        is_problem(&post(&node, message(other, "b.example")).await, 403, "sender-mismatch");
    }
    a.counts("sender-mismatch", 3).await;
    for content in [("content-type", ""), ("content-type", "application/json"), ("content-encoding", "gzip")] {
        let sent = node.send_with(Method::POST, "/group_operation", &[content], send_message()).await;
        is_problem(&sent.unwrap(), 415, "wrong-content-type");
    }
    a.counts("wrong-content-type", 3).await;
    is_problem(&node.send(Method::POST, "/metrics", send_message()).await.unwrap(), 404, "unknown-path");
    let response = node.send(Method::GET, "/group_operation", send_message()).await.unwrap();
    is_problem(&response, 405, "wrong-method");
    assert_eq!(response.header("allow"), Some("POST"));
    is_problem(&post(&node, "what is this").await, 400, "malformed");
    let mut upload = node.begin(Method::POST, "/group_operation", &[], Some((8 << 20) + 1)).await.unwrap();
    is_problem(&upload.answer().await.unwrap(), 413, "too-large");

    assert_eq!(ds.begun(), 0);
    was_asked(&b, 0.0).await;
    assert_eq!(post(&a.node("b.example"), send_message()).await.status, 200, "what is right goes all the same");
    was_asked(&b, 1.0).await;
}

#[tokio::test]
async fn what_is_known_inside_stays_inside() {
    let ds_b = Ds::start().await;
    let b = Gateway::start(required(&ds_b)).await;
    let other = Server::start(&["ds.c.example"], |_| "200 OK\r\nContent-Length: 2\r\n\r\nok".into()).await;
    let peers = at("b.example", b.addr) + &known("c.example", "ds.c.example", other.addr);
    let a = Sender::start(&peers).await;
    let inside = [
        "x-request-id",
        "x_request_id",
        "forwarded",
        "x-forwarded-for",
        "x-real-ip",
        "x-moh-provider",
        "x_moh_provider",
        "x-moh-tls",
        "client-cert",
        "client-cert-chain",
        "traceparent",
        "tracestate",
    ];
    let mut fields: Vec<_> = inside.iter().map(|name| (*name, "of-the-inside")).collect();
    fields.push(("x-harmless", "kept"));

    // As it leaves.
    let (node, body) = (a.node("c.example"), message("a.example", "c.example"));
    let response = node.send_with(Method::POST, "/group_operation", &fields, body.clone()).await.unwrap();
    assert_eq!((response.status.as_u16(), response.text().as_str()), (200, "ok"));
    let asked = other.asked.lock().unwrap().pop().unwrap();
    assert!(asked.head.starts_with("post /group_operation http/1.1\r\n"), "{}", asked.head);
    assert!(!asked.head.contains("of-the-inside"), "{}", asked.head);
    assert!(!asked.head.contains("127."), "no address of ours: {}", asked.head);
    for line in
        ["\r\nhost: ds.c.example\r\n", "\r\ncontent-type: application/octet-stream\r\n", "\r\nx-harmless: kept\r\n"]
    {
        assert!(asked.head.contains(line), "{line:?} in {}", asked.head);
    }
    assert_eq!(asked.body, body);
    let own = std::fs::read(a.process.dir.path().join("a.pem")).unwrap();
    assert_eq!(asked.certificate, Some(CertificateDer::from_pem_slice(&own).unwrap().to_vec()));

    // As it arrives.
    let node = a.node("b.example");
    let response = node.send_with(Method::POST, "/group_operation", &fields, send_message()).await.unwrap();
    assert_eq!(response.status, 200);
    let got = ds_b.requests().pop().unwrap();
    for (name, value) in &got.headers {
        assert_ne!(value, "of-the-inside", "{name}");
    }
    assert_eq!(got.headers["x-moh-provider"], "a.example");
    assert_eq!(got.headers["x-harmless"], "kept");
}

// === Where others are ===

/// A request that came to a [`Server`].
struct Asked {
    /// In lower case, with the empty line at its end.
    head: String,
    body: Vec<u8>,
    /// Of whoever came.
    certificate: Option<Vec<u8>>,
}

/// A server of another provider, made by hand: a request a connection.
struct Server {
    addr: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    /// For these names. It answers a head with what follows `HTTP/1.1 `.
    async fn start(names: &[&str], answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Server {
        let Identity { chain_pem, key_pem } = ca().issue(names);
        let chain = CertificateDer::pem_slice_iter(chain_pem.as_bytes()).map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca().pem().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
        let verifier = verifier.allow_unauthenticated().build().unwrap();
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind(free_address()).await.unwrap();
        let server = Server { addr: listener.local_addr().unwrap(), asked: Arc::default() };
        let (asked, answer) = (server.asked.clone(), Arc::new(answer));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, asked, answer) = (acceptor.clone(), asked.clone(), answer.clone());
                tokio::spawn(async move { serve(stream, &acceptor, &asked, &*answer).await });
            }
        });
        server
    }
}

async fn serve(
    stream: TcpStream,
    acceptor: &TlsAcceptor,
    asked: &Mutex<Vec<Asked>>,
    answer: &(dyn Fn(&str) -> String + Send + Sync),
) -> std::io::Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    let certificate = stream.get_ref().1.peer_certificates().map(|chain| chain[0].to_vec());
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).await?;
    let answer = answer(&head);
    asked.lock().unwrap().push(Asked { head, body, certificate });
    let (status, rest) = answer.split_once("\r\n").unwrap();
    stream.write_all(format!("HTTP/1.1 {status}\r\nConnection: close\r\n{rest}").as_bytes()).await?;
    stream.shutdown().await
}

/// A place where nobody should come; how many did.
pub async fn trap(at: SocketAddr) -> Option<(SocketAddr, Arc<AtomicUsize>)> {
    let listener = TcpListener::bind(at).await.ok()?;
    let (addr, came) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let count = came.clone();
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            count.fetch_add(1, SeqCst);
        }
    });
    Some((addr, came))
}

#[tokio::test]
async fn nobody_leads_us_to_where_we_are() {
    let ds = Ds::start().await;
    let b = Gateway::start(required(&ds)).await;
    let (place, came) = trap(free_address()).await.expect("a free address");
    // Where HTTPS is without a port, if that may be listened at here.
    let https = [trap(SocketAddr::from(([127, 0, 0, 1], 443))).await, trap("[::1]:443".parse().unwrap()).await];
    let port = place.port();
    let redirects = [
        ("p0.example", "https://127.0.0.1:1/ds-domain".to_owned()),
        ("p1.example", format!("https://{place}/ds-domain")),
        ("p2.example", "https://127.0.0.1/ds-domain".to_owned()),
        ("p3.example", "https://[::ffff:127.0.0.1]/ds-domain".to_owned()),
        ("p4.example", "https://2130706433/ds-domain".to_owned()),
        ("p5.example", "https://localhost/ds-domain".to_owned()),
        ("p6.example", format!("https://localhost:{port}/ds-domain")),
        ("p7.example", format!("http://{place}/ds-domain")),
        ("p8.example", "https://169.254.169.254/latest/meta-data/".to_owned()),
        // What the operator says of b.example is for those who write to b.example.
        ("p9.example", format!("https://b.example{DISCOVERY}")),
    ];
    let names: Vec<&str> = redirects.iter().map(|(name, _)| *name).collect();
    let answers = redirects.clone();
    let server = Server::start(&names, move |head| {
        let to = answers.iter().find(|(name, _)| head.contains(&format!("\r\nhost: {name}\r\n")));
        let (_, to) = to.unwrap_or_else(|| panic!("for whom: {head}"));
        format!("302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n")
    })
    .await;
    let peers: String = names.iter().map(|name| at(name, server.addr)).collect();
    let a = Sender::start(&(peers + &at("b.example", b.addr))).await;
    let mut all = JoinSet::new();
    for (name, to) in redirects.clone() {
        let node = a.node(name);
        all.spawn(async move { (post(&node, message("a.example", name)).await, to) });
    }
    for (response, to) in all.join_all().await {
        is_problem(&response, 502, "undiscovered");
        let told = response.text();
        assert!(!told.contains("127.0.0.1") && !told.contains(&to), "nothing of it is told: {told}");
    }
    let asked: Vec<String> = server.asked.lock().unwrap().iter().map(|asked| asked.head.clone()).collect();
    for name in &names {
        let times = asked.iter().filter(|head| head.contains(&format!("\r\nhost: {name}\r\n"))).count();
        assert_eq!(times, 1, "{name} was asked, and it was its answer that was not followed");
    }

    // A name that leads here by itself, and what is no name.
    is_problem(&post(&a.node("localhost"), message("a.example", "localhost")).await, 502, "undiscovered");
    is_problem(&post(&a.node("127.0.0.1"), message("a.example", "127.0.0.1")).await, 502, "undiscovered");
    let here = format!("127.0.0.1:{port}");
    is_problem(&post(&a.node(&here), message("a.example", "127.0.0.1")).await, 502, "undiscovered");
    is_problem(&ask(&a.node("localhost")).await, 502, "undiscovered");

    assert_eq!(came.load(SeqCst), 0, "somebody was led to a place of ours");
    for (place, came) in https.into_iter().flatten() {
        assert_eq!(came.load(SeqCst), 0, "somebody was led to {place}");
    }
    was_asked(&b, 0.0).await;
    a.counts("undiscovered", 14).await;
}

#[tokio::test]
async fn who_cannot_be_found() {
    let dead = free_address();
    let wrong = Server::start(&["c.example"], |_| {
        "200 OK\r\nContent-Type: text/html\r\nContent-Length: 12\r\n\r\nds.c.example".into()
    })
    .await;
    let unsure = Server::start(&["somebody.example"], |_| {
        "200 OK\r\nContent-Type: text/plain\r\nContent-Length: 12\r\n\r\nds.d.example".into()
    })
    .await;
    let peers = at("c.example", wrong.addr) + &at("d.example", unsure.addr) + &at("e.example", dead);
    let a = Sender::start(&peers).await;
    // It does not exist; it says nothing of use; its certificate is another's; nobody is there.
    for name in ["nowhere.invalid", "c.example", "d.example", "e.example"] {
        is_problem(&post(&a.node(name), message("a.example", name)).await, 502, "undiscovered");
    }
    assert_eq!(wrong.asked.lock().unwrap().len(), 1);
    assert_eq!(unsure.asked.lock().unwrap().len(), 0, "nothing is asked of somebody else");
    // For a while that is known.
    let again = Instant::now();
    is_problem(&post(&a.node("c.example"), message("a.example", "c.example")).await, 502, "undiscovered");
    assert_eq!(wrong.asked.lock().unwrap().len(), 1, "after {:?}", again.elapsed());
    a.counts("undiscovered", 5).await;
}

// === Whoever says to wait ===

fn retry_after(response: &Response) -> u64 {
    response.header("retry-after").expect("when to come again").parse().unwrap()
}

#[tokio::test]
async fn who_has_had_enough_of_a_group_is_left_alone_with_it() {
    let ds = Ds::start().await;
    let b = Gateway::start(required(&ds).with(&limit("group", "group", "1/h", 1, ""))).await;
    let a = Sender::start(&at("b.example", b.addr)).await;
    let node = a.node("b.example");
    assert_eq!(post(&node, message_in(b"one", 1)).await.status, 200);
    let theirs = post(&node, message_in(b"one", 2)).await;
    assert_eq!(theirs.status, 429, "b.example's own answer");
    assert_eq!(theirs.json()["type"], QUOTA_EXCEEDED);
    let wait = retry_after(&theirs);
    assert!((1..=3600).contains(&wait), "{wait}");
    let (refused, forwarded) =
        (requests("group_operation", "refused", "limited"), requests("group_operation", "forwarded", ""));
    b.until_metric(&refused, |n| n == 1.0).await;
    for leaf in 3..6 {
        let ours = post(&node, message_in(b"one", leaf)).await;
        is_problem(&ours, 429, "told-to-wait");
        assert!((1..=wait).contains(&retry_after(&ours)), "{} of {wait}", retry_after(&ours));
    }
    // Whichever node asks.
    is_problem(&post(&a.node("b.example"), message_in(b"one", 7)).await, 429, "told-to-wait");
    a.counts("told-to-wait", 4).await;
    assert_eq!(post(&node, message_in(b"two", 1)).await.status, 200, "another group");
    let key = encode::verification_key_request("a.example", "b.example");
    assert_eq!(node.send(Method::GET, "/verification_key", key).await.unwrap().status, 200, "another matter");
    b.until_metric(&forwarded, |n| n == 2.0).await;
    assert_eq!(b.metric(&refused).await, 1.0, "b.example was not asked again");
    assert_eq!(ds.complete(), 3);
}

#[tokio::test]
async fn who_is_not_available_is_left_alone_altogether() {
    let ds = Ds::start().await;
    let b = Gateway::start(required(&ds)).await;
    // Another provider at the same place.
    let peers = at("b.example", b.addr) + &known("also-b.example", "ds.b.example", b.addr);
    let a = Sender::start(&peers).await;
    let node = a.node("b.example");
    assert_eq!(post(&node, message_in(b"one", 1)).await.status, 200);
    ds.set_response(503, &[("retry-after", "4"), ("x-ds", "kept")], "later");
    let theirs = post(&node, message_in(b"one", 1)).await;
    let told = Instant::now();
    assert_eq!((theirs.status.as_u16(), theirs.text().as_str()), (503, "later"), "b.example's own answer");
    assert_eq!(theirs.header("x-ds"), Some("kept"));
    ds.clear_response();
    let begun = ds.begun();
    let key = encode::verification_key_request("a.example", "b.example");
    for (method, path, body) in [
        (Method::POST, "/group_operation", message_in(b"one", 1)),
        (Method::POST, "/group_operation", message_in(b"two", 1)),
        (Method::GET, "/verification_key", key),
    ] {
        let ours = node.send(method, path, body).await.unwrap();
        is_problem(&ours, 429, "told-to-wait");
        assert!((1..=4).contains(&retry_after(&ours)));
    }
    assert_eq!(ds.begun(), begun, "b.example was not asked");
    let other = message("a.example", "also-b.example");
    assert_eq!(post(&a.node("also-b.example"), other).await.status, 200, "this holds for b.example");
    // It ends by itself.
    loop {
        let response = post(&node, message_in(b"one", 1)).await;
        if response.status == 200 {
            break;
        }
        is_problem(&response, 429, "told-to-wait");
        assert!(told.elapsed() < Duration::from_secs(10), "it was to be four seconds");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(told.elapsed() > Duration::from_millis(3500), "{:?} are not four seconds", told.elapsed());
}

// === Whoever does not answer ===

#[tokio::test]
async fn who_is_down_and_who_hangs() {
    let ds = Ds::start().await;
    let setup = Setup { delivery: "read_timeout = \"30s\"", ..required(&ds) };
    let b = Gateway::start(setup).await;
    let peers = at("b.example", b.addr) + &known("c.example", "ds.c.example", free_address());
    let a = Sender::start(&peers).await;
    is_problem(&post(&a.node("c.example"), message("a.example", "c.example")).await, 502, "bad-gateway");
    a.counts("bad-gateway", 1).await;

    let node = a.node("b.example");
    assert_eq!(post(&node, send_message()).await.status, 200);
    ds.hang(true);
    let began = Instant::now();
    let response = post(&node, send_message()).await;
    is_problem(&response, 504, "gateway-timeout");
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(1900) && took < Duration::from_secs(9), "{took:?}");
    a.counts("gateway-timeout", 1).await;
    assert_eq!(ds.begun(), 2, "who may have begun is not asked twice");
    ds.hang(false);
    assert_eq!(post(&a.node("b.example"), send_message()).await.status, 200, "that was no reason to give up");

    // It was found, and is gone.
    drop(b);
    is_problem(&post(&a.node("b.example"), send_message()).await, 502, "bad-gateway");
    a.counts("bad-gateway", 2).await;
}

// === Who is a node ===

#[tokio::test]
async fn beyond_the_loopback_nodes_show_certificates() {
    let ds = Ds::start().await;
    let b = Gateway::start(required(&ds)).await;
    let dir = tempfile::tempdir().unwrap();
    let inside = Ca::new("inside");
    inside.write(dir.path(), "inside");
    let lines = "client_ca = \"inside.pem\"\nclient_names = [\"ds1.internal\", \"*.nodes.internal\"]";
    // To others it shows the first certificate.
    let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
    let a = Sender::start_in(dir, nobody, lines, &at("b.example", b.addr)).await;
    let node = |identity: &Identity| {
        Client::tls(a.egress, &ca().pem()).sni("ds.a.example").authority("b.example").identity(identity)
    };
    for name in ["ds1.internal", "7.nodes.internal"] {
        let identity = inside.issue(&[name]);
        for client in [node(&identity).http1(), node(&identity).http2()] {
            let before = ds.complete();
            let response = post(&client, send_message()).await;
            assert_eq!(response.status, 200, "{name}: {}", response.text());
            assert_eq!(ds.complete(), before + 1);
            assert_eq!(ds.requests().pop().unwrap().headers["x-moh-provider"], "a.example");
        }
    }
    let sent = ds.begun();
    for name in ["ds2.internal", "nodes.internal", "a.example"] {
        let identity = inside.issue(&[name]);
        for client in [node(&identity).http1(), node(&identity).http2()] {
            is_problem(&post(&client, send_message()).await, 403, "peer-not-allowed");
            is_problem(&ask(&client).await, 403, "peer-not-allowed");
        }
    }
    a.counts("peer-not-allowed", 12).await;
    let elsewhere = [a_example(), ca().issue(&["ds1.internal"])];
    for identity in [None, Some(&elsewhere[0]), Some(&elsewhere[1])] {
        for alpn in ["h2", "http/1.1"] {
            let handshake = async {
                // Of TLS 1.3 the client's part is over before its certificate is looked at.
                let mut stream = raw_tls(a.egress, "ds.a.example", &ca().pem(), &[alpn], identity).await?;
                // Its SETTINGS, perhaps, and no more.
                let mut rest = vec![];
                stream.read_to_end(&mut rest).await
            };
            let error = handshake.await.expect_err("a handshake that fails").to_string();
            assert!(error.contains("alert"), "{error}");
            assert!(identity.is_some() || error.contains("CertificateRequired"), "{error}");
        }
    }
    assert!(a.node("b.example").send(Method::POST, "/group_operation", send_message()).await.is_err(), "without TLS");
    assert_eq!(ds.begun(), sent);
}

#[test]
fn what_the_configuration_must_say() {
    let addresses: [SocketAddr; 3] = [2, 3, 1].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let check = |lines: &str, more: &str| {
        let dir = tempfile::tempdir().unwrap();
        let [listener, admin, ds] = addresses;
        configure(dir.path(), listener, admin, ds, lines, more);
        let output = Command::new(binary()).args(["check", "--config"]).arg(dir.path().join("gateway.toml")).output();
        let output = output.unwrap();
        (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    let names = "client_ca = \"ca.pem\"\nclient_names = [\"ds1.internal\"]";
    let peer = known("b.example", "ds.b.example", addresses[2]);
    for (lines, more) in [
        ("address = \"127.0.0.1:8081\"", ""),
        ("address = \"[::1]:8081\"", &*peer),
        (&*format!("address = \"127.0.0.1:8081\"\n{IDENTITY}\n{names}"), ""),
        (&*format!("address = \"0.0.0.0:8081\"\n{names}"), ""),
        (&*format!("address = \"[::]:8081\"\n{names}"), &*peer),
    ] {
        let (ok, said) = check(lines, more);
        assert!(ok, "{lines}: {said}");
    }
    for (lines, more, key) in [
        ("address = \"0.0.0.0:8081\"", "", "egress.address"),
        ("address = \"[::]:8081\"", "", "egress.address"),
        ("address = \"192.0.2.1:8081\"", "", "egress.address"),
        // Where the listener for other providers is.
        ("address = \"127.0.0.1:2\"", "", "egress.address"),
        ("address = \"0.0.0.0:8081\"\nclient_ca = \"ca.pem\"", "", "egress.client_names"),
        ("address = \"127.0.0.1:8081\"\nclient_names = [\"ds1.internal\"]", "", "egress.client_names"),
        ("address = \"127.0.0.1:8081\"\ncertificate = \"a.pem\"", "", "egress.key"),
        ("address = \"127.0.0.1:8081\"\ncertificate = \"a.pem\"\nkey = \"nowhere\"", "", "egress.key"),
        ("address = \"127.0.0.1:8081\"", "[[egress.peer]]\nprovider = \"b.example\"", "egress.peer[0]"),
        ("address = \"127.0.0.1:8081\"", &*(peer.clone() + &peer), "egress.peer[1].provider"),
    ] {
        let (ok, said) = check(lines, more);
        assert!(!ok, "{lines}\n{more}: {said}");
        assert!(said.contains(key), "{key} in {said}");
    }
}
