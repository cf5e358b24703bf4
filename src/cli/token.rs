//! `token`: what a client of a provider does for a stranger's gateway. A request is refused with a challenge; an Issuer makes
//! a token that meets it; the line to send with the request again is printed.

use super::read;
use crate::issuer::{DIRECTORY_PATH, media_type};
use crate::privacypass::client::{self, Challenge, TokenRequest};
use crate::privacypass::directory::Document;
use crate::privacypass::https::{self, reason};
use crate::privacypass::{type_of, unix_now};
use crate::tls;
use clap::Args;
use http::{Method, header};
use reqwest::{Client, Response, Url};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// For a whole answer.
const PATIENCE: Duration = Duration::from_secs(30);

type Failed = String;

#[derive(Debug, Args)]
#[command(
    after_help = "Try it:\n  moh-gateway issuer --dir issuer &\n  moh-gateway token --ca federation-ca.pem --body request.bin \
                        https://ds.b.example/connection_request \\\n    --issuer https://issuer.example:8443 --issuer-ca \
                        issuer/ca.pem --resolve issuer.example:127.0.0.1:8443\n\nThe Authorization line goes to standard \
                        output, and so to curl: -H \"$(moh-gateway token ...)\"."
)]
pub(super) struct Token {
    /// What is asked for, such as https://ds.b.example/connection_request
    #[arg(value_name = "URL", value_parser = https)]
    url: Url,
    /// The method
    #[arg(long, default_value = "POST")]
    method: Method,
    /// The body
    #[arg(long, value_name = "FILE")]
    body: Option<PathBuf>,
    /// PEM roots that the gateway's certificate must chain to [default: the system's]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// A client certificate for the gateway, PEM
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// The type of the token: 1, 2 or 5 [default: that of the first challenge]
    #[arg(long = "type", value_name = "TYPE", value_parser = clap::builder::PossibleValuesParser::new(["1", "2", "5"]))]
    kind: Option<String>,
    /// Where the issuer is [default: https://, and the name that the challenge gives it]
    #[arg(long, value_name = "URL", value_parser = https)]
    issuer: Option<Url>,
    /// PEM roots that the issuer's certificate must chain to [default: the system's]
    #[arg(long, value_name = "FILE")]
    issuer_ca: Option<PathBuf>,
    /// Reach a host at this address, whatever DNS says; may be repeated
    #[arg(long, value_name = "HOST:IP:PORT", value_parser = resolve)]
    resolve: Vec<(String, SocketAddr)>,
}

fn https(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|e| e.to_string())?;
    if url.scheme() == "https" && url.has_host() { Ok(url) } else { Err("it is no https URL".into()) }
}

fn resolve(text: &str) -> Result<(String, SocketAddr), String> {
    let parts = text.split_once(':').and_then(|(host, address)| Some((host.to_owned(), address.parse().ok()?)));
    parts.ok_or_else(|| "it is like issuer.example:127.0.0.1:8443".into())
}

impl Token {
    pub(super) fn run(&self) -> ExitCode {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        match runtime.map_err(|e| e.to_string()).and_then(|runtime| runtime.block_on(self.get())) {
            Ok(token) => {
                println!("Authorization: {}", client::authorization(&token));
                ExitCode::SUCCESS
            }
            Err(e) => {
                eprintln!("moh-gateway: {e}");
                ExitCode::FAILURE
            }
        }
    }

    async fn get(&self) -> Result<Vec<u8>, Failed> {
        let challenge = self.challenge().await?;
        let age = challenge.max_age().map_or_else(String::new, |age| format!(", good for {age} s"));
        // What a stranger has written is shown as it is, and not to be acted upon by a terminal.
        eprintln!(
            "challenged by {:?} for a token of type {} by {:?}{age}",
            challenge.origins().join(", "),
            challenge.kind() as u16,
            challenge.issuer_name()
        );
        let host = self.url.host_str().unwrap_or_default();
        if !challenge.is_for(host) {
            return Err(format!(
                "{}: the challenge is for {:?}, not for {host}",
                self.url,
                challenge.origins().join(", ")
            ));
        }
        let base = match &self.issuer {
            Some(url) => url.clone(),
            None => https(&format!("https://{}", challenge.issuer_name()))
                .map_err(|e| format!("issuer {:?}: {e}", challenge.issuer_name()))?,
        };
        let issuer = self.client(self.issuer_ca.as_deref(), None)?;
        let requests = self.directory(&issuer, &base, &challenge).await?;
        let request = TokenRequest::new(&challenge).map_err(|e| e.to_string())?;
        let asked = issuer
            .post(requests.clone())
            .header(header::CONTENT_TYPE, media_type::REQUEST)
            .header(header::ACCEPT, media_type::RESPONSE)
            .body(request.octets().to_vec());
        let answer = body(asked.send().await, &requests, media_type::RESPONSE).await?;
        let token = request.finish(&answer).map_err(|e| format!("{requests}: {e}"))?;
        eprintln!("issued at {requests}");
        Ok(token)
    }

