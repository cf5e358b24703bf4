//! What the operator writes: the tables of `conf/gateway.toml`, with their defaults. Unknown keys are errors.

use super::units::{Burst, Rate, Size, Span};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use toml::Spanned;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) provider: Provider,
    pub(super) listener: Spanned<Vec<Listener>>,
    pub(super) certificate: Spanned<Vec<Certificate>>,
    #[serde(default)]
    pub(super) tls: Tls,
    #[serde(default)]
    pub(super) timeouts: Timeouts,
    #[serde(default)]
    pub(super) connections: Connections,
    #[serde(default)]
    pub(super) http2: Http2,
    pub(super) egress: Option<Egress>,
    pub(super) proxy_download: Option<ProxyDownload>,
    pub(super) delivery_service: DeliveryService,
    #[serde(default)]
    pub(super) peers: Peers,
    #[serde(default)]
    pub(super) endpoints: BTreeMap<Spanned<String>, EndpointTable>,
    #[serde(default)]
    pub(super) limit: Vec<Limit>,
    #[serde(default)]
    pub(super) limits: Limits,
    pub(super) privacy_pass: Option<PrivacyPass>,
    #[serde(default)]
    pub(super) admin: Admin,
    #[serde(default)]
    pub(super) access_log: AccessLog,
    #[serde(default)]
    pub(super) runtime: Runtime,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Provider {
    pub(super) names: Spanned<Vec<Spanned<String>>>,
    pub(super) ds_domain: Spanned<String>,
}

#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq, Default)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ClientCertificates {
    #[default]
    Off,
    Optional,
    Required,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Listener {
    pub(super) address: Spanned<String>,
    #[serde(default)]
    pub(super) client_certificates: ClientCertificates,
    pub(super) client_ca: Option<Spanned<Paths>>,
    pub(super) client_crl: Option<Spanned<Paths>>,
    #[serde(default)]
    pub(super) proxy_protocol: Vec<Spanned<String>>,
    pub(super) dialects: Option<Spanned<Vec<Spanned<String>>>>,
}

/// A path, or a list of them; for roots "system" is the system's.
#[derive(Debug, Deserialize, Clone)]
#[serde(untagged)]
pub(super) enum Paths {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

impl Paths {
    /// The system's roots are meant.
    pub(super) fn is_system(&self) -> bool {
        matches!(self, Self::One(path) if path.as_os_str() == "system")
    }

