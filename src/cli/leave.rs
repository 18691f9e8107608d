//! The ways out: `postroad release` gives an outbox to another broker, `postroad uninstall` removes Postroad from a
//! database, and `postroad origin` makes the broker forget or rename an origin.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};

use crate::config::{self, Environment, Flags};
use crate::domain::mapping::Mapping;
use crate::domain::name::OriginName;
use crate::store::Database;
use crate::store::origin::claim;
use crate::store::uninstall::{self, Changed, Side};
use crate::telemetry::{say, tell};

/// The URL, by the flag or by the variable.
fn database_url(flag: Option<&String>, variable: &str) -> anyhow::Result<String> {
    if let Some(url) = flag {
        if let Some(warning) = config::exposed_password("--database-url", url) {
            tell!("warning: {warning}");
        }
        return Ok(url.clone());
    }
    let environment = Environment::of_process();
    let url = environment.get(variable).map(ToOwned::to_owned);
    url.with_context(|| {
        format!("no database was given: set {variable} or pass --database-url, with a user who owns the database")
    })
}

#[derive(Debug, Args)]
pub(super) struct Release {
    /// The URL of the origin's database, with a user who owns the database
    ///
    /// [env: DATABASE_URL]
    #[arg(long)]
    database_url: Option<String>,
    /// A mapped table instead of the outbox, with its schema, as GET /v1/origins shows it
    #[arg(long)]
    table: Option<String>,
    /// Print the SQL instead of running it
    #[arg(long)]
    print: bool,
}

impl Release {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let table = self.table.as_deref();
        if self.print {
            return super::print(&claim::release_sql(table));
        }
        let url = database_url(self.database_url.as_ref(), "DATABASE_URL")?;
        let database = Database::new(&url, 1)?;
        let what = table.unwrap_or("the outbox");
        match claim::release(&database, table).await? {
            Some(released) => say!(
                "{what} was relayed as the origin {} of the broker {} since {}; the next broker that connects relays it",
                released.origin,
                released.broker,
                released.since
            ),
            None => say!("no broker relays {what}"),
        }
        database.close().await;
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(super) struct Uninstall {
    /// The database's URL, with a user who owns the database
    ///
    /// [env: DATABASE_URL]
    #[arg(long)]
    database_url: Option<String>,
    /// Remove the inbox instead of the outbox
    #[arg(long)]
    inbox: bool,
    /// Remove `postroad.assert_fence` instead of the outbox
    #[arg(long, conflicts_with = "inbox")]
    fence: bool,
    /// Remove what Postroad installed beside the table that this origin of the configuration maps, instead of the outbox
    #[arg(long, value_name = "ORIGIN", conflicts_with_all = ["inbox", "fence"])]
    map: Option<String>,
    /// The configuration file that has the origin; postroad.toml by default
    #[arg(long, value_name = "FILE", requires = "map")]
    config: Option<PathBuf>,
    /// Remove the outbox though it holds rows: those that no broker has relayed are lost
    #[arg(long, conflicts_with_all = ["inbox", "fence", "map"])]
    force: bool,
    /// Print the SQL instead of running it, for teams that run their own migrations
    #[arg(long)]
    print: bool,
}

impl Uninstall {
    fn mapping(&self) -> anyhow::Result<Option<Mapping>> {
        let Some(name) = &self.map else {
            return Ok(None);
        };
        let flags = Flags {
            file: self.config.clone(),
            ..Flags::default()
        };
        let config = config::load(&flags, &Environment::of_process())?;
        let origin = config.origins.into_iter().find(|o| o.name.as_str() == name);
        let origin = origin.with_context(|| format!("the configuration has no origin `{name}`"))?;
        let mapping = origin
            .mapping
            .with_context(|| format!("the origin `{name}` maps no table"))?;
        Ok(Some(mapping))
    }

    pub(super) async fn run(self) -> anyhow::Result<()> {
        let mapping = self.mapping()?;
        let (side, name) = match (&mapping, self.inbox, self.fence) {
            (Some(mapping), ..) => (
                Side::Mapped(mapping),
                "everything that Postroad installed beside the mapped table",
            ),
            (None, true, _) => (Side::Inbox, "the inbox"),
            (None, false, true) => (Side::Fence, "the fence"),
            (None, false, false) => {
                let takes_rows = self.force;
                (Side::Outbox { takes_rows }, "the outbox")
            }
        };
        if self.print {
            return super::print(&uninstall::script(side));
        }
        let url = database_url(self.database_url.as_ref(), "DATABASE_URL")?;
        let database = Database::new(&url, 1)?;
        if let Err(error) = uninstall::run(&database, side).await {
            anyhow::bail!("{name} cannot be removed: {}", error.explained());
        }
        say!("removed {name} from {}", database.place());
        database.close().await;
        Ok(())
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum Origin {
    /// Forget an origin that is no longer in the configuration: its position, its history and its rejected rows
    Forget {
        /// Its name
        name: String,
        /// The broker's database
        ///
        /// [env: POSTROAD_DATABASE_URL]
        #[arg(long)]
        database_url: Option<String>,
    },
    /// Rename an origin and keep its position, history and rejected rows; do this before you rename it in the configuration
    Rename {
        /// Its name
        from: String,
        /// Its new name
        to: String,
        /// The broker's database
        ///
        /// [env: POSTROAD_DATABASE_URL]
        #[arg(long)]
        database_url: Option<String>,
    },
}

impl Origin {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let parsed = |name: &str| {
            OriginName::parse(name)
                .with_context(|| format!("`{name}` is not a valid name of an origin"))
        };
        let (url, name, to) = match &self {
            Self::Forget { name, database_url } => (database_url, name, None),
            Self::Rename {
                from,
                to,
                database_url,
            } => (database_url, from, Some(to)),
        };
        let origin = parsed(name)?;
        let to = to.map(|to| parsed(to)).transpose()?;
        let url = database_url(url.as_ref(), "POSTROAD_DATABASE_URL")?;
        let database = Database::new(&url, 1)?;
        let changed = match &to {
            None => uninstall::forget_origin(&database, &origin).await?,
            Some(to) => uninstall::rename_origin(&database, &origin, to).await?,
        };
        database.close().await;
        match (changed, to) {
            (Changed::Yes, None) => say!("the origin `{name}` is forgotten"),
            (Changed::Yes, Some(to)) => {
                say!(
                    "the origin `{name}` is now called `{to}`: change the configuration, then start the broker"
                );
            }
            (Changed::Unknown, _) => anyhow::bail!("the broker knows no origin `{name}`"),
            (Changed::Configured, _) => anyhow::bail!(
                "a broker is relaying the origin `{name}`: remove it from the configuration, or stop the broker"
            ),
            (Changed::Taken, _) => {
                anyhow::bail!("an origin with that name exists: forget it first")
            }
        }
        Ok(())
    }
}
