//! tokenizer.model: SentencePiece's `ModelProto`, as far as a vocabulary needs it.
//!
//! ```text
//! ModelProto      { repeated SentencePiece pieces = 1; TrainerSpec trainer_spec = 2; NormalizerSpec normalizer_spec = 3; }
//! SentencePiece   { string piece = 1; float score = 2; Type type = 3; }
//! TrainerSpec     { ModelType model_type = 3; }
//! NormalizerSpec  { bool add_dummy_prefix = 3; bool remove_extra_whitespaces = 4; }
//! ```

/// A piece and what it is for: GGUF's token types have SentencePiece's numbers.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub text: Vec<u8>,
    pub score: f32,
    pub kind: i32,
}

/// A vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SentencePiece {
    pub pieces: Vec<Piece>,
    pub add_dummy_prefix: bool,
    pub remove_extra_whitespaces: bool,
}

/// 1 is unigram, 2 is BPE: both come as scored pieces, the rest do not.
const MODEL_TYPES: [u64; 2] = [1, 2];

impl SentencePiece {
    /// Parses the bytes of a file.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut model = Self { pieces: Vec::new(), add_dummy_prefix: true, remove_extra_whitespaces: true };
        for field in Fields(bytes) {
            match field? {
                (1, Field::Bytes(piece)) => model.pieces.push(Piece::parse(piece)?),
                (2, Field::Bytes(trainer)) => {
                    for field in Fields(trainer) {
                        if let (3, Field::Number(kind)) = field?
                            && !MODEL_TYPES.contains(&kind)
                        {
                            return Err(format!("model type {kind}: only unigram and BPE are supported"));
                        }
                    }
                }
                (3, Field::Bytes(normalizer)) => {
                    for field in Fields(normalizer) {
                        match field? {
                            (3, Field::Number(on)) => model.add_dummy_prefix = on != 0,
                            (4, Field::Number(on)) => model.remove_extra_whitespaces = on != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            Err("no SentencePiece model: it has no pieces".into())
        } else {
            Ok(model)
        }
    }
}

impl Piece {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut piece = Self { text: Vec::new(), score: 0.0, kind: 1 };
        for field in Fields(bytes) {
            match field? {
                (1, Field::Bytes(text)) => piece.text = text.to_vec(),
                (2, Field::Word(bits)) => piece.score = f32::from_bits(bits),
                (3, Field::Number(kind)) => {
                    piece.kind = i32::try_from(kind).ok().filter(|kind| (1..=6).contains(kind)).unwrap_or(1);
                }
                _ => {}
            }
        }
        if piece.score.is_nan() { Err("the score of a piece is not a number".into()) } else { Ok(piece) }
    }
}

enum Field<'a> {
    Number(u64),
    Word(u32),
    Bytes(&'a [u8]),
    Other,
}

/// The fields of a message: number and value.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self
            .0
            .split_at_checked(n)
            .ok_or_else(|| format!("truncated: {n} bytes needed, {} remain", self.0.len()))?;
        self.0 = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number is longer than 64 bits".into())
    }

    fn field(&mut self) -> Result<(u64, Field<'a>), String> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Field::Number(self.varint()?),
            1 => self.take(8).map(|_| Field::Other)?,
            2 => {
                let n = self.varint()?;
                Field::Bytes(self.take(usize::try_from(n).map_err(|_| format!("a length of {n}"))?)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Field::Word(u32::from_le_bytes(std::array::from_fn(|i| bytes[i])))
            }
            kind => return Err(format!("wire type {kind} does not exist")),
        };
        Ok((tag >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Field<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[]; // one error ends it
        }
        Some(field)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `<unk>` (unknown) and `ab` with a score, no dummy prefix.
    const MODEL: [u8; 30] = *b"\x0a\x09\x0a\x05<unk>\x18\x02\x0a\x09\x0a\x02ab\x15\x00\x00\x80\xbf\x12\x02\x18\x02\x1a\x02\x18\x00";

    #[test]
    fn pieces_scores_and_flags() {
        let model = SentencePiece::parse(&MODEL).unwrap();
        let unk = Piece { text: b"<unk>".into(), score: 0.0, kind: 2 };
        let ab = Piece { text: b"ab".into(), score: -1.0, kind: 1 };
        assert_eq!(model.pieces, [unk, ab]);
        assert!(!model.add_dummy_prefix && model.remove_extra_whitespaces);
    }

    #[test]
    fn no_bytes_panic() {
        for end in 0..MODEL.len() {
            let _ = SentencePiece::parse(&MODEL[..end]);
        }
        for at in 0..MODEL.len() {
            for byte in 0..=255 {
                let mut bytes = MODEL;
                bytes[at] = byte;
                let _ = SentencePiece::parse(&bytes);
            }
        }
        assert!(SentencePiece::parse(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01").is_err());
        assert!(SentencePiece::parse(b"").is_err());
    }
}
