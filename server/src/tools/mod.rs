//! Tool calling: the tools a request offers, the format its model calls them in, what a forced call must look like,
//! and calls found in generated text.

pub mod call_json;
pub mod choice;
pub mod format;
pub mod grammar;
pub mod parser;
pub mod prompt;
pub mod pythonic;
pub mod tagged_call;

pub use choice::{TOOLS_MAX, Tool, ToolChoice, Tools};
pub use format::ToolFormat;
pub use parser::{ToolDelta, ToolParser};
