//! `proxyDownload` of MIMI (draft-ietf-mimi-protocol-06, "Download using a hub proxy"): another provider's request names
//! a URL, and the gateway gets it from there, so that the server of an asset sees the gateway and nobody behind it.
//!
//! The URL is a stranger's word, and so is all that its server answers. A URL that may be asked is a [`Target`]: HTTPS, of
//! a host on the operator's list, at addresses of the public Internet and at no others. It is asked with [`fields`] that
//! say nothing of who asks. Of what is answered, [`head`] lets through what does no harm under our name, and a [`Counter`]
//! holds the body to a size and a time. No redirect is followed, and nothing is kept: the octets pass as they come.
//!
//! But for the resolver, all of this is without a socket; `gateway/download.rs` has it done.

mod answer;
mod target;

pub use answer::{Counter, Passed, head};
pub(crate) use target::port;
pub use target::{Target, fields};

use http::StatusCode;
use std::time::Duration;

/// What an operator says of downloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Of whom: names, and those that begin with `*.` for any one label below, in lower case. An entry that ends in
    /// `:port` is of that port, any other of 443. Without one there is no download.
    pub hosts: Vec<String>,
    /// Octets of an answer's body.
    pub largest: u64,
    /// For a whole download, from its admission to its last octet.
    pub within: Duration,
    /// For the addresses of a host; and again for a connection to one of them.
    pub connect: Duration,
    /// Between two reads of an answer.
    pub idle: Duration,
    /// Hosts may be at private addresses, in a network of their own.
    pub allow_private: bool,
    /// The roots that the hosts' certificates chain to, as DER.
    pub roots: Vec<Vec<u8>>,
}

/// Why there is no download.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The URL does not begin with `https://`.
    #[error("the URL is not one of HTTPS")]
    NotHttps,
    /// What follows is no URL, or one of those in which others see another host than we do.
    #[error("the URL cannot be asked: {0}")]
    NoUrl(&'static str),
    /// Nobody has said that its host, at this port, is a provider's.
    #[error("the URL's host is not one that downloads are made from")]
    HostNotListed,
    /// The host is, among others perhaps, where strangers must not send us.
    #[error("the URL's host is not at public addresses only")]
    PrivateAddress,
    /// The host has no address, or nobody knows.
    #[error("the URL's host has no address")]
    Unresolved,
    /// The host cannot be reached, or is not who it should be, or its answer breaks off.
    #[error("the URL's server cannot be reached")]
    Unreachable,
    /// The answer has more octets than may pass.
    #[error("the answer is larger than a download may be")]
    TooLarge,
    /// The answer is that it is elsewhere.
    #[error("the URL's server answers with a redirect, which is not followed")]
    Redirected,
    /// The answer is none that can be passed on.
    #[error("the URL's server answers with what cannot be passed on: {0}")]
    BadAnswer(&'static str),
    /// The download has not come to its end in time, or the host not to its addresses.
    #[error("the download takes too long")]
    TooSlow,
}

impl Refused {
    /// The status: 400 for what is no URL, 403 for what is none of the operator's, 504 for what takes too long, 502 for
    /// what is the other server's doing.
    pub fn status(self) -> StatusCode {
        match self {
            Self::NotHttps | Self::NoUrl(_) => StatusCode::BAD_REQUEST,
            Self::HostNotListed => StatusCode::FORBIDDEN,
            Self::PrivateAddress
            | Self::Unresolved
            | Self::Unreachable
            | Self::TooLarge
            | Self::Redirected
            | Self::BadAnswer(_) => StatusCode::BAD_GATEWAY,
            Self::TooSlow => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// The reason in metrics, log and problem types: one of [`REASONS`].
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotHttps => "download-not-https",
            Self::NoUrl(_) => "download-no-url",
            Self::HostNotListed => "download-not-listed",
            Self::PrivateAddress => "download-private-address",
            Self::Unresolved => "download-unresolved",
            Self::Unreachable => "download-unreachable",
            Self::TooLarge => "download-too-large",
            Self::Redirected => "download-redirected",
            Self::BadAnswer(_) => "download-bad-answer",
            Self::TooSlow => "download-too-slow",
        }
    }
}

/// Every reason that [`Refused`] may have, for metrics that exist before the first refusal.
pub const REASONS: &[&str] = &[
    "download-not-https",
    "download-no-url",
    "download-not-listed",
    "download-private-address",
    "download-unresolved",
    "download-unreachable",
    "download-too-large",
    "download-redirected",
    "download-bad-answer",
    "download-too-slow",
];

/// Settings of tests: downloads of at most 1000 octets.
#[cfg(test)]
pub(crate) fn settings(hosts: &[&str]) -> Settings {
    Settings {
        hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
        largest: 1000,
        within: Duration::from_secs(60),
        connect: Duration::from_secs(5),
        idle: Duration::from_secs(10),
        allow_private: false,
        roots: vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_a_status_and_a_reason_of_its_own() {
        let all = [
            (Refused::NotHttps, 400),
            (Refused::NoUrl("x"), 400),
            (Refused::HostNotListed, 403),
            (Refused::PrivateAddress, 502),
            (Refused::Unresolved, 502),
            (Refused::Unreachable, 502),
            (Refused::TooLarge, 502),
            (Refused::Redirected, 502),
            (Refused::BadAnswer("x"), 502),
            (Refused::TooSlow, 504),
        ];
        assert_eq!(all.map(|(refused, _)| refused.reason()), REASONS);
        for (refused, status) in all {
            assert_eq!(refused.status().as_u16(), status, "{refused}");
        }
    }
}
