//! The server that `rill bench` starts when it is given none: this very binary in a process of its own, so that its
//! start and its memory can be measured too.

use std::io::{self, BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A running `rill serve`, ended when dropped.
pub struct OwnServer {
    child: Child,
    /// Base address, `/v1` included.
    pub url: String,
    started: Instant,
}

impl OwnServer {
    /// Starts `rill serve` with `flags` on a free port and waits until it is ready.
    pub fn start(flags: &[String]) -> io::Result<OwnServer> {
        let started = Instant::now();
        let mut child = Command::new(std::env::current_exe()?)
            .args(["serve", "--host", "127.0.0.1", "--port", "0", "--log", "warn"])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut stdout = BufReader::new(child.stdout.take().expect("piped just above"));
        let mut server = OwnServer { child, url: String::new(), started };
        let mut line = String::new();
        while server.url.is_empty() {
            line.clear();
            if stdout.read_line(&mut line)? == 0 {
                return Err(io::Error::other("the server ended before it was ready"));
            }
            if let Some(address) = line.trim_start().strip_prefix("address") {
                server.url = format!("{}/v1", address.trim());
            }
        }
        // What else it prints goes nowhere, and does not block it.
        std::thread::spawn(move || io::copy(&mut stdout, &mut io::sink()));
        Ok(server)
    }

    /// Since the process was started.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Bytes of physical memory it holds now, where the system tells.
    pub fn resident_bytes(&self) -> Option<u64> {
        resident_in(&std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?)
    }
}

/// `VmRSS` of `/proc/PID/status`, in bytes.
fn resident_in(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        // Already gone where it died by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_read() {
        assert_eq!(resident_in("VmHWM:\t  9 kB\nVmRSS:\t    2048 kB\n"), Some(2 << 20));
        assert_eq!(resident_in("nonsense"), None);
    }
}
