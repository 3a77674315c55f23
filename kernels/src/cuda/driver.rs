//! The real device: libcuda, found at run time. What no test can run without a GPU is here and nowhere else.

#![allow(clippy::missing_safety_doc, reason = "the trait says it")]

use super::arena::Arena;
use super::launch::{Arg, CudaError, DevicePointer, Graph, Launch, Launcher, Launches, Memory};
use super::staging::Staging;
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One fat binary a source file; none if the crate was built without nvcc.
const MODULES: &[&[u8]] = include!(concat!(env!("OUT_DIR"), "/cuda_modules.rs"));
/// Page-locked memory for small uploads, on the kernels' own stream: they wait for nothing and cost one call.
const SMALL_BYTES: usize = 4 << 20;
/// Kernels may take this much shared memory without being asked.
const SHARED_BYTES_PLAIN: usize = 48 << 10;

/// How a device is used.
#[derive(Debug, Clone, Copy)]
pub struct DriverOptions {
    pub ordinal: usize,
    /// Share of the memory that is free at the start, 0 to 1.
    pub memory_utilization: f64,
}

/// A GPU and one stream of it.
pub struct Driver {
    name: String,
    context: sys::CUcontext,
    stream: sys::CUstream,
    kernels: HashMap<&'static str, sys::CUfunction>,
    base: sys::CUdeviceptr,
    total: usize,
    host: Mutex<Host>,
}

struct Host {
    arena: Arena,
    small: *mut u8,
    /// Bytes of it that copies may still read.
    staged: usize,
    staging: Staging,
    graphs: HashMap<Graph, sys::CUgraphExec>,
    graphs_made: u64,
}

// SAFETY: the driver API may be called from any thread on which the context is current, which every method sees to;
// the staging memory is used under the lock.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

fn failed(what: &'static str) -> impl Fn(result::DriverError) -> CudaError {
    move |error| CudaError::Driver { what, reason: error.to_string() }
}

impl Driver {
    /// How many devices there are.
    pub fn count() -> Result<usize, CudaError> {
        // SAFETY: it opens the library by its usual names and looks for nothing in it.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        result::init().map_err(failed("the CUDA driver does not start"))?;
        let count = result::device::get_count().map_err(failed("devices cannot be counted"))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Opens a device, loads the kernels onto it and takes its share of memory.
    pub fn open(options: DriverOptions) -> Result<Driver, CudaError> {
        if MODULES.is_empty() {
            return Err(CudaError::NoKernels);
        }
        let count = Driver::count()?;
        let ordinal = i32::try_from(options.ordinal).ok().filter(|_| options.ordinal < count);
        let Some(ordinal) = ordinal else { return Err(CudaError::NoDevice { asked: options.ordinal, count }) };
        let device = result::device::get(ordinal).map_err(failed("the device cannot be opened"))?;
        use sys::CUdevice_attribute as Attribute;
        let attribute = |which| {
            // SAFETY: the device exists.
            unsafe { result::device::get_attribute(device, which) }.map_err(failed("the device cannot be asked"))
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(CudaError::TooOld { major, minor });
        }
        // SAFETY: the device exists; the context is held until the process ends.
        let context = unsafe {
            let context = result::primary_ctx::retain(device).map_err(failed("the device gives no context"))?;
            result::ctx::set_current(context).map_err(failed("the device's context cannot be used"))?;
            context
        };
        let name = result::device::get_name(device).map_err(failed("the device has no name"))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("the device gives no stream"))?;
        let kernels = load_kernels()?;
        let (free, total) = result::mem_get_info().map_err(failed("free memory cannot be asked for"))?;
        let bytes = (free as f64 * options.memory_utilization.clamp(0.0, 1.0)) as usize;
        // SAFETY: memory of the current context; both pieces are held until the process ends.
        let (base, small) = unsafe {
            let base = result::malloc_sync(bytes).map_err(|_| CudaError::OutOfMemory { asked: bytes, free })?;
            let small = result::malloc_host(SMALL_BYTES, 0).map_err(failed("no page-locked memory"))?;
            (base, small.cast())
        };
        let staging = Staging::new().map_err(failed("no page-locked memory"))?;
        let arena = Arena::new(bytes);
        let host = Host { arena, small, staged: 0, staging, graphs: HashMap::new(), graphs_made: 0 };
        Ok(Driver {
            name: format!("{name}, compute capability {major}.{minor}"),
            context,
            stream,
            kernels,
            base,
            total,
            host: Mutex::new(host),
        })
    }

    /// Makes the context this thread's.
    fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the context is live as long as the process.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("the device's context cannot be used"))
    }

    fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self) -> Result<(), CudaError> {
        // SAFETY: the stream is live as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("the GPU failed"))
    }
}

/// All kernels of all modules, by name, allowed as much shared memory as the device has for a block.
fn load_kernels() -> Result<HashMap<&'static str, sys::CUfunction>, CudaError> {
    let mut modules = Vec::with_capacity(MODULES.len());
    for bytes in MODULES {
        // The driver wants it aligned.
        let mut image = vec![0_u64; bytes.len().div_ceil(8)];
        // SAFETY: the copy fits and both are plain bytes; the driver reads the image during the call alone.
        let module = unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), image.as_mut_ptr().cast::<u8>(), bytes.len());
            result::module::load_data(image.as_ptr().cast())
        };
        modules.push(module.map_err(failed("the kernels do not load on this GPU"))?);
    }
    let mut kernels = HashMap::new();
    for (name, shared_bytes) in super::kernels::kernels() {
        let symbol = CString::new(name).map_err(|_| CudaError::NoKernels)?;
        let found = modules.iter().find_map(|&module| {
            // SAFETY: the module was just loaded.
            unsafe { result::module::get_function(module, symbol.clone()) }.ok()
        });
        let Some(function) = found else {
            return Err(CudaError::Driver { what: "a kernel is missing", reason: name.to_owned() });
        };
        if shared_bytes > SHARED_BYTES_PLAIN {
            let wanted = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to a loaded module.
            unsafe { result::function::set_function_attribute(function, wanted, shared_bytes as i32) }
                .map_err(failed("the GPU has too little shared memory"))?;
        }
        kernels.insert(name, function);
    }
    Ok(kernels)
}

