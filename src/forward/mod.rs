//! Forward: a request on its way to whom it is for, and the answer on its way back, octet for octet.
//!
//! [`Clients`] has the connections to nodes and other servers, and makes them where there is none to be had; an [`Exchange`] is a
//! request and its answer on one of them. Nothing here runs by itself: whoever waits for the answer moves the body on as it
//! does so, without a task or a channel between the two, so that a request costs few wake-ups and a body few copies. HTTP is
//! spoken as these servers do: HTTP/1.1 by [`http1`], HTTP/2 by the `h2` crate ([`http2`]).

mod connect;
pub mod http1;
mod http2;
mod pool;

pub use connect::Tls;
pub(crate) use http2::poll_room;
pub use pool::{Clients, Link};

use crate::problem::Refusal;
use crate::upstream::Target;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, response};
use hyper::body::Frame;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// Why a request's body does not come to its end.
#[derive(Debug)]
pub struct Stop {
    /// What its sender is answered.
    pub refusal: Refusal,
    /// It broke off, or is not framed as it should be.
    pub broken: bool,
    /// Its sender has gone, or has taken it back.
    pub gone: bool,
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, broken: false, gone: false }
    }
}

/// A request's body.
pub trait Source: Send + Unpin {
    /// What comes next of it, never an empty piece; none when that was all.
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Stop>>>;
    /// Octets of the whole, where that is known (`Content-Length`). A body of 0 octets has none.
    fn length(&self) -> Option<u64>;
    /// All of it has been given out.
    fn is_done(&self) -> bool;
}

/// The head of a request, as it is sent.
#[derive(Debug)]
pub struct Head {
    /// The method.
    pub method: Method,
    /// Path, and query if it has one.
    pub target: http::uri::PathAndQuery,
    /// Whom it is for, with a port where there is one: `Host`, or `:authority`.
    pub authority: String,
    /// The other fields: none of the connection's, nor `Host`, `Content-Length` or `Transfer-Encoding`.
    pub fields: Vec<(HeaderName, HeaderValue)>,
}

/// Where a request goes, and how.
#[derive(Debug, Clone)]
pub struct Peer {
    /// At what address.
    pub at: Target,
    /// How it is spoken TLS to, if it is.
    pub tls: Option<Arc<Tls>>,
    /// What is spoken.
    pub protocol: Protocol,
    /// Requests at once on a connection of HTTP/2, at most.
    pub streams: usize,
    /// How long things may take.
    pub times: Times,
}

/// What is spoken to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2, without TLS with prior knowledge.
    Http2,
    /// What TLS negotiates: HTTP/2, or HTTP/1.1.
    Either,
}

/// How long things may take on the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// A connection, with its TLS handshake.
    pub connect: Duration,
    /// Between two reads of an answer; for its head, from when the request is all out.
    pub read: Duration,
    /// Until something of what is written is taken.
    pub write: Duration,
    /// For how long an idle connection is kept.
    pub keepalive: Duration,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// It is refused, or there is no way there.
    #[error("{0}")]
    Refused(std::io::Error),
    /// It takes longer than it may.
    #[error("no connection in time")]
    TimedOut,
    /// TLS comes to nothing.
    #[error("TLS: {0}")]
    Tls(std::io::Error),
    /// This process has no descriptor or no port left.
    #[error("this process has no descriptor or port left: {0}")]
    OfThisProcess(std::io::Error),
}

/// Why there is no answer, or not all of one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The other side says that it has not begun with the request (RFC 9113 §6.8, §8.7).
    #[error("it was left untouched")]
    Untouched,
    /// The other side has closed the connection, which was kept from before, without a word of an answer.
    #[error("a kept connection was closed")]
    Closed,
    /// No answer in time, or not the rest of it.
    #[error("no answer in time")]
    ReadTimedOut,
    /// Nothing is taken any more of what is written.
    #[error("it does not read")]
    WriteTimedOut,
    /// The connection is gone, or what comes on it is no answer.
    #[error("{0}")]
    Broken(String),
    /// The request's own body has stopped.
    #[error("the body stopped: {}", .0.refusal.reason())]
    Stopped(Stop),
}

/// A request and its answer: in a place of its own, for it is large, and is handed on.
pub enum Exchange<S: Source> {
    /// Over HTTP/1.1.
    Http1(Box<http1::Exchange<S>>),
    /// Over HTTP/2.
    Http2(Box<http2::Exchange<S>>),
}

impl<S: Source> Exchange<S> {
    /// Waits for the answer's head, and moves the body on meanwhile. To be asked until it is there, and not again.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, Error>> {
        match self {
            Self::Http1(exchange) => exchange.poll_head(cx),
            Self::Http2(exchange) => exchange.poll_head(cx),
        }
    }

    /// Waits for more of the answer's body, or its trailers, and moves the request's body on meanwhile. None: that was all.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match self {
            Self::Http1(exchange) => exchange.poll_frame(cx),
            Self::Http2(exchange) => exchange.poll_frame(cx),
        }
    }

    /// The head has said that nothing follows it, or all that follows has been given out.
    pub fn is_answered(&self) -> bool {
        match self {
            Self::Http1(exchange) => exchange.is_answered(),
            Self::Http2(exchange) => exchange.is_answered(),
        }
    }

    /// The request's body.
    pub fn source(&self) -> &S {
        match self {
            Self::Http1(exchange) => exchange.source(),
            Self::Http2(exchange) => exchange.source(),
        }
    }

    /// The request's body again, which then goes no further.
    pub fn into_source(self) -> S {
        match self {
            Self::Http1(exchange) => exchange.into_source(),
            Self::Http2(exchange) => exchange.into_source(),
        }
    }
}
