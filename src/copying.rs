//! Copies of much, by pieces. What glibc copies by `rep movsb`, AMD's processors (Zen 3, Zen 4) take sixteen times as long for where
//! it goes to an address that is, within its page, 1 to 15 octets above the one that it comes from. That is no rare accident: what
//! an allocator hands out begins where a page does, and what a protocol puts before it is a head of five octets (TLS) or nine
//! (HTTP/2). `docs/performance.md` has what was measured.

use bytes::BufMut;

/// Octets that are copied at once: glibc has another way for so few, which does not mind.
const PIECE: usize = 1024;

/// Of addresses that are as far apart as this, these processors take one for the other.
const PAGE: usize = 4096;

/// So far above another is too near to it.
const NEAR: std::ops::Range<usize> = 1..16;

/// Copies octets to where others end.
///
/// # Panics
/// There is no room for them, and none can be made: as [`BufMut::put_slice`].
pub fn copy(octets: &[u8], to: &mut impl BufMut) {
    for piece in octets.chunks(PIECE) {
        to.put_slice(piece);
    }
}

/// Whether that is what it takes: somebody else would copy these at once, to so many octets behind the beginning of a page.
pub fn is_called_for(octets: &[u8], behind: usize) -> bool {
    octets.len() > PIECE && NEAR.contains(&(behind.wrapping_sub(octets.as_ptr().addr()) % PAGE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;

    #[test]
    fn all_of_it_is_copied() {
        let octets: Vec<u8> = (0..5000).map(|n| (n % 251) as u8).collect();
        for length in [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 5000] {
            let (mut buffer, mut place) = (BytesMut::from("before"), [0; 5000]);
            copy(&octets[..length], &mut buffer);
            assert_eq!(buffer, [b"before", &octets[..length]].concat());
            copy(&octets[..length], &mut &mut place[..]);
            assert_eq!(place[..length], octets[..length]);
            assert!(place[length..].iter().all(|octet| *octet == 0));
        }
    }

    #[test]
    fn it_is_called_for_a_little_below_where_they_would_go() {
        let octets = vec![0; 3 * PAGE];
        let page = &octets[octets.as_ptr().align_offset(PAGE)..];
        for (at, is) in
            [(0, true), (4, true), (5, false), (6, false), (64, false), (4085, false), (4086, true), (4095, true)]
        {
            assert_eq!(is_called_for(&page[at..at + PIECE + 1], 5), is, "{at}");
            assert!(!is_called_for(&page[at..at + PIECE], 5), "few");
        }
    }
}
