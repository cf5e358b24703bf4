//! Limits, and the store that a fleet keeps them in: from what the operator wrote to a [`Policy`].

use super::{Resolver, file, fleet, limit_memory, names, units};
use crate::admission::{Concurrency, KeyParts, Limit, Policy, Scope, TokenUse, Unit};
use crate::dialect::{self, Dialect, Operation};
use crate::limiter::OnFailure;
use crate::limiter::gcra::Gcra;
use crate::tls;
use ipnet::IpNet;
use std::sync::Arc;
use std::time::Duration;
use toml::Spanned;

/// What a request may ask for at once before a burst that is smaller is worth a hint.
const MANY: u32 = 256;

/// What else a limit's table is read by.
pub(super) struct Around<'a> {
    /// Some listener asks for client certificates.
    pub(super) authenticates: bool,
    /// Networks that all limits leave out.
    pub(super) exempt: Vec<IpNet>,
    pub(super) redis: Option<&'a file::Redis>,
    pub(super) max_body: &'a [(&'static str, u64)],
    /// What any listener serves: a limit that names no endpoint is for all of that.
    pub(super) served: &'a [&'static Dialect],
}

impl Resolver<'_> {
    pub(super) fn token<T>(
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
            (file::Token::Exempt, None, None) => TokenUse::Exempt,
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

    pub(super) fn limit(&mut self, i: usize, table: &file::Limit, around: &Around<'_>, policy: &mut Policy) {
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
        let covered = self.covered(&table.endpoints, &table.operations, &table.name, around, &key);
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

    pub(super) fn networks(&mut self, networks: &[Spanned<String>], key: &str) -> Vec<IpNet> {
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
    pub(super) fn redis(&mut self, table: &file::Redis, limits: &file::Limits) -> Option<(fleet::Settings, [u8; 16])> {
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
                match tls::roots(&pem).and_then(|roots| tls::client_config(roots, None)) {
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
            mode: match table.mode {
                file::RedisMode::Strict => fleet::Mode::Strict,
                file::RedisMode::Tokens => fleet::Mode::TokensOnly,
                file::RedisMode::Leased => fleet::Mode::Leased {
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
        around: &Around<'_>,
        key: impl Fn(&str) -> String,
    ) -> Vec<&'static Operation> {
        if endpoints.is_none() && operations.is_none() {
            let endpoints = around.served.iter().flat_map(|dialect| dialect.endpoints);
            return endpoints.flat_map(|endpoint| endpoint.operations).copied().collect();
        }
        if endpoints.iter().chain(operations).all(Vec::is_empty) {
            self.wrong(at, key("endpoints"), "this limit covers nothing");
        }
        let mut covered = vec![];
        for name in endpoints.iter().flatten() {
            match dialect::endpoint(name.get_ref()) {
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
        let serves = |o: &Operation| {
            around.served.iter().any(|dialect| dialect.endpoints.iter().any(|endpoint| endpoint.name == o.endpoint))
        };
        if let Some(unserved) = covered.iter().find(|operation| !serves(operation)) {
            let message = format!("no listener serves the dialect of {}", unserved.name);
            self.hint(at, key("endpoints"), message);
        }
        covered
    }
}
