//! The configuration: what the operator writes ([`file`]) becomes what the program uses ([`Config`]), checked whole, with
//! the files it names read. An error says file, line and key; as many as there are, not only the first.

mod file;
mod resolve;
mod units;

use crate::admission::{Peers, Policy};
use crate::dialect::Routes;
use crate::download;
use crate::egress;
use crate::limiter::fleet;
use crate::limiter::gcra::Gcra;
use crate::privacypass;
use crate::tls::{Certificate, CertificateFiles, Trust, TrustFiles};
use crate::upstream;
use crate::wire::ProviderName;
use http::HeaderName;
use ipnet::IpNet;
use resolve::Resolver;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A configuration, checked and resolved.
#[derive(Debug)]
pub struct Config {
    /// The provider this gateway stands for.
    pub provider: Provider,
    /// Where strangers come in.
    pub listeners: Vec<Listener>,
    /// The certificates shown to them: at least one, each with the files it is from.
    pub certificates: Vec<(CertificateFiles, Certificate)>,
    /// Session tickets, where there are any.
    pub tickets: Option<TicketSettings>,
    /// How often files of certificates, keys and roots are looked at.
    pub watch_every: Duration,
    /// What connections are held to.
    pub connections: ConnectionLimits,
    /// What HTTP/2 connections are held to.
    pub http2: Http2,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// The Delivery Service's nodes.
    pub upstream: upstream::Settings,
    /// What the Delivery Service learns of a request, and in which fields.
    pub fields: Fields,
    /// The door for this provider's own nodes, to other providers.
    pub egress: Option<Egress>,
    /// What is downloaded for other providers. None: nothing.
    pub proxy_download: Option<download::Settings>,
    /// Files besides those of `certificates` and of listeners whose change is a change of the configuration: of nodes, egress
    /// and tickets.
    pub watched: Vec<PathBuf>,
    /// The text that this was read from.
    pub text: Arc<str>,
    /// Who may send.
    pub peers: Peers,
    /// Octets a body may have, by endpoint name; endpoints not named have their own bound.
    pub max_body: Vec<(&'static str, u64)>,
    /// How much may be held of bodies.
    pub holding: Holding,
    /// The limits, and what tokens do.
    pub policy: Policy,
    /// Octets the limits' state may take on this node.
    pub limit_memory: usize,
    /// The store that a fleet keeps its limits in, and the secret its keys are hashed under.
    pub limit_store: Option<(fleet::Settings, [u8; 16])>,
    /// Privacy Pass, where it is used.
    pub privacy_pass: Option<privacypass::Settings>,
    /// Where health and metrics are.
    pub admin: SocketAddr,
    /// Where the access log goes.
    pub access_log: AccessLog,
    /// Threads that serve.
    pub threads: usize,
    /// What is not wrong, and perhaps not what was meant.
    pub hints: Vec<Error>,
}

/// The host of an authority, without its port.
pub fn host_of(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    }
}

/// The names of a provider, in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provider {
    /// Whom requests may be meant for.
    pub names: Vec<String>,
    /// The domain of its Delivery Service.
    pub ds_domain: String,
}

impl Provider {
    /// Whether a request may be meant for this name.
    pub fn is_recipient(&self, name: &ProviderName<'_>) -> bool {
        self.names.iter().any(|ours| name.is(ours))
    }

    /// Whether an authority (`Host`, `:authority`) is ours, its port aside.
    pub fn is_authority(&self, authority: &str) -> bool {
        self.is_host(host_of(authority))
    }

    /// Whether a Host or an SNI is ours.
    pub fn is_host(&self, host: &str) -> bool {
        self.ds_domain.eq_ignore_ascii_case(host) || self.names.iter().any(|ours| ours.eq_ignore_ascii_case(host))
    }
}

/// A listener.
#[derive(Debug, Clone)]
pub struct Listener {
    /// Where it listens.
    pub address: SocketAddr,
    /// Whether it asks for client certificates.
    pub client_auth: ClientAuth,
    /// Load balancers: their connections begin with a header of the PROXY protocol, version 2.
    pub proxy_protocol: Vec<IpNet>,
    /// What is served there.
    pub routes: Arc<Routes>,
}

/// How much may be held of bodies that are not decided about yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    /// Octets of one, by endpoint name.
    pub most: Vec<(&'static str, usize)>,
    /// Octets of all together.
    pub total: i64,
}

/// Octets of a body that may be held at most.
pub const MOST_HELD: usize = 48 * 1024;

impl Holding {
    /// Bodies of one source that may wait at once: a sixteenth of all that may be held.
    pub fn of_a_source(&self) -> u32 {
        u32::try_from(self.total / 16 / MOST_HELD as i64).unwrap_or(u32::MAX).max(8)
    }

    /// Octets that may be held of a body of an endpoint.
    pub fn of(&self, endpoint: &str) -> usize {
        self.most.iter().find(|(name, _)| *name == endpoint).map_or(MOST_HELD, |(_, most)| *most)
    }
}

/// What is asked of clients.
#[derive(Debug, Clone)]
pub enum ClientAuth {
    /// No certificate.
    Off,
    /// One that is sent must be trusted.
    Optional(Trusted),
    /// One must be sent and be trusted.
    Required(Trusted),
}

/// Whose certificates are trusted, and the files that say so.
#[derive(Debug, Clone)]
pub struct Trusted {
    /// The files.
    pub files: TrustFiles,
    /// What they say.
    pub trust: Arc<Trust>,
}

