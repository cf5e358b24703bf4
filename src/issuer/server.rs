//! The Issuer's HTTPS: its directory, and token requests. What comes from outside is bounded: connections, the time of a
//! request, and its octets.

use super::{DIRECTORY_PATH, Issuer, LONGEST_REQUEST, REQUEST_PATH, media_type};
use crate::privacypass::unix_now;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

/// Connections at once.
const CONNECTIONS: usize = 1024;

/// For a handshake, a request head, a request body.
const PATIENCE: Duration = Duration::from_secs(10);

/// For a whole connection.
const LONGEST: Duration = Duration::from_secs(300);

/// What is served, and with which certificate.
#[derive(Debug)]
pub struct Serve {
    /// The keys.
    pub issuer: Issuer,
    /// TLS.
    pub tls: rustls::ServerConfig,
    /// Where.
    pub listener: std::net::TcpListener,
}

/// Why the Issuer has ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The system gives no runtime, listener or signals.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Serves until SIGTERM or SIGINT. SIGHUP has the next keys used at once.
///
/// # Errors
/// [`ServeError`].
pub fn serve(serve: Serve) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run(serve))
}

async fn run(Serve { issuer, tls, listener }: Serve) -> Result<(), ServeError> {
    listener.set_nonblocking(true)?;
    let (listener, issuer) = (TcpListener::from_std(listener)?, Arc::new(issuer));
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let [mut terminate, mut interrupt, mut hangup] =
        [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?];
    let mut ticks = tokio::time::interval(Duration::from_millis(500));
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hangup.recv() => advance(&issuer, true),
            _ = ticks.tick() => advance(&issuer, false),
            accepted = listener.accept() => match (accepted, places.clone().try_acquire_owned()) {
                (Ok((stream, _)), Ok(place)) => {
                    let (acceptor, issuer) = (acceptor.clone(), issuer.clone());
                    tokio::spawn(async move {
                        let _ = tokio::time::timeout(LONGEST, connection(stream, acceptor, issuer)).await;
                        drop(place);
                    });
                }
                // All places are taken.
                (Ok(_), Err(_)) => {}
                // No descriptors are left, say: to ask again at once would help nobody.
                (Err(e), _) => {
                    tracing::warn!("no connection could be accepted: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
}

fn advance(issuer: &Arc<Issuer>, at_once: bool) {
    let issuer = issuer.clone();
    // To find primes takes a while.
    tokio::task::spawn_blocking(move || match issuer.advance(unix_now().as_secs(), at_once) {
        Ok(true) => tracing::info!("the keys have changed; a gateway that has them from files takes them with SIGHUP"),
        Ok(false) => {}
        Err(e) => tracing::error!("the keys stay as they are: {e}"),
    });
}

async fn connection(stream: tokio::net::TcpStream, acceptor: TlsAcceptor, issuer: Arc<Issuer>) {
    let Ok(Ok(stream)) = tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await else { return };
    let service = hyper::service::service_fn(move |request| {
        let issuer = issuer.clone();
        async move { Ok::<_, Infallible>(answer(request, issuer).await) }
    });
    let mut server = auto::Builder::new(TokioExecutor::new());
    server.http1().timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(16 << 10);
    server.http2().timer(TokioTimer::new()).max_concurrent_streams(16).max_header_list_size(16 << 10);
    // How a connection ends is its client's affair.
    let _ = server.serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(request: Request<Incoming>, issuer: Arc<Issuer>) -> Response<Full<Bytes>> {
    let now = unix_now().as_secs();
    match (request.uri().path(), request.method()) {
        (DIRECTORY_PATH, &Method::GET | &Method::HEAD) => directory(&request, &issuer, now),
        (REQUEST_PATH, &Method::POST) => token(request, issuer, now).await,
        (DIRECTORY_PATH, _) => refuse(StatusCode::METHOD_NOT_ALLOWED, "GET"),
        (REQUEST_PATH, _) => refuse(StatusCode::METHOD_NOT_ALLOWED, "POST"),
        _ => refuse(StatusCode::NOT_FOUND, "neither the directory nor token requests"),
    }
}

fn directory(request: &Request<Incoming>, issuer: &Issuer, now: u64) -> Response<Full<Bytes>> {
    let directory = issuer.directory(now);
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, directory.document.as_bytes());
    let tag = format!("\"{}\"", hex::encode(hash.as_ref().get(..16).unwrap_or_default()));
    let known = request.headers().get_all(header::IF_NONE_MATCH).iter().any(|value| value.as_bytes() == tag.as_bytes());
    let (status, body) = match known {
        true => (StatusCode::NOT_MODIFIED, Bytes::new()),
        false => (StatusCode::OK, Bytes::from(directory.document)),
    };
    let fields = [
        (header::CONTENT_TYPE, media_type::DIRECTORY.to_owned()),
        (header::CACHE_CONTROL, format!("max-age={}", directory.fresh)),
        (header::ETAG, tag),
    ];
    respond(status, fields, body)
}

async fn token(request: Request<Incoming>, issuer: Arc<Issuer>, now: u64) -> Response<Full<Bytes>> {
    let content_type = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    if content_type != Some(media_type::REQUEST.as_bytes()) {
        return refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, media_type::REQUEST);
    }
    let body = Limited::new(request.into_body(), LONGEST_REQUEST).collect();
    let Ok(Ok(body)) = tokio::time::timeout(PATIENCE, body).await else {
        return refuse(StatusCode::UNPROCESSABLE_ENTITY, "no body, or more than any TokenRequest has");
    };
    let octets = body.to_bytes();
    let runtime = tokio::runtime::Handle::current();
    let issued = tokio::task::spawn_blocking(move || runtime.block_on(issuer.issue(&octets, now))).await;
    match issued {
        Ok(Ok(response)) => {
            let fields = [(header::CONTENT_TYPE, media_type::RESPONSE.to_owned())];
            respond(StatusCode::OK, fields, Bytes::from(response))
        }
        // RFC 9578 §5.2, §6.2.
        Ok(Err(e)) => refuse(StatusCode::UNPROCESSABLE_ENTITY, &e.to_string()),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "no token could be made"),
    }
}

fn refuse(status: StatusCode, why: &str) -> Response<Full<Bytes>> {
    let allow = (status == StatusCode::METHOD_NOT_ALLOWED).then(|| (header::ALLOW, why.to_owned()));
    let accept = (status == StatusCode::UNSUPPORTED_MEDIA_TYPE).then(|| (header::ACCEPT, why.to_owned()));
    let text = [(header::CONTENT_TYPE, "text/plain".to_owned())];
    respond(status, text.into_iter().chain(allow).chain(accept), Bytes::from(format!("{why}\n")))
}

fn respond(
    status: StatusCode,
    fields: impl IntoIterator<Item = (header::HeaderName, String)>,
    body: Bytes,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let fields = fields.into_iter().filter_map(|(name, value)| Some((name, HeaderValue::try_from(value).ok()?)));
    response.headers_mut().extend(fields);
    response
}
