//! What the Delivery Service gets, and what comes back.

use crate::harness::{Gateway, Setup, large_message, material, message_in, send_message};
use crate::support::ds::Ds;
use crate::support::encode::{self, SenderId};
use http::Method;
use std::time::Duration;

/// A request for each endpoint, with real MLS messages in it.
fn every_request() -> Vec<(Method, &'static str, Vec<u8>)> {
    let m = material();
    let (a, b) = ("a.example", "b.example");
    let leaf = SenderId::Leaf(m.leaf);
    let user = SenderId::UserKeyHash(vec![9; 32]);
    let named = |octets: &[u8]| [encode::vector(octets), encode::vector(&[1; 32])].concat();
    vec![
        (Method::POST, "/group_operation", send_message()),
        (
            Method::POST,
            "/group_operation",
            encode::ds_request(a, b, &leaf, encode::ADD_USERS, &[&m.commit[..], &m.welcome].concat(), b"s"),
        ),
        (
            Method::GET,
            "/welcome_information",
            encode::ds_request(a, b, &user, encode::WELCOME_INFO, &named(&m.group_id), b"s"),
        ),
        (
            Method::GET,
            "/external_commit_information",
            encode::ds_request(a, b, &user, encode::EXTERNAL_COMMIT_INFO, &named(&m.group_id), b"s"),
        ),
        (Method::GET, "/verification_key", encode::verification_key_request(a, b)),
        (Method::POST, "/connection_request", encode::queueing_request(a, b, b"queue", &m.welcome)),
        (Method::POST, "/deliver_message", encode::queueing_request(a, b, b"queue", &m.message)),
        (Method::POST, "/deliver_message", encode::queueing_request(a, b, b"queue", &m.commit)),
        (Method::POST, "/connection_key_packages", encode::connection_key_package_request(a, b, b"im:bob@b.example")),
        (Method::POST, "/group_key_packages", encode::group_key_package_request(a, b, &m.group_id, &[b"1", b"2"])),
    ]
}

#[tokio::test]
async fn every_endpoint_over_both_versions_on_both_sides() {
    for h2c in [false, true] {
        let ds = Ds::start().await;
        let setup = Setup::of(&ds);
        let gateway = Gateway::start(if h2c { setup.h2c() } else { setup }).await;
        ds.set_response(207, &[("content-type", "application/x-ds"), ("x-ds", "kept")], vec![0u8, 1, 2, 255]);
        for client in [gateway.peer().http1(), gateway.peer().http2()] {
            for (n, (method, path, body)) in every_request().into_iter().enumerate() {
                let before = ds.complete();
                let response = client.send(method.clone(), path, body.clone()).await.unwrap();
                assert_eq!(response.status, 207, "{path} {n}: {}", response.text());
                assert_eq!(&response.body[..], [0, 1, 2, 255]);
                assert_eq!(response.header("x-ds"), Some("kept"));
                assert_eq!(response.header("content-type"), Some("application/x-ds"));
                let got = ds.requests().pop().unwrap();
                assert_eq!(ds.complete(), before + 1);
                assert_eq!((&got.method, got.path.as_str()), (&method, path));
                assert_eq!(got.body, body, "not an octet is changed");
                let expected = if h2c { http::Version::HTTP_2 } else { http::Version::HTTP_11 };
                assert_eq!(got.version, expected);
            }
            assert_eq!(client.connections(), 1, "connections are kept");
        }
        assert!(ds.connections() <= 4, "to the node too: {}", ds.connections());
    }
}

