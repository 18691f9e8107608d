//! What breaks, end to end: the real program and real clients over HTTP, killed, cut off and left without Postgres at the
//! wrong moment. The engines' own tests are in `queue`, `stream` and `relay`; here is what a client sees.

mod ambiguous;
mod clock;
mod cut;
mod disconnect;
mod killed;
mod outage;
mod poison;
mod random;
mod redrive;
mod restart;
mod retention;
mod scheduled;
mod versions;

use serde_json::{Value, json};

use crate::support::{Cluster, Program};

/// A queue that tries again at once.
fn at_once(max_attempts: u32) -> Value {
    json!({"topics": ["orders.*"], "max_attempts": max_attempts, "retry": {"delays_seconds": [0]}})
}

/// A size from the environment, or the everyday one.
fn size(variable: &str, everyday: usize) -> usize {
    std::env::var(variable)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(everyday)
}

/// Who is killed.
#[derive(Debug, Clone, Copy)]
enum Victim {
    Postgres,
    Program,
}

impl Victim {
    /// Kills it with -9. The program is back when this returns, Postgres is about to be.
    async fn kill(self, program: &mut Program, cluster: &Cluster) {
        match self {
            Self::Program => {
                program.kill().await;
                program.start().await;
            }
            Self::Postgres => cluster.kill_and_restart().await,
        }
    }
}
