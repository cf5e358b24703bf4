//! The reader of the `moh` dialect against requests that it has no part in making: real MLS objects by openmls
//! (`support/mls.rs`) in requests by an encoder written from the page that defines the dialect (`support/encode.rs`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

#[path = "support/encode.rs"]
mod encode;
#[path = "support/mls.rs"]
mod mls;

use std::collections::BTreeSet;
use std::sync::LazyLock;

use encode::{SenderId, concat, ds_request, header, header_of, vector, vector_in};
use moh_gateway::dialect::{self, Endpoint, Head, Member, Routes};
use moh_gateway::wire::Error;
use proptest::prelude::*;

const A: &str = "a.example";
const B: &str = "b.example";

const GROUP_OPERATION: &str = "/group_operation";
const WELCOME_INFORMATION: &str = "/welcome_information";
const EXTERNAL_COMMIT_INFORMATION: &str = "/external_commit_information";
const VERIFICATION_KEY: &str = "/verification_key";
const CONNECTION_REQUEST: &str = "/connection_request";
const DELIVER_MESSAGE: &str = "/deliver_message";
const CONNECTION_KEY_PACKAGES: &str = "/connection_key_packages";
const GROUP_KEY_PACKAGES: &str = "/group_key_packages";

/// The eight endpoints of the page, with their methods.
const ENDPOINTS: [(&str, &str); 8] = [
    ("POST", GROUP_OPERATION),
    ("GET", WELCOME_INFORMATION),
    ("GET", EXTERNAL_COMMIT_INFORMATION),
    ("GET", VERIFICATION_KEY),
    ("POST", CONNECTION_REQUEST),
    ("POST", DELIVER_MESSAGE),
    ("POST", CONNECTION_KEY_PACKAGES),
    ("POST", GROUP_KEY_PACKAGES),
];

/// The endpoints whose bodies are DSRequests.
const DS_ENDPOINTS: [&str; 3] = [GROUP_OPERATION, WELCOME_INFORMATION, EXTERNAL_COMMIT_INFORMATION];

/// What an operation's fields begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begins {
    GroupId,
    Commit,
    Application,
}

/// The page's table: request_type, operation, what its fields begin with, endpoint.
const OPERATIONS: [(u8, &str, Begins, &str); 12] = [
    (encode::DELETE_GROUP, "delete_group", Begins::Commit, GROUP_OPERATION),
    (encode::UPDATE_QUEUE_INFO, "update_queue_info", Begins::GroupId, GROUP_OPERATION),
    (encode::WELCOME_INFO, "welcome_info", Begins::GroupId, WELCOME_INFORMATION),
    (encode::EXTERNAL_COMMIT_INFO, "external_commit_info", Begins::GroupId, EXTERNAL_COMMIT_INFORMATION),
    (encode::ADD_USERS, "add_users", Begins::Commit, GROUP_OPERATION),
    (encode::REMOVE_USERS, "remove_users", Begins::Commit, GROUP_OPERATION),
    (encode::ADD_CLIENTS, "add_clients", Begins::Commit, GROUP_OPERATION),
    (encode::REMOVE_CLIENTS, "remove_clients", Begins::Commit, GROUP_OPERATION),
    (encode::UPDATE_CLIENT, "update_client", Begins::Commit, GROUP_OPERATION),
    (encode::RESYNC_CLIENT, "resync_client", Begins::GroupId, EXTERNAL_COMMIT_INFORMATION),
    (encode::UPDATE_CLIENT_FANOUT_INFO, "update_client_fanout_info", Begins::GroupId, GROUP_OPERATION),
    (encode::SEND_MESSAGE, "send_message", Begins::Application, GROUP_OPERATION),
];

// ---------------------------------------------------------------------------------------------------------------------
// The reader, as seen from here
// ---------------------------------------------------------------------------------------------------------------------

/// What the gateway takes from a request.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Facts {
    operation: String,
    sender: String,
    recipient: String,
    group_id: Option<Vec<u8>>,
    member: Option<SenderId>,
    target: Option<Vec<u8>>,
    cost: u32,
    decided_at: usize,
}

/// What the reader says of the octets that have come.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Accepted(Facts),
    Incomplete { need: usize },
    Malformed,
}

/// The endpoint at a path.
fn at(path: &str) -> Option<&'static Endpoint> {
    static ROUTES: LazyLock<Routes> = LazyLock::new(|| Routes::of(&[&dialect::moh::DIALECT]));
    let methods = [http::Method::GET, http::Method::POST];
    methods.iter().find_map(|method| ROUTES.find(method, path).ok()).map(|found| found.route.endpoint)
}

/// The one place that knows the reader's interface. Checks what holds of any answer.
fn read(path: &str, body: &[u8]) -> Outcome {
    let endpoint = at(path).unwrap_or_else(|| panic!("no endpoint at {path}"));
    let facts = match endpoint.read(&Head::default(), body) {
        Ok(envelope) => Facts {
            operation: envelope.operation.name.to_string(),
            sender: envelope.sender.to_string(),
            recipient: envelope.recipient.to_string(),
            group_id: envelope.group_id.map(|group_id| group_id.to_vec()),
            member: envelope.member.map(|member| match member {
                Member::LeafIndex(leaf) => SenderId::Leaf(leaf),
                Member::KeyPackageRef(reference) => SenderId::KeyPackageRef(reference.to_vec()),
                Member::UserKeyHash(hash) => SenderId::UserKeyHash(hash.to_vec()),
                #[allow(unreachable_patterns)]
                _ => panic!("a kind of member that the moh dialect does not have"),
            }),
            target: envelope.target.map(|target| target.octets().to_vec()),
            cost: envelope.cost,
            decided_at: envelope.decided_at,
        },
        Err(error) => {
            let incomplete = error.is_incomplete();
            return match error {
                Error::Incomplete { need, .. } => {
                    assert!(incomplete);
                    assert!(need > body.len(), "{path}: needs {need} octets and has {}", body.len());
                    Outcome::Incomplete { need }
                }
                Error::Malformed { .. } => {
                    assert!(!incomplete);
                    Outcome::Malformed
                }
                #[allow(unreachable_patterns)]
                other => panic!("an error that is neither incomplete nor malformed: {other:?}"),
            };
        }
    };
    assert!(facts.decided_at <= body.len(), "{path}: decided at {} of {} octets", facts.decided_at, body.len());
    assert!(facts.cost >= 1, "{path}: no cost");
    assert_ne!(facts.group_id.as_deref(), Some(&[][..]), "{path}: an empty group ID");
    Outcome::Accepted(facts)
}

/// The reader's answer to what has come only moves forward: incomplete, then accepted or malformed, the same for ever.
fn read_every_prefix(path: &str, body: &[u8]) -> Outcome {
    let last = read(path, body);
    let mut settled: Option<(usize, Outcome)> = None;
    for length in 0..=body.len() {
        // long after the answer, samples do
        if settled.as_ref().is_some_and(|(at, _)| length > at + 40) && length % 61 != 0 && length != body.len() {
            continue;
        }
        let now = read(path, &body[..length]);
        match (&settled, &now) {
            (Some((_, before)), now) => {
                assert_eq!(before, now, "{path}: another answer after {length} octets")
            }
            (None, Outcome::Incomplete { need }) => {
                if let Outcome::Accepted(facts) = &last {
                    let at = facts.decided_at;
                    assert!(*need <= at, "{path}: with {length} octets it needs {need}, but {at} are enough");
                }
            }
            (None, Outcome::Accepted(facts)) => {
                assert_eq!(facts.decided_at, length, "{path}: accepted as soon as it is decided");
                settled = Some((length, now));
            }
            (None, Outcome::Malformed) => settled = Some((length, now)),
        }
    }
    last
}

