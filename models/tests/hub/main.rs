//! Models from a hub: what is fetched, what is kept, and what happens when the network does what networks do.

mod cached;
mod fake_hub;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fake_hub::{COMMIT, FakeHub, sha256};
use rill_models::{ModelError, ModelFiles, ModelKind, NoProgress, Progress, SourceOptions, resolve};

/// Bytes that repeat nowhere near.
fn content(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

const LEN: usize = 1 << 20;

fn one_file() -> FakeHub {
    FakeHub::new(&[("README.md", b"x".to_vec()), ("m-Q4_0.gguf", content(LEN, 1))])
}

fn options(hub: &FakeHub, dir: &Path) -> SourceOptions {
    SourceOptions {
        hub_endpoint: Some(hub.url.clone()),
        read_timeout: Duration::from_millis(400),
        retries: 2,
        ..SourceOptions::in_dir(dir)
    }
}

/// A hub's cache in a directory of its own, and what it takes to ask the hub again.
struct Setup {
    hub: FakeHub,
    dir: tempfile::TempDir,
    options: SourceOptions,
}

fn setup(hub: FakeHub) -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let options = options(&hub, dir.path());
    Setup { hub, dir, options }
}

impl Setup {
    fn get(&self, spec: &str) -> Result<ModelFiles, ModelError> {
        resolve(spec, &self.options, &mut NoProgress)
    }

    /// Why `spec` cannot be had.
    fn refusal(&self, spec: &str, parts: &[&str]) {
        let error = self.get(spec).expect_err("is refused");
        assert!(matches!(error, ModelError::Source(_)), "{error:?}");
        let message = error.to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{parts:?} not in {message}");
    }

    fn repo_dir(&self) -> PathBuf {
        self.dir.path().join("hub/models--org--repo")
    }

    /// Where a download of the one file is kept until it is complete.
    fn part(&self) -> PathBuf {
        self.repo_dir().join(format!("blobs/{}.incomplete", sha256(&content(LEN, 1))))
    }
}

fn gguf_path(files: &ModelFiles) -> &Path {
    match &files.kind {
        ModelKind::Gguf { path } => path,
        other => panic!("{other:?}"),
    }
}

fn assert_whole(files: &ModelFiles) {
    assert!(fs::read(gguf_path(files)).unwrap() == content(LEN, 1), "the file differs");
}

#[test]
fn a_file_is_fetched_once_and_kept_as_every_hub_program_keeps_it() {
    let setup = setup(one_file());
    let files = setup.get("org/repo").unwrap();
    assert_eq!(files.name, "org/repo");
    assert_whole(&files);
    let snapshot = setup.repo_dir().join("snapshots").join(COMMIT).join("m-Q4_0.gguf");
    assert_eq!(gguf_path(&files), snapshot);
    let link = fs::read_link(&snapshot).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(sha256(&content(LEN, 1))));
    assert_eq!(fs::read_to_string(setup.repo_dir().join("refs/main")).unwrap(), COMMIT);
    assert!(!setup.part().exists());
    let cache = hf_hub::Cache::new(setup.dir.path().join("hub"));
    assert_eq!(cache.model("org/repo".to_owned()).get("m-Q4_0.gguf"), Some(snapshot));
    assert_eq!(setup.get("org/repo").unwrap(), files);
    assert_eq!(setup.hub.content_ranges(), [""], "fetched once");
    let asked_offline = setup.hub.seen().len();
    let offline = SourceOptions { hub_offline: true, ..setup.options.clone() };
    assert_eq!(resolve("org/repo", &offline, &mut NoProgress).unwrap(), files);
    assert_eq!(setup.hub.seen().len(), asked_offline, "offline asks nobody");
}

