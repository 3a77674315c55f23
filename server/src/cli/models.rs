//! `rill models`: its flags as typed.

use clap::{Args, Subcommand};

/// Flags that say where models come from, of every command that takes one.
#[derive(Debug, Clone, Default, Args)]
pub struct SourceFlags {
    /// Branch, tag or commit of the hub repository [default: main, or the one in the model's name].
    #[arg(long, env = "RILL_REVISION")]
    pub revision: Option<String>,
    /// Never ask the hub: use what the caches hold, or fail. HF_HUB_OFFLINE=1 says the same.
    #[arg(long, env = "RILL_OFFLINE")]
    pub offline: bool,
}

impl SourceFlags {
    /// With what the environment says (see `SourceOptions::from_env`).
    pub fn options(&self) -> rill_models::SourceOptions {
        let base = rill_models::SourceOptions::from_env();
        rill_models::SourceOptions {
            hub_offline: base.hub_offline || self.offline,
            revision: self.revision.clone(),
            ..base
        }
    }
}

/// Models on this disk.
#[derive(Debug, Clone, Args)]
pub struct ModelsFlags {
    #[command(subcommand)]
    pub command: ModelsCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub enum ModelsCommand {
    /// Fetch a model, or what is missing of it, and check it.
    Pull {
        /// `org/repo[@revision][:file-or-quant]` on the hub, or the default model's name.
        model: String,
        #[command(flatten)]
        source: SourceFlags,
    },
    /// What the caches hold.
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Remove models from the cache.
    Rm {
        /// org/repo, or the default model's name; several may be given.
        #[arg(required = true)]
        models: Vec<String>,
    },
}
