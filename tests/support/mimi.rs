//! An encoder of the `mimi` dialect, written from draft-ietf-mimi-protocol-06 alone: bodies, paths, `From` and `Host`.
//!
//! It shares no code with the gateway's reader and uses no codec of others, so that the two can disagree; the vectors are
//! those of [`encode`](super::encode). It checks nothing: what a correct peer would never send (bad URIs, unknown
//! protocols, operations of the other endpoint) can be encoded too. URIs are octets, for they need not be text. What is
//! of MLS comes encoded: an "MLSMessage" with its version and wire format, "bare" without ([`bare`]).
//!
//! Where the draft names a structure of another one, it is as that one has it: `RatchetTreeOption` and `PartialGroupInfo`
//! of draft-mahy-mls-ratchet-tree-options, `AppDataDictionary` and the Safe AAD of draft-ietf-mls-extensions.
#![allow(dead_code, unreachable_pub, clippy::panic, clippy::indexing_slicing)]

use super::encode::{concat, vector};

/// `mls10`, the only `Protocol`.
pub const MLS10: u8 = 1;
/// MLS_128_DHKEMX25519_AES128GCM_SHA256_Ed25519.
pub const CIPHERSUITE: u16 = 1;

/// `ConsentOperation`: a request is taken back.
pub const CANCEL: u8 = 0;
/// `ConsentOperation`: consent is asked for.
pub const REQUEST: u8 = 1;
/// `ConsentOperation`: consent is given.
pub const GRANT: u8 = 2;
/// `ConsentOperation`: consent is taken back, or denied.
pub const REVOKE: u8 = 3;

/// `SearchIdentifierType`: the whole handle.
pub const HANDLE: u8 = 1;
/// `SearchIdentifierType`: the nickname.
pub const NICK: u8 = 2;
/// `SearchIdentifierType`: the mail address.
pub const EMAIL: u8 = 3;
/// `SearchIdentifierType`: the telephone number.
pub const PHONE: u8 = 4;
/// `SearchIdentifierType`: a part of the name.
pub const PARTIAL_NAME: u8 = 5;
/// `SearchIdentifierType`: any field.
pub const WHOLE_PROFILE: u8 = 6;
/// `SearchIdentifierType`: an OpenID Connect claim, whose name goes before the value.
pub const OIDC_STD_CLAIM: u8 = 7;
/// `SearchIdentifierType`: a property of a vCard, whose name goes before the value.
pub const VCARD_FIELD: u8 = 8;

// ---------------------------------------------------------------------------------------------------------------------
// The head of a request
// ---------------------------------------------------------------------------------------------------------------------

/// How a parameter of a path is percent-encoded: each of these decodes to the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// All but unreserved characters (RFC 3986 §2.3), hexadecimal digits in upper case.
    Usual,
    /// Only what cannot stand in a segment of a path (RFC 3986 §3.3): not `:`, `@`, and sub-delims.
    Least,
    /// Every octet, hexadecimal digits in lower case.
    Most,
}

impl Encoding {
    /// The octets, percent-encoded once.
    pub fn of(self, octets: &[u8]) -> String {
        let stays = |octet: u8| match self {
            Encoding::Usual => octet.is_ascii_alphanumeric() || b"-._~".contains(&octet),
            Encoding::Least => octet.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&octet),
            Encoding::Most => false,
        };
        let mut encoded = String::new();
        for octet in octets {
            match self {
                _ if stays(*octet) => encoded.push(char::from(*octet)),
                Encoding::Most => encoded.push_str(&format!("%{octet:02x}")),
                _ => encoded.push_str(&format!("%{octet:02X}")),
            }
        }
        encoded
    }
}

/// The path of an endpoint as the draft has it, "with any necessary percent-encoding" of its parameter.
pub fn path(endpoint: &str, parameter: &[u8]) -> String {
    path_in(Encoding::Usual, endpoint, parameter)
}

