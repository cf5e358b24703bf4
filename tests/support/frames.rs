//! HTTP/2 by hand (RFC 9113): a client that sends any frame in any order, and sees every frame that comes back. Fields are
//! written as HPACK literals that are not indexed (RFC 7541 §6.2.2); of what comes back only `:status` is read.
//!
//! ```ignore
//! let tls = raw_tls(addr, "ds.b.example", &ca.pem(), &["h2"], None).await?;
//! let mut client = Connection::open(tls, &[]).await?;
//! client.send(&Frame::headers(1, true, &request("GET", "/verification_key"))).await?;
//! assert_eq!(client.answer(1).await, Answer::Status(415));
//! client.flood(&Frame::ping([0; 8]).encode(), 10_000).await;
//! assert!(client.ended(Duration::from_secs(5)).await.is_some());
//! ```
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

use std::fmt;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

/// What a client's connection begins with (RFC 9113 §3.4), before its SETTINGS.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

/// The flag of DATA and HEADERS: the stream's last.
pub const END_STREAM: u8 = 1;
/// The flag of SETTINGS and PING: an answer.
pub const ACK: u8 = 1;
/// The flag of HEADERS and CONTINUATION: no CONTINUATION follows.
pub const END_HEADERS: u8 = 4;

pub const PROTOCOL_ERROR: u32 = 1;
pub const REFUSED_STREAM: u32 = 7;
pub const CANCEL: u32 = 8;

pub const HEADER_TABLE_SIZE: u16 = 1;
pub const MAX_CONCURRENT_STREAMS: u16 = 3;
pub const INITIAL_WINDOW_SIZE: u16 = 4;
pub const MAX_HEADER_LIST_SIZE: u16 = 6;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A frame (RFC 9113 §4.1), its payload as it is.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, flags, stream, length) = (self.kind, self.flags, self.stream, self.payload.len());
        write!(f, "Frame(type {kind}, flags {flags:#x}, stream {stream}, {length} octets)")
    }
}

impl Frame {
    /// Any frame, of a type that there is or not.
    pub fn new(kind: u8, flags: u8, stream: u32, payload: impl Into<Vec<u8>>) -> Frame {
        Frame { kind, flags, stream, payload: payload.into() }
    }

    /// A whole request head.
    pub fn headers(stream: u32, end_stream: bool, fields: &[(&str, &str)]) -> Frame {
        Frame::new(HEADERS, END_HEADERS | u8::from(end_stream), stream, hpack(fields))
    }

    /// The beginning of a request head: CONTINUATION follows.
    pub fn headers_begun(stream: u32, fragment: impl Into<Vec<u8>>) -> Frame {
        Frame::new(HEADERS, 0, stream, fragment)
    }

    pub fn continuation(stream: u32, last: bool, fragment: impl Into<Vec<u8>>) -> Frame {
        Frame::new(CONTINUATION, if last { END_HEADERS } else { 0 }, stream, fragment)
    }

    pub fn data(stream: u32, end_stream: bool, octets: impl Into<Vec<u8>>) -> Frame {
        Frame::new(DATA, u8::from(end_stream), stream, octets)
    }

    pub fn rst_stream(stream: u32, code: u32) -> Frame {
        Frame::new(RST_STREAM, 0, stream, code.to_be_bytes())
    }

    /// Not exclusive, on stream 0, with a weight of 16 (§6.3).
    pub fn priority(stream: u32) -> Frame {
        Frame::new(PRIORITY, 0, stream, [0, 0, 0, 0, 15])
    }

    pub fn settings(settings: &[(u16, u32)]) -> Frame {
        let entry = |(id, value): &(u16, u32)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
        Frame::new(SETTINGS, 0, 0, settings.iter().flat_map(entry).collect::<Vec<u8>>())
    }

    pub fn settings_ack() -> Frame {
        Frame::new(SETTINGS, ACK, 0, [0u8; 0])
    }

    pub fn ping(octets: [u8; 8]) -> Frame {
        Frame::new(PING, 0, 0, octets)
    }

    /// Of a stream, or of the connection with stream 0.
    pub fn window_update(stream: u32, increment: u32) -> Frame {
        Frame::new(WINDOW_UPDATE, 0, stream, increment.to_be_bytes())
    }

