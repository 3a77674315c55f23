//! ModelConfig from GGUF metadata and from config.json: every field, every default, every refusal.

use std::path::Path;

use crate::default_model;
use crate::gguf_writer::{Gguf, Value};
use rill_models::{
    Activation, ChatTemplates, FillInTheMiddle, GgufFile, ModelConfig, ModelError, Pooling, RopeConfig,
    RopeScaling, RopeStyle,
};
use serde_json::{Value as Json, json};

fn gguf() -> Gguf {
    Gguf::new()
        .set("general.architecture", Value::Str("llama"))
        .set("llama.embedding_length", Value::U32(64))
        .set("llama.block_count", Value::U32(4))
        .set("llama.attention.head_count", Value::U32(8))
        .set("llama.attention.head_count_kv", Value::U32(2))
        .set("llama.feed_forward_length", Value::U32(128))
        .set("llama.context_length", Value::U32(2048))
        .set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5))
        .set("tokenizer.ggml.tokens", Value::Strs(vec!["a"; 10]))
        .zeros("token_embd.weight", &[10, 64])
}

fn read(file: &Gguf) -> Result<ModelConfig, ModelError> {
    let (_dir, path) = file.write();
    ModelConfig::from_gguf(&GgufFile::open(path)?)
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ModelError>, parts: &[&str]) {
    let message = result.unwrap_err().to_string();
    assert!(parts.iter().all(|part| message.contains(part)), "{parts:?} not in {message}");
}

#[test]
fn the_default_model() {
    let config = ModelConfig::from_gguf(&default_model::open()).unwrap();
    assert_eq!(config.architecture, "llama");
    assert_eq!((config.vocab_size, config.hidden_size, config.layers), (49_152, 576, 30));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (9, 3, 64));
    assert_eq!((config.intermediate_size, config.context_len), (1536, 8192));
    assert_eq!(config.norm_eps, 1e-5);
    let rope = RopeConfig {
        base: 100_000.0,
        dimension_count: 64,
        style: RopeStyle::Interleaved,
        scaling: RopeScaling::None,
    };
    assert_eq!(config.rope, rope);
    assert!(config.tie_embeddings == Some(true) && !config.qkv_bias && !config.mlp_bias);
    assert_eq!((config.bos_token_id, config.pad_token_id), (Some(1), Some(2)));
    // <|im_end|>, and <|endoftext|>, which the file does not name as an end but llama.cpp stops at too.
    assert_eq!(config.eos_token_ids, [2, 0]);
    let template = config.chat_template.unwrap();
    assert!(template.default.unwrap().contains("<|im_start|>") && template.named.is_empty());
}

#[test]
fn a_file_that_says_the_least_gets_the_defaults() {
    let config = read(&gguf()).unwrap();
    assert_eq!((config.head_dim, config.vocab_size), (8, 10));
    assert_eq!((config.rope.base, config.rope.dimension_count), (10_000.0, 8));
    assert_eq!(config.tie_embeddings, Some(true));
    assert_eq!(config.activation, Activation::Silu);
    assert_eq!((config.eos_token_ids.as_slice(), config.chat_template), (&[][..], None));
    let config = read(&gguf().without("llama.attention.head_count_kv").zeros("output.weight", &[10, 64])).unwrap();
    assert_eq!(config.kv_heads, 8);
    assert_eq!(config.tie_embeddings, Some(false));
}

