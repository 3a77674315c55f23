//! Repository rules a compiler does not know: every rule reports all offenders at once, each with its file and line.

use std::fs;
use std::path::{Path, PathBuf};

/// Crates in the order of the arrows: each may depend on those after it and on none before it.
const CRATES: [&str; 4] = ["server", "engine", "models", "kernels"];
const LINES_MAX: usize = 900;
/// Files outside kernels/ that may hold `unsafe`, and how often: mapping a file is sound only while nobody truncates
/// it, which the comment there argues.
const UNSAFE_ALLOWED: [(&str, usize); 1] = [("models/src/gguf.rs", 1)];
/// Files that may read the environment: configuration, and nothing after it.
const ENVIRONMENT_ALLOWED: [&str; 3] =
    ["server/src/config.rs", "models/src/source/options.rs", "tests/src/environment.rs"];

struct SourceFile {
    /// Relative to the repository root, with forward slashes.
    path: String,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_path_buf()
}

/// Every source file, in a fixed order; build outputs and hidden folders are left out.
fn sources() -> Vec<SourceFile> {
    let root = root();
    let mut files = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("the repository can be listed") {
            let path = entry.expect("the repository can be listed").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                if !name.starts_with('.') && name != "target" && name != "__pycache__" && name != "node_modules" {
                    folders.push(path);
                }
            } else if ["rs", "py", "cu", "cuh"].iter().any(|wanted| path.extension().is_some_and(|e| e == *wanted))
            {
                let relative =
                    path.strip_prefix(&root).expect("below the root").to_string_lossy().replace('\\', "/");
                let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{relative}: {error}"));
                files.push(SourceFile { path: relative, text });
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(files.len() > 20, "only {} source files were found below {}", files.len(), root.display());
    files
}

/// Lines of `text` with what `//` comments hold and what string literals hold blanked out, so that a rule about code
/// is not tripped by prose. Raw and multi-line strings are followed to their end.
fn code_lines(text: &str) -> Vec<String> {
    #[derive(PartialEq)]
    enum State {
        Code,
        Text,
        RawText(usize),
        BlockComment(usize),
    }
    let chars: Vec<char> = text.chars().collect();
    let at = |index: usize| chars.get(index).copied().unwrap_or('\n');
    let mut out = String::with_capacity(text.len());
    let mut state = State::Code;
    let mut index = 0;
    while index < chars.len() {
        let c = chars[index];
        if c == '\n' {
            out.push('\n');
            index += 1;
            continue;
        }
        match state {
            State::Code => {
                if c == '/' && at(index + 1) == '/' {
                    while index < chars.len() && chars[index] != '\n' {
                        index += 1;
                    }
                    continue;
                }
                if c == '/' && at(index + 1) == '*' {
                    state = State::BlockComment(1);
                    index += 2;
                    continue;
                }
                let word_before = index > 0 && (chars[index - 1].is_alphanumeric() || chars[index - 1] == '_');
                let raw_start =
                    if c == 'r' && (!word_before || at(index - 1) == 'b') { Some(index + 1) } else { None };
                if let Some(start) = raw_start {
                    let hashes = (start..chars.len()).take_while(|i| chars[*i] == '#').count();
                    if at(start + hashes) == '"' {
                        state = State::RawText(hashes);
                        index = start + hashes + 1;
                        continue;
                    }
                }
                if c == '\'' && (at(index + 1) == '\\' || at(index + 2) == '\'') {
                    // A character literal, not a lifetime.
                    index += if at(index + 1) == '\\' { 2 } else { 1 };
                    while index + 1 < chars.len() && at(index + 1) != '\'' && at(index + 1) != '\n' {
                        index += 1;
                    }
                    index += 2;
                    continue;
                }
                if c == '"' {
                    state = State::Text;
                } else {
                    out.push(c);
                }
                index += 1;
            }
            State::Text => {
                if c == '\\' && at(index + 1) != '\n' {
                    index += 2;
                    continue;
                }
                if c == '"' {
                    state = State::Code;
                }
                index += 1;
            }
            State::RawText(hashes) => {
                if c == '"' && (1..=hashes).all(|i| at(index + i) == '#') {
                    state = State::Code;
                    index += hashes;
                }
                index += 1;
            }
            State::BlockComment(depth) => {
                if c == '*' && at(index + 1) == '/' {
                    state = if depth == 1 { State::Code } else { State::BlockComment(depth - 1) };
                    index += 1;
                } else if c == '/' && at(index + 1) == '*' {
                    state = State::BlockComment(depth + 1);
                    index += 1;
                }
                index += 1;
            }
        }
    }
    out.lines().map(str::to_owned).collect()
}

fn has_word(line: &str, word: &str) -> bool {
    let boundary = |c: Option<char>| !c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    line.match_indices(word).any(|(start, _)| {
        boundary(line[..start].chars().next_back()) && boundary(line[start + word.len()..].chars().next())
    })
}

fn report(rule: &str, offenders: &[String]) {
    assert!(offenders.is_empty(), "{rule}:\n  {}", offenders.join("\n  "));
}

#[test]
fn every_file_opens_with_what_belongs_in_it() {
    let mut offenders = Vec::new();
    for file in sources() {
        let mut lines = file.text.lines().skip_while(|line| line.starts_with("#!"));
        let first = lines.next().unwrap_or_default();
        let fine = if file.path.ends_with(".rs") {
            first.starts_with("//! ")
        } else if file.path.ends_with(".py") {
            first.starts_with("\"\"\"") && first.len() > 3
        } else {
            first.starts_with("//") || first.starts_with("/*")
        };
        if !fine {
            offenders.push(format!("{}: opens with {first:?}", file.path));
        }
    }
    report("a file's first line says what belongs in it (//!, a docstring, or a comment in CUDA)", &offenders);
}

#[test]
fn unsafe_code_stays_in_kernels() {
    let mut offenders = Vec::new();
    for file in sources().iter().filter(|file| file.path.ends_with(".rs")) {
        if file.path.starts_with("kernels/") {
            continue;
        }
        let found: Vec<String> = code_lines(&file.text)
            .iter()
            .enumerate()
            .filter(|(_, line)| has_word(line, "unsafe"))
            .map(|(number, line)| format!("{}:{}: {}", file.path, number + 1, line.trim()))
            .collect();
        let allowed = UNSAFE_ALLOWED.iter().find(|(path, _)| *path == file.path).map_or(0, |(_, count)| *count);
        if found.len() > allowed {
            offenders.extend(found);
        }
    }
    report("`unsafe` belongs in kernels/ (and in the function that maps a file)", &offenders);
}

#[test]
fn nothing_is_left_for_later() {
    let markers = ["TODO", "FIXME", "XXX"];
    let macros = ["todo!", "unimplemented!", "dbg!"];
    let mut offenders = Vec::new();
    for file in sources() {
        if file.path == "tests/tidy.rs" {
            continue;
        }
        for (number, line) in file.text.lines().enumerate() {
            if markers.iter().any(|marker| has_word(line, marker)) {
                offenders.push(format!("{}:{}: {}", file.path, number + 1, line.trim()));
            }
        }
        if !file.path.ends_with(".rs") {
            continue;
        }
        for (number, line) in code_lines(&file.text).iter().enumerate() {
            if macros.iter().any(|name| line.contains(name)) || line.contains("allow(dead_code)") {
                offenders.push(format!("{}:{}: {}", file.path, number + 1, line.trim()));
            }
        }
    }
    report("what is not done is refused with an error, not marked for later", &offenders);
}

#[test]
fn files_stay_short() {
    let offenders: Vec<String> = sources()
        .iter()
        .filter(|file| file.text.lines().count() > LINES_MAX)
        .map(|file| format!("{}: {} lines, the limit is {LINES_MAX}", file.path, file.text.lines().count()))
        .collect();
    report("one noun a file", &offenders);
}

/// A closure has no target features. Where the compiler does not inline it, each operation becomes a call, and vectors pass through
/// memory.
#[test]
fn vectors_stay_out_of_closures() {
    let mut offenders = Vec::new();
    let kernels =
        |file: &&SourceFile| file.path.starts_with("kernels/src/cpu/") && !file.path.ends_with("tests.rs");
    for file in sources().iter().filter(kernels) {
        for (number, line) in code_lines(&file.text).iter().enumerate() {
            // What comes after the parameters.
            let body = line.match_indices('|').nth(1).map_or("", |(at, _)| &line[at..]);
            if ["S::", "<S>", "<S,"].iter().any(|operation| body.contains(operation)) {
                offenders.push(format!("{}:{}: {}", file.path, number + 1, line.trim()));
            }
        }
    }
    report("vector operations are called from functions compiled for the ISA, not from closures", &offenders);
}

/// A kernel's source says what it is tested against, and that is there.
#[test]
fn kernels_name_references_that_exist() {
    let reference = std::fs::read_to_string(root().join("kernels/src/reference.rs")).expect("the references");
    let mut offenders = Vec::new();
    for entry in std::fs::read_dir(root().join("kernels/cuda")).expect("the kernels") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let named = text
            .split("reference::")
            .skip(1)
            .map(|rest| rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default());
        let missing = named.filter(|function| !reference.contains(&format!("pub fn {function}(")));
        offenders.extend(missing.map(|function| format!("{name}: there is no reference::{function}")));
        let head = text.lines().take_while(|line| line.starts_with("//")).collect::<String>();
        // Attention's kinds of cache say that attention.cuh has all there is to say.
        if name.ends_with(".cu") && !head.contains("eference") && !head.contains("attention.cuh") {
            offenders.push(format!("{name}: names no reference"));
        }
    }
    report("kernels name references that exist", &offenders);
}