#[track_caller]
fn assert_accepted(path: &str, body: &[u8], what: &str) -> Facts {
    match read_every_prefix(path, body) {
        Outcome::Accepted(facts) => facts,
        other => panic!("{path}: {what}: {other:?}, should be accepted: {}", hex::encode(body)),
    }
}

/// The body is malformed, whatever follows, and no part of it is accepted.
#[track_caller]
fn assert_malformed(path: &str, body: &[u8], what: &str) {
    for tail in [&[][..], &[0; 80], &[0xff; 80], &[0x20; 80]] {
        let longer = concat(&[body, tail]);
        let outcome = read_every_prefix(path, &longer);
        assert_eq!(outcome, Outcome::Malformed, "{path}: {what}: {}", hex::encode(longer));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Real MLS objects
// ---------------------------------------------------------------------------------------------------------------------

/// Messages of one group, with the leaf of their sender.
struct Material {
    group_id: Vec<u8>,
    /// Adds a member, with its welcome.
    add: (u32, Vec<u8>, Vec<u8>),
    removal: (u32, Vec<u8>),
    updates: Vec<(u32, Vec<u8>)>,
    proposals: Vec<(u32, Vec<u8>)>,
    applications: Vec<(u32, Vec<u8>)>,
    /// A commit and a proposal in PrivateMessages.
    private_handshakes: Vec<(u32, Vec<u8>)>,
    /// Public messages of those who are no members, with what they are.
    from_outside: Vec<(&'static str, Vec<u8>)>,
    group_info: Vec<u8>,
    key_package: Vec<u8>,
    key_package_ref: Vec<u8>,
    user_key_hash: Vec<u8>,
    signature_key: Vec<u8>,
    signature: Vec<u8>,
}

impl Material {
    fn new(group_id: &[u8]) -> Material {
        use mls::{Change, Client, Options, Received};

        let ds = Client::new("ds");
        let options = Options { external_senders: vec![ds.clone()], ..Options::default() };
        let mut members = mls::group_of("member", 6, group_id, &options);
        assert_eq!(members.iter().map(mls::Group::own_leaf).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
        assert!(members.iter().all(|member| member.id() == group_id && member.epoch() == 1));

        let newcomer = Client::new("newcomer");
        let key_package = newcomer.key_package();
        let key_package_ref = mls::key_package_ref(&key_package);
        let added = members[3].add(std::slice::from_ref(&key_package));
        mls::deliver(&mut members, 3, &added.commit);
        members.push(newcomer.join(&added.welcome, None));
        assert_eq!(members[6].own_leaf(), 6);
        let add = (3, added.commit, added.welcome);

        let removal = (2, members[2].remove(&[1]));
        mls::deliver(&mut members, 2, &removal.1);
        assert!(!members[1].is_active());

        let updates = [4, 6, 0].map(|leaf| {
            let commit = members[leaf].update();
            mls::deliver(&mut members, leaf, &commit);
            (members[leaf].own_leaf(), commit)
        });

        let applications = [0, 5, 6].map(|leaf| {
            let text = vec![b'x'; 40 * leaf];
            let message = members[leaf].send(&text);
            assert_eq!(members[2].process(&message), Received::Application(text));
            (members[leaf].own_leaf(), message)
        });

        let proposals = vec![
            (4, members[4].propose_update()),
            (5, members[5].propose_add(&Client::new("proposed").key_package())),
            (6, members[6].propose_remove(5)),
        ];
        for (leaf, proposal) in &proposals {
            mls::deliver(&mut members, *leaf as usize, proposal);
        }
        let outside_proposals = vec![
            ("new_member_proposal", Client::new("applicant").propose_to_join(group_id, members[0].epoch())),
            ("external", ds.propose_removal_from_outside(group_id, members[0].epoch(), 3, 0)),
        ];
        for (_, proposal) in &outside_proposals {
            mls::deliver(&mut members, usize::MAX, proposal);
        }
        let committed = members[0].commit(Change::Proposals);
        members[0].merge();
        mls::deliver(&mut members, 0, &committed.commit);
        assert_eq!(members[4].leaves(), [0, 1, 2, 3, 4, 6]);
        let mut updates = updates.to_vec();
        updates.push((0, committed.commit));

        let group_info = members[4].group_info(true);
        let (joined, external_commit) = Client::new("resynced").join_by_external_commit(&group_info, None);
        mls::deliver(&mut members, usize::MAX, &external_commit);
        assert_eq!(joined.epoch(), members[4].epoch());
        let mut from_outside = vec![("new_member_commit", external_commit)];
        from_outside.extend(outside_proposals);

        // the same group's ID in a group that keeps its handshakes private; its ratchet tree travels by itself
        let options = Options { ratchet_tree_extension: false, ..Options::private() };
        let mut private = mls::group_of("private", 3, group_id, &options);
        let proposal = private[1].propose_update();
        mls::deliver(&mut private, 1, &proposal);
        let commit = private[2].commit(Change::Proposals).commit;
        private[2].merge();
        mls::deliver(&mut private, 2, &commit);

        Material {
            group_id: group_id.to_vec(),
            add,
            removal,
            updates,
            proposals,
            applications: applications.to_vec(),
            private_handshakes: vec![(1, proposal), (2, commit)],
            from_outside,
            group_info,
            key_package: mls::key_package_octets(&key_package),
            key_package_ref,
            user_key_hash: newcomer.sign(b"hash")[..32].to_vec(),
            signature_key: newcomer.signature_key(),
            signature: newcomer.sign(b"request"),
        }
    }

    /// Commits of members for an operation, with what follows them in the request.
    fn commits(&self, request_type: u8) -> Vec<(u32, &[u8], &[u8])> {
        match request_type {
            encode::ADD_USERS | encode::ADD_CLIENTS => vec![(self.add.0, &self.add.1, &self.add.2)],
            encode::DELETE_GROUP | encode::REMOVE_USERS | encode::REMOVE_CLIENTS => {
                vec![(self.removal.0, &self.removal.1, &[])]
            }
            _ => self.updates.iter().map(|(leaf, commit)| (*leaf, &commit[..], &[][..])).collect(),
        }
    }

    /// The three ways to name the one who makes a request.
    fn ids(&self, leaf: u32) -> [SenderId; 3] {
        [
            SenderId::Leaf(leaf),
            SenderId::KeyPackageRef(self.key_package_ref.clone()),
            SenderId::UserKeyHash(self.user_key_hash.clone()),
        ]
    }
}

/// Groups with IDs of 1 octet to 300: 64 and more need a length of 2 octets.
static MATERIALS: LazyLock<Vec<Material>> = LazyLock::new(|| {
    let made = [1_usize, 16, 32, 64, 300].map(|length| {
        std::thread::spawn(move || {
            let group_id: Vec<u8> = (0..length).map(|place| (place * 7 + length) as u8).collect();
            Material::new(&group_id)
        })
    });
    made.into_iter().map(|thread| thread.join().expect("messages of a group")).collect()
});

/// The octets of an MLSMessage up to its group ID's end.
fn until_group_id(group_id: &[u8]) -> usize {
    2 + 2 + vector(group_id).len()
}

/// The octets of a public MLSMessage up to its Sender's end.
fn until_sender(group_id: &[u8], member: bool) -> usize {
    until_group_id(group_id) + 8 + 1 + if member { 4 } else { 0 }
}

// MLSMessages by hand, for what openmls would not send

fn message(version: u16, wire_format: u16, rest: &[u8]) -> Vec<u8> {
    concat(&[&version.to_be_bytes(), &wire_format.to_be_bytes(), rest])
}

/// A public application message in epoch 3, of the sender type; `leaf` for a member, or an external sender's index.
fn public_message(group_id: &[u8], sender_type: u8, leaf: Option<u32>) -> Vec<u8> {
    let leaf = leaf.map_or(Vec::new(), |leaf| leaf.to_be_bytes().to_vec());
    let content =
        concat(&[&vector(b"authenticated data"), &[1], &vector(b"text"), &vector(&[7; 64]), &vector(&[9; 32])]);
    message(1, 1, &concat(&[&vector(group_id), &3_u64.to_be_bytes(), &[sender_type], &leaf, &content]))
}

fn private_message(group_id: &[u8]) -> Vec<u8> {
    let content = concat(&[&[1], &vector(&[]), &vector(&[5; 12]), &vector(&[6; 100])]);
    message(1, 2, &concat(&[&vector(group_id), &3_u64.to_be_bytes(), &content]))
}

// ---------------------------------------------------------------------------------------------------------------------
// The corpus
// ---------------------------------------------------------------------------------------------------------------------

struct Case {
    name: String,
    path: &'static str,
    body: Vec<u8>,
    facts: Facts,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {}: {}", self.name, self.path, hex::encode(&self.body))
    }
}

/// Domains of the corpus: everyday ones, and one that takes a length of 2 octets.
fn domains() -> [(String, String); 2] {
    let long = format!("{}.{}.example", "x".repeat(63), "1-y".repeat(21));
    [(A.to_owned(), B.to_owned()), (long.clone(), long)]
}

/// The octets of a DSRequest before its operation's fields.
fn before_fields(sender: &str, recipient: &str, id: &SenderId) -> usize {
    header(sender, recipient).len() + id.encode().len() + 1
}

static CORPUS: LazyLock<Vec<Case>> = LazyLock::new(|| {
    let mut cases = Vec::new();
    for (number, material) in MATERIALS.iter().enumerate() {
        for (sender, recipient) in domains().iter().take(if number == 1 { 2 } else { 1 }) {
            ds_cases(material, sender, recipient, &mut cases);
            other_cases(material, sender, recipient, &mut cases);
        }
    }
    cases
});

fn ds_cases(material: &Material, sender: &str, recipient: &str, cases: &mut Vec<Case>) {
    let group_id = &material.group_id[..];
    let mut add = |operation: &(u8, &str, Begins, &'static str), id: SenderId, fields: &[u8], decided: usize| {
        let decided_at = before_fields(sender, recipient, &id) + decided;
        cases.push(Case {
            name: format!("{} by {id:?} in a group ID of {}", operation.1, group_id.len()),
            path: operation.3,
            body: ds_request(sender, recipient, &id, operation.0, fields, &material.signature),
            facts: Facts {
                operation: operation.1.to_owned(),
                sender: sender.to_owned(),
                recipient: recipient.to_owned(),
                group_id: Some(group_id.to_vec()),
                member: Some(id),
                target: None,
                cost: 1,
                decided_at,
            },
        });
    };
    for operation in &OPERATIONS {
        match operation.2 {
            Begins::GroupId => {
                let rest = match operation.0 {
                    encode::WELCOME_INFO | encode::EXTERNAL_COMMIT_INFO => vector(&material.signature_key),
                    encode::RESYNC_CLIENT => material.from_outside[0].1.clone(),
                    _ => vector(b"where the queue of a client is"),
                };
                let fields = concat(&[&vector(group_id), &rest]);
                for leaf in [0, 5, 300, u32::MAX] {
                    add(operation, SenderId::Leaf(leaf), &fields, vector(group_id).len());
                }
                for id in material.ids(0).into_iter().skip(1) {
                    add(operation, id, &fields, vector(group_id).len());
                }
            }
            Begins::Commit => {
                for (leaf, commit, rest) in material.commits(operation.0) {
                    let fields = concat(&[commit, rest]);
                    for id in material.ids(leaf) {
                        add(operation, id, &fields, until_sender(group_id, true));
                    }
                }
                // a commit of one who is no member: there is no leaf to agree with
                for (_, outside) in &material.from_outside {
                    for id in material.ids(9) {
                        add(operation, id, outside, until_sender(group_id, false));
                    }
                }
            }
            Begins::Application => {
                for (leaf, message) in &material.applications {
                    for id in material.ids(*leaf) {
                        add(operation, id, message, until_group_id(group_id));
                    }
                }
            }
        }
    }
    // an ID of any length that is not empty
    for length in [1, 63, 64, 20_000] {
        for id in [SenderId::KeyPackageRef(vec![3; length]), SenderId::UserKeyHash(vec![4; length])] {
            let fields = concat(&[&vector(group_id), &vector(b"rest")]);
            add(&OPERATIONS[1], id, &fields, vector(group_id).len());
        }
    }
}

fn other_cases(material: &Material, sender: &str, recipient: &str, cases: &mut Vec<Case>) {
    let group_id = &material.group_id[..];
    let head = header(sender, recipient).len();
    let facts = |operation: &str, decided_at: usize| Facts {
        operation: operation.to_owned(),
        sender: sender.to_owned(),
        recipient: recipient.to_owned(),
        group_id: None,
        member: None,
        target: None,
        cost: 1,
        decided_at,
    };

    cases.push(Case {
        name: "verification_key".to_owned(),
        path: VERIFICATION_KEY,
        body: encode::verification_key_request(sender, recipient),
        facts: facts("verification_key", head),
    });

    for user_id in [&b"u"[..], b"im:bob@b.example", &[8; 64], &[8; 17_000]] {
        cases.push(Case {
            name: format!("connection_key_packages of a user ID of {}", user_id.len()),
            path: CONNECTION_KEY_PACKAGES,
            body: encode::connection_key_package_request(sender, recipient, user_id),
            facts: Facts {
                target: Some(user_id.to_vec()),
                ..facts("connection_key_packages", head + vector(user_id).len())
            },
        });
    }

    for (number, length) in [(1, 1), (2, 20), (5, 64), (70, 32), (600, 32)] {
        let clients: Vec<Vec<u8>> = (0..number).map(|client: usize| vec![client as u8; length]).collect();
        let clients: Vec<&[u8]> = clients.iter().map(|client| &client[..]).collect();
        let body = encode::group_key_package_request(sender, recipient, group_id, &clients);
        let decided_at = body.len();
        cases.push(Case {
            name: format!("group_key_packages of {number} clients in a group ID of {}", group_id.len()),
            path: GROUP_KEY_PACKAGES,
            body,
            facts: Facts {
                group_id: Some(group_id.to_vec()),
                cost: number as u32,
                ..facts("group_key_packages", decided_at)
            },
        });
    }

    // (what, message, whether it names its group, its member, the octets needed of it)
    let (private, public) = (until_group_id(group_id), until_sender(group_id, true));
    type Delivered<'a> = (&'a str, Vec<u8>, bool, Option<u32>, usize);
    let mut messages: Vec<Delivered> = vec![
        ("welcome", material.add.2.clone(), false, None, 4),
        ("add commit", material.add.1.clone(), true, Some(material.add.0), public),
        ("remove commit", material.removal.1.clone(), true, Some(material.removal.0), public),
        ("application by hand", public_message(group_id, 1, Some(70_000)), true, Some(70_000), public),
    ];
    let of_members = [("update commit", &material.updates), ("proposal", &material.proposals)];
    for (what, list) in of_members {
        messages.extend(list.iter().map(|(leaf, message)| (what, message.clone(), true, Some(*leaf), public)));
    }
    for (what, list) in [("application", &material.applications), ("private handshake", &material.private_handshakes)] {
        messages.extend(list.iter().map(|(_, message)| (what, message.clone(), true, None, private)));
    }
    for (what, message) in &material.from_outside {
        messages.push((what, message.clone(), true, None, until_sender(group_id, false)));
    }
    for (operation, path) in [("connection_request", CONNECTION_REQUEST), ("deliver_message", DELIVER_MESSAGE)] {
        for (place, (what, message, names_group, leaf, decided)) in messages.iter().enumerate() {
            let queue = vec![0xab; [20, 1, 63, 64, 200][place % 5]];
            cases.push(Case {
                name: format!("{operation}, {what}, in a group ID of {}", group_id.len()),
                path,
                body: encode::queueing_request(sender, recipient, &queue, message),
                facts: Facts {
                    group_id: names_group.then(|| group_id.to_vec()),
                    member: leaf.map(SenderId::Leaf),
                    target: Some(queue.clone()),
                    ..facts(operation, head + vector(&queue).len() + decided)
                },
            });
        }
    }
}

/// A case of the corpus, for properties.
fn any_case() -> impl Strategy<Value = &'static Case> {
    (0..CORPUS.len()).prop_map(|place| &CORPUS[place])
}

/// Cases of no more than a few kilobytes, where a body is to be read often.
fn small_cases() -> impl Iterator<Item = &'static Case> {
    CORPUS.iter().filter(|case| case.facts.decided_at < 1500)
}

