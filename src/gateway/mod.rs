//! The one room that knows Pingora: its phases, in which the steps are called in their order, and nothing is decided.
//!
//! `request_filter` is the way in: route, host, peek, identify, admit. What it lets pass goes to a node that
//! `upstream_peer` chooses, with the fields that `upstream_request_filter` sets; `logging` accounts for it. A refusal is
//! answered from one place, wherever it comes from.

mod admin;
mod door;
mod forward;
mod peek;
mod stream;

use crate::admission::{Admission, Decision as Verdict, Peers, Subject, bind_sender};
use crate::config::{Config, Provider, Timeouts};
use crate::dialect::{self, Endpoint, Envelope, NoRoute};
use crate::limiter::memory::Memory;
use crate::privacypass::{Origin, Reservation};
use crate::problem::{Refusal, TokenProblem};
use crate::telemetry::{AccessLog, Decision, Line, Metrics};
use crate::tls;
use crate::upstream::{Nodes, Tried};
use async_trait::async_trait;
use bytes::Bytes;
use http::{StatusCode, header};
use pingora_core::listeners::{L4BufferSettings, ListenerConfig};
use pingora_core::modules::http::HttpModules;
use pingora_core::protocols::Digest;
use pingora_core::protocols::http::v2::server::H2Options;
use pingora_core::server::configuration::ServerConf;
use pingora_core::server::{ExecutionPhase, RunArgs, Server};
use pingora_core::services::listening::Service;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorSource, ErrorType, Result};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::{FailToProxy, HttpProxy, ProxyHttp, Session};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use stream::Connection;
use tokio_rustls::TlsAcceptor;

