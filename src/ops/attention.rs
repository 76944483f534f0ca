//! Grouped-query attention over a key/value cache, tiled with an online softmax.
//!
//! For each head the keys are visited in tiles of [`TILE`] positions. A running maximum and sum turn
//! the tiles' scores into the exact softmax without holding all of them (Milakov and Gimelshein
//! 2018; Dao et al. 2022). One or a few queries read the cache in place; a prompt's many queries
//! widen each tile to f32 once and multiply matrices.

use std::ops::Range;

use super::Compute;
use crate::kernels::Kernels;
use crate::kernels::attention::{AttentionTiles, POSITIONS};
use crate::kernels::float::Rows;
use crate::kernels::gemm_f32::View;

/// Positions of a tile: its keys and values stay in the L2 cache.
pub const TILE: usize = POSITIONS;
/// Query rows (tokens times heads of a group) aimed at in a chunk of a prompt: enough for `gemm`.
const QUERY_ROWS: usize = 96;
/// The same for a matrix unit, for which widened keys and values are packed besides.
const TILED_QUERY_ROWS: usize = 512;
/// Up to so many tokens read the cache in place, each with the same operations as if it were alone, so that a
/// draft can be verified in one step; for more, widening a tile pays. The decision is by tokens, not by query rows, so that neither the number of threads
/// nor that of heads in a chunk changes how a token's sums are rounded.
pub const MAX_ALONE: usize = 16;

/// Where keys or values of one layer are read from: `n` positions of a head's `head_dim` numbers.
pub trait CacheTile: Sync {
    /// A head's positions as they are stored.
    fn stored(&self, head: usize, positions: Range<usize>) -> Stored<'_>;
    /// The numbers of a head's positions, widened.
    fn widen(&self, kernels: Kernels, head: usize, positions: Range<usize>, out: &mut [f32]);
}

/// Some positions of a head as they are stored, `[position][head_dim]`.
#[derive(Clone, Copy)]
pub enum Stored<'a> {
    /// Numbers that are read in place.
    F32(&'a [f32]),
    /// Half-precision bits that are read in place.
    F16(&'a [u16]),
    /// A form that must be widened first.
    Packed,
}

/// Shapes of an attention step.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// What some rows of a step look back on: the keys and values of their sequence.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Seen<C> {
    pub keys: C,
    pub values: C,
    /// Position of the first row.
    pub first: usize,
    /// Number of rows, at positions one after the other.
    pub rows: usize,
}

/// A thread's buffers.
#[derive(Default)]
pub struct AttentionScratch {
    queries: Vec<f32>,
    scores: Vec<f32>,
    out: Vec<f32>,
    wide: Vec<f32>,
    tiles: AttentionTiles,
    /// Running maximum and sum of each query row.
    running: Vec<(f32, f32)>,
}

impl AttentionScratch {
    /// For decoding with up to `group` heads to a key/value head; prompts grow it once.
    pub fn with_capacity(group: usize, head_dim: usize) -> Self {
        let mut scratch = Self::default();
        scratch.reserve(group, head_dim);
        scratch
    }

    fn reserve(&mut self, rows: usize, head_dim: usize) {
        if self.running.len() < rows {
            self.queries.resize(rows * head_dim, 0.0);
            self.scores.resize(rows * TILE, 0.0);
            self.out.resize(rows * head_dim, 0.0);
            self.wide.resize(TILE * head_dim, 0.0);
            self.running.resize(rows, (0.0, 0.0));
        }
    }
}

/// `out[t][h] = softmax(q[t][h] . K / sqrt(head_dim)) V` over the positions of its sequence up to that of `t`.
///
/// `q` holds rows of `q_stride` of which the first `heads * head_dim` are the queries; `out` rows of
/// `heads * head_dim`. `seen` says of all rows, in order, to which sequence they belong.
pub fn attention<C: CacheTile + Copy>(
    on: Compute<'_>,
    shape: Shape,
    (q, q_stride): (&[f32], usize),
    seen: &[Seen<C>],
    out: &mut [f32],
    scratch: &mut [AttentionScratch],
) {
    let (cols, mut row) = (shape.heads * shape.head_dim, 0);
    // Sequences with one row each are one piece of work for the team.
    for seen in seen.chunk_by(|a, b| a.rows == 1 && b.rows == 1) {
        let rows: usize = seen.iter().map(|seen| seen.rows).sum();
        let (q, out) = (&q[row * q_stride..], &mut out[row * cols..][..rows * cols]);
        match seen {
            [seen] => one_sequence(on, shape, (q, q_stride), seen, out, scratch),
            seen => one_row_each(on, shape, (q, q_stride), seen, out, scratch),
        }
        row += rows;
    }
}

