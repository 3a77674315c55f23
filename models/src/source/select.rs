//! Which of a repository's or directory's files make the model that was asked for.

use std::collections::BTreeSet;

use serde_json::Value;

/// Says which weight file holds which tensor.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Read where present, beside config.json and tokenizer.json.
const OPTIONAL: [&str; 7] = [
    INDEX,
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "quantize_config.json",
    "quant_config.json",
    "modules.json",
];

/// Quantisations tried in this order when none is asked for: good quality for the memory first.
const PREFERRED: [&str; 16] = [
    "Q4_K_M", "Q4_0", "Q8_0", "Q4_1", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "Q6_K", "IQ4_XS", "IQ4_NL",
    "Q3_K_M", "BF16", "F16", "F32",
];

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Selection {
    /// The files of one model in order: one, or all parts of a split one.
    Gguf { files: Vec<String> },
    /// Everything but the weights, which the index or [`safetensors`] names.
    Safetensors { files: Vec<String> },
}

/// Picks the model `pick` names (a file, or a quantisation) out of `listing`, or the best there is.
pub(super) fn select(listing: &[String], pick: Option<&str>) -> Result<Selection, String> {
    let has = |name: &str| listing.iter().any(|file| file == name);
    if pick.is_none() && has("config.json") && !safetensors(listing).is_empty() {
        if !has("tokenizer.json") {
            return Err("has safetensors weights but no tokenizer.json, which is needed".to_owned());
        }
        let names = ["config.json", "tokenizer.json"].into_iter().chain(OPTIONAL);
        // modules.json names the folder of the pooling's configuration, and others' are small.
        let is_more = |file: &str| match file.split_once('/') {
            Some(("additional_chat_templates", name)) => name.ends_with(".jinja"),
            Some((_, name)) => name == "config.json" && has("modules.json"),
            None => false,
        };
        let more = listing.iter().filter(|file| is_more(file)).cloned();
        return Ok(Selection::Safetensors {
            files: names.filter(|name| has(name)).map(str::to_owned).chain(more).collect(),
        });
    }
    let first = pick_gguf(listing, pick)?;
    Ok(Selection::Gguf { files: parts(listing, first)? })
}

/// Weight files in the root of a listing without an index.
pub(super) fn safetensors(listing: &[String]) -> Vec<String> {
    let single = "model.safetensors";
    if listing.iter().any(|file| file == single) {
        return vec![single.to_owned()];
    }
    let weights = listing
        .iter()
        .filter(|file| file.ends_with(".safetensors") && !file.contains('/') && !file.starts_with("consolidated"));
    weights.cloned().collect()
}

/// The weight files an index names, each once, in order.
pub(super) fn indexed(json: &[u8]) -> Result<Vec<String>, String> {
    let index: Value = serde_json::from_slice(json).map_err(|e| format!("is not valid JSON: {e}"))?;
    let map = index["weight_map"].as_object().ok_or("has no weight_map that says where the tensors are")?;
    let mut files = BTreeSet::new();
    for (tensor, file) in map {
        match file.as_str() {
            Some(file) if super::spec::is_path(file) => files.insert(file.to_owned()),
            _ => return Err(format!("weight_map says tensor {tensor} is in {file}, which is no file name")),
        };
    }
    if files.is_empty() {
        return Err("has an empty weight_map".to_owned());
    }
    Ok(files.into_iter().collect())
}

/// A name to serve a file under: without its ending and its number among the parts of a split model.
pub(super) fn model_name(file: &str) -> String {
    let stem = file.strip_suffix(".gguf").unwrap_or(file);
    match split_suffix(file) {
        Some((prefix, ..)) => prefix.rsplit('/').next().unwrap_or(prefix).to_owned(),
        None => stem.to_owned(),
    }
}

/// `name-00001-of-00003.gguf` → `name`, 1, 3.
fn split_suffix(file: &str) -> Option<(&str, usize, usize)> {
    let stem = file.strip_suffix(".gguf")?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| (text.len() == 5).then(|| text.parse().ok()).flatten();
    Some((prefix, digits(number)?, digits(count)?))
}

fn pick_gguf<'a>(listing: &'a [String], pick: Option<&str>) -> Result<&'a str, String> {
    let models: Vec<&str> = listing
        .iter()
        .map(String::as_str)
        .filter(|file| file.ends_with(".gguf"))
        // The vision half of a model, and parts after the first.
        .filter(|file| !file.rsplit('/').next().is_some_and(|name| name.starts_with("mmproj")))
        .filter(|file| split_suffix(file).is_none_or(|(_, number, _)| number == 1))
        .collect();
    let offer = || match models.as_slice() {
        [] => "it has no .gguf file".to_owned(),
        models => format!("it has {}", models.join(", ")),
    };
    let shortest_of = |quant: &str| {
        let fits = models.iter().filter(|file| names_quant(file, quant));
        fits.min_by_key(|file| (file.len(), **file)).copied()
    };
    match pick {
        Some(pick) => {
            let exact = listing.iter().find(|file| file.ends_with(".gguf") && file.eq_ignore_ascii_case(pick));
            match exact.map(String::as_str).or_else(|| shortest_of(pick)) {
                Some(file) => Ok(file),
                None => Err(format!("has no {pick}: {}", offer())),
            }
        }
        None => match models.as_slice() {
            [] => Err("holds neither a .gguf file nor safetensors weights with a config.json".to_owned()),
            [only] => Ok(only),
            _ => PREFERRED
                .iter()
                .find_map(|quant| shortest_of(quant))
                .ok_or_else(|| format!("holds several models; name one after a colon: {}", offer())),
        },
    }
}

