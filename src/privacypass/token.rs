//! A token as a request brings it (RFC 9577 §2.2): out of its header field, and read as the `privacypass` crate has it.

use crate::problem::TokenProblem;
use base64::Engine as _;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use http::{HeaderMap, HeaderValue, header};
use hybrid_array::ArraySize;
use hybrid_array::typenum::{U48, U64, U256};
use privacypass::auth::authorize;
use privacypass::{ChallengeDigest, Nonce, TokenKeyId, TokenType};
use tls_codec::Deserialize as _;

/// base64url as RFC 9577 §2 has it, with the padding that some clients leave out.
pub(super) const BASE64URL: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Octets of a token that its authenticator is for (RFC 9578 §5.3, §6.3): type, nonce, challenge digest, key ID.
const INPUT_LEN: usize = 2 + 32 + 32 + 32;

/// Octets of the longest token, of type 0x0002.
const MOST: usize = INPUT_LEN + 256;

/// The token types that are taken (RFC 9578 §8.2, and draft-ietf-privacypass-batched-tokens for 0x0005). Tokens that were
/// issued in batches are tokens like others.
pub const TYPES: [TokenType; 3] = [TokenType::PrivateP384, TokenType::Public, TokenType::PrivateRistretto255];

/// Of three things, in the order of [`TYPES`], the one of a type.
pub(super) fn of_type<T>([p384, blind_rsa, ristretto255]: &[T; 3], kind: TokenType) -> &T {
    match kind {
        TokenType::PrivateP384 => p384,
        TokenType::Public => blind_rsa,
        TokenType::PrivateRistretto255 => ristretto255,
    }
}

/// A token that could be read.
#[derive(Debug, Clone)]
pub struct Token {
    octets: Vec<u8>,
    kind: TokenType,
    nonce: Nonce,
    challenge: ChallengeDigest,
    key_id: TokenKeyId,
}

/// The type of this number.
pub fn type_of(number: u16) -> Option<TokenType> {
    TYPES.into_iter().find(|kind| *kind as u16 == number)
}

impl Token {
    /// Reads a token: all of `octets`, and nothing after it.
    ///
    /// # Errors
    /// [`TokenProblem::Malformed`], or [`TokenProblem::UnknownType`] where only its type is known to be none of [`TYPES`].
    pub fn read(octets: Vec<u8>) -> Result<Self, TokenProblem> {
        let number = octets.first_chunk().map(|number| u16::from_be_bytes(*number)).ok_or(TokenProblem::Malformed)?;
        match type_of(number).ok_or(TokenProblem::UnknownType)? {
            TokenType::PrivateP384 => Self::of::<U48>(octets),
            TokenType::Public => Self::of::<U256>(octets),
            TokenType::PrivateRistretto255 => Self::of::<U64>(octets),
        }
    }

    fn of<Nk: ArraySize>(octets: Vec<u8>) -> Result<Self, TokenProblem> {
        if octets.len() != INPUT_LEN + Nk::USIZE {
            return Err(TokenProblem::Malformed);
        }
        let token = authorize::Token::<Nk>::tls_deserialize(&mut octets.as_slice());
        let token = token.map_err(|_| TokenProblem::Malformed)?;
        let (challenge, key_id) = (*token.challenge_digest(), *token.token_key_id());
        Ok(Self { kind: token.token_type(), nonce: token.nonce(), challenge, key_id, octets })
    }

    /// `token_type`.
    pub fn kind(&self) -> TokenType {
        self.kind
    }

    /// `nonce`.
    pub fn nonce(&self) -> &Nonce {
        &self.nonce
    }

    /// `challenge_digest`.
    pub fn challenge(&self) -> &ChallengeDigest {
        &self.challenge
    }

    /// `token_key_id`.
    pub fn key_id(&self) -> &TokenKeyId {
        &self.key_id
    }

    /// All of it.
    pub fn octets(&self) -> &[u8] {
        &self.octets
    }

