//! Models split into several files, `name-00001-of-00003.gguf` and so on. Nothing here opens a file: from one
//! parsed header come the names of the others, and their headers are checked as the caller parses them.
//!
//! Every file is a GGUF file of its own with the keys `split.no` (from 0; the names count from 1),
//! `split.count` and `split.tensors.count` (over all files). The first one holds the model's metadata.

use super::{Error, Gguf, Metadata};
use std::collections::HashMap;

const NO_KEY: &str = "split.no";
const COUNT_KEY: &str = "split.count";
const TENSORS_KEY: &str = "split.tensors.count";
const ARCHITECTURE_KEY: &str = "general.architecture";

/// The names have five digits.
const MAX_COUNT: u32 = 99_999;

/// The parts of a file name `prefix-00001-of-00003.gguf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardName {
    /// What stands before the numbers.
    pub prefix: String,
    /// The number of this file, from 0 (the name counts from 1).
    pub no: u32,
    /// The number of files.
    pub count: u32,
}

impl ShardName {
    /// Takes a file name (without directory) apart, if it is that of a split file.
    pub fn parse(file_name: &str) -> Option<Self> {
        let (rest, count) = file_name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let (number, count) = (five_digits(number)?, five_digits(count)?);
        let no = number.checked_sub(1).filter(|&no| no < count)?;
        Some(Self { prefix: prefix.to_owned(), no, count })
    }

    /// The name of file `no` (from 0) of the same model.
    pub fn sibling(&self, no: u32) -> String {
        format!("{}-{:05}-of-{:05}.gguf", self.prefix, no.saturating_add(1), self.count)
    }
}

fn five_digits(digits: &str) -> Option<u32> {
    let only_digits = digits.len() == 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
    if only_digits { digits.parse().ok() } else { None }
}

/// The split keys of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitInfo {
    /// The number of this file, from 0.
    pub no: u32,
    /// The number of files.
    pub count: u32,
    /// The number of tensors in all files together.
    pub tensors: Option<u64>,
}

impl SplitInfo {
    /// The split keys, or `None` for a model in one file (no `split.count`, or one of 0 or 1).
    pub fn from_metadata(metadata: &Metadata) -> Result<Option<Self>, Error> {
        let count = metadata.opt_u64(COUNT_KEY)?.unwrap_or_default();
        if count <= 1 {
            return Ok(None);
        }
        let no = metadata.u64(NO_KEY)?;
        if no >= count || count > u64::from(MAX_COUNT) {
            return Err(Error::InvalidSplit { no, count });
        }
        let tensors = metadata.opt_u64(TENSORS_KEY)?;
        Ok(Some(Self { no: no as u32, count: count as u32, tensors }))
    }
}

/// The files of one split model, checked one by one: [`begin`](Self::begin) with any of them,
/// [`add`](Self::add) the [`missing`](Self::missing) ones, then [`finish`](Self::finish).
#[derive(Clone, Debug)]
pub struct ShardSet {
    name: ShardName,
    tensors: Option<u64>,
    architecture: Option<String>,
    /// By number: the name of the file that said it has it.
    added: Vec<Option<String>>,
    /// By tensor name: the number of the file that holds it.
    holders: HashMap<String, u32>,
}

impl ShardSet {
    /// Starts from any file of the model; `None` if it is not split.
    pub fn begin(file_name: &str, gguf: &Gguf) -> Result<Option<Self>, Error> {
        let Some(split) = SplitInfo::from_metadata(&gguf.metadata)? else { return Ok(None) };
        let name =
            ShardName::parse(file_name).ok_or_else(|| Error::ShardName { file: file_name.to_owned() })?;
        let mut set = Self {
            added: vec![None; split.count as usize],
            holders: HashMap::new(),
            tensors: split.tensors,
            architecture: None,
            name,
        };
        set.add(file_name, gguf)?;
        Ok(Some(set))
    }

    /// The names of all files, in order.
    pub fn file_names(&self) -> impl ExactSizeIterator<Item = String> {
        (0..self.added.len()).map(|no| self.name.sibling(no as u32))
    }

    /// The names of the files that were not added yet.
    pub fn missing(&self) -> impl Iterator<Item = String> {
        self.file_names().zip(&self.added).filter(|(_, added)| added.is_none()).map(|(name, _)| name)
    }

    /// The number (from 0) of the file that holds a tensor.
    pub fn holder(&self, tensor: &str) -> Option<u32> {
        self.holders.get(tensor).copied()
    }

    /// Adds one more file, in any order, if it belongs to this model and is not there yet.
    pub fn add(&mut self, file_name: &str, gguf: &Gguf) -> Result<(), Error> {
        let split = SplitInfo::from_metadata(&gguf.metadata)?
            .ok_or_else(|| Error::NotAShard { file: file_name.to_owned() })?;
        self.check_number(file_name, split)?;
        self.check_model(file_name, split, &gguf.metadata)?;
        self.add_tensors(file_name, split.no, gguf)?;
        self.added[split.no as usize] = Some(file_name.to_owned());
        Ok(())
    }

