//! Grouped-query attention over a key/value cache, tiled with an online softmax.
//!
//! For each head the keys are visited in tiles of [`TILE`] positions. A running maximum and sum turn
//! the tiles' scores into the exact softmax without holding all of them (Milakov and Gimelshein
//! 2018; Dao et al. 2022). One or a few queries read the cache in place (`decode`); a prompt's many queries
//! widen each tile to f32 once and multiply matrices.

mod decode;

use std::ops::Range;

use super::Compute;
use crate::kernels::Kernels;
use crate::kernels::attention::{AttentionTiles, POSITIONS};
use crate::kernels::gemm_f32::View;

/// Positions of a tile: its keys and values stay in the L2 cache.
pub const TILE: usize = POSITIONS;
/// Query rows (tokens times heads of a group) aimed at in a chunk of a prompt: enough for `gemm`.
const QUERY_ROWS: usize = 96;
/// The same by tiles, for which widened keys and values are packed besides.
const TILED_QUERY_ROWS: usize = 512;
/// Chunks of a prompt a thread that are worth fewer rows.
const CHUNKS_A_THREAD: usize = 4;
/// Up to so many tokens read the cache in place, each with the same operations as if it were alone, so that a
/// draft can be verified in one step; for more, widening a tile pays. The decision is by tokens, not by query rows, so that neither the number of threads
/// nor that of heads in a chunk changes how a token's sums are rounded.
pub const MAX_ALONE: usize = 16;

/// Where keys or values of one layer are read from: positions of a head, `head_dim` numbers each. They lie in one tile: a cache
/// may have another tile anywhere.
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

impl Shape {
    /// Heads that share a key/value head.
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }
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

/// Buffers of a team's attention.
pub struct AttentionScratch {
    threads: Vec<ThreadScratch>,
    /// Of tiles that different threads took.
    tiles: decode::TileSums,
}

/// A thread's buffers.
#[derive(Default)]
struct ThreadScratch {
    queries: Vec<f32>,
    scores: Vec<f32>,
    out: Vec<f32>,
    wide: Vec<f32>,
    tiles: AttentionTiles,
    /// Running maximum and sum of each query row.
    running: Vec<(f32, f32)>,
    decode: decode::Scratch,
}

impl AttentionScratch {
    /// For decoding on `threads`; more rows at once grow it.
    pub fn new(threads: usize, shape: Shape) -> Self {
        let threads = (0..threads).map(|_| ThreadScratch::new(shape)).collect();
        Self { threads, tiles: decode::TileSums::new(shape) }
    }
}

impl ThreadScratch {
    fn new(shape: Shape) -> Self {
        let mut scratch = Self::default();
        scratch.decode.reserve(shape.group(), shape.head_dim);
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
    scratch: &mut AttentionScratch,
) {
    let (cols, mut row) = (shape.heads * shape.head_dim, 0);
    // Sequences with one row each are one piece of work for the team.
    for seen in seen.chunk_by(|a, b| a.rows == 1 && b.rows == 1) {
        let rows: usize = seen.iter().map(|seen| seen.rows).sum();
        let (q, out) = (&q[row * q_stride..], &mut out[row * cols..][..rows * cols]);
        match seen {
            [seen] if seen.rows <= MAX_ALONE => {
                decode::one_sequence(on, shape, (q, q_stride), seen, out, scratch)
            }
            [seen] => prompt(on, shape, (q, q_stride), seen, out, scratch),
            seen => decode::one_row_each(on, shape, (q, q_stride), seen, out, scratch),
        }
        row += rows;
    }
}

/// Many rows of a sequence.
fn prompt<C: CacheTile + Copy>(
    on: Compute<'_>,
    shape: Shape,
    q: (&[f32], usize),
    seen: &Seen<C>,
    out: &mut [f32],
    scratch: &mut AttentionScratch,
) {
    let (heads, dim, group) = (shape.heads, shape.head_dim, shape.group());
    // Tiles hold what f16 and 8 bits do; whoever stores f32 wants more.
    let f32s = |cache: &C| matches!(cache.stored(0, 0..1), Stored::F32(_));
    let by_tiles = on.kernels.has_attention_tiles() && !f32s(&seen.keys) && !f32s(&seen.values);
    let tokens = if by_tiles {
        tiled_tokens(shape, seen.rows, on.team.active())
    } else {
        (QUERY_ROWS / group).clamp(1, seen.rows)
    };
    let tile = (tokens, group * dim);
    on.team.for_tiles(out, heads * dim, tile, &mut scratch.threads, |scratch, mut tile| {
        let head = tile.cols().start / dim;
        let block = Block { shape, first: seen.first, head, tokens: tile.rows() };
        block.begin(q, scratch);
        if by_tiles {
            block.by_tiles(on.kernels, seen, scratch);
        } else {
            block.widened(on.kernels, seen, scratch);
        }
        for (t, out) in tile.rows().zip(scratch.out.chunks_exact(group * dim)) {
            tile.row(t).copy_from_slice(out);
        }
    });
}

/// Tokens of a chunk by tiles: fewer where there would not be enough chunks for all threads. What a row gets does not depend on
/// it.
fn tiled_tokens(shape: Shape, rows: usize, threads: usize) -> usize {
    let tokens = |aim: usize| (aim / shape.group()).clamp(1, rows);
    let chunks = |tokens: usize| rows.div_ceil(tokens) * shape.kv_heads;
    let [large @ .., least] = [1, 2, 4].map(|part| tokens(TILED_QUERY_ROWS / part));
    large.into_iter().find(|&tokens| chunks(tokens) >= CHUNKS_A_THREAD * threads).unwrap_or(least)
}

/// Some tokens' queries for the heads of a group.
struct Block {
    shape: Shape,
    /// Position of the sequence's first row.
    first: usize,
    head: usize,
    tokens: Range<usize>,
}

/// `to[token][head]`: the queries of a group's heads, `head` the first, over the root of their length.
fn scaled_queries(
    shape: Shape,
    (q, q_stride): (&[f32], usize),
    head: usize,
    tokens: Range<usize>,
    to: &mut [f32],
) {
    let (dim, n) = (shape.head_dim, shape.group() * shape.head_dim);
    let scale = 1.0 / (dim as f32).sqrt();
    for (t, to) in tokens.zip(to.chunks_exact_mut(n)) {
        let from = &q[t * q_stride + head * dim..][..n];
        to.iter_mut().zip(from).for_each(|(to, q)| *to = q * scale);
    }
}

impl Block {
    fn kv_head(&self) -> usize {
        self.head / self.shape.group()
    }

