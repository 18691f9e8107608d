//! `postroad install`: the outbox's schema in an origin's database.

use anyhow::Context as _;
use clap::Args;

use crate::store::migrate::{self, Grants};
use crate::store::{Database, server};

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(super) struct Install {
    /// The database, as a user who owns it
    #[arg(
        long,
        env = "DATABASE_URL",
        hide_env_values = true,
        required_unless_present = "print"
    )]
    database_url: Option<String>,
    /// Print the SQL instead, for teams that run their own migrations
    #[arg(long)]
    print: bool,
}

impl Install {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        if self.print {
            print!("{}", migrate::origin_sql());
            return Ok(());
        }
        let url = self.database_url.context("--database-url is needed")?;
        let database = Database::new(&url, 2)?;
        let place = database.place();
        let server = server::look(&database).await?;
        if let Some(reason) = server.refusal() {
            anyhow::bail!("the outbox cannot be installed in {place}: {reason}");
        }
        let grants = migrate::origin(&database).await?;
        database.close().await;
        println!("the outbox is installed in {place}");
        match grants {
            Grants::Given => println!(
                "grant your services the role postroad_producer, and the relay's user postroad_relay"
            ),
            Grants::Skipped => println!(
                "the roles postroad_producer and postroad_relay are missing, and this user may not create them: \
                 have them created, then install again"
            ),
        }
        Ok(())
    }
}