    /// Checks that all files were added and hold the tensors that were promised.
    pub fn finish(self) -> Result<(), Error> {
        if let Some(file) = self.missing().next() {
            return Err(Error::MissingShard { file });
        }
        let found = self.holders.len() as u64;
        match self.tensors {
            Some(expected) if expected != found => Err(Error::SplitTensorCount { expected, found }),
            _ => Ok(()),
        }
    }

    /// A header must say what the file's name says. A file whose header leads back to one that was read
    /// before (a copy, a link, a cycle) is told from one that is merely misplaced.
    fn check_number(&self, file_name: &str, split: SplitInfo) -> Result<(), Error> {
        let file = || file_name.to_owned();
        let name = ShardName::parse(file_name).ok_or_else(|| Error::ShardName { file: file() })?;
        if split.count as usize != self.added.len() {
            return Err(foreign(file_name, COUNT_KEY, self.added.len(), split.count));
        }
        if let Some(Some(first)) = self.added.get(split.no as usize) {
            return Err(Error::DuplicateShard { file: file(), no: split.no, first: first.clone() });
        }
        if (name.no, name.count) != (split.no, split.count) {
            let (no, count, found_no, found_count) = (name.no, name.count, split.no, split.count);
            return Err(Error::ShardMismatch { file: file(), no, count, found_no, found_count });
        }
        if name.prefix != self.name.prefix {
            return Err(foreign(file_name, "the name", &self.name.prefix, &name.prefix));
        }
        Ok(())
    }

    fn check_model(&mut self, file_name: &str, split: SplitInfo, metadata: &Metadata) -> Result<(), Error> {
        if split.tensors != self.tensors {
            let show = |tensors: Option<u64>| tensors.map_or("missing".to_owned(), |n| n.to_string());
            return Err(foreign(file_name, TENSORS_KEY, show(self.tensors), show(split.tensors)));
        }
        // Only the first file has to have it.
        if let Some(found) = metadata.opt_str(ARCHITECTURE_KEY)? {
            let expected = self.architecture.get_or_insert_with(|| found.to_owned());
            if expected != found {
                return Err(foreign(file_name, ARCHITECTURE_KEY, &*expected, found));
            }
        }
        Ok(())
    }

    fn add_tensors(&mut self, file_name: &str, no: u32, gguf: &Gguf) -> Result<(), Error> {
        for tensor in &gguf.tensors {
            if let Some(other) = self.holders.insert(tensor.name.clone(), no) {
                let (tensor, file, first) =
                    (tensor.name.clone(), file_name.to_owned(), self.name.sibling(other));
                return Err(Error::TensorInTwoShards { tensor, file, first });
            }
        }
        Ok(())
    }
}

