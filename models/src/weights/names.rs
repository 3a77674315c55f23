//! What each architecture's published safetensors call the tensors whose GGUF names rill uses.

/// Hub names of one family of architectures.
pub(crate) struct Names {
    /// What may precede the decoder's names; the first that leads to an embedding table counts.
    pub(crate) roots: &'static [&'static str],
    /// Between root and layer number.
    layers: &'static str,
    /// GGUF and hub names of tensors outside layers, and of parts of a layer, without `.weight` or `.bias`; a hub name
    /// that ends in a full stop goes without.
    table: &'static [(&'static str, &'static str)],
    /// Names that are looked up where `table` has none.
    base: Option<&'static Names>,
    /// Layer matrices are stored input-major.
    pub transposed: bool,
}

static LLAMA: Names = Names {
    roots: &["model.", "model.language_model.", "language_model.model.", ""],
    layers: "layers.",
    table: &[
        ("token_embd", "embed_tokens"),
        ("output_norm", "norm"),
        ("output", "lm_head"),
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_qkv", "self_attn.qkv_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
        ("ffn_gate_inp", "mlp.gate"),
        ("ffn_gate.#", "mlp.experts.#.gate_proj"),
        ("ffn_up.#", "mlp.experts.#.up_proj"),
        ("ffn_down.#", "mlp.experts.#.down_proj"),
        ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
        ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
        ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
        ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
    ],
    base: None,
    transposed: false,
};

const fn like_llama(table: &'static [(&'static str, &'static str)]) -> Names {
    Names { table, base: Some(&LLAMA), ..LLAMA_SHAPE }
}

/// The parts of [`LLAMA`] a constant may copy.
const LLAMA_SHAPE: Names = Names {
    roots: &["model.", "model.language_model.", "language_model.model.", ""],
    layers: "layers.",
    table: &[],
    base: None,
    transposed: false,
};

