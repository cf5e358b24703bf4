//! MIMI over HTTPS: draft-kohbrok-mimi-moh, with the octets that `wire.md` ("Dialect `moh`") pins where no published
//! draft does. Eight endpoints towards the Delivery Service, and the discovery document, which the gateway answers.

use super::{Answer, By, Dialect, Endpoint, Envelope, Facts, Member, Named, Operation, Supplies};
use crate::wire::{Error, ProviderName, Reader, Result, mls};
use http::Method;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

const IN_A_GROUP: Supplies = Supplies { group: true, member: true, target: false, many: false };
const TO_A_CLIENT: Supplies = Supplies { group: true, member: true, target: true, many: false };
const TO_A_USER: Supplies = Supplies { group: false, member: false, target: true, many: false };

macro_rules! operations {
    ($($constant:ident = $id:literal $name:literal at $endpoint:literal $supplies:expr;)*) => {
        $(static $constant: Operation = Operation { id: $id, name: $name, endpoint: $endpoint, supplies: $supplies };)*
    };
}

operations! {
    DELETE_GROUP = 1 "delete_group" at "group_operation" IN_A_GROUP;
    UPDATE_QUEUE_INFO = 2 "update_queue_info" at "group_operation" IN_A_GROUP;
    WELCOME_INFO = 3 "welcome_info" at "welcome_information" IN_A_GROUP;
    EXTERNAL_COMMIT_INFO = 4 "external_commit_info" at "external_commit_information" IN_A_GROUP;
    ADD_USERS = 5 "add_users" at "group_operation" IN_A_GROUP;
    REMOVE_USERS = 6 "remove_users" at "group_operation" IN_A_GROUP;
    ADD_CLIENTS = 7 "add_clients" at "group_operation" IN_A_GROUP;
    REMOVE_CLIENTS = 8 "remove_clients" at "group_operation" IN_A_GROUP;
    UPDATE_CLIENT = 9 "update_client" at "group_operation" IN_A_GROUP;
    RESYNC_CLIENT = 10 "resync_client" at "external_commit_information" IN_A_GROUP;
    UPDATE_CLIENT_FANOUT_INFO = 11 "update_client_fanout_info" at "group_operation" IN_A_GROUP;
    SEND_MESSAGE = 12 "send_message" at "group_operation" IN_A_GROUP;
    VERIFICATION_KEY = 13 "verification_key" at "verification_key"
        Supplies { group: false, member: false, target: false, many: false };
    CONNECTION_REQUEST = 14 "connection_request" at "connection_request" TO_A_CLIENT;
    DELIVER_MESSAGE = 15 "deliver_message" at "deliver_message" TO_A_CLIENT;
    CONNECTION_KEY_PACKAGES = 16 "connection_key_packages" at "connection_key_packages" TO_A_USER;
    GROUP_KEY_PACKAGES = 17 "group_key_packages" at "group_key_packages"
        Supplies { group: true, member: false, target: false, many: true };
    DS_DOMAIN = 18 "ds_domain" at "ds_domain"
        Supplies { group: false, member: false, target: false, many: false };
}

macro_rules! endpoints {
    ($($constant:ident = $name:literal $method:ident $path:literal $max_body:expr, $by:expr, [$($operation:ident),*];)*) => {
        $(static $constant: Endpoint = Endpoint {
            name: $name, method: Method::$method, path: $path, operations: &[$(&$operation),*], max_body: $max_body,
            content_type: Some("application/octet-stream"), by: $by,
        };)*
        static ENDPOINTS: &[&Endpoint] = &[$(&$constant),*];
    };
}

endpoints! {
    GROUP = "group_operation" POST "/group_operation" 8 * MIB, By::DeliveryService(|_, body| group_operation(body)),
        [DELETE_GROUP, UPDATE_QUEUE_INFO, ADD_USERS, REMOVE_USERS, ADD_CLIENTS, REMOVE_CLIENTS, UPDATE_CLIENT,
         UPDATE_CLIENT_FANOUT_INFO, SEND_MESSAGE];
    WELCOME = "welcome_information" GET "/welcome_information" 64 * KIB,
        By::DeliveryService(|_, body| welcome_information(body)), [WELCOME_INFO];
    EXTERNAL_COMMIT = "external_commit_information" GET "/external_commit_information" 64 * KIB,
        By::DeliveryService(|_, body| external_commit_information(body)), [EXTERNAL_COMMIT_INFO, RESYNC_CLIENT];
    VERIFICATION = "verification_key" GET "/verification_key" 4 * KIB,
        By::DeliveryService(|_, body| verification_key(body)), [VERIFICATION_KEY];
    CONNECTION = "connection_request" POST "/connection_request" 256 * KIB,
        By::DeliveryService(|_, body| connection_request(body)), [CONNECTION_REQUEST];
    DELIVERY = "deliver_message" POST "/deliver_message" 8 * MIB,
        By::DeliveryService(|_, body| deliver_message(body)), [DELIVER_MESSAGE];
    CONNECTION_KPS = "connection_key_packages" POST "/connection_key_packages" 16 * KIB,
        By::DeliveryService(|_, body| connection_key_packages(body)), [CONNECTION_KEY_PACKAGES];
    GROUP_KPS = "group_key_packages" POST "/group_key_packages" 48 * KIB,
        By::DeliveryService(|_, body| group_key_packages(body)), [GROUP_KEY_PACKAGES];
    DISCOVERY = "ds_domain" GET "/.well-known/mimi/ds-domain" 0, By::Gateway(ds_domain), [DS_DOMAIN];
}

