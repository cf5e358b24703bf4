//! URIs of rooms and users (`wire.md`, "Dialect `mimi`"), as far as the gateway needs them: which provider one belongs
//! to, and whether two are the same.
//!
//! A room or user is its provider's, so a check of who may send or get something is a check of a URI's provider.
//! Whoever finds a URI that the gateway and a Delivery Service read differently is past that check. Therefore all that
//! could be read in two ways is refused: userinfo, ports, white space, backslashes, a broken percent-encoding, a second
//! `@`, a query, a fragment, dot segments. What may be spelled in two ways is one all the same, for whoever spells a user anew
//! must not have a limit anew: see [`Uri::normal`].

use super::{InvalidName, ProviderName};
use std::borrow::Cow;
use std::fmt;

/// Octets that a URI has at most.
pub(super) const LONGEST: usize = 2048;

/// A URI of a room or user, as it came. Equal if it is once scheme, provider and percent-encodings are in their normal form
/// (RFC 3986 §6.2.2.1, §6.2.2.2), and with regard to case everywhere else.
#[derive(Clone, Copy)]
pub struct Uri<'a> {
    whole: &'a str,
    provider: ProviderName<'a>,
    /// Octets before the colon.
    scheme: usize,
    /// Octets before the provider.
    before: usize,
}

/// Why octets are no URI of a room or user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidUri(pub &'static str);

impl<'a> Uri<'a> {
    /// Checks a URI of 2048 octets at most, and finds its provider: its authority (`mimi://b.example/u/bob`), or what
    /// follows the only `@` (`im:bob@b.example`).
    ///
    /// # Errors
    /// Says why it is none.
    #[inline]
    pub fn from_bytes(uri: &'a [u8]) -> Result<Self, InvalidUri> {
        if uri.len() > LONGEST {
            return Err(InvalidUri("a URI is longer than 2048 octets"));
        }
        check_octets(uri)?;
        // Every octet was seen to be ASCII.
        let whole = std::str::from_utf8(uri).map_err(|_| InvalidUri("a URI is not ASCII"))?;
        let Some((scheme, rest)) = whole.split_once(':') else { return Err(InvalidUri("a URI has no scheme")) };
        if !is_scheme(scheme.as_bytes()) {
            return Err(InvalidUri("a URI's scheme is no letter with letters, digits, +, - and . after it"));
        }
        let (provider, before) = match rest.strip_prefix("//") {
            Some(rest) => {
                let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
                // Somewhere on its way to the Delivery Service they may be taken out of it, and of what stands before it.
                if path.split('/').any(is_dots) {
                    return Err(InvalidUri("a URI has a segment . or .."));
                }
                (authority, whole.len() - rest.len())
            }
            None => {
                let Some((user, provider)) = rest.split_once('@') else {
                    return Err(InvalidUri("a URI has neither an authority nor an @"));
                };
                if user.is_empty() {
                    return Err(InvalidUri("a URI has nothing before its @"));
                }
                // There are readers to whom what stands before a `/` is a host.
                if user.contains('/') {
                    return Err(InvalidUri("a URI without an authority has a / before its @"));
                }
                (provider, whole.len() - provider.len())
            }
        };
        let provider =
            ProviderName::from_bytes(provider.as_bytes()).map_err(|InvalidName(reason)| InvalidUri(reason))?;
        Ok(Self { whole, provider, scheme: scheme.len(), before })
    }

    /// The URI as it came.
    #[inline]
    pub fn as_str(&self) -> &'a str {
        self.whole
    }

    /// The provider whose room or user it is.
    #[inline]
    pub fn provider(&self) -> ProviderName<'a> {
        self.provider
    }

    /// Octets that are the same for URIs that are equal: scheme and provider in lower case; of percent-encodings the digits in
    /// upper case, and those of what need not be encoded decoded. Borrowed where all is in lower case and nothing encoded, as
    /// nearly always.
    #[inline]
    pub fn normal(&self) -> Cow<'a, [u8]> {
        let scheme = self.whole.get(..self.scheme).unwrap_or_default();
        let is_small = |text: &str| !text.bytes().any(|octet| octet.is_ascii_uppercase());
        if is_small(scheme) && is_small(self.provider.as_str()) && !self.whole.contains('%') {
            return Cow::Borrowed(self.whole.as_bytes());
        }
        Cow::Owned(self.spelled())
    }

    #[cold]
    fn spelled(&self) -> Vec<u8> {
        let mut octets = self.whole.as_bytes().to_vec();
        for part in [0..self.scheme, self.before..self.before + self.provider.as_str().len()] {
            if let Some(part) = octets.get_mut(part) {
                part.make_ascii_lowercase();
            }
        }
        let mut normal = Vec::with_capacity(octets.len());
        let mut rest = &octets[..];
        while let [octet, after @ ..] = rest {
            rest = after;
            match (octet, after) {
                (b'%', [high, low, after @ ..]) => {
                    rest = after;
                    match decoded(*high, *low).filter(|octet| is_unreserved(*octet)) {
                        Some(octet) => normal.push(octet),
                        None => normal.extend([b'%', high.to_ascii_uppercase(), low.to_ascii_uppercase()]),
                    }
                }
                (octet, _) => normal.push(*octet),
            }
        }
        normal
    }
}

