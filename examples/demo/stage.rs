//! Everything the play needs: certificates in a temporary directory, the Delivery Service, the issuer, and the gateway as a
//! process of its own, configured from here.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use tempfile::TempDir;
use tokio::process::Child;

use crate::Error;
use crate::support::client::Client;
use crate::support::delivery::Delivery;
use crate::support::ds::Ds;
use crate::support::issuing::{self, Issuer};
use crate::support::pki::{Ca, Identity};
use crate::support::program;

/// The rest of the configuration is the gateway's defaults; conf/gateway.toml explains every key.
const CONFIGURATION: &str = r#"# Written by the demo.
[provider]
names = ["b.example"]
ds_domain = "ds.b.example"

[[listener]]
address = "{listener}"
client_certificates = "optional"
client_ca = "federation-ca.pem"
dialects = ["moh", "mimi"]

[[certificate]]
chain = "ds.b.example.pem"
key = "ds.b.example.key"

[delivery_service]
balance = "group"

[[delivery_service.node]]
address = "{node1}"
protocol = "http1"

[[delivery_service.node]]
address = "{node2}"
protocol = "h2c"

[peers]
named = ["a.example"]

[endpoints.connection_request]
token = "required"

# The directory says the first, the Delivery Service is asked at the second.
[endpoints.update]
path = "/v1/update/{roomId}"
upstream_path = "/hub/update/{roomId}"

[proxy_download]
hosts = ["assets.a.example"]
ca = "federation-ca.pem"

[[limit]]
name = "ip"
key = ["ip"]
rate = "200/s"
burst = 400

[[limit]]
name = "provider"
key = ["provider"]
rate = "2000/s"
burst = 4000

[[limit]]
name = "group"
endpoints = ["group_operation", "welcome_information", "external_commit_information"]
key = ["group"]
rate = "20/s"
burst = 100

# Low, so that the demo can run into it.
[[limit]]
name = "member"
endpoints = ["group_operation"]
key = ["member"]
rate = "1/m"
burst = {member_burst}

# A user of MIMI is one in all rooms.
[[limit]]
name = "user"
endpoints = ["submitMessage"]
key = ["member"]
rate = "1/m"
burst = {user_burst}

[privacy_pass]
origin = "ds.b.example"
epoch = "1h"

# Written by `moh-gateway issuer`. Of the types 1 and 5 the gateway has the issuer's private keys.
[[privacy_pass.issuer]]
name = "issuer.example"
token_type = 2
key_file = "issuer/type-2.pem"

[[privacy_pass.issuer]]
name = "issuer.example"
token_type = 1
key_file = "issuer/type-1.keys"

[[privacy_pass.issuer]]
name = "issuer.example"
token_type = 5
key_file = "issuer/type-5.keys"

[admin]
address = "{admin}"

[access_log]
path = "access.jsonl"

[runtime]
threads = 2
"#;

/// How many operations a member may make at once.
pub const MEMBER_BURST: usize = 8;

/// How many messages a user may send to rooms at once.
pub const USER_BURST: usize = 4;

/// What is running. Dropped, it ends: the gateway is killed, the directory removed.
pub struct Stage {
    /// The gateway, where strangers come in.
    pub addr: SocketAddr,
    admin: SocketAddr,
    /// A node, for those at home.
    local: SocketAddr,
    gateway: Child,
    pub nodes: [Ds; 2],
    /// What the two nodes have in common.
    pub delivery: Arc<Delivery>,
    issuer: Issuer,
    program: PathBuf,
    ca_pem: String,
    guest: Identity,
    dir: TempDir,
}

impl Stage {
    /// Starts everything and waits until the gateway is ready.
    pub async fn set(gateway: Option<&Path>) -> Result<Stage, Error> {
        let begun = Instant::now();
        let program = program::find(gateway)?;
        let dir = TempDir::with_prefix("moh-gateway-demo-")?;
        let ca = Ca::new("Federation of the demo");
        ca.write(dir.path(), "federation-ca");
        ca.issue(&["b.example", "ds.b.example"]).write(dir.path(), "ds.b.example");
        let guest = ca.issue(&["a.example"]);
        guest.write(dir.path(), "a.example");
        let issuer = Issuer::start(&program, &dir.path().join("issuer"), &[]).await?;

        let delivery = Arc::new(Delivery::new());
        let [one, two] = [Ds::start_with(delivery.clone()).await, Ds::start_with(delivery.clone()).await];
        let [addr, admin] = program::free_addresses()?;
        let configuration = CONFIGURATION
            .replace("{listener}", &addr.to_string())
            .replace("{admin}", &admin.to_string())
            .replace("{node1}", &one.addr.to_string())
            .replace("{node2}", &two.addr.to_string())
            .replace("{member_burst}", &MEMBER_BURST.to_string())
            .replace("{user_burst}", &USER_BURST.to_string());
        let gateway = program::start(&program, dir.path(), &configuration)?;
        println!("issuer of tokens        {}, `moh-gateway issuer`", issuer.addr);
        println!("DS nodes of b.example   {} (HTTP/1.1), {} (h2c)", one.addr, two.addr);
        let local = one.addr;
        let nodes = [one, two];
        let ca_pem = ca.pem();
        let mut stage = Stage { addr, admin, local, gateway, nodes, delivery, issuer, program, ca_pem, guest, dir };
        program::ready(&mut stage.gateway, admin, stage.dir.path()).await?;
        println!("gateway of b.example    {addr}, admin {admin}: ready after {} ms", begun.elapsed().as_millis());
        println!("its configuration       {}", stage.path("gateway.toml").display());
        Ok(stage)
    }

