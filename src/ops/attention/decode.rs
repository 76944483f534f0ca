//! One query or a few: keys and values are read where they are, once for all heads of a group.
//!
//! The weights of a tile's positions are relative to the greatest score among them, and its sums are added to those of the tiles
//! before in the order of positions. Where there are too few key/value heads to be shared out evenly, different threads take the
//! tiles of a head ("flash decoding", Dao et al. 2023), and their sums wait in memory until they are added in the same order. So
//! neither the number of threads nor what else is in a step changes how a token's sums are rounded.

use std::ops::Range;

use super::{AttentionScratch, CacheTile, Seen, Shape, Stored, TILE, ThreadScratch, max, scaled_queries};
use crate::kernels::Kernels;
use crate::kernels::decode_attention::{Next, Rows};
use crate::ops::Compute;

/// Tiles of a head whose sums wait in memory; those of longer contexts are added to the totals so many at a time.
pub(super) const WAITING: usize = 32;

/// A thread's buffers.
#[derive(Default)]
pub(super) struct Scratch {
    work: Work,
    /// [`Sums`] of a tile, and of all before it.
    tile: Vec<f32>,
    total: Vec<f32>,
}

#[derive(Default)]
struct Work {
    queries: Vec<f32>,
    scores: Vec<f32>,
    wide: Vec<f32>,
}

impl Scratch {
    pub fn reserve(&mut self, rows: usize, dim: usize) {
        if self.work.queries.len() < rows * dim {
            self.work.queries.resize(rows * dim, 0.0);
            self.work.scores.resize(rows * TILE, 0.0);
            self.work.wide.resize(TILE * dim, 0.0);
            self.tile.resize(Sums::len(rows, dim), 0.0);
            self.total.resize(Sums::len(rows, dim), 0.0);
        }
    }
}

/// What different threads find out about the tiles of a head.
pub(super) struct TileSums {
    /// `[key/value head][tile]`
    tiles: Vec<f32>,
    /// `[key/value head]`
    totals: Vec<f32>,
}

impl TileSums {
    /// For one row.
    pub fn new(shape: Shape) -> Self {
        let mut sums = Self { tiles: Vec::new(), totals: Vec::new() };
        sums.reserve(shape, 1);
        sums
    }

    fn reserve(&mut self, shape: Shape, rows: usize) {
        let n = shape.kv_heads * Sums::len(rows * shape.group(), shape.head_dim);
        if self.totals.len() < n {
            self.tiles.resize(n * WAITING, 0.0);
            self.totals.resize(n, 0.0);
        }
    }
}

/// For each query row the sum of the values seen so far, by their weights; the score that the weights are relative to, and the sum
/// of the weights.
struct Sums<'a> {
    /// `[rows][head_dim]`
    out: &'a mut [f32],
    max: &'a mut [f32],
    weight: &'a mut [f32],
}

impl<'a> Sums<'a> {
    /// Floats for `rows`.
    fn len(rows: usize, dim: usize) -> usize {
        rows * (dim + 2)
    }

    fn of(floats: &'a mut [f32], rows: usize, dim: usize) -> Self {
        let (out, rest) = floats.split_at_mut(rows * dim);
        let (max, weight) = rest.split_at_mut(rows);
        Self { out, max, weight: &mut weight[..rows] }
    }

    /// Nothing seen.
    fn clear(&mut self) {
        self.out.fill(0.0);
        self.max.fill(f32::NEG_INFINITY);
        self.weight.fill(0.0);
    }

    /// Adds the sums of what comes behind.
    fn add(&mut self, behind: &[f32]) {
        let (rows, dim) = (self.max.len(), self.out.len() / self.max.len());
        let (outs, rest) = behind.split_at(rows * dim);
        let (maxima, weights) = rest.split_at(rows);
        let outs = self.out.chunks_exact_mut(dim).zip(outs.chunks_exact(dim));
        for (row, (out, more)) in outs.enumerate() {
            let highest = self.max[row].max(maxima[row]);
            if highest == f32::NEG_INFINITY {
                continue; // neither has seen anything
            }
            let factor = |max: f32| if max == highest { 1.0 } else { (max - highest).exp() };
            let (before, now) = (factor(self.max[row]), factor(maxima[row]));
            out.iter_mut().zip(more).for_each(|(out, more)| *out = *out * before + more * now);
            self.weight[row] = self.weight[row] * before + weights[row] * now;
            self.max[row] = highest;
        }
    }
}

