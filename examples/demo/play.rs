//! The play. b.example runs the Delivery Service behind the gateway and owns the group; a.example is a guest with a
//! certificate; c.example is a stranger. All messages are real MLS, made and read by openmls. First they speak MIMI over
//! HTTPS, then at the same listener the MIMI protocol of the working group ([`rooms`]).

mod rooms;

use http::Method;

use crate::Error;
use crate::ledger::Ledger;
use crate::stage::{MEMBER_BURST, Stage};
use crate::support::client::{self, Client, Response};
use crate::support::delivery::{self, Answer};
use crate::support::ds::Ds;
use crate::support::encode::{self, SenderId};
use crate::support::mls::{self, Change, Group, Options, Received};
use crate::support::tokens;

const HOME: &str = "b.example";
const GUEST: &str = "a.example";
const ALICE: &str = "alice@a.example";
const CAROL: &str = "carol@a.example";
const TABLET: &str = "carol's tablet";
const BOB: &str = "bob@b.example";
const DAVE: &str = "dave@c.example";
const GROUP: &[u8] = b"supper at b.example";
/// The DS has done what it was asked.
const DONE: &str = "200 from the DS";

/// Plays all of it. Decisions that are not as expected are in the ledger; an error is something that is not a decision.
pub async fn play(stage: &Stage, ledger: &mut Ledger) -> Result<(), Error> {
    let (http2, http1, stranger, local) = (stage.guest(), stage.guest().http1(), stage.stranger(), stage.local());
    let mut play = Play {
        stage,
        ledger,
        alice: &http2,
        carol: &http1,
        dave: &stranger,
        bob: &local,
        operations_of_alice: 0,
        at_ds: 0,
    };
    play.discover().await?;
    let mut members = play.found_a_group().await?;
    play.talk(&mut members).await?;
    play.join_from_outside(&mut members).await?;
    play.deliver_from_elsewhere().await?;
    play.be_refused(&mut members).await?;
    play.do_too_much(&mut members).await?;
    play.come_as_a_stranger().await?;
    play.speak_mimi().await?;
    play.count();
    Ok(())
}

struct Play<'a> {
    stage: &'a Stage,
    ledger: &'a mut Ledger,
    /// To the gateway, over HTTP/2.
    alice: &'a Client,
    /// To the gateway, over HTTP/1.1.
    carol: &'a Client,
    /// To the gateway, without a certificate.
    dave: &'a Client,
    /// Straight to the DS: bob is at home.
    bob: &'a Client,
    operations_of_alice: usize,
    /// Requests that the DS has answered.
    at_ds: usize,
}

/// Three views of one group.
struct Members {
    alice: Group,
    bob: Group,
    carol: Group,
}

