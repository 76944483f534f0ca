//! The key/value cache of a sequence, in tiles of positions:
//!
//! ```text
//! cache = tile[context / TILE]    the last one may be shorter
//! tile = layer[layers]
//! layer = keys, values            each [kv_head][position][head_dim]
//! ```
//!
//! A tile is what attention goes through at a time. It is outermost so that memory is taken from the system as the context
//! fills: with heads or layers outermost, the first token would touch a huge page of each.

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{Config, ModelError};
use crate::gguf::GgmlType;
use crate::kernels::Kernels;
use crate::memory::Pages;
use crate::ops::attention::{CacheTile, Stored, TILE};
use crate::quant;
use crate::weights::{interleave, locked};

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// Single precision, as computed: to compare with other programs, at twice the memory of f16.
    F32,
    /// Half precision.
    #[default]
    F16,
    /// 8 bits in blocks of 32 with a half-precision scale: 53 % of the memory of f16.
    Q8_0,
}

/// Keys and values of every layer, for up to `context` positions.
pub struct KvCache {
    context: usize,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    data: Data,
    prefix: Option<Prefix>,
}

/// Positions from the first on that a cache has in common with others, in the memory of one.
struct Prefix {
    cache: Arc<KvCache>,
    /// Whole tiles of attention, each of which is then in one place.
    positions: usize,
}

/// The keys or the values of a layer.
#[derive(Clone, Copy)]
enum Side {
    Keys = 0,
    Values = 1,
}

/// The keys or values of a layer, wherever they are.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    cache: &'a KvCache,
    layer: usize,
    side: Side,
}

impl KvType {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// Bytes of a head of `head_dim` numbers.
    fn head_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => 4 * head_dim,
            Self::F16 => 2 * head_dim,
            Self::Q8_0 => GgmlType::Q8_0.row_bytes(head_dim),
        }
    }
}

enum Data {
    F32(Pages<f32>),
    F16(Pages<u16>),
    Q8(Pages<u8>),
}

impl KvCache {
    /// An empty cache. Memory is taken from the system as positions are written, [`TILE`] of them at a time.
    pub fn new(config: &Config, context: usize, kind: KvType) -> Self {
        // q8_0 needs whole blocks in a head.
        let whole = kind != KvType::Q8_0 || config.head_dim.is_multiple_of(32);
        let kind = if whole { kind } else { KvType::F16 };
        let numbers = 2 * config.layers * config.kv_heads * context * config.head_dim;
        let mut data = match kind {
            KvType::F32 => Data::F32(Pages::zeroed(numbers)),
            KvType::F16 => Data::F16(Pages::zeroed(numbers)),
            KvType::Q8_0 => Data::Q8(Pages::zeroed(GgmlType::Q8_0.row_bytes(numbers))),
        };
        match &mut data {
            Data::F32(pages) => interleave(bytemuck::cast_slice_mut(pages)),
            Data::F16(pages) => interleave(bytemuck::cast_slice_mut(pages)),
            Data::Q8(pages) => interleave(pages),
        }
        let (layers, kv_heads, head_dim) = (config.layers, config.kv_heads, config.head_dim);
        Self { context, layers, kv_heads, head_dim, data, prefix: None }
    }

    /// Positions that fit.
    pub fn context(&self) -> usize {
        self.context
    }

    /// How keys and values are stored.
    pub fn kind(&self) -> KvType {
        match self.data {
            Data::F32(_) => KvType::F32,
            Data::F16(_) => KvType::F16,
            Data::Q8(_) => KvType::Q8_0,
        }
    }

    /// Bytes when full.
    pub fn bytes(&self) -> usize {
        2 * self.layers * self.kv_heads * self.context * self.kind().head_bytes(self.head_dim)
    }

    /// What [`bytes`](Self::bytes) of such a cache would be; `None` if more than 64 bits tell.
    pub fn bytes_needed(config: &Config, context: usize, kind: KvType) -> Option<u64> {
        let factors = [2, config.layers, config.kv_heads, context, kind.head_bytes(config.head_dim)];
        factors.iter().try_fold(1u64, |product, &n| product.checked_mul(n as u64))
    }

