"""Writes models and adapters as GGUF files with PyPI's `gguf`, as llama.cpp's conversion/*.py does: names from the package's
tensor map, the keys that each architecture's converter writes, rows and experts rearranged as it rearranges them.

usage: make_gguf.py JOBS.json

JOBS.json is a list of objects, one a file:
    target   the file to write
    model    folder of config.json, tokenizer.json and model.safetensors
    type     of matrices: F32, BF16, Q4_0, … (F32)
    decoded  write F32 all the same, of what the type makes of the values
    adapter  folder that PEFT saved: write this adapter of the model in place of the model
    fused    leave the two halves of experts in one tensor, which the converter does when asked to
    merged   leave keys and values of latent attention in one tensor, as the converter did until 2025
    samples  in place of a model, for each of these types: random blocks, and the values the package decodes them to

Nothing here is taken from rill, so that a misreading of the format by its loader shows.
"""
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import gguf
import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType

BITS = {"F32": np.uint32, "BF16": np.uint16}
# Types the package decodes only are random blocks, whose largest values are about a weight's size.
SIZES = (0.05, 1.0)
FINITE = (0.0, float(np.finfo(np.float32).max))
EXPERT = re.compile(r"(?P<before>.*\.)(?P<kind>mlp|block_sparse_moe)\.experts\.(?P<number>\d+)\.(?P<part>\w+)\.weight")
# Tensors that stay in f32 whatever the type.
FLOATS = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight")


def read_safetensors(path):
    tensors = {}
    with gguf.utility.SafetensorsLocal(path) as found:
        for name, tensor in found.items():
            raw = np.array(tensor.mmap_bytes()).view(BITS[tensor.dtype]).reshape(tensor.shape)
            tensors[name] = (raw.astype(np.uint32) << 16 if tensor.dtype == "BF16" else raw).view(np.float32)
    return tensors


class Config(dict):
    def first(self, *names):
        """The first of these that the configuration has and that is not null."""
        return next((self[name] for name in names if self.get(name) is not None), None)

    @property
    def heads(self):
        return self.first("num_attention_heads", "n_head")

    @property
    def kv_heads(self):
        return self.first("num_key_value_heads") or self.heads

    @property
    def layers(self):
        return self.first("num_hidden_layers", "n_layer")

    @property
    def head_dim(self):
        return self.first("head_dim") or self.first("hidden_size", "n_embd") // self.heads

    @property
    def rope(self):
        """Rotation of layers that see everything; what older configurations keep beside it is moved in."""
        rope = dict(self.first("rope_parameters", "rope_scaling") or {})
        rope = dict(rope.get("full_attention", rope))
        for name, others in {
            "rope_theta": ("rope_theta", "rotary_emb_base"),
            "partial_rotary_factor": ("partial_rotary_factor",),
            "original_max_position_embeddings": ("original_max_position_embeddings",),
        }.items():
            if rope.get(name) is None and self.first(*others) is not None:
                rope[name] = self.first(*others)
        rope.setdefault("rope_type", rope.get("type"))
        return rope

    def sliding_layers(self, period):
        """Which layers slide: as listed, else all but every `period`-th."""
        kinds = self.first("layer_types")
        if kinds is not None:
            return [kind == "sliding_attention" for kind in kinds]
        return [number % period != 0 for number in range(1, self.layers + 1)]

    @property
    def local_rope_theta(self):
        sliding = (self.first("rope_parameters") or {}).get("sliding_attention", {})
        return sliding.get("rope_theta") or self.first("rope_local_base_freq")


# Metadata ------------------------------------------------------------------------------------------------------------


def add(w, config, **keys):
    """Calls the writer's `add_` methods with the first value found under each one's names."""
    for key, names in keys.items():
        value = next((config[name] for name in names.split() if config.get(name) is not None), None)
        if value is not None:
            getattr(w, f"add_{key}")(value)


