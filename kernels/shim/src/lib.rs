//! Runs rill's CUDA kernels on the CPU: a launcher that stands in for the driver, so that kernels, launch
//! configurations and the whole backend are tested where there is no GPU. Device memory is host memory.

mod failing;

pub use failing::Failing;

use rill_kernels::cuda::{Arg, CudaError, DevicePointer, Graph, Launch, Launcher, Launches, Memory, kernels};
use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_uint, c_void};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `simt_launch` of cpp/simt.cpp.
type Run = unsafe extern "C" fn(*const c_char, *const c_uint, c_uint, usize, *mut *mut c_void, u64) -> bool;

/// The kernels as they are, or with a bug that tests must see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    Sound,
    /// As they are, under the address and undefined-behaviour sanitizers; opens only where [`SANITIZER_RUNTIME`] was
    /// loaded first.
    Sanitized,
    /// Warps do not wait for each other before they read a tile.
    MissingSync,
    /// Rows of a tile are read with the wrong stride.
    Stride,
    /// The block table is read one entry too far.
    BlockTable,
}

/// The library to preload for [`Variant::Sanitized`].
pub const SANITIZER_RUNTIME: &str = env!("RILL_SANITIZER_RUNTIME");

/// Every byte of fresh device memory: NaN as bf16, f16 and f32.
const POISON: u8 = 0xff;
const ALIGNMENT: usize = 256;

/// A launcher whose blocks and threads run one after another, in an order drawn from a seed.
pub struct Shim {
    /// Looked through in order: kernels with a bug are in front of the sound ones.
    runs: Vec<Run>,
    seed: u64,
    launches: AtomicU64,
    /// Address → bytes.
    allocated: Mutex<HashMap<u64, usize>>,
    graphs: Mutex<HashMap<Graph, Launches>>,
    captures: AtomicU64,
    replays: AtomicU64,
    bytes_max: usize,
}

impl Shim {
    /// The sound kernels.
    pub fn new(seed: u64) -> Shim {
        Shim::of(Variant::Sound, seed)
    }

    pub fn of(variant: Variant, seed: u64) -> Shim {
        let sound = open("libsound.so");
        let runs = match variant {
            Variant::Sound => vec![sound],
            Variant::Sanitized => vec![open("libsanitized.so")],
            Variant::MissingSync => vec![open("libmissing_sync.so"), sound],
            Variant::Stride => vec![open("libstride.so"), sound],
            Variant::BlockTable => vec![open("libblock_table.so"), sound],
        };
        Shim {
            runs,
            seed,
            launches: AtomicU64::new(0),
            allocated: Mutex::new(HashMap::new()),
            graphs: Mutex::new(HashMap::new()),
            captures: AtomicU64::new(0),
            replays: AtomicU64::new(0),
            bytes_max: usize::MAX,
        }
    }

    /// With only so much memory.
    pub fn with_memory(self, bytes_max: usize) -> Shim {
        Shim { bytes_max, ..self }
    }

    /// Kernels started so far.
    pub fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    /// Graphs captured so far.
    pub fn captures(&self) -> u64 {
        self.captures.load(Ordering::Relaxed)
    }

    /// Graphs replayed so far.
    pub fn replays(&self) -> u64 {
        self.replays.load(Ordering::Relaxed)
    }

    fn graphs(&self) -> MutexGuard<'_, HashMap<Graph, Launches>> {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allocated(&self) -> MutexGuard<'_, HashMap<u64, usize>> {
        self.allocated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Panics
    /// If the range is not inside one allocation: on a device, that would be a fault later, or none at all.
    fn check(&self, at: DevicePointer, bytes: usize) {
        let allocated = self.allocated();
        let inside =
            allocated.iter().any(|(start, len)| at.0 >= *start && at.0 + bytes as u64 <= start + *len as u64);
        assert!(inside, "{bytes} bytes at {:#x} are not inside an allocation", at.0);
    }
}

/// Opens one of the libraries build.rs makes.
///
/// # Panics
/// If there is no such file or it holds no shim.
fn open(file: &str) -> Run {
    let path = Path::new(env!("OUT_DIR")).join(file);
    let name = CString::new(path.as_os_str().as_encoded_bytes()).expect("a path without zeros");
    // SAFETY: the library is ours; its constructors register kernels and do nothing else. It stays open.
    unsafe {
        let library = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        if library.is_null() {
            panic!("{}: {}", path.display(), CStr::from_ptr(libc::dlerror()).to_string_lossy());
        }
        let run = libc::dlsym(library, c"simt_launch".as_ptr());
        assert!(!run.is_null(), "{} holds no shim", path.display());
        std::mem::transmute::<*mut c_void, Run>(run)
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, ALIGNMENT).expect("sizes of device memory fit the address space")
}

impl Launcher for Shim {
    fn name(&self) -> String {
        "CUDA kernels on the CPU".to_owned()
    }

