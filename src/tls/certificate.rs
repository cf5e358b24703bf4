//! Certificates with their keys, from files, and what a certificate says.

use super::{Error, FileError, OcspError, ocsp, provider, read, sha256};
use crate::admission::PeerIdentity;
use crate::wire::ProviderName;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{ASN1Time, FromDer as _, X509Certificate};

/// A certificate chain with its key, the names it is for, and an OCSP response where there is one.
#[derive(Clone)]
pub struct Certificate {
    names: Vec<String>,
    not_after: SystemTime,
    key: Arc<CertifiedKey>,
    staple: Option<Staple>,
    /// Why there is an OCSP response and no staple.
    unstapled: Option<OcspError>,
    key_der: Arc<PrivateKeyDer<'static>>,
}

/// The chain and key with an OCSP response, as long as that is good.
#[derive(Clone)]
struct Staple {
    key: Arc<CertifiedKey>,
    until: SystemTime,
}

/// The files of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The chain in PEM, the certificate itself first.
    pub chain: PathBuf,
    /// Its private key in PEM: PKCS #8, SEC 1 or PKCS #1.
    pub key: PathBuf,
    /// An OCSP response about it in DER.
    pub ocsp: Option<PathBuf>,
}

/// All PEM certificates there are: at least one.
pub(super) fn chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|_| Error::BadCertificate)?;
    if chain.is_empty() { Err(Error::NoCertificate) } else { Ok(chain) }
}

pub(super) fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, Error> {
    X509Certificate::from_der(der).map(|(_, certificate)| certificate).map_err(|_| Error::BadCertificate)
}

/// A time before 1970 is 1970.
pub(super) fn system_time(time: ASN1Time) -> SystemTime {
    let since_epoch = Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0));
    SystemTime::UNIX_EPOCH.checked_add(since_epoch).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// The DNS names of a certificate, in lower case (RFC 6125: subjectAltName; no common names).
fn dns_names(certificate: &X509Certificate<'_>) -> Result<Vec<String>, Error> {
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
    let Ok(certificate) = parse(certificate) else { return PeerIdentity::default() };
    PeerIdentity {
        dns_names: dns_names(&certificate).unwrap_or_default(),
        spki_sha256: sha256(certificate.public_key().raw),
    }
}

/// When a certificate expires (RFC 5280 §4.1.2.5); a time before 1970 is 1970. None: it cannot be read.
pub fn not_after(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let certificate = parse(certificate).ok()?;
    Some(system_time(certificate.validity().not_after))
}

// === impl Certificate ===

impl Certificate {
    /// A chain and its key, both PEM.
    ///
    /// # Errors
    /// One cannot be read, they do not belong together, or there is no name.
    pub fn new(chain_pem: &[u8], key_pem: &[u8]) -> Result<Self, Error> {
        let certificate = Self::of_client(chain_pem, key_pem)?;
        if certificate.names.is_empty() { Err(Error::NoName) } else { Ok(certificate) }
    }

    /// The same of a client, which may be known by something else than a DNS name.
    ///
    /// # Errors
    /// One cannot be read, or they do not belong together.
    pub fn of_client(chain_pem: &[u8], key_pem: &[u8]) -> Result<Self, Error> {
        let chain = chain(chain_pem)?;
        let (names, not_after) = {
            let leaf = parse(chain.first().ok_or(Error::NoCertificate)?)?;
            (dns_names(&leaf)?, system_time(leaf.validity().not_after))
        };
        let key_der = PrivateKeyDer::from_pem_slice(key_pem).map_err(|_| Error::NoKey)?;
        let key = provider().key_provider.load_private_key(key_der.clone_key()).map_err(Error::BadKey)?;
        let key = CertifiedKey::new(chain, key);
        key.keys_match().map_err(|_| Error::KeyMismatch)?;
        Ok(Self { names, not_after, key: Arc::new(key), staple: None, unstapled: None, key_der: Arc::new(key_der) })
    }

