//! Listeners, certificates, tickets, and who may come.

use super::dialects::Paths;
use super::{Resolver, file};
use crate::admission::{Peers, Pin};
use crate::config::{ClientAuth, Listener, Provider, TicketSettings, Trusted};
use crate::tls::{Certificate, CertificateFiles, Roots, TrustFiles};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use toml::Spanned;

/// Pingora passes 32 sockets on at most.
const MOST_LISTENERS: usize = 30;

impl Resolver<'_> {
    pub(super) fn listeners(&mut self, tables: &Spanned<Vec<file::Listener>>, paths: &Paths) -> Vec<Listener> {
        if tables.get_ref().is_empty() {
            self.wrong(tables, "listener", "at least one is needed");
        }
        // With those of egress and operators: as many as can be handed to a successor.
        if tables.get_ref().len() > MOST_LISTENERS {
            self.wrong(tables, "listener", format!("{MOST_LISTENERS} are the most"));
        }
        let mut listeners: Vec<Listener> = vec![];
        for (i, table) in tables.get_ref().iter().enumerate() {
            let key = |part: &str| format!("listener[{i}].{part}");
            let address = self.address(&table.address, &key("address"));
            let trusted = match &table.client_ca {
                Some(ca) => self.trusted(ca, table.client_crl.as_ref(), key),
                None => None,
            };
            if let (Some(crl), None) = (&table.client_crl, &table.client_ca) {
                self.wrong(crl, key("client_crl"), "of whom, without client_ca");
            }
            let client_auth = match (table.client_certificates, trusted) {
                (file::ClientCertificates::Off, _) => {
                    if let Some(path) = &table.client_ca {
                        self.wrong(path, key("client_ca"), "client_certificates is off: nothing is verified by this");
                    }
                    ClientAuth::Off
                }
                (file::ClientCertificates::Optional, Some(trusted)) => ClientAuth::Optional(trusted),
                (file::ClientCertificates::Required, Some(trusted)) => ClientAuth::Required(trusted),
                (_, None) => {
                    if table.client_ca.is_none() {
                        self.wrong(&table.address, key("client_ca"), "missing: client certificates are asked for");
                    }
                    ClientAuth::Off
                }
            };
            if listeners.iter().any(|other| Some(other.address) == address) {
                self.wrong(&table.address, key("address"), "another listener is at this address");
            }
            let proxy_protocol = self.networks(&table.proxy_protocol, &key("proxy_protocol"));
            let routes = self.routes(table, &client_auth, paths, key);
            listeners.extend(address.map(|address| Listener { address, client_auth, proxy_protocol, routes }));
        }
        listeners
    }

    fn beside_all(&self, paths: &file::Paths) -> Vec<PathBuf> {
        paths.list().iter().map(|path| self.beside(path)).collect()
    }

    /// Roots, and lists of what is revoked.
    pub(super) fn trusted(
        &mut self,
        ca: &Spanned<file::Paths>,
        crl: Option<&Spanned<file::Paths>>,
        key: impl Fn(&str) -> String,
    ) -> Option<Trusted> {
        let roots = if ca.get_ref().is_system() { Roots::System } else { Roots::Files(self.beside_all(ca.get_ref())) };
        if ca.get_ref().list().is_empty() {
            self.wrong(ca, key("client_ca"), "no file, so nobody would be trusted");
            return None;
        }
        let crls = crl.map(|crl| self.beside_all(crl.get_ref())).unwrap_or_default();
        let files = TrustFiles { ca: roots, crls };
        match files.load() {
            Ok(trust) => Some(Trusted { files, trust: Arc::new(trust) }),
            Err(e) => {
                match crl.filter(|_| files.crls.contains(&e.file)) {
                    Some(crl) => self.wrong(crl, key("client_crl"), e.to_string()),
                    None => self.wrong(ca, key("client_ca"), e.to_string()),
                }
                None
            }
        }
    }

    pub(super) fn certificates(
        &mut self,
        tables: &Spanned<Vec<file::Certificate>>,
        provider: Option<&Provider>,
    ) -> Vec<(CertificateFiles, Certificate)> {
        if tables.get_ref().is_empty() {
            self.wrong(tables, "certificate", "at least one is needed");
        }
        let mut certificates = vec![];
        let errors = self.errors.len();
        for (i, table) in tables.get_ref().iter().enumerate() {
            let files = CertificateFiles {
                chain: self.beside(table.chain.get_ref()),
                key: self.beside(table.key.get_ref()),
                ocsp: table.ocsp.as_ref().map(|path| self.beside(path.get_ref())),
            };
            match files.load() {
                Ok(certificate) => {
                    // A responder that is away is no reason not to start.
                    if let (Some(ocsp), Some(why)) = (&table.ocsp, certificate.ocsp_problem()) {
                        let message = format!("{}: not stapled: {why}", ocsp.get_ref().display());
                        self.hint(ocsp, format!("certificate[{i}].ocsp"), message);
                    }
                    certificates.push((files, certificate));
                }
                Err(e) => {
                    let (part, at) = match &table.ocsp {
                        Some(ocsp) if files.ocsp.as_ref() == Some(&e.file) => ("ocsp", ocsp),
                        _ if files.key == e.file && (files.chain != e.file || e.error.is_of_key()) => {
                            ("key", &table.key)
                        }
                        _ => ("chain", &table.chain),
                    };
                    self.wrong(at, format!("certificate[{i}].{part}"), e.to_string());
                }
            }
        }
        // Whoever asks for the Delivery Service by its name would be shown a certificate of another.
        if let Some(provider) = provider.filter(|_| errors == self.errors.len()) {
            let held = |name: &str| {
                let wanted = crate::wire::ProviderName::from_bytes(name.as_bytes());
                let matches = |pattern: &String| wanted.as_ref().is_ok_and(|wanted| wanted.matches(pattern));
                certificates.iter().any(|(_, certificate)| certificate.names().iter().any(matches))
            };
            if !held(&provider.ds_domain) {
                let message = format!("none of them holds {:?}, provider.ds_domain", provider.ds_domain);
                self.wrong(tables, "certificate", message);
            }
            for name in provider.names.iter().filter(|name| !held(name)) {
                let message = format!("none of them holds {name:?}: who looks for its ds-domain there finds no TLS");
                self.hint(tables, "certificate", message);
            }
        }
        certificates
    }

    pub(super) fn tickets(&mut self, table: &file::Tls) -> Option<TicketSettings> {
        let secret = match &table.ticket_secret_file {
            Some(path) => {
                let secret = self.read(path, "tls.ticket_secret_file")?;
                self.watched.push(self.beside(path.get_ref()));
                if secret.len() < 32 {
                    self.wrong(path, "tls.ticket_secret_file", "a secret has 32 octets or more");
                }
                Some(secret)
            }
            None => None,
        };
        let rotation = table.ticket_rotation.get_ref().0;
        // RFC 8446 §4.6.1: no ticket lives longer than seven days, and one is good for two of these.
        if !(Duration::from_secs(60)..=Duration::from_secs(84 * 3600)).contains(&rotation) {
            self.wrong(&table.ticket_rotation, "tls.ticket_rotation", "1m to 84h");
        }
        table.tickets.then_some(TicketSettings { secret, rotation })
    }

    pub(super) fn peers(&mut self, table: &file::Peers) -> Peers {
        let allow = table
            .allow
            .as_ref()
            .map(|names| names.iter().filter_map(|name| self.name(name, "peers.allow", true)).collect());
        let deny = table.deny.iter().filter_map(|name| self.name(name, "peers.deny", true)).collect();
        let named = table.named.iter().filter_map(|name| self.name(name, "peers.named", false)).collect();
        let mut pins: Vec<Pin> = vec![];
        for (i, pin) in table.pin.iter().enumerate() {
            let key = |part: &str| format!("peers.pin[{i}].{part}");
            let Some(provider) = self.name(&pin.provider, &key("provider"), true) else { continue };
            if pin.spki_sha256.get_ref().is_empty() {
                self.wrong(
                    &pin.spki_sha256,
                    key("spki_sha256"),
                    "no key, so this provider would have none to come with",
                );
            }
            let mut keys = vec![];
            for text in pin.spki_sha256.get_ref() {
                match BASE64_STANDARD.decode(text.get_ref()).ok().and_then(|octets| octets.try_into().ok()) {
                    Some(digest) => keys.push(digest),
                    None => {
                        let message = format!("{:?} is not 32 octets in base64", text.get_ref());
                        self.wrong(text, key("spki_sha256"), message);
                    }
                }
            }
            if pins.iter().any(|other| other.provider == provider) {
                self.wrong(&pin.provider, key("provider"), "it has pins already");
            }
            pins.push(Pin { provider, keys });
        }
        Peers { allow, deny, pins, named }
    }
}
