//! Active checks: each member is asked from time to time whether it is well, over a connection of its own, as it is
//! spoken to by requests: TCP or a Unix socket, with TLS or without, HTTP/1.1 or HTTP/2.

use super::member::Member;
use super::settings::{Check, Health, Target};
use super::{Current, Nodes};
use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::net::Ipv6Addr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::MissedTickBehavior;
use tokio_rustls::TlsConnector;

/// Octets of an answer's body that are read.
const MOST: usize = 4 << 10;

/// Octets that the head of an answer may have.
const LONGEST_HEAD: usize = 16 << 10;

/// Who asks.
const AGENT: &str = "moh-gateway";

/// Checks of a member come no faster.
const FASTEST: Duration = Duration::from_millis(10);

/// After a fault of ours.
const PAUSE: Duration = Duration::from_secs(1);

/// What a check speaks over.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Checks all members, for as long as checks are configured. It does not end.
pub(super) async fn keep_checking(nodes: &Nodes) {
    let mut checks = Checks::default();
    loop {
        checks.follow(&nodes.current.load_full());
        loop {
            tokio::select! {
                () = nodes.to_check.notified() => break,
                Some(ended) = checks.tasks.join_next() => {
                    if ended.is_err_and(|e| e.is_panic()) {
                        tracing::error!("a health check could not be made: this is a fault of ours");
                        tokio::time::sleep(PAUSE).await;
                        checks.stop();
                        break;
                    }
                }
            }
        }
    }
}

/// The tasks that check: one a member.
#[derive(Default)]
struct Checks {
    tasks: JoinSet<()>,
    of: HashMap<u64, (Arc<Member>, AbortHandle)>,
    by: Option<Health>,
}

impl Checks {
    /// Checks those that are members now, as is configured now.
    fn follow(&mut self, current: &Current) {
        if current.settings.health != self.by {
            self.stop();
            self.by.clone_from(&current.settings.health);
        }
        let Some(health) = &self.by else { return };
        let members: HashMap<u64, &Arc<Member>> = current.members.iter().map(|member| (member.id, member)).collect();
        self.of.retain(|id, (member, task)| {
            let stays = members.get(id).is_some_and(|now| Arc::ptr_eq(now, member));
            if !stays {
                task.abort();
            }
            stays
        });
        for member in &current.members {
            self.of.entry(member.id).or_insert_with(|| {
                let task = self.tasks.spawn(keep_asking(member.clone(), health.clone()));
                (member.clone(), task)
            });
        }
    }

    fn stop(&mut self) {
        self.tasks.abort_all();
        self.of.clear();
    }
}

/// Checks a member for ever, beginning at some time within the first interval: not all at once.
async fn keep_asking(member: Arc<Member>, health: Health) {
    let every = health.interval.max(FASTEST);
    let first = every.mul_f64(f64::from(RandomState::new().hash_one(member.id) as u32) / f64::from(u32::MAX));
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + first, every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let asking = ask(member.clone(), health.check.clone());
        let asked = match tokio::time::timeout(health.timeout, asking).await {
            Ok(asked) => asked,
            Err(_) => Err(format!("it has not answered within {:?}", health.timeout)),
        };
        let changed = member.checked_at(Instant::now(), asked.is_ok(), &health);
        match (changed, asked) {
            // The observer says that it is; this says why.
            (Some(false), Err(e)) => tracing::warn!(node = member.label(), "its checks fail: {e}"),
            (_, Err(e)) => tracing::debug!(node = member.label(), "a check fails: {e}"),
            (_, Ok(())) => {}
        }
    }
}

/// Asks once; or what is wrong.
async fn ask(member: Arc<Member>, check: Check) -> Result<(), String> {
    let mut stream = connect(member.clone()).await?;
    let Check::Http { path } = check else {
        // It has said all that was asked; how it takes our leave is nothing to us.
        let _ = stream.shutdown().await;
        return Ok(());
    };
    let status = get(member, path, stream).await?;
    if status.is_success() { Ok(()) } else { Err(format!("it answers with {status}")) }
}

async fn connect(member: Arc<Member>) -> Result<Box<dyn Stream>, String> {
    let stream: Box<dyn Stream> = match &member.target {
        Target::Inet(address) => Box::new(TcpStream::connect(address).await.map_err(said)?),
        Target::Unix(path) => Box::new(UnixStream::connect(path).await.map_err(said)?),
    };
    let Some(tls) = &member.tls else { return Ok(stream) };
    let name = ServerName::try_from(tls.name.clone()).map_err(said)?;
    let stream = TlsConnector::from(tls.client.clone()).connect(name, stream).await.map_err(said)?;
    Ok(Box::new(stream))
}

