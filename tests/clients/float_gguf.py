"""A GGUF file's llama weights in bf16, and what they compute: numpy alone, sharing nothing with rill but the file.

usage: float_gguf.py SOURCE.gguf TARGET.gguf LAYERS
       (writes the target: the source's first layers, dequantised and rounded to bf16)
"""
import struct
import sys

import numpy

ALIGNMENT = 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
F32, Q4_1, Q8_0, BF16 = 0, 3, 8, 30


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, form):
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def text(self):
        length = self.take("Q")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode()

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:
            kind, count = self.take("I"), self.take("Q")
            return [self.value(kind) for _ in range(count)]
        return self.take(SCALARS[kind])


class Gguf:
    """Metadata and tensors; `prefix` is the file up to the tensors' descriptions."""

    def __init__(self, path):
        self.data = numpy.memmap(path, mode="r")
        reader = Reader(self.data)
        assert reader.take("4s") == b"GGUF" and reader.take("I") == 3
        tensors, count = reader.take("Q"), reader.take("Q")
        self.metadata = {}
        for _ in range(count):
            key = reader.text()
            self.metadata[key] = reader.value(reader.take("I"))
        self.prefix = bytes(self.data[: reader.at])
        self.tensors = {}
        for _ in range(tensors):
            name = reader.text()
            shape = [reader.take("Q") for _ in range(reader.take("I"))]
            self.tensors[name] = (shape, reader.take("I"), reader.take("Q"))
        self.start = -(-reader.at // ALIGNMENT) * ALIGNMENT

    def tensor(self, name):
        """In f32, rows first."""
        shape, kind, offset = self.tensors[name]
        count = int(numpy.prod(shape))
        raw = self.data[self.start + offset :]
        if kind == F32:
            values = raw[: 4 * count].view(numpy.float32)
        elif kind == BF16:
            values = (raw[: 2 * count].view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)
        elif kind == Q8_0:
            blocks = raw[: count // 32 * 34].reshape(-1, 34)
            scale = blocks[:, :2].copy().view(numpy.float16).astype(numpy.float32)
            values = blocks[:, 2:].copy().view(numpy.int8).astype(numpy.float32) * scale
        elif kind == Q4_1:
            blocks = raw[: count // 32 * 20].reshape(-1, 20)
            scale = blocks[:, :4].copy().view(numpy.float16).astype(numpy.float32)
            packed = blocks[:, 4:]
            values = numpy.concatenate([packed & 15, packed >> 4], 1) * scale[:, :1] + scale[:, 1:]
        else:
            raise ValueError(f"{name}: type {kind}")
        return numpy.asarray(values, numpy.float32).reshape(shape[::-1])


def round_bf16(values):
    bits = numpy.ascontiguousarray(values, numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(numpy.float32)


def write_bf16(source, target, layers):
    """The first layers alone: matrices in bf16, vectors in f32."""
    gguf = Gguf(source)
    prefix = bytearray(gguf.prefix)
    count_at = prefix.index(b"llama.block_count") + len(b"llama.block_count") + 4
    struct.pack_into("<I", prefix, count_at, layers)
    kept = [name for name in gguf.tensors if not name.startswith("blk.") or int(name.split(".")[1]) < layers]
    struct.pack_into("<Q", prefix, 8, len(kept))
    infos, parts, offset = b"", [], 0
    for name in kept:
        shape, values = gguf.tensors[name][0], gguf.tensor(name)
        kind = BF16 if len(shape) > 1 else F32
        bits = round_bf16(values).view(numpy.uint32) >> 16
        part = bits.astype(numpy.uint16).tobytes() if kind == BF16 else values.tobytes()
        infos += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)
        part += bytes(-len(part) % ALIGNMENT)
        parts.append(part)
        offset += len(part)
    head = bytes(prefix) + infos
    with open(target, "wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for part in parts:
            file.write(part)


class FloatLlama:
    """The architecture in f32, but that attention multiplies what is rounded to bf16, as rill's does: queries, keys, values
    and, before they are divided by their sum, the shares of up to 64 tokens."""

    def __init__(self, path):
        gguf = Gguf(path)
        of = lambda key: gguf.metadata["llama." + key]  # noqa: E731
        self.heads, self.kv_heads = of("attention.head_count"), of("attention.head_count_kv")
        self.eps, self.base = of("attention.layer_norm_rms_epsilon"), of("rope.freq_base")
        self.layers = of("block_count")
        self.width = of("embedding_length") // self.heads
        self.weights = {name: gguf.tensor(name) for name in gguf.tensors}

    def norm(self, x, name):
        mean = numpy.mean(numpy.square(x, dtype=numpy.float64), axis=-1, keepdims=True)
        return (x / numpy.sqrt(mean + self.eps)).astype(numpy.float32) * self.weights[name]

    def rotate(self, x):
        """Pairs of neighbours, as GGUF files of llama have them. `x` is [tokens, heads, width]."""
        half = numpy.arange(0, self.width, 2) / self.width
        angle = numpy.arange(len(x))[:, None, None] / self.base**half
        cos, sin = numpy.cos(angle).astype(numpy.float32), numpy.sin(angle).astype(numpy.float32)
        even, odd = x[..., ::2], x[..., 1::2]
        return numpy.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    def logprobs(self, tokens):
        """Row i: log-probabilities of what follows tokens[..=i]; no more than 64 tokens."""
        assert len(tokens) <= 64
        w, count = self.weights, len(tokens)
        x = w["token_embd.weight"][tokens]
        hidden = numpy.triu(numpy.full((count, count), -numpy.inf, numpy.float32), 1)
        group = self.heads // self.kv_heads
        for layer in range(self.layers):
            of = lambda part: w[f"blk.{layer}.{part}.weight"]  # noqa: E731, B023
            normed = self.norm(x, f"blk.{layer}.attn_norm.weight")
            split = lambda part: (normed @ of(part).T).reshape(count, -1, self.width)  # noqa: E731, B023
            q = round_bf16(self.rotate(split("attn_q")))
            k = numpy.repeat(round_bf16(self.rotate(split("attn_k"))), group, 1)
            v = numpy.repeat(round_bf16(split("attn_v")), group, 1)
            scores = numpy.einsum("qhd,khd->hqk", q, k) / numpy.sqrt(self.width) + hidden
            shares = numpy.exp(scores - scores.max(-1, keepdims=True))
            mixed = numpy.einsum("hqk,khd->qhd", round_bf16(shares), v)
            mixed = (mixed / shares.sum(-1).T[..., None]).reshape(count, -1).astype(numpy.float32)
            x = x + mixed @ of("attn_output").T
            normed = self.norm(x, f"blk.{layer}.ffn_norm.weight")
            gate = normed @ of("ffn_gate").T
            x = x + (gate / (1 + numpy.exp(-gate)) * (normed @ of("ffn_up").T)) @ of("ffn_down").T
        output = w.get("output.weight", w["token_embd.weight"])
        logits = (self.norm(x, "output_norm.weight") @ output.T).astype(numpy.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - numpy.log(numpy.exp(logits).sum(-1, keepdims=True))


if __name__ == "__main__":
    write_bf16(*sys.argv[1:3], int(sys.argv[3]))
