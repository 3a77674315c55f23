//! What every guarded request passes: its key is asked for, its limits are kept, and the answer says what is left.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};

use super::account::Place;
use crate::app::{AppState, in_shape_of};
use crate::protocol::ApiError;

/// The name of the key that a request bore; in the response's extensions, for the log.
#[derive(Debug, Clone)]
pub struct CallerName(pub Arc<str>);

pub async fn authorize(State(state): State<Arc<AppState>>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let refused = |error: ApiError| in_shape_of(&path, error);
    let Some(caller) = state.keys().identify(request.headers()) else {
        return refused(ApiError::unauthorized());
    };
    // Looking things up costs next to nothing and is not limited.
    let place = if request.method() == Method::POST { caller.enter() } else { Ok(None) };
    let mut response = match place {
        Ok(place) => {
            request.extensions_mut().insert(caller.clone());
            let response = next.run(request).await;
            match place {
                Some(place) => response.map(|body| Body::new(Placed { body, _place: place })),
                None => response,
            }
        }
        Err(error) => refused(error),
    };
    caller.write_headers(response.headers_mut());
    if let Some(name) = caller.name() {
        response.extensions_mut().insert(CallerName(name.clone()));
    }
    response
}

/// For pages: has a browser that bears no key ask its user for one.
pub async fn offer_password(mut response: Response) -> Response {
    if response.status() == StatusCode::UNAUTHORIZED {
        let challenge =
            HeaderValue::from_static("Basic realm=\"rill: an API key as the password\", charset=\"UTF-8\"");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    }
    response
}

/// A body whose request is under way until it is sent or dropped.
struct Placed {
    body: Body,
    _place: Place,
}

impl hyper::body::Body for Placed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
