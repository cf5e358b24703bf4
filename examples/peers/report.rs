//! The tables, and their place in docs/performance.md.

use std::fs;
use std::path::Path;

use crate::Error;
use crate::memory::{Memory, UPLOAD, UPLOADS};
use crate::requests::{KIB, MIB};
use crate::results::{P99, Results, Spread, WAIT_BAR, bars, beside_better, median};
use crate::servers::Kind;

/// The place of the comparison in the document.
pub const PEERS: &str = "bench-peers";

/// Microseconds that the gateway may add to what a request of 1 KiB costs a bare proxy.
const ADDS: f64 = 2.0;

/// What is looked at of memory.
type What = fn(&Memory) -> f64;

/// What stands before and after a place.
pub fn split(document: &Path, place: &str) -> Result<(String, String), Error> {
    let (begin, end) = marks(place);
    let text = fs::read_to_string(document).map_err(|error| format!("{}: {error}", document.display()))?;
    let parts = text.split_once(&begin).and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    let (before, after) = parts.ok_or_else(|| format!("{} has no {begin} and {end}", document.display()))?;
    Ok((before.to_owned(), after.to_owned()))
}

/// Puts lines in their place.
pub fn write(document: &Path, place: &str, lines: &str) -> Result<(), Error> {
    let ((before, after), (begin, end)) = (split(document, place)?, marks(place));
    let text = format!("{before}{begin}\n{lines}\n{end}{after}");
    Ok(fs::write(document, text).map_err(|error| format!("{}: {error}", document.display()))?)
}

/// What a place begins and ends with.
fn marks(place: &str) -> (String, String) {
    (format!("<!-- {place} -->"), format!("<!-- /{place} -->"))
}

/// All tables, of what was measured.
pub fn markdown(results: &Results, setting: &str) -> String {
    let memory = match results.memory.is_empty() {
        true => String::new(),
        false => format!("\nMemory, MiB unless it says KiB:\n\n{}", memory(results)),
    };
    if results.rates.is_empty() {
        return format!("{setting}.\n{memory}");
    }
    [
        format!("{setting}.\n\nMicroseconds of a core for a request, and the gateway's as a part of each peer's:\n\n"),
        costs(results),
        "\nThe gateway with its node over h2c and over a Unix socket, in the same rounds:\n\n".to_owned(),
        nodes(results),
        "\nRequests answered in a second, and which part of its core the server used for them:\n\n".to_owned(),
        rates(results),
        "\nMicroseconds from when a request was due to its answer, at half load (p50 / p99 / p99.9):\n\n".to_owned(),
        waits(results),
        memory,
    ]
    .concat()
}

/// A table; `compared`: between head and tail each of the servers has a column.
pub fn table(head: &[&str], compared: bool, tail: &[&str], rows: Vec<Vec<String>>) -> String {
    let kinds: &[Kind] = if compared { &Kind::COMPARED } else { &[] };
    let head: Vec<_> =
        head.iter().copied().chain(kinds.iter().map(|kind| kind.name())).chain(tail.iter().copied()).collect();
    let rows = rows.into_iter().map(|row| format!("| {} |\n", row.join(" | ")));
    format!("| {} |\n|{}\n", head.join(" | "), " --- |".repeat(head.len())) + &rows.collect::<String>()
}

