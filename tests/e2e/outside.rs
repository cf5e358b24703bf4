//! What an operator sees: metrics, health, the access log.

use crate::harness::{Gateway, Setup, ca, material, send_message};
use crate::support::ds::Ds;
use crate::support::encode;
use http::Method;

#[tokio::test]
async fn metrics_count_by_endpoint_decision_and_reason() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds).with("[peers]\nnamed = [\"a.example\"]")).await;
    let client = gateway.peer();
    for _ in 0..3 {
        client.send(Method::POST, "/group_operation", send_message()).await.unwrap();
    }
    client.send(Method::POST, "/group_operation", "x").await.unwrap();
    client.send(Method::POST, "/nowhere", "x").await.unwrap();
    let other = gateway.stranger().identity(&ca().issue(&["unheard-of.example"]));
    let body = encode::verification_key_request("unheard-of.example", "b.example");
    assert_eq!(other.send(Method::GET, "/verification_key", body).await.unwrap().status, 200);
    // A line is written after its answer.
    gateway.access_log(6).await;
    for (series, expected) in [
        ("moh_gateway_requests_total{decision=\"forwarded\",endpoint=\"group_operation\",reason=\"\"}", 3.0),
        ("moh_gateway_requests_total{decision=\"refused\",endpoint=\"group_operation\",reason=\"malformed\"}", 1.0),
        ("moh_gateway_requests_total{decision=\"refused\",endpoint=\"other\",reason=\"unknown-path\"}", 1.0),
        ("moh_gateway_provider_requests_total{decision=\"forwarded\",provider=\"a.example\"}", 3.0),
        ("moh_gateway_provider_requests_total{decision=\"forwarded\",provider=\"other\"}", 1.0),
        ("moh_gateway_gateway_seconds_count{endpoint=\"group_operation\"}", 4.0),
        ("moh_gateway_ds_seconds_count{endpoint=\"group_operation\"}", 3.0),
        ("moh_gateway_requests_in_flight", 0.0),
    ] {
        assert_eq!(gateway.metric(series).await, expected, "{series}");
    }
    let text = gateway.operator("/metrics").await.unwrap().text();
    assert!(!text.contains("unheard-of"), "nothing a stranger writes is a label");
    assert!(text.contains("moh_gateway_build_info{version="));
}

#[tokio::test]
async fn health_and_readiness() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let status = async |path: &str| gateway.operator(path).await.unwrap().status.as_u16();
    assert_eq!((status("/healthz").await, status("/readyz").await, status("/else").await), (200, 200, 404));
    ds.stop().await;
    assert_eq!((status("/healthz").await, status("/readyz").await), (200, 503), "alive, but nobody to forward to");
}

#[tokio::test]
async fn a_line_a_request_and_no_raw_identifiers() {
    let ds = Ds::start().await;
    let limit =
        "[[limit]]\nname = \"group\"\noperations = [\"send_message\"]\nkey = [\"group\"]\nrate = \"1/h\"\nburst = 2";
    let gateway = Gateway::start(Setup::of(&ds).with(limit)).await;
    let client = gateway.peer();
    for _ in 0..3 {
        client.send(Method::POST, "/group_operation", send_message()).await.unwrap();
    }
    client.send(Method::POST, "/secret-path-of-a-stranger", "x").await.unwrap();
    let lines = gateway.access_log(4).await;
    assert_eq!(lines.len(), 4);
    // A line is written when its request has ended, which the next may do before.
    let line = |status: u64| lines.iter().find(|line| line["status"] == status).unwrap();
    let sent = ds.requests()[0].headers["x-request-id"].to_str().unwrap().to_owned();
    let (first, refused) = (lines.iter().find(|line| line["request_id"] == sent.as_str()).unwrap(), line(429));
    assert_eq!(first["decision"], "forwarded");
    assert_eq!(first["status"], 200);
    assert_eq!(first["endpoint"], "group_operation");
    assert_eq!(first["operation"], "send_message");
    assert_eq!(first["provider"], "a.example");
    assert_eq!(first["node"], ds.addr.to_string());
    assert_eq!(first["body_in"], send_message().len());
    assert!(first["ds_us"].as_u64().is_some());
    assert_eq!(refused["decision"], "refused");
    assert_eq!((refused["status"].as_u64(), refused["reason"].as_str()), (Some(429), Some("limited")));
    assert_eq!(refused["limits"][0], "group");
    assert_eq!(first["group"], refused["group"], "one group, one pseudonym");
    let text = std::fs::read_to_string(gateway.dir.path().join("access.log")).unwrap();
    let raw = String::from_utf8(material().group_id.clone()).unwrap();
    assert!(!text.contains(&raw) && !text.contains(&hex::encode(&raw)) && !text.contains("secret-path"));
}
