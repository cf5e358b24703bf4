//! The other dialect, at the same listener: a.example's server speaks MIMI to b.example, which is the hub of one room and is
//! told what happens in another. Where to send what, it reads in b.example's directory. What is let through is at the
//! Delivery Service octet for octet, and so is its answer on the way back; what a hub would make of it is not played.

use http::Method;
use serde_json::Value;

use super::{GUEST, HOME, Members, Play, describe, show, text};
use crate::Error;
use crate::stage::USER_BURST;
use crate::support::client::{Client, Response};
use crate::support::ds::{Ds, Recorded};
use crate::support::encode::{concat, vector};
use crate::support::mimi::{self, Fanned, RatchetTreeOption};
use crate::support::mls::{self, Group, Options, Received};

const FROM: &str = "mimi@a.example";
const ALICE: &str = "mimi://a.example/u/alice";
const CAROL: &str = "mimi://a.example/u/carol";
const BOB: &str = "mimi://b.example/u/bob";
const DAVE: &str = "mimi://c.example/u/dave";
/// Rooms of b.example.
const SUPPER: &str = "mimi://b.example/r/supper";
const BREAKFAST: &str = "mimi://b.example/r/breakfast";
/// A room of a.example.
const WALKS: &str = "mimi://a.example/r/walks";
/// When all of this happens, in milliseconds since 1970.
const NOW: u64 = 1_777_000_000_000;

/// What a.example's server knows of b.example.
struct Rooms<'p, 'a> {
    play: &'p mut Play<'a>,
    /// Its directory: URLs, by the names of endpoints.
    directory: Value,
    /// What they begin with.
    origin: String,
    /// To the gateway, over HTTP/2.
    http2: &'p Client,
    /// To the gateway, over HTTP/1.1.
    http1: &'p Client,
    /// Messages of alice that were let through.
    said: usize,
}

/// A request of a.example's server.
struct Sent<'s> {
    client: &'s Client,
    /// The user it is about, or the provider.
    who: &'s str,
    from: &'s str,
    endpoint: &'s str,
    parameter: &'s str,
    what: &'s str,
    body: Vec<u8>,
}

impl Play<'_> {
    /// Plays all that is of MIMI.
    pub(super) async fn speak_mimi(&mut self) -> Result<(), Error> {
        let stage = self.stage;
        let authority = mimi::host(HOME, Some(stage.addr.port()));
        let http2 = stage.guest().sni(HOME).authority(&authority);
        let http1 = stage.guest().sni(HOME).authority(&authority).http1();
        let stranger = stage.stranger().sni(HOME).authority(&authority);
        let origin = format!("https://{authority}");
        let directory = self.look_up(&http2, &origin).await?;
        let mut rooms = Rooms { play: self, directory, origin, http2: &http2, http1: &http1, said: 0 };
        let mut members = rooms.ask_the_hub().await?;
        rooms.tell_the_others().await?;
        rooms.be_refused(&mut members, &stranger).await?;
        rooms.say_too_much(&mut members).await?;
        stage.nodes.iter().for_each(Ds::clear_response);
        Ok(())
    }

    async fn look_up(&mut self, client: &Client, origin: &str) -> Result<Value, Error> {
        self.ledger.scene("MIMI, at the same listener: a.example reads b.example's directory");
        let answer = self.get(GUEST, client, "/.well-known/mimi-protocol-directory", "", Vec::new(), "200").await?;
        let directory = answer.json();
        let urls = directory.as_object().map_or(0, |urls| urls.len());
        self.check(GUEST, "finds so many URLs in it", "10", &urls.to_string());
        let update = directory.get("update").and_then(Value::as_str).unwrap_or_default();
        self.check(GUEST, "is to update rooms at", &format!("{origin}/v1/update/{{roomId}}"), update);
        Ok(directory)
    }
}