#[test]
fn a_file_and_a_revision_can_be_picked() {
    let setup = setup(FakeHub::new(&[
        ("m-Q4_K_M.gguf", content(100, 2)),
        ("m-Q8_0.gguf", content(100, 3)),
        ("sub/n name.gguf", content(100, 4)),
    ]));
    let check = |spec: &str, seed: u32| {
        let files = setup.get(spec).unwrap();
        assert!(fs::read(gguf_path(&files)).unwrap() == content(100, seed), "{spec}");
    };
    check("org/repo", 2);
    check("org/repo:q8_0", 3);
    check("org/repo@v1:m-Q8_0.gguf", 3);
    check(&format!("org/repo@{COMMIT}:sub/n name.gguf"), 4);
    assert_eq!(fs::read_to_string(setup.repo_dir().join("refs/v1")).unwrap(), COMMIT);
    setup.refusal("org/repo:Q2_K", &["no Q2_K", "m-Q4_K_M.gguf", "m-Q8_0.gguf"]);
    setup.refusal("org/repo@v2", &["404", "Invalid rev id"]);
}

#[test]
fn safetensors_come_with_all_that_belongs_to_them() {
    let index = r#"{"weight_map": {"a": "w-1.safetensors", "b": "w-2.safetensors"}}"#;
    let setup = setup(FakeHub::new(&[
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{\"t\": 1}".to_vec()),
        ("chat_template.jinja", b"hi".to_vec()),
        ("model.safetensors.index.json", index.into()),
        ("w-1.safetensors", content(5000, 5)),
        ("w-2.safetensors", content(7000, 6)),
        ("unrelated.safetensors", content(10, 7)),
        ("pytorch_model.bin", content(10, 8)),
    ]));
    let files = setup.get("org/repo").unwrap();
    let ModelKind::Safetensors { dir, shards } = &files.kind else { panic!("{files:?}") };
    assert_eq!(*shards, [dir.join("w-1.safetensors"), dir.join("w-2.safetensors")]);
    assert_eq!(fs::read(&shards[1]).unwrap(), content(7000, 6));
    assert_eq!(fs::read(dir.join("tokenizer.json")).unwrap(), b"{\"t\": 1}");
    assert_eq!(fs::read(dir.join("chat_template.jinja")).unwrap(), b"hi");
    assert!(!dir.join("unrelated.safetensors").exists() && !dir.join("pytorch_model.bin").exists());
    // The directory is a model on its own too.
    assert_eq!(setup.get(dir.to_str().unwrap()).unwrap().kind, files.kind);
    let offline = SourceOptions { hub_offline: true, ..setup.options.clone() };
    assert_eq!(resolve("org/repo", &offline, &mut NoProgress).unwrap(), files);
    fs::remove_file(&shards[1]).unwrap();
    let error = resolve("org/repo", &offline, &mut NoProgress).unwrap_err().to_string();
    assert!(error.contains("w-2.safetensors is missing") && error.contains("HF_HUB_OFFLINE"), "{error}");
    assert_eq!(setup.get("org/repo").unwrap(), files, "fetched again, from the blob that is still there");
}

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let mut setup = setup(one_file());
    setup.hub.faults(|faults| faults.token = Some("secret"));
    setup.refusal("org/repo", &["401", "Invalid username", "HF_TOKEN"]);
    setup.options.hub_token = Some("wrong".to_owned());
    setup.refusal("org/repo", &["403", "terms"]);
    setup.options.hub_token = Some("secret".to_owned());
    assert_whole(&setup.get("org/repo").unwrap());
    let seen = setup.hub.seen();
    let content: Vec<_> = seen.iter().filter(|seen| seen.content).collect();
    assert_eq!(content.len(), 1);
    assert!(!content[0].headers.contains_key("authorization"), "{content:?}");
}

#[test]
fn what_is_not_there_is_a_clear_no() {
    let setup = setup(one_file());
    setup.refusal("org/other", &["404", "org/other", "no such repository"]);
    setup.refusal("org/repo:absent.gguf", &["no absent.gguf", "m-Q4_0.gguf"]);
    assert!(setup.hub.content_ranges().is_empty());
}

