//! An Issuer's key, as an Origin verifies with it (RFC 9578): a public key for Blind RSA; for the VOPRF types the private
//! one, which an Origin shares with its Issuer.

use super::token::Token;
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest;
use aws_lc_rs::signature::{self, ParsedPublicKey};
use p384::NistP384;
use privacypass::common::private::{PrivateCipherSuite, serialize_public_key};
use privacypass::private_tokens::Ristretto255;
use privacypass::{TokenType, VoprfServer};
use x509_parser::prelude::{FromDer as _, Pem};
use x509_parser::x509::SubjectPublicKeyInfo;

/// id-RSASSA-PSS (RFC 8017 A.2.3).
const RSASSA_PSS: &str = "1.2.840.113549.1.1.10";

/// As many keys as an issuer may have at once.
pub const MOST_KEYS: usize = 16;

/// A key of an issuer.
pub struct Key {
    kind: TokenType,
    token_key: Vec<u8>,
    id: [u8; 32],
    verifier: Verifier,
}

enum Verifier {
    /// The authenticator is plain RSASSA-PSS (SHA-384, 48 octets of salt), so a fast library verifies it: a third of the
    /// time the privacypass crate takes.
    BlindRsa(ParsedPublicKey),
    P384(VoprfServer<NistP384>),
    Ristretto255(VoprfServer<Ristretto255>),
}

/// Why octets are no issuer's key.
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
    /// Not a scalar of the group.
    #[error("it is not the private key of a VOPRF: {0} octets, or as many in hexadecimal on a line")]
    NotScalar(usize),
    /// Nothing in it.
    #[error("there is no key in it")]
    None,
    /// Over [`MOST_KEYS`].
    #[error("there are over {MOST_KEYS} keys in it")]
    TooMany,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("kind", &self.kind).field("id", &hex::encode(self.id)).finish_non_exhaustive()
    }
}

impl Key {
    /// A key of Blind RSA by its public half: a SubjectPublicKeyInfo in DER, the octets that the issuer publishes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn blind_rsa(token_key: &[u8]) -> Result<Self, KeyError> {
        let (rest, spki) = SubjectPublicKeyInfo::from_der(token_key).map_err(|_| KeyError::NotSpki)?;
        if !rest.is_empty() {
            return Err(KeyError::NotSpki);
        }
        if spki.algorithm.algorithm.to_id_string() != RSASSA_PSS {
            return Err(KeyError::NotPss);
        }
        let rsa = &spki.subject_public_key.data;
        let (_, key) = x509_parser::public_key::RSAPublicKey::from_der(rsa).map_err(|_| KeyError::NotRsa2048)?;
        if key.key_size() != 2048 {
            return Err(KeyError::NotRsa2048);
        }
        let verifier = ParsedPublicKey::new(&signature::RSA_PSS_2048_8192_SHA384, rsa.as_ref());
        let verifier = Verifier::BlindRsa(verifier.map_err(|_| KeyError::NotRsa2048)?);
        Ok(Self { kind: TokenType::Public, id: sha256(token_key), token_key: token_key.to_vec(), verifier })
    }

    /// A key of a VOPRF by its private half: a scalar as RFC 9497 §2.1 serializes it.
    ///
    /// # Errors
    /// It is none, or zero.
    pub fn voprf(kind: TokenType, scalar: &[u8]) -> Result<Self, KeyError> {
        let len = scalar_len(kind).ok_or(KeyError::NotSpki)?;
        if scalar.len() != len {
            return Err(KeyError::NotScalar(len));
        }
        let (token_key, verifier) = if kind == TokenType::PrivateP384 {
            let server = server::<NistP384>(scalar).ok_or(KeyError::NotScalar(len))?;
            (serialize_public_key::<NistP384>(server.get_public_key()), Verifier::P384(server))
        } else {
            let server = server::<Ristretto255>(scalar).ok_or(KeyError::NotScalar(len))?;
            (serialize_public_key::<Ristretto255>(server.get_public_key()), Verifier::Ristretto255(server))
        };
        Ok(Self { kind, id: sha256(&token_key), token_key, verifier })
    }

    /// The keys of a file, in its order. Of Blind RSA: public keys in PEM, or one in DER. Of a VOPRF: private keys, each in
    /// hexadecimal on a line of its own (those with a `#` first are comments), or one as it is.
    ///
    /// # Errors
    /// What is wrong with the first that is no key.
    pub fn read_all(kind: TokenType, file: &[u8]) -> Result<Vec<Self>, KeyError> {
        let keys: Vec<Self> = match scalar_len(kind) {
            None if file.trim_ascii_start().starts_with(b"-----BEGIN") => {
                let blocks = Pem::iter_from_buffer(file).take(MOST_KEYS + 1);
                blocks.map(|pem| Self::blind_rsa(&pem.map_err(|_| KeyError::NotSpki)?.contents)).collect()
            }
            None => Self::blind_rsa(file).map(|key| vec![key]),
            Some(len) if file.len() == len => Self::voprf(kind, file).map(|key| vec![key]),
            Some(len) => {
                let text = std::str::from_utf8(file).map_err(|_| KeyError::NotScalar(len))?;
                let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
                let scalar = |line| hex::decode(line).map_err(|_| KeyError::NotScalar(len));
                lines.take(MOST_KEYS + 1).map(|line| Self::voprf(kind, &scalar(line)?)).collect()
            }
        }?;
        match keys.len() {
            0 => Err(KeyError::None),
            1..=MOST_KEYS => Ok(keys),
            _ => Err(KeyError::TooMany),
        }
    }

    /// The type of its tokens.
    pub fn kind(&self) -> TokenType {
        self.kind
    }

    /// `token-key` of a challenge (RFC 9578 §5.5, §6.5): its public half, as the issuer publishes it.
    pub fn token_key(&self) -> &[u8] {
        &self.token_key
    }

    /// `token_key_id` of its tokens: SHA-256 of the token key.
    pub fn id(&self) -> &[u8; 32] {
        &self.id
    }

    /// Whether a token's authenticator is of this key. Dear: 16 µs and more.
    pub fn verifies(&self, token: &Token) -> bool {
        let (input, authenticator) = token.parts();
        let equals = |right: &[u8]| verify_slices_are_equal(right, authenticator).is_ok();
        token.kind() == self.kind
            && match &self.verifier {
                Verifier::BlindRsa(key) => key.verify_sig(input, authenticator).is_ok(),
                Verifier::P384(server) => server.evaluate(input).is_ok_and(|right| equals(&right)),
                Verifier::Ristretto255(server) => server.evaluate(input).is_ok_and(|right| equals(&right)),
            }
    }
}