// ---------------------------------------------------------------------------------------------------------------------
// What is accepted
// ---------------------------------------------------------------------------------------------------------------------

/// Clients and groups can move to the tasks of a demo.
#[test]
fn clients_and_groups_are_send() {
    fn send<T: Send>() {}
    send::<mls::Client>();
    send::<mls::Group>();
}

/// The encoder itself, against octets written down by hand and the examples of RFC 9000 §A.1.
#[test]
fn encoder_against_octets_by_hand() {
    let lengths = [(37, "25"), (15_293, "7bbd"), (494_878_333, "9d7f3e7d"), (0, "00"), (63, "3f"), (64, "4040")];
    for (length, octets) in lengths {
        assert_eq!(hex::encode(encode::length_in(1, length)), octets);
    }
    for (length, octets) in [(16_383, "7fff"), (16_384, "80004000"), ((1 << 30) - 1, "bfffffff")] {
        assert_eq!(hex::encode(encode::length_in(1, length)), octets);
    }
    assert_eq!((vector_in(2, b"a"), vector_in(4, b"a")), (b"\x40\x01a".to_vec(), b"\x80\0\0\x01a".to_vec()));

    let request = ds_request("a.b", "c", &SenderId::Leaf(258), encode::SEND_MESSAGE, b"fields", b"sig");
    assert_eq!(request, b"\x00\x01\x03a.b\x01c\x00\x00\x00\x01\x02\x0cfields\x03sig");
    let request = ds_request("a", "b", &SenderId::KeyPackageRef(b"ref".to_vec()), encode::RESYNC_CLIENT, b"", b"");
    assert_eq!(request, b"\x00\x01\x01a\x01b\x01\x03ref\x0a\x00");
    let request = ds_request("a", "b", &SenderId::UserKeyHash(b"hash".to_vec()), encode::DELETE_GROUP, b"", b"");
    assert_eq!(request, b"\x00\x01\x01a\x01b\x02\x04hash\x01\x00");
    let request = encode::group_key_package_request("a", "b", b"group", &[b"one", b"four"]);
    assert_eq!(request, b"\x00\x01\x01a\x01b\x05group\x09\x03one\x04four");
    assert_eq!(encode::queueing_request("a", "b", b"q", b"m"), b"\x00\x01\x01a\x01b\x01qm");
    assert_eq!(encode::connection_key_package_request("a", "b", b"u"), b"\x00\x01\x01a\x01b\x01u");
    assert_eq!(encode::verification_key_request("a", "b"), b"\x00\x01\x01a\x01b");
}