/// What all requests share.
struct Shared {
    provider: Provider,
    peers: Peers,
    timeouts: Timeouts,
    max_body: Vec<(&'static str, u64)>,
    admission: Admission,
    privacy_pass: Option<Origin>,
    nodes: Nodes,
    metrics: Metrics,
    access_log: AccessLog,
    /// The process has been told to stop: no connection is kept for a further request.
    draining: AtomicBool,
}

/// Pingora's view of the gateway.
pub struct Gateway(Arc<Shared>);

/// What is kept of a request while it is under way.
pub struct RequestContext {
    began: Instant,
    id: String,
    connection: Option<Arc<Connection>>,
    endpoint: Option<&'static Endpoint>,
    operation: Option<&'static str>,
    provider: Option<String>,
    /// Of the group, for choosing its node: the same on every gateway and after every restart.
    group_hash: Option<u128>,
    group_pseudonym: Option<u128>,
    body: forward::Body,
    /// Time spent waiting for the client's body before the decision.
    waited: Duration,
    gateway_took: Option<Duration>,
    forwarded_at: Option<Instant>,
    ds_took: Option<Duration>,
    tried: Tried,
    node: Option<usize>,
    token: Option<Reservation>,
    used_token: bool,
    decision: Decision,
    /// What follows on the connection cannot be told from this request: it ends with the answer.
    broken: bool,
    /// A refusal met where Pingora only takes an error.
    pending: Option<Refusal>,
    refused: Option<(StatusCode, &'static str, Vec<String>)>,
    /// The end of the node's answer has gone to the client.
    answered: bool,
    watch: Option<door::Watch>,
    shared: Arc<Shared>,
    accounted: bool,
}

impl Drop for RequestContext {
    fn drop(&mut self) {
        self.shared.metrics.in_flight.dec();
        if !self.accounted {
            // Dropped on the way: the client went away, or the request outlived its deadline.
            self.shared.metrics.request(self.endpoint, self.decision, "", None);
        }
    }
}

/// What we know of the connection under a request.
fn connection_of(digest: &Digest) -> Option<&Arc<Connection>> {
    digest.proxy_digest.as_ref()?.user_data.as_ref()?.downcast_ref()
}

/// Why the gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// TLS cannot be set up.
    #[error("TLS: {0}")]
    Tls(#[from] tls::Error),
    /// Metrics cannot be registered.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The access log cannot be opened.
    #[error("access log: {0}")]
    AccessLog(std::io::Error),
    /// An address cannot be listened at.
    #[error("{0}: {1}")]
    Listen(std::net::SocketAddr, std::io::Error),
    /// The system gives no randomness.
    #[error("the system gives no randomness")]
    Randomness,
}

/// Runs a gateway until it is told to stop: SIGTERM lets the requests under way end first, SIGINT does not.
///
/// # Errors
/// [`StartError`].
pub fn run(config: Config) -> std::result::Result<(), StartError> {
    let (server, shared) = server(config)?;
    let phases = server.watch_execution_phase();
    let draining = shared.clone();
    std::thread::spawn(move || drain(phases, &draining));
    server.run(RunArgs::default());
    shared.access_log.close();
    Ok(())
}

/// Ends the process once it has been told to stop and nothing is under way; Pingora would wait for all of its grace
/// period, however little there is to wait for.
fn drain(mut phases: tokio::sync::broadcast::Receiver<ExecutionPhase>, shared: &Shared) {
    loop {
        match phases.blocking_recv() {
            Ok(ExecutionPhase::ShutdownGracePeriod) => break,
            Ok(ExecutionPhase::GracefulTerminate) => shared.draining.store(true, Ordering::Relaxed),
            Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
            Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
        }
    }
    tracing::info!(requests = shared.metrics.in_flight.get(), "stopping: requests under way may end");
    shared.draining.store(true, Ordering::Relaxed);
    let mut quiet = 0;
    // What HTTP/2 has been given to send is sent a little after the request has ended.
    while shared.metrics.connections.get() > 0 && quiet < 10 {
        std::thread::sleep(Duration::from_millis(25));
        quiet = if shared.metrics.in_flight.get() > 0 { 0 } else { quiet + 1 };
    }
    shared.access_log.close();
    std::process::exit(0);
}

fn server(config: Config) -> std::result::Result<(Server, Arc<Shared>), StartError> {
    // Pingora panics where it cannot bind; said before, it is an error.
    for address in config.listeners.iter().map(|l| l.address).chain([config.admin]) {
        std::net::TcpListener::bind(address).map_err(|e| StartError::Listen(address, e))?;
    }
    let metrics = Metrics::new(&config.peers.named)?;
    let counters = config.policy.limits.iter().map(|l| metrics.limit(&l.name, l.enforce)).collect();
    let store = Memory::new(config.limit_memory, config.policy.overflow_buckets(), metrics.limits_overflowed.clone());
    let secret = crate::config::random().ok_or(StartError::Randomness)?;
    let shared = Arc::new(Shared {
        admission: Admission::new(config.policy, Arc::new(store), secret, counters),
        provider: config.provider,
        peers: config.peers,
        timeouts: config.timeouts,
        max_body: config.max_body,
        privacy_pass: config.privacy_pass,
        nodes: Nodes::new(config.upstream),
        access_log: AccessLog::open(&config.access_log).map_err(StartError::AccessLog)?,
        metrics,
        draining: AtomicBool::new(false),
    });

    let conf = ServerConf {
        threads: config.threads,
        work_stealing: config.threads > 1,
        upstream_keepalive_pool_size: 1024,
        grace_period_seconds: Some(config.timeouts.shutdown.as_secs().max(1)),
        graceful_shutdown_timeout_seconds: Some(1),
        max_retries: 16,
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    for listener in &config.listeners {
        let mut proxy = HttpProxy::new(Gateway(shared.clone()), server.configuration.clone());
        proxy.h2_options = Some(h2_options());
        let mut options = pingora_core::apps::HttpServerOptions::default();
        // CONNECT is a method like others here: no endpoint has it.
        options.allow_connect_method_proxying = true;
        options.h2_idle_timeout = Some(config.timeouts.keepalive);
        proxy.server_options = Some(options);
        proxy.handle_init_modules();
        let tls = tls::server_config(config.certificates.clone(), &listener.client_auth)?;
        let door = door::Door {
            requests: Arc::new(door::Requests(Arc::new(proxy))),
            acceptor: TlsAcceptor::from(Arc::new(tls)),
            shared: shared.clone(),
        };
        let mut service = Service::new(format!("federation {}", listener.address), door);
        // rustls has buffers of its own, of the size of its records.
        let buffers = L4BufferSettings::unbuffered();
        service.add_listener(ListenerConfig::tcp(listener.address.to_string()).l4_buffer(buffers));
        server.add_service(service);
    }
    let mut admin = Service::new("admin".to_owned(), admin::Admin(shared.clone()));
    admin.threads = Some(1);
    admin.add_tcp(&config.admin.to_string());
    server.add_service(admin);
    Ok((server, shared))
}

fn h2_options() -> H2Options {
    let mut options = H2Options::default();
    options
        .max_concurrent_streams(100)
        .max_header_list_size(16 * 1024)
        .initial_window_size(256 * 1024)
        .initial_connection_window_size(1024 * 1024);
    options
}

impl Gateway {
    /// The way in: everything up to the decision. The answer is the refusal; none: the request goes on.
    async fn admit(&self, session: &mut Session, ctx: &mut RequestContext) -> std::result::Result<(), Refusal> {
        let shared = &self.0;
        let connection = ctx.connection.clone().ok_or(Refusal::Internal)?;

        // route
        let request = session.req_header();
        peek::check_framing(request)?;
        if request.uri.query().is_some() {
            return Err(Refusal::UnknownPath);
        }
        let endpoint = dialect::route(&request.method, request.uri.path()).map_err(|no| match no {
            NoRoute::UnknownPath => Refusal::UnknownPath,
            NoRoute::WrongMethod { allow } => Refusal::WrongMethod { allow },
        })?;
        ctx.endpoint = Some(endpoint);
        self.check_host(request, &connection)?;

        if endpoint.reader.is_none() {
            let operation = endpoint.operations.first().copied().ok_or(Refusal::Internal)?;
            ctx.operation = Some(operation.name);
            // No body names a sender; a certificate does, by the first of its names.
            ctx.provider = connection.identity.as_ref().and_then(|identity| identity.dns_names.first().cloned());
            let provider = ctx.provider.clone();
            let subject = Subject {
                ip: connection.client.ip(),
                provider: provider.as_deref(),
                operation,
                group: None,
                member: None,
                target: None,
                cost: 1,
            };
            return self.limits_and_token(session, ctx, &subject);
        }

        peek::check_content(session.req_header())?;
        let bound = shared.max_body.iter().find(|(name, _)| *name == endpoint.name);
        ctx.body = forward::Body::new(bound.map_or(endpoint.max_body, |(_, bound)| *bound), shared.timeouts.body_total);
        if peek::content_length(session.req_header()).is_some_and(|length| length > ctx.body.bound()) {
            return Err(Refusal::TooLarge);
        }

        // peek
        let timeouts = &shared.timeouts;
        session.set_read_timeout(Some(timeouts.body_idle));
        let mut held = peek::Held::default();
        connection.hold(true);
        let read = peek::peek(session, endpoint, &mut held, timeouts, &mut ctx.waited).await;
        connection.hold(false);
        read.map_err(|stop| {
            ctx.broken = stop.broken;
            stop.refusal
        })?;
        let envelope = endpoint.read(held.octets()).map_err(Refusal::Malformed)?;
        self.identify_and_admit(session, ctx, &connection, &envelope)
    }

    /// Host (`:authority`) and SNI are ours, the port aside.
    fn check_host(&self, request: &RequestHeader, connection: &Connection) -> std::result::Result<(), Refusal> {
        let mut hosts = request.headers.get_all(header::HOST).iter();
        let host = match (request.uri.authority(), hosts.next()) {
            (Some(authority), _) => authority.as_str(),
            (None, Some(host)) => host.to_str().map_err(|_| Refusal::Misdirected("Host"))?,
            (None, None) => return Err(Refusal::BadHttp("the request has no Host")),
        };
        if hosts.next().is_some() {
            return Err(Refusal::BadHttp("the request has two Host fields"));
        }
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
            _ => host,
        };
        if !self.0.provider.is_host(name) {
            return Err(Refusal::Misdirected("Host"));
        }
        match &connection.sni {
            Some(sni) if !self.0.provider.is_host(sni) => Err(Refusal::Misdirected("SNI")),
            _ => Ok(()),
        }
    }

    fn identify_and_admit(
        &self,
        session: &Session,
        ctx: &mut RequestContext,
        connection: &Connection,
        envelope: &Envelope<'_>,
    ) -> std::result::Result<(), Refusal> {
        let shared = &self.0;
        ctx.operation = Some(envelope.operation.name);
        if let Some(group) = envelope.group_id {
            ctx.group_hash = Some(forward::group_hash(group));
            ctx.group_pseudonym = Some(shared.admission.pseudonym(group));
        }
        if !shared.provider.is_recipient(&envelope.recipient) {
            return Err(Refusal::Misdirected("recipient"));
        }
        ctx.provider = bind_sender(&envelope.sender, connection.identity.as_ref(), &shared.peers)?;
        let provider = ctx.provider.clone();
        let subject = Subject {
            ip: connection.client.ip(),
            provider: provider.as_deref(),
            operation: envelope.operation,
            group: envelope.group_id,
            member: envelope.member,
            target: envelope.target,
            cost: envelope.cost,
        };
        self.limits_and_token(session, ctx, &subject)
    }

    /// Limits before tokens: a token is dear to check. It is taken in hand before the limits are charged, and spent only
    /// once the request is on its way to the Delivery Service.
    fn limits_and_token(
        &self,
        session: &Session,
        ctx: &mut RequestContext,
        subject: &Subject<'_>,
    ) -> std::result::Result<(), Refusal> {
        let admission = &self.0.admission;
        let headers = &session.req_header().headers;
        let required = admission.policy().token_required(subject.operation);
        let origin = self.0.privacy_pass.as_ref();
        let challenge = || origin.and_then(Origin::challenge);
        let redeem = || -> std::result::Result<Reservation, Refusal> {
            let origin = origin.ok_or(Refusal::Internal)?;
            origin.redeem(headers).map_err(|problem| Refusal::Token { problem, challenge: challenge() })
        };

        let (first, tally) = admission.decide(subject, false, !required);
        let missing = match first {
            Verdict::Pass { .. } if !required => {
                admission.account(&tally);
                return Ok(());
            }
            Verdict::Refuse { violated, token_helps: false } => {
                admission.account(&tally);
                return Err(Refusal::Limited { violated, challenge: None });
            }
            Verdict::Pass { .. } => None,
            Verdict::Refuse { violated, .. } => Some(violated),
        };
        let token = match (redeem(), missing) {
            (Ok(token), _) => token,
            // A limit that a token would help with is a limit first.
            (Err(Refusal::Token { problem: TokenProblem::Missing, challenge }), Some(violated)) => {
                admission.account(&tally);
                return Err(Refusal::Limited { violated, challenge });
            }
            (Err(other), _) => return Err(other),
        };
        let (second, tally) = admission.decide(subject, true, true);
        admission.account(&tally);
        match second {
            Verdict::Pass { .. } => {
                ctx.token = Some(token);
                Ok(())
            }
            Verdict::Refuse { violated, .. } => Err(Refusal::Limited { violated, challenge: None }),
        }
    }

    /// Answers a refusal. Where octets of the request are still to come, the connection ends with it.
    async fn refuse(&self, session: &mut Session, ctx: &mut RequestContext, refusal: &Refusal) -> Result<()> {
        let status = refusal.status();
        let limits = match refusal {
            Refusal::Limited { violated, .. } => violated.iter().map(|v| v.policy.clone()).collect(),
            _ => vec![],
        };
        ctx.decision = Decision::Refused;
        ctx.refused = Some((status, refusal.reason(), limits));
        let document = Bytes::from(refusal.document());
        let mut response = ResponseHeader::build(status, Some(8))?;
        for (name, value) in refusal.headers() {
            response.append_header(name, value)?;
        }
        response.insert_header(header::CONTENT_TYPE, "application/problem+json")?;
        response.insert_header(header::CONTENT_LENGTH, document.len())?;
        if ctx.broken || refusal.closes() || !session.as_mut().is_body_done() {
            session.set_keepalive(None);
            if let Some(connection) = &ctx.connection {
                connection.linger();
            }
        }
        self.answer(session, response, document).await
    }

    /// Writes an answer of the gateway's own, within a time: a client that does not read is not waited for.
    async fn answer(&self, session: &mut Session, response: ResponseHeader, body: Bytes) -> Result<()> {
        if self.0.draining.load(Ordering::Relaxed) {
            session.set_keepalive(None);
        }
        let write = async {
            session.write_response_header(Box::new(response), false).await?;
            session.write_response_body(Some(body), true).await
        };
        match tokio::time::timeout(self.0.timeouts.body_total, write).await {
            Ok(written) => written,
            Err(_) => Error::e_explain(ErrorType::WriteTimedout, "the client does not read").map_err(Error::into_down),
        }
    }

    /// `/.well-known/mimi/ds-domain`.
    async fn discovery(&self, session: &mut Session, ctx: &mut RequestContext) -> Result<()> {
        ctx.decision = Decision::Answered;
        if let Some(token) = ctx.token.take() {
            token.keep();
            ctx.used_token = true;
        }
        let domain = Bytes::from(self.0.provider.ds_domain.clone());
        let mut response = ResponseHeader::build(StatusCode::OK, Some(3))?;
        response.insert_header(header::CONTENT_TYPE, "text/plain")?;
        response.insert_header(header::CONTENT_LENGTH, domain.len())?;
        response.insert_header(header::CACHE_CONTROL, "max-age=3600")?;
        if !session.as_mut().is_body_done() {
            session.set_keepalive(None);
            if let Some(connection) = &ctx.connection {
                connection.linger();
            }
        }
        self.answer(session, response, domain).await
    }
}

#[async_trait]
impl ProxyHttp for Gateway {
    type CTX = RequestContext;

