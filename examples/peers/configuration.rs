//! Gateways that differ from one another in a few things: what they are configured with.

use std::fmt;
use std::net::SocketAddr;

/// What differs. Where it listens and what its certificate is, is filled in when it is started.
#[derive(Clone)]
pub struct Configuration {
    pub threads: usize,
    /// MiB of the limits' state.
    pub memory: u64,
    /// Keys of `[delivery_service]`, and tables in it.
    pub delivery_service: String,
    /// Tables of limits.
    pub limits: String,
}

impl Configuration {
    /// One thread, and as much memory as there is by default.
    pub fn of(delivery_service: String, limits: String) -> Configuration {
        Configuration { threads: 1, memory: 64, delivery_service, limits }
    }
}

impl fmt::Display for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = include_str!("plain.toml").replace("{threads}", &self.threads.to_string());
        let text = text.replace("{memory}", &self.memory.to_string());
        let text = text.replace("{delivery_service}", &self.delivery_service);
        f.write_str(&text.replace("{limits}", &self.limits))
    }
}

/// A node of the Delivery Service.
pub fn node(address: SocketAddr, protocol: &str) -> String {
    format!("\n[[delivery_service.node]]\naddress = \"{address}\"\nprotocol = \"{protocol}\"\n")
}

/// A limit of these endpoints, or of all, if there are none.
pub fn limit(name: &str, endpoints: &[&str], key: &[&str], rate: &str, burst: u32) -> String {
    // Names are printed as TOML has them.
    let endpoints = if endpoints.is_empty() { String::new() } else { format!("endpoints = {endpoints:?}\n") };
    format!("\n[[limit]]\nname = \"{name}\"\n{endpoints}key = {key:?}\nrate = \"{rate}\"\nburst = {burst}\n")
}
