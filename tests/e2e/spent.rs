//! Spent tokens: once across a fleet, over restarts, and when what knows of them is gone.

use crate::harness::{Gateway, Setup};
use crate::support::client::Client;
use crate::support::ds::Ds;
use crate::support::redis::{FaultProxy, Mode, Redis};
use crate::support::tokens::{Issuer, authorization, challenges};
use crate::tokens::{REQUIRED, ask, outcome};
use http::Method;
use privacypass::TokenType;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

const SECRET: &[u8] = b"a secret that is the same on all nodes";

const GENERATION: &str = "moh_gateway_config_generation";

const HELD: &str = "moh_gateway_tokens_spent_held";

const FILES: &str = "spent = \"files\"\nstate = \"state\"";

/// A gateway that takes the tokens of an issuer, with a secret that others have too.
async fn gateway(ds: &Ds, issuer: &Issuer, settings: &str) -> Gateway {
    gateway_of(Setup::of(ds), issuer, settings).await
}

async fn gateway_of(setup: Setup, issuer: &Issuer, settings: &str) -> Gateway {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("secret"), SECRET).unwrap();
    issuer.write(dir.path(), "key");
    let pass = format!("[privacy_pass]\nsecret_file = \"secret\"\nmax_wait = \"5s\"\n{settings}\n");
    Gateway::start_in(dir, setup.with(REQUIRED).with(&pass).with(&issuer.table("key"))).await
}