#[test]
fn rope_scaling_in_gguf() {
    let scaling = |file: Gguf| read(&file).unwrap().rope.scaling;
    let typed = |kind| gguf().set("llama.rope.scaling.type", Value::Str(kind));
    let factor = |file: Gguf| file.set("llama.rope.scaling.factor", Value::F32(4.0));
    assert_eq!(scaling(typed("none")), RopeScaling::None);
    assert_eq!(scaling(factor(typed("linear"))), RopeScaling::Linear { factor: 4.0 });
    let old = gguf().set("llama.rope.scale_linear", Value::F32(2.0));
    assert_eq!(scaling(old), RopeScaling::Linear { factor: 2.0 });
    let yarn = factor(typed("yarn")).set("llama.rope.scaling.original_context_length", Value::U32(512));
    let expected = RopeScaling::Yarn {
        factor: 4.0,
        original_context: 512,
        attention_factor: None,
        beta_fast: 32.0,
        beta_slow: 1.0,
    };
    assert_eq!(scaling(yarn), expected);
    let bytes = |values: [f32; 4]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let llama3 = gguf().tensor("rope_freqs.weight", &[4], 0, bytes([1.0, 1.0, 2.0, 8.0]));
    assert_eq!(scaling(llama3), RopeScaling::FreqFactors(vec![1.0, 1.0, 2.0, 8.0]));
    refusal(read(&typed("twisted")), &["rope scaling type", "twisted"]);
    refusal(read(&gguf().zeros("rope_freqs.weight", &[3])), &["3 values", "8 dimensions"]);
    refusal(read(&gguf().zeros("rope_freqs.weight", &[4])), &["frequency factors", "above 0"]);
    let half = gguf().tensor("rope_freqs.weight", &[4], 1, vec![0; 8]);
    refusal(read(&half), &["rope_freqs.weight must be F32"]);
}

#[test]
fn missing_and_absurd_keys_are_named() {
    for key in [
        "general.architecture",
        "llama.embedding_length",
        "llama.block_count",
        "llama.attention.head_count",
        "llama.feed_forward_length",
        "llama.context_length",
    ] {
        refusal(read(&gguf().without(key)), &[key, "missing", "model.gguf"]);
        refusal(read(&gguf().set(key, Value::Bool(true))), &[key, "must be"]);
    }
    refusal(read(&gguf().without("llama.attention.layer_norm_rms_epsilon")), &["layer_norm_epsilon", "missing"]);
    let set = |key: &str, value: u32| read(&gguf().set(key, Value::U32(value)));
    refusal(set("llama.block_count", 0), &["number of layers is 0"]);
    refusal(set("llama.context_length", 0), &["context length is 0"]);
    refusal(set("llama.embedding_length", u32::MAX), &["4294967295"]);
    refusal(set("llama.attention.head_count", 0), &["head_count is 0"]);
    refusal(set("llama.attention.head_count", 7), &["7"]);
    refusal(set("llama.attention.head_count_kv", 3), &["8 attention heads", "3 key/value heads"]);
    refusal(set("llama.attention.head_count_kv", 0), &["key/value heads is 0"]);
    refusal(set("llama.rope.dimension_count", 7), &["rope dimension count is 7"]);
    refusal(set("llama.rope.dimension_count", 16), &["rope dimension count is 16", "head dimension 8"]);
    refusal(set("tokenizer.ggml.eos_token_id", 10), &["end-of-text id 10", "vocabulary of 10"]);
    for eps in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let file = gguf().set("llama.attention.layer_norm_rms_epsilon", Value::F32(eps));
        refusal(read(&file), &["eps"]);
    }
    let uneven = gguf().set("llama.attention.head_count_kv", Value::I32s(vec![2, 2, 1, 2]));
    refusal(read(&uneven), &["head_count_kv", "layer to layer"]);
    let even = gguf().set("llama.attention.head_count_kv", Value::I32s(vec![2; 4]));
    assert_eq!(read(&even).unwrap().kv_heads, 2);
}

