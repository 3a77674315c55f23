//! `GET /openapi.json`, and `GET /docs`, a page that shows it.

use axum::http::header;
use axum::response::IntoResponse;

use super::ui::static_page;
use crate::openapi;

pub async fn description() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], openapi::bytes())
}

pub async fn page() -> impl IntoResponse {
    static_page(include_str!("../ui/docs.html"))
}
