//! Federation TLS: version 1.3 and nothing older, certificates by SNI, and what a client certificate says of its bearer.
//!
//! The server's configuration is made here whole and given to the listener: rustls with aws-lc-rs, X25519MLKEM768
//! before the others, no early data.

use crate::admission::PeerIdentity;
use crate::config::ClientAuth;
use crate::wire::ProviderName;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{RootCertStore, ServerConfig};
use std::collections::HashMap;
use std::sync::Arc;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// What is wrong with a certificate, a key or a list of roots.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No PEM certificate in the file.
    #[error("no PEM certificate in it")]
    NoCertificate,
    /// A certificate that cannot be read.
    #[error("a certificate in it cannot be read")]
    BadCertificate,
    /// It holds no DNS name.
    #[error("the certificate holds no DNS name (subjectAltName)")]
    NoName,
    /// No PEM private key in the file.
    #[error("no PEM private key in it")]
    NoKey,
    /// The key is of no kind that can be used.
    #[error("the private key cannot be used: {0}")]
    BadKey(rustls::Error),
    /// The key is not the certificate's.
    #[error("the private key is not the certificate's")]
    KeyMismatch,
    /// The verifier of client certificates cannot be made.
    #[error("client certificates cannot be verified: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// rustls does not take the configuration.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

impl Error {
    /// Whether the key's file is at fault, not the chain's.
    pub fn is_of_key(&self) -> bool {
        matches!(self, Self::NoKey | Self::BadKey(_) | Self::KeyMismatch)
    }
}

/// A certificate chain with its key, and the names it is for.
#[derive(Debug, Clone)]
pub struct Certificate {
    names: Vec<String>,
    key: Arc<CertifiedKey>,
}

/// The certificates of a gateway, by SNI. The first is for those who name none, or one that is not ours.
#[derive(Debug)]
pub struct CertificateStore {
    first: Arc<CertifiedKey>,
    by_name: HashMap<String, Arc<CertifiedKey>>,
}

/// What a client of ours speaks TLS with: to servers whose certificates chain to `roots`, with a certificate of its own or
/// without.
///
/// # Errors
/// rustls does not take it.
pub fn client_config(roots: RootCertStore, identity: Option<Certificate>) -> Result<rustls::ClientConfig, Error> {
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    Ok(match identity {
        Some(certificate) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certificate.key))),
        None => builder.with_no_client_auth(),
    })
}

/// The system's roots.
///
/// # Errors
/// There is none.
pub fn system_roots() -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() { Err(Error::NoCertificate) } else { Ok(roots) }
}

/// TLS 1.3 cipher suites only; X25519MLKEM768 is the first of the key exchanges (feature `prefer-post-quantum`).
pub fn provider() -> CryptoProvider {
    let provider = aws_lc_rs::default_provider();
    let tls13 = |suite: &rustls::SupportedCipherSuite| suite.tls13().is_some();
    CryptoProvider { cipher_suites: provider.cipher_suites.iter().copied().filter(tls13).collect(), ..provider }
}

fn chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|_| Error::BadCertificate)?;
    if chain.is_empty() { Err(Error::NoCertificate) } else { Ok(chain) }
}

/// The roots in a PEM file.
///
/// # Errors
/// There is none, or one cannot be read.
pub fn roots(pem: &[u8]) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(pem)? {
        roots.add(certificate).map_err(|_| Error::BadCertificate)?;
    }
    Ok(roots)
}

/// The DNS names of a certificate, in lower case (RFC 6125: subjectAltName; no common names).
fn dns_names(der: &[u8]) -> Result<Vec<String>, Error> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| Error::BadCertificate)?;
    let extension = certificate.subject_alternative_name().map_err(|_| Error::BadCertificate)?;
    let names = extension.into_iter().flat_map(|extension| &extension.value.general_names);
    let dns = names.filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(*name),
        _ => None,
    });
    // A name that is no domain name binds nothing.
    let valid = |name: &&str| ProviderName::from_bytes(name.strip_prefix("*.").unwrap_or(name).as_bytes()).is_ok();
    Ok(dns.filter(valid).map(str::to_ascii_lowercase).collect())
}

/// What a verified client certificate says of its bearer. One that cannot be read says nothing: no sender matches it.
pub fn identity(certificate: &CertificateDer<'_>) -> PeerIdentity {
    PeerIdentity { dns_names: dns_names(certificate).unwrap_or_default() }
}

impl Certificate {
    /// A chain and its key, both PEM.
    ///
    /// # Errors
    /// One cannot be read, they do not belong together, or there is no name.
    pub fn new(chain_pem: &[u8], key_pem: &[u8]) -> Result<Self, Error> {
        let chain = chain(chain_pem)?;
        let names = dns_names(chain.first().ok_or(Error::NoCertificate)?)?;
        if names.is_empty() {
            return Err(Error::NoName);
        }
        let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|_| Error::NoKey)?;
        let key = provider().key_provider.load_private_key(key).map_err(Error::BadKey)?;
        let key = CertifiedKey::new(chain, key);
        key.keys_match().map_err(|_| Error::KeyMismatch)?;
        Ok(Self { names, key: Arc::new(key) })
    }
}

impl CertificateStore {
    /// The certificates by their names; of two for one name, the first. None where there is none.
    pub fn new(certificates: Vec<Certificate>) -> Option<Self> {
        let first = certificates.first()?.key.clone();
        let mut by_name = HashMap::new();
        for certificate in certificates {
            for name in certificate.names {
                by_name.entry(name).or_insert_with(|| certificate.key.clone());
            }
        }
        Some(Self { first, by_name })
    }

    fn find(&self, name: &str) -> Option<&Arc<CertifiedKey>> {
        let name = name.to_ascii_lowercase();
        self.by_name.get(&name).or_else(|| {
            let (_, parent) = name.split_once('.')?;
            self.by_name.get(&format!("*.{parent}"))
        })
    }
}

impl ResolvesServerCert for CertificateStore {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // A foreign name is refused with 421, once there is a channel to say so.
        Some(hello.server_name().and_then(|name| self.find(name)).unwrap_or(&self.first).clone())
    }
}

/// The TLS configuration of a listener.
///
/// # Errors
/// rustls does not take it.
pub fn server_config(certificates: Arc<CertificateStore>, client_auth: &ClientAuth) -> Result<ServerConfig, Error> {
    let provider = Arc::new(provider());
    let builder =
        ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[&rustls::version::TLS13])?;
    let verifier = |roots: &Arc<RootCertStore>| WebPkiClientVerifier::builder_with_provider(roots.clone(), provider);
    let builder = match client_auth {
        ClientAuth::Off => builder.with_no_client_auth(),
        ClientAuth::Optional(roots) => {
            builder.with_client_cert_verifier(verifier(roots).allow_unauthenticated().build()?)
        }
        ClientAuth::Required(roots) => builder.with_client_cert_verifier(verifier(roots).build()?),
    };
    let mut config = builder.with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // What arrives before the handshake ends can be replayed.
    config.max_early_data_size = 0;
    Ok(config)
}
