//! Whose certificates are trusted: roots, and lists of what has been revoked.

use super::certificate::{chain, system_time};
use super::{Error, FileError, provider, read};
use aws_lc_rs::digest;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use std::cmp::Reverse;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use x509_parser::prelude::FromDer as _;
use x509_parser::revocation_list::CertificateRevocationList;

/// Where roots come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Roots {
    /// Those of the system.
    System,
    /// Files with PEM certificates.
    Files(Vec<PathBuf>),
}

/// The files that say whom to trust.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustFiles {
    /// Roots.
    pub ca: Roots,
    /// PEM CRLs; a file may hold several.
    pub crls: Vec<PathBuf>,
}

/// Whom to trust.
#[derive(Debug, Clone)]
pub struct Trust {
    roots: Arc<RootCertStore>,
    certificates: Vec<CertificateDer<'static>>,
    /// The newest first: of several by one issuer the first is asked.
    crls: Vec<CertificateRevocationListDer<'static>>,
    crls_until: Option<SystemTime>,
    digest: [u8; 32],
}

/// More names of authorities than this are no hint to a client as to which certificate it is asked for, and some 100
/// octets each in every handshake.
const MAX_HINTS: usize = 32;

/// The roots in a PEM file.
///
/// # Errors
/// There is none, or one cannot be read.
pub fn roots(pem: &[u8]) -> Result<RootCertStore, Error> {
    store(&chain(pem)?)
}

/// The system's roots.
///
/// # Errors
/// There is none.
pub fn system_roots() -> Result<RootCertStore, Error> {
    system().map(|(roots, _)| roots)
}

fn store(certificates: &[CertificateDer<'_>]) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate.clone()).map_err(|_| Error::BadCertificate)?;
    }
    Ok(roots)
}

/// The system's roots, without those that cannot be read: of its many some are of another age.
fn system() -> Result<(RootCertStore, Vec<CertificateDer<'static>>), Error> {
    let mut roots = RootCertStore::empty();
    let mut certificates = rustls_native_certs::load_native_certs().certs;
    certificates.retain(|certificate| roots.add(certificate.clone()).is_ok());
    if roots.is_empty() { Err(Error::NoSystemRoots) } else { Ok((roots, certificates)) }
}

/// Whether a chain that was verified before would be now. A resumed session has the certificate that its first
/// handshake brought, which rustls does not look at again.
pub fn still_trusted(verifier: &dyn ClientCertVerifier, chain: &[CertificateDer<'_>], now: UnixTime) -> bool {
    // Who asks for no certificates cannot verify any.
    let Some((certificate, above)) = chain.split_first().filter(|_| verifier.offer_client_auth()) else { return false };
    verifier.verify_client_cert(certificate, above, now).is_ok()
}

// === CRLs ===

/// A CRL with what it says of itself.
struct Crl {
    der: CertificateRevocationListDer<'static>,
    issued: SystemTime,
    until: Option<SystemTime>,
}

/// The CRLs in a PEM file: at least one, all of a kind that rustls takes.
fn crls(pem: &[u8], roots: &Arc<RootCertStore>) -> Result<Vec<Crl>, Error> {
    let ders: Vec<_> = CertificateRevocationListDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|e| Error::BadCrl(e.to_string()))?;
    if ders.is_empty() {
        return Err(Error::NoCrl);
    }
    WebPkiClientVerifier::builder_with_provider(roots.clone(), Arc::new(provider()))
        .with_crls(ders.iter().cloned())
        .build()
        .map_err(|e| match e {
            VerifierBuilderError::InvalidCrl(why) => Error::BadCrl(format!("{why:?}")),
            other => other.into(),
        })?;
    ders.into_iter().map(crl).collect()
}

fn crl(der: CertificateRevocationListDer<'static>) -> Result<Crl, Error> {
    let (issued, until) = {
        let (_, list) = CertificateRevocationList::from_der(&der).map_err(|e| Error::BadCrl(e.to_string()))?;
        (system_time(list.last_update()), list.next_update().map(system_time))
    };
    Ok(Crl { der, issued, until })
}

// === impl Trust ===

