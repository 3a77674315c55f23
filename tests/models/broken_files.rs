//! Model files that are not what they should be: bytes changed and ends cut anywhere give an error or a model that
//! runs, never a panic; types rill does not read and tensors nobody knows are named.

use rill_models::{LoadedModel, ModelError, NoProgress, SourceOptions};
use rill_tests::single_sequence::SingleSequence;
use rill_tests::tiny_gguf::{self, GgufFiles};
use rill_tests::{default_model, tiny_models};
use serde_json::json;
use std::path::Path;

fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn load(path: &Path) -> Result<LoadedModel, ModelError> {
    let files = rill_models::resolve(&path.display().to_string(), &SourceOptions::from_env(), &mut NoProgress)?;
    rill_models::load(&files, &default_model::CPU)
}

/// Loads what can be loaded, and has it answer a few tokens.
fn try_out(path: &Path) -> bool {
    let Ok(loaded) = load(path) else { return false };
    let Ok(mut model) = SingleSequence::new(loaded.model, 16, 16) else { return false };
    model.logits(&[1, 5, 3], 3).is_ok_and(|logits| !logits.is_empty())
}

/// A small generator, so that failures repeat.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// `whole` with a few bytes changed, most of them near the start, where headers are, or with its end cut off.
fn damaged(whole: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    if numbers.below(5) == 0 {
        bytes.truncate(numbers.below(bytes.len()));
        return bytes;
    }
    for _ in 0..=numbers.below(3) {
        let reach = if numbers.below(4) == 0 { bytes.len() } else { bytes.len().min(6000) };
        let at = numbers.below(reach);
        bytes[at] = match numbers.below(3) {
            0 => bytes[at] ^ (1 << numbers.below(8)),
            1 => 0xff,
            _ => numbers.below(256) as u8,
        };
    }
    bytes
}

#[test]
fn damaged_gguf_files_never_panic() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let models = tiny_models::all();
    let mut numbers = Numbers(11);
    let mut files = GgufFiles::new(dir.path());
    let paths = ["llama", "qwen3-moe", "gemma3"].map(|name| {
        let source = dir.path().join(name);
        std::fs::create_dir(&source).expect("a new folder");
        models[name].write_directory(&source, true);
        (name, files.add(&source, json!({})))
    });
    if !files.write("damaged GGUF files", scratch()) {
        return;
    }
    for (name, path) in paths {
        let whole = std::fs::read(&path).expect("just written");
        let mut ran = 0;
        for _ in 0..150 {
            std::fs::write(&path, damaged(&whole, &mut numbers)).expect("written");
            ran += usize::from(try_out(&path));
        }
        println!("{name}: {ran} of 150 ran all the same");
        assert!(ran < 150, "{name}: nothing was damaged");
    }
}

#[test]
fn damaged_safetensors_never_panic() {
    let models = tiny_models::all();
    let mut numbers = Numbers(12);
    for name in ["llama", "gpt2", "mixtral"] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        models[name].write_directory(dir.path(), false);
        for file in ["model.safetensors", "config.json"] {
            let path = dir.path().join(file);
            let whole = std::fs::read(&path).expect("just written");
            let mut ran = 0;
            for _ in 0..100 {
                std::fs::write(&path, damaged(&whole, &mut numbers)).expect("written");
                ran += usize::from(try_out(dir.path()));
            }
            println!("{name}, {file}: {ran} of 100 ran all the same");
            assert!(ran < 100, "{name}: nothing was damaged");
            std::fs::write(&path, whole).expect("written");
        }
    }
}

/// Changes the type of a matrix in a GGUF file's header.
fn retype(bytes: &mut [u8], name: &str, id: u32) {
    let key = [&(name.len() as u64).to_le_bytes()[..], name.as_bytes()].concat();
    let at = bytes.windows(key.len()).position(|window| window == key).expect("the tensor is in the header");
    let at = at + key.len() + 4 + 2 * 8;
    bytes[at..at + 4].copy_from_slice(&id.to_le_bytes());
}

#[test]
fn every_gguf_type_is_read_or_refused_by_name() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let llama = &tiny_models::all()["llama"];
    let Some(path) = tiny_gguf::write("types of GGUF tensors", llama, dir.path(), scratch()) else { return };
    let whole = std::fs::read(&path).expect("just written");
    let with = |id: u32| {
        let mut bytes = whole.clone();
        retype(&mut bytes, "blk.1.ffn_up.weight", id);
        std::fs::write(&path, bytes).expect("written");
        load(&path).map(|_| ()).map_err(|error| error.to_string())
    };
    // F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, BF16, MXFP4: rows of 64 fill their blocks.
    for id in [0, 1, 2, 3, 6, 7, 8, 20, 30, 39] {
        assert_eq!(with(id), Ok(()), "type {id}");
    }
    for (id, name) in [
        (9, "Q8_1"),
        (10, "Q2_K"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (19, "IQ1_S"),
        (24, "I8"),
        (25, "I16"),
        (34, "TQ1_0"),
        (40, "NVFP4"),
        (31, "Q4_0_4_4"),
        (99, "99"),
    ] {
        let error = with(id).expect_err(name);
        assert!(error.contains("blk.1.ffn_up.weight") && error.contains(name), "{name}: {error}");
    }
}

#[test]
fn tensors_of_other_parts_are_left_out() {
    let mut models = tiny_models::all();
    let model = models.get_mut("llama").expect("in the fixture");
    model.tensors.insert("vision_tower.patch_embedding.weight".to_owned(), vec![16, 16]);
    model.tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), vec![16]);
    let dir = tempfile::tempdir().expect("a temporary directory");
    model.write_directory(dir.path(), true);
    assert!(try_out(dir.path()));
}
