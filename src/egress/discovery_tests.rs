use super::*;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

const TEXT: &str = "content-type: text/plain\r\n";

/// An authority that others' servers chain to.
struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "an authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.0.pem().as_bytes()).unwrap()).unwrap();
        Arc::new(roots)
    }

    fn issue(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap(), key)
    }

    /// TLS of a server of this name, which asks for a client's certificate or does not.
    fn server(&self, name: &str, mutual: bool) -> ServerConfig {
        let (certificate, key) = self.issue(name);
        let provider = Arc::new(crate::tls::provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap();
        let builder = match mutual {
            true => {
                let verifier = WebPkiClientVerifier::builder_with_provider(self.roots(), provider).build().unwrap();
                builder.with_client_cert_verifier(verifier)
            }
            false => builder.with_no_client_auth(),
        };
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        builder.with_single_cert(vec![certificate.der().clone()], key.into()).unwrap()
    }
}

/// A provider's server.
struct Site {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
}

impl Site {
    /// One that answers with what `answer` makes of a request's number, from 0, and its head; and then says no more.
    async fn with(tls: ServerConfig, answer: impl Fn(usize, &str) -> String + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let site = Self { address: listener.local_addr().unwrap(), asked: Arc::new(AtomicUsize::new(0)) };
        let (acceptor, asked, answer) = (TlsAcceptor::from(Arc::new(tls)), site.asked.clone(), Arc::new(answer));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, asked, answer) = (acceptor.clone(), asked.clone(), answer.clone());
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    let mut head = vec![];
                    while !head.ends_with(b"\r\n\r\n") {
                        let Ok(octet) = stream.read_u8().await else { return };
                        head.push(octet);
                    }
                    let text = answer(asked.fetch_add(1, Ordering::SeqCst), &String::from_utf8(head).unwrap());
                    let _ = stream.write_all(text.as_bytes()).await;
                    let _ = stream.flush().await;
                    // Until the client has had enough.
                    let _ = stream.read_u8().await;
                });
            }
        });
        site
    }

    /// `b.example`, which says the same to everybody.
    async fn b(ca: &Ca, answer: String) -> Self {
        Self::with(ca.server("b.example", false), move |_, _| answer.clone()).await
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

fn answered(status: u16, fields: &str, body: &str) -> String {
    format!("HTTP/1.1 {status} x\r\n{fields}content-length: {}\r\n\r\n{body}", body.len())
}

fn redirect(to: &str) -> String {
    answered(302, &format!("location: {to}\r\n"), "")
}

fn settings(ca: &Ca, peers: &[(&str, SocketAddr)]) -> Settings {
    let peer = |(provider, address): &(&str, SocketAddr)| StaticPeer {
        provider: (*provider).to_owned(),
        ds_domain: None,
        address: Some(*address),
    };
    Settings {
        peers: peers.iter().map(peer).collect(),
        roots: ca.roots(),
        identity: None,
        timeout: Duration::from_secs(20),
        allow_private: false,
    }
}

fn discovery(ca: &Ca, peers: &[(&str, SocketAddr)]) -> Discovery {
    Discovery::new(settings(ca, peers)).unwrap()
}

fn found(ds_domain: &str, address: SocketAddr) -> Result<Arc<Found>, Error> {
    Ok(Arc::new(Found { ds_domain: ds_domain.to_owned(), addresses: vec![address] }))
}

#[tokio::test]
async fn a_provider_is_asked_once() {
    let ca = Ca::new();
    let site = Site::with(ca.server("b.example", false), |_, head| {
        let right = head.starts_with("GET /.well-known/mimi/ds-domain HTTP/1.1\r\n");
        let right = right && head.contains("\r\nhost: b.example\r\n");
        answered(if right { 200 } else { 400 }, TEXT, "DS.B.example\n")
    })
    .await;
    let discovery = Arc::new(discovery(&ca, &[("B.example", site.address)]));
    let asking: Vec<_> = (0..20)
        .map(|_| {
            let discovery = discovery.clone();
            tokio::spawn(async move { discovery.find("b.Example").await })
        })
        .collect();
    for of in asking {
        assert_eq!(of.await.unwrap(), found("ds.b.example", site.address));
    }
    assert_eq!(discovery.find("b.example").await, found("ds.b.example", site.address));
    assert_eq!(site.asked(), 1);
}

#[tokio::test]
async fn what_is_stale_is_used_while_it_is_asked_again() {
    let ca = Ca::new();
    let name = |n: usize, _: &str| answered(200, TEXT, if n == 0 { "ds1.b.example" } else { "ds2.b.example" });
    let site = Site::with(ca.server("b.example", false), name).await;
    let discovery = discovery(&ca, &[("b.example", site.address)]);
    assert_eq!(discovery.find("b.example").await, found("ds1.b.example", site.address));
    let later = Instant::now() + Duration::from_secs(2 * 3600);
    assert_eq!(discovery.find_at("b.example", later).await, found("ds1.b.example", site.address));
    let newer = async {
        while discovery.find_at("b.example", later).await != found("ds2.b.example", site.address) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), newer).await.unwrap();
}