    /// Keeps the cache in memory (`--mlock`).
    pub fn lock(&mut self) -> Result<(), ModelError> {
        let bytes = self.bytes();
        let outcome = match &mut self.data {
            Data::F32(pages) => pages.lock(),
            Data::F16(pages) => pages.lock(),
            Data::Q8(pages) => pages.lock(),
        };
        Ok(locked("the key/value cache", bytes, outcome)?)
    }

    /// The keys of `layer` at `position`, heads concatenated, `[kv_heads * head_dim]`, rotated as attention uses them.
    pub fn keys(&self, kernels: Kernels, layer: usize, position: usize) -> Vec<f32> {
        let mut keys = vec![0.0; self.kv_heads * self.head_dim];
        let (view, _) = self.layer(layer);
        for (head, out) in keys.chunks_exact_mut(self.head_dim).enumerate() {
            view.widen(kernels, head, position..position + 1, out);
        }
        keys
    }

    /// Stores the keys and values of `layer` at `position`, heads concatenated.
    pub(super) fn write(&mut self, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        self.write_side((layer, Side::Keys), position, keys);
        self.write_side((layer, Side::Values), position, values);
    }

    /// Moves `layer`'s position `from` to `to`, with other keys.
    pub(super) fn move_position(&mut self, layer: usize, from: usize, to: usize, keys: &[f32]) {
        self.write_side((layer, Side::Keys), to, keys);
        for head in 0..self.kv_heads {
            let row = |position| self.rows((layer, Side::Values), head, position..position + 1);
            let (from, to) = (row(from), row(to).start);
            let dim = self.head_dim;
            match &mut self.data {
                Data::F32(numbers) => move_row(numbers, dim, from, to),
                Data::F16(bits) => move_row(bits, dim, from, to),
                Data::Q8(bytes) => move_row(bytes, GgmlType::Q8_0.row_bytes(dim), from, to),
            }
        }
    }

    /// Takes over the first `positions` of `other`, all that it then has.
    ///
    /// # Panics
    /// If they do not fit, or the two differ in more than their context.
    pub(super) fn copy_prefix(&mut self, other: &Self, positions: usize) {
        self.prefix = None;
        self.copy(other, 0..positions);
    }

    /// [`copy_prefix`](Self::copy_prefix), but most of it stays where it is.
    pub(super) fn share_prefix(&mut self, other: &Arc<Self>, positions: usize) {
        let shared = match other.prefix {
            None => positions / TILE * TILE,
            Some(_) => 0, // a chain of caches would make every access longer
        };
        self.prefix = None;
        self.copy(other, shared..positions);
        self.prefix = (shared > 0).then(|| Prefix { cache: other.clone(), positions: shared });
    }

    /// Only the first `positions` are needed from now on, and what follows them will be written.
    pub(super) fn truncate(&mut self, positions: usize) {
        let Some(Prefix { cache, positions: shared }) = self.prefix.take() else { return };
        let still = shared.min(positions / TILE * TILE);
        self.copy(&cache, still..positions.min(shared));
        self.prefix = (still > 0).then_some(Prefix { cache, positions: still });
    }

    /// Takes the first `positions` into memory of its own.
    pub(super) fn own(&mut self, positions: usize) {
        if let Some(Prefix { cache, positions: shared }) = self.prefix.take() {
            self.copy(&cache, 0..positions.min(shared));
        }
    }

    /// Copies positions of another cache, wherever it has them.
    fn copy(&mut self, other: &Self, positions: Range<usize>) {
        let shape = |c: &Self| (c.kind(), c.kv_heads, c.head_dim, c.layers);
        assert!(shape(self) == shape(other) && positions.end <= self.context.min(other.context));
        let shared = other.prefix.as_ref().map_or(0, |p| p.positions.min(positions.end));
        if let Some(prefix) = &other.prefix
            && positions.start < shared
        {
            self.copy(&prefix.cache, positions.start..shared);
        }
        let own = positions.start.max(shared)..positions.end;
        for tile in tiles(own) {
            for layer in 0..self.layers {
                for side in [Side::Keys, Side::Values] {
                    self.copy_own((layer, side), other, tile.clone());
                }
            }
        }
    }