    /// The frame's octets.
    ///
    /// # Panics
    /// Over 2^24 - 1 octets of payload, whose length has no form.
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).ok().filter(|length| *length < 1 << 24).expect("a length");
        let mut octets = length.to_be_bytes()[1..].to_vec();
        octets.extend([self.kind, self.flags]);
        octets.extend(self.stream.to_be_bytes());
        octets.extend(&self.payload);
        octets
    }

    pub fn ends_stream(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }

    /// Of RST_STREAM and GOAWAY.
    pub fn error_code(&self) -> Option<u32> {
        let at = match self.kind {
            RST_STREAM => 0,
            GOAWAY => 4,
            _ => return None,
        };
        Some(u32::from_be_bytes(self.payload.get(at..at + 4)?.try_into().ok()?))
    }

    /// What SETTINGS say.
    pub fn settings_list(&self) -> Vec<(u16, u32)> {
        let entry = |entry: &[u8]| {
            let (id, value) = entry.split_at(2);
            (u16::from_be_bytes(id.try_into().unwrap()), u32::from_be_bytes(value.try_into().unwrap()))
        };
        self.payload.chunks_exact(6).map(entry).collect()
    }

    /// `:status`, which is first in an answer's head. Dynamic entries are not followed: a client of this file allows none.
    pub fn status(&self) -> Option<u16> {
        if self.kind != HEADERS {
            return None;
        }
        let mut block = self.payload.as_slice();
        // A change of the table's size, in an octet or in more (RFC 7541 §6.3).
        while let [first, rest @ ..] = block
            && first >> 5 == 1
        {
            block = rest;
            if first & 0x1f == 0x1f {
                let continued = block.iter().take_while(|octet| **octet & 0x80 != 0).count();
                block = block.get(continued + 1..)?;
            }
        }
        let (first, rest) = block.split_first()?;
        if first & 0x80 != 0 {
            let known = [200, 204, 206, 304, 400, 404, 500];
            return known.get(usize::from(first & 0x7f).checked_sub(8)?).copied();
        }
        // A literal whose name is in the table: six bits of index where it is to be indexed, else four.
        let name = first & if first & 0x40 != 0 { 0x3f } else { 0x0f };
        let (length, text) = rest.split_first()?;
        let text = text.get(..usize::from(length & 0x7f))?;
        (8..=14).contains(&name).then_some(())?;
        if length & 0x80 != 0 {
            huffman_digits(text)?.parse().ok()
        } else {
            std::str::from_utf8(text).ok()?.parse().ok()
        }
    }
}

/// Three digits of the Huffman code (RFC 7541 Appendix B): 0 to 2 in five bits, 3 to 9 in six.
fn huffman_digits(octets: &[u8]) -> Option<String> {
    let bits: Vec<u8> = octets.iter().flat_map(|octet| (0..8).rev().map(move |bit| octet >> bit & 1)).collect();
    let number = |bits: &[u8]| bits.iter().fold(0u8, |number, bit| number << 1 | bit);
    let (mut at, mut digits) = (0, String::new());
    for _ in 0..3 {
        let five = number(bits.get(at..at + 5)?);
        let (digit, length) =
            if five <= 2 { (five, 5) } else { (number(bits.get(at..at + 6)?).checked_sub(0b01_1001)? + 3, 6) };
        digits.push(char::from_digit(u32::from(digit), 10)?);
        at += length;
    }
    Some(digits)
}

/// Fields as literals that are not indexed, with new names, none of it Huffman coded (RFC 7541 §6.2.2).
pub fn hpack(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = vec![];
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            hpack_length(&mut block, text.len());
            block.extend(text.as_bytes());
        }
    }
    block
}

/// An integer with a prefix of seven bits (RFC 7541 §5.1).
fn hpack_length(block: &mut Vec<u8>, length: usize) {
    if length < 0x7f {
        block.push(length as u8);
        return;
    }
    block.push(0x7f);
    let mut rest = length - 0x7f;
    while rest >= 0x80 {
        block.push(rest as u8 & 0x7f | 0x80);
        rest >>= 7;
    }
    block.push(rest as u8);
}

/// The fields of a request to `ds.b.example`, as every endpoint with a body wants them.
pub fn request(method: &'static str, path: &'static str) -> [(&'static str, &'static str); 5] {
    [
        (":method", method),
        (":scheme", "https"),
        (":authority", "ds.b.example"),
        (":path", path),
        ("content-type", "application/octet-stream"),
    ]
}

