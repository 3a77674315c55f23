//! A generation as a stream of server-sent events, whichever API's: when frames are written, gathered and sent.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use rill_engine::Event;

use crate::drain::InFlight;
use crate::generation::Generation;
use crate::protocol::ApiError;

/// Silence after which a comment is sent so that proxies keep the connection.
pub const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Events gathered into one write while more are queued.
const WRITE_BYTES_MAX: usize = 64 << 10;

/// Turns events into an API's frames, which pile up until `take`.
pub trait Frames: Send + 'static {
    /// Appends the frames of one event of choice `index`. `false`: it was a failure, and nothing may follow.
    fn event(&mut self, index: usize, event: Event) -> bool;

    /// What ends a stream that went well.
    fn finish(&mut self);

    /// Something that says nothing.
    fn keep_alive(&mut self);

    /// What has been written since the last `take`.
    fn take(&mut self) -> Bytes;

    fn pending_bytes(&self) -> usize;
}

/// The response that streams `generation`. Waits for the first event, so that a request that fails in the queue
/// gets a status of its own; dropping the response cancels the generation. After `keep_alive` of silence a comment is sent.
///
/// A reader slower than the model is bounded by its own request: the engine's channel holds at most the events of
/// its `max_tokens`, and a connection that takes nothing at all is closed by the listener.
pub async fn respond(
    mut generation: Generation,
    mut writer: impl Frames,
    in_flight: InFlight,
    keep_alive: Duration,
) -> Result<Response, ApiError> {
    match tokio::time::timeout(keep_alive, generation.next()).await {
        Ok(Some((_, Event::Failed { kind, message }))) => return Err(ApiError::failed(kind, message)),
        Ok(Some((index, event))) => {
            writer.event(index, event);
        }
        Ok(None) => return Err(ApiError::internal("the engine gave nothing")),
        Err(_) => writer.keep_alive(),
    }
    let state = Some((generation, writer, in_flight));
    let frames = stream::unfold(state, move |state| async move {
        let (mut generation, mut writer, in_flight) = state?;
        let more = fill(&mut generation, &mut writer, keep_alive).await;
        let bytes = writer.take();
        Some((Ok::<Bytes, Infallible>(bytes), more.then_some((generation, writer, in_flight))))
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    Ok((headers, Body::from_stream(frames)).into_response())
}

/// Writes at least one frame, and all whose events are queued already. `false` when the stream is over.
async fn fill(generation: &mut Generation, writer: &mut impl Frames, keep_alive: Duration) -> bool {
    while writer.pending_bytes() == 0 {
        match tokio::time::timeout(keep_alive, generation.next()).await {
            Ok(Some((index, event))) => {
                if !writer.event(index, event) {
                    return false;
                }
            }
            Ok(None) => {
                writer.finish();
                return false;
            }
            Err(_) => writer.keep_alive(),
        }
    }
    while writer.pending_bytes() < WRITE_BYTES_MAX
        && let Some((index, event)) = generation.try_next()
    {
        if !writer.event(index, event) {
            return false;
        }
    }
    if generation.is_done() {
        writer.finish();
        return false;
    }
    true
}
