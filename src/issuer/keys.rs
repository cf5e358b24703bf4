//! An Issuer's keys of all types, and tokens made with them (RFC 9578 §5.2, §6.2). The cryptography is the `privacypass`
//! crate's.

use crate::privacypass::{Key, TYPES, type_of};
use async_trait::async_trait;
use blind_rsa_signatures::{Deterministic, KeyPair, PSS, SecretKey, Sha384};
use p384::NistP384;
use privacypass::common::private::PrivateCipherSuite;
use privacypass::common::store::PrivateKeyStore;
use privacypass::private_tokens::{self, Ristretto255};
use privacypass::public_tokens::{self, server::IssuerKeyStore, server::IssuerServer};
use privacypass::{Deserialize as _, Serialize as _, TokenType, TruncatedTokenKeyId, VoprfServer};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

type BlindRsa = KeyPair<Sha384, PSS, Deterministic>;

/// Octets of the longest token request, of type 0x0002.
pub const LONGEST_REQUEST: usize = 3 + 256;

/// Why there is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IssueError {
    /// It is no token request of a type that is issued here, or has octets after its end.
    #[error("it is no TokenRequest of type 1, 2 or 5")]
    NoRequest,
    /// `truncated_token_key_id` is of no key that is used now.
    #[error("no key of this type has this truncated_token_key_id")]
    NoKey,
    /// What is to be signed is no element of the group.
    #[error("the blinded message cannot be signed")]
    NotSigned,
}

/// Keys that cannot be made, or cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum KeyMaking {
    /// The system gives no randomness, or a library has failed.
    #[error("no key could be made")]
    NotMade,
    /// A key in the file is none.
    #[error("a key in it cannot be read")]
    NotRead,
}

/// A key as it is kept: all that it is made from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Kept {
    token_type: u16,
    /// Seconds since the Unix epoch.
    not_before: u64,
    /// A scalar, or a PKCS #8 document, in hexadecimal.
    private_key: String,
}

/// A key with its private half.
#[derive(Clone)]
pub(super) struct Pair {
    pub(super) public: Arc<Key>,
    /// From when it is the one to use, in seconds since the Unix epoch.
    pub(super) from: u64,
    private: Arc<Private>,
    /// What it is made from.
    octets: Arc<[u8]>,
}

enum Private {
    BlindRsa(BlindRsa),
    P384(VoprfServer<NistP384>),
    Ristretto255(VoprfServer<Ristretto255>),
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").field("public", &self.public).field("from", &self.from).finish_non_exhaustive()
    }
}

/// The crate's stores hold many keys by one octet; we have found the key already.
struct Only<K>(TruncatedTokenKeyId, K);

#[async_trait]
impl<CS: PrivateCipherSuite> PrivateKeyStore for Only<VoprfServer<CS>> {
    type CS = CS;

    async fn insert(&self, _: TruncatedTokenKeyId, _: VoprfServer<CS>) -> bool {
        false
    }

    async fn get(&self, id: &TruncatedTokenKeyId) -> Option<VoprfServer<CS>> {
        (*id == self.0).then(|| self.1.clone())
    }

    async fn remove(&self, _: &TruncatedTokenKeyId) -> bool {
        false
    }
}

#[async_trait]
impl IssuerKeyStore for Only<BlindRsa> {
    async fn insert(&self, _: TruncatedTokenKeyId, _: BlindRsa) -> bool {
        false
    }

    async fn get(&self, id: &TruncatedTokenKeyId) -> Option<BlindRsa> {
        (*id == self.0).then(|| self.1.clone())
    }

    async fn remove(&self, _: &TruncatedTokenKeyId) -> bool {
        false
    }
}

