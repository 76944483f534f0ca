//! `general.*` of a checkpoint: who made what, from the card, `_name_or_path` and the name of the directory, in this
//! order, as llama.cpp's converter finds them (its package `gguf`, `metadata.py`).

use std::path::Path;

use regex::Regex;
use serde_json::Value;
use skiff::gguf::{Builder, StringArray};

use super::card::Card;
use super::config::HfConfig;
use super::json::JsonFile;
use crate::ConvertError;

/// What the name of a model says, `organisation/Base-7B-Chat-v2`.
#[derive(Debug, Default, PartialEq)]
struct Name {
    full: String,
    organization: Option<String>,
    basename: Option<String>,
    finetune: Option<String>,
    version: Option<String>,
    size: Option<String>,
}

#[derive(Clone, Copy, PartialEq)]
enum Part {
    Unknown,
    Version,
    Type,
    Size,
    Finetune,
}

/// Expressions for the parts of a name, whatever their case.
struct Patterns {
    version: Regex,
    ty: Regex,
    size: Regex,
    finetune: Regex,
}

impl Patterns {
    fn new() -> Option<Self> {
        let whole = |inner: &str| Regex::new(&format!("^(?i-u:{inner})$")).ok();
        Some(Self {
            version: whole(r"(v|iter)?[0-9]+([.][0-9]+)*")?,
            ty: whole(r"i?q[0-9](_[a-z0-9])*|b?fp?(16|32)")?,
            size: whole(r"(a|[0-9]+x)?[0-9]+([._][0-9]+)?[kmbt][0-9]?|small|mini|medium|large|x?xl")?,
            finetune: whole("chat|instruct|vision|lora")?,
        })
    }

    fn part(&self, i: usize, text: &str, weights: u64) -> (Part, String) {
        if self.version.is_match(text) {
            (Part::Version, text.to_owned())
        } else if self.ty.is_match(text) {
            (Part::Type, text.to_uppercase())
        } else if i > 0 && self.size.is_match(text) {
            size_part(text, weights)
        } else if i > 0 && self.finetune.is_match(text) {
            (Part::Finetune, text.to_owned())
        } else {
            (Part::Unknown, text.to_owned())
        }
    }
}

/// `7b` is `7B`, and `7b1` (of Bloom) `7.1B`; what is far from the number of weights is the length of a context.
fn size_part(text: &str, weights: u64) -> (Part, String) {
    let mut text = text.replace('_', ".");
    if let [.., unit, digit @ b'0'..=b'9'] = text.as_bytes() {
        text = format!("{}.{}{}", &text[..text.len() - 2], *digit as char, *unit as char);
    }
    let end = text.len() - 1;
    if !text[..end].ends_with(|c: char| c.is_ascii_digit()) {
        return (Part::Size, text); // a word
    }
    let power = "KMBT".find(text[end..].to_ascii_uppercase().as_str()).unwrap_or(0) as i32 + 1;
    let claimed = text[..end].parse::<f64>().map(|n| n * 1000f64.powi(power));
    let weights = weights as f64;
    match claimed {
        Ok(claimed) if (claimed - weights).abs() > weights * 7.0 / 8.0 => {
            (Part::Finetune, text.to_ascii_lowercase())
        }
        _ => {
            let unit = text.split_off(end).to_ascii_uppercase();
            (Part::Size, text + &unit)
        }
    }
}

impl Name {
    fn parse(id: &str, weights: u64) -> Self {
        if id.contains(' ') {
            return Self { full: id.to_owned(), ..Self::default() }; // a title, not a name
        }
        let (organization, full) = id.split_once('/').map_or((None, id), |(org, full)| (Some(org), full));
        let organization = organization.filter(|org| !org.is_empty() && !org.starts_with('.'));
        let mut name =
            Self { full: full.to_owned(), organization: organization.map(str::to_owned), ..Self::default() };
        let Some(patterns) = Patterns::new() else { return name };
        let texts = full.split('-').filter(|part| !part.is_empty()).enumerate();
        let mut parts: Vec<(Part, String)> = texts.map(|(i, text)| patterns.part(i, text, weights)).collect();
        // "mini" is a size only where no number is.
        let number = |(part, text): &(Part, String)| {
            *part == Part::Size && text.contains(|c: char| c.is_ascii_digit())
        };
        if parts.iter().any(number) {
            let words =
                parts.iter_mut().filter(|p| p.0 == Part::Size && p.1.chars().all(char::is_alphabetic));
            words.for_each(|p| p.0 = Part::Unknown);
        }
        let in_base = |(part, text): &(Part, String)| {
            *part == Part::Version || *part == Part::Unknown && text.starts_with(char::is_alphabetic)
        };
        let leading = parts.iter().position(|p| !in_base(p)).unwrap_or(parts.len());
        // A version at the end of the whole name is the model's, one before other parts the base's.
        let base = match leading == parts.len() {
            true => parts.iter().rposition(|p| p.0 != Part::Version).map_or(0, |last| last + 1),
            false => leading,
        };
        let join = |texts: Vec<&str>| (!texts.is_empty()).then(|| texts.join("-"));
        let of = |wanted: fn(Part) -> bool| {
            join(parts[base..].iter().filter(|p| wanted(p.0)).map(|p| p.1.as_str()).collect())
        };
        name.finetune = of(|part| matches!(part, Part::Finetune | Part::Unknown));
        name.version = of(|part| part == Part::Version);
        let mut sizes: Vec<&str> = Vec::new();
        for (_, text) in parts.iter().filter(|p| p.0 == Part::Size) {
            if !sizes.contains(&text.as_str()) {
                sizes.push(text);
            }
        }
        name.size = join(sizes);
        if name.size.is_some() || name.finetune.is_some() || name.version.is_some() {
            name.basename = join(parts[..base].iter().map(|p| p.1.as_str()).collect());
        }
        name
    }
}

