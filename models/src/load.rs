//! Local files → a model ready to run.

use crate::source::{ModelFiles, ModelKind};
use crate::weights::{Safetensors, Weights};
use crate::{GgufFile, Model, ModelConfig, ModelError, Tokenizer, registry};
use rill_kernels::{CpuBackend, Isa};
use std::sync::Arc;

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The fastest there is.
    #[default]
    Auto,
    Cpu,
}

/// How to run a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Compute threads, the engine's own included.
    pub threads: usize,
    pub device: Device,
    /// Instructions the CPU kernels use; `None` takes the fastest the processor has.
    pub isa: Option<Isa>,
}

/// A model, its tokenizer, and what its files say about both.
pub struct LoadedModel {
    pub model: Box<dyn Model>,
    pub tokenizer: Arc<Tokenizer>,
    pub config: ModelConfig,
    /// To serve under.
    pub name: String,
    /// Architecture, size and device in words.
    pub description: String,
}

/// Loads the model `files` hold.
pub fn load(files: &ModelFiles, options: &LoadOptions) -> Result<LoadedModel, ModelError> {
    let (config, tokenizer, weights) = match &files.kind {
        ModelKind::Gguf { path } => {
            let file = GgufFile::open(path)?;
            let config = ModelConfig::from_gguf(&file)?;
            let tokenizer = Tokenizer::from_gguf(&file)
                .map_err(|error| ModelError::Format { path: path.display().to_string(), reason: error.0 })?;
            (config, tokenizer, Weights::from_gguf(file))
        }
        ModelKind::Safetensors { dir, shards } => {
            let config = ModelConfig::from_dir(dir)?;
            let path = dir.join("tokenizer.json");
            let tokenizer = Tokenizer::from_json_file(&path)
                .map_err(|error| ModelError::Format { path: path.display().to_string(), reason: error.0 })?;
            let files = Safetensors::open(dir, shards, &config.architecture)?;
            (config, tokenizer, Weights::from_safetensors(files))
        }
    };
    let (Device::Auto | Device::Cpu) = options.device;
    let isa = options.isa.unwrap_or_else(Isa::detect);
    if !isa.available() {
        return Err(ModelError::Unsupported(format!(
            "this processor has no {}; the best it has is {}",
            isa.name(),
            Isa::detect().name()
        )));
    }
    let backend = CpuBackend::new(options.threads, isa);
    let device = format!("CPU, {} threads, {}", backend.threads(), backend.isa().name());
    let model = registry::build(backend, &config, &weights)?;
    let description =
        format!("{}, {} layers of {}, on {device}", config.architecture, config.layers, config.hidden_size);
    Ok(LoadedModel { model, tokenizer: Arc::new(tokenizer), config, name: files.name.clone(), description })
}
