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
        let place = self.places.clone().acquire_owned().await.map_err(|_| Error::Unreachable)?;
        let of = name.to_owned();
        let asked = tokio::task::spawn_blocking(move || {
            let addresses = (of.as_str(), PORT).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
            // Not before: the thread is taken until here, whether anybody waits or not.
            drop(place);
            addresses
        });
        let addresses = match asked.await {
            Ok(Ok(addresses)) if !addresses.is_empty() => addresses,
            Ok(Ok(_)) => return Err(Error::Unreachable),
            Ok(Err(e)) => {
                tracing::debug!(host = name, "it is not resolved: {e}");
                return Err(Error::Unreachable);
            }
            Err(_) => return Err(Error::Unreachable),
        };
        let usable = |address: &SocketAddr| self.allow_private || is_public(address.ip());
        let usable: Vec<_> = addresses.into_iter().filter(usable).take(MOST).collect();
        if usable.is_empty() {
            tracing::debug!(host = name, "it has no public address");
            return Err(Error::PrivateAddress);
        }
        Ok(usable)
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
}
