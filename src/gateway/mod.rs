//! The one room that knows Pingora: connections, requests on them, and the steps in their order; nothing is decided
//! here. Pingora listens, hands sockets on to a successor and stops ([`start`], [`threads`], [`upgrade`]); HTTP with
//! those who come in is our own ([`http1`]) and h2's ([`http2`]).
//!
//! [`Gateway`] is what is done with other providers' requests. `admit` is the way in: route, host, peek, identify, admit. What it
//! lets pass goes to a node that `peer` chooses, with the fields that `head` sets; it is accounted for when it is dropped. A
//! refusal is answered from one place, wherever it comes from ([`exchange`]).

mod account;
mod admin;
mod answer;
mod connections;
mod door;
mod download;
mod egress;
mod exchange;
mod fields;
mod flow;
mod forward;
mod frames;
mod http1;
mod http2;
mod live;
mod peek;
mod proxy_protocol;
mod reload;
mod session;
mod start;
mod stream;
mod threads;
mod upgrade;

pub use start::{StartError, run};
pub use upgrade::From;

use crate::admission::{Admission, Decision as Verdict, Subject, Tally, identify};
use crate::dialect::{self, By, Envelope, Facts, Member, Named, Operation};
use crate::download::{Refused, Target};
use crate::forward::{Clients, ConnectError, Error, Head, Peer};
use crate::limiter::fleet;
use crate::privacypass;
use crate::problem::{Refusal, TokenProblem, Violated};
use crate::telemetry::{AccessLog, Decision, Metrics};
use crate::upstream::Nodes;
use crate::wire::ProviderName;
use account::RequestContext;
use arc_swap::ArcSwap;
use bytes::Bytes;
use connections::Connections;
use download::Download;
use exchange::{Failed, Rules, Way};
use fields::Learned;
use forward::NodeTlsForms;
use http::request::Parts;
use http::{HeaderValue, Response, header, response};
use live::Live;
use session::Session;
use std::borrow::Cow;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, OnceLock};
use std::time::Instant;
use stream::Connection;

/// What all requests share, for as long as the process lives.
struct Shared {
    /// What the configuration says; a reload exchanges it.
    live: ArcSwap<Live>,
    nodes: Arc<Nodes>,
    node_tls: NodeTlsForms,
    /// Connections to nodes and to other servers.
    clients: Clients,
    connections: Connections,
    metrics: Metrics,
    access_log: AccessLog,
    /// Metrics of Privacy Pass, once there is any.
    privacy_pass_metrics: OnceLock<privacypass::Metrics>,
    /// Metrics of the store of a fleet, once there is one.
    store_metrics: OnceLock<fleet::Metrics>,
    /// What session tickets are made with where the operator gives no secret.
    own_secret: [u8; 32],
    /// The process has been told to stop: no connection is kept for a further request.
    draining: AtomicBool,
    /// Another process has its listening sockets.
    succeeded: AtomicBool,
    /// How many threads serve a listener.
    threads: tokio::sync::watch::Sender<usize>,
    /// How many listeners do not listen yet.
    opening: Arc<AtomicUsize>,
}

/// What is done with other providers' requests.
struct Gateway(Arc<Shared>);

fn limited(violated: Vec<Violated>) -> Refusal {
    Refusal::Limited { violated, challenge: None }
}

/// Whether limits let a request pass; and if so, whether for a token only.
fn passes(verdict: Verdict) -> Result<bool, Refusal> {
    match verdict {
        Verdict::Pass { topped_up } => Ok(topped_up),
        Verdict::Refuse { violated, .. } => Err(limited(violated)),
        Verdict::Unavailable { policies } => Err(Refusal::LimitsUnavailable { policies }),
    }
}

/// What limits say at once.
enum AtOnce {
    /// They let the request pass.
    Passed,
    /// They say so, and a token is required or helps; or a fleet's store has to be asked.
    Waits(Option<Box<(Verdict, Tally)>>),
}