#[test]
fn a_cut_connection_is_resumed_where_it_broke() {
    let setup = setup(one_file());
    setup.hub.faults(|faults| faults.cut = Some((LEN / 4, 3)));
    assert_whole(&setup.get("org/repo").unwrap());
    let quarter = |n: usize| format!("bytes={}-", LEN / 4 * n);
    assert_eq!(setup.hub.content_ranges(), ["".to_owned(), quarter(1), quarter(2), quarter(3)]);
}

#[test]
fn a_later_run_goes_on_where_an_earlier_one_ended() {
    let setup = setup(one_file());
    fs::create_dir_all(setup.part().parent().unwrap()).unwrap();
    fs::write(setup.part(), &content(LEN, 1)[..1000]).unwrap();
    assert_whole(&setup.get("org/repo").unwrap());
    assert_eq!(setup.hub.content_ranges(), ["bytes=1000-"]);
}

#[test]
fn bad_leftovers_are_found_out_and_fetched_again() {
    for leftover in [vec![7; 1000], vec![7; LEN], vec![7; LEN + 5]] {
        let setup = setup(one_file());
        fs::create_dir_all(setup.part().parent().unwrap()).unwrap();
        fs::write(setup.part(), &leftover).unwrap();
        assert_whole(&setup.get("org/repo").unwrap());
        assert_eq!(setup.hub.content_ranges().last().unwrap(), "", "from the start");
    }
}

#[test]
fn a_hub_that_cannot_resume_sends_it_all_again() {
    let setup = setup(one_file());
    setup.hub.faults(|faults| (faults.cut, faults.no_ranges) = (Some((LEN / 2, 1)), true));
    assert_whole(&setup.get("org/repo").unwrap());
    assert_eq!(setup.hub.content_ranges().len(), 2);
}

#[test]
fn corrupted_content_is_never_published() {
    let setup = setup(one_file());
    setup.hub.faults(|faults| faults.corrupt = 100);
    setup.refusal("org/repo", &["SHA-256", &sha256(&content(LEN, 1))]);
    assert_eq!(setup.hub.content_ranges().len(), 2, "tried twice, no more");
    let blobs = fs::read_dir(setup.repo_dir().join("blobs")).unwrap().flatten();
    let whole: Vec<_> = blobs.filter(|blob| !blob.path().ends_with(setup.part())).collect();
    assert!(whole.is_empty(), "{whole:?}");
    setup.hub.faults(|faults| faults.corrupt = 1);
    assert_whole(&setup.get("org/repo").unwrap());
}

#[test]
fn a_server_that_falls_silent_costs_the_read_timeout() {
    let setup = setup(one_file());
    setup.hub.faults(|faults| faults.stall = Some((LEN / 2, 1)));
    let started = Instant::now();
    assert_whole(&setup.get("org/repo").unwrap());
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(setup.hub.content_ranges(), ["".to_owned(), format!("bytes={}-", LEN / 2)]);
}

#[test]
fn a_server_that_never_sends_anything_is_given_up() {
    let setup = setup(one_file());
    setup.hub.faults(|faults| faults.stall = Some((0, 100)));
    let started = Instant::now();
    setup.refusal("org/repo", &["cannot fetch org/repo", "HF_ENDPOINT"]);
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(setup.hub.content_ranges().len(), 3, "one try and two more");
}

#[test]
fn a_passing_503_is_waited_out() {
    let setup = setup(one_file());
    setup.hub.faults(|faults| faults.unavailable = 2);
    assert_whole(&setup.get("org/repo").unwrap());
    setup.hub.faults(|faults| faults.unavailable = 100);
    fs::remove_dir_all(setup.repo_dir()).unwrap();
    setup.refusal("org/repo", &["503"]);
}

/// Keeps what it is told.
#[derive(Default)]
struct Told {
    started: Vec<(String, Option<u64>)>,
    received: Vec<u64>,
    finished: usize,
    notes: Vec<String>,
}

