//! What llama.cpp's converter makes of latent attention: its metadata, and the matrix that keys and values come from.

use crate::tiny_gguf::Meta;
use crate::tiny_models::{TinyModel, TinyTensor};

impl TinyModel {
    /// Whether the file is made for attention in the narrow space, as newer converters make them; older ones keep one
    /// matrix for keys and values.
    pub(crate) fn gguf_keeps_latent(&self) -> bool {
        self.config["architectures"][0] == "DeepseekV3ForCausalLM"
    }

    /// Dimensions of a head's resting, turning and value parts.
    fn parts(&self) -> [usize; 3] {
        ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"].map(|name| self.count(&[name]))
    }

    /// Keys of latent attention and its experts, without the architecture.
    pub(crate) fn latent_metadata(&self) -> Vec<(&'static str, Meta)> {
        let [resting, turning, value] = self.parts();
        let rank = self.count(&["kv_lora_rank"]);
        let (heads, shared) = (self.count(&["num_attention_heads"]), self.count(&["n_shared_experts"]));
        let lengths = if self.gguf_keeps_latent() {
            vec![
                ("attention.head_count_kv", 1),
                ("attention.key_length", rank + turning),
                ("attention.value_length", rank),
                ("attention.key_length_mla", resting + turning),
                ("attention.value_length_mla", value),
            ]
        } else {
            vec![
                ("attention.head_count_kv", heads),
                ("attention.key_length", resting + turning),
                ("attention.value_length", value),
            ]
        };
        let mut all: Vec<(&str, usize)> = lengths;
        all.extend([
            ("attention.kv_lora_rank", rank),
            ("rope.dimension_count", turning),
            ("leading_dense_block_count", self.count(&["first_k_dense_replace"])),
            ("expert_count", self.count(&["n_routed_experts"])),
            ("expert_shared_count", shared),
            ("expert_group_count", self.count(&["n_group"])),
            ("expert_group_used_count", self.count(&["topk_group"])),
        ]);
        all.extend(self.number(&["q_lora_rank"]).map(|rank| ("attention.q_lora_rank", rank as usize)));
        let sigmoid = self.config["scoring_func"] == "sigmoid";
        all.extend(sigmoid.then_some(("expert_gating_func", 2)));
        let mut metadata: Vec<_> = all.into_iter().map(|(key, value)| (key, Meta::U32(value as u32))).collect();
        let scale = self.number(&["routed_scaling_factor"]).expect("a factor") as f32;
        let normalise = self.config["norm_topk_prob"].as_bool().expect("true or false");
        metadata.push(("expert_weights_scale", Meta::F32(scale)));
        metadata.push(("expert_weights_norm", Meta::Bool(normalise)));
        let scaling = &self.config["rope_scaling"];
        if let Some(all) = scaling["mscale_all_dim"].as_f64() {
            metadata.push(("rope.scaling.yarn_log_multiplier", Meta::F32(0.1 * all as f32)));
        }
        metadata
    }

    /// Each head's keys, input-major, and each head's values.
    pub(crate) fn split_latent(&self, both: &TinyTensor) -> [TinyTensor; 2] {
        let ([resting, _, value], rank) = (self.parts(), both.shape[1]);
        let heads = both.values.chunks_exact((resting + value) * rank);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for head in heads.clone() {
            let (key, of_values) = head.split_at(resting * rank);
            keys.extend((0..rank).flat_map(|c| (0..resting).map(move |r| key[r * rank + c])));
            values.extend(of_values);
        }
        let count = heads.len();
        [
            TinyTensor { shape: vec![count, rank, resting], values: keys },
            TinyTensor { shape: vec![count, value, rank], values },
        ]
    }
}
