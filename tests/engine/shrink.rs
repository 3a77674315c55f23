//! A failing run made small: as few steps and as few kinds of events as still fail, and the command that replays them.

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};

pub const STEPS: u64 = 200;

/// What a run may do without.
pub const FEATURES: [&str; 8] =
    ["aside", "tier", "draft-model", "drafts", "choices", "cancels", "faults", "window"];

/// One run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    pub seed: u64,
    pub steps: u64,
    /// Of [`FEATURES`].
    pub without: Vec<String>,
}

impl Case {
    pub fn of(seed: u64) -> Case {
        Case { seed, steps: STEPS, without: Vec::new() }
    }

    pub fn has(&self, feature: &str) -> bool {
        debug_assert!(FEATURES.contains(&feature));
        !self.without.iter().any(|other| other == feature)
    }

    pub fn command(&self) -> String {
        let Case { seed, steps, without } = self;
        let without = if without.is_empty() { String::new() } else { format!(" --without {}", without.join(",")) };
        format!("cargo test -p rill-tests --test simulation -- --seed {seed} --steps {steps}{without}")
    }
}

/// The smallest case found for which `run` panics, given one for which it does.
pub fn shrink(case: Case, run: impl Fn(&Case)) -> Case {
    let hook = take_hook();
    set_hook(Box::new(|_| {}));
    let fails = |case: &Case| catch_unwind(AssertUnwindSafe(|| run(case))).is_err();
    let mut smallest = case;
    loop {
        let before = smallest.clone();
        for feature in FEATURES {
            if smallest.has(feature) {
                let mut without = smallest.clone();
                without.without.push(feature.to_owned());
                if fails(&without) {
                    smallest = without;
                }
            }
        }
        // A run's steps are the first ones of a longer run.
        let (mut passes, mut steps) = (0, smallest.steps);
        while steps - passes > 1 {
            let middle = Case { steps: passes + (steps - passes) / 2, ..smallest.clone() };
            if fails(&middle) {
                steps = middle.steps;
            } else {
                passes = middle.steps;
            }
        }
        smallest.steps = steps;
        if smallest == before {
            break;
        }
    }
    set_hook(hook);
    smallest
}

/// A made-up defect comes down to what it takes.
pub fn check() {
    let run = |case: &Case| assert!(case.steps < 37 || !case.has("tier") || !case.has("choices"), "a defect");
    let smallest = shrink(Case::of(5), run);
    assert_eq!(smallest.steps, 37);
    assert!(FEATURES.iter().all(|&feature| smallest.has(feature) == ["tier", "choices"].contains(&feature)));
    println!("shrinking: {}", smallest.command());
}
