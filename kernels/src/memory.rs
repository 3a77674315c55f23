//! Zeroed, aligned memory for weights, caches and activations. Large buffers are mapped, so that their pages cost
//! nothing until they are used, and ask for huge pages.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Buffers at least this large are mapped.
const HUGE_PAGE: usize = 2 << 20;
/// A cache line, and the widest vector.
pub(crate) const LINE: usize = 64;

/// Has the line at `address`, which need not exist, brought into the second-level cache.
#[inline(always)]
pub(crate) fn prefetch(address: usize) {
    // SAFETY: a prefetch reads nothing as far as the program can see, and never faults.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address));
    }
    // SAFETY: as above.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{p}]", p = in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// Plain numbers: any bytes are a value, and all of them are initialised.
pub trait Number: Copy + Send + Sync + 'static {}
impl Number for u8 {}
impl Number for i8 {}
impl Number for u16 {}
impl Number for i16 {}
impl Number for i32 {}
impl Number for f32 {}

/// A fixed-size, 64-byte aligned, zero-initialised slice.
pub struct Buffer<T: Number> {
    data: NonNull<T>,
    len: usize,
}

// SAFETY: a `Buffer` owns its memory exclusively, like a `Vec`.
unsafe impl<T: Number> Send for Buffer<T> {}
// SAFETY: as above.
unsafe impl<T: Number> Sync for Buffer<T> {}

impl<T: Number> Buffer<T> {
    /// Allocates `len` zeros.
    pub fn zeroed(len: usize) -> Buffer<T> {
        if len == 0 {
            return Buffer { data: NonNull::dangling(), len };
        }
        let layout = Self::layout(len);
        #[cfg(target_os = "linux")]
        if layout.size() >= HUGE_PAGE {
            return Buffer { data: map(layout).cast(), len };
        }
        // SAFETY: the layout is not empty; zero bytes are valid `T` (see `Number`).
        let data = unsafe { alloc_zeroed(layout) };
        let Some(data) = NonNull::new(data.cast::<T>()) else { handle_alloc_error(layout) };
        Buffer { data, len }
    }

    /// Grows to at least `len` elements; contents are zeroed if it does.
    pub fn reserve(&mut self, len: usize) {
        if self.len < len {
            *self = Buffer::zeroed(len);
        }
    }

    /// The bytes it is made of.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: any byte of a plain number may be read, and `u8` has no alignment.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr().cast(), self.len * size_of::<T>()) }
    }

    /// The bytes it is made of, to be overwritten.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, exclusively borrowed; any bytes make a plain number.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr().cast(), self.len * size_of::<T>()) }
    }

    fn layout(len: usize) -> Layout {
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer's size fits the address space");
        Layout::from_size_align(bytes, LINE).expect("a buffer's size fits the address space")
    }
}

/// Maps zeroed pages, page aligned.
#[cfg(target_os = "linux")]
fn map(layout: Layout) -> NonNull<u8> {
    // SAFETY: a fresh anonymous private mapping touches no memory of ours.
    let data = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            layout.size(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if data == libc::MAP_FAILED {
        handle_alloc_error(layout);
    }
    // SAFETY: the range is the mapping just made; the advice changes no contents and may fail.
    unsafe { libc::madvise(data, layout.size(), libc::MADV_HUGEPAGE) };
    NonNull::new(data.cast()).expect("a mapping is never at address zero")
}

impl<T: Number> Default for Buffer<T> {
    fn default() -> Buffer<T> {
        Buffer::zeroed(0)
    }
}

impl<T: Number> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.len == 0 {
            return;
        }
        let layout = Self::layout(self.len);
        #[cfg(target_os = "linux")]
        if layout.size() >= HUGE_PAGE {
            // SAFETY: mapped in `zeroed` with the same size, and nobody else refers to it.
            unsafe { libc::munmap(self.data.as_ptr().cast(), layout.size()) };
            return;
        }
        // SAFETY: allocated in `zeroed` with the same layout.
        unsafe { dealloc(self.data.as_ptr().cast(), layout) }
    }
}

impl<T: Number> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised elements, owned by `self`.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T: Number> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and exclusively borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

/// A pointer that chunks of one parallel job write through, each to places no other chunk touches.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);

// SAFETY: it is only an address; every dereference states why no two threads meet there.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(slice: &mut [T]) -> Shared<T> {
        Shared(slice.as_mut_ptr())
    }

    /// The same for memory that is written before it is read.
    pub(crate) fn uninit(slice: &mut [MaybeUninit<T>]) -> Shared<T> {
        Shared(slice.as_mut_ptr().cast())
    }

    /// The same memory from `index` on.
    pub(crate) fn from(self, index: usize) -> Shared<T> {
        Shared(self.at(index))
    }

    pub(crate) fn at(self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}
