//! The MIMI protocol: draft-ietf-mimi-protocol-06, of which `wire.md` ("Dialect `mimi`") says what a gateway takes.
//! Ten endpoints, and the directory document, which the gateway answers from its configuration.
//!
//! Who asks stands in `From`, whom in `Host`, and the room or user mostly in the path; bodies hold the rest. What is
//! wrong with the head is said before anything of the body. Who must be whom is not checked here: each reader names the
//! providers that must be ours and those that must be the sender, and the step behind compares.
//!
//! The draft lets a handshake message be a `SemiPrivateMessage`. That has no wire format of RFC 9420 and hides its
//! sender from all but the hub; `wire.md` has public messages only, so it is malformed.

use super::{Answer, By, Dialect, Endpoint, Envelope, Facts, Head, Member, Named, Operation, Supplies};
use crate::wire::{Error, InvalidName, InvalidUri, ProviderName, Reader, Result, Uri, mls};
use http::Method;
use serde::{Serialize, Serializer};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

const NOTHING: Supplies = Supplies { group: false, member: false, target: false, many: false };
const IN_A_ROOM: Supplies = Supplies { group: true, member: true, target: false, many: false };
const TO_A_USER: Supplies = Supplies { group: true, member: true, target: true, many: false };

// Every endpoint has one operation, of the same name.
macro_rules! endpoints {
    ($($operation:ident = $id:literal $name:literal $method:ident $path:literal
       $max_body:expr, $by:expr, $supplies:expr;)*) => {
        $(static $operation: Operation = Operation { id: $id, name: $name, endpoint: $name, supplies: $supplies };)*
        static ENDPOINTS: &[&Endpoint] = &[$({
            static ENDPOINT: Endpoint = Endpoint {
                name: $name, method: Method::$method, path: $path, operations: &[&$operation], max_body: $max_body,
                content_type: None, by: $by,
            };
            &ENDPOINT
        }),*];
    };
}

// In the order of the draft's directory document (§5.1).
endpoints! {
    KEY_MATERIAL = 20 "keyMaterial" POST "/keyMaterial/{targetUser}" 64 * KIB,
        By::DeliveryService(key_material), TO_A_USER;
    UPDATE = 21 "update" POST "/update/{roomId}" 8 * MIB, By::DeliveryService(update), IN_A_ROOM;
    NOTIFY = 22 "notify" POST "/notify/{roomId}" 8 * MIB, By::DeliveryService(notify), IN_A_ROOM;
    SUBMIT_MESSAGE = 23 "submitMessage" POST "/submitMessage/{roomId}" 256 * KIB,
        By::DeliveryService(submit_message), IN_A_ROOM;
    GROUP_INFO = 24 "groupInfo" POST "/groupInfo/{roomId}" 64 * KIB, By::DeliveryService(group_info), IN_A_ROOM;
    REQUEST_CONSENT = 25 "requestConsent" POST "/requestConsent/{targetUser}" 256 * KIB,
        By::DeliveryService(request_consent), TO_A_USER;
    UPDATE_CONSENT = 26 "updateConsent" POST "/updateConsent/{requesterUser}" 256 * KIB,
        By::DeliveryService(update_consent), TO_A_USER;
    IDENTIFIER_QUERY = 27 "identifierQuery" POST "/identifierQuery/{domain}" 48 * KIB,
        By::DeliveryService(identifier_query), Supplies { group: false, member: false, target: false, many: true };
    REPORT_ABUSE = 28 "reportAbuse" POST "/reportAbuse/{roomId}" MIB, By::DeliveryService(report_abuse), IN_A_ROOM;
    PROXY_DOWNLOAD = 29 "proxyDownload" GET "/proxyDownload/{downloadUrl}" 0, By::Fetched(proxy_download), NOTHING;
    DIRECTORY = 30 "directory" GET "/.well-known/mimi-protocol-directory" 0, By::Gateway(directory), NOTHING;
}

/// The dialect.
pub static DIALECT: Dialect =
    Dialect { name: "mimi", endpoints: ENDPOINTS, rooms: true, names_sender_in_from: true, mutual_tls: true };

/// The directory document (§5.1): the URLs of all that is served, but of itself.
fn directory(facts: &Facts<'_>) -> Answer {
    let body = serde_json::to_vec(&Directory(facts)).unwrap_or_default();
    Answer { content_type: "application/json", body }
}

struct Directory<'a>(&'a Facts<'a>);

impl Serialize for Directory<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let Facts { authority, routes, .. } = *self.0;
        // One after another, as the draft has them: a map of `serde_json` would sort them.
        serializer.collect_map(ENDPOINTS.iter().filter_map(|endpoint| {
            if let By::Gateway(_) = endpoint.by {
                return None;
            }
            let route = routes.routes().find(|route| route.endpoint.name == endpoint.name)?;
            Some((endpoint.name, format!("https://{authority}{}", route.path().as_str())))
        }))
    }
}

#[cold]
fn malformed(field: &'static str, offset: usize, reason: &'static str) -> Error {
    Error::Malformed { field, offset, reason }
}

