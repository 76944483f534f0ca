//! The kernel table: SIMD code for each instruction set, chosen once at run time.
//!
//! This is the only place with intrinsics and CPU detection. A [`Kernels`] handle can only be had
//! from [`Kernels::select`] (or [`Kernels::available`]), which checks the CPU: holding one is the
//! proof that its functions may run. Its methods assert every length; behind them no length is
//! checked again.
//!
//! # What a kernel does
//! Activations are quantised to 8 bits in blocks of 32 ([`Activations`]). A quantised weight is
//! `scale * (q - zero) + min` with `q` an unsigned byte (`quant::unpack_row`), so the dot product
//! over a group of 16 or 32 weights is
//!
//! ```text
//! scale * a_scale * (sum(q * a) - zero * sum(a)) + min * a_scale * sum(a)
//! ```
//!
//! with exact integer sums. Two functions compute it:
//! * `dot`, for one token: weights are read in place, once, in the order of the file; `dot_listed` reads some of the rows;
//! * `gemm`, for many: 32 rows are unpacked to bytes in a panel that stays in the L1/L2 cache and
//!   serves every token. One micro-kernel an ISA serves every type.
//!
//! A matrix unit multiplies many tokens in another form: see [`tiles`].

pub mod activations;
#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // only x86-64 has kernels for it
pub mod attention;
pub mod columns;
pub mod decode_attention;
mod fetch;
pub mod float;
pub mod gemm_f32;
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
mod layout;
mod peak;
mod rows;
mod scalar;
#[cfg(test)]
mod tests;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // no matrix unit but AMX has kernels
pub mod tiles;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use crate::gguf::GgmlType;
use crate::quant;
use crate::quant::columns::ColumnStrip;
pub use activations::{Activations, Q8Row, Q8Rows};
pub use columns::ColumnList;
use fetch::PanelBytes;
pub use peak::sum_of;
use rows::Listed;

/// Weight rows in a [`Panel`].
pub const PANEL_ROWS: usize = 32;
/// Columns of weights in a full [`Panel`]: 32 rows of 512 bytes are 16 KiB, half of a small L1.
pub const PANEL_COLS: usize = 512;

/// Up to so many tokens go through `dot_tokens` whatever the instruction set, and give bit by bit what each gives alone.
pub const FEW_TOKENS: usize = 16;

/// The functions of one instruction set. Each is `unsafe` to call where the CPU lacks it; the
/// lengths that each expects are asserted in the methods of [`Kernels`].
#[allow(clippy::type_complexity)] // names for these would say less than the types
struct Functions {
    quantize: unsafe fn(&[f32], &mut [i8], &mut [f32], &mut [i32]),
    dot: unsafe fn(GgmlType, &[u8], usize, Q8Row<'_>, &mut [f32]),
    dot_listed: unsafe fn(GgmlType, Listed<'_>, Q8Row<'_>, &mut [f32]),
    /// Several tokens, where that is better than one after the other.
    dot_tokens: Option<unsafe fn(GgmlType, &[u8], usize, &Activations, &mut [f32])>,
    /// From so many tokens on `unpack` and `gemm` are faster than that: more than [`FEW_TOKENS`].
    panels_from: usize,
    unpack: unsafe fn(GgmlType, &[u8], &mut [u8], &mut [f32], &mut [f32]),
    interleave: unsafe fn(&[u8], usize, &mut [u8]),
    gemm: unsafe fn(&Panel, Q8Rows<'_>, &mut [f32]),
    columns: unsafe fn(&ColumnStrip<'_>, columns::Chosen<'_>, Range<usize>, &mut [f32]),
    float: &'static float::Functions,
    decode_attention: &'static decode_attention::Functions,
    /// Those of a matrix unit, for many tokens in place of `gemm`.
    tiles: Option<&'static tiles::Functions>,
    /// Those of tiles of 16-bit numbers, for many queries in place of f32 products.
    attention: Option<&'static attention::Functions>,
}

/// A row of the kernel table.
struct Isa {
    name: &'static str,
    needs: &'static str,
    detect: fn() -> bool,
    functions: Functions,
}

/// Every instruction set of this architecture, best first; `scalar` is last and always there.
const TABLE: &[&Isa] = &[
    #[cfg(target_arch = "x86_64")]
    &x86::amx::ISA,
    #[cfg(target_arch = "x86_64")]
    &x86::avx512vnni::ISA,
    #[cfg(target_arch = "x86_64")]
    &x86::avxvnni::ISA,
    #[cfg(target_arch = "x86_64")]
    &x86::avx2::ISA,
    #[cfg(all(test, target_arch = "x86_64"))]
    &x86::avxvnni::evex::ISA,
    #[cfg(target_arch = "aarch64")]
    &arm::i8mm::ISA,
    #[cfg(target_arch = "aarch64")]
    &arm::dotprod::ISA,
    #[cfg(target_arch = "aarch64")]
    &arm::neon::ISA,
    &scalar::ISA,
];

/// Why a kernel cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum KernelError {
    #[error("no kernel is called {name:?}; this build has {known}")]
    Unknown { name: String, known: String },
    #[error("this CPU has no {needs}, which kernel {name:?} needs; it can run {available}")]
    Unsupported { name: &'static str, needs: &'static str, available: String },
}

/// A set of kernels that this CPU can run.
#[derive(Clone, Copy)]
pub struct Kernels {
    isa: &'static Isa, // private: only made after `detect`
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kernels({})", self.isa.name)
    }
}

