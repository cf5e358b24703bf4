//! `proxyDownload`: another provider gets an asset through this one, and the asset's server learns nothing of who asks.
//!
//! Servers of assets are on the loopback here, which `allow_private` lets be asked. What holds without it is seen in a
//! network of a test's own (namespaces of Linux, made by `unshare`), in which it has a public address and a few names.

use crate::egress::trap;
use crate::harness::{Gateway, Setup, a_example, ca};
use crate::mimi::{FROM, MIMI, peer, refused_by_check, required};
use crate::refusals::{both, is_problem};
use crate::support::client::{Client, Error, Response, raw_tls};
use crate::support::ds::Ds;
use crate::support::mimi::path;
use crate::support::pki::{Ca, Identity, now};
use crate::tokens::outcome;
use bytes::Bytes;
use http::Method;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

/// How long anything may take that is to happen soon.
const PATIENCE: Duration = Duration::from_secs(5);

// === A network of its own ===

/// Names a file that is there once a test has come to its end in a network of its own.
const DONE: &str = "MOH_GATEWAY_TEST_DONE";

/// An address of the public Internet, which is a test's own in its network.
const PUBLIC: Ipv4Addr = Ipv4Addr::new(20, 0, 0, 1);

/// All names that resolve there.
const NAMES: &str = "127.0.0.1 localhost
20.0.0.1 assets.a.example one.cdn.a.example two.one.cdn.a.example cdn.a.example evil.example
127.0.0.1 inside.a.example
20.0.0.1 mixed.a.example
::1 mixed.a.example
";

/// Makes the network, where the first argument names a file of names, and runs the rest in it.
const NETWORK: &str = "ip link set lo up && ip address add 20.0.0.1/32 dev lo && mount --bind \"$1\" /etc/hosts && \
                       shift && exec \"$@\"";

/// A command in a network of its own.
fn network(names: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", "--mount", "sh", "-c", NETWORK, "sh"]).arg(names);
    command
}

/// Runs a test of this file, by its name, in a network of its own: in another process, which is this program again.
fn apart(name: &str, test: impl AsyncFnOnce()) {
    if let Some(done) = std::env::var_os(DONE) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
        std::fs::write(done, "").unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (names, done) = (dir.path().join("hosts"), dir.path().join("done"));
    std::fs::write(&names, NAMES).unwrap();
    if !network(&names).arg("true").output().is_ok_and(|output| output.status.success()) {
        eprintln!("{name}: not run, for this machine allows no network of its own (unshare --user --net --mount)");
        return;
    }
    let mut command = network(&names);
    command.arg(std::env::current_exe().unwrap()).args([&*format!("download::{name}"), "--exact", "--nocapture"]);
    let output = command.env(DONE, &done).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && done.exists(), "{}", String::from_utf8_lossy(&said));
}

// === Servers of assets ===

/// The authority that certifies servers of assets. Those of the federation are another's.
fn assets() -> &'static Ca {
    static ASSETS: OnceLock<Ca> = OnceLock::new();
    ASSETS.get_or_init(|| Ca::new("assets"))
}

/// What a server does once it has the head of a request.
enum Step {
    Say(Vec<u8>),
    Wait(Duration),
    /// Until it is told to go on.
    Pause(Arc<Notify>),
}

/// A request that came to a server.
struct Asked {
    head: String,
    shows_certificate: bool,
}

/// A server of assets.
struct Server {
    addr: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    connections: Arc<AtomicUsize>,
}

/// Any port of the loopback.
const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Whom a server on the loopback is.
fn localhost() -> Identity {
    assets().issue(&["localhost"])
}

