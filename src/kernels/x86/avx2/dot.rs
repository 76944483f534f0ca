//! One token or a few: dot products of weight rows, read in place, with rows of activations.
//!
//! Four rows go through a step together, a *quad*. What they share are not only the activations: their products are
//! summed up *across* the rows, until a register holds four sums of each half ([`across16`]), and so one conversion and one
//! multiplication by scales serve four rows. Scales come out of the blocks in the same order of lanes. Without that, more
//! than half of the instructions of types with small blocks would go into scales (docs/experiments.md, "Decoding on
//! AVX2").
//!
//! 16-bit sums hold eight products of weights of up to 5 bits (8 * 31 * 127 < 2^15), or of weights of 6 bits whose zero
//! point of 32 is taken off.

#![allow(clippy::needless_range_loop)] // an iterator's closures and adapters would not be inlined

use std::arch::x86_64::*;

use super::blocks::{self, Piece, Two};
use crate::gguf::GgmlType;
use crate::kernels::x86::{each_four_tokens, part, scales_q3_k, word};
use crate::kernels::{Activations, Q8Row};

/// Rows of a quad.
const QUAD: usize = 4;
/// Quads of a step, which share the preparation of activations.
const QUADS: usize = 2;
/// Least distance in bytes between what is multiplied and what is fetched.
const PREFETCH: usize = 4096;
/// Bytes of a cache line.
const LINE: usize = 64;

/// A step's bytes of four rows, and where those begin that are fetched meanwhile.
struct Quad<'w, const BYTES: usize> {
    rows: [&'w [u8; BYTES]; QUAD],
    ahead: *const u8,
}

/// Asks for part `part` of `parts` of the lines of `BYTES` bytes of four rows from `at` on: in L2, since L1 may be smaller
/// than the rows that are multiplied in between. Not for all at once, which would be more than a core can have under way.
#[inline]
#[target_feature(enable = "sse")]
fn prefetch<const BYTES: usize>(at: *const u8, part: usize, parts: usize) {
    let lines = (QUAD * BYTES).div_ceil(LINE);
    for line in part * lines / parts..(part + 1) * lines / parts {
        let at = at.wrapping_add(line * LINE).cast();
        #[allow(unused_unsafe)] // an unsafe function for older compilers
        // SAFETY: a prefetch of any address is allowed; it never faults.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at)
        };
    }
}

/// Two blocks' activations, in the order of [`Two`]; what belongs to a block is in all lanes of its half.
#[derive(Clone, Copy)]
struct ActsTwo {
    low: __m256i,
    high: __m256i,
    /// Sum of the integers.
    count: __m256i,
    scale: __m256,
    /// `scale * count`, by which a minimum counts.
    sum: __m256,
}

/// A superblock's activations.
#[derive(Clone, Copy)]
struct ActsSuper<'x> {
    q: &'x [i8; 256],
    scale: &'x [f32; 8],
    /// Of 16 columns each.
    sum: &'x [i32; 16],
}

