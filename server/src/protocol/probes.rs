//! What probes are told.

use schemars::JsonSchema;
use serde::Serialize;

/// `/health` and `/ready`, where all is well.
#[derive(Debug, Serialize, JsonSchema)]
pub struct StatusBody {
    #[schemars(extend("enum" = ["loading", "ok", "ready"]))]
    pub status: &'static str,
}

/// `/version`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct VersionBody {
    pub version: &'static str,
}
