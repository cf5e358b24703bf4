//! A federation client: what another provider's Delivery Service is to the gateway. HTTP/1.1 or HTTP/2 by hyper, TLS 1.3 by
//! rustls, with a certificate or without; plain HTTP too, to talk to a DS directly. And bare TLS streams for octets made by hand.
//!
//! ```ignore
//! let client = Client::tls(addr, &ca.pem()).identity(&ca.issue(&["a.example"])).http1();
//! let response = client.send(Method::GET, "/verification_key", body).await?;
//! let mut upload = client.begin(Method::POST, "/group_operation", &[], Some(length)).await?;
//! upload.write(first).await?; let response = upload.finish().await?;
//! ```
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, Version, header};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme, SupportedProtocolVersion};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::pki::Identity;

pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// A client of one address. It keeps connections and uses them again.
pub struct Client {
    addr: SocketAddr,
    tls: Option<Tls>,
    authority: String,
    http2: bool,
    timeout: Duration,
    opened: AtomicUsize,
    idle: Mutex<Vec<http1::SendRequest<Sending>>>,
    shared: tokio::sync::Mutex<Option<http2::SendRequest<Sending>>>,
}

struct Tls {
    roots: Option<String>,
    identity: Option<Identity>,
    sni: String,
    config: OnceLock<Arc<ClientConfig>>,
}

/// An answer, whole.
#[derive(Debug, Clone)]
pub struct Response {
    pub status: StatusCode,
    pub version: Version,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// From the request being handed to an open connection to the last octet of the answer.
    pub elapsed: Duration,
}

impl Response {
    /// A header's value, where it has one that is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON: a problem document. Null, where it is none.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({} at {})", self.authority, self.addr)
    }
}

impl Client {
    /// HTTP/2 over TLS 1.3 to `ds.b.example` at this address, without a certificate.
    pub fn tls(addr: SocketAddr, ca_pem: &str) -> Client {
        let sni = "ds.b.example".to_owned();
        let tls = Tls { roots: Some(ca_pem.to_owned()), identity: None, sni: sni.clone(), config: OnceLock::new() };
        Client { tls: Some(tls), ..Client::plain(addr) }.authority(&sni)
    }

    /// Plain HTTP/2 with prior knowledge.
    pub fn plain(addr: SocketAddr) -> Client {
        Client {
            addr,
            tls: None,
            authority: addr.to_string(),
            http2: true,
            timeout: Duration::from_secs(10),
            opened: AtomicUsize::new(0),
            idle: Mutex::default(),
            shared: tokio::sync::Mutex::default(),
        }
    }

    /// Shows this certificate.
    #[must_use]
    pub fn identity(self, identity: &Identity) -> Client {
        self.with_tls(|tls| tls.identity = Some(identity.clone()))
    }

    /// Asks for this name in the TLS handshake, and expects the certificate to hold it. The authority stays.
    #[must_use]
    pub fn sni(self, name: &str) -> Client {
        self.with_tls(|tls| tls.sni = name.to_owned())
    }

    /// Takes any certificate from the server: for names that it does not have.
    #[must_use]
    pub fn trust_anyone(self) -> Client {
        self.with_tls(|tls| tls.roots = None)
    }

    /// `Host` or `:authority` of requests. The name in the handshake stays.
    #[must_use]
    pub fn authority(mut self, authority: &str) -> Client {
        self.authority = authority.to_owned();
        self
    }

    /// HTTP/1.1 instead of HTTP/2.
    #[must_use]
    pub fn http1(mut self) -> Client {
        self.http2 = false;
        self
    }

    /// HTTP/2, as it is anyway.
    #[must_use]
    pub fn http2(mut self) -> Client {
        self.http2 = true;
        self
    }

