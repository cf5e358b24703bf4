//! The one room that knows Pingora: its phases, in which the steps are called in their order, and nothing is decided.
//!
//! `request_filter` is the way in: route, host, peek, identify, admit. What it lets pass goes to a node that
//! `upstream_peer` chooses, with the fields that `upstream_request_filter` sets; `logging` accounts for it. A refusal is
//! answered from one place, wherever it comes from.

mod account;
mod admin;
mod answer;
mod connections;
mod door;
mod download;
mod egress;
mod fields;
mod forward;
mod frames;
mod live;
mod peek;
mod proxy_protocol;
mod reload;
mod start;
mod stream;
mod threads;
mod upgrade;

pub use start::{StartError, run};
pub use upgrade::From;

use crate::admission::{Admission, Decision as Verdict, Subject, Tally, identify};
use crate::dialect::{self, By, Envelope, Facts, Named};
use crate::download::{Refused, Target};
use crate::limiter::fleet;
use crate::privacypass;
use crate::problem::{Refusal, TokenProblem, Violated};
use crate::telemetry::{AccessLog, Decision, Metrics};
use crate::upstream::Nodes;
use crate::wire::ProviderName;
use account::{RequestContext, status_written};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::Bytes;
use connections::Connections;
use download::Download;
use fields::Learned;
use forward::NodeTlsForms;
use http::{HeaderMap, StatusCode, header};
use live::Live;
use pingora_core::modules::http::HttpModules;
use pingora_core::protocols::Digest;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorSource, ErrorType, Result};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::{FailToProxy, ProxyHttp, Session};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use stream::Connection;

/// What all requests share, for as long as the process lives.
struct Shared {
    /// What the configuration says; a reload exchanges it.
    live: ArcSwap<Live>,
    nodes: Arc<Nodes>,
    node_tls: NodeTlsForms,
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
}

/// Pingora's view of the gateway.
pub struct Gateway(Arc<Shared>);

/// What we know of the connection under a request.
fn connection_of(digest: &Digest) -> Option<&Arc<Connection>> {
    digest.proxy_digest.as_ref()?.user_data.as_ref()?.downcast_ref()
}

/// The head of a request is in: what holds for the rest of it, and the connection that it is on.
fn head_is_in(session: &mut Session, live: &Live) -> Option<Arc<Connection>> {
    let connection = session.digest().and_then(connection_of).cloned();
    if let Some(connection) = &connection {
        connection.head_is_in();
    }
    // Where Pingora has decided against another request on this connection, it has its reasons.
    if session.get_keepalive().is_some() {
        session.set_keepalive(Some(live.timeouts.keepalive.as_secs().max(1)));
    }
    session.set_write_timeout(Some(live.timeouts.body_total));
    connection
}

fn limited(violated: Vec<Violated>) -> Refusal {
    Refusal::Limited { violated, challenge: None }
}

/// Whether limits let a request pass; and if so, whether for a token only.
fn passes(verdict: Verdict) -> std::result::Result<bool, Refusal> {
    match verdict {
        Verdict::Pass { topped_up } => Ok(topped_up),
        Verdict::Refuse { violated, .. } => Err(limited(violated)),
        Verdict::Unavailable { policies } => Err(Refusal::LimitsUnavailable { policies }),
    }
}

