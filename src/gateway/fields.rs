//! What the Delivery Service learns of a request beside its body: from whom it is, by what channel, and its trace. The
//! operator names the fields; whatever comes in under these names, or under those that others are used to, is dropped, so
//! that only the gateway says such things.

use super::answer;
use crate::config::Fields;
use crate::dialect::Endpoint;
use crate::forward::Head;
use crate::http1::is_of_connection;
use crate::privacypass;
use crate::problem::Refusal;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use rustls::pki_types::CertificateDer;
use std::borrow::Cow;
use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};
use uuid::{NoContext, Timestamp, Uuid};

/// What is learnt.
#[derive(Debug, Clone, Copy)]
pub(super) struct Learned<'a> {
    /// The client's address, as [`forwarded_for`].
    pub(super) client: &'a str,
    /// The authenticated provider.
    pub(super) provider: Option<&'a str>,
    /// The client's certificate, and the rest of its chain.
    pub(super) chain: &'a [CertificateDer<'static>],
    /// What TLS was negotiated.
    pub(super) tls: Option<&'a str>,
    /// The request's ID.
    pub(super) id: &'a str,
    /// Its trace.
    pub(super) trace: &'a Trace,
}

/// `traceparent` (W3C Trace Context §3.2), version 00: the request's own, 55 octets of ASCII, where it is one that can be passed
/// on. Else one is begun here, whose trace ID is the request's ID.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Trace(Option<String>);

impl Trace {
    /// That of a request with these fields.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let mut came = headers.get_all("traceparent").iter();
        match (came.next(), came.next()) {
            (Some(one), None) => Self(one.to_str().ok().filter(|text| is_traceparent(text)).map(str::to_owned)),
            _ => Self(None),
        }
    }

    /// The trace's ID, 32 hexadecimal digits; `id` is the request's.
    pub(super) fn id<'a>(&'a self, id: &'a str) -> &'a str {
        self.0.as_ref().map_or(id, |theirs| theirs.get(3..35).unwrap_or_default())
    }

    /// The field.
    fn field(&self, id: &str) -> Cow<'_, str> {
        match &self.0 {
            Some(theirs) => Cow::Borrowed(theirs),
            // An ID is 32 hexadecimal digits, of which the last 16 are random. Nobody has said that it is sampled.
            None => Cow::Owned(["00-", id, "-", id.get(16..32).unwrap_or("0000000000000001"), "-00"].concat()),
        }
    }
}

/// An ID for a request: 32 hexadecimal digits, ordered by the millisecond (RFC 9562 §5.7).
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestId([u8; 32]);

impl RequestId {
    pub(super) fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Of one millisecond, none has to be after another: to count on within it is for all threads together.
        let now = Timestamp::from_unix(NoContext, now.as_secs(), now.subsec_nanos());
        let mut digits = [0; 32];
        Uuid::new_v7(now).simple().encode_lower(&mut digits);
        Self(digits)
    }

    pub(super) fn as_str(&self) -> &str {
        str::from_utf8(&self.0).unwrap_or_default()
    }
}

fn is_traceparent(text: &str) -> bool {
    let hex = |part: &str, digits: usize| {
        part.len() == digits && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let is_some = |part: &str| part.bytes().any(|b| b != b'0');
    let mut parts = text.split('-');
    let (Some(version), Some(trace), Some(parent), Some(flags), None) =
        (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    let fits = version == "00" && hex(trace, 32) && hex(parent, 16) && hex(flags, 2);
    fits && is_some(trace) && is_some(parent)
}

/// Whether a field from outside says what only the gateway may say. Underscores are hyphens to some servers behind.
pub(super) fn is_ours_to_say(name: &HeaderName, fields: &Fields) -> bool {
    const NAMES: &[&str] = &[
        "forwarded",
        "x-real-ip",
        "x-request-id",
        "client-cert",
        "client-cert-chain",
        "traceparent",
        "tracestate",
        "via",
        "expect",
        "upgrade",
        "http2-settings",
        "te",
        // What some servers behind take for another path or method than was checked.
        "x-original-url",
        "x-rewrite-url",
        "x-http-method",
        "x-http-method-override",
        "x-method-override",
    ];
    const PREFIXES: &[&str] = &["x-forwarded-", "x-moh-"];
    // What these begin with: most that come do not.
    let may_be =
        |name: &str| matches!(name.as_bytes().first(), Some(b'c' | b'e' | b'f' | b'h' | b't' | b'u' | b'v' | b'x'));
    let is = |name: &str| {
        (may_be(name) && (NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))))
            || fields.names().any(|ours| {
                let ours = ours.as_str();
                let same = |(a, b): (u8, u8)| a == b || (a == b'_' && b == b'-');
                ours.len() == name.len() && ours.bytes().zip(name.bytes()).all(same)
            })
    };
    match name.as_str() {
        with if with.contains('_') => is(&with.replace('_', "-")),
        without => is(without),
    }
}

