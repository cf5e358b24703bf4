//! What a request costs inside the gateway: reading each kind, a decision with five limits.
//! Bars (issue 2): `read/send_message` under 150 ns, without allocation (tests/no_allocation.rs holds the second);
//! (issue 6): `read mimi/submitMessage` under 300 ns.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

#[path = "../tests/support/encode.rs"]
mod encode;
#[path = "../tests/support/mimi.rs"]
mod mimi;

use criterion::{Criterion, criterion_group, criterion_main};
use encode::SenderId;
use moh_gateway::admission::{Admission, Decision, KeyParts, Limit, Policy, Scope, Subject, Tally, TokenUse, Unit};
use moh_gateway::dialect::{self, DIALECTS, Head, Routes};
use moh_gateway::limiter::gcra::Gcra;
use moh_gateway::limiter::memory::Memory;
use moh_gateway::limiter::{Limiter, OnFailure};
use std::hint::black_box;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

const GROUP: &[u8] = b"a group ID of 32 octets, as usual";

fn mls(wire_format: u8) -> Vec<u8> {
    let mut octets = vec![0, 1, 0, wire_format];
    octets.extend(encode::vector(GROUP));
    octets.extend([0; 8]);
    octets.extend([1, 0, 0, 0, 7]);
    octets.extend([0; 900]);
    octets
}

fn requests() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let (a, b) = ("a.example", "b.example");
    let leaf = SenderId::Leaf(7);
    let hash = SenderId::UserKeyHash(vec![9; 32]);
    let ids: Vec<&[u8]> = vec![b"client of a user, 32 octets long."; 10];
    vec![
        ("send_message", "/group_operation", encode::ds_request(a, b, &leaf, encode::SEND_MESSAGE, &mls(2), &[0; 64])),
        (
            "update_client",
            "/group_operation",
            encode::ds_request(a, b, &leaf, encode::UPDATE_CLIENT, &mls(1), &[0; 64]),
        ),
        (
            "welcome_info",
            "/welcome_information",
            encode::ds_request(a, b, &hash, encode::WELCOME_INFO, &encode::vector(GROUP), &[0; 64]),
        ),
        ("verification_key", "/verification_key", encode::verification_key_request(a, b)),
        ("connection_request", "/connection_request", encode::queueing_request(a, b, &[5; 40], &mls(3))),
        ("deliver_message", "/deliver_message", encode::queueing_request(a, b, &[5; 40], &mls(2))),
        (
            "connection_key_packages",
            "/connection_key_packages",
            encode::connection_key_package_request(a, b, b"im:bob@b.example"),
        ),
        ("group_key_packages of 10", "/group_key_packages", encode::group_key_package_request(a, b, GROUP, &ids)),
    ]
}

fn read(c: &mut Criterion) {
    let mut group = c.benchmark_group("read");
    for (name, path, body) in requests() {
        let (endpoint, head) = (dialect::endpoint(path.trim_start_matches('/')).unwrap(), Head::default());
        assert!(endpoint.read(&head, &body).is_ok(), "{name}");
        group.bench_function(name, |b| b.iter(|| endpoint.read(&head, black_box(&body)).is_ok()));
    }
    group.finish();
}

/// Requests of the `mimi` dialect: endpoint, the path's parameter, body. What follows the ciphertext is a sender's URI.
fn mimi_requests() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let (alice, bob) = ("mimi://a.example/u/alice", "mimi://b.example/u/bob");
    let (ours, theirs) = ("mimi://b.example/r/room", "mimi://a.example/r/room");
    let uri = |uri: &str| encode::vector(uri.as_bytes());
    let private = |ciphertext: usize| {
        let mut octets = vec![0, 1, 0, 2];
        octets.extend(encode::vector(GROUP));
        octets.extend([0; 8]);
        octets.push(1);
        octets.extend(encode::vector(b"aad"));
        octets.extend(encode::vector(&[3; 28]));
        octets.extend(encode::vector(&vec![4; ciphertext]));
        octets
    };
    let submit = |ciphertext| [vec![1], private(ciphertext), uri(alice)].concat();
    let consent = |operation: u8| [vec![operation], uri(alice), uri(bob), vec![0, 0]].concat();
    let query = mimi::list(&[mimi::QueryElement::new(mimi::HANDLE, b"im:bob@b.example").encode()]);
    vec![
        ("keyMaterial", bob, [vec![1], uri(alice), uri(bob), uri(theirs), vec![0; 200]].concat()),
        ("update", ours, mls(1)),
        ("notify", theirs, [vec![0; 8], mls(2)].concat()),
        ("submitMessage", ours, submit(900)),
        ("submitMessage", ours, submit(32 << 10)),
        ("groupInfo", ours, [&[1, 0, 1][..], &encode::vector(&[7; 32]), &[0, 1], &uri(alice), &[0; 100]].concat()),
        ("requestConsent", "b.example", consent(1)),
        ("identifierQuery", "b.example", [query, vec![0]].concat()),
        ("reportAbuse", ours, [uri(alice), uri(bob), vec![0; 100]].concat()),
    ]
}