/// SHA-256 over several things, each with its length, in any order.
fn digest_of<'a>(kind: &[u8], things: impl Iterator<Item = Vec<&'a [u8]>>) -> [u8; 32] {
    let mut each: Vec<[u8; 32]> = things.map(|parts| digest_of_parts(&parts)).collect();
    each.sort_unstable();
    each.dedup();
    let each: Vec<&[u8]> = std::iter::once(kind).chain(each.iter().map(|digest| &digest[..])).collect();
    digest_of_parts(&each)
}

fn digest_of_parts(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    let mut of = [0; 32];
    of.copy_from_slice(context.finish().as_ref());
    of
}

impl Trust {
    fn new(roots: Arc<RootCertStore>, certificates: Vec<CertificateDer<'static>>, mut crls: Vec<Crl>) -> Self {
        crls.sort_by_key(|crl| Reverse(crl.issued));
        let anchors = roots.roots.iter().map(|anchor| {
            let constraints = anchor.name_constraints.as_deref().unwrap_or_default();
            vec![&*anchor.subject, &*anchor.subject_public_key_info, constraints]
        });
        let digest = digest_of_parts(&[
            &digest_of(b"roots", anchors),
            &digest_of(b"crls", crls.iter().map(|crl| vec![crl.der.as_ref()])),
        ]);
        let crls_until = crls.iter().filter_map(|crl| crl.until).min();
        let crls = crls.into_iter().map(|crl| crl.der).collect();
        Self { roots, certificates, crls, crls_until, digest }
    }

    /// The roots.
    pub fn roots(&self) -> &Arc<RootCertStore> {
        &self.roots
    }

    /// The roots' certificates as they were read.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// Stands for what is trusted: the same wherever roots and CRLs are the same, in whatever order.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// When the first of the CRLs expires: from then on nobody of its issuer is let in. None: there is none.
    pub fn crls_until(&self) -> Option<SystemTime> {
        self.crls_until
    }

    /// A verifier of clients' certificates, with which they have to come or may. With CRLs, each certificate of a chain
    /// below its root must be of an issuer whose CRL is there, has not expired, and does not hold it (RFC 5280 §6.3).
    ///
    /// # Errors
    /// rustls does not take the roots or the CRLs.
    pub fn verifier(&self, required: bool) -> Result<Arc<dyn ClientCertVerifier>, Error> {
        let mut builder = WebPkiClientVerifier::builder_with_provider(self.roots.clone(), Arc::new(provider()))
            .with_crls(self.crls.iter().cloned())
            .enforce_revocation_expiration();
        if self.roots.len() > MAX_HINTS {
            builder = builder.clear_root_hint_subjects();
        }
        if !required {
            builder = builder.allow_unauthenticated();
        }
        Ok(builder.build()?)
    }
}

// === impl TrustFiles ===

impl TrustFiles {
    /// What the files hold now.
    ///
    /// # Errors
    /// A file cannot be read, or is wrong; and which.
    pub fn load(&self) -> Result<Trust, FileError> {
        let (roots, certificates) = match &self.ca {
            Roots::System => system().map_err(FileError::of(Path::new("the system's roots")))?,
            Roots::Files(files) => {
                let mut roots = RootCertStore::empty();
                let mut certificates = vec![];
                for file in files {
                    let (some, of_file) = chain(&read(file)?)
                        .and_then(|certificates| Ok((store(&certificates)?, certificates)))
                        .map_err(FileError::of(file))?;
                    roots.extend(some.roots);
                    certificates.extend(of_file);
                }
                (roots, certificates)
            }
        };
        let roots = Arc::new(roots);
        let mut lists = vec![];
        for file in &self.crls {
            lists.extend(crls(&read(file)?, &roots).map_err(FileError::of(file))?);
        }
        Ok(Trust::new(roots, certificates, lists))
    }

