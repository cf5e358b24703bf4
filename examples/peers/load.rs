//! What sends: hyper over rustls on one thread, either as fast as answers come, or at a steady rate whatever becomes of what
//! was sent before. Every answer has to be 200.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::Error;
use crate::requests::{self, Bodies, Case, Groups, KIB, NAME, Way};
use crate::servers::Server;

/// Connections that requests come over at once: kept ones of HTTP/1.1, and new ones.
const CONNECTIONS: usize = 16;

/// Those of HTTP/2, and requests at once on each.
const HTTP2_CONNECTIONS: usize = 8;
const STREAMS: usize = 16;

/// Addresses that connections come from: each has ports of its own.
const SOURCES: u32 = 200;

/// How long a server is under load before it is measured.
const WARM: Duration = Duration::from_millis(200);

/// How much longer than it should a measurement may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What makes requests.
pub struct Generator {
    http1: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
    /// What is asked where nothing else is said.
    operation: Head,
    /// By their size.
    bodies: BTreeMap<usize, Arc<[Bytes]>>,
    opened: AtomicU32,
}

/// A request's head, as it is over either protocol.
pub struct Head {
    http1: Request<()>,
    http2: Request<()>,
}

impl Head {
    pub fn of(method: &Method, path: &str) -> Result<Head, Error> {
        let head = |uri: String| {
            let head = Request::builder().method(method.clone()).uri(uri);
            head.header(header::CONTENT_TYPE, "application/octet-stream")
        };
        Ok(Head {
            http1: head(path.to_owned()).header(header::HOST, NAME).body(())?,
            http2: head(format!("https://{NAME}{path}")).body(())?,
        })
    }
}

/// What a kept connection is sent requests on.
pub enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

/// What requests cost a server that was sent as many as it answered.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// Microseconds of a core that a request took.
    pub micros: f64,
    /// Requests in a second.
    pub rate: f64,
    /// Which part of its core the server used.
    pub busy: f64,
}

/// When requests are sent.
pub enum Plan {
    /// By each worker as soon as it has its answer, until then.
    Saturate(Instant),
    /// At a steady rate, by whoever is free.
    Steady { begin: Instant, apart: Duration, total: u32, due: Semaphore, taken: AtomicU32 },
}

impl Plan {
    /// So many in a second for so long, from now on.
    pub fn steady(rate: f64, seconds: f64) -> Plan {
        Plan::Steady {
            begin: Instant::now() + Duration::from_millis(5),
            apart: Duration::from_secs_f64(1.0 / rate),
            total: (rate * seconds).max(1.0) as u32,
            due: Semaphore::new(0),
            taken: AtomicU32::new(0),
        }
    }

    /// When the next request of a worker is due, once it is; none, if there is no further.
    pub async fn next(&self) -> Option<Instant> {
        match self {
            Plan::Saturate(until) => Some(Instant::now()).filter(|now| now < until),
            Plan::Steady { begin, apart, total, due, taken } => {
                due.acquire().await.ok()?.forget();
                let n = taken.fetch_add(1, Ordering::Relaxed);
                (n < *total).then(|| *begin + *apart * n)
            }
        }
    }

    /// Says when requests are due. The runtime's own clock counts milliseconds, which is longer than what is measured.
    pub async fn pace(&self, workers: usize) -> Result<(), Error> {
        let Plan::Steady { begin, apart, total, due, .. } = self else { return Ok(()) };
        let clock = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let first = begin.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let times = Itimerspec { it_interval: Timespec::try_from(*apart)?, it_value: Timespec::try_from(first)? };
        timerfd_settime(&clock, TimerfdTimerFlags::empty(), &times)?;
        // It is read as a pipe is: eight octets, which say how often it was time.
        let mut clock = pipe::Receiver::from_owned_fd_unchecked(clock)?;
        let (mut given, mut times) = (0, [0u8; 8]);
        while given < u64::from(*total) {
            clock.read_exact(&mut times).await?;
            let more = u64::from_ne_bytes(times).min(u64::from(*total) - given);
            due.add_permits(more as usize);
            given += more;
        }
        // One more for each worker: there is no further.
        due.add_permits(workers);
        Ok(())
    }
}

impl Generator {
    pub fn new(ca_pem: &str) -> Result<Generator, Error> {
        let mut bodies = BTreeMap::new();
        for case in Case::ALL {
            bodies.insert(case.size, requests::bodies(case.size)?);
        }
        Ok(Generator {
            http1: tls(ca_pem, "http/1.1")?,
            http2: tls(ca_pem, "h2")?,
            operation: Head::of(&Method::POST, "/group_operation")?,
            bodies,
            opened: AtomicU32::new(0),
        })
    }

    /// Bodies of so many octets.
    pub fn bodies(&self, size: usize) -> Result<Arc<[Bytes]>, Error> {
        Ok(self.bodies.get(&size).ok_or_else(|| format!("no bodies of {size} octets"))?.clone())
    }

