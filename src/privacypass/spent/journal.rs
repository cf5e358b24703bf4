//! Spent tokens in files, for those who restart: appended to, one file or more an epoch, and removed when their epoch is over.
//!
//! A record is written before its token's request goes on, so that a process that is killed at any moment has lost none.
//! The system writes it to the disk later, once a second: a machine that loses its power loses the records of the last
//! second or so. A record that was torn then is left out when the file is read again.
//!
//! One thread writes, in the order in which it is told, so that no request waits for a disk that others keep busy; another
//! sees to it that what is written comes to the disk. They end once nobody has the files any more and all is written.
//!
//! Files that others are copied to are marked until they have it all: whoever began with them would take what was spent before.
//! A copy goes to files of its own, so that what has come of one that failed is known, and left out.

use super::memory::{Print, Prints};
use parking_lot::Mutex;
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// What a file begins with.
const MAGIC: &[u8; 16] = b"moh-spent-tokens";

/// Octets of a record: `+` (spent) or `-` (given back), and the hash of a nonce.
const RECORD: usize = 17;

/// As long as records may wait for the disk.
const SYNC: Duration = Duration::from_secs(1);

/// What is told once a record is written, or is not.
type Told = Box<dyn FnOnce(Result<(), Error>) + Send>;

/// After a failure nothing is tried for so long: who is refused comes again at once.
const PAUSE: Duration = Duration::from_secs(1);

/// Records that are written at once where there are many: who has one is not to wait for long.
const AT_ONCE: usize = 1 << 14;

/// For so long that is waited for.
const MANY: Duration = Duration::from_secs(10);

/// For so long files of ours are waited for that somebody here is about to leave; and between two looks.
const LEAVING: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(2);

/// The directories that this process has, by their canonical path: an Origin may have files where the one before it, which
/// serves what is under way, has those of another secret.
static HELD: Mutex<BTreeMap<PathBuf, Held>> = Mutex::new(BTreeMap::new());

/// A directory that no other process has.
struct Held {
    /// Locked: two gateways that write the same files would spend tokens twice.
    _lock: File,
    /// What the names of files begin with that are written.
    marks: Vec<String>,
}

/// Files of a mark in a directory, which nobody else writes as long as this is there.
struct Hold {
    dir: PathBuf,
    mark: String,
}

/// What is to be done, and who is told once it is.
struct Order {
    what: What,
    told: Told,
}

enum What {
    /// Records of an epoch are written, and files of epochs before `oldest` removed.
    Records { records: SmallVec<[u8; RECORD]>, epoch: u64, oldest: u64 },
    /// A copy begins.
    Copy,
    /// It is all there.
    Copied,
    /// Only all before it.
    Nothing,
}

/// The files of the epochs that are accepted.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
    /// It is there while a copy is not all there.
    unfinished: PathBuf,
    files: Files,
    orders: mpsc::Sender<Order>,
    copies: AtomicU64,
}

/// What the thread has that writes.
struct Writer {
    dir: PathBuf,
    /// Names of files tell whether their hashes are under our secret, and of epochs of our length: others' are left alone.
    mark: String,
    unfinished: PathBuf,
    files: Files,
    /// The next file's number.
    next: u64,
    /// The number of the first file of a copy that is not all there.
    copied: Option<u64>,
    keep_for: Duration,
    failed: Option<Instant>,
    _hold: Hold,
}

/// The file of each epoch that is written to, and those that are only read.
type Files = Arc<Mutex<BTreeMap<u64, Vec<Arc<Log>>>>>;

#[derive(Debug)]
struct Log {
    path: PathBuf,
    number: u64,
    /// None: it is from before a restart, and is not written to.
    file: Option<File>,
    dirty: AtomicBool,
    /// What follows goes elsewhere: it may end with half a record, or a copy has begun after it.
    closed: AtomicBool,
    opened: Instant,
}

impl Log {
    fn new(path: PathBuf, number: u64, file: Option<File>) -> Self {
        let dirty = AtomicBool::new(file.is_some());
        Self { path, number, file, dirty, closed: AtomicBool::new(false), opened: Instant::now() }
    }
}

