//! Privacy Pass: from what the operator wrote to an Origin's [`Settings`], with the keys of its issuers.

use super::{Provider, Resolver, file};
use crate::privacypass::{BoundTo, Directory, Issuer, Key, Settings, SpentIn, WithoutStore, type_of};
use crate::tls;
use std::path::PathBuf;
use std::time::Duration;
use toml::Spanned;

/// A challenge has a kilooctet, and many clients read no more than eight of them.
const MOST_ISSUERS: usize = 8;

/// Tokens that this node remembers, where nothing else is said and at most: docs/privacy-pass.md says what that takes.
const SPENT_TOKENS: usize = 1_000_000;
const MOST_SPENT_TOKENS: usize = 100_000_000;

impl Resolver<'_> {
    /// What an operator says of the Origin. `redis`: there is a store that a fleet shares.
    pub(super) fn privacy_pass(
        &mut self,
        table: &file::PrivacyPass,
        provider: Option<&Provider>,
        redis: bool,
    ) -> Option<Settings> {
        let issuers = self.issuers(table);
        let origin = match &table.origin {
            Some(origin) => self.name(origin, "privacy_pass.origin", false)?,
            None => provider?.ds_domain.clone(),
        };
        let secret = match &table.secret_file {
            Some(path) => {
                let secret = self.read(path, "privacy_pass.secret_file")?;
                if secret.len() < 32 {
                    self.wrong(path, "privacy_pass.secret_file", "a secret has 32 octets or more");
                }
                Some(secret)
            }
            None => None,
        };
        if let Some(spent) =
            table.spent_tokens.as_ref().filter(|spent| !(1..=MOST_SPENT_TOKENS).contains(spent.get_ref()))
        {
            self.wrong(spent, "privacy_pass.spent_tokens", format!("1 to {MOST_SPENT_TOKENS}"));
        }
        if table.epoch.get_ref().0 < Duration::from_secs(1) {
            self.wrong(&table.epoch, "privacy_pass.epoch", "an epoch is a second or more");
        }
        let threads = match &table.threads {
            None => std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1)),
            Some(threads) => {
                if !(1..=256).contains(threads.get_ref()) {
                    self.wrong(threads, "privacy_pass.threads", "1 to 256");
                }
                *threads.get_ref()
            }
        };
        if !(Duration::from_millis(1)..=Duration::from_secs(5)).contains(&table.max_wait.get_ref().0) {
            self.wrong(&table.max_wait, "privacy_pass.max_wait", "1ms to 5s");
        }
        Some(Settings {
            origin,
            epoch: table.epoch.get_ref().0,
            bound_to: match table.context {
                file::Context::Origin => BoundTo::Origin,
                file::Context::Endpoint => BoundTo::Endpoint,
                file::Context::Limit => BoundTo::Limit,
            },
            spent: self.spent_in(table, redis)?,
            secret,
            issuers,
            spent_tokens: table.spent_tokens.as_ref().map_or(SPENT_TOKENS, |spent| *spent.get_ref()),
            threads,
            max_wait: table.max_wait.get_ref().0,
        })
    }

    /// Where spent tokens are kept.
    fn spent_in(&mut self, table: &file::PrivacyPass, redis: bool) -> Option<SpentIn> {
        let key = |part: &str| format!("privacy_pass.{part}");
        let spent = table.spent.as_ref().map_or(file::SpentIn::Memory, |spent| *spent.get_ref());
        let without = match table.on_store_failure.as_ref().map(|at| (*at.get_ref(), at)) {
            None | Some((file::OnStoreFailure::Closed, _)) => WithoutStore::Closed,
            Some((file::OnStoreFailure::Local, _)) => WithoutStore::Local,
            Some((file::OnStoreFailure::Open, at)) => {
                let message = "\"closed\" or \"local\": to take a token that may be spent is to have no tokens";
                self.wrong(at, key("on_store_failure"), message);
                WithoutStore::Closed
            }
        };
        if let Some(at) = table.on_store_failure.as_ref().filter(|_| spent != file::SpentIn::Redis) {
            self.wrong(at, key("on_store_failure"), "it is for spent = \"redis\"");
        }
        match (spent, &table.spent) {
            (file::SpentIn::Memory, _) | (_, None) => {
                if let Some(secret) = &table.secret_file {
                    let message = "with spent = \"memory\" its challenges would outlive what is known of spent tokens: a \
                                   restart, or another node, would take them again; spent = \"files\" or \"redis\"";
                    self.wrong(secret, key("secret_file"), message);
                }
                Some(SpentIn::Memory)
            }
            (file::SpentIn::Files, Some(at)) => {
                // Under another secret after the restart, no token of before it would be known.
                if table.secret_file.is_none() {
                    self.wrong(at, key("spent"), "\"files\" needs secret_file, or no token outlives the process");
                }
                match &table.state {
                    Some(state) => Some(SpentIn::Files(self.beside(state.get_ref()).join("spent"))),
                    None => {
                        self.wrong(at, key("spent"), "\"files\" needs state: the directory they are in");
                        None
                    }
                }
            }
            (file::SpentIn::Redis, Some(at)) => {
                if !redis {
                    self.wrong(at, key("spent"), "\"redis\" needs [limits.redis], which says where it is");
                }
                if table.secret_file.is_none() {
                    let message = "\"redis\" needs secret_file, the same on every gateway of the fleet";
                    self.wrong(at, key("spent"), message);
                }
                Some(SpentIn::Fleet(without))
            }
        }
    }

    fn issuers(&mut self, table: &file::PrivacyPass) -> Vec<Issuer> {
        let mut issuers: Vec<Issuer> = vec![];
        if table.issuer.get_ref().is_empty() {
            self.wrong(&table.issuer, "privacy_pass.issuer", "at least one is needed");
        }
        if table.issuer.get_ref().len() > MOST_ISSUERS {
            self.wrong(&table.issuer, "privacy_pass.issuer", format!("{MOST_ISSUERS} are the most"));
        }
        for (i, issuer) in table.issuer.get_ref().iter().enumerate() {
            let key = |part: &str| format!("privacy_pass.issuer[{i}].{part}");
            let Some(new) = self.issuer(issuer, table.state.as_ref(), &key) else { continue };
            if issuers.iter().any(|other| other.name() == new.name() && other.kind() == new.kind()) {
                self.wrong(&issuer.name, key("name"), "another issuer has this name, and tokens of this type");
            }
            let known = |id: &[u8; 32]| issuers.iter().any(|other| other.key_ids().contains(id));
            if let Some(file) = issuer.key_file.as_ref().filter(|_| new.key_ids().iter().any(known)) {
                self.wrong(file, key("key_file"), "another issuer has a key of these");
            }
            issuers.push(new);
        }
        issuers
    }

    fn issuer(
        &mut self,
        issuer: &file::Issuer,
        state: Option<&Spanned<PathBuf>>,
        key: &impl Fn(&str) -> String,
    ) -> Option<Issuer> {
        let name = self.name(&issuer.name, &key("name"), false);
        let Some(kind) = type_of(*issuer.token_type.get_ref()) else {
            let message = "1 (VOPRF P-384), 2 (Blind RSA) or 5 (VOPRF ristretto255)";
            self.wrong(&issuer.token_type, key("token_type"), message);
            return None;
        };
        if let Some(ca) = issuer.directory_ca.as_ref().filter(|_| issuer.directory.is_none()) {
            self.wrong(ca, key("directory_ca"), "it is for directory");
        }
        match (&issuer.key_file, &issuer.directory) {
            (Some(path), None) => {
                let octets = self.read(path, &key("key_file"))?;
                match Key::read_all(kind, &octets) {
                    Ok(keys) => Some(Issuer::of_keys(name?, kind, keys)),
                    Err(e) => {
                        self.wrong(path, key("key_file"), format!("{}: {e}", path.get_ref().display()));
                        None
                    }
                }
            }
            (None, Some(url)) => {
                if kind != privacypass::TokenType::Public {
                    let message = "a directory has public keys: tokens of this type are verified with the private one";
                    self.wrong(url, key("directory"), message);
                    return None;
                }
                let directory = self.directory(url, issuer.directory_ca.as_ref(), state, name.as_deref()?, key)?;
                Some(Issuer::of_directory(name?, kind, directory))
            }
            _ => {
                self.wrong(&issuer.name, key("key_file"), "an issuer has a key_file or a directory");
                None
            }
        }
    }

    fn directory(
        &mut self,
        at: &Spanned<String>,
        ca: Option<&Spanned<PathBuf>>,
        state: Option<&Spanned<PathBuf>>,
        name: &str,
        key: &impl Fn(&str) -> String,
    ) -> Option<Directory> {
        let url = reqwest::Url::parse(at.get_ref()).ok();
        let Some(url) = url.filter(|url| url.scheme() == "https" && url.has_host()) else {
            self.wrong(at, key("directory"), format!("{:?} is no https URL", at.get_ref()));
            return None;
        };
        let ca = match ca {
            Some(path) => Some((self.read(path, &key("directory_ca"))?, path)),
            None => None,
        };
        let tls = match &ca {
            Some((pem, path)) => tls::roots(pem).map_err(|e| (path.span(), "directory_ca", e)),
            None => tls::system_roots().map_err(|e| (at.span(), "directory", e)),
        };
        match tls.and_then(|roots| tls::client_config(roots, None).map_err(|e| (at.span(), "directory", e))) {
            Ok(tls) => {
                let file = state.map(|state| self.beside(state.get_ref()).join(format!("directory-{name}.json")));
                Some(Directory { url, tls, ca: ca.map(|(pem, _)| pem), file })
            }
            Err((span, part, e)) => {
                self.wrong(&Spanned::new(span, ()), key(part), e.to_string());
                None
            }
        }
    }
}
