//! What the server of a URL answers, as far as it passes: a head of which little is left, and a body that is counted.

use super::{Refused, Settings};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use std::time::Instant;

/// Fields that pass, besides `Content-Length`: those without which the octets cannot be used or kept. Any other would be
/// said in our name and about our host: of `Set-Cookie`, `Location`, `Refresh`, `Alt-Svc`, `Strict-Transport-Security`,
/// `Clear-Site-Data` and `WWW-Authenticate` each would have a client do something towards us, or go elsewhere.
static PASSING: [HeaderName; 11] = [
    header::CONTENT_TYPE,
    header::CONTENT_RANGE,
    header::CONTENT_ENCODING,
    header::ACCEPT_RANGES,
    header::ETAG,
    header::LAST_MODIFIED,
    header::CACHE_CONTROL,
    header::EXPIRES,
    header::AGE,
    header::DATE,
    header::VARY,
];

/// The head of an answer, as it passes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    /// All of its fields, but for those of the connection.
    pub headers: HeaderMap,
    /// Octets of the body, where it is said: within the bound.
    pub length: Option<u64>,
}

/// What passes of the head of an answer, whose status passes as it is. An answer that is on its way (1xx) is none yet, and
/// is not asked about here.
///
/// # Errors
/// [`Refused::Redirected`]: a redirect would have its reader go where the list does not. [`Refused::TooLarge`]: it says
/// that it is. [`Refused::BadAnswer`]: its status or its length is none.
pub fn head(status: StatusCode, headers: &HeaderMap, settings: &Settings) -> Result<Passed, Refused> {
    match status.as_u16() {
        200..=299 | 304 | 400..=599 => {}
        300..=399 => return Err(Refused::Redirected),
        _ => return Err(Refused::BadAnswer("its status is none that ends a request")),
    }
    // That of what is not modified is of the body that does not come; and there is none where there is no content
    // (RFC 9110 §8.6).
    let bodiless = [StatusCode::NOT_MODIFIED, StatusCode::NO_CONTENT, StatusCode::RESET_CONTENT];
    let length = if bodiless.contains(&status) { None } else { length(headers)? };
    if length.is_some_and(|length| length > settings.largest) {
        return Err(Refused::TooLarge);
    }
    let mut passed = HeaderMap::with_capacity(16);
    for name in &PASSING {
        for value in headers.get_all(name) {
            passed.append(name.clone(), value.clone());
        }
    }
    if let Some(length) = length {
        passed.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    // A client of MIMI takes the octets and decrypts them. Should a browser be led here, then what a stranger has uploaded
    // is no page of this provider's: its type is as it says and not guessed; it is saved, under no name of the stranger's;
    // and if it is shown after all, it runs nothing, loads nothing, and is of no origin.
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CONTENT_DISPOSITION, "attachment"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; sandbox"),
    ] {
        passed.insert(name, HeaderValue::from_static(value));
    }
    Ok(Passed { headers: passed, length })
}

/// Octets that an answer says its body has.
fn length(headers: &HeaderMap) -> Result<Option<u64>, Refused> {
    // With a transfer coding it says nothing (RFC 9112 §6.3); passed on without it, it would.
    if headers.contains_key(header::TRANSFER_ENCODING) {
        return Ok(None);
    }
    let mut length = None;
    for value in headers.get_all(header::CONTENT_LENGTH) {
        let digits = value.to_str().ok().filter(|text| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()));
        let digits = digits.ok_or(Refused::BadAnswer("its Content-Length is no number"))?;
        // A number that is too large to be read is too large.
        let read = digits.parse::<u64>().unwrap_or(u64::MAX);
        if length.replace(read).is_some_and(|other| other != read) {
            return Err(Refused::BadAnswer("it has two lengths"));
        }
    }
    Ok(length)
}

/// The body of a download on its way: what has passed, and until when.
#[derive(Debug, Clone)]
pub struct Counter {
    largest: u64,
    passed: u64,
    until: Instant,
}

impl Counter {
    /// Of a download that begins at `now`.
    pub fn new(settings: &Settings, now: Instant) -> Self {
        Self { largest: settings.largest, passed: 0, until: now + settings.within }
    }

    /// Octets that have passed.
    pub fn passed(&self) -> u64 {
        self.passed
    }

    /// When the last of them must have.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// It is asked for again, and nothing of it has passed.
    pub fn rewind(&mut self) {
        self.passed = 0;
    }

