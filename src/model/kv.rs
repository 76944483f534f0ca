//! The key/value cache of a sequence: one layer's keys as `[kv_head][position][head_dim]`, values alike.

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
    kind: KvType,
    context: usize,
    kv_heads: usize,
    head_dim: usize,
    layers: Vec<(Store, Store)>,
    prefix: Option<Prefix>,
}

/// Positions from the first on that a cache has in common with others, in the memory of one.
struct Prefix {
    cache: Arc<KvCache>,
    /// Whole tiles of attention, each of which is then in one place.
    positions: usize,
}

/// One layer's keys or values, wherever they are.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    own: &'a Store,
    prefix: Option<&'a Store>,
    shared: usize,
}

/// One layer's keys or values.
pub(super) struct Store {
    context: usize,
    head_dim: usize,
    data: Data,
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
    /// An empty cache. Memory is taken from the system as positions are written, in huge pages: with more than a few
    /// heads that is soon all of it.
    pub fn new(config: &Config, context: usize, kind: KvType) -> Self {
        // q8_0 needs whole blocks in a head.
        let whole = kind != KvType::Q8_0 || config.head_dim.is_multiple_of(32);
        let kind = if whole { kind } else { KvType::F16 };
        let store = || Store::new(config.kv_heads, context, config.head_dim, kind);
        let layers = (0..config.layers).map(|_| (store(), store())).collect();
        Self { kind, context, kv_heads: config.kv_heads, head_dim: config.head_dim, layers, prefix: None }
    }

    /// Positions that fit.
    pub fn context(&self) -> usize {
        self.context
    }

    /// How keys and values are stored.
    pub fn kind(&self) -> KvType {
        self.kind
    }

    /// Bytes when full.
    pub fn bytes(&self) -> usize {
        2 * self.layers.len() * self.kv_heads * self.context * self.kind.head_bytes(self.head_dim)
    }

    /// What [`bytes`](Self::bytes) of such a cache would be; `None` if more than 64 bits tell.
    pub fn bytes_needed(config: &Config, context: usize, kind: KvType) -> Option<u64> {
        let factors = [2, config.layers, config.kv_heads, context, kind.head_bytes(config.head_dim)];
        factors.iter().try_fold(1u64, |product, &n| product.checked_mul(n as u64))
    }

    /// Keeps the cache in memory (`--mlock`).
    pub fn lock(&mut self) -> Result<(), ModelError> {
        let bytes = self.bytes();
        let stores = self.layers.iter_mut().flat_map(|(k, v)| [k, v]);
        let mut outcomes = stores.map(|store| match &mut store.data {
            Data::F32(pages) => pages.lock(),
            Data::F16(pages) => pages.lock(),
            Data::Q8(pages) => pages.lock(),
        });
        Ok(locked("the key/value cache", bytes, outcomes.try_for_each(|outcome| outcome))?)
    }

    /// The keys of `layer` at `position`, heads concatenated, `[kv_heads * head_dim]`, rotated as attention uses them.
    pub fn keys(&self, kernels: Kernels, layer: usize, position: usize) -> Vec<f32> {
        let mut keys = vec![0.0; self.kv_heads * self.head_dim];
        self.layer(layer).0.read(kernels, self.head_dim, position, &mut keys);
        keys
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
        let shape = |c: &Self| (c.kind, c.kv_heads, c.head_dim, c.layers.len());
        assert!(shape(self) == shape(other) && positions.end <= self.context.min(other.context));
        let shared = other.prefix.as_ref().map_or(0, |p| p.positions.min(positions.end));
        if let Some(prefix) = &other.prefix
            && positions.start < shared
        {
            self.copy(&prefix.cache, positions.start..shared);
        }
        let own = positions.start.max(shared)..positions.end;
        for (to, from) in self.layers.iter_mut().zip(&other.layers) {
            to.0.copy_from(&from.0, own.clone());
            to.1.copy_from(&from.1, own.clone());
        }
    }

    /// Keys and values of a layer.
    pub(super) fn layer(&self, layer: usize) -> (View<'_>, View<'_>) {
        let (k, v) = &self.layers[layer];
        let prefix = self.prefix.as_ref().map(|p| &p.cache.layers[layer]);
        let shared = self.prefix.as_ref().map_or(0, |p| p.positions);
        let keys = View { own: k, prefix: prefix.map(|(k, _)| k), shared };
        (keys, View { own: v, prefix: prefix.map(|(_, v)| v), shared })
    }

    /// The memory of a layer's keys and values, but for the prefix that is shared.
    pub(super) fn layer_mut(&mut self, layer: usize) -> (&mut Store, &mut Store) {
        let (k, v) = &mut self.layers[layer];
        (k, v)
    }
}

impl Store {
    fn new(kv_heads: usize, context: usize, head_dim: usize, kind: KvType) -> Self {
        let numbers = kv_heads * context * head_dim;
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
        Self { context, head_dim, data }
    }

