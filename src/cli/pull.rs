//! `skiff pull`: models to the cache.

use clap::Args;

use super::{Failure, Outcome, put};
use crate::pull;

const EXAMPLES: &str = "\
Examples:
  skiff pull smollm2                      a model that is known by name
  skiff pull OWNER/NAME/FILE.gguf         a file of the hub (HF_ENDPOINT, HF_TOKEN are respected)
  skiff pull --list                       what can be named, and what is there

The cache is SKIFF_CACHE, or else skiff/ in the XDG cache. What was begun is continued.";

/// Bring a model to the cache and print its path
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct PullArgs {
    /// Name of a model, or OWNER/NAME/FILE.gguf
    #[arg(value_name = "NAME|REPO/FILE.gguf", required_unless_present = "list")]
    spec: Option<String>,
    /// List the models that are known by name or in the cache
    #[arg(long, conflicts_with = "spec")]
    list: bool,
}

pub(super) fn run(args: &PullArgs) -> Outcome {
    match &args.spec {
        Some(spec) => Ok(put(&format!("{}\n", pull::pull(spec)?.display()))?),
        None => list(),
    }
}

fn list() -> Result<(), Failure> {
    for model in pull::models()? {
        let state = model.path.map_or("not pulled".into(), |path| path.display().to_string());
        let size = format!("{:.0} MB", model.bytes as f64 / 1e6);
        put(&format!("{:<20} {size:>8}  {}  {}\n", model.name, state, model.about))?;
    }
    Ok(())
}
