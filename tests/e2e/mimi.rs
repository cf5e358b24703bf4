//! The dialect `mimi` (draft-ietf-mimi-protocol-06) over real mutual TLS: what the vectors say, paths and the directory
//! of them, who may send what, limits of rooms and users, and bodies that are held until their end says whose they are.

use crate::command_line::{check, run};
use crate::harness::{Gateway, Setup, a_example, ca, config, large_message, material, send_message};
use crate::refusals::{both, is_problem};
use crate::support::client::{Client, Response, raw_tls};
use crate::support::ds::Ds;
use crate::support::encode::vector;
use crate::support::mimi::{
    self as dialect, AbuseReport, AppDataDictionary, CANCEL, CIPHERSUITE, ConsentEntry, Credential, Encoding, Fanned,
    FanoutMessage, GRANT, GroupInfoOption, GroupInfoRequest, HANDLE, HandshakeBundle, IdentifierRequest,
    KeyMaterialRequest, MLS10, QueryElement, REQUEST, REVOKE, RatchetTreeOption, RequiredCapabilities,
    SubmitMessageRequest,
};
use crate::support::program::free_address;
use crate::support::tokens::{Issuer, authorization, challenges};
use crate::tokens::outcome;
use crate::upgrade::until;
use bytes::Bytes;
use http::{Method, Version};
use serde_json::Value;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// What a listener serves.
pub const MIMI: &str = "dialects = [\"mimi\"]";
const BOTH: &str = "dialects = [\"moh\", \"mimi\"]";

/// Who sends, as the head has it.
pub const FROM: (&str, &str) = ("from", "mimi@a.example");

const DIRECTORY: &str = "/.well-known/mimi-protocol-directory";

/// A room of this provider, and one whose hub is the sender.
const ROOM: &str = "mimi://b.example/r/clubhouse";
const THEIR_ROOM: &str = "mimi://a.example/r/clubhouse";

const ALICE: &str = "mimi://a.example/u/alice";
const BOB: &str = "mimi://b.example/u/bob";

/// Octets of bodies that are held.
const HELD: &str = "moh_gateway_held_body_octets";

/// Clients may take their time, longer than anything takes here.
const PATIENT: &str = "headers = \"20s\"\nbody_idle = \"15s\"\nbody_total = \"30s\"\nshutdown = \"5s\"";

/// A gateway for other providers' servers alone, which speak this dialect.
pub fn required(ds: &Ds) -> Setup {
    Setup { client_certificates: "required", ..Setup::of(ds) }.listener(MIMI)
}

/// a.example's server, which asks for b.example.
pub fn peer(gateway: &Gateway) -> Client {
    gateway.peer().authority("b.example")
}

/// Another provider's.
fn of_provider(gateway: &Gateway, name: &str) -> Client {
    gateway.stranger().identity(&ca().issue(&[name])).authority("b.example")
}

/// The path of an endpoint as the draft has it.
fn at(endpoint: &str, parameter: &str) -> String {
    dialect::path(endpoint, parameter.as_bytes())
}

async fn post_from(client: &Client, from: &str, path: &str, body: impl Into<Bytes>) -> Response {
    client.send_with(Method::POST, path, &[("from", from)], body).await.unwrap()
}

async fn post(client: &Client, path: &str, body: impl Into<Bytes>) -> Response {
    post_from(client, FROM.1, path, body).await
}

async fn status(client: &Client, path: &str, body: impl Into<Bytes>) -> u16 {
    post(client, path, body).await.status.as_u16()
}

async fn directory(client: &Client) -> Response {
    client.send_with(Method::GET, DIRECTORY, &[("content-type", "")], "").await.unwrap()
}

/// A limit that nothing comes back to while a test runs.
fn limit(name: &str, endpoints: &[&str], key: &[&str], burst: u32) -> String {
    format!("[[limit]]\nname = \"{name}\"\nendpoints = {endpoints:?}\nkey = {key:?}\nrate = \"1/h\"\nburst = {burst}\n")
}

// === Bodies ===

/// A private message of any group, whole.
fn private_message(group: &[u8], ciphertext: usize) -> Vec<u8> {
    let head = [&[0u8, 1, 0, 2][..], &vector(group), &[0; 8], &[1]].concat();
    [&head[..], &vector(b""), &vector(b"sender data"), &vector(&vec![7; ciphertext])].concat()
}

fn submit(message: &[u8], sender: &str) -> Vec<u8> {
    let sending_uri = sender.as_bytes().to_vec();
    SubmitMessageRequest { protocol: MLS10, message: message.to_vec(), sending_uri }.encode()
}

/// A `SubmitMessageRequest` with a real message, of a user of the sender.
fn submit_by(sender: &str) -> Vec<u8> {
    submit(&material().message, sender)
}

/// An `UpdateRequest` with a real commit.
fn update() -> Vec<u8> {
    let m = material();
    HandshakeBundle::Commit {
        commit: m.commit.clone(),
        welcome: Some(dialect::bare(&m.welcome)),
        group_info: GroupInfoOption::Partial { ratchet_tree_presence: 1, extensions: vec![], signature: vec![3; 64] },
        ratchet_tree: RatchetTreeOption::DistributionService,
    }
    .encode()
}

fn fan_out(message: &[u8], fanned: Fanned) -> Vec<u8> {
    FanoutMessage { timestamp: 1_777_777_777_777, message: message.to_vec(), fanned }.encode()
}

fn key_material(requester: &str, target: &str, room: &str) -> Vec<u8> {
    KeyMaterialRequest {
        protocol: MLS10,
        requesting_user: requester.as_bytes().to_vec(),
        target_user: target.as_bytes().to_vec(),
        room_id: room.as_bytes().to_vec(),
        ciphersuites: vec![CIPHERSUITE],
        capabilities: RequiredCapabilities::default(),
        signature_key: vec![5; 32],
        credential: Credential::Basic(requester.as_bytes().to_vec()),
        signature: vec![6; 64],
    }
    .encode()
}

fn group_info(key: &[u8]) -> Vec<u8> {
    GroupInfoRequest {
        protocol: MLS10,
        ciphersuite: CIPHERSUITE,
        signature_key: key.to_vec(),
        credential: Credential::Basic(ALICE.as_bytes().to_vec()),
        group_info_public_key: vec![4; 32],
        joining_code: vec![],
        signature: vec![6; 64],
    }
    .encode()
}

fn consent(operation: u8, requester: &str, target: &str, room: Option<&str>) -> Vec<u8> {
    ConsentEntry {
        operation,
        requester_uri: requester.as_bytes().to_vec(),
        target_uri: target.as_bytes().to_vec(),
        room_id: room.map(|room| room.as_bytes().to_vec()),
        key_packages: vec![],
        extensions: AppDataDictionary::default(),
    }
    .encode()
}

/// A query of so many elements.
fn query(elements: usize) -> Vec<u8> {
    let elements = vec![QueryElement::new(HANDLE, b"im:bob@b.example"); elements];
    IdentifierRequest { elements, extensions: AppDataDictionary::default() }.encode()
}

fn report(reporter: &str) -> Vec<u8> {
    AbuseReport {
        reporting_user: reporter.as_bytes().to_vec(),
        alleged_abuser_uri: BOB.as_bytes().to_vec(),
        reason: 0,
        note: b"unwanted".to_vec(),
        messages: vec![],
        extensions: AppDataDictionary::default(),
    }
    .encode()
}

