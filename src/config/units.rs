//! Durations, sizes and rates as an operator writes them.

use serde::{Deserialize, Deserializer, de};
use std::time::Duration;

/// "250ms", "10s", "5m", "1h", "1d"; not zero, and not longer than a year, so that a clock can be set by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span(pub(super) Duration);

/// "64KiB", "8MiB", "1GiB", "512B" or a number of octets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size(pub(super) u64);

/// "20/s", "600/m", "5/h", "100/d": so many in so long; or "10MiB/s": octets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rate {
    pub(super) count: u64,
    pub(super) period: Duration,
    pub(super) octets: bool,
}

/// 100, or "64MiB" of octets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Burst {
    pub(super) count: u32,
    pub(super) octets: bool,
}

fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits)?;
    Some((number.parse().ok()?, unit.trim_start()))
}

/// A duration: "250ms", "10s", "5m", "1h", "1d".
pub(super) fn span(text: &str) -> Option<Duration> {
    let (number, unit) = number_and_unit(text)?;
    let seconds = |n: u64| number.checked_mul(n).map(Duration::from_secs);
    let span = match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => seconds(1),
        "m" => seconds(60),
        "h" => seconds(3600),
        "d" => seconds(86400),
        _ => None,
    };
    span.filter(|span| (Duration::from_millis(1)..=Duration::from_secs(366 * 86400)).contains(span))
}

fn size(text: &str) -> Option<u64> {
    let (number, unit) = number_and_unit(text)?;
    let shift = match unit {
        "B" | "" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

fn rate(text: &str) -> Option<Rate> {
    let (count, unit) = text.split_once('/')?;
    let (count, octets) = match count.trim().parse::<u32>() {
        Ok(count) => (u64::from(count), false),
        Err(_) => (octets(count.trim())?, true),
    };
    let period = span(&format!("1{}", unit.trim())).filter(|_| unit.trim() != "ms")?;
    (count > 0).then_some(Rate { count, period, octets })
}

/// A size with its unit.
fn octets(text: &str) -> Option<u64> {
    size(text).filter(|_| text.ends_with('B'))
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        span(&text)
            .map(Self)
            .ok_or_else(|| de::Error::custom(format!("{text:?} is no duration like \"250ms\", \"10s\", \"5m\"")))
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        rate(&text).ok_or_else(|| {
            de::Error::custom(format!("{text:?} is no rate like \"20/s\", \"600/m\", \"5/h\", \"100/d\", \"10MiB/s\""))
        })
    }
}

impl<'de> Deserialize<'de> for Burst {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Burst;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number, or for octets a size like \"64MiB\"")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Burst, E> {
                let count = octets(text).ok_or_else(|| E::custom(format!("{text:?} is no size like \"64MiB\"")))?;
                let count = u32::try_from(count).map_err(|_| E::custom("a burst is less than 4GiB"))?;
                Ok(Burst { count, octets: true })
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Burst, E> {
                let count = u32::try_from(number).map_err(|_| E::custom("a burst is a number up to 4294967295"))?;
                Ok(Burst { count, octets: false })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Size;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a size like \"64KiB\", \"8MiB\"")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                size(text).map(Size).ok_or_else(|| E::custom(format!("{text:?} is no size like \"64KiB\", \"8MiB\"")))
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Size, E> {
                u64::try_from(number).map(Size).map_err(|_| E::custom("a size is not negative"))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(span("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(span("5m"), Some(Duration::from_secs(300)));
        assert_eq!(size("8MiB"), Some(8 << 20));
        assert_eq!(rate("600/m"), Some(Rate { count: 600, period: Duration::from_secs(60), octets: false }));
        let octets = Rate { count: 10 << 20, period: Duration::from_secs(1), octets: true };
        assert_eq!(rate("10MiB/s"), Some(octets));
        for bad in [
            "",
            "s",
            "5",
            "5x",
            "-5s",
            "5.5s",
            "0s",
            "0ms",
            "999999d",
            "99999999999999999999s",
            "18446744073709551615d",
        ] {
            assert_eq!(span(bad), None, "{bad}");
        }
        for bad in ["", "/s", "0/s", "5/x", "5/ms", "5", "5/", "99999999999/s", "0B/s", "MiB/s"] {
            assert_eq!(rate(bad), None, "{bad}");
        }
        assert_eq!(size("99999999999999GiB"), None);
    }
}
