#!/usr/bin/env python3
"""Makes fixtures/smollm2_reference.json with llama.cpp: what an independent engine says of the default model's file.

usage: make_reference.py MODEL.gguf   (needs PyPI `xllamacpp`, the prebuilt llama.cpp; pinned in VERSION below)

The fixture holds, for the very file the tests run (its SHA-256 is recorded and checked by the tests):
- `continuations`: greedy continuations of 20 plain and chat prompts, as token ids, with the log-probability gap between
  the best and second-best candidate at each step (a near-tie is where two correct engines may part);
- `positions`: for each position of fixtures/english.txt the ten most likely next tokens with log-probabilities, and
  the log-probability of the token that really follows; `perplexity` is their mean, exponentiated.
Everything runs on one thread, one token at a time after the cached prefix, so that a rerun gives the same file.
"""
import hashlib
import importlib.metadata
import json
import math
import pathlib
import sys
import urllib.request

import xllamacpp

VERSION = "2026.10.11549"
HERE = pathlib.Path(__file__).resolve().parent
CONTINUATION_TOKENS = 64
TOP = 10
POSITIONS_MAX = 1000

PLAIN = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees Celsius because",
    "The quick brown fox",
    "1, 2, 3, 4, 5,",
    "In 1969, the first humans",
    "Ingredients:\n- 2 eggs\n- 1 cup of flour\n",
    "SELECT name, age FROM users WHERE",
    "It was the best of times, it was the worst of times,",
    "Le chat est assis sur",
    "#include <stdio.h>\n\nint main(void) {\n",
]
CHAT = [
    [{"role": "user", "content": "What is the capital of Italy?"}],
    [{"role": "user", "content": "Write a short poem about the rain."}],
    [{"role": "user", "content": "Explain photosynthesis to a child in two sentences."}],
    [
        {"role": "system", "content": "You answer with one word."},
        {"role": "user", "content": "What colour is the sky on a clear day?"},
    ],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "List three prime numbers."}],
    [{"role": "user", "content": "Translate 'good morning' into Spanish. 🌞"}],
    [{"role": "user", "content": "Write a Python function that reverses a string."}],
]


class Reference:
    """llama.cpp's own HTTP server in this process, on loopback, one slot and one thread."""

    def __init__(self, model):
        params = xllamacpp.CommonParams()
        params.model.path = model
        params.n_ctx = 4096
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = 1
        params.cpuparams_batch.n_threads = 1
        params.cache_prompt = True
        params.warmup = False
        params.port = 0
        params.verbosity = -1
        self.server = xllamacpp.Server(params)

    def post(self, path, body):
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)

    def tokenize(self, text, special):
        return self.post("/tokenize", {"content": text, "add_special": False, "parse_special": special})["tokens"]

    def continuation(self, prompt):
        answer = self.post(
            "/completion",
            {
                "prompt": prompt,
                "n_predict": CONTINUATION_TOKENS,
                "temperature": 0,
                "n_probs": 2,
                "ignore_eos": False,
                "return_tokens": True,
                "cache_prompt": False,
                "samplers": ["temperature"],
            },
        )
        steps = answer["completion_probabilities"]
        gaps = []
        for step in steps:
            best, second = (entry["logprob"] for entry in step["top_logprobs"])
            gaps.append(round(best - second, 4))
        return [step["id"] for step in steps], gaps

    def distribution(self, tokens, vocab_size):
        """Log-probabilities of every next token after `tokens`, most likely first."""
        answer = self.post(
            "/completion",
            {
                "prompt": tokens,
                "n_predict": 1,
                "temperature": 0,
                "n_probs": vocab_size,
                "cache_prompt": True,
                "samplers": ["temperature"],
            },
        )
        return [(entry["id"], entry["logprob"]) for entry in answer["completion_probabilities"][0]["top_logprobs"]]


def main():
    model = sys.argv[1]
    found = importlib.metadata.version("xllamacpp")
    if found != VERSION:
        sys.exit(f"xllamacpp {found} is installed and the fixture is made with {VERSION}")
    reference = Reference(model)
    vocab_size = 49152

    continuations = []
    for text in PLAIN:
        prompt = reference.tokenize(text, False)
        tokens, gaps = reference.continuation(prompt)
        continuations.append({"text": text, "prompt": prompt, "tokens": tokens, "gaps": gaps})
    for messages in CHAT:
        text = reference.post("/apply-template", {"messages": messages})["prompt"]
        prompt = reference.tokenize(text, True)
        tokens, gaps = reference.continuation(prompt)
        continuations.append({"messages": messages, "text": text, "prompt": prompt, "tokens": tokens, "gaps": gaps})
        print(f"{len(continuations)} continuations", file=sys.stderr)

    text = (HERE / "fixtures" / "english.txt").read_text()
    tokens = reference.tokenize(text, False)
    positions = []
    for at in range(1, min(len(tokens), POSITIONS_MAX + 1)):
        full = reference.distribution(tokens[:at], vocab_size)
        total = math.fsum(math.exp(logprob) for _, logprob in full)
        if abs(total - 1) > 1e-3 or len(full) != vocab_size:
            sys.exit(f"position {at}: {len(full)} log-probabilities that sum to {total}")
        actual = dict(full)[tokens[at]]
        positions.append(
            {
                "ids": [token for token, _ in full[:TOP]],
                "logprobs": [round(logprob, 5) for _, logprob in full[:TOP]],
                "next": round(actual, 5),
            }
        )
        if at % 100 == 0:
            print(f"{at}/{len(tokens) - 1} positions", file=sys.stderr)

    fixture = {
        "made_by": f"tests/models/make_reference.py, xllamacpp {found}",
        "model_sha256": hashlib.sha256(pathlib.Path(model).read_bytes()).hexdigest(),
        "continuations": continuations,
        "tokens": tokens,
        "positions": positions,
        "perplexity": round(math.exp(-math.fsum(p["next"] for p in positions) / len(positions)), 5),
    }
    out = HERE / "fixtures" / "smollm2_reference.json"
    with out.open("w") as file:
        file.write("{\n")
        for index, (key, value) in enumerate(fixture.items()):
            file.write(("" if index == 0 else ",\n") + f" {json.dumps(key)}: ")
            if isinstance(value, list) and value and isinstance(value[0], dict):
                file.write("[\n  " + ",\n  ".join(json.dumps(v, separators=(",", ":")) for v in value) + "\n ]")
            else:
                file.write(json.dumps(value, separators=(",", ":")))
        file.write("\n}\n")
    print(f"{out}: {len(continuations)} continuations, {len(positions)} positions, perplexity {fixture['perplexity']}")


if __name__ == "__main__":
    main()