/// Requests for each endpoint of which the Delivery Service gets the body: endpoint, parameter, body, of real MLS.
fn every_request() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let m = material();
    vec![
        ("keyMaterial", BOB, key_material(ALICE, BOB, THEIR_ROOM)),
        ("keyMaterial", BOB, key_material(ALICE, BOB, "")),
        ("update", ROOM, update()),
        ("notify", THEIR_ROOM, fan_out(&m.message, Fanned::Application(None))),
        ("notify", THEIR_ROOM, fan_out(&m.commit, Fanned::Commit(vec![]))),
        ("notify", THEIR_ROOM, fan_out(&m.welcome, Fanned::Welcome(RatchetTreeOption::DistributionService))),
        ("submitMessage", ROOM, submit_by(ALICE)),
        ("submitMessage", "im:clubhouse@b.example", submit_by("im:alice@a.example")),
        ("groupInfo", ROOM, group_info(&[5; 32])),
        ("requestConsent", "b.example", consent(REQUEST, ALICE, BOB, None)),
        ("requestConsent", BOB, consent(CANCEL, ALICE, BOB, Some(ROOM))),
        ("updateConsent", "b.example", consent(GRANT, BOB, ALICE, None)),
        ("updateConsent", BOB, consent(REVOKE, BOB, ALICE, Some(THEIR_ROOM))),
        ("identifierQuery", "b.example", query(2)),
        ("reportAbuse", ROOM, report(ALICE)),
        ("reportAbuse", ROOM, report("")),
    ]
}

// === The vectors ===

/// The vectors hold others' data and are not in this project: `$MOH_VECTORS` says where they are.
fn vectors() -> Option<Vec<Value>> {
    let Some(folder) = std::env::var_os("MOH_VECTORS") else {
        eprintln!("MOH_VECTORS is not set: the vectors are not read (tests/corpus.rs is the project's own)");
        return None;
    };
    let text = std::fs::read(Path::new(&folder).join("mimi.json")).unwrap();
    let mut vectors: Value = serde_json::from_slice(&text).unwrap();
    let Value::Array(cases) = vectors["cases"].take() else { panic!("no list of cases") };
    assert!(cases.len() >= 304, "{} are not all of them", cases.len());
    Some(cases)
}

fn text<'c>(case: &'c Value, key: &str) -> &'c str {
    case[key].as_str().unwrap_or_else(|| panic!("no {key} in {case}"))
}

#[tokio::test]
async fn the_vectors_over_mutual_tls() {
    const ANSWER: &str = "what the service says";
    let Some(cases) = vectors() else { return };
    let ds = Ds::start().await;
    let gateway = Gateway::start(required(&ds)).await;
    ds.set_response(200, &[("x-ds", "kept")], ANSWER);
    let mut clients: HashMap<(String, bool), Client> = HashMap::new();
    let mut went_on = vec![];
    for case in &cases {
        let (name, path, host) = (text(case, "name"), text(case, "path"), text(case, "host"));
        let method = Method::from_bytes(text(case, "method").as_bytes()).unwrap();
        let body = hex::decode(text(case, "body")).unwrap();
        let (status, reason) = match text(&case["expect"], "outcome") {
            "accept" => (200, ""),
            "misdirected" => (421, "misdirected"),
            "sender-mismatch" => (403, "sender-mismatch"),
            "malformed" => (400, "malformed"),
            other => panic!("{name}: {other}"),
        };
        for http1 in [true, false] {
            let client = clients.entry((host.to_owned(), http1)).or_insert_with(|| {
                let client = gateway.peer().authority(host);
                if http1 { client.http1() } else { client.http2() }
            });
            // One that is empty is not sent, which is to come to the same.
            let from = [("from", text(case, "from"))];
            let response = client.send_with(method.clone(), path, &from, body.clone()).await;
            let response = response.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(outcome(&response), (status, reason.to_owned()), "{name} by {:?}", response.version);
            if status == 200 {
                assert_eq!((response.text().as_str(), response.header("x-ds")), (ANSWER, Some("kept")), "{name}");
                went_on.push((name, path, body.clone()));
            } else {
                assert_eq!(response.header("content-type"), Some("application/problem+json"), "{name}");
                assert_eq!(response.json()["status"], status, "{name}");
            }
        }
    }
    assert!(went_on.len() >= 2 * 136, "{} were accepted", went_on.len());
    let came = ds.requests();
    assert_eq!((ds.begun(), came.len()), (went_on.len(), went_on.len()), "of those that are refused nothing comes");
    for (came, (name, path, body)) in came.iter().zip(&went_on) {
        assert_eq!(came.path.as_str(), *path, "{name}: the path as it came");
        assert!(came.body == *body, "{name}: not an octet is changed");
    }
}

#[test]
fn explain_agrees_with_the_vectors() {
    let Some(cases) = vectors() else { return };
    let lines: Vec<String> = cases.iter().map(Value::to_string).collect();
    let output = run(&["explain", "--jsonl"], lines.join("\n").as_bytes());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said: Vec<Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(said.len(), cases.len());
    for (case, said) in cases.iter().zip(&said) {
        let name = text(case, "name");
        let expected = case["expect"].as_object().unwrap();
        for (key, value) in expected {
            assert_eq!(said.get(key), Some(value), "{key} of {name}");
        }
        if text(said, "outcome") == "accept" {
            let more: Vec<&str> = said
                .as_object()
                .unwrap()
                .keys()
                .map(String::as_str)
                .filter(|key| !expected.contains_key(*key))
                .collect();
            assert_eq!(more, ["decided_at"], "{name}");
            let decided_at = said["decided_at"].as_u64().unwrap();
            assert!(decided_at <= text(case, "body").len() as u64 / 2, "{name}: at {decided_at}");
        }
    }
}

// === What goes on ===

#[tokio::test]
async fn every_endpoint_over_both_versions_on_both_sides() {
    let ds = Ds::start().await;
    ds.set_response(207, &[("content-type", "application/x-ds"), ("x-ds", "kept")], vec![0u8, 1, 2, 255]);
    for (setup, version) in [(required(&ds), Version::HTTP_11), (required(&ds).h2c(), Version::HTTP_2)] {
        let gateway = Gateway::start(setup).await;
        for client in both(|| peer(&gateway)) {
            for (endpoint, parameter, body) in every_request() {
                let (path, before) = (at(endpoint, parameter), ds.complete());
                let response = post(&client, &path, body.clone()).await;
                assert_eq!(response.status, 207, "{path}: {}", response.text());
                assert_eq!(&response.body[..], [0, 1, 2, 255]);
                assert_eq!(response.header("x-ds"), Some("kept"));
                assert_eq!(response.header("content-type"), Some("application/x-ds"));
                assert_eq!(ds.complete(), before + 1);
                let got = ds.requests().pop().unwrap();
                assert_eq!((&got.method, got.path.as_str(), got.version), (&Method::POST, path.as_str(), version));
                assert!(got.body == body, "{path}: not an octet is changed");
                assert_eq!(got.headers["from"], FROM.1);
                assert_eq!(got.headers["x-moh-provider"], "a.example");
            }
            assert_eq!(client.connections(), 1, "connections are kept");
        }
    }
}

#[tokio::test]
async fn a_body_is_of_any_type_and_as_it_is() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let gateway = Gateway::start(required(&ds)).await;
    let path = at("submitMessage", ROOM);
    for client in both(|| peer(&gateway)) {
        let before = ds.complete();
        for kind in ["", "application/octet-stream", "application/x-mimi; v=1"] {
            let fields = [FROM, ("content-type", kind)];
            let response = client.send_with(Method::POST, &path, &fields, submit_by(ALICE)).await.unwrap();
            assert_eq!(response.status, 200, "{kind}: {}", response.text());
            let got = ds.requests().pop().unwrap();
            assert_eq!(got.headers.get("content-type").map_or("", |said| said.to_str().unwrap()), kind);
        }
        let coded = [FROM, ("content-encoding", "gzip")];
        let response = client.send_with(Method::POST, &path, &coded, submit_by(ALICE)).await.unwrap();
        is_problem(&response, 415, "wrong-content-type");
        assert_eq!(ds.begun(), before + 3);
    }
}

