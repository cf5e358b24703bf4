//! Privacy Pass between implementations: the client and the issuer of `tests/interop`, made of
//! `@cloudflare/privacypass-ts`, with which ours have no code in common, each against the other side of ours.
//!
//! They need node 18 or newer and that library. Without them nothing is tested here, so that is a failure and not a
//! pass.

use crate::harness::{Gateway, Setup, binary, ca};
use crate::support::ds::Ds;
use crate::support::issuing::{self, Issuer, NAME};
use crate::tokens::{REQUIRED, ask, outcome, request};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;

const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop");

/// Blind RSA, VOPRF(P-384): those of three types that the library knows in the form of RFC 9578.
const TYPES: [u16; 2] = [2, 1];

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The request's body in a file, beside the roots of the gateway's certificate: `(body, roots)`.
fn files_of(gateway: &Gateway) -> (PathBuf, PathBuf) {
    let body = gateway.dir.path().join("request.bin");
    std::fs::write(&body, request()).unwrap();
    (body, gateway.dir.path().join("ca.pem"))
}

/// A gateway that wants tokens of issuers, each by its type and where its keys are from.
async fn gateway(ds: &Ds, issuers: &[(u16, String)]) -> Gateway {
    let mut tables = String::new();
    for (kind, keys) in issuers {
        writeln!(tables, "[[privacy_pass.issuer]]\nname = \"{NAME}\"\ntoken_type = {kind}\n{keys}").unwrap();
    }
    Gateway::start(Setup::of(ds).with(REQUIRED).with("[privacy_pass]").with(&tables)).await
}

fn key_file(path: &Path) -> String {
    format!("key_file = \"{}\"", path.display())
}

/// node, with one of the scripts.
async fn node(script: &str) -> Command {
    static NODE: OnceCell<(OsString, Option<&str>)> = OnceCell::const_new();
    let found = NODE.get_or_init(|| async {
        let modules = Path::new(SCRIPTS).join("node_modules/@cloudflare/privacypass-ts");
        assert!(modules.is_dir(), "{} is not there: `make setup-test` installs it", modules.display());
        let program = std::env::var_os("MOH_NODE").filter(|given| !given.is_empty()).unwrap_or_else(|| "node".into());
        let version = issuing::output(Command::new(&program).arg("--version")).await;
        let version = version.unwrap_or_else(|error| panic!("{error}: `make setup-test` installs node"));
        // The library takes WebCrypto for a global, which it is not yet in 18.
        (program, version.starts_with("v18.").then_some("--experimental-global-webcrypto"))
    });
    let (program, flag) = found.await;
    let mut command = Command::new(program);
    command.args(flag).arg(Path::new(SCRIPTS).join(script));
    command
}

/// What their client tells of its way through a challenge, an issuer and a redemption.
async fn their_client(gateway: &Gateway, issuer: SocketAddr, roots: &Path, kind: u16, more: &[&str]) -> Value {
    let (body, ca) = files_of(gateway);
    let mut command = node("client.mjs").await;
    command.args(["--url", &format!("https://{}/connection_request", gateway.addr), "--servername", "ds.b.example"]);
    command.args(["--ca", text(&ca), "--body", text(&body), "--type", &kind.to_string()]);
    command.args(["--issuer", &format!("https://{issuer}"), "--issuer-ca", text(roots), "--issuer-servername", NAME]);
    let told = issuing::output(command.args(more)).await.unwrap();
    serde_json::from_str(&told).unwrap()
}

/// Their issuer of one type of token. It ends with the test.
struct TheirIssuer {
    addr: SocketAddr,
    dir: tempfile::TempDir,
    _child: Child,
}

impl TheirIssuer {
    /// With a certificate for these names.
    async fn start(kind: u16, names: &[&str]) -> TheirIssuer {
        let dir = tempfile::tempdir().unwrap();
        let (chain, key) = ca().issue(names).write(dir.path(), "tls");
        let mut command = node("issuer.mjs").await;
        command.args(["--name", NAME, "--type", &kind.to_string(), "--dir", text(dir.path())]);
        command.args(["--cert", text(&chain), "--key", text(&key)]);
        let (child, addr) = issuing::listening(&mut command, &dir.path().join("log")).await.unwrap();
        TheirIssuer { addr, dir, _child: child }
    }
}

