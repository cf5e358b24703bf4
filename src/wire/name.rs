//! Provider names: ASCII A-labels as `wire.md` ("Provider names") has them, borrowed as they came, compared without
//! regard to case, shown in lower case.

use std::fmt;

/// A domain name of A-labels, as it came. Equal without regard to case; displayed in lower case.
#[derive(Clone, Copy)]
pub struct ProviderName<'a>(&'a str);

/// Why octets are no provider name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidName(pub &'static str);

impl<'a> ProviderName<'a> {
    /// Checks a name: 1–253 octets, labels of 1–63 letters, digits and inner hyphens, no trailing dot.
    ///
    /// # Errors
    /// Says which of these does not hold.
    #[inline]
    pub fn from_bytes(name: &'a [u8]) -> Result<Self, InvalidName> {
        if name.is_empty() {
            return Err(InvalidName("a domain name is empty"));
        }
        if name.len() > 253 {
            return Err(InvalidName("a domain name is longer than 253 octets"));
        }
        let mut label = 0usize;
        let mut before = b'.';
        for &octet in name {
            match octet {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => label += 1,
                b'-' if label > 0 => label += 1,
                b'.' if label > 0 && before != b'-' => label = 0,
                b'-' | b'.' => return Err(InvalidName("a label is empty, or begins or ends with a hyphen")),
                _ => return Err(InvalidName("a domain name holds more than letters, digits, hyphens and dots")),
            }
            if label > 63 {
                return Err(InvalidName("a label is longer than 63 octets"));
            }
            before = octet;
        }
        if before == b'.' || before == b'-' {
            return Err(InvalidName("a domain name ends with a dot or a hyphen"));
        }
        // Every octet was seen to be ASCII.
        std::str::from_utf8(name).map(Self).map_err(|_| InvalidName("a domain name is not ASCII"))
    }

    /// The name as it came.
    pub fn as_str(&self) -> &'a str {
        self.0
    }

    /// Whether this is `other`, without regard to case.
    #[inline]
    pub fn is(&self, other: &str) -> bool {
        self.0.eq_ignore_ascii_case(other)
    }

    /// Whether this is `pattern`, or, where `pattern` begins with `*.`, one label below it (RFC 6125 §6.4.3).
    pub fn matches(&self, pattern: &str) -> bool {
        match pattern.strip_prefix("*.") {
            None => self.is(pattern),
            Some(parent) => self.0.split_once('.').is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(parent)),
        }
    }
}

impl PartialEq for ProviderName<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.is(other.0)
    }
}

impl Eq for ProviderName<'_> {}

impl fmt::Display for ProviderName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| fmt::Write::write_char(f, c.to_ascii_lowercase()))
    }
}

impl fmt::Debug for ProviderName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let label63 = "a".repeat(63);
        let long253 = format!("{}.{}.{}.{}", label63, label63, label63, "a".repeat(61));
        for good in ["a", "b.example", "B.ExAmPlE", "xn--bcher-kva.example", "1.2", "a-b.c", &label63, &long253] {
            assert!(ProviderName::from_bytes(good.as_bytes()).is_ok(), "{good}");
        }
        let long254 = format!("{long253}a");
        let label64 = "a".repeat(64);
        for bad in [
            "",
            ".",
            "a.",
            ".a",
            "a..b",
            "-a",
            "a-",
            "a-.b",
            "a.-b",
            "a_b",
            "a b",
            "a\0",
            "ü.example",
            "*.a",
            "a:1",
            "a/b",
            &long254,
            &label64,
        ] {
            assert!(ProviderName::from_bytes(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn wildcards_are_one_label() {
        let name = ProviderName::from_bytes(b"X.a.Example").unwrap();
        assert!(name.matches("*.A.example"));
        assert!(!name.matches("*.example"));
        assert!(!name.matches("a.example"));
        assert!(!ProviderName::from_bytes(b"a.example").unwrap().matches("*.a.example"));
        assert_eq!(name.to_string(), "x.a.example");
    }
}
