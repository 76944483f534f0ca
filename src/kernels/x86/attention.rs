//! Attention of many queries in integers of 16 bits: see `kernels::attention`.
//!
//! Keys and queries have a scale a row, chosen by its length, so that no sum of products leaves 32 bits. Values have one too,
//! which joins the weight that they are multiplied with (as a logarithm, the score), and these products of weight and scale
//! have one for each query and 32 positions, by the greatest that the query sees among them. So nothing is lost of many small
//! weights that one large weight elsewhere would round away, and no query is touched by what it does not see.
//!
//! The source is compiled for each instruction set that multiplies pairs of such integers, with vectors of its own:
//! see [`instantiate`].

/// Greatest magnitude of a number.
pub(super) const LIMIT: f32 = 32767.0;
/// Greatest length of a row of keys or queries: a sum of products of two is at most that of their lengths (Cauchy-Schwarz),
/// parts of it too, and below 2^31 even when every number was rounded up.
pub(super) const LENGTH: f32 = 46_000.0;
/// The greatest weight is 2 to this.
pub(super) const WEIGHT_BITS: f32 = 13.0;
/// Greatest magnitude of a value: 32 such times the greatest weight are below 2^31.
pub(super) const VALUE_LIMIT: f32 = 8191.0;
/// A scale of less than this counts as nothing; the inverse of a greater one is finite.
pub(super) const TINY: f32 = 1e-30;

const _: () = assert!((super::super::attention::STEP as f32) * 8192.0 * VALUE_LIMIT < 2_147_483_648.0);

/// Coefficients of a polynomial for `2^r`, `r` what rounding leaves, that of `r^5` first: it goes through it at the zeros of the
/// sixth Chebyshev polynomial and is off by 1e-7.
pub(super) const EXP2: [f32; 6] =
    [1.339_086_3e-3, 9.676_032e-3, 5.550_357e-2, 0.240_221_07, std::f32::consts::LN_2, 1.0];

