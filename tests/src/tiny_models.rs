//! Tiny models of every architecture: fixtures/architectures.json says what they are made of, weights are computed.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// One model, and what transformers says of it. See models/make_architectures.py.
#[derive(Debug, Deserialize)]
pub struct TinyModel {
    /// As its config.json.
    pub config: serde_json::Value,
    /// Shape of every tensor, by the names published files use.
    pub tensors: BTreeMap<String, Vec<usize>>,
    pub tokens: Vec<u32>,
    /// Logits after each of `tokens`, f16 in base 64.
    logits_f16: String,
}

/// A tensor's values and shape.
#[derive(Debug, Clone, PartialEq)]
pub struct TinyTensor {
    pub shape: Vec<usize>,
    /// Exactly representable in bf16.
    pub values: Vec<f32>,
}

/// Every model of the fixture, by name.
pub fn all() -> BTreeMap<String, TinyModel> {
    read("architectures.json")
}

/// Models of architectures that rill has through candle alone.
pub fn long_tail() -> BTreeMap<String, TinyModel> {
    read("long_tail.json")
}

fn read(fixture: &str) -> BTreeMap<String, TinyModel> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fixtures").join(fixture);
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The hash of a tensor's name, mixed with the index of a value.
pub fn mixed(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(index + 1));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `values` of make_architectures.py.
pub(crate) fn number(seed: u64, index: u64) -> f32 {
    (mixed(seed, index) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// A safetensors file of these names, types, shapes and bytes.
pub fn safetensors<'a>(tensors: impl Iterator<Item = (&'a str, &'a str, &'a [usize], Vec<u8>)>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(&bytes);
        let info = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.to_owned(), info);
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

/// To the nearest bf16, ties to even.
fn round_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

fn half_to_f32(bits: u16) -> f32 {
    let (sign, exponent, mantissa) = (bits >> 15, (bits >> 10) & 31, bits & 1023);
    let size = match exponent {
        0 => f32::from(mantissa) * 2_f32.powi(-24),
        _ => (1.0 + f32::from(mantissa) / 1024.0) * 2_f32.powi(i32::from(exponent) - 15),
    };
    if sign == 1 { -size } else { size }
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for four in text.trim_end_matches('=').as_bytes().chunks(4) {
        let bits = four.iter().enumerate().fold(0_u32, |bits, (i, &c)| bits | u32::from(digit(c)) << (18 - 6 * i));
        bytes.extend_from_slice(&bits.to_be_bytes()[1..four.len()]);
    }
    bytes
}

/// f16 in base 64.
pub(crate) fn halves(text: &str) -> Vec<f32> {
    base64(text).chunks_exact(2).map(|b| half_to_f32(u16::from_le_bytes([b[0], b[1]]))).collect()
}

impl TinyModel {
    pub fn vocab_size(&self) -> usize {
        self.config["vocab_size"].as_u64().expect("every model says so") as usize
    }

    /// What transformers computes in f32, a row for each token.
    pub fn logits(&self) -> Vec<f32> {
        let logits = halves(&self.logits_f16);
        assert_eq!(logits.len(), self.tokens.len() * self.vocab_size(), "a whole table");
        logits
    }

    /// Every tensor, by its published name.
    pub fn weights(&self) -> BTreeMap<String, TinyTensor> {
        let gemma = self.config["model_type"].as_str().is_some_and(|kind| kind.starts_with("gemma"));
        let tensor = |(name, shape): (&String, &Vec<usize>)| {
            let hash = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
            let (scale, offset) = match shape.len() {
                1 if name.ends_with("weight") && !gemma => (0.4, 1.0),
                1 => (0.4, 0.0),
                _ => (0.3, 0.0),
            };
            let count = shape.iter().product::<usize>() as u64;
            let values = (0..count).map(|i| round_bf16(number(seed, i) * scale + offset)).collect();
            (name.clone(), TinyTensor { shape: shape.clone(), values })
        };
        self.tensors.iter().map(tensor).collect()
    }

    /// Writes config.json, tokenizer.json and model.safetensors (bf16 or f32) into `dir`.
    pub fn write_directory(&self, dir: &Path, f32_weights: bool) {
        self.write_directory_with(dir, &self.weights(), f32_weights);
    }

    /// The same with other weights.
    pub fn write_directory_with(&self, dir: &Path, weights: &BTreeMap<String, TinyTensor>, f32_weights: bool) {
        let write = |name: &str, bytes: &[u8]| {
            let path: PathBuf = dir.join(name);
            std::fs::write(&path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        };
        write("model.safetensors", &float_safetensors(weights, f32_weights));
        write("config.json", self.config.to_string().as_bytes());
        write("tokenizer.json", tokenizer_json(self.vocab_size()).to_string().as_bytes());
    }
}

/// A safetensors file, in f32 or bf16.
pub(crate) fn float_safetensors(tensors: &BTreeMap<String, TinyTensor>, in_f32: bool) -> Vec<u8> {
    let (dtype, skipped) = if in_f32 { ("F32", 0) } else { ("BF16", 2) };
    safetensors(tensors.iter().map(|(name, tensor)| {
        let bytes = tensor.values.iter().flat_map(|value| value.to_le_bytes().into_iter().skip(skipped));
        (name.as_str(), dtype, tensor.shape.as_slice(), bytes.collect())
    }))
}

/// A byte-level vocabulary of `size` made-up tokens.
fn tokenizer_json(size: usize) -> serde_json::Value {
    let vocab: BTreeMap<String, usize> = (0..size).map(|id| (format!("t{id}"), id)).collect();
    serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "truncation": null,
        "padding": null, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true}, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
        "use_regex": true}, "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}
