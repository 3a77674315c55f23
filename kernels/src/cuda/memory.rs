//! Device memory with an owner, and the device as the backend sees it: after the first error nothing more is done.

use super::launch::{Arg, CudaError, DevicePointer, Launch, Launcher};
use std::cell::RefCell;
use std::sync::Arc;

/// Device memory, given back when dropped. Contents are undefined until they are written.
#[derive(Default)]
pub(super) struct DeviceBuffer {
    /// `None`: empty.
    memory: Option<(Arc<dyn Launcher>, DevicePointer)>,
    bytes: usize,
}

impl DeviceBuffer {
    /// Its address; nowhere if it is empty.
    pub(super) fn pointer(&self) -> DevicePointer {
        self.memory.as_ref().map_or(DevicePointer::default(), |(_, pointer)| *pointer)
    }

    /// Its bytes; none after an error.
    pub(super) fn len(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if let Some((launcher, pointer)) = self.memory.take() {
            // SAFETY: allocated in `Device::allocate`, owned by this buffer, and operations that use it were asked for
            // while it was borrowed: before this.
            unsafe { launcher.free(pointer) }
        }
    }
}

/// A device and its first error.
pub(super) struct Device {
    launcher: Arc<dyn Launcher>,
    error: RefCell<Option<CudaError>>,
}

impl Device {
    pub(super) fn new(launcher: Arc<dyn Launcher>) -> Device {
        Device { launcher, error: RefCell::new(None) }
    }

    pub(super) fn launcher(&self) -> &Arc<dyn Launcher> {
        &self.launcher
    }

    pub(super) fn error(&self) -> Option<CudaError> {
        self.error.borrow().clone()
    }

    fn attempt<T>(&self, f: impl FnOnce(&dyn Launcher) -> Result<T, CudaError>) -> Option<T> {
        let mut error = self.error.borrow_mut();
        if error.is_some() {
            return None;
        }
        match f(&*self.launcher) {
            Ok(value) => Some(value),
            Err(first) => {
                *error = Some(first);
                None
            }
        }
    }

    /// An empty buffer after an error.
    pub(super) fn allocate(&self, bytes: usize) -> DeviceBuffer {
        if bytes == 0 {
            return DeviceBuffer::default();
        }
        let memory = self.attempt(|launcher| launcher.allocate(bytes));
        DeviceBuffer {
            bytes: if memory.is_some() { bytes } else { 0 },
            memory: memory.map(|p| (self.launcher.clone(), p)),
        }
    }

    /// Makes `buffer` at least `bytes` long, contents lost if it was not.
    pub(super) fn reserve(&self, buffer: &mut DeviceBuffer, bytes: usize) {
        if buffer.bytes < bytes {
            *buffer = DeviceBuffer::default();
            *buffer = self.allocate(bytes.next_multiple_of(4096));
        }
    }

    /// A new buffer that holds `bytes`.
    pub(super) fn upload_new(&self, bytes: &[u8]) -> DeviceBuffer {
        let mut buffer = self.allocate(bytes.len());
        self.upload(&mut buffer, bytes);
        buffer
    }

    /// Writes `bytes` to the start of `buffer`, which grows to hold them.
    pub(super) fn upload(&self, buffer: &mut DeviceBuffer, bytes: &[u8]) {
        self.reserve(buffer, bytes.len());
        if !bytes.is_empty() {
            // SAFETY: the buffer holds as many bytes, or there was an error and nothing is done.
            self.attempt(|launcher| unsafe { launcher.upload(buffer.pointer(), bytes) });
        }
    }

    /// Writes `bytes` at `offset` of `buffer`, which holds them already.
    pub(super) fn upload_at(&self, buffer: &mut DeviceBuffer, offset: usize, bytes: &[u8]) {
        if self.error.borrow().is_some() || bytes.is_empty() {
            return;
        }
        assert!(offset + bytes.len() <= buffer.bytes, "a write beyond a buffer of {} bytes", buffer.bytes);
        // SAFETY: the range is inside the buffer.
        self.attempt(|launcher| unsafe { launcher.upload(buffer.pointer().offset(offset), bytes) });
    }

    /// Copies `bytes` bytes at `from` to `to`; the two ranges do not overlap.
    pub(super) fn copy_within(&self, buffer: &mut DeviceBuffer, from: usize, to: usize, bytes: usize) {
        if self.error.borrow().is_some() || from == to || bytes == 0 {
            return;
        }
        assert!(from.max(to) + bytes <= buffer.bytes && from.abs_diff(to) >= bytes, "ranges of one buffer, apart");
        let pointer = buffer.pointer();
        // SAFETY: both ranges are inside the buffer and apart.
        self.attempt(|launcher| unsafe { launcher.copy(pointer.offset(from), pointer.offset(to), bytes) });
    }

    /// Reads `out.len()` bytes from `offset` on; leaves `out` as it is after an error.
    pub(super) fn download(&self, buffer: &DeviceBuffer, offset: usize, out: &mut [u8]) {
        if self.error.borrow().is_some() || out.is_empty() {
            return;
        }
        assert!(offset + out.len() <= buffer.bytes, "a read beyond a buffer of {} bytes", buffer.bytes);
        // SAFETY: the range is inside the buffer.
        self.attempt(|launcher| unsafe { launcher.download(buffer.pointer().offset(offset), out) });
    }

    pub(super) fn zero(&self, buffer: &mut DeviceBuffer, bytes: usize) {
        self.reserve(buffer, bytes);
        if bytes > 0 {
            // SAFETY: the buffer holds as many bytes, or there was an error and nothing is done.
            self.attempt(|launcher| unsafe { launcher.zero(buffer.pointer(), bytes) });
        }
    }

    /// Whatever was asked for begins now, if it has not begun.
    pub(super) fn begin(&self) {
        self.attempt(|launcher| launcher.begin());
    }

    /// Starts a kernel, unless its grid is empty.
    ///
    /// # Safety
    /// As for [`Launcher::launch`].
    pub(super) unsafe fn launch(&self, launch: Launch, args: &[Arg]) {
        if launch.grid.iter().all(|&n| n > 0) {
            // SAFETY: forwarded; after an error, when buffers may be empty, nothing is launched.
            self.attempt(|launcher| unsafe { launcher.launch(launch, args) });
        }
    }
}

/// Plain numbers as the bytes they are made of.
pub(super) trait Bytes {
    fn bytes(&self) -> &[u8];
}

macro_rules! bytes {
    ($($t:ty),*) => {$(
        impl Bytes for [$t] {
            fn bytes(&self) -> &[u8] {
                // SAFETY: any byte of a plain number may be read, and `u8` has no alignment.
                unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), size_of_val(self)) }
            }
        }
    )*};
}
bytes!(u16, u32, f32);

/// Plain numbers to be overwritten byte by byte.
pub(super) trait BytesMut {
    fn bytes_mut(&mut self) -> &mut [u8];
}

macro_rules! bytes_mut {
    ($($t:ty),*) => {$(
        impl BytesMut for [$t] {
            fn bytes_mut(&mut self) -> &mut [u8] {
                // SAFETY: any bytes are such a number, and `u8` has no alignment.
                unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), size_of_val(self)) }
            }
        }
    )*};
}
bytes_mut!(u64, f32);