#[tokio::test]
async fn an_update_is_decided_by_its_beginning() {
    const ALL: usize = 300_000;
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let gateway = Gateway::start(Setup { timeouts: PATIENT, ..required(&ds) }).await;
    let mut body = update();
    body.resize(ALL, 7);
    for client in both(|| peer(&gateway)) {
        for length in [Some(ALL as u64), None] {
            let begun = ds.begun();
            let upload = client.begin(Method::POST, &at("update", ROOM), &[FROM], length).await.unwrap();
            upload.write(body[..100].to_vec()).await.unwrap();
            assert!(ds.until(|ds| ds.begun() == begun + 1).await, "the rest is the service's business");
            gateway.until_metric(HELD, |n| n == 0.0).await;
            for piece in body[100..].chunks(7_001) {
                upload.write(piece.to_vec()).await.unwrap();
            }
            assert_eq!(upload.finish().await.unwrap().status, 200);
            assert!(ds.requests().pop().unwrap().body == body, "not an octet is changed");
        }
    }
}

// === Paths ===

#[tokio::test]
async fn paths_are_the_operators_and_parameters_stay_as_they_came() {
    let tables = r#"
[endpoints.update]
path = "/v1/update/{roomId}"
upstream_path = "/mimi/pl/update/{roomId}"
[endpoints.submitMessage]
path = "/v2/rooms/{roomId}/messages"
[endpoints.groupInfo]
upstream_path = "/internal/{roomId}/info"
"#;
    let rooms = [
        "mimi%3A%2F%2Fb.example%2Fr%2Fclub",
        "mimi%3a%2f%2fb.example%2Fr%2fclub",
        "mimi:%2F%2Fb.example%2Fr%2Fclub",
        "%6d%69%6D%69%3A%2F%2Fb.example%2Fr%2F%63lub",
        "mimi%3A%2F%2Fb.example%2Fr%2Fa%2520b",
        "MIMI%3A%2F%2FB.Example%2Fr%2Fclub",
        "im:club@b.example",
    ];
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    for setup in [required(&ds), required(&ds).h2c()] {
        let gateway = Gateway::start(setup.with(tables)).await;
        for client in both(|| peer(&gateway)) {
            for room in rooms {
                for (path, seen, body) in [
                    (format!("/v1/update/{room}"), format!("/mimi/pl/update/{room}"), update()),
                    (format!("/v2/rooms/{room}/messages"), format!("/v2/rooms/{room}/messages"), submit_by(ALICE)),
                    (format!("/groupInfo/{room}"), format!("/internal/{room}/info"), group_info(b"key")),
                ] {
                    let response = post(&client, &path, body.clone()).await;
                    assert_eq!(response.status, 200, "{path}: {}", response.text());
                    let got = ds.requests().pop().unwrap();
                    assert_eq!(got.path, seen);
                    assert!(got.body == body, "{path}");
                }
            }
        }
    }
    assert_eq!(ds.begun(), 2 * 2 * 7 * 3);
}

#[tokio::test]
async fn what_is_no_path_and_what_others_could_take_for_another() {
    let table = "[endpoints.update]\npath = \"/v1/update/{roomId}\"\nupstream_path = \"/mimi/pl/update/{roomId}\"\n";
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let gateway = Gateway::start(required(&ds).with(table)).await;
    let room = "mimi%3A%2F%2Fb.example%2Fr%2Fclub";
    let unknown = [
        format!("/update/{room}"),
        format!("/mimi/pl/update/{room}"),
        "/v1/update".to_owned(),
        "/v1/update/".to_owned(),
        format!("/v1//update/{room}"),
        format!("/v1/update/{room}/"),
        format!("/v1/update/{room}/more"),
        format!("/v1/update/{room}?x=1"),
        "/v1/update/mimi://b.example/r/club".to_owned(),
        format!("/v1%2Fupdate/{room}"),
        format!("/v1/updat%65/{room}"),
        format!("/v1/Update/{room}"),
        "/group_operation".to_owned(),
    ];
    let ambiguous = [
        "/v1/update/.".to_owned(),
        "/v1/update/..".to_owned(),
        "/v1/update/%2e".to_owned(),
        "/v1/update/%2E%2e".to_owned(),
        "/v1/update/.%2E".to_owned(),
        format!("/v1/update/../notify/{room}"),
        format!("/v1/update/{room}/.."),
        format!("/v1/update/{room}/%2e%2e/x"),
        // The empty segment is the parameter, or what comes before it.
        format!("/v1/update//{room}"),
        format!("/v1/update/{room}/x%2Fy"),
        format!("/v1/update/{room}/x%5cy"),
        format!("/v1/update/{room}/x\\y"),
        format!("/v1/update/{room}\\x"),
        format!("/v1/update/{room}%00"),
        format!("/v1/update/{room}%0A"),
        format!("/v1/update/{room}%7f"),
        format!("/v1/update/{room}%FF"),
        format!("/v1/update/{room}%C0%AF"),
        format!("/v1/update/{room}%"),
        format!("/v1/update/{room}%2"),
        format!("/v1/update/{room}%zz"),
    ];
    for client in both(|| peer(&gateway)) {
        for path in &unknown {
            let response = post(&client, path, update()).await;
            assert_eq!(outcome(&response), (404, "unknown-path".to_owned()), "{path}");
        }
        for path in &ambiguous {
            let response = post(&client, path, update()).await;
            assert_eq!(outcome(&response), (400, "malformed".to_owned()), "{path}");
            assert_eq!(response.json()["field"], "path", "{path}");
        }
        // One that is decoded well, and is no room's.
        for parameter in ["club", "mimi%3Aclub", "mimi%3A%2F%2Fb.example%3A443%2Fr", "mimi%3A%2F%2Fb.example%2F%25zz"] {
            let response = post(&client, &format!("/v1/update/{parameter}"), update()).await;
            assert_eq!(outcome(&response), (400, "malformed".to_owned()), "{parameter}");
            assert_eq!(response.json()["field"], "roomId", "{parameter}");
        }
        let path = format!("/v1/update/{room}");
        for method in [Method::GET, Method::PUT, Method::DELETE] {
            let response = client.send_with(method, &path, &[FROM], "").await.unwrap();
            is_problem(&response, 405, "wrong-method");
            assert_eq!(response.header("allow"), Some("POST"));
        }
    }
    assert_eq!(ds.begun(), 0, "nothing of it comes");
    assert_eq!(status(&peer(&gateway), &format!("/v1/update/{room}"), update()).await, 200);
}

// === The directory ===

/// The draft's document, with a path of this operator's.
const PATHS: [(&str, &str); 10] = [
    ("keyMaterial", "/keyMaterial/{targetUser}"),
    ("update", "/v1/update/{roomId}"),
    ("notify", "/notify/{roomId}"),
    ("submitMessage", "/submitMessage/{roomId}"),
    ("groupInfo", "/groupInfo/{roomId}"),
    ("requestConsent", "/requestConsent/{targetUser}"),
    ("updateConsent", "/updateConsent/{requesterUser}"),
    ("identifierQuery", "/identifierQuery/{domain}"),
    ("reportAbuse", "/reportAbuse/{roomId}"),
    ("proxyDownload", "/proxyDownload/{downloadUrl}"),
];

