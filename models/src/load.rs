//! Local files → a model ready to run.

use crate::source::{ModelFiles, ModelKind};
use crate::weights::{Quantize, Safetensors, Weights};
use crate::{GgufFile, Model, ModelConfig, ModelError, Tokenizer, registry};
use rill_kernels::cuda::{CudaBackend, Driver, DriverOptions};
use rill_kernels::{Backend, CpuBackend, Isa, KvDtype, RowDtype};
use std::sync::Arc;

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// A GPU where there is one that works, or else the CPU.
    #[default]
    Auto,
    Cpu,
    /// The CUDA device of this number, or an error.
    Cuda(usize),
}

/// How to run a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Compute threads, the engine's own included.
    pub threads: usize,
    pub device: Device,
    /// Instructions the CPU kernels use; `None` takes the fastest the processor has.
    pub isa: Option<Isa>,
    /// Share of a GPU's free memory that weights, cache and activations may take, 0 to 1.
    pub gpu_memory_utilization: f64,
    pub kv_dtype: KvDtype,
    /// What activations that meet bf16 weights are rounded to; `None` is what the device does best: nothing on the CPU,
    /// bf16 on a GPU.
    pub row_dtype: Option<RowDtype>,
    /// What matrices that the files keep as floats are quantised to.
    pub quantize: Option<Quantize>,
}

impl LoadOptions {
    /// On the CPU, all else as it is by default.
    pub const fn on_cpu(threads: usize) -> LoadOptions {
        LoadOptions {
            threads,
            device: Device::Cpu,
            isa: None,
            gpu_memory_utilization: 0.9,
            kv_dtype: KvDtype::Bf16,
            row_dtype: None,
            quantize: None,
        }
    }
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

/// Loads the model `files` hold onto the device `options` name.
pub fn load(files: &ModelFiles, options: &LoadOptions) -> Result<LoadedModel, ModelError> {
    OpenDevice::new(options)?.load(files, options)
}

/// A device, before there is a model on it.
pub struct OpenDevice(Option<Box<CudaBackend>>);

impl OpenDevice {
    /// The device `options` name.
    pub fn new(options: &LoadOptions) -> Result<OpenDevice, ModelError> {
        Ok(OpenDevice(match options.device {
            Device::Cpu => None,
            Device::Auto => open_gpu(0, options)
                .inspect_err(|error| tracing::info!("running on the CPU: {error}"))
                .map(Box::new)
                .ok(),
            Device::Cuda(ordinal) => Some(Box::new(open_gpu(ordinal, options)?)),
        }))
    }

    /// Whether models on it take the memory of the machine itself.
    pub fn is_cpu(&self) -> bool {
        self.0.is_none()
    }

    /// Loads the model `files` hold.
    pub fn load(self, files: &ModelFiles, options: &LoadOptions) -> Result<LoadedModel, ModelError> {
        load_onto(self.0.map(|backend| *backend), files, options)
    }
}

fn load_onto(
    on_gpu: Option<CudaBackend>,
    files: &ModelFiles,
    options: &LoadOptions,
) -> Result<LoadedModel, ModelError> {
    if let Some(backend) = on_gpu {
        if options.kv_dtype != KvDtype::Bf16 {
            return Err(ModelError::Unsupported("KV caches of bytes exist on the CPU only, not on a GPU".into()));
        }
        if options.row_dtype == Some(RowDtype::F32) {
            return Err(ModelError::Unsupported(
                "on a GPU, activations meet bf16 weights as bf16, not as float32".into(),
            ));
        }
        let device = backend.name();
        return load_quantized(files, backend, &device, options.quantize);
    }
    let isa = options.isa.unwrap_or_else(Isa::detect);
    if !isa.available() {
        return Err(ModelError::Unsupported(format!(
            "this processor has no {}; the best it has is {}",
            isa.name(),
            Isa::detect().name()
        )));
    }
    let backend = CpuBackend::new(options.threads, isa)
        .with_kv_dtype(options.kv_dtype)
        .with_row_dtype(options.row_dtype.unwrap_or_default());
    let device = format!("CPU, {} threads, {}", backend.threads(), backend.isa().name());
    load_quantized(files, backend, &device, options.quantize)
}

fn open_gpu(ordinal: usize, options: &LoadOptions) -> Result<CudaBackend, ModelError> {
    let driver = Driver::open(DriverOptions { ordinal, memory_utilization: options.gpu_memory_utilization })
        .map_err(|error| ModelError::Device(error.to_string()))?;
    Ok(CudaBackend::new(Arc::new(driver), options.threads))
}

/// Loads the model `files` hold onto `backend`, which `device` describes.
pub fn load_on<B: Backend + 'static>(
    files: &ModelFiles,
    backend: B,
    device: &str,
) -> Result<LoadedModel, ModelError> {
    load_quantized(files, backend, device, None)
}

fn load_quantized<B: Backend + 'static>(
    files: &ModelFiles,
    backend: B,
    device: &str,
    quantize: Option<Quantize>,
) -> Result<LoadedModel, ModelError> {
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
    let weights = weights.with_quantize(quantize);
    let model = registry::build(backend, &config, &weights)?;
    weights.warn_of_unused();
    let conversions = weights.conversions()?.map_or_else(String::new, |words| format!(" {words},"));
    let (architecture, layers, hidden) = (&config.architecture, config.layers, config.hidden_size);
    let description = format!("{architecture}, {layers} layers of {hidden},{conversions} on {device}");
    Ok(LoadedModel { model, tokenizer: Arc::new(tokenizer), config, name: files.name.clone(), description })
}
