//! JSON schemas: for each keyword, documents its grammar must take and must not; and a thousand generated documents,
//! validated by a library that has nothing to do with how they were made.

use rill_engine::{Constraint, Grammar, GrammarCompiler};
use rill_server::structured::{Spacing, json_term};
use serde_json::{Value, json};

use crate::test_server::{self, Setup};
use crate::tiny_tokenizer::{IM_END, VOCAB_SIZE, tokenizer};

fn compile(compiler: &GrammarCompiler, schema: &Value) -> Result<Grammar, String> {
    let term = json_term("schema", schema, Spacing::Free).map_err(|error| error.message)?;
    compiler.compile(&format!("start: {term}")).map_err(|error| error.to_string())
}

/// Whether `text` is a whole document of the grammar, byte by byte.
fn takes(grammar: &Grammar, text: &str) -> bool {
    let mut constraint = Constraint::new(grammar);
    let mut complete = false;
    for byte in text.bytes() {
        if complete || !constraint.mask().expect("a mask").allows(byte.into()) {
            return false;
        }
        complete = constraint.accept(byte.into()).expect("an allowed token");
    }
    complete || constraint.mask().expect("a mask").allows(IM_END)
}

/// Keyword, schema, documents of it, and others. Object documents have their fields in the schema's order, which is
/// the order they are generated in.
type Row = (&'static str, Value, Vec<Value>, Vec<Value>);

fn rows() -> Vec<Row> {
    let integer = || json!({"type": "integer"});
    vec![
        ("true", json!(true), vec![json!(1), json!({"a": [null]}), json!("x")], vec![]),
        ("no keyword", json!({}), vec![json!(null), json!([1, "a"])], vec![]),
        ("type null", json!({"type": "null"}), vec![json!(null)], vec![json!(0), json!(""), json!(false)]),
        (
            "type boolean",
            json!({"type": "boolean"}),
            vec![json!(true), json!(false)],
            vec![json!(0), json!("true")],
        ),
        (
            "type integer",
            integer(),
            vec![json!(0), json!(-7), json!(123_456_789)],
            vec![json!(1.5), json!("1"), json!(null)],
        ),
        (
            "type number",
            json!({"type": "number"}),
            vec![json!(0), json!(-1.25), json!(1e-7), json!(12)],
            vec![json!("1"), json!(true)],
        ),
        (
            "type string",
            json!({"type": "string"}),
            vec![json!(""), json!("a \"quoted\" \\ one\n"), json!("ä小🏞")],
            vec![json!(1), json!(null)],
        ),
        (
            "types",
            json!({"type": ["integer", "null"]}),
            vec![json!(1), json!(null)],
            vec![json!("a"), json!(true), json!([])],
        ),
        (
            "enum",
            json!({"enum": [1, "a", null, [2]]}),
            vec![json!(1), json!("a"), json!(null), json!([2])],
            vec![json!(2), json!("b"), json!([])],
        ),
        ("const", json!({"const": {"a": 1}}), vec![json!({"a": 1})], vec![json!({}), json!({"a": 2}), json!(1)]),
        (
            "minimum and maximum",
            json!({"type": "integer", "minimum": -3, "maximum": 12}),
            vec![json!(-3), json!(0), json!(12), json!(9)],
            vec![json!(-4), json!(13), json!(100)],
        ),
        (
            "exclusive bounds",
            json!({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}),
            vec![json!(1), json!(9)],
            vec![json!(0), json!(10), json!(-1)],
        ),
        (
            "multipleOf",
            json!({"type": "integer", "multipleOf": 7, "minimum": 0}),
            vec![json!(0), json!(7), json!(49), json!(700)],
            vec![json!(1), json!(48)],
        ),
        (
            "lengths",
            json!({"type": "string", "minLength": 2, "maxLength": 3}),
            vec![json!("ab"), json!("小川ä")],
            vec![json!("a"), json!("abcd"), json!("")],
        ),
        (
            "pattern",
            json!({"type": "string", "pattern": "^[a-c]+-\\d{2}$"}),
            vec![json!("a-12"), json!("abc-00")],
            vec![json!("d-12"), json!("a-1"), json!("a-123"), json!("")],
        ),
        (
            "format date",
            json!({"type": "string", "format": "date"}),
            vec![json!("2024-02-29"), json!("1999-12-31")],
            vec![json!("2024-13-01"), json!("24-01-01"), json!("x")],
        ),
        (
            "format ipv4",
            json!({"type": "string", "format": "ipv4"}),
            vec![json!("127.0.0.1"), json!("255.255.255.255")],
            vec![json!("256.1.1.1"), json!("1.1.1")],
        ),
        (
            "format uuid",
            json!({"type": "string", "format": "uuid"}),
            vec![json!("123e4567-e89b-12d3-a456-426614174000")],
            vec![json!("123e4567"), json!("g23e4567-e89b-12d3-a456-426614174000")],
        ),
        (
            "items",
            json!({"type": "array", "items": integer()}),
            vec![json!([]), json!([1]), json!([1, 2, 3])],
            vec![json!(["a"]), json!([1, null]), json!({})],
        ),
        (
            "minItems and maxItems",
            json!({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}),
            vec![json!([true]), json!([true, false])],
            vec![json!([]), json!([true, true, true])],
        ),
        (
            "prefixItems",
            json!({"type": "array", "prefixItems": [{"type": "string"}, integer()], "items": false, "minItems": 2}),
            vec![json!(["a", 1])],
            vec![json!(["a"]), json!([1, "a"]), json!(["a", 1, 2])],
        ),
        (
            "properties and required",
            json!({"type": "object", "properties": {"a": integer(), "b": {"type": "string"}}, "required": ["a"],
                   "additionalProperties": false}),
            vec![json!({"a": 1}), json!({"a": 1, "b": "x"})],
            vec![json!({}), json!({"b": "x"}), json!({"a": "x"}), json!({"a": 1, "c": 2})],
        ),
        (
            "additionalProperties with a schema",
            json!({"type": "object", "properties": {"a": integer()}, "additionalProperties": {"type": "boolean"}}),
            vec![json!({}), json!({"a": 1, "x": true}), json!({"y": false})],
            vec![json!({"a": 1, "x": 2}), json!({"a": true})],
        ),
        (
            "nested objects",
            json!({"type": "object", "properties": {"in": {"type": "object", "properties": {"x": integer()},
                   "required": ["x"], "additionalProperties": false}}, "required": ["in"], "additionalProperties": false}),
            vec![json!({"in": {"x": 1}})],
            vec![json!({"in": {}}), json!({"in": 1})],
        ),
        (
            "anyOf",
            json!({"anyOf": [integer(), {"type": "array", "items": integer()}]}),
            vec![json!(1), json!([1, 2])],
            vec![json!("a"), json!(["a"])],
        ),
        (
            "allOf",
            json!({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}),
            vec![json!(3), json!(5)],
            vec![json!(2), json!(6)],
        ),
        (
            "$ref and $defs",
            json!({"type": "array", "items": {"$ref": "#/$defs/pair"}, "$defs": {"pair": {"type": "array",
                   "prefixItems": [integer(), integer()], "items": false, "minItems": 2}}}),
            vec![json!([]), json!([[1, 2], [3, 4]])],
            vec![json!([[1]]), json!([1])],
        ),
        (
            "recursion",
            json!({"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"value": integer(),
                   "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "required": ["value"],
                   "additionalProperties": false}}}),
            vec![json!({"value": 1}), json!({"value": 1, "children": [{"value": 2, "children": []}]})],
            vec![json!({"children": []}), json!({"value": 1, "children": [1]})],
        ),
    ]
}

