//! Forward: what goes to the Delivery Service, and how.

use crate::config::Timeouts;
use crate::dialect::Endpoint;
use crate::privacypass;
use crate::problem::Refusal;
use crate::upstream::{NodeSettings, Settings};
use http::{HeaderName, HeaderValue, Uri, header};
use pingora_core::upstreams::peer::{HttpPeer, HttpUpstreamRequestPolicy};
use pingora_http::RequestHeader;
use siphasher::sip128::SipHasher24;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// The authenticated provider, for the Delivery Service.
pub(super) const PROVIDER: HeaderName = HeaderName::from_static("x-moh-provider");

/// The request's ID, for the Delivery Service.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A hash of a group for choosing its node: the same on every gateway of a fleet, and after a restart. It guards nothing,
/// so its key is no secret.
pub(super) fn group_hash(group: &[u8]) -> u128 {
    SipHasher24::new_with_keys(0, 0).hash(group).as_u128()
}

/// A body on its way: what has passed, and until when.
#[derive(Debug)]
pub(super) struct Body {
    bound: u64,
    passed: u64,
    until: Instant,
}

impl Body {
    /// A body of at most `bound` octets, all of it within `total`.
    pub(super) fn new(bound: u64, total: Duration) -> Self {
        Self { bound, passed: 0, until: Instant::now() + total }
    }

    /// Octets it may have.
    pub(super) fn bound(&self) -> u64 {
        self.bound
    }

    /// Octets that have passed.
    pub(super) fn passed(&self) -> u64 {
        self.passed
    }

    /// When it must be in.
    pub(super) fn until(&self) -> Instant {
        self.until
    }

    /// It is sent from its beginning (again).
    pub(super) fn rewind(&mut self) {
        self.passed = 0;
    }

    /// Some of it passes.
    pub(super) fn pass(&mut self, octets: usize, end: bool) -> Result<(), Refusal> {
        self.passed = self.passed.saturating_add(octets as u64);
        if self.passed > self.bound {
            return Err(Refusal::TooLarge);
        }
        if !end && Instant::now() > self.until {
            return Err(Refusal::TooSlow);
        }
        Ok(())
    }
}

/// A node, as Pingora connects to it.
pub(super) fn peer(node: &NodeSettings, settings: &Settings, timeouts: &Timeouts, body_is_in: bool) -> HttpPeer {
    let mut peer = HttpPeer::new(node.address, false, String::new());
    let options = &mut peer.options;
    options.connection_timeout = Some(settings.connect_timeout);
    options.total_connection_timeout = Some(settings.connect_timeout);
    // Pingora's clock for the answer runs while the body still comes, so it must leave the body its time.
    let for_body = if body_is_in { Duration::ZERO } else { timeouts.body_total };
    options.read_timeout = Some(settings.read_timeout + for_body);
    options.write_timeout = Some(settings.write_timeout);
    options.idle_timeout = Some(settings.keepalive);
    options.http_upstream_request_policy = HttpUpstreamRequestPolicy::deny_upgrades();
    if node.h2c {
        options.set_http_version(2, 2);
        options.max_h2_streams = 100;
    }
    peer
}

/// Whether a node says that it has not begun with a request (RFC 9113 §6.8, §8.7): its stream was refused, or is beyond
/// those that the node still serves before it closes the connection, as it does when it restarts.
pub(super) fn was_left_untouched(e: &pingora_core::Error) -> bool {
    // The client's own reset says the same, of its own request.
    if *e.esource() != pingora_core::ErrorSource::Upstream {
        return false;
    }
    let Some(e) = e.root_cause().downcast_ref::<h2::Error>().filter(|e| e.is_remote()) else { return false };
    (e.is_reset() && e.reason() == Some(h2::Reason::REFUSED_STREAM))
        || (e.is_go_away() && e.reason() == Some(h2::Reason::NO_ERROR))
}

