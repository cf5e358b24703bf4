//! What connections are held to, before there is a request.

use super::{Resolver, file};
use crate::config::units::{Burst, Rate};
use crate::config::{ConnectionLimits, Http2};
use crate::limiter::gcra::Gcra;
use toml::Spanned;

impl Resolver<'_> {
    pub(super) fn connections(&mut self, table: &file::Connections) -> Option<ConnectionLimits> {
        for (number, key) in [
            (&table.max, "max"),
            (&table.per_ip, "per_ip"),
            (&table.per_provider, "per_provider"),
            (&table.handshakes_at_once, "handshakes_at_once"),
        ] {
            if *number.get_ref() == 0 {
                self.wrong(number, format!("connections.{key}"), "0 would let nobody in");
            }
        }
        let handshakes_per_ip =
            self.pace(&table.handshakes_per_ip, &table.handshakes_burst, "connections", "handshakes_per_ip")?;
        Some(ConnectionLimits {
            max: *table.max.get_ref(),
            per_ip: *table.per_ip.get_ref(),
            per_provider: *table.per_provider.get_ref(),
            handshakes_per_ip,
            handshakes_at_once: *table.handshakes_at_once.get_ref(),
            exempt: self.networks(&table.exempt, "connections.exempt"),
        })
    }

    pub(super) fn http2(&mut self, table: &file::Http2) -> Option<Http2> {
        if !(1..=10_000).contains(table.max_streams.get_ref()) {
            self.wrong(&table.max_streams, "http2.max_streams", "1 to 10000");
        }
        let size = table.max_header_list.get_ref().0;
        if !(1 << 10..=1 << 20).contains(&size) {
            self.wrong(&table.max_header_list, "http2.max_header_list", "1KiB to 1MiB");
        }
        if table.control_burst.get_ref().count < 16 {
            self.wrong(&table.control_burst, "http2.control_burst", "16 is the least: every client sends some");
        }
        Some(Http2 {
            max_streams: *table.max_streams.get_ref(),
            max_header_list: u32::try_from(size).unwrap_or(u32::MAX),
            control: self.pace(&table.control_frames, &table.control_burst, "http2", "control_frames")?,
        })
    }

    /// A rate and a burst of things that are no octets.
    fn pace(&mut self, rate: &Spanned<Rate>, burst: &Spanned<Burst>, table: &str, key: &str) -> Option<Gcra> {
        if rate.get_ref().octets || burst.get_ref().octets {
            self.wrong(rate, format!("{table}.{key}"), "this is not of octets");
            return None;
        }
        let gcra = u32::try_from(rate.get_ref().count)
            .ok()
            .and_then(|count| Gcra::new(count, rate.get_ref().period, burst.get_ref().count));
        if gcra.is_none() {
            self.wrong(rate, format!("{table}.{key}"), "a burst is at least 1 and comes back within a century");
        }
        gcra
    }
}