/// The dialect.
pub static DIALECT: Dialect =
    Dialect { name: "moh", endpoints: ENDPOINTS, rooms: false, names_sender_in_from: false, mutual_tls: false };

/// The discovery document.
fn ds_domain(facts: &Facts<'_>) -> Answer {
    Answer { content_type: "text/plain", body: facts.ds_domain.into() }
}

/// `ProviderHeader`: version, sender, recipient.
#[inline]
fn header<'a>(r: &mut Reader<'a>) -> Result<(ProviderName<'a>, ProviderName<'a>)> {
    let offset = r.offset();
    if r.u16("version")? != 1 {
        return Err(Error::Malformed { field: "version", offset, reason: "it is not mimi10" });
    }
    Ok((r.provider_name("sender")?, r.provider_name("recipient")?))
}

/// `DSSenderID`.
#[inline]
fn sender_id<'a>(r: &mut Reader<'a>) -> Result<Member<'a>> {
    let offset = r.offset();
    Ok(match r.u8("sender_type")? {
        0 => Member::LeafIndex(r.u32("leaf_index")?),
        1 => Member::KeyPackageRef(r.filled_vector("key_package_ref")?),
        2 => Member::UserKeyHash(r.filled_vector("user_key_hash")?),
        _ => return Err(Error::Malformed { field: "sender_type", offset, reason: "no sender type of this version" }),
    })
}

/// Where an operation's group ID stands.
enum GroupIn {
    /// `opaque group_id<V>` comes first.
    Field,
    /// In the commit, a public message.
    Commit,
    /// In the application message, a private message.
    Application,
}

fn group_operation(body: &[u8]) -> Result<Envelope<'_>> {
    ds_request(body, |request_type| {
        Some(match request_type {
            1 => (&DELETE_GROUP, GroupIn::Commit),
            2 => (&UPDATE_QUEUE_INFO, GroupIn::Field),
            5 => (&ADD_USERS, GroupIn::Commit),
            6 => (&REMOVE_USERS, GroupIn::Commit),
            7 => (&ADD_CLIENTS, GroupIn::Commit),
            8 => (&REMOVE_CLIENTS, GroupIn::Commit),
            9 => (&UPDATE_CLIENT, GroupIn::Commit),
            11 => (&UPDATE_CLIENT_FANOUT_INFO, GroupIn::Field),
            12 => (&SEND_MESSAGE, GroupIn::Application),
            _ => return None,
        })
    })
}

fn welcome_information(body: &[u8]) -> Result<Envelope<'_>> {
    ds_request(body, |request_type| (request_type == 3).then_some((&WELCOME_INFO, GroupIn::Field)))
}

fn external_commit_information(body: &[u8]) -> Result<Envelope<'_>> {
    ds_request(body, |request_type| match request_type {
        4 => Some((&EXTERNAL_COMMIT_INFO, GroupIn::Field)),
        10 => Some((&RESYNC_CLIENT, GroupIn::Field)),
        _ => None,
    })
}

