//! `skiff info`: this machine, or a model.

use std::collections::BTreeMap;

use clap::Args;
use serde_json::{Map, Value as Json, json};

use super::args::ModelArgs;
use super::{Outcome, put};
use crate::gguf::{GgmlType, Metadata};
use crate::kernels::Kernels;
use crate::machine::{Machine, int8_peak, read_sweep, sweep_buffer};
use crate::model::{Model, ModelError};
use crate::pull;
use crate::threads::Team;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

const EXAMPLES: &str = "\
Examples:
  skiff info                      the machine: CPU, kernels, cores, memory bandwidth
  skiff info -m smollm2           a model: header, shapes, types, tokenizer, template, speed limit
  skiff info -m smollm2 --tensors --json";

/// Lines of a chat template that are shown.
const TEMPLATE_LINES: usize = 4;
/// Characters of each.
const TEMPLATE_CHARS: usize = 100;

/// Show what this machine can do, or what a model is
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct InfoArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// List every tensor
    #[arg(long, requires = "model")]
    tensors: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Do not measure memory bandwidth and integer speed (which takes a few seconds)
    #[arg(long)]
    no_bandwidth: bool,
}

pub(super) fn run(args: &InfoArgs) -> Outcome {
    let sections = match &args.model.model {
        Some(name) => model(args, name)?,
        None => machine(args)?,
    };
    let text = match args.json {
        true => format!("{}\n", serde_json::to_string_pretty(&to_json(&sections))?),
        false => to_table(&sections),
    };
    Ok(put(&text)?)
}

/// A part of the output: its name in JSON, its title, and what it holds.
struct Section {
    key: &'static str,
    content: Content,
}

enum Content {
    /// Name and value; numbers stay numbers in JSON.
    Fields(Vec<(String, Json)>),
    /// Column names and rows.
    Table(&'static [&'static str], Vec<Vec<Json>>),
}

fn machine(args: &InfoArgs) -> Result<Vec<Section>, super::Failure> {
    let machine = Machine::detect();
    let chosen = Kernels::select(None)?.name();
    let kernels = Kernels::list().map(|(name, needs, available)| {
        let state = match (available, name == chosen) {
            (_, true) => "chosen".into(),
            (true, _) => "available".into(),
            _ => format!("this CPU has no {needs}"),
        };
        vec![json!(name), json!(needs), json!(available), json!(state)]
    });
    let kernels = Content::Table(&["kernel", "needs", "available", "state"], kernels.collect());
    let mut fields = vec![("version".to_owned(), json!(env!("CARGO_PKG_VERSION")))];
    if let Json::Object(object) = serde_json::to_value(&machine)? {
        fields.extend(object);
    }
    let mut sections = vec![
        Section { key: "machine", content: Content::Fields(fields) },
        Section { key: "kernels", content: kernels },
    ];
    if !args.no_bandwidth {
        sections.push(Section { key: "read_bandwidth", content: bandwidth(&machine)? });
        sections.push(Section { key: "integer_peak", content: integer_peak(&machine)? });
    }
    Ok(sections)
}

fn bandwidth(machine: &Machine) -> Result<Content, super::Failure> {
    let mut rows = Vec::new();
    if let Some(buffer) = sweep_buffer(machine.memory) {
        let mut counts = vec![1, machine.default_threads];
        counts.dedup();
        for threads in counts {
            let speed = read_sweep(&Team::new(threads).map_err(ModelError::from)?, &buffer, 3);
            rows.push(vec![json!(threads), json!(round(speed / 1e9)), json!(size_of_val(&buffer[..]))]);
        }
    }
    Ok(Content::Table(&["threads", "gb_per_second", "bytes_read"], rows))
}

/// 8-bit operations of each kernel that this CPU can run, where that is measured.
fn integer_peak(machine: &Machine) -> Result<Content, super::Failure> {
    let team = Team::new(machine.default_threads).map_err(ModelError::from)?;
    let row = |kernels: Kernels| {
        let peak = int8_peak(&team, kernels, 20)?;
        Some(vec![json!(kernels.name()), json!(team.threads()), json!(round(peak / 1e12))])
    };
    Ok(Content::Table(&["kernel", "threads", "tops"], Kernels::available().filter_map(row).collect()))
}