    /// With an OCSP response in DER, which is stapled until its nextUpdate (RFC 6960, RFC 8446 §4.4.2.1).
    ///
    /// # Errors
    /// It is no proof that the certificate is good, or is so no longer.
    pub fn with_ocsp(self, der: &[u8]) -> Result<Self, Error> {
        let now = SystemTime::now();
        let certificate = self.stapled(der, now)?;
        match certificate.ocsp_problem_at(now).copied() {
            None => Ok(certificate),
            Some(why) => Err(why.into()),
        }
    }

    /// With a response that may have expired, not begun, or be about another certificate: then it is not sent.
    fn stapled(mut self, der: &[u8], now: SystemTime) -> Result<Self, Error> {
        (self.staple, self.unstapled) = match ocsp::check(der, self.chain(), now) {
            Ok(until) => {
                let key = CertifiedKey { ocsp: Some(der.to_vec()), ..CertifiedKey::clone(&self.key) };
                (Some(Staple { key: Arc::new(key), until }), None)
            }
            Err(why @ (OcspError::OtherCertificate | OcspError::OtherIssuer | OcspError::NotYetValid)) => {
                (None, Some(why))
            }
            Err(why) => return Err(why.into()),
        };
        Ok(self)
    }

    /// The DNS names it is for, in lower case; one may begin with `*.`.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// When it expires.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The chain, the certificate itself first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// The private key in DER, in the encoding that its file has.
    pub fn key_der(&self) -> &[u8] {
        self.key_der.secret_der()
    }

    /// `ECDSA`, `RSA` or `ED25519`, for people.
    pub fn key_type(&self) -> &'static str {
        let algorithm = self.key.key.algorithm();
        algorithm.as_str().unwrap_or("another")
    }

    /// Until when its OCSP response is sent; a time that has passed where it has expired. None: there is none that
    /// could be sent.
    pub fn ocsp_until(&self) -> Option<SystemTime> {
        self.staple.as_ref().map(|staple| staple.until)
    }

    /// Why there is an OCSP response and it is not sent now: it has expired, is of a time to come, or about another
    /// certificate. None: it is sent, or there is none.
    pub fn ocsp_problem(&self) -> Option<&OcspError> {
        self.ocsp_problem_at(SystemTime::now())
    }

    fn ocsp_problem_at(&self, now: SystemTime) -> Option<&OcspError> {
        match &self.staple {
            Some(staple) if staple.until <= now => Some(&OcspError::Expired),
            _ => self.unstapled.as_ref(),
        }
    }

    /// The chain and key as they are shown now: with the OCSP response, as long as that is good.
    pub(super) fn certified(&self, now: SystemTime) -> &Arc<CertifiedKey> {
        match &self.staple {
            Some(staple) if now < staple.until => &staple.key,
            _ => &self.key,
        }
    }

    /// Whether its key can make one of these signatures.
    pub(super) fn can_sign(&self, schemes: &[SignatureScheme]) -> bool {
        self.key.key.choose_scheme(schemes).is_some()
    }

    /// For a client that shows this one to whoever asks.
    pub(super) fn resolver(&self) -> Arc<dyn ResolvesClientCert> {
        Arc::new(SingleCertAndKey::from(self.key.clone()))
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("names", &self.names)
            .field("key_type", &self.key_type())
            .field("not_after", &self.not_after)
            .field("ocsp_until", &self.ocsp_until())
            .field("unstapled", &self.unstapled)
            .finish_non_exhaustive()
    }
}

// === impl CertificateFiles ===

impl CertificateFiles {
    /// What the files hold now. An OCSP response that has expired, is not yet valid, or is about another certificate is
    /// none, and [`Certificate::ocsp_problem`] says why: a gateway begins while a responder is away, and a certificate
    /// that was renewed does not wait for its response.
    ///
    /// # Errors
    /// A file cannot be read, or is wrong; and which.
    pub fn load(&self) -> Result<Certificate, FileError> {
        self.load_as(Certificate::new)
    }

