//! From what the operator wrote to what the program uses: everything is checked, the files it names are read, and what is
//! wrong is noted with its place, so that all of it can be said at once.

mod connections;
mod dialects;
mod download;
mod egress;
mod limits;
mod privacy_pass;
mod tls;
mod upstream;

use super::{AccessLog, ClientAuth, Config, Error, Provider, Timeouts, file, units};
use crate::admission::Policy;
use crate::dialect;
use crate::limiter::fleet;
use crate::wire::ProviderName;
use limits::Around;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use toml::Spanned;

/// More limits than anybody needs, and as many as one script of Redis takes the keys of.
const MOST_LIMITS: usize = 1024;

/// Collects errors while a file is resolved.
pub(super) struct Resolver<'a> {
    path: &'a Path,
    text: &'a str,
    errors: Vec<Error>,
    hints: Vec<Error>,
    /// Files whose change is a change of the configuration.
    watched: Vec<PathBuf>,
}

impl<'a> Resolver<'a> {
    pub(super) fn new(path: &'a Path, text: &'a str) -> Self {
        Self { path, text, errors: vec![], hints: vec![], watched: vec![] }
    }

    /// Whether nothing was wrong so far.
    pub(super) fn is_content(&self) -> bool {
        self.errors.is_empty()
    }

    pub(super) fn into_errors(self) -> Vec<Error> {
        self.errors
    }

    pub(super) fn into_hints(self) -> Vec<Error> {
        self.hints
    }

    /// An error at an octet of the file.
    pub(super) fn error(&self, at: usize, key: String, message: String) -> Error {
        let line = 1 + self.text.bytes().take(at).filter(|b| *b == b'\n').count();
        Error { file: self.path.into(), line, key, message }
    }

    /// Notes an error at a value and goes on.
    fn wrong<T>(&mut self, at: &Spanned<T>, key: impl Into<String>, message: impl Into<String>) {
        let error = self.error(at.span().start, key.into(), message.into());
        self.errors.push(error);
    }

    /// Notes what is not wrong, and perhaps not what was meant.
    fn hint<T>(&mut self, at: &Spanned<T>, key: impl Into<String>, message: impl Into<String>) {
        let hint = self.error(at.span().start, key.into(), message.into());
        self.hints.push(hint);
    }

