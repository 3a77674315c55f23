"""Makes fixtures/vocabularies.json: small trained vocabularies of every kind, and the ids that PyPI's `tokenizers` and
`sentencepiece` cut the texts of tokenizer_smollm2.json into, for every published way of splitting words. Of the ids only
a hash is kept, FNV-1a over little-endian u32; `TEXT` as an argument prints the pieces of one text under every rule.

    pip install tokenizers sentencepiece
    python models/tests/make_vocabulary_fixture.py [TEXT]
"""

import io
import json
import pathlib
import struct
import sys

import sentencepiece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
TEXT_BYTES_MAX = 400

# As the models' own tokenizer.json files have them.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CASED = [r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"]
CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
TEKKEN = "|".join(CASED) + r"|\p{N}" + CASED_REST
GPT4O = "|".join(part + SUFFIX for part in CASED) + r"|\p{N}{1,3}" + CASED_REST
DEEPSEEK3 = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
             r"|\s*[\r\n]+|\s+(?!\S)|\s+")
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False)]


def split(*patterns):
    """Each pattern over the pieces of the one before, then bytes as letters."""
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


RULES = {
    "gpt-2": GPT2,
    "smollm": [pre_tokenizers.Digits(individual_digits=True), *GPT2],
    "starcoder": [pre_tokenizers.Digits(individual_digits=True), *GPT2],
    "llama-bpe": split(LLAMA3),
    "dbrx": split(LLAMA3),
    "qwen2": split(QWEN2),
    "qwen35": split(QWEN35),
    "tekken": split(TEKKEN),
    "gpt-4o": split(GPT4O),
    "deepseek-coder": split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-v3": split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3),
    "falcon": [pre_tokenizers.Punctuation("contiguous"), *GPT2,
               pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")],
    "bloom": split(BLOOM),
}
WHOLE_WORDS = ["llama-bpe", "tekken"]


def texts():
    cases = json.loads((FIXTURES / "tokenizer_smollm2.json").read_text())
    return [case["text"] for case in cases if len(case["text"].encode()) <= TEXT_BYTES_MAX]


def hashes(encoded):
    def of(ids):
        value = 0xCBF29CE484222325
        for byte in b"".join(struct.pack("<I", i) for i in ids):
            value = (value ^ byte) * 0x100000001B3 % 2**64
        return f"{value:016x}"

    return " ".join(of(ids) for ids in encoded)


def byte_pairs(corpus):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split(LLAMA3))
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(corpus * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    rules = {}
    for name, parts in RULES.items():
        pairs = [tuple(merge.split(" ")) for merge in merges]
        tokenizer.model = models.BPE(vocab=model["vocab"], merges=pairs, ignore_merges=name in WHOLE_WORDS)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        rules[name] = hashes(tokenizer.encode(text).ids for text in corpus)
    return {"tokens": tokens, "merges": merges, "rules": rules}


def sentence_pieces(corpus, prefix):
    written = io.BytesIO()
    # Blanks and line breaks are what the format's own trainer drops; the encoder keeps them.
    lines = [line for text in corpus for line in text.split("\n") if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3), model_writer=written, model_type="bpe", vocab_size=1400, byte_fallback=True,
        add_dummy_prefix=prefix, remove_extra_whitespaces=False, normalization_rule_name="identity",
        character_coverage=0.98, minloglevel=2, allow_whitespace_only_pieces=True, num_threads=1, split_digits=True)
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    kind = lambda i: 6 if model.is_byte(i) else 3 if model.is_control(i) else 2 if model.is_unknown(i) else 1
    ids = range(model.get_piece_size())
    tokens = [model.id_to_piece(i) for i in ids]
    return {"tokens": tokens, "scores": [model.get_score(i) for i in ids], "kinds": [kind(i) for i in ids],
            "add_space_prefix": prefix, "ids": hashes(model.encode(text) for text in corpus)}


def word_pieces(corpus, lowercase):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=10**6))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(corpus * 3, trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=specials, show_progress=False, limit_alphabet=150))
    vocab = tokenizer.get_vocab()
    # As llama.cpp's converter spells them.
    spell = lambda token: token if token in specials else token[2:] if token.startswith("##") else "▁" + token
    return {"tokens": [spell(token) for token in sorted(vocab, key=vocab.get)], "lowercase": lowercase,
            "ids": hashes(tokenizer.encode(text).ids for text in corpus)}


def main():
    if len(sys.argv) > 1:
        for name, parts in RULES.items():
            print(f"{name:16}", [piece for piece, _ in pre_tokenizers.Sequence(parts).pre_tokenize_str(sys.argv[1])])
        return
    corpus = texts()
    fixture = {"text_bytes_max": TEXT_BYTES_MAX, "bpe": byte_pairs(corpus),
               "spm": [sentence_pieces(corpus, True), sentence_pieces(corpus, False)],
               "word_piece": [word_pieces(corpus, True), word_pieces(corpus, False)]}
    path = FIXTURES / "vocabularies.json"
    path.write_text(json.dumps(fixture, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(len(corpus), "texts →", path, path.stat().st_size, "bytes")


main()
