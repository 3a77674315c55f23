//! LoRA adapters as requests name them: weights, and how many requests use them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use rill_models::Adapter;

/// An adapter that requests may run with. Every request holds it, so its memory is freed when nobody offers it any more and
/// the last request that uses it has ended.
#[derive(Debug)]
pub struct LoadedAdapter {
    weights: Arc<Adapter>,
    waiting: AtomicUsize,
    running: AtomicUsize,
}

impl LoadedAdapter {
    pub fn new(weights: Adapter) -> LoadedAdapter {
        LoadedAdapter { weights: Arc::new(weights), waiting: AtomicUsize::new(0), running: AtomicUsize::new(0) }
    }

    pub fn weights(&self) -> &Arc<Adapter> {
        &self.weights
    }

    /// Its sequences that wait for their first step.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Relaxed)
    }

    /// Its sequences that have had their first step.
    pub fn running(&self) -> usize {
        self.running.load(Relaxed)
    }
}

/// One sequence's use of an adapter, counted while this lives.
pub(crate) struct AdapterUse {
    adapter: Arc<LoadedAdapter>,
    admitted: bool,
}

impl AdapterUse {
    pub(crate) fn new(adapter: Arc<LoadedAdapter>) -> AdapterUse {
        adapter.waiting.fetch_add(1, Relaxed);
        AdapterUse { adapter, admitted: false }
    }

    /// The sequence waits no longer.
    pub(crate) fn admit(&mut self) {
        if !self.admitted {
            self.admitted = true;
            self.adapter.running.fetch_add(1, Relaxed);
            self.adapter.waiting.fetch_sub(1, Relaxed);
        }
    }

    pub(crate) fn weights(&self) -> &Arc<Adapter> {
        &self.adapter.weights
    }
}

impl Drop for AdapterUse {
    fn drop(&mut self) {
        let counter = if self.admitted { &self.adapter.running } else { &self.adapter.waiting };
        counter.fetch_sub(1, Relaxed);
    }
}
