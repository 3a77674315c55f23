//! `prompt` of completions: a string, several strings, token ids, or several lists of token ids.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};

/// One prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// All prompts of a request, in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prompts(pub Vec<Prompt>);

impl JsonSchema for Prompts {
    fn schema_name() -> Cow<'static, str> {
        "Prompts".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let text = json_schema!({"type": "string", "minLength": 1});
        let ids = json_schema!({
            "type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": u32::MAX}
        });
        json_schema!({"anyOf": [
            text,
            {"type": "array", "minItems": 1, "items": text},
            ids,
            {"type": "array", "minItems": 1, "items": ids},
        ]})
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptsVisitor)
    }
}

struct PromptsVisitor;

impl<'de> Visitor<'de> for PromptsVisitor {
    type Value = Prompts;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a string, an array of strings, an array of token ids, or an array of arrays of token ids")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts(vec![Prompt::Text(text.to_owned())]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Prompts, A::Error> {
        let mut prompts = Vec::new();
        let mut ids = Vec::new();
        while let Some(item) = items.next_element::<Item>()? {
            match item {
                Item::Id(id) if prompts.is_empty() => ids.push(id),
                Item::Text(text) if ids.is_empty() => prompts.push(Prompt::Text(text)),
                Item::Ids(list) if ids.is_empty() => prompts.push(Prompt::Tokens(list)),
                _ => {
                    return Err(de::Error::custom(
                        "token ids may not be mixed with strings or arrays in one prompt array",
                    ));
                }
            }
        }
        if !ids.is_empty() {
            prompts.push(Prompt::Tokens(ids));
        }
        Ok(Prompts(prompts))
    }
}

enum Item {
    Id(u32),
    Ids(Vec<u32>),
    Text(String),
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemVisitor;

        impl<'de> Visitor<'de> for ItemVisitor {
            type Value = Item;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, a token id, or an array of token ids")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Item, E> {
                Ok(Item::Text(text.to_owned()))
            }

            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Item, E> {
                u32::try_from(id).map(Item::Id).map_err(|_| E::custom(format!("{id} is not a token id")))
            }

            fn visit_i64<E: de::Error>(self, id: i64) -> Result<Item, E> {
                Err(E::custom(format!("{id} is not a token id")))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Item, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = items.next_element()? {
                    ids.push(id);
                }
                Ok(Item::Ids(ids))
            }
        }

        deserializer.deserialize_any(ItemVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(json: &str, expected: Result<Vec<Prompt>, &str>) {
        match (serde_json::from_str::<Prompts>(json), expected) {
            (Ok(prompts), Ok(expected)) => assert_eq!(prompts.0, expected),
            (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
            (got, expected) => panic!("{json}: {got:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn prompts_of_all_kinds() {
        let text = |s: &str| Prompt::Text(s.to_owned());
        check(r#""hi""#, Ok(vec![text("hi")]));
        check(r#"["a","b"]"#, Ok(vec![text("a"), text("b")]));
        check("[1,2]", Ok(vec![Prompt::Tokens(vec![1, 2])]));
        check(
            "[[1],[2,3],[]]",
            Ok(vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3]), Prompt::Tokens(vec![])]),
        );
        check("[]", Ok(vec![]));
        check("7", Err("expected a string"));
        check("{}", Err("expected a string"));
        check("[1,\"a\"]", Err("mixed"));
        check("[\"a\",1]", Err("mixed"));
        check("[[1],2]", Err("mixed"));
        check("[-1]", Err("-1 is not a token id"));
        check("[4294967296]", Err("4294967296 is not a token id"));
        check("[1.5]", Err("expected a string, a token id"));
        check("[[-1]]", Err("-1"));
        check("[null]", Err("expected a string, a token id"));
    }
}
