//! Whole brokers: inside the test's process, or the real program as a child that can be killed.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use postroad::app;
use postroad::config::Config;
use reqwest::{Method, StatusCode};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};

use super::database::{TestDatabase, database};

/// A client of a broker's API, for JSON.
#[derive(Debug, Clone)]
pub struct Http {
    /// `http://127.0.0.1:port`
    pub base: String,
    /// For what needs more than JSON in, JSON out.
    pub client: reqwest::Client,
}

impl Http {
    /// A client of the broker at a base URL.
    pub fn new(base: &str) -> Self {
        let client = reqwest::Client::builder()
            .timeout(Duration::from_secs(90))
            .build()
            .unwrap();
        Self {
            base: base.to_owned(),
            client,
        }
    }

    /// Sends a request with a JSON body, if any, and gives the status and the JSON answer, null without one.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(StatusCode, Value), reqwest::Error> {
        let mut request = self.client.request(method, format!("{}{path}", self.base));
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await?;
        let status = answer.status();
        let text = answer.text().await?;
        let value = match text.is_empty() {
            true => Value::Null,
            false => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        };
        Ok((status, value))
    }

    /// GET, and whatever the answer is.
    pub async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.call(Method::GET, path, None).await.unwrap()
    }

    /// POST, and whatever the answer is.
    pub async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        self.call(Method::POST, path, Some(body)).await.unwrap()
    }

    /// PUT, and whatever the answer is.
    pub async fn put(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        self.call(Method::PUT, path, Some(body)).await.unwrap()
    }

    /// DELETE, and whatever the answer is.
    pub async fn delete(&self, path: &str) -> (StatusCode, Value) {
        self.call(Method::DELETE, path, None).await.unwrap()
    }

    /// POST that must be answered 2xx.
    ///
    /// # Panics
    /// With the answer, if it is another.
    pub async fn ok(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, body).await;
        assert!(status.is_success(), "POST {path}: {status} {answer}");
        answer
    }

    /// PUT that must be answered 2xx.
    ///
    /// # Panics
    /// With the answer, if it is another.
    pub async fn declare(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.put(path, body).await;
        assert!(status.is_success(), "PUT {path}: {status} {answer}");
        answer
    }
}

/// A broker inside the test's process.
#[derive(Debug)]
pub struct TestBroker {
    /// Its API.
    pub http: Http,
    /// Its database; dropped last.
    pub database: TestDatabase,
    broker: Option<app::Broker>,
    config: Config,
}

/// A configuration for tests: a free port, and a Postgres that need not be durable.
pub fn config(database_url: &str) -> Config {
    let mut config = Config::default();
    config.bind = ([127, 0, 0, 1], 0).into();
    config.database_url = Some(database_url.to_owned());
    config.database_pool_size = 8;
    config.allow_unsafe_postgres = true;
    config
}

/// Starts a broker on a fresh database.
pub async fn broker() -> TestBroker {
    broker_with(|_| {}).await
}

/// Starts a broker on a fresh database, its configuration changed first.
pub async fn broker_with(change: impl FnOnce(&mut Config)) -> TestBroker {
    let database = database().await;
    let mut config = config(&database.url);
    change(&mut config);
    let broker = app::Broker::start(config.clone()).await.unwrap();
    TestBroker {
        http: Http::new(broker.url()),
        database,
        broker: Some(broker),
        config,
    }
}

impl TestBroker {
    /// Stops it in order.
    pub async fn stop(&mut self) {
        if let Some(broker) = self.broker.take() {
            broker.stop().await.unwrap();
        }
    }

    /// Stops it in order and starts it again on the same database. Its port changes, and so does `http`.
    pub async fn restart(&mut self) {
        self.stop().await;
        let broker = app::Broker::start(self.config.clone()).await.unwrap();
        self.http = Http::new(broker.url());
        self.broker = Some(broker);
    }
}

/// The real program, `postroad serve`, as a child. Killed when dropped.
#[derive(Debug)]
pub struct Program {
    /// Its API. The port stays over restarts.
    pub http: Http,
    /// Another program than the one under test.
    file: Option<OsString>,
    variables: Vec<(String, String)>,
    /// Where its log goes; its warnings go to the test's output without.
    log_file: Option<PathBuf>,
    child: Child,
}

/// Starts the program on a database, with further `POSTROAD_*` variables, and waits until it is ready.
pub async fn program(database_url: &str, variables: &[(&str, &str)]) -> Program {
    program_with_log(database_url, variables, None).await
}

/// The same, with its log in a file.
pub async fn program_with_log(
    database_url: &str,
    variables: &[(&str, &str)],
    log_file: Option<PathBuf>,
) -> Program {
    let mut all = self::variables(database_url);
    all.extend(
        variables
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned())),
    );
    run(None, all, log_file).await
}

/// The previous version of the program: `POSTROAD_TEST_OLD_PROGRAM`.
pub fn old_program_file() -> Option<OsString> {
    std::env::var_os("POSTROAD_TEST_OLD_PROGRAM")
}

/// Starts another program than the one under test.
pub async fn program_of(file: OsString, database_url: &str, variables: &[(&str, &str)]) -> Program {
    let mut all = self::variables(database_url);
    let own = variables.iter();
    all.extend(own.map(|&(name, value)| (name.to_owned(), value.to_owned())));
    run(Some(file), all, None).await
}

async fn run(
    file: Option<OsString>,
    mut all: Vec<(String, String)>,
    log_file: Option<PathBuf>,
) -> Program {
    let (child, base) = start(file.as_ref(), &all, log_file.clone())
        .await
        .unwrap_or_else(|log| panic!("the program ended:\n{log}"));
    let address = base.trim_start_matches("http://").to_owned();
    all.push(("POSTROAD_BIND".to_owned(), address));
    Program {
        http: Http::new(&base),
        file,
        variables: all,
        log_file,
        child,
    }
}

