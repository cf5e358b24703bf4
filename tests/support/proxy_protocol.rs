//! Headers of the PROXY protocol, version 2, as a load balancer writes them (proxy-protocol.txt of HAProxy, §2.2), and the
//! text of version 1. Headers that no balancer would write can be made too: every part of one is a field.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

use std::net::{Ipv4Addr, SocketAddr};

/// The twelve octets that a header begins with.
pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Version 2 in the upper half, the command in the lower: the balancer's own connection.
pub const LOCAL: u8 = 0x20;
/// A connection made for another.
pub const PROXY: u8 = 0x21;

pub const UNSPEC: u8 = 0x00;
pub const TCP4: u8 = 0x11;
pub const TCP6: u8 = 0x21;
pub const UNIX_STREAM: u8 = 0x31;

pub const PP2_TYPE_ALPN: u8 = 0x01;
pub const PP2_TYPE_AUTHORITY: u8 = 0x02;
pub const PP2_TYPE_NOOP: u8 = 0x04;
pub const PP2_TYPE_UNIQUE_ID: u8 = 0x05;
/// The first of those that are for anybody's own use.
pub const PP2_TYPE_CUSTOM: u8 = 0xe0;

/// A header, in its parts.
#[derive(Debug, Clone)]
pub struct Header {
    pub signature: [u8; 12],
    /// Version and command.
    pub command: u8,
    /// Address family and transport.
    pub family: u8,
    pub addresses: Vec<u8>,
    pub tlvs: Vec<u8>,
    /// What is said to follow, where that is not as much as follows.
    pub length: Option<u16>,
}

impl Header {
    /// A connection of `client`, which it made to a balancer's address of the same family.
    pub fn proxy(client: SocketAddr) -> Header {
        let (family, mut addresses) = match client {
            SocketAddr::V4(client) => (TCP4, [client.ip().octets(), Ipv4Addr::new(198, 51, 100, 1).octets()].concat()),
            SocketAddr::V6(client) => {
                let balancer: std::net::Ipv6Addr = "2001:db8:ffff::1".parse().unwrap();
                (TCP6, [client.ip().octets(), balancer.octets()].concat())
            }
        };
        addresses.extend(client.port().to_be_bytes());
        addresses.extend(443u16.to_be_bytes());
        Header::of(PROXY, family, addresses)
    }

    /// The balancer's own connection: a health check.
    pub fn local() -> Header {
        Header::of(LOCAL, UNSPEC, vec![])
    }

    /// A client of a socket in the file system: two paths of 108 octets.
    pub fn unix() -> Header {
        let mut addresses = b"/run/client.sock".to_vec();
        addresses.resize(108, 0);
        addresses.extend(b"/run/balancer.sock");
        addresses.resize(216, 0);
        Header::of(PROXY, UNIX_STREAM, addresses)
    }

    pub fn of(command: u8, family: u8, addresses: Vec<u8>) -> Header {
        Header { signature: SIGNATURE, command, family, addresses, tlvs: vec![], length: None }
    }

    /// The same with another command.
    #[must_use]
    pub fn command(self, command: u8) -> Header {
        Header { command, ..self }
    }

    /// The same with another family: its addresses stay.
    #[must_use]
    pub fn family(self, family: u8) -> Header {
        Header { family, ..self }
    }

    /// With a field after the addresses.
    #[must_use]
    pub fn tlv(mut self, kind: u8, value: &[u8]) -> Header {
        self.tlvs.push(kind);
        self.tlvs.extend(u16::try_from(value.len()).unwrap().to_be_bytes());
        self.tlvs.extend(value);
        self
    }

    /// Says that so much follows, whatever does.
    #[must_use]
    pub fn length(self, length: u16) -> Header {
        Header { length: Some(length), ..self }
    }

    /// The header's octets.
    pub fn encode(&self) -> Vec<u8> {
        let follows = self.addresses.len() + self.tlvs.len();
        let length = self.length.unwrap_or_else(|| u16::try_from(follows).unwrap());
        let mut octets = self.signature.to_vec();
        octets.extend([self.command, self.family]);
        octets.extend(length.to_be_bytes());
        octets.extend(&self.addresses);
        octets.extend(&self.tlvs);
        octets
    }
}

/// The line of version 1 (§2.1).
pub fn version_1(client: SocketAddr) -> Vec<u8> {
    format!("PROXY TCP4 {} 198.51.100.1 {} 443\r\n", client.ip(), client.port()).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octets_of_headers() {
        let client: SocketAddr = "203.0.113.7:258".parse().unwrap();
        let header = Header::proxy(client).tlv(PP2_TYPE_NOOP, b"x").encode();
        assert_eq!(header[..12], [0x0d, 0x0a, 0x0d, 0x0a, 0, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a]);
        assert_eq!(header[12..16], [0x21, 0x11, 0, 16]);
        assert_eq!(header[16..28], [203, 0, 113, 7, 198, 51, 100, 1, 1, 2, 1, 0xbb]);
        assert_eq!(header[28..], [4, 0, 1, b'x']);
        assert_eq!(Header::local().encode()[12..], [0x20, 0, 0, 0]);
        assert_eq!(Header::proxy("[2001:db8::1]:1".parse().unwrap()).encode().len(), 16 + 36);
        assert_eq!(Header::unix().encode().len(), 16 + 216);
        assert_eq!(Header::local().length(9).encode()[14..16], [0, 9]);
    }
}
