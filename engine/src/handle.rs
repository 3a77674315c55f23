//! The only way into the engine from other threads: submit a request, read its stream, drop the stream to cancel.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rill_models::Pooling;

use crate::config::EngineConfig;
use crate::inspect::EngineState;
use crate::pooling::EmbedRequest;
use crate::request::{Event, GenerateRequest};
use crate::stats::{BacklogFull, BacklogPlace, Stats};
use crate::step_loop::Clock;

/// Who may wait to be told the engine's state.
const INSPECTORS_MAX: usize = 8;

/// A cheap, cloneable reference to the engine thread.
#[derive(Clone)]
pub struct EngineHandle {
    messages: flume::Sender<Message>,
    shared: Arc<Shared>,
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
    #[error("{waiting_tokens} prompt tokens are waiting already and the limit is {limit}; try again later")]
    QueueTokensFull { waiting_tokens: usize, limit: usize },
    #[error("the request needs {needed} KV-cache tokens and the cache holds {capacity}")]
    TooLarge { needed: usize, capacity: usize },
    /// The request makes no sense to the engine; the message names the field, the limit and the value.
    #[error("{0}")]
    Invalid(String),
    #[error("the server is shutting down")]
    Draining,
    #[error("the engine has stopped: {0}")]
    Dead(String),
}

/// How the engine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Takes requests.
    Ready,
    /// Takes no new requests; those it has go on.
    Draining,
    /// Was shut down.
    Stopped,
    /// Died of this.
    Dead(String),
}

/// What travels to the engine thread.
pub(crate) enum Message {
    Submit(Vec<Submission>),
    /// Look at `Shared::stop`, and at who wants to be told the engine's state.
    Wake,
}

/// An accepted request on its way.
pub(crate) struct Submission {
    pub(crate) request: GenerateRequest,
    /// How its hidden states become an embedding, if they are to.
    pub(crate) pooling: Option<Pooling>,
    pub(crate) events: flume::Sender<Event>,
    pub(crate) place: BacklogPlace,
    pub(crate) in_flight: flume::Sender<Infallible>,
    pub(crate) submitted_us: u64,
}

/// Whether requests are taken. Guards the channel to the engine: a request is checked and sent under the lock, so
/// that none slips in after the engine has closed the gate and emptied the channel.
enum Gate {
    /// Each request in flight holds a clone; when the gate closes, the last of them to go tells whoever waits.
    Open(flume::Sender<Infallible>),
    Closed(Health),
}

/// What the handles and the engine thread share.
pub(crate) struct Shared {
    pub(crate) config: EngineConfig,
    pub(crate) stats: Arc<Stats>,
    pub(crate) stop: AtomicBool,
    vocab_size: usize,
    hidden_size: usize,
    clock: Clock,
    gate: Mutex<Gate>,
    /// Who wants to be told the engine's state.
    inspect: flume::Sender<flume::Sender<EngineState>>,
    pub(crate) inspectors: flume::Receiver<flume::Sender<EngineState>>,
    in_flight: flume::Receiver<Infallible>,
    stopped: flume::Receiver<Infallible>,
}

/// Held by the engine thread: the handle sees when it is gone.
pub(crate) type Alive = flume::Sender<Infallible>;