#[test]
fn endpoints_are_those_of_the_page() {
    for (method, path) in ENDPOINTS {
        let endpoint = at(path).expect("an endpoint of the page");
        assert_eq!((endpoint.method.as_str(), endpoint.path), (method, path));
    }
    for path in
        ["", "/", "/group_operation/", "/Group_Operation", "group_operation", "/group_operation?", "/create_group"]
    {
        assert!(at(path).is_none(), "{path:?}");
    }
}

#[test]
fn corpus_covers_the_tables() {
    let reached: BTreeSet<&str> = CORPUS.iter().map(|case| case.path).collect();
    assert_eq!(reached, ENDPOINTS.iter().map(|(_, path)| *path).collect());
    for (_, operation, _, path) in OPERATIONS {
        let of_operation = || CORPUS.iter().filter(|case| case.facts.operation == operation && case.path == path);
        let kinds: BTreeSet<u8> =
            of_operation().filter_map(|case| Some(case.facts.member.as_ref()?.encode()[0])).collect();
        assert_eq!(kinds, BTreeSet::from([0, 1, 2]), "{operation}");
        let groups: BTreeSet<usize> =
            of_operation().filter_map(|case| Some(case.facts.group_id.as_ref()?.len())).collect();
        assert_eq!(groups, BTreeSet::from([1, 16, 32, 64, 300]), "{operation}");
    }
}

#[test]
fn reader_finds_what_was_encoded() {
    for case in CORPUS.iter() {
        assert_eq!(read(case.path, &case.body), Outcome::Accepted(case.facts.clone()), "{}", case.name);
    }
}

#[test]
fn every_prefix_is_incomplete_until_it_is_decided() {
    for case in CORPUS.iter() {
        let decided_at = case.facts.decided_at;
        for length in 0..decided_at {
            // long lists and IDs: all of the beginning and of the end, samples between
            if length > 400 && length + 100 < decided_at && length % 97 != 0 {
                continue;
            }
            match read(case.path, &case.body[..length]) {
                Outcome::Incomplete { need } => {
                    assert!(need > length && need <= decided_at, "{}: {length} octets, needs {need}", case.name);
                }
                other => panic!("{}: {length} octets of {decided_at}: {other:?}", case.name),
            }
        }
    }
}

