//! The f32 side of a forward pass: norms, softmax, SiLU, unquantised weights.
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
                exp_sum,
                silu_mul,
            }
        };
    };
}
pub(super) use instantiate;

instantiate!(PORTABLE, false, [], |b: &[u16; 16]| b.map(|b| half::f16::from_bits(b).to_f32()));