/// What the head alone says, of the request's sender and recipient.
#[inline]
fn addressed<'a>(operation: &'static Operation, head: &Head<'a>) -> Result<Envelope<'a>> {
    let Some(sender) = head.from.and_then(|from| from.strip_prefix(b"mimi@")) else {
        return Err(malformed("From", 0, "it is not mimi@ and a domain name, once"));
    };
    let sender = ProviderName::from_bytes(sender).map_err(|InvalidName(reason)| malformed("From", 0, reason))?;
    let recipient =
        ProviderName::from_bytes(head.host.as_bytes()).map_err(|InvalidName(reason)| malformed("Host", 0, reason))?;
    Ok(Envelope {
        operation,
        sender,
        recipient,
        ours: [None, None],
        theirs: [None, None],
        room: None,
        group_id: None,
        member: None,
        target: None,
        cost: 1,
        decided_at: 0,
    })
}

/// The room or user that the path's parameter is, which is called `field`.
#[inline]
fn uri_of_path<'a>(head: &Head<'a>, field: &'static str) -> Result<Uri<'a>> {
    Uri::from_bytes(head.parameter.as_bytes()).map_err(|InvalidUri(reason)| malformed(field, 0, reason))
}

/// `Protocol` (§5): MLS 1.0 is the only one there is.
#[inline]
fn protocol(r: &mut Reader<'_>) -> Result<()> {
    let offset = r.offset();
    match r.u8("protocol")? {
        1 => Ok(()),
        _ => Err(malformed("protocol", offset, "it is not mls10")),
    }
}

/// An `IdentifierUri` that may be empty.
fn uri_or_empty<'a>(r: &mut Reader<'a>, field: &'static str) -> Result<Option<Uri<'a>>> {
    let offset = r.offset();
    match r.vector(field)? {
        [] => Ok(None),
        uri => Uri::from_bytes(uri).map(Some).map_err(|InvalidUri(reason)| malformed(field, offset, reason)),
    }
}

/// The leaf of a public message's sender, where it has one.
fn leaf(sender: mls::Sender) -> Option<Member<'static>> {
    match sender {
        mls::Sender::Member(leaf) => Some(Member::LeafIndex(leaf)),
        mls::Sender::Other => None,
    }
}

/// `KeyMaterialRequest` (§5.2): the hub of a room asks for key packages of one of our users.
fn key_material<'a>(head: &Head<'a>, body: &'a [u8]) -> Result<Envelope<'a>> {
    let addressed = addressed(&KEY_MATERIAL, head)?;
    let asked = uri_of_path(head, "targetUser")?;
    let mut r = Reader::new(body);
    protocol(&mut r)?;
    let requester = r.uri("requestingUser")?;
    let offset = r.offset();
    let target = r.uri("targetUser")?;
    if target != asked {
        return Err(malformed("targetUser", offset, "it is another than the path's"));
    }
    let room = uri_or_empty(&mut r, "roomId")?;
    Ok(Envelope {
        ours: [Some(target.provider()), None],
        theirs: [room.map(|room| room.provider()), None],
        room,
        member: Some(Member::Uri(requester)),
        target: Some(Named::Uri(target)),
        decided_at: r.offset(),
        ..addressed
    })
}

/// `UpdateRequest` (§5.3): a `HandshakeBundle`, which begins with a proposal or commit.
fn update<'a>(head: &Head<'a>, body: &'a [u8]) -> Result<Envelope<'a>> {
    let addressed = addressed(&UPDATE, head)?;
    let room = uri_of_path(head, "roomId")?;
    let mut r = Reader::new(body);
    let mls::Head::Public { group_id, sender } = mls::head(&mut r)? else {
        return Err(malformed("proposalOrCommit", 0, "it is not a public message"));
    };
    Ok(Envelope {
        ours: [Some(room.provider()), None],
        room: Some(room),
        group_id: Some(group_id),
        member: leaf(sender),
        decided_at: r.offset(),
        ..addressed
    })
}

/// `FanoutMessage` (§5.5): the hub hands on what happened in its room. There may be several, one behind another, all
/// of one room: the first says which group.
fn notify<'a>(head: &Head<'a>, body: &'a [u8]) -> Result<Envelope<'a>> {
    let addressed = addressed(&NOTIFY, head)?;
    let room = uri_of_path(head, "roomId")?;
    let mut r = Reader::new(body);
    r.u64("timestamp")?;
    let (group_id, member) = match mls::head(&mut r)? {
        mls::Head::Public { group_id, sender } => (Some(group_id), leaf(sender)),
        mls::Head::Private { group_id } => (Some(group_id), None),
        mls::Head::Welcome => (None, None),
    };
    Ok(Envelope {
        theirs: [Some(room.provider()), None],
        room: Some(room),
        group_id,
        member,
        decided_at: r.offset(),
        ..addressed
    })
}

/// `SubmitMessageRequest` (§5.4): its sender stands after the message (`PrivateMessage`, RFC 9420 §6.3), which is read
/// to its end therefore. Only to find that: what is in it is the Delivery Service's business.
fn submit_message<'a>(head: &Head<'a>, body: &'a [u8]) -> Result<Envelope<'a>> {
    let addressed = addressed(&SUBMIT_MESSAGE, head)?;
    let room = uri_of_path(head, "roomId")?;
    let mut r = Reader::new(body);
    protocol(&mut r)?;
    let offset = r.offset();
    let mls::Head::Private { group_id } = mls::head(&mut r)? else {
        return Err(malformed("appMessage", offset, "it is not a private message"));
    };
    r.u64("epoch")?;
    r.u8("content_type")?;
    r.vector("authenticated_data")?;
    r.vector("encrypted_sender_data")?;
    r.vector("ciphertext")?;
    let sending = r.uri("sendingUri")?;
    Ok(Envelope {
        ours: [Some(room.provider()), None],
        theirs: [Some(sending.provider()), None],
        room: Some(room),
        group_id: Some(group_id),
        member: Some(Member::Uri(sending)),
        decided_at: r.offset(),
        ..addressed
    })
}