fn one_sequence<C: CacheTile + Copy>(
    on: Compute<'_>,
    shape: Shape,
    q: (&[f32], usize),
    seen: &Seen<C>,
    out: &mut [f32],
    scratch: &mut [AttentionScratch],
) {
    let Shape { heads, kv_heads, head_dim } = shape;
    let (group, rows) = (heads / kv_heads, seen.rows);
    let way = Way::of(on.kernels, seen);
    let aim = if way == Way::ByTiles { TILED_QUERY_ROWS } else { QUERY_ROWS };
    let tokens = (aim / group).clamp(1, rows);
    // With few key/value heads for the threads, the heads of a group go to different ones.
    let split = rows == 1 && !kv_heads.is_multiple_of(on.team.threads()) && kv_heads < 4 * on.team.threads();
    let chunk_heads = if split { 1 } else { group };
    let n = chunk_heads * head_dim;
    on.team.for_tiles(out, heads * head_dim, (tokens, n), scratch, |scratch, mut tile| {
        let head = tile.cols().start / head_dim;
        let block = Block { shape, first: seen.first, head, heads: chunk_heads, tokens: tile.rows(), way };
        block.run(on.kernels, q, &seen.keys, &seen.values, scratch);
        for (t, out) in tile.rows().zip(scratch.out.chunks_exact(n)) {
            tile.row(t).copy_from_slice(out);
        }
    });
}

fn one_row_each<C: CacheTile + Copy>(
    on: Compute<'_>,
    shape: Shape,
    (q, q_stride): (&[f32], usize),
    seen: &[Seen<C>],
    out: &mut [f32],
    scratch: &mut [AttentionScratch],
) {
    let Shape { heads, kv_heads, head_dim } = shape;
    let (group, n) = (heads / kv_heads, heads / kv_heads * head_dim);
    // One head of several sequences after the other: what they share of their caches stays in the CPU's.
    let rows = seen.len().div_ceil(2 * on.team.threads());
    on.team.for_tiles(out, heads * head_dim, (rows, n), scratch, |scratch, mut tile| {
        let head = tile.cols().start / head_dim;
        for row in tile.rows() {
            let Seen { keys, values, first, .. } = &seen[row];
            let block = Block { shape, first: *first, head, heads: group, tokens: 0..1, way: Way::InPlace };
            block.run(on.kernels, (&q[row * q_stride..], q_stride), keys, values, scratch);
            tile.row(row).copy_from_slice(&scratch.out[..n]);
        }
    });
}

/// Some tokens' queries for some heads of a group.
struct Block {
    shape: Shape,
    /// Position of the sequence's first row.
    first: usize,
    head: usize,
    heads: usize,
    tokens: Range<usize>,
    way: Way,
}

/// How queries meet keys and values.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    InPlace,
    Widened,
    /// By a matrix unit.
    ByTiles,
}

impl Way {
    /// That of a sequence's rows. Two planes of bf16 hold what f16 and 8 bits do; whoever stores f32 wants more.
    fn of<C: CacheTile>(kernels: Kernels, seen: &Seen<C>) -> Self {
        let f32s = |cache: &C| matches!(cache.stored(0, 0..1), Stored::F32(_));
        match seen.rows {
            ..=MAX_ALONE => Self::InPlace,
            _ if !kernels.has_attention_tiles() || f32s(&seen.keys) || f32s(&seen.values) => Self::Widened,
            _ => Self::ByTiles,
        }
    }
}

impl Block {
    fn kv_head(&self) -> usize {
        self.head / (self.shape.heads / self.shape.kv_heads)
    }

    fn run(
        &self,
        kernels: Kernels,
        (q, q_stride): (&[f32], usize),
        keys: &impl CacheTile,
        values: &impl CacheTile,
        scratch: &mut AttentionScratch,
    ) {
        let dim = self.shape.head_dim;
        let rows = self.tokens.len() * self.heads;
        scratch.reserve(rows, dim);
        let scale = 1.0 / (dim as f32).sqrt();
        for (i, t) in self.tokens.clone().enumerate() {
            let from = &q[t * q_stride + self.head * dim..][..self.heads * dim];
            let to = &mut scratch.queries[i * self.heads * dim..][..self.heads * dim];
            to.iter_mut().zip(from).for_each(|(to, q)| *to = q * scale);
        }
        if self.way == Way::ByTiles {
            return self.by_tiles(kernels, keys, values, scratch);
        }
        scratch.out[..rows * dim].fill(0.0);
        scratch.running[..rows].fill((f32::NEG_INFINITY, 0.0));
        let end = self.first + self.tokens.end;
        for from in (0..end).step_by(TILE) {
            let positions = from..(from + TILE).min(end);
            if self.way == Way::InPlace {
                self.tile_in_place(kernels, positions, keys, values, scratch);
            } else {
                self.tile_widened(kernels, positions, keys, values, scratch);
            }
        }
        for (row, &(_, sum)) in scratch.out.chunks_exact_mut(dim).zip(&scratch.running[..rows]) {
            row.iter_mut().for_each(|o| *o /= sum);
        }
    }

