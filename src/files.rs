//! Files that the program writes: whole or not at all, and for nobody else's eyes.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Puts a file in the place of what was there, if it is another.
///
/// # Errors
/// It cannot be written; then what was there stays.
pub fn replace(path: &Path, octets: &[u8]) -> std::io::Result<()> {
    if std::fs::read(path).is_ok_and(|before| before == octets) {
        return Ok(());
    }
    let new = path.with_extension("new");
    // What an earlier attempt has left may be anybody's to read.
    let _ = std::fs::remove_file(&new);
    let mut file = std::fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(&new)?;
    file.write_all(octets)?;
    std::fs::rename(&new, path)
}