    /// What the authenticator is for, and the authenticator.
    pub fn parts(&self) -> (&[u8], &[u8]) {
        self.octets.split_at_checked(INPUT_LEN).unwrap_or_default()
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
///
/// # Errors
/// [`TokenProblem::Malformed`]: it cannot be read, or there are two.
pub fn credential(headers: &HeaderMap) -> Result<Option<Vec<u8>>, TokenProblem> {
    let mut credentials = headers.get_all(header::AUTHORIZATION).iter().filter_map(parameters);
    let Some(found) = credentials.next() else { return Ok(None) };
    if credentials.next().is_some() {
        return Err(TokenProblem::Malformed);
    }
    // Whatever is much longer than the longest token is not read.
    let text = std::str::from_utf8(found).ok().filter(|text| text.len() < 4 * MOST);
    let mut rest = text.ok_or(TokenProblem::Malformed)?;
    let mut token = None;
    while !rest.is_empty() {
        let (name, value, after) = parameter(rest).ok_or(TokenProblem::Malformed)?;
        // Parameters of others' making are allowed and mean nothing (RFC 9577 §2.2); the token is one.
        if name.eq_ignore_ascii_case("token") && token.replace(value).is_some() {
            return Err(TokenProblem::Malformed);
        }
        rest = after;
    }
    let octets = BASE64URL.decode(token.ok_or(TokenProblem::Malformed)?).map_err(|_| TokenProblem::Malformed)?;
    Ok(Some(octets))
}

/// The first of parameters, `name=value` or `name="value"`, without its quotes; and those after its comma. A second credential
/// is none: a name has no blanks (RFC 9110 §11.2, §5.6.2).
fn parameter(text: &str) -> Option<(&str, &str, &str)> {
    const BLANK: [char; 2] = [' ', '\t'];
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    let (name, value) = text.split_once('=')?;
    let (name, value) = (name.trim_matches(BLANK), value.trim_start_matches(BLANK));
    if name.is_empty() || !name.chars().all(is_of_name) {
        return None;
    }
    let (value, after) = match value.strip_prefix('"') {
        // What has escapes is no token.
        Some(quoted) => quoted.split_once('"')?,
        None => value.split_at(value.find([',', ' ', '\t']).unwrap_or(value.len())),
    };
    match after.trim_start_matches(BLANK) {
        "" => Some((name, value, "")),
        // Elements of a list may be empty (RFC 9110 §5.6.1.2).
        more => Some((name, value, more.strip_prefix(',')?.trim_start_matches([',', ' ', '\t']))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (header::AUTHORIZATION, HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn credentials() {
        let token = BASE64URL.encode([1; MOST]);
        let bare = token.trim_end_matches('=');
        let good = |value: &str| credential(&headers(&[value])).unwrap().unwrap() == [1; MOST];
        assert!(good(&format!("PrivateToken token=\"{token}\"")));
        assert!(good(&format!("privatetoken token={token}")));
        assert!(good(&format!("PrivateToken  token = \"{bare}\"")));
        assert!(good(&format!("PrivateToken token={bare}, extension=\"x\"")));
        assert!(good(&format!("PrivateToken token=\"{token}\" , ,")));
        assert!(good(&format!("PrivateToken extension=\"a, b=c\" ,token={token}")));
        assert_eq!(credential(&headers(&["Bearer abc", "PrivateTokens token=\"x\""])), Ok(None));
        assert_eq!(credential(&headers(&[])), Ok(None));

        let one = format!("PrivateToken token=\"{token}\"");
        for bad in [
            "PrivateToken".to_owned(),
            "PrivateToken ".to_owned(),
            "PrivateToken token".to_owned(),
            "PrivateToken token=\"".to_owned(),
            "PrivateToken token=\"*\"".to_owned(),
            format!("PrivateToken token=\"{token}"),
            format!("PrivateToken tokens=\"{token}\""),
            format!("PrivateToken token=\"{token}\", token=\"{token}\""),
            format!("PrivateToken token=\"{token}\", Bearer abc"),
            format!("PrivateToken token=\"{token}\", Bearer a=b"),
            format!("PrivateToken token=\"{token}\", PrivateToken token=\"{token}\""),
            format!("PrivateToken token=\"{token}\" token=\"{token}\""),
            format!("PrivateToken token={token} x"),
            "PrivateToken =".to_owned(),
            format!("PrivateToken token=\"{}\"", "A".repeat(100_000)),
        ] {
            assert_eq!(credential(&headers(&[&bad])), Err(TokenProblem::Malformed), "{}", bad.replace(&token, "T"));
        }
        assert_eq!(credential(&headers(&[&one, &one])), Err(TokenProblem::Malformed), "two credentials");
        assert!(credential(&headers(&["Bearer x", &one])).unwrap().is_some(), "another scheme beside it");
    }

    #[test]
    fn tokens_are_as_long_as_their_type_says() {
        for (kind, authenticator) in [(1, 48), (2, 256), (5, 64)] {
            let token = |more: usize| [&[0, kind][..], &[7; 96], &vec![9; authenticator + more]].concat();
            let read = Token::read(token(0)).unwrap();
            assert_eq!((read.kind() as u16, read.nonce(), read.key_id()), (u16::from(kind), &[7; 32], &[7; 32]));
            assert_eq!((read.parts().0.len(), read.parts().1), (INPUT_LEN, &vec![9; authenticator][..]));
            assert_eq!(Token::read(token(1)).unwrap_err(), TokenProblem::Malformed, "trailing octets");
            let whole = token(0);
            for short in 2..whole.len() {
                assert_eq!(Token::read(whole[..short].to_vec()).unwrap_err(), TokenProblem::Malformed, "{short}");
            }
        }
        assert_eq!(Token::read(vec![]).unwrap_err(), TokenProblem::Malformed);
        for foreign in [[0, 0], [0, 3], [1, 2], [0xda, 0x7a]] {
            assert_eq!(Token::read([&foreign[..], &[0; 352]].concat()).unwrap_err(), TokenProblem::UnknownType);
        }
    }

    proptest::proptest! {
        #[test]
        fn whatever_comes_is_answered(octets in proptest::collection::vec(0u8.., 0..500), kind in 0u8..7) {
            let _ = Token::read([&[0, kind][..], &octets].concat());
            if let Ok(value) = HeaderValue::from_bytes(&[b"PrivateToken ", &octets[..]].concat()) {
                let _ = credential(&HeaderMap::from_iter([(header::AUTHORIZATION, value)]));
            }
        }
    }
}