    /// How long a request may take, 10 s if not said.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Client {
        self.timeout = timeout;
        self
    }

    fn with_tls(mut self, change: impl FnOnce(&mut Tls)) -> Client {
        change(self.tls.as_mut().expect("a client with TLS"));
        self
    }

    /// Whether it speaks HTTP/1.1.
    pub fn is_http1(&self) -> bool {
        !self.http2
    }

    /// How many connections it has opened.
    pub fn connections(&self) -> usize {
        self.opened.load(SeqCst)
    }

    /// Sends a request and waits for the whole answer. `path` may be a whole path and query.
    pub async fn send(&self, method: Method, path: &str, body: impl Into<Bytes>) -> Result<Response, Error> {
        self.send_with(method, path, &[], body).await
    }

    /// As [`Client::send`], with more headers. One that is there by default (`content-type`, over HTTP/1.1 `host`) is
    /// replaced, or left out if its value is empty.
    pub async fn send_with(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Response, Error> {
        let body: Bytes = body.into();
        let request = self.request(method, path, headers, Some(body.len() as u64))?.map(|()| Sending::whole(body));
        let exchange = async { self.exchange(self.sender().await?, request).await };
        tokio::time::timeout(self.timeout, exchange).await.map_err(|_| "no answer in time")?
    }

    /// Begins a request whose body is written bit by bit. With a length it is framed by Content-Length, else it is chunked
    /// over HTTP/1.1.
    pub async fn begin(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        length: Option<u64>,
    ) -> Result<Upload, Error> {
        let (sender, receiver) = mpsc::channel(1);
        let request = self.request(method, path, headers, length)?.map(|()| Sending::Pieces(receiver));
        let connection = self.sender().await?;
        let answer = tokio::spawn(exchange(connection, request));
        Ok(Upload { sender: Some(sender), answer, timeout: self.timeout })
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        extra: &[(&str, &str)],
        length: Option<u64>,
    ) -> Result<Request<()>, Error> {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        let uri: Uri = if self.http2 {
            let scheme = if self.tls.is_some() { "https" } else { "http" };
            format!("{scheme}://{}{path}", self.authority).parse()?
        } else {
            headers.insert(header::HOST, HeaderValue::from_str(&self.authority)?);
            path.parse()?
        };
        if let Some(length) = length {
            headers.insert(header::CONTENT_LENGTH, length.into());
        }
        for (name, _) in extra {
            headers.remove(*name);
        }
        for (name, value) in extra.iter().filter(|(_, value)| !value.is_empty()) {
            headers.append(HeaderName::try_from(*name)?, HeaderValue::try_from(*value)?);
        }
        let mut request = Request::builder().method(method).uri(uri).body(())?;
        *request.headers_mut() = headers;
        Ok(request)
    }

    /// An open connection that can take a request.
    async fn sender(&self) -> Result<Sender, Error> {
        if self.http2 {
            let mut shared = self.shared.lock().await;
            if let Some(sender) = &mut *shared
                && sender.ready().await.is_ok()
            {
                return Ok(Sender::H2(sender.clone()));
            }
            let io = TokioIo::new(self.connect().await?);
            let (sender, connection) = http2::Builder::new(TokioExecutor::new()).handshake(io).await?;
            tokio::spawn(connection);
            *shared = Some(sender.clone());
            return Ok(Sender::H2(sender));
        }
        loop {
            let idle = self.idle.lock().unwrap().pop();
            let Some(mut sender) = idle else { break };
            if sender.ready().await.is_ok() {
                return Ok(Sender::H1(sender));
            }
        }
        let (sender, connection) = http1::handshake(TokioIo::new(self.connect().await?)).await?;
        tokio::spawn(connection);
        Ok(Sender::H1(sender))
    }

    async fn connect(&self) -> Result<Pin<Box<dyn Stream>>, Error> {
        self.opened.fetch_add(1, SeqCst);
        let Some(tls) = &self.tls else {
            let stream = TcpStream::connect(self.addr).await?;
            stream.set_nodelay(true)?;
            return Ok(Box::pin(stream));
        };
        let alpn = if self.http2 { "h2" } else { "http/1.1" };
        let config =
            tls.config.get_or_init(|| Arc::new(tls_config(tls.roots.as_deref(), &[alpn], tls.identity.as_ref())));
        let stream = handshake(self.addr, &tls.sni, config.clone()).await?;
        if stream.get_ref().1.alpn_protocol() != Some(alpn.as_bytes()) {
            return Err(format!("the server did not choose {alpn}").into());
        }
        Ok(Box::pin(stream))
    }

    async fn exchange(&self, sender: Sender, request: Request<Sending>) -> Result<Response, Error> {
        let (response, sender) = exchange(sender, request).await?;
        if let Sender::H1(sender) = sender {
            self.idle.lock().unwrap().push(sender);
        }
        Ok(response)
    }
}

/// A request whose body is being written. Dropped before it is finished, it breaks off.
#[derive(Debug)]
pub struct Upload {
    sender: Option<mpsc::Sender<Result<Bytes, Error>>>,
    answer: JoinHandle<Result<(Response, Sender), Error>>,
    timeout: Duration,
}

impl Upload {
    /// Writes a piece. An error: the other side takes no more.
    pub async fn write(&self, piece: impl Into<Bytes>) -> Result<(), Error> {
        let sender = self.sender.as_ref().expect("a body that is not at its end");
        sender.send(Ok(piece.into())).await.map_err(|_| "the body is not wanted any more".into())
    }

