//! Privacy Pass (RFC 9577, 9578), publicly verifiable tokens (type 0x0002): an issuer for development, and what a client
//! does between a challenge and a token. The client's half is the `privacypass` crate's; the issuer's is RSA by the book.
//!
//! ```ignore
//! let challenge = &tokens::challenges(&response.headers)[0];
//! let token = issuer.token(challenge)?;
//! client.send_with(Method::POST, path, &[("authorization", &tokens::authorization(&token))], body).await?;
//! ```
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

use std::convert::Infallible;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use http::HeaderMap;
use privacypass::auth::authenticate::TokenChallenge;
use privacypass::public_tokens::{PublicKey, TokenRequest, TokenResponse};
use privacypass::{Deserialize as _, Serialize as _};
use rsa::pkcs8::DecodePrivateKey as _;
use rsa::rand_core::{TryCryptoRng, TryRng};
use rsa::traits::PublicKeyParts as _;
use rsa::{BoxedUint, RsaPrivateKey, RsaPublicKey};

/// Octets of a token key, of a blinded message and of a signature: RSA with 2048 bits.
const NK: usize = 256;

/// An issuer with one key. It gives tokens to anyone.
pub struct Issuer {
    pub name: String,
    key: RsaPrivateKey,
    token_key: Vec<u8>,
}

impl Issuer {
    /// An issuer with a new key.
    pub fn generate(name: &str) -> Issuer {
        // aws-lc-rs finds primes much faster than the rsa crate does.
        let pair = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
        let der = aws_lc_rs::encoding::AsDer::<aws_lc_rs::encoding::Pkcs8V1Der<'_>>::as_der(&pair).unwrap();
        let key = RsaPrivateKey::from_pkcs8_der(der.as_ref()).unwrap();
        let token_key = PublicKey::new(RsaPublicKey::from(&key)).to_spki().unwrap();
        Issuer { name: name.to_owned(), key, token_key }
    }

    /// The public key as it is published: DER of a SubjectPublicKeyInfo, id-RSASSA-PSS.
    pub fn token_key(&self) -> &[u8] {
        &self.token_key
    }

    /// Writes the public key (DER) to `dir/name`.
    pub fn write(&self, dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, &self.token_key).unwrap();
        path
    }

    /// Answers a TokenRequest with a TokenResponse (RFC 9578 §6.2): a blind signature, the private-key operation alone.
    pub fn issue(&self, request: &[u8]) -> Result<Vec<u8>, String> {
        let (head, blinded) = request.split_at_checked(3).ok_or("too short a TokenRequest")?;
        let key_id = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &self.token_key);
        if head[..2] != [0, 2] || Some(&head[2]) != key_id.as_ref().last() || blinded.len() != NK {
            return Err("not a TokenRequest for this key".to_owned());
        }
        let blinded =
            BoxedUint::from_be_slice(blinded, self.key.n().bits_precision()).map_err(|error| error.to_string())?;
        let signature = rsa::hazmat::rsa_decrypt_and_check(&self.key, Some(&mut Random), &blinded)
            .map_err(|error| error.to_string())?;
        let octets = signature.to_be_bytes();
        Ok(octets[octets.len() - NK..].to_vec())
    }

    /// A token for a challenge: asked for, issued, unblinded. Its octets, ready for [`authorization`].
    pub fn token(&self, challenge: &Challenge) -> Result<Vec<u8>, String> {
        let key = PublicKey::from_spki(&challenge.token_key).map_err(|error| error.to_string())?;
        let parsed = TokenChallenge::deserialize(&challenge.challenge).map_err(|error| error.to_string())?;
        if parsed.serialize().ok().as_deref() != Some(&challenge.challenge[..]) {
            return Err("a challenge with octets after its end".to_owned());
        }
        let (request, state) = TokenRequest::new(&mut Random, key, &parsed).map_err(|error| error.to_string())?;
        let response = self.issue(&request.tls_serialize_detached().map_err(|error| error.to_string())?)?;
        let response = TokenResponse::tls_deserialize(&mut &response[..]).map_err(|error| error.to_string())?;
        let token = response.issue_token(&state).map_err(|error| error.to_string())?;
        token.tls_serialize_detached().map_err(|error| error.to_string())
    }
}

