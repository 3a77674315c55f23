//! docs/cuda-performance.md against the kernels there are and the bench: every kernel has a row, every row a kernel, and the
//! bench times every row.

use rill_kernels::cuda::kernels;
use std::collections::BTreeSet;
use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The first column of the table of bounds.
fn rows() -> Vec<String> {
    let text = read("../../docs/cuda-performance.md");
    let table = text.lines().skip_while(|line| !line.starts_with("| kernel |"));
    let rows = table.skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|line| line.split('|').nth(1).expect("a first column").trim().to_owned()).collect()
}

/// Names between backticks; `*` stands for anything.
fn patterns(row: &str) -> impl Iterator<Item = &str> {
    row.split('`').skip(1).step_by(2)
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, end)) => {
            name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
        }
    }
}

#[test]
fn every_kernel_has_a_row_and_every_row_a_kernel() {
    let rows = rows();
    assert!(rows.len() > 20, "{rows:?}");
    let patterns: Vec<&str> = rows.iter().flat_map(|row| patterns(row)).collect();
    let names: Vec<&str> = kernels().map(|(name, _)| name).collect();
    let undocumented: Vec<&&str> =
        names.iter().filter(|name| !patterns.iter().any(|pattern| matches(pattern, name))).collect();
    assert!(undocumented.is_empty(), "no row: {undocumented:?}");
    let unknown: Vec<&&str> =
        patterns.iter().filter(|pattern| !names.iter().any(|name| matches(pattern, name))).collect();
    assert!(unknown.is_empty(), "no such kernel: {unknown:?}");
}

#[test]
fn the_bench_times_every_row_and_no_other() {
    let bench = read("../benches/cuda.rs");
    let literals: BTreeSet<&str> = bench.lines().flat_map(|line| line.split('"').skip(1).step_by(2)).collect();
    let rows: BTreeSet<String> = rows().iter().map(|row| row.replace('`', "")).collect();
    let untimed: Vec<&String> = rows.iter().filter(|row| !literals.contains(row.as_str())).collect();
    assert!(untimed.is_empty(), "the bench has none of {untimed:?}");
    // What the bench calls a row looks like one: names of kernels.
    let names: Vec<&str> = kernels().map(|(name, _)| name).collect();
    let first =
        |literal: &str| literal.split(',').next().is_some_and(|p| names.iter().any(|name| matches(p, name)));
    let unknown: Vec<&&str> =
        literals.iter().filter(|literal| first(literal) && !rows.contains(**literal)).collect();
    assert!(unknown.is_empty(), "no rows of the table: {unknown:?}");
}