#[inline]
#[target_feature(enable = "avx")]
fn load32(q: &[i8; 32]) -> __m256i {
    // SAFETY: 32 readable bytes; the load has no alignment.
    unsafe { _mm256_loadu_si256(q.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx")]
fn lanes(l: &[i32; 8]) -> __m256i {
    // SAFETY: 32 readable bytes; the load has no alignment.
    unsafe { _mm256_loadu_si256(l.as_ptr().cast()) }
}

/// Bytes `at..at + 16` in the lower half, the 16 from 32 bytes on in the upper one.
#[inline]
#[target_feature(enable = "avx2")]
fn apart(q: &[i8; 64], at: usize) -> __m256i {
    let load = |at: usize| {
        let q: &[i8; 16] = q[at..].first_chunk().expect("inside two blocks");
        // SAFETY: 16 readable bytes; the load has no alignment.
        unsafe { _mm_loadu_si128(q.as_ptr().cast()) }
    };
    _mm256_inserti128_si256(_mm256_castsi128_si256(load(at)), load(at + 32), 1)
}

/// `HALVES[i]` brings lane `2 i` to the lower half and lane `2 i + 1` to the upper one.
const HALVES: [[i32; 8]; 4] =
    [[0, 0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 3, 3, 3, 3], [4, 4, 4, 4, 5, 5, 5, 5], [6, 6, 6, 6, 7, 7, 7, 7]];

#[inline]
#[target_feature(enable = "avx2")]
fn spread(v: __m256, index: &[i32; 8]) -> __m256 {
    _mm256_permutevar8x32_ps(v, lanes(index))
}

#[inline]
#[target_feature(enable = "avx2")]
fn acts_two(x: &Q8Row<'_>, step: usize) -> ActsTwo {
    const PADDED: &str = "rows of activations are padded";
    let q: &[i8; 64] = x.q[64 * step..].first_chunk().expect(PADDED);
    let scale: &[f32; 2] = x.scale[2 * step..].first_chunk().expect(PADDED);
    let sum: &[i32; 4] = x.sum[4 * step..].first_chunk().expect(PADDED);
    let scale = _mm256_castps128_ps256(_mm_castsi128_ps(_mm_set_epi64x(0, bytemuck::cast(*scale))));
    // SAFETY: 16 readable bytes; the load has no alignment.
    let sum = unsafe { _mm_loadu_si128(sum.as_ptr().cast()) };
    let scale = spread(scale, &HALVES[0]);
    let pairs = _mm256_castsi128_si256(_mm_hadd_epi32(sum, sum));
    let count = _mm256_permutevar8x32_epi32(pairs, lanes(&HALVES[0]));
    ActsTwo {
        low: apart(q, 0),
        high: apart(q, 16),
        count,
        scale,
        sum: _mm256_mul_ps(scale, _mm256_cvtepi32_ps(count)),
    }
}

#[inline(always)]
fn acts_super<'x>(x: &Q8Row<'x>, step: usize) -> ActsSuper<'x> {
    const PADDED: &str = "rows of activations are padded";
    ActsSuper {
        q: x.q[256 * step..].first_chunk().expect(PADDED),
        scale: x.scale[8 * step..].first_chunk().expect(PADDED),
        sum: x.sum[16 * step..].first_chunk().expect(PADDED),
    }
}

impl ActsSuper<'_> {
    /// Those of register `i` of eight.
    #[inline]
    #[target_feature(enable = "avx")]
    fn q(&self, i: usize) -> __m256i {
        load32(self.q[32 * i..].first_chunk().expect("one of eight"))
    }

    /// Those of groups `2 i` and `2 i + 1` of 32.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn two(&self, i: usize) -> (__m256i, __m256i, __m256) {
        let q: &[i8; 64] = self.q[64 * i..].first_chunk().expect("one of four");
        let (low, high) = (_mm256_set1_ps(self.scale[2 * i]), _mm256_set1_ps(self.scale[2 * i + 1]));
        (apart(q, 0), apart(q, 16), _mm256_blend_ps::<0b1111_0000>(low, high))
    }

    #[inline]
    #[target_feature(enable = "avx")]
    fn scales(&self) -> __m256 {
        // SAFETY: 32 readable bytes; the load has no alignment.
        unsafe { _mm256_loadu_ps(self.scale.as_ptr()) }
    }

    /// `scale * sum` of groups of 32: those of `2 i` and `2 i + 1` in the halves of register `i`.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn sums32(&self) -> [__m256; 4] {
        let (first, second) = self.sum.split_at(8);
        let (first, second) = (first.first_chunk().expect("8"), second.first_chunk().expect("8"));
        let pairs = _mm256_hadd_epi32(lanes(first), lanes(second));
        let sums = _mm256_cvtepi32_ps(_mm256_permute4x64_epi64::<0b11_01_10_00>(pairs));
        let sums = _mm256_mul_ps(self.scales(), sums);
        let mut all = [sums; 4];
        for i in 0..4 {
            all[i] = spread(sums, &HALVES[i]);
        }
        all
    }

    /// Likewise of groups of 16, in eight registers.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn sums16(&self) -> [__m256; 8] {
        let (first, second) = self.sum.split_at(8);
        let sums = [first, second].map(|s| lanes(s.first_chunk().expect("8")));
        let scales = self.scales();
        let scales = [spread(scales, &[0, 0, 1, 1, 2, 2, 3, 3]), spread(scales, &[4, 4, 5, 5, 6, 6, 7, 7])];
        let mut all = [scales[0]; 8];
        for h in 0..2 {
            let sums = _mm256_mul_ps(scales[h], _mm256_cvtepi32_ps(sums[h]));
            for i in 0..4 {
                all[4 * h + i] = spread(sums, &HALVES[i]);
            }
        }
        all
    }
}

/// Halves of four registers of 16-bit lanes added up, to two lanes of each register in each half:
/// `r0 r0 r1 r1 r2 r2 r3 r3`, for `madd` to add up.
#[inline]
#[target_feature(enable = "avx2")]
fn across16(r: [__m256i; QUAD]) -> __m256i {
    let two = |a, b| {
        let outer = _mm256_blend_epi32::<0b1100_1100>(a, b);
        _mm256_add_epi16(outer, _mm256_alignr_epi8::<8>(b, a))
    };
    let (first, second) = even_odd(two(r[0], r[1]), two(r[2], r[3]));
    _mm256_add_epi16(first, second)
}

/// Likewise of 32-bit lanes, to one lane of each register in each half.
#[inline]
#[target_feature(enable = "avx2")]
fn across32(r: [__m256i; QUAD]) -> __m256i {
    let two = |a, b| {
        let outer = _mm256_blend_epi32::<0b1100_1100>(a, b);
        _mm256_add_epi32(outer, _mm256_alignr_epi8::<8>(b, a))
    };
    let (first, second) = even_odd(two(r[0], r[1]), two(r[2], r[3]));
    _mm256_add_epi32(first, second)
}

/// The even lanes of each half of `a` and `b`, and the odd ones.
#[inline]
#[target_feature(enable = "avx2")]
fn even_odd(a: __m256i, b: __m256i) -> (__m256i, __m256i) {
    let (a, b) = (_mm256_castsi256_ps(a), _mm256_castsi256_ps(b));
    let (even, odd) = (_mm256_shuffle_ps::<0b10_00_10_00>(a, b), _mm256_shuffle_ps::<0b11_01_11_01>(a, b));
    (_mm256_castps_si256(even), _mm256_castps_si256(odd))
}