/// A [`Subject`], with what it is said of.
struct Known<'a> {
    provider: Option<String>,
    pattern: Option<&'a str>,
    operation: &'static Operation,
    group: Option<Cow<'a, [u8]>>,
    member: Option<Member<'a>>,
    target: Option<Cow<'a, [u8]>>,
    cost: u32,
    octets: u32,
    ip: IpAddr,
    at: Instant,
}

impl Known<'_> {
    fn subject(&self) -> Subject<'_> {
        Subject {
            ip: self.ip,
            provider: self.provider.as_deref(),
            pattern: self.pattern,
            operation: self.operation,
            group: self.group.as_deref(),
            member: self.member,
            target: self.target.as_deref(),
            cost: self.cost,
            octets: self.octets,
            at: self.at,
        }
    }
}

/// What a request waits for that is not decided at once.
type Waits<'a> = Pin<Box<dyn Future<Output = Result<(), Refusal>> + Send + 'a>>;

fn limits_at_once(live: &Live, ctx: &mut RequestContext, subject: &Subject<'_>) -> Result<AtOnce, Refusal> {
    let admission = &live.admission;
    ctx.tickets = admission.enter(subject).map_err(limited)?;
    let required = admission.policy().token_required(subject.operation, subject.ip);
    let Some((decision, tally)) = admission.decide_at_once(subject, false, !required) else {
        return Ok(AtOnce::Waits(None));
    };
    let admitted = match decision {
        Verdict::Pass { .. } if !required => Ok(()),
        Verdict::Pass { .. } | Verdict::Refuse { token_helps: true, .. } => {
            return Ok(AtOnce::Waits(Some(Box::new((decision, tally)))));
        }
        other => passes(other).map(drop),
    };
    ctx.account(admission, subject, &tally, admitted).map(|()| AtOnce::Passed)
}

/// Host (`:authority`) and SNI are ours, the port aside.
fn check_host(live: &Live, request: &Parts, connection: &Connection) -> Result<(), Refusal> {
    let host = answer::authority(request)?;
    if !live.provider.is_authority(host) {
        return Err(Refusal::Misdirected("Host"));
    }
    match &connection.sni {
        Some(sni) if !live.provider.is_host(sni) => Err(Refusal::Misdirected("SNI")),
        _ => Ok(()),
    }
}

impl Gateway {
    /// The way in: everything up to the decision. None: the request goes on.
    async fn decide(
        &self,
        session: &mut Session,
        ctx: &mut RequestContext,
    ) -> Result<Option<Response<Bytes>>, Refusal> {
        let live = ctx.live.clone();
        let connection = ctx.connection.clone();

        // route
        let request = &session.head;
        peek::check_framing(request)?;
        if request.uri.query().is_some() {
            return Err(Refusal::UnknownPath);
        }
        let found = live.routes(connection.listener).find(&request.method, request.uri.path())?;
        let endpoint = found.route.endpoint;
        (ctx.endpoint, ctx.dialect) = (Some(endpoint), Some(found.route.dialect));
        ctx.path = Some(forward::path(found.route, found.raw)?);
        let parameter = found.parameter.into_owned();
        check_host(&live, request, &connection)?;

        if let By::Gateway(of) = endpoint.by {
            let operation = endpoint.operations.first().copied().ok_or(Refusal::Internal)?;
            ctx.operation = Some(operation.name);
            // No body names a sender; a certificate does, by the first of its names.
            let admitted = |name: &&String| {
                let name = ProviderName::from_bytes(name.as_bytes());
                name.is_ok_and(|name| live.peers.admit(&name, connection.identity.as_ref()).is_ok())
            };
            let names = connection.identity.as_ref().map(|identity| &identity.dns_names[..]).unwrap_or_default();
            let known = Known {
                provider: names.first().filter(admitted).cloned(),
                pattern: None,
                operation,
                group: None,
                member: None,
                target: None,
                cost: 1,
                octets: 0,
                ip: connection.client.ip(),
                at: ctx.now(),
            };
            if let Some(waits) = self.limits_and_token(session, ctx, &live, known)? {
                waits.await?;
            }
            return self.answer_it(session, ctx, of).map(Some);
        }

        // Who cannot be anybody has no body read.
        if found.route.dialect.mutual_tls && connection.identity.is_none() {
            return Err(Refusal::SenderMismatch);
        }

        // peek
        if let By::Fetched(_) = endpoint.by {
            Box::pin(self.admit_download(session, ctx, (&live, &connection), &parameter)).await?;
            return Ok(None);
        }
        session.body = peek::body(session, endpoint, &live)?;
        let reading = peek::Reading { endpoint, parameter: &parameter, live: &live, gauge: &self.0.metrics.held };
        let read = peek::peek(session, &reading, &mut ctx.waited).await;
        let _held = read.map_err(|stop| {
            ctx.broken = stop.broken;
            stop.refusal
        })?;
        let (session, octets) = (&*session, session.held());
        // What is not declared is what has come; the rest is charged when it is in.
        let declared = peek::content_length(&session.head);
        ctx.owes = declared.is_none() && !session.body_is_in();
        ctx.charged = declared.unwrap_or(octets.len() as u64);
        let envelope = endpoint.read(&peek::head(&session.head, &parameter), octets).map_err(Refusal::Malformed)?;
        if let Some(waits) = self.identify_and_admit(session, ctx, (&live, &connection), &envelope)? {
            waits.await?;
        }
        Ok(None)
    }

