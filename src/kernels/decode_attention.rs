//! The products of attention of one query or a few: with keys, and of their weights with values, read where they are.
//!
//! Several queries, heads of a group, share each key and value that is loaded and widened. What one gives does not depend on the
//! others, nor on how many keys there are. Meanwhile [`Next`] is fetched, as fast as they are read.

use super::Kernels;
use super::fetch::fetch;

/// Where results of rows go, and how many elements those of a row are from those of the next.
type Out<'a> = (&'a mut [f32], usize);

/// The functions of one instruction set; `unsafe` to call where the CPU lacks it.
pub(super) struct Functions {
    pub dots: unsafe fn(Rows<'_>, &[f32], Out<'_>, Next<'_>),
    pub dots_f16: unsafe fn(Rows<'_>, &[u16], Out<'_>, Next<'_>),
    pub add_weighted: unsafe fn(&mut [f32], Rows<'_>, &[f32], Next<'_>),
    pub add_weighted_f16: unsafe fn(&mut [f32], Rows<'_>, &[u16], Next<'_>),
}

/// What will be read next, keys or values of some other tile: so far ahead that it is there in time.
#[derive(Clone, Copy)]
pub struct Next<'a>(pub &'a [u8]);

impl Next<'_> {
    /// Asks for what lies as far in it as `part` does in `now`.
    #[inline(always)]
    pub(super) fn fetch<T>(self, now: &[T], part: &[T]) {
        let at = part.as_ptr().addr() - now.as_ptr().addr();
        let end = (at + size_of_val(part)).min(self.0.len());
        if at < end {
            fetch(&self.0[at..end]);
        }
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
    pub(super) fn row(&self, i: usize) -> &'a [f32] {
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

impl Kernels {
    /// `out[i] = q . keys[i]` for keys as long as `q`, one behind the other: attention's scores.
    pub fn dots(&self, q: &[f32], keys: &[f32], out: &mut [f32]) {
        assert_eq!(keys.len(), q.len() * out.len());
        self.dots_of_rows(Rows::one(q), keys, (out, 0), Next(&[]));
    }

    /// [`dots`](Self::dots) with keys in half precision (bits).
    pub fn dots_f16(&self, q: &[f32], keys: &[u16], out: &mut [f32]) {
        assert_eq!(keys.len(), q.len() * out.len());
        self.dots_f16_of_rows(Rows::one(q), keys, (out, 0), Next(&[]));
    }

    /// [`dots`](Self::dots) of several queries, which share the loads of keys; what one gives does not depend on the
    /// others. Their results begin every so many elements of `out`.
    pub fn dots_of_rows(&self, q: Rows<'_>, keys: &[f32], out: Out<'_>, next: Next<'_>) {
        q.check_keys(keys.len(), out.0.len(), out.1);
        // SAFETY: the handle proves the ISA.
        unsafe { (self.isa.functions.decode_attention.dots)(q, keys, out, next) }
    }

    /// [`dots_of_rows`](Self::dots_of_rows) with keys in half precision (bits).
    pub fn dots_f16_of_rows(&self, q: Rows<'_>, keys: &[u16], out: Out<'_>, next: Next<'_>) {
        q.check_keys(keys.len(), out.0.len(), out.1);
        // SAFETY: the handle proves the ISA.
        unsafe { (self.isa.functions.decode_attention.dots_f16)(q, keys, out, next) }
    }

    /// `out += sum of weights[i] * values[i]` for values as long as `out`, one behind the other.
    pub fn add_weighted(&self, out: &mut [f32], weights: &[f32], values: &[f32]) {
        self.add_weighted_rows(out, Rows::one(weights), values, Next(&[]));
    }

    /// [`add_weighted`](Self::add_weighted) with values in half precision (bits).
    pub fn add_weighted_f16(&self, out: &mut [f32], weights: &[f32], values: &[u16]) {
        self.add_weighted_f16_rows(out, Rows::one(weights), values, Next(&[]));
    }

    /// [`add_weighted`](Self::add_weighted) of several rows of weights to as many of `out`, which share the loads of
    /// values; what one gives does not depend on the others.
    pub fn add_weighted_rows(&self, out: &mut [f32], weights: Rows<'_>, values: &[f32], next: Next<'_>) {
        weights.check_values(values.len(), out.len());
        // SAFETY: the handle proves the ISA.
        unsafe { (self.isa.functions.decode_attention.add_weighted)(out, weights, values, next) }
    }

    /// [`add_weighted_rows`](Self::add_weighted_rows) with values in half precision (bits).
    pub fn add_weighted_f16_rows(&self, out: &mut [f32], weights: Rows<'_>, values: &[u16], next: Next<'_>) {
        weights.check_values(values.len(), out.len());
        // SAFETY: the handle proves the ISA.
        unsafe { (self.isa.functions.decode_attention.add_weighted_f16)(out, weights, values, next) }
    }
}

/// How many of `left` rows are taken at a time: three, whose sums with [`KEYS`] keys leave as many of 16 registers as they
/// need besides.
#[inline(always)]
pub(super) fn rows_at_once(left: usize) -> usize {
    if left == 4 { 2 } else { left.min(3) }
}

/// Keys that are multiplied with some queries at a time, so that they share their loads and the additions of one do not wait for
/// those of another.
pub(super) const KEYS: usize = 4;
/// Registers of a row of the output that stay where they are while all values are added.
pub(super) const KEPT: usize = 4;

/// Functions called `$dots` and `$add_weighted` for numbers of type `$number`, compiled with `$feature`s. The module `$vector`
/// has `LANES`, a type `V` of so many floats, and of it `zero`, `splat`, `load`, `store`, `fma`, `sums_of_four` and `$load`, which reads
/// `LANES` of the numbers.
macro_rules! products {
    ($dots:ident, $add_weighted:ident, $number:ty, $load:ident, $vector:path, [$($feature:literal),*]) => {
        /// `out[r][i] = q[r] . keys[i]`
        $(#[target_feature(enable = $feature)])*
        fn $dots(q: Rows<'_>, all: &[$number], (out, stride): (&mut [f32], usize), next: Next<'_>) {
            use $vector as vector;
            use vector::LANES;

            /// `Q` queries and `N` keys, 1 or 4.
            #[inline]
            $(#[target_feature(enable = $feature)])*
            fn some<const Q: usize, const N: usize>(
                q: [&[f32]; Q],
                keys: &[$number],
                out: &mut [f32],
                stride: usize,
            ) {
                let (dim, steps) = (q[0].len(), q[0].len() / LANES);
                // Slices of one length, so that the loop checks no bounds.
                let (mut queries, mut of) = ([[].as_slice(); Q], [[].as_slice(); N]);
                for r in 0..Q {
                    queries[r] = &q[r].as_chunks::<LANES>().0[..steps];
                }
                for n in 0..N {
                    of[n] = &keys[n * dim..][..dim].as_chunks::<LANES>().0[..steps];
                }
                let mut sums = [[vector::zero(); N]; Q];
                for c in 0..steps {
                    let mut query = [vector::zero(); Q];
                    for r in 0..Q {
                        query[r] = vector::load(&queries[r][c]);
                    }
                    for n in 0..N {
                        let key = vector::$load(&of[n][c]);
                        for r in 0..Q {
                            sums[r][n] = vector::fma(query[r], key, sums[r][n]);
                        }
                    }
                }
                if steps * LANES < dim {
                    for r in 0..Q {
                        let query = vector::load(&padded(&q[r][steps * LANES..]));
                        for n in 0..N {
                            let key = vector::$load(&padded(&keys[n * dim..][..dim][steps * LANES..]));
                            sums[r][n] = vector::fma(query, key, sums[r][n]);
                        }
                    }
                }
                for r in 0..Q {
                    // Known places, so that the sums stay in registers; what is there once is there four times.
                    let of = |n: usize| sums[r][n % N];
                    let four = vector::sums_of_four([of(0), of(1), of(2), of(3)]);
                    out[r * stride..][..N].copy_from_slice(&four[..N]);
                }
            }

            let (dim, n, mut r) = (q.cols, all.len() / q.cols, 0);
            while r < q.rows {
                let rows = rows_at_once(q.rows - r);
                let of = |i: usize| q.row(r + i);
                for i in (0..n / KEYS * KEYS).step_by(KEYS) {
                    let keys = &all[i * dim..][..KEYS * dim];
                    let out = &mut out[r * stride + i..];
                    if r == 0 {
                        next.fetch(all, keys);
                    }
                    match rows {
                        3 => some::<3, KEYS>([of(0), of(1), of(2)], keys, out, stride),
                        2 => some::<2, KEYS>([of(0), of(1)], keys, out, stride),
                        _ => some::<1, KEYS>([of(0)], keys, out, stride),
                    }
                }
                for i in n / KEYS * KEYS..n {
                    for r in r..r + rows {
                        some::<1, 1>([q.row(r)], &all[i * dim..][..dim], &mut out[r * stride + i..], stride);
                    }
                }
                r += rows;
            }
        }

        /// `out[r] += sum of weights[r][i] * values[i]`
        $(#[target_feature(enable = $feature)])*
        fn $add_weighted(out: &mut [f32], weights: Rows<'_>, values: &[$number], next: Next<'_>) {
            use $vector as vector;
            use vector::LANES;

            /// `W` registers of `R` rows, from column `c` on.
            #[inline]
            $(#[target_feature(enable = $feature)])*
            fn some<const R: usize, const W: usize>(
                out: &mut [f32],
                dim: usize,
                c: usize,
                weights: [&[f32]; R],
                values: &[$number],
                next: Next<'_>,
            ) {
                let n = weights[0].len();
                let mut sums = [[vector::zero(); W]; R];
                let mut of = [[].as_slice(); R];
                for r in 0..R {
                    of[r] = &weights[r][..n];
                    let out = out[r * dim + c..][..W * LANES].as_chunks::<LANES>().0;
                    for w in 0..W {
                        sums[r][w] = vector::load(&out[w]);
                    }
                }
                for (i, value) in values.chunks_exact(dim).take(n).enumerate() {
                    if c == 0 {
                        next.fetch(values, value); // in the order of memory, for all columns
                    }
                    let value = value[c..][..W * LANES].as_chunks::<LANES>().0;
                    let mut weight = [vector::zero(); R];
                    for r in 0..R {
                        weight[r] = vector::splat(of[r][i]);
                    }
                    for w in 0..W {
                        let value = vector::$load(&value[w]);
                        for r in 0..R {
                            sums[r][w] = vector::fma(weight[r], value, sums[r][w]);
                        }
                    }
                }
                for r in 0..R {
                    let out = out[r * dim + c..][..W * LANES].as_chunks_mut::<LANES>().0;
                    for w in 0..W {
                        vector::store(sums[r][w], &mut out[w]);
                    }
                }
            }

            /// The columns from `c` on of a row, less than a register.
            #[inline]
            $(#[target_feature(enable = $feature)])*
            fn tail(out: &mut [f32], dim: usize, c: usize, weights: &[f32], values: &[$number]) {
                let mut sum = vector::load(&padded(out));
                for (weight, value) in weights.iter().zip(values.chunks_exact(dim)) {
                    sum = vector::fma(vector::splat(*weight), vector::$load(&padded(&value[c..])), sum);
                }
                let mut sums = [0f32; LANES];
                vector::store(sum, &mut sums);
                out.copy_from_slice(&sums[..out.len()]);
            }

            let (dim, mut r) = (out.len() / weights.rows, 0);
            while r < weights.rows {
                let next = if r == 0 { next } else { Next(&[]) };
                let rows = rows_at_once(weights.rows - r);
                let out = &mut out[r * dim..][..rows * dim];
                let of = |i: usize| weights.row(r + i);
                let mut c = 0;
                while c + LANES <= dim {
                    let kept = if c + KEPT * LANES <= dim { KEPT } else { 1 };
                    match (rows, kept) {
                        (3, KEPT) => some::<3, KEPT>(out, dim, c, [of(0), of(1), of(2)], values, next),
                        (2, KEPT) => some::<2, KEPT>(out, dim, c, [of(0), of(1)], values, next),
                        (_, KEPT) => some::<1, KEPT>(out, dim, c, [of(0)], values, next),
                        (3, _) => some::<3, 1>(out, dim, c, [of(0), of(1), of(2)], values, next),
                        (2, _) => some::<2, 1>(out, dim, c, [of(0), of(1)], values, next),
                        _ => some::<1, 1>(out, dim, c, [of(0)], values, next),
                    }
                    c += kept * LANES;
                }
                if c < dim {
                    for (i, out) in out.chunks_exact_mut(dim).enumerate() {
                        tail(&mut out[c..], dim, c, of(i), values);
                    }
                }
                r += rows;
            }
        }
    };
}
pub(super) use products;

/// A [`Functions`] called `DECODE_ATTENTION`, compiled with `$feature`s: see [`products`].
macro_rules! instantiate {
    ($vector:path, [$($feature:literal),*]) => {
        pub(in crate::kernels) static DECODE_ATTENTION: $crate::kernels::decode_attention::Functions = {
            use $crate::kernels::decode_attention::{Functions, KEPT, KEYS, Next, Rows, padded, rows_at_once};
            $crate::kernels::decode_attention::products!(dots, add_weighted, f32, load, $vector, [$($feature),*]);
            $crate::kernels::decode_attention::products!(dots_f16, add_weighted_f16, u16, widen, $vector, [$($feature),*]);
            Functions { dots, dots_f16, add_weighted, add_weighted_f16 }
        };
    };
}
pub(super) use instantiate;

/// Numbers with zeros behind them.
#[inline(always)]
pub(super) fn padded<T: Copy + Default, const L: usize>(numbers: &[T]) -> [T; L] {
    let mut padded = [T::default(); L];
    padded[..numbers.len()].copy_from_slice(numbers);
    padded
}

/// Vectors for every CPU.
mod portable {
    pub const LANES: usize = 8;
    pub type V = [f32; LANES];

    pub fn zero() -> V {
        [0.0; LANES]
    }

    pub fn splat(x: f32) -> V {
        [x; LANES]
    }

    pub fn load(from: &[f32; LANES]) -> V {
        *from
    }

    pub fn widen(from: &[u16; LANES]) -> V {
        from.map(|b| half::f16::from_bits(b).to_f32())
    }

    pub fn store(v: V, to: &mut [f32; LANES]) {
        *to = v;
    }

    /// `a * b + c`. Without the instruction `mul_add` is a library call.
    pub fn fma(a: V, b: V, mut c: V) -> V {
        for i in 0..LANES {
            c[i] += a[i] * b[i];
        }
        c
    }

    pub fn sums_of_four(v: [V; 4]) -> [f32; 4] {
        v.map(|v| ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])))
    }
}

instantiate!(crate::kernels::decode_attention::portable, []);
