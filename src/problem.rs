//! Every refusal of the gateway, in one place: its status, its problem type (RFC 9457), its reason in metrics and log,
//! and its header fields. Nothing of the Delivery Service, of other senders or of the configuration is in one.

use crate::admission::Unit;
use crate::dialect::NoRoute;
use crate::download;
use crate::wire;
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde_json::json;
use std::time::Duration;

/// What the problem types of this gateway begin with; `docs/refusals.md` lists them.
pub const TYPE_PREFIX: &str = "tag:moh-gateway.example,2026:problem:";

/// The problem type of an exceeded quota (draft-ietf-httpapi-ratelimit-headers-11 §5.1).
pub const QUOTA_EXCEEDED: &str = "https://iana.org/assignments/http-problem-types#quota-exceeded";

/// The problem type of limits that cannot be asked for the moment (the same draft, §5.2).
pub const REDUCED_CAPACITY: &str = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity";

/// A limit that a request exceeds, as far as its sender may know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violated {
    /// The limit's name.
    pub policy: String,
    /// As much as it lets through at once.
    pub quota: u64,
    /// Of what.
    pub unit: Unit,
    /// Seconds in which all of that comes back, where it comes back with time.
    pub window: Option<u64>,
    /// What is left of it.
    pub left: u64,
    /// Whose quota it is: the same for the same, and opaque.
    pub partition: u64,
    /// When the request would pass. None: never, it costs more than the burst.
    pub retry_after: Option<Duration>,
}

/// What is wrong with a token, or that there is none (RFC 9577).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenProblem {
    /// None came.
    Missing,
    /// The credential cannot be read, or there are two.
    Malformed,
    /// Of a type that is not taken.
    UnknownType,
    /// Made with a key that is not trusted here.
    UnknownKey,
    /// Made for another origin or context.
    WrongChallenge,
    /// Made for an epoch that is over.
    Expired,
    /// The authenticator does not verify.
    BadAuthenticator,
    /// Used before.
    Spent,
    /// The memory for spent tokens is full: nothing can be redeemed without forgetting.
    StoreFull,
    /// What is spent cannot be asked or noted.
    StoreUnavailable,
    /// Too many tokens wait to be verified.
    Busy,
    /// No issuer's key is known yet, so that nothing can be asked for.
    NoKey,
}

