//! OCSP responses (RFC 6960) that are stapled to a certificate (RFC 8446 §4.4.2.1).
//!
//! A client that is shown a bad one ends the handshake, so a response is held against its certificate before it is
//! sent. Its signature can be verified where the chain has the issuer's certificate; otherwise that is left to the
//! clients, who verify it in any case.

use super::certificate::{parse, system_time};
use super::provider;
use aws_lc_rs::digest;
use rustls::pki_types::CertificateDer;
use std::time::{Duration, SystemTime};
use x509_parser::asn1_rs::{Any, Class, Tag};
use x509_parser::prelude::{ASN1Time, FromDer as _, X509Certificate};

/// Why an OCSP response is no proof that a certificate is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OcspError {
    /// Not DER, or not of the form of RFC 6960.
    #[error("no OCSP response in DER (RFC 6960)")]
    Malformed,
    /// The responder says that it has no answer (OCSPResponseStatus).
    #[error("the responder answered with an error (responseStatus {0})")]
    NotSuccessful(u8),
    /// No answer in it is about the certificate.
    #[error("the OCSP response is about another certificate")]
    OtherCertificate,
    /// An answer is about a certificate of the same number of another issuer.
    #[error("the OCSP response is about a certificate of another issuer")]
    OtherIssuer,
    /// The certificate has been revoked.
    #[error("the certificate is revoked")]
    Revoked,
    /// The responder knows nothing of the certificate.
    #[error("the responder does not know the certificate")]
    Unknown,
    /// It begins to be valid later (thisUpdate).
    #[error("the OCSP response is not yet valid")]
    NotYetValid,
    /// It does not say until when it is valid.
    #[error("the OCSP response has no end (nextUpdate)")]
    NoEnd,
    /// It is no longer valid (nextUpdate).
    #[error("the OCSP response has expired")]
    Expired,
    /// The issuer has not signed it, nor has one to whom the issuer gave this task.
    #[error("the OCSP response is not signed by the certificate's issuer, or not in a way that can be verified")]
    BadSignature,
}

/// By how much a responder's clock may be ahead.
const SKEW: Duration = Duration::from_secs(5 * 60);

/// id-pkix-ocsp-basic, 1.3.6.1.5.5.7.48.1.1
const BASIC: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x30, 0x01, 0x01];

/// The hashes that a CertID may be of.
static HASHES: [(&[u8], &digest::Algorithm); 4] = [
    (&[0x2b, 0x0e, 0x03, 0x02, 0x1a], &digest::SHA1_FOR_LEGACY_USE_ONLY),
    (&[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01], &digest::SHA256),
    (&[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02], &digest::SHA384),
    (&[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03], &digest::SHA512),
];

/// Whether a response says that the first certificate of a chain is good, and until when. Whether that has passed is
/// for the caller to see.
pub(super) fn check(der: &[u8], chain: &[CertificateDer<'_>], now: SystemTime) -> Result<SystemTime, OcspError> {
    let (leaf, others) = chain.split_first().ok_or(OcspError::OtherCertificate)?;
    let leaf = parse(leaf).map_err(|_| OcspError::OtherCertificate)?;
    let issuer = others
        .iter()
        .filter_map(|certificate| parse(certificate).ok())
        .find(|certificate| certificate.subject().as_raw() == leaf.issuer().as_raw());

    let mut basic = basic_response(der)?;
    let signed = Signed::read(&mut basic)?;
    let answer = Answer::find(signed.content, &leaf, issuer.as_ref())?;
    if let Some(issuer) = &issuer {
        let certificates = basic.explicit(0)?;
        if !signed.is_by(issuer) && !is_by_delegate(&signed, certificates, issuer, now)? {
            return Err(OcspError::BadSignature);
        }
    }
    match answer.status {
        GOOD => {}
        REVOKED => return Err(OcspError::Revoked),
        _ => return Err(OcspError::Unknown),
    }
    if answer.this_update > now.checked_add(SKEW).unwrap_or(now) {
        return Err(OcspError::NotYetValid);
    }
    answer.next_update.ok_or(OcspError::NoEnd)
}

/// What stands in the BasicOCSPResponse of an OCSPResponse.
fn basic_response(der: &[u8]) -> Result<Elements<'_>, OcspError> {
    let mut outer = Elements(der);
    let mut response = Elements(outer.of(Tag::Sequence)?.content);
    if !outer.0.is_empty() {
        return Err(OcspError::Malformed);
    }
    match response.of(Tag::Enumerated)?.content {
        [0] => {}
        [status] => return Err(OcspError::NotSuccessful(*status)),
        _ => return Err(OcspError::Malformed),
    }
    let mut bytes = Elements(response.explicit(0)?.ok_or(OcspError::Malformed)?);
    let mut bytes = Elements(bytes.of(Tag::Sequence)?.content);
    if bytes.of(Tag::Oid)?.content != BASIC {
        return Err(OcspError::Malformed);
    }
    let mut basic = Elements(bytes.of(Tag::OctetString)?.content);
    Ok(Elements(basic.of(Tag::Sequence)?.content))
}

