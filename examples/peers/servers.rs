//! The servers that are compared, each a process of its own on the servers' core, and ended with what holds it.

use std::fmt::Display;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Method;
use tempfile::TempDir;

use crate::Error;
use crate::backend::Backend;
use crate::configuration::Configuration;
use crate::load::Generator;
use crate::process::{self, Cpu};
use crate::requests::{GROUP_LENGTH, NAME, group_at};
use crate::support::client::Client;
use crate::support::pki::Ca;
use crate::support::program;

/// How long a server may take until it answers.
const READY_WITHIN: Duration = Duration::from_secs(10);

/// Where the backend is, in the folder of the comparison.
const SOCKET: &str = "node.sock";

/// A server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Gateway,
    Nginx,
    HaProxy,
    Pingora,
    /// The gateway, with its node over h2c.
    OverH2c,
    /// The gateway, with its node over a Unix socket.
    OverUnix,
}

impl Kind {
    /// Those that send on over HTTP/1.1 and TCP, as all of them can.
    pub const COMPARED: [Kind; 4] = [Kind::Gateway, Kind::Nginx, Kind::HaProxy, Kind::Pingora];
    pub const ALL: [Kind; 6] =
        [Kind::Gateway, Kind::Nginx, Kind::HaProxy, Kind::Pingora, Kind::OverH2c, Kind::OverUnix];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Gateway => "gateway",
            Kind::Nginx => "NGINX",
            Kind::HaProxy => "HAProxy",
            Kind::Pingora => "bare Pingora",
            Kind::OverH2c => "gateway (h2c)",
            Kind::OverUnix => "gateway (Unix socket)",
        }
    }

    fn configuration(self) -> Option<&'static str> {
        match self {
            Kind::Gateway | Kind::OverH2c | Kind::OverUnix => Some(include_str!("gateway.toml")),
            Kind::Nginx => Some(include_str!("nginx.conf")),
            Kind::HaProxy => Some(include_str!("haproxy.cfg")),
            Kind::Pingora => None,
        }
    }
}

/// What all servers have in common: a certificate, and the backend.
pub struct Place {
    pub ca_pem: String,
    pub backend: Backend,
    gateway: PathBuf,
    dir: TempDir,
}

impl Place {
    pub async fn make(gateway: Option<&Path>) -> Result<Place, Error> {
        let gateway = program::find(gateway)?;
        let dir = TempDir::with_prefix("moh-gateway-peers-")?;
        let ca = Ca::new("Federation of the comparison");
        let identity = ca.issue(&["b.example", NAME]);
        identity.write(dir.path(), NAME);
        // HAProxy reads both from one file.
        fs::write(dir.path().join("both.pem"), [identity.chain_pem, identity.key_pem].concat())?;
        let backend = Backend::start(&dir.path().join(SOCKET)).await?;
        Ok(Place { ca_pem: ca.pem(), backend, gateway, dir })
    }

    /// Starts a server, and waits until it has answered a request.
    pub async fn start(&self, kind: Kind, generator: &Arc<Generator>) -> Result<Server, Error> {
        let node = match kind {
            Kind::OverUnix => format!("unix:{}", self.at(SOCKET)),
            _ => self.backend.addr.to_string(),
        };
        let protocol = if kind == Kind::OverH2c { "h2c" } else { "http1" };
        let configuration = kind.configuration().unwrap_or_default();
        let site =
            self.site(&format!("{kind:?}"), &configuration.replace("{node}", &node).replace("{protocol}", protocol))?;
        let mut command = on_cores(process::SERVERS);
        match kind {
            Kind::Nginx => command.args(["nginx", "-e", "stderr", "-c"]).arg(&site.file),
            Kind::HaProxy => command.args(["haproxy", "-db", "-f"]).arg(&site.file),
            Kind::Pingora => command
                .arg(std::env::current_exe()?)
                .args(["bare", "--listen", &site.addr.to_string(), "--node", &node])
                .args(["--certificate", &self.at(&format!("{NAME}.pem")), "--key", &self.at(&format!("{NAME}.key"))]),
            _ => command.arg(&self.gateway).args(["run", "--config"]).arg(&site.file),
        };
        self.launch(kind, site, command, generator).await
    }

    /// Starts a gateway that is configured in its own way, on these cores, and waits until it has answered a request.
    pub async fn start_gateway(
        &self,
        name: &str,
        configuration: &Configuration,
        cores: &str,
        generator: &Arc<Generator>,
    ) -> Result<Server, Error> {
        let site = self.site(name, &configuration.to_string())?;
        let mut command = on_cores(cores);
        command.arg(&self.gateway).args(["run", "--config"]).arg(&site.file);
        self.launch(Kind::Gateway, site, command, generator).await
    }

    /// Has a gateway read another configuration, by SIGHUP: it may be in use a moment later.
    pub async fn reload(&self, server: &Server, configuration: &Configuration) -> Result<(), Error> {
        let filled = self.filled(&configuration.to_string(), server.site.addr, server.site.admin);
        fs::write(&server.site.file, filled)?;
        let process = server.child.id().to_string();
        let told = tokio::process::Command::new("kill").args(["-HUP", &process]).status().await;
        if !told.map_err(|error| format!("kill: {error}"))?.success() {
            return Err(server.failed(&"SIGHUP", &"there is no such process"));
        }
        Ok(())
    }

