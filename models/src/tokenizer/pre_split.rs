//! How byte-level BPE vocabularies cut text into words before merging, by the name GGUF gives the rule.
//!
//! The published patterns end in `\s+(?!\S)|\s+`: a run of blanks leaves its last one to the word that follows. A
//! look-ahead needs a backtracking engine, whose limits and worst cases a hostile text can reach; so the patterns
//! here end in `\s+` alone, matched in linear time, and [`Blanks`] says how a run's last blank is given back.

use regex::Regex;

/// What a match that is all blanks, with a word right after it, leaves to that word.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Blanks {
    /// Its last character.
    LeaveLast,
    /// Its last character, unless that is a line break: then another branch of the pattern matched.
    LeaveLastUnlessBreak,
    /// Nothing.
    Keep,
}

/// One pass over the text: every match becomes a piece, and so does all that lies between two matches.
struct Pass {
    regex: Regex,
    blanks: Blanks,
}

/// A named rule: its passes, each over the pieces of the one before.
pub(super) struct PreSplit {
    passes: Vec<Pass>,
    /// A word that is a token as it stands is not merged.
    pub ignore_merges: bool,
    /// Whether texts begin with BOS where the file does not say.
    pub add_bos: bool,
}

const CONTRACTIONS: &str = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]";
/// A word as GPT-4o's family cuts it: capitals, then small letters, with at most one other character before.
const CASED_WORD: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+";
const CAPITALS: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+"##;
/// Letters of scripts with capitals, as DeepSeek's first vocabulary lists them.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[A-Za-z",
    r"\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373",
    r"\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481",
    r"\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf",
    r"\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d",
    r"\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4",
    r"\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107",
    r"\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f",
    r"\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d",
    r"\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17",
    r"\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb",
    r"\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943",
    r"]+"
);
const DEEPSEEK_HAN: &str = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+";

/// A rule and the names it goes by in `tokenizer.ggml.pre`.
struct Rule {
    names: &'static [&'static str],
    passes: fn() -> Vec<(String, Blanks)>,
    ignore_merges: bool,
    add_bos: bool,
}

impl Rule {
    const fn new(names: &'static [&'static str], passes: fn() -> Vec<(String, Blanks)>) -> Rule {
        Rule { names, passes, ignore_merges: false, add_bos: false }
    }
}

fn gpt2() -> (String, Blanks) {
    (GPT2.to_owned(), Blanks::LeaveLast)
}

fn keep(pattern: &str) -> (String, Blanks) {
    (pattern.to_owned(), Blanks::Keep)
}

/// The family of llama 3's pattern, which differs in how letters and digits group.
fn modern(letters: &str, digits: &str, others: &str, breaks: &str) -> (String, Blanks) {
    (format!("(?:{CONTRACTIONS})|{letters}|{digits}|{others}|{breaks}|\\s+"), Blanks::LeaveLastUnlessBreak)
}

const LETTERS: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+";
const OTHERS: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*";
const BREAKS: &str = r"\s*[\r\n]+";

/// The family of GPT-4o's pattern, whose words carry their contraction if `suffix` says so.
fn cased(suffix: &str, digits: &str) -> (String, Blanks) {
    (
        format!(r"{CASED_WORD}{suffix}|{CAPITALS}{suffix}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+"),
        Blanks::LeaveLastUnlessBreak,
    )
}

