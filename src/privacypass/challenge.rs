//! What an Origin asks for (RFC 9577 §2.1): a `TokenChallenge` for each issuer, the same for everyone in an epoch.

use super::{BASE64URL, Issuer};
use crate::problem::TokenProblem;
use aws_lc_rs::hmac;
use base64::Engine as _;
use http::HeaderValue;
use parking_lot::Mutex;
use privacypass::TokenType;
use privacypass::auth::authenticate::TokenChallenge;
use std::sync::Arc;
use std::time::Duration;

/// A `TokenChallenge` on the wire, and its SHA-256.
type Sealed = (Vec<u8>, [u8; 32]);

/// Epochs before the accepted ones in which a challenge is still known for one of ours: its token is expired, not foreign.
const REMEMBERED: u64 = 8;

/// The challenges of an Origin.
pub struct Challenges {
    origin: String,
    epoch: Duration,
    secret: hmac::Key,
    issuers: Vec<Issuer>,
    /// Those of the current and of the previous epoch, made once an epoch: by issuer.
    current: Mutex<Option<Arc<Epoch>>>,
}

struct Epoch {
    number: u64,
    /// By issuer: this epoch's, and the one's before.
    challenges: Vec<(Sealed, [u8; 32])>,
}

impl std::fmt::Debug for Challenges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Challenges").field("origin", &self.origin).field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl Challenges {
    /// Challenges of `origin` (`origin_info`), new ones every `epoch` (a second at least), for tokens of `issuers`.
    pub fn new(origin: String, epoch: Duration, secret: &[u8], issuers: Vec<Issuer>) -> Self {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, secret);
        Self { origin, epoch: epoch.max(Duration::from_secs(1)), secret, issuers, current: Mutex::new(None) }
    }

    /// The number of the epoch at a time since the Unix epoch.
    pub(super) fn epoch_at(&self, now: Duration) -> u64 {
        (now.as_nanos() / self.epoch.as_nanos().max(1)) as u64
    }

    pub(super) fn issuer_of(&self, key_id: &[u8; 32]) -> Option<&Issuer> {
        self.issuers.iter().find(|issuer| issuer.key_id() == key_id)
    }

    /// 32 octets that only this origin could have made, for this epoch.
    fn context(&self, epoch: u64) -> [u8; 32] {
        let mut hmac = hmac::Context::with_key(&self.secret);
        hmac.update(b"moh-gateway redemption context v1\0");
        hmac.update(&epoch.to_be_bytes());
        hmac.update(self.origin.as_bytes());
        let mut context = [0; 32];
        context.iter_mut().zip(hmac.sign().as_ref()).for_each(|(to, from)| *to = *from);
        context
    }

    fn seal(&self, issuer: &Issuer, epoch: u64) -> Option<Sealed> {
        let context = Some(self.context(epoch));
        let origins = std::slice::from_ref(&self.origin);
        let challenge = TokenChallenge::new(TokenType::Public, issuer.name(), context, origins);
        let octets = challenge.serialize().ok()?;
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &octets);
        Some((octets, digest.as_ref().try_into().ok()?))
    }

    fn at(&self, now: Duration) -> Option<Arc<Epoch>> {
        let number = self.epoch_at(now);
        let mut current = self.current.lock();
        if let Some(epoch) = current.as_ref().filter(|epoch| epoch.number == number) {
            return Some(epoch.clone());
        }
        let challenges = self
            .issuers
            .iter()
            .map(|issuer| Some((self.seal(issuer, number)?, self.seal(issuer, number.saturating_sub(1))?.1)))
            .collect::<Option<Vec<_>>>()?;
        let epoch = Arc::new(Epoch { number, challenges });
        *current = Some(epoch.clone());
        Some(epoch)
    }

    /// `WWW-Authenticate` at a time since the Unix epoch: a challenge for each issuer, with the seconds for which its
    /// tokens will be taken.
    pub fn www_authenticate(&self, now: Duration) -> Option<HeaderValue> {
        let epoch = self.at(now)?;
        let until = self.epoch.as_nanos() * (u128::from(epoch.number) + 2);
        let max_age = until.saturating_sub(now.as_nanos()) / 1_000_000_000;
        let challenges: Vec<_> = self
            .issuers
            .iter()
            .zip(&epoch.challenges)
            .map(|(issuer, ((octets, _), _))| quoted_challenge(octets, issuer.token_key(), max_age))
            .collect();
        HeaderValue::try_from(challenges.join(", ")).ok()
    }

    /// The epoch of the challenge with this digest.
    pub(super) fn epoch_of(&self, issuer: &Issuer, digest: &[u8; 32], now: Duration) -> Result<u64, TokenProblem> {
        let epoch = self.at(now).ok_or(TokenProblem::WrongChallenge)?;
        let of_issuer = self.issuers.iter().position(|one| one.key_id() == issuer.key_id());
        let ((_, current), previous) =
            of_issuer.and_then(|i| epoch.challenges.get(i)).ok_or(TokenProblem::WrongChallenge)?;
        if digest == current {
            return Ok(epoch.number);
        }
        if digest == previous {
            return Ok(epoch.number.saturating_sub(1));
        }
        let older = (2..=1 + REMEMBERED).filter_map(|ago| self.seal(issuer, epoch.number.checked_sub(ago)?));
        if older.into_iter().any(|(_, old)| &old == digest) {
            return Err(TokenProblem::Expired);
        }
        Err(TokenProblem::WrongChallenge)
    }
}

/// One challenge of a `WWW-Authenticate` field. The values may hold `=`, so they are quoted (RFC 9577 §2.1).
pub fn quoted_challenge(challenge: &[u8], token_key: &[u8], max_age: u128) -> String {
    let (challenge, key) = (BASE64URL.encode(challenge), BASE64URL.encode(token_key));
    format!("PrivateToken challenge=\"{challenge}\", token-key=\"{key}\", max-age={max_age}")
}
