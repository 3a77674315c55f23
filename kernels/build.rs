//! Compiles kernels/cuda/*.cu into fat binaries for the crate to embed: where nvcc is, which architectures, and
//! nothing else. Without nvcc the crate is built without CUDA kernels and says so when it is asked for them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs};

/// Machine code for each, and PTX of the first for GPUs that come after. `RILL_CUDA_ARCHS` overrides it.
const ARCHS: &str = "80,86,89,90a";
const ENVIRONMENT: [&str; 6] = ["NVCC", "CUDA_HOME", "CUDA_PATH", "RILL_CUDA_ARCHS", "RILL_REQUIRE_CUDA", "PATH"];

fn main() {
    for name in ENVIRONMENT {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cuda");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let modules = match find_nvcc(&out) {
        Some(nvcc) => compile_all(&nvcc, &out),
        None => Err("no nvcc was found in $NVCC, $CUDA_HOME, $CUDA_PATH, the target directory's cuda-toolchain \
                     (made by .ci/cuda-toolchain), $PATH or /usr/local/cuda"
            .to_owned()),
    };
    let modules = modules.unwrap_or_else(|reason| {
        if env::var("RILL_REQUIRE_CUDA").is_ok_and(|value| value == "1") {
            println!("cargo::error=RILL_REQUIRE_CUDA=1, but CUDA kernels cannot be built: {reason}");
        } else {
            println!("cargo::warning=built without CUDA kernels: {reason}");
        }
        Vec::new()
    });
    let entries: String =
        modules.iter().map(|path| format!("    include_bytes!({:?}),\n", path.display().to_string())).collect();
    let text = format!("&[\n{entries}]\n");
    fs::write(out.join("cuda_modules.rs"), text).expect("the output directory can be written");
}

fn find_nvcc(out: &Path) -> Option<PathBuf> {
    let var = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let mut candidates: Vec<PathBuf> = Vec::new();
    candidates.extend(var("NVCC"));
    candidates.extend(["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(var).map(|home| home.join("bin/nvcc")));
    // $TARGET/[triple/]profile/build/package/out
    for above in out.ancestors().skip(4).take(2) {
        let toolchain = above.join("cuda-toolchain/nvcc-path");
        if let Ok(path) = fs::read_to_string(&toolchain) {
            println!("cargo::rerun-if-changed={}", toolchain.display());
            candidates.push(PathBuf::from(path.trim()));
        }
    }
    if let Some(path) = env::var_os("PATH") {
        candidates.extend(env::split_paths(&path).map(|folder| folder.join("nvcc")));
    }
    candidates.push(PathBuf::from("/usr/local/cuda/bin/nvcc"));
    candidates.into_iter().find(|path| path.is_file())
}

/// One fat binary a source; those whose source, headers, compiler and architectures have not changed are kept.
fn compile_all(nvcc: &Path, out: &Path) -> Result<Vec<PathBuf>, String> {
    let archs = env::var("RILL_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.to_owned());
    let archs: Vec<&str> = archs.split(',').map(str::trim).filter(|arch| !arch.is_empty()).collect();
    let valid = |arch: &&str| arch.trim_end_matches(['a', 'f']).parse::<u32>().is_ok_and(|n| n >= 80);
    let Some(oldest) = archs.first().filter(|_| archs.iter().all(valid)) else {
        return Err(format!("RILL_CUDA_ARCHS={archs:?} is no list of architectures from 80 on, such as {ARCHS}"));
    };
    let mut arguments: Vec<String> =
        ["-fatbin", "-O3", "-std=c++17", "-fmad=false", "-Werror", "all-warnings"].map(str::to_owned).to_vec();
    for arch in &archs {
        arguments.push(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    let ptx = oldest.trim_end_matches(['a', 'f']);
    arguments.push(format!("-gencode=arch=compute_{ptx},code=compute_{ptx}"));

    let read = |path: &Path| fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()));
    let mut sources: Vec<PathBuf> = fs::read_dir("cuda")
        .map_err(|error| format!("kernels/cuda: {error}"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    sources.sort();
    let is = |path: &&PathBuf, wanted: &str| path.extension().is_some_and(|extension| extension == wanted);
    let mut headers = String::new();
    for header in sources.iter().filter(|path| is(path, "cuh")) {
        headers += &read(header)?;
    }
    let compile = |source: &PathBuf| -> Result<PathBuf, String> {
        let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let (module, stamp) = (out.join(format!("{name}.fatbin")), out.join(format!("{name}.stamp")));
        let made_of = format!("{}\n{arguments:?}\n{headers}\n{}", nvcc.display(), read(source)?);
        if !module.is_file() || fs::read_to_string(&stamp).ok().as_deref() != Some(&made_of) {
            let run = Command::new(nvcc).args(&arguments).arg("-o").arg(&module).arg(source).output();
            let run = run.map_err(|error| format!("{}: {error}", nvcc.display()))?;
            if !run.status.success() {
                // A compiler that is there and does not compile our kernels is an error, not a missing compiler.
                let said =
                    String::from_utf8_lossy(&run.stderr).into_owned() + &String::from_utf8_lossy(&run.stdout);
                for line in said.lines() {
                    println!("cargo::warning={line}");
                }
                println!("cargo::error={} does not compile {}", nvcc.display(), source.display());
            }
            fs::write(&stamp, made_of).map_err(|error| format!("{}: {error}", stamp.display()))?;
        }
        Ok(module)
    };
    // The longest take as long as all others together: each goes to the next thread that is free.
    let sources: Vec<&PathBuf> = sources.iter().filter(|path| is(path, "cu")).collect();
    let (next, compile, sources) = (AtomicUsize::new(0), &compile, &sources);
    let work = &|| {
        let mut done = Vec::new();
        while let Some(&source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push(compile(source));
        }
        done
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut modules: Vec<PathBuf> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        running
            .into_iter()
            .flat_map(|thread| thread.join().expect("no compilation panics"))
            .collect::<Result<_, _>>()
    })?;
    modules.sort();
    Ok(modules)
}
