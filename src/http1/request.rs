//! The head of a request as it comes in, and that of its answer as it goes out.

use super::outgoing::{Framing, Outgoing, put_field, put_length};
use super::{Bad, End, Share, is_of_connection, length_of, name_and_value, options};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode, Uri, Version, header, response};
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Octets of a request's head at most.
pub const HEAD_MAX: usize = 64 * 1024;
/// Fields in it at most.
pub const FIELDS_MAX: usize = 100;

/// Octets that may be kept with a head for as long as that is: behind more of them it is copied.
const WITH_HEAD: usize = 4 * 1024;

/// A request, as its head has it.
#[derive(Debug)]
pub struct Request {
    /// Method, target, version and fields.
    pub parts: Parts,
    /// How its body is framed. None: it cannot be told where it ends.
    pub framing: Option<Framing>,
    /// Another request may follow on the connection.
    pub keeps: bool,
    /// Its body comes once it is told to go on (`Expect: 100-continue`).
    pub awaits_continue: bool,
    /// Trailers of the answer are read (`TE: trailers`, RFC 9110 §6.5.1).
    pub takes_trailers: bool,
}

impl Request {
    /// Takes the head of a request out of what has been read, once it is there.
    ///
    /// # Errors
    /// It is no head, or a larger one than may be.
    pub fn take(buffer: &mut BytesMut, end: &mut End) -> Result<Option<Self>, Bad> {
        const TOO_LARGE: Bad = "the request head is larger than 64 KiB";
        let Some(length) = end.find(buffer)? else {
            return if buffer.len() > HEAD_MAX { Err(TOO_LARGE) } else { Ok(None) };
        };
        if length > HEAD_MAX {
            return Err(TOO_LARGE);
        }
        let head = if buffer.len() - length > WITH_HEAD {
            let head = Bytes::copy_from_slice(buffer.get(..length).unwrap_or_default());
            buffer.advance(length);
            head
        } else {
            buffer.split_to(length).freeze()
        };
        Self::read(&head).map(Some)
    }

    fn read(head: &Bytes) -> Result<Self, Bad> {
        let mut room = [const { MaybeUninit::uninit() }; FIELDS_MAX];
        let mut read = httparse::Request::new(&mut []);
        match read.parse_with_uninit_headers(head, &mut room) {
            Ok(httparse::Status::Complete(end)) if end == head.len() => {}
            Ok(_) => return Err("the request head ends in two ways"),
            Err(httparse::Error::TooManyHeaders) => return Err("the request has more than 100 fields"),
            Err(_) => return Err("the request head cannot be read"),
        }
        let (Some(method), Some(target), Some(minor)) = (read.method, read.path, read.version) else {
            return Err("the request head cannot be read");
        };
        let mut parts = http::Request::new(()).into_parts().0;
        parts.method = Method::from_bytes(method.as_bytes()).map_err(|_| "the method is none")?;
        parts.uri = Uri::from_maybe_shared(head.slice_ref(target.as_bytes())).map_err(|_| "the target is none")?;
        parts.version = if minor == 0 { Version::HTTP_10 } else { Version::HTTP_11 };
        let mut framed = Framed::default();
        parts.headers.reserve(read.headers.len());
        for field in read.headers.iter() {
            let (name, value) = name_and_value(head, field)?;
            if framed.takes(&name, &value) {
                parts.headers.append(name, value);
            }
        }
        let is_11 = minor > 0;
        let framing = framed.framing(is_11);
        if framed.codings > 0 {
            // Where both are said the length is none (RFC 9112 §6.3), and nothing that follows is to be trusted.
            parts.headers.remove(header::CONTENT_LENGTH);
        }
        let is_framed_once = framed.codings == 0 || framed.length.is_none();
        Ok(Self {
            parts,
            framing,
            keeps: is_11 && !framed.closes && framing.is_some() && is_framed_once,
            awaits_continue: is_11 && framed.expects,
            takes_trailers: framed.takes_trailers,
        })
    }
}

/// What the fields of a head say of its connection and its body.
#[derive(Debug, Default)]
struct Framed {
    length: Option<u64>,
    is_unreadable: bool,
    codings: usize,
    closes: bool,
    expects: bool,
    takes_trailers: bool,
}