    fn new_ctx(&self) -> RequestContext {
        self.0.metrics.in_flight.inc();
        RequestContext {
            began: Instant::now(),
            id: uuid::Uuid::now_v7().simple().to_string(),
            connection: None,
            endpoint: None,
            operation: None,
            provider: None,
            group_hash: None,
            group_pseudonym: None,
            body: forward::Body::new(0, Duration::ZERO),
            waited: Duration::ZERO,
            gateway_took: None,
            forwarded_at: None,
            ds_took: None,
            tried: Tried::default(),
            node: None,
            token: None,
            used_token: false,
            decision: Decision::Aborted,
            broken: false,
            pending: None,
            refused: None,
            answered: false,
            watch: door::WATCH.try_with(Clone::clone).ok(),
            shared: self.0.clone(),
            accounted: false,
        }
    }

    fn init_downstream_modules(&self, _: &mut HttpModules) {
        // None: what the Delivery Service answers goes back octet for octet.
    }

    async fn early_request_filter(&self, session: &mut Session, ctx: &mut RequestContext) -> Result<()> {
        ctx.connection = session.digest().and_then(connection_of).cloned();
        if let Some(connection) = &ctx.connection {
            connection.head_is_in();
        }
        // Where Pingora has decided against another request on this connection, it has its reasons.
        if session.get_keepalive().is_some() {
            session.set_keepalive(Some(self.0.timeouts.keepalive.as_secs().max(1)));
        }
        session.set_write_timeout(Some(self.0.timeouts.body_total));
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut RequestContext) -> Result<bool> {
        let admitted = self.admit(session, ctx).await;
        let took = ctx.began.elapsed().saturating_sub(ctx.waited);
        ctx.gateway_took = Some(took);
        match admitted {
            Ok(()) if ctx.endpoint.is_some_and(|e| e.reader.is_none()) => {
                self.discovery(session, ctx).await?;
                Ok(true)
            }
            Ok(()) => Ok(false),
            Err(refusal) => {
                self.refuse(session, ctx, &refusal).await?;
                Ok(true)
            }
        }
    }

