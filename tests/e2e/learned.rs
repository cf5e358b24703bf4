//! What the Delivery Service learns of a request beside its body, under which names; and that nobody but the gateway says
//! any of it.

use crate::harness::{Gateway, Setup, a_example, ca, send_message};
use crate::support::client::{Client, raw_tls};
use crate::support::ds::{Ds, Recorded};
use crate::support::pki::Identity;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::Method;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use std::collections::BTreeMap;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// The names that are in use unless others are configured, and those that are usual for what is off then.
const USUAL: [&str; 7] =
    ["x-moh-provider", "forwarded", "client-cert", "client-cert-chain", "x-moh-tls", "x-request-id", "traceparent"];

/// Keys of `[delivery_service.fields]`, in the same order.
const KEYS: [&str; 7] =
    ["provider", "forwarded", "client_cert", "client_cert_chain", "tls", "request_id", "traceparent"];

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// `[delivery_service.fields]` with a name for each key.
fn fields(name: impl Fn(&str) -> String) -> String {
    let lines: String = KEYS.iter().map(|key| format!("{key} = \"{}\"\n", name(key))).collect();
    format!("[delivery_service.fields]\n{lines}")
}

/// A node that speaks HTTP/1.1, and one that speaks HTTP/2.
fn on_both_sides(ds: &Ds) -> [Setup; 2] {
    [Setup::of(ds), Setup::of(ds).h2c()]
}

fn both(client: impl Fn() -> Client) -> [Client; 2] {
    [client().http1(), client().http2()]
}

async fn send(client: &Client, headers: &[(&str, &str)]) {
    let response = client.send_with(Method::POST, "/group_operation", headers, send_message()).await.unwrap();
    assert_eq!(response.status, 200, "{}", response.text());
}

fn last(ds: &Ds) -> Recorded {
    ds.requests().pop().expect("a request")
}

fn values<'a>(request: &'a Recorded, name: &str) -> Vec<&'a str> {
    request.headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect()
}

/// The value of a field that is there once.
fn one<'a>(request: &'a Recorded, name: &str) -> &'a str {
    let values = values(request, name);
    assert_eq!(values.len(), 1, "{name}: {values:?}");
    values[0]
}

/// The parts of `Forwarded` with one element (RFC 7239 §4), in whatever order.
fn forwarded(request: &Recorded, name: &str) -> BTreeMap<String, String> {
    let value = one(request, name);
    assert!(!value.contains(','), "one element: {value}");
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=').unwrap();
        (name.trim().to_ascii_lowercase(), value.trim().trim_matches('"').to_owned())
    };
    value.split(';').map(pair).collect()
}

/// A connection from this machine, for this host.
fn from_here(host: &str) -> BTreeMap<String, String> {
    let parts = [("for", "127.0.0.1"), ("host", host), ("proto", "https")];
    parts.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|octet| matches!(octet, b'0'..=b'9' | b'a'..=b'f'))
}

/// The trace ID and the parent ID of a `traceparent` that is valid (W3C Trace Context §3.2.2).
fn trace(traceparent: &str) -> (String, String) {
    let parts: Vec<&str> = traceparent.split('-').collect();
    let [version, trace, parent, flags] = parts[..] else { panic!("{traceparent}") };
    assert!(version == "00" && is_hex(trace, 32) && is_hex(parent, 16) && is_hex(flags, 2), "{traceparent}");
    assert!(!trace.bytes().all(|octet| octet == b'0') && !parent.bytes().all(|octet| octet == b'0'), "{traceparent}");
    (trace.to_owned(), parent.to_owned())
}

