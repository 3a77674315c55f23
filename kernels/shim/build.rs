//! Compiles the CUDA sources as C++ against the SIMT shim, as they are, under sanitizers, and with each bug the tests
//! plant, into shared objects that tests open.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Sound, sanitized, and with one bug each: kernels/cuda/attention.cuh and linear_staged.cuh.
const VARIANTS: [(&str, &[&str]); 5] = [
    ("sound", &[]),
    // Run once and briefly: compiling is what takes time.
    (
        "sanitized",
        &["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    ),
    ("missing_sync", &["-O1", "-DPLANT_MISSING_SYNC"]),
    ("stride", &["-O1", "-DPLANT_STRIDE"]),
    ("block_table", &["-O1", "-DPLANT_BLOCK_TABLE"]),
];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cpp");
    println!("cargo::rerun-if-changed=../cuda");
    let mut sources: Vec<PathBuf> = fs::read_dir("../cuda")
        .expect("kernels/cuda is beside this crate")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    std::thread::scope(|scope| {
        for (name, flags) in VARIANTS {
            // The bugs are looked for with one kind of cache, and of weights.
            let planted = flags.iter().any(|flag| flag.starts_with("-DPLANT"));
            let wanted =
                |path: &Path| path.ends_with("attention_bf16.cu") || path.ends_with("linear_quantised.cu");
            let chosen: Vec<&PathBuf> = sources.iter().filter(|path| !planted || wanted(path)).collect();
            let out = &out;
            scope.spawn(move || compile(out, name, &chosen, flags));
        }
    });
}

/// One translation unit: the scheduler and all sources.
fn compile(out: &Path, name: &str, sources: &[&PathBuf], flags: &[&str]) {
    let unit = out.join(format!("{name}.cpp"));
    let folder = env::current_dir().expect("cargo runs build scripts in the package");
    let mut text = format!("#include \"{}\"\n", folder.join("cpp/simt.cpp").display());
    for source in sources {
        text += &format!("#include \"{}\"\n", folder.join(source).display());
    }
    fs::write(&unit, text).expect("the output directory can be written");
    // Where the sanitizer's runtime lies, which a test must load before anything else.
    let compiler = cc::Build::new().cpp(true).opt_level(3).cargo_metadata(false).get_compiler();
    let runtime = Command::new(compiler.path()).arg("-print-file-name=libasan.so").output();
    let runtime =
        runtime.map(|found| String::from_utf8_lossy(&found.stdout).trim().to_owned()).unwrap_or_default();
    println!("cargo::rustc-env=RILL_SANITIZER_RUNTIME={runtime}");
    let status = Command::new(compiler.path())
        // Contraction would round where the kernels do not; fmaf must be an instruction to be quick.
        .args(["-std=c++17", "-O3", "-g1", "-fPIC", "-shared", "-ffp-contract=off", "-march=native"])
        .args([
            "-ftls-model=initial-exec",
            "-fno-strict-aliasing",
            "-Wall",
            "-Werror",
            "-Wno-unknown-pragmas",
            "-Wno-maybe-uninitialized",
            "-Wno-uninitialized",
        ])
        .args(["-DRILL_SHIM", "-I"])
        .arg(folder.join("cpp"))
        .args(flags)
        .arg("-o")
        .arg(out.join(format!("lib{name}.so")))
        .arg(&unit)
        .status()
        .expect("a C++ compiler is there");
    assert!(status.success(), "{} does not compile", unit.display());
}
