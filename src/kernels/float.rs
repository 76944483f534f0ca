//! The f32 side of a forward pass: norms, softmax, SiLU, attention dots, unquantised weights.
//!
//! Each function is written once, in plain code over fixed-size chunks that the compiler turns into
//! vectors; `instantiate!` compiles the set again inside `#[target_feature]` functions for each
//! instruction set. Only the widening of 16-bit floats differs, and is passed in.

use super::Kernels;
use crate::gguf::GgmlType;

/// The functions of one instruction set; `unsafe` to call where the CPU lacks it.
pub(super) struct Functions {
    pub dot_rows: unsafe fn(GgmlType, &[u8], usize, &[f32], &mut [f32]),
    pub widen: unsafe fn(&[u16], &mut [f32]),
    pub dot: unsafe fn(&[f32], &[f32]) -> f32,
    pub dots: unsafe fn(Rows<'_>, &[f32], (&mut [f32], usize)),
    pub dots_f16: unsafe fn(Rows<'_>, &[u16], (&mut [f32], usize)),
    pub add_weighted: unsafe fn(&mut [f32], Rows<'_>, &[f32]),
    pub add_weighted_f16: unsafe fn(&mut [f32], Rows<'_>, &[u16]),
    pub exp_sum: unsafe fn(&mut [f32], f32) -> f32,
    pub silu_mul: unsafe fn(&mut [f32], &[f32]),
}

impl Kernels {
    /// `out[r] = weights[r] . x` for rows of F32, F16 or BF16.
    pub fn dot_float(&self, ty: GgmlType, weights: &[u8], x: &[f32], out: &mut [f32]) {
        let row_bytes = ty.row_bytes(x.len());
        assert!(matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16));
        assert_eq!(weights.len(), out.len() * row_bytes);
        // SAFETY: the handle proves the ISA.
        unsafe { (self.isa.functions.float.dot_rows)(ty, weights, row_bytes, x, out) }
    }

    /// Widens half-precision numbers (their bits) to f32.
    pub fn widen(&self, from: &[u16], to: &mut [f32]) {
        assert_eq!(from.len(), to.len());
        // SAFETY: the handle proves the ISA.
        unsafe { (self.isa.functions.float.widen)(from, to) }
    }

    /// `a . b`
    pub fn dot_f32(&self, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        // SAFETY: the handle proves the ISA.
        unsafe { (self.isa.functions.float.dot)(a, b) }
    }

    /// `out[i] = q . keys[i]` for keys as long as `q`, one behind the other: attention's scores.
    pub fn dots(&self, q: &[f32], keys: &[f32], out: &mut [f32]) {
        assert_eq!(keys.len(), q.len() * out.len());
        self.dots_of_rows(Rows::one(q), keys, (out, 0));
    }

    /// [`dots`](Self::dots) with keys in half precision (bits).
    pub fn dots_f16(&self, q: &[f32], keys: &[u16], out: &mut [f32]) {
        assert_eq!(keys.len(), q.len() * out.len());
        self.dots_f16_of_rows(Rows::one(q), keys, (out, 0));
    }

    /// [`dots`](Self::dots) of several queries, which share the loads of keys; what one gives does not depend on the
    /// others. Their results begin every so many elements of `out`.
    pub fn dots_of_rows(&self, q: Rows<'_>, keys: &[f32], out: (&mut [f32], usize)) {
        q.check_keys(keys.len(), out.0.len(), out.1);
        // SAFETY: the handle proves the ISA.
        unsafe { (self.isa.functions.float.dots)(q, keys, out) }
    }

    /// [`dots_of_rows`](Self::dots_of_rows) with keys in half precision (bits).
    pub fn dots_f16_of_rows(&self, q: Rows<'_>, keys: &[u16], out: (&mut [f32], usize)) {
        q.check_keys(keys.len(), out.0.len(), out.1);
        // SAFETY: the handle proves the ISA.
        unsafe { (self.isa.functions.float.dots_f16)(q, keys, out) }
    }

    /// `out += sum of weights[i] * values[i]` for values as long as `out`, one behind the other.
    pub fn add_weighted(&self, out: &mut [f32], weights: &[f32], values: &[f32]) {
        self.add_weighted_rows(out, Rows::one(weights), values);
    }

    /// [`add_weighted`](Self::add_weighted) with values in half precision (bits).
    pub fn add_weighted_f16(&self, out: &mut [f32], weights: &[f32], values: &[u16]) {
        self.add_weighted_f16_rows(out, Rows::one(weights), values);
    }

    /// [`add_weighted`](Self::add_weighted) of several rows of weights to as many of `out`, which share the loads of
    /// values; what one gives does not depend on the others.
    pub fn add_weighted_rows(&self, out: &mut [f32], weights: Rows<'_>, values: &[f32]) {
        weights.check_values(values.len(), out.len());
        // SAFETY: the handle proves the ISA.
        unsafe { (self.isa.functions.float.add_weighted)(out, weights, values) }
    }

    /// [`add_weighted_rows`](Self::add_weighted_rows) with values in half precision (bits).
    pub fn add_weighted_f16_rows(&self, out: &mut [f32], weights: Rows<'_>, values: &[u16]) {
        weights.check_values(values.len(), out.len());
        // SAFETY: the handle proves the ISA.
        unsafe { (self.isa.functions.float.add_weighted_f16)(out, weights, values) }
    }

    /// `x = exp(x - max)`; returns the sum.
    pub fn exp_sum(&self, x: &mut [f32], max: f32) -> f32 {
        // SAFETY: the handle proves the ISA.
        unsafe { (self.isa.functions.float.exp_sum)(x, max) }
    }

    /// `gate = silu(gate)`: bit by bit what [`silu_mul`](Self::silu_mul) multiplies with.
    pub fn silu(&self, gate: &mut [f32]) {
        const ONES: [f32; 256] = [1.0; 256];
        for gate in gate.chunks_mut(ONES.len()) {
            self.silu_mul(gate, &ONES[..gate.len()]);
        }
    }

    /// `gate = silu(gate) * up`, with `silu(g) = g / (1 + exp(-g))`.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len());
        // SAFETY: the handle proves the ISA.
        unsafe { (self.isa.functions.float.silu_mul)(gate, up) }
    }
}

/// Elements a step of the widening functions.
pub(super) const LANES: usize = 16;
/// Independent sums of a reduction: enough to keep two 512-bit adders busy.
const SUMS: usize = 64;

#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    // Without the instruction `mul_add` is a library call.
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn sum_lanes(lanes: &[f32; SUMS]) -> f32 {
    let mut half = *lanes;
    let mut n = SUMS;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            half[i] += half[i + n];
        }
    }
    half[0]
}

