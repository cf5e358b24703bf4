//! What requests there are and what each of them says: one file a draft.
//!
//! A [`Dialect`] is data: its [`Endpoint`]s, each with its method, path and reader, and the [`Operation`]s that limits and
//! metrics name. From a request, an endpoint reads an [`Envelope`]: group, sender, recipient, member, target and cost, and
//! which providers must be ours or the sender's, borrowed from the buffers. The steps behind know envelopes and operations,
//! never a draft.

mod route;

pub use route::{Clash, Found, InvalidTemplate, NoRoute, Paths, Route, Routes, Template};

use crate::wire::{self, ProviderName, Uri};
use std::borrow::Cow;

macro_rules! dialects {
    ($($draft:ident)*) => {
        $(pub mod $draft;)*

        /// All dialects. The first is served where the configuration does not say.
        pub static DIALECTS: &[&Dialect] = &[$(&$draft::DIALECT),*];
    };
}

// Another draft is another file, and its name here.
dialects! {
    moh
    mimi
}

/// A draft.
#[derive(Debug)]
pub struct Dialect {
    /// Its name in configuration.
    pub name: &'static str,
    /// What is served in it.
    pub endpoints: &'static [&'static Endpoint],
    /// Whether it has rooms, which requests name.
    pub rooms: bool,
    /// Whether `From` names the sender. Where it does not, nobody looks at it.
    pub names_sender_in_from: bool,
    /// Whether a sender is nobody without a client certificate: mutual TLS is part of it.
    pub mutual_tls: bool,
}

/// A kind of request within an endpoint: what limits cover and metrics count.
#[derive(Debug, PartialEq, Eq)]
pub struct Operation {
    /// The place of this operation among all of every dialect: below 128.
    pub id: u8,
    /// Its name in configuration, metrics and logs.
    pub name: &'static str,
    /// The name of its endpoint.
    pub endpoint: &'static str,
    /// Whether a request says its group, member and target.
    pub supplies: Supplies,
}

/// Which attributes requests of an operation can name at all: a limit whose key asks for another is a configuration error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Supplies {
    /// Some or all of them name a group.
    pub group: bool,
    /// Some or all of them name a member of the group.
    pub member: bool,
    /// All of them name a target: the user or client they are for.
    pub target: bool,
    /// Some ask for several things at once, and cost as much: more than 1.
    pub many: bool,
}

/// What a reader takes of a request's head.
#[derive(Debug, Clone, Copy, Default)]
pub struct Head<'a> {
    /// The host of `Host` (`:authority`), its port aside.
    pub host: &'a str,
    /// The value of the only `From`; none where there is no such field, or more than one.
    pub from: Option<&'a [u8]>,
    /// The parameter of the path, percent-decoded once; empty where the path has none.
    pub parameter: &'a str,
}

/// What a reader of an endpoint is: of the head, and of what has come of the body.
pub type ReadFn = for<'a> fn(&Head<'a>, &'a [u8]) -> wire::Result<Envelope<'a>>;

/// What is known to an endpoint that the gateway answers by itself.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The authority that was asked, its port included; it is ours.
    pub authority: &'a str,
    /// The domain of the Delivery Service.
    pub ds_domain: &'a str,
    /// What is served there.
    pub routes: &'a Routes,
}

/// An answer of the gateway's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// `Content-Type`.
    pub content_type: &'static str,
    /// The body.
    pub body: Vec<u8>,
}

/// Who answers a request.
#[derive(Debug, Clone, Copy)]
pub enum By {
    /// The Delivery Service: its body is read, decided about and forwarded.
    DeliveryService(ReadFn),
    /// The gateway, from what it knows; it may be kept for an hour. No body is read.
    Gateway(fn(&Facts<'_>) -> Answer),
    /// The server of a URL, which is the path's parameter: the gateway fetches it. No body is read.
    Fetched(ReadFn),
}

/// A method and a path that are served.
#[derive(Debug)]
pub struct Endpoint {
    /// Its name in configuration, metrics and logs.
    pub name: &'static str,
    /// The only method.
    pub method: http::Method,
    /// Its path, where the configuration does not say: exact, or with one `{parameter}` as one of its segments.
    pub path: &'static str,
    /// What may be asked there.
    pub operations: &'static [&'static Operation],
    /// Octets a body may have at most, where the configuration does not say.
    pub max_body: u64,
    /// The only media type of its bodies; none where the draft does not say one, and any will do.
    pub content_type: Option<&'static str>,
    /// Who answers.
    pub by: By,
}

impl Endpoint {
    /// Whether bodies are read, and go to the Delivery Service.
    pub fn takes_body(&self) -> bool {
        matches!(self.by, By::DeliveryService(_))
    }

