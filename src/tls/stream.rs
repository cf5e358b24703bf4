//! TLS as a server, over rustls's connections without buffers (`rustls::unbuffered`): a connection that waits holds none.
//!
//! What comes is read into a place that all connections of a thread share, and decrypted there; what is left behind is a record
//! that has not come whole, octets that nobody has taken yet, and records that whoever reads has no room for: these are
//! decrypted when it has. What goes out is encrypted in such a place too, and written from there; what is not taken of it is
//! kept. So nothing is held for most connections most of the time, and many records are one call to the kernel.

use crate::copying::{self, copy};
use bytes::{Buf as _, Bytes, BytesMut};
use rustls::ServerConfig;
use rustls::server::{Acceptor, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus};
use std::cell::Cell;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};

/// What a record has around what it says, if it is not padded (RFC 8446 §5.2): its head, its type, and a tag.
const AROUND: usize = 5 + 1 + 16;

/// What a record says at most, and what that takes: whoever has much to send sends these.
pub const RECORD: usize = 16 * 1024;
const FULL_RECORD: usize = RECORD + AROUND;

/// What is read at once at most, with a record that was left behind: four records of 16 KiB, or four frames of HTTP/2 of as much
/// of which each has its head in a record of its own.
pub const READ: usize = 4 * (FULL_RECORD + 9 + AROUND);

/// Octets that are encrypted at once, and what these take.
const WRITE: usize = 48 * 1024;
const WRITTEN: usize = 64 * 1024;

/// Up to here what is kept has a place of a power of two: the allocator has something of its own for each size.
const FEW_SIZES: usize = 16 * 1024;

/// The size of the place for so many octets, of which there are some.
fn place_for(octets: usize) -> usize {
    if octets > FEW_SIZES { octets } else { octets.next_power_of_two() }
}

/// What so many octets of records say at most: each has something around it.
fn said_at_most(records: usize) -> usize {
    records / FULL_RECORD * RECORD + (records % FULL_RECORD).saturating_sub(AROUND)
}

/// The size of the place for what they say. What is more than a record has one of few sizes: it differs from time to time, and the
/// allocator would have places of each.
fn room_for(said: usize) -> usize {
    if (RECORD..=4 * RECORD).contains(&said) { said.next_power_of_two() } else { said }
}

/// Where what is to be encrypted begins in a place of ours: not a little below where rustls copies it to, behind a record's head.
const TO_WRITE: usize = 16;
const RECORD_HEAD: usize = 5;
const _: () = assert!(TO_WRITE >= RECORD_HEAD && TO_WRITE + WRITE <= READ);

/// Octets of a ClientHello at most, with those of its records.
const HELLO: usize = READ;

thread_local! {
    static ROOM_TO_READ: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
    static ROOM_TO_WRITE: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

/// How much of what has come to the system is read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// Nothing: only what was read before is there.
    Nothing,
    /// No more than records that say so many octets.
    Octets(usize),
    /// As much as there is room for.
    Amply,
}

/// Who takes what is decrypted, where rustls has it.
pub trait Sink {
    /// Takes octets: how many. The rest comes again, before what comes after it.
    fn put(&mut self, octets: &[u8]) -> usize;

    /// It takes no more for now.
    fn is_full(&self) -> bool;

    /// Has octets read to where it wants them. None: it has to look at them first.
    fn poll_read_from(&mut self, _: &mut Context<'_>, _: Pin<&mut dyn AsyncRead>) -> Option<Poll<io::Result<()>>> {
        None
    }
}

/// A place that the connections of this thread take turns in, while this is there.
struct Room {
    octets: Box<[u8]>,
    of: &'static std::thread::LocalKey<Cell<Option<Box<[u8]>>>>,
}

impl Room {
    fn to_read() -> Self {
        Self { octets: ROOM_TO_READ.take().unwrap_or_else(|| vec![0; READ].into()), of: &ROOM_TO_READ }
    }

    fn to_write() -> Self {
        Self { octets: ROOM_TO_WRITE.take().unwrap_or_else(|| vec![0; WRITTEN].into()), of: &ROOM_TO_WRITE }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // A connection may have kept it.
        if !self.octets.is_empty() {
            self.of.set(Some(std::mem::take(&mut self.octets)));
        }
    }
}

/// Octets that are still to be processed.
#[derive(Default)]
struct Incoming {
    /// A [`Room`]'s, while records are read or there are whole ones; else a place of about their size.
    octets: Box<[u8]>,
    from: usize,
    to: usize,
}

/// A connection after its handshake.
pub struct TlsStream<IO> {
    io: IO,
    connection: UnbufferedServerConnection,
    server_name: Option<Box<str>>,
    /// What has come and is not decrypted: most often nothing, or the beginning of a record.
    incoming: Incoming,
    /// There may be whole records in that.
    has_records: bool,
    /// What was decrypted, and nobody has taken.
    plain: BytesMut,
    /// What was encrypted, and is not out.
    outgoing: BytesMut,
    /// What came was no TLS: nothing is to be read or written any more, but for that being said.
    has_failed: bool,
    /// The other side has said that no more comes.
    is_read_closed: bool,
    /// We have.
    is_write_closed: bool,
}

impl<IO> std::fmt::Debug for TlsStream<IO> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsStream").finish_non_exhaustive()
    }
}

fn bad(e: rustls::Error) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, e)
}

