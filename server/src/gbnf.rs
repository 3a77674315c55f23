//! Grammars as llama.cpp and xgrammar write them (`root ::= …`) → llguidance's Lark; Lark passes through.

/// Rewrites a GBNF grammar rule by rule; a text without `::=` is Lark already. What is wrong in it is found when it is
/// compiled.
pub fn to_lark(grammar: &str) -> String {
    if !grammar.contains("::=") {
        return grammar.to_owned();
    }
    let tokens = tokens(grammar);
    let mut out = String::with_capacity(grammar.len() + 64);
    let mut index = 0;
    while index < tokens.len() {
        match &tokens[index] {
            Token::Name(name) if tokens.get(index + 1) == Some(&Token::Defines) => {
                out.push('\n');
                out.push_str(&rule_name(name));
                out.push(':');
                index += 2;
            }
            Token::Name(name) => {
                out.push(' ');
                out.push_str(&rule_name(name));
                index += 1;
            }
            Token::Defines => index += 1,
            Token::Verbatim(text) => {
                out.push(' ');
                out.push_str(text);
                index += 1;
            }
            Token::Repeat(text) => {
                out.push_str(text);
                index += 1;
            }
        }
    }
    out.push('\n');
    out
}

#[derive(Debug, PartialEq)]
enum Token {
    Name(String),
    Defines,
    /// A literal, a character class as a regular expression, or an operator.
    Verbatim(String),
    /// Belongs to what precedes it: `*`, `+`, `?`, `{2,3}`.
    Repeat(String),
}

fn tokens(grammar: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut rest = grammar;
    while let Some(first) = rest.chars().next() {
        let taken = match first {
            '#' => {
                rest = rest.split_once('\n').map_or("", |(_, after)| after);
                continue;
            }
            '"' => {
                let end = closing(rest, '"');
                tokens.push(Token::Verbatim(literal(&rest[..end])));
                end
            }
            '[' => {
                let end = closing(rest, ']');
                tokens.push(Token::Verbatim(format!("/{}/", rest[..end].replace('/', "\\/"))));
                end
            }
            '{' => {
                let end = rest.find('}').map_or(rest.len(), |at| at + 1);
                tokens.push(Token::Repeat(rest[..end].to_owned()));
                end
            }
            '*' | '+' | '?' => {
                tokens.push(Token::Repeat(first.to_string()));
                1
            }
            '|' | '(' | ')' => {
                tokens.push(Token::Verbatim(first.to_string()));
                1
            }
            '.' => {
                tokens.push(Token::Verbatim("/(?s:.)/".to_owned()));
                1
            }
            ':' if rest.starts_with("::=") => {
                tokens.push(Token::Defines);
                3
            }
            c if c.is_whitespace() => c.len_utf8(),
            _ => {
                let end = rest
                    .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-'))
                    .unwrap_or(rest.len());
                if end == 0 {
                    tokens.push(Token::Verbatim(first.to_string()));
                    first.len_utf8()
                } else {
                    tokens.push(Token::Name(rest[..end].to_owned()));
                    end
                }
            }
        };
        rest = &rest[taken..];
    }
    tokens
}

/// Just past the delimiter that closes what `text` opens with; backslashes escape.
fn closing(text: &str, delimiter: char) -> usize {
    let mut escaped = false;
    for (offset, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == delimiter => return offset + c.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

/// GBNF's escapes as JSON's: `\xNN` is the one JSON lacks.
fn literal(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\\x") {
        let escaped = rest[..at].bytes().rev().take_while(|&byte| byte == b'\\').count() % 2 == 1;
        out.push_str(&rest[..at]);
        out.push_str(if escaped { "\\x" } else { "\\u00" });
        rest = &rest[at + 2..];
    }
    out.push_str(rest);
    out.replace('\n', "\\n")
}

/// Lark's rules are in lower case with underscores, and the first is `start`.
fn rule_name(name: &str) -> String {
    match name {
        "root" => "start".to_owned(),
        // A rule of its own by that name must not become the first.
        "start" => "start_rule".to_owned(),
        other => format!("r_{}", other.to_ascii_lowercase().replace('-', "_")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gbnf_becomes_lark() {
        for (gbnf, lark) in [
            ("start: \"x\"", "start: \"x\""),
            ("root ::= \"yes\" | \"no\"", "\nstart: \"yes\" | \"no\"\n"),
            (
                "root ::= item (\",\" item)* # list\nitem ::= [a-z/]+ other-item?\nother-item ::= \"\\x41\"{2,3}",
                "\nstart: r_item ( \",\" r_item )*\nr_item: /[a-z\\/]/+ r_other_item?\nr_other_item: \"\\u0041\"{2,3}\n",
            ),
            ("root ::= [^\\]\"] .", "\nstart: /[^\\]\"]/ /(?s:.)/\n"),
            ("root ::= \"unclosed", "\nstart: \"unclosed\n"),
            ("root ::= é", "\nstart: é\n"),
        ] {
            assert_eq!(to_lark(gbnf), lark, "{gbnf}");
        }
    }
}
