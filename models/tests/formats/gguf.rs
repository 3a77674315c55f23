//! The GGUF reader on sound files, split files, and every kind of broken one.

use std::path::Path;

use crate::default_model;
use crate::gguf_writer::{Gguf, Value};
use proptest::prelude::*;
use rill_models::{GgmlType, GgufFile, ModelError};

fn small() -> Gguf {
    Gguf::new()
        .set("general.architecture", Value::Str("llama"))
        .set("llama.block_count", Value::U32(2))
        .set("llama.rope.freq_base", Value::F32(1e4))
        .set("llama.big", Value::U64(1 << 40))
        .set("llama.minus", Value::I32(-1))
        .set("tokenizer.ggml.tokens", Value::Strs(vec!["a", "b", "é"]))
        .set("tokenizer.ggml.token_type", Value::I32s(vec![1, 3, -1]))
        .set("tokenizer.ggml.scores", Value::F32s(vec![0.5, -1.0, 2.0]))
        .set("flag", Value::Bool(true))
        .tensor("norm", &[3], 0, (0..12).collect())
        .tensor("weight", &[2, 64], 3, (0..80).collect())
}

fn open_bytes(bytes: &[u8]) -> Result<GgufFile, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    GgufFile::open(&path)
}

/// Why `bytes` are refused; the message must name the file.
fn refusal(bytes: &[u8]) -> String {
    let error = open_bytes(bytes).err().expect("is refused");
    assert!(matches!(error, ModelError::Format { .. } | ModelError::Unsupported(_)), "{error:?}");
    let message = error.to_string();
    assert!(message.contains("model.gguf: "), "{message}");
    message
}

#[test]
fn a_sound_file_gives_its_metadata_and_tensors() {
    for version in [2, 3] {
        let file = open_bytes(&Gguf { version, ..small() }.bytes()).unwrap();
        let metadata = file.metadata();
        assert_eq!(file.architecture().unwrap(), "llama");
        assert_eq!(metadata.usize("llama.block_count").unwrap(), Some(2));
        assert_eq!(metadata.f32("llama.rope.freq_base").unwrap(), Some(1e4));
        assert_eq!(metadata.u64("llama.big").unwrap(), Some(1 << 40));
        assert_eq!(metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap(), ["a", "b", "é"]);
        assert_eq!(metadata.ints("tokenizer.ggml.token_type").unwrap().unwrap(), [1, 3, -1]);
        assert_eq!(metadata.floats("tokenizer.ggml.scores").unwrap().unwrap(), [0.5, -1.0, 2.0]);
        assert_eq!(metadata.bool("flag").unwrap(), Some(true));
        assert_eq!(metadata.str("absent").unwrap(), None);
        assert_eq!(metadata.keys().count(), 9);
        let weight = file.require_tensor("weight").unwrap();
        assert_eq!((weight.shape.as_slice(), weight.dtype, weight.nbytes), (&[2, 64][..], GgmlType::Q4_1, 80));
        assert_eq!(file.tensor_data(weight), (0..80).collect::<Vec<u8>>());
        assert_eq!(file.tensor_data(&file.tensors()[0]), (0..12).collect::<Vec<u8>>());
        assert!(file.tensor("absent").is_none());
    }
}

