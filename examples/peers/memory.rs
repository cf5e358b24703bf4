//! What memory a server takes, each measurement of a process of its own: for connections that are idle; for uploads that
//! are under way; and for a first upload, and those under way after that, which says what of it is the program.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Method;

use crate::Error;
use crate::load::{Generator, Sender};
use crate::requests::{MIB, Way};
use crate::servers::{Kind, Place, Server};
use crate::support::client::{Client, Upload};

/// Uploads at once, over HTTP/2 some to a connection.
pub const UPLOADS: usize = 64;
const CLIENTS: usize = 8;

/// Octets of each.
pub const UPLOAD: usize = 4 * MIB;

/// How long after what it had to do a server is looked at.
const SETTLED: Duration = Duration::from_millis(500);

/// How long an upload may take that is let go on.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Octets that a server holds.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// How many connections were idle.
    pub connections: usize,
    /// In all, with these.
    pub idle: f64,
    /// More than without, for each of them.
    pub each: f64,
    /// With uploads over HTTP/1.1, and over HTTP/2.
    pub http1: Uploads,
    pub http2: Uploads,
}

/// Octets that a server holds at most more than before.
#[derive(Debug, Clone, Copy)]
pub struct Uploads {
    /// With [`UPLOADS`] at once, of a process that has had none: the bar is of this.
    pub at_once: f64,
    /// With a first upload: what of its program no request has needed yet is read in by then, which is not of bodies.
    pub first: f64,
    /// With [`UPLOADS`] at once after that.
    pub after_first: f64,
}

pub async fn measure(
    place: &Place,
    generator: &Arc<Generator>,
    kind: Kind,
    connections: usize,
) -> Result<Memory, Error> {
    let server = place.start(kind, generator).await?;
    let before = server.memory("VmRSS")?;
    let idle = generator.idle(server.addr, connections).await;
    let idle = idle.map_err(|error| server.failed(&"idle connections", &error))?;
    tokio::time::sleep(SETTLED).await;
    let with = server.memory("VmRSS")?;
    let closed = idle.iter().flatten().filter(|kept| is_closed(kept)).count();
    if closed > 0 {
        return Err(server.failed(&"idle connections", &format!("{closed} of {} were closed", idle.len())));
    }
    let connections = idle.len().max(1);
    drop((idle, server));
    Ok(Memory {
        connections,
        idle: with as f64,
        each: with.saturating_sub(before) as f64 / connections as f64,
        http1: uploads(place, generator, kind, Way::Http1).await?,
        http2: uploads(place, generator, kind, Way::Http2).await?,
    })
}

/// Whether the other side has closed it.
pub fn is_closed(kept: &Sender) -> bool {
    match kept {
        Sender::Http1(sender) => sender.is_closed(),
        Sender::Http2(sender) => sender.is_closed(),
    }
}

async fn uploads(place: &Place, generator: &Arc<Generator>, kind: Kind, way: Way) -> Result<Uploads, Error> {
    let server = place.start(kind, generator).await?;
    let at_once = many(place, &server, generator, way).await.map_err(|error| failed(&server, way, error))?;
    drop(server);

    let server = place.start(kind, generator).await?;
    let before = forget(&server)?;
    let one = async { finish(begin(&client(place, &server, way), &generator.bodies(UPLOAD)?[0]).await?).await };
    one.await.map_err(|error| failed(&server, way, error))?;
    let first = more(&server, before)?;
    // What it held for that, it has given back by then, if it does.
    tokio::time::sleep(SETTLED).await;
    let after_first = many(place, &server, generator, way).await.map_err(|error| failed(&server, way, error))?;
    Ok(Uploads { at_once, first, after_first })
}

/// The most that a server takes more than before while uploads lack their last octet, which then is sent.
async fn many(place: &Place, server: &Server, generator: &Arc<Generator>, way: Way) -> Result<f64, Error> {
    let before = forget(server)?;
    let clients: Vec<Client> = (0..CLIENTS).map(|_| client(place, server, way)).collect();
    let bodies = generator.bodies(UPLOAD)?;
    let (seen, mut uploads) = (place.backend.seen(), vec![]);
    for (client, body) in clients.iter().cycle().zip(bodies.iter().cycle()).take(UPLOADS) {
        uploads.push(begin(client, body).await?);
    }
    let (all, mut came) = ((UPLOADS * (UPLOAD - 1)) as u64, 0);
    loop {
        // Until no more comes through.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = place.backend.seen() - seen;
        if now == came {
            break;
        }
        came = now;
    }
    if came < all / 100 * 99 {
        return Err(format!("no more than {came} of {all} octets came through").into());
    }
    let most = more(server, before)?;
    for upload in uploads {
        finish(upload).await?;
    }
    Ok(most)
}

fn client(place: &Place, server: &Server, way: Way) -> Client {
    let client = Client::tls(server.addr, &place.ca_pem).timeout(ANSWER_WITHIN);
    if way == Way::Http1 { client.http1() } else { client }
}

fn failed(server: &Server, way: Way, error: Error) -> Error {
    server.failed(&format!("uploads over {way}"), &error)
}

/// An upload that lacks its last octet, and this.
async fn begin(client: &Client, body: &Bytes) -> Result<(Upload, Bytes), Error> {
    let upload = client.begin(Method::POST, "/group_operation", &[], Some(UPLOAD as u64)).await?;
    upload.write(body.slice(..UPLOAD - 1)).await?;
    Ok((upload, body.slice(UPLOAD - 1..)))
}

async fn finish((upload, last): (Upload, Bytes)) -> Result<(), Error> {
    upload.write(last).await?;
    match upload.finish().await? {
        answer if answer.status == 200 => Ok(()),
        answer => Err(format!("answered {}: {}", answer.status, answer.text()).into()),
    }
}

/// What a server holds now; the most that it has held is counted from here.
fn forget(server: &Server) -> Result<u64, Error> {
    server.forget_peak()?;
    server.memory("VmRSS")
}

/// The most that it has held more than that: a page, where it took nothing.
fn more(server: &Server, before: u64) -> Result<f64, Error> {
    Ok(server.memory("VmHWM")?.saturating_sub(before).max(4096) as f64)
}
