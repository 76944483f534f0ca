//! The tensor element types of GGUF and the size of their blocks.

/// Element type of a tensor, with the id that GGUF files carry (ggml's `ggml_type`).
///
/// A row of a tensor is a whole number of blocks of [`block_len`](Self::block_len) elements, each
/// stored in [`block_bytes`](Self::block_bytes) bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, non_camel_case_types, clippy::upper_case_acronyms)]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
}

/// (type, ggml id, name, elements per block, bytes per block), one row per type.
const TABLE: [(GgmlType, u32, &str, usize, usize); 15] = {
    use GgmlType::*;
    [
        (F32, 0, "F32", 1, 4),
        (F16, 1, "F16", 1, 2),
        (BF16, 30, "BF16", 1, 2),
        (Q8_0, 8, "Q8_0", 32, 34),
        (Q4_0, 2, "Q4_0", 32, 18),
        (Q4_1, 3, "Q4_1", 32, 20),
        (Q5_0, 6, "Q5_0", 32, 22),
        (Q5_1, 7, "Q5_1", 32, 24),
        (Q2_K, 10, "Q2_K", 256, 84),
        (Q3_K, 11, "Q3_K", 256, 110),
        (Q4_K, 12, "Q4_K", 256, 144),
        (Q5_K, 13, "Q5_K", 256, 176),
        (Q6_K, 14, "Q6_K", 256, 210),
        (IQ4_NL, 20, "IQ4_NL", 32, 18),
        (IQ4_XS, 23, "IQ4_XS", 256, 136),
    ]
};

impl GgmlType {
    /// Every supported type.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    /// The type with this ggml id, if it is a supported one.
    pub fn from_id(id: u32) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == id).map(|row| row.0)
    }

    /// The type with this name (`Q4_0`, case-insensitive).
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.2.eq_ignore_ascii_case(name)).map(|row| row.0)
    }

    fn row(self) -> &'static (GgmlType, u32, &'static str, usize, usize) {
        &TABLE[self as usize] // rows stand in the order of the enum: checked by a test
    }

    /// The id in a GGUF file.
    pub fn id(self) -> u32 {
        self.row().1
    }

    /// The name, as llama.cpp prints it.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Elements per block.
    pub const fn block_len(self) -> usize {
        TABLE[self as usize].3
    }

    /// Bytes per block.
    pub const fn block_bytes(self) -> usize {
        TABLE[self as usize].4
    }

    /// Bytes of a row of `n` elements; `n` is a multiple of the block length.
    pub fn row_bytes(self, n: usize) -> usize {
        debug_assert_eq!(n % self.block_len(), 0);
        n / self.block_len() * self.block_bytes()
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_stands_in_enum_order_and_ids_round_trip() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i);
            assert_eq!(GgmlType::from_id(row.1), Some(row.0));
            assert_eq!(GgmlType::from_name(row.2), Some(row.0));
        }
        assert_eq!(GgmlType::from_id(9999), None);
    }
}