#[inline(always)]
pub(super) fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; SUMS];
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<SUMS>(), b.as_chunks::<SUMS>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..SUMS {
            sums[i] = fma::<FMA>(a[i], b[i], sums[i]);
        }
    }
    for (i, (a, b)) in a_tail.iter().zip(b_tail).enumerate() {
        sums[i] = fma::<FMA>(*a, *b, sums[i]);
    }
    sum_lanes(&sums)
}

/// `a . b`, 16 elements of `b` widened at a time by `load` (zeros past its end).
#[inline(always)]
pub(super) fn dot_widened<const FMA: bool, T: Copy + Default>(
    a: &[f32],
    b: &[T],
    load: impl Fn(&[T; LANES]) -> [f32; LANES],
) -> f32 {
    const N: usize = SUMS / LANES;
    let mut sums = [[0f32; LANES]; N];
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<SUMS>(), b.as_chunks::<SUMS>());
    for (a, b) in a.iter().zip(b) {
        let ((a, _), (b, _)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        for n in 0..N {
            let b = load(&b[n]);
            for i in 0..LANES {
                sums[n][i] = fma::<FMA>(a[n][i], b[i], sums[n][i]);
            }
        }
    }
    for (n, (a, b)) in a_tail.chunks(LANES).zip(b_tail.chunks(LANES)).enumerate() {
        let mut padded = [T::default(); LANES];
        padded[..b.len()].copy_from_slice(b);
        let b = load(&padded);
        for i in 0..a.len() {
            sums[n][i] = fma::<FMA>(a[i], b[i], sums[n][i]);
        }
    }
    let mut flat = [0f32; SUMS];
    flat.copy_from_slice(sums.as_flattened());
    sum_lanes(&flat)
}

#[inline(always)]
pub(super) fn dot_rows<const FMA: bool>(
    ty: GgmlType,
    weights: &[u8],
    row_bytes: usize,
    x: &[f32],
    out: &mut [f32],
    widen: impl Fn(&[u16; LANES]) -> [f32; LANES],
) {
    let bits = |b: &[[u8; 2]; LANES]| b.map(u16::from_le_bytes);
    for (row, out) in weights.chunks_exact(row_bytes).zip(out) {
        *out = match ty {
            GgmlType::F32 => dot_widened::<FMA, [u8; 4]>(x, row.as_chunks().0, |b| b.map(f32::from_le_bytes)),
            GgmlType::F16 => dot_widened::<FMA, [u8; 2]>(x, row.as_chunks().0, |b| widen(&bits(b))),
            _ => dot_widened::<FMA, [u8; 2]>(x, row.as_chunks().0, |b| {
                bits(b).map(|b| f32::from_bits(u32::from(b) << 16))
            }),
        };
    }
}