    /// Waits for the answer without ending the body: for one that comes early.
    pub async fn answer(&mut self) -> Result<Response, Error> {
        let answer = tokio::time::timeout(self.timeout, &mut self.answer).await.map_err(|_| "no answer in time")?;
        answer?.map(|(response, _)| response)
    }

    /// Ends the body and waits for the answer.
    pub async fn finish(mut self) -> Result<Response, Error> {
        self.sender = None;
        self.answer().await
    }

    /// Breaks the body off.
    pub async fn abort(self) {
        if let Some(sender) = &self.sender {
            let _ = sender.send(Err("broken off".into())).await;
        }
        let _ = tokio::time::timeout(Duration::from_secs(1), self.answer).await;
    }
}

#[derive(Debug)]
enum Sender {
    H1(http1::SendRequest<Sending>),
    H2(http2::SendRequest<Sending>),
}

async fn exchange(mut sender: Sender, request: Request<Sending>) -> Result<(Response, Sender), Error> {
    let begin = Instant::now();
    let response: http::Response<Incoming> = match &mut sender {
        Sender::H1(sender) => sender.send_request(request).await?,
        Sender::H2(sender) => sender.send_request(request).await?,
    };
    let (head, body) = response.into_parts();
    let body = body.collect().await?.to_bytes();
    let elapsed = begin.elapsed();
    Ok((Response { status: head.status, version: head.version, headers: head.headers, body, elapsed }, sender))
}

/// A request's body.
#[derive(Debug)]
enum Sending {
    Whole(Option<Bytes>),
    Pieces(mpsc::Receiver<Result<Bytes, Error>>),
}

impl Sending {
    fn whole(body: Bytes) -> Sending {
        Sending::Whole(Some(body).filter(|body| !body.is_empty()))
    }
}

impl Body for Sending {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match &mut *self {
            Sending::Whole(body) => Poll::Ready(body.take().map(|body| Ok(Frame::data(body)))),
            Sending::Pieces(pieces) => pieces.poll_recv(context).map(|piece| piece.map(|piece| piece.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Sending::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Sending::Whole(body) => SizeHint::with_exact(body.as_ref().map_or(0, Bytes::len) as u64),
            Sending::Pieces(_) => SizeHint::default(),
        }
    }
}

trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send> Stream for T {}

/// A TLS 1.3 connection for octets made by hand. `alpn` may be empty.
pub async fn raw_tls(
    addr: SocketAddr,
    sni: &str,
    ca_pem: &str,
    alpn: &[&str],
    identity: Option<&Identity>,
) -> io::Result<TlsStream<TcpStream>> {
    handshake(addr, sni, Arc::new(tls_config(Some(ca_pem), alpn, identity))).await
}

/// The same, offering TLS 1.2 only. (Pingora switches rustls' TLS 1.2 on.)
pub async fn raw_tls12(addr: SocketAddr, sni: &str, ca_pem: &str) -> io::Result<TlsStream<TcpStream>> {
    let tls12: Vec<_> = rustls::ALL_VERSIONS
        .iter()
        .copied()
        .filter(|version| version.version == rustls::ProtocolVersion::TLSv1_2)
        .collect();
    assert!(!tls12.is_empty(), "rustls was built without TLS 1.2");
    handshake(addr, sni, Arc::new(tls_config_of(&tls12, Some(ca_pem), &[], None))).await
}

/// A handshake with any configuration.
pub async fn handshake(addr: SocketAddr, sni: &str, config: Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    let name = ServerName::try_from(sni.to_owned()).map_err(io::Error::other)?;
    let stream = TcpStream::connect(addr).await?;
    stream.set_nodelay(true)?;
    TlsConnector::from(config).connect(name, stream).await
}

/// TLS 1.3 with these roots (any certificate will do, if there are none), protocols and certificate.
pub fn tls_config(roots: Option<&str>, alpn: &[&str], identity: Option<&Identity>) -> ClientConfig {
    tls_config_of(&[&rustls::version::TLS13], roots, alpn, identity)
}

fn tls_config_of(
    versions: &[&'static SupportedProtocolVersion],
    roots: Option<&str>,
    alpn: &[&str],
    identity: Option<&Identity>,
) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions).unwrap();
    let builder = match roots {
        Some(pem) => {
            let mut store = RootCertStore::empty();
            for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
                store.add(certificate.unwrap()).unwrap();
            }
            builder.with_root_certificates(store)
        }
        None => builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone)),
    };
    let mut config = match identity {
        Some(Identity { chain_pem, key_pem }) => {
            let chain = CertificateDer::pem_slice_iter(chain_pem.as_bytes()).map(Result::unwrap).collect();
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).unwrap()).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    config
}

/// Takes every certificate for every name.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
