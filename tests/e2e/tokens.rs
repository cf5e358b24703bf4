//! Privacy Pass: tokens issued by the privacypass crate's issuer, redeemed over TLS.

use crate::harness::{Gateway, Setup, private_message};
use crate::support::client::{Client, Response};
use crate::support::ds::Ds;
use crate::support::encode;
use crate::support::tokens::{Issuer, authorization, challenges};
use base64::Engine as _;
use http::Method;
use std::sync::OnceLock;
use std::time::Duration;

fn issuer() -> &'static Issuer {
    static ISSUER: OnceLock<Issuer> = OnceLock::new();
    ISSUER.get_or_init(|| Issuer::generate("issuer.example"))
}

fn request() -> Vec<u8> {
    encode::queueing_request("a.example", "b.example", b"bob's queue", &private_message(b"g"))
}

async fn ask(client: &Client, credentials: &[&str]) -> Response {
    let headers: Vec<_> = credentials.iter().map(|value| ("authorization", *value)).collect();
    client.send_with(Method::POST, "/connection_request", &headers, request()).await.unwrap()
}

fn problem(response: &Response) -> String {
    response.json()["type"].as_str().unwrap_or_default().rsplit(':').next().unwrap_or_default().to_owned()
}

async fn start(ds: &Ds, more: &str) -> Gateway {
    let dir = tempfile::tempdir().unwrap();
    issuer().write(dir.path(), "issuer.pub");
    let pass = "[[privacy_pass.issuer]]\nname = \"issuer.example\"\ntoken_type = 2\nkey_file = \"issuer.pub\"\n";
    let settings = if more.contains("[privacy_pass]") { "" } else { "[privacy_pass]\n" };
    Gateway::start_in(dir, Setup::of(ds).with(more).with(settings).with(pass)).await
}

const REQUIRED: &str = "[endpoints.connection_request]\ntoken = \"required\"\n";

#[tokio::test]
async fn a_token_lets_in_once() {
    let ds = Ds::start().await;
    let gateway = start(&ds, REQUIRED).await;
    for client in [gateway.stranger(), gateway.stranger().http1()] {
        let response = ask(&client, &[]).await;
        assert_eq!((response.status.as_u16(), problem(&response)), (401, "token-missing".into()));
        let value = response.header("www-authenticate").unwrap().to_owned();
        assert!(value.starts_with("PrivateToken challenge=\"") && value.contains("\", token-key=\""), "{value}");
        let challenge = challenges(&response.headers).remove(0);
        let (name, context, origin) = challenge.parts();
        assert_eq!((name.as_str(), context.len(), origin.as_str()), ("issuer.example", 32, "ds.b.example"));
        assert_eq!(challenge.token_key, issuer().token_key());
        assert!(challenge.max_age.unwrap() > 3600 && challenge.max_age.unwrap() <= 7200);

        let token = authorization(&issuer().token(&challenge).unwrap());
        assert_eq!(ask(&client, &[&token]).await.status, 200);
        let again = ask(&client, &[&token]).await;
        assert_eq!((again.status.as_u16(), problem(&again)), (401, "token-spent".into()));
        assert_eq!(challenges(&again.headers).len(), 1, "with a fresh challenge");
    }
    assert_eq!(ds.complete(), 2);
    assert!(ds.requests().iter().all(|r| !r.headers.contains_key("authorization")), "the token was for us");
}

