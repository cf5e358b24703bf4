//! HTTP/1.1 as octets (RFC 9112), the same to whom we ask and to who asks us: heads of requests, bodies in chunks, and what is
//! written. Nothing here knows a connection or a clock.
//!
//! The syntax of heads is the `httparse` crate's. How a message is framed is ours, and strict: what two servers could read in two
//! ways is refused (RFC 9112 §11.2).

mod chunks;
mod outgoing;
mod request;
mod share;

pub use chunks::{Chunks, EXTENSIONS_MAX, TRAILER_FIELDS_MAX, TRAILERS_MAX, Taken};
pub use outgoing::{Framing, JOINED, Outgoing, Shares, put_field, put_length};
pub use request::{Answer, FIELDS_MAX, HEAD_MAX, Request, date};
pub use share::Share;

use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderName, HeaderValue};

/// What is wrong with what came.
pub type Bad = &'static str;

/// Looks for the empty line that ends a head or trailers, from where it has looked before.
#[derive(Debug, Default)]
pub struct End {
    searched: usize,
}

impl End {
    /// Where the first empty line of `octets` ends, which are those of before and maybe more.
    ///
    /// # Errors
    /// A line ends with a line feed alone, which others may not take for an end.
    pub fn find(&mut self, octets: &[u8]) -> Result<Option<usize>, Bad> {
        let from = self.searched;
        for at in memchr::memchr_iter(b'\n', octets.get(from..).unwrap_or_default()) {
            let line = octets.get(..from + at).unwrap_or_default();
            match line {
                [.., b'\r'] if line.len() == 1 || line.ends_with(b"\n\r") => {
                    self.searched = 0;
                    return Ok(Some(from + at + 1));
                }
                [.., b'\r'] => {}
                _ => return Err("a line ends without a carriage return"),
            }
        }
        self.searched = octets.len();
        Ok(None)
    }
}

/// A field as `http` has it. The value stays where it was read, in `block`.
///
/// # Errors
/// The name, or the value, is none.
pub fn name_and_value(block: &Bytes, field: &httparse::Header<'_>) -> Result<(HeaderName, HeaderValue), Bad> {
    let name = HeaderName::from_bytes(field.name.as_bytes());
    let value = HeaderValue::from_maybe_shared(block.slice_ref(field.value));
    match (name, value) {
        (Ok(name), Ok(value)) => Ok((name, value)),
        _ => Err("a field is none"),
    }
}

/// It is about a connection, and not passed on (RFC 9110 §7.6.1).
pub fn is_of_connection(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection" | "keep-alive" | "proxy-connection" | "te" | "trailer" | "transfer-encoding" | "upgrade"
    )
}

/// The value of `Content-Length`: digits, and nothing else.
pub fn length_of(value: &[u8]) -> Option<u64> {
    if value.is_empty() {
        return None;
    }
    value.iter().try_fold(0_u64, |length, octet| {
        let digit = octet.is_ascii_digit().then(|| octet - b'0')?;
        length.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

/// What a field lists, as `Connection` and `TE` do.
pub fn options(value: &HeaderValue) -> impl Iterator<Item = &[u8]> {
    value.as_bytes().split(|octet| *octet == b',').map(<[u8]>::trim_ascii)
}

/// What `buffer` has of the next `rest` octets, and how many are to come then.
pub fn split(buffer: &mut BytesMut, rest: u64) -> (Bytes, u64) {
    let here = usize::try_from(rest).unwrap_or(usize::MAX).min(buffer.len());
    (buffer.split_to(here).freeze(), rest - here as u64)
}

/// Passes over the empty lines before a request (RFC 9112 §2.2).
pub fn skip_empty_lines(buffer: &mut BytesMut) {
    while buffer.starts_with(b"\r\n") {
        buffer.advance(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_ends_with_an_empty_line() {
        for (octets, end) in [
            (&b""[..], Ok(None)),
            (b"a: b\r\n", Ok(None)),
            (b"a: b\r\n\r", Ok(None)),
            (b"a: b\r\n\r\n", Ok(Some(8))),
            (b"a: b\r\n\r\nmore\r\n\r\n", Ok(Some(8))),
            (b"\r\n", Ok(Some(2))),
            (b"\n", Err(())),
            (b"a: b\n\r\n", Err(())),
            (b"a: b\r\n\n", Err(())),
            (b"a\r: b\r\n\r\n", Ok(Some(9))),
        ] {
            assert_eq!(End::default().find(octets).map_err(drop), end, "{octets:?}");
            // However much of it comes at a time.
            let (mut of_pieces, mut found) = (End::default(), Ok(None));
            for length in 0..=octets.len() {
                if found == Ok(None) {
                    found = of_pieces.find(&octets[..length]).map_err(drop);
                }
            }
            assert_eq!(found, end, "{octets:?} in pieces");
        }
    }

    #[test]
    fn a_length_is_digits() {
        assert_eq!(length_of(b"0018446744073709551615"), Some(u64::MAX));
        for bad in [&b""[..], b"+1", b"-1", b"1 ", b"0x1", b"1,1", b"18446744073709551616"] {
            assert_eq!(length_of(bad), None, "{bad:?}");
        }
    }
}
