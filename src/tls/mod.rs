//! TLS: version 1.3 and nothing older, certificates by SNI, whose certificates are trusted, and what a client
//! certificate says of its bearer.
//!
//! The configurations of both sides are made here whole and given to who listens or connects: rustls with aws-lc-rs,
//! X25519MLKEM768 before the others, no early data. Nothing here knows of Pingora, or how a configuration is written.

mod certificate;
mod ocsp;
mod store;
mod stream;
#[cfg(test)]
mod testing;
mod tickets;
mod trust;
mod watch;

pub use certificate::{Certificate, CertificateFiles, identity, not_after};
pub use ocsp::OcspError;
pub use store::CertificateStore;
pub use stream::{READ, RECORD, Read, Sink, TlsStream};
pub use tickets::Tickets;
pub use trust::{Roots, Trust, TrustFiles, roots, still_trusted, system_roots};
pub use watch::Watch;

use aws_lc_rs::digest;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ProducesTickets, ResolvesServerCert};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is wrong with a certificate, a key, or what says whom to trust.
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
    /// The OCSP response is no proof that the certificate is good.
    #[error(transparent)]
    Ocsp(#[from] OcspError),
    /// The system trusts nobody.
    #[error("there are none that can be read")]
    NoSystemRoots,
    /// No PEM CRL in the file.
    #[error("no PEM CRL (\"X509 CRL\") in it")]
    NoCrl,
    /// A CRL that cannot be read, or is of a kind that cannot be used.
    #[error("a CRL in it cannot be used: {0}")]
    BadCrl(String),
    /// The verifier of certificates cannot be made.
    #[error("certificates cannot be verified: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// rustls does not take the configuration.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
    /// The file cannot be read.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl Error {
    /// Whether the key's file is at fault, not the chain's.
    pub fn is_of_key(&self) -> bool {
        matches!(self, Self::NoKey | Self::BadKey(_) | Self::KeyMismatch)
    }
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
#[error("{}: {error}", .file.display())]
pub struct FileError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub error: Error,
}

impl FileError {
    fn of(file: &Path) -> impl FnOnce(Error) -> Self {
        move |error| Self { file: file.to_owned(), error }
    }
}

fn read(file: &Path) -> Result<Vec<u8>, FileError> {
    std::fs::read(file).map_err(|e| FileError::of(file)(e.into()))
}

fn sha256(octets: &[u8]) -> [u8; 32] {
    let mut of = [0; 32];
    of.copy_from_slice(digest::digest(&digest::SHA256, octets).as_ref());
    of
}

/// TLS 1.3 cipher suites only; X25519MLKEM768 is the first of the key exchanges (feature `prefer-post-quantum`).
pub fn provider() -> CryptoProvider {
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let tls13 = |suite: &rustls::SupportedCipherSuite| suite.tls13().is_some();
    CryptoProvider { cipher_suites: provider.cipher_suites.iter().copied().filter(tls13).collect(), ..provider }
}

/// What a client of ours speaks TLS with: to servers whose certificates chain to `roots`, with a certificate of its own
/// or without. ALPN is for the caller to add.
///
/// # Errors
/// rustls does not take it.
pub fn client_config(
    roots: impl Into<Arc<RootCertStore>>,
    identity: Option<Certificate>,
) -> Result<ClientConfig, Error> {
    let builder = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    Ok(match identity {
        Some(certificate) => builder.with_client_cert_resolver(certificate.resolver()),
        None => builder.with_no_client_auth(),
    })
}

/// The TLS of a listener: TLS 1.3, `h2` and `http/1.1` by ALPN, no early data. `client` verifies the certificates of
/// clients; without it none is asked for. Sessions are resumed with `tickets` only, and without them not at all.
///
/// A resumed session brings its client's certificate with it, and rustls does not verify that again: `tickets` are
/// bound to what `client` trusts and ask [`still_trusted`] ([`Tickets::with_check`]), and so does whoever accepts one.
///
/// # Errors
/// rustls does not take it.
pub fn server_config(
    certificates: Arc<dyn ResolvesServerCert>,
    client: Option<Arc<dyn ClientCertVerifier>>,
    tickets: Option<Arc<dyn ProducesTickets>>,
) -> Result<ServerConfig, Error> {
    let builder =
        ServerConfig::builder_with_provider(Arc::new(provider())).with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = match client {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // What arrives before the handshake ends can be replayed.
    config.max_early_data_size = 0;
    // What is kept in memory would be resumed by this node only, and would outlive what it was bound to.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    match tickets {
        Some(tickets) => {
            config.ticketer = tickets;
            config.send_tls13_tickets = 2;
        }
        None => config.send_tls13_tickets = 0,
    }
    Ok(config)
}
