//! `rill perplexity`: a model and a text in, a figure out.

use std::path::PathBuf;

use rill_models::{Device, LoadOptions, LoadedModel, ModelError, Score, TokenizerError, Windows, perplexity};

use crate::cli::perplexity::PerplexityFlags;
use crate::config::ConfigError;
use crate::fetch_progress::TerminalProgress;
use crate::machine::Machine;

/// A text of more bytes is refused.
const TEXT_BYTES_MAX: u64 = 256 << 20;
/// Windows between two lines of progress.
const PROGRESS_WINDOWS: usize = 10;

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
pub enum PerplexityError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("--file {path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("the text: {0}")]
    Tokenizer(#[from] TokenizerError),
    #[error("the text holds {tokens} tokens, less than one window of {window}")]
    Short { tokens: usize, window: usize },
}

/// Prints progress to stderr and the figure to stdout.
pub fn run(flags: &PerplexityFlags) -> Result<(), PerplexityError> {
    let failed = |reason: String| PerplexityError::File { path: flags.file.clone(), reason };
    let bytes = std::fs::metadata(&flags.file).map_err(|error| failed(error.to_string()))?.len();
    if bytes > TEXT_BYTES_MAX {
        return Err(failed(format!("{bytes} bytes, the limit is {TEXT_BYTES_MAX}")));
    }
    let text = std::fs::read_to_string(&flags.file).map_err(|error| failed(error.to_string()))?;
    let options = LoadOptions {
        threads: flags.threads.unwrap_or_else(|| Machine::detect().cores),
        device: Device::Auto,
        isa: flags.isa.instructions()?,
        kv_dtype: flags.kv_cache_dtype.into(),
        row_dtype: flags.dtype.row_dtype(),
        quantize: flags.quantize.map(Into::into),
        ..LoadOptions::on_cpu(1)
    };
    let files = rill_models::resolve(&flags.model, &flags.source.options(), &mut TerminalProgress::default())?;
    let LoadedModel { mut model, tokenizer, name, description, .. } = rill_models::load(&files, &options)?;
    let tokens = tokenizer.encode(&text, false, false)?;
    let adds = tokenizer.encode("", true, false)?;
    let bos = tokenizer.bos_token_id().filter(|bos| adds.first() == Some(bos));
    let window = flags.window;
    if tokens.len() < window {
        return Err(PerplexityError::Short { tokens: tokens.len(), window });
    }
    let windows = Windows { len: window, unscored: flags.unscored.unwrap_or(window / 2) };
    eprintln!("{name}: {description}; {} tokens in windows of {window}", tokens.len());
    let mut done = 0;
    let windows_max = flags.max_windows.unwrap_or(usize::MAX).max(1);
    let score = perplexity(&mut *model, &tokens, windows, bos, |score: &Score| {
        done += 1;
        if done % PROGRESS_WINDOWS == 0 {
            eprintln!("{done} windows: {:.4}", score.perplexity());
        }
        done < windows_max
    })?;
    println!("perplexity {:.4} ± {:.4} over {} tokens", score.perplexity(), score.standard_error(), score.tokens);
    Ok(())
}