/// Octets of RFC 3986 §2.3, which mean the same whether they are percent-encoded or not.
fn is_unreserved(octet: u8) -> bool {
    octet.is_ascii_alphanumeric() || matches!(octet, b'-' | b'.' | b'_' | b'~')
}

/// A segment that is taken out of a path, in any spelling (RFC 3986 §3.3, §6.2.2.2).
#[inline]
fn is_dots(segment: &str) -> bool {
    // Most begin with something else.
    if !segment.starts_with(['.', '%']) {
        return false;
    }
    let mut rest = segment;
    let mut dots = 0;
    while let Some(after) = rest.strip_prefix('.').or(rest.strip_prefix("%2e")).or(rest.strip_prefix("%2E")) {
        (rest, dots) = (after, dots + 1);
    }
    rest.is_empty() && dots <= 2
}

/// What two hex digits stand for.
fn decoded(high: u8, low: u8) -> Option<u8> {
    let digit = |octet: u8| char::from(octet).to_digit(16);
    u8::try_from(digit(high)? << 4 | digit(low)?).ok()
}

/// Octets that a URI may hold, and after a `%` two hex digits.
#[inline]
fn check_octets(uri: &[u8]) -> Result<(), InvalidUri> {
    let mut rest = uri;
    while let [octet, after @ ..] = rest {
        rest = match octet {
            b'%' => match after {
                [high, low, after @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => after,
                _ => return Err(InvalidUri("a URI has a % without two hex digits after it")),
            },
            b'"' | b'#' | b'<' | b'>' | b'?' | b'\\' | b'^' | b'`' | b'{'..=b'}' => {
                return Err(InvalidUri("a URI holds one of \"#<>?\\^`{|}"));
            }
            0x21..=0x7e => after,
            _ => return Err(InvalidUri("a URI holds more than printable ASCII")),
        };
    }
    Ok(())
}

/// `scheme` of RFC 3986 §3.1.
#[inline]
fn is_scheme(scheme: &[u8]) -> bool {
    let is_inner = |octet: &u8| octet.is_ascii_alphanumeric() || matches!(octet, b'+' | b'-' | b'.');
    scheme.first().is_some_and(u8::is_ascii_alphabetic) && scheme.iter().all(is_inner)
}

impl PartialEq for Uri<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.whole == other.whole || self.normal() == other.normal()
    }
}

impl Eq for Uri<'_> {}

impl fmt::Display for Uri<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.whole)
    }
}

