//! Policy: what the operator wants of limits and tokens, as plain data.

use crate::dialect::Operation;
use crate::limiter::OnFailure;
use crate::limiter::gcra::Gcra;
use crate::privacypass::Purpose;
use crate::problem::Violated;
use ipnet::IpNet;
use std::net::IpAddr;

/// What of a request a limit's key is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeyParts {
    /// The source address, IPv6 by prefix.
    pub ip: bool,
    /// The authenticated provider.
    pub provider: bool,
    /// The MLS group.
    pub group: bool,
    /// The sending member of the group.
    pub member: bool,
    /// The user or client it is for.
    pub target: bool,
    /// The endpoint.
    pub endpoint: bool,
}

/// What a Privacy Pass token does for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TokenUse {
    /// Nothing.
    #[default]
    Off,
    /// There is no request without one.
    Required,
    /// Where the limit is exceeded, one lets the request into this second limit.
    TopUp(Gcra),
    /// Where the limit is exceeded, one lets the request pass.
    Exempt,
}

impl TokenUse {
    /// Whether a token helps where the limit is exceeded.
    pub(super) fn helps(self) -> bool {
        matches!(self, Self::TopUp(_) | Self::Exempt)
    }
}

/// What a limit counts (draft-ietf-httpapi-ratelimit-headers-11 §3.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unit {
    /// Requests, or what they ask for.
    #[default]
    Requests,
    /// Octets of their bodies.
    Octets,
    /// Requests under way at once.
    Concurrent,
}

/// What a limit is about: its name, the requests it covers, and whose they are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scope {
    /// Its name in the configuration, in metrics and in answers.
    pub name: String,
    /// A bit for each operation it covers, by [`Operation::id`].
    pub covers: u128,
    /// What its key is made of.
    pub key: KeyParts,
    /// Whether it refuses; a shadow only counts.
    pub enforce: bool,
    /// Networks that it leaves out.
    pub exempt: Vec<IpNet>,
}

/// A limit with a rate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// What it is about.
    pub scope: Scope,
    /// What its cells are.
    pub unit: Unit,
    /// Rate and burst.
    pub gcra: Gcra,
    /// Other rates and bursts, for authenticated providers by name, in lower case.
    pub overrides: Vec<(String, Gcra)>,
    /// What a token does.
    pub token: TokenUse,
    /// What holds while the fleet's store does not answer.
    pub on_store_failure: OnFailure,
}

/// A limit of requests under way at once, on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Concurrency {
    /// What it is about.
    pub scope: Scope,
    /// As many as there may be.
    pub most: u32,
    /// Other numbers, for authenticated providers by name, in lower case.
    pub overrides: Vec<(String, u32)>,
}

/// All limits, and what tokens do at endpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// The limits with a rate.
    pub limits: Vec<Limit>,
    /// The limits of concurrency.
    pub concurrency: Vec<Concurrency>,
    /// What tokens do at an endpoint, by its operations' IDs; the default is nothing.
    pub endpoint_tokens: Vec<(u8, TokenUse)>,
    /// Bits of an IPv6 source address that are one source.
    pub ipv6_prefix: u8,
}

impl Unit {
    /// Its name in `RateLimit-Policy`; none for the default.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::Requests => None,
            Self::Octets => Some("content-bytes"),
            Self::Concurrent => Some("concurrent-requests"),
        }
    }
}

impl Scope {
    /// Whether a request of `operation` from `ip` is among those it is about.
    #[inline]
    pub fn covers(&self, operation: &Operation, ip: IpAddr) -> bool {
        let covered = self.covers >> operation.id & 1 == 1;
        covered && (self.exempt.is_empty() || !self.exempts(ip))
    }

    fn exempts(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.exempt.iter().any(|network| network.contains(&ip))
    }
}

impl Concurrency {
    /// As many as there may be of a provider, if it is authenticated.
    pub fn most_for(&self, provider: Option<&str>) -> u32 {
        let own = |provider| self.overrides.iter().find(|(name, _)| name == provider);
        provider.and_then(own).map_or(self.most, |(_, most)| *most)
    }
}

impl Policy {
    /// What a token does for `limit` at `operation`: as the limit says, else as the endpoint does.
    pub(super) fn token_use(&self, limit: &Limit, operation: &Operation) -> TokenUse {
        match limit.token {
            // An endpoint's token is for limits of requests.
            TokenUse::Off if limit.unit == Unit::Requests => self.endpoint_token(operation),
            own => own,
        }
    }

    fn endpoint_token(&self, operation: &Operation) -> TokenUse {
        let of = self.endpoint_tokens.iter().find(|(id, _)| *id == operation.id);
        of.map_or(TokenUse::Off, |(_, token)| *token)
    }

    /// Whether there is no request of this operation from `ip` without a token.
    pub fn token_required(&self, operation: &Operation, ip: IpAddr) -> bool {
        let required = |l: &&Limit| l.token == TokenUse::Required && l.scope.enforce;
        self.endpoint_token(operation) == TokenUse::Required
            || self.limits.iter().filter(required).any(|l| l.scope.covers(operation, ip))
    }

    /// What a request of this operation from `ip` wants a token for: the limits that it exceeds and that take one, and, where
    /// one is `required`, those that do so.
    pub fn purpose<'a>(
        &'a self,
        operation: &Operation,
        ip: IpAddr,
        exceeded: &[Violated],
        required: bool,
    ) -> Purpose<'a> {
        let is_exceeded = |l: &&Limit| exceeded.iter().any(|violated| violated.policy == l.scope.name);
        let (own, of_endpoint): (Vec<_>, Vec<_>) =
            self.limits.iter().filter(is_exceeded).partition(|l| l.token != TokenUse::Off);
        let requires = |l: &&Limit| l.token == TokenUse::Required && l.scope.enforce && l.scope.covers(operation, ip);
        let requiring = self.limits.iter().filter(|l| required && requires(l));
        let of_endpoint = !of_endpoint.is_empty() || required && self.endpoint_token(operation) == TokenUse::Required;
        let limits = own.into_iter().chain(requiring).map(|l| l.scope.name.as_str()).collect();
        Purpose { endpoint: operation.endpoint, of_endpoint, limits }
    }

    /// Whether a token may ever do anything.
    pub fn uses_tokens(&self) -> bool {
        self.endpoint_tokens.iter().any(|(_, token)| *token != TokenUse::Off)
            || self.limits.iter().any(|l| l.token != TokenUse::Off)
    }

    /// What each limit is about; those with a rate first.
    pub fn scopes(&self) -> impl Iterator<Item = &Scope> + Clone {
        self.limits.iter().map(|l| &l.scope).chain(self.concurrency.iter().map(|c| &c.scope))
    }
}