/// A name as a title: spaces for dashes, words that are all small with a capital.
fn title(name: &str) -> String {
    let word = |word: &str| {
        let small = word.contains(char::is_lowercase) && !word.contains(char::is_uppercase);
        let digits = word.strip_prefix('v').unwrap_or(word);
        let version = digits.chars().all(|c| c.is_ascii_digit() || c == '.') && word.len() > digits.len();
        if !small || version || word.starts_with(|c: char| c.is_ascii_digit()) {
            return word.to_owned();
        }
        let mut before = ' ';
        let capital = |c: char| {
            let first = !std::mem::replace(&mut before, c).is_alphabetic();
            if first { c.to_uppercase().next().unwrap_or(c) } else { c }
        };
        word.chars().map(capital).collect()
    };
    name.trim().replace('-', " ").split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

/// `135M`, `1.5B`: two digits at least.
fn size_label(weights: u64) -> String {
    let n = weights as f64;
    let (scaled, unit) = match n {
        n if n > 1e12 => (n / 1e12, 'T'),
        n if n > 1e9 => (n / 1e9, 'B'),
        n if n > 1e6 => (n / 1e6, 'M'),
        n => (n / 1e3, 'K'),
    };
    let digits = if scaled.round() >= 10.0 { 0 } else { 1 };
    format!("{scaled:.digits$}{unit}")
}

/// Writes `general.*` of the checkpoint in `dir`, which has `weights` weights.
pub(super) fn write(
    builder: &mut Builder,
    dir: &Path,
    config: &HfConfig,
    weights: u64,
) -> Result<(), ConvertError> {
    builder.insert("general.architecture", config.architecture)?;
    builder.insert("general.type", "model")?;
    sampling(builder, dir)?;
    let card = Card::read(dir)?;
    let path = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let folder = path.file_name().map(|name| name.to_string_lossy().into_owned());
    // A path of somebody's machine is no name.
    let given = config.name.as_deref().filter(|name| name.matches('/').count() <= 1);
    let names: Vec<Name> =
        given.into_iter().chain(folder.as_deref()).map(|id| Name::parse(id, weights)).collect();
    let found = |of: fn(&Name) -> Option<&String>| names.iter().find_map(of).cloned();
    let carded = |keys: &[&str]| card.first_of(keys).map(str::to_owned);
    let name = carded(&["name", "model_name"]).or_else(|| names.first().map(|name| title(&name.full)));
    let organization = found(|n| n.organization.as_ref()).map(|org| title(&org));
    let license = Some(card.all("license").join(",")).filter(|license| !license.is_empty());
    for (key, value) in [
        ("name", Some(name.unwrap_or_else(|| config.architecture.to_owned()))),
        ("author", carded(&["author", "model_author", "model_creator"])),
        ("version", carded(&["version", "model_version"]).or(found(|n| n.version.as_ref()))),
        ("organization", carded(&["organization", "model_organization"]).or(organization)),
        ("finetune", carded(&["finetune", "model_finetune"]).or(found(|n| n.finetune.as_ref()))),
        (
            "basename",
            carded(&["basename", "model_basename", "model_type"]).or(found(|n| n.basename.as_ref())),
        ),
        ("description", carded(&["description", "model_description"])),
        (
            "size_label",
            carded(&["size_label", "model_size_label"])
                .or(found(|n| n.size.as_ref()))
                .or(Some(size_label(weights))),
        ),
        ("license", license),
        ("license.name", carded(&["license_name"])),
        ("license.link", carded(&["license_link"])),
        ("source.url", carded(&["url", "model_url"])),
        ("source.repo_url", carded(&["repo_url", "model_repo_url"])),
    ] {
        if let Some(value) = value {
            builder.insert(format!("general.{key}"), value)?;
        }
    }
    origins(builder, "base_model", card.all("base_model"), weights)?;
    origins(builder, "dataset", card.all("datasets"), weights)?;
    for (key, fields) in [("tags", ["tags", "pipeline_tag"]), ("languages", ["languages", "language"])] {
        let words: StringArray = fields.iter().flat_map(|field| card.all(field)).collect();
        if !words.is_empty() {
            builder.insert(format!("general.{key}"), words)?;
        }
    }
    Ok(())
}

/// Models or texts that this one was made of, by their names on the hub.
fn origins(builder: &mut Builder, kind: &str, ids: &[String], weights: u64) -> Result<(), ConvertError> {
    if ids.is_empty() {
        return Ok(());
    }
    builder.insert(format!("general.{kind}.count"), ids.len() as u32)?;
    for (i, id) in ids.iter().enumerate() {
        let key = |field: &str| format!("general.{kind}.{i}.{field}");
        if id.contains("://") {
            builder.insert(key("repo_url"), id.as_str())?;
            continue;
        }
        let name = Name::parse(id, weights);
        builder.insert(key("name"), title(&name.full))?;
        if let Some(version) = &name.version {
            builder.insert(key("version"), version.as_str())?;
        }
        if let Some(organization) = &name.organization {
            builder.insert(key("organization"), title(organization))?;
            builder.insert(key("repo_url"), format!("https://huggingface.co/{id}"))?;
        }
    }
    Ok(())
}

/// The sampling that generation_config.json recommends.
fn sampling(builder: &mut Builder, dir: &Path) -> Result<(), ConvertError> {
    let Some(json) = JsonFile::optional(dir, "generation_config.json")? else { return Ok(()) };
    if let Some(k) = json.get("top_k").and_then(Value::as_i64).and_then(|k| i32::try_from(k).ok()) {
        builder.insert("general.sampling.top_k", k)?;
    }
    for (key, field) in [("top_p", "top_p"), ("min_p", "min_p"), ("temp", "temperature")] {
        if let Some(value) = json.number(field)? {
            builder.insert(format!("general.sampling.{key}"), value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected by the package `gguf` (`Metadata.get_model_id_components`, `id_to_title`, `size_label`).
    #[test]
    fn names_are_taken_apart_as_by_the_converter() {
        let show = |id: &str, weights| {
            let n = Name::parse(id, weights);
            let fields = [Some(n.full), n.organization, n.basename, n.finetune, n.version, n.size];
            fields.map(Option::unwrap_or_default).join("|")
        };
        for (id, weights, expected) in [
            (
                "meta-llama/Llama-3.1-8B-Instruct",
                8_030_261_248,
                "Llama-3.1-8B-Instruct|meta-llama|Llama-3.1|Instruct||8B",
            ),
            ("SmolLM2-135M-Instruct", 134_515_008, "SmolLM2-135M-Instruct||SmolLM2|Instruct||135M"),
            (
                "mistralai/Mistral-7B-Instruct-v0.2",
                7_241_732_096,
                "Mistral-7B-Instruct-v0.2|mistralai|Mistral|Instruct|v0.2|7B",
            ),
            ("Qwen/Qwen2.5-Coder-1.5B", 1_543_714_304, "Qwen2.5-Coder-1.5B|Qwen|Qwen2.5-Coder|||1.5B"),
            (
                "togethercomputer/LLaMA-2-7B-32K",
                6_738_415_616,
                "LLaMA-2-7B-32K|togethercomputer|LLaMA-2|32k||7B",
            ),
            ("Phi-3-mini-4k-instruct", 3_821_079_552, "Phi-3-mini-4k-instruct||Phi-3|4k-instruct||mini"),
            ("bigscience/bloom-7b1-petals", 7_000_000_000, "bloom-7b1-petals|bigscience|bloom|petals||7.1B"),
            ("model", 1000, "model|||||"),
            ("a nice model", 1000, "a nice model|||||"),
            ("../x-v2", 1000, "x-v2||x||v2|"),
        ] {
            assert_eq!(show(id, weights), expected);
        }
        for (name, expected) in
            [("smollm2-135m", "Smollm2 135m"), ("Llama-3.1-8B", "Llama 3.1 8B"), ("a3b-v0.2", "A3B v0.2")]
        {
            assert_eq!(title(name), expected);
        }
        let labels = [134_515_008, 1_543_714_304, 6_738_415_616, 12_345, 999].map(size_label);
        assert_eq!(labels, ["135M", "1.5B", "6.7B", "12K", "1.0K"]);
        for odd in ["", "-", "/", "//", "b-b", "1-é", "a-1b-é7b"] {
            Name::parse(odd, 0); // no panic
            title(odd);
        }
    }
}