/// A sequence with few rows.
pub(super) fn one_sequence<C: CacheTile + Copy>(
    on: Compute<'_>,
    shape: Shape,
    q: (&[f32], usize),
    seen: &Seen<C>,
    out: &mut [f32],
    scratch: &mut AttentionScratch,
) {
    let (threads, end) = (on.team.active(), seen.first + seen.rows);
    let even = shape.kv_heads.is_multiple_of(threads) || shape.kv_heads >= 4 * threads;
    if !even && end > TILE {
        return by_tiles(on, shape, q, seen, out, scratch);
    }
    let n = shape.group() * shape.head_dim;
    on.team.for_tiles(out, shape.kv_heads * n, (seen.rows, n), &mut scratch.threads, |scratch, mut tile| {
        let queries = Queries::new(shape, seen, tile.cols().start / n);
        let then = queries.first_keys(seen, queries.kv_head + 1);
        let total = queries.all(on.kernels, q, seen, scratch, then);
        (0..seen.rows).for_each(|t| queries.finish(&total, t, tile.row(t)));
    });
}

/// Tiles of all heads, in any order; then their sums, head by head.
fn by_tiles<C: CacheTile + Copy>(
    on: Compute<'_>,
    shape: Shape,
    q: (&[f32], usize),
    seen: &Seen<C>,
    out: &mut [f32],
    scratch: &mut AttentionScratch,
) {
    let (rows, dim, end) = (seen.rows * shape.group(), shape.head_dim, seen.first + seen.rows);
    scratch.tiles.reserve(shape, seen.rows);
    let len = Sums::len(rows, dim);
    let totals = &mut scratch.tiles.totals[..shape.kv_heads * len];
    totals.chunks_exact_mut(len).for_each(|total| Sums::of(total, rows, dim).clear());
    for from in (0..end).step_by(WAITING * TILE) {
        let n = (end - from).div_ceil(TILE).min(WAITING);
        let tiles = &mut scratch.tiles.tiles[..shape.kv_heads * n * len];
        on.team.for_tiles(tiles, len, (1, len), &mut scratch.threads, |scratch, mut tile| {
            let i = tile.rows().start;
            let from = from + i % n * TILE;
            let queries = Queries::new(shape, seen, i / n);
            queries.begin(q, &mut scratch.decode);
            let (positions, sums) = (from..(from + TILE).min(end), Sums::of(tile.row(i), rows, dim));
            let then = queries.first_keys(seen, queries.kv_head + 1);
            let then = queries.keys_behind(seen, &positions, then);
            queries.tile(on.kernels, positions, seen, &mut scratch.decode.work, sums, then);
        });
        on.team.for_plain_tiles(totals, len, (1, len), |mut tile| {
            let head = tile.rows().start;
            let mut total = Sums::of(tile.row(head), rows, dim);
            tiles[head * n * len..][..n * len].chunks_exact(len).for_each(|tile| total.add(tile));
        });
    }
    let n = shape.group() * dim;
    for (i, out) in out.chunks_exact_mut(n).enumerate() {
        let (token, head) = (i / shape.kv_heads, i % shape.kv_heads);
        let total = Sums::of(&mut totals[head * len..][..len], rows, dim);
        Queries::new(shape, seen, head).finish(&total, token, out);
    }
}

/// Sequences with one row each.
pub(super) fn one_row_each<C: CacheTile + Copy>(
    on: Compute<'_>,
    shape: Shape,
    (q, q_stride): (&[f32], usize),
    seen: &[Seen<C>],
    out: &mut [f32],
    scratch: &mut AttentionScratch,
) {
    let n = shape.group() * shape.head_dim;
    // One head of several sequences after the other: what they share of their caches stays in the CPU's.
    let rows = seen.len().div_ceil(2 * on.team.threads());
    on.team.for_tiles(out, shape.kv_heads * n, (rows, n), &mut scratch.threads, |scratch, mut tile| {
        let kv_head = tile.cols().start / n;
        for row in tile.rows() {
            let queries = Queries::new(shape, &seen[row], kv_head);
            let then = seen.get(row + 1).map_or(Next(&[]), |seen| queries.first_keys(seen, kv_head));
            let total = queries.all(on.kernels, (&q[row * q_stride..], q_stride), &seen[row], scratch, then);
            queries.finish(&total, 0, tile.row(row));
        }
    });
}

/// The queries of a few tokens for the heads that share a key/value head: rows of `[token][head]`.
struct Queries {
    shape: Shape,
    /// Position of the first token.
    first: usize,
    /// Number of tokens.
    rows: usize,
    kv_head: usize,
}

impl Queries {
    fn new<C>(shape: Shape, seen: &Seen<C>, kv_head: usize) -> Self {
        Self { shape, first: seen.first, rows: seen.rows, kv_head }
    }

    fn begin(&self, q: (&[f32], usize), scratch: &mut Scratch) {
        let group = self.shape.group();
        scratch.reserve(self.rows * group, self.shape.head_dim);
        scaled_queries(self.shape, q, self.kv_head * group, 0..self.rows, &mut scratch.work.queries);
    }

