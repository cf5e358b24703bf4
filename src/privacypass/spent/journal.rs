//! Spent tokens in files, for those who restart: one file an epoch, appended to, and removed when its epoch is over.
//!
//! A record is written before its token's request goes on, so that a process that is killed at any moment has lost none.
//! The system writes it to the disk later, once a second at the latest: a machine that loses its power loses the records of
//! the last second. A record that was torn then is left out when the file is read again.

use super::memory::Print;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What a file begins with; then 16 octets that tell whether its hashes are under our secret.
const MAGIC: &[u8; 16] = b"moh-spent-tokens";

/// Octets before the first record.
const HEAD: usize = 32;

/// Octets of a record: `+` (spent) or `-` (given back), and the hash of a nonce.
const RECORD: usize = 17;

/// As long as records may wait for the disk.
const SYNC: Duration = Duration::from_secs(1);

/// The files of the epochs that are accepted.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
    /// That of the secret and the epochs' length: files of others are of no use.
    mark: [u8; 16],
    files: Mutex<BTreeMap<u64, Arc<Log>>>,
    /// Held as long as the process lives: two gateways that write the same files would spend tokens twice.
    _lock: File,
}

#[derive(Debug)]
struct Log {
    file: Mutex<File>,
    /// The same, to be written to the disk while others append.
    to_disk: File,
    path: PathBuf,
    dirty: AtomicBool,
}

impl Log {
    fn new(file: File, path: PathBuf) -> Result<Self, Error> {
        Ok(Self { to_disk: file.try_clone()?, file: Mutex::new(file), path, dirty: AtomicBool::new(true) })
    }
}

fn at(path: &Path) -> impl FnOnce(Error) -> Error {
    move |e| Error::new(e.kind(), format!("{}: {e}", path.display()))
}