impl Rooms<'_, '_> {
    async fn ask_the_hub(&mut self) -> Result<Members, Error> {
        self.play.ledger.scene("b.example is the hub of a room: alice is in it, and carol joins it from outside");
        let [alice, bob, carol] = [ALICE, BOB, CAROL].map(mls::Client::new);
        let (mut at_alice, mut at_bob) = pair(&alice, &bob, b"mimi://b.example/g/supper");

        // A hub seals it for the one who asks, which is not for a gateway to see.
        let info = at_bob.group_info(true);
        let body = group_info_request(&carol);
        self.pass(sent(self.http2, CAROL, "groupInfo", SUPPER, "to join the room", body), 200, &info).await?;
        let (mut at_carol, commit) = carol.join_by_external_commit(&info, None);
        let body = bundle(&commit, &at_carol);
        let asked = sent(self.http2, CAROL, "update", SUPPER, "an external commit", body);
        let seen = self.pass(asked, 200, &updated()).await?;
        for member in [&mut at_alice, &mut at_bob] {
            self.takes(member, part(&seen, 0, commit.len()), Received::Commit);
        }

        let commit = at_alice.update();
        let body = bundle(&commit, &at_alice);
        let asked = sent(self.http2, ALICE, "update", SUPPER, "a commit", body);
        let seen = self.pass(asked, 200, &updated()).await?;
        for member in [&mut at_bob, &mut at_carol] {
            self.takes(member, part(&seen, 0, commit.len()), Received::Commit);
        }

        self.say(&mut at_alice, SUPPER, "supper at eight?", &mut [&mut at_bob, &mut at_carol]).await?;
        let asked = sent(self.http2, ALICE, "reportAbuse", SUPPER, "of dave@c.example", abuse_report());
        self.pass(asked, 201, &[]).await?;
        Ok(Members { alice: at_alice, bob: at_bob, carol: at_carol })
    }

    async fn tell_the_others(&mut self) -> Result<(), Error> {
        self.play.ledger.scene("a.example is the hub of another: bob is found, asked, added, and told what is said");
        let [alice, bob] = [ALICE, BOB].map(mls::Client::new);
        let handle = "im:bob@b.example";
        let asked = sent(self.http2, ALICE, "identifierQuery", HOME, handle, identifier_query(handle));
        self.pass(asked, 200, &found(BOB)).await?;

        // Both forms of the path: with the user, as the draft's directory has it, and with the domain, as its text does.
        let body = consent(mimi::REQUEST, ALICE, BOB, Vec::new());
        self.pass(sent(self.http2, ALICE, "requestConsent", BOB, "may alice add bob?", body), 201, &[]).await?;
        let body = consent(mimi::GRANT, BOB, ALICE, vec![bare_key_package(&alice.key_package())]);
        self.pass(sent(self.http2, ALICE, "updateConsent", HOME, "bob may add alice", body), 201, &[]).await?;

        let key_package = bob.key_package();
        let asked = sent(self.http2, ALICE, "keyMaterial", BOB, "to add bob", key_material_request(&alice));
        self.pass(asked, 200, &key_material(&bare_key_package(&key_package))).await?;

        let options = Options { ratchet_tree_extension: false, ..Options::default() };
        let mut at_alice = alice.create_group_with(b"mimi://a.example/g/walks", &options);
        let added = at_alice.add(&[key_package]);
        let body = fanout(&added.welcome, Fanned::Welcome(RatchetTreeOption::Full(at_alice.ratchet_tree())));
        let told = sent(self.http1, GUEST, "notify", WALKS, "a Welcome, and the tree", body);
        let seen = self.pass(told, 201, &[]).await?;
        let [welcome, tree] = welcome_and_tree(&seen, added.welcome.len()).ok_or("no Welcome has come")?;
        let mut at_bob = bob.join_with(welcome, Some(tree), &options);

        let words = "a walk on Sunday?";
        let message = at_alice.send(words.as_bytes());
        let body = fanout(&message, Fanned::Application(None));
        let seen = self.pass(sent(self.http1, GUEST, "notify", WALKS, words, body), 201, &[]).await?;
        self.takes(&mut at_bob, part(&seen, 8, message.len()), text(words));
        Ok(())
    }