#[tokio::test]
async fn a_failure_is_remembered() {
    let ca = Ca::new();
    let name = |n: usize, _: &str| answered(if n == 0 { 503 } else { 200 }, TEXT, "ds.b.example");
    let site = Site::with(ca.server("b.example", false), name).await;
    let discovery = discovery(&ca, &[("b.example", site.address)]);
    for _ in 0..3 {
        assert_eq!(discovery.find("b.example").await, Err(Error::Unreachable));
        assert_eq!(site.asked(), 1);
    }
    let later = Instant::now() + Duration::from_secs(10);
    assert_eq!(discovery.find_at("b.example", later).await, found("ds.b.example", site.address));
    assert_eq!(site.asked(), 2);
}

#[tokio::test]
async fn answers_are_names_and_nothing_else() {
    let ca = Ca::new();
    let find = async |answer: String| {
        let site = Site::b(&ca, answer).await;
        discovery(&ca, &[("b.example", site.address)]).find("b.example").await.map(|found| found.ds_domain.clone())
    };
    for (fields, body) in [
        (TEXT, "ds.b.example"),
        (TEXT, "ds.b.example\n"),
        (TEXT, "DS.b.example\r\n"),
        ("Content-Type: Text/Plain; charset=utf-8\r\n", "ds.b.example"),
    ] {
        assert_eq!(find(answered(200, fields, body)).await, Ok("ds.b.example".to_owned()), "{fields:?} {body:?}");
    }
    let long = format!("{}example", "a.".repeat(130));
    let endless = format!("HTTP/1.1 200 x\r\n{TEXT}transfer-encoding: chunked\r\n\r\nfff\r\n{}", "a".repeat(0xfff));
    let wrong = |body: &str| answered(200, TEXT, body);
    for answer in [
        answered(404, TEXT, "ds.b.example"),
        answered(401, TEXT, "ds.b.example"),
        answered(206, TEXT, "ds.b.example"),
        answered(200, "content-type: text/html\r\n", "ds.b.example"),
        answered(200, "", "ds.b.example"),
        wrong(&long),
        endless,
        wrong(""),
        wrong("\n"),
        wrong("ds.b.example\n\n"),
        wrong(" ds.b.example"),
        wrong("ds.b.example ds.c.example"),
        wrong("*.b.example"),
        wrong("ds.b.example."),
        wrong("ds.b.example:443"),
        wrong("https://ds.b.example/"),
        wrong("127.0.0.1"),
        wrong("127.1"),
        wrong("0x7f.0x1"),
        wrong("[::1]"),
        wrong("d\u{fc}.example"),
    ] {
        let found = find(answer.clone()).await;
        assert!(matches!(found, Err(Error::BadAnswer(_))), "{found:?} for {answer:?}");
    }
}

#[tokio::test]
async fn nobody_is_waited_for_without_end() {
    let ca = Ca::new();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut sites = vec![silent.local_addr().unwrap()];
    let head = format!("HTTP/1.1 200 x\r\n{TEXT}content-length: 12\r\n\r\n");
    for answer in ["".to_owned(), "HTTP/1.1 200 x\r\n".to_owned(), head.clone(), head + "ds.b"] {
        sites.push(Site::b(&ca, answer).await.address);
    }
    for address in sites {
        let short = Settings { timeout: Duration::from_millis(300), ..settings(&ca, &[("b.example", address)]) };
        let asked = Discovery::new(short).unwrap();
        let before = Instant::now();
        assert_eq!(asked.find("b.example").await, Err(Error::Unreachable));
        assert!(before.elapsed() < Duration::from_secs(10));
    }
}

