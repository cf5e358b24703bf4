//! What the tests of this room share.

use super::{NodeSettings, NodeTls, Observer, Place, Settings};
use parking_lot::Mutex;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(super) const SECOND: Duration = Duration::from_secs(1);

/// Settings of nodes of which there is nothing special to say.
pub(super) fn settings(nodes: Vec<NodeSettings>) -> Settings {
    Settings {
        nodes,
        by_group: true,
        connect_timeout: SECOND,
        read_timeout: SECOND,
        write_timeout: SECOND,
        keepalive: SECOND,
        eject_for: SECOND,
        eject_max: 60 * SECOND,
        eject_after: 3,
        slow_start: None,
        max_requests: None,
        queue: 0,
        queue_timeout: SECOND,
        resolve_every: 60 * SECOND,
        health: None,
    }
}

/// A node at a place, as `name`.
pub(super) fn node_at(name: &str, place: Place) -> NodeSettings {
    NodeSettings { name: name.to_owned(), place, http2: false, tls: None, weight: 1 }
}

/// A node at an address.
pub(super) fn node(address: SocketAddr) -> NodeSettings {
    node_at(&address.to_string(), Place::Address(address))
}

/// The i-th of many addresses.
pub(super) fn address(i: u16) -> SocketAddr {
    let [high, low] = i.to_be_bytes();
    SocketAddr::from(([127, 0, high, low], 80))
}

/// So many nodes.
pub(super) fn nodes(n: u16) -> Vec<NodeSettings> {
    (1..=n).map(|i| node(address(i))).collect()
}

/// TLS with a client that trusts nobody.
pub(super) fn tls_of_nobody(digest: u64) -> NodeTls {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    NodeTls { name: "ds.internal".into(), client: Arc::new(client), digest }
}

/// Keeps what it is told.
#[derive(Default)]
pub(super) struct Told(Mutex<Vec<String>>);

impl Told {
    /// What it has been told since it was last asked.
    pub(super) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock())
    }
}

impl Observer for Told {
    fn ejected(&self, node: &str, why: &'static str) {
        self.0.lock().push(format!("ejected {node} {why}"));
    }

    fn returned(&self, node: &str) {
        self.0.lock().push(format!("returned {node}"));
    }

    fn healthy(&self, node: &str, healthy: bool) {
        self.0.lock().push(format!("healthy {node} {healthy}"));
    }

    fn members(&self, labels: &[String]) {
        self.0.lock().push(format!("members {}", labels.join(" ")));
    }
}

/// Waits, though not for ever.
pub(super) async fn until(what: impl Fn() -> bool) {
    let end = Instant::now() + 10 * SECOND;
    while !what() {
        assert!(Instant::now() < end, "it does not come to pass");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