impl Play<'_> {
    async fn discover(&mut self) -> Result<(), Error> {
        self.ledger.scene("a.example looks for b.example's Delivery Service");
        let domain = self.stage.stranger().sni(HOME).authority(HOME);
        let answer = self.get(ALICE, &domain, "/.well-known/mimi/ds-domain", "", Vec::new(), "200").await?;
        self.check(ALICE, "the DS of b.example is at", "ds.b.example", answer.text().trim());

        let body = encode::verification_key_request(GUEST, HOME);
        self.stage.save("verification_key.bin", &body)?;
        let answer = self.get(CAROL, self.carol, "/verification_key", "", body, DONE).await?;
        let same = payload(&answer)? == self.stage.delivery.verification_key();
        self.check(CAROL, "the DS's octets came untouched", "yes", if same { "yes" } else { "no" });

        let old = client::raw_tls12(self.stage.addr, "ds.b.example", self.stage.ca_pem()).await;
        let got = match old {
            Ok(_) => "a connection".to_owned(),
            Err(error) if error.to_string().contains("alert") => "alert".to_owned(),
            Err(error) => error.to_string(),
        };
        self.check("someone", "TLS 1.2", "alert", &got);
        Ok(())
    }

    async fn found_a_group(&mut self) -> Result<Members, Error> {
        self.ledger.scene("bob founds a group at home and adds alice; she adds carol");
        let options = Options { ratchet_tree_extension: false, ..Options::default() };
        let [alice, bob, carol] = [ALICE, BOB, CAROL].map(mls::Client::new);
        let mut at_bob = bob.create_group_with(GROUP, &options);
        self.stage.delivery.found_group(&at_bob.group_info(true));
        let add = at_bob.commit(Change::Add(vec![alice.key_package()]));
        let fields = [add.commit, add.welcome.unwrap_or_default()].concat();
        self.operate(self.bob, &at_bob, encode::ADD_USERS, "add_users: alice", &fields, DONE).await?;
        at_bob.merge();
        let mut at_alice = self.join(self.alice, &alice, &options).await?;

        let ids = [CAROL.as_bytes()];
        self.stage.delivery.publish(CAROL.as_bytes(), mls::key_package_octets(&carol.key_package()));
        let body = encode::group_key_package_request(GUEST, HOME, GROUP, &ids);
        let answer = self.post(ALICE, self.alice, "/group_key_packages", "", body, DONE).await?;
        let key_packages = key_packages(&answer)?;
        let add = at_alice.commit(Change::Add(key_packages));
        let fields = [add.commit, add.welcome.unwrap_or_default()].concat();
        self.operate(self.alice, &at_alice, encode::ADD_USERS, "add_users: carol", &fields, DONE).await?;
        at_alice.merge();
        self.receive(&mut at_bob, &[Received::Commit]);
        let at_carol = self.join(self.carol, &carol, &options).await?;
        Ok(Members { alice: at_alice, bob: at_bob, carol: at_carol })
    }

    /// Joins from the Welcome that the DS has for a client, with the ratchet tree that the gateway lets it have.
    async fn join(&mut self, client: &Client, who: &mls::Client, options: &Options) -> Result<Group, Error> {
        let welcome = self.stage.delivery.fetch(who.name().as_bytes()).pop().ok_or("no Welcome in the queue")?;
        let id = SenderId::UserKeyHash(who.signature_key());
        let fields = [encode::vector(GROUP), encode::vector(&who.signature_key())].concat();
        let body = encode::ds_request(GUEST, HOME, &id, encode::WELCOME_INFO, &fields, &who.sign(&fields));
        let answer = self.get(who.name(), client, "/welcome_information", "", body, DONE).await?;
        let group = who.join_with(&welcome, Some(&payload(&answer)?), options);
        let members = group.leaves().len();
        self.check(who.name(), "joins from the Welcome", "a member", if members > 1 { "a member" } else { "alone" });
        Ok(group)
    }

    async fn talk(&mut self, members: &mut Members) -> Result<(), Error> {
        self.ledger.scene("They talk");
        let Members { alice, bob, carol } = members;
        let update = alice.commit(Change::Update).commit;
        self.operate(self.alice, alice, encode::UPDATE_CLIENT, "update_client", &update, DONE).await?;
        alice.merge();
        self.receive(bob, &[Received::Commit]);
        self.receive(carol, &[Received::Commit]);

        self.say(self.alice, alice, "supper at eight?", DONE).await?;
        self.receive(bob, &[text("supper at eight?")]);
        self.receive(carol, &[text("supper at eight?")]);
        self.say(self.bob, bob, "at nine", DONE).await?;
        self.say(self.carol, carol, "I bring bread", DONE).await?;
        self.receive(alice, &[text("at nine"), text("I bring bread")]);
        self.receive(bob, &[text("I bring bread")]);
        self.receive(carol, &[text("at nine")]);
        Ok(())
    }

    async fn join_from_outside(&mut self, members: &mut Members) -> Result<(), Error> {
        self.ledger.scene("carol's tablet joins by an external commit");
        let Members { alice, bob, carol } = members;
        self.stage.delivery.put_group_info(GROUP, &bob.group_info(true));
        let tablet = mls::Client::new(TABLET);
        let id = SenderId::UserKeyHash(tablet.signature_key());
        let fields = [encode::vector(GROUP), encode::vector(&tablet.signature_key())].concat();
        let body = encode::ds_request(GUEST, HOME, &id, encode::EXTERNAL_COMMIT_INFO, &fields, &tablet.sign(&fields));
        let answer = self.get(TABLET, self.carol, "/external_commit_information", "", body, DONE).await?;
        let (_, commit) = tablet.join_by_external_commit(&payload(&answer)?, None);
        let body = encode::ds_request(GUEST, HOME, &id, encode::ADD_CLIENTS, &commit, &tablet.sign(&commit));
        self.post(TABLET, self.carol, "/group_operation", "add_clients", body, DONE).await?;
        for member in [alice, bob, carol] {
            self.receive(member, &[Received::Commit]);
        }
        Ok(())
    }

    async fn deliver_from_elsewhere(&mut self) -> Result<(), Error> {
        self.ledger.scene("alice connects to bob, in a group that a.example owns");
        let bob = mls::Client::new(BOB);
        self.stage.delivery.publish(BOB.as_bytes(), mls::key_package_octets(&bob.key_package()));
        let body = encode::connection_key_package_request(GUEST, HOME, BOB.as_bytes());
        let answer = self.post(ALICE, self.alice, "/connection_key_packages", "", body, DONE).await?;
        let mut at_alice = mls::Client::new(ALICE).create_group(b"walks of a.example");
        let added = at_alice.add(&key_packages(&answer)?);

        let queue = b"bob's queue, sealed for a.example";
        for (what, message) in [("a Welcome", &added.welcome), ("a message", &at_alice.send(b"a walk on Sunday?"))] {
            let body = encode::queueing_request(GUEST, HOME, queue, message);
            self.post("DS of a.example", self.alice, "/deliver_message", what, body, DONE).await?;
        }
        let queued = self.stage.delivery.fetch(queue);
        let [welcome, message] = queued.as_slice() else { return Err("not two messages in bob's queue".into()) };
        let got = bob.join(welcome, None).process(message);
        self.check(BOB, "fetches", &show(&[text("a walk on Sunday?")]), &show(&[got]));
        Ok(())
    }

    async fn be_refused(&mut self, members: &mut Members) -> Result<(), Error> {
        self.ledger.scene("What is not for this provider, not theirs to send, or not to be read");
        let message = members.carol.send(b"salad, too");
        let id = SenderId::Leaf(members.carol.own_leaf());
        let meant_for = |sender, recipient| {
            encode::ds_request(
                sender,
                recipient,
                &id,
                encode::SEND_MESSAGE,
                &message,
                &members.carol.client().sign(&message),
            )
        };
        let body = meant_for(GUEST, "c.example");
        self.stage.save("misdirected.bin", &body)?;
        self.post(CAROL, self.carol, "/group_operation", "meant for c.example", body, "421").await?;

        let body = meant_for("c.example", HOME);
        self.stage.save("sender_mismatch.bin", &body)?;
        self.post("a.example", self.alice, "/group_operation", "says it is c.example", body, "403").await?;

        let mut body = meant_for(GUEST, HOME);
        self.stage.save("send_message.bin", &body)?;
        body.truncate(40);
        self.stage.save("malformed.bin", &body)?;
        self.post(CAROL, self.carol, "/group_operation", "cut off", body, "400 with field, offset").await?;

        // Her own leaf is another one: who lies about it would spend alice's limit.
        let update = members.carol.commit(Change::Update).commit;
        members.carol.discard();
        let id = SenderId::Leaf(members.alice.own_leaf());
        let body = encode::ds_request(GUEST, HOME, &id, encode::UPDATE_CLIENT, &update, &[]);
        self.post(CAROL, self.carol, "/group_operation", "as alice", body, "400 with field, offset").await?;
        Ok(())
    }

    async fn do_too_much(&mut self, members: &mut Members) -> Result<(), Error> {
        self.ledger.scene(&format!("alice has {MEMBER_BURST} operations at once, as everyone, and goes on"));
        let Members { alice, bob, carol } = members;
        let mut said = Vec::new();
        while self.operations_of_alice < MEMBER_BURST {
            let number = (self.operations_of_alice + 1).to_string();
            self.say(self.alice, alice, &number, DONE).await?;
            said.push(text(&number));
        }
        self.say(self.alice, alice, "one more", "429 with Retry-After").await?;
        self.say(self.carol, carol, "enough", DONE).await?;
        said.push(text("enough"));
        self.receive(bob, &said);
        Ok(())
    }

    async fn come_as_a_stranger(&mut self) -> Result<(), Error> {
        self.ledger.scene("dave of c.example, whom nobody knows, wants to connect to bob");
        let bob = mls::Client::new(BOB);
        let mut at_dave = mls::Client::new(DAVE).create_group(b"dave and bob");
        let added = at_dave.add(&[bob.key_package()]);
        let queue = b"bob's queue for strangers";
        let body = encode::queueing_request("c.example", HOME, queue, &added.welcome);
        self.stage.save("connection_request.bin", &body)?;
        let connect = "/connection_request";
        let refused = self.post(DAVE, self.dave, connect, "", body.clone(), "401 with challenge").await?;

        let challenges = tokens::challenges(&refused.headers);
        let types: Vec<_> = challenges.iter().map(|challenge| challenge.token_type().to_string()).collect();
        self.check(DAVE, "is asked for a token of type", "2, 1 or 5", &types.join(", ").replace(", 5", " or 5"));
        let (issuer, _, origin) = challenges.first().ok_or("401, but no challenge")?.parts();
        self.check(DAVE, &format!("has one made by {issuer} for"), "ds.b.example", &origin);

        for (n, kind) in (1..).zip([2, 1, 5]) {
            let authorization = self.stage.token(kind, connect, "connection_request.bin").await?;
            let with_token = [("authorization", authorization.as_str())];
            let what = format!("with a token of type {kind}");
            self.ask(Ask { headers: &with_token, ..post(DAVE, self.dave, connect, &what, body.clone(), DONE) }).await?;
            let arrived = self.stage.delivery.fetch(queue).iter().filter(|&welcome| *welcome == added.welcome).count();
            self.check(BOB, "has dave's Welcome in his queue", "1", &arrived.to_string());
            if n == 1 {
                let spent = "401 with challenge";
                let what = "with the token again";
                self.ask(Ask { headers: &with_token, ..post(DAVE, self.dave, connect, what, body.clone(), spent) })
                    .await?;
            }
        }
        Ok(())
    }

    fn count(&mut self) {
        self.ledger.scene("What the Delivery Service has seen");
        let [one, two] = self.stage.nodes.each_ref().map(Ds::complete);
        let [expected, got] = [self.at_ds, one + two].map(|count| format!("{count} requests"));
        self.check("DS of b.example", "everything that was let through, and nothing else", &expected, &got);
        self.ledger.note(&format!("{one} at the first node (bob's own among them), {two} at the second"));
    }

    /// Sends an application message.
    async fn say(&mut self, client: &Client, group: &mut Group, words: &str, expected: &str) -> Result<(), Error> {
        let message = group.send(words.as_bytes());
        let what = format!("send_message: {words}");
        self.operate(client, group, encode::SEND_MESSAGE, &what, &message, expected).await
    }

    /// A group operation of the member whose view this is.
    async fn operate(
        &mut self,
        client: &Client,
        group: &Group,
        operation: u8,
        what: &str,
        fields: &[u8],
        expected: &str,
    ) -> Result<(), Error> {
        let who = group.client();
        let sender = who.name().split_once('@').map_or(GUEST, |(_, provider)| provider);
        let id = SenderId::Leaf(group.own_leaf());
        let body = encode::ds_request(sender, HOME, &id, operation, fields, &who.sign(fields));
        self.post(who.name(), client, "/group_operation", what, body, expected).await?;
        self.operations_of_alice += usize::from(who.name() == ALICE);
        Ok(())
    }

    /// Takes what the DS has queued for a member.
    fn receive(&mut self, group: &mut Group, expected: &[Received]) {
        let who = group.client().name().to_owned();
        let queued = self.stage.delivery.fetch(who.as_bytes());
        let got: Result<Vec<Received>, String> = queued.iter().map(|message| group.try_process(message)).collect();
        self.check(&who, "fetches", &show(expected), &got.map_or_else(|error| error, |got| show(&got)));
    }

    async fn get(
        &mut self,
        who: &str,
        client: &Client,
        path: &str,
        what: &str,
        body: Vec<u8>,
        expected: &str,
    ) -> Result<Response, Error> {
        self.ask(Ask { method: Method::GET, ..post(who, client, path, what, body, expected) }).await
    }

    async fn post(
        &mut self,
        who: &str,
        client: &Client,
        path: &str,
        what: &str,
        body: Vec<u8>,
        expected: &str,
    ) -> Result<Response, Error> {
        self.ask(post(who, client, path, what, body, expected)).await
    }

    /// Sends a request, and notes what came.
    async fn ask(&mut self, ask: Ask<'_>) -> Result<Response, Error> {
        let what = format!("{} {} {}", ask.method, ask.path, ask.what);
        let sent = ask.client.send_with(ask.method, ask.path, ask.headers, ask.body).await;
        let response = sent.map_err(|error| format!("{}: {what}: {error}", ask.who))?;
        self.ledger.step(ask.who, what.trim_end(), ask.expected, &describe(&response), Some(response.elapsed));
        self.at_ds += usize::from(Answer::decode(&response.body).is_some());
        self.remark(&response);
        Ok(response)
    }

    /// What an answer that is a refusal says of it.
    fn remark(&self, response: &Response) {
        let problem = response.json();
        let member =
            |name| problem.get(name).map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        let policies = member("violated-policies").map(|policies| format!("policies {policies}"));
        let wait = response.header("retry-after").map(|wait| format!("Retry-After {wait}"));
        let said: Vec<String> = [member("title"), member("detail"), policies, wait].into_iter().flatten().collect();
        if !said.is_empty() {
            self.ledger.note(&said.join("; "));
        }
    }

    fn check(&mut self, who: &str, what: &str, expected: &str, got: &str) {
        self.ledger.step(who, what, expected, got, None);
    }
}

