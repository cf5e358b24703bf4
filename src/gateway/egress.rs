//! The door for this provider's own nodes: a request that names another provider goes to that one's Delivery Service, with
//! this provider's certificate.
//!
//! What it names (`Host`) must be whom its body is for, and its body must be from this provider: a node that is confused, or
//! someone else's process on the loopback, sends nothing in another's name. Who said when to come again (`Retry-After`) is not
//! asked before that.

use super::door::{Requests, client_of};
use super::forward::{self, Body};
use super::live::{Live, LiveEgress};
use super::stream::{Connection, FederationStream};
use super::{Shared, answer, door, head_is_in, peek};
use crate::config::host_of;
use crate::dialect::{Endpoint, Routes, moh};
use crate::egress::{Error as Undiscovered, Found};
use crate::problem::Refusal;
use crate::telemetry::{Decision, Line};
use crate::wire::ProviderName;
use async_trait::async_trait;
use bytes::Bytes;
use http::{StatusCode, Uri, header};
use pingora_core::apps::{HttpServerApp as _, ServerApp};
use pingora_core::modules::http::HttpModules;
use pingora_core::protocols::{Digest, Stream};
use pingora_core::server::ShutdownWatch;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorSource, ErrorType, Result};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::{FailToProxy, HttpProxy, ProxyHttp, Session};
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant, SystemTime};

/// What nodes ask of other providers: they are known by the bodies' headers.
static ROUTES: LazyLock<Routes> = LazyLock::new(|| Routes::of(&[&moh::DIALECT]));

/// Addresses of a provider that are tried at most.
const MOST_ADDRESSES: usize = 4;

/// Pingora's view of the door.
pub(super) struct Egress(pub(super) Arc<Shared>);

/// The listener's application.
pub(super) struct EgressDoor {
    pub(super) proxy: Arc<HttpProxy<Egress>>,
    pub(super) address: SocketAddr,
    pub(super) shared: Arc<Shared>,
}

#[async_trait]
impl ServerApp for EgressDoor {
    async fn process_new(self: &Arc<Self>, stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        let _open = self.shared.connections.open_egress()?;
        let client = client_of(&stream)?;
        let live = self.shared.live.load_full();
        let egress = live.egress.clone()?;
        let open = self.shared.metrics.connections.clone();
        let (id, headers) = (stream.id(), live.timeouts.headers);
        let requests = Arc::new(Requests::new(self.proxy.clone(), &live));
        let Some(tls) = &egress.tls else {
            let connection = Arc::new(Connection::plain(client, self.address, open));
            let _entry = self.shared.connections.keep(&connection);
            let stream = FederationStream::new(stream, id, connection.clone(), headers, None);
            return tokio::select! {
                left = requests.process_new(Box::new(stream), shutdown) => left,
                () = connection.is_over() => None,
            };
        };
        let accepted = tokio::time::timeout(live.timeouts.tls_handshake, tls.acceptor.accept(stream)).await;
        let stream = accepted.ok()?.inspect_err(|e| tracing::debug!(%client, "egress: TLS handshake: {e}")).ok()?;
        let connection = Arc::new(Connection::new(client, self.address, stream.get_ref().1, tls, false, open));
        let _entry = self.shared.connections.keep(&connection);
        let stream = FederationStream::new(stream, id, connection.clone(), headers, None);
        tokio::select! {
            left = requests.process_new(Box::new(stream), shutdown) => left,
            () = connection.is_over() => None,
        }
    }

    async fn cleanup(&self) {
        self.shared.leave_time().await;
        self.proxy.http_cleanup().await;
    }
}

/// What is kept of a request.
pub(super) struct Outgoing {
    began: Instant,
    id: String,
    live: Arc<Live>,
    connection: Option<Arc<Connection>>,
    endpoint: Option<&'static Endpoint>,
    operation: Option<&'static str>,
    /// Whom it is for.
    provider: String,
    /// Of the group, or the target, that it is about.
    about: Option<u128>,
    found: Option<Arc<Found>>,
    /// How many addresses were tried.
    tried: usize,
    body: Body,
    waited: Duration,
    broken: bool,
    pending: Option<Refusal>,
    refused: Option<&'static str>,
    forwarded: bool,
    answered_by_other: bool,
    resent: bool,
    took: Option<Duration>,
    in_flight: prometheus::IntGauge,
}

impl Outgoing {
    fn egress(&self) -> std::result::Result<Arc<LiveEgress>, Refusal> {
        self.live.egress.clone().ok_or(Refusal::Internal)
    }
}