/// Host (`:authority`) and SNI are ours, the port aside.
fn check_host(live: &Live, request: &RequestHeader, connection: &Connection) -> std::result::Result<(), Refusal> {
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
    /// The way in: everything up to the decision. The answer is the refusal; none: the request goes on.
    async fn admit(&self, session: &mut Session, ctx: &mut RequestContext) -> std::result::Result<(), Refusal> {
        let live = ctx.live.clone();
        let connection = ctx.connection.clone().ok_or(Refusal::Internal)?;

        // route
        let request = session.req_header();
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

        if let By::Gateway(_) = endpoint.by {
            let operation = endpoint.operations.first().copied().ok_or(Refusal::Internal)?;
            ctx.operation = Some(operation.name);
            // No body names a sender; a certificate does, by the first of its names.
            let admitted = |name: &&String| {
                let name = ProviderName::from_bytes(name.as_bytes());
                name.is_ok_and(|name| live.peers.admit(&name, connection.identity.as_ref()).is_ok())
            };
            let names = connection.identity.as_ref().map(|identity| &identity.dns_names[..]).unwrap_or_default();
            let provider = names.first().filter(admitted).cloned();
            let subject = Subject {
                ip: connection.client.ip(),
                provider: provider.as_deref(),
                pattern: None,
                operation,
                group: None,
                member: None,
                target: None,
                cost: 1,
                octets: 0,
                at: Instant::now(),
            };
            let admitted = self.limits_and_token(session, ctx, &subject).await;
            ctx.provider = provider;
            return admitted;
        }

        // Who cannot be anybody has no body read.
        if found.route.dialect.mutual_tls && connection.identity.is_none() {
            return Err(Refusal::SenderMismatch);
        }

        // peek
        if let By::Fetched(_) = endpoint.by {
            return self.admit_download(session, ctx, &connection, &parameter).await;
        }
        ctx.body = peek::body(session.req_header(), endpoint, &live)?;
        let reading = peek::Reading { endpoint, parameter: &parameter, live: &live, gauge: &self.0.metrics.held };
        let read = peek::peek(session, &reading, &connection, &mut ctx.waited).await;
        let held = read.map_err(|stop| {
            ctx.broken = stop.broken;
            stop.refusal
        })?;
        // What is not declared is what has come; the rest is charged when it is in.
        let declared = peek::content_length(session.req_header());
        ctx.owes = declared.is_none() && !session.as_mut().is_body_done();
        ctx.charged = declared.unwrap_or(held.octets().len() as u64);
        let head = peek::head(session.req_header(), &parameter);
        let envelope = endpoint.read(&head, held.octets()).map_err(Refusal::Malformed)?;
        self.identify_and_admit(session, ctx, &connection, &envelope).await
    }

    /// A download: its URL is read before anything is asked, and its server looked for once the request is admitted.
    async fn admit_download(
        &self,
        session: &mut Session,
        ctx: &mut RequestContext,
        connection: &Connection,
        parameter: &str,
    ) -> std::result::Result<(), Refusal> {
        let live = ctx.live.clone();
        if !session.as_mut().is_body_empty() {
            return Err(Refusal::BadHttp("a download has no body"));
        }
        let endpoint = ctx.endpoint.ok_or(Refusal::Internal)?;
        let envelope = endpoint.read(&peek::head(session.req_header(), parameter), &[]).map_err(Refusal::Malformed)?;
        let listed = live.downloads.as_ref().ok_or(Refusal::Download(Refused::HostNotListed));
        let target = listed.and_then(|of| Target::read(parameter, &of.settings).map_err(Refusal::Download));
        self.identify_and_admit(session, ctx, connection, &envelope).await?;
        let (target, downloads) = (target?, live.downloads.clone().ok_or(Refusal::Internal)?);
        ctx.download = Some(Download::new(target, downloads).await.map_err(Refusal::Download)?);
        Ok(())
    }

    async fn identify_and_admit(
        &self,
        session: &Session,
        ctx: &mut RequestContext,
        connection: &Connection,
        envelope: &Envelope<'_>,
    ) -> std::result::Result<(), Refusal> {
        let (shared, live) = (&self.0, ctx.live.clone());
        ctx.operation = Some(envelope.operation.name);
        let group = envelope.group().map(|group| group.octets());
        let target = envelope.target.as_ref().map(Named::octets);
        if let Some(group) = &group {
            ctx.group_hash = Some(forward::group_hash(group));
            // For the log alone.
            ctx.group_pseudonym = shared.access_log.is_on().then(|| live.admission.pseudonym(group));
        }
        let dialect = ctx.dialect.ok_or(Refusal::Internal)?;
        let provider = identify(envelope, dialect, connection.identity.as_ref(), &live.provider, &live.peers)?;
        let subject = Subject {
            ip: connection.client.ip(),
            provider: provider.as_deref(),
            pattern: connection.identity.as_ref().and_then(|identity| identity.pattern_of(&envelope.sender)),
            operation: envelope.operation,
            group: group.as_deref(),
            member: envelope.member,
            target: target.as_deref(),
            cost: envelope.cost,
            octets: u32::try_from(ctx.charged).unwrap_or(u32::MAX),
            at: Instant::now(),
        };
        let admitted = self.limits_and_token(session, ctx, &subject).await;
        ctx.provider = provider;
        admitted
    }

    /// Limits before tokens: a token is dear to check. It is taken in hand before the limits are charged, and spent only
    /// once the request is on its way to the Delivery Service.
    async fn limits_and_token(
        &self,
        session: &Session,
        ctx: &mut RequestContext,
        subject: &Subject<'_>,
    ) -> std::result::Result<(), Refusal> {
        let admission = &ctx.live.admission.clone();
        ctx.tickets = admission.enter(subject).map_err(limited)?;
        let required = admission.policy().token_required(subject.operation, subject.ip);
        let (decision, mut tally) = admission.decide(subject, false, !required).await;
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
        admission.account(&tally);
        if admitted.is_ok() {
            ctx.admitted(admission, subject, &tally);
        }
        admitted
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
    ) -> std::result::Result<(), Refusal> {
        let headers = &session.req_header().headers;
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
        ctx.token = Some(token).filter(|_| topped_up || required);
        Ok(())
    }

    /// Answers a refusal.
    async fn refuse(&self, session: &mut Session, ctx: &mut RequestContext, refusal: &Refusal) -> Result<()> {
        let status = refusal.status();
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
        ctx.refused = Some((status, refusal.reason(), limits));
        let (response, document) = answer::refusal(refusal)?;
        ctx.broken |= refusal.closes();
        self.answer(session, ctx, response, document).await
    }

    async fn answer(
        &self,
        session: &mut Session,
        ctx: &RequestContext,
        response: ResponseHeader,
        body: Bytes,
    ) -> Result<()> {
        let how = answer::How {
            connection: ctx.connection.as_deref(),
            broken: ctx.broken,
            draining: self.0.draining.load(Ordering::Relaxed),
            within: ctx.live.timeouts.body_total,
        };
        answer::write(session, how, response, body).await
    }

    /// What the gateway answers from what it knows.
    async fn answer_it(
        &self,
        session: &mut Session,
        ctx: &mut RequestContext,
        of: fn(&Facts<'_>) -> dialect::Answer,
    ) -> Result<()> {
        ctx.decision = Decision::Answered;
        ctx.keep_token();
        let live = ctx.live.clone();
        let listener = ctx.connection.as_ref().map(|connection| connection.listener);
        let (Ok(authority), Some(listener)) = (answer::authority(session.req_header()), listener) else {
            return Error::e_explain(ErrorType::InternalError, "it was admitted");
        };
        let facts = Facts { authority, ds_domain: &live.provider.ds_domain, routes: live.routes(listener) };
        let said = of(&facts);
        let mut response = ResponseHeader::build(StatusCode::OK, Some(3))?;
        response.insert_header(header::CONTENT_TYPE, said.content_type)?;
        response.insert_header(header::CACHE_CONTROL, "max-age=3600")?;
        self.answer(session, ctx, response, Bytes::from(said.body)).await
    }
}

#[async_trait]
impl ProxyHttp for Gateway {
    // Pingora hands it on by value, again and again.
    type CTX = Box<RequestContext>;

    fn new_ctx(&self) -> Self::CTX {
        Box::new(RequestContext::new(&self.0))
    }

    fn init_downstream_modules(&self, _: &mut HttpModules) {
        // None: what the Delivery Service answers goes back octet for octet.
    }

    async fn early_request_filter(&self, session: &mut Session, ctx: &mut Self::CTX) -> Result<()> {
        ctx.begin(session);
        ctx.connection = head_is_in(session, &ctx.live);
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Self::CTX) -> Result<bool> {
        let admitted = self.admit(session, ctx).await;
        let took = ctx.began.elapsed().saturating_sub(ctx.waited);
        ctx.gateway_took = Some(took);
        match admitted {
            Ok(()) => match ctx.endpoint.map(|endpoint| endpoint.by) {
                Some(By::Gateway(of)) => {
                    self.answer_it(session, ctx, of).await?;
                    Ok(true)
                }
                _ => Ok(false),
            },
            Err(refusal) => {
                self.refuse(session, ctx, &refusal).await?;
                Ok(true)
            }
        }
    }

    async fn upstream_peer(&self, session: &mut Session, ctx: &mut Self::CTX) -> Result<Box<HttpPeer>> {
        // What was read so far is sent again from the start.
        ctx.body.rewind();
        ctx.permit = None;
        if let Some(download) = &mut ctx.download {
            if let Some(watch) = &ctx.watch {
                // It is given up before, with an answer if there was none.
                watch.until(Some(download.until() + Duration::from_secs(1)));
            }
            let Some(peer) = download.peer(&ctx.live.timeouts) else {
                ctx.pending = Some(Refusal::Download(Refused::Unreachable));
                return Error::e_explain(ErrorType::ConnectError, "it has no other address");
            };
            return Ok(Box::new(peer));
        }
        let settings = self.0.nodes.settings();
        let Some(node) = self.0.nodes.choose(ctx.group_hash, &ctx.tried) else {
            ctx.pending = Some(if ctx.tried.any() {
                Refusal::BadGateway
            } else {
                Refusal::NoNode { retry_after: settings.eject_for }
            });
            return Error::e_explain(ErrorType::ConnectError, "no node is to be had");
        };
        ctx.tried.note(&node);
        ctx.node = Some(node.clone());
        ctx.settings = Some(settings.clone());
        match node.enter(&settings).await {
            Ok(permit) => ctx.permit = permit,
            Err(full) => {
                ctx.pending = Some(Refusal::NodeBusy { retry_after: settings.queue_timeout });
                return Error::e_explain(ErrorType::ConnectError, format!("{full:?}"));
            }
        }
        ctx.given_at = Instant::now();
        let body_is_in = session.as_mut().is_body_done();
        Ok(Box::new(forward::peer(&node, &settings, &ctx.live.timeouts, &self.0.node_tls, body_is_in)?))
    }

    fn fail_to_connect(&self, _: &mut Session, _: &HttpPeer, ctx: &mut Self::CTX, mut e: Box<Error>) -> Box<Error> {
        if let Some(download) = &ctx.download {
            e.set_retry(download.has_another() && !forward::is_of_this_process(&e));
            return e;
        }
        let Some(node) = ctx.node.take() else { return e };
        if forward::is_refusal(&e)
            && let Some(settings) = &ctx.settings
        {
            node.refused(settings, ctx.given_at);
        }
        tracing::warn!(node = %node.label(), "cannot connect to a Delivery Service node: {e}");
        // Nothing was sent: the next node may have it. Where this process has no descriptor or port left, none is at fault, and
        // none would do better.
        e.set_retry(!forward::is_of_this_process(&e));
        e
    }

    async fn connected_to_upstream(
        &self,
        session: &mut Session,
        reused: bool,
        _: &HttpPeer,
        _: std::os::unix::io::RawFd,
        _: Option<&Digest>,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        // One that is kept says nothing of whether it would make another.
        if let Some(node) = ctx.node.as_ref().filter(|_| !reused) {
            node.accepted();
        }
        ctx.forwarded_at = Some(Instant::now());
        if !session.as_mut().is_body_done() {
            ctx.await_body();
        }
        Ok(())
    }

    fn error_while_proxy(
        &self,
        _: &HttpPeer,
        session: &mut Session,
        mut e: Box<Error>,
        ctx: &mut Self::CTX,
        reused: bool,
    ) -> Box<Error> {
        if let Some(download) = &mut ctx.download {
            // To ask for it again does no harm, as long as nothing of it has passed; and is done once.
            let again = (reused || forward::was_left_untouched(&e))
                && status_written(session).is_none()
                && !std::mem::replace(&mut ctx.resent, true);
            if again {
                download.again();
            }
            e.set_retry(again);
            return e;
        }
        // Otherwise the Delivery Service may have begun to process it.
        let again = forward::was_left_untouched(&e)
            && status_written(session).is_none()
            && !session.as_ref().retry_buffer_truncated();
        if again {
            ctx.unkeep_token();
        } else if forward::is_a_failure(&e) && status_written(session).is_none()
            && ctx.ds_took.is_none()
            // Else it is the client that keeps everybody waiting.
            && session.as_mut().is_body_done()
        {
            ctx.failed();
        }
        // Once to the same node, on another connection; if it will not have it then, to the next.
        if again
            && !std::mem::replace(&mut ctx.resent, true)
            && let Some(node) = &ctx.node
        {
            ctx.tried.forget(node);
        }
        e.set_retry(again);
        e
    }

    async fn request_body_filter(
        &self,
        _: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        match &ctx.watch {
            // A download's deadline is its answer's.
            _ if ctx.download.is_some() => {}
            Some(watch) if end => watch.until(None),
            Some(_) => ctx.await_body(),
            None => {}
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
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        if let Some(download) = &ctx.download {
            download.request(request)?;
            ctx.keep_token();
            return Ok(());
        }
        let (Some(endpoint), Some(path)) = (ctx.endpoint, ctx.path.take()) else {
            return Error::e_explain(ErrorType::InternalError, "no endpoint");
        };
        let connection = ctx.connection.as_deref();
        let learned = Learned {
            client: connection.map(|c| c.client.ip()),
            provider: ctx.provider.as_deref(),
            chain: connection.map_or(&[], |c| &c.chain),
            tls: connection.and_then(|c| c.tls.as_deref()),
            id: &ctx.id,
            trace: &ctx.trace,
        };
        let of = fields::Of { endpoint, keeps_from: ctx.dialect.is_some_and(|dialect| dialect.names_sender_in_from) };
        fields::set(request, path.clone(), of, &ctx.live.fields, &learned, ctx.live.privacy_pass.is_some())?;
        // It may be sent to another node.
        ctx.path = Some(path);
        // The next thing is to write to the node.
        ctx.keep_token();
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        if let Some(download) = &mut ctx.download
            && let Err(refused) = download.response(response)
        {
            ctx.pending = Some(Refusal::Download(refused));
            return Error::e_explain(ErrorType::InvalidHTTPHeader, refused.to_string()).map_err(Error::into_up);
        }
        if response.status.is_informational() {
            return Ok(());
        }
        ctx.ds_took = ctx.forwarded_at.map(|at| at.elapsed());
        if let Some(node) = &ctx.node {
            node.answered();
        }
        ctx.decision = Decision::Forwarded;
        ctx.status = response.status.as_u16();
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
        body: &mut Option<Bytes>,
        end: bool,
        ctx: &mut Self::CTX,
    ) -> Result<Option<Duration>> {
        let octets = body.as_ref().map_or(0, Bytes::len);
        if let Some(download) = &mut ctx.download {
            download.pass(octets).map_err(|refused| {
                ctx.pending = Some(Refusal::Download(refused));
                Error::explain(ErrorType::ReadError, refused.to_string()).into_up()
            })?;
        }
        ctx.body_out += octets;
        ctx.answered |= end;
        Ok(None)
    }

    fn upstream_response_trailer_filter(
        &self,
        _: &mut Session,
        trailers: &mut HeaderMap,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        if ctx.download.is_some() {
            trailers.clear();
        }
        Ok(())
    }

    async fn fail_to_proxy(&self, session: &mut Session, e: &Error, ctx: &mut Self::CTX) -> FailToProxy {
        let downstream = *e.esource() == ErrorSource::Downstream;
        let unread = matches!(e.etype(), ErrorType::WriteError | ErrorType::WriteTimedout);
        let reset = matches!(e.etype(), ErrorType::ConnectionClosed | ErrorType::H2Error)
            || e.root_cause().downcast_ref::<h2::Error>().is_some();
        if ctx.answered && !(downstream && unread) {
            // The whole answer is out; what is missing is the rest of a body that nobody needs.
            return FailToProxy { error_code: 0, can_reuse_downstream: false };
        }
        // A client that is gone, or that sends more while its request is with the Delivery Service: that is not said to be
        // no request, for it may well be done.
        let after_body = ctx.forwarded_at.is_some() && session.as_mut().is_body_done();
        if downstream && ctx.pending.is_none() && (unread || reset || after_body) {
            ctx.decision = Decision::Aborted;
            return FailToProxy { error_code: 0, can_reuse_downstream: false };
        }
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
            }
            .of_a_download(ctx.download.is_some()),
            (None, ErrorSource::Downstream) => match e.etype() {
                ErrorType::ReadTimedout => Refusal::TooSlow,
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
            // Pingora ends the connection after this: its client is told so.
            session.set_keepalive(None);
            let _ = self.refuse(session, ctx, &refusal).await;
        }
        FailToProxy { error_code: status, can_reuse_downstream: false }
    }

    fn suppress_error_log(&self, _: &Session, _: &Self::CTX, _: &Error) -> bool {
        // The access log says it, and a stranger cannot fill a disk with it.
        true
    }

    async fn logging(&self, session: &mut Session, _: Option<&Error>, ctx: &mut Self::CTX) {
        ctx.account(session);
    }
}
