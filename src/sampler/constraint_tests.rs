use std::time::{Duration, Instant};

use serde_json::Value;

use super::super::{Rng, Sampler, SamplerOptions};
use super::*;

const EOS: u32 = 256;
const CONTROL: u32 = 257;

/// Every byte, an end token, a control token, and some tokens of several bytes.
fn toy() -> TokenTable {
    let mut tokens: Vec<(Vec<u8>, bool)> = (0..=255).map(|byte| (vec![byte], false)).collect();
    tokens.push((b"</s>".to_vec(), true));
    tokens.push((b"<|im_end|>".to_vec(), true));
    for text in ["{\"", "\":", "\": ", "true", "fal", "\",", "}", "12", " ", "ab\"", "é", ""] {
        tokens.push((text.as_bytes().to_vec(), false));
    }
    TokenTable::new(tokens, EOS).unwrap()
}

fn text_of(table: &TokenTable, id: u32) -> Vec<u8> {
    table.shared.factory.tok_env().tok_trie().token(id).to_vec()
}

/// Samples a reply under the constraint from random logits that lean towards the printable.
fn reply(table: &TokenTable, mut constraint: Constraint, seed: u64) -> Option<String> {
    let mut rng = Rng::new(seed);
    let options = SamplerOptions { seed: Some(seed), temperature: 1.0, ..SamplerOptions::default() };
    let mut sampler = Sampler::new(options).unwrap();
    let mut bytes = Vec::new();
    for _ in 0..400 {
        let mut logits: Vec<f32> = (0..table.len())
            .map(|id| {
                let is_closing = b"\"]}".contains(&(id as u8)) && id < 256;
                rng.next_f64() as f32 * 4.0 + if is_closing || id >= 256 { 4.0 } else { 0.0 }
            })
            .collect();
        constraint.mask(&mut logits).unwrap();
        let id = sampler.sample(&mut logits);
        constraint.accept(id).unwrap();
        if id == EOS {
            return Some(String::from_utf8(bytes).unwrap());
        }
        assert_ne!(id, CONTROL);
        bytes.extend(text_of(table, id));
    }
    None
}

/// Replies to many seeds; most must end.
fn replies(schema: &str, seeds: u64) -> Vec<Value> {
    let table = toy();
    let constraint = Constraint::json_schema(schema, &table).unwrap();
    let texts: Vec<String> = (0..seeds).filter_map(|seed| reply(&table, constraint.clone(), seed)).collect();
    assert!(texts.len() as u64 * 2 >= seeds, "only {} of {seeds} replies ended", texts.len());
    let parse = |text: &String| serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    texts.iter().map(parse).collect()
}

#[test]
fn replies_are_valid_under_the_schema() {
    let schema = r#"{
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "dog", 7]},
            "age": {"type": "integer", "minimum": 3, "maximum": 120},
            "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}
        },
        "required": ["kind", "age", "tags"],
        "additionalProperties": false
    }"#;
    for value in replies(schema, 60) {
        let object = value.as_object().unwrap();
        assert_eq!(object.len(), 3, "{value}");
        assert!([Value::from("cat"), "dog".into(), 7.into()].contains(&object["kind"]), "{value}");
        assert!((3..=120).contains(&object["age"].as_i64().unwrap()), "{value}");
        let tags = object["tags"].as_array().unwrap();
        assert!((1..=3).contains(&tags.len()) && tags.iter().all(Value::is_boolean), "{value}");
    }
}

#[test]
fn numbers_and_strings_keep_their_bounds() {
    for value in replies(r#"{"type": "number", "minimum": -1.5, "maximum": 2}"#, 60) {
        assert!((-1.5..=2.0).contains(&value.as_f64().unwrap()), "{value}");
    }
    for value in replies(r#"{"type": "string", "maxLength": 5}"#, 60) {
        assert!(value.as_str().unwrap().chars().count() <= 5, "{value}");
    }
}

#[test]
fn json_object_gives_objects() {
    let table = toy();
    let constraint = Constraint::json_object(&table).unwrap();
    let texts: Vec<String> = (0..60).filter_map(|seed| reply(&table, constraint.clone(), seed)).collect();
    assert!(texts.len() > 10, "{}", texts.len());
    for text in texts {
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!(value.is_object());
    }
}

