//! The real device: libcuda, found at run time. What no test can run without a GPU is here and nowhere else.

#![allow(clippy::missing_safety_doc, reason = "the trait says it")]

use super::arena::Arena;
use super::launch::{Arg, CudaError, DevicePointer, Launch, Launcher, Memory};
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One fat binary a source file; none if the crate was built without nvcc.
const MODULES: &[&[u8]] = include!(concat!(env!("OUT_DIR"), "/cuda_modules.rs"));
/// Page-locked memory that small uploads pass through, so that they need not wait for the device.
const STAGING_BYTES: usize = 8 << 20;
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
    staging: *mut u8,
    staged: usize,
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
        let (base, staging) = unsafe {
            let base = result::malloc_sync(bytes).map_err(|_| CudaError::OutOfMemory { asked: bytes, free })?;
            let staging = result::malloc_host(STAGING_BYTES, 0).map_err(failed("no page-locked memory"))?;
            (base, staging.cast())
        };
        Ok(Driver {
            name: format!("{name}, compute capability {major}.{minor}"),
            context,
            stream,
            kernels,
            base,
            total,
            host: Mutex::new(Host { arena: Arena::new(bytes), staging, staged: 0 }),
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
    for (name, shared_bytes) in super::kernels::KERNELS {
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
        if bytes.len() > STAGING_BYTES {
            // Weights: ordinary memory, copied before this returns.
            // SAFETY: forwarded; the stream is waited for before `bytes` may change.
            unsafe { result::memcpy_htod_async(to.0, bytes, self.stream) }.map_err(failed("a copy to the GPU"))?;
            return self.wait();
        }
        if host.staged + bytes.len() > STAGING_BYTES {
            self.wait()?;
            host.staged = 0;
        }
        // SAFETY: the part is inside the staging memory, and no copy under way reads it: it is written once between
        // two waits.
        unsafe {
            let place = host.staging.add(host.staged);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len());
            let part = std::slice::from_raw_parts(place, bytes.len());
            result::memcpy_htod_async(to.0, part, self.stream).map_err(failed("a copy to the GPU"))?;
        }
        host.staged += bytes.len().next_multiple_of(64);
        Ok(())
    }

    unsafe fn download(&self, from: DevicePointer, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.enter()?;
        // SAFETY: forwarded; `bytes` is borrowed until the copy is done.
        unsafe { result::memcpy_dtoh_async(bytes, from.0, self.stream) }.map_err(failed("a copy from the GPU"))?;
        self.wait()?;
        self.host().staged = 0;
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
}
