//! Attention of many queries in tiles of 16-bit numbers, of which an instruction multiplies pairs.
//!
//! For a matrix unit (AMX) these are floats (bf16). A number becomes two of them, `high + low`: 16 bits of mantissa, all that
//! a number stored as f16 has. Of a product of two such numbers `low low` is left out, some 2^-16 of it, so three products of
//! tiles give nearly the exact one.
//!
//! For `vpdpwssd` (AVX-512 VNNI, AVX-VNNI) and `vpmaddwd` (AVX2) these are integers with a scale a row: see `x86/attention.rs`.
//! An instruction multiplies twice as many as f32 products have. Scores have 15 bits of a row's length, values and weights 13.
//!
//! Queries are columns throughout:
//!
//! ```text
//! scores[position][query]  = keys[position][dim] queries[dim][query]
//! sums[dim][query]        += values[dim][position] weights[position][query]
//! ```
//!
//! so that softmax, between the two, has a query in each lane of its vectors and adds up nothing across lanes, and what
//! it writes is an operand of the second product as it is.
//!
//! # Layout
//! A step adds up products of 32 numbers. An operand has 32 numbers of 32 rows (or columns), a step of a longer
//! sum. Number `i` of the 32 is paired with number `16 + i`: any order will do if both operands have it, and this one
//! needs no shuffles. A left operand has its rows one after the other, 16 pairs each, a right one pair `i` of
//! its columns in row `i`.

use super::Kernels;

/// Most positions whose keys and values are multiplied at a time.
pub const POSITIONS: usize = 128;
/// Queries of a block, positions and dimensions of a step.
pub(super) const STEP: usize = 32;
/// Steps of positions.
pub(super) const GROUPS: usize = POSITIONS / STEP;
/// Queries, or rows, of a tile: those of a block are in two halves.
pub(super) const HALF: usize = STEP / 2;
/// Least worth of the numbers of a value in integers.
pub(super) const LEAST_VALUE: f32 = 1e-20;
/// The maximum of no scores: finite, because differences are formed.
pub(super) const LOWEST: f32 = -1e30;

/// Pairs of 16-bit numbers, 16 of 16 rows or columns each.
pub(super) type Pairs = [[u32; HALF]; HALF];

/// 32 rows or columns of 32 numbers as `[plane][half]`, the high plane first; integers have but that.
#[derive(Clone, Copy)]
#[repr(C, align(64))] // a tile across cache lines is loaded at half the speed
pub(super) struct Operand(pub [[Pairs; 2]; 2]);

/// 32 by 32 sums of products as `[left half][right half][row][column]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Square(pub [[[[f32; HALF]; HALF]; 2]; 2]);

const _: () = assert!(size_of::<Operand>() == 4096 && size_of::<Square>() == 4096);

impl Operand {
    const ZERO: Self = Self([[[[0; HALF]; HALF]; 2]; 2]);
}

impl Square {
    const ZERO: Self = Self([[[[0.0; HALF]; HALF]; 2]; 2]);
}

/// What is known of a block's queries so far.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Running {
    /// Positions up to this one are seen.
    pub position: [[i32; HALF]; 2],
    /// Greatest score, in bits: weights are powers of 2.
    pub max: [[f32; HALF]; 2],
    /// Of the weights.
    pub sum: [[f32; HALF]; 2],
}

/// Some queries, and what they have got from the keys and values that they met.
#[derive(Default)]
pub struct AttentionTiles {
    dim: usize,
    rows: usize,
    /// Positions in `keys` and `values`.
    pub(super) positions: usize,
    /// `[block][step of dim]`
    pub(super) queries: Vec<Operand>,
    /// `[block][step of dim]`
    pub(super) sums: Vec<Square>,
    /// `[block]`
    pub(super) running: Vec<Running>,
    /// `[position / 32][step of dim]`
    pub(super) keys: Vec<Operand>,
    /// `[step of dim][position / 32]`, [`GROUPS`] for each step.
    pub(super) values: Vec<Operand>,
    /// `[2][position / 32]`: of a block and of the next.
    pub(super) scores: Vec<Square>,
    /// `[2][position / 32]`: of a block and of the one before.
    pub(super) weights: Vec<Operand>,
    pub(super) scales: Scales,
}