    fn rows(&self) -> usize {
        self.tokens.len() * self.shape.group()
    }

    fn begin(&self, q: (&[f32], usize), scratch: &mut ThreadScratch) {
        scratch.reserve(self.rows(), self.shape.head_dim);
        scaled_queries(self.shape, q, self.head, self.tokens.clone(), &mut scratch.queries);
    }

    /// All of a block by f32 products.
    fn widened(&self, kernels: Kernels, seen: &Seen<impl CacheTile>, scratch: &mut ThreadScratch) {
        let (dim, rows) = (self.shape.head_dim, self.rows());
        scratch.out[..rows * dim].fill(0.0);
        scratch.running[..rows].fill((f32::NEG_INFINITY, 0.0));
        let end = self.first + self.tokens.end;
        for from in (0..end).step_by(TILE) {
            self.tile_widened(kernels, from..(from + TILE).min(end), seen, scratch);
        }
        for (row, &(_, sum)) in scratch.out.chunks_exact_mut(dim).zip(&scratch.running[..rows]) {
            row.iter_mut().for_each(|o| *o /= sum);
        }
    }

    /// Positions of a tile that the query of row `row` may see.
    fn visible(&self, row: usize, positions: &Range<usize>) -> usize {
        let last = self.first + self.tokens.start + row / self.shape.group();
        (last + 1).saturating_sub(positions.start).min(positions.len())
    }

    /// All of a block by tiles of 16-bit numbers.
    fn by_tiles(&self, kernels: Kernels, seen: &Seen<impl CacheTile>, scratch: &mut ThreadScratch) {
        let (dim, rows) = (self.shape.head_dim, self.rows());
        let ThreadScratch { queries, out, wide, tiles, .. } = scratch;
        let (begin, end) = (self.first + self.tokens.start, self.first + self.tokens.end);
        kernels.begin_attention(&queries[..rows * dim], dim, |row| begin + row / self.shape.group(), tiles);
        for from in (0..end).step_by(TILE) {
            let positions = from..(from + TILE).min(end);
            let wide = &mut wide[..positions.len() * dim];
            seen.keys.widen(kernels, self.kv_head(), positions.clone(), wide);
            kernels.take_keys(wide, tiles);
            seen.values.widen(kernels, self.kv_head(), positions, wide);
            kernels.take_values(wide, tiles);
            kernels.attend(from, tiles);
        }
        kernels.attended(tiles, &mut out[..rows * dim]);
    }