/// The provider that an authority names, in lower case.
fn named(request: &RequestHeader) -> std::result::Result<String, Refusal> {
    match ProviderName::from_bytes(host_of(answer::authority(request)?).as_bytes()) {
        Ok(name) => Ok(name.to_string()),
        Err(_) => Err(Refusal::Undiscovered("Host names no provider")),
    }
}

fn undiscovered(e: Undiscovered) -> Refusal {
    match e {
        Undiscovered::NotAProvider => Refusal::Undiscovered("Host names no provider"),
        Undiscovered::Unreachable => Refusal::Undiscovered("the provider does not answer"),
        Undiscovered::BadAnswer(why) => Refusal::Undiscovered(why),
        Undiscovered::PrivateAddress => Refusal::Undiscovered("the provider is at no public address"),
        Undiscovered::Busy => Refusal::NoNode { retry_after: Duration::from_secs(1) },
    }
}

impl Egress {
    async fn admit(&self, session: &mut Session, ctx: &mut Outgoing) -> std::result::Result<(), Refusal> {
        let live = ctx.live.clone();
        let egress = ctx.egress()?;
        let connection = ctx.connection.clone().ok_or(Refusal::Internal)?;
        if let Some((_, names)) = &egress.settings.clients {
            // Others may be trusted for other things.
            let holds = |name: &String| {
                ProviderName::from_bytes(name.as_bytes())
                    .is_ok_and(|name| names.iter().any(|pattern| name.matches(pattern)))
            };
            if !connection.identity.as_ref().is_some_and(|identity| identity.dns_names.iter().any(holds)) {
                return Err(Refusal::PeerNotAllowed);
            }
        }
        let request = session.req_header();
        peek::check_framing(request)?;
        if request.uri.query().is_some() {
            return Err(Refusal::UnknownPath);
        }
        let endpoint = ROUTES.find(&request.method, request.uri.path())?.route.endpoint;
        ctx.endpoint = Some(endpoint);
        ctx.provider = named(request)?;
        if live.provider.is_host(&ctx.provider) {
            return Err(Refusal::Misdirected("Host is this provider itself, and"));
        }
        if endpoint.takes_body() {
            self.read(session, ctx, endpoint, &connection).await?;
        }
        if let Some(retry_after) = egress.patience.wait(&ctx.provider, endpoint.name, ctx.about, Instant::now()) {
            return Err(Refusal::ToldToWait { retry_after });
        }
        let found = egress.discovery.find(&ctx.provider).await.map_err(undiscovered)?;
        if live.provider.is_host(&found.ds_domain) {
            return Err(Refusal::Undiscovered("the provider names our Delivery Service as its own"));
        }
        ctx.found = Some(found);
        Ok(())
    }

    /// Reads as much of the body as says from whom and for whom it is.
    async fn read(
        &self,
        session: &mut Session,
        ctx: &mut Outgoing,
        endpoint: &'static Endpoint,
        connection: &Connection,
    ) -> std::result::Result<(), Refusal> {
        let live = ctx.live.clone();
        ctx.body = peek::body(session.req_header(), endpoint, &live)?;
        let reading = peek::Reading { endpoint, parameter: "", live: &live, gauge: &self.0.metrics.held };
        let read = peek::peek(session, &reading, connection, &mut ctx.waited).await;
        let held = read.map_err(|stop| {
            ctx.broken = stop.broken;
            stop.refusal
        })?;
        let head = peek::head(session.req_header(), "");
        let envelope = endpoint.read(&head, held.octets()).map_err(Refusal::Malformed)?;
        ctx.operation = Some(envelope.operation.name);
        ctx.about = envelope.group().or(envelope.target).map(|about| forward::group_hash(&about.octets()));
        if !envelope.recipient.is(&ctx.provider) {
            return Err(Refusal::Misdirected("recipient is not whom Host names, and"));
        }
        if !live.provider.is_recipient(&envelope.sender) {
            return Err(Refusal::SenderMismatch);
        }
        Ok(())
    }

    async fn refuse(&self, session: &mut Session, ctx: &mut Outgoing, refusal: &Refusal) -> Result<()> {
        ctx.refused = Some(refusal.reason());
        let (response, document) = answer::refusal(refusal)?;
        ctx.broken |= refusal.closes();
        self.answer(session, ctx, response, document).await
    }

    async fn answer(&self, session: &mut Session, ctx: &Outgoing, response: ResponseHeader, body: Bytes) -> Result<()> {
        let how = answer::How {
            connection: ctx.connection.as_deref(),
            broken: ctx.broken,
            draining: self.0.draining.load(Ordering::Relaxed),
            within: ctx.live.timeouts.body_total,
        };
        answer::write(session, how, response, body).await
    }
}

#[async_trait]
impl ProxyHttp for Egress {
    type CTX = Outgoing;