    /// The same of a client, which may be known by something else than a DNS name.
    ///
    /// # Errors
    /// A file cannot be read, or is wrong; and which.
    pub fn load_of_client(&self) -> Result<Certificate, FileError> {
        self.load_as(Certificate::of_client)
    }

    fn load_as(&self, new: impl FnOnce(&[u8], &[u8]) -> Result<Certificate, Error>) -> Result<Certificate, FileError> {
        let certificate = new(&read(&self.chain)?, &read(&self.key)?).map_err(|error| {
            let file = if error.is_of_key() { &self.key } else { &self.chain };
            FileError::of(file)(error)
        })?;
        match &self.ocsp {
            None => Ok(certificate),
            Some(file) => certificate.stapled(&read(file)?, SystemTime::now()).map_err(FileError::of(file)),
        }
    }

    /// The files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        [Some(&self.chain), Some(&self.key), self.ocsp.as_ref()].into_iter().flatten().map(PathBuf::as_path)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Ca, der, now};
    use super::*;

    #[test]
    fn a_certificate_says_names_key_and_dates() {
        let ca = Ca::new("ca");
        let issued = ca.issue(&["A.example", "*.a.example", "not a name"]);
        let certificate = issued.certificate();
        assert_eq!(certificate.names(), ["a.example", "*.a.example"]);
        assert_eq!(certificate.key_type(), "ECDSA");
        assert!(certificate.not_after() > SystemTime::now());
        assert_eq!(certificate.chain(), [issued.der.clone(), ca.der()]);
        assert_eq!(certificate.key_der(), issued.key.serialized_der());
        assert_eq!(certificate.ocsp_until(), None);
        let shown = format!("{certificate:?}");
        assert!(shown.contains("a.example") && !shown.contains("key_der"), "{shown}");

        let peer = identity(&issued.der);
        assert_eq!(peer.dns_names, ["a.example", "*.a.example"]);
        assert_eq!(peer.spki_sha256, sha256(&rcgen::PublicKeyData::subject_public_key_info(&issued.key)));
        assert_eq!(identity(&CertificateDer::from(vec![0x30, 0x00])), PeerIdentity::default());

        assert_eq!(not_after(&issued.der), Some(certificate.not_after()));
        let old = ca.issue_with(&["a.example"], |params| params.not_after = now(-60));
        let since = SystemTime::now().duration_since(not_after(&old.der).unwrap()).unwrap();
        assert!((60..=70).contains(&since.as_secs()), "{since:?}");
        assert_eq!(not_after(&CertificateDer::from(vec![])), None);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let ca = Ca::new("ca");
        let (one, other) = (ca.issue(&["a.example"]), ca.issue(&["b.example"]));
        let new = |chain: &str, key: &str| Certificate::new(chain.as_bytes(), key.as_bytes());
        assert!(matches!(new("", &one.key_pem()), Err(Error::NoCertificate)));
        assert!(matches!(new(&one.chain_pem(), ""), Err(Error::NoKey)));
        let swapped = new(&one.chain_pem(), &other.key_pem());
        assert!(matches!(&swapped, Err(Error::KeyMismatch)) && swapped.unwrap_err().is_of_key());
        let nobody = ca.issue(&[]);
        assert!(matches!(new(&nobody.chain_pem(), &nobody.key_pem()), Err(Error::NoName)));
        let client = Certificate::of_client(nobody.chain_pem().as_bytes(), nobody.key_pem().as_bytes());
        assert!(client.unwrap().names().is_empty());
    }

    #[test]
    fn errors_name_their_file() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let ca = Ca::new("ca");
        let issued = ca.issue(&["a.example"]);
        let mut files = CertificateFiles {
            chain: write("a.pem", issued.chain_pem().as_bytes()),
            key: write("a.key", issued.key_pem().as_bytes()),
            ocsp: None,
        };
        assert_eq!(files.load().unwrap().ocsp_until(), None);
        assert_eq!(files.files().collect::<Vec<_>>(), [&files.chain, &files.key]);

