//! Worker threads for the step loop: one owner hands out chunks of work, everybody takes the next one.
//!
//! A static split loses to any neighbour on the machine: the thread that was interrupted holds everybody up. So chunks are
//! claimed one at a time. Each thread has a lane of them that it takes first, so that what it reads can lie together and is
//! known beforehand; who is through with its own helps the others. Waiting is asking memory for what comes next
//! ([`Ahead`]), then a short spin, then yielding, then parking, so idle workers cost nothing and busy neighbours are let in.

use crate::memory::{LINE, prefetch};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::thread::{JoinHandle, Thread};

/// Spins before a waiting thread starts yielding its core (about 10 µs).
const SPINS: u32 = 400;
/// Yields before a waiting worker parks (about 100 µs on an idle machine).
const YIELDS: u32 = 200;

/// Added to the ticket for every job. A lane of another epoch has no chunk claimed.
const EPOCH: u64 = 1 << 24;
/// What is below it: in a ticket the chunks of the job, in a lane how many of its chunks are claimed.
const COUNT: u64 = EPOCH - 1;

/// Runs of memory in an [`Ahead`].
pub(crate) const RUNS: usize = 4;

/// What a thread is going to read first in a job to come: runs of memory, walked side by side. Addresses are only asked
/// for, never read, so nothing has to be there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Ahead {
    /// Address, and bytes at each step.
    pub(crate) runs: [(usize, usize); RUNS],
    pub(crate) steps: usize,
}

/// A thread's [`Ahead`] as the owner left it. Parts of two may be read as one: it is no more than a hint.
#[derive(Default)]
#[repr(align(128))]
struct Notice {
    version: AtomicU64,
    runs: [(AtomicUsize, AtomicUsize); RUNS],
    steps: AtomicUsize,
}

/// How far a thread has walked.
#[derive(Default)]
struct Walk {
    version: u64,
    ahead: Ahead,
    step: usize,
}

/// Chunks claimed of one thread's share of the job.
#[derive(Default)]
#[repr(align(128))]
struct Lane(AtomicU64);

/// A job.
type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Epoch and chunks of the job there is, or of the last one.
    ticket: AtomicU64,
    /// One for each thread, the owner's first: chunk `c` is in lane `c % lanes`. A lane is claimed from in one exchange that
    /// names the job's epoch, so a chunk claimed belongs to the current job, which cannot end before that chunk is done: all
    /// lanes of a job that has ended are claimed to their ends, or are a later job's.
    lanes: Box<[Lane]>,
    /// Chunks not yet finished.
    pending: AtomicUsize,
    job: std::cell::UnsafeCell<Option<Job>>,
    notices: Box<[Notice]>,
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
    walk: Walk,
}

/// What chunk `chunk` takes of `0..count`. Each thread has an equal run of it, which memory likes, and the same one job after job,
/// so that what one leaves in a thread's cache the next one finds there; every round takes half of what is left of it, the last
/// one all. Short chunks come last, so that nobody waits long for a thread that lost its core.
pub(crate) fn share(count: usize, (rounds, threads): (usize, usize), chunk: usize) -> Range<usize> {
    let (round, thread) = (chunk / threads, chunk % threads);
    let (start, end) = (count * thread / threads, count * (thread + 1) / threads);
    let bound = |round: usize| if round >= rounds { end } else { end - ((end - start) >> round) };
    bound(round)..bound(round + 1)
}