#[test]
fn a_grammar_is_followed_to_its_end() {
    let table = toy();
    let mut constraint = Constraint::grammar("start: \"yes\" | \"no\"", &table).unwrap();
    for byte in *b"yes" {
        assert!(!constraint.is_complete());
        let mut logits = vec![0.0; table.len()];
        constraint.mask(&mut logits).unwrap();
        assert_eq!(logits[byte as usize], 0.0);
        assert_eq!(logits[EOS as usize], f32::NEG_INFINITY);
        constraint.accept(byte.into()).unwrap();
    }
    assert!(constraint.is_complete() && constraint.may_end());
    let mut logits = vec![0.0; table.len()];
    constraint.mask(&mut logits).unwrap();
    let left: Vec<usize> = (0..logits.len()).filter(|&id| logits[id] == 0.0).collect();
    assert_eq!(left, [EOS as usize]);
    constraint.accept(EOS).unwrap();
    assert!(constraint.accept(u32::from(b'y')).is_err());
}

#[test]
fn a_token_that_is_not_allowed_is_refused() {
    let table = toy();
    for id in [u32::from(b'x'), EOS, CONTROL, 1 << 20] {
        let mut constraint = Constraint::grammar("start: \"yes\"", &table).unwrap();
        let error = constraint.accept(id).unwrap_err();
        assert!(matches!(error, ConstraintError::Rejected { id: refused, .. } if refused == id), "{error}");
        assert!(!constraint.is_complete());
        assert!(constraint.mask(&mut vec![0.0; table.len()]).is_err());
    }
}

#[test]
fn a_grammar_can_ask_for_a_control_token() {
    let table = toy();
    let mut constraint = Constraint::grammar("start: \"a\" <|im_end|>", &table).unwrap();
    constraint.accept(u32::from(b'a')).unwrap();
    let mut logits = vec![0.0; table.len()];
    constraint.mask(&mut logits).unwrap();
    assert_eq!(logits.iter().filter(|l| l.is_finite()).count(), 1);
    assert_eq!(logits[CONTROL as usize], 0.0);
}

#[test]
fn the_grammar_decides_when_the_model_rules_out_all_it_allows() {
    let table = toy();
    let mut constraint = Constraint::grammar("start: \"y\"", &table).unwrap();
    let mut logits = vec![f32::NAN; table.len() + 9];
    constraint.mask(&mut logits).unwrap();
    let mut sampler = Sampler::new(SamplerOptions::greedy()).unwrap();
    assert_eq!(sampler.sample(&mut logits), u32::from(b'y'));
    // A vocabulary of the model that ends before the only token is no way out either.
    assert!(constraint.mask(&mut [0.0; 10]).is_err());
}

#[test]
fn bad_schemas_are_errors() {
    let table = toy();
    for schema in [
        "",
        "{",
        "[1]",
        r#"{"type": "strin"}"#,
        r#"{"type": "integer", "minimum": 5, "maximum": 3}"#,
        r#"{"type": "string", "pattern": "(("}"#,
        r##"{"$ref": "#/definitions/none"}"##,
        r#"{"minLenght": "#,
    ] {
        let error = Constraint::json_schema(schema, &table).unwrap_err();
        assert!(matches!(&error, ConstraintError::Schema(m) if !m.is_empty() && !m.contains('<')), "{error}");
    }
}

#[test]
fn bad_grammars_are_errors() {
    let table = toy();
    for grammar in ["", "start: (", "start: missing", "start: /(/", "root: \"a\"", "%import nothing"] {
        let error = Constraint::grammar(grammar, &table).unwrap_err();
        assert!(matches!(&error, ConstraintError::Grammar(m) if !m.is_empty()), "{grammar}: {error}");
    }
    assert_eq!(Constraint::grammar("root ::= \"a\" | \"b\"", &table).unwrap_err(), ConstraintError::Gbnf);
    assert!(Constraint::grammar("start: \"::=\"", &table).is_ok());
}

