//! A real `rill serve` process on a free port: started, asked, signalled, and gone when the test is over.

use crate::http::{self, Response};
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// For the model to be fetched, if need be, and loaded.
const START_MAX: Duration = Duration::from_secs(300);
/// Lines of the server's own log that a failing test can show.
const LOG_LINES_MAX: usize = 2000;

pub struct ServerProcess {
    child: Child,
    pub address: SocketAddr,
    /// What it printed when it was ready.
    pub banner: String,
    log: Arc<Mutex<Vec<String>>>,
}

impl ServerProcess {
    /// Starts `binary serve --port 0 FLAGS…` and waits until it says that it answers.
    pub fn start(binary: &Path, flags: &[&str]) -> ServerProcess {
        let mut child = Command::new(binary)
            .args(["serve", "--port", "0"])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", binary.display()));
        let log = keep_log(child.stderr.take().expect("piped"));
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let started = Instant::now();
        let mut banner = String::new();
        let address = loop {
            let mut line = String::new();
            let read = stdout.read_line(&mut line).expect("the server prints UTF-8");
            assert!(
                read > 0 && started.elapsed() < START_MAX,
                "the server did not start: {banner}\n{}",
                log.lock().expect("log").join("\n")
            );
            banner.push_str(&line);
            if line.trim_start().starts_with("curl ") {
                let url = banner.split("http://").nth(1).expect("the banner holds the address");
                let end = url.find(|c: char| c.is_whitespace() || c == '/').unwrap_or(url.len());
                break url[..end].parse().unwrap_or_else(|error| panic!("{error}: {banner}"));
            }
        };
        std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
        ServerProcess { child, address, banner, log }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        self.log.lock().expect("log").join("\n")
    }

    pub fn get(&self, path: &str) -> Response {
        http::call(self.address, "GET", path, "")
            .unwrap_or_else(|error| panic!("GET {path}: {error}\n{}", self.log()))
    }

    pub fn post(&self, path: &str, body: &str) -> Response {
        http::call(self.address, "POST", path, body)
            .unwrap_or_else(|error| panic!("POST {path}: {error}\n{}", self.log()))
    }

    /// The sum of a metric over its labels.
    pub fn metric(&self, name: &str) -> f64 {
        let page = self.get("/metrics").text();
        let mut values = page
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])))
            .map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()).expect("a number"))
            .peekable();
        assert!(values.peek().is_some(), "/metrics has no {name}:\n{page}");
        values.sum()
    }

    /// Waits until nothing runs or waits and no sequence holds a block; a leak would keep one for ever.
    pub fn assert_idle_soon(&self) {
        let start = Instant::now();
        loop {
            let busy = ["vllm:num_requests_running", "vllm:num_requests_waiting", "rill_kv_blocks_held"]
                .map(|name| (name, self.metric(name)));
            if busy.iter().all(|(_, value)| *value == 0.0) {
                let all = self.metric("rill_kv_blocks_free") + self.metric("rill_kv_blocks_cached");
                assert_eq!(all, self.metric("rill_kv_blocks"), "blocks that are neither held nor free");
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "not idle: {busy:?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal by name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.id().to_string()]).status().expect("kill runs");
        assert!(status.success(), "kill -s {name} {}", self.id());
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the process can be asked") {
                return status;
            }
            assert!(start.elapsed() < limit, "still running after {limit:?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // Already gone where the test ended it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn keep_log(stderr: ChildStderr) -> Arc<Mutex<Vec<String>>> {
    let log = Arc::new(Mutex::new(Vec::new()));
    let kept = log.clone();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stderr);
        let mut line = Vec::new();
        while reader.by_ref().read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let mut kept = kept.lock().expect("log");
            if kept.len() < LOG_LINES_MAX {
                kept.push(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            line.clear();
        }
    });
    log
}