/// One request, and what should come of it.
struct Ask<'a> {
    who: &'a str,
    client: &'a Client,
    method: Method,
    path: &'a str,
    headers: &'a [(&'a str, &'a str)],
    what: &'a str,
    body: Vec<u8>,
    expected: &'a str,
}

fn post<'a>(
    who: &'a str,
    client: &'a Client,
    path: &'a str,
    what: &'a str,
    body: Vec<u8>,
    expected: &'a str,
) -> Ask<'a> {
    Ask { who, client, method: Method::POST, path, headers: &[], what, body, expected }
}

/// The status, and what must come with it.
fn describe(response: &Response) -> String {
    let problem = response.json();
    let has = |name| problem.get(name).is_some();
    let status = response.status.as_u16();
    let with = match status {
        200 => match Answer::decode(&response.body).map(|answer| answer.status) {
            Some(delivery::OK) => " from the DS",
            Some(_) => " but the DS refuses",
            None => "",
        },
        400 if has("field") && has("offset") => " with field, offset",
        401 if !tokens::challenges(&response.headers).is_empty() => " with challenge",
        429 if response.header("retry-after").is_some() => " with Retry-After",
        _ => "",
    };
    format!("{status}{with}")
}

/// What the DS has answered.
fn payload(response: &Response) -> Result<Vec<u8>, Error> {
    Ok(Answer::decode(&response.body).ok_or("not a DSResponse")?.payload)
}

fn key_packages(response: &Response) -> Result<Vec<openmls::prelude::KeyPackage>, Error> {
    let answer = Answer::decode(&response.body).ok_or("not a DSResponse")?;
    let list = answer.list().ok_or("not a list of KeyPackages")?;
    Ok(list.iter().map(|octets| mls::key_package_from(octets)).collect())
}

fn text(words: &str) -> Received {
    Received::Application(words.as_bytes().to_vec())
}

fn show(received: &[Received]) -> String {
    let one = |received: &Received| match received {
        Received::Application(words) => format!("{:?}", String::from_utf8_lossy(words)),
        Received::Proposal => "a proposal".to_owned(),
        Received::Commit => "a commit".to_owned(),
    };
    received.iter().map(one).collect::<Vec<_>>().join(", ")
}
