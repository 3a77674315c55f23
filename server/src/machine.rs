//! This machine, or this container of it: cores and memory that defaults come from.

use std::path::Path;

/// Facts about this machine that defaults come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    pub cores: usize,
    pub available_bytes: u64,
}

impl Machine {
    /// This machine, or this container of it.
    pub fn detect() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let available = available_in(&meminfo).unwrap_or(4 << 30);
        let room_in_group = cgroup_room().unwrap_or(u64::MAX);
        Machine { cores, available_bytes: available.min(room_in_group) }
    }
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available_in(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What the memory limits of this process's control group, and of those it is in, leave; `None` where there are none.
fn cgroup_room() -> Option<u64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    // In a container the group seen from outside is the root seen from inside.
    Path::new("/sys/fs/cgroup").join(own).ancestors().filter_map(group_room).min()
}

/// What one group's limit leaves. Files it has read count as its own, but make room when it is needed.
fn group_room(group: &Path) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
    let limit: u64 = read("memory.max")?.trim().parse().ok()?;
    let used: u64 = read("memory.current")?.trim().parse().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    Some(limit.saturating_sub(used.saturating_sub(cached_in(&stat))))
}

/// Bytes of file pages in a group's `memory.stat` that the kernel can drop.
fn cached_in(stat: &str) -> u64 {
    let field = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        ["active_file", "inactive_file"].contains(&name).then(|| value.trim().parse().unwrap_or(0))
    };
    stat.lines().filter_map(field).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read() {
        let meminfo = "MemTotal:       24576 kB\nMemFree:  1 kB\nMemAvailable:   2048 kB\n";
        assert_eq!(available_in(meminfo), Some(2 << 20));
        assert_eq!(available_in("nonsense"), None);
        let stat = "anon 5000\nfile 900\ninactive_file 300\nactive_file 400\nslab 7\n";
        assert_eq!(cached_in(stat), 700);
    }
}
