//! The design's table of refusals, each line of it over TLS, over both versions of HTTP.

use crate::harness::{Gateway, Setup, a_example, ca, large_message, send_message};
use crate::support::client::{Client, Response};
use crate::support::ds::Ds;
use crate::support::encode;
use http::Method;

const TYPE: &str = "tag:moh-gateway.example,2026:problem:";

pub fn is_problem(response: &Response, status: u16, reason: &str) {
    assert_eq!(response.status, status, "{}", response.text());
    assert_eq!(response.header("content-type"), Some("application/problem+json"));
    let document = response.json();
    assert_eq!(document["status"], status);
    assert_eq!(document["type"], format!("{TYPE}{reason}"), "{document}");
    assert!(document["title"].as_str().is_some_and(|title| !title.is_empty()));
}

pub fn both(client: impl Fn() -> Client) -> [Client; 2] {
    [client().http1(), client().http2()]
}

#[tokio::test]
async fn paths_methods_and_content_types() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    for client in both(|| gateway.peer()) {
        for path in
            ["/", "/metrics", "/group_operation/", "/group_operation?x=1", "/group%5foperation", "/../group_operation"]
        {
            is_problem(&client.send(Method::POST, path, send_message()).await.unwrap(), 404, "unknown-path");
        }
        let response = client.send(Method::GET, "/group_operation", send_message()).await.unwrap();
        is_problem(&response, 405, "wrong-method");
        assert_eq!(response.header("allow"), Some("POST"));
        let response = client.send(Method::POST, "/welcome_information", send_message()).await.unwrap();
        is_problem(&response, 405, "wrong-method");
        assert_eq!(response.header("allow"), Some("GET"));
        for header in [("content-type", ""), ("content-type", "application/json"), ("content-encoding", "gzip")] {
            let response = client.send_with(Method::POST, "/group_operation", &[header], send_message()).await.unwrap();
            is_problem(&response, 415, "wrong-content-type");
            assert_eq!(response.header("accept-post"), Some("application/octet-stream"));
        }
        let typed = [("content-type", "Application/Octet-Stream; x=y")];
        let response = client.send_with(Method::POST, "/group_operation", &typed, send_message()).await.unwrap();
        assert_ne!(response.status, 415);
    }
    assert!(ds.requests().iter().all(|r| r.path == "/group_operation"), "nothing else of the DS is reachable");
    assert_eq!(ds.complete(), 2);
}

#[tokio::test]
async fn malformed_bodies_name_field_and_offset() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    for client in both(|| gateway.peer()) {
        let mut body = send_message();
        body[1] = 9;
        let response = client.send(Method::POST, "/group_operation", body).await.unwrap();
        is_problem(&response, 400, "malformed");
        assert_eq!((response.json()["field"].as_str(), response.json()["offset"].as_u64()), (Some("version"), Some(0)));

        let response = client.send(Method::POST, "/group_operation", send_message()[..40].to_vec()).await.unwrap();
        is_problem(&response, 400, "malformed");
        assert_eq!(response.json()["field"], "group_id");
        assert_eq!(response.json()["offset"], 32);
        is_problem(&client.send(Method::POST, "/group_operation", "").await.unwrap(), 400, "malformed");
    }
    assert_eq!(ds.begun(), 0);
}

#[tokio::test]
async fn what_is_not_ours_is_misdirected() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let request = |recipient| encode::verification_key_request("a.example", recipient);
    for client in both(|| gateway.peer()) {
        let response = client.send(Method::GET, "/verification_key", request("c.example")).await.unwrap();
        is_problem(&response, 421, "misdirected");
        assert!(!response.text().contains("also-b"), "the configuration does not leak");
        assert_eq!(client.send(Method::GET, "/verification_key", request("ALSO-b.example")).await.unwrap().status, 200);
    }
    for client in both(|| gateway.peer().authority("c.example")) {
        is_problem(
            &client.send(Method::GET, "/verification_key", request("b.example")).await.unwrap(),
            421,
            "misdirected",
        );
        is_problem(&client.send(Method::GET, "/.well-known/mimi/ds-domain", "").await.unwrap(), 421, "misdirected");
    }
    for client in both(|| gateway.peer().sni("c.example").trust_anyone()) {
        is_problem(
            &client.send(Method::GET, "/verification_key", request("b.example")).await.unwrap(),
            421,
            "misdirected",
        );
    }
    for client in both(|| gateway.peer().authority("B.example:8443")) {
        assert_eq!(client.send(Method::GET, "/verification_key", request("b.example")).await.unwrap().status, 200);
    }
    assert_eq!(ds.complete(), 4);
}

