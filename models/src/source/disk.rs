//! Writing files so that others see all of them or nothing: space checked first, locked, renamed into place.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;

use super::Progress;
use crate::ModelError;

/// Left free on a disk we write to.
const SPARE_BYTES: u64 = 64 << 20;

/// Refuses unless `bytes` more fit on the disk that holds `dir`.
pub(super) fn check_space(dir: &Path, bytes: u64) -> Result<(), ModelError> {
    // Where it cannot be told, writing will.
    let Ok(disk) = rustix::fs::statvfs(dir) else {
        return Ok(());
    };
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free >= bytes.saturating_add(SPARE_BYTES) {
        return Ok(());
    }
    Err(ModelError::Source(format!(
        "{} MB are needed in {}, but only {} MB are free; make room, or name another directory with RILL_CACHE and HF_HOME",
        (bytes + SPARE_BYTES) >> 20,
        dir.display(),
        free >> 20
    )))
}

/// An error from writing below `dir`; a full disk is called by its name.
pub(super) fn write_error(dir: &Path, error: &io::Error) -> ModelError {
    ModelError::Source(match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => format!(
            "the disk is full: {}: {error}; make room, or name another directory with RILL_CACHE and HF_HOME",
            dir.display()
        ),
        _ => format!("cannot write in {}: {error}", dir.display()),
    })
}

pub(super) fn create_dir(dir: &Path) -> Result<(), ModelError> {
    std::fs::create_dir_all(dir).map_err(|e| write_error(dir, &e))
}

/// Holds `path` locked against other processes until dropped; waits while another one has it.
pub(super) fn lock(path: &Path, what: &str, progress: &mut dyn Progress) -> Result<File, ModelError> {
    let failed = |e: io::Error| write_error(path, &e);
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            progress.note(&format!("another process is fetching {what}; waiting for it"));
            file.lock().map_err(failed)?;
        }
        Err(TryLockError::Error(e)) => return Err(failed(e)),
    }
    Ok(file)
}

/// Moves a complete file to where it is looked for. After a crash at any point it is there whole, or not at all.
pub(super) fn publish(file: &File, from: &Path, to: &Path) -> io::Result<()> {
    file.sync_all()?;
    std::fs::rename(from, to)?;
    match to.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

/// Makes `link` point to `target`, in place of what was there: whoever looks finds the old or the new, never nothing.
pub(super) fn link(target: &Path, link: &Path) -> Result<(), ModelError> {
    let failed = |e: io::Error| write_error(link, &e);
    let dir = link.parent().expect("a link has a directory");
    let beside = tempfile::Builder::new().make_in(dir, |path| std::os::unix::fs::symlink(target, path));
    let beside = beside.map_err(failed)?.into_temp_path();
    beside.persist(link).map_err(|e| failed(e.error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_called_one() {
        let full = write_error(Path::new("/x"), &io::Error::from(io::ErrorKind::StorageFull)).to_string();
        assert!(full.starts_with("the disk is full: /x") && full.contains("RILL_CACHE"), "{full}");
        let other = write_error(Path::new("/x"), &io::Error::from(io::ErrorKind::PermissionDenied)).to_string();
        assert!(other.contains("cannot write in /x"), "{other}");
    }

    #[test]
    fn a_link_is_replaced_in_one_step() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("link");
        std::fs::write(&at, "a damaged file").unwrap();
        std::fs::write(dir.path().join("whole"), "whole").unwrap();
        link(Path::new("whole"), &at).unwrap();
        std::thread::scope(|scope| {
            let relinked = scope.spawn(|| (0..200).for_each(|_| link(Path::new("whole"), &at).unwrap()));
            while !relinked.is_finished() {
                assert_eq!(std::fs::read_to_string(&at).unwrap(), "whole");
            }
        });
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn space_is_checked_with_the_numbers() {
        let dir = tempfile::tempdir().unwrap();
        check_space(dir.path(), 1).unwrap();
        let error = check_space(dir.path(), 1 << 62).unwrap_err().to_string();
        assert!(error.contains(&format!("{} MB are needed", (1u64 << 42) + 64)), "{error}");
    }
}