#[test]
fn layers_that_do_not_attend_keep_nothing() {
    let lfm2 = |heads: Vec<i32>| {
        let file = gguf()
            .set("general.architecture", Value::Str("lfm2"))
            .set("lfm2.embedding_length", Value::U32(64))
            .set("lfm2.block_count", Value::U32(4))
            .set("lfm2.attention.head_count", Value::U32(8))
            .set("lfm2.attention.head_count_kv", Value::I32s(heads))
            .set("lfm2.feed_forward_length", Value::U32(128))
            .set("lfm2.context_length", Value::U32(2048))
            .set("lfm2.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        read(&file).map(|config| (config.kv_heads, config.attention_layers))
    };
    assert_eq!(lfm2(vec![0, 2, 0, 0]).unwrap(), (2, 1));
    assert_eq!(lfm2(vec![2; 4]).unwrap(), (2, 4));
    for heads in [vec![0; 4], vec![0, 2, 4, 0], vec![0, -2, 0, 0], vec![]] {
        refusal(lfm2(heads), &["head_count_kv", "one number of heads"]);
    }
    let json = |changes: Json| read_json(with(llama_json(), changes)).unwrap().attention_layers;
    let layers = read_json(llama_json()).unwrap().layers;
    assert_eq!(json(json!({})), layers);
    assert_eq!(json(json!({"layer_types": ["conv", "full_attention"]})), layers / 2);
    assert_eq!(json(json!({"block_types": ["recurrent", "attention"]})), layers / 2);
    assert_eq!(json(json!({"layer_types": ["mamba", "linear_attention"]})), 0);
    assert_eq!(json(json!({"full_attn_idxs": [1]})), 1);
    // Python's word for a limit that is none.
    let limit =
        llama_json().to_string().replacen('{', r#"{"time_step_limit": [0.0, Infinity], "low": -Infinity, "#, 1);
    assert!(read_dir_with(&[("config.json", limit)]).is_ok());
}

#[test]
fn every_token_that_ends_a_turn_is_found() {
    let tokens = vec!["x", "<|im_end|>", "<|eot_id|>", "</s>", "<|endoftext|>", "<end_of_turn>"];
    let file = gguf()
        .set("tokenizer.ggml.tokens", Value::Strs(tokens))
        .set("tokenizer.ggml.token_type", Value::I32s(vec![1, 3, 4, 3, 1, 3]))
        .set("tokenizer.ggml.eos_token_id", Value::U32(3))
        .set("tokenizer.ggml.eot_token_id", Value::U32(1));
    // 4 is ordinary text that merely looks like a control token.
    assert_eq!(read(&file).unwrap().eos_token_ids, [3, 1, 2, 5]);
}

#[test]
fn pooling_and_fill_in_the_middle() {
    let plain = read(&gguf()).unwrap();
    assert_eq!((plain.pooling, plain.fill_in_the_middle), (None, None));
    for (number, expected) in
        [(0, None), (1, Some(Pooling::Mean)), (2, Some(Pooling::Cls)), (3, Some(Pooling::Last))]
    {
        let file = gguf().set("llama.pooling_type", Value::U32(number));
        assert_eq!(read(&file).unwrap().pooling, expected, "{number}");
    }
    for keys in [["fim_pre", "fim_suf", "fim_mid"], ["prefix", "suffix", "middle"]] {
        let set = |file: Gguf, (key, id): (&str, u32)| {
            file.set(&format!("tokenizer.ggml.{key}_token_id"), Value::U32(id))
        };
        let two = set(set(gguf(), (keys[0], 5)), (keys[1], 7));
        assert_eq!(read(&two).unwrap().fill_in_the_middle, None, "all three or none");
        let expected = FillInTheMiddle { prefix: 5, suffix: 7, middle: 6 };
        assert_eq!(read(&set(two, (keys[2], 6))).unwrap().fill_in_the_middle, Some(expected));
    }
    let pooled = read_dir_with(&[
        ("config.json", llama_json().to_string()),
        (
            "1_Pooling/config.json",
            r#"{"pooling_mode_cls_token":false,"pooling_mode_mean_tokens":true}"#.to_owned(),
        ),
    ]);
    assert_eq!(pooled.unwrap().pooling, Some(Pooling::Mean));
    // A decoder that sees what follows would be computed as one that does not.
    refusal(read(&gguf().set("llama.attention.causal", Value::Bool(false))), &["llama.attention.causal"]);
    assert!(read(&gguf().set("llama.attention.causal", Value::Bool(true))).is_ok());
    for (value, taken) in [(true, true), (false, false)] {
        let mut json = llama_json();
        json["is_causal"] = value.into();
        let found = read_dir_with(&[("config.json", json.to_string())]);
        assert_eq!(found.is_ok(), taken, "is_causal {value}");
    }
    // What comes after the pooling is told by another file, which also names the folder.
    let with_modules = |kinds: &str, pooling: &str| {
        let modules: Vec<String> = kinds
            .split(' ')
            .enumerate()
            .map(|(index, kind)| {
                format!(
                    r#"{{"idx":{index},"path":"{index}_{kind}","type":"sentence_transformers.models.{kind}"}}"#
                )
            })
            .collect();
        read_dir_with(&[
            ("config.json", llama_json().to_string()),
            ("modules.json", format!("[{}]", modules.join(","))),
            (pooling, r#"{"pooling_mode_lasttoken":true}"#.to_owned()),
        ])
    };
    for (kinds, pooling, expected) in [
        ("Transformer Pooling Normalize", "1_Pooling/config.json", Some(Pooling::Last)),
        ("Transformer Normalize Pooling", "2_Pooling/config.json", Some(Pooling::Last)),
        ("Transformer Pooling Dense", "1_Pooling/config.json", Some(Pooling::Other)),
        ("Transformer Pooling", "2_Pooling/config.json", None),
    ] {
        assert_eq!(with_modules(kinds, pooling).unwrap().pooling, expected, "{kinds}");
    }
}

#[test]
fn gguf_templates_have_names() {
    let file = gguf()
        .set("tokenizer.chat_template", Value::Str("main"))
        .set("tokenizer.chat_templates", Value::Strs(vec!["tool_use"]))
        .set("tokenizer.chat_template.tool_use", Value::Str("tools"));
    let templates = read(&file).unwrap().chat_template.unwrap();
    assert_eq!(templates.default.as_deref(), Some("main"));
    assert_eq!(templates.named["tool_use"], "tools");
    refusal(read(&file.without("tokenizer.chat_template.tool_use")), &["tokenizer.chat_template.tool_use"]);
}

#[test]
fn gguf_families_differ_where_they_must() {
    let family = |arch: &str| {
        let mut file = gguf();
        for (key, _) in &mut file.pairs {
            *key = key.replace("llama.", &format!("{arch}."));
        }
        file.set("general.architecture", Value::Str(arch))
    };
    let qwen2 = read(&family("qwen2").zeros("blk.0.attn_q.bias", &[64])).unwrap();
    assert_eq!((qwen2.rope.style, qwen2.qkv_bias), (RopeStyle::Half, true));
    let gemma2 = family("gemma2").set("gemma2.attention.sliding_window", Value::U32(16));
    let gemma2 = read(&gemma2).unwrap();
    assert_eq!((gemma2.embedding_scale, gemma2.activation), (Some(8.0), Activation::GeluTanh));
    assert_eq!((gemma2.sliding_window, gemma2.norm_weight_offset), (Some(16), 0.0));
    assert_eq!(gemma2.sliding_layers.unwrap(), [true, false, true, false]);
    let pattern = family("gemma3")
        .set("gemma3.attention.sliding_window", Value::U32(16))
        .set("gemma3.attention.sliding_window_pattern", Value::Bools(vec![true, true, false, true]));
    assert_eq!(read(&pattern).unwrap().sliding_layers.unwrap(), [true, true, false, true]);
    let short = pattern.set("gemma3.attention.sliding_window_pattern", Value::Bools(vec![true]));
    refusal(read(&short), &["names 1 layers, the model has 4"]);
}

fn llama_json() -> Json {
    json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 128, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "rope_theta": 500000.0, "tie_word_embeddings": true, "eos_token_id": 2,
        "bos_token_id": 1, "hidden_act": "silu"
    })
}

/// `base` with fields added, replaced, or, where null, removed.
fn with(base: Json, changes: Json) -> Json {
    let mut object = base;
    for (key, value) in changes.as_object().unwrap() {
        object[key] = value.clone();
    }
    object
}

fn read_dir_with(files: &[(&str, String)]) -> Result<ModelConfig, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new(""))).unwrap();
        std::fs::write(path, text).unwrap();
    }
    ModelConfig::from_dir(dir.path())
}

