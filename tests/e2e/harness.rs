//! Starts the gateway as an operator would: a configuration in a folder of its own, the binary, and its ports.

use crate::support::client::{Client, Response};
use crate::support::ds::Ds;
use crate::support::encode::{self, SenderId};
use crate::support::mls;
use crate::support::pki::{Ca, Identity};
use crate::support::program::free_address;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A certificate authority for all tests of a process.
pub fn ca() -> &'static Ca {
    static CA: OnceLock<Ca> = OnceLock::new();
    CA.get_or_init(|| Ca::new("federation"))
}

/// The certificate of a.example.
pub fn a_example() -> Identity {
    ca().issue(&["a.example"])
}

pub fn binary() -> &'static str {
    env!("CARGO_BIN_EXE_moh-gateway")
}

/// What differs from one test's configuration to another's.
pub struct Setup {
    pub nodes: Vec<(SocketAddr, &'static str)>,
    pub client_certificates: &'static str,
    pub timeouts: &'static str,
    pub delivery: &'static str,
    /// More of the first `[[listener]]`.
    pub listener: String,
    /// Of the table `[limits]`.
    pub limits: String,
    /// Appended as it is.
    pub more: String,
}

impl Setup {
    pub fn of(ds: &Ds) -> Setup {
        Setup::of_nodes(&[ds.addr])
    }

    pub fn of_nodes(nodes: &[SocketAddr]) -> Setup {
        Setup {
            nodes: nodes.iter().map(|addr| (*addr, "http1")).collect(),
            client_certificates: "optional",
            timeouts: "headers = \"1s\"\nbody_idle = \"1s\"\nbody_total = \"3s\"\nshutdown = \"5s\"",
            delivery: "connect_timeout = \"1s\"\nread_timeout = \"1s\"\neject_for = \"1s\"",
            listener: String::new(),
            limits: "memory = \"1MiB\"".into(),
            more: String::new(),
        }
    }

    pub fn h2c(mut self) -> Setup {
        self.nodes.iter_mut().for_each(|(_, protocol)| *protocol = "h2c");
        self
    }

    /// More lines of the first listener.
    pub fn listener(mut self, lines: &str) -> Setup {
        self.listener.push_str(lines);
        self.listener.push('\n');
        self
    }

    pub fn with(mut self, more: &str) -> Setup {
        self.more.push_str(more);
        self.more.push('\n');
        self
    }
}

/// A running gateway. It ends with the test.
pub struct Gateway {
    pub addr: SocketAddr,
    pub admin: SocketAddr,
    pub dir: tempfile::TempDir,
    setup: Setup,
    child: Child,
}

/// Runs the gateway; what it says is kept beside its configuration.
fn spawn(config: &Path) -> Child {
    let stderr = std::fs::File::create(config.with_file_name("stderr")).unwrap();
    let mut command = Command::new(binary());
    command.args(["run", "--config"]).arg(config).stdout(Stdio::null()).stderr(stderr).spawn().unwrap()
}

impl Gateway {
    pub async fn start(setup: Setup) -> Gateway {
        let dir = tempfile::tempdir().unwrap();
        Gateway::start_in(dir, setup).await
    }

    /// Starts in a folder that holds files which `setup.more` names.
    pub async fn start_in(dir: tempfile::TempDir, setup: Setup) -> Gateway {
        let (addr, admin) = (free_address(), free_address());
        let config = config(dir.path(), addr, admin, &setup);
        let child = spawn(&config);
        let mut gateway = Gateway { addr, admin, dir, setup, child };
        gateway.wait_until_healthy().await;
        gateway
    }

    /// Ends it by a signal and starts it again, with what its folder holds now.
    pub async fn restart(&mut self, signal: &str) {
        self.signal(signal);
        self.ended().await;
        self.child = spawn(&self.dir.path().join("gateway.toml"));
        self.wait_until_healthy().await;
    }

    /// Writes its configuration anew, changed, has it reload, and waits until that has come to `result`.
    pub async fn reload(&mut self, result: &str, change: impl FnOnce(&mut Setup)) {
        let series = format!("moh_gateway_config_reloads_total{{result=\"{result}\"}}");
        let before = self.metric(&series).await;
        change(&mut self.setup);
        config(self.dir.path(), self.addr, self.admin, &self.setup);
        self.signal("-HUP");
        self.until_metric(&series, |n| n > before).await;
    }

