//! What the tests of this room share: an authority with certificates, CRLs and OCSP responses; handshakes in memory.

use super::certificate::parse;
use super::{Certificate, provider};
use aws_lc_rs::digest;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
    SignatureAlgorithm, SigningKey as _,
};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, RootCertStore, ServerConfig, ServerConnection, SignatureScheme,
};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// So many seconds from now.
pub(super) fn now<T: From<SystemTime>>(seconds: i64) -> T {
    let by = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { (SystemTime::now() - by).into() } else { (SystemTime::now() + by).into() }
}

/// An authority.
pub(super) struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
    above: Vec<CertificateDer<'static>>,
}

/// A certificate and its key.
pub(super) struct Issued {
    pub(super) der: CertificateDer<'static>,
    pub(super) key: KeyPair,
    pub(super) serial: SerialNumber,
    chain: Vec<CertificateDer<'static>>,
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn pem(der: &[u8]) -> String {
    let text = BASE64_STANDARD.encode(der);
    let lines: Vec<_> = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

fn serial(der: &CertificateDer<'_>) -> SerialNumber {
    SerialNumber::from_slice(parse(der).unwrap().raw_serial())
}

impl Ca {
    pub(super) fn new(name: &str) -> Self {
        let issuer = CertifiedIssuer::self_signed(ca_params(name), KeyPair::generate().unwrap()).unwrap();
        Self { issuer, above: vec![] }
    }

    /// One below this.
    pub(super) fn below(&self, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::signed_by(ca_params(name), key, &self.issuer).unwrap();
        Self { issuer, above: self.chain() }
    }

    pub(super) fn der(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }

    pub(super) fn pem(&self) -> String {
        pem(&self.der())
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        std::iter::once(self.der()).chain(self.above.iter().cloned()).collect()
    }

    pub(super) fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.der()).unwrap();
        Arc::new(roots)
    }

    pub(super) fn issue(&self, names: &[&str]) -> Issued {
        self.issue_with(names, |_| ())
    }

    pub(super) fn issue_with(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Issued {
        self.make(KeyPair::generate().unwrap(), names, change)
    }

    /// With another kind of key.
    pub(super) fn issue_of(&self, kind: &'static SignatureAlgorithm, names: &[&str]) -> Issued {
        self.make(KeyPair::generate_for(kind).unwrap(), names, |_| ())
    }

    fn make(&self, key: KeyPair, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Issued {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, "somebody");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let der = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Issued { serial: serial(&der), der, key, chain: self.chain() }
    }

    /// A CRL in PEM with these serial numbers, which ends so many seconds from now.
    pub(super) fn crl(&self, revoked: &[&SerialNumber], until: i64) -> String {
        let revoked = revoked.iter().map(|&serial| RevokedCertParams {
            serial_number: serial.clone(),
            revocation_time: now(-7200),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            // The later one ends, the later it began.
            this_update: now(until - 86_400),
            next_update: now(until),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    /// The serial number of its own certificate.
    pub(super) fn serial(&self) -> SerialNumber {
        serial(&self.der())
    }

    /// An OCSP response that a certificate is good, since an hour, for an hour.
    pub(super) fn ocsp<'a>(&'a self, about: &Issued) -> Ocsp<'a> {
        Ocsp {
            ca: self,
            serial: parse(&about.der).unwrap().raw_serial().to_vec(),
            status: der(0x80, &[]),
            since: -3600,
            until: Some(3600),
            sha256: false,
            others: vec![],
            signer: None,
        }
    }
}

impl Issued {
    pub(super) fn chain_pem(&self) -> String {
        std::iter::once(&self.der).chain(&self.chain).map(|der| pem(der)).collect()
    }

    /// The certificate and those above it.
    pub(super) fn chain(&self) -> Vec<CertificateDer<'static>> {
        std::iter::once(&self.der).chain(&self.chain).cloned().collect()
    }

    pub(super) fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    pub(super) fn certificate(&self) -> Certificate {
        Certificate::new(self.chain_pem().as_bytes(), self.key_pem().as_bytes()).unwrap()
    }
}

// === Ocsp ===

/// An OCSP response, written by hand (RFC 6960 §4.2.1).
pub(super) struct Ocsp<'a> {
    ca: &'a Ca,
    serial: Vec<u8>,
    status: Vec<u8>,
    since: i64,
    until: Option<i64>,
    sha256: bool,
    others: Vec<u8>,
    signer: Option<&'a Issued>,
}

/// A DER element.
pub(super) fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
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

fn time(seconds: i64) -> Vec<u8> {
    let time: chrono::DateTime<chrono::Utc> = now(seconds);
    der(0x18, &[time.format("%Y%m%d%H%M%SZ").to_string().as_bytes()])
}