impl TokenProblem {
    /// The reason, in metrics, logs and the problem type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Missing => "token-missing",
            Self::Malformed => "token-malformed",
            Self::UnknownType => "token-unknown-type",
            Self::UnknownKey => "token-unknown-key",
            Self::WrongChallenge => "token-wrong-challenge",
            Self::Expired => "token-expired",
            Self::BadAuthenticator => "token-bad",
            Self::Spent => "token-spent",
            Self::StoreFull => "token-store-full",
            Self::StoreUnavailable => "token-store-unavailable",
            Self::Busy => "token-busy",
            Self::NoKey => "token-no-key",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Missing => "A Privacy Pass token is required",
            Self::Malformed => "The PrivateToken credential cannot be read",
            Self::UnknownType => "Tokens of this type are not taken here",
            Self::UnknownKey => "The token was made with a key that is not trusted here",
            Self::WrongChallenge => "The token was made for another challenge",
            Self::Expired => "The token's challenge is no longer accepted",
            Self::BadAuthenticator => "The token does not verify",
            Self::Spent => "The token was spent before",
            Self::StoreFull | Self::StoreUnavailable | Self::Busy | Self::NoKey => {
                "No token can be redeemed at the moment"
            }
        }
    }

    /// Not the token's fault, nor its client's: when to try again.
    pub fn retry_after(self) -> Option<Duration> {
        match self {
            Self::StoreFull => Some(Duration::from_secs(60)),
            Self::NoKey => Some(Duration::from_secs(5)),
            Self::StoreUnavailable | Self::Busy => Some(Duration::from_secs(1)),
            _ => None,
        }
    }
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The request head is not HTTP, or its fields are too many or contradict each other.
    BadHttp(&'static str),
    /// No endpoint has this path.
    UnknownPath,
    /// The endpoint has another method.
    WrongMethod {
        /// For `Allow`.
        allow: &'static http::Method,
    },
    /// The body is of another type than the endpoint's, or coded.
    WrongContentType {
        /// For `Accept-Post`; none where any type will do.
        accept: Option<&'static str>,
    },
    /// The body is not this endpoint's, or ended before the reader had its fields.
    Malformed(wire::Error),
    /// Over the endpoint's bound, or not decided within what may be held.
    TooLarge,
    /// The head or the body came too slowly.
    TooSlow,
    /// Host, SNI or recipient is none of ours.
    Misdirected(&'static str),
    /// The sender is not the client certificate's provider.
    SenderMismatch,
    /// The sender is not on the list of peers.
    PeerNotAllowed,
    /// The sender's certificate has none of the keys that are known of this provider.
    WrongKey,
    /// Limits are exceeded.
    Limited {
        /// Which, by the limits' own names.
        violated: Vec<Violated>,
        /// `WWW-Authenticate`, where a token would help.
        challenge: Option<HeaderValue>,
    },
    /// The store of these limits does not answer, and without it they let nobody pass.
    LimitsUnavailable {
        /// Their names.
        policies: Vec<String>,
    },
    /// A token is missing or no good.
    Token {
        /// What is wrong.
        problem: TokenProblem,
        /// `WWW-Authenticate`.
        challenge: Option<HeaderValue>,
    },
    /// No Delivery Service node is to be had.
    NoNode {
        /// When one may be.
        retry_after: Duration,
    },
    /// The Delivery Service node has as many requests as it may have, and so has its queue.
    NodeBusy {
        /// When to try again.
        retry_after: Duration,
    },
    /// More is held of bodies that are not whole yet than may be.
    TooMuchHeld {
        /// When to try again.
        retry_after: Duration,
    },
    /// There is no download.
    Download(download::Refused),
    /// The Delivery Service cannot be reached, or its answer is no HTTP.
    BadGateway,
    /// The Delivery Service does not answer in time.
    GatewayTimeout,
    /// The other provider has said to wait, and this provider's node asks before that.
    ToldToWait {
        /// How long.
        retry_after: Duration,
    },
    /// The other provider's Delivery Service cannot be found.
    Undiscovered(&'static str),
    /// A fault of the gateway itself.
    Internal,
}

impl From<NoRoute> for Refusal {
    fn from(no: NoRoute) -> Self {
        match no {
            NoRoute::UnknownPath => Self::UnknownPath,
            NoRoute::WrongMethod { allow } => Self::WrongMethod { allow },
            NoRoute::Ambiguous(error) => Self::Malformed(error),
        }
    }
}

impl Refusal {
    /// What it is where the other side is a download's and not the Delivery Service.
    pub fn of_a_download(self, is_one: bool) -> Self {
        match self {
            Self::BadGateway if is_one => Self::Download(download::Refused::Unreachable),
            Self::GatewayTimeout if is_one => Self::Download(download::Refused::TooSlow),
            other => other,
        }
    }

    /// The status (design, "Refusals").
    pub fn status(&self) -> StatusCode {
        match self {
            Self::BadHttp(_) | Self::Malformed(_) => StatusCode::BAD_REQUEST,
            Self::UnknownPath => StatusCode::NOT_FOUND,
            Self::WrongMethod { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::WrongContentType { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::Misdirected(_) => StatusCode::MISDIRECTED_REQUEST,
            Self::SenderMismatch | Self::PeerNotAllowed | Self::WrongKey => StatusCode::FORBIDDEN,
            Self::Limited { .. } | Self::ToldToWait { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::NoNode { .. } | Self::NodeBusy { .. } | Self::TooMuchHeld { .. } | Self::LimitsUnavailable { .. } => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Token { problem, .. } if problem.retry_after().is_some() => StatusCode::SERVICE_UNAVAILABLE,
            Self::Token { .. } => StatusCode::UNAUTHORIZED,
            Self::Download(refused) => refused.status(),
            Self::BadGateway | Self::Undiscovered(_) => StatusCode::BAD_GATEWAY,
            Self::GatewayTimeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The reason in metrics and log: one of [`REASONS`].
    pub fn reason(&self) -> &'static str {
        match self {
            Self::BadHttp(_) => "bad-http",
            Self::UnknownPath => "unknown-path",
            Self::WrongMethod { .. } => "wrong-method",
            Self::WrongContentType { .. } => "wrong-content-type",
            Self::Malformed(_) => "malformed",
            Self::TooLarge => "too-large",
            Self::TooSlow => "too-slow",
            Self::Misdirected(_) => "misdirected",
            Self::SenderMismatch => "sender-mismatch",
            Self::PeerNotAllowed => "peer-not-allowed",
            Self::WrongKey => "wrong-key",
            Self::Limited { .. } => "limited",
            Self::LimitsUnavailable { .. } => "limits-unavailable",
            Self::Token { problem, .. } => problem.name(),
            Self::NoNode { .. } => "no-node",
            Self::NodeBusy { .. } => "node-busy",
            Self::TooMuchHeld { .. } => "too-much-held",
            Self::Download(refused) => refused.reason(),
            Self::BadGateway => "bad-gateway",
            Self::GatewayTimeout => "gateway-timeout",
            Self::ToldToWait { .. } => "told-to-wait",
            Self::Undiscovered(_) => "undiscovered",
            Self::Internal => "internal",
        }
    }

    fn title(&self) -> &'static str {
        match self {
            Self::BadHttp(_) => "The request is not acceptable HTTP",
            Self::UnknownPath => "Nothing is served at this path",
            Self::WrongMethod { .. } => "The endpoint has another method",
            Self::WrongContentType { .. } => "The body is of another type than is taken here, or coded",
            Self::Malformed(_) => "The request is malformed",
            Self::TooLarge => "The body is too large",
            Self::TooSlow => "The request came too slowly",
            Self::Misdirected(_) => "The request is not for this provider",
            Self::SenderMismatch => "The sender is not the provider of the client certificate",
            Self::PeerNotAllowed => "The sender may not send here",
            Self::WrongKey => "The client certificate has no key that is known of this sender",
            Self::Limited { .. } => "A limit is exceeded",
            Self::LimitsUnavailable { .. } => "Limits cannot be asked at the moment",
            Self::Token { problem, .. } => problem.title(),
            Self::NoNode { .. } => "The Delivery Service is not available",
            Self::NodeBusy { .. } => "The Delivery Service has too many requests under way",
            Self::TooMuchHeld { .. } => "Too many bodies are not whole yet",
            Self::Download(_) => "There is no download of this",
            Self::BadGateway => "The Delivery Service could not be reached",
            Self::GatewayTimeout => "The Delivery Service did not answer in time",
            Self::ToldToWait { .. } => "The other provider has said to wait",
            Self::Undiscovered(_) => "The other provider's Delivery Service cannot be found",
            Self::Internal => "The gateway failed",
        }
    }

    fn type_uri(&self) -> String {
        match self {
            Self::Limited { .. } => QUOTA_EXCEEDED.to_owned(),
            Self::LimitsUnavailable { .. } => REDUCED_CAPACITY.to_owned(),
            other => format!("{TYPE_PREFIX}{}", other.reason()),
        }
    }

    /// The problem document (`application/problem+json`).
    pub fn document(&self) -> Vec<u8> {
        let mut document = json!({
            "type": self.type_uri(),
            "title": self.title(),
            "status": self.status().as_u16(),
        });
        if let Some(fields) = document.as_object_mut() {
            match self {
                Self::BadHttp(detail) | Self::Undiscovered(detail) => {
                    fields.insert("detail".into(), json!(detail));
                }
                Self::Malformed(error) => {
                    let (field, offset) = error.place();
                    fields.insert("detail".into(), json!(error.to_string()));
                    fields.insert("field".into(), json!(field));
                    fields.insert("offset".into(), json!(offset));
                }
                Self::Download(refused) => {
                    fields.insert("detail".into(), json!(refused.to_string()));
                }
                Self::Misdirected(what) => {
                    fields.insert("detail".into(), json!(format!("{what} is not one of this provider's")));
                }
                Self::Limited { violated, .. } => {
                    let names: Vec<_> = violated.iter().map(|v| v.policy.as_str()).collect();
                    fields.insert("violated-policies".into(), json!(names));
                }
                Self::LimitsUnavailable { policies } => {
                    fields.insert("violated-policies".into(), json!(policies));
                }
                _ => {}
            }
        }
        document.to_string().into_bytes()
    }

    /// The header fields of this refusal, beside content type and length.
    pub fn headers(&self) -> Vec<(HeaderName, HeaderValue)> {
        let mut headers = vec![(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
        match self {
            Self::WrongMethod { allow } => {
                if let Ok(value) = HeaderValue::from_str(allow.as_str()) {
                    headers.push((header::ALLOW, value));
                }
            }
            Self::WrongContentType { accept: Some(accept) } => {
                headers.push((HeaderName::from_static("accept-post"), HeaderValue::from_static(accept)));
            }
            Self::Limited { violated, challenge } => {
                headers.extend(rate_limit_fields(violated));
                // All of them must pass: the one that takes longest decides. One that never passes gives no hope.
                let wait = violated
                    .iter()
                    .map(|v| v.retry_after)
                    .try_fold(Duration::ZERO, |longest, one| one.map(|one| longest.max(one)));
                if let Some(wait) = wait {
                    headers.push((header::RETRY_AFTER, HeaderValue::from(seconds_up(wait).max(1))));
                }
                headers.extend(challenge.clone().map(|value| (header::WWW_AUTHENTICATE, value)));
            }
            Self::Token { problem, challenge } => {
                if let Some(wait) = problem.retry_after() {
                    headers.push((header::RETRY_AFTER, HeaderValue::from(wait.as_secs())));
                } else {
                    headers.extend(challenge.clone().map(|value| (header::WWW_AUTHENTICATE, value)));
                }
            }
            Self::LimitsUnavailable { .. } => headers.push((header::RETRY_AFTER, HeaderValue::from(1u64))),
            Self::NoNode { retry_after }
            | Self::NodeBusy { retry_after }
            | Self::TooMuchHeld { retry_after }
            | Self::ToldToWait { retry_after } => {
                headers.push((header::RETRY_AFTER, HeaderValue::from(seconds_up(*retry_after).max(1))));
            }
            _ => {}
        }
        headers
    }

    /// Whether the connection ends with this refusal: the rest of what was sent on it cannot be trusted to be a request.
    pub fn closes(&self) -> bool {
        matches!(self, Self::BadHttp(_) | Self::TooLarge | Self::TooSlow)
    }
}

/// Every reason a refusal may have, for metrics that exist before the first refusal.
pub const REASONS: &[&str] = &[
    "bad-http",
    "unknown-path",
    "wrong-method",
    "wrong-content-type",
    "malformed",
    "too-large",
    "too-slow",
    "misdirected",
    "sender-mismatch",
    "peer-not-allowed",
    "wrong-key",
    "limited",
    "limits-unavailable",
    "token-missing",
    "token-malformed",
    "token-unknown-type",
    "token-unknown-key",
    "token-wrong-challenge",
    "token-expired",
    "token-bad",
    "token-spent",
    "token-store-full",
    "token-store-unavailable",
    "token-busy",
    "token-no-key",
    "no-node",
    "node-busy",
    "too-much-held",
    "download-not-https",
    "download-no-url",
    "download-not-listed",
    "download-private-address",
    "download-unresolved",
    "download-too-large",
    "download-redirected",
    "download-unreachable",
    "download-bad-answer",
    "download-too-slow",
    "bad-gateway",
    "gateway-timeout",
    "told-to-wait",
    "undiscovered",
    "internal",
];

/// Whole seconds, rounded up: who waits as long as told is not told to wait again.
pub fn seconds_up(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

/// `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-11 §3, §4): lists of strings with parameters. A
/// partition key is a keyed hash of whose quota it is.
fn rate_limit_fields(violated: &[Violated]) -> Vec<(HeaderName, HeaderValue)> {
    use sfv::{Integer, KeyRef, ListSerializer, StringRef};
    let mut policies = ListSerializer::new();
    let mut limits = ListSerializer::new();
    let integer = |n: u64| Integer::try_from(n).unwrap_or(Integer::MAX);
    let key = |name: &'static str| KeyRef::constant(name);
    for v in violated {
        let Ok(name) = StringRef::from_str(&v.policy) else { continue };
        let partition = v.partition.to_be_bytes();
        let mut policy = policies.bare_item(name).parameter(key("q"), integer(v.quota));
        if let Some(unit) = v.unit.name().and_then(|unit| StringRef::from_str(unit).ok()) {
            policy = policy.parameter(key("qu"), unit);
        }
        if let Some(window) = v.window {
            policy = policy.parameter(key("w"), integer(window));
        }
        let _ = policy.parameter(key("pk"), &partition[..]);
        let mut limit = limits.bare_item(name).parameter(key("r"), integer(v.left));
        if let Some(wait) = v.retry_after {
            limit = limit.parameter(key("t"), integer(seconds_up(wait)));
        }
        let _ = limit.parameter(key("pk"), &partition[..]);
    }
    [("ratelimit-policy", policies.finish()), ("ratelimit", limits.finish())]
        .into_iter()
        .filter_map(|(name, value)| Some((HeaderName::from_static(name), HeaderValue::from_str(&value?).ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(waits: &[Option<Duration>]) -> Refusal {
        let violated = waits
            .iter()
            .enumerate()
            .map(|(i, wait)| Violated {
                policy: format!("p{i}"),
                quota: 10,
                unit: if i == 0 { Unit::Requests } else { Unit::Octets },
                window: Some(60),
                left: i as u64,
                partition: 1 + i as u64,
                retry_after: *wait,
            })
            .collect();
        Refusal::Limited { violated, challenge: None }
    }

    fn get(refusal: &Refusal, name: &str) -> Option<String> {
        let headers = refusal.headers();
        headers.iter().find(|(n, _)| n.as_str() == name).map(|(_, v)| v.to_str().unwrap().to_owned())
    }

    #[test]
    fn retry_after_is_the_longest_wait_rounded_up() {
        let refusal = limited(&[Some(Duration::from_millis(1001)), Some(Duration::from_millis(200))]);
        assert_eq!(get(&refusal, "retry-after").unwrap(), "2");
        assert_eq!(
            get(&refusal, "ratelimit-policy").unwrap(),
            r#""p0";q=10;w=60;pk=:AAAAAAAAAAE=:, "p1";q=10;qu="content-bytes";w=60;pk=:AAAAAAAAAAI=:"#
        );
        assert_eq!(
            get(&refusal, "ratelimit").unwrap(),
            r#""p0";r=0;t=2;pk=:AAAAAAAAAAE=:, "p1";r=1;t=1;pk=:AAAAAAAAAAI=:"#
        );
    }

    #[test]
    fn what_never_passes_gives_no_retry_after() {
        let refusal = limited(&[Some(Duration::from_secs(1)), None]);
        assert_eq!(get(&refusal, "retry-after"), None);
    }

    #[test]
    fn documents_name_the_field_and_its_offset() {
        let error = wire::Error::Malformed { field: "version", offset: 0, reason: "it is not mimi10" };
        let document: serde_json::Value = serde_json::from_slice(&Refusal::Malformed(error).document()).unwrap();
        assert_eq!(document["field"], "version");
        assert_eq!(document["offset"], 0);
        assert_eq!(document["status"], 400);
        assert_eq!(document["type"], format!("{TYPE_PREFIX}malformed"));
    }
}
