//! The corpus of the `mimi` dialect: requests by the encoder of `mimi.rs`, with real MLS objects by openmls, and what
//! the page that defines the dialect (`wire.md`) says of each. Nothing here knows the gateway.
#![allow(dead_code, unreachable_pub, missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::BTreeSet;
use std::sync::LazyLock;

use super::encode::{concat, vector};
use super::mimi::{self, Credential, Fanned, QueryElement};
use super::mls;

pub const A: &str = "a.example";
pub const B: &str = "b.example";

/// The endpoints of the page: method, name, and the path up to its parameter.
pub static ENDPOINTS: [(&str, &str, &str); 11] = [
    ("POST", "keyMaterial", "/keyMaterial/"),
    ("POST", "update", "/update/"),
    ("POST", "notify", "/notify/"),
    ("POST", "submitMessage", "/submitMessage/"),
    ("POST", "groupInfo", "/groupInfo/"),
    ("POST", "requestConsent", "/requestConsent/"),
    ("POST", "updateConsent", "/updateConsent/"),
    ("POST", "identifierQuery", "/identifierQuery/"),
    ("POST", "reportAbuse", "/reportAbuse/"),
    ("GET", "proxyDownload", "/proxyDownload/"),
    ("GET", "directory", "/.well-known/mimi-protocol-directory"),
];

/// The head of a request, its path found already.
#[derive(Debug, Clone)]
pub struct Asked {
    pub endpoint: &'static str,
    pub host: String,
    pub from: Option<Vec<u8>>,
    pub parameter: String,
}

/// A asks B.
pub fn asked(endpoint: &'static str, parameter: &str) -> Asked {
    Asked { endpoint, host: B.to_owned(), from: Some(mimi::from(A)), parameter: parameter.to_owned() }
}

/// Who of a group asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Who {
    Leaf(u32),
    Uri(String),
    Key(Vec<u8>),
}

/// What the gateway takes from a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub operation: String,
    pub sender: String,
    pub recipient: String,
    pub ours: BTreeSet<String>,
    pub theirs: BTreeSet<String>,
    pub room: Option<String>,
    pub group_id: Option<Vec<u8>>,
    pub member: Option<Who>,
    pub target: Option<String>,
    pub cost: u32,
    pub decided_at: usize,
}

// ---------------------------------------------------------------------------------------------------------------------
// Real MLS objects
// ---------------------------------------------------------------------------------------------------------------------

/// Messages of one group, with the leaf of their sender where it is a member.
pub struct Material {
    pub group_id: Vec<u8>,
    /// Adds a member, with its welcome.
    pub add: (u32, Vec<u8>, Vec<u8>),
    pub commit: (u32, Vec<u8>),
    pub proposal: (u32, Vec<u8>),
    pub external_commit: Vec<u8>,
    /// Proposals of one who wants to join, and of the hub.
    pub outside: [Vec<u8>; 2],
    pub applications: Vec<Vec<u8>>,
    /// A commit and a proposal in PrivateMessages.
    pub private_handshakes: [Vec<u8>; 2],
    pub group_info: Vec<u8>,
    pub tree: Vec<u8>,
    pub key_package: Vec<u8>,
    pub signature_key: Vec<u8>,
    pub signature: Vec<u8>,
}

impl Material {
    pub fn new(group_id: &[u8]) -> Material {
        use mls::{Client, Options};

        let hub = Client::new("hub");
        let options = Options { external_senders: vec![hub.clone()], ..Options::default() };
        let mut members = mls::group_of("member", 3, group_id, &options);
        let newcomer = Client::new("newcomer");
        let key_package = newcomer.key_package();
        let added = members[1].add(std::slice::from_ref(&key_package));
        mls::deliver(&mut members, 1, &added.commit);
        let commit = members[2].update();
        mls::deliver(&mut members, 2, &commit);
        assert!(members.iter().all(|member| member.id() == group_id && member.epoch() == 3));

        let applications = [1, 100, 17_000].map(|length| members[0].send(&vec![b'x'; length])).to_vec();
        let (group_info, tree) = (members[0].group_info(true), members[0].ratchet_tree());
        let (_, external_commit) = Client::new("resynced").join_by_external_commit(&group_info, None);
        let outside = [
            Client::new("applicant").propose_to_join(group_id, members[0].epoch()),
            hub.propose_removal_from_outside(group_id, members[0].epoch(), 2, 0),
        ];
        let proposal = members[1].propose_update();

        // the same group's ID in a group that keeps its handshakes private
        let mut private = mls::group_of("private", 2, group_id, &Options::private());
        let private_handshakes = [private[1].update(), private[0].propose_update()];

        Material {
            group_id: group_id.to_vec(),
            add: (members[1].own_leaf(), added.commit, added.welcome),
            commit: (members[2].own_leaf(), commit),
            proposal: (members[1].own_leaf(), proposal),
            external_commit,
            outside,
            applications,
            private_handshakes,
            group_info,
            tree,
            key_package: mls::key_package_octets(&key_package),
            signature_key: newcomer.signature_key(),
            signature: newcomer.sign(b"request"),
        }
    }
}

