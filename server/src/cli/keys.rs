//! `rill keys`: its flags as typed.

use clap::{Args, Subcommand};

#[derive(Debug, Clone, Subcommand)]
pub enum KeysCommand {
    /// Make a key: the line for --api-key-file goes to standard output, the key itself, once, to standard error.
    New(NewKeyFlags),
}

#[derive(Debug, Clone, Args)]
#[command(after_help = "rill keys new anna --requests-per-minute 60 >> keys.jsonl")]
pub struct NewKeyFlags {
    /// Who is to use it, as seen in logs and metrics.
    pub name: String,
    /// Take the key from standard input instead of making one.
    #[arg(long)]
    pub stdin: bool,
    /// Requests it may send a minute [default: no limit].
    #[arg(long)]
    pub requests_per_minute: Option<u64>,
    /// Tokens it may use a minute, prompts and completions together [default: no limit].
    #[arg(long)]
    pub tokens_per_minute: Option<u64>,
    /// Requests it may have under way at once [default: no limit].
    #[arg(long)]
    pub concurrency: Option<u64>,
    /// Priority of its requests, smaller first; they may ask for a later one [default: as they ask].
    #[arg(long, allow_negative_numbers = true)]
    pub priority: Option<i32>,
}
