//! A `moh-gateway` that a program of ours starts, as an operator would: found beside that program, with a configuration in a
//! folder of its own, ready when it says so.

use super::client::{Client, Error};
use http::Method;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};

/// How long a gateway may take until it is ready.
const READY_WITHIN: Duration = Duration::from_secs(10);

/// The loopback address of this process: no other takes a port of it.
pub fn own_ip() -> Ipv4Addr {
    static OWN: OnceLock<Ipv4Addr> = OnceLock::new();
    *OWN.get_or_init(|| {
        let pid = std::process::id();
        Ipv4Addr::new(127, 10 + (pid >> 14) as u8 % 100, (pid >> 7) as u8 & 0x7f, 1 + (pid as u8 & 0x7f))
    })
}

/// An address of this process that nobody listens at.
pub fn free_address() -> SocketAddr {
    untold(own_ip()).unwrap()
}

/// Addresses on the loopback that nobody listens at.
pub fn free_addresses<const N: usize>() -> Result<[SocketAddr; N], Error> {
    let mut addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); N];
    for address in &mut addresses {
        *address = untold(Ipv4Addr::LOCALHOST)?;
    }
    Ok(addresses)
}

/// One that nobody was told before: the system gives a port out again once it is free, and whoever was told of it may not have
/// come to listen.
fn untold(ip: Ipv4Addr) -> std::io::Result<SocketAddr> {
    static TOLD: Mutex<BTreeSet<SocketAddr>> = Mutex::new(BTreeSet::new());
    loop {
        let address = TcpListener::bind((ip, 0))?.local_addr()?;
        if TOLD.lock().unwrap().insert(address) {
            return Ok(address);
        }
    }
}

/// The gateway that is given, or `target/<profile>/moh-gateway`, where this program is `target/<profile>/examples/...`.
pub fn find(given: Option<&Path>) -> Result<PathBuf, Error> {
    let program = match given {
        Some(path) => path.to_owned(),
        None => {
            let this = std::env::current_exe()?;
            this.parent().and_then(Path::parent).ok_or("this program has no place")?.join("moh-gateway")
        }
    };
    if !program.is_file() {
        let place = program.display();
        return Err(format!("no gateway at {place}: `cargo build` makes it, or name one with --gateway").into());
    }
    Ok(program)
}

/// Starts a gateway with `gateway.toml` of a folder; what it says goes to `gateway.log` there. Dropped, it is killed.
pub fn start(program: &Path, dir: &Path, configuration: &str) -> Result<Child, Error> {
    let file = dir.join("gateway.toml");
    std::fs::write(&file, configuration)?;
    let log = std::fs::File::create(dir.join("gateway.log"))?;
    let started = Command::new(program)
        .args(["run", "--config"])
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true)
        .spawn();
    Ok(started.map_err(|error| format!("{}: {error}", program.display()))?)
}

/// Waits until a gateway that was started in `dir` says that it is ready.
pub async fn ready(gateway: &mut Child, admin: SocketAddr, dir: &Path) -> Result<(), Error> {
    let admin = Client::plain(admin).http1().timeout(Duration::from_secs(1));
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        if let Ok(response) = admin.send(Method::GET, "/readyz", "").await
            && response.status == 200
        {
            return Ok(());
        }
        if let Some(status) = gateway.try_wait()? {
            return Err(format!("the gateway ended ({status}):\n{}", log(dir)).into());
        }
        if Instant::now() > deadline {
            return Err(format!("the gateway is not ready after {READY_WITHIN:?}:\n{}", log(dir)).into());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The end of what a gateway said that was started in `dir`.
pub fn log(dir: &Path) -> String {
    let log = std::fs::read(dir.join("gateway.log")).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let skipped = log.lines().count().saturating_sub(40);
    log.lines().skip(skipped).collect::<Vec<_>>().join("\n")
}