    async fn upstream_peer(&self, session: &mut Session, ctx: &mut RequestContext) -> Result<Box<HttpPeer>> {
        // What was read so far is sent again from the start.
        ctx.body.rewind();
        let Some((node, settings)) = self.0.nodes.choose(ctx.group_hash, ctx.tried) else {
            ctx.pending = Some(if ctx.tried.any() {
                Refusal::BadGateway
            } else {
                Refusal::NoNode { retry_after: self.0.nodes.settings().eject_for }
            });
            return Error::e_explain(ErrorType::ConnectError, "no node is to be had");
        };
        ctx.tried.note(node);
        ctx.node = Some(node);
        let body_is_in = session.as_mut().is_body_done();
        Ok(Box::new(forward::peer(&settings, self.0.nodes.settings(), &self.0.timeouts, body_is_in)))
    }

    fn fail_to_connect(
        &self,
        _: &mut Session,
        _: &HttpPeer,
        ctx: &mut RequestContext,
        mut e: Box<Error>,
    ) -> Box<Error> {
        if let Some(node) = ctx.node.take() {
            self.0.nodes.eject(node);
            let address = self.0.nodes.settings().nodes.get(node).map(|n| n.address.to_string()).unwrap_or_default();
            self.0.metrics.ejections.with_label_values(&[address.as_str()]).inc();
            tracing::warn!(node = %address, "cannot connect to a Delivery Service node: {e}");
        }
        // Nothing was sent: the next node may have it.
        e.set_retry(true);
        e
    }

