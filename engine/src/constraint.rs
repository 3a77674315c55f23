//! Grammars as masks over the vocabulary: which tokens may come next, computed beside the forward pass.
//!
//! A grammar is a text in llguidance's dialect of Lark (JSON schemas and regular expressions are embedded in it). It is
//! compiled once for a vocabulary; each sequence follows it with a matcher of its own, so that what one sequence has
//! cost is never charged to another and the same tokens always get the same masks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, TokenParser};

use crate::detokenizer::TokenText;

/// Lexer states a grammar may reach in one sequence; a kilobyte or two each.
const LEXER_STATES_MAX: usize = 20_000;
/// Symbols in a grammar's productions.
const GRAMMAR_SYMBOLS_MAX: usize = 200_000;
/// Nodes of regular expressions built before the first token; some 50 thousand a millisecond.
const LEXER_FUEL_MAX: u64 = 1_000_000;

/// A grammar cannot be used; says why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(pub String);

/// Compiles grammars for one vocabulary. Building it walks the whole vocabulary: once a model.
pub struct GrammarCompiler {
    factory: ParserFactory,
}

/// A compiled grammar. Cheap to clone.
#[derive(Clone)]
pub struct Grammar {
    parser: Arc<TokenParser>,
    /// End-of-sequence ids: what the grammar is ended by.
    end_tokens: Arc<[u32]>,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("Grammar")
    }
}

impl GrammarCompiler {
    /// For a model whose logits rows are `vocab_size` wide. `end_token_ids` end a generation once the grammar may end.
    ///
    /// # Errors
    /// No end token, or one outside the vocabulary.
    pub fn new(
        text: &dyn TokenText,
        vocab_size: usize,
        end_token_ids: &[u32],
    ) -> Result<GrammarCompiler, GrammarError> {
        let Some(&first_end) = end_token_ids.first() else {
            return Err(GrammarError("the model has no end-of-sequence token to end a grammar with".into()));
        };
        if let Some(id) = end_token_ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(GrammarError(format!("end token {id} is outside the vocabulary of {vocab_size} ids")));
        }
        const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
        let words: Vec<Vec<u8>> = (0..vocab_size as u32)
            .map(|id| match text.token_bytes(id) {
                // Control tokens are named in grammars, never spelled: the marker occurs in no UTF-8 text.
                bytes if text.is_special(id) => [&[MARKER], bytes].concat(),
                [MARKER, ..] => Vec::new(),
                bytes => bytes.to_vec(),
            })
            .collect();
        let info = TokRxInfo::new(vocab_size as u32, first_end);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(end_token_ids);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory =
            ParserFactory::new_simple(&environment).map_err(|error| GrammarError(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            initial_lexer_fuel: LEXER_FUEL_MAX,
            max_lexer_states: LEXER_STATES_MAX,
            max_grammar_size: GRAMMAR_SYMBOLS_MAX,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(GrammarCompiler { factory })
    }

    /// Compiles `grammar`, in llguidance's Lark dialect. Takes from a fraction of a millisecond to a second or more and
    /// a stack as deep as the grammar: run it where both are to be had.
    ///
    /// # Errors
    /// A grammar that is malformed, uses what is not implemented, can match nothing, or is too large.
    pub fn compile(&self, grammar: &str) -> Result<Grammar, GrammarError> {
        let grammar = TopLevelGrammar::from_lark(grammar.to_owned());
        let parser = self.factory.create_parser(grammar).map_err(|error| GrammarError(reason(&error)))?;
        let end_tokens = self.factory.tok_env().tok_trie().eos_tokens().into();
        let grammar = Grammar { parser: Arc::new(parser), end_tokens };
        // A grammar that no token can begin is found here and not in the engine.
        match Constraint::new(&grammar).compute() {
            Ok(mask) if mask.is_zero() => Err(GrammarError("no text of the vocabulary matches it".into())),
            Ok(_) => Ok(grammar),
            Err(error) => Err(GrammarError(error)),
        }
    }
}

impl Grammar {
    pub(crate) fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }
}

/// A regular expression as it is written between slashes in a grammar. Classes such as `\d` are Unicode's.
pub fn regex_in_grammar(regex: &str) -> String {
    llguidance::regex_to_lark(regex, "")
}

/// The tokens a grammar allows next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask(SimpleVob);

