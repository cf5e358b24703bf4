//! What memory a server takes, each measurement of a process that has done nothing before: for connections that are idle, and
//! for uploads that are under way.

use std::sync::Arc;
use std::time::Duration;

use http::Method;

use crate::Error;
use crate::load::{Generator, Sender};
use crate::requests::{MIB, Way};
use crate::servers::{Kind, Place};
use crate::support::client::Client;

/// Uploads at once, over HTTP/2 some to a connection.
pub const UPLOADS: usize = 64;
const CLIENTS: usize = 8;

/// Octets of each.
pub const UPLOAD: usize = 4 * MIB;

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
    /// More at most than before, with uploads over HTTP/1.1.
    pub http1: f64,
    /// And over HTTP/2.
    pub http2: f64,
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
    tokio::time::sleep(Duration::from_millis(500)).await;
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

/// The most that a server takes more than before while uploads lack their last octet, which then is sent.
async fn uploads(place: &Place, generator: &Arc<Generator>, kind: Kind, way: Way) -> Result<f64, Error> {
    let server = place.start(kind, generator).await?;
    server.forget_peak()?;
    let before = server.memory("VmRSS")?;
    let failed = |error: Error| server.failed(&format!("uploads over {way}"), &error);
    let client = || {
        let client = Client::tls(server.addr, &place.ca_pem).timeout(ANSWER_WITHIN);
        if way == Way::Http1 { client.http1() } else { client }
    };
    let clients: Vec<Client> = (0..CLIENTS).map(|_| client()).collect();
    let bodies = generator.bodies(UPLOAD)?;
    let (seen, mut uploads) = (place.backend.seen(), vec![]);
    for (client, body) in clients.iter().cycle().zip(bodies.iter().cycle()).take(UPLOADS) {
        let length = Some(UPLOAD as u64);
        let upload = client.begin(Method::POST, "/group_operation", &[], length).await.map_err(failed)?;
        upload.write(body.slice(..UPLOAD - 1)).await.map_err(failed)?;
        uploads.push((upload, body.slice(UPLOAD - 1..)));
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
        return Err(failed(format!("no more than {came} of {all} octets came through").into()));
    }
    let peak = server.memory("VmHWM")?;
    for (upload, last) in uploads {
        upload.write(last).await.map_err(failed)?;
        let answer = upload.finish().await.map_err(failed)?;
        if answer.status != 200 {
            return Err(failed(format!("answered {}: {}", answer.status, answer.text()).into()));
        }
    }
    // A page, where it took nothing.
    Ok(peak.saturating_sub(before).max(4096) as f64)
}
