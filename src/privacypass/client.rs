//! What a client does between a challenge and a token (RFC 9577 §2, RFC 9578 §5, §6): for `moh-gateway token`. The
//! cryptography is the `privacypass` crate's.

use super::key::{Key, sha256};
use super::token::BASE64URL;
use base64::Engine as _;
use http::{HeaderMap, header};
use p384::NistP384;
use privacypass::auth::authenticate::TokenChallenge;
use privacypass::common::private::{PrivateCipherSuite, deserialize_public_key};
use privacypass::private_tokens::{self, Ristretto255};
use privacypass::{Deserialize as _, Serialize as _, TokenType, public_tokens};

/// A challenge that an Origin has sent.
#[derive(Debug, Clone)]
pub struct Challenge {
    parsed: TokenChallenge,
    token_key: Vec<u8>,
    max_age: Option<u64>,
}

/// Why there is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The key of the challenge is none of its type.
    #[error("the challenge's token-key is no key of its type")]
    BadKey,
    /// No request could be made.
    #[error("no token request could be made")]
    NoRequest,
    /// What the Issuer has answered is no token, or none of its key.
    #[error("the issuer's answer is no token of its key")]
    BadAnswer,
}

/// A token that is being asked for: what goes to the Issuer, and what is kept until it answers.
#[derive(Debug)]
pub struct TokenRequest {
    octets: Vec<u8>,
    state: State,
}

#[derive(Debug)]
enum State {
    P384(Box<private_tokens::TokenState<NistP384>>),
    BlindRsa(Box<public_tokens::TokenState>),
    Ristretto255(Box<private_tokens::TokenState<Ristretto255>>),
}

/// The challenges of an answer that can be met: those of other schemes, of other types and those that cannot be read are
/// left out.
pub fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let fields = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    let parsed = fields.flat_map(|field| http_auth::parse_challenges(field).unwrap_or_default());
    parsed.filter(|of| of.scheme.eq_ignore_ascii_case("PrivateToken")).filter_map(|of| Challenge::read(&of)).collect()
}

impl Challenge {
    fn read(of: &http_auth::ChallengeRef<'_>) -> Option<Self> {
        let get = |name: &str| {
            let mut of_name = of.params.iter().filter(|(given, _)| given.eq_ignore_ascii_case(name));
            of_name.next().map(|(_, value)| value.to_unescaped())
        };
        let octets = BASE64URL.decode(get("challenge")?).ok()?;
        let parsed = TokenChallenge::deserialize(&octets).ok()?;
        // Octets after its end would not be of the digest that a token is made for.
        let whole = parsed.serialize().is_ok_and(|again| again == octets);
        // A redemption context has 32 octets or none (RFC 9577 §2.1.1); it is what follows the issuer's name.
        let context = 4 + parsed.issuer_name().len();
        let whole = whole && octets.get(context).is_some_and(|len| matches!(len, 0 | 32));
        let max_age = get("max-age").and_then(|text| text.parse().ok());
        whole.then_some(Self { parsed, token_key: BASE64URL.decode(get("token-key")?).ok()?, max_age })
    }

    /// `token_type`.
    pub fn kind(&self) -> TokenType {
        self.parsed.token_type()
    }

    /// `issuer_name`.
    pub fn issuer_name(&self) -> String {
        self.parsed.issuer_name()
    }

    /// `origin_info`.
    pub fn origins(&self) -> Vec<String> {
        self.parsed.origin_info()
    }

    /// Whether it is for this origin, or for any (RFC 9577 §2.1.3): a token for another must not be fetched, or an origin
    /// could have its clients pay elsewhere.
    pub fn is_for(&self, origin: &str) -> bool {
        let origins = self.origins();
        origins.iter().all(String::is_empty) || origins.iter().any(|of| of.eq_ignore_ascii_case(origin))
    }

    /// `token-key`: the key to have a token made with.
    pub fn token_key(&self) -> &[u8] {
        &self.token_key
    }

    /// `max-age`, in seconds.
    pub fn max_age(&self) -> Option<u64> {
        self.max_age
    }
}

