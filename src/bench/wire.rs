//! A lean HTTP/1.1 client: one connection, one request at a time. It runs on the cores that it measures, and a general
//! client's pool, futures and copies would cost more than the broker's whole answer.

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// The largest head of an answer.
const HEAD_MAX_BYTES: usize = 64 * 1024;

/// The broker's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    /// `127.0.0.1:8080`
    pub(super) authority: String,
    /// The path before `/v1`, without the last slash; usually empty.
    pub(super) prefix: String,
}

impl Address {
    /// Parses a base URL. None if it is not plain HTTP.
    pub(super) fn of(url: &str) -> Option<Self> {
        let rest = url.strip_prefix("http://")?;
        let (authority, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if authority.is_empty() || authority.contains('@') {
            return None;
        }
        let has_port = authority
            .rsplit_once(':')
            .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let prefix = prefix.trim_end_matches('/');
        Some(Self {
            authority: match has_port {
                true => authority.to_owned(),
                false => format!("{authority}:80"),
            },
            prefix: match prefix {
                "" => String::new(),
                prefix => format!("/{prefix}"),
            },
        })
    }
}

/// The reasons why a call fails.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection, or one that broke.
    #[error("the connection to the broker failed")]
    Connection(#[from] io::Error),
    /// The broker refused.
    #[error("POST {path} was answered {status}: {body}")]
    Refused {
        /// Path and query.
        path: String,
        /// HTTP status.
        status: u16,
        /// The problem document.
        body: String,
    },
    /// The answer is not what the broker sends.
    #[error("POST {path} gave an unexpected answer: {what}")]
    Answer {
        /// Path and query.
        path: String,
        /// The oddity.
        what: String,
    },
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    address: Address,
    out: Vec<u8>,
    input: Vec<u8>,
}

impl Connection {
    pub(super) async fn open(address: &Address) -> Result<Self, Error> {
        let stream = TcpStream::connect(&address.authority).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            address: address.clone(),
            out: Vec::with_capacity(4_096),
            input: Vec::with_capacity(16_384),
        })
    }

    /// POSTs a body and gives the answer's, which must have status 200. `headers` are whole lines, each with its end.
    /// Dropped half-way the connection must be dropped, too.
    pub(super) async fn post(
        &mut self,
        path: &str,
        headers: &str,
        body: &[u8],
    ) -> Result<&[u8], Error> {
        self.out.clear();
        for part in [
            "POST ",
            &self.address.prefix,
            path,
            " HTTP/1.1\r\nhost: ",
            &self.address.authority,
            "\r\n",
            headers,
            "content-length: ",
            &body.len().to_string(),
            "\r\n\r\n",
        ] {
            self.out.extend_from_slice(part.as_bytes());
        }
        self.out.extend_from_slice(body);
        self.stream.write_all(&self.out).await?;
        let (status, start, end) = self.answer(path).await?;
        let body = &self.input[start..end];
        match status {
            200 => Ok(body),
            status => Err(Error::Refused {
                path: path.to_owned(),
                status,
                body: String::from_utf8_lossy(body).into_owned(),
            }),
        }
    }

    /// Reads an answer: its status, and where in the input its body is.
    async fn answer(&mut self, path: &str) -> Result<(u16, usize, usize), Error> {
        let odd = |what: &str| Error::Answer {
            path: path.to_owned(),
            what: what.to_owned(),
        };
        self.input.clear();
        let mut looked = 0;
        let head_end = loop {
            self.read_some().await?;
            if let Some(at) = find(&self.input[looked..], b"\r\n\r\n") {
                break looked + at + 4;
            }
            // The end may be cut by the next read.
            looked = self.input.len().saturating_sub(3);
            if looked > HEAD_MAX_BYTES {
                return Err(odd("a response head without an end"));
            }
        };
        let head = &self.input[..head_end];
        let status = status(head).ok_or_else(|| odd("no status line"))?;
        let length = content_length(head).ok_or_else(|| odd("no content-length"))?;
        let end = head_end + length;
        self.input.reserve(end.saturating_sub(self.input.len()));
        while self.input.len() < end {
            self.read_some().await?;
        }
        Ok((status, head_end, end))
    }

    async fn read_some(&mut self) -> Result<(), Error> {
        match self.stream.read_buf(&mut self.input).await? {
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            _ => Ok(()),
        }
    }
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|part| part == wanted)
}

fn status(head: &[u8]) -> Option<u16> {
    let rest = head.strip_prefix(b"HTTP/1.")?;
    std::str::from_utf8(rest.get(2..5)?).ok()?.parse().ok()
}

fn content_length(head: &[u8]) -> Option<usize> {
    head.split(|byte| *byte == b'\n').find_map(|line| {
        let (name, value) = std::str::from_utf8(line).ok()?.split_once(':')?;
        match name.eq_ignore_ascii_case("content-length") {
            true => value.trim().parse().ok(),
            false => None,
        }
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_urls() {
        let of = |url| Address::of(url).map(|address| (address.authority, address.prefix));
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(of("http://127.0.0.1:8080"), pair("127.0.0.1:8080", ""));
        assert_eq!(of("http://broker/"), pair("broker:80", ""));
        assert_eq!(of("http://[::1]:9/a/b/"), pair("[::1]:9", "/a/b"));
        for url in ["https://broker", "broker:80", "http://", "http://a:b@c/"] {
            assert_eq!(of(url), None, "{url}");
        }
    }

    /// A server that answers each request with the next of some texts, in pieces of this many bytes.
    async fn serve(answers: Vec<String>, piece: usize) -> (Address, impl Future<Output = ()>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let authority = listener.local_addr().unwrap().to_string();
        let serving = async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            for answer in answers {
                let mut request = Vec::new();
                while find(&request, b"\r\n\r\n{}").is_none() {
                    assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0);
                }
                for part in answer.as_bytes().chunks(piece) {
                    // A client hangs up on an answer that it refuses.
                    if stream.write_all(part).await.is_err() {
                        return;
                    }
                    tokio::task::yield_now().await;
                }
            }
        };
        let prefix = String::new();
        (Address { authority, prefix }, serving)
    }

    #[tokio::test]
    async fn answers_are_read_however_they_are_cut() {
        let answers = vec![
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello".to_owned(),
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nx: y\r\n\r\n".to_owned(),
            "HTTP/1.1 409 Conflict\r\ncontent-length: 2\r\n\r\n{}".to_owned(),
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
        ];
        for piece in [1, 3, 1_000] {
            let (address, serving) = serve(answers.clone(), piece).await;
            let asking = async {
                let mut connection = Connection::open(&address).await.unwrap();
                assert_eq!(connection.post("/a", "", b"{}").await.unwrap(), b"hello");
                assert_eq!(connection.post("/a", "a: b\r\n", b"{}").await.unwrap(), b"");
                let refused = connection.post("/a", "", b"{}").await;
                assert!(matches!(refused, Err(Error::Refused { status: 409, .. })));
                let odd = connection.post("/a", "", b"{}").await;
                assert!(matches!(odd, Err(Error::Answer { .. })));
            };
            tokio::join!(serving, asking);
        }
    }
}
