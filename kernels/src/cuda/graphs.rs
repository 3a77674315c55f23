//! Launches kept back until something else is asked for, and replayed as one graph where the same ones have come before.
//!
//! A decode step is a few hundred launches, the same ones from step to step while the batch keeps its size: what changes
//! lies in memory that was uploaded before. A list of launches that comes a second time, argument by argument, is
//! captured; from then on it is one call. Any other operation waits for what was kept back: nothing is reordered.

use super::launch::{Arg, CudaError, DevicePointer, Graph, Launch, Launcher, Launches, Memory};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shorter lists are launched one by one.
const LAUNCHES_MIN: usize = 8;
/// Lists remembered: batch sizes, times the rest of a bucket. The one unused for longest is forgotten.
const LISTS_MAX: usize = 64;

/// Rows a decode step of `rows` is filled up to, so that there are few graphs: the rows beyond belong to no sequence, and
/// what is computed of them is neither kept nor read. Linear layers compute whole tiles of 8, 32 or 64 rows anyway.
pub(super) fn bucket(rows: usize) -> usize {
    match rows {
        0..=8 => rows.next_power_of_two(),
        9..=64 => rows.next_multiple_of(8),
        _ => rows.next_multiple_of(64),
    }
}

/// A launcher in front of another one.
pub(super) struct Graphs {
    inner: Arc<dyn Launcher>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    pending: Launches,
    lists: Vec<List>,
    /// Counts lists run.
    now: u64,
    /// Of launches that nobody could be told about.
    failed: Option<CudaError>,
}

/// Launches that came before.
struct List {
    launches: Launches,
    /// From the second time on.
    graph: Option<Graph>,
    used: u64,
}

impl Graphs {
    pub(super) fn new(inner: Arc<dyn Launcher>) -> Graphs {
        Graphs { inner, state: Mutex::new(State::default()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs what was kept back.
    fn catch_up(&self) -> Result<(), CudaError> {
        let state = &mut *self.state();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let ran = self.run_pending(state);
        state.failed = ran.clone().err();
        ran
    }

    fn run_pending(&self, state: &mut State) -> Result<(), CudaError> {
        if state.pending.len() < LAUNCHES_MIN {
            let ran = self.run(&state.pending);
            state.pending.clear();
            return ran;
        }
        state.now += 1;
        let Some(known) = state.lists.iter_mut().find(|list| list.launches == state.pending) else {
            let launches = std::mem::take(&mut state.pending);
            let ran = self.run(&launches);
            if state.lists.len() == LISTS_MAX
                && let Some(oldest) = (0..LISTS_MAX).min_by_key(|&i| state.lists[i].used)
                && let Some(graph) = state.lists.swap_remove(oldest).graph
            {
                self.inner.forget(graph);
            }
            state.lists.push(List { launches, graph: None, used: state.now });
            return ran;
        };
        state.pending.clear();
        known.used = state.now;
        // SAFETY: the very launches that were just asked for, whose callers vouched for their arguments.
        unsafe {
            let graph = match known.graph {
                Some(graph) => graph,
                None => *known.graph.insert(self.inner.capture(&known.launches)?),
            };
            self.inner.replay(graph)
        }
    }

    fn run(&self, launches: &Launches) -> Result<(), CudaError> {
        // SAFETY: forwarded; what is freed after a launch was asked for is freed after it is run.
        launches.iter().try_for_each(|(launch, args)| unsafe { self.inner.launch(launch, args) })
    }
}

impl Drop for Graphs {
    fn drop(&mut self) {
        let graphs = self.state().lists.drain(..).filter_map(|list| list.graph).collect::<Vec<Graph>>();
        graphs.into_iter().for_each(|graph| self.inner.forget(graph));
    }
}

impl Launcher for Graphs {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn memory(&self) -> Memory {
        self.inner.memory()
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePointer, CudaError> {
        self.inner.allocate(bytes)
    }

    unsafe fn free(&self, pointer: DevicePointer) {
        // An error is kept for the next operation that can tell it.
        let _ = self.catch_up();
        // SAFETY: forwarded, after everything that uses the memory.
        unsafe { self.inner.free(pointer) }
    }

    unsafe fn upload(&self, to: DevicePointer, bytes: &[u8]) -> Result<(), CudaError> {
        self.catch_up()?;
        // SAFETY: forwarded.
        unsafe { self.inner.upload(to, bytes) }
    }

    unsafe fn download(&self, from: DevicePointer, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.catch_up()?;
        // SAFETY: forwarded.
        unsafe { self.inner.download(from, bytes) }
    }

    unsafe fn copy(&self, from: DevicePointer, to: DevicePointer, bytes: usize) -> Result<(), CudaError> {
        self.catch_up()?;
        // SAFETY: forwarded.
        unsafe { self.inner.copy(from, to, bytes) }
    }

    unsafe fn zero(&self, to: DevicePointer, bytes: usize) -> Result<(), CudaError> {
        self.catch_up()?;
        // SAFETY: forwarded.
        unsafe { self.inner.zero(to, bytes) }
    }

    unsafe fn launch(&self, launch: Launch, args: &[Arg]) -> Result<(), CudaError> {
        self.state().pending.push(launch, args);
        Ok(())
    }

    fn begin(&self) -> Result<(), CudaError> {
        self.catch_up()?;
        self.inner.begin()
    }

    unsafe fn capture(&self, launches: &Launches) -> Result<Graph, CudaError> {
        // SAFETY: forwarded.
        unsafe { self.inner.capture(launches) }
    }

    unsafe fn replay(&self, graph: Graph) -> Result<(), CudaError> {
        self.catch_up()?;
        // SAFETY: forwarded.
        unsafe { self.inner.replay(graph) }
    }

    fn forget(&self, graph: Graph) {
        self.inner.forget(graph);
    }
}
