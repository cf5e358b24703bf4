//! Downloads for other providers: from whom, and how much.

use super::{Provider, Resolver, file};
use crate::download::{self, Settings};
use crate::egress;
use crate::tls::Roots;
use crate::wire::ProviderName;
use toml::Spanned;

/// As long as a download may take: a drain waits for it.
const LONGEST: std::time::Duration = std::time::Duration::from_secs(3600);

const HOSTS: &str = "proxy_download.hosts";

impl Resolver<'_> {
    /// What an operator says of downloads.
    pub(super) fn proxy_download(
        &mut self,
        table: &file::ProxyDownload,
        provider: Option<&Provider>,
    ) -> Option<Settings> {
        if table.hosts.get_ref().is_empty() {
            self.hint(&table.hosts, HOSTS, "none, so every download is refused, as it is without this table");
        }
        let hosts = table.hosts.get_ref().iter().filter_map(|host| self.download_host(host, provider)).collect();
        let largest = table.max_size.get_ref().0;
        if largest == 0 {
            self.wrong(&table.max_size, "proxy_download.max_size", "of nothing there is nothing to download");
        }
        if table.timeout.0 > LONGEST {
            let error =
                self.error(table.hosts.span().start, "proxy_download.timeout".into(), "an hour is the most".into());
            self.errors.push(error);
        }
        let trusted = self.trusted(&table.ca, None, |_| "proxy_download.ca".to_owned())?;
        if let Roots::Files(files) = &trusted.files.ca {
            self.watched.extend(files.iter().cloned());
        }
        Some(Settings {
            hosts,
            largest,
            within: table.timeout.0,
            connect: table.connect_timeout.0,
            idle: table.idle_timeout.0,
            allow_private: table.allow_private,
            // The system's too, as they are now.
            roots: trusted.trust.certificates().iter().map(|der| der.to_vec()).collect(),
        })
    }

    /// An entry of the list: a name, or one that begins with `*.`, perhaps with a port; in lower case.
    fn download_host(&mut self, host: &Spanned<String>, provider: Option<&Provider>) -> Option<String> {
        let text = host.get_ref();
        let (name, port) = match text.rsplit_once(':') {
            Some((name, digits)) => (name, Some(digits)),
            None => (text.as_str(), None),
        };
        if port.is_some_and(|digits| download::port(digits).is_none()) {
            let message =
                format!("{text:?} is no host like \"assets.a.example\", \"*.a.example\" or \"a.example:8443\"");
            self.wrong(host, HOSTS, message);
            return None;
        }
        let name = self.name(&Spanned::new(host.span(), name.to_owned()), HOSTS, true)?;
        let bare = name.strip_prefix("*.").unwrap_or(&name);
        if egress::domain_name(bare.as_bytes()).is_none() {
            self.wrong(host, HOSTS, format!("{text:?} is an address: only names are asked"));
            return None;
        }
        let covers = |ours: &String| ProviderName::from_bytes(ours.as_bytes()).is_ok_and(|ours| ours.matches(&name));
        if provider.is_some_and(|ours| covers(&ours.ds_domain)) {
            let message =
                format!("{text:?} is this gateway: a download could ask it for another, and that for another");
            self.wrong(host, HOSTS, message);
            return None;
        }
        if provider.is_some_and(|ours| ours.names.iter().any(covers)) {
            self.hint(
                host,
                HOSTS,
                format!("{text:?} is a name of this provider: is it not this gateway that answers there?"),
            );
        }
        if name != bare && !bare.contains('.') {
            self.hint(host, HOSTS, format!("{text:?} lets anybody in who has a name below {bare:?}"));
        }
        Some(match port {
            Some(port) => format!("{name}:{port}"),
            None => name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::time::Duration;

    #[derive(Deserialize)]
    struct Only {
        proxy_download: file::ProxyDownload,
    }

    /// What these lines of the table come to, what is wrong with them, and what is said of them else.
    fn resolved(lines: &str) -> (Option<Settings>, Vec<String>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let root = rcgen::generate_simple_self_signed(vec!["ca.example".to_owned()]).unwrap();
        std::fs::write(dir.path().join("ca.pem"), root.cert.pem()).unwrap();
        let text = format!("[proxy_download]\nca = \"ca.pem\"\n{lines}\n");
        let only: Only = toml::from_str(&text).unwrap();
        let path = dir.path().join("gateway.toml");
        let provider = Provider { names: vec!["b.example".to_owned()], ds_domain: "ds.b.example".to_owned() };
        let mut resolver = Resolver::new(&path, &text);
        let settings = resolver.proxy_download(&only.proxy_download, Some(&provider));
        let said = |errors: &[crate::config::Error]| {
            let one = |e: &crate::config::Error| format!("{}: {}: {}", e.line, e.key, e.message);
            errors.iter().map(one).collect::<Vec<_>>()
        };
        assert_eq!(resolver.watched, [dir.path().join("ca.pem")]);
        (settings, said(&resolver.errors), said(&resolver.hints))
    }

    #[test]
    fn a_table_and_its_defaults() {
        let (settings, errors, hints) =
            resolved("hosts = [\"Assets.A.example\", \"*.CDN.example\", \"c.example:8443\"]");
        let settings = settings.unwrap();
        assert_eq!((errors, hints), (vec![], vec![]));
        assert_eq!(settings.hosts, ["assets.a.example", "*.cdn.example", "c.example:8443"]);
        assert_eq!((settings.largest, settings.within), (100 << 20, Duration::from_secs(60)));
        assert_eq!((settings.connect, settings.idle), (Duration::from_secs(5), Duration::from_secs(10)));
        assert_eq!(settings.roots.len(), 1);

        let (settings, errors, _) = resolved(
            "hosts = [\"a.example\"]\nmax_size = \"1MiB\"\ntimeout = \"5m\"\nconnect_timeout = \"1s\"\nidle_timeout = \"2s\"",
        );
        let settings = settings.unwrap();
        assert_eq!(errors.len(), 0);
        assert_eq!((settings.largest, settings.within), (1 << 20, Duration::from_secs(300)));
        assert_eq!((settings.connect, settings.idle), (Duration::from_secs(1), Duration::from_secs(2)));
    }

    #[test]
    fn what_is_no_host_is_said_with_its_place() {
        for host in [
            "",
            "*",
            "*.",
            "a.*.example",
            "*.*.example",
            "https://a.example",
            "a.example/",
            "a.example.",
            "a_b.example",
            "a.example:",
            "a.example:0",
            "a.example:0443",
            "a.example:65536",
            "a.example:https",
            "user@a.example",
            "127.0.0.1",
            "127.0.0.1:8443",
            "2130706433",
            "0x7f.1",
            "*.0.0.1",
            "[::1]",
            "[::1]:443",
            "::1",
            "ds.b.example",
            "DS.B.example:8443",
            "*.b.example",
        ] {
            let (_, errors, _) = resolved(&format!("hosts = [\n\"a.example\",\n\"{host}\",\n]"));
            assert!(errors.len() == 1 && errors[0].starts_with("5: proxy_download.hosts: "), "{host}: {errors:?}");
        }
    }

    #[test]
    fn what_else_is_wrong() {
        let (_, errors, _) = resolved("hosts = [\"a.example\"]\nmax_size = 0");
        assert_eq!(errors, ["4: proxy_download.max_size: of nothing there is nothing to download"]);
        let (settings, errors, hints) = resolved("hosts = []");
        assert_eq!((settings.unwrap().hosts.len(), errors.len()), (0, 0));
        assert!(hints.len() == 1 && hints[0].starts_with("3: proxy_download.hosts: none"), "{hints:?}");
        let (settings, errors, hints) = resolved("hosts = [\"*.example\"]");
        assert_eq!((settings.unwrap().hosts, errors.len()), (vec!["*.example".to_owned()], 0));
        assert!(hints.len() == 2 && hints.iter().all(|hint| hint.contains("*.example")), "{hints:?}");
        let (_, errors, _) = resolved("hosts = [\"a.example\"]\ntimeout = \"2h\"");
        assert!(errors.len() == 1 && errors[0].ends_with("proxy_download.timeout: an hour is the most"), "{errors:?}");
    }
}