    /// Some octets pass at `now`.
    ///
    /// # Errors
    /// They must not. [`Refused::TooLarge`]: with them it is over the bound. [`Refused::TooSlow`]: its time is over.
    pub fn pass(&mut self, octets: usize, now: Instant) -> Result<(), Refused> {
        self.passed = self.passed.saturating_add(octets as u64);
        if self.passed > self.largest {
            return Err(Refused::TooLarge);
        }
        if now > self.until {
            return Err(Refused::TooSlow);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::settings;
    use super::*;
    use std::time::Duration;

    fn answered(status: u16, fields: &[(&'static str, &'static str)]) -> Result<Passed, Refused> {
        let mut headers = HeaderMap::new();
        for &(name, value) in fields {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        head(StatusCode::from_u16(status).unwrap(), &headers, &settings(&[]))
    }

    fn said(passed: &Passed) -> Vec<String> {
        let fields = passed.headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()));
        let mut fields: Vec<_> = fields.collect();
        fields.sort_unstable();
        fields
    }

    const ALWAYS: [&str; 3] = [
        "content-disposition: attachment",
        "content-security-policy: default-src 'none'; sandbox",
        "x-content-type-options: nosniff",
    ];

    #[test]
    fn redirects_do_not_pass() {
        for status in [200, 201, 204, 206, 299, 304, 400, 401, 403, 404, 410, 416, 429, 499, 500, 503, 599] {
            assert_eq!(said(&answered(status, &[]).unwrap()), ALWAYS, "{status}");
        }
        for status in [300, 301, 302, 303, 305, 306, 307, 308, 399] {
            assert_eq!(
                answered(status, &[("location", "https://evil.example/")]),
                Err(Refused::Redirected),
                "{status}"
            );
            assert_eq!(answered(status, &[]), Err(Refused::Redirected), "{status}");
        }
        for status in [100, 101, 103, 199, 600, 999] {
            assert!(matches!(answered(status, &[]), Err(Refused::BadAnswer(_))), "{status}");
        }
    }

    #[test]
    fn fields_that_do_something_do_not_pass() {
        let dropped = [
            ("set-cookie", "a=b"),
            ("set-cookie", "c=d"),
            ("location", "https://evil.example/"),
            ("content-location", "https://evil.example/"),
            ("refresh", "0; url=https://evil.example/"),
            ("alt-svc", "h2=\"evil.example:443\""),
            ("strict-transport-security", "max-age=0"),
            ("clear-site-data", "\"*\""),
            ("www-authenticate", "Basic"),
            ("proxy-authenticate", "Basic"),
            ("access-control-allow-origin", "*"),
            ("link", "<https://evil.example/>; rel=preload"),
            ("server", "evil"),
            ("via", "1.1 evil"),
            ("x-moh-provider", "b.example"),
            ("connection", "upgrade"),
            ("upgrade", "websocket"),
            ("keep-alive", "timeout=5"),
            ("trailer", "set-cookie"),
            ("transfer-encoding", "chunked"),
            ("x-content-type-options", "none"),
            ("content-disposition", "inline; filename=\"a.exe\""),
            ("content-security-policy", "default-src *"),
        ];
        assert_eq!(said(&answered(200, &dropped).unwrap()), ALWAYS);
        let passing = [
            ("accept-ranges", "bytes"),
            ("age", "5"),
            ("cache-control", "max-age=5"),
            ("cache-control", "private"),
            ("content-encoding", "gzip"),
            ("content-length", "1000"),
            ("content-range", "bytes 0-999/5000"),
            ("content-type", "application/octet-stream"),
            ("date", "Sun, 06 Nov 1994 08:49:37 GMT"),
            ("etag", "\"a\""),
            ("expires", "0"),
            ("last-modified", "Sun, 06 Nov 1994 08:49:37 GMT"),
            ("vary", "accept"),
        ];
        let passed = answered(206, &passing).unwrap();
        let mut all: Vec<_> = passing.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        all.extend(ALWAYS.map(str::to_owned));
        all.sort_unstable();
        assert_eq!(said(&passed), all);
        assert_eq!(passed.length, Some(1000));
    }

    #[test]
    fn what_is_too_large_does_not_begin() {
        let of = |status, length| answered(status, &[("content-length", length)]).map(|passed| passed.length);
        assert_eq!(of(200, "0"), Ok(Some(0)));
        assert_eq!(of(200, "1000"), Ok(Some(1000)));
        for length in ["1001", "18446744073709551615", "18446744073709551616", "99999999999999999999999999999999"] {
            for status in [200, 206, 404, 500] {
                assert_eq!(of(status, length), Err(Refused::TooLarge), "{length}");
            }
            assert_eq!(of(304, length), Ok(None), "nothing comes");
        }
        for length in ["", "-1", "+1", "1.0", "0x10", "1 0", "10, 10", "ten"] {
            assert!(matches!(of(200, length), Err(Refused::BadAnswer(_))), "{length:?}");
        }
        let two = |one, other| answered(200, &[("content-length", one), ("content-length", other)]);
        assert!(matches!(two("10", "11"), Err(Refused::BadAnswer(_))));
        let same = two("10", "10").unwrap();
        assert_eq!(same.headers.get_all("content-length").iter().count(), 1);
        // A length that is not that of what comes is not said.
        let coded = answered(200, &[("content-length", "10"), ("transfer-encoding", "chunked")]).unwrap();
        assert_eq!((coded.length, said(&coded)), (None, ALWAYS.map(str::to_owned).to_vec()));
    }

    #[test]
    fn what_comes_is_counted() {
        let now = Instant::now();
        let mut counter = Counter::new(&settings(&[]), now);
        assert_eq!(counter.pass(0, now), Ok(()));
        assert_eq!(counter.pass(999, now), Ok(()));
        assert_eq!(counter.pass(1, now), Ok(()));
        assert_eq!(counter.passed(), 1000);
        assert_eq!(counter.pass(0, now), Ok(()));
        assert_eq!(counter.pass(1, now), Err(Refused::TooLarge));
        assert_eq!(counter.pass(0, now), Err(Refused::TooLarge), "it stays so");
        assert_eq!(counter.pass(usize::MAX, now), Err(Refused::TooLarge));
        counter.rewind();
        assert_eq!((counter.passed(), counter.pass(1000, now)), (0, Ok(())));

        let end = now + Duration::from_secs(60);
        assert_eq!(counter.until(), end);
        let mut slow = Counter::new(&settings(&[]), now);
        assert_eq!(slow.pass(1, end), Ok(()));
        assert_eq!(slow.pass(1, end + Duration::from_millis(1)), Err(Refused::TooSlow));
        assert_eq!(slow.pass(1000, end + Duration::from_secs(1)), Err(Refused::TooLarge));
    }
}
