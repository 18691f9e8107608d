//! A pooler before a Postgres server, as far as tests need one. It drops the settings that a client's session begins with. In mode
//! `Transaction` all clients of a database share one session, statement by statement; in mode `Session` each has its own.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use sqlx::postgres::PgConnectOptions;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Mutex;

/// Who shares sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// All.
    Transaction,
    /// Nobody.
    Session,
}

type Session = Arc<Mutex<UnixStream>>;

/// A pooler. Ends with the test's runtime.
#[derive(Debug)]
pub struct Pooler {
    address: SocketAddr,
}

impl Pooler {
    /// The URL of the same database by way of the pooler.
    pub fn url(&self, database: &str) -> String {
        format!(
            "postgres://postgres@{}/{database}?sslmode=disable",
            self.address
        )
    }
}

/// Starts a pooler before a private server.
pub async fn pooler(server_url: &str, mode: Mode) -> Pooler {
    let options: PgConnectOptions = server_url.parse().unwrap();
    let socket = options.get_socket().unwrap();
    let socket = socket.join(format!(".s.PGSQL.{}", options.get_port()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shared: Arc<Mutex<HashMap<String, Session>>> = Arc::default();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (socket, shared) = (socket.clone(), Arc::clone(&shared));
            tokio::spawn(async move {
                let _ = serve(client, socket, mode, shared).await;
            });
        }
    });
    Pooler { address }
}

/// The database of a startup message.
async fn startup(client: &mut TcpStream) -> std::io::Result<String> {
    let length = client.read_u32().await? as usize;
    let mut body = vec![0; length - 4];
    client.read_exact(&mut body).await?;
    let words: Vec<String> = body[4..]
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    let at = words.iter().position(|word| word == "database");
    Ok(at.map_or_else(|| "postgres".to_owned(), |at| words[at + 1].clone()))
}

async fn begin(socket: &PathBuf, database: &str) -> std::io::Result<UnixStream> {
    let mut server = UnixStream::connect(socket).await?;
    let mut body = 196_608_u32.to_be_bytes().to_vec();
    for word in [
        "user",
        "postgres",
        "database",
        database,
        "client_encoding",
        "UTF8",
        "",
    ] {
        body.extend_from_slice(word.as_bytes());
        body.push(0);
    }
    server.write_u32(body.len() as u32 + 4).await?;
    server.write_all(&body).await?;
    loop {
        let (kind, _) = message(&mut server).await?;
        match kind {
            b'Z' => return Ok(server),
            b'E' => return Err(std::io::ErrorKind::Other.into()),
            _ => {}
        }
    }
}

/// A message: its kind, and all of its bytes.
async fn message(from: &mut (impl tokio::io::AsyncRead + Unpin)) -> std::io::Result<(u8, Vec<u8>)> {
    let kind = from.read_u8().await?;
    let length = from.read_u32().await?;
    let mut whole = vec![kind];
    whole.extend_from_slice(&length.to_be_bytes());
    whole.resize(length as usize + 1, 0);
    from.read_exact(&mut whole[5..]).await?;
    Ok((kind, whole))
}

async fn serve(
    mut client: TcpStream,
    socket: PathBuf,
    mode: Mode,
    shared: Arc<Mutex<HashMap<String, Session>>>,
) -> std::io::Result<()> {
    let database = startup(&mut client).await?;
    let session = match mode {
        Mode::Session => Arc::new(Mutex::new(begin(&socket, &database).await?)),
        Mode::Transaction => {
            let mut sessions = shared.lock().await;
            match sessions.get(&database) {
                Some(session) => Arc::clone(session),
                None => {
                    let session = Arc::new(Mutex::new(begin(&socket, &database).await?));
                    sessions.insert(database, Arc::clone(&session));
                    session
                }
            }
        }
    };
    // The login is done, with numbers of its own, as poolers have them; idle.
    client.write_all(b"R\0\0\0\x08\0\0\0\0").await?;
    client
        .write_all(b"S\0\0\0\x19client_encoding\0UTF8\0")
        .await?;
    client
        .write_all(b"K\0\0\0\x0c\0\0\0\x01\0\0\0\x02Z\0\0\0\x05I")
        .await?;
    loop {
        let mut sent = Vec::new();
        loop {
            let (kind, bytes) = message(&mut client).await?;
            if kind == b'X' {
                return Ok(());
            }
            sent.extend_from_slice(&bytes);
            // Simple queries and syncs are answered until the server is ready again.
            if matches!(kind, b'Q' | b'S') {
                break;
            }
        }
        let mut server = session.lock().await;
        server.write_all(&sent).await?;
        loop {
            let (kind, bytes) = message(&mut *server).await?;
            client.write_all(&bytes).await?;
            if kind == b'Z' {
                break;
            }
        }
    }
}
