//! A step's low-rank updates: which rows of the batch run with which adapter.

use std::sync::Arc;

use rill_kernels::LowRankUpdate;

use crate::adapter::{Adapter, Projection};
use crate::{ForwardInput, ModelError};

/// Rows by adapter, in the order adapters first appear.
#[derive(Default)]
pub(crate) struct StepUpdates<'a> {
    groups: Vec<(&'a Arc<Adapter>, Vec<u32>)>,
}

impl<'a> StepUpdates<'a> {
    pub(crate) fn new(input: &'a ForwardInput) -> Result<StepUpdates<'a>, ModelError> {
        let mut groups: Vec<(&'a Arc<Adapter>, Vec<u32>)> = Vec::new();
        if !input.adapters.is_empty() && input.adapters.len() != input.sequences() {
            return Err(ModelError::Runtime(format!(
                "{} adapters for {} sequences",
                input.adapters.len(),
                input.sequences()
            )));
        }
        for (adapter, rows) in input.adapters.iter().zip(input.query_starts.windows(2)) {
            let Some(adapter) = adapter else { continue };
            let rows = rows[0]..rows[1];
            match groups.iter_mut().find(|(known, _)| Arc::ptr_eq(known, adapter)) {
                Some((_, group)) => group.extend(rows),
                None => groups.push((adapter, rows.collect())),
            }
        }
        Ok(StepUpdates { groups })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// The updates of one linear layer.
    pub(crate) fn of(&'a self, layer: usize, projection: Projection) -> Vec<LowRankUpdate<'a>> {
        let mut out = Vec::new();
        for (adapter, rows) in &self.groups {
            out.extend(adapter.updates(layer, projection).iter().map(|update| LowRankUpdate {
                weights: &update.weights,
                rows,
                first: update.first,
            }));
        }
        out
    }
}
