//! Tiny models and their adapters as GGUF files: what models/make_gguf.py is to write, all of it in one run.

use crate::python::Packages;
use crate::tiny_models::TinyModel;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Files to be written into a folder.
pub struct GgufFiles {
    folder: PathBuf,
    jobs: Vec<Value>,
}

impl GgufFiles {
    pub fn new(folder: &Path) -> GgufFiles {
        GgufFiles { folder: folder.to_path_buf(), jobs: Vec::new() }
    }

    /// Where the model in the folder `source` is going to be, as `options` of the script have it.
    pub fn add(&mut self, source: &Path, options: Value) -> PathBuf {
        self.push(json!({"model": source}), options)
    }

    /// Where random blocks of these types are going to be, and what they decode to.
    pub fn add_samples(&mut self, types: &[&str]) -> PathBuf {
        self.push(json!({"samples": types}), json!({}))
    }

    fn push(&mut self, mut job: Value, options: Value) -> PathBuf {
        let path = self.folder.join(format!("{}.gguf", self.jobs.len()));
        let all = job.as_object_mut().expect("an object");
        all.extend(options.as_object().expect("an object").clone());
        all.insert("target".to_owned(), json!(path));
        self.jobs.push(job);
        path
    }

    /// Writes them all with packages installed below `scratch`; false where these could not be had, which skips `test`.
    pub fn write(self, test: &str, scratch: &Path) -> bool {
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
        let Some(packages) = Packages::install(test, &here.join("requirements.txt"), scratch) else {
            return false;
        };
        let jobs = self.folder.join("jobs.json");
        std::fs::write(&jobs, Value::Array(self.jobs).to_string())
            .unwrap_or_else(|error| panic!("{}: {error}", jobs.display()));
        let output = packages.run(&here.join("make_gguf.py"), &[&jobs.display().to_string()]);
        assert!(output.status.success(), "make_gguf.py: {}", output.status);
        true
    }
}

/// One model as one file in f32, where it can be written.
pub fn write(test: &str, model: &TinyModel, folder: &Path, scratch: &Path) -> Option<PathBuf> {
    let mut files = GgufFiles::new(folder);
    model.write_directory(folder, true);
    let path = files.add(folder, json!({}));
    files.write(test, scratch).then_some(path)
}
