"""Makes fixtures/quantized.json: for every way a checkpoint keeps quantised weights that rill reads, a tiny llama's
config.json, its tensors with their types, and the logits transformers computes from the weights as numpy decodes them
here, by each format's own description:

- GPTQ: qweight packs 8 (or 4) input columns of a row into a word; qzeros packs rows, less one in files of the first
  version; g_idx names each column's group.
- AWQ (GEMM): qweight packs rows 0, 2, 4, 6, 1, 3, 5, 7 of each eight into a word, qzeros alike.
- compressed-tensors: weight_packed packs columns, plus 8 (or 128); weight_zero_point packs rows; weight and
  weight_scale are int8 or FP8 (E4M3) with scales for the matrix, its rows or groups.
- FP8 as DeepSeek and Qwen publish it: weight_scale_inv has a factor for each block.

Codes are not stored: both sides compute them from the tensor's name (`raw` here, quantized.rs there). Run it as
make_architectures.py, whose weights and attention it shares:

    python tests/models/make_quantized.py
"""

import base64
import json
import pathlib

import numpy as np
import torch
import transformers

from make_architectures import GOLDEN, TOKENS, VOCAB, llama, splitmix, values

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "quantized.json"
TYPES = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "I64": np.int64, "I8": np.int8, "F8_E4M3": np.uint8}
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def to_bf16(x):
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).to(torch.float32).numpy()


