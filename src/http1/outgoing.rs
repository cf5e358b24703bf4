//! A message on its way out. Its head and the first piece of its body leave in one write, where that piece is there and small;
//! larger ones are written from where they are.

use super::Bad;
use super::Share;
use super::chunks::LAST;
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::HeaderMap;
use smallvec::SmallVec;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::AsyncWrite;
use tokio::time::Instant;

/// Up to this size a piece of a body is copied behind what goes before it, to be one write with it.
pub const JOINED: usize = 4 * 1024;

/// Pieces that are there are one write up to so many octets: of a body that is no longer than this from here on, and of others
/// where there is a [`Share`] for it.
const GATHERED: u64 = 64 * 1024;
const PIECES: usize = 6;

/// The last chunk, without trailers.
const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// Where a [`Share`] is from: those of requests, or of answers.
pub type Shares = fn() -> Option<Share>;

/// How a body is framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// By its length: octets that are still to come.
    Length(u64),
    /// In chunks.
    Chunked,
    /// By the end of the connection (HTTP/1.0).
    UntilEnd,
}

/// A message: what is written next is `front`, then the pieces, then `back`.
#[derive(Debug)]
pub struct Outgoing {
    front: BytesMut,
    piece: Bytes,
    /// Further pieces, of a body whose length is known.
    more: SmallVec<[Bytes; 1]>,
    /// For these, where they are many, and where it is from.
    ample: Option<Share>,
    shares: Shares,
    back: &'static [u8],
    framing: Framing,
    /// Nothing is written yet.
    is_untouched: bool,
    /// The body has ended: what is here is the rest.
    is_ended: bool,
    /// Something was written and not flushed.
    is_unflushed: bool,
    /// Until when something has to be taken, where that is awaited. It is forgotten when something is.
    pub until: Option<Instant>,
}

impl Outgoing {
    /// Room for a head of so many octets, with the first piece of a body of that length, if it is known and small.
    pub fn room(head: usize, length: Option<u64>) -> BytesMut {
        let joined = length.and_then(|length| usize::try_from(length).ok()).filter(|length| *length <= JOINED);
        BytesMut::with_capacity(head + joined.unwrap_or(0))
    }

    /// A message with this head, and a body that follows unless it `is_ended`.
    pub fn new(head: BytesMut, framing: Framing, is_ended: bool, shares: Shares) -> Self {
        Self {
            front: head,
            piece: Bytes::new(),
            more: SmallVec::new(),
            ample: None,
            shares,
            back: b"",
            framing,
            is_untouched: true,
            is_ended,
            is_unflushed: false,
            until: None,
        }
    }

    /// The body has ended.
    pub fn is_ended(&self) -> bool {
        self.is_ended
    }

    /// Another piece may be taken: nothing is left to write, or nothing is written and there is not much yet, or it can be one
    /// write with those before it.
    pub fn has_room(&mut self) -> bool {
        if self.is_ended || !self.back.is_empty() {
            return false;
        }
        if self.piece.is_empty() {
            return self.front.is_empty() || (self.is_untouched && self.front.len() <= JOINED);
        }
        let Framing::Length(rest) = self.framing else { return false };
        let queued = self.more.iter().fold(self.piece.len() as u64, |sum, piece| sum + piece.len() as u64);
        if queued >= GATHERED || self.more.len() + 1 >= PIECES {
            return false;
        }
        if rest.saturating_add(queued) > GATHERED && self.ample.is_none() {
            self.ample = (self.shares)();
            return self.ample.is_some();
        }
        true
    }

    /// Takes a piece of the body in. `is_vectored`: several pieces can be one write.
    ///
    /// # Errors
    /// The body is longer than its length.
    pub fn add(&mut self, piece: Bytes, is_vectored: bool) -> Result<(), Bad> {
        // an empty chunk would be the last one
        if piece.is_empty() {
            return Ok(());
        }
        match &mut self.framing {
            Framing::Length(rest) => {
                *rest = rest.checked_sub(piece.len() as u64).ok_or("the body is longer than its length")?;
            }
            Framing::Chunked => {
                // writing into memory does not fail
                let _ = write!(self.front, "{:x}\r\n", piece.len());
                self.back = b"\r\n";
            }
            Framing::UntilEnd => {}
        }
        let is_joined = !self.front.is_empty() && piece.len() <= JOINED && (self.is_untouched || !is_vectored);
        if !self.piece.is_empty() {
            self.more.push(piece);
        } else if is_joined {
            self.front.reserve(piece.len() + LAST.len());
            self.front.put_slice(&piece);
            self.front.put_slice(std::mem::take(&mut self.back));
        } else {
            self.piece = piece;
        }
        Ok(())
    }

