//! What a Delivery Service does, without HTTP: keeps groups, orders their messages, fans them out to queues, hands out
//! KeyPackages and ratchet trees. Several nodes ([`super::ds::Ds`]) may share one.
//!
//! It reads requests with a reader of its own. Groups that it was told of ([`Delivery::found_group`]) it follows as a real
//! DS would: commits are verified and merged into the public group state, members are known by their credentials, and a
//! message goes to the queue of every member but its sender. Of groups that it was not told of it just keeps the messages,
//! valid MLS or not. An answer is a `DSResponse` of this file's making: version, status, and a vector of octets.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use http::{Method, StatusCode};
use openmls::group::{ProposalStore, PublicGroup};
use openmls::prelude::tls_codec::{Deserialize as _, Serialize as _};
use openmls::prelude::{
    BasicCredential, MlsMessageBodyIn, MlsMessageIn, ProcessedMessageContent, ProtocolMessage, RatchetTreeIn,
};
use openmls_rust_crypto::OpenMlsRustCrypto;
use openmls_traits::OpenMlsProvider as _;

use super::encode;

/// Done; the payload is what was asked for.
pub const OK: u8 = 0;
/// No such group, user or client.
pub const UNKNOWN: u8 = 1;
/// A commit or message that is not of the group's epoch, or not valid.
pub const CONFLICT: u8 = 2;

/// A `DSResponse`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u8,
    pub payload: Vec<u8>,
}

impl Answer {
    pub fn encode(&self) -> Vec<u8> {
        [&encode::MIMI10.to_be_bytes(), &[self.status][..], &encode::vector(&self.payload)].concat()
    }

    /// Reads what [`Answer::encode`] wrote.
    pub fn decode(octets: &[u8]) -> Option<Answer> {
        let mut reader = Reader(octets);
        (reader.u16()? == encode::MIMI10).then_some(())?;
        let answer = Answer { status: reader.u8()?, payload: reader.vector()?.to_vec() };
        reader.0.is_empty().then_some(answer)
    }

    /// The payload as a list of vectors: KeyPackages.
    pub fn list(&self) -> Option<Vec<Vec<u8>>> {
        let mut reader = Reader(&self.payload);
        let mut list = Vec::new();
        while !reader.0.is_empty() {
            list.push(reader.vector()?.to_vec());
        }
        Some(list)
    }

    fn ok(payload: impl Into<Vec<u8>>) -> Answer {
        Answer { status: OK, payload: payload.into() }
    }

    fn unknown() -> Answer {
        Answer { status: UNKNOWN, payload: Vec::new() }
    }

    fn conflict(why: impl ToString) -> Answer {
        Answer { status: CONFLICT, payload: why.to_string().into_bytes() }
    }
}

/// Groups, queues and KeyPackages of a provider.
pub struct Delivery {
    state: Mutex<State>,
    mls: OpenMlsRustCrypto,
    verification_key: Vec<u8>,
}

#[derive(Default)]
struct State {
    groups: HashMap<Vec<u8>, Group>,
    queues: HashMap<Vec<u8>, Vec<Vec<u8>>>,
    key_packages: HashMap<Vec<u8>, Vec<Vec<u8>>>,
}

#[derive(Default)]
struct Group {
    messages: Vec<Vec<u8>>,
    public: Option<PublicGroup>,
    group_info: Option<Vec<u8>>,
}

impl Default for Delivery {
    fn default() -> Self {
        let key = Ed25519KeyPair::generate().unwrap();
        Delivery {
            state: Mutex::default(),
            mls: OpenMlsRustCrypto::default(),
            verification_key: key.public_key().as_ref().to_vec(),
        }
    }
}

impl Delivery {
    pub fn new() -> Delivery {
        Delivery::default()
    }

    /// A local client founds a group (MoH has no endpoint for it). `group_info` is an MLSMessage with the ratchet tree in it.
    pub fn found_group(&self, group_info: &[u8]) {
        let message = MlsMessageIn::tls_deserialize_exact(group_info).unwrap();
        let MlsMessageBodyIn::GroupInfo(info) = message.extract() else { panic!("not a GroupInfo") };
        let tree: RatchetTreeIn =
            info.extensions().ratchet_tree().expect("a GroupInfo with a ratchet tree").ratchet_tree().clone();
        let (public, _) =
            PublicGroup::from_external(self.mls.crypto(), self.mls.storage(), tree, info, ProposalStore::new())
                .unwrap();
        let id = public.group_id().as_slice().to_vec();
        let group = Group { public: Some(public), group_info: Some(group_info.to_vec()), ..Group::default() };
        self.state().groups.insert(id, group);
    }