    fn new_ctx(&self) -> Outgoing {
        self.0.metrics.in_flight.inc();
        Outgoing {
            began: Instant::now(),
            id: uuid::Uuid::now_v7().simple().to_string(),
            live: self.0.live.load_full(),
            connection: None,
            endpoint: None,
            operation: None,
            provider: String::new(),
            about: None,
            found: None,
            tried: 0,
            body: Body::new(0, Duration::ZERO),
            waited: Duration::ZERO,
            broken: false,
            pending: None,
            refused: None,
            forwarded: false,
            answered_by_other: false,
            resent: false,
            took: None,
            in_flight: self.0.metrics.in_flight.clone(),
        }
    }

    fn init_downstream_modules(&self, _: &mut HttpModules) {
        // None: what the other side answers goes back octet for octet.
    }

    async fn early_request_filter(&self, session: &mut Session, ctx: &mut Outgoing) -> Result<()> {
        ctx.connection = head_is_in(session, &ctx.live);
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Outgoing) -> Result<bool> {
        match self.admit(session, ctx).await {
            Ok(()) if ctx.endpoint.is_some_and(|e| !e.takes_body()) => {
                // Where the other's Delivery Service is has just been found out.
                let domain = ctx.found.as_ref().map(|found| found.ds_domain.clone()).unwrap_or_default();
                let mut response = ResponseHeader::build(StatusCode::OK, Some(3))?;
                response.insert_header(header::CONTENT_TYPE, "text/plain")?;
                self.answer(session, ctx, response, domain.into()).await?;
                Ok(true)
            }
            Ok(()) => Ok(false),
            Err(refusal) => {
                self.refuse(session, ctx, &refusal).await?;
                Ok(true)
            }
        }
    }

    async fn upstream_peer(&self, session: &mut Session, ctx: &mut Outgoing) -> Result<Box<HttpPeer>> {
        ctx.body.rewind();
        let (Some(found), Ok(egress)) = (&ctx.found, ctx.egress()) else {
            return Error::e_explain(ErrorType::InternalError, "nothing was found");
        };
        let Some(address) = found.addresses.get(ctx.tried).filter(|_| ctx.tried < MOST_ADDRESSES) else {
            ctx.pending = Some(Refusal::BadGateway);
            return Error::e_explain(ErrorType::ConnectError, "no address is left");
        };
        ctx.tried += 1;
        let mut peer = HttpPeer::new(*address, true, found.ds_domain.clone());
        peer.client_cert_key = egress.client_certificate.clone();
        peer.group_key = egress.digest;
        let options = &mut peer.options;
        options.ca = Some(egress.roots.clone());
        options.set_http_version(2, 1);
        options.max_h2_streams = 100;
        let times = forward::Times {
            connect: egress.settings.connect_timeout,
            read: egress.settings.read_timeout,
            write: egress.settings.read_timeout,
            keepalive: ctx.live.timeouts.keepalive,
        };
        forward::set_options(options, &times, &ctx.live.timeouts, session.as_mut().is_body_done());
        Ok(Box::new(peer))
    }

    fn fail_to_connect(&self, _: &mut Session, _: &HttpPeer, ctx: &mut Outgoing, mut e: Box<Error>) -> Box<Error> {
        tracing::warn!(provider = %ctx.provider, "cannot connect to another provider: {e}");
        // Nothing was sent: another of its addresses may have it.
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
        ctx: &mut Outgoing,
    ) -> Result<()> {
        ctx.forwarded = true;
        if let (Ok(watch), Ok(egress)) = (door::WATCH.try_with(Clone::clone), ctx.egress()) {
            // Another provider that answers an octet at a time does not hold a request for ever.
            watch.until(Some(Instant::now() + ctx.live.timeouts.body_total + egress.settings.read_timeout * 10));
        }
        Ok(())
    }

    fn error_while_proxy(
        &self,
        _: &HttpPeer,
        session: &mut Session,
        mut e: Box<Error>,
        ctx: &mut Outgoing,
        _: bool,
    ) -> Box<Error> {
        // Otherwise the other side may have begun to process it.
        let again = forward::was_left_untouched(&e)
            && super::status_written(session).is_none()
            && !session.as_ref().retry_buffer_truncated()
            && !std::mem::replace(&mut ctx.resent, true);
        if again {
            ctx.tried -= 1;
        }
        e.set_retry(again);
        e
    }

    async fn request_body_filter(
        &self,
        _: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        ctx: &mut Outgoing,
    ) -> Result<()> {
        ctx.body.pass(body.as_ref().map_or(0, Bytes::len), end).map_err(|refusal| {
            ctx.pending = Some(refusal);
            Error::explain(ErrorType::ReadError, "the body is over its bound").into_down()
        })
    }

