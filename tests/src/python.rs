//! Python packages that tests run: pinned, installed by the user's own pip into the target folder, once.

use crate::environment;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

/// Tests of one binary run at once; one of them installs.
static INSTALLING: Mutex<()> = Mutex::new(());

/// A folder of installed packages, for PYTHONPATH.
pub struct Packages {
    folder: PathBuf,
}

impl Packages {
    /// Installs what `requirements` (a file) pins below `scratch`: these and no others, so it names their dependencies as
    /// well. `None` where pip could not, which is a failure in CI and a loud skip elsewhere.
    pub fn install(test: &str, requirements: &Path, scratch: &Path) -> Option<Packages> {
        let _one = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = std::fs::read_to_string(requirements)
            .unwrap_or_else(|error| panic!("{}: {error}", requirements.display()));
        // Each list has a folder of its own, by where it lies.
        let owner = requirements.parent().and_then(Path::file_name).expect("a file in a folder");
        let folder = scratch.join(format!("python-{}", owner.to_string_lossy()));
        let installed = folder.join("installed-requirements.txt");
        if std::fs::read_to_string(&installed).is_ok_and(|found| found == wanted) {
            return Some(Packages { folder });
        }
        if folder.exists() {
            std::fs::remove_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        }
        let output = Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"])
            .args(["--no-compile", "--retries", "1", "--timeout", "15", "--target"])
            .arg(&folder)
            .arg("--requirement")
            .arg(requirements)
            .output();
        let failure = match output {
            Ok(output) if output.status.success() => {
                std::fs::write(&installed, wanted)
                    .unwrap_or_else(|error| panic!("{}: {error}", installed.display()));
                return Some(Packages { folder });
            }
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => format!("python3: {error}"),
        };
        environment::skip(test, &format!("pip could not install {}: {failure}", requirements.display()));
        None
    }

    /// Runs a script to its end; its output is shown with the test's.
    pub fn run(&self, script: &Path, arguments: &[&str]) -> Output {
        let output = Command::new("python3")
            .arg(script)
            .args(arguments)
            .env("PYTHONPATH", &self.folder)
            .env("PYTHONPYCACHEPREFIX", self.folder.join("pycache"))
            // Whatever a package would look up on the network, and where it would leave files.
            .env("HF_HOME", self.folder.join("hf-home"))
            .env("HF_HUB_OFFLINE", "1")
            .env("LITELLM_LOCAL_MODEL_COST_MAP", "True")
            // A proxy or a key of the user's is none of the test's business.
            .env("NO_PROXY", "*")
            .env_remove("OPENAI_API_KEY")
            .env_remove("OPENAI_BASE_URL")
            .output()
            .unwrap_or_else(|error| panic!("python3: {error}"));
        println!("{}", String::from_utf8_lossy(&output.stdout));
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        output
    }
}
