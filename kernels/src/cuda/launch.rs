//! What the backend asks of a device: memory, copies, launches. The driver implements it, and so does the shim that
//! runs kernels on the CPU.

/// An address in device memory; 0 is nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DevicePointer(pub u64);

impl DevicePointer {
    /// `bytes` further on.
    pub fn offset(self, bytes: usize) -> DevicePointer {
        DevicePointer(self.0 + bytes as u64)
    }
}

/// One argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    Pointer(DevicePointer),
    U32(u32),
    F32(f32),
}

impl From<DevicePointer> for Arg {
    fn from(pointer: DevicePointer) -> Arg {
        Arg::Pointer(pointer)
    }
}
impl From<u32> for Arg {
    fn from(value: u32) -> Arg {
        Arg::U32(value)
    }
}
impl From<f32> for Arg {
    fn from(value: f32) -> Arg {
        Arg::F32(value)
    }
}
impl From<usize> for Arg {
    /// # Panics
    /// If the value is beyond 32 bits.
    fn from(value: usize) -> Arg {
        Arg::U32(u32::try_from(value).expect("a kernel's sizes fit 32 bits"))
    }
}

/// A kernel and its launch configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    pub kernel: &'static str,
    pub grid: [u32; 3],
    /// Threads a block; a multiple of 32.
    pub threads: u32,
    /// Bytes of dynamic shared memory a block.
    pub shared_bytes: usize,
}

/// Launches in their order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Launches {
    /// Each with where its arguments end.
    launches: Vec<(Launch, usize)>,
    args: Vec<Arg>,
}

impl Launches {
    pub fn len(&self) -> usize {
        self.launches.len()
    }

    pub fn is_empty(&self) -> bool {
        self.launches.is_empty()
    }

    pub fn push(&mut self, launch: Launch, args: &[Arg]) {
        self.args.extend_from_slice(args);
        self.launches.push((launch, self.args.len()));
    }

    pub fn clear(&mut self) {
        self.launches.clear();
        self.args.clear();
    }

    pub fn iter(&self) -> impl Iterator<Item = (Launch, &[Arg])> {
        let mut start = 0;
        self.launches.iter().map(move |&(launch, end)| {
            let args = &self.args[start..end];
            start = end;
            (launch, args)
        })
    }
}

/// Captured launches, by a number of the launcher's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Graph(pub u64);

/// Bytes of device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub free: usize,
    pub total: usize,
}

/// Why the device could not do something. After one of these it is not used again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    #[error("this build has no CUDA kernels: it was compiled without nvcc")]
    NoKernels,
    #[error("no CUDA driver was found (libcuda.so.1)")]
    NoDriver,
    #[error("there is no CUDA device {asked}; this machine has {count}")]
    NoDevice { asked: usize, count: usize },
    #[error("the GPU's compute capability is {major}.{minor}; rill needs 8.0 or later")]
    TooOld { major: i32, minor: i32 },
    #[error("the GPU is out of memory: {asked} bytes were asked for and {free} are free")]
    OutOfMemory { asked: usize, free: usize },
    #[error("{what}: {reason}")]
    Driver { what: &'static str, reason: String },
}

/// A device, and one stream of it: everything takes place in the order it was asked for.
pub trait Launcher: Send + Sync {
    /// In words, for logs.
    fn name(&self) -> String;

    fn memory(&self) -> Memory;

    /// `bytes` of memory, 256-byte aligned, contents undefined.
    fn allocate(&self, bytes: usize) -> Result<DevicePointer, CudaError>;

    /// Gives back what `allocate` gave.
    ///
    /// # Safety
    /// `pointer` came from `allocate` of this device and was not given back; nothing asked for later uses it.
    unsafe fn free(&self, pointer: DevicePointer);

    /// Copies to the device. `bytes` may be reused when this returns.
    ///
    /// # Safety
    /// `to` is the start of at least as many bytes of live device memory.
    unsafe fn upload(&self, to: DevicePointer, bytes: &[u8]) -> Result<(), CudaError>;

    /// Copies from the device, when everything before is done.
    ///
    /// # Safety
    /// `from` is the start of at least as many bytes of live device memory.
    unsafe fn download(&self, from: DevicePointer, bytes: &mut [u8]) -> Result<(), CudaError>;

    /// Copies from one place of the device to another.
    ///
    /// # Safety
    /// Both are the starts of at least `bytes` bytes of live device memory, and these do not overlap.
    unsafe fn copy(&self, from: DevicePointer, to: DevicePointer, bytes: usize) -> Result<(), CudaError>;

    /// Fills with zeros.
    ///
    /// # Safety
    /// `to` is the start of at least `bytes` bytes of live device memory.
    unsafe fn zero(&self, to: DevicePointer, bytes: usize) -> Result<(), CudaError>;

    /// Starts a kernel.
    ///
    /// # Safety
    /// `args` are what the kernel takes, and what it reads and writes through them is live device memory.
    unsafe fn launch(&self, launch: Launch, args: &[Arg]) -> Result<(), CudaError>;

    /// Has whatever was asked for begin without waiting for more; for launchers that keep things back.
    fn begin(&self) -> Result<(), CudaError> {
        Ok(())
    }

    /// Makes one thing of launches, without running them.
    ///
    /// # Safety
    /// As for `launch`, of each, whenever the graph is replayed.
    unsafe fn capture(&self, launches: &Launches) -> Result<Graph, CudaError>;

    /// Runs captured launches.
    ///
    /// # Safety
    /// `graph` came from `capture` of this launcher and was not forgotten; what its launches use is live.
    unsafe fn replay(&self, graph: Graph) -> Result<(), CudaError>;

    /// A graph that is not replayed again.
    fn forget(&self, graph: Graph);
}
