//! `rill bench`: its flags as typed; `bench::plan` makes sense of them.

use std::path::PathBuf;

use clap::Args;

use crate::flag_values::IsaChoice;

/// Closed-loop load: so many streams, each asking again as soon as it is answered. Servers take turns in every round,
/// so that whatever else the machine does hits all alike.
#[derive(Debug, Clone, Args)]
pub struct BenchFlags {
    /// Server to measure, such as http://127.0.0.1:8000/v1 [default: `rill serve`, started for the occasion].
    #[arg(long)]
    pub url: Option<String>,
    /// Server to compare with, as name=http://host:port/v1; several may be given.
    #[arg(long)]
    pub peer: Vec<String>,
    /// Requests under way at once, one measurement each.
    #[arg(long, value_delimiter = ',', default_value = "1,8,16,32")]
    pub streams: Vec<usize>,
    /// Random words in a prompt.
    #[arg(long, default_value_t = 60)]
    pub prompt_words: usize,
    /// Tokens to generate.
    #[arg(long, default_value_t = 64)]
    pub max_tokens: usize,
    /// Words in the prompts of a further measurement: 4 streams that generate 2 tokens; 0 leaves it out.
    #[arg(long, default_value_t = 600)]
    pub prefill: usize,
    /// Measure each number of streams again with answers that must match a JSON schema, and what its token masks take.
    #[arg(long)]
    pub structured: bool,
    /// Times everything is measured; figures are medians.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// What to serve (see `rill serve`); with --url, whose weights to hold the speed against.
    #[arg(long)]
    pub model: Option<String>,
    /// Name to ask all servers for [default: the first that each lists].
    #[arg(long)]
    pub request_model: Option<String>,
    /// Key to send as `Authorization: Bearer KEY`.
    #[arg(long, env = "RILL_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Compute threads of the server that is started [default: all cores].
    #[arg(long)]
    pub threads: Option<usize>,
    /// Instructions of the server that is started.
    #[arg(long, value_enum, default_value = "auto")]
    pub isa: IsaChoice,
    /// Measure everything again beside a neighbour: `spin` keeps one core busy; anything else is a shell command, run
    /// again and again.
    #[arg(long)]
    pub neighbour: Option<String>,
    /// Write all figures to this file.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Draw speeds under the machine's limits (a roofline, SVG) to this file.
    #[arg(long)]
    pub plot: Option<PathBuf>,
    /// More flags for the server that is started.
    #[arg(last = true)]
    pub serve: Vec<String>,
}
