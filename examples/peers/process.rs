//! What the operating system knows of a process: its core, what it has used of it, and its memory.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::Error;

/// The core of the servers, as taskset names it.
pub const SERVERS: &str = "0";

/// The core of what sends and answers.
pub const OTHERS: &str = "1";

/// Has a process run on these cores alone. Threads that it makes later inherit that.
pub fn pin(process: u32, cores: &str) -> Result<(), Error> {
    let pinned = Command::new("taskset").args(["-apc", cores, &process.to_string()]).output();
    let pinned = pinned.map_err(|error| format!("taskset: {error}"))?;
    if !pinned.status.success() {
        let said = String::from_utf8_lossy(&pinned.stderr);
        return Err(format!("process {process} cannot be kept to core {cores}: {}", said.trim()).into());
    }
    Ok(())
}

/// Nanoseconds of a core that each thread of a process has used so far.
pub struct Cpu(HashMap<OsString, u64>);

impl Cpu {
    pub fn of(process: u32) -> Result<Cpu, Error> {
        let mut threads = HashMap::new();
        let folder = format!("/proc/{process}/task");
        for thread in fs::read_dir(&folder).map_err(|error| format!("{folder}: {error}"))? {
            let thread = thread?;
            // One that has just ended has none.
            let Ok(stat) = fs::read_to_string(thread.path().join("schedstat")) else { continue };
            let used = stat.split_whitespace().next().and_then(|used| used.parse().ok());
            threads.insert(thread.file_name(), used.ok_or("schedstat does not say what a thread has used")?);
        }
        Ok(Cpu(threads))
    }

    /// What all of them have used since.
    pub fn since(&self, before: &Cpu) -> Duration {
        let used = |(thread, now): (&OsString, &u64)| now.saturating_sub(before.0.get(thread).copied().unwrap_or(0));
        Duration::from_nanos(self.0.iter().map(used).sum())
    }
}

/// Octets of memory that a process holds ("VmRSS"), or has held at most ("VmHWM").
pub fn memory(process: u32, field: &str) -> Result<u64, Error> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let said = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib: Option<u64> = said.and_then(|said| said.split_whitespace().next()?.parse().ok());
    Ok(kib.ok_or_else(|| format!("the system does not say {field} of process {process}"))? * 1024)
}

/// Has "VmHWM" of a process begin anew, at what it holds now.
pub fn forget_peak(process: u32) -> Result<(), Error> {
    let file = format!("/proc/{process}/clear_refs");
    Ok(fs::write(&file, "5").map_err(|error| format!("{file}: {error}"))?)
}

/// How many descriptors this process may have.
pub fn descriptors() -> Result<usize, Error> {
    let limits = fs::read_to_string("/proc/self/limits")?;
    let said = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft = said.and_then(|said| said.split_whitespace().next()).ok_or("no limit of open files is known")?;
    Ok(if soft == "unlimited" { usize::MAX } else { soft.parse()? })
}