/// What the numbers of integer operands are worth.
#[derive(Default)]
pub(super) struct Scales {
    /// `[block][query]`
    pub queries: Vec<[f32; STEP]>,
    /// `[position / 32][position]`
    pub keys: [[f32; STEP]; GROUPS],
    /// `[position / 32][position]`
    pub values: [ValueScales; GROUPS],
}

/// What the numbers of 32 values are worth: one over it, and its logarithm (of 2).
#[derive(Clone, Copy, Default)]
pub(super) struct ValueScales {
    pub inverse: [f32; STEP],
    pub log: [f32; STEP],
}

impl ValueScales {
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // as this module
    pub fn of(scale: [f32; STEP]) -> Self {
        Self { inverse: scale.map(|scale| 1.0 / scale), log: scale.map(f32::log2) }
    }
}

/// The functions of an instruction set; `unsafe` to call where the CPU lacks it.
pub(super) struct Functions {
    /// Up to 32 rows of `dim` numbers to a step for each 32 of `dim`: a left operand. Integers have a scale a row.
    pub pack_rows: unsafe fn(rows: &[f32], dim: usize, to: &mut [Operand], scale: &mut [f32; STEP]),
    /// The same for a right one, times a factor.
    pub pack_columns:
        unsafe fn(rows: &[f32], dim: usize, factor: f32, to: &mut [Operand], scale: &mut [f32; STEP]),
    /// What the numbers of up to 32 rows of values are to be worth.
    pub scale_values: unsafe fn(rows: &[f32], dim: usize, scales: &mut ValueScales),
    /// Up to 32 rows over these to a left operand whose rows are the columns from `first` on.
    pub pack_turned:
        unsafe fn(rows: &[f32], dim: usize, first: usize, scales: &ValueScales, to: &mut Operand),
    /// All queries meet keys and values, those of positions from `first` on.
    pub attend: unsafe fn(first: usize, &mut AttentionTiles),
    /// A block's sums divided by those of the weights, `[row][dim]`.
    pub divide: unsafe fn(&[Square], &Running, dim: usize, out: &mut [f32]),
}

impl Running {
    /// Whether each query sees all of `n` positions from `first` on. Positions do not fall: the first query sees fewest.
    pub fn sees_all(&self, first: usize, n: usize) -> bool {
        first + n <= self.position[0][0] as usize + 1
    }

    /// Groups of 32 of `n` positions from `first` on, without those that not even the last query sees.
    pub fn groups(&self, first: usize, n: usize) -> usize {
        (self.position[1][HALF - 1] as usize + 1).saturating_sub(first).min(n).div_ceil(STEP)
    }
}

impl AttentionTiles {
    /// Steps of a row.
    pub(super) fn steps(&self) -> usize {
        self.dim.div_ceil(STEP)
    }

    fn reshape(&mut self, rows: usize, dim: usize) {
        (self.rows, self.dim, self.positions) = (rows, dim, 0);
        let (blocks, steps) = (rows.div_ceil(STEP), self.steps());
        let operands = |v: &mut Vec<Operand>, n| v.resize(v.len().max(n), Operand::ZERO);
        operands(&mut self.queries, blocks * steps);
        operands(&mut self.keys, GROUPS * steps);
        operands(&mut self.values, GROUPS * steps);
        operands(&mut self.weights, 2 * GROUPS);
        self.scores.resize(2 * GROUPS, Square::ZERO);
        self.scales.queries.resize(blocks, [0.0; STEP]);
        self.sums.clear();
        self.sums.resize(blocks * steps, Square::ZERO);
        self.running.clear();
    }
}