    /// Stores `heads` (all heads of one position, concatenated).
    pub(super) fn write(&mut self, position: usize, heads: &[f32]) {
        assert!(position < self.context);
        for (h, values) in heads.chunks_exact(self.head_dim).enumerate() {
            let at = (h * self.context + position) * self.head_dim;
            match &mut self.data {
                Data::F32(numbers) => numbers[at..at + self.head_dim].copy_from_slice(values),
                Data::F16(bits) => {
                    let mut halves = [f16::ZERO; 256];
                    for (bits, values) in bits[at..at + self.head_dim].chunks_mut(256).zip(values.chunks(256))
                    {
                        let halves = &mut halves[..values.len()];
                        halves.convert_from_f32_slice(values);
                        bits.iter_mut().zip(halves).for_each(|(b, h)| *b = h.to_bits());
                    }
                }
                Data::Q8(bytes) => {
                    let n = GgmlType::Q8_0.row_bytes(self.head_dim);
                    quant::quantize_row(
                        GgmlType::Q8_0,
                        values,
                        &mut bytes[GgmlType::Q8_0.row_bytes(at)..][..n],
                    );
                }
            }
        }
    }

    /// Copies position `from` of every head to position `to`.
    pub(super) fn copy(&mut self, from: usize, to: usize) {
        assert!(from < self.context && to < self.context);
        let (context, dim) = (self.context, self.head_dim);
        match &mut self.data {
            Data::F32(numbers) => copy_within(numbers, context, dim, from, to),
            Data::F16(bits) => copy_within(bits, context, dim, from, to),
            Data::Q8(bytes) => copy_within(bytes, context, GgmlType::Q8_0.row_bytes(dim), from, to),
        }
    }

    /// Takes over some positions of every head of `other`, which stores numbers alike.
    fn copy_from(&mut self, other: &Self, positions: Range<usize>) {
        let (to, from, dim) = (self.context, other.context, self.head_dim);
        let (at, n) = (positions.start * dim, positions.len() * dim);
        match (&mut self.data, &other.data) {
            (Data::F32(a), Data::F32(b)) => copy_heads((a, to * dim), (b, from * dim), at..at + n),
            (Data::F16(a), Data::F16(b)) => copy_heads((a, to * dim), (b, from * dim), at..at + n),
            (Data::Q8(a), Data::Q8(b)) => {
                let bytes = |numbers| GgmlType::Q8_0.row_bytes(numbers);
                copy_heads((a, bytes(to * dim)), (b, bytes(from * dim)), bytes(at)..bytes(at + n));
            }
            _ => unreachable!("the kinds were compared"),
        }
    }

    /// The numbers of every head at `position`, widened into `out`.
    pub(super) fn read(&self, kernels: Kernels, position: usize, out: &mut [f32]) {
        for (h, out) in out.chunks_exact_mut(self.head_dim).enumerate() {
            self.widen(kernels, h, position..position + 1, out);
        }
    }
}

fn copy_within<T: Copy>(data: &mut [T], context: usize, dim: usize, from: usize, to: usize) {
    for head in data.chunks_exact_mut(context * dim) {
        head.copy_within(from * dim..(from + 1) * dim, to * dim);
    }
}

/// Some elements of each head of `from`, to those of `to`; heads begin every so many elements.
fn copy_heads<T: Copy>(
    (to, to_head): (&mut [T], usize),
    (from, from_head): (&[T], usize),
    part: Range<usize>,
) {
    for (to, from) in to.chunks_exact_mut(to_head).zip(from.chunks_exact(from_head)) {
        to[part.clone()].copy_from_slice(&from[part.clone()]);
    }
}

impl View<'_> {
    fn of(&self, positions: &Range<usize>) -> &Store {
        match self.prefix {
            Some(prefix) if positions.end <= self.shared => prefix,
            _ => self.own,
        }
    }

    /// The numbers of every head at `position`, widened into `out`.
    fn read(&self, kernels: Kernels, head_dim: usize, position: usize, out: &mut [f32]) {
        for (h, out) in out.chunks_exact_mut(head_dim).enumerate() {
            self.widen(kernels, h, position..position + 1, out);
        }
    }
}

impl CacheTile for View<'_> {
    fn stored(&self, head: usize, positions: Range<usize>) -> Stored<'_> {
        self.of(&positions).stored(head, positions)
    }

    fn widen(&self, kernels: Kernels, head: usize, positions: Range<usize>, out: &mut [f32]) {
        self.of(&positions).widen(kernels, head, positions, out);
    }
}

impl Store {
    /// Where the numbers of a head's positions are.
    fn range(&self, head: usize, positions: Range<usize>) -> Range<usize> {
        let first = head * self.context;
        (first + positions.start) * self.head_dim..(first + positions.end) * self.head_dim
    }
}

impl CacheTile for Store {
    fn stored(&self, head: usize, positions: Range<usize>) -> Stored<'_> {
        let range = self.range(head, positions);
        match &self.data {
            Data::F32(numbers) => Stored::F32(&numbers[range]),
            Data::F16(bits) => Stored::F16(&bits[range]),
            Data::Q8(_) => Stored::Packed,
        }
    }

    fn widen(&self, kernels: Kernels, head: usize, positions: Range<usize>, out: &mut [f32]) {
        let range = self.range(head, positions);
        match &self.data {
            Data::F32(numbers) => out.copy_from_slice(&numbers[range]),
            Data::F16(bits) => kernels.widen(&bits[range], out),
            Data::Q8(bytes) => {
                let row = |n| GgmlType::Q8_0.row_bytes(n);
                quant::dequantize_row(GgmlType::Q8_0, &bytes[row(range.start)..row(range.end)], out);
            }
        }
    }
}
