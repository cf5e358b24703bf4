//! Account: what is kept of a request while it is under way, and what is said of it when it has ended.

use super::download::Download;
use super::fields::{RequestId, Trace};
use super::live::Live;
use super::session::Session;
use super::stream::Connection;
use super::{Shared, exchange};
use crate::admission::{Admission, Owing, Subject, Tally, Tickets};
use crate::dialect::{Dialect, Endpoint};
use crate::privacypass::Reservation;
use crate::problem::Refusal;
use crate::telemetry::{Decision, Line, Metrics};
use crate::upstream::{Member, Permit, Settings, Tried};
use http::StatusCode;
use http::uri::PathAndQuery;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How much later than it must have ended a download is dropped: before that it is refused, in the words for that.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What is kept of a request while it is under way. What few have is in a place of its own.
pub(super) struct RequestContext {
    pub(super) began: Instant,
    pub(super) id: RequestId,
    pub(super) trace: Trace,
    /// The configuration that it began with holds to its end.
    pub(super) live: Arc<Live>,
    pub(super) connection: Arc<Connection>,
    pub(super) endpoint: Option<&'static Endpoint>,
    pub(super) dialect: Option<&'static Dialect>,
    /// What the Delivery Service is asked at.
    pub(super) path: Option<PathAndQuery>,
    /// What is fetched, where it is not the Delivery Service that answers.
    pub(super) download: Option<Box<Download>>,
    pub(super) operation: Option<&'static str>,
    pub(super) provider: Option<String>,
    /// Of the group, for choosing its node: the same on every gateway and after every restart.
    pub(super) group_hash: Option<u128>,
    pub(super) group_pseudonym: Option<u128>,
    /// Time spent waiting for the client's body before the decision.
    pub(super) waited: Duration,
    pub(super) gateway_took: Option<Duration>,
    /// When it was decided, for whom the time of then is good enough: once.
    pub(super) decided_at: Option<Instant>,
    pub(super) forwarded_at: Option<Instant>,
    pub(super) ds_took: Option<Duration>,
    pub(super) tried: Tried,
    /// When it was given to its node.
    pub(super) given_at: Instant,
    pub(super) node: Option<Arc<Member>>,
    /// What holds for its node.
    pub(super) settings: Option<Arc<Settings>>,
    /// Its place among the requests of the node.
    pub(super) permit: Option<Permit>,
    /// Limits of concurrency count it for so long.
    pub(super) tickets: Tickets,
    /// Limits have been charged for so many octets of its body.
    pub(super) charged: u64,
    /// Its body's length is not known before it is in.
    pub(super) owes: bool,
    owing: Option<Box<(Arc<Admission>, Owing)>>,
    /// Its token, in hand until it ends.
    pub(super) token: Option<Box<Reservation>>,
    used_token: bool,
    pub(super) decision: Decision,
    /// What follows on the connection cannot be told from this request: it ends with the answer.
    pub(super) broken: bool,
    pub(super) refused: Option<(StatusCode, &'static str, Vec<String>)>,
    /// An untouched request has been sent again to the node that left it so.
    pub(super) resent: bool,
    pub(super) http: &'static str,
    pub(super) method: &'static str,
    pub(super) status: u16,
    /// Octets of its body that came, and of the answer's that went.
    octets: (u64, u64),
    pub(super) shared: Arc<Shared>,
}

impl Drop for RequestContext {
    fn drop(&mut self) {
        // Given back before it is not under way any more: the process may end then.
        self.token = None;
        self.say();
        self.shared.metrics.in_flight.dec();
    }
}

impl RequestContext {
    /// A request whose head is in.
    pub(super) fn new(shared: &Arc<Shared>, session: &Session) -> Self {
        shared.metrics.in_flight.inc();
        let began = session.began;
        Self {
            began,
            id: RequestId::new(),
            trace: Trace::of(&session.head.headers),
            live: shared.live.load_full(),
            permit: None,
            settings: None,
            connection: session.connection.clone(),
            endpoint: None,
            dialect: None,
            path: None,
            download: None,
            operation: None,
            provider: None,
            group_hash: None,
            group_pseudonym: None,
            waited: Duration::ZERO,
            gateway_took: None,
            decided_at: None,
            forwarded_at: None,
            ds_took: None,
            tried: Tried::default(),
            given_at: began,
            node: None,
            tickets: Tickets::new(),
            charged: 0,
            owes: false,
            owing: None,
            token: None,
            used_token: false,
            decision: Decision::Aborted,
            broken: false,
            refused: None,
            shared: shared.clone(),
            resent: false,
            http: session.http(),
            method: method_label(&session.head.method),
            status: 0,
            octets: (0, 0),
        }
    }