impl Kernels {
    /// Whether many queries attend by tiles.
    pub fn has_attention_tiles(&self) -> bool {
        self.isa.functions.attention.is_some()
    }

    fn attention_functions(&self) -> &'static Functions {
        self.isa.functions.attention.expect("has_attention_tiles() was asked")
    }

    /// Begins with new queries, rows of `dim` numbers. Row `i` sees positions up to `position(i)`, which does not fall.
    ///
    /// # Panics
    /// If these are no rows, or there are no [tiles](Self::has_attention_tiles).
    pub fn begin_attention(
        &self,
        queries: &[f32],
        dim: usize,
        position: impl Fn(usize) -> usize,
        tiles: &mut AttentionTiles,
    ) {
        assert!(dim > 0 && !queries.is_empty() && queries.len().is_multiple_of(dim));
        tiles.reshape(queries.len() / dim, dim);
        let (rows, steps) = (tiles.rows, tiles.steps());
        let blocks = tiles.queries.chunks_exact_mut(steps).zip(&mut tiles.scales.queries);
        for (i, (queries, (to, scale))) in queries.chunks(STEP * dim).zip(blocks).enumerate() {
            let pack = self.attention_functions().pack_columns;
            // SAFETY: the handle proves the ISA; `to` has the steps of up to 32 rows.
            unsafe { pack(queries, dim, std::f32::consts::LOG2_E, to, scale) };
            // Queries that are not there see what the last one sees.
            let sees = |lane: usize| position((i * STEP + lane).min(rows - 1));
            let sees = |lane: usize| i32::try_from(sees(lane)).expect("a position has 31 bits");
            let position = [0, HALF].map(|half| std::array::from_fn(|lane| sees(half + lane)));
            tiles.running.push(Running { position, max: [[LOWEST; HALF]; 2], sum: [[0.0; HALF]; 2] });
        }
    }

    /// Takes the keys of up to [`POSITIONS`] positions, rows as long as the queries.
    ///
    /// # Panics
    /// If they are not, or there are more.
    pub fn take_keys(&self, keys: &[f32], tiles: &mut AttentionTiles) {
        let (dim, steps) = (tiles.dim, tiles.steps());
        assert!(keys.len().is_multiple_of(dim) && keys.len() <= POSITIONS * dim);
        tiles.positions = keys.len() / dim;
        let groups = tiles.keys.chunks_exact_mut(steps).zip(&mut tiles.scales.keys);
        for (keys, (to, scale)) in keys.chunks(STEP * dim).zip(groups) {
            // SAFETY: the handle proves the ISA; `to` has the steps of up to 32 rows.
            unsafe { (self.attention_functions().pack_rows)(keys, dim, to, scale) };
        }
    }

    /// Takes the values of the positions whose [keys](Self::take_keys) were taken.
    ///
    /// # Panics
    /// If they are not as many.
    pub fn take_values(&self, values: &[f32], tiles: &mut AttentionTiles) {
        let dim = tiles.dim;
        assert!(values.len() == tiles.positions * dim);
        let functions = self.attention_functions();
        for (group, values) in values.chunks(STEP * dim).enumerate() {
            let scales = &mut tiles.scales.values[group];
            // SAFETY: the handle proves the ISA; these are up to 32 rows.
            unsafe { (functions.scale_values)(values, dim, scales) };
            for (step, to) in tiles.values.chunks_exact_mut(GROUPS).enumerate() {
                // SAFETY: as above.
                unsafe { (functions.pack_turned)(values, dim, step * STEP, scales, &mut to[group]) };
            }
        }
    }

    /// All queries meet the keys and values that were taken last, whose positions begin with `first`. What one query
    /// gets does not depend on the others.
    pub fn attend(&self, first: usize, tiles: &mut AttentionTiles) {
        // SAFETY: the handle proves the ISA.
        unsafe { (self.attention_functions().attend)(first, tiles) }
    }

    /// What each query got, `[row][dim]`.
    ///
    /// # Panics
    /// If `out` has another size.
    pub fn attended(&self, tiles: &AttentionTiles, out: &mut [f32]) {
        let (dim, steps) = (tiles.dim, tiles.steps());
        assert_eq!(out.len(), tiles.rows * dim);
        let blocks = tiles.sums.chunks_exact(steps).zip(&tiles.running);
        for ((sums, running), out) in blocks.zip(out.chunks_mut(STEP * dim)) {
            // SAFETY: the handle proves the ISA; `out` has up to 32 rows, `sums` a square for each 32 of their columns.
            unsafe { (self.attention_functions().divide)(sums, running, dim, out) };
        }
    }
}

