//! `proxyDownload`: how Pingora gets what a request's URL names. What may be asked, and what passes of the answer, is
//! `crate::download`'s to say; here it is done to Pingora's own forms of peers, requests and answers.
//!
//! A request for a download has no body that goes anywhere: who comes with one must have been refused. Trailers are not
//! seen here: `upstream_response_trailer_filter` has to clear them.

use super::forward;
use crate::config::Timeouts;
use crate::download::{self, Counter, Refused, Settings, Target};
use crate::egress::Resolver;
use http::{HeaderMap, Method, StatusCode, Uri, header};
use pingora_core::Result;
use pingora_core::protocols::tls::CaType;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_http::{RequestHeader, ResponseHeader};
use siphasher::sip::SipHasher24;
use std::hash::{Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a configuration says of downloads, with what is made of it once.
pub(super) struct Downloads {
    pub(super) settings: Settings,
    /// Of their own: names that do not resolve keep nobody from other providers.
    pub(super) resolver: Resolver,
    roots: Arc<CaType>,
    /// Stands for whom they trust: connections made with other roots, or for other things, are not used for them.
    digest: u64,
}

/// A download under way.
pub(super) struct Download {
    downloads: Arc<Downloads>,
    target: Target,
    addresses: Vec<SocketAddr>,
    tried: usize,
    counter: Counter,
}

impl Download {
    /// What a request names, whose server is found.
    ///
    /// # Errors
    /// As [`Target::resolve`].
    pub(super) async fn new(target: Target, downloads: Arc<Downloads>) -> std::result::Result<Self, Refused> {
        let counter = Counter::new(&downloads.settings, Instant::now());
        let addresses = target.resolve(&downloads.resolver, &downloads.settings).await?;
        Ok(Self { downloads, target, addresses, tried: 0, counter })
    }

    /// The next address to try; none when there is no other.
    pub(super) fn peer(&mut self, timeouts: &Timeouts) -> Option<HttpPeer> {
        let address = self.addresses.get(self.tried)?;
        self.tried += 1;
        self.counter.rewind();
        let mut peer = peer(&self.target, *address, &self.downloads, timeouts);
        // So that who waits in vain is answered when its time is over.
        let left = self.counter.until().saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        peer.options.read_timeout = Some(self.downloads.settings.idle.min(left));
        peer.options.connection_timeout = peer.options.connection_timeout.map(|timeout| timeout.min(left));
        Some(peer)
    }

    /// Whether there is another address.
    pub(super) fn has_another(&self) -> bool {
        self.tried < self.addresses.len()
    }

    /// When it must have ended.
    pub(super) fn until(&self) -> Instant {
        self.counter.until()
    }

    /// As [`request`].
    pub(super) fn request(&self, came: &mut RequestHeader) -> Result<()> {
        request(came, &self.target)
    }

    /// As [`response`]; heads have no more time than bodies.
    pub(super) fn response(&mut self, came: &mut ResponseHeader) -> std::result::Result<(), Refused> {
        self.pass(0)?;
        response(came, &self.downloads.settings)
    }

    /// The address that was tried last has left the request untouched, or has only closed a connection that was kept.
    pub(super) fn again(&mut self) {
        self.tried = self.tried.saturating_sub(1);
    }

    /// The host.
    pub(super) fn host(&self) -> &str {
        self.target.authority()
    }

    /// As [`Counter::pass`].
    pub(super) fn pass(&mut self, octets: usize) -> std::result::Result<(), Refused> {
        self.counter.pass(octets, Instant::now())
    }
}

impl Downloads {
    /// As a configuration says; what is in use stays if it is that.
    pub(super) fn of(settings: Option<&Settings>, before: Option<&Arc<Self>>) -> Result<Option<Arc<Self>>> {
        let Some(settings) = settings else { return Ok(None) };
        match before.filter(|before| before.settings == *settings) {
            Some(same) => Ok(Some(same.clone())),
            None => Ok(Some(Arc::new(Self::new(settings.clone())?))),
        }
    }

    fn new(settings: Settings) -> Result<Self> {
        let mut hasher = SipHasher24::new();
        ("proxy_download", &settings.roots).hash(&mut hasher);
        let (digest, roots) = (hasher.finish(), forward::roots(&settings.roots)?);
        Ok(Self { resolver: Resolver::new(settings.allow_private), settings, roots, digest })
    }
}

/// The host of a URL at one of the addresses that [`Target::resolve`] has given, as Pingora connects to it: its certificate
/// must be for the URL's host, and none of ours is shown.
pub(super) fn peer(target: &Target, address: SocketAddr, downloads: &Downloads, timeouts: &Timeouts) -> HttpPeer {
    // A target is never without a host; without one Pingora would verify nothing.
    let mut peer = HttpPeer::new(address, true, target.host().to_owned());
    peer.group_key = downloads.digest;
    let settings = &downloads.settings;
    let options = &mut peer.options;
    options.ca = Some(downloads.roots.clone());
    options.set_http_version(2, 1);
    // One that does not read what it asked for keeps nobody else's from coming, as it would on a connection that is shared.
    options.max_h2_streams = 1;
    let times = forward::Times {
        connect: settings.connect,
        read: settings.idle,
        write: settings.idle,
        keepalive: timeouts.keepalive,
    };
    forward::set_options(options, &times, timeouts, true);
    peer
}

/// Makes of a request for a download the one that its URL is asked with, in which nothing is left of who asks.
///
/// # Errors
/// Pingora does not take a field; all of them are such as it takes.
pub(super) fn request(request: &mut RequestHeader, target: &Target) -> Result<()> {
    let fields = download::fields(&request.headers);
    for name in request.headers.keys().cloned().collect::<Vec<_>>() {
        request.remove_header(&name);
    }
    request.set_method(Method::GET);
    request.set_uri(Uri::from(target.path_and_query().clone()));
    request.insert_header(header::HOST, target.authority())?;
    for (name, value) in fields {
        request.insert_header(name, value)?;
    }
    Ok(())
}

/// Leaves of an answer's head what passes. An answer that is on its way (1xx) passes without its fields. How the body is
/// framed towards the client is for Pingora to say afterwards.
///
/// # Errors
/// As [`download::head`]: nothing of the answer may pass.
pub(super) fn response(response: &mut ResponseHeader, settings: &Settings) -> std::result::Result<(), Refused> {
    let on_its_way = response.status.is_informational() && response.status != StatusCode::SWITCHING_PROTOCOLS;
    let headers = match on_its_way {
        true => HeaderMap::new(),
        false => download::head(response.status, &response.headers, settings)?.headers,
    };
    for name in response.headers.keys().cloned().collect::<Vec<_>>() {
        response.remove_header(&name);
    }
    let unfit = |_| Refused::BadAnswer("its head cannot be passed on");
    // Its own words for the status are a stranger's too.
    response.set_reason_phrase(None).map_err(unfit)?;
    for (name, value) in &headers {
        response.append_header(name.clone(), value.clone()).map_err(unfit)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::download::settings;

    fn target(url: &str) -> Target {
        Target::read(url, &settings(&["good.example", "good.example:8443"])).unwrap()
    }

    fn said(headers: &HeaderMap) -> Vec<String> {
        let fields = headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()));
        let mut fields: Vec<_> = fields.collect();
        fields.sort_unstable();
        fields
    }

    #[test]
    fn a_peer_is_the_address_that_was_checked_under_the_name_that_was_listed() {
        let s = Duration::from_secs;
        let timeouts = Timeouts {
            tls_handshake: s(1),
            headers: s(1),
            body_idle: s(1),
            body_total: s(1),
            keepalive: s(7),
            shutdown: s(1),
        };
        let downloads = Downloads::new(settings(&["good.example:8443"])).unwrap();
        let address = SocketAddr::from(([1, 1, 1, 1], 8443));
        let peer = peer(&target("https://good.example:8443/a"), address, &downloads, &timeouts);
        assert_eq!((peer._address.to_string(), peer.sni.as_str()), (address.to_string(), "good.example"));
        assert!(peer.is_tls() && peer.client_cert_key.is_none() && peer.proxy.is_none());
        assert!(peer.options.verify_cert && peer.options.verify_hostname && peer.options.alternative_cn.is_none());
        assert_eq!((peer.options.connection_timeout, peer.options.read_timeout), (Some(s(5)), Some(s(10))));
        assert_eq!((peer.options.write_timeout, peer.options.idle_timeout), (Some(s(10)), Some(s(7))));
        // Without roots of its own Pingora would take others; with none it trusts nobody.
        assert!(peer.options.ca.as_ref().is_some_and(|ca| ca.is_empty()));
        assert_ne!(peer.group_key, 0);
        assert!(Downloads::new(Settings { roots: vec![vec![0; 8]], ..settings(&[]) }).is_err());
    }

    #[test]
    fn a_request_says_nothing_of_who_asks() {
        let mut came = RequestHeader::build("GET", b"/proxyDownload/https%3A%2F%2Fgood.example%2F", None).unwrap();
        for (name, value) in [
            ("Host", "ds.b.example"),
            ("From", "mimi://a.example"),
            ("Cookie", "a=b"),
            ("Authorization", "PrivateToken token=\"x\""),
            ("User-Agent", "a"),
            ("X-Forwarded-For", "192.0.2.1"),
            ("X-Forwarded-For", "192.0.2.2"),
            ("Traceparent", "00-0-0-00"),
            ("Content-Length", "0"),
            ("Range", "bytes=0-9"),
        ] {
            came.append_header(name, value).unwrap();
        }
        request(&mut came, &target("https://good.example//a/../b%2F?c=%20d")).unwrap();
        assert_eq!((&came.method, came.raw_path()), (&Method::GET, &b"//a/../b%2F?c=%20d"[..]));
        assert!(came.uri.authority().is_none());
        assert_eq!(
            said(&came.headers),
            ["accept-encoding: identity", "accept: */*", "host: good.example", "range: bytes=0-9"]
        );
        let mut wire = vec![];
        came.header_to_h1_wire(&mut wire);
        let wire = String::from_utf8(wire).unwrap().to_ascii_lowercase();
        assert!(
            !wire.contains("192.0.2.") && !wire.contains("mimi") && wire.contains("host: good.example\r\n"),
            "{wire}"
        );

        // One of HTTP/2 has its authority in the URI.
        let mut came = RequestHeader::build("GET", b"/", None).unwrap();
        came.set_uri(Uri::from_static("https://ds.b.example/proxyDownload/x"));
        request(&mut came, &target("https://good.example:8443")).unwrap();
        assert_eq!((came.uri.to_string(), came.uri.authority()), ("/".to_owned(), None));
        assert_eq!(came.headers.get("host").unwrap(), "good.example:8443");
    }

    #[test]
    fn of_an_answer_little_is_left() {
        let settings = settings(&[]);
        let answered = |status: u16| {
            let mut came = ResponseHeader::build(status, None).unwrap();
            came.set_reason_phrase(Some("<script>")).unwrap();
            for (name, value) in [
                ("Content-Type", "text/html"),
                ("Content-Length", "10"),
                ("Set-Cookie", "a=b"),
                ("Location", "https://evil.example/"),
                ("Connection", "close"),
                ("Link", "<https://evil.example/>; rel=preload"),
            ] {
                came.append_header(name, value).unwrap();
            }
            let result = response(&mut came, &settings);
            (result, came)
        };
        let (result, passed) = answered(200);
        assert_eq!(result, Ok(()));
        assert_eq!(
            said(&passed.headers),
            [
                "content-disposition: attachment",
                "content-length: 10",
                "content-security-policy: default-src 'none'; sandbox",
                "content-type: text/html",
                "x-content-type-options: nosniff"
            ]
        );
        assert_eq!(passed.get_reason_phrase(), Some("OK"));
        let (result, passed) = answered(103);
        assert_eq!((result, passed.headers.len()), (Ok(()), 0));
        assert_eq!(answered(302).0, Err(Refused::Redirected));
        assert!(matches!(answered(101).0, Err(Refused::BadAnswer(_))));
        let mut large = ResponseHeader::build(200, None).unwrap();
        large.insert_header("Content-Length", "1001").unwrap();
        assert_eq!(response(&mut large, &settings), Err(Refused::TooLarge));
    }
}