/// One to whom the issuer gave the task of signing (RFC 6960 §4.2.2.2): its certificate comes with the response.
fn is_by_delegate(
    signed: &Signed<'_>,
    certificates: Option<&[u8]>,
    issuer: &X509Certificate<'_>,
    now: SystemTime,
) -> Result<bool, OcspError> {
    let Some(certificates) = certificates else { return Ok(false) };
    let mut certificates = Elements(Elements(certificates).of(Tag::Sequence)?.content);
    while !certificates.0.is_empty() {
        let element = certificates.of(Tag::Sequence)?;
        let (_, certificate) = X509Certificate::from_der(element.raw).map_err(|_| OcspError::Malformed)?;
        let usage = certificate.extended_key_usage().map_err(|_| OcspError::Malformed)?;
        let validity = certificate.validity();
        let is_delegate = usage.is_some_and(|usage| usage.value.ocsp_signing)
            && certificate.issuer().as_raw() == issuer.subject().as_raw()
            && (system_time(validity.not_before)..=system_time(validity.not_after)).contains(&now);
        if is_delegate && Signed::read(&mut Elements(element.content))?.is_by(issuer) && signed.is_by(&certificate) {
            return Ok(true);
        }
    }
    Ok(false)
}

// === Answer ===

/// What a SingleResponse says.
struct Answer {
    /// The number of the alternative of CertStatus.
    status: u32,
    this_update: SystemTime,
    next_update: Option<SystemTime>,
}

const GOOD: u32 = 0;
const REVOKED: u32 = 1;

impl Answer {
    /// The answer about a certificate in a ResponseData.
    fn find(data: &[u8], leaf: &X509Certificate<'_>, issuer: Option<&X509Certificate<'_>>) -> Result<Self, OcspError> {
        let mut data = Elements(data);
        let _version = data.explicit(0)?;
        let _responder = data.any()?;
        let _produced_at = data.of(Tag::GeneralizedTime)?;
        let mut answers = Elements(data.of(Tag::Sequence)?.content);
        while !answers.0.is_empty() {
            let mut answer = Elements(answers.of(Tag::Sequence)?.content);
            let mut id = Elements(answer.of(Tag::Sequence)?.content);
            let mut algorithm = Elements(id.of(Tag::Sequence)?.content);
            let hash = algorithm.of(Tag::Oid)?.content;
            let (name, key) = (id.of(Tag::OctetString)?.content, id.of(Tag::OctetString)?.content);
            if id.of(Tag::Integer)?.content != leaf.raw_serial() {
                continue;
            }
            let (_, hash) = HASHES.iter().find(|(oid, _)| *oid == hash).ok_or(OcspError::OtherIssuer)?;
            let is = |octets: &[u8], expected: &[u8]| digest::digest(hash, octets).as_ref() == expected;
            let is_key = |issuer: &X509Certificate<'_>| is(&issuer.public_key().subject_public_key.data, key);
            if !is(leaf.issuer().as_raw(), name) || !issuer.is_none_or(is_key) {
                return Err(OcspError::OtherIssuer);
            }
            let status = answer.any()?;
            if status.class != Class::ContextSpecific {
                return Err(OcspError::Malformed);
            }
            let this_update = time(answer.of(Tag::GeneralizedTime)?)?;
            let next_update = match answer.explicit(0)? {
                Some(next) => Some(time(Elements(next).of(Tag::GeneralizedTime)?)?),
                None => None,
            };
            return Ok(Self { status: status.tag.0, this_update, next_update });
        }
        Err(OcspError::OtherCertificate)
    }
}

fn time(element: Element<'_>) -> Result<SystemTime, OcspError> {
    ASN1Time::from_der(element.raw).map(|(_, time)| system_time(time)).map_err(|_| OcspError::Malformed)
}

// === Signed ===

/// What certificates and responses have in common: something, how it is signed, and its signature.
struct Signed<'a> {
    /// As it was signed.
    raw: &'a [u8],
    content: &'a [u8],
    algorithm: &'a [u8],
    signature: &'a [u8],
}

