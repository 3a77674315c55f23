//! The key-value part of a GGUF file: typed values, and accessors whose errors name key, wanted and found type.

use std::collections::BTreeMap;

use super::cursor::Cursor;
use crate::ModelError;

/// A metadata value, as typed in the file.
#[derive(Debug, Clone, PartialEq)]
pub enum MetaValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(MetaArray),
}

/// An array value. Element types are kept flat, so that memory stays within a small factor of the file's bytes.
#[derive(Debug, Clone, PartialEq)]
pub enum MetaArray {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
}

impl MetaValue {
    fn type_name(&self) -> &'static str {
        match self {
            MetaValue::U8(_) => "u8",
            MetaValue::I8(_) => "i8",
            MetaValue::U16(_) => "u16",
            MetaValue::I16(_) => "i16",
            MetaValue::U32(_) => "u32",
            MetaValue::I32(_) => "i32",
            MetaValue::U64(_) => "u64",
            MetaValue::I64(_) => "i64",
            MetaValue::F32(_) => "f32",
            MetaValue::F64(_) => "f64",
            MetaValue::Bool(_) => "bool",
            MetaValue::String(_) => "string",
            MetaValue::Array(array) => match array {
                MetaArray::U8(_) => "array of u8",
                MetaArray::I8(_) => "array of i8",
                MetaArray::U16(_) => "array of u16",
                MetaArray::I16(_) => "array of i16",
                MetaArray::U32(_) => "array of u32",
                MetaArray::I32(_) => "array of i32",
                MetaArray::U64(_) => "array of u64",
                MetaArray::I64(_) => "array of i64",
                MetaArray::F32(_) => "array of f32",
                MetaArray::F64(_) => "array of f64",
                MetaArray::Bool(_) => "array of bool",
                MetaArray::String(_) => "array of string",
            },
        }
    }

    /// Any integer type that holds a value of at least 0.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            MetaValue::U8(v) => Some(v.into()),
            MetaValue::U16(v) => Some(v.into()),
            MetaValue::U32(v) => Some(v.into()),
            MetaValue::U64(v) => Some(v),
            MetaValue::I8(v) => v.try_into().ok(),
            MetaValue::I16(v) => v.try_into().ok(),
            MetaValue::I32(v) => v.try_into().ok(),
            MetaValue::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            MetaValue::F32(v) => Some(v),
            MetaValue::F64(v) => Some(v as f32),
            _ => None,
        }
    }

    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            MetaValue::Bool(v) => Some(v),
            _ => None,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            MetaValue::String(v) => Some(v),
            _ => None,
        }
    }

    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            MetaValue::Array(MetaArray::String(v)) => Some(v),
            _ => None,
        }
    }

    /// An array of any integer type whose values fit.
    pub fn as_ints(&self) -> Option<Vec<i64>> {
        let MetaValue::Array(array) = self else {
            return None;
        };
        fn widen<T: Copy + Into<i64>>(values: &[T]) -> Option<Vec<i64>> {
            Some(values.iter().map(|&v| v.into()).collect())
        }
        match array {
            MetaArray::U8(v) => widen(v),
            MetaArray::I8(v) => widen(v),
            MetaArray::U16(v) => widen(v),
            MetaArray::I16(v) => widen(v),
            MetaArray::U32(v) => widen(v),
            MetaArray::I32(v) => widen(v),
            MetaArray::I64(v) => Some(v.clone()),
            MetaArray::U64(v) => v.iter().map(|&v| i64::try_from(v).ok()).collect(),
            _ => None,
        }
    }

    pub fn as_floats(&self) -> Option<Vec<f32>> {
        match self {
            MetaValue::Array(MetaArray::F32(v)) => Some(v.clone()),
            MetaValue::Array(MetaArray::F64(v)) => Some(v.iter().map(|&v| v as f32).collect()),
            _ => None,
        }
    }

    pub fn as_bools(&self) -> Option<&[bool]> {
        match self {
            MetaValue::Array(MetaArray::Bool(v)) => Some(v),
            _ => None,
        }
    }

    /// Reads a value of the type with this `id`; `key` is for messages.
    pub(super) fn read(cursor: &mut Cursor<'_>, id: u32, key: &str) -> Result<MetaValue, String> {
        Ok(match id {
            0 => MetaValue::U8(cursor.u8(key)?),
            1 => MetaValue::I8(cursor.u8(key)? as i8),
            2 => MetaValue::U16(cursor.u16(key)?),
            3 => MetaValue::I16(cursor.u16(key)? as i16),
            4 => MetaValue::U32(cursor.u32(key)?),
            5 => MetaValue::I32(cursor.u32(key)? as i32),
            6 => MetaValue::F32(f32::from_bits(cursor.u32(key)?)),
            7 => MetaValue::Bool(cursor.u8(key)? != 0),
            8 => MetaValue::String(cursor.string(key)?.to_owned()),
            9 => MetaValue::Array(MetaArray::read(cursor, key)?),
            10 => MetaValue::U64(cursor.u64(key)?),
            11 => MetaValue::I64(cursor.u64(key)? as i64),
            12 => MetaValue::F64(f64::from_bits(cursor.u64(key)?)),
            _ => return Err(format!("{key} has the unknown value type {id}")),
        })
    }
}

