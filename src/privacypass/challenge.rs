//! What an Origin asks for (RFC 9577 §2.1): a `TokenChallenge` for each issuer and type, the same for everyone in an epoch.
//!
//! The redemption context is derived from a secret, the origin, the epoch and, where the operator says so, from what the
//! token is for: the endpoint, or the limit. A token for the one is then none for the other.

use super::issuer::Issuer;
use super::key::{Key, sha256};
use super::token::{BASE64URL, Token};
use crate::problem::TokenProblem;
use aws_lc_rs::hmac;
use base64::Engine as _;
use http::HeaderValue;
use parking_lot::Mutex;
use privacypass::auth::authenticate::TokenChallenge;
use smallvec::{SmallVec, smallvec};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Epochs before the accepted ones in which a challenge is still known for one of ours: its token is expired, not foreign.
const REMEMBERED: u64 = 8;

/// A challenge of the epoch to come is known for one of ours so long before that: clocks of a fleet differ.
const SKEW: Duration = Duration::from_secs(10);

/// What the redemption context of a challenge is bound to, beside origin and epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BoundTo {
    /// Nothing: a token is good wherever this origin asks for one.
    #[default]
    Origin,
    /// The endpoint.
    Endpoint,
    /// The limit that asks for it, or the endpoint that does.
    Limit,
}

/// What a request wants a token for.
#[derive(Debug, Clone, Default)]
pub struct Purpose<'a> {
    /// Its endpoint.
    pub endpoint: &'a str,
    /// The endpoint itself asks for one, or lets one past a limit that is exceeded.
    pub of_endpoint: bool,
    /// The limits that ask for one, by name: those that are exceeded, then those that require one.
    pub limits: SmallVec<[&'a str; 4]>,
}

/// The challenges of an Origin.
pub struct Challenges {
    origin: String,
    epoch: Duration,
    bound_to: BoundTo,
    secret: hmac::Key,
    issuers: Vec<Arc<Issuer>>,
    /// Those of the latest epochs, by what they are bound to, in the order of the issuers. As many as there are endpoints or
    /// limits.
    sealed: Mutex<HashMap<String, Vec<Arc<Epoch>>>>,
}

struct Epoch {
    number: u64,
    of: Vec<Sealed>,
}

/// A `TokenChallenge`, on the wire and as its digest.
struct Sealed {
    octets: Vec<u8>,
    digest: [u8; 32],
}

/// What is known of a token whose challenge and key are ours.
#[derive(Debug)]
pub struct Recognised {
    /// Its key.
    pub key: Arc<Key>,
    /// The epoch of its challenge.
    pub epoch: u64,
    /// The epoch now.
    pub current: u64,
    /// For so long it has to be remembered, once it is spent.
    pub remember: Duration,
}