/// A [`Functions`](crate::kernels::attention::Functions) called `ATTENTION`, compiled with `$features` for the vectors of
/// `$lanes`: `F`, 16 floats, and `I`, 16 integers or pairs of words, in as many registers as that takes.
macro_rules! instantiate {
    ($lanes:path, $features:literal) => {
        pub(in crate::kernels) static ATTENTION: $crate::kernels::attention::Functions = {
            use $crate::kernels::attention::{
                AttentionTiles, Functions, GROUPS, HALF, LEAST_VALUE, LOWEST, Operand, Running, STEP, Square,
                ValueScales,
            };
            use $crate::kernels::x86::attention::{LENGTH, LIMIT, TINY, VALUE_LIMIT, WEIGHT_BITS};
            use $lanes::{
                F, I, ROWS, abs, add, add_products, any_below, exp2, floats, fma, hide, integers, load,
                load_i32, load_pairs, load_some, max, mul, pair, reduce_add, reduce_max, splat, splat_pair,
                store, store_row, sub, transpose, zero,
            };

            #[target_feature(enable = $features)]
            fn pack_rows(rows: &[f32], dim: usize, to: &mut [Operand], scale: &mut [f32; STEP]) {
                let inverse = scales_of_rows(rows, dim, scale);
                for (step, to) in to.iter_mut().enumerate() {
                    for half in 0..2 {
                        let pairs = pairs_of_rows(rows, dim, HALF * half, STEP * step, &inverse);
                        for row in 0..HALF {
                            store_row(&mut to.0[0][half][row], pairs[row]);
                        }
                    }
                }
            }

            #[target_feature(enable = $features)]
            fn pack_columns(
                rows: &[f32],
                dim: usize,
                factor: f32,
                to: &mut [Operand],
                scale: &mut [f32; STEP],
            ) {
                let inverse = scales_of_rows(rows, dim, scale);
                for scale in scale {
                    *scale *= factor;
                }
                for (step, to) in to.iter_mut().enumerate() {
                    for half in 0..2 {
                        let pairs = pairs_of_rows(rows, dim, HALF * half, STEP * step, &inverse);
                        transpose(&pairs, &mut to.0[0][half]);
                    }
                }
            }

            /// The scale of each row, and one over it; 0 for rows that are not there, or nothing.
            #[inline]
            #[target_feature(enable = $features)]
            fn scales_of_rows(rows: &[f32], dim: usize, scale: &mut [f32; STEP]) -> [f32; STEP] {
                let mut inverse = [0.0; STEP];
                *scale = [0.0; STEP];
                for (r, row) in rows.chunks_exact(dim).enumerate() {
                    let (mut squares, mut most) = (splat(0.0), splat(0.0));
                    for col in (0..dim).step_by(HALF) {
                        let x = load_some(row, col);
                        squares = fma(x, x, squares);
                        most = max(most, abs(x));
                    }
                    let length = reduce_add(squares).sqrt();
                    scale[r] = (length / LENGTH).max(reduce_max(most) / LIMIT);
                    inverse[r] = if scale[r] > TINY { 1.0 / scale[r] } else { 0.0 };
                }
                inverse
            }

            /// 32 numbers, from `col` on, of each of 16 rows from `first` on; what is not there is 0.
            #[inline]
            #[target_feature(enable = $features)]
            fn pairs_of_rows(
                rows: &[f32],
                dim: usize,
                first: usize,
                col: usize,
                inverse: &[f32; STEP],
            ) -> [I; HALF] {
                let mut out = [zero(); HALF];
                for r in 0..HALF.min((rows.len() / dim).saturating_sub(first)) {
                    let row = &rows[(first + r) * dim..][..dim];
                    let inverse = splat(inverse[first + r]);
                    let whole = [load_some(row, col), load_some(row, col + HALF)];
                    out[r] = pair(integers(mul(whole[0], inverse)), integers(mul(whole[1], inverse)));
                }
                out
            }

            #[target_feature(enable = $features)]
            fn scale_values(rows: &[f32], dim: usize, scales: &mut ValueScales) {
                let mut scale = [LEAST_VALUE; STEP];
                for (row, scale) in rows.chunks_exact(dim).zip(&mut scale) {
                    let mut most = splat(0.0);
                    for col in (0..dim).step_by(HALF) {
                        most = max(most, abs(load_some(row, col)));
                    }
                    *scale = scale.max(reduce_max(most) / VALUE_LIMIT);
                }
                *scales = ValueScales::of(scale);
            }

            #[target_feature(enable = $features)]
            fn pack_turned(rows: &[f32], dim: usize, first: usize, scales: &ValueScales, to: &mut Operand) {
                let n = rows.len() / dim;
                for half in 0..2 {
                    let (mut out, col) = ([zero(); HALF], first + HALF * half);
                    for r in 0..HALF {
                        let mut two = [zero(); 2];
                        for i in 0..2 {
                            let r = r + HALF * i;
                            if r < n {
                                let value = load_some(&rows[r * dim..][..dim], col);
                                two[i] = integers(mul(value, splat(scales.inverse[r])));
                            }
                        }
                        out[r] = pair(two[0], two[1]);
                    }
                    transpose(&out, &mut to.0[0][half]);
                }
            }

            #[target_feature(enable = $features)]
            fn attend(first: usize, tiles: &mut AttentionTiles) {
                let steps = tiles.steps();
                let AttentionTiles {
                    queries,
                    sums,
                    running,
                    keys,
                    values,
                    scores,
                    weights,
                    scales,
                    positions,
                    ..
                } = tiles;
                let mut of_weights = [[[0f32; HALF]; 2]; GROUPS];
                let blocks = queries.chunks_exact(steps).zip(sums.chunks_exact_mut(steps));
                for ((queries, sums), (running, of_queries)) in
                    blocks.zip(running.iter_mut().zip(&scales.queries))
                {
                    let groups = running.groups(first, *positions);
                    for group in 0..groups {
                        let keys = &keys[group * steps..][..steps];
                        let of_keys = (&scales.keys[group], &scales.values[group].log);
                        score(keys, of_keys, queries, of_queries, &mut scores[group]);
                    }
                    weigh(first, &scores[..groups], &scales.values, running, sums, weights, &mut of_weights);
                    for (step, sums) in sums.iter_mut().enumerate() {
                        for group in 0..groups {
                            add_values(
                                &values[step * GROUPS + group],
                                &weights[group],
                                &of_weights[group],
                                sums,
                            );
                        }
                    }
                }
            }

            /// Rows `first..first + ROWS` of half of a left operand times a right one, all steps.
            #[inline]
            #[target_feature(enable = $features)]
            fn products(
                left: &[Operand],
                right: &[Operand],
                (half, first): (usize, usize),
            ) -> [[I; 2]; ROWS] {
                let mut sums = [[zero(); 2]; ROWS];
                for (left, right) in left.iter().zip(right) {
                    let (left, right) = (&left.0[0][half], &right.0[0]);
                    let left: &[[u32; HALF]; ROWS] =
                        left[first..].first_chunk().expect("whole groups of rows");
                    for pair in 0..HALF {
                        let columns = [load_pairs(&right[0][pair]), load_pairs(&right[1][pair])];
                        for row in 0..ROWS {
                            let numbers = splat_pair(left[row][pair]);
                            for of_right in 0..2 {
                                sums[row][of_right] =
                                    add_products(sums[row][of_right], numbers, columns[of_right]);
                            }
                        }
                    }
                }
                sums
            }

            /// Scores of 32 positions and the queries of a block, plus something for each position.
            #[inline]
            #[target_feature(enable = $features)]
            fn score(
                keys: &[Operand],
                (of_keys, plus): (&[f32; STEP], &[f32; STEP]),
                queries: &[Operand],
                of_queries: &[f32; STEP],
                scores: &mut Square,
            ) {
                let (of_queries, _) = of_queries.as_chunks();
                let of_queries = [load(&of_queries[0]), load(&of_queries[1])];
                for at in 0..STEP / ROWS {
                    let (half, first) = (at * ROWS / HALF, at * ROWS % HALF);
                    let products = products(keys, queries, (half, first));
                    for row in 0..ROWS {
                        let (scale, plus) = (splat(of_keys[at * ROWS + row]), splat(plus[at * ROWS + row]));
                        for of_right in 0..2 {
                            let scale = mul(scale, of_queries[of_right]);
                            let score = fma(floats(products[row][of_right]), scale, plus);
                            store(&mut scores.0[half][of_right][first + row], score);
                        }
                    }
                }
            }

            /// Adds 32 numbers of the values of 32 positions by their weights.
            #[inline]
            #[target_feature(enable = $features)]
            fn add_values(
                values: &Operand,
                weights: &Operand,
                of_weights: &[[f32; HALF]; 2],
                sums: &mut Square,
            ) {
                let of_weights = [load(&of_weights[0]), load(&of_weights[1])];
                for at in 0..STEP / ROWS {
                    let (half, first) = (at * ROWS / HALF, at * ROWS % HALF);
                    let products =
                        products(std::slice::from_ref(values), std::slice::from_ref(weights), (half, first));
                    for row in 0..ROWS {
                        for of_right in 0..2 {
                            let sum = &mut sums.0[half][of_right][first + row];
                            store(sum, fma(floats(products[row][of_right]), of_weights[of_right], load(sum)));
                        }
                    }
                }
            }

            /// Turns the scores of a block into weights with a scale for each group, relative to the running maximum, and rescales what
            /// was summed before.
            #[inline]
            #[target_feature(enable = $features)]
            fn weigh(
                first: usize,
                scores: &[Square],
                of_values: &[ValueScales; GROUPS],
                running: &mut Running,
                sums: &mut [Square],
                weights: &mut [Operand],
                of_weights: &mut [[[f32; HALF]; 2]; GROUPS],
            ) {
                let first = (!running.sees_all(first, STEP * scores.len())).then_some(first);
                for half in 0..2 {
                    let (position, before) = (load_i32(&running.position[half]), load(&running.max[half]));
                    let (mut tops, mut most) = ([before; GROUPS], before);
                    for group in 0..scores.len() {
                        let mut top = [splat(LOWEST); 2];
                        for row in 0..HALF {
                            let pair = seen(first, scores, (group, half, row), position);
                            top = [max(top[0], pair[0]), max(top[1], pair[1])];
                        }
                        tops[group] = max(top[0], top[1]);
                        most = max(most, tops[group]);
                    }
                    let mut sum = load(&running.sum[half]);
                    if any_below(before, most) {
                        let factor = exp2(sub(before, most));
                        rescale(sums, half, factor);
                        sum = mul(sum, factor);
                        store(&mut running.max[half], most);
                    }
                    for group in 0..scores.len() {
                        let unit = sub(tops[group], splat(WEIGHT_BITS));
                        let mut totals = [splat(0.0); 2];
                        for row in 0..HALF {
                            let scores = seen(first, scores, (group, half, row), position);
                            let mut two = [zero(); 2];
                            for i in 0..2 {
                                let weight = exp2(sub(scores[i], unit));
                                totals[i] =
                                    fma(weight, splat(of_values[group].inverse[HALF * i + row]), totals[i]);
                                two[i] = integers(weight);
                            }
                            store_row(&mut weights[group].0[0][half][row], pair(two[0], two[1]));
                        }
                        // Where a query sees none of the group, its greatest score is `LOWEST` and this is 0.
                        let scale = exp2(sub(unit, most));
                        store(&mut of_weights[group][half], scale);
                        sum = fma(add(totals[0], totals[1]), scale, sum);
                    }
                    store(&mut running.sum[half], sum);
                }
            }

            /// Scores of 16 queries, rows `row` and `16 + row` of a group, and [`LOWEST`] where they do not see the positions: those from
            /// `first` on, if some query does not see them all.
            #[inline]
            #[target_feature(enable = $features)]
            fn seen(
                first: Option<usize>,
                scores: &[Square],
                (group, half, row): (usize, usize, usize),
                sees: I,
            ) -> [F; 2] {
                let scores = &scores[group].0;
                let mut pair = [load(&scores[0][half][row]), load(&scores[1][half][row])];
                if let Some(first) = first {
                    for i in 0..2 {
                        pair[i] = hide(pair[i], (first + group * STEP + i * HALF + row) as i32, sees, LOWEST);
                    }
                }
                pair
            }

            /// Multiplies what half of a block's queries have got.
            #[inline]
            #[target_feature(enable = $features)]
            fn rescale(sums: &mut [Square], half: usize, factor: F) {
                for sums in sums {
                    for rows in &mut sums.0 {
                        for row in &mut rows[half] {
                            store(row, mul(load(row), factor));
                        }
                    }
                }
            }

            #[target_feature(enable = $features)]
            fn divide(sums: &[Square], running: &Running, dim: usize, out: &mut [f32]) {
                for half in 0..2 {
                    let sum = running.sum[half];
                    for (i, rows) in sums.iter().flat_map(|s| &s.0).enumerate() {
                        let rows = &rows[half];
                        for (query, out) in out.chunks_exact_mut(dim).skip(half * HALF).take(HALF).enumerate()
                        {
                            for (out, row) in out.iter_mut().skip(i * HALF).zip(rows) {
                                *out = row[query] / sum[query];
                            }
                        }
                    }
                }
            }
            Functions { pack_rows, pack_columns, scale_values, pack_turned, attend, divide }
        };
    };
}
pub(super) use instantiate;