#[tokio::test]
async fn a_body_without_a_length_goes_on_chunked() {
    for h2c in [false, true] {
        let ds = Ds::start().await;
        let setup = Setup::of(&ds);
        let gateway = Gateway::start(if h2c { setup.h2c() } else { setup }).await;
        for client in [gateway.peer().http1(), gateway.peer().http2()] {
            for (method, path, body) in [
                (Method::POST, "/group_operation", large_message(300_000)),
                (Method::GET, "/verification_key", encode::verification_key_request("a.example", "b.example")),
            ] {
                // hyper frames a GET's body only when told to.
                let chunked = [("transfer-encoding", "chunked")];
                let headers = if client.is_http1() && method == Method::GET { &chunked[..] } else { &[] };
                let upload = client.begin(method, path, headers, None).await.unwrap();
                for piece in body.chunks(7_001) {
                    upload.write(piece.to_vec()).await.unwrap();
                }
                let response = upload.finish().await.unwrap();
                assert_eq!(response.status, 200, "{path}");
                assert!(ds.requests().pop().unwrap().body == body, "{path}");
            }
        }
    }
}

#[tokio::test]
async fn the_discovery_document() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    for client in [gateway.stranger().http1(), gateway.stranger().http2(), gateway.stranger().authority("b.example")] {
        let response =
            client.send_with(Method::GET, "/.well-known/mimi/ds-domain", &[("content-type", "")], "").await.unwrap();
        assert_eq!(response.status, 200);
        assert_eq!(response.header("content-type"), Some("text/plain"));
        assert_eq!(response.text(), "ds.b.example");
    }
    assert_eq!(ds.begun(), 0);
}

#[tokio::test]
async fn the_ds_learns_who_sends_from_the_gateway_alone() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let forged = [
        ("x-forwarded-for", "203.0.113.1"),
        ("forwarded", "for=203.0.113.1"),
        ("x-moh-provider", "c.example"),
        ("x-request-id", "mine"),
        ("x-harmless", "kept"),
        ("authorization", "Bearer of the DS"),
    ];
    for client in [gateway.peer().http1(), gateway.peer()] {
        let response = client.send_with(Method::POST, "/group_operation", &forged, send_message()).await.unwrap();
        assert_eq!(response.status, 200);
    }
    gateway.stranger().send_with(Method::POST, "/group_operation", &forged, send_message()).await.unwrap();
    let requests = ds.requests();
    let values = |n: usize, name: &str| -> Vec<String> {
        requests[n].headers.get_all(name).iter().map(|v| v.to_str().unwrap().to_owned()).collect()
    };
    for n in 0..3 {
        let [forwarded] = &values(n, "forwarded")[..] else { panic!("one field") };
        assert!(forwarded.starts_with("for=127.") && forwarded.ends_with(";proto=https"), "{forwarded}");
        assert!(values(n, "x-forwarded-for").is_empty());
        assert_eq!(values(n, "x-harmless"), ["kept"]);
        assert_eq!(values(n, "authorization"), ["Bearer of the DS"]);
        assert_eq!(values(n, "host"), ["ds.b.example"]);
        assert_eq!(values(n, "x-request-id")[0].len(), 32);
    }
    assert_ne!(values(0, "x-request-id"), values(1, "x-request-id"));
    assert_eq!(values(0, "x-moh-provider"), ["a.example"]);
    assert_eq!(values(1, "x-moh-provider"), ["a.example"]);
    assert!(values(2, "x-moh-provider").is_empty(), "a claim is not an authentication");
}

#[tokio::test]
async fn groups_keep_their_node_and_move_when_it_dies() {
    let nodes = [Ds::start().await, Ds::start().await, Ds::start().await];
    let addresses = nodes.each_ref().map(|ds| ds.addr);
    let gateway = Gateway::start(Setup::of_nodes(&addresses)).await;
    let client = gateway.peer();
    let groups: Vec<String> = (0..30).map(|i| format!("group {i}")).collect();
    for _ in 0..3 {
        for group in &groups {
            assert_eq!(
                client.send(Method::POST, "/group_operation", message_in(group.as_bytes(), 1)).await.unwrap().status,
                200
            );
        }
    }
    let homes: Vec<usize> = groups
        .iter()
        .map(|group| {
            let holds = |ds: &Ds| ds.requests().iter().filter(|r| r.body == message_in(group.as_bytes(), 1)).count();
            let counts: Vec<_> = nodes.iter().map(holds).collect();
            assert_eq!(counts.iter().max(), Some(&3), "all three at one node: {counts:?}");
            counts.iter().position(|n| *n == 3).unwrap()
        })
        .collect();
    assert!((0..3).all(|n| homes.contains(&n)), "spread over all: {homes:?}");

    nodes[1].stop().await;
    for (group, home) in groups.iter().zip(&homes) {
        let before = nodes.each_ref().map(Ds::complete);
        let response = client.send(Method::POST, "/group_operation", message_in(group.as_bytes(), 1)).await.unwrap();
        assert_eq!(response.status, 200, "nothing was sent to the dead node, so the next one may have it");
        let after = nodes.each_ref().map(Ds::complete);
        let moved = after.iter().zip(before).position(|(after, before)| *after > before).unwrap();
        assert_eq!(moved == *home, *home != 1, "only its groups move");
    }
}