impl Notice {
    fn write(&self, ahead: &Ahead) {
        for ((address, bytes), run) in self.runs.iter().zip(ahead.runs) {
            address.store(run.0, Ordering::Relaxed);
            bytes.store(run.1, Ordering::Relaxed);
        }
        self.steps.store(ahead.steps, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    fn read(&self) -> Ahead {
        let read = |at: &AtomicUsize| at.load(Ordering::Relaxed);
        let runs = self.runs.each_ref().map(|(address, bytes)| (read(address), read(bytes)));
        Ahead { runs, steps: read(&self.steps) }
    }
}

impl Walk {
    /// Asks for the next step; false if there is none.
    fn step(&mut self, notice: &Notice) -> bool {
        let version = notice.version.load(Ordering::Acquire);
        if self.version != version {
            *self = Walk { version, ahead: notice.read(), step: 0 };
        }
        if self.step >= self.ahead.steps {
            return false;
        }
        for (address, bytes) in self.ahead.runs {
            let at = address.wrapping_add(self.step.wrapping_mul(bytes));
            (0..bytes).step_by(LINE).for_each(|line| prefetch(at.wrapping_add(line)));
        }
        self.step += 1;
        true
    }
}

impl Shared {
    /// Claims the next chunk of a lane in the job of `ticket`.
    fn claim(&self, lane: usize, ticket: u64) -> Option<usize> {
        let (epoch, chunks) = (ticket & !COUNT, (ticket & COUNT) as usize);
        let (lanes, place) = (self.lanes.len(), &self.lanes[lane].0);
        let len = (chunks + lanes - 1 - lane) / lanes;
        let mut seen = place.load(Ordering::Acquire);
        loop {
            let later = (seen & !COUNT).wrapping_sub(epoch).cast_signed();
            let claimed = if later == 0 { seen & COUNT } else { 0 };
            if later > 0 || claimed as usize >= len {
                return None;
            }
            match place.compare_exchange_weak(seen, epoch | (claimed + 1), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(lane + claimed as usize * lanes),
                Err(now) => seen = now,
            }
        }
    }

    /// Runs chunks of the job of `ticket` until none is left to claim: thread `me`'s own, then those of the threads after it.
    fn work(&self, me: usize, ticket: u64) {
        let mut done = 0;
        for lane in (me..self.lanes.len()).chain(0..me) {
            while let Some(chunk) = self.claim(lane, ticket) {
                // SAFETY: a chunk of the current job is claimed and not finished, so the owner is still inside `run`:
                // the cell is not being written and the closure it points to is alive.
                let job = unsafe { &*(*self.job.get()).expect("a job is set while chunks are left") };
                if catch_unwind(AssertUnwindSafe(|| job(chunk))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
                done += 1;
            }
        }
        if done > 0 {
            self.pending.fetch_sub(done, Ordering::Release);
        }
    }
}

impl Pool {
    /// Starts `threads - 1` workers (at least none).
    pub fn new(threads: usize) -> Pool {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            lanes: (0..threads).map(|_| Lane::default()).collect(),
            pending: AtomicUsize::new(0),
            job: std::cell::UnsafeCell::new(None),
            notices: (0..threads).map(|_| Notice::default()).collect(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let workers = (1..threads)
            .map(|index| {
                let shared = Arc::clone(&shared);
                let parked = Arc::new(AtomicBool::new(false));
                let sees_parked = Arc::clone(&parked);
                let handle = std::thread::Builder::new()
                    .name(format!("rill-worker-{index}"))
                    .spawn(move || worker(&shared, index, &sees_parked))
                    .expect("the operating system starts a thread");
                Worker { thread: handle.thread().clone(), parked, handle: Some(handle) }
            })
            .collect();
        Pool { shared, workers, walk: Walk::default() }
    }

    /// Threads that take part in `run`, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Says what each thread will read first after the jobs to come, for those who wait to ask memory for.
    pub(crate) fn expect(&mut self, aheads: &[Ahead]) {
        if !self.workers.is_empty() {
            self.shared.notices.iter().zip(aheads).for_each(|(notice, ahead)| notice.write(ahead));
        }
    }

    #[cfg(test)]
    pub(crate) fn expected(&self, thread: usize) -> Ahead {
        self.shared.notices[thread].read()
    }

    /// Calls `f(0)`, …, `f(chunks - 1)`, each once, on any thread, and returns when all are done. Chunk `c` is meant for
    /// thread `c % threads`; a thread takes those meant for it in ascending order, then what others have not come to.
    ///
    /// # Panics
    /// If a chunk panicked: with workers after all others have run, alone at once.
    pub fn run(&mut self, chunks: usize, f: &(dyn Fn(usize) + Sync)) {
        if chunks <= 1 || self.workers.is_empty() {
            (0..chunks).for_each(f);
            return;
        }
        assert!(chunks as u64 <= COUNT, "{chunks} chunks in one job");
        // SAFETY: only the lifetime is erased; `run` does not return before every chunk is done.
        let job = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(f)
        };
        // SAFETY: `&mut self` and the wait below mean no job is running, and no lane has a chunk left to claim, so nobody
        // reads the cell.
        unsafe { *self.shared.job.get() = Some(job) };
        self.shared.pending.store(chunks, Ordering::Relaxed);
        let epoch = self.shared.ticket.load(Ordering::Relaxed) & !COUNT;
        let ticket = epoch.wrapping_add(EPOCH) | chunks as u64;
        self.shared.ticket.store(ticket, Ordering::Release);
        // Pairs with the fence in `worker`: either it sees the ticket or we see it parked.
        fence(Ordering::SeqCst);
        for worker in &self.workers {
            if worker.parked.load(Ordering::Relaxed) {
                worker.thread.unpark();
            }
        }
        self.shared.work(0, ticket);
        let mut waited = 0;
        while self.shared.pending.load(Ordering::Acquire) != 0 {
            if self.walk.step(&self.shared.notices[0]) {
                continue;
            }
            waited += 1;
            if waited < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if self.shared.panicked.swap(false, Ordering::Relaxed) {
            panic!("a worker of the compute pool panicked");
        }
    }
}

fn worker(shared: &Shared, me: usize, parked: &AtomicBool) {
    let (mut idle, mut seen, mut walk) = (0, 0, Walk::default());
    while !shared.stop.load(Ordering::Relaxed) {
        let ticket = shared.ticket.load(Ordering::Acquire);
        if ticket != seen {
            shared.work(me, ticket);
            (idle, seen) = (0, ticket);
            continue;
        }
        if walk.step(&shared.notices[me]) {
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
                shared.ticket.load(Ordering::Acquire) != seen || shared.stop.load(Ordering::Relaxed);
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
    use super::{Pool, share};
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

    /// A thread that lost its core comes back to a job that has ended, with another number of chunks after it.
    #[test]
    fn late_workers_claim_nothing_of_jobs_that_ended() {
        let mut pool = Pool::new(6);
        let ran: Vec<AtomicUsize> = (0..64).map(|_| AtomicUsize::new(0)).collect();
        for job in 0..20_000 {
            let chunks = 2 + job * 37 % 63;
            pool.run(chunks, &|i| {
                ran[i].fetch_add(1, Ordering::Relaxed);
            });
            for (i, ran) in ran.iter().enumerate() {
                assert_eq!(
                    ran.swap(0, Ordering::Relaxed),
                    usize::from(i < chunks),
                    "job {job}, chunk {i} of {chunks}"
                );
            }
        }
    }

    #[test]
    fn shares_cover_everything_once() {
        for (count, threads) in (0..70).flat_map(|count| (1..6).map(move |threads| (count, threads))) {
            for rounds in [1, 3, 5, 7] {
                let mut next = 0;
                for thread in 0..threads {
                    let (start, mut last) = (next, usize::MAX);
                    for round in 0..rounds {
                        let share = share(count, (rounds, threads), round * threads + thread);
                        let case =
                            format!("{count} in {rounds} rounds, {threads} threads: {thread} in round {round}");
                        assert_eq!(share.start, next, "{case}");
                        assert!(share.len() <= last || round + 1 == rounds, "{case}");
                        (next, last) = (share.end, share.len());
                    }
                    assert!((next - start).abs_diff(count / threads) <= 1, "equal shares");
                }
                assert_eq!(next, count);
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