/// Groups with IDs of 1 octet to 300: 64 and more need a length of 2 octets.
pub static MATERIALS: LazyLock<Vec<Material>> = LazyLock::new(|| {
    let made = [1_usize, 16, 63, 64, 300].map(|length| {
        std::thread::spawn(move || {
            let group_id: Vec<u8> = (0..length).map(|place| (place * 7 + length) as u8).collect();
            Material::new(&group_id)
        })
    });
    made.into_iter().map(|thread| thread.join().expect("messages of a group")).collect()
});

// MLSMessages by hand, for what openmls would not send

pub fn message(version: u16, wire_format: u16, rest: &[u8]) -> Vec<u8> {
    concat(&[&version.to_be_bytes(), &wire_format.to_be_bytes(), rest])
}

/// A public proposal in epoch 3, of the sender type; `leaf` for a member, or an external sender's index.
pub fn public_message(group_id: &[u8], sender_type: u8, leaf: Option<u32>) -> Vec<u8> {
    let leaf = leaf.map_or(Vec::new(), |leaf| leaf.to_be_bytes().to_vec());
    let content =
        concat(&[&vector(b"authenticated data"), &[2, 0, 3, 0, 0, 0, 1], &vector(&[7; 64]), &vector(&[9; 32])]);
    message(1, 1, &concat(&[&vector(group_id), &3_u64.to_be_bytes(), &[sender_type], &leaf, &content]))
}

/// A private application message in epoch 3 that can be franked.
pub fn private_message(group_id: &[u8]) -> Vec<u8> {
    let content = concat(&[&[1], &vector(&mimi::frank_aad(&[8; 32])), &vector(&[5; 12]), &vector(&[6; 100])]);
    message(1, 2, &concat(&[&vector(group_id), &3_u64.to_be_bytes(), &content]))
}

// ---------------------------------------------------------------------------------------------------------------------
// Bodies
// ---------------------------------------------------------------------------------------------------------------------

pub type Octets<'a> = &'a dyn AsRef<[u8]>;

pub fn owned(octets: Octets<'_>) -> Vec<u8> {
    octets.as_ref().to_vec()
}

pub fn key_material(requesting: Octets<'_>, target: Octets<'_>, room: Octets<'_>) -> Vec<u8> {
    let request = mimi::KeyMaterialRequest {
        protocol: mimi::MLS10,
        requesting_user: owned(requesting),
        target_user: owned(target),
        room_id: owned(room),
        ciphersuites: vec![mimi::CIPHERSUITE, 2],
        capabilities: mimi::RequiredCapabilities { extensions: vec![6], ..Default::default() },
        signature_key: MATERIALS[1].signature_key.clone(),
        credential: Credential::Basic(owned(requesting)),
        signature: MATERIALS[1].signature.clone(),
    };
    request.encode()
}

pub fn submit(message: &[u8], sending_uri: Octets<'_>) -> Vec<u8> {
    let message = message.to_vec();
    mimi::SubmitMessageRequest { protocol: mimi::MLS10, message, sending_uri: owned(sending_uri) }.encode()
}

pub fn notify(message: &[u8], fanned: Fanned) -> Vec<u8> {
    mimi::FanoutMessage { timestamp: 1_764_000_000_123, message: message.to_vec(), fanned }.encode()
}