/// Plain code, to test by.
#[cfg(test)]
pub(super) mod reference {
    use super::*;

    pub static FLOATS: Functions =
        Functions { pack_rows, pack_columns, scale_values: |_, _, _| (), pack_turned, attend, divide };

    /// The bits of two bf16 whose sum is `x`, nearly: each rounded to nearest, halves away from zero.
    fn planes(x: f32) -> [u32; 2] {
        let high = (x.to_bits() + 0x8000) & 0xffff_0000;
        let low = x - f32::from_bits(high);
        [high >> 16, (low.to_bits() + 0x8000) >> 16]
    }

    /// Sets number `i` of row `row` of a left operand, or of column `row` of a right one, in a plane.
    fn set_bits(to: &mut Operand, plane: usize, left: bool, row: usize, i: usize, bits: u32) {
        let (r, pair) = (row % HALF, i % HALF);
        let tile = &mut to.0[plane][row / HALF];
        let at = if left { &mut tile[r][pair] } else { &mut tile[pair][r] };
        let shift = 16 * (i / HALF);
        *at = *at & !(0xffff << shift) | bits << shift;
    }

    /// What [`set_bits`] has set.
    fn bits(from: &Operand, plane: usize, left: bool, row: usize, i: usize) -> u32 {
        let (r, pair) = (row % HALF, i % HALF);
        let tile = &from.0[plane][row / HALF];
        let pair = if left { tile[r][pair] } else { tile[pair][r] };
        pair >> (16 * (i / HALF)) & 0xffff
    }

    fn set(to: &mut Operand, left: bool, row: usize, i: usize, x: f32) {
        for (plane, bits) in planes(x).into_iter().enumerate() {
            set_bits(to, plane, left, row, i, bits);
        }
    }

    /// What [`set`] has set.
    fn get(from: &Operand, left: bool, row: usize, i: usize) -> [f32; 2] {
        [0, 1].map(|plane| f32::from_bits(bits(from, plane, left, row, i) << 16))
    }

    fn pack(rows: &[f32], dim: usize, factor: f32, left: bool, to: &mut [Operand]) {
        to.fill(Operand::ZERO);
        for (r, row) in rows.chunks_exact(dim).enumerate() {
            for (i, x) in row.iter().enumerate() {
                set(&mut to[i / STEP], left, r, i % STEP, x * factor);
            }
        }
    }

    fn pack_rows(rows: &[f32], dim: usize, to: &mut [Operand], _: &mut [f32; STEP]) {
        pack(rows, dim, 1.0, true, to);
    }

    fn pack_columns(rows: &[f32], dim: usize, factor: f32, to: &mut [Operand], _: &mut [f32; STEP]) {
        pack(rows, dim, factor, false, to);
    }

    fn pack_turned(rows: &[f32], dim: usize, first: usize, _: &ValueScales, to: &mut Operand) {
        *to = Operand::ZERO;
        for (r, row) in rows.chunks_exact(dim).enumerate() {
            for (i, x) in row[first..].iter().take(STEP).enumerate() {
                set(to, true, i, r, *x);
            }
        }
    }

    /// Adds the product of two steps.
    fn multiply(left: &Operand, right: &Operand, sums: &mut Square) {
        for row in 0..STEP {
            for column in 0..STEP {
                let sum = &mut sums.0[row / HALF][column / HALF][row % HALF][column % HALF];
                for i in 0..STEP {
                    let [high, low] = get(left, true, row, i);
                    let [other_high, other_low] = get(right, false, column, i);
                    *sum += high * other_high + (high * other_low + low * other_high);
                }
            }
        }
    }