impl MetaArray {
    fn read(cursor: &mut Cursor<'_>, key: &str) -> Result<MetaArray, String> {
        fn fill<'a, T>(
            cursor: &mut Cursor<'a>,
            key: &str,
            min_bytes: usize,
            read: impl Fn(&mut Cursor<'a>, &str) -> Result<T, String>,
        ) -> Result<Vec<T>, String> {
            let count = cursor.count(min_bytes, key)?;
            let mut values = Vec::with_capacity(count);
            for _ in 0..count {
                values.push(read(cursor, key)?);
            }
            Ok(values)
        }
        let id = cursor.u32(key)?;
        Ok(match id {
            0 => MetaArray::U8(fill(cursor, key, 1, Cursor::u8)?),
            1 => MetaArray::I8(fill(cursor, key, 1, |c, k| Ok(c.u8(k)? as i8))?),
            2 => MetaArray::U16(fill(cursor, key, 2, Cursor::u16)?),
            3 => MetaArray::I16(fill(cursor, key, 2, |c, k| Ok(c.u16(k)? as i16))?),
            4 => MetaArray::U32(fill(cursor, key, 4, Cursor::u32)?),
            5 => MetaArray::I32(fill(cursor, key, 4, |c, k| Ok(c.u32(k)? as i32))?),
            6 => MetaArray::F32(fill(cursor, key, 4, |c, k| Ok(f32::from_bits(c.u32(k)?)))?),
            7 => MetaArray::Bool(fill(cursor, key, 1, |c, k| Ok(c.u8(k)? != 0))?),
            8 => MetaArray::String(fill(cursor, key, 8, |c, k| Ok(c.string(k)?.to_owned()))?),
            9 => {
                return Err(format!("{key} is an array of arrays, which no known key uses"));
            }
            10 => MetaArray::U64(fill(cursor, key, 8, Cursor::u64)?),
            11 => MetaArray::I64(fill(cursor, key, 8, |c, k| Ok(c.u64(k)? as i64))?),
            12 => MetaArray::F64(fill(cursor, key, 8, |c, k| Ok(f64::from_bits(c.u64(k)?)))?),
            _ => {
                return Err(format!("{key} is an array of the unknown value type {id}"));
            }
        })
    }
}

/// All key-value pairs of a file. Accessors give `Ok(None)` for an absent key and an error for one of the wrong
/// type; the `require_` ones make absence an error too.
#[derive(Debug, Clone)]
pub struct Metadata {
    path: String,
    values: BTreeMap<String, MetaValue>,
}

impl Metadata {
    pub(super) fn new(path: String, values: BTreeMap<String, MetaValue>) -> Self {
        Metadata { path, values }
    }

    pub fn get(&self, key: &str) -> Option<&MetaValue> {
        self.values.get(key)
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// An error about this file.
    pub(crate) fn error(&self, reason: impl Into<String>) -> ModelError {
        ModelError::Format { path: self.path.clone(), reason: reason.into() }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        convert: impl FnOnce(&'a MetaValue) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.values.get(key) else {
            return Ok(None);
        };
        convert(value).map(Some).ok_or_else(|| {
            let found = match value {
                MetaValue::Array(_) | MetaValue::String(_) => value.type_name().to_owned(),
                scalar => format!("{scalar:?}"),
            };
            self.error(format!("metadata key {key} must be {wanted}, found {found}"))
        })
    }

    fn require<T>(&self, key: &str, found: Option<T>) -> Result<T, ModelError> {
        found.ok_or_else(|| self.error(format!("metadata key {key} is missing")))
    }

    pub fn str(&self, key: &str) -> Result<Option<&str>, ModelError> {
        self.typed(key, "a string", MetaValue::as_str)
    }

    pub fn u64(&self, key: &str) -> Result<Option<u64>, ModelError> {
        self.typed(key, "a non-negative integer", MetaValue::as_u64)
    }

    /// An integer that fits 32 bits without a sign: token ids, counts, dimensions.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, ModelError> {
        self.typed(key, "an integer from 0 to 4294967295", |v| v.as_u64().and_then(|v| v.try_into().ok()))
    }

    pub fn usize(&self, key: &str) -> Result<Option<usize>, ModelError> {
        Ok(self.u32(key)?.map(|v| v as usize))
    }

    pub fn f32(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.typed(key, "a finite float", |v| v.as_f32().filter(|v| v.is_finite()))
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.typed(key, "a bool", MetaValue::as_bool)
    }

    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, ModelError> {
        self.typed(key, "an array of strings", MetaValue::as_strings)
    }

    pub fn ints(&self, key: &str) -> Result<Option<Vec<i64>>, ModelError> {
        self.typed(key, "an array of integers", MetaValue::as_ints)
    }

    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, ModelError> {
        self.typed(key, "an array of floats", MetaValue::as_floats)
    }

    pub fn require_str(&self, key: &str) -> Result<&str, ModelError> {
        self.require(key, self.str(key)?)
    }

    pub fn require_usize(&self, key: &str) -> Result<usize, ModelError> {
        self.require(key, self.usize(key)?)
    }

    pub fn require_f32(&self, key: &str) -> Result<f32, ModelError> {
        self.require(key, self.f32(key)?)
    }

    pub fn require_strings(&self, key: &str) -> Result<&[String], ModelError> {
        self.require(key, self.strings(key)?)
    }
}