    /// A download: its URL is read before anything is asked, and its server looked for once the request is admitted.
    async fn admit_download(
        &self,
        session: &mut Session,
        ctx: &mut RequestContext,
        (live, connection): (&Live, &Connection),
        parameter: &str,
    ) -> Result<(), Refusal> {
        if !session.body_is_in() {
            return Err(Refusal::BadHttp("a download has no body"));
        }
        let endpoint = ctx.endpoint.ok_or(Refusal::Internal)?;
        let envelope = endpoint.read(&peek::head(&session.head, parameter), &[]).map_err(Refusal::Malformed)?;
        let listed = live.downloads.as_ref().ok_or(Refusal::Download(Refused::HostNotListed));
        let target = listed.and_then(|of| Target::read(parameter, &of.settings).map_err(Refusal::Download));
        if let Some(waits) = self.identify_and_admit(session, ctx, (live, connection), &envelope)? {
            waits.await?;
        }
        let (target, downloads) = (target?, live.downloads.clone().ok_or(Refusal::Internal)?);
        let download = Download::new(target, downloads).await.map_err(Refusal::Download)?;
        ctx.download = Some(Box::new(download));
        Ok(())
    }

    /// Who it is from, and what the limits say: see [`Gateway::limits_and_token`].
    fn identify_and_admit<'a>(
        &'a self,
        session: &'a Session,
        ctx: &'a mut RequestContext,
        (live, connection): (&Live, &'a Connection),
        envelope: &Envelope<'a>,
    ) -> Result<Option<Waits<'a>>, Refusal> {
        let shared = &self.0;
        ctx.operation = Some(envelope.operation.name);
        let group = envelope.group().map(|group| group.octets());
        if let Some(group) = &group {
            ctx.group_hash = Some(forward::group_hash(group));
            // For the log alone.
            ctx.group_pseudonym = shared.access_log.is_on().then(|| live.admission.pseudonym(group));
        }
        let dialect = ctx.dialect.ok_or(Refusal::Internal)?;
        let identity = connection.identity.as_ref();
        let known = Known {
            provider: identify(envelope, dialect, identity, &live.provider, &live.peers)?,
            pattern: identity.and_then(|identity| identity.pattern_of(&envelope.sender)),
            operation: envelope.operation,
            group,
            member: envelope.member,
            target: envelope.target.as_ref().map(Named::octets),
            cost: envelope.cost,
            octets: u32::try_from(ctx.charged).unwrap_or(u32::MAX),
            ip: connection.client.ip(),
            at: ctx.now(),
        };
        self.limits_and_token(session, ctx, live, known)
    }

    /// Limits before tokens: a token is dear to check. It is taken in hand before the limits are charged, and spent only
    /// once the request is on its way to the Delivery Service. Most requests need neither a token nor a store: they are decided
    /// at once, and have no room for what others wait for.
    fn limits_and_token<'a>(
        &'a self,
        session: &'a Session,
        ctx: &'a mut RequestContext,
        live: &Live,
        known: Known<'a>,
    ) -> Result<Option<Waits<'a>>, Refusal> {
        let decided = match limits_at_once(live, ctx, &known.subject()) {
            Ok(AtOnce::Waits(decided)) => decided,
            at_once => {
                ctx.provider = known.provider;
                return at_once.map(|_| None);
            }
        };
        Ok(Some(Box::pin(async move {
            let admitted = self.limits_and_token_waiting(session, ctx, &known.subject(), decided).await;
            ctx.provider = known.provider;
            admitted
        })))
    }

    async fn limits_and_token_waiting(
        &self,
        session: &Session,
        ctx: &mut RequestContext,
        subject: &Subject<'_>,
        decided: Option<Box<(Verdict, Tally)>>,
    ) -> Result<(), Refusal> {
        let admission = &ctx.live.admission.clone();
        let required = admission.policy().token_required(subject.operation, subject.ip);
        let (decision, mut tally) = match decided {
            Some(decided) => *decided,
            None => admission.decide(subject, false, !required).await,
        };
        let admitted = match decision {
            Verdict::Pass { .. } if !required => Ok(()),
            Verdict::Pass { .. } => {
                self.with_token(session, ctx, subject, admission, required, vec![], &mut tally).await
            }
            Verdict::Refuse { violated, token_helps: true } => {
                self.with_token(session, ctx, subject, admission, required, violated, &mut tally).await
            }
            other => passes(other).map(drop),
        };
        ctx.account(admission, subject, &tally, admitted)
    }

    /// Asks again, with the token that is `required`, or that helps with limits that are `exceeded`. The tally is then of the
    /// last question.
    #[expect(clippy::too_many_arguments, reason = "what the first question was about, and what it came to")]
    async fn with_token(
        &self,
        session: &Session,
        ctx: &mut RequestContext,
        subject: &Subject<'_>,
        admission: &Admission,
        required: bool,
        exceeded: Vec<Violated>,
        tally: &mut Tally,
    ) -> Result<(), Refusal> {
        let headers = &session.head.headers;
        let origin = ctx.live.privacy_pass.clone().ok_or(Refusal::Internal)?;
        let purpose = admission.policy().purpose(subject.operation, subject.ip, &exceeded, required);
        // To verify a token is dear, and one that fails is charged to no limit: who brings many has a limit for that. Nor is
        // one verified that would not help.
        if privacypass::has_credential(headers) {
            if let Err(violated) = admission.token_attempt(subject.ip, false) {
                if exceeded.is_empty() {
                    // Limits would have let it pass, and were charged nothing.
                    *tally = Tally::default();
                }
                return Err(limited(vec![violated]));
            }
            if !exceeded.is_empty() {
                let (decision, with_one) = admission.decide(subject, true, false).await;
                if let Err(refusal) = passes(decision) {
                    *tally = with_one;
                    return Err(refusal);
                }
            }
        }
        let token = match origin.redeem(headers, &purpose).await {
            Ok(token) => token,
            // A limit that a token would help with is a limit first.
            Err(TokenProblem::Missing) if !exceeded.is_empty() => {
                return Err(Refusal::Limited { violated: exceeded, challenge: origin.challenge(&purpose) });
            }
            Err(problem) => {
                if problem == TokenProblem::BadAuthenticator {
                    let _ = admission.token_attempt(subject.ip, true);
                }
                if exceeded.is_empty() {
                    *tally = Tally::default();
                }
                let challenge = origin.challenge(&purpose);
                // Nothing can be asked for; that it must be brought says nothing to anybody.
                let problem = if challenge.is_none() { TokenProblem::NoKey } else { problem };
                return Err(Refusal::Token { problem, challenge });
            }
        };
        // A token takes its time: what is asked now has a deadline of its own.
        let (decision, again) = admission.decide(&Subject { at: Instant::now(), ..*subject }, true, true).await;
        *tally = again;
        let topped_up = passes(decision)?;
        // One that was not needed after all is not spent.
        ctx.token = Some(token).filter(|_| topped_up || required).map(Box::new);
        Ok(())
    }

    /// What the gateway answers from what it knows.
    fn answer_it(
        &self,
        session: &Session,
        ctx: &mut RequestContext,
        of: fn(&Facts<'_>) -> dialect::Answer,
    ) -> Result<Response<Bytes>, Refusal> {
        ctx.decision = Decision::Answered;
        ctx.keep_token();
        let facts = Facts {
            authority: answer::authority(&session.head)?,
            ds_domain: &ctx.live.provider.ds_domain,
            routes: ctx.live.routes(ctx.connection.listener),
        };
        let said = of(&facts);
        let mut response = answer::known(said.content_type, said.body);
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("max-age=3600"));
        Ok(response)
    }
}