#[tokio::test]
async fn each_fault_of_a_token_has_its_name() {
    let ds = Ds::start().await;
    let gateway = start(&ds, REQUIRED).await;
    let client = gateway.stranger();
    let challenge = challenges(&ask(&client, &[]).await.headers).remove(0);
    let token = issuer().token(&challenge).unwrap();
    let changed = |at: usize| {
        let mut token = token.clone();
        token[at] ^= 1;
        authorization(&token)
    };
    let foreign = Issuer::generate("issuer.example");
    let mut their_challenge = challenge.clone();
    their_challenge.token_key = foreign.token_key().to_vec();
    let mut elsewhere = challenge.clone();
    let at = elsewhere.challenge.len() - 1;
    elsewhere.challenge[at] ^= 1;
    let longer = [&token[..], &[0]].concat();
    for (credential, expected) in [
        (changed(0), "token-unknown-type"),
        (changed(1), "token-unknown-type"),
        (changed(2), "token-bad"),
        (changed(34), "token-wrong-challenge"),
        (changed(66), "token-unknown-key"),
        (changed(98), "token-bad"),
        (authorization(&token[..353]), "token-malformed"),
        (authorization(&longer), "token-malformed"),
        ("PrivateToken".to_owned(), "token-malformed"),
        ("PrivateToken token=\"%\"".to_owned(), "token-malformed"),
        ("Bearer abc".to_owned(), "token-missing"),
        (authorization(&foreign.token(&their_challenge).unwrap()), "token-unknown-key"),
        (authorization(&issuer().token(&elsewhere).unwrap()), "token-wrong-challenge"),
    ] {
        let response = ask(&client, &[&credential]).await;
        assert_eq!((response.status.as_u16(), problem(&response)), (401, expected.to_owned()), "{credential:.60}");
    }
    let good = authorization(&token);
    assert_eq!(problem(&ask(&client, &[&good, &good]).await), "token-malformed", "two credentials");
    assert_eq!(ds.begun(), 0);
    let framed = [("connection", "host"), ("authorization", good.as_str())];
    let response =
        gateway.stranger().http1().send_with(Method::POST, "/connection_request", &framed, request()).await.unwrap();
    assert_eq!(response.status, 400, "what could not be forwarded spends no token");
    assert_eq!(ds.begun(), 0);
    // None of it spent the token; and what is the DS's passes beside it, unquoted and unpadded too.
    let octets = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(&token);
    let bare = format!("privatetoken token={octets}");
    assert_eq!(ask(&client, &["Bearer of the DS", &bare]).await.status, 200);
    let passed = ds.requests().remove(0).headers;
    assert_eq!(passed.get_all("authorization").iter().collect::<Vec<_>>(), ["Bearer of the DS"]);
}

#[tokio::test]
async fn a_token_tops_up_a_limit() {
    let ds = Ds::start().await;
    let limits = r#"
[[limit]]
name = "strangers"
endpoints = ["connection_request"]
key = ["target"]
rate = "1/h"
burst = 1
token = "top-up"
token_rate = "1/h"
token_burst = 2
"#;
    let gateway = start(&ds, limits).await;
    let client = gateway.stranger();
    let ok = ask(&client, &[]).await;
    assert_eq!(ok.status, 200, "within the limit nobody needs a token");
    let limited = ask(&client, &[]).await;
    assert_eq!(limited.status, 429);
    assert!(limited.header("retry-after").is_some());
    let challenge = challenges(&limited.headers).remove(0);
    let token = || authorization(&issuer().token(&challenge).unwrap());
    let first = token();
    assert_eq!(ask(&client, &[&first]).await.status, 200);
    assert_eq!(problem(&ask(&client, &[&first]).await), "token-spent");
    assert_eq!(ask(&client, &[&token()]).await.status, 200);
    let third = token();
    assert_eq!(ask(&client, &[&third]).await.status, 429, "the second limit is a limit");
    assert_eq!(ask(&client, &[&third]).await.status, 429, "which took the token of nobody");
    assert_eq!(ds.complete(), 3);
}

#[tokio::test]
async fn an_endpoint_tops_up_all_its_limits() {
    let ds = Ds::start().await;
    let more = r#"
[endpoints.connection_request]
token = "top-up"
token_rate = "1/h"
token_burst = 1
[[limit]]
name = "ip"
endpoints = ["connection_request"]
key = ["ip"]
rate = "1/h"
burst = 1
"#;
    let gateway = start(&ds, more).await;
    let client = gateway.stranger();
    assert_eq!(ask(&client, &[]).await.status, 200);
    let limited = ask(&client, &[]).await;
    assert_eq!(limited.status, 429);
    let token = issuer().token(&challenges(&limited.headers).remove(0)).unwrap();
    assert_eq!(ask(&client, &[&authorization(&token)]).await.status, 200);
}

