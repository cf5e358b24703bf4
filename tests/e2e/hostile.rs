//! Hostile input gets a refusal of the table: never a hang, a panic, or a request at the Delivery Service.

use crate::harness::{Gateway, Setup, ca, large_message, send_message};
use crate::support::client::raw_tls;
use crate::support::ds::Ds;
use http::Method;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Writes octets made by hand on a connection of its own, and reads the answer to its end.
async fn raw(gateway: &Gateway, pieces: &[&[u8]]) -> String {
    let mut stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["http/1.1"], None).await.unwrap();
    for piece in pieces {
        if stream.write_all(piece).await.is_err() {
            break;
        }
        let _ = stream.flush().await;
    }
    let mut answer = vec![];
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
    assert!(read.is_ok(), "it hangs after {:?}", String::from_utf8_lossy(&answer));
    String::from_utf8_lossy(&answer).into_owned()
}

fn head(more: &str) -> String {
    format!(
        "POST /group_operation HTTP/1.1\r\nHost: ds.b.example\r\nContent-Type: application/octet-stream\r\n{more}\r\n"
    )
}

fn is(answer: &str, status: u16) {
    assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    assert!(answer.contains("application/problem+json"), "{answer}");
    let document: serde_json::Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(document["status"], status);
}

async fn still_serves(gateway: &Gateway, ds: &Ds) {
    let before = ds.complete();
    let response = gateway.peer().send(Method::POST, "/group_operation", send_message()).await.unwrap();
    assert_eq!(response.status, 200);
    assert_eq!(ds.complete(), before + 1);
}

#[tokio::test]
async fn a_body_shorter_than_its_length() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    // Cut off before it is decided: nothing is at the DS. The client closes its side.
    for cut in [0, 10, 48] {
        let mut stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["http/1.1"], None).await.unwrap();
        stream.write_all(head("Content-Length: 500\r\n").as_bytes()).await.unwrap();
        stream.write_all(&send_message()[..cut]).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = vec![];
        let end = stream.read_to_end(&mut answer).await;
        assert!(end.is_ok(), "{end:?} after {}", String::from_utf8_lossy(&answer));
        is(&String::from_utf8_lossy(&answer), 400);
    }
    assert_eq!(ds.begun(), 0);
    // After: what the DS has begun to see breaks off for it, too.
    let length = send_message().len() + 1;
    let mut stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["http/1.1"], None).await.unwrap();
    stream.write_all(head(&format!("Content-Length: {length}\r\n")).as_bytes()).await.unwrap();
    stream.write_all(&send_message()).await.unwrap();
    assert!(ds.until(|ds| ds.begun() == 1).await);
    drop(stream);
    assert!(ds.until(|ds| ds.broken() == 1).await);
    assert_eq!(ds.complete(), 0);
    still_serves(&gateway, &ds).await;
}

#[tokio::test]
async fn chunks_of_one_octet() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let mut stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["http/1.1"], None).await.unwrap();
    stream.write_all(head("Transfer-Encoding: chunked\r\nConnection: close\r\n").as_bytes()).await.unwrap();
    let body = send_message();
    for octet in &body {
        stream.write_all(&[b"1\r\n", &[*octet][..], b"\r\n"].concat()).await.unwrap();
        stream.flush().await.unwrap();
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let mut answer = vec![];
    stream.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(ds.requests().pop().unwrap().body, body);

    // A list that is decided at its end only, octet by octet, as long as may be held.
    let ids: Vec<Vec<u8>> = (0..400u32).map(|i| i.to_be_bytes().to_vec()).collect();
    let ids: Vec<&[u8]> = ids.iter().map(Vec::as_slice).collect();
    let body = crate::support::encode::group_key_package_request("a.example", "b.example", b"g", &ids);
    let client = gateway.peer();
    let upload = client.begin(Method::POST, "/group_key_packages", &[], None).await.unwrap();
    for octet in &body {
        upload.write(vec![*octet]).await.unwrap();
    }
    assert_eq!(upload.finish().await.unwrap().status, 200);
    assert_eq!(ds.requests().pop().unwrap().body, body);

    // Bad chunks are no body.
    for bad in ["zz\r\n", "-1\r\n", "ffffffffffffffffff\r\n"] {
        let answer = raw(&gateway, &[head("Transfer-Encoding: chunked\r\n").as_bytes(), bad.as_bytes()]).await;
        is(&answer, 400);
    }
    still_serves(&gateway, &ds).await;
}

