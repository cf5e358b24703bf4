//! Privacy Pass: tokens issued by the privacypass crate's issuer, redeemed over TLS.

use crate::harness::{Gateway, Setup, private_message};
use crate::support::client::{Client, Response};
use crate::support::ds::Ds;
use crate::support::encode;
use crate::support::tokens::{Issuer, authorization, challenges};
use base64::Engine as _;
use http::Method;
use privacypass::TokenType;
use std::sync::OnceLock;
use std::time::Duration;

fn issuer() -> &'static Issuer {
    static ISSUER: OnceLock<Issuer> = OnceLock::new();
    ISSUER.get_or_init(|| Issuer::generate("issuer.example"))
}

pub fn request() -> Vec<u8> {
    encode::queueing_request("a.example", "b.example", b"bob's queue", &private_message(b"g"))
}

pub async fn ask(client: &Client, credentials: &[&str]) -> Response {
    let headers: Vec<_> = credentials.iter().map(|value| ("authorization", *value)).collect();
    client.send_with(Method::POST, "/connection_request", &headers, request()).await.unwrap()
}

/// The last part of a problem's type.
pub fn problem(response: &Response) -> String {
    response.json()["type"].as_str().unwrap_or_default().rsplit(':').next().unwrap_or_default().to_owned()
}

async fn start(ds: &Ds, more: &str) -> Gateway {
    let dir = tempfile::tempdir().unwrap();
    issuer().write(dir.path(), "issuer.pub");
    let pass = "[[privacy_pass.issuer]]\nname = \"issuer.example\"\ntoken_type = 2\nkey_file = \"issuer.pub\"\n";
    let settings = if more.contains("[privacy_pass]") { "" } else { "[privacy_pass]\n" };
    Gateway::start_in(dir, Setup::of(ds).with(more).with(settings).with(pass)).await
}

pub const REQUIRED: &str = "[endpoints.connection_request]\ntoken = \"required\"\n";

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

/// Status, and the last part of a problem's type.
pub fn outcome(response: &Response) -> (u16, String) {
    (response.status.as_u16(), problem(response))
}

/// A gateway that takes tokens of these issuers.
async fn start_with(ds: &Ds, issuers: &[Issuer], more: &str) -> Gateway {
    let dir = tempfile::tempdir().unwrap();
    let table = |(n, issuer): (usize, &Issuer)| {
        issuer.write(dir.path(), &format!("key-{n}"));
        issuer.table(&format!("key-{n}"))
    };
    let tables: String = issuers.iter().enumerate().map(table).collect();
    let settings = if more.contains("[privacy_pass]") { "" } else { "[privacy_pass]\n" };
    Gateway::start_in(dir, Setup::of(ds).with(more).with(settings).with(&tables)).await
}

const TYPES: [TokenType; 3] = [TokenType::Public, TokenType::PrivateP384, TokenType::PrivateRistretto255];

#[tokio::test]
async fn tokens_of_every_type_and_from_batches() {
    let ds = Ds::start().await;
    let issuers = TYPES.map(|kind| Issuer::of("issuer.example", kind));
    let gateway = start_with(&ds, &issuers, REQUIRED).await;
    let client = gateway.stranger();
    let challenged = ask(&client, &[]).await;
    let challenges = challenges(&challenged.headers);
    assert_eq!(challenges.iter().map(|c| c.token_type()).collect::<Vec<_>>(), [2, 1, 5], "in one answer");
    let mut redeemed = 0;
    for (issuer, challenge) in issuers.iter().zip(&challenges) {
        assert_eq!(challenge.token_key, issuer.token_key());
        let mut tokens = vec![issuer.token(challenge).unwrap()];
        if issuer.kind() != TokenType::Public {
            tokens.extend(issuer.batch(challenge, 3).unwrap());
        }
        for token in &tokens {
            let value = authorization(token);
            assert_eq!(ask(&client, &[&value]).await.status, 200, "type {}", challenge.token_type());
            assert_eq!(outcome(&ask(&client, &[&value]).await), (401, "token-spent".into()));
            redeemed += 1;
        }
        // Of a type whose key has not made it.
        let mut bad = issuer.token(challenge).unwrap();
        *bad.last_mut().unwrap() ^= 1;
        assert_eq!(outcome(&ask(&client, &[&authorization(&bad)]).await), (401, "token-bad".into()));
        bad[1] = if bad[1] == 2 { 1 } else { 2 };
        assert_eq!(outcome(&ask(&client, &[&authorization(&bad)]).await), (401, "token-malformed".into()));
    }
    assert_eq!((redeemed, ds.complete()), (9, 9));
    for (kind, n) in [(1, 4.0), (2, 1.0), (5, 4.0)] {
        let series = format!("moh_gateway_tokens_redeemed_total{{type=\"{kind}\"}}");
        gateway.until_metric(&series, |redeemed| redeemed == n).await;
    }
}

