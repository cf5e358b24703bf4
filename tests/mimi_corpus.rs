//! The reader of the `mimi` dialect against requests that it has no part in making: bodies by an encoder written from
//! draft-ietf-mimi-protocol-06 alone (`support/mimi.rs`), with real MLS objects by openmls (`support/mls.rs`), as
//! `support/mimi_cases.rs` puts them together, and paths as the draft and other servers have them. What a reader is to
//! report is what the page that defines the dialect (`wire.md`) says; where that is silent, what the project decided.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

#[path = "support/mimi_cases.rs"]
mod cases;
#[path = "support/encode.rs"]
mod encode;
#[path = "support/mimi.rs"]
mod mimi;
#[path = "support/mls.rs"]
mod mls;

use std::collections::BTreeSet;
use std::sync::LazyLock;

use cases::{
    A, Asked, B, CORPUS, ENDPOINTS, Facts, MATERIALS, People, Who, asked, cases_of, consent, group_info, key_material,
    message, notify, one_of_each, people, private_message, propose, public_message, query, report, size, submit,
};
use encode::{concat, length_in, vector, vector_in};
use mimi::{Credential, Encoding, Fanned, QueryElement};
use moh_gateway::dialect::{self, By, Envelope, Head, Member, Named, NoRoute, Providers, Routes, Template};
use moh_gateway::wire::Error;
use proptest::prelude::*;
use serde_json::{Value, json};

// ---------------------------------------------------------------------------------------------------------------------
// The reader, as seen from here
// ---------------------------------------------------------------------------------------------------------------------

fn names(providers: Providers<'_>) -> BTreeSet<String> {
    providers.iter().flatten().map(|name| name.to_string()).collect()
}

/// A URI with its scheme and provider in lower case.
fn normal(uri: &str) -> Vec<u8> {
    let (scheme, rest) = uri.split_once(':').expect("a scheme");
    let rest = match rest.strip_prefix("//") {
        Some(rest) => {
            let end = rest.find('/').unwrap_or(rest.len());
            format!("//{}{}", rest[..end].to_ascii_lowercase(), &rest[end..])
        }
        None => {
            let (user, domain) = rest.split_once('@').expect("a provider");
            format!("{user}@{}", domain.to_ascii_lowercase())
        }
    };
    unencoded(&format!("{}:{rest}", scheme.to_ascii_lowercase())).into_bytes()
}

/// A URI in which nothing is percent-encoded that need not be, and the rest with capital digits (RFC 3986 §6.2.2).
fn unencoded(uri: &str) -> String {
    let mut parts = uri.split('%');
    let mut normal = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (digits, rest) = part.split_at(2);
        let octet = u8::from_str_radix(digits, 16).expect("two digits");
        match char::from(octet) {
            plain @ ('a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '.' | '_' | '~') => normal.push(plain),
            _ => normal.push_str(&format!("%{}", digits.to_ascii_uppercase())),
        }
        normal.push_str(rest);
    }
    normal
}

impl Facts {
    fn of(envelope: &Envelope<'_>) -> Facts {
        let facts = Facts {
            operation: envelope.operation.name.to_owned(),
            sender: envelope.sender.to_string(),
            recipient: envelope.recipient.to_string(),
            ours: names(envelope.ours),
            theirs: names(envelope.theirs),
            room: envelope.room.map(|room| room.to_string()),
            group_id: envelope.group_id.map(<[u8]>::to_vec),
            member: envelope.member.map(|member| match member {
                Member::LeafIndex(leaf) => Who::Leaf(leaf),
                Member::Uri(uri) => Who::Uri(uri.to_string()),
                Member::SignatureKey(key) => Who::Key(key.to_vec()),
                other => panic!("{} is a kind of member that the mimi dialect does not have", other.kind()),
            }),
            target: envelope.target.map(|target| match target {
                Named::Uri(uri) => uri.to_string(),
                Named::Opaque(octets) => panic!("a target that is no URI: {octets:?}"),
            }),
            cost: envelope.cost,
            decided_at: envelope.decided_at,
        };
        // a group has one name, whichever way its room's URI is written
        let group = facts.room.as_deref().map(normal).or_else(|| facts.group_id.clone());
        assert_eq!(envelope.group().map(|group| group.octets().into_owned()), group);
        facts
    }
}

/// What the reader says of the octets that have come.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Accepted(Box<Facts>),
    Incomplete { need: usize },
    Malformed,
}

/// The one place that knows the reader's interface. Checks what holds of any answer.
fn read(asked: &Asked, body: &[u8]) -> Outcome {
    let endpoint = dialect::endpoint(asked.endpoint).unwrap_or_else(|| panic!("no endpoint {}", asked.endpoint));
    let head = Head { host: &asked.host, from: asked.from.as_deref(), parameter: &asked.parameter };
    match endpoint.read(&head, body) {
        Ok(envelope) => {
            let facts = Facts::of(&envelope);
            assert!(facts.decided_at <= body.len(), "{asked:?}: decided at {} of {}", facts.decided_at, body.len());
            assert!(facts.cost >= 1, "{asked:?}: no cost");
            assert_ne!(facts.group_id.as_deref(), Some(&[][..]), "{asked:?}: an empty group ID");
            Outcome::Accepted(Box::new(facts))
        }
        Err(Error::Incomplete { need, .. }) => {
            assert!(need > body.len(), "{asked:?}: needs {need} octets and has {}", body.len());
            Outcome::Incomplete { need }
        }
        Err(Error::Malformed { .. }) => Outcome::Malformed,
    }
}