fn acceptor(Identity { chain_pem, key_pem }: &Identity, alpn: &[u8]) -> TlsAcceptor {
    let chain = CertificateDer::pem_slice_iter(chain_pem.as_bytes()).map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).unwrap();
    // It would like to know who comes.
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca().pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let verifier = verifier.allow_unauthenticated().build().unwrap();
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![alpn.to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

impl Server {
    /// One of HTTP/1.1, made by hand: a request a connection. What it does depends on the path.
    async fn start(
        at: SocketAddr,
        identity: &Identity,
        answer: impl Fn(&str) -> Vec<Step> + Send + Sync + 'static,
    ) -> Server {
        let acceptor = acceptor(identity, b"http/1.1");
        let (server, listener) = Server::bind(at).await;
        let (asked, connections, answer) = (server.asked.clone(), server.connections.clone(), Arc::new(answer));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.fetch_add(1, SeqCst);
                let (acceptor, asked, answer) = (acceptor.clone(), asked.clone(), answer.clone());
                tokio::spawn(async move { serve(stream, &acceptor, &asked, &*answer).await });
            }
        });
        server
    }

    /// One of HTTP/2, which answers everything with these octets.
    async fn start_h2(at: SocketAddr, identity: &Identity, body: Vec<u8>) -> Server {
        let acceptor = acceptor(identity, b"h2");
        let (server, listener) = Server::bind(at).await;
        let (asked, connections, body) = (server.asked.clone(), server.connections.clone(), Bytes::from(body));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.fetch_add(1, SeqCst);
                let (acceptor, asked, body) = (acceptor.clone(), asked.clone(), body.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let shows_certificate = stream.get_ref().1.peer_certificates().is_some();
                    let service = service_fn(move |request: http::Request<Incoming>| {
                        asked.lock().unwrap().push(Asked { head: written_out(&request), shows_certificate });
                        let response = http::Response::builder().header("set-cookie", "a=b").header("etag", "\"x\"");
                        std::future::ready(Ok::<_, Infallible>(response.body(Full::new(body.clone())).unwrap()))
                    });
                    let server = http2::Builder::new(TokioExecutor::new());
                    let _ = server.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        server
    }

    async fn bind(at: SocketAddr) -> (Server, TcpListener) {
        let listener = TcpListener::bind(at).await.unwrap();
        let addr = listener.local_addr().unwrap();
        (Server { addr, asked: Arc::default(), connections: Arc::default() }, listener)
    }

    /// The host of its URLs, where it is on the loopback.
    fn host(&self) -> String {
        format!("localhost:{}", self.addr.port())
    }

    fn url(&self, target: &str) -> String {
        format!("https://{}{target}", self.host())
    }

    /// The heads of the requests so far.
    fn heads(&self) -> Vec<String> {
        self.asked.lock().unwrap().iter().map(|asked| asked.head.clone()).collect()
    }

    /// How often somebody has connected.
    fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }
}

/// The head of a request, as it would be in HTTP/1.1.
fn written_out(request: &http::Request<Incoming>) -> String {
    let (uri, authority) = (request.uri(), request.uri().authority());
    let target = uri.path_and_query().map_or("", |target| target.as_str());
    let mut head = format!("{} {target} HTTP/2\r\n", request.method());
    if let Some(authority) = authority {
        head += &format!("host: {authority}\r\n");
    }
    for (name, value) in request.headers() {
        head += &format!("{name}: {}\r\n", String::from_utf8_lossy(value.as_bytes()));
    }
    head + "\r\n"
}

async fn serve(
    stream: TcpStream,
    acceptor: &TlsAcceptor,
    asked: &Mutex<Vec<Asked>>,
    answer: &(dyn Fn(&str) -> Vec<Step> + Send + Sync),
) -> std::io::Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    let shows_certificate = stream.get_ref().1.peer_certificates().is_some();
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8(head).unwrap();
    let steps = answer(head.split(' ').nth(1).unwrap());
    asked.lock().unwrap().push(Asked { head, shows_certificate });
    for step in steps {
        match step {
            Step::Say(octets) => {
                stream.write_all(&octets).await?;
                stream.flush().await?;
            }
            Step::Wait(time) => tokio::time::sleep(time).await,
            Step::Pause(until) => until.notified().await,
        }
    }
    stream.shutdown().await
}

/// The head of an answer. Each of the fields has a line of its own.
fn head(status: &str, fields: &[&str]) -> Vec<u8> {
    let fields: String = fields.iter().map(|field| format!("{field}\r\n")).collect();
    format!("HTTP/1.1 {status}\r\nConnection: close\r\n{fields}\r\n").into_bytes()
}

/// An answer that says how long it is.
fn whole(status: &str, fields: &[&str], body: &[u8]) -> Vec<Step> {
    let length = format!("Content-Length: {}", body.len());
    let fields: Vec<&str> = fields.iter().copied().chain([length.as_str()]).collect();
    vec![Step::Say([head(status, &fields), body.to_vec()].concat())]
}

/// An answer in chunks.
fn chunked(body: &[u8]) -> Vec<Step> {
    let mut octets = head("200 OK", &["Transfer-Encoding: chunked"]);
    for chunk in body.chunks(10_007) {
        octets.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
        octets.extend(chunk);
        octets.extend(b"\r\n");
    }
    octets.extend(b"0\r\n\r\n");
    vec![Step::Say(octets)]
}

/// An answer that ends where the connection does.
fn until_the_end(body: &[u8]) -> Vec<Step> {
    vec![Step::Say([head("200 OK", &[]), body.to_vec()].concat())]
}

/// Octets of an asset.
fn octets(count: usize) -> Vec<u8> {
    (0..count).map(|n| (n % 251) as u8).collect()
}

// === Who asks ===

/// The table of a gateway that makes downloads from these hosts, wherever they are.
fn table(hosts: &[&str], lines: &str) -> String {
    format!("[proxy_download]\nca = \"assets.pem\"\nhosts = {hosts:?}\nallow_private = true\n{lines}\n")
}

/// A gateway that makes downloads from a server.
async fn start(ds: &Ds, server: &Server, lines: &str) -> Gateway {
    start_with(required(ds).with(&table(&[&server.host()], lines))).await
}