impl Framed {
    /// Notes a field; false: it has been said before, and is as good as said once (RFC 9110 §8.6).
    fn takes(&mut self, name: &http::HeaderName, value: &HeaderValue) -> bool {
        match *name {
            header::CONTENT_LENGTH => match (length_of(value.as_bytes()), self.length) {
                (Some(length), Some(before)) if length == before => return false,
                (Some(length), None) => self.length = Some(length),
                _ => self.is_unreadable = true,
            },
            header::TRANSFER_ENCODING => {
                self.codings += 1;
                self.is_unreadable |= self.codings > 1 || !value.as_bytes().eq_ignore_ascii_case(b"chunked");
            }
            header::CONNECTION => self.closes |= options(value).any(|option| option.eq_ignore_ascii_case(b"close")),
            header::TE => self.takes_trailers |= options(value).any(|coding| coding.eq_ignore_ascii_case(b"trailers")),
            header::EXPECT => self.expects |= value.as_bytes().eq_ignore_ascii_case(b"100-continue"),
            _ => {}
        }
        true
    }

    fn framing(&self, is_11: bool) -> Option<Framing> {
        match (self.codings, self.length) {
            _ if self.is_unreadable => None,
            (0, length) => Some(Framing::Length(length.unwrap_or(0))),
            _ => is_11.then_some(Framing::Chunked),
        }
    }
}

/// An answer's head on its way out.
#[derive(Debug)]
pub struct Answer {
    /// What is to be written of it, and how its body follows.
    pub outgoing: Outgoing,
    /// No body follows, whatever its length says (RFC 9110 §6.4.1).
    pub is_bodyless: bool,
    /// The connection ends with it.
    pub closes: bool,
}

impl Answer {
    /// An answer with this head, without what is the connection's, to a request of this method and version. `length` is that of
    /// the body, where it is known; `closes`: the connection ends with it, which is said; it may have to for other reasons.
    pub fn new(head: &response::Parts, length: Option<u64>, asked: (&Method, Version), closes: bool) -> Self {
        let is_bodyless = *asked.0 == Method::HEAD
            || matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
            || head.status.is_informational();
        let is_11 = asked.1 == Version::HTTP_11;
        let framing = match length {
            _ if is_bodyless => Framing::Length(0),
            Some(length) => Framing::Length(length),
            None if is_11 => Framing::Chunked,
            None => Framing::UntilEnd,
        };
        let closes = closes || !is_11 || framing == Framing::UntilEnd;
        let fields: usize = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
        let mut front = Outgoing::room(fields + 160, length.filter(|_| !is_bodyless));
        put_status(&mut front, head.status);
        for (name, value) in &head.headers {
            let is_told_below =
                *name == header::CONTENT_LENGTH && !(is_bodyless && head.status != StatusCode::NO_CONTENT);
            if !is_told_below && !is_of_connection(name) {
                put_field(&mut front, name.as_str().as_bytes(), value.as_bytes());
            }
        }
        match framing {
            Framing::Length(length) if !is_bodyless => put_length(&mut front, length),
            Framing::Chunked => put_field(&mut front, b"transfer-encoding", b"chunked"),
            _ => {}
        }
        if closes {
            put_field(&mut front, b"connection", b"close");
        }
        if !head.headers.contains_key(header::DATE) {
            put_field(&mut front, b"date", date().as_bytes());
        }
        front.put_slice(b"\r\n");
        let is_ended = is_bodyless || framing == Framing::Length(0);
        Self { outgoing: Outgoing::new(front, framing, is_ended, Share::of_answers), is_bodyless, closes }
    }
}

fn put_status(into: &mut BytesMut, status: StatusCode) {
    if status == StatusCode::OK {
        return into.put_slice(b"HTTP/1.1 200 OK\r\n");
    }
    into.put_slice(b"HTTP/1.1 ");
    into.put_slice(status.as_str().as_bytes());
    into.put_slice(b" ");
    into.put_slice(status.canonical_reason().unwrap_or_default().as_bytes());
    into.put_slice(b"\r\n");
}