/// `DSRequest`; `operation` says what a `request_type` is at this endpoint, or that it is none of its.
#[inline]
fn ds_request(body: &[u8], operation: impl Fn(u8) -> Option<(&'static Operation, GroupIn)>) -> Result<Envelope<'_>> {
    let mut r = Reader::new(body);
    let (sender, recipient) = header(&mut r)?;
    let member = sender_id(&mut r)?;
    let offset = r.offset();
    let Some((operation, group_in)) = operation(r.u8("request_type")?) else {
        return Err(Error::Malformed { field: "request_type", offset, reason: "no operation of this endpoint" });
    };
    let offset = r.offset();
    let group_id = match group_in {
        GroupIn::Field => r.filled_vector("group_id")?,
        GroupIn::Commit => match mls::head(&mut r)? {
            mls::Head::Public { group_id, sender } => {
                // Otherwise one member spends another's limit.
                if let (Member::LeafIndex(claimed), mls::Sender::Member(leaf)) = (member, sender)
                    && claimed != leaf
                {
                    let reason = "its sender is another leaf than sender_id's";
                    return Err(Error::Malformed { field: "commit", offset, reason });
                }
                group_id
            }
            _ => return Err(Error::Malformed { field: "commit", offset, reason: "it is not a public message" }),
        },
        GroupIn::Application => match mls::head(&mut r)? {
            mls::Head::Private { group_id } => group_id,
            _ => {
                let reason = "it is not a private message";
                return Err(Error::Malformed { field: "application_message", offset, reason });
            }
        },
    };
    Ok(Envelope {
        operation,
        sender,
        recipient,
        ours: [Some(recipient), None],
        theirs: [None, None],
        room: None,
        group_id: Some(group_id),
        member: Some(member),
        target: None,
        cost: 1,
        decided_at: r.offset(),
    })
}

/// `VerificationKeyRequest`.
fn verification_key(body: &[u8]) -> Result<Envelope<'_>> {
    let mut r = Reader::new(body);
    let (sender, recipient) = header(&mut r)?;
    Ok(Envelope {
        operation: &VERIFICATION_KEY,
        sender,
        recipient,
        ours: [Some(recipient), None],
        theirs: [None, None],
        room: None,
        group_id: None,
        member: None,
        target: None,
        cost: 1,
        decided_at: r.offset(),
    })
}

fn connection_request(body: &[u8]) -> Result<Envelope<'_>> {
    queueing_request(body, &CONNECTION_REQUEST)
}

fn deliver_message(body: &[u8]) -> Result<Envelope<'_>> {
    queueing_request(body, &DELIVER_MESSAGE)
}

/// `QueueingServiceRequest`.
fn queueing_request<'a>(body: &'a [u8], operation: &'static Operation) -> Result<Envelope<'a>> {
    let mut r = Reader::new(body);
    let (sender, recipient) = header(&mut r)?;
    let target = r.filled_vector("client_queue_information")?;
    let (group_id, member) = match mls::head(&mut r)? {
        mls::Head::Public { group_id, sender } => {
            let member = match sender {
                mls::Sender::Member(leaf) => Some(Member::LeafIndex(leaf)),
                mls::Sender::Other => None,
            };
            (Some(group_id), member)
        }
        mls::Head::Private { group_id } => (Some(group_id), None),
        mls::Head::Welcome => (None, None),
    };
    Ok(Envelope {
        operation,
        sender,
        recipient,
        ours: [Some(recipient), None],
        theirs: [None, None],
        room: None,
        group_id,
        member,
        target: Some(Named::Opaque(target)),
        cost: 1,
        decided_at: r.offset(),
    })
}

/// `ConnectionKeyPackageRequest`.
fn connection_key_packages(body: &[u8]) -> Result<Envelope<'_>> {
    let mut r = Reader::new(body);
    let (sender, recipient) = header(&mut r)?;
    // Not said to be non-empty: an empty one is a target like any other, and no way around its limit.
    let target = r.vector("user_id")?;
    Ok(Envelope {
        operation: &CONNECTION_KEY_PACKAGES,
        sender,
        recipient,
        ours: [Some(recipient), None],
        theirs: [None, None],
        room: None,
        group_id: None,
        member: None,
        target: Some(Named::Opaque(target)),
        cost: 1,
        decided_at: r.offset(),
    })
}

/// `GroupKeyPackageRequest`: as dear as it has clients.
fn group_key_packages(body: &[u8]) -> Result<Envelope<'_>> {
    let mut r = Reader::new(body);
    let (sender, recipient) = header(&mut r)?;
    let group_id = r.filled_vector("group_id")?;
    let offset = r.offset();
    let mut clients = r.sub("client_ids")?;
    let mut cost = 0u32;
    while !clients.is_empty() {
        clients.vector("client_ids")?;
        cost = cost.saturating_add(1);
    }
    if cost == 0 {
        return Err(Error::Malformed { field: "client_ids", offset, reason: "it is empty" });
    }
    Ok(Envelope {
        operation: &GROUP_KEY_PACKAGES,
        sender,
        recipient,
        ours: [Some(recipient), None],
        theirs: [None, None],
        room: None,
        group_id: Some(group_id),
        member: None,
        target: None,
        cost,
        decided_at: r.offset(),
    })
}