fn cut_off() -> io::Error {
    io::Error::new(ErrorKind::UnexpectedEof, "it ended without close_notify")
}

impl Incoming {
    fn octets(&mut self) -> &mut [u8] {
        self.octets.get_mut(self.from..self.to).unwrap_or_default()
    }

    fn len(&self) -> usize {
        self.to - self.from
    }

    /// So many of them are processed.
    fn advance(&mut self, processed: usize) {
        self.from = (self.from + processed).min(self.to);
    }

    /// Has them where more can be read behind them: that place, as it is.
    fn room(&mut self) -> &mut [u8] {
        let length = self.len();
        if self.octets.len() == READ {
            if self.from > 0 {
                self.octets.copy_within(self.from..self.to, 0);
            }
        } else {
            let mut room = Room::to_read();
            if let (Some(to), Some(from)) = (room.octets.get_mut(..length), self.octets.get(self.from..self.to)) {
                to.copy_from_slice(from);
            }
            self.octets = std::mem::take(&mut room.octets);
        }
        (self.from, self.to) = (0, length.min(READ));
        self.octets.get_mut(length..).unwrap_or_default()
    }

    /// Puts them into a place of about their size, or none, and gives the one that is shared back.
    fn settle(&mut self) {
        if self.octets.len() != READ {
            return;
        }
        let length = self.len();
        let mut rest = Vec::new();
        if length > 0 {
            rest.reserve_exact(place_for(length));
            rest.extend_from_slice(self.octets());
            rest.resize(rest.capacity(), 0);
        }
        ROOM_TO_READ.set(Some(std::mem::replace(&mut self.octets, rest.into())));
        (self.from, self.to) = (0, length);
    }
}

impl From<BytesMut> for Incoming {
    fn from(octets: BytesMut) -> Self {
        let to = octets.len();
        Self { octets: Vec::from(octets).into(), from: 0, to }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> TlsStream<IO> {
    /// Does the handshake. It has no time limit of its own.
    ///
    /// # Errors
    /// The connection ends, or what comes is no TLS, or none that `config` has: the other side is told.
    pub async fn accept(config: Arc<ServerConfig>, mut io: IO) -> io::Result<Self> {
        let (hello, server_name) = hello(&mut io).await?;
        let connection = UnbufferedServerConnection::new(config).map_err(bad)?;
        let mut this = Self {
            io,
            connection,
            server_name,
            incoming: Incoming::from(hello),
            has_records: true,
            plain: BytesMut::new(),
            outgoing: BytesMut::new(),
            has_failed: false,
            is_read_closed: false,
            is_write_closed: false,
        };
        while this.connection.is_handshaking() {
            // It sends what there is to be sent. Tickets, which come last, are not waited for.
            if !poll_fn(|cx| this.poll_read_more(cx, Read::Amply, None)).await? {
                return Err(cut_off());
            }
        }
        Ok(this)
    }

    /// The name that the client has asked for (SNI).
    pub fn server_name(&self) -> Option<&str> {
        self.server_name.as_deref()
    }

    /// What was negotiated, and who is there.
    pub fn session(&self) -> &rustls::CommonState {
        &self.connection
    }

    /// Processes the records that have come whole, all of them or until nothing more goes `into` there. What does not is kept.
    /// Whether something went there.
    fn process(&mut self, mut into: Option<&mut dyn Sink>) -> io::Result<bool> {
        let mut went = false;
        loop {
            let rest = self.incoming.octets();
            let left = rest.len();
            let UnbufferedStatus { mut discard, state } = self.connection.process_tls_records(rest);
            let mut goes_on = true;
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    if into.is_none() {
                        let most = said_at_most(left);
                        // From the first of them on there is room for all.
                        self.plain.reserve(if self.plain.is_empty() { room_for(most) } else { most });
                    }
                    while let Some(record) = traffic.next_record() {
                        let record = record.map_err(bad)?;
                        discard += record.discard;
                        let mut payload = record.payload;
                        if let Some(sink) = &mut into
                            && self.plain.is_empty()
                        {
                            let taken = sink.put(payload);
                            went |= taken > 0;
                            payload = payload.get(taken..).unwrap_or_default();
                            if !payload.is_empty() {
                                self.plain.reserve(place_for(payload.len()));
                            }
                        }
                        copy(payload, &mut self.plain);
                    }
                    goes_on = into.as_ref().is_none_or(|sink| !sink.is_full() && self.plain.is_empty());
                    if !goes_on {
                        self.incoming.advance(discard);
                        return Ok(went);
                    }
                }
                Ok(ConnectionState::EncodeTlsData(mut message)) => {
                    encode(&mut message, &mut self.outgoing)?;
                }
                // It is, before anything else is.
                Ok(ConnectionState::TransmitTlsData(transmit)) => transmit.done(),
                Ok(ConnectionState::PeerClosed) => self.is_read_closed = true,
                Ok(ConnectionState::Closed) => {
                    self.is_read_closed = true;
                    goes_on = false;
                }
                Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => goes_on = false,
                // No ticket offers early data.
                Ok(_) => {
                    self.has_failed = true;
                    return Err(ErrorKind::InvalidData.into());
                }
                Err(e) => {
                    self.has_failed = true;
                    self.incoming.advance(discard);
                    self.take_alert();
                    return Err(bad(e));
                }
            }
            self.incoming.advance(discard);
            if !goes_on {
                self.has_records = false;
                return Ok(went);
            }
        }
    }