    /// The keys of the first tile of a head, if there is such a head.
    fn first_keys<'c, C: CacheTile>(&self, seen: &'c Seen<C>, kv_head: usize) -> Next<'c> {
        let end = seen.first + seen.rows;
        if kv_head < self.shape.kv_heads { stored(&seen.keys, kv_head, 0..end.min(TILE)) } else { Next(&[]) }
    }

    /// The keys of the tile behind `positions`; `then` behind the last.
    fn keys_behind<'c, C: CacheTile>(
        &self,
        seen: &'c Seen<C>,
        positions: &Range<usize>,
        then: Next<'c>,
    ) -> Next<'c> {
        let (from, end) = (positions.end, self.first + self.rows);
        if from < end { stored(&seen.keys, self.kv_head, from..(from + TILE).min(end)) } else { then }
    }

    /// The sums of all tiles, one after the other; `then` is read next.
    fn all<'s, C: CacheTile>(
        &self,
        kernels: Kernels,
        q: (&[f32], usize),
        seen: &Seen<C>,
        scratch: &'s mut ThreadScratch,
        then: Next<'_>,
    ) -> Sums<'s> {
        let (rows, dim, end) = (self.rows * self.shape.group(), self.shape.head_dim, self.first + self.rows);
        self.begin(q, &mut scratch.decode);
        let Scratch { work, tile, total } = &mut scratch.decode;
        let mut total = Sums::of(total, rows, dim);
        total.clear();
        for from in (0..end).step_by(TILE) {
            let positions = from..(from + TILE).min(end);
            let then = self.keys_behind(seen, &positions, then);
            self.tile(kernels, positions, seen, work, Sums::of(tile, rows, dim), then);
            total.add(&tile[..Sums::len(rows, dim)]);
        }
        total
    }

    /// The sums of a tile; `then` is read next.
    fn tile<C: CacheTile>(
        &self,
        kernels: Kernels,
        positions: Range<usize>,
        seen: &Seen<C>,
        work: &mut Work,
        mut sums: Sums<'_>,
        then: Next<'_>,
    ) {
        let (dim, group) = (self.shape.head_dim, self.shape.group());
        let Work { queries, scores, wide } = work;
        let wide = &mut wide[..positions.len() * dim];
        let keys = in_place(kernels, &seen.keys, self.kv_head, &positions, wide);
        let queries = Rows { data: queries, rows: self.rows * group, cols: dim, stride: dim };
        let next = stored(&seen.values, self.kv_head, positions.clone());
        match keys {
            InPlace::F16(keys) => kernels.dots_f16_of_rows(queries, keys, (scores, TILE), next),
            InPlace::F32(keys) => kernels.dots_of_rows(queries, keys, (scores, TILE), next),
        }
        sums.clear();
        let values = in_place(kernels, &seen.values, self.kv_head, &positions, wide);
        // The heads of a token see the same positions.
        for token in 0..self.rows {
            let n = (self.first + token + 1).saturating_sub(positions.start).min(positions.len());
            if n == 0 {
                continue;
            }
            let rows = token * group..(token + 1) * group;
            for row in rows.clone() {
                let scores = &mut scores[row * TILE..][..n];
                sums.max[row] = max(scores);
                sums.weight[row] = kernels.exp_sum(scores, sums.max[row]);
            }
            let weights = Rows { data: &scores[rows.start * TILE..], rows: group, cols: n, stride: TILE };
            let out = &mut sums.out[rows.start * dim..rows.end * dim];
            let next = if token == 0 { then } else { Next(&[]) };
            match values {
                InPlace::F16(values) => kernels.add_weighted_f16_rows(out, weights, &values[..n * dim], next),
                InPlace::F32(values) => kernels.add_weighted_rows(out, weights, &values[..n * dim], next),
            }
        }
    }

    /// The result of a token.
    fn finish(&self, total: &Sums<'_>, token: usize, out: &mut [f32]) {
        let (group, dim) = (self.shape.group(), self.shape.head_dim);
        for (i, out) in out.chunks_exact_mut(dim).enumerate() {
            let (sums, weight) = (&total.out[(token * group + i) * dim..], total.weight[token * group + i]);
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum / weight);
        }
    }
}

/// Numbers that kernels can read.
#[derive(Clone, Copy)]
enum InPlace<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
}

/// Keys or values as kernels fetch them; none that are to be widened first.
fn stored<'c>(cache: &'c impl CacheTile, head: usize, positions: Range<usize>) -> Next<'c> {
    match cache.stored(head, positions) {
        Stored::F32(numbers) => Next(bytemuck::cast_slice(numbers)),
        Stored::F16(bits) => Next(bytemuck::cast_slice(bits)),
        Stored::Packed => Next(&[]),
    }
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