/// The reader's answer to what has come only moves forward: incomplete, then accepted or malformed, the same for ever.
fn answers(asked: &Asked, body: &[u8]) -> Outcome {
    let last = read(asked, body);
    let end = match &last {
        Outcome::Accepted(facts) => facts.decided_at,
        _ => body.len(),
    };
    let mut settled: Option<Outcome> = None;
    for length in 0..=body.len() {
        // after the beginning and far from the decision, samples do
        if length > 200 && length.abs_diff(end) > 40 && length % 61 != 0 && length != body.len() {
            continue;
        }
        let now = read(asked, &body[..length]);
        match (&settled, &now) {
            (Some(before), now) => assert_eq!(before, now, "{asked:?}: another answer after {length} octets"),
            (None, Outcome::Incomplete { need }) => {
                if matches!(last, Outcome::Accepted(_)) {
                    assert!(*need <= end, "{asked:?}: with {length} octets it needs {need}, but {end} are enough");
                }
            }
            (None, answer) => {
                if let Outcome::Accepted(facts) = answer {
                    assert_eq!(facts.decided_at, length, "{asked:?}: accepted as soon as it is decided");
                }
                settled = Some(now);
            }
        }
    }
    last
}

#[track_caller]
fn assert_accepted(asked: &Asked, body: &[u8], what: &str) -> Facts {
    match answers(asked, body) {
        Outcome::Accepted(facts) => *facts,
        other => panic!("{asked:?}: {what}: {other:?}, should be accepted: {}", hex::encode(body)),
    }
}

/// The body is malformed, whatever follows, and no part of it is accepted.
#[track_caller]
fn assert_malformed(asked: &Asked, body: &[u8], what: &str) {
    for tail in [&[][..], &[0; 80], &[0xff; 80], &[0x20; 80]] {
        let longer = concat(&[body, tail]);
        assert_eq!(answers(asked, &longer), Outcome::Malformed, "{asked:?}: {what}: {}", hex::encode(longer));
    }
}

/// The head is malformed: no body is waited for, and none helps.
#[track_caller]
fn assert_malformed_head(asked: &Asked, body: &[u8], what: &str) {
    for body in [&[][..], &body[..body.len().min(1)], body] {
        assert_eq!(read(asked, body), Outcome::Malformed, "{what}: {asked:?}");
    }
}

/// What becomes of a request to B that A has authenticated for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Accept,
    Malformed,
    Misdirected,
    SenderMismatch,
}