impl std::fmt::Debug for Challenges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Challenges").field("origin", &self.origin).field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl Challenges {
    /// Challenges of `origin` (`origin_info`), new ones every `epoch` (a second at least), for tokens of `issuers`.
    pub fn new(origin: String, epoch: Duration, bound_to: BoundTo, secret: &[u8], issuers: Vec<Arc<Issuer>>) -> Self {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, secret);
        Self { origin, epoch: epoch.max(Duration::from_secs(1)), bound_to, secret, issuers, sealed: Mutex::default() }
    }

    /// The issuers.
    pub fn issuers(&self) -> &[Arc<Issuer>] {
        &self.issuers
    }

    /// A challenge is accepted for so long at most.
    pub fn accepted_for(&self) -> Duration {
        self.epoch * 2
    }

    /// The number of the epoch at a time since the Unix epoch.
    pub fn epoch_at(&self, now: Duration) -> u64 {
        (now.as_nanos() / self.epoch.as_nanos().max(1)) as u64
    }

    /// What a challenge for this purpose is bound to; and what those may be bound to that are good for it.
    fn bindings(&self, purpose: &Purpose<'_>) -> SmallVec<[String; 2]> {
        let endpoint = || format!("endpoint {}", purpose.endpoint);
        match self.bound_to {
            BoundTo::Origin => smallvec![String::new()],
            BoundTo::Endpoint => smallvec![endpoint()],
            BoundTo::Limit => {
                let limits = purpose.limits.iter().map(|name| format!("limit {name}"));
                limits.chain(purpose.of_endpoint.then(endpoint)).collect()
            }
        }
    }

    /// 32 octets that only this origin could have made, for this epoch and this binding.
    fn context(&self, binding: &str, epoch: u64) -> [u8; 32] {
        let mut hmac = hmac::Context::with_key(&self.secret);
        hmac.update(b"moh-gateway redemption context v2\0");
        hmac.update(&self.epoch.as_nanos().to_be_bytes());
        hmac.update(&epoch.to_be_bytes());
        hmac.update(self.origin.as_bytes());
        hmac.update(b"\0");
        hmac.update(binding.as_bytes());
        let mut context = [0; 32];
        context.iter_mut().zip(hmac.sign().as_ref()).for_each(|(to, from)| *to = *from);
        context
    }

    fn seal(&self, issuer: &Issuer, binding: &str, epoch: u64) -> Sealed {
        let context = Some(self.context(binding, epoch));
        let origins = std::slice::from_ref(&self.origin);
        let challenge = TokenChallenge::new(issuer.kind(), issuer.name(), context, origins);
        // Names are far shorter than what fits.
        let octets = challenge.serialize().unwrap_or_default();
        Sealed { digest: sha256(&octets), octets }
    }

    /// The challenges of an epoch, made once: to know that a digest is of none of them must be cheap.
    fn sealed(&self, binding: &str, number: u64) -> Arc<Epoch> {
        let known = |epochs: &Vec<Arc<Epoch>>| epochs.iter().find(|epoch| epoch.number == number).cloned();
        if let Some(known) = self.sealed.lock().get(binding).and_then(known) {
            return known;
        }
        let of = self.issuers.iter().map(|issuer| self.seal(issuer, binding, number)).collect();
        let epoch = Arc::new(Epoch { number, of });
        let mut sealed = self.sealed.lock();
        let epochs = sealed.entry(binding.to_owned()).or_default();
        // Those that are accepted or known for expired, and the next.
        if epochs.len() >= 3 + REMEMBERED as usize
            && let Some(oldest) = (0..epochs.len()).min_by_key(|i| epochs.get(*i).map(|epoch| epoch.number))
        {
            epochs.swap_remove(oldest);
        }
        epochs.push(epoch.clone());
        epoch
    }

    /// `WWW-Authenticate` at a time since the Unix epoch: a challenge for each issuer and type, with the seconds for which
    /// its tokens will be taken. None: there is no key to name.
    pub fn www_authenticate(&self, purpose: &Purpose<'_>, now: Duration) -> Option<HeaderValue> {
        let binding = self.bindings(purpose).into_iter().next()?;
        let sealed = self.sealed(&binding, self.epoch_at(now));
        let max_age = self.left(sealed.number, now).as_secs();
        let challenges: Vec<_> = self
            .issuers
            .iter()
            .zip(&sealed.of)
            .filter_map(|(issuer, sealed)| Some((issuer.advertised(now)?, sealed)))
            .map(|(key, sealed)| quoted_challenge(&sealed.octets, key.token_key(), max_age))
            .collect();
        HeaderValue::try_from(challenges.join(", ")).ok().filter(|_| !challenges.is_empty())
    }

    /// For how long tokens of an epoch are taken yet.
    fn left(&self, epoch: u64, now: Duration) -> Duration {
        let until = self.epoch.as_nanos() * (u128::from(epoch) + 2);
        let left = until.saturating_sub(now.as_nanos());
        Duration::from_nanos(u64::try_from(left).unwrap_or(u64::MAX))
    }

    /// Knows a token by its key and its challenge.
    ///
    /// # Errors
    /// [`TokenProblem::UnknownKey`], [`TokenProblem::WrongChallenge`], [`TokenProblem::Expired`].
    pub fn recognise(&self, token: &Token, purpose: &Purpose<'_>, now: Duration) -> Result<Recognised, TokenProblem> {
        let of_kind = self.issuers.iter().enumerate().filter(|(_, issuer)| issuer.kind() == token.kind());
        let with_key: SmallVec<[_; 2]> =
            of_kind.filter_map(|(i, issuer)| Some((i, issuer.key(token.key_id(), now)?))).collect();
        if with_key.is_empty() {
            return Err(TokenProblem::UnknownKey);
        }
        let (bindings, current) = (self.bindings(purpose), self.epoch_at(now));
        // The key of the challenge that an epoch has for this token.
        let of_epoch = |epoch: u64| {
            let digest = |binding: &String, at: usize| self.sealed(binding, epoch).of.get(at).map(|one| one.digest);
            let is_of =
                |at: usize| bindings.iter().any(|binding| digest(binding, at).as_ref() == Some(token.challenge()));
            with_key.iter().find(|(at, _)| is_of(*at)).map(|(_, key)| key.clone())
        };
        let next = self.epoch_at(now + SKEW.min(self.epoch / 8));
        let accepted = [Some(current), current.checked_sub(1), (next > current).then_some(next)];
        if let Some((epoch, key)) = accepted.into_iter().flatten().find_map(|epoch| Some((epoch, of_epoch(epoch)?))) {
            return Ok(Recognised { key, epoch, current, remember: self.left(epoch, now) });
        }
        let mut older = (2..=1 + REMEMBERED).filter_map(|ago| current.checked_sub(ago));
        let expired = older.any(|epoch| of_epoch(epoch).is_some());
        Err(if expired { TokenProblem::Expired } else { TokenProblem::WrongChallenge })
    }
}