impl Kernels {
    /// The kernels called `name`, or else named by `SKIFF_KERNEL`, or else the best for this CPU.
    pub fn select(name: Option<&str>) -> Result<Self, KernelError> {
        let from_env = std::env::var("SKIFF_KERNEL").ok().filter(|v| !v.is_empty());
        let Some(name) = name.or(from_env.as_deref()) else {
            return Ok(Self::available().next().unwrap_or(Self { isa: &scalar::ISA }));
        };
        let Some(&isa) = TABLE.iter().find(|isa| isa.name == name) else {
            let known = TABLE.iter().map(|isa| isa.name).collect::<Vec<_>>().join(", ");
            return Err(KernelError::Unknown { name: name.into(), known });
        };
        if !(isa.detect)() {
            let available = Self::available().map(|k| k.name()).collect::<Vec<_>>().join(", ");
            return Err(KernelError::Unsupported { name: isa.name, needs: isa.needs, available });
        }
        Ok(Self { isa })
    }

    /// Those that this CPU can run, best first.
    pub fn available() -> impl Iterator<Item = Self> {
        TABLE.iter().filter(|isa| (isa.detect)()).map(|&isa| Self { isa })
    }

    /// Every kernel of this build: name, what it needs, whether this CPU can run it.
    pub fn list() -> impl Iterator<Item = (&'static str, &'static str, bool)> {
        TABLE.iter().map(|isa| (isa.name, isa.needs, (isa.detect)()))
    }

