//! A node of a Delivery Service: HTTP/1.1 and h2c on one port of the loopback, in front of a [`Delivery`]. It remembers
//! what it was sent, and misbehaves on request.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::delivery::Delivery;

/// A request that came in whole.
#[derive(Debug, Clone)]
pub struct Recorded {
    pub method: Method,
    /// Path and query.
    pub path: String,
    /// `:authority` of HTTP/2; over HTTP/1.1 it is in `Host`.
    pub authority: Option<String>,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
    pub version: Version,
}

/// A running node. Dropping it stops it too.
pub struct Ds {
    pub addr: SocketAddr,
    pub delivery: Arc<Delivery>,
    node: Arc<Node>,
    tasks: Tasks,
}

#[derive(Default)]
struct Node {
    connections: AtomicUsize,
    begun: AtomicUsize,
    broken: AtomicUsize,
    body_bytes: AtomicUsize,
    requests: Mutex<Vec<Recorded>>,
    manner: Mutex<Manner>,
    /// Something above has changed.
    changed: Notify,
}

/// How it answers, when not as a good DS should.
#[derive(Clone, Default)]
struct Manner {
    delay: Duration,
    hang: bool,
    early: bool,
    fixed: Option<(StatusCode, HeaderMap, Bytes)>,
}

impl fmt::Debug for Ds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ds({})", self.addr)
    }
}

impl Ds {
    /// A node with a [`Delivery`] of its own, on a free port.
    pub async fn start() -> Ds {
        Ds::start_with(Arc::new(Delivery::new())).await
    }

    /// A node of a service that others may be nodes of too.
    pub async fn start_with(delivery: Arc<Delivery>) -> Ds {
        Ds::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), delivery).await
    }

    /// A node at this address: where another one was stopped, for instance.
    pub async fn start_at(addr: SocketAddr, delivery: Arc<Delivery>) -> Ds {
        let listener = TcpListener::bind(addr).await.unwrap();
        let ds = Ds { addr: listener.local_addr().unwrap(), delivery, node: Arc::default(), tasks: Tasks::default() };
        ds.tasks.spawn(accept(listener, ds.delivery.clone(), ds.node.clone(), ds.tasks.clone()));
        ds
    }

    /// Closes the listener and every connection; once it returns, the port is free.
    pub async fn stop(&self) {
        let mut tasks = std::mem::take(&mut *self.tasks.0.lock().unwrap());
        tasks.shutdown().await;
    }

    /// The complete requests so far.
    pub fn requests(&self) -> Vec<Recorded> {
        self.node.requests.lock().unwrap().clone()
    }

    /// How many requests were complete.
    pub fn complete(&self) -> usize {
        self.node.requests.lock().unwrap().len()
    }

    /// How many request heads were seen.
    pub fn begun(&self) -> usize {
        self.node.begun.load(SeqCst)
    }

    /// How many requests ended before their body did.
    pub fn broken(&self) -> usize {
        self.node.broken.load(SeqCst)
    }

    /// How many octets of bodies have arrived, of complete requests or not.
    pub fn body_bytes_seen(&self) -> usize {
        self.node.body_bytes.load(SeqCst)
    }

    /// How many connections were accepted.
    pub fn connections(&self) -> usize {
        self.node.connections.load(SeqCst)
    }

    /// Waits until something holds of this node, five seconds at most; says whether it does.
    pub async fn until(&self, holds: impl Fn(&Ds) -> bool) -> bool {
        let wait = async {
            loop {
                let changed = self.node.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if holds(self) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), wait).await.is_ok()
    }

    /// Waits so long before each answer.
    pub fn set_delay(&self, delay: Duration) {
        self.change(|manner| manner.delay = delay);
    }

    /// Reads requests and answers none, until it is told `false`: then those that wait are answered.
    pub fn hang(&self, hang: bool) {
        self.change(|manner| manner.hang = hang);
    }

    /// Answers before it has read the body, which it then never reads.
    pub fn answer_early(&self, early: bool) {
        self.change(|manner| manner.early = early);
    }

    /// Answers everything so.
    pub fn set_response(&self, status: u16, headers: &[(&str, &str)], body: impl Into<Bytes>) {
        let status = StatusCode::from_u16(status).unwrap();
        let headers = headers
            .iter()
            .map(|(name, value)| (HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap()))
            .collect();
        self.change(|manner| manner.fixed = Some((status, headers, body.into())));
    }

    /// Answers as a DS again.
    pub fn clear_response(&self) {
        self.change(|manner| manner.fixed = None);
    }

    fn change(&self, change: impl FnOnce(&mut Manner)) {
        change(&mut self.node.manner.lock().unwrap());
        self.node.changed.notify_waiters();
    }
}

async fn accept(listener: TcpListener, delivery: Arc<Delivery>, node: Arc<Node>, tasks: Tasks) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        node.connections.fetch_add(1, SeqCst);
        node.changed.notify_waiters();
        let (delivery, node, executor) = (delivery.clone(), node.clone(), tasks.clone());
        tasks.spawn(async move {
            let service = service_fn(move |request| answer(request, delivery.clone(), node.clone()));
            let _ = auto::Builder::new(executor).serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    delivery: Arc<Delivery>,
    node: Arc<Node>,
) -> Result<Response<Full<Bytes>>, Box<dyn Error + Send + Sync>> {
    node.begun.fetch_add(1, SeqCst);
    node.changed.notify_waiters();
    let (head, mut incoming) = request.into_parts();
    let mut body = Vec::new();
    if !node.manner.lock().unwrap().early {
        while let Some(frame) = incoming.frame().await {
            match frame.map(|frame| frame.into_data()) {
                Ok(Ok(data)) => {
                    body.extend_from_slice(&data);
                    node.body_bytes.fetch_add(data.len(), SeqCst);
                }
                Ok(Err(_trailers)) => {}
                Err(error) => {
                    node.broken.fetch_add(1, SeqCst);
                    node.changed.notify_waiters();
                    return Err(error.into());
                }
            }
            node.changed.notify_waiters();
        }
    }
    let path = head.uri.path().to_owned();
    node.requests.lock().unwrap().push(Recorded {
        method: head.method.clone(),
        path: head.uri.path_and_query().map_or_else(|| path.clone(), ToString::to_string),
        authority: head.uri.authority().map(ToString::to_string),
        headers: head.headers,
        body: body.clone(),
        version: head.version,
    });
    node.changed.notify_waiters();
    let manner = patience(&node).await;
    let (status, headers, content) = match manner.fixed {
        Some(fixed) => fixed,
        None => {
            let (status, content) = delivery.handle(&head.method, &path, &body);
            let headers = [(http::header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))];
            (status, headers.into_iter().collect(), content.into())
        }
    };
    let mut response = Response::new(Full::new(content));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    Ok(response)
}

/// Waits as long as this node was told to, and says how to answer then.
async fn patience(node: &Node) -> Manner {
    let delay = node.manner.lock().unwrap().delay;
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    loop {
        let changed = node.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let manner = node.manner.lock().unwrap().clone();
        if !manner.hang {
            return manner;
        }
        changed.await;
    }
}

/// All tasks of a node, those of HTTP/2 streams too: they end with it.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl Tasks {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.0.lock().unwrap();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.spawn(task);
    }
}

impl Drop for Ds {
    fn drop(&mut self) {
        self.tasks.0.lock().unwrap().abort_all();
    }
}
