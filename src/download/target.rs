//! The URL of a download: whether it may be asked, whom, and how.
//!
//! There are many who read URLs, and two who do not read one alike are a way around a list: the one sees a host that is
//! on it, the other connects to another. So nothing here is repaired, decoded or left to a guess. What is not plainly
//! `https://host/path?query` is refused, and the host that is looked up on the list is, octet for octet, the one that is
//! resolved, named in TLS and in `Host`.

use super::{Refused, Settings};
use crate::egress::{self, Resolver, domain_name};
use crate::wire::ProviderName;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use std::net::SocketAddr;

/// What a URL begins with, in any case (RFC 3986 §3.1).
const SCHEME: &str = "https://";

/// The port of HTTPS.
const HTTPS: u16 = 443;

/// Octets of a URL. That of an asset has a name and perhaps a signature in it.
const LONGEST: usize = 4096;

/// A URL that may be asked: there is none that was not checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    host: String,
    port: u16,
    authority: String,
    path_and_query: PathAndQuery,
}

impl Target {
    /// Reads a URL, as it is in a request's path once that is percent-decoded.
    ///
    /// # Errors
    /// [`Refused::NotHttps`], [`Refused::NoUrl`]: it is none that is asked of anybody. [`Refused::HostNotListed`]: nor
    /// of this host.
    pub fn read(url: &str, settings: &Settings) -> Result<Self, Refused> {
        if url.len() > LONGEST {
            return Err(Refused::NoUrl("it is longer than 4096 octets"));
        }
        // Some readers drop tabs and line feeds, wherever they stand, and map other letters to those of ASCII.
        if !url.bytes().all(|octet| octet.is_ascii_graphic()) {
            return Err(Refused::NoUrl("it holds more than printable ASCII"));
        }
        let rest = match url.split_at_checked(SCHEME.len()) {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case(SCHEME) => rest,
            _ => return Err(Refused::NotHttps),
        };
        if rest.contains('#') {
            return Err(Refused::NoUrl("it has a fragment"));
        }
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, rest) = rest.split_at_checked(end).unwrap_or((rest, ""));
        if authority.contains('@') {
            return Err(Refused::NoUrl("it names a user"));
        }
        let (name, port) = match authority.split_once(':') {
            Some((name, digits)) => (name, port(digits).ok_or(Refused::NoUrl("its port is none"))?),
            None => (authority, HTTPS),
        };
        let host = domain_name(name.as_bytes()).ok_or(Refused::NoUrl("its host is no domain name"))?;
        let path_and_query = path_and_query(rest).ok_or(Refused::NoUrl("its path holds what no URL does"))?;
        if !settings.hosts.iter().any(|entry| lists(entry, &host, port)) {
            return Err(Refused::HostNotListed);
        }
        let authority = if port == HTTPS { host.clone() } else { format!("{host}:{port}") };
        Ok(Self { host, port, authority, path_and_query })
    }

    /// The host, in lower case: SNI, and what its certificate must be for.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port; 443 where the URL has none.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `Host`: the host, with its port where that is not 443.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// Path and query as they are in the URL; where it has no path, that is `/` (RFC 9110 §4.2.3).
    pub fn path_and_query(&self) -> &PathAndQuery {
        &self.path_and_query
    }

    /// Where the host is, with the port: at least one address, in the order in which they are to be tried. They were
    /// checked: to connect to anything else, to the name for instance, is to connect to what was not. To be called on a
    /// tokio runtime.
    ///
    /// # Errors
    /// [`Refused::PrivateAddress`]: one of its addresses is not public; the others are then not to be trusted either.
    /// [`Refused::Unresolved`]: it has none. [`Refused::TooSlow`]: nobody has said within [`Settings::connect`].
    pub async fn resolve(&self, resolver: &Resolver, settings: &Settings) -> Result<Vec<SocketAddr>, Refused> {
        match tokio::time::timeout(settings.connect, resolver.resolve_unmixed(&self.host, self.port)).await {
            Ok(Ok(addresses)) => Ok(addresses),
            Ok(Err(egress::Error::PrivateAddress)) => Err(Refused::PrivateAddress),
            Ok(Err(_)) => Err(Refused::Unresolved),
            Err(_) => Err(Refused::TooSlow),
        }
    }
}

/// A port in its one spelling: other spellings are read by some and not by others.
pub(crate) fn port(digits: &str) -> Option<u16> {
    let plain = digits.bytes().all(|octet| octet.is_ascii_digit()) && !digits.starts_with('0');
    digits.parse::<u16>().ok().filter(|_| plain)
}

