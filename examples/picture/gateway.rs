//! The gateway as a process of its own, with one limit and in front of a Delivery Service that is here.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::process::Child;

use crate::load::ask;
use crate::support::client::Client;
use crate::support::ds::Ds;
use crate::support::pki::Ca;
use crate::support::program;
use crate::{BURST, Error, RATE};

/// The rest of the configuration is the gateway's defaults; conf/gateway.toml explains every key.
const CONFIGURATION: &str = r#"# Written by the picture.
[provider]
names = ["b.example"]
ds_domain = "ds.b.example"

[[listener]]
address = "{listener}"

[[certificate]]
chain = "ds.b.example.pem"
key = "ds.b.example.key"

[[delivery_service.node]]
address = "{node}"

[[limit]]
name = "ip"
key = ["ip"]
rate = "{rate}/s"
burst = {burst}

[admin]
address = "{admin}"

[access_log]
path = "off"
"#;

/// Connections that loads come over. The gateway lets each have 100 requests under way.
const CONNECTIONS: usize = 4;

/// What all gateways have in common: a folder with certificates, and a Delivery Service.
pub struct Place {
    program: PathBuf,
    ca_pem: String,
    ds: Ds,
    dir: TempDir,
}

impl Place {
    pub async fn make(gateway: Option<&Path>) -> Result<Place, Error> {
        let program = program::find(gateway)?;
        let dir = TempDir::with_prefix("moh-gateway-picture-")?;
        let ca = Ca::new("Federation of the picture");
        ca.issue(&["b.example", "ds.b.example"]).write(dir.path(), "ds.b.example");
        Ok(Place { program, ca_pem: ca.pem(), ds: Ds::start().await, dir })
    }

    /// Starts a gateway that has seen nobody, and waits until it is ready.
    pub async fn open(&self) -> Result<Gateway<'_>, Error> {
        let [addr, admin] = program::free_addresses()?;
        let configuration = CONFIGURATION
            .replace("{listener}", &addr.to_string())
            .replace("{admin}", &admin.to_string())
            .replace("{node}", &self.ds.addr.to_string())
            .replace("{rate}", &RATE.to_string())
            .replace("{burst}", &BURST.to_string());
        let mut process = program::start(&self.program, self.dir.path(), &configuration)?;
        program::ready(&mut process, admin, self.dir.path()).await?;
        Ok(Gateway { addr, process, place: self })
    }
}

/// A running gateway. Dropped, it is killed.
pub struct Gateway<'a> {
    addr: SocketAddr,
    process: Child,
    place: &'a Place,
}

impl Gateway<'_> {
    /// Strangers from one address, each with an open HTTP/2 connection. That took a request each, which the limit has
    /// forgotten when this returns.
    pub async fn clients(&self) -> Result<Vec<Arc<Client>>, Error> {
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            let client = Client::tls(self.addr, &self.place.ca_pem);
            assert_eq!(ask(&client).await?, 200);
            clients.push(Arc::new(client));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        Ok(clients)
    }

    /// Ends it.
    pub async fn close(mut self) -> Result<(), Error> {
        Ok(self.process.kill().await?)
    }
}