    /// The name, as `--kernel` and `SKIFF_KERNEL` take it.
    pub fn name(&self) -> &'static str {
        self.isa.name
    }

    /// Quantises `x` into row `row` of `acts`.
    pub fn quantize(&self, x: &[f32], row: activations::Q8RowMut<'_>) {
        let stride = row.q.len();
        assert!(stride >= x.len() && x.len().is_multiple_of(32) && stride.is_multiple_of(256));
        assert!(row.scale.len() == stride / 32 && row.sum.len() == stride / 16);
        let (q, q_pad) = row.q.split_at_mut(x.len());
        let (scale, scale_pad) = row.scale.split_at_mut(x.len() / 32);
        let (sum, sum_pad) = row.sum.split_at_mut(x.len() / 16);
        q_pad.fill(0);
        scale_pad.fill(0.0);
        sum_pad.fill(0);
        // SAFETY: the handle proves the ISA; the lengths agree by the split.
        unsafe { (self.isa.functions.quantize)(x, q, scale, sum) }
    }

    /// `out[r] = weights[r] . x` for the `out.len()` quantised rows in `weights`.
    ///
    /// `weights` holds whole rows of type `ty` with as many columns as `x` has.
    pub fn dot(&self, ty: GgmlType, weights: &[u8], x: Q8Row<'_>, out: &mut [f32]) {
        let row_bytes = ty.row_bytes(x.cols);
        assert!(quant::is_quantised(ty) && x.cols.is_multiple_of(ty.block_len()));
        assert_eq!(weights.len(), out.len() * row_bytes);
        assert!(x.q.len().is_multiple_of(256) && x.q.len() >= x.cols);
        assert!(x.scale.len() == x.q.len() / 32 && x.sum.len() == x.q.len() / 16);
        if out.is_empty() || x.cols == 0 {
            return out.fill(0.0);
        }
        // SAFETY: the handle proves the ISA; the lengths were just asserted.
        unsafe { (self.isa.functions.dot)(ty, weights, row_bytes, x, out) }
    }

    /// `out[i] = weights[rows[i]] . x`, each bit-identical to the one of [`dot`](Self::dot): only the rows that `rows` names
    /// are read. They should rise, as the file has them.
    ///
    /// # Panics
    /// As `dot`, or if a row is not there.
    pub fn dot_listed(&self, ty: GgmlType, weights: &[u8], rows: &[u32], x: Q8Row<'_>, out: &mut [f32]) {
        let row_bytes = ty.row_bytes(x.cols);
        assert!(quant::is_quantised(ty) && x.cols.is_multiple_of(ty.block_len()));
        assert!(x.q.len().is_multiple_of(256) && x.q.len() >= x.cols);
        assert!(x.scale.len() == x.q.len() / 32 && x.sum.len() == x.q.len() / 16);
        assert_eq!(rows.len(), out.len());
        if out.is_empty() || x.cols == 0 {
            return out.fill(0.0);
        }
        let last = rows.iter().fold(0, |last, &row| row.max(last)) as usize;
        assert!((last + 1) * row_bytes <= weights.len());
        // SAFETY: the handle proves the ISA; the lengths and the rows' numbers were just asserted.
        unsafe { (self.isa.functions.dot_listed)(ty, Listed { weights, row_bytes, list: rows }, x, out) }
    }

    /// `out[t * n + r] = weights[r] . x[t]` for `n` quantised rows: a few tokens share each weight
    /// that is read. Each product is bit-identical to the one of [`dot`](Self::dot).
    pub fn dot_tokens(&self, ty: GgmlType, weights: &[u8], x: &Activations, out: &mut [f32]) {
        let row_bytes = ty.row_bytes(x.cols());
        assert!(quant::is_quantised(ty) && x.cols().is_multiple_of(ty.block_len()));
        if x.rows() == 0 || x.cols() == 0 {
            return out.fill(0.0);
        }
        let n = weights.len() / row_bytes;
        assert!(weights.len() == n * row_bytes && out.len() == n * x.rows());
        match self.isa.functions.dot_tokens {
            // SAFETY: the handle proves the ISA; the lengths were just asserted, and rows of
            // activations are padded.
            Some(dot_tokens) if n > 0 => unsafe { dot_tokens(ty, weights, row_bytes, x, out) },
            _ => {
                for (t, out) in out.chunks_exact_mut(n.max(1)).enumerate() {
                    self.dot(ty, weights, x.row(t), out);
                }
            }
        }
    }

    /// From how many tokens on a product by [`unpack`](Self::unpack) and [`gemm`](Self::gemm) is faster than one by
    /// [`dot_tokens`](Self::dot_tokens).
    pub fn panels_from(&self) -> usize {
        self.isa.functions.panels_from
    }

    /// Unpacks columns `cols` of up to [`PANEL_ROWS`] rows into `panel`, [coarsely](quant::coarsen) if that is asked for;
    /// missing rows count as 0.
    ///
    /// `weights` holds whole rows of `row_bytes`; `cols` begins and ends at a block boundary.
    pub fn unpack(
        &self,
        ty: GgmlType,
        (weights, row_bytes): (&[u8], usize),
        cols: Range<usize>,
        coarse: bool,
        panel: &mut Panel,
    ) {
        let rows = panel_rows(ty, weights, row_bytes, &cols);
        panel.reshape(ty, cols.len(), coarse);
        let bytes = PanelBytes::new(ty, &cols, row_bytes);
        let (n, groups) = (cols.len(), panel.groups());
        bytes.fetch_first(weights.chunks_exact(row_bytes));
        let stride = groups.next_multiple_of(8);
        let plain = &mut panel.plain[..PANEL_ROWS * n];
        let scale = &mut panel.plain_scale[..PANEL_ROWS * stride];
        let min = &mut panel.plain_min[..PANEL_ROWS * stride];
        plain[rows * n..].fill(0);
        scale[rows * stride..].fill(0.0);
        min[rows * stride..].fill(0.0);
        for (r, row) in weights.chunks_exact(row_bytes).enumerate() {
            let q = &mut plain[r * n..][..n];
            let (scale, min) = (&mut scale[r * stride..][..groups], &mut min[r * stride..][..groups]);
            // SAFETY: the handle proves the ISA; `q` has a byte and the scales an element for each
            // weight and group of the blocks.
            unsafe { (self.isa.functions.unpack)(ty, &row[bytes.now.clone()], q, scale, min) };
            if coarse {
                quant::coarsen(ty, q, scale, min);
            }
            bytes.fetch_next(row);
        }
        self.interleave(plain, n, &mut panel.q.0);
        // A scale has four bytes: as many as the columns that are a lane.
        self.interleave(bytemuck::cast_slice(scale), 4 * stride, bytemuck::cast_slice_mut(&mut panel.scale));
        if panel.has_min {
            self.interleave(bytemuck::cast_slice(min), 4 * stride, bytemuck::cast_slice_mut(&mut panel.min));
        }
    }

    /// `[row][col]` to `[col / 4][row][col % 4]`, of [`PANEL_ROWS`] rows.
    fn interleave(&self, plain: &[u8], cols: usize, to: &mut [u8]) {
        assert!(plain.len() == PANEL_ROWS * cols && cols.is_multiple_of(32));
        // SAFETY: the handle proves the ISA; both hold `PANEL_ROWS * cols` bytes, `cols` a multiple of 32.
        unsafe { (self.isa.functions.interleave)(plain, cols, &mut to[..PANEL_ROWS * cols]) }
    }

    /// `acc[t][r] += panel[r] . x[t]` for every row `t` of `x` and the 32 rows `r` of the panel.
    ///
    /// `x` begins at the panel's first column and has at least as many columns.
    pub fn gemm(&self, panel: &Panel, x: Q8Rows<'_>, acc: &mut [f32]) {
        assert_eq!(acc.len(), x.rows * PANEL_ROWS);
        if x.rows == 0 || panel.cols == 0 {
            return;
        }
        assert!((x.rows - 1) * x.stride + panel.cols <= x.q.len());
        assert!((x.rows - 1) * (x.stride / 32) + panel.cols.div_ceil(32) <= x.scale.len());
        assert!((x.rows - 1) * (x.stride / 16) + panel.cols.div_ceil(16) <= x.sum.len());
        assert!(panel.cols.is_multiple_of(32) && panel.cols <= PANEL_COLS);
        // SAFETY: the handle proves the ISA; the lengths were just asserted, and those of a panel
        // are set by `Panel::reshape`.
        unsafe { (self.isa.functions.gemm)(panel, x, acc) }
    }
}