#[tokio::test]
async fn http2_resets_in_the_middle() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let client = gateway.peer();
    let body = large_message(1 << 20);
    for cut in [0, 10, 60_000] {
        let upload = client.begin(Method::POST, "/group_operation", &[], Some(1 << 20)).await.unwrap();
        upload.write(body[..cut].to_vec()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        upload.abort().await;
    }
    still_serves(&gateway, &ds).await;
    assert!(ds.until(|ds| ds.broken() == 1).await, "the one that was on its way");
    assert_eq!(ds.complete(), 1);
    let until = Instant::now() + Duration::from_secs(5);
    while gateway.metric("moh_gateway_requests_in_flight").await > 0.0 {
        assert!(Instant::now() < until, "a request is left behind");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_thousand_header_fields() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let fields: String = (0..1000).map(|i| format!("x-{i}: y\r\n")).collect();
    is(&raw(&gateway, &[head(&fields).as_bytes()]).await, 400);
    let large = format!("x: {}\r\n", "y".repeat(200_000));
    is(&raw(&gateway, &[head(&large).as_bytes()]).await, 400);
    let names: Vec<String> = (0..1000).map(|i| format!("x-{i}")).collect();
    let headers: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "y")).collect();
    let client = gateway.peer();
    match client.send_with(Method::POST, "/group_operation", &headers, send_message()).await {
        Ok(response) => assert!(response.status == 431 || response.status == 400, "{}", response.status),
        Err(error) => assert!(!error.to_string().contains("in time"), "{error}"),
    }
    assert_eq!(ds.begun(), 0);
    still_serves(&gateway, &ds).await;
}

#[tokio::test]
async fn what_comes_too_slowly() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let began = Instant::now();
    // A head that stalls, and one that drips: the time is for the whole of it.
    is(&raw(&gateway, &[b"POST /group_operation HTTP/1.1\r\nHo"]).await, 408);
    let mut stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["http/1.1"], None).await.unwrap();
    let mut answer = vec![0; 4096];
    let mut got = 0;
    for octet in head("X-Long: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n").as_bytes().iter().take(60) {
        let _ = stream.write_all(&[*octet]).await;
        if let Ok(Ok(n)) = tokio::time::timeout(Duration::from_millis(100), stream.read(&mut answer)).await {
            got = n;
            break;
        }
    }
    is(&String::from_utf8_lossy(&answer[..got]), 408);
    // A body that stalls before it is decided, and after.
    let length = format!("Content-Length: {}\r\n", send_message().len());
    is(&raw(&gateway, &[head(&length).as_bytes(), &send_message()[..20]]).await, 408);
    is(&raw(&gateway, &[head(&length).as_bytes(), &send_message()[..60]]).await, 408);
    for sent in [20, 60] {
        let client = gateway.peer();
        let mut upload = client.begin(Method::POST, "/group_operation", &[], None).await.unwrap();
        upload.write(send_message()[..sent].to_vec()).await.unwrap();
        assert_eq!(upload.answer().await.unwrap().status, 408, "over HTTP/2, after {sent} octets");
    }
    assert!(began.elapsed() < Duration::from_secs(25));
    assert_eq!(ds.complete(), 0);
    // Nothing at all is closed without a word.
    assert_eq!(raw(&gateway, &[]).await, "");
    still_serves(&gateway, &ds).await;
}

#[tokio::test]
async fn a_body_that_drips_has_a_time_for_all_of_it() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    for client in [gateway.peer().http1(), gateway.peer()] {
        let mut upload = client.begin(Method::POST, "/group_operation", &[], Some(8 << 20)).await.unwrap();
        upload.write(large_message(200)).await.unwrap();
        let began = Instant::now();
        let response = loop {
            let _ = upload.write(vec![7; 100]).await;
            if let Ok(response) = tokio::time::timeout(Duration::from_millis(200), upload.answer()).await {
                break response.unwrap();
            }
            assert!(began.elapsed() < Duration::from_secs(8), "it drips on");
        };
        assert_eq!(response.status, 408);
    }
    assert_eq!(ds.complete(), 0);
}