    /// Copies positions of a tile that `other` has in memory of its own.
    fn copy_own(&mut self, of: (usize, Side), other: &Self, positions: Range<usize>) {
        let dim = self.head_dim;
        for head in 0..self.kv_heads {
            let (to, from) =
                (self.rows(of, head, positions.clone()), other.rows(of, head, positions.clone()));
            match (&mut self.data, &other.data) {
                (Data::F32(a), Data::F32(b)) => copy_rows(a, b, dim, to, from),
                (Data::F16(a), Data::F16(b)) => copy_rows(a, b, dim, to, from),
                (Data::Q8(a), Data::Q8(b)) => copy_rows(a, b, GgmlType::Q8_0.row_bytes(dim), to, from),
                _ => unreachable!("the kinds were compared"),
            }
        }
    }

    /// Keys and values of a layer.
    pub(super) fn layer(&self, layer: usize) -> (View<'_>, View<'_>) {
        (View { cache: self, layer, side: Side::Keys }, View { cache: self, layer, side: Side::Values })
    }

    /// Where positions of a tile lie, counted in rows of `head_dim` numbers.
    fn rows(&self, (layer, side): (usize, Side), head: usize, positions: Range<usize>) -> Range<usize> {
        let first = positions.start / TILE * TILE;
        let tile = TILE.min(self.context.saturating_sub(first));
        assert!(
            positions.start <= positions.end && positions.end <= first + tile,
            "{positions:?} of one tile"
        );
        let before = 2 * self.layers * self.kv_heads * first;
        let run = before + ((2 * layer + side as usize) * self.kv_heads + head) * tile;
        run + positions.start - first..run + positions.end - first
    }

    fn write_side(&mut self, of: (usize, Side), position: usize, heads: &[f32]) {
        let dim = self.head_dim;
        for (head, values) in heads.chunks_exact(dim).enumerate() {
            let row = self.rows(of, head, position..position + 1).start;
            match &mut self.data {
                Data::F32(numbers) => numbers[row * dim..][..dim].copy_from_slice(values),
                Data::F16(bits) => {
                    let bits = bits[row * dim..][..dim].chunks_mut(256);
                    let mut halves = [f16::ZERO; 256];
                    for (bits, values) in bits.zip(values.chunks(256)) {
                        let halves = &mut halves[..values.len()];
                        halves.convert_from_f32_slice(values);
                        bits.iter_mut().zip(halves).for_each(|(b, h)| *b = h.to_bits());
                    }
                }
                Data::Q8(bytes) => {
                    let n = GgmlType::Q8_0.row_bytes(dim);
                    quant::quantize_row(GgmlType::Q8_0, values, &mut bytes[row * n..][..n]);
                }
            }
        }
    }
}

/// The parts of `positions` that lie in a tile each.
fn tiles(positions: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let first = positions.start / TILE * TILE;
    (first..positions.end)
        .step_by(TILE)
        .map(move |tile| tile.max(positions.start)..(tile + TILE).min(positions.end))
}

/// Copies row `from` of `n` elements to row `to`.
fn move_row<T: Copy>(data: &mut [T], n: usize, from: Range<usize>, to: usize) {
    data.copy_within(from.start * n..from.end * n, to * n);
}

/// Copies rows of `n` elements.
fn copy_rows<T: Copy>(a: &mut [T], b: &[T], n: usize, to: Range<usize>, from: Range<usize>) {
    a[to.start * n..to.end * n].copy_from_slice(&b[from.start * n..from.end * n]);
}

impl View<'_> {
    /// The cache that has these positions, and in which rows.
    fn rows(&self, head: usize, positions: Range<usize>) -> (&KvCache, Range<usize>) {
        let cache = match &self.cache.prefix {
            Some(prefix) if positions.end <= prefix.positions => &prefix.cache,
            _ => self.cache,
        };
        (cache, cache.rows((self.layer, self.side), head, positions))
    }
}

