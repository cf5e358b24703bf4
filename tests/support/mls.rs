//! Real MLS objects by openmls: clients, their groups, and every message as the octets of an `MLSMessage` (RFC 9420 §6).
//!
//! A [`Client`] is an identity with its keys and storage; a [`Group`] is one client's view of a group. Both are `Send` and
//! can be moved to tasks. Test support: what cannot fail in a correct test panics with the reason.
//!
//! ```ignore
//! let (alice, bob) = (Client::new("alice"), Client::new("bob"));
//! let mut at_alice = alice.create_group(b"group");
//! let added = at_alice.add(&[bob.key_package()]);           // added.commit, added.welcome, merged at alice
//! let mut at_bob = bob.join(&added.welcome, None);          // the welcome holds the ratchet tree
//! let message = at_bob.send(b"hello");                      // a PrivateMessage
//! assert_eq!(at_alice.process(&message), Received::Application(b"hello".to_vec()));
//! ```
#![allow(dead_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

use std::fmt;
use std::sync::Arc;

use openmls::prelude::tls_codec::{Deserialize as _, Serialize as _};
use openmls::prelude::{
    BasicCredential, Ciphersuite, CredentialWithKey, Extension, Extensions, ExternalProposal, ExternalSender, GroupId,
    JoinProposal, KeyPackage, KeyPackageBundle, LeafNodeIndex, LeafNodeParameters, MlsGroup, MlsGroupCreateConfig,
    MlsGroupJoinConfig, MlsMessageBodyIn, MlsMessageIn, MlsMessageOut, PURE_CIPHERTEXT_WIRE_FORMAT_POLICY,
    PURE_PLAINTEXT_WIRE_FORMAT_POLICY, ProcessedMessageContent, ProtocolVersion, RatchetTreeIn, SenderExtensionIndex,
    StagedWelcome, WireFormatPolicy,
};
use openmls_basic_credential::SignatureKeyPair;
use openmls_rust_crypto::OpenMlsRustCrypto;
use openmls_traits::OpenMlsProvider as _;

/// The cipher suite that every MLS implementation must have.
pub const CIPHERSUITE: Ciphersuite = Ciphersuite::MLS_128_DHKEMX25519_AES128GCM_SHA256_Ed25519;

/// How a group frames its messages, and who outside of it may propose.
#[derive(Debug, Clone)]
pub struct Options {
    /// Commits and proposals are PublicMessages (else PrivateMessages). Application messages are always private.
    pub public_handshakes: bool,
    /// Welcomes and GroupInfos hold the ratchet tree (else it has to be passed beside them).
    pub ratchet_tree_extension: bool,
    /// Who may send external proposals (`Group` creation only); the index is the sender's index.
    pub external_senders: Vec<Client>,
}

impl Default for Options {
    fn default() -> Options {
        Options { public_handshakes: true, ratchet_tree_extension: true, external_senders: Vec::new() }
    }
}

impl Options {
    /// Everything in PrivateMessages.
    pub fn private() -> Options {
        Options { public_handshakes: false, ..Options::default() }
    }

    fn policy(&self) -> WireFormatPolicy {
        match self.public_handshakes {
            true => PURE_PLAINTEXT_WIRE_FORMAT_POLICY,
            false => PURE_CIPHERTEXT_WIRE_FORMAT_POLICY,
        }
    }

    fn create_config(&self) -> MlsGroupCreateConfig {
        let mut builder = MlsGroupCreateConfig::builder()
            .ciphersuite(CIPHERSUITE)
            .wire_format_policy(self.policy())
            .use_ratchet_tree_extension(self.ratchet_tree_extension);
        if !self.external_senders.is_empty() {
            let senders = self
                .external_senders
                .iter()
                .map(|client| {
                    ExternalSender::new(
                        client.0.credential.signature_key.clone(),
                        client.0.credential.credential.clone(),
                    )
                })
                .collect();
            builder = builder.with_group_context_extensions(
                Extensions::single(Extension::ExternalSenders(senders)).expect("an extension of group contexts"),
            );
        }
        builder.build()
    }

