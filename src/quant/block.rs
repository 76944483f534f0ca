//! The layout of every quantised block, as ggml writes it to a file.
//!
//! All fields are byte arrays, so a struct has alignment 1 and no padding: its size is asserted against
//! the size in [`GgmlType`], and `std::mem::offset_of!(BlockQ4K, qs)` is the place of a field in
//! the raw bytes that a kernel reads. Scales named `d`, `m` and `dmin` are little-endian f16.
//!
//! "Nibbles of halves" means: of 32 weights, byte `i` of 16 has weight `i` in its low and weight
//! `i + 16` in its high nibble.

use crate::gguf::GgmlType;

/// The f32 of two little-endian f16 bytes.
#[inline]
pub fn f16_to_f32(bytes: [u8; 2]) -> f32 {
    half::f16::from_le_bytes(bytes).to_f32()
}

/// The two little-endian f16 bytes nearest to `x`.
#[inline]
pub fn f32_to_f16(x: f32) -> [u8; 2] {
    half::f16::from_f32(x).to_le_bytes()
}

macro_rules! block {
    ($(#[$doc:meta])* $name:ident = $ty:ident { $($(#[$fdoc:meta])* $field:ident: $len:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(C)]
        pub struct $name {
            $($(#[$fdoc])* pub $field: [u8; $len],)*
        }

        const _: () = assert!(size_of::<$name>() == GgmlType::$ty.block_bytes());

        impl $name {
            /// Reads a block.
            ///
            /// # Panics
            /// If `bytes` is not exactly one block long.
            #[inline]
            pub fn parse(bytes: &[u8]) -> Self {
                let bytes: &[u8; size_of::<Self>()] = bytes.try_into().expect("one block");
                Self { $($field: {
                    const AT: usize = std::mem::offset_of!($name, $field);
                    std::array::from_fn(|i| bytes[AT + i])
                },)* }
            }

            /// Writes the block.
            ///
            /// # Panics
            /// If `bytes` is not exactly one block long.
            #[inline]
            pub fn write(&self, bytes: &mut [u8]) {
                assert_eq!(bytes.len(), size_of::<Self>(), "one block");
                $(bytes[std::mem::offset_of!(Self, $field)..][..$len].copy_from_slice(&self.$field);)*
            }
        }
    };
}

block! {
    /// 32 weights of 8 bits: `d * q`.
    BlockQ8_0 = Q8_0 {
        /// Scale.
        d: 2,
        /// Weights as i8, -128 included: ggml never writes it, a file may contain it.
        qs: 32,
    }
}

block! {
    /// 32 weights of 4 bits: `d * (q - 8)`.
    BlockQ4_0 = Q4_0 {
        /// Scale.
        d: 2,
        /// Nibbles of halves.
        qs: 16,
    }
}

block! {
    /// 32 weights of 4 bits: `d * q + m`.
    BlockQ4_1 = Q4_1 {
        /// Scale.
        d: 2,
        /// Smallest weight.
        m: 2,
        /// Nibbles of halves.
        qs: 16,
    }
}

block! {
    /// 32 weights of 5 bits: `d * (q - 16)`.
    BlockQ5_0 = Q5_0 {
        /// Scale.
        d: 2,
        /// Fifth bits: bit `i` of this little-endian u32 is that of weight `i`.
        qh: 4,
        /// Nibbles of halves.
        qs: 16,
    }
}

block! {
    /// 32 weights of 5 bits: `d * q + m`.
    BlockQ5_1 = Q5_1 {
        /// Scale.
        d: 2,
        /// Smallest weight.
        m: 2,
        /// Fifth bits: bit `i` of this little-endian u32 is that of weight `i`.
        qh: 4,
        /// Nibbles of halves.
        qs: 16,
    }
}

block! {
    /// 256 weights of 2 bits in 16 groups of 16: `d * (scales[g] & 15) * q - dmin * (scales[g] >> 4)`.
    BlockQ2K = Q2_K {
        /// Scale in the low, min in the high nibble, a byte a group.
        scales: 16,
        /// Weight `128 h + 32 j + l` is bits `2 j, 2 j + 1` of byte `32 h + l` (h < 2, j < 4, l < 32).
        qs: 64,
        /// Scale of the scales.
        d: 2,
        /// Scale of the mins.
        dmin: 2,
    }
}

block! {
    /// 256 weights of 3 bits in 16 groups of 16: `d * (scale[g] - 32) * (q - 4)`.
    BlockQ3K = Q3_K {
        /// Third bits: that of weight `32 g + l` is bit `g` of byte `l` (g < 8, l < 32).
        hmask: 32,
        /// Lower two bits, as in [`BlockQ2K::qs`].
        qs: 64,
        /// 16 scales of 6 bits: lower 4 of scale `i` in byte `i % 8`, low nibble for `i < 8`;
        /// upper 2 in byte `8 + i % 4` at bit `2 (i / 4)`.
        scales: 12,
        /// Scale of the scales.
        d: 2,
    }
}

block! {
    /// 256 weights of 4 bits in 8 groups of 32: `d * scale[g] * q - dmin * min[g]`.
    BlockQ4K = Q4_K {
        /// Scale of the scales.
        d: 2,
        /// Scale of the mins.
        dmin: 2,
        /// 8 scales and 8 mins of 6 bits. Groups 0-3: lower 6 bits of byte `g` and of byte `4 + g`. Groups 4-7:
        /// lower 4 bits of the scale in the low and of the min in the high nibble of byte `4 + g`, upper 2 bits
        /// on top of bytes `g - 4` and `g`.
        scales: 12,
        /// Weight `64 c + l` is the low, `64 c + 32 + l` the high nibble of byte `32 c + l` (c < 4, l < 32).
        qs: 128,
    }
}

block! {
    /// 256 weights of 5 bits in 8 groups of 32: `d * scale[g] * q - dmin * min[g]`.
    BlockQ5K = Q5_K {
        /// Scale of the scales.
        d: 2,
        /// Scale of the mins.
        dmin: 2,
        /// As in [`BlockQ4K::scales`].
        scales: 12,
        /// Fifth bits: that of weight `32 g + l` is bit `g` of byte `l` (g < 8, l < 32).
        qh: 32,
        /// Lower four bits, as in [`BlockQ4K::qs`].
        qs: 128,
    }
}

block! {
    /// 256 weights of 6 bits in 16 groups of 16: `d * scales[g] * (q - 32)`.
    BlockQ6K = Q6_K {
        /// Lower four bits: weight `128 h + 32 j + l` is in byte `64 h + 32 (j % 2) + l`, low nibble for
        /// `j < 2` (h < 2, j < 4, l < 32).
        ql: 128,
        /// Upper two bits: bits `2 j, 2 j + 1` of byte `32 h + l`.
        qh: 64,
        /// Scales as i8.
        scales: 16,
        /// Scale of the scales.
        d: 2,
    }
}

block! {
    /// 32 weights of 4 bits that index a table: `d * kvalues[q]`.
    BlockIQ4NL = IQ4_NL {
        /// Scale.
        d: 2,
        /// Nibbles of halves.
        qs: 16,
    }
}

block! {
    /// 256 weights of 4 bits that index a table, in 8 groups of 32: `d * (scale[g] - 32) * kvalues[q]`.
    BlockIQ4XS = IQ4_XS {
        /// Scale of the scales.
        d: 2,
        /// Upper 2 bits of the 8 scales: bit `2 g` of this little-endian u16.
        scales_h: 2,
        /// Lower 4 bits: byte `g / 2`, low nibble for even `g`.
        scales_l: 4,
        /// Nibbles of halves, 16 bytes a group.
        qs: 128,
    }
}