fn at(path: &Path) -> impl FnOnce(Error) -> Error {
    move |e| Error::new(e.kind(), format!("{}: {e}", path.display()))
}

fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))
}

/// Removes a file, which may be gone already.
fn remove(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(at(path)(e)),
        _ => Ok(()),
    }
}

/// The number of the first file of a copy that is not all there, if there is one.
fn first_of_unfinished(path: &Path) -> Result<Option<u64>, Error> {
    match std::fs::read_to_string(path) {
        // It was written, and on the disk, before the first of them: where it is not whole, there is none.
        Ok(first) => Ok(Some(first.strip_suffix('\n').and_then(|first| first.parse().ok()).unwrap_or(u64::MAX))),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(at(path)(e)),
    }
}

fn record(print: Print, spent: bool) -> [u8; RECORD] {
    let mut record = [if spent { b'+' } else { b'-' }; RECORD];
    record.iter_mut().skip(1).zip(print.to_be_bytes()).for_each(|(to, from)| *to = from);
    record
}

// === impl Hold ===

impl Hold {
    /// Takes the files of a mark in a directory (by its canonical path). Who is about to leave them here is waited for.
    fn take(dir: &Path, mark: &str) -> Result<Self, Error> {
        let path = dir.join("lock");
        let until = Instant::now() + LEAVING;
        while !Self::is_taken(dir, &path, mark)? {
            if Instant::now() >= until {
                return Err(in_use(&path));
            }
            std::thread::sleep(LOOK);
        }
        Ok(Self { dir: dir.into(), mark: mark.into() })
    }

    /// Whether they could be taken: nobody has them here.
    fn is_taken(dir: &Path, path: &Path, mark: &str) -> Result<bool, Error> {
        let mut all = HELD.lock();
        if let Some(held) = all.get_mut(dir) {
            let free = held.marks.iter().all(|of| of != mark);
            if free {
                held.marks.push(mark.into());
            }
            return Ok(free);
        }
        let lock = OpenOptions::new().create(true).append(true).open(path).map_err(at(path))?;
        lock.try_lock().map_err(|_| in_use(path))?;
        all.insert(dir.into(), Held { _lock: lock, marks: vec![mark.into()] });
        Ok(true)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut all = HELD.lock();
        let Some(held) = all.get_mut(&self.dir) else { return };
        held.marks.retain(|mark| *mark != self.mark);
        if held.marks.is_empty() {
            all.remove(&self.dir);
        }
    }
}

fn in_use(path: &Path) -> Error {
    Error::new(ErrorKind::AddrInUse, format!("{}: another gateway has it", path.display()))
}

// === impl Journal ===

impl Journal {
    /// Opens the files in `dir`, which it makes if need be, and reads the spent tokens that are in them. Those of epochs before
    /// `oldest` go by and by, and when they were there for `keep_for`: the clock may be wrong.
    ///
    /// # Errors
    /// What cannot be read or written, by name; or another gateway uses the directory; or a copy to it was not finished.
    pub(super) fn open(
        dir: &Path,
        mark: [u8; 16],
        oldest: u64,
        keep_for: Duration,
    ) -> Result<(Self, Vec<(u64, Prints)>), Error> {
        Self::open_if(dir, mark, oldest, keep_for, false)
    }

    /// As [`Journal::open`], for all that is known to be copied to them: what an earlier copy has left is removed that was not
    /// finished.
    ///
    /// # Errors
    /// What cannot be read or written, by name; or another gateway uses the directory.
    pub(super) fn open_to_copy(
        dir: &Path,
        mark: [u8; 16],
        oldest: u64,
        keep_for: Duration,
    ) -> Result<(Self, Vec<(u64, Prints)>), Error> {
        Self::open_if(dir, mark, oldest, keep_for, true)
    }

