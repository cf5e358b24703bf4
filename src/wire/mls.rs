//! The head of an MLS message (RFC 9420 §6), as far as the gateway needs it: its wire format, its group, and who sends
//! a public one. Content, signatures and ciphertext are the Delivery Service's business.

use super::{Error, Reader, Result};

/// Who a `FramedContent` says sends it (RFC 9420 §6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// A member, by its leaf.
    Member(u32),
    /// An external sender, or a new member: it has no leaf yet.
    Other,
}

/// What the head of an `MLSMessage` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head<'a> {
    /// `mls_public_message`: the group and the sender.
    Public {
        /// Not empty.
        group_id: &'a [u8],
        /// The sender.
        sender: Sender,
    },
    /// `mls_private_message`: the group; the sender is encrypted.
    Private {
        /// Not empty.
        group_id: &'a [u8],
    },
    /// `mls_welcome`: names no group.
    Welcome,
}

/// Reads the head of an `MLSMessage`, and not an octet more than the [`Head`] needs.
#[inline]
pub fn head<'a>(r: &mut Reader<'a>) -> Result<Head<'a>> {
    let offset = r.offset();
    let version = r.u16("MLSMessage.version")?;
    if version != 1 {
        return Err(Error::Malformed { field: "MLSMessage.version", offset, reason: "it is not mls10" });
    }
    let offset = r.offset();
    match r.u16("MLSMessage.wire_format")? {
        1 => {
            let group_id = r.filled_vector("group_id")?;
            r.u64("epoch")?;
            let offset = r.offset();
            let sender = match r.u8("MLSMessage.sender_type")? {
                1 => Sender::Member(r.u32("MLSMessage.leaf_index")?),
                2..=4 => Sender::Other,
                _ => {
                    let reason = "no sender type of RFC 9420";
                    return Err(Error::Malformed { field: "MLSMessage.sender_type", offset, reason });
                }
            };
            Ok(Head::Public { group_id, sender })
        }
        2 => Ok(Head::Private { group_id: r.filled_vector("group_id")? }),
        3 => Ok(Head::Welcome),
        _ => Err(Error::Malformed {
            field: "MLSMessage.wire_format",
            offset,
            reason: "neither a public message, a private message nor a Welcome",
        }),
    }
}