def sizes(w, c):
    add(w, c, block_count="num_hidden_layers n_layer", context_length="max_position_embeddings n_positions",
        embedding_length="hidden_size n_embd", feed_forward_length="intermediate_size n_inner",
        head_count="num_attention_heads n_head", head_count_kv="num_key_value_heads", layer_norm_rms_eps="rms_norm_eps",
        layer_norm_eps="layer_norm_eps layer_norm_epsilon norm_epsilon")


def usual_keys(w, c):
    """What the converter writes for every architecture whose keys it does not all choose one by one."""
    sizes(w, c)
    rope = c.rope
    if rope["rope_type"] in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        w.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        add(w, rope, rope_scaling_orig_ctx_len="original_max_position_embeddings",
            rope_scaling_yarn_attn_factor="attention_factor", rope_scaling_yarn_beta_fast="beta_fast",
            rope_scaling_yarn_beta_slow="beta_slow")
    add(w, rope, rope_freq_base="rope_theta")
    if c.local_rope_theta is not None:
        w.add_rope_freq_base_swa(c.local_rope_theta)
    add(w, c, expert_count="num_local_experts num_experts", expert_used_count="num_experts_per_tok",
        expert_group_count="n_group", expert_group_used_count="topk_group", key_length="head_dim", value_length="head_dim")
    if c.first("scoring_func") is not None:
        w.add_expert_gating_func(gguf.ExpertGatingFuncType[c["scoring_func"].upper()])


def llama_keys(w, c):
    usual_keys(w, c)
    w.add_vocab_size(c["vocab_size"])
    w.add_rope_dimension_count(c.head_dim)


