//! Several downloads at once, told of as one.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};

use super::Progress;

/// More connections gain nothing and annoy hubs.
const DOWNLOADS_MAX: usize = 4;

/// What a download has to tell.
enum Told {
    Received { job: usize, bytes: u64 },
    Note(String),
}

/// Tells the thread that waits for all downloads; knows when another has failed.
struct Reporter<'a> {
    job: usize,
    tell: mpsc::Sender<Told>,
    failed: &'a AtomicBool,
}

impl Progress for Reporter<'_> {
    fn start(&mut self, _what: &str, _total_bytes: Option<u64>) {}

    fn received(&mut self, bytes: u64) {
        // Whoever waits does so until this sender is gone.
        let _ = self.tell.send(Told::Received { job: self.job, bytes });
    }

    fn finish(&mut self) {}

    fn note(&mut self, message: &str) {
        let _ = self.tell.send(Told::Note(message.to_owned()));
    }

    fn given_up(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}

/// Runs `work` for each job, a few at a time, and tells `progress` of the bytes of all together. After the first error
/// no job begins, those under way are told to give up, and the error is returned; else the results, in order.
pub(super) fn run<J: Sync, T: Send, E: Send>(
    jobs: &[J],
    progress: &mut dyn Progress,
    work: impl Fn(&J, &mut dyn Progress) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let failed = AtomicBool::new(false);
    let left = Mutex::new((0..jobs.len()).collect::<VecDeque<usize>>());
    let (tell, told) = mpsc::channel();
    let mut received = vec![0; jobs.len()];
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs.len().min(DOWNLOADS_MAX))
            .map(|_| {
                let (tell, left, failed, work) = (tell.clone(), &left, &failed, &work);
                scope.spawn(move || {
                    let mut done = Vec::new();
                    while !failed.load(Ordering::Relaxed) {
                        let next = left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                        let Some(job) = next else { break };
                        let mut reporter = Reporter { job, tell: tell.clone(), failed };
                        match work(&jobs[job], &mut reporter) {
                            Ok(result) => done.push((job, result)),
                            Err(error) => {
                                // Those that give up because of it have nothing to add.
                                let first = !failed.swap(true, Ordering::Relaxed);
                                return if first { Err(error) } else { Ok(done) };
                            }
                        }
                    }
                    Ok(done)
                })
            })
            .collect();
        drop(tell);
        for message in told {
            match message {
                Told::Received { job, bytes } => {
                    received[job] = bytes;
                    progress.received(received.iter().sum());
                }
                Told::Note(message) => progress.note(&message),
            }
        }
        let mut results = Vec::with_capacity(jobs.len());
        for thread in threads {
            match thread.join() {
                Ok(done) => results.extend(done?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results.sort_by_key(|(job, _)| *job);
        Ok(results.into_iter().map(|(_, result)| result).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Heard(Vec<u64>, Vec<String>);

    impl Progress for Heard {
        fn start(&mut self, _what: &str, _total_bytes: Option<u64>) {}
        fn received(&mut self, bytes: u64) {
            self.0.push(bytes);
        }
        fn finish(&mut self) {}
        fn note(&mut self, message: &str) {
            self.1.push(message.to_owned());
        }
    }

    #[test]
    fn results_keep_their_order_and_bytes_add_up() {
        let jobs: Vec<u64> = (1..=9).collect();
        let mut heard = Heard::default();
        let doubled = run(&jobs, &mut heard, |&job, progress| {
            progress.received(job / 2);
            std::thread::sleep(std::time::Duration::from_millis(10 - job));
            progress.received(job);
            Ok::<_, ()>(2 * job)
        });
        assert_eq!(doubled.unwrap(), (1..=9).map(|job| 2 * job).collect::<Vec<_>>());
        assert!(heard.0.is_sorted());
        assert_eq!(heard.0.last(), Some(&45));
    }

    #[test]
    fn the_first_error_stops_the_rest() {
        let jobs: Vec<usize> = (0..100).collect();
        let ran = Mutex::new(0);
        let error = run(&jobs, &mut Heard::default(), |&job, progress| {
            *ran.lock().unwrap() += 1;
            if job == 1 {
                return Err("broken");
            }
            let started = std::time::Instant::now();
            while !progress.given_up() {
                assert!(started.elapsed().as_secs() < 10, "nobody says that it is over");
                std::thread::yield_now();
            }
            Err::<(), _>("given up")
        });
        assert_eq!(error.unwrap_err(), "broken");
        assert!(*ran.lock().unwrap() <= DOWNLOADS_MAX);
    }
}