    /// Reads an envelope from a head and what has come of a body.
    ///
    /// # Errors
    /// [`wire::Error::Incomplete`] where more of the body is needed, [`wire::Error::Malformed`] where none helps.
    #[inline]
    pub fn read<'a>(&self, head: &Head<'a>, body: &'a [u8]) -> wire::Result<Envelope<'a>> {
        match self.by {
            By::DeliveryService(read) | By::Fetched(read) => read(head, body),
            By::Gateway(_) => {
                Err(wire::Error::Malformed { field: "body", offset: 0, reason: "this endpoint reads none" })
            }
        }
    }
}

/// Who, within a group, sends a request: the key of the per-member limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Member<'a> {
    /// A leaf of the group's tree.
    LeafIndex(u32),
    /// The reference of a key package.
    KeyPackageRef(&'a [u8]),
    /// The hash of a user's key.
    UserKeyHash(&'a [u8]),
    /// A user's URI.
    Uri(Uri<'a>),
    /// A client's signature key.
    SignatureKey(&'a [u8]),
}

impl Member<'_> {
    /// The name of the kind, as `explain` prints it and limit keys tell kinds apart.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::LeafIndex(_) => "leaf_index",
            Self::KeyPackageRef(_) => "key_package_ref",
            Self::UserKeyHash(_) => "user_key_hash",
            Self::Uri(_) => "uri",
            Self::SignatureKey(_) => "signature_key",
        }
    }
}

/// Something that a request names: what limits know it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named<'a> {
    /// Octets that mean nothing to the gateway.
    Opaque(&'a [u8]),
    /// A URI, whose scheme and provider are compared without regard to case.
    Uri(Uri<'a>),
}

impl<'a> Named<'a> {
    /// Octets that are the same for the same thing: borrowed, unless a URI holds capital letters where they mean nothing.
    #[inline]
    pub fn octets(&self) -> Cow<'a, [u8]> {
        match self {
            Self::Opaque(octets) => Cow::Borrowed(octets),
            Self::Uri(uri) => uri.normal(),
        }
    }
}

/// Up to two providers.
pub type Providers<'a> = [Option<ProviderName<'a>>; 2];

/// What the gateway knows of a request once its reader has decided: everything is borrowed from its head and body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope<'a> {
    /// What is asked.
    pub operation: &'static Operation,
    /// The provider that says it sends this. Not yet bound to the channel.
    pub sender: ProviderName<'a>,
    /// The provider it is meant for. Not yet seen to be ours.
    pub recipient: ProviderName<'a>,
    /// Providers besides the recipient that must be ours: else the request is not for us.
    pub ours: Providers<'a>,
    /// Providers that must be the sender: else it is not theirs to send.
    pub theirs: Providers<'a>,
    /// The room, where the dialect has rooms.
    pub room: Option<Uri<'a>>,
    /// The MLS group.
    pub group_id: Option<&'a [u8]>,
    /// The sending member of the group.
    pub member: Option<Member<'a>>,
    /// The user or client that it is for.
    pub target: Option<Named<'a>>,
    /// What it costs in a limit's units.
    pub cost: u32,
    /// Octets of the body after which all of this was known.
    pub decided_at: usize,
}

impl<'a> Envelope<'a> {
    /// What limits and nodes know as the group: the room where there is one, for all that is asked of it is then one.
    pub fn group(&self) -> Option<Named<'a>> {
        self.room.map(Named::Uri).or(self.group_id.map(Named::Opaque))
    }
}

/// All endpoints of all dialects.
pub fn endpoints() -> impl Iterator<Item = &'static Endpoint> {
    DIALECTS.iter().flat_map(|dialect| dialect.endpoints.iter().copied())
}

/// The endpoint of a name.
pub fn endpoint(name: &str) -> Option<&'static Endpoint> {
    endpoints().find(|endpoint| endpoint.name == name)
}

/// All operations of all dialects.
pub fn operations() -> impl Iterator<Item = &'static Operation> {
    endpoints().flat_map(|endpoint| endpoint.operations.iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn operations_have_ids_and_names_of_their_own() {
        let all: Vec<_> = operations().collect();
        let ids: HashSet<_> = all.iter().map(|o| o.id).collect();
        let names: HashSet<_> = all.iter().map(|o| o.name).collect();
        assert_eq!(ids.len(), all.len());
        assert_eq!(names.len(), all.len());
        assert!(all.iter().all(|o| o.id < 128));
        for endpoint in endpoints() {
            assert!(endpoint.operations.iter().all(|o| o.endpoint == endpoint.name));
        }
    }
}