/// A template of the directory with its parameter filled in.
fn filled(template: &str, parameter: &str) -> String {
    let (before, rest) = template.split_once('{').unwrap();
    let (_, after) = rest.split_once('}').unwrap();
    format!("{before}{}{after}", Encoding::Usual.of(parameter.as_bytes()))
}

#[tokio::test]
async fn the_directory_says_where_all_is() {
    let table = "[endpoints.update]\npath = \"/v1/update/{roomId}\"\nupstream_path = \"/mimi/pl/update/{roomId}\"\n";
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let gateway = Gateway::start(Setup::of(&ds).listener(BOTH).with(table)).await;
    for authority in ["ds.b.example", "b.example", "b.example:8443", "also-b.example"] {
        let strangers = both(|| gateway.stranger().authority(authority));
        let peers = both(|| gateway.peer().authority(authority));
        for client in strangers.into_iter().chain(peers) {
            let response = directory(&client).await;
            assert_eq!(response.status, 200, "{}", response.text());
            assert_eq!(response.header("content-type"), Some("application/json"));
            let cache = response.header("cache-control").unwrap_or_default();
            assert!(cache.contains("max-age=3600") && !cache.contains("no-"), "{cache}");
            let url = |(name, path): (&str, &str)| (name.to_owned(), Value::from(format!("https://{authority}{path}")));
            assert_eq!(response.json(), Value::Object(PATHS.into_iter().map(url).collect()));
        }
    }
    let elsewhere = directory(&gateway.stranger().authority("c.example")).await;
    is_problem(&elsewhere, 421, "misdirected");
    assert_eq!(ds.begun(), 0, "the gateway knows by itself");

    // Who follows it arrives.
    for client in both(|| gateway.peer().authority("b.example:8443")) {
        let urls = directory(&client).await.json();
        for (endpoint, parameter, body) in every_request() {
            let url = filled(urls[endpoint].as_str().unwrap(), parameter);
            let path = url.strip_prefix("https://b.example:8443").unwrap();
            let response = post(&client, path, body.clone()).await;
            assert_eq!(response.status, 200, "{url}: {}", response.text());
            let seen = path.replace("/v1/update/", "/mimi/pl/update/");
            assert_eq!(ds.requests().pop().unwrap().path, seen);
        }
        assert_eq!(client.connections(), 1);
    }
}

#[tokio::test]
async fn the_directory_is_got_and_nothing_else() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds).listener(MIMI)).await;
    for client in both(|| peer(&gateway)) {
        for method in [Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS] {
            let response = client.send_with(method, DIRECTORY, &[FROM], "").await.unwrap();
            is_problem(&response, 405, "wrong-method");
            assert_eq!(response.header("allow"), Some("GET"));
        }
        let longer = client.send(Method::GET, &format!("{DIRECTORY}/"), "").await.unwrap();
        is_problem(&longer, 404, "unknown-path");
        assert_eq!(directory(&client).await.status, 200);
    }
    for client in both(|| peer(&gateway)) {
        let response = client.send_with(Method::HEAD, DIRECTORY, &[("content-type", "")], "").await;
        let response = response.unwrap_or_else(|error| panic!("HEAD by {client:?}: {error}"));
        assert_eq!((response.status.as_u16(), response.header("allow")), (405, Some("GET")));
        assert!(response.body.is_empty(), "an answer to HEAD has no body");
    }
    assert_eq!(ds.begun(), 0);
}

// === Dialects ===

#[tokio::test]
async fn both_dialects_on_one_connection() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let gateway = Gateway::start(Setup::of(&ds).listener(BOTH)).await;
    for client in both(|| peer(&gateway)) {
        for n in 0..3 {
            let moh = client.send(Method::POST, "/group_operation", send_message()).await.unwrap();
            assert_eq!(moh.status, 200, "{n}: {}", moh.text());
            assert_eq!(ds.requests().pop().unwrap().path, "/group_operation");
            let (path, body) = (at("submitMessage", ROOM), submit_by(ALICE));
            let mimi = post(&client, &path, body).await;
            assert_eq!(mimi.status, 200, "{n}: {}", mimi.text());
            assert_eq!(ds.requests().pop().unwrap().path, path);
            assert_eq!(directory(&client).await.status, 200);
            let domain = client.send(Method::GET, "/.well-known/mimi/ds-domain", "").await.unwrap();
            assert_eq!((domain.status.as_u16(), domain.text().as_str()), (200, "ds.b.example"));
        }
        assert_eq!(client.connections(), 1);
    }
    // A claim does for the one, and not for the other.
    for client in both(|| gateway.stranger().authority("b.example")) {
        assert_eq!(client.send(Method::POST, "/group_operation", send_message()).await.unwrap().status, 200);
        is_problem(&post(&client, &at("submitMessage", ROOM), submit_by(ALICE)).await, 403, "sender-mismatch");
    }
}

#[tokio::test]
async fn each_listener_serves_its_own() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let (second, third) = (free_address(), free_address());
    let listener = |address: SocketAddr, dialects: &str| {
        let asks = "client_certificates = \"required\"\nclient_ca = \"ca.pem\"";
        format!("[[listener]]\naddress = \"{address}\"\n{asks}\n{dialects}\n")
    };
    // The first one does not say what it serves.
    let more = listener(second, MIMI) + &listener(third, "dialects = [\"moh\"]");
    let gateway = Gateway::start(Setup::of(&ds).with(&more)).await;
    for address in [second, third] {
        until("the other listeners are open", || std::net::TcpStream::connect(address).is_ok()).await;
    }
    let a = a_example();
    for (address, serves_mimi) in [(gateway.addr, false), (second, true), (third, false)] {
        let client = || Client::tls(address, &ca().pem()).identity(&a).authority("b.example");
        for client in both(client) {
            let served = |is: bool| if is { (200, String::new()) } else { (404, "unknown-path".to_owned()) };
            let moh = client.send(Method::POST, "/group_operation", send_message()).await.unwrap();
            assert_eq!(outcome(&moh), served(!serves_mimi), "{address}");
            let domain = client.send(Method::GET, "/.well-known/mimi/ds-domain", "").await.unwrap();
            assert_eq!(outcome(&domain), served(!serves_mimi), "{address}");
            assert_eq!(outcome(&directory(&client).await), served(serves_mimi), "{address}");
            for (endpoint, parameter, body) in every_request() {
                let response = post(&client, &at(endpoint, parameter), body).await;
                assert_eq!(outcome(&response), served(serves_mimi), "{endpoint} at {address}");
            }
        }
    }
}

/// What `check` says of a configuration that is no good, and the line that `at` stands in.
pub fn refused_by_check(setup: &Setup, at: &str) -> (String, usize) {
    let dir = tempfile::tempdir().unwrap();
    let [address, admin] = [1, 2].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let path = config(dir.path(), address, admin, setup);
    let text = std::fs::read_to_string(&path).unwrap();
    let before = &text[..text.find(at).unwrap_or_else(|| panic!("no {at} in {text}"))];
    let (ok, said) = check(&path);
    assert!(!ok, "{at}: {said}");
    (said.replace(path.to_str().unwrap(), "FILE"), 1 + before.matches('\n').count())
}