fn read_mimi(c: &mut Criterion) {
    let mut group = c.benchmark_group("read mimi");
    for (name, parameter, body) in mimi_requests() {
        let endpoint = dialect::endpoint(name).unwrap();
        let head = Head { host: "b.example", from: Some(b"mimi@a.example"), parameter };
        endpoint.read(&head, &body).unwrap_or_else(|e| panic!("{name}: {e}"));
        group.bench_function(format!("{name}, {} octets", body.len()), |b| {
            b.iter(|| endpoint.read(black_box(&head), black_box(&body)).is_ok());
        });
    }
    group.finish();
    let routes = Routes::of(DIALECTS);
    let mut group = c.benchmark_group("route");
    for path in ["/group_operation", "/submitMessage/mimi%3A%2F%2Fb.example%2Fr%2Froom", "/reportAbuse/room"] {
        group.bench_function(path.replace('/', " "), |b| {
            b.iter(|| routes.find(&http::Method::POST, black_box(path)).is_ok());
        });
    }
    group.finish();
}

/// A decision in this node's memory waits for nothing.
fn now(decision: impl Future<Output = (Decision, Tally)>) -> (Decision, Tally) {
    match std::pin::pin!(decision).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(decided) => decided,
        Poll::Pending => panic!("it waits"),
    }
}

fn decide(c: &mut Criterion) {
    let part = |set: fn(&mut KeyParts)| {
        let mut parts = KeyParts::default();
        set(&mut parts);
        parts
    };
    let keys = [
        part(|k| k.ip = true),
        part(|k| k.provider = true),
        part(|k| k.group = true),
        part(|k| k.member = true),
        part(|k| {
            k.ip = true;
            k.endpoint = true;
        }),
    ];
    let limits = keys
        .iter()
        .enumerate()
        .map(|(i, key)| Limit {
            scope: Scope { name: format!("limit-{i}"), covers: u128::MAX, key: *key, enforce: true, exempt: vec![] },
            unit: Unit::Requests,
            gcra: Gcra::new(1_000_000_000, Duration::from_secs(1), u32::MAX).unwrap(),
            overrides: vec![],
            token: TokenUse::Off,
            on_store_failure: OnFailure::Local,
        })
        .collect();
    let policy = Policy { limits, ipv6_prefix: 64, ..Policy::default() };
    let overflowed = prometheus::IntCounter::new("overflowed", "overflowed").unwrap();
    let limiter = Limiter::new(Memory::new(64 << 20, overflowed).unwrap(), None);
    let admission = Admission::new(policy, Arc::new(limiter), [7; 16], vec![]);
    let (_, path, body) = requests().remove(0);
    let envelope = dialect::endpoint(path.trim_start_matches('/')).unwrap().read(&Head::default(), &body).unwrap();
    let subject = Subject {
        ip: "2001:db8::1".parse().unwrap(),
        provider: Some("a.example"),
        pattern: None,
        operation: envelope.operation,
        group: envelope.group_id,
        member: envelope.member,
        target: None,
        cost: 1,
        octets: 1000,
        at: Instant::now(),
    };
    let mut group = c.benchmark_group("decide");
    group.bench_function("five limits, the same keys", |b| {
        b.iter(|| now(admission.decide(black_box(&Subject { at: Instant::now(), ..subject }), false, true)));
    });
    let mut n = 0u64;
    group.bench_function("five limits, a new group each time", |b| {
        b.iter(|| {
            n += 1;
            let group = n.to_be_bytes();
            now(admission.decide(
                black_box(&Subject { group: Some(&group), at: Instant::now(), ..subject }),
                false,
                true,
            ))
        });
    });
    group.finish();
}

criterion_group!(benches, read, read_mimi, decide);
criterion_main!(benches);