#[test]
fn every_prefix_is_accepted_once_it_is_decided() {
    for case in CORPUS.iter() {
        let decided_at = case.facts.decided_at;
        for length in decided_at..=case.body.len() {
            if length > decided_at + 40 && length < case.body.len() && length % 31 != 0 {
                continue;
            }
            let outcome = read(case.path, &case.body[..length]);
            assert_eq!(outcome, Outcome::Accepted(case.facts.clone()), "{}: {length} octets", case.name);
        }
    }
}

/// A caller that waits for exactly what the reader asks for gets there, and reads no octet more than it must.
#[test]
fn waiting_for_what_is_needed_leads_to_the_decision() {
    for case in CORPUS.iter() {
        let (mut length, mut reads) = (0, 0);
        while let Outcome::Incomplete { need } = read(case.path, &case.body[..length]) {
            (length, reads) = (need, reads + 1);
        }
        assert_eq!(length, case.facts.decided_at, "{}", case.name);
        assert!(reads < 2000, "{}: {reads} reads", case.name);
    }
}

#[test]
fn domains_that_are_good() {
    let longest =
        [&"a".repeat(63), &"b".repeat(63), &"c".repeat(63), &"d".repeat(61)].map(|label| &label[..]).join(".");
    assert_eq!(longest.len(), 253);
    let label = "l".repeat(63);
    for domain in [
        "a",
        "7",
        "localhost",
        "a.b.c.d.e.f",
        "1.2.3.4",
        "a-b.example",
        "a--b.example",
        "xn--mnchen-3ya.example",
        "0a.9",
        &label,
        &longest,
    ] {
        for (sender, recipient) in [(domain, B), (A, domain), (domain, domain)] {
            let body = encode::verification_key_request(sender, recipient);
            let facts = assert_accepted(VERIFICATION_KEY, &body, domain);
            assert_eq!((&facts.sender[..], &facts.recipient[..]), (sender, recipient));
        }
    }
}

#[test]
fn domains_are_reported_in_lower_case() {
    let body = encode::verification_key_request("A.ExAmPlE", "XN--Q-9.B-B.Example");
    let facts = assert_accepted(VERIFICATION_KEY, &body, "mixed case");
    assert_eq!((&facts.sender[..], &facts.recipient[..]), ("a.example", "xn--q-9.b-b.example"));
    for case in small_cases() {
        // the domains are before all else, the rest stays as it is
        let end = header(&case.facts.sender, &case.facts.recipient).len();
        let head = header(&case.facts.sender.to_ascii_uppercase(), &case.facts.recipient.to_ascii_uppercase());
        let body = concat(&[&head, &case.body[end..]]);
        assert_eq!(read(case.path, &body), Outcome::Accepted(case.facts.clone()), "{}", case.name);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What is malformed
// ---------------------------------------------------------------------------------------------------------------------

const GROUP: &[u8] = b"a group's ID....";
const REFERENCE: &[u8] = &[0x5a; 32];

/// The octets of a DSRequest from its header on, the sender ID and the fields given as they are.
fn ds_octets(head: &[u8], id: &[u8], request_type: u8, fields: &[u8]) -> Vec<u8> {
    concat(&[head, id, &[request_type], fields, &vector(&[1; 64])])
}

fn leaf(index: u32) -> Vec<u8> {
    SenderId::Leaf(index).encode()
}

/// What an operation's fields are, for the group; a commit's sender is leaf 4.
fn fields_of(begins: Begins, group_id: &[u8]) -> Vec<u8> {
    match begins {
        Begins::GroupId => concat(&[&vector(group_id), &vector(&[2; 32])]),
        Begins::Commit => public_message(group_id, 1, Some(4)),
        Begins::Application => private_message(group_id),
    }
}

/// How a vector is encoded.
type Put<'a> = &'a dyn Fn(&[u8]) -> Vec<u8>;

/// A request in which one vector that the reader needs is put as the caller says.
struct Field {
    name: &'static str,
    path: &'static str,
    content: Vec<u8>,
    body: Box<dyn Fn(Put) -> Vec<u8>>,
    may_be_empty: bool,
}

/// Every vector that the reader needs, in every place that it can have.
fn vectors() -> Vec<Field> {
    let mut fields = Vec::new();
    let mut add = |name, path, content: &[u8], body: &'static dyn Fn(&[u8], Put) -> Vec<u8>| {
        let whole = content.to_vec();
        fields.push(Field {
            name,
            path,
            content: content.to_vec(),
            body: Box::new(move |put| body(&whole, put)),
            may_be_empty: false,
        });
    };
    add("sender", VERIFICATION_KEY, A.as_bytes(), &|content, put| {
        concat(&[&[0, 1], &put(content), &vector(B.as_bytes())])
    });
    add("recipient", VERIFICATION_KEY, B.as_bytes(), &|content, put| {
        concat(&[&[0, 1], &vector(A.as_bytes()), &put(content)])
    });
    let long = "d.".repeat(40) + "example";
    add("sender of a long domain", GROUP_OPERATION, long.as_bytes(), &|content, put| {
        let head = concat(&[&[0, 1], &put(content), &vector(B.as_bytes())]);
        ds_octets(&head, &leaf(4), encode::SEND_MESSAGE, &private_message(GROUP))
    });
    add("recipient of a long domain", DELIVER_MESSAGE, long.as_bytes(), &|content, put| {
        let head = concat(&[&[0, 1], &vector(A.as_bytes()), &put(content)]);
        concat(&[&head, &vector(b"queue"), &private_message(GROUP)])
    });
    for reference in [REFERENCE, &[0x5b; 64]] {
        add("key_package_ref", GROUP_OPERATION, reference, &|content, put| {
            let id = concat(&[&[1], &put(content)]);
            ds_octets(&header(A, B), &id, encode::SEND_MESSAGE, &private_message(GROUP))
        });
        add("user_key_hash", WELCOME_INFORMATION, reference, &|content, put| {
            let id = concat(&[&[2], &put(content)]);
            ds_octets(&header(A, B), &id, encode::WELCOME_INFO, &fields_of(Begins::GroupId, GROUP))
        });
    }
    for group_id in [GROUP, b"g", &[0x11; 64], &[0x12; 300]] {
        add("group_id of update_queue_info", GROUP_OPERATION, group_id, &|content, put| {
            let fields = concat(&[&put(content), &vector(b"rest")]);
            ds_octets(&header(A, B), &leaf(4), encode::UPDATE_QUEUE_INFO, &fields)
        });
        add("group_id of welcome_info", WELCOME_INFORMATION, group_id, &|content, put| {
            let fields = concat(&[&put(content), &vector(b"rest")]);
            ds_octets(&header(A, B), &leaf(4), encode::WELCOME_INFO, &fields)
        });
        add("group_id of resync_client", EXTERNAL_COMMIT_INFORMATION, group_id, &|content, put| {
            let fields = concat(&[&put(content), &vector(b"rest")]);
            ds_octets(&header(A, B), &leaf(4), encode::RESYNC_CLIENT, &fields)
        });
        add("group_id of a commit", GROUP_OPERATION, group_id, &|content, put| {
            let rest = concat(&[&put(content), &[0; 8], &[1, 0, 0, 0, 4], &[0; 20]]);
            ds_octets(&header(A, B), &leaf(4), encode::REMOVE_USERS, &message(1, 1, &rest))
        });
        add("group_id of an application message", GROUP_OPERATION, group_id, &|content, put| {
            let rest = concat(&[&put(content), &[0; 8], &[0; 20]]);
            ds_octets(&header(A, B), &leaf(4), encode::SEND_MESSAGE, &message(1, 2, &rest))
        });
        add("group_id of a delivered public message", DELIVER_MESSAGE, group_id, &|content, put| {
            let rest = concat(&[&put(content), &[0; 8], &[1, 0, 0, 0, 4], &[0; 20]]);
            encode::queueing_request(A, B, b"queue", &message(1, 1, &rest))
        });
        add("group_id of a delivered private message", DELIVER_MESSAGE, group_id, &|content, put| {
            encode::queueing_request(A, B, b"queue", &message(1, 2, &concat(&[&put(content), &[0; 28]])))
        });
        add("group_id of group_key_packages", GROUP_KEY_PACKAGES, group_id, &|content, put| {
            concat(&[&header(A, B), &put(content), &vector(&vector(b"client"))])
        });
    }
    for queue in [&[0x21; 20][..], &[0x22; 100]] {
        for path in [CONNECTION_REQUEST, DELIVER_MESSAGE] {
            add("client_queue_information", path, queue, &|content, put| {
                concat(&[&header(A, B), &put(content), &message(1, 3, &[0; 40])])
            });
        }
    }
    let clients = [b"bob1", b"bob2", b"bob3"].map(|client| vector(client)).concat();
    for list in [&clients[..], &vector(&[0x31; 90])] {
        add("client_ids", GROUP_KEY_PACKAGES, list, &|content, put| {
            concat(&[&header(A, B), &vector(GROUP), &put(content)])
        });
    }
    let mut add_that_may_be_empty = |name, path, content: &[u8], body: &'static dyn Fn(&[u8], Put) -> Vec<u8>| {
        let whole = content.to_vec();
        fields.push(Field {
            name,
            path,
            content: content.to_vec(),
            body: Box::new(move |put| body(&whole, put)),
            may_be_empty: true,
        });
    };
    for client in [&b"bob"[..], &[0x41; 64]] {
        add_that_may_be_empty("the first client", GROUP_KEY_PACKAGES, client, &|content, put| {
            concat(&[&header(A, B), &vector(GROUP), &vector(&concat(&[&put(content), &vector(b"other")]))])
        });
        add_that_may_be_empty("the last client", GROUP_KEY_PACKAGES, client, &|content, put| {
            concat(&[&header(A, B), &vector(GROUP), &vector(&concat(&[&vector(b"other"), &put(content)]))])
        });
        add_that_may_be_empty("user_id", CONNECTION_KEY_PACKAGES, client, &|content, put| {
            concat(&[&header(A, B), &put(content)])
        });
    }
    fields
}