/// 16-bit lanes added up to 32 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(sums: __m256i) -> __m256i {
    _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
}

/// Products of unsigned weights of two blocks.
#[inline]
#[target_feature(enable = "avx2")]
fn products(w: &Two, a: &ActsTwo) -> __m256i {
    _mm256_add_epi16(_mm256_maddubs_epi16(w.low, a.low), _mm256_maddubs_epi16(w.high, a.high))
}

/// Products of signed weights: |w| times the activation with the sign of `w`. A weight of -128 is right too, an activation
/// of -128 would not be and does not occur.
#[inline]
#[target_feature(enable = "avx2")]
fn signed_products(w: &Two, low: __m256i, high: __m256i) -> __m256i {
    let signed = |w, a| widen(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w)));
    _mm256_add_epi32(signed(w.low, low), signed(w.high, high))
}

/// The scales of four rows, at the beginning of their two blocks.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scales_two<const BYTES: usize>(b: &Quad<'_, BYTES>) -> __m256 {
    let of =
        |r: usize, i: usize| i16::from_le_bytes([b.rows[r][BYTES / 2 * i], b.rows[r][BYTES / 2 * i + 1]]);
    let bits = _mm_setr_epi16(of(0, 0), of(1, 0), of(2, 0), of(3, 0), of(0, 1), of(1, 1), of(2, 1), of(3, 1));
    _mm256_cvtph_ps(bits)
}

#[inline(always)]
fn dword(b: &[u8], at: usize) -> i32 {
    i32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// The scales and minima of four rows, at the beginning of their two blocks.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scales_mins_two<const BYTES: usize>(b: &Quad<'_, BYTES>) -> (__m256, __m256) {
    let pairs = |r: usize| {
        let (a, b) = (b.rows[r], b.rows[r + 1]);
        let second = BYTES / 2;
        _mm256_cvtph_ps(_mm_setr_epi32(dword(a, 0), dword(b, 0), dword(a, second), dword(b, second)))
    };
    let (first, second) = (pairs(0), pairs(2));
    let (scale, min) = (
        _mm256_shuffle_ps::<0b10_00_10_00>(first, second),
        _mm256_shuffle_ps::<0b11_01_11_01>(first, second),
    );
    (scale, min)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_scaled(acc: &mut __m256, sums: __m256i, scale: __m256) {
    *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale, *acc);
}

/// Adds the products of a quad's two blocks a row: of Q4_0, whose zero point is 8.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quad_q4_0<const T: usize>(b: &Quad<'_, 36>, acts: &[ActsTwo; T], acc: &mut [__m256; T]) {
    prefetch::<36>(b.ahead, 0, 1);
    let w =
        [blocks::q4_0(b.rows[0]), blocks::q4_0(b.rows[1]), blocks::q4_0(b.rows[2]), blocks::q4_0(b.rows[3])];
    let scale = scales_two(b);
    for t in 0..T {
        let a = &acts[t];
        let sums =
            widen(across16([products(&w[0], a), products(&w[1], a), products(&w[2], a), products(&w[3], a)]));
        let sums = _mm256_sub_epi32(sums, _mm256_slli_epi32::<3>(a.count));
        add_scaled(&mut acc[t], sums, _mm256_mul_ps(scale, a.scale));
    }
}

/// Of Q4_1.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quad_q4_1<const T: usize>(b: &Quad<'_, 40>, acts: &[ActsTwo; T], acc: &mut [__m256; T]) {
    prefetch::<40>(b.ahead, 0, 1);
    let w =
        [blocks::q4_1(b.rows[0]), blocks::q4_1(b.rows[1]), blocks::q4_1(b.rows[2]), blocks::q4_1(b.rows[3])];
    let (scale, min) = scales_mins_two(b);
    for t in 0..T {
        let a = &acts[t];
        let sums =
            widen(across16([products(&w[0], a), products(&w[1], a), products(&w[2], a), products(&w[3], a)]));
        acc[t] = _mm256_fmadd_ps(min, a.sum, acc[t]);
        add_scaled(&mut acc[t], sums, _mm256_mul_ps(scale, a.scale));
    }
}

/// Sums of the products of weights of five bits, less 16 for each weight, so that they fit.
#[inline]
#[target_feature(enable = "avx2")]
fn sums_of_five_bits(w: &[Two; QUAD], a: &ActsTwo) -> __m256i {
    let sixteen = _mm256_set1_epi8(16);
    let zero = products(&Two { low: sixteen, high: sixteen }, a);
    let less = |w| _mm256_sub_epi16(products(w, a), zero);
    widen(across16([less(&w[0]), less(&w[1]), less(&w[2]), less(&w[3])]))
}

/// Of Q5_0, whose zero point is 16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quad_q5_0<const T: usize>(b: &Quad<'_, 44>, acts: &[ActsTwo; T], acc: &mut [__m256; T]) {
    prefetch::<44>(b.ahead, 0, 1);
    let w =
        [blocks::q5_0(b.rows[0]), blocks::q5_0(b.rows[1]), blocks::q5_0(b.rows[2]), blocks::q5_0(b.rows[3])];
    let scale = scales_two(b);
    for t in 0..T {
        let sums = sums_of_five_bits(&w, &acts[t]);
        add_scaled(&mut acc[t], sums, _mm256_mul_ps(scale, acts[t].scale));
    }
}

