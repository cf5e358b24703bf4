//! What is served at which listener: dialects, and the paths of their endpoints towards strangers and towards the Delivery
//! Service.

use super::{Resolver, file, names};
use crate::config::{ClientAuth, Holding, MOST_HELD};
use crate::dialect::{self, DIALECTS, Dialect, Endpoint, Routes, Template};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use toml::Spanned;

/// Tables of endpoints, by name.
pub(super) type Tables = BTreeMap<Spanned<String>, file::EndpointTable>;

/// Paths of endpoints that have others than their draft's: towards strangers, and towards the Delivery Service.
pub(super) type Paths = HashMap<&'static str, (Option<Template>, Option<Template>)>;

/// The least that may be held of a body: a read's worth.
const LEAST_HELD: u64 = 1024;

impl Resolver<'_> {
    /// The paths that are given to endpoints. Those that there are not are an error elsewhere.
    pub(super) fn paths(&mut self, tables: &Tables) -> Paths {
        let mut paths = Paths::new();
        for (name, table) in tables {
            let Some(endpoint) = dialect::endpoint(name.get_ref()) else { continue };
            let key = |part: &str| format!("endpoints.{}.{part}", name.get_ref());
            let path = table.path.as_ref().and_then(|path| self.template(endpoint, path, key("path")));
            let upstream =
                table.upstream_path.as_ref().and_then(|path| self.template(endpoint, path, key("upstream_path")));
            if let Some(at) = table.upstream_path.as_ref().filter(|_| !endpoint.takes_body()) {
                self.wrong(at, key("upstream_path"), "the Delivery Service is not asked for this");
            }
            paths.insert(endpoint.name, (path, upstream));
        }
        paths
    }

    fn template(&mut self, endpoint: &Endpoint, path: &Spanned<String>, key: String) -> Option<Template> {
        let template = match Template::parse(path.get_ref()) {
            Ok(template) => template,
            Err(e) => {
                self.wrong(path, key, format!("{:?}: {e}", path.get_ref()));
                return None;
            }
        };
        let wanted = endpoint.path.contains('{');
        if wanted != template.parameter().is_some() {
            let message = match wanted {
                true => format!("a parameter is missing: {}", endpoint.path),
                false => format!("it has no parameter: {}", endpoint.path),
            };
            self.wrong(path, key, message);
            return None;
        }
        Some(template)
    }

    /// What a listener serves. What a dialect asks of its TLS is checked.
    pub(super) fn routes(
        &mut self,
        listener: &file::Listener,
        client_auth: &ClientAuth,
        paths: &Paths,
        key: impl Fn(&str) -> String,
    ) -> Arc<Routes> {
        let mut served: Vec<&'static Dialect> = vec![];
        match &listener.dialects {
            None => served.extend(DIALECTS.first()),
            Some(said) if said.get_ref().is_empty() => {
                self.wrong(said, key("dialects"), "this listener serves nothing")
            }
            Some(said) => {
                for name in said.get_ref() {
                    let Some(dialect) = DIALECTS.iter().find(|dialect| dialect.name == name.get_ref()) else {
                        let all = names(DIALECTS.iter().map(|dialect| dialect.name));
                        self.wrong(name, key("dialects"), format!("no dialect {:?}; there are {all}", name.get_ref()));
                        continue;
                    };
                    if dialect.mutual_tls && matches!(client_auth, ClientAuth::Off) {
                        let message = format!("{}: mutual TLS is part of it: client_certificates", dialect.name);
                        self.wrong(name, key("dialects"), message);
                    }
                    if served.iter().any(|other| other.name == dialect.name) {
                        self.wrong(name, key("dialects"), "it is named twice");
                        continue;
                    }
                    served.push(dialect);
                }
            }
        }
        let given = |name: &str| paths.get(name).cloned().unwrap_or_default();
        match Routes::new(&served, &given) {
            Ok(routes) => Arc::new(routes),
            Err(clash) => {
                self.wrong(&listener.address, key("dialects"), clash.to_string());
                Arc::default()
            }
        }
    }

    /// How much is held of bodies.
    pub(super) fn holding(&mut self, tables: &Tables, connections: &file::Connections) -> Holding {
        let mut most = vec![];
        for (name, table) in tables {
            let (Some(endpoint), Some(size)) = (dialect::endpoint(name.get_ref()), &table.max_held) else { continue };
            let key = || format!("endpoints.{}.max_held", name.get_ref());
            if !endpoint.takes_body() {
                self.wrong(size, key(), "this endpoint takes no body");
            } else if !(LEAST_HELD..=MOST_HELD as u64).contains(&size.get_ref().0) {
                self.wrong(size, key(), "1KiB to 48KiB: more could not be given to another node");
            }
            most.push((endpoint.name, usize::try_from(size.get_ref().0).unwrap_or(MOST_HELD)));
        }
        let total = &connections.held_bodies;
        if total.get_ref().0 < 1 << 20 {
            self.wrong(total, "connections.held_bodies", "1MiB is the least");
        }
        Holding { most, total: i64::try_from(total.get_ref().0).unwrap_or(i64::MAX) }
    }
}

/// The dialects that any listener serves.
pub(super) fn served(listeners: &[crate::config::Listener]) -> Vec<&'static Dialect> {
    let serves = |dialect: &&&Dialect| {
        listeners.iter().any(|listener| listener.routes.routes().any(|route| route.dialect.name == dialect.name))
    };
    DIALECTS.iter().filter(serves).copied().collect()
}