    /// What the other side is told of an error. rustls knows places in what has not been processed, which therefore stays.
    fn take_alert(&mut self) {
        while self.connection.wants_write() {
            match self.connection.process_tls_records(self.incoming.octets()).state {
                Ok(ConnectionState::EncodeTlsData(mut message)) => {
                    if encode(&mut message, &mut self.outgoing).is_err() {
                        return;
                    }
                }
                Ok(ConnectionState::TransmitTlsData(transmit)) => transmit.done(),
                _ => return,
            }
        }
    }

    /// Waits for more, of which so much is read: whether something came, or that no more will. It goes `into` there
    /// as far as there is room, else it is kept.
    fn poll_read_more(
        &mut self,
        cx: &mut Context<'_>,
        read: Read,
        mut into: Option<&mut dyn Sink>,
    ) -> Poll<io::Result<bool>> {
        loop {
            if self.is_read_closed && !self.has_failed {
                return Poll::Ready(Ok(false));
            }
            // Whoever reads is who is there to send what is left.
            let _ = self.poll_send(cx)?;
            if self.has_failed {
                return Poll::Ready(Err(ErrorKind::NotConnected.into()));
            }
            if !self.has_records {
                let came = self.poll_records(cx, read);
                if !matches!(came, Poll::Ready(Ok(()))) {
                    self.incoming.settle();
                }
                ready!(came)?;
            }
            let was_handshaking = self.connection.is_handshaking();
            let processed = match &mut into {
                Some(sink) => self.process(Some(*sink)),
                None => self.process(None),
            };
            if !self.has_records || processed.is_err() {
                self.incoming.settle();
            }
            let _ = self.poll_send(cx)?;
            if processed? || !self.plain.is_empty() || was_handshaking {
                return Poll::Ready(Ok(true));
            }
        }
    }

    /// Waits for octets of records.
    fn poll_records(&mut self, cx: &mut Context<'_>, read: Read) -> Poll<io::Result<()>> {
        let wanted = match read {
            Read::Nothing => return Poll::Pending,
            Read::Octets(octets) => of_records(octets, self.incoming.octets()),
            Read::Amply => READ,
        };
        let room = self.incoming.room();
        let wanted = wanted.min(room.len());
        if wanted == 0 {
            return Poll::Ready(Err(ErrorKind::InvalidData.into()));
        }
        let mut buf = ReadBuf::new(room.get_mut(..wanted).unwrap_or_default());
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut buf))?;
        let came = buf.filled().len();
        if came == 0 {
            return Poll::Ready(Err(cut_off()));
        }
        self.incoming.to += came;
        self.has_records = true;
        Poll::Ready(Ok(()))
    }

    /// Waits until something is there to be taken. False: no more comes.
    fn poll_plain(&mut self, cx: &mut Context<'_>, read: Read) -> Poll<io::Result<bool>> {
        while self.plain.is_empty() {
            if !ready!(self.poll_read_more(cx, read, None))? {
                return Poll::Ready(Ok(false));
            }
        }
        Poll::Ready(Ok(true))
    }

    /// Takes what is there; where there is none, so much is read. Of nothing, it is pending with nobody to wake.
    ///
    /// # Errors
    /// The connection is gone, or what came is no TLS.
    pub fn poll_octets(&mut self, cx: &mut Context<'_>, read: Read, into: &mut dyn Sink) -> Poll<io::Result<()>> {
        if into.is_full() {
            return Poll::Ready(Ok(()));
        }
        if self.plain.is_empty() {
            return self.poll_read_more(cx, read, Some(into)).map_ok(drop);
        }
        let octets = into.put(&self.plain);
        Pin::new(self).consume(octets);
        Poll::Ready(Ok(()))
    }

    /// Takes what is there, at most so many octets: none, where no more comes. Where there is none yet, so much is read.
    ///
    /// # Errors
    /// The connection is gone, or what came is no TLS.
    pub fn poll_take(&mut self, cx: &mut Context<'_>, most: usize, read: Read) -> Poll<io::Result<Bytes>> {
        if !ready!(self.poll_plain(cx, read))? {
            return Poll::Ready(Ok(Bytes::new()));
        }
        if self.plain.len() <= most {
            return Poll::Ready(Ok(std::mem::take(&mut self.plain).freeze()));
        }
        Poll::Ready(Ok(self.plain.split_to(most).freeze()))
    }

    /// Reads what comes after the end, and looks at nothing of it: how many octets, 0 where no more come.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut room = Room::to_read();
        let mut buf = ReadBuf::new(&mut room.octets);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut buf))?;
        Poll::Ready(Ok(buf.filled().len()))
    }

    /// Writes out what is encrypted.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.outgoing.is_empty() {
            return Poll::Ready(Ok(()));
        }
        while !self.outgoing.is_empty() {
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, &self.outgoing))?;
            if written == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            self.outgoing.advance(written);
        }
        self.outgoing = BytesMut::new();
        Poll::Ready(Ok(()))
    }

    /// Encrypts octets, as many as fit into the room, behind what else there is to be said: how much that takes.
    fn encrypt(&mut self, plain: &[u8], room: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        loop {
            if self.has_failed {
                return Err(ErrorKind::NotConnected.into());
            }
            let free = room.get_mut(filled..).unwrap_or_default();
            // Of the beginning of a record there is nothing to be processed, but rustls may know places in it.
            let state = self.connection.process_tls_records(self.incoming.octets()).state;
            match state.inspect_err(|_| self.has_failed = true).map_err(bad)? {
                ConnectionState::EncodeTlsData(mut message) => {
                    filled += message.encode(free).map_err(io::Error::other)?;
                }
                ConnectionState::TransmitTlsData(transmit) => transmit.done(),
                ConnectionState::PeerClosed => self.is_read_closed = true,
                ConnectionState::WriteTraffic(mut traffic) => {
                    let encrypted = if self.is_write_closed {
                        traffic.queue_close_notify(free)
                    } else {
                        traffic.encrypt(plain, free)
                    };
                    return match encrypted {
                        Ok(written) => Ok(filled + written),
                        Err(EncryptError::InsufficientSize(_) | EncryptError::EncryptExhausted) => {
                            Err(io::Error::other("it cannot be encrypted"))
                        }
                    };
                }
                _ => return Err(ErrorKind::NotConnected.into()),
            }
        }
    }

    /// Processes what has come and whoever reads had no room for: nothing is encrypted before that.
    fn finish_records(&mut self) -> io::Result<()> {
        if !self.has_records {
            return Ok(());
        }
        let processed = self.process(None);
        self.incoming.settle();
        processed.map(drop)
    }

    /// Encrypts octets and writes them out, where nothing else is to be processed or sent before. Those that are not taken wait for
    /// the next write, or flush.
    fn write_encrypted(&mut self, cx: &mut Context<'_>, plain: &[u8]) -> io::Result<usize> {
        let plain = plain.get(..WRITE).unwrap_or(plain);
        let mut room = Room::to_write();
        let length = self.encrypt(plain, &mut room.octets)?;
        let encrypted = room.octets.get(..length).unwrap_or_default();
        let written = match Pin::new(&mut self.io).poll_write(cx, encrypted) {
            Poll::Ready(written) => written?,
            Poll::Pending => 0,
        };
        self.outgoing.extend_from_slice(encrypted.get(written..).unwrap_or_default());
        Ok(plain.len())
    }
}