/// `GroupInfoRequest` (§5.6): a client that is to join the room, known by its signature key.
fn group_info<'a>(head: &Head<'a>, body: &'a [u8]) -> Result<Envelope<'a>> {
    let addressed = addressed(&GROUP_INFO, head)?;
    let room = uri_of_path(head, "roomId")?;
    let mut r = Reader::new(body);
    protocol(&mut r)?;
    r.u16("cipher_suite")?;
    let key = r.filled_vector("requestingSignatureKey")?;
    // Credential (RFC 9420 §5.3): an identity in a basic(1) one, certificates in an x509(2) one. Either is a vector,
    // and what a type of another draft holds is taken to be one.
    r.u16("requestingCredential")?;
    r.vector("requestingCredential")?;
    Ok(Envelope {
        ours: [Some(room.provider()), None],
        room: Some(room),
        member: Some(Member::SignatureKey(key)),
        decided_at: r.offset(),
        ..addressed
    })
}

/// Which of the two users of a `ConsentEntry` speaks. The other is the one that is spoken to: the target of limits.
#[derive(Clone, Copy)]
enum Speaks {
    /// It asks for consent, or no longer does.
    Requester,
    /// It gives consent, or takes it back.
    Target,
}

fn request_consent<'a>(head: &Head<'a>, body: &'a [u8]) -> Result<Envelope<'a>> {
    consent(head, body, Speaks::Requester)
}

fn update_consent<'a>(head: &Head<'a>, body: &'a [u8]) -> Result<Envelope<'a>> {
    consent(head, body, Speaks::Target)
}

/// `ConsentEntry` (§5.7). The draft's text has a provider's domain in the path, its directory the URI of a user: either
/// will do, and the user must be the one that the body is for.
fn consent<'a>(head: &Head<'a>, body: &'a [u8], speaks: Speaks) -> Result<Envelope<'a>> {
    let (operation, parameter, operations) = match speaks {
        Speaks::Requester => (&REQUEST_CONSENT, "targetUser", 0..=1u8),
        Speaks::Target => (&UPDATE_CONSENT, "requesterUser", 2..=3u8),
    };
    let addressed = addressed(operation, head)?;
    let domain = ProviderName::from_bytes(head.parameter.as_bytes()).ok();
    let user = Uri::from_bytes(head.parameter.as_bytes()).ok();
    if domain.is_none() && user.is_none() {
        return Err(malformed(parameter, 0, "it is neither a provider's domain nor a user's URI"));
    }
    let mut r = Reader::new(body);
    if !operations.contains(&r.u8("consentOperation")?) {
        return Err(malformed("consentOperation", 0, "no operation of this endpoint"));
    }
    let requester_at = r.offset();
    let requester = r.uri("requesterUri")?;
    let target_at = r.offset();
    let target = r.uri("targetUri")?;
    let (speaker, spoken_to, field, offset) = match speaks {
        Speaks::Requester => (requester, target, "targetUri", target_at),
        Speaks::Target => (target, requester, "requesterUri", requester_at),
    };
    if user.is_some_and(|user| user != spoken_to) {
        return Err(malformed(field, offset, "it is another than the path's"));
    }
    let offset = r.offset();
    let room = match r.u8("roomId")? {
        0 => None,
        1 => Some(r.uri("roomId")?),
        _ => return Err(malformed("roomId", offset, "whether it is there is neither 0 nor 1")),
    };
    Ok(Envelope {
        ours: [Some(spoken_to.provider()), domain],
        theirs: [Some(speaker.provider()), None],
        room,
        member: Some(Member::Uri(speaker)),
        target: Some(Named::Uri(spoken_to)),
        decided_at: r.offset(),
        ..addressed
    })
}

/// `IdentifierRequest` (§5.8): as dear as it has elements.
fn identifier_query<'a>(head: &Head<'a>, body: &'a [u8]) -> Result<Envelope<'a>> {
    let addressed = addressed(&IDENTIFIER_QUERY, head)?;
    let domain = ProviderName::from_bytes(head.parameter.as_bytes())
        .map_err(|InvalidName(reason)| malformed("domain", 0, reason))?;
    let mut r = Reader::new(body);
    let mut elements = r.sub("query_elements")?;
    let mut cost = 0u32;
    while !elements.is_empty() {
        let offset = elements.offset();
        match elements.u8("searchType")? {
            1..=6 => {}
            7 => {
                elements.vector("claimName")?;
            }
            8 => {
                elements.vector("propertyName")?;
            }
            // What an unknown type has before its value is not known either.
            _ => return Err(malformed("searchType", offset, "no search type of the draft")),
        }
        elements.vector("searchValue")?;
        cost = cost.saturating_add(1);
    }
    if cost == 0 {
        return Err(malformed("query_elements", 0, "it is empty"));
    }
    Ok(Envelope { ours: [Some(domain), None], cost, decided_at: r.offset(), ..addressed })
}

