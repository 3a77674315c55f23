//! Writes small GGUF files, sound or not, for tests.

use std::path::PathBuf;

/// A file in the making.
#[derive(Clone)]
pub struct Gguf {
    pub version: u32,
    pub alignment: usize,
    pub pairs: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

/// A metadata value.
pub enum Value<'a> {
    U32(u32),
    I32(i32),
    F32(f32),
    U64(u64),
    Bool(bool),
    Str(&'a str),
    Strs(Vec<&'a str>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Bools(Vec<bool>),
    /// A type id and bytes as they are.
    Raw(u32, Vec<u8>),
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn array<T>(id: u32, values: &[T], encode: impl Fn(&T) -> Vec<u8>) -> Vec<u8> {
    let mut bytes = id.to_le_bytes().to_vec();
    bytes.extend((values.len() as u64).to_le_bytes());
    bytes.extend(values.iter().flat_map(encode));
    bytes
}

impl Gguf {
    pub fn new() -> Gguf {
        Gguf { version: 3, alignment: 32, pairs: Vec::new(), tensors: Vec::new() }
    }

    /// Adds a key, or replaces it.
    pub fn set(mut self, key: &str, value: Value) -> Gguf {
        let (id, payload) = match value {
            Value::U32(v) => (4u32, v.to_le_bytes().to_vec()),
            Value::I32(v) => (5, v.to_le_bytes().to_vec()),
            Value::F32(v) => (6, v.to_le_bytes().to_vec()),
            Value::Bool(v) => (7, vec![v.into()]),
            Value::Str(v) => (8, string(v)),
            Value::U64(v) => (10, v.to_le_bytes().to_vec()),
            Value::Strs(v) => (9, array(8, &v, |s| string(s))),
            Value::I32s(v) => (9, array(5, &v, |n| n.to_le_bytes().to_vec())),
            Value::F32s(v) => (9, array(6, &v, |n| n.to_le_bytes().to_vec())),
            Value::Bools(v) => (9, array(7, &v, |b| vec![u8::from(*b)])),
            Value::Raw(id, bytes) => (id, bytes),
        };
        let typed = [id.to_le_bytes().to_vec(), payload].concat();
        self = self.without(key);
        self.pairs.push((key.to_owned(), typed));
        self
    }

    pub fn without(mut self, key: &str) -> Gguf {
        self.pairs.retain(|(name, _)| name != key);
        self
    }

    /// Adds a tensor of a row-major shape; `dtype` is ggml's id.
    pub fn tensor(mut self, name: &str, shape: &[u64], dtype: u32, data: Vec<u8>) -> Gguf {
        let dims = shape.iter().rev().copied().collect();
        self.tensors.push((name.to_owned(), dims, dtype, data));
        self
    }

    /// Adds a tensor of zeros as F32.
    pub fn zeros(self, name: &str, shape: &[u64]) -> Gguf {
        let elements: u64 = shape.iter().product();
        self.tensor(name, shape, 0, vec![0; 4 * elements as usize])
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.pairs.len() as u64).to_le_bytes());
        for (key, typed) in &self.pairs {
            out.extend(string(key));
            out.extend(typed);
        }
        let mut data = Vec::new();
        for (name, dims, dtype, bytes) in &self.tensors {
            out.extend(string(name));
            out.extend((dims.len() as u32).to_le_bytes());
            out.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
            out.extend(dtype.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(self.alignment), 0);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }

    /// Writes the file into a directory that lives as long as what is returned.
    pub fn write(&self) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        (dir, path)
    }
}