/// What the next frame is.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Frame(Frame),
    /// None has come in that time.
    Nothing,
    /// The connection is closed.
    End,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It was answered with this status, and the answer was complete.
    Status(u16),
    /// Its stream was reset with this code before an answer was whole.
    Reset(u32),
    /// The connection ended before, with GOAWAY of this code, or without.
    Gone(Option<u32>),
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// The code of the last GOAWAY. One that is sent and followed by a reset may be lost on its way.
    pub goaway: Option<u32>,
}

/// A client's connection; dropped, it is closed. A task reads all the while, so that no flood is held up by what nobody
/// reads.
pub struct Connection {
    write: WriteHalf<Box<dyn Stream>>,
    frames: mpsc::UnboundedReceiver<Frame>,
    reader: JoinHandle<()>,
    goaway: Option<u32>,
    /// What the server's first SETTINGS say.
    pub settings: Vec<(u16, u32)>,
}

pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("settings", &self.settings).field("goaway", &self.goaway).finish()
    }
}

impl Connection {
    /// Begins HTTP/2 on a stream: preface and SETTINGS, the server's SETTINGS, an ACK of them.
    pub async fn open(stream: impl Stream + 'static, settings: &[(u16, u32)]) -> io::Result<Connection> {
        let stream: Box<dyn Stream> = Box::new(stream);
        let (read, write) = tokio::io::split(stream);
        let (sender, frames) = mpsc::unbounded_channel();
        let reader = tokio::spawn(receive(read, sender));
        let mut connection = Connection { write, frames, reader, goaway: None, settings: vec![] };
        // No table: the server's literals stay literals.
        let settings: Vec<_> = [(HEADER_TABLE_SIZE, 0)].iter().chain(settings).copied().collect();
        connection.write(&[PREFACE, &Frame::settings(&settings).encode()].concat()).await?;
        let first = connection.until(|frame| frame.kind == SETTINGS && frame.flags & ACK == 0).await;
        connection.settings = first.ok_or(io::ErrorKind::UnexpectedEof)?.settings_list();
        Ok(connection)
    }

    /// A value of the server's first SETTINGS.
    pub fn setting(&self, id: u16) -> Option<u32> {
        self.settings.iter().find(|(other, _)| *other == id).map(|(_, value)| *value)
    }

    /// Sends octets, a frame or none.
    pub async fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        let write = async {
            self.write.write_all(octets).await?;
            self.write.flush().await
        };
        timeout(PATIENCE, write).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    pub async fn send(&mut self, frame: &Frame) -> io::Result<()> {
        self.write(&frame.encode()).await
    }

    /// Sends a request with a body, whole.
    pub async fn post(&mut self, stream: u32, path: &'static str, body: &[u8]) -> io::Result<()> {
        let head = Frame::headers(stream, false, &request("POST", path)).encode();
        self.write(&[head, Frame::data(stream, true, body).encode()].concat()).await
    }

    /// Writes these octets again and again, until that fails or it is done: how often they were taken. What is taken may
    /// still be unread.
    pub async fn flood(&mut self, octets: &[u8], times: usize) -> usize {
        for taken in 0..times {
            if self.write(octets).await.is_err() {
                return taken;
            }
        }
        times
    }

    /// The next frame. SETTINGS are acknowledged.
    pub async fn next(&mut self, within: Duration) -> Next {
        let Ok(frame) = timeout(within, self.frames.recv()).await else { return Next::Nothing };
        let Some(frame) = frame else { return Next::End };
        match frame.kind {
            SETTINGS if frame.flags & ACK == 0 => {
                let _ = self.send(&Frame::settings_ack()).await;
            }
            GOAWAY => self.goaway = frame.error_code(),
            _ => {}
        }
        Next::Frame(frame)
    }

