//! Bugs planted in the attention kernel: the same checks that pass on the sound kernel must fail. And the sound one
//! under sanitizers.

use crate::attention::{Shape, World};
use rill_cuda_shim::{SANITIZER_RUNTIME, Variant};

fn world() -> World {
    World::new(&Shape {
        kv_heads: 2,
        ratio: 4,
        head_dim: 64,
        frequencies: 32,
        lens: vec![90, 33, 7],
        block_size: 16,
        window: None,
        softcap: None,
        seed: 11,
    })
}

/// Runs `test` of this file in a process of its own: a bug may crash it.
fn passes(test: &str) -> bool {
    let mut run = std::process::Command::new(std::env::current_exe().expect("a test has a file"));
    run.args(["--exact", &format!("planted::{test}"), "--ignored", "--nocapture"]);
    if test == "sanitized" {
        // Fibers run on stacks of their own, and a test process leaks what lives as long as it.
        run.env("LD_PRELOAD", SANITIZER_RUNTIME)
            .env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0");
    }
    let run = run.output().expect("a test runs again");
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    assert!(said.contains("running 1 test"), "{test} is not there: {said}");
    println!(
        "{test}: {}",
        said.lines().rev().take(40).collect::<Vec<&str>>().into_iter().rev().collect::<Vec<&str>>().join("\n")
    );
    run.status.success()
}

#[test]
#[ignore = "run by planted_bugs_are_seen"]
fn sound() {
    (0..3).for_each(|seed| world().check(Variant::Sound, seed).expect("sound"));
}

#[test]
#[ignore = "run by planted_bugs_are_seen, and must fail"]
fn missing_sync() {
    (0..3).for_each(|seed| world().check(Variant::MissingSync, seed).expect("a missing barrier"));
}

#[test]
#[ignore = "run by planted_bugs_are_seen, and must fail"]
fn stride() {
    (0..3).for_each(|seed| world().check(Variant::Stride, seed).expect("a wrong stride"));
}

#[test]
#[ignore = "run by planted_bugs_are_seen, and must fail"]
fn block_table() {
    (0..3).for_each(|seed| world().check(Variant::BlockTable, seed).expect("a block table off by one"));
}

#[test]
#[ignore = "run by sanitizers_find_nothing"]
fn sanitized() {
    world().check(Variant::Sanitized, 3).expect("sound");
}

#[test]
fn sanitizers_find_nothing() {
    assert!(passes("sanitized"));
}

#[test]
fn planted_bugs_are_seen() {
    assert!(passes("sound"));
    for bug in ["missing_sync", "stride", "block_table"] {
        assert!(!passes(bug), "{bug} was not seen");
    }
}