    pub(super) fn list(&self) -> &[PathBuf] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::Many(paths) => paths,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Tls {
    pub(super) tickets: bool,
    pub(super) ticket_secret_file: Option<Spanned<PathBuf>>,
    pub(super) ticket_rotation: Spanned<Span>,
    pub(super) watch_every: Span,
}

impl Default for Tls {
    fn default() -> Self {
        Self {
            tickets: true,
            ticket_secret_file: None,
            ticket_rotation: milliseconds::<21_600_000>(),
            watch_every: seconds::<10>(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Connections {
    pub(super) max: Spanned<u32>,
    pub(super) per_ip: Spanned<u32>,
    pub(super) per_provider: Spanned<u32>,
    pub(super) handshakes_per_ip: Spanned<Rate>,
    pub(super) handshakes_burst: Spanned<Burst>,
    pub(super) handshakes_at_once: Spanned<u32>,
    pub(super) held_bodies: Spanned<Size>,
    pub(super) exempt: Vec<Spanned<String>>,
}

impl Default for Connections {
    fn default() -> Self {
        Self {
            max: unplaced(20_000),
            per_ip: unplaced(1_000),
            per_provider: unplaced(2_000),
            handshakes_per_ip: unplaced(Rate { count: 100, period: Duration::from_secs(1), octets: false }),
            handshakes_burst: unplaced(Burst { count: 1_000, octets: false }),
            handshakes_at_once: unplaced(2_000),
            held_bodies: unplaced(Size(256 << 20)),
            exempt: vec![],
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Http2 {
    pub(super) max_streams: Spanned<u32>,
    pub(super) max_header_list: Spanned<Size>,
    pub(super) control_frames: Spanned<Rate>,
    pub(super) control_burst: Spanned<Burst>,
}

impl Default for Http2 {
    fn default() -> Self {
        Self {
            max_streams: unplaced(100),
            max_header_list: unplaced(Size(16 << 10)),
            control_frames: unplaced(Rate { count: 100, period: Duration::from_secs(1), octets: false }),
            control_burst: unplaced(Burst { count: 1_000, octets: false }),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Egress {
    pub(super) address: Spanned<String>,
    pub(super) client_ca: Option<Spanned<Paths>>,
    #[serde(default)]
    pub(super) client_names: Vec<Spanned<String>>,
    pub(super) certificate: Option<Spanned<PathBuf>>,
    pub(super) key: Option<Spanned<PathBuf>>,
    #[serde(default = "system")]
    pub(super) ca: Spanned<Paths>,
    #[serde(default = "seconds::<5>")]
    pub(super) connect_timeout: Span,
    #[serde(default = "seconds::<30>")]
    pub(super) read_timeout: Span,
    #[serde(default = "seconds::<5>")]
    pub(super) discovery_timeout: Span,
    #[serde(default)]
    pub(super) allow_private: bool,
    #[serde(default)]
    pub(super) peer: Vec<EgressPeer>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EgressPeer {
    pub(super) provider: Spanned<String>,
    pub(super) ds_domain: Option<Spanned<String>>,
    pub(super) address: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ProxyDownload {
    pub(super) hosts: Spanned<Vec<Spanned<String>>>,
    #[serde(default = "mebibytes::<100>")]
    pub(super) max_size: Spanned<Size>,
    #[serde(default = "seconds::<60>")]
    pub(super) timeout: Span,
    #[serde(default = "seconds::<5>")]
    pub(super) connect_timeout: Span,
    #[serde(default = "seconds::<10>")]
    pub(super) idle_timeout: Span,
    #[serde(default = "system")]
    pub(super) ca: Spanned<Paths>,
    #[serde(default)]
    pub(super) allow_private: bool,
}

fn mebibytes<const N: u64>() -> Spanned<Size> {
    unplaced(Size(N << 20))
}

fn system() -> Spanned<Paths> {
    unplaced(Paths::One("system".into()))
}

/// A default: it stands at no place of the file.
fn unplaced<T>(value: T) -> Spanned<T> {
    Spanned::new(0..0, value)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Certificate {
    pub(super) chain: Spanned<PathBuf>,
    pub(super) key: Spanned<PathBuf>,
    pub(super) ocsp: Option<Spanned<PathBuf>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Timeouts {
    pub(super) tls_handshake: Span,
    pub(super) headers: Span,
    pub(super) body_idle: Span,
    pub(super) body_total: Span,
    pub(super) keepalive: Span,
    pub(super) shutdown: Span,
}

impl Default for Timeouts {
    fn default() -> Self {
        let s = |n| Span(Duration::from_secs(n));
        Self {
            tls_handshake: s(10),
            headers: s(10),
            body_idle: s(10),
            body_total: s(60),
            keepalive: s(60),
            shutdown: s(10),
        }
    }
}

#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq, Default)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Balance {
    #[default]
    Group,
    RoundRobin,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeliveryService {
    #[serde(default)]
    pub(super) balance: Balance,
    #[serde(default = "seconds::<2>")]
    pub(super) connect_timeout: Span,
    #[serde(default = "seconds::<30>")]
    pub(super) read_timeout: Span,
    #[serde(default = "seconds::<30>")]
    pub(super) write_timeout: Span,
    #[serde(default = "seconds::<60>")]
    pub(super) keepalive: Span,
    #[serde(default = "seconds::<1>")]
    pub(super) eject_for: Span,
    #[serde(default = "seconds::<60>")]
    pub(super) eject_max: Span,
    #[serde(default = "number::<5>")]
    pub(super) eject_after: Spanned<u32>,
    pub(super) slow_start: Option<Span>,
    pub(super) max_requests: Option<Spanned<u32>>,
    #[serde(default = "number::<100>")]
    pub(super) queue: Spanned<u32>,
    #[serde(default = "seconds::<1>")]
    pub(super) queue_timeout: Span,
    #[serde(default = "seconds::<30>")]
    pub(super) resolve_every: Span,
    pub(super) health: Option<Health>,
    #[serde(default)]
    pub(super) fields: Fields,
    pub(super) node: Spanned<Vec<Node>>,
}

#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Check {
    Tcp,
    Http,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Health {
    pub(super) check: Check,
    pub(super) path: Option<Spanned<String>>,
    #[serde(default = "seconds::<2>")]
    pub(super) interval: Span,
    #[serde(default = "seconds::<1>")]
    pub(super) timeout: Span,
    #[serde(default = "number::<2>")]
    pub(super) rise: Spanned<u32>,
    #[serde(default = "number::<3>")]
    pub(super) fall: Spanned<u32>,
}

/// Names of fields; an empty one is not sent.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Fields {
    pub(super) provider: Spanned<String>,
    pub(super) forwarded: Spanned<String>,
    pub(super) client_cert: Spanned<String>,
    pub(super) client_cert_chain: Spanned<String>,
    pub(super) tls: Spanned<String>,
    pub(super) request_id: Spanned<String>,
    pub(super) traceparent: Spanned<String>,
}

impl Default for Fields {
    fn default() -> Self {
        let name = |name: &str| unplaced(name.to_owned());
        Self {
            provider: name("x-moh-provider"),
            forwarded: name("forwarded"),
            client_cert: name(""),
            client_cert_chain: name(""),
            tls: name(""),
            request_id: name("x-request-id"),
            traceparent: name("traceparent"),
        }
    }
}

fn number<const N: u32>() -> Spanned<u32> {
    unplaced(N)
}

fn seconds<const N: u64>() -> Span {
    Span(Duration::from_secs(N))
}

#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq, Default)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Protocol {
    #[default]
    Http1,
    H2c,
    H2,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Node {
    pub(super) address: Spanned<String>,
    pub(super) protocol: Option<Spanned<Protocol>>,
    pub(super) weight: Option<Spanned<u32>>,
    pub(super) tls: Option<Spanned<NodeTls>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NodeTls {
    pub(super) ca: Spanned<Paths>,
    pub(super) name: Option<Spanned<String>>,
    pub(super) certificate: Option<Spanned<PathBuf>>,
    pub(super) key: Option<Spanned<PathBuf>>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Peers {
    pub(super) allow: Option<Vec<Spanned<String>>>,
    #[serde(default)]
    pub(super) deny: Vec<Spanned<String>>,
    #[serde(default)]
    pub(super) named: Vec<Spanned<String>>,
    #[serde(default)]
    pub(super) pin: Vec<Pin>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pin {
    pub(super) provider: Spanned<String>,
    pub(super) spki_sha256: Spanned<Vec<Spanned<String>>>,
}

#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq, Default)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Token {
    #[default]
    Off,
    Required,
    TopUp,
    Exempt,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EndpointTable {
    pub(super) path: Option<Spanned<String>>,
    pub(super) upstream_path: Option<Spanned<String>>,
    pub(super) max_body: Option<Spanned<Size>>,
    pub(super) max_held: Option<Spanned<Size>>,
    #[serde(default)]
    pub(super) token: Token,
    pub(super) token_rate: Option<Rate>,
    pub(super) token_burst: Option<Spanned<Burst>>,
}

#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(super) enum KeyPart {
    Ip,
    Provider,
    Group,
    Member,
    Target,
    Endpoint,
}

#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq, Default)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Mode {
    #[default]
    Enforce,
    Shadow,
}

#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(super) enum OnStoreFailure {
    Local,
    Open,
    Closed,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Limit {
    pub(super) name: Spanned<String>,
    pub(super) endpoints: Option<Vec<Spanned<String>>>,
    pub(super) operations: Option<Vec<Spanned<String>>>,
    pub(super) key: Spanned<Vec<KeyPart>>,
    pub(super) rate: Option<Spanned<Rate>>,
    pub(super) burst: Option<Spanned<Burst>>,
    pub(super) concurrent: Option<Spanned<u32>>,
    #[serde(default, rename = "override")]
    pub(super) overrides: Vec<Override>,
    #[serde(default)]
    pub(super) exempt: Vec<Spanned<String>>,
    #[serde(default)]
    pub(super) mode: Mode,
    pub(super) on_store_failure: Option<Spanned<OnStoreFailure>>,
    #[serde(default)]
    pub(super) token: Token,
    pub(super) token_rate: Option<Rate>,
    pub(super) token_burst: Option<Spanned<Burst>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Override {
    pub(super) provider: Spanned<String>,
    pub(super) rate: Option<Spanned<Rate>>,
    pub(super) burst: Option<Spanned<Burst>>,
    pub(super) concurrent: Option<Spanned<u32>>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Limits {
    pub(super) memory: Option<Spanned<Size>>,
    pub(super) ipv6_prefix: Option<Spanned<u8>>,
    #[serde(default)]
    pub(super) exempt: Vec<Spanned<String>>,
    pub(super) redis: Option<Redis>,
}

#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq, Default)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RedisMode {
    #[default]
    Strict,
    Leased,
    Tokens,
}

#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq, Default)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Partition {
    #[default]
    None,
    Provider,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Redis {
    pub(super) nodes: Spanned<Vec<Spanned<String>>>,
    #[serde(default)]
    pub(super) cluster: bool,
    pub(super) tls_ca: Option<Spanned<PathBuf>>,
    pub(super) username: Option<String>,
    pub(super) password_file: Option<Spanned<PathBuf>>,
    pub(super) secret_file: Spanned<PathBuf>,
    pub(super) prefix: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) partition: Partition,
    #[serde(default = "milliseconds::<50>")]
    pub(super) timeout: Spanned<Span>,
    pub(super) connections: Option<Spanned<usize>>,
    #[serde(default)]
    pub(super) mode: RedisMode,
    pub(super) lease_share: Option<Spanned<u32>>,
    pub(super) lease_idle: Option<Spanned<Span>>,
}

fn milliseconds<const N: u64>() -> Spanned<Span> {
    Spanned::new(0..0, Span(Duration::from_millis(N)))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PrivacyPass {
    pub(super) origin: Option<Spanned<String>>,
    #[serde(default = "milliseconds::<3_600_000>")]
    pub(super) epoch: Spanned<Span>,
    #[serde(default)]
    pub(super) context: Context,
    pub(super) secret_file: Option<Spanned<PathBuf>>,
    pub(super) spent: Option<Spanned<SpentIn>>,
    pub(super) spent_tokens: Option<Spanned<usize>>,
    pub(super) on_store_failure: Option<Spanned<OnStoreFailure>>,
    pub(super) state: Option<Spanned<PathBuf>>,
    pub(super) threads: Option<Spanned<usize>>,
    #[serde(default = "milliseconds::<20>")]
    pub(super) max_wait: Spanned<Span>,
    pub(super) issuer: Spanned<Vec<Issuer>>,
}

#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq, Default)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Context {
    #[default]
    Origin,
    Endpoint,
    Limit,
}

#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(super) enum SpentIn {
    Memory,
    Files,
    Redis,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Issuer {
    pub(super) name: Spanned<String>,
    pub(super) token_type: Spanned<u16>,
    pub(super) key_file: Option<Spanned<PathBuf>>,
    pub(super) directory: Option<Spanned<String>>,
    pub(super) directory_ca: Option<Spanned<PathBuf>>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Admin {
    pub(super) address: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AccessLog {
    pub(super) path: String,
}

impl Default for AccessLog {
    fn default() -> Self {
        Self { path: "-".into() }
    }
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Runtime {
    pub(super) threads: Option<Spanned<usize>>,
}
