//! GGUF files: a bounded reader over a memory map. Nothing in the file is believed before it is checked.

mod cursor;
mod ggml_type;
mod metadata;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use cursor::Cursor;
pub use ggml_type::GgmlType;
use memmap2::Mmap;
pub use metadata::{MetaArray, MetaValue, Metadata};

use crate::ModelError;

/// Bytes a tensor's description takes at least: name length, dimension count, type, offset.
const TENSOR_INFO_BYTES_MIN: usize = 8 + 4 + 4 + 8;
/// Bytes a key-value pair takes at least: key length, type, a one-byte value.
const PAIR_BYTES_MIN: usize = 8 + 4 + 1;
/// ggml's own limit on a tensor's dimensions.
const DIMS_MAX: u32 = 4;
/// ggml's own limit on a key's length, in bytes.
const KEY_LEN_MAX: usize = 65_535;
const ALIGNMENT_DEFAULT: usize = 32;
/// More shards than any published model has; a bound on what a corrupt `split.count` can make us look for.
const SHARDS_MAX: usize = 1_000;

/// Where a tensor lies and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    /// Row-major, slowest dimension first: `[rows, columns]` for a matrix, `[n]` for a vector.
    pub shape: Vec<usize>,
    pub dtype: GgmlType,
    /// First byte, counted from the start of its file.
    pub offset: usize,
    pub nbytes: usize,
    shard: usize,
}

impl TensorInfo {
    /// Number of values.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// An open model file, or all files of a split one.
pub struct GgufFile {
    path: PathBuf,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    maps: Vec<Mmap>,
}

impl GgufFile {
    /// Maps `path` and reads its header. Any one file of a split model (`…-00002-of-00005.gguf`) opens them all.
    ///
    /// A file that is truncated, corrupt or not GGUF gives [`ModelError::Format`]; one of a version or byte order
    /// we do not read gives [`ModelError::Unsupported`]; one that cannot be read gives [`ModelError::Source`].
    pub fn open(path: impl AsRef<Path>) -> Result<GgufFile, ModelError> {
        let path = path.as_ref();
        let first = Shard::open(path)?;
        let split_count = first.metadata.usize("split.count")?.unwrap_or(1);
        if split_count <= 1 {
            return Self::join(path.to_owned(), vec![first]);
        }
        if split_count > SHARDS_MAX {
            return Err(first
                .metadata
                .error(format!("split.count is {split_count}; at most {SHARDS_MAX} files are supported")));
        }
        let paths = shard_paths(path, split_count).ok_or_else(|| {
            first.metadata.error(format!(
                "is one of {split_count} files of a split model, but its name does not end in -NNNNN-of-{split_count:05}.gguf, so the others cannot be found"
            ))
        })?;
        let mut shards = Vec::with_capacity(split_count);
        for (number, path) in paths.iter().enumerate() {
            if !path.exists() {
                return Err(ModelError::Source(format!(
                    "{}: file {} of {split_count} of the split model is missing: {}",
                    first.path.display(),
                    number + 1,
                    path.display()
                )));
            }
            let shard = Shard::open(path)?;
            let split_no = shard.metadata.usize("split.no")?;
            let count = shard.metadata.usize("split.count")?;
            if split_no != Some(number) || count != Some(split_count) {
                return Err(shard.metadata.error(format!(
                    "should be file {number} (from 0) of {split_count} of a split model, but says split.no = {split_no:?}, split.count = {count:?}"
                )));
            }
            shards.push(shard);
        }
        Self::join(paths[0].clone(), shards)
    }

    fn join(path: PathBuf, shards: Vec<Shard>) -> Result<GgufFile, ModelError> {
        let mut metadata = None;
        let mut tensors = Vec::new();
        let mut by_name = HashMap::new();
        let mut maps = Vec::with_capacity(shards.len());
        for (number, shard) in shards.into_iter().enumerate() {
            for mut info in shard.tensors {
                info.shard = number;
                if by_name.insert(info.name.clone(), tensors.len()).is_some() {
                    return Err(shard.metadata.error(format!("tensor {} is there twice", info.name)));
                }
                tensors.push(info);
            }
            maps.push(shard.map);
            metadata.get_or_insert(shard.metadata);
        }
        let metadata = metadata.expect("a model has at least one file");
        if let Some(wanted) = metadata.u64("split.tensors.count")?
            && wanted != tensors.len() as u64
        {
            return Err(metadata
                .error(format!("split.tensors.count is {wanted}, but the files hold {} tensors", tensors.len())));
        }
        Ok(GgufFile { path, metadata, tensors, by_name, maps })
    }

    /// The file, or the first one of a split model.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Key-value pairs, of the first file if the model is split.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// `general.architecture`.
    pub fn architecture(&self) -> Result<&str, ModelError> {
        self.metadata.require_str("general.architecture")
    }