    async fn be_refused(&mut self, members: &mut Members, stranger: &Client) -> Result<(), Error> {
        self.play.ledger.scene("What is not for this hub, not theirs to send, or not to be read");
        let stage = self.play.stage;
        let elsewhere = stage.guest().sni(HOME).authority("c.example");
        let message = members.alice.send(b"salad, too");
        let (body, of_dave) = (submission(&message, ALICE), submission(&message, DAVE));
        stage.save("submit_message.bin", &body)?;
        let cut = part(&body, 0, 40).to_vec();
        let says = |client, what, body| sent(client, ALICE, "submitMessage", SUPPER, what, body);
        let unread = "400 with field, offset";

        self.refuse(says(&elsewhere, "to Host c.example", body.clone()), "421").await?;
        let asked = says(self.http2, "to a room of c.example", body.clone());
        self.refuse(Sent { parameter: "mimi://c.example/r/supper", ..asked }, "421").await?;
        self.refuse(says(self.http2, "of a user of c.example", of_dave.clone()), "403").await?;
        let asked = says(self.http2, "the same, From c.example", of_dave);
        self.refuse(Sent { from: "mimi@c.example", ..asked }, "403").await?;
        self.refuse(says(stranger, "without a certificate", body.clone()), "403").await?;
        let asked = says(self.http2, "From: Alice <mimi@a.example>", body);
        self.refuse(Sent { from: "Alice <mimi@a.example>", ..asked }, unread).await?;
        self.refuse(says(self.http2, "cut off", cut), unread).await?;
        let body = key_material_request(&mls::Client::new(ALICE));
        let of_another = "mimi://b.example/u/bobby";
        let what = "of another user than the path's";
        self.refuse(sent(self.http2, ALICE, "keyMaterial", of_another, what, body), unread).await?;
        let url = "https://elsewhere.example/cat.jpg";
        let what = "from a host that is not listed";
        self.refuse(sent(self.http2, GUEST, "proxyDownload", url, what, Vec::new()), "403").await?;
        Ok(())
    }

    async fn say_too_much(&mut self, members: &mut Members) -> Result<(), Error> {
        let title = format!("alice may say {USER_BURST} things at once, in whatever rooms, as everyone, and goes on");
        self.play.ledger.scene(&title);
        let [alice, bob] = [ALICE, BOB].map(mls::Client::new);
        let (mut at_breakfast, _) = pair(&alice, &bob, b"mimi://b.example/g/breakfast");
        while self.said < USER_BURST {
            let words = (self.said + 1).to_string();
            let (group, room) = match self.said % 2 {
                1 => (&mut at_breakfast, BREAKFAST),
                _ => (&mut members.alice, SUPPER),
            };
            self.say(group, room, &words, &mut []).await?;
        }
        for (group, room, what) in [
            (&mut at_breakfast, BREAKFAST, "one more at breakfast"),
            (&mut members.alice, SUPPER, "one more at supper"),
        ] {
            let body = submission(&group.send(what.as_bytes()), ALICE);
            let asked = sent(self.http2, ALICE, "submitMessage", room, what, body);
            self.refuse(asked, "429 with Retry-After").await?;
        }
        self.say(&mut members.carol, SUPPER, "enough", &mut [&mut members.bob]).await
    }

    /// Sends an application message to a room of b.example, where others then read it.
    async fn say(
        &mut self,
        from: &mut Group,
        room: &str,
        words: &str,
        readers: &mut [&mut Group],
    ) -> Result<(), Error> {
        let who = from.client().name().to_owned();
        let message = from.send(words.as_bytes());
        let asked = sent(self.http2, &who, "submitMessage", room, words, submission(&message, &who));
        let seen = self.pass(asked, 200, &accepted()).await?;
        self.said += usize::from(who == ALICE);
        for reader in readers {
            self.takes(reader, part(&seen, 1, message.len()), text(words));
        }
        Ok(())
    }

    /// A member takes a message that the Delivery Service has.
    fn takes(&mut self, member: &mut Group, message: &[u8], expected: Received) {
        let who = name_of(member.client().name());
        let got = member.try_process(message).map_or_else(|error| error, |got| show(&[got]));
        self.play.check(&who, "takes what the DS has", &show(&[expected]), &got);
    }

