//! A reader over borrowed octets: the TLS presentation language (RFC 8446 §3) with the variable-size vectors of
//! RFC 9420 §2.1.2, as `wire.md` has them.
//!
//! Nothing is copied and nothing is allocated by a length that a stranger wrote: a vector is a slice of what has come.
//! Two things may go wrong and they are kept apart. [`Error::Incomplete`]: what has come so far is right, and the field
//! at `offset` is not whole yet; `need` says how many octets of the body there must be before reading again can get
//! further, so that a body arriving octet by octet is read once a field and not once an octet. [`Error::Malformed`]: no
//! further octet can make it right.

pub mod mls;
mod name;
mod uri;

pub use name::{InvalidName, ProviderName};
pub use uri::{InvalidUri, Uri};

/// Why a body cannot be read. `field` is a name of `wire.md`; `offset` counts octets from the start of the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The field is not whole yet.
    #[error("{field} at octet {offset} is cut short")]
    Incomplete {
        /// The field that is not whole.
        field: &'static str,
        /// Where it begins.
        offset: usize,
        /// Length of the body, in octets, before which reading again is of no use.
        need: usize,
    },
    /// The field is wrong, whatever follows.
    #[error("{field} at octet {offset}: {reason}")]
    Malformed {
        /// The field that is wrong.
        field: &'static str,
        /// Where it begins.
        offset: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl Error {
    /// Whether more octets may help.
    pub fn is_incomplete(&self) -> bool {
        matches!(self, Self::Incomplete { .. })
    }

    /// The field and the offset.
    pub fn place(&self) -> (&'static str, usize) {
        match *self {
            Self::Incomplete { field, offset, .. } | Self::Malformed { field, offset, .. } => (field, offset),
        }
    }

    /// What is wrong, for a person.
    pub fn reason(&self) -> &'static str {
        match *self {
            Self::Incomplete { .. } => "cut short",
            Self::Malformed { reason, .. } => reason,
        }
    }
}

/// The result of reading a field.
pub type Result<T> = core::result::Result<T, Error>;

/// Reads fields one after another from a body, or from the inside of one of its vectors.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
    offset: usize,
    /// The inside of a vector is all there is: running out of it is an error that no further octet mends.
    whole: bool,
}

impl<'a> Reader<'a> {
    /// A reader of a body of which `body` has come so far.
    pub fn new(body: &'a [u8]) -> Self {
        Self { rest: body, offset: 0, whole: false }
    }

    /// Octets of the body read so far.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    #[cold]
    fn short(&self, field: &'static str, n: usize) -> Error {
        if self.whole {
            Error::Malformed { field, offset: self.offset, reason: "runs past the end of its vector" }
        } else {
            Error::Incomplete { field, offset: self.offset, need: self.offset.saturating_add(n) }
        }
    }

    /// `n` octets.
    #[inline]
    pub fn take(&mut self, field: &'static str, n: usize) -> Result<&'a [u8]> {
        let Some((head, rest)) = self.rest.split_at_checked(n) else { return Err(self.short(field, n)) };
        self.rest = rest;
        self.offset += n;
        Ok(head)
    }

    #[inline]
    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N]> {
        let Some((head, rest)) = self.rest.split_first_chunk::<N>() else { return Err(self.short(field, N)) };
        self.rest = rest;
        self.offset += N;
        Ok(*head)
    }

    /// A `uint8`.
    #[inline]
    pub fn u8(&mut self, field: &'static str) -> Result<u8> {
        self.array::<1>(field).map(|[b]| b)
    }

    /// A `uint16`.
    #[inline]
    pub fn u16(&mut self, field: &'static str) -> Result<u16> {
        self.array(field).map(u16::from_be_bytes)
    }

    /// A `uint32`.
    #[inline]
    pub fn u32(&mut self, field: &'static str) -> Result<u32> {
        self.array(field).map(u32::from_be_bytes)
    }

    /// A `uint64`.
    #[inline]
    pub fn u64(&mut self, field: &'static str) -> Result<u64> {
        self.array(field).map(u64::from_be_bytes)
    }

    /// The length in front of a vector: 1, 2 or 4 octets, in its shortest form (RFC 9420 §2.1.2).
    #[inline]
    fn length(&mut self, field: &'static str) -> Result<usize> {
        let offset = self.offset;
        let malformed = |reason| Err(Error::Malformed { field, offset, reason });
        let Some(&first) = self.rest.first() else { return Err(self.short(field, 1)) };
        match first >> 6 {
            0 => {
                self.u8(field)?;
                Ok(usize::from(first))
            }
            1 => match self.u16(field)? & 0x3fff {
                0..64 => malformed("its length is not in the shortest form"),
                long => Ok(usize::from(long)),
            },
            2 => match self.u32(field)? & 0x3fff_ffff {
                0..0x4000 => malformed("its length is not in the shortest form"),
                long => Ok(long as usize),
            },
            _ => malformed("its length begins with the reserved bits 11"),
        }
    }