    /// The first challenge for the request that can be met.
    async fn challenge(&self) -> Result<Challenge, Failed> {
        let identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => {
                Some(tls::Certificate::new(&read(cert)?, &read(key)?).map_err(|e| format!("{}: {e}", cert.display()))?)
            }
            _ => None,
        };
        let content = match &self.body {
            Some(path) => read(path)?,
            None => vec![],
        };
        let request = self.client(self.ca.as_deref(), identity)?.request(self.method.clone(), self.url.clone());
        let request = request.header(header::CONTENT_TYPE, "application/octet-stream");
        let answer = request.body(content).send().await;
        let answer = answer.map_err(|e| format!("{}: {}", self.url, reason(&e)))?;
        let challenges = client::challenges(answer.headers());
        let wanted = self.kind.as_deref().and_then(|number| type_of(number.parse().ok()?));
        let mut of_kind = challenges.iter().filter(|challenge| wanted.is_none_or(|kind| kind == challenge.kind()));
        of_kind.next().cloned().ok_or_else(|| match &*challenges {
            [] => format!("{}: {} without a challenge", self.url, answer.status()),
            others => {
                let types: Vec<_> = others.iter().map(|challenge| (challenge.kind() as u16).to_string()).collect();
                format!("{}: challenges are for tokens of type {}", self.url, types.join(", "))
            }
        })
    }

    /// Where the issuer takes token requests. The challenge's key must be one that it publishes: or it could tell those
    /// who were given a key of their own.
    async fn directory(&self, client: &Client, base: &Url, challenge: &Challenge) -> Result<Url, Failed> {
        let url = base.join(DIRECTORY_PATH).map_err(|e| format!("{base}: {e}"))?;
        let asked = client.get(url.clone()).header(header::ACCEPT, media_type::DIRECTORY);
        let octets = body(asked.send().await, &url, media_type::DIRECTORY).await?;
        let directory: Document = serde_json::from_slice(&octets).map_err(|e| format!("{url}: {e}"))?;
        let now = unix_now().as_secs();
        let mut published = directory.keys(challenge.kind());
        if !published.any(|(key, from)| key.as_deref() == Some(challenge.token_key()) && from <= now) {
            return Err(format!("{url}: the challenge's token-key is not among those that the issuer publishes"));
        }
        let requests =
            url.join(&directory.issuer_request_uri).map_err(|e| format!("{url}: issuer-request-uri: {e}"))?;
        if requests.scheme() != "https" {
            return Err(format!("{url}: issuer-request-uri is no https URL"));
        }
        Ok(requests)
    }

    fn client(&self, ca: Option<&Path>, identity: Option<tls::Certificate>) -> Result<Client, Failed> {
        let roots = match ca {
            Some(path) => tls::roots(&read(path)?).map_err(|e| format!("{}: {e}", path.display()))?,
            None => tls::system_roots().map_err(|e| format!("the system's roots: {e}"))?,
        };
        let tls = tls::client_config(roots, identity).map_err(|e| e.to_string())?;
        let builder = https::client(tls, PATIENCE);
        let builder = self.resolve.iter().fold(builder, |builder, (host, address)| builder.resolve(host, *address));
        builder.build().map_err(|e| reason(&e))
    }
}

/// The body of an answer of this media type, bounded.
async fn body(answer: reqwest::Result<Response>, url: &Url, media_type: &str) -> Result<Vec<u8>, Failed> {
    let mut answer = answer.map_err(|e| format!("{url}: {}", reason(&e)))?;
    let octets = https::body(&mut answer).await.map_err(|e| format!("{url}: {e}"))?;
    if !answer.status().is_success() {
        return Err(format!("{url}: {}: {:?}", answer.status(), String::from_utf8_lossy(&octets).trim()));
    }
    https::expect_type(answer.headers(), media_type).map_err(|e| format!("{url}: {e}"))?;
    Ok(octets)
}