/// The status of the answer to a GET, of which the body's beginning is read too.
async fn get(member: Arc<Member>, path: String, stream: Box<dyn Stream>) -> Result<StatusCode, String> {
    let (host, stream) = (host(&member), TokioIo::new(stream));
    if member.http2 {
        let scheme = if member.tls.is_some() { "https" } else { "http" };
        let uri = Uri::builder().scheme(scheme).authority(host).path_and_query(path).build().map_err(said)?;
        let request = Request::get(uri).header(header::USER_AGENT, AGENT).body(Empty::new()).map_err(said)?;
        let handshake = http2::handshake::<_, _, Empty<Bytes>>(TokioExecutor::new(), stream);
        let (mut sender, connection) = handshake.await.map_err(said)?;
        let answer = async move { read(sender.send_request(request).await.map_err(said)?).await };
        let driven: Driven = Box::pin(async move { drop(connection.await) });
        both(driven, answer).await
    } else {
        let request = Request::get(path).header(header::HOST, host).header(header::USER_AGENT, AGENT);
        let request = request.header(header::CONNECTION, "close").body(Empty::new()).map_err(said)?;
        let handshake = http1::Builder::new().max_buf_size(LONGEST_HEAD).handshake::<_, Empty<Bytes>>(stream);
        let (mut sender, connection) = handshake.await.map_err(said)?;
        let answer = async move { read(sender.send_request(request).await.map_err(said)?).await };
        let driven: Driven = Box::pin(async move { drop(connection.await) });
        both(driven, answer).await
    }
}

/// What drives a connection.
type Driven = Pin<Box<dyn Future<Output = ()> + Send>>;

async fn read(answer: hyper::Response<Incoming>) -> Result<StatusCode, String> {
    let (head, mut body) = answer.into_parts();
    let mut octets = 0;
    while octets < MOST
        && let Some(frame) = body.frame().await
    {
        octets += frame.map_err(said)?.data_ref().map_or(0, Bytes::len);
    }
    Ok(head.status)
}

/// An answer, for which its connection has to be driven.
async fn both<T>(mut connection: Driven, answer: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let mut answer = Box::pin(answer);
    let first = tokio::select! {
        answer = &mut answer => Some(answer),
        _ = &mut connection => None,
    };
    match first {
        Some(answer) => answer,
        None => {
            // All that has come is there to be read.
            drop(connection);
            answer.await
        }
    }
}

/// The name that it is asked by: that of its certificate, else what the configuration has.
fn host(member: &Member) -> String {
    match (&member.tls, &member.target) {
        (Some(tls), _) if tls.name.parse::<Ipv6Addr>().is_ok() => format!("[{}]", tls.name),
        (Some(tls), _) => tls.name.clone(),
        (None, Target::Inet(_)) => member.name.clone(),
        (None, Target::Unix(_)) => "localhost".to_owned(),
    }
}

