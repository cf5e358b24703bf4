//! Privacy Pass (RFC 9577, 9578): issuers of all types for tests, and what a client does between a challenge and a token. Both
//! halves of the VOPRF types, and the client's of Blind RSA, are the `privacypass` crate's; the issuer's is RSA by the book.
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
use std::task::{Context, Poll, Waker};

use base64::Engine as _;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use http::HeaderMap;
use p384::NistP384;
use privacypass::amortized_tokens::{AmortizedBatchTokenRequest, server::Server as BatchServer};
use privacypass::auth::authenticate::TokenChallenge;
use privacypass::common::private::{
    PrivateCipherSuite, deserialize_public_key, public_key_to_truncated_token_key_id, serialize_public_key,
};
use privacypass::common::store::PrivateKeyStore as _;
use privacypass::private_tokens::{self, Ristretto255};
use privacypass::public_tokens::{PublicKey, TokenRequest, TokenResponse};
use privacypass::test_utils::private_memory_store::MemoryKeyStoreVoprf;
use privacypass::{Deserialize as _, Serialize as _, TokenType, VoprfServer};
use rsa::pkcs8::DecodePrivateKey as _;
use rsa::rand_core::{TryCryptoRng, TryRng};
use rsa::traits::PublicKeyParts as _;
use rsa::{BoxedUint, RsaPrivateKey, RsaPublicKey};

/// Octets of a token key, of a blinded message and of a signature: RSA with 2048 bits.
const NK: usize = 256;

/// An issuer with one key. It gives tokens to anyone.
pub struct Issuer {
    pub name: String,
    secret: Secret,
    token_key: Vec<u8>,
}

enum Secret {
    BlindRsa(Box<RsaPrivateKey>),
    P384(Vec<u8>),
    Ristretto255(Vec<u8>),
}

impl Issuer {
    /// An issuer with a new key, of type 2.
    pub fn generate(name: &str) -> Issuer {
        // aws-lc-rs finds primes much faster than the rsa crate does.
        let pair = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
        let der = aws_lc_rs::encoding::AsDer::<aws_lc_rs::encoding::Pkcs8V1Der<'_>>::as_der(&pair).unwrap();
        let key = RsaPrivateKey::from_pkcs8_der(der.as_ref()).unwrap();
        let token_key = PublicKey::new(RsaPublicKey::from(&key)).to_spki().unwrap();
        Issuer { name: name.to_owned(), secret: Secret::BlindRsa(Box::new(key)), token_key }
    }

    /// An issuer with a new key, of any type.
    pub fn of(name: &str, kind: TokenType) -> Issuer {
        let (secret, token_key) = match kind {
            TokenType::Public => return Issuer::generate(name),
            TokenType::PrivateP384 => {
                let (scalar, key) = voprf_key::<NistP384>(48);
                (Secret::P384(scalar), key)
            }
            TokenType::PrivateRistretto255 => {
                let (scalar, key) = voprf_key::<Ristretto255>(32);
                (Secret::Ristretto255(scalar), key)
            }
        };
        Issuer { name: name.to_owned(), secret, token_key }
    }

    pub fn kind(&self) -> TokenType {
        match self.secret {
            Secret::BlindRsa(_) => TokenType::Public,
            Secret::P384(_) => TokenType::PrivateP384,
            Secret::Ristretto255(_) => TokenType::PrivateRistretto255,
        }
    }

    /// The public key as it is published: for Blind RSA, DER of a SubjectPublicKeyInfo, id-RSASSA-PSS.
    pub fn token_key(&self) -> &[u8] {
        &self.token_key
    }

    /// Writes what a gateway's `key_file` is to `dir/name`: the public key (DER), or the private one (hexadecimal).
    pub fn write(&self, dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        match &self.secret {
            Secret::BlindRsa(_) => std::fs::write(&path, &self.token_key).unwrap(),
            Secret::P384(scalar) | Secret::Ristretto255(scalar) => std::fs::write(&path, hex::encode(scalar)).unwrap(),
        }
        path
    }

    /// A table of a gateway's configuration, with a key file that [`Issuer::write`] has made.
    pub fn table(&self, file: &str) -> String {
        let (name, kind) = (&self.name, self.kind() as u16);
        format!("[[privacy_pass.issuer]]\nname = \"{name}\"\ntoken_type = {kind}\nkey_file = \"{file}\"\n")
    }

