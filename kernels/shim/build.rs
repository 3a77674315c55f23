//! Compiles the CUDA sources as C++ against the SIMT shim, once as they are and once with each bug the tests plant,
//! into shared objects that tests open.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Sound, and with one bug each: kernels/cuda/attention.cu.
const VARIANTS: [(&str, &[&str]); 4] = [
    ("sound", &[]),
    ("missing_sync", &["-DPLANT_MISSING_SYNC"]),
    ("stride", &["-DPLANT_STRIDE"]),
    ("block_table", &["-DPLANT_BLOCK_TABLE"]),
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
    for (name, flags) in VARIANTS {
        // The bugs are in attention alone.
        let chosen = sources.iter().filter(|path| flags.is_empty() || path.ends_with("attention.cu"));
        compile(&out, name, chosen, flags);
    }
}

/// One translation unit: the scheduler and all sources.
fn compile<'a>(out: &Path, name: &str, sources: impl Iterator<Item = &'a PathBuf>, flags: &[&str]) {
    let unit = out.join(format!("{name}.cpp"));
    let folder = env::current_dir().expect("cargo runs build scripts in the package");
    let mut text = format!("#include \"{}\"\n", folder.join("cpp/simt.cpp").display());
    for source in sources {
        text += &format!("#include \"{}\"\n", folder.join(source).display());
    }
    fs::write(&unit, text).expect("the output directory can be written");
    let compiler = cc::Build::new().cpp(true).opt_level(2).cargo_metadata(false).get_compiler();
    let status = Command::new(compiler.path())
        // Contraction would round where the kernels do not; fmaf must be an instruction to be quick.
        .args(["-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-ffp-contract=off", "-march=native"])
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