/// As [`path`], in a way to percent-encode.
pub fn path_in(encoding: Encoding, endpoint: &str, parameter: &[u8]) -> String {
    format!("/{endpoint}/{}", encoding.of(parameter))
}

/// `From`: the source provider in an `addr-spec` with the fixed local part.
pub fn from(domain: &str) -> Vec<u8> {
    format!("mimi@{domain}").into_bytes()
}

/// `Host`: the target provider, and its port if that is not the standard one.
pub fn host(domain: &str, port: Option<u16>) -> String {
    match port {
        Some(port) => format!("{domain}:{port}"),
        None => domain.to_owned(),
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Parts of bodies
// ---------------------------------------------------------------------------------------------------------------------

/// `optional<T>`: whether it is there, and it.
pub fn optional(value: Option<&[u8]>) -> Vec<u8> {
    match value {
        Some(value) => concat(&[&[1], value]),
        None => vec![0],
    }
}

/// A vector of what is encoded already, one after the other.
pub fn list(items: &[Vec<u8>]) -> Vec<u8> {
    vector(&items.concat())
}

/// A vector of vectors: `opaque<V>` each.
pub fn vectors(items: &[Vec<u8>]) -> Vec<u8> {
    let inside: Vec<u8> = items.iter().flat_map(|item| vector(item)).collect();
    vector(&inside)
}

/// A vector of `uint16`s.
pub fn numbers(values: &[u16]) -> Vec<u8> {
    let inside: Vec<u8> = values.iter().flat_map(|value| value.to_be_bytes()).collect();
    vector(&inside)
}

/// What is in an MLSMessage: without its version and wire format.
pub fn bare(message: &[u8]) -> Vec<u8> {
    message[4..].to_vec()
}

/// What `SignWithLabel` signs (RFC 9420 §5.1.2).
pub fn sign_content(label: &str, content: &[u8]) -> Vec<u8> {
    concat(&[&vector(format!("MLS 1.0 {label}").as_bytes()), &vector(content)])
}

/// The Safe AAD of a message with a `franking_tag`: one item, `frank_aad`.
pub fn frank_aad(franking_tag: &[u8; 32]) -> Vec<u8> {
    vector(&concat(&[&0x0020_u16.to_be_bytes(), &vector(franking_tag)]))
}

/// `Credential` (RFC 9420 §5.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// `basic(1)`: an identity.
    Basic(Vec<u8>),
    /// `x509(2)`: certificates.
    X509(Vec<Vec<u8>>),
    /// Another type, whose content is one vector.
    Other(u16, Vec<u8>),
}

impl Credential {
    /// The octets of the credential, its type first.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Credential::Basic(identity) => concat(&[&1_u16.to_be_bytes(), &vector(identity)]),
            Credential::X509(certificates) => concat(&[&2_u16.to_be_bytes(), &vectors(certificates)]),
            Credential::Other(kind, content) => concat(&[&kind.to_be_bytes(), &vector(content)]),
        }
    }
}

/// `RequiredCapabilities` (RFC 9420 §11.1).
#[derive(Debug, Clone, Default)]
pub struct RequiredCapabilities {
    pub extensions: Vec<u16>,
    pub proposals: Vec<u16>,
    pub credentials: Vec<u16>,
}

impl RequiredCapabilities {
    /// The three lists.
    pub fn encode(&self) -> Vec<u8> {
        concat(&[&numbers(&self.extensions), &numbers(&self.proposals), &numbers(&self.credentials)])
    }
}

/// `AppDataDictionary`: components and their data. The draft extends requests by it.
#[derive(Debug, Clone, Default)]
pub struct AppDataDictionary(pub Vec<(u16, Vec<u8>)>);

impl AppDataDictionary {
    /// The octets of the dictionary.
    pub fn encode(&self) -> Vec<u8> {
        let component = |(id, data): &(u16, Vec<u8>)| concat(&[&id.to_be_bytes(), &vector(data)]);
        list(&self.0.iter().map(component).collect::<Vec<_>>())
    }
}

