//! Who a sender is: the provider that its body names, bound to the client certificate where there is one.

use crate::problem::Refusal;
use crate::wire::ProviderName;

/// The DNS names of a verified client certificate, in lower case; a name may begin with `*.` (RFC 6125).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerIdentity {
    /// The names.
    pub dns_names: Vec<String>,
}

/// Which providers may send.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peers {
    /// Names and `*.` patterns, in lower case. None: everyone. A list is for names that a certificate binds: who only
    /// says that it is one of them is not.
    pub allow: Option<Vec<String>>,
    /// Providers with a label of their own in metrics, in lower case.
    pub named: Vec<String>,
}

impl PeerIdentity {
    /// Whether the certificate holds this name.
    pub fn holds(&self, name: &ProviderName<'_>) -> bool {
        self.dns_names.iter().any(|pattern| name.matches(pattern))
    }
}

impl Peers {
    /// Whether a provider may send.
    pub fn allowed(&self, name: &ProviderName<'_>, authenticated: bool) -> bool {
        let listed = |patterns: &Vec<String>| patterns.iter().any(|pattern| name.matches(pattern));
        self.allow.as_ref().is_none_or(|patterns| authenticated && listed(patterns))
    }
}

/// Binds the sender that a body names to the channel: with a certificate, it must hold that name, and the name is then
/// authenticated. Without one it remains a claim, and the limits see no provider.
///
/// # Errors
/// [`Refusal::SenderMismatch`] and [`Refusal::PeerNotAllowed`].
pub fn bind_sender(
    sender: &ProviderName<'_>,
    identity: Option<&PeerIdentity>,
    peers: &Peers,
) -> Result<Option<String>, Refusal> {
    let authenticated = match identity {
        Some(identity) if !identity.holds(sender) => return Err(Refusal::SenderMismatch),
        Some(_) => Some(sender.to_string()),
        None => None,
    };
    if peers.allowed(sender, authenticated.is_some()) { Ok(authenticated) } else { Err(Refusal::PeerNotAllowed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ProviderName<'_> {
        ProviderName::from_bytes(name.as_bytes()).unwrap()
    }

    #[test]
    fn senders_are_their_certificates() {
        let identity = PeerIdentity { dns_names: vec!["a.example".into(), "*.a.example".into()] };
        let peers = Peers::default();
        assert_eq!(bind_sender(&name("A.Example"), Some(&identity), &peers), Ok(Some("a.example".into())));
        assert_eq!(bind_sender(&name("x.a.example"), Some(&identity), &peers), Ok(Some("x.a.example".into())));
        assert_eq!(bind_sender(&name("x.y.a.example"), Some(&identity), &peers), Err(Refusal::SenderMismatch));
        assert_eq!(bind_sender(&name("b.example"), Some(&identity), &peers), Err(Refusal::SenderMismatch));
        assert_eq!(bind_sender(&name("b.example"), None, &peers), Ok(None), "a claim without a certificate");
        let none = PeerIdentity::default();
        assert_eq!(bind_sender(&name("a.example"), Some(&none), &peers), Err(Refusal::SenderMismatch));
    }

    #[test]
    fn a_list_of_peers_is_a_list() {
        let peers = Peers { allow: Some(vec!["a.example".into(), "*.c.example".into()]), named: vec![] };
        let certified = |name: &str| PeerIdentity { dns_names: vec![name.to_owned()] };
        let ask = |sender, peers| bind_sender(&name(sender), Some(&certified(sender)), peers);
        assert_eq!(ask("a.example", &peers), Ok(Some("a.example".into())));
        assert_eq!(ask("x.c.example", &peers), Ok(Some("x.c.example".into())));
        assert_eq!(ask("c.example", &peers), Err(Refusal::PeerNotAllowed));
        assert_eq!(bind_sender(&name("a.example"), None, &peers), Err(Refusal::PeerNotAllowed), "who only says so");
        let nobody = Peers { allow: Some(vec![]), named: vec![] };
        assert_eq!(ask("a.example", &nobody), Err(Refusal::PeerNotAllowed));
    }
}