/// How many rows are to be unpacked.
///
/// # Panics
/// If `weights` are not whole rows, up to [`PANEL_ROWS`], or `cols` are not whole blocks of theirs, up to [`PANEL_COLS`].
fn panel_rows(ty: GgmlType, weights: &[u8], row_bytes: usize, cols: &Range<usize>) -> usize {
    let (block, rows) = (ty.block_len(), weights.len() / row_bytes);
    assert!(quant::is_quantised(ty) && rows <= PANEL_ROWS && weights.len() == rows * row_bytes);
    assert!(cols.start.is_multiple_of(block) && cols.end.is_multiple_of(block));
    assert!(cols.len() <= PANEL_COLS && ty.row_bytes(cols.end) <= row_bytes);
    rows
}

/// The greatest `q` of a quantised type: what 16-bit sums can hold depends on it.
const fn max_q(ty: GgmlType) -> u8 {
    use GgmlType::*;
    match ty {
        Q2_K => 3,
        Q3_K => 7,
        Q4_0 | Q4_1 | Q4_K => 15,
        Q5_0 | Q5_1 | Q5_K => 31,
        Q6_K => 63,
        Q8_0 | IQ4_NL | IQ4_XS | F32 | F16 | BF16 => 255,
    }
}

/// Bytes aligned to a cache line.
#[repr(C, align(64))]
struct Line([u8; PANEL_ROWS * PANEL_COLS]);

/// 32 weight rows unpacked to bytes, for [`Kernels::gemm`].
pub struct Panel {
    cols: usize,
    group_len: usize,
    zero: u8,
    /// No byte is greater.
    max: u8,
    has_min: bool,
    /// Row-major, `[row][col]` and `[row][group]`, rows of groups padded: what `unpack` writes.
    plain: Box<[u8]>,
    plain_scale: Box<[f32]>,
    plain_min: Box<[f32]>,
    /// `[col / 4][row][col % 4]`: four columns of a row are a lane of the byte dot product.
    q: Box<Line>,
    /// `[group][row]`
    scale: Box<[f32]>,
    /// `[group][row]`; of a type that has minima, or coarse codes.
    min: Box<[f32]>,
}

impl Default for Panel {
    fn default() -> Self {
        Self {
            cols: 0,
            group_len: 32,
            zero: 0,
            max: 0,
            has_min: false,
            plain: vec![0; PANEL_ROWS * PANEL_COLS].into(),
            plain_scale: vec![0.0; PANEL_ROWS * PANEL_COLS / 16].into(),
            plain_min: vec![0.0; PANEL_ROWS * PANEL_COLS / 16].into(),
            q: Box::new(Line([0; PANEL_ROWS * PANEL_COLS])),
            scale: vec![0.0; PANEL_ROWS * PANEL_COLS / 16].into(),
            min: vec![0.0; PANEL_ROWS * PANEL_COLS / 16].into(),
        }
    }
}

impl Panel {
    fn reshape(&mut self, ty: GgmlType, cols: usize, coarse: bool) {
        self.cols = cols;
        self.group_len = quant::group_len(ty);
        let coarse = coarse && quant::coarse_step(ty).is_some();
        self.zero = if coarse { 0 } else { quant::zero_point(ty) };
        self.max = max_q(ty);
        self.has_min = quant::has_min(ty) || coarse;
    }

    fn groups(&self) -> usize {
        self.cols / self.group_len
    }
}