#[test]
fn vectors_in_their_shortest_form() {
    for Field { name, path, body, .. } in vectors() {
        assert_accepted(path, &body(&vector), name);
    }
}

#[test]
fn lengths_that_are_not_in_their_shortest_form() {
    for Field { name, path, content, body, .. } in vectors() {
        if content.len() < 64 {
            assert_malformed(path, &body(&|content| vector_in(2, content)), &format!("{name}, a length of 2 octets"));
        }
        assert!(content.len() < 16_384);
        assert_malformed(path, &body(&|content| vector_in(4, content)), &format!("{name}, a length of 4 octets"));
    }
}

#[test]
fn lengths_with_the_reserved_prefix() {
    for Field { name, path, body, .. } in vectors() {
        for first in [0xc0, 0xc9, 0xff] {
            let put = |content: &[u8]| concat(&[&[first, 0, 0, 0, 0, 0, 0, content.len() as u8], content]);
            assert_malformed(path, &body(&put), &format!("{name}, a length that begins with {first:#x}"));
        }
        // in the place of the length's first octet
        let put = |content: &[u8]| {
            let mut octets = vector(content);
            octets[0] |= 0xc0;
            octets
        };
        assert_malformed(path, &body(&put), &format!("{name}, prefix 11"));
    }
}

/// Group IDs, references, hashes, queue information and domains are never empty; a list of clients has one.
#[test]
fn vectors_that_are_empty() {
    for Field { name, path, body, may_be_empty, .. } in vectors() {
        if !may_be_empty {
            assert_malformed(path, &body(&|_| vector(&[])), &format!("{name}, empty"));
            assert_malformed(path, &body(&|_| vector_in(2, &[])), &format!("{name}, empty, a length of 2 octets"));
        }
    }
}

#[test]
fn versions_that_are_unknown() {
    for case in small_cases().step_by(7) {
        for version in [0_u16, 2, 3, 0x0100, 0x0101, 0x0a0a, u16::MAX] {
            let body = concat(&[&version.to_be_bytes(), &case.body[2..]]);
            assert_malformed(case.path, &body, &format!("{}, version {version}", case.name));
        }
    }
}

#[test]
fn domains_that_are_bad() {
    let too_long =
        [&"a".repeat(63), &"b".repeat(63), &"c".repeat(63), &"d".repeat(62)].map(|label| &label[..]).join(".");
    assert_eq!(too_long.len(), 254);
    let label = format!("{}.example", "l".repeat(64));
    let last_label = format!("a.{}", "l".repeat(64));
    let bad: Vec<&[u8]> = vec![
        b"",
        too_long.as_bytes(),
        label.as_bytes(),
        last_label.as_bytes(),
        b"a.example.",
        b".a.example",
        b".",
        b"..",
        b"a..example",
        b"-",
        b"-a.example",
        b"a-.example",
        b"a.-example",
        b"a.example-",
        b"a_b.example",
        b"_mimi.a.example",
        b"a\0.example",
        b"a.example\0",
        b"\0",
        "b\u{fc}cher.example".as_bytes(),
        b"b\xfccher.example",
        b"a.example\xff",
        b"a .example",
        b" a.example",
        b"a.example ",
        b"a.example\n",
        b"a.example:443",
        b"a@example",
        b"*.example",
        b"[::1]",
        b"a/b",
        b"a.ex%61mple",
        "a\u{3002}example".as_bytes(),
    ];
    for domain in bad {
        let what = String::from_utf8_lossy(domain).into_owned();
        for (sender, recipient) in [(domain, B.as_bytes()), (A.as_bytes(), domain)] {
            let head = header_of(1, sender, recipient);
            assert_malformed(VERIFICATION_KEY, &head, &what);
            let body = ds_octets(&head, &leaf(4), encode::SEND_MESSAGE, &private_message(GROUP));
            assert_malformed(GROUP_OPERATION, &body, &what);
            let body = concat(&[&head, &vector(b"queue"), &private_message(GROUP)]);
            assert_malformed(DELIVER_MESSAGE, &body, &what);
        }
    }
}

#[test]
fn sender_types_that_are_unknown() {
    for sender_type in 3..=u8::MAX {
        for id in [vec![sender_type, 0, 0, 0, 4], concat(&[&[sender_type], &vector(REFERENCE)])] {
            let body = ds_octets(&header(A, B), &id, encode::SEND_MESSAGE, &private_message(GROUP));
            assert_malformed(GROUP_OPERATION, &body, &format!("sender type {sender_type}"));
        }
    }
}

