"""Makes fixtures/vocabularies.json: small trained vocabularies of every kind, and the ids that PyPI's `tokenizers` and
`sentencepiece` cut the texts of tokenizer_smollm2.json into, for every published way of splitting words. Of the ids only
a hash is kept, FNV-1a over little-endian u32; `TEXT` as an argument prints the pieces of one text under every rule.

    pip install tokenizers sentencepiece protobuf
    python models/tests/make_vocabulary_fixture.py [TEXT]
"""

import io
import json
import pathlib
import struct
import sys
import tempfile

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
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
# Letters of scripts with capitals.
DEEPSEEK_LETTERS = (
    r"\s?[A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d"
    "\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]+")
# The letters that Kimi takes together are no Han characters.
KIMI = ("|".join([r"[\p{Han}]+", *(part.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]") + SUFFIX for part in CASED)])
        + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SEED = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
BAILING = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
           r"|\s+(?!\S)|\s+")
EXAONE_MOE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+")
MINICPM5 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")
UFAKZEKA = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# llama.cpp's, for files that name no rule.
DEFAULT = [r"[\p{P}\$\+<=>\^~\|]+",
           r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", r"\p{N}+", "[0-9][0-9][0-9]"]
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
    "viking": split(BLOOM, r"\p{N}"),
    "kimi-k2": split(KIMI),
    "seed-coder": split(SEED),
    "bailingmoe": split(BAILING),
    "exaone-moe": split(EXAONE_MOE),
    "minicpm5": split(r"\p{N}{1,3}", MINICPM5),
    "laguna": split(r"[^\n]+|\n+", QWEN2),
    "ufakzeka": split(UFAKZEKA),
    "default": split(*DEFAULT),
    "deepseek-llm": split(r"[\r\n]", DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$",
                          "[一-龥ࠀ-一가-퟿]+", r"\p{N}+"),
}
WHOLE_WORDS = ["llama-bpe", "tekken", "minicpm5"]


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


# Few, where the published tables have thousands: ligatures, full width, what blanks there are beside the blank.
NORMALIZATION = {"ﬁ": "fi", "Ａ": "A", "１": "1", "\n": " ", "\t": " ", "\u3000": " ", "e\u0301": "é", "™": "TM", "\u200b": ""}


def unigrams(corpus, prefix, merging, bytes_too):
    written = io.BytesIO()
    lines = [line for text in corpus for line in text.split("\n") if line.strip()]
    options = {}
    with tempfile.TemporaryDirectory() as scratch:
        if merging:
            rules = pathlib.Path(scratch) / "rules.tsv"
            points = lambda text: " ".join(f"{ord(c):X}" for c in text)
            rules.write_text("".join(f"{points(a)}\t{points(b)}\n" for a, b in NORMALIZATION.items()))
            options["normalization_rule_tsv"] = str(rules)
        else:
            options["normalization_rule_name"] = "identity"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines * 3), model_writer=written, model_type="unigram", vocab_size=900,
            byte_fallback=bytes_too, add_dummy_prefix=prefix, remove_extra_whitespaces=merging, character_coverage=0.98,
            minloglevel=2, num_threads=1, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, **options)
    proto = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    pieces = proto.pieces
    # Sums of log-probabilities in 64 bits, as llama.cpp and `tokenizers` add them: sentencepiece's own, in 32, decide some
    # ties otherwise. It normalises; nothing but normal pieces and bytes may be met in a text.
    vocab = [(piece.piece if piece.type in (1, 6) else f"\0{i}", piece.score) for i, piece in enumerate(pieces)]
    likeliest = models.Unigram(vocab, 2, bytes_too)
    # Which take a byte's spelling in a text for the byte, as sentencepiece does not.
    exact = lambda text: [token.id for token in likeliest.tokenize(model.normalize(text))]
    encoded = [model.encode(text) if "<0x" in text else exact(text) for text in corpus]
    print(f"{sum(a != model.encode(text) for a, text in zip(encoded, corpus))} texts of {len(corpus)} are ties in 32 bits")
    return {"tokens": [piece.piece for piece in pieces], "scores": [piece.score for piece in pieces],
            "kinds": [piece.type for piece in pieces], "add_space_prefix": prefix, "remove_extra_whitespaces": merging,
            "charsmap": list(proto.normalizer_spec.precompiled_charsmap), "ids": hashes(encoded)}


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
               "unigram": [unigrams(corpus, True, False, False), unigrams(corpus, False, False, True),
                           unigrams(corpus, True, True, False)],
               "word_piece": [word_pieces(corpus, True), word_pieces(corpus, False)]}
    path = FIXTURES / "vocabularies.json"
    path.write_text(json.dumps(fixture, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(len(corpus), "texts →", path, path.stat().st_size, "bytes")


main()
