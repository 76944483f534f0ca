//! The arrows of ARCHITECTURE.md, checked: which module may use which, and where `unsafe` and SIMD may be.
//!
//! This reads the sources as tokens, without comments, strings and `#[cfg(test)]` items: enough for `crate::a::b`,
//! `use crate::{a, b::c}` and `super::super::a`, and it depends on nothing.

use std::fs;
use std::path::{Path, PathBuf};

const ALL: &[&str] = &["*"];

/// Every top-level module and the ones that it may use. The order is that of the data's way.
const ARROWS: &[(&str, &[&str])] = &[
    ("memory", &[]),
    ("topology", &[]),
    ("gguf", &[]),
    ("quant", &["gguf"]),
    ("weights", &["gguf", "quant", "memory", "topology"]),
    ("kernels", &["gguf", "quant"]),
    ("threads", &["topology"]),
    ("machine", &["threads", "topology", "kernels", "memory"]),
    ("ops", &["kernels", "threads", "quant", "gguf", "memory"]),
    ("skip", &["gguf", "quant"]),
    ("model", &["weights", "memory", "quant", "ops", "threads", "kernels", "skip", "gguf"]),
    ("tokenizer", &["gguf"]),
    ("sampler", &["tokenizer"]),
    ("chat", &["gguf", "tokenizer"]),
    (
        "session",
        &["model", "weights", "kernels", "ops", "tokenizer", "sampler", "skip", "threads", "chat", "gguf"],
    ),
    (
        "eval",
        &[
            "memory",
            "session",
            "model",
            "ops",
            "weights",
            "kernels",
            "machine",
            "tokenizer",
            "skip",
            "threads",
            "chat",
            "sampler",
        ],
    ),
    ("pull", &["memory"]),
    ("serve", &["session", "model", "tokenizer", "sampler", "skip", "chat"]),
    ("cli", ALL),
];

/// Of some modules only these items may be used: the types, not what reads files with them.
const ONLY_TYPES: &[&str] = &["quant", "kernels", "ops"];
const GGUF_TYPES: &[&str] = &["GgmlType", "types"];

const UNSAFE_IN: &[&str] = &["kernels", "threads", "weights"];
const SIMD_IN: &[&str] = &["kernels"];

/// A word or a punctuation mark, with its line.
type Token = (String, usize);