/// A gateway that has the root of the servers of assets beside its configuration.
async fn start_with(setup: Setup) -> Gateway {
    let dir = tempfile::tempdir().unwrap();
    assets().write(dir.path(), "assets");
    Gateway::start_in(dir, setup).await
}

async fn ask_with(client: &Client, url: &str, fields: &[(&str, &str)]) -> Result<Response, Error> {
    let fields: Vec<_> = fields.iter().copied().chain([("content-type", "")]).collect();
    client.send_with(Method::GET, &path("proxyDownload", url.as_bytes()), &fields, "").await
}

async fn ask(client: &Client, url: &str) -> Result<Response, Error> {
    ask_with(client, url, &[FROM]).await
}

/// An answer that did not come to its end, or that is a refusal; not one that is taken for whole.
fn is_broken_off(result: Result<Response, Error>, status: u16) {
    match result {
        Ok(response) => assert_eq!(response.status, status, "{} octets came", response.body.len()),
        Err(error) => assert!(!error.to_string().contains("in time"), "{error}"),
    }
}

// === What passes ===

/// Fields of whoever asks, that none other is to see.
const ASKERS: [(&str, &str); 10] = [
    FROM,
    ("authorization", "Bearer of-the-asker"),
    ("cookie", "who=of-the-asker"),
    ("user-agent", "of-the-asker"),
    ("referer", "https://of-the-asker.example/"),
    ("accept-language", "of-the-asker"),
    ("forwarded", "for=192.0.2.7"),
    ("x-forwarded-for", "192.0.2.7"),
    ("x-anything", "of-the-asker"),
    ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
];

/// The head of a request tells nothing of who asks, nor of whom it was asked.
fn tells_nothing(asked: &Asked, host: &str) {
    assert!(!asked.shows_certificate, "none of ours is shown");
    let head = asked.head.to_lowercase();
    for trace in ["of-the-asker", "mimi@", "b.example", "192.0.2.7", "127.", "4bf92f3577b34da6a3ce929d0e0e4736", "moh"]
    {
        assert!(!head.contains(trace), "{trace} in {head}");
    }
    let names: Vec<&str> = head.lines().skip(1).filter_map(|line| Some(line.split_once(':')?.0)).collect();
    for (name, _) in ASKERS.iter().chain([&("x-request-id", ""), &("via", ""), &("content-type", "")]) {
        assert!(!names.contains(name), "{name} in {head}");
    }
    let hosts: Vec<&str> = head.lines().filter_map(|line| line.strip_prefix("host: ")).collect();
    assert!(!hosts.is_empty() && hosts.iter().all(|named| *named == host), "{head}");
}

/// What servers say that is not to be passed on.
const NOT_PASSED: [&str; 6] = [
    "Set-Cookie: a=b",
    "Set-Cookie: c=d",
    "Location: https://evil.example/",
    "Alt-Svc: h2=\"evil.example:443\"",
    "X-Moh-Provider: evil.example",
    "WWW-Authenticate: Basic",
];

/// A target with all that could be taken for something else.
const QUERY: &str = "/a//b/../c?signature=x%2fy%2F..&u=https://evil.example/";

#[tokio::test]
async fn an_asset_passes_octet_for_octet_and_who_asks_does_not() {
    let asset = octets(3 << 20);
    let of = asset.clone();
    let server = Server::start(LOOPBACK, &localhost(), move |path| match path {
        "/" | QUERY => {
            let passed = ["Content-Type: application/octet-stream", "ETag: \"x\""];
            whole("200 OK", &[&passed[..], &NOT_PASSED[..]].concat(), &of)
        }
        "/chunked" => chunked(&of),
        "/until-the-end" => until_the_end(&of),
        "/gone" => whole("410 Gone", &NOT_PASSED, b"it is gone"),
        "/empty" => whole("200 OK", &[], b""),
        other => panic!("nobody asked for {other}"),
    })
    .await;
    let ds = Ds::start().await;
    let gateway = start(&ds, &server, "").await;
    for client in both(|| peer(&gateway)) {
        for target in ["/", QUERY, "/chunked", "/until-the-end", "/gone", "/empty"] {
            let response = ask_with(&client, &server.url(target), &ASKERS).await.unwrap();
            let (status, body) = match target {
                "/gone" => (410, &b"it is gone"[..]),
                "/empty" => (200, &b""[..]),
                _ => (200, &asset[..]),
            };
            assert_eq!(response.status, status, "{target}");
            assert!(response.body == body, "{target}: {} octets", response.body.len());
            for field in NOT_PASSED {
                let (name, _) = field.split_once(':').unwrap();
                assert_eq!(response.header(name), None, "{name} of {target}");
            }
            if target == "/" || target == QUERY {
                assert_eq!(response.header("content-type"), Some("application/octet-stream"));
                assert_eq!(response.header("etag"), Some("\"x\""));
            }
            let asked = server.asked.lock().unwrap().pop().unwrap();
            assert!(asked.head.starts_with(&format!("GET {target} HTTP/1.1\r\n")), "{}", asked.head);
            tells_nothing(&asked, &server.host());
        }
    }
    assert!(server.heads().is_empty(), "each was asked for once");
    assert_eq!(ds.begun(), 0, "the Delivery Service has no part in it");
}

