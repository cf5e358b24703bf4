//! The door for the provider's own nodes: what they send to other providers.
//!
//! A request names another provider. Where its Delivery Service is, that provider says itself, by HTTPS
//! ([`Discovery`]); what it and its DNS say is a stranger's word, so nothing that is not on the public Internet is ever
//! connected to ([`is_public`]), and everything is bounded and remembered. Whoever asks to be left alone for a while
//! (`Retry-After`) is left alone ([`Patience`]).

mod cache;
mod discovery;
mod patience;
mod private;
mod resolver;

pub(crate) use discovery::domain_name;
pub use discovery::{Discovery, Error, Found, Settings, SetupError, StaticPeer};
pub use patience::Patience;
pub use private::is_public;
pub use resolver::Resolver;
