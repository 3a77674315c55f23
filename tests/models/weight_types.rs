//! Perplexity per GGUF type: the default model requantised into each type the loader takes, run by rill and by an
//! independent f32 computation over the same weights dequantised by candle, on Python's own reference manual.
//!
//! A minute a type, so only when asked for (names after `--ignored` choose types):
//! `cargo test --release -p rill-tests --test weight_types -- --ignored --nocapture --test-threads 1`

mod float_llama;

use candle_core::quantized::gguf_file::{Content, Value, write};
use candle_core::quantized::{GgmlDType, QTensor, ggml_file::qtensor_from_ggml};
use candle_core::{Device, Tensor};
use float_llama::FloatLlama;
use rill_models::{LoadOptions, ModelFiles, ModelKind, Windows, perplexity};
use rill_tests::default_model;
use std::fs::File;
use std::path::Path;
use std::process::Command;

/// 40 windows, 20,440 scored tokens.
const WINDOW: usize = 512;
const WINDOWS: usize = 40;
/// Of the reference's perplexity.
const DIFFERENCE_MAX: f64 = 0.005;

/// GGUF's number of a type that candle does not know; its blocks have the size and nibbles of Q4_0.
const IQ4_NL: u32 = 20;
const IQ4_NL_VALUES: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// The language reference that comes with every Python, as `help()` shows it.
fn text() -> String {
    let script = "from pydoc_data.topics import topics\nfor k in sorted(topics): print(topics[k])";
    let output = Command::new("python3").args(["-c", script]).output().expect("python3 runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Rounds each 32 values to the table, scaled so that the largest meets its end.
fn to_iq4_nl(values: &[f32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(values.len() / 32 * 18);
    for block in values.chunks_exact(32) {
        let peak = block.iter().copied().fold(0.0_f32, |m, x| if x.abs() > m.abs() { x } else { m });
        let d = half_bits(peak / IQ4_NL_VALUES[0]);
        let scale = half_value(d);
        let nearest = |x: f32| {
            let error = |code: &usize| (x - scale * IQ4_NL_VALUES[*code]).abs();
            (0..16).min_by(|a, b| error(a).total_cmp(&error(b))).expect("sixteen codes") as u8
        };
        out.extend(d.to_le_bytes());
        out.extend((0..16).map(|k| nearest(block[k]) | nearest(block[k + 16]) << 4));
    }
    out
}

fn half_bits(x: f32) -> u16 {
    let tensor = Tensor::new(&[x], &Device::Cpu).and_then(|t| t.to_dtype(candle_core::DType::F16));
    tensor.and_then(|t| t.to_vec1::<half::f16>()).expect("a half")[0].to_bits()
}

fn half_value(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32()
}

/// A matrix in the type asked for, and its dequantised values.
fn requantise(name: &str, tensor: &Tensor, dtype: Option<GgmlDType>) -> candle_core::Result<(QTensor, Tensor)> {
    let cols = tensor.dim(1)?;
    let Some(dtype) = dtype else {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        let bytes = to_iq4_nl(&values);
        let decoded: Vec<f32> = bytes
            .chunks_exact(18)
            .flat_map(|block| {
                let d = half_value(u16::from_le_bytes([block[0], block[1]]));
                let value = move |code: u8| d * IQ4_NL_VALUES[usize::from(code)];
                let low = block[2..].iter().map(move |b| value(b & 15));
                low.chain(block[2..].iter().map(move |b| value(b >> 4))).collect::<Vec<_>>()
            })
            .collect();
        let stored = qtensor_from_ggml(GgmlDType::Q4_0, &bytes, tensor.dims().to_vec(), &Device::Cpu)?;
        return Ok((stored, Tensor::from_vec(decoded, tensor.shape(), &Device::Cpu)?));
    };
    let dtype = if cols.is_multiple_of(dtype.block_size()) { dtype } else { GgmlDType::Q8_0 };
    assert!(dtype.block_size() < 256 || name.contains("ffn_down"), "{name}");
    let stored = QTensor::quantize(tensor, dtype)?;
    let decoded = stored.dequantize(&Device::Cpu)?;
    Ok((stored, decoded))
}

/// Writes the default model with its matrices in `dtype` to `stored`, and what they stand for in f32 to `decoded`.
fn write_both(dtype: Option<GgmlDType>, stored: &Path, decoded: &Path) -> candle_core::Result<()> {
    let mut file = File::open(default_model::gguf_path())?;
    let content = Content::read(&mut file)?;
    let metadata: Vec<(&str, &Value)> =
        content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let (mut as_stored, mut as_decoded) = (Vec::new(), Vec::new());
    for name in content.tensor_infos.keys() {
        let tensor = content.tensor(&mut file, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
        let plain = |tensor: &Tensor| QTensor::quantize(tensor, GgmlDType::F32);
        if tensor.rank() < 2 {
            as_stored.push((name.as_str(), plain(&tensor)?));
            as_decoded.push((name.as_str(), plain(&tensor)?));
        } else {
            let (quantised, values) = requantise(name, &tensor, dtype)?;
            as_stored.push((name.as_str(), quantised));
            as_decoded.push((name.as_str(), plain(&values)?));
        }
    }
    for (path, tensors) in [(stored, &as_stored), (decoded, &as_decoded)] {
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        write(&mut File::create(path)?, &metadata, &tensors)?;
    }
    if dtype.is_none() {
        let mut bytes = std::fs::read(stored)?;
        for (name, tensor) in &as_stored {
            if tensor.shape().rank() == 2 {
                retype(&mut bytes, name);
            }
        }
        std::fs::write(stored, bytes)?;
    }
    Ok(())
}

/// Makes IQ4_NL of a Q4_0 matrix's type in the header: name, two dimensions, type.
fn retype(bytes: &mut [u8], name: &str) {
    let mut key = (name.len() as u64).to_le_bytes().to_vec();
    key.extend(name.as_bytes());
    let at = bytes.windows(key.len()).position(|window| window == key).expect("the tensor is in the header");
    let at = at + key.len() + 4 + 2 * 8;
    assert_eq!(bytes[at..at + 4], 2_u32.to_le_bytes(), "{name} is stored as Q4_0");
    bytes[at..at + 4].copy_from_slice(&IQ4_NL.to_le_bytes());
}

fn rills(path: &Path, tokens: &[u32]) -> f64 {
    let files = ModelFiles { name: "requantised".to_owned(), kind: ModelKind::Gguf { path: path.to_owned() } };
    let options = LoadOptions::on_cpu(2);
    let mut loaded = rill_models::load(&files, &options).expect("rill loads it");
    let windows = Windows { len: WINDOW, unscored: 0 };
    let score = perplexity(&mut *loaded.model, tokens, windows, None, |_| true).expect("rill runs");
    assert_eq!(score.tokens, WINDOWS * (WINDOW - 1));
    score.perplexity()
}

fn references(path: &Path, tokens: &[u32]) -> f64 {
    let llama = FloatLlama::open(path).expect("the f32 model opens");
    let score = |window: &[u32]| -> f64 {
        let logits = llama.logits(window).expect("the f32 pass runs");
        let width = logits.len() / WINDOW;
        (1..WINDOW).map(|t| log_probability(&logits[(t - 1) * width..t * width], window[t])).sum()
    };
    // Its products take one thread each.
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(WINDOWS);
    let windows: Vec<&[u32]> = tokens.chunks_exact(WINDOW).collect();
    let sum: f64 = std::thread::scope(|scope| {
        let shares: Vec<_> = windows
            .chunks(WINDOWS.div_ceil(threads))
            .map(|share| scope.spawn(|| share.iter().map(|window| score(window)).sum::<f64>()))
            .collect();
        shares.into_iter().map(|share| share.join().expect("the f32 pass runs")).sum()
    });
    (-sum / (WINDOWS * (WINDOW - 1)) as f64).exp()
}

fn log_probability(row: &[f32], token: u32) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
    f64::from(row[token as usize] - max) - sum.ln()
}

fn check(name: &str, dtype: Option<GgmlDType>) {
    let tokens = default_model::load().tokenizer.encode(&text(), false, false).expect("encodes");
    let tokens = &tokens[..WINDOW * WINDOWS];
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let (stored, decoded) = (scratch.path().join("stored.gguf"), scratch.path().join("decoded.gguf"));
    write_both(dtype, &stored, &decoded).unwrap_or_else(|error| panic!("{name}: {error}"));
    let (ours, truth) = (rills(&stored, tokens), references(&decoded, tokens));
    let difference = ours / truth - 1.0;
    println!("| {name} | {ours:.4} | {truth:.4} | {:+.3} % |", difference * 100.0);
    assert!(difference.abs() <= DIFFERENCE_MAX, "{name}: {ours} is not {truth}");
}

/// One test a type. Types of 256-value blocks fit the default model's ffn_down alone (1,536 columns); the rest is
/// 576 wide and stays in Q8_0 then.
macro_rules! types {
    ($($name:ident: $dtype:expr;)*) => {
        $(
            #[test]
            #[ignore = "a minute; see the first lines of this file"]
            fn $name() {
                check(stringify!($name), $dtype);
            }
        )*
    };
}

types! {
    f32: Some(GgmlDType::F32);
    f16: Some(GgmlDType::F16);
    bf16: Some(GgmlDType::BF16);
    q8_0: Some(GgmlDType::Q8_0);
    q5_1: Some(GgmlDType::Q5_1);
    q5_0: Some(GgmlDType::Q5_0);
    q4_1: Some(GgmlDType::Q4_1);
    q4_0: Some(GgmlDType::Q4_0);
    iq4_nl: None;
    q6_k: Some(GgmlDType::Q6K);
    q5_k: Some(GgmlDType::Q5K);
    q4_k: Some(GgmlDType::Q4K);
    q3_k: Some(GgmlDType::Q3K);
    q2_k: Some(GgmlDType::Q2K);
}
