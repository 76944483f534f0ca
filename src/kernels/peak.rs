//! The most that an instruction set can multiply: its 8-bit instruction over and over, operands in registers, as many
//! independent sums as hide its latency. What `gemm` reaches is to be judged by it.

use super::Kernels;
use super::fetch::fetch;

/// Words of a cache line, and how many lines early [`sum_of`] asks for each: twice, which draws more from an Intel CPU's
/// memory than once at any distance (docs/experiments.md, "Decoding on AVX-512").
const LINE: usize = 8;
const AHEAD: [usize; 2] = [32, 16];

/// The sum of all words, read as fast as they come from memory. `ask`: for lines ahead of the loads, into L2, as the
/// kernels do it, because some cores alone have too few loads under way; others foresee a plain run better by themselves.
pub fn sum_of(words: &[u64], ask: bool) -> u64 {
    // 64 independent sums keep enough loads in flight whatever the width of a vector.
    let (blocks, rest) = words.as_chunks::<64>();
    let mut sums = [0u64; 64];
    for (i, block) in blocks.iter().enumerate() {
        if ask {
            for lines in AHEAD {
                let ahead = words.get((i * 64 + lines * LINE)..).unwrap_or_default();
                fetch(bytemuck::cast_slice(&ahead[..ahead.len().min(64)]));
            }
        }
        for (sum, word) in sums.iter_mut().zip(block) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().chain(rest).fold(0, |sum, word| sum.wrapping_add(*word))
}

/// A burst of `rounds`; the sum that it returns keeps the compiler from leaving work out.
type Burst = unsafe fn(rounds: usize) -> i32;

impl Kernels {
    /// Runs `rounds` rounds of the instruction that `gemm` rests on, and returns how many operations (a product and an
    /// addition are two) that were. `None` for kernels whose peak is not measured.
    pub fn int8_burst(&self, rounds: usize) -> Option<u64> {
        let (burst, operations) = burst(self.name())?;
        // SAFETY: the handle proves the ISA of its name.
        std::hint::black_box(unsafe { burst(rounds) });
        Some(rounds as u64 * operations)
    }
}

/// The burst of the kernel called `name`, and the operations of a round.
#[cfg(target_arch = "x86_64")]
fn burst(name: &str) -> Option<(Burst, u64)> {
    match name {
        "amx" => Some((super::x86::amx::burst, 4 * 2 * 16 * 16 * 64)),
        "avx512vnni" => Some((x86::avx512vnni, x86::SUMS_512 * 2 * 64)),
        "avxvnni" => Some((x86::avxvnni, x86::SUMS_256 * 2 * 32)),
        "avx2" => Some((x86::avx2, x86::SUMS_256 * 2 * 32)),
        _ => None,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn burst(_: &str) -> Option<(Burst, u64)> {
    None
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Independent sums: latencies are 4 or 5 cycles, and up to two instructions start in one.
    pub const SUMS_512: u64 = 16;
    /// The same; of the 16 registers, some hold operands.
    pub const SUMS_256: u64 = 10;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn avx512vnni(rounds: usize) -> i32 {
        let mut sums = [_mm512_setzero_si512(); SUMS_512 as usize];
        for _ in 0..rounds {
            // Opaque anew in every round: no product can be taken out of the loop.
            let (w, a) = (black_box(_mm512_set1_epi8(1)), black_box(_mm512_set1_epi8(1)));
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, w, a);
            }
        }
        let mut total = sums[0];
        for sum in &sums[1..] {
            total = _mm512_add_epi32(total, *sum);
        }
        _mm512_reduce_add_epi32(total)
    }

    #[target_feature(enable = "avx2,avxvnni")]
    pub fn avxvnni(rounds: usize) -> i32 {
        let mut sums = [_mm256_setzero_si256(); SUMS_256 as usize];
        for _ in 0..rounds {
            let (w, a) = (black_box(_mm256_set1_epi8(1)), black_box(_mm256_set1_epi8(1)));
            for sum in &mut sums {
                *sum = _mm256_dpbusd_avx_epi32(*sum, w, a);
            }
        }
        total(&sums)
    }

    /// Products of pairs in 16 bits, those in pairs to 32, and the addition: three instructions for what VNNI does in
    /// one. Each sum has an operand of its own, or one product would serve all. Four rounds in a turn of the loop: with one,
    /// 30 instructions, Zen 3 is a seventh slower.
    #[target_feature(enable = "avx2")]
    pub fn avx2(rounds: usize) -> i32 {
        let mut sums = [_mm256_setzero_si256(); SUMS_256 as usize];
        let weights = [_mm256_set1_epi8(1); SUMS_256 as usize];
        for _ in 0..rounds / 4 {
            let weights = black_box(&weights);
            for a in black_box([_mm256_set1_epi8(1); 4]) {
                add_products(&mut sums, weights, a);
            }
        }
        for _ in 0..rounds % 4 {
            add_products(&mut sums, black_box(&weights), black_box(_mm256_set1_epi8(1)));
        }
        total(&sums)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    #[allow(clippy::needless_range_loop)] // an iterator's adapters would not be inlined
    fn add_products(
        sums: &mut [__m256i; SUMS_256 as usize],
        weights: &[__m256i; SUMS_256 as usize],
        a: __m256i,
    ) {
        for i in 0..SUMS_256 as usize {
            let products = _mm256_maddubs_epi16(weights[i], a);
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
        }
    }

    #[target_feature(enable = "avx2")]
    fn total(sums: &[__m256i]) -> i32 {
        let mut total = _mm256_setzero_si256();
        for sum in sums {
            total = _mm256_add_epi32(total, *sum);
        }
        let half = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256::<1>(total));
        let pair = _mm_add_epi32(half, _mm_shuffle_epi32::<0b01_00_11_10>(half));
        _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32::<0b10_11_00_01>(pair)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All operands are ones, so the sum counts the products: none is left out.
    #[test]
    fn every_counted_operation_is_done() {
        for kernels in Kernels::available() {
            let Some((burst, operations)) = burst(kernels.name()) else { continue };
            for rounds in [0, 1, 100] {
                // SAFETY: the handle proves the ISA.
                let sum = unsafe { burst(rounds) };
                // A tile's sums are 4 by 256, of which one tells of all.
                let counted = if kernels.name() == "amx" { 4 * 256 } else { 1 };
                assert_eq!(2 * counted * sum as u64, rounds as u64 * operations, "{kernels:?}");
                assert_eq!(kernels.int8_burst(rounds), Some(rounds as u64 * operations));
            }
        }
    }
}