impl<'a> Ocsp<'a> {
    pub(super) fn since(self, since: i64) -> Self {
        Self { since, ..self }
    }

    pub(super) fn until(self, until: i64) -> Self {
        Self { until: Some(until), ..self }
    }

    pub(super) fn without_end(self) -> Self {
        Self { until: None, ..self }
    }

    /// With another CertStatus.
    pub(super) fn status(self, status: Vec<u8>) -> Self {
        Self { status, ..self }
    }

    /// With hashes by SHA-256.
    pub(super) fn by_sha256(self) -> Self {
        Self { sha256: true, ..self }
    }

    /// Signed by another than the authority, whose certificate comes with it.
    pub(super) fn signed_by(self, signer: &'a Issued) -> Self {
        Self { signer: Some(signer), ..self }
    }

    /// With another answer behind this one.
    pub(super) fn and(self, mut next: Self) -> Self {
        next.others = self.answers();
        next
    }

    fn answers(&self) -> Vec<u8> {
        let (algorithm, oid): (_, &[u8]) = if self.sha256 {
            (&digest::SHA256, &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01])
        } else {
            (&digest::SHA1_FOR_LEGACY_USE_ONLY, &[0x2b, 0x0e, 0x03, 0x02, 0x1a])
        };
        let hash = |octets: &[u8]| der(0x04, &[digest::digest(algorithm, octets).as_ref()]);
        let ca = self.ca.der();
        let ca = parse(&ca).unwrap();
        let id = sequence(&[
            &sequence(&[&der(0x06, &[oid]), &der(0x05, &[])]),
            &hash(ca.subject().as_raw()),
            &hash(&ca.public_key().subject_public_key.data),
            &der(0x02, &[&self.serial]),
        ]);
        let until = self.until.map(|until| der(0xa0, &[&time(until)])).unwrap_or_default();
        let answer = sequence(&[&id, &self.status, &time(self.since), &until]);
        [&self.others[..], &answer].concat()
    }

    pub(super) fn signed(&self) -> Vec<u8> {
        let responder = der(0xa2, &[&der(0x04, &[&[0; 20]])]);
        let data = sequence(&[&responder, &time(0), &sequence(&[&self.answers()])]);
        let key = self.signer.map_or(self.ca.issuer.key(), |signer| &signer.key);
        // ecdsa-with-SHA256
        let algorithm = sequence(&[&der(0x06, &[&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02]])]);
        let signature = der(0x03, &[&[0], &key.sign(&data).unwrap()]);
        let certificates = self.signer.map(|signer| der(0xa0, &[&sequence(&[&signer.der])])).unwrap_or_default();
        let basic = sequence(&[&data, &algorithm, &signature, &certificates]);
        let kind = der(0x06, &[&[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x30, 0x01, 0x01]]);
        let bytes = sequence(&[&kind, &der(0x04, &[&basic])]);
        sequence(&[&der(0x0a, &[&[0]]), &der(0xa0, &[&bytes])])
    }
}

// === handshakes ===

/// A client that trusts an authority, shows a certificate, and can verify these signatures; without any: all.
pub(super) fn client(ca: &Ca, identity: Option<&Issued>, schemes: &[SignatureScheme]) -> Arc<ClientConfig> {
    let mut provider = provider();
    if !schemes.is_empty() {
        let mapping = provider.signature_verification_algorithms.mapping.iter().copied();
        let mapping: Vec<_> = mapping.filter(|(scheme, _)| schemes.contains(scheme)).collect();
        provider.signature_verification_algorithms.mapping = mapping.leak();
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(ca.roots());
    Arc::new(match identity {
        Some(identity) => builder.with_client_cert_resolver(identity.certificate().resolver()),
        None => builder.with_no_client_auth(),
    })
}

/// Whether anything was there to pass on.
fn pass<A, B>(from: &mut ConnectionCommon<A>, to: &mut ConnectionCommon<B>) -> Result<bool, rustls::Error> {
    let mut octets = vec![];
    while from.wants_write() {
        from.write_tls(&mut octets).unwrap();
    }
    let mut left = &octets[..];
    while !left.is_empty() {
        to.read_tls(&mut left).unwrap();
        to.process_new_packets()?;
    }
    Ok(!octets.is_empty())
}

/// A handshake, and the tickets after it.
pub(super) fn handshake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    name: &str,
) -> Result<(ClientConnection, ServerConnection), rustls::Error> {
    let mut client = ClientConnection::new(client, ServerName::try_from(name.to_owned()).unwrap())?;
    let mut server = ServerConnection::new(server)?;
    while pass(&mut client, &mut server)? | pass(&mut server, &mut client)? {}
    Ok((client, server))
}
