//! What the tests read from the environment: whether skipping is allowed.

/// Whether this is a continuous-integration run, where nothing may be skipped.
pub fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| value == "true")
}

/// Says loudly that a test did not run and why; in CI, fails instead.
pub fn skip(test: &str, reason: &str) {
    assert!(!in_ci(), "{test} may not be skipped in CI: {reason}");
    eprintln!("\n*** SKIPPED {test}: {reason}\n*** (set CI=true to make this a failure)\n");
}