/// The whole of a request, in the page's order: a host that is not ours before all else.
fn judge(asked: &Asked, body: &[u8]) -> Verdict {
    if !asked.host.eq_ignore_ascii_case(B) {
        return Verdict::Misdirected;
    }
    match read(asked, body) {
        Outcome::Malformed | Outcome::Incomplete { .. } => Verdict::Malformed,
        Outcome::Accepted(facts) if facts.recipient != B || facts.ours.iter().any(|name| name != B) => {
            Verdict::Misdirected
        }
        Outcome::Accepted(facts) if facts.sender != A || facts.theirs.iter().any(|name| *name != facts.sender) => {
            Verdict::SenderMismatch
        }
        Outcome::Accepted(_) => Verdict::Accept,
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What is accepted
// ---------------------------------------------------------------------------------------------------------------------

/// The facts are what was encoded; every shorter prefix is incomplete, every longer one decides the same.
#[test]
fn reader_finds_what_was_encoded() {
    for case in CORPUS.iter() {
        assert_eq!(assert_accepted(&case.asked, &case.body, "the corpus"), case.facts);
    }
    assert_eq!(one_of_each().count(), 9);
}

/// A caller that waits for exactly what the reader asks for gets there, and reads no octet more than it must.
#[test]
fn waiting_for_what_is_needed_leads_to_the_decision() {
    for case in CORPUS.iter() {
        let (mut length, mut reads) = (0, 0);
        while let Outcome::Incomplete { need } = read(&case.asked, &case.body[..length]) {
            (length, reads) = (need, reads + 1);
        }
        assert_eq!(length, case.facts.decided_at, "{:?}", case.asked);
        assert!(reads < 40, "{:?}: {reads} reads", case.asked);
    }
}

#[test]
fn a_file_is_asked_for_with_a_head_alone() {
    let Outcome::Accepted(facts) = read(&asked("proxyDownload", "https://assets.example/f"), &[]) else { panic!() };
    assert_eq!((&facts.operation[..], &facts.sender[..], facts.decided_at), ("proxyDownload", A, 0));
    assert!(facts.ours.is_empty() && facts.theirs.is_empty() && facts.member.is_none() && facts.target.is_none());
}

// ---------------------------------------------------------------------------------------------------------------------
// The head
// ---------------------------------------------------------------------------------------------------------------------

/// Between the bars: what is no address of a provider.
const BAD_FROM: &str = "|mimi|mimi@|@a.example|a.example|MIMI@a.example|Mimi@a.example|alice@a.example|mimi.x@a.example\
    |<mimi@a.example>|Mimi <mimi@a.example>|\"mimi\"@a.example|mimi@[192.0.2.1]|mimi@a.example, mimi@c.example\
    |mimi@a.example,mimi@a.example|mimi@a.example,|mimi@a.example;|mimi@a.example mimi@a.example|mimi@mimi@a.example\
    |mimi@a.example.| mimi@a.example|mimi@a.example |mimi@ a.example|mimi (x)@a.example|mimi@a.example:443\
    |mimi@-a.example|mimi@a..example|mimi@a_b.example|mimi%40a.example|mimi@b\u{fc}cher.example|mimi@a.example\0";

#[test]
fn from_is_one_address_and_nothing_else() {
    for case in one_of_each() {
        for from in BAD_FROM.split('|').map(Some).chain([None]) {
            let asked = Asked { from: from.map(|from| from.as_bytes().to_vec()), ..case.asked.clone() };
            assert_malformed_head(&asked, &case.body, &format!("From: {from:?}"));
            let download = Asked { endpoint: "proxyDownload", parameter: "https://a.example/f".to_owned(), ..asked };
            assert_malformed_head(&download, &[], &format!("From: {from:?}"));
        }
        for (from, sender) in [("a", "a"), ("A.EXAMPLE", "a.example"), ("xn--Mnchen-3ya.De", "xn--mnchen-3ya.de")] {
            let asked = Asked { from: Some(mimi::from(from)), ..case.asked.clone() };
            assert_eq!(assert_accepted(&asked, &case.body, from).sender, sender);
        }
    }
}

#[test]
fn host_is_a_domain_in_any_case() {
    for case in one_of_each() {
        for host in ["", "b.example.", ".b.example", "b.example:443", "b_c.example", "[::1]", "b.example, b.example"] {
            assert_malformed_head(&Asked { host: host.to_owned(), ..case.asked.clone() }, &case.body, host);
        }
        let asked = Asked { host: "B.Example".to_owned(), ..case.asked.clone() };
        assert_eq!(assert_accepted(&asked, &case.body, "upper case"), case.facts);
    }
}

/// Between the bars: what two readers could read differently, or what names no provider.
const BAD_URIS: &str = "b/example|mimi:|mimi:b.example|mimi:/b.example/u/bob|mimi://|mimi:///u/bob|//b.example/u/bob\
    |://b.example/u/bob|1mimi://b.example/u/bob|mi mi://b.example/u|mimi://b.example:8443/u/bob|mimi://bob@b.example/u\
    |mimi://b.example@c.example/u|mimi://b.example./u/bob|mimi://-b.example/u/bob|mimi://b_c.example/u/bob\
    |mimi://b.example\\@c.example/u|mimi://b.example/u/b b|mimi://b.example/u/\0|mimi://b.example/u/b\u{fc}\
    |mimi://b.example/u/%|mimi://b.example/u/%2|mimi://b.example/u/%zz|mimi://b%2eexample/u/bob|im:bob|im:@b.example\
    |im:bob@|im:bob@b.example/x|im:bob@a.example@b.example|mimi%3A%2F%2Fb.example%2Fu%2Fbob|mimi://b.example/u/<b>";

#[test]
fn uris_that_are_bad_name_nobody() {
    let long = format!("mimi://b.example/u/{}", "x".repeat(2048));
    let People { alice, bob, eve, room, .. } = &people(0);
    for uri in BAD_URIS.split('|').chain([&long[..], ""]) {
        for case in one_of_each() {
            let asked = Asked { parameter: uri.to_owned(), ..case.asked.clone() };
            assert_malformed(&asked, &case.body, &format!("{uri:?} in the path"));
        }
        let mut bodies = vec![
            (asked("keyMaterial", bob), key_material(&uri, bob, &"")),
            (asked("keyMaterial", uri), key_material(alice, &uri, &"")),
            (asked("submitMessage", room), submit(&private_message(b"group"), &uri)),
            (asked("requestConsent", B), consent(mimi::REQUEST, &uri, bob, None)),
            (asked("requestConsent", B), consent(mimi::CANCEL, alice, &uri, None)),
            (asked("requestConsent", B), consent(mimi::REQUEST, alice, bob, Some(&uri))),
            (asked("updateConsent", B), consent(mimi::REVOKE, &uri, alice, None)),
            (asked("updateConsent", B), consent(mimi::GRANT, bob, &uri, None)),
            (asked("updateConsent", B), consent(mimi::GRANT, bob, alice, Some(&uri))),
            (asked("reportAbuse", room), report(alice, &uri)),
        ];
        if !uri.is_empty() {
            bodies.push((asked("keyMaterial", bob), key_material(alice, bob, &uri)));
            bodies.push((asked("reportAbuse", room), report(&uri, eve)));
        }
        for (asked, body) in bodies {
            assert_malformed(&asked, &body, uri);
        }
    }
    assert_malformed(&asked("reportAbuse", room), &report(b"mimi://b.example/u/\xff", eve), "no UTF-8");
}

// ---------------------------------------------------------------------------------------------------------------------
// The body
// ---------------------------------------------------------------------------------------------------------------------

/// Every vector that the reader needs, put in every way that it must not be.
#[test]
fn lengths_that_are_not_in_their_shortest_form() {
    let mut changed = BTreeSet::new();
    for (material, people) in [(&MATERIALS[1], people(0)), (&MATERIALS[2], people(63)), (&MATERIALS[3], people(64))] {
        let People { alice, bob, eve, room, their_room, .. } = &people;
        let aad = mimi::frank_aad(&[8; 32]);
        let uris = [alice, bob, eve, room, their_room].map(|uri| uri.as_bytes());
        let others = [&material.group_id[..], &material.signature_key[..], &aad[..], &[5; 12], &[6; 100]];
        for case in cases_of(material, &people) {
            let (name, needed) = (case.asked.endpoint, &case.body[..case.facts.decided_at]);
            // vectors within a vector are elsewhere
            if needed.len() > 1000 || name == "identifierQuery" {
                continue;
            }
            for content in uris.into_iter().chain(others) {
                let whole = vector(content);
                let Some(at) = needed.windows(whole.len()).position(|window| window == whole) else { continue };
                let put = |octets: &[u8]| concat(&[&case.body[..at], octets, &case.body[at + whole.len()..]]);
                let mut prefixed = whole.clone();
                prefixed[0] |= 0xc0;
                let mut wrong = vec![vector_in(4, content), prefixed, concat(&[&[0xc0, 0, 0, 0, 0, 0, 0], &whole])];
                if content.len() < 64 {
                    wrong.push(vector_in(2, content));
                }
                for octets in wrong {
                    assert_malformed(&case.asked, &put(&octets), &hex::encode(octets));
                }
                // promised, and not there
                let promise = concat(&[&length_in(4, 1 << 29), content]);
                assert!(!matches!(read(&case.asked, &put(&promise)), Outcome::Accepted(_)), "{name}");
                // what says who, where or for whom is not empty
                if [&material.group_id[..], &material.signature_key[..], bob.as_bytes()].contains(&content) {
                    assert_malformed(&case.asked, &put(&[0]), "empty");
                }
                changed.insert((name, at));
            }
        }
    }
    assert!(changed.len() > 25, "{changed:?}");
}

#[test]
fn group_ids_of_any_length_but_none() {
    let room = &people(0).room;
    for length in [1, 63, 64, 16_383, 16_384] {
        let group_id = vec![0x47; length];
        let (public, private) = (public_message(&group_id, 1, Some(4)), private_message(&group_id));
        for (name, body) in [("update", public), ("submitMessage", submit(&private, &people(0).alice))] {
            assert_eq!(assert_accepted(&asked(name, room), &body, name).group_id, Some(group_id.clone()));
        }
    }
    let notified =
        [public_message(b"", 1, Some(4)), private_message(b"")].map(|empty| notify(&empty, Fanned::Commit(vec![])));
    for body in &notified {
        assert_malformed(&asked("notify", room), body, "a group without an ID");
    }
    assert_malformed(&asked("update", room), &notified[0][8..], "a group without an ID");
    assert_malformed(&asked("submitMessage", room), &concat(&[&[1], &notified[1][8..]]), "a group without an ID");
}

#[test]
fn lists_of_queries_that_do_not_end_where_they_say() {
    let element = QueryElement::new(mimi::HANDLE, b"bob").encode();
    let bad = [
        vec![],
        vec![1],
        vec![1, 4, b'b', b'o', b'b'],
        vec![mimi::OIDC_STD_CLAIM, 3, b'a', b'b', b'c'],
        vec![mimi::VCARD_FIELD, 0x40],
        concat(&[&[mimi::HANDLE], &vector_in(2, b"bob")]),
        concat(&[&[mimi::HANDLE], &vector_in(4, &[b'b'; 64])]),
        concat(&[&[mimi::VCARD_FIELD], &vector_in(2, b"ORG"), &vector(b"XYZ")]),
        vec![mimi::HANDLE, 0xc3, b'b', b'o', b'b'],
    ];
    for list in bad {
        assert_malformed(&asked("identifierQuery", B), &vector(&list), &hex::encode(&list));
        if !list.is_empty() {
            assert_malformed(&asked("identifierQuery", B), &vector(&concat(&[&element, &list])), "the second");
        }
    }
    for list in [vector_in(2, &element), vector_in(4, &element.repeat(20)), concat(&[&[0xc0 | 5], &element])] {
        assert_malformed(&asked("identifierQuery", B), &list, "the list");
    }
}

#[test]
fn values_that_are_unknown() {
    let People { alice, bob, eve, room, their_room, .. } = &people(0);
    let consents = [("requestConsent", [mimi::CANCEL, mimi::REQUEST]), ("updateConsent", [mimi::GRANT, mimi::REVOKE])];
    let with_protocol = ["keyMaterial", "submitMessage", "groupInfo"];
    for value in 0..=u8::MAX {
        for case in one_of_each().filter(|case| value != 1 && with_protocol.contains(&case.asked.endpoint)) {
            assert_malformed(&case.asked, &concat(&[&[value], &case.body[1..]]), "protocol");
        }
        for (name, operations) in consents {
            let (requester, target) = if name == "requestConsent" { (alice, bob) } else { (bob, alice) };
            let (asked, body) = (asked(name, B), consent(value, requester, target, Some(eve)));
            match operations.contains(&value) {
                true => assert_eq!(assert_accepted(&asked, &body, "operation").operation, name),
                false => assert_malformed(&asked, &body, "operation"),
            }
            if value > 1 {
                let mut body = consent(operations[1], requester, target, Some(eve));
                body[1 + size(requester) + size(target)] = value;
                assert_malformed(&asked, &body, "neither is there a room nor is there none");
            }
        }
        if !(1..=8).contains(&value) {
            let elements = [mimi::NICK, value].map(|kind| QueryElement::new(kind, b"bob")).to_vec();
            assert_malformed(&asked("identifierQuery", B), &query(elements).encode(), "type of an element");
        }
        let message = public_message(b"group", value, matches!(value, 1 | 2).then_some(4));
        let fanned = notify(&message, Fanned::Commit(vec![]));
        for (asked, body) in [(asked("update", room), message), (asked("notify", their_room), fanned)] {
            match value {
                1 => assert_eq!(assert_accepted(&asked, &body, "a member").member, Some(Who::Leaf(4))),
                2..=4 => assert_eq!(assert_accepted(&asked, &body, "no member").member, None),
                _ => assert_malformed(&asked, &body, "type of a sender"),
            }
        }
    }
}

#[test]
fn messages_that_an_endpoint_does_not_take() {
    let (material, People { alice, room, their_room, .. }) = (&MATERIALS[1], &people(0));
    let public = [&material.add.1, &material.proposal.1, &material.external_commit, &material.outside[1]];
    let private = [&material.applications[0], &material.private_handshakes[0], &private_message(b"group")];
    let neither = [&material.group_info, &material.key_package];
    let mut unknown = vec![];
    for number in [0_u16, 4, 5, 6, 7, 0x0100, 0x0101, 0x0a0a, 0xf001, u16::MAX] {
        unknown.extend([message(1, number, &public[0][4..]), message(1, number, &private[0][4..])]);
        unknown.extend([message(number | 2, 1, &public[0][4..]), message(number | 4, 2, &private[0][4..])]);
        unknown.push(message(number | 2, 3, &material.add.2[4..]));
    }
    let never = || neither.into_iter().chain(&unknown);
    for message in never() {
        assert_malformed(&asked("notify", their_room), &notify(message, Fanned::Application(None)), "no message");
    }
    for message in never().chain(private).chain([&material.add.2]) {
        assert_malformed(&asked("update", room), &propose(message, &[]), "not a public message");
    }
    for message in never().chain(public).chain([&material.add.2]) {
        assert_malformed(&asked("submitMessage", room), &submit(message, alice), "not a private message");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Whose it is
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn what_must_hold_of_providers() {
    use Verdict::{Accept, Malformed, Misdirected, SenderMismatch};

    let People { alice, bob, eve, room, their_room, .. } = &people(0);
    let (theirs, elsewhere) = (their_room, &"mimi://c.example/r/x".to_owned());
    let (message, public) = (private_message(b"group"), public_message(b"group", 1, Some(4)));
    let fanned = notify(&public, Fanned::Commit(vec![]));
    let information = group_info(b"key", Credential::Basic(b"x".to_vec()));
    let handle = query(vec![QueryElement::new(mimi::HANDLE, b"bob")]).encode();
    let (ask, tell) = (mimi::REQUEST, mimi::GRANT);
    let checks = [
        ("keyMaterial", bob, key_material(alice, bob, theirs), Accept),
        ("keyMaterial", bob, key_material(eve, bob, theirs), Accept),
        ("keyMaterial", bob, key_material(alice, bob, &""), Accept),
        ("keyMaterial", eve, key_material(alice, eve, theirs), Misdirected),
        ("keyMaterial", eve, key_material(alice, eve, elsewhere), Misdirected),
        ("keyMaterial", bob, key_material(alice, bob, elsewhere), SenderMismatch),
        ("keyMaterial", bob, key_material(alice, bob, room), SenderMismatch),
        ("keyMaterial", bob, key_material(alice, &format!("{bob}x"), theirs), Malformed),
        ("keyMaterial", bob, key_material(alice, &bob.replace("bob", "BOB"), theirs), Malformed),
        ("keyMaterial", bob, key_material(alice, &bob.replace("mimi://b", "Mimi://B"), theirs), Accept),
        ("update", room, public.clone(), Accept),
        ("update", theirs, public.clone(), Misdirected),
        ("update", elsewhere, public.clone(), Misdirected),
        ("update", &"mimi://b.example.c.example/r/x".to_owned(), public.clone(), Misdirected),
        ("update", &"mimi://xb.example/b.example".to_owned(), public, Misdirected),
        ("notify", theirs, fanned.clone(), Accept),
        ("notify", room, fanned.clone(), SenderMismatch),
        ("notify", elsewhere, fanned, SenderMismatch),
        ("submitMessage", room, submit(&message, alice), Accept),
        ("submitMessage", room, submit(&message, &"IM:alice@A.Example"), Accept),
        ("submitMessage", theirs, submit(&message, alice), Misdirected),
        ("submitMessage", elsewhere, submit(&message, eve), Misdirected),
        ("submitMessage", room, submit(&message, eve), SenderMismatch),
        ("submitMessage", room, submit(&message, bob), SenderMismatch),
        ("groupInfo", room, information.clone(), Accept),
        ("groupInfo", theirs, information, Misdirected),
        ("requestConsent", bob, consent(ask, alice, bob, None), Accept),
        ("requestConsent", &B.to_owned(), consent(ask, alice, bob, Some(elsewhere)), Accept),
        ("requestConsent", &"c.example".to_owned(), consent(ask, alice, bob, None), Misdirected),
        ("requestConsent", &B.to_owned(), consent(ask, alice, eve, None), Misdirected),
        ("requestConsent", eve, consent(ask, alice, eve, None), Misdirected),
        ("requestConsent", &B.to_owned(), consent(ask, eve, bob, None), SenderMismatch),
        ("requestConsent", &B.to_owned(), consent(ask, bob, bob, None), SenderMismatch),
        ("requestConsent", alice, consent(ask, alice, bob, None), Malformed),
        ("updateConsent", bob, consent(tell, bob, alice, None), Accept),
        ("updateConsent", &"c.example".to_owned(), consent(tell, bob, alice, None), Misdirected),
        ("updateConsent", &B.to_owned(), consent(tell, eve, alice, None), Misdirected),
        ("updateConsent", &B.to_owned(), consent(tell, alice, bob, None), Misdirected),
        ("updateConsent", &B.to_owned(), consent(tell, bob, eve, None), SenderMismatch),
        ("updateConsent", alice, consent(tell, bob, alice, None), Malformed),
        ("identifierQuery", &"B.EXAMPLE".to_owned(), handle.clone(), Accept),
        ("identifierQuery", &"c.example".to_owned(), handle, Misdirected),
        ("reportAbuse", room, report(alice, eve), Accept),
        ("reportAbuse", room, report(&"", bob), Accept),
        ("reportAbuse", theirs, report(alice, eve), Misdirected),
    ];
    for (name, parameter, body, verdict) in checks {
        let asked = asked(name, parameter);
        assert_eq!(judge(&asked, &body), verdict, "{asked:?}: {}", hex::encode(&body));
        // another sender than the one that is authenticated, and another host
        let by_another = judge(&Asked { from: Some(mimi::from("c.example")), ..asked.clone() }, &body);
        assert_eq!(by_another, if verdict == Accept { SenderMismatch } else { verdict });
        assert_eq!(judge(&Asked { host: "c.example".to_owned(), ..asked }, &body), Misdirected);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Paths
// ---------------------------------------------------------------------------------------------------------------------

static ROUTES: LazyLock<Routes> = LazyLock::new(|| Routes::of(&[&dialect::mimi::DIALECT]));

/// The parameter of an endpoint's path, in its braces.
fn parameter_of(name: &str) -> Option<&'static str> {
    let path = dialect::endpoint(name)?.path;
    path.find('{').map(|at| &path[at..])
}

/// Paths of another server: something before and behind the parameter, others towards the Delivery Service.
fn moved() -> Routes {
    let template = |path: String| Template::parse(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let given = |name: &str| match parameter_of(name) {
        Some(parameter) => {
            let upstream = template(format!("/ds/{parameter}/{name}"));
            (Some(template(format!("/v1/{name}/{parameter}/do"))), Some(upstream))
        }
        None => (None, None),
    };
    Routes::new(&[&dialect::mimi::DIALECT], &given).unwrap_or_else(|clash| panic!("{clash}"))
}

/// Where a path leads: to an endpoint with a parameter, and to a path of the Delivery Service.
#[derive(Debug, PartialEq, Eq)]
enum Led {
    To(&'static str, String, String),
    Nowhere,
    WrongMethod(String),
    Refused,
}

fn lead(routes: &Routes, method: &str, path: &str) -> Led {
    match routes.find(&http::Method::from_bytes(method.as_bytes()).unwrap(), path) {
        Ok(found) => {
            let upstream = found.route.upstream_path(found.raw).into_owned();
            Led::To(found.route.endpoint.name, found.parameter.into_owned(), upstream)
        }
        Err(NoRoute::UnknownPath) => Led::Nowhere,
        Err(NoRoute::WrongMethod { allow }) => Led::WrongMethod(allow.to_string()),
        Err(NoRoute::Ambiguous(error)) => {
            assert_eq!(error.place().0, "path");
            Led::Refused
        }
    }
}

#[test]
fn paths_lead_to_endpoints_and_go_on_as_they_came() {
    let moved = moved();
    for (method, name, prefix) in ENDPOINTS {
        let other = if method == "GET" { "POST" } else { "GET" };
        let parameters = ["mimi://b.example/r/Club#%41?a=b", "im:b@b.example", B, "%2e%2e", "...", "b\u{fc}", "a b\\c"];
        for parameter in parameters.into_iter().take(if prefix.ends_with('/') { 7 } else { 0 }) {
            for encoding in [Encoding::Usual, Encoding::Least, Encoding::Most] {
                let path = mimi::path_in(encoding, name, parameter.as_bytes());
                let raw = path.strip_prefix(prefix).unwrap();
                assert_eq!(lead(&ROUTES, method, &path), Led::To(name, parameter.to_owned(), path.clone()));
                assert_eq!(lead(&ROUTES, other, &path), Led::WrongMethod(method.to_owned()));
                let (path, upstream) = (format!("/v1/{name}/{raw}/do"), format!("/ds/{raw}/{name}"));
                assert_eq!(lead(&moved, method, &path), Led::To(name, parameter.to_owned(), upstream));
            }
        }
        assert_eq!(dialect::endpoint(name).unwrap().takes_body(), method == "POST", "{name}");
    }
    assert_eq!(dialect::mimi::DIALECT.endpoints.len(), ENDPOINTS.len());
    let directory = "/.well-known/mimi-protocol-directory";
    for routes in [&*ROUTES, &moved] {
        assert_eq!(lead(routes, "GET", directory), Led::To("directory", String::new(), directory.to_owned()));
    }
}

#[test]
fn parameters_are_decoded_once() {
    let path = "/update/mimi%253A%252F%252Fb.example%252Fr%252Fclub";
    let once = "mimi%3A%2F%2Fb.example%2Fr%2Fclub";
    assert_eq!(lead(&ROUTES, "POST", path), Led::To("update", once.to_owned(), path.to_owned()));
    assert_eq!(read(&asked("update", once), &public_message(b"group", 1, Some(4))), Outcome::Malformed);
    let path = "/update/mimi:%2f%2Fb.example%2fr%2F100%2525";
    let once = "mimi://b.example/r/100%25";
    assert_eq!(lead(&ROUTES, "POST", path), Led::To("update", once.to_owned(), path.to_owned()));
    assert_eq!(assert_accepted(&asked("update", once), &public_message(b"g", 1, Some(4)), once).room.unwrap(), once);
}

/// Between the spaces: dot segments, controls, no UTF-8, percent signs without digits, octets that no segment has.
const AMBIGUOUS: &str = ". .. %2e %2E .%2e %2e. %2e%2E %00 a%00b %01 a%0ab a%0D %1f %7f %C2%85 %ff a%FF %c0%af %c0%80 \
    %ed%a0%80 %f4%90%80%80 %e2%82 % a% %2 %zz a%2g %%32 %%%% a\"b a<b a>b a^b a`b a{b a}b a|b a\\b a[b a]b \
    \u{fc} a\u{7f}";

#[test]
fn paths_that_are_ambiguous_lead_nowhere() {
    let moved = moved();
    for parameter in AMBIGUOUS.split(' ').chain(["a b"]) {
        for (method, name, prefix) in &ENDPOINTS[..10] {
            assert_eq!(lead(&ROUTES, method, &format!("{prefix}{parameter}")), Led::Refused, "{parameter:?}");
            assert_eq!(lead(&moved, method, &format!("/v1/{name}/{parameter}/do")), Led::Refused, "{parameter:?}");
        }
    }
    for path in ["/update/../update/x", "/update/x/..", "/update/x/%2e%2e", "/update/./x", "/update/%2E%2e/x"] {
        assert_eq!(lead(&ROUTES, "POST", path), Led::Refused, "{path}");
    }
    for behind in ["/../do", "/do/..", "/%2E/do", "/do%2F", "/do%2fy", "/%2fdo", "/do%5c", "/d\\o"] {
        assert_eq!(lead(&moved, "POST", &format!("/v1/update/x{behind}")), Led::Refused, "{behind}");
    }
    for path in ["", "/", "/update", "/update/", "/Update/x", "/updat%65/x", "//update/x", "/update/x/", "/update//x"] {
        assert_eq!(lead(&ROUTES, "POST", path), Led::Nowhere, "{path}");
        assert_eq!(lead(&moved, "POST", &format!("/v1{path}/d%6f")), Led::Nowhere, "{path}");
    }
    for path in ["/update%2Fx", "/./update/x", "/v1/../update/x", "/%2e/update/x", "/update/x%2Fy/z", "update/x"] {
        assert!(matches!(lead(&ROUTES, "POST", path), Led::Nowhere | Led::Refused), "{path}");
    }
}

#[test]
fn templates_that_could_mean_two_things() {
    for template in ["/a/{x}/{y}", "/a{x}", "/a/{x}y", "/a/{x", "/a/x}"] {
        assert!(Template::parse(template).is_err(), "{template}");
    }
    let agree = |update: &str, name: &str, path: &str| {
        let given = |asked: &str| {
            let path = [("update", update), (name, path)].into_iter().find(|(name, _)| *name == asked);
            (
                path.map(|(_, path)| Template::parse(path).unwrap_or_else(|error| panic!("{path}: {error}"))),
                None::<Template>,
            )
        };
        Routes::new(&[&dialect::mimi::DIALECT], &given).is_ok()
    };
    assert!(!agree("/x/{roomId}", "notify", "/x/{roomId}"));
    assert!(!agree("/a/x/{roomId}", "notify", "/a/{roomId}/x"));
    assert!(agree("/x/{roomId}/a", "notify", "/x/{roomId}/b"));
    assert!(agree("/x/{roomId}", "proxyDownload", "/x/{downloadUrl}"));
}

#[test]
fn the_directory_says_where_everything_is() {
    let By::Gateway(answer) = dialect::endpoint("directory").unwrap().by else { panic!("others answer for it") };
    let said = answer(&dialect::Facts { authority: "b.example:8443", ds_domain: "ds.b.example", routes: &moved() });
    let urls: Value = serde_json::from_slice(&said.body).unwrap();
    assert_eq!((said.content_type, urls.as_object().unwrap().len()), ("application/json", 10));
    for (_, name, prefix) in &ENDPOINTS[..10] {
        let url = format!("https://b.example:8443/v1{prefix}{}/do", parameter_of(name).unwrap());
        assert_eq!(urls[name].as_str(), Some(&url[..]));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Vectors of others
// ---------------------------------------------------------------------------------------------------------------------

/// What is said of a request, as the vectors have it.
fn said(case: &Value) -> Value {
    let text = |field: &str| case[field].as_str().unwrap_or_default();
    let outcome = |outcome: &str| json!({ "outcome": outcome });
    let host = text("host").split(':').next().unwrap_or_default();
    if !host.eq_ignore_ascii_case(B) {
        return outcome("misdirected");
    }
    let Led::To(endpoint, parameter, _) = lead(&ROUTES, text("method"), text("path")) else {
        return outcome("malformed");
    };
    let from = case["from"].as_str().map(|from| from.as_bytes().to_vec());
    let (asked, body) =
        (Asked { endpoint, host: host.to_owned(), from, parameter }, hex::decode(text("body")).unwrap());
    match (judge(&asked, &body), read(&asked, &body)) {
        (Verdict::Accept, Outcome::Accepted(facts)) => json!({
            "outcome": "accept",
            "operation": facts.operation,
            "sender": facts.sender,
            "recipient": facts.recipient,
            "group_id": facts.group_id.map(hex::encode),
            "room": facts.room,
            "member": facts.member.map(|member| match member {
                Who::Leaf(leaf) => json!({ "type": "leaf_index", "value": leaf }),
                Who::Uri(uri) => json!({ "type": "uri", "value": uri }),
                Who::Key(key) => json!({ "type": "signature_key", "value": hex::encode(key) }),
            }),
            "target": facts.target.map(|uri| json!({ "type": "uri", "value": uri })),
            "cost": facts.cost,
        }),
        (Verdict::Misdirected, _) => outcome("misdirected"),
        (Verdict::SenderMismatch, _) => outcome("sender-mismatch"),
        _ => outcome("malformed"),
    }
}

/// The vectors hold others' data and are not in this project: `$MOH_VECTORS` says where they are.
#[test]
fn reader_agrees_with_the_vectors() {
    let Some(folder) = std::env::var_os("MOH_VECTORS") else {
        eprintln!("MOH_VECTORS is not set: the vectors are not read (this file is the project's own corpus)");
        return;
    };
    let text = std::fs::read(std::path::Path::new(&folder).join("mimi.json")).unwrap();
    let vectors: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!((&vectors["local"], &vectors["peer"]), (&json!(B), &json!(A)));
    let cases = vectors["cases"].as_array().unwrap();
    assert!(cases.len() > 300);
    for case in cases {
        assert_eq!(said(case), case["expect"], "{}", case["name"]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Properties
// ---------------------------------------------------------------------------------------------------------------------

fn config(cases: u32) -> ProptestConfig {
    // failures are printed; nothing is left in the source tree
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn any_domain() -> impl Strategy<Value = String> {
    prop_oneof![
        "([a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?\\.){0,3}[a-zA-Z0-9]([a-zA-Z0-9-]{0,10}[a-zA-Z0-9])?",
        "xn--[a-z0-9]{1,12}\\.[a-z]{2,8}",
        "[A-Z]{1,63}\\.[A-Za-z]{2,8}",
    ]
}

fn any_people() -> impl Strategy<Value = People> {
    let name = "[a-zA-Z0-9]([a-zA-Z0-9._~!$+,;=-]|%[0-9A-Fa-f]{2}){0,50}";
    let names = prop::collection::vec((name, any::<bool>(), any::<u64>()), 5);
    (any_domain(), any_domain(), any_domain(), names).prop_map(|(ours, theirs, other, names)| {
        let uri = |place: usize, kind: &str, domain: &str| {
            let (name, by_mail, upper) = &names[place];
            let mixed = |text: &str| -> String {
                let raised = |at: usize| (upper >> (at % 64)) & 1 == 1;
                let letters = text.chars().enumerate();
                letters.map(|(at, letter)| if raised(at) { letter.to_ascii_uppercase() } else { letter }).collect()
            };
            if *by_mail {
                format!("{}:{name}@{}", mixed("im"), mixed(domain))
            } else {
                format!("{}://{}/{kind}/{name}", mixed("mimi"), mixed(domain))
            }
        };
        let (alice, bob, eve) = (uri(0, "u", &theirs), uri(1, "u", &ours), uri(2, "u", &other));
        let (room, their_room) = (uri(3, "r", &ours), uri(4, "r", &theirs));
        People { ours, theirs, alice, bob, eve, room, their_room }
    })
}

proptest! {
    #![proptest_config(config(100))]

    /// Whoever they are and however they are written, the facts are what was encoded, by way of the path too.
    #[test]
    fn people_and_rooms_of_any_name(people in any_people()) {
        for case in cases_of(&MATERIALS[1], &people) {
            let asked = case.asked;
            let path = mimi::path(asked.endpoint, asked.parameter.as_bytes());
            let led = Led::To(asked.endpoint, asked.parameter.clone(), path.clone());
            prop_assert_eq!(lead(&ROUTES, "POST", &path), led);
            prop_assert_eq!(read(&asked, &case.body), Outcome::Accepted(Box::new(case.facts)));
        }
    }

    /// Whatever comes, wherever, after the beginning of a request: no panic, and no answer is taken back.
    #[test]
    fn arbitrary_octets(
        place in 0..CORPUS.len(),
        at in any::<prop::sample::Index>(),
        tail in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let case = &CORPUS[place];
        let body = concat(&[&case.body[..at.index(case.facts.decided_at.min(300))], &tail]);
        for other in one_of_each() {
            answers(&Asked { endpoint: other.asked.endpoint, ..case.asked.clone() }, &body);
            answers(&other.asked, &tail);
        }
    }
}

proptest! {
    #![proptest_config(config(1000))]

    /// What follows the decision changes nothing.
    #[test]
    fn octets_after_the_decision(place in 0..CORPUS.len(), tail in prop::collection::vec(any::<u8>(), 0..200)) {
        let case = &CORPUS[place];
        for beginning in [&case.body[..case.facts.decided_at], &case.body[..]] {
            let outcome = read(&case.asked, &concat(&[beginning, &tail]));
            prop_assert_eq!(outcome, Outcome::Accepted(Box::new(case.facts.clone())));
        }
    }

    /// Octets changed before the decision: what is accepted is the beginning's alone.
    #[test]
    fn changed_octets(place in 0..CORPUS.len(), at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let case = &CORPUS[place];
        let mut body = case.body.clone();
        body[at.index(case.facts.decided_at)] = value;
        if let Outcome::Accepted(facts) = read(&case.asked, &body) {
            let decided_at = facts.decided_at;
            prop_assert_eq!(read(&case.asked, &body[..decided_at]), Outcome::Accepted(facts));
        }
    }

    /// Any head: no panic, and what is accepted is what was asked.
    #[test]
    fn arbitrary_heads(
        host in "[a-dA-D.-]{1,4}|.{0,20}",
        from in "mimi@[a-dA-D.-]{1,4}|(mimi@)?.{0,20}",
        parameter in "mimi://[a-dA-D.-]{1,4}/r|.{0,40}",
    ) {
        for case in one_of_each() {
            let from = from.clone();
            let (endpoint, host, parameter) = (case.asked.endpoint, host.clone(), parameter.clone());
            let asked = Asked { endpoint, host, from: Some(from.clone().into_bytes()), parameter };
            if let Outcome::Accepted(facts) = read(&asked, &case.body) {
                prop_assert_eq!(&facts.recipient, &asked.host.to_ascii_lowercase());
                prop_assert_eq!(format!("mimi@{}", facts.sender), from.to_ascii_lowercase());
            }
        }
    }

    /// Any path: what is found goes on as it came, and its parameter is no dot segment and has no control character.
    #[test]
    fn arbitrary_paths(path in "/(update|notify|%2e|\\.\\.)/([a-z:/%.]|%2[0-9ef]|%[0-9a-f]{2}){0,8}") {
        if let Led::To(_, parameter, upstream) = lead(&ROUTES, "POST", &path) {
            prop_assert_eq!(upstream, path);
            prop_assert!(![String::new(), ".".to_owned(), "..".to_owned()].contains(&parameter));
            prop_assert!(!parameter.contains(char::is_control));
        }
    }
}