/// From which address a request is, as RFC 7239 §6 has it: IPv6 in brackets, and quoted.
pub(super) fn forwarded_for(client: IpAddr) -> String {
    match client.to_canonical() {
        IpAddr::V4(ip) => format!("for={ip}"),
        IpAddr::V6(ip) => format!("for=\"[{ip}]\""),
    }
}

fn forwarded(client: &str, host: &str) -> String {
    // It is one of this provider's names, with a port or without: nothing that would end the quotes.
    if host.contains(['"', '\\']) {
        return [client, ";proto=https"].concat();
    }
    [client, ";host=\"", host, "\";proto=https"].concat()
}

/// A certificate as RFC 9440 §2.1 has it: a byte sequence of RFC 8941.
fn sequence(certificate: &CertificateDer<'_>) -> String {
    format!(":{}:", BASE64_STANDARD.encode(certificate))
}

/// What a request is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Of {
    pub(super) endpoint: &'static Endpoint,
    /// `From` names its sender, and is bound to it.
    pub(super) keeps_from: bool,
}

/// All values of a field. There are few fields: to look through them is quicker than to look one up.
pub(super) fn all<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a HeaderValue> {
    headers.iter().filter(move |(one, _)| *one == name).map(|(_, value)| value)
}

/// Fields that are of the connection, or of how a body is framed on it (RFC 9110 §7.6.1); and whom it is for, which is said anew.
fn is_of_the_connection(name: &HeaderName) -> bool {
    is_of_connection(name)
        || [header::HOST, header::CONTENT_LENGTH, header::PROXY_AUTHENTICATE].contains(name)
        || name == "http2-settings"
}

/// Of what came, the fields that go on: none of the connection's, and none that `is_dropped`.
pub(super) fn kept(
    came: &HeaderMap,
    is_dropped: impl Fn(&HeaderName, &HeaderValue) -> bool,
    more: usize,
) -> Vec<(HeaderName, HeaderValue)> {
    let mut kept = Vec::with_capacity(came.len() + more);
    let passing = came.iter().filter(|(name, value)| !is_of_the_connection(name) && !is_dropped(name, value));
    kept.extend(passing.map(|(name, value)| (name.clone(), value.clone())));
    kept
}