    fn attend(first: usize, tiles: &mut AttentionTiles) {
        for block in 0..tiles.running.len() {
            let (steps, groups) = (tiles.steps(), tiles.running[block].groups(first, tiles.positions));
            let queries = &tiles.queries[block * steps..][..steps];
            let scores = &mut tiles.scores[..groups];
            scores.fill(Square::ZERO);
            for (scores, keys) in scores.iter_mut().zip(tiles.keys.chunks_exact(steps)) {
                keys.iter().zip(queries).for_each(|(k, q)| multiply(k, q, scores));
            }
            let sums = &mut tiles.sums[block * steps..][..steps];
            let weights = &mut tiles.weights[..groups];
            for query in 0..STEP {
                softmax(query, first, scores, &mut tiles.running[block], sums, weights);
            }
            for (sums, values) in sums.iter_mut().zip(tiles.values.chunks_exact(GROUPS)) {
                values.iter().zip(&*weights).for_each(|(v, w)| multiply(v, w, sums));
            }
        }
    }

    fn softmax(
        query: usize,
        first: usize,
        scores: &[Square],
        running: &mut Running,
        sums: &mut [Square],
        weights: &mut [Operand],
    ) {
        let (half, lane) = (query / HALF, query % HALF);
        let score = |p: usize| scores[p / STEP].0[p % STEP / HALF][half][p % HALF][lane];
        let all = STEP * scores.len();
        let n = (running.position[half][lane] as usize + 1).saturating_sub(first).min(all);
        let before = running.max[half][lane];
        let max = (0..n).map(score).fold(before, f32::max);
        let rescale = (before - max).exp2();
        for sums in sums {
            sums.0.iter_mut().flat_map(|rows| &mut rows[half]).for_each(|row| row[lane] *= rescale);
        }
        let (to_max, sum) = (&mut running.max[half][lane], &mut running.sum[half][lane]);
        (*to_max, *sum) = (max, *sum * rescale);
        for p in 0..all {
            let weight = if p < n { (score(p) - max).exp2() } else { 0.0 };
            *sum += weight;
            set(&mut weights[p / STEP], false, query, p % STEP, weight);
        }
    }

    fn divide(sums: &[Square], running: &Running, dim: usize, out: &mut [f32]) {
        for (query, out) in out.chunks_exact_mut(dim).enumerate() {
            let (half, lane) = (query / HALF, query % HALF);
            for (i, out) in out.iter_mut().enumerate() {
                let sum = sums[i / STEP].0[i % STEP / HALF][half][i % HALF][lane];
                *out = sum / running.sum[half][lane];
            }
        }
    }

    /// Plain code for integers.
    pub mod integers {
        use super::*;

        pub static FUNCTIONS: Functions =
            Functions { pack_rows, pack_columns, scale_values, pack_turned, attend, divide };

        fn set(to: &mut Operand, left: bool, row: usize, i: usize, x: f32) {
            set_bits(to, 0, left, row, i, u32::from(x.round_ties_even() as i16 as u16));
        }

        /// `x` over what keeps sums of products with others in 32 bits.
        fn pack(rows: &[f32], dim: usize, left: bool, to: &mut [Operand], scale: &mut [f32; STEP]) {
            to.fill(Operand::ZERO);
            *scale = [0.0; STEP];
            for (r, row) in rows.chunks_exact(dim).enumerate() {
                let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
                let max = row.iter().fold(0f32, |max, x| max.max(x.abs()));
                scale[r] = (length / 46_000.0).max(max / 32767.0);
                for (i, x) in row.iter().enumerate().filter(|_| scale[r] > 0.0) {
                    set(&mut to[i / STEP], left, r, i % STEP, x / scale[r]);
                }
            }
        }