/// Of Q5_1: 16 less for each weight is 16 scales more in the minimum.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quad_q5_1<const T: usize>(b: &Quad<'_, 48>, acts: &[ActsTwo; T], acc: &mut [__m256; T]) {
    prefetch::<48>(b.ahead, 0, 1);
    let w =
        [blocks::q5_1(b.rows[0]), blocks::q5_1(b.rows[1]), blocks::q5_1(b.rows[2]), blocks::q5_1(b.rows[3])];
    let (scale, min) = scales_mins_two(b);
    let min = _mm256_fmadd_ps(scale, _mm256_set1_ps(16.0), min);
    for t in 0..T {
        acc[t] = _mm256_fmadd_ps(min, acts[t].sum, acc[t]);
        let sums = sums_of_five_bits(&w, &acts[t]);
        add_scaled(&mut acc[t], sums, _mm256_mul_ps(scale, acts[t].scale));
    }
}

/// Of signed weights that `read` takes out of their blocks: Q8_0 and IQ4_NL.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quad_signed<const BYTES: usize, const T: usize>(
    b: &Quad<'_, BYTES>,
    acts: &[ActsTwo; T],
    acc: &mut [__m256; T],
    read: impl Fn(&[u8; BYTES]) -> Two,
) {
    prefetch::<BYTES>(b.ahead, 0, 1);
    let w = [read(b.rows[0]), read(b.rows[1]), read(b.rows[2]), read(b.rows[3])];
    let scale = scales_two(b);
    for t in 0..T {
        let ActsTwo { low, high, scale: a_scale, .. } = acts[t];
        let sums = across32([
            signed_products(&w[0], low, high),
            signed_products(&w[1], low, high),
            signed_products(&w[2], low, high),
            signed_products(&w[3], low, high),
        ]);
        add_scaled(&mut acc[t], sums, _mm256_mul_ps(scale, a_scale));
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn twice(x: __m128i) -> __m256i {
    _mm256_broadcastsi128_si256(x)
}

/// Double words from byte `at` on of four rows.
#[inline]
#[target_feature(enable = "avx2")]
fn dwords<const BYTES: usize>(b: &Quad<'_, BYTES>, at: usize) -> __m128i {
    _mm_setr_epi32(dword(b.rows[0], at), dword(b.rows[1], at), dword(b.rows[2], at), dword(b.rows[3], at))
}

/// A half-precision number from byte `AT` on of each of four rows, in both halves.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn halves<const BYTES: usize, const AT: usize>(b: &Quad<'_, BYTES>) -> __m256 {
    let [a, b, c, d] =
        [word::<AT>(b.rows[0]), word::<AT>(b.rows[1]), word::<AT>(b.rows[2]), word::<AT>(b.rows[3])];
    let bits = u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48;
    _mm256_cvtph_ps(_mm_set1_epi64x(bits as i64))
}

/// `[row][group]` of four groups to `[group][row]`, and back.
#[inline]
#[target_feature(enable = "avx2")]
fn turn4(x: __m128i) -> __m128i {
    _mm_shuffle_epi8(x, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15))
}

/// Eight bytes from byte `8 * (i % 2)` on of `[group][row]`, widened: groups `2 i` and `2 i + 1`.
#[inline]
#[target_feature(enable = "avx2")]
fn two_groups<const SIGNED: bool>(groups: &[__m128i], i: usize) -> __m256 {
    let four = groups[i / 2];
    let two = if i.is_multiple_of(2) { four } else { _mm_srli_si128::<8>(four) };
    _mm256_cvtepi32_ps(if SIGNED { _mm256_cvtepi8_epi32(two) } else { _mm256_cvtepu8_epi32(two) })
}

/// The 6-bit scales and minima of four rows of Q4_K or Q5_K: `[row][group]`, the first four groups and the last four. As
/// `scales_mins_k4`, for four rows at once.
#[inline]
#[target_feature(enable = "avx2")]
fn scales_mins_k4<const BYTES: usize>(b: &Quad<'_, BYTES>) -> ([__m128i; 2], [__m128i; 2]) {
    let (first, second, third) = (dwords(b, 4), dwords(b, 8), dwords(b, 12));
    let six = |x| _mm_and_si128(x, _mm_set1_epi8(0x3f));
    let nibble = |x| _mm_and_si128(x, _mm_set1_epi8(0x0f));
    let top = |x| _mm_and_si128(_mm_srli_epi16::<2>(x), _mm_set1_epi8(0x30));
    let high_scales = _mm_or_si128(nibble(third), top(first));
    let high_mins = _mm_or_si128(nibble(_mm_srli_epi16::<4>(third)), top(second));
    ([six(first), high_scales], [six(second), high_mins])
}

