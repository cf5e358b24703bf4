//! The gateway as a Privacy Pass Origin (RFC 9576, RFC 9577): what it challenges with, which tokens it takes, and which
//! it has taken.
//!
//! Nothing is stored for a challenge. Its redemption context is derived from a secret, the origin and the epoch, so every
//! gateway that shares the secret sends, and accepts, the same ones: those of this epoch and of the one before. A spent
//! token needs to be remembered only as long.

mod challenge;
mod issuer;
mod spent;

pub use challenge::{Challenges, quoted_challenge};
pub use issuer::{Issuer, KeyError};
pub use spent::{Reservation, Spent};

use crate::problem::TokenProblem;
use base64::Engine as _;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use http::{HeaderMap, HeaderValue, header};
use privacypass::TokenType;
use privacypass::public_tokens::PublicToken;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tls_codec::Deserialize as _;

/// base64url as RFC 9577 §2 has it, with the padding that some clients leave out.
const BASE64URL: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Octets of a token of type 0x0002: type, nonce, challenge digest, key ID, authenticator (RFC 9578 §6.3).
const TOKEN_LEN: usize = 2 + 32 + 32 + 32 + 256;

/// Octets of a token that the authenticator signs (RFC 9578 §6.3).
const TOKEN_INPUT_LEN: usize = 2 + 32 + 32 + 32;

/// An Origin.
#[derive(Debug)]
pub struct Origin {
    challenges: Challenges,
    spent: Arc<Spent>,
}

impl Origin {
    /// An Origin that challenges with `challenges` and remembers at most `capacity` spent tokens.
    pub fn new(challenges: Challenges, capacity: usize) -> Self {
        Self { challenges, spent: Arc::new(Spent::new(capacity)) }
    }

    /// `WWW-Authenticate`: a fresh challenge for each issuer.
    pub fn challenge(&self) -> Option<HeaderValue> {
        self.challenges.www_authenticate(unix_now())
    }

    /// Takes the token of a request: its challenge digest is one that this origin would send now, its key is trusted, its
    /// authenticator right and its nonce unspent, in this order, the dear check after the cheap ones. The token is
    /// reserved: it is spent when the reservation is kept, and may be used again when that is dropped.
    ///
    /// # Errors
    /// Which of these does not hold, or that there is no token.
    pub fn redeem(&self, headers: &HeaderMap) -> Result<Reservation, TokenProblem> {
        self.redeem_at(headers, unix_now())
    }

    fn redeem_at(&self, headers: &HeaderMap, now: Duration) -> Result<Reservation, TokenProblem> {
        let octets = credential(headers)?.ok_or(TokenProblem::Missing)?;
        let token = PublicToken::tls_deserialize(&mut octets.as_slice()).map_err(|_| TokenProblem::Malformed)?;
        if token.token_type() != TokenType::Public {
            return Err(TokenProblem::Malformed);
        }
        let issuer = self.challenges.issuer_of(token.token_key_id()).ok_or(TokenProblem::UnknownKey)?;
        let epoch = self.challenges.epoch_of(issuer, token.challenge_digest(), now)?;
        let input = octets.get(..TOKEN_INPUT_LEN).ok_or(TokenProblem::Malformed)?;
        if self.spent.contains(&token.nonce()) {
            return Err(TokenProblem::Spent);
        }
        if !issuer.verifies(input, token.authenticator()) {
            return Err(TokenProblem::BadAuthenticator);
        }
        Spent::reserve(&self.spent, token.nonce(), epoch, self.challenges.epoch_at(now))
    }
}

/// Whether a request brings a `PrivateToken` credential at all.
pub fn has_credential(headers: &HeaderMap) -> bool {
    headers.get_all(header::AUTHORIZATION).iter().any(is_private_token)
}

/// Whether a field is of the `PrivateToken` scheme. Others are the Delivery Service's and pass on.
pub fn is_private_token(value: &HeaderValue) -> bool {
    parameters(value).is_some()
}

