//! What of a request's body nobody read: it is heard out within bounds, so that a client still sending it reads the answer
//! it was given meanwhile (a 401, say) instead of a reset connection, and may use the connection again.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body as _, Frame, SizeHint};

const BYTES_MAX: usize = 64 << 20;
const TIME_MAX: Duration = Duration::from_secs(30);
/// A client that sends nothing for so long is not sending.
const SILENCE_MAX: Duration = Duration::from_secs(2);

/// Hears the body of `request` out even where its handler does not.
pub fn hear_out(request: Request) -> Request {
    // A client that asks before it sends need not be heard unless its body is wanted.
    let asks_first = request.headers().contains_key(header::EXPECT);
    request.map(|body| {
        if body.is_end_stream() { body } else { Body::new(HeardOut { body: Some(body), wanted: !asks_first }) }
    })
}

struct HeardOut {
    /// `None` once it has ended.
    body: Option<Body>,
    /// The client is sending, or was told to.
    wanted: bool,
}

impl hyper::body::Body for HeardOut {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.wanted = true;
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(cx);
        if let Poll::Ready(None | Some(Err(_))) = polled {
            self.body = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), |body| body.size_hint())
    }
}

impl Drop for HeardOut {
    fn drop(&mut self) {
        let Some(body) = self.body.take().filter(|body| self.wanted && !body.is_end_stream()) else { return };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(tokio::time::timeout(TIME_MAX, discard(body)));
        }
    }
}

async fn discard(mut body: Body) {
    let mut bytes = 0;
    while let Ok(Some(Ok(frame))) = tokio::time::timeout(SILENCE_MAX, body.frame()).await {
        bytes += frame.data_ref().map_or(0, Bytes::len);
        if bytes > BYTES_MAX {
            return;
        }
    }
}
