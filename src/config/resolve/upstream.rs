//! The nodes of the Delivery Service, and what they are told.

use super::{Resolver, file};
use crate::config::Fields;
use crate::tls::{self, Certificate, CertificateFiles, Roots};
use crate::upstream::{self, Check, Health, NodeSettings, NodeTls, Place, Settings};
use http::HeaderName;
use rustls::pki_types::ServerName;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use toml::Spanned;

impl Resolver<'_> {
    pub(super) fn upstream(&mut self, table: &file::DeliveryService) -> Option<Settings> {
        if table.node.get_ref().is_empty() {
            self.wrong(&table.node, "delivery_service.node", "at least one is needed");
        }
        if table.node.get_ref().len() > upstream::MAX_NODES {
            self.wrong(&table.node, "delivery_service.node", format!("{} are the most", upstream::MAX_NODES));
        }
        for (number, key) in [(Some(&table.eject_after), "eject_after"), (table.max_requests.as_ref(), "max_requests")]
        {
            if let Some(number) = number.filter(|number| *number.get_ref() == 0) {
                self.wrong(number, format!("delivery_service.{key}"), "at least 1");
            }
        }
        let mut nodes: Vec<NodeSettings> = vec![];
        for (i, node) in table.node.get_ref().iter().enumerate() {
            let Some(settings) = self.node(i, node) else { continue };
            if nodes.iter().any(|other| other.place == settings.place) {
                let message = format!("another node is at {}", settings.name);
                self.wrong(&node.address, format!("delivery_service.node[{i}].address"), message);
                continue;
            }
            nodes.push(settings);
        }
        Some(Settings {
            nodes,
            by_group: table.balance == file::Balance::Group,
            connect_timeout: table.connect_timeout.0,
            read_timeout: table.read_timeout.0,
            write_timeout: table.write_timeout.0,
            keepalive: table.keepalive.0,
            eject_for: table.eject_for.0,
            eject_max: table.eject_max.0.max(table.eject_for.0),
            eject_after: *table.eject_after.get_ref(),
            slow_start: table.slow_start.map(|span| span.0),
            max_requests: table.max_requests.as_ref().map(|most| *most.get_ref()),
            queue: *table.queue.get_ref(),
            queue_timeout: table.queue_timeout.0,
            resolve_every: table.resolve_every.0,
            health: table.health.as_ref().and_then(|health| self.health(health)),
        })
    }

    fn health(&mut self, table: &file::Health) -> Option<Health> {
        let key = |part: &str| format!("delivery_service.health.{part}");
        for (number, name) in [(&table.rise, "rise"), (&table.fall, "fall")] {
            if *number.get_ref() == 0 {
                self.wrong(number, key(name), "at least 1");
            }
        }
        let check = match (table.check, &table.path) {
            (file::Check::Tcp, None) => Check::Tcp,
            (file::Check::Tcp, Some(path)) => {
                self.wrong(path, key("path"), "check = \"tcp\" asks for no path");
                return None;
            }
            (file::Check::Http, None) => Check::Http { path: "/healthz".into() },
            (file::Check::Http, Some(path)) => {
                let parsed = path.get_ref().parse::<http::uri::PathAndQuery>();
                if parsed.is_err() || !path.get_ref().starts_with('/') {
                    self.wrong(path, key("path"), format!("{:?} is no path", path.get_ref()));
                    return None;
                }
                Check::Http { path: path.get_ref().clone() }
            }
        };
        Some(Health {
            check,
            interval: table.interval.0,
            timeout: table.timeout.0,
            rise: *table.rise.get_ref(),
            fall: *table.fall.get_ref(),
        })
    }

    fn node(&mut self, i: usize, node: &file::Node) -> Option<NodeSettings> {
        let key = |part: &str| format!("delivery_service.node[{i}].{part}");
        let place = self.place(&node.address, &key("address"))?;
        if let Some(weight) = node.weight.as_ref().filter(|weight| !(1..=256).contains(weight.get_ref())) {
            self.wrong(weight, key("weight"), "a weight is 1 to 256");
            return None;
        }
        let protocol = node.protocol.as_ref().map_or(file::Protocol::Http1, |protocol| *protocol.get_ref());
        match (&node.protocol, protocol, node.tls.is_some()) {
            (Some(at), file::Protocol::H2c, true) => {
                self.wrong(at, key("protocol"), "\"h2c\" is without TLS; with it: \"h2\"");
            }
            (Some(at), file::Protocol::H2, false) => {
                self.wrong(at, key("protocol"), "\"h2\" is with tls; without it: \"h2c\"");
            }
            _ => {}
        }
        let http2 = protocol != file::Protocol::Http1;
        let tls = match &node.tls {
            Some(table) => Some(Arc::new(self.node_tls(table.get_ref(), &place, http2, &node.address, key)?)),
            None => None,
        };
        Some(NodeSettings {
            name: node.address.get_ref().clone(),
            place,
            http2,
            tls,
            weight: node.weight.as_ref().map_or(1, |weight| *weight.get_ref()),
        })
    }

    fn place(&mut self, address: &Spanned<String>, key: &str) -> Option<Place> {
        let text = address.get_ref();
        if let Some(path) = text.strip_prefix("unix:") {
            // sun_path of the kernel, with its ending zero.
            if path.is_empty() || path.len() > 107 {
                self.wrong(address, key, "the path of a Unix socket has 1 to 107 octets");
                return None;
            }
            return Some(Place::Unix(self.beside(Path::new(path))));
        }
        if let Ok(address) = text.parse::<SocketAddr>()
            && address.port() > 0
        {
            return Some(Place::Address(address));
        }
        let name = text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
        match name.filter(|(host, port)| *port > 0 && !host.is_empty() && !host.contains(':')) {
            // That it resolves is asked once here, so that a mistyped name is seen; later it may fail for a while.
            Some((host, port)) if (host, port).to_socket_addrs().is_ok_and(|mut found| found.next().is_some()) => {
                Some(Place::Name { host: host.to_owned(), port })
            }
            _ => {
                let message = format!("{text:?} is no host:port that resolves, nor \"unix:/a/path\"");
                self.wrong(address, key, message);
                None
            }
        }
    }

    fn node_tls(
        &mut self,
        table: &file::NodeTls,
        place: &Place,
        http2: bool,
        address: &Spanned<String>,
        key: impl Fn(&str) -> String,
    ) -> Option<NodeTls> {
        let name = match (&table.name, place) {
            (Some(name), _) => name.get_ref().clone(),
            (None, Place::Name { host, .. }) => host.clone(),
            (None, Place::Address(address)) => address.ip().to_string(),
            (None, Place::Unix(_)) => {
                self.wrong(address, key("tls.name"), "missing: a path says no name that a certificate could hold");
                return None;
            }
        };
        // A first label with an underscore is one with a hyphen to some who verify, and so another name.
        if ServerName::try_from(name.as_str()).is_err()
            || name.split('.').next().is_some_and(|first| first.contains('_'))
        {
            self.wrong(address, key("tls.name"), format!("{name:?} is no name of a server"));
            return None;
        }
        let trusted = self.trusted(&table.ca, None, |_| key("tls.ca"))?;
        let identity =
            self.identity(table.certificate.as_ref(), table.key.as_ref(), |part| key(&format!("tls.{part}")))?;
        match &trusted.files.ca {
            Roots::System => {}
            Roots::Files(files) => self.watched.extend(files.iter().cloned()),
        }
        let mut client = match tls::client_config((**trusted.trust.roots()).clone(), identity.clone()) {
            Ok(client) => client,
            Err(e) => {
                self.wrong(&table.ca, key("tls"), e.to_string());
                return None;
            }
        };
        client.alpn_protocols = vec![if http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
        let identity = identity.map(|identity| {
            (identity.chain().iter().map(|der| der.to_vec()).collect::<Vec<_>>(), identity.key_der().to_vec())
        });
        let digest = digest(&name, trusted.trust.digest(), identity.as_ref());
        Some(NodeTls { name, client: Arc::new(client), digest })
    }

    /// A certificate of ours that others are shown: both files, or none.
    pub(super) fn identity(
        &mut self,
        chain: Option<&Spanned<PathBuf>>,
        private: Option<&Spanned<PathBuf>>,
        key: impl Fn(&str) -> String,
    ) -> Option<Option<Certificate>> {
        let (chain, private) = match (chain, private) {
            (None, None) => return Some(None),
            (Some(chain), Some(private)) => (chain, private),
            (Some(one), None) => {
                self.wrong(one, key("key"), "missing: a certificate has a key");
                return None;
            }
            (None, Some(one)) => {
                self.wrong(one, key("certificate"), "missing: this is a key of none");
                return None;
            }
        };
        let files =
            CertificateFiles { chain: self.beside(chain.get_ref()), key: self.beside(private.get_ref()), ocsp: None };
        self.watched.extend([files.chain.clone(), files.key.clone()]);
        match files.load_of_client() {
            Ok(certificate) => Some(Some(certificate)),
            Err(e) => {
                let (at, part) = if e.file == files.key { (private, "key") } else { (chain, "certificate") };
                self.wrong(at, key(part), e.to_string());
                None
            }
        }
    }

    pub(super) fn fields(&mut self, table: &file::Fields) -> Fields {
        let mut taken: Vec<HeaderName> = vec![];
        let mut name = |name: &Spanned<String>, key: &str| {
            let key = format!("delivery_service.fields.{key}");
            if name.get_ref().is_empty() {
                return None;
            }
            let Ok(parsed) = HeaderName::try_from(name.get_ref().as_str()) else {
                self.wrong(name, key, format!("{:?} is no name of a field", name.get_ref()));
                return None;
            };
            if NOT_OURS.contains(&parsed.as_str()) {
                self.wrong(name, key.as_str(), format!("{parsed} is the request's own"));
            }
            // To some servers behind, underscores are hyphens.
            let alike = |other: &HeaderName| other.as_str().replace('_', "-") == parsed.as_str().replace('_', "-");
            if taken.iter().any(alike) {
                self.wrong(name, key, format!("{parsed} says something else already"));
            }
            taken.push(parsed.clone());
            Some(parsed)
        };
        Fields {
            provider: name(&table.provider, "provider"),
            forwarded: name(&table.forwarded, "forwarded"),
            client_cert: name(&table.client_cert, "client_cert"),
            client_cert_chain: name(&table.client_cert_chain, "client_cert_chain"),
            tls: name(&table.tls, "tls"),
            request_id: name(&table.request_id, "request_id"),
            traceparent: name(&table.traceparent, "traceparent"),
        }
    }
}

/// Fields that a request has for itself.
const NOT_OURS: &[&str] = &[
    "host",
    "content-type",
    "content-length",
    "content-encoding",
    "transfer-encoding",
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "authorization",
];

/// Stands for how a node is spoken TLS to.
fn digest(name: &str, trust: [u8; 32], identity: Option<&(Vec<Vec<u8>>, Vec<u8>)>) -> u64 {
    use siphasher::sip::SipHasher24;
    use std::hash::{Hash as _, Hasher as _};
    let mut hasher = SipHasher24::new();
    (name, trust, identity).hash(&mut hasher);
    hasher.finish()
}
