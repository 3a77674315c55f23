//! A hub on loopback that speaks the real one's protocol, with a content server on another port, and every fault a
//! network has.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What goes wrong. Counts are of answers of the content server that are still to go wrong.
#[derive(Default)]
pub struct Faults {
    /// The connection ends after this many bytes of a body.
    pub cut: Option<(usize, usize)>,
    /// It falls silent after this many bytes.
    pub stall: Option<(usize, usize)>,
    /// A byte is wrong.
    pub corrupt: usize,
    /// 503.
    pub unavailable: usize,
    /// Ranges are not honoured.
    pub no_ranges: bool,
    /// Only this token may read.
    pub token: Option<&'static str>,
    /// What the listing answers instead.
    pub listing: Option<String>,
    /// How long an answer takes to begin.
    pub delay: Duration,
}

/// One request as it came in.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Of the content server, not of the hub.
    pub content: bool,
    pub headers: HashMap<String, String>,
}

struct Shared {
    /// Name → content; names ending in .gguf or .safetensors are large files, kept elsewhere.
    files: HashMap<String, Vec<u8>>,
    faults: Mutex<Faults>,
    seen: Mutex<Vec<Seen>>,
    content_url: String,
}

pub struct FakeHub {
    pub url: String,
    shared: Arc<Shared>,
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_large(name: &str) -> bool {
    name.ends_with(".gguf") || name.ends_with(".safetensors")
}

impl FakeHub {
    /// Serves `files` as the repository org/repo.
    pub fn new(files: &[(&str, Vec<u8>)]) -> FakeHub {
        let (hub, content) = (listen(), listen());
        let url = format!("http://{}", hub.local_addr().unwrap());
        let content_url = format!("http://{}", content.local_addr().unwrap());
        let shared = Arc::new(Shared {
            files: files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.clone())).collect(),
            faults: Mutex::default(),
            seen: Mutex::default(),
            content_url,
        });
        for (listener, is_content) in [(hub, false), (content, true)] {
            let shared = shared.clone();
            // Ends with the test's process.
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let shared = shared.clone();
                    std::thread::spawn(move || shared.serve(stream, is_content));
                }
            });
        }
        FakeHub { url, shared }
    }

    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.shared.faults.lock().unwrap());
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// The ranges asked of the content server, "" for a whole file.
    pub fn content_ranges(&self) -> Vec<String> {
        let seen = self.seen();
        let content = seen.iter().filter(|seen| seen.content);
        content.map(|seen| seen.headers.get("range").cloned().unwrap_or_default()).collect()
    }
}

fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

/// An answer: status, headers, body.
type Answer = (&'static str, Vec<(&'static str, String)>, Vec<u8>);

