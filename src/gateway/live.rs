//! What the configuration says, as the gateway uses it: one value, which a reload exchanges whole. A request keeps what it
//! began with to its end; a connection takes what is in use for each of its requests.

use super::download::Downloads;
use crate::admission::{Admission, Peers};
use crate::config::{
    ClientAuth, Config, ConnectionLimits, Fields, Holding, Http2, Provider, TicketSettings, Timeouts, Trusted,
};
use crate::dialect::Routes;
use crate::egress::{Discovery, Patience};
use crate::forward;
use crate::limiter::fleet::Fleet;
use crate::privacypass::Origin;
use crate::tls::{self, Certificate, CertificateFiles, CertificateStore, Tickets};
use ipnet::IpNet;
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;
use rustls::server::danger::ClientCertVerifier;
use siphasher::sip::SipHasher24;
use std::collections::HashMap;
use std::hash::{Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

/// What is in use.
#[derive(Clone)]
pub(super) struct Live {
    pub(super) provider: Arc<Provider>,
    pub(super) peers: Arc<Peers>,
    pub(super) timeouts: Timeouts,
    pub(super) max_body: Arc<[(&'static str, u64)]>,
    pub(super) admission: Arc<Admission>,
    pub(super) privacy_pass: Option<Arc<Origin>>,
    /// The store of a fleet, if there is one.
    pub(super) fleet: Option<Arc<Fleet>>,
    pub(super) fields: Arc<Fields>,
    pub(super) connections: Arc<ConnectionLimits>,
    pub(super) http2: Http2,
    /// What is served at each listener.
    routes: Arc<[(SocketAddr, Arc<Routes>)]>,
    pub(super) holding: Arc<Holding>,
    pub(super) downloads: Option<Arc<Downloads>>,
    pub(super) tls: Arc<Tls>,
    pub(super) egress: Option<Arc<LiveEgress>>,
    /// What it was read from, and the files it names besides those of `tls`.
    pub(super) text: Arc<str>,
    pub(super) watched: Arc<[PathBuf]>,
    pub(super) watch_every: Duration,
}

/// The TLS of all listeners.
pub(super) struct Tls {
    certificates: Vec<(CertificateFiles, Certificate)>,
    listeners: Vec<ListenerSettings>,
    tickets: Option<([u8; 32], Duration)>,
    doors: Vec<(SocketAddr, Arc<ListenerTls>)>,
}

/// A listener as its settings have it: what its TLS is made from.
#[derive(Clone)]
struct ListenerSettings {
    address: SocketAddr,
    client_auth: ClientAuth,
    proxy_protocol: Arc<[IpNet]>,
}

/// The TLS of a listener.
pub(super) struct ListenerTls {
    pub(super) config: Arc<rustls::ServerConfig>,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    /// Stands for what it trusts.
    pub(super) trust: Option<[u8; 32]>,
    /// Who shows no certificate has no connection.
    pub(super) required: bool,
    pub(super) proxy_protocol: Arc<[IpNet]>,
}

/// The egress door.
pub(super) struct LiveEgress {
    pub(super) settings: crate::config::Egress,
    pub(super) discovery: Arc<Discovery>,
    pub(super) patience: Arc<Patience>,
    /// Where nodes of ours have to show a certificate.
    pub(super) tls: Option<Arc<ListenerTls>>,
    /// Stands for what other providers are shown and trusted by.
    digest: u64,
    shown: Option<(Vec<Vec<u8>>, Vec<u8>)>,
    /// How the providers that were spoken to lately are spoken TLS to.
    known: Mutex<HashMap<String, Arc<forward::Tls>>>,
}

/// Providers whose TLS is kept, at most.
const MOST_PROVIDERS: usize = 1024;

// === impl Tls ===

/// What a ticket is bound to: it is not taken once the listener trusts others, or asks for more.
fn binding(client_auth: &ClientAuth) -> [u8; 32] {
    let (kind, trusted) = match client_auth {
        ClientAuth::Off => (0u8, None),
        ClientAuth::Optional(trusted) => (1, Some(trusted)),
        ClientAuth::Required(trusted) => (2, Some(trusted)),
    };
    let mut hash = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    hash.update(&[kind]);
    if let Some(trusted) = trusted {
        hash.update(&trusted.trust.digest());
    }
    sha256(hash)
}

fn sha256(hash: aws_lc_rs::digest::Context) -> [u8; 32] {
    hash.finish().as_ref().try_into().unwrap_or_default()
}

/// The secret that tickets are made with: the fleet's, or this process's. Other pins are another secret: who comes with a new key
/// does not resume with the one before.
fn ticket_secret(settings: &TicketSettings, peers: &Peers, own: [u8; 32]) -> [u8; 32] {
    let mut hash = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    hash.update(settings.secret.as_deref().unwrap_or(&own));
    for pin in &peers.pins {
        hash.update(pin.provider.as_bytes());
        pin.keys.iter().for_each(|key| hash.update(key));
    }
    sha256(hash)
}

/// Whose certificates a listener trusts; none where it asks for none.
pub(super) fn trusted(client_auth: &ClientAuth) -> Option<&Trusted> {
    match client_auth {
        ClientAuth::Off => None,
        ClientAuth::Optional(trusted) | ClientAuth::Required(trusted) => Some(trusted),
    }
}

impl Tls {
    /// As a configuration says. `own` is the secret of this process.
    pub(super) fn new(config: &Config, own: [u8; 32]) -> Result<Self, tls::Error> {
        let listeners = config.listeners.iter().map(|listener| ListenerSettings {
            address: listener.address,
            client_auth: listener.client_auth.clone(),
            proxy_protocol: listener.proxy_protocol.clone().into(),
        });
        Self::build(config.certificates.clone(), listeners.collect(), Self::tickets_of(config, own))
    }

    fn build(
        certificates: Vec<(CertificateFiles, Certificate)>,
        listeners: Vec<ListenerSettings>,
        tickets: Option<([u8; 32], Duration)>,
    ) -> Result<Self, tls::Error> {
        let store = CertificateStore::new(certificates.iter().map(|(_, certificate)| certificate.clone()).collect());
        let store = Arc::new(store.ok_or(tls::Error::NoCertificate)?);
        let mut doors = vec![];
        for listener in &listeners {
            let door = listener_tls(&store, &listener.client_auth, tickets, listener.proxy_protocol.clone())?;
            doors.push((listener.address, Arc::new(door)));
        }
        Ok(Self { certificates, listeners, tickets, doors })
    }

    /// The TLS of the listener at an address.
    pub(super) fn door(&self, address: SocketAddr) -> Option<&Arc<ListenerTls>> {
        self.doors.iter().find(|(of, _)| *of == address).map(|(_, door)| door)
    }

    /// The certificates, with their files.
    pub(super) fn certificates(&self) -> &[(CertificateFiles, Certificate)] {
        &self.certificates
    }

    /// The tickets of a configuration.
    pub(super) fn tickets_of(config: &Config, own: [u8; 32]) -> Option<([u8; 32], Duration)> {
        config.tickets.as_ref().map(|settings| (ticket_secret(settings, &config.peers, own), settings.rotation))
    }

    /// With other tickets.
    pub(super) fn with_tickets(&self, tickets: Option<([u8; 32], Duration)>) -> Result<Self, tls::Error> {
        Self::build(self.certificates.clone(), self.listeners.clone(), tickets)
    }

    /// When the lists of revoked certificates of listeners end, where there are any.
    pub(super) fn crls_until(&self) -> impl Iterator<Item = (SocketAddr, SystemTime)> {
        let until = |of: &ListenerSettings| Some((of.address, trusted(&of.client_auth)?.trust.crls_until()?));
        self.listeners.iter().filter_map(until)
    }

    /// All its files.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let of_certificates =
            self.certificates.iter().flat_map(|(files, _)| files.files().map(PathBuf::from).collect::<Vec<_>>());
        let trusted = self.listeners.iter().filter_map(|listener| trusted(&listener.client_auth));
        of_certificates
            .chain(trusted.flat_map(|trusted| trusted.files.files().map(PathBuf::from).collect::<Vec<_>>()))
            .collect()
    }

    /// With what changed files hold now. What is broken stays as it was; each file of it is said to `broken`.
    pub(super) fn refreshed(
        &self,
        is_changed: impl Fn(&std::path::Path) -> bool,
        mut said: impl FnMut(Result<PathBuf, tls::FileError>),
    ) -> Result<Self, tls::Error> {
        let mut certificates = self.certificates.clone();
        for (files, certificate) in &mut certificates {
            if files.files().any(&is_changed) {
                match files.load() {
                    Ok(new) => {
                        files.files().for_each(|file| said(Ok(file.into())));
                        *certificate = new;
                    }
                    Err(e) => said(Err(e)),
                }
            }
        }
        let mut listeners = self.listeners.clone();
        for listener in &mut listeners {
            if let ClientAuth::Optional(trusted) | ClientAuth::Required(trusted) = &mut listener.client_auth
                && trusted.files.files().any(&is_changed)
            {
                match trusted.files.load() {
                    Ok(trust) => {
                        trusted.files.files().for_each(|file| said(Ok(file.into())));
                        trusted.trust = Arc::new(trust);
                    }
                    Err(e) => said(Err(e)),
                }
            }
        }
        Self::build(certificates, listeners, self.tickets)
    }
}

/// The TLS of one listener.
pub(super) fn listener_tls(
    store: &Arc<CertificateStore>,
    client_auth: &ClientAuth,
    tickets: Option<([u8; 32], Duration)>,
    proxy_protocol: Arc<[IpNet]>,
) -> Result<ListenerTls, tls::Error> {
    let required = matches!(client_auth, ClientAuth::Required(_));
    let verifier = match trusted(client_auth) {
        Some(trusted) => Some(trusted.trust.verifier(required)?),
        None => None,
    };
    let tickets = tickets.map(|(secret, rotation)| {
        let tickets = Tickets::new(secret, rotation, binding(client_auth));
        // One of a certificate that has ended since, or that a list says so of, is worth no session.
        Arc::new(match verifier.clone() {
            Some(verifier) => tickets
                .with_check(move |chain| tls::still_trusted(&*verifier, chain, rustls::pki_types::UnixTime::now())),
            None => tickets,
        }) as Arc<_>
    });
    let config = tls::server_config(store.clone(), verifier.clone(), tickets)?;
    let trust = trusted(client_auth).map(|trusted| trusted.trust.digest());
    Ok(ListenerTls { config: Arc::new(config), verifier, trust, required, proxy_protocol })
}

impl ListenerTls {
    /// Whether a certificate that was trusted here is so now.
    pub(super) fn trusts(&self, chain: &[CertificateDer<'_>]) -> bool {
        let now = rustls::pki_types::UnixTime::now();
        self.verifier.as_ref().is_some_and(|verifier| tls::still_trusted(&**verifier, chain, now))
    }
}

// === impl Live ===

impl Live {
    /// A configuration, with what was made of it.
    pub(super) fn new(
        config: Config,
        admission: Arc<Admission>,
        privacy_pass: Option<Arc<Origin>>,
        fleet: Option<Arc<Fleet>>,
        tls: Arc<Tls>,
        egress: Option<Arc<LiveEgress>>,
        downloads: Option<Arc<Downloads>>,
    ) -> Self {
        Self {
            provider: Arc::new(config.provider),
            peers: Arc::new(config.peers),
            timeouts: config.timeouts,
            max_body: config.max_body.into(),
            admission,
            privacy_pass,
            fleet,
            fields: Arc::new(config.fields),
            connections: Arc::new(config.connections),
            http2: config.http2,
            routes: config.listeners.iter().map(|listener| (listener.address, listener.routes.clone())).collect(),
            holding: Arc::new(config.holding),
            downloads,
            tls,
            egress,
            text: config.text,
            watched: config.watched.into(),
            watch_every: config.watch_every,
        }
    }

    /// What is served at a listener.
    pub(super) fn routes(&self, listener: SocketAddr) -> &Routes {
        static NONE: LazyLock<Routes> = LazyLock::new(Routes::default);
        self.routes.iter().find(|(address, _)| *address == listener).map_or(&NONE, |(_, routes)| routes)
    }
}

// === impl LiveEgress ===

impl LiveEgress {
    /// As a configuration says; what others have said of when to come again stays known.
    pub(super) fn new(config: &Config, before: Option<&Self>) -> Result<Option<Arc<Self>>, Box<dyn std::error::Error>> {
        let Some(settings) = &config.egress else { return Ok(None) };
        let certificates = config.certificates.iter().map(|(_, certificate)| certificate.clone()).collect();
        let store = Arc::new(CertificateStore::new(certificates).ok_or(tls::Error::NoCertificate)?);
        let tls = match &settings.clients {
            Some((trusted, _)) => {
                let clients = ClientAuth::Required(trusted.clone());
                Some(Arc::new(listener_tls(&store, &clients, None, Arc::from([]))?))
            }
            None => None,
        };
        let identity = settings.discovery.identity.as_ref();
        let shown = identity.map(|identity| {
            let chain: Vec<Vec<u8>> = identity.chain().iter().map(|der| der.to_vec()).collect();
            (chain, identity.key_der().to_vec())
        });
        let roots = &settings.roots;
        // Said now, and not when somebody asks for one.
        tls_to(roots, shown.as_ref(), "nobody.invalid")?;
        let mut hasher = SipHasher24::new();
        (&shown, roots).hash(&mut hasher);
        let (digest, discovery) = (hasher.finish(), &settings.discovery);
        // What is known of providers stays known where it would be found out in the same way.
        let same = before.filter(|before| {
            let known = &before.settings.discovery;
            before.digest == digest
                && (&known.peers, known.timeout, known.allow_private)
                    == (&discovery.peers, discovery.timeout, discovery.allow_private)
        });
        Ok(Some(Arc::new(Self {
            discovery: match same {
                Some(before) => before.discovery.clone(),
                None => Arc::new(Discovery::new(discovery.clone())?),
            },
            patience: before.map_or_else(|| Arc::new(Patience::new()), |before| before.patience.clone()),
            tls,
            digest,
            shown,
            known: Mutex::default(),
            settings: settings.clone(),
        })))
    }

    /// How a provider's Delivery Service is spoken TLS to. None: its domain is no name that a certificate could have.
    pub(super) fn tls_to(&self, domain: &str) -> Option<Arc<forward::Tls>> {
        if let Some(known) = self.known.lock().get(domain) {
            return Some(known.clone());
        }
        let made = tls_to(&self.settings.roots, self.shown.as_ref(), domain).ok()?;
        let mut known = self.known.lock();
        if known.len() >= MOST_PROVIDERS {
            known.clear();
        }
        known.insert(domain.to_owned(), made.clone());
        Some(made)
    }
}

fn tls_to(
    roots: &[Vec<u8>],
    shown: Option<&(Vec<Vec<u8>>, Vec<u8>)>,
    domain: &str,
) -> Result<Arc<forward::Tls>, String> {
    let identity = shown.map(|(chain, key)| (&chain[..], &key[..]));
    forward::Tls::new(roots, identity, domain, forward::Protocol::Either)
}
