"""Makes fixtures/architectures.json, and long_tail.json of architectures rill runs through candle alone: for every architecture and rope scheme, a tiny model's published config.json and
tensor list, a text of random tokens, and the logits transformers computes at every position in f32. The one thing it
is made to do as rill does is to round queries, keys, values and softmax weights to bf16 (`attend`), which is worth
about half a percent of the logits: without it a mistake of that size could hide. Candle rounds nothing, and so does
the long tail but for what was made first (`ROUNDED`).

Weights are not stored: both sides compute them from the tensor's name (`values` here, `Numbers` in architectures.rs),
rounded to bf16. Run it in a virtual environment with torch, transformers and numpy:

    python tests/models/make_architectures.py [NAME ...]    # NAMEs only, the rest kept as they are
"""

import base64
import json
import pathlib
import sys

import numpy as np
import torch
import transformers

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
VOCAB = 64
TOKENS = 44

BASE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}
# Widths that are no multiples of 32, and odd heads.
ODD = {"hidden_size": 52, "intermediate_size": 76, "head_dim": 20}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 32, "pad_token_id": 0}
GEMMA3 = {"query_pre_attn_scalar": 24, "sliding_window": 9, "num_hidden_layers": 6, "rope_theta": 1e6}

LATENT = {"num_key_value_heads": 4, "num_hidden_layers": 3, "rms_norm_eps": 1e-6, "kv_lora_rank": 40,
          "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 20, "n_routed_experts": 8,
          "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 36, "first_k_dense_replace": 1,
          "norm_topk_prob": False}


def llama(**changes):
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **BASE, **changes}


def model(architecture, model_type, **changes):
    return {"architectures": [architecture], "model_type": model_type, **BASE, **changes}


def without(config, *names):
    return {key: value for key, value in config.items() if key not in names}


