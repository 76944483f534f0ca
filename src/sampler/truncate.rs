//! Stages that drop unlikely tokens: top-k, top-p, min-p and locally typical sampling.
//!
//! Each always keeps at least one token, if there is one.

use super::candidates::{Buffers, Candidate, Candidates, by_rank, usable, weight};

/// Keeps the `k` most likely tokens, most likely first; 0 keeps all.
pub(super) fn top_k(candidates: &mut Candidates<'_>, k: u32) {
    let k = k as usize;
    if k == 0 {
        return;
    }
    if candidates.narrowed {
        keep_best(&mut candidates.buffers.items, k);
    } else {
        candidates.narrowed = true;
        best_of(candidates.logits, k, &mut candidates.buffers.items);
    }
    candidates.buffers.items.sort_unstable_by(by_rank);
}

/// Leaves the best `k` of the vocabulary in `best`, unordered.
///
/// The buffer holds a few times `k`. When it is full, a linear-time selection cuts it to the best `k`,
/// and the worst of those is the floor for what follows: most tokens then cost one comparison.
pub(super) fn best_of(logits: &[f32], k: usize, best: &mut Vec<Candidate>) {
    // Below this a cut would come too often to be worth its call.
    const MIN_ROOM: usize = 256;
    let room = k.saturating_mul(2).max(MIN_ROOM);
    let mut floor = f32::NEG_INFINITY;
    best.clear();
    for candidate in usable(logits) {
        // An equal logit with a higher id ranks behind everything kept at the last cut.
        if candidate.logit > floor || floor == f32::NEG_INFINITY {
            best.push(candidate);
            if best.len() >= room && best.len() > k {
                floor = keep_best(best, k);
            }
        }
    }
    keep_best(best, k);
}

/// Cuts the list to its best `k`, unordered; the logit of the worst of them.
fn keep_best(items: &mut Vec<Candidate>, k: usize) -> f32 {
    if items.len() <= k {
        return f32::NEG_INFINITY;
    }
    let (_, worst, _) = items.select_nth_unstable_by(k - 1, by_rank);
    let floor = worst.logit;
    items.truncate(k);
    floor
}

/// Keeps the most likely tokens until their probability reaches `p`.
pub(super) fn top_p(candidates: &mut Candidates<'_>, p: f32) {
    // The nucleus is usually small: sort a prefix, and a longer one only if that does not do.
    const FIRST_PREFIX: usize = 64;
    const GROWTH: usize = 4;
    if p >= 1.0 {
        return;
    }
    candidates.narrow();
    let max = candidates.max();
    let items = &mut candidates.buffers.items;
    let total: f64 = items.iter().map(|c| weight(c.logit, max)).sum();
    let target = f64::from(p) * total;
    let (mut sum, mut sorted) = (0.0, 0);
    while sorted < items.len() {
        let end = (sorted * GROWTH).max(FIRST_PREFIX).min(items.len());
        sort_prefix(&mut items[sorted..], end - sorted);
        for i in sorted..end {
            sum += weight(items[i].logit, max);
            if sum >= target {
                items.truncate(i + 1);
                return;
            }
        }
        sorted = end;
    }
}

/// Moves the best `n` to the front and sorts them.
fn sort_prefix(items: &mut [Candidate], n: usize) {
    if n < items.len() {
        items.select_nth_unstable_by(n, by_rank);
    }
    items[..n].sort_unstable_by(by_rank);
}

/// Keeps tokens at least `p` times as likely as the best.
pub(super) fn min_p(candidates: &mut Candidates<'_>, p: f32) {
    if p > 0.0 {
        let floor = candidates.max() + p.ln();
        candidates.narrow_to(floor);
    }
}

/// Keeps the tokens whose information content is nearest to the entropy, until their probability
/// exceeds `p` (Meister et al., "Locally Typical Sampling", arXiv:2202.00666).
pub(super) fn typical(candidates: &mut Candidates<'_>, p: f32) {
    if p >= 1.0 {
        return;
    }
    candidates.narrow();
    let max = candidates.max();
    let Buffers { items, weights, keyed } = &mut *candidates.buffers;
    weights.clear();
    weights.extend(items.iter().map(|c| weight(c.logit, max)));
    let total: f64 = weights.iter().sum();
    let entropy: f64 = weights.iter().map(|w| w / total).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum();
    keyed.clear();
    keyed.extend(items.iter().zip(&*weights).map(|(c, w)| ((-(w / total).ln() - entropy).abs(), *c)));
    keyed.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(by_rank(&a.1, &b.1)));

    items.clear();
    let mut sum = 0.0;
    for (_, candidate) in keyed {
        items.push(*candidate);
        sum += weight(candidate.logit, max) / total;
        if sum > f64::from(p) {
            break;
        }
    }
}

/// Divides the logits by a positive temperature, after moving the largest to 0.
///
/// The shift changes no probability and keeps a tiny temperature from overflowing.
pub(super) fn temperature(candidates: &mut Candidates<'_>, temperature: f32) {
    let max = candidates.max();
    if max == f32::NEG_INFINITY {
        // Every token is banned, and must stay so.
        return;
    }
    let scale = |logit: &mut f32| {
        *logit = if *logit == max { 0.0 } else { (*logit - max) / temperature };
    };
    if candidates.narrowed {
        candidates.buffers.items.iter_mut().for_each(|c| scale(&mut c.logit));
        candidates.buffers.items.retain(|c| c.logit > f32::NEG_INFINITY);
    } else {
        candidates.logits.iter_mut().for_each(scale);
    }
}