/// `WORDS[i]` brings byte `4 r + i` to both words of lane `r` of each half, in their low bytes.
const WORDS: [[i8; 32]; 4] = {
    let mut index = [[-1; 32]; 4];
    let mut at = 0;
    while at < 32 * 4 {
        let (i, lane) = (at / 32, at % 32 / 2);
        if at % 2 == 0 {
            index[i][at % 32] = (lane % 8 / 2 * 4 + i) as i8;
        }
        at += 1;
    }
    index
};

/// `TOPS[i]` brings byte `8 i + 4 h + r` to both words of lane `r` of half `h`, in their high bytes.
const TOPS: [[i8; 32]; 2] = {
    let mut index = [[-1; 32]; 2];
    let mut at = 0;
    while at < 32 * 2 {
        let (i, half, lane) = (at / 32, at % 32 / 16, at % 16 / 4);
        if at % 2 == 1 {
            index[i][at % 32] = (8 * i + 4 * half + lane) as i8;
        }
        at += 1;
    }
    index
};

/// Adds the products of piece `J`: groups `2 J` and `2 J + 1`, of unsigned weights.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_k4<const J: usize, const BYTES: usize, const T: usize>(
    b: &Quad<'_, BYTES>,
    acts: &[ActsSuper<'_>; T],
    scales: &[__m256i; 2],
    sums: &mut [__m256; T],
    piece: &impl Fn(&[u8; BYTES], usize) -> Piece,
) {
    prefetch::<BYTES>(b.ahead, J, 4);
    let w = [piece(b.rows[0], J), piece(b.rows[1], J), piece(b.rows[2], J), piece(b.rows[3], J)];
    for k in 0..2 {
        let group = 2 * J + k;
        let scale = _mm256_shuffle_epi8(scales[group / 4], load32(&WORDS[group % 4]));
        for t in 0..T {
            let a = acts[t].q(group);
            let across = across16([
                _mm256_maddubs_epi16(w[0][k], a),
                _mm256_maddubs_epi16(w[1][k], a),
                _mm256_maddubs_epi16(w[2][k], a),
                _mm256_maddubs_epi16(w[3][k], a),
            ]);
            let by = _mm256_set1_ps(acts[t].scale[group]);
            add_scaled(&mut sums[t], _mm256_madd_epi16(across, scale), by);
        }
    }
}

/// Of superblocks with eight groups of unsigned weights, `piece(bytes, j)` giving groups `2 j` and `2 j + 1`: Q4_K and
/// Q5_K. The group's scale is multiplied in as an integer.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quad_k4<const BYTES: usize, const T: usize>(
    b: &Quad<'_, BYTES>,
    acts: &[ActsSuper<'_>; T],
    acc: &mut [__m256; T],
    piece: impl Fn(&[u8; BYTES], usize) -> Piece,
) {
    let (scales, mins) = scales_mins_k4(b);
    let scales = [twice(scales[0]), twice(scales[1])];
    let mut sums = [_mm256_setzero_ps(); T];
    add_k4::<0, BYTES, T>(b, acts, &scales, &mut sums, &piece);
    add_k4::<1, BYTES, T>(b, acts, &scales, &mut sums, &piece);
    add_k4::<2, BYTES, T>(b, acts, &scales, &mut sums, &piece);
    add_k4::<3, BYTES, T>(b, acts, &scales, &mut sums, &piece);
    let both = _mm256_cvtph_ps(dwords(b, 0));
    let (d, dmin) = (spread(both, &[0, 2, 4, 6, 0, 2, 4, 6]), spread(both, &[1, 3, 5, 7, 1, 3, 5, 7]));
    let mins = [turn4(mins[0]), turn4(mins[1])];
    for t in 0..T {
        let by = acts[t].sums32();
        let mut min = _mm256_mul_ps(two_groups::<false>(&mins, 0), by[0]);
        for i in 1..4 {
            min = _mm256_fmadd_ps(two_groups::<false>(&mins, i), by[i], min);
        }
        acc[t] = _mm256_fmadd_ps(d, sums[t], acc[t]);
        acc[t] = _mm256_fnmadd_ps(dmin, min, acc[t]);
    }
}

/// Sixteen bytes of each of four rows to `[group][row]`, four groups a register.
#[inline]
#[target_feature(enable = "avx2")]
fn turn16(r: [__m128i; QUAD]) -> [__m128i; 4] {
    let (low, high) = (_mm_unpacklo_epi8(r[0], r[1]), _mm_unpackhi_epi8(r[0], r[1]));
    let (low2, high2) = (_mm_unpacklo_epi8(r[2], r[3]), _mm_unpackhi_epi8(r[2], r[3]));
    [
        _mm_unpacklo_epi16(low, low2),
        _mm_unpackhi_epi16(low, low2),
        _mm_unpacklo_epi16(high, high2),
        _mm_unpackhi_epi16(high, high2),
    ]
}