#[tokio::test]
async fn who_is_another_or_nobody_is_not_reached() {
    let ca = Ca::new();
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let find = async |address| discovery(&ca, &[("b.example", address)]).find("b.example").await;
    assert_eq!(find(gone).await, Err(Error::Unreachable));
    let answer = |_: usize, _: &str| answered(200, TEXT, "ds.b.example");
    let other_name = Site::with(ca.server("c.example", false), answer).await;
    let other_authority = Site::with(Ca::new().server("b.example", false), answer).await;
    for site in [other_name, other_authority] {
        assert_eq!(find(site.address).await, Err(Error::Unreachable));
        assert_eq!(site.asked(), 0);
    }
}

#[tokio::test]
async fn it_shows_the_certificate_it_has() {
    let ca = Ca::new();
    let site = Site::with(ca.server("b.example", true), |_, _| answered(200, TEXT, "ds.b.example")).await;
    let peers = [("b.example", site.address)];
    assert_eq!(discovery(&ca, &peers).find("b.example").await, Err(Error::Unreachable));
    let (certificate, key) = ca.issue("a.example");
    let identity = crate::tls::Certificate::new(certificate.pem().as_bytes(), key.serialize_pem().as_bytes()).unwrap();
    let with = Discovery::new(Settings { identity: Some(identity), ..settings(&ca, &peers) }).unwrap();
    assert_eq!(with.find("b.example").await, found("ds.b.example", site.address));
}

#[tokio::test]
async fn three_redirects_are_followed() {
    let ca = Ca::new();
    let to = ["/elsewhere", "https://b.example/x?y", "//B.example:443/z#here"];
    let site = Site::with(ca.server("b.example", false), move |n, _| match to.get(n) {
        Some(to) => redirect(to),
        None => answered(200, TEXT, "ds.b.example"),
    })
    .await;
    let of_three = discovery(&ca, &[("b.example", site.address)]);
    assert_eq!(of_three.find("b.example").await, found("ds.b.example", site.address));
    assert_eq!(site.asked(), 4);
    let site = Site::b(&ca, redirect("/again")).await;
    let of_more = discovery(&ca, &[("b.example", site.address)]);
    assert_eq!(of_more.find("b.example").await, Err(Error::BadAnswer("it redirects too often")));
    assert_eq!(site.asked(), 4);
}

#[tokio::test]
async fn redirects_lead_nowhere_else() {
    let ca = Ca::new();
    for (to, private) in [
        ("https://127.0.0.1/x", true),
        ("https://2130706433/", true),
        ("https://0x7f.1/", true),
        ("https://10.0.0.1/", true),
        ("https://169.254.169.254/latest/meta-data/", true),
        ("https://[::1]/", true),
        ("https://[::ffff:169.254.169.254]/", true),
        ("https://[fd00::1]/", true),
        // This is seen when the name has been resolved.
        ("https://localhost/", true),
        ("https://8.8.8.8/", false),
        ("https://[2606:4700::1111]/", false),
        ("http://b.example/", false),
        ("//b.example:8443/", false),
        ("https://b.example:80/", false),
        ("ftp://b.example/", false),
        ("file:///etc/passwd", false),
        ("https://user@b.example/", false),
        ("https://:secret@b.example/", false),
        ("https://b.example./", false),
        ("https://b_.example/", false),
        ("https://", false),
    ] {
        let site = Site::b(&ca, redirect(to)).await;
        let found = discovery(&ca, &[("b.example", site.address)]).find("b.example").await;
        match private {
            true => assert_eq!(found, Err(Error::PrivateAddress), "{to}"),
            false => assert!(matches!(found, Err(Error::BadAnswer(_))), "{found:?} for {to}"),
        }
        assert_eq!(site.asked(), 1, "{to}");
    }
    let site = Site::b(&ca, answered(302, "", "")).await;
    let nowhere = discovery(&ca, &[("b.example", site.address)]).find("b.example").await;
    assert!(matches!(nowhere, Err(Error::BadAnswer(_))), "{nowhere:?}");
}