impl Journal {
    /// Opens the files in `dir`, which it makes if need be, and reads the spent tokens of `oldest` and later epochs.
    ///
    /// # Errors
    /// What cannot be read or written, by name; or another gateway uses the directory.
    pub(super) fn open(dir: &Path, mark: [u8; 16], oldest: u64) -> Result<(Self, Vec<(u64, Vec<Print>)>), Error> {
        std::fs::create_dir_all(dir).map_err(at(dir))?;
        let path = dir.join("lock");
        let lock = OpenOptions::new().create(true).append(true).open(&path).map_err(at(&path))?;
        lock.try_lock()
            .map_err(|_| Error::new(ErrorKind::AddrInUse, format!("{}: another gateway has it", path.display())))?;
        let mut journal = Self { dir: dir.into(), mark, files: Mutex::default(), _lock: lock };
        let mut spent = vec![];
        for entry in std::fs::read_dir(dir).map_err(at(dir))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let number = name.strip_prefix("spent-").and_then(|number| number.parse::<u64>().ok());
            let Some(number) = number else { continue };
            match (number >= oldest).then(|| journal.read(&path).map_err(at(&path))).transpose()?.flatten() {
                Some((log, prints)) => {
                    journal.files.get_mut().insert(number, Arc::new(log));
                    spent.push((number, prints));
                }
                // Over, or under another secret: no token of it would be taken.
                None => std::fs::remove_file(&path).map_err(at(&path))?,
            }
        }
        Ok((journal, spent))
    }

    fn read(&self, path: &Path) -> Result<Option<(Log, Vec<Print>)>, Error> {
        let mut file = OpenOptions::new().read(true).append(true).open(path)?;
        let mut octets = vec![];
        file.read_to_end(&mut octets)?;
        let Some((head, records)) = octets.split_at_checked(HEAD) else { return Ok(None) };
        if head != self.head() {
            return Ok(None);
        }
        let mut spent = std::collections::HashSet::new();
        let (whole, torn) = records.as_chunks::<RECORD>();
        for [tag, print @ ..] in whole {
            let print = Print::from_be_bytes(*print);
            match tag {
                b'+' => spent.insert(print),
                b'-' => spent.remove(&print),
                _ => false,
            };
        }
        // What follows must begin where a record does.
        file.set_len((octets.len() - torn.len()) as u64)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Some((Log::new(file, path.into())?, spent.into_iter().collect())))
    }

    fn head(&self) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        let (magic, mark) = head.split_at_mut(MAGIC.len());
        magic.copy_from_slice(MAGIC);
        mark.copy_from_slice(&self.mark);
        head
    }

    fn log(&self, epoch: u64, oldest: u64) -> Result<Arc<Log>, Error> {
        let mut files = self.files.lock();
        while let Some(over) = files.first_entry().filter(|first| *first.key() < oldest) {
            // It may be gone already; what is left is removed at the next start.
            let _ = std::fs::remove_file(&over.remove().path);
        }
        if let Some(log) = files.get(&epoch) {
            return Ok(log.clone());
        }
        let path = self.dir.join(format!("spent-{epoch}"));
        let mut file = OpenOptions::new().create_new(true).append(true).open(&path).map_err(at(&path))?;
        file.write_all(&self.head()).map_err(at(&path))?;
        let log = Arc::new(Log::new(file, path)?);
        files.insert(epoch, log.clone());
        Ok(log)
    }

    /// Writes that a token of `epoch` is spent, or given back. Files of epochs before `oldest` are removed.
    ///
    /// # Errors
    /// What cannot be written.
    pub(super) fn write(&self, print: Print, epoch: u64, oldest: u64, spent: bool) -> Result<(), Error> {
        let log = self.log(epoch, oldest)?;
        let mut record = [if spent { b'+' } else { b'-' }; RECORD];
        record.iter_mut().skip(1).zip(print.to_be_bytes()).for_each(|(to, from)| *to = from);
        let mut file = log.file.lock();
        let len = file.metadata().map_err(at(&log.path))?.len();
        file.write_all(&record).map_err(|e| {
            // Half a record would shift all that follow.
            let _ = file.set_len(len);
            at(&log.path)(e)
        })?;
        log.dirty.store(true, Ordering::Release);
        Ok(())
    }

    /// Sees to it, on a thread of its own, that records are on the disk in time; for as long as the journal is used.
    pub(super) fn keep(this: &Arc<Self>) -> Result<(), Error> {
        let journal = Arc::downgrade(this);
        std::thread::Builder::new().name("spent-tokens".into()).spawn(move || {
            while let Some(journal) = journal.upgrade() {
                let logs: Vec<_> = journal.files.lock().values().cloned().collect();
                drop(journal);
                for log in logs.iter().filter(|log| log.dirty.swap(false, Ordering::Acquire)) {
                    if let Err(e) = log.to_disk.sync_data() {
                        tracing::error!("{}: spent tokens may not be on the disk: {e}", log.path.display());
                    }
                }
                std::thread::sleep(SYNC);
            }
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path, oldest: u64) -> (Journal, Vec<(u64, Vec<Print>)>) {
        let (journal, mut spent) = Journal::open(dir, [7; 16], oldest).unwrap();
        spent.iter_mut().for_each(|(_, prints)| prints.sort_unstable());
        spent.sort_unstable();
        (journal, spent)
    }

    #[test]
    fn what_was_spent_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, spent) = open(dir.path(), 4);
        assert!(spent.is_empty());
        for (print, epoch, oldest, is_spent) in
            [(1, 4, 4, true), (2, 5, 4, true), (3, 5, 4, true), (2, 5, 4, false), (9, 5, 4, false)]
        {
            journal.write(print, epoch, oldest, is_spent).unwrap();
        }
        assert!(Journal::open(dir.path(), [7; 16], 4).is_err_and(|e| e.to_string().contains("another gateway")));
        drop(journal);
        let (journal, spent) = open(dir.path(), 4);
        assert_eq!(spent, [(4, vec![1]), (5, vec![3])]);
        // An epoch that is over goes with the first record after it.
        journal.write(4, 6, 5, true).unwrap();
        assert!(!dir.path().join("spent-4").exists());
        drop(journal);
        // A torn record is left out, and what follows is whole.
        let file = dir.path().join("spent-6");
        let mut octets = std::fs::read(&file).unwrap();
        assert_eq!(octets.len(), HEAD + RECORD);
        octets.extend(b"+torn");
        std::fs::write(&file, octets).unwrap();
        let (journal, _) = open(dir.path(), 5);
        journal.write(5, 6, 5, true).unwrap();
        drop(journal);
        let (journal, spent) = open(dir.path(), 6);
        assert_eq!(spent, [(6, vec![4, 5])]);
        drop(journal);
        let (_, spent) = Journal::open(dir.path(), [8; 16], 6).unwrap();
        assert!(spent.is_empty() && !file.exists(), "under another secret it is nobody's");
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = Journal::open(&file, [7; 16], 0).unwrap_err().to_string();
        assert!(error.starts_with(&file.display().to_string()), "{error}");
    }
}
