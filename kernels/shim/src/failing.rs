//! A device that is lost at a chosen moment.

use crate::Shim;
use rill_kernels::cuda::{Arg, CudaError, DevicePointer, Graph, Launch, Launcher, Launches, Memory};
use std::sync::atomic::{AtomicU64, Ordering};

/// Does so many operations and no more: the next one fails, and so does every one after it, as with a real device whose
/// context is lost.
pub struct Failing {
    inner: Shim,
    left: AtomicU64,
    /// Whether memory runs out, or the device is lost.
    out_of_memory: bool,
}

impl Failing {
    pub fn after(operations: u64, inner: Shim, out_of_memory: bool) -> Failing {
        Failing { inner, left: AtomicU64::new(operations), out_of_memory }
    }

    /// Operations it would still do.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Relaxed)
    }

    fn attempt(&self, asked: usize) -> Result<(), CudaError> {
        let left = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        match left {
            Ok(_) => Ok(()),
            Err(_) if self.out_of_memory => Err(CudaError::OutOfMemory { asked, free: 0 }),
            Err(_) => {
                Err(CudaError::Driver { what: "the GPU failed", reason: "CUDA_ERROR_ILLEGAL_ADDRESS".to_owned() })
            }
        }
    }
}

impl Launcher for Failing {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn memory(&self) -> Memory {
        self.inner.memory()
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePointer, CudaError> {
        self.attempt(bytes)?;
        self.inner.allocate(bytes)
    }

    unsafe fn free(&self, pointer: DevicePointer) {
        // SAFETY: forwarded, as is everything below.
        unsafe { self.inner.free(pointer) }
    }

    unsafe fn upload(&self, to: DevicePointer, bytes: &[u8]) -> Result<(), CudaError> {
        self.attempt(bytes.len())?;
        // SAFETY: forwarded.
        unsafe { self.inner.upload(to, bytes) }
    }

    unsafe fn download(&self, from: DevicePointer, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.attempt(bytes.len())?;
        // SAFETY: forwarded.
        unsafe { self.inner.download(from, bytes) }
    }

    unsafe fn copy(&self, from: DevicePointer, to: DevicePointer, bytes: usize) -> Result<(), CudaError> {
        self.attempt(bytes)?;
        // SAFETY: forwarded.
        unsafe { self.inner.copy(from, to, bytes) }
    }

    unsafe fn zero(&self, to: DevicePointer, bytes: usize) -> Result<(), CudaError> {
        self.attempt(bytes)?;
        // SAFETY: forwarded.
        unsafe { self.inner.zero(to, bytes) }
    }

    unsafe fn launch(&self, launch: Launch, args: &[Arg]) -> Result<(), CudaError> {
        self.attempt(0)?;
        // SAFETY: forwarded.
        unsafe { self.inner.launch(launch, args) }
    }

    unsafe fn capture(&self, launches: &Launches) -> Result<Graph, CudaError> {
        self.attempt(0)?;
        // SAFETY: forwarded.
        unsafe { self.inner.capture(launches) }
    }

    unsafe fn replay(&self, graph: Graph) -> Result<(), CudaError> {
        self.attempt(0)?;
        // SAFETY: forwarded.
        unsafe { self.inner.replay(graph) }
    }

    fn forget(&self, graph: Graph) {
        self.inner.forget(graph);
    }
}