    /// Positions of a tile that the query of row `row` may see.
    fn visible(&self, row: usize, positions: &Range<usize>) -> usize {
        let last = self.first + self.tokens.start + row / self.heads;
        (last + 1).saturating_sub(positions.start).min(positions.len())
    }

    /// All of a block by a matrix unit.
    fn by_tiles(
        &self,
        kernels: Kernels,
        keys: &impl CacheTile,
        values: &impl CacheTile,
        scratch: &mut AttentionScratch,
    ) {
        let (dim, rows) = (self.shape.head_dim, self.tokens.len() * self.heads);
        let AttentionScratch { queries, out, wide, tiles, .. } = scratch;
        let (begin, end) = (self.first + self.tokens.start, self.first + self.tokens.end);
        kernels.begin_attention(&queries[..rows * dim], dim, |row| begin + row / self.heads, tiles);
        for from in (0..end).step_by(TILE) {
            let positions = from..(from + TILE).min(end);
            let wide = &mut wide[..positions.len() * dim];
            keys.widen(kernels, self.kv_head(), positions.clone(), wide);
            kernels.take_keys(wide, tiles);
            values.widen(kernels, self.kv_head(), positions, wide);
            kernels.take_values(wide, tiles);
            kernels.attend(from, tiles);
        }
        kernels.attended(tiles, &mut out[..rows * dim]);
    }

    fn tile_in_place(
        &self,
        kernels: Kernels,
        positions: Range<usize>,
        keys: &impl CacheTile,
        values: &impl CacheTile,
        scratch: &mut AttentionScratch,
    ) {
        let (dim, rows) = (self.shape.head_dim, self.tokens.len() * self.heads);
        let AttentionScratch { queries, scores, out, wide, running, .. } = scratch;
        let wide = &mut wide[..positions.len() * dim];
        let keys = in_place(kernels, keys, self.kv_head(), &positions, wide);
        let queries = Rows { data: queries, rows, cols: dim, stride: dim };
        match keys {
            InPlace::F16(keys) => kernels.dots_f16_of_rows(queries, keys, (scores, TILE)),
            InPlace::F32(keys) => kernels.dots_of_rows(queries, keys, (scores, TILE)),
        }
        let values = in_place(kernels, values, self.kv_head(), &positions, wide);
        // The heads of a token see the same positions.
        for first in (0..rows).step_by(self.heads) {
            let n = self.visible(first, &positions);
            for row in first..first + self.heads {
                let (weights, out) = (&mut scores[row * TILE..][..n], &mut out[row * dim..][..dim]);
                softmax_step(kernels, weights, &mut running[row], out);
            }
            let weights = Rows { data: &scores[first * TILE..], rows: self.heads, cols: n, stride: TILE };
            let out = &mut out[first * dim..][..self.heads * dim];
            match values {
                InPlace::F16(values) => kernels.add_weighted_f16_rows(out, weights, &values[..n * dim]),
                InPlace::F32(values) => kernels.add_weighted_rows(out, weights, &values[..n * dim]),
            }
        }
    }

    fn tile_widened(
        &self,
        kernels: Kernels,
        positions: Range<usize>,
        keys: &impl CacheTile,
        values: &impl CacheTile,
        scratch: &mut AttentionScratch,
    ) {
        let (dim, n) = (self.shape.head_dim, positions.len());
        let rows = self.tokens.len() * self.heads;
        let AttentionScratch { queries, scores, out, wide, running, .. } = scratch;
        let wide = &mut wide[..n * dim];
        keys.widen(kernels, self.kv_head(), positions.clone(), wide);
        let queries = View::rows(&queries[..rows * dim], dim);
        kernels.gemm_f32(queries, View::rows(wide, dim).transposed(), 0.0, scores, TILE);
        for row in 0..rows {
            let seen = self.visible(row, &positions);
            let (weights, hidden) = scores[row * TILE..][..n].split_at_mut(seen);
            softmax_step(kernels, weights, &mut running[row], &mut out[row * dim..][..dim]);
            hidden.fill(0.0);
        }
        values.widen(kernels, self.kv_head(), positions, wide);
        let weights = View::rows(&scores[..rows * TILE], TILE).first_cols(n);
        kernels.gemm_f32(weights, View::rows(wide, dim), 1.0, out, dim);
    }
}

impl<C: CacheTile> CacheTile for &C {
    fn stored(&self, head: usize, positions: Range<usize>) -> Stored<'_> {
        (**self).stored(head, positions)
    }

    fn widen(&self, kernels: Kernels, head: usize, positions: Range<usize>, out: &mut [f32]) {
        (**self).widen(kernels, head, positions, out);
    }
}