/// The products of superblocks with sixteen groups, `piece(bytes, j)` giving the registers `index(j)`, in units of
/// `d / 256`. The zero point `ZERO` is taken off the weights; `scales` are signed bytes, `[group][row]`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn groups16<const BYTES: usize, const ZERO: i8, const T: usize>(
    b: &Quad<'_, BYTES>,
    acts: &[ActsSuper<'_>; T],
    scales: &[__m128i; 4],
    index: impl Fn(usize) -> [usize; 2],
    piece: impl Fn(&[u8; BYTES], usize) -> Piece,
) -> [__m256; T] {
    let mut sums = [_mm256_setzero_ps(); T];
    add_groups16::<0, BYTES, ZERO, T>(b, acts, scales, &mut sums, &index, &piece);
    add_groups16::<1, BYTES, ZERO, T>(b, acts, scales, &mut sums, &index, &piece);
    add_groups16::<2, BYTES, ZERO, T>(b, acts, scales, &mut sums, &index, &piece);
    add_groups16::<3, BYTES, ZERO, T>(b, acts, scales, &mut sums, &index, &piece);
    sums
}

/// Adds the products of piece `J`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_groups16<const J: usize, const BYTES: usize, const ZERO: i8, const T: usize>(
    b: &Quad<'_, BYTES>,
    acts: &[ActsSuper<'_>; T],
    scales: &[__m128i; 4],
    sums: &mut [__m256; T],
    index: &impl Fn(usize) -> [usize; 2],
    piece: &impl Fn(&[u8; BYTES], usize) -> Piece,
) {
    prefetch::<BYTES>(b.ahead, J, 4);
    let w = [piece(b.rows[0], J), piece(b.rows[1], J), piece(b.rows[2], J), piece(b.rows[3], J)];
    for k in 0..2 {
        let i = index(J)[k];
        let scale = _mm256_shuffle_epi8(twice(scales[i / 2]), load32(&TOPS[i % 2]));
        for t in 0..T {
            let a = acts[t].q(i);
            let zero = _mm256_maddubs_epi16(_mm256_set1_epi8(ZERO), a);
            let less = |w| {
                let products = _mm256_maddubs_epi16(w, a);
                if ZERO == 0 { products } else { _mm256_sub_epi16(products, zero) }
            };
            let across = across16([less(w[0][k]), less(w[1][k]), less(w[2][k]), less(w[3][k])]);
            let by = _mm256_set1_ps(acts[t].scale[i]);
            add_scaled(&mut sums[t], _mm256_madd_epi16(across, scale), by);
        }
    }
}

/// What [`groups16`] counts in.
const TOP: f32 = 1.0 / 256.0;

