//! Shutting down without dropping a stream: who is still being answered, and whether new work is taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Counts requests being answered; once draining, lets none in.
#[derive(Default)]
pub struct Drain {
    draining: AtomicBool,
    in_flight: AtomicUsize,
    idle: Notify,
}

/// A request being answered, until dropped.
pub struct InFlight(Arc<Drain>);

impl Drain {
    /// `None` while draining.
    pub fn enter(self: &Arc<Self>) -> Option<InFlight> {
        // Counted first: whoever drains either sees this request or is seen by it.
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        let guard = InFlight(self.clone());
        if self.is_draining() { None } else { Some(guard) }
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// From now on nothing new enters.
    pub fn start(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Resolves when nothing is in flight.
    pub async fn idle(&self) {
        loop {
            let notified = self.idle.notified();
            if self.in_flight() == 0 {
                return;
            }
            notified.await;
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn draining_lets_none_in_and_waits_for_the_rest() {
        let drain = Arc::new(Drain::default());
        let first = drain.enter().unwrap();
        drain.start();
        assert!(drain.enter().is_none());
        assert_eq!(drain.in_flight(), 1);
        assert!(drain.idle().now_or_never().is_none());
        drop(first);
        assert!(drain.idle().now_or_never().is_some());
    }
}