    fn join_config(&self) -> MlsGroupJoinConfig {
        MlsGroupJoinConfig::builder()
            .wire_format_policy(self.policy())
            .use_ratchet_tree_extension(self.ratchet_tree_extension)
            .build()
    }
}

/// An identity (basic credential) with its signature key and its storage. Clones are the same client.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    name: String,
    provider: OpenMlsRustCrypto,
    signer: SignatureKeyPair,
    credential: CredentialWithKey,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Client").field(&self.0.name).finish()
    }
}

impl Client {
    /// A new client with new keys. The name is its identity in the credential.
    pub fn new(name: &str) -> Client {
        let signer = SignatureKeyPair::new(CIPHERSUITE.signature_algorithm()).expect("a new signature key");
        let credential = CredentialWithKey {
            credential: BasicCredential::new(name.as_bytes().to_vec()).into(),
            signature_key: signer.public().into(),
        };
        Client(Arc::new(Inner { name: name.to_owned(), provider: OpenMlsRustCrypto::default(), signer, credential }))
    }

    /// The name given to [`Client::new`].
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The octets of the public signature key.
    pub fn signature_key(&self) -> Vec<u8> {
        self.0.signer.public().to_vec()
    }

    /// A signature of this client over the octets (Ed25519).
    pub fn sign(&self, octets: &[u8]) -> Vec<u8> {
        openmls_traits::signatures::Signer::sign(&self.0.signer, octets).expect("a signature")
    }

    /// A new key package; its private keys stay in the client's storage.
    pub fn key_package(&self) -> KeyPackage {
        self.key_package_bundle().key_package().clone()
    }

    /// A new key package with its private keys.
    pub fn key_package_bundle(&self) -> KeyPackageBundle {
        KeyPackage::builder()
            .build(CIPHERSUITE, &self.0.provider, &self.0.signer, self.0.credential.clone())
            .expect("a new key package")
    }

    /// A new group in which this client is alone, its handshake messages public, its welcomes with the ratchet tree.
    pub fn create_group(&self, group_id: &[u8]) -> Group {
        self.create_group_with(group_id, &Options::default())
    }

    /// A new group in which this client is alone.
    pub fn create_group_with(&self, group_id: &[u8], options: &Options) -> Group {
        let group = MlsGroup::new_with_group_id(
            &self.0.provider,
            &self.0.signer,
            &options.create_config(),
            GroupId::from_slice(group_id),
            self.0.credential.clone(),
        )
        .expect("a new group");
        Group { client: self.clone(), group }
    }

    /// Joins by a Welcome (octets of an MLSMessage) that was made for a key package of this client. `ratchet_tree` is
    /// needed where the Welcome has none: [`Group::ratchet_tree`] of a member after the commit.
    pub fn join(&self, welcome: &[u8], ratchet_tree: Option<&[u8]>) -> Group {
        self.join_with(welcome, ratchet_tree, &Options::default())
    }

    /// As [`Client::join`]; the options are to be those of the group.
    pub fn join_with(&self, welcome: &[u8], ratchet_tree: Option<&[u8]>, options: &Options) -> Group {
        let MlsMessageBodyIn::Welcome(welcome) = parse(welcome).extract() else { panic!("not a Welcome") };
        let group = StagedWelcome::new_from_welcome(
            &self.0.provider,
            &options.join_config(),
            welcome,
            ratchet_tree.map(parse_tree),
        )
        .expect("a Welcome for this client, and the ratchet tree with it or in it")
        .into_group(&self.0.provider)
        .expect("a group of a staged Welcome");
        Group { client: self.clone(), group }
    }