impl Pair {
    /// A new key, used from a time on.
    pub(super) fn generate(kind: TokenType, from: u64) -> Result<Self, KeyMaking> {
        let octets = match kind {
            // The rsa crate takes many times as long to find primes.
            TokenType::Public => {
                use aws_lc_rs::encoding::{AsDer as _, Pkcs8V1Der};
                let pair = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048);
                let der: Pkcs8V1Der<'_> = pair.and_then(|pair| pair.as_der()).map_err(|_| KeyMaking::NotMade)?;
                der.as_ref().to_vec()
            }
            TokenType::PrivateP384 => Self::scalar::<48>(kind)?,
            TokenType::PrivateRistretto255 => Self::scalar::<32>(kind)?,
        };
        Self::of(kind, from, octets).ok_or(KeyMaking::NotMade)
    }

    /// Octets until they are a scalar: one in sixteen is, of ristretto255.
    fn scalar<const N: usize>(kind: TokenType) -> Result<Vec<u8>, KeyMaking> {
        let tries = std::iter::repeat_with(crate::config::random::<N>).take(1000);
        let mut scalars = tries.map_while(|octets| octets).filter(|octets| Key::voprf(kind, octets).is_ok());
        Ok(scalars.next().ok_or(KeyMaking::NotMade)?.to_vec())
    }

    fn of(kind: TokenType, from: u64, octets: Vec<u8>) -> Option<Self> {
        let (public, private) = match kind {
            TokenType::Public => {
                let sk = SecretKey::<Sha384, PSS, Deterministic>::from_der(&octets).ok()?;
                let pk = sk.public_key().ok()?;
                (Key::blind_rsa(&pk.to_spki().ok()?).ok()?, Private::BlindRsa(BlindRsa { pk, sk }))
            }
            TokenType::PrivateP384 => {
                (Key::voprf(kind, &octets).ok()?, Private::P384(VoprfServer::new_with_key(&octets).ok()?))
            }
            TokenType::PrivateRistretto255 => {
                (Key::voprf(kind, &octets).ok()?, Private::Ristretto255(VoprfServer::new_with_key(&octets).ok()?))
            }
        };
        Some(Self { public: Arc::new(public), from, private: Arc::new(private), octets: octets.into() })
    }

    pub(super) fn keep(&self) -> Kept {
        let token_type = self.public.kind() as u16;
        Kept { token_type, not_before: self.from, private_key: hex::encode(&self.octets) }
    }

    pub(super) fn restore(kept: &Kept) -> Result<Self, KeyMaking> {
        let octets = hex::decode(&kept.private_key).map_err(|_| KeyMaking::NotRead)?;
        let kind = type_of(kept.token_type).ok_or(KeyMaking::NotRead)?;
        Self::of(kind, kept.not_before, octets).ok_or(KeyMaking::NotRead)
    }

    /// What a gateway's `key_file` has of it: a private scalar in hexadecimal, or a public key in PEM.
    pub(super) fn key_file(&self) -> String {
        use base64::Engine as _;
        if self.public.kind() != TokenType::Public {
            return hex::encode(&self.octets);
        }
        let text = base64::engine::general_purpose::STANDARD.encode(self.public.token_key());
        let lines: Vec<_> = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
        format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----", lines.join("\n"))
    }

    /// The last octet of its ID (RFC 9578 §5.1, §6.1).
    pub(super) fn truncated_id(&self) -> TruncatedTokenKeyId {
        let [.., last] = self.public.id();
        *last
    }

    /// Answers a token request. Dear: half a millisecond and more.
    pub(super) async fn issue(&self, request: &[u8]) -> Result<Vec<u8>, IssueError> {
        let id = self.truncated_id();
        match &*self.private {
            Private::BlindRsa(pair) => {
                let request = public_tokens::TokenRequest::tls_deserialize_exact(request);
                let store = Only(id, pair.clone());
                let answer = IssuerServer::new()
                    .issue_token_response(&store, request.map_err(|_| IssueError::NoRequest)?)
                    .await
                    .map_err(|_| IssueError::NotSigned)?;
                answer.tls_serialize_detached().map_err(|_| IssueError::NotSigned)
            }
            Private::P384(server) => issue_private(Only(id, server.clone()), request).await,
            Private::Ristretto255(server) => issue_private(Only(id, server.clone()), request).await,
        }
    }
}

async fn issue_private<CS: PrivateCipherSuite>(
    store: Only<VoprfServer<CS>>,
    request: &[u8],
) -> Result<Vec<u8>, IssueError> {
    let request = private_tokens::TokenRequest::<CS>::tls_deserialize_exact(request);
    let answer = private_tokens::server::Server::<CS>::new()
        .issue_token_response(&store, request.map_err(|_| IssueError::NoRequest)?)
        .await
        .map_err(|_| IssueError::NotSigned)?;
    answer.tls_serialize_detached().map_err(|_| IssueError::NotSigned)
}

/// The type of a token request, and the octet that says which key it is for.
pub(super) fn asked_for(request: &[u8]) -> Result<(TokenType, TruncatedTokenKeyId), IssueError> {
    let [high, low, id, ..] = request else { return Err(IssueError::NoRequest) };
    let kind = type_of(u16::from_be_bytes([*high, *low])).filter(|kind| TYPES.contains(kind));
    Ok((kind.ok_or(IssueError::NoRequest)?, *id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::privacypass::vectors::{octets, vectors};

    #[tokio::test]
    async fn issues_what_another_implementation_did() {
        for (name, kind, fixed) in [
            ("public", TokenType::Public, 256),
            // What follows is a proof, which is another one each time.
            ("private_p384", TokenType::PrivateP384, 49),
            ("private_ristretto255", TokenType::PrivateRistretto255, 32),
        ] {
            for vector in vectors(name) {
                let secret = octets(&vector, "skS");
                let secret = match kind {
                    TokenType::Public => pem(&secret),
                    _ => secret,
                };
                let pair = Pair::of(kind, 0, secret).unwrap();
                assert_eq!(pair.public.token_key(), octets(&vector, "pkS"));
                let request = octets(&vector, "token_request");
                assert_eq!(asked_for(&request), Ok((kind, pair.truncated_id())));
                let response = pair.issue(&request).await.unwrap();
                let expected = octets(&vector, "token_response");
                assert_eq!((response.len(), &response[..fixed]), (expected.len(), &expected[..fixed]), "{name}");
                let mut longer = request.clone();
                longer.push(0);
                assert_eq!(pair.issue(&longer).await, Err(IssueError::NoRequest));
                assert_eq!(pair.issue(&request[..request.len() - 1]).await, Err(IssueError::NoRequest));
            }
        }
    }

    fn pem(text: &[u8]) -> Vec<u8> {
        let (_, pem) = x509_parser::pem::parse_x509_pem(text).unwrap();
        pem.contents
    }

    #[tokio::test]
    async fn keys_are_kept_and_made_anew() {
        for kind in TYPES {
            let pair = Pair::generate(kind, 7).unwrap();
            let again = Pair::restore(&pair.keep()).unwrap();
            assert_eq!((again.public.id(), again.from), (pair.public.id(), 7));
            assert_ne!(Pair::generate(kind, 7).unwrap().public.id(), pair.public.id());
            let file = Key::read_all(kind, pair.key_file().as_bytes()).unwrap();
            assert_eq!((file.len(), file[0].id()), (1, pair.public.id()));
            let other = Kept { token_type: 3, ..pair.keep() };
            assert!(Pair::restore(&other).is_err());
        }
    }
}