/// Writes other settings in the place of these, and has them taken.
async fn change(gateway: &Gateway, from: &str, to: &str) {
    let file = gateway.dir.path().join("gateway.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains(from), "no {from:?} in {text}");
    std::fs::write(&file, text.replacen(from, to, 1)).unwrap();
    reload(gateway).await;
}

async fn reload(gateway: &Gateway) {
    let before = gateway.metric(GENERATION).await;
    let answer = Client::plain(gateway.admin).http1().send(Method::POST, "/reload", "").await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(gateway.metric(GENERATION).await, before + 1.0);
}

/// Spends tokens, and none is refused.
async fn spend(gateway: &Gateway, all: &[String]) {
    let client = gateway.stranger();
    for token in all {
        assert_eq!(outcome(&ask(&client, &[token]).await), (200, String::new()));
    }
}

/// Brings tokens that are refused, each for this.
async fn refused(gateway: &Gateway, all: &[String], problem: &str) {
    let client = gateway.stranger();
    for token in all {
        assert_eq!(outcome(&ask(&client, &[token]).await), (401, problem.to_owned()));
    }
}

/// Spends tokens while something is changed, and none is refused. Those that were spent, and their number is not small.
async fn spend_during(gateway: &Gateway, issuer: &Issuer, change: impl Future<Output = ()>) -> Vec<String> {
    let mut all = vec![];
    for _ in 0..4 {
        all.extend(tokens(&gateway.stranger(), issuer, 100).await);
    }
    let (over, spent) = (AtomicBool::new(false), std::sync::Mutex::new(vec![]));
    let load = async |tokens: &[String]| {
        let client = gateway.stranger();
        for token in tokens {
            if over.load(SeqCst) {
                return;
            }
            assert_eq!(outcome(&ask(&client, &[token]).await), (200, String::new()));
            spent.lock().unwrap().push(token.clone());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let change = async {
        while spent.lock().unwrap().len() < 5 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        change.await;
        let so_far = spent.lock().unwrap().len();
        // Until some were spent after it, too, if there are any left.
        while spent.lock().unwrap().len() < (so_far + 5).min(all.len()) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        over.store(true, SeqCst);
    };
    let (one, two) = all.split_at(all.len() / 2);
    tokio::join!(load(one), load(two), change);
    spent.into_inner().unwrap()
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
    let mut gateway = gateway(&ds, &issuer, FILES).await;
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
    assert_eq!(gateway.metric(HELD).await, 20.0);
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

// === Reload ===

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_moves_what_is_spent_and_no_token_is_taken_twice() {
    let ds = Ds::start().await;
    let (a, b) = (Redis::start().await, Redis::start().await);
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let stores = [redis(a.addr(), ""), redis(b.addr(), "")];
    let [in_a, in_b] = [&*stores[0], &*stores[1]];
    let mut moving = gateway(&ds, &issuer, in_a).await;
    let staying = gateway(&ds, &issuer, in_a).await;
    until_up(&moving).await;
    until_up(&staying).await;
    let mut spent = vec![];
    for (n, (from, to)) in [(in_a, in_b), (in_b, FILES), (FILES, in_b), (in_b, in_a)].into_iter().enumerate() {
        let here = tokens(&moving.stranger(), &issuer, 20).await;
        // What was spent on another node is known to the store alone.
        let elsewhere = tokens(&moving.stranger(), &issuer, 20).await;
        spend(&moving, &here).await;
        spend(&staying, &elsewhere).await;
        let during = spend_during(&moving, &issuer, change(&moving, from, to)).await;
        assert!(during.len() >= 10, "{n}: {}", during.len());
        for all in [&here, &elsewhere, &during] {
            refused(&moving, all, "token-spent").await;
        }
        let fresh = tokens(&moving.stranger(), &issuer, 20).await;
        spend(&moving, &fresh).await;
        refused(&moving, &fresh, "token-spent").await;
        // Who has not moved yet, as in a fleet that is reloaded one after the other.
        for all in [&here, &fresh, &during] {
            refused(&staying, all, "token-spent").await;
        }
        spent.extend([here, elsewhere, during, fresh].concat());
    }
    assert_eq!(moving.metric(GENERATION).await, 5.0);
    assert_eq!(ds.complete(), spent.len(), "each once");

    // Into files, which know after a restart all that this node did.
    let last = tokens(&moving.stranger(), &issuer, 20).await;
    spend(&moving, &last).await;
    change(&moving, in_a, FILES).await;
    moving.restart("-KILL").await;
    refused(&moving, &last, "token-spent").await;
    assert_eq!(ds.complete(), spent.len() + last.len());
}

#[tokio::test]
async fn a_store_by_another_name_or_with_other_settings_is_the_same() {
    let (ds, store) = (Ds::start().await, Redis::start().await);
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let between = FaultProxy::start(store.addr()).await;
    let (plain, local) = (redis(store.addr(), ""), redis(store.addr(), "on_store_failure = \"local\""));
    let by_proxy = redis(between.addr(), "on_store_failure = \"local\"");
    let hasty = by_proxy.replace("500ms", "400ms");
    let gateway = gateway(&ds, &issuer, &plain).await;
    until_up(&gateway).await;
    for (from, to) in [(&plain, &local), (&local, &by_proxy), (&by_proxy, &hasty)] {
        let before = tokens(&gateway.stranger(), &issuer, 20).await;
        spend(&gateway, &before).await;
        let during = spend_during(&gateway, &issuer, change(&gateway, from, to)).await;
        for all in [&before, &during] {
            refused(&gateway, all, "token-spent").await;
        }
        let fresh = tokens(&gateway.stranger(), &issuer, 20).await;
        spend(&gateway, &fresh).await;
    }
    // The store that is in use is the one that is spoken of, whatever becomes of the one before.
    let other = Redis::start().await;
    let in_other = redis(other.addr(), "on_store_failure = \"local\"");
    change(&gateway, &hasty, &in_other).await;
    between.set(Mode::Blackhole);
    store.kill();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(gateway.metric("moh_gateway_limit_store_up").await, 1.0);
    spend(&gateway, &tokens(&gateway.stranger(), &issuer, 5).await).await;
}

#[tokio::test]
async fn a_reload_takes_threads_waits_and_numbers_of_tokens() {
    let ds = Ds::start().await;
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let few = format!("{FILES}\nthreads = 1\nspent_tokens = 10");
    let many = format!("{FILES}\nthreads = 3\nspent_tokens = 10000");
    let gateway = gateway(&ds, &issuer, &few).await;
    let all = tokens(&gateway.stranger(), &issuer, 11).await;
    let (first, last) = all.split_at(10);
    spend(&gateway, first).await;
    assert_eq!(outcome(&ask(&gateway.stranger(), &[&last[0]]).await), (503, "token-store-full".into()));
    change(&gateway, &few, &many).await;
    spend(&gateway, last).await;
    let during = spend_during(&gateway, &issuer, async {
        for (from, to) in [("max_wait = \"5s\"", "max_wait = \"4s\""), ("threads = 3", "threads = 1")] {
            change(&gateway, from, to).await;
        }
    })
    .await;
    for spent in [&all, &during] {
        refused(&gateway, spent, "token-spent").await;
    }
    change(&gateway, "spent_tokens = 10000", "spent_tokens = 5").await;
    let more = tokens(&gateway.stranger(), &issuer, 1).await;
    assert_eq!(outcome(&ask(&gateway.stranger(), &[&more[0]]).await), (503, "token-store-full".into()));
    refused(&gateway, &all, "token-spent").await;
    assert_eq!(ds.complete(), all.len() + during.len());
}

#[tokio::test]
async fn another_secret_takes_the_files_directory_from_a_request_under_way() {
    let ds = Ds::start().await;
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let setup = Setup { delivery: "connect_timeout = \"1s\"\nread_timeout = \"10s\"", ..Setup::of(&ds) };
    let mut gateway = gateway_of(setup, &issuer, FILES).await;
    let old = tokens(&gateway.stranger(), &issuer, 20).await;
    let (spent, fresh) = old.split_at(10);
    spend(&gateway, &spent[1..]).await;
    ds.hang(true);
    let (client, token, begun) = (gateway.stranger(), spent[0].clone(), ds.begun());
    let under_way = tokio::spawn(async move { outcome(&ask(&client, &[&token]).await) });
    assert!(ds.until(|ds| ds.begun() > begun).await);
    let secret = gateway.dir.path().join("secret");
    std::fs::write(&secret, b"another secret that is no less long!").unwrap();
    reload(&gateway).await;
    refused(&gateway, &old, "token-wrong-challenge").await;
    let new = tokens(&gateway.stranger(), &issuer, 20).await;
    // The first secret again: the request is under way still, and its token is in hand.
    std::fs::write(&secret, SECRET).unwrap();
    reload(&gateway).await;
    refused(&gateway, spent, "token-spent").await;
    refused(&gateway, &new, "token-wrong-challenge").await;
    ds.hang(false);
    assert_eq!(under_way.await.unwrap(), (200, String::new()));
    spend(&gateway, fresh).await;
    // And once more, with nothing under way; what is spent is in files.
    let none = vec![];
    for (to, good, bad) in [(&b"another secret that is no less long!"[..], &new, &old), (SECRET, &none, &new)] {
        std::fs::write(&secret, to).unwrap();
        reload(&gateway).await;
        refused(&gateway, bad, "token-wrong-challenge").await;
        spend(&gateway, good).await;
    }
    refused(&gateway, &old, "token-spent").await;
    gateway.restart("-KILL").await;
    refused(&gateway, &old, "token-spent").await;
    assert_eq!(ds.complete(), old.len() + new.len());
}

#[tokio::test]
async fn a_secret_of_this_process_and_one_of_a_fleet_are_two() {
    let (ds, store) = (Ds::start().await, Redis::start().await);
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let own = "max_wait = \"5s\"\nspent = \"memory\"";
    let shared = format!("max_wait = \"5s\"\nsecret_file = \"secret\"\n{}", redis(store.addr(), ""));
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("secret"), SECRET).unwrap();
    issuer.write(dir.path(), "key");
    let setup = Setup::of(&ds).with(REQUIRED).with(&format!("[privacy_pass]\n{own}\n")).with(&issuer.table("key"));
    let gateway = Gateway::start_in(dir, setup).await;
    let first = tokens(&gateway.stranger(), &issuer, 20).await;
    spend(&gateway, &first[..10]).await;
    let mut before = first.clone();
    for (from, to) in [(own, &*shared), (&*shared, own)] {
        change(&gateway, from, to).await;
        // Spent or not: it is for challenges that nobody would send any more.
        refused(&gateway, &before, "token-wrong-challenge").await;
        before = tokens(&gateway.stranger(), &issuer, 20).await;
        spend(&gateway, &before).await;
        refused(&gateway, &before, "token-spent").await;
    }
    // The first secret has come back, and with it what is known of its tokens.
    refused(&gateway, &first[..10], "token-spent").await;
    spend(&gateway, &first[10..]).await;
    assert_eq!(gateway.metric(HELD).await, 40.0);
    assert_eq!(ds.complete(), 60);
}

#[tokio::test]
async fn a_secret_that_comes_back_finds_what_was_spent_in_places_of_before() {
    let ds = Ds::start().await;
    let (a, b) = (Redis::start().await, Redis::start().await);
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let stores = [redis(a.addr(), ""), redis(b.addr(), "")];
    let [in_a, in_b] = [&*stores[0], &*stores[1]];
    let (moving, staying) = (gateway(&ds, &issuer, in_a).await, gateway(&ds, &issuer, in_a).await);
    until_up(&moving).await;
    until_up(&staying).await;
    let all = tokens(&moving.stranger(), &issuer, 20).await;
    let (here, elsewhere) = all.split_at(10);
    spend(&moving, here).await;
    spend(&staying, elsewhere).await;
    change(&moving, in_a, in_b).await;
    let secret = moving.dir.path().join("secret");
    std::fs::write(&secret, b"another secret that is no less long!").unwrap();
    reload(&moving).await;
    refused(&moving, &all, "token-wrong-challenge").await;
    assert_eq!(moving.metric(HELD).await, 0.0, "of the one that is in use");
    std::fs::write(&secret, SECRET).unwrap();
    reload(&moving).await;
    refused(&moving, here, "token-spent").await;
    refused(&moving, elsewhere, "token-spent").await;
    assert_eq!((moving.metric(HELD).await, ds.complete()), (10.0, 20));
}

#[tokio::test]
async fn files_that_have_not_all_that_is_spent_are_begun_with_by_a_reload_alone() {
    let ds = Ds::start().await;
    let issuer = Issuer::of("issuer.example", TokenType::PrivateRistretto255);
    let mut gateway = gateway(&ds, &issuer, FILES).await;
    let all = tokens(&gateway.stranger(), &issuer, 10).await;
    spend(&gateway, &all).await;
    let root = gateway.dir.path().to_owned();
    let names = std::fs::read_dir(root.join("state/spent")).unwrap();
    let names: Vec<_> = names.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    let name = names.iter().find(|name| name.starts_with("spent-")).unwrap();
    // As a process leaves them that ends while it copies: what it has copied so far is not all there.
    let other = root.join("other/spent");
    let mark = other.join(name.split('-').take(2).collect::<Vec<_>>().join("-") + "-unfinished");
    std::fs::create_dir_all(&other).unwrap();
    std::fs::write(&mark, "0\n").unwrap();
    let file = root.join("gateway.toml");
    let text = std::fs::read_to_string(&file).unwrap().replace("state = \"state\"", "state = \"other\"");
    std::fs::write(&file, text).unwrap();
    let mut second = gateway.restart_elsewhere();
    assert!(!second.wait().unwrap().success());
    assert!(mark.exists());
    reload(&gateway).await;
    assert!(!mark.exists());
    gateway.restart("-KILL").await;
    refused(&gateway, &all, "token-spent").await;
    assert_eq!(ds.complete(), 10);
}
