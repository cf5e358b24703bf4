//! The certificates of a listener, chosen by the name and the signatures that a client asks for.

use super::Certificate;
use rustls::SignatureScheme;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use smallvec::SmallVec;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

/// The certificates of a gateway, by SNI. Several for one name are there for their kinds of key (ECDSA, RSA, Ed25519):
/// a client gets the first that it can verify. The first of all is for those who name none, or one that is not ours.
#[derive(Debug)]
pub struct CertificateStore {
    first: Arc<Certificate>,
    /// Those for the same name as the first, which is one of them.
    beside_first: Vec<Arc<Certificate>>,
    by_name: HashMap<String, Vec<Arc<Certificate>>>,
    /// Wildcards, by what follows `*.`.
    by_parent: HashMap<String, Vec<Arc<Certificate>>>,
}

/// What a client can verify.
type Schemes = SmallVec<[SignatureScheme; 24]>;

/// Whether a handshake of TLS 1.3 can be signed so. Clients offer more, for the certificates of a chain
/// (RFC 8446 §4.2.3).
fn is_of_tls13(scheme: SignatureScheme) -> bool {
    !matches!(
        scheme,
        SignatureScheme::RSA_PKCS1_SHA1
            | SignatureScheme::RSA_PKCS1_SHA256
            | SignatureScheme::RSA_PKCS1_SHA384
            | SignatureScheme::RSA_PKCS1_SHA512
            | SignatureScheme::ECDSA_SHA1_Legacy
    )
}

impl CertificateStore {
    /// The certificates by their names. None where there is none.
    pub fn new(certificates: Vec<Certificate>) -> Option<Self> {
        let certificates: Vec<_> = certificates.into_iter().map(Arc::new).collect();
        let first = certificates.first()?.clone();
        let is_beside_first = |certificate: &&Arc<Certificate>| {
            Arc::ptr_eq(certificate, &first)
                || first.names().first().is_some_and(|name| certificate.names().contains(name))
        };
        let beside_first = certificates.iter().filter(is_beside_first).cloned().collect();
        let (mut by_name, mut by_parent) = (HashMap::<_, Vec<_>>::new(), HashMap::<_, Vec<_>>::new());
        for certificate in &certificates {
            for name in certificate.names() {
                let (names, name) = match name.strip_prefix("*.") {
                    Some(parent) => (&mut by_parent, parent),
                    None => (&mut by_name, name.as_str()),
                };
                names.entry(name.to_owned()).or_default().push(certificate.clone());
            }
        }
        Some(Self { first, beside_first, by_name, by_parent })
    }

    /// Those for a name in lower case: of it first, then wildcards.
    fn of_name<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Arc<Certificate>> {
        let wildcards = name.split_once('.').and_then(|(_, parent)| self.by_parent.get(parent));
        self.by_name.get(name).into_iter().chain(wildcards).flatten()
    }

    fn find(&self, name: Option<&str>, schemes: &[SignatureScheme]) -> &Arc<Certificate> {
        let schemes: Schemes = schemes.iter().copied().filter(|scheme| is_of_tls13(*scheme)).collect();
        let name = name.map(str::to_ascii_lowercase);
        let of_name = name.and_then(|name| choose(self.of_name(&name), &schemes));
        // A foreign name is refused with 421, once there is a channel to say so.
        of_name.or_else(|| choose(self.beside_first.iter(), &schemes)).unwrap_or(&self.first)
    }
}

/// The first whose key can sign what the client can verify; else the first.
fn choose<'a>(
    mut candidates: impl Iterator<Item = &'a Arc<Certificate>>,
    schemes: &Schemes,
) -> Option<&'a Arc<Certificate>> {
    let first = candidates.next()?;
    let mut all = std::iter::once(first).chain(candidates);
    Some(all.find(|certificate| certificate.can_sign(schemes)).unwrap_or(first))
}

impl ResolvesServerCert for CertificateStore {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let certificate = self.find(hello.server_name(), hello.signature_schemes());
        Some(certificate.certified(SystemTime::now()).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Ca, Issued, client, handshake};
    use super::*;
    use rcgen::{PKCS_ECDSA_P256_SHA256, PKCS_ED25519, PKCS_RSA_SHA256};
    use std::time::Duration;

    const ALL: [SignatureScheme; 4] = [
        SignatureScheme::RSA_PKCS1_SHA256,
        SignatureScheme::ED25519,
        SignatureScheme::RSA_PSS_SHA256,
        SignatureScheme::ECDSA_NISTP256_SHA256,
    ];

    fn store(issued: &[&Issued]) -> CertificateStore {
        CertificateStore::new(issued.iter().map(|issued| issued.certificate()).collect()).unwrap()
    }