#[tokio::test]
async fn a_token_is_spent_only_if_everything_else_passes() {
    let ds = Ds::start().await;
    let more = format!(
        "{REQUIRED}[[limit]]\nname = \"ip\"\nendpoints = [\"connection_request\"]\nkey = [\"ip\"]\nrate = \"1/s\"\nburst = 1"
    );
    let gateway = start(&ds, &more).await;
    let client = gateway.stranger();
    let challenge = challenges(&ask(&client, &[]).await.headers).remove(0);
    let [one, two] = [(); 2].map(|()| authorization(&issuer().token(&challenge).unwrap()));
    assert_eq!(ask(&client, &[&one]).await.status, 200);
    assert_eq!(ask(&client, &[&two]).await.status, 429, "the limit, before the token");
    tokio::time::sleep(Duration::from_millis(1050)).await;
    ds.stop().await;
    assert_eq!(ask(&client, &[&two]).await.status, 502, "a DS that could not be reached gives it back");
    let _back = Ds::start_at(ds.addr, ds.delivery.clone()).await;
    tokio::time::sleep(Duration::from_millis(1050)).await;
    assert_eq!(ask(&client, &[&two]).await.status, 200);
    tokio::time::sleep(Duration::from_millis(1050)).await;
    assert_eq!(problem(&ask(&client, &[&two]).await), "token-spent".to_owned());
}

#[tokio::test]
async fn challenges_end_with_their_epochs() {
    let ds = Ds::start().await;
    let gateway = start(&ds, &format!("{REQUIRED}[privacy_pass]\nepoch = \"1s\"\n")).await;
    let client = gateway.stranger();
    let challenge = challenges(&ask(&client, &[]).await.headers).remove(0);
    assert!(challenge.max_age.unwrap() <= 2);
    let token = authorization(&issuer().token(&challenge).unwrap());
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!(problem(&ask(&client, &[&token]).await), "token-expired");
    let fresh = challenges(&ask(&client, &[]).await.headers).remove(0);
    assert_ne!(fresh.challenge, challenge.challenge);
    let token = authorization(&issuer().token(&fresh).unwrap());
    assert_eq!(ask(&client, &[&token]).await.status, 200);
}

#[tokio::test]
async fn full_means_refuse_not_forget() {
    let ds = Ds::start().await;
    let gateway = start(&ds, &format!("{REQUIRED}[privacy_pass]\nspent_tokens = 1\n")).await;
    let client = gateway.stranger();
    let challenge = challenges(&ask(&client, &[]).await.headers).remove(0);
    let [one, two] = [(); 2].map(|()| authorization(&issuer().token(&challenge).unwrap()));
    assert_eq!(ask(&client, &[&one]).await.status, 200);
    let full = ask(&client, &[&two]).await;
    assert_eq!((full.status.as_u16(), problem(&full)), (503, "token-store-full".into()));
    assert!(full.header("retry-after").is_some());
    assert_eq!(problem(&ask(&client, &[&one]).await), "token-spent");
}

#[tokio::test]
async fn bad_tokens_have_a_limit_of_their_own() {
    let ds = Ds::start().await;
    let gateway = start(&ds, REQUIRED).await;
    let client = gateway.stranger();
    let challenge = challenges(&ask(&client, &[]).await.headers).remove(0);
    let token = issuer().token(&challenge).unwrap();
    let mut bad = token.clone();
    let mut verified = 0;
    for n in 0..80u8 {
        bad[100] = n;
        bad[101] = token[101] ^ 1;
        let response = ask(&client, &[&authorization(&bad)]).await;
        match response.status.as_u16() {
            401 => verified += 1,
            429 => assert_eq!(response.json()["violated-policies"][0], "bad-tokens"),
            other => panic!("{other}"),
        }
    }
    assert!((60..=62).contains(&verified), "{verified} of 80 were verified");
    assert_eq!(ask(&client, &[]).await.status, 401, "who brings none is only told to");
    assert_eq!(ds.begun(), 0);
}