const RULES: [Rule; 22] = [
    Rule::new(&["default"], || vec![keep(r"[\p{P}$+<=>^~|]+"), gpt2(), keep(r"\p{N}+"), keep("[0-9][0-9][0-9]")]),
    Rule::new(
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "exaone4",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v1-en",
            "jina-v2-code",
            "roberta-bpe",
        ],
        || vec![gpt2()],
    ),
    Rule::new(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        || vec![keep(r"\p{N}"), gpt2()],
    ),
    Rule {
        ignore_merges: true,
        add_bos: true,
        ..Rule::new(
            &[
                "llama-bpe",
                "llama3",
                "llama-v3",
                "falcon3",
                "falcon-h1",
                "pixtral",
                "midm-2.0",
                "lfm2",
                "jina-v5-nano",
            ],
            || vec![modern(LETTERS, r"\p{N}{1,3}", OTHERS, BREAKS)],
        )
    },
    Rule::new(&["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], || {
        vec![modern(LETTERS, r"\p{N}{1,3}", OTHERS, BREAKS)]
    }),
    Rule::new(
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "stablelm2",
            "megrez",
            "hunyuan",
            "solar-open",
            "grok-2",
            "kormo",
            "f2llmv2",
        ],
        || vec![modern(LETTERS, r"\p{N}", OTHERS, BREAKS)],
    ),
    Rule::new(&["qwen35"], || {
        vec![modern(r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", BREAKS)]
    }),
    Rule::new(&["laguna"], || vec![keep(r"[^\n]+|\n+"), modern(LETTERS, r"\p{N}", OTHERS, BREAKS)]),
    Rule::new(&["seed-coder"], || vec![modern(LETTERS, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", BREAKS)]),
    Rule::new(&["bailingmoe", "bailingmoe2", "llada-moe"], || {
        vec![modern(LETTERS, r"\p{N}", OTHERS, r"\s*[\r\n]")]
    }),
    Rule::new(&["exaone-moe"], || {
        vec![modern(
            r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
            r"\p{N}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
            r"\s*[\r\n]",
        )]
    }),
    Rule {
        ignore_merges: true,
        ..Rule::new(&["minicpm5"], || vec![keep(r"\p{N}{1,3}"), modern(LETTERS, r"\p{N}+", OTHERS, BREAKS)])
    },
    Rule::new(&["deepseek-llm"], || {
        vec![
            keep(r"[\r\n]"),
            keep(DEEPSEEK_LETTERS),
            keep(r"\s?[!-/:-\x7e\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
            keep(r"\s+$"),
            keep(DEEPSEEK_HAN),
            keep(r"\p{N}+"),
        ]
    }),
    Rule::new(&["deepseek-coder"], || {
        vec![keep(r"[\r\n]"), keep(r"\s?\p{L}+"), keep(r"\s?\p{P}+"), keep(DEEPSEEK_HAN), keep(r"\p{N}")]
    }),
    Rule::new(&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], || {
        vec![
            keep(r"\p{N}{1,3}"),
            keep(r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
            (DEEPSEEK3.to_owned(), Blanks::LeaveLastUnlessBreak),
        ]
    }),
    Rule::new(&["falcon"], || vec![keep(r"[\p{P}$+<=>^~|`]+"), gpt2(), keep("[0-9][0-9][0-9]")]),
    Rule { ignore_merges: true, add_bos: true, ..Rule::new(&["tekken"], || vec![cased("", r"\p{N}")]) },
    Rule::new(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], || {
        vec![cased(&format!("(?:{CONTRACTIONS})?"), r"\p{N}{1,3}")]
    }),
    Rule::new(&["kimi-k2"], || {
        // Runs of Han characters are words of their own; letters of other words are none.
        let suffix = format!("(?:{CONTRACTIONS})?");
        let without_han = |part: &str| part.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]");
        let (cased, capitals) = (without_han(CASED_WORD), without_han(CAPITALS));
        let pattern =
            format!(r"\p{{Han}}+|{cased}{suffix}|{capitals}{suffix}|\p{{N}}{{1,3}}|{OTHERS}|{BREAKS}|\s+");
        vec![(pattern, Blanks::LeaveLastUnlessBreak)]
    }),
    Rule::new(&["poro-chat", "bloom", "gpt3-finnish"], || vec![keep(r" ?[^(\s|.,!?…。，、।۔،)]+")]),
    Rule::new(&["viking"], || vec![keep(r" ?[^(\s|.,!?…。，、।۔،)]+"), keep(r"\p{N}")]),
    Rule::new(&["ufakzeka"], || {
        vec![(format!(r"{LETTERS}|\p{{N}}|{OTHERS}|{BREAKS}|\s+"), Blanks::LeaveLastUnlessBreak)]
    }),
];

impl PreSplit {
    /// The rule called `name`, or an error naming it and all known ones.
    pub fn named(name: &str) -> Result<PreSplit, String> {
        let rule = RULES.iter().find(|rule| rule.names.contains(&name)).ok_or_else(|| {
            let mut known: Vec<&str> = RULES.iter().flat_map(|rule| rule.names).copied().collect();
            known.sort_unstable();
            format!(
                "tokenizer.ggml.pre is {name:?}, a way of splitting words that is not supported; known are {}",
                known.join(", ")
            )
        })?;
        let passes = (rule.passes)().into_iter().map(|(pattern, blanks)| {
            let regex = Regex::new(&pattern).map_err(|e| format!("the pattern of {name}: {e}"))?;
            Ok(Pass { regex, blanks })
        });
        Ok(PreSplit {
            passes: passes.collect::<Result<_, String>>()?,
            ignore_merges: rule.ignore_merges,
            add_bos: rule.add_bos,
        })
    }

    /// Calls `each` with the words of `text`, in order; together they are the whole text.
    pub fn words<'a>(&self, text: &'a str, each: &mut impl FnMut(&'a str)) {
        fn descend<'a>(passes: &[Pass], text: &'a str, each: &mut dyn FnMut(&'a str)) {
            match passes.split_first() {
                None => each(text),
                Some((pass, rest)) => pass.pieces(text, &mut |piece| descend(rest, piece, each)),
            }
        }
        if !text.is_empty() {
            descend(&self.passes, text, each);
        }
    }
}

impl Pass {
    fn pieces<'a>(&self, text: &'a str, each: &mut dyn FnMut(&'a str)) {
        let mut done = 0;
        while let Some(found) = self.regex.find_at(text, done) {
            let end = found.end() - self.left_to_next_word(text, found.as_str(), found.end());
            if found.start() > done {
                each(&text[done..found.start()]);
            }
            each(&text[found.start()..end]);
            done = end;
        }
        if done < text.len() {
            each(&text[done..]);
        }
    }

    /// Bytes at the end of the match `blanks` that belong to the word after it.
    fn left_to_next_word(&self, text: &str, blanks: &str, end: usize) -> usize {
        if self.blanks == Blanks::Keep || end == text.len() {
            return 0;
        }
        // A match of blanks begins and ends with one, whatever branch it came from, and no other match does both.
        let Some(last) = blanks.chars().next_back().filter(|c| c.is_whitespace()) else {
            return 0;
        };
        let line_break = last == '\n' || last == '\r';
        if (line_break && self.blanks == Blanks::LeaveLastUnlessBreak)
            || blanks.len() == last.len_utf8()
            || !blanks.starts_with(char::is_whitespace)
            || blanks.chars().any(|c| !c.is_whitespace())
        {
            return 0;
        }
        last.len_utf8()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(rule: &str, text: &str) -> Vec<String> {
        let mut words = Vec::new();
        PreSplit::named(rule).unwrap().words(text, &mut |word| words.push(word.to_owned()));
        assert_eq!(words.concat(), text, "{rule} loses text");
        words
    }

    #[test]
    fn every_rule_compiles_and_keeps_the_text() {
        let text = "I'LL say: héllo\u{301}  wörld12345!\r\n\r\n\t x  \n日本語とEnglish…  $3.14<=>|~ don't  ";
        for name in RULES.iter().flat_map(|rule| rule.names) {
            words(name, text);
            words(name, "");
        }
    }

    #[test]
    fn names_are_unique() {
        let names: Vec<_> = RULES.iter().flat_map(|rule| rule.names).collect();
        let unique: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(names.len(), unique.len());
    }

    #[test]
    fn splits_as_the_published_patterns_do() {
        let check = |rule: &str, text: &str, expected: &[&str]| {
            assert_eq!(words(rule, text), expected, "{rule} on {text:?}");
        };
        check("gpt-2", "it's  a 12", &["it", "'s", " ", " a", " 12"]);
        check("gpt-2", "a \n\n b", &["a", " \n\n", " b"]);
        check("gpt-2", "a\n\nb", &["a", "\n", "\n", "b"]);
        check("gpt-2", "end   ", &["end", "   "]);
        check("gpt-2", "a\u{3000}\u{3000}b", &["a", "\u{3000}", "\u{3000}", "b"]);
        check("smollm", "a 123", &["a", " ", "1", "2", "3"]);
        check("smollm", "x   7", &["x", "   ", "7"]);
        check("llama-bpe", "IT'S 12345", &["IT", "'S", " ", "123", "45"]);
        check("llama-bpe", "a \n\n b", &["a", " \n\n", " b"]);
        check("llama-bpe", "a   b", &["a", "  ", " b"]);
        check("llama-bpe", "a\n  b", &["a", "\n", " ", " b"]);
        check("llama-bpe", "f(x);\n\ny", &["f", "(x", ");\n\n", "y"]);
        check("qwen2", "12", &["1", "2"]);
        check("gpt-4o", "HelloWorld it's", &["Hello", "World", " it's"]);
        check("tekken", "HelloWorld it's", &["Hello", "World", " it", "'s"]);
        check("deepseek-llm", "ab 漢字12", &["ab", " ", "漢字", "12"]);
        check("deepseek-v3", "1234漢字.abc", &["123", "4", "漢字", ".abc"]);
        check("default", "1234 ok", &["123", "4", " ok"]);
    }

    #[test]
    fn an_unknown_rule_is_named_with_the_known_ones() {
        let message = PreSplit::named("zebra").err().unwrap();
        assert!(message.contains("\"zebra\"") && message.contains("llama-bpe"), "{message}");
    }

    #[test]
    fn long_runs_take_linear_time() {
        for text in [" ".repeat(2_000_000), "a ".repeat(500_000) + "x", "\n \n ".repeat(300_000)] {
            let started = std::time::Instant::now();
            words("llama-bpe", &text);
            words("gpt-2", &text);
            assert!(started.elapsed().as_secs() < 10);
        }
    }
}
