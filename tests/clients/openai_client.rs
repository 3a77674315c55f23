//! The real `openai` and `anthropic` Python clients against the real server with the real model: runs the scripts
//! beside this file.

use rill_tests::python::Packages;
use rill_tests::server_process::ServerProcess;
use std::path::Path;

#[test]
fn the_sdks_work() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let Some(packages) =
        Packages::install("the openai and anthropic clients", &here.join("requirements.txt"), scratch)
    else {
        return;
    };
    let server = ServerProcess::start(Path::new(env!("CARGO_BIN_EXE_rill-under-test")), &[]);
    for script in ["openai_client.py", "anthropic_client.py"] {
        let output = packages.run(&here.join(script), &[&server.url()]);
        assert!(output.status.success(), "{script}: {}\n{}", output.status, server.log());
    }
    server.assert_idle_soon();
}
