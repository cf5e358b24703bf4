//! Certificates made on the spot: authorities, certificates for servers and clients at once (ECDSA P-256, or another
//! kind of key), lists of what is revoked, and OCSP responses.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
    SignatureAlgorithm, SigningKey as _,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// A certificate authority.
#[derive(Debug)]
pub struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
    /// What its certificates come with: its own and those above it, but for the root.
    above: String,
}

/// So many seconds from now; before now, if they are negative.
pub fn now<T: From<SystemTime>>(seconds: i64) -> T {
    let by = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { (SystemTime::now() - by).into() } else { (SystemTime::now() + by).into() }
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl Ca {
    /// A new authority with a new key.
    pub fn new(name: &str) -> Ca {
        let issuer = CertifiedIssuer::self_signed(authority(name), KeyPair::generate().unwrap()).unwrap();
        Ca { issuer, above: String::new() }
    }

    /// One below this. Its certificates come with its own, so that they chain to the root.
    pub fn below(&self, name: &str) -> Ca {
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::signed_by(authority(name), key, &self.issuer).unwrap();
        Ca { above: issuer.pem() + &self.above, issuer }
    }

    /// The root certificate.
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// Writes the root certificate to `dir/name.pem`.
    pub fn write(&self, dir: &Path, name: &str) -> PathBuf {
        write(dir, &format!("{name}.pem"), &self.pem())
    }

    /// A certificate for these DNS names, of a server and a client, with a new key.
    pub fn issue(&self, names: &[&str]) -> Identity {
        self.issue_with(names, |_| ())
    }

    /// As [`Ca::issue`], with something changed before it is signed: dates, names, key usages.
    pub fn issue_with(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Identity {
        self.sign(&KeyPair::generate().unwrap(), names, change)
    }

    /// As [`Ca::issue`], with another kind of key: `rcgen::PKCS_RSA_SHA256`, `rcgen::PKCS_ED25519`.
    pub fn issue_of(&self, kind: &'static SignatureAlgorithm, names: &[&str]) -> Identity {
        self.sign(&KeyPair::generate_for(kind).unwrap(), names, |_| ())
    }

    fn sign(&self, key: &KeyPair, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names.clone()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, names.first().map_or("nobody", String::as_str));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        change(&mut params);
        let certificate = params.signed_by(key, &self.issuer).unwrap();
        Identity { chain_pem: certificate.pem() + &self.above, key_pem: key.serialize_pem() }
    }

    /// A list in PEM of these as revoked, good for an hour.
    pub fn crl(&self, revoked: &[&Identity]) -> String {
        self.crl_until(revoked, 3600)
    }

    /// As [`Ca::crl`], good until so many seconds from now.
    pub fn crl_until(&self, revoked: &[&Identity], until: i64) -> String {
        let revoked = revoked.iter().map(|identity| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&read(&identity.der(), |it| it.raw_serial().to_vec())),
            revocation_time: now(-7200),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: now(until - 86_400),
            next_update: now(until),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    /// An OCSP response in DER (RFC 6960 §4.2.1) that a certificate is good, itself good for an hour.
    pub fn ocsp(&self, about: &Identity) -> Vec<u8> {
        self.ocsp_until(about, 3600)
    }

    /// As [`Ca::ocsp`], good until so many seconds from now.
    pub fn ocsp_until(&self, about: &Identity, until: i64) -> Vec<u8> {
        let sha1 = |octets: &[u8]| {
            let digest = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, octets);
            der(0x04, &[digest.as_ref()])
        };
        let time = |seconds: i64| {
            let time: chrono::DateTime<chrono::Utc> = now(seconds);
            der(0x18, &[time.format("%Y%m%d%H%M%SZ").to_string().as_bytes()])
        };
        let (name, key) =
            read(self.issuer.der(), |it| (sha1(it.subject().as_raw()), sha1(&it.public_key().subject_public_key.data)));
        let serial = der(0x02, &[&read(&about.der(), |it| it.raw_serial().to_vec())]);
        let by_sha1 = sequence(&[&der(0x06, &[&[0x2b, 0x0e, 0x03, 0x02, 0x1a]]), &der(0x05, &[])]);
        let id = sequence(&[&by_sha1, &name, &key, &serial]);
        let good = der(0x80, &[]);
        let answer = sequence(&[&id, &good, &time(until.min(0) - 3600), &der(0xa0, &[&time(until)])]);
        // The responder, by a hash of its key that nobody looks at.
        let responder = der(0xa2, &[&der(0x04, &[&[0; 20]])]);
        let data = sequence(&[&responder, &time(until.min(0)), &sequence(&[&answer])]);
        // ecdsa-with-SHA256, id-pkix-ocsp-basic
        let algorithm = sequence(&[&der(0x06, &[&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02]])]);
        let signature = der(0x03, &[&[0], &self.issuer.key().sign(&data).unwrap()]);
        let basic = sequence(&[&data, &algorithm, &signature]);
        let kind = der(0x06, &[&[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x30, 0x01, 0x01]]);
        let bytes = sequence(&[&kind, &der(0x04, &[&basic])]);
        sequence(&[&der(0x0a, &[&[0]]), &der(0xa0, &[&bytes])])
    }
}

/// A DER element.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let mut element = vec![tag];
    match u16::try_from(content.len()).unwrap().to_be_bytes() {
        [0, short @ 0..=0x7f] => element.push(short),
        [0, long] => element.extend([0x81, long]),
        [high, low] => element.extend([0x82, high, low]),
    }
    element.extend(content);
    element
}

fn sequence(parts: &[&[u8]]) -> Vec<u8> {
    der(0x30, parts)
}

/// What a certificate says.
fn read<T>(certificate: &CertificateDer<'_>, what: impl FnOnce(&X509Certificate<'_>) -> T) -> T {
    what(&X509Certificate::from_der(certificate).unwrap().1)
}

/// A certificate and its key.
#[derive(Debug, Clone)]
pub struct Identity {
    pub chain_pem: String,
    pub key_pem: String,
}

impl Identity {
    /// Writes `dir/name.pem` and `dir/name.key`, and returns the two paths.
    pub fn write(&self, dir: &Path, name: &str) -> (PathBuf, PathBuf) {
        (write(dir, &format!("{name}.pem"), &self.chain_pem), write(dir, &format!("{name}.key"), &self.key_pem))
    }

    /// The certificate, without those above it.
    pub fn der(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.chain_pem.as_bytes()).unwrap()
    }

    /// SHA-256 of its SubjectPublicKeyInfo, in base64.
    pub fn spki_sha256(&self) -> String {
        read(&self.der(), |it| BASE64_STANDARD.encode(digest::digest(&digest::SHA256, it.public_key().raw)))
    }

    /// When it ends, by the Unix clock.
    pub fn not_after(&self) -> i64 {
        read(&self.der(), |it| it.validity().not_after.timestamp())
    }
}

fn write(dir: &Path, name: &str, content: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path
}
