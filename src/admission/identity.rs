//! Who a sender is: the provider that its body names, bound to the client certificate where there is one.

use crate::config::Provider;
use crate::dialect::{Dialect, Envelope};
use crate::problem::Refusal;
use crate::wire::ProviderName;

/// A verified client certificate: its DNS names, in lower case, of which one may begin with `*.` (RFC 6125), and its key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerIdentity {
    /// The names.
    pub dns_names: Vec<String>,
    /// SHA-256 of its SubjectPublicKeyInfo.
    pub spki_sha256: [u8; 32],
}

/// Which providers may send.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peers {
    /// Names and `*.` patterns, in lower case. None: everyone. A list is for names that a certificate binds: who only
    /// says that it is one of them is not.
    pub allow: Option<Vec<String>>,
    /// Who may not, in the same way, whatever `allow` says; a claim is enough.
    pub deny: Vec<String>,
    /// Providers whose certificates must have a key that is known.
    pub pins: Vec<Pin>,
    /// Providers with a label of their own in metrics, in lower case.
    pub named: Vec<String>,
}

/// The keys of a provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    /// A name or `*.` pattern, in lower case.
    pub provider: String,
    /// SHA-256 of SubjectPublicKeyInfo, of each key it may come with.
    pub keys: Vec<[u8; 32]>,
}

impl PeerIdentity {
    /// Whether the certificate holds this name.
    pub fn holds(&self, name: &ProviderName<'_>) -> bool {
        self.dns_names.iter().any(|pattern| name.matches(pattern))
    }

    /// The pattern that holds a name which the certificate does not hold by itself: all names of it are one bearer's, who must
    /// not have a quota for each that it thinks of.
    pub fn pattern_of(&self, name: &ProviderName<'_>) -> Option<&str> {
        let by_itself = self.dns_names.iter().any(|held| name.is(held));
        let mut held = self.dns_names.iter().filter(|_| !by_itself);
        held.find(|pattern| name.matches(pattern)).map(String::as_str)
    }
}