/// The variables of a program for tests.
pub fn variables(database_url: &str) -> Vec<(String, String)> {
    [
        ("POSTROAD_DATABASE_URL", database_url),
        ("POSTROAD_BIND", "127.0.0.1:0"),
        ("POSTROAD_ALLOW_UNSAFE_POSTGRES", "true"),
        ("POSTROAD_LOG_FORMAT", "json"),
        ("POSTROAD_LOG_LEVEL", "info"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

/// Starts the program and gives the URL of its log line "postroad is ready", or what it logged when it ended before.
async fn start(
    file: Option<&OsString>,
    variables: &[(String, String)],
    log_file: Option<PathBuf>,
) -> Result<(Child, String), String> {
    let (child, mut log) = launch_of(file, variables);
    let Some(entry) = log.find("postroad is ready").await else {
        return Err(log.seen.join("\n"));
    };
    let url = entry["fields"]["url"].as_str().unwrap().to_owned();
    log.read_on(log_file);
    Ok((child, url))
}

/// The log of a program, as it is written.
#[derive(Debug)]
pub struct Log {
    lines: Lines<BufReader<ChildStderr>>,
    seen: Vec<String>,
}

impl Log {
    /// Of a program whose standard error is a pipe.
    pub fn of(child: &mut Child) -> Self {
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let seen = Vec::new();
        Self { lines, seen }
    }

    /// Reads until a line has this message, and gives the line.
    ///
    /// # Panics
    /// With what was logged, if the program ends first.
    pub async fn wait_for(&mut self, message: &str) -> Value {
        let found = self.find(message).await;
        found.unwrap_or_else(|| panic!("the program ended:\n{}", self.seen.join("\n")))
    }

    /// Reads until a line has this message, and gives the line; None when the program ends first.
    async fn find(&mut self, message: &str) -> Option<Value> {
        loop {
            let line = self.lines.next_line().await.unwrap()?;
            let entry: Value = serde_json::from_str(&line).unwrap_or_default();
            if entry["fields"]["message"] == message {
                return Some(entry);
            }
            self.seen.push(line);
        }
    }

    /// Reads on without end, or the program would wait for room in the pipe. All goes to the file, or warnings to the test's
    /// output.
    pub fn read_on(mut self, file: Option<PathBuf>) {
        let open = |path| {
            std::fs::File::options()
                .create(true)
                .append(true)
                .open(path)
        };
        let mut file = file.map(|path| open(path).unwrap());
        tokio::spawn(async move {
            while let Ok(Some(line)) = self.lines.next_line().await {
                if let Some(file) = &mut file {
                    writeln!(file, "{line}").unwrap();
                } else if !line.contains("\"INFO\"") && !line.contains("\"DEBUG\"") {
                    eprintln!("{line}");
                }
            }
        });
    }
}

/// Starts the program with these variables and no other `POSTROAD_*` ones, and does not wait.
pub fn launch(variables: &[(String, String)]) -> (Child, Log) {
    launch_of(None, variables)
}

fn launch_of(file: Option<&OsString>, variables: &[(String, String)]) -> (Child, Log) {
    // A release build, say: the figures of a soak are of the program that users run.
    let program = file.cloned();
    let program = program.or_else(|| std::env::var_os("POSTROAD_TEST_PROGRAM"));
    let mut command = Command::new(program.unwrap_or(env!("CARGO_BIN_EXE_postroad").into()));
    command
        .arg("serve")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    for (name, _) in std::env::vars_os() {
        // A planted fault is in this process and in its programs.
        if name.to_string_lossy().starts_with("POSTROAD_") && name != "POSTROAD_MUTANT" {
            command.env_remove(name);
        }
    }
    for (name, value) in variables {
        command.env(name, value);
    }
    let mut child = command.spawn().unwrap();
    let log = Log::of(&mut child);
    (child, log)
}

impl Program {
    /// The next start is of the program under test, whatever this one was.
    pub fn upgrade(&mut self) {
        self.file = None;
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id().expect("the program runs")
    }

    /// Kills it with -9 and waits until it is gone.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// Whether its process has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        super::send_signal(i32::try_from(self.pid()).unwrap(), signal);
    }

    /// Stops it by SIGTERM and gives the exit status.
    pub async fn stop(&mut self) -> std::process::ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        self.child.wait().await.unwrap()
    }

    /// Sets a variable for the next start.
    pub fn set(&mut self, name: &str, value: &str) {
        self.variables.retain(|(known, _)| known != name);
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    /// Resolves when it has ended by itself.
    pub async fn ended(&mut self) -> std::process::ExitStatus {
        self.child.wait().await.unwrap()
    }

    /// Starts it again at its port, and waits until it is ready.
    pub async fn start(&mut self) {
        if let Err(log) = self.try_start().await {
            panic!("the program ended:\n{log}");
        }
    }

    /// The same; what it logged if it ends first.
    pub async fn try_start(&mut self) -> Result<(), String> {
        let (child, base) =
            start(self.file.as_ref(), &self.variables, self.log_file.clone()).await?;
        assert_eq!(base, self.http.base);
        self.child = child;
        Ok(())
    }

    /// Starts it again at its port with further variables for this time, and does not wait.
    pub fn launch_with(&mut self, more: &[(&str, &str)]) {
        let mut variables = self.variables.clone();
        let more = more
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()));
        variables.extend(more);
        let (child, log) = launch(&variables);
        log.read_on(self.log_file.clone());
        self.child = child;
    }
}
