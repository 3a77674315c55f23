//! The only way into the engine from other threads: submit a request, read its stream, drop the stream to cancel.

use crate::request::{Event, GenerateRequest};

/// A cheap, cloneable reference to the engine thread.
#[derive(Clone)]
pub struct EngineHandle {
    requests: flume::Sender<(GenerateRequest, flume::Sender<Event>)>,
}

/// Events of one request. Dropping it cancels the request; its blocks are free within one step.
pub struct EventStream {
    events: flume::Receiver<Event>,
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error("{waiting} requests are waiting already and the limit is {limit}; try again later")]
    QueueFull { waiting: usize, limit: usize },
    #[error("the request needs {needed} KV-cache tokens and the cache holds {capacity}")]
    TooLarge { needed: usize, capacity: usize },
    #[error("the server is shutting down")]
    Draining,
    #[error("the engine has stopped: {0}")]
    Dead(String),
}

impl EngineHandle {
    /// Queues a request; never blocks.
    pub fn submit(&self, request: GenerateRequest) -> Result<EventStream, SubmitError> {
        let _ = (&self.requests, request);
        unimplemented!()
    }
}

impl EventStream {
    /// The next event; `None` after the terminal one.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv_async().await.ok()
    }
}
