//! Talking to a hub: metadata, and downloads that resume, time out and are verified.
//!
//! hf-hub's own client is not used for transfers: it has no time limits, sends the token on to whatever host a
//! download is redirected to, and checks neither length nor hash. Its URLs and its cache layout are.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::Agent;
use ureq::http::{HeaderMap, Response, StatusCode, Uri};
use ureq::tls::{RootCerts, TlsConfig};

use super::pip::hex;
use super::{Progress, SourceOptions, disk};
use crate::ModelError;

const REDIRECTS_MAX: usize = 8;
/// The longest listing of a repository we read, in bytes.
const LISTING_BYTES_MAX: u64 = 64 << 20;
const BACKOFF: Duration = Duration::from_millis(300);
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// Why the hub did not give what was asked for.
#[derive(Debug)]
pub(super) enum HubError {
    /// Nobody there, or nobody who answers sense right now. What the cache holds is as good.
    Unreachable(String),
    /// It answered, and the answer is no.
    Refused(String),
    /// The trouble is on this machine.
    Local(ModelError),
}

/// What a hub says of a file before sending it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct FileInfo {
    /// Names the content: the SHA-256 of large files, the git hash of small ones.
    pub etag: String,
    pub bytes: u64,
}

impl FileInfo {
    fn sha256(&self) -> Option<&str> {
        let is_hash = self.etag.len() == 64 && self.etag.bytes().all(|b| b.is_ascii_hexdigit());
        is_hash.then_some(&*self.etag)
    }
}

/// A client for one hub.
pub(super) struct Transfer {
    agent: Agent,
    /// Scheme and host of the hub: the token goes there and nowhere else.
    origin: Option<(String, String)>,
    token: Option<String>,
    retries: u32,
}

type Body = Response<ureq::Body>;

impl Transfer {
    /// `url` is any of the hub's.
    pub fn new(options: &SourceOptions, url: &str) -> Transfer {
        let tls = TlsConfig::builder()
            // The machine's own trust store, as pip and git use it: it knows a company's proxies and mirrors.
            .root_certs(RootCerts::PlatformVerifier)
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .proxy(options.proxy.clone())
            .user_agent(concat!("rill/", env!("CARGO_PKG_VERSION")))
            // Lengths and ranges are those of the file itself.
            .accept_encoding("identity")
            // Redirects are followed by hand: what the first answer says of the file is in its headers.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .timeout_resolve(Some(options.connect_timeout))
            .timeout_connect(Some(options.connect_timeout))
            .timeout_recv_response(Some(options.read_timeout))
            .timeout_per_read(Some(options.read_timeout))
            .build();
        Transfer {
            agent: config.new_agent(),
            origin: url.parse().ok().and_then(|uri| origin(&uri)),
            token: options.hub_token.clone(),
            retries: options.retries,
        }
    }

    /// The JSON at `url`.
    pub fn json(&self, url: &str) -> Result<serde_json::Value, HubError> {
        let mut response = self.get(url, None)?;
        check_status(&response, url)?;
        let body = response.body_mut().with_config().limit(LISTING_BYTES_MAX).read_to_vec();
        let body = body.map_err(|e| HubError::Unreachable(format!("{url}: {e}")))?;
        // A captive portal or a mirror's error page is no hub.
        serde_json::from_slice(&body)
            .map_err(|e| HubError::Unreachable(format!("{url} does not answer like a hub: {e}")))
    }