def raw(name, spec):
    """A tensor's numbers: those listed, one for all, or from the name's FNV-1a hash."""
    shape, dtype = spec["shape"], spec["dtype"]
    if "values" in spec:
        return np.array(spec["values"], dtype=TYPES[dtype]).reshape(shape)
    if "word" in spec:
        return np.full(shape, spec["word"], dtype=np.uint32).astype(np.int32)
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        bits = splitmix(np.uint64(seed) + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    if dtype == "I32":
        out = (bits >> np.uint64(32)).astype(np.uint32).view(np.int32)
    elif dtype == "I8":
        out = (bits >> np.uint64(56)).astype(np.uint8).view(np.int8)
    elif dtype == "F8_E4M3":
        out = (bits >> np.uint64(56)).astype(np.uint8)
        out = np.where(out % 128 == 127, out - 1, out).astype(np.uint8)
    else:
        uniform = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
        out = (uniform + np.float32(0.5)) * np.float32(spec["base"])
        out = to_bf16(out) if dtype == "BF16" else out.astype(TYPES[dtype])
    return out.reshape(shape)


def codes_of(words, bits, axis):
    """Each word's codes, lowest bits first, in place of the word along `axis`."""
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    parts = [(words >> np.uint32(bits * i)) & np.uint32(2**bits - 1) for i in range(32 // bits)]
    codes = np.stack(parts, axis=-1).reshape(*words.shape[:-1], -1)
    return np.moveaxis(codes, -1, axis).astype(np.int64)


class Gptq:
    def __init__(self, bits=4, group=32, version=1, order=False, zeros=None):
        self.bits, self.group, self.version, self.order, self.zeros = bits, group, version, order, zeros
        self.config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order,
                       "sym": zeros is not None, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}

    def tensors(self, rows, cols, seed):
        group = cols if self.group < 0 else self.group
        groups = -(-cols // group)
        listed = np.arange(cols) // group
        if self.order:
            listed = listed[np.argsort([(k * 37 + seed * 11) % cols for k in range(cols)], kind="stable")]
        zeros = {} if self.zeros is None else {"word": self.zeros}
        return {
            "qweight": {"dtype": "I32", "shape": [cols * self.bits // 32, rows]},
            "qzeros": {"dtype": "I32", "shape": [groups, rows * self.bits // 32], **zeros},
            "scales": {"dtype": "F16", "shape": [groups, rows], "base": 2.0**-5 if self.bits == 4 else 2.0**-9},
            "g_idx": {"dtype": "I32", "shape": [cols], "values": listed.tolist()},
        }

    def weight(self, t, rows, cols):
        codes = codes_of(t["qweight"], self.bits, 0)
        zeros = codes_of(t["qzeros"], self.bits, 1)
        if self.version == 1:
            zeros = (zeros + 1) & (2**self.bits - 1)
        scales = t["scales"].astype(np.float32)
        return (scales[t["g_idx"]] * (codes - zeros[t["g_idx"]]).astype(np.float32)).T


class Awq:
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

    def tensors(self, rows, cols, seed):
        return {
            "qweight": {"dtype": "I32", "shape": [cols, rows // 8]},
            "qzeros": {"dtype": "I32", "shape": [cols // 32, rows // 8]},
            "scales": {"dtype": "F16", "shape": [cols // 32, rows], "base": 2.0**-5},
        }

    def weight(self, t, rows, cols):
        def unpack(words):
            codes, out = codes_of(words, 4, 1), np.zeros((words.shape[0], rows), dtype=np.int64)
            for place, row in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                out[:, row::8] = codes[:, place::8]
            return out
        group = np.arange(cols) // 32
        scales = t["scales"].astype(np.float32)
        return (scales[group] * (unpack(t["qweight"]) - unpack(t["qzeros"])[group]).astype(np.float32)).T


class Packed:
    """compressed-tensors' pack-quantized."""

    def __init__(self, bits=4, group=32, zeros=False, order=False):
        self.bits, self.group, self.zeros, self.order = bits, group, zeros, order
        strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        weights = {"num_bits": bits, "type": "int", "symmetric": not zeros, "dynamic": False,
                   "actorder": "group" if order else None, **strategy}
        self.config = compressed("pack-quantized", weights)

    def tensors(self, rows, cols, seed):
        groups = cols // self.group if self.group else 1
        out = {
            "weight_packed": {"dtype": "I32", "shape": [rows, -(-cols * self.bits // 32)]},
            "weight_scale": {"dtype": "BF16", "shape": [rows, groups], "base": 2.0**-5 if self.bits == 4 else 2.0**-9},
            "weight_shape": {"dtype": "I64", "shape": [2], "values": [rows, cols]},
        }
        if self.zeros:
            out["weight_zero_point"] = {"dtype": "I32", "shape": [rows * self.bits // 32, groups]}
        if self.order:
            listed = [(k * 37 + seed) % cols // self.group for k in range(cols)]
            out["weight_g_idx"] = {"dtype": "I32", "shape": [cols], "values": listed}
        return out

    def weight(self, t, rows, cols):
        codes = codes_of(t["weight_packed"], self.bits, 1)[:, :cols]
        groups = t["weight_scale"].shape[1]
        zeros = codes_of(t["weight_zero_point"], self.bits, 0) if self.zeros else 2 ** (self.bits - 1)
        zeros = np.broadcast_to(zeros, (rows, groups))
        group = t["weight_g_idx"] if self.order else np.arange(cols) * groups // cols
        return t["weight_scale"][:, group] * (codes - zeros[:, group]).astype(np.float32)


class Bytes:
    """int-quantized, float-quantized, and FP8 without compressed-tensors."""

    def __init__(self, config, dtype, scale, scale_shape, extra=None, block=None):
        self.config, self.dtype, self.scale, self.shape = config, dtype, scale, scale_shape
        self.extra, self.block = extra or {}, block

    def tensors(self, rows, cols, seed):
        dtype = "BF16" if self.scale == "weight_scale" else "F32"
        return {
            "weight": {"dtype": self.dtype, "shape": [rows, cols]},
            self.scale: {"dtype": dtype, "shape": self.shape(rows, cols), "base": 2.0**-9},
            **{name: {**spec, "shape": spec["shape"](rows, cols)} for name, spec in self.extra.items()},
        }

    def weight(self, t, rows, cols):
        codes = t["weight"].astype(np.float32)
        if self.dtype == "F8_E4M3":
            codes = torch.from_numpy(t["weight"]).view(torch.float8_e4m3fn).to(torch.float32).numpy()
        if "weight_zero_point" in t:
            codes = codes - t["weight_zero_point"].astype(np.float32)
        scale = t[self.scale].astype(np.float32)
        if self.block:
            scale = scale.repeat(self.block[0], axis=0).repeat(self.block[1], axis=1)[:rows, :cols]
        return codes * scale


def compressed(form, weights):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
            "ignore": ["lm_head"], "kv_cache_scheme": None, "config_groups": {"group_0": group}}


def fixed(bits, kind, strategy, **more):
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **more}


SMALL = {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3}
INPUT = {"input_scale": {"dtype": "BF16", "shape": lambda rows, cols: [1], "base": 1.0}}
ZERO = {"weight_zero_point": {"dtype": "I8", "shape": lambda rows, cols: [rows, 1]}}
MODELS = {
    "gptq": (Gptq(), {}),
    "gptq-v2-partial-group": (Gptq(group=64, version=2), {}),
    "gptq-act-order": (Gptq(order=True), {}),
    "gptq-small-groups": (Gptq(group=16), {}),
    "gptq-odd": (Gptq(group=24), SMALL),
    "gptq-8": (Gptq(bits=8, group=-1, zeros=0x7F7F7F7F), {}),
    "gptq-8-zeros": (Gptq(bits=8, group=32), {}),
    "awq": (Awq(), {}),
    "packed-4": (Packed(), {}),
    "packed-4-zeros-channel": (Packed(group=0, zeros=True), {}),
    "packed-4-act-order": (Packed(order=True), {}),
    "packed-8": (Packed(bits=8, group=32), {}),
    "int8": (Bytes(compressed("int-quantized", fixed(8, "int", "channel")), "I8", "weight_scale",
                   lambda rows, cols: [rows, 1]), {}),
    "int8-zeros": (Bytes(compressed("int-quantized", fixed(8, "int", "channel")), "I8", "weight_scale",
                         lambda rows, cols: [rows, 1], ZERO), {}),
    "fp8-tensor": (Bytes(compressed("float-quantized", fixed(8, "float", "tensor")), "F8_E4M3", "weight_scale",
                         lambda rows, cols: [1], INPUT), {}),
    "fp8-channel": (Bytes(compressed("float-quantized", fixed(8, "float", "channel")), "F8_E4M3", "weight_scale",
                          lambda rows, cols: [rows, 1]), {}),
    "fp8-blocks": (Bytes({"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                          "weight_block_size": [48, 32]}, "F8_E4M3", "weight_scale_inv",
                         lambda rows, cols: [-(-rows // 48), -(-cols // 32)], block=(48, 32)), {}),
}


def make(name, method, changes):
    config = {**llama(**changes)}
    settings = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    parsed = transformers.AutoConfig.for_model("llama", **settings)
    parsed._attn_implementation = "bf16"
    network = transformers.LlamaForCausalLM(parsed).eval().to(torch.float32)
    tensors, codes = {}, {}
    with torch.no_grad():
        for number, (key, parameter) in enumerate(network.named_parameters()):
            shape = tuple(parameter.shape)
            stem = key.removesuffix(".weight")
            if stem.rsplit(".", 1)[-1] in PARTS:
                specs = {f"{stem}.{part}": spec for part, spec in method.tensors(*shape, number).items()}
                codes.update(specs)
                found = {part.removeprefix(f"{stem}."): raw(part, spec) for part, spec in specs.items()}
                weight = method.weight(found, *shape)
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32)))
            else:
                parameter.copy_(values(key, shape, 1.0 if len(shape) == 1 else 0.0))
                tensors[key] = list(shape)
        tokens = [(i * i * 7 + i * 13 + 5) % VOCAB for i in range(TOKENS)]
        logits = network(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    print(f"{name:24} rms {float(np.sqrt((logits**2).mean())):.3f}")
    encoded = base64.b64encode(logits.astype("<f2").tobytes()).decode()
    config["quantization_config"] = method.config
    return {"config": config, "tensors": tensors, "codes": codes, "tokens": tokens, "logits_f16": encoded}


def main():
    made = (f"{json.dumps(name)}: {json.dumps(make(name, *entry))}" for name, entry in MODELS.items())
    FIXTURE.write_text("{\n" + ",\n".join(made) + "\n}\n")
    print(f"{FIXTURE}: {FIXTURE.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
