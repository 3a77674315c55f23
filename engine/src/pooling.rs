//! Embeddings: a prompt computed like any other, whose hidden states become one vector instead of a next token.

use std::sync::Arc;

use rill_models::Pooling;

use crate::adapter::LoadedAdapter;
use crate::request::GenerateRequest;
use crate::sequence::Tenant;

/// One text to embed. The values that come back are neither cut nor normalised.
#[derive(Debug, Clone)]
pub struct EmbedRequest {
    /// Never empty, never longer than the context.
    pub prompt: Vec<u32>,
    pub pooling: Pooling,
    /// Smaller runs earlier.
    pub priority: i32,
    /// Requests share cached prefixes only with requests of the same salt.
    pub cache_salt: Option<String>,
    /// On whose behalf it runs.
    pub tenant: Tenant,
    /// Runs with it.
    pub adapter: Option<Arc<LoadedAdapter>>,
}

impl EmbedRequest {
    /// The same as a request that generates nothing.
    pub(crate) fn into_generate(self) -> (GenerateRequest, Pooling) {
        let request = GenerateRequest {
            priority: self.priority,
            tenant: self.tenant,
            cache_salt: self.cache_salt,
            adapter: self.adapter,
            ..GenerateRequest::greedy(self.prompt, 0)
        };
        (request, self.pooling)
    }
}

/// The hidden states of one prompt, summed as they are computed: in order of position, whatever the chunks, so that
/// the result is the same bits however the prompt was cut.
#[derive(Debug)]
pub(crate) struct Pool {
    pooling: Pooling,
    /// The first position not taken in. A preempted prompt is computed again up to here, to no effect.
    next: usize,
    /// The first position not wanted.
    end: usize,
    sum: Vec<f64>,
}

impl Pool {
    pub(crate) fn new(pooling: Pooling, prompt_len: usize) -> Pool {
        let next = match pooling {
            Pooling::Mean | Pooling::Cls => 0,
            Pooling::Last | Pooling::Other => prompt_len - 1,
        };
        let end = if pooling == Pooling::Cls { 1 } else { prompt_len };
        Pool { pooling, next, end, sum: Vec::new() }
    }

    /// Whether nothing may come from the prefix cache, which holds no hidden states.
    pub(crate) fn needs_all(pooling: Pooling) -> bool {
        matches!(pooling, Pooling::Mean | Pooling::Cls)
    }

    pub(crate) fn wants(&self, position: usize) -> bool {
        (self.next..self.end).contains(&position)
    }

    /// Takes in the state of the next position wanted.
    pub(crate) fn add(&mut self, position: usize, state: &[f32]) {
        debug_assert_eq!(position, self.next);
        self.next = position + 1;
        self.sum.resize(state.len(), 0.0);
        self.sum.iter_mut().zip(state).for_each(|(sum, &value)| *sum += f64::from(value));
    }

    /// The embedding, once all wanted positions are in.
    pub(crate) fn finish(&self) -> Vec<f32> {
        debug_assert_eq!(self.next, self.end);
        let count = match self.pooling {
            Pooling::Mean => self.end as f64,
            Pooling::Last | Pooling::Cls | Pooling::Other => 1.0,
        };
        self.sum.iter().map(|&sum| (sum / count) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind() {
        for (pooling, wanted, expected) in [
            (Pooling::Mean, vec![0, 1, 2], vec![2.0, 4.0]),
            (Pooling::Last, vec![2], vec![3.0, 6.0]),
            (Pooling::Cls, vec![0], vec![1.0, 2.0]),
        ] {
            let mut pool = Pool::new(pooling, 3);
            let positions: Vec<usize> = (0..5).filter(|&position| pool.wants(position)).collect();
            assert_eq!(positions, wanted);
            for position in positions {
                let value = position as f32 + 1.0;
                pool.add(position, &[value, value * 2.0]);
                // Computed again after a preemption.
                assert!(!pool.wants(position));
            }
            assert_eq!(pool.finish(), expected);
        }
    }
}
