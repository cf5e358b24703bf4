//! Issuers' keys: their directories, rotation, and an issuer that is gone; and the commands to try it all with.

use crate::harness::{Gateway, Setup, binary, ca};
use crate::support::ds::Ds;
use crate::support::issuing::{self, Issuer, NAME};
use crate::tokens::{REQUIRED, ask, outcome, request};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const HEARD: &str = "moh_gateway_issuer_directory_fetches_total{issuer=\"issuer.example\",result=\"ok\"}";
const FAILED: &str = "moh_gateway_issuer_directory_fetches_total{issuer=\"issuer.example\",result=\"failed\"}";

/// Our issuer, with a certificate for localhost too.
async fn issuer(dir: &Path, more: &[&str]) -> Issuer {
    if !dir.join("tls.pem").exists() {
        ca().issue(&[NAME, "localhost"]).write(dir, "tls");
    }
    let (cert, key) = (dir.join("tls.pem"), dir.join("tls.key"));
    let tls = ["--cert", cert.to_str().unwrap(), "--key", key.to_str().unwrap()];
    Issuer::start(Path::new(binary()), &dir.join("issuer"), &[&tls, more].concat()).await.unwrap()
}

async fn gateway(ds: &Ds, issuer: &Issuer, more: &str) -> Gateway {
    let url = format!("https://localhost:{}/.well-known/private-token-issuer-directory", issuer.addr.port());
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("secret"), b"a secret that outlives the process").unwrap();
    let pass = format!(
        "[privacy_pass]\n{more}\n[[privacy_pass.issuer]]\nname = \"{NAME}\"\ntoken_type = 2\ndirectory = \"{url}\"\n\
         directory_ca = \"ca.pem\"\n"
    );
    Gateway::start_in(dir, Setup::of(ds).with(REQUIRED).with(&pass)).await
}

/// A token of type 2, by our client.
async fn token(gateway: &Gateway, issuer: &Issuer) -> String {
    let (body, roots) = (gateway.dir.path().join("request.bin"), gateway.dir.path().join("ca.pem"));
    std::fs::write(&body, request()).unwrap();
    let more = ["--type", "2", "--body", body.to_str().unwrap()];
    let (of_gateway, of_issuer) = ((gateway.addr, &*roots), (issuer.addr, &*roots));
    issuing::token(Path::new(binary()), "/connection_request", of_gateway, of_issuer, &more).await.unwrap()
}

/// The key that a gateway's challenge names.
async fn named(gateway: &Gateway) -> Vec<u8> {
    let answer = ask(&gateway.stranger(), &[]).await;
    crate::support::tokens::challenges(&answer.headers).remove(0).token_key
}