fn read_json(config: Json) -> Result<ModelConfig, ModelError> {
    read_dir_with(&[("config.json", config.to_string())])
}

#[test]
fn llama_from_json() {
    let config = read_json(llama_json()).unwrap();
    assert_eq!(config.architecture, "LlamaForCausalLM");
    assert_eq!((config.vocab_size, config.hidden_size, config.layers, config.head_dim), (100, 64, 4, 8));
    assert_eq!((config.heads, config.kv_heads, config.intermediate_size), (8, 2, 128));
    assert_eq!((config.rope.base, config.rope.style), (500_000.0, RopeStyle::Half));
    assert_eq!((config.eos_token_ids.as_slice(), config.bos_token_id), (&[2][..], Some(1)));
    assert!(config.tie_embeddings == Some(true) && !config.qkv_bias);
    assert_eq!(config.sliding_window, None);
}

#[test]
fn rope_scaling_in_json() {
    let scaling =
        |value: Json| read_json(with(llama_json(), json!({ "rope_scaling": value }))).unwrap().rope.scaling;
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512});
    let expected =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 512 };
    assert_eq!(scaling(llama3.clone()), expected);
    assert_eq!(scaling(json!({"type": "linear", "factor": 2})), RopeScaling::Linear { factor: 2.0 });
    assert_eq!(
        scaling(json!({"type": "dynamic", "factor": 2.0})),
        RopeScaling::Dynamic { factor: 2.0, original_context: 2048 }
    );
    assert_eq!(scaling(Json::Null), RopeScaling::None);
    // The newer layout keeps the base inside.
    let newer = json!({"rope_theta": null, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}});
    assert_eq!(read_json(with(llama_json(), newer)).unwrap().rope.base, 7.0);
    let bad = |value: Json| read_json(with(llama_json(), json!({ "rope_scaling": value })));
    refusal(bad(json!({"rope_type": "spiral"})), &["spiral", "config.json"]);
    refusal(bad(json!({"rope_type": "linear"})), &["factor is missing"]);
    refusal(bad(json!({"rope_type": "linear", "factor": 0})), &["factor is 0"]);
    refusal(bad(with(llama3.clone(), json!({"high_freq_factor": 1.0}))), &["high_freq_factor"]);
    refusal(bad(with(llama3, json!({"original_max_position_embeddings": 0}))), &["original context length is 0"]);
    refusal(
        bad(json!({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]})),
        &["short_factor", "1 values"],
    );
}

