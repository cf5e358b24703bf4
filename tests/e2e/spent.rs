//! Spent tokens: once across a fleet, over restarts, and when what knows of them is gone.

use crate::harness::{Gateway, Setup};
use crate::support::client::Client;
use crate::support::ds::Ds;
use crate::support::redis::{FaultProxy, Mode, Redis};
use crate::support::tokens::{Issuer, authorization, challenges};
use crate::tokens::{REQUIRED, ask, outcome};
use privacypass::TokenType;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SECRET: &[u8] = b"a secret that is the same on all nodes";

/// A gateway that takes the tokens of an issuer, with a secret that others have too.
async fn gateway(ds: &Ds, issuer: &Issuer, settings: &str) -> Gateway {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("secret"), SECRET).unwrap();
    issuer.write(dir.path(), "key");
    let pass = format!("[privacy_pass]\nsecret_file = \"secret\"\nmax_wait = \"5s\"\n{settings}\n");
    Gateway::start_in(dir, Setup::of(ds).with(REQUIRED).with(&pass).with(&issuer.table("key"))).await
}

fn redis(addr: SocketAddr, more: &str) -> String {
    format!(
        "spent = \"redis\"\n{more}\n[limits.redis]\nnodes = [\"{addr}\"]\nsecret_file = \"secret\"\nmode = \"tokens\"\n\
         timeout = \"500ms\""
    )
}

async fn until_up(gateway: &Gateway) {
    gateway.until_metric("moh_gateway_limit_store_up", |up| up == 1.0).await;
}