    /// All tensors in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// Like [`GgufFile::tensor`]; absence is an error naming it.
    pub fn require_tensor(&self, name: &str) -> Result<&TensorInfo, ModelError> {
        self.tensor(name).ok_or_else(|| self.metadata.error(format!("tensor {name} is missing")))
    }

    /// The `info.nbytes` bytes of a tensor of this file.
    ///
    /// # Panics
    /// If `info` comes from another file and reaches beyond this one.
    pub fn tensor_data(&self, info: &TensorInfo) -> &[u8] {
        &self.maps[info.shard][info.offset..info.offset + info.nbytes]
    }
}

/// One file, mapped and checked.
struct Shard {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
}

impl Shard {
    fn open(path: &Path) -> Result<Shard, ModelError> {
        let map = map_file(path)?;
        let (metadata, tensors) = parse(&map, &path.display().to_string())?;
        Ok(Shard { path: path.to_owned(), map, metadata, tensors })
    }
}

/// Maps a whole file for reading.
// The one unsafe block of this crate: weights are read in place instead of being copied through the heap.
#[allow(unsafe_code)]
pub(crate) fn map_file(path: &Path) -> Result<Mmap, ModelError> {
    let source = |e: std::io::Error| ModelError::Source(format!("{}: {e}", path.display()));
    let file = File::open(path).map_err(source)?;
    let kind = file.metadata().map_err(source)?;
    if !kind.is_file() {
        return Err(ModelError::Source(format!("{}: not a regular file", path.display())));
    }
    // SAFETY: the map is private and read-only, so we never write through it. It is sound as long as nobody
    // shortens or rewrites the file while we run: files in our cache are only ever replaced by rename, which leaves
    // the mapped inode alone, and a user's own model file is theirs to keep in place (every runtime that maps
    // weights asks the same).
    unsafe { Mmap::map(&file) }.map_err(source)
}

/// The paths of all `count` files of a split model, given any one of them.
fn shard_paths(path: &Path, count: usize) -> Option<Vec<PathBuf>> {
    let name = path.file_name()?.to_str()?;
    let stem = name.strip_suffix(&format!("-of-{count:05}.gguf"))?;
    let (prefix, number) = stem.rsplit_once('-')?;
    if number.len() != 5 || !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let path_of = |number: usize| path.with_file_name(format!("{prefix}-{number:05}-of-{count:05}.gguf"));
    Some((1..=count).map(path_of).collect())
}

/// Checks and reads a file's header. Reasons are wrapped with `path`.
fn parse(bytes: &[u8], path: &str) -> Result<(Metadata, Vec<TensorInfo>), ModelError> {
    let format = |reason: String| ModelError::Format { path: path.to_owned(), reason };
    let mut cursor = Cursor::new(bytes);
    check_magic(bytes).map_err(format)?;
    cursor.take(4, "the magic").map_err(format)?;
    let version = cursor.u32("the version").map_err(format)?;
    match version {
        2 | 3 => {}
        1 => {
            return Err(ModelError::Unsupported(format!(
                "{path}: GGUF version 1 is not supported (2 and 3 are); convert the model again"
            )));
        }
        // A small number in the wrong byte order.
        v if v & 0xffff == 0 => {
            return Err(ModelError::Unsupported(format!(
                "{path}: is a big-endian GGUF file; only little-endian ones are supported"
            )));
        }
        v => {
            return Err(ModelError::Unsupported(format!(
                "{path}: GGUF version {v} is not supported (2 and 3 are)"
            )));
        }
    }
    let tensor_count = cursor.count(TENSOR_INFO_BYTES_MIN, "the tensor count").map_err(format)?;
    let pair_count = cursor.count(PAIR_BYTES_MIN, "the metadata count").map_err(format)?;
    let values = read_pairs(&mut cursor, pair_count).map_err(format)?;
    let metadata = Metadata::new(path.to_owned(), values);
    let alignment = match metadata.usize("general.alignment")? {
        None => ALIGNMENT_DEFAULT,
        Some(alignment) if alignment.is_power_of_two() && alignment >= 8 => alignment,
        Some(alignment) => {
            return Err(format(format!(
                "general.alignment is {alignment}; it must be a power of two of at least 8"
            )));
        }
    };
    // Counted again: what the metadata used is gone.
    if tensor_count > cursor.remaining() / TENSOR_INFO_BYTES_MIN {
        return Err(format(format!(
            "promises {tensor_count} tensors, but ends at byte {}: the file is truncated or corrupt",
            bytes.len()
        )));
    }
    let mut tensors = Vec::with_capacity(tensor_count);
    for number in 0..tensor_count {
        let info = read_tensor_info(&mut cursor, alignment, number).map_err(format)?;
        tensors.push(info);
    }
    let data_start = cursor.position().next_multiple_of(alignment);
    place(&mut tensors, data_start, bytes.len()).map_err(format)?;
    Ok((metadata, tensors))
}

fn check_magic(bytes: &[u8]) -> Result<(), String> {
    if bytes.starts_with(b"GGUF") {
        return Ok(());
    }
    Err(match bytes {
        [] => "is empty".to_owned(),
        [b'l' | b't', b'm' | b'j', b'g', b'g', ..] | [b'l', b'a', b'g', b'g', ..] => {
            "is an old ggml file, the format before GGUF; convert the model again".to_owned()
        }
        _ if bytes.starts_with(b"version https://git-lfs") => {
            "is a Git LFS pointer, not the model itself; run `git lfs pull` where it was cloned".to_owned()
        }
        _ => {
            let start = &bytes[..bytes.len().min(8)];
            format!("is not a GGUF file: it starts with \"{}\"", start.escape_ascii())
        }
    })
}

fn read_pairs(cursor: &mut Cursor<'_>, count: usize) -> Result<BTreeMap<String, MetaValue>, String> {
    let mut values = BTreeMap::new();
    for number in 0..count {
        let key = cursor.string(&format!("metadata key {number}"))?;
        if key.is_empty() || key.len() > KEY_LEN_MAX {
            return Err(format!(
                "metadata key {number} is {} bytes long; 1 to {KEY_LEN_MAX} are allowed",
                key.len()
            ));
        }
        let what = format!("metadata key {key}");
        let id = cursor.u32(&what)?;
        let value = MetaValue::read(cursor, id, &what)?;
        if values.insert(key.to_owned(), value).is_some() {
            return Err(format!("{what} is there twice"));
        }
    }
    Ok(values)
}

/// One tensor's description; its offset still relative to the start of the data.
fn read_tensor_info(cursor: &mut Cursor<'_>, alignment: usize, number: usize) -> Result<TensorInfo, String> {
    let name = cursor.string(&format!("the name of tensor {number}"))?;
    let what = format!("tensor {name}");
    let dims = cursor.u32(&what)?;
    if dims == 0 || dims > DIMS_MAX {
        return Err(format!("{what} has {dims} dimensions; 1 to {DIMS_MAX} are allowed"));
    }
    let mut shape = Vec::with_capacity(dims as usize);
    for _ in 0..dims {
        let dim = cursor.u64(&what)?;
        match usize::try_from(dim) {
            Ok(dim) if dim > 0 => shape.push(dim),
            _ => return Err(format!("{what} has a dimension of {dim}")),
        }
    }
    // The file lists the fastest dimension first.
    let row_len = shape[0];
    shape.reverse();
    let id = cursor.u32(&what)?;
    let dtype = GgmlType::from_id(id).map_err(|reason| format!("{what} has {reason}"))?;
    if !row_len.is_multiple_of(dtype.block_len()) {
        return Err(format!(
            "{what} has rows of {row_len} values, not a multiple of the {} a {dtype} block holds",
            dtype.block_len()
        ));
    }
    let nbytes = shape
        .iter()
        .try_fold(1usize, |product, &dim| product.checked_mul(dim))
        .and_then(|elements| (elements / dtype.block_len()).checked_mul(dtype.block_bytes()))
        .ok_or_else(|| format!("{what} has the impossible shape {shape:?}"))?;
    let offset = cursor.u64(&what)?;
    let offset =
        usize::try_from(offset).ok().filter(|offset| offset.is_multiple_of(alignment)).ok_or_else(|| {
            format!("{what} starts at {offset}, which is not a multiple of the alignment {alignment}")
        })?;
    Ok(TensorInfo { name: name.to_owned(), shape, dtype, offset, nbytes, shard: 0 })
}

/// Makes offsets absolute, and checks that every tensor lies within the file and none within another.
fn place(tensors: &mut [TensorInfo], data_start: usize, file_len: usize) -> Result<(), String> {
    for info in tensors.iter_mut() {
        let start = data_start.checked_add(info.offset);
        let end = start.and_then(|start| start.checked_add(info.nbytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len => info.offset = start,
            _ => {
                return Err(format!(
                    "tensor {} needs {} bytes at {} of the data, beyond the file's end at {file_len}: the file is truncated or corrupt",
                    info.name, info.nbytes, info.offset
                ));
            }
        }
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|info| info.offset);
    for pair in order.windows(2) {
        if pair[0].offset + pair[0].nbytes > pair[1].offset {
            return Err(format!("tensors {} and {} overlap: the file is corrupt", pair[0].name, pair[1].name));
        }
    }
    Ok(())
}