#[tokio::test]
async fn round_robin_takes_turns() {
    let nodes = [Ds::start().await, Ds::start().await];
    let setup = Setup { delivery: "balance = \"round-robin\"", ..Setup::of_nodes(&nodes.each_ref().map(|ds| ds.addr)) };
    let gateway = Gateway::start(setup).await;
    let client = gateway.peer();
    for _ in 0..10 {
        assert_eq!(client.send(Method::POST, "/group_operation", send_message()).await.unwrap().status, 200);
    }
    assert_eq!(nodes.each_ref().map(Ds::complete), [5, 5]);
}

#[tokio::test]
async fn a_broken_exchange_is_not_repeated() {
    let nodes = [Ds::start().await, Ds::start().await];
    let gateway = Gateway::start(Setup::of_nodes(&nodes.each_ref().map(|ds| ds.addr))).await;
    nodes.iter().for_each(|ds| ds.hang(true));
    let request = encode::verification_key_request("a.example", "b.example");
    let response = gateway.peer().send(Method::GET, "/verification_key", request).await.unwrap();
    assert_eq!(response.status, 504);
    assert_eq!(nodes.iter().map(Ds::begun).sum::<usize>(), 1, "a DS that may have begun is not asked twice");
}

#[tokio::test]
async fn refused_while_most_of_the_body_is_unsent() {
    let ds = Ds::start().await;
    let limit =
        "[[limit]]\nname = \"group\"\nendpoints = [\"group_operation\"]\nkey = [\"group\"]\nrate = \"1/h\"\nburst = 1";
    let gateway = Gateway::start(Setup::of(&ds).with(limit)).await;
    assert_eq!(
        gateway.peer().send(Method::POST, "/group_operation", message_in(b"large", 1)).await.unwrap().status,
        200
    );
    const ALL: usize = 8 << 20;
    let body = large_message(ALL);
    for client in [gateway.peer().http1(), gateway.peer().http2()] {
        let mut upload = client.begin(Method::POST, "/group_operation", &[], Some(ALL as u64)).await.unwrap();
        upload.write(body[..100].to_vec()).await.unwrap();
        let response = upload.answer().await.unwrap();
        assert_eq!(response.status, 429, "after 100 of {ALL} octets");
    }
    assert_eq!(ds.begun(), 1);
}