    async fn connected_to_upstream(
        &self,
        _: &mut Session,
        _: bool,
        _: &HttpPeer,
        _: std::os::unix::io::RawFd,
        _: Option<&Digest>,
        ctx: &mut RequestContext,
    ) -> Result<()> {
        if let Some(node) = ctx.node {
            self.0.nodes.restore(node);
        }
        ctx.forwarded_at = Some(Instant::now());
        Ok(())
    }

    fn error_while_proxy(
        &self,
        _: &HttpPeer,
        _: &mut Session,
        mut e: Box<Error>,
        _: &mut RequestContext,
        _: bool,
    ) -> Box<Error> {
        // The Delivery Service may have begun to process it.
        e.set_retry(false);
        e
    }

    async fn request_body_filter(
        &self,
        _: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        ctx: &mut RequestContext,
    ) -> Result<()> {
        if end && let Some(watch) = &ctx.watch {
            watch.until(None);
        }
        ctx.body.pass(body.as_ref().map_or(0, Bytes::len), end).map_err(|refusal| {
            ctx.pending = Some(refusal);
            Error::explain(ErrorType::ReadError, "the body is over its bound").into_down()
        })
    }

    async fn upstream_request_filter(
        &self,
        _: &mut Session,
        request: &mut RequestHeader,
        ctx: &mut RequestContext,
    ) -> Result<()> {
        let client = ctx.connection.as_ref().map(|c| c.client.ip());
        let Some(endpoint) = ctx.endpoint else { return Error::e_explain(ErrorType::InternalError, "no endpoint") };
        let takes_tokens = self.0.privacy_pass.is_some();
        forward::set_fields(request, endpoint, client, ctx.provider.as_deref(), &ctx.id, takes_tokens)?;
        // The next thing is to write to the node.
        if let Some(token) = ctx.token.take() {
            token.keep();
            ctx.used_token = true;
        }
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut RequestContext,
    ) -> Result<()> {
        if response.status.is_informational() {
            return Ok(());
        }
        ctx.ds_took = ctx.forwarded_at.map(|at| at.elapsed());
        ctx.decision = Decision::Forwarded;
        if self.0.draining.load(Ordering::Relaxed) {
            session.set_keepalive(None);
        }
        if !session.as_mut().is_body_done() {
            // The node has answered before the body was in. The answer must arrive, and the body has its time and no more.
            if let Some(connection) = &ctx.connection {
                connection.linger();
            }
            if let Some(watch) = &ctx.watch {
                watch.until(Some(ctx.body.until() + Duration::from_secs(1)));
            }
        }
        Ok(())
    }

