//! Forward: what goes to the Delivery Service, and how.

use crate::config::Timeouts;
use crate::dialect::Route;
use crate::problem::Refusal;
use crate::upstream::{Member, NodeTls, Settings, Target};
use arc_swap::ArcSwap;
use http::Uri;
use pingora_core::protocols::tls::CaType;
use pingora_core::upstreams::peer::{HttpPeer, HttpUpstreamRequestPolicy, PeerOptions};
use pingora_core::utils::tls::{CertKey, WrappedX509, parse_x509};
use pingora_core::{Error, ErrorType, Result};
use siphasher::sip128::SipHasher24;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// A hash of a group for choosing its node: the same on every gateway of a fleet, and after a restart. It guards nothing,
/// so its key is no secret.
pub(super) fn group_hash(group: &[u8]) -> u128 {
    SipHasher24::new_with_keys(0, 0).hash(group).as_u128()
}

/// The path that the Delivery Service is asked at.
pub(super) fn path(route: &Route, raw: &str) -> std::result::Result<Uri, Refusal> {
    let path = route.upstream_path(raw);
    if *path == *route.endpoint.path {
        return Ok(Uri::from_static(route.endpoint.path));
    }
    Uri::try_from(&*path).map_err(|_| Refusal::UnknownPath)
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
    pub(super) fn pass(&mut self, octets: usize, end: bool) -> std::result::Result<(), Refusal> {
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

/// How Pingora is to speak TLS to nodes: its own forms of certificates, made once for each way of doing so.
#[derive(Default)]
pub(super) struct NodeTlsForms(ArcSwap<HashMap<u64, Arc<NodeTlsForm>>>);

struct NodeTlsForm {
    roots: Arc<CaType>,
    identity: Option<Arc<CertKey>>,
}

/// Roots in Pingora's form, which panics on what is no certificate.
pub(super) fn roots(der: &[Vec<u8>]) -> Result<Arc<CaType>> {
    let parsed = |der: &Vec<u8>| {
        let _ = X509Certificate::from_der(der).map_err(|_| Error::explain(ErrorType::InvalidCert, "a root"))?;
        Ok(WrappedX509::new(der.clone(), parse_x509))
    };
    Ok(der.iter().map(parsed).collect::<Result<Vec<_>>>()?.into())
}

/// A certificate and its key in Pingora's form.
pub(super) fn identity(chain: &[Vec<u8>], key: &[u8]) -> Result<Arc<CertKey>> {
    let read = chain.iter().all(|der| X509Certificate::from_der(der).is_ok());
    if chain.is_empty() || !read {
        return Error::e_explain(ErrorType::InvalidCert, "a certificate of ours");
    }
    Ok(Arc::new(CertKey::new(chain.to_vec(), key.to_vec())))
}

impl NodeTlsForms {
    fn of(&self, tls: &NodeTls) -> Result<Arc<NodeTlsForm>> {
        if let Some(form) = self.0.load().get(&tls.digest) {
            return Ok(form.clone());
        }
        let form = Arc::new(NodeTlsForm {
            roots: roots(&tls.roots)?,
            identity: tls.identity.as_ref().map(|(chain, key)| identity(chain, key)).transpose()?,
        });
        self.0.rcu(|forms| {
            // Those of earlier configurations go when there are many.
            let kept = if forms.len() < 1024 { (**forms).clone() } else { HashMap::new() };
            kept.into_iter().chain([(tls.digest, form.clone())]).collect::<HashMap<_, _>>()
        });
        Ok(form)
    }
}

/// How long things may take on the other side.
pub(super) struct Times {
    pub(super) connect: Duration,
    pub(super) read: Duration,
    pub(super) write: Duration,
    pub(super) keepalive: Duration,
}

/// What holds for whomever a request goes to.
pub(super) fn set_options(options: &mut PeerOptions, times: &Times, timeouts: &Timeouts, body_is_in: bool) {
    options.connection_timeout = Some(times.connect);
    options.total_connection_timeout = Some(times.connect);
    // Pingora's clock for the answer runs while the body still comes, so it must leave the body its time.
    let for_body = if body_is_in { Duration::ZERO } else { timeouts.body_total };
    options.read_timeout = Some(times.read + for_body);
    options.write_timeout = Some(times.write);
    options.idle_timeout = Some(times.keepalive);
    options.http_upstream_request_policy = HttpUpstreamRequestPolicy::deny_upgrades();
}

/// A node, as Pingora connects to it.
pub(super) fn peer(
    node: &Member,
    settings: &Settings,
    timeouts: &Timeouts,
    forms: &NodeTlsForms,
    body_is_in: bool,
) -> Result<HttpPeer> {
    let (tls, name) = (node.tls.is_some(), node.tls.as_ref().map(|tls| tls.name.clone()).unwrap_or_default());
    let mut peer = match &node.target {
        Target::Inet(address) => HttpPeer::new(*address, tls, name),
        Target::Unix(path) => HttpPeer::new_uds(&path.to_string_lossy(), tls, name)?,
    };
    if let Some(tls) = &node.tls {
        let form = forms.of(tls)?;
        peer.group_key = tls.digest;
        peer.client_cert_key = form.identity.clone();
        peer.options.ca = Some(form.roots.clone());
    }
    let options = &mut peer.options;
    let times = Times {
        connect: settings.connect_timeout,
        read: settings.read_timeout,
        write: settings.write_timeout,
        keepalive: settings.keepalive,
    };
    set_options(options, &times, timeouts, body_is_in);
    if node.http2 {
        options.set_http_version(2, 2);
        options.max_h2_streams = 100;
    }
    Ok(peer)
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

/// Whether a node does not take connections as it should: it is left out.
pub(super) fn is_refusal(e: &Error) -> bool {
    matches!(
        e.etype(),
        ErrorType::ConnectRefused
            | ErrorType::ConnectTimedout
            | ErrorType::ConnectNoRoute
            | ErrorType::ConnectError
            | ErrorType::TLSHandshakeFailure
            | ErrorType::TLSHandshakeTimedout
            | ErrorType::InvalidCert
    )
}

/// Whether there is no connection for a reason of this process: it has no descriptor or port left.
pub(super) fn is_of_this_process(e: &Error) -> bool {
    matches!(e.etype(), ErrorType::InternalError | ErrorType::SocketError | ErrorType::BindError)
}

/// Whether a node has failed a request that it took: no answer in time, or its connection gone.
pub(super) fn is_a_failure(e: &Error) -> bool {
    *e.esource() == pingora_core::ErrorSource::Upstream
        && matches!(
            e.etype(),
            ErrorType::ReadTimedout
                | ErrorType::WriteTimedout
                | ErrorType::ReadError
                | ErrorType::WriteError
                | ErrorType::ConnectionClosed
                | ErrorType::H2Error
        )
}

#[cfg(test)]
mod tests {
    use super::*;

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
