//! The gateway as a process of its own, with one limit and in front of a Delivery Service that is here.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Method;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::load::ask;
use crate::support::client::Client;
use crate::support::ds::Ds;
use crate::support::pki::Ca;
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

/// How long a gateway may take until it is ready.
const READY_WITHIN: Duration = Duration::from_secs(10);

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
        let program = match gateway {
            Some(path) => path.to_owned(),
            None => beside_this_program()?,
        };
        if !program.is_file() {
            return Err(format!(
                "no gateway at {}: `cargo build --release` makes it, or name one with --gateway",
                program.display()
            )
            .into());
        }
        let dir = TempDir::with_prefix("moh-gateway-picture-")?;
        let ca = Ca::new("Federation of the picture");
        ca.issue(&["b.example", "ds.b.example"]).write(dir.path(), "ds.b.example");
        Ok(Place { program, ca_pem: ca.pem(), ds: Ds::start().await, dir })
    }

    /// Starts a gateway that has seen nobody, and waits until it is ready.
    pub async fn open(&self) -> Result<Gateway<'_>, Error> {
        let [addr, admin] = free_addresses()?;
        let configuration = CONFIGURATION
            .replace("{listener}", &addr.to_string())
            .replace("{admin}", &admin.to_string())
            .replace("{node}", &self.ds.addr.to_string())
            .replace("{rate}", &RATE.to_string())
            .replace("{burst}", &BURST.to_string());
        let file = self.dir.path().join("gateway.toml");
        fs::write(&file, configuration)?;
        let log = fs::File::create(self.log())?;
        let process = Command::new(&self.program)
            .args(["run", "--config"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("{}: {error}", self.program.display()))?;
        let mut gateway = Gateway { addr, process, place: self };
        gateway.ready(admin).await?;
        Ok(gateway)
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("gateway.log")
    }
}

/// A running gateway. Dropped, it is killed.
pub struct Gateway<'a> {
    addr: SocketAddr,
    process: Child,
    place: &'a Place,
}

impl Gateway<'_> {
    async fn ready(&mut self, admin: SocketAddr) -> Result<(), Error> {
        let admin = Client::plain(admin).http1().timeout(Duration::from_secs(1));
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            if let Ok(response) = admin.send(Method::GET, "/readyz", "").await
                && response.status == 200
            {
                return Ok(());
            }
            let ended = self.process.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(self.place.log()).unwrap_or_default();
                return Err(format!("the gateway is not ready ({ended:?}):\n{log}").into());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

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

/// `target/<profile>/moh-gateway`, this being `target/<profile>/examples/picture`.
fn beside_this_program() -> Result<PathBuf, Error> {
    let this = std::env::current_exe()?;
    let profile = this.parent().and_then(Path::parent).ok_or("this program has no place")?;
    Ok(profile.join("moh-gateway"))
}

/// Addresses on the loopback that nobody listens at.
fn free_addresses() -> Result<[SocketAddr; 2], Error> {
    let (one, two) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
    Ok([one.local_addr()?, two.local_addr()?])
}