    /// When limits are asked: it began a moment ago, unless its body was waited for.
    pub(super) fn now(&self) -> Instant {
        if self.waited.is_zero() { self.began } else { Instant::now() }
    }

    /// Notes what limits have said: `admitted` is what came of it.
    pub(super) fn account(
        &mut self,
        admission: &Arc<Admission>,
        subject: &Subject<'_>,
        tally: &Tally,
        admitted: Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        admission.account(tally);
        if admitted.is_ok() && self.owes {
            let owing = Some(admission.owing(subject, tally)).filter(|owing| !owing.is_empty());
            self.owing = owing.map(|owing| Box::new((admission.clone(), owing)));
        }
        admitted
    }

    /// From now on the Delivery Service may have begun to process it: its token is spent.
    pub(super) fn keep_token(&mut self) {
        if let Some(token) = &mut self.token {
            token.keep();
            self.used_token = true;
        }
    }

    /// The Delivery Service says that it has not.
    pub(super) fn unkeep_token(&mut self) {
        if let Some(token) = &mut self.token {
            token.unkeep();
            self.used_token = false;
        }
    }

    /// Its node took it and did not answer.
    pub(super) fn failed(&self) {
        if let (Some(node), Some(settings)) = (&self.node, &self.settings) {
            node.failed(settings, self.given_at);
        }
    }

    /// Says what became of it, in metrics and in the access log.
    fn say(&mut self) {
        let (body_in, body_out) = self.octets;
        if let Some(mut owing) = self.owing.take() {
            let (admission, owing) = &mut *owing;
            admission.owe(owing, body_in.saturating_sub(self.charged));
        }
        let limits = self.refused.as_mut().map(|(_, _, limits)| std::mem::take(limits)).unwrap_or_default();
        let shared = &self.shared;
        let reason = self.refused.as_ref().map(|(_, reason, _)| *reason);
        let provider = self.provider.as_deref().map(|p| Metrics::provider_label(&self.live.peers.named, p));
        shared.metrics.request(self.endpoint, self.decision, reason.unwrap_or_default(), provider);
        if let Some(endpoint) = self.endpoint {
            if let Some(took) = self.gateway_took {
                shared.metrics.gateway_took(endpoint, took);
            }
            if let Some(took) = self.ds_took {
                shared.metrics.ds_took(endpoint, took);
            }
        }
        if !shared.access_log.is_on() {
            return;
        }
        let micros = |took: Duration| u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        shared.access_log.write(&Line {
            time: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true),
            request_id: self.id.as_str(),
            egress: false,
            client: self.connection.client.ip().to_string(),
            provider: self.provider.as_deref(),
            peer: self.connection.identity.as_ref().and_then(|c| c.dns_names.first()).map(String::as_str),
            http: self.http,
            method: self.method,
            endpoint: self.endpoint.map(|e| e.name),
            operation: self.operation,
            group: self.group_pseudonym.map(|hash| format!("{:016x}", hash as u64)),
            status: self.status,
            decision: self.decision.label(),
            reason,
            limits,
            token: self.used_token,
            body_in: usize::try_from(body_in).unwrap_or(usize::MAX),
            body_out: usize::try_from(body_out).unwrap_or(usize::MAX),
            gateway_us: self.gateway_took.map(micros).unwrap_or_default(),
            ds_us: self.ds_took.map(micros),
            node: self.node.as_ref().map(|node| node.label()).or(self.download.as_ref().map(|of| of.host())),
            trace_id: Some(self.trace.id(self.id.as_str())),
        });
    }
}

impl exchange::Ctx for RequestContext {
    fn broken(&self) -> bool {
        self.broken
    }

    fn until(&self) -> Option<Instant> {
        self.download.as_ref().map(|download| download.until() + LAST_WORDS)
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
        self.decision = Decision::Aborted;
        if let Some(refusal) = refusal {
            self.refused = Some((refusal.status(), refusal.reason(), vec![]));
        }
    }
}

/// A method is the client's word: the log has those of HTTP, and "other".
pub(super) fn method_label(method: &http::Method) -> &'static str {
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
