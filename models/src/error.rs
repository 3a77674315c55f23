//! Everything that can go wrong between a model's name and its logits, each with what to do about it.

/// A model could not be found, read, or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The source (path, hub repository, package) could not be turned into local files.
    #[error("{0}")]
    Source(String),
    /// A file is truncated, corrupt, or not what its name says.
    #[error("{path}: {reason}")]
    Format { path: String, reason: String },
    /// The files are sound but hold something we do not run.
    #[error("{0}")]
    Unsupported(String),
    /// The device asked for is not there or does not work.
    #[error("{0}")]
    Device(String),
    /// The forward pass failed; the model may not be used again.
    #[error("{0}")]
    Runtime(String),
}