    fn tile_widened(
        &self,
        kernels: Kernels,
        positions: Range<usize>,
        seen: &Seen<impl CacheTile>,
        scratch: &mut ThreadScratch,
    ) {
        let (dim, n) = (self.shape.head_dim, positions.len());
        let rows = self.rows();
        let ThreadScratch { queries, scores, out, wide, running, .. } = scratch;
        let wide = &mut wide[..n * dim];
        seen.keys.widen(kernels, self.kv_head(), positions.clone(), wide);
        let queries = View::rows(&queries[..rows * dim], dim);
        kernels.gemm_f32(queries, View::rows(wide, dim).transposed(), 0.0, scores, TILE);
        for row in 0..rows {
            let seen = self.visible(row, &positions);
            let (weights, hidden) = scores[row * TILE..][..n].split_at_mut(seen);
            softmax_step(kernels, weights, &mut running[row], &mut out[row * dim..][..dim]);
            hidden.fill(0.0);
        }
        seen.values.widen(kernels, self.kv_head(), positions, wide);
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

    #[test]
    fn a_prompt_has_chunks_for_all_threads_if_its_rows_allow() {
        let (few_heads, many_heads) = (
            Shape { heads: 12, kv_heads: 2, head_dim: 128 },
            Shape { heads: 32, kv_heads: 32, head_dim: 128 },
        );
        let chunks = |shape: Shape, rows: usize, threads: usize| {
            rows.div_ceil(tiled_tokens(shape, rows, threads)) * shape.kv_heads
        };
        assert_eq!(tiled_tokens(few_heads, 512, 2), TILED_QUERY_ROWS / 6, "enough for two threads");
        assert!(chunks(few_heads, 512, 8) >= 8 * CHUNKS_A_THREAD);
        assert!(chunks(few_heads, 512, 16) >= 48, "no smaller than a quarter");
        assert_eq!(tiled_tokens(many_heads, 512, 2), TILED_QUERY_ROWS);
        assert_eq!(tiled_tokens(few_heads, 17, 64), 17, "all rows of a short prompt");
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
                    let mut scratch = AttentionScratch::new(threads, shape);
                    let seen = Seen { keys: &k, values: &v, first, rows };
                    attention(on, shape, (&q, heads * dim), &[seen], &mut out, &mut scratch);
                    let want = naive(shape, first, &q, &k, &v, rows);
                    let worst = out.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    // Integers of tiles have 13 bits for weights and values.
                    let in_integers =
                        kernels.has_attention_tiles() && kernels.name() != "amx" && rows > MAX_ALONE;
                    let tolerance = if in_integers { 3e-4 } else { 1e-5 };
                    assert!(worst < tolerance, "{kernels:?} {shape:?} {rows}: {worst}");
                }
            }
        }
    }

    /// A head's tiles are taken by one thread or by several, and rows come alone or with others: bit by bit the same.
    #[test]
    fn neither_threads_nor_company_change_a_token() {
        let mut state = 5u32;
        let mut random = |n: usize| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 22) as f32 - 2.0
            };
            (0..n).map(|_| next()).collect()
        };
        for (heads, kv_heads, dim, first, rows) in
            [(9, 3, 64, 700, 3), (5, 5, 16, TILE - 2, 4), (4, 1, 16, 2 * decode::WAITING * TILE + 100, 2)]
        {
            let (shape, capacity) = (Shape { heads, kv_heads, head_dim: dim }, first + rows);
            let k = Plain(random(kv_heads * capacity * dim), capacity, dim, true);
            let v = Plain(random(kv_heads * capacity * dim), capacity, dim, true);
            let q = random(rows * heads * dim);
            let run = |threads: usize, q: &[f32], seen: &[Seen<&Plain>]| {
                let (team, kernels) = (Team::new(threads).unwrap(), Kernels::select(None).unwrap());
                let (mut out, mut scratch) = (vec![0.0; q.len()], AttentionScratch::new(threads, shape));
                let on = Compute { team: &team, kernels };
                attention(on, shape, (q, heads * dim), seen, &mut out, &mut scratch);
                out
            };
            let all = [Seen { keys: &k, values: &v, first, rows }];
            let want = run(1, &q, &all);
            for (exact, found) in naive(shape, first, &q, &k, &v, rows).iter().zip(&want) {
                assert!((exact - found).abs() < 1e-5, "{shape:?} {first}");
            }
            for threads in [2, 3, 7] {
                assert!(run(threads, &q, &all) == want, "{shape:?} {first}, {threads} threads");
                let alone = |t| Seen { keys: &k, values: &v, first: first + t, rows: 1 };
                let each: Vec<_> = (0..rows).map(alone).collect();
                assert!(run(threads, &q, &each) == want, "{shape:?} {first}, in turn");
                for (t, q) in q.chunks_exact(heads * dim).enumerate() {
                    let want = &want[t * heads * dim..][..heads * dim];
                    assert!(run(threads, q, &[alone(t)]) == want, "{shape:?} {first}, row {t} alone");
                }
            }
        }
    }
}