impl TokenRequest {
    /// A request for a token that meets a challenge, with a nonce and a blind of its own.
    ///
    /// # Errors
    /// The challenge's key is none.
    pub fn new(challenge: &Challenge) -> Result<Self, ClientError> {
        let (octets, state) = match challenge.kind() {
            TokenType::PrivateP384 => {
                let (octets, state) = private::<NistP384>(challenge)?;
                (octets, State::P384(state))
            }
            TokenType::PrivateRistretto255 => {
                let (octets, state) = private::<Ristretto255>(challenge)?;
                (octets, State::Ristretto255(state))
            }
            TokenType::Public => {
                // The ID of the key is of these octets: a key that would be written otherwise is none.
                let ours = Key::blind_rsa(&challenge.token_key).map_err(|_| ClientError::BadKey)?;
                let key = public_tokens::PublicKey::from_spki(&challenge.token_key).map_err(|_| ClientError::BadKey)?;
                if key.to_spki().map(|octets| sha256(&octets)).as_ref() != Ok(ours.id()) {
                    return Err(ClientError::BadKey);
                }
                let mut random = blind_rsa_signatures::DefaultRng;
                let made = public_tokens::TokenRequest::new(&mut random, key, &challenge.parsed);
                let (request, state) = made.map_err(|_| ClientError::NoRequest)?;
                let octets = request.tls_serialize_detached().map_err(|_| ClientError::NoRequest)?;
                (octets, State::BlindRsa(Box::new(state)))
            }
        };
        Ok(Self { octets, state })
    }

    /// What goes to the Issuer.
    pub fn octets(&self) -> &[u8] {
        &self.octets
    }

    /// The token, from what the Issuer has answered. That is verified: its signature, or its proof.
    ///
    /// # Errors
    /// It is none.
    pub fn finish(self, answer: &[u8]) -> Result<Vec<u8>, ClientError> {
        let bad = |_| ClientError::BadAnswer;
        match self.state {
            State::P384(state) => finish_private(&state, answer),
            State::Ristretto255(state) => finish_private(&state, answer),
            State::BlindRsa(state) => {
                let answer = public_tokens::TokenResponse::tls_deserialize_exact(answer).map_err(bad)?;
                let token = answer.issue_token(&state).map_err(|_| ClientError::BadAnswer)?;
                token.tls_serialize_detached().map_err(bad)
            }
        }
    }
}

type Private<CS> = (Vec<u8>, Box<private_tokens::TokenState<CS>>);

fn private<CS: PrivateCipherSuite>(challenge: &Challenge) -> Result<Private<CS>, ClientError> {
    let key = deserialize_public_key::<CS>(&challenge.token_key).map_err(|_| ClientError::BadKey)?;
    let made = private_tokens::TokenRequest::<CS>::new(key, &challenge.parsed);
    let (request, state) = made.map_err(|_| ClientError::NoRequest)?;
    Ok((request.tls_serialize_detached().map_err(|_| ClientError::NoRequest)?, Box::new(state)))
}

fn finish_private<CS: PrivateCipherSuite>(
    state: &private_tokens::TokenState<CS>,
    answer: &[u8],
) -> Result<Vec<u8>, ClientError> {
    let answer = private_tokens::TokenResponse::<CS>::tls_deserialize_exact(answer);
    let token = answer.map_err(|_| ClientError::BadAnswer)?.issue_token(state);
    token.map_err(|_| ClientError::BadAnswer)?.tls_serialize_detached().map_err(|_| ClientError::BadAnswer)
}

/// The value of `Authorization` that redeems a token (RFC 9577 §2.2).
pub fn authorization(token: &[u8]) -> String {
    format!("PrivateToken token=\"{}\"", BASE64URL.encode(token))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn challenges_are_read_or_left_out() {
        let octets = |context: &[u8], origin: &str, more: &[u8]| {
            let vector = |octets: &[u8]| [&(octets.len() as u16).to_be_bytes(), octets].concat();
            [&[0, 5], &*vector(b"issuer.example"), &[context.len() as u8], context, &vector(origin.as_bytes()), more]
                .concat()
        };
        let read = |octets: &[u8]| {
            let text = BASE64URL.encode(octets);
            let field = format!(
                "Basic realm=\"x, y\", PrivateToken challenge=\"{text}\", token-key=\"AAEC\", max-age=7, Bearer"
            );
            let fields = [(header::WWW_AUTHENTICATE, HeaderValue::try_from(field).unwrap())];
            challenges(&fields.into_iter().collect())
        };
        let of = read(&octets(&[7; 32], "ds.b.example,b.example", b""));
        assert_eq!((of.len(), of[0].issuer_name(), of[0].max_age()), (1, "issuer.example".to_owned(), Some(7)));
        assert!(of[0].is_for("DS.b.example") && of[0].is_for("b.example") && !of[0].is_for("ds.c.example"));
        let any = read(&octets(b"", "", b""));
        assert!(any[0].is_for("ds.c.example"));
        for bad in
            [octets(&[7; 31], "", b""), octets(&[7; 33], "", b""), octets(b"", "", b"x"), vec![], vec![0, 9, 0, 0]]
        {
            assert!(read(&bad).is_empty(), "{bad:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whatever_comes_is_read_or_left_out(field in "(PrivateToken|x|,| |=|\"|challenge|token-key|[A-Za-z0-9_=-]{0,20}){0,30}") {
            let fields = [(header::WWW_AUTHENTICATE, HeaderValue::try_from(field).unwrap())];
            let _ = challenges(&fields.into_iter().collect());
        }
    }
}