impl TokenMask {
    /// Rules out what is not allowed.
    pub(crate) fn apply(&self, row: &mut [f32]) {
        let words = self.0.as_slice();
        for (index, chunk) in row.chunks_mut(32).enumerate() {
            match words.get(index).copied().unwrap_or(0) {
                u32::MAX => {}
                0 => chunk.fill(f32::NEG_INFINITY),
                word => {
                    for (bit, logit) in chunk.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }

    /// Whether it allows anything besides `tokens`, which must not repeat.
    pub(crate) fn allows_more_than(&self, tokens: &[u32]) -> bool {
        let among = tokens.iter().filter(|&&token| self.allows(token)).count();
        self.0.num_set() > among
    }

    pub fn allows(&self, token: u32) -> bool {
        (token as usize) < self.0.len() && self.0.is_allowed(token)
    }
}

/// A sequence's place in its grammar.
pub struct Constraint {
    state: State,
}

enum State {
    /// At the place of the last token.
    Idle(Box<Matcher>),
    /// The matcher is with the mask thread.
    Away(flume::Receiver<Computed>),
    Ready(Box<Matcher>, TokenMask),
    /// Between two states only.
    Moving,
}

/// A matcher back from the mask thread.
struct Computed {
    matcher: Box<Matcher>,
    mask: Result<TokenMask, String>,
}

impl Constraint {
    pub fn new(grammar: &Grammar) -> Constraint {
        Constraint { state: State::Idle(Box::new(Matcher::new(Ok(grammar.parser.deep_clone())))) }
    }

    /// Has the next mask computed on `thread` if it is not there yet.
    pub(crate) fn prepare(&mut self, thread: &MaskThread) {
        if let State::Idle(_) = self.state
            && let State::Idle(matcher) = std::mem::replace(&mut self.state, State::Moving)
        {
            self.state = thread.compute(matcher);
        }
    }

    /// The tokens allowed next; waits for the mask thread if it is at it.
    pub fn mask(&mut self) -> Result<&TokenMask, String> {
        let (matcher, mask) = match std::mem::replace(&mut self.state, State::Moving) {
            State::Idle(mut matcher) => {
                let mask = compute(&mut matcher);
                (matcher, mask)
            }
            State::Away(computed) => {
                let Computed { matcher, mask } =
                    computed.recv().map_err(|_| "the thread that computes masks is gone".to_owned())?;
                (matcher, mask)
            }
            State::Ready(matcher, mask) => (matcher, Ok(mask)),
            State::Moving => return Err("the grammar has failed before".into()),
        };
        self.state = State::Ready(matcher, mask?);
        match &self.state {
            State::Ready(_, mask) => Ok(mask),
            _ => Err("the grammar has no mask".into()),
        }
    }

    fn compute(mut self) -> Result<SimpleVob, String> {
        self.mask().map(|mask| mask.0.clone())
    }

    /// Goes on by `token`, one the mask allowed. True: the grammar is complete and nothing may follow.
    pub fn accept(&mut self, token: u32) -> Result<bool, String> {
        self.mask()?;
        let State::Ready(mut matcher, _) = std::mem::replace(&mut self.state, State::Moving) else {
            return Err("the grammar has no mask".into());
        };
        matcher.consume_token(token).map_err(|error| reason(&error))?;
        let complete = matcher.is_stopped();
        self.state = State::Idle(matcher);
        Ok(complete)
    }
}

fn compute(matcher: &mut Matcher) -> Result<TokenMask, String> {
    matcher.compute_mask().map(TokenMask).map_err(|error| reason(&error))
}

/// What of an llguidance error concerns whoever wrote the grammar: neither the grammar itself nor a backtrace.
fn reason(error: &dyn std::fmt::Display) -> String {
    const CHARS_MAX: usize = 400;
    let text = format!("{error:#}");
    let is_quotation = |line: &&str| {
        line.starts_with('<')
            || line.trim_start().split_once(" |").is_some_and(|(number, _)| number.parse::<u32>().is_ok())
    };
    let lines: Vec<&str> = text.lines().take_while(|line| !is_quotation(line)).map(str::trim).collect();
    let told: String = lines.join(" ").chars().take(CHARS_MAX).collect();
    match told.as_str() {
        "NoExtensionBias" => "no token can follow".to_owned(),
        _ => told,
    }
}

/// The thread "rill-mask": computes masks while the forward pass runs. Ends when dropped.
pub(crate) struct MaskThread {
    jobs: flume::Sender<Job>,
}

struct Job {
    matcher: Box<Matcher>,
    reply: flume::Sender<Computed>,
}

impl MaskThread {
    /// For at most `sequences_max` sequences at a time.
    pub(crate) fn start(sequences_max: usize) -> std::io::Result<MaskThread> {
        let (jobs, inbox) = flume::bounded::<Job>(sequences_max);
        std::thread::Builder::new().name("rill-mask".into()).spawn(move || {
            for Job { mut matcher, reply } in inbox {
                let mask = catch_unwind(AssertUnwindSafe(|| compute(&mut matcher)))
                    .unwrap_or_else(|_| Err("a defect was caught while following the grammar".into()));
                // Nobody waits for it any more if the sequence has ended.
                let _ = reply.send(Computed { matcher, mask });
            }
        })?;
        Ok(MaskThread { jobs })
    }

    fn compute(&self, matcher: Box<Matcher>) -> State {
        let (reply, computed) = flume::bounded(1);
        match self.jobs.try_send(Job { matcher, reply }) {
            Ok(()) => State::Away(computed),
            // It is behind: whoever needs the mask computes it.
            Err(flume::TrySendError::Full(job) | flume::TrySendError::Disconnected(job)) => {
                State::Idle(job.matcher)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids 0 to 255 are bytes; 256 ends; 257 is `<|call|>`, a control token; 258 on are words.
    struct Bytes(Vec<Vec<u8>>);

    impl Bytes {
        fn new() -> Bytes {
            let mut words: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
            words.extend([&b"<|end|>"[..], b"<|call|>", b"true", b"false", b"\"na", b"me\""].map(<[u8]>::to_vec));
            Bytes(words)
        }
    }

    const END: u32 = 256;
    const CALL: u32 = 257;

    impl TokenText for Bytes {
        fn token_bytes(&self, id: u32) -> &[u8] {
            self.0.get(id as usize).map_or(&[], |word| word)
        }

        fn is_special(&self, id: u32) -> bool {
            id == END || id == CALL
        }
    }

    fn compiler() -> GrammarCompiler {
        GrammarCompiler::new(&Bytes::new(), 262, &[END]).unwrap()
    }

    /// Follows `text` byte by byte; `Ok(complete)`, or the offset of the first byte ruled out.
    fn follow(grammar: &Grammar, text: &str) -> Result<bool, usize> {
        let mut constraint = Constraint::new(grammar);
        let mut complete = false;
        for (offset, byte) in text.bytes().enumerate() {
            if complete || !constraint.mask().unwrap().allows(u32::from(byte)) {
                return Err(offset);
            }
            complete = constraint.accept(u32::from(byte)).unwrap();
        }
        Ok(complete || constraint.mask().unwrap().allows(END))
    }

    #[test]
    fn grammars_of_all_kinds() {
        let compiler = compiler();
        for (grammar, text, expected) in [
            ("start: /a+b/", "aab", Ok(true)),
            ("start: /a+b/", "aac", Err(2)),
            ("start: \"yes\" | \"no\"", "no", Ok(true)),
            ("start: \"yes\" | \"no\"", "nay", Err(1)),
            (r#"start: %json {"type":"boolean"}"#, "true", Ok(true)),
            (r#"start: %json {"type":"boolean"}"#, "null", Err(0)),
            (r#"start: %json {"type":"object"}"#, r#"{"a":[1,{}]}"#, Ok(true)),
            (r#"start: %json {"type":"object"}"#, "{]", Err(1)),
            ("start: <|call|> \"x\"", "x", Err(0)),
        ] {
            let compiled = compiler.compile(grammar).unwrap_or_else(|error| panic!("{grammar}: {error}"));
            assert_eq!(follow(&compiled, text), expected, "{grammar} on {text}");
        }
        let mut call = Constraint::new(&compiler.compile("start: <|call|> \"x\"").unwrap());
        assert!(call.mask().unwrap().allows(CALL) && !call.mask().unwrap().allows(u32::from(b'<')));
        call.accept(CALL).unwrap();
        assert!(call.mask().unwrap().allows(u32::from(b'x')));
    }

    #[test]
    fn what_cannot_be_a_grammar_says_why() {
        for (grammar, part) in [
            ("start: /(/", "unclosed group"),
            ("start:", ""),
            ("begin: \"x\"", "start"),
            ("start: other", "other"),
            (r#"start: %json {"type":"nonsense"}"#, "nonsense"),
            (r#"start: %json {"type":"integer","minimum":5,"maximum":3}"#, "5"),
            (r#"start: %json {"type":"string","format":"no-such-format"}"#, "no-such-format"),
        ] {
            let result = compiler().compile(grammar);
            if part.is_empty() {
                continue;
            }
            let error = result.err().unwrap_or_else(|| panic!("{grammar} was taken"));
            assert!(error.0.contains(part) && !error.0.contains("backtrace"), "{grammar}: {error}");
        }
        assert!(GrammarCompiler::new(&Bytes::new(), 262, &[]).is_err());
        assert!(GrammarCompiler::new(&Bytes::new(), 262, &[262]).is_err());
    }

    #[test]
    fn masks_from_the_thread_are_those_computed_here() {
        let grammar = compiler().compile(r#"start: %json {"type":"object"}"#).unwrap();
        let thread = MaskThread::start(2).unwrap();
        let (mut here, mut there) = (Constraint::new(&grammar), Constraint::new(&grammar));
        for byte in r#"{"name":[true,1.5]"#.bytes() {
            there.prepare(&thread);
            there.prepare(&thread);
            assert_eq!(here.mask().unwrap(), there.mask().unwrap());
            assert_eq!(here.accept(u32::from(byte)), there.accept(u32::from(byte)));
        }
    }

    #[test]
    fn a_mask_on_a_row() {
        let mut bits = SimpleVob::alloc(70);
        for token in [3, 40, 69] {
            bits.allow_token(token);
        }
        let mask = TokenMask(bits);
        let mut row = vec![1.0f32; 80];
        mask.apply(&mut row);
        let left: Vec<usize> = (0..80).filter(|&id| row[id] == 1.0).collect();
        assert_eq!(left, [3, 40, 69], "ids beyond the mask are ruled out, too");
        assert!(mask.allows_more_than(&[3, 40]) && mask.allows_more_than(&[1, 2, 3]));
        assert!(!mask.allows_more_than(&[3, 40, 69]) && !mask.allows(79));
    }
}
