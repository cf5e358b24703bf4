//! Limits over TLS.

use crate::harness::{Gateway, Setup, ca, message_in};
use crate::support::client::Client;
use crate::support::ds::Ds;
use crate::support::encode;
use http::Method;
use std::time::Duration;

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
    assert_eq!(refused.header("ratelimit-policy"), Some("\"member\";q=3;w=2"));
    assert_eq!(refused.header("ratelimit"), Some("\"member\";r=0;t=1"));
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
    let limits = r#"
[[limit]]
name = "group"
operations = ["send_message"]
key = ["group"]
rate = "1/h"
burst = 5
[[limit]]
name = "member"
operations = ["send_message"]
key = ["member"]
rate = "1/h"
burst = 2
[[limit]]
name = "trial"
operations = ["send_message"]
key = ["ip"]
rate = "1/h"
burst = 1
mode = "shadow"
"#;
    let gateway = Gateway::start(Setup::of(&ds).with(limits)).await;
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
    let limit =
        "[[limit]]\nname = \"group\"\noperations = [\"send_message\"]\nkey = [\"group\"]\nrate = \"1/h\"\nburst = 40";
    let gateway = Gateway::start(Setup::of(&ds).with(limit)).await;
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