impl<'a> Signed<'a> {
    fn read(elements: &mut Elements<'a>) -> Result<Self, OcspError> {
        let signed = elements.of(Tag::Sequence)?;
        let algorithm = elements.of(Tag::Sequence)?.content;
        let signature = bits(elements.of(Tag::BitString)?)?;
        Ok(Self { raw: signed.raw, content: signed.content, algorithm, signature })
    }

    /// Whether the key of a certificate has signed this, in one of the ways that certificates may be signed in.
    fn is_by(&self, signer: &X509Certificate<'_>) -> bool {
        let Ok((algorithm, key)) = public_key(signer.public_key().raw) else { return false };
        provider().signature_verification_algorithms.all.iter().any(|verification| {
            verification.signature_alg_id().as_ref() == self.algorithm
                && verification.public_key_alg_id().as_ref() == algorithm
                && verification.verify_signature(key, self.raw, self.signature).is_ok()
        })
    }
}

/// The algorithm and the key of a SubjectPublicKeyInfo.
fn public_key(spki: &[u8]) -> Result<(&[u8], &[u8]), OcspError> {
    let mut spki = Elements(Elements(spki).of(Tag::Sequence)?.content);
    let algorithm = spki.of(Tag::Sequence)?.content;
    Ok((algorithm, bits(spki.of(Tag::BitString)?)?))
}

/// A BIT STRING of whole octets.
fn bits(element: Element<'_>) -> Result<&[u8], OcspError> {
    match element.content.split_first() {
        Some((0, octets)) => Ok(octets),
        _ => Err(OcspError::Malformed),
    }
}

// === Elements ===

/// DER elements, one after another.
struct Elements<'a>(&'a [u8]);

/// One of them.
#[derive(Clone, Copy)]
struct Element<'a> {
    class: Class,
    tag: Tag,
    /// All of it.
    raw: &'a [u8],
    content: &'a [u8],
}