#[tokio::test]
async fn what_is_no_http_or_two_things_at_once() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let body = send_message();
    let length = body.len();
    is(&raw(&gateway, &[b"\x16\x03\x01 what is this\r\n\r\n"]).await, 400);
    is(&raw(&gateway, &[b"POST /group_operation HTTP/1.1\r\nHost : x\r\n\r\n"]).await, 400);
    is(
        &raw(&gateway, &[head(&format!("Content-Length: {length}\r\nContent-Length: 3\r\n")).as_bytes(), &body]).await,
        400,
    );
    is(&raw(&gateway, &[head("Content-Length: -1\r\n").as_bytes(), &body]).await, 400);
    for te in ["gzip", "gzip, chunked", "chunked, chunked", "chunked\r\nTransfer-Encoding: chunked"] {
        is(
            &raw(&gateway, &[head(&format!("Transfer-Encoding: {te}\r\n")).as_bytes(), b"1\r\nx\r\n0\r\n\r\n"]).await,
            400,
        );
    }
    for length in [format!("{length}, {length}"), "900000000, 900000000".into()] {
        is(&raw(&gateway, &[head(&format!("Content-Length: {length}\r\n")).as_bytes(), &body]).await, 400);
    }
    for named in ["content-type", "x-moh-provider", "host", "content-length", "close, authorization"] {
        let fields = format!("Content-Length: {length}\r\nConnection: {named}\r\n");
        is(&raw(&gateway, &[head(&fields).as_bytes(), &body]).await, 400);
    }
    is(&raw(&gateway, &[head("Host: c.example\r\nContent-Length: 3\r\n").as_bytes(), &body]).await, 400);
    is(&raw(&gateway, &[b"POST /group_operation HTTP/1.1\r\nContent-Type: application/octet-stream\r\nContent-Length: 3\r\n\r\nabc"]).await, 400);
    let answer =
        raw(&gateway, &[b"CONNECT ds.b.example:443 HTTP/1.1\r\nHost: ds.b.example:443\r\nConnection: close\r\n\r\n"])
            .await;
    is(&answer, 404);
    assert_eq!(ds.begun(), 0);

    // What follows a refused body, by the length that was said of it, is the next request (RFC 9112 §9.3.2), and all of it is read
    // as one: nothing of the first goes on.
    let smuggled = [
        head("Content-Length: 4\r\n").into_bytes(),
        b"\0\x09\0\0".to_vec(),
        head(&format!("Content-Length: {length}\r\nConnection: close\r\n")).into_bytes(),
        body.clone(),
    ]
    .concat();
    let answer = raw(&gateway, &[&smuggled]).await;
    let statuses: Vec<&str> = answer.split("HTTP/1.1 ").skip(1).filter_map(|answer| answer.get(..3)).collect();
    assert_eq!(statuses, ["400", "200"], "{answer}");
    assert_eq!((ds.begun(), ds.requests().pop().unwrap().body), (1, body.clone()));
    // A length that is said twice is one (RFC 9110 §8.6), and goes on once.
    let twice = head(&format!("Content-Length: {length}\r\nContent-Length: {length}\r\nConnection: close\r\n"));
    let answer = raw(&gateway, &[twice.as_bytes(), &body]).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let got = ds.requests().pop().unwrap();
    assert_eq!((got.body, got.headers.get_all("content-length").iter().count()), (body.clone(), 1));
    // Both framings: the length that was said is dropped, the connection closed after it.
    let both = [
        head(&format!("Content-Length: {}\r\nTransfer-Encoding: chunked\r\n", 5)).into_bytes(),
        format!("{length:x}\r\n").into_bytes(),
        body.clone(),
        b"\r\n0\r\n\r\n".to_vec(),
        head("Content-Length: 0\r\n").into_bytes(),
    ]
    .concat();
    let answer = raw(&gateway, &[&both]).await;
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    for got in ds.requests().iter().skip(2) {
        let framings = ["content-length", "transfer-encoding"].map(|name| got.headers.contains_key(name));
        assert!(got.body == body && framings[0] != framings[1], "one framing goes on: {:?}", got.headers);
    }
    still_serves(&gateway, &ds).await;
}

#[tokio::test]
async fn an_upgrade_opens_no_tunnel() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let body = crate::support::encode::verification_key_request("a.example", "b.example");
    let request = format!(
        "GET /verification_key HTTP/1.1\r\nHost: ds.b.example\r\nContent-Type: application/octet-stream\r\nContent-Length: {}\r\n\
         Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        body.len()
    );
    let mut stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["http/1.1"], None).await.unwrap();
    stream.write_all(&[request.as_bytes(), &body].concat()).await.unwrap();
    let mut answer = vec![0; 1024];
    let n = stream.read(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer[..n]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 "), "{answer}");
    assert!(!answer.starts_with("HTTP/1.1 101"), "{answer}");
    assert!(ds.requests().iter().all(|r| !r.headers.contains_key("upgrade")));
}