#[tokio::test]
async fn an_asset_of_a_server_of_http2() {
    let asset = octets(1 << 20);
    let server = Server::start_h2(LOOPBACK, &localhost(), asset.clone()).await;
    let ds = Ds::start().await;
    let gateway = start(&ds, &server, "").await;
    for client in both(|| peer(&gateway)) {
        let response = ask_with(&client, &server.url("/a?b=c"), &ASKERS).await.unwrap();
        assert_eq!(response.status, 200, "{}", response.text());
        assert!(response.body == asset, "{} octets", response.body.len());
        assert_eq!((response.header("etag"), response.header("set-cookie")), (Some("\"x\""), None));
        let asked = server.asked.lock().unwrap().pop().unwrap();
        assert!(asked.head.starts_with("GET /a?b=c HTTP/2\r\n"), "{}", asked.head);
        tells_nothing(&asked, &server.host());
    }
    assert_eq!(ds.begun(), 0);
}

#[tokio::test]
async fn a_part_of_an_asset_and_one_that_is_there_already() {
    let server = Server::start(LOOPBACK, &localhost(), |path| match path {
        "/part" => whole("206 Partial Content", &["Content-Range: bytes 2-5/100"], b"part"),
        _ => vec![Step::Say(head("304 Not Modified", &["ETag: \"x\""]))],
    })
    .await;
    let ds = Ds::start().await;
    let gateway = start(&ds, &server, "").await;
    for client in both(|| peer(&gateway)) {
        let part = ask_with(&client, &server.url("/part"), &[FROM, ("range", "bytes=2-5")]).await.unwrap();
        assert_eq!((part.status.as_u16(), part.text().as_str()), (206, "part"));
        assert_eq!(part.header("content-range"), Some("bytes 2-5/100"));
        let same = ask_with(&client, &server.url("/same"), &[FROM, ("if-none-match", "\"x\"")]).await.unwrap();
        assert_eq!((same.status.as_u16(), same.body.len()), (304, 0));
        let heads = server.heads();
        let [.., part, same] = &heads[..] else { panic!("{heads:?}") };
        assert!(part.to_lowercase().contains("\r\nrange: bytes=2-5\r\n"), "{part}");
        assert!(same.to_lowercase().contains("\r\nif-none-match: \"x\"\r\n"), "{same}");
    }
}

#[tokio::test]
async fn an_asset_passes_as_it_comes() {
    let (go_on, first) = (Arc::new(Notify::new()), octets(100_000));
    let (until, begin) = (go_on.clone(), first.clone());
    let server = Server::start(LOOPBACK, &localhost(), move |_| {
        let head = head("200 OK", &["Content-Length: 100008"]);
        let begin = [head, begin.clone()].concat();
        vec![Step::Say(begin), Step::Pause(until.clone()), Step::Say(b"the rest".to_vec())]
    })
    .await;
    let ds = Ds::start().await;
    let gateway = start(&ds, &server, "").await;
    let identity = a_example();
    let stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["http/1.1"], Some(&identity)).await;
    let mut stream = stream.unwrap();
    let target = path("proxyDownload", server.url("/").as_bytes());
    let request = format!("GET {target} HTTP/1.1\r\nHost: b.example\r\nFrom: {}\r\nConnection: close\r\n\r\n", FROM.1);
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut got = vec![];
    while !got.ends_with(&first[50_000..]) {
        let mut piece = [0; 16 << 10];
        let read = tokio::time::timeout(PATIENCE, stream.read(&mut piece)).await;
        let count = read.expect("what was sent comes before the rest is").unwrap();
        assert_ne!(count, 0, "it ended after {} octets", got.len());
        got.extend_from_slice(&piece[..count]);
    }
    go_on.notify_one();
    stream.read_to_end(&mut got).await.unwrap();
    assert!(got.starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", String::from_utf8_lossy(&got[..100]));
    assert!(got.ends_with(&[&first[..], b"the rest"].concat()), "octet for octet");
}

