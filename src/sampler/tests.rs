//! The chain as a whole, and every stage against a naive version of itself.

use proptest::prelude::*;

use super::candidates::Candidate;
use super::*;

fn logits() -> impl Strategy<Value = Vec<f32>> {
    // Few distinct values in part, so that ties happen.
    let logit =
        prop_oneof![-8.0f32..8.0, (-3i32..3).prop_map(|x| x as f32), Just(f32::NEG_INFINITY), Just(f32::NAN)];
    prop::collection::vec(logit, 1..700)
}

/// Runs one stage on fresh candidates, or on a list when `narrow` is set.
fn run(logits: &[f32], narrow: bool, stage: impl Fn(&mut Candidates<'_>)) -> Vec<Candidate> {
    let mut logits = logits.to_vec();
    let mut buffers = Buffers::default();
    let mut candidates = Candidates::new(&mut logits, &mut buffers);
    if narrow {
        candidates.narrow();
    }
    stage(&mut candidates);
    candidates.narrow();
    buffers.items
}

/// Tokens that can be sampled, most likely first.
fn ranked(logits: &[f32]) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    all.retain(|(_, logit)| *logit > f32::NEG_INFINITY);
    all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    all
}

fn softmax(ranked: &[(u32, f32)]) -> Vec<f64> {
    let max = ranked.first().map_or(0.0, |t| f64::from(t.1));
    let weights: Vec<f64> = ranked.iter().map(|t| (f64::from(t.1) - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

fn ids(items: &[Candidate]) -> Vec<u32> {
    items.iter().map(|c| c.id).collect()
}

fn sorted(mut ids: Vec<u32>) -> Vec<u32> {
    ids.sort_unstable();
    ids
}

proptest! {
    #[test]
    fn top_k_keeps_the_k_best(logits in logits(), k in 0u32..800, narrow: bool) {
        let got = ids(&run(&logits, narrow, |c| truncate::top_k(c, k)));
        let mut expected: Vec<u32> = ranked(&logits).iter().map(|t| t.0).collect();
        if k > 0 {
            expected.truncate(k as usize);
            prop_assert_eq!(got, expected);
        } else {
            prop_assert_eq!(got, sorted(expected));
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_nucleus(logits in logits(), p in 0.0f32..1.0, narrow: bool) {
        let got = ids(&run(&logits, narrow, |c| truncate::top_p(c, p)));
        let ranked = ranked(&logits);
        let expected: Vec<u32> = ranked.iter().take(got.len()).map(|t| t.0).collect();
        prop_assert_eq!(&got, &expected);
        // Sums differ in their last bits, so the place of the cut has a tolerance.
        let probabilities = softmax(&ranked);
        let kept: f64 = probabilities[..got.len()].iter().sum();
        let without_last = kept - got.len().checked_sub(1).map_or(0.0, |i| probabilities[i]);
        prop_assert!(ranked.is_empty() || (!got.is_empty() && kept >= f64::from(p) - 1e-5));
        prop_assert!(without_last <= f64::from(p) + 1e-5);
    }

    #[test]
    fn min_p_keeps_what_is_likely_enough(logits in logits(), p in 0.0f32..=1.0, narrow: bool) {
        let got = ids(&run(&logits, narrow, |c| truncate::min_p(c, p)));
        let ranked = ranked(&logits);
        let best = softmax(&ranked).first().copied().unwrap_or(0.0);
        for (&(id, _), probability) in ranked.iter().zip(softmax(&ranked)) {
            let floor = f64::from(p) * best;
            if (probability - floor).abs() > 1e-5 * floor {
                prop_assert_eq!(got.contains(&id), probability > floor);
            }
        }
        prop_assert!(ranked.is_empty() || got.contains(&ranked[0].0));
    }

    #[test]
    fn typical_keeps_the_least_surprising(logits in logits(), p in 0.0f32..1.0, narrow: bool) {
        let got = ids(&run(&logits, narrow, |c| truncate::typical(c, p)));
        let ranked = ranked(&logits);
        let probabilities = softmax(&ranked);
        let entropy: f64 = probabilities.iter().map(|p| -p * p.ln()).sum();
        let surprise = |p: f64| (-p.ln() - entropy).abs();
        let is_kept: Vec<bool> = ranked.iter().map(|t| got.contains(&t.0)).collect();
        let of = |kept: bool| {
            let both = probabilities.iter().zip(&is_kept);
            both.filter(move |(_, k)| **k == kept).map(|(p, _)| *p).collect::<Vec<f64>>()
        };
        let worst_kept = of(true).into_iter().map(surprise).fold(0.0, f64::max);
        let best_dropped = of(false).into_iter().map(surprise).fold(f64::INFINITY, f64::min);
        prop_assert!(worst_kept <= best_dropped + 1e-5, "{} {}", worst_kept, best_dropped);
        prop_assert!(ranked.is_empty() || of(true).iter().sum::<f64>() > f64::from(p) - 1e-5);
        let last = got.last().and_then(|id| ranked.iter().position(|t| t.0 == *id));
        let without_last = of(true).iter().sum::<f64>() - last.map_or(0.0, |i| probabilities[i]);
        prop_assert!(without_last <= f64::from(p) + 1e-5);
    }

    #[test]
    fn temperature_divides_differences(logits in logits(), t in 0.05f32..5.0, narrow: bool) {
        let got = run(&logits, narrow, |c| truncate::temperature(c, t));
        let mut expected = ranked(&logits);
        expected.sort_by_key(|x| x.0);
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        prop_assert_eq!(got.len(), expected.len());
        for (c, (id, logit)) in got.iter().zip(expected) {
            prop_assert_eq!(c.id, id);
            prop_assert!((c.logit - (logit - max) / t).abs() < 1e-4);
        }
    }

    #[test]
    fn greedy_is_argmax_with_ties_to_the_lowest_id(logits in logits()) {
        let mut sampler = Sampler::new(SamplerOptions::greedy()).unwrap();
        let id = sampler.sample(&mut logits.clone());
        if let Some(best) = ranked(&logits).first() {
            prop_assert_eq!(id, best.0);
        }
    }

    #[test]
    fn any_chain_gives_a_token_that_may_be_sampled(
        logits in logits(),
        order in Just(Stage::DEFAULT_ORDER.to_vec()).prop_shuffle(),
        (top_k, top_p, min_p, typical_p) in (0u32..50, 0.0f32..=1.0, 0.0f32..=1.0, 0.0f32..=1.0),
        temperature in prop_oneof![Just(0.0f32), Just(1e-30), 0.1f32..3.0, Just(1e30)],
        history in prop::collection::vec(0u32..20, 0..30),
    ) {
        let options = SamplerOptions {
            temperature, top_k, top_p, min_p, typical_p, order,
            repeat_penalty: 1.1, frequency_penalty: 0.1, presence_penalty: 0.1,
            dry_multiplier: 0.8, seed: Some(1), ..SamplerOptions::default()
        };
        let mut sampler = Sampler::new(options).unwrap();
        history.iter().for_each(|&id| sampler.accept(id));
        let id = sampler.sample(&mut logits.clone()) as usize;
        let any = logits.iter().any(|l| *l > f32::NEG_INFINITY);
        prop_assert!(id < logits.len() && (!any || logits[id] > f32::NEG_INFINITY));
    }
}

fn sampler(edit: impl FnOnce(&mut SamplerOptions)) -> Sampler {
    let mut options = SamplerOptions { seed: Some(42), ..SamplerOptions::default() };
    edit(&mut options);
    Sampler::new(options).unwrap()
}

fn draw(sampler: &mut Sampler, logits: &[f32], n: usize) -> Vec<u32> {
    (0..n).map(|_| sampler.sample(&mut logits.to_vec())).collect()
}

/// All stages but temperature do nothing.
fn plain(options: &mut SamplerOptions) {
    (options.top_k, options.top_p, options.min_p, options.temperature) = (0, 1.0, 0.0, 1.0);
}

#[test]
fn a_seed_gives_the_same_tokens_everywhere() {
    let logits: Vec<f32> = (0..32).map(|i| (i % 7) as f32 * 0.5).collect();
    let mut first = sampler(|_| {});
    let ids = draw(&mut first, &logits, 12);
    assert_eq!(ids, SEED_42);
    first.reset();
    assert_eq!(draw(&mut first, &logits, 12), SEED_42);
    assert_ne!(draw(&mut sampler(|o| o.seed = Some(43)), &logits, 12), SEED_42);
    let fresh = sampler(|o| o.seed = None);
    let mut again = sampler(|o| o.seed = Some(fresh.seed()));
    assert_eq!(draw(&mut fresh.clone(), &logits, 12), draw(&mut again, &logits, 12));
}

/// Computed by a separate script from the published generators, with softmax and inverse CDF over
/// the tokens most likely first.
const SEED_42: [u32; 12] = [18, 20, 30, 26, 18, 12, 13, 19, 13, 31, 12, 25];

#[test]
fn draws_follow_the_distribution() {
    let probabilities = [0.5f64, 0.2, 0.15, 0.1, 0.05];
    let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() as f32).collect();
    const N: usize = 50_000;
    let mut counts = [0usize; 5];
    for id in draw(&mut sampler(plain), &logits, N) {
        counts[id as usize] += 1;
    }
    let term = |(&n, p): (&usize, f64)| (n as f64 - N as f64 * p).powi(2) / (N as f64 * p);
    let chi_square: f64 = counts.iter().zip(probabilities).map(term).sum();
    // 99.9 % quantile at four degrees of freedom.
    assert!(chi_square < 18.47, "{chi_square} {counts:?}");
}

#[test]
fn the_order_matters() {
    // At temperature 3 both tokens pass a min-p of 0.3; at 1 the second does not.
    let logits = [2.0, 0.0];
    let with_order = |order: &[Stage]| {
        let mut sampler = sampler(|o| {
            plain(o);
            (o.temperature, o.min_p, o.order) = (3.0, 0.3, order.to_vec());
        });
        draw(&mut sampler, &logits, 200).contains(&1)
    };
    assert!(with_order(&[Stage::Temperature, Stage::MinP]));
    assert!(!with_order(&[Stage::MinP, Stage::Temperature]));
    // Penalties after top-k cannot bring back what it dropped.
    let penalised = |order: &[Stage]| {
        let mut sampler = sampler(|o| {
            plain(o);
            (o.top_k, o.presence_penalty, o.order) = (1, 100.0, order.to_vec());
        });
        sampler.accept(0);
        draw(&mut sampler, &logits, 1)[0]
    };
    assert_eq!(penalised(&[Stage::Penalties, Stage::TopK]), 1);
    assert_eq!(penalised(&[Stage::TopK, Stage::Penalties]), 0);
}

#[test]
fn greedy_sees_bias_and_penalties() {
    let mut biased = sampler(|o| {
        o.temperature = 0.0;
        o.logit_bias = vec![(0, 1.5), (2, f32::NEG_INFINITY), (99, 1.0)];
    });
    assert_eq!(draw(&mut biased, &[1.0, 2.0, 9.0], 1), [0]);
    let mut penalised = sampler(|o| (o.temperature, o.presence_penalty) = (0.0, 2.0));
    penalised.accept(1);
    assert_eq!(draw(&mut penalised, &[1.0, 2.0], 1), [0]);
    penalised.reset();
    assert_eq!(draw(&mut penalised, &[1.0, 2.0], 1), [1]);
}

#[test]
fn nan_and_infinite_logits_do_no_harm() {
    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;
    for temperature in [0.0, 0.8] {
        let mut sampler = sampler(|o| o.temperature = temperature);
        assert_eq!(draw(&mut sampler, &[], 1), [0]);
        assert_eq!(draw(&mut sampler, &[NAN, NAN], 1), [0]);
        assert_eq!(draw(&mut sampler, &[NAN, -INF, -INF], 1), [1]);
        assert_eq!(draw(&mut sampler, &[NAN, -5.0, -INF], 20), [1; 20]);
        assert_eq!(draw(&mut sampler, &[NAN, 3.0, INF, NAN], 20), [2; 20]);
    }
}

#[test]
fn buffers_stop_growing() {
    let logits: Vec<f32> = (0..5000).map(|i| ((i * 7919) % 5000) as f32 * 0.001).collect();
    let mut sampler = sampler(|o| (o.top_k, o.typical_p) = (0, 0.9));
    draw(&mut sampler, &logits, 1);
    let capacities =
        |s: &Sampler| (s.buffers.items.capacity(), s.buffers.weights.capacity(), s.buffers.keyed.capacity());
    let before = capacities(&sampler);
    draw(&mut sampler, &logits, 50);
    assert_eq!(capacities(&sampler), before);
}