fn foreign(file: &str, what: &'static str, expected: impl ToString, found: impl ToString) -> Error {
    Error::ForeignShard {
        file: file.to_owned(),
        what,
        expected: expected.to_string(),
        found: found.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Builder, GgmlType};
    use super::*;

    /// File `no` of `count`, with one tensor.
    fn shard(no: u16, count: u16, tensors: i32, tensor: &str) -> Gguf {
        let mut b = Builder::new();
        b.insert(NO_KEY, no).unwrap();
        b.insert(COUNT_KEY, count).unwrap();
        b.insert(TENSORS_KEY, tensors).unwrap();
        b.tensor(tensor, GgmlType::F32, &[1]).unwrap();
        let mut w = b.start(Vec::new()).unwrap();
        w.write_tensor(&[0; 4]).unwrap();
        Gguf::parse(&w.finish().unwrap()).unwrap()
    }

    fn name(number: u32) -> String {
        format!("m-{number:05}-of-00003.gguf")
    }

    /// A set that has the first of three files.
    fn begun() -> ShardSet {
        ShardSet::begin(&name(1), &shard(0, 3, 3, "a")).unwrap().unwrap()
    }

    #[test]
    fn names_are_taken_apart_and_put_together() {
        let parsed = ShardName::parse("my-model-00002-of-00003.gguf").unwrap();
        assert_eq!(parsed, ShardName { prefix: "my-model".into(), no: 1, count: 3 });
        assert_eq!(parsed.sibling(2), "my-model-00003-of-00003.gguf");
        let bad = ["m.gguf", "m-00000-of-00003.gguf", "m-00004-of-00003.gguf", "m-1-of-3.gguf"];
        let worse = ["m-00001-of-00003.bin", "m-+0001-of-00003.gguf", "m-00001-of-000030.gguf", ""];
        for name in bad.iter().chain(&worse) {
            assert_eq!(ShardName::parse(name), None, "{name}");
        }
    }

    #[test]
    fn a_whole_set_in_any_order() {
        let mut set = ShardSet::begin(&name(2), &shard(1, 3, 3, "b")).unwrap().unwrap();
        assert_eq!(set.missing().collect::<Vec<_>>(), [name(1), name(3)]);
        set.add(&name(3), &shard(2, 3, 3, "c")).unwrap();
        set.add(&name(1), &shard(0, 3, 3, "a")).unwrap();
        assert_eq!((set.holder("a"), set.holder("c"), set.holder("d")), (Some(0), Some(2), None));
        assert_eq!(set.finish(), Ok(()));
    }

    #[test]
    fn a_single_file_is_no_set() {
        let single = shard(0, 1, 1, "a");
        assert!(ShardSet::begin("any name", &single).unwrap().is_none());
        assert!(matches!(begun().add(&name(2), &single), Err(Error::NotAShard { .. })));
    }

    #[test]
    fn missing_files_and_tensors() {
        let mut set = begun();
        set.add(&name(3), &shard(2, 3, 3, "c")).unwrap();
        assert_eq!(set.clone().finish(), Err(Error::MissingShard { file: name(2) }));

        let mut set = ShardSet::begin(&name(1), &shard(0, 3, 4, "a")).unwrap().unwrap();
        set.add(&name(2), &shard(1, 3, 4, "b")).unwrap();
        set.add(&name(3), &shard(2, 3, 4, "c")).unwrap();
        assert_eq!(set.finish(), Err(Error::SplitTensorCount { expected: 4, found: 3 }));
    }

    #[test]
    fn duplicated_and_cyclic_files() {
        let mut set = begun();
        let duplicate = Error::DuplicateShard { file: name(1), no: 0, first: name(1) };
        assert_eq!(set.add(&name(1), &shard(0, 3, 3, "a")), Err(duplicate));
        // The second file's header is that of the first.
        let cycle = Error::DuplicateShard { file: name(2), no: 0, first: name(1) };
        assert_eq!(set.add(&name(2), &shard(0, 3, 3, "b")), Err(cycle));
    }

    #[test]
    fn wrong_files() {
        let mut set = begun();
        let mismatch = Error::ShardMismatch { file: name(2), no: 1, count: 3, found_no: 2, found_count: 3 };
        assert_eq!(set.add(&name(2), &shard(2, 3, 3, "c")), Err(mismatch));
        assert!(matches!(set.add("m.gguf", &shard(1, 3, 3, "b")), Err(Error::ShardName { .. })));
        let foreign = |result| matches!(result, Err(Error::ForeignShard { .. }));
        assert!(foreign(set.add(&name(2), &shard(1, 4, 3, "b"))));
        assert!(foreign(set.add(&name(2), &shard(1, 3, 5, "b"))));
        assert!(foreign(set.add("n-00002-of-00003.gguf", &shard(1, 3, 3, "b"))));
        let result = set.add(&name(2), &shard(1, 3, 3, "a"));
        assert!(matches!(result, Err(Error::TensorInTwoShards { tensor, .. }) if tensor == "a"));
    }

    #[test]
    fn wrong_first_file() {
        let begin = |file: &str, gguf: &Gguf| ShardSet::begin(file, gguf).unwrap_err();
        assert!(matches!(begin("m.gguf", &shard(0, 3, 3, "a")), Error::ShardName { .. }));
        assert!(matches!(begin(&name(2), &shard(0, 3, 3, "a")), Error::ShardMismatch { .. }));
        assert_eq!(begin(&name(1), &shard(3, 3, 3, "a")), Error::InvalidSplit { no: 3, count: 3 });
    }

    #[test]
    fn files_of_another_architecture() {
        let with = |no: u16, architecture: &str| {
            let mut b = Builder::new();
            b.insert(NO_KEY, no).unwrap();
            b.insert(COUNT_KEY, 3u16).unwrap();
            b.insert(ARCHITECTURE_KEY, architecture).unwrap();
            Gguf::parse(&b.start(Vec::new()).unwrap().finish().unwrap()).unwrap()
        };
        let mut set = ShardSet::begin(&name(1), &with(0, "llama")).unwrap().unwrap();
        set.add(&name(2), &with(1, "llama")).unwrap();
        assert!(matches!(set.add(&name(3), &with(2, "gpt2")), Err(Error::ForeignShard { .. })));
    }

    #[test]
    fn split_keys_out_of_bounds() {
        let info = |no: u64, count: u64| {
            let mut m = Metadata::new();
            m.insert(NO_KEY, no).unwrap();
            m.insert(COUNT_KEY, count).unwrap();
            SplitInfo::from_metadata(&m)
        };
        assert_eq!(info(1, 2), Ok(Some(SplitInfo { no: 1, count: 2, tensors: None })));
        assert_eq!((info(0, 0), info(9, 1)), (Ok(None), Ok(None)));
        assert_eq!(info(2, 2), Err(Error::InvalidSplit { no: 2, count: 2 }));
        assert_eq!(info(0, 100_000), Err(Error::InvalidSplit { no: 0, count: 100_000 }));
        assert!(matches!(info(u64::MAX, u64::MAX), Err(Error::InvalidSplit { .. })));
    }
}