    /// Joins by an external commit, from a GroupInfo (octets of an MLSMessage, [`Group::group_info`]). The commit (a public
    /// message, sender `new_member_commit`) is for the members to [`Group::process`]; here it is merged.
    pub fn join_by_external_commit(&self, group_info: &[u8], ratchet_tree: Option<&[u8]>) -> (Group, Vec<u8>) {
        let MlsMessageBodyIn::GroupInfo(info) = parse(group_info).extract() else { panic!("not a GroupInfo") };
        let provider = &self.0.provider;
        let mut builder = MlsGroup::external_commit_builder().with_config(Options::default().join_config());
        if let Some(tree) = ratchet_tree {
            builder = builder.with_ratchet_tree(parse_tree(tree));
        }
        let (group, bundle) = builder
            .build_group(provider, info, self.0.credential.clone())
            .expect("a GroupInfo with what an external commit needs")
            .load_psks(provider.storage())
            .expect("no PSKs to load")
            .build(provider.rand(), provider.crypto(), &self.0.signer, |_| true)
            .expect("an external commit")
            .finalize(provider)
            .expect("a merged external commit");
        (Group { client: self.clone(), group }, octets(bundle.commit()))
    }

    /// A proposal of this client to be added to a group that it is not in (sender `new_member_proposal`, public).
    pub fn propose_to_join(&self, group_id: &[u8], epoch: u64) -> Vec<u8> {
        let proposal = JoinProposal::new::<<OpenMlsRustCrypto as openmls_traits::OpenMlsProvider>::StorageProvider>(
            self.key_package(),
            GroupId::from_slice(group_id),
            epoch.into(),
            &self.0.signer,
        );
        octets(&proposal.expect("a join proposal"))
    }

    /// A proposal of this client as an external sender to remove a member (sender `external`, public). `sender_index` is the
    /// client's place in [`Options::external_senders`] of the group.
    pub fn propose_removal_from_outside(
        &self,
        group_id: &[u8],
        epoch: u64,
        removed: u32,
        sender_index: u32,
    ) -> Vec<u8> {
        let proposal = ExternalProposal::new_remove::<OpenMlsRustCrypto>(
            LeafNodeIndex::new(removed),
            GroupId::from_slice(group_id),
            epoch.into(),
            &self.0.signer,
            SenderExtensionIndex::new(sender_index),
        );
        octets(&proposal.expect("an external proposal"))
    }
}

/// What a commit does.
#[derive(Debug, Clone)]
pub enum Change {
    /// Adds members; the commit comes with a Welcome.
    Add(Vec<KeyPackage>),
    /// Removes the members at these leaves.
    Remove(Vec<u32>),
    /// Updates the own leaf.
    Update,
    /// Commits the proposals that were made or processed in this epoch.
    Proposals,
}

/// A commit and what comes with it, each the octets of an MLSMessage.
#[derive(Debug, Clone)]
pub struct Commit {
    pub commit: Vec<u8>,
    /// Where the commit adds members.
    pub welcome: Option<Vec<u8>>,
    /// Of the epoch after the commit, where the group uses the ratchet tree extension.
    pub group_info: Option<Vec<u8>>,
}

/// The messages of [`Group::add`], each the octets of an MLSMessage.
#[derive(Debug, Clone)]
pub struct Added {
    pub commit: Vec<u8>,
    pub welcome: Vec<u8>,
}

/// What [`Group::process`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// An application message.
    Application(Vec<u8>),
    /// A proposal: it is kept for a commit.
    Proposal,
    /// A commit: it is merged.
    Commit,
}

/// A client's view of a group.
#[derive(Debug)]
pub struct Group {
    client: Client,
    group: MlsGroup,
}

impl Group {
    /// Whose view it is.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The group of openmls, for what is not here.
    pub fn inner(&mut self) -> &mut MlsGroup {
        &mut self.group
    }

    pub fn id(&self) -> Vec<u8> {
        self.group.group_id().as_slice().to_vec()
    }

    pub fn epoch(&self) -> u64 {
        self.group.epoch().as_u64()
    }

    pub fn own_leaf(&self) -> u32 {
        self.group.own_leaf_index().u32()
    }

    /// The leaves that have members, in order.
    pub fn leaves(&self) -> Vec<u32> {
        self.group.members().map(|member| member.index.u32()).collect()
    }

    /// False after the client was removed.
    pub fn is_active(&self) -> bool {
        self.group.is_active()
    }