MODELS = {
    "llama": llama(),
    "llama-odd": llama(**ODD, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-80": llama(hidden_size=160, num_attention_heads=2, num_key_value_heads=1),
    "llama-linear": llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama-dynamic": llama(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "llama-3": llama(rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}),
    "llama-yarn": llama(rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0}),
    "mistral": model("MistralForCausalLM", "mistral", sliding_window=7, head_dim=48),
    "mixtral": model("MixtralForCausalLM", "mixtral", num_local_experts=5, num_experts_per_tok=2, sliding_window=None),
    "smollm3": model("SmolLM3ForCausalLM", "smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0],
                     use_sliding_window=False, sliding_window=None, pad_token_id=0),
    "qwen2": model("Qwen2ForCausalLM", "qwen2", use_sliding_window=False, sliding_window=8, max_window_layers=2,
                   tie_word_embeddings=True),
    "qwen2-sliding": model("Qwen2ForCausalLM", "qwen2", use_sliding_window=True, sliding_window=6,
                           max_window_layers=1),
    "qwen2-moe": model("Qwen2MoeForCausalLM", "qwen2_moe", num_experts=6, num_experts_per_tok=3,
                       moe_intermediate_size=40, shared_expert_intermediate_size=56, norm_topk_prob=False,
                       decoder_sparse_step=1, mlp_only_layers=[], use_sliding_window=False),
    "qwen3": model("Qwen3ForCausalLM", "qwen3", head_dim=32, attention_bias=False),
    "qwen3-moe": model("Qwen3MoeForCausalLM", "qwen3_moe", head_dim=32, num_experts=8, num_experts_per_tok=3,
                       moe_intermediate_size=36, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[1]),
    "phi3": model("Phi3ForCausalLM", "phi3", sliding_window=20, rope_scaling=None, pad_token_id=0,
                  original_max_position_embeddings=128),
    "phi3-longrope": model(
        "Phi3ForCausalLM", "phi3", pad_token_id=0, sliding_window=None, original_max_position_embeddings=24,
        partial_rotary_factor=0.75,
        rope_scaling={"type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(6)],
                      "long_factor": [1.5 + 0.7 * i for i in range(6)]}),
    "granite": model("GraniteForCausalLM", "granite", embedding_multiplier=3.0, attention_multiplier=0.2,
                     residual_multiplier=0.4, logits_scaling=2.5),
    "granite-moe": model("GraniteMoeForCausalLM", "granitemoe", embedding_multiplier=3.0, attention_multiplier=0.2,
                         residual_multiplier=0.4, logits_scaling=2.5, num_local_experts=4, num_experts_per_tok=2),
    "gemma": model("GemmaForCausalLM", "gemma", **{**GEMMA, "hidden_activation": None, "hidden_act": "gelu"}),
    "gemma2": model("Gemma2ForCausalLM", "gemma2", **GEMMA, query_pre_attn_scalar=24, sliding_window=9,
                    attn_logit_softcapping=2.0, final_logit_softcapping=4.0, num_hidden_layers=3),
    "gemma3": model("Gemma3ForCausalLM", "gemma3_text", **GEMMA, **GEMMA3, rope_local_base_freq=1000.0,
                    sliding_window_pattern=3, rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "gemma3-wide": without(model(
        "Gemma3ForCausalLM", "gemma3_text", **{**GEMMA, "head_dim": 256, "num_attention_heads": 2,
        "num_key_value_heads": 1}, query_pre_attn_scalar=256, sliding_window=9, num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e5},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}), "rope_theta"),
    "olmo2": model("Olmo2ForCausalLM", "olmo2"),
    "olmoe": model("OlmoeForCausalLM", "olmoe", num_experts=6, num_experts_per_tok=2, norm_topk_prob=False,
                   clip_qkv=None),
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 64, "n_layer": 2,
        "n_head": 4, "n_positions": 128, "n_inner": None, "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new", "bos_token_id": 1, "eos_token_id": 2},
    "starcoder2": without(model(
        "Starcoder2ForCausalLM", "starcoder2", norm_epsilon=1e-5, use_bias=True, hidden_act="gelu_pytorch_tanh",
        sliding_window=11, tie_word_embeddings=True), "rms_norm_eps"),
    "olmo": without(model("OlmoForCausalLM", "olmo", attention_bias=False, clip_qkv=None), "rms_norm_eps"),
    "olmo3": model("Olmo3ForCausalLM", "olmo3", sliding_window=9, num_hidden_layers=4, rope_theta=5e5, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0,
        "beta_slow": 1.0}),
    "cohere": without(model("CohereForCausalLM", "cohere", layer_norm_eps=1e-5, logit_scale=0.25, use_qk_norm=False,
                            tie_word_embeddings=True, pad_token_id=0), "rms_norm_eps"),
    "cohere2": without(model(
        "Cohere2ForCausalLM", "cohere2", layer_norm_eps=1e-5, logit_scale=0.5, num_hidden_layers=4, sliding_window=9,
        sliding_window_pattern=4, tie_word_embeddings=True, pad_token_id=0), "rms_norm_eps"),
    "phi": without(model("PhiForCausalLM", "phi", layer_norm_eps=1e-5, hidden_act="gelu_new", partial_rotary_factor=0.5,
                         qk_layernorm=False, num_key_value_heads=4), "rms_norm_eps"),
    "stablelm": without(model(
        "StableLmForCausalLM", "stablelm", layer_norm_eps=1e-5, partial_rotary_factor=0.25, use_qkv_bias=True,
        qk_layernorm=False, use_parallel_residual=False, use_cache=True), "rms_norm_eps"),
    "ernie4.5": model("Ernie4_5ForCausalLM", "ernie4_5", use_bias=False, head_dim=24, tie_word_embeddings=True),
    "deepseek2": model("DeepseekV2ForCausalLM", "deepseek_v2", **LATENT, q_lora_rank=None, n_group=1, topk_group=1,
                       topk_method="greedy", routed_scaling_factor=1.0, rope_scaling=None),
    "deepseek2-grouped": model(
        "DeepseekV2ForCausalLM", "deepseek_v2", **LATENT, q_lora_rank=28, n_group=4, topk_group=2,
        topk_method="group_limited_greedy", routed_scaling_factor=3.0,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32,
                      "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}),
    "deepseek3": model(
        "DeepseekV3ForCausalLM", "deepseek_v3", **{**LATENT, "norm_topk_prob": True}, q_lora_rank=28, n_group=4,
        topk_group=2, topk_method="noaux_tc", scoring_func="sigmoid", routed_scaling_factor=2.5,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32,
                      "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "gpt-neox": without(model(
        "GPTNeoXForCausalLM", "gpt_neox", layer_norm_eps=1e-5, hidden_act="gelu", rotary_pct=0.25,
        rotary_emb_base=10000, use_parallel_residual=True), "rms_norm_eps", "rope_theta", "num_key_value_heads"),
    "gpt-neox-sequential": without(model(
        "GPTNeoXForCausalLM", "gpt_neox", layer_norm_eps=1e-5, hidden_act="gelu_fast", rotary_pct=1.0,
        rotary_emb_base=10000, use_parallel_residual=False), "rms_norm_eps", "rope_theta", "num_key_value_heads"),
}