#[test]
fn what_the_configuration_must_say() {
    let nodes = [SocketAddr::from(([127, 0, 0, 1], 3))];
    let setup = |dialects: &str, more: &str| Setup::of_nodes(&nodes).listener(dialects).with(more);
    let off = Setup { client_certificates: "off", ..setup(MIMI, "") };
    let (said, line) = refused_by_check(&off, MIMI);
    assert!(said.contains(&format!("FILE:{line}: listener[0].dialects: ")) && said.contains("mutual TLS"), "{said}");

    let both_at = "[endpoints.update]\npath = \"/x/{roomId}\"\n[endpoints.notify]\npath = \"/x/{roomId}\"";
    let limit = |endpoint: &str, key: &str| {
        let rate = "rate = \"1/s\"\nburst = 1000";
        format!("[[limit]]\nname = \"l\"\nendpoints = [\"{endpoint}\"]\nkey = [\"{key}\"]\n{rate}")
    };
    // Dialects, what else, where that is wrong, its key, and what is said.
    for (dialects, more, at, key, words) in [
        ("dialects = [\"moh\", \"mimmi\"]", "", "dialects = ", "listener[0].dialects", "mimmi"),
        ("dialects = []", "", "dialects = ", "listener[0].dialects", "nothing"),
        ("dialects = [\"mimi\", \"mimi\"]", "", "dialects = ", "listener[0].dialects", "twice"),
        (BOTH, both_at, "address = \"127.0.0.1:1\"", "listener[0].dialects", "notify"),
        (
            MIMI,
            "[endpoints.update]\npath = \"/v1/update\"",
            "path = \"/v1/update\"",
            "endpoints.update.path",
            "parameter",
        ),
        (
            MIMI,
            "[endpoints.update]\npath = \"/v1/update{roomId}\"",
            "path = \"/v1/update{roomId}\"",
            "endpoints.update.path",
            "whole segment",
        ),
        (
            MIMI,
            "[endpoints.update]\npath = \"/{roomId}/{more}\"",
            "path = \"/{roomId}",
            "endpoints.update.path",
            "parameter",
        ),
        (MIMI, "[endpoints.update]\npath = \"v1/{roomId}\"", "path = \"v1/", "endpoints.update.path", "begin"),
        (
            MIMI,
            "[endpoints.update]\nupstream_path = \"/pl/update\"",
            "upstream_path = ",
            "endpoints.update.upstream_path",
            "parameter",
        ),
        (
            MIMI,
            "[endpoints.directory]\nupstream_path = \"/directory\"",
            "upstream_path = ",
            "endpoints.directory.upstream_path",
            "not asked",
        ),
        (
            BOTH,
            "[endpoints.group_operation]\npath = \"/moh/{group}\"",
            "path = \"/moh/",
            "endpoints.group_operation.path",
            "parameter",
        ),
        (
            MIMI,
            "[endpoints.submitMessage]\nmax_held = \"64KiB\"",
            "max_held = ",
            "endpoints.submitMessage.max_held",
            "48KiB",
        ),
        (
            MIMI,
            "[endpoints.submitMessage]\nmax_held = \"512B\"",
            "max_held = ",
            "endpoints.submitMessage.max_held",
            "1KiB",
        ),
        (MIMI, "[endpoints.directory]\nmax_held = \"4KiB\"", "max_held = ", "endpoints.directory.max_held", "no body"),
        (MIMI, "[connections]\nheld_bodies = \"512KiB\"", "held_bodies = ", "connections.held_bodies", "1MiB"),
        (MIMI, &*limit("notify", "target"), "key = [\"target\"]", "limit[0].key", "notify never says a target"),
        (MIMI, &*limit("identifierQuery", "member"), "key = [\"member\"]", "limit[0].key", "never says a member"),
        (MIMI, &*limit("proxyDownload", "group"), "key = [\"group\"]", "limit[0].key", "never says a group"),
    ] {
        let (said, line) = refused_by_check(&setup(dialects, more), at);
        let place = format!("FILE:{line}: {key}: ");
        assert!(said.contains(&place) && said.contains(words), "{place}… {words} in {said}");
    }

    let good = "[endpoints.update]\npath = \"/v1/update/{roomId}\"\nupstream_path = \"/mimi/pl/update/{room}\"\n\
                [endpoints.submitMessage]\nmax_held = \"32KiB\"\nmax_body = \"64KiB\"\n\
                [endpoints.directory]\npath = \"/.well-known/mimi-protocol-directory\"\n\
                [connections]\nheld_bodies = \"64MiB\"\n";
    let dir = tempfile::tempdir().unwrap();
    let [address, admin] = [1, 2].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let more = good.to_owned() + &limit("keyMaterial", "target");
    let (ok, said) = check(&config(dir.path(), address, admin, &setup(BOTH, &more)));
    assert!(ok, "{said}");
}

// === Limits ===

#[tokio::test]
async fn a_room_is_one_however_its_host_is_spelt() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let gateway = Gateway::start(required(&ds).with(&limit("room", &["submitMessage"], &["group"], 2))).await;
    let client = peer(&gateway);
    for (room, expected) in [
        ("mimi://b.example/r/club", 200),
        ("MIMI://B.Example/r/club", 200),
        ("mimi://b.example/r/club", 429),
        ("mimi://b.EXAMPLE/r/club", 429),
        ("mimi://b.example/r/Club", 200),
        ("mimi://also-b.example/r/club", 200),
        ("im:club@b.example", 200),
        ("im:club@B.example", 200),
        ("IM:club@b.example", 429),
    ] {
        // The group is the same real one everywhere: a room is known by its URI.
        let response = post(&client, &at("submitMessage", room), submit_by(ALICE)).await;
        assert_eq!(response.status, expected, "{room}: {}", response.text());
        if expected == 429 {
            assert_eq!(response.json()["violated-policies"][0], "room");
            assert!(response.header("retry-after").is_some());
        }
    }
    // Whichever octets of it were encoded.
    let encoded = dialect::path_in(Encoding::Most, "submitMessage", b"mimi://b.example/r/club");
    assert_eq!(status(&client, &encoded, submit_by(ALICE)).await, 429);
    // What another provider's members send is that provider's.
    let c = of_provider(&gateway, "c.example");
    let path = at("submitMessage", "mimi://b.example/r/club");
    for expected in [200, 200, 429] {
        let response = post_from(&c, "mimi@c.example", &path, submit_by("mimi://c.example/u/carol")).await;
        assert_eq!(response.status, expected);
    }
    assert_eq!(ds.complete(), 8);
}

#[tokio::test]
async fn all_that_is_asked_of_a_room_is_asked_of_one() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let limits = limit("room", &["submitMessage", "update", "groupInfo", "reportAbuse"], &["group"], 3);
    let gateway = Gateway::start(required(&ds).with(&limits)).await;
    let client = peer(&gateway);
    let mut statuses = vec![];
    for (endpoint, body) in [
        ("submitMessage", submit_by(ALICE)),
        ("update", update()),
        ("groupInfo", group_info(b"a key")),
        ("submitMessage", submit_by(ALICE)),
        ("update", update()),
        ("reportAbuse", report(ALICE)),
    ] {
        statuses.push(status(&client, &at(endpoint, ROOM), body).await);
    }
    assert_eq!(statuses, [200, 200, 200, 429, 429, 429]);
    assert_eq!(status(&client, &at("update", "mimi://b.example/r/other"), update()).await, 200);
}

