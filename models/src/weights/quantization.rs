//! What a checkpoint's configuration says about how its weights are quantised (`quantization_config`), in the spellings
//! of the tools that write it. What rill does not read is refused by name; sizes are taken from the tensors themselves.

use crate::ModelError;
use serde_json::Value;
use std::path::Path;

/// The conventions a checkpoint's codes follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// Frantar et al. 2022, arXiv:2210.17323. Zero points are stored less `zero_offset`.
    Gptq { group_size: Option<usize>, zero_offset: u8 },
    /// Lin et al. 2023, arXiv:2306.00978, in the order of its GEMM kernel.
    Awq,
    /// Bytes and packed words with scales beside them; scales of so many rows × columns where they form a grid.
    Scaled { block: Option<[usize; 2]> },
}

/// The method, and what to call it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Quantization {
    pub method: Method,
    pub name: String,
    /// Of codes in 32-bit words, by the configuration; where there are several kinds, of one of them.
    pub word_bits: usize,
    /// Columns were quantised in an order of their own.
    pub reordered: bool,
}

/// Formats of compressed-tensors that are codes and scales.
const COMPRESSED: [&str; 6] =
    ["pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense"];

impl Quantization {
    /// Of the model in `dir`; `None` where its weights are floats.
    pub(super) fn from_dir(dir: &Path) -> Result<Option<Quantization>, ModelError> {
        let config = dir.join("config.json");
        let root = read(&config)?;
        let found = [&root, &root["text_config"]]
            .into_iter()
            .flat_map(|object| [&object["quantization_config"], &object["compression_config"]])
            .find(|value| value.is_object());
        if let Some(value) = found {
            let method = text(value, "quant_method").map(str::to_ascii_lowercase);
            let method = method.ok_or("quantization_config has no quant_method".to_owned());
            return method
                .and_then(|method| parse(value, &method))
                .map(Some)
                .map_err(|reason| unsupported(&config, &reason));
        }
        // What the tools' first versions wrote.
        for (file, method) in [("quantize_config.json", "gptq"), ("quant_config.json", "awq")] {
            let path = dir.join(file);
            if path.is_file() {
                let value = read(&path)?;
                return parse(&value, method).map(Some).map_err(|reason| unsupported(&path, &reason));
            }
        }
        Ok(None)
    }
}

fn read(path: &Path) -> Result<Value, ModelError> {
    let bytes = std::fs::read(path).map_err(|error| ModelError::Source(format!("{}: {error}", path.display())))?;
    serde_json::from_slice(&bytes).map_err(|error| ModelError::Format {
        path: path.display().to_string(),
        reason: format!("is not valid JSON: {error}"),
    })
}

fn unsupported(path: &Path, reason: &str) -> ModelError {
    ModelError::Unsupported(format!("{}: {reason}", path.display()))
}

fn text<'a>(value: &'a Value, name: &str) -> Option<&'a str> {
    value.get(name)?.as_str()
}

/// `field` is `given`, which is none of `taken`.
fn refuse(field: &str, given: impl std::fmt::Display, taken: &str) -> String {
    format!("quantization_config's {field} {given} is not supported ({taken})")
}