    fn response_body_filter(
        &self,
        _: &mut Session,
        _: &mut Option<Bytes>,
        end: bool,
        ctx: &mut RequestContext,
    ) -> Result<Option<Duration>> {
        ctx.answered |= end;
        Ok(None)
    }

    async fn fail_to_proxy(&self, session: &mut Session, e: &Error, ctx: &mut RequestContext) -> FailToProxy {
        if ctx.answered {
            // The whole answer is out; what is missing is the rest of a body that nobody needs.
            return FailToProxy { error_code: 0, can_reuse_downstream: false };
        }
        let gone = matches!(
            e.etype(),
            ErrorType::ConnectionClosed | ErrorType::WriteError | ErrorType::WriteTimedout | ErrorType::H2Error
        );
        let refusal = match (ctx.pending.take(), e.esource()) {
            (Some(refusal), _) => refusal,
            (None, ErrorSource::Upstream) => match e.etype() {
                ErrorType::ReadTimedout | ErrorType::WriteTimedout if !session.as_mut().is_body_done() => {
                    Refusal::TooSlow
                }
                ErrorType::ReadTimedout | ErrorType::WriteTimedout | ErrorType::ConnectTimedout => {
                    Refusal::GatewayTimeout
                }
                _ => Refusal::BadGateway,
            },
            (None, ErrorSource::Downstream) => match e.etype() {
                ErrorType::ReadTimedout => Refusal::TooSlow,
                _ if gone => {
                    ctx.decision = Decision::Aborted;
                    return FailToProxy { error_code: 0, can_reuse_downstream: false };
                }
                _ => Refusal::BadHttp("the body's framing is wrong"),
            },
            (None, _) => Refusal::Internal,
        };
        let status = refusal.status().as_u16();
        if status_written(session).is_some() {
            // Half an answer cannot be mended; the client sees that it is cut short.
            ctx.decision = Decision::Aborted;
            ctx.refused = Some((refusal.status(), refusal.reason(), vec![]));
        } else {
            let _ = self.refuse(session, ctx, &refusal).await;
        }
        FailToProxy { error_code: status, can_reuse_downstream: false }
    }