/// Tokens for the challenge of a gateway.
async fn tokens(client: &Client, issuer: &Issuer, n: u16) -> Vec<String> {
    let challenge = challenges(&ask(client, &[]).await.headers).remove(0);
    match issuer.kind() {
        TokenType::Public => (0..n).map(|_| authorization(&issuer.token(&challenge).unwrap())).collect(),
        _ => issuer.batch(&challenge, n).unwrap().iter().map(|token| authorization(token)).collect(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_spends_on_two_nodes_at_once_one_wins() {
    const TOKENS: usize = 1000;
    let (ds, store) = (Ds::start().await, Redis::start().await);
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let settings = redis(store.addr(), "");
    let (one, two) = (gateway(&ds, &issuer, &settings).await, gateway(&ds, &issuer, &settings).await);
    until_up(&one).await;
    until_up(&two).await;
    // All of them for the challenges of one node, which are good at the other.
    let mut all = vec![];
    while all.len() < TOKENS {
        all.extend(tokens(&one.stranger(), &issuer, 100).await);
    }
    let clients: Arc<Vec<_>> = Arc::new((0..4).map(|_| (one.stranger(), two.stranger())).collect());
    let all = Arc::new(all);
    let workers: Vec<_> = (0..4)
        .map(|n| {
            let (clients, all) = (clients.clone(), all.clone());
            tokio::spawn(async move {
                let (mut won, mut lost) = (0, 0);
                for token in all.iter().skip(n).step_by(4) {
                    let (one, two) = &clients[n];
                    let token = [token.as_str()];
                    let (one, two) = tokio::join!(ask(one, &token), ask(two, &token));
                    for answer in [one, two] {
                        match outcome(&answer) {
                            (200, _) => won += 1,
                            (401, problem) if problem == "token-spent" => lost += 1,
                            other => panic!("{other:?}"),
                        }
                    }
                }
                (won, lost)
            })
        })
        .collect();
    let (mut won, mut lost) = (0, 0);
    for worker in workers {
        let (w, l) = worker.await.unwrap();
        (won, lost) = (won + w, lost + l);
    }
    assert_eq!((won, lost, ds.complete()), (TOKENS, TOKENS, TOKENS));
    // What the store knows of them is gone by itself, in time.
    let of_keys = "local keys, most = redis.call('KEYS', 'moh:spent:*'), 0 for _, key in ipairs(keys) do most = \
                   math.max(most, redis.call('PTTL', key)) end return {#keys, most}";
    let told = store.cli(&["--raw", "EVAL", of_keys, "0"]).await;
    let told: Vec<u64> = told.lines().map(|line| line.parse().unwrap()).collect();
    assert!(told[0] == TOKENS as u64 && (1..=2 * 3600 * 1000 + 120_000).contains(&told[1]), "{told:?}");
}

#[tokio::test]
async fn what_is_given_back_on_one_node_is_good_on_another() {
    let (ds, store) = (Ds::start().await, Redis::start().await);
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let settings = redis(store.addr(), "");
    let nowhere = Ds::start().await;
    nowhere.stop().await;
    let (one, two) = (gateway(&nowhere, &issuer, &settings).await, gateway(&ds, &issuer, &settings).await);
    until_up(&one).await;
    until_up(&two).await;
    for token in tokens(&one.stranger(), &issuer, 10).await {
        assert!([502, 503].contains(&ask(&one.stranger(), &[&token]).await.status.as_u16()));
        let until = Instant::now() + Duration::from_secs(5);
        // Given back a moment after the answer; asked too early, it is not asked for again for as long.
        while ask(&two.stranger(), &[&token]).await.status != 200 {
            assert!(Instant::now() < until, "it is not given back");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(outcome(&ask(&two.stranger(), &[&token]).await), (401, "token-spent".into()));
        assert_eq!(outcome(&ask(&one.stranger(), &[&token]).await), (401, "token-spent".into()), "the other node");
    }
    assert_eq!(ds.complete(), 10);
}

#[tokio::test]
async fn without_the_store_tokens_are_refused_or_this_nodes_own() {
    let (ds, store) = (Ds::start().await, Redis::start().await);
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let between = FaultProxy::start(store.addr()).await;
    let closed = gateway(&ds, &issuer, &redis(between.addr(), "")).await;
    let local = gateway(&ds, &issuer, &redis(between.addr(), "on_store_failure = \"local\"")).await;
    until_up(&closed).await;
    until_up(&local).await;
    let ready = tokens(&closed.stranger(), &issuer, 3).await;
    let [first, second, third] = &ready[..] else { panic!() };
    between.set(Mode::Blackhole);
    let answer = ask(&closed.stranger(), &[first]).await;
    assert_eq!(outcome(&answer), (503, "token-store-unavailable".into()));
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert_eq!(ask(&local.stranger(), &[second]).await.status, 200);
    assert_eq!(outcome(&ask(&local.stranger(), &[second]).await), (401, "token-spent".into()));
    between.set(Mode::Pass);
    until_up(&closed).await;
    // Nothing was lost: what the store was asked and did not answer was given back.
    let until = Instant::now() + Duration::from_secs(5);
    while ask(&closed.stranger(), &[first]).await.status != 200 {
        assert!(Instant::now() < until, "it is not given back");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    until_up(&local).await;
    assert_eq!(outcome(&ask(&local.stranger(), &[first]).await), (401, "token-spent".into()));
    assert_eq!(ask(&local.stranger(), &[third]).await.status, 200);
    assert_eq!(ds.complete(), 3);
}

#[tokio::test]
async fn a_leased_limit_without_its_store_is_no_way_around_spending() {
    let (ds, store) = (Ds::start().await, Redis::start().await);
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("secret"), SECRET).unwrap();
    issuer.write(dir.path(), "key");
    let limit = "[[limit]]\nname = \"l\"\nendpoints = [\"connection_request\"]\nkey = [\"ip\"]\nrate = \"1/h\"\nburst = 1\n\
                 token = \"exempt\"\n";
    let leased = format!(
        "[limits.redis]\nnodes = [\"{}\"]\nsecret_file = \"secret\"\nmode = \"leased\"\n[privacy_pass]\n",
        store.addr()
    );
    let gateway = Gateway::start_in(dir, Setup::of(&ds).with(limit).with(&leased).with(&issuer.table("key"))).await;
    until_up(&gateway).await;
    store.kill();
    gateway.until_metric("moh_gateway_limit_store_up", |up| up == 0.0).await;
    let client = gateway.stranger();
    assert_eq!(ask(&client, &[]).await.status, 200, "this node's own limit");
    let all = tokens(&client, &issuer, 3).await;
    for token in &all {
        assert_eq!(ask(&client, &[token]).await.status, 200);
        assert_eq!(outcome(&ask(&client, &[token]).await), (401, "token-spent".into()));
    }
    assert_eq!(ds.complete(), 4);
}

#[tokio::test]
async fn a_store_that_may_forget_is_warned_of() {
    let (ds, store) =
        (Ds::start().await, Redis::start_with(&["--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"]).await);
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let gateway = gateway(&ds, &issuer, &redis(store.addr(), "")).await;
    let until = Instant::now() + Duration::from_secs(10);
    while !gateway.stderr().contains("maxmemory-policy should be noeviction") {
        assert!(Instant::now() < until, "{}", gateway.stderr());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn files_outlive_every_end_of_the_process() {
    let ds = Ds::start().await;
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let mut gateway = gateway(&ds, &issuer, "spent = \"files\"\nstate = \"state\"").await;
    let all = tokens(&gateway.stranger(), &issuer, 30).await;
    let (before, after) = all.split_at(20);
    for (n, token) in before.iter().enumerate() {
        assert_eq!(ask(&gateway.stranger(), &[token]).await.status, 200);
        // The moment it is answered.
        if n % 5 == 4 {
            gateway.restart(if n % 2 == 0 { "-KILL" } else { "-TERM" }).await;
            let spent = &before[n - 4..=n];
            for token in spent {
                assert_eq!(outcome(&ask(&gateway.stranger(), &[token]).await), (401, "token-spent".into()));
            }
        }
    }
    assert_eq!(gateway.metric("moh_gateway_tokens_spent_held").await, 20.0);
    // One that was given back is so after a restart, too.
    ds.stop().await;
    assert_eq!(ask(&gateway.stranger(), &[&after[0]]).await.status, 502);
    let back = Ds::start_at(ds.addr, ds.delivery.clone()).await;
    gateway.restart("-KILL").await;
    for token in after {
        assert_eq!(ask(&gateway.stranger(), &[token]).await.status, 200);
    }
    assert_eq!(ds.complete() + back.complete(), 30);

    // Another gateway on the same files would spend them twice; another secret is no reason to lose them.
    let mut second = gateway.restart_elsewhere();
    assert!(!second.wait().unwrap().success());
    let file = gateway.dir.path().join("secret");
    std::fs::write(&file, b"another secret that is no less long!").unwrap();
    gateway.restart("-TERM").await;
    assert_eq!(outcome(&ask(&gateway.stranger(), &[&all[0]]).await), (401, "token-wrong-challenge".into()));
    std::fs::write(&file, SECRET).unwrap();
    gateway.restart("-TERM").await;
    assert_eq!(outcome(&ask(&gateway.stranger(), &[&all[0]]).await), (401, "token-spent".into()));
}

#[tokio::test]
async fn a_request_that_a_node_left_untouched_and_none_will_have_keeps_its_token() {
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let (refusing, _) = crate::forwarding::resetting_node(usize::MAX, h2::Reason::REFUSED_STREAM).await;
    let (ending, _) = crate::forwarding::resetting_node(usize::MAX, h2::Reason::INTERNAL_ERROR).await;
    for (node, problem) in [(refusing, ""), (ending, "token-spent")] {
        let dir = tempfile::tempdir().unwrap();
        issuer.write(dir.path(), "key");
        let setup = Setup::of_nodes(&[node]).h2c().with(REQUIRED).with("[privacy_pass]").with(&issuer.table("key"));
        let gateway = Gateway::start_in(dir, setup).await;
        let token = tokens(&gateway.stranger(), &issuer, 1).await.remove(0);
        for again in [String::new(), problem.to_owned()] {
            let answer = ask(&gateway.stranger(), &[&token]).await;
            let expected = if again.is_empty() { 502 } else { 401 };
            assert_eq!(answer.status, expected, "{}", answer.text());
        }
    }
}
