//! Limits over TLS.

use crate::harness::{Gateway, Setup, ca, limit, message_in};
use crate::support::client::{Client, Response};
use crate::support::ds::Ds;
use crate::support::encode;
use http::Method;
use std::time::Duration;

/// A list of strings with parameters (RFC 9651), read by a library.
fn fields(response: &Response, name: &str) -> Vec<(String, Vec<(String, String)>)> {
    let list: sfv::List = sfv::Parser::new(response.header(name).unwrap()).parse().unwrap();
    let text = |item: &sfv::BareItem| match item {
        sfv::BareItem::Integer(n) => n.to_string(),
        sfv::BareItem::String(s) => s.as_str().to_owned(),
        sfv::BareItem::ByteSequence(octets) => {
            use base64::Engine as _;
            format!(":{}:", base64::engine::general_purpose::STANDARD.encode(octets))
        }
        other => panic!("{other:?}"),
    };
    let item = |entry: sfv::ListEntry| match entry {
        sfv::ListEntry::Item(item) => {
            let params = item.params.iter().map(|(key, value)| (key.as_str().to_owned(), text(value))).collect();
            (text(&item.bare_item), params)
        }
        other => panic!("{other:?}"),
    };
    list.into_iter().map(item).collect()
}

async fn status(client: &Client, body: Vec<u8>) -> u16 {
    client.send(Method::POST, "/group_operation", body).await.unwrap().status.as_u16()
}

#[tokio::test]
async fn a_member_runs_into_its_limit_and_the_group_goes_on() {
    let ds = Ds::start().await;
    let limit = r#"
[[limit]]
name = "member"
endpoints = ["group_operation"]
key = ["member"]
rate = "2/s"
burst = 3
"#;
    let gateway = Gateway::start(Setup::of(&ds).with(limit)).await;
    let client = gateway.peer();
    for _ in 0..3 {
        assert_eq!(status(&client, message_in(b"g", 1)).await, 200);
    }
    let refused = client.send(Method::POST, "/group_operation", message_in(b"g", 1)).await.unwrap();
    assert_eq!(refused.status, 429);
    assert_eq!(refused.json()["type"], "https://iana.org/assignments/http-problem-types#quota-exceeded");
    assert_eq!(refused.json()["violated-policies"][0], "member");
    let (policy, limit) = (fields(&refused, "ratelimit-policy"), fields(&refused, "ratelimit"));
    assert_eq!(policy[0].0, "member");
    assert_eq!(policy[0].1[..2], [("q".into(), "3".into()), ("w".into(), "2".into())]);
    assert_eq!(limit[0].1[..2], [("r".into(), "0".into()), ("t".into(), "1".into())]);
    assert_eq!(policy[0].1[2], limit[0].1[2], "whose quota it is");
    assert_eq!(policy[0].1[2].0, "pk");
    assert!(policy[0].1[2].1.len() == 14 && policy[0].1[2].1.starts_with(':'), "eight octets: {policy:?}");
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert!(refused.header("www-authenticate").is_none(), "no token helps here");
    assert_eq!(status(&client, message_in(b"g", 2)).await, 200, "another member");
    assert_eq!(status(&client, message_in(b"h", 1)).await, 200, "another group");
    assert_eq!(status(&gateway.stranger(), message_in(b"g", 1)).await, 200, "who only claims to be a.example");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(status(&client, message_in(b"g", 1)).await, 200, "who waits as long as told is let in");
    assert_eq!(ds.complete(), 7);
    let series = "moh_gateway_limit_decisions_total{limit=\"member\",mode=\"enforce\",outcome=\"refused\"}";
    assert_eq!(gateway.metric(series).await, 1.0);
}

#[tokio::test]
async fn together_or_not_at_all_and_shadows_beside() {
    let ds = Ds::start().await;
    let limits = limit("group", "group", "1/h", 5, "")
        + &limit("member", "member", "1/h", 2, "")
        + &limit("trial", "ip", "1/h", 1, "mode = \"shadow\"");
    let gateway = Gateway::start(Setup::of(&ds).with(&limits)).await;
    let client = gateway.peer();
    for expected in [200, 200, 429, 429, 429, 429, 429, 429] {
        assert_eq!(status(&client, message_in(b"g", 1)).await, expected);
    }
    // Six refusals took nothing from the group: three of its five are left.
    let others: Vec<u16> = futures(&client, b"g", 2..8).await;
    assert_eq!(others, [200, 200, 200, 429, 429, 429]);
    let shadow = "moh_gateway_limit_decisions_total{limit=\"trial\",mode=\"shadow\",outcome=\"refused\"}";
    assert!(gateway.metric(shadow).await >= 4.0, "it counts, and refused nobody");
    assert_eq!(ds.complete(), 5);
}

