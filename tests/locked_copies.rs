//! `--mlock` keeps copies of weights in memory as it does the weights. A process of its own: the system counts locked bytes by
//! process.

#![cfg(target_os = "linux")]

mod common;

use common::models::{ModelFile, Shape};
use skiff::gguf::GgmlType;
use skiff::kernels::Kernels;
use skiff::model::{ColumnForms, Model};
use skiff::ops::Compute;
use skiff::skip::{CutPlan, LayerCut, OutputCalibration};
use skiff::threads::Team;
use skiff::weights::LoadOptions;

const SHAPE: Shape = Shape { layers: 2, embedding: 512, ffn: 2048, heads: 4, kv_heads: 2, vocab: 12_345 };

/// Bytes that this process has locked, as the system says.
fn locked() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    1024 * line.trim().trim_end_matches(" kB").trim().parse::<usize>().unwrap()
}

#[test]
fn copies_of_locked_weights_are_locked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, ModelFile::llama(SHAPE, GgmlType::Q8_0).bytes()).unwrap();
    let (team, kernels) = (Team::new(2).unwrap(), Kernels::select(None).unwrap());
    let on = Compute { team: &team, kernels };
    for mlock in [false, true] {
        let options = LoadOptions { mlock, ..LoadOptions::default() };
        let mut model = match Model::load_with(&path, options, &|_, _| {}) {
            Ok(model) => model,
            Err(error) => return eprintln!("SKIPPED: this process may not lock so much: {error}"),
        };
        let before = locked();
        let plan = CutPlan { layers: vec![Some(LayerCut::default()); SHAPE.layers], ..CutPlan::default() };
        let columns = match model.prepare_cuts(on, plan, ColumnForms::All, |_, _| {}) {
            Ok(()) => model.column_bytes(),
            Err(error) => return eprintln!("SKIPPED: this process may not lock so much: {error}"),
        };
        let with_columns = locked() - before;
        let n = SHAPE.embedding;
        let known = OutputCalibration {
            centre: vec![0.0; n],
            directions: vec![0.0; OutputCalibration::DIRECTIONS * n],
        };
        model.prepare_shortlist(on, known).unwrap();
        let (with_both, copy) = (locked() - before, model.shortlist_bytes().unwrap());
        if mlock {
            // Factors of scales lie elsewhere, and pages are whole.
            assert!(with_columns > columns * 9 / 10, "{with_columns} of {columns} bytes by columns");
            assert!(with_both >= with_columns + copy, "{with_both} with {copy} bytes of the output matrix");
        } else {
            assert_eq!(with_both, 0, "nobody asked");
        }
    }
}
