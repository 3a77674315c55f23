//! Thoughts before an answer: told from the answer by their tags, character by character.

/// How a model marks its thoughts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasoningFormat {
    /// `<think>…</think>`: DeepSeek R1, Qwen 3 and many others.
    Think,
    /// `[THINK]…[/THINK]`: Magistral.
    Mistral,
    /// `<thought>…</thought>`: EXAONE Deep and others.
    Thought,
    /// `<seed:think>…</seed:think>`: Seed-OSS.
    Seed,
    /// `<|START_THINKING|>…<|END_THINKING|>`: Command A.
    Cohere,
}

impl ReasoningFormat {
    /// What `template` makes its model do, if it mentions thoughts at all.
    pub fn of_template(template: &str) -> Option<ReasoningFormat> {
        use ReasoningFormat::{Cohere, Mistral, Seed, Think, Thought};

        [Think, Mistral, Thought, Seed, Cohere].into_iter().find(|format| template.contains(format.open()))
    }

    pub fn open(self) -> &'static str {
        match self {
            ReasoningFormat::Think => "<think>",
            ReasoningFormat::Mistral => "[THINK]",
            ReasoningFormat::Thought => "<thought>",
            ReasoningFormat::Seed => "<seed:think>",
            ReasoningFormat::Cohere => "<|START_THINKING|>",
        }
    }

    pub fn close(self) -> &'static str {
        match self {
            ReasoningFormat::Think => "</think>",
            ReasoningFormat::Mistral => "[/THINK]",
            ReasoningFormat::Thought => "</thought>",
            ReasoningFormat::Seed => "</seed:think>",
            ReasoningFormat::Cohere => "<|END_THINKING|>",
        }
    }
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReasoningDelta {
    Reasoning(String),
    Content(String),
}

/// Reads one answer. White space around the thoughts and between them and the answer belongs to neither.
#[derive(Debug)]
pub struct ReasoningSplitter {
    format: ReasoningFormat,
    state: State,
    /// White space, and what may be the start of a tag.
    held: String,
    thought: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    BeforeOpen,
    Inside,
    /// The thoughts are over; the answer's first character is still to come.
    AfterClose,
    Content,
}

impl ReasoningSplitter {
    /// `opened`: the prompt ends with the opening tag, so the answer begins with thoughts.
    pub fn new(format: ReasoningFormat, opened: bool) -> ReasoningSplitter {
        let state = if opened { State::Inside } else { State::BeforeOpen };
        ReasoningSplitter { format, state, held: String::new(), thought: false }
    }

    /// Whether what comes next is thought, for all that is known.
    pub fn is_inside(&self) -> bool {
        self.state == State::Inside
    }

    pub fn push(&mut self, text: &str, out: &mut Vec<ReasoningDelta>) {
        if self.state == State::Content {
            return emit(ReasoningDelta::Content(text.to_owned()), out);
        }
        for c in text.chars() {
            self.step(c, out);
        }
    }

    /// The end of the text.
    pub fn finish(&mut self, out: &mut Vec<ReasoningDelta>) {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Inside => emit(ReasoningDelta::Reasoning(held.trim_end().to_owned()), out),
            State::BeforeOpen => emit(ReasoningDelta::Content(held), out),
            State::AfterClose | State::Content => {}
        }
    }

    fn step(&mut self, c: char, out: &mut Vec<ReasoningDelta>) {
        match self.state {
            State::Content => emit(ReasoningDelta::Content(c.to_string()), out),
            State::AfterClose if c.is_whitespace() => {}
            State::AfterClose => {
                self.state = State::Content;
                self.step(c, out);
            }
            State::BeforeOpen => {
                self.held.push(c);
                let seen = self.held.trim_start();
                if seen == self.format.open() {
                    self.held.clear();
                    self.state = State::Inside;
                } else if !self.format.open().starts_with(seen) {
                    self.state = State::Content;
                    emit(ReasoningDelta::Content(std::mem::take(&mut self.held)), out);
                }
            }
            State::Inside => {
                self.held.push(c);
                self.inside(out);
            }
        }
    }

    fn inside(&mut self, out: &mut Vec<ReasoningDelta>) {
        loop {
            let partial = self.held.trim_start();
            if partial.is_empty() {
                if !self.thought {
                    self.held.clear();
                }
                return;
            }
            if partial == self.format.close() {
                self.held.clear();
                self.state = State::AfterClose;
                return;
            }
            if self.format.close().starts_with(partial) {
                return;
            }
            let first = self.held.len() - partial.len();
            let shown = first + partial.chars().next().map_or(0, char::len_utf8);
            let rest = self.held.split_off(shown);
            self.thought = true;
            emit(ReasoningDelta::Reasoning(std::mem::replace(&mut self.held, rest)), out);
            if self.held.is_empty() {
                return;
            }
        }
    }
}