async fn futures(client: &Client, group: &[u8], leaves: std::ops::Range<u32>) -> Vec<u16> {
    let mut all = vec![];
    for leaf in leaves {
        all.push(status(client, message_in(group, leaf)).await);
    }
    all
}

#[tokio::test]
async fn by_provider_ip_target_and_cost() {
    let ds = Ds::start().await;
    let limits = r#"
[[limit]]
name = "provider"
endpoints = ["verification_key"]
key = ["provider"]
rate = "1/h"
burst = 2
[[limit.override]]
provider = "c.example"
rate = "1/h"
burst = 3
[[limit]]
name = "target"
endpoints = ["connection_key_packages"]
key = ["target"]
rate = "1/h"
burst = 1
[[limit]]
name = "key-packages"
endpoints = ["group_key_packages"]
key = ["group"]
rate = "1/h"
burst = 5
[[limit]]
name = "ip"
endpoints = ["ds_domain"]
key = ["ip"]
rate = "1/h"
burst = 1
"#;
    let gateway = Gateway::start(Setup::of(&ds).with(limits)).await;
    let (a, c) = (gateway.peer(), gateway.stranger().identity(&ca().issue(&["c.example"])));
    let key = |client: Client, sender: &'static str, n: usize| async move {
        let mut statuses = vec![];
        for _ in 0..n {
            let body = encode::verification_key_request(sender, "b.example");
            statuses.push(client.send(Method::GET, "/verification_key", body).await.unwrap().status.as_u16());
        }
        statuses
    };
    assert_eq!(key(a, "a.example", 3).await, [200, 200, 429]);
    assert_eq!(key(c, "c.example", 4).await, [200, 200, 200, 429], "with an override");
    assert_eq!(key(gateway.stranger(), "a.example", 3).await, [200, 200, 429], "strangers share one");
    assert_eq!(key(gateway.stranger(), "made-up.example", 1).await, [429], "whatever they call themselves");

    let client = gateway.peer();
    for (user, expected) in [("bob", 200), ("bob", 429), ("carol", 200)] {
        let body = encode::connection_key_package_request("a.example", "b.example", user.as_bytes());
        let response = client.send(Method::POST, "/connection_key_packages", body).await.unwrap();
        assert_eq!(response.status, expected, "{user}");
    }
    for (clients, expected) in [(3, 200), (3, 429), (2, 200), (6, 429)] {
        let ids = vec![&b"client"[..]; clients];
        let body = encode::group_key_package_request("a.example", "b.example", b"g", &ids);
        let response = client.send(Method::POST, "/group_key_packages", body).await.unwrap();
        assert_eq!(response.status, expected, "{clients} clients");
        if clients == 6 {
            assert_eq!(response.header("retry-after"), None, "six of five: no wait helps");
        }
    }
    assert_eq!(client.send(Method::GET, "/.well-known/mimi/ds-domain", "").await.unwrap().status, 200);
    assert_eq!(client.send(Method::GET, "/.well-known/mimi/ds-domain", "").await.unwrap().status, 429);
}

#[tokio::test]
async fn of_many_at_once_exactly_the_burst_passes() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds).with(&limit("group", "group", "1/h", 40, ""))).await;
    let clients: Vec<_> = (0..4).map(|i| if i % 2 == 0 { gateway.peer() } else { gateway.peer().http1() }).collect();
    let mut tasks = tokio::task::JoinSet::new();
    for client in clients {
        tasks.spawn(async move {
            let mut passed = 0;
            for leaf in 0..50 {
                passed += usize::from(status(&client, message_in(b"g", leaf)).await == 200);
            }
            passed
        });
    }
    let passed: usize = tasks.join_all().await.into_iter().sum();
    assert_eq!(passed, 40);
    assert_eq!(ds.complete(), 40);
}