pub fn propose(proposal: &[u8], more: &[Vec<u8>]) -> Vec<u8> {
    mimi::HandshakeBundle::Proposal { proposal: proposal.to_vec(), more: more.to_vec() }.encode()
}

pub fn group_info(signature_key: &[u8], credential: Credential) -> Vec<u8> {
    let request = mimi::GroupInfoRequest {
        protocol: mimi::MLS10,
        ciphersuite: mimi::CIPHERSUITE,
        signature_key: signature_key.to_vec(),
        credential,
        group_info_public_key: vec![4; 32],
        joining_code: b"let me in".to_vec(),
        signature: MATERIALS[1].signature.clone(),
    };
    request.encode()
}

pub fn consent(operation: u8, requester: Octets<'_>, target: Octets<'_>, room: Option<Octets<'_>>) -> Vec<u8> {
    let entry = mimi::ConsentEntry {
        operation,
        requester_uri: owned(requester),
        target_uri: owned(target),
        room_id: room.map(owned),
        key_packages: vec![mimi::bare(&MATERIALS[1].key_package)],
        extensions: mimi::AppDataDictionary(vec![(0xf00d, b"extension".to_vec())]),
    };
    entry.encode()
}

pub fn query(elements: Vec<QueryElement>) -> mimi::IdentifierRequest {
    mimi::IdentifierRequest { elements, extensions: mimi::AppDataDictionary::default() }
}

pub fn frank() -> mimi::Frank {
    mimi::Frank { server_frank: [3; 32], ciphersuite: 1, integrity_signature: vec![2; 64] }
}

pub fn report(reporting: Octets<'_>, abuser: Octets<'_>) -> Vec<u8> {
    let report = mimi::AbuseReport {
        reporting_user: owned(reporting),
        alleged_abuser_uri: owned(abuser),
        reason: 0,
        note: b"see for yourself".to_vec(),
        messages: vec![mimi::AbusiveMessage { content: b"abuse".to_vec(), frank: frank(), accepted_timestamp: 1 }],
        extensions: mimi::AppDataDictionary::default(),
    };
    report.encode()
}

// ---------------------------------------------------------------------------------------------------------------------
// The corpus
// ---------------------------------------------------------------------------------------------------------------------

/// Providers, and URIs of users and rooms: Bob and the room are ours, Eve is of neither.
#[derive(Debug, Clone)]
pub struct People {
    pub ours: String,
    pub theirs: String,
    pub alice: String,
    pub bob: String,
    pub eve: String,
    pub room: String,
    pub their_room: String,
}

/// URIs of at least so many octets.
pub fn people(length: usize) -> People {
    let uri = |uri: &str| format!("{uri}{}", "x".repeat(length.saturating_sub(uri.len())));
    People {
        ours: B.to_owned(),
        theirs: A.to_owned(),
        alice: uri("mimi://a.example/u/alice"),
        bob: uri("mimi://b.example/u/bob"),
        eve: uri("mimi://c.example/u/eve"),
        room: uri("mimi://b.example/r/clubhouse"),
        their_room: uri("mimi://a.example/r/tavern"),
    }
}

/// The longest domains there are, and URIs of other forms.
pub fn people_of_long_domains() -> People {
    let [ours, theirs] = ["B", "a"].map(|x| [x.repeat(63), x.repeat(63), x.repeat(63), x.repeat(61)].join("."));
    People {
        alice: format!("im:alice@{theirs}"),
        bob: format!("im:%62ob@{ours}"),
        eve: "IM:eve@xn--mnchen-3ya.example".to_owned(),
        room: format!("mimi+x-1.0://{ours}/r;club=1/h%C3%A0use"),
        their_room: format!("Mimi://{theirs}"),
        ours,
        theirs,
    }
}

#[derive(Debug)]
pub struct Case {
    pub asked: Asked,
    pub body: Vec<u8>,
    pub facts: Facts,
}

/// The octets of a vector of this.
pub fn size(content: Octets<'_>) -> usize {
    vector(content.as_ref()).len()
}

pub fn domain_set(domain: &str) -> BTreeSet<String> {
    BTreeSet::from([domain.to_ascii_lowercase()])
}

