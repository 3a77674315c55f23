//! Calls written as Python: `[name(key=value, …), …]` with literals for values.

use serde_json::{Map, Number, Value};

/// Literals nested deeper than this are no arguments.
const DEPTH_MAX: usize = 64;

/// The calls `text` consists of, in a list or one alone; `None` if it is anything else.
pub fn parse(text: &str) -> Option<Vec<(String, Map<String, Value>)>> {
    let mut reader = Reader { rest: text.trim() };
    let mut calls = Vec::new();
    if reader.take("[") {
        while !reader.take("]") {
            calls.push(reader.call()?);
            if !reader.take(",") && !reader.rest.starts_with(']') {
                return None;
            }
        }
    } else {
        while !reader.rest.is_empty() {
            calls.push(reader.call()?);
            let _ = reader.take(";");
        }
    }
    (reader.rest.is_empty() && !calls.is_empty()).then_some(calls)
}

/// The value of one literal; `None` if it is none.
pub fn literal(text: &str) -> Option<Value> {
    let mut reader = Reader { rest: text.trim() };
    let value = reader.value(DEPTH_MAX)?;
    reader.rest.is_empty().then_some(value)
}

struct Reader<'a> {
    /// Never begins with white space.
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn advance(&mut self, bytes: usize) {
        self.rest = self.rest[bytes..].trim_start();
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest.starts_with(token);
        if found {
            self.advance(token.len());
        }
        found
    }

    fn identifier(&mut self) -> Option<&'a str> {
        let end = self
            .rest
            .find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.' || c == '-'))
            .unwrap_or(self.rest.len());
        let name = &self.rest[..end];
        self.advance(end);
        (!name.is_empty()).then_some(name)
    }

    fn call(&mut self) -> Option<(String, Map<String, Value>)> {
        let name = self.identifier()?.to_owned();
        let mut arguments = Map::new();
        if !self.take("(") {
            return None;
        }
        while !self.take(")") {
            let key = self.identifier()?.to_owned();
            if !self.take("=") {
                return None;
            }
            arguments.insert(key, self.value(DEPTH_MAX)?);
            if !self.take(",") && !self.rest.starts_with(')') {
                return None;
            }
        }
        Some((name, arguments))
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        let depth = depth.checked_sub(1)?;
        match self.rest.chars().next()? {
            '"' | '\'' => self.string().map(Value::String),
            '[' | '(' => {
                let close = if self.take("[") { "]" } else { ")" };
                if close == ")" {
                    self.advance(1);
                }
                let mut items = Vec::new();
                while !self.take(close) {
                    items.push(self.value(depth)?);
                    if !self.take(",") && !self.rest.starts_with(close) {
                        return None;
                    }
                }
                Some(Value::Array(items))
            }
            '{' => {
                self.advance(1);
                let mut fields = Map::new();
                while !self.take("}") {
                    let key = self.string()?;
                    if !self.take(":") {
                        return None;
                    }
                    fields.insert(key, self.value(depth)?);
                    if !self.take(",") && !self.rest.starts_with('}') {
                        return None;
                    }
                }
                Some(Value::Object(fields))
            }
            c if c == '-' || c == '+' || c == '.' || c.is_ascii_digit() => self.number(),
            _ => match self.identifier()? {
                "True" | "true" => Some(Value::Bool(true)),
                "False" | "false" => Some(Value::Bool(false)),
                "None" | "null" => Some(Value::Null),
                _ => None,
            },
        }
    }

    fn number(&mut self) -> Option<Value> {
        let end =
            self.rest.find(|c: char| !(c.is_ascii_digit() || "+-.eE_".contains(c))).unwrap_or(self.rest.len());
        let text = self.rest[..end].replace('_', "");
        self.advance(end);
        if let Ok(integer) = text.parse::<i64>() {
            return Some(integer.into());
        }
        Number::from_f64(text.parse().ok()?).map(Value::Number)
    }

    fn string(&mut self) -> Option<String> {
        let quote = self.rest.chars().next().filter(|c| *c == '"' || *c == '\'')?;
        let mut text = String::new();
        let mut chars = self.rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.advance(at + 1);
                    return Some(text);
                }
                '\\' => {
                    let (_, escape) = chars.next()?;
                    match escape {
                        'n' => text.push('\n'),
                        't' => text.push('\t'),
                        'r' => text.push('\r'),
                        '\n' => {}
                        'x' | 'u' | 'U' => {
                            let digits = match escape {
                                'x' => 2,
                                'u' => 4,
                                _ => 8,
                            };
                            let mut code = 0;
                            for _ in 0..digits {
                                code = code * 16 + chars.next()?.1.to_digit(16)?;
                            }
                            text.push(char::from_u32(code)?);
                        }
                        '\\' | '\'' | '"' => text.push(escape),
                        other => {
                            // Python keeps a backslash it does not know.
                            text.push('\\');
                            text.push(other);
                        }
                    }
                }
                other => text.push(other),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals() {
        for (text, expected) in [
            (r#"[f(a=1, b="x")]"#, Some(r#"f{"a":1,"b":"x"}"#)),
            (r#"f()"#, Some("f{}")),
            (
                r#" [ f ( a = [ 1 , 2.5,-3e2 ,], ) , g.h(s='it\'s \u00e9\x41\n') ] "#,
                Some("f{\"a\":[1,2.5,-300.0]} g.h{\"s\":\"it's éA\\n\"}"),
            ),
            (r#"[f(a={"k": (True, False, None)}, b={})]"#, Some(r#"f{"a":{"k":[true,false,null]},"b":{}}"#)),
            ("[]", None),
            ("", None),
            ("hello", None),
            ("[f(a=b)]", None),
            ("[f(1)]", None),
            ("[f(a=1)", None),
            ("[f(a=1)] x", None),
            ("[f(a='x)]", None),
            ("[f(a=1 b=2)]", None),
        ] {
            let got = parse(text).map(|calls| {
                let shown: Vec<String> = calls
                    .into_iter()
                    .map(|(name, arguments)| format!("{name}{}", Value::Object(arguments)))
                    .collect();
                shown.join(" ")
            });
            assert_eq!(got.as_deref(), expected, "{text}");
        }
        assert!(parse(&format!("[f(a={}1{})]", "[".repeat(100), "]".repeat(100))).is_none());
    }
}
