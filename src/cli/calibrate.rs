//! `skiff calibrate`: what a text tells about skipping in a model.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::ProgressStyle;
use serde::Serialize;

use super::args::{EngineArgs, calibration_path, in_range};
use super::generate::progress_bar;
use super::interrupt::Listener;
use super::{Failure, Outcome, note, put, read_text};
use crate::eval::calibrate::{
    CalibrateError, CalibrateOptions, Stage, calibrate, calibrate_output, complete,
};
use crate::eval::plot::{Plot, Series, Style};
use crate::skip::{Calibration, Point};
use crate::tokenizer::EncodeOptions;

const EXAMPLES: &str = "\
Examples:
  skiff calibrate -f wiki.txt
  skiff calibrate -m model.gguf -f wiki.txt -o model.skip.gguf --plot profile.svg
  skiff calibrate -m model.gguf -f wiki.txt -f chats.txt --parse-special
  skiff calibrate -m model.gguf -f wiki.txt --complete model.skip.gguf
  skiff calibrate -m model.gguf -f wiki.txt --only-output
  skiff run --skip auto \"Why is the sky blue?\"

The first windows of the (first) text are held out: quality is measured on them, everything else learnt from the rest.
Give texts like those that the model will meet: stand-ins know no others. The file is found again beside the model
(model.skip.gguf for model.gguf) and fits that model only.";

/// Learn from a text what can be skipped in a model
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CalibrateArgs {
    /// The text (- is stdin); given again, another one: as much is learnt from each
    #[arg(short, long, value_name = "FILE", required = true)]
    file: Vec<PathBuf>,
    /// Recognise control tokens by their text: for transcripts of chats
    #[arg(long)]
    parse_special: bool,
    /// Where the calibration goes [default: beside the model]
    #[arg(short, long, value_name = "S.skip.gguf")]
    output: Option<PathBuf>,
    /// Windows of 512 tokens to learn from
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = in_range(2, 100_000))]
    windows: usize,
    /// Complete this calibration of the model: learn only what it lacks, as one of an older version does, and keep the rest
    #[arg(long, value_name = "S.skip.gguf")]
    complete: Option<PathBuf>,
    /// Learn about the output matrix alone, in a fraction of the time: for --skip output, and auto takes nothing else
    #[arg(long, conflicts_with = "complete")]
    only_output: bool,
    /// Held-out windows to measure quality on; 0: none, and nothing for --skip auto
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = in_range(0, 100_000))]
    quality_windows: usize,
    /// Draw the cosine profile
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Print no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

pub(super) fn run(args: &CalibrateArgs) -> Outcome {
    let texts: Vec<String> = args.file.iter().map(|path| read_text(path)).collect::<Result<_, _>>()?;
    let mut engine = args.engine.load()?;
    let encode = EncodeOptions { add_special: true, parse_special: args.parse_special };
    let texts: Vec<Vec<u32>> =
        texts.iter().map(|text| engine.tokenizer().encode(text, encode)).collect::<Result<_, _>>()?;
    let names = args.file.iter().map(|path| path.file_name().unwrap_or_default().to_string_lossy());
    let text = names.collect::<Vec<_>>().join(", ");
    let options = CalibrateOptions { windows: args.windows, quality_windows: args.quality_windows, text };

    let listener = Listener::new();
    let bar = progress_bar(1, "", args.quiet);
    if let Ok(style) = ProgressStyle::with_template("{msg:<42} {wide_bar} {pos}/{len}, {eta} left") {
        bar.set_style(style);
    }
    let mut now = None;
    let (model, on) = engine.model_mut().ok_or_else(|| Failure::Error("the model is in use".into()))?;
    let known = args.complete.as_ref().map(|path| model.load_calibration(path).cloned()).transpose()?;
    let mut progress = |stage, done: usize, all: usize| {
        if now != Some(stage) {
            now = Some(stage);
            bar.reset();
            bar.set_message(in_words(stage));
        }
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        !listener.raised()
    };
    let found = match known {
        Some(known) => complete(model, on, known, &texts, &options, &mut progress),
        None if args.only_output => calibrate_output(model, on, &texts, &options, &mut progress),
        None => calibrate(model, on, &texts, &options, &mut progress),
    };
    bar.finish_and_clear();
    let found = match found {
        Err(CalibrateError::Interrupted) => return Err(Failure::Interrupted),
        Err(error) => return Err(Failure::Error(format!("{}: {error}", options.text))),
        Ok(found) => found,
    };
    let path = args.output.clone().unwrap_or_else(|| calibration_path(engine.model().weights().path()));
    write(&path, |out| Ok(found.write(&engine.model().facts(), out).map(drop)?))?;
    if let Some(svg) = &args.plot {
        let picture = profile(&found).svg()?;
        write(svg, |out| Ok(out.write_all(picture.as_bytes())?))?;
    }
    note(&format!("written: {}", path.display()));
    put(&if args.json { json(&found)? } else { table(&found) })?;
    Ok(())
}