#[test]
fn an_asset_at_a_public_address() {
    apart("an_asset_at_a_public_address", async || {
        let identity = assets().issue(&["assets.a.example", "*.cdn.a.example", "*.one.cdn.a.example", "evil.example"]);
        let server = Server::start(SocketAddr::from((PUBLIC, 443)), &identity, |path| {
            whole("200 OK", &NOT_PASSED, path.as_bytes())
        })
        .await;
        let ds = Ds::start().await;
        let lines = "[proxy_download]\nca = \"assets.pem\"\nhosts = [\"assets.a.example\", \"*.cdn.a.example\"]";
        let gateway = start_with(required(&ds).with(lines)).await;
        for client in both(|| peer(&gateway)) {
            for (host, target) in [("assets.a.example", "/"), ("one.cdn.a.example", QUERY)] {
                let response = ask_with(&client, &format!("https://{host}{target}"), &ASKERS).await.unwrap();
                assert_eq!((response.status.as_u16(), response.text().as_str()), (200, target), "{host}");
                let asked = server.asked.lock().unwrap().pop().unwrap();
                tells_nothing(&asked, host);
            }
            // They are all at this address.
            let before = server.connections();
            for host in ["evil.example", "cdn.a.example", "two.one.cdn.a.example"] {
                is_problem(&ask(&client, &format!("https://{host}/")).await.unwrap(), 403, "download-not-listed");
            }
            assert_eq!(server.connections(), before);
        }
        assert_eq!((server.heads().len(), ds.begun()), (0, 0));
    });
}

// === What is not asked ===

#[tokio::test]
async fn nobody_is_asked_but_who_is_on_the_list() {
    let server = Server::start(LOOPBACK, &localhost(), |_| whole("200 OK", &[], b"an asset")).await;
    let other = Server::start(LOOPBACK, &localhost(), |_| whole("200 OK", &[], b"another")).await;
    let ds = Ds::start().await;
    let gateway = start(&ds, &server, "").await;
    let (host, port) = (server.host(), server.addr.port());
    let not_listed = [
        other.url("/"),
        "https://localhost/".to_owned(),
        "https://evil.example/".to_owned(),
        format!("https://evil.example:{port}/"),
        format!("https://x.{host}/"),
        format!("https://localhost.evil.example:{port}/"),
        format!("https://evil.example/{host}/"),
        format!("https://evil.example/https://{host}/"),
        format!("https://evil.example?https://{host}/"),
        format!("https://evil.example/@{host}/"),
    ];
    let no_urls = [
        format!("http://{host}/"),
        format!("ftp://{host}/"),
        "file:///etc/passwd".to_owned(),
        format!("//{host}/"),
        format!("{host}/"),
        format!("https:{host}/"),
        format!("https:\\\\{host}/"),
        "https://".to_owned(),
        format!("https:///{host}/"),
        format!("https://{host}@evil.example/"),
        format!("https://localhost@evil.example:{port}/"),
        format!("https://evil.example@{host}/"),
        format!("https://user:word@{host}/"),
        format!("https://evil.example\\@{host}/"),
        format!("https://{host}\\@evil.example/"),
        "https://localhost%40evil.example/".to_owned(),
        "https://localhost%2f@evil.example/".to_owned(),
        format!("https://{host}#@evil.example/"),
        format!("https://evil.example#.{host}/"),
        format!("https://localhost.:{port}/"),
        format!("https://%6cocalhost:{port}/"),
        format!("https://localhost:0{port}/"),
        format!("https://localhost:{port}:{port}/"),
        format!("https://localhost\u{3002}evil.example:{port}/"),
        format!("https://{host}/\r\nHost: evil.example"),
        format!("https://{host}/\0"),
        format!("https://{host}/ a"),
        format!("https://127.0.0.1:{port}/"),
        format!("https://2130706433:{port}/"),
        format!("https://0x7f.0.0.1:{port}/"),
        format!("https://[::ffff:127.0.0.1]:{port}/"),
        format!("https://[::1]:{port}/"),
        "..".to_owned(),
    ];
    for client in both(|| peer(&gateway)) {
        for url in &not_listed {
            let response = ask(&client, url).await.unwrap();
            assert_eq!(outcome(&response), (403, "download-not-listed".to_owned()), "{url}");
        }
        for url in &no_urls {
            let response = ask(&client, url).await.unwrap();
            assert_eq!(response.status, 400, "{url:?}: {}", response.text());
            assert_eq!(response.header("content-type"), Some("application/problem+json"));
        }
    }
    assert_eq!((server.connections(), other.connections()), (0, 0), "nobody was asked");
    let response = ask(&peer(&gateway), &format!("HTTPS://LocalHost:{port}/")).await.unwrap();
    assert_eq!((response.status.as_u16(), response.text().as_str()), (200, "an asset"));
    assert_eq!((server.heads().len(), other.connections(), ds.begun()), (1, 0, 0));
}

#[tokio::test]
async fn without_a_list_there_is_no_download() {
    let ds = Ds::start().await;
    for more in ["", "[proxy_download]\nca = \"ca.pem\"\nhosts = []\n"] {
        let gateway = Gateway::start(required(&ds).with(more)).await;
        for client in both(|| peer(&gateway)) {
            for url in ["https://assets.a.example/", "https://ds.b.example/", "https://localhost/"] {
                let response = ask(&client, url).await.unwrap();
                assert_eq!(outcome(&response), (403, "download-not-listed".to_owned()), "{url}");
            }
        }
    }
    assert_eq!(ds.begun(), 0);
}

