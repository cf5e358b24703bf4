//! Copies of much, by pieces. What glibc copies by `rep movsb`, AMD's processors (Zen 3, Zen 4) take sixteen times as long for where
//! it goes to an address that is, within its page, 1 to 15 octets above the one that it comes from (sourceware's bug 30994, mended in
//! newer ones of glibc). That is no rare accident: allocators hand out places that begin at round addresses, and what a protocol
//! puts before octets is a head of five (TLS) or nine (HTTP/2). `benches/copying.rs` measures it, `docs/performance.md` has figures.

use bytes::BufMut;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Octets that are copied at once: glibc has another way for so few, which does not mind.
const PIECE: usize = 1024;

/// Pieces that are written at once: 64 KiB.
const PIECES: usize = 64;

/// Large places begin at multiples of this, mimalloc's as others'; where in a page is not known.
const ROUND: usize = 512;

/// So far above another, within a page, is too near to it.
const NEAR: std::ops::Range<usize> = 1..16;

/// Copies octets to where others end, as many as there is or can be made room for: how many.
pub fn copy(octets: &[u8], to: &mut impl BufMut) -> usize {
    let octets = octets.get(..to.remaining_mut()).unwrap_or(octets);
    for piece in octets.chunks(PIECE) {
        to.put_slice(piece);
    }
    octets.len()
}

/// Whether that is what it may take: somebody else would copy these at once, to so many octets behind where a place begins.
pub fn is_called_for(octets: &[u8], behind: usize) -> bool {
    octets.len() > PIECE && NEAR.contains(&(behind.wrapping_sub(octets.as_ptr().addr()) % ROUND))
}

/// A connection that copies what it is given, as TLS does: it is given pieces.
pub struct ByPieces<T>(pub T);

// === impl ByPieces ===

impl<T: AsyncRead + Unpin> AsyncRead for ByPieces<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for ByPieces<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut pieces = [IoSlice::new(&[]); PIECES];
        let mut count = 0;
        for (place, piece) in pieces.iter_mut().zip(bufs.iter().flat_map(|buf| buf.chunks(PIECE))) {
            *place = IoSlice::new(piece);
            count += 1;
        }
        Pin::new(&mut self.get_mut().0).poll_write_vectored(cx, pieces.get(..count).unwrap_or_default())
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use std::future::poll_fn;

    fn octets(length: usize) -> Vec<u8> {
        (0..length).map(|n| (n % 251) as u8).collect()
    }

    #[test]
    fn all_of_it_is_copied() {
        let octets = octets(5000);
        for length in [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 5000] {
            let (mut buffer, mut place) = (BytesMut::from("before"), [0; 5000]);
            assert_eq!(copy(&octets[..length], &mut buffer), length);
            assert_eq!(buffer, [b"before", &octets[..length]].concat());
            assert_eq!(copy(&octets[..length], &mut &mut place[..]), length);
            assert_eq!(place[..length], octets[..length]);
            assert!(place[length..].iter().all(|octet| *octet == 0));
            assert_eq!(copy(&octets, &mut &mut place[..length]), length, "there is no more room");
            assert_eq!(place[..length], octets[..length]);
        }
    }

    #[test]
    fn it_is_called_for_a_little_below_where_they_would_go() {
        let octets = vec![0; 4 * ROUND + PIECE];
        let place = &octets[octets.as_ptr().align_offset(ROUND)..];
        for (at, is) in
            [(0, true), (4, true), (5, false), (6, false), (64, false), (501, false), (502, true), (511, true)]
        {
            assert_eq!(is_called_for(&place[at..at + PIECE + 1], 5), is, "{at}");
            assert!(!is_called_for(&place[at..at + PIECE], 5), "few");
        }
    }

    /// Takes so many octets at once, and says how they came.
    struct Taker {
        most: usize,
        came: Vec<u8>,
        largest: usize,
    }

    impl AsyncWrite for Taker {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::Unsupported.into()))
        }

        fn poll_write_vectored(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let this = self.get_mut();
            let all: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).take(this.most).collect();
            this.largest = bufs.iter().map(|buf| buf.len()).fold(this.largest, usize::max);
            this.came.extend(&all);
            Poll::Ready(Ok(all.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_connection_is_given_pieces() {
        for (length, most) in
            [(1, 9), (PIECE, 9000), (3 * PIECE + 7, usize::MAX), (200_000, 5000), (200_000, usize::MAX)]
        {
            let sent = octets(length);
            let mut taker = ByPieces(Taker { most, came: vec![], largest: 0 });
            let mut rest = &sent[..];
            while !rest.is_empty() {
                let (one, other) = rest.split_at(rest.len() / 3);
                let both = [IoSlice::new(one), IoSlice::new(&[]), IoSlice::new(other)];
                let written = poll_fn(|cx| Pin::new(&mut taker).poll_write_vectored(cx, &both)).await.unwrap();
                rest = &rest[written..];
            }
            assert!(taker.0.came == sent, "{length}");
            assert_eq!(taker.0.largest, (length - length / 3).min(PIECE), "{length}");
            assert_eq!(poll_fn(|cx| Pin::new(&mut taker).poll_write(cx, b"more")).await.unwrap(), 4);
        }
    }
}