#[tokio::test]
async fn what_the_operator_says_of_a_provider_is_for_that_provider_alone() {
    let ca = Ca::new();
    let stranger = Site::b(&ca, redirect("https://localhost/")).await;
    let ours = Site::with(ca.server("localhost", false), |_, _| answered(200, TEXT, "ds.example")).await;
    let discovery = discovery(&ca, &[("b.example", stranger.address), ("localhost", ours.address)]);
    assert_eq!(discovery.find("b.example").await, Err(Error::PrivateAddress));
    assert_eq!((stranger.asked(), ours.asked()), (1, 0));
    assert_eq!(discovery.find("localhost").await, found("ds.example", ours.address));
}

#[tokio::test]
async fn names_that_lead_inside_lead_nowhere() {
    let ca = Ca::new();
    assert_eq!(discovery(&ca, &[]).find("localhost").await, Err(Error::PrivateAddress), "the provider's own");
    let peer =
        |address| StaticPeer { provider: "b.example".to_owned(), ds_domain: Some("LocalHost".to_owned()), address };
    let find = async |allow_private, address| {
        let settings = Settings { peers: vec![peer(address)], allow_private, ..settings(&ca, &[]) };
        Discovery::new(settings).unwrap().find("b.example").await
    };
    assert_eq!(find(false, None).await, Err(Error::PrivateAddress), "its Delivery Service's");
    let allowed = find(true, None).await.unwrap();
    assert_eq!(allowed.ds_domain, "localhost");
    assert!(!allowed.addresses.is_empty());
    assert!(allowed.addresses.iter().all(|address| address.ip().is_loopback() && address.port() == 443));
    let address = SocketAddr::from(([127, 0, 0, 1], 8443));
    assert_eq!(find(false, Some(address)).await, found("localhost", address), "the operator's word");
}

#[tokio::test]
async fn providers_have_names() {
    let ca = Ca::new();
    let discovery = discovery(&ca, &[]);
    for name in [
        "",
        ".",
        "b.example.",
        "b.example:443",
        "b.example/x",
        "user@b.example",
        "*.b.example",
        "b_.example",
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0X7F.0X1",
        "0x",
        "b.example.0x1",
        "[::1]",
        "::1",
        "xn--99999999.example",
    ] {
        assert_eq!(discovery.find(name).await, Err(Error::NotAProvider), "{name}");
    }
    for (name, lower) in [("B.Example", "b.example"), ("0x7f.example", "0x7f.example"), ("1.2.a3", "1.2.a3")] {
        assert_eq!(domain_name(name.as_bytes()), Some(lower.to_owned()));
    }
    let wrong = Discovery::new(settings(&ca, &[("127.0.0.1", SocketAddr::from(([127, 0, 0, 1], 1)))]));
    assert!(matches!(wrong, Err(SetupError::Name(name)) if name == "127.0.0.1"));
}

#[test]
fn an_answer_is_fresh_within_bounds() {
    let url = Url::parse("https://b.example/").unwrap();
    let seconds = |fields: &[(&str, &str)]| {
        let mut response = Response::builder();
        for (name, value) in fields {
            response = response.header(*name, *value);
        }
        fresh_for(&url, response.body(()).unwrap()).as_secs()
    };
    assert_eq!(seconds(&[]), 3600);
    assert_eq!(seconds(&[("last-modified", "Sun, 06 Nov 1994 08:49:37 GMT")]), 3600, "no guesses");
    assert_eq!(seconds(&[("cache-control", "max-age=1000")]), 1000);
    assert_eq!(seconds(&[("cache-control", "private, max-age=1000"), ("set-cookie", "a=b")]), 1000);
    assert_eq!(seconds(&[("cache-control", "max-age=1000"), ("age", "400")]), 600);
    assert_eq!(seconds(&[("cache-control", "max-age=99999999")]), 24 * 3600);
    for short in ["max-age=1", "max-age=0", "no-store", "no-cache", "no-store, max-age=1000"] {
        assert_eq!(seconds(&[("cache-control", short)]), 60, "{short}");
    }
    assert_eq!(seconds(&[("expires", "0")]), 60);
    for beyond in ["18446744073709551615", "99999999999999999999", "-1", "x"] {
        assert_eq!(seconds(&[("cache-control", "max-age=1000"), ("age", beyond)]), 1000, "{beyond}");
        let both = seconds(&[("cache-control", &format!("max-age={beyond}")), ("age", beyond)]);
        assert!((60..=24 * 3600).contains(&both), "{beyond}");
    }
}