/// Numbers that kernels can read.
#[derive(Clone, Copy)]
enum InPlace<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
}

/// Keys or values where they are, or widened into `wide`.
fn in_place<'a>(
    kernels: Kernels,
    cache: &'a impl CacheTile,
    head: usize,
    positions: &Range<usize>,
    wide: &'a mut [f32],
) -> InPlace<'a> {
    match cache.stored(head, positions.clone()) {
        Stored::F32(numbers) => InPlace::F32(numbers),
        Stored::F16(bits) => InPlace::F16(bits),
        Stored::Packed => {
            cache.widen(kernels, head, positions.clone(), wide);
            InPlace::F32(wide)
        }
    }
}

/// The greatest number, several lanes at a time.
fn max(x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for x in chunks {
        for (max, x) in lanes.iter_mut().zip(x) {
            *max = if x > max { *x } else { *max };
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |max, x| max.max(*x))
}

/// Turns scores into weights relative to the running maximum, and rescales what was summed before.
fn softmax_step(kernels: Kernels, scores: &mut [f32], running: &mut (f32, f32), out: &mut [f32]) {
    if scores.is_empty() {
        return;
    }
    let max = max(scores).max(running.0);
    let before = if running.0 == max { 1.0 } else { (running.0 - max).exp() };
    if before != 1.0 {
        out.iter_mut().for_each(|o| *o *= before);
    }
    *running = (max, running.1 * before + kernels.exp_sum(scores, max));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::Team;

    /// Numbers, how many positions and columns there are, and whether they are read in place.
    struct Plain(Vec<f32>, usize, usize, bool);

    impl Plain {
        fn tile(&self, head: usize, p: Range<usize>) -> &[f32] {
            let &Self(ref data, capacity, dim, _) = self;
            &data[(head * capacity + p.start) * dim..][..p.len() * dim]
        }
    }

    impl CacheTile for Plain {
        fn stored(&self, head: usize, p: Range<usize>) -> Stored<'_> {
            if self.3 { Stored::F32(self.tile(head, p)) } else { Stored::Packed }
        }
        fn widen(&self, _: Kernels, head: usize, p: Range<usize>, out: &mut [f32]) {
            out.copy_from_slice(self.tile(head, p));
        }
    }

    fn naive(shape: Shape, first: usize, q: &[f32], k: &Plain, v: &Plain, rows: usize) -> Vec<f32> {
        let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let mut out = vec![0.0; rows * shape.heads * d];
        for t in 0..rows {
            for h in 0..shape.heads {
                let at = |c: &Plain, p: usize, i: usize| f64::from(c.0[(h / group * c.1 + p) * d + i]);
                let query = |i| f64::from(q[(t * shape.heads + h) * d + i]);
                let scores: Vec<f64> = (0..=first + t)
                    .map(|p| (0..d).map(|i| query(i) * at(k, p, i)).sum::<f64>() / (d as f64).sqrt())
                    .collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for i in 0..d {
                    let o: f64 =
                        scores.iter().enumerate().map(|(p, s)| (s - max).exp() / sum * at(v, p, i)).sum();
                    out[(t * shape.heads + h) * d + i] = o as f32;
                }
            }
        }
        out
    }

    #[test]
    fn equals_the_naive_formula_for_prompts_and_single_tokens() {
        let mut state = 1u32;
        let mut random = |n: usize| -> Vec<f32> {
            (0..n)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect()
        };
        for threads in [1, 2, 3] {
            let team = Team::new(threads).unwrap();
            for kernels in Kernels::available() {
                let on = Compute { team: &team, kernels };
                for (heads, kv_heads, dim, first, rows) in [
                    (3, 1, 16, 0, 1),
                    (4, 4, 32, 300, 1),
                    (6, 2, 64, 0, 150),
                    (9, 3, 64, 127, 40),
                    (2, 1, 8, 5, 3),
                ] {
                    let shape = Shape { heads, kv_heads, head_dim: dim };
                    let capacity = first + rows + 7;
                    // In place or not, keys and values mixed; neither with two threads.
                    let k = Plain(random(kv_heads * capacity * dim), capacity, dim, threads == 1);
                    let v = Plain(random(kv_heads * capacity * dim), capacity, dim, threads == 3);
                    let q = random(rows * heads * dim);
                    let mut out = vec![0.0; q.len()];
                    let mut scratch: Vec<_> = (0..threads).map(|_| AttentionScratch::default()).collect();
                    let seen = Seen { keys: &k, values: &v, first, rows };
                    attention(on, shape, (&q, heads * dim), &[seen], &mut out, &mut scratch);
                    let want = naive(shape, first, &q, &k, &v, rows);
                    let worst = out.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(worst < 1e-5, "{kernels:?} {shape:?} {rows}: {worst}");
                }
            }
        }
    }
}
