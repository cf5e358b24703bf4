//! What the path of a request must not do: allocate, where it reads `send_message` and where it asks its limits.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

#[path = "support/encode.rs"]
mod encode;

use moh_gateway::admission::{Admission, Decision, KeyParts, Limit, Policy, Scope, Subject, TokenUse, Unit};
use moh_gateway::dialect::{self, Head};
use moh_gateway::limiter::gcra::Gcra;
use moh_gateway::limiter::memory::Memory;
use moh_gateway::limiter::{Limiter, OnFailure};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

fn send_message() -> Vec<u8> {
    let message = [&[0, 1, 0, 2][..], &encode::vector(b"group"), &[0; 40]].concat();
    encode::ds_request("a.example", "b.example", &encode::SenderId::Leaf(7), encode::SEND_MESSAGE, &message, b"s")
}

#[test]
fn reading_a_message_allocates_nothing() {
    let body = send_message();
    let (endpoint, head) = (dialect::endpoint("group_operation").unwrap(), Head::default());
    let counted = allocation_counter::measure(|| {
        assert!(endpoint.read(&head, &body).is_ok());
        assert!(endpoint.read(&head, &body[..20]).is_err());
    });
    assert_eq!(counted.count_total, 0);
}

#[test]
fn reading_a_submitted_message_allocates_nothing() {
    let message =
        [&[0, 1, 0, 2][..], &encode::vector(b"group"), &[0; 8], &[1, 0, 0], &encode::vector(&[1; 900])].concat();
    let body = [&[1], &message[..], &encode::vector(b"mimi://a.example/u/alice")].concat();
    let endpoint = dialect::endpoint("submitMessage").unwrap();
    let head = Head { host: "b.example", from: Some(b"mimi@a.example"), parameter: "mimi://b.example/r/room" };
    let counted = allocation_counter::measure(|| {
        let envelope = endpoint.read(&head, &body).unwrap();
        assert_eq!(envelope.decided_at, body.len());
        // What limits and nodes know the room by.
        assert_eq!(&*envelope.group().unwrap().octets(), b"mimi://b.example/r/room");
        assert!(endpoint.read(&head, &body[..body.len() - 1]).is_err());
    });
    assert_eq!(counted.count_total, 0);
}

#[test]
fn a_decision_with_five_limits_allocates_nothing() {
    let all = KeyParts { ip: true, provider: true, group: true, member: true, target: true, endpoint: true };
    let gcra = Gcra::new(1, Duration::from_secs(1), 100).unwrap();
    let limit = |name: usize| Limit {
        scope: Scope { name: name.to_string(), covers: u128::MAX, key: all, enforce: true, exempt: vec![] },
        unit: Unit::Requests,
        gcra,
        overrides: vec![],
        token: TokenUse::Off,
        on_store_failure: OnFailure::Local,
    };
    let policy = Policy { limits: (0..5).map(limit).collect(), ipv6_prefix: 64, ..Policy::default() };
    let overflowed = prometheus::IntCounter::new("o", "o").unwrap();
    let limiter = Limiter::new(Memory::new(1 << 20, overflowed).unwrap(), None);
    let admission = Admission::new(policy, Arc::new(limiter), [1; 16], vec![]);
    let body = send_message();
    let envelope = dialect::endpoint("group_operation").unwrap().read(&Head::default(), &body).unwrap();
    let subject = Subject {
        ip: "192.0.2.1".parse().unwrap(),
        provider: Some("a.example"),
        pattern: None,
        operation: envelope.operation,
        group: envelope.group_id,
        member: envelope.member,
        target: None,
        cost: 1,
        octets: 100,
        at: Instant::now(),
    };
    let counted = allocation_counter::measure(|| {
        let decided = std::pin::pin!(admission.decide(&subject, false, true));
        let Poll::Ready((decision, tally)) = decided.poll(&mut Context::from_waker(Waker::noop())) else {
            panic!("a decision in memory waits for nothing");
        };
        assert_eq!(decision, Decision::Pass { topped_up: false });
        admission.account(&tally);
    });
    assert_eq!(counted.count_total, 0);
}