#[tokio::test]
async fn a_user_is_one_in_all_rooms_and_a_leaf_is_of_its_room() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let limits = limit("user", &["submitMessage"], &["member"], 2) + &limit("leaf", &["update"], &["member"], 1);
    let gateway = Gateway::start(required(&ds).with(&limits)).await;
    let client = peer(&gateway);
    let (one, two) = ("mimi://b.example/r/one", "mimi://b.example/r/two");
    for (room, user, expected) in [
        (one, "mimi://a.example/u/alice", 200),
        (two, "mimi://A.Example/u/alice", 200),
        (one, "mimi://a.example/u/alice", 429),
        (two, "MIMI://a.example/u/alice", 429),
        ("mimi://b.example/r/three", "mimi://a.example/u/alice", 429),
        (one, "mimi://a.example/u/Alice", 200),
        (one, "mimi://a.example/u/anna", 200),
    ] {
        let response = post(&client, &at("submitMessage", room), submit_by(user)).await;
        assert_eq!(response.status, expected, "{user} in {room}: {}", response.text());
        if expected == 429 {
            assert_eq!(response.json()["violated-policies"][0], "user");
        }
    }
    for (room, expected) in [(one, 200), (one, 429), (two, 200), (two, 429)] {
        assert_eq!(status(&client, &at("update", room), update()).await, expected, "{room}");
    }
}

#[tokio::test]
async fn by_target_provider_endpoint_address_and_cost() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let limits = limit("target", &["keyMaterial"], &["target"], 2)
        + &limit("key", &["groupInfo"], &["member"], 1)
        + &limit("provider", &["notify"], &["provider"], 2)
        + "[[limit.override]]\nprovider = \"c.example\"\nrate = \"1/h\"\nburst = 3\n"
        + &limit("endpoint", &["reportAbuse", "requestConsent"], &["provider", "endpoint"], 1)
        + &limit("queries", &["identifierQuery"], &["provider"], 5)
        + &limit("documents", &["directory"], &["ip"], 2);
    let gateway = Gateway::start(required(&ds).with(&limits)).await;
    let client = peer(&gateway);

    let users = ["mimi://b.example/u/bob", "mimi://B.example/u/bob", "mimi://b.example/u/carol"];
    for (requester, target, expected) in [
        (ALICE, users[0], 200),
        ("mimi://a.example/u/anna", users[1], 200),
        ("mimi://a.example/u/adam", users[0], 429),
        (ALICE, users[1], 429),
        (ALICE, users[2], 200),
    ] {
        let body = key_material(requester, target, THEIR_ROOM);
        let response = post(&client, &at("keyMaterial", target), body).await;
        assert_eq!(response.status, expected, "{requester}, {target}: {}", response.text());
    }

    for (key, expected) in [(&b"one key"[..], 200), (&b"one key"[..], 429), (&b"another key"[..], 200)] {
        assert_eq!(status(&client, &at("groupInfo", ROOM), group_info(key)).await, expected);
    }

    let c = of_provider(&gateway, "c.example");
    for (client, from, expected) in
        [(&client, "a.example", &[200, 200, 429][..]), (&c, "c.example", &[200, 200, 200, 429][..])]
    {
        for (n, expected) in expected.iter().enumerate() {
            // Another room each time.
            let path = at("notify", &format!("mimi://{from}/r/{n}"));
            let body = fan_out(&material().message, Fanned::Application(None));
            let response = post_from(client, &format!("mimi@{from}"), &path, body).await;
            assert_eq!(response.status, *expected, "{from}, {n}");
        }
    }

    for expected in [200, 429] {
        assert_eq!(status(&client, &at("reportAbuse", ROOM), report(ALICE)).await, expected);
        let body = consent(REQUEST, ALICE, BOB, None);
        assert_eq!(status(&client, &at("requestConsent", "b.example"), body).await, expected, "each has its own");
    }

    let path = at("identifierQuery", "b.example");
    for (elements, expected) in [(3, 200), (3, 429), (2, 200), (1, 429), (6, 429)] {
        let response = post(&client, &path, query(elements)).await;
        assert_eq!(response.status, expected, "{elements} elements");
        if elements == 6 {
            assert_eq!(response.header("retry-after"), None, "six of five: no wait helps");
        }
    }

    for expected in [200, 200, 429] {
        assert_eq!(directory(&client).await.status, expected);
    }
}

/// A request with a token, or without.
async fn ask(client: &Client, path: &str, body: Vec<u8>, credential: Option<&str>) -> Response {
    let mut fields = vec![FROM];
    fields.extend(credential.map(|credential| ("authorization", credential)));
    client.send_with(Method::POST, path, &fields, body).await.unwrap()
}

/// A token for the challenge of an answer.
fn token(issuer: &Issuer, response: &Response) -> String {
    authorization(&issuer.token(&challenges(&response.headers).remove(0)).unwrap())
}

#[tokio::test]
async fn a_token_is_required_or_lets_past_a_limit() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let more = "[endpoints.keyMaterial]\ntoken = \"required\"\n".to_owned()
        + &limit("strangers", &["requestConsent"], &["target"], 1)
        + "token = \"top-up\"\ntoken_rate = \"1/h\"\ntoken_burst = 2\n[privacy_pass]\n";
    let (dir, issuer) = (tempfile::tempdir().unwrap(), Issuer::generate("issuer.example"));
    issuer.write(dir.path(), "issuer.pub");
    let gateway = Gateway::start_in(dir, required(&ds).with(&more).with(&issuer.table("issuer.pub"))).await;
    for client in both(|| peer(&gateway)) {
        let path = at("keyMaterial", BOB);
        let body = || key_material(ALICE, BOB, "");
        let missing = ask(&client, &path, body(), None).await;
        assert_eq!(outcome(&missing), (401, "token-missing".to_owned()));
        let first = token(&issuer, &missing);
        assert_eq!(ask(&client, &path, body(), Some(&first)).await.status, 200);
        let again = ask(&client, &path, body(), Some(&first)).await;
        assert_eq!(outcome(&again), (401, "token-spent".to_owned()));
        // What is not theirs to send takes no token.
        let second = token(&issuer, &again);
        let spoofed = key_material(ALICE, BOB, "mimi://c.example/r/x");
        is_problem(&ask(&client, &path, spoofed, Some(&second)).await, 403, "sender-mismatch");
        assert_eq!(ask(&client, &path, body(), Some(&second)).await.status, 200);
    }
    assert_eq!(ds.complete(), 4);

    let (client, path) = (peer(&gateway), at("requestConsent", BOB));
    let body = || consent(REQUEST, ALICE, BOB, None);
    assert_eq!(ask(&client, &path, body(), None).await.status, 200, "within the limit nobody needs a token");
    let limited = ask(&client, &path, body(), None).await;
    assert_eq!((limited.status.as_u16(), &limited.json()["violated-policies"][0]), (429, &Value::from("strangers")));
    for expected in [200, 200, 429] {
        assert_eq!(ask(&client, &path, body(), Some(&token(&issuer, &limited))).await.status, expected);
    }
    assert_eq!(ds.complete(), 7);
    assert!(ds.requests().iter().all(|r| !r.headers.contains_key("authorization")), "tokens were for us");
}

#[tokio::test]
async fn a_hub_that_comes_again_when_it_was_told_to_is_let_in() {
    let ds = Ds::start().await;
    ds.set_response(201, &[], "");
    let limits = limit("room", &["notify"], &["group"], 1).replace("1/h", "30/m");
    let gateway = Gateway::start(required(&ds).with(&limits)).await;
    for client in both(|| peer(&gateway)) {
        let path = at("notify", &format!("mimi://a.example/r/{}", client.is_http1()));
        let body = fan_out(&material().message, Fanned::Application(None));
        let before = ds.complete();
        assert_eq!(status(&client, &path, body.clone()).await, 201);
        let refused = post(&client, &path, body.clone()).await;
        assert_eq!((refused.status.as_u16(), &refused.json()["violated-policies"][0]), (429, &Value::from("room")));
        let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=2).contains(&wait), "{wait}");
        assert_eq!(ds.begun(), before + 1);
        tokio::time::sleep(Duration::from_secs(wait)).await;
        assert_eq!(status(&client, &path, body.clone()).await, 201);
        let came = ds.requests();
        assert_eq!(came.len(), before + 2);
        assert!(came[before..].iter().all(|request| request.path == path && request.body == body), "the same again");
    }
}

