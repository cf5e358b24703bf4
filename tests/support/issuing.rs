//! Our own issuer and our own client of tokens, `moh-gateway issuer` and `moh-gateway token`, as programs of their own:
//! what a test or the demo has of them is what an operator has, their files and what they print.
//!
//! ```ignore
//! let issuer = Issuer::start(program, dir, &[]).await?;
//! let gateway = program::start(program, dir, &configuration(issuer.key_file(2)))?;
//! let from = (issuer.addr, &*issuer.roots());
//! let value = issuing::token(program, "/connection_request", (addr, &ca), from, &["--body", "request.bin"]).await?;
//! ```

use super::client::Error;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// An issuer's name if it is given none: `issuer_name` of challenges, and the name that its certificate is for.
pub const NAME: &str = "issuer.example";

/// How long a program may take until it listens, or until it ends: making keys is slow in a debug build.
const WITHIN: Duration = Duration::from_secs(60);

/// A running `moh-gateway issuer`. It ends when it is dropped; its keys stay in its folder.
#[derive(Debug)]
pub struct Issuer {
    pub addr: SocketAddr,
    pub dir: PathBuf,
    child: Child,
}

impl Issuer {
    /// Starts one with its keys in `dir`, on a free port of the loopback, and waits until it listens. `more` are
    /// arguments, which may take the place of ours: `--listen` and an address for one that comes back where it was.
    pub async fn start(program: &Path, dir: &Path, more: &[&str]) -> Result<Issuer, Error> {
        std::fs::create_dir_all(dir)?;
        let mut command = Command::new(program);
        command.arg("issuer").arg("--dir").arg(dir).args(more);
        for (option, value) in [("--name", NAME), ("--listen", "127.0.0.1:0")] {
            // An option that is there twice is an error.
            if !more.contains(&option) {
                command.args([option, value]);
            }
        }
        let (child, addr) = listening(&mut command, &dir.join("issuer.log")).await?;
        Ok(Issuer { addr, dir: dir.to_owned(), child })
    }

    /// What a gateway's `key_file` is for tokens of this type.
    pub fn key_file(&self, token_type: u16) -> PathBuf {
        key_file(&self.dir, token_type)
    }

    /// The roots that its certificate chains to, if it was given none by `--cert`.
    pub fn roots(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// Has it take its next keys at once. They are there a little later.
    pub fn hangup(&self) -> Result<(), Error> {
        let pid = self.child.id().ok_or("the issuer has ended")?;
        let status = std::process::Command::new("kill").args(["-HUP", &pid.to_string()]).status()?;
        if status.success() { Ok(()) } else { Err(format!("kill -HUP {pid}: {status}").into()) }
    }

    /// Ends it; once this returns, connections are refused and the port is free.
    pub async fn stop(&mut self) {
        // One that has ended by itself is what was wanted.
        let _ = self.child.kill().await;
    }
}

/// Where an issuer that keeps its files in `dir` has those that a gateway reads. The one of `tests/interop` names them
/// so too.
pub fn key_file(dir: &Path, token_type: u16) -> PathBuf {
    let ending = if token_type == 2 { "pem" } else { "keys" };
    dir.join(format!("type-{token_type}.{ending}"))
}

/// Asks ds.b.example for `path` by `moh-gateway token`, and returns the value of `Authorization` that lets the request
/// in: what follows `Authorization: ` on its standard output. Of gateway and issuer it is told where they are, and the
/// file of the roots that their certificates chain to. `more` are arguments: `--type`, `--body`, `--cert`.
pub async fn token(
    program: &Path,
    path: &str,
    (gateway, gateway_roots): (SocketAddr, &Path),
    (issuer, issuer_roots): (SocketAddr, &Path),
    more: &[&str],
) -> Result<String, Error> {
    let mut command = Command::new(program);
    command.arg("token").arg("--ca").arg(gateway_roots).arg("--issuer-ca").arg(issuer_roots);
    command.args(["--resolve", &format!("ds.b.example:{gateway}"), "--resolve", &format!("{NAME}:{issuer}")]);
    command.args(["--issuer", &format!("https://{NAME}:{}", issuer.port())]).args(more);
    let said = output(command.arg(format!("https://ds.b.example:{}{path}", gateway.port()))).await?;
    let value = said.strip_prefix("Authorization: ").and_then(|line| line.strip_suffix('\n'));
    let value = value.filter(|value| !value.contains('\n'));
    Ok(value.ok_or_else(|| format!("moh-gateway token said {said:?}"))?.to_owned())
}

/// Starts a program that says `listening ADDRESS` on its standard output, and waits until it does; nothing is read of
/// that output afterwards. What it says on standard error is added to the file `log`. Dropped, it is killed.
pub async fn listening(command: &mut Command, log: &Path) -> Result<(Child, SocketAddr), Error> {
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    let errors = File::options().create(true).append(true).open(log)?;
    let started = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors).kill_on_drop(true).spawn();
    let mut child = started.map_err(|error| format!("{name}: {error}"))?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("a program without standard output")?).lines();
    let address = async {
        while let Some(line) = lines.next_line().await? {
            if let Some(address) = line.strip_prefix("listening ") {
                return Ok::<SocketAddr, Error>(address.parse()?);
            }
        }
        Err("it ended".into())
    };
    let address = timeout(WITHIN, address).await.unwrap_or_else(|_| Err(format!("silent for {WITHIN:?}").into()));
    let said = || std::fs::read_to_string(log).unwrap_or_default();
    let address = address.map_err(|error| format!("{name} does not listen: {error}:\n{}", said()))?;
    Ok((child, address))
}

/// Runs a program to its end, and returns what it wrote to standard output. That it fails or takes too long is an
/// error; of one that fails, it tells what it wrote to standard error.
pub async fn output(command: &mut Command) -> Result<String, Error> {
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    let ended = timeout(WITHIN, command.stdin(Stdio::null()).kill_on_drop(true).output()).await;
    let ended = ended.map_err(|_| format!("{name} does not end within {WITHIN:?}"))?;
    let ended = ended.map_err(|error| format!("{name}: {error}"))?;
    if !ended.status.success() {
        return Err(format!("{name}: {}:\n{}", ended.status, String::from_utf8_lossy(&ended.stderr)).into());
    }
    Ok(String::from_utf8(ended.stdout)?)
}