/// Whether a file's name has `quant` as a part of its own: `Q4_K` is none of `x-Q4_K_M.gguf`.
fn names_quant(file: &str, quant: &str) -> bool {
    let (file, quant) = (file.to_ascii_uppercase(), quant.to_ascii_uppercase());
    let inside = |c: char| c.is_ascii_alphanumeric() || c == '_';
    file.match_indices(&quant).any(|(at, _)| {
        let before = file[..at].chars().next_back();
        let after = file[at + quant.len()..].chars().next();
        !before.is_some_and(inside) && !after.is_some_and(inside)
    })
}

/// `first`, and where it is the first part of a split model, all the others.
fn parts(listing: &[String], first: &str) -> Result<Vec<String>, String> {
    let Some((prefix, _, count)) = split_suffix(first) else {
        return Ok(vec![first.to_owned()]);
    };
    // Only what is listed can be a part, so no number in a name makes this long.
    let mut parts: Vec<(usize, &String)> = listing
        .iter()
        .filter_map(|file| {
            let (its_prefix, number, its_count) = split_suffix(file)?;
            (its_prefix == prefix && its_count == count).then_some((number, file))
        })
        .collect();
    parts.sort_unstable();
    let whole = parts.iter().map(|(number, _)| *number).eq(1..=count);
    if !whole {
        return Err(format!("has {} of the {count} parts of {prefix}", parts.len()));
    }
    Ok(parts.into_iter().map(|(_, file)| file.clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gguf(listing: &str, pick: Option<&str>) -> Result<Vec<String>, String> {
        let listing: Vec<String> = listing.split(' ').map(str::to_owned).collect();
        match select(&listing, pick)? {
            Selection::Gguf { files } => Ok(files),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_file_asked_for_is_picked() {
        let check = |listing, pick, expected: &[&str]| {
            assert_eq!(gguf(listing, pick).unwrap(), expected, "{pick:?} of {listing}");
        };
        let many = "README.md m-Q4_K_M.gguf m-Q4_K_S.gguf m.q8_0.gguf m-UD-Q4_K_M.gguf mmproj-f16.gguf";
        check(many, None, &["m-Q4_K_M.gguf"]);
        check(many, Some("q4_k_s"), &["m-Q4_K_S.gguf"]);
        check(many, Some("Q8_0"), &["m.q8_0.gguf"]);
        check(many, Some("m-ud-q4_k_m.gguf"), &["m-UD-Q4_K_M.gguf"]);
        check(many, Some("UD-Q4_K_M"), &["m-UD-Q4_K_M.gguf"]);
        check("only.gguf", None, &["only.gguf"]);
        check("x-f16.gguf x-q4_0.gguf", None, &["x-q4_0.gguf"]);
        let split = "q/b-Q8_0-00002-of-00002.gguf q/b-Q8_0-00001-of-00002.gguf c-F32.gguf";
        check(split, Some("q8_0"), &["q/b-Q8_0-00001-of-00002.gguf", "q/b-Q8_0-00002-of-00002.gguf"]);
    }

    #[test]
    fn what_cannot_be_picked_is_refused_with_the_choice() {
        let check = |listing, pick, parts: &[&str]| {
            let error = gguf(listing, pick).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
        check("a-Q4_K_M.gguf", Some("Q4_K"), &["no Q4_K", "a-Q4_K_M.gguf"]);
        check("a.gguf b.gguf", None, &["several", "a.gguf, b.gguf"]);
        check("README.md", None, &["neither"]);
        check("README.md", Some("Q4_0"), &["no .gguf"]);
        check("m-00001-of-00003.gguf m-00003-of-00003.gguf", None, &["2 of the 3"]);
    }

    #[test]
    fn safetensors_need_config_and_tokenizer() {
        let select_in = |listing: &str| {
            let listing: Vec<String> = listing.split(' ').map(str::to_owned).collect();
            select(&listing, None)
        };
        let files = |names: &str| Selection::Safetensors { files: names.split(' ').map(str::to_owned).collect() };
        assert_eq!(
            select_in("tokenizer.json model.safetensors config.json x.bin generation_config.json x.gguf"),
            Ok(files("config.json tokenizer.json generation_config.json"))
        );
        assert_eq!(
            select_in(
                "1_Pooling/config.json config.json model.safetensors modules.json tokenizer.json onnx/x.json"
            ),
            Ok(files("config.json tokenizer.json modules.json 1_Pooling/config.json"))
        );
        assert_eq!(
            select_in("onnx/config.json config.json model.safetensors tokenizer.json"),
            Ok(files("config.json tokenizer.json"))
        );
        assert!(select_in("config.json model.safetensors").unwrap_err().contains("tokenizer.json"));
        let listing = ["consolidated.safetensors", "b.safetensors", "a.safetensors", "x/y.safetensors"];
        let listing = listing.map(str::to_owned);
        assert_eq!(safetensors(&listing), ["b.safetensors", "a.safetensors"]);
    }

    #[test]
    fn an_index_names_files_and_nothing_else() {
        let json = br#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}"#;
        assert_eq!(indexed(json).unwrap(), ["1.safetensors", "2.safetensors"]);
        for bad in
            ["", "{}", r#"{"weight_map": {}}"#, r#"{"weight_map": {"a": "../x"}}"#, r#"{"weight_map": {"a": 1}}"#]
        {
            assert!(indexed(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_lose_their_ending() {
        assert_eq!(model_name("SmolLM2.Q4_1.gguf"), "SmolLM2.Q4_1");
        assert_eq!(model_name("big-00001-of-00003.gguf"), "big");
    }
}