// === Bodies that are held ===

async fn until_held(gateway: &Gateway, octets: usize) {
    gateway.until_metric(HELD, |n| n == octets as f64).await;
}

#[tokio::test]
async fn the_sender_at_the_end_of_a_message_decides() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let gateway = Gateway::start(Setup { timeouts: PATIENT, ..required(&ds) }).await;
    let ours = submit(&private_message(b"group", 30_000), "mimi://a.example/u/alice");
    let spoofed = submit(&private_message(b"group", 30_000), "mimi://c.example/u/alice");
    let no_uri = submit(&private_message(b"group", 30_000), "mimi:/a.example/u/alice/");
    let last = ours.len() - 1;
    for client in both(|| peer(&gateway)) {
        for length in [Some(ours.len() as u64), None] {
            for (body, expected) in [
                (&ours, (200, "")),
                (&spoofed, (403, "sender-mismatch")),
                (&ours, (200, "")),
                (&no_uri, (400, "malformed")),
            ] {
                assert_eq!(body.len(), ours.len());
                let (begun, seen) = (ds.begun(), ds.body_bytes_seen());
                let path = at("submitMessage", ROOM);
                let upload = client.begin(Method::POST, &path, &[FROM], length).await.unwrap();
                for piece in body[..last].chunks(4_001) {
                    upload.write(piece.to_vec()).await.unwrap();
                }
                until_held(&gateway, last).await;
                assert_eq!((ds.begun(), ds.body_bytes_seen()), (begun, seen), "nothing goes on before it is decided");
                upload.write(body[last..].to_vec()).await.unwrap();
                let response = upload.finish().await.unwrap();
                assert_eq!(outcome(&response), (expected.0, expected.1.to_owned()), "{length:?}");
                until_held(&gateway, 0).await;
                if expected.0 == 200 {
                    assert_eq!(ds.begun(), begun + 1);
                    assert!(ds.requests().pop().unwrap().body == *body, "not an octet is changed");
                } else {
                    assert_eq!(ds.begun(), begun);
                }
            }
        }
    }
}

#[tokio::test]
async fn what_is_held_is_let_go_with_its_client() {
    let ds = Ds::start().await;
    let timeouts = "headers = \"20s\"\nbody_idle = \"3s\"\nbody_total = \"30s\"\nshutdown = \"5s\"";
    let gateway = Gateway::start(Setup { timeouts, ..required(&ds) }).await;
    let body = submit(&private_message(b"group", 40_000), ALICE);
    let path = at("submitMessage", ROOM);
    for client in both(|| peer(&gateway)) {
        // It goes away.
        let upload = client.begin(Method::POST, &path, &[FROM], None).await.unwrap();
        upload.write(body[..20_000].to_vec()).await.unwrap();
        until_held(&gateway, 20_000).await;
        upload.abort().await;
        until_held(&gateway, 0).await;
        // It says that this was all.
        let upload = client.begin(Method::POST, &path, &[FROM], None).await.unwrap();
        upload.write(body[..20_000].to_vec()).await.unwrap();
        until_held(&gateway, 20_000).await;
        is_problem(&upload.finish().await.unwrap(), 400, "malformed");
        until_held(&gateway, 0).await;
        // It says nothing more.
        let mut upload = client.begin(Method::POST, &path, &[FROM], None).await.unwrap();
        upload.write(body[..20_000].to_vec()).await.unwrap();
        until_held(&gateway, 20_000).await;
        is_problem(&upload.answer().await.unwrap(), 408, "too-slow");
        until_held(&gateway, 0).await;
    }
    assert_eq!(ds.begun(), 0);
}

#[tokio::test]
async fn more_than_may_be_held_of_a_body_is_too_large() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    // Longer than a read, or what is over it would be there already.
    for (table, fits, does_not) in [
        ("", 45_000, 60_000),
        ("[endpoints.submitMessage]\nmax_held = \"32KiB\"\n", 30_000, 45_000),
        ("[endpoints.submitMessage]\nmax_body = \"40KiB\"\n", 39_000, 42_000),
    ] {
        let gateway = Gateway::start(required(&ds).with(table)).await;
        for client in both(|| peer(&gateway)) {
            let path = at("submitMessage", ROOM);
            let body = submit(&private_message(b"group", fits), ALICE);
            let response = post(&client, &path, body.clone()).await;
            assert_eq!(response.status, 200, "{table}{fits}: {}", response.text());
            assert!(ds.requests().pop().unwrap().body == body, "not an octet is changed");
            let begun = ds.begun();
            let body = submit(&private_message(b"group", does_not), ALICE);
            is_problem(&post(&client, &path, body).await, 413, "too-large");
            until_held(&gateway, 0).await;
            assert_eq!(ds.begun(), begun);
        }
    }
}

#[tokio::test]
async fn when_too_much_is_held_those_that_wait_are_refused_and_the_others_pass() {
    // A sixteenth of all is one source's, and 8 at least.
    const HANGING: usize = 8;
    const OF_EACH: usize = 40_000;
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let setup = Setup { timeouts: PATIENT, ..Setup::of(&ds) }.listener(BOTH);
    let gateway = Gateway::start(setup.with("[connections]\nheld_bodies = \"1MiB\"")).await;
    let body = submit(&private_message(b"group", OF_EACH + 1_000), ALICE);
    let path = at("submitMessage", ROOM);
    let hang = async |client: &Client| {
        let upload = client.begin(Method::POST, &path, &[FROM], None).await.unwrap();
        let _ = upload.write(body[..OF_EACH].to_vec()).await;
        upload
    };
    let is_too_much = async |client: &Client| {
        let mut upload = hang(client).await;
        let response = upload.answer().await.unwrap();
        is_problem(&response, 503, "too-much-held");
        let wait: u64 = response.header("retry-after").unwrap().parse().unwrap();
        assert!(wait >= 1, "{wait}");
    };
    let client = peer(&gateway);
    let mut uploads = vec![];
    for _ in 0..HANGING {
        uploads.push(hang(&client).await);
    }
    until_held(&gateway, HANGING * OF_EACH).await;
    assert_eq!((client.connections(), ds.begun()), (1, 0));

    // One more of its own is one too many, on this connection or another.
    for client in [&client, &peer(&gateway), &peer(&gateway).http1()] {
        is_too_much(client).await;
        until_held(&gateway, HANGING * OF_EACH).await;
    }
    // Others have shares of their own, until there is no more for anybody.
    let mut others = vec![];
    for (name, number) in [("c.example", HANGING), ("d.example", HANGING), ("e.example", 2)] {
        let other = of_provider(&gateway, name);
        for _ in 0..number {
            others.push(hang(&other).await);
        }
    }
    until_held(&gateway, 26 * OF_EACH).await;
    is_too_much(&of_provider(&gateway, "e.example")).await;
    let refused = "decision=\"refused\",endpoint=\"submitMessage\",reason=\"too-much-held\"";
    gateway.until_metric(&format!("moh_gateway_requests_total{{{refused}}}"), |n| n >= 4.0).await;
    assert_eq!(ds.begun(), 0);

    // What is decided by its beginning is not held.
    let mut passed = 0;
    for client in both(|| peer(&gateway)).iter().chain([&client]) {
        for (path, body) in [
            ("/group_operation".to_owned(), send_message()),
            ("/group_operation".to_owned(), large_message(100 << 10)),
            (at("update", ROOM), update()),
            (at("identifierQuery", "b.example"), query(1)),
        ] {
            let response = post(client, &path, body).await;
            assert_eq!(response.status, 200, "{path}: {}", response.text());
            passed += 1;
        }
        assert_eq!(directory(client).await.status, 200);
    }
    assert_eq!(ds.complete(), passed);

    drop(others);
    for upload in uploads {
        upload.write(body[OF_EACH..].to_vec()).await.unwrap();
        let response = upload.finish().await.unwrap();
        assert_eq!(response.status, 200, "{}", response.text());
    }
    until_held(&gateway, 0).await;
    let came = ds.requests();
    assert_eq!(came.len(), passed + HANGING);
    assert!(came[passed..].iter().all(|request| request.body == body), "each as it was sent");
    assert_eq!(status(&client, &path, body).await, 200, "there is room again");
}