#[test]
fn wrong_types_are_named_with_key_wanted_and_found() {
    let file = open_bytes(&small().bytes()).unwrap();
    let metadata = file.metadata();
    let check = |error: ModelError, parts: &[&str]| {
        let message = error.to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    check(metadata.str("llama.block_count").unwrap_err(), &["llama.block_count", "a string", "U32(2)"]);
    check(metadata.usize("llama.big").unwrap_err(), &["llama.big", "4294967295"]);
    check(metadata.u64("llama.minus").unwrap_err(), &["llama.minus", "I32(-1)"]);
    check(metadata.floats("tokenizer.ggml.tokens").unwrap_err(), &["array of string"]);
    check(metadata.require_f32("gone").unwrap_err(), &["gone", "missing"]);
    check(file.require_tensor("gone").unwrap_err(), &["tensor gone is missing", "model.gguf"]);
}

#[test]
fn what_is_not_a_gguf_file_we_read_is_refused_by_name() {
    let check = |bytes: &[u8], part: &str| {
        let message = refusal(bytes);
        assert!(message.contains(part), "{part:?} not in {message}");
    };
    check(b"", "is empty");
    check(b"GG", "not a GGUF");
    check(b"PK\x03\x04 a zip archive", "not a GGUF file: it starts with \"PK");
    check(b"tjgg old old old", "before GGUF");
    check(b"version https://git-lfs.invalid/spec/v1\noid sha256:0\n", "LFS pointer");
    check(&Gguf { version: 1, ..small() }.bytes(), "version 1");
    check(&Gguf { version: 4, ..small() }.bytes(), "version 4");
    check(&Gguf { version: 3u32.swap_bytes(), ..small() }.bytes(), "big-endian");
    assert!(matches!(GgufFile::open("/nonexistent.gguf"), Err(ModelError::Source(_))));
    assert!(matches!(GgufFile::open("/"), Err(ModelError::Source(_))));
}

#[test]
fn lies_in_the_header_are_refused_with_the_reason() {
    let check = |file: Gguf, parts: &[&str]| {
        let message = refusal(&file.bytes());
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    let array = |id: u32, count: u64| Value::Raw(9, [&id.to_le_bytes()[..], &count.to_le_bytes()].concat());
    let huge = || Value::Raw(8, u64::MAX.to_le_bytes().to_vec());
    check(small().set("k", huge()), &["metadata key k", "truncated or corrupt"]);
    check(small().set("k", array(8, u64::MAX)), &["metadata key k", "18446744073709551615"]);
    check(small().set("k", array(8, 1 << 33)), &["metadata key k"]);
    check(small().set("k", array(9, 1)), &["array of arrays"]);
    check(small().set("k", array(77, 1)), &["type 77"]);
    check(small().set("k", Value::Raw(99, vec![])), &["metadata key k", "type 99"]);
    check(small().set("general.alignment", Value::U32(0)), &["general.alignment is 0"]);
    check(small().set("general.alignment", Value::U32(48)), &["general.alignment is 48"]);
    check(small().set("general.alignment", Value::Str("x")), &["general.alignment", "integer"]);
    check(small().tensor("t", &[2, 33], 3, vec![0; 80]), &["tensor t", "33", "Q4_1"]);
    check(small().tensor("t", &[1], 31, vec![0; 4]), &["tensor t", "Q4_0_4_4"]);
    check(small().tensor("t", &[1], 999, vec![0; 4]), &["tensor t", "999"]);
    check(small().tensor("t", &[0], 0, vec![]), &["tensor t", "dimension of 0"]);
    check(small().tensor("t", &[], 0, vec![]), &["tensor t", "0 dimensions"]);
    check(small().tensor("t", &[1; 5], 0, vec![0; 4]), &["tensor t", "5 dimensions"]);
    check(small().tensor("t", &[u64::MAX, 2], 0, vec![]), &["tensor t", "impossible shape"]);
    check(small().tensor("t", &[1 << 40], 0, vec![]), &["tensor t", "beyond the file's end"]);
    check(small().tensor("norm", &[3], 0, vec![0; 12]), &["tensor norm", "twice"]);
    check(small().set("", Value::Bool(true)), &["0 bytes long"]);
}

#[test]
fn twice_the_same_key_and_overlapping_tensors_are_refused() {
    let file = Gguf::new().set("a", Value::U32(1)).set("b", Value::U32(1)).bytes();
    let at = file.windows(9).position(|w| w == b"\x01\0\0\0\0\0\0\0b").unwrap();
    let mut twice = file.clone();
    twice[at + 8] = b'a';
    assert!(refusal(&twice).contains("metadata key a is there twice"));
    let two = Gguf::new().zeros("t", &[8]).zeros("u", &[8]).bytes();
    let mut overlapping = two.clone();
    // The offset of u, the last thing before the data.
    let name = two.windows(9).position(|w| w == b"\x01\0\0\0\0\0\0\0u").unwrap();
    let offset = name + 9 + 4 + 8 + 4;
    assert_eq!(overlapping[offset], 32);
    overlapping[offset] = 0;
    assert!(refusal(&overlapping).contains("overlap"));
    overlapping[offset] = 4;
    assert!(refusal(&overlapping).contains("alignment"));
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let whole = small().bytes();
    // All but the padding after the last tensor, which nobody needs.
    let needed = whole.len() - (32 - 80 % 32);
    for len in 0..needed {
        refusal(&whole[..len]);
    }
    assert!(open_bytes(&whole[..needed]).is_ok());
}

#[test]
fn the_default_model_cut_at_every_fiftieth_is_refused() {
    let file = default_model::open();
    let whole = std::fs::read(file.path()).unwrap();
    for fiftieth in 0..50 {
        refusal(&whole[..whole.len() / 50 * fiftieth]);
    }
}

#[test]
fn the_default_model_has_what_its_makers_say() {
    let file = default_model::open();
    assert_eq!(file.tensors().len(), 272);
    let table = file.require_tensor("token_embd.weight").unwrap();
    assert_eq!((table.shape.as_slice(), table.dtype.name()), (&[49_152, 576][..], "Q8_0"));
    assert_eq!(table.nbytes, 30_081_024);
    assert_eq!(file.tensor_data(table).len(), table.nbytes);
    assert_eq!(file.require_tensor("blk.0.attn_k.weight").unwrap().shape, [192, 576]);
}

/// Writes `files` split as their names say.
fn write_split(dir: &Path, count: usize, written: &[usize], total: u32) {
    for &number in written {
        let name = format!("big-{:05}-of-{count:05}.gguf", number + 1);
        let mut file = Gguf::new();
        if number == 0 {
            file = file.set("general.architecture", Value::Str("llama"));
        }
        let file = file
            .set("split.no", Value::U32(number as u32))
            .set("split.count", Value::U32(count as u32))
            .set("split.tensors.count", Value::I32(total as i32))
            .tensor(&format!("t{number}"), &[8], 0, vec![number as u8; 32]);
        std::fs::write(dir.join(name), file.bytes()).unwrap();
    }
}

#[test]
fn any_file_of_a_split_model_opens_them_all() {
    let dir = tempfile::tempdir().unwrap();
    write_split(dir.path(), 3, &[0, 1, 2], 3);
    for number in 1..=3 {
        let file = GgufFile::open(dir.path().join(format!("big-{number:05}-of-00003.gguf"))).unwrap();
        assert_eq!(file.architecture().unwrap(), "llama");
        assert!(file.path().ends_with("big-00001-of-00003.gguf"));
        for (at, info) in file.tensors().iter().enumerate() {
            assert_eq!(info.name, format!("t{at}"));
            assert_eq!(file.tensor_data(info), [at as u8; 32]);
        }
    }
}

#[test]
fn an_incomplete_split_model_is_refused_naming_what_is_wrong() {
    let refused = |write: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path());
        let error = GgufFile::open(dir.path().join("big-00001-of-00003.gguf")).err().unwrap();
        error.to_string()
    };
    let message = refused(&|dir| write_split(dir, 3, &[0, 2], 3));
    assert!(message.contains("file 2 of 3") && message.contains("big-00002-of-00003.gguf"), "{message}");
    let message = refused(&|dir| write_split(dir, 3, &[0, 1, 2], 4));
    assert!(message.contains("split.tensors.count is 4") && message.contains("3 tensors"), "{message}");
    let message = refused(&|dir| {
        write_split(dir, 3, &[0, 1, 2], 3);
        std::fs::copy(dir.join("big-00003-of-00003.gguf"), dir.join("big-00002-of-00003.gguf")).unwrap();
    });
    assert!(message.contains("split.no = Some(2)"), "{message}");
    let message = refused(&|dir| {
        let file = small().set("split.count", Value::U32(5_000_000)).bytes();
        std::fs::write(dir.join("big-00001-of-00003.gguf"), file).unwrap();
    });
    assert!(message.contains("split.count is 5000000"), "{message}");
    let (dir, path) = small().set("split.count", Value::U32(2)).write();
    let message = GgufFile::open(path).err().unwrap().to_string();
    assert!(message.contains("name does not end in"), "{message}");
    drop(dir);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whatever bytes change, opening gives a file whose tensors can all be read, or an error.
    #[test]
    fn flipped_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = small().bytes();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(file) = open_bytes(&bytes) {
            for info in file.tensors() {
                prop_assert_eq!(file.tensor_data(info).len(), info.nbytes);
            }
        }
    }

    #[test]
    fn any_bytes_after_the_magic_never_panic(rest in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(rest);
        let _ = open_bytes(&bytes);
    }
}