/// Some rows of `cols` numbers that begin every `stride`.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// One row.
    pub fn one(data: &'a [f32]) -> Self {
        Self { data, rows: 1, cols: data.len(), stride: data.len() }
    }

    /// Row `i`.
    #[inline(always)]
    fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.cols]
    }

    /// Keys of so many elements together fit these queries, and the results fit `out`.
    fn check_keys(&self, keys: usize, out: usize, stride: usize) {
        assert!(self.rows > 0 && self.cols > 0 && keys.is_multiple_of(self.cols));
        assert!((self.rows - 1) * stride + keys / self.cols <= out);
    }

    /// Values of so many elements together fit these weights and `out`.
    fn check_values(&self, values: usize, out: usize) {
        assert!(self.rows > 0 && out.is_multiple_of(self.rows) && values == self.cols * (out / self.rows));
    }
}

/// Keys that are multiplied with a query at a time, so that they share its loads and the additions
/// of one do not wait for those of another.
const KEYS: usize = 4;

/// `out[r][i] = q[r] . keys[i]`, 16 elements of a key widened at a time by `load`, for up to three queries at once: heads
/// of a group, which share keys.
// `load` is passed by value: behind a reference it is not inlined.
#[inline(always)]
pub(super) fn dots<const FMA: bool, T: Copy + Default>(
    q: Rows<'_>,
    keys: &[T],
    (out, stride): (&mut [f32], usize),
    load: impl Fn(&[T; LANES]) -> [f32; LANES] + Copy,
) {
    let (dim, n) = (q.cols, keys.len() / q.cols);
    if !dim.is_multiple_of(LANES) {
        for r in 0..q.rows {
            for (i, out) in out[r * stride..][..n].iter_mut().enumerate() {
                *out = dot_widened::<FMA, T>(q.row(r), &keys[i * dim..][..dim], load);
            }
        }
        return;
    }
    let (mut r, whole) = (0, n / KEYS * KEYS);
    while r < q.rows {
        let rows = (q.rows - r).min(3);
        let row = |i: usize| q.row(r + i);
        for i in (0..whole).step_by(KEYS) {
            let keys = &keys[i * dim..][..KEYS * dim];
            let out = &mut out[r * stride + i..];
            match rows {
                3 => some_dots::<FMA, T, 3, KEYS>([row(0), row(1), row(2)], keys, out, stride, load),
                2 => some_dots::<FMA, T, 2, KEYS>([row(0), row(1)], keys, out, stride, load),
                _ => some_dots::<FMA, T, 1, KEYS>([row(0)], keys, out, stride, load),
            }
        }
        for i in whole..n {
            for r in r..r + rows {
                let key = &keys[i * dim..][..dim];
                some_dots::<FMA, T, 1, 1>([q.row(r)], key, &mut out[r * stride + i..], stride, load);
            }
        }
        r += rows;
    }
}