/// A figure of three digits or so.
pub fn figure(value: f64) -> String {
    if value.abs() < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

fn verdict(value: f64, bar: f64) -> String {
    format!("≤ {bar}: {}", if value <= bar { "met" } else { "**not met**" })
}

fn costs(results: &Results) -> String {
    let rows = results.cases().map(|case| {
        let of = |kind| results.costs(kind, case, |cost| cost.micros);
        let mut row = vec![case.to_string()];
        row.extend(Kind::COMPARED.map(|kind| figure(median(&of(kind)))));
        row.extend(bars(case.way).map(|(peer, bar)| {
            let ratio = results.cost_beside(Kind::Gateway, peer, case);
            format!("{ratio} {}", verdict(ratio.median, bar))
        }));
        let Spread { median, least, most } =
            Spread::of(&of(Kind::Gateway), &of(Kind::Pingora), |gateway, bare| gateway - bare);
        // In a larger body a thousandth is as much.
        let bar = if case.size == KIB { format!(" {}", verdict(median, ADDS)) } else { String::new() };
        row.push(format!("{} ({} to {}){bar}", figure(median), figure(least), figure(most)));
        row
    });
    table(&[""], true, &["gateway / NGINX", "gateway / HAProxy", "gateway − bare Pingora, µs"], rows.collect())
}

fn nodes(results: &Results) -> String {
    let rows = results.cases().map(|case| {
        let mut row = vec![case.to_string()];
        for kind in [Kind::OverH2c, Kind::OverUnix] {
            row.push(figure(median(&results.costs(kind, case, |cost| cost.micros))));
            row.extend([Kind::Nginx, Kind::HaProxy].map(|peer| results.cost_beside(kind, peer, case).to_string()));
        }
        row
    });
    let head = ["", "h2c, µs", "/ NGINX", "/ HAProxy", "Unix socket, µs", "/ NGINX", "/ HAProxy"];
    table(&head, false, &[], rows.collect())
}

fn rates(results: &Results) -> String {
    let rows = results.cases().map(|case| {
        let mut row = vec![case.to_string()];
        row.extend(Kind::COMPARED.map(|kind| {
            let rate = median(&results.costs(kind, case, |cost| cost.rate));
            let busy = median(&results.costs(kind, case, |cost| cost.busy));
            format!("{rate:.0} ({:.0} %)", busy * 100.0)
        }));
        row
    });
    table(&[""], true, &[], rows.collect())
}

fn waits(results: &Results) -> String {
    let rows = results.cases().map(|case| {
        let mut row = vec![case.to_string(), format!("{:.0}", median(&results.rates[&case]))];
        row.extend(Kind::COMPARED.map(|kind| {
            let parts = [0, P99, 2].map(|part| format!("{:.0}", median(&results.waits(kind, case, part))));
            parts.join(" / ")
        }));
        let (better, ratio) = results.wait_beside_better(case);
        row.push(format!("{ratio} of {}'s, {}", better.name(), verdict(ratio.median, WAIT_BAR)));
        row
    });
    table(&["", "requests/s"], true, &["gateway's p99 / the better peer's"], rows.collect())
}

fn memory(results: &Results) -> String {
    let connections = results.memory[&Kind::Gateway].iter().map(|memory| memory.connections).min().unwrap_or_default();
    let idle = format!("{connections} idle TLS connections, in all");
    let uploads = |way| format!("{UPLOADS} uploads of {} MiB under way, {way}, more than without", UPLOAD / MIB);
    let first = |way| format!("one such upload, the first, {way}, more than without");
    let after = |way| format!("{UPLOADS} of them under way after a first, {way}, more than without");
    let whats: [(String, f64, What, bool); 8] = [
        (idle, MIB as f64, |memory| memory.idle, false),
        ("each of them, more than without, KiB".to_owned(), KIB as f64, |memory| memory.each, false),
        (uploads("HTTP/1.1"), MIB as f64, |memory| memory.http1.at_once, true),
        (uploads("HTTP/2"), MIB as f64, |memory| memory.http2.at_once, true),
        (first("HTTP/1.1"), MIB as f64, |memory| memory.http1.first, false),
        (first("HTTP/2"), MIB as f64, |memory| memory.http2.first, false),
        (after("HTTP/1.1"), MIB as f64, |memory| memory.http1.after_first, false),
        (after("HTTP/2"), MIB as f64, |memory| memory.http2.after_first, false),
    ];
    let rows = whats.map(|(name, unit, what, has_bar)| {
        let mut row = vec![name];
        row.extend(Kind::COMPARED.map(|kind| figure(median(&results.memory(kind, what)) / unit)));
        let (better, ratio) = beside_better(|kind| results.memory(kind, what));
        let bar = if has_bar { format!(", {}", verdict(ratio.median, 1.0)) } else { String::new() };
        row.push(format!("{ratio} of {}'s{bar}", better.name()));
        row
    });
    table(&[""], true, &["gateway / the better peer"], rows.to_vec())
}
