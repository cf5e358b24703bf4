//! `proxyDownload`: how what a request's URL names is got. What may be asked, and what passes of the answer, is
//! `crate::download`'s to say; here it is done to peers, requests and answers.
//!
//! A request for a download has no body that goes anywhere: who comes with one must have been refused. Nor do trailers pass.

use crate::config::Timeouts;
use crate::download::{self, Counter, Refused, Settings, Target};
use crate::egress::Resolver;
use crate::forward::{Head, Peer, Protocol, Times, Tls};
use crate::upstream;
use http::{HeaderMap, Method, response};
use parking_lot::Mutex;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a configuration says of downloads, with what is made of it once.
pub(super) struct Downloads {
    pub(super) settings: Settings,
    /// Of their own: names that do not resolve keep nobody from other providers.
    pub(super) resolver: Resolver,
    /// How the hosts that were asked lately are spoken TLS to.
    tls: Mutex<Vec<(String, Arc<Tls>)>>,
}

/// Hosts whose TLS is kept, at most.
const MOST_HOSTS: usize = 256;

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
    pub(super) async fn new(target: Target, downloads: Arc<Downloads>) -> Result<Self, Refused> {
        let counter = Counter::new(&downloads.settings, Instant::now());
        let addresses = target.resolve(&downloads.resolver, &downloads.settings).await?;
        Ok(Self { downloads, target, addresses, tried: 0, counter })
    }

    /// The next address to try; none when there is no other.
    pub(super) fn peer(&mut self, timeouts: &Timeouts) -> Option<Peer> {
        let address = self.addresses.get(self.tried)?;
        self.tried += 1;
        self.counter.rewind();
        let mut peer = peer(&self.target, *address, &self.downloads, timeouts)?;
        // So that who waits in vain is answered when its time is over.
        let left = self.counter.until().saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        peer.times.read = peer.times.read.min(left);
        peer.times.connect = peer.times.connect.min(left);
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

    /// As [`head`].
    pub(super) fn head(&self, came: &HeaderMap) -> Head {
        head(came, &self.target)
    }

    /// As [`response`]; heads have no more time than bodies.
    pub(super) fn response(&mut self, came: &mut response::Parts) -> Result<(), Refused> {
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
    pub(super) fn pass(&mut self, octets: usize) -> Result<(), Refused> {
        self.counter.pass(octets, Instant::now())
    }
}

impl Downloads {
    /// As a configuration says; what is in use stays if it is that.
    pub(super) fn of(settings: Option<&Settings>, before: Option<&Arc<Self>>) -> Result<Option<Arc<Self>>, String> {
        let Some(settings) = settings else { return Ok(None) };
        match before.filter(|before| before.settings == *settings) {
            Some(same) => Ok(Some(same.clone())),
            None => Ok(Some(Arc::new(Self::new(settings.clone())?))),
        }
    }

    fn new(settings: Settings) -> Result<Self, String> {
        // Said now, and not when somebody asks for one.
        Tls::new(&settings.roots, None, "nobody.invalid", Protocol::Either)?;
        Ok(Self { resolver: Resolver::new(settings.allow_private), settings, tls: Mutex::default() })
    }

    /// How a host is spoken TLS to. None: it has no name that a certificate could have.
    fn tls(&self, host: &str) -> Option<Arc<Tls>> {
        let known = |tls: &[(String, Arc<Tls>)]| tls.iter().find(|(name, _)| name == host).map(|(_, tls)| tls.clone());
        if let Some(known) = known(&self.tls.lock()) {
            return Some(known);
        }
        let made = Tls::new(&self.settings.roots, None, host, Protocol::Either).ok()?;
        let mut tls = self.tls.lock();
        if tls.len() >= MOST_HOSTS {
            tls.clear();
        }
        tls.push((host.to_owned(), made.clone()));
        Some(made)
    }
}

/// The host of a URL at one of the addresses that [`Target::resolve`] has given, as it is connected to: its certificate must be for
/// the URL's host, and none of ours is shown. None: its host is no name.
fn peer(target: &Target, address: SocketAddr, downloads: &Downloads, timeouts: &Timeouts) -> Option<Peer> {
    let settings = &downloads.settings;
    Some(Peer {
        at: upstream::Target::Inet(address),
        tls: Some(downloads.tls(target.host())?),
        protocol: Protocol::Either,
        // One that does not read what it asked for keeps nobody else's from coming, as it would on a connection that is shared.
        streams: 1,
        times: Times {
            connect: settings.connect,
            read: settings.idle,
            write: settings.idle,
            keepalive: timeouts.keepalive,
        },
    })
}

/// What a URL is asked with, in which nothing is left of who asks.
fn head(came: &HeaderMap, target: &Target) -> Head {
    Head {
        method: Method::GET,
        target: target.path_and_query().clone(),
        authority: target.authority().to_owned(),
        fields: download::fields(came),
    }
}

/// Leaves of an answer's head what passes. How the body is framed towards the client is said afterwards.
///
/// # Errors
/// As [`download::head`]: nothing of the answer may pass.
fn response(response: &mut response::Parts, settings: &Settings) -> Result<(), Refused> {
    response.headers = download::head(response.status, &response.headers, settings)?.headers;
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
        let peer = peer(&target("https://good.example:8443/a"), address, &downloads, &timeouts).unwrap();
        assert_eq!((peer.at, peer.protocol, peer.streams), (upstream::Target::Inet(address), Protocol::Either, 1));
        assert_eq!(peer.times, Times { connect: s(5), read: s(10), write: s(10), keepalive: s(7) });
        let tls = peer.tls.unwrap();
        assert!(Arc::ptr_eq(&tls, &downloads.tls("good.example").unwrap()), "it is made once");
        assert!(downloads.tls("other.example").unwrap() != tls);
        assert!(Downloads::new(Settings { roots: vec![vec![0; 8]], ..settings(&[]) }).is_err());
    }

    #[test]
    fn a_request_says_nothing_of_who_asks() {
        let mut came = HeaderMap::new();
        for (name, value) in [
            ("host", "ds.b.example"),
            ("from", "mimi://a.example"),
            ("cookie", "a=b"),
            ("authorization", "PrivateToken token=\"x\""),
            ("user-agent", "a"),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-for", "192.0.2.2"),
            ("traceparent", "00-0-0-00"),
            ("content-length", "0"),
            ("range", "bytes=0-9"),
        ] {
            came.append(name, value.parse().unwrap());
        }
        let asked = head(&came, &target("https://good.example//a/../b%2F?c=%20d"));
        assert_eq!((&asked.method, asked.target.as_str()), (&Method::GET, "//a/../b%2F?c=%20d"));
        assert_eq!(asked.authority, "good.example");
        assert_eq!(
            said(&asked.fields.into_iter().collect()),
            ["accept-encoding: identity", "accept: */*", "range: bytes=0-9"]
        );
        let asked = head(&came, &target("https://good.example:8443"));
        assert_eq!((asked.target.as_str(), asked.authority.as_str()), ("/", "good.example:8443"));
    }

    #[test]
    fn of_an_answer_little_is_left() {
        let settings = settings(&[]);
        let answered = |status: u16| {
            let mut came = http::Response::builder()
                .status(status)
                .header("Content-Type", "text/html")
                .header("Content-Length", "10")
                .header("Set-Cookie", "a=b")
                .header("Location", "https://evil.example/")
                .header("Link", "<https://evil.example/>; rel=preload")
                .body(())
                .unwrap()
                .into_parts()
                .0;
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
        assert_eq!(answered(302).0, Err(Refused::Redirected));
        assert!(matches!(answered(101).0, Err(Refused::BadAnswer(_))));
        let mut large = http::Response::builder().header("Content-Length", "1001").body(()).unwrap().into_parts().0;
        assert_eq!(response(&mut large, &settings), Err(Refused::TooLarge));
    }
}
