//! The `rill` binary: arguments in, exit code out.

use std::process::ExitCode;

use rill_server::cli::Command;
use rill_server::{bench, keys, models_command, perplexity, start};

fn main() -> ExitCode {
    let result: Result<(), Box<dyn std::error::Error>> = match Command::parse() {
        Command::Serve(flags) => start::serve(*flags).map_err(Into::into),
        Command::Keys(command) => keys::run(command).map_err(Into::into),
        Command::Bench(flags) => bench::bench(*flags).map_err(Into::into),
        Command::Models(flags) => models_command::run(&flags).map_err(Into::into),
        Command::Perplexity(flags) => perplexity::run(&flags).map_err(Into::into),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rill: {error}");
            ExitCode::FAILURE
        }
    }
}
