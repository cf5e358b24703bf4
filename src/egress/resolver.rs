//! Names to addresses, of which only those are used that are public: checked after the name was resolved, and what was
//! checked is what is connected to. A name that is checked first and resolved again for the connection would be
//! another's to change in between.

use super::discovery::Error;
use super::is_public;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Names that are being resolved at once. The system's resolver cannot be called off: a name whose servers are slow
/// keeps its thread for longer than anybody waits.
const AT_ONCE: usize = 128;

/// Addresses of a name that are used.
const MOST: usize = 16;

/// The port of HTTPS.
const PORT: u16 = 443;

/// Resolves names by the system's resolver, to addresses that may be connected to.
#[derive(Debug, Clone)]
pub struct Resolver {
    places: Arc<Semaphore>,
    allow_private: bool,
}

impl Resolver {
    /// A resolver; with `allow_private` it leaves no address out. Its clones share how much is done at once.
    pub fn new(allow_private: bool) -> Self {
        Self { places: Arc::new(Semaphore::new(AT_ONCE)), allow_private }
    }

    /// The public addresses of a name, with port 443: at least one. To be called on a tokio runtime, and not waited for
    /// without a bound: the system's resolver has its own.
    ///
    /// # Errors
    /// [`Error::Unreachable`]: it has no address, or nobody knows. [`Error::PrivateAddress`]: it has no other.
    pub async fn resolve(&self, name: &str) -> Result<Vec<SocketAddr>, Error> {
        let mut usable = self.addresses(name, PORT).await?;
        usable.retain(|address| self.may_be(address));
        usable.truncate(MOST);
        if usable.is_empty() {
            tracing::debug!(host = name, "it has no public address");
            return Err(Error::PrivateAddress);
        }
        Ok(usable)
    }

    /// The addresses of a name, with a port: at least one, all of them public. Who mixes others among them says that the
    /// name is not to be asked: it may have no public one a moment later. As [`Self::resolve`] otherwise.
    ///
    /// # Errors
    /// [`Error::Unreachable`]: it has no address, or nobody knows. [`Error::PrivateAddress`]: it has one that is not
    /// public.
    pub async fn resolve_unmixed(&self, name: &str, port: u16) -> Result<Vec<SocketAddr>, Error> {
        let addresses = self.addresses(name, port).await?;
        self.unmixed(addresses).inspect_err(|_| tracing::debug!(host = name, "it has an address that is not public"))
    }

    fn unmixed(&self, mut addresses: Vec<SocketAddr>) -> Result<Vec<SocketAddr>, Error> {
        if !addresses.iter().all(|address| self.may_be(address)) {
            return Err(Error::PrivateAddress);
        }
        addresses.truncate(MOST);
        Ok(addresses)
    }

    /// Whether an address may be connected to.
    fn may_be(&self, address: &SocketAddr) -> bool {
        self.allow_private || is_public(address.ip())
    }

    /// What the system's resolver says: at least one address.
    async fn addresses(&self, name: &str, port: u16) -> Result<Vec<SocketAddr>, Error> {
        let place = self.places.clone().acquire_owned().await.map_err(|_| Error::Unreachable)?;
        let of = name.to_owned();
        let asked = tokio::task::spawn_blocking(move || {
            let addresses = (of.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
            // Not before: the thread is taken until here, whether anybody waits or not.
            drop(place);
            addresses
        });
        match asked.await {
            Ok(Ok(addresses)) if !addresses.is_empty() => Ok(addresses),
            Ok(Ok(_)) | Err(_) => Err(Error::Unreachable),
            Ok(Err(e)) => {
                tracing::debug!(host = name, "it is not resolved: {e}");
                Err(Error::Unreachable)
            }
        }
    }
}

/// A resolver as reqwest takes it, which knows one name from the operator. It is not asked for addresses that stand in
/// a URL as such: who builds the URL must have seen to that.
#[derive(Debug)]
pub(super) struct Guard {
    /// The name, in lower case, and where it is.
    pub(super) fixed: Option<(String, SocketAddr)>,
    /// For all other names.
    pub(super) resolver: Resolver,
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        if let Some((of, address)) = &self.fixed
            && of.eq_ignore_ascii_case(name.as_str())
        {
            let addresses: Addrs = Box::new(std::iter::once(*address));
            return Box::pin(std::future::ready(Ok(addresses)));
        }
        let resolver = self.resolver.clone();
        Box::pin(async move {
            let addresses: Addrs = Box::new(resolver.resolve(name.as_str()).await?.into_iter());
            Ok::<Addrs, Box<dyn std::error::Error + Send + Sync>>(addresses)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn private_addresses_are_left_out() {
        assert_eq!(Resolver::new(false).resolve("localhost").await, Err(Error::PrivateAddress));
        let all = Resolver::new(true).resolve("localhost").await.unwrap();
        assert!(!all.is_empty() && all.iter().all(|address| address.ip().is_loopback() && address.port() == 443));
        // As reqwest asks.
        let name = |name: &str| name.parse::<Name>().unwrap();
        let guard = Guard {
            fixed: Some(("b.example".into(), SocketAddr::from(([127, 0, 0, 1], 8443)))),
            resolver: Resolver::new(false),
        };
        let fixed: Vec<_> = Resolve::resolve(&guard, name("B.example")).await.unwrap().collect();
        assert_eq!(fixed, [SocketAddr::from(([127, 0, 0, 1], 8443))]);
        let refused = Resolve::resolve(&guard, name("localhost")).await.err().unwrap();
        assert_eq!(refused.downcast_ref::<Error>(), Some(&Error::PrivateAddress));
    }

    #[tokio::test]
    async fn one_private_address_is_one_too_many() {
        let strict = Resolver::new(false);
        assert_eq!(strict.resolve_unmixed("localhost", 8443).await, Err(Error::PrivateAddress));
        let all = Resolver::new(true).resolve_unmixed("localhost", 8443).await.unwrap();
        assert!(!all.is_empty() && all.iter().all(|address| address.ip().is_loopback() && address.port() == 8443));

        let address = |ip: &str| SocketAddr::new(ip.parse().unwrap(), 8443);
        let public: Vec<_> = ["1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"].map(address).into();
        assert_eq!(strict.unmixed(public.clone()), Ok(public.clone()));
        for private in [
            "127.0.0.1",
            "10.0.0.1",
            "100.64.0.1",
            "169.254.169.254",
            "192.168.0.1",
            "0.0.0.0",
            "::1",
            "::",
            "fd00::1",
            "fe80::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b::a00:1",
            "64:ff9b:1::808:808",
            "2002:7f00:1::1",
        ] {
            for at in 0..=public.len() {
                let mut mixed = public.clone();
                mixed.insert(at, address(private));
                assert_eq!(strict.unmixed(mixed), Err(Error::PrivateAddress), "{private} at {at}");
            }
        }
        // Nor does it go unseen behind as many as are used.
        let mut many: Vec<_> = (1..=40).map(|last| address(&format!("1.1.1.{last}"))).collect();
        assert_eq!(strict.unmixed(many.clone()).map(|used| used.len()), Ok(MOST));
        many.push(address("10.0.0.1"));
        assert_eq!(strict.unmixed(many), Err(Error::PrivateAddress));
    }
}
