//! A federation as time goes by: who may come and who no longer, certificates that are renewed, sessions that are
//! resumed and those that are not, and configurations that take the place of one another, while requests keep coming.

use crate::harness::{Gateway, Setup, a_example, binary, ca, config, large_message, limit, message_in};
use crate::support::client::{Client, Error, Response, handshake, raw_tls, tls_config};
use crate::support::ds::Ds;
use crate::support::encode;
use crate::support::pki::{Ca, Identity, now};
use crate::support::program::own_ip;
use http::Method;
use rcgen::{DnType, PKCS_RSA_SHA256};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    ClientSessionMemoryCache, ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue,
};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, HandshakeKind, NamedGroup, SignatureScheme};
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

/// How long anything may take that is to happen soon.
const PATIENCE: Duration = Duration::from_secs(5);

/// The Delivery Service's name, which the gateway's first certificate is for.
const DS: &str = "ds.b.example";

/// A name of the provider that the first certificate is not for.
const ALSO: &str = "also-b.example";

/// Files are looked at often.
const WATCH: &str = "[tls]\nwatch_every = \"100ms\"";

/// A Delivery Service may take its time.
const PATIENT: &str = "connect_timeout = \"1s\"\nread_timeout = \"10s\"";

const CUT: &str = "moh_gateway_connections_cut_total";
const GENERATION: &str = "moh_gateway_config_generation";

// === Configuration ===

/// An address that nobody listens at.
fn free() -> SocketAddr {
    TcpListener::bind((own_ip(), 0)).unwrap().local_addr().unwrap()
}

/// Another listener.
fn listener(address: SocketAddr, lines: &str) -> String {
    format!("[[listener]]\naddress = \"{address}\"\n{lines}\n")
}

/// Another certificate, in these files.
fn certificate(chain: &str, key: &str) -> String {
    format!("[[certificate]]\nchain = \"{chain}\"\nkey = \"{key}\"\n")
}

