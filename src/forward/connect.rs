//! Connections to peers, as they are made: TCP or a Unix socket, with TLS or without.

use super::{ConnectError, Peer, Protocol, http1};
use crate::copying::ByPieces;
use crate::upstream::Target;
use rustix::io::Errno;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use siphasher::sip128::{Hasher128 as _, SipHasher24};
use std::hash::{BuildHasher as _, Hash, Hasher};
use std::io;
use std::sync::{Arc, LazyLock};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

/// Keys of this process's digests: nobody else can say what collides.
static KEYS: LazyLock<(u64, u64)> = LazyLock::new(|| {
    let of = |n: u64| std::hash::RandomState::new().hash_one(n);
    (of(1), of(2))
});

/// What digests are made with: the same for equal inputs as long as this process runs.
pub(super) fn hasher() -> SipHasher24 {
    SipHasher24::new_with_keys(KEYS.0, KEYS.1)
}

/// Its length before it, so that two parts are never taken for others.
fn add(hasher: &mut SipHasher24, octets: &[u8]) {
    hasher.write_u64(octets.len() as u64);
    hasher.write(octets);
}

/// How a peer is spoken TLS to. Those of equal roots, identity, name and protocols are equal.
pub struct Tls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    digest: u128,
}

impl Tls {
    /// TLS 1.3 to a server that has a certificate for `name` (of DNS, or an IP address) which chains to one of `roots`
    /// (DER; to none of no roots). `identity` is what it is shown: a chain, and its key in PKCS#8, SEC 1 or PKCS#1 DER.
    ///
    /// # Errors
    /// What is wrong with which of these.
    pub fn new(
        roots: &[Vec<u8>],
        identity: Option<(&[Vec<u8>], &[u8])>,
        name: &str,
        alpn: Protocol,
    ) -> Result<Arc<Self>, String> {
        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(CertificateDer::from(root.clone())).map_err(|e| format!("a root cannot be used: {e}"))?;
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(crate::tls::provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| e.to_string())?
            .with_root_certificates(store);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => {
                let chain = chain.iter().map(|certificate| CertificateDer::from(certificate.clone())).collect();
                let key = PrivateKeyDer::try_from(key.to_vec()).map_err(|e| format!("the key cannot be used: {e}"))?;
                builder.with_client_auth_cert(chain, key).map_err(|e| format!("the identity cannot be used: {e}"))?
            }
        };
        let protocols: &[&[u8]] = match alpn {
            Protocol::Http1 => &[b"http/1.1"],
            Protocol::Http2 => &[b"h2"],
            Protocol::Either => &[b"h2", b"http/1.1"],
        };
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        let server = ServerName::try_from(name.to_owned()).map_err(|e| format!("the name cannot be used: {e}"))?;

        let mut hasher = hasher();
        hasher.write_u64(roots.len() as u64);
        roots.iter().for_each(|root| add(&mut hasher, root));
        hasher.write_u8(identity.is_some().into());
        if let Some((chain, key)) = identity {
            hasher.write_u64(chain.len() as u64);
            chain.iter().for_each(|certificate| add(&mut hasher, certificate));
            add(&mut hasher, key);
        }
        add(&mut hasher, name.as_bytes());
        alpn.hash(&mut hasher);
        Ok(Arc::new(Self { config: Arc::new(config), name: server, digest: hasher.finish128().into() }))
    }

    /// TLS as a configuration has it, to a server that has a certificate for `name`. Of two with one `digest` name and configuration
    /// must be the same.
    ///
    /// # Errors
    /// The name is none.
    pub fn by(config: Arc<ClientConfig>, name: &str, digest: u64) -> Result<Arc<Self>, String> {
        let server = ServerName::try_from(name.to_owned()).map_err(|e| format!("the name cannot be used: {e}"))?;
        let mut hasher = hasher();
        hasher.write_u64(digest);
        add(&mut hasher, name.as_bytes());
        config.alpn_protocols.hash(&mut hasher);
        Ok(Arc::new(Self { config, name: server, digest: hasher.finish128().into() }))
    }

    /// Stands for all that it is made of, within this process.
    pub fn digest(&self) -> u128 {
        self.digest
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The configuration holds a key.
        f.debug_struct("Tls").field("name", &self.name).finish_non_exhaustive()
    }
}

impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Eq for Tls {}

