//! The ground truth: a llama forward pass in plain f32 over fully dequantised weights, written from the architecture's
//! description with candle's tensor operations. It shares no code with rill's models or kernels, keeps no KV cache and
//! quantises no activation; it is slow and obvious.

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{D, DType, Device, Result, Tensor, bail};
use std::fs::File;
use std::path::Path;

struct Layer {
    attn_norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    ffn_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// A llama decoder whose every weight is f32.
pub struct FloatLlama {
    embedding: Tensor,
    layers: Vec<Layer>,
    output_norm: Tensor,
    output: Tensor,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    rope_base: f64,
    norm_eps: f64,
}

impl FloatLlama {
    pub fn open(path: &Path) -> Result<FloatLlama> {
        let mut file = File::open(path)?;
        let content = Content::read(&mut file)?;
        let number = |key: &str| -> Result<f64> {
            match content.metadata.get(key) {
                Some(Value::U32(value)) => Ok(f64::from(*value)),
                Some(Value::F32(value)) => Ok(f64::from(*value)),
                other => bail!("{key}: {other:?}"),
            }
        };
        let heads = number("llama.attention.head_count")? as usize;
        let kv_heads = number("llama.attention.head_count_kv")? as usize;
        let hidden = number("llama.embedding_length")? as usize;
        let layer_count = number("llama.block_count")? as usize;
        let head_dim = hidden / heads;
        if number("llama.rope.dimension_count")? as usize != head_dim {
            bail!("partial rotation is not written here");
        }
        let mut tensor = |name: &str| content.tensor(&mut file, name, &Device::Cpu)?.dequantize(&Device::Cpu);
        let mut layers = Vec::with_capacity(layer_count);
        for index in 0..layer_count {
            let mut of = |part: &str| tensor(&format!("blk.{index}.{part}.weight"));
            layers.push(Layer {
                attn_norm: of("attn_norm")?,
                q: of("attn_q")?,
                k: of("attn_k")?,
                v: of("attn_v")?,
                o: of("attn_output")?,
                ffn_norm: of("ffn_norm")?,
                gate: of("ffn_gate")?,
                up: of("ffn_up")?,
                down: of("ffn_down")?,
            });
        }
        let embedding = tensor("token_embd.weight")?;
        let output = if content.tensor_infos.contains_key("output.weight") {
            tensor("output.weight")?
        } else {
            embedding.clone()
        };
        Ok(FloatLlama {
            output_norm: tensor("output_norm.weight")?,
            embedding,
            layers,
            output,
            heads,
            kv_heads,
            head_dim,
            rope_base: number("llama.rope.freq_base")?,
            norm_eps: number("llama.attention.layer_norm_rms_epsilon")?,
        })
    }

    /// Logits after each of `tokens`, one sequence from position 0: `tokens.len()` rows, one after another.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let rows = tokens.len();
        let mask = causal_mask(rows)?;
        let (cos, sin) = self.rotations(rows)?;
        let mut x = self.embedding.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?;
        for layer in &self.layers {
            let normed = self.norm(&x, &layer.attn_norm)?;
            let q = rotate(&self.split(&normed.matmul(&layer.q.t()?)?, self.heads)?, &cos, &sin)?;
            let k = rotate(&self.split(&normed.matmul(&layer.k.t()?)?, self.kv_heads)?, &cos, &sin)?;
            let v = self.split(&normed.matmul(&layer.v.t()?)?, self.kv_heads)?;
            let (k, v) = (self.for_each_query_head(&k)?, self.for_each_query_head(&v)?);
            let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / (self.head_dim as f64).sqrt())?;
            let weights = softmax(&scores.broadcast_add(&mask)?)?;
            let mixed = weights.matmul(&v)?.transpose(0, 1)?.reshape((rows, self.heads * self.head_dim))?;
            x = (x + mixed.matmul(&layer.o.t()?)?)?;
            let normed = self.norm(&x, &layer.ffn_norm)?;
            let gated = (normed.matmul(&layer.gate.t()?)?.silu()? * normed.matmul(&layer.up.t()?)?)?;
            x = (x + gated.matmul(&layer.down.t()?)?)?;
        }
        let x = self.norm(&x, &self.output_norm)?;
        x.matmul(&self.output.t()?)?.flatten_all()?.to_vec1()
    }

    fn norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        x.broadcast_div(&(mean_square + self.norm_eps)?.sqrt()?)?.broadcast_mul(weight)
    }

    /// `[rows, heads * head_dim]` → `[heads, rows, head_dim]`.
    fn split(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        x.reshape((x.dim(0)?, heads, self.head_dim))?.transpose(0, 1)?.contiguous()
    }

    /// Grouped-query attention: query head `h` reads KV head `h / (heads / kv_heads)`.
    fn for_each_query_head(&self, x: &Tensor) -> Result<Tensor> {
        let owners: Vec<u32> = (0..self.heads).map(|head| (head * self.kv_heads / self.heads) as u32).collect();
        x.index_select(&Tensor::new(owners, &Device::Cpu)?, 0)
    }

    /// Cosines and sines, each `[rows, head_dim / 2, 1]`; angles are computed in f64.
    fn rotations(&self, rows: usize) -> Result<(Tensor, Tensor)> {
        let half = self.head_dim / 2;
        let angles: Vec<f64> = (0..rows)
            .flat_map(|row| {
                (0..half).map(move |i| row as f64 / self.rope_base.powf(2.0 * i as f64 / self.head_dim as f64))
            })
            .collect();
        let angles = Tensor::from_vec(angles, (rows, half, 1), &Device::Cpu)?;
        Ok((angles.cos()?.to_dtype(DType::F32)?, angles.sin()?.to_dtype(DType::F32)?))
    }
}

/// Rotates neighbours (2i, 2i + 1): GGUF's llama files have the rows of Q and K permuted for this form.
fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (heads, rows, head_dim) = x.dims3()?;
    let pairs = x.reshape((heads, rows, head_dim / 2, 2))?;
    let (a, b) = (pairs.narrow(3, 0, 1)?, pairs.narrow(3, 1, 1)?);
    let turned_a = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let turned_b = (a.broadcast_mul(sin)? + b.broadcast_mul(cos)?)?;
    Tensor::cat(&[turned_a, turned_b], 3)?.reshape((heads, rows, head_dim))
}

fn causal_mask(rows: usize) -> Result<Tensor> {
    let mask: Vec<f32> =
        (0..rows).flat_map(|q| (0..rows).map(move |k| if k <= q { 0.0 } else { f32::NEG_INFINITY })).collect();
    Tensor::from_vec(mask, (1, rows, rows), &Device::Cpu)
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    let exp = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}