impl Shared {
    fn serve(&self, mut stream: TcpStream, content: bool) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
        let Some(line) = lines.next() else { return };
        let headers: HashMap<String, String> = lines
            .take_while(|line| !line.is_empty())
            .filter_map(|line| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned())))
            .collect();
        self.seen.lock().unwrap().push(Seen { content, headers: headers.clone() });
        let mut words = line.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let delay = self.faults.lock().unwrap().delay;
        std::thread::sleep(delay);
        let (status, answer_headers, body) = if content {
            self.content(path, headers.get("range").map(String::as_str))
        } else {
            self.hub(path, headers.get("authorization").map(String::as_str))
        };
        let mut head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n");
        for (name, value) in &answer_headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if answer_headers.iter().all(|(name, _)| *name != "content-length") {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        let _ = stream.write_all(head.as_bytes());
        if method == "HEAD" {
            return;
        }
        let (cut, stall) = if content { self.take_body_faults() } else { (None, None) };
        let len = cut.or(stall).unwrap_or(body.len()).min(body.len());
        let _ = stream.write_all(&body[..len]);
        if stall.is_some() {
            std::thread::sleep(Duration::from_secs(20));
        }
    }

    fn take_body_faults(&self) -> (Option<usize>, Option<usize>) {
        fn take(fault: &mut Option<(usize, usize)>) -> Option<usize> {
            let (len, times) = fault.as_mut().filter(|(_, times)| *times > 0)?;
            *times -= 1;
            Some(*len)
        }
        let mut faults = self.faults.lock().unwrap();
        (take(&mut faults.cut), take(&mut faults.stall))
    }

    fn hub(&self, path: &str, authorization: Option<&str>) -> Answer {
        let none = |status| (status, Vec::new(), Vec::new());
        let faults = self.faults.lock().unwrap();
        if let Some(token) = faults.token {
            match authorization {
                None => {
                    return ("401 Unauthorized", vec![("x-error-message", "Invalid username".into())], Vec::new());
                }
                Some(given) if given != format!("Bearer {token}") => return none("403 Forbidden"),
                Some(_) => {}
            }
        }
        if let Some(revision) = path.strip_prefix("/api/models/org/repo/revision/") {
            let revision = revision.split('?').next().unwrap_or_default();
            if !["main", "v1", COMMIT].contains(&revision) {
                return ("404 Not Found", vec![("x-error-message", "Invalid rev id".into())], Vec::new());
            }
            let listing = faults.listing.clone().unwrap_or_else(|| self.listing());
            return ("200 OK", vec![("content-type", "application/json".into())], listing.into_bytes());
        }
        if let Some(name) = path.strip_prefix("/api/resolve-cache/") {
            let Some(bytes) = self.files.get(name) else { return none("404 Not Found") };
            let etag = ("etag", format!("\"{}\"", &sha256(bytes)[..40]));
            return ("200 OK", vec![etag, ("x-repo-commit", COMMIT.into())], bytes.clone());
        }
        let prefix = format!("/org/repo/resolve/{COMMIT}/");
        let name = path.strip_prefix(&prefix).unwrap_or_default().replace("%20", " ");
        let Some(bytes) = self.files.get(&name) else { return none("404 Not Found") };
        if !is_large(&name) {
            let location = ("location", format!("/api/resolve-cache/{name}"));
            return (
                "307 Temporary Redirect",
                vec![location, ("etag", "\"of-the-redirect\"".into())],
                b"moved".to_vec(),
            );
        }
        let hash = sha256(bytes);
        let headers = vec![
            ("location", format!("{}/{hash}?signature=x", self.content_url)),
            ("x-repo-commit", COMMIT.into()),
            ("x-linked-etag", format!("\"{hash}\"")),
            ("x-linked-size", bytes.len().to_string()),
            ("etag", "\"of-the-redirect\"".into()),
        ];
        ("302 Found", headers, b"Found. Redirecting".to_vec())
    }

    fn content(&self, path: &str, range: Option<&str>) -> Answer {
        let mut faults = self.faults.lock().unwrap();
        if faults.unavailable > 0 {
            faults.unavailable -= 1;
            return ("503 Service Unavailable", Vec::new(), Vec::new());
        }
        let hash = path.trim_start_matches('/').split('?').next().unwrap_or_default();
        let Some(bytes) = self.files.values().find(|bytes| sha256(bytes) == hash) else {
            return ("404 Not Found", Vec::new(), Vec::new());
        };
        let mut bytes = bytes.clone();
        if faults.corrupt > 0 {
            faults.corrupt -= 1;
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        }
        let from = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
        match from.filter(|_| !faults.no_ranges) {
            Some(from) if from >= bytes.len() => ("416 Range Not Satisfiable", Vec::new(), Vec::new()),
            Some(from) => {
                let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
                ("206 Partial Content", vec![("content-range", range)], bytes[from..].to_vec())
            }
            None => ("200 OK", Vec::new(), bytes),
        }
    }

    fn listing(&self) -> String {
        let siblings: Vec<_> = self
            .files
            .iter()
            .map(|(name, bytes)| serde_json::json!({"rfilename": name, "size": bytes.len()}))
            .collect();
        serde_json::json!({"id": "org/repo", "sha": COMMIT, "siblings": siblings}).to_string()
    }
}
