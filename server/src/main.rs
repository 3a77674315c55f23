//! The `rill` binary: arguments in, exit code out.

use std::process::ExitCode;

use rill_server::cli::Command;
use rill_server::start;

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Serve(flags) => start::serve(*flags),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rill: {error}");
            ExitCode::FAILURE
        }
    }
}