impl Progress for Told {
    fn start(&mut self, what: &str, total_bytes: Option<u64>) {
        self.started.push((what.to_owned(), total_bytes));
    }
    fn received(&mut self, bytes: u64) {
        self.received.push(bytes);
    }
    fn finish(&mut self) {
        self.finished += 1;
    }
    fn note(&mut self, message: &str) {
        self.notes.push(message.to_owned());
    }
}

#[test]
fn progress_rises_to_the_total() {
    let setup = setup(one_file());
    setup.hub.faults(|faults| faults.cut = Some((LEN / 2, 1)));
    let mut told = Told::default();
    resolve("org/repo", &setup.options, &mut told).unwrap();
    assert_eq!(told.started, [("m-Q4_0.gguf".to_owned(), Some(LEN as u64))]);
    assert_eq!(told.finished, 1);
    assert!(told.received.is_sorted());
    assert_eq!(told.received.last(), Some(&(LEN as u64)));
    assert!(told.notes[0].contains(&format!("going on from byte {}", LEN / 2)), "{:?}", told.notes);
}

#[test]
fn an_unreachable_hub_costs_seconds_and_the_cache_still_serves() {
    let mut setup = setup(one_file());
    let files = setup.get("org/repo").unwrap();
    // Nobody listens on a port that was just given back.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    setup.options.hub_endpoint = Some(format!("http://{free}"));
    let started = Instant::now();
    let mut told = Told::default();
    assert_eq!(resolve("org/repo", &setup.options, &mut told).unwrap(), files);
    assert!(told.notes[0].contains("using what the cache holds"), "{:?}", told.notes);
    setup
        .refusal("org/never-seen", &["cannot fetch org/never-seen", "refused", "does not hold it", "HF_ENDPOINT"]);
    assert!(started.elapsed() < Duration::from_secs(3));
}

#[test]
fn a_hub_that_takes_too_long_to_answer_is_unreachable() {
    let setup = setup(one_file());
    setup.hub.faults(|faults| faults.delay = Duration::from_secs(5));
    let started = Instant::now();
    setup.refusal("org/repo", &["timeout"]);
    assert!(started.elapsed() < Duration::from_secs(3));
}

#[test]
fn answers_that_are_no_hubs_are_told_apart() {
    let setup = setup(one_file());
    for answer in ["<html>Sign in to the network</html>", "{}", r#"{"sha": "../..", "siblings": []}"#] {
        setup.hub.faults(|faults| faults.listing = Some(answer.to_owned()));
        setup.refusal("org/repo", &["does not answer like a hub"]);
    }
}

#[test]
fn names_that_would_leave_the_cache_are_no_files() {
    let setup = setup(one_file());
    let listing = format!(
        r#"{{"sha": "{COMMIT}", "siblings": [{{"rfilename": "../../../evil.gguf"}}, {{"rfilename": "/etc/x.gguf"}}]}}"#
    );
    setup.hub.faults(|faults| faults.listing = Some(listing));
    setup.refusal("org/repo", &["neither a .gguf file nor"]);
}

#[test]
fn a_disk_that_is_too_small_is_refused_before_the_download() {
    let setup = setup(one_file());
    let listing =
        format!(r#"{{"sha": "{COMMIT}", "siblings": [{{"rfilename": "m-Q4_0.gguf", "size": {}}}]}}"#, 1u64 << 60);
    setup.hub.faults(|faults| faults.listing = Some(listing));
    setup.refusal("org/repo", &["MB are needed", "MB are free"]);
    assert!(setup.hub.content_ranges().is_empty());
}

#[test]
fn starts_at_the_same_time_fetch_once() {
    let setup = setup(one_file());
    setup.hub.faults(|faults| faults.delay = Duration::from_millis(50));
    std::thread::scope(|scope| {
        let starts: Vec<_> = (0..4).map(|_| scope.spawn(|| setup.get("org/repo").unwrap())).collect();
        for start in starts {
            assert_whole(&start.join().unwrap());
        }
    });
    assert_eq!(setup.hub.content_ranges(), [""]);
}