/// Says what rustls has to say of itself behind what is to be said before.
fn encode<D>(message: &mut EncodeTlsData<'_, D>, outgoing: &mut BytesMut) -> io::Result<()> {
    if let Err(EncodeError::InsufficientSize(size)) = message.encode(&mut []) {
        let before = outgoing.len();
        outgoing.resize(before + size.required_size, 0);
        message.encode(outgoing.get_mut(before..).unwrap_or_default()).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Octets to be read for records that say so many, of which these have come.
fn of_records(octets: usize, begun: &[u8]) -> usize {
    let full = |octets: usize| octets.saturating_add(octets.div_ceil(RECORD).saturating_mul(AROUND));
    match begun {
        [_, _, _, high, low, ..] => match 5 + usize::from(u16::from_be_bytes([*high, *low])) {
            whole if whole > begun.len() => {
                whole - begun.len() + full(octets.saturating_sub(whole.saturating_sub(AROUND)))
            }
            // It is whole, and rustls is not done with it: a message goes on in the next.
            _ => full(octets.max(1)),
        },
        _ => full(octets.max(1)) - begun.len(),
    }
}

/// Reads a ClientHello, which is then to be processed, and what name it asks for.
async fn hello<IO: AsyncRead + AsyncWrite + Unpin>(io: &mut IO) -> io::Result<(BytesMut, Option<Box<str>>)> {
    let mut acceptor = Acceptor::default();
    let mut hello = BytesMut::new();
    loop {
        let mut seen = hello.len();
        poll_fn(|cx| {
            let mut room = Room::to_read();
            let mut buf = ReadBuf::new(&mut room.octets);
            ready!(Pin::new(&mut *io).poll_read(cx, &mut buf))?;
            if buf.filled().is_empty() {
                return Poll::Ready(Err(cut_off()));
            }
            hello.extend_from_slice(buf.filled());
            Poll::Ready(Ok(()))
        })
        .await?;
        while let Some(more) = hello.get(seen..).filter(|more| !more.is_empty()) {
            seen += acceptor.read_tls(&mut &*more)?;
            match acceptor.accept() {
                Ok(Some(accepted)) => {
                    let server_name = accepted.client_hello().server_name().map(Box::from);
                    return Ok((hello, server_name));
                }
                Ok(None) => {}
                Err((e, mut alert)) => {
                    let mut said = vec![];
                    alert.write_all(&mut said)?;
                    tokio::io::AsyncWriteExt::write_all(io, &said).await?;
                    return Err(bad(e));
                }
            }
        }
        if hello.len() > HELLO {
            return Err(io::Error::new(ErrorKind::InvalidData, "a ClientHello that does not end"));
        }
    }
}

impl Sink for ReadBuf<'_> {
    fn put(&mut self, octets: &[u8]) -> usize {
        copy(octets, self)
    }

    fn poll_read_from(&mut self, cx: &mut Context<'_>, from: Pin<&mut dyn AsyncRead>) -> Option<Poll<io::Result<()>>> {
        Some(from.poll_read(cx, self))
    }

    fn is_full(&self) -> bool {
        self.remaining() == 0
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncBufRead for TlsStream<IO> {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        ready!(this.poll_plain(cx, Read::Amply))?;
        Poll::Ready(Ok(&this.plain))
    }

    fn consume(self: Pin<&mut Self>, octets: usize) {
        let this = self.get_mut();
        this.plain.advance(octets.min(this.plain.len()));
        if this.plain.is_empty() {
            this.plain = BytesMut::new();
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_octets(cx, Read::Amply, buf)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut filled = bufs.iter().filter(|buf| !buf.is_empty());
        let (Some(first), second) = (filled.next(), filled.next()) else { return Poll::Ready(Ok(0)) };
        let this = self.get_mut();
        if this.is_write_closed {
            return Poll::Ready(Err(ErrorKind::NotConnected.into()));
        }
        // Before the room is had, which may be this connection's own, or anything copied.
        this.finish_records()?;
        ready!(this.poll_send(cx))?;
        let is_alone = second.is_none() || first.len() >= WRITE;
        if is_alone && !copying::is_called_for(first, RECORD_HEAD) {
            return Poll::Ready(this.write_encrypted(cx, first));
        }
        // They are to be one record as far as can be; or one begins where rustls would be slow.
        let mut room = Room::to_read();
        let octets = room.octets.get_mut(TO_WRITE..TO_WRITE + WRITE).unwrap_or_default();
        let (mut free, mut length) = (&mut *octets, 0);
        for buf in bufs {
            length += copy(buf, &mut free);
        }
        Poll::Ready(this.write_encrypted(cx, octets.get(..length).unwrap_or_default()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        if !std::mem::replace(&mut this.is_write_closed, true) && this.finish_records().is_ok() {
            let mut alert = [0; 1024];
            if let Ok(length) = this.encrypt(&[], &mut alert) {
                this.outgoing.extend_from_slice(alert.get(..length).unwrap_or_default());
            }
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Ca, client};
    use super::super::{CertificateStore, Tickets, provider, server_config};
    use super::*;
    use rustls::pki_types::ServerName;
    use rustls::server::WebPkiClientVerifier;
    use rustls::{ClientConfig, HandshakeKind};
    use std::time::Duration;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio_rustls::{TlsConnector, client};

    type Client = client::TlsStream<DuplexStream>;
    type Server = TlsStream<DuplexStream>;

    struct Side {
        ca: Ca,
        config: Arc<ServerConfig>,
    }

    fn side() -> Side {
        let ca = Ca::new("ca");
        let store = Arc::new(CertificateStore::new(vec![ca.issue(&["a.example"]).certificate()]).unwrap());
        let verifier = WebPkiClientVerifier::builder_with_provider(ca.roots(), Arc::new(provider()));
        let verifier = verifier.allow_unauthenticated().build().unwrap();
        let tickets = Arc::new(Tickets::new([7; 32], Duration::from_secs(3600), [1; 32]));
        let config = Arc::new(server_config(store, Some(verifier), Some(tickets)).unwrap());
        Side { ca, config }
    }

    impl Side {
        fn client(&self, alpn: &[&[u8]]) -> Arc<ClientConfig> {
            let mut config = (*client(&self.ca, Some(&self.ca.issue(&["c.example"])), &[])).clone();
            config.alpn_protocols = alpn.iter().map(|one| one.to_vec()).collect();
            Arc::new(config)
        }

        /// Both ends of a connection, with room for so many octets on the way.
        async fn connected(&self, client: &Arc<ClientConfig>, room: usize) -> (Client, Server) {
            let (ours, theirs) = duplex(room);
            let name = ServerName::try_from("a.example").unwrap();
            let connect = TlsConnector::from(client.clone()).connect(name, theirs);
            let (client, server) = tokio::join!(connect, Server::accept(self.config.clone(), ours));
            (client.unwrap(), server.unwrap())
        }
    }

    fn octets(count: usize) -> Vec<u8> {
        (0..count).map(|n| (n % 251) as u8).collect()
    }

    /// What a connection that waits holds.
    fn held(server: &Server) -> usize {
        server.incoming.octets.len() + server.plain.capacity() + server.outgoing.capacity()
    }

    #[tokio::test]
    async fn what_is_negotiated_is_known() {
        let side = side();
        let config = side.client(&[b"http/1.1", b"h2"]);
        for (n, room) in [(0, 1), (1, 1 << 20), (2, 3_000)] {
            let (mut client, mut server) = side.connected(&config, room).await;
            assert_eq!(server.server_name(), Some("a.example"));
            let session = server.session();
            assert_eq!(session.alpn_protocol(), Some(&b"h2"[..]), "by the server's order");
            assert_eq!(session.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
            let chain = session.peer_certificates().unwrap();
            assert_eq!(super::super::identity(&chain[0]).dns_names, ["c.example"]);
            let kind = session.handshake_kind().unwrap();
            assert_eq!(kind == HandshakeKind::Resumed, n > 0, "{kind:?}: tickets arrive, with whatever comes first");
            tokio::join!(
                async {
                    client.write_all(b"ping").await.unwrap();
                    client.flush().await.unwrap();
                    client.read_exact(&mut [0; 4]).await.unwrap();
                },
                async {
                    server.read_exact(&mut [0; 4]).await.unwrap();
                    server.write_all(b"pong").await.unwrap();
                    server.flush().await.unwrap();
                }
            );
        }
    }

    #[tokio::test]
    async fn all_of_it_comes_and_goes_and_nothing_is_held_after() {
        let side = side();
        let config = side.client(&[]);
        for (room, count) in [(1, 20_000), (100, 300_000), (5_000, 1 << 20), (1 << 20, 4 << 20)] {
            let (client, mut server) = side.connected(&config, room).await;
            let (mut from_server, mut to_server) = tokio::io::split(client);
            let sent = octets(count);
            let echo = async {
                let mut came = 0;
                while came < count {
                    // In the three ways that there are.
                    let piece = match came % 3 {
                        0 => poll_fn(|cx| server.poll_take(cx, 20_000, [Read::Amply, Read::Octets(RECORD)][came % 2]))
                            .await
                            .unwrap()
                            .to_vec(),
                        1 => {
                            let piece = poll_fn(|cx| Pin::new(&mut server).poll_fill_buf(cx).map_ok(<[u8]>::to_vec));
                            let piece = piece.await.unwrap();
                            Pin::new(&mut server).consume(piece.len());
                            piece
                        }
                        _ => {
                            let mut piece = vec![0; 7_000];
                            let octets = server.read(&mut piece).await.unwrap();
                            piece.truncate(octets);
                            piece
                        }
                    };
                    assert!(!piece.is_empty() && piece[..] == sent[came..came + piece.len()], "at {came}");
                    let (one, other) = piece.split_at(piece.len() / 3);
                    let both = [io::IoSlice::new(one), io::IoSlice::new(other)];
                    let written = poll_fn(|cx| Pin::new(&mut server).poll_write_vectored(cx, &both)).await.unwrap();
                    server.write_all(&piece[written..]).await.unwrap();
                    came += piece.len();
                }
                server.flush().await.unwrap();
            };
            let mut back = vec![0; count];
            let write = async { to_server.write_all(&sent).await.and(to_server.flush().await).unwrap() };
            let read = async { from_server.read_exact(&mut back).await.map(drop).unwrap() };
            tokio::join!(echo, write, read);
            assert!(back == sent, "{room}");
            let waits = poll_fn(|cx| Poll::Ready(server.poll_plain(cx, Read::Amply).is_pending())).await;
            assert!(waits);
            assert_eq!(held(&server), 0, "{room}");
        }
    }

    #[tokio::test]
    async fn it_is_one_whole_wherever_in_memory_it_begins() {
        let side = side();
        let config = side.client(&[]);
        let sent = octets(WRITE + 200_000);
        let round = sent.as_ptr().align_offset(4096);
        for (at, length) in [(0, 1025), (4, RECORD), (5, RECORD), (0, WRITE), (0, WRITE + 1), (4090, 100_000)] {
            let (mut client, mut server) = side.connected(&config, 1 << 20).await;
            let piece = &sent[round + at..][..length];
            assert_eq!(copying::is_called_for(piece, RECORD_HEAD), at != 5, "{at}");
            for bufs in [&[io::IoSlice::new(piece)][..], &[io::IoSlice::new(piece), io::IoSlice::new(b"!")]] {
                let all = bufs.iter().map(|buf| buf.len()).sum::<usize>();
                let written = poll_fn(|cx| Pin::new(&mut server).poll_write_vectored(cx, bufs)).await.unwrap();
                assert_eq!(written, all.min(WRITE), "{at}");
                server.flush().await.unwrap();
                let mut came = vec![0; written];
                client.read_exact(&mut came).await.unwrap();
                assert!(came == [piece, b"!"].concat()[..written], "{at}");
            }
            server.write_all(piece).await.unwrap();
            server.shutdown().await.unwrap();
            let mut came = vec![];
            client.read_to_end(&mut came).await.unwrap();
            assert!(came == piece, "{at}");
            let late = poll_fn(|cx| Pin::new(&mut server).poll_write(cx, piece)).await;
            assert_eq!(late.unwrap_err().kind(), ErrorKind::NotConnected);
        }
    }

    #[tokio::test]
    async fn no_more_is_read_than_the_records_that_are_asked_for() {
        let side = side();
        let (mut client, mut server) = side.connected(&side.client(&[]), 1 << 20).await;
        client.write_all(&octets(400_000)).await.unwrap();
        client.flush().await.unwrap();
        for count in [2, 1, 3] {
            let piece = poll_fn(|cx| server.poll_take(cx, usize::MAX, Read::Octets(count * RECORD))).await.unwrap();
            assert_eq!((piece.len(), server.incoming.len()), (count * RECORD, 0));
        }
        // The beginning of another: it is finished before more is read.
        let piece = poll_fn(|cx| server.poll_take(cx, usize::MAX, Read::Octets(RECORD + 9))).await.unwrap();
        assert_eq!((piece.len(), server.incoming.len()), (RECORD, 9 + AROUND));
        for octets in [9, RECORD] {
            let piece = poll_fn(|cx| server.poll_take(cx, usize::MAX, Read::Octets(octets))).await.unwrap();
            assert_eq!((piece.len(), server.incoming.len()), (RECORD, 0), "{octets}");
        }
        for read in [Read::Octets(RECORD), Read::Amply, Read::Octets(RECORD)] {
            let amply = read == Read::Amply;
            let piece = poll_fn(|cx| server.poll_take(cx, usize::MAX, read)).await.unwrap();
            let left = server.incoming.len();
            assert!(amply || (piece.len() == 16 * 1024 && left == 0), "{} and {left}", piece.len());
            assert!(!amply || piece.len() >= 3 * 16 * 1024, "{}", piece.len());
            if amply {
                // The rest of the record that has begun to come.
                let piece = poll_fn(|cx| server.poll_take(cx, usize::MAX, Read::Octets(RECORD))).await.unwrap();
                assert_eq!((piece.len(), server.incoming.len()), (16 * 1024, 0));
            }
        }
    }

    #[test]
    fn from_the_first_record_on_there_is_room_for_all_in_a_place_of_few_sizes() {
        let sizes = [1, 9, 124 - AROUND, 1_000, 8_192, RECORD - 1, RECORD];
        let mut rooms = std::collections::BTreeSet::new();
        for (first, second, most) in
            sizes.iter().flat_map(|a| sizes.map(|b| [2, 3, usize::MAX].map(|c| (*a, b, c)))).flatten()
        {
            // What has come of another is none of them.
            for begun in [0, 1, 5, 21, 124] {
                let pair = first + second + 2 * AROUND;
                let pairs = ((READ - begun) / pair).min(most);
                let mut left = pairs * pair + begun;
                let room = room_for(said_at_most(left));
                rooms.insert(room);
                let mut came = 0;
                for says in (0..pairs).flat_map(|_| [first, second]) {
                    assert!(came + said_at_most(left) <= room, "{first}, {second}, {begun}: {came} of {room}");
                    (left, came) = (left - says - AROUND, came + says);
                }
                assert!(came <= room && left == begun, "{first}, {second}, {begun}");
            }
        }
        let large = rooms.range(RECORD..).copied().collect::<Vec<_>>();
        assert_eq!(large[..2], [2 * RECORD, 4 * RECORD]);
        assert!(large[2..].iter().all(|room| *room > 4 * RECORD), "{large:?}");
        assert_eq!((room_for(1_046), room_for(RECORD), room_for(RECORD + 1)), (1_046, RECORD, 2 * RECORD));
    }

    #[test]
    fn something_is_read_though_what_was_asked_for_is_there() {
        let record = |says: usize| {
            let mut record = vec![0x17, 3, 3, 0, 0];
            record[3..].copy_from_slice(&u16::try_from(says + AROUND - 5).unwrap().to_be_bytes());
            record.resize(says + AROUND, 7);
            record
        };
        assert_eq!(of_records(100, &[]), 100 + AROUND);
        assert_eq!(of_records(2 * RECORD, &[0x17, 3]), 2 * FULL_RECORD - 2);
        assert_eq!(of_records(100, &record(300)[..200]), 300 + AROUND - 200);
        assert_eq!(of_records(400, &record(300)[..200]), 300 + AROUND - 200 + 100 + AROUND);
        // A message of TLS's own that the next record goes on with.
        for whole in [record(300), [record(300), record(9)].concat()] {
            assert_eq!(of_records(100, &whole), 100 + AROUND);
            assert_eq!(of_records(0, &whole), 1 + AROUND);
        }
    }

    /// It takes so many octets at a time, and is full then.
    struct Takes(usize, Vec<u8>, bool);

    impl Sink for Takes {
        fn put(&mut self, octets: &[u8]) -> usize {
            let taken = octets.get(..self.0).unwrap_or(octets);
            self.1.extend_from_slice(taken);
            self.2 = taken.len() == self.0;
            taken.len()
        }

        fn is_full(&self) -> bool {
            self.2
        }
    }

    #[tokio::test]
    async fn what_is_not_taken_comes_again_and_what_waits_has_a_place_of_few_sizes() {
        let side = side();
        for (takes, room) in [(9, 3_000), (16 * 1024, 20_000), (1_000, 17_000), (40_000, 1 << 20)] {
            let (mut client, mut server) = side.connected(&side.client(&[]), room).await;
            let sent = octets(150_000);
            let write = async { client.write_all(&sent).await.and(client.flush().await).unwrap() };
            let read = async {
                let mut sink = Takes(takes, vec![], false);
                while sink.1.len() < sent.len() {
                    sink.2 = false;
                    poll_fn(|cx| {
                        let came = server.poll_octets(cx, Read::Amply, &mut sink);
                        let place = server.incoming.octets.len();
                        let length = server.incoming.len();
                        let fits = place == length || (place < 2 * length && place.is_power_of_two());
                        let fits = fits && (length > FEW_SIZES || place == 0 || place.is_power_of_two());
                        assert!(came.is_ready() || fits, "{place} for {length}");
                        came
                    })
                    .await
                    .unwrap();
                }
                assert_eq!(sink.1, sent, "{takes}");
            };
            tokio::join!(write, read);
            let waits = poll_fn(|cx| {
                Poll::Ready(server.poll_octets(cx, Read::Amply, &mut Takes(9, vec![], false)).is_pending())
            });
            assert!(waits.await && held(&server) == 0);
        }
    }

    #[tokio::test]
    async fn what_there_is_no_room_for_is_decrypted_when_there_is() {
        let side = side();
        let (mut client, mut server) = side.connected(&side.client(&[]), 1 << 20).await;
        let sent = octets(60_000);
        client.write_all(&sent[..50_000]).await.unwrap();
        // It is the last that the writer finds.
        client.get_mut().1.refresh_traffic_keys().unwrap();
        client.flush().await.unwrap();
        let mut came = vec![0; 20_000];
        assert_eq!(server.read(&mut came).await.unwrap(), 20_000, "of two records");
        assert!(server.incoming.len() > 16 * 1024, "{}", server.incoming.len());
        assert_eq!(server.plain.len(), 2 * 16 * 1024 - 20_000);
        // Whoever writes decrypts what is there.
        server.write_all(b"between").await.unwrap();
        server.flush().await.unwrap();
        client.read_exact(&mut [0; 7]).await.unwrap();
        client.write_all(&sent[50_000..]).await.unwrap();
        client.flush().await.unwrap();
        let mut rest = vec![0; 40_000];
        server.read_exact(&mut rest).await.unwrap();
        assert!([came, rest].concat() == sent);
        let waits = poll_fn(|cx| Poll::Ready(server.poll_plain(cx, Read::Amply).is_pending())).await;
        assert!(waits && held(&server) == 0);
    }

    #[tokio::test]
    async fn an_end_that_is_said_is_one_and_one_that_is_not_is_an_error() {
        let side = side();
        let config = side.client(&[]);
        let (mut client, mut server) = side.connected(&config, 1 << 16).await;
        client.write_all(b"last").await.unwrap();
        client.shutdown().await.unwrap();
        let mut all = vec![];
        server.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"last");
        assert_eq!(server.read(&mut [0; 9]).await.unwrap(), 0, "again");
        // The other direction is open, until that is said too.
        server.write_all(b"after").await.unwrap();
        server.shutdown().await.unwrap();
        server.shutdown().await.unwrap();
        drop(server);
        let mut all = vec![];
        client.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"after");

        let (mut client, mut server) = side.connected(&config, 1 << 16).await;
        client.write_all(b"last").await.unwrap();
        client.flush().await.unwrap();
        drop(client);
        let mut all = vec![];
        let end = server.read_to_end(&mut all).await.unwrap_err();
        assert_eq!((end.kind(), &all[..]), (ErrorKind::UnexpectedEof, &b"last"[..]));
    }

    #[tokio::test]
    async fn keys_change_in_the_middle() {
        let side = side();
        let (mut client, mut server) = side.connected(&side.client(&[]), 1 << 16).await;
        for n in 0..5_u8 {
            client.get_mut().1.refresh_traffic_keys().unwrap();
            client.write_all(&[n; 100]).await.unwrap();
            client.flush().await.unwrap();
            let mut came = [0; 100];
            server.read_exact(&mut came).await.unwrap();
            assert_eq!(came, [n; 100]);
            server.write_all(&came).await.unwrap();
            server.flush().await.unwrap();
            client.read_exact(&mut came).await.unwrap();
            assert_eq!(came, [n; 100]);
        }
    }

    #[tokio::test]
    async fn what_is_no_tls_is_told_so() {
        let side = side();
        let alert = |level: u8, of: u8| vec![0x15, 3, 3, 0, 2, level, of];
        for (says, told) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], alert(2, 50)),
            (&[0x16, 3, 1, 0, 4, 2, 0, 0, 0][..], alert(2, 50)),
            (&[0x16, 3, 1, 0xff, 0xff][..], alert(2, 50)),
        ] {
            let (ours, mut theirs) = duplex(1 << 16);
            theirs.write_all(says).await.unwrap();
            let refused = Server::accept(side.config.clone(), ours).await;
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidData, "{says:?}");
            let mut said = vec![];
            theirs.read_to_end(&mut said).await.unwrap();
            assert_eq!(said, told, "{says:?}");
        }
        // Nor does a hello that has no end take more and more.
        let (ours, mut theirs) = duplex(1 << 16);
        let endless = tokio::spawn(async move {
            let record = [&[0x16, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff][..], &[0; 0x4000 - 4]].concat();
            while theirs.write_all(&record).await.is_ok() {}
        });
        assert!(Server::accept(side.config.clone(), ours).await.is_err());
        endless.await.unwrap();

        // Nor is a certificate taken that nobody trusts, in the middle of messages that rustls has yet to look at.
        let (ours, theirs) = duplex(1 << 16);
        let strangers = client(&side.ca, Some(&Ca::new("other").issue(&["c.example"])), &[]);
        let connect = TlsConnector::from(strangers).connect(ServerName::try_from("a.example").unwrap(), theirs);
        let (client, server) = tokio::join!(connect, Server::accept(side.config.clone(), ours));
        assert_eq!(server.unwrap_err().kind(), ErrorKind::InvalidData);
        let told = client.unwrap().read(&mut [0; 9]).await.unwrap_err().to_string();
        assert!(told.contains("UnknownCA"), "{told}");

        // A record that is not what was sent: the other side hears that.
        let (ours, mut between) = duplex(1 << 16);
        let (mut back, theirs) = duplex(1 << 16);
        let connect = TlsConnector::from(side.client(&[])).connect(ServerName::try_from("a.example").unwrap(), theirs);
        let pass = async {
            let all = tokio::io::copy_bidirectional(&mut back, &mut between);
            let _ = tokio::time::timeout(Duration::from_millis(300), all).await;
        };
        let (client, server, ()) = tokio::join!(connect, Server::accept(side.config.clone(), ours), pass);
        let (mut client, mut server) = (client.unwrap(), server.unwrap());
        between.write_all(&[&[0x17, 3, 3, 0, 32][..], &[9; 32]].concat()).await.unwrap();
        assert_eq!(server.read(&mut [0; 9]).await.unwrap_err().kind(), ErrorKind::InvalidData);
        let mut alert = [0; 64];
        let octets = between.read(&mut alert).await.unwrap();
        back.write_all(&alert[..octets]).await.unwrap();
        let told = client.read(&mut [0; 9]).await.unwrap_err().to_string();
        assert!(told.contains("BadRecordMac"), "{told}");
    }
}