impl Shared {
    /// Takes no requests from now on: `health` says why. The first reason that is final stays.
    pub(crate) fn close(&self, health: Health) {
        let mut gate = self.gate();
        if !matches!(&*gate, Gate::Closed(Health::Stopped | Health::Dead(_))) {
            *gate = Gate::Closed(health);
        }
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        // Nothing that holds the lock can leave the gate half changed.
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EngineHandle {
    pub(crate) fn new(
        config: EngineConfig,
        (vocab_size, hidden_size): (usize, usize),
        clock: Clock,
    ) -> (EngineHandle, flume::Receiver<Message>, Alive) {
        let (in_flight_sender, in_flight) = flume::bounded(0);
        let (alive, stopped) = flume::bounded(0);
        let (inspect, inspectors) = flume::bounded(INSPECTORS_MAX);
        // The backlog's bound, and all wake-ups: sending never finds it full.
        let (messages, inbox) = flume::bounded(config.max_waiting + INSPECTORS_MAX + 1);
        let shared = Shared {
            stats: Arc::new(Stats::new(config.num_blocks, config.context_len)),
            config,
            stop: AtomicBool::new(false),
            vocab_size,
            hidden_size,
            clock,
            gate: Mutex::new(Gate::Open(in_flight_sender)),
            inspect,
            inspectors,
            in_flight,
            stopped,
        };
        (EngineHandle { messages, shared: Arc::new(shared) }, inbox, alive)
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Queues a request; never blocks.
    pub fn submit(&self, request: GenerateRequest) -> Result<EventStream, SubmitError> {
        let mut streams = self.submit_all(vec![request])?;
        streams.pop().ok_or_else(|| SubmitError::Invalid("no request was given".into()))
    }

    /// Queues a text to be embedded: its stream is [`Event::Embedding`] and the terminal event. Never blocks.
    pub fn embed(&self, request: EmbedRequest) -> Result<EventStream, SubmitError> {
        if self.hidden_size() == 0 || request.pooling == Pooling::Other {
            return Err(SubmitError::Invalid("this model makes no embeddings".into()));
        }
        let (request, pooling) = request.into_generate();
        let mut streams = self.enqueue(vec![request], Some(pooling))?;
        streams.pop().ok_or_else(|| SubmitError::Invalid("no request was given".into()))
    }

    /// Queues all of `requests`, or none; never blocks. Neighbours with one prompt compute it once.
    pub fn submit_all(&self, requests: Vec<GenerateRequest>) -> Result<Vec<EventStream>, SubmitError> {
        self.enqueue(requests, None)
    }

    fn enqueue(
        &self,
        requests: Vec<GenerateRequest>,
        pooling: Option<Pooling>,
    ) -> Result<Vec<EventStream>, SubmitError> {
        let Shared { config, vocab_size, .. } = &*self.shared;
        for request in &requests {
            request.check(*vocab_size, config.context_len).map_err(SubmitError::Invalid)?;
            let prompt_len = request.prompt.len();
            // The last generated token is never computed, so it takes no slot.
            let needed = prompt_len + request.max_new_tokens(prompt_len, config.context_len).saturating_sub(1);
            if needed > config.capacity_tokens() {
                return Err(SubmitError::TooLarge { needed, capacity: config.capacity_tokens() });
            }
        }
        let gate = self.shared.gate();
        let in_flight = match &*gate {
            Gate::Open(in_flight) => in_flight.clone(),
            Gate::Closed(Health::Dead(reason)) => return Err(SubmitError::Dead(reason.clone())),
            Gate::Closed(_) => return Err(SubmitError::Draining),
        };
        let submitted_us = self.shared.clock.now_us();
        let mut streams = Vec::with_capacity(requests.len());
        let mut submissions = Vec::with_capacity(requests.len());
        for request in requests {
            // Of several, those that have a place already give it up again when one finds none.
            let place = self.enter_backlog(request.prompt.len())?;
            let (sender, events) = flume::bounded(request.events_max(config.context_len));
            let in_flight = in_flight.clone();
            submissions.push(Submission { request, pooling, events: sender, place, in_flight, submitted_us });
            streams.push(EventStream { events });
        }
        match self.messages.try_send(Message::Submit(submissions)) {
            Ok(()) => Ok(streams),
            Err(_) => Err(SubmitError::Dead("its thread is gone".into())),
        }
    }

    fn enter_backlog(&self, prompt_len: usize) -> Result<BacklogPlace, SubmitError> {
        let config = &self.shared.config;
        let limits = (config.max_waiting, config.max_waiting_tokens);
        BacklogPlace::enter(&self.shared.stats, prompt_len, limits).map_err(|full| match full {
            BacklogFull::Requests(waiting) => SubmitError::QueueFull { waiting, limit: limits.0 },
            BacklogFull::Tokens(waiting_tokens) => {
                SubmitError::QueueTokensFull { waiting_tokens, limit: limits.1 }
            }
        })
    }

    /// The engine's state between two steps; `None` if it has ended, or too many ask already.
    pub async fn inspect(&self) -> Option<EngineState> {
        let (reply, state) = flume::bounded(1);
        self.shared.inspect.try_send(reply).ok()?;
        // If there is no room the engine is about to wake up anyway.
        let _ = self.messages.try_send(Message::Wake);
        state.recv_async().await.ok()
    }

    pub fn config(&self) -> &EngineConfig {
        &self.shared.config
    }

    /// Token ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.shared.vocab_size
    }

    /// Width of an embedding; 0 where the model makes none.
    pub fn hidden_size(&self) -> usize {
        self.shared.hidden_size
    }

    /// Reading them never waits for a step.
    pub fn stats(&self) -> &Stats {
        &self.shared.stats
    }

    pub fn health(&self) -> Health {
        match &*self.shared.gate() {
            Gate::Open(_) => Health::Ready,
            Gate::Closed(health) => health.clone(),
        }
    }

    /// Takes no new requests from now on; those accepted go on. Returns at once.
    pub fn drain(&self) {
        self.shared.close(Health::Draining);
    }

    /// After [`drain`](EngineHandle::drain): resolves when no request is left.
    pub async fn drained(&self) {
        // Nothing is ever sent; receiving ends when the last sender is gone.
        let _ = self.shared.in_flight.recv_async().await;
    }

    /// Drains, ends every stream with `Failed { kind: ShuttingDown }` before the next step, and stops the thread.
    /// Returns at once.
    pub fn shutdown(&self) {
        self.drain();
        if !self.shared.stop.swap(true, Ordering::AcqRel) {
            // If there is no room the engine is about to wake up anyway; if there is nobody it has stopped.
            let _ = self.messages.try_send(Message::Wake);
        }
    }

    /// Resolves when the engine thread has ended.
    pub async fn stopped(&self) {
        let _ = self.shared.stopped.recv_async().await;
    }

    /// [`drained`](EngineHandle::drained) for a thread without a runtime; false when `timeout` came first.
    pub fn wait_drained(&self, timeout: Duration) -> bool {
        self.shared.in_flight.recv_timeout(timeout) == Err(flume::RecvTimeoutError::Disconnected)
    }

    /// [`stopped`](EngineHandle::stopped) for a thread without a runtime; false when `timeout` came first.
    pub fn wait_stopped(&self, timeout: Duration) -> bool {
        self.shared.stopped.recv_timeout(timeout) == Err(flume::RecvTimeoutError::Disconnected)
    }
}

impl EventStream {
    /// The next event; `None` after the terminal one.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv_async().await.ok()
    }

    /// The next event, waiting for it on this thread; `None` after the terminal one.
    pub fn next_blocking(&mut self) -> Option<Event> {
        self.events.recv().ok()
    }

    /// The next event if it is there already.
    pub fn try_next(&mut self) -> Option<Event> {
        self.events.try_recv().ok()
    }
}
