//! A JSON line a request, written by a thread of its own behind a bounded queue: a slow disk loses lines, and counts
//! them, before it delays a request. No raw group or member ID is in it, only pseudonyms that end with the process.

use crate::config;
use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use serde::Serialize;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};

/// Where lines go. A reload opens it anew, so that a file that was renamed (as logrotate does) is left.
#[derive(Debug)]
pub struct AccessLog {
    open: ArcSwapOption<Open>,
    /// Something is open: each request asks.
    is_on: AtomicBool,
    /// Lines lost while another was open.
    lost_before: AtomicU64,
}

#[derive(Debug)]
struct Open {
    writer: NonBlocking,
    lost: ErrorCounter,
    /// Writes what is queued when it is dropped.
    guard: Mutex<Option<WorkerGuard>>,
}

/// What a line says of a request. Times in microseconds, sizes in octets.
#[derive(Debug, Default, Serialize)]
pub struct Line<'a> {
    /// When it came, RFC 3339.
    pub time: String,
    /// Its ID, as the Delivery Service got it.
    pub request_id: &'a str,
    /// It is one of this provider's own nodes, to another provider.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub egress: bool,
    /// Who sent it.
    pub client: String,
    /// The authenticated provider.
    pub provider: Option<&'a str>,
    /// The first name of the certificate that was shown, whatever became of the request.
    pub peer: Option<&'a str>,
    /// `HTTP/1.1` or `HTTP/2.0`.
    pub http: &'a str,
    /// The method.
    pub method: &'a str,
    /// The endpoint, if there is one.
    pub endpoint: Option<&'a str>,
    /// The operation, once read.
    pub operation: Option<&'a str>,
    /// A pseudonym of the group.
    pub group: Option<String>,
    /// The status answered; 0 where none was.
    pub status: u16,
    /// forwarded, answered, refused or aborted.
    pub decision: &'a str,
    /// Why it was refused.
    pub reason: Option<&'a str>,
    /// The limits it exceeded.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<String>,
    /// Whether a token was used for it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub token: bool,
    /// Octets of its body that came.
    pub body_in: usize,
    /// Octets of the answer's body that went.
    pub body_out: usize,
    /// What the gateway took to decide.
    pub gateway_us: u64,
    /// What the Delivery Service took to begin its answer.
    pub ds_us: Option<u64>,
    /// The node that answered, or the host of a download.
    pub node: Option<&'a str>,
    /// Its trace, as the Delivery Service got it (W3C Trace Context).
    pub trace_id: Option<&'a str>,
}

impl Open {
    fn new(settings: &config::AccessLog) -> std::io::Result<Option<Arc<Self>>> {
        let (writer, guard) = match settings {
            config::AccessLog::Off => return Ok(None),
            config::AccessLog::Stdout => NonBlockingBuilder::default().lossy(true).finish(std::io::stdout()),
            config::AccessLog::File(path) => {
                let file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
                NonBlockingBuilder::default().lossy(true).finish(file)
            }
        };
        let lost = writer.error_counter();
        Ok(Some(Arc::new(Self { writer, lost, guard: Mutex::new(Some(guard)) })))
    }
}

impl AccessLog {
    /// Opens the log.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(settings: &config::AccessLog) -> std::io::Result<Self> {
        let open = Open::new(settings)?;
        let is_on = AtomicBool::new(open.is_some());
        Ok(Self { open: ArcSwapOption::new(open), is_on, lost_before: AtomicU64::new(0) })
    }

    /// Writes to what another has opened from now on; what is queued goes to where it was.
    pub fn exchange(&self, with: &Self) {
        let before = self.open.swap(with.open.load_full());
        self.is_on.store(with.is_on(), Ordering::Relaxed);
        let Some(before) = before else { return };
        // Who was about to write a line has it in the queue by then; to write the queue out is not for a request to wait for.
        std::thread::sleep(Duration::from_millis(50));
        drop(before.guard.lock().take());
        self.lost_before.fetch_add(before.lost.dropped_lines() as u64, Ordering::Relaxed);
    }

    /// Whether anything is written at all.
    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    /// Writes a line.
    pub fn write(&self, line: &Line<'_>) {
        let open = self.open.load();
        let Some(open) = &*open else { return };
        let Ok(mut text) = serde_json::to_vec(line) else { return };
        text.push(b'\n');
        // The queue takes it whole or loses it whole.
        let _ = open.writer.clone().write_all(&text);
    }

    /// Writes what is queued; lines after this are lost.
    pub fn close(&self) {
        if let Some(open) = &*self.open.load() {
            drop(open.guard.lock().take());
        }
    }

    /// Lines lost so far.
    pub fn lost(&self) -> u64 {
        let now = self.open.load().as_ref().map_or(0, |open| open.lost.dropped_lines() as u64);
        self.lost_before.load(Ordering::Relaxed) + now
    }
}