    /// An `opaque<V>`.
    #[inline]
    pub fn vector(&mut self, field: &'static str) -> Result<&'a [u8]> {
        let start = self.offset;
        let n = self.length(field)?;
        let Some((head, rest)) = self.rest.split_at_checked(n) else {
            return Err(match self.short(field, n) {
                Error::Incomplete { need, .. } => Error::Incomplete { field, offset: start, need },
                Error::Malformed { reason, .. } => Error::Malformed { field, offset: start, reason },
            });
        };
        self.rest = rest;
        self.offset += n;
        Ok(head)
    }

    /// An `opaque<V>` that must not be empty.
    #[inline]
    pub fn filled_vector(&mut self, field: &'static str) -> Result<&'a [u8]> {
        let offset = self.offset;
        match self.vector(field)? {
            [] => Err(Error::Malformed { field, offset, reason: "it is empty" }),
            filled => Ok(filled),
        }
    }

    /// The inside of a vector, as a reader of its own.
    pub fn sub(&mut self, field: &'static str) -> Result<Reader<'a>> {
        let inside = self.vector(field)?;
        Ok(Reader { rest: inside, offset: self.offset - inside.len(), whole: true })
    }

    /// An `FQDN`: `opaque name<V>` (`wire.md`, "Provider names").
    #[inline]
    pub fn provider_name(&mut self, field: &'static str) -> Result<ProviderName<'a>> {
        let offset = self.offset;
        ProviderName::from_bytes(self.vector(field)?).map_err(|InvalidName(reason)| Error::Malformed {
            field,
            offset,
            reason,
        })
    }

    /// An `opaque uri<V>`: a room or user (`IdentifierUri` of draft-ietf-mimi-protocol-06 §5.2).
    #[inline]
    pub fn uri(&mut self, field: &'static str) -> Result<Uri<'a>> {
        let offset = self.offset;
        // One that is too long is not waited for.
        if self.clone().length(field)? > uri::LONGEST {
            return Err(Error::Malformed { field, offset, reason: "a URI is longer than 2048 octets" });
        }
        Uri::from_bytes(self.vector(field)?).map_err(|InvalidUri(reason)| Error::Malformed { field, offset, reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_in_shortest_form_only() {
        let read = |octets: &[u8]| Reader::new(octets).vector("v").map(<[u8]>::len);
        assert_eq!(read(&[0]), Ok(0));
        assert_eq!(read(&[2, 9, 9]), Ok(2));
        let mut long = vec![0x40, 64];
        long.extend([0; 64]);
        assert_eq!(read(&long), Ok(64));
        let mut longest = vec![0x80, 0, 0x40, 0];
        longest.extend([0; 0x4000]);
        assert_eq!(read(&longest), Ok(0x4000));
        for wrong in [&[0x40, 63][..], &[0x80, 0, 0x3f, 0xff], &[0xc0], &[0xff, 1, 2, 3, 4, 5, 6, 7]] {
            assert!(matches!(read(wrong), Err(Error::Malformed { offset: 0, .. })), "{wrong:?}");
        }
    }

    #[test]
    fn what_is_missing_is_said() {
        assert_eq!(Reader::new(&[]).vector("v"), Err(Error::Incomplete { field: "v", offset: 0, need: 1 }));
        assert_eq!(Reader::new(&[0x40]).vector("v"), Err(Error::Incomplete { field: "v", offset: 0, need: 2 }));
        assert_eq!(Reader::new(&[0x80, 1]).vector("v"), Err(Error::Incomplete { field: "v", offset: 0, need: 4 }));
        assert_eq!(Reader::new(&[5, 1]).vector("v"), Err(Error::Incomplete { field: "v", offset: 0, need: 6 }));
        // A stranger's gigabyte is a number in an error, not an allocation.
        let huge = [0xbf, 0xff, 0xff, 0xff];
        assert_eq!(
            Reader::new(&huge).vector("v"),
            Err(Error::Incomplete { field: "v", offset: 0, need: 4 + 0x3fff_ffff })
        );
    }

    #[test]
    fn the_inside_of_a_vector_cannot_be_completed() {
        let mut outer = Reader::new(&[2, 5, 1]);
        let mut inner = outer.sub("list").unwrap();
        assert_eq!(
            inner.vector("entry"),
            Err(Error::Malformed { field: "entry", offset: 1, reason: "runs past the end of its vector" })
        );
    }
}