        fn pack_rows(rows: &[f32], dim: usize, to: &mut [Operand], scale: &mut [f32; STEP]) {
            pack(rows, dim, true, to, scale);
        }

        fn pack_columns(rows: &[f32], dim: usize, factor: f32, to: &mut [Operand], scale: &mut [f32; STEP]) {
            pack(rows, dim, false, to, scale);
            scale.iter_mut().for_each(|scale| *scale *= factor);
        }

        fn scale_values(rows: &[f32], dim: usize, scales: &mut ValueScales) {
            let mut scale = [LEAST_VALUE; STEP];
            for (row, scale) in rows.chunks_exact(dim).zip(&mut scale) {
                *scale = row.iter().fold(*scale, |scale, x| scale.max(x.abs() / 8191.0));
            }
            *scales = ValueScales::of(scale);
        }

        fn pack_turned(rows: &[f32], dim: usize, first: usize, scales: &ValueScales, to: &mut Operand) {
            *to = Operand::ZERO;
            for (r, row) in rows.chunks_exact(dim).enumerate() {
                for (i, x) in row[first..].iter().take(STEP).enumerate() {
                    set(to, true, i, r, x * scales.inverse[r]);
                }
            }
        }

        /// A sum of products of a step.
        fn product(left: &Operand, row: usize, right: &Operand, column: usize) -> i32 {
            let number = |x: u32| i32::from(x as u16 as i16);
            let products = (0..STEP)
                .map(|i| number(bits(left, 0, true, row, i)) * number(bits(right, 0, false, column, i)));
            products.sum()
        }

        fn attend(first: usize, tiles: &mut AttentionTiles) {
            for block in 0..tiles.running.len() {
                let (steps, running) = (tiles.steps(), &mut tiles.running[block]);
                let groups = running.groups(first, tiles.positions);
                for query in 0..STEP {
                    let (half, lane) = (query / HALF, query % HALF);
                    let score = |p: usize| {
                        let keys = &tiles.keys[p / STEP * steps..][..steps];
                        let steps = keys.iter().zip(&tiles.queries[block * steps..]);
                        let sum: i32 = steps.map(|(k, q)| product(k, p % STEP, q, query)).sum();
                        let scale =
                            tiles.scales.keys[p / STEP][p % STEP] * tiles.scales.queries[block][query];
                        sum as f32 * scale + tiles.scales.values[p / STEP].log[p % STEP]
                    };
                    let all = STEP * groups;
                    let n = (running.position[half][lane] as usize + 1).saturating_sub(first).min(all);
                    let scores: Vec<_> = (0..n).map(score).collect();
                    let before = running.max[half][lane];
                    let max = scores.iter().copied().fold(before, f32::max);
                    let rescale = (before - max).exp2();
                    let mut total = running.sum[half][lane] * rescale;
                    let sums = &mut tiles.sums[block * steps..][..steps];
                    let mut rows = Vec::new();
                    for (i, sums) in sums.iter_mut().enumerate() {
                        for row in 0..STEP {
                            sums.0[row / HALF][half][row % HALF][lane] *= rescale;
                            rows.push((i, row));
                        }
                    }
                    for (group, scores) in scores.chunks(STEP).enumerate() {
                        let top = scores.iter().copied().fold(LOWEST, f32::max);
                        let (mut weights, scale) = (Operand::ZERO, (top - 13.0 - max).exp2());
                        for (p, score) in scores.iter().enumerate() {
                            let weight = (score - top + 13.0).exp2();
                            set(&mut weights, false, query, p, weight);
                            total += weight * scale * tiles.scales.values[group].inverse[p];
                        }
                        for &(i, row) in &rows {
                            let values = &tiles.values[i * GROUPS + group];
                            let sum = product(values, row, &weights, query) as f32;
                            sums[i].0[row / HALF][half][row % HALF][lane] += sum * scale;
                        }
                    }
                    (running.max[half][lane], running.sum[half][lane]) = (max, total);
                }
            }
        }
    }
}