#[inline]
#[target_feature(enable = "sse2")]
fn load16(b: &[u8; 16]) -> __m128i {
    // SAFETY: 16 readable bytes; the load has no alignment.
    unsafe { _mm_loadu_si128(b.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quad_q6_k<const T: usize>(b: &Quad<'_, 210>, acts: &[ActsSuper<'_>; T], acc: &mut [__m256; T]) {
    let of = |r: usize| load16(part::<192, 16>(b.rows[r]));
    let scales = turn16([of(0), of(1), of(2), of(3)]);
    let sums = groups16::<210, 32, T>(b, acts, &scales, blocks::of_q6_k, |b, j| blocks::q6_k(b, j));
    let d = _mm256_mul_ps(halves::<210, 208>(b), _mm256_set1_ps(TOP));
    for t in 0..T {
        acc[t] = _mm256_fmadd_ps(d, sums[t], acc[t]);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quad_q3_k<const T: usize>(b: &Quad<'_, 110>, acts: &[ActsSuper<'_>; T], acc: &mut [__m256; T]) {
    let of = |r: usize| {
        let [s0, s1, s2, s3] = scales_q3_k(part::<96, 12>(b.rows[r]));
        let scales = _mm_setr_epi32(s0 as i32, s1 as i32, s2 as i32, s3 as i32);
        _mm_sub_epi8(scales, _mm_set1_epi8(32))
    };
    let scales = turn16([of(0), of(1), of(2), of(3)]);
    let sums = groups16::<110, 4, T>(b, acts, &scales, blocks::adjacent, |b, j| blocks::q3_k(b, j));
    let d = _mm256_mul_ps(halves::<110, 108>(b), _mm256_set1_ps(TOP));
    for t in 0..T {
        acc[t] = _mm256_fmadd_ps(d, sums[t], acc[t]);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quad_q2_k<const T: usize>(b: &Quad<'_, 84>, acts: &[ActsSuper<'_>; T], acc: &mut [__m256; T]) {
    let of = |r: usize| load16(part::<0, 16>(b.rows[r]));
    let nibble = |x| _mm_and_si128(x, _mm_set1_epi8(0x0f));
    let both = turn16([of(0), of(1), of(2), of(3)]);
    let (mut scales, mut mins) = (both, both);
    for i in 0..4 {
        (scales[i], mins[i]) = (nibble(both[i]), nibble(_mm_srli_epi16::<4>(both[i])));
    }
    let sums = groups16::<84, 0, T>(b, acts, &scales, blocks::adjacent, |b, j| blocks::q2_k(b, j));
    let d = _mm256_mul_ps(halves::<84, 80>(b), _mm256_set1_ps(TOP));
    let dmin = halves::<84, 82>(b);
    for t in 0..T {
        let by = acts[t].sums16();
        let mut min = _mm256_setzero_ps();
        for i in 0..8 {
            min = _mm256_fmadd_ps(two_groups::<false>(&mins, i), by[i], min);
        }
        acc[t] = _mm256_fmadd_ps(d, sums[t], acc[t]);
        acc[t] = _mm256_fnmadd_ps(dmin, min, acc[t]);
    }
}

/// The 6-bit scales of four rows of IQ4_XS, 32 taken off: `[group][row]`, four groups a register.
///
/// The low nibbles are those of four bytes; the high bits of group `g` are bits `2 g` and `2 g + 1` of a word.
#[inline]
#[target_feature(enable = "avx2")]
fn scales_iq4_xs(b: &Quad<'_, 136>) -> [__m128i; 2] {
    let (low, head) = (dwords(b, 4), dwords(b, 0));
    // Each byte of the word twice: the fields of the even groups are at bits 0, 4, 0, 4, those of the odd ones above.
    let high = _mm_shuffle_epi8(head, _mm_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15));
    let high = _mm_blendv_epi8(high, _mm_srli_epi16::<4>(high), _mm_set1_epi16(0xff00_u16 as i16));
    let nibble = |x| _mm_and_si128(x, _mm_set1_epi8(0x0f));
    let top = |x| _mm_and_si128(x, _mm_set1_epi8(0x30));
    let even = _mm_or_si128(nibble(low), top(_mm_slli_epi16::<4>(high)));
    let odd = _mm_or_si128(nibble(_mm_srli_epi16::<4>(low)), top(_mm_slli_epi16::<2>(high)));
    let less = |x| turn4(_mm_sub_epi8(x, _mm_set1_epi8(32)));
    let (even, odd) = (less(even), less(odd));
    [_mm_unpacklo_epi32(even, odd), _mm_unpackhi_epi32(even, odd)]
}

/// Adds the products of groups `2 J` and `2 J + 1`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_iq4_xs<const J: usize, const T: usize>(
    b: &Quad<'_, 136>,
    acts: &[ActsSuper<'_>; T],
    scales: &[__m128i; 2],
    sums: &mut [__m256; T],
) {
    prefetch::<136>(b.ahead, J, 4);
    let of = |r: usize| blocks::iq4_xs(b.rows[r], J);
    let w = [of(0), of(1), of(2), of(3)];
    let scale = two_groups::<true>(scales, J);
    for t in 0..T {
        let (low, high, by) = acts[t].two(J);
        let across = across32([
            signed_products(&w[0], low, high),
            signed_products(&w[1], low, high),
            signed_products(&w[2], low, high),
            signed_products(&w[3], low, high),
        ]);
        add_scaled(&mut sums[t], across, _mm256_mul_ps(scale, by));
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quad_iq4_xs<const T: usize>(b: &Quad<'_, 136>, acts: &[ActsSuper<'_>; T], acc: &mut [__m256; T]) {
    let scales = scales_iq4_xs(b);
    let mut sums = [_mm256_setzero_ps(); T];
    add_iq4_xs::<0, T>(b, acts, &scales, &mut sums);
    add_iq4_xs::<1, T>(b, acts, &scales, &mut sums);
    add_iq4_xs::<2, T>(b, acts, &scales, &mut sums);
    add_iq4_xs::<3, T>(b, acts, &scales, &mut sums);
    let d = halves::<136, 0>(b);
    for t in 0..T {
        acc[t] = _mm256_fmadd_ps(d, sums[t], acc[t]);
    }
}

/// Products of `4 * Q` rows, of which `left` are there, with all tokens: `[quad][token]`, lane `r` of both halves
/// together the sum of row `r`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rows<'x, A: Copy, const BYTES: usize, const Q: usize, const T: usize>(
    w: &[u8],
    row_bytes: usize,
    left: usize,
    x: &[Q8Row<'x>; T],
    acts: impl Fn(&Q8Row<'x>, usize) -> A,
    quad: impl Fn(&Quad<'_, BYTES>, &[A; T], &mut [__m256; T]),
) -> [[__m256; T]; Q] {
    let (whole, tail) = (row_bytes / BYTES, row_bytes % BYTES);
    let mut steps = [[[].as_slice(); QUAD]; Q];
    // Fewer blocks than a step takes have zeros behind them.
    let mut padded = [[[0u8; BYTES]; QUAD]; Q];
    for q in 0..Q {
        for r in 0..QUAD {
            // The last row takes the place of those that are missing.
            let row = &w[(QUAD * q + r).min(left - 1) * row_bytes..][..row_bytes];
            steps[q][r] = &row.as_chunks::<BYTES>().0[..whole];
            if tail > 0 {
                padded[q][r][..tail].copy_from_slice(&row[whole * BYTES..]);
            }
        }
    }
    // The next rows lie behind these: fetched in the order of the file, so that their beginnings, where every stream is
    // new, do not wait for memory.
    let ahead = (QUAD * Q * row_bytes).max(PREFETCH);
    let mut acc = [[_mm256_setzero_ps(); T]; Q];
    for s in 0..row_bytes.div_ceil(BYTES) {
        let a = acts_of(x, s, &acts);
        for q in 0..Q {
            let rows = if s < whole {
                let [r0, r1, r2, r3] = steps[q];
                [&r0[s], &r1[s], &r2[s], &r3[s]]
            } else {
                padded[q].each_ref()
            };
            let ahead = w.as_ptr().wrapping_add(ahead + (s * Q + q) * QUAD * BYTES);
            quad(&Quad { rows, ahead }, &a, &mut acc[q]);
        }
    }
    acc
}

/// What `acts` makes of step `s` of each token.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn acts_of<'x, A: Copy, const T: usize>(
    x: &[Q8Row<'x>; T],
    s: usize,
    acts: &impl Fn(&Q8Row<'x>, usize) -> A,
) -> [A; T] {
    let mut all = [acts(&x[0], s); T];
    for t in 1..T {
        all[t] = acts(&x[t], s);
    }
    all
}

/// Products of rows of a type, `BYTES` bytes a step: `acts(x, step)` prepares a token's activations, `quad(bytes, acts,
/// acc)` adds the products of a step.
// Not inlined: one function for all types would run out of registers.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply<'x, A: Copy, const BYTES: usize, const T: usize>(
    (weights, row_bytes): (&[u8], usize),
    x: &[Q8Row<'x>; T],
    mut out: [&mut [f32]; T],
    acts: impl Fn(&Q8Row<'x>, usize) -> A,
    quad: impl Fn(&Quad<'_, BYTES>, &[A; T], &mut [__m256; T]),
) {
    let (n, mut done) = (out[0].len(), 0);
    while done < n {
        let (w, left) = (&weights[done * row_bytes..], n - done);
        if left > QUAD {
            let sums = rows::<_, BYTES, QUADS, T>(w, row_bytes, left, x, &acts, &quad);
            store(&sums, done, &mut out);
            done += QUAD * QUADS;
        } else {
            let sums = rows::<_, BYTES, 1, T>(w, row_bytes, left, x, &acts, &quad);
            store(&sums, done, &mut out);
            done += QUAD;
        }
    }
}

/// From the halves' sums of some quads to the outputs from `first` on, as far as those are there.
#[inline]
#[target_feature(enable = "avx")]
fn store<const Q: usize, const T: usize>(sums: &[[__m256; T]; Q], first: usize, out: &mut [&mut [f32]; T]) {
    for q in 0..Q {
        for t in 0..T {
            let sums = sums[q][t];
            let sums = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums));
            let mut four = [0f32; QUAD];
            // SAFETY: 16 writable bytes; the store has no alignment.
            unsafe { _mm_storeu_ps(four.as_mut_ptr(), sums) };
            let first = (first + QUAD * q).min(out[t].len());
            let out = &mut out[t][first..];
            match out.first_chunk_mut() {
                Some(all) => *all = four,
                None => out.copy_from_slice(&four[..out.len()]),
            }
        }
    }
}

/// `T` tokens.
#[target_feature(enable = "avx2,fma,f16c")]
fn tokens<const T: usize>(
    ty: GgmlType,
    weights: &[u8],
    row_bytes: usize,
    x: &[Q8Row<'_>; T],
    out: [&mut [f32]; T],
) {
    use GgmlType::*;
    let w = (weights, row_bytes);
    let two = |x: &Q8Row<'_>, s| acts_two(x, s);
    match ty {
        Q4_0 => multiply(w, x, out, two, |b, a, acc| quad_q4_0(b, a, acc)),
        Q4_1 => multiply(w, x, out, two, |b, a, acc| quad_q4_1(b, a, acc)),
        Q5_0 => multiply(w, x, out, two, |b, a, acc| quad_q5_0(b, a, acc)),
        Q5_1 => multiply(w, x, out, two, |b, a, acc| quad_q5_1(b, a, acc)),
        Q8_0 => multiply(w, x, out, two, |b, a, acc| quad_signed(b, a, acc, |b| blocks::q8_0(b))),
        IQ4_NL => multiply(w, x, out, two, |b, a, acc| quad_signed(b, a, acc, |b| blocks::iq4_nl(b))),
        Q2_K => multiply(w, x, out, acts_super, |b, a, acc| quad_q2_k(b, a, acc)),
        Q3_K => multiply(w, x, out, acts_super, |b, a, acc| quad_q3_k(b, a, acc)),
        Q4_K => multiply(w, x, out, acts_super, |b, a, acc| quad_k4(b, a, acc, |b, j| blocks::q4_k(b, j))),
        Q5_K => multiply(w, x, out, acts_super, |b, a, acc| quad_k4(b, a, acc, |b, j| blocks::q5_k(b, j))),
        Q6_K => multiply(w, x, out, acts_super, |b, a, acc| quad_q6_k(b, a, acc)),
        IQ4_XS => multiply(w, x, out, acts_super, |b, a, acc| quad_iq4_xs(b, a, acc)),
        F32 | F16 | BF16 => unreachable!("unquantised types have kernels of their own"),
    }
}

/// See `Kernels::dot`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels::x86) fn dot(
    ty: GgmlType,
    weights: &[u8],
    row_bytes: usize,
    x: Q8Row<'_>,
    out: &mut [f32],
) {
    tokens(ty, weights, row_bytes, &[x], [out]);
}

/// See `Kernels::dot_tokens`: the weights are unpacked once for four tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels::x86) fn dot_tokens(
    ty: GgmlType,
    weights: &[u8],
    row_bytes: usize,
    x: &Activations,
    out: &mut [f32],
) {
    each_four_tokens!(tokens, ty, weights, row_bytes, x, out);
}