/// The products of `Q` queries and `N` keys. What one gives does not depend on the others.
#[inline(always)]
fn some_dots<const FMA: bool, T, const Q: usize, const N: usize>(
    q: [&[f32]; Q],
    keys: &[T],
    out: &mut [f32],
    stride: usize,
    load: impl Fn(&[T; LANES]) -> [f32; LANES] + Copy,
) {
    let dim = q[0].len();
    let mut sums = [[[0f32; LANES]; N]; Q];
    for c in (0..dim).step_by(LANES) {
        let mut query = [[0f32; LANES]; Q];
        for r in 0..Q {
            let Some(q) = q[r][c..].first_chunk() else { break };
            query[r] = *q;
        }
        for n in 0..N {
            let Some(key) = keys[n * dim + c..].first_chunk() else { break };
            let key = load(key);
            for r in 0..Q {
                for i in 0..LANES {
                    sums[r][n][i] = fma::<FMA>(query[r][i], key[i], sums[r][n][i]);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let out = &mut out[r * stride..][..N];
        match (sums.as_chunks::<4>(), out.as_chunks_mut::<4>().0) {
            (([sums], []), [out]) => *out = sums_of_four(sums),
            _ => out.iter_mut().zip(sums).for_each(|(out, sums)| [*out, ..] = sums_of_four(&[*sums; 4])),
        }
    }
}

/// The sum of each, in halves: of 16 the second eight to the first, and so on. Four side by side fill the vectors that
/// the later steps of one would leave half empty.
#[inline(always)]
fn sums_of_four(x: &[[f32; LANES]; 4]) -> [f32; 4] {
    let mut eight = [[0f32; 8]; 4];
    for n in 0..4 {
        for i in 0..8 {
            eight[n][i] = x[n][i] + x[n][i + 8];
        }
    }
    let mut four = [[0f32; 8]; 2];
    for n in 0..2 {
        for i in 0..4 {
            four[n][i] = eight[2 * n][i] + eight[2 * n][i + 4];
            four[n][i + 4] = eight[2 * n + 1][i] + eight[2 * n + 1][i + 4];
        }
    }
    let mut two = [0f32; 8];
    for n in 0..4 {
        for i in 0..2 {
            let at = n % 2 * 4 + i;
            two[2 * n + i] = four[n / 2][at] + four[n / 2][at + 2];
        }
    }
    [two[0] + two[1], two[2] + two[3], two[4] + two[5], two[6] + two[7]]
}

/// Elements of a row of the output that stay in registers while all values are added.
const KEPT: usize = 4 * LANES;

/// `out[r] += sum of weights[r][i] * values[i]`, widened by `load`, for up to three rows at once.
#[inline(always)]
pub(super) fn add_weighted<const FMA: bool, T: Copy + Default>(
    out: &mut [f32],
    weights: Rows<'_>,
    values: &[T],
    load: impl Fn(&[T; LANES]) -> [f32; LANES] + Copy,
) {
    let (dim, mut r) = (out.len() / weights.rows, 0);
    while r < weights.rows {
        let rows = (weights.rows - r).min(3);
        let out = &mut out[r * dim..][..rows * dim];
        for c in (0..dim / KEPT * KEPT).step_by(KEPT) {
            match rows {
                3 => some_weighted::<FMA, T, 3>(out, dim, c, weights, r, values, load),
                2 => some_weighted::<FMA, T, 2>(out, dim, c, weights, r, values, load),
                _ => some_weighted::<FMA, T, 1>(out, dim, c, weights, r, values, load),
            }
        }
        let first = dim / KEPT * KEPT;
        if first < dim {
            for (i, out) in out.chunks_exact_mut(dim).enumerate() {
                weighted_tail::<FMA, T>(&mut out[first..], (dim, first), weights.row(r + i), values, load);
            }
        }
        r += rows;
    }
}

/// [`KEPT`] columns from `c` on of `R` rows, those of `weights` from `r` on.
#[inline(always)]
fn some_weighted<const FMA: bool, T: Copy + Default, const R: usize>(
    out: &mut [f32],
    dim: usize,
    c: usize,
    weights: Rows<'_>,
    r: usize,
    values: &[T],
    load: impl Fn(&[T; LANES]) -> [f32; LANES] + Copy,
) {
    let mut sums = [[0f32; KEPT]; R];
    for (k, sums) in sums.iter_mut().enumerate() {
        sums.copy_from_slice(&out[k * dim + c..][..KEPT]);
    }
    let weights: [&[f32]; R] = std::array::from_fn(|k| weights.row(r + k));
    for i in 0..weights[0].len() {
        let Some(value) = values[i * dim + c..].first_chunk::<KEPT>() else { break };
        for (l, value) in value.as_chunks::<LANES>().0.iter().enumerate() {
            let value = load(value);
            for k in 0..R {
                let w = weights[k][i];
                for j in 0..LANES {
                    sums[k][l * LANES + j] = fma::<FMA>(w, value[j], sums[k][l * LANES + j]);
                }
            }
        }
    }
    for (k, sums) in sums.iter().enumerate() {
        out[k * dim + c..][..KEPT].copy_from_slice(sums);
    }
}

/// The columns from `first` on of one row, fewer than [`KEPT`].
#[inline(always)]
fn weighted_tail<const FMA: bool, T: Copy + Default>(
    tail: &mut [f32],
    (dim, first): (usize, usize),
    weights: &[f32],
    values: &[T],
    load: impl Fn(&[T; LANES]) -> [f32; LANES] + Copy,
) {
    for (i, &w) in weights.iter().enumerate() {
        let value = &values[i * dim + first..][..tail.len()];
        for (out, value) in tail.chunks_mut(LANES).zip(value.chunks(LANES)) {
            let mut padded = [T::default(); LANES];
            padded[..value.len()].copy_from_slice(value);
            let value = load(&padded);
            for (j, out) in out.iter_mut().enumerate() {
                *out = fma::<FMA>(w, value[j], *out);
            }
        }
    }
}

#[inline(always)]
pub(super) fn widen_all(from: &[u16], to: &mut [f32], widen: impl Fn(&[u16; LANES]) -> [f32; LANES]) {
    let ((from, from_tail), (to, to_tail)) = (from.as_chunks::<LANES>(), to.as_chunks_mut::<LANES>());
    for (from, to) in from.iter().zip(to) {
        *to = widen(from);
    }
    let mut padded = [0; LANES];
    padded[..from_tail.len()].copy_from_slice(from_tail);
    to_tail.copy_from_slice(&widen(&padded)[..to_tail.len()]);
}

/// exp by range reduction to |r| <= ln2/2 and a degree-6 polynomial, as in Cephes' expf: within
/// 2 ulp, branch-free so that it vectorises; saturates instead of overflowing.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    /// Adding and subtracting 1.5 * 2^23 rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.3);
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -LN2_LO, fma::<FMA>(n, -LN2_HI, x));
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = fma::<FMA>(p, r, c);
    }
    let p = fma::<FMA>(p, r * r, r + 1.0);
    // Scaling by 2^n: n is within -126..=127 after the clamp, and it is the low bits of `shifted`. A
    // conversion `n as i32` would saturate, one number at a time.
    p * f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23)
}