/// Waits until an address is listened at. The harness does so for the first.
async fn is_open(address: SocketAddr) {
    let until = Instant::now() + PATIENCE;
    while TcpStream::connect(address).await.is_err() {
        assert!(Instant::now() < until, "nobody listens at {address}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Puts other content in a file's place, at once.
fn renew(file: &Path, content: impl AsRef<[u8]>) {
    let new = file.with_extension("new");
    std::fs::write(&new, content).unwrap();
    std::fs::rename(&new, file).unwrap();
}

fn broken(file: &Path) -> String {
    format!("moh_gateway_file_broken{{file=\"{}\"}}", file.display())
}

fn file_reloads(result: &str) -> String {
    format!("moh_gateway_file_reloads_total{{result=\"{result}\"}}")
}

/// Whether the gateway has said that something is wrong with a file.
fn says_error(gateway: &Gateway, file: &Path) -> bool {
    let file = file.display().to_string();
    gateway.stderr().lines().any(|line| line.contains("ERROR") && line.contains(&file))
}

fn config_file(gateway: &Gateway) -> PathBuf {
    gateway.dir.path().join("gateway.toml")
}

/// Changes a configuration where it stands; what it is then.
fn edit(gateway: &Gateway, from: &str, to: &str) -> String {
    let file = config_file(gateway);
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains(from), "no {from:?} in {text}");
    let text = text.replacen(from, to, 1);
    std::fs::write(&file, &text).unwrap();
    text
}

/// `POST /reload`.
async fn post(gateway: &Gateway) -> Response {
    Client::plain(gateway.admin).http1().send(Method::POST, "/reload", "").await.unwrap()
}

// === Clients ===

fn client_at(address: SocketAddr, identity: Option<&Identity>) -> Client {
    let client = Client::tls(address, &ca().pem());
    match identity {
        Some(identity) => client.identity(identity),
        None => client,
    }
}

fn both(client: impl Fn() -> Client) -> [Client; 2] {
    [client().http1(), client().http2()]
}

/// A request in the name of a sender.
async fn verify(client: &Client, sender: &str) -> Result<Response, Error> {
    client.send(Method::GET, "/verification_key", encode::verification_key_request(sender, "b.example")).await
}

async fn status(client: &Client, sender: &str) -> u16 {
    verify(client, sender).await.unwrap().status.as_u16()
}

/// The status and the last part of the problem type.
fn problem(response: &Response) -> (u16, String) {
    let document = response.json();
    let kind = document["type"].as_str().unwrap_or_default().rsplit(':').next().unwrap_or_default();
    (response.status.as_u16(), kind.to_owned())
}

async fn refused(client: &Client, sender: &str) -> (u16, String) {
    problem(&verify(client, sender).await.unwrap())
}

fn refusal(status: u16, kind: &str) -> (u16, String) {
    (status, kind.to_owned())
}

/// Opens connections until one is let in.
async fn comes_in(address: SocketAddr, identity: &Identity, sender: &str) {
    let until = Instant::now() + PATIENCE;
    loop {
        match verify(&client_at(address, Some(identity)), sender).await {
            Ok(response) if response.status == 200 => return,
            other => assert!(Instant::now() < until, "{sender} is kept out: {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A field that came with the last request.
fn learned(ds: &Ds, name: &str) -> Option<String> {
    let last = ds.requests().pop().unwrap();
    last.headers.get(name).map(|value| value.to_str().unwrap().to_owned())
}

/// TLS for HTTP/1.1 by hand, with a certificate.
fn shows(identity: &Identity) -> Arc<ClientConfig> {
    Arc::new(tls_config(Some(&ca().pem()), &["http/1.1"], Some(identity)))
}

/// What a connection ends with before it begins: an alert, which a client of TLS 1.3 reads when it thinks all is well.
async fn alert(address: SocketAddr, config: &Arc<ClientConfig>) -> String {
    let refused = async {
        let mut stream = handshake(address, DS, config.clone()).await?;
        stream.read_u8().await
    };
    tokio::time::timeout(PATIENCE, refused).await.expect("an alert").unwrap_err().to_string()
}

/// An HTTP/1.1 connection, whose requests are written by hand.
struct Open(TlsStream<TcpStream>);

impl Open {
    async fn new(address: SocketAddr, config: &Arc<ClientConfig>) -> io::Result<Open> {
        Ok(Open(handshake(address, DS, config.clone()).await?))
    }

    /// With a request behind it: it is idle, and kept.
    async fn served(address: SocketAddr, identity: &Identity, sender: &str) -> Open {
        let mut open = Open::new(address, &shows(identity)).await.unwrap();
        assert_eq!(open.ask(sender).await.unwrap(), 200);
        open
    }

    /// A request in the name of a sender; the status of its answer.
    async fn ask(&mut self, sender: &str) -> io::Result<u16> {
        let body = encode::verification_key_request(sender, "b.example");
        let head = format!(
            "GET /verification_key HTTP/1.1\r\nHost: {DS}\r\nContent-Type: application/octet-stream\r\nContent-Length: \
             {}\r\n\r\n",
            body.len()
        );
        let exchange = async {
            self.0.write_all(&[head.as_bytes(), &body].concat()).await?;
            self.0.flush().await?;
            self.answer().await
        };
        tokio::time::timeout(PATIENCE, exchange).await.expect("an answer, or an end")
    }

    async fn answer(&mut self) -> io::Result<u16> {
        let mut head = vec![];
        while !head.ends_with(b"\r\n\r\n") {
            head.push(self.0.read_u8().await?);
        }
        let head = String::from_utf8(head).unwrap().to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut content = vec![0; length.map_or(0, |length| length.trim().parse().unwrap())];
        self.0.read_exact(&mut content).await?;
        Ok(head.strip_prefix("http/1.1 ").unwrap()[..3].parse().unwrap())
    }

    fn is_resumed(&self) -> bool {
        self.0.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// Waits until the gateway ends it.
    async fn ends(&mut self) {
        let end = async {
            let mut octets = [0; 256];
            while let Ok(1..) = self.0.read(&mut octets).await {}
        };
        tokio::time::timeout(PATIENCE, end).await.expect("the connection is still open");
    }
}

/// A connection for one request: whether its session was resumed, and the status of the answer.
async fn visit(address: SocketAddr, config: &Arc<ClientConfig>, sender: &str) -> io::Result<(bool, u16)> {
    let mut open = Open::new(address, config).await?;
    let status = open.ask(sender).await?;
    Ok((open.is_resumed(), status))
}

// === Who may come ===

#[tokio::test]
async fn each_listener_asks_as_it_is_told() {
    let ds = Ds::start().await;
    let (required, off) = (free(), free());
    let asks = listener(required, "client_certificates = \"required\"\nclient_ca = \"ca.pem\"");
    let gateway = Gateway::start(Setup::of(&ds).with(&asks).with(&listener(off, ""))).await;
    is_open(required).await;
    is_open(off).await;
    let a = a_example();
    let foreign = Ca::new("another federation").issue(&["a.example"]);
    for (address, identity, provider) in [
        (gateway.addr, None, None),
        (gateway.addr, Some(&a), Some("a.example")),
        (required, Some(&a), Some("a.example")),
        (off, None, None),
        (off, Some(&a), None),
        (off, Some(&foreign), None),
    ] {
        for client in both(|| client_at(address, identity)) {
            assert_eq!(status(&client, "a.example").await, 200);
            assert_eq!(learned(&ds, "x-moh-provider").as_deref(), provider);
        }
    }
    // A certificate that nobody asked for binds nobody.
    assert_eq!(status(&client_at(off, Some(&a)), "c.example").await, 200);
    assert_eq!(refused(&client_at(required, Some(&a)), "c.example").await, refusal(403, "sender-mismatch"));

    let begun = ds.begun();
    let none = Arc::new(tls_config(Some(&ca().pem()), &["http/1.1"], None));
    for (address, config, expected) in [
        (required, none, "CertificateRequired"),
        (required, shows(&foreign), "UnknownCA"),
        (gateway.addr, shows(&foreign), "UnknownCA"),
    ] {
        let said = alert(address, &config).await;
        assert!(said.contains(expected), "{said}");
    }
    assert_eq!(ds.begun(), begun);
}

#[tokio::test]
async fn several_authorities_and_one_below_another() {
    let ds = Ds::start().await;
    let dir = tempfile::tempdir().unwrap();
    let other = Ca::new("the other federation");
    other.write(dir.path(), "other");
    let wide = free();
    let lines = "client_certificates = \"required\"\nclient_ca = [\"ca.pem\", \"other.pem\"]";
    let gateway = Gateway::start_in(dir, Setup::of(&ds).with(&listener(wide, lines))).await;
    is_open(wide).await;
    let (a, c) = (a_example(), other.issue(&["c.example"]));
    let below = other.below("a department").below("an office").issue(&["x.c.example"]);
    for (identity, sender) in [(&a, "a.example"), (&c, "c.example"), (&below, "x.c.example")] {
        assert_eq!(status(&client_at(wide, Some(identity)), sender).await, 200);
        assert_eq!(learned(&ds, "x-moh-provider").as_deref(), Some(sender));
    }
    let end = "-----END CERTIFICATE-----\n";
    let (first, _) = below.chain_pem.split_once(end).unwrap();
    let alone = Identity { chain_pem: format!("{first}{end}"), ..below.clone() };
    for (address, identity) in [(wide, &alone), (gateway.addr, &c), (gateway.addr, &below)] {
        let said = alert(address, &shows(identity)).await;
        assert!(said.contains("UnknownCA"), "{said}");
    }
}

#[tokio::test]
async fn dates_and_names_of_certificates() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let expired = ca().issue_with(&["a.example"], |params| params.not_after = now(-60));
    let early = ca().issue_with(&["a.example"], |params| params.not_before = now(3600));
    for identity in [&expired, &early] {
        let said = alert(gateway.addr, &shows(identity)).await;
        assert!(said.contains("CertificateExpired"), "{said}");
    }
    assert_eq!(ds.begun(), 0);

    // A common name is no name (RFC 6125).
    let common = ca().issue_with(&[], |params| params.distinguished_name.push(DnType::CommonName, "a.example"));
    for client in both(|| client_at(gateway.addr, Some(&common))) {
        for sender in ["a.example", "nobody.example"] {
            assert_eq!(refused(&client, sender).await, refusal(403, "sender-mismatch"));
        }
    }
    assert_eq!(ds.begun(), 0);

    let wild = ca().issue(&["*.d.example"]);
    for client in both(|| client_at(gateway.addr, Some(&wild))) {
        for sender in ["x.d.example", "Y.D.Example"] {
            assert_eq!(status(&client, sender).await, 200);
            assert_eq!(learned(&ds, "x-moh-provider").map(|name| name.to_lowercase()), Some(sender.to_lowercase()));
        }
        for sender in ["d.example", "x.y.d.example", "xd.example", "x.d.example.evil.example"] {
            assert_eq!(refused(&client, sender).await, refusal(403, "sender-mismatch"), "{sender}");
        }
    }
    assert_eq!(ds.complete(), 4);
}

#[tokio::test]
async fn lists_of_what_is_revoked_fail_closed() {
    let ds = Ds::start().await;
    let dir = tempfile::tempdir().unwrap();
    let (good, bad) = (a_example(), ca().issue(&["bad.example"]));
    let others = Ca::new("the other federation");
    for (name, list) in [
        ("federation.crl", ca().crl(&[&bad])),
        ("expired.crl", ca().crl_until(&[], -60)),
        ("other.crl", others.crl(&[])),
        // Of one with the same name.
        ("forged.crl", Ca::new("federation").crl(&[])),
    ] {
        std::fs::write(dir.path().join(name), list).unwrap();
    }
    let [expired, other, forged, several] = [free(), free(), free(), free()];
    let with = |address, files: &str| {
        let asks = "client_certificates = \"optional\"\nclient_ca = \"ca.pem\"\nclient_crl = ";
        listener(address, &format!("{asks}{files}"))
    };
    let setup = Setup::of(&ds)
        .listener("client_crl = \"federation.crl\"")
        .with(&with(expired, "\"expired.crl\""))
        .with(&with(other, "[\"other.crl\"]"))
        .with(&with(forged, "\"forged.crl\""))
        .with(&with(several, "[\"other.crl\", \"federation.crl\"]"));
    let gateway = Gateway::start_in(dir, setup).await;
    for address in [expired, other, forged, several] {
        is_open(address).await;
    }
    for address in [gateway.addr, several] {
        for client in both(|| client_at(address, Some(&good))) {
            assert_eq!(status(&client, "a.example").await, 200);
        }
        let said = alert(address, &shows(&bad)).await;
        assert!(said.contains("CertificateRevoked"), "{said}");
    }
    // Where nobody can say that a certificate is good, it is not.
    for address in [expired, other, forged] {
        let said = alert(address, &shows(&good)).await;
        assert!(said.contains("received fatal alert"), "{said}");
        assert_eq!(status(&client_at(address, None), "a.example").await, 200, "who shows none is asked for none");
    }
    assert_eq!(ds.complete(), 7);
}

#[tokio::test]
async fn a_list_that_is_renewed_ends_the_connections_of_the_revoked() {
    let ds = Ds::start().await;
    let dir = tempfile::tempdir().unwrap();
    let crl = dir.path().join("federation.crl");
    std::fs::write(&crl, ca().crl(&[])).unwrap();
    let setup = Setup::of(&ds).listener("client_crl = \"federation.crl\"").with(WATCH);
    let gateway = Gateway::start_in(dir, setup).await;
    let (a, c) = (a_example(), ca().issue(&["c.example"]));
    let mut revoked = Open::served(gateway.addr, &a, "a.example").await;
    let [one, two] = both(|| client_at(gateway.addr, Some(&c)));
    let others = [one, two, gateway.stranger(), gateway.stranger().http1()];
    for client in &others {
        assert_eq!(status(client, "c.example").await, 200);
    }

    renew(&crl, ca().crl(&[&a]));
    revoked.ends().await;
    gateway.until_metric(CUT, |n| n == 1.0).await;
    let said = alert(gateway.addr, &shows(&a)).await;
    assert!(said.contains("CertificateRevoked"), "{said}");
    for client in &others {
        assert_eq!(status(client, "c.example").await, 200);
        assert_eq!(client.connections(), 1, "it goes on");
    }

    // What is no list changes nothing.
    renew(&crl, "nothing of use");
    gateway.until_metric(&broken(&crl), |n| n == 1.0).await;
    assert!(says_error(&gateway, &crl), "{}", gateway.stderr());
    let said = alert(gateway.addr, &shows(&a)).await;
    assert!(said.contains("CertificateRevoked"), "{said}");
    comes_in(gateway.addr, &c, "c.example").await;

    renew(&crl, ca().crl(&[]));
    comes_in(gateway.addr, &a, "a.example").await;
    gateway.until_metric(&broken(&crl), |n| n == 0.0).await;
    assert_eq!(gateway.metric(CUT).await, 1.0);
    assert_eq!(gateway.metric(GENERATION).await, 1.0, "nobody had it reload");
}

#[tokio::test]
async fn peers_that_are_allowed_and_denied() {
    let ds = Ds::start().await;
    let listed = "[peers]\nallow = [\"a.example\", \"*.c.example\"]\ndeny = [\"x.c.example\"]";
    let gateway = Gateway::start(Setup::of(&ds).with(listed)).await;
    for (name, passes) in
        [("a.example", true), ("y.c.example", true), ("x.c.example", false), ("c.example", false), ("d.example", false)]
    {
        let identity = ca().issue(&[name]);
        for client in both(|| client_at(gateway.addr, Some(&identity))) {
            let expected = if passes { refusal(200, "") } else { refusal(403, "peer-not-allowed") };
            assert_eq!(refused(&client, name).await, expected, "{name}");
        }
    }
    assert_eq!(refused(&gateway.stranger(), "a.example").await, refusal(403, "peer-not-allowed"), "who only says so");
    assert_eq!(ds.complete(), 4);

    let denied = "[peers]\ndeny = [\"evil.example\", \"*.bad.example\"]";
    let gateway = Gateway::start(Setup::of(&ds).with(denied)).await;
    let several = ca().issue(&["evil.example", "x.bad.example", "bad.example", "a.example"]);
    for client in [client_at(gateway.addr, Some(&several)), gateway.stranger().http1()] {
        for sender in ["evil.example", "EVIL.example", "x.bad.example"] {
            assert_eq!(refused(&client, sender).await, refusal(403, "peer-not-allowed"), "{sender}");
        }
        for sender in ["bad.example", "a.example"] {
            assert_eq!(status(&client, sender).await, 200, "{sender}");
        }
    }
    assert_eq!(ds.complete(), 8);
}

#[tokio::test]
async fn a_pinned_provider_comes_with_its_keys_only() {
    let ds = Ds::start().await;
    let (a, next, impostor) = (a_example(), a_example(), ca().issue(&["a.example", "c.example"]));
    let pins = |keys: &[&Identity]| {
        let keys: Vec<_> = keys.iter().map(|identity| format!("\"{}\"", identity.spki_sha256())).collect();
        format!("[[peers.pin]]\nprovider = \"a.example\"\nspki_sha256 = [{}]\n", keys.join(", "))
    };
    let mut gateway = Gateway::start(Setup::of(&ds).with(&pins(&[&a, &next]))).await;
    for identity in [&a, &next] {
        for client in both(|| client_at(gateway.addr, Some(identity))) {
            assert_eq!(status(&client, "a.example").await, 200);
        }
    }
    for client in both(|| client_at(gateway.addr, Some(&impostor))) {
        assert_eq!(refused(&client, "a.example").await, refusal(403, "wrong-key"));
        assert_eq!(status(&client, "c.example").await, 200, "that name has no pin");
    }
    for client in both(|| gateway.stranger()) {
        assert_eq!(refused(&client, "a.example").await.0, 403, "who only says so shows no key");
        assert_eq!(status(&client, "c.example").await, 200);
    }
    assert_eq!(ds.complete(), 8);

    // A key that is known no more.
    let (mut old, mut kept) =
        (Open::served(gateway.addr, &a, "a.example").await, Open::served(gateway.addr, &next, "a.example").await);
    gateway.reload("ok", |setup| setup.more = pins(&[&next])).await;
    old.ends().await;
    assert_eq!(kept.ask("a.example").await.unwrap(), 200);
    gateway.until_metric(CUT, |n| n == 1.0).await;
    let again = client_at(gateway.addr, Some(&a));
    assert_eq!(refused(&again, "a.example").await, refusal(403, "wrong-key"));
}

#[tokio::test]
async fn a_peer_that_is_allowed_no_more_loses_its_connections() {
    let ds = Ds::start().await;
    let setup = Setup { delivery: PATIENT, ..Setup::of(&ds) };
    let mut gateway = Gateway::start(setup.with("[peers]\nallow = [\"a.example\", \"c.example\"]")).await;
    let (a, c) = (a_example(), ca().issue(&["c.example"]));
    let mut idle = Open::served(gateway.addr, &a, "a.example").await;
    let mut kept = Open::served(gateway.addr, &c, "c.example").await;

    ds.hang(true);
    let address = gateway.addr;
    let under_way = |identity: &Identity, sender: &'static str| {
        both(|| client_at(address, Some(identity)))
            .map(|client| tokio::spawn(async move { verify(&client, sender).await.map(|answer| answer.status) }))
    };
    let (lost, others) = (under_way(&a, "a.example"), under_way(&c, "c.example"));
    assert!(ds.until(|ds| ds.complete() == 6).await);
    gateway.reload("ok", |setup| setup.more = "[peers]\nallow = [\"c.example\"]".into()).await;
    idle.ends().await;
    for request in lost {
        let ended = request.await.unwrap();
        assert!(ended.is_err(), "{ended:?}");
    }
    gateway.until_metric(CUT, |n| n == 3.0).await;
    ds.hang(false);
    for request in others {
        assert_eq!(request.await.unwrap().unwrap(), 200, "another peer's goes on");
    }
    assert_eq!(kept.ask("c.example").await.unwrap(), 200);
    for client in both(|| client_at(address, Some(&a))) {
        assert_eq!(refused(&client, "a.example").await, refusal(403, "peer-not-allowed"));
    }
    gateway.until_metric("moh_gateway_requests_in_flight", |n| n == 0.0).await;
    assert_eq!(gateway.metric(CUT).await, 3.0);
}

#[tokio::test]
async fn who_shows_no_certificate_loses_its_connection_where_one_is_required_from_now_on() {
    let ds = Ds::start().await;
    let mut gateway = Gateway::start(Setup::of(&ds)).await;
    let a = a_example();
    let mut stranger = Open::new(gateway.addr, &resuming(None).0).await.unwrap();
    assert_eq!(stranger.ask("e.example").await.unwrap(), 200);
    let mut peer = Open::served(gateway.addr, &a, "a.example").await;
    gateway.reload("ok", |setup| setup.client_certificates = "required").await;
    stranger.ends().await;
    assert_eq!(peer.ask("a.example").await.unwrap(), 200);
    assert_eq!(gateway.metric(CUT).await, 1.0);
}

#[tokio::test]
async fn a_connection_ends_with_its_certificate() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let short = ca().issue_with(&["a.example"], |params| params.not_after = now(2));
    let mut open = Open::served(gateway.addr, &short, "a.example").await;
    open.ends().await;
    assert!(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64 >= short.not_after());
    assert_eq!(gateway.metric(CUT).await, 1.0);
}

#[tokio::test]
async fn a_peer_that_is_denied_loses_its_connections() {
    let ds = Ds::start().await;
    let mut gateway = Gateway::start(Setup { delivery: PATIENT, ..Setup::of(&ds) }).await;
    let address = gateway.addr;
    let (a, x, c) = (a_example(), ca().issue(&["x.d.example"]), ca().issue(&["c.example"]));
    let mut named = Open::served(address, &a, "a.example").await;
    let mut by_pattern = Open::served(address, &x, "x.d.example").await;
    let mut kept = Open::served(address, &c, "c.example").await;
    let several = ca().issue(&["a.example", "e.example"]);
    let mut half = Open::served(address, &several, "a.example").await;
    ds.hang(true);
    let client = client_at(address, Some(&x));
    let lost = tokio::spawn(async move { verify(&client, "x.d.example").await });
    let client = gateway.stranger();
    let stranger = tokio::spawn(async move { verify(&client, "e.example").await });
    assert!(ds.until(|ds| ds.complete() == 6).await);

    gateway.reload("ok", |setup| setup.more = "[peers]\ndeny = [\"a.example\", \"*.d.example\"]".into()).await;
    named.ends().await;
    by_pattern.ends().await;
    assert!(lost.await.unwrap().is_err());
    gateway.until_metric(CUT, |n| n == 3.0).await;
    ds.hang(false);
    assert_eq!(stranger.await.unwrap().unwrap().status, 200);
    assert_eq!(kept.ask("c.example").await.unwrap(), 200);
    // Who may send in another of its names stays, and may not in that one.
    assert_eq!(half.ask("e.example").await.unwrap(), 200);
    assert_eq!(half.ask("a.example").await.unwrap(), 403);
    assert_eq!(gateway.metric(CUT).await, 3.0);
}

// === Certificates ===

/// A client that can verify some signatures, and notes what is stapled.
#[derive(Debug)]
struct Looking {
    schemes: Vec<SignatureScheme>,
    staple: Mutex<Vec<u8>>,
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms
}

impl ServerCertVerifier for Looking {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.staple.lock().unwrap() = ocsp.to_vec();
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.clone()
    }
}

/// What a client that can verify these signatures (none: all) is shown, and what is stapled to it.
async fn look(
    gateway: &Gateway,
    name: &str,
    schemes: &[SignatureScheme],
) -> io::Result<(CertificateDer<'static>, Vec<u8>)> {
    let schemes = if schemes.is_empty() { algorithms().supported_schemes() } else { schemes.to_vec() };
    let looking = Arc::new(Looking { schemes, staple: Mutex::default() });
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(looking.clone())
        .with_no_client_auth();
    let stream = handshake(gateway.addr, name, Arc::new(config)).await?;
    let certificate = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
    let staple = looking.staple.lock().unwrap().clone();
    Ok((certificate, staple))
}

async fn shown(gateway: &Gateway, name: &str) -> CertificateDer<'static> {
    let stream = raw_tls(gateway.addr, name, &ca().pem(), &[], None).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].clone()
}

async fn until_shown(gateway: &Gateway, name: &str, identity: &Identity) {
    let until = Instant::now() + PATIENCE;
    while shown(gateway, name).await != identity.der() {
        assert!(Instant::now() < until, "the old certificate is still in use: {}", gateway.stderr());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn expiry(chain: &Path) -> String {
    format!("moh_gateway_certificate_expiry_seconds{{file=\"{}\"}}", chain.display())
}

#[tokio::test]
async fn an_rsa_certificate_for_who_can_verify_no_other() {
    let ds = Ds::start().await;
    let dir = tempfile::tempdir().unwrap();
    let (ecdsa, rsa) = (ca().issue(&[ALSO]), ca().issue_of(&PKCS_RSA_SHA256, &[ALSO]));
    ecdsa.write(dir.path(), "ecdsa");
    rsa.write(dir.path(), "rsa");
    let more = certificate("ecdsa.pem", "ecdsa.key") + &certificate("rsa.pem", "rsa.key");
    let gateway = Gateway::start_in(dir, Setup::of(&ds).with(&more)).await;
    // For a handshake of TLS 1.3 the first of these is of no use (RFC 8446 §4.2.3).
    let old = [SignatureScheme::RSA_PKCS1_SHA256, SignatureScheme::RSA_PSS_SHA256, SignatureScheme::RSA_PSS_SHA512];
    for (schemes, expected) in [(&old[..], &rsa), (&[SignatureScheme::ECDSA_NISTP256_SHA256], &ecdsa), (&[], &ecdsa)] {
        let (certificate, _) = look(&gateway, ALSO, schemes).await.unwrap();
        assert_eq!(certificate, expected.der(), "{schemes:?}");
    }
    assert!(look(&gateway, ALSO, &[SignatureScheme::ED25519]).await.is_err(), "neither");
    assert_ne!(look(&gateway, DS, &[]).await.unwrap().0, ecdsa.der());
}

/// A gateway whose certificate for a name is renewed by `renewing`, which gets the folder of its configuration. Nobody
/// tells it, and who is connected does not notice.
async fn is_renewed(
    dir: TempDir,
    (chain, key): (&str, &str),
    (old, new): (&Identity, &Identity),
    renewing: impl FnOnce(&Path),
) -> (Ds, Gateway) {
    let ds = Ds::start().await;
    let root = dir.path().to_owned();
    let gateway = Gateway::start_in(dir, Setup::of(&ds).with(WATCH).with(&certificate(chain, key))).await;
    let clients = both(|| gateway.peer());
    for client in &clients {
        assert_eq!(status(client, "a.example").await, 200);
    }
    assert_eq!(shown(&gateway, ALSO).await, old.der());
    assert_eq!(gateway.metric(&expiry(&root.join(chain))).await, old.not_after() as f64);

    renewing(&root);
    until_shown(&gateway, ALSO, new).await;
    gateway.until_metric(&expiry(&root.join(chain)), |n| n == new.not_after() as f64).await;
    for file in [chain, key] {
        gateway.until_metric(&broken(&root.join(file)), |n| n == 0.0).await;
    }
    assert!(gateway.metric(&file_reloads("ok")).await >= 1.0);
    for client in &clients {
        assert_eq!(status(client, "a.example").await, 200);
        assert_eq!(client.connections(), 1, "it goes on");
    }
    assert_eq!(gateway.metric(GENERATION).await, 1.0, "nobody had it reload");
    (ds, gateway)
}

/// Certificates of one name with two ends.
fn old_and_new() -> (Identity, Identity) {
    let until = |days: i64| ca().issue_with(&[ALSO], |params| params.not_after = now(days * 86_400));
    (until(30), until(60))
}

/// Chain and key as one file has them.
fn together(identity: &Identity) -> String {
    format!("{}{}", identity.chain_pem, identity.key_pem)
}

#[tokio::test]
async fn a_certificate_is_renewed_by_a_rename() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = old_and_new();
    std::fs::write(dir.path().join("also.pem"), together(&old)).unwrap();
    let (_ds, mut gateway) = is_renewed(dir, ("also.pem", "also.pem"), (&old, &new), |root| {
        renew(&root.join("also.pem"), together(&new));
    })
    .await;
    assert_eq!(gateway.metric(&file_reloads("failed")).await, 0.0, "there was never half of it");

    // The other one, which nobody renewed; and none where there is none any more.
    let root = gateway.dir.path().to_owned();
    let server =
        Identity { chain_pem: std::fs::read_to_string(root.join("server.pem")).unwrap(), key_pem: String::new() };
    assert_eq!(gateway.metric(&expiry(&root.join("server.pem"))).await, server.not_after() as f64);
    gateway.reload("ok", |setup| setup.more.clear()).await;
    assert_eq!(gateway.metric(&expiry(&root.join("also.pem"))).await, 0.0);
    assert_ne!(look(&gateway, ALSO, &[]).await.unwrap().0, new.der());
}

#[tokio::test]
async fn a_certificate_is_renewed_as_kubernetes_does() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = old_and_new();
    let mount = dir.path().join("mounted");
    std::fs::create_dir(&mount).unwrap();
    let version = |name: &str, identity: &Identity| {
        let version = mount.join(name);
        std::fs::create_dir(&version).unwrap();
        std::fs::write(version.join("tls.crt"), &identity.chain_pem).unwrap();
        std::fs::write(version.join("tls.key"), &identity.key_pem).unwrap();
    };
    version("..2026_01", &old);
    symlink("..2026_01", mount.join("..data")).unwrap();
    for name in ["tls.crt", "tls.key"] {
        symlink(Path::new("..data").join(name), mount.join(name)).unwrap();
    }
    is_renewed(dir, ("mounted/tls.crt", "mounted/tls.key"), (&old, &new), |_| {
        version("..2026_02", &new);
        symlink("..2026_02", mount.join("..data_tmp")).unwrap();
        std::fs::rename(mount.join("..data_tmp"), mount.join("..data")).unwrap();
        std::fs::remove_dir_all(mount.join("..2026_01")).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_certificate_is_renewed_as_certbot_does() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = old_and_new();
    let (live, archive) = (dir.path().join("live/also"), dir.path().join("archive/also"));
    std::fs::create_dir_all(&live).unwrap();
    std::fs::create_dir_all(&archive).unwrap();
    let version = |n: u32, identity: &Identity| {
        std::fs::write(archive.join(format!("fullchain{n}.pem")), &identity.chain_pem).unwrap();
        std::fs::write(archive.join(format!("privkey{n}.pem")), &identity.key_pem).unwrap();
    };
    // One link after the other, and for a moment there is none.
    let link_to = |n: u32| {
        for kind in ["privkey", "fullchain"] {
            let link = live.join(format!("{kind}.pem"));
            let _ = std::fs::remove_file(&link);
            symlink(format!("../../archive/also/{kind}{n}.pem"), &link).unwrap();
        }
    };
    version(1, &old);
    link_to(1);
    is_renewed(dir, ("live/also/fullchain.pem", "live/also/privkey.pem"), (&old, &new), |_| {
        version(2, &new);
        link_to(2);
    })
    .await;
}

#[tokio::test]
async fn no_renewal_is_missed() {
    let ds = Ds::start().await;
    let dir = tempfile::tempdir().unwrap();
    let (chain, key) = ca().issue(&[ALSO]).write(dir.path(), "also");
    let setup = Setup::of(&ds).with("[tls]\nwatch_every = \"1ms\"").with(&certificate("also.pem", "also.key"));
    let gateway = Gateway::start_in(dir, setup).await;
    for round in 0..40u32 {
        let next = ca().issue(&[ALSO]);
        renew(&chain, &next.chain_pem);
        // The one is being read, perhaps, when the other comes: each time at another moment of it.
        std::thread::sleep(Duration::from_micros(50) * round);
        renew(&key, &next.key_pem);
        until_shown(&gateway, ALSO, &next).await;
    }
    for file in [&chain, &key] {
        gateway.until_metric(&broken(file), |n| n == 0.0).await;
    }
}

#[tokio::test]
async fn a_certificate_that_is_broken_is_not_taken() {
    let ds = Ds::start().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("also.pem");
    let (old, new) = old_and_new();
    std::fs::write(&file, together(&old)).unwrap();
    let setup = Setup::of(&ds).with(WATCH).with(&certificate("also.pem", "also.pem"));
    let gateway = Gateway::start_in(dir, setup).await;
    let client = gateway.peer();
    assert_eq!(status(&client, "a.example").await, 200);
    assert!(!says_error(&gateway, &file));

    renew(&file, "nothing of use");
    gateway.until_metric(&broken(&file), |n| n == 1.0).await;
    assert_eq!(shown(&gateway, ALSO).await, old.der());
    let failed = gateway.metric(&file_reloads("failed")).await;
    assert!(failed >= 1.0);
    assert!(says_error(&gateway, &file), "{}", gateway.stderr());

    // The key of another.
    renew(&file, format!("{}{}", new.chain_pem, old.key_pem));
    gateway.until_metric(&file_reloads("failed"), |n| n > failed).await;
    assert_eq!(gateway.metric(&broken(&file)).await, 1.0);
    assert_eq!(shown(&gateway, ALSO).await, old.der());
    assert_eq!(gateway.metric(&file_reloads("ok")).await, 0.0);

    renew(&file, together(&new));
    until_shown(&gateway, ALSO, &new).await;
    gateway.until_metric(&broken(&file), |n| n == 0.0).await;
    assert!(gateway.metric(&file_reloads("ok")).await >= 1.0);
    assert_eq!(status(&client, "a.example").await, 200);
    assert_eq!(client.connections(), 1);
}

#[tokio::test]
async fn what_a_reload_mends_is_broken_no_more() {
    let ds = Ds::start().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("also.pem");
    let (old, new) = old_and_new();
    std::fs::write(&file, together(&old)).unwrap();
    let more = "[tls]\nwatch_every = \"1s\"\n".to_owned() + &certificate("also.pem", "also.pem");
    let mut gateway = Gateway::start_in(dir, Setup::of(&ds).with(&more)).await;
    renew(&file, "nothing of use");
    gateway.until_metric(&broken(&file), |n| n == 1.0).await;
    gateway.reload("failed", |_| ()).await;
    assert_eq!(shown(&gateway, ALSO).await, old.der());
    // Most likely before it is looked at again.
    renew(&file, together(&new));
    gateway.reload("ok", |_| ()).await;
    assert_eq!(shown(&gateway, ALSO).await, new.der());
    gateway.until_metric(&broken(&file), |n| n == 0.0).await;
}

#[tokio::test]
async fn an_ocsp_response_is_stapled_while_it_is_good() {
    let ds = Ds::start().await;
    let dir = tempfile::tempdir().unwrap();
    let mut also = ca().issue(&[ALSO]);
    also.chain_pem += &ca().pem();
    also.write(dir.path(), "also");
    let file = dir.path().join("also.ocsp");
    let (first, next) = (ca().ocsp(&also), ca().ocsp_until(&also, 7200));
    std::fs::write(&file, &first).unwrap();
    let more = certificate("also.pem", "also.key") + "ocsp = \"also.ocsp\"";
    let gateway = Gateway::start_in(dir, Setup::of(&ds).with(WATCH).with(&more)).await;
    let staple = async || look(&gateway, ALSO, &[]).await.unwrap().1;
    assert_eq!(staple().await, first);
    assert!(look(&gateway, DS, &[]).await.unwrap().1.is_empty(), "there is none about the other");
    let ends = gateway.metric(&format!("moh_gateway_ocsp_expiry_seconds{{file=\"{}\"}}", file.display())).await;
    let hence = ends - SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((3500.0..=3601.0).contains(&hence), "{hence}");

    renew(&file, &next);
    let until = Instant::now() + PATIENCE;
    while staple().await != next {
        assert!(Instant::now() < until, "the old response is still stapled: {}", gateway.stderr());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    // One about another certificate is none.
    renew(&file, ca().ocsp(&a_example()));
    gateway.until_metric(&broken(&file), |n| n == 1.0).await;
    assert!(staple().await.is_empty(), "nor is that of before said of what may be another certificate");
    assert!(gateway.stderr().contains("not stapled"), "{}", gateway.stderr());

    // One that has ended is not sent.
    let short = ca().ocsp_until(&also, 3);
    renew(&file, &short);
    for ended in [false, true] {
        let until = Instant::now() + PATIENCE;
        while staple().await != if ended { vec![] } else { short.clone() } {
            assert!(Instant::now() < until, "it has ended ({ended}), and is stapled, or it is not taken");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    assert_eq!(gateway.metric(&broken(&file)).await, 0.0);
    assert_eq!(shown(&gateway, ALSO).await, also.der(), "the certificate is shown without");
}

/// What `check` says of an OCSP response of the first certificate.
fn check_ocsp(response: impl FnOnce(&Identity) -> Vec<u8>) -> (bool, String) {
    let dir = tempfile::tempdir().unwrap();
    let [address, admin]: [SocketAddr; 2] = ["127.0.0.1:1", "127.0.0.1:2"].map(|address| address.parse().unwrap());
    let path = config(dir.path(), address, admin, &Setup::of_nodes(&[address]));
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("[admin]", "ocsp = \"server.ocsp\"\n[admin]", 1)).unwrap();
    // With its issuer's certificate, so that what it signs can be verified.
    let chain = dir.path().join("server.pem");
    let chain_pem = std::fs::read_to_string(&chain).unwrap() + &ca().pem();
    std::fs::write(&chain, &chain_pem).unwrap();
    let about = Identity { chain_pem, key_pem: String::new() };
    std::fs::write(dir.path().join("server.ocsp"), response(&about)).unwrap();
    let output = Command::new(binary()).args(["check", "--config"]).arg(&path).output().unwrap();
    (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

#[test]
fn an_ocsp_response_is_checked() {
    let (ok, said) = check_ocsp(|about| ca().ocsp(about));
    assert!(ok && !said.contains("ocsp"), "{said}");
    let (ok, said) = check_ocsp(|_| b"nothing of use".to_vec());
    assert!(!ok && said.contains("certificate[0].ocsp: "), "{said}");
    let (ok, said) = check_ocsp(|_| ca().ocsp(&a_example()));
    assert!(ok && said.contains("certificate[0].ocsp: "), "about another, a hint: {said}");
    let (ok, said) = check_ocsp(|about| Ca::new("federation").ocsp(about));
    assert!(ok && said.contains("certificate[0].ocsp: "), "by one of the same name, a hint: {said}");
    let (ok, said) = check_ocsp(|about| {
        let mut forged = ca().ocsp(about);
        *forged.last_mut().unwrap() ^= 1;
        forged
    });
    assert!(!ok && said.contains("certificate[0].ocsp: "), "the signature: {said}");
}

#[test]
fn an_ocsp_response_that_has_expired_is_said_by_the_check() {
    let (ok, said) = check_ocsp(|about| ca().ocsp_until(about, -60));
    assert!(ok && said.contains("certificate[0].ocsp: ") && said.contains("expired"), "a hint: {said}");
}

// === Sessions ===

/// Tickets that a client has.
#[derive(Debug)]
struct Tickets {
    kept: ClientSessionMemoryCache,
    /// How many came so far.
    count: AtomicUsize,
    /// As much early data as any of them allows.
    early_data: AtomicU32,
}

impl ClientSessionStore for Tickets {
    fn set_kx_hint(&self, server: ServerName<'static>, group: NamedGroup) {
        self.kept.set_kx_hint(server, group);
    }

    fn kx_hint(&self, server: &ServerName<'_>) -> Option<NamedGroup> {
        self.kept.kx_hint(server)
    }

    fn set_tls12_session(&self, server: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.kept.set_tls12_session(server, value);
    }

    fn tls12_session(&self, server: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.kept.tls12_session(server)
    }

    fn remove_tls12_session(&self, server: &ServerName<'static>) {
        self.kept.remove_tls12_session(server);
    }

    fn insert_tls13_ticket(&self, server: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.count.fetch_add(1, SeqCst);
        self.early_data.fetch_max(value.max_early_data_size(), SeqCst);
        self.kept.insert_tls13_ticket(server, value);
    }

    fn take_tls13_ticket(&self, server: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.kept.take_tls13_ticket(server)
    }
}

/// A client that keeps its tickets and would send early data.
fn resuming(identity: Option<&Identity>) -> (Arc<ClientConfig>, Arc<Tickets>) {
    let kept = ClientSessionMemoryCache::new(64);
    let tickets = Arc::new(Tickets { kept, count: AtomicUsize::new(0), early_data: AtomicU32::new(0) });
    let mut config = tls_config(Some(&ca().pem()), &["http/1.1"], identity);
    config.resumption = Resumption::store(tickets.clone());
    config.enable_early_data = true;
    (Arc::new(config), tickets)
}

#[tokio::test]
async fn sessions_are_resumed_and_remember_who_it_is() {
    let ds = Ds::start().await;
    let mut gateway = Gateway::start(Setup::of(&ds)).await;
    let a = a_example();
    for (identity, provider) in [(None, None), (Some(&a), Some("a.example"))] {
        let (config, tickets) = resuming(identity);
        assert_eq!(visit(gateway.addr, &config, "a.example").await.unwrap(), (false, 200));
        let count = tickets.count.load(SeqCst);
        assert!((1..=4).contains(&count), "{count} tickets of one handshake");
        for _ in 0..4 {
            assert_eq!(visit(gateway.addr, &config, "a.example").await.unwrap(), (true, 200));
            assert_eq!(learned(&ds, "x-moh-provider").as_deref(), provider);
        }
        let other = visit(gateway.addr, &config, "c.example").await.unwrap();
        assert_eq!(other, (true, if identity.is_some() { 403 } else { 200 }), "still nobody else");
        gateway.reload("ok", |_| ()).await;
        assert_eq!(visit(gateway.addr, &config, "a.example").await.unwrap(), (true, 200), "nothing has changed");
        assert_eq!(learned(&ds, "x-moh-provider").as_deref(), provider);
        assert!(tickets.count.load(SeqCst) <= 4 * 7);
        assert_eq!(tickets.early_data.load(SeqCst), 0);
    }
}

#[tokio::test]
async fn a_fleet_with_one_secret_resumes_for_each_other() {
    let ds = Ds::start().await;
    let start = async |secret: Option<[u8; 32]>| {
        let dir = tempfile::tempdir().unwrap();
        let mut setup = Setup::of(&ds);
        if let Some(secret) = secret {
            std::fs::write(dir.path().join("tickets.secret"), secret).unwrap();
            setup = setup.with("[tls]\nticket_secret_file = \"tickets.secret\"");
        }
        Gateway::start_in(dir, setup).await
    };
    let (one, two, foreign) = (start(Some([1; 32])).await, start(Some([1; 32])).await, start(Some([2; 32])).await);
    let a = a_example();
    for identity in [None, Some(&a)] {
        let (config, _tickets) = resuming(identity);
        for (gateway, resumed) in [(&one, false), (&two, true), (&one, true), (&two, true)] {
            assert_eq!(visit(gateway.addr, &config, "a.example").await.unwrap(), (resumed, 200));
            assert_eq!(learned(&ds, "x-moh-provider").is_some(), identity.is_some());
        }
        assert_eq!(visit(foreign.addr, &config, "a.example").await.unwrap(), (false, 200), "another secret");
    }
    drop((one, two, foreign));

    // Each has its own.
    let (one, two) = (start(None).await, start(None).await);
    let (config, _tickets) = resuming(Some(&a));
    assert_eq!(visit(one.addr, &config, "a.example").await.unwrap(), (false, 200));
    assert_eq!(visit(two.addr, &config, "a.example").await.unwrap(), (false, 200));
    assert_eq!(visit(two.addr, &config, "a.example").await.unwrap(), (true, 200));
}

#[tokio::test]
async fn without_tickets_nothing_is_resumed() {
    let ds = Ds::start().await;
    let mut gateway = Gateway::start(Setup::of(&ds)).await;
    let (config, tickets) = resuming(Some(&a_example()));
    assert_eq!(visit(gateway.addr, &config, "a.example").await.unwrap(), (false, 200));
    assert_eq!(visit(gateway.addr, &config, "a.example").await.unwrap(), (true, 200));
    gateway.reload("ok", |setup| setup.more = "[tls]\ntickets = false".into()).await;
    let count = tickets.count.load(SeqCst);
    for _ in 0..3 {
        assert_eq!(visit(gateway.addr, &config, "a.example").await.unwrap(), (false, 200));
    }
    assert_eq!(tickets.count.load(SeqCst), count, "nor is one given");
}

#[tokio::test]
async fn no_ticket_outlives_its_authority() {
    let ds = Ds::start().await;
    let dir = tempfile::tempdir().unwrap();
    let other = Ca::new("the other federation");
    other.write(dir.path(), "other");
    let address = free();
    let trusting = |files: &str| listener(address, &format!("client_certificates = \"optional\"\nclient_ca = {files}"));
    let mut gateway = Gateway::start_in(dir, Setup::of(&ds).with(&trusting("[\"ca.pem\", \"other.pem\"]"))).await;
    is_open(address).await;
    let c = other.issue(&["c.example"]);
    let (config, tickets) = resuming(Some(&c));
    assert_eq!(visit(address, &config, "c.example").await.unwrap(), (false, 200));
    assert_eq!(visit(address, &config, "c.example").await.unwrap(), (true, 200));
    let mut open = Open::served(address, &c, "c.example").await;
    let mut kept = Open::served(address, &a_example(), "a.example").await;

    gateway.reload("ok", |setup| setup.more = trusting("[\"ca.pem\"]")).await;
    open.ends().await;
    assert!(tickets.count.load(SeqCst) >= 2, "it has one yet");
    let said = alert(address, &config).await;
    assert!(said.contains("UnknownCA"), "{said}");
    assert_eq!(kept.ask("a.example").await.unwrap(), 200);
    let (config, _tickets) = resuming(Some(&a_example()));
    assert_eq!(visit(address, &config, "a.example").await.unwrap(), (false, 200));
    assert_eq!(visit(address, &config, "a.example").await.unwrap(), (true, 200));
    gateway.until_metric(CUT, |n| n == 1.0).await;
}

#[tokio::test]
async fn no_ticket_outlives_a_revocation() {
    let ds = Ds::start().await;
    let dir = tempfile::tempdir().unwrap();
    let crl = dir.path().join("federation.crl");
    std::fs::write(&crl, ca().crl(&[])).unwrap();
    let setup = Setup::of(&ds).listener("client_crl = \"federation.crl\"").with(WATCH);
    let gateway = Gateway::start_in(dir, setup).await;
    let a = a_example();
    let (config, _tickets) = resuming(Some(&a));
    assert_eq!(visit(gateway.addr, &config, "a.example").await.unwrap(), (false, 200));
    assert_eq!(visit(gateway.addr, &config, "a.example").await.unwrap(), (true, 200));
    // Resumed itself: it has its certificate from the ticket.
    let mut open = Open::new(gateway.addr, &config).await.unwrap();
    assert_eq!(open.ask("a.example").await.unwrap(), 200);
    assert!(open.is_resumed());

    renew(&crl, ca().crl(&[&a]));
    open.ends().await;
    for _ in 0..3 {
        let said = alert(gateway.addr, &config).await;
        assert!(said.contains("CertificateRevoked"), "{said}");
    }
    assert_eq!(gateway.metric(CUT).await, 1.0);
}

#[tokio::test]
async fn no_ticket_outlives_a_certificate() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let refusals = async || {
        let expired = "moh_gateway_connections_refused_total{reason=\"certificate-expired\"}";
        gateway.metric(expired).await + gateway.metric("moh_gateway_tls_handshakes_total{result=\"failed\"}").await
    };
    let before = refusals().await;
    let short = ca().issue_with(&["a.example"], |params| params.not_after = now(3));
    let (config, _tickets) = resuming(Some(&short));
    assert_eq!(visit(gateway.addr, &config, "a.example").await.unwrap(), (false, 200));
    assert_eq!(visit(gateway.addr, &config, "a.example").await.unwrap(), (true, 200));
    let until = Instant::now() + Duration::from_secs(8);
    while visit(gateway.addr, &config, "a.example").await.is_ok() {
        assert!(Instant::now() < until, "it has expired, and its ticket is taken");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let complete = ds.complete();
    assert!(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64 >= short.not_after());
    assert!(visit(gateway.addr, &config, "a.example").await.is_err());
    assert_eq!(ds.complete(), complete);
    assert!(refusals().await >= before + 2.0);
}

// === Reload ===

#[tokio::test]
async fn generations_by_signal_and_by_request() {
    let ds = Ds::start().await;
    let mut gateway = Gateway::start(Setup::of(&ds)).await;
    let client = gateway.peer();
    assert_eq!(status(&client, "a.example").await, 200);
    assert_eq!(gateway.metric(GENERATION).await, 1.0);
    gateway.reload("ok", |_| ()).await;
    gateway.until_metric(GENERATION, |n| n == 2.0).await;
    let response = post(&gateway).await;
    assert_eq!(response.status, 200);
    assert!(response.text().contains("generation 3"), "{}", response.text());
    assert_eq!(gateway.metric(GENERATION).await, 3.0);
    gateway.reload("ok", |_| ()).await;
    gateway.until_metric(GENERATION, |n| n == 4.0).await;
    assert_eq!(gateway.metric("moh_gateway_config_reloads_total{result=\"ok\"}").await, 3.0);

    assert_eq!(gateway.operator("/reload").await.unwrap().status, 405);
    let admin = Client::plain(gateway.admin).http1();
    for origin in ["https://evil.example", "null", "http://localhost"] {
        let response = admin.send_with(Method::POST, "/reload", &[("origin", origin)], "").await.unwrap();
        assert_eq!(response.status, 403, "a page in a browser");
    }
    // That is nothing for strangers.
    assert_eq!(gateway.peer().send(Method::POST, "/reload", "").await.unwrap().status, 404);
    assert_eq!(gateway.metric(GENERATION).await, 4.0);
    assert_eq!(status(&client, "a.example").await, 200);
    assert_eq!(client.connections(), 1);
}

/// Threads that serve, those that do no more included.
fn serving(gateway: &Gateway) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", gateway.pid())).unwrap();
    let name = |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.unwrap().path().join("comm"));
    tasks.filter_map(|task| name(task).ok()).filter(|name| name.trim() == "serve").count()
}

#[tokio::test]
async fn threads_are_exchanged_under_requests() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let clients = both(|| gateway.peer());
    for client in &clients {
        assert_eq!(status(client, "a.example").await, 200);
    }
    let before = serving(&gateway);
    assert!(before >= 2);
    let (mut from, mut all) = ("threads = 2", before);
    for (n, to) in ["threads = 3", "threads = 1", "threads = 4"].into_iter().enumerate() {
        let over = AtomicBool::new(false);
        let load = async |kept: Client| {
            let mut answers = 0;
            while !over.load(SeqCst) {
                assert_eq!(status(&kept, "a.example").await, 200);
                assert_eq!(status(&gateway.peer(), "a.example").await, 200);
                answers += 2;
            }
            answers
        };
        let change = async {
            edit(&gateway, from, to);
            assert_eq!(post(&gateway).await.status, 200, "{to}");
            assert_eq!(gateway.metric(GENERATION).await, (n + 2) as f64);
            let more: usize = to.rsplit(' ').next().unwrap().parse().unwrap();
            let until = Instant::now() + Duration::from_secs(5);
            while serving(&gateway) < all + more {
                assert!(Instant::now() < until, "{to}: {} threads", serving(&gateway));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            all += more;
            tokio::time::sleep(Duration::from_millis(200)).await;
            over.store(true, SeqCst);
        };
        let (first, second, ()) = tokio::join!(load(gateway.peer().http1()), load(gateway.peer().http2()), change);
        assert!(first > 0 && second > 0);
        from = to;
    }
    // Who was there before has noticed nothing.
    for client in &clients {
        assert_eq!(status(client, "a.example").await, 200);
        assert_eq!(client.connections(), 1);
    }
    assert!(!gateway.stderr().contains("the threads stay as they are"), "{}", gateway.stderr());
}

#[tokio::test]
async fn threads_are_exchanged_faster_than_they_come() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let before = std::fs::read_dir(format!("/proc/{}/fd", gateway.pid())).unwrap().count();
    let numbers = ["threads = 2", "threads = 1", "threads = 3"];
    for n in 0..60 {
        edit(&gateway, numbers[n % 3], numbers[(n + 1) % 3]);
        assert_eq!(post(&gateway).await.status, 200);
        if n % 10 == 9 {
            assert_eq!(status(&gateway.peer(), "a.example").await, 200, "{n}");
        }
    }
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        // A socket is of one crew alone, and is closed with it; runtimes of the same number are used again.
        let now = std::fs::read_dir(format!("/proc/{}/fd", gateway.pid())).unwrap().count();
        if now <= before + 20 {
            break;
        }
        assert!(Instant::now() < until, "{before} descriptors before, {now} now");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(serving(&gateway) <= 2 + 1 + 3, "{}", serving(&gateway));
    for client in both(|| gateway.peer()) {
        assert_eq!(status(&client, "a.example").await, 200);
    }
    let said = gateway.stderr();
    assert!(!said.contains("accepted no more") && !said.contains("panicked"), "{said}");
}

#[tokio::test]
async fn a_bad_configuration_changes_nothing() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let file = config_file(&gateway);
    let good = std::fs::read_to_string(&file).unwrap();
    let clients = both(|| gateway.peer());
    let chain = format!("chain = \"{}\"", gateway.dir.path().join("server.pem").display());
    // What is written for what, where the fault is, the key, and what is said.
    for (i, (from, to, at, key, words)) in [
        ("threads = 2", "threads = = 2", "threads = =", "", ""),
        ("threads = 2", "threads = 2\nthreds = 3", "threds", "", "threds"),
        (chain.as_str(), "chain = \"gone.pem\"", "chain = \"gone", "certificate[0].chain: ", "gone.pem"),
        (
            "client_ca = \"ca.pem\"",
            "client_ca = [\"ca.pem\", \"gone-ca.pem\"]",
            "client_ca = [",
            "listener[0].client_ca: ",
            "gone-ca.pem",
        ),
        ("headers = \"1s\"", "headers = \"soon\"", "headers = \"soon\"", "timeouts.headers: ", "soon"),
        ("[admin]", "[peers]\nallow = [\"not a name\"]\n[admin]", "allow = ", "peers.allow: ", "not a name"),
    ]
    .into_iter()
    .enumerate()
    {
        let bad = edit(&gateway, from, to);
        let line = 1 + bad[..bad.find(at).unwrap()].matches('\n').count();
        let response = post(&gateway).await;
        assert_eq!(response.status, 422, "{to}");
        let said = response.text();
        assert!(said.contains(&format!("{}:{line}: {key}", file.display())) && said.contains(words), "{to}: {said}");
        assert!(gateway.stderr().contains(&format!("{}:{line}: {key}", file.display())), "it is logged too");
        let failed = gateway.metric("moh_gateway_config_reloads_total{result=\"failed\"}").await;
        assert_eq!(failed, (i + 1) as f64);
        assert_eq!(gateway.metric(GENERATION).await, 1.0);
        for client in &clients {
            assert_eq!(status(client, "a.example").await, 200);
            assert_eq!(client.connections(), 1, "{to}");
        }
        assert_eq!(status(&gateway.peer(), "a.example").await, 200, "newcomers too");
        std::fs::write(&file, &good).unwrap();
    }
    // All that is wrong at once.
    edit(&gateway, &chain, "chain = \"gone.pem\"");
    edit(&gateway, "client_ca = \"ca.pem\"", "client_ca = \"gone-ca.pem\"");
    let response = post(&gateway).await;
    assert_eq!(response.status, 422);
    let said = response.text();
    assert!(said.contains("certificate[0].chain: ") && said.contains("listener[0].client_ca: "), "{said}");
    std::fs::remove_file(&file).unwrap();
    assert_eq!(post(&gateway).await.status, 422, "no file at all");
    std::fs::write(&file, &good).unwrap();
    assert_eq!(post(&gateway).await.status, 200);
    assert_eq!(gateway.metric(GENERATION).await, 2.0);
}

#[tokio::test]
async fn what_takes_a_restart_is_refused() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let file = config_file(&gateway);
    let good = std::fs::read_to_string(&file).unwrap();
    let client = gateway.peer();
    let other = free();
    let at = |address: SocketAddr| format!("address = \"{address}\"");
    for (from, to, what) in [
        (at(gateway.addr), at(other), "listener"),
        ("[admin]".to_owned(), listener(other, "") + "[admin]", "listener"),
        (at(gateway.admin), at(other), "admin.address"),
        (
            "[admin]".into(),
            format!("[egress]\naddress = \"127.0.0.1:{}\"\nca = \"ca.pem\"\n[admin]", other.port()),
            "egress.address",
        ),
    ] {
        edit(&gateway, &from, &to);
        let response = post(&gateway).await;
        let said = response.text();
        assert_eq!(response.status, 422, "{to}: {said}");
        assert!(said.contains("restart") && said.contains("upgrade") && said.contains(what), "{to}: {said}");
        assert_eq!(gateway.metric(GENERATION).await, 1.0);
        assert_eq!(status(&client, "a.example").await, 200);
        assert!(TcpStream::connect(other).await.is_err(), "nobody listens there");
        std::fs::write(&file, &good).unwrap();
    }
    assert_eq!(client.connections(), 1);
    assert_eq!(post(&gateway).await.status, 200);
}

#[tokio::test]
async fn names_of_the_provider_are_exchanged() {
    const NEW: &str = "new-b.example";
    async fn ask(client: &Client, recipient: &str) -> (u16, String) {
        let body = encode::verification_key_request("a.example", recipient);
        problem(&client.send(Method::GET, "/verification_key", body).await.unwrap())
    }
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    // By Host, by SNI, by the body.
    let cases = [
        (both(|| gateway.peer().authority(NEW)), "b.example"),
        (both(|| gateway.peer().sni(NEW).trust_anyone()), "b.example"),
        (both(|| gateway.peer()), NEW),
    ];
    for (clients, recipient) in &cases {
        for client in clients {
            assert_eq!(ask(client, recipient).await, refusal(421, "misdirected"), "{client:?}");
        }
    }
    assert_eq!(ds.begun(), 0);
    edit(&gateway, "\"also-b.example\"]", "\"also-b.example\", \"new-b.example\"]");
    assert_eq!(post(&gateway).await.status, 200);
    for (clients, recipient) in &cases {
        for client in clients {
            assert_eq!(ask(client, recipient).await, refusal(200, ""), "{client:?}");
        }
    }

    // The Delivery Service moves.
    let domain = async |client: Client| client.send(Method::GET, "/.well-known/mimi/ds-domain", "").await.unwrap();
    assert_eq!(domain(gateway.peer()).await.text(), DS);
    edit(&gateway, "ds_domain = \"ds.b.example\"", "ds_domain = \"b.example\"");
    assert_eq!(post(&gateway).await.status, 200);
    assert_eq!(domain(gateway.peer().sni("b.example").authority("b.example")).await.text(), "b.example");
    assert_eq!(problem(&domain(gateway.peer()).await), refusal(421, "misdirected"));
}

#[tokio::test]
async fn what_is_reloaded_holds_for_connections_that_are_open() {
    let ds = Ds::start().await;
    let member = limit("member", "member", "1/h", 2, "");
    let mut gateway = Gateway::start(Setup { delivery: PATIENT, ..Setup::of(&ds) }.with(&member)).await;
    let client = gateway.peer();
    let send = async |body: Vec<u8>| {
        let forged = [("x-who", "evil.example")];
        client.send_with(Method::POST, "/group_operation", &forged, body).await.unwrap().status.as_u16()
    };
    for expected in [200, 200, 429] {
        assert_eq!(send(message_in(b"g", 1)).await, expected);
    }
    assert_eq!(send(large_message(150 << 10)).await, 200);
    assert_eq!(learned(&ds, "x-moh-provider").as_deref(), Some("a.example"));

    let change = "[endpoints.group_operation]\nmax_body = \"100KiB\"\n[delivery_service.fields]\nprovider = \
                  \"x-who\"\nrequest_id = \"\"\n";
    gateway
        .reload("ok", |setup| {
            setup.delivery = "connect_timeout = \"1s\"\nread_timeout = \"300ms\"";
            setup.more.push_str(change);
        })
        .await;
    assert_eq!(send(message_in(b"g", 1)).await, 429, "what was counted stays");
    assert_eq!(send(message_in(b"g", 2)).await, 200);
    let last = ds.requests().pop().unwrap();
    let said: Vec<_> = last.headers.get_all("x-who").iter().collect();
    assert_eq!(said, ["a.example"]);
    assert_eq!((learned(&ds, "x-moh-provider"), learned(&ds, "x-request-id")), (None, None));
    ds.hang(true);
    let began = Instant::now();
    assert_eq!(send(message_in(b"g", 3)).await, 504);
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    ds.hang(false);
    assert_eq!(send(message_in(b"g", 3)).await, 200);
    assert_eq!(client.connections(), 1);
    let complete = ds.complete();
    assert_eq!(send(large_message(150 << 10)).await, 413);
    assert_eq!(ds.complete(), complete);
}

#[tokio::test]
async fn times_of_clients_are_exchanged() {
    let ds = Ds::start().await;
    let timeouts = "headers = \"10s\"\nbody_idle = \"10s\"\nshutdown = \"5s\"";
    let mut gateway = Gateway::start(Setup { timeouts, ..Setup::of(&ds) }).await;
    let a = a_example();
    let mut open = Open::served(gateway.addr, &a, "a.example").await;
    let hasty = "headers = \"1s\"\nbody_idle = \"500ms\"\nshutdown = \"5s\"";
    gateway.reload("ok", |setup| setup.timeouts = hasty).await;

    let mut late = Open::new(gateway.addr, &shows(&a)).await.unwrap();
    late.0.write_all(b"GET /verification_key HTT").await.unwrap();
    let answer = tokio::time::timeout(PATIENCE, late.answer()).await.expect("its time is over");
    assert_eq!(answer.unwrap(), 408, "a head");

    let head = format!("GET /verification_key HTTP/1.1\r\nHost: {DS}\r\nContent-Type: application/octet-stream\r\n");
    let head = head + "Content-Length: 9\r\n\r\n";
    open.0.write_all(head.as_bytes()).await.unwrap();
    let answer = tokio::time::timeout(PATIENCE, open.answer()).await.expect("its time is over");
    assert_eq!(answer.unwrap(), 408, "a body, on a connection from before");
    assert_eq!(ds.complete(), 1);
}

#[tokio::test]
async fn nodes_are_exchanged_and_the_old_ones_end_what_they_have() {
    let (old, new) = (Ds::start().await, Ds::start().await);
    let mut gateway = Gateway::start(Setup { delivery: PATIENT, ..Setup::of(&old) }).await;
    let address = gateway.addr;
    let a = a_example();
    let kept = both(|| client_at(address, Some(&a)));
    for client in &kept {
        assert_eq!(status(client, "a.example").await, 200);
    }
    old.hang(true);
    let waiting = both(|| client_at(address, Some(&a)))
        .map(|client| tokio::spawn(async move { status(&client, "a.example").await }));
    assert!(old.until(|ds| ds.complete() == 4).await);

    gateway.reload("ok", |setup| setup.nodes = vec![(new.addr, "h2c")]).await;
    for client in &kept {
        for _ in 0..3 {
            assert_eq!(status(client, "a.example").await, 200);
        }
        assert_eq!(client.connections(), 1);
    }
    assert_eq!((old.begun(), new.complete()), (4, 6));
    assert!(waiting.iter().all(|request| !request.is_finished()));
    old.hang(false);
    for request in waiting {
        assert_eq!(request.await.unwrap(), 200, "it was under way at the old one");
    }
    assert_eq!(old.begun(), 4);
}

/// Waits until a log has so many lines; how many it has then.
async fn lines(log: &Path, n: usize) -> usize {
    let until = Instant::now() + PATIENCE;
    loop {
        let count = std::fs::read_to_string(log).unwrap_or_default().lines().count();
        if count >= n || Instant::now() > until {
            return count;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn the_access_log_is_opened_anew() {
    let ds = Ds::start().await;
    let mut gateway = Gateway::start(Setup::of(&ds)).await;
    let client = gateway.peer();
    let [log, rotated, other] = ["access.log", "access.log.1", "other.log"].map(|name| gateway.dir.path().join(name));
    assert_eq!(status(&client, "a.example").await, 200);
    assert_eq!(lines(&log, 1).await, 1);
    // As logrotate does.
    std::fs::rename(&log, &rotated).unwrap();
    assert_eq!(status(&client, "a.example").await, 200);
    assert_eq!(lines(&rotated, 2).await, 2, "until it is told");
    gateway.reload("ok", |_| ()).await;
    assert_eq!(status(&client, "a.example").await, 200);
    assert_eq!((lines(&log, 1).await, lines(&rotated, 2).await), (1, 2));

    edit(&gateway, "path = \"access.log\"", "path = \"other.log\"");
    assert_eq!(post(&gateway).await.status, 200);
    for _ in 0..2 {
        assert_eq!(status(&client, "a.example").await, 200);
    }
    assert_eq!((lines(&other, 2).await, lines(&log, 1).await, lines(&rotated, 2).await), (2, 1, 2));

    // Where nothing can be written nothing changes.
    edit(&gateway, "path = \"other.log\"", "path = \"nowhere/access.log\"");
    assert_eq!(post(&gateway).await.status, 422);
    assert_eq!(status(&client, "a.example").await, 200);
    assert_eq!(lines(&other, 3).await, 3);
    assert_eq!(client.connections(), 1);
}

/// What the gateway says of an HTTP/2 connection: its SETTINGS (RFC 9113 §6.5).
async fn settings(gateway: &Gateway) -> HashMap<u16, u32> {
    let mut stream = raw_tls(gateway.addr, DS, &ca().pem(), &["h2"], None).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(head[3], 4, "SETTINGS come first");
    let mut content = vec![0; usize::from(u16::from_be_bytes([head[1], head[2]]))];
    stream.read_exact(&mut content).await.unwrap();
    let setting = |of: &[u8]| (u16::from_be_bytes([of[0], of[1]]), u32::from_be_bytes([of[2], of[3], of[4], of[5]]));
    content.chunks_exact(6).map(setting).collect()
}

#[tokio::test]
async fn bounds_of_connections_are_exchanged() {
    const MAX_STREAMS: u16 = 3;
    const MAX_HEADER_LIST: u16 = 6;
    let ds = Ds::start().await;
    let mut gateway = Gateway::start(Setup::of(&ds)).await;
    let bounds = async |gateway: &Gateway| {
        let settings = settings(gateway).await;
        (settings.get(&MAX_STREAMS).copied(), settings.get(&MAX_HEADER_LIST).copied())
    };
    assert_eq!(bounds(&gateway).await, (Some(100), Some(16 << 10)));
    let (a, c) = (a_example(), ca().issue(&["c.example"]));
    let mut first = Open::served(gateway.addr, &a, "a.example").await;
    drop(Open::served(gateway.addr, &a, "a.example").await);

    let more = "[http2]\nmax_streams = 7\nmax_header_list = \"8KiB\"\n[connections]\nper_provider = 1";
    gateway.reload("ok", |setup| setup.more = more.into()).await;
    assert_eq!(bounds(&gateway).await, (Some(7), Some(8 << 10)));
    // The one that is open counts.
    let another = visit(gateway.addr, &shows(&a), "a.example").await;
    assert!(another.is_err(), "{another:?}");
    let refused = "moh_gateway_connections_refused_total{reason=\"per-provider\"}";
    assert!(gateway.metric(refused).await >= 1.0);
    comes_in(gateway.addr, &c, "c.example").await;
    assert_eq!(first.ask("a.example").await.unwrap(), 200);
    drop(first);
    comes_in(gateway.addr, &a, "a.example").await;
}
