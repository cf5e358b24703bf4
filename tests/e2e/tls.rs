//! TLS 1.3 and nothing older, post-quantum first, certificates by SNI.

use crate::harness::{Gateway, Setup, ca};
use crate::support::client::{handshake, raw_tls, raw_tls12, tls_config};
use crate::support::ds::Ds;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn nothing_older_than_tls_13() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let error = raw_tls12(gateway.addr, "ds.b.example", &ca().pem()).await.unwrap_err().to_string();
    assert!(error.contains("ProtocolVersion"), "an alert, not silence: {error}");
    let stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["h2"], None).await.unwrap();
    let session = stream.get_ref().1;
    assert_eq!(session.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    let group = session.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
}

#[tokio::test]
async fn protocols_by_alpn() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    for (offer, chosen) in [(&["h2", "http/1.1"][..], Some("h2")), (&["http/1.1"], Some("http/1.1")), (&[], None)] {
        let stream = raw_tls(gateway.addr, "ds.b.example", &ca().pem(), offer, None).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), chosen.map(str::as_bytes));
    }
    assert!(raw_tls(gateway.addr, "ds.b.example", &ca().pem(), &["spdy/3"], None).await.is_err());
}

#[tokio::test]
async fn early_data_is_not_taken() {
    let ds = Ds::start().await;
    let gateway = Gateway::start(Setup::of(&ds)).await;
    let mut config = tls_config(Some(&ca().pem()), &["http/1.1"], None);
    config.enable_early_data = true;
    let config = Arc::new(config);
    for resumed in [false, true] {
        let mut stream = handshake(gateway.addr, "ds.b.example", config.clone()).await.unwrap();
        stream
            .write_all(b"GET /.well-known/mimi/ds-domain HTTP/1.1\r\nHost: ds.b.example\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut answer = vec![];
        stream.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        let session = stream.get_mut().1;
        assert!(!session.is_early_data_accepted());
        assert!(session.early_data().is_none(), "the tickets offer none");
        let kind = session.handshake_kind();
        assert_eq!(kind == Some(rustls::HandshakeKind::Resumed), resumed, "{kind:?}: the second one resumes");
    }
}

#[tokio::test]
async fn certificates_by_sni() {
    let ds = Ds::start().await;
    let dir = tempfile::tempdir().unwrap();
    let (chain, key) = ca().issue(&["also-b.example"]).write(dir.path(), "also");
    let more = format!("[[certificate]]\nchain = \"{}\"\nkey = \"{}\"", chain.display(), key.display());
    let gateway = Gateway::start_in(dir, Setup::of(&ds).with(&more)).await;
    let mut shown = vec![];
    for name in ["ds.b.example", "B.example", "also-b.example"] {
        // The client verifies that the certificate holds the name.
        let stream = raw_tls(gateway.addr, name, &ca().pem(), &[], None).await.unwrap();
        shown.push(stream.get_ref().1.peer_certificates().unwrap()[0].clone());
    }
    assert_eq!(shown[0], shown[1]);
    assert_ne!(shown[0], shown[2]);
    let mut foreign = tls_config(None, &[], None);
    foreign.enable_sni = false;
    let stream = handshake(gateway.addr, "ds.b.example", Arc::new(foreign)).await.unwrap();
    assert_eq!(stream.get_ref().1.peer_certificates().unwrap()[0], shown[0], "who names none gets the first");
}