#[tokio::test]
async fn a_token_is_for_the_endpoint_or_the_limit_that_it_was_asked_for() {
    let ds = Ds::start().await;
    let limits = r#"
[privacy_pass]
context = "CONTEXT"
[endpoints.connection_request]
token = "required"
[[limit]]
name = "packages"
endpoints = ["connection_key_packages"]
key = ["ip"]
rate = "1/h"
burst = 1
token = "exempt"
"#;
    let packages = || encode::connection_key_package_request("a.example", "b.example", b"bob");
    for context in ["origin", "endpoint", "limit"] {
        let issuers = [Issuer::generate("issuer.example")];
        let gateway = start_with(&ds, &issuers, &limits.replace("CONTEXT", context)).await;
        let client = gateway.stranger();
        let ask_packages = async |credential: &str| {
            let headers = [("authorization", credential)];
            client.send_with(Method::POST, "/connection_key_packages", &headers, packages()).await.unwrap()
        };
        assert_eq!(ask_packages("none").await.status, 200);
        let limited = ask_packages("none").await;
        assert_eq!(limited.status, 429);
        let token =
            |response: &Response| authorization(&issuers[0].token(&challenges(&response.headers).remove(0)).unwrap());
        let (of_request, of_packages) = (token(&ask(&client, &[]).await), token(&limited));
        let elsewhere = match context {
            "origin" => ((200, String::new()), 200),
            _ => ((401, "token-wrong-challenge".into()), 401),
        };
        assert_eq!(outcome(&ask(&client, &[&of_packages]).await), elsewhere.0, "{context}");
        assert_eq!(ask_packages(&of_request).await.status, elsewhere.1, "{context}");
        if context != "origin" {
            assert_eq!(ask_packages(&of_packages).await.status, 200, "{context}");
            assert_eq!(ask(&client, &[&of_request]).await.status, 200, "{context}");
        }
    }
}

#[tokio::test]
async fn a_token_exempts_from_a_limit_that_is_exceeded() {
    let ds = Ds::start().await;
    let limits = r#"
[[limit]]
name = "strangers"
endpoints = ["connection_request"]
key = ["target"]
rate = "1/h"
burst = 2
token = "exempt"
[[limit]]
name = "trial"
endpoints = ["connection_request"]
key = ["ip"]
rate = "1/h"
burst = 1
mode = "shadow"
token = "exempt"
"#;
    let gateway = start(&ds, limits).await;
    let client = gateway.stranger();
    assert_eq!(ask(&client, &[]).await.status, 200);
    // A challenge cannot be had here but for a limit that is exceeded; one of another gateway would do as well.
    let second = ask(&client, &[]).await;
    assert_eq!(second.status, 200, "the shadow, which is exceeded, refuses nobody");
    let limited = ask(&client, &[]).await;
    assert_eq!(limited.status, 429);
    let challenge = challenges(&limited.headers).remove(0);
    for _ in 0..5 {
        let token = authorization(&issuer().token(&challenge).unwrap());
        assert_eq!(ask(&client, &[&token]).await.status, 200);
        assert_eq!(outcome(&ask(&client, &[&token]).await), (401, "token-spent".into()));
    }
    assert_eq!(ds.complete(), 7);
    let exempted = |limit, mode| {
        format!("moh_gateway_limit_decisions_total{{limit=\"{limit}\",mode=\"{mode}\",outcome=\"exempted\"}}")
    };
    assert_eq!(gateway.metric(&exempted("strangers", "enforce")).await, 5.0);
    // Where no limit that enforces is exceeded a token is not needed, and not spent.
    let other = encode::queueing_request("a.example", "b.example", b"carol's queue", &private_message(b"g"));
    let token = authorization(&issuer().token(&challenge).unwrap());
    let headers = [("authorization", &*token)];
    let response = client.send_with(Method::POST, "/connection_request", &headers, other).await.unwrap();
    assert_eq!((response.status.as_u16(), ask(&client, &[&token]).await.status.as_u16()), (200, 200));
}

