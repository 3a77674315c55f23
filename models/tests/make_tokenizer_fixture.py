"""Makes fixtures/tokenizer_smollm2.json: token ids of awkward texts as llama.cpp (PyPI `xllamacpp`) gives them.

    pip install xllamacpp
    python models/tests/make_tokenizer_fixture.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

import json
import pathlib
import random
import sys
import urllib.request

import xllamacpp

HAND = [
    "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\r", "\t", "\t\t", " \n", "\n ", " \n \n ", "\t\n\t", "\u00a0",
    "\u00a0\u00a0x", "\u3000\u3000漢", "\u2028", "\u0085x", "\v\f", "a", " a", "a ", "  a  ", "a  b", "a   b    c",
    "Hello, world!", "hello world", "HELLO WORLD", "Hello  World  ", "  leading", "trailing   ", "a\nb", "a\n\nb",
    "a \n b", "a\r\nb\r\n\r\nc", "x\n\n\n\n\ny", "tab\tseparated\tvalues", "mixed \t \n \t end",
    # digits, which this vocabulary splits one by one
    "0", "12", "123", "1234567890", "3.14159", "-1e-10", "1,000,000", "a1b2c3", "v2.0.1", "0x7fff", "99 bottles",
    " 1 22 333", "²³¹½¾", "٠١٢٣", "१२३४", "Ⅷ Ⅻ", "①②③", "１２３", "1\u0301", "2024-01-31T23:59:59Z",
    # contractions
    "I'm you're he's we've they'll I'd don't", "I'M YOU'RE HE'S", "'s 't 're", "it''s", "rock'n'roll", "’s it’s",
    "'S'T'RE'VE'M'LL'D", "o'clock", "'tis 'twas",
    # punctuation and code
    "!!!", "...", "…", "?!?!", "--", "---", "==", "!=", "<=>", "a_b_c", "__init__", "foo.bar(baz)", "x+=1;", "{}[]()",
    "fn main() {\n    println!(\"{}\", 1);\n}\n", "def f(x):\n\treturn x**2  # comment\n",
    "<html>\n  <body class='x'>&nbsp;</body>\n</html>", "SELECT * FROM t WHERE a='b';", "#include <stdio.h>\n",
    "if (a&&b||!c) return ~d^e;", "C:\\Users\\x\\n", "$HOME/.config", "https://example.org/a?b=c&d=%20#frag",
    "user@example.org", "a/b/c/../d", "\\u0041\\n\\t", "```python\nprint('hi')\n```", "| a | b |\n|---|---|",
    "    four spaces", "        eight", "\tone tab\n\t\ttwo tabs", "x = {'a': [1, 2, {'b': None}]}",
    # scripts
    "日本語のテキスト", "中文字符，测试。", "한국어 텍스트", "これは\nテスト", "日本 語", "漢字かなカナ混じり文123",
    "Привет, мир!", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم", "مَرْحَبًا", "नमस्ते दुनिया", "สวัสดีชาวโลก",
    "ሰላም ልዑል", "გამარჯობა", "Բարեւ աշխարհ", "ᏣᎳᎩ", "ᠮᠣᠩᠭᠣᠯ", "བོད་ཡིག", "தமிழ்", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "𐐷𐐲", "𠀀𠮷",
    "ⵜⴰⵎⴰⵣⵉⵖⵜ", "Zażółć gęślą jaźń", "ÀÉÎÕÜ àéîõü", "ß ẞ ſ", "ı İ i I", "Ǆ ǅ ǆ", "ﬁ ﬂ ﬀ",
    "right\u202eleft\u202c mixed \u200fRTL\u200e", "abc שלום 123 مرحبا def",
    # combining marks and invisible characters
    "e\u0301", "é", "a\u0300\u0301\u0302\u0303", "n\u0303o", "Z\u0351\u036b\u0343\u032ca\u0300l\u0334go",
    "zero\u200bwidth", "zero\u200cnon\u200djoin", "\ufeffBOM", "soft\u00adhyphen", "word\u2060joiner", "\u200b", "\u200d",
    "a\u0000b", "\u0000", "\u0001\u0002\u001f\u007f", "\u0080\u009f", "\ufffd", "\ufffd\ufffd a", "\uffff", "\U0010ffff",
    "\ue000private", "\U000e0041tag",
    # emoji
    "😀", "😀😀", " 😀 ", "👍🏽", "👍🏻👍🏼👍🏽👍🏾👍🏿", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷🇯🇵", "🇩", "❤️", "❤", "☺️☹", "1️⃣2️⃣", "#️⃣",
    "👩🏽‍🚀 in space", "🤷🏿‍♀️", "text😀text", "😀1😀2", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "☠️⚡️♾️",
    # control tokens spelled out
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_start|>", " <|im_end|> ", "<|im_start", "im_start|>", "<|im_start|", "<<|im_start|>>",
    "<|IM_START|>", "<|im_ start|>", "<repo_name>", "<reponame>x", "<file_sep>", "<filename>a.py<gh_stars>10",
    "<issue_start>bug<issue_comment>fix<issue_closed>", "<jupyter_start><jupyter_text>", "<empty_output>",
    "a<|endoftext|>b", "<|endoftext|>\n", "\n<|endoftext|>", "<|im_start|> 123", "<|im_start|>\u00e9",
    "<s>", "</s>", "[INST] x [/INST]", "<0x0A>", "<unk>", "<|eot_id|>", "▁▁x", "Ġword Ċ",
    # invalid UTF-8, as it reaches a tokenizer: replaced
    b"\xff\xfe".decode("utf-8", "replace"), b"a\xc3(b".decode("utf-8", "replace"),
    b"\xe2\x82".decode("utf-8", "replace"), b"\xf0\x9f\x98x".decode("utf-8", "replace"),
    b"\xed\xa0\x80".decode("utf-8", "replace"), b"ok\x80\x80ok".decode("utf-8", "replace"),
    # long
    "a" * 300, "ab" * 200, "x" * 2000, "é" * 150, "漢" * 120, " " * 100, " " * 101 + "x", "\n" * 70, "=" * 120,
    "-_" * 80, "1" * 200, "😀" * 40, "word " * 120, "supercalifragilisticexpialidocious" * 10,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light.",
]

PIECES = [
    " ", "  ", "   ", "\n", "\r\n", "\t", "a", "the", " the", "Word", "'s", "'LL", "1", "42", " 7", ".", ",", "!", "…", "—",
    "é", "e\u0301", "漢", "字", "の", "한", "ש", "م", "ا", "न", "😀", "👍🏽", "\u200d", "\u200b", "\u00a0", "\u3000", "_", "{", "}",
    "<|", "|>", "<|im_start|>", "<|im_end|>", "\ufffd", "\u0000", "ß", "ǅ", "²", "½", "\u0301", "->", "::", "//", "\\", "\"",
]


def corpus():
    texts = list(HAND)
    rng = random.Random(20240131)
    for _ in range(120):
        texts.append("".join(rng.choice(PIECES) for _ in range(rng.randrange(2, 25))))
    # Any character at all, surrogates aside.
    for _ in range(60):
        codes = [rng.randrange(1, rng.choice([0x80, 0x800, 0x10000, 0x110000])) for _ in range(rng.randrange(1, 20))]
        texts.append("".join(chr(c) for c in codes if not 0xD800 <= c <= 0xDFFF))
    seen = set()
    return [t for t in texts if not (t in seen or seen.add(t))]


def main():
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    server = xllamacpp.Server(params)

    def tokenize(text, parse_special):
        body = json.dumps({"content": text, "add_special": True, "parse_special": parse_special}).encode()
        request = urllib.request.Request(
            server.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)["tokens"]

    cases = [{"text": t, "plain": tokenize(t, False), "special": tokenize(t, True)} for t in corpus()]
    path = pathlib.Path(__file__).parent / "fixtures" / "tokenizer_smollm2.json"
    lines = ",\n".join(json.dumps(case, ensure_ascii=True, separators=(",", ":")) for case in cases)
    path.write_text("[\n" + lines + "\n]\n")
    print(len(cases), "texts →", path)


main()