/// Whether a field from outside says what only the gateway may say. Underscores are hyphens to some servers behind.
fn is_ours_to_say(name: &HeaderName) -> bool {
    const NAMES: &[&str] = &[
        "forwarded",
        "x-real-ip",
        "x-request-id",
        "client-cert",
        "client-cert-chain",
        "via",
        "expect",
        "upgrade",
        "http2-settings",
        "te",
    ];
    const PREFIXES: &[&str] = &["x-forwarded-", "x-moh-"];
    let name = name.as_str().replace('_', "-");
    NAMES.contains(&name.as_str()) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Sets what the Delivery Service gets. Target and content type are written anew: it gets those that were checked, in
/// one form, however they came. Of the fields, what is not for outside to say is dropped, then who sends is said by us. A
/// `PrivateToken` credential was for us; other credentials are the Delivery Service's.
pub(super) fn set_fields(
    request: &mut RequestHeader,
    endpoint: &Endpoint,
    client: Option<IpAddr>,
    provider: Option<&str>,
    id: &str,
    takes_tokens: bool,
) -> pingora_core::Result<()> {
    if let Some(authority) = request.uri.authority().map(|authority| authority.as_str().to_owned()) {
        request.insert_header(header::HOST, authority)?;
    }
    request.set_uri(Uri::from_static(endpoint.path));
    request.insert_header(header::CONTENT_TYPE, "application/octet-stream")?;
    let drop: Vec<_> = request.headers.keys().filter(|name| is_ours_to_say(name)).cloned().collect();
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
    if let Some(client) = client {
        // RFC 7239 §6: IPv6 addresses in brackets, and quoted.
        let forwarded = match client.to_canonical() {
            IpAddr::V4(ip) => format!("for={ip};proto=https"),
            IpAddr::V6(ip) => format!("for=\"[{ip}]\";proto=https"),
        };
        request.insert_header(header::FORWARDED, forwarded)?;
    }
    if let Some(provider) = provider {
        request.insert_header(PROVIDER, provider)?;
    }
    request.insert_header(REQUEST_ID, id)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_gateway_says_who_sends() {
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
        ] {
            request.append_header(name, "forged").unwrap();
        }
        request.append_header("Authorization", "Bearer ds").unwrap();
        request.append_header("Authorization", "PrivateToken token=\"x\"").unwrap();
        request.append_header("X-Other", "kept").unwrap();
        let client = Some("2001:db8::1".parse().unwrap());
        let endpoint = crate::dialect::moh::endpoint_by_path("/group_operation").unwrap();
        set_fields(&mut request, endpoint, client, Some("a.example"), "id-1", true).unwrap();
        let fields: Vec<_> =
            request.headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap().to_owned())).collect();
        assert!(!fields.iter().any(|f| f.contains("forged") || f.contains("PrivateToken")), "{fields:?}");
        for expected in [
            "forwarded: for=\"[2001:db8::1]\";proto=https",
            "x-moh-provider: a.example",
            "x-request-id: id-1",
            "authorization: Bearer ds",
            "x-other: kept",
        ] {
            assert!(fields.iter().any(|f| f == expected), "{expected} in {fields:?}");
        }
        set_fields(&mut request, endpoint, client, None, "id-2", true).unwrap();
        assert!(!request.headers.contains_key(PROVIDER), "who is not authenticated is not named");
    }

    #[test]
    fn bodies_have_a_bound_and_a_time() {
        let mut body = Body::new(10, Duration::from_secs(60));
        assert_eq!(body.pass(10, false), Ok(()));
        assert_eq!(body.pass(1, true), Err(Refusal::TooLarge));
        body.rewind();
        assert_eq!(body.pass(10, true), Ok(()));
        let mut late = Body::new(10, Duration::ZERO);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(late.pass(1, false), Err(Refusal::TooSlow));
        assert_eq!(late.pass(1, true), Ok(()), "it is in");
    }
}