    /// A request over a connection of its own.
    pub async fn ask(&self, to: SocketAddr) -> Result<(), Error> {
        let (mut none, body) = (None, self.bodies(KIB)?[0].clone());
        let exchange = self.exchange(to, &mut none, body);
        tokio::time::timeout(Duration::from_secs(1), exchange).await.map_err(|_| "no answer in a second")?
    }

    /// Sends as much as is answered.
    pub async fn saturate(self: &Arc<Self>, server: &Server, case: Case, seconds: f64) -> Result<Cost, Error> {
        let bodies = Bodies::Turns(self.bodies(case.size)?);
        self.saturate_with(server, case.way, &bodies, seconds).await
    }

    /// As [`Generator::saturate`], of these bodies.
    pub async fn saturate_with(
        self: &Arc<Self>,
        server: &Server,
        way: Way,
        bodies: &Bodies,
        seconds: f64,
    ) -> Result<Cost, Error> {
        let kept = self.warm(server, way, bodies).await?;
        let (before, begin) = (server.cpu()?, Instant::now());
        let span = Duration::from_secs_f64(seconds);
        let (kept, took) = self.drive(server, kept, Plan::Saturate(begin + span), bodies, span).await?;
        let elapsed = begin.elapsed().as_secs_f64();
        // The last of its connections are closed in this time, where they are.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let (used, requests) = (server.cpu()?.since(&before).as_secs_f64(), took.len() as f64);
        drop(kept);
        Ok(Cost { micros: used * 1e6 / requests, rate: requests / elapsed, busy: used / elapsed })
    }

    /// Sends at a steady rate: microseconds that the median, the 99th of a hundred and the 999th of a thousand had their answer
    /// after they were due, whenever they were sent.
    pub async fn half_load(
        self: &Arc<Self>,
        server: &Server,
        case: Case,
        rate: f64,
        seconds: f64,
    ) -> Result<[f64; 3], Error> {
        let bodies = Bodies::Turns(self.bodies(case.size)?);
        let kept = self.warm(server, case.way, &bodies).await?;
        let (plan, span) = (Plan::steady(rate, seconds), Duration::from_secs_f64(seconds));
        let (_, mut took) = self.drive(server, kept, plan, &bodies, span).await?;
        took.sort_unstable();
        Ok([0.5, 0.99, 0.999].map(|part| f64::from(took[((took.len() - 1) as f64 * part) as usize])))
    }

    /// Connections that have been answered one request each, and are kept.
    pub async fn idle(self: &Arc<Self>, to: SocketAddr, connections: usize) -> Result<Vec<Option<Sender>>, Error> {
        let mut tasks = JoinSet::new();
        for worker in 0..CONNECTIONS {
            let share = connections / CONNECTIONS + usize::from(worker < connections % CONNECTIONS);
            let (generator, body) = (self.clone(), self.bodies(KIB)?[0].clone());
            tasks.spawn(async move {
                let mut idle = vec![];
                for _ in 0..share {
                    let mut kept = Some(Sender::Http1(generator.open_http1(to).await?));
                    generator.exchange(to, &mut kept, body.clone()).await?;
                    idle.push(kept);
                }
                Ok::<_, Error>(idle)
            });
        }
        let mut idle = vec![];
        while let Some(done) = tasks.join_next().await {
            idle.extend(done??);
        }
        Ok(idle)
    }