#[tokio::test]
async fn forwarded_while_its_tail_is_still_written() {
    const ALL: usize = 8 << 20;
    let body = large_message(ALL);
    for h2c in [false, true] {
        let ds = Ds::start().await;
        let setup = Setup::of(&ds);
        let gateway = Gateway::start(if h2c { setup.h2c() } else { setup }).await;
        for client in [gateway.peer().http1(), gateway.peer().http2()] {
            let before = ds.body_bytes_seen();
            let upload = client.begin(Method::POST, "/group_operation", &[], Some(ALL as u64)).await.unwrap();
            // A first piece too short to decide by, then more than Pingora's replay buffer takes.
            upload.write(body[..20].to_vec()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            upload.write(body[20..400_000].to_vec()).await.unwrap();
            assert!(ds.until(|ds| ds.body_bytes_seen() >= before + 400_000).await, "the node has what was sent");
            for piece in body[400_000..].chunks(1 << 16) {
                upload.write(piece.to_vec()).await.unwrap();
            }
            assert_eq!(upload.finish().await.unwrap().status, 200);
            assert!(ds.requests().pop().unwrap().body == body, "octet for octet");
        }
    }
}

#[tokio::test]
async fn memory_does_not_grow_with_bodies() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup { timeouts: "", ..Setup::of(&ds) }).await;
    let body = bytes::Bytes::from(large_message(7 << 20));
    let send = |n: usize| {
        let client = if n.is_multiple_of(2) { gateway.peer().http1() } else { gateway.peer().http2() };
        let body = body.clone();
        async move {
            let upload = client.begin(Method::POST, "/group_operation", &[], Some(body.len() as u64)).await.unwrap();
            for at in (0..body.len() - (1 << 16)).step_by(1 << 16) {
                upload.write(body.slice(at..at + (1 << 16))).await.unwrap();
            }
            // All of them are in flight, all but whole.
            tokio::time::sleep(Duration::from_millis(500)).await;
            upload.write(body.slice(body.len() - (1 << 16)..)).await.unwrap();
            assert_eq!(upload.finish().await.unwrap().status, 200);
        }
    };
    send(0).await;
    send(1).await;
    let before = gateway.resident();
    let mut tasks = tokio::task::JoinSet::new();
    (0..24).for_each(|n| {
        tasks.spawn(send(n));
    });
    let mut peak = before;
    while !tasks.is_empty() {
        tokio::select! {
            done = tasks.join_next() => done.unwrap().unwrap(),
            () = tokio::time::sleep(Duration::from_millis(20)) => peak = peak.max(gateway.resident()),
        }
    }
    let grown = peak.saturating_sub(before) / 1024;
    assert!(grown < 24 * 1024, "{grown} KiB for 24 bodies of 7 MiB");
}

#[tokio::test]
async fn sigterm_lets_requests_end() {
    let ds = Ds::start().await;
    let mut gateway = Gateway::start(Setup::of(&ds)).await;
    ds.set_delay(Duration::from_millis(700));
    let clients = [gateway.peer().http1(), gateway.peer().http2()];
    let mut tasks = tokio::task::JoinSet::new();
    for client in clients {
        tasks.spawn(async move { client.send(Method::POST, "/group_operation", send_message()).await });
    }
    assert!(ds.until(|ds| ds.complete() == 2).await);
    gateway.signal("-TERM");
    for result in tasks.join_all().await {
        let response = result.unwrap();
        assert_eq!(response.status, 200);
        if response.version == http::Version::HTTP_11 {
            assert_eq!(response.header("connection"), Some("close"), "nobody is invited to send another");
        }
    }
    assert!(gateway.ended().await.success());
}

/// A node that speaks h2c by hand: it resets the first `refused` streams with `reason`, once the body is in, and answers the others.
pub async fn resetting_node(
    refused: usize,
    reason: h2::Reason,
) -> (std::net::SocketAddr, tokio::sync::watch::Receiver<usize>) {
    resetting_node_when(refused, reason, false).await
}

/// The same, which may be `early`: it resets them once something of the body is in.
async fn resetting_node_when(
    refused: usize,
    reason: h2::Reason,
    early: bool,
) -> (std::net::SocketAddr, tokio::sync::watch::Receiver<usize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (seen, count) = tokio::sync::watch::channel(0);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut connection) = h2::server::handshake(stream).await else { continue };
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                seen.send_modify(|n| *n += 1);
                let refuse = *seen.borrow() <= refused;
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    let mut all = vec![];
                    while let Some(Ok(chunk)) = body.data().await {
                        body.flow_control().release_capacity(chunk.len()).unwrap();
                        all.extend(chunk);
                        if refuse && early {
                            break;
                        }
                    }
                    if refuse {
                        return respond.send_reset(reason);
                    }
                    let mut send = respond.send_response(http::Response::new(()), false).unwrap();
                    send.send_data(all.into(), true).unwrap();
                });
            }
        }
    });
    (address, count)
}