    /// Sends what is to be let through, and to be answered so: both octet for octet. What comes back here is the body that the
    /// Delivery Service has seen; none, if it has seen another.
    async fn pass(&mut self, sent: Sent<'_>, status: u16, answer: &[u8]) -> Result<Vec<u8>, Error> {
        let stage = self.play.stage;
        for node in &stage.nodes {
            node.set_response(status, &[], answer.to_vec());
        }
        let (path, response) = self.send(&sent).await?;
        // It is not asked where strangers are.
        let path = path.replacen("/v1/", "/hub/", 1);
        let is_it = |request: &Recorded| request.path == path && request.body == sent.body;
        let seen = stage.nodes.iter().flat_map(Ds::requests).find(is_it);
        let answered = response.status.as_u16() == status && response.body == answer;
        self.play.at_ds += usize::from(answered);
        let expected = format!("{status} from the DS, as sent");
        let got = match (answered, &seen) {
            (true, Some(_)) => expected.clone(),
            (true, None) => format!("{status}, but other octets at the DS"),
            (false, _) => describe(&response),
        };
        self.note(&sent, &expected, &got, &response);
        Ok(seen.map(|request| request.body).unwrap_or_default())
    }

    /// Sends what is to be refused.
    async fn refuse(&mut self, sent: Sent<'_>, expected: &str) -> Result<(), Error> {
        let (_, response) = self.send(&sent).await?;
        self.note(&sent, expected, &describe(&response), &response);
        Ok(())
    }

    /// Sends a request where the directory says. The path, and what came.
    async fn send(&self, sent: &Sent<'_>) -> Result<(String, Response), Error> {
        let path = self.path(sent.endpoint, sent.parameter)?;
        let method = if sent.endpoint == "proxyDownload" { Method::GET } else { Method::POST };
        // The draft has no content type.
        let headers = [("from", sent.from), ("content-type", "")];
        let came = sent.client.send_with(method, &path, &headers, sent.body.clone()).await;
        let response = came.map_err(|error| format!("{}: {}: {error}", sent.endpoint, sent.what))?;
        Ok((path, response))
    }

    /// The path that the directory has for an endpoint, with its parameter.
    fn path(&self, endpoint: &str, parameter: &str) -> Result<String, Error> {
        let url = self.directory.get(endpoint).and_then(Value::as_str);
        let template = url.and_then(|url| url.strip_prefix(self.origin.as_str())).and_then(|path| path.split_once('{'));
        let parts = template.and_then(|(before, rest)| Some((before, rest.split_once('}')?.1)));
        let (before, after) = parts.ok_or_else(|| format!("the directory has no place for {endpoint}"))?;
        let parameter = mimi::Encoding::Usual.of(parameter.as_bytes());
        Ok(format!("{before}{parameter}{after}"))
    }

    fn note(&mut self, sent: &Sent<'_>, expected: &str, got: &str, response: &Response) {
        let what = format!("{}: {}", sent.endpoint, sent.what);
        self.play.ledger.step(&name_of(sent.who), &what, expected, got, Some(response.elapsed));
        self.play.remark(response);
    }
}

fn sent<'s>(
    client: &'s Client,
    who: &'s str,
    endpoint: &'s str,
    parameter: &'s str,
    what: &'s str,
    body: Vec<u8>,
) -> Sent<'s> {
    Sent { client, who, from: FROM, endpoint, parameter, what, body }
}

/// The group of a room of b.example, as its two members have it: bob has founded it and added alice.
fn pair(alice: &mls::Client, bob: &mls::Client, id: &[u8]) -> (Group, Group) {
    let mut at_bob = bob.create_group(id);
    let added = at_bob.add(&[alice.key_package()]);
    (alice.join(&added.welcome, None), at_bob)
}

/// `alice@a.example` of `mimi://a.example/u/alice`.
fn name_of(uri: &str) -> String {
    let parts = uri.strip_prefix("mimi://").and_then(|rest| rest.split_once("/u/"));
    parts.map_or_else(|| uri.to_owned(), |(provider, user)| format!("{user}@{provider}"))
}

/// So many octets; none, if there are fewer.
fn part(octets: &[u8], from: usize, length: usize) -> &[u8] {
    octets.get(from..from + length).unwrap_or_default()
}

/// Of a fanned out Welcome of so many octets: it, and the tree that follows it.
fn welcome_and_tree(octets: &[u8], length: usize) -> Option<[&[u8]; 2]> {
    let (welcome, option) = octets.get(8..)?.split_at_checked(length)?;
    Some([welcome, option.get(1..)?])
}