    /// Sends one request of each of these groups over HTTP/2, those that there is time for: how many.
    pub async fn fill(self: &Arc<Self>, server: &Server, groups: Groups, within: Duration) -> Result<u64, Error> {
        let (groups, next, until) = (Arc::new(groups), Arc::<AtomicU64>::default(), Instant::now() + within);
        let mut tasks = JoinSet::new();
        for mut kept in self.connections(server.addr, Way::Http2).await? {
            let (generator, groups, next, to) = (self.clone(), groups.clone(), next.clone(), server.addr);
            tasks.spawn(async move {
                while Instant::now() < until {
                    let group = next.fetch_add(1, Ordering::Relaxed);
                    if group >= groups.count {
                        break;
                    }
                    generator.exchange(to, &mut kept, groups.body(group)).await?;
                }
                Ok::<_, Error>(())
            });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        Ok(next.load(Ordering::Relaxed).min(groups.count))
    }

    /// What is kept for requests that come this way, once for each that is under way at a time.
    pub async fn connections(&self, to: SocketAddr, way: Way) -> Result<Vec<Option<Sender>>, Error> {
        let mut kept = vec![];
        match way {
            Way::New => kept.resize_with(CONNECTIONS, || None),
            Way::Http1 => {
                for _ in 0..CONNECTIONS {
                    kept.push(self.open(to, way).await?);
                }
            }
            Way::Http2 => {
                for _ in 0..HTTP2_CONNECTIONS {
                    let one = self.open_http2(to).await?;
                    kept.extend((0..STREAMS).map(|_| Some(Sender::Http2(one.clone()))));
                }
            }
        }
        Ok(kept)
    }

    /// What one worker keeps, whose connection is its own.
    pub async fn open(&self, to: SocketAddr, way: Way) -> Result<Option<Sender>, Error> {
        Ok(match way {
            Way::New => None,
            Way::Http1 => Some(Sender::Http1(self.open_http1(to).await?)),
            Way::Http2 => Some(Sender::Http2(self.open_http2(to).await?)),
        })
    }

    /// The connections of a way, after some load.
    async fn warm(self: &Arc<Self>, server: &Server, way: Way, bodies: &Bodies) -> Result<Vec<Option<Sender>>, Error> {
        let kept = self.connections(server.addr, way).await?;
        let plan = Plan::Saturate(Instant::now() + WARM);
        let (kept, _) = self.drive(server, kept, plan, bodies, WARM).await?;
        Ok(kept)
    }

    /// Has a worker for each of these send what is planned: how many microseconds after it was due each answer came.
    async fn drive(
        self: &Arc<Self>,
        server: &Server,
        kept: Vec<Option<Sender>>,
        plan: Plan,
        bodies: &Bodies,
        span: Duration,
    ) -> Result<(Vec<Option<Sender>>, Vec<u32>), Error> {
        let (plan, workers) = (Arc::new(plan), kept.len());
        let mut tasks = JoinSet::new();
        for (turn, kept) in kept.into_iter().enumerate() {
            tasks.spawn(work(self.clone(), server.addr, kept, plan.clone(), bodies.clone(), turn));
        }
        let (mut senders, mut took, mut failures) = (vec![], vec![], vec![]);
        let all = async {
            plan.pace(workers).await?;
            while let Some(done) = tasks.join_next().await {
                let (kept, times, failure) = done?;
                senders.push(kept);
                took.extend(times);
                failures.extend(failure);
            }
            Ok::<_, Error>(())
        };
        let within = span + PATIENCE;
        tokio::time::timeout(within, all).await.map_err(|_| format!("not all answers are in after {within:?}"))??;
        if let Some(first) = failures.first() {
            let (failed, all) = (failures.len(), took.len() + failures.len());
            return Err(format!("{failed} of {all} requests failed, the first: {first}").into());
        }
        Ok((senders, took))
    }

    async fn exchange(&self, to: SocketAddr, kept: &mut Option<Sender>, body: Bytes) -> Result<(), Error> {
        self.send(to, kept, &self.operation, body).await
    }

    /// Sends a request over what is kept, or else over a connection of its own, and takes the whole answer.
    pub async fn send(&self, to: SocketAddr, kept: &mut Option<Sender>, head: &Head, body: Bytes) -> Result<(), Error> {
        let mut own;
        let sender = match kept {
            Some(sender) => sender,
            None => {
                own = Sender::Http1(self.open_http1(to).await?);
                &mut own
            }
        };
        let answer = match sender {
            Sender::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(head.http1.clone().map(|()| Full::new(body))).await?
            }
            Sender::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(head.http2.clone().map(|()| Full::new(body))).await?
            }
        };
        let status = answer.status();
        let said = answer.into_body().collect().await?.to_bytes();
        if status != 200 {
            return Err(format!("answered {status}: {}", String::from_utf8_lossy(&said)).into());
        }
        Ok(())
    }

    async fn open_http1(&self, to: SocketAddr) -> Result<http1::SendRequest<Full<Bytes>>, Error> {
        let (sender, connection) = http1::handshake(self.connect(to, &self.http1).await?).await?;
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn open_http2(&self, to: SocketAddr) -> Result<http2::SendRequest<Full<Bytes>>, Error> {
        let stream = self.connect(to, &self.http2).await?;
        let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await?;
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn connect(&self, to: SocketAddr, tls: &Arc<ClientConfig>) -> Result<TokioIo<TlsStream<TcpStream>>, Error> {
        let source = self.opened.fetch_add(1, Ordering::Relaxed) % SOURCES;
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from(([127, 0, 1, 1 + source as u8], 0)))?;
        let stream = socket.connect(to).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from(NAME)?;
        Ok(TokioIo::new(TlsConnector::from(tls.clone()).connect(name, stream).await?))
    }
}

/// A worker: one request after the other, until there is no further or one fails.
async fn work(
    generator: Arc<Generator>,
    to: SocketAddr,
    mut kept: Option<Sender>,
    plan: Arc<Plan>,
    bodies: Bodies,
    mut turn: usize,
) -> (Option<Sender>, Vec<u32>, Option<Error>) {
    let mut took = vec![];
    while let Some(due) = plan.next().await {
        if let Err(error) = generator.exchange(to, &mut kept, bodies.body(turn)).await {
            return (kept, took, Some(error));
        }
        took.push(u32::try_from(due.elapsed().as_micros()).unwrap_or(u32::MAX));
        turn += 1;
    }
    (kept, took, None)
}

/// TLS 1.3 with a key exchange that all servers know, and no session that could be resumed: each handshake is a whole one, and
/// the same for all.
fn tls(ca_pem: &str, alpn: &str) -> Result<Arc<ClientConfig>, Error> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![aws_lc_rs::kx_group::X25519];
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
        roots.add(certificate?)?;
    }
    let config = ClientConfig::builder_with_provider(Arc::new(provider));
    let config = config.with_protocol_versions(&[&rustls::version::TLS13])?.with_root_certificates(roots);
    let mut config = config.with_no_client_auth();
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}
