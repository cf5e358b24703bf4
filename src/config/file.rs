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
    pub(super) timeouts: Timeouts,
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
    pub(super) client_ca: Option<Spanned<PathBuf>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Certificate {
    pub(super) chain: Spanned<PathBuf>,
    pub(super) key: Spanned<PathBuf>,
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
    pub(super) node: Spanned<Vec<Node>>,
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
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Node {
    pub(super) address: Spanned<String>,
    #[serde(default)]
    pub(super) protocol: Protocol,
    pub(super) weight: Option<Spanned<u32>>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Peers {
    pub(super) allow: Option<Vec<Spanned<String>>>,
    #[serde(default)]
    pub(super) named: Vec<Spanned<String>>,
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
    pub(super) max_body: Option<Spanned<Size>>,
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