fn parse(value: &Value, method: &str) -> Result<Quantization, String> {
    let quantization = |method: Method, name: String, word_bits: usize| {
        let reordered =
            value["desc_act"].as_bool() == Some(true) && value["static_groups"].as_bool() != Some(true);
        Ok(Quantization { method, name, word_bits, reordered })
    };
    match method {
        "gptq" => {
            let bits = bits(value, "bits")?;
            if !matches!(bits, 4 | 8) {
                return Err(refuse("bits", bits, "4 and 8 are"));
            }
            // Newer files spell it `format`.
            let format = text(value, "checkpoint_format").or(text(value, "format")).unwrap_or("gptq");
            let zero_offset = match format {
                "gptq" => 1,
                "gptq_v2" => 0,
                other => return Err(refuse("checkpoint_format", other, "gptq and gptq_v2 are")),
            };
            if value["is_marlin_format"].as_bool() == Some(true) {
                return Err(refuse("is_marlin_format", true, "the files of gptq and gptq_v2 are"));
            }
            if let Some(other) = text(value, "pack_dtype").filter(|&dtype| dtype != "int32") {
                return Err(refuse("pack_dtype", other, "int32 is"));
            }
            let group_size = value["group_size"].as_u64().filter(|&size| size > 0).map(|size| size as usize);
            quantization(Method::Gptq { group_size, zero_offset }, format!("GPTQ {bits}-bit"), bits as usize)
        }
        "awq" => {
            let bits = bits(value, if value["bits"].is_null() { "w_bit" } else { "bits" })?;
            if bits != 4 {
                return Err(refuse("bits", bits, "4 are, for AWQ"));
            }
            let version = text(value, "version").unwrap_or("gemm").to_ascii_lowercase();
            if version != "gemm" {
                return Err(refuse("version", version, "gemm is"));
            }
            if value["zero_point"].as_bool() == Some(false) {
                return Err(refuse("zero_point", false, "true is"));
            }
            quantization(Method::Awq, "AWQ 4-bit".to_owned(), 4)
        }
        "fp8" | "fbgemm_fp8" => {
            if let Some(other) = text(value, "fmt").filter(|&format| format != "e4m3") {
                return Err(refuse("fmt", other, "e4m3 is"));
            }
            let block = block(&value["weight_block_size"], "weight_block_size")?;
            quantization(Method::Scaled { block }, "FP8".to_owned(), 8)
        }
        "compressed-tensors" => compressed(value),
        other => Err(refuse("quant_method", other, "gptq, awq, fp8, fbgemm_fp8 and compressed-tensors are")),
    }
}

fn bits(value: &Value, name: &str) -> Result<u64, String> {
    value[name].as_u64().ok_or_else(|| format!("quantization_config's {name} is missing or no number"))
}

/// `[128, 128]` or `"128x128"`.
fn block(value: &Value, name: &str) -> Result<Option<[usize; 2]>, String> {
    let sizes: Option<Vec<usize>> = match value {
        Value::Null => return Ok(None),
        Value::String(text) => text.split('x').map(|part| part.parse().ok()).collect(),
        Value::Array(list) => list.iter().map(|size| size.as_u64().map(|size| size as usize)).collect(),
        _ => None,
    };
    match sizes.as_deref() {
        Some(&[rows, cols]) if rows > 0 && cols > 0 => Ok(Some([rows, cols])),
        _ => Err(refuse(name, value, "two sizes are")),
    }
}