    fn found(store: &CertificateStore, name: Option<&str>, schemes: &[SignatureScheme]) -> Vec<u8> {
        store.find(name, schemes).chain()[0].to_vec()
    }

    #[test]
    fn certificates_by_name() {
        let ca = Ca::new("ca");
        let a = ca.issue(&["a.example"]);
        let b = ca.issue(&["b.example", "*.b.example"]);
        let x = ca.issue(&["x.b.example"]);
        let again = ca.issue(&["a.example"]);
        let store = store(&[&a, &b, &x, &again]);
        for (name, issued) in [
            (Some("a.example"), &a),
            (Some("A.Example"), &a),
            (Some("b.example"), &b),
            (Some("y.b.example"), &b),
            (Some("x.b.example"), &x),
            (Some("x.y.b.example"), &a),
            (Some("x.a.example"), &a),
            (Some("example"), &a),
            (None, &a),
        ] {
            assert_eq!(found(&store, name, &ALL), issued.der.to_vec(), "{name:?}");
        }
        assert!(CertificateStore::new(vec![]).is_none());
    }

    #[test]
    fn the_first_key_that_a_client_can_verify() {
        let ca = Ca::new("ca");
        let rsa = ca.issue_of(&PKCS_RSA_SHA256, &["a.example"]);
        let ed25519 = ca.issue_of(&PKCS_ED25519, &["a.example"]);
        let ecdsa = ca.issue_of(&PKCS_ECDSA_P256_SHA256, &["*.example", "a.example"]);
        let wild = ca.issue_of(&PKCS_ED25519, &["*.example"]);
        let all = store(&[&rsa, &ed25519, &ecdsa, &wild]);
        let types: Vec<_> = [&rsa, &ed25519, &ecdsa].iter().map(|issued| issued.certificate().key_type()).collect();
        assert_eq!(types, ["RSA", "ED25519", "ECDSA"]);
        for (schemes, issued) in [
            (&ALL[..], &rsa),
            (&[SignatureScheme::ED25519], &ed25519),
            (&[SignatureScheme::ECDSA_NISTP256_SHA256], &ecdsa),
            // For certificates it may be, for handshakes it is not (RFC 8446 §4.2.3).
            (&[SignatureScheme::RSA_PKCS1_SHA256, SignatureScheme::ECDSA_NISTP256_SHA256], &ecdsa),
            (&[SignatureScheme::ECDSA_NISTP384_SHA384], &rsa),
            (&[], &rsa),
        ] {
            for name in [Some("a.example"), None, Some("elsewhere.test")] {
                assert_eq!(found(&all, name, schemes), issued.der.to_vec(), "{name:?} {schemes:?}");
            }
        }
        // A wildcard's where the name's own has no such key.
        let few = store(&[&rsa, &wild]);
        assert_eq!(found(&few, Some("a.example"), &[SignatureScheme::ED25519]), wild.der.to_vec());
        assert_eq!(found(&few, Some("a.example"), &ALL), rsa.der.to_vec());
    }

    #[test]
    fn a_handshake_is_signed_as_its_client_can_verify() {
        let ca = Ca::new("ca");
        let rsa = ca.issue_of(&PKCS_RSA_SHA256, &["a.example"]);
        let ecdsa = ca.issue_of(&PKCS_ECDSA_P256_SHA256, &["a.example"]);
        let store = store(&[&ecdsa, &rsa]);
        let server = Arc::new(super::super::server_config(Arc::new(store), None, None).unwrap());
        for (scheme, issued) in
            [(SignatureScheme::RSA_PSS_SHA256, &rsa), (SignatureScheme::ECDSA_NISTP256_SHA256, &ecdsa)]
        {
            let (client, _) = handshake(client(&ca, None, &[scheme]), server.clone(), "a.example").unwrap();
            assert_eq!(client.peer_certificates().unwrap()[0], issued.der);
        }
        assert!(handshake(client(&ca, None, &[SignatureScheme::ED25519]), server, "a.example").is_err());
    }

    #[test]
    fn a_staple_is_sent_while_it_is_good() {
        let ca = Ca::new("ca");
        let issued = ca.issue(&["a.example"]);
        let response = ca.ocsp(&issued).until(600).signed();
        let certificate = issued.certificate().with_ocsp(&response).unwrap();
        let until = certificate.ocsp_until().unwrap();
        let at = |time| certificate.certified(time).ocsp.clone();
        assert_eq!(at(SystemTime::now()), Some(response.clone()));
        assert_eq!(at(until - Duration::from_secs(1)), Some(response.clone()));
        assert_eq!(at(until), None);
    }
}
