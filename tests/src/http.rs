//! HTTP/1.1 over a plain socket: enough to call a server, read its streams as they come, and be a bad client.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A response read to its end.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("status {}, not JSON ({error}): {}", self.status, self.text()))
    }
}

/// A request whose response head has been read and whose body has not.
pub struct OpenResponse {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
    /// Bytes left of the chunk or of the whole body; `None` until the next chunk's size is read.
    left: Option<usize>,
    chunked: bool,
    ended: bool,
}

/// Bytes of a request with a JSON body; `Connection: close`.
pub fn request_bytes(method: &str, path: &str, body: &str) -> Vec<u8> {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Connects with a read time-out, so that a server that hangs fails a test instead of hanging it.
pub fn connect(address: SocketAddr, read_timeout: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
    stream.set_read_timeout(Some(read_timeout))?;
    stream.set_write_timeout(Some(read_timeout))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends a request and reads the head of the response.
pub fn open(address: SocketAddr, method: &str, path: &str, body: &str) -> io::Result<OpenResponse> {
    let mut stream = connect(address, Duration::from_secs(120))?;
    stream.write_all(&request_bytes(method, path, body))?;
    OpenResponse::read_head(stream)
}

/// Sends a request and reads the whole response.
pub fn call(address: SocketAddr, method: &str, path: &str, body: &str) -> io::Result<Response> {
    open(address, method, path, body)?.read_to_end()
}

impl OpenResponse {
    pub fn read_head(stream: TcpStream) -> io::Result<OpenResponse> {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let status =
            line.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(|| {
                io::Error::new(io::ErrorKind::UnexpectedEof, format!("not a status line: {line:?}"))
            })?;
        let mut headers = Vec::new();
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let find = |name: &str| headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        let chunked = find("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
        let left = if chunked { None } else { find("content-length").and_then(|value| value.parse().ok()) };
        Ok(OpenResponse { status, headers, reader, left, chunked, ended: false })
    }

    /// The next piece of the body as it arrives; `None` at its end. An end before the announced one is an error.
    pub fn next_piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.ended {
            return Ok(None);
        }
        if self.chunked && self.left.is_none() {
            let mut line = String::new();
            self.reader.read_line(&mut line)?;
            let size = usize::from_str_radix(line.trim(), 16).map_err(|_| {
                io::Error::new(io::ErrorKind::UnexpectedEof, format!("not a chunk size: {line:?}"))
            })?;
            if size == 0 {
                self.reader.read_line(&mut line)?;
                self.ended = true;
                return Ok(None);
            }
            self.left = Some(size);
        }
        let wanted = self.left.unwrap_or(64 * 1024).min(64 * 1024);
        let mut piece = vec![0; wanted];
        let got = self.reader.read(&mut piece)?;
        piece.truncate(got);
        match (self.left, got) {
            (Some(0), _) => self.ended = true,
            (Some(_), 0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            (None, 0) => self.ended = true,
            (Some(left), got) => self.left = Some(left - got),
            (None, _) => {}
        }
        if self.left == Some(0) {
            if self.chunked {
                let mut line = String::new();
                self.reader.read_line(&mut line)?;
                self.left = None;
            } else {
                self.ended = true;
            }
        }
        Ok((!piece.is_empty()).then_some(piece))
    }

    pub fn read_to_end(mut self) -> io::Result<Response> {
        let mut body = Vec::new();
        while let Some(piece) = self.next_piece()? {
            body.extend(piece);
        }
        Ok(Response { status: self.status, headers: self.headers, body })
    }

    /// The data of the next server-sent event (`[DONE]` included); `None` at the end. Comments are passed over.
    pub fn next_event(&mut self, pending: &mut Vec<u8>) -> io::Result<Option<String>> {
        loop {
            if let Some(end) = pending.windows(2).position(|pair| pair == b"\n\n") {
                let frame: Vec<u8> = pending.drain(..end + 2).collect();
                let frame =
                    String::from_utf8(frame).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                if let Some(data) = frame.trim_end().strip_prefix("data: ") {
                    return Ok(Some(data.to_owned()));
                }
                if !frame.starts_with(':') {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, format!("not an event: {frame:?}")));
                }
                continue;
            }
            match self.next_piece()? {
                Some(piece) => pending.extend(piece),
                None if pending.is_empty() => return Ok(None),
                None => {
                    let rest = String::from_utf8_lossy(pending).into_owned();
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        format!("the stream ends in {rest:?}"),
                    ));
                }
            }
        }
    }

    /// All events to the end of the stream.
    pub fn events(mut self) -> io::Result<Vec<String>> {
        let mut pending = Vec::new();
        let mut events = Vec::new();
        while let Some(event) = self.next_event(&mut pending)? {
            events.push(event);
        }
        Ok(events)
    }
}