/// Whether an entry of the list is of this host at this port.
fn lists(entry: &str, host: &str, at: u16) -> bool {
    let (pattern, of) = match entry.rsplit_once(':') {
        Some((pattern, digits)) => (pattern, port(digits)),
        None => (entry, Some(HTTPS)),
    };
    of == Some(at) && ProviderName::from_bytes(host.as_bytes()).is_ok_and(|host| host.matches(pattern))
}

/// What follows the authority of a URL, as it is asked for. None: it is not what RFC 3986 §3.3 and §3.4 have there.
fn path_and_query(text: &str) -> Option<PathAndQuery> {
    let mut octets = text.bytes();
    while let Some(octet) = octets.next() {
        let fits = match octet {
            b'%' => [octets.next(), octets.next()].iter().all(|digit| digit.is_some_and(|d| d.is_ascii_hexdigit())),
            b'/' | b'?' | b':' | b'@' => true,
            _ => octet.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(&octet),
        };
        if !fits {
            return None;
        }
    }
    let text = if text.starts_with('/') { text.to_owned() } else { format!("/{text}") };
    // No dot segment is taken out of it, and nothing else changed: a signature may be over it.
    PathAndQuery::try_from(text.as_str()).ok().filter(|read| read.as_str() == text)
}

/// The fields that a URL is asked with, besides `Host`: some of those that `came` with the request for it. Of the others
/// each may say who asks, if only by being there. A condition on a range is not among those that pass, and without it the
/// range might be one of another asset: then all of it is asked for.
pub fn fields(came: &HeaderMap) -> Vec<(HeaderName, HeaderValue)> {
    let only = |name: &HeaderName| {
        let mut values = came.get_all(name).iter();
        match (values.next(), values.next()) {
            (Some(value), None) => Some(value.clone()),
            _ => None,
        }
    };
    let mut fields = vec![
        (header::ACCEPT, HeaderValue::from_static("*/*")),
        // What is counted is then what the asker gets, and ranges are of the asset.
        (header::ACCEPT_ENCODING, HeaderValue::from_static("identity")),
    ];
    for name in [header::RANGE, header::IF_NONE_MATCH, header::IF_MODIFIED_SINCE] {
        if name == header::RANGE && came.contains_key(header::IF_RANGE) {
            continue;
        }
        if let Some(value) = only(&name) {
            fields.push((name, value));
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::super::settings;
    use super::*;

    fn read(url: &str) -> Result<Target, Refused> {
        Target::read(url, &settings(&["good.example"]))
    }

    fn is_no_url(url: &str) {
        assert!(matches!(read(url), Err(Refused::NoUrl(_))), "{url:?}: {:?}", read(url));
    }

    #[test]
    fn what_may_be_asked_is_asked_as_it_is() {
        for (url, path) in [
            ("https://good.example/", "/"),
            ("https://good.example", "/"),
            ("https://good.example?", "/?"),
            ("https://good.example?a=b", "/?a=b"),
            ("HTTPS://GOOD.Example/A/b", "/A/b"),
            ("https://good.example:443/a", "/a"),
            ("https://good.example/a/../b/./c/..", "/a/../b/./c/.."),
            ("https://good.example/%2e%2E/%00%2F", "/%2e%2E/%00%2F"),
            ("https://good.example//evil.example/", "//evil.example/"),
            ("https://good.example/@evil.example:80", "/@evil.example:80"),
            (
                "https://good.example/https://evil.example/?u=http://evil.example/",
                "/https://evil.example/?u=http://evil.example/",
            ),
            (
                "https://good.example/a-._~!$&'()*+,;=:@/?-._~!$&'()*+,;=:@/?",
                "/a-._~!$&'()*+,;=:@/?-._~!$&'()*+,;=:@/?",
            ),
        ] {
            let target = read(url).unwrap();
            assert_eq!(target.path_and_query().as_str(), path, "{url}");
            assert_eq!(
                (target.host(), target.port(), target.authority()),
                ("good.example", 443, "good.example"),
                "{url}"
            );
        }
        let longest = format!("https://good.example/{}", "a".repeat(4096 - 21));
        assert!(read(&longest).is_ok());
        is_no_url(&format!("{longest}a"));
    }

    #[test]
    fn nothing_but_https() {
        for url in [
            "",
            "https",
            "https:",
            "https:/",
            "https:good.example/",
            "https:/good.example/",
            "https:\\\\good.example/",
            "https:/\\good.example/",
            "http://good.example/",
            "httpss://good.example/",
            "https+x://good.example/",
            "ftp://good.example/",
            "file:///etc/passwd",
            "//good.example/",
            "//good.example/https://good.example/",
            "/good.example/",
            "good.example/",
            "good.example:443/",
            "*",
        ] {
            assert_eq!(read(url), Err(Refused::NotHttps), "{url:?}");
        }
    }

    #[test]
    fn a_url_that_others_would_read_in_another_way_is_none() {
        for url in [
            "https://",
            "https:///",
            "https:///good.example/",
            "https:////good.example/",
            "https://?good.example",
            // Users.
            "https://good.example@evil.example/",
            "https://good.example:443@evil.example/",
            "https://evil.example@good.example/",
            "https://user:word@good.example/",
            "https://@good.example/",
            "https://good.example%40evil.example/",
            // What is a slash to some.
            "https://evil.example\\@good.example/",
            "https://good.example\\@evil.example/",
            "https://good.example\\.evil.example/",
            "https://\\good.example/",
            "https://good.example/\\..",
            // What is dropped or mapped by some.
            " https://good.example/",
            "\thttps://good.example/",
            "ht\ntps://good.example/",
            "https://good.example/ ",
            "https://good.example\t/",
            "https://good\t.example/",
            "https://good.example\r\nX: y/",
            "https://good.example/a\r\nHost: evil.example",
            "https://good.example/\0",
            "https://good.example/\u{7f}",
            "https://good.example/\u{e9}",
            "https://g\u{f6}od.example/",
            "https://good\u{3002}example/",
            "https://\u{ff47}ood.example/",
            "https://good.exampl\u{212f}/",
            "https://good\u{ad}.example/",
            // Names that are none.
            "https://good.example./",
            "https://.good.example/",
            "https://good..example/",
            "https://-good.example/",
            "https://good_.example/",
            "https://*.example/",
            "https://good%2eexample/",
            "https://%67ood.example/",
            "https://good.example%00.evil.example/",
            "https://good.example;evil.example/",
            "https://good.example,evil.example/",
            // Fragments.
            "https://good.example/#",
            "https://good.example/#a",
            "https://good.example#@evil.example/",
            "https://evil.example#@good.example/",
            "https://evil.example#.good.example/",
            // Paths that are none.
            "https://good.example/%",
            "https://good.example/%2",
            "https://good.example/%zz",
            "https://good.example/?%f",
            "https://good.example/a|b",
            "https://good.example/<a>",
            "https://good.example/\"a\"",
            "https://good.example/{a}",
            "https://good.example/[a]",
            "https://good.example/^",
            "https://good.example/`",
            "https://good.example?a|b",
        ] {
            is_no_url(url);
        }
    }

    #[test]
    fn addresses_are_no_hosts() {
        for host in [
            "127.0.0.1",
            "1.1.1.1",
            "169.254.169.254",
            "127.1",
            "0",
            "2130706433",
            "017700000001",
            "0177.0.0.1",
            "0x7f.0.0.1",
            "0x7f.1",
            "0x7f000001",
            "0X7F000001",
            "127.0.0.0x1",
            "good.example.1",
            "good.example.0x",
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[fe80::1%25lo]",
            "[v1.good.example]",
            "[good.example]",
            "::1",
        ] {
            is_no_url(&format!("https://{host}/"));
            is_no_url(&format!("https://{host}:443/"));
            // Not even where somebody has put it on the list.
            let listed = Target::read(&format!("https://{host}/"), &settings(&[host]));
            assert!(matches!(listed, Err(Refused::NoUrl(_))), "{host}");
        }
    }

    #[test]
    fn ports() {
        for port in
            ["", "0", "00", "0443", "+443", "-443", "4 43", "443x", "0x1bb", "65536", "65979", "443:443", ":443"]
        {
            is_no_url(&format!("https://good.example:{port}/"));
        }
        is_no_url("https://:443/");
        for port in ["1", "80", "442", "444", "4430", "8443", "65535"] {
            assert_eq!(read(&format!("https://good.example:{port}/")), Err(Refused::HostNotListed), "{port}");
        }
    }

    #[test]
    fn only_what_is_on_the_list() {
        for host in [
            "evil.example",
            "good.example.evil.example",
            "good.example-evil.example",
            "evilgood.example",
            "a.good.example",
            "example",
            "good",
            "good.exampl",
            "localhost",
            "xn--gd-fkaa.example",
            "evil.example?@good.example",
            "evil.example/@good.example",
            "evil.example/https://good.example",
            "evil.example?https://good.example",
        ] {
            assert_eq!(read(&format!("https://{host}/")), Err(Refused::HostNotListed), "{host}");
        }
        assert_eq!(Target::read("https://good.example/", &settings(&[])), Err(Refused::HostNotListed));
        // An A-label is a name like others.
        let settings = settings(&["xn--gd-fkaa.example"]);
        assert_eq!(Target::read("https://XN--GD-fkaa.example/", &settings).unwrap().host(), "xn--gd-fkaa.example");
    }

    #[test]
    fn entries_with_wildcards_and_ports() {
        let settings =
            settings(&["*.cdn.example", "files.example:8443", "*.p.example:444", "q.example:443", "x.example:"]);
        let read = |url: &str| Target::read(url, &settings).map(|target| target.authority().to_owned());
        for (url, authority) in [
            ("https://a.cdn.example/", "a.cdn.example"),
            ("https://A-1.CDN.example:443/", "a-1.cdn.example"),
            ("https://files.example:8443/", "files.example:8443"),
            ("https://a.p.example:444/", "a.p.example:444"),
            ("https://q.example/", "q.example"),
            ("https://q.example:443/", "q.example"),
        ] {
            assert_eq!(read(url).as_deref(), Ok(authority), "{url}");
        }
        for url in [
            "https://cdn.example/",
            "https://a.b.cdn.example/",
            "https://acdn.example/",
            "https://a.cdn.example.evil.example/",
            "https://a.cdn.example:8443/",
            "https://files.example/",
            "https://files.example:443/",
            "https://files.example:8444/",
            "https://a.files.example:8443/",
            "https://p.example:444/",
            "https://a.p.example/",
            "https://q.example:444/",
            "https://x.example/",
        ] {
            assert_eq!(read(url), Err(Refused::HostNotListed), "{url}");
        }
    }

    #[tokio::test]
    async fn the_host_must_be_at_public_addresses() {
        let settings = settings(&["localhost", "localhost:8443"]);
        let target = Target::read("https://localhost:8443/", &settings).unwrap();
        assert_eq!(target.resolve(&Resolver::new(false), &settings).await, Err(Refused::PrivateAddress));
        // With the port of the URL, whoever is asked.
        let all = target.resolve(&Resolver::new(true), &settings).await.unwrap();
        assert!(!all.is_empty() && all.iter().all(|address| address.ip().is_loopback() && address.port() == 8443));
        let target = Target::read("https://localhost/", &settings).unwrap();
        assert_eq!(target.resolve(&Resolver::new(false), &settings).await, Err(Refused::PrivateAddress));
    }

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for &(name, value) in fields {
            map.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        map
    }

    #[test]
    fn nobody_learns_who_asks() {
        let said = |came: &[(&'static str, &'static str)]| {
            let fields = fields(&map(came)).into_iter();
            fields.map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect::<Vec<_>>()
        };
        let always = ["accept: */*", "accept-encoding: identity"];
        assert_eq!(said(&[]), always);
        assert_eq!(
            said(&[
                ("accept", "image/x-rare"),
                ("accept-encoding", "br"),
                ("accept-language", "de"),
                ("authorization", "PrivateToken token=\"x\""),
                ("content-length", "5"),
                ("cookie", "a=b"),
                ("expect", "100-continue"),
                ("forwarded", "for=192.0.2.1"),
                ("from", "mimi://a.example"),
                ("host", "ds.b.example"),
                ("if-match", "\"x\""),
                ("if-unmodified-since", "Sun, 06 Nov 1994 08:49:37 GMT"),
                ("origin", "https://a.example"),
                ("referer", "https://a.example/"),
                ("te", "trailers"),
                ("traceparent", "00-0-0-00"),
                ("transfer-encoding", "chunked"),
                ("user-agent", "a"),
                ("via", "1.1 a.example"),
                ("x-forwarded-for", "192.0.2.1"),
                ("x-request-id", "1"),
            ]),
            always
        );
        assert_eq!(
            said(&[
                ("if-modified-since", "Sun, 06 Nov 1994 08:49:37 GMT"),
                ("if-none-match", "\"a\", \"b\""),
                ("range", "bytes=0-99"),
            ])[2..],
            ["range: bytes=0-99", "if-none-match: \"a\", \"b\"", "if-modified-since: Sun, 06 Nov 1994 08:49:37 GMT"]
        );
        assert_eq!(said(&[("range", "bytes=0-99"), ("if-range", "\"a\"")]), always);
        assert_eq!(said(&[("range", "bytes=0-99"), ("range", "bytes=100-199")]), always);
    }
}