impl<'a> Elements<'a> {
    /// The next.
    fn any(&mut self) -> Result<Element<'a>, OcspError> {
        let (rest, any) = Any::from_der(self.0).map_err(|_| OcspError::Malformed)?;
        let raw = self.0.get(..self.0.len().saturating_sub(rest.len())).ok_or(OcspError::Malformed)?;
        self.0 = rest;
        Ok(Element { class: any.class(), tag: any.tag(), raw, content: any.data })
    }

    /// The next, which has to be of this universal type.
    fn of(&mut self, tag: Tag) -> Result<Element<'a>, OcspError> {
        let element = self.any()?;
        if element.class == Class::Universal && element.tag == tag { Ok(element) } else { Err(OcspError::Malformed) }
    }

    /// What stands in the next, if that has this tag.
    fn explicit(&mut self, number: u32) -> Result<Option<&'a [u8]>, OcspError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let mut ahead = Elements(self.0);
        let element = ahead.any()?;
        if element.class != Class::ContextSpecific || element.tag != Tag(number) {
            return Ok(None);
        }
        self.0 = ahead.0;
        Ok(Some(element.content))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Ca, Issued, Ocsp, der, now};
    use super::*;
    use rcgen::ExtendedKeyUsagePurpose;

    fn checked(issued: &Issued, response: &Ocsp<'_>) -> Result<SystemTime, OcspError> {
        check(&response.signed(), issued.certificate().chain(), SystemTime::now())
    }

    #[test]
    fn a_good_one_is_good_until_its_end() {
        let ca = Ca::new("ca");
        let issued = ca.issue(&["a.example"]);
        let until = checked(&issued, &ca.ocsp(&issued).until(3600)).unwrap();
        let left = until.duration_since(SystemTime::now()).unwrap();
        assert!((3590..=3600).contains(&left.as_secs()), "{left:?}");
        assert!(issued.certificate().with_ocsp(&ca.ocsp(&issued).signed()).is_ok());
        assert!(checked(&issued, &ca.ocsp(&issued).by_sha256()).is_ok());
        // Among answers about others.
        let other = ca.issue(&["b.example"]);
        assert!(checked(&issued, &ca.ocsp(&other).and(ca.ocsp(&issued))).is_ok());
    }

    #[test]
    fn expired_and_not_yet() {
        let ca = Ca::new("ca");
        let issued = ca.issue(&["a.example"]);
        let expired = ca.ocsp(&issued).until(-1);
        assert!(checked(&issued, &expired).unwrap() < SystemTime::now(), "for the caller to see");
        let error = issued.certificate().with_ocsp(&expired.signed()).unwrap_err();
        assert!(matches!(error, super::super::Error::Ocsp(OcspError::Expired)), "{error}");
        assert_eq!(checked(&issued, &ca.ocsp(&issued).since(400).until(4000)), Err(OcspError::NotYetValid));
        assert!(checked(&issued, &ca.ocsp(&issued).since(200).until(4000)).is_ok(), "a clock that is ahead");
        assert_eq!(checked(&issued, &ca.ocsp(&issued).without_end()), Err(OcspError::NoEnd));
    }

    #[test]
    fn revoked_and_unknown() {
        let ca = Ca::new("ca");
        let issued = ca.issue(&["a.example"]);
        let revoked = der(0xa1, &[&der(0x18, &[b"20200101000000Z"])]);
        assert_eq!(checked(&issued, &ca.ocsp(&issued).status(revoked)), Err(OcspError::Revoked));
        assert_eq!(checked(&issued, &ca.ocsp(&issued).status(der(0x82, &[]))), Err(OcspError::Unknown));
    }

    #[test]
    fn about_another() {
        let (ca, other_ca) = (Ca::new("ca"), Ca::new("other ca"));
        let issued = ca.issue(&["a.example"]);
        let other = ca.issue(&["a.example"]);
        assert_eq!(checked(&issued, &ca.ocsp(&other)), Err(OcspError::OtherCertificate));
        // The same number, of another issuer.
        let twin = other_ca.issue_with(&["a.example"], |params| params.serial_number = Some(issued.serial.clone()));
        assert_eq!(checked(&issued, &other_ca.ocsp(&twin)), Err(OcspError::OtherIssuer));
        // Of one of the same name with another key.
        let namesake = Ca::new("ca");
        assert_eq!(checked(&issued, &namesake.ocsp(&issued)), Err(OcspError::OtherIssuer));
    }

    #[test]
    fn signatures() {
        let ca = Ca::new("ca");
        let issued = ca.issue(&["a.example"]);
        let stranger = ca.issue(&["c.example"]);
        let signing = |params: &mut rcgen::CertificateParams| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::OcspSigning];
        };
        let delegate = ca.issue_with(&["ocsp.example"], signing);
        assert!(checked(&issued, &ca.ocsp(&issued).signed_by(&delegate)).is_ok());
        assert_eq!(
            checked(&issued, &ca.ocsp(&issued).signed_by(&stranger)),
            Err(OcspError::BadSignature),
            "no such task"
        );
        let past = ca.issue_with(&["ocsp.example"], |params| {
            signing(params);
            params.not_after = now(-60);
        });
        assert_eq!(checked(&issued, &ca.ocsp(&issued).signed_by(&past)), Err(OcspError::BadSignature));
        let foreign = Ca::new("ca").issue_with(&["ocsp.example"], signing);
        assert_eq!(
            checked(&issued, &ca.ocsp(&issued).signed_by(&foreign)),
            Err(OcspError::BadSignature),
            "a namesake's"
        );

        // Without certificates the signature is the last of a response.
        let mut forged = ca.ocsp(&issued).signed();
        *forged.last_mut().unwrap() ^= 1;
        let chain = issued.certificate().chain().to_vec();
        assert_eq!(check(&forged, &chain, SystemTime::now()), Err(OcspError::BadSignature));
        assert!(check(&forged, &chain[..1], SystemTime::now()).is_ok(), "who has no issuer leaves it to the clients");
    }

    #[test]
    fn what_is_none() {
        let ca = Ca::new("ca");
        let issued = ca.issue(&["a.example"]);
        let chain = issued.certificate().chain().to_vec();
        let check = |octets: &[u8]| super::check(octets, &chain, SystemTime::now());
        // tryLater
        assert_eq!(check(&[0x30, 0x03, 0x0a, 0x01, 0x03]), Err(OcspError::NotSuccessful(3)));
        assert_eq!(check(&[0x30, 0x03, 0x0a, 0x01, 0x00]), Err(OcspError::Malformed), "without bytes");
        let good = ca.ocsp(&issued).signed();
        assert!(check(&good).is_ok());
        for length in 0..good.len() {
            assert_eq!(check(&good[..length]), Err(OcspError::Malformed), "{length}");
        }
        assert_eq!(check(&[&good[..], &[0]].concat()), Err(OcspError::Malformed));
        // No octet in another's place makes it panic.
        for at in 0..good.len() {
            let mut other = good.clone();
            other[at] ^= 0x81;
            let _ = check(&other);
        }
        assert_eq!(super::check(&good, &[], SystemTime::now()), Err(OcspError::OtherCertificate));
    }
}
