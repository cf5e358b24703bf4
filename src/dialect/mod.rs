//! What requests there are and what each of them says: one file a draft.
//!
//! A dialect is data: its [`Endpoint`]s, each with its method, path and reader, and the [`Operation`]s that limits and
//! metrics name. From a body, an endpoint reads an [`Envelope`]: group, sender, recipient, member, target and cost,
//! borrowed from the buffer. The steps behind know envelopes and operations, never a draft.

pub mod moh;

use crate::wire::{self, ProviderName};

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

/// What a reader of an endpoint is.
pub type ReadFn = for<'a> fn(&'a [u8]) -> wire::Result<Envelope<'a>>;

/// A method and a path that are served.
#[derive(Debug)]
pub struct Endpoint {
    /// Its name in configuration, metrics and logs.
    pub name: &'static str,
    /// The only method.
    pub method: http::Method,
    /// The path, exact.
    pub path: &'static str,
    /// What may be asked there.
    pub operations: &'static [&'static Operation],
    /// Octets a body may have at most, where the configuration does not say.
    pub max_body: u64,
    /// Reads a body. None: the gateway answers by itself, and reads no body.
    pub reader: Option<ReadFn>,
}

impl Endpoint {
    /// Reads an envelope from what has come of a body.
    ///
    /// # Errors
    /// [`wire::Error::Incomplete`] where more of the body is needed, [`wire::Error::Malformed`] where none helps.
    #[inline]
    pub fn read<'a>(&self, body: &'a [u8]) -> wire::Result<Envelope<'a>> {
        match self.reader {
            Some(read) => read(body),
            None => Err(wire::Error::Malformed { field: "body", offset: 0, reason: "this endpoint reads none" }),
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
}

impl Member<'_> {
    /// The name of the kind, as `explain` prints it and limit keys tell kinds apart.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::LeafIndex(_) => "leaf_index",
            Self::KeyPackageRef(_) => "key_package_ref",
            Self::UserKeyHash(_) => "user_key_hash",
        }
    }
}

/// What the gateway knows of a request once its reader has decided: everything is borrowed from the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope<'a> {
    /// What is asked.
    pub operation: &'static Operation,
    /// The provider that says it sends this. Not yet bound to the channel.
    pub sender: ProviderName<'a>,
    /// The provider it is meant for. Not yet seen to be ours.
    pub recipient: ProviderName<'a>,
    /// The MLS group.
    pub group_id: Option<&'a [u8]>,
    /// The sending member of the group.
    pub member: Option<Member<'a>>,
    /// The user or client that it is for.
    pub target: Option<&'a [u8]>,
    /// What it costs in a limit's units.
    pub cost: u32,
    /// Octets of the body after which all of this was known.
    pub decided_at: usize,
}

/// Why no endpoint serves a method and path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoRoute {
    /// No endpoint has this path.
    UnknownPath,
    /// An endpoint has it, with this method.
    WrongMethod {
        /// The method it has.
        allow: &'static http::Method,
    },
}

/// Finds the endpoint for a method and a path (no query, no fragment).
///
/// # Errors
/// [`NoRoute`] where there is none.
pub fn route(method: &http::Method, path: &str) -> Result<&'static Endpoint, NoRoute> {
    let endpoint = moh::endpoint_by_path(path).ok_or(NoRoute::UnknownPath)?;
    if endpoint.method == *method { Ok(endpoint) } else { Err(NoRoute::WrongMethod { allow: &endpoint.method }) }
}

/// All endpoints of all dialects.
pub fn endpoints() -> impl Iterator<Item = &'static Endpoint> {
    moh::ENDPOINTS.iter().copied()
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

    #[test]
    fn routes() {
        assert_eq!(route(&http::Method::POST, "/group_operation").unwrap().name, "group_operation");
        assert_eq!(
            route(&http::Method::POST, "/welcome_information").unwrap_err(),
            NoRoute::WrongMethod { allow: &http::Method::GET }
        );
        for path in ["/", "", "/group_operation/", "//group_operation", "/Group_operation", "/group%5foperation"] {
            assert_eq!(route(&http::Method::POST, path).unwrap_err(), NoRoute::UnknownPath, "{path}");
        }
    }
}
