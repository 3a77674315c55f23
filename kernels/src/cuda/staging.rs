//! Page-locked memory that copies pass through, on a stream of their own, so that the host fills one half while the
//! other is on its way. Part of the driver: no test can run it without a GPU.

use super::launch::CudaError;
use cudarc::driver::{result, sys};

/// Bytes of each half.
const HALF: usize = 4 << 20;

/// Two halves of page-locked memory, a stream, and events that order it with the stream kernels run on.
pub(super) struct Staging {
    memory: *mut u8,
    stream: sys::CUstream,
    /// The last copy of each half.
    copied: [sys::CUevent; 2],
    /// Where the kernels' stream was when copies began.
    reached: sys::CUevent,
}

fn failed(error: result::DriverError) -> CudaError {
    CudaError::Driver { what: "a copy to or from the GPU", reason: error.to_string() }
}

const WAIT: sys::CUevent_wait_flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

impl Staging {
    /// In the current context; held until the process ends.
    pub(super) fn new() -> Result<Staging, result::DriverError> {
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        // SAFETY: memory of the current context, two halves of it.
        let memory = unsafe { result::malloc_host(2 * HALF, 0)? }.cast();
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        Ok(Staging { memory, stream, copied: [event()?, event()?], reached: event()? })
    }

    /// Copies to the device, after what is on `kernels` and before what comes there next.
    ///
    /// # Safety
    /// `to` is the start of as many bytes of live device memory; the context is current.
    pub(super) unsafe fn upload(
        &mut self,
        to: sys::CUdeviceptr,
        bytes: &[u8],
        kernels: sys::CUstream,
    ) -> Result<(), CudaError> {
        // SAFETY: a half is written when its last copy is done; streams and events live as long as the process.
        unsafe {
            self.follow(kernels)?;
            for (number, part) in bytes.chunks(HALF).enumerate() {
                let (half, copied) = (self.memory.add(number % 2 * HALF), self.copied[number % 2]);
                result::event::synchronize(copied).map_err(failed)?;
                std::ptr::copy_nonoverlapping(part.as_ptr(), half, part.len());
                let staged = std::slice::from_raw_parts(half, part.len());
                let place = to + (number * HALF) as u64;
                result::memcpy_htod_async(place, staged, self.stream).map_err(failed)?;
                result::event::record(copied, self.stream).map_err(failed)?;
            }
            result::event::record(self.reached, self.stream).map_err(failed)?;
            result::stream::wait_event(kernels, self.reached, WAIT).map_err(failed)
        }
    }

    /// Copies from the device what `kernels` has made of it, and waits for it.
    ///
    /// # Safety
    /// `from` is the start of as many bytes of live device memory; the context is current.
    pub(super) unsafe fn download(
        &mut self,
        from: sys::CUdeviceptr,
        bytes: &mut [u8],
        kernels: sys::CUstream,
    ) -> Result<(), CudaError> {
        // SAFETY: as above; a half is read when its copy is done, and sent for again after that.
        unsafe {
            self.follow(kernels)?;
            let parts = bytes.len().div_ceil(HALF);
            for number in 0..=parts {
                if number < parts {
                    let len = HALF.min(bytes.len() - number * HALF);
                    let half = std::slice::from_raw_parts_mut(self.memory.add(number % 2 * HALF), len);
                    let place = from + (number * HALF) as u64;
                    result::memcpy_dtoh_async(half, place, self.stream).map_err(failed)?;
                    result::event::record(self.copied[number % 2], self.stream).map_err(failed)?;
                }
                if let Some(done) = number.checked_sub(1) {
                    result::event::synchronize(self.copied[done % 2]).map_err(failed)?;
                    let end = bytes.len().min((done + 1) * HALF);
                    let part = &mut bytes[done * HALF..end];
                    std::ptr::copy_nonoverlapping(self.memory.add(done % 2 * HALF), part.as_mut_ptr(), part.len());
                }
            }
        }
        Ok(())
    }

    /// Copies wait for what is on `kernels`.
    unsafe fn follow(&self, kernels: sys::CUstream) -> Result<(), CudaError> {
        // SAFETY: streams and events live as long as the process.
        unsafe {
            result::event::record(self.reached, kernels).map_err(failed)?;
            result::stream::wait_event(self.stream, self.reached, WAIT).map_err(failed)
        }
    }
}