    /// Makes a commit and leaves it pending: until [`Group::merge`] (the DS took it) or [`Group::discard`] (it did not).
    pub fn commit(&mut self, change: Change) -> Commit {
        let Inner { provider, signer, .. } = &*self.client.0;
        let builder = self.group.commit_builder().consume_proposal_store(matches!(change, Change::Proposals));
        let builder = match change {
            Change::Add(key_packages) => builder.propose_adds(key_packages),
            Change::Remove(leaves) => builder.propose_removals(leaves.into_iter().map(LeafNodeIndex::new)),
            Change::Update => builder.force_self_update(true),
            Change::Proposals => builder,
        };
        let (commit, welcome, group_info) = builder
            .load_psks(provider.storage())
            .expect("no PSKs to load")
            .build(provider.rand(), provider.crypto(), signer, |_| true)
            .expect("a commit")
            .stage_commit(provider)
            .expect("a staged commit")
            .into_messages();
        Commit {
            commit: octets(&commit),
            welcome: welcome.as_ref().map(octets),
            group_info: group_info.as_ref().map(octets),
        }
    }

    /// Merges the pending commit.
    pub fn merge(&mut self) {
        self.group.merge_pending_commit(&self.client.0.provider).expect("a pending commit to merge");
    }

    /// Forgets the pending commit.
    pub fn discard(&mut self) {
        self.group.clear_pending_commit(self.client.0.provider.storage()).expect("storage in memory");
    }

    /// Forgets the proposals of this epoch (no application message can be sent while there are some).
    pub fn forget_proposals(&mut self) {
        self.group.clear_pending_proposals(self.client.0.provider.storage()).expect("storage in memory");
    }

    /// Adds members and merges.
    pub fn add(&mut self, key_packages: &[KeyPackage]) -> Added {
        let made = self.commit(Change::Add(key_packages.to_vec()));
        self.merge();
        Added { commit: made.commit, welcome: made.welcome.expect("a Welcome for the added members") }
    }

    /// Removes the members at these leaves and merges; the commit's octets.
    pub fn remove(&mut self, leaves: &[u32]) -> Vec<u8> {
        let made = self.commit(Change::Remove(leaves.to_vec()));
        self.merge();
        made.commit
    }

    /// Updates the own leaf and merges; the commit's octets.
    pub fn update(&mut self) -> Vec<u8> {
        let made = self.commit(Change::Update);
        self.merge();
        made.commit
    }

    /// A proposal to add a member. It stays in the group until the next commit of [`Change::Proposals`].
    pub fn propose_add(&mut self, key_package: &KeyPackage) -> Vec<u8> {
        let Inner { provider, signer, .. } = &*self.client.0;
        octets(&self.group.propose_add_member(provider, signer, key_package).expect("an add proposal").0)
    }

    /// A proposal to remove the member at a leaf.
    pub fn propose_remove(&mut self, leaf: u32) -> Vec<u8> {
        let Inner { provider, signer, .. } = &*self.client.0;
        let proposed = self.group.propose_remove_member(provider, signer, LeafNodeIndex::new(leaf));
        octets(&proposed.expect("a remove proposal").0)
    }

    /// A proposal to update the own leaf.
    pub fn propose_update(&mut self) -> Vec<u8> {
        let Inner { provider, signer, .. } = &*self.client.0;
        let proposed = self.group.propose_self_update(provider, signer, LeafNodeParameters::default());
        octets(&proposed.expect("an update proposal").0)
    }

    /// An application message (a PrivateMessage).
    pub fn send(&mut self, text: &[u8]) -> Vec<u8> {
        let Inner { provider, signer, .. } = &*self.client.0;
        octets(
            &self.group.create_message(provider, signer, text).expect("an application message (no proposals pending)"),
        )
    }

    /// Takes a message of another member (octets of an MLSMessage): keeps proposals, merges commits.
    pub fn process(&mut self, message: &[u8]) -> Received {
        self.try_process(message).expect("a message of this group and epoch that is not one's own")
    }

