//! `issuer`: an Issuer for development. With nothing but a directory it makes what it needs: keys, and a certificate.

use super::read;
use crate::config::duration;
use crate::issuer::{self, Serve, media_type};
use crate::privacypass::{TYPES, unix_now};
use crate::tls;
use clap::Args;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use std::error::Error;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, Args)]
#[command(
    after_help = "It gives a token to whoever asks: for trying things out, never for production.\n\nIn DIR it keeps its private \
                  keys (keys.json), for each token type what a gateway's key_file is (type-1.keys, type-2.pem, \
                  type-5.keys), and a certificate if it is given none (ca.pem). SIGHUP rotates the keys at once."
)]
pub(super) struct Issuer {
    /// Where keys are kept; made if it is not there
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Its name: issuer_name of challenges, and the name of its certificate
    #[arg(long, default_value = "issuer.example")]
    name: String,
    /// Where it listens, for HTTPS; port 0: any that is free
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8443")]
    listen: SocketAddr,
    /// A new key for each type so often, announced half of the time before: "1d" [default: never]
    #[arg(long, value_name = "DURATION", value_parser = rotation)]
    rotate: Option<Duration>,
    /// A key that issues no more stays in the files that gateways read for so long: two of their epochs
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "2h")]
    keep: Duration,
    /// Its certificate chain, PEM [default: one by an authority of its own, in DIR/ca.pem]
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Its certificate's key, PEM
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
}

/// Below two seconds there would be no time to hear of a key before it is used.
fn rotation(text: &str) -> Result<Duration, String> {
    duration(text).and_then(|of| if of < Duration::from_secs(2) { Err("2s or more".into()) } else { Ok(of) })
}

impl Issuer {
    pub(super) fn run(&self) -> ExitCode {
        super::log_to_stderr();
        match self.serve() {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("moh-gateway: {e}");
                ExitCode::FAILURE
            }
        }
    }

    fn serve(&self) -> Result<(), Box<dyn Error>> {
        let issuer = issuer::Issuer::open(&self.dir, self.rotate, self.keep, unix_now().as_secs())?;
        let (chain, key) = match (&self.cert, &self.key) {
            (Some(chain), Some(key)) => (read(chain)?, read(key)?),
            _ => self.own_certificate()?,
        };
        let certificate = tls::Certificate::new(&chain, &key)?;
        let store = tls::CertificateStore::new(vec![certificate]).ok_or("there is no certificate")?;
        let tls = tls::server_config(Arc::new(store), None, None)?;
        let listener = TcpListener::bind(self.listen).map_err(|e| format!("{}: {e}", self.listen))?;
        let address = listener.local_addr()?;
        tracing::warn!("for development only: tokens for anyone who asks");
        // What a program that has started us waits for.
        println!("listening {address}");
        eprintln!("{}", self.configuration(&issuer, address));
        Ok(issuer::serve(Serve { issuer, tls, listener })?)
    }

    /// What a gateway is told of it.
    fn configuration(&self, issuer: &issuer::Issuer, address: SocketAddr) -> String {
        let tables = TYPES.map(|kind| {
            let file = std::path::absolute(issuer.key_file(kind)).unwrap_or_else(|_| issuer.key_file(kind));
            let number = kind as u16;
            format!(
                "[[privacy_pass.issuer]]\nname = \"{}\"\ntoken_type = {number}\nkey_file = \"{}\"\n",
                self.name,
                file.display()
            )
        });
        format!(
            "# {}, {} at https://{address}{}. A gateway takes its tokens with some of these:\n{}",
            self.name,
            media_type::DIRECTORY,
            issuer::DIRECTORY_PATH,
            tables.join("")
        )
    }

    /// A certificate of its own: that of its last run, if it is for this name.
    fn own_certificate(&self) -> Result<(Vec<u8>, Vec<u8>), Box<dyn Error>> {
        let path = |ending: &str| self.dir.join(format!("{}.{ending}", self.name));
        if path("pem").exists() && path("key").exists() {
            return Ok((read(&path("pem"))?, read(&path("key"))?));
        }
        let mut authority = CertificateParams::default();
        authority.distinguished_name.push(DnType::CommonName, format!("{} (development)", self.name));
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
        let mut server = CertificateParams::new(vec![self.name.clone()])?;
        server.distinguished_name.push(DnType::CommonName, self.name.as_str());
        server.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = server.signed_by(&key, &authority)?;
        let (chain, key) = (certificate.pem(), key.serialize_pem());
        for (file, text) in [(self.dir.join("ca.pem"), &authority.pem()), (path("pem"), &chain), (path("key"), &key)] {
            crate::files::replace(&file, text.as_bytes()).map_err(|e| format!("{}: {e}", file.display()))?;
        }
        Ok((chain.into(), key.into()))
    }
}