impl Rules for Gateway {
    type Ctx = RequestContext;

    fn shared(&self) -> &Arc<Shared> {
        &self.0
    }

    fn begin(&self, session: &Session) -> RequestContext {
        RequestContext::new(&self.0, session)
    }

    async fn admit(&self, session: &mut Session, ctx: &mut RequestContext) -> Result<Option<Response<Bytes>>, Refusal> {
        let decided = self.decide(session, ctx).await;
        let now = Instant::now();
        ctx.gateway_took = Some(now.saturating_duration_since(ctx.began).saturating_sub(ctx.waited));
        ctx.decided_at = Some(now);
        decided
    }

    fn head(&self, session: &Session, ctx: &mut RequestContext) -> Result<Head, Refusal> {
        if let Some(download) = &ctx.download {
            return Ok(download.head(&session.head.headers));
        }
        let (Some(endpoint), Some(path)) = (ctx.endpoint, ctx.path.take()) else { return Err(Refusal::Internal) };
        let connection = &ctx.connection;
        let learned = Learned {
            client: &connection.forwarded_for,
            provider: ctx.provider.as_deref(),
            chain: &connection.chain,
            tls: connection.tls.as_deref(),
            id: ctx.id.as_str(),
            trace: &ctx.trace,
        };
        let of = fields::Of { endpoint, keeps_from: ctx.dialect.is_some_and(|dialect| dialect.names_sender_in_from) };
        fields::head(&session.head, path, of, &ctx.live.fields, &learned, ctx.live.privacy_pass.is_some())
    }