/// Norms before and after both sub-layers (Gemma 2 and 3).
static SANDWICH: Names = like_llama(&[
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
]);
/// Norms after both sub-layers (OLMo 2 and 3).
static POST_NORM: Names = like_llama(&[
    ("post_attention_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
]);
static PHI3: Names = like_llama(&[("ffn_up", "mlp.gate_up_proj")]);
static PHI: Names = like_llama(&[
    ("output_norm", "final_layernorm"),
    ("attn_output", "self_attn.dense"),
    ("ffn_up", "mlp.fc1"),
    ("ffn_down", "mlp.fc2"),
]);
static STARCODER2: Names = like_llama(&[("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")]);
static MIXTRAL: Names = like_llama(&[
    ("ffn_gate_inp", "block_sparse_moe.gate"),
    ("ffn_gate.#", "block_sparse_moe.experts.#.w1"),
    ("ffn_down.#", "block_sparse_moe.experts.#.w2"),
    ("ffn_up.#", "block_sparse_moe.experts.#.w3"),
]);
static GRANITE_MOE: Names = like_llama(&[
    ("ffn_gate_inp", "block_sparse_moe.router.layer"),
    ("ffn_gate_up_exps", "block_sparse_moe.input_linear"),
    ("ffn_down_exps", "block_sparse_moe.output_linear"),
]);
static DEEPSEEK: Names = like_llama(&[
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("exp_probs_b", "mlp.gate.e_score_correction_bias."),
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
]);
static GPT2: Names = Names {
    roots: &["transformer.", ""],
    layers: "h.",
    table: &[
        ("token_embd", "wte"),
        ("position_embd", "wpe"),
        ("output_norm", "ln_f"),
        ("output", "lm_head"),
        ("attn_norm", "ln_1"),
        ("attn_qkv", "attn.c_attn"),
        ("attn_output", "attn.c_proj"),
        ("ffn_norm", "ln_2"),
        ("ffn_up", "mlp.c_fc"),
        ("ffn_down", "mlp.c_proj"),
    ],
    base: None,
    transposed: true,
};
static GPT_NEOX: Names = Names {
    roots: &["gpt_neox.", ""],
    layers: "layers.",
    table: &[
        ("token_embd", "embed_in"),
        ("output_norm", "final_layer_norm"),
        ("output", "embed_out"),
        ("attn_norm", "input_layernorm"),
        ("attn_qkv", "attention.query_key_value"),
        ("attn_output", "attention.dense"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_up", "mlp.dense_h_to_4h"),
        ("ffn_down", "mlp.dense_4h_to_h"),
    ],
    base: None,
    transposed: false,
};

impl Names {
    /// The names of an architecture, by its hub name.
    pub(crate) fn of(architecture: &str) -> &'static Names {
        match architecture {
            "Gemma2ForCausalLM" | "Gemma3ForCausalLM" | "Gemma3ForConditionalGeneration" => &SANDWICH,
            "Olmo2ForCausalLM" | "Olmo3ForCausalLM" => &POST_NORM,
            "PhiForCausalLM" => &PHI,
            "Phi3ForCausalLM" => &PHI3,
            "Starcoder2ForCausalLM" => &STARCODER2,
            "MixtralForCausalLM" => &MIXTRAL,
            "DeepseekV2ForCausalLM" | "DeepseekV3ForCausalLM" => &DEEPSEEK,
            "GraniteMoeForCausalLM" => &GRANITE_MOE,
            "GPT2LMHeadModel" => &GPT2,
            "GPTNeoXForCausalLM" => &GPT_NEOX,
            _ => &LLAMA,
        }
    }

    fn look_up(&self, name: &str) -> Option<&'static str> {
        match self.table.iter().find(|(gguf, _)| *gguf == name) {
            Some((_, hub)) => Some(hub),
            None => self.base?.look_up(name),
        }
    }

    /// The hub name of GGUF tensor `name` below `root`: `blk.3.attn_q.bias` → `model.layers.3.self_attn.q_proj.bias`.
    pub(crate) fn hub(&self, root: &str, name: &str) -> Option<String> {
        let (stem, suffix) = name.rsplit_once('.')?;
        let Some((layer, part)) = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
            let hub = self.look_up(stem)?;
            // The output projection stands beside the decoder.
            let root = match (stem, root) {
                ("output", "language_model.model.") => "language_model.",
                ("output", _) => "",
                (_, root) => root,
            };
            return Some(format!("{root}{hub}.{suffix}"));
        };
        let hub = match part.split_once('.') {
            // `ffn_gate.7`: the seventh expert.
            Some((part, expert)) => self.look_up(&format!("{part}.#"))?.replace('#', expert),
            None => self.look_up(part)?.to_owned(),
        };
        Some(match hub.strip_suffix('.') {
            Some(whole) => format!("{root}{}{layer}.{whole}", self.layers),
            None => format!("{root}{}{layer}.{hub}.{suffix}", self.layers),
        })
    }

    /// The number of the layer a hub name belongs to.
    pub(super) fn layer_of(&self, root: &str, name: &str) -> Option<usize> {
        name.strip_prefix(root)?.strip_prefix(self.layers)?.split('.').next()?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::Names;

    #[test]
    fn names_translate() {
        let name =
            |architecture: &str, root: &str, s: &str| Names::of(architecture).hub(root, s).unwrap_or_default();
        let llama = |s| name("LlamaForCausalLM", "model.", s);
        assert_eq!(llama("blk.11.ffn_gate.weight"), "model.layers.11.mlp.gate_proj.weight");
        assert_eq!(llama("token_embd.weight"), "model.embed_tokens.weight");
        assert_eq!(llama("output.weight"), "lm_head.weight");
        assert_eq!(llama("blk.0.unheard_of.weight"), "");
        assert_eq!(
            name("MixtralForCausalLM", "model.", "blk.2.ffn_up.7.weight"),
            "model.layers.2.block_sparse_moe.experts.7.w3.weight"
        );
        let bias = "model.layers.3.mlp.gate.e_score_correction_bias";
        assert_eq!(name("DeepseekV3ForCausalLM", "model.", "blk.3.exp_probs_b.bias"), bias);
        let neox = |s| name("GPTNeoXForCausalLM", "gpt_neox.", s);
        assert_eq!(neox("output.weight"), "embed_out.weight");
        let gemma = |root, s| name("Gemma3ForConditionalGeneration", root, s);
        assert_eq!(gemma("language_model.model.", "output.weight"), "language_model.lm_head.weight");
        assert_eq!(gemma("model.language_model.", "output.weight"), "lm_head.weight");
        assert_eq!(gemma("model.", "blk.0.ffn_norm.weight"), "model.layers.0.pre_feedforward_layernorm.weight");
        assert_eq!(Names::of("GPT2LMHeadModel").layer_of("", "h.12.attn.bias"), Some(12));
    }
}
