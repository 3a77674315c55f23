//! Flags and what they mean.

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    serve: ServeFlags,
}

const MACHINE: Machine = Machine { cores: 6, available_bytes: 16 << 30 };

fn config(arguments: &str) -> Result<ServeConfig, ConfigError> {
    let arguments = ["rill"].into_iter().chain(arguments.split_whitespace());
    ServeConfig::new(Flags::try_parse_from(arguments).unwrap().serve, &MACHINE)
}

#[test]
fn defaults() {
    let config = config("").unwrap();
    assert_eq!(config.address.to_string(), "127.0.0.1:8000");
    assert_eq!(config.threads, 6);
    assert_eq!(config.engine.kv_cache_bytes, KvCacheBytes::QuarterOf(16 << 30));
    assert_eq!(config.app.cors, CorsPolicy::Local);
    assert_eq!(config.app.body.bytes_max, 8 << 20);
    assert!(!config.app.keys.required() && !config.app.trust_request_chat_template);
}

#[test]
fn flags_are_checked() {
    for (arguments, message) in [
        ("--threads 0", "--threads: must be between 1 and 1024, not 0"),
        ("--max-running 0", "--max-running: must be between 1 and 4096, not 0"),
        ("--max-queue 0", "--max-queue: must be between"),
        ("--lora adapter", "--lora: must be NAME=PATH, not adapter"),
        ("--lora =path", "--lora: must be NAME=PATH, not =path"),
        ("--max-loras 0", "--max-loras: must be between 1 and 4096, not 0"),
        ("--max-lora-rank 0", "--max-lora-rank: must be between 1 and 4096, not 0"),
        ("--block-size 0", "--block-size: must be between"),
        ("--max-connections 0", "--max-connections: must be between"),
        (
            "--max-running 64 --max-batch-tokens 63",
            "--max-batch-tokens: must be at least --max-running, 64, not 63",
        ),
        ("--kv-cache-memory lots", "--kv-cache-memory: must be a size such as 512MiB or 2GiB, not lots"),
        ("--kv-cache-memory 0", "--kv-cache-memory: must be a size"),
        ("--kv-cache-memory 2PiB", "--kv-cache-memory: must be a size"),
        ("--max-body 10", "--max-body: must be between 1KiB and 1GiB, not 10"),
        ("--host example", "--host: must be an IP address"),
        ("--cors-origin example", "--cors-origin: must be `*` or an origin"),
        ("--cors-origin http://a.example/", "--cors-origin: must be `*` or an origin"),
        ("--api-key-file /nowhere/keys", "--api-key-file: /nowhere/keys: No such file"),
        ("--metrics-host 127.0.0.1", "--metrics-host: needs --metrics-port"),
        ("--metrics-port 1 --metrics-host example", "--metrics-host: must be an IP address"),
        ("--api-key a,,b", "--api-key: must not be empty"),
    ] {
        let error = config(arguments).map(|_| arguments).unwrap_err().to_string();
        assert!(error.contains(message), "{arguments}: {error}");
    }
}

#[test]
fn sizes() {
    for (text, expected) in [
        ("4096", 4096),
        ("1KiB", 1024),
        ("64k", 64 << 10),
        ("512MiB", 512 << 20),
        ("512 MB", 512 << 20),
        ("1.5G", 3 << 29),
        (" 2gib ", 2 << 30),
    ] {
        assert_eq!(bytes("x", text), Ok(expected), "{text}");
    }
    for text in ["", "GiB", "-1", "1.2.3", "1e9", "2 apples", "NaN", "99999999T"] {
        assert!(bytes("x", text).is_err(), "{text}");
    }
}

#[test]
fn the_cache_is_sized_from_the_machine_and_the_model() {
    // 16 tokens of 1 KiB a block; 64 sequences of 2,048 tokens need 8,192 blocks, 128 MiB.
    let engine = config("").unwrap().engine;
    assert_eq!(engine.blocks(1024, 2048, None), Ok(8192));
    // A quarter of 16 GiB where the model could use more.
    assert_eq!(engine.blocks(1 << 20, 1 << 20, None), Ok(256));
    let exact = config("--kv-cache-memory 1MiB").unwrap().engine;
    assert_eq!(exact.blocks(1024, 2048, None), Ok(64));
    let error = exact.blocks(1 << 20, 2048, None).unwrap_err().to_string();
    assert!(error.contains("1048576 bytes hold no block of 16 tokens, which takes 16777216 bytes"), "{error}");
}

#[test]
fn metrics_go_where_they_are_told_to() {
    let address = |arguments: &str| config(arguments).unwrap().metrics_address.map(|address| address.to_string());
    assert_eq!(address(""), None);
    assert_eq!(address("--host 0.0.0.0 --metrics-port 9000").as_deref(), Some("0.0.0.0:9000"));
    assert_eq!(address("--metrics-port 9000 --metrics-host ::1").as_deref(), Some("[::1]:9000"));
}

#[test]
fn origins_and_keys() {
    assert_eq!(config("--cors-origin *").unwrap().app.cors, CorsPolicy::Any);
    let two = config("--cors-origin http://a.example,http://b.example").unwrap().app.cors;
    assert!(matches!(two, CorsPolicy::Only(origins) if origins.len() == 2));
    let keys = config("--api-key one --api-key two").unwrap().app.keys;
    let names: Vec<String> = keys.accounts().iter().map(|account| account.name().to_string()).collect();
    assert_eq!(names, ["api-key-1", "api-key-2"]);
}

#[test]
fn the_instructions_are_this_processors_or_refused() {
    use rill_models::{Isa, Runner};
    assert_eq!(config("").unwrap().isa, None);
    assert_eq!(config("").unwrap().runner, Runner::Auto);
    assert_eq!(config("--runner candle").unwrap().runner, Runner::Candle);
    assert_eq!(config("--isa portable").unwrap().isa, Some(Isa::Portable));
    for (name, isa) in [
        ("avx512-bf16", Isa::Avx512Bf16),
        ("avx512", Isa::Avx512),
        ("avx-vnni", Isa::AvxVnni),
        ("avx2", Isa::Avx2),
        ("neon-dot", Isa::NeonDot),
        ("neon", Isa::Neon),
    ] {
        match config(&format!("--isa {name}")) {
            Ok(config) => assert!(isa.available() && config.isa == Some(isa)),
            Err(error) => {
                assert!(!isa.available());
                let expected = format!("--isa: this processor has no {}", isa.name());
                assert!(error.to_string().starts_with(&expected), "{error}");
            }
        }
    }
}

#[test]
fn memory_to_plan_with() {
    assert_eq!(config("").unwrap().memory_bytes, 16 << 30);
    let config = config("--memory 4GiB").unwrap();
    assert_eq!((config.memory_bytes, config.engine.kv_cache_bytes), (4 << 30, KvCacheBytes::QuarterOf(4 << 30)));
}
