//! Values as Python prints them: what a template shows of a list or a mapping that it does not turn into JSON.

use serde_json::Value;

/// Python's `repr`.
pub fn repr(value: &Value) -> String {
    let mut out = String::new();
    write(value, &mut out);
    out
}

fn write(value: &Value, out: &mut String) {
    match value {
        Value::Null => out.push_str("None"),
        Value::Bool(true) => out.push_str("True"),
        Value::Bool(false) => out.push_str("False"),
        Value::Number(number) => out.push_str(&number.to_string()),
        Value::String(text) => write_text(text, out),
        Value::Array(items) => {
            out.push('[');
            for (place, item) in items.iter().enumerate() {
                out.push_str(if place == 0 { "" } else { ", " });
                write(item, out);
            }
            out.push(']');
        }
        Value::Object(fields) => {
            out.push('{');
            for (place, (name, value)) in fields.iter().enumerate() {
                out.push_str(if place == 0 { "" } else { ", " });
                write_text(name, out);
                out.push_str(": ");
                write(value, out);
            }
            out.push('}');
        }
    }
}

/// In single quotes, unless that takes escapes and double ones do not.
fn write_text(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            // Neither controls nor blanks other than the space are printable.
            c if c != ' ' && (c.is_control() || c.is_whitespace()) => {
                out.push_str(&match c as u32 {
                    code @ 0..=0xff => format!("\\x{code:02x}"),
                    code => format!("\\u{code:04x}"),
                });
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

#[cfg(test)]
mod tests {
    use super::repr;
    use serde_json::json;

    #[test]
    fn values_look_as_in_python() {
        for (value, expected) in [
            (
                json!({"a": [1, -2.5, null, true], "b": {}, "c": []}),
                "{'a': [1, -2.5, None, True], 'b': {}, 'c': []}",
            ),
            (json!("it's"), "\"it's\""),
            (json!("it's \"it\""), "'it\\'s \"it\"'"),
            (json!("a\n\t\\\u{1}\u{a0}\u{3000}é日😀"), "'a\\n\\t\\\\\\x01\\xa0\\u3000é日😀'"),
            (json!(false), "False"),
        ] {
            assert_eq!(repr(&value), expected);
        }
    }
}