impl CacheTile for View<'_> {
    fn stored(&self, head: usize, positions: Range<usize>) -> Stored<'_> {
        let (cache, rows) = self.rows(head, positions);
        let numbers = rows.start * cache.head_dim..rows.end * cache.head_dim;
        match &cache.data {
            Data::F32(all) => Stored::F32(&all[numbers]),
            Data::F16(bits) => Stored::F16(&bits[numbers]),
            Data::Q8(_) => Stored::Packed,
        }
    }

    fn widen(&self, kernels: Kernels, head: usize, positions: Range<usize>, out: &mut [f32]) {
        let (cache, rows) = self.rows(head, positions);
        let numbers = rows.start * cache.head_dim..rows.end * cache.head_dim;
        match &cache.data {
            Data::F32(all) => out.copy_from_slice(&all[numbers]),
            Data::F16(bits) => kernels.widen(&bits[numbers], out),
            Data::Q8(bytes) => {
                let n = GgmlType::Q8_0.row_bytes(cache.head_dim);
                quant::dequantize_row(GgmlType::Q8_0, &bytes[rows.start * n..rows.end * n], out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(context: usize) -> KvCache {
        let (layers, kv_heads, head_dim) = (3, 2, 4);
        let data = Data::F16(Pages::zeroed(2 * layers * kv_heads * context * head_dim));
        KvCache { context, layers, kv_heads, head_dim, data, prefix: None }
    }

    /// Every position of every head has a row of its own, and those of a tile lie together.
    #[test]
    fn tiles_lie_one_behind_the_other() {
        let cache = cache(2 * TILE + 5);
        let mut taken = vec![false; 2 * 3 * 2 * cache.context];
        for position in 0..cache.context {
            for (layer, head) in (0..3).flat_map(|layer| (0..2).map(move |head| (layer, head))) {
                for side in [Side::Keys, Side::Values] {
                    let rows = cache.rows((layer, side), head, position..position + 1);
                    assert!(rows.len() == 1 && !std::mem::replace(&mut taken[rows.start], true));
                    assert_eq!(rows.start / (2 * 3 * 2 * TILE), position / TILE);
                }
            }
        }
        assert!(taken.into_iter().all(|taken| taken));
    }

    fn value(layer: usize, position: usize, i: usize) -> f32 {
        (layer * 1000 + position + 300 * i) as f32
    }

    fn filled(context: usize, positions: usize) -> KvCache {
        let mut cache = cache(context);
        for (layer, position) in (0..3).flat_map(|layer| (0..positions).map(move |p| (layer, p))) {
            let keys: Vec<f32> = (0..8).map(|i| value(layer, position, i)).collect();
            let values: Vec<f32> = keys.iter().map(|key| -key).collect();
            cache.write(layer, position, &keys, &values);
        }
        cache
    }

    /// The positions hold what [`filled`] wrote at `origin(position)`.
    fn check(cache: &KvCache, positions: Range<usize>, origin: impl Fn(usize) -> usize) {
        let kernels = Kernels::select(Some("scalar")).unwrap();
        let mut found = [0.0; 4];
        for (layer, position) in (0..3).flat_map(|layer| positions.clone().map(move |p| (layer, p))) {
            let (keys, values) = cache.layer(layer);
            for (head, (view, sign)) in
                [(0, (keys, 1.0)), (1, (keys, 1.0)), (0, (values, -1.0)), (1, (values, -1.0))]
            {
                view.widen(kernels, head, position..position + 1, &mut found);
                let want = [0, 1, 2, 3]
                    .map(|i| sign * f16::from_f32(value(layer, origin(position), 4 * head + i)).to_f32());
                assert_eq!(found, want, "layer {layer}, position {position}, head {head}");
            }
        }
    }

    #[test]
    fn positions_move_and_are_copied_or_shared_across_tiles() {
        let n = 2 * TILE + 9;
        let from = filled(n + 3, n);
        check(&from, 0..n, |p| p);

        let mut moved = filled(n, n);
        for (layer, position) in (0..3).flat_map(|layer| (TILE..n).map(move |p| (layer, p))) {
            let keys = moved.keys(Kernels::select(Some("scalar")).unwrap(), layer, position);
            moved.move_position(layer, position, position - 7, &keys);
        }
        check(&moved, 0..TILE - 7, |p| p);
        check(&moved, TILE - 7..n - 7, |p| p + 7);

        // Caches of other lengths, whose last tiles are laid out otherwise.
        let mut copy = cache(n + TILE);
        copy.copy_prefix(&from, n);
        check(&copy, 0..n, |p| p);
        let shared = Arc::new(from);
        for positions in [TILE - 1, TILE, n - 1] {
            let mut other = cache(n + 1);
            other.share_prefix(&shared, positions);
            check(&other, 0..positions, |p| p);
            let mut third = cache(n);
            third.copy_prefix(&other, positions);
            check(&third, 0..positions, |p| p);
            other.truncate(positions - 3);
            check(&other, 0..positions - 3, |p| p);
            other.own(positions - 3);
            assert!(other.prefix.is_none());
            check(&other, 0..positions - 3, |p| p);
        }
    }
}