#[test]
fn request_types_that_are_unknown() {
    for path in DS_ENDPOINTS {
        for request_type in 13..=u8::MAX {
            for begins in [Begins::GroupId, Begins::Commit, Begins::Application] {
                let body = ds_octets(&header(A, B), &leaf(4), request_type, &fields_of(begins, GROUP));
                assert_malformed(path, &body, &format!("request type {request_type}"));
            }
        }
    }
}

#[test]
fn create_group_has_no_endpoint() {
    for path in DS_ENDPOINTS {
        for id in MATERIALS[1].ids(0) {
            for begins in [Begins::GroupId, Begins::Commit, Begins::Application] {
                let body = ds_octets(&header(A, B), &id.encode(), encode::CREATE_GROUP, &fields_of(begins, GROUP));
                assert_malformed(path, &body, "create_group");
            }
        }
    }
}

#[test]
fn operations_belong_to_their_endpoints() {
    for (request_type, operation, begins, path) in OPERATIONS {
        let body = ds_octets(&header(A, B), &leaf(4), request_type, &fields_of(begins, GROUP));
        let facts = assert_accepted(path, &body, operation);
        assert_eq!(facts.operation, operation);
        for other in DS_ENDPOINTS {
            if other != path {
                assert_malformed(other, &body, operation);
            }
        }
    }
}

/// One member must not spend another's limit.
#[test]
fn leaf_differs_from_the_sender_of_the_commit() {
    for material in MATERIALS.iter() {
        for (request_type, operation, begins, path) in OPERATIONS {
            if begins != Begins::Commit {
                continue;
            }
            for (sender, commit, rest) in material.commits(request_type) {
                for claimed in [sender + 1, sender.wrapping_sub(1), sender + 256, sender << 8 | 0x80, u32::MAX] {
                    if claimed != sender {
                        let id = SenderId::Leaf(claimed);
                        let body = ds_request(A, B, &id, request_type, &concat(&[commit, rest]), &material.signature);
                        assert_malformed(path, &body, &format!("{operation} of leaf {sender} by {claimed}"));
                    }
                }
            }
        }
    }
}

#[test]
fn messages_that_are_not_what_the_operation_takes() {
    for material in MATERIALS.iter() {
        let (application, private) = (&material.applications[0].1, &material.private_handshakes);
        let not_public = [
            ("an application message", application),
            ("a private proposal", &private[0].1),
            ("a private commit", &private[1].1),
            ("a welcome", &material.add.2),
            ("a GroupInfo", &material.group_info),
            ("a key package", &material.key_package),
        ];
        let not_private = [
            ("a commit", &material.removal.1),
            ("a proposal", &material.proposals[0].1),
            ("an external commit", &material.from_outside[0].1),
            ("an external proposal", &material.from_outside[2].1),
            ("a welcome", &material.add.2),
            ("a GroupInfo", &material.group_info),
            ("a key package", &material.key_package),
        ];
        for (request_type, operation, begins, path) in OPERATIONS {
            let wrong = match begins {
                Begins::GroupId => continue,
                Begins::Commit => &not_public[..],
                Begins::Application => &not_private[..],
            };
            for (what, message) in wrong {
                for id in material.ids(0) {
                    let body = ds_request(A, B, &id, request_type, message, &material.signature);
                    assert_malformed(path, &body, &format!("{what} in {operation}"));
                    // a welcome first, the commit after it
                    let body = ds_request(A, B, &id, request_type, &concat(&[message, &material.add.1]), &[]);
                    assert_malformed(path, &body, &format!("{what} before the commit in {operation}"));
                }
            }
        }
        for path in [CONNECTION_REQUEST, DELIVER_MESSAGE] {
            for (what, message) in [("a GroupInfo", &material.group_info), ("a key package", &material.key_package)] {
                assert_malformed(path, &encode::queueing_request(A, B, b"queue", message), what);
            }
        }
    }
}

#[test]
fn wire_formats_and_versions_of_mls_that_are_unknown() {
    // 4 and 5 are known (GroupInfo, KeyPackage) but not taken
    let wire_formats = [0_u16, 4, 5, 6, 7, 0x0100, 0x0101, 0x0a0a, 0xf001, u16::MAX];
    let versions = [0_u16, 2, 0x0100, 0x0101, 0xff01, u16::MAX];
    let public = public_message(GROUP, 1, Some(4));
    let private = private_message(GROUP);
    let welcome = message(1, 3, &[0; 80]);
    let check = |message: &[u8], what: &str| {
        for (request_type, operation, begins, path) in OPERATIONS {
            if begins != Begins::GroupId {
                let body = ds_octets(&header(A, B), &leaf(4), request_type, message);
                assert_malformed(path, &body, &format!("{what} in {operation}"));
            }
        }
        for path in [CONNECTION_REQUEST, DELIVER_MESSAGE] {
            assert_malformed(path, &encode::queueing_request(A, B, b"queue", message), what);
        }
    };
    for whole in [&public, &private, &welcome] {
        for wire_format in wire_formats {
            check(&message(1, wire_format, &whole[4..]), &format!("wire format {wire_format}"));
        }
        for version in versions {
            check(&concat(&[&version.to_be_bytes(), &whole[2..]]), &format!("version {version} of MLS"));
        }
    }
}

#[test]
fn senders_of_mls_that_are_unknown() {
    for sender_type in 0..=u8::MAX {
        let index = matches!(sender_type, 1 | 2).then_some(4);
        let message = public_message(GROUP, sender_type, index);
        let known = matches!(sender_type, 1..=4);
        let what = format!("a Sender of type {sender_type}");
        for id in MATERIALS[1].ids(4) {
            for (request_type, _, begins, path) in OPERATIONS {
                if begins != Begins::Commit {
                    continue;
                }
                let body = ds_request(A, B, &id, request_type, &message, &[1; 64]);
                if known {
                    let facts = assert_accepted(path, &body, &what);
                    assert_eq!(facts.member, Some(id.clone()), "{what}");
                } else {
                    assert_malformed(path, &body, &what);
                }
            }
        }
        for path in [CONNECTION_REQUEST, DELIVER_MESSAGE] {
            let body = encode::queueing_request(A, B, b"queue", &message);
            if known {
                let facts = assert_accepted(path, &body, &what);
                assert_eq!(facts.member, (sender_type == 1).then_some(SenderId::Leaf(4)), "{what}");
            } else {
                assert_malformed(path, &body, &what);
            }
        }
    }
}

#[test]
fn lists_of_clients_that_do_not_end_where_they_say() {
    let head = concat(&[&header(A, B), &vector(GROUP)]);
    let bad: [(&str, Vec<u8>); 8] = [
        ("no clients", vector(&[])),
        ("a client past its list", vector(&[10, 1, 2, 3])),
        ("the second client past its list", vector(&concat(&[&vector(b"bob"), &[4, 1, 2, 3]]))),
        ("a client of one octet past its list", vector(&[1])),
        ("half of a length of 2 octets", vector(&[0x40])),
        ("half of a length of 4 octets", vector(&concat(&[&vector(b"bob"), &[0x80, 0, 1]]))),
        ("a length of 2 octets past its list", vector(&[0x40, 0x50, 1, 2, 3])),
        ("a length of 4 octets past its list", vector(&[0xbf, 0xff, 0xff, 0xff, 1, 2, 3])),
    ];
    for (what, list) in bad {
        assert_malformed(GROUP_KEY_PACKAGES, &concat(&[&head, &list]), what);
    }
    // what follows the list is not counted
    let body = concat(&[&head, &vector(&vector(b"bob")), &vector(b"eve"), &vector(b"eve")]);
    assert_eq!(assert_accepted(GROUP_KEY_PACKAGES, &body, "one client and octets after it").cost, 1);
}