/// `RatchetTreeOption`.
#[derive(Debug, Clone)]
pub enum RatchetTreeOption {
    /// `full(1)`: the `ratchet_tree` extension's data, its length first.
    Full(Vec<u8>),
    /// `httpsUri(2)`
    HttpsUri { url: Vec<u8>, signature: Vec<u8> },
    /// `outOfBand(3)`
    OutOfBand { signature: Vec<u8> },
    /// `distributionService(4)`
    DistributionService,
}

impl RatchetTreeOption {
    /// The octets of the option, its representation first.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            RatchetTreeOption::Full(tree) => concat(&[&[1], tree]),
            RatchetTreeOption::HttpsUri { url, signature } => concat(&[&[2], &vector(url), &vector(signature)]),
            RatchetTreeOption::OutOfBand { signature } => concat(&[&[3], &vector(signature)]),
            RatchetTreeOption::DistributionService => vec![4],
        }
    }
}

/// `GroupInfoOption`.
#[derive(Debug, Clone)]
pub enum GroupInfoOption {
    /// `full(1)`: a bare GroupInfo.
    Full(Vec<u8>),
    /// `partial(2)`: whether the tree was and is an extension, the other extensions, encoded, and the signature.
    Partial { ratchet_tree_presence: u8, extensions: Vec<u8>, signature: Vec<u8> },
}

impl GroupInfoOption {
    /// The octets of the option, its representation first.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            GroupInfoOption::Full(group_info) => concat(&[&[1], group_info]),
            GroupInfoOption::Partial { ratchet_tree_presence, extensions, signature } => {
                concat(&[&[2, *ratchet_tree_presence], &vector(extensions), &vector(signature)])
            }
        }
    }
}

/// `Frank`.
#[derive(Debug, Clone)]
pub struct Frank {
    pub server_frank: [u8; 32],
    pub ciphersuite: u16,
    pub integrity_signature: Vec<u8>,
}

impl Frank {
    /// The octets of the frank.
    pub fn encode(&self) -> Vec<u8> {
        concat(&[&self.server_frank, &self.ciphersuite.to_be_bytes(), &vector(&self.integrity_signature)])
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Bodies
// ---------------------------------------------------------------------------------------------------------------------

/// `KeyMaterialRequest`, the body of `/keyMaterial/{targetUser}`.
#[derive(Debug, Clone)]
pub struct KeyMaterialRequest {
    pub protocol: u8,
    pub requesting_user: Vec<u8>,
    pub target_user: Vec<u8>,
    /// Empty where the request is not for a room.
    pub room_id: Vec<u8>,
    pub ciphersuites: Vec<u16>,
    pub capabilities: RequiredCapabilities,
    pub signature_key: Vec<u8>,
    pub credential: Credential,
    pub signature: Vec<u8>,
}

impl KeyMaterialRequest {
    /// `KeyMaterialRequestTBS`: all but the signature.
    pub fn to_be_signed(&self) -> Vec<u8> {
        concat(&[
            &[self.protocol],
            &vector(&self.requesting_user),
            &vector(&self.target_user),
            &vector(&self.room_id),
            &numbers(&self.ciphersuites),
            &self.capabilities.encode(),
            &vector(&self.signature_key),
            &self.credential.encode(),
        ])
    }

    /// Signed with the requester's key.
    pub fn signed(mut self, sign: impl Fn(&[u8]) -> Vec<u8>) -> KeyMaterialRequest {
        self.signature = sign(&sign_content("KeyMaterialRequestTBS", &self.to_be_signed()));
        self
    }

    /// The body.
    pub fn encode(&self) -> Vec<u8> {
        concat(&[&self.to_be_signed(), &vector(&self.signature)])
    }
}

/// `HandshakeBundle`, which is the `UpdateRequest`: the body of `/update/{roomId}`.
#[derive(Debug, Clone)]
pub enum HandshakeBundle {
    /// A commit (an MLSMessage), with a bare Welcome where it adds.
    Commit { commit: Vec<u8>, welcome: Option<Vec<u8>>, group_info: GroupInfoOption, ratchet_tree: RatchetTreeOption },
    /// A proposal (an MLSMessage) and more of them.
    Proposal { proposal: Vec<u8>, more: Vec<Vec<u8>> },
}

impl HandshakeBundle {
    /// The body.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            HandshakeBundle::Commit { commit, welcome, group_info, ratchet_tree } => {
                concat(&[commit, &optional(welcome.as_deref()), &group_info.encode(), &ratchet_tree.encode()])
            }
            HandshakeBundle::Proposal { proposal, more } => concat(&[proposal, &list(more)]),
        }
    }
}

