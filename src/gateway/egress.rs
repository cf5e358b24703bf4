//! The door for this provider's own nodes: a request that names another provider goes to that one's Delivery Service, with
//! this provider's certificate.
//!
//! What it names (`Host`) must be whom its body is for, and its body must be from this provider: a node that is confused, or
//! someone else's process on the loopback, sends nothing in another's name. Who said when to come again (`Retry-After`) is not
//! asked before that.

use super::door::Serving;
use super::exchange::{Ctx, Failed, Rules, Way};
use super::forward;
use super::live::{Live, LiveEgress};
use super::session::Session;
use super::stream::{Connection, client_of};
use super::{Shared, answer, fields, peek};
use crate::config::host_of;
use crate::dialect::{Endpoint, Routes, moh};
use crate::egress::{Error as Undiscovered, Found};
use crate::forward::{ConnectError, Error, Head, Peer, Protocol, Times};
use crate::problem::Refusal;
use crate::telemetry::{Decision, Line};
use crate::tls::TlsStream;
use crate::upstream;
use crate::wire::ProviderName;
use async_trait::async_trait;
use bytes::Bytes;
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderValue, Response, StatusCode, header, response};
use pingora_core::apps::ServerApp;
use pingora_core::protocols::Stream;
use pingora_core::server::ShutdownWatch;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant, SystemTime};
use tokio::io::BufReader;

/// What nodes ask of other providers: they are known by the bodies' headers.
static ROUTES: LazyLock<Routes> = LazyLock::new(|| Routes::of(&[&moh::DIALECT]));

/// Addresses of a provider that are tried at most.
const MOST_ADDRESSES: usize = 4;

/// What is done with requests of this provider's nodes.
pub(super) struct Egress(pub(super) Arc<Shared>);

/// The listener's application.
pub(super) struct EgressDoor {
    pub(super) rules: Arc<Egress>,
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
        let serving = |connection: &Arc<Connection>| Serving {
            rules: self.rules.clone(),
            connection: connection.clone(),
            frames: None,
            cut: None,
        };
        let Some(tls) = &egress.tls else {
            let connection = Arc::new(Connection::plain(client, self.address, open));
            let _entry = self.shared.connections.keep(&connection);
            serving(&connection).until_its_end(Box::new(BufReader::new(stream)), &live, shutdown.clone()).await;
            return None;
        };
        let accepted =
            tokio::time::timeout(live.timeouts.tls_handshake, TlsStream::accept(tls.config.clone(), stream)).await;
        let stream = accepted.ok()?.inspect_err(|e| tracing::debug!(%client, "egress: TLS handshake: {e}")).ok()?;
        let connection = Arc::new(Connection::new(client, self.address, &stream, tls, false, open));
        let _entry = self.shared.connections.keep(&connection);
        serving(&connection).until_its_end(Box::new(stream), &live, shutdown.clone()).await;
        None
    }

    async fn cleanup(&self) {
        self.shared.leave_time().await;
    }
}

/// What is kept of a request.
pub(super) struct Outgoing {
    shared: Arc<Shared>,
    began: Instant,
    id: fields::RequestId,
    live: Arc<Live>,
    connection: Arc<Connection>,
    endpoint: Option<&'static Endpoint>,
    operation: Option<&'static str>,
    /// Whom it is for.
    provider: String,
    /// Of the group, or the target, that it is about.
    about: Option<u128>,
    found: Option<Arc<Found>>,
    /// How many addresses were tried.
    tried: usize,
    waited: Duration,
    broken: bool,
    refused: Option<&'static str>,
    /// When it was first sent, if it was.
    forwarded: Option<Instant>,
    answered_by_other: bool,
    resent: bool,
    took: Option<Duration>,
    http: &'static str,
    method: &'static str,
    status: u16,
    octets: (u64, u64),
}

impl Outgoing {
    fn egress(&self) -> Result<Arc<LiveEgress>, Refusal> {
        self.live.egress.clone().ok_or(Refusal::Internal)
    }
}