    /// A member hands in the GroupInfo of the present epoch (an MLSMessage with the ratchet tree in it), for external commits.
    pub fn put_group_info(&self, group_id: &[u8], group_info: &[u8]) {
        self.state().groups.entry(group_id.to_vec()).or_default().group_info = Some(group_info.to_vec());
    }

    /// Publishes a KeyPackage (octets of an MLSMessage) of a user or client. Each is handed out once, the last one again and again.
    pub fn publish(&self, id: &[u8], key_package: Vec<u8>) {
        self.state().key_packages.entry(id.to_vec()).or_default().push(key_package);
    }

    /// Takes what is in a queue.
    pub fn fetch(&self, queue: &[u8]) -> Vec<Vec<u8>> {
        self.state().queues.remove(queue).unwrap_or_default()
    }

    /// The messages (octets of MLSMessages) that a group has got, in order.
    pub fn messages(&self, group_id: &[u8]) -> Vec<Vec<u8>> {
        self.state().groups.get(group_id).map(|group| group.messages.clone()).unwrap_or_default()
    }

    pub fn verification_key(&self) -> &[u8] {
        &self.verification_key
    }

    /// Answers a request.
    pub fn handle(&self, method: &Method, path: &str, body: &[u8]) -> (StatusCode, Vec<u8>) {
        let get = matches!(path, "/welcome_information" | "/external_commit_information" | "/verification_key");
        let answer = match path {
            "/group_operation" | "/welcome_information" | "/external_commit_information" => self.ds_request(body),
            "/verification_key" => self.verification_key_request(body),
            "/connection_request" | "/deliver_message" => self.queueing_request(body),
            "/connection_key_packages" => self.connection_key_packages(body),
            "/group_key_packages" => self.group_key_packages(body),
            _ => return (StatusCode::NOT_FOUND, Vec::new()),
        };
        if *method != if get { Method::GET } else { Method::POST } {
            return (StatusCode::METHOD_NOT_ALLOWED, Vec::new());
        }
        match answer {
            Some(answer) => (StatusCode::OK, answer.encode()),
            None => (StatusCode::BAD_REQUEST, b"the DS cannot read this".to_vec()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn ds_request(&self, body: &[u8]) -> Option<Answer> {
        let mut reader = Reader(body);
        reader.header()?;
        let sender = reader.sender_id()?;
        match reader.u8()? {
            encode::WELCOME_INFO => self.ratchet_tree(reader.vector()?),
            encode::EXTERNAL_COMMIT_INFO | encode::RESYNC_CLIENT => {
                let state = self.state();
                let info = state.groups.get(reader.vector()?).and_then(|group| group.group_info.clone());
                Some(info.map_or_else(Answer::unknown, Answer::ok))
            }
            encode::UPDATE_QUEUE_INFO | encode::UPDATE_CLIENT_FANOUT_INFO => {
                reader.vector()?;
                Some(Answer::ok([]))
            }
            encode::ADD_USERS => self.message(sender, reader.0, true),
            _ => self.message(sender, reader.0, false),
        }
    }

    fn ratchet_tree(&self, group_id: &[u8]) -> Option<Answer> {
        let state = self.state();
        let public = state.groups.get(group_id).and_then(|group| group.public.as_ref());
        Some(match public {
            Some(public) => Answer::ok(public.export_ratchet_tree().tls_serialize_detached().unwrap()),
            None => Answer::unknown(),
        })
    }

    /// A commit (with a Welcome after it, where it adds) or an application message: checked, kept, fanned out.
    fn message(&self, sender: Option<u32>, octets: &[u8], welcomes: bool) -> Option<Answer> {
        let mut after_id = Reader(octets);
        after_id.take(4)?;
        let group_id = after_id.vector()?.to_vec();
        let (message, rest) = split_message(octets);
        let welcome = if welcomes { split_message(rest).0 } else { &[] };

        let mut state = self.state();
        let State { groups, queues, .. } = &mut *state;
        let group = groups.entry(group_id).or_default();
        if let Some(public) = &mut group.public {
            let before = members(public);
            if let Err(why) = self.follow(public, message) {
                return Some(Answer::conflict(why));
            }
            for (leaf, queue) in members(public) {
                let joined = !before.contains(&(leaf, queue.clone()));
                if joined && !welcome.is_empty() {
                    queues.entry(queue).or_default().push(welcome.to_vec());
                } else if !joined && Some(leaf) != sender {
                    queues.entry(queue).or_default().push(message.to_vec());
                }
            }
        }
        group.messages.push(message.to_vec());
        Some(Answer::ok((group.messages.len() as u64).to_be_bytes()))
    }

    /// A message of a group whose public state is known: its epoch must be the group's; a commit is verified and merged.
    fn follow(&self, public: &mut PublicGroup, message: &[u8]) -> Result<(), String> {
        let message = MlsMessageIn::tls_deserialize_exact(message).map_err(|error| error.to_string())?;
        let message: ProtocolMessage = message.try_into_protocol_message().map_err(|error| error.to_string())?;
        if message.epoch() != public.group_context().epoch() {
            return Err(format!("epoch {}, not {}", message.epoch(), public.group_context().epoch()));
        }
        if matches!(message, ProtocolMessage::PrivateMessage(_)) {
            return Ok(());
        }
        let processed = public.process_message(self.mls.crypto(), message).map_err(|error| error.to_string())?;
        match processed.into_content() {
            ProcessedMessageContent::StagedCommitMessage(commit) => {
                public.merge_commit(self.mls.storage(), *commit).map_err(|error| error.to_string())
            }
            ProcessedMessageContent::ProposalMessage(proposal) => {
                public.add_proposal(self.mls.storage(), *proposal).map_err(|error| error.to_string())
            }
            _ => Ok(()),
        }
    }

    fn verification_key_request(&self, body: &[u8]) -> Option<Answer> {
        Reader(body).header()?;
        Some(Answer::ok(self.verification_key.clone()))
    }

    fn queueing_request(&self, body: &[u8]) -> Option<Answer> {
        let mut reader = Reader(body);
        reader.header()?;
        let queue = reader.vector()?.to_vec();
        self.state().queues.entry(queue).or_default().push(reader.0.to_vec());
        Some(Answer::ok([]))
    }

    fn connection_key_packages(&self, body: &[u8]) -> Option<Answer> {
        let mut reader = Reader(body);
        reader.header()?;
        self.key_packages(&[reader.vector()?])
    }

    fn group_key_packages(&self, body: &[u8]) -> Option<Answer> {
        let mut reader = Reader(body);
        reader.header()?;
        reader.vector()?;
        let mut list = Reader(reader.vector()?);
        let mut clients = Vec::new();
        while !list.0.is_empty() {
            clients.push(list.vector()?);
        }
        self.key_packages(&clients)
    }

    fn key_packages(&self, ids: &[&[u8]]) -> Option<Answer> {
        let mut state = self.state();
        let mut payload = Vec::new();
        for &id in ids {
            let Some(published) = state.key_packages.get_mut(id) else { return Some(Answer::unknown()) };
            let key_package = if published.len() > 1 { published.remove(0) } else { published[0].clone() };
            payload.extend(encode::vector(&key_package));
        }
        Some(Answer::ok(payload))
    }
}

/// Leaf and queue of every member; the queue is named as the member's credential names the member.
fn members(public: &PublicGroup) -> Vec<(u32, Vec<u8>)> {
    let queue =
        |credential| BasicCredential::try_from(credential).map(|basic| basic.identity().to_vec()).unwrap_or_default();
    public.members().map(|member| (member.index.u32(), queue(member.credential))).collect()
}

/// The first MLSMessage, and what is after it. Octets that are none are taken whole.
fn split_message(octets: &[u8]) -> (&[u8], &[u8]) {
    let mut rest = octets;
    match MlsMessageIn::tls_deserialize(&mut rest) {
        Ok(_) => octets.split_at(octets.len() - rest.len()),
        Err(_) => (octets, &[]),
    }
}

/// Octets not read yet.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|octets| octets[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|octets| u16::from_be_bytes([octets[0], octets[1]]))
    }

    fn vector(&mut self) -> Option<&'a [u8]> {
        let first = self.u8()?;
        let mut length = usize::from(first & 0x3f);
        for _ in 1..1 << (first >> 6) {
            length = length << 8 | usize::from(self.u8()?);
        }
        self.take(length)
    }

    /// Version, sender, recipient.
    fn header(&mut self) -> Option<(&'a [u8], &'a [u8])> {
        (self.u16()? == encode::MIMI10).then_some(())?;
        Some((self.vector()?, self.vector()?))
    }

    /// The leaf, where it is one.
    fn sender_id(&mut self) -> Option<Option<u32>> {
        match self.u8()? {
            0 => self.take(4).map(|octets| Some(u32::from_be_bytes([octets[0], octets[1], octets[2], octets[3]]))),
            _ => self.vector().map(|_| None),
        }
    }
}
