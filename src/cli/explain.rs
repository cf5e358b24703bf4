//! `explain`: what the gateway makes of a request, without a socket: the same routing, reading and checks of recipient
//! and sender. Limits and tokens are not asked.

use crate::admission::{PeerIdentity, Peers, bind_sender};
use crate::config::Provider;
use crate::dialect::{self, Endpoint, Envelope, Member};
use crate::problem::Refusal;
use crate::wire::ProviderName;
use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::{BufRead, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub(super) struct Explain {
    /// Read a request from each line of standard input (or FILE), as JSON with dialect, method, path, host, from and body
    /// (hex), and print a line of JSON for each
    #[arg(long)]
    jsonl: bool,
    /// The provider that the gateway stands for; may be repeated
    #[arg(long, value_name = "NAME", default_value = "b.example")]
    local: Vec<String>,
    /// The provider that the client certificate names; "" for none
    #[arg(long, value_name = "NAME", default_value = "a.example")]
    peer: String,
    /// The dialect
    #[arg(long, default_value = "moh", value_parser = ["moh"])]
    dialect: String,
    /// The method
    #[arg(long, default_value = "POST")]
    method: String,
    /// The path, such as /group_operation
    #[arg(long, required_unless_present = "jsonl")]
    path: Option<String>,
    /// The Host, where it matters
    #[arg(long)]
    host: Option<String>,
    /// The body is hex, not octets
    #[arg(long)]
    hex: bool,
    /// The body, or the requests; standard input if not given
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

/// A request, as the vectors have it.
#[derive(Debug, Deserialize)]
struct Request {
    #[serde(default = "moh")]
    dialect: String,
    method: String,
    path: String,
    #[serde(default)]
    host: Option<String>,
    #[serde(default)]
    body: String,
}

fn moh() -> String {
    "moh".into()
}

/// What is made of a request.
enum Outcome<'a> {
    Accept(Envelope<'a>),
    Answered,
    Refused(Refusal, Option<Envelope<'a>>),
}

impl Explain {
    pub(super) fn run(&self) -> ExitCode {
        match self.explain() {
            Ok(()) => ExitCode::SUCCESS,
            Err(message) => {
                eprintln!("moh-gateway explain: {message}");
                ExitCode::FAILURE
            }
        }
    }

    fn explain(&self) -> Result<(), String> {
        for name in self.local.iter().chain(Some(&self.peer).filter(|peer| !peer.is_empty())) {
            ProviderName::from_bytes(name.as_bytes()).map_err(|e| format!("{name:?}: {e}"))?;
        }
        let input: Box<dyn Read> = match &self.file {
            Some(path) => Box::new(std::fs::File::open(path).map_err(|e| format!("{}: {e}", path.display()))?),
            None => Box::new(std::io::stdin()),
        };
        if self.jsonl { self.lines(std::io::BufReader::new(input)) } else { self.one(input) }
    }

    fn lines(&self, input: impl BufRead) -> Result<(), String> {
        let mut out = std::io::stdout().lock();
        for (n, line) in input.lines().enumerate() {
            let at = |e: &dyn std::fmt::Display| format!("line {}: {e}", n + 1);
            let line = line.map_err(|e| at(&e))?;
            if line.trim().is_empty() {
                continue;
            }
            let request: Request = serde_json::from_str(&line).map_err(|e| at(&e))?;
            if request.dialect != "moh" {
                return Err(at(&format!("dialect {:?} is not supported", request.dialect)));
            }
            let body = hex::decode(&request.body).map_err(|e| at(&e))?;
            let outcome = self.outcome(&request.method, &request.path, request.host.as_deref(), &body);
            writeln!(out, "{}", as_json(&outcome)).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    fn one(&self, mut input: impl Read) -> Result<(), String> {
        let mut body = vec![];
        input.read_to_end(&mut body).map_err(|e| e.to_string())?;
        if self.hex {
            body = hex::decode(body.trim_ascii()).map_err(|e| e.to_string())?;
        }
        let path = self.path.as_deref().unwrap_or_default();
        let outcome = self.outcome(&self.method, path, self.host.as_deref(), &body);
        let (mut rows, envelope) = match &outcome {
            Outcome::Accept(envelope) => (vec![("outcome", "accept".to_owned())], Some(envelope)),
            Outcome::Answered => (vec![("outcome", "answered by the gateway".to_owned())], None),
            Outcome::Refused(refusal, envelope) => {
                let mut rows = vec![("outcome", format!("{} {}", refusal.status().as_u16(), refusal.reason()))];
                if let Refusal::Malformed(error) = refusal {
                    let (field, offset) = error.place();
                    rows.extend([("field", field.to_owned()), ("offset", offset.to_string())]);
                    rows.push(("because", error.reason().to_owned()));
                }
                (rows, envelope.as_ref())
            }
        };
        if let Some(e) = envelope {
            let optional = |octets: Option<&[u8]>| octets.map_or("-".to_owned(), hex::encode);
            rows.extend([
                ("endpoint", e.operation.endpoint.to_owned()),
                ("operation", e.operation.name.to_owned()),
                ("sender", e.sender.to_string()),
                ("recipient", e.recipient.to_string()),
                ("group", optional(e.group_id)),
                ("member", e.member.map_or("-".to_owned(), |m| format!("{} {}", m.kind(), plain(&member_value(m))))),
                ("target", optional(e.target)),
                ("cost", e.cost.to_string()),
                ("decided at", format!("octet {} of {}", e.decided_at, body.len())),
            ]);
        }
        let mut out = std::io::stdout().lock();
        rows.iter().try_for_each(|(name, value)| writeln!(out, "{name:>10}  {value}")).map_err(|e| e.to_string())
    }

    /// The steps up to the limits, in the gateway's order.
    fn outcome<'a>(&self, method: &str, path: &str, host: Option<&str>, body: &'a [u8]) -> Outcome<'a> {
        let provider = Provider {
            names: self.local.iter().map(|name| name.to_ascii_lowercase()).collect(),
            ds_domain: self.local.first().map(|name| name.to_ascii_lowercase()).unwrap_or_default(),
        };
        let refused = |refusal| Outcome::Refused(refusal, None);
        let Ok(method) = http::Method::from_bytes(method.as_bytes()) else {
            return refused(Refusal::BadHttp("no method"));
        };
        let endpoint: &Endpoint = match dialect::route(&method, path) {
            Ok(endpoint) => endpoint,
            Err(no) => return refused(no.into()),
        };
        if host.is_some_and(|host| !provider.is_authority(host)) {
            return refused(Refusal::Misdirected("Host"));
        }
        if endpoint.reader.is_none() {
            return Outcome::Answered;
        }
        let envelope = match endpoint.read(body) {
            Ok(envelope) => envelope,
            Err(error) => return refused(Refusal::Malformed(error)),
        };
        if !provider.is_recipient(&envelope.recipient) {
            return Outcome::Refused(Refusal::Misdirected("recipient"), Some(envelope));
        }
        let identity = (!self.peer.is_empty())
            .then(|| PeerIdentity { dns_names: vec![self.peer.to_ascii_lowercase()], ..PeerIdentity::default() });
        match bind_sender(&envelope.sender, identity.as_ref(), &Peers::default()) {
            Ok(_) => Outcome::Accept(envelope),
            Err(refusal) => Outcome::Refused(refusal, Some(envelope)),
        }
    }
}

/// The fields of `expect`.
fn as_json(outcome: &Outcome<'_>) -> Value {
    match outcome {
        Outcome::Accept(e) => json!({
            "outcome": "accept",
            "operation": e.operation.name,
            "sender": e.sender.to_string(),
            "recipient": e.recipient.to_string(),
            "group_id": e.group_id.map(hex::encode),
            "member": e.member.map(|m| json!({ "type": m.kind(), "value": member_value(m) })),
            "target": e.target.map(|t| json!({ "type": "opaque", "value": hex::encode(t) })),
            "cost": e.cost,
            "decided_at": e.decided_at,
        }),
        Outcome::Answered => json!({ "outcome": "accept" }),
        Outcome::Refused(refusal, envelope) => {
            let outcome = match refusal {
                Refusal::Misdirected(_) => "misdirected",
                Refusal::SenderMismatch | Refusal::PeerNotAllowed => "sender-mismatch",
                // The vectors know no other: what is no request of an endpoint is malformed.
                _ => "malformed",
            };
            match envelope {
                Some(e) => json!({
                    "outcome": outcome,
                    "sender": e.sender.to_string(),
                    "recipient": e.recipient.to_string(),
                }),
                None => json!({ "outcome": outcome }),
            }
        }
    }
}

fn member_value(member: Member<'_>) -> Value {
    match member {
        Member::LeafIndex(leaf) => json!(leaf),
        Member::KeyPackageRef(octets) | Member::UserKeyHash(octets) => json!(hex::encode(octets)),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