thread_local! {
    /// The second of the clock that `Date` was written for last, and what was.
    static DATE: RefCell<(Duration, HeaderValue)> = const { RefCell::new((Duration::MAX, HeaderValue::from_static(""))) };
}

/// When an answer is sent, as one that has not been told has to say (RFC 9110 §6.6.1).
pub fn date() -> HeaderValue {
    let now = SystemTime::now();
    let second = Duration::from_secs(now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs());
    DATE.with_borrow_mut(|(of, date)| {
        if *of != second {
            // It is text.
            if let Ok(said) = HeaderValue::try_from(httpdate::fmt_http_date(now)) {
                (*of, *date) = (second, said);
            }
        }
        date.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(head: &str) -> Result<Request, Bad> {
        let mut buffer = BytesMut::from(head);
        Request::take(&mut buffer, &mut End::default()).map(|request| request.expect("it is whole"))
    }

    fn with(fields: &str) -> Request {
        taken(&format!("POST /x HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).unwrap()
    }

    #[test]
    fn a_head_is_taken_once_it_is_there() {
        let all = b"POST /x?y HTTP/1.1\r\nHost: a\r\nX-Y:  z \r\n\r\nbody";
        let (mut buffer, mut end) = (BytesMut::new(), End::default());
        for octet in &all[..all.len() - 5] {
            buffer.put_u8(*octet);
            assert!(Request::take(&mut buffer, &mut end).unwrap().is_none());
        }
        buffer.put_slice(&all[all.len() - 5..]);
        let Request { parts, framing, keeps, awaits_continue, takes_trailers } =
            Request::take(&mut buffer, &mut end).unwrap().unwrap();
        assert_eq!((parts.method, parts.uri.to_string()), (Method::POST, "/x?y".to_owned()));
        assert_eq!((&parts.headers["host"], &parts.headers["x-y"]), (&"a".parse().unwrap(), &"z".parse().unwrap()));
        assert_eq!((framing, keeps, awaits_continue, takes_trailers), (Some(Framing::Length(0)), true, false, false));
        assert_eq!(buffer, "body");
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        for bad in [
            "POST /x HTTP/1.1\r\nHost : a\r\n\r\n",
            "POST /x HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
            "POST /x HTTP/1.1\r\n: a\r\n\r\n",
            "POST /x HTTP/1.1\r\nHost: a\0\r\n\r\n",
            "POST /x HTTP/1.1\r\nHost: a\rb\r\n\r\n",
            "POST /x HTTP/1.1\nHost: a\r\n\r\n",
            "POST  /x HTTP/1.1\r\n\r\n",
            "POST /\u{1} HTTP/1.1\r\n\r\n",
            "POST /x HTTP/2.0\r\n\r\n",
            "POST /x http/1.1\r\n\r\n",
            "POST /x\r\n\r\n",
            "PRI * HTTP/2.0\r\n\r\n",
            "\r\n",
        ] {
            assert!(taken(bad).is_err(), "{bad:?}");
        }
        let fields = |count: usize| (0..count).map(|n| format!("x-{n}: y\r\n")).collect::<String>();
        assert!(taken(&format!("GET / HTTP/1.1\r\n{}\r\n", fields(100))).is_ok());
        assert!(taken(&format!("GET / HTTP/1.1\r\n{}\r\n", fields(101))).is_err());
        let long = |octets: usize| format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(octets - 23));
        assert!(taken(&long(HEAD_MAX)).is_ok());
        assert!(taken(&long(HEAD_MAX + 1)).is_err());
        let mut endless = BytesMut::from(&*vec![b'y'; HEAD_MAX + 1]);
        assert!(Request::take(&mut endless, &mut End::default()).is_err());
    }

    #[test]
    fn a_body_is_framed_in_one_way_or_in_none() {
        for (fields, framing, keeps) in [
            ("", Some(Framing::Length(0)), true),
            ("Content-Length: 5\r\n", Some(Framing::Length(5)), true),
            ("Content-Length: 5\r\nContent-Length: 5\r\n", Some(Framing::Length(5)), true),
            ("Content-Length: 5\r\nContent-Length: 05\r\n", Some(Framing::Length(5)), true),
            ("Transfer-Encoding: Chunked\r\n", Some(Framing::Chunked), true),
            ("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", Some(Framing::Chunked), false),
            ("Connection: x, Close\r\n", Some(Framing::Length(0)), false),
            ("Content-Length: 5\r\nContent-Length: 6\r\n", None, false),
            ("Content-Length: 5, 5\r\n", None, false),
            ("Content-Length: \r\n", None, false),
            ("Content-Length: 18446744073709551616\r\n", None, false),
            ("Transfer-Encoding: gzip, chunked\r\n", None, false),
            ("Transfer-Encoding: identity\r\n", None, false),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", None, false),
        ] {
            let request = with(fields);
            assert_eq!((request.framing, request.keeps), (framing, keeps), "{fields:?}");
            let lengths = request.parts.headers.get_all("content-length").iter().count();
            assert!(framing.is_none() || lengths <= 1, "{fields:?}");
            assert!(framing != Some(Framing::Chunked) || lengths == 0, "{fields:?}");
        }
        let old = taken("POST /x HTTP/1.0\r\nConnection: keep-alive\r\nExpect: 100-continue\r\n\r\n").unwrap();
        assert_eq!((old.framing, old.keeps, old.awaits_continue), (Some(Framing::Length(0)), false, false));
        let old = taken("POST /x HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
        assert_eq!((old.framing, old.keeps), (None, false));
        assert!(with("Expect: 100-Continue\r\n").awaits_continue);
        assert!(with("TE: gzip, Trailers\r\n").takes_trailers);
    }

    #[test]
    fn an_answer_says_how_it_ends() {
        let said = |status: u16, fields: &[(&str, &str)], length, method: Method, version, closes| {
            let mut answer = http::Response::builder().status(status);
            for (name, value) in fields {
                answer = answer.header(*name, *value);
            }
            let head = answer.body(()).unwrap().into_parts().0;
            let mut answer = Answer::new(&head, length, (&method, version), closes);
            let mut octets = vec![];
            let written =
                answer.outgoing.poll_write(&mut std::task::Context::from_waker(std::task::Waker::noop()), &mut octets);
            assert!(written.is_ready());
            (String::from_utf8(octets).unwrap(), answer.closes, answer.is_bodyless)
        };
        let dated = &[("date", "Sun, 06 Nov 1994 08:49:37 GMT")][..];
        let date = "date: Sun, 06 Nov 1994 08:49:37 GMT\r\n";
        let (post, new) = (Method::POST, Version::HTTP_11);
        for (got, expected) in [
            (
                said(200, dated, Some(70), post.clone(), new, false),
                (format!("HTTP/1.1 200 OK\r\n{date}content-length: 70\r\n\r\n"), false, false),
            ),
            (
                said(599, dated, Some(0), post.clone(), new, true),
                (format!("HTTP/1.1 599 \r\n{date}content-length: 0\r\nconnection: close\r\n\r\n"), true, false),
            ),
            (
                said(200, dated, None, post.clone(), new, false),
                (format!("HTTP/1.1 200 OK\r\n{date}transfer-encoding: chunked\r\n\r\n"), false, false),
            ),
            (
                said(200, dated, None, post.clone(), Version::HTTP_10, false),
                (format!("HTTP/1.1 200 OK\r\n{date}connection: close\r\n\r\n"), true, false),
            ),
            (said(204, dated, None, post, new, false), (format!("HTTP/1.1 204 No Content\r\n{date}\r\n"), false, true)),
            (
                said(404, &[dated[0], ("content-length", "7")], Some(0), Method::HEAD, new, false),
                (format!("HTTP/1.1 404 Not Found\r\n{date}content-length: 7\r\n\r\n"), false, true),
            ),
        ] {
            assert_eq!(got, expected);
        }
        let (octets, ..) = said(200, &[], Some(u64::MAX), Method::GET, new, false);
        let date = octets.lines().find_map(|line| line.strip_prefix("date: ")).unwrap();
        let at = httpdate::parse_http_date(date).unwrap();
        assert!(SystemTime::now().duration_since(at).unwrap() < Duration::from_secs(5));
        assert!(octets.contains(&format!("content-length: {}\r\n", u64::MAX)));
    }
}