/// What the Delivery Service gets. Target and content type are written anew: it gets those that were checked, in one form, however
/// they came. Of the fields, what is not for outside to say is dropped, then who sends is said by us. A `PrivateToken` credential
/// was for us; other credentials are the Delivery Service's.
///
/// # Errors
/// The request names nobody, or what is known of it is in no form that a field can have.
pub(super) fn head(
    request: &Parts,
    path: PathAndQuery,
    of: Of,
    fields: &Fields,
    learned: &Learned<'_>,
    takes_tokens: bool,
) -> Result<Head, Refusal> {
    let authority = answer::authority(request)?.to_owned();
    let is_dropped = |name: &HeaderName, value: &HeaderValue| {
        // Nobody has looked at it.
        (*name == header::FROM && !of.keeps_from)
            || (*name == header::CONTENT_TYPE && of.endpoint.content_type.is_some())
            // What was for us.
            || (*name == header::AUTHORIZATION && takes_tokens && privacypass::is_private_token(value))
            || is_ours_to_say(name, fields)
    };
    let mut kept = kept(&request.headers, is_dropped, 6);
    if let Some(content_type) = of.endpoint.content_type {
        kept.push((header::CONTENT_TYPE, HeaderValue::from_static(content_type)));
    }
    let mut say = |name: &Option<HeaderName>, value: Option<Cow<'_, str>>| -> Result<(), Refusal> {
        let (Some(name), Some(value)) = (name, value) else { return Ok(()) };
        let value = match value {
            Cow::Borrowed(value) => HeaderValue::from_str(value),
            Cow::Owned(value) => HeaderValue::try_from(value),
        };
        let value = value.map_err(|_| Refusal::Internal)?;
        // Whatever came under this name is dropped.
        kept.push((name.clone(), value));
        Ok(())
    };
    if fields.forwarded.is_some() {
        say(&fields.forwarded, Some(forwarded(learned.client, &authority).into()))?;
    }
    say(&fields.provider, learned.provider.map(Cow::Borrowed))?;
    if fields.client_cert.is_some() {
        say(&fields.client_cert, learned.chain.first().map(|leaf| sequence(leaf).into()))?;
    }
    if let (Some(_), Some(rest @ [_, ..])) = (&fields.client_cert_chain, learned.chain.get(1..)) {
        let rest = rest.iter().map(sequence).collect::<Vec<_>>().join(", ");
        say(&fields.client_cert_chain, Some(rest.into()))?;
    }
    say(&fields.tls, learned.tls.map(Cow::Borrowed))?;
    say(&fields.request_id, Some(learned.id.into()))?;
    if fields.traceparent.is_some() {
        say(&fields.traceparent, Some(learned.trace.field(learned.id)))?;
    }
    Ok(Head { method: request.method.clone(), target: path, authority, fields: kept })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0190163d8694739b8fa1b2c3d4e5f601";

    fn fields() -> Fields {
        Fields {
            provider: Some(HeaderName::from_static("x-moh-provider")),
            forwarded: Some(header::FORWARDED),
            client_cert: None,
            client_cert_chain: None,
            tls: None,
            request_id: Some(HeaderName::from_static("x-request-id")),
            traceparent: Some(HeaderName::from_static("traceparent")),
        }
    }

    fn sent(fields: &Fields, learned: &Learned<'_>) -> Vec<String> {
        let mut request = http::Request::post("/group_operation").body(()).unwrap().into_parts().0;
        let mut add = |name: &str, value: &str| {
            request.headers.append(HeaderName::try_from(name).unwrap(), value.parse().unwrap());
        };
        for name in [
            "X-Forwarded-For",
            "x_forwarded_for",
            "Forwarded",
            "X-Moh-Provider",
            "x_moh_provider",
            "X-Real-IP",
            "Client-Cert",
            "X-Request-Id",
            "Traceparent",
            "Tracestate",
            "X-Operators-Own",
            "x_operators_own",
        ] {
            add(name, "forged");
        }
        add("Host", "ds.b.example");
        add("Authorization", "Bearer ds");
        add("Authorization", "PrivateToken token=\"x\"");
        add("X-Other", "kept");
        add("Keep-Alive", "timeout=5");
        add("Content-Length", "7");
        let endpoint = crate::dialect::endpoint("group_operation").unwrap();
        let of = Of { endpoint, keeps_from: false };
        let head = head(&request, PathAndQuery::from_static(endpoint.path), of, fields, learned, true).unwrap();
        assert_eq!((head.method.as_str(), head.authority.as_str()), ("POST", "ds.b.example"));
        assert!(
            !["keep-alive", "content-length", "host"].iter().any(|no| head.fields.iter().any(|(name, _)| name == no))
        );
        head.fields.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap())).collect()
    }

    #[test]
    fn only_the_gateway_says_who_sends() {
        let trace = Trace::of(&HeaderMap::new());
        let chain = [CertificateDer::from(vec![1, 2, 3]), CertificateDer::from(vec![4]), CertificateDer::from(vec![5])];
        let learned = Learned {
            client: &forwarded_for("2001:db8::1".parse().unwrap()),
            provider: Some("a.example"),
            chain: &chain,
            tls: Some("version=TLSv1.3"),
            id: ID,
            trace: &trace,
        };
        let own = Fields { tls: Some(HeaderName::from_static("x-operators-own")), ..fields() };
        let got = sent(&own, &learned);
        assert!(!got.iter().any(|f| f.contains("forged") || f.contains("PrivateToken")), "{got:?}");
        for expected in [
            "forwarded: for=\"[2001:db8::1]\";host=\"ds.b.example\";proto=https",
            "x-moh-provider: a.example",
            "x-operators-own: version=TLSv1.3",
            &format!("x-request-id: {ID}"),
            &format!("traceparent: 00-{ID}-8fa1b2c3d4e5f601-00"),
            "authorization: Bearer ds",
            "x-other: kept",
        ] {
            assert!(got.iter().any(|f| f == expected), "{expected} in {got:?}");
        }
        assert!(!got.iter().any(|f| f.starts_with("client-cert")), "it is not asked for: {got:?}");
        let certificates = Fields {
            client_cert: Some(HeaderName::from_static("client-cert")),
            client_cert_chain: Some(HeaderName::from_static("client-cert-chain")),
            provider: None,
            forwarded: None,
            request_id: None,
            traceparent: None,
            tls: None,
        };
        let got = sent(&certificates, &learned);
        for expected in ["client-cert: :AQID:", "client-cert-chain: :BA==:, :BQ==:"] {
            assert!(got.iter().any(|f| f == expected), "{expected} in {got:?}");
        }
        for nothing in ["x-moh-provider", "forwarded", "x-request-id", "traceparent"] {
            assert!(!got.iter().any(|f| f.starts_with(nothing)), "{nothing} in {got:?}");
        }
        let nobody = Learned { provider: None, chain: &[], ..learned };
        let got = sent(&own, &nobody);
        assert!(!got.iter().any(|f| f.starts_with("x-moh-provider")), "who is not authenticated is not named");
    }

    #[test]
    fn a_trace_is_passed_on_or_begun() {
        let of = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            values.iter().for_each(|value| {
                headers.append("traceparent", value.parse().unwrap());
            });
            Trace::of(&headers)
        };
        let theirs = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(of(&[theirs]).field(ID), theirs);
        assert_eq!(of(&[theirs]).id(ID), "4bf92f3577b34da6a3ce929d0e0e4736");
        let begun = format!("00-{ID}-8fa1b2c3d4e5f601-00");
        for bad in [
            &[][..],
            &[theirs, theirs],
            &["01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"],
            &["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more"],
            &["00-00000000000000000000000000000000-00f067aa0ba902b7-01"],
            &["00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"],
            &["00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"],
            &["00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01"],
            &[""],
        ] {
            assert_eq!((of(bad).field(ID).as_ref(), of(bad).id(ID)), (begun.as_str(), ID), "{bad:?}");
        }
    }
}
