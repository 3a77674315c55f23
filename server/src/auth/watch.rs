//! Reading the keys' file again when it changes.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use super::{ApiKeys, key_file};

/// Between looks at the file.
const INTERVAL: Duration = Duration::from_secs(1);

/// What tells one state of a file from another. `None`: it cannot be looked at.
type Mark = Option<(u64, u64, u64, i64, i64, i64)>;

impl ApiKeys {
    /// Looks at the file for as long as the server runs. A file that cannot be read, or that makes no sense, leaves the keys
    /// as they are.
    pub async fn watch(self) {
        let Some(path) = self.0.file.clone() else { return };
        // What was read at start may have changed since; reading it once more costs nothing.
        let mut seen = None;
        loop {
            let (keys, looked_at) = (self.clone(), path.clone());
            match tokio::task::spawn_blocking(move || keys.look(&looked_at, seen)).await {
                Ok(mark) => seen = Some(mark),
                Err(error) => tracing::error!(%error, "looking at the keys' file failed"),
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Reads the file unless it is as `seen`.
    fn look(&self, path: &Path, seen: Option<Mark>) -> Mark {
        let mark = mark(path);
        if seen == Some(mark) {
            return mark;
        }
        match key_file::read(path).and_then(|entries| self.replace(entries)) {
            Ok(()) if seen.is_some() => tracing::info!(keys = self.accounts().len(), "API keys read again"),
            Ok(()) => {}
            Err(error) => tracing::error!(%error, "the API keys stay as they are"),
        }
        mark
    }
}

/// Taken before reading, so that a change in between is seen the next time.
fn mark(path: &Path) -> Mark {
    let file = std::fs::metadata(path).ok()?;
    Some((file.dev(), file.ino(), file.size(), file.mtime(), file.ctime(), file.ctime_nsec()))
}
