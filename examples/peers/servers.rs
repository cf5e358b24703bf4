//! The servers that are compared, each a process of its own on the servers' core, and ended with what holds it.

use std::fmt::Display;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::Error;
use crate::backend::Backend;
use crate::load::Generator;
use crate::process::{self, Cpu};
use crate::requests::{GROUP_LENGTH, NAME, group_at};
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
        let [addr, admin] = program::free_addresses()?;
        let at = |name: &str| self.dir.path().join(name).display().to_string();
        let (certificate, key) = (at(&format!("{NAME}.pem")), at(&format!("{NAME}.key")));
        let node = match kind {
            Kind::OverUnix => format!("unix:{}", at(SOCKET)),
            _ => self.backend.addr.to_string(),
        };
        let file = at(&format!("{kind:?}.conf"));
        if let Some(configuration) = kind.configuration() {
            let values = [
                ("{listener}", addr.to_string()),
                ("{admin}", admin.to_string()),
                ("{node}", node.clone()),
                ("{protocol}", if kind == Kind::OverH2c { "h2c" } else { "http1" }.to_owned()),
                ("{certificate}", certificate.clone()),
                ("{key}", key.clone()),
                ("{pem}", at("both.pem")),
                ("{dir}", at("")),
                ("{group_at}", group_at().to_string()),
                ("{group_length}", GROUP_LENGTH.to_string()),
            ];
            let filled = values.iter().fold(configuration.to_owned(), |text, (name, value)| text.replace(name, value));
            fs::write(&file, filled)?;
        }
        let mut command = Command::new("taskset");
        command.args(["-c", &process::SERVERS.to_string()]);
        match kind {
            Kind::Nginx => command.args(["nginx", "-e", "stderr", "-c", &file]),
            Kind::HaProxy => command.args(["haproxy", "-db", "-f", &file]),
            Kind::Pingora => command
                .arg(std::env::current_exe()?)
                .args(["bare", "--listen", &addr.to_string(), "--node", &node])
                .args(["--certificate", &certificate, "--key", &key]),
            _ => command.arg(&self.gateway).args(["run", "--config", &file]),
        };
        let log = self.dir.path().join(format!("{kind:?}.log"));
        let output = File::create(&log)?;
        command.env("PATH", path()).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().map_err(|error| format!("taskset: {error}"))?;
        let mut server = Server { kind, addr, child, log };
        server.ready(generator).await?;
        Ok(server)
    }
}

/// A running server. Dropped, it is killed.
pub struct Server {
    pub kind: Kind,
    pub addr: SocketAddr,
    child: Child,
    log: PathBuf,
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

    pub fn forget_peak(&self) -> Result<(), Error> {
        process::forget_peak(self.child.id())
    }

    /// What has failed, with the end of what the server said.
    pub fn failed(&self, what: &dyn Display, error: &dyn Display) -> Error {
        let log = fs::read(&self.log).unwrap_or_default();
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
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(format!(
        "NGINX {}, HAProxy {}, moh-gateway {}; Linux {} on two cores of {}",
        version("nginx")?,
        version("haproxy")?,
        env!("CARGO_PKG_VERSION"),
        kernel.trim(),
        model.map_or("an unknown machine", |(_, model)| model)
    ))
}