    /// Frames up to one of this kind, which is returned. None: the connection ended before.
    ///
    /// # Panics
    /// It takes longer than five seconds.
    pub async fn until(&mut self, wanted: impl Fn(&Frame) -> bool) -> Option<Frame> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.next(deadline.saturating_duration_since(Instant::now())).await {
                Next::Frame(frame) if wanted(&frame) => return Some(frame),
                Next::Frame(_) => {}
                Next::End => return None,
                Next::Nothing => panic!("the frame that is waited for does not come"),
            }
        }
    }

    /// What becomes of the request on a stream; frames of other streams are passed over.
    ///
    /// # Panics
    /// Nothing does within five seconds.
    pub async fn answer(&mut self, stream: u32) -> Answer {
        let mut status = None;
        loop {
            let Some(frame) = self.until(|frame| frame.stream == stream).await else {
                return Answer::Gone(self.goaway);
            };
            match (frame.kind, status) {
                (HEADERS, None) => status = Some(frame.status().expect("an answer begins with its status")),
                // NO_ERROR: the answer is whole, the rest of the request is not wanted (RFC 9113 §8.1).
                (RST_STREAM, Some(status)) if frame.error_code() == Some(0) => return Answer::Status(status),
                (RST_STREAM, _) => return Answer::Reset(frame.error_code().unwrap_or_default()),
                _ => {}
            }
            if let Some(status) = status.filter(|_| frame.ends_stream()) {
                return Answer::Status(status);
            }
        }
    }

    /// Waits for the connection's end. None: it is still open after that time.
    pub async fn ended(&mut self, within: Duration) -> Option<End> {
        let deadline = Instant::now() + within;
        loop {
            // Frames that keep coming are no end.
            if Instant::now() >= deadline {
                return None;
            }
            match timeout_at(deadline, self.frames.recv()).await {
                Err(_) => return None,
                Ok(None) => return Some(End { goaway: self.goaway }),
                Ok(Some(frame)) if frame.kind == GOAWAY => self.goaway = frame.error_code(),
                Ok(Some(_)) => {}
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Reads frames until there are no more, or nobody wants them.
async fn receive(mut read: ReadHalf<Box<dyn Stream>>, sender: mpsc::UnboundedSender<Frame>) {
    while let Ok(frame) = read_frame(&mut read).await {
        if sender.send(frame).is_err() {
            return;
        }
    }
}

/// Reads a frame.
///
/// # Errors
/// The stream ended, or failed.
pub async fn read_frame(read: &mut (impl AsyncRead + Unpin)) -> io::Result<Frame> {
    let mut head = [0; 9];
    read.read_exact(&mut head).await?;
    let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = head;
    let mut payload = vec![0; u32::from_be_bytes([0, l0, l1, l2]) as usize];
    read.read_exact(&mut payload).await?;
    Ok(Frame { kind, flags, stream: u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]), payload })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octets_of_frames() {
        assert_eq!(Frame::ping(*b"12345678").encode(), b"\0\0\x08\x06\0\0\0\0\x0012345678");
        assert_eq!(Frame::settings(&[(3, 100)]).encode(), b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64");
        assert_eq!(Frame::rst_stream(5, CANCEL).encode(), b"\0\0\x04\x03\0\0\0\0\x05\0\0\0\x08");
        assert_eq!(hpack(&[(":path", "/")]), b"\0\x05:path\x01/");
        let long = "y".repeat(300);
        assert_eq!(hpack(&[("x", long.as_str())])[..5], [0, 1, b'x', 0x7f, 0xad]);
        assert_eq!(hpack(&[("x", long.as_str())])[5], 1, "127 + 0x2d + 1 * 128 = 300");
    }

    #[test]
    fn a_status_in_each_of_its_forms() {
        let status = |block: &[u8]| Frame::new(HEADERS, END_HEADERS, 1, block).status();
        assert_eq!(status(b"\x88"), Some(200));
        assert_eq!(status(b"\x20\x8d"), Some(404), "after a change of the table's size");
        assert_eq!(status(b"\x3f\xe1\x1f\x8c"), Some(400), "and a large one");
        assert_eq!(status(b"\x48\x03503"), Some(503));
        assert_eq!(status(b"\x08\x03503"), Some(503));
        // RFC 7541 C.6.1: 302 in Huffman's code.
        assert_eq!(status(b"\x48\x82\x64\x02"), Some(302));
        assert_eq!(status(b"\x48\x83\x64\x0e\xff"), Some(307), "C.6.2");
        assert_eq!(status(b"\xbe"), None);
    }

    #[tokio::test]
    async fn what_is_written_is_read() {
        let frame = Frame::headers(7, true, &request("GET", "/verification_key"));
        let octets = [frame.encode(), Frame::settings_ack().encode()].concat();
        let mut read = octets.as_slice();
        assert_eq!(read_frame(&mut read).await.unwrap(), frame);
        assert_eq!(read_frame(&mut read).await.unwrap(), Frame::settings_ack());
        assert!(read_frame(&mut read).await.is_err());
    }
}