#[inline(always)]
pub(super) fn exp_sum<const FMA: bool>(x: &mut [f32], max: f32) -> f32 {
    let mut sums = [0f32; LANES];
    let (chunks, tail) = x.as_chunks_mut::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            x[i] = exp::<FMA>(x[i] - max);
            sums[i] += x[i];
        }
    }
    for (i, x) in tail.iter_mut().enumerate() {
        *x = exp::<FMA>(*x - max);
        sums[i] += *x;
    }
    sums.iter().sum()
}

#[inline(always)]
pub(super) fn silu_mul<const FMA: bool>(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp::<FMA>(-*g)) * u;
    }
}

/// A [`Functions`] called `$name` whose functions are compiled with `$features`, widening f16 with
/// the expression `$widen` (a closure of bits to floats).
macro_rules! instantiate {
    ($name:ident, $fma:literal, [$($feature:literal),*], $widen:expr) => {
        pub(super) static $name: $crate::kernels::float::Functions = {
            use $crate::gguf::GgmlType;
            use $crate::kernels::float as f;
            $(#[target_feature(enable = $feature)])*
            fn dot_rows(ty: GgmlType, w: &[u8], row_bytes: usize, x: &[f32], out: &mut [f32]) {
                f::dot_rows::<$fma>(ty, w, row_bytes, x, out, $widen)
            }
            $(#[target_feature(enable = $feature)])*
            fn widen(from: &[u16], to: &mut [f32]) {
                f::widen_all(from, to, $widen)
            }
            $(#[target_feature(enable = $feature)])*
            fn dot(a: &[f32], b: &[f32]) -> f32 {
                f::dot::<$fma>(a, b)
            }
            $(#[target_feature(enable = $feature)])*
            fn dots(q: f::Rows<'_>, keys: &[f32], out: (&mut [f32], usize)) {
                f::dots::<$fma, f32>(q, keys, out, |k| *k)
            }
            $(#[target_feature(enable = $feature)])*
            fn dots_f16(q: f::Rows<'_>, keys: &[u16], out: (&mut [f32], usize)) {
                f::dots::<$fma, u16>(q, keys, out, $widen)
            }
            $(#[target_feature(enable = $feature)])*
            fn add_weighted(out: &mut [f32], weights: f::Rows<'_>, values: &[f32]) {
                f::add_weighted::<$fma, f32>(out, weights, values, |v| *v)
            }
            $(#[target_feature(enable = $feature)])*
            fn add_weighted_f16(out: &mut [f32], weights: f::Rows<'_>, values: &[u16]) {
                f::add_weighted::<$fma, u16>(out, weights, values, $widen)
            }
            $(#[target_feature(enable = $feature)])*
            fn exp_sum(x: &mut [f32], max: f32) -> f32 {
                f::exp_sum::<$fma>(x, max)
            }
            $(#[target_feature(enable = $feature)])*
            fn silu_mul(gate: &mut [f32], up: &[f32]) {
                f::silu_mul::<$fma>(gate, up)
            }
            f::Functions {
                dot_rows,
                widen,
                dot,
                dots,
                dots_f16,
                add_weighted,
                add_weighted_f16,
                exp_sum,
                silu_mul,
            }
        };
    };
}
pub(super) use instantiate;

instantiate!(PORTABLE, false, [], |b: &[u16; 16]| b.map(|b| half::f16::from_bits(b).to_f32()));