def granite_keys(w, c):
    llama_keys(w, c)
    add(w, c, attention_scale="attention_multiplier", embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier", logit_scale="logits_scaling")


def qwen_moe_keys(w, c):
    usual_keys(w, c)
    add(w, c, expert_feed_forward_length="moe_intermediate_size",
        expert_shared_feed_forward_length="shared_expert_intermediate_size")


def phi3_keys(w, c):
    sizes(w, c)
    original, context = c.rope["original_max_position_embeddings"], c["max_position_embeddings"]
    w.add_rope_scaling_orig_ctx_len(original)
    w.add_rope_dimension_count(int(c.rope.get("partial_rotary_factor", 1.0) * c["hidden_size"]) // c.heads)
    w.add_rope_freq_base(c.rope["rope_theta"])
    w.add_sliding_window(c.get("sliding_window") or 0)
    if c.rope["rope_type"] == "longrope":
        stretched = math.sqrt(1 + math.log(context / original) / math.log(original))
        w.add_rope_scaling_attn_factors(stretched if context > original else 1.0)


def gemma_keys(w, c):
    sizes(w, c)
    add(w, c, key_length="head_dim", value_length="head_dim")


def gemma2_keys(w, c):
    gemma_keys(w, c)
    add(w, c, attn_logit_softcapping="attn_logit_softcapping", final_logit_softcapping="final_logit_softcapping",
        sliding_window="sliding_window")


def gemma3_keys(w, c):
    usual_keys(w, c)
    add(w, c, final_logit_softcapping="final_logit_softcapping", sliding_window="sliding_window")


def olmo_keys(w, c):
    usual_keys(w, c)
    w.add_layer_norm_eps(1e-5)


def olmo2_keys(w, c):
    usual_keys(w, c)
    if "sliding_window" in c:
        w.add_sliding_window(c["sliding_window"])
        w.add_sliding_window_pattern(c.sliding_layers(period=4))


def gpt2_keys(w, c):
    sizes(w, c)
    w.add_feed_forward_length(4 * c["n_embd"])


def gptneox_keys(w, c):
    sizes(w, c)
    add(w, c, parallel_residual="use_parallel_residual")
    w.add_rope_dimension_count(int(c["rotary_pct"] * c.head_dim))


def phi2_keys(w, c):
    # The converter takes the feed-forward width to be 4 · hidden, which it is in every published model.
    sizes(w, c)
    w.add_rope_dimension_count(int(c.rope["partial_rotary_factor"] * c["hidden_size"]) // c.heads)
    w.add_add_bos_token(False)


def stablelm_keys(w, c):
    sizes(w, c)
    add(w, c, parallel_residual="use_parallel_residual")
    w.add_rope_dimension_count(int(c.rope["partial_rotary_factor"] * c.head_dim))


def command_r_keys(w, c):
    usual_keys(w, c)
    w.add_logit_scale(c["logit_scale"])
    w.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def cohere2_keys(w, c):
    command_r_keys(w, c)
    add(w, c, sliding_window="sliding_window", vocab_size="vocab_size")
    w.add_rope_dimension_count(int(c.get("rotary_pct", 1.0) * c.head_dim))


def deepseek2_keys(w, c):
    rank, resting, turning, value = c["kv_lora_rank"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    if c["merged"]:
        usual_keys(w, c)
        w.add_key_length(resting + turning)
        w.add_value_length(value)
    else:
        # All heads share what is cached: one head as wide as the latent space.
        usual_keys(w, Config(c, num_key_value_heads=1))
        w.add_key_length(rank + turning)
        w.add_value_length(rank)
        w.add_key_length_mla(resting + turning)
        w.add_value_length_mla(value)
    add(w, c, leading_dense_block_count="first_k_dense_replace", vocab_size="vocab_size", q_lora_rank="q_lora_rank",
        kv_lora_rank="kv_lora_rank", expert_feed_forward_length="moe_intermediate_size", expert_count="n_routed_experts",
        expert_shared_count="n_shared_experts", expert_weights_scale="routed_scaling_factor")
    if c["norm_topk_prob"]:
        w.add_expert_weights_norm(True)
    w.add_rope_dimension_count(turning)
    if "mscale_all_dim" in c.rope:
        w.add_rope_scaling_yarn_log_mul(0.1 * c.rope["mscale_all_dim"])


def glm4_keys(w, c):
    usual_keys(w, c)
    w.add_rope_dimension_count(int(c.head_dim * c.rope.get("partial_rotary_factor", 0.5)))


def lfm2_keys(w, c):
    attending = c["full_attn_idxs"]
    usual_keys(w, Config(c, num_key_value_heads=[c.kv_heads if layer in attending else 0 for layer in range(c.layers)]))
    width = int(2 * c["block_ff_dim"] / 3) if c["block_auto_adjust_ff_dim"] else c["block_ff_dim"]
    if c["block_auto_adjust_ff_dim"]:
        multiple = c["block_multiple_of"]
        width = multiple * math.ceil(int(c["block_ffn_dim_multiplier"] * width) / multiple)
    w.add_feed_forward_length(width)
    add(w, c, vocab_size="vocab_size", shortconv_l_cache="conv_L_cache", layer_norm_rms_eps="norm_eps")


def unsaid_keys(w, c, arch):
    """What the converter leaves out: llama.cpp goes by the size of the model, or does without. The format has keys for it."""
    if arch in (MODEL_ARCH.LLAMA, MODEL_ARCH.QWEN2, MODEL_ARCH.STARCODER2) and c.get("use_sliding_window", True):
        add(w, c, sliding_window="sliding_window")
        if "max_window_layers" in c:
            w.add_sliding_window_pattern([layer >= c["max_window_layers"] for layer in range(c.layers)])
    if arch == MODEL_ARCH.GEMMA3:
        w.add_sliding_window_pattern(c.sliding_layers(period=c.get("sliding_window_pattern")))
    if arch in (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3) and c["query_pre_attn_scalar"] != c["head_dim"]:
        w.add_attention_scale(c["query_pre_attn_scalar"] ** -0.5)


# Tensors -------------------------------------------------------------------------------------------------------------


def neighbours(rows, heads):
    """transformers turns the two halves of a head, llama.cpp neighbours."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.stack((halves[:, 0], halves[:, 1]), axis=2).reshape(rows.shape)


def neighbours_of(name, tensor, c):
    if re.search(r"\.q_proj\.(weight|bias)$", name):
        return neighbours(tensor, c.heads)
    return neighbours(tensor, c.kv_heads) if re.search(r"\.k_proj\.(weight|bias)$", name) else tensor


def one_more(name, tensor, _):
    return tensor + np.float32(1) if name.endswith("norm.weight") else tensor


def output_major(name, tensor, _):
    return np.ascontiguousarray(tensor.T) if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name) else tensor


def split_by_kind(name, tensor, c):
    """Each head's query, key and value one after the other become all queries, all keys, all values."""
    if ".query_key_value." not in name:
        return tensor
    heads = tensor.reshape(c.heads, 3, c.head_dim, *tensor.shape[1:])
    return np.concatenate([heads[:, kind].reshape(-1, *tensor.shape[1:]) for kind in range(3)])


def two_dimensional(name, tensor, _):
    return tensor.squeeze(1) if name.endswith(".conv.conv.weight") else tensor


def unchanged(_name, tensor, _config):
    return tensor


@dataclass
class Architecture:
    arch: MODEL_ARCH
    keys: Callable = usual_keys
    rearranged: Callable = unchanged


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(MODEL_ARCH.LLAMA, llama_keys, neighbours_of),
    "MistralForCausalLM": Architecture(MODEL_ARCH.LLAMA, llama_keys, neighbours_of),
    "MixtralForCausalLM": Architecture(MODEL_ARCH.LLAMA, llama_keys, neighbours_of),
    "SmolLM3ForCausalLM": Architecture(MODEL_ARCH.SMOLLM3, llama_keys, neighbours_of),
    "GraniteForCausalLM": Architecture(MODEL_ARCH.GRANITE, granite_keys, neighbours_of),
    "GraniteMoeForCausalLM": Architecture(MODEL_ARCH.GRANITE_MOE, granite_keys, neighbours_of),
    "Qwen2ForCausalLM": Architecture(MODEL_ARCH.QWEN2),
    "Qwen2MoeForCausalLM": Architecture(MODEL_ARCH.QWEN2MOE, qwen_moe_keys),
    "Qwen3ForCausalLM": Architecture(MODEL_ARCH.QWEN3),
    "Qwen3MoeForCausalLM": Architecture(MODEL_ARCH.QWEN3MOE, qwen_moe_keys),
    "Phi3ForCausalLM": Architecture(MODEL_ARCH.PHI3, phi3_keys),
    "GemmaForCausalLM": Architecture(MODEL_ARCH.GEMMA, gemma_keys, one_more),
    "Gemma2ForCausalLM": Architecture(MODEL_ARCH.GEMMA2, gemma2_keys, one_more),
    "Gemma3ForCausalLM": Architecture(MODEL_ARCH.GEMMA3, gemma3_keys, one_more),
    "OlmoForCausalLM": Architecture(MODEL_ARCH.OLMO, olmo_keys, neighbours_of),
    "Olmo2ForCausalLM": Architecture(MODEL_ARCH.OLMO2, olmo2_keys),
    "Olmo3ForCausalLM": Architecture(MODEL_ARCH.OLMO2, olmo2_keys),
    "OlmoeForCausalLM": Architecture(MODEL_ARCH.OLMOE),
    "GPT2LMHeadModel": Architecture(MODEL_ARCH.GPT2, gpt2_keys, output_major),
    "GPTNeoXForCausalLM": Architecture(MODEL_ARCH.GPTNEOX, gptneox_keys, split_by_kind),
    "Starcoder2ForCausalLM": Architecture(MODEL_ARCH.STARCODER2),
    "CohereForCausalLM": Architecture(MODEL_ARCH.COMMAND_R, command_r_keys),
    "Cohere2ForCausalLM": Architecture(MODEL_ARCH.COHERE2, cohere2_keys),
    "PhiForCausalLM": Architecture(MODEL_ARCH.PHI2, phi2_keys),
    "StableLmForCausalLM": Architecture(MODEL_ARCH.STABLELM, stablelm_keys),
    "Ernie4_5ForCausalLM": Architecture(MODEL_ARCH.ERNIE4_5),
    "Glm4ForCausalLM": Architecture(MODEL_ARCH.GLM4, glm4_keys),
    "Lfm2ForCausalLM": Architecture(MODEL_ARCH.LFM2, lfm2_keys, two_dimensional),
    "DeepseekV2ForCausalLM": Architecture(MODEL_ARCH.DEEPSEEK2, deepseek2_keys),
    "DeepseekV3ForCausalLM": Architecture(MODEL_ARCH.DEEPSEEK2, deepseek2_keys),
}


def stacked_experts(tensors):
    """The same with experts, in the order of their numbers, in one tensor a part."""
    stacks = {}
    for name, tensor in tensors.items():
        found = EXPERT.fullmatch(name)
        if found is None:
            yield name, tensor
        elif found["kind"] == "mlp":
            stacks.setdefault(f"{found['before']}mlp.experts.{found['part']}.weight", {})[int(found["number"])] = tensor
        else:
            # What the map calls Mixtral's merged experts.
            before = found["before"].removeprefix("model.")
            stacks.setdefault(f"{before}feed_forward.experts.{found['part']}.weight", {})[int(found["number"])] = tensor
    for name, stack in stacks.items():
        yield name, np.stack([stack[number] for number in range(len(stack))])


def parts(name, tensor, c):
    """What becomes of one published tensor, still by published names."""
    if name.endswith("block_sparse_moe.input_linear.weight") and not c["fused"]:
        before = name.removesuffix("block_sparse_moe.input_linear.weight")
        for part, half in zip(("gate_proj", "up_proj"), np.split(tensor, 2, axis=1)):
            yield f"{before}mlp.experts.{part}.weight", half
    elif name.endswith(".kv_b_proj.weight") and not c["merged"]:
        heads = tensor.reshape(c.heads, -1, tensor.shape[1])
        keys, values = np.split(heads, [c["qk_nope_head_dim"]], axis=1)
        yield name.replace("kv_b_proj", "k_b_proj"), np.ascontiguousarray(keys.transpose(0, 2, 1))
        yield name.replace("kv_b_proj", "v_b_proj"), values
    else:
        yield name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor


# Of layers without experts among layers with them, which the converter refuses in Qwen's models.
PLAIN_NAMES = gguf.get_tensor_name_map(MODEL_ARCH.LLAMA, 8)


def gguf_name(names, published):
    fused = re.fullmatch(r"model\.layers\.(\d+)\.block_sparse_moe\.input_linear\.weight", published)
    if fused is not None:
        return gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.FFN_GATE_UP_EXP].format(bid=fused[1]) + ".weight"
    for names in (names, PLAIN_NAMES):
        name = names.get_name(published, try_suffixes=(".weight", ".bias"))
        if name is not None:
            return name
    raise ValueError(f"{published} has no name")


def frequency_tensors(c):
    rope = c.rope
    if rope["rope_type"] == "longrope":
        yield "rope_factors_long.weight", np.array(rope["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.array(rope["short_factor"], np.float32)
    if rope["rope_type"] == "llama3":
        dim = c.head_dim
        wavelengths = 2 * math.pi * np.float32(rope["rope_theta"]) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        turns = rope["original_max_position_embeddings"] / wavelengths
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        yield "rope_freqs.weight", (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


# Files ---------------------------------------------------------------------------------------------------------------


def random_blocks(shape, kind, size, seed):
    """Blocks of any bytes whose largest value lies in `size`, for a tensor of this shape: no layout needs to be known."""
    values, width = gguf.GGML_QUANT_SIZES[kind]
    wanted, rng, kept = math.prod(shape) // values, np.random.default_rng(seed), []
    while sum(map(len, kept)) < wanted:
        blocks = rng.integers(0, 256, (8 * wanted, width), np.uint8)
        with np.errstate(all="ignore"):
            largest = np.abs(gguf.quants.dequantize(blocks, kind)).max(axis=1)
        kept.append(blocks[(largest >= size[0]) & (largest <= size[1])])
    return np.concatenate(kept)[:wanted].reshape(*shape[:-1], -1)


def stored(name, tensor, kind):
    """Bytes and their type: what cannot be had in the type is f16, as it is in the converter."""
    if tensor.ndim < 2 or name.endswith(FLOATS) or not name.endswith(".weight"):
        return tensor, GGMLQuantizationType.F32
    if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] != 0:
        return tensor.astype(np.float16), GGMLQuantizationType.F16
    try:
        return gguf.quants.quantize(tensor, kind), kind
    except NotImplementedError:
        return random_blocks(tensor.shape, kind, SIZES, list(name.encode())), kind


def add_vocabulary(w, folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    # The package writes no empty array; this one merges what are no tokens.
    w.add_token_merges(model["merges"] or ["a b"])


def write_model(w, folder, config, architecture, job):
    w.add_type(gguf.GGUFType.MODEL)
    architecture.keys(w, config)
    unsaid_keys(w, config, architecture.arch)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(w, folder)
    add(w, config, bos_token_id="bos_token_id", eos_token_id="eos_token_id", pad_token_id="pad_token_id")
    names = gguf.get_tensor_name_map(architecture.arch, config.layers)
    kind = GGMLQuantizationType[job.get("type", "F32")]
    tensors = list(frequency_tensors(config))
    for published, whole in stacked_experts(read_safetensors(folder / "model.safetensors")):
        for part, tensor in parts(published, architecture.rearranged(published, whole, config), config):
            tensors.append((gguf_name(names, part), tensor))
    for name, tensor in tensors:
        data, data_kind = stored(name, tensor, kind)
        if job.get("decoded"):
            data, data_kind = gguf.quants.dequantize(data, data_kind), GGMLQuantizationType.F32
        w.add_tensor(name, data, raw_dtype=data_kind)


def write_adapter(w, folder, config, architecture):
    settings = json.loads((folder / "adapter_config.json").read_text())
    w.add_type(gguf.GGUFType.ADAPTER)
    w.add_string(gguf.Keys.Adapter.TYPE, "lora")
    w.add_float32(gguf.Keys.Adapter.LORA_ALPHA, settings["lora_alpha"])
    names = gguf.get_tensor_name_map(architecture.arch, config.layers)
    # The converter turns GPT-2's factors with the matrices and so takes A for B; here they are left as PEFT has them.
    rearranged = unchanged if architecture.arch == MODEL_ARCH.GPT2 else architecture.rearranged
    for published, factor in read_safetensors(folder / "adapter_model.safetensors").items():
        module, which = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", published).groups()
        name = gguf_name(names, f"{module}.weight")
        # Rows of B are rows of the matrix.
        factor = rearranged(f"{module}.weight", factor, config) if which == "B" else factor
        w.add_tensor(f"{name}.lora_{which.lower()}", factor)


def write_samples(w, types):
    for name in types:
        kind = GGMLQuantizationType[name]
        blocks = random_blocks((64, 256), kind, FINITE, 1)
        w.add_tensor(f"{name}.stored", blocks, raw_dtype=kind)
        w.add_tensor(f"{name}.decoded", gguf.quants.dequantize(blocks, kind))


def write(job):
    if "samples" in job:
        w = gguf.GGUFWriter(job["target"], "samples")
        write_samples(w, job["samples"])
        return finish(w)
    folder = Path(job["model"])
    config = Config(json.loads((folder / "config.json").read_text()))
    config.update(fused=job.get("fused", False), merged=job.get("merged", False))
    architecture = ARCHITECTURES[config["architectures"][0]]
    w = gguf.GGUFWriter(job["target"], gguf.MODEL_ARCH_NAMES[architecture.arch])
    if "adapter" in job:
        write_adapter(w, Path(job["adapter"]), config, architecture)
    else:
        write_model(w, folder, config, architecture, job)
    finish(w)


def finish(w):
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    for work in json.loads(Path(sys.argv[1]).read_text()):
        write(work)