/// A challenge of the `PrivateToken` scheme.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// A serialized TokenChallenge.
    pub challenge: Vec<u8>,
    pub token_key: Vec<u8>,
    pub max_age: Option<u64>,
}

impl Challenge {
    pub fn token_type(&self) -> u16 {
        u16::from_be_bytes([self.challenge[0], self.challenge[1]])
    }

    /// Issuer name, redemption context, origin info.
    pub fn parts(&self) -> (String, Vec<u8>, String) {
        let mut rest = &self.challenge[2..];
        let mut vector = |bytes_of_length: usize| {
            let (length, after) = rest.split_at(bytes_of_length);
            let length = length.iter().fold(0, |length, &octet| length << 8 | usize::from(octet));
            let (vector, after) = after.split_at(length);
            rest = after;
            vector.to_vec()
        };
        let (issuer, context, origin) = (vector(2), vector(1), vector(2));
        (String::from_utf8(issuer).unwrap(), context, String::from_utf8(origin).unwrap())
    }
}

/// The value of `Authorization` that redeems a token.
pub fn authorization(token: &[u8]) -> String {
    format!("PrivateToken token=\"{}\"", URL_SAFE.encode(token))
}

/// The `PrivateToken` challenges in all `WWW-Authenticate` headers. What cannot be read is left out.
pub fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let values = headers.get_all(http::header::WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(parse_challenges).collect()
}

/// The `PrivateToken` challenges in one value: `scheme name=value, name="value", scheme ...`.
pub fn parse_challenges(value: &str) -> Vec<Challenge> {
    let mut schemes: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = value.trim_start_matches(SEPARATORS);
    while !rest.is_empty() {
        let end = rest.find(|c: char| c == '=' || SEPARATORS.contains(&c)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let Some(written) = after.trim_start_matches([' ', '\t']).strip_prefix('=') else {
            schemes.push((word.to_ascii_lowercase(), Vec::new()));
            rest = after.trim_start_matches(SEPARATORS);
            continue;
        };
        let (parameter, after) = parameter_value(written.trim_start_matches([' ', '\t']));
        if let Some((_, parameters)) = schemes.last_mut() {
            parameters.push((word.to_ascii_lowercase(), parameter));
        }
        rest = after.trim_start_matches(SEPARATORS);
    }
    schemes
        .iter()
        .filter(|(scheme, _)| scheme == "privatetoken")
        .filter_map(|(_, parameters)| challenge(parameters))
        .collect()
}

const SEPARATORS: [char; 3] = [' ', '\t', ','];

/// A quoted string without its quotes, or what is before the next separator; and the rest.
fn parameter_value(input: &str) -> (String, &str) {
    let Some(quoted) = input.strip_prefix('"') else {
        let (value, rest) = input.split_at(input.find(SEPARATORS).unwrap_or(input.len()));
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((place, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[place + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            _ => value.push(character),
        }
    }
    (value, "")
}

fn challenge(parameters: &[(String, String)]) -> Option<Challenge> {
    let get = |name: &str| parameters.iter().find(|(given, _)| given == name).map(|(_, value)| value);
    Some(Challenge {
        challenge: base64url(get("challenge")?)?,
        token_key: base64url(get("token-key")?)?,
        max_age: match get("max-age") {
            Some(seconds) => Some(seconds.parse().ok()?),
            None => None,
        },
    })
}

/// With padding or without.
fn base64url(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok()
}

/// Randomness of aws-lc-rs for crates that want a generator.
struct Random;

impl TryRng for Random {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut octets = [0; 4];
        self.try_fill_bytes(&mut octets)?;
        Ok(u32::from_le_bytes(octets))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut octets = [0; 8];
        self.try_fill_bytes(&mut octets)?;
        Ok(u64::from_le_bytes(octets))
    }

    fn try_fill_bytes(&mut self, octets: &mut [u8]) -> Result<(), Infallible> {
        aws_lc_rs::rand::fill(octets).expect("randomness");
        Ok(())
    }
}

impl TryCryptoRng for Random {}