/// Session tickets.
#[derive(Clone, PartialEq, Eq)]
pub struct TicketSettings {
    /// What their keys are made from, the same on every gateway of a fleet. None: of this process.
    pub secret: Option<Vec<u8>>,
    /// How long a key is in use.
    pub rotation: Duration,
}

impl std::fmt::Debug for TicketSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TicketSettings").field("rotation", &self.rotation).finish_non_exhaustive()
    }
}

/// What connections are held to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Open at once.
    pub max: u32,
    /// Open at once from an address.
    pub per_ip: u32,
    /// Open at once with certificates of a provider.
    pub per_provider: u32,
    /// Handshakes from an address.
    pub handshakes_per_ip: Gcra,
    /// Handshakes in flight.
    pub handshakes_at_once: u32,
    /// Networks without limits per address.
    pub exempt: Vec<IpNet>,
}

/// What HTTP/2 connections are held to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Http2 {
    /// Streams at once.
    pub max_streams: u32,
    /// Octets of a request's fields.
    pub max_header_list: u32,
    /// Frames that move no request on.
    pub control: Gcra,
}

/// The fields that the Delivery Service learns from. None: it is not told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fields {
    /// The authenticated provider.
    pub provider: Option<HeaderName>,
    /// The client's address (RFC 7239).
    pub forwarded: Option<HeaderName>,
    /// The client's certificate (RFC 9440).
    pub client_cert: Option<HeaderName>,
    /// The rest of its chain (RFC 9440).
    pub client_cert_chain: Option<HeaderName>,
    /// What TLS was negotiated.
    pub tls: Option<HeaderName>,
    /// The request's ID.
    pub request_id: Option<HeaderName>,
    /// Its trace (W3C Trace Context).
    pub traceparent: Option<HeaderName>,
}

impl Fields {
    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &HeaderName> {
        [
            &self.provider,
            &self.forwarded,
            &self.client_cert,
            &self.client_cert_chain,
            &self.tls,
            &self.request_id,
            &self.traceparent,
        ]
        .into_iter()
        .flatten()
    }
}

/// The door for this provider's own nodes.
#[derive(Debug, Clone)]
pub struct Egress {
    /// Where it listens.
    pub address: SocketAddr,
    /// Whose certificates its clients must have, and the names of which one is in them. None: it is on the loopback, and
    /// speaks without TLS.
    pub clients: Option<(Trusted, Vec<String>)>,
    /// How other providers are found, and what is shown to them.
    pub discovery: egress::Settings,
    /// The roots that others' servers chain to, as DER.
    pub roots: Vec<Vec<u8>>,
    /// For a connection.
    pub connect_timeout: Duration,
    /// Between two reads of an answer.
    pub read_timeout: Duration,
}

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// From accept to the end of the handshake.
    pub tls_handshake: Duration,
    /// For a whole request head.
    pub headers: Duration,
    /// Between two reads of a body.
    pub body_idle: Duration,
    /// For a whole body.
    pub body_total: Duration,
    /// For an idle connection.
    pub keepalive: Duration,
    /// For requests in flight after SIGTERM.
    pub shutdown: Duration,
}

/// Where the access log goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLog {
    /// Nowhere.
    Off,
    /// To standard output.
    Stdout,
    /// To a file, appended.
    File(PathBuf),
}

/// What is wrong with a configuration, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1; 0 where the file cannot be read at all.
    pub line: usize,
    /// The key, as `table[index].key`, where there is one.
    pub key: String,
    /// What is wrong.
    pub message: String,
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        if !self.key.is_empty() {
            write!(f, ": {}", self.key)?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for Error {}

impl Config {
    /// Reads a configuration file, and the files it names.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn load(path: &Path) -> Result<Self, Vec<Error>> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text),
            Err(e) => Err(vec![Error { file: path.into(), line: 0, key: String::new(), message: e.to_string() }]),
        }
    }

    /// Reads a configuration from `text`; `path` is what errors and relative paths refer to.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Vec<Error>> {
        let mut resolver = Resolver::new(path, text);
        let deserializer = toml::Deserializer::parse(text).map_err(|e| {
            vec![resolver.error(e.span().map_or(0, |span| span.start), String::new(), e.message().to_owned())]
        })?;
        let file = serde_path_to_error::deserialize(deserializer).map_err(|e| {
            let at = e.inner().span().map_or(0, |span| span.start);
            // A value with its place is a table of a name that is no operator's.
            let key = e.path().to_string().replace(".$__serde_spanned_private_value", "");
            let key = Some(key).filter(|path| path != ".").unwrap_or_default();
            vec![resolver.error(at, key, e.inner().message().to_owned())]
        })?;
        let config = resolver.config(file, text.into());
        match config {
            Some(config) if resolver.is_content() => Ok(Self { hints: resolver.into_hints(), ..config }),
            _ => Err(resolver.into_errors()),
        }
    }
}

/// A duration as an operator writes it, in a file or as an argument: "250ms", "10s", "5m", "1h", "1d".
///
/// # Errors
/// It is none.
pub fn duration(text: &str) -> Result<std::time::Duration, String> {
    units::span(text).ok_or_else(|| format!("{text:?} is no duration like \"10s\", \"5m\", \"1h\", \"1d\""))
}

/// Octets of the system's randomness.
pub fn random<const N: usize>() -> Option<[u8; N]> {
    let mut octets = [0; N];
    aws_lc_rs::rand::fill(&mut octets).ok()?;
    Some(octets)
}
