//! Reading the parts of weight blocks: what the block readers of every instruction set share.

/// The `N` bytes of `b` from byte `O` on; compiles to nothing where `b` has a known length.
#[inline(always)]
pub(super) fn part<const O: usize, const N: usize>(b: &[u8]) -> &[u8; N] {
    b[O..].first_chunk().expect("a block's parts lie inside it")
}

/// A little-endian 16-bit word of a block.
#[inline(always)]
pub(super) fn word<const O: usize>(b: &[u8]) -> u16 {
    u16::from_le_bytes(*part::<O, 2>(b))
}

/// The 6-bit scales and minima of Q4_K and Q5_K: bytes 0..8 of the two words.
///
/// Twelve bytes hold eight pairs: the first four of each in the low six bits of bytes 0..4 and
/// 4..8; of the last four, the low four bits in the nibbles of bytes 8..12 and the high two bits
/// in the top of bytes 0..8 (ggml's `get_scale_min_k4`, all at once).
#[inline(always)]
pub(super) fn scales_mins_k4(b: &[u8; 12]) -> (u64, u64) {
    let u = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
    let (first, second, third) = (u(0), u(4), u(8));
    let high_scales = (third & 0x0f0f_0f0f) | (first >> 6 & 0x0303_0303) << 4;
    let high_mins = (third >> 4 & 0x0f0f_0f0f) | (second >> 6 & 0x0303_0303) << 4;
    let join = |low: u32, high: u32| u64::from(low & 0x3f3f_3f3f) | u64::from(high) << 32;
    (join(first, high_scales), join(second, high_mins))
}

/// The sixteen 6-bit scales of Q3_K, 32 too large: low nibbles in bytes 0..8, two high bits of four
/// scales in each of bytes 8..12. Four scales a word, in order.
#[inline(always)]
pub(super) fn scales_q3_k(b: &[u8; 12]) -> [u32; 4] {
    let u = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
    let (low0, low1, high) = (u(0), u(4), u(8));
    let (nibble, two) = (0x0f0f_0f0f, 0x0303_0303);
    [
        (low0 & nibble) | (high & two) << 4,
        (low1 & nibble) | (high >> 2 & two) << 4,
        (low0 >> 4 & nibble) | (high >> 4 & two) << 4,
        (low1 >> 4 & nibble) | (high >> 6 & two) << 4,
    ]
}
