//! The door for the provider's own nodes.

use super::{Resolver, file};
use crate::config::Egress;
use crate::egress::{Settings, StaticPeer};
use crate::tls::{Certificate, Roots};

impl Resolver<'_> {
    pub(super) fn egress(&mut self, table: &file::Egress, first: Option<&Certificate>) -> Option<Egress> {
        let key = |part: &str| format!("egress.{part}");
        let address = self.address(&table.address, "egress.address")?;
        let clients = match &table.client_ca {
            Some(ca) => {
                let trusted = self.trusted(ca, None, key)?;
                if let Roots::Files(files) = &trusted.files.ca {
                    self.watched.extend(files.iter().cloned());
                }
                if table.client_names.is_empty() {
                    self.wrong(ca, key("client_names"), "missing: which of those whom this trusts are nodes of ours");
                }
                let names = table.client_names.iter().filter_map(|name| self.name(name, "egress.client_names", true));
                Some((trusted, names.collect()))
            }
            None => {
                if !address.ip().is_loopback() {
                    let message =
                        "beyond the loopback this takes client_ca, or anyone could send in this provider's name";
                    self.wrong(&table.address, "egress.address", message);
                }
                if let Some(name) = table.client_names.first() {
                    self.wrong(name, "egress.client_names", "of whom, without client_ca");
                }
                None
            }
        };
        let identity = self.identity(table.certificate.as_ref(), table.key.as_ref(), key)?;
        let trusted = self.trusted(&table.ca, None, |_| key("ca"))?;
        if let Roots::Files(files) = &trusted.files.ca {
            self.watched.extend(files.iter().cloned());
        }
        let mut peers: Vec<StaticPeer> = vec![];
        for (i, peer) in table.peer.iter().enumerate() {
            let key = |part: &str| format!("egress.peer[{i}].{part}");
            let Some(provider) = self.name(&peer.provider, &key("provider"), false) else { continue };
            let ds_domain = peer.ds_domain.as_ref().and_then(|name| self.name(name, &key("ds_domain"), false));
            let address = peer.address.as_ref().and_then(|address| self.address(address, &key("address")));
            if peers.iter().any(|other| other.provider == provider) {
                self.wrong(&peer.provider, key("provider"), "it stands here already");
            }
            if peer.ds_domain.is_none() && peer.address.is_none() {
                self.wrong(&peer.provider, key("provider"), "neither ds_domain nor address: this says nothing");
            }
            peers.push(StaticPeer { provider, ds_domain, address });
        }
        Some(Egress {
            address,
            clients,
            discovery: Settings {
                peers,
                roots: trusted.trust.roots().clone(),
                identity: identity.or_else(|| first.cloned()),
                timeout: table.discovery_timeout.0,
                allow_private: table.allow_private,
            },
            // The system's too, as they are now.
            roots: trusted.trust.certificates().iter().map(|der| der.to_vec()).collect(),
            connect_timeout: table.connect_timeout.0,
            read_timeout: table.read_timeout.0,
        })
    }
}