/// What follows the message of a `FanoutMessage`.
#[derive(Debug, Clone)]
pub enum Fanned {
    /// An application message, perhaps franked.
    Application(Option<Frank>),
    /// A Welcome: its tree.
    Welcome(RatchetTreeOption),
    /// A proposal: more of them, each an MLSMessage.
    Proposal(Vec<Vec<u8>>),
    /// A commit: proposals of the hub in the place of those that an external one made void, each an MLSMessage.
    Commit(Vec<Vec<u8>>),
}

/// `FanoutMessage`: one or several are the body of `/notify/{roomId}`.
#[derive(Debug, Clone)]
pub struct FanoutMessage {
    /// Milliseconds since 1970.
    pub timestamp: u64,
    /// An MLSMessage.
    pub message: Vec<u8>,
    pub fanned: Fanned,
}

impl FanoutMessage {
    /// The octets of the message.
    pub fn encode(&self) -> Vec<u8> {
        let rest = match &self.fanned {
            Fanned::Application(frank) => optional(frank.as_ref().map(Frank::encode).as_deref()),
            Fanned::Welcome(tree) => tree.encode(),
            Fanned::Proposal(messages) | Fanned::Commit(messages) => list(messages),
        };
        concat(&[&self.timestamp.to_be_bytes(), &self.message, &rest])
    }
}

/// `SubmitMessageRequest`, the body of `/submitMessage/{roomId}`.
#[derive(Debug, Clone)]
pub struct SubmitMessageRequest {
    pub protocol: u8,
    /// An MLSMessage.
    pub message: Vec<u8>,
    pub sending_uri: Vec<u8>,
}

impl SubmitMessageRequest {
    /// The body.
    pub fn encode(&self) -> Vec<u8> {
        concat(&[&[self.protocol], &self.message, &vector(&self.sending_uri)])
    }
}

/// `GroupInfoRequest`, the body of `/groupInfo/{roomId}`.
#[derive(Debug, Clone)]
pub struct GroupInfoRequest {
    pub protocol: u8,
    pub ciphersuite: u16,
    pub signature_key: Vec<u8>,
    pub credential: Credential,
    pub group_info_public_key: Vec<u8>,
    /// Empty where there is none.
    pub joining_code: Vec<u8>,
    pub signature: Vec<u8>,
}

impl GroupInfoRequest {
    fn until_joining_code(&self) -> Vec<u8> {
        concat(&[
            &[self.protocol],
            &self.ciphersuite.to_be_bytes(),
            &vector(&self.signature_key),
            &self.credential.encode(),
            &vector(&self.group_info_public_key),
        ])
    }

    /// Signed with the requester's key. In what is signed, and only there, the joining code is optional.
    pub fn signed(mut self, sign: impl Fn(&[u8]) -> Vec<u8>) -> GroupInfoRequest {
        let code = (!self.joining_code.is_empty()).then(|| vector(&self.joining_code));
        let to_be_signed = concat(&[&self.until_joining_code(), &optional(code.as_deref())]);
        self.signature = sign(&sign_content("GroupInfoRequestTBS", &to_be_signed));
        self
    }

    /// The body.
    pub fn encode(&self) -> Vec<u8> {
        concat(&[&self.until_joining_code(), &vector(&self.joining_code), &vector(&self.signature)])
    }
}

