//! Several files at once, revisions named apart, and the cache listed and emptied.

use crate::fake_hub::{COMMIT, FakeHub, sha256};
use crate::{Told, content, one_file, setup};
use rill_models::{NoProgress, SourceOptions, cached_models, remove_cached, resolve};
use std::fs;
use std::time::{Duration, Instant};

fn sharded() -> FakeHub {
    let index = r#"{"weight_map": {"a": "w-1.safetensors", "b": "w-2.safetensors", "c": "w-3.safetensors"}}"#;
    FakeHub::new(&[
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{\"t\": 1}".to_vec()),
        ("model.safetensors.index.json", index.into()),
        ("w-1.safetensors", content(300_000, 5)),
        ("w-2.safetensors", content(200_000, 6)),
        ("w-3.safetensors", content(100_000, 7)),
    ])
}

#[test]
fn shards_arrive_together_and_are_told_of_as_one() {
    let setup = setup(sharded());
    let mut told = Told::default();
    resolve("org/repo", &setup.options, &mut told).unwrap();
    let (what, total) = told.started.last().unwrap();
    assert_eq!((what.as_str(), *total), ("3 files of org/repo", Some(600_000)));
    assert_eq!(told.started.len(), told.finished);
    assert_eq!(told.received.last(), Some(&600_000));
    // Answers that take half a second each: one after the other they would take three and more.
    fs::remove_dir_all(setup.repo_dir()).unwrap();
    setup.hub.faults(|faults| faults.delay = Duration::from_millis(250));
    let started = Instant::now();
    setup.get("org/repo").unwrap();
    assert!(started.elapsed() < Duration::from_millis(4000), "{:?}", started.elapsed());
}

#[test]
fn one_shard_that_cannot_be_had_fails_the_rest() {
    let setup = setup(sharded());
    setup.hub.faults(|faults| faults.unavailable = 1000);
    setup.refusal("org/repo", &["503"]);
    setup.hub.faults(|faults| faults.unavailable = 0);
    setup.get("org/repo").unwrap();
}

#[test]
fn a_revision_can_be_named_apart() {
    let setup = setup(one_file());
    let at = |revision: &str| SourceOptions { revision: Some(revision.to_owned()), ..setup.options.clone() };
    resolve("org/repo", &at("v1"), &mut NoProgress).unwrap();
    assert_eq!(fs::read_to_string(setup.repo_dir().join("refs/v1")).unwrap(), COMMIT);
    resolve("org/repo@v1", &at("v1"), &mut NoProgress).unwrap();
    for (spec, revision, part) in
        [("org/repo@main", "v1", "two revisions"), ("org/repo", "../x", "no name"), (".", "v1", "only hub")]
    {
        let error = resolve(spec, &at(revision), &mut NoProgress).unwrap_err().to_string();
        assert!(error.contains(part), "{spec} {revision}: {error}");
    }
}

#[test]
fn the_cache_is_listed_and_emptied() {
    let setup = setup(one_file());
    assert_eq!(cached_models(&setup.options).unwrap(), []);
    setup.get("org/repo").unwrap();
    setup.get("org/repo@v1").unwrap();
    let left = setup.repo_dir().join(format!("blobs/{}.incomplete", sha256(b"other")));
    fs::write(&left, [0; 100]).unwrap();
    let models = cached_models(&setup.options).unwrap();
    assert_eq!(models.len(), 1);
    let size = content(1 << 20, 1).len() as u64;
    assert_eq!((models[0].name.as_str(), models[0].bytes), ("org/repo", size + 100));
    assert_eq!((models[0].unfinished_bytes, models[0].path.as_path()), (100, setup.repo_dir().as_path()));
    assert_eq!(models[0].revisions, ["main", "v1"]);
    let refused = |name: &str, part: &str| {
        let error = remove_cached(name, &setup.options).unwrap_err().to_string();
        assert!(error.contains(part), "{name}: {error}");
    };
    refused("org/other", "no cache holds it");
    refused("org/repo@v1", "whole repositories");
    refused("org/repo:Q4_0", "whole repositories");
    assert_eq!(remove_cached("org/repo", &setup.options).unwrap(), size + 100);
    assert!(!setup.repo_dir().exists());
    assert_eq!(cached_models(&setup.options).unwrap(), []);
}