// === Who may send ===

#[tokio::test]
async fn nobody_sends_without_the_certificate_of_whom_it_says_it_is() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let gateway = Gateway::start(Setup::of(&ds).listener(MIMI)).await;
    let strangers = both(|| gateway.stranger().authority("b.example"));
    let others = both(|| of_provider(&gateway, "c.example"));
    let peers = both(|| peer(&gateway));
    for (endpoint, parameter, body) in every_request() {
        let path = at(endpoint, parameter);
        for client in strangers.iter().chain(&others) {
            let response = post(client, &path, body.clone()).await;
            assert_eq!(outcome(&response), (403, "sender-mismatch".to_owned()), "{path} by {client:?}");
        }
        for client in &peers {
            let fields: [&[(&str, &str)]; 3] = [&[], &[FROM, FROM], &[FROM, ("from", "mimi@c.example")]];
            for fields in fields {
                let response = client.send_with(Method::POST, &path, fields, body.clone()).await.unwrap();
                assert_eq!(outcome(&response), (400, "malformed".to_owned()), "{path}: {fields:?}");
                assert_eq!(response.json()["field"], "From", "{path}: {fields:?}");
            }
            is_problem(&post_from(client, "mimi@c.example", &path, body.clone()).await, 403, "sender-mismatch");
        }
    }
    assert_eq!(ds.begun(), 0);
    // Whoever else asks for certificates gets no further than that.
    let required = Gateway::start(required(&ds)).await;
    for client in both(|| required.stranger().authority("b.example")) {
        assert!(client.send_with(Method::POST, &at("update", ROOM), &[FROM], update()).await.is_err());
    }
    assert_eq!(ds.begun(), 0);
}

#[tokio::test]
async fn from_is_one_address_and_names_of_certificates_are_names() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let gateway = Gateway::start(required(&ds)).await;
    let path = at("identifierQuery", "b.example");
    for client in both(|| peer(&gateway)) {
        for from in [
            "mimi",
            "mimi@",
            "@a.example",
            "a.example",
            "alice@a.example",
            "MIMI@a.example",
            "<mimi@a.example>",
            "Mimi <mimi@a.example>",
            "mimi@a.example, mimi@c.example",
            "mimi@a.example.",
            "mimi@a.example:443",
            "mimi@mimi@a.example",
            "mimi@[127.0.0.1]",
        ] {
            let response = post_from(&client, from, &path, query(1)).await;
            assert_eq!(outcome(&response), (400, "malformed".to_owned()), "{from}");
            assert_eq!(response.json()["field"], "From", "{from}");
        }
    }
    // One that is there and empty.
    let mut stream =
        raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["http/1.1"], Some(&a_example())).await.unwrap();
    let body = query(1);
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: b.example\r\nFrom: \r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), &body].concat()).await.unwrap();
    let mut answer = vec![];
    stream.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 400"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(ds.begun(), 0);

    let of = |names: &[&str]| gateway.stranger().identity(&ca().issue(names)).authority("b.example");
    for (names, from, expected) in [
        (&["a.example"][..], "mimi@A.Example", 200),
        (&["*.a.example"][..], "mimi@x.a.example", 200),
        (&["c.example", "a.example"][..], "mimi@a.example", 200),
        (&["*.a.example"][..], "mimi@a.example", 403),
        (&["*.a.example"][..], "mimi@x.y.a.example", 403),
        (&["a.example"][..], "mimi@x.a.example", 403),
    ] {
        for client in both(|| of(names)) {
            let response = post_from(&client, from, &path, query(1)).await;
            assert_eq!(response.status, expected, "{from} of {names:?}: {}", response.text());
            if expected == 200 {
                let provider = from.strip_prefix("mimi@").unwrap().to_lowercase();
                assert_eq!(ds.requests().pop().unwrap().headers["x-moh-provider"], provider.as_str());
            }
        }
    }
}

// === While it runs ===

/// The statuses of a request of the other dialect, and of one at either path.
async fn served(client: &Client) -> [u16; 3] {
    let moh = client.send(Method::POST, "/group_operation", send_message()).await.unwrap().status.as_u16();
    let old = status(client, &at("update", ROOM), update()).await;
    [moh, old, status(client, &format!("/v1{}", at("update", ROOM)), update()).await]
}

#[tokio::test]
async fn dialects_and_paths_are_exchanged() {
    let ds = Ds::start().await;
    ds.set_response(200, &[], "");
    let mut gateway = Gateway::start(Setup::of(&ds)).await;
    let client = peer(&gateway);
    assert_eq!(served(&client).await, [200, 404, 404]);
    assert_eq!(directory(&client).await.status, 404);

    gateway.reload("ok", |setup| setup.listener = BOTH.to_owned()).await;
    assert_eq!(served(&client).await, [200, 200, 404]);
    assert_eq!(directory(&client).await.json()["update"], "https://b.example/update/{roomId}");

    let moved = "[endpoints.update]\npath = \"/v1/update/{roomId}\"\nupstream_path = \"/pl/{roomId}\"\n";
    gateway.reload("ok", |setup| setup.more = moved.to_owned()).await;
    assert_eq!(served(&client).await, [200, 404, 200]);
    assert_eq!(ds.requests().pop().unwrap().path, at("pl", ROOM));
    assert_eq!(directory(&client).await.json()["update"], "https://b.example/v1/update/{roomId}");

    // What is wrong changes nothing.
    gateway.reload("failed", |setup| setup.listener = "dialects = [\"mimi\", \"mimmi\"]".to_owned()).await;
    assert_eq!(served(&client).await, [200, 404, 200]);
    let clash = "[endpoints.update]\npath = \"/notify/{roomId}\"\n";
    gateway
        .reload("failed", |setup| {
            setup.listener = MIMI.to_owned();
            setup.more = clash.to_owned();
        })
        .await;
    assert_eq!(served(&client).await, [200, 404, 200]);
    assert!(gateway.stderr().contains("listener[0].dialects"), "it is said why");

    gateway.reload("ok", |setup| setup.more = moved.to_owned()).await;
    assert_eq!(served(&client).await, [404, 404, 200]);
    gateway.reload("ok", |setup| setup.listener = String::new()).await;
    assert_eq!(served(&client).await, [200, 404, 404]);
    assert_eq!(client.connections(), 1, "all of it on the connection that it has");
}
