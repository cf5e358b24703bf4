//! What the configuration says of the Delivery Service.

use super::resolve::Name;
use siphasher::sip128::SipHasher24;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Nodes that may be configured at most.
pub const MAX_NODES: usize = 1024;

/// What the configuration says of the Delivery Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Its nodes.
    pub nodes: Vec<NodeSettings>,
    /// Whether a group keeps its node.
    pub by_group: bool,
    /// For a connection to a node, with the handshake.
    pub connect_timeout: Duration,
    /// Between two reads of an answer.
    pub read_timeout: Duration,
    /// For a write to a node.
    pub write_timeout: Duration,
    /// For an idle connection to a node.
    pub keepalive: Duration,
    /// How long a node that refuses is left out; twice as long each time in a row.
    pub eject_for: Duration,
    /// And so long at most.
    pub eject_max: Duration,
    /// So many requests in a row that a node accepts and does not answer have it left out too; 0: any number.
    pub eject_after: u32,
    /// In what time a node that returns gets its share back; none: at once.
    pub slow_start: Option<Duration>,
    /// Requests that may be under way at a node at once.
    pub max_requests: Option<u32>,
    /// Requests that may wait for a node beyond these.
    pub queue: u32,
    /// For how long they wait.
    pub queue_timeout: Duration,
    /// How often names of nodes are looked up.
    pub resolve_every: Duration,
    /// Active checks, where there are any.
    pub health: Option<Health>,
}

impl Settings {
    /// The names that are to be looked up, each once.
    pub(super) fn names(&self) -> Vec<Name> {
        let mut names: Vec<Name> = self.nodes.iter().filter_map(|node| node.place.name()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

/// How nodes are checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// What is asked of them.
    pub check: Check,
    /// How often.
    pub interval: Duration,
    /// For a whole check.
    pub timeout: Duration,
    /// So many in a row that succeed make a node healthy again.
    pub rise: u32,
    /// So many in a row that fail make it unhealthy.
    pub fall: u32,
}

/// What is asked of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// That it accepts a connection, and shakes hands where it speaks TLS.
    Tcp,
    /// That it answers a GET with any 2xx.
    Http {
        /// What is asked for: a path, perhaps with a query.
        path: String,
    },
}

/// A node, as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSettings {
    /// As it is written: `host:port` or `unix:/path`.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// HTTP/2, without TLS with prior knowledge; else HTTP/1.1.
    pub http2: bool,
    /// How it is spoken TLS to, if it is.
    pub tls: Option<Arc<NodeTls>>,
    /// Its share of groups and turns; where its name has several addresses, each one's.
    pub weight: u32,
}

/// Where a node is said to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// At an address.
    Address(SocketAddr),
    /// At the addresses of a name, whatever they are from time to time.
    Name {
        /// The name.
        host: String,
        /// The port at each of its addresses.
        port: u16,
    },
    /// At a Unix socket.
    Unix(PathBuf),
}

impl Place {
    pub(super) fn name(&self) -> Option<Name> {
        match self {
            Self::Name { host, port } => Some((host.clone(), *port)),
            Self::Address(_) | Self::Unix(_) => None,
        }
    }
}

/// How a node is spoken TLS to.
#[derive(Clone)]
pub struct NodeTls {
    /// The name its certificate must hold, and the SNI.
    pub name: String,
    /// The roots its certificate must chain to, what the gateway shows, and the node's protocol for ALPN.
    pub client: Arc<rustls::ClientConfig>,
    /// Stands for all of that: connections made with another are not reused.
    pub digest: u64,
}

impl std::fmt::Debug for NodeTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The configuration holds a key.
        f.debug_struct("NodeTls").field("name", &self.name).field("digest", &self.digest).finish_non_exhaustive()
    }
}

impl PartialEq for NodeTls {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Eq for NodeTls {}

/// Where a connection goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// TCP.
    Inet(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Inet(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Target {
    /// A hash that is the same on every gateway and after every restart. It guards nothing, so its key is no secret.
    fn digest(&self) -> u128 {
        SipHasher24::new_with_keys(0, 0).hash(self.to_string().as_bytes()).into()
    }

    /// What tells it from other targets where shares of groups are drawn.
    pub(super) fn seed(&self) -> u64 {
        self.digest() as u64
    }

    /// Where it is on the ring: the ring is of socket addresses, so a path has one made up.
    pub(super) fn on_ring(&self) -> SocketAddr {
        match self {
            Self::Inet(address) => *address,
            Self::Unix(_) => SocketAddr::new(Ipv6Addr::from(self.digest()).into(), 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::tls_of_nobody;
    use super::*;

    #[test]
    fn targets_are_told_apart_and_are_the_same_after_a_restart() {
        let of = |path: &str| Target::Unix(path.into());
        assert_eq!(of("/run/a").on_ring(), of("/run/a").on_ring());
        assert_ne!(of("/run/a").on_ring(), of("/run/b").on_ring());
        assert_ne!(of("/run/a").seed(), of("/run/b").seed());
        assert_eq!(of("/run/a").to_string(), "unix:/run/a");
        let address: SocketAddr = "[2001:db8::1]:80".parse().unwrap();
        assert_eq!(Target::Inet(address).on_ring(), address);
        assert_eq!(Target::Inet(address).to_string(), "[2001:db8::1]:80");
    }

    #[test]
    fn no_key_is_written_to_a_log() {
        let tls = tls_of_nobody(7);
        let text = format!("{tls:?}");
        assert!(text.contains("ds.internal") && !text.contains("client"), "{text}");
    }
}