impl Launcher for Driver {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn memory(&self) -> Memory {
        Memory { free: self.host().arena.free_bytes(), total: self.total }
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePointer, CudaError> {
        let mut host = self.host();
        match host.arena.take(bytes) {
            Some(offset) => Ok(DevicePointer(self.base + offset as u64)),
            None => Err(CudaError::OutOfMemory { asked: bytes, free: host.arena.free_bytes() }),
        }
    }

    unsafe fn free(&self, pointer: DevicePointer) {
        // One stream: what is asked for next comes after what still uses this memory.
        self.host().arena.give_back((pointer.0 - self.base) as usize);
    }

    unsafe fn upload(&self, to: DevicePointer, bytes: &[u8]) -> Result<(), CudaError> {
        self.enter()?;
        let mut host = self.host();
        if bytes.len() > SMALL_BYTES {
            // SAFETY: forwarded; the context is current.
            return unsafe { host.staging.upload(to.0, bytes, self.stream) };
        }
        if host.staged + bytes.len() > SMALL_BYTES {
            self.wait()?;
            host.staged = 0;
        }
        // SAFETY: the part is inside the staging memory, and no copy under way reads it: it is written once between
        // two waits.
        unsafe {
            let place = host.small.add(host.staged);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len());
            let part = std::slice::from_raw_parts(place, bytes.len());
            result::memcpy_htod_async(to.0, part, self.stream).map_err(failed("a copy to the GPU"))?;
        }
        host.staged += bytes.len().next_multiple_of(64);
        Ok(())
    }

    unsafe fn download(&self, from: DevicePointer, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.enter()?;
        let mut host = self.host();
        // SAFETY: forwarded; the context is current.
        unsafe { host.staging.download(from.0, bytes, self.stream)? };
        // What was asked of the kernels' stream before is done.
        host.staged = 0;
        Ok(())
    }

    unsafe fn copy(&self, from: DevicePointer, to: DevicePointer, bytes: usize) -> Result<(), CudaError> {
        self.enter()?;
        // SAFETY: forwarded.
        unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.stream) }
            .map_err(failed("copying within the GPU's memory"))
    }

    unsafe fn zero(&self, to: DevicePointer, bytes: usize) -> Result<(), CudaError> {
        self.enter()?;
        // SAFETY: forwarded.
        unsafe { result::memset_d8_async(to.0, 0, bytes, self.stream) }.map_err(failed("filling GPU memory"))
    }

    unsafe fn launch(&self, launch: Launch, args: &[Arg]) -> Result<(), CudaError> {
        self.enter()?;
        let Some(&function) = self.kernels.get(launch.kernel) else {
            return Err(CudaError::Driver { what: "a kernel is missing", reason: launch.kernel.to_owned() });
        };
        let mut pointers: Vec<*mut c_void> = args
            .iter()
            .map(|arg| match arg {
                Arg::Pointer(pointer) => (&raw const pointer.0).cast_mut().cast(),
                Arg::U32(value) => (&raw const *value).cast_mut().cast(),
                Arg::F32(value) => (&raw const *value).cast_mut().cast(),
            })
            .collect();
        let [x, y, z] = launch.grid;
        // SAFETY: forwarded; the driver copies arguments before it returns and does not write them.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (launch.threads, 1, 1),
                launch.shared_bytes as u32,
                self.stream,
                &mut pointers,
            )
        }
        .map_err(|error| CudaError::Driver { what: launch.kernel, reason: error.to_string() })
    }

    unsafe fn capture(&self, launches: &Launches) -> Result<Graph, CudaError> {
        self.enter()?;
        let what = "a graph of launches";
        // While the stream captures, no other thread uploads to it: adapters are loaded while requests run.
        let mut host = self.host();
        // SAFETY: forwarded; the stream is this thread's alone while it captures, and launches are noted and not run.
        let exec = unsafe {
            let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            result::stream::begin_capture(self.stream, mode).map_err(failed(what))?;
            let noted = launches.iter().try_for_each(|(launch, args)| self.launch(launch, args));
            // Capturing ends even where a launch failed.
            let graph = result::stream::end_capture(self.stream).map_err(failed(what));
            noted?;
            let graph = graph?;
            let exec = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)).map_err(failed(what));
            result::graph::destroy(graph).map_err(failed(what))?;
            exec?
        };
        host.graphs_made += 1;
        let graph = Graph(host.graphs_made);
        host.graphs.insert(graph, exec);
        Ok(graph)
    }

    unsafe fn replay(&self, graph: Graph) -> Result<(), CudaError> {
        self.enter()?;
        let exec = self.host().graphs.get(&graph).copied();
        let exec = exec.ok_or(CudaError::Driver { what: "a graph is missing", reason: format!("{graph:?}") })?;
        // SAFETY: forwarded.
        unsafe { result::graph::launch(exec, self.stream) }.map_err(failed("a graph of launches"))
    }

    fn forget(&self, graph: Graph) {
        if let Some(exec) = self.host().graphs.remove(&graph)
            && self.enter().is_ok()
        {
            // SAFETY: nobody has its number any more. The driver keeps what still runs; an error shows in the next call.
            let _ = unsafe { result::graph::exec_destroy(exec) };
        }
    }
}