#[tokio::test]
async fn a_rotation_refuses_no_token() {
    let (ds, dir) = (Ds::start().await, tempfile::tempdir().unwrap());
    let issuer = issuer(dir.path(), &[]).await;
    let mut gateway = gateway(&ds, &issuer, "").await;
    gateway.until_metric(HEARD, |n| n >= 1.0).await;
    let (old_key, old_token) = (named(&gateway).await, token(&gateway, &issuer).await);

    let before = std::fs::read(issuer.key_file(2)).unwrap();
    issuer.hangup().unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    while std::fs::read(issuer.key_file(2)).unwrap() == before {
        assert!(Instant::now() < until, "the issuer does not rotate");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // A reload has the directory asked at once.
    let heard = gateway.metric(HEARD).await;
    gateway.reload("ok", |_| ()).await;
    gateway.until_metric(HEARD, |n| n > heard).await;
    let new_key = named(&gateway).await;
    assert_ne!(new_key, old_key);
    assert_eq!(ask(&gateway.stranger(), &[&token(&gateway, &issuer).await]).await.status, 200);
    assert_eq!(ask(&gateway.stranger(), &[&old_token]).await.status, 200, "a token of the old key");
    // The same for those who have the keys from files: the new one first, the old one with it.
    let keys = std::fs::read_to_string(issuer.key_file(2)).unwrap();
    assert_eq!(keys.matches("BEGIN").count(), 2);
    assert_eq!(outcome(&ask(&gateway.stranger(), &[&old_token]).await), (401, "token-spent".into()));
    assert_eq!(ds.complete(), 2);
}

#[tokio::test]
async fn the_next_key_is_known_before_its_time_and_named_from_then_on() {
    let (ds, dir) = (Ds::start().await, tempfile::tempdir().unwrap());
    let began = Instant::now();
    // Each key lives 14 s, and the next is in the directory 7 s before; a gateway asks every 10 s at most.
    let issuer = issuer(dir.path(), &["--rotate", "14s"]).await;
    let gateway = gateway(&ds, &issuer, "").await;
    gateway.until_metric(HEARD, |n| n >= 1.0).await;
    let (old_key, old_token) = (named(&gateway).await, token(&gateway, &issuer).await);
    let mut heard = vec![];
    let changed = loop {
        let key = named(&gateway).await;
        heard.push(gateway.metric(HEARD).await);
        if key != old_key {
            break began.elapsed();
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{}", gateway.stderr());
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    assert_eq!(heard.last(), Some(&2.0), "asked again by itself, and not for every request");
    assert!(changed > Duration::from_secs(12), "{changed:?}");
    assert_eq!(ask(&gateway.stranger(), &[&token(&gateway, &issuer).await]).await.status, 200);
    assert_eq!(ask(&gateway.stranger(), &[&old_token]).await.status, 200);
}

#[tokio::test]
async fn an_issuer_that_is_gone_is_remembered() {
    let (ds, dir) = (Ds::start().await, tempfile::tempdir().unwrap());
    let mut issuer = issuer(dir.path(), &[]).await;
    let more = "secret_file = \"secret\"\nstate = \"state\"\nspent = \"files\"";
    let mut gateway = gateway(&ds, &issuer, more).await;
    gateway.until_metric(HEARD, |n| n >= 1.0).await;
    let (key, ready) = (named(&gateway).await, token(&gateway, &issuer).await);
    let spare = token(&gateway, &issuer).await;
    issuer.stop().await;
    gateway.reload("ok", |_| ()).await;
    gateway.until_metric(FAILED, |n| n >= 1.0).await;
    assert_eq!(ask(&gateway.stranger(), &[&ready]).await.status, 200, "the last good keys stay");
    gateway.restart("-KILL").await;
    assert_eq!(named(&gateway).await, key, "over a restart, too");
    assert_eq!(ask(&gateway.stranger(), &[&spare]).await.status, 200);
    assert_eq!(outcome(&ask(&gateway.stranger(), &[&ready]).await), (401, "token-spent".into()));
    gateway.until_metric(FAILED, |n| n >= 1.0).await;
    // It is asked again, and heard again.
    let address = issuer.addr.to_string();
    let _back = self::issuer(dir.path(), &["--listen", &address]).await;
    gateway.until_metric(HEARD, |n| n >= 1.0).await;
}

#[tokio::test]
async fn without_a_key_nothing_is_asked_for() {
    let (ds, dir) = (Ds::start().await, tempfile::tempdir().unwrap());
    let mut issuer = issuer(dir.path(), &[]).await;
    issuer.stop().await;
    let gateway = gateway(&ds, &issuer, "").await;
    let answer = ask(&gateway.stranger(), &[]).await;
    assert_eq!(outcome(&answer), (503, "token-no-key".into()));
    assert!(answer.header("retry-after").is_some() && answer.header("www-authenticate").is_none());
    gateway.until_metric(FAILED, |n| n >= 1.0).await;
    assert!(gateway.stderr().contains("its directory: error sending request"), "{}", gateway.stderr());
}

#[tokio::test]
async fn a_reload_takes_issuers_bindings_and_another_epoch() {
    let (ds, dir) = (Ds::start().await, tempfile::tempdir().unwrap());
    let issuer = issuer(dir.path(), &[]).await;
    let mut gateway = gateway(&ds, &issuer, "").await;
    gateway.until_metric(HEARD, |n| n >= 1.0).await;
    let ready = token(&gateway, &issuer).await;
    gateway
        .reload("ok", |setup| setup.more = setup.more.replace("[privacy_pass]", "[privacy_pass]\nepoch = \"2h\""))
        .await;
    gateway.until_metric(HEARD, |n| n >= 2.0).await;
    let answer = ask(&gateway.stranger(), &[&ready]).await;
    assert_eq!(outcome(&answer), (401, "token-wrong-challenge".into()), "it is of another epoch");
    let ready = token(&gateway, &issuer).await;
    assert_eq!(ask(&gateway.stranger(), &[&ready]).await.status, 200);
    assert_eq!(outcome(&ask(&gateway.stranger(), &[&ready]).await), (401, "token-spent".into()));
    let private =
        format!("[[privacy_pass.issuer]]\nname = \"{NAME}\"\ntoken_type = 5\nkey_file = {:?}\n", issuer.key_file(5));
    gateway
        .reload("ok", |setup| {
            setup.more = setup.more.replace("epoch = \"2h\"", "epoch = \"2h\"\ncontext = \"endpoint\"") + &private
        })
        .await;
    let answer = ask(&gateway.stranger(), &[]).await;
    let challenges = crate::support::tokens::challenges(&answer.headers);
    assert_eq!(challenges.iter().map(|c| c.token_type()).collect::<Vec<_>>(), [2, 5], "the directory's key stays");
}

#[tokio::test]
async fn the_commands_say_what_is_wrong() {
    let (ds, dir) = (Ds::start().await, tempfile::tempdir().unwrap());
    let issuer = issuer(dir.path(), &["--rotate", "1h"]).await;
    let gateway = gateway(&ds, &issuer, "").await;
    gateway.until_metric(HEARD, |n| n >= 1.0).await;
    let roots = gateway.dir.path().join("ca.pem");
    let tell = async |more: &[&str], path: &str| {
        let of = ((gateway.addr, &*roots), (issuer.addr, &*roots));
        issuing::token(Path::new(binary()), path, of.0, of.1, more).await.unwrap_err().to_string()
    };
    let body = gateway.dir.path().join("request.bin");
    std::fs::write(&body, request()).unwrap();
    let body = ["--body", body.to_str().unwrap()];
    let said = tell(&body, "/deliver_message").await;
    assert!(said.contains("200 OK without a challenge"), "{said}");
    let said = tell(&[&body[..], &["--type", "5"]].concat(), "/connection_request").await;
    assert!(said.contains("challenges are for tokens of type 2"), "{said}");
    let said = tell(&["--body", "nowhere"], "/connection_request").await;
    assert!(said.contains("nowhere: No such file"), "{said}");
    let elsewhere = tempfile::tempdir().unwrap();
    let other = self::issuer(elsewhere.path(), &[]).await;
    let of_other = ((gateway.addr, &*roots), (other.addr, &*roots));
    let said = issuing::token(Path::new(binary()), "/connection_request", of_other.0, of_other.1, &body).await;
    let said = said.unwrap_err().to_string();
    assert!(said.contains("is not among those that the issuer publishes"), "{said}");

    let run = |args: &[&str]| {
        let output = Command::new(binary()).args(args).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let at = issuer.addr.to_string();
    let state = dir.path().join("third");
    let (ok, said) = run(&["issuer", "--dir", state.to_str().unwrap(), "--listen", &at]);
    assert!(!ok && said.contains(&format!("{at}: Address already in use")), "{said}");
    let (ok, said) = run(&["issuer", "--dir", state.to_str().unwrap(), "--rotate", "1s"]);
    assert!(!ok && said.contains("2s or more"), "{said}");
    std::fs::write(state.join("keys.json"), "[]x").unwrap();
    let (ok, said) = run(&["issuer", "--dir", state.to_str().unwrap()]);
    assert!(!ok && said.contains("keys.json: trailing characters"), "{said}");
}

#[tokio::test]
async fn our_issuer_refuses_what_is_no_request() {
    let dir = tempfile::tempdir().unwrap();
    let issuer = issuer(dir.path(), &[]).await;
    let client = || crate::support::client::Client::tls(issuer.addr, &ca().pem()).sni(NAME).authority(NAME);
    let request = "application/private-token-request";
    for (method, path, content_type, body, status) in [
        ("POST", "/token-request", request, vec![], 422),
        ("POST", "/token-request", request, vec![0, 2], 422),
        ("POST", "/token-request", request, vec![0, 2, 7], 422),
        ("POST", "/token-request", request, vec![0; 259], 422),
        ("POST", "/token-request", request, vec![0; 260], 422),
        ("POST", "/token-request", request, vec![0xff; 1000], 422),
        ("POST", "/token-request", "text/plain", vec![0; 259], 415),
        ("GET", "/token-request", request, vec![], 405),
        ("POST", "/.well-known/private-token-issuer-directory", request, vec![], 405),
        ("GET", "/", request, vec![], 404),
    ] {
        for client in [client(), client().http1()] {
            let method = method.parse().unwrap();
            let answer = client.send_with(method, path, &[("content-type", content_type)], body.clone()).await.unwrap();
            assert_eq!(answer.status, status, "{path}, {} octets", body.len());
        }
    }
    let answer = client().send(http::Method::GET, "/.well-known/private-token-issuer-directory", "").await.unwrap();
    assert_eq!(answer.header("content-type"), Some("application/private-token-issuer-directory"));
    assert_eq!(answer.header("cache-control"), Some("max-age=3600"));
    let tag = answer.header("etag").unwrap().to_owned();
    let path = "/.well-known/private-token-issuer-directory";
    let again = client().send_with(http::Method::GET, path, &[("if-none-match", &tag)], "").await.unwrap();
    assert_eq!((again.status.as_u16(), again.body.len()), (304, 0));
    // A request for each key that it publishes, with a blinded message that is none.
    let document = answer.json();
    for key in document["token-keys"].as_array().unwrap() {
        use base64::Engine as _;
        let octets = base64::engine::general_purpose::URL_SAFE.decode(key["token-key"].as_str().unwrap()).unwrap();
        let id = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &octets);
        let kind = key["token-type"].as_u64().unwrap() as u8;
        for len in [0, 1, 32, 48, 49, 50, 255, 256] {
            let body = [&[0, kind, id.as_ref()[31]][..], &vec![0xff; len]].concat();
            let headers = [("content-type", request)];
            let answer = client().send_with(http::Method::POST, "/token-request", &headers, body).await.unwrap();
            assert_eq!(answer.status, 422, "type {kind}, {len} octets");
        }
    }
}