fn model(args: &InfoArgs, name: &str) -> Result<Vec<Section>, super::Failure> {
    let path = pull::resolve(Some(name))?;
    let weights = Weights::open(&path)?;
    let loaded = Model::load(&path);
    let mut sections = vec![Section { key: "file", content: file(&weights) }];
    sections.push(Section { key: "model", content: shapes(weights.metadata(), &loaded) });
    sections.push(Section { key: "tokenizer", content: tokenizer(weights.metadata()) });
    sections.push(Section { key: "types", content: types(&weights) });
    if let (Ok(model), false) = (&loaded, args.no_bandwidth) {
        sections.push(Section { key: "speed_limit", content: speed_limit(model)? });
    }
    if args.tensors {
        let row = |t: &crate::gguf::TensorInfo| {
            vec![json!(t.name), json!(t.ty.name()), json!(t.shape), json!(t.n_bytes)]
        };
        let rows = weights.tensors().map(row).collect();
        sections.push(Section {
            key: "tensors",
            content: Content::Table(&["name", "type", "shape", "bytes"], rows),
        });
    }
    Ok(sections)
}

fn file(weights: &Weights) -> Content {
    let gguf = weights.gguf();
    let mut fields = vec![
        ("path".to_owned(), json!(weights.path().to_string_lossy())),
        ("files".to_owned(), json!(weights.files())),
        ("bytes".to_owned(), json!(weights.file_bytes())),
        ("gguf_version".to_owned(), json!(gguf.version)),
        ("alignment".to_owned(), json!(gguf.alignment)),
        ("tensors".to_owned(), json!(weights.tensors().count())),
    ];
    let general = gguf.metadata.iter().filter(|(key, _)| key.starts_with("general."));
    fields.extend(general.map(|(key, value)| (key.to_owned(), json!(shown(value)))));
    Content::Fields(fields)
}