#[tokio::test]
async fn commits_apart_from_messages_and_networks_left_out() {
    let ds = Ds::start().await;
    let limits = r#"
[[limit]]
name = "commits"
operations = ["add_users", "remove_users", "add_clients", "remove_clients", "update_client"]
key = ["group"]
rate = "1/h"
burst = 1
[[limit]]
name = "messages"
operations = ["send_message"]
key = ["group"]
rate = "1/h"
burst = 3
[[limit]]
name = "none of loopback"
key = ["ip"]
rate = "1/h"
burst = 1
exempt = ["127.0.0.0/8"]
"#;
    let gateway = Gateway::start(Setup::of(&ds).with(&limits.replace("none of loopback", "elsewhere"))).await;
    let client = gateway.peer();
    let commit = || {
        let m = crate::harness::material();
        let leaf = encode::SenderId::Leaf(m.leaf);
        encode::ds_request("a.example", "b.example", &leaf, encode::UPDATE_CLIENT, &m.commit, b"signature")
    };
    let group = &crate::harness::material().group_id;
    assert_eq!(status(&client, commit()).await, 200);
    assert_eq!(status(&client, commit()).await, 429);
    for expected in [200, 200, 200, 429] {
        assert_eq!(status(&client, message_in(group, 1)).await, expected);
    }
    let mut everywhere =
        Setup::of(&ds).with(&limits.replace("none of loopback", "elsewhere").replace("exempt", "# exempt"));
    everywhere.limits.push_str("\nexempt = [\"127.0.0.1/8\"]");
    let gateway = Gateway::start(everywhere).await;
    let client = gateway.peer();
    let all = futures(&client, b"g", 1..9).await;
    assert!(all.iter().all(|status| *status == 200), "left out of all limits: {all:?}");
}

#[tokio::test]
async fn so_many_of_a_provider_at_once() {
    let ds = Ds::start().await;
    let limits = r#"
[[limit]]
name = "at-once"
key = ["provider"]
concurrent = 3
[[limit.override]]
provider = "c.example"
concurrent = 5
[[limit]]
name = "trial"
key = ["provider"]
concurrent = 1
mode = "shadow"
"#;
    let gateway = Gateway::start(Setup::of(&ds).with(limits)).await;
    ds.set_delay(Duration::from_millis(400));
    for (name, most) in [("a.example", 3), ("c.example", 5)] {
        let client = std::sync::Arc::new(gateway.stranger().identity(&ca().issue(&[name])));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let client = client.clone();
            let body = encode::verification_key_request(name, "b.example");
            tasks.spawn(async move { client.send(Method::GET, "/verification_key", body).await.unwrap() });
        }
        let answers = tasks.join_all().await;
        assert_eq!(answers.iter().filter(|answer| answer.status == 200).count(), most, "{name}");
        let refused = answers.iter().find(|answer| answer.status == 429).unwrap();
        assert_eq!(refused.header("retry-after"), Some("1"));
        assert_eq!(refused.json()["violated-policies"][0], "at-once");
        let policy = fields(refused, "ratelimit-policy");
        let (q, qu) = (("q".to_owned(), most.to_string()), ("qu".to_owned(), "concurrent-requests".to_owned()));
        assert_eq!(policy[0].1[..2], [q, qu]);
        // They are under way no more.
        let body = encode::verification_key_request(name, "b.example");
        assert_eq!(client.send(Method::GET, "/verification_key", body).await.unwrap().status, 200);
    }
    let shadow = "moh_gateway_limit_decisions_total{limit=\"trial\",mode=\"shadow\",outcome=\"refused\"}";
    assert!(gateway.metric(shadow).await >= 8.0);
}

#[tokio::test]
async fn a_client_that_goes_away_is_under_way_no_more() {
    let ds = Ds::start().await;
    let limit = "[[limit]]\nname = \"at-once\"\nkey = [\"provider\"]\nconcurrent = 2";
    let gateway = Gateway::start(Setup::of(&ds).with(limit)).await;
    ds.hang(true);
    for _ in 0..3 {
        for client in [gateway.peer(), gateway.peer().http1()] {
            let body = encode::verification_key_request("a.example", "b.example");
            let waiting = tokio::spawn(async move { client.send(Method::GET, "/verification_key", body).await });
            gateway.until_metric("moh_gateway_requests_in_flight", |n| n >= 1.0).await;
            waiting.abort();
            gateway.until_metric("moh_gateway_requests_in_flight", |n| n == 0.0).await;
        }
    }
    ds.hang(false);
    let all = futures(&gateway.peer(), b"g", 1..5).await;
    assert_eq!(all, [200; 4]);
}