LONG_TAIL = {
    "helium": model("HeliumForCausalLM", "helium", head_dim=16, attention_bias=False, mlp_bias=False),
    "glm4": model("Glm4ForCausalLM", "glm4", head_dim=16, partial_rotary_factor=0.5, attention_bias=True, pad_token_id=0),
    "gpt-bigcode": {
        "architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", "vocab_size": VOCAB, "n_embd": 64,
        "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96, "layer_norm_epsilon": 1e-5, "multi_query": True,
        "activation_function": "gelu_pytorch_tanh", "scale_attn_weights": True, "bos_token_id": 1, "eos_token_id": 2},
    "mamba": {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": VOCAB, "hidden_size": 64,
        "num_hidden_layers": 3, "state_size": 16, "expand": 2, "intermediate_size": 128, "conv_kernel": 4,
        "time_step_rank": 4, "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "mamba2": {
        "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "vocab_size": VOCAB, "hidden_size": 64,
        "num_hidden_layers": 3, "state_size": 24, "expand": 2, "num_heads": 8, "head_dim": 16, "n_groups": 2,
        "conv_kernel": 4, "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "recurrent-gemma": {
        "architectures": ["RecurrentGemmaForCausalLM"], "model_type": "recurrent_gemma", "vocab_size": VOCAB,
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 16, "lru_width": 64, "attention_window_size": 48, "conv1d_width": 4,
        "logits_soft_cap": 4.0, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5, "attention_bias": False, "embeddings_scale_by_sqrt_dim": True,
        "block_types": ["recurrent", "recurrent", "attention"], "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    "lfm2": {
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "vocab_size": VOCAB, "hidden_size": 64,
        "block_ff_dim": 96, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.25, "block_multiple_of": 16,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "full_attn_idxs": [1, 3],
        "conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 1e6,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "granite-hybrid": model(
        "GraniteMoeHybridForCausalLM", "granitemoehybrid", embedding_multiplier=3.0, attention_multiplier=0.2,
        residual_multiplier=0.4, logits_scaling=2.5, num_local_experts=0, num_experts_per_tok=0,
        shared_intermediate_size=96, position_embedding_type="rope", layer_types=["attention", "attention"],
        attention_bias=False, tie_word_embeddings=True, mamba_n_heads=8),
    "falcon": {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "vocab_size": VOCAB, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
        "multi_query": True, "parallel_attn": True, "bias": False, "alibi": False, "new_decoder_architecture": False,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2},
}
# Of the long tail, made when all was rounded.
ROUNDED = ["helium", "glm4"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def values(name, shape, offset):
    """Numbers in [-1, 1) from the name's FNV-1a hash, scaled for what the tensor is."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        bits = splitmix(np.uint64(seed) + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    uniform = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    if len(shape) == 1:
        uniform = uniform * np.float32(0.4) + np.float32(offset)
    else:
        uniform = uniform * np.float32(0.3)
    return torch.from_numpy(uniform.reshape(shape)).to(torch.bfloat16).to(torch.float32)


def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
    """Transformers' eager attention, with bf16 operands and f32 sums."""
    brief = lambda x: x.to(torch.bfloat16).to(torch.float32)
    groups = query.shape[1] // key.shape[1]
    key, value = (brief(x).repeat_interleave(groups, dim=1) for x in (key, value))
    scores = brief(query) @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is None:
        softcap = getattr(module, "attn_logit_softcapping", None)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + attention_mask[:, :, :, : key.shape[-2]]
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    output = brief(weights) @ value / weights.sum(dim=-1, keepdim=True)
    return output.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("bf16", attend)
transformers.AttentionMaskInterface.register("bf16", transformers.masking_utils.eager_mask)


def published(config, name, shape):
    """Name and shape of the tensors a checkpoint holds for parameter `name`, in the order they are stacked."""
    kind = config["model_type"]
    if kind == "mixtral":
        name = name.replace(".mlp.", ".block_sparse_moe.")
    if kind == "gpt_neox":
        return [(name.replace("lm_head", "embed_out"), shape)]
    if kind == "granitemoe":
        for ours, theirs in (("router.weight", "router.layer.weight"), ("experts.gate_up_proj", "input_linear.weight"),
                             ("experts.down_proj", "output_linear.weight")):
            name = name.replace(ours, theirs)
        return [(name, shape)]
    if name.endswith("experts.gate_up_proj"):
        stem, (count, double, cols) = name.removesuffix("gate_up_proj"), shape
        gate, up = ("w1", "w3") if kind == "mixtral" else ("gate_proj", "up_proj")
        return [(f"{stem}{e}.{part}.weight", (double // 2, cols)) for e in range(count) for part in (gate, up)]
    if name.endswith("experts.down_proj"):
        stem, (count, rows, cols) = name.removesuffix("down_proj"), shape
        down = "w2" if kind == "mixtral" else "down_proj"
        return [(f"{stem}{e}.{down}.weight", (rows, cols)) for e in range(count)]
    return [(name, shape)]


def make(name, config):
    settings = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    parsed = transformers.AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(settings)))
    parsed._attn_implementation = "bf16" if name in MODELS or name in ROUNDED else "eager"
    network = getattr(transformers, config["architectures"][0])(parsed).eval().to(torch.float32)
    offset = 0.0 if config["model_type"].startswith("gemma") else 1.0
    tensors = {}
    tied = network.config.tie_word_embeddings
    with torch.no_grad():
        biases = [(key, buffer) for key, buffer in network.named_buffers() if key.endswith("correction_bias")]
        for key, parameter in [*network.named_parameters(), *biases]:
            if tied and key in ("lm_head.weight", "embed_out.weight"):
                continue
            parts = []
            for part, shape in published(config, key, tuple(parameter.shape)):
                is_norm = part.endswith("weight") and len(shape) == 1
                parts.append(values(part, shape, offset if is_norm else 0.0))
                tensors[part] = list(shape)
            parameter.copy_(torch.cat([p.reshape(-1) for p in parts]).reshape(parameter.shape))
        if tied:
            network.tie_weights()
        tokens = [(i * i * 7 + i * 13 + 5) % VOCAB for i in range(TOKENS)]
        logits = network(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    size = float(np.sqrt((logits**2).mean()))
    print(f"{name:20} rms {size:.3f}, {len(tensors)} tensors, {sum(int(np.prod(s)) for s in tensors.values())} weights")
    encoded = base64.b64encode(logits.astype("<f2").tobytes()).decode()
    return {"config": config, "tensors": tensors, "tokens": tokens, "logits_f16": encoded}


def main():
    for file, models in (("architectures.json", MODELS), ("long_tail.json", LONG_TAIL)):
        path = FIXTURES / file
        wanted = [name for name in models if name in sys.argv[1:] or not sys.argv[1:]]
        kept = json.loads(path.read_text()) if path.exists() and sys.argv[1:] else {}
        kept.update({name: make(name, models[name]) for name in wanted})
        lines = (f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in models if name in kept)
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{path}: {path.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