impl Hash for Tls {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

/// A new connection, and whether HTTP/2 is spoken on it.
pub(super) async fn connect(peer: &Peer) -> Result<(http1::Stream, bool), ConnectError> {
    match tokio::time::timeout(peer.times.connect, open(peer)).await {
        Ok(opened) => opened,
        Err(_) => Err(ConnectError::TimedOut),
    }
}

async fn open(peer: &Peer) -> Result<(http1::Stream, bool), ConnectError> {
    match &peer.at {
        Target::Inet(address) => {
            let stream = TcpStream::connect(address).await.map_err(refused)?;
            stream.set_nodelay(true).map_err(refused)?;
            secure(peer, stream).await
        }
        Target::Unix(path) => secure(peer, UnixStream::connect(path).await.map_err(refused)?).await,
    }
}

/// The TLS handshake, where there is to be one.
async fn secure<T>(peer: &Peer, stream: T) -> Result<(http1::Stream, bool), ConnectError>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let Some(tls) = &peer.tls else {
        return Ok((Box::new(stream), peer.protocol == Protocol::Http2));
    };
    let connector = TlsConnector::from(tls.config.clone());
    let stream = connector.connect(tls.name.clone(), stream).await.map_err(ConnectError::Tls)?;
    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let unasked = match peer.protocol {
        Protocol::Http1 => http2,
        Protocol::Http2 => !http2,
        Protocol::Either => false,
    };
    if unasked {
        let what = if http2 { "HTTP/2 was negotiated" } else { "HTTP/2 was not negotiated" };
        return Err(ConnectError::Tls(io::Error::other(what)));
    }
    Ok((Box::new(ByPieces(stream)), http2))
}

fn refused(e: io::Error) -> ConnectError {
    match Errno::from_io_error(&e) {
        Some(Errno::MFILE | Errno::NFILE | Errno::ADDRNOTAVAIL | Errno::NOBUFS | Errno::NOMEM) => {
            ConnectError::OfThisProcess(e)
        }
        _ => ConnectError::Refused(e),
    }
}