#[test]
fn each_keyword_takes_its_documents_and_no_others() {
    let compiler = GrammarCompiler::new(&*tokenizer(), VOCAB_SIZE, &[IM_END]).expect("a vocabulary of bytes");
    let mut wrong = Vec::new();
    for (keyword, schema, documents, others) in rows() {
        let validator =
            jsonschema::options().should_validate_formats(true).build(&schema).expect("a sound schema");
        let grammar = match compile(&compiler, &schema) {
            Ok(grammar) => grammar,
            Err(error) => {
                wrong.push(format!("{keyword}: {error}"));
                continue;
            }
        };
        for document in documents {
            assert!(validator.is_valid(&document), "{keyword}: {document} is said to be valid");
            let pretty = serde_json::to_string_pretty(&document).expect("JSON");
            for text in [document.to_string(), pretty] {
                if !takes(&grammar, &text) {
                    wrong.push(format!("{keyword}: {text} is not taken"));
                }
            }
        }
        for document in others {
            assert!(!validator.is_valid(&document), "{keyword}: {document} is said to be invalid");
            if takes(&grammar, &document.to_string()) {
                wrong.push(format!("{keyword}: {document} is taken"));
            }
        }
        for broken in ["", "{", "[1,]", "{\"a\"}", "'a'", "nul", "01", "1 2"] {
            if takes(&grammar, broken) {
                wrong.push(format!("{keyword}: {broken:?} is taken"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Keywords no grammar can hold to are refused, not ignored.
#[test]
fn what_cannot_be_enforced_is_refused() {
    let server = test_server::start();
    for schema in [
        json!({"not": {"type": "string"}}),
        json!({"type": "array", "items": {"type": "integer"}, "uniqueItems": true}),
        json!({"type": "object", "dependentRequired": {"a": ["b"]}}),
        json!({"if": {"type": "string"}, "then": {"minLength": 3}}),
        json!({"type": "array", "contains": {"type": "integer"}}),
        json!({"type": "string", "format": "no-such-format"}),
    ] {
        let body = json!({"prompt": "x", "max_tokens": 1, "guided_json": schema});
        let refused = server.post("/v1/completions", &body.to_string());
        assert_eq!(refused.status, 400, "{schema}: {}", refused.text());
        assert_eq!(refused.json()["error"]["param"], "guided_json");
    }
}

fn generated() -> Vec<Value> {
    let text = |max: u32| json!({"type": "string", "maxLength": max});
    vec![
        json!({"type": "object", "properties": {"name": text(12), "age": {"type": "integer", "minimum": 0, "maximum": 130},
               "mail": {"type": "string", "format": "email", "maxLength": 20}}, "required": ["name", "age"],
               "additionalProperties": false}),
        json!({"type": "array", "items": {"type": "integer", "minimum": -1000, "exclusiveMaximum": 77}, "minItems": 1,
               "maxItems": 6}),
        json!({"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"enum": [7, 9, null, "many"]}},
               "required": ["kind", "lives"], "additionalProperties": false}),
        json!({"anyOf": [{"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"}, {"type": "boolean"}, {"type": "null"}]}),
        json!({"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {
               "value": {"type": "integer", "minimum": 0, "maximum": 99},
               "leaves": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 3}},
               "required": ["value", "leaves"], "additionalProperties": false},
               "leaf": {"type": "object", "properties": {"leaf": {"type": "boolean"}}, "required": ["leaf"],
               "additionalProperties": false}}}),
        json!({"type": "object", "properties": {"when": {"type": "string", "format": "date"},
               "at": {"type": "string", "format": "ipv4"}, "id": {"type": "string", "format": "uuid"}},
               "required": ["when", "at", "id"], "additionalProperties": false}),
        json!({"type": "array", "prefixItems": [text(5), {"type": "integer", "minimum": 0, "maximum": 50}],
               "items": false, "minItems": 2}),
        json!({"type": ["string", "integer"], "maxLength": 16, "minimum": -20, "maximum": 20}),
    ]
}

#[test]
fn a_thousand_documents_validate() {
    const N: u64 = 16;
    const SEEDS: u64 = 8;
    let mut setup = Setup::default();
    setup.engine.max_running = 32;
    setup.engine.num_blocks = 2048;
    setup.engine.max_waiting = 64;
    let server = test_server::start_with(setup);
    let (mut complete, mut all) = (0, 0);
    for schema in generated() {
        let validator =
            jsonschema::options().should_validate_formats(true).build(&schema).expect("a sound schema");
        let format =
            json!({"type": "json_schema", "json_schema": {"name": "d", "schema": schema, "strict": true}});
        for seed in 0..SEEDS {
            let body = json!({"prompt": "x", "n": N, "max_tokens": 250, "seed": seed, "response_format": format});
            let answer = server.ok("/v1/completions", body);
            for choice in answer["choices"].as_array().expect("choices") {
                all += 1;
                if choice["finish_reason"] == "length" {
                    continue;
                }
                complete += 1;
                let text = choice["text"].as_str().expect("a text");
                let document: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
                if let Err(error) = validator.validate(&document) {
                    panic!("{text} is not a document of {schema}: {error}");
                }
            }
        }
    }
    println!("{complete} of {all} documents came to their end and validate");
    assert!(all >= 1000 && complete * 100 >= all * 95, "{complete} of {all}");
    server.assert_idle_soon();
}