fn in_words(stage: Stage) -> &'static str {
    match stage {
        Stage::Activations => "1/6 activations of the full model",
        Stage::Damage => "2/6 what each FFN is worth",
        Stage::Sensitivity => "3/6 what errors of its sides cost",
        Stage::StandIns => "4/6 what can stand in for an FFN",
        Stage::Strengths => "5/6 strengths of the policies",
        Stage::Quality => "6/6 quality on held-out text",
    }
}

/// Writes a file that is there as a whole or not at all.
fn write(path: &Path, produce: impl FnOnce(&mut BufWriter<File>) -> Outcome) -> Outcome {
    let wrong = |error| Failure::Error(format!("{}: {error}", path.display()));
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let mut out = BufWriter::new(File::create(&part).map_err(wrong)?);
    produce(&mut out)?;
    out.into_inner().map_err(|e| wrong(e.into_error()))?.sync_all().map_err(wrong)?;
    std::fs::rename(&part, path).map_err(wrong)
}

/// The cosine profile: the picture of the paper's figure 2.
fn profile(found: &Calibration) -> Plot {
    let series = |name: &str, values: &[f32]| Series {
        name: name.into(),
        points: values.iter().enumerate().map(|(layer, &v)| (layer as f64, f64::from(v))).collect(),
        style: Style::LineAndDots,
        ..Series::default()
    };
    let through: Vec<f32> = found.influence.iter().map(|i| 1.0 - i).collect();
    Plot {
        title: format!("What layers do to the residual stream ({})", found.text),
        x_title: "layer".into(),
        y_title: "mean cosine".into(),
        log_y: false,
        series: vec![series("across the FFN", &found.cosines), series("across the layer", &through)],
    }
}

fn table(found: &Calibration) -> String {
    let mut text = String::from("layer  cosine  influence  KL if skipped\n");
    let measured = found.damage.iter().any(|&damage| damage > 0.0);
    for (layer, cosine) in found.cosines.iter().enumerate() {
        let cold = if (found.cold.0..found.cold.1).contains(&layer) { "" } else { "  cold" };
        let influence = found.influence[layer];
        let damage = if measured { format!("{:.4}", found.damage[layer]) } else { "-".into() };
        text.push_str(&format!("{layer:>5}  {cosine:>6.4}  {influence:>9.4}  {damage:>13}{cold}\n"));
    }
    if !found.points.is_empty() {
        text.push_str(
            "\npolicy           ratio  FFNs skipped  bytes unread  perplexity x      KL  same top 1\n",
        );
    }
    for (i, p) in found.points.iter().enumerate() {
        let auto = if found.auto == Some(i) { "  auto" } else { "" };
        text.push_str(&format!(
            "{:<15}  {:>5.2}  {:>10.1} %  {:>10.1} %  {:>12.4}  {:>6.4}  {:>8.1} %{auto}\n",
            p.policy,
            p.ratio,
            100.0 * p.blocks,
            100.0 * p.bytes,
            p.perplexity,
            p.kl,
            100.0 * p.same_top1
        ));
    }
    text
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    fingerprint: &'a str,
    tokens: u32,
    cosine_by_layer: &'a [f32],
    influence_by_layer: &'a [f32],
    kl_by_layer: &'a [f32],
    cold: (usize, usize),
    points: &'a [Point],
    auto: Option<&'a Point>,
}

fn json(found: &Calibration) -> Result<String, Failure> {
    let output = Output {
        fingerprint: &found.model,
        tokens: found.tokens,
        cosine_by_layer: &found.cosines,
        influence_by_layer: &found.influence,
        kl_by_layer: &found.damage,
        cold: found.cold,
        points: &found.points,
        auto: found.auto_point(),
    };
    Ok(format!("{}\n", serde_json::to_string(&output)?))
}
