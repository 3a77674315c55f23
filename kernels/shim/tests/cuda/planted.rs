//! Bugs planted in attention and in the pipeline of linear layers: the same checks that pass on the sound kernels must
//! fail. And the sound ones under sanitizers.

use crate::attention::{DTYPES, World, merging, small};
use crate::inputs::VARIANT;
use crate::{linear, low_rank, rows, sampling};
use rill_cuda_shim::{SANITIZER_RUNTIME, Variant};
use rill_kernels::{Dtype, KvDtype};

fn world() -> World {
    small(KvDtype::Bf16)
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
fn missing_sync_in_linear() {
    VARIANT.set(Variant::MissingSync).expect("a process for this alone");
    linear::check(&linear::Case { parts: vec![(Dtype::Q4_0, 50)], cols: 320, tokens: 37, seed: 1 })
        .expect("a bug");
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
    VARIANT.set(Variant::Sanitized).expect("a process for this alone");
    for (seed, dtype) in DTYPES.into_iter().enumerate() {
        small(dtype).check(Variant::Sanitized, seed as u64).expect("sound");
    }
    // Both tiles of every kind of weights, shapes that end inside a tile.
    for (seed, dtype) in [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::Q4_0, Dtype::Q8_0].into_iter().enumerate() {
        for (rows, cols, tokens) in [(31, 96, 1), (50, 64, 37)] {
            let case = linear::Case { parts: vec![(dtype, rows)], cols, tokens, seed: seed as u64 };
            linear::check(&case).unwrap_or_else(|e| panic!("{case:?}: {e}"));
        }
    }
    // Partitions that merge, in the widest head there is, token by token and at once.
    merging().check(Variant::Sanitized, 1).expect("sound");
    linear::check_embeddings();
    rows::check_rows(3, 333, &[2, 0], 1).expect("sound");
    rows::check_sums(3, 333, 2).expect("sound");
    (0..2).for_each(|seed| low_rank::check_small(seed).expect("sound"));
    (0..6).for_each(|seed| sampling::check(5000, 20, 2, false, seed).expect("sound"));
}

#[test]
fn sanitizers_find_nothing() {
    assert!(passes("sanitized"));
}

#[test]
fn planted_bugs_are_seen() {
    assert!(passes("sound"));
    for bug in ["missing_sync", "missing_sync_in_linear", "stride", "block_table"] {
        assert!(!passes(bug), "{bug} was not seen");
    }
}