        assert_eq!(files.load().unwrap().ocsp_problem(), None, "no response is no problem");

        let expired = ca.ocsp(&issued).until(-60).signed();
        files.ocsp = Some(write("a.ocsp", &expired));
        let certificate = files.load().unwrap();
        assert!(certificate.ocsp_until().unwrap() < SystemTime::now(), "not sent, and said");
        assert_eq!(certificate.ocsp_problem(), Some(&OcspError::Expired));
        assert!(certificate.certified(SystemTime::now()).ocsp.is_none());

        write("a.ocsp", &ca.ocsp(&issued).signed());
        let certificate = files.load().unwrap();
        assert!(certificate.certified(SystemTime::now()).ocsp.is_some());
        assert_eq!(certificate.ocsp_problem(), None);
        assert_eq!(certificate.ocsp_problem_at(certificate.ocsp_until().unwrap()), Some(&OcspError::Expired));
        assert_eq!(files.files().count(), 3);

        write("a.ocsp", b"nothing");
        let error = files.load().unwrap_err();
        assert!(Some(&error.file) == files.ocsp.as_ref() && matches!(error.error, Error::Ocsp(_)), "{error}");
        write("a.key", ca.issue(&["a.example"]).key_pem().as_bytes());
        let error = files.load().unwrap_err();
        assert_eq!(error.to_string(), format!("{}: the private key is not the certificate's", files.key.display()));
        std::fs::remove_file(&files.chain).unwrap();
        let error = files.load().unwrap_err();
        assert!(error.file == files.chain && matches!(error.error, Error::Io(_)), "{error}");
    }

    #[test]
    fn a_renewed_certificate_does_not_wait_for_its_response() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let ca = Ca::new("ca");
        let (issued, before) = (ca.issue(&["a.example"]), ca.issue(&["a.example"]));
        std::fs::write(path("a.pem"), issued.chain_pem()).unwrap();
        std::fs::write(path("a.key"), issued.key_pem()).unwrap();
        let files = CertificateFiles { chain: path("a.pem"), key: path("a.key"), ocsp: Some(path("a.ocsp")) };
        let load = |response: Vec<u8>| {
            std::fs::write(path("a.ocsp"), response).unwrap();
            files.load()
        };

        for (response, why) in [
            (ca.ocsp(&before).signed(), OcspError::OtherCertificate),
            (Ca::new("ca").ocsp(&issued).signed(), OcspError::OtherIssuer),
            (ca.ocsp(&issued).since(1000).until(4000).signed(), OcspError::NotYetValid),
        ] {
            let error = issued.certificate().with_ocsp(&response).unwrap_err();
            assert!(matches!(&error, Error::Ocsp(error) if *error == why), "{error}");
            let certificate = load(response).unwrap();
            assert_eq!((certificate.ocsp_problem(), certificate.ocsp_until()), (Some(&why), None));
            assert!(certificate.certified(SystemTime::now()).ocsp.is_none(), "{why}");
            assert_eq!(certificate.chain(), issued.chain());
        }
        assert_eq!(load(ca.ocsp(&issued).signed()).unwrap().ocsp_problem(), None);

        let revoked = der(0xa1, &[&der(0x18, &[b"20200101000000Z"])]);
        let mut forged = ca.ocsp(&issued).signed();
        *forged.last_mut().unwrap() ^= 1;
        for (response, why) in [
            (ca.ocsp(&issued).status(revoked.clone()).signed(), OcspError::Revoked),
            (ca.ocsp(&issued).status(revoked).since(1000).until(4000).signed(), OcspError::Revoked),
            (ca.ocsp(&issued).status(der(0x82, &[])).signed(), OcspError::Unknown),
            (ca.ocsp(&issued).without_end().signed(), OcspError::NoEnd),
            (forged, OcspError::BadSignature),
            (vec![], OcspError::Malformed),
        ] {
            let error = load(response).unwrap_err();
            assert!(matches!(&error.error, Error::Ocsp(error) if *error == why), "{error}");
        }
    }
}