impl fmt::Debug for Uri<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Error, Reader};

    fn uri(text: &str) -> Uri<'_> {
        Uri::from_bytes(text.as_bytes()).unwrap()
    }

    #[test]
    fn providers() {
        for (text, provider) in [
            ("mimi://b.example/u/bob", "b.example"),
            ("mimi://b.example", "b.example"),
            ("mimi://b.example/", "b.example"),
            ("mimi://b.example/u/...", "b.example"),
            ("mimi://b.example/u/caf%C3%A9", "b.example"),
            ("mimi://b.example/@c.example//d.example", "b.example"),
            ("mimi://b.example/r/a%2F%2fb", "b.example"),
            ("MIMI://B.Example/u/Bob", "b.example"),
            ("a+b-c.d9://b.example/", "b.example"),
            ("im:bob@b.example", "b.example"),
            ("im:%40bob:x@B.example", "b.example"),
            ("xn:xn--bcher-kva@xn--bcher-kva.example", "xn--bcher-kva.example"),
        ] {
            let read = uri(text);
            assert_eq!(read.provider().to_string(), provider, "{text}");
            assert_eq!(read.as_str(), text);
            assert_eq!(read.to_string(), text);
            assert_eq!(format!("{read:?}"), text);
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_none() {
        let long = format!("mimi://b.example/{}", "x".repeat(LONGEST));
        for text in [
            "",
            ":",
            "b.example",
            "//b.example/u/bob",
            "mimi:",
            "mimi:b.example",
            "mimi:/b.example",
            "mimi://",
            "mimi:///u/bob",
            "mimi://?b.example",
            "mimi://b.example:443/u/bob",
            "mimi://b.example:/u/bob",
            "mimi://bob@b.example/",
            "mimi://b.example@c.example/",
            "mimi://@b.example/",
            "mimi://b.example./u/bob",
            "mimi://.b.example/u/bob",
            "mimi://[::1]/u/bob",
            "mimi://b%2eexample/u/bob",
            "mimi://b.example%2F@c.example/",
            "mimi://b.example\\@c.example/",
            "mimi:\\\\b.example/u/bob",
            "mimi://b.example/u/b ob",
            " mimi://b.example/u/bob",
            "mimi://b.example/u/bob\n",
            "mimi://b.example/u/\0",
            "mimi://b.example/u/\x7f",
            "mimi://b.example/u/ü",
            "mimi://bücher.example/u/bob",
            "mimi://b.example/u/%",
            "mimi://b.example/u/%2",
            "mimi://b.example/u/%2g",
            "mimi://b.example/u/%%41",
            "mimi://b.example/u/%2E%2e/x",
            "mimi://b.example/u/.%2e",
            "mimi://b.example/%2E",
            "mimi://b.example/u/bob?x",
            "mimi://b.example/u/bob#x",
            "mimi://b.example?x",
            "mimi://b.example#x@c.example",
            "mimi://b.example/.",
            "mimi://b.example/../notify/x",
            "mimi://b.example/u/./bob",
            "mimi://b.example/u/..",
            "mimi://b.example/u/\"",
            "mimi://b.example/u/<",
            "mimi://b.example/u/>",
            "mimi://b.example/u/^",
            "mimi://b.example/u/`",
            "mimi://b.example/u/{x}",
            "mimi://b.example/u/|",
            "9mimi://b.example/u/bob",
            "+://b.example/",
            "mi_mi://b.example/",
            "mi%6di://b.example/",
            "im:@b.example",
            "im:bob@",
            "im:bob",
            "im:bob@b.example@c.example",
            "im:bob@b.example/device",
            "im:bob@b.example?x",
            "im:bob@b.example:443",
            "im:bob%40b.example",
            "im:bob?x@b.example",
            "im:bob#x@b.example",
            "im:/c.example/bob@b.example",
            "im:c.example/bob@b.example",
            &long,
        ] {
            assert!(Uri::from_bytes(text.as_bytes()).is_err(), "{text}");
        }
        assert!(Uri::from_bytes(b"mimi://b.example/\xff").is_err());
        let longest = &long[..LONGEST];
        assert_eq!(uri(longest).as_str(), longest);
    }

    #[test]
    fn equal_where_case_means_nothing() {
        for (one, other) in [
            ("mimi://b.example/u/bob", "MIMI://B.EXAMPLE/u/bob"),
            ("im:bob@b.example", "Im:bob@b.Example"),
            ("mimi://b.example", "mimi://B.example"),
            ("mimi://b.example/u/caf%c3%a9", "mimi://B.example/u/caf%C3%A9"),
            ("mimi://b.example/u/b%6fb", "mimi://b.example/u/bob"),
            ("im:%62ob@b.example", "im:bob@b.example"),
            ("mimi://b.example/u/%7ebob", "mimi://b.example/u/~bob"),
        ] {
            assert_eq!(uri(one), uri(other));
            assert_eq!(uri(one).normal(), uri(other).normal());
        }
        for (one, other) in [
            ("mimi://b.example/u/bob", "mimi://b.example/u/Bob"),
            ("mimi://b.example/u/bob", "mimi://b.example/u/bo"),
            ("mimi://b.example/u/bob", "mimi://c.example/u/bob"),
            ("mimi://b.example/u/bob", "mimj://b.example/u/bob"),
            ("mimi://b.example/u/caf%C3%A9", "mimi://b.example/u/caf%C3%A8"),
            ("mimi://b.example/u/a%2Fb", "mimi://b.example/u/a/b"),
            ("mimi://b.example/u/%254e", "mimi://b.example/u/%4e"),
            ("mimi://b.example", "mimi://b.example/"),
            ("im:bob@b.example", "im:Bob@b.example"),
            ("mimi://a.example/b.example", "mimi://a.example/B.example"),
            ("im:b@b.example", "i:mb@b.example"),
        ] {
            assert_ne!(uri(one), uri(other));
            assert_ne!(uri(one).normal(), uri(other).normal());
        }
    }

    #[test]
    fn normal_is_borrowed_where_it_can_be() {
        assert!(matches!(uri("mimi://b.example/u/Bob").normal(), Cow::Borrowed(b"mimi://b.example/u/Bob")));
        assert_eq!(&*uri("MiMi://B.Example/u/Bob").normal(), b"mimi://b.example/u/Bob");
        assert_eq!(&*uri("IM:Bob@B.Example").normal(), b"im:Bob@b.example");
        assert_eq!(&*uri("mimi://b.example/caf%c3%a9").normal(), b"mimi://b.example/caf%C3%A9");
    }

    #[test]
    fn read_from_a_body() {
        let body = b"\0\x11im:bob0@b.exampleX";
        let mut r = Reader::new(body);
        r.u8("first").unwrap();
        assert_eq!(r.uri("u").unwrap(), uri("im:bob0@b.example"));
        assert_eq!(r.offset(), 19);
        assert_eq!(Reader::new(&body[1..9]).uri("u"), Err(Error::Incomplete { field: "u", offset: 0, need: 18 }));
        assert!(matches!(Reader::new(b"\0").uri("u"), Err(Error::Malformed { field: "u", offset: 0, .. })));
        assert!(matches!(Reader::new(b"\x03a:b").uri("u"), Err(Error::Malformed { field: "u", offset: 0, .. })));
    }
}
