//! Somebody else on the machine: a process that spins on a core, or any command, while a measurement runs.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process_group};

/// Both loops end by themselves once the process given as $1 is gone.
const SPIN: &str = "while kill -0 \"$1\" 2>/dev/null; do i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; done";
const REPEAT: &str = "while kill -0 \"$1\" 2>/dev/null; do sh -c \"$2\"; done";

/// What runs beside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Neighbour {
    /// One process that keeps one core busy.
    Spin,
    /// A shell command, started again whenever it ends.
    Command(String),
}

/// A neighbour at work, until dropped.
pub struct AtWork(Child);

impl Neighbour {
    pub fn parse(text: &str) -> Neighbour {
        if text.trim() == "spin" { Neighbour::Spin } else { Neighbour::Command(text.to_owned()) }
    }

    pub fn start(&self) -> io::Result<AtWork> {
        let (script, command) = match self {
            Neighbour::Spin => (SPIN, ""),
            Neighbour::Command(command) => (REPEAT, command.as_str()),
        };
        let child = Command::new("sh")
            .args(["-c", script, "neighbour", &std::process::id().to_string(), command])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // So that all it starts ends with it.
            .process_group(0)
            .spawn()?;
        Ok(AtWork(child))
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        if let Some(group) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            // Fails only where all of it is gone already.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_command_repeats_until_dropped_with_all_it_started() {
        let file = std::env::temp_dir().join(format!("rill-neighbour-{}", std::process::id()));
        let lines = || std::fs::read_to_string(&file).map_or(0, |text| text.lines().count());
        let command = format!("echo x >> {}; sleep 0.01", file.display());
        let at_work = Neighbour::parse(&command).start().unwrap();
        let start = Instant::now();
        while lines() < 3 {
            assert!(start.elapsed() < Duration::from_secs(10), "it does not repeat");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(at_work);
        let after = lines();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(lines(), after, "it goes on");
        std::fs::remove_file(&file).unwrap();
    }

    #[test]
    fn spinning_is_a_word() {
        assert_eq!(Neighbour::parse(" spin "), Neighbour::Spin);
        assert_eq!(Neighbour::parse("make -j2"), Neighbour::Command("make -j2".to_owned()));
        drop(Neighbour::Spin.start().unwrap());
    }
}