/// The provider that an authority names, in lower case.
fn named(request: &Parts) -> Result<String, Refusal> {
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
    async fn decide(&self, session: &mut Session, ctx: &mut Outgoing) -> Result<(), Refusal> {
        let live = ctx.live.clone();
        let egress = ctx.egress()?;
        let connection = ctx.connection.clone();
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
        let request = &session.head;
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
            self.read(session, ctx, endpoint).await?;
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
    ) -> Result<(), Refusal> {
        let live = ctx.live.clone();
        session.body = peek::body(session, endpoint, &live)?;
        let reading = peek::Reading { endpoint, parameter: "", live: &live, gauge: &self.0.metrics.held };
        let read = peek::peek(session, &reading, &mut ctx.waited).await;
        let _held = read.map_err(|stop| {
            ctx.broken = stop.broken;
            stop.refusal
        })?;
        let head = peek::head(&session.head, "");
        let envelope = endpoint.read(&head, session.held()).map_err(Refusal::Malformed)?;
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
}

impl Rules for Egress {
    type Ctx = Outgoing;

    fn shared(&self) -> &Arc<Shared> {
        &self.0
    }

    fn begin(&self, session: &Session) -> Outgoing {
        self.0.metrics.in_flight.inc();
        Outgoing {
            shared: self.0.clone(),
            began: session.began,
            id: fields::RequestId::new(),
            live: self.0.live.load_full(),
            connection: session.connection.clone(),
            endpoint: None,
            operation: None,
            provider: String::new(),
            about: None,
            found: None,
            tried: 0,
            waited: Duration::ZERO,
            broken: false,
            refused: None,
            forwarded: None,
            answered_by_other: false,
            resent: false,
            took: None,
            http: session.http(),
            method: super::account::method_label(&session.head.method),
            status: 0,
            octets: (0, 0),
        }
    }

    async fn admit(&self, session: &mut Session, ctx: &mut Outgoing) -> Result<Option<Response<Bytes>>, Refusal> {
        self.decide(session, ctx).await?;
        if ctx.endpoint.is_some_and(|endpoint| endpoint.takes_body()) {
            return Ok(None);
        }
        // Where the other's Delivery Service is has just been found out.
        let domain = ctx.found.as_ref().map(|found| found.ds_domain.clone()).unwrap_or_default();
        Ok(Some(answer::known("text/plain", domain)))
    }

    fn head(&self, session: &Session, ctx: &mut Outgoing) -> Result<Head, Refusal> {
        let (Some(endpoint), Some(found)) = (ctx.endpoint, &ctx.found) else { return Err(Refusal::Internal) };
        // What is known inside stays inside.
        let is_dropped = |name: &http::HeaderName, _: &HeaderValue| {
            *name == header::CONTENT_TYPE || fields::is_ours_to_say(name, &ctx.live.fields)
        };
        let mut kept = fields::kept(&session.head.headers, is_dropped, 1);
        kept.push((header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")));
        Ok(Head {
            method: session.head.method.clone(),
            target: PathAndQuery::from_static(endpoint.path),
            authority: found.ds_domain.clone(),
            fields: kept,
        })
    }

    async fn peer(&self, ctx: &mut Outgoing) -> Result<(Peer, Instant), Refusal> {
        let (found, egress) = (ctx.found.clone().ok_or(Refusal::Internal)?, ctx.egress()?);
        let address = found.addresses.get(ctx.tried).filter(|_| ctx.tried < MOST_ADDRESSES);
        let address = *address.ok_or(Refusal::BadGateway)?;
        ctx.tried += 1;
        let peer = Peer {
            at: upstream::Target::Inet(address),
            tls: Some(egress.tls_to(&found.ds_domain).ok_or(Refusal::BadGateway)?),
            protocol: Protocol::Either,
            streams: forward::STREAMS,
            times: Times {
                connect: egress.settings.connect_timeout,
                read: egress.settings.read_timeout,
                write: egress.settings.read_timeout,
                keepalive: ctx.live.timeouts.keepalive,
            },
        };
        Ok((peer, Instant::now()))
    }

    fn unconnected(&self, e: &ConnectError, ctx: &mut Outgoing) -> Option<Refusal> {
        tracing::warn!(provider = %ctx.provider, "cannot connect to another provider: {e}");
        // Nothing was sent: another of its addresses may have it.
        let is_last = ctx.found.as_ref().is_none_or(|found| ctx.tried >= found.addresses.len().min(MOST_ADDRESSES));
        (is_last && matches!(e, ConnectError::TimedOut)).then_some(Refusal::GatewayTimeout)
    }

    fn connected(&self, _: bool, ctx: &mut Outgoing) {
        ctx.forwarded.get_or_insert_with(Instant::now);
    }

    fn failed(&self, e: Error, way: Way, ctx: &mut Outgoing) -> Failed {
        match e {
            Error::Stopped(stop) if stop.gone => Failed::Abort,
            // Otherwise the other side may have begun to process it.
            Error::Untouched if way.can_be_sent_again && !std::mem::replace(&mut ctx.resent, true) => {
                ctx.tried -= 1;
                Failed::Again
            }
            e => {
                if let Error::Stopped(stop) = &e {
                    ctx.broken |= stop.broken;
                }
                Failed::Refuse(forward::without_an_answer(e))
            }
        }
    }

    fn answered(&self, head: &mut response::Parts, ctx: &mut Outgoing) -> Result<(), Refusal> {
        ctx.answered_by_other = true;
        ctx.took = Some(ctx.began.elapsed());
        if let (Ok(egress), Some(endpoint)) = (ctx.egress(), ctx.endpoint) {
            let retry_after = head.headers.get(header::RETRY_AFTER).and_then(|field| field.to_str().ok());
            let (status, now) = (head.status.as_u16(), Instant::now());
            let about = ctx.about;
            egress.patience.note(&ctx.provider, endpoint.name, about, status, retry_after, now, SystemTime::now());
        }
        Ok(())
    }

    fn pass(&self, _: usize, _: &mut Outgoing) -> Result<(), Refusal> {
        Ok(())
    }

    fn passes_trailers(&self, _: &Outgoing) -> bool {
        true
    }

    fn refused(&self, refusal: &Refusal, ctx: &mut Outgoing) {
        ctx.refused = Some(refusal.reason());
        ctx.broken |= refusal.closes();
    }
}

impl Ctx for Outgoing {
    fn broken(&self) -> bool {
        self.broken
    }

    fn until(&self) -> Option<Instant> {
        // Another provider that answers an octet at a time does not hold a request for ever.
        let egress = self.live.egress.as_ref()?;
        Some(self.forwarded? + self.live.timeouts.body_total + egress.settings.read_timeout * 10)
    }

    fn idle(&self) -> Duration {
        self.live.timeouts.body_idle
    }

    fn patience(&self) -> Duration {
        self.live.timeouts.body_total
    }

    fn status(&mut self, status: StatusCode) {
        self.status = status.as_u16();
    }

    fn octets(&mut self, came: u64, went: u64) {
        self.octets = (came, went);
    }

    fn aborted(&mut self, refusal: Option<&Refusal>) {
        if let Some(refusal) = refusal {
            self.refused = Some(refusal.reason());
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.say();
        self.shared.metrics.in_flight.dec();
    }
}

impl Outgoing {
    /// Says what became of it, in metrics and in the access log.
    fn say(&self) {
        let (ctx, shared) = (self, &self.shared);
        let result = match (ctx.refused, ctx.answered_by_other) {
            (Some(reason), _) => reason,
            (None, true) => "forwarded",
            (None, false) if ctx.found.is_some() && ctx.forwarded.is_none() => "answered",
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
        let (body_in, body_out) = ctx.octets;
        shared.access_log.write(&Line {
            time: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true),
            request_id: ctx.id.as_str(),
            egress: true,
            client: ctx.connection.client.ip().to_string(),
            provider: Some(ctx.provider.as_str()).filter(|provider| !provider.is_empty()),
            peer: None,
            http: ctx.http,
            method: ctx.method,
            endpoint: ctx.endpoint.map(|e| e.name),
            operation: ctx.operation,
            status: ctx.status,
            decision: decision.label(),
            reason: ctx.refused,
            body_in: usize::try_from(body_in).unwrap_or(usize::MAX),
            body_out: usize::try_from(body_out).unwrap_or(usize::MAX),
            ds_us: ctx.took.map(micros),
            node: ctx.found.as_ref().map(|found| found.ds_domain.as_str()),
            ..Line::default()
        });
    }
}