#[tokio::test]
async fn a_name_of_this_machine_is_not_asked_unless_that_is_allowed() {
    let ds = Ds::start().await;
    let (place, came) = trap(LOOPBACK).await.expect("a free port");
    let name = format!("localhost:{}", place.port());
    let refuses = table(&[&name], "").replace("allow_private = true", "# allow_private");
    let gateway = start_with(required(&ds).with(&refuses)).await;
    for client in both(|| peer(&gateway)) {
        let response = ask(&client, &format!("https://{name}/")).await.unwrap();
        is_problem(&response, 502, "download-private-address");
        assert!(!response.text().contains("127.0.0.1"), "nothing of it is told: {}", response.text());
    }
    assert_eq!(came.load(SeqCst), 0, "somebody was led to a place of ours");
    assert_eq!(ds.begun(), 0);
}

#[test]
fn one_private_address_is_one_too_many() {
    apart("one_private_address_is_one_too_many", async || {
        let mut traps = vec![];
        for place in [SocketAddr::from(([127, 0, 0, 1], 443)), SocketAddr::from((PUBLIC, 443))] {
            traps.push(trap(place).await.expect("a port of its own"));
        }
        let ds = Ds::start().await;
        let hosts = "hosts = [\"inside.a.example\", \"mixed.a.example\", \"nowhere.invalid\"]";
        let lines = format!("[proxy_download]\nca = \"assets.pem\"\n{hosts}");
        let gateway = start_with(required(&ds).with(&lines)).await;
        for client in both(|| peer(&gateway)) {
            for host in ["inside.a.example", "mixed.a.example"] {
                let response = ask(&client, &format!("https://{host}/")).await.unwrap();
                is_problem(&response, 502, "download-private-address");
            }
            is_problem(&ask(&client, "https://nowhere.invalid/").await.unwrap(), 502, "download-unresolved");
        }
        assert!(traps.iter().all(|(_, came)| came.load(SeqCst) == 0), "somebody was led somewhere");
    });
}

#[tokio::test]
async fn who_is_not_whom_it_should_be_is_not_asked() {
    let ok = |_: &str| whole("200 OK", &[], b"an asset");
    let identities = [
        Ca::new("others").issue(&["localhost"]),
        ca().issue(&["localhost"]),
        assets().issue(&["evil.example"]),
        assets().issue_with(&["localhost"], |params| params.not_after = now(-60)),
    ];
    let mut servers = vec![];
    for identity in &identities {
        servers.push(Server::start(LOOPBACK, identity, ok).await);
    }
    // And one who is not there.
    let nobody = std::net::TcpListener::bind(LOOPBACK).unwrap().local_addr().unwrap();
    let mut hosts: Vec<String> = servers.iter().map(Server::host).collect();
    hosts.push(format!("localhost:{}", nobody.port()));
    let listed: Vec<&str> = hosts.iter().map(String::as_str).collect();
    let ds = Ds::start().await;
    let gateway = start_with(required(&ds).with(&table(&listed, ""))).await;
    for client in both(|| peer(&gateway)) {
        for host in &hosts {
            let response = ask(&client, &format!("https://{host}/")).await.unwrap();
            assert_eq!(response.status, 502, "{host}: {}", response.text());
        }
    }
    for server in &servers {
        assert!(server.connections() > 0 && server.heads().is_empty(), "{:?}", server.heads());
    }
    assert_eq!(ds.begun(), 0);
}

// === What does not pass ===

#[tokio::test]
async fn nobody_is_led_elsewhere() {
    let (place, came) = trap(LOOPBACK).await.expect("a free port");
    let away = format!("Location: https://localhost:{}/altogether", place.port());
    let server = Server::start(LOOPBACK, &localhost(), move |path| match path {
        "/here" => whole("301 Moved Permanently", &["Location: /altogether"], b""),
        "/away" => whole("302 Found", &[&away], b""),
        "/inside" => whole("307 Temporary Redirect", &["Location: http://127.0.0.1/"], b"a body"),
        "/many" => whole("300 Multiple Choices", &[], b"https://localhost/altogether"),
        other => panic!("nobody asked for {other}"),
    })
    .await;
    let ds = Ds::start().await;
    let (here, away) = (server.host(), format!("localhost:{}", place.port()));
    let gateway = start_with(required(&ds).with(&table(&[&here, &away], ""))).await;
    for client in both(|| peer(&gateway)) {
        for target in ["/here", "/away", "/inside", "/many"] {
            let response = ask(&client, &server.url(target)).await.unwrap();
            is_problem(&response, 502, "download-redirected");
            assert_eq!(response.header("location"), None);
            assert!(!response.text().contains("altogether"), "{}", response.text());
        }
    }
    assert_eq!(server.heads().len(), 8, "each was asked for once, and nothing else");
    assert_eq!(came.load(SeqCst), 0, "somebody was led away");
}