fn compressed(value: &Value) -> Result<Quantization, String> {
    let check_format = |object: &Value| match text(object, "format") {
        Some(format) if !COMPRESSED.contains(&format) => {
            Err(refuse("format", format, &format!("{} are", COMPRESSED.join(", "))))
        }
        _ => Ok(()),
    };
    check_format(value)?;
    if let Some(sparsity) = text(&value["sparsity_config"], "format").filter(|&format| format != "dense") {
        return Err(refuse("sparsity_config", sparsity, "dense weights are"));
    }
    if value["transform_config"].as_object().is_some_and(|transforms| !transforms.is_empty()) {
        return Err(refuse("transform_config", "with entries", "weights without rotations are"));
    }
    let groups = value["config_groups"].as_object().filter(|groups| !groups.is_empty());
    let groups = groups.ok_or("quantization_config has no config_groups")?;
    let (mut block_size, mut kinds, mut word_bits, mut reordered) = (None, Vec::new(), 8, false);
    for (name, group) in groups {
        check_format(group)?;
        if !group["output_activations"].is_null() {
            return Err(refuse(&format!("{name}.output_activations"), "of quantised outputs", "null is"));
        }
        let weights = &group["weights"];
        let kind = text(weights, "type").unwrap_or("int");
        let bits = bits(weights, "num_bits")?;
        if !matches!((kind, bits), ("int", 4 | 8) | ("float", 8)) {
            let given = format!("{kind} {bits}");
            return Err(refuse(&format!("{name}.weights of type"), given, "int 4, int 8 and float 8 are"));
        }
        if weights["dynamic"].as_bool() == Some(true) {
            return Err(refuse(&format!("{name}.weights.dynamic"), true, "false is"));
        }
        let strategy = text(weights, "strategy").unwrap_or("tensor");
        if !["tensor", "channel", "group", "block"].contains(&strategy) {
            return Err(refuse(
                &format!("{name}.weights.strategy"),
                strategy,
                "tensor, channel, group, block are",
            ));
        }
        block_size = block_size.or(block(&weights["block_structure"], "block_structure")?);
        let kind = match kind {
            "float" => "FP8".to_owned(),
            _ => format!("int{bits}"),
        };
        word_bits = word_bits.min(bits as usize);
        reordered |= matches!(text(weights, "actorder"), Some("group")) || weights["actorder"] == true;
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let name = format!("compressed-tensors {}", kinds.join(" and "));
    Ok(Quantization { method: Method::Scaled { block: block_size }, name, word_bits, reordered })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn found(value: Value) -> Result<Option<Quantization>, String> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(dir.path().join("config.json"), json!({"quantization_config": value}).to_string())
            .expect("written");
        Quantization::from_dir(dir.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn each_tool_is_understood() {
        let check = |value, method, name: &str| {
            let found = found(value).expect("it is read").expect("it is quantised");
            assert_eq!((found.method, found.name.as_str()), (method, name));
        };
        let gptq = |zero_offset, group_size| Method::Gptq { group_size, zero_offset };
        check(json!({"quant_method": "gptq", "bits": 4, "group_size": 128}), gptq(1, Some(128)), "GPTQ 4-bit");
        check(
            json!({"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"}),
            gptq(0, None),
            "GPTQ 8-bit",
        );
        check(json!({"quant_method": "awq", "bits": 4, "version": "GEMM"}), Method::Awq, "AWQ 4-bit");
        check(
            json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}),
            Method::Scaled { block: Some([128, 128]) },
            "FP8",
        );
        let group = json!({"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}});
        check(
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}}),
            Method::Scaled { block: None },
            "compressed-tensors int4",
        );
        assert_eq!(found(Value::Null), Ok(None));
    }

    #[test]
    fn first_versions_kept_it_in_files_of_their_own() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(dir.path().join("config.json"), "{}").expect("written");
        let old = json!({"w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": true});
        std::fs::write(dir.path().join("quant_config.json"), old.to_string()).expect("written");
        let found = Quantization::from_dir(dir.path()).expect("it is read");
        assert_eq!(found.map(|q| q.method), Some(Method::Awq));
    }

    #[test]
    fn all_else_is_refused_by_name() {
        let check = |value: Value, parts: &[&str]| {
            let error = found(value).expect_err("it is not read");
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
        check(
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
            &["bitsandbytes", "compressed-tensors"],
        );
        check(json!({"bits": 4}), &["quant_method"]);
        check(json!({"quant_method": "gptq", "bits": 3}), &["bits 3", "4 and 8"]);
        check(json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}), &["marlin", "gptq_v2"]);
        check(json!({"quant_method": "awq", "bits": 4, "version": "gemv"}), &["gemv", "gemm"]);
        check(json!({"quant_method": "fp8", "fmt": "e5m2"}), &["e5m2"]);
        let group = |weights: Value| json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}});
        check(group(json!({"num_bits": 4, "type": "float"})), &["group_0", "float 4"]);
        check(group(json!({"num_bits": 8, "strategy": "tensor_group"})), &["tensor_group"]);
        check(json!({"quant_method": "compressed-tensors", "format": "marlin-24"}), &["marlin-24"]);
    }
}