    async fn upstream_request_filter(
        &self,
        _: &mut Session,
        request: &mut RequestHeader,
        ctx: &mut Outgoing,
    ) -> Result<()> {
        let (Some(endpoint), Some(found)) = (ctx.endpoint, &ctx.found) else {
            return Error::e_explain(ErrorType::InternalError, "no endpoint");
        };
        request.set_uri(Uri::from_static(endpoint.path));
        request.insert_header(header::HOST, found.ds_domain.as_str())?;
        request.insert_header(header::CONTENT_TYPE, "application/octet-stream")?;
        // What is known inside stays inside.
        let inside = request.headers.keys().filter(|name| super::fields::is_ours_to_say(name, &ctx.live.fields));
        for name in inside.cloned().collect::<Vec<_>>() {
            request.remove_header(&name);
        }
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Outgoing,
    ) -> Result<()> {
        if response.status.is_informational() {
            return Ok(());
        }
        ctx.answered_by_other = true;
        ctx.took = Some(ctx.began.elapsed());
        if let (Ok(egress), Some(endpoint)) = (ctx.egress(), ctx.endpoint) {
            let retry_after = response.headers.get(header::RETRY_AFTER).and_then(|field| field.to_str().ok());
            let (status, now) = (response.status.as_u16(), Instant::now());
            let about = ctx.about;
            egress.patience.note(&ctx.provider, endpoint.name, about, status, retry_after, now, SystemTime::now());
        }
        if self.0.draining.load(Ordering::Relaxed) {
            session.set_keepalive(None);
        }
        if !session.as_mut().is_body_done()
            && let Some(connection) = &ctx.connection
        {
            // The answer must arrive, though the body is not in.
            connection.linger();
        }
        Ok(())
    }

    async fn fail_to_proxy(&self, session: &mut Session, e: &Error, ctx: &mut Outgoing) -> FailToProxy {
        let downstream = *e.esource() == ErrorSource::Downstream;
        let refusal = match (ctx.pending.take(), e.etype()) {
            (Some(refusal), _) => refusal,
            (None, ErrorType::ReadTimedout) if downstream => Refusal::TooSlow,
            (None, _) if downstream => return FailToProxy { error_code: 0, can_reuse_downstream: false },
            (None, ErrorType::ReadTimedout | ErrorType::WriteTimedout | ErrorType::ConnectTimedout) => {
                Refusal::GatewayTimeout
            }
            (None, _) => Refusal::BadGateway,
        };
        let status = refusal.status().as_u16();
        if super::status_written(session).is_none() {
            // Pingora ends the connection after this: its client is told so.
            session.set_keepalive(None);
            let _ = self.refuse(session, ctx, &refusal).await;
        }
        FailToProxy { error_code: status, can_reuse_downstream: false }
    }

    fn suppress_error_log(&self, _: &Session, _: &Outgoing, _: &Error) -> bool {
        // The access log says it.
        true
    }

    async fn logging(&self, session: &mut Session, _: Option<&Error>, ctx: &mut Outgoing) {
        let shared = &self.0;
        let result = match (ctx.refused, ctx.answered_by_other) {
            (Some(reason), _) => reason,
            (None, true) => "forwarded",
            (None, false) if ctx.found.is_some() && !ctx.forwarded => "answered",
            (None, false) => "aborted",
        };
        shared.metrics.egress.with_label_values(&[result]).inc();
        if !shared.access_log.is_on() {
            return;
        }
        let decision = match result {
            "forwarded" => Decision::Forwarded,
            "answered" => Decision::Answered,
            "aborted" => Decision::Aborted,
            _ => Decision::Refused,
        };
        let micros = |took: Duration| u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let request = session.req_header();
        shared.access_log.write(&Line {
            time: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true),
            request_id: &ctx.id,
            egress: true,
            client: ctx.connection.as_ref().map(|c| c.client.ip().to_string()).unwrap_or_default(),
            provider: Some(ctx.provider.as_str()).filter(|provider| !provider.is_empty()),
            peer: None,
            http: if request.version == http::Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" },
            method: super::account::method_label(&request.method),
            endpoint: ctx.endpoint.map(|e| e.name),
            operation: ctx.operation,
            status: super::status_written(session).map_or(0, |status| status.as_u16()),
            decision: decision.label(),
            reason: ctx.refused,
            body_in: session.body_bytes_read(),
            body_out: session.body_bytes_sent(),
            ds_us: ctx.took.map(micros),
            node: ctx.found.as_ref().map(|found| found.ds_domain.as_str()),
            ..Line::default()
        });
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.in_flight.dec();
    }
}
