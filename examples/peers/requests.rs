//! What is sent: `send_message` of the dialect `moh`, padded to a size, of a few groups and members in turn.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use crate::Error;
use crate::support::encode::{self, SenderId};

pub const KIB: usize = 1 << 10;
pub const MIB: usize = 1 << 20;

/// The host that is asked.
pub const NAME: &str = "ds.b.example";

/// Who sends, and to whom.
pub const SENDER: &str = "a.example";
pub const RECIPIENT: &str = "b.example";

/// Groups that there are messages of, and what they take in memory at most.
const GROUPS: usize = 64;
const MEMORY: usize = 16 * MIB;

/// Octets of a group's ID.
pub const GROUP_LENGTH: usize = 16;

/// How requests come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Over connections that are kept.
    Http1,
    /// Over fewer that are kept, many at once on each.
    Http2,
    /// HTTP/1.1, each over a connection of its own.
    New,
}

/// Requests that are measured together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    pub way: Way,
    /// Octets of each body.
    pub size: usize,
}

impl Case {
    pub const ALL: [Case; 7] = [
        Case { way: Way::Http1, size: KIB },
        Case { way: Way::Http1, size: 64 * KIB },
        Case { way: Way::Http1, size: 4 * MIB },
        Case { way: Way::Http2, size: KIB },
        Case { way: Way::Http2, size: 64 * KIB },
        Case { way: Way::Http2, size: 4 * MIB },
        Case { way: Way::New, size: KIB },
    ];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Http1 => "HTTP/1.1",
            Way::Http2 => "HTTP/2",
            Way::New => "new connections",
        })
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (size, unit) = if self.size < MIB { (self.size / KIB, "KiB") } else { (self.size / MIB, "MiB") };
        write!(f, "{}, {size} {unit}", self.way)
    }
}

/// Where a group's ID is in each body: after the two providers come a leaf, the type, the head of the MLS message, and a length.
pub fn group_at() -> usize {
    encode::header(SENDER, RECIPIENT).len() + 5 + 1 + 4 + 1
}

/// What requests have for bodies.
#[derive(Clone)]
pub enum Bodies {
    /// These, in turn.
    Turns(Arc<[Bytes]>),
    /// Each that of a group which is drawn among these.
    Drawn(Arc<Groups>),
}

impl Bodies {
    /// That of a request.
    pub fn body(&self, turn: usize) -> Bytes {
        match self {
            Bodies::Turns(bodies) => bodies[turn % bodies.len()].clone(),
            Bodies::Drawn(groups) => groups.body(rand::random_range(0..groups.count)),
        }
    }
}

/// More groups than there is room for their bodies: each is made when it is sent.
pub struct Groups {
    pub count: u64,
    like: Vec<u8>,
    /// Where the group's ID is in that.
    at: usize,
}

impl Groups {
    /// So many of them, or one, with bodies of so many octets.
    pub fn new(count: u64, size: usize) -> Result<Groups, Error> {
        Ok(Groups { count: count.max(1), like: body(size, 0)?, at: group_at() })
    }

    /// That of one of them.
    pub fn body(&self, group: u64) -> Bytes {
        let (mut body, mut rest) = (self.like.clone(), group);
        for digit in body[self.at..self.at + GROUP_LENGTH].iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        Bytes::from(body)
    }
}

/// Bodies of so many octets.
pub fn bodies(size: usize) -> Result<Arc<[Bytes]>, Error> {
    (0..GROUPS.min(MEMORY / size)).map(|n| body(size, n).map(Bytes::from)).collect()
}

/// That of the group and member of this number.
pub fn body(size: usize, n: usize) -> Result<Vec<u8>, Error> {
    let group = format!("{n:0GROUP_LENGTH$}");
    let build = |ciphertext: usize| {
        let message = encode::concat(&[
            // mls10, mls_private_message
            &[0, 1, 0, 2],
            &encode::vector(group.as_bytes()),
            // The epoch, and that it is an application message.
            &[0, 0, 0, 0, 0, 0, 0, 1, 1],
            &encode::vector(&[]),
            &encode::vector(&[0x5a; 28]),
            &encode::vector(&vec![0x5a; ciphertext]),
        ]);
        let member = SenderId::Leaf(u32::try_from(n).unwrap_or_default());
        encode::ds_request(SENDER, RECIPIENT, &member, encode::SEND_MESSAGE, &message, &[0x5a; 64])
    };
    // A longer ciphertext has a longer length before it.
    let room = size.checked_sub(build(0).len()).ok_or("a body has no room for its fields")?;
    let body = (0..=3).filter_map(|more| Some(build(room.checked_sub(more)?))).find(|body| body.len() == size);
    Ok(body.ok_or_else(|| format!("no message has {size} octets"))?)
}
