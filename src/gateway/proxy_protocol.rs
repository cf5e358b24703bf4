//! The header that a load balancer sends before a client's octets: PROXY protocol, version 2 (haproxy, `proxy-protocol.txt`).
//! Read from those who are configured to send it, and from nobody else: it says whom a connection is from.

use std::io;
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Octets before the addresses: the signature, version and command, family, length.
const FIXED: usize = 16;

/// Octets of addresses and TLVs at most: a certificate's worth of TLVs, and no more.
const MOST: usize = 4096;

/// Reads a header, and no octet after it. None: the load balancer speaks for itself (LOCAL), or does not say for whom.
///
/// # Errors
/// It is no such header, longer than 4 KiB, or the connection ends.
pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<SocketAddr>> {
    let broken = |why: &'static str| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut header = vec![0; FIXED];
    stream.read_exact(&mut header).await?;
    if !header.starts_with(ppp::v2::PROTOCOL_PREFIX) {
        return Err(broken("not the PROXY protocol, version 2"));
    }
    let length = header.last_chunk::<2>().map_or(0, |length| usize::from(u16::from_be_bytes(*length)));
    if length > MOST {
        return Err(broken("a PROXY header of more than 4 KiB"));
    }
    header.resize(FIXED + length, 0);
    stream.read_exact(header.get_mut(FIXED..).unwrap_or_default()).await?;
    let header = ppp::v2::Header::try_from(&header[..]).map_err(|_| broken("a PROXY header that cannot be read"))?;
    if header.command == ppp::v2::Command::Local {
        return Ok(None);
    }
    Ok(match header.addresses {
        ppp::v2::Addresses::IPv4(of) => Some((of.source_address, of.source_port).into()),
        ppp::v2::Addresses::IPv6(of) => Some((of.source_address, of.source_port).into()),
        ppp::v2::Addresses::Unix(_) | ppp::v2::Addresses::Unspecified => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let mut octets = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
        octets.extend([0x20 | command, family]);
        octets.extend(u16::try_from(rest.len()).unwrap().to_be_bytes());
        octets.extend(rest);
        octets
    }

    async fn parse(mut octets: Vec<u8>) -> io::Result<(Option<SocketAddr>, usize)> {
        octets.extend(b"TLS");
        let mut rest = &octets[..];
        let read = read(&mut rest).await?;
        Ok((read, rest.len()))
    }

    #[tokio::test]
    async fn says_whom_a_connection_is_from() {
        let four = [192, 0, 2, 1, 198, 51, 100, 1, 0x1f, 0x90, 0x01, 0xbb];
        let (from, left) = parse(header(1, 0x11, &four)).await.unwrap();
        assert_eq!((from, left), (Some("192.0.2.1:8080".parse().unwrap()), 3), "and nothing after it is read");
        let mut with_tlvs = four.to_vec();
        with_tlvs.extend([0x04, 0, 3, 1, 2, 3]);
        assert_eq!(parse(header(1, 0x11, &with_tlvs)).await.unwrap(), (from, 3));
        let mut six = [0; 36];
        six[..2].copy_from_slice(&[0x20, 0x01]);
        six[15] = 7;
        six[33] = 9;
        assert_eq!(parse(header(1, 0x21, &six)).await.unwrap().0, Some("[2001::7]:9".parse().unwrap()));
        assert_eq!(parse(header(0, 0, &[])).await.unwrap(), (None, 3), "LOCAL");
        assert_eq!(parse(header(1, 0, &[])).await.unwrap(), (None, 3), "UNSPEC");
    }

    #[tokio::test]
    async fn what_is_no_header_is_an_error() {
        for octets in [
            b"PROXY TCP4 192.0.2.1 198.51.100.1 8080 443\r\n".to_vec(),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 and so on".to_vec(),
            header(1, 0x11, &[1, 2, 3]),
            header(1, 0x21, &[0; 12]),
            header(7, 0x11, &[0; 12]),
            header(1, 0x11, &[0; 5000]),
            header(1, 0x11, &[0; 12])[..20].to_vec(),
        ] {
            assert!(parse(octets.clone()).await.is_err() || octets.len() == 20, "{octets:?}");
            assert!(read(&mut &octets[..]).await.is_err(), "{octets:?}");
        }
        let mut older = header(1, 0x11, &[0; 12]);
        older[12] = 0x11;
        assert!(parse(older).await.is_err());
    }
}
