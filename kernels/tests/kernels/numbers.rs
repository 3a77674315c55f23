//! Repeatable random numbers that tests draw their inputs from, those of the CUDA kernels (`kernels/shim`) too.

/// A small generator (splitmix64), so that failures repeat.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in [-1, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// About normal, variance 1: heads and tails as activations have them.
    pub fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.uniform()).sum::<f32>() * 0.5_f32.sqrt()
    }

    /// Activations: mostly normal, some groups of zeros, some outliers.
    pub fn activations(&mut self, len: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            let kind = self.below(16);
            for _ in 0..32.min(len - out.len()) {
                out.push(match kind {
                    0 => 0.0,
                    1 => self.normal() * 1e-4,
                    2 if self.below(8) == 0 => self.normal() * 1e4,
                    _ => self.normal(),
                });
            }
        }
        out
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}