#[tokio::test]
async fn what_is_too_large_does_not_pass() {
    const MOST: usize = 64 << 10;
    let server = Server::start(LOOPBACK, &localhost(), |path| match path {
        "/whole" => whole("200 OK", &[], &octets(MOST)),
        "/chunked" => chunked(&octets(MOST)),
        "/until-the-end" => until_the_end(&octets(MOST)),
        "/over/whole" => whole("200 OK", &[], &octets(MOST + 1)),
        "/over/said" => vec![Step::Say(head("200 OK", &["Content-Length: 99999999999999999999"]))],
        "/over/chunked" => chunked(&octets(MOST + 1)),
        "/over/until-the-end" => until_the_end(&octets(MOST + 1)),
        "/far-over/chunked" => chunked(&octets(4 << 20)),
        "/far-over/until-the-end" => until_the_end(&octets(4 << 20)),
        other => panic!("nobody asked for {other}"),
    })
    .await;
    let ds = Ds::start().await;
    let gateway = start(&ds, &server, "max_size = \"64KiB\"").await;
    for http1 in [true, false] {
        // An answer that is cut short may be the end of its connection.
        let client = || if http1 { peer(&gateway).http1() } else { peer(&gateway) };
        for target in ["/whole", "/chunked", "/until-the-end"] {
            let response = ask(&client(), &server.url(target)).await.unwrap();
            assert_eq!(response.status, 200, "{target}: {}", response.text());
            assert!(response.body == octets(MOST), "{target}: {} octets", response.body.len());
        }
        is_problem(&ask(&client(), &server.url("/over/whole")).await.unwrap(), 502, "download-too-large");
        let said = ask(&client(), &server.url("/over/said")).await.unwrap();
        assert_eq!(said.status, 502, "no number that anybody reads: {}", said.text());
        for target in ["/over/chunked", "/over/until-the-end", "/far-over/chunked", "/far-over/until-the-end"] {
            is_broken_off(ask(&client(), &server.url(target)).await, 502);
        }
    }
    assert_eq!(server.heads().len(), 2 * 9, "each was asked for once");
    assert_eq!(ask(&peer(&gateway), &server.url("/whole")).await.unwrap().status, 200);
}

#[tokio::test]
async fn what_is_too_slow_is_given_up() {
    let server = Server::start(LOOPBACK, &localhost(), |path| match path {
        "/silent" => vec![Step::Wait(Duration::from_secs(8))],
        _ => {
            let begin = Step::Say(head("200 OK", &["Content-Length: 40"]));
            let drips = (0..40).flat_map(|_| [Step::Wait(Duration::from_millis(200)), Step::Say(b"x".to_vec())]);
            [begin].into_iter().chain(drips).collect()
        }
    })
    .await;
    let ds = Ds::start().await;
    for lines in ["timeout = \"1s\"", "timeout = \"1s\"\nidle_timeout = \"400ms\""] {
        let gateway = start(&ds, &server, lines).await;
        for client in both(|| peer(&gateway)) {
            let began = Instant::now();
            let silent = ask(&client, &server.url("/silent")).await.unwrap();
            assert_eq!(silent.status, 504, "{lines}: {}", silent.text());
            let took = began.elapsed();
            assert!(took > Duration::from_millis(300) && took < PATIENCE, "{lines}: {took:?}");

            let began = Instant::now();
            is_broken_off(ask(&client, &server.url("/drips")).await, 504);
            let took = began.elapsed();
            assert!(took > Duration::from_millis(900) && took < PATIENCE, "{lines}: {took:?}");
        }
    }
}

// === Who may ask, and how often ===

#[tokio::test]
async fn who_asks_is_whom_it_says_and_brings_nothing() {
    let server = Server::start(LOOPBACK, &localhost(), |_| whole("200 OK", &[], b"an asset")).await;
    let ds = Ds::start().await;
    let setup = Setup::of(&ds).listener(MIMI).with(&table(&[&server.host()], ""));
    let gateway = start_with(setup).await;
    let url = server.url("/");
    let other = ca().issue(&["c.example"]);
    for client in both(|| gateway.stranger().authority("b.example")) {
        is_problem(&ask(&client, &url).await.unwrap(), 403, "sender-mismatch");
    }
    for client in both(|| gateway.stranger().identity(&other).authority("b.example")) {
        is_problem(&ask(&client, &url).await.unwrap(), 403, "sender-mismatch");
    }
    for client in both(|| peer(&gateway)) {
        let heads: [&[(&str, &str)]; 3] = [&[], &[FROM, FROM], &[("from", "alice@a.example")]];
        for fields in heads {
            is_problem(&ask_with(&client, &url, fields).await.unwrap(), 400, "malformed");
        }
        let target = path("proxyDownload", url.as_bytes());
        let posted = client.send_with(Method::POST, &target, &[FROM], "").await.unwrap();
        is_problem(&posted, 405, "wrong-method");
        assert_eq!(posted.header("allow"), Some("GET"));
        let body = client.send_with(Method::GET, &target, &[FROM], "a body").await.unwrap();
        assert_eq!(body.status, 400, "{}", body.text());
    }
    for client in both(|| gateway.peer().authority("c.example")) {
        is_problem(&ask(&client, &url).await.unwrap(), 421, "misdirected");
    }
    assert_eq!(server.connections(), 0);
    for client in both(|| peer(&gateway)) {
        assert_eq!(ask(&client, &url).await.unwrap().status, 200);
    }
    assert_eq!((server.heads().len(), ds.begun()), (2, 0));
}

