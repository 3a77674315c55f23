//! The command line: one file a subcommand.

pub mod bench;
pub mod keys;
pub mod models;
pub mod perplexity;
pub mod serve;

use clap::{Args, FromArgMatches, Parser, Subcommand};

/// An LLM text-generation server with an OpenAI-compatible API.
#[derive(Debug, Parser)]
#[command(name = "rill", version, about)]
#[command(after_help = "`rill` alone is `rill serve` with the default model.")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Load a model and answer requests.
    Serve(Box<serve::ServeFlags>),
    /// Make API keys.
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// Measure a server over HTTP beside others, and what this machine allows.
    Bench(Box<bench::BenchFlags>),
    /// Fetch, list or remove models.
    Models(Box<models::ModelsFlags>),
    /// How well a model foresees a text.
    Perplexity(Box<perplexity::PerplexityFlags>),
}

impl Command {
    /// Of this process's arguments; ends the process on `--help` and on mistakes.
    pub fn parse() -> Command {
        Cli::parse().command.unwrap_or_else(Self::default_serve)
    }

    /// `rill serve` without arguments: the environment still counts.
    fn default_serve() -> Command {
        let command = serve::ServeFlags::augment_args(clap::Command::new("rill"));
        let matches = command.get_matches_from(["rill"]);
        match serve::ServeFlags::from_arg_matches(&matches) {
            Ok(flags) => Command::Serve(Box::new(flags)),
            Err(error) => error.exit(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_subcommand_serves_the_default_model() {
        assert!(Cli::try_parse_from(["rill"]).unwrap().command.is_none());
        let Command::Serve(flags) = Command::default_serve() else { panic!("another command") };
        assert_eq!((flags.model.as_str(), flags.port), (rill_models::DEFAULT_MODEL, 8000));
    }
}