#[test]
fn hostile_grammars_end_in_time() {
    let table = toy();
    let long = " ".repeat(MAX_SOURCE_BYTES + 1);
    assert_eq!(
        Constraint::grammar(&long, &table).unwrap_err(),
        ConstraintError::TooLong { bytes: long.len() }
    );
    let deep = format!("start: {}\"a\"{}", "(".repeat(5000), ")".repeat(5000));
    assert_eq!(Constraint::grammar(&deep, &table).unwrap_err(), ConstraintError::TooDeep);

    let nested_arrays = "{\"items\":".repeat(100) + "{}" + &"}".repeat(100);
    let sources = [
        (true, nested_arrays.as_str()),
        (true, r#"{"type": "array", "minItems": 100000000, "maxItems": 100000001}"#),
        (true, r#"{"type": "string", "minLength": 1000000}"#),
        (true, r##"{"allOf": [{"$ref": "#"}]}"##),
        (true, r##"{"$ref": "#"}"##),
        (true, r##"{"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}]}"##),
        (true, r#"{"type": "string", "pattern": "^(a?){5000}a{5000}$"}"#),
        (false, "start: \"a\"{100000000}"),
        (false, "start: /((a{1000}){1000}){1000}/"),
        (false, "start: a\na: a a | \"x\" | a a a | "),
        (false, "start: start"),
        (false, "start: /(a|b)*a(a|b){30}/"),
    ];
    for (is_schema, source) in sources {
        let started = Instant::now();
        let compiled = match is_schema {
            true => Constraint::json_schema(source, &table),
            false => Constraint::grammar(source, &table),
        };
        if let Ok(mut constraint) = compiled {
            let mut rng = Rng::new(1);
            let mut sampler = Sampler::new(SamplerOptions::default()).unwrap();
            for _ in 0..30 {
                let mut logits: Vec<f32> = (0..table.len()).map(|_| rng.next_f64() as f32).collect();
                if constraint.mask(&mut logits).is_err()
                    || constraint.accept(sampler.sample(&mut logits)).is_err()
                {
                    break;
                }
            }
        }
        // A bound on seconds, wide enough for a busy machine.
        assert!(started.elapsed() < Duration::from_secs(20), "{source:.60}: {:?}", started.elapsed());
    }
}

#[test]
fn bad_vocabularies_are_errors() {
    assert!(TokenTable::new(vec![], 0).is_err());
    assert!(TokenTable::new(vec![(b"a".to_vec(), false)], 1).is_err());
    assert!(TokenTable::with_ends(vec![(b"a".to_vec(), false)], &[]).is_err());
    let huge = vec![(vec![b'a'; 500], false); 10_000];
    assert!(TokenTable::new(huge, 0).is_err());
    // Too long for the trie, equal tokens, empty ones, a marker byte.
    let odd = [vec![b'a'; 5000], vec![b'b'], vec![b'b'], vec![], vec![0xff, b'<', b'x', b'>'], b"e".to_vec()];
    let table = TokenTable::new(odd.into_iter().map(|bytes| (bytes, false)).collect(), 5).unwrap();
    let mut constraint = Constraint::grammar("start: /[ab]+/", &table).unwrap();
    let mut logits = [0.0; 6];
    constraint.mask(&mut logits).unwrap();
    assert_eq!(logits.map(f32::is_finite), [false, true, true, false, false, false]);
}

#[test]
fn a_table_for_a_large_vocabulary_is_built_quickly() {
    let mut rng = Rng::new(5);
    let mut word = || (0..2 + rng.next_u64() % 9).map(|_| b'a' + (rng.next_u64() % 26) as u8).collect();
    let tokens = (0..150_000).map(|_| (word(), false)).collect();
    let started = Instant::now();
    let table = TokenTable::new(tokens, 0).unwrap();
    let built = started.elapsed();
    let started = Instant::now();
    let mut constraint = Constraint::json_object(&table).unwrap();
    let compiled = started.elapsed();
    assert!(constraint.mask(&mut vec![0.0; 150_000]).is_err(), "no token starts an object");
    println!("150k tokens: table {built:?}, constraint {compiled:?}");
    // Wide enough for a busy machine.
    assert!(built < Duration::from_secs(5), "{built:?}");
}