#[tokio::test]
async fn what_is_learnt_without_being_asked_for() {
    let ds = Ds::start().await;
    for setup in on_both_sides(&ds) {
        let gateway = Gateway::start(setup).await;
        let mut seen = vec![];
        let peers = both(|| gateway.peer()).map(|client| (client, Some("a.example")));
        let strangers = both(|| gateway.stranger()).map(|client| (client, None));
        for (client, provider) in peers.into_iter().chain(strangers) {
            send(&client, &[]).await;
            let request = last(&ds);
            let said = values(&request, "x-moh-provider");
            assert_eq!(said, Vec::from_iter(provider), "a claim is not an authentication");
            assert_eq!(forwarded(&request, "forwarded"), from_here("ds.b.example"));
            for off in ["client-cert", "client-cert-chain", "x-moh-tls"] {
                assert_eq!(values(&request, off), [""; 0], "{off}");
            }
            seen.push((one(&request, "x-request-id").to_owned(), one(&request, "traceparent").to_owned()));
        }
        let log = gateway.access_log(seen.len()).await;
        assert_eq!(log.len(), seen.len());
        for (line, (id, traceparent)) in log.iter().zip(&seen) {
            assert!(is_hex(id, 32), "{id}");
            assert_eq!(line["request_id"], id.as_str(), "the log has the ID that the node got");
            assert_eq!(&trace(traceparent).0, id, "the trace begins here");
            assert_eq!(line["trace_id"], id.as_str());
        }
        let mut ids: Vec<_> = seen.iter().map(|(id, _)| id).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), seen.len(), "each has its own");
    }
}

#[tokio::test]
async fn the_host_that_was_asked_for() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    for host in ["ds.b.example:8443", "also-b.example"] {
        for client in both(|| gateway.peer().authority(host)) {
            send(&client, &[]).await;
            assert_eq!(forwarded(&last(&ds), "forwarded"), from_here(host));
        }
    }
}

// === Certificates (RFC 9440) ===

/// A byte sequence (RFC 8941 §3.3.5).
fn sequence(value: &str) -> Vec<u8> {
    let base64 = value.strip_prefix(':').and_then(|rest| rest.strip_suffix(':'));
    BASE64_STANDARD.decode(base64.unwrap_or_else(|| panic!("no byte sequence: {value}"))).unwrap()
}

fn der(pem: &str) -> Vec<Vec<u8>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).map(|der| der.unwrap().to_vec()).collect()
}

/// A certificate of a.example by an authority that the federation's has certified, which it brings along.
fn by_an_intermediate() -> Identity {
    ca().below("intermediate").issue(&["a.example"])
}

#[tokio::test]
async fn the_certificate_and_what_it_chains_by() {
    let ds = Ds::start().await;
    let names = "[delivery_service.fields]\nclient_cert = \"client-cert\"\nclient_cert_chain = \"client-cert-chain\"";
    for setup in on_both_sides(&ds) {
        let gateway = Gateway::start(setup.with(names)).await;
        for identity in [a_example(), by_an_intermediate()] {
            let chain = der(&identity.chain_pem);
            for client in both(|| gateway.stranger().identity(&identity)) {
                send(&client, &[]).await;
                let request = last(&ds);
                assert_eq!(sequence(one(&request, "client-cert")), chain[0]);
                match values(&request, "client-cert-chain")[..] {
                    [] => assert_eq!(chain.len(), 1, "it has brought an intermediate"),
                    [list] => {
                        let rest: Vec<_> = list.split(',').map(|item| sequence(item.trim())).collect();
                        assert_eq!(rest, chain[1..]);
                        assert!(!rest.is_empty(), "a list of none is no list");
                    }
                    ref more => panic!("{more:?}"),
                }
                assert_eq!(one(&request, "x-moh-provider"), "a.example");
            }
        }
        // A session that is resumed is with whom it was begun with.
        let identity = by_an_intermediate();
        let chain = der(&identity.chain_pem);
        let returning = gateway.stranger().identity(&identity).http1();
        for n in 1..=2 {
            send(&returning, &[("connection", "close")]).await;
            let request = last(&ds);
            assert_eq!(sequence(one(&request, "client-cert")), chain[0]);
            assert_eq!(sequence(one(&request, "client-cert-chain")), chain[1]);
            assert_eq!(returning.connections(), n);
        }
        for client in both(|| gateway.stranger()) {
            send(&client, &[("client-cert", ":AAAA:"), ("client-cert-chain", ":AAAA:")]).await;
            let request = last(&ds);
            for name in ["client-cert", "client-cert-chain"] {
                assert_eq!(values(&request, name), [""; 0], "who has shown none has none");
            }
        }
    }
}

// === TLS ===

