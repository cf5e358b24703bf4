//! Forward: what goes to the Delivery Service, and how.

use crate::dialect::Route;
use crate::forward::{ConnectError, Peer, Protocol, Times, Tls};
use crate::problem::Refusal;
use crate::upstream::{Member, NodeTls, Settings};
use arc_swap::ArcSwap;
use http::uri::PathAndQuery;
use siphasher::sip128::SipHasher24;
use std::collections::HashMap;
use std::sync::Arc;

/// Requests at once on a connection of HTTP/2, at most.
pub(super) const STREAMS: usize = 100;

/// A hash of a group for choosing its node: the same on every gateway of a fleet, and after a restart. It guards nothing,
/// so its key is no secret.
pub(super) fn group_hash(group: &[u8]) -> u128 {
    SipHasher24::new_with_keys(0, 0).hash(group).as_u128()
}

/// The path that the Delivery Service is asked at.
pub(super) fn path(route: &Route, raw: &str) -> Result<PathAndQuery, Refusal> {
    let path = route.upstream_path(raw);
    if *path == *route.endpoint.path {
        return Ok(PathAndQuery::from_static(route.endpoint.path));
    }
    PathAndQuery::try_from(&*path).map_err(|_| Refusal::UnknownPath)
}

/// How nodes are spoken TLS to, made once for each way of doing so.
#[derive(Default)]
pub(super) struct NodeTlsForms(ArcSwap<HashMap<(u64, bool), Arc<Tls>>>);

impl NodeTlsForms {
    fn of(&self, tls: &NodeTls, http2: bool) -> Result<Arc<Tls>, String> {
        let key = (tls.digest, http2);
        if let Some(form) = self.0.load().get(&key) {
            return Ok(form.clone());
        }
        let form = Tls::by(tls.client.clone(), &tls.name, tls.digest)?;
        self.0.rcu(|forms| {
            // Those of earlier configurations go when there are many.
            let kept = if forms.len() < 1024 { (**forms).clone() } else { HashMap::new() };
            kept.into_iter().chain([(key, form.clone())]).collect::<HashMap<_, _>>()
        });
        Ok(form)
    }
}

/// A node, as it is connected to.
pub(super) fn peer(node: &Member, settings: &Settings, forms: &NodeTlsForms) -> Result<Peer, String> {
    Ok(Peer {
        at: node.target.clone(),
        tls: node.tls.as_ref().map(|tls| forms.of(tls, node.http2)).transpose()?,
        protocol: if node.http2 { Protocol::Http2 } else { Protocol::Http1 },
        streams: STREAMS,
        times: Times {
            connect: settings.connect_timeout,
            read: settings.read_timeout,
            write: settings.write_timeout,
            keepalive: settings.keepalive,
        },
    })
}

/// Whether there is no connection for a reason of this process: it has no descriptor or port left.
pub(super) fn is_of_this_process(e: &ConnectError) -> bool {
    matches!(e, ConnectError::OfThisProcess(_))
}

/// What is answered where another side does not.
pub(super) fn without_an_answer(e: crate::forward::Error) -> Refusal {
    use crate::forward::Error;
    match e {
        Error::ReadTimedOut | Error::WriteTimedOut => Refusal::GatewayTimeout,
        Error::Stopped(stop) => stop.refusal,
        Error::Untouched | Error::Closed | Error::Broken(_) => Refusal::BadGateway,
    }
}
