//! A body in chunks (RFC 9112 §7.1), read octet by octet where it is not data.

use super::{Bad, End, is_of_connection, name_and_value, split};
use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, header};

/// Octets of chunk extensions in a body.
pub const EXTENSIONS_MAX: u16 = 4 * 1024;
/// Octets of trailers.
pub const TRAILERS_MAX: usize = 16 * 1024;
/// Fields of trailers.
pub const TRAILER_FIELDS_MAX: usize = 64;

/// Octets of a chunk: no body is as large.
const CHUNK_MAX: u64 = 1 << 56;

/// The end of a chunk, and the last chunk.
pub(super) const LAST: &[u8] = b"\r\n0\r\n\r\n";

/// Where a body is.
#[derive(Debug, Clone, Copy)]
enum At {
    /// In a chunk's size, of which so many digits were read.
    Size { size: u64, digits: u8 },
    /// In blanks behind the size.
    Blank { size: u64 },
    /// In an extension.
    Extension { size: u64 },
    /// Before the line feed behind the size.
    SizeEnd { size: u64 },
    /// In data.
    Data { rest: u64 },
    /// Behind the data.
    DataEnd,
    /// Before the line feed behind the data.
    DataLineFeed,
    /// Behind the last chunk.
    Trailers,
    /// Behind its end.
    Done,
}

/// A body in chunks on its way in.
#[derive(Debug)]
pub struct Chunks {
    at: At,
    /// Octets of extensions.
    extensions: u16,
    end: End,
}

/// What there was to take of it.
#[derive(Debug)]
pub enum Taken {
    /// Octets of the body. It may be known to be the last: see [`Chunks::is_done`].
    Data(Bytes),
    /// Nothing, until more is read.
    Nothing,
    /// All of it was taken, with what came behind it; none of that is the connection's.
    End(HeaderMap),
}

impl Default for Chunks {
    fn default() -> Self {
        Self { at: At::Size { size: 0, digits: 0 }, extensions: 0, end: End::default() }
    }
}

impl Chunks {
    /// All of it was taken.
    pub fn is_done(&self) -> bool {
        matches!(self.at, At::Done)
    }

    /// Takes the next of it out of what has been read.
    ///
    /// # Errors
    /// It is not framed as it should be. Nothing that follows can be told from it then.
    pub fn take(&mut self, buffer: &mut BytesMut) -> Result<Taken, Bad> {
        loop {
            match self.at {
                At::Data { rest } if !buffer.is_empty() => {
                    let (piece, rest) = split(buffer, rest);
                    self.at = if rest > 0 {
                        At::Data { rest }
                    } else if buffer.starts_with(LAST) {
                        // that this was all is known with the last piece, as it mostly is here
                        buffer.advance(LAST.len());
                        At::Done
                    } else {
                        At::DataEnd
                    };
                    return Ok(Taken::Data(piece));
                }
                At::Trailers => return self.take_trailers(buffer),
                At::Done => return Ok(Taken::End(HeaderMap::new())),
                _ => {}
            }
            let Some(&octet) = buffer.first() else { return Ok(Taken::Nothing) };
            buffer.advance(1);
            self.at = self.step(octet)?;
        }
    }

    /// Reads an octet of what is around the data.
    fn step(&mut self, octet: u8) -> Result<At, Bad> {
        if matches!(self.at, At::Blank { .. } | At::Extension { .. }) {
            self.extensions += 1;
            if self.extensions > EXTENSIONS_MAX {
                return Err("too long extensions of chunks");
            }
        }
        Ok(match (self.at, octet) {
            (At::Size { size, digits }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') if digits < 16 => {
                let digit = char::from(octet).to_digit(16).unwrap_or(0);
                // no more than 16 digits: nothing is shifted out
                At::Size { size: (size << 4) | u64::from(digit), digits: digits + 1 }
            }
            (At::Size { size: CHUNK_MAX.., .. }, _) => return Err("a chunk is larger than any body"),
            (At::Size { size, digits: 1.. } | At::Blank { size }, b';') => At::Extension { size },
            (At::Size { size, digits: 1.. } | At::Blank { size }, b' ' | b'\t') => At::Blank { size },
            (At::Size { size, digits: 1.. } | At::Extension { size }, b'\r') => At::SizeEnd { size },
            (At::Extension { .. }, b'\t' | b' '..=b'~' | 0x80..) => self.at,
            (At::SizeEnd { size: 0 }, b'\n') => At::Trailers,
            (At::SizeEnd { size }, b'\n') => At::Data { rest: size },
            (At::DataEnd, b'\r') => At::DataLineFeed,
            (At::DataLineFeed, b'\n') => At::Size { size: 0, digits: 0 },
            _ => return Err("chunks are not framed as they should be"),
        })
    }

    /// Takes the trailers, once they are there, with which the body ends.
    fn take_trailers(&mut self, buffer: &mut BytesMut) -> Result<Taken, Bad> {
        let Some(end) = self.end.find(buffer)? else {
            return if buffer.len() > TRAILERS_MAX { Err("too long trailers") } else { Ok(Taken::Nothing) };
        };
        if end > TRAILERS_MAX {
            return Err("too long trailers");
        }
        self.at = At::Done;
        let block = buffer.split_to(end).freeze();
        let mut trailers = HeaderMap::new();
        if block == b"\r\n"[..] {
            return Ok(Taken::End(trailers));
        }
        let mut room = [httparse::EMPTY_HEADER; TRAILER_FIELDS_MAX];
        let fields = match httparse::parse_headers(&block, &mut room) {
            Ok(httparse::Status::Complete((end, fields))) if end == block.len() => fields,
            _ => return Err("trailers are no fields"),
        };
        for field in fields {
            let (name, value) = name_and_value(&block, field)?;
            if !is_of_connection(&name) && !matches!(name, header::CONTENT_LENGTH | header::HOST) {
                trailers.append(name, value);
            }
        }
        Ok(Taken::End(trailers))
    }
}
