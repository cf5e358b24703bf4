//! An Issuer whose tokens are taken: its name, and its public key as RFC 9578 §6.5 has it on the wire.

use aws_lc_rs::digest;
use aws_lc_rs::signature::{self, UnparsedPublicKey};
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::SubjectPublicKeyInfo;

/// id-RSASSA-PSS (RFC 8017 A.2.3).
const RSASSA_PSS: &str = "1.2.840.113549.1.1.10";

/// An Issuer of tokens of type 0x0002 (Blind RSA, 2048 bits).
pub struct Issuer {
    name: String,
    token_key: Vec<u8>,
    key_id: [u8; 32],
    /// The RSAPublicKey inside the token key. The authenticator is plain RSASSA-PSS (SHA-384, 48 octets of salt), so a
    /// fast library verifies it: a third of the time the privacypass crate takes.
    verifier: UnparsedPublicKey<Vec<u8>>,
}

/// Why octets are no issuer's public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Neither PEM nor DER of a SubjectPublicKeyInfo.
    #[error("it is not a SubjectPublicKeyInfo in DER or PEM")]
    NotSpki,
    /// Another algorithm than id-RSASSA-PSS.
    #[error("its algorithm is not id-RSASSA-PSS, which RFC 9578 §6.5 asks for")]
    NotPss,
    /// Not RSA of 2048 bits.
    #[error("it is not an RSA key of 2048 bits")]
    NotRsa2048,
}

impl std::fmt::Debug for Issuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issuer").field("name", &self.name).field("key_id", &hex::encode(self.key_id)).finish()
    }
}

impl Issuer {
    /// An issuer by its `issuer_name` and its public key: a SubjectPublicKeyInfo, PEM or DER.
    ///
    /// # Errors
    /// What is wrong with the key.
    pub fn new(name: String, key: &[u8]) -> Result<Self, KeyError> {
        let from_pem = x509_parser::pem::parse_x509_pem(key).ok().map(|(_, pem)| pem.contents);
        let token_key = from_pem.unwrap_or_else(|| key.to_vec());
        let (rest, spki) = SubjectPublicKeyInfo::from_der(&token_key).map_err(|_| KeyError::NotSpki)?;
        if !rest.is_empty() {
            return Err(KeyError::NotSpki);
        }
        if spki.algorithm.algorithm.to_id_string() != RSASSA_PSS {
            return Err(KeyError::NotPss);
        }
        let rsa = spki.subject_public_key.data.to_vec();
        let (_, key) = x509_parser::public_key::RSAPublicKey::from_der(&rsa).map_err(|_| KeyError::NotRsa2048)?;
        if key.key_size() != 2048 {
            return Err(KeyError::NotRsa2048);
        }
        let key_id = digest::digest(&digest::SHA256, &token_key);
        let key_id = key_id.as_ref().try_into().map_err(|_| KeyError::NotSpki)?;
        let verifier = UnparsedPublicKey::new(&signature::RSA_PSS_2048_8192_SHA384, rsa);
        Ok(Self { name, token_key, key_id, verifier })
    }

    /// `issuer_name` of the challenge.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `token-key` of the challenge: the SubjectPublicKeyInfo.
    pub fn token_key(&self) -> &[u8] {
        &self.token_key
    }

    /// `token_key_id` of its tokens: SHA-256 of the token key.
    pub fn key_id(&self) -> &[u8; 32] {
        &self.key_id
    }

    /// Whether it made this authenticator for this token input.
    pub fn verifies(&self, input: &[u8], authenticator: &[u8]) -> bool {
        self.verifier.verify(input, authenticator).is_ok()
    }
}