    fn beside(&self, path: &Path) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("")).join(path)
    }

    fn read(&mut self, path: &Spanned<PathBuf>, key: &str) -> Option<Vec<u8>> {
        let full = self.beside(path.get_ref());
        match std::fs::read(&full) {
            Ok(octets) => Some(octets),
            Err(e) => {
                self.wrong(path, key, format!("{}: {e}", full.display()));
                None
            }
        }
    }

    /// A provider name, or where `pattern` allows it one that begins with `*.`; in lower case.
    fn name(&mut self, name: &Spanned<String>, key: &str, pattern: bool) -> Option<String> {
        let bare = if pattern { name.get_ref().strip_prefix("*.").unwrap_or(name.get_ref()) } else { name.get_ref() };
        match ProviderName::from_bytes(bare.as_bytes()) {
            Ok(_) => Some(name.get_ref().to_ascii_lowercase()),
            Err(e) => {
                self.wrong(name, key, format!("{:?}: {e}", name.get_ref()));
                None
            }
        }
    }

    fn address(&mut self, address: &Spanned<String>, key: &str) -> Option<SocketAddr> {
        match address.get_ref().parse() {
            Ok(address) => Some(address),
            Err(_) => {
                self.wrong(address, key, format!("{:?} is no address like \"0.0.0.0:443\"", address.get_ref()));
                None
            }
        }
    }

    /// Resolves a file; what is wrong with it is noted.
    pub(super) fn config(&mut self, file: file::File, text: Arc<str>) -> Option<Config> {
        let provider = self.provider(&file.provider);
        let paths = self.paths(&file.endpoints);
        let listeners = self.listeners(&file.listener, &paths);
        let holding = self.holding(&file.endpoints, &file.connections);
        let certificates = self.certificates(&file.certificate, provider.as_ref());
        let tickets = self.tickets(&file.tls);
        let upstream = self.upstream(&file.delivery_service);
        let fields = self.fields(&file.delivery_service.fields);
        let authenticates = listeners.iter().any(|l| !matches!(l.client_auth, ClientAuth::Off));
        let peers = self.peers(&file.peers);
        let egress = match &file.egress {
            Some(table) => Some(self.egress(table, certificates.first().map(|(_, certificate)| certificate))?),
            None => None,
        };
        let proxy_download =
            file.proxy_download.as_ref().and_then(|table| self.proxy_download(table, provider.as_ref()));

        let limit_store = file.limits.redis.as_ref().and_then(|redis| self.redis(redis, &file.limits));
        let mut policy = Policy {
            limits: vec![],
            concurrency: vec![],
            endpoint_tokens: vec![],
            ipv6_prefix: file.limits.ipv6_prefix.as_ref().map_or(64, |prefix| *prefix.get_ref()),
        };
        let prefix = file.limits.ipv6_prefix.as_ref();
        if let Some(prefix) = prefix.filter(|prefix| !(1..=128).contains(prefix.get_ref())) {
            self.wrong(prefix, "limits.ipv6_prefix", "a prefix has 1 to 128 bits");
        }
        if let Some(memory) = file.limits.memory.as_ref().filter(|memory| memory.get_ref().0 < 256 << 10) {
            self.wrong(memory, "limits.memory", "256KiB is the least");
        }
        let exempt = self.networks(&file.limits.exempt, "limits.exempt");
        let connections = self.connections(&file.connections);
        let http2 = self.http2(&file.http2);
        let max_body = self.endpoints(&file.endpoints, &mut policy);
        if let Some(last) = file.limit.get(MOST_LIMITS) {
            self.wrong(&last.name, format!("limit[{MOST_LIMITS}]"), format!("{MOST_LIMITS} limits are the most"));
        }
        let (redis, served) = (file.limits.redis.as_ref(), dialects::served(&listeners));
        let around = Around { authenticates, exempt, redis, max_body: &max_body, served: &served };
        for (i, limit) in file.limit.iter().enumerate() {
            if file.limit.iter().take(i).any(|other| other.name.get_ref() == limit.name.get_ref()) {
                self.wrong(&limit.name, format!("limit[{i}].name"), "another limit has this name");
            }
            self.limit(i, limit, &around, &mut policy);
        }
        let privacy_pass = match &file.privacy_pass {
            Some(table) => self.privacy_pass(table, provider.as_ref(), file.limits.redis.is_some()),
            None => None,
        };
        if policy.uses_tokens() && file.privacy_pass.is_none() {
            let error = self.error(
                self.text.len(),
                "privacy_pass".into(),
                "missing: an endpoint or a limit asks for tokens".into(),
            );
            self.errors.push(error);
        }

        let admin = match &file.admin.address {
            Some(address) => self.address(address, "admin.address"),
            None => Some(SocketAddr::from(([127, 0, 0, 1], 9090))),
        };
        if let (Some(at), Some(admin)) = (&file.admin.address, admin)
            && (listeners.iter().any(|l| l.address == admin) || egress.as_ref().is_some_and(|e| e.address == admin))
        {
            self.wrong(at, "admin.address", "a listener is at this address");
        }
        if let (Some(table), Some(egress)) = (&file.egress, &egress)
            && listeners.iter().any(|l| l.address == egress.address)
        {
            self.wrong(&table.address, "egress.address", "a listener is at this address");
        }
        let access_log = match file.access_log.path.as_str() {
            "off" => AccessLog::Off,
            "-" => AccessLog::Stdout,
            path => AccessLog::File(self.beside(Path::new(path))),
        };
        let threads = match file.runtime.threads.as_ref().map(|threads| (*threads.get_ref(), threads)) {
            None | Some((0, _)) => std::thread::available_parallelism().map_or(1, usize::from),
            Some((threads @ 1..=1024, _)) => threads,
            Some((_, at)) => {
                self.wrong(at, "runtime.threads", "1024 are the most");
                1
            }
        };
        let t = &file.timeouts;
        Some(Config {
            provider: provider?,
            listeners,
            certificates,
            tickets,
            watch_every: file.tls.watch_every.0,
            connections: connections?,
            http2: http2?,
            timeouts: Timeouts {
                tls_handshake: t.tls_handshake.0,
                headers: t.headers.0,
                body_idle: t.body_idle.0,
                body_total: t.body_total.0,
                keepalive: t.keepalive.0,
                shutdown: t.shutdown.0,
            },
            upstream: upstream?,
            fields,
            egress,
            proxy_download,
            watched: std::mem::take(&mut self.watched),
            text,
            peers,
            max_body,
            holding,
            policy,
            limit_memory: limit_memory(&file.limits),
            limit_store,
            privacy_pass,
            admin: admin?,
            access_log,
            threads,
            hints: vec![],
        })
    }

    fn provider(&mut self, table: &file::Provider) -> Option<Provider> {
        if table.names.get_ref().is_empty() {
            self.wrong(&table.names, "provider.names", "at least one name is needed");
        }
        let names = table.names.get_ref().iter().filter_map(|name| self.name(name, "provider.names", false)).collect();
        let ds_domain = self.name(&table.ds_domain, "provider.ds_domain", false)?;
        Some(Provider { names, ds_domain })
    }

    fn endpoints(
        &mut self,
        tables: &std::collections::BTreeMap<Spanned<String>, file::EndpointTable>,
        policy: &mut Policy,
    ) -> Vec<(&'static str, u64)> {
        let mut max_body = vec![];
        for (name, table) in tables {
            let key = |part: &str| format!("endpoints.{}{part}", name.get_ref());
            let Some(endpoint) = dialect::endpoint(name.get_ref()) else {
                self.wrong(
                    name,
                    key(""),
                    format!("no such endpoint; there are {}", names(dialect::endpoints().map(|e| e.name))),
                );
                continue;
            };
            if let Some(size) = table.max_body.as_ref().filter(|size| !endpoint.takes_body() || size.get_ref().0 == 0) {
                self.wrong(size, key(".max_body"), "this endpoint takes no body, or this takes none");
            }
            max_body.extend(table.max_body.as_ref().map(|size| (endpoint.name, size.get_ref().0)));
            let token = self.token(name, table.token, table.token_rate, table.token_burst.as_ref(), |part| {
                key(&format!(".{part}"))
            });
            if let Some(burst) = table.token_burst.as_ref().filter(|burst| burst.get_ref().octets) {
                self.wrong(burst, key(".token_burst"), "an endpoint's token is for limits of requests, not of octets");
            }
            policy.endpoint_tokens.extend(endpoint.operations.iter().map(|o| (o.id, token)));
        }
        max_body
    }
}

/// Octets of the limits' state on this node.
fn limit_memory(limits: &file::Limits) -> usize {
    limits.memory.as_ref().map_or(64 << 20, |memory| usize::try_from(memory.get_ref().0).unwrap_or(usize::MAX))
}

fn names(names: impl Iterator<Item = &'static str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}