    /// As [`Group::process`], saying why a message was not accepted.
    pub fn try_process(&mut self, message: &[u8]) -> Result<Received, String> {
        let provider = &self.client.0.provider;
        let message = MlsMessageIn::tls_deserialize_exact(message).map_err(|error| error.to_string())?;
        let message = message.try_into_protocol_message().map_err(|error| error.to_string())?;
        let processed = self.group.process_message(provider, message).map_err(|error| error.to_string())?;
        match processed.into_content() {
            ProcessedMessageContent::ApplicationMessage(message) => Ok(Received::Application(message.into_bytes())),
            ProcessedMessageContent::ProposalMessage(proposal)
            | ProcessedMessageContent::ExternalJoinProposalMessage(proposal) => {
                self.group.store_pending_proposal(provider.storage(), *proposal).map_err(|error| error.to_string())?;
                Ok(Received::Proposal)
            }
            ProcessedMessageContent::StagedCommitMessage(commit) => {
                self.group.merge_staged_commit(provider, *commit).map_err(|error| error.to_string())?;
                Ok(Received::Commit)
            }
            #[allow(unreachable_patterns)]
            _ => Err("a kind of content that this support does not know".to_owned()),
        }
    }

    /// The GroupInfo of this epoch (octets of an MLSMessage), with the ratchet tree in it or without, and with what an
    /// external commit needs.
    pub fn group_info(&self, with_ratchet_tree: bool) -> Vec<u8> {
        let Inner { provider, signer, .. } = &*self.client.0;
        octets(&self.group.export_group_info(provider.crypto(), signer, with_ratchet_tree).expect("a GroupInfo"))
    }

    /// The ratchet tree of this epoch, to be passed beside a Welcome or a GroupInfo (not an MLSMessage).
    pub fn ratchet_tree(&self) -> Vec<u8> {
        self.group.export_ratchet_tree().tls_serialize_detached().expect("a serialized ratchet tree")
    }
}

/// A group of `size` clients, named `name` and their leaf: in the order of the leaves, all in the same epoch.
pub fn group_of(name: &str, size: usize, group_id: &[u8], options: &Options) -> Vec<Group> {
    let mut first = Client::new(&format!("{name}0")).create_group_with(group_id, options);
    let others: Vec<Client> = (1..size).map(|number| Client::new(&format!("{name}{number}"))).collect();
    if others.is_empty() {
        return vec![first];
    }
    let key_packages: Vec<KeyPackage> = others.iter().map(Client::key_package).collect();
    let added = first.add(&key_packages);
    let tree = (!options.ratchet_tree_extension).then(|| first.ratchet_tree());
    let mut groups = vec![first];
    groups.extend(others.iter().map(|client| client.join_with(&added.welcome, tree.as_deref(), options)));
    groups.sort_by_key(Group::own_leaf);
    groups
}

/// Every other of the members processes what the one at `from` has sent (and merged).
pub fn deliver(groups: &mut [Group], from: usize, message: &[u8]) {
    for (place, group) in groups.iter_mut().enumerate() {
        if place != from && group.is_active() {
            group.process(message);
        }
    }
}

/// A key package's reference (RFC 9420 §5.2).
pub fn key_package_ref(key_package: &KeyPackage) -> Vec<u8> {
    let provider = OpenMlsRustCrypto::default();
    key_package.hash_ref(provider.crypto()).expect("a key package reference").as_slice().to_vec()
}

/// A key package as an MLSMessage.
pub fn key_package_octets(key_package: &KeyPackage) -> Vec<u8> {
    octets(&MlsMessageOut::from(key_package.clone()))
}

/// A key package of an MLSMessage, checked.
pub fn key_package_from(message: &[u8]) -> KeyPackage {
    let MlsMessageBodyIn::KeyPackage(key_package) = parse(message).extract() else { panic!("not a KeyPackage") };
    let provider = OpenMlsRustCrypto::default();
    key_package.validate(provider.crypto(), ProtocolVersion::Mls10).expect("a valid key package")
}

fn octets(message: &MlsMessageOut) -> Vec<u8> {
    message.to_bytes().expect("a message that can be serialized")
}

fn parse(message: &[u8]) -> MlsMessageIn {
    MlsMessageIn::tls_deserialize_exact(message).expect("the octets of one MLSMessage")
}

fn parse_tree(octets: &[u8]) -> RatchetTreeIn {
    RatchetTreeIn::tls_deserialize_exact(octets).expect("the octets of a ratchet tree")
}
