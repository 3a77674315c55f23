//! Tiny models as GGUF files: metadata and tensors named, permuted and stacked the way llama.cpp's converter does it.

use crate::tiny_models::{TinyModel, TinyTensor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Hub class, GGUF architecture.
const ARCHITECTURES: [(&str, &str); 28] = [
    ("LlamaForCausalLM", "llama"),
    ("MistralForCausalLM", "llama"),
    ("MixtralForCausalLM", "llama"),
    ("SmolLM3ForCausalLM", "smollm3"),
    ("Qwen2ForCausalLM", "qwen2"),
    ("Qwen2MoeForCausalLM", "qwen2moe"),
    ("Qwen3ForCausalLM", "qwen3"),
    ("Qwen3MoeForCausalLM", "qwen3moe"),
    ("Phi3ForCausalLM", "phi3"),
    ("GraniteForCausalLM", "granite"),
    ("GraniteMoeForCausalLM", "granitemoe"),
    ("GemmaForCausalLM", "gemma"),
    ("Gemma2ForCausalLM", "gemma2"),
    ("Gemma3ForCausalLM", "gemma3"),
    ("Olmo2ForCausalLM", "olmo2"),
    ("OlmoeForCausalLM", "olmoe"),
    ("GPT2LMHeadModel", "gpt2"),
    ("Starcoder2ForCausalLM", "starcoder2"),
    ("GPTNeoXForCausalLM", "gptneox"),
    ("OlmoForCausalLM", "olmo"),
    ("Olmo3ForCausalLM", "olmo2"),
    ("CohereForCausalLM", "command-r"),
    ("Cohere2ForCausalLM", "cohere2"),
    ("PhiForCausalLM", "phi2"),
    ("StableLmForCausalLM", "stablelm"),
    ("Ernie4_5ForCausalLM", "ernie4_5"),
    ("DeepseekV2ForCausalLM", "deepseek2"),
    ("DeepseekV3ForCausalLM", "deepseek2"),
];

/// Architectures whose q and k rows are permuted so that neighbours turn together.
const PERMUTED: [&str; 5] = ["llama", "smollm3", "granite", "granitemoe", "olmo"];

/// What a layer's parts are called: hub, GGUF. The first that fits counts.
const PARTS: [(&str, &str); 47] = [
    ("input_layernorm.", "attn_norm."),
    ("ln_1.", "attn_norm."),
    ("ln_2.", "ffn_norm."),
    ("self_attn.q_proj.", "attn_q."),
    ("self_attn.k_proj.", "attn_k."),
    ("self_attn.v_proj.", "attn_v."),
    ("self_attn.o_proj.", "attn_output."),
    ("self_attn.qkv_proj.", "attn_qkv."),
    ("self_attn.q_norm.", "attn_q_norm."),
    ("self_attn.k_norm.", "attn_k_norm."),
    ("attn.c_attn.", "attn_qkv."),
    ("attn.c_proj.", "attn_output."),
    ("attention.query_key_value.", "attn_qkv."),
    ("attention.dense.", "attn_output."),
    ("pre_feedforward_layernorm.", "ffn_norm."),
    ("post_feedforward_layernorm.", "post_ffw_norm."),
    ("mlp.gate_proj.", "ffn_gate."),
    ("mlp.gate_up_proj.", "ffn_up."),
    ("mlp.up_proj.", "ffn_up."),
    ("mlp.down_proj.", "ffn_down."),
    ("mlp.c_fc.", "ffn_up."),
    ("mlp.c_proj.", "ffn_down."),
    ("mlp.dense_h_to_4h.", "ffn_up."),
    ("mlp.dense_4h_to_h.", "ffn_down."),
    ("self_attn.dense.", "attn_output."),
    ("mlp.fc1.", "ffn_up."),
    ("mlp.fc2.", "ffn_down."),
    ("self_attn.q_a_proj.", "attn_q_a."),
    ("self_attn.q_a_layernorm.", "attn_q_a_norm."),
    ("self_attn.q_b_proj.", "attn_q_b."),
    ("self_attn.kv_a_proj_with_mqa.", "attn_kv_a_mqa."),
    ("self_attn.kv_a_layernorm.", "attn_kv_a_norm."),
    ("self_attn.kv_b_proj.", "attn_kv_b."),
    ("mlp.shared_experts.gate_proj.", "ffn_gate_shexp."),
    ("mlp.shared_experts.up_proj.", "ffn_up_shexp."),
    ("mlp.shared_experts.down_proj.", "ffn_down_shexp."),
    ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
    ("mlp.gate.", "ffn_gate_inp."),
    ("block_sparse_moe.gate.", "ffn_gate_inp."),
    ("block_sparse_moe.router.layer.", "ffn_gate_inp."),
    ("block_sparse_moe.input_linear.", "ffn_gate_up_exps."),
    ("block_sparse_moe.output_linear.", "ffn_down_exps."),
    ("mlp.shared_expert_gate.", "ffn_gate_inp_shexp."),
    ("mlp.shared_expert.gate_proj.", "ffn_gate_shexp."),
    ("mlp.shared_expert.up_proj.", "ffn_up_shexp."),
    ("mlp.shared_expert.down_proj.", "ffn_down_shexp."),
    ("post_attention_layernorm.", "ffn_norm."),
];

/// One expert's part: hub, GGUF's stack.
const EXPERT_PARTS: [(&str, &str); 6] = [
    ("gate_proj", "ffn_gate_exps"),
    ("up_proj", "ffn_up_exps"),
    ("down_proj", "ffn_down_exps"),
    ("w1", "ffn_gate_exps"),
    ("w3", "ffn_up_exps"),
    ("w2", "ffn_down_exps"),
];

/// A metadata value.
pub(crate) enum Meta {
    Str(String),
    U32(u32),
    F32(f32),
    Bool(bool),
    Strs(Vec<String>),
    Ints(Vec<i32>),
    Bools(Vec<bool>),
}

impl Meta {
    fn write(&self, out: &mut Vec<u8>) {
        fn text(out: &mut Vec<u8>, s: &str) {
            out.extend((s.len() as u64).to_le_bytes());
            out.extend(s.as_bytes());
        }
        let start = |out: &mut Vec<u8>, element: u32, len: usize| {
            out.extend(9_u32.to_le_bytes());
            out.extend(element.to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        };
        match self {
            Meta::U32(v) => out.extend([4_u32.to_le_bytes(), v.to_le_bytes()].concat()),
            Meta::F32(v) => out.extend([6_u32.to_le_bytes(), v.to_le_bytes()].concat()),
            Meta::Bool(v) => out.extend([&7_u32.to_le_bytes()[..], &[u8::from(*v)]].concat()),
            Meta::Str(v) => {
                out.extend(8_u32.to_le_bytes());
                text(out, v);
            }
            Meta::Strs(list) => {
                start(out, 8, list.len());
                list.iter().for_each(|s| text(out, s));
            }
            Meta::Ints(list) => {
                start(out, 5, list.len());
                list.iter().for_each(|v| out.extend(v.to_le_bytes()));
            }
            Meta::Bools(list) => {
                start(out, 7, list.len());
                out.extend(list.iter().map(|&v| u8::from(v)));
            }
        }
    }
}

fn map(tensor: TinyTensor, f: impl Fn(f32) -> f32) -> TinyTensor {
    TinyTensor { values: tensor.values.into_iter().map(f).collect(), ..tensor }
}

/// Row `r` becomes row `source(r)` of the original.
fn rows(tensor: TinyTensor, source: impl Fn(usize) -> usize) -> TinyTensor {
    let width = tensor.values.len() / tensor.shape[0];
    let row = |r: usize| &tensor.values[source(r) * width..][..width];
    let values = (0..tensor.shape[0]).flat_map(row).copied().collect();
    TinyTensor { shape: tensor.shape, values }
}

fn transposed(tensor: TinyTensor) -> TinyTensor {
    let (height, width) = (tensor.shape[0], tensor.shape[1]);
    let values = (0..width).flat_map(|c| (0..height).map(move |r| (r, c)));
    let values = values.map(|(r, c)| tensor.values[r * width + c]).collect();
    TinyTensor { shape: vec![width, height], values }
}

fn write_file(path: &Path, metadata: &[(String, Meta)], tensors: &BTreeMap<String, TinyTensor>) {
    let mut out = b"GGUF".to_vec();
    out.extend(3_u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        out.extend((key.len() as u64).to_le_bytes());
        out.extend(key.as_bytes());
        value.write(&mut out);
    }
    let mut data: Vec<u8> = Vec::new();
    for (name, tensor) in tensors {
        data.resize(data.len().next_multiple_of(32), 0);
        out.extend((name.len() as u64).to_le_bytes());
        out.extend(name.as_bytes());
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&n| out.extend((n as u64).to_le_bytes()));
        out.extend(0_u32.to_le_bytes());
        out.extend((data.len() as u64).to_le_bytes());
        data.extend(tensor.values.iter().flat_map(|v| v.to_le_bytes()));
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(data);
    std::fs::write(path, out).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

impl TinyModel {
    pub(crate) fn number(&self, names: &[&str]) -> Option<f64> {
        names.iter().find_map(|name| self.config[name].as_f64())
    }

    pub(crate) fn count(&self, names: &[&str]) -> usize {
        self.number(names).unwrap_or_else(|| panic!("{names:?} is in no configuration")) as usize
    }

    fn heads(&self) -> (usize, usize, usize) {
        let heads = self.count(&["num_attention_heads", "n_head"]);
        let hidden = self.count(&["hidden_size", "n_embd"]);
        let kv_heads = self.number(&["num_key_value_heads"]).map_or(heads, |n| n as usize);
        (heads, kv_heads, self.number(&["head_dim"]).map_or(hidden / heads, |n| n as usize))
    }

    /// `general.architecture`.
    pub fn gguf_architecture(&self) -> &'static str {
        let class = self.config["architectures"][0].as_str().expect("a class");
        ARCHITECTURES.iter().find(|(hub, _)| *hub == class).expect("a known class").1
    }

    /// Writes the model as one file, every tensor in f32.
    pub fn write_gguf(&self, path: &Path) {
        write_file(path, &self.metadata(), &self.gguf_tensors(false));
    }

    /// The same with the two halves of experts that are published in one tensor left in one.
    pub fn write_fused_gguf(&self, path: &Path) {
        write_file(path, &self.metadata(), &self.gguf_tensors(true));
    }

    /// Writes factors A and B of published modules as an adapter of this model.
    pub(crate) fn write_gguf_adapter<'a>(
        &self,
        path: &Path,
        alpha: f32,
        factors: impl Iterator<Item = (&'a str, &'a TinyTensor, &'a TinyTensor)>,
    ) {
        let metadata = [
            ("general.type".to_owned(), Meta::Str("adapter".to_owned())),
            ("general.architecture".to_owned(), Meta::Str(self.gguf_architecture().to_owned())),
            ("adapter.type".to_owned(), Meta::Str("lora".to_owned())),
            ("adapter.lora.alpha".to_owned(), Meta::F32(alpha)),
        ];
        let mut tensors = BTreeMap::new();
        for (module, a, b) in factors {
            // B's rows are the matrix's own; unlike GPT-2's matrices, its factors are not turned.
            let (name, rows) = self.convert(&format!("{module}.weight"), b.clone());
            let rows = if self.gguf_architecture() == "gpt2" { b.clone() } else { rows };
            tensors.insert(format!("{name}.lora_a"), a.clone());
            tensors.insert(format!("{name}.lora_b"), rows);
        }
        write_file(path, &metadata, &tensors);
    }

    fn metadata(&self) -> Vec<(String, Meta)> {
        let arch = self.gguf_architecture();
        let (heads, kv_heads, head_dim) = self.heads();
        let layers = self.count(&["num_hidden_layers", "n_layer"]);
        let hidden = self.count(&["hidden_size", "n_embd"]);
        let inner = self.number(&["intermediate_size"]).map_or(4 * hidden, |n| n as usize);
        let vocab: Vec<String> = (0..self.vocab_size()).map(|id| format!("t{id}")).collect();
        let mut all: Vec<(String, Meta)> = vec![
            ("general.architecture".to_owned(), Meta::Str(arch.to_owned())),
            ("tokenizer.ggml.model".to_owned(), Meta::Str("gpt2".to_owned())),
            ("tokenizer.ggml.pre".to_owned(), Meta::Str("gpt-2".to_owned())),
            ("tokenizer.ggml.token_type".to_owned(), Meta::Ints(vec![1; vocab.len()])),
            ("tokenizer.ggml.tokens".to_owned(), Meta::Strs(vocab)),
            ("tokenizer.ggml.merges".to_owned(), Meta::Strs(Vec::new())),
            ("tokenizer.ggml.bos_token_id".to_owned(), Meta::U32(1)),
            ("tokenizer.ggml.eos_token_id".to_owned(), Meta::U32(2)),
        ];
        let mut set = |key: &str, value: Meta| all.push((format!("{arch}.{key}"), value));
        for (key, value) in [
            ("embedding_length", hidden),
            ("block_count", layers),
            ("feed_forward_length", inner),
            ("context_length", self.count(&["max_position_embeddings", "n_positions"])),
            ("attention.head_count", heads),
            ("attention.head_count_kv", kv_heads),
            ("attention.key_length", head_dim),
            ("attention.value_length", head_dim),
        ] {
            set(key, Meta::U32(value as u32));
        }
        let eps = self.number(&["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"]);
        let layer_norm =
            ["gpt2", "starcoder2", "gptneox", "command-r", "cohere2", "phi2", "stablelm", "olmo"].contains(&arch);
        let key = if layer_norm { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" };
        set(key, Meta::F32(eps.unwrap_or(1e-5) as f32));
        let partial = self.number(&["partial_rotary_factor", "rotary_pct"]).unwrap_or(1.0);
        if arch != "gpt2" {
            set("rope.dimension_count", Meta::U32((head_dim as f64 * partial) as u32));
        }
        for (key, names) in [
            ("rope.freq_base", &["rope_theta", "rotary_emb_base"][..]),
            ("rope.freq_base_swa", &["rope_local_base_freq"]),
            ("embedding_scale", &["embedding_multiplier"]),
            ("residual_scale", &["residual_multiplier"]),
            ("attention.scale", &["attention_multiplier"]),
            ("logit_scale", &["logits_scaling", "logit_scale"]),
            ("attn_logit_softcapping", &["attn_logit_softcapping"]),
            ("final_logit_softcapping", &["final_logit_softcapping"]),
        ] {
            if let Some(value) = self.number(names) {
                set(key, Meta::F32(value as f32));
            }
        }
        for (key, kind) in [("rope.freq_base", "full_attention"), ("rope.freq_base_swa", "sliding_attention")] {
            if let Some(base) = self.config["rope_parameters"][kind]["rope_theta"].as_f64() {
                set(key, Meta::F32(base as f32));
            }
        }
        let scalar = self.number(&["query_pre_attn_scalar"]).filter(|&scalar| scalar != head_dim as f64);
        if let Some(scalar) = scalar {
            set("attention.scale", Meta::F32(1.0 / (scalar as f32).sqrt()));
        }
        for (key, names) in [
            ("expert_count", &["num_local_experts", "num_experts"][..]),
            ("expert_used_count", &["num_experts_per_tok"]),
            ("expert_feed_forward_length", &["moe_intermediate_size"]),
            ("expert_shared_feed_forward_length", &["shared_expert_intermediate_size"]),
        ] {
            if let Some(value) = self.number(names) {
                set(key, Meta::U32(value as u32));
            }
        }
        if let Some(parallel) = self.config["use_parallel_residual"].as_bool() {
            set("use_parallel_residual", Meta::Bool(parallel));
        }
        if self.config["use_sliding_window"] != false
            && let Some(window) = self.number(&["sliding_window"])
        {
            set("attention.sliding_window", Meta::U32(window as u32));
            if let Some(slides) = self.sliding_layers(layers) {
                set("attention.sliding_window_pattern", Meta::Bools(slides));
            }
        }
        let scaling = &self.config["rope_scaling"];
        if let Some(kind) = scaling["type"].as_str().or(scaling["rope_type"].as_str())
            && ["linear", "yarn"].contains(&kind)
        {
            set("rope.scaling.type", Meta::Str(kind.to_owned()));
            set("rope.scaling.factor", Meta::F32(scaling["factor"].as_f64().expect("a factor") as f32));
        }
        if let Some(factor) = self.longrope_attention_factor() {
            set("rope.scaling.attn_factor", Meta::F32(factor));
        }
        let original = scaling["original_max_position_embeddings"].as_u64();
        if let Some(original) = original.or(self.config["original_max_position_embeddings"].as_u64()) {
            set("rope.scaling.original_context_length", Meta::U32(original as u32));
        }
        if arch == "deepseek2" {
            let own = self.latent_metadata().into_iter().map(|(key, value)| (format!("{arch}.{key}"), value));
            let own: Vec<_> = own.collect();
            all.retain(|(key, _)| own.iter().all(|(other, _)| other != key));
            all.extend(own);
        }
        all
    }

    /// Which layers slide, where the configuration tells them apart: each but every n-th, some listed, or all from one on.
    fn sliding_layers(&self, layers: usize) -> Option<Vec<bool>> {
        if let Some(period) = self.number(&["sliding_window_pattern"]) {
            return Some((1..=layers).map(|n| !n.is_multiple_of(period as usize)).collect());
        }
        if let Some(kinds) = self.config["layer_types"].as_array() {
            return Some(kinds.iter().map(|kind| kind == "sliding_attention").collect());
        }
        self.number(&["max_window_layers"]).map(|first| (0..layers).map(|layer| layer >= first as usize).collect())
    }

    fn gguf_tensors(&self, fused: bool) -> BTreeMap<String, TinyTensor> {
        let mut out: BTreeMap<String, TinyTensor> = BTreeMap::new();
        for (name, tensor) in self.numbered_weights() {
            let (name, tensor) = self.convert(&name, tensor);
            if let Some(part) = name.strip_suffix("attn_kv_b.weight")
                && self.gguf_keeps_latent()
            {
                let [keys, values] = self.split_latent(&tensor);
                out.insert(format!("{part}attn_k_b.weight"), keys);
                out.insert(format!("{part}attn_v_b.weight"), values);
            } else if let Some(part) = name.strip_suffix("ffn_gate_up_exps.weight").filter(|_| !fused) {
                // Granite keeps both in one tensor.
                let [count, double, cols] = tensor.shape[..] else { panic!("a stack of experts") };
                for (which, kind) in ["gate", "up"].into_iter().enumerate() {
                    let half = double / 2 * cols;
                    let experts = tensor.values.chunks_exact(double * cols);
                    let values = experts.flat_map(|e| e[which * half..][..half].to_vec()).collect();
                    let half = TinyTensor { shape: vec![count, double / 2, cols], values };
                    out.insert(format!("{part}ffn_{kind}_exps.weight"), half);
                }
            } else if let Some(stack) = out.get_mut(&name) {
                stack.shape[0] += 1;
                stack.values.extend(tensor.values);
            } else {
                out.insert(name, tensor);
            }
        }
        let scaling = &self.config["rope_scaling"];
        for kind in ["short", "long"] {
            if let Some(factors) = scaling[format!("{kind}_factor")].as_array() {
                let values: Vec<f32> = factors.iter().map(|f| f.as_f64().expect("a number") as f32).collect();
                let tensor = TinyTensor { shape: vec![values.len()], values };
                out.insert(format!("rope_factors_{kind}.weight"), tensor);
            }
        }
        if scaling["rope_type"] == "llama3" {
            let values = self.llama3_factors(scaling);
            out.insert("rope_freqs.weight".to_owned(), TinyTensor { shape: vec![values.len()], values });
        }
        out
    }

    /// All weights, experts in the order of their numbers.
    fn numbered_weights(&self) -> Vec<(String, TinyTensor)> {
        let mut weights: Vec<(String, TinyTensor)> = self.weights().into_iter().collect();
        let expert = |name: &str| {
            let number =
                name.split("experts.").nth(1).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
            number.unwrap_or(0)
        };
        weights.sort_by_key(|(name, _)| expert(name));
        weights
    }

    /// GGUF name and values of one published tensor; an expert's has a leading dimension of one.
    fn convert(&self, name: &str, tensor: TinyTensor) -> (String, TinyTensor) {
        let arch = self.gguf_architecture();
        let (_, _, head_dim) = self.heads();
        let plus_one = arch.starts_with("gemma") && tensor.shape.len() == 1;
        let tensor = if plus_one { map(tensor, |w| w + 1.0) } else { tensor };
        let layer = ["layers.", "h."].iter().find_map(|kind| {
            let rest =
                name.split_once(kind).filter(|(before, _)| !before.ends_with(|c: char| c.is_alphanumeric()))?.1;
            rest.split_once('.').filter(|(number, _)| number.parse::<usize>().is_ok())
        });
        let Some((layer, part)) = layer else {
            let (stem, suffix) = name.rsplit_once('.').expect("a suffix");
            let top = match stem.rsplit('.').next().expect("a name") {
                "embed_tokens" | "wte" | "embed_in" => "token_embd",
                "wpe" => "position_embd",
                "norm" | "ln_f" | "final_layer_norm" | "final_layernorm" => "output_norm",
                "lm_head" | "embed_out" => "output",
                other => panic!("{other} is no tensor of a decoder"),
            };
            return (format!("{top}.{suffix}"), tensor);
        };
        if let Some((_, rest)) = part.split_once(".experts.")
            && let Some((_, part)) = rest.split_once('.')
        {
            let part = part.strip_suffix(".weight").expect("a weight");
            let stack = EXPERT_PARTS.iter().find(|(hub, _)| *hub == part).expect("a known part").1;
            let shape = [&[1], &tensor.shape[..]].concat();
            return (format!("blk.{layer}.{stack}.weight"), TinyTensor { shape, ..tensor });
        }
        let after = ["gemma2", "gemma3", "olmo2"].contains(&arch) && part.starts_with("post_attention_layernorm.");
        let gguf = if after {
            part.replace("post_attention_layernorm", "post_attention_norm")
        } else {
            let (hub, gguf) = PARTS.iter().find(|(hub, _)| part.starts_with(hub)).expect("a known part");
            part.replace(hub, gguf)
        };
        let tensor = if PERMUTED.contains(&arch) && (gguf.starts_with("attn_q.") || gguf.starts_with("attn_k.")) {
            rows(tensor, |r| r / head_dim * head_dim + r % 2 * (head_dim / 2) + r % head_dim / 2)
        } else if arch == "gpt2" && tensor.shape.len() == 2 {
            transposed(tensor)
        } else if arch == "gptneox" && gguf.starts_with("attn_qkv.") {
            let third = tensor.shape[0] / 3;
            rows(tensor, |r| (r % third / head_dim * 3 + r / third) * head_dim + r % head_dim)
        } else if gguf.starts_with("ffn_gate_inp_shexp") {
            TinyTensor { shape: vec![tensor.values.len()], ..tensor }
        } else {
            tensor
        };
        (format!("blk.{layer}.{gguf}"), tensor)
    }

    /// What LongRoPE multiplies cosines and sines with, as the converter works it out.
    fn longrope_attention_factor(&self) -> Option<f32> {
        let original = self.config["original_max_position_embeddings"].as_f64()?;
        let stretch = self.config["max_position_embeddings"].as_f64()? / original;
        (stretch > 1.0).then(|| (1.0 + stretch.ln() / original.ln()).sqrt() as f32)
    }

    /// Divisors of the inverse frequencies, as the converter works them out for Llama 3.1.
    fn llama3_factors(&self, scaling: &Value) -> Vec<f32> {
        let number = |name: &str| scaling[name].as_f64().expect("a number");
        let (factor, low, high) = (number("factor"), number("low_freq_factor"), number("high_freq_factor"));
        let original = number("original_max_position_embeddings");
        let (head_dim, base) = (self.heads().2, self.number(&["rope_theta"]).expect("a base"));
        let divisor = |i: usize| {
            let wavelength = std::f64::consts::TAU * base.powf(2.0 * i as f64 / head_dim as f64);
            if wavelength < original / high {
                1.0
            } else if wavelength > original / low {
                factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        };
        (0..head_dim / 2).map(|i| divisor(i) as f32).collect()
    }
}
