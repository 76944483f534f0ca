//! The tensor table: what a tensor is, how many bytes it takes, and where they may lie.

use super::{Error, GgmlType};

const MAX_DIMENSIONS: usize = 4;

/// A tensor of a file. Its data are the bytes `offset .. offset + n_bytes` of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The unique name.
    pub name: String,
    /// The element type.
    pub ty: GgmlType,
    /// Elements per dimension, the contiguous one (`ne[0]`) first.
    pub shape: Vec<u64>,
    /// Where the data start, from the start of the file.
    pub offset: u64,
    /// Bytes of data, without padding.
    pub n_bytes: u64,
}

impl TensorInfo {
    /// The number of elements.
    pub fn n_elements(&self) -> u64 {
        self.shape.iter().product() // `byte_len` has checked this product
    }
}

/// The bytes that a tensor of this shape takes, or why there can be no such tensor.
pub(super) fn byte_len(name: &str, ty: GgmlType, shape: &[u64]) -> Result<u64, Error> {
    check_dimensions(name, shape.len().try_into().unwrap_or(u32::MAX))?;
    if let Some(dimension) = shape.iter().position(|&ne| ne == 0) {
        return Err(Error::ZeroDimension { tensor: name.to_owned(), dimension });
    }
    let row = shape.first().copied().unwrap_or_default();
    if row % ty.block_len() as u64 != 0 {
        return Err(Error::PartialBlock { tensor: name.to_owned(), ty, row });
    }
    let elements = shape.iter().try_fold(1u64, |product, &ne| product.checked_mul(ne));
    elements
        .and_then(|n| (n / ty.block_len() as u64).checked_mul(ty.block_bytes() as u64))
        .ok_or_else(|| Error::SizeOverflow { tensor: name.to_owned(), shape: shape.to_vec() })
}

/// Whether a tensor may have this many dimensions.
pub(super) fn check_dimensions(name: &str, found: u32) -> Result<(), Error> {
    if (1..=MAX_DIMENSIONS as u32).contains(&found) {
        return Ok(());
    }
    Err(Error::InvalidDimensions { tensor: name.to_owned(), found })
}

/// Turns offsets within the data section into offsets within the file, once they are known to be
/// aligned, inside the file and disjoint.
pub(super) fn place(
    tensors: &mut [TensorInfo],
    data_start: u64,
    alignment: u64,
    file_len: u64,
) -> Result<(), Error> {
    for t in tensors.iter_mut() {
        if t.offset % alignment != 0 {
            return Err(Error::MisalignedTensor { tensor: t.name.clone(), offset: t.offset, alignment });
        }
        let start = data_start.checked_add(t.offset);
        let end = start.and_then(|start| start.checked_add(t.n_bytes));
        t.offset = match (start, end) {
            (Some(start), Some(end)) if end <= file_len => start,
            _ => return Err(outside(t, data_start, file_len)),
        };
    }
    check_disjoint(tensors)
}

fn outside(t: &TensorInfo, data_start: u64, file_len: u64) -> Error {
    let (tensor, offset, n_bytes) = (t.name.clone(), t.offset, t.n_bytes);
    Error::TensorOutsideFile { tensor, offset, n_bytes, data_start, file_len }
}

/// Offsets are file offsets here, and the ends are known not to overflow.
fn check_disjoint(tensors: &[TensorInfo]) -> Result<(), Error> {
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().collect();
    by_offset.sort_by_key(|t| t.offset);
    match by_offset.windows(2).find(|pair| pair[0].offset + pair[0].n_bytes > pair[1].offset) {
        Some(pair) => {
            Err(Error::OverlappingTensors { first: pair[0].name.clone(), second: pair[1].name.clone() })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_whole_blocks() {
        assert_eq!(byte_len("t", GgmlType::F32, &[3]), Ok(12));
        assert_eq!(byte_len("t", GgmlType::Q4_0, &[64, 3]), Ok(2 * 18 * 3));
        assert_eq!(byte_len("t", GgmlType::Q6_K, &[256, 2, 1, 5]), Ok(2100));
    }

    #[test]
    fn shapes_that_cannot_be() {
        let len = |ty, shape: &[u64]| byte_len("t", ty, shape).unwrap_err();
        let tensor = || "t".to_owned();
        assert_eq!(len(GgmlType::F32, &[]), Error::InvalidDimensions { tensor: tensor(), found: 0 });
        assert_eq!(len(GgmlType::F32, &[1; 5]), Error::InvalidDimensions { tensor: tensor(), found: 5 });
        assert_eq!(len(GgmlType::F32, &[2, 0]), Error::ZeroDimension { tensor: tensor(), dimension: 1 });
        let partial = Error::PartialBlock { tensor: tensor(), ty: GgmlType::Q8_0, row: 33 };
        assert_eq!(len(GgmlType::Q8_0, &[33]), partial);
        for shape in [vec![1 << 32, 1 << 32], vec![u64::MAX, 2, 2], vec![1 << 62]] {
            assert!(matches!(len(GgmlType::F32, &shape), Error::SizeOverflow { .. }), "{shape:?}");
        }
    }
}
