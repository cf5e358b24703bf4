//! From what the operator wrote to what the program uses: everything is checked, the files it names are read, and what is
//! wrong is noted with its place, so that all of it can be said at once.

mod limits;
mod privacy_pass;

use super::{AccessLog, ClientAuth, Config, Error, Listener, Provider, Timeouts, file, units};
use crate::admission::{Peers, Policy};
use crate::dialect;
use crate::limiter::fleet;
use crate::tls::{self, CertificateStore};
use crate::upstream;
use crate::wire::ProviderName;
use limits::Around;
use std::net::{SocketAddr, ToSocketAddrs};
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
}

impl<'a> Resolver<'a> {
    pub(super) fn new(path: &'a Path, text: &'a str) -> Self {
        Self { path, text, errors: vec![], hints: vec![] }
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
    pub(super) fn config(&mut self, file: file::File) -> Option<Config> {
        let provider = self.provider(&file.provider);
        let listeners = self.listeners(&file.listener);
        let certificates = self.certificates(&file.certificate);
        let upstream = self.upstream(&file.delivery_service);
        let authenticates = listeners.iter().any(|l| !matches!(l.client_auth, ClientAuth::Off));

        let allow = file
            .peers
            .allow
            .as_ref()
            .map(|names| names.iter().filter_map(|name| self.name(name, "peers.allow", true)).collect());
        let named = file.peers.named.iter().filter_map(|name| self.name(name, "peers.named", false)).collect();

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
        let max_body = self.endpoints(&file.endpoints, &mut policy);
        if let Some(last) = file.limit.get(MOST_LIMITS) {
            self.wrong(&last.name, format!("limit[{MOST_LIMITS}]"), format!("{MOST_LIMITS} limits are the most"));
        }
        let around = Around { authenticates, exempt, redis: file.limits.redis.as_ref(), max_body: &max_body };
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
            && listeners.iter().any(|l| l.address == admin)
        {
            self.wrong(at, "admin.address", "a listener is at this address");
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
            certificates: Arc::new(certificates?),
            timeouts: Timeouts {
                tls_handshake: t.tls_handshake.0,
                headers: t.headers.0,
                body_idle: t.body_idle.0,
                body_total: t.body_total.0,
                keepalive: t.keepalive.0,
                shutdown: t.shutdown.0,
            },
            upstream: upstream?,
            peers: Peers { allow, named },
            max_body,
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

    fn listeners(&mut self, tables: &Spanned<Vec<file::Listener>>) -> Vec<Listener> {
        if tables.get_ref().is_empty() {
            self.wrong(tables, "listener", "at least one is needed");
        }
        let mut listeners = vec![];
        for (i, table) in tables.get_ref().iter().enumerate() {
            let address = self.address(&table.address, &format!("listener[{i}].address"));
            let key = format!("listener[{i}].client_ca");
            let roots = table.client_ca.as_ref().and_then(|path| {
                let pem = self.read(path, &key)?;
                match tls::roots(&pem) {
                    Ok(roots) => Some(Arc::new(roots)),
                    Err(e) => {
                        self.wrong(path, key.as_str(), format!("{}: {e}", path.get_ref().display()));
                        None
                    }
                }
            });
            let client_auth = match (table.client_certificates, roots) {
                (file::ClientCertificates::Off, _) => {
                    if let Some(path) = &table.client_ca {
                        self.wrong(path, key, "client_certificates is off: nothing is verified by this");
                    }
                    ClientAuth::Off
                }
                (file::ClientCertificates::Optional, Some(roots)) => ClientAuth::Optional(roots),
                (file::ClientCertificates::Required, Some(roots)) => ClientAuth::Required(roots),
                (_, None) => {
                    if table.client_ca.is_none() {
                        self.wrong(&table.address, key, "missing: client certificates are asked for");
                    }
                    ClientAuth::Off
                }
            };
            if listeners.iter().any(|other: &Listener| Some(other.address) == address) {
                self.wrong(&table.address, format!("listener[{i}].address"), "another listener is at this address");
            }
            listeners.extend(address.map(|address| Listener { address, client_auth }));
        }
        listeners
    }

    fn certificates(&mut self, tables: &Spanned<Vec<file::Certificate>>) -> Option<CertificateStore> {
        let mut certificates = vec![];
        for (i, table) in tables.get_ref().iter().enumerate() {
            let chain = self.read(&table.chain, &format!("certificate[{i}].chain"));
            let key = self.read(&table.key, &format!("certificate[{i}].key"));
            let (Some(chain), Some(key)) = (chain, key) else { continue };
            match tls::Certificate::new(&chain, &key) {
                Ok(certificate) => certificates.push(certificate),
                Err(e) => {
                    let part = if e.is_of_key() { "key" } else { "chain" };
                    let at = if e.is_of_key() { &table.key } else { &table.chain };
                    let message = format!("{}: {e}", at.get_ref().display());
                    self.wrong(at, format!("certificate[{i}].{part}"), message);
                }
            }
        }
        let store = CertificateStore::new(certificates);
        if store.is_none() && self.errors.is_empty() {
            self.wrong(tables, "certificate", "at least one is needed");
        }
        store
    }

    fn upstream(&mut self, table: &file::DeliveryService) -> Option<upstream::Settings> {
        if table.node.get_ref().is_empty() {
            self.wrong(&table.node, "delivery_service.node", "at least one is needed");
        }
        if table.node.get_ref().len() > upstream::MAX_NODES {
            self.wrong(&table.node, "delivery_service.node", format!("{} are the most", upstream::MAX_NODES));
        }
        let mut nodes = vec![];
        for (i, node) in table.node.get_ref().iter().enumerate() {
            let key = format!("delivery_service.node[{i}].address");
            let address = match node.address.get_ref().to_socket_addrs().map(|mut found| found.next()) {
                Ok(Some(address)) if address.port() > 0 => address,
                Ok(_) | Err(_) => {
                    let message = format!("{:?} is no host:port that resolves", node.address.get_ref());
                    self.wrong(&node.address, key, message);
                    continue;
                }
            };
            if let Some(weight) = node.weight.as_ref().filter(|weight| !(1..=256).contains(weight.get_ref())) {
                self.wrong(weight, format!("delivery_service.node[{i}].weight"), "a weight is 1 to 256");
                continue;
            }
            if nodes.iter().any(|other: &upstream::NodeSettings| other.address == address) {
                self.wrong(&node.address, key, format!("another node is at {address}"));
                continue;
            }
            nodes.push(upstream::NodeSettings {
                address,
                h2c: node.protocol == file::Protocol::H2c,
                weight: node.weight.as_ref().map_or(1, |weight| *weight.get_ref()),
            });
        }
        Some(upstream::Settings {
            nodes,
            by_group: table.balance == file::Balance::Group,
            connect_timeout: table.connect_timeout.0,
            read_timeout: table.read_timeout.0,
            write_timeout: table.write_timeout.0,
            keepalive: table.keepalive.0,
            eject_for: table.eject_for.0,
        })
    }

    fn endpoints(
        &mut self,
        tables: &std::collections::BTreeMap<Spanned<String>, file::EndpointTable>,
        policy: &mut Policy,
    ) -> Vec<(&'static str, u64)> {
        let mut max_body = vec![];
        for (name, table) in tables {
            let key = |part: &str| format!("endpoints.{}{part}", name.get_ref());
            let Some(endpoint) = dialect::endpoints().find(|e| e.name == name.get_ref()) else {
                self.wrong(
                    name,
                    key(""),
                    format!("no such endpoint; there are {}", names(dialect::endpoints().map(|e| e.name))),
                );
                continue;
            };
            if let Some(size) =
                table.max_body.as_ref().filter(|size| endpoint.reader.is_none() || size.get_ref().0 == 0)
            {
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