    fn suppress_error_log(&self, _: &Session, _: &RequestContext, _: &Error) -> bool {
        // The access log says it, and a stranger cannot fill a disk with it.
        true
    }

    async fn logging(&self, session: &mut Session, _: Option<&Error>, ctx: &mut RequestContext) {
        let shared = &self.0;
        ctx.accounted = true;
        let reason = ctx.refused.as_ref().map(|(_, reason, _)| *reason);
        let provider = ctx.provider.as_deref().map(|p| Metrics::provider_label(&shared.peers.named, p));
        shared.metrics.request(ctx.endpoint, ctx.decision, reason.unwrap_or_default(), provider);
        if let Some(endpoint) = ctx.endpoint {
            if let Some(took) = ctx.gateway_took {
                shared.metrics.gateway_took(endpoint, took);
            }
            if let Some(took) = ctx.ds_took {
                shared.metrics.ds_took(endpoint, took);
            }
        }
        if !shared.access_log.is_on() {
            return;
        }
        let micros = |took: Duration| u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let status = status_written(session).map_or(0, |status| status.as_u16());
        let request = session.req_header();
        shared.access_log.write(&Line {
            time: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true),
            request_id: &ctx.id,
            client: ctx.connection.as_ref().map(|c| c.client.ip().to_string()).unwrap_or_default(),
            provider: ctx.provider.as_deref(),
            http: if request.version == http::Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" },
            method: method_label(&request.method),
            endpoint: ctx.endpoint.map(|e| e.name),
            operation: ctx.operation,
            group: ctx.group_pseudonym.map(|hash| format!("{:016x}", hash as u64)),
            status,
            decision: ctx.decision.label(),
            reason,
            limits: ctx.refused.take().map(|(_, _, limits)| limits).unwrap_or_default(),
            token: ctx.used_token,
            body_in: session.body_bytes_read(),
            body_out: session.body_bytes_sent(),
            gateway_us: ctx.gateway_took.map(micros).unwrap_or_default(),
            ds_us: ctx.ds_took.map(micros),
            node: ctx.node.and_then(|n| shared.nodes.settings().nodes.get(n)).map(|n| n.address.to_string()),
        });
    }
}

/// The status of the answer that has begun to go out; to go on (100) is none.
fn status_written(session: &Session) -> Option<StatusCode> {
    session.response_written().map(|response| response.status).filter(|status| !status.is_informational())
}

/// A method is the client's word: the log has those of HTTP, and "other".
fn method_label(method: &http::Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "POST" => "POST",
        "PUT" => "PUT",
        "HEAD" => "HEAD",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        "CONNECT" => "CONNECT",
        _ => "other",
    }
}