    /// Takes in that the body has ended.
    ///
    /// # Errors
    /// It is shorter than its length.
    pub fn end(&mut self) -> Result<(), Bad> {
        match self.framing {
            Framing::Length(0) | Framing::UntilEnd => {}
            Framing::Length(_) => return Err("the body is shorter than its length"),
            Framing::Chunked if self.back.is_empty() => self.front.put_slice(LAST_CHUNK),
            Framing::Chunked => self.back = LAST,
        }
        self.is_ended = true;
        Ok(())
    }

    /// As [`Outgoing::end`], with trailers, which go out behind chunks alone. To be told while there is room.
    ///
    /// # Errors
    /// As [`Outgoing::end`].
    pub fn end_with(&mut self, trailers: &HeaderMap) -> Result<(), Bad> {
        if self.framing != Framing::Chunked {
            return self.end();
        }
        self.front.put_slice(b"0\r\n");
        for (name, value) in trailers {
            put_field(&mut self.front, name.as_str().as_bytes(), value.as_bytes());
        }
        self.front.put_slice(b"\r\n");
        self.is_ended = true;
        Ok(())
    }

    /// Writes all that is here.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn poll_write<W: AsyncWrite + Unpin + ?Sized>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut W,
    ) -> Poll<io::Result<()>> {
        if self.more.is_empty() {
            // No other piece was there.
            self.ample = None;
        }
        loop {
            let Some(written) = ready!(self.poll_write_once(cx, Pin::new(&mut *stream)))? else {
                return Poll::Ready(Ok(()));
            };
            if written == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            self.is_untouched = false;
            self.is_unflushed = true;
            self.until = None;
            let of_front = written.min(self.front.len());
            self.front.advance(of_front);
            if self.front.is_empty() && self.framing != Framing::Chunked {
                // It was for the head, and a body may take its time.
                self.front = BytesMut::new();
            }
            let mut left = written - of_front;
            loop {
                let of_piece = left.min(self.piece.len());
                self.piece.advance(of_piece);
                left -= of_piece;
                if !self.piece.is_empty() {
                    break;
                }
                // what it was a part of may be large
                self.piece = Bytes::new();
                if self.more.is_empty() {
                    self.ample = None;
                    break;
                }
                self.piece = self.more.remove(0);
            }
            self.back = self.back.get(left..).unwrap_or_default();
        }
    }

    /// Writes what is next, in one call as far as the stream can: how many octets. None: nothing is left.
    fn poll_write_once<W: AsyncWrite + ?Sized>(
        &self,
        cx: &mut Context<'_>,
        stream: Pin<&mut W>,
    ) -> Poll<io::Result<Option<usize>>> {
        let pieces = [&*self.front, &*self.piece].into_iter().chain(self.more.iter().map(|piece| &**piece));
        let mut filled = pieces.chain([self.back]).filter(|part| !part.is_empty());
        let Some(first) = filled.next() else { return Poll::Ready(Ok(None)) };
        let Some(second) = filled.next().filter(|_| stream.is_write_vectored()) else {
            return stream.poll_write(cx, first).map_ok(Some);
        };
        let mut parts = [IoSlice::new(&[]); PIECES + 2];
        let mut count = 0;
        for (slot, part) in parts.iter_mut().zip([first, second].into_iter().chain(filled)) {
            *slot = IoSlice::new(part);
            count += 1;
        }
        stream.poll_write_vectored(cx, parts.get(..count).unwrap_or_default()).map_ok(Some)
    }

    /// Flushes what was written, if something was.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn poll_flush<W: AsyncWrite + Unpin + ?Sized>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut W,
    ) -> Poll<io::Result<()>> {
        if self.is_unflushed {
            ready!(Pin::new(stream).poll_flush(cx))?;
            self.is_unflushed = false;
            self.until = None;
        }
        Poll::Ready(Ok(()))
    }

    /// Nothing of it is to be written any more.
    pub fn clear(&mut self) {
        self.front = BytesMut::new();
        self.piece = Bytes::new();
        self.more.clear();
        self.ample = None;
        self.back = b"";
        self.is_ended = true;
    }
}

/// Writes how long a body is.
pub fn put_length(into: &mut BytesMut, length: u64) {
    // writing into memory does not fail
    let _ = write!(into, "content-length: {length}\r\n");
}

/// Writes a field of a head, or of trailers.
pub fn put_field(into: &mut BytesMut, name: &[u8], value: &[u8]) {
    into.reserve(name.len() + value.len() + 4);
    into.put_slice(name);
    into.put_slice(b": ");
    into.put_slice(value);
    into.put_slice(b"\r\n");
}
