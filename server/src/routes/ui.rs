//! `GET /`: the playground page.

use axum::http::header;
use axum::response::{Html, IntoResponse};

/// The page talks to this server alone, and runs nothing but its own inline script.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub async fn page() -> impl IntoResponse {
    static_page(include_str!("../ui/index.html"))
}

/// A page that needs nothing from elsewhere.
pub fn static_page(html: &'static str) -> impl IntoResponse {
    ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(html))
}