#[test]
fn missing_and_wrong_fields_are_named() {
    for field in [
        "architectures",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "rms_norm_eps",
        "max_position_embeddings",
    ] {
        refusal(read_json(with(llama_json(), json!({ field: null }))), &[field, "config.json"]);
        refusal(read_json(with(llama_json(), json!({ field: "x" }))), &[field, "config.json"]);
    }
    refusal(read_json(with(llama_json(), json!({"hidden_act": "wiggle"}))), &["wiggle"]);
    refusal(read_json(with(llama_json(), json!({"eos_token_id": [2, 100]}))), &["end-of-text id 100"]);
    refusal(read_json(with(llama_json(), json!({"num_attention_heads": 0}))), &["num_attention_heads"]);
    refusal(read_dir_with(&[]), &["config.json"]);
    refusal(read_dir_with(&[("config.json", "{".to_owned())]), &["config.json", "not valid JSON"]);
    refusal(read_dir_with(&[("config.json", "[]".to_owned())]), &["must be a JSON object"]);
}

#[test]
fn generation_config_adds_its_ends_and_defaults() {
    let generation =
        json!({"eos_token_id": [7, 2], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": true});
    let files = [("config.json", llama_json().to_string()), ("generation_config.json", generation.to_string())];
    let config = read_dir_with(&files).unwrap();
    assert_eq!(config.eos_token_ids, [7, 2]);
    let sampling = (config.generation.temperature, config.generation.top_p, config.generation.top_k);
    assert_eq!(sampling, (Some(0.6), Some(0.9), Some(20)));
    let bad =
        [("config.json", llama_json().to_string()), ("generation_config.json", r#"{"top_p": "x"}"#.to_owned())];
    refusal(read_dir_with(&bad), &["generation_config.json", "top_p"]);
}

#[test]
fn chat_templates_come_from_three_places() {
    let templates = |extra: &[(&str, &str)]| -> Option<ChatTemplates> {
        let mut files = vec![("config.json", llama_json().to_string())];
        files.extend(extra.iter().map(|&(name, text)| (name, text.to_owned())));
        read_dir_with(&files).unwrap().chat_template
    };
    assert_eq!(templates(&[]), None);
    let config = ("tokenizer_config.json", r#"{"chat_template": "from config"}"#);
    assert_eq!(templates(&[config]).unwrap().default.as_deref(), Some("from config"));
    let list = r#"{"chat_template": [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]}"#;
    let named = templates(&[("tokenizer_config.json", list)]).unwrap();
    assert_eq!((named.default.as_deref(), named.named["rag"].as_str()), (Some("a"), "b"));
    let file = templates(&[config, ("chat_template.jinja", "from file")]).unwrap();
    assert_eq!(file.default.as_deref(), Some("from file"));
    let more = templates(&[("additional_chat_templates/tool_use.jinja", "t")]).unwrap();
    assert_eq!((more.default, more.named["tool_use"].as_str()), (None, "t"));
    let wrong = [
        ("config.json", llama_json().to_string()),
        ("tokenizer_config.json", r#"{"chat_template": 1}"#.to_owned()),
    ];
    refusal(read_dir_with(&wrong), &["tokenizer_config.json", "chat_template"]);
}

#[test]
fn json_families_differ_where_they_must() {
    let family = |name: &str, changes: Json| {
        read_json(with(with(llama_json(), json!({ "architectures": [name] })), changes)).unwrap()
    };
    let qwen2 = family("Qwen2ForCausalLM", json!({"use_sliding_window": false, "sliding_window": 4096}));
    assert_eq!((qwen2.qkv_bias, qwen2.attention_output_bias, qwen2.sliding_window), (true, false, None));
    let qwen3 = family("Qwen3ForCausalLM", json!({"head_dim": 32, "attention_bias": false}));
    assert_eq!((qwen3.head_dim, qwen3.qkv_bias), (32, false));
    let mistral = family("MistralForCausalLM", json!({"sliding_window": 4096}));
    assert_eq!((mistral.sliding_window, mistral.sliding_layers), (Some(4096), None));
    let gemma = json!({"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 8,
        "final_logit_softcapping": 30.0, "tie_word_embeddings": null});
    let gemma2 = family("Gemma2ForCausalLM", gemma);
    assert_eq!((gemma2.norm_weight_offset, gemma2.embedding_scale), (1.0, Some(8.0)));
    assert_eq!((gemma2.attention_scale, gemma2.final_logit_softcap), (Some(0.0625), Some(30.0)));
    assert_eq!(gemma2.sliding_layers.unwrap(), [true, false, true, false]);
    assert_eq!((gemma2.tie_embeddings, gemma2.activation), (None, Activation::GeluTanh));
    // A model that also sees keeps the decoder's fields one level down.
    let mut text = llama_json();
    text.as_object_mut().unwrap().remove("architectures");
    let nested = json!({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text});
    assert_eq!(read_json(nested).unwrap().hidden_size, 64);
}