    fn open_if(
        dir: &Path,
        mark: [u8; 16],
        oldest: u64,
        keep_for: Duration,
        to_copy: bool,
    ) -> Result<(Self, Vec<(u64, Prints)>), Error> {
        std::fs::create_dir_all(dir).map_err(at(dir))?;
        let dir = dir.canonicalize().map_err(at(dir))?;
        let mark = format!("spent-{}-", hex::encode(mark.get(..8).unwrap_or_default()));
        let hold = Hold::take(&dir, &mark)?;
        let unfinished = dir.join(format!("{mark}unfinished"));
        let copied = first_of_unfinished(&unfinished)?;
        if copied.is_some() && !to_copy {
            return Err(Error::new(
                ErrorKind::InvalidData,
                format!(
                    "{}: spent tokens were being copied here, and those that were spent before are not all there: start with the \
                     place that they were in before, or remove this directory, and tokens of before may be spent again",
                    unfinished.display()
                ),
            ));
        }
        let mut found = vec![];
        for entry in std::fs::read_dir(&dir).map_err(at(&dir))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix(&mark));
            let numbers = name.and_then(|name| name.split_once('-'));
            let numbers = numbers.and_then(|(e, n)| Some((e.parse::<u64>().ok()?, n.parse::<u64>().ok()?)));
            let Some((epoch, number)) = numbers else { continue };
            // It may hold tokens that were in hand then, and were given back since.
            if copied.is_some_and(|first| number >= first) {
                remove(&path)?;
                continue;
            }
            found.push((number, epoch, path));
        }
        if copied.is_some() {
            sync_dir(&dir)?;
        }
        // In the order in which they were written.
        found.sort_unstable();
        let next = found.last().map_or(0, |(number, ..): &(u64, u64, PathBuf)| number + 1);
        // Two epochs are in use at once, whatever the clock says now.
        let oldest =
            found.iter().map(|(_, epoch, _)| epoch.saturating_sub(1)).max().map_or(oldest, |of| of.min(oldest));
        let (mut spent, mut files) = (BTreeMap::<u64, Prints>::new(), BTreeMap::<u64, Vec<_>>::new());
        for (number, epoch, path) in found {
            if epoch < oldest {
                std::fs::remove_file(&path).map_err(at(&path))?;
                continue;
            }
            read(&path, spent.entry(epoch).or_default()).map_err(at(&path))?;
            files.entry(epoch).or_default().push(Arc::new(Log::new(path, number, None)));
        }
        let files = Arc::new(Mutex::new(files));
        let writer = Writer {
            dir: dir.clone(),
            mark,
            unfinished: unfinished.clone(),
            files: files.clone(),
            next,
            copied: None,
            keep_for,
            failed: None,
            _hold: hold,
        };
        let (orders, told) = mpsc::channel();
        keep(&files)?;
        std::thread::Builder::new().name("spent-tokens".into()).spawn(move || writer.work(&told))?;
        let journal = Self { dir, unfinished, files, orders, copies: AtomicU64::new(0) };
        Ok((journal, spent.into_iter().collect()))
    }

    /// Whether its files are in this directory.
    pub(super) fn is_in(&self, dir: &Path) -> bool {
        dir.canonicalize().is_ok_and(|dir| dir == self.dir)
    }

    /// Has it written that a token of `epoch` is spent, or given back, and `told` of it. Files of epochs before `oldest` are
    /// removed.
    pub(super) fn write(
        &self,
        print: Print,
        epoch: u64,
        oldest: u64,
        spent: bool,
        told: impl FnOnce(Result<(), Error>) + Send + 'static,
    ) {
        let what = What::Records { records: record(print, spent).into(), epoch, oldest };
        self.order(Order { what, told: Box::new(told) });
    }

    /// Has it written that many tokens of an epoch are spent, or given back, and waits until it is.
    ///
    /// # Errors
    /// What cannot be written; or the disk does not answer.
    pub(super) fn write_all(&self, prints: &[Print], epoch: u64, oldest: u64, spent: bool) -> Result<(), Error> {
        for some in prints.chunks(AT_ONCE) {
            let records = some.iter().flat_map(|print| record(*print, spent)).collect();
            self.done(What::Records { records, epoch, oldest })?;
        }
        Ok(())
    }

    /// All that is known is about to be written: until [`Journal::copied`] nobody is to begin with these files.
    ///
    /// # Errors
    /// What cannot be written; or the disk does not answer.
    pub(super) fn begin_copy(&self) -> Result<(), Error> {
        self.done(What::Copy)
    }

    /// It is all written. Waits for no disk.
    ///
    /// # Errors
    /// The files cannot be told from those of a copy that is not finished.
    pub(super) fn copied(&self) -> Result<(), Error> {
        std::fs::remove_file(&self.unfinished).map_err(at(&self.unfinished))?;
        self.copies.fetch_add(1, Ordering::Relaxed);
        self.order(Order { what: What::Copied, told: Box::new(|_| {}) });
        Ok(())
    }

    /// How many copies have been made to these files: what was given back before the last has been written as spent again.
    pub(super) fn copies(&self) -> u64 {
        self.copies.load(Ordering::Relaxed)
    }

    /// Waits until all that is written is on the disk, and that there are such files and directories.
    ///
    /// # Errors
    /// It is not there.
    pub(super) fn sync(&self) -> Result<(), Error> {
        let logs: Vec<_> = self.files.lock().values().flatten().cloned().collect();
        for log in logs {
            log.file.as_ref().map_or(Ok(()), File::sync_data).map_err(at(&log.path))?;
        }
        sync_dir(&self.dir)?;
        for parent in self.dir.ancestors().skip(1).take(2) {
            match sync_dir(parent) {
                // Who may not read it has not made anything there now.
                Err(e) if e.kind() != ErrorKind::PermissionDenied => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits until all before this is written, for so long at most. Whether it is.
    pub(super) fn settle(&self, at_most: Duration) -> bool {
        let (tell, told) = mpsc::channel();
        self.order(Order { what: What::Nothing, told: Box::new(move |_| tell.send(()).unwrap_or_default()) });
        told.recv_timeout(at_most).is_ok()
    }

    /// Waits until something is done.
    fn done(&self, what: What) -> Result<(), Error> {
        let (tell, told) = mpsc::channel();
        self.order(Order { what, told: Box::new(move |done| drop(tell.send(done))) });
        told.recv_timeout(MANY)
            .map_err(|_| Error::new(ErrorKind::TimedOut, format!("{}: the disk does not answer", self.dir.display())))?
    }

    fn order(&self, order: Order) {
        if let Err(mpsc::SendError(order)) = self.orders.send(order) {
            (order.told)(Err(Error::from(ErrorKind::BrokenPipe)));
        }
    }
}

// === impl Writer ===

impl Writer {
    fn work(mut self, orders: &mpsc::Receiver<Order>) {
        for Order { what, told } in orders {
            let done = match what {
                What::Nothing => Ok(()),
                What::Copy => self.begin_copy(),
                What::Copied => {
                    self.copied = None;
                    Ok(())
                }
                What::Records { .. } if self.failed.is_some_and(|at| at.elapsed() < PAUSE) => {
                    Err(Error::other("the disk took nothing a moment ago"))
                }
                What::Records { records, epoch, oldest } => {
                    self.write(&records, epoch, oldest).inspect_err(|_| self.failed = Some(Instant::now()))
                }
            };
            told(done);
        }
    }

    /// Marks the files as not all there, and has what is written from now on go to others than before.
    fn begin_copy(&mut self) -> Result<(), Error> {
        if let Some(first) = self.copied {
            // What a copy has left that failed: of tokens that were in hand then, and may have been given back since.
            let logs: Vec<_> = self.files.lock().values().flatten().cloned().collect();
            for log in logs.iter().filter(|log| log.number >= first) {
                remove(&log.path)?;
            }
            self.files.lock().values_mut().for_each(|logs| logs.retain(|log| log.number < first));
            sync_dir(&self.dir)?;
        }
        let mark = || {
            let mut file = File::create(&self.unfinished)?;
            file.write_all(format!("{}\n", self.next).as_bytes())?;
            file.sync_all()
        };
        mark().map_err(at(&self.unfinished))?;
        sync_dir(&self.dir)?;
        self.copied = Some(self.next);
        self.files.lock().values().flatten().for_each(|log| log.closed.store(true, Ordering::Relaxed));
        Ok(())
    }

    fn write(&mut self, records: &[u8], epoch: u64, oldest: u64) -> Result<(), Error> {
        let log = self.log(epoch, oldest)?;
        let Some(mut file) = log.file.as_ref() else { return Err(ErrorKind::NotFound.into()) };
        let len = file.metadata().map_err(at(&log.path))?.len();
        file.write_all(records).map_err(|e| {
            // What follows half a record could not be read.
            log.closed.store(file.set_len(len).is_err(), Ordering::Relaxed);
            at(&log.path)(e)
        })?;
        log.dirty.store(true, Ordering::Release);
        Ok(())
    }

    /// The file to write to: the last of its epoch.
    fn log(&mut self, epoch: u64, oldest: u64) -> Result<Arc<Log>, Error> {
        let mut over = vec![];
        let log = {
            let mut files = self.files.lock();
            let is_over = |logs: &Vec<Arc<Log>>| logs.iter().all(|log| log.opened.elapsed() >= self.keep_for);
            while let Some(first) = files.first_entry().filter(|first| *first.key() < oldest && is_over(first.get())) {
                over.extend(first.remove());
            }
            let last = files.get(&epoch).and_then(|logs| logs.last());
            last.filter(|log| log.file.is_some() && !log.closed.load(Ordering::Relaxed)).cloned()
        };
        for log in over {
            // It may be gone already; what is left is removed at the next start.
            let _ = std::fs::remove_file(&log.path);
        }
        if let Some(log) = log {
            return Ok(log);
        }
        let path = self.dir.join(format!("{}{epoch}-{}", self.mark, self.next));
        let mut file = OpenOptions::new().create_new(true).append(true).open(&path).map_err(|e| {
            // A file that is not ours has its name.
            self.next += u64::from(e.kind() == ErrorKind::AlreadyExists);
            at(&path)(e)
        })?;
        if let Err(e) = file.write_all(MAGIC) {
            let _ = std::fs::remove_file(&path);
            return Err(at(&path)(e));
        }
        // That there is such a file must outlive the machine's power, too.
        sync_dir(&self.dir)?;
        let log = Arc::new(Log::new(path, self.next, Some(file)));
        self.next += 1;
        self.files.lock().entry(epoch).or_default().push(log.clone());
        Ok(log)
    }
}

/// Reads a file's records. What is torn at its end is left out.
fn read(path: &Path, spent: &mut Prints) -> Result<(), Error> {
    let mut octets = vec![];
    File::open(path)?.read_to_end(&mut octets)?;
    let records = match octets.strip_prefix(MAGIC) {
        Some(records) => records,
        // The machine may have lost its power before the file had a beginning.
        None if octets.len() < MAGIC.len() || octets.iter().all(|octet| *octet == 0) => return Ok(()),
        None => return Err(Error::new(ErrorKind::InvalidData, "it is no file of spent tokens")),
    };
    for [tag, print @ ..] in records.as_chunks::<RECORD>().0 {
        let print = Print::from_be_bytes(*print);
        match tag {
            b'+' => spent.insert(print),
            b'-' => spent.remove(&print),
            _ => false,
        };
    }
    Ok(())
}

/// Sees to it, on a thread of its own, that records are on the disk in time; for as long as the files are used.
fn keep(files: &Files) -> Result<(), Error> {
    let files = Arc::downgrade(files);
    std::thread::Builder::new().name("spent-to-disk".into()).spawn(move || {
        while let Some(files) = files.upgrade() {
            let logs: Vec<_> = files.lock().values().flatten().cloned().collect();
            drop(files);
            for log in logs.iter().filter(|log| log.dirty.swap(false, Ordering::Acquire)) {
                if let Some(Err(e)) = log.file.as_ref().map(File::sync_data) {
                    tracing::error!("{}: spent tokens may not be on the disk: {e}", log.path.display());
                }
            }
            std::thread::sleep(SYNC);
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path, oldest: u64) -> (Journal, Vec<(u64, Vec<Print>)>) {
        let (journal, spent) = Journal::open(dir, [7; 16], oldest, Duration::ZERO).unwrap();
        let sorted = |prints: Prints| {
            let mut prints: Vec<_> = prints.into_iter().collect();
            prints.sort_unstable();
            prints
        };
        (journal, spent.into_iter().map(|(epoch, prints)| (epoch, sorted(prints))).collect())
    }

    fn write(journal: &Journal, print: Print, epoch: u64, oldest: u64, spent: bool) -> Result<(), Error> {
        let (tell, told) = mpsc::channel();
        journal.write(print, epoch, oldest, spent, move |written| tell.send(written).unwrap());
        told.recv().unwrap()
    }

    fn files(dir: &Path, epoch: u64) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.display().to_string().contains(&format!("0707-{epoch}-"))).collect()
    }

    #[test]
    fn what_was_spent_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, spent) = open(dir.path(), 4);
        assert!(spent.is_empty());
        for (print, epoch, oldest, is_spent) in
            [(1, 4, 4, true), (2, 5, 4, true), (3, 5, 4, true), (2, 5, 4, false), (9, 5, 4, false)]
        {
            write(&journal, print, epoch, oldest, is_spent).unwrap();
        }
        assert!(
            Journal::open(dir.path(), [7; 16], 4, Duration::ZERO)
                .is_err_and(|e| e.to_string().contains("another gateway"))
        );
        drop(journal);
        let (journal, spent) = open(dir.path(), 4);
        assert_eq!(spent, [(4, vec![1]), (5, vec![3])]);
        // An epoch that is over goes with the first record after it.
        write(&journal, 4, 6, 5, true).unwrap();
        assert!(files(dir.path(), 4).is_empty());
        drop(journal);
        // A torn record is left out, and what follows is whole.
        let file = files(dir.path(), 6).remove(0);
        let mut octets = std::fs::read(&file).unwrap();
        assert_eq!(octets.len(), MAGIC.len() + RECORD);
        octets.extend(b"+torn");
        std::fs::write(&file, octets).unwrap();
        let (journal, _) = open(dir.path(), 5);
        write(&journal, 5, 6, 5, true).unwrap();
        // Given back after a restart: the later file has the last word.
        write(&journal, 3, 5, 5, false).unwrap();
        drop(journal);
        let (journal, spent) = open(dir.path(), 5);
        assert_eq!(spent, [(5, vec![]), (6, vec![4, 5])]);
        drop(journal);
        let (other, spent) = Journal::open(dir.path(), [8; 16], 5, Duration::ZERO).unwrap();
        assert!(spent.is_empty() && file.exists(), "under another secret it is nobody's, and is left alone");
        drop(other);
        assert_eq!(open(dir.path(), 6).1, [(5, vec![]), (6, vec![4, 5])], "for whoever has the first one again");
    }

    #[test]
    fn a_directory_is_of_one_process_and_its_files_of_one_writer() {
        let dir = tempfile::tempdir().unwrap();
        let by = |mark| Journal::open(dir.path(), [mark; 16], 4, Duration::ZERO);
        let (one, _) = by(7).unwrap();
        let (other, spent) = by(8).unwrap();
        assert!(spent.is_empty() && one.is_in(dir.path()) && other.is_in(&dir.path().join(".")));
        write(&one, 1, 4, 4, true).unwrap();
        write(&other, 2, 4, 4, true).unwrap();
        assert!(by(8).is_err_and(|e| e.to_string().contains("another gateway")));
        // Whoever comes last has the lock still.
        let is_locked = || File::open(dir.path().join("lock")).unwrap().try_lock().is_err();
        drop(one);
        let (one, spent) = by(7).unwrap();
        assert_eq!(spent, [(4, Prints::from([1]))]);
        drop(other);
        assert_eq!(by(8).unwrap().1, [(4, Prints::from([2]))]);
        assert!(is_locked());
        drop(one);
        let until = Instant::now() + LEAVING;
        while is_locked() {
            assert!(Instant::now() < until, "somebody has it still");
            std::thread::sleep(LOOK);
        }
    }

    #[test]
    fn many_are_written_at_once_and_all_that_was_told_before_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path(), 4);
        let many: Vec<Print> = (0..2 * AT_ONCE as u128 + 3).collect();
        journal.write_all(&many, 5, 4, true).unwrap();
        journal.write_all(&many[1..], 5, 4, false).unwrap();
        journal.write_all(&[], 6, 4, true).unwrap();
        journal.write(9, 4, 4, true, drop);
        drop(journal);
        assert_eq!(open(dir.path(), 4).1, [(4, vec![9]), (5, vec![0])]);
        assert!(files(dir.path(), 6).is_empty());
    }

    #[test]
    fn a_copy_that_is_not_finished_is_refused_and_begun_again() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path(), 4);
        write(&journal, 1, 5, 4, true).unwrap();
        drop(journal);
        let to_copy = || Journal::open_to_copy(dir.path(), [7; 16], 4, Duration::ZERO).unwrap();
        let (journal, spent) = to_copy();
        assert_eq!(spent, [(5, Prints::from([1]))]);
        journal.begin_copy().unwrap();
        journal.write_all(&[2, 3], 5, 4, true).unwrap();
        drop(journal);
        // As after an end of the process; or of the copy.
        let error = Journal::open(dir.path(), [7; 16], 4, Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("0707-unfinished: ") && error.contains("not all there"), "{error}");
        assert!(Journal::open(dir.path(), [8; 16], 4, Duration::ZERO).is_ok(), "those of another secret are");
        let (journal, spent) = to_copy();
        assert_eq!(spent, [(5, Prints::from([1]))], "what was copied is left out");
        journal.begin_copy().unwrap();
        journal.write_all(&[2], 5, 4, true).unwrap();
        // And while somebody has the files.
        journal.begin_copy().unwrap();
        journal.write_all(&[4], 5, 4, true).unwrap();
        journal.sync().unwrap();
        journal.copied().unwrap();
        assert_eq!(journal.copies(), 1);
        journal.begin_copy().unwrap();
        journal.write_all(&[5], 5, 4, true).unwrap();
        drop(journal);
        let (journal, spent) = to_copy();
        assert_eq!(spent, [(5, Prints::from([1, 4]))], "the one that was finished stays");
        journal.begin_copy().unwrap();
        journal.copied().unwrap();
        assert!(journal.settle(MANY) && journal.copied().is_err(), "it is told once");
        drop(journal);
        assert_eq!(open(dir.path(), 4).1, [(5, vec![1, 4])]);
        // One that was not even begun.
        std::fs::write(dir.path().join("spent-0707070707070707-unfinished"), "0").unwrap();
        assert_eq!(to_copy().1, [(5, Prints::from([1, 4]))]);
    }

    #[test]
    fn a_clock_that_is_ahead_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path(), 4);
        write(&journal, 1, 4, 4, true).unwrap();
        write(&journal, 2, 5, 4, true).unwrap();
        drop(journal);
        let (ahead, spent) = Journal::open(dir.path(), [7; 16], 999, Duration::from_secs(60)).unwrap();
        assert_eq!(spent.len(), 2);
        write(&ahead, 3, 999, 998, true).unwrap();
        assert_eq!(
            (files(dir.path(), 4).len(), files(dir.path(), 5).len()),
            (1, 1),
            "they are not there for long enough"
        );
        drop(ahead);
        std::fs::write(dir.path().join("spent-0707070707070707-999-99"), "what is none of ours").unwrap();
        let error = Journal::open(dir.path(), [7; 16], 4, Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("999-99: it is no file of spent tokens"), "{error}");
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = Journal::open(&file, [7; 16], 0, Duration::ZERO).unwrap_err().to_string();
        assert!(error.starts_with(&file.display().to_string()), "{error}");
    }

    #[test]
    fn a_disk_that_takes_nothing_refuses_and_then_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path(), 4);
        write(&journal, 1, 5, 4, true).unwrap();
        // The next file's name is taken by a directory; a file for another epoch cannot be made.
        std::fs::create_dir(dir.path().join("spent-0707070707070707-6-1")).unwrap();
        assert!(write(&journal, 2, 6, 4, true).is_err());
        assert!(write(&journal, 2, 6, 4, true).unwrap_err().to_string().contains("a moment ago"));
        std::thread::sleep(PAUSE);
        write(&journal, 2, 6, 4, true).unwrap();
        drop(journal);
        std::fs::remove_dir(dir.path().join("spent-0707070707070707-6-1")).unwrap();
        assert_eq!(open(dir.path(), 4).1, [(5, vec![1]), (6, vec![2])]);
    }
}
