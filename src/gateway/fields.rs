//! What the Delivery Service learns of a request beside its body: from whom it is, by what channel, and its trace. The
//! operator names the fields; whatever comes in under these names, or under those that others are used to, is dropped, so
//! that only the gateway says such things.

use crate::config::Fields;
use crate::dialect::Endpoint;
use crate::privacypass;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::{HeaderMap, HeaderName, HeaderValue, Uri, header};
use pingora_http::RequestHeader;
use rustls::pki_types::CertificateDer;
use std::borrow::Cow;
use std::net::IpAddr;

/// What is learnt.
#[derive(Debug, Clone, Copy)]
pub(super) struct Learned<'a> {
    /// The client's address.
    pub(super) client: Option<IpAddr>,
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
            None => Cow::Owned(format!("00-{id}-{}-00", id.get(16..32).unwrap_or("0000000000000001"))),
        }
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
    let is = |name: &str| {
        NAMES.contains(&name)
            || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
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

/// An address as RFC 7239 §6 has it: IPv6 in brackets, and quoted.
fn forwarded(client: IpAddr, host: Option<&HeaderValue>) -> String {
    let from = match client.to_canonical() {
        IpAddr::V4(ip) => format!("for={ip}"),
        IpAddr::V6(ip) => format!("for=\"[{ip}]\""),
    };
    // It is one of this provider's names, with a port or without: nothing that would end the quotes.
    match host.and_then(|host| host.to_str().ok()).filter(|host| !host.contains(['"', '\\'])) {
        Some(host) => format!("{from};host=\"{host}\";proto=https"),
        None => format!("{from};proto=https"),
    }
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

/// Sets what the Delivery Service gets. Target and content type are written anew: it gets those that were checked, in
/// one form, however they came. Of the fields, what is not for outside to say is dropped, then who sends is said by us. A
/// `PrivateToken` credential was for us; other credentials are the Delivery Service's.
pub(super) fn set(
    request: &mut RequestHeader,
    path: Uri,
    of: Of,
    fields: &Fields,
    learned: &Learned<'_>,
    takes_tokens: bool,
) -> pingora_core::Result<()> {
    if let Some(authority) = request.uri.authority().map(|authority| authority.as_str().to_owned()) {
        request.insert_header(header::HOST, authority)?;
    }
    request.set_uri(path);
    if !of.keeps_from {
        // Nobody has looked at it.
        request.remove_header(&header::FROM);
    }
    if let Some(content_type) = of.endpoint.content_type {
        request.insert_header(header::CONTENT_TYPE, content_type)?;
    }
    let drop: Vec<_> = request.headers.keys().filter(|name| is_ours_to_say(name, fields)).cloned().collect();
    for name in drop {
        request.remove_header(&name);
    }
    if takes_tokens && privacypass::has_credential(&request.headers) {
        let others: Vec<HeaderValue> = request
            .headers
            .get_all(header::AUTHORIZATION)
            .iter()
            .filter(|value| !privacypass::is_private_token(value))
            .cloned()
            .collect();
        request.remove_header(&header::AUTHORIZATION);
        for value in others {
            request.append_header(header::AUTHORIZATION, value)?;
        }
    }
    if let (Some(name), Some(client)) = (&fields.forwarded, learned.client) {
        let value = forwarded(client, request.headers.get(header::HOST));
        request.insert_header(name.clone(), value)?;
    }
    if let (Some(name), Some(provider)) = (&fields.provider, learned.provider) {
        request.insert_header(name.clone(), provider)?;
    }
    if let (Some(name), Some(leaf)) = (&fields.client_cert, learned.chain.first()) {
        request.insert_header(name.clone(), sequence(leaf))?;
    }
    if let (Some(name), Some(rest @ [_, ..])) = (&fields.client_cert_chain, learned.chain.get(1..)) {
        request.insert_header(name.clone(), rest.iter().map(sequence).collect::<Vec<_>>().join(", "))?;
    }
    if let (Some(name), Some(tls)) = (&fields.tls, learned.tls) {
        request.insert_header(name.clone(), tls)?;
    }
    if let Some(name) = &fields.request_id {
        request.insert_header(name.clone(), learned.id)?;
    }
    if let Some(name) = &fields.traceparent {
        request.insert_header(name.clone(), learned.trace.field(learned.id).as_ref())?;
    }
    Ok(())
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
        let mut request = RequestHeader::build("POST", b"/group_operation", None).unwrap();
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
            request.append_header(name, "forged").unwrap();
        }
        request.append_header("Host", "ds.b.example").unwrap();
        request.append_header("Authorization", "Bearer ds").unwrap();
        request.append_header("Authorization", "PrivateToken token=\"x\"").unwrap();
        request.append_header("X-Other", "kept").unwrap();
        let endpoint = crate::dialect::endpoint("group_operation").unwrap();
        let of = Of { endpoint, keeps_from: false };
        set(&mut request, Uri::from_static(endpoint.path), of, fields, learned, true).unwrap();
        request.headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap())).collect()
    }

    #[test]
    fn only_the_gateway_says_who_sends() {
        let trace = Trace::of(&HeaderMap::new());
        let chain = [CertificateDer::from(vec![1, 2, 3]), CertificateDer::from(vec![4]), CertificateDer::from(vec![5])];
        let learned = Learned {
            client: Some("2001:db8::1".parse().unwrap()),
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