    /// The files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let ca: &[PathBuf] = match &self.ca {
            Roots::System => &[],
            Roots::Files(files) => files,
        };
        ca.iter().chain(&self.crls).map(PathBuf::as_path)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Ca, Issued, client, handshake, now};
    use super::*;
    use crate::tls::{CertificateStore, server_config};
    use rustls::CertificateError;

    /// Files in a directory of their own.
    struct Dir(tempfile::TempDir);

    impl Dir {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn write(&self, name: &str, content: &str) -> PathBuf {
            let path = self.0.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        }

        /// What these CAs and CRLs say.
        fn trust(&self, cas: &[&Ca], crls: &[String]) -> Trust {
            let ca = cas.iter().enumerate().map(|(i, ca)| self.write(&format!("ca{i}.pem"), &ca.pem())).collect();
            let crls = crls.iter().enumerate().map(|(i, crl)| self.write(&format!("{i}.crl"), crl)).collect();
            TrustFiles { ca: Roots::Files(ca), crls }.load().unwrap()
        }
    }

    fn trust(cas: &[&Ca], crls: &[String]) -> Trust {
        Dir::new().trust(cas, crls)
    }

    /// What a listener that trusts this says of a certificate.
    fn verdict(trust: &Trust, issued: &Issued) -> Result<(), rustls::Error> {
        let (verifier, chain, now) = (trust.verifier(true).unwrap(), issued.chain(), UnixTime::now());
        let verdict = verifier.verify_client_cert(&chain[0], &chain[1..], now).map(|_| ());
        assert_eq!(still_trusted(&*verifier, &chain, now), verdict.is_ok());
        verdict
    }

    fn why(trust: &Trust, issued: &Issued) -> CertificateError {
        match verdict(trust, issued) {
            Err(rustls::Error::InvalidCertificate(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn without_crls_the_chain_decides() {
        let (ca, other) = (Ca::new("ca"), Ca::new("other"));
        let issued = ca.issue(&["a.example"]);
        assert_eq!(verdict(&trust(&[&ca], &[]), &issued), Ok(()));
        assert_eq!(verdict(&trust(&[&other, &ca], &[]), &issued), Ok(()));
        assert_eq!(why(&trust(&[&other], &[]), &issued), CertificateError::UnknownIssuer);
        let old = ca.issue_with(&["a.example"], |params| params.not_after = now(-60));
        assert!(matches!(why(&trust(&[&ca], &[]), &old), CertificateError::ExpiredContext { .. }));
        let below = ca.below("below").issue(&["a.example"]);
        assert_eq!(verdict(&trust(&[&ca], &[]), &below), Ok(()));

        let verifier = trust(&[&ca], &[]).verifier(false).unwrap();
        assert!(!verifier.client_auth_mandatory() && verifier.offer_client_auth());
        assert!(!still_trusted(&*verifier, &[], UnixTime::now()));
        let none = WebPkiClientVerifier::no_client_auth();
        assert!(!still_trusted(&*none, &issued.chain(), UnixTime::now()));
    }

    #[test]
    fn revoked_unknown_and_expired() {
        let ca = Ca::new("ca");
        let (good, bad) = (ca.issue(&["a.example"]), ca.issue(&["b.example"]));
        let listed = trust(&[&ca], &[ca.crl(&[&bad.serial], 3600)]);
        assert_eq!(verdict(&listed, &good), Ok(()));
        assert_eq!(why(&listed, &bad), CertificateError::Revoked);
        let left = listed.crls_until().unwrap().duration_since(SystemTime::now()).unwrap();
        assert!((3590..=3600).contains(&left.as_secs()), "{left:?}");

        let expired = trust(&[&ca], &[ca.crl(&[], -60)]);
        assert!(matches!(why(&expired, &good), CertificateError::ExpiredRevocationListContext { .. }));

        let other = Ca::new("other");
        let unknown = trust(&[&ca, &other], &[ca.crl(&[], 3600)]);
        assert_eq!(why(&unknown, &other.issue(&["c.example"])), CertificateError::UnknownRevocationStatus);

        // Whatever stands first in a file, the newest of an issuer counts.
        let (old, new) = (ca.crl(&[], -60), ca.crl(&[&bad.serial], 3600));
        let both = trust(&[&ca], &[format!("{old}{new}")]);
        assert_eq!(verdict(&both, &good), Ok(()));
        assert_eq!(why(&both, &bad), CertificateError::Revoked);
    }

    #[test]
    fn the_whole_chain_is_looked_at() {
        let ca = Ca::new("ca");
        let below = ca.below("below");
        let issued = below.issue(&["a.example"]);
        let of = |crls: &[String]| trust(&[&ca], crls);
        let nothing = below.crl(&[], 3600);
        assert_eq!(why(&of(std::slice::from_ref(&nothing)), &issued), CertificateError::UnknownRevocationStatus);
        assert_eq!(verdict(&of(&[nothing.clone(), ca.crl(&[], 3600)]), &issued), Ok(()));
        let revoked = ca.crl(&[&below.serial()], 3600);
        assert_eq!(why(&of(&[nothing, revoked]), &issued), CertificateError::Revoked);
    }

    #[test]
    fn digests_are_of_what_is_trusted() {
        let (a, b) = (Ca::new("a"), Ca::new("b"));
        let crls = [a.crl(&[], 3600), b.crl(&[], 7200)];
        let both = trust(&[&a, &b], &crls).digest();
        assert_eq!(both, trust(&[&b, &a], &[format!("{}{}", crls[1], crls[0])]).digest());
        let others = [
            trust(&[&a, &b], &[]),
            trust(&[&a], &[]),
            trust(&[&b], &[]),
            trust(&[&a, &b], &crls[..1]),
            trust(&[&a, &b], &[a.crl(&[&b.serial()], 3600), crls[1].clone()]),
        ];
        let mut digests: Vec<_> = others.iter().map(Trust::digest).chain([both]).collect();
        digests.sort_unstable();
        digests.dedup();
        assert_eq!(digests.len(), others.len() + 1);
    }

    #[test]
    fn errors_name_their_file() {
        let dir = Dir::new();
        let ca = Ca::new("ca");
        let (pem, crl) = (dir.write("ca.pem", &ca.pem()), ca.crl(&[], 3600));
        let load = |ca: &Path, crl: Option<&Path>| {
            let files =
                TrustFiles { ca: Roots::Files(vec![ca.into()]), crls: crl.map(PathBuf::from).into_iter().collect() };
            files.load().map(|_| files)
        };
        let error = load(&dir.0.path().join("none.pem"), None).unwrap_err();
        assert!(error.file.ends_with("none.pem") && matches!(error.error, Error::Io(_)), "{error}");
        let error = load(&dir.write("empty.pem", ""), None).unwrap_err();
        assert!(error.file.ends_with("empty.pem") && matches!(error.error, Error::NoCertificate), "{error}");
        let error = load(&pem, Some(&pem)).unwrap_err();
        assert!(error.file == pem && matches!(error.error, Error::NoCrl), "{error}");
        for (name, broken) in [("cut.crl", &crl[..crl.len() / 2]), ("other.crl", &crl.replacen('M', "A", 1))] {
            let path = dir.write(name, broken);
            let error = load(&pem, Some(&path)).unwrap_err();
            assert!(error.file == path && matches!(error.error, Error::BadCrl(_)), "{error}");
        }
        let whole = dir.write("whole.crl", &crl);
        let files = load(&pem, Some(&whole)).unwrap();
        assert_eq!(files.files().collect::<Vec<_>>(), [&pem, &whole]);
    }

    #[test]
    fn a_handshake_is_with_whom_the_listener_trusts() {
        let ca = Ca::new("ca");
        let store = CertificateStore::new(vec![ca.issue(&["a.example"]).certificate()]).unwrap();
        let store = Arc::new(store);
        let (good, bad) = (ca.issue(&["b.example"]), ca.issue(&["c.example"]));
        let trust = trust(&[&ca], &[ca.crl(&[&bad.serial], 3600)]);
        let names = |required, identity: Option<&Issued>| {
            let server = server_config(store.clone(), Some(trust.verifier(required).unwrap()), None).unwrap();
            let (_, server) = handshake(client(&ca, identity, &[]), Arc::new(server), "a.example")?;
            Ok::<_, rustls::Error>(server.peer_certificates().map(|chain| crate::tls::identity(&chain[0]).dns_names))
        };
        assert_eq!(names(true, Some(&good)), Ok(Some(vec!["b.example".to_owned()])));
        assert_eq!(names(false, Some(&good)), Ok(Some(vec!["b.example".to_owned()])));
        assert_eq!(names(false, None), Ok(None));
        assert_eq!(names(true, None), Err(rustls::Error::NoCertificatesPresented));
        assert_eq!(names(false, Some(&bad)), Err(CertificateError::Revoked.into()));
    }
}