#[tokio::test]
async fn octets_of_a_provider_declared_or_not() {
    let ds = Ds::start().await;
    let limits = r#"
[[limit]]
name = "octets"
endpoints = ["group_operation"]
key = ["provider"]
rate = "1KiB/h"
burst = "64KiB"
"#;
    let gateway = Gateway::start(Setup::of(&ds).with(limits)).await;
    for (http1, name) in [(true, "a.example"), (false, "c.example")] {
        let client = gateway.stranger().identity(&ca().issue(&[name]));
        let client = if http1 { client.http1() } else { client.http2() };
        let message = |total: usize| {
            let mut body = encode::ds_request(
                name,
                "b.example",
                &encode::SenderId::Leaf(1),
                encode::SEND_MESSAGE,
                &crate::harness::private_message(b"g"),
                b"s",
            );
            body.resize(total, 7);
            body
        };
        // Declared: charged as it comes in, or refused before it does.
        assert_eq!(status(&client, message(40 << 10)).await, 200);
        let refused = client.send(Method::POST, "/group_operation", message(40 << 10)).await.unwrap();
        assert_eq!(refused.status, 429);
        let policy = fields(&refused, "ratelimit-policy");
        assert_eq!(policy[0].1[..2], [("q".into(), "65536".into()), ("qu".into(), "content-bytes".into())]);
        assert_eq!(fields(&refused, "ratelimit")[0].1[0], ("r".into(), (24 << 10).to_string()));
        assert_eq!(status(&client, message(10 << 10)).await, 200);
        // Not declared: what has come is charged at once, and the rest when it is in. What is owed is paid first.
        let streamed = client.begin(Method::POST, "/group_operation", &[], None).await.unwrap();
        let body = message(100 << 10);
        streamed.write(body[..8 << 10].to_vec()).await.unwrap();
        for piece in body[8 << 10..].chunks(16 << 10) {
            streamed.write(piece.to_vec()).await.unwrap();
        }
        assert_eq!(streamed.finish().await.unwrap().status, 200);
        let refused = client.send(Method::POST, "/group_operation", message(200)).await.unwrap();
        assert_eq!(refused.status, 429);
        let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!((80 * 3600..90 * 3600).contains(&wait), "86 KiB over the burst, at one an hour: {wait}");
    }
    assert_eq!(ds.complete(), 6);
}

#[tokio::test]
async fn a_reload_keeps_what_it_does_not_change() {
    let ds = Ds::start().await;
    let member = |name: &str, burst: u32| limit(name, "member", "1/h", burst, "");
    let mut gateway = Gateway::start(Setup::of(&ds).with(&member("member", 2))).await;
    let client = gateway.peer();
    assert_eq!(status(&client, message_in(b"g", 1)).await, 200);
    assert_eq!(status(&client, message_in(b"g", 1)).await, 200);
    assert_eq!(status(&client, message_in(b"g", 1)).await, 429);

    // A limit before it, and one of another rate after it: what it has counted stays.
    gateway.reload("ok", |setup| setup.more = member("wide", 50) + &member("member", 2) + &member("narrow", 5)).await;
    let refused = client.send(Method::POST, "/group_operation", message_in(b"g", 1)).await.unwrap();
    assert_eq!((refused.status.as_u16(), refused.json()["violated-policies"].as_array().unwrap().len()), (429, 1));
    assert_eq!(refused.json()["violated-policies"][0], "member");
    assert_eq!(status(&client, message_in(b"g", 2)).await, 200);

    // A file that is wrong changes nothing, and the log says why.
    gateway.reload("failed", |setup| setup.more = member("member", 0)).await;
    assert!(gateway.stderr().contains("gateway.toml:") && gateway.stderr().contains("limit[0].burst"));
    assert_eq!(status(&client, message_in(b"g", 1)).await, 429);
    assert_eq!(gateway.metric("moh_gateway_config_generation").await, 2.0);

    // Another rate is another limit, and a limit that is gone refuses nobody.
    gateway.reload("ok", |setup| setup.more = member("member", 3)).await;
    let all: Vec<u16> =
        futures(&client, b"g", 1..2).await.into_iter().chain(futures(&client, b"g", 1..2).await).collect();
    assert_eq!(all, [200, 200]);
    gateway.reload("ok", |setup| setup.more.clear()).await;
    for _ in 0..5 {
        assert_eq!(status(&client, message_in(b"g", 1)).await, 200);
    }
}