#[tokio::test]
async fn expect_100_continue() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let body = send_message();
    let expect = |more: &str| head(&format!("Content-Length: {}\r\nExpect: 100-continue\r\n{more}", body.len()));
    let mut stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["http/1.1"], None).await.unwrap();
    stream.write_all(expect("Connection: close\r\n").as_bytes()).await.unwrap();
    let mut answer = vec![0; 25];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(&body).await.unwrap();
    let mut answer = vec![];
    stream.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    assert!(!ds.requests()[0].headers.contains_key("expect"), "it was for us");
    // Who is told to go on and does not is still told that it was too slow.
    for sent in [0, 20, 60] {
        let answer = raw(&gateway, &[expect("").as_bytes(), &body[..sent]]).await;
        let refusal = answer.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n");
        // Where some of the body is there it need not be said (RFC 9110 §10.1.1).
        assert!(refusal.is_some() || sent > 0, "{answer}");
        is(refusal.unwrap_or(&answer), 408);
    }
    // Who is refused before the body is wanted is not told to go on.
    let elsewhere = expect("").replace("ds.b.example", "c.example");
    is(&raw(&gateway, &[elsewhere.as_bytes()]).await, 421);
    assert_eq!(ds.complete(), 1);
}

#[tokio::test]
async fn a_connection_goes_on_after_refusals() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let client = gateway.peer().http1();
    let mut wrong = send_message();
    wrong[1] = 9;
    for _ in 0..5 {
        assert_eq!(client.send(Method::POST, "/group_operation", wrong.clone()).await.unwrap().status, 400);
        assert_eq!(client.send(Method::POST, "/group_operation", send_message()).await.unwrap().status, 200);
        assert_eq!(client.send(Method::GET, "/.well-known/mimi/ds-domain", "").await.unwrap().status, 200);
        // Longer than a read: the clock of the next head must not be that of the last.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!(client.connections(), 1);
    assert_eq!(ds.complete(), 5);
}

#[tokio::test]
async fn what_is_checked_is_what_the_ds_gets() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let body = send_message();
    let fields = format!("Content-Length: {}\r\nConnection: close\r\n", body.len());
    let absolute = head(&fields)
        .replace("POST /group_operation", "POST http://ds.b.example/group_operation")
        .replace("application/octet-stream", "Application/OCTET-stream;x=y");
    let answer = raw(&gateway, &[absolute.as_bytes(), &body]).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let elsewhere = head(&fields).replace("POST /group_operation", "POST http://c.example/group_operation");
    is(&raw(&gateway, &[elsewhere.as_bytes(), &body]).await, 400);
    let got = ds.requests().pop().unwrap();
    assert_eq!(got.path, "/group_operation", "one form of the target, however it came");
    assert_eq!(got.headers["content-type"], "application/octet-stream");
    assert_eq!(got.headers["host"], "ds.b.example");
    assert_eq!(ds.complete(), 1);
}

#[tokio::test]
async fn connections_that_must_close_do() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let body = send_message();
    // raw() returns once the gateway has closed.
    let old = head(&format!("Content-Length: {}\r\n", body.len())).replace("HTTP/1.1", "HTTP/1.0");
    let answer = raw(&gateway, &[old.as_bytes(), &body]).await;
    assert!(answer.contains(" 200 ") && !answer.to_lowercase().contains("connection: keep-alive"), "{answer}");
    let both = [
        head("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n").into_bytes(),
        format!("{:x}\r\n", body.len()).into_bytes(),
        body,
        b"\r\n0\r\n\r\n".to_vec(),
    ]
    .concat();
    let answer = raw(&gateway, &[&both]).await;
    assert!(answer.contains(" 200 ") && !answer.to_lowercase().contains("connection: keep-alive"), "{answer}");
}

#[tokio::test]
async fn an_answer_arrives_whole_while_the_client_still_writes() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["http/1.1"], None).await.unwrap();
    let (mut read, mut write) = tokio::io::split(stream);
    // Chunks of some octets that never end: past the time for a body there is an answer, and it is whole.
    let writer = tokio::spawn(async move {
        let start = [
            head("Transfer-Encoding: chunked\r\n").into_bytes(),
            b"c8\r\n".to_vec(),
            large_message(200),
            b"\r\n".to_vec(),
        ]
        .concat();
        let mut wrote = write.write_all(&start).await;
        while wrote.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
            wrote = write.write_all(b"3\r\nabc\r\n").await;
        }
    });
    let mut answer = vec![];
    let end = tokio::time::timeout(Duration::from_secs(15), read.read_to_end(&mut answer)).await;
    assert!(end.is_ok(), "{}", String::from_utf8_lossy(&answer));
    is(&String::from_utf8_lossy(&answer), 408);
    writer.abort();
}

