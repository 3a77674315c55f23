//! Node packages for tests of real clients: pinned in a package.json, installed by the user's own npm into the target
//! folder, once.

use crate::environment;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder with installed packages.
pub struct NodePackages {
    folder: PathBuf,
}

impl NodePackages {
    /// Installs what `package_json` pins below `scratch`. `None` where npm could not, which is a failure in CI and a loud
    /// skip elsewhere.
    pub fn install(test: &str, package_json: &Path, scratch: &Path) -> Option<NodePackages> {
        let wanted = std::fs::read_to_string(package_json)
            .unwrap_or_else(|error| panic!("{}: {error}", package_json.display()));
        let folder = scratch.join("node");
        let installed = folder.join("installed-package.json");
        if std::fs::read_to_string(&installed).is_ok_and(|found| found == wanted) {
            return Some(NodePackages { folder });
        }
        if folder.exists() {
            std::fs::remove_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        }
        let write = |path: &Path| {
            std::fs::write(path, &wanted).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        };
        std::fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        write(&folder.join("package.json"));
        // Versions are exact and the packages have no dependencies, so that a lock would pin nothing more.
        let output = Command::new("npm")
            .args(["install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"])
            .args(["--no-update-notifier", "--fetch-retries", "1", "--loglevel", "error"])
            .current_dir(&folder)
            .output();
        let failure = match output {
            Ok(output) if output.status.success() => {
                write(&installed);
                return Some(NodePackages { folder });
            }
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => format!("npm: {error}"),
        };
        environment::skip(test, &format!("npm could not install {}: {failure}", package_json.display()));
        None
    }

    /// Runs a CommonJS script to its end; its output is shown with the test's.
    pub fn run(&self, script: &Path, arguments: &[&str]) -> Output {
        let output = Command::new("node")
            .arg(script)
            .args(arguments)
            .env("NODE_PATH", self.folder.join("node_modules"))
            // A proxy or a key of the user's is none of the test's business.
            .env("NO_PROXY", "*")
            .env_remove("OPENAI_API_KEY")
            .env_remove("OPENAI_BASE_URL")
            .output()
            .unwrap_or_else(|error| panic!("node: {error}"));
        println!("{}", String::from_utf8_lossy(&output.stdout));
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        output
    }
}