    /// Answers a TokenRequest of Blind RSA with a TokenResponse (RFC 9578 §6.2): a blind signature, the private-key operation
    /// alone.
    fn sign(&self, key: &RsaPrivateKey, request: &[u8]) -> Result<Vec<u8>, String> {
        let (head, blinded) = request.split_at_checked(3).ok_or("too short a TokenRequest")?;
        let key_id = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &self.token_key);
        if head[..2] != [0, 2] || Some(&head[2]) != key_id.as_ref().last() || blinded.len() != NK {
            return Err("not a TokenRequest for this key".to_owned());
        }
        let blinded = BoxedUint::from_be_slice(blinded, key.n().bits_precision()).map_err(|error| error.to_string())?;
        let signature =
            rsa::hazmat::rsa_decrypt_and_check(key, Some(&mut Random), &blinded).map_err(|error| error.to_string())?;
        let octets = signature.to_be_bytes();
        Ok(octets[octets.len() - NK..].to_vec())
    }

    /// A token for a challenge: asked for, issued, unblinded. Its octets, ready for [`authorization`].
    pub fn token(&self, challenge: &Challenge) -> Result<Vec<u8>, String> {
        let parsed = TokenChallenge::deserialize(&challenge.challenge).map_err(|error| error.to_string())?;
        if parsed.serialize().ok().as_deref() != Some(&challenge.challenge[..]) {
            return Err("a challenge with octets after its end".to_owned());
        }
        let key = match &self.secret {
            Secret::P384(scalar) => return voprf_token::<NistP384>(scalar, challenge, &parsed),
            Secret::Ristretto255(scalar) => return voprf_token::<Ristretto255>(scalar, challenge, &parsed),
            Secret::BlindRsa(key) => key,
        };
        let public = PublicKey::from_spki(&challenge.token_key).map_err(|error| error.to_string())?;
        let (request, state) = TokenRequest::new(&mut Random, public, &parsed).map_err(|error| error.to_string())?;
        let response = self.sign(key, &request.tls_serialize_detached().map_err(|error| error.to_string())?)?;
        let response = TokenResponse::tls_deserialize(&mut &response[..]).map_err(|error| error.to_string())?;
        let token = response.issue_token(&state).map_err(|error| error.to_string())?;
        token.tls_serialize_detached().map_err(|error| error.to_string())
    }

    /// Tokens for a challenge that were issued at once (draft-ietf-privacypass-batched-tokens): of the VOPRF types.
    pub fn batch(&self, challenge: &Challenge, nr: u16) -> Result<Vec<Vec<u8>>, String> {
        let parsed = TokenChallenge::deserialize(&challenge.challenge).map_err(|error| error.to_string())?;
        match &self.secret {
            Secret::P384(scalar) => voprf_batch::<NistP384>(scalar, challenge, &parsed, nr),
            Secret::Ristretto255(scalar) => voprf_batch::<Ristretto255>(scalar, challenge, &parsed, nr),
            Secret::BlindRsa(_) => Err("there are no batches of type 2".to_owned()),
        }
    }
}

/// A scalar, and its public key: octets are drawn until they are one.
fn voprf_key<CS: PrivateCipherSuite>(len: usize) -> (Vec<u8>, Vec<u8>) {
    loop {
        let mut scalar = vec![0; len];
        aws_lc_rs::rand::fill(&mut scalar).unwrap();
        if let Ok(server) = VoprfServer::<CS>::new_with_key(&scalar) {
            return (scalar, serialize_public_key::<CS>(server.get_public_key()));
        }
    }
}

/// The crate's store, with one key.
pub fn voprf_store<CS: PrivateCipherSuite>(scalar: &[u8]) -> MemoryKeyStoreVoprf<CS> {
    let store = MemoryKeyStoreVoprf::default();
    let server = VoprfServer::<CS>::new_with_key(scalar).unwrap();
    now(store.insert(public_key_to_truncated_token_key_id::<CS>(&server.get_public_key()), server));
    store
}

fn voprf_token<CS: PrivateCipherSuite>(
    scalar: &[u8],
    challenge: &Challenge,
    parsed: &TokenChallenge,
) -> Result<Vec<u8>, String> {
    let key = deserialize_public_key::<CS>(&challenge.token_key).map_err(|error| error.to_string())?;
    let (request, state) = private_tokens::TokenRequest::<CS>::new(key, parsed).map_err(|error| error.to_string())?;
    let server = private_tokens::server::Server::<CS>::new();
    let response =
        now(server.issue_token_response(&voprf_store(scalar), request)).map_err(|error| error.to_string())?;
    let token = response.issue_token(&state).map_err(|error| error.to_string())?;
    token.tls_serialize_detached().map_err(|error| error.to_string())
}

fn voprf_batch<CS: PrivateCipherSuite>(
    scalar: &[u8],
    challenge: &Challenge,
    parsed: &TokenChallenge,
    nr: u16,
) -> Result<Vec<Vec<u8>>, String> {
    let key = deserialize_public_key::<CS>(&challenge.token_key).map_err(|error| error.to_string())?;
    let (request, state) = AmortizedBatchTokenRequest::<CS>::new(key, parsed, nr).map_err(|error| error.to_string())?;
    let server = BatchServer::<CS>::new();
    let response =
        now(server.issue_token_response(&voprf_store(scalar), request)).map_err(|error| error.to_string())?;
    let tokens = response.issue_tokens(&state).map_err(|error| error.to_string())?;
    tokens.iter().map(|token| token.tls_serialize_detached().map_err(|error| error.to_string())).collect()
}

/// The crate's issuers wait for nothing.
fn now<F: Future>(future: F) -> F::Output {
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("it waits"),
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