#[tokio::test]
async fn their_client_our_issuer() {
    let dir = tempfile::tempdir().unwrap();
    let issuer = Issuer::start(Path::new(binary()), dir.path(), &[]).await.unwrap();
    let ds = Ds::start().await;
    let gateway = gateway(&ds, &TYPES.map(|kind| (kind, key_file(&issuer.key_file(kind))))).await;
    for (redeemed, kind) in (1..).zip(TYPES) {
        let told = their_client(&gateway, issuer.addr, &issuer.roots(), kind, &["--again"]).await;
        assert_eq!(told["first"]["status"], 401, "{told}");
        assert!(told["first"]["type"].as_str().unwrap().ends_with(":token-missing"), "{told}");
        let challenges = told["challenges"].as_array().unwrap();
        let expected = TYPES.map(|kind| {
            let origins = ["ds.b.example"];
            json!({ "token_type": kind, "issuer_name": NAME, "origin_info": origins, "redemption_context_len": 32 })
        });
        let without_age = challenges.iter().cloned().map(|mut challenge| {
            let age = challenge.as_object_mut().unwrap().remove("max_age");
            assert!(age.is_some_and(|age| age.as_u64() > Some(0)), "{told}");
            challenge
        });
        assert_eq!(without_age.collect::<Vec<_>>(), expected);
        let issued = json!({ "status": 200, "content_type": "application/private-token-response" });
        assert_eq!(told["issued"], issued);
        assert_eq!(told["redeemed"], json!({ "status": 200, "problem": null }), "type {kind}");
        assert_eq!(told["again"], json!({ "status": 401, "problem": "token-spent" }), "type {kind}");

        let told = their_client(&gateway, issuer.addr, &issuer.roots(), kind, &["--tamper"]).await;
        assert_eq!(told["issued"], issued);
        assert_eq!(told["redeemed"], json!({ "status": 401, "problem": "token-bad" }), "type {kind}");
        assert_eq!((ds.begun(), ds.complete()), (redeemed, redeemed), "type {kind}");
    }
}

#[tokio::test]
async fn our_client_their_issuer() {
    for kind in TYPES {
        let issuer = TheirIssuer::start(kind, &[NAME]).await;
        let ds = Ds::start().await;
        let gateway = gateway(&ds, &[(kind, key_file(&issuing::key_file(issuer.dir.path(), kind)))]).await;
        let (body, roots) = files_of(&gateway);
        let (of_gateway, of_issuer) = ((gateway.addr, &*roots), (issuer.addr, &*roots));
        let more = ["--type", &kind.to_string(), "--body", text(&body)];
        let token = issuing::token(Path::new(binary()), "/connection_request", of_gateway, of_issuer, &more).await;
        let token = token.unwrap();
        assert!(token.starts_with("PrivateToken token=\""), "{token}");
        assert_eq!(ds.begun(), 0, "it has asked, and let us redeem");
        assert_eq!(outcome(&ask(&gateway.stranger(), &[&token]).await).0, 200, "type {kind}");
        let again = ask(&gateway.stranger(), &[&token]).await;
        assert_eq!(outcome(&again), (401, "token-spent".into()), "type {kind}");
        assert_eq!((ds.begun(), ds.complete()), (1, 1), "type {kind}");
    }
}

#[tokio::test]
async fn their_directory_our_gateway() {
    // Its directory is asked by a name that has an address; it is known to clients by its own.
    let issuer = TheirIssuer::start(2, &[NAME, "localhost"]).await;
    let url = format!("https://localhost:{}/.well-known/private-token-issuer-directory", issuer.addr.port());
    let ds = Ds::start().await;
    let gateway = gateway(&ds, &[(2, format!("directory = \"{url}\"\ndirectory_ca = \"ca.pem\""))]).await;
    let client = gateway.stranger();
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let response = ask(&client, &[]).await;
        if response.status == 401 {
            assert!(response.header("www-authenticate").is_some_and(|value| value.starts_with("PrivateToken ")));
            break;
        }
        assert_eq!(outcome(&response), (503, "token-no-key".into()));
        assert!(Instant::now() < until, "it has heard of no key: {}", gateway.stderr());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let told = their_client(&gateway, issuer.addr, &gateway.dir.path().join("ca.pem"), 2, &["--again"]).await;
    assert_eq!(told["redeemed"], json!({ "status": 200, "problem": null }));
    assert_eq!(told["again"], json!({ "status": 401, "problem": "token-spent" }));
    assert_eq!((ds.begun(), ds.complete()), (1, 1));
}