/// What follows the scheme name, where that is `PrivateToken` (RFC 9110 §11.1: without regard to case).
fn parameters(value: &HeaderValue) -> Option<&[u8]> {
    const SCHEME: &[u8] = b"PrivateToken";
    let (scheme, rest) = value.as_bytes().split_at_checked(SCHEME.len())?;
    let bounded = rest.first().is_none_or(|octet| matches!(octet, b' ' | b'\t'));
    (bounded && scheme.eq_ignore_ascii_case(SCHEME)).then_some(rest)
}

/// The octets of the one `PrivateToken` credential, if there is any (RFC 9577 §2.2): `token`, quoted or not.
fn credential(headers: &HeaderMap) -> Result<Option<Vec<u8>>, TokenProblem> {
    let mut credentials = headers.get_all(header::AUTHORIZATION).iter().filter_map(parameters);
    let Some(found) = credentials.next() else { return Ok(None) };
    if credentials.next().is_some() {
        return Err(TokenProblem::Malformed);
    }
    // A token has one size; whatever is much longer is not read.
    let text = std::str::from_utf8(found).ok().filter(|text| text.len() < 4 * TOKEN_LEN);
    let mut token = None;
    for parameter in text.ok_or(TokenProblem::Malformed)?.split(',') {
        let (name, value) = parameter.split_once('=').ok_or(TokenProblem::Malformed)?;
        let (name, value) = (name.trim_matches([' ', '\t']), value.trim_matches([' ', '\t']));
        let value = match value.strip_prefix('"') {
            Some(quoted) => quoted.strip_suffix('"').ok_or(TokenProblem::Malformed)?,
            None => value,
        };
        // Parameters of others' making are allowed and mean nothing (RFC 9577 §2.2); the token is one.
        if name.eq_ignore_ascii_case("token") && token.replace(value).is_some() {
            return Err(TokenProblem::Malformed);
        }
    }
    let octets = BASE64URL.decode(token.ok_or(TokenProblem::Malformed)?).map_err(|_| TokenProblem::Malformed)?;
    if octets.len() == TOKEN_LEN { Ok(Some(octets)) } else { Err(TokenProblem::Malformed) }
}

fn unix_now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        values.iter().map(|v| (header::AUTHORIZATION, HeaderValue::from_str(v).unwrap())).collect()
    }

    #[test]
    fn credentials() {
        let token = BASE64URL.encode([1; TOKEN_LEN]);
        let bare = token.trim_end_matches('=');
        let good = |value: &str| credential(&headers(&[value])).unwrap().unwrap() == [1; TOKEN_LEN];
        assert!(good(&format!("PrivateToken token=\"{token}\"")));
        assert!(good(&format!("privatetoken token={token}")));
        assert!(good(&format!("PrivateToken  token = \"{bare}\"")));
        assert!(good(&format!("PrivateToken token={bare}, extension=\"x\"")));
        assert_eq!(credential(&headers(&["Bearer abc", "PrivateTokens token=\"x\""])), Ok(None));
        assert_eq!(credential(&headers(&[])), Ok(None));

        let one = format!("PrivateToken token=\"{token}\"");
        let short = BASE64URL.encode([1; TOKEN_LEN - 1]);
        let long = BASE64URL.encode([1; TOKEN_LEN + 1]);
        for bad in [
            "PrivateToken".to_owned(),
            "PrivateToken ".to_owned(),
            "PrivateToken token".to_owned(),
            "PrivateToken token=".to_owned(),
            "PrivateToken token=\"".to_owned(),
            "PrivateToken token=\"*\"".to_owned(),
            format!("PrivateToken token=\"{token}"),
            format!("PrivateToken tokens=\"{token}\""),
            format!("PrivateToken token=\"{token}\", token=\"{token}\""),
            format!("PrivateToken token=\"{short}\""),
            format!("PrivateToken token=\"{long}\""),
            format!("PrivateToken token=\"{}\"", "A".repeat(100_000)),
        ] {
            assert_eq!(credential(&headers(&[&bad])), Err(TokenProblem::Malformed), "{bad:.60}");
        }
        assert_eq!(credential(&headers(&[&one, &one])), Err(TokenProblem::Malformed), "two credentials");
        assert!(credential(&headers(&["Bearer x", &one])).unwrap().is_some(), "another scheme beside it");
    }
}
