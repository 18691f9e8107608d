//! `postroad install`: the outbox's schema in an origin's database, or the inbox's in a consumer's.

use anyhow::Context as _;
use clap::Args;

use crate::store::migrate::{self, Grants};
use crate::store::{Database, server};

#[derive(Debug, Args)]
pub(super) struct Install {
    /// The database, as a user who owns it
    #[arg(
        long,
        env = "DATABASE_URL",
        hide_env_values = true,
        required_unless_present = "print"
    )]
    database_url: Option<String>,
    /// Install the inbox, for a service that consumes, instead of the outbox
    #[arg(long)]
    inbox: bool,
    /// Print the SQL instead, for teams that run their own migrations
    #[arg(long)]
    print: bool,
}

/// Which of the two is installed.
struct Side {
    name: &'static str,
    roles: &'static str,
    next: &'static str,
}

const OUTBOX: Side = Side {
    name: "outbox",
    roles: "postroad_producer and postroad_relay",
    next: "grant your services the role postroad_producer, and the relay's user postroad_relay",
};

const INBOX: Side = Side {
    name: "inbox",
    roles: "postroad_consumer",
    next: "grant your services the role postroad_consumer",
};

impl Install {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        if self.print {
            let script = match self.inbox {
                true => migrate::inbox_sql(),
                false => migrate::origin_sql(),
            };
            print!("{script}");
            return Ok(());
        }
        let url = self.database_url.context("--database-url is needed")?;
        let database = Database::new(&url, 2)?;
        let place = database.place();
        let side = if self.inbox { INBOX } else { OUTBOX };
        let server = server::look(&database).await?;
        if let Some(reason) = server.refusal() {
            anyhow::bail!("the {} cannot be installed in {place}: {reason}", side.name);
        }
        let grants = match self.inbox {
            true => migrate::inbox(&database).await?,
            false => migrate::origin(&database).await?,
        };
        database.close().await;
        println!("the {} is installed in {place}", side.name);
        match grants {
            Grants::Given => println!("{}", side.next),
            Grants::Skipped => println!(
                "{} must exist, and this user may not create roles: have them created, then install again",
                side.roles
            ),
        }
        Ok(())
    }
}