fn emit(delta: ReasoningDelta, out: &mut Vec<ReasoningDelta>) {
    match (out.last_mut(), delta) {
        (_, ReasoningDelta::Content(text) | ReasoningDelta::Reasoning(text)) if text.is_empty() => {}
        (Some(ReasoningDelta::Content(before)), ReasoningDelta::Content(text))
        | (Some(ReasoningDelta::Reasoning(before)), ReasoningDelta::Reasoning(text)) => before.push_str(&text),
        (_, delta) => out.push(delta),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(opened: bool, pieces: &[&str]) -> (String, String) {
        let mut splitter = ReasoningSplitter::new(ReasoningFormat::Think, opened);
        let mut deltas = Vec::new();
        for piece in pieces {
            splitter.push(piece, &mut deltas);
        }
        splitter.finish(&mut deltas);
        let (mut thoughts, mut content) = (String::new(), String::new());
        for delta in deltas {
            match delta {
                ReasoningDelta::Reasoning(text) => thoughts.push_str(&text),
                ReasoningDelta::Content(text) => content.push_str(&text),
            }
        }
        (thoughts, content)
    }

    #[test]
    fn thoughts_are_told_from_the_answer() {
        for (opened, text, thoughts, content) in [
            (false, "Hello <think>", "", "Hello <think>"),
            (false, "<think>\na b\n</think>\n\nHi \n", "a b", "Hi \n"),
            (false, "\n<think></think>Hi", "", "Hi"),
            (false, "<thin", "", "<thin"),
            (false, "<think>never ends \n", "never ends", ""),
            (true, "a </thin </think> b</think>", "a </thin", "b</think>"),
            (true, "", "", ""),
            (false, " \n", "", " \n"),
        ] {
            assert_eq!(run(opened, &[text]), (thoughts.to_owned(), content.to_owned()), "{text}");
        }
        for format in [
            ReasoningFormat::Think,
            ReasoningFormat::Mistral,
            ReasoningFormat::Thought,
            ReasoningFormat::Seed,
            ReasoningFormat::Cohere,
        ] {
            assert_eq!(ReasoningFormat::of_template(&format!("x {} y", format.open())), Some(format));
            let mut splitter = ReasoningSplitter::new(format, false);
            let mut deltas = Vec::new();
            splitter.push(&format!("{}\nwhy {} yes", format.open(), format.close()), &mut deltas);
            splitter.finish(&mut deltas);
            let expected = [ReasoningDelta::Reasoning("why".into()), ReasoningDelta::Content("yes".into())];
            assert_eq!(deltas, expected);
        }
        assert_eq!(ReasoningFormat::of_template("x"), None);
    }

    proptest! {
        #[test]
        fn no_cut_changes_anything(
            opened: bool,
            parts in prop::collection::vec(prop_oneof![Just("<think>".to_owned()), Just("</think>".to_owned()), "[ \n<a/é]{0,4}"], 0..6),
            cut: prop::sample::Index,
        ) {
            let text = parts.concat();
            let at = cut.index(text.len() + 1);
            prop_assume!(text.is_char_boundary(at));
            let letters: Vec<String> = text.chars().map(String::from).collect();
            let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
            let whole = run(opened, &[&text]);
            prop_assert_eq!(&run(opened, &[&text[..at], &text[at..]]), &whole);
            prop_assert_eq!(run(opened, &letters), whole);
        }
    }
}
