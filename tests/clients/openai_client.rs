//! The real `openai` Python client against the real server with the real model: runs openai_client.py.

use rill_tests::python::Packages;
use rill_tests::server_process::ServerProcess;
use std::path::Path;

#[test]
fn the_openai_client_works() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let Some(packages) = Packages::install("the openai client", &here.join("requirements.txt"), scratch) else {
        return;
    };
    let server = ServerProcess::start(Path::new(env!("CARGO_BIN_EXE_rill-under-test")), &[]);
    let output = packages.run(&here.join("openai_client.py"), &[&server.url()]);
    assert!(output.status.success(), "{}\n{}", output.status, server.log());
    server.assert_idle_soon();
}
