"""Makes fixtures/adapters.json: logits of tiny models with LoRA adapters as PEFT itself runs them, and the configuration and
tensor names PEFT saves, so that names, patterns and scales are PEFT's and not our reading of them.

Weights are not stored: models are those of make_architectures.py, and factors are computed as in tests/src/tiny_adapters.rs.
Run it in a virtual environment with torch, transformers, peft and numpy:

    python tests/models/make_adapters.py
"""

import base64
import json
import pathlib
import tempfile

import numpy as np
import peft
import safetensors
import torch
import transformers

from make_architectures import GOLDEN, MODELS, TOKENS, VOCAB, splitmix, values

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "adapters.json"
NAMES = ["llama", "qwen3", "phi3", "gemma2", "gpt2", "gpt-neox"]
MODULES = [
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_attn",
    "c_proj", "c_fc", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
]


def build(config):
    settings = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    parsed = transformers.AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(settings)))
    parsed._attn_implementation = "bf16"
    network = getattr(transformers, config["architectures"][0])(parsed).eval().to(torch.float32)
    offset = 0.0 if config["model_type"].startswith("gemma") else 1.0
    tied = network.config.tie_word_embeddings
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if tied and key == "lm_head.weight":
                continue
            name = key.replace("lm_head", "embed_out") if config["model_type"] == "gpt_neox" else key
            is_norm = key.endswith("weight") and parameter.dim() == 1
            parameter.copy_(values(name, tuple(parameter.shape), offset if is_norm else 0.0))
        if tied:
            network.tie_weights()
    return network


def factor(index, kind, shape):
    """Numbers of adapter 1: module `index` in the order of names, A (0) or B (1)."""
    with np.errstate(over="ignore"):
        seed = np.uint64((1 << 32) + index * 2 + kind)
        bits = splitmix(seed + GOLDEN * np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64))
    uniform = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    return torch.from_numpy((uniform * np.float32(0.25)).reshape(shape))


def make(name):
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=8, lora_dropout=0.1, target_modules=MODULES, use_rslora=True,
        rank_pattern={"o_proj|attention.dense|c_proj": 6}, alpha_pattern={"layers.1.self_attn.(k|v)_proj": 5},
        fan_in_fan_out=MODELS[name]["model_type"] == "gpt2")
    network = peft.get_peft_model(build(MODELS[name]), settings).eval()
    wrapped = sorted(
        ((key, module) for key, module in network.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)),
        key=lambda item: item[0] + ".weight")
    with torch.no_grad():
        for index, (_, module) in enumerate(wrapped):
            for kind, matrix in enumerate((module.lora_A["default"].weight, module.lora_B["default"].weight)):
                matrix.copy_(factor(index, kind, tuple(matrix.shape)))
        tokens = [(i * i * 7 + i * 13 + 5) % VOCAB for i in range(TOKENS)]
        logits = network(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        config = json.loads((pathlib.Path(folder) / "adapter_config.json").read_text())
        with safetensors.safe_open(f"{folder}/adapter_model.safetensors", "np") as file:
            names = sorted(file.keys())
    config["target_modules"] = sorted(config["target_modules"])
    print(f"{name:10} rms {float(np.sqrt((logits**2).mean())):.3f}, {len(names)} tensors")
    return {"config": config, "names": names, "logits_f16": base64.b64encode(logits.astype("<f2").tobytes()).decode()}


def main():
    lines = (f"{json.dumps(name)}: {json.dumps(make(name))}" for name in NAMES)
    FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{FIXTURE}: {FIXTURE.stat().st_size} bytes, peft {peft.__version__}, transformers {transformers.__version__}")


main()