/// `ConsentEntry`, the body of `/requestConsent` and `/updateConsent`.
#[derive(Debug, Clone)]
pub struct ConsentEntry {
    pub operation: u8,
    pub requester_uri: Vec<u8>,
    pub target_uri: Vec<u8>,
    pub room_id: Option<Vec<u8>>,
    /// Bare KeyPackages; only a grant has them.
    pub key_packages: Vec<Vec<u8>>,
    pub extensions: AppDataDictionary,
}

impl ConsentEntry {
    /// The body.
    pub fn encode(&self) -> Vec<u8> {
        let room_id = self.room_id.as_ref().map(|room_id| vector(room_id));
        let key_packages = if self.operation == GRANT { list(&self.key_packages) } else { Vec::new() };
        concat(&[
            &[self.operation],
            &vector(&self.requester_uri),
            &vector(&self.target_uri),
            &optional(room_id.as_deref()),
            &key_packages,
            &self.extensions.encode(),
        ])
    }
}

/// `QueryElement`.
#[derive(Debug, Clone)]
pub struct QueryElement {
    /// `SearchIdentifierType`
    pub kind: u8,
    /// Of the claim or the property; no other kind has one.
    pub name: Vec<u8>,
    pub value: Vec<u8>,
}

impl QueryElement {
    /// An element of a kind without a name.
    pub fn new(kind: u8, value: &[u8]) -> QueryElement {
        QueryElement { kind, name: Vec::new(), value: value.to_vec() }
    }

    /// An element of a claim or a property.
    pub fn named(kind: u8, name: &[u8], value: &[u8]) -> QueryElement {
        QueryElement { kind, name: name.to_vec(), value: value.to_vec() }
    }

    /// The octets of the element.
    pub fn encode(&self) -> Vec<u8> {
        let name = if matches!(self.kind, OIDC_STD_CLAIM | VCARD_FIELD) { vector(&self.name) } else { Vec::new() };
        concat(&[&[self.kind], &name, &vector(&self.value)])
    }
}

/// `IdentifierRequest`, the body of `/identifierQuery/{domain}`.
#[derive(Debug, Clone)]
pub struct IdentifierRequest {
    pub elements: Vec<QueryElement>,
    pub extensions: AppDataDictionary,
}

impl IdentifierRequest {
    /// The list of elements, its length first: what the body begins with.
    pub fn elements(&self) -> Vec<u8> {
        list(&self.elements.iter().map(QueryElement::encode).collect::<Vec<_>>())
    }

    /// The body.
    pub fn encode(&self) -> Vec<u8> {
        concat(&[&self.elements(), &self.extensions.encode()])
    }
}

/// `AbusiveMessage`.
#[derive(Debug, Clone)]
pub struct AbusiveMessage {
    pub content: Vec<u8>,
    pub frank: Frank,
    pub accepted_timestamp: u64,
}

/// `AbuseReport`, the body of `/reportAbuse/{roomId}`.
#[derive(Debug, Clone)]
pub struct AbuseReport {
    /// Empty where the report is anonymous.
    pub reporting_user: Vec<u8>,
    pub alleged_abuser_uri: Vec<u8>,
    /// `AbuseType`, of which none is defined.
    pub reason: u8,
    pub note: Vec<u8>,
    pub messages: Vec<AbusiveMessage>,
    pub extensions: AppDataDictionary,
}

impl AbuseReport {
    /// The body.
    pub fn encode(&self) -> Vec<u8> {
        let message = |message: &AbusiveMessage| {
            concat(&[&vector(&message.content), &message.frank.encode(), &message.accepted_timestamp.to_be_bytes()])
        };
        concat(&[
            &vector(&self.reporting_user),
            &vector(&self.alleged_abuser_uri),
            &[self.reason],
            &vector(&self.note),
            &list(&self.messages.iter().map(message).collect::<Vec<_>>()),
            &self.extensions.encode(),
        ])
    }
}
