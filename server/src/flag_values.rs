//! Words that flags take, and what they stand for further down.

use rill_models::Pooling;

use crate::config::ConfigError;
use crate::reasoning::ReasoningFormat;

/// What embeddings are made of, where it is not left to the model's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PoolingFlag {
    /// The last token's hidden state.
    Last,
    /// The mean of all tokens' hidden states.
    Mean,
    /// The first token's hidden state.
    Cls,
}

impl From<PoolingFlag> for Pooling {
    fn from(flag: PoolingFlag) -> Pooling {
        match flag {
            PoolingFlag::Last => Pooling::Last,
            PoolingFlag::Mean => Pooling::Mean,
            PoolingFlag::Cls => Pooling::Cls,
        }
    }
}

/// How thoughts are told from answers, where it is not left to the chat template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ReasoningParser {
    None,
    #[value(alias = "deepseek_r1", alias = "qwen3")]
    Think,
    Mistral,
    Thought,
    #[value(alias = "seed_oss")]
    Seed,
    #[value(alias = "cohere_command3")]
    Cohere,
}

impl ReasoningParser {
    /// `None`: there are no thoughts.
    pub fn format(self) -> Option<ReasoningFormat> {
        match self {
            ReasoningParser::None => None,
            ReasoningParser::Think => Some(ReasoningFormat::Think),
            ReasoningParser::Mistral => Some(ReasoningFormat::Mistral),
            ReasoningParser::Thought => Some(ReasoningFormat::Thought),
            ReasoningParser::Seed => Some(ReasoningFormat::Seed),
            ReasoningParser::Cohere => Some(ReasoningFormat::Cohere),
        }
    }
}

/// `--device`: auto, cpu, cuda or cuda:N.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device(pub rill_models::Device);

impl std::str::FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Device, String> {
        let device = match text.split_once(':') {
            None if text == "auto" => rill_models::Device::Auto,
            None if text == "cpu" => rill_models::Device::Cpu,
            None if text == "cuda" => rill_models::Device::Cuda(0),
            Some(("cuda", number)) => match number.parse() {
                Ok(number) => rill_models::Device::Cuda(number),
                Err(_) => return Err(format!("{number:?} is no number of a CUDA device, such as cuda:0")),
            },
            _ => return Err("one of auto, cpu, cuda and cuda:N is wanted".to_owned()),
        };
        Ok(Device(device))
    }
}

/// What computes the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum RunnerChoice {
    /// Rill, or candle for architectures that only candle has.
    Auto,
    /// Rill.
    Native,
    /// candle-transformers: one sequence at a time on the CPU.
    Candle,
}

impl From<RunnerChoice> for rill_models::Runner {
    fn from(choice: RunnerChoice) -> rill_models::Runner {
        match choice {
            RunnerChoice::Auto => rill_models::Runner::Auto,
            RunnerChoice::Native => rill_models::Runner::Native,
            RunnerChoice::Candle => rill_models::Runner::Candle,
        }
    }
}

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum KvCacheDtype {
    /// bf16.
    Auto,
    #[value(alias = "bfloat16")]
    Bf16,
    /// Bytes, with a scale for every 32 dimensions of a token's head.
    Int8,
    /// On a GPU.
    #[value(alias = "float16", alias = "half")]
    F16,
    /// 8-bit floats (e4m3), on a GPU.
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

impl From<KvCacheDtype> for rill_models::KvDtype {
    fn from(dtype: KvCacheDtype) -> rill_models::KvDtype {
        match dtype {
            KvCacheDtype::Auto | KvCacheDtype::Bf16 => rill_models::KvDtype::Bf16,
            KvCacheDtype::Int8 => rill_models::KvDtype::Int8,
            KvCacheDtype::F16 => rill_models::KvDtype::F16,
            KvCacheDtype::Fp8 => rill_models::KvDtype::Fp8,
        }
    }
}

/// What float weights are quantised to as they are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum WeightBits {
    /// 4 bits a weight and a scale and a minimum for every 32; 8 bits for embeddings and head.
    Q4,
    /// 8 bits a weight and a scale for every 32.
    Q8,
}

impl From<WeightBits> for rill_models::Quantize {
    fn from(bits: WeightBits) -> rill_models::Quantize {
        match bits {
            WeightBits::Q4 => rill_models::Quantize::Q4,
            WeightBits::Q8 => rill_models::Quantize::Q8,
        }
    }
}

/// What activations that meet bf16 weights are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ComputeDtype {
    /// Nothing on the CPU, bf16 on a GPU.
    Auto,
    /// Nothing.
    #[value(alias = "f32", alias = "float")]
    Float32,
    /// bf16: up to twice the speed on AMD processors with AVX512-BF16, none on others; logits within about 1 %.
    #[value(alias = "bf16")]
    Bfloat16,
}

impl ComputeDtype {
    /// `None` for auto.
    pub fn row_dtype(self) -> Option<rill_models::RowDtype> {
        match self {
            ComputeDtype::Auto => None,
            ComputeDtype::Float32 => Some(rill_models::RowDtype::F32),
            ComputeDtype::Bfloat16 => Some(rill_models::RowDtype::Bf16),
        }
    }
}

/// Instructions the CPU kernels use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum IsaChoice {
    /// The fastest the processor has.
    Auto,
    /// AVX-512 with VNNI and BF16; passed over on Intel's processors, whose BF16 products are slow.
    Avx512Bf16,
    /// AVX-512 with VNNI.
    Avx512,
    /// AVX2 with FMA, F16C and AVX-VNNI.
    AvxVnni,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// NEON with byte dot products.
    NeonDot,
    /// NEON alone.
    Neon,
    /// Whatever the compiler makes of plain Rust.
    Portable,
}

impl IsaChoice {
    /// `None` for auto; an error if the processor lacks what was asked for.
    pub fn instructions(self) -> Result<Option<rill_models::Isa>, ConfigError> {
        use rill_models::Isa;
        let isa = match self {
            IsaChoice::Auto => return Ok(None),
            IsaChoice::Avx512Bf16 => Isa::Avx512Bf16,
            IsaChoice::Avx512 => Isa::Avx512,
            IsaChoice::AvxVnni => Isa::AvxVnni,
            IsaChoice::Avx2 => Isa::Avx2,
            IsaChoice::NeonDot => Isa::NeonDot,
            IsaChoice::Neon => Isa::Neon,
            IsaChoice::Portable => Isa::Portable,
        };
        if isa.available() {
            return Ok(Some(isa));
        }
        let best = Isa::detect().name();
        let reason = format!("this processor has no {}; its best is {best}", isa.name());
        Err(ConfigError::new("isa", reason))
    }
}