/// A length that promises more than there is: never accepted with what there is.
#[test]
fn bodies_that_end_before_their_fields() {
    for Field { name, path, content, body, .. } in vectors() {
        let whole = body(&vector);
        let Outcome::Accepted(facts) = read(path, &whole) else { panic!("{name}") };
        for length in 0..facts.decided_at {
            assert!(matches!(read(path, &whole[..length]), Outcome::Incomplete { .. }), "{name}: {length}");
        }
        let promising = body(&|content| concat(&[&encode::length_in(4, (1 << 30) - 1), content]));
        assert!(!matches!(read(path, &promising), Outcome::Accepted(_)), "{name} of 1 GiB, {} there", content.len());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Properties
// ---------------------------------------------------------------------------------------------------------------------

fn config(cases: u32) -> ProptestConfig {
    // failures are printed, with the body; nothing is left in the source tree
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Octets that get further into a reader than random ones do: small numbers, lengths, and pieces of requests.
fn likely_octets() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..12),
        prop::collection::vec(0..6_u8, 0..6),
        Just(header(A, B)),
        Just(leaf(4)),
        Just(concat(&[&[1], &vector(REFERENCE)])),
        (0..14_u8).prop_map(|request_type| vec![request_type]),
        Just(vector(GROUP)),
        (1..4_u16, 0..6_u16).prop_map(|(version, wire_format)| message(version, wire_format, &[])),
        (0..6_u8).prop_map(|sender_type| public_message(GROUP, sender_type, Some(4))),
        Just(private_message(GROUP)),
        (0..200_usize).prop_map(|length| encode::length_in(1, length)),
        prop::collection::vec(any::<u8>(), 0..100).prop_map(|content| vector(&content)),
    ];
    prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(config(2000))]

    /// Whatever comes, wherever: no panic, and the answer to a beginning is never taken back.
    #[test]
    fn arbitrary_octets(octets in prop::collection::vec(any::<u8>(), 0..300)) {
        for (_, path) in ENDPOINTS {
            read_every_prefix(path, &octets);
        }
    }

    #[test]
    fn arbitrary_octets_after_a_header(octets in likely_octets()) {
        let body = concat(&[&header(A, B), &octets]);
        for (_, path) in ENDPOINTS {
            read_every_prefix(path, &body);
        }
    }

    #[test]
    fn arbitrary_pieces(octets in likely_octets()) {
        for (_, path) in ENDPOINTS {
            read_every_prefix(path, &octets);
        }
    }

    /// A request of one endpoint at another one.
    #[test]
    fn requests_at_any_endpoint(case in any_case(), place in 0..ENDPOINTS.len()) {
        read(ENDPOINTS[place].1, &case.body);
    }

    /// Octets changed before the decision, most often: no panic, and what is accepted is the beginning's alone.
    #[test]
    fn changed_octets(
        case in any_case(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..5),
    ) {
        let mut body = case.body.clone();
        for (place, value, anywhere) in changes {
            let end = if anywhere { body.len() } else { case.facts.decided_at };
            body[place.index(end)] = value;
        }
        if let Outcome::Accepted(facts) = read(case.path, &body) {
            let beginning = &body[..facts.decided_at];
            prop_assert_eq!(read(case.path, beginning), Outcome::Accepted(facts));
        }
    }

    /// One bit changed in what the decision rests on is seen: other facts, or none.
    #[test]
    fn changed_bits_are_seen(case in any_case(), place in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let mut body = case.body.clone();
        let place = place.index(case.facts.decided_at);
        body[place] ^= 1 << bit;
        if let Outcome::Accepted(facts) = read(case.path, &body) {
            let head = header(&case.facts.sender, &case.facts.recipient).len();
            // but for a letter's case; the epoch, the index that is not asked for, and clients, which are only counted
            let folded = place < head && bit == 5;
            let counted = case.path == GROUP_KEY_PACKAGES;
            let epoch = facts == case.facts && (case.facts.decided_at - 13..case.facts.decided_at).contains(&place);
            prop_assert!(folded || counted || epoch || facts != case.facts, "octet {place} of {}", case.name);
        }
    }

    /// Octets put in or taken out.
    #[test]
    fn moved_octets(
        case in any_case(),
        at in any::<prop::sample::Index>(),
        taken in 0..20_usize,
        put in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let at = at.index(case.facts.decided_at);
        let end = (at + taken).min(case.body.len());
        let body = concat(&[&case.body[..at], &put, &case.body[end..]]);
        if let Outcome::Accepted(facts) = read(case.path, &body) {
            prop_assert_eq!(read(case.path, &body[..facts.decided_at]), Outcome::Accepted(facts));
        }
    }

    /// What follows the decision changes nothing.
    #[test]
    fn octets_after_the_decision(case in any_case(), tail in prop::collection::vec(any::<u8>(), 0..200)) {
        let body = concat(&[&case.body[..case.facts.decided_at], &tail]);
        prop_assert_eq!(read(case.path, &body), Outcome::Accepted(case.facts.clone()));
        let body = concat(&[&case.body, &tail]);
        prop_assert_eq!(read(case.path, &body), Outcome::Accepted(case.facts.clone()));
    }

    /// Letters of domains in any case are the same domain.
    #[test]
    fn domains_in_any_case(case in any_case(), upper in prop::collection::vec(any::<bool>(), 300)) {
        let mut body = case.body.clone();
        let sender = 2..2 + vector(case.facts.sender.as_bytes()).len();
        let recipient = sender.end..sender.end + vector(case.facts.recipient.as_bytes()).len();
        for (end, length) in [(sender.end, case.facts.sender.len()), (recipient.end, case.facts.recipient.len())] {
            for (octet, upper) in body[end - length..end].iter_mut().zip(&upper) {
                if *upper {
                    octet.make_ascii_uppercase();
                }
            }
        }
        prop_assert_eq!(read(case.path, &body), Outcome::Accepted(case.facts.clone()));
    }

    /// Domains built by the rule are accepted; with one octet that no domain has, they are not.
    #[test]
    fn domains_by_the_rule(
        domain in "([a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?\\.){0,9}[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?",
        at in any::<prop::sample::Index>(),
        octet in any::<u8>(),
    ) {
        let Outcome::Accepted(facts) = read(VERIFICATION_KEY, &header(&domain, B)) else {
            return Err(TestCaseError::fail(format!("{domain} is not accepted")));
        };
        prop_assert_eq!(facts.sender, &domain[..]);
        let mut octets = domain.into_bytes();
        let at = at.index(octets.len());
        octets[at] = octet;
        if !octet.is_ascii_alphanumeric() && octet != b'-' && octet != b'.' {
            prop_assert_eq!(read(VERIFICATION_KEY, &header_of(1, &octets, B.as_bytes())), Outcome::Malformed);
            prop_assert_eq!(read(VERIFICATION_KEY, &header_of(1, A.as_bytes(), &octets)), Outcome::Malformed);
        }
    }
}