/// Octets of a private key of a VOPRF; none for a type whose tokens anyone can verify.
fn scalar_len(kind: TokenType) -> Option<usize> {
    match kind {
        TokenType::PrivateP384 => Some(48),
        TokenType::PrivateRistretto255 => Some(32),
        TokenType::Public => None,
    }
}

fn server<CS: PrivateCipherSuite>(scalar: &[u8]) -> Option<VoprfServer<CS>> {
    VoprfServer::new_with_key(scalar).ok()
}

pub(super) fn sha256(octets: &[u8]) -> [u8; 32] {
    let mut of = [0; 32];
    of.copy_from_slice(digest::digest(&digest::SHA256, octets).as_ref());
    of
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::privacypass::vectors::{octets, vectors};

    #[test]
    fn tokens_of_another_implementation_verify() {
        for (name, kind) in [
            ("private_p384", TokenType::PrivateP384),
            ("public", TokenType::Public),
            ("private_ristretto255", TokenType::PrivateRistretto255),
        ] {
            for vector in vectors(name) {
                let file = if kind == TokenType::Public { "pkS" } else { "skS" };
                let key = Key::read_all(kind, &octets(&vector, file)).unwrap().remove(0);
                assert_eq!(key.token_key(), octets(&vector, "pkS"), "{name}");
                let token = octets(&vector, "token");
                let read = Token::read(token.clone()).unwrap();
                assert_eq!(read.key_id(), key.id());
                assert_eq!(read.challenge(), &sha256(&octets(&vector, "token_challenge")));
                assert!(key.verifies(&read), "{name}");
                for at in [2, 40, 70, 98, token.len() - 1] {
                    let mut other = token.clone();
                    other[at] ^= 1;
                    assert!(!key.verifies(&Token::read(other).unwrap()), "{name}, octet {at}");
                }
            }
        }
    }

    #[test]
    fn files_hold_keys_in_their_order() {
        let scalars = ["07".repeat(32), "08".repeat(32)];
        let text = format!("# the new one\n{}\n\n  {}  \n", scalars[0], scalars[1]);
        let kind = TokenType::PrivateRistretto255;
        let keys = Key::read_all(kind, text.as_bytes()).unwrap();
        let one = Key::read_all(kind, &[8; 32]).unwrap();
        assert_eq!((keys.len(), keys[1].id()), (2, one[0].id()));
        assert_ne!(keys[0].id(), keys[1].id());
        for (bad, error) in [
            ("", KeyError::None),
            ("# nothing", KeyError::None),
            ("00", KeyError::NotScalar(32)),
            (&"00".repeat(32), KeyError::NotScalar(32)),
            (&"ff".repeat(32), KeyError::NotScalar(32)),
            ("none of it", KeyError::NotScalar(32)),
            (&format!("{}\n", scalars[0]).repeat(17), KeyError::TooMany),
        ] {
            assert_eq!(Key::read_all(kind, bad.as_bytes()).unwrap_err(), error, "{bad:.20}");
        }
        assert_eq!(Key::read_all(TokenType::PrivateP384, &[0xff; 48]).unwrap_err(), KeyError::NotScalar(48));
        assert_eq!(Key::read_all(TokenType::Public, b"-----BEGIN").unwrap_err(), KeyError::None);
        assert_eq!(Key::read_all(TokenType::Public, b"\x30\x00").unwrap_err(), KeyError::NotSpki);
    }
}