    /// What the hub says of the file at `url`.
    pub fn info(&self, url: &str) -> Result<FileInfo, HubError> {
        let mut url = url.to_owned();
        for _ in 0..REDIRECTS_MAX {
            let response = self.request("HEAD", &url, None)?;
            let headers = response.headers();
            let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
            let size = |name: &str| text(name).and_then(|value| value.parse().ok());
            // A redirect to where the bytes are still says what they are; its own length is not theirs.
            let redirect = response.status().is_redirection();
            let etag = text("x-linked-etag").or(text("etag").filter(|_| !redirect));
            let bytes = size("x-linked-size").or(size("content-length").filter(|_| !redirect));
            if !redirect {
                check_status(&response, &url)?;
            }
            if let (Some(etag), Some(bytes)) = (etag, bytes) {
                let etag = etag.trim_start_matches("W/").trim_matches('"');
                let sound = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
                if etag.is_empty() || etag.len() > 128 || !etag.chars().all(sound) {
                    return Err(HubError::Refused(format!("{url} has the unusable ETag {etag:?}")));
                }
                return Ok(FileInfo { etag: etag.to_owned(), bytes });
            }
            match redirected(&response, &url)? {
                Some(next) => url = next,
                None => {
                    return Err(HubError::Refused(format!(
                        "{url}: the hub does not say how long the file is, or which"
                    )));
                }
            }
        }
        Err(HubError::Refused(format!("{url}: more than {REDIRECTS_MAX} redirects")))
    }

    /// Downloads the file `info` describes from `url` to `part`, going on from what is there, and verifies it.
    pub fn download(
        &self,
        url: &str,
        info: &FileInfo,
        part: &Path,
        progress: &mut dyn Progress,
    ) -> Result<File, HubError> {
        let local = |e: io::Error| HubError::Local(disk::write_error(part, &e));
        let mut file =
            File::options().create(true).truncate(false).read(true).write(true).open(part).map_err(local)?;
        let mut failures = 0;
        let mut verified_once = false;
        loop {
            let mut have = file.seek(SeekFrom::End(0)).map_err(local)?;
            if have > info.bytes {
                restart(&mut file).map_err(local)?;
                have = 0;
            }
            if have == info.bytes {
                match verify(&mut file, info).map_err(local)? {
                    Ok(()) => return Ok(file),
                    Err(reason) => {
                        restart(&mut file).map_err(local)?;
                        // What an earlier run left may be bad; what came just now from the start should not be.
                        if verified_once {
                            return Err(HubError::Refused(format!("{url}: {reason}")));
                        }
                        progress.note(&format!("{url}: {reason}; fetching it again"));
                        verified_once = true;
                        have = 0;
                    }
                }
            }
            let reason = match self.attempt(url, info, have, &mut file, part, progress) {
                Ok(()) => continue,
                Err(HubError::Unreachable(reason)) => reason,
                Err(other) => return Err(other),
            };
            let now = file.seek(SeekFrom::End(0)).map_err(local)?;
            failures = if now > have { 0 } else { failures + 1 };
            if failures > self.retries {
                return Err(HubError::Unreachable(reason));
            }
            progress.note(&format!("{reason}; going on from byte {now}"));
            std::thread::sleep(BACKOFF.saturating_mul(1 << failures.min(10)).min(BACKOFF_MAX));
        }
    }

    /// Appends to `file`, which lies at `part` and holds the first `have` bytes, until it is whole or the connection ends.
    fn attempt(
        &self,
        url: &str,
        info: &FileInfo,
        have: u64,
        file: &mut File,
        part: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(), HubError> {
        let response = self.get(url, (have > 0).then_some(have))?;
        let local = |e: io::Error| HubError::Local(disk::write_error(part, &e));
        let mut position = have;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if have > 0 => {
                let range = header(response.headers(), "content-range").unwrap_or_default();
                if !range.starts_with(&format!("bytes {have}-")) || !range.ends_with(&format!("/{}", info.bytes)) {
                    restart(file).map_err(local)?;
                    return Err(HubError::Unreachable(format!(
                        "{url}: asked for the rest from byte {have}, got {range:?}"
                    )));
                }
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                restart(file).map_err(local)?;
                return Err(HubError::Unreachable(format!("{url}: nothing from byte {have}")));
            }
            _ => {
                check_status(&response, url)?;
                restart(file).map_err(local)?;
                position = 0;
            }
        }
        let mut body = response.into_body().into_reader().take(info.bytes - position);
        let mut buffer = vec![0; 256 << 10];
        progress.received(position);
        while position < info.bytes {
            if progress.given_up() {
                return Err(HubError::Refused(format!("{url}: given up, since another file cannot be had")));
            }
            let len = match body.read(&mut buffer) {
                Ok(0) => {
                    return Err(HubError::Unreachable(format!(
                        "{url}: the connection ended after {position} of {} bytes",
                        info.bytes
                    )));
                }
                Ok(len) => len,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(HubError::Unreachable(format!("{url}: {e}"))),
            };
            file.write_all(&buffer[..len]).map_err(local)?;
            position += len as u64;
            progress.received(position);
        }
        Ok(())
    }