fn credential(client: &mls::Client) -> mimi::Credential {
    mimi::Credential::Basic(client.name().into())
}

fn bare_key_package(key_package: &openmls::prelude::KeyPackage) -> Vec<u8> {
    mimi::bare(&mls::key_package_octets(key_package))
}

fn group_info_request(client: &mls::Client) -> Vec<u8> {
    let request = mimi::GroupInfoRequest {
        protocol: mimi::MLS10,
        ciphersuite: mimi::CIPHERSUITE,
        signature_key: client.signature_key(),
        credential: credential(client),
        group_info_public_key: vec![7; 32],
        joining_code: Vec::new(),
        signature: Vec::new(),
    };
    request.signed(|octets| client.sign(octets)).encode()
}

/// `HandshakeBundle` of a commit, with the group as it is after it.
fn bundle(commit: &[u8], after: &Group) -> Vec<u8> {
    let bundle = mimi::HandshakeBundle::Commit {
        commit: commit.to_vec(),
        welcome: None,
        group_info: mimi::GroupInfoOption::Full(mimi::bare(&after.group_info(false))),
        ratchet_tree: RatchetTreeOption::Full(after.ratchet_tree()),
    };
    bundle.encode()
}

/// `UpdateRoomResponse` of success.
fn updated() -> Vec<u8> {
    concat(&[&[0, 0], &NOW.to_be_bytes()])
}

fn submission(message: &[u8], user: &str) -> Vec<u8> {
    mimi::SubmitMessageRequest { protocol: mimi::MLS10, message: message.to_vec(), sending_uri: user.into() }.encode()
}

/// `SubmitMessageResponse` of success, without a frank.
fn accepted() -> Vec<u8> {
    concat(&[&[mimi::MLS10, 0], &NOW.to_be_bytes(), &[0]])
}

fn abuse_report() -> Vec<u8> {
    let report = mimi::AbuseReport {
        reporting_user: ALICE.into(),
        alleged_abuser_uri: DAVE.into(),
        reason: 0,
        note: b"he sells things".to_vec(),
        messages: Vec::new(),
        extensions: mimi::AppDataDictionary::default(),
    };
    report.encode()
}

fn identifier_query(handle: &str) -> Vec<u8> {
    let elements = vec![mimi::QueryElement::new(mimi::HANDLE, handle.as_bytes())];
    mimi::IdentifierRequest { elements, extensions: mimi::AppDataDictionary::default() }.encode()
}

/// `IdentifierResponse` of success: a user.
fn found(user: &str) -> Vec<u8> {
    concat(&[&[0], &vector(&vector(user.as_bytes())), &[0, 0]])
}

fn consent(operation: u8, requester: &str, target: &str, key_packages: Vec<Vec<u8>>) -> Vec<u8> {
    let entry = mimi::ConsentEntry {
        operation,
        requester_uri: requester.into(),
        target_uri: target.into(),
        room_id: None,
        key_packages,
        extensions: mimi::AppDataDictionary::default(),
    };
    entry.encode()
}

/// Asks for KeyPackages of bob, for a room of a.example.
fn key_material_request(client: &mls::Client) -> Vec<u8> {
    let request = mimi::KeyMaterialRequest {
        protocol: mimi::MLS10,
        requesting_user: client.name().into(),
        target_user: BOB.into(),
        room_id: WALKS.into(),
        ciphersuites: vec![mimi::CIPHERSUITE],
        capabilities: mimi::RequiredCapabilities::default(),
        signature_key: client.signature_key(),
        credential: credential(client),
        signature: Vec::new(),
    };
    request.signed(|octets| client.sign(octets)).encode()
}

/// `KeyMaterialResponse` of success: a KeyPackage of bob's only client.
fn key_material(key_package: &[u8]) -> Vec<u8> {
    let client = concat(&[&[0], &vector(b"mimi://b.example/d/bobs-telephone"), key_package]);
    concat(&[&[mimi::MLS10, 0], &vector(BOB.as_bytes()), &vector(&client)])
}

fn fanout(message: &[u8], fanned: Fanned) -> Vec<u8> {
    mimi::FanoutMessage { timestamp: NOW, message: message.to_vec(), fanned }.encode()
}
