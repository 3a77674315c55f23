//! Agent frameworks against the real server with the real model: runs frameworks.py. Not part of the usual run: what it
//! installs is large.

use rill_tests::python::Packages;
use rill_tests::server_process::ServerProcess;
use std::path::Path;

#[test]
#[ignore = "installs langchain"]
fn langchain_works() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let Some(packages) = Packages::install("langchain", &here.join("frameworks.txt"), scratch) else {
        return;
    };
    let server = ServerProcess::start(Path::new(env!("CARGO_BIN_EXE_rill-under-test")), &[]);
    let output = packages.run(&here.join("frameworks.py"), &[&server.url()]);
    assert!(output.status.success(), "{}\n{}", output.status, server.log());
    server.assert_idle_soon();
}