/// Waits until nothing is under way.
async fn settles(gateway: &Gateway, within: Duration) {
    let until = Instant::now() + within;
    while gateway.metric("moh_gateway_requests_in_flight").await > 0.0 {
        assert!(Instant::now() < until, "requests are pinned");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn http2_connections_that_say_nothing() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    for first in [&b""[..], b"PRI * HTTP", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        let mut stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["h2"], None).await.unwrap();
        stream.write_all(first).await.unwrap();
        let mut answer = vec![];
        let end = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
        assert!(end.is_ok(), "still open after {first:?}");
    }
    // Nor do those that a good preface opened stay for ever without a request.
    still_serves(&gateway, &ds).await;
}

#[tokio::test]
async fn http2_clients_that_read_nothing() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["h2"], None).await.unwrap();
    let (mut client, connection) =
        h2::client::Builder::new().initial_window_size(0).handshake::<_, bytes::Bytes>(stream).await.unwrap();
    tokio::spawn(connection);
    let mut held = vec![];
    for path in ["/nope", "/.well-known/mimi/ds-domain", "/group_operation"].iter().cycle().take(90) {
        client = client.ready().await.unwrap();
        let request = http::Request::get(format!("https://ds.b.example{path}")).body(()).unwrap();
        held.push(client.send_request(request, true).unwrap());
    }
    // They are not kept for ever, nor is what is held for them.
    for (response, _) in held {
        let mut body = tokio::time::timeout(Duration::from_secs(8), response).await.unwrap().unwrap().into_body();
        let end = tokio::time::timeout(Duration::from_secs(8), body.data()).await.expect("it is pinned");
        assert!(matches!(&end, Some(Err(e)) if e.is_reset()), "{end:?}");
    }
    settles(&gateway, Duration::from_secs(8)).await;
    still_serves(&gateway, &ds).await;
}

#[tokio::test]
async fn a_ds_that_answers_before_the_body_is_in() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    ds.answer_early(true);
    ds.set_response(207, &[], "early");
    for client in [gateway.peer().http1(), gateway.peer()] {
        let mut upload = client.begin(Method::POST, "/group_operation", &[], Some(1 << 20)).await.unwrap();
        upload.write(large_message(500)).await.unwrap();
        assert_eq!(upload.answer().await.unwrap().status, 207);
        // The rest never comes; the request ends all the same, and is what it was.
        settles(&gateway, Duration::from_secs(8)).await;
        drop(upload);
    }
    let forwarded = "moh_gateway_requests_total{decision=\"forwarded\",endpoint=\"group_operation\",reason=\"\"}";
    assert_eq!(gateway.metric(forwarded).await, 2.0);
    let lines = gateway.access_log(2).await;
    assert_eq!(lines.len(), 2, "both have a line");
    assert!(lines.iter().all(|line| line["decision"] == "forwarded" && line["status"] == 207), "{lines:?}");
}

#[tokio::test]
async fn a_clients_reset_is_not_a_nodes() {
    for h2c in [false, true] {
        let ds = Ds::start().await;
        let setup = Setup::of(&ds);
        let gateway = Gateway::start(if h2c { setup.h2c() } else { setup }).await;
        let stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["h2"], None).await.unwrap();
        let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::post("https://ds.b.example/group_operation")
            .header("content-type", "application/octet-stream")
            .body(())
            .unwrap();
        client = client.ready().await.unwrap();
        let (_response, mut body) = client.send_request(request, false).unwrap();
        body.send_data(large_message(500).into(), false).unwrap();
        assert!(ds.until(|ds| ds.begun() == 1).await);
        body.send_reset(h2::Reason::REFUSED_STREAM);
        settles(&gateway, Duration::from_secs(5)).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(ds.begun(), 1, "a stranger makes nobody ask the DS again");
        assert_eq!(gateway.access_log(1).await[0]["decision"], "aborted");
    }
}

#[tokio::test]
async fn what_follows_a_request_does_not_unmake_it() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    ds.set_delay(Duration::from_millis(600));
    let mut stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["http/1.1"], None).await.unwrap();
    let body = send_message();
    let request = [head(&format!("Content-Length: {}\r\n", body.len())).into_bytes(), body].concat();
    stream.write_all(&request).await.unwrap();
    assert!(ds.until(|ds| ds.complete() == 1).await);
    stream.write_all(b"\r\n").await.unwrap();
    let mut answer = vec![];
    let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
    assert!(!answer.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&answer));
    still_serves(&gateway, &ds).await;
}
