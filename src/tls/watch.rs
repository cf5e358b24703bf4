//! Files that are looked at for changes.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// A set of files, and how they were found the last time. What counts is what a name leads to: a file has changed when
/// another was renamed to its name, when a symbolic link on the way points elsewhere (certbot's `live`, Kubernetes'
/// `..data`), and when others may read it than before (chmod, chown). To look costs a call of stat(2) for each, which
/// may wait for a disk.
#[derive(Debug, Clone)]
pub struct Watch {
    /// None: it is not there.
    files: BTreeMap<PathBuf, Option<Stamp>>,
}

/// What changes when a file does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    /// When its content changed: seconds and nanoseconds.
    modified: (i64, i64),
    /// When it or what stat(2) says of it changed: a key that could not be read may be readable since.
    changed: (i64, i64),
    size: u64,
}

fn stamp(file: &Path) -> Option<Stamp> {
    let of = std::fs::metadata(file).ok()?;
    Some(Stamp {
        device: of.dev(),
        inode: of.ino(),
        modified: (of.mtime(), of.mtime_nsec()),
        changed: (of.ctime(), of.ctime_nsec()),
        size: of.size(),
    })
}

impl Watch {
    /// Files as they are now. What changes between this and their being read is seen as a change, so this comes first.
    pub fn new(files: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        let with_stamp = |file: PathBuf| {
            let stamp = stamp(&file);
            (file, stamp)
        };
        Self { files: files.into_iter().map(Into::into).map(with_stamp).collect() }
    }

    /// Those that have changed since they were last looked at, once each. One that is gone has, and one that is there
    /// again.
    pub fn changed(&mut self) -> Vec<PathBuf> {
        let mut changed = vec![];
        for (file, before) in &mut self.files {
            let now = stamp(file);
            if now != *before {
                *before = now;
                changed.push(file.clone());
            }
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::time::Duration;

    const NONE: [PathBuf; 0] = [];

    #[test]
    fn written_renamed_and_gone() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, new] = ["a", "b", "new"].map(|name| dir.path().join(name));
        fs::write(&a, "1").unwrap();
        let mut watch = Watch::new([&a, &b, &a]);
        assert_eq!(watch.changed(), NONE);
        fs::write(&a, "12").unwrap();
        assert_eq!(watch.changed(), std::slice::from_ref(&a));
        assert_eq!(watch.changed(), NONE, "once");
        // Another of the same size and time.
        let modified = fs::metadata(&a).unwrap().modified().unwrap();
        fs::write(&new, "34").unwrap();
        fs::File::options().write(true).open(&new).unwrap().set_modified(modified).unwrap();
        fs::rename(&new, &a).unwrap();
        assert_eq!(watch.changed(), std::slice::from_ref(&a));
        fs::remove_file(&a).unwrap();
        fs::write(&b, "1").unwrap();
        assert_eq!(watch.changed(), [a.clone(), b.clone()]);
        assert_eq!(watch.changed(), NONE, "once");
        fs::write(&a, "1").unwrap();
        assert_eq!(watch.changed(), [a]);
    }

    #[test]
    fn made_readable() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        fs::write(&key, "1").unwrap();
        let mut watch = Watch::new([&key]);
        assert_eq!(watch.changed(), NONE);
        for mode in [0o000, 0o600] {
            // The clock that files are stamped by may stand still for a hundredth of a second.
            std::thread::sleep(Duration::from_millis(30));
            let modified = fs::metadata(&key).unwrap().modified().unwrap();
            fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(fs::metadata(&key).unwrap().modified().unwrap(), modified);
            assert_eq!(watch.changed(), std::slice::from_ref(&key), "{mode:o}");
            assert_eq!(watch.changed(), NONE, "once");
        }
    }

    #[test]
    fn links_that_are_swapped() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        // As Kubernetes has it: pem -> ..data/pem, ..data -> a directory by its time.
        for version in ["..1", "..2"] {
            fs::create_dir(path(version)).unwrap();
            fs::write(path(version).join("pem"), "1").unwrap();
        }
        symlink("..1", path("..data")).unwrap();
        symlink("..data/pem", path("pem")).unwrap();
        let mut watch = Watch::new([path("pem")]);
        assert_eq!(watch.changed(), NONE);
        symlink("..2", path("..new")).unwrap();
        fs::rename(path("..new"), path("..data")).unwrap();
        assert_eq!(watch.changed(), [path("pem")]);
        assert_eq!(watch.changed(), NONE);
    }
}