    async fn peer(&self, ctx: &mut RequestContext) -> Result<(Peer, Instant), Refusal> {
        ctx.permit = None;
        if let Some(download) = &mut ctx.download {
            let peer = download.peer(&ctx.live.timeouts).ok_or(Refusal::Download(Refused::Unreachable))?;
            return Ok((peer, Instant::now()));
        }
        let now = ctx.decided_at.take().unwrap_or_else(Instant::now);
        let (node, settings) = self.0.nodes.choose_at(now, ctx.group_hash, &ctx.tried);
        let settings = &*ctx.settings.insert(settings);
        let Some(node) = node else {
            return Err(if ctx.tried.any() {
                Refusal::BadGateway
            } else {
                Refusal::NoNode { retry_after: settings.eject_for }
            });
        };
        ctx.tried.note(&node);
        let node = &*ctx.node.insert(node);
        let permit = node.enter(settings).await;
        ctx.permit = permit.map_err(|_| Refusal::NodeBusy { retry_after: settings.queue_timeout })?;
        // Where there is a queue it may have waited in it.
        ctx.given_at = if ctx.permit.is_some() { Instant::now() } else { now };
        let peer = forward::peer(node, settings, &self.0.node_tls).map_err(|e| {
            tracing::error!(node = %node.label(), "TLS to a Delivery Service node cannot be set up: {e}");
            Refusal::Internal
        })?;
        Ok((peer, ctx.given_at))
    }