/// `AbuseReport` (§5.9), to the hub. The accused is not its target: else reports of a few would use up what the limits
/// let through about somebody, and keep those of others away.
fn report_abuse<'a>(head: &Head<'a>, body: &'a [u8]) -> Result<Envelope<'a>> {
    let addressed = addressed(&REPORT_ABUSE, head)?;
    let room = uri_of_path(head, "roomId")?;
    let mut r = Reader::new(body);
    let reporter = uri_or_empty(&mut r, "reportingUser")?;
    r.uri("allegedAbuserUri")?;
    Ok(Envelope {
        ours: [Some(room.provider()), None],
        room: Some(room),
        member: reporter.map(Member::Uri),
        decided_at: r.offset(),
        ..addressed
    })
}

/// A download by way of the hub (§5.10.2). Whether its URL may be fetched is for who fetches it to say.
fn proxy_download<'a>(head: &Head<'a>, _: &'a [u8]) -> Result<Envelope<'a>> {
    addressed(&PROXY_DOWNLOAD, head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::{DIALECTS, Routes, Template};

    const ROOM: &str = "mimi://b.example/r/room";
    const THEIR_ROOM: &str = "mimi://a.example/r/room";
    const ALICE: &str = "mimi://a.example/u/alice";
    const BOB: &str = "mimi://b.example/u/bob";
    const GROUP: &[u8] = b"group";

    /// `opaque<V>` of less than 64 octets.
    fn vector(octets: impl AsRef<[u8]>) -> Vec<u8> {
        let octets = octets.as_ref();
        assert!(octets.len() < 64);
        [&[octets.len() as u8][..], octets].concat()
    }

    /// A public message up to its sender.
    fn public(sender: &[u8]) -> Vec<u8> {
        [&[0, 1, 0, 1][..], &vector(GROUP), &[0; 8], sender].concat()
    }

    /// A public message of the member at leaf 7.
    fn public_of_a_member() -> Vec<u8> {
        public(&[1, 0, 0, 0, 7])
    }

    fn private() -> Vec<u8> {
        let head = [&[0, 1, 0, 2][..], &vector(GROUP), &[0, 0, 0, 0, 0, 0, 0, 9, 1]].concat();
        [head, vector("aad"), vector("sender data"), vector([5u8; 60])].concat()
    }

    fn head(parameter: &str) -> Head<'_> {
        Head { host: "b.example", from: Some(b"mimi@a.example"), parameter }
    }

    fn read<'a>(endpoint: &str, head: &Head<'a>, body: &'a [u8]) -> Result<Envelope<'a>> {
        ENDPOINTS.iter().find(|one| one.name == endpoint).unwrap().read(head, body)
    }

    fn name(name: &str) -> ProviderName<'_> {
        ProviderName::from_bytes(name.as_bytes()).unwrap()
    }

    fn uri(text: &str) -> Uri<'_> {
        Uri::from_bytes(text.as_bytes()).unwrap()
    }

    /// Reads `body`, which is decided at its end: not before, and whatever follows.
    fn accepted<'a>(endpoint: &str, parameter: &'a str, body: &'a [u8]) -> Envelope<'a> {
        let head = head(parameter);
        let envelope = read(endpoint, &head, body).unwrap();
        assert_eq!(envelope.decided_at, body.len());
        assert_eq!(envelope.operation.name, endpoint);
        assert_eq!((envelope.sender, envelope.recipient), (name("a.example"), name("b.example")));
        for come in 0..body.len() {
            match read(endpoint, &head, &body[..come]).unwrap_err() {
                Error::Incomplete { offset, need, .. } => assert!(offset <= come && come < need && need <= body.len()),
                error => panic!("{endpoint}, {come} octets: {error}"),
            }
        }
        let more = [body, &[0xff; 99][..]].concat();
        assert_eq!(read(endpoint, &head, &more).unwrap(), envelope);
        envelope
    }

    /// The field and the offset that are wrong.
    fn wrong(endpoint: &str, parameter: &str, body: &[u8]) -> (&'static str, usize) {
        let error = read(endpoint, &head(parameter), body).unwrap_err();
        assert!(!error.is_incomplete(), "{endpoint} {parameter}: {error}");
        error.place()
    }

    /// The parameter that each endpoint takes, and a body that it accepts.
    fn bodies() -> Vec<(&'static str, &'static str, Vec<u8>)> {
        let private = private();
        vec![
            ("keyMaterial", BOB, [vec![1], vector(ALICE), vector(BOB), vector(THEIR_ROOM)].concat()),
            ("update", ROOM, public_of_a_member()),
            ("notify", THEIR_ROOM, [&[0; 8][..], &public_of_a_member()].concat()),
            ("submitMessage", ROOM, [&[1][..], &private, &vector(ALICE)].concat()),
            ("groupInfo", ROOM, [vec![1, 0, 1], vector("key"), vec![0, 1], vector(ALICE)].concat()),
            ("requestConsent", "b.example", [vec![1], vector(ALICE), vector(BOB), vec![0]].concat()),
            ("updateConsent", "b.example", [vec![2], vector(BOB), vector(ALICE), vec![0]].concat()),
            ("identifierQuery", "b.example", vector([&[1][..], &vector("im:bob@b.example")].concat())),
            ("reportAbuse", ROOM, [vector(ALICE), vector(BOB)].concat()),
        ]
    }

    #[test]
    fn every_endpoint_accepts_and_decides_where_it_can() {
        for (endpoint, parameter, body) in &bodies() {
            accepted(endpoint, parameter, body);
        }
        assert_eq!(bodies().len() + 2, ENDPOINTS.len());
        assert_eq!(read("proxyDownload", &head("https://x.example/a"), &[]).unwrap().decided_at, 0);
        assert!(read("directory", &head(""), &[]).is_err());
    }

    #[test]
    fn from_is_one_address_of_mimi_and_nothing_else() {
        let bad: [&[u8]; 20] = [
            b"",
            b"mimi",
            b"mimi@",
            b"@a.example",
            b"a.example",
            b"alice@a.example",
            b"Mimi@a.example",
            b"MIMI@a.example",
            b"<mimi@a.example>",
            b"Mimi <mimi@a.example>",
            b"mimi@a.example, mimi@c.example",
            b"mimi@a.example,",
            b" mimi@a.example",
            b"mimi@a.example ",
            b"mimi@a.example.",
            b"mimi@mimi@a.example",
            b"mimi@a.example:443",
            b"mimi@[192.0.2.1]",
            b"\"mimi\"@a.example",
            b"mimi@\xfc.example",
        ];
        for (endpoint, parameter, body) in &bodies() {
            for from in bad.map(Some).into_iter().chain([None]) {
                // Nothing that is wrong elsewhere comes before it, and no octet of a body is waited for.
                let cases: [(&str, &[u8]); 3] = [(*parameter, &body[..]), (*parameter, b""), ("", b"\xff")];
                for (parameter, body) in cases {
                    let head = Head { from, ..head(parameter) };
                    assert_eq!(read(endpoint, &head, body).unwrap_err().place(), ("From", 0), "{endpoint} {from:?}");
                }
            }
            let head = Head { from: Some(b"mimi@A.Example"), ..head(parameter) };
            assert_eq!(read(endpoint, &head, body).unwrap().sender, name("a.example"));
        }
        let fetched = Head { from: None, ..head("https://x.example/a") };
        assert_eq!(read("proxyDownload", &fetched, &[]).unwrap_err().place(), ("From", 0));
    }

    #[test]
    fn host_is_a_domain() {
        for (endpoint, parameter, body) in &bodies() {
            for host in ["", "b.example.", "b_.example", "192.0.2.1:443", "[::1]", "b.example/x", "ü.example"] {
                let head = Head { host, ..head(parameter) };
                assert_eq!(read(endpoint, &head, body).unwrap_err().place(), ("Host", 0), "{endpoint} {host}");
                assert!(!read(endpoint, &head, &[]).unwrap_err().is_incomplete());
            }
            let head = Head { host: "C.Example", ..head(parameter) };
            assert_eq!(read(endpoint, &head, body).unwrap().recipient, name("c.example"));
        }
    }

    #[test]
    fn what_the_path_names_is_a_uri_or_a_domain() {
        for (endpoint, field, takes_domain) in [
            ("keyMaterial", "targetUser", false),
            ("update", "roomId", false),
            ("notify", "roomId", false),
            ("submitMessage", "roomId", false),
            ("groupInfo", "roomId", false),
            ("reportAbuse", "roomId", false),
            ("requestConsent", "targetUser", true),
            ("updateConsent", "requesterUser", true),
        ] {
            for parameter in ["", "mimi:room", "mimi://b.example:1/r", "mimi://b.example/%zz", "b..example"] {
                assert_eq!(wrong(endpoint, parameter, &[]), (field, 0), "{parameter}");
            }
            assert_eq!(read(endpoint, &head("b.example"), &[]).unwrap_err().is_incomplete(), takes_domain);
            assert!(read(endpoint, &head("im:bob@b.example"), &[]).unwrap_err().is_incomplete());
        }
        for parameter in ["", "b..example", BOB, "b.example:1"] {
            assert_eq!(wrong("identifierQuery", parameter, &[]), ("domain", 0), "{parameter}");
        }
    }

    #[test]
    fn key_material_says_for_whom_and_who_must_ask() {
        let [begin, alice, bob] = [vec![1], vector(ALICE), vector(BOB)];
        let body = [&begin[..], &alice, &bob, &vector(THEIR_ROOM)].concat();
        let envelope = accepted("keyMaterial", "MIMI://B.example/u/bob", &body);
        assert_eq!(envelope.ours, [Some(name("b.example")), None]);
        assert_eq!(envelope.theirs, [Some(name("a.example")), None]);
        assert_eq!((envelope.room, envelope.group_id, envelope.cost), (Some(uri(THEIR_ROOM)), None, 1));
        assert_eq!(envelope.member, Some(Member::Uri(uri(ALICE))));
        assert_eq!(envelope.target, Some(Named::Uri(uri(BOB))));
        // The room's provider is whoever's it is; whether that is the sender is seen later.
        let body = [&begin[..], &alice, &bob, &vector("mimi://c.example/r")].concat();
        assert_eq!(accepted("keyMaterial", BOB, &body).theirs, [Some(name("c.example")), None]);
        let body = [&begin[..], &alice, &bob, &vector("")].concat();
        let envelope = accepted("keyMaterial", BOB, &body);
        assert_eq!((envelope.room, envelope.theirs), (None, [None, None]));

        let target_at = 1 + alice.len();
        let room_at = target_at + bob.len();
        assert_eq!(wrong("keyMaterial", BOB, &[0]), ("protocol", 0));
        assert_eq!(wrong("keyMaterial", BOB, &[2]), ("protocol", 0));
        assert_eq!(wrong("keyMaterial", BOB, &[1, 0]), ("requestingUser", 1));
        assert_eq!(wrong("keyMaterial", BOB, &[1, 0xc0]), ("requestingUser", 1));
        assert_eq!(wrong("keyMaterial", BOB, &[&begin[..], &alice, &[0]].concat()), ("targetUser", target_at));
        for path in ["mimi://b.example/u/bob2", "mimi://b.example/u/Bob", "mimi://c.example/u/bob"] {
            assert_eq!(wrong("keyMaterial", path, &[&begin[..], &alice, &bob].concat()), ("targetUser", target_at));
        }
        let body = [&begin[..], &alice, &bob, &vector("room")].concat();
        assert_eq!(wrong("keyMaterial", BOB, &body), ("roomId", room_at));
    }

    #[test]
    fn an_update_is_a_public_message_to_our_room() {
        let body = public_of_a_member();
        let envelope = accepted("update", ROOM, &body);
        assert_eq!((envelope.ours, envelope.theirs), ([Some(name("b.example")), None], [None, None]));
        assert_eq!((envelope.room, envelope.group_id), (Some(uri(ROOM)), Some(GROUP)));
        assert_eq!((envelope.member, envelope.target), (Some(Member::LeafIndex(7)), None));
        let body = public(&[4]);
        assert_eq!(accepted("update", ROOM, &body).member, None);
        assert_eq!(accepted("update", THEIR_ROOM, &body).ours, [Some(name("a.example")), None]);
        assert_eq!(wrong("update", ROOM, &private()), ("proposalOrCommit", 0));
        assert_eq!(wrong("update", ROOM, &[0, 1, 0, 3]), ("proposalOrCommit", 0));
        assert_eq!(wrong("update", ROOM, &[0, 2]), ("MLSMessage.version", 0));
        assert_eq!(wrong("update", ROOM, &[0, 1, 0, 9]), ("MLSMessage.wire_format", 2));
        assert_eq!(wrong("update", ROOM, &[0, 1, 0, 1, 0]), ("group_id", 4));
        assert_eq!(wrong("update", ROOM, &public(&[0])), ("MLSMessage.sender_type", 18));
    }

    #[test]
    fn a_hub_fans_out_any_message_of_its_room() {
        let timestamp = [0u8, 0, 1, 2, 3, 4, 5, 6];
        let body = [&timestamp[..], &public_of_a_member()].concat();
        let envelope = accepted("notify", THEIR_ROOM, &body);
        assert_eq!((envelope.ours, envelope.theirs), ([None, None], [Some(name("a.example")), None]));
        assert_eq!((envelope.room, envelope.group_id), (Some(uri(THEIR_ROOM)), Some(GROUP)));
        assert_eq!((envelope.member, envelope.target), (Some(Member::LeafIndex(7)), None));
        let head = [&[0, 1, 0, 2][..], &vector(GROUP)].concat();
        let body = [&timestamp[..], &head].concat();
        let envelope = accepted("notify", THEIR_ROOM, &body);
        assert_eq!((envelope.group_id, envelope.member), (Some(GROUP), None));
        let body = [&timestamp[..], &[0, 1, 0, 3]].concat();
        let envelope = accepted("notify", ROOM, &body);
        assert_eq!((envelope.room, envelope.group_id, envelope.member), (Some(uri(ROOM)), None, None));
        assert_eq!(envelope.theirs, [Some(name("b.example")), None]);
        assert_eq!(wrong("notify", ROOM, &[&timestamp[..], &[0, 1, 0, 5]].concat()), ("MLSMessage.wire_format", 10));
    }

    #[test]
    fn a_message_is_read_up_to_its_sender() {
        let private = private();
        let body = [&[1][..], &private, &vector(ALICE)].concat();
        let envelope = accepted("submitMessage", ROOM, &body);
        assert_eq!(envelope.ours, [Some(name("b.example")), None]);
        assert_eq!(envelope.theirs, [Some(name("a.example")), None]);
        assert_eq!((envelope.room, envelope.group_id), (Some(uri(ROOM)), Some(GROUP)));
        assert_eq!((envelope.member, envelope.target), (Some(Member::Uri(uri(ALICE))), None));
        let body = [&[1][..], &private, &vector("im:eve@c.example")].concat();
        assert_eq!(accepted("submitMessage", ROOM, &body).theirs, [Some(name("c.example")), None]);

        assert_eq!(wrong("submitMessage", ROOM, &[2]), ("protocol", 0));
        assert_eq!(wrong("submitMessage", ROOM, &[&[1][..], &public_of_a_member()].concat()), ("appMessage", 1));
        assert_eq!(wrong("submitMessage", ROOM, &[1, 0, 1, 0, 3]), ("appMessage", 1));
        assert_eq!(wrong("submitMessage", ROOM, &[1, 0, 1, 0, 2, 0]), ("group_id", 5));
        let begin = [&[1, 0, 1, 0, 2][..], &vector(GROUP), &[0; 8], &[1]].concat();
        assert_eq!(wrong("submitMessage", ROOM, &[&begin[..], &[0xc0]].concat()), ("authenticated_data", 20));
        assert_eq!(wrong("submitMessage", ROOM, &[&begin[..], &[0, 0xc0]].concat()), ("encrypted_sender_data", 21));
        assert_eq!(wrong("submitMessage", ROOM, &[&begin[..], &[0, 0, 0x40, 1]].concat()), ("ciphertext", 22));
        assert_eq!(wrong("submitMessage", ROOM, &[&begin[..], &[0, 0, 0, 0]].concat()), ("sendingUri", 23));
        let body = [&begin[..], &[0, 0, 0], &vector("alice@a.example")].concat();
        assert_eq!(wrong("submitMessage", ROOM, &body), ("sendingUri", 23));
    }

    #[test]
    fn whoever_asks_for_a_group_is_known_by_its_key() {
        for credential in [[vec![0, 1], vector(ALICE)], [vec![0, 2], vector([1u8, 48])], [vec![9, 9], vector("")]] {
            let body = [&[1, 0, 1][..], &vector("key"), &credential.concat()].concat();
            let envelope = accepted("groupInfo", ROOM, &body);
            assert_eq!((envelope.ours, envelope.theirs), ([Some(name("b.example")), None], [None, None]));
            assert_eq!((envelope.room, envelope.group_id), (Some(uri(ROOM)), None));
            assert_eq!((envelope.member, envelope.target), (Some(Member::SignatureKey(b"key")), None));
        }
        assert_eq!(wrong("groupInfo", ROOM, &[0]), ("protocol", 0));
        assert_eq!(wrong("groupInfo", ROOM, &[1, 0, 1, 0]), ("requestingSignatureKey", 3));
        assert_eq!(wrong("groupInfo", ROOM, &[1, 0, 1, 1, 9, 0, 1, 0xff]), ("requestingCredential", 7));
    }

    #[test]
    fn consent_is_asked_of_our_user_by_theirs() {
        let [alice, bob] = [vector(ALICE), vector(BOB)];
        for operation in [0u8, 1] {
            let body = [&[operation][..], &alice, &bob, &[1], &vector("mimi://c.example/r")].concat();
            let envelope = accepted("requestConsent", "B.example", &body);
            assert_eq!(envelope.ours, [Some(name("b.example")), Some(name("b.example"))]);
            assert_eq!(envelope.theirs, [Some(name("a.example")), None]);
            assert_eq!((envelope.room, envelope.group_id), (Some(uri("mimi://c.example/r")), None));
            assert_eq!(envelope.member, Some(Member::Uri(uri(ALICE))));
            assert_eq!(envelope.target, Some(Named::Uri(uri(BOB))));
        }
        let body = [&[1][..], &alice, &bob, &[0]].concat();
        // A domain that is not the user's provider must be ours as well; a user's URI says no more than the body.
        assert_eq!(
            accepted("requestConsent", "c.example", &body).ours,
            [Some(name("b.example")), Some(name("c.example"))]
        );
        let envelope = accepted("requestConsent", "mimi://B.example/u/bob", &body);
        assert_eq!((envelope.ours, envelope.room), ([Some(name("b.example")), None], None));

        let [target_at, room_at] = [1 + alice.len(), 1 + alice.len() + bob.len()];
        for operation in [2, 3, 4, 255] {
            assert_eq!(wrong("requestConsent", "b.example", &[operation]), ("consentOperation", 0));
        }
        assert_eq!(wrong("requestConsent", "b.example", &[1, 0]), ("requesterUri", 1));
        assert_eq!(wrong("requestConsent", "b.example", &[&[1][..], &alice, &[0]].concat()), ("targetUri", target_at));
        for path in [ALICE, "mimi://b.example/u/bob2", "mimi://c.example/u/bob"] {
            assert_eq!(wrong("requestConsent", path, &body), ("targetUri", target_at), "{path}");
        }
        for flag in [&[2][..], &[255], &[24]] {
            let body = [&[1][..], &alice, &bob, flag].concat();
            assert_eq!(wrong("requestConsent", "b.example", &body), ("roomId", room_at));
        }
        let body = [&[1][..], &alice, &bob, &[1, 0]].concat();
        assert_eq!(wrong("requestConsent", "b.example", &body), ("roomId", room_at + 1));
    }

    #[test]
    fn consent_is_given_to_our_user_by_theirs() {
        let [alice, bob] = [vector(ALICE), vector(BOB)];
        for operation in [2u8, 3] {
            // Bob asked; Alice speaks.
            let body = [&[operation][..], &bob, &alice, &[0]].concat();
            let envelope = accepted("updateConsent", "b.example", &body);
            assert_eq!(envelope.ours, [Some(name("b.example")), Some(name("b.example"))]);
            assert_eq!(envelope.theirs, [Some(name("a.example")), None]);
            assert_eq!(envelope.member, Some(Member::Uri(uri(ALICE))));
            assert_eq!(envelope.target, Some(Named::Uri(uri(BOB))));
            assert_eq!(accepted("updateConsent", BOB, &body).ours, [Some(name("b.example")), None]);
            assert_eq!(wrong("updateConsent", ALICE, &body), ("requesterUri", 1));
        }
        for operation in [0, 1, 4, 255] {
            assert_eq!(wrong("updateConsent", "b.example", &[operation]), ("consentOperation", 0));
        }
    }

    #[test]
    fn a_query_costs_as_much_as_it_has_elements() {
        let plain = |kind: u8| [vec![kind], vector("x")].concat();
        let body = vector((1..=6).flat_map(plain).collect::<Vec<u8>>());
        let envelope = accepted("identifierQuery", "B.example", &body);
        assert_eq!((envelope.cost, envelope.ours), (6, [Some(name("b.example")), None]));
        assert_eq!((envelope.group(), envelope.member, envelope.target), (None, None, None));
        let body = vector([vec![7], vector("given_name"), vector("Bob"), vec![8], vector("ORG"), vector("")].concat());
        assert_eq!(accepted("identifierQuery", "b.example", &body).cost, 2);

        let cases: &[(&[u8], (&str, usize))] = &[
            (&[0], ("query_elements", 0)),
            (&[0xc0], ("query_elements", 0)),
            (&[2, 0, 0], ("searchType", 1)),
            (&[2, 9, 0], ("searchType", 1)),
            (&[4, 1, 0, 255, 0], ("searchType", 3)),
            (&[1, 1], ("searchValue", 2)),
            (&[2, 1, 1], ("searchValue", 2)),
            (&[1, 7], ("claimName", 2)),
            (&[2, 7, 0], ("searchValue", 3)),
            (&[2, 8, 1], ("propertyName", 2)),
            // One more octet behind the list does not make its last element whole.
            (&[2, 1, 1, b'x'], ("searchValue", 2)),
        ];
        for (body, place) in cases {
            assert_eq!(wrong("identifierQuery", "b.example", body), *place, "{body:?}");
        }
    }

    #[test]
    fn a_report_may_be_anonymous_and_has_no_target() {
        let body = [vector(ALICE), vector(BOB)].concat();
        let envelope = accepted("reportAbuse", ROOM, &body);
        assert_eq!((envelope.ours, envelope.theirs), ([Some(name("b.example")), None], [None, None]));
        assert_eq!((envelope.room, envelope.group_id), (Some(uri(ROOM)), None));
        assert_eq!((envelope.member, envelope.target), (Some(Member::Uri(uri(ALICE))), None));
        let body = [vector(""), vector(BOB)].concat();
        assert_eq!(accepted("reportAbuse", ROOM, &body).member, None);
        assert_eq!(wrong("reportAbuse", ROOM, &vector("alice")), ("reportingUser", 0));
        assert_eq!(wrong("reportAbuse", ROOM, &[0, 0]), ("allegedAbuserUri", 1));
    }

    #[test]
    fn a_download_is_known_by_its_head() {
        let head = head("https://x.example/a");
        let envelope = read("proxyDownload", &head, b"ignored").unwrap();
        assert_eq!((envelope.sender, envelope.recipient), (name("a.example"), name("b.example")));
        assert_eq!((envelope.ours, envelope.theirs), ([None, None], [None, None]));
        assert_eq!((envelope.operation.name, envelope.decided_at), ("proxyDownload", 0));
    }

    #[test]
    fn operations_supply_what_their_requests_name() {
        for (endpoint, parameter, body) in &bodies() {
            let envelope = accepted(endpoint, parameter, body);
            let supplies = envelope.operation.supplies;
            assert!(supplies.group || envelope.group().is_none(), "{endpoint}");
            assert!(supplies.member || envelope.member.is_none(), "{endpoint}");
            assert_eq!(supplies.target, envelope.target.is_some(), "{endpoint}");
            assert_eq!(supplies.many, *endpoint == "identifierQuery");
        }
    }

    #[test]
    fn the_directory_has_what_is_served_in_the_drafts_order() {
        let template = |path| Some(Template::parse(path).unwrap());
        let update = |name: &str| match name {
            "update" => (template("/v1/update/{room}"), template("/u/{room}")),
            _ => (None, None),
        };
        let routes = Routes::new(DIALECTS, &update).unwrap();
        let facts = Facts { authority: "mimi.b.example:8443", ds_domain: "ds.b.example", routes: &routes };
        let By::Gateway(answer) = ENDPOINTS.iter().find(|one| one.name == "directory").unwrap().by else {
            panic!("the gateway does not answer it");
        };
        let Answer { content_type, body } = answer(&facts);
        assert_eq!(content_type, "application/json");
        let expected = concat!(
            r#"{"keyMaterial":"https://mimi.b.example:8443/keyMaterial/{targetUser}","#,
            r#""update":"https://mimi.b.example:8443/v1/update/{room}","#,
            r#""notify":"https://mimi.b.example:8443/notify/{roomId}","#,
            r#""submitMessage":"https://mimi.b.example:8443/submitMessage/{roomId}","#,
            r#""groupInfo":"https://mimi.b.example:8443/groupInfo/{roomId}","#,
            r#""requestConsent":"https://mimi.b.example:8443/requestConsent/{targetUser}","#,
            r#""updateConsent":"https://mimi.b.example:8443/updateConsent/{requesterUser}","#,
            r#""identifierQuery":"https://mimi.b.example:8443/identifierQuery/{domain}","#,
            r#""reportAbuse":"https://mimi.b.example:8443/reportAbuse/{roomId}","#,
            r#""proxyDownload":"https://mimi.b.example:8443/proxyDownload/{downloadUrl}"}"#,
        );
        assert_eq!(String::from_utf8(body).unwrap(), expected);
        let facts = Facts { routes: &Routes::default(), ..facts };
        assert_eq!(answer(&facts).body, b"{}");
    }
}