/// Peers, bodies and servers of tests.
#[cfg(test)]
pub(super) mod testing {
    use super::super::{Error, Exchange, Head, Source, Stop, Times};
    use super::*;
    use crate::problem::Refusal;
    use bytes::Bytes;
    use h2::server::SendResponse;
    use h2::{RecvStream, server};
    use http::{HeaderMap, Method, Request, response};
    use rustls::ServerConfig;
    use rustls::server::WebPkiClientVerifier;
    use std::future::poll_fn;
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Poll};
    use std::time::Duration;
    use tokio::net::TcpListener;

    pub(in super::super) const SECOND: Duration = Duration::from_secs(1);

    pub(in super::super) fn times() -> Times {
        Times { connect: 5 * SECOND, read: 5 * SECOND, write: 5 * SECOND, keepalive: 60 * SECOND }
    }

    pub(in super::super) fn peer(at: SocketAddr, protocol: Protocol) -> Peer {
        Peer { at: Target::Inet(at), tls: None, protocol, streams: 100, times: times() }
    }

    pub(in super::super) fn head(method: Method) -> Head {
        Head {
            method,
            target: "/path?query".parse().unwrap(),
            authority: "localhost:81".to_owned(),
            fields: Vec::new(),
        }
    }

    /// A body, in pieces; then it ends, waits for ever, or stops.
    pub(in super::super) struct Body {
        rest: Bytes,
        piece: usize,
        length: Option<u64>,
        end: End,
        over: bool,
    }

    #[derive(Clone, Copy, PartialEq)]
    pub(in super::super) enum End {
        Well,
        /// It says so with its last piece.
        Known,
        Never,
        Stops,
    }

    impl Body {
        pub(in super::super) fn none() -> Self {
            Self { rest: Bytes::new(), piece: 1, length: None, end: End::Known, over: true }
        }

        pub(in super::super) fn new(octets: usize, piece: usize, length: bool, end: End) -> Self {
            let rest: Vec<u8> = (0..octets).map(|n| (n % 251) as u8).collect();
            Self { rest: rest.into(), piece, length: length.then_some(octets as u64), end, over: false }
        }
    }

    impl Source for Body {
        fn poll_chunk(&mut self, _: &mut Context<'_>) -> Poll<Option<Result<Bytes, Stop>>> {
            if !self.rest.is_empty() {
                let piece = self.rest.split_to(self.piece.min(self.rest.len()));
                self.over = self.end == End::Known && self.rest.is_empty();
                return Poll::Ready(Some(Ok(piece)));
            }
            match self.end {
                End::Well | End::Known => {
                    self.over = true;
                    Poll::Ready(None)
                }
                End::Never => Poll::Pending,
                End::Stops => {
                    Poll::Ready(Some(Err(Stop { refusal: Refusal::BadHttp("test"), broken: true, gone: false })))
                }
            }
        }

        fn length(&self) -> Option<u64> {
            self.length
        }

        fn is_done(&self) -> bool {
            self.over
        }
    }

    /// An answer, whole.
    #[derive(Debug)]
    pub(in super::super) struct Whole {
        pub(in super::super) head: response::Parts,
        pub(in super::super) body: Vec<u8>,
        pub(in super::super) trailers: Option<HeaderMap>,
    }

    pub(in super::super) async fn answer<S: Source>(exchange: &mut Exchange<S>) -> Result<Whole, Error> {
        let head = poll_fn(|cx| exchange.poll_head(cx)).await?;
        let (mut body, mut trailers) = (vec![], None);
        while let Some(frame) = poll_fn(|cx| exchange.poll_frame(cx)).await {
            match frame?.into_data() {
                Ok(data) => body.extend_from_slice(&data),
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
        }
        assert!(exchange.is_answered());
        Ok(Whole { head, body, trailers })
    }

    /// A server of HTTP/2. What serves a request is told on which connection that is, from 0.
    pub(in super::super) async fn http2<F, R>(
        settings: server::Builder,
        tls: Option<Arc<ServerConfig>>,
        serve: F,
    ) -> (SocketAddr, Arc<AtomicUsize>)
    where
        F: Fn(usize, Request<RecvStream>, SendResponse<Bytes>) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = connections.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (settings, tls, serve) = (settings.clone(), tls.clone(), serve.clone());
                let n = count.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move {
                    let stream: http1::Stream = match tls {
                        None => Box::new(stream),
                        Some(tls) => Box::new(tokio_rustls::TlsAcceptor::from(tls).accept(stream).await.unwrap()),
                    };
                    let mut connection = settings.handshake::<_, Bytes>(stream).await.unwrap();
                    while let Some(Ok((request, respond))) = connection.accept().await {
                        tokio::spawn(serve(n, request, respond));
                    }
                });
            }
        });
        (at, connections)
    }

    pub(in super::super) struct Made {
        pub(in super::super) certificate: Vec<u8>,
        pub(in super::super) key: Vec<u8>,
    }

    pub(in super::super) fn certificate(names: &[&str]) -> Made {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        Made { certificate: made.cert.der().to_vec(), key: made.signing_key.serialize_der() }
    }

    pub(in super::super) fn server(made: &Made, alpn: &[&str], clients: Option<&Made>) -> Arc<ServerConfig> {
        let provider = Arc::new(crate::tls::provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap();
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(made) => {
                let mut roots = RootCertStore::empty();
                roots.add(made.certificate.clone().into()).unwrap();
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
                builder.with_client_cert_verifier(verifier)
            }
        };
        let key = PrivateKeyDer::try_from(made.key.clone()).unwrap();
        let mut config = builder.with_single_cert(vec![made.certificate.clone().into()], key).unwrap();
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        Arc::new(config)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;
    use rustls::ServerConfig;
    use std::net::SocketAddr;
    use std::time::{Duration, Instant};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, UnixListener};
    use tokio_rustls::TlsAcceptor;

    /// Says "hello" by TLS to everybody, and whether they have shown a certificate.
    async fn hello(config: Arc<ServerConfig>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = TlsAcceptor::from(config.clone());
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    let known = stream.get_ref().1.peer_certificates().is_some();
                    let _ = stream.write_all(if known { b"hello you" } else { b"hello all" }).await;
                    let _ = stream.read_u8().await;
                });
            }
        });
        at
    }

    fn over(tls: Arc<Tls>, at: SocketAddr, protocol: Protocol) -> Peer {
        Peer { tls: Some(tls), ..peer(at, protocol) }
    }

    async fn said(peer: &Peer) -> Result<(String, bool), ConnectError> {
        let (mut stream, http2) = connect(peer).await?;
        let mut octets = [0; 9];
        stream.read_exact(&mut octets).await.map_err(ConnectError::Refused)?;
        Ok((String::from_utf8(octets.to_vec()).unwrap(), http2))
    }

    #[tokio::test]
    async fn without_tls() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let unix = UnixListener::bind(&path).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = tcp.local_addr().unwrap();
        for (protocol, is_http2) in [(Protocol::Http1, false), (Protocol::Http2, true), (Protocol::Either, false)] {
            let (mut stream, http2) = connect(&peer(at, protocol)).await.unwrap();
            assert_eq!(http2, is_http2);
            stream.write_all(b"x").await.unwrap();
            assert_eq!(tcp.accept().await.unwrap().0.read_u8().await.unwrap(), b'x');
            let peer = Peer { at: Target::Unix(path.clone()), ..peer(at, protocol) };
            let (mut stream, http2) = connect(&peer).await.unwrap();
            assert_eq!(http2, is_http2);
            stream.write_all(b"y").await.unwrap();
            assert_eq!(unix.accept().await.unwrap().0.read_u8().await.unwrap(), b'y');
        }
    }

    #[tokio::test]
    async fn only_the_right_name_and_root_will_do() {
        let made = certificate(&["localhost", "127.0.0.1"]);
        let stranger = certificate(&["localhost"]);
        let at = hello(server(&made, &[], None)).await;
        let tls = |root: &Made, name: &str| {
            Tls::new(std::slice::from_ref(&root.certificate), None, name, Protocol::Http1).unwrap()
        };
        for name in ["localhost", "127.0.0.1"] {
            let (text, http2) = said(&over(tls(&made, name), at, Protocol::Http1)).await.unwrap();
            assert_eq!((text.as_str(), http2), ("hello all", false));
        }
        let none = Tls::new(&[], None, "localhost", Protocol::Http1).unwrap();
        let wrong = [tls(&made, "elsewhere"), tls(&made, "127.0.0.2"), tls(&stranger, "localhost"), none];
        for wrong in wrong {
            let e = connect(&over(wrong, at, Protocol::Http1)).await.err().unwrap();
            assert!(matches!(e, ConnectError::Tls(_)) && e.to_string().contains("certificate"), "{e}");
        }
    }

    #[tokio::test]
    async fn an_identity_is_shown_to_who_demands_one() {
        let (made, client) = (certificate(&["localhost"]), certificate(&["gateway"]));
        let at = hello(server(&made, &[], Some(&client))).await;
        let chain = [client.certificate.clone()];
        let roots = [made.certificate.clone()];
        let with = Tls::new(&roots, Some((&chain, &client.key)), "localhost", Protocol::Http1).unwrap();
        assert_eq!(said(&over(with, at, Protocol::Http1)).await.unwrap().0, "hello you");
        let without = Tls::new(&roots, None, "localhost", Protocol::Http1).unwrap();
        assert!(said(&over(without, at, Protocol::Http1)).await.is_err());
    }

    #[tokio::test]
    async fn what_is_spoken_is_negotiated() {
        use Protocol::{Either, Http1, Http2};
        let made = certificate(&["localhost"]);
        let cases: [(&[&str], Protocol, Option<bool>); 11] = [
            (&["h2", "http/1.1"], Either, Some(true)),
            (&["http/1.1"], Either, Some(false)),
            (&["h2"], Either, Some(true)),
            (&[], Either, Some(false)),
            (&["other"], Either, None),
            (&["h2", "http/1.1"], Http2, Some(true)),
            (&["http/1.1"], Http2, None),
            (&[], Http2, None),
            (&["h2", "http/1.1"], Http1, Some(false)),
            (&["h2"], Http1, None),
            (&[], Http1, Some(false)),
        ];
        for (alpn, protocol, expected) in cases {
            let at = hello(server(&made, alpn, None)).await;
            let tls = Tls::new(std::slice::from_ref(&made.certificate), None, "localhost", protocol).unwrap();
            match connect(&over(tls, at, protocol)).await {
                Ok((_, http2)) => assert_eq!(Some(http2), expected, "{alpn:?} {protocol:?}"),
                Err(ConnectError::Tls(_)) => assert_eq!(None, expected, "{alpn:?} {protocol:?}"),
                Err(e) => panic!("{e}"),
            }
        }
        // What was asked for is not what TLS has.
        let at = hello(server(&made, &["h2", "http/1.1"], None)).await;
        let tls = Tls::new(std::slice::from_ref(&made.certificate), None, "localhost", Either).unwrap();
        assert!(matches!(connect(&over(tls, at, Http1)).await, Err(ConnectError::Tls(_))));
    }

    #[tokio::test]
    async fn nobody_there_or_nobody_who_answers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let made = certificate(&["localhost"]);
        let tls = Tls::new(std::slice::from_ref(&made.certificate), None, "localhost", Protocol::Http1).unwrap();
        let mut silent = over(tls, at, Protocol::Http1);
        silent.times.connect = Duration::from_millis(100);
        let begun = Instant::now();
        assert!(matches!(connect(&silent).await, Err(ConnectError::TimedOut)));
        assert!(begun.elapsed() >= Duration::from_millis(100) && begun.elapsed() < 2 * SECOND);
        // Who hangs up in the handshake.
        silent.times.connect = 5 * SECOND;
        let hangs_up = async {
            // That of before is still in the queue.
            drop(listener.accept().await.unwrap());
            drop(listener.accept().await.unwrap());
        };
        let (connected, ()) = tokio::join!(connect(&silent), hangs_up);
        assert!(matches!(connected, Err(ConnectError::Tls(_))));
        drop(listener);
        assert!(matches!(connect(&silent).await, Err(ConnectError::Refused(_))));
        let nowhere = Peer { at: Target::Unix("/nonexistent/socket".into()), ..peer(at, Protocol::Http1) };
        assert!(matches!(connect(&nowhere).await, Err(ConnectError::Refused(_))));
    }

    #[test]
    fn what_this_process_lacks_is_not_the_peers_fault() {
        for e in [Errno::MFILE, Errno::NFILE, Errno::ADDRNOTAVAIL, Errno::NOBUFS, Errno::NOMEM] {
            assert!(matches!(refused(e.into()), ConnectError::OfThisProcess(_)), "{e}");
        }
        for e in [Errno::CONNREFUSED, Errno::NETUNREACH, Errno::NOENT, Errno::CONNRESET] {
            assert!(matches!(refused(e.into()), ConnectError::Refused(_)), "{e}");
        }
    }

    #[test]
    fn equal_ones_are_equal_and_no_others() {
        let (one, two) = (certificate(&["localhost"]), certificate(&["localhost"]));
        let (first, second) = (one.certificate.clone(), two.certificate.clone());
        let chains = [[first.clone()], [second.clone()]];
        let make = |roots: &[Vec<u8>], identity: Option<(&[Vec<u8>], &[u8])>, name: &str, alpn| {
            Tls::new(roots, identity, name, alpn).unwrap()
        };
        let all = || {
            let identity = |n: usize| Some((&chains[n][..], if n == 0 { &one.key[..] } else { &two.key[..] }));
            [
                make(&[], None, "a", Protocol::Http1),
                make(std::slice::from_ref(&first), None, "a", Protocol::Http1),
                make(std::slice::from_ref(&second), None, "a", Protocol::Http1),
                make(&[first.clone(), second.clone()], None, "a", Protocol::Http1),
                make(std::slice::from_ref(&first), identity(0), "a", Protocol::Http1),
                make(std::slice::from_ref(&first), identity(1), "a", Protocol::Http1),
                make(std::slice::from_ref(&first), None, "b", Protocol::Http1),
                make(std::slice::from_ref(&first), None, "a", Protocol::Http2),
                make(std::slice::from_ref(&first), None, "a", Protocol::Either),
            ]
        };
        for (n, x) in all().iter().enumerate() {
            for (m, y) in all().iter().enumerate() {
                assert_eq!(x == y, n == m, "{n} {m}");
                assert_eq!(x.digest() == y.digest(), n == m);
            }
        }
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        let (made, other) = (certificate(&["localhost"]), certificate(&["localhost"]));
        let chain = [made.certificate.clone()];
        let bad = |roots: &[Vec<u8>], identity, name| Tls::new(roots, identity, name, Protocol::Http1).unwrap_err();
        assert!(bad(&[b"no certificate".to_vec()], None, "a").contains("root"));
        assert!(bad(&[], Some((&chain[..], &b"no key"[..])), "a").contains("key"));
        assert!(bad(&[], Some((&chain[..], &other.key[..])), "a").contains("identity"));
        assert!(bad(&[], None, "not a name").contains("name"));
        let tls = Tls::new(&[], Some((&chain, &made.key)), "localhost", Protocol::Http1).unwrap();
        assert_eq!(format!("{tls:?}"), "Tls { name: DnsName(\"localhost\"), .. }");
    }
}