    fn memory(&self) -> Memory {
        let taken: usize = self.allocated().values().sum();
        Memory { free: self.bytes_max.saturating_sub(taken), total: self.bytes_max }
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePointer, CudaError> {
        let free = self.memory().free;
        if bytes > free {
            return Err(CudaError::OutOfMemory { asked: bytes, free });
        }
        // SAFETY: the layout is not empty; the memory is written before it is read.
        let start = unsafe {
            let start = alloc(layout(bytes.max(1)));
            assert!(!start.is_null(), "the host is out of memory");
            start.write_bytes(POISON, bytes);
            start as u64
        };
        self.allocated().insert(start, bytes);
        Ok(DevicePointer(start))
    }

    unsafe fn free(&self, pointer: DevicePointer) {
        let bytes = self.allocated().remove(&pointer.0).expect("memory is given back once");
        // SAFETY: allocated above with the same layout.
        unsafe { dealloc(pointer.0 as *mut u8, layout(bytes.max(1))) }
    }

    unsafe fn upload(&self, to: DevicePointer, bytes: &[u8]) -> Result<(), CudaError> {
        self.check(to, bytes.len());
        // SAFETY: just checked.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.0 as *mut u8, bytes.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: DevicePointer, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.check(from, bytes.len());
        // SAFETY: just checked.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn copy(&self, from: DevicePointer, to: DevicePointer, bytes: usize) -> Result<(), CudaError> {
        self.check(from, bytes);
        self.check(to, bytes);
        // SAFETY: just checked, and the caller says they are apart.
        unsafe { (to.0 as *mut u8).copy_from_nonoverlapping(from.0 as *const u8, bytes) };
        Ok(())
    }

    unsafe fn zero(&self, to: DevicePointer, bytes: usize) -> Result<(), CudaError> {
        self.check(to, bytes);
        // SAFETY: just checked.
        unsafe { (to.0 as *mut u8).write_bytes(0, bytes) };
        Ok(())
    }

    unsafe fn launch(&self, launch: Launch, args: &[Arg]) -> Result<(), CudaError> {
        let known = kernels().find(|(name, _)| *name == launch.kernel);
        let (_, shared_max) = known.unwrap_or_else(|| panic!("{} is not listed by kernels()", launch.kernel));
        assert!(
            launch.shared_bytes <= shared_max,
            "{} asks for {} bytes of shared memory and kernels() says {shared_max}",
            launch.kernel,
            launch.shared_bytes
        );
        let number = self.launches.fetch_add(1, Ordering::Relaxed);
        let mut pointers: Vec<*mut c_void> = args
            .iter()
            .map(|arg| match arg {
                Arg::Pointer(pointer) => (&raw const pointer.0).cast_mut().cast(),
                Arg::U32(value) => (&raw const *value).cast_mut().cast(),
                Arg::F32(value) => (&raw const *value).cast_mut().cast(),
            })
            .collect();
        let name = CString::new(launch.kernel).expect("names hold no zeros");
        let seed = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number;
        let found = self.runs.iter().any(|run| {
            // SAFETY: forwarded; the kernel's own arguments are as its source has them, in this order.
            unsafe {
                run(
                    name.as_ptr(),
                    launch.grid.as_ptr(),
                    launch.threads,
                    launch.shared_bytes,
                    pointers.as_mut_ptr(),
                    seed,
                )
            }
        });
        assert!(found, "{} is in no source", launch.kernel);
        Ok(())
    }

    unsafe fn capture(&self, launches: &Launches) -> Result<Graph, CudaError> {
        let mut graphs = self.graphs();
        let graph = Graph(self.captures.fetch_add(1, Ordering::Relaxed));
        graphs.insert(graph, launches.clone());
        Ok(graph)
    }

    unsafe fn replay(&self, graph: Graph) -> Result<(), CudaError> {
        self.replays.fetch_add(1, Ordering::Relaxed);
        let launches = self.graphs().get(&graph).expect("a captured graph").clone();
        // SAFETY: forwarded.
        launches.iter().try_for_each(|(launch, args)| unsafe { self.launch(launch, args) })
    }

    fn forget(&self, graph: Graph) {
        assert!(self.graphs().remove(&graph).is_some(), "graphs are forgotten once");
    }
}