#[tokio::test]
async fn a_token_that_is_required_is_spent_whatever_limits_say() {
    let ds = Ds::start().await;
    // A cell is free again while a token is verified: the limit does not need it any more, the endpoint does.
    let more = format!(
        "{REQUIRED}[[limit]]\nname = \"l\"\nendpoints = [\"connection_request\"]\nkey = [\"ip\"]\nrate = \"300/s\"\n\
         burst = 1\ntoken = \"exempt\"\n"
    );
    let issuers = [Issuer::of("issuer.example", TokenType::PrivateP384)];
    let gateway = start_with(&ds, &issuers, &more).await;
    let client = gateway.stranger();
    let challenge = challenges(&ask(&client, &[]).await.headers).remove(0);
    for _ in 0..5 {
        let tokens = [(); 3].map(|()| authorization(&issuers[0].token(&challenge).unwrap()));
        let [one, two, three] = tokens.each_ref().map(|token| [token.as_str()]);
        let answers = tokio::join!(ask(&client, &one), ask(&client, &two), ask(&client, &three));
        for answer in [answers.0, answers.1, answers.2] {
            assert_eq!(answer.status, 200);
        }
        for token in &tokens {
            assert_eq!(outcome(&ask(&client, &[token]).await), (401, "token-spent".into()));
        }
    }
}

#[tokio::test]
async fn bad_and_spent_tokens_are_refused_from_memory() {
    let ds = Ds::start().await;
    let gateway = start(&ds, REQUIRED).await;
    let client = gateway.stranger();
    let challenge = challenges(&ask(&client, &[]).await.headers).remove(0);
    let good = issuer().token(&challenge).unwrap();
    let mut bad = issuer().token(&challenge).unwrap();
    bad[200] ^= 1;
    let (good, bad) = (authorization(&good), authorization(&bad));
    assert_eq!(ask(&client, &[&good]).await.status, 200);
    let verified = "moh_gateway_token_seconds_count";
    assert_eq!(gateway.metric(verified).await, 1.0);
    for n in 0..10 {
        assert_eq!(outcome(&ask(&client, &[&good]).await), (401, "token-spent".into()));
        assert_eq!(outcome(&ask(&client, &[&bad]).await), (401, "token-bad".into()));
        let again = gateway.metric("moh_gateway_tokens_refused_again_total").await;
        assert_eq!((gateway.metric(verified).await, again), (2.0, f64::from(2 * n + 1)), "verified once each");
    }
}

#[tokio::test]
async fn more_tokens_than_can_be_verified_in_time_are_refused_and_not_lost() {
    let ds = Ds::start().await;
    let issuers = [Issuer::of("issuer.example", TokenType::PrivateP384)];
    let more = format!("{REQUIRED}[privacy_pass]\nthreads = 1\nmax_wait = \"5ms\"\n");
    let gateway = start_with(&ds, &issuers, &more).await;
    let client = gateway.stranger();
    let challenge = challenges(&ask(&client, &[]).await.headers).remove(0);
    let mut left: Vec<_> = issuers[0].batch(&challenge, 60).unwrap().iter().map(|t| authorization(t)).collect();
    let mut shed = 0;
    for _ in 0..100 {
        let answers = left.iter().map(|token| {
            let (client, token) = (gateway.stranger(), token.clone());
            tokio::spawn(async move { (ask(&client, &[&token]).await, token) })
        });
        let mut busy = vec![];
        for answer in answers.collect::<Vec<_>>() {
            let (answer, token) = answer.await.unwrap();
            match outcome(&answer) {
                (200, _) => {}
                (503, problem) => {
                    assert_eq!((&*problem, answer.header("retry-after")), ("token-busy", Some("1")));
                    assert!(answer.header("www-authenticate").is_none(), "it has a token already");
                    busy.push(token);
                }
                other => panic!("{other:?}"),
            }
        }
        shed += busy.len();
        left = busy;
        if left.is_empty() {
            break;
        }
    }
    // The 41st field of a thread's stat: SCHED_IDLE is 5.
    let tasks = std::fs::read_dir(format!("/proc/{}/task", gateway.pid())).unwrap();
    let stats = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap());
    let policies = stats.filter(|stat| stat.contains("(tokens-")).map(|stat| {
        let after_name = stat.rsplit_once(") ").unwrap().1;
        after_name.split(' ').nth(38).unwrap().to_owned()
    });
    assert_eq!(policies.collect::<Vec<_>>(), ["5"]);
    assert!(shed > 0 && left.is_empty(), "{shed} were shed, {} are left", left.len());
    assert_eq!(ds.complete(), 60, "each was taken once");
    assert_eq!(gateway.metric("moh_gateway_tokens_shed_total").await, shed as f64);
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