    /// Where a server of this name is to be, with its configuration, if it has one, in its place.
    fn site(&self, name: &str, configuration: &str) -> Result<Site, Error> {
        let [addr, admin] = program::free_addresses()?;
        let [file, log] = ["conf", "log"].map(|kind| self.dir.path().join(format!("{name}.{kind}")));
        fs::write(&file, self.filled(configuration, addr, admin))?;
        Ok(Site { addr, admin, file, log })
    }

    /// A configuration, with what is this comparison's own in its places.
    fn filled(&self, configuration: &str, addr: SocketAddr, admin: SocketAddr) -> String {
        let values = [
            ("{listener}", addr.to_string()),
            ("{admin}", admin.to_string()),
            ("{certificate}", self.at(&format!("{NAME}.pem"))),
            ("{key}", self.at(&format!("{NAME}.key"))),
            ("{pem}", self.at("both.pem")),
            ("{dir}", self.at("")),
            ("{group_at}", group_at().to_string()),
            ("{group_length}", GROUP_LENGTH.to_string()),
        ];
        values.iter().fold(configuration.to_owned(), |text, (name, value)| text.replace(name, value))
    }

    async fn launch(
        &self,
        kind: Kind,
        site: Site,
        mut command: Command,
        generator: &Arc<Generator>,
    ) -> Result<Server, Error> {
        let output = File::create(&site.log)?;
        command.env("PATH", path()).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().map_err(|error| format!("taskset: {error}"))?;
        let mut server = Server { kind, addr: site.addr, child, site };
        server.ready(generator).await?;
        Ok(server)
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}

/// A command that is to run on these cores.
fn on_cores(cores: &str) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", cores]);
    command
}

/// Where a server is.
struct Site {
    addr: SocketAddr,
    admin: SocketAddr,
    file: PathBuf,
    log: PathBuf,
}

/// A running server. Dropped, it is killed.
pub struct Server {
    pub kind: Kind,
    pub addr: SocketAddr,
    child: Child,
    site: Site,
}

impl Server {
    async fn ready(&mut self, generator: &Arc<Generator>) -> Result<(), Error> {
        let until = Instant::now() + READY_WITHIN;
        loop {
            let Err(error) = generator.ask(self.addr).await else { return Ok(()) };
            if let Some(status) = self.child.try_wait()? {
                return Err(self.failed(&format!("it has ended ({status})"), &error));
            }
            if Instant::now() > until {
                return Err(self.failed(&format!("no answer in {READY_WITHIN:?}"), &error));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What it has used of its core so far.
    pub fn cpu(&self) -> Result<Cpu, Error> {
        Cpu::of(self.child.id())
    }

    /// Octets that it holds in memory ("VmRSS"), or has held at most since [`Server::forget_peak`] ("VmHWM").
    pub fn memory(&self, field: &str) -> Result<u64, Error> {
        process::memory(self.child.id(), field)
    }

    /// What a gateway's metrics say.
    pub async fn metric(&self, name: &str) -> Result<f64, Error> {
        let said = Client::plain(self.site.admin).http1().send(Method::GET, "/metrics", "").await?.text();
        let value: Option<f64> = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        Ok(value.ok_or_else(|| format!("the gateway's metrics say nothing of {name}"))?)
    }

    pub fn forget_peak(&self) -> Result<(), Error> {
        process::forget_peak(self.child.id())
    }

    /// What has failed, with the end of what the server said.
    pub fn failed(&self, what: &dyn Display, error: &dyn Display) -> Error {
        let log = fs::read(&self.site.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let skipped = log.lines().count().saturating_sub(20);
        let said = log.lines().skip(skipped).collect::<Vec<_>>().join("\n");
        format!("{}, {what}: {error}\n{said}", self.kind.name()).into()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where programs are: servers are not in the path of every user.
fn path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// What is compared, and on what machine.
pub fn setting() -> Result<String, Error> {
    let version = |program: &str| -> Result<String, Error> {
        let said = Command::new(program).arg("-v").env("PATH", path()).output();
        let said = said.map_err(|error| format!("{program}: {error}; `make setup-peers` brings it"))?;
        let said = [said.stdout, said.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let number = said.split([' ', '/', '\n']).find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
        Ok(number.ok_or_else(|| format!("{program} -v says no version"))?.to_owned())
    };
    Ok(format!("NGINX {}, HAProxy {}, {}", version("nginx")?, version("haproxy")?, machine("two cores")))
}

/// The gateway, and the machine that it is measured on.
pub fn machine(cores: &str) -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!(
        "moh-gateway {}; Linux {} on {cores} of {}",
        env!("CARGO_PKG_VERSION"),
        kernel.trim(),
        model.map_or("an unknown machine", |(_, model)| model)
    )
}