/// One challenge of a `WWW-Authenticate` field. The values may hold `=`, so they are quoted (RFC 9577 §2.1).
pub fn quoted_challenge(challenge: &[u8], token_key: &[u8], max_age: u64) -> String {
    let (challenge, key) = (BASE64URL.encode(challenge), BASE64URL.encode(token_key));
    format!("PrivateToken challenge=\"{challenge}\", token-key=\"{key}\", max-age={max_age}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use privacypass::TokenType;

    const HOUR: Duration = Duration::from_secs(3600);

    fn issuer(n: u8) -> Arc<Issuer> {
        let kind = TokenType::PrivateRistretto255;
        Arc::new(Issuer::of_keys(format!("issuer-{n}.example"), kind, vec![Key::voprf(kind, &[n; 32]).unwrap()]))
    }

    fn of(bound_to: BoundTo, secret: &[u8]) -> Challenges {
        Challenges::new("o.example".into(), HOUR, bound_to, secret, vec![issuer(1), issuer(2)])
    }

    fn purpose<'a>(endpoint: &'a str, of_endpoint: bool, limits: &[&'a str]) -> Purpose<'a> {
        Purpose { endpoint, of_endpoint, limits: limits.into() }
    }

    /// A token for the `i`th challenge that is sent for a purpose. Its authenticator is nobody's.
    fn token(of: &Challenges, i: usize, purpose: &Purpose<'_>, now: Duration) -> Token {
        let value = of.www_authenticate(purpose, now).unwrap();
        let quoted = value.to_str().unwrap().split("challenge=\"").nth(1 + i).unwrap();
        let challenge = BASE64URL.decode(quoted.split('"').next().unwrap()).unwrap();
        let key = of.issuers()[i].advertised(now).unwrap();
        Token::read([&[0, 5][..], &[1; 32], &sha256(&challenge), key.id(), &[0; 64]].concat()).unwrap()
    }

    #[test]
    fn the_current_and_the_previous_epoch_are_accepted() {
        let (challenges, any) = (of(BoundTo::Origin, b"secret"), purpose("e", true, &[]));
        let now = HOUR * 1000 + Duration::from_secs(60);
        for i in [0, 1] {
            let token = token(&challenges, i, &any, now);
            let at = |now| challenges.recognise(&token, &any, now);
            let first = at(now).unwrap();
            assert_eq!((first.epoch, first.remember), (1000, HOUR * 2 - Duration::from_secs(60)));
            assert_eq!(at(now + HOUR).unwrap().epoch, 1000);
            assert_eq!(at(now + 2 * HOUR).unwrap_err(), TokenProblem::Expired);
            assert_eq!(at(now + 9 * HOUR).unwrap_err(), TokenProblem::Expired);
            assert_eq!(at(now + 20 * HOUR).unwrap_err(), TokenProblem::WrongChallenge, "nobody remembers");
            assert_eq!(at(now - HOUR).unwrap_err(), TokenProblem::WrongChallenge, "not yet");
            assert_eq!(at(HOUR * 1000 - Duration::from_secs(5)).unwrap().epoch, 1000, "another node's clock");
            // The cache serves the latest epoch, whatever was asked between.
            assert_eq!(at(now).unwrap().epoch, 1000);
        }
        assert_eq!(
            challenges.www_authenticate(&any, now).unwrap().to_str().unwrap().matches("max-age=7140").count(),
            2
        );
    }

    #[test]
    fn who_has_the_secret_knows_the_challenge() {
        let any = purpose("e", true, &[]);
        let (one, two, other) =
            (of(BoundTo::Origin, b"secret"), of(BoundTo::Origin, b"secret"), of(BoundTo::Origin, b"x"));
        let token = token(&one, 0, &any, HOUR);
        assert!(two.recognise(&token, &any, HOUR).is_ok());
        assert_eq!(other.recognise(&token, &any, HOUR).unwrap_err(), TokenProblem::WrongChallenge);
        let elsewhere = Challenges::new("p.example".into(), HOUR, BoundTo::Origin, b"secret", vec![issuer(1)]);
        assert_eq!(elsewhere.recognise(&token, &any, HOUR).unwrap_err(), TokenProblem::WrongChallenge);
        let stranger = Challenges::new("o.example".into(), HOUR, BoundTo::Origin, b"secret", vec![issuer(2)]);
        assert_eq!(stranger.recognise(&token, &any, HOUR).unwrap_err(), TokenProblem::UnknownKey);
        let faster = Challenges::new("o.example".into(), HOUR / 2, BoundTo::Origin, b"secret", vec![issuer(1)]);
        assert!(faster.recognise(&token, &any, HOUR).is_err());
    }

    #[test]
    fn a_token_is_good_for_what_it_is_bound_to() {
        let (a, b) = (purpose("a", true, &["x", "y"]), purpose("b", false, &["y"]));
        let good = |bound_to, of_purpose: &Purpose<'_>, for_purpose: &Purpose<'_>| {
            let challenges = of(bound_to, b"secret");
            challenges.recognise(&token(&challenges, 0, of_purpose, HOUR), for_purpose, HOUR).is_ok()
        };
        for bound_to in [BoundTo::Origin, BoundTo::Endpoint, BoundTo::Limit] {
            assert!(good(bound_to, &a, &a) && good(bound_to, &b, &b));
        }
        assert!(good(BoundTo::Origin, &a, &b));
        assert!(!good(BoundTo::Endpoint, &a, &b) && !good(BoundTo::Endpoint, &b, &a));
        assert!(!good(BoundTo::Limit, &a, &b), "for x, which b has not");
        assert!(good(BoundTo::Limit, &b, &a), "for y, which both have");
        let endpoint = purpose("a", true, &[]);
        assert!(good(BoundTo::Limit, &endpoint, &a) && !good(BoundTo::Limit, &endpoint, &purpose("a", false, &["x"])));
    }
}