    fn unconnected(&self, e: &ConnectError, ctx: &mut RequestContext) -> Option<Refusal> {
        if let Some(download) = &ctx.download {
            let again = download.has_another() && !forward::is_of_this_process(e);
            let refusal = match e {
                ConnectError::TimedOut => Refusal::GatewayTimeout,
                _ => Refusal::BadGateway,
            };
            return (!again).then(|| refusal.of_a_download(true));
        }
        let Some(node) = ctx.node.take() else { return Some(Refusal::Internal) };
        // Where this process has no descriptor or port left, none is at fault, and none would do better.
        let is_ours = forward::is_of_this_process(e);
        if !is_ours && let Some(settings) = &ctx.settings {
            node.refused(settings, ctx.given_at);
        }
        tracing::warn!(node = %node.label(), "cannot connect to a Delivery Service node: {e}");
        // Nothing was sent: the next node may have it.
        is_ours.then_some(Refusal::BadGateway)
    }

    fn connected(&self, kept: bool, ctx: &mut RequestContext) {
        // One that is kept says nothing of whether it would make another.
        if let Some(node) = ctx.node.as_ref().filter(|_| !kept) {
            node.accepted();
        }
        ctx.forwarded_at = Some(if kept { ctx.given_at } else { Instant::now() });
        // The next thing is to write to the node.
        ctx.keep_token();
    }

    fn failed(&self, e: Error, way: Way, ctx: &mut RequestContext) -> Failed {
        if let Error::Stopped(stop) = &e
            && stop.gone
        {
            return Failed::Abort;
        }
        if let Some(download) = &mut ctx.download {
            // To ask for it again does no harm, as long as nothing of it has passed; and is done once.
            if matches!(e, Error::Closed | Error::Untouched) && !std::mem::replace(&mut ctx.resent, true) {
                download.again();
                return Failed::Again;
            }
            return Failed::Refuse(forward::without_an_answer(e).of_a_download(true));
        }
        if let (Some(node), false) = (&ctx.node, matches!(e, Error::Stopped(_))) {
            tracing::warn!(node = %node.label(), "no answer from a Delivery Service node: {e}");
        }
        // Otherwise the Delivery Service may have begun to process it.
        if matches!(e, Error::Untouched) {
            ctx.unkeep_token();
            if !way.can_be_sent_again {
                return Failed::Refuse(Refusal::BadGateway);
            }
            // Once to the same node, on another connection; if it will not have it then, to the next.
            if !std::mem::replace(&mut ctx.resent, true)
                && let Some(node) = &ctx.node
            {
                ctx.tried.forget(node);
            }
            return Failed::Again;
        }
        // Else it is the client that keeps everybody waiting.
        if !matches!(e, Error::Stopped(_)) && way.body_was_in {
            ctx.failed();
        }
        if let Error::Stopped(stop) = &e {
            ctx.broken |= stop.broken;
        }
        Failed::Refuse(forward::without_an_answer(e))
    }

    fn answered(&self, head: &mut response::Parts, ctx: &mut RequestContext) -> Result<(), Refusal> {
        if let Some(download) = &mut ctx.download {
            download.response(head).map_err(Refusal::Download)?;
        }
        ctx.ds_took = ctx.forwarded_at.map(|at| at.elapsed());
        if let Some(node) = &ctx.node {
            node.answered();
        }
        ctx.decision = Decision::Forwarded;
        Ok(())
    }

    fn pass(&self, octets: usize, ctx: &mut RequestContext) -> Result<(), Refusal> {
        match &mut ctx.download {
            Some(download) => download.pass(octets).map_err(Refusal::Download),
            None => Ok(()),
        }
    }

    fn passes_trailers(&self, ctx: &RequestContext) -> bool {
        ctx.download.is_none()
    }

    fn refused(&self, refusal: &Refusal, ctx: &mut RequestContext) {
        let limits = match refusal {
            Refusal::Limited { violated, .. } => violated.iter().map(|v| v.policy.clone()).collect(),
            Refusal::LimitsUnavailable { policies } => policies.clone(),
            _ => vec![],
        };
        ctx.decision = Decision::Refused;
        // It is under way no more, however long its sender takes to read this; and a token is given back before it is sent
        // again.
        ctx.tickets.clear();
        ctx.token = None;
        ctx.refused = Some((refusal.status(), refusal.reason(), limits));
        ctx.broken |= refusal.closes();
    }
}