    /// The answer to a GET, redirects followed, from byte `from` on if given.
    fn get(&self, url: &str, from: Option<u64>) -> Result<Body, HubError> {
        let mut url = url.to_owned();
        for _ in 0..REDIRECTS_MAX {
            let response = self.request("GET", &url, from)?;
            match redirected(&response, &url)? {
                Some(next) => url = next,
                None => return Ok(response),
            }
        }
        Err(HubError::Refused(format!("{url}: more than {REDIRECTS_MAX} redirects")))
    }

    fn request(&self, method: &str, url: &str, from: Option<u64>) -> Result<Body, HubError> {
        let mut request = ureq::http::Request::builder().method(method).uri(url);
        let target = url.parse().ok().and_then(|uri| origin(&uri));
        if let Some(token) = &self.token
            && target.is_some()
            && target == self.origin
        {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if let Some(from) = from {
            request = request.header("range", format!("bytes={from}-"));
        }
        let request = request.body(()).map_err(|e| HubError::Refused(format!("{url}: {e}")))?;
        self.agent.run(request).map_err(|e| HubError::Unreachable(format!("{url}: {e}")))
    }
}

fn origin(uri: &Uri) -> Option<(String, String)> {
    Some((uri.scheme_str()?.to_owned(), uri.authority()?.as_str().to_owned()))
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Where a redirect leads; `None` if it is none.
fn redirected(response: &Body, url: &str) -> Result<Option<String>, HubError> {
    if !response.status().is_redirection() {
        return Ok(None);
    }
    let location = header(response.headers(), "location").unwrap_or_default();
    let absolute = if location.starts_with('/') {
        let base = url.parse().ok().and_then(|uri| origin(&uri));
        base.map(|(scheme, host)| format!("{scheme}://{host}{location}"))
    } else {
        let known = location.starts_with("https://") || location.starts_with("http://");
        known.then(|| location.to_owned())
    };
    match absolute {
        Some(url) => Ok(Some(url)),
        None => Err(HubError::Refused(format!("{url} redirects to {location:?}"))),
    }
}

fn check_status(response: &Body, url: &str) -> Result<(), HubError> {
    let status = response.status();
    if status.is_success() {
        return Ok(());
    }
    let said = header(response.headers(), "x-error-message");
    let said = said.map_or_else(String::new, |said| format!(" ({said})"));
    Err(match status.as_u16() {
        401 => HubError::Refused(format!(
            "{url}: the hub answers 401{said}: the repository does not exist, or is private or gated; check its name, and set HF_TOKEN to a token that may read it"
        )),
        403 => HubError::Refused(format!(
            "{url}: the hub answers 403{said}: the token given may not read this; accept the model's terms on the hub, or use another HF_TOKEN"
        )),
        404 => {
            HubError::Refused(format!("{url}: the hub answers 404{said}: no such repository, revision or file"))
        }
        408 | 429 | 500..=599 => HubError::Unreachable(format!("{url}: the hub answers {status}{said}")),
        _ => HubError::Refused(format!("{url}: the hub answers {status}{said}")),
    })
}

fn restart(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()
}

/// Checks a complete file against the hash its ETag is, where it is one.
fn verify(file: &mut File, info: &FileInfo) -> io::Result<Result<(), String>> {
    let Some(expected) = info.sha256() else {
        return Ok(Ok(()));
    };
    file.rewind()?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            len => hash.update(&buffer[..len]),
        }
    }
    let found = hex(&hash.finalize());
    if found.eq_ignore_ascii_case(expected) {
        return Ok(Ok(()));
    }
    Ok(Err(format!("the file's SHA-256 is {found}, the hub promised {expected}")))
}