impl Peers {
    /// Whether a provider may send, with the identity that is bound to the channel and holds its name.
    ///
    /// # Errors
    /// [`Refusal::PeerNotAllowed`] and [`Refusal::WrongKey`].
    pub fn admit(&self, name: &ProviderName<'_>, identity: Option<&PeerIdentity>) -> Result<(), Refusal> {
        let listed = |patterns: &[String]| patterns.iter().any(|pattern| name.matches(pattern));
        if listed(&self.deny) {
            return Err(Refusal::PeerNotAllowed);
        }
        if self.allow.as_ref().is_some_and(|patterns| identity.is_none() || !listed(patterns)) {
            return Err(Refusal::PeerNotAllowed);
        }
        for pin in self.pins.iter().filter(|pin| name.matches(&pin.provider)) {
            match identity {
                // Who only says that it is a provider of known keys shows none of them.
                None => return Err(Refusal::PeerNotAllowed),
                Some(identity) if !pin.keys.contains(&identity.spki_sha256) => return Err(Refusal::WrongKey),
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Whether the bearer of a certificate may send in any of the names it holds.
    pub fn admits_any(&self, identity: &PeerIdentity) -> bool {
        if identity.dns_names.is_empty() {
            // It sends in nobody's name, as those without a certificate of whom none is asked.
            return self.allow.is_none();
        }
        identity.dns_names.iter().any(|held| match held.strip_prefix("*.") {
            None => {
                ProviderName::from_bytes(held.as_bytes()).is_ok_and(|name| self.admit(&name, Some(identity)).is_ok())
            }
            // It holds all names of this pattern: those that are denied one by one leave others.
            Some(_) => {
                let is_of =
                    |name: &String| ProviderName::from_bytes(name.as_bytes()).is_ok_and(|name| name.matches(held));
                let allowed = |patterns: &Vec<String>| patterns.iter().any(|listed| listed == held || is_of(listed));
                let pinned = |pin: &&Pin| pin.provider == *held;
                !self.deny.contains(held)
                    && self.allow.as_ref().is_none_or(allowed)
                    && self.pins.iter().filter(pinned).all(|pin| pin.keys.contains(&identity.spki_sha256))
            }
        })
    }
}

/// Binds the sender that a body names to the channel: with a certificate, it must hold that name, and the name is then
/// authenticated. Without one it remains a claim, and the limits see no provider.
///
/// # Errors
/// [`Refusal::SenderMismatch`], [`Refusal::PeerNotAllowed`] and [`Refusal::WrongKey`].
pub fn bind_sender(
    sender: &ProviderName<'_>,
    identity: Option<&PeerIdentity>,
    peers: &Peers,
) -> Result<Option<String>, Refusal> {
    if identity.is_some_and(|identity| !identity.holds(sender)) {
        return Err(Refusal::SenderMismatch);
    }
    peers.admit(sender, identity)?;
    Ok(identity.map(|_| sender.to_string()))
}

/// Binds all that a request says of providers: those that must be ours are, the sender is who the channel says it is, and
/// what must be the sender's is. The answer is the provider that is authenticated, if one is.
///
/// # Errors
/// [`Refusal::Misdirected`], then what [`bind_sender`] says, then [`Refusal::SenderMismatch`].
pub fn identify(
    envelope: &Envelope<'_>,
    dialect: &Dialect,
    identity: Option<&PeerIdentity>,
    provider: &Provider,
    peers: &Peers,
) -> Result<Option<String>, Refusal> {
    if !envelope.ours.iter().flatten().all(|name| provider.is_recipient(name)) {
        return Err(Refusal::Misdirected("recipient"));
    }
    if dialect.mutual_tls && identity.is_none() {
        return Err(Refusal::SenderMismatch);
    }
    let authenticated = bind_sender(&envelope.sender, identity, peers)?;
    if envelope.theirs.iter().flatten().any(|name| *name != envelope.sender) {
        return Err(Refusal::SenderMismatch);
    }
    Ok(authenticated)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ProviderName<'_> {
        ProviderName::from_bytes(name.as_bytes()).unwrap()
    }

    fn certified(names: &[&str]) -> PeerIdentity {
        PeerIdentity { dns_names: names.iter().map(|&name| name.to_owned()).collect(), spki_sha256: [7; 32] }
    }

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn senders_are_their_certificates() {
        let identity = certified(&["a.example", "*.a.example"]);
        let peers = Peers::default();
        assert_eq!(bind_sender(&name("A.Example"), Some(&identity), &peers), Ok(Some("a.example".into())));
        assert_eq!(bind_sender(&name("x.a.example"), Some(&identity), &peers), Ok(Some("x.a.example".into())));
        assert_eq!(bind_sender(&name("x.y.a.example"), Some(&identity), &peers), Err(Refusal::SenderMismatch));
        assert_eq!(bind_sender(&name("b.example"), Some(&identity), &peers), Err(Refusal::SenderMismatch));
        assert_eq!(bind_sender(&name("b.example"), None, &peers), Ok(None), "a claim without a certificate");
        assert_eq!(identity.pattern_of(&name("x.A.example")), Some("*.a.example"));
        assert_eq!((identity.pattern_of(&name("a.example")), identity.pattern_of(&name("b.example"))), (None, None));
        assert_eq!(certified(&["*.a.example", "x.a.example"]).pattern_of(&name("x.a.example")), None);
        let none = PeerIdentity::default();
        assert_eq!(bind_sender(&name("a.example"), Some(&none), &peers), Err(Refusal::SenderMismatch));
    }

    #[test]
    fn a_list_of_peers_is_a_list() {
        let peers = Peers { allow: Some(list(&["a.example", "*.c.example"])), ..Peers::default() };
        let ask = |sender, peers| bind_sender(&name(sender), Some(&certified(&[sender])), peers);
        assert_eq!(ask("a.example", &peers), Ok(Some("a.example".into())));
        assert_eq!(ask("x.c.example", &peers), Ok(Some("x.c.example".into())));
        assert_eq!(ask("c.example", &peers), Err(Refusal::PeerNotAllowed));
        assert_eq!(bind_sender(&name("a.example"), None, &peers), Err(Refusal::PeerNotAllowed), "who only says so");
        let nobody = Peers { allow: Some(vec![]), ..Peers::default() };
        assert_eq!(ask("a.example", &nobody), Err(Refusal::PeerNotAllowed));
        let all_but = Peers { deny: list(&["a.example", "*.c.example"]), ..Peers::default() };
        assert_eq!(ask("b.example", &all_but), Ok(Some("b.example".into())));
        assert_eq!(ask("x.c.example", &all_but), Err(Refusal::PeerNotAllowed));
        assert_eq!(bind_sender(&name("a.example"), None, &all_but), Err(Refusal::PeerNotAllowed), "a claim is enough");
        let both = Peers { deny: list(&["x.c.example"]), ..peers.clone() };
        assert_eq!(ask("x.c.example", &both), Err(Refusal::PeerNotAllowed), "to deny comes before to allow");
        assert_eq!(ask("y.c.example", &both), Ok(Some("y.c.example".into())));
    }

    #[test]
    fn a_pinned_provider_comes_with_its_key() {
        let pin =
            |keys: Vec<[u8; 32]>| Peers { pins: vec![Pin { provider: "a.example".into(), keys }], ..Peers::default() };
        let identity = certified(&["a.example", "b.example"]);
        assert!(bind_sender(&name("a.example"), Some(&identity), &pin(vec![[1; 32], [7; 32]])).is_ok());
        assert_eq!(bind_sender(&name("a.example"), Some(&identity), &pin(vec![[1; 32]])), Err(Refusal::WrongKey));
        assert_eq!(bind_sender(&name("a.example"), None, &pin(vec![[7; 32]])), Err(Refusal::PeerNotAllowed));
        assert!(bind_sender(&name("b.example"), Some(&identity), &pin(vec![[1; 32]])).is_ok(), "it has no pin");
    }

    #[test]
    fn who_may_send_in_no_name_has_no_connection() {
        let allow = |names: &[&str]| Peers { allow: Some(list(names)), ..Peers::default() };
        let deny = |names: &[&str]| Peers { deny: list(names), ..Peers::default() };
        let (one, two, all_of) =
            (certified(&["a.example"]), certified(&["a.example", "b.example"]), certified(&["*.c.example"]));
        assert!(Peers::default().admits_any(&one));
        let nobody = PeerIdentity::default();
        assert!(deny(&["a.example"]).admits_any(&nobody) && !allow(&["a.example"]).admits_any(&nobody));
        assert!(allow(&["b.example"]).admits_any(&two) && !allow(&["b.example"]).admits_any(&one));
        assert!(deny(&["a.example"]).admits_any(&two) && !deny(&["a.example"]).admits_any(&one));
        assert!(allow(&["x.c.example"]).admits_any(&all_of) && allow(&["*.c.example"]).admits_any(&all_of));
        assert!(!allow(&["c.example"]).admits_any(&all_of) && !deny(&["*.c.example"]).admits_any(&all_of));
        assert!(deny(&["x.c.example"]).admits_any(&all_of));
        let pins = Peers { pins: vec![Pin { provider: "a.example".into(), keys: vec![[1; 32]] }], ..Peers::default() };
        assert!(!pins.admits_any(&one) && pins.admits_any(&two));
    }
}