/// What went wrong, with its causes: some say little by themselves.
fn said(e: impl std::error::Error + 'static) -> String {
    let causes = std::iter::successors(Some(&e as &(dyn std::error::Error + 'static)), |e| e.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use super::super::testing::{SECOND, Told, address, node, node_at, settings, tls_of_nobody, until};
    use super::super::{NodeSettings, NodeTls, Place};
    use super::*;
    use http_body_util::Full;
    use hyper::service::service_fn;
    use hyper_util::server::conn::auto;
    use parking_lot::Mutex;
    use std::convert::Infallible;
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicU16, Ordering};
    use tokio::net::{TcpListener, UnixListener};
    use tokio_rustls::TlsAcceptor;

    /// A node that answers every request with the status that it has.
    #[derive(Clone)]
    struct Node {
        status: Arc<AtomicU16>,
        /// Version, host and path of the last request.
        asked: Arc<Mutex<String>>,
    }

    impl Node {
        fn new(status: u16) -> Self {
            Self { status: Arc::new(AtomicU16::new(status)), asked: Arc::default() }
        }

        async fn serve(&self, stream: impl Stream + 'static) {
            let node = self.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let host = request.headers().get(header::HOST).map(|host| host.to_str().unwrap().to_owned());
                let host = host.or_else(|| request.uri().authority().map(ToString::to_string)).unwrap_or_default();
                *node.asked.lock() = format!("{:?} {host} {}", request.version(), request.uri().path());
                let status = StatusCode::from_u16(node.status.load(Ordering::Relaxed)).unwrap();
                let octets = if status == StatusCode::NO_CONTENT { 0 } else { 64 << 10 };
                let mut answer = hyper::Response::new(Full::new(Bytes::from(vec![b'x'; octets])));
                *answer.status_mut() = status;
                async move { Ok::<_, Infallible>(answer) }
            });
            let server = auto::Builder::new(TokioExecutor::new());
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        }

        /// Serves at a TCP address, by TLS or without.
        async fn listen(&self, tls: Option<TlsAcceptor>) -> SocketAddr {
            let (node, listener) = (self.clone(), TcpListener::bind("127.0.0.1:0").await.unwrap());
            let address = listener.local_addr().unwrap();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let (node, tls) = (node.clone(), tls.clone());
                    tokio::spawn(async move {
                        match tls {
                            None => node.serve(stream).await,
                            Some(tls) => {
                                if let Ok(stream) = tls.accept(stream).await {
                                    node.serve(stream).await;
                                }
                            }
                        }
                    });
                }
            });
            address
        }
    }

    fn health(check: Check) -> Health {
        Health { check, interval: Duration::from_millis(20), timeout: SECOND, rise: 2, fall: 2 }
    }

    fn http() -> Check {
        Check::Http { path: "/healthz".into() }
    }

    fn nodes_of(node: NodeSettings, check: Check) -> (Arc<Nodes>, Arc<Told>) {
        let told = Arc::new(Told::default());
        let nodes =
            Nodes::new(super::super::Settings { health: Some(health(check)), ..settings(vec![node]) }, told.clone());
        (nodes, told)
    }

    /// What a check of a node comes to.
    async fn asked(node: NodeSettings, check: &Check) -> Result<(), String> {
        let (nodes, _) = nodes_of(node, check.clone());
        let member = nodes.members().remove(0);
        tokio::time::timeout(10 * SECOND, ask(member.clone(), check.clone())).await.unwrap()
    }

    /// A server and clients of it that know its certificate: for `localhost`.
    fn tls(http2: bool) -> (TlsAcceptor, NodeTls) {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let certificate = made.cert.der().clone();
        let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let protocols = vec![if http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
        let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key)
            .unwrap();
        server.alpn_protocols = protocols.clone();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate).unwrap();
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.alpn_protocols = protocols;
        let tls = NodeTls { name: "localhost".into(), client: Arc::new(client), digest: 1 };
        (TlsAcceptor::from(Arc::new(server)), tls)
    }

    #[tokio::test]
    async fn any_2xx_is_well_and_no_other() {
        let server = Node::new(200);
        let at = server.listen(None).await;
        for (status, well) in [(200, true), (204, true), (301, false), (404, false), (503, false)] {
            server.status.store(status, Ordering::Relaxed);
            assert_eq!(asked(node(at), &http()).await.is_ok(), well, "{status}");
        }
        assert_eq!(*server.asked.lock(), format!("HTTP/1.1 {at} /healthz"));
        let e = asked(node(at), &http()).await.unwrap_err();
        assert!(e.contains("503"), "{e}");
    }

    #[tokio::test]
    async fn nodes_are_asked_in_the_way_that_they_are_spoken_to() {
        for http2 in [false, true] {
            let version = if http2 { "HTTP/2.0" } else { "HTTP/1.1" };
            let server = Node::new(200);
            let at = server.listen(None).await;
            asked(NodeSettings { http2, ..node(at) }, &http()).await.unwrap();
            assert_eq!(*server.asked.lock(), format!("{version} {at} /healthz"));

            let (acceptor, tls) = tls(http2);
            let at = server.listen(Some(acceptor)).await;
            let over_tls = NodeSettings { http2, tls: Some(Arc::new(tls)), ..node(at) };
            asked(over_tls.clone(), &http()).await.unwrap();
            assert_eq!(*server.asked.lock(), format!("{version} localhost /healthz"));
            asked(over_tls, &Check::Tcp).await.unwrap();

            let stranger = NodeSettings { http2, tls: Some(Arc::new(tls_of_nobody(2))), ..node(at) };
            for check in [http(), Check::Tcp] {
                let e = asked(stranger.clone(), &check).await.unwrap_err();
                assert!(e.contains("certificate"), "{e}");
            }
        }
    }

    #[tokio::test]
    async fn unix_sockets_are_asked_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ds.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = Node::new(200);
        let serving = server.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let server = serving.clone();
                tokio::spawn(async move { server.serve(stream).await });
            }
        });
        for http2 in [false, true] {
            let unix = node_at("unix:ds.sock", Place::Unix(path.clone()));
            asked(NodeSettings { http2, ..unix.clone() }, &http()).await.unwrap();
            asked(unix, &Check::Tcp).await.unwrap();
        }
        assert_eq!(*server.asked.lock(), "HTTP/2.0 localhost /healthz");
        let nobody = node_at("unix:none.sock", Place::Unix(directory.path().join("none.sock")));
        assert!(asked(nobody, &Check::Tcp).await.is_err());
    }

    #[tokio::test]
    async fn who_does_not_answer_in_time_is_ill() {
        // It accepts, and says nothing.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        asked(node(at), &Check::Tcp).await.unwrap();
        let health = Health { timeout: Duration::from_millis(20), ..health(http()) };
        let told = Arc::new(Told::default());
        let silent = super::super::Settings { health: Some(health), ..settings(vec![node(at)]) };
        let nodes = Nodes::new(silent, told.clone());
        let run = tokio::spawn(nodes.clone().run());
        until(|| !nodes.any_usable()).await;
        assert_eq!(told.take()[1..], [format!("healthy {at} false")]);
        // Without checks it is as healthy as any.
        nodes.reload(settings(vec![node(at)]));
        assert!(nodes.any_usable());
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(nodes.any_usable());
        run.abort();
    }

    #[tokio::test]
    async fn an_ill_node_is_left_out_until_it_is_well() {
        let server = Node::new(200);
        let at = server.listen(None).await;
        let (nodes, told) = nodes_of(node(at), http());
        let run = tokio::spawn(nodes.clone().run());
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(nodes.any_usable());
        server.status.store(500, Ordering::Relaxed);
        until(|| !nodes.any_usable()).await;
        server.status.store(200, Ordering::Relaxed);
        until(|| nodes.any_usable()).await;
        assert_eq!(told.take()[1..], [format!("healthy {at} false"), format!("healthy {at} true")]);
        run.abort();
    }

    #[tokio::test]
    async fn checks_follow_members_and_settings() {
        let (first, second) = (Node::new(500), Node::new(500));
        let (at, other) = (first.listen(None).await, second.listen(None).await);
        let told = Arc::new(Told::default());
        let nodes = Nodes::new(settings(vec![node(at)]), told.clone());
        let run = tokio::spawn(nodes.clone().run());
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(*first.asked.lock(), "", "no checks are configured");
        let checked =
            |node: NodeSettings, check| super::super::Settings { health: Some(health(check)), ..settings(vec![node]) };
        nodes.reload(checked(node(at), http()));
        until(|| !nodes.any_usable()).await;
        nodes.reload(checked(node(at), Check::Tcp));
        until(|| nodes.any_usable()).await;
        nodes.reload(checked(node(other), http()));
        until(|| !nodes.any_usable()).await;
        first.asked.lock().clear();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(*first.asked.lock(), "", "who is gone is not asked");
        run.abort();
    }

    #[tokio::test]
    async fn nobody_there() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        drop(listener);
        for check in [Check::Tcp, http()] {
            assert!(asked(node(at), &check).await.is_err());
        }
    }

    #[test]
    fn hosts_are_authorities() {
        let of = |node: NodeSettings| {
            let (nodes, _) = nodes_of(node, Check::Tcp);
            host(&nodes.members()[0])
        };
        assert_eq!(of(node(address(1))), "127.0.0.1:80");
        assert_eq!(of(node("[::1]:80".parse().unwrap())), "[::1]:80");
        assert_eq!(of(node_at("unix:/run/ds", Place::Unix("/run/ds".into()))), "localhost");
        let named = |name: &str| NodeTls { name: name.into(), ..tls_of_nobody(1) };
        let tls = |name| NodeSettings { tls: Some(Arc::new(named(name))), ..node(address(1)) };
        assert_eq!(of(tls("ds.internal")), "ds.internal");
        assert_eq!(of(tls("2001:db8::1")), "[2001:db8::1]");
    }
}