    /// A client of the gateway, with no certificate, over HTTP/2.
    pub fn stranger(&self) -> Client {
        Client::tls(self.addr, &self.ca_pem).authority(&format!("ds.b.example:{}", self.addr.port()))
    }

    /// A client of the gateway with the certificate of a.example, over HTTP/2.
    pub fn guest(&self) -> Client {
        self.stranger().identity(&self.guest)
    }

    /// A client of the provider's own, at the DS and not through the gateway.
    pub fn local(&self) -> Client {
        Client::plain(self.local)
    }

    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// What `moh-gateway token` prints for a request of a stranger that was saved: the value of `Authorization`.
    pub async fn token(&self, kind: u16, path: &str, body: &str) -> Result<String, Error> {
        let (ca, roots) = (self.path("federation-ca.pem"), self.issuer.roots());
        let (kind, body) = (kind.to_string(), self.path(body).display().to_string());
        let more = ["--type", &kind, "--body", &body];
        issuing::token(&self.program, path, (self.addr, &ca), (self.issuer.addr, &roots), &more).await
    }

    /// Keeps a body for the commands at the end.
    pub fn save(&self, name: &str, body: &[u8]) -> Result<(), Error> {
        Ok(fs::write(self.path(name), body)?)
    }

    /// The end of what the gateway said.
    pub fn log(&self) -> String {
        program::log(self.dir.path())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Says what can be tried by hand.
    pub fn print_commands(&self) {
        let port = self.addr.port();
        let curl = |guest: bool, method: &str, path: &str, body: &str, more: &str| {
            let certificate = if guest { "--cert a.example.pem --key a.example.key " } else { "" };
            println!(
                "curl -si --cacert federation-ca.pem {certificate}--resolve ds.b.example:{port}:127.0.0.1 -X {method} \\\n  \
                 -H 'Content-Type: application/octet-stream' {more}--data-binary @{body} https://ds.b.example:{port}{path} --output -\n"
            );
        };
        println!(
            "\nEverything is still running, until Ctrl-C. To try in another terminal:\n\ncd {}\n",
            self.dir.path().display()
        );
        println!("# the DS's key (200), by a GET with a body");
        curl(true, "GET", "/verification_key", "verification_key.bin", "");
        println!("# carol sends a message (200; after {MEMBER_BURST} in all 429)");
        curl(true, "POST", "/group_operation", "send_message.bin", "");
        println!("# meant for c.example (421)");
        curl(true, "POST", "/group_operation", "misdirected.bin", "");
        println!("# c.example, says the body; a.example, says the certificate (403)");
        curl(true, "POST", "/group_operation", "sender_mismatch.bin", "");
        println!("# cut off (400)");
        curl(true, "POST", "/group_operation", "malformed.bin", "");
        println!("# a stranger without a token (401)");
        curl(false, "POST", "/connection_request", "connection_request.bin", "");
        println!("# one from the issuer, of type 2, 1 or 5");
        println!(
            "{} token --type 2 --body connection_request.bin --ca federation-ca.pem --resolve ds.b.example:{} \\\n  \
             --issuer https://{}:{} --issuer-ca issuer/ca.pem --resolve {}:{} \\\n  \
             https://ds.b.example:{port}/connection_request > authorization.txt\n",
            self.program.display(),
            self.addr,
            issuing::NAME,
            self.issuer.addr.port(),
            issuing::NAME,
            self.issuer.addr
        );
        println!("# and the same with it (200, a second time 401)");
        curl(false, "POST", "/connection_request", "connection_request.bin", "-H @authorization.txt ");
        println!("# MIMI: where a.example is to send what (200)");
        println!(
            "curl -s --cacert federation-ca.pem --resolve b.example:{port}:127.0.0.1 \\\n  \
             https://b.example:{port}/.well-known/mimi-protocol-directory\n"
        );
        println!("# alice's message, to a room of c.example (421)");
        let at = |room: &str| format!("/submitMessage/mimi%3A%2F%2F{room}%2Fr%2Fsupper");
        curl(true, "POST", &at("c.example"), "submit_message.bin", "-H 'From: mimi@a.example' ");
        println!("# From c.example, it says; a.example, says the certificate (403)");
        curl(true, "POST", &at("b.example"), "submit_message.bin", "-H 'From: mimi@c.example' ");
        println!("# what the gateway makes of it, offline");
        println!(
            "{} explain --dialect mimi --host b.example --from mimi@a.example --path {} submit_message.bin\n",
            self.program.display(),
            at("b.example")
        );
        println!("curl -s http://{}/metrics\ntail -n 3 access.jsonl", self.admin);
    }

    /// Ends the gateway, the issuer and the nodes.
    pub async fn strike(&mut self) {
        let _ = self.gateway.kill().await;
        self.issuer.stop().await;
        for node in &self.nodes {
            node.stop().await;
        }
    }
}