#[test]
fn modules_are_named_after_what_they_hold() {
    let offenders: Vec<String> = sources()
        .iter()
        .filter(|file| {
            file.path.split('/').any(|part| {
                let stem = part.split('.').next().unwrap_or_default();
                ["utils", "util", "common", "helpers", "misc"].contains(&stem)
            })
        })
        .map(|file| file.path.clone())
        .collect();
    report("a module named utils or common holds anything, which is to say nothing", &offenders);
}

#[test]
fn the_environment_is_read_in_configuration_only() {
    let mut offenders = Vec::new();
    for file in sources().iter().filter(|file| file.path.ends_with(".rs")) {
        // Build scripts are told things through the environment and have no other way.
        if ENVIRONMENT_ALLOWED.contains(&file.path.as_str()) || file.path.ends_with("build.rs") {
            continue;
        }
        for (number, line) in code_lines(&file.text).iter().enumerate() {
            if ["env::var", "env::vars", "env::set_var", "env::remove_var"].iter().any(|call| line.contains(call))
            {
                offenders.push(format!("{}:{}: {}", file.path, number + 1, line.trim()));
            }
        }
    }
    report("the environment is read once, in configuration", &offenders);
}

#[test]
fn crates_depend_downwards_only() {
    let mut offenders = Vec::new();
    for (position, name) in CRATES.into_iter().enumerate() {
        let allowed: Vec<String> = CRATES[position + 1..].iter().map(|name| format!("rill-{name}")).collect();
        let manifest =
            fs::read_to_string(root().join(name).join("Cargo.toml")).expect("each crate has a manifest");
        let mut section = "";
        for line in manifest.lines() {
            if line.starts_with('[') {
                section = line.trim();
                continue;
            }
            let dependency = line.split(['=', '.', ' ']).next().unwrap_or_default();
            let ours = dependency.starts_with("rill-");
            let downwards = allowed.iter().any(|name| name == dependency);
            if ours && section.contains("dependencies") && !downwards {
                offenders.push(format!("{name}/Cargo.toml: {dependency} in {section}; allowed: {allowed:?}"));
            }
        }
    }
    // Within the engine the arrows go on: policy and block bookkeeping know nothing of models or of the web.
    for file in sources() {
        let policy = file.path == "engine/src/scheduler.rs" || file.path.starts_with("engine/src/kv/");
        if policy && file.path.ends_with(".rs") {
            for (number, line) in code_lines(&file.text).iter().enumerate() {
                if ["rill_models", "rill_kernels", "flume", "tokio", "Instant", "SystemTime", "std::thread"]
                    .iter()
                    .any(|name| has_word(line, name))
                {
                    offenders.push(format!("{}:{}: {}", file.path, number + 1, line.trim()));
                }
            }
        }
    }
    report(
        "server → engine → models → kernels, never back; the scheduler sees no tensor, clock, thread or socket",
        &offenders,
    );
}

#[test]
fn comments_and_strings_are_not_code() {
    let text = "let a = \"unsafe \\\" x\"; // unsafe\nlet b = r#\"unsafe \" \"#; 'x: loop {}\n/* unsafe\n*/ unsafe {} let c = '\"'; let d = 1;";
    let lines = code_lines(text);
    let found: Vec<usize> = (0..lines.len()).filter(|i| has_word(&lines[*i], "unsafe")).collect();
    assert_eq!(found, [3], "{lines:?}");
    assert!(lines[3].contains("let d = 1"), "{lines:?}");
    assert!(lines[1].contains("'x: loop"), "{lines:?}");
}
