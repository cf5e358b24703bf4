//! From what the operator wrote to what the program uses: everything is checked, the files it names are read, and what is
//! wrong is noted with its place, so that all of it can be said at once.

use super::{AccessLog, ClientAuth, Config, Error, Listener, Provider, Timeouts, file, random, units};
use crate::admission::{Concurrency, KeyParts, Limit, Peers, Policy, Scope, TokenUse, Unit};
use crate::dialect::{self, Operation};
use crate::limiter::gcra::Gcra;
use crate::limiter::{OnFailure, fleet};
use crate::privacypass::{Challenges, Issuer, Origin};
use crate::tls::{self, CertificateStore};
use crate::upstream;
use crate::wire::ProviderName;
use ipnet::IpNet;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use toml::Spanned;

/// What a request may ask for at once before a burst that is smaller is worth a hint.
const MANY: u32 = 256;

/// More limits than anybody needs, and as many as one script of Redis takes the keys of.
const MOST_LIMITS: usize = 1024;

/// What else a limit's table is read by.
struct Around<'a> {
    /// Some listener asks for client certificates.
    authenticates: bool,
    /// Networks that all limits leave out.
    exempt: Vec<IpNet>,
    redis: Option<&'a file::Redis>,
    max_body: &'a [(&'static str, u64)],
}

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
            Some(table) => self.privacy_pass(table, provider.as_ref()),
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

    fn token<T>(
        &mut self,
        at: &Spanned<T>,
        token: file::Token,
        rate: Option<units::Rate>,
        burst: Option<&Spanned<units::Burst>>,
        key: impl Fn(&str) -> String,
    ) -> TokenUse {
        match (token, rate, burst) {
            (file::Token::Off, None, None) => TokenUse::Off,
            (file::Token::Required, None, None) => TokenUse::Required,
            (file::Token::TopUp, Some(rate), Some(burst)) => {
                self.gcra(rate, burst, &key("token_burst")).map_or(TokenUse::Off, TokenUse::TopUp)
            }
            (file::Token::TopUp, _, _) => {
                self.wrong(at, key("token"), "top-up needs token_rate and token_burst: the second limit");
                TokenUse::Off
            }
            (_, _, _) => {
                self.wrong(at, key("token_rate"), "token_rate and token_burst are for token = \"top-up\"");
                TokenUse::Off
            }
        }
    }

    fn limit(&mut self, i: usize, table: &file::Limit, around: &Around<'_>, policy: &mut Policy) {
        let key = |part: &str| format!("limit[{i}].{part}");
        let Some(scope) = self.scope(table, around, key) else { return };
        match (&table.concurrent, &table.rate, &table.burst) {
            (Some(most), None, None) => policy.concurrency.extend(self.concurrency(table, scope, most, key)),
            (None, Some(rate), Some(burst)) => {
                policy.limits.extend(self.rate_limit(table, scope, (rate, burst), around, key));
            }
            _ => self.wrong(&table.name, key("rate"), "a limit has a rate and a burst, or it has concurrent"),
        }
    }

    /// What a limit is about.
    fn scope(&mut self, table: &file::Limit, around: &Around<'_>, key: impl Fn(&str) -> String) -> Option<Scope> {
        let name = table.name.get_ref();
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
            self.wrong(&table.name, key("name"), "a name is made of letters, digits, '-', '_' and '.'");
        }
        let covered = self.covered(&table.endpoints, &table.operations, &table.name, &key);
        let mut parts = KeyParts::default();
        for part in table.key.get_ref() {
            let of = match part {
                file::KeyPart::Ip => &mut parts.ip,
                file::KeyPart::Provider => &mut parts.provider,
                file::KeyPart::Group => &mut parts.group,
                file::KeyPart::Member => &mut parts.member,
                file::KeyPart::Target => &mut parts.target,
                file::KeyPart::Endpoint => &mut parts.endpoint,
            };
            if std::mem::replace(of, true) {
                self.wrong(&table.key, key("key"), format!("{part:?} is named twice").to_lowercase());
            }
        }
        // A missing attribute is a bypass: what an endpoint can never say is no key for it.
        for operation in &covered {
            let supplies = operation.supplies;
            let lacks = [
                ("group", parts.group && !supplies.group),
                ("member", parts.member && !supplies.member),
                ("target", parts.target && !supplies.target),
            ];
            if let Some((attribute, _)) = lacks.iter().find(|(_, lacks)| *lacks) {
                let message = format!(
                    "{} never says a {attribute}: name the endpoints or operations this limit is for",
                    operation.name
                );
                self.wrong(&table.key, key("key"), message);
                return None;
            }
        }
        if parts.provider && !around.authenticates {
            let message = "no listener asks for client certificates: a provider is never authenticated";
            self.wrong(&table.key, key("key"), message);
        }
        let by_provider = parts.provider || parts.group || parts.member || parts.target;
        if around.redis.is_some_and(|redis| redis.partition == file::Partition::Provider) && !by_provider {
            let message = "with limits.redis.partition = \"provider\" this counts each provider's requests apart";
            self.hint(&table.key, key("key"), message);
        }
        let mut exempt = self.networks(&table.exempt, &key("exempt"));
        exempt.extend(&around.exempt);
        Some(Scope {
            name: name.clone(),
            covers: covered.iter().fold(0, |bits, operation| bits | 1 << operation.id),
            key: parts,
            enforce: table.mode == file::Mode::Enforce,
            exempt,
        })
    }

    fn networks(&mut self, networks: &[Spanned<String>], key: &str) -> Vec<IpNet> {
        let parse = |network: &Spanned<String>| {
            let address = || network.get_ref().parse::<std::net::IpAddr>().ok().map(IpNet::from);
            network.get_ref().parse::<IpNet>().ok().or_else(address)
        };
        let mut parsed = vec![];
        for network in networks {
            match parse(network) {
                Some(known) => parsed.push(known.trunc()),
                None => {
                    let message =
                        format!("{:?} is no network like \"10.0.0.0/8\", \"2001:db8::/32\"", network.get_ref());
                    self.wrong(network, key, message);
                }
            }
        }
        parsed
    }

    fn concurrency(
        &mut self,
        table: &file::Limit,
        scope: Scope,
        most: &Spanned<u32>,
        key: impl Fn(&str) -> String,
    ) -> Option<Concurrency> {
        let mut overrides: Vec<(String, u32)> = vec![];
        for (n, of) in table.overrides.iter().enumerate() {
            let key = |part: &str| key(&format!("override[{n}].{part}"));
            let Some(most) = of.concurrent.as_ref().filter(|_| of.rate.is_none() && of.burst.is_none()) else {
                self.wrong(
                    &of.provider,
                    key("concurrent"),
                    "this limit has concurrent, and so has another for a provider",
                );
                continue;
            };
            let name = self.overridden(&of.provider, overrides.iter().map(|(name, _)| name), &key("provider"));
            overrides.extend(name.map(|name| (name, *most.get_ref())));
        }
        if *most.get_ref() == 0 {
            self.wrong(most, key("concurrent"), "no request could pass");
        }
        if table.token != file::Token::Off || table.token_rate.is_some() || table.token_burst.is_some() {
            self.wrong(&table.name, key("token"), "a token helps with rates, not with what is under way");
        }
        if let Some(at) = &table.on_store_failure {
            self.wrong(at, key("on_store_failure"), "what is under way each node counts by itself");
        }
        Some(Concurrency { scope, most: *most.get_ref(), overrides })
    }

    fn rate_limit(
        &mut self,
        table: &file::Limit,
        scope: Scope,
        (rate, burst): (&Spanned<units::Rate>, &Spanned<units::Burst>),
        around: &Around<'_>,
        key: impl Fn(&str) -> String,
    ) -> Option<Limit> {
        let unit = if rate.get_ref().octets { Unit::Octets } else { Unit::Requests };
        let gcra = self.gcra(*rate.get_ref(), burst, &key("burst"));
        let mut overrides: Vec<(String, Gcra)> = vec![];
        for (n, of) in table.overrides.iter().enumerate() {
            let key = |part: &str| key(&format!("override[{n}].{part}"));
            let (Some(rate), Some(burst), None) = (&of.rate, &of.burst, &of.concurrent) else {
                self.wrong(
                    &of.provider,
                    key("rate"),
                    "this limit has a rate and a burst, and so has another for a provider",
                );
                continue;
            };
            if rate.get_ref().octets != (unit == Unit::Octets) {
                self.wrong(rate, key("rate"), "the limit counts the one, octets or requests, and this the other");
            }
            let name = self.overridden(&of.provider, overrides.iter().map(|(name, _)| name), &key("provider"));
            if !around.authenticates {
                let message = "no listener asks for client certificates: a provider is never authenticated";
                self.wrong(&of.provider, key("provider"), message);
            }
            overrides.extend(name.zip(self.gcra(*rate.get_ref(), burst, &key("burst"))));
            self.hint_of_cost(&scope, unit, burst, around, &key("burst"));
        }
        let token = self.token(&table.name, table.token, table.token_rate, table.token_burst.as_ref(), &key);
        if token == TokenUse::Required && !scope.enforce {
            self.wrong(&table.name, key("token"), "a shadow refuses nobody, so it can require no token");
        }
        if let Some(second) =
            table.token_burst.as_ref().filter(|second| second.get_ref().octets != rate.get_ref().octets)
        {
            self.wrong(second, key("token_burst"), "the limit counts the one, octets or requests, and this the other");
        }
        if let Some(at) = table.on_store_failure.as_ref().filter(|_| around.redis.is_none()) {
            self.hint(
                at,
                key("on_store_failure"),
                "there is no [limits.redis]: limits are this node's own and do not fail",
            );
        }
        self.hint_of_cost(&scope, unit, burst, around, &key("burst"));
        Some(Limit {
            scope,
            unit,
            gcra: gcra?,
            overrides,
            token,
            on_store_failure: match table.on_store_failure.as_ref().map(Spanned::get_ref) {
                Some(file::OnStoreFailure::Local) | None => OnFailure::Local,
                Some(file::OnStoreFailure::Open) => OnFailure::Open,
                Some(file::OnStoreFailure::Closed) => OnFailure::Closed,
            },
        })
    }

    /// What costs more than the burst is refused always: that is said of what may cost so much.
    fn hint_of_cost(
        &mut self,
        scope: &Scope,
        unit: Unit,
        burst: &Spanned<units::Burst>,
        around: &Around<'_>,
        key: &str,
    ) {
        let count = burst.get_ref().count;
        for endpoint in dialect::endpoints() {
            let covered = |operation: &&&Operation| scope.covers >> operation.id & 1 == 1;
            let Some(operation) = endpoint.operations.iter().find(covered) else { continue };
            let bound = around.max_body.iter().find(|(name, _)| *name == endpoint.name);
            let bound = bound.map_or(endpoint.max_body, |(_, bound)| *bound);
            if unit == Unit::Octets && u64::from(count) < bound {
                let message = format!(
                    "a body of {} may have {bound} octets; of more than this burst, {count}, it is always refused",
                    endpoint.name
                );
                self.hint(burst, key, message);
            } else if unit == Unit::Requests && operation.supplies.many && count < MANY {
                let message = format!(
                    "{} costs as much as it asks for at once; for more than this burst, {count}, it is always refused",
                    operation.name
                );
                self.hint(burst, key, message);
            }
        }
    }

    /// The provider of an override, which no other is for.
    fn overridden<'n>(
        &mut self,
        provider: &Spanned<String>,
        mut others: impl Iterator<Item = &'n String>,
        key: &str,
    ) -> Option<String> {
        let name = self.name(provider, key, false);
        if others.any(|other| Some(other) == name.as_ref()) {
            self.wrong(provider, key, "another override is for this provider");
        }
        name
    }

    fn gcra(&mut self, rate: units::Rate, burst: &Spanned<units::Burst>, key: &str) -> Option<Gcra> {
        let count = burst.get_ref().count;
        if rate.octets != burst.get_ref().octets {
            self.wrong(
                burst,
                key,
                "rate and burst count the same: octets (\"10MiB/s\", \"64MiB\") or requests (\"5/s\", 20)",
            );
            return None;
        }
        let gcra = match rate.octets {
            true => Gcra::of_octets(rate.count, rate.period, count),
            false => Gcra::new(u32::try_from(rate.count).unwrap_or(u32::MAX), rate.period, count),
        };
        if gcra.is_none() {
            let message = "a burst is at least 1 and comes back within a century, and no cell of a rate takes less than a \
                           nanosecond";
            self.wrong(burst, key, message);
        }
        gcra
    }

    /// The store that a fleet keeps its limits in.
    fn redis(&mut self, table: &file::Redis, limits: &file::Limits) -> Option<(fleet::Settings, [u8; 16])> {
        let key = |part: &str| format!("limits.redis.{part}");
        let mut nodes = vec![];
        for node in table.nodes.get_ref() {
            let parsed = node.get_ref().rsplit_once(':').and_then(|(host, port)| {
                let host = host.trim_start_matches('[').trim_end_matches(']');
                Some((host.to_owned(), port.parse::<u16>().ok().filter(|port| *port > 0)?))
            });
            match parsed.filter(|(host, _)| !host.is_empty()) {
                Some(node) => nodes.push(node),
                None => self.wrong(node, key("nodes"), format!("{:?} is no host:port", node.get_ref())),
            }
        }
        if table.nodes.get_ref().is_empty() {
            self.wrong(&table.nodes, key("nodes"), "at least one is needed");
        }
        let tls = match &table.tls_ca {
            None => None,
            Some(path) => {
                let pem = self.read(path, &key("tls_ca"))?;
                match tls::client_config(&pem) {
                    Ok(config) => Some(fleet::Tls { config: Arc::new(config), ca_pem: pem }),
                    Err(e) => {
                        self.wrong(path, key("tls_ca"), format!("{}: {e}", path.get_ref().display()));
                        None
                    }
                }
            }
        };
        let password = match &table.password_file {
            None => None,
            Some(path) => match String::from_utf8(self.read(path, &key("password_file"))?) {
                Ok(password) if !password.trim_end().is_empty() => Some(password.trim_end().to_owned()),
                _ => {
                    self.wrong(path, key("password_file"), "it holds no password in UTF-8");
                    None
                }
            },
        };
        let secret = self.read(&table.secret_file, &key("secret_file"))?;
        if secret.len() < 16 {
            self.wrong(
                &table.secret_file,
                key("secret_file"),
                "a secret has 16 octets or more, the same on every node",
            );
        }
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &secret);
        let secret = *digest.as_ref().first_chunk::<16>()?;
        let prefix = table.prefix.as_ref().map_or("moh", |prefix| prefix.get_ref());
        if let Some(at) = table.prefix.as_ref().filter(|_| prefix.is_empty() || prefix.contains(['{', '}', ' '])) {
            self.wrong(at, key("prefix"), "a prefix has no braces and no blanks, and is not empty");
        }
        if !(Duration::from_millis(2)..=Duration::from_millis(500)).contains(&table.timeout.get_ref().0) {
            self.wrong(&table.timeout, key("timeout"), "2ms to 500ms");
        }
        if table.nodes.get_ref().len() > 1 && !table.cluster {
            let message =
                "the first that answers and takes writes is used: two that do, apart from each other, are two limits";
            self.hint(&table.nodes, key("nodes"), message);
        }
        if let Some(at) = table.connections.as_ref().filter(|n| !(1..=16).contains(n.get_ref())) {
            self.wrong(at, key("connections"), "1 to 16");
        }
        if let Some(at) = table.lease_idle.as_ref().filter(|idle| idle.get_ref().0 < Duration::from_millis(100)) {
            self.wrong(at, key("lease_idle"), "100ms is the least");
        }
        if let Some(at) = table.lease_share.as_ref().filter(|share| *share.get_ref() == 0) {
            self.wrong(at, key("lease_share"), "at least 1: the whole burst");
        }
        let leased = table.mode == file::RedisMode::Leased;
        if let Some(at) = table.lease_share.as_ref().filter(|_| !leased) {
            self.hint(at, key("lease_share"), "it is for mode = \"leased\"");
        }
        if let Some(at) = table.lease_idle.as_ref().filter(|_| !leased) {
            self.hint(at, key("lease_idle"), "it is for mode = \"leased\"");
        }
        let settings = fleet::Settings {
            nodes,
            cluster: table.cluster,
            tls,
            username: table.username.clone(),
            password,
            prefix: prefix.to_owned(),
            partition_by_provider: table.partition == file::Partition::Provider,
            timeout: table.timeout.get_ref().0,
            connections: table.connections.as_ref().map_or(2, |n| *n.get_ref()),
            mode: match leased {
                false => fleet::Mode::Strict,
                true => fleet::Mode::Leased {
                    share: table.lease_share.as_ref().map_or(10, |share| *share.get_ref()),
                    idle: table.lease_idle.as_ref().map_or(Duration::from_secs(1), |idle| idle.get_ref().0),
                },
            },
            // What a node remembers of a key takes 200 octets or so: less room than the memory it falls back to.
            keys: limit_memory(limits) / 512,
        };
        Some((settings, secret))
    }

    fn covered(
        &mut self,
        endpoints: &Option<Vec<Spanned<String>>>,
        operations: &Option<Vec<Spanned<String>>>,
        at: &Spanned<String>,
        key: impl Fn(&str) -> String,
    ) -> Vec<&'static Operation> {
        if endpoints.is_none() && operations.is_none() {
            return dialect::operations().collect();
        }
        if endpoints.iter().chain(operations).all(Vec::is_empty) {
            self.wrong(at, key("endpoints"), "this limit covers nothing");
        }
        let mut covered = vec![];
        for name in endpoints.iter().flatten() {
            match dialect::endpoints().find(|e| e.name == name.get_ref()) {
                Some(endpoint) => covered.extend(endpoint.operations),
                None => {
                    let message = format!(
                        "no endpoint {:?}; there are {}",
                        name.get_ref(),
                        names(dialect::endpoints().map(|e| e.name))
                    );
                    self.wrong(name, key("endpoints"), message);
                }
            }
        }
        for name in operations.iter().flatten() {
            match dialect::operations().find(|o| o.name == name.get_ref()) {
                Some(operation) => covered.push(operation),
                None => {
                    let message = format!(
                        "no operation {:?}; there are {}",
                        name.get_ref(),
                        names(dialect::operations().map(|o| o.name))
                    );
                    self.wrong(name, key("operations"), message);
                }
            }
        }
        covered
    }

    fn privacy_pass(&mut self, table: &file::PrivacyPass, provider: Option<&Provider>) -> Option<Origin> {
        let mut issuers = vec![];
        if table.issuer.get_ref().is_empty() {
            self.wrong(&table.issuer, "privacy_pass.issuer", "at least one is needed");
        }
        for (i, issuer) in table.issuer.get_ref().iter().enumerate() {
            let key = |part: &str| format!("privacy_pass.issuer[{i}].{part}");
            if *issuer.token_type.get_ref() != 2 {
                self.wrong(&issuer.token_type, key("token_type"), "token type 2 (Blind RSA) is the one supported");
                continue;
            }
            let name = self.name(&issuer.name, &key("name"), false);
            let (Some(name), Some(octets)) = (name, self.read(&issuer.key_file, &key("key_file"))) else { continue };
            match Issuer::new(name, &octets) {
                Ok(new) if issuers.iter().any(|other: &Issuer| other.key_id() == new.key_id()) => {
                    self.wrong(&issuer.key_file, key("key_file"), "another issuer has this key");
                }
                Ok(issuer) => issuers.push(issuer),
                Err(e) => {
                    let message = format!("{}: {e}", issuer.key_file.get_ref().display());
                    self.wrong(&issuer.key_file, key("key_file"), message);
                }
            }
        }
        let origin = match &table.origin {
            Some(origin) => self.name(origin, "privacy_pass.origin", false)?,
            None => provider?.ds_domain.clone(),
        };
        let secret = match &table.secret_file {
            Some(path) => {
                let secret = self.read(path, "privacy_pass.secret_file")?;
                if secret.len() < 32 {
                    self.wrong(path, "privacy_pass.secret_file", "a secret has 32 octets or more");
                }
                secret
            }
            None => random::<32>()?.to_vec(),
        };
        if let Some(spent) = table.spent_tokens.as_ref().filter(|spent| *spent.get_ref() == 0) {
            self.wrong(spent, "privacy_pass.spent_tokens", "no token could be redeemed");
        }
        if table.epoch.0 < Duration::from_secs(1) {
            let error = self.error(
                table.issuer.span().start,
                "privacy_pass.epoch".into(),
                "an epoch is a second or more".into(),
            );
            self.errors.push(error);
        }
        let spent = table.spent_tokens.as_ref().map_or(1_000_000, |spent| *spent.get_ref());
        Some(Origin::new(Challenges::new(origin, table.epoch.0, &secret, issuers), spent))
    }
}

/// Octets of the limits' state on this node.
fn limit_memory(limits: &file::Limits) -> usize {
    limits.memory.as_ref().map_or(64 << 20, |memory| usize::try_from(memory.get_ref().0).unwrap_or(usize::MAX))
}

fn names(names: impl Iterator<Item = &'static str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}