/// What the page's table says of requests from them to us.
pub fn cases_of(material: &Material, people: &People) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |parameter: &str, body: Vec<u8>, facts: Facts| {
        let (_, endpoint, _) =
            ENDPOINTS.into_iter().find(|(_, name, _)| *name == facts.operation).expect("an endpoint");
        let from = Some(mimi::from(&people.theirs));
        let asked = Asked { endpoint, host: people.ours.clone(), from, parameter: parameter.to_owned() };
        cases.push(Case { asked, body, facts });
    };
    let People { alice, bob, eve, room, their_room, .. } = people;
    let (ours, theirs) = (domain_set(&people.ours), domain_set(&people.theirs));
    let facts = |operation: &str, decided_at: usize| Facts {
        operation: operation.to_owned(),
        sender: people.theirs.to_ascii_lowercase(),
        recipient: people.ours.to_ascii_lowercase(),
        ours: ours.clone(),
        theirs: BTreeSet::new(),
        room: None,
        group_id: None,
        member: None,
        target: None,
        cost: 1,
        decided_at,
    };
    let in_room =
        |operation: &str, decided_at: usize| Facts { room: Some(room.clone()), ..facts(operation, decided_at) };
    let group_id = || Some(material.group_id.clone());
    let user = |uri: &String| Some(Who::Uri(uri.clone()));

    // a hub asks for its room's users, whoever provides them
    for requesting in [alice, eve] {
        let decided_at = 1 + size(requesting) + size(bob);
        let (member, target) = (user(requesting), Some(bob.clone()));
        let of_none = Facts { member, target, ..facts("keyMaterial", decided_at + 1) };
        let decided_at = decided_at + size(their_room);
        let of_room = Facts { theirs: theirs.clone(), room: Some(their_room.clone()), decided_at, ..of_none.clone() };
        add(bob, key_material(requesting, bob, &""), of_none);
        add(bob, key_material(requesting, bob, their_room), of_room);
    }

    let handshake = |commit: &[u8], welcome: Option<Vec<u8>>, group_info: mimi::GroupInfoOption| {
        let ratchet_tree = mimi::RatchetTreeOption::Full(material.tree.clone());
        mimi::HandshakeBundle::Commit { commit: commit.to_vec(), welcome, group_info, ratchet_tree }.encode()
    };
    let (full, signature) = (mimi::GroupInfoOption::Full(mimi::bare(&material.group_info)), material.signature.clone());
    let partial = mimi::GroupInfoOption::Partial { ratchet_tree_presence: 3, extensions: vec![0; 9], signature };
    let updates = [
        (Some(material.add.0), handshake(&material.add.1, Some(mimi::bare(&material.add.2)), full.clone())),
        (Some(material.commit.0), handshake(&material.commit.1, None, partial)),
        (None, handshake(&material.external_commit, None, full)),
        (Some(material.proposal.0), propose(&material.proposal.1, &material.outside)),
        (None, propose(&material.outside[0], &[])),
        (None, propose(&material.outside[1], &[])),
        (Some(u32::MAX), propose(&public_message(&material.group_id, 1, Some(u32::MAX)), &[])),
    ];
    let until_group_id = 4 + size(&material.group_id);
    let until_sender = |leaf: Option<u32>| until_group_id + 8 + 1 + if leaf.is_some() { 4 } else { 0 };
    for (leaf, body) in updates {
        let member = leaf.map(Who::Leaf);
        add(room, body, Facts { group_id: group_id(), member, ..in_room("update", until_sender(leaf)) });
    }

    let fan_out = |decided_at: usize| {
        let room = Some(their_room.clone());
        Facts { ours: BTreeSet::new(), theirs: theirs.clone(), room, ..facts("notify", 8 + decided_at) }
    };
    let (url, signature) = (b"https://a.example/tree".to_vec(), material.signature.clone());
    let welcome = notify(&material.add.2, Fanned::Welcome(mimi::RatchetTreeOption::HttpsUri { url, signature }));
    let commit = notify(&material.commit.1, Fanned::Commit(vec![]));
    add(their_room, concat(&[&welcome, &commit]), fan_out(4));
    add(their_room, welcome, fan_out(4));
    let stapled = Fanned::Commit(material.outside.to_vec());
    let public = [
        (Some(material.commit.0), commit),
        (None, notify(&material.external_commit, stapled)),
        (Some(material.proposal.0), notify(&material.proposal.1, Fanned::Proposal(material.outside.to_vec()))),
        (None, notify(&material.outside[1], Fanned::Proposal(vec![]))),
    ];
    for (leaf, body) in public {
        let member = leaf.map(Who::Leaf);
        add(their_room, body, Facts { group_id: group_id(), member, ..fan_out(until_sender(leaf)) });
    }
    let by_hand = private_message(&material.group_id);
    for message in material.applications.iter().chain(&material.private_handshakes).chain([&by_hand]) {
        let body = notify(message, Fanned::Application(Some(frank())));
        add(their_room, body, Facts { group_id: group_id(), ..fan_out(until_group_id) });
    }

    for message in material.applications.iter().chain([&by_hand]) {
        let (body, theirs) = (submit(message, alice), theirs.clone());
        let facts = in_room("submitMessage", body.len());
        add(room, body, Facts { theirs, group_id: group_id(), member: user(alice), ..facts });
    }

    let x509 = Credential::X509(vec![vec![0x30; 700], vec![0x30; 90]]);
    for credential in [Credential::Basic(alice.clone().into_bytes()), x509, Credential::Other(0xf00d, vec![1; 64])] {
        for key in [&material.signature_key[..], &[4; 63], &[4; 64], &[4; 16_383], &[4; 16_384]] {
            let facts = in_room("groupInfo", 1 + 2 + size(&key) + credential.encode().len());
            let member = Some(Who::Key(key.to_vec()));
            add(room, group_info(key, credential.clone()), Facts { member, ..facts });
        }
    }

    // the draft's text has a domain in the path, its directory a user
    for (parameter, about) in
        [(&people.ours, None), (bob, Some(room)), (&people.ours, Some(their_room)), (bob, Some(eve))]
    {
        let room_id = about.map(|room| room as Octets<'_>);
        let decided_at = 1 + size(alice) + size(bob) + 1 + about.map_or(0, |room| size(room));
        let (room, member, target) = (about.cloned(), user(alice), Some(bob.clone()));
        let facts = Facts { theirs: theirs.clone(), room, member, target, ..facts("requestConsent", decided_at) };
        for operation in [mimi::CANCEL, mimi::REQUEST] {
            add(parameter, consent(operation, alice, bob, room_id), facts.clone());
        }
        for operation in [mimi::GRANT, mimi::REVOKE] {
            let facts = Facts { operation: "updateConsent".to_owned(), ..facts.clone() };
            add(parameter, consent(operation, bob, alice, room_id), facts);
        }
    }

    let mut queries = vec![vec![QueryElement::new(mimi::PHONE, &[b'1'; 70]); 300]];
    queries.extend((1..=8).map(|kind| vec![QueryElement::named(kind, b"given_name", bob.as_bytes())]));
    queries.push(queries[1..].concat());
    for elements in queries {
        let (cost, request) = (elements.len() as u32, query(elements));
        add(&people.ours, request.encode(), Facts { cost, ..facts("identifierQuery", request.elements().len()) });
    }

    add(room, report(&"", eve), in_room("reportAbuse", 1 + size(eve)));
    for reporting in [alice, eve] {
        let facts = in_room("reportAbuse", size(reporting) + size(eve));
        add(room, report(reporting, eve), Facts { member: user(reporting), ..facts });
    }
    cases
}

pub static CORPUS: LazyLock<Vec<Case>> = LazyLock::new(|| {
    let mut cases: Vec<Case> = MATERIALS.iter().flat_map(|material| cases_of(material, &people(0))).collect();
    for people in [people(63), people(64), people(2048), people_of_long_domains()] {
        cases.extend(cases_of(&MATERIALS[1], &people));
    }
    cases
});

/// The first case of each endpoint that takes a body.
pub fn one_of_each() -> impl Iterator<Item = &'static Case> {
    let of = |name: &str| CORPUS.iter().find(|case| case.asked.endpoint == name).expect("a case");
    ENDPOINTS[..9].iter().map(move |(_, name, _)| of(name))
}
