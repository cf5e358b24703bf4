//! `explain`: what the gateway makes of a request, without a socket: the same routing, reading and checks of recipient
//! and sender. Limits and tokens are not asked.

use crate::admission::{PeerIdentity, Peers, identify};
use crate::config::{Provider, host_of};
use crate::dialect::{By, DIALECTS, Endpoint, Envelope, Found, Head, Member, Named, Routes};
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
    /// The dialect: moh or mimi, by its draft's paths
    #[arg(long, default_value = "moh", value_parser = DIALECTS.iter().map(|dialect| dialect.name).collect::<Vec<_>>())]
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
    /// The From, where it matters: mimi@a.example
    #[arg(long)]
    from: Option<String>,
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
    from: Option<String>,
    #[serde(default)]
    body: String,
}

fn moh() -> String {
    "moh".into()
}

/// A request's head, as far as it matters.
#[derive(Clone, Copy)]
struct Said<'a> {
    method: &'a str,
    host: Option<&'a str>,
    from: Option<&'a str>,
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
            let routes = routes(&request.dialect).map_err(|e| at(&e))?;
            let body = hex::decode(&request.body).map_err(|e| at(&e))?;
            let said = Said { method: &request.method, host: request.host.as_deref(), from: request.from.as_deref() };
            let found = find(&routes, &said, &request.path);
            let outcome = self.outcome(&found, &said, &body);
            writeln!(out, "{}", as_json(&outcome, &found)).map_err(|e| e.to_string())?;
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
        let routes = routes(&self.dialect)?;
        let said = Said { method: &self.method, host: self.host.as_deref(), from: self.from.as_deref() };
        let found = find(&routes, &said, path);
        let outcome = self.outcome(&found, &said, &body);
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
                ("room", e.room.map_or("-".to_owned(), |room| room.to_string())),
                ("group", optional(e.group_id)),
                ("member", e.member.map_or("-".to_owned(), |m| format!("{} {}", m.kind(), plain(&member_value(m))))),
                ("target", e.target.map_or("-".to_owned(), |target| plain(&named_value(target)))),
                ("cost", e.cost.to_string()),
                ("decided at", format!("octet {} of {}", e.decided_at, body.len())),
            ]);
        }
        let mut out = std::io::stdout().lock();
        rows.iter().try_for_each(|(name, value)| writeln!(out, "{name:>10}  {value}")).map_err(|e| e.to_string())
    }

    /// The steps up to the limits, in the gateway's order.
    fn outcome<'a>(&self, found: &'a Result<Found<'_, '_>, Refusal>, said: &Said<'a>, body: &'a [u8]) -> Outcome<'a> {
        let provider = Provider {
            names: self.local.iter().map(|name| name.to_ascii_lowercase()).collect(),
            ds_domain: self.local.first().map(|name| name.to_ascii_lowercase()).unwrap_or_default(),
        };
        let refused = |refusal| Outcome::Refused(refusal, None);
        let found = match found {
            Ok(found) => found,
            Err(refusal) => return refused(refusal.clone()),
        };
        let endpoint: &Endpoint = found.route.endpoint;
        if said.host.is_some_and(|host| !provider.is_authority(host)) {
            return refused(Refusal::Misdirected("Host"));
        }
        if let By::Gateway(_) = endpoint.by {
            return Outcome::Answered;
        }
        let head = Head {
            host: said.host.map_or("", host_of),
            from: said.from.map(str::as_bytes),
            parameter: &found.parameter,
        };
        let envelope = match endpoint.read(&head, body) {
            Ok(envelope) => envelope,
            Err(error) => return refused(Refusal::Malformed(error)),
        };
        let identity = (!self.peer.is_empty())
            .then(|| PeerIdentity { dns_names: vec![self.peer.to_ascii_lowercase()], ..PeerIdentity::default() });
        match identify(&envelope, found.route.dialect, identity.as_ref(), &provider, &Peers::default()) {
            Ok(_) => Outcome::Accept(envelope),
            Err(refusal) => Outcome::Refused(refusal, Some(envelope)),
        }
    }
}

/// What is served in a dialect, by its draft's paths.
fn routes(dialect: &str) -> Result<Routes, String> {
    let of_name = DIALECTS.iter().find(|one| one.name == dialect);
    of_name.map(|one| Routes::of(&[one])).ok_or_else(|| format!("dialect {dialect:?} is not supported"))
}

fn find<'r, 'p>(routes: &'r Routes, said: &Said<'_>, path: &'p str) -> Result<Found<'r, 'p>, Refusal> {
    let method = http::Method::from_bytes(said.method.as_bytes()).map_err(|_| Refusal::BadHttp("no method"))?;
    Ok(routes.find(&method, path)?)
}

/// The fields of `expect`.
fn as_json(outcome: &Outcome<'_>, found: &Result<Found<'_, '_>, Refusal>) -> Value {
    match outcome {
        Outcome::Accept(e) => {
            let mut said = json!({
                "outcome": "accept",
                "operation": e.operation.name,
                "sender": e.sender.to_string(),
                "recipient": e.recipient.to_string(),
                "group_id": e.group_id.map(hex::encode),
                "member": e.member.map(|m| json!({ "type": m.kind(), "value": member_value(m) })),
                "target": e.target.map(|t| json!({ "type": named_kind(t), "value": named_value(t) })),
                "cost": e.cost,
                "decided_at": e.decided_at,
            });
            // A dialect without rooms does not speak of them.
            if found.as_ref().is_ok_and(|found| found.route.dialect.rooms)
                && let Some(fields) = said.as_object_mut()
            {
                fields.insert("room".into(), json!(e.room.map(|room| room.to_string())));
            }
            said
        }
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
        Member::KeyPackageRef(octets) | Member::UserKeyHash(octets) | Member::SignatureKey(octets) => {
            json!(hex::encode(octets))
        }
        Member::Uri(uri) => json!(uri.to_string()),
    }
}

fn named_kind(named: Named<'_>) -> &'static str {
    match named {
        Named::Opaque(_) => "opaque",
        Named::Uri(_) => "uri",
    }
}

fn named_value(named: Named<'_>) -> Value {
    match named {
        Named::Opaque(octets) => json!(hex::encode(octets)),
        Named::Uri(uri) => json!(uri.to_string()),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
