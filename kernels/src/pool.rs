//! Worker threads for the step loop: one owner hands out chunks of work, everybody takes the next one.
//!
//! A static split loses to any neighbour on the machine: the thread that was interrupted holds everybody up. Here
//! chunks are claimed one at a time from one atomic. Waiting is a short spin, then yielding, then parking, so idle
//! workers cost nothing and busy neighbours are let in.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::thread::{JoinHandle, Thread};

/// Spins before a waiting thread starts yielding its core (about 10 µs).
const SPINS: u32 = 400;
/// Yields before a waiting worker parks (about 100 µs on an idle machine).
const YIELDS: u32 = 200;

/// Low half of the ticket: chunks not yet claimed.
const REMAINING: u64 = 0xffff_ffff;
/// Added to the ticket for every job, so that a late worker's exchange fails.
const EPOCH: u64 = 1 << 32;

/// A job and the number of its chunks.
type Job = (*const (dyn Fn(usize) + Sync), usize);

struct Shared {
    /// `epoch << 32 | chunks not yet claimed`: a claim takes both in one exchange, so a chunk claimed belongs to the
    /// current job, and the job cannot end before that chunk is done.
    ticket: AtomicU64,
    /// Chunks not yet finished.
    pending: AtomicUsize,
    job: std::cell::UnsafeCell<Option<Job>>,
    panicked: AtomicBool,
    stop: AtomicBool,
}

// SAFETY: `job` is written by the owner only while no chunk is claimed or claimable, and read only between a
// successful claim and the matching `pending` decrement; `ticket` orders the two.
unsafe impl Sync for Shared {}
// SAFETY: the pointer inside is only dereferenced under the rule above.
unsafe impl Send for Shared {}

struct Worker {
    thread: Thread,
    parked: Arc<AtomicBool>,
    handle: Option<JoinHandle<()>>,
}

/// A pool of `threads - 1` workers; the owner is the last one.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
}

impl Shared {
    /// Claims the next chunk, as the number of chunks that were left.
    fn claim(&self) -> Option<usize> {
        let mut seen = self.ticket.load(Ordering::Acquire);
        while seen & REMAINING != 0 {
            match self.ticket.compare_exchange_weak(seen, seen - 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some((seen & REMAINING) as usize),
                Err(now) => seen = now,
            }
        }
        None
    }

    /// Runs chunks until none is left to claim.
    fn work(&self) {
        while let Some(left) = self.claim() {
            // SAFETY: a chunk of the current job is claimed and not finished, so the owner is still inside `run`:
            // the cell is not being written and the closure it points to is alive.
            let (job, chunks) = unsafe {
                let (job, chunks) = (*self.job.get()).expect("a job is set while chunks are left");
                (&*job, chunks)
            };
            if catch_unwind(AssertUnwindSafe(|| job(chunks - left))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.pending.fetch_sub(1, Ordering::Release);
        }
    }
}

impl Pool {
    /// Starts `threads - 1` workers (at least none).
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            pending: AtomicUsize::new(0),
            job: std::cell::UnsafeCell::new(None),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let workers = (1..threads.max(1))
            .map(|index| {
                let shared = Arc::clone(&shared);
                let parked = Arc::new(AtomicBool::new(false));
                let sees_parked = Arc::clone(&parked);
                let handle = std::thread::Builder::new()
                    .name(format!("rill-worker-{index}"))
                    .spawn(move || worker(&shared, &sees_parked))
                    .expect("the operating system starts a thread");
                Worker { thread: handle.thread().clone(), parked, handle: Some(handle) }
            })
            .collect();
        Pool { shared, workers }
    }

    /// Threads that take part in `run`, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(0)`, …, `f(chunks - 1)`, each once, on any thread, and returns when all are done. They are
    /// taken in ascending order.
    ///
    /// # Panics
    /// If a chunk panicked: with workers after all others have run, alone at once.
    pub fn run(&mut self, chunks: usize, f: &(dyn Fn(usize) + Sync)) {
        if chunks <= 1 || self.workers.is_empty() {
            (0..chunks).for_each(f);
            return;
        }
        assert!(chunks as u64 <= REMAINING, "{chunks} chunks in one job");
        // SAFETY: only the lifetime is erased; `run` does not return before every chunk is done.
        let job = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(f)
        };
        // SAFETY: `&mut self` and the wait below mean no job is running, and the ticket has no chunk left to claim,
        // so nobody reads the cell.
        unsafe { *self.shared.job.get() = Some((job, chunks)) };
        self.shared.pending.store(chunks, Ordering::Relaxed);
        let epoch = self.shared.ticket.load(Ordering::Relaxed) & !REMAINING;
        self.shared.ticket.store(epoch.wrapping_add(EPOCH) | chunks as u64, Ordering::Release);
        // Pairs with the fence in `worker`: either it sees the ticket or we see it parked.
        fence(Ordering::SeqCst);
        for worker in &self.workers {
            if worker.parked.load(Ordering::Relaxed) {
                worker.thread.unpark();
            }
        }
        self.shared.work();
        let mut waited = 0;
        while self.shared.pending.load(Ordering::Acquire) != 0 {
            waited += 1;
            if waited < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if self.shared.panicked.swap(false, Ordering::Relaxed) {
            panic!("a worker of the compute pool panicked");
        }
    }
}

fn worker(shared: &Shared, parked: &AtomicBool) {
    let mut idle = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        if shared.ticket.load(Ordering::Acquire) & REMAINING != 0 {
            shared.work();
            idle = 0;
            continue;
        }
        idle += 1;
        if idle < SPINS {
            std::hint::spin_loop();
        } else if idle < SPINS + YIELDS {
            std::thread::yield_now();
        } else {
            parked.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            let work_or_stop =
                shared.ticket.load(Ordering::Acquire) & REMAINING != 0 || shared.stop.load(Ordering::Relaxed);
            if !work_or_stop {
                std::thread::park();
            }
            parked.store(false, Ordering::Relaxed);
            idle = 0;
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in &mut self.workers {
            worker.thread.unpark();
            if let Some(handle) = worker.handle.take() {
                // A worker catches its chunks' panics, so it cannot have died of one.
                let _ = handle.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pool;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_chunk_runs_exactly_once() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads);
            for chunks in [0, 1, 2, 3, 17, 1000] {
                for _ in 0..50 {
                    let ran: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(chunks, &|i| {
                        ran[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(ran.iter().all(|n| n.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn parked_workers_wake_up() {
        let mut pool = Pool::new(3);
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            let sum = AtomicUsize::new(0);
            pool.run(100, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(2);
        let bad = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(10, &|i| assert!(i != 3, "planted"));
        }));
        assert!(bad.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
