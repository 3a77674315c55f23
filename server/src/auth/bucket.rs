//! A limit a minute as a bucket: full at first, filled again at an even rate, emptied by what is used.

use std::time::{Duration, Instant};

/// Refills `per_minute` a minute, up to as much.
#[derive(Debug, Clone, PartialEq)]
pub struct Bucket {
    per_minute: u64,
    /// Below 0 once more was used than had been set aside.
    level: f64,
    /// When `level` was right.
    at: Instant,
}

/// A bucket at one moment, as response headers tell it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    pub limit: u64,
    pub remaining: u64,
    /// Until it is full if nothing more is used.
    pub reset: Duration,
}

impl Bucket {
    pub fn new(per_minute: u64, now: Instant) -> Bucket {
        Bucket { per_minute, level: per_minute as f64, at: now }
    }

    pub fn per_minute(&self) -> u64 {
        self.per_minute
    }

    /// Another limit from now on: what has been used stays used.
    pub fn set_per_minute(&mut self, per_minute: u64, now: Instant) {
        self.refill(now);
        self.level += per_minute as f64 - self.per_minute as f64;
        self.per_minute = per_minute;
    }

    /// Takes `amount`, or says how long to wait until it can be taken. No more than the limit can be.
    pub fn take(&mut self, amount: u64, now: Instant) -> Result<(), Duration> {
        self.refill(now);
        let amount = amount as f64;
        if amount > self.level {
            return Err(self.time_for(amount - self.level));
        }
        self.level -= amount;
        Ok(())
    }

    /// `used` in place of `taken`: the rest comes back, or what is missing is owed.
    pub fn settle(&mut self, taken: u64, used: u64, now: Instant) {
        self.refill(now);
        self.level = (self.level + taken as f64 - used as f64).min(self.per_minute as f64);
    }

    pub fn read(&mut self, now: Instant) -> Reading {
        self.refill(now);
        Reading {
            limit: self.per_minute,
            remaining: self.level.max(0.0) as u64,
            reset: self.time_for(self.per_minute as f64 - self.level),
        }
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        let more = elapsed.as_secs_f64() * self.per_minute as f64 / 60.0;
        self.level = (self.level + more).min(self.per_minute as f64);
    }

    fn time_for(&self, amount: f64) -> Duration {
        Duration::try_from_secs_f64(amount * 60.0 / self.per_minute.max(1) as f64).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_empties_and_fills() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut bucket = Bucket::new(60, start);
        assert_eq!(bucket.take(60, at(0)), Ok(()));
        assert_eq!(bucket.take(1, at(0)), Err(Duration::from_secs(1)));
        assert_eq!(bucket.read(at(0)), Reading { limit: 60, remaining: 0, reset: Duration::from_secs(60) });
        assert_eq!(bucket.take(10, at(10)), Ok(()));
        assert_eq!(bucket.read(at(1000)), Reading { limit: 60, remaining: 60, reset: Duration::ZERO });
        // A moment from before, as threads may bring it, takes nothing back.
        assert_eq!(bucket.take(60, at(1000)), Ok(()));
        assert_eq!(bucket.read(at(999)).remaining, 0);
        assert_eq!(bucket.read(at(1001)).remaining, 1);
    }

    #[test]
    fn what_was_not_used_comes_back_and_what_was_missing_is_owed() {
        let now = Instant::now();
        let mut bucket = Bucket::new(100, now);
        bucket.take(80, now).unwrap();
        bucket.settle(80, 30, now);
        assert_eq!(bucket.read(now).remaining, 70);
        bucket.take(70, now).unwrap();
        bucket.settle(70, 120, now);
        assert_eq!(bucket.read(now).remaining, 0);
        assert_eq!(bucket.take(50, now), Err(Duration::from_secs(60)));
        assert_eq!(bucket.take(50, now + Duration::from_secs(60)), Ok(()));
    }

    #[test]
    fn another_limit_keeps_what_was_used() {
        let now = Instant::now();
        let mut bucket = Bucket::new(100, now);
        bucket.take(40, now).unwrap();
        bucket.set_per_minute(50, now);
        assert_eq!(bucket.read(now).remaining, 10);
        bucket.set_per_minute(200, now);
        assert_eq!(bucket.read(now).remaining, 160);
    }
}
