//! Decoding allocates nothing: every buffer of a step is made with the state.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::models::{ModelFile, WIDE, stand_ins};
use skiff::gguf::GgmlType;
use skiff::kernels::Kernels;
use skiff::model::{ColumnForms, FfnStep, KvType, Model, State};
use skiff::ops::Compute;
use skiff::skip::{
    Cut, CutPlan, Decision, FfnSkip, LayerCut, Never, OutputCalibration, Shortlisting, SkipPolicy, Uniform,
};
use skiff::threads::Team;

/// Allocations and growths of all threads, so far.
static COUNT: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call goes to the system allocator unchanged; counting touches no memory of theirs.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The same thresholds everywhere.
#[derive(Clone)]
struct CutAll(Cut);

impl SkipPolicy for CutAll {
    fn name(&self) -> &'static str {
        match self.0 {
            Cut::Columns { .. } => "cut by columns",
            Cut::Neurons { .. } => "cut of neurons",
        }
    }
    fn begin_token(&mut self, _: usize) {}
    fn decide(&mut self, _: usize) -> Decision {
        Decision::Cut(self.0)
    }
    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}

/// Positions enough to fill several tiles of attention.
const CONTEXT: usize = 200;

/// Allocations of decoding `CONTEXT - 3` tokens after a prompt of one token and two warm-up steps.
fn decode(model: &Model, on: Compute<'_>, kv: KvType, policy: Box<dyn SkipPolicy>) -> usize {
    let mut state = State::new(model, on.team, (CONTEXT, 64), kv, policy);
    let mut token = 1;
    let mut step = |state: &mut State, step: FfnStep| {
        model.forward(on, state, &[token], step).unwrap();
        let row = state.last_row().unwrap();
        let logits = model.logits(on, state, row);
        token = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
    };
    step(&mut state, FfnStep::Full);
    for index in 0..2 {
        step(&mut state, FfnStep::Governed { index });
    }
    let before = COUNT.load(Ordering::SeqCst);
    for index in 2..CONTEXT - 1 {
        step(&mut state, FfnStep::Governed { index });
    }
    COUNT.load(Ordering::SeqCst) - before
}

/// What is allocated, if anything is.
fn failure(model: &Model, on: Compute<'_>, kv: KvType, policy: Box<dyn SkipPolicy>) -> Option<String> {
    let name = policy.name();
    // The harness allocates too, when a test takes long, and so does a thread when it first goes to sleep; a decoder would every
    // time.
    let mut n = usize::MAX;
    for _ in 0..4 {
        n = n.min(decode(model, on, kv, policy.boxed_clone()));
        if n == 0 {
            break;
        }
    }
    let (kernels, threads) = (on.kernels.name(), on.team.threads());
    (n != 0).then(|| format!("{name} with {kernels}, threads {threads}, {kv:?}: {n}"))
}

/// One test, not several: others in this process would be counted too.
#[test]
fn decoding_allocates_nothing() {
    let before = COUNT.load(Ordering::SeqCst);
    drop(std::hint::black_box(vec![0u8; 100]));
    assert_eq!(COUNT.load(Ordering::SeqCst) - before, 1, "the count works");
    let mut failures = Vec::new();
    for ty in [GgmlType::Q4_1, GgmlType::F16] {
        let mut model = ModelFile::llama(WIDE, ty).load().unwrap();
        let plan = CutPlan { coarse: 3.0, layers: vec![Some(LayerCut::default()); WIDE.layers] };
        let team = Team::new(1).unwrap();
        let on = Compute { team: &team, kernels: Kernels::select(None).unwrap() };
        model.prepare_cuts(on, plan, ColumnForms::All, |_, _| {}).unwrap();
        model.prepare_stand_ins(stand_ins(WIDE, 0.05)).unwrap();
        // Among three the tiles of a key/value head are shared out: there are two heads.
        for threads in [1, 3] {
            let team = Team::new(threads).unwrap();
            // Threads allocate as they start: each must hold a chunk before counting begins.
            let all_here = Barrier::new(threads);
            team.run(threads, |_, _| _ = all_here.wait());
            for kernels in Kernels::available().filter(|k| k.name() != "scalar" || threads == 1) {
                for kv in [KvType::F32, KvType::F16, KvType::Q8_0] {
                    let skip = FfnSkip::new(0.5, 1, 10, (0, WIDE.layers));
                    let cut = CutAll(Cut::Columns { inputs: 0.3, inner: 0.1 });
                    let neurons = CutAll(Cut::Neurons { gate: 0.1, inner: 0.1 });
                    let stand_in = Uniform::stand_ins(0.0, 0, 0..WIDE.layers);
                    let mixed = Uniform::mixed(0.0, 0.3, 0, 0..WIDE.layers);
                    let policies: [Box<dyn SkipPolicy>; 6] = [
                        Box::new(Never),
                        Box::new(skip),
                        Box::new(cut),
                        Box::new(neurons),
                        Box::new(stand_in),
                        Box::new(mixed),
                    ];
                    for policy in policies {
                        let on = Compute { team: &team, kernels };
                        failures.extend(failure(&model, on, kv, policy));
                    }
                }
            }
        }
    }
    // The output matrix of the others is too small for a shortlist.
    let mut model = ModelFile::llama(WIDE, GgmlType::Q8_0).load().unwrap();
    let team = Team::new(1).unwrap();
    for kernels in Kernels::available() {
        let on = Compute { team: &team, kernels };
        let centre = vec![0.1; WIDE.embedding];
        let directions = centre.repeat(OutputCalibration::DIRECTIONS);
        model.prepare_shortlist(on, OutputCalibration { centre, directions }).unwrap();
        assert!(model.has_shortlist());
        let policy = Shortlisting { name: "output", ffns: Box::new(Never) };
        failures.extend(failure(&model, on, KvType::F16, Box::new(policy)));
    }
    assert!(failures.is_empty(), "allocations while decoding: {failures:#?}");
}