#[tokio::test]
async fn senders_are_bound_to_their_certificates() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds).with("[peers]\nallow = [\"a.example\", \"*.d.example\"]")).await;
    let request = |sender| encode::verification_key_request(sender, "b.example");
    for client in both(|| gateway.peer()) {
        let response = client.send(Method::GET, "/verification_key", request("c.example")).await.unwrap();
        is_problem(&response, 403, "sender-mismatch");
        assert_eq!(client.send(Method::GET, "/verification_key", request("A.example")).await.unwrap().status, 200);
    }
    let c_example = ca().issue(&["c.example"]);
    for client in both(|| gateway.stranger().identity(&c_example)) {
        is_problem(
            &client.send(Method::GET, "/verification_key", request("c.example")).await.unwrap(),
            403,
            "peer-not-allowed",
        );
    }
    for client in both(|| gateway.stranger()) {
        let response = client.send(Method::GET, "/verification_key", request("a.example")).await.unwrap();
        is_problem(&response, 403, "peer-not-allowed");
    }
    let several = ca().issue(&["x.d.example", "a.example"]);
    for client in both(|| gateway.stranger().identity(&several)) {
        for (sender, status) in [("x.d.example", 200), ("a.example", 200), ("y.d.example", 403)] {
            assert_eq!(client.send(Method::GET, "/verification_key", request(sender)).await.unwrap().status, status);
        }
    }
    assert_eq!(ds.complete(), 6);
}

#[tokio::test]
async fn bodies_over_their_bound() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds).with("[endpoints.group_operation]\nmax_body = \"100KiB\"")).await;
    for client in both(|| gateway.peer()) {
        // Said before: refused before a node hears of it.
        let begun = ds.begun();
        let mut upload = client.begin(Method::POST, "/group_operation", &[], Some(100 * 1024 + 1)).await.unwrap();
        is_problem(&upload.answer().await.unwrap(), 413, "too-large");
        assert_eq!(ds.begun(), begun);

        // Not said: refused when it goes over.
        let complete = ds.complete();
        let mut upload = client.begin(Method::POST, "/group_operation", &[], None).await.unwrap();
        for piece in large_message(200 * 1024).chunks(10_000) {
            if upload.write(piece.to_vec()).await.is_err() {
                break;
            }
        }
        is_problem(&upload.answer().await.unwrap(), 413, "too-large");
        assert_eq!(ds.complete(), complete, "the node sees it broken off");
        assert_eq!(client.send(Method::POST, "/group_operation", large_message(100 * 1024)).await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn a_ds_that_refuses_hangs_or_is_gone() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let client = gateway.peer();
    let send = || client.send(Method::POST, "/group_operation", send_message());
    ds.hang(true);
    is_problem(&send().await.unwrap(), 504, "gateway-timeout");
    is_problem(
        &gateway.peer().http1().send(Method::POST, "/group_operation", send_message()).await.unwrap(),
        504,
        "gateway-timeout",
    );
    ds.hang(false);
    assert_eq!(send().await.unwrap().status, 200);
    ds.stop().await;
    is_problem(&send().await.unwrap(), 502, "bad-gateway");
    let response = send().await.unwrap();
    is_problem(&response, 503, "no-node");
    assert_eq!(response.header("retry-after"), Some("1"));
    let back = Ds::start_at(ds.addr, ds.delivery.clone()).await;
    tokio::time::sleep(std::time::Duration::from_millis(1050)).await;
    assert_eq!(send().await.unwrap().status, 200, "who waits as long as told is served");
    assert_eq!(back.complete(), 1);
}

#[tokio::test]
async fn no_certificate_where_one_is_required() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup { client_certificates: "required", ..Setup::of(&ds) }).await;
    let request = || encode::verification_key_request("a.example", "b.example");
    let refused = gateway.stranger().send(Method::GET, "/verification_key", request()).await;
    assert!(refused.is_err(), "{refused:?}");
    let foreign = crate::support::pki::Ca::new("another").issue(&["a.example"]);
    assert!(gateway.stranger().identity(&foreign).send(Method::GET, "/verification_key", request()).await.is_err());
    let response = gateway.stranger().identity(&a_example()).send(Method::GET, "/verification_key", request()).await;
    assert_eq!(response.unwrap().status, 200);
    assert!(gateway.metric("moh_gateway_tls_handshakes_total{result=\"failed\"}").await >= 2.0);
    assert_eq!(ds.complete(), 1);
}