/// The tokens of a source text, without comments and the insides of literals.
fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let (mut out, mut i, mut line) = (Vec::new(), 0, 1);
    while let Some(&c) = chars.get(i) {
        let start = i;
        if chars[i..].starts_with(&['/', '/']) {
            i += chars[i..].iter().take_while(|&&c| c != '\n').count();
        } else if chars[i..].starts_with(&['/', '*']) {
            i += block_comment(&chars[i..]);
        } else if let Some(n) = raw_string(&chars[i..]) {
            i += n;
        } else if c == '"' {
            i += quoted(&chars[i..], '"');
        } else if c == '\'' {
            // Either a character or a lifetime.
            let is_char = chars.get(i + 1) == Some(&'\\') || chars.get(i + 2) == Some(&'\'');
            i += if is_char { quoted(&chars[i..], '\'') } else { 1 };
        } else if is_word(c) {
            i += chars[i..].iter().take_while(|&&c| is_word(c)).count();
            out.push((chars[start..i].iter().collect(), line));
        } else if chars[i..].starts_with(&[':', ':']) {
            i += 2;
            out.push(("::".into(), line));
        } else {
            i += 1;
            if !c.is_whitespace() {
                out.push((c.into(), line));
            }
        }
        line += chars[start..i.min(chars.len())].iter().filter(|&&c| c == '\n').count();
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Length of a comment that starts here; they nest.
fn block_comment(chars: &[char]) -> usize {
    let (mut depth, mut i) = (0, 0);
    while i < chars.len() {
        match chars[i..] {
            ['/', '*', ..] => (depth, i) = (depth + 1, i + 2),
            ['*', '/', ..] => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

/// Length of `r"..."`, `r#"..."#`, `br"..."` or `cr"..."` if one starts here.
fn raw_string(chars: &[char]) -> Option<usize> {
    let prefix = if matches!(chars[0], 'b' | 'c') { 1 } else { 0 };
    if chars.get(prefix) != Some(&'r') {
        return None;
    }
    let hashes = chars[prefix + 1..].iter().take_while(|&&c| c == '#').count();
    let open = prefix + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let ends = |i: &usize| {
        chars[*i] == '"' && chars[i + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes
    };
    Some((open + 1..chars.len()).find(ends).map_or(chars.len(), |i| i + 1 + hashes))
}

/// Length of a literal in `quote`s that starts here.
fn quoted(chars: &[char], quote: char) -> usize {
    let mut i = 1;
    while i < chars.len() && chars[i] != quote {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// Removes every item under an attribute `#[cfg(test)]` or `#[cfg(all(test, ...))]`.
fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let word = |i: usize| tokens.get(i).map_or("", |t| t.0.as_str());
    let (mut out, mut i) = (Vec::new(), 0);
    while i < tokens.len() {
        let is_cfg = word(i) == "#" && word(i + 1) == "[" && word(i + 2) == "cfg";
        let is_test = is_cfg && (word(i + 4) == "test" || word(i + 4) == "all" && word(i + 6) == "test");
        if is_test {
            i = end_of_item(tokens, i);
        } else {
            out.push(tokens[i].clone());
            i += 1;
        }
    }
    out
}

/// Where the item ends that starts with the attribute at `i`: behind its `;`, or behind its braces.
fn end_of_item(tokens: &[Token], mut i: usize) -> usize {
    let mut depth = 0;
    while i < tokens.len() {
        match tokens[i].0.as_str() {
            "{" | "[" | "(" => depth += 1,
            "}" if depth == 1 => return i + 1,
            "}" | "]" | ")" => depth -= 1,
            ";" if depth == 0 => return i + 1,
            _ => {}
        }
        i += 1;
    }
    i
}

/// What is named behind `root::`, as the first one or two segments: of `use crate::{a, b::{c, d}}` that is
/// `a`, `b::c` and `b::d`.
fn named_under(tokens: &[Token], root: &str) -> Vec<(Vec<String>, usize)> {
    let mut out = Vec::new();
    for i in 0..tokens.len() {
        if tokens[i].0 == root && tokens.get(i + 1).is_some_and(|t| t.0 == "::") {
            paths_at(tokens, i + 2, &[], &mut out);
        }
    }
    out
}

/// Adds the paths that start at `i`; returns where they end.
fn paths_at(tokens: &[Token], mut i: usize, before: &[String], out: &mut Vec<(Vec<String>, usize)>) -> usize {
    let word = |i: usize| tokens.get(i).map_or("", |t| t.0.as_str());
    if word(i) == "{" {
        i += 1;
        while i < tokens.len() && word(i) != "}" {
            i = if word(i) == "," { i + 1 } else { paths_at(tokens, i, before, out) };
        }
        return i + 1;
    }
    let Some((name, line)) = tokens.get(i) else { return i + 1 };
    let path = [before, std::slice::from_ref(name)].concat();
    if word(i + 1) == "::" && path.len() < 2 {
        return paths_at(tokens, i + 2, &path, out);
    }
    out.push((path, *line));
    // The rest of the path, and `as name`, up to the next comma of the group.
    let mut depth = 0;
    while i < tokens.len() {
        match word(i) {
            "{" => depth += 1,
            "}" | "," if depth == 0 => return i,
            "}" => depth -= 1,
            ";" => return i,
            _ => {}
        }
        i += 1;
    }
    i
}

/// `super::super::x` that reaches the root of the crate from a file `depth` modules deep, as `crate::x`.
fn without_supers(tokens: Vec<Token>, depth: usize) -> Vec<Token> {
    let (mut out, mut i): (Vec<Token>, _) = (Vec::new(), 0);
    while i < tokens.len() {
        let chain =
            tokens[i..].chunks(2).take_while(|c| c.len() == 2 && c[0].0 == "super" && c[1].0 == "::").count();
        if chain > 0 && chain >= depth {
            out.extend([("crate".into(), tokens[i].1), ("::".into(), tokens[i].1)]);
            i += 2 * chain;
        } else {
            out.push(tokens[i].clone());
            i += 1;
        }
    }
    out
}

/// The complaints about one file; `path` is relative to `src`.
fn complaints(path: &str, source: &str) -> Vec<String> {
    let parts: Vec<&str> = path.split('/').collect();
    if path == "lib.rs" || parts.iter().any(|p| matches!(*p, "tests.rs" | "tests")) {
        return Vec::new();
    }
    // `main` is the end of the command line.
    let module =
        if path == "main.rs" || parts[0] == "bin" { "cli" } else { parts[0].trim_end_matches(".rs") };
    let depth = parts.len() - usize::from(parts.len() > 1 && parts[parts.len() - 1] == "mod.rs");
    let tokens = without_supers(without_tests(&tokens(source)), depth);

    let mut found = Vec::new();
    let mut complain = |line: usize, what: String| found.push(format!("src/{path}:{line}: {what}"));
    let Some(allowed) = ARROWS.iter().find(|a| a.0 == module).map(|a| a.1) else {
        complain(1, format!("`{module}` is not in the table of tests/layering.rs: give it its place"));
        return found;
    };
    for (used, line) in named_under(&tokens, "crate") {
        let to = used[0].as_str();
        if to == module || !ARROWS.iter().any(|a| a.0 == to) {
            continue;
        }
        if allowed != ALL && !allowed.contains(&to) {
            complain(line, format!("`{module}` may not use `{to}`"));
        }
        let item = used.get(1).map_or("", String::as_str);
        if to == "gguf" && ONLY_TYPES.contains(&module) && !GGUF_TYPES.contains(&item) {
            complain(line, format!("`{module}` may use the types of `gguf` only, not `{item}`"));
        }
    }
    if !UNSAFE_IN.contains(&module) {
        for (_, line) in tokens.iter().filter(|t| t.0 == "unsafe") {
            complain(*line, format!("`unsafe` in `{module}`; it may be in {UNSAFE_IN:?}"));
        }
    }
    if !SIMD_IN.contains(&module) {
        let arch = ["core", "std"].map(|root| named_under(&tokens, root)).concat();
        let arch = arch.into_iter().filter(|(used, _)| used[0] == "arch").map(|(_, line)| line);
        let detect = tokens.iter().filter(|t| t.0.starts_with("is_") && t.0.ends_with("_feature_detected"));
        for line in arch.chain(detect.map(|t| t.1)) {
            complain(line, format!("SIMD or CPU detection in `{module}`; it belongs in {SIMD_IN:?}"));
        }
    }
    if path == "gguf/mod.rs" && !source.contains("#![forbid(unsafe_code)]") {
        complain(1, "`gguf` reads untrusted bytes and must `#![forbid(unsafe_code)]`".into());
    }
    found
}

fn rust_files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("src can be read") {
        let path = entry.expect("src can be read").path();
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

#[test]
fn the_sources_keep_to_the_arrows() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    files.sort();
    assert!(files.len() > 5, "found the sources");
    let check = |file: &PathBuf| {
        let path = file.strip_prefix(&src).expect("below src").to_string_lossy().replace('\\', "/");
        complaints(&path, &fs::read_to_string(file).expect("a source file"))
    };
    let found: Vec<String> = files.iter().flat_map(check).collect();
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

#[test]
fn the_table_has_no_cycles_and_no_unknown_names() {
    for (i, (module, uses)) in ARROWS.iter().enumerate().filter(|(_, a)| a.1 != ALL) {
        for used in *uses {
            let at = ARROWS.iter().position(|a| a.0 == *used);
            assert!(at.is_some_and(|at| at < i), "`{module}` uses `{used}`, which must come before it");
        }
    }
}

/// What is wrong with the synthetic file, with the `src/path:` in front removed.
fn of(path: &str, source: &str) -> Vec<String> {
    let prefix = format!("src/{path}:");
    complaints(path, source).into_iter().map(|c| c.trim_start_matches(&prefix).to_owned()).collect()
}

#[test]
fn offending_arrows_are_reported() {
    for (path, source) in [
        ("gguf/mod.rs", "#![forbid(unsafe_code)]\nuse crate::model::Model;"),
        ("gguf/x.rs", "\nfn f() { crate::model::g() }"),
        ("gguf/x.rs", "\nuse crate::{gguf::A, model::{B, C as D}};"),
        ("gguf/x.rs", "\nuse crate::{gguf::{A, b::B}, model};"),
        ("gguf/x.rs", "\nuse super::super::model::B;"),
        ("gguf/mod.rs", "#![forbid(unsafe_code)]\nuse super::model::B;"),
    ] {
        let found = of(path, source);
        assert!(
            !found.is_empty() && found.iter().all(|c| c == "2: `gguf` may not use `model`"),
            "{source}: {found:?}"
        );
    }
    assert_eq!(
        of("quant/x.rs", "use crate::gguf::Reader;"),
        ["1: `quant` may use the types of `gguf` only, not `Reader`"]
    );
    assert_eq!(
        of("fresh.rs", ""),
        ["1: `fresh` is not in the table of tests/layering.rs: give it its place"]
    );
}

#[test]
fn offending_unsafe_and_simd_are_reported() {
    assert_eq!(of("gguf/mod.rs", ""), ["1: `gguf` reads untrusted bytes and must `#![forbid(unsafe_code)]`"]);
    for source in ["fn f() { unsafe { g() } }", "unsafe impl Send for X {}", "#[unsafe(no_mangle)] fn f() {}"]
    {
        assert_eq!(of("ops/x.rs", source).len(), 1, "{source}");
        assert!(of("kernels/x.rs", source).is_empty(), "{source}");
    }
    for source in [
        "use core::arch::x86_64::*;",
        "use std::{fs, arch::asm};",
        "fn f() { std::arch::asm!(\"nop\") }",
        "fn f() { is_x86_feature_detected!(\"avx2\"); }",
    ] {
        assert_eq!(of("ops/x.rs", source).len(), 1, "{source}");
        assert!(of("kernels/x86/avx2.rs", source).is_empty(), "{source}");
    }
}

#[test]
fn what_is_allowed_is_not_reported() {
    for (path, source) in [
        ("ops/matmul.rs", "use crate::{gguf::GgmlType, kernels::Kernel, quant::{self, Matrix}};"),
        (
            "gguf/x.rs",
            "// crate::model::A\n/* crate::model /* unsafe */ */ const S: &str = \"unsafe crate::model::A\";",
        ),
        (
            "gguf/x.rs",
            "const S: &str = r#\"unsafe \"crate::model::A\" \"#; fn f<'a>(c: char) -> bool { c == '\"' }",
        ),
        (
            "gguf/x.rs",
            "fn f() {}\n#[cfg(test)]\nmod tests {\n use crate::model::M;\n fn g() { unsafe {} }\n}",
        ),
        ("gguf/x.rs", "#[cfg(all(test, unix))]\nuse crate::model::M;"),
        ("gguf/tests.rs", "use crate::model::M;"),
        (
            "gguf/x.rs",
            "#![deny(unsafe_code)]\nuse super::types::GgmlType; use crate::gguf::A; pub(crate) fn f() {}",
        ),
        ("cli/run.rs", "use crate::{model::Model, pull, session::Session};"),
        ("gguf/a/b.rs", "use super::super::model::NotTheModuleOfTheCrate;"),
    ] {
        let found = of(path, source);
        assert!(found.is_empty(), "{source}: {found:?}");
    }
    // What follows a removed test module is read again.
    let after = "#[cfg(test)]\nmod tests { fn f() { [0; 3]; } }\nuse crate::model::M;";
    assert_eq!(of("gguf/x.rs", after), ["3: `gguf` may not use `model`"]);
}
