//! `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, in vLLM's spelling.

use schemars::JsonSchema;
use serde::Deserialize;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadAdapterRequest {
    pub lora_name: String,
    /// On the server's machine.
    pub lora_path: String,
    /// Take the place of an adapter of the same name.
    #[serde(default)]
    pub load_inplace: bool,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UnloadAdapterRequest {
    pub lora_name: String,
}