#[tokio::test]
async fn downloads_have_a_limit_of_their_own() {
    let server = Server::start(LOOPBACK, &localhost(), |_| whole("200 OK", &[], b"an asset")).await;
    let ds = Ds::start().await;
    let limit = "[[limit]]\nname = \"downloads\"\nendpoints = [\"proxyDownload\"]\nkey = [\"provider\"]\nrate = \
                 \"1/h\"\nburst = 2\n";
    let gateway = start_with(required(&ds).with(&table(&[&server.host()], "")).with(limit)).await;
    for (name, from) in [("a.example", "mimi@a.example"), ("c.example", "mimi@c.example")] {
        let client = gateway.stranger().identity(&ca().issue(&[name])).authority("b.example");
        for expected in [200, 200, 429, 429] {
            let response = ask_with(&client, &server.url("/"), &[("from", from)]).await.unwrap();
            assert_eq!(response.status, expected, "{name}: {}", response.text());
            if expected == 429 {
                assert_eq!(response.json()["violated-policies"][0], "downloads");
                assert!(response.header("retry-after").is_some());
            }
        }
    }
    assert_eq!((server.heads().len(), ds.begun()), (4, 0), "what is refused asks nobody");
}

// === Configuration ===

#[tokio::test]
async fn the_list_is_exchanged_while_it_runs() {
    let one = Server::start(LOOPBACK, &localhost(), |_| whole("200 OK", &[], b"an asset")).await;
    let two = Server::start(LOOPBACK, &localhost(), |_| whole("200 OK", &[], b"another")).await;
    let ds = Ds::start().await;
    let mut gateway = start_with(required(&ds)).await;
    let client = peer(&gateway);
    let statuses = async || {
        let mut statuses = vec![];
        for server in [&one, &two] {
            statuses.push(ask(&client, &server.url("/")).await.unwrap().status.as_u16());
        }
        statuses
    };
    let (at_one, at_two) = (one.host(), two.host());
    assert_eq!(statuses().await, [403, 403]);
    gateway.reload("ok", |setup| setup.more = table(&[&at_one], "")).await;
    assert_eq!(statuses().await, [200, 403]);
    gateway.reload("ok", |setup| setup.more = table(&[&at_two], "")).await;
    assert_eq!(statuses().await, [403, 200]);
    gateway.reload("failed", |setup| setup.more = table(&["127.0.0.1"], "")).await;
    assert_eq!(statuses().await, [403, 200]);
    gateway.reload("ok", |setup| setup.more = table(&[&at_one, &at_two], "max_size = \"5B\"")).await;
    assert_eq!(statuses().await, [502, 502]);
    gateway.reload("ok", |setup| setup.more = String::new()).await;
    assert_eq!(statuses().await, [403, 403]);
    assert_eq!(client.connections(), 1);
}

#[test]
fn what_the_configuration_must_say() {
    let nodes = [SocketAddr::from(([127, 0, 0, 1], 3))];
    for (lines, at, key) in [
        ("ca = \"ca.pem\"\nhosts = [\"127.0.0.1\"]", "hosts = ", "proxy_download.hosts"),
        ("ca = \"ca.pem\"\nhosts = [\"https://assets.a.example/\"]", "hosts = ", "proxy_download.hosts"),
        ("ca = \"ca.pem\"\nhosts = [\"assets.a.example\", \"*\"]", "hosts = ", "proxy_download.hosts"),
        ("ca = \"ca.pem\"\nhosts = [\"ds.b.example\"]", "hosts = ", "proxy_download.hosts"),
        ("ca = \"ca.pem\"\nhosts = []\nmax_size = 0", "max_size = ", "proxy_download.max_size"),
        ("ca = \"nowhere.pem\"\nhosts = []", "ca = \"nowhere.pem\"", "proxy_download.ca"),
        ("ca = \"ca.pem\"\nhosts = []\ntimeout = \"soon\"", "timeout = \"soon\"", "proxy_download.timeout"),
    ] {
        let setup = Setup::of_nodes(&nodes).listener(MIMI).with(&format!("[proxy_download]\n{lines}"));
        let (said, line) = refused_by_check(&setup, at);
        assert!(said.contains(&format!("FILE:{line}: {key}")), "{key} at {line} in {said}");
    }
}
