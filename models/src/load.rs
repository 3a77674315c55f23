//! Local files → a model ready to run.

use crate::source::{ModelFiles, ModelKind};
use crate::weights::{Quantize, Safetensors, Weights};
use crate::{GgufFile, Model, ModelConfig, ModelError, Tokenizer, candle, registry};
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

/// What computes a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Runner {
    /// Rill, or candle-transformers where only that has the architecture.
    #[default]
    Auto,
    Native,
    /// candle-transformers: one sequence at a time on the CPU.
    Candle,
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
    /// Take all of the KV cache's memory at load; on a GPU it always is.
    pub preallocate: bool,
    /// Replay a GPU's launches as graphs where the same ones come again.
    pub cuda_graphs: bool,
    /// What activations that meet bf16 weights are rounded to; `None` is what the device does best: nothing on the CPU,
    /// bf16 on a GPU.
    pub row_dtype: Option<RowDtype>,
    pub runner: Runner,
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
            preallocate: false,
            cuda_graphs: false,
            row_dtype: None,
            runner: Runner::Auto,
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
    let opened = Opened::read(files)?;
    let architecture = opened.config.architecture.as_str();
    let on_candle = match options.runner {
        Runner::Auto => !registry::knows(architecture) && candle::knows(architecture),
        Runner::Native => false,
        Runner::Candle => true,
    };
    if on_candle {
        return opened.load_on_candle(options);
    }
    if let Some(backend) = on_gpu {
        if options.row_dtype == Some(RowDtype::F32) {
            return Err(ModelError::Unsupported(
                "on a GPU, activations meet bf16 weights as bf16, not as float32".into(),
            ));
        }
        let device = backend.name();
        return opened.load_on(backend, &device, options.quantize);
    }
    if !options.kv_dtype.on_cpu() {
        return Err(ModelError::Unsupported(
            "KV caches of f16 and fp8 exist on a GPU only; on the CPU there are bf16 and int8".into(),
        ));
    }
    if options.cuda_graphs {
        return Err(ModelError::Unsupported("CUDA graphs are for a GPU; this runs on the CPU".into()));
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
    let backend = if options.preallocate { backend.with_preallocated_caches() } else { backend };
    let device = format!("CPU, {} threads, {}", backend.threads(), backend.isa().name());
    opened.load_on(backend, &device, options.quantize)
}

fn open_gpu(ordinal: usize, options: &LoadOptions) -> Result<CudaBackend, ModelError> {
    let driver = Driver::open(DriverOptions { ordinal, memory_utilization: options.gpu_memory_utilization })
        .map_err(|error| ModelError::Device(error.to_string()))?;
    let backend = CudaBackend::new(Arc::new(driver), options.threads).with_kv_dtype(options.kv_dtype);
    Ok(if options.cuda_graphs { backend.with_graphs() } else { backend })
}

/// Loads the model `files` hold onto `backend`, which `device` describes.
pub fn load_on<B: Backend + 'static>(
    files: &ModelFiles,
    backend: B,
    device: &str,
) -> Result<LoadedModel, ModelError> {
    Opened::read(files)?.load_on(backend, device, None)
}

/// What a model's files say, weights not read yet.
struct Opened<'a> {
    files: &'a ModelFiles,
    config: ModelConfig,
    tokenizer: Tokenizer,
    gguf: Option<GgufFile>,
}

impl<'a> Opened<'a> {
    fn read(files: &'a ModelFiles) -> Result<Opened<'a>, ModelError> {
        Ok(match &files.kind {
            ModelKind::Gguf { path } => {
                let file = GgufFile::open(path)?;
                let config = ModelConfig::from_gguf(&file)?;
                let tokenizer = Tokenizer::from_gguf(&file)
                    .map_err(|error| ModelError::Format { path: path.display().to_string(), reason: error.0 })?;
                Opened { files, config, tokenizer, gguf: Some(file) }
            }
            ModelKind::Safetensors { dir, .. } => {
                let config = ModelConfig::from_dir(dir)?;
                let path = dir.join("tokenizer.json");
                let tokenizer = Tokenizer::from_json_file(&path)
                    .map_err(|error| ModelError::Format { path: path.display().to_string(), reason: error.0 })?;
                Opened { files, config, tokenizer, gguf: None }
            }
        })
    }

    fn load_on<B: Backend + 'static>(
        mut self,
        backend: B,
        device: &str,
        quantize: Option<Quantize>,
    ) -> Result<LoadedModel, ModelError> {
        let weights = match (&self.files.kind, self.gguf.take()) {
            (_, Some(file)) => Weights::from_gguf(file),
            (ModelKind::Safetensors { dir, shards }, None) => {
                Weights::from_safetensors(Safetensors::open(dir, shards, &self.config.architecture)?)
            }
            (ModelKind::Gguf { path }, None) => Weights::from_gguf(GgufFile::open(path)?),
        };
        let weights = weights.with_quantize(quantize);
        let model = registry::build(backend, &self.config, &weights)?;
        weights.warn_of_unused();
        let conversions = weights.conversions()?.map_or_else(String::new, |words| format!(" {words},"));
        Ok(self.loaded(model, &conversions, device))
    }

    fn load_on_candle(self, options: &LoadOptions) -> Result<LoadedModel, ModelError> {
        let refused = [
            (matches!(options.device, Device::Cuda(_)), "a GPU"),
            (options.isa.is_some(), "instructions of one's choice"),
            (options.kv_dtype != KvDtype::Bf16, "KV caches of bytes"),
            (options.preallocate, "a KV cache in memory taken beforehand"),
            (options.row_dtype == Some(RowDtype::Bf16), "activations rounded to bfloat16"),
            (options.quantize.is_some(), "weights quantised at load"),
        ];
        if let Some((_, what)) = refused.iter().find(|(asked, _)| *asked) {
            return Err(ModelError::Unsupported(format!(
                "{} runs through candle, one sequence at a time in f32 on the CPU: it cannot have {what}",
                self.config.architecture
            )));
        }
        let model = candle::load(&self.files.kind, &self.config, options.threads)?;
        let device = format!("CPU through candle, {} threads, one sequence at a time", options.threads);
        tracing::warn!("{} runs through candle: one sequence at a time, slowly", self.config.architecture);
        Ok(self.loaded(model, "", &device))
    }

    fn loaded(self, model: Box<dyn Model>, conversions: &str, device: &str) -> LoadedModel {
        let Opened { files, config, tokenizer, .. } = self;
        let (architecture, layers, hidden) = (&config.architecture, config.layers, config.hidden_size);
        let description = format!("{architecture}, {layers} layers of {hidden},{conversions} on {device}");
        LoadedModel { model, tokenizer: Arc::new(tokenizer), config, name: files.name.clone(), description }
    }
}