#[tokio::test]
async fn the_channel() {
    let ds = Ds::start().await;
    for setup in on_both_sides(&ds) {
        let gateway = Gateway::start(setup.with("[delivery_service.fields]\ntls = \"x-moh-tls\"")).await;
        let mut stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["http/1.1"], None).await.unwrap();
        let session = stream.get_ref().1;
        let suite = session.negotiated_cipher_suite().unwrap().suite();
        let group = session.negotiated_key_exchange_group().unwrap().name();
        let expected = format!("version=TLSv1.3;cipher={suite:?};group={group:?}");
        let body = send_message();
        let head = format!(
            "POST /group_operation HTTP/1.1\r\nHost: ds.b.example\r\nContent-Type: application/octet-stream\r\n\
             Content-Length: {}\r\nX-Moh-Tls: version=none\r\nConnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(&[head.as_bytes(), &body].concat()).await.unwrap();
        let mut answer = vec![];
        stream.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        assert_eq!(one(&last(&ds), "x-moh-tls"), expected);
        for client in both(|| gateway.peer()) {
            send(&client, &[]).await;
            assert_eq!(one(&last(&ds), "x-moh-tls"), expected, "the same client, the same choice");
        }
    }
}

// === Traces ===

#[tokio::test]
async fn a_trace_goes_on_or_begins() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let broken = [
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
        "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00F067AA0BA902B7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "what is this",
    ];
    let broken = broken.iter().map(|value| vec![("traceparent", *value)]);
    let twice = vec![("traceparent", TRACEPARENT), ("traceparent", TRACEPARENT)];
    let broken: Vec<_> = broken.chain([vec![], twice]).collect();
    let mut expected = vec![];
    for client in both(|| gateway.peer()) {
        send(&client, &[("traceparent", TRACEPARENT)]).await;
        let request = last(&ds);
        assert_eq!(one(&request, "traceparent"), TRACEPARENT, "not a digit is changed");
        let id = one(&request, "x-request-id").to_owned();
        assert_ne!(id, trace(TRACEPARENT).0);
        expected.push((id, trace(TRACEPARENT).0));
        for headers in &broken {
            send(&client, headers).await;
            let request = last(&ds);
            let id = one(&request, "x-request-id").to_owned();
            let (begun, _) = trace(one(&request, "traceparent"));
            assert_eq!(begun, id, "{headers:?}");
            expected.push((id, begun));
        }
    }
    let log = gateway.access_log(expected.len()).await;
    let logged: Vec<_> = log
        .iter()
        .map(|line| (line["request_id"].as_str().unwrap().to_owned(), line["trace_id"].as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(logged, expected);
}

// === Names ===

/// With hyphens, and with underscores, which some servers behind take for hyphens.
fn spelt(name: &str) -> Vec<String> {
    let mut spelt = vec![name.replace('_', "-"), name.replace('-', "_"), name.replacen('-', "_", 1)];
    spelt.sort();
    spelt.dedup();
    spelt
}

/// Fields that say what only the gateway may, under each of these names, and one that says nothing of the kind.
fn forged(names: &[String]) -> Vec<(String, &'static str)> {
    let names = names.iter().flat_map(|name| spelt(name)).map(|name| (name, "forged"));
    names.chain([("x-harmless".to_owned(), "kept")]).collect()
}

/// Sends forged fields.
async fn forge(client: &Client, forged: &[(String, &str)]) {
    let headers: Vec<(&str, &str)> = forged.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    send(client, &headers).await;
}

/// Nothing of what was forged has come.
fn nothing_is_forged(request: &Recorded) {
    for (name, value) in &request.headers {
        assert_ne!(value, "forged", "{name} is a stranger's");
    }
    assert_eq!(one(request, "x-harmless"), "kept");
}

fn usual_and_old() -> impl Iterator<Item = String> {
    let old = ["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip"];
    USUAL.into_iter().chain(old).map(str::to_owned)
}

#[tokio::test]
async fn names_are_the_operators() {
    let ds = Ds::start().await;
    let hyphens: fn(&str) -> String = |key| format!("X-Op-{}", key.replace('_', "-"));
    let underscores: fn(&str) -> String = |key| format!("x_op_{key}");
    for name in [hyphens, underscores] {
        for setup in on_both_sides(&ds) {
            let gateway = Gateway::start(setup.with(&fields(name))).await;
            let all: Vec<String> = KEYS.iter().map(|key| name(key)).chain(usual_and_old()).collect();
            let forged = forged(&all);
            let identity = by_an_intermediate();
            let mut ids = vec![];
            for client in both(|| gateway.stranger()) {
                forge(&client, &forged).await;
                let request = last(&ds);
                nothing_is_forged(&request);
                for key in ["provider", "client_cert", "client_cert_chain"] {
                    for spelling in spelt(&name(key)) {
                        assert_eq!(values(&request, &spelling), [""; 0], "{spelling} of a stranger");
                    }
                }
                ids.push(said_under(&request, name));
            }
            for client in both(|| gateway.stranger().identity(&identity)) {
                forge(&client, &forged).await;
                let request = last(&ds);
                nothing_is_forged(&request);
                let chain = der(&identity.chain_pem);
                assert_eq!(one(&request, &name("provider")), "a.example");
                assert_eq!(sequence(one(&request, &name("client_cert"))), chain[0]);
                assert_eq!(sequence(one(&request, &name("client_cert_chain"))), chain[1]);
                ids.push(said_under(&request, name));
            }
            let log = gateway.access_log(ids.len()).await;
            assert_eq!(log.iter().map(|line| line["request_id"].as_str().unwrap()).collect::<Vec<_>>(), ids);
        }
    }
}

/// What is said of everybody is said under these names, and under no other; the ID of the request.
fn said_under(request: &Recorded, name: fn(&str) -> String) -> String {
    for usual in USUAL {
        for spelling in spelt(usual) {
            assert_eq!(values(request, &spelling), [""; 0], "{spelling}: it has another name");
        }
    }
    assert_eq!(forwarded(request, &name("forwarded")), from_here("ds.b.example"));
    assert!(one(request, &name("tls")).starts_with("version=TLSv1.3;cipher="));
    let id = one(request, &name("request_id"));
    assert!(is_hex(id, 32), "{id}");
    assert_eq!(trace(one(request, &name("traceparent"))).0, id);
    id.to_owned()
}

#[tokio::test]
async fn a_trace_under_another_name_is_read_from_its_own() {
    let ds = Ds::start().await;
    let setup = Setup::of(&ds).with("[delivery_service.fields]\ntraceparent = \"x-op-trace\"");
    let gateway = Gateway::start(setup).await;
    for client in both(|| gateway.peer()) {
        let other = "00-11111111111111111111111111111111-2222222222222222-01";
        send(&client, &[("traceparent", TRACEPARENT), ("x-op-trace", other)]).await;
        let request = last(&ds);
        assert_eq!(one(&request, "x-op-trace"), TRACEPARENT);
        assert_eq!(values(&request, "traceparent"), [""; 0]);
    }
}

#[tokio::test]
async fn no_name_is_no_field() {
    let ds = Ds::start().await;
    for setup in on_both_sides(&ds) {
        let gateway = Gateway::start(setup.with(&fields(|_| String::new()))).await;
        let forged = forged(&usual_and_old().collect::<Vec<_>>());
        let mut sent = 0;
        for client in both(|| gateway.peer()).into_iter().chain(both(|| gateway.stranger())) {
            forge(&client, &forged).await;
            sent += 1;
            let request = last(&ds);
            nothing_is_forged(&request);
            for name in usual_and_old().flat_map(|name| spelt(&name)) {
                assert_eq!(values(&request, &name), [""; 0], "{name}");
            }
        }
        let log = gateway.access_log(sent).await;
        assert_eq!(log.len(), sent);
        assert!(log.iter().all(|line| is_hex(line["request_id"].as_str().unwrap(), 32)), "the log has it all the same");
    }
}

#[tokio::test]
async fn names_are_changed_while_it_runs() {
    let ds = Ds::start().await;
    let mut gateway = Gateway::start(Setup::of(&ds)).await;
    let client = gateway.peer();
    send(&client, &[]).await;
    assert_eq!(one(&last(&ds), "x-moh-provider"), "a.example");
    let renamed = |setup: &mut Setup| setup.more = "[delivery_service.fields]\nprovider = \"x-op-provider\"".into();
    gateway.reload("ok", renamed).await;
    send(&client, &[("x-op-provider", "forged")]).await;
    let request = last(&ds);
    assert_eq!(one(&request, "x-op-provider"), "a.example");
    assert_eq!(values(&request, "x-moh-provider"), [""; 0]);
    assert_eq!(client.connections(), 1, "on the connection that it has");
}
