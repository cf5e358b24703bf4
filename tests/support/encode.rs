//! An encoder of the `moh` dialect, written from the page that defines it (`wire.md`).
//!
//! It shares no code with the gateway's reader and uses no codec of others, so that the two can disagree. It checks
//! nothing: what a correct peer would never send (bad domains, empty group IDs, forced long lengths) can be encoded too.
#![allow(dead_code, unreachable_pub, clippy::panic, clippy::indexing_slicing)]

/// `mimi10`, the only version that the dialect knows.
pub const MIMI10: u16 = 1;

/// `create_group`: has no endpoint, is refused.
pub const CREATE_GROUP: u8 = 0;
/// `delete_group`, at `/group_operation`.
pub const DELETE_GROUP: u8 = 1;
/// `update_queue_info`, at `/group_operation`.
pub const UPDATE_QUEUE_INFO: u8 = 2;
/// `welcome_info`, at `/welcome_information`.
pub const WELCOME_INFO: u8 = 3;
/// `external_commit_info`, at `/external_commit_information`.
pub const EXTERNAL_COMMIT_INFO: u8 = 4;
/// `add_users`, at `/group_operation`.
pub const ADD_USERS: u8 = 5;
/// `remove_users`, at `/group_operation`.
pub const REMOVE_USERS: u8 = 6;
/// `add_clients`, at `/group_operation`.
pub const ADD_CLIENTS: u8 = 7;
/// `remove_clients`, at `/group_operation`.
pub const REMOVE_CLIENTS: u8 = 8;
/// `update_client`, at `/group_operation`.
pub const UPDATE_CLIENT: u8 = 9;
/// `resync_client`, at `/external_commit_information`.
pub const RESYNC_CLIENT: u8 = 10;
/// `update_client_fanout_info`, at `/group_operation`.
pub const UPDATE_CLIENT_FANOUT_INFO: u8 = 11;
/// `send_message`, at `/group_operation`.
pub const SEND_MESSAGE: u8 = 12;

/// `DSSenderID`: who of a group makes a `DSRequest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SenderId {
    /// `leaf_index(0)`
    Leaf(u32),
    /// `key_package_ref(1)`
    KeyPackageRef(Vec<u8>),
    /// `user_key_hash(2)`
    UserKeyHash(Vec<u8>),
}

impl SenderId {
    /// The octets of the `DSSenderID`, its type first.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            SenderId::Leaf(index) => concat(&[&[0], &index.to_be_bytes()]),
            SenderId::KeyPackageRef(reference) => concat(&[&[1], &vector(reference)]),
            SenderId::UserKeyHash(hash) => concat(&[&[2], &vector(hash)]),
        }
    }
}

/// `opaque<V>` of RFC 9420 §2.1.2, its length in the shortest form.
///
/// # Panics
/// Over 2^30 - 1 octets, for which there is no form.
pub fn vector(content: &[u8]) -> Vec<u8> {
    vector_in(1, content)
}

/// `opaque<V>` with a length of 1, 2 or 4 octets: the shortest form that has at least `bytes_of_length` octets and can hold
/// the length. With more octets than needed the encoding is one that RFC 9420 forbids.
///
/// # Panics
/// Over 2^30 - 1 octets, for which there is no form.
pub fn vector_in(bytes_of_length: usize, content: &[u8]) -> Vec<u8> {
    concat(&[&length_in(bytes_of_length, content.len()), content])
}

/// The length alone, as [`vector_in`] would put it: for vectors that promise more, or less, than follows.
///
/// # Panics
/// Over 2^30 - 1.
pub fn length_in(bytes_of_length: usize, length: usize) -> Vec<u8> {
    // The two highest bits of the first octet say how many octets there are: 00 is 1, 01 is 2, 10 is 4, 11 is not allowed.
    let number = match u32::try_from(length) {
        Ok(number) if number < 1 << 30 => number,
        _ => panic!("no vector of RFC 9420 is as long as {length} octets"),
    };
    let [b0, b1, b2, b3] = number.to_be_bytes();
    if bytes_of_length <= 1 && number < 1 << 6 {
        vec![b3]
    } else if bytes_of_length <= 2 && number < 1 << 14 {
        vec![0b0100_0000 | b2, b3]
    } else {
        vec![0b1000_0000 | b0, b1, b2, b3]
    }
}

/// `ProviderHeader`: version `mimi10`, and the two providers' domains as they are given.
pub fn header(sender: &str, recipient: &str) -> Vec<u8> {
    header_of(MIMI10, sender.as_bytes(), recipient.as_bytes())
}

/// `ProviderHeader` of any version, with any octets for domains.
pub fn header_of(version: u16, sender: &[u8], recipient: &[u8]) -> Vec<u8> {
    concat(&[&version.to_be_bytes(), &vector(sender), &vector(recipient)])
}

/// `DSRequest`. `fields` are the operation's own, encoded: one or two MLSMessages, or a group ID and what follows it.
pub fn ds_request(
    sender: &str,
    recipient: &str,
    id: &SenderId,
    request_type: u8,
    fields: &[u8],
    signature: &[u8],
) -> Vec<u8> {
    concat(&[&header(sender, recipient), &id.encode(), &[request_type], fields, &vector(signature)])
}

/// `QueueingServiceRequest`, the body of `/connection_request` and `/deliver_message`. `message` is a whole MLSMessage.
pub fn queueing_request(sender: &str, recipient: &str, client_queue_information: &[u8], message: &[u8]) -> Vec<u8> {
    concat(&[&header(sender, recipient), &vector(client_queue_information), message])
}

/// `VerificationKeyRequest`, the body of `/verification_key`.
pub fn verification_key_request(sender: &str, recipient: &str) -> Vec<u8> {
    header(sender, recipient)
}

/// `ConnectionKeyPackageRequest`, the body of `/connection_key_packages`.
pub fn connection_key_package_request(sender: &str, recipient: &str, user_id: &[u8]) -> Vec<u8> {
    concat(&[&header(sender, recipient), &vector(user_id)])
}

/// `GroupKeyPackageRequest`, the body of `/group_key_packages`.
pub fn group_key_package_request(sender: &str, recipient: &str, group_id: &[u8], client_ids: &[&[u8]]) -> Vec<u8> {
    let list: Vec<u8> = client_ids.iter().flat_map(|client| vector(client)).collect();
    concat(&[&header(sender, recipient), &vector(group_id), &vector(&list)])
}

/// The pieces, one after the other.
pub fn concat(pieces: &[&[u8]]) -> Vec<u8> {
    pieces.concat()
}