/// A metadata value; strings without quotes.
fn shown(value: &crate::gguf::Value) -> String {
    match value {
        crate::gguf::Value::String(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        other => other.to_string(),
    }
}

fn shapes(metadata: &Metadata, loaded: &Result<Model, ModelError>) -> Content {
    let model = match loaded {
        Ok(model) => model,
        Err(error) => {
            let architecture = metadata.opt_str("general.architecture").ok().flatten();
            return Content::Fields(vec![
                ("architecture".into(), json!(architecture)),
                ("cannot_run".into(), json!(error.to_string())),
            ]);
        }
    };
    let c = model.config();
    let fields = [
        ("architecture", json!(format!("{:?}", c.architecture).to_lowercase())),
        ("layers", json!(c.layers)),
        ("embedding", json!(c.embedding)),
        ("ffn", json!(c.ffn)),
        ("heads", json!(c.heads)),
        ("kv_heads", json!(c.kv_heads)),
        ("head_dim", json!(c.head_dim)),
        ("vocab", json!(c.vocab)),
        ("trained_context", json!(c.trained_context)),
        ("norm_eps", json!(f64::from(c.norm_eps))),
        (
            "rope",
            json!(format!("base {}, {} dimensions, {:?}", c.rope.base, c.rope.dimensions, c.rope.scaling)),
        ),
        ("kv_bytes_per_token_f16", json!(4 * c.layers * c.kv_dim())),
        ("decode_bytes_per_token", json!(model.decode_bytes())),
        ("ffn_share_of_decode_bytes", json!(round(model.ffn_bytes() as f64 / model.decode_bytes() as f64))),
    ];
    Content::Fields(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

fn tokenizer(metadata: &Metadata) -> Content {
    let key = |key: &str| metadata.get(key).map(shown);
    let mut fields = vec![
        ("model".to_owned(), json!(key("tokenizer.ggml.model"))),
        ("pre".to_owned(), json!(key("tokenizer.ggml.pre"))),
    ];
    match Tokenizer::from_gguf(metadata) {
        Ok(tokenizer) => fields.extend(special_tokens(&tokenizer)),
        Err(error) => fields.push(("cannot_run".into(), json!(error.to_string()))),
    }
    let template = key("tokenizer.chat_template");
    fields.push(("chat_template".into(), json!(template.map(|t| first_lines(&t)))));
    Content::Fields(fields)
}

fn special_tokens(tokenizer: &Tokenizer) -> Vec<(String, Json)> {
    let show = |id: u32| format!("{id} {:?}", tokenizer.token_text(id).unwrap_or_default());
    let ends = (0..tokenizer.vocab_size() as u32).filter(|&id| tokenizer.is_end_of_generation(id));
    vec![
        ("tokens".into(), json!(tokenizer.vocab_size())),
        ("begin_of_text".into(), json!(tokenizer.bos().map(show))),
        ("end_of_text".into(), json!(tokenizer.eos().map(show))),
        ("end_of_generation".into(), json!(ends.map(show).collect::<Vec<_>>())),
    ]
}

fn first_lines(template: &str) -> Vec<String> {
    let lines = template.lines().take(TEMPLATE_LINES);
    let mut lines: Vec<String> = lines.map(|line| line.chars().take(TEMPLATE_CHARS).collect()).collect();
    if lines.iter().map(String::len).sum::<usize>() + lines.len() < template.len() {
        lines.push(format!("... ({} bytes)", template.len()));
    }
    lines
}

fn types(weights: &Weights) -> Content {
    let mut counts: BTreeMap<GgmlType, (usize, u64)> = BTreeMap::new();
    for tensor in weights.tensors() {
        let (count, bytes) = counts.entry(tensor.ty).or_default();
        *count += 1;
        *bytes += tensor.n_bytes;
    }
    let row =
        |(ty, (count, bytes)): (GgmlType, (usize, u64))| vec![json!(ty.name()), json!(count), json!(bytes)];
    Content::Table(&["type", "tensors", "bytes"], counts.into_iter().map(row).collect())
}

/// What the memory allows, if every weight is read once a token.
fn speed_limit(model: &Model) -> Result<Content, super::Failure> {
    let machine = Machine::detect();
    let Some(buffer) = sweep_buffer(machine.memory) else { return Ok(Content::Fields(Vec::new())) };
    let threads = machine.default_threads;
    let speed = read_sweep(&Team::new(threads).map_err(ModelError::from)?, &buffer, 3);
    Ok(Content::Fields(vec![
        ("threads".into(), json!(threads)),
        ("read_gb_per_second".into(), json!(round(speed / 1e9))),
        ("decode_tokens_per_second".into(), json!(round(speed / model.decode_bytes() as f64))),
    ]))
}

/// Two decimals are what such a measurement is good for.
fn round(value: f64) -> f64 {
    (100.0 * value).round() / 100.0
}

fn to_json(sections: &[Section]) -> Json {
    let content = |content: &Content| match content {
        Content::Fields(fields) => Json::Object(fields.iter().cloned().collect::<Map<_, _>>()),
        Content::Table(columns, rows) => {
            let object =
                |row: &Vec<Json>| columns.iter().map(|c| c.to_string()).zip(row.iter().cloned()).collect();
            Json::Array(rows.iter().map(object).map(Json::Object).collect())
        }
    };
    Json::Object(sections.iter().map(|s| (s.key.to_owned(), content(&s.content))).collect())
}

fn to_table(sections: &[Section]) -> String {
    let mut text = String::new();
    for section in sections {
        let title = section.key.replace('_', " ");
        text.push_str(&format!("{}{title}\n", if text.is_empty() { "" } else { "\n" }));
        match &section.content {
            Content::Fields(fields) => {
                fields.iter().for_each(|(name, value)| text.push_str(&field_line(name, value)))
            }
            Content::Table(columns, rows) => text.push_str(&aligned(columns, rows)),
        }
    }
    text
}

fn field_line(name: &str, value: &Json) -> String {
    match value {
        Json::Object(parts) => {
            parts.iter().map(|(part, value)| field_line(&format!("{name}.{part}"), value)).collect()
        }
        _ => {
            // Keys of the file are shown as they are.
            let title = if name.starts_with("general.") { name.to_owned() } else { name.replace('_', " ") };
            format!("  {title:<26} {}\n", word(name, value))
        }
    }
}

/// A value for people: sizes with a unit, lists with blanks, multi-line lists indented.
fn word(name: &str, value: &Json) -> String {
    match value {
        Json::Null => "-".into(),
        Json::Bool(yes) => if *yes { "yes" } else { "no" }.into(),
        Json::String(text) => text.clone(),
        Json::Array(items) if name.contains("template") => {
            let lines: Vec<String> = items.iter().map(|item| format!("\n      {}", word("", item))).collect();
            lines.concat()
        }
        Json::Array(items) => items.iter().map(|item| word("", item)).collect::<Vec<_>>().join(" "),
        Json::Number(n) if name.contains("bytes") || name.starts_with("memory") => match n.as_u64() {
            Some(bytes) => size(bytes),
            None => n.to_string(),
        },
        other => other.to_string(),
    }
}

fn size(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} bytes"),
        10_000..10_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

fn aligned(columns: &[&str], rows: &[Vec<Json>]) -> String {
    let mut cells: Vec<Vec<String>> = vec![columns.iter().map(|c| c.replace('_', " ")).collect()];
    cells.extend(
        rows.iter().map(|row| row.iter().zip(columns).map(|(value, name)| word(name, value)).collect()),
    );
    let width = |c: usize| cells.iter().map(|row| row[c].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let padded: Vec<String> = row.iter().zip(&widths).map(|(cell, &w)| format!("{cell:<w$}")).collect();
        format!("  {}\n", padded.join("  ").trim_end())
    };
    cells.iter().map(line).collect()
}