    /// Waits until a metric is as it should be, for five seconds at most.
    pub async fn until_metric(&self, series: &str, holds: impl Fn(f64) -> bool) -> Duration {
        let began = Instant::now();
        loop {
            let value = self.metric(series).await;
            if holds(value) {
                return began.elapsed();
            }
            assert!(began.elapsed() < Duration::from_secs(5), "{series} is {value}: {}", self.stderr());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Another process with the files of this one, and other addresses.
    pub fn restart_elsewhere(&self) -> Child {
        let own = self.dir.path().join("gateway.toml");
        let text = std::fs::read_to_string(&own).unwrap();
        let text = text.replace(&self.addr.to_string(), &free_address().to_string());
        let other = self.dir.path().join("second.toml");
        std::fs::write(&other, text.replace(&self.admin.to_string(), &free_address().to_string())).unwrap();
        let mut command = Command::new(binary());
        command.args(["run", "--config"]).arg(other).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    async fn wait_until_healthy(&mut self) {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            if let Ok(response) = self.operator("/healthz").await
                && response.status == 200
                && tokio::net::TcpStream::connect(self.addr).await.is_ok()
            {
                return;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < until, "{ended:?}: {}", self.stderr());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default()
    }

    /// The operators' listener.
    pub async fn operator(&self, path: &str) -> Result<Response, crate::support::client::Error> {
        Client::plain(self.admin).http1().send(http::Method::GET, path, "").await
    }

    /// The value of a metric; 0 where there is none yet.
    pub async fn metric(&self, series: &str) -> f64 {
        let text = self.operator("/metrics").await.unwrap().text();
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or(0.0)
    }

    /// A stranger: no certificate.
    pub fn stranger(&self) -> Client {
        Client::tls(self.addr, &ca().pem())
    }

    /// a.example.
    pub fn peer(&self) -> Client {
        self.stranger().identity(&a_example())
    }

    /// Lines of the access log, once there are `n`.
    pub async fn access_log(&self, n: usize) -> Vec<serde_json::Value> {
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            let text = std::fs::read_to_string(self.dir.path().join("access.log")).unwrap_or_default();
            let lines: Vec<_> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            if lines.len() >= n || Instant::now() > until {
                return lines;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory, in octets.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.pid().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for the end.
    pub async fn ended(&mut self) -> std::process::ExitStatus {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "it does not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the gateway's stderr:\n{}", self.stderr());
        }
    }
}

/// Writes certificates and a configuration.
pub fn config(dir: &Path, addr: SocketAddr, admin: SocketAddr, setup: &Setup) -> PathBuf {
    ca().write(dir, "ca");
    let nodes: String = setup
        .nodes
        .iter()
        .map(|(addr, protocol)| format!("[[delivery_service.node]]\naddress = \"{addr}\"\nprotocol = \"{protocol}\"\n"))
        .collect();
    let (chain, key) = ca().issue(&["b.example", "ds.b.example"]).write(dir, "server");
    let text = format!(
        r#"
[provider]
names = ["b.example", "also-b.example"]
ds_domain = "ds.b.example"
[[listener]]
address = "{addr}"
client_certificates = "{client_certificates}"
client_ca = "ca.pem"
{listener}
[[certificate]]
chain = "{chain}"
key = "{key}"
[admin]
address = "{admin}"
[access_log]
path = "access.log"
[limits]
{limits}
[runtime]
threads = 2
[timeouts]
{timeouts}
[delivery_service]
{delivery}
{nodes}
{more}
"#,
        client_certificates = setup.client_certificates,
        chain = chain.display(),
        key = key.display(),
        timeouts = setup.timeouts,
        delivery = setup.delivery,
        listener = setup.listener,
        limits = setup.limits,
        more = setup.more,
    );
    let path = dir.join("gateway.toml");
    std::fs::write(&path, text).unwrap();
    path
}

/// A limit of messages.
pub fn limit(name: &str, key: &str, rate: &str, burst: u32, more: &str) -> String {
    format!(
        "[[limit]]\nname = \"{name}\"\noperations = [\"send_message\"]\nkey = [\"{key}\"]\nrate = \"{rate}\"\nburst = \
         {burst}\n{more}\n"
    )
}

/// Real MLS objects, made once.
pub struct Material {
    pub group_id: Vec<u8>,
    pub leaf: u32,
    pub message: Vec<u8>,
    pub commit: Vec<u8>,
    pub welcome: Vec<u8>,
}

pub fn material() -> &'static Material {
    static MATERIAL: OnceLock<Material> = OnceLock::new();
    MATERIAL.get_or_init(|| {
        let group_id = b"a group of three".to_vec();
        let mut groups = mls::group_of("member", 3, &group_id, &mls::Options::default());
        let group = &mut groups[1];
        let message = group.send(b"hello");
        let leaf = group.own_leaf();
        let added = group.add(&[mls::Client::new("newcomer").key_package()]);
        Material { group_id, leaf, message, commit: added.commit, welcome: added.welcome }
    })
}

/// A `send_message` from a.example, of the real group.
pub fn send_message() -> Vec<u8> {
    let m = material();
    encode::ds_request(
        "a.example",
        "b.example",
        &SenderId::Leaf(m.leaf),
        encode::SEND_MESSAGE,
        &m.message,
        b"signature",
    )
}

/// The head of a private message of any group: as much as a gateway reads, and a tail.
pub fn private_message(group: &[u8]) -> Vec<u8> {
    let mut octets = vec![0, 1, 0, 2];
    octets.extend(encode::vector(group));
    octets.extend([0; 8]);
    octets.extend(encode::vector(b"the rest of it"));
    octets
}

/// A `send_message` of a member of any group.
pub fn message_in(group: &[u8], leaf: u32) -> Vec<u8> {
    encode::ds_request(
        "a.example",
        "b.example",
        &SenderId::Leaf(leaf),
        encode::SEND_MESSAGE,
        &private_message(group),
        b"signature",
    )
}

/// A body of `total` octets that is decided at once.
pub fn large_message(total: usize) -> Vec<u8> {
    let mut body = message_in(b"large", 1);
    body.resize(total, 7);
    body
}