#[tokio::test]
async fn what_a_node_left_untouched_is_sent_again_and_nothing_else() {
    for (reason, status, tries) in
        [(h2::Reason::REFUSED_STREAM, 200, 2), (h2::Reason::INTERNAL_ERROR, 502, 1), (h2::Reason::CANCEL, 502, 1)]
    {
        let (address, seen) = resetting_node(1, reason).await;
        let gateway = Gateway::start(Setup::of_nodes(&[address]).h2c()).await;
        let response = gateway.peer().send(Method::POST, "/group_operation", send_message()).await.unwrap();
        assert_eq!((response.status.as_u16(), *seen.borrow()), (status, tries), "{reason:?}");
        if status == 200 {
            assert_eq!(response.body, send_message(), "whole, each time");
        }
    }
}

#[tokio::test]
async fn a_body_of_which_only_the_beginning_was_there_is_sent_again_whole() {
    let body = bytes::Bytes::from(send_message());
    let (first, rest) = (body.slice(..body.len() - 9), body.slice(body.len() - 9..));
    for http2 in [false, true] {
        let (address, mut seen) = resetting_node_when(1, h2::Reason::REFUSED_STREAM, true).await;
        let gateway = Gateway::start(Setup::of_nodes(&[address]).h2c()).await;
        let client = if http2 { gateway.peer().http2() } else { gateway.peer().http1() };
        let length = Some(body.len() as u64);
        let upload = client.begin(Method::POST, "/group_operation", &[], length).await.unwrap();
        upload.write(first.clone()).await.unwrap();
        let both = seen.wait_for(|seen| *seen == 2);
        tokio::time::timeout(Duration::from_secs(5), both).await.expect("it is sent again").unwrap();
        upload.write(rest.clone()).await.unwrap();
        let answer = upload.finish().await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.body == body), (200, true));
    }
}

#[tokio::test]
async fn a_node_that_refuses_is_left_for_another() {
    let (refusing, seen) = resetting_node(usize::MAX, h2::Reason::REFUSED_STREAM).await;
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of_nodes(&[refusing, ds.addr]).h2c()).await;
    let client = gateway.peer();
    for leaf in 0..10 {
        let body = message_in(format!("group {leaf}").as_bytes(), leaf);
        assert_eq!(client.send(Method::POST, "/group_operation", body).await.unwrap().status, 200);
    }
    assert_eq!(ds.complete(), 10);
    assert!(*seen.borrow() <= 20, "twice a request at most: {}", *seen.borrow());
}

#[tokio::test]
async fn sigterm_sends_what_http2_was_given_to_send() {
    let ds = Ds::start().await;
    let mut gateway = Gateway::start(Setup::of(&ds)).await;
    const ALL: usize = 8 << 20;
    ds.set_response(200, &[], vec![7u8; ALL]);
    let stream =
        crate::support::client::raw_tls(gateway.addr, "ds.b.example", &crate::harness::ca().pem(), &["h2"], None)
            .await
            .unwrap();
    let (mut client, connection) = h2::client::Builder::new()
        .initial_window_size(1 << 24)
        .initial_connection_window_size(1 << 24)
        .handshake::<_, bytes::Bytes>(stream)
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = http::Request::post("https://ds.b.example/group_operation")
        .header("content-type", "application/octet-stream")
        .body(())
        .unwrap();
    client = client.ready().await.unwrap();
    let (response, mut body) = client.send_request(request, false).unwrap();
    body.send_data(send_message().into(), true).unwrap();
    let mut body = response.await.unwrap().into_body();
    gateway.signal("-TERM");
    let mut got = 0;
    while let Some(chunk) = body.data().await {
        got += chunk.unwrap().len();
        tokio::time::sleep(Duration::from_micros(300)).await;
    }
    assert_eq!(got, ALL);
    assert!(gateway.ended().await.success());
}
