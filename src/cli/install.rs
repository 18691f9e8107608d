//! `postroad install`: installs the outbox's schema in an origin's database, the inbox's in a consumer's, or the fence in a
//! database that locks protect.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use crate::config::{self, Environment, Flags};
use crate::store::migrate::{self, Grants};
use crate::store::{self, Database, mapped, server};
use crate::telemetry::{say, tell};

#[derive(Debug, Args)]
pub(super) struct Install {
    /// The database's URL, with a user who owns the database
    ///
    /// [env: DATABASE_URL]
    #[arg(long)]
    database_url: Option<String>,
    /// Install the inbox, for a service that consumes, instead of the outbox
    #[arg(long)]
    inbox: bool,
    /// Install `postroad.assert_fence`, for a database that locks protect, instead of the outbox
    #[arg(long, conflicts_with = "inbox")]
    fence: bool,
    /// Prepare the table that this origin of the configuration maps, instead of installing an outbox
    #[arg(long, value_name = "ORIGIN", conflicts_with_all = ["inbox", "fence"])]
    map: Option<String>,
    /// The configuration file that has the origin; postroad.toml by default
    #[arg(long, value_name = "FILE", requires = "map")]
    config: Option<PathBuf>,
    /// Print the SQL instead of running it, for teams that run their own migrations
    #[arg(long)]
    print: bool,
}

/// The side to install.
#[derive(Clone, Copy)]
struct Side {
    name: &'static str,
    /// Kinds of roles, and the users to grant each to.
    roles: &'static [(&'static str, &'static str)],
    script: fn() -> String,
}

const OUTBOX: Side = Side {
    name: "outbox",
    roles: &[("producer", "your services"), ("relay", "the relay's user")],
    script: migrate::origin_sql,
};

const INBOX: Side = Side {
    name: "inbox",
    roles: &[("consumer", "your services")],
    script: migrate::inbox_sql,
};

const FENCE: Side = Side {
    name: "fence",
    roles: &[("fenced", "your services")],
    script: migrate::fence_sql,
};

/// Says whom to grant which role, or which roles are missing.
async fn told(database: &Database, grants: Grants, roles: &[(&str, &str)]) -> anyhow::Result<()> {
    let kinds: Vec<&str> = roles.iter().map(|(kind, _)| *kind).collect();
    let names = migrate::role_names(database, &kinds).await?;
    match grants {
        Grants::Given => {
            for (name, (_, whom)) in names.iter().zip(roles) {
                say!("grant {whom} the role {name}");
            }
        }
        Grants::Skipped => say!(
            "{} must exist, and this user may not create roles: ask an administrator to create them, then install again",
            names.join(" and ")
        ),
    }
    Ok(())
}

impl Install {
    const fn side(&self) -> Side {
        match (self.inbox, self.fence) {
            (true, _) => INBOX,
            (false, true) => FENCE,
            (false, false) => OUTBOX,
        }
    }

    /// The URL, by the flag or by the variable.
    fn url(&self) -> anyhow::Result<String> {
        if let Some(url) = &self.database_url {
            if let Some(warning) = config::exposed_password("--database-url", url) {
                tell!("warning: {warning}");
            }
            return Ok(url.clone());
        }
        let environment = Environment::of_process();
        let url = environment.get("DATABASE_URL").map(ToOwned::to_owned);
        url.context(
            "no database was given: set DATABASE_URL or pass --database-url, with a user who owns the database",
        )
    }

    pub(super) async fn run(self) -> anyhow::Result<()> {
        if let Some(origin) = &self.map {
            return self.map(origin).await;
        }
        let side = self.side();
        if self.print {
            return super::print(&(side.script)());
        }
        let database = Database::new(&self.url()?, 2)?;
        let place = database.place();
        let what = format!("the {} cannot be installed in {place}", side.name);
        let server = server::look(&database).await;
        let server = server.map_err(|error| explained(&what, &error))?;
        if let Some(reason) = server.refusal() {
            anyhow::bail!("{what}: {reason}");
        }
        let grants = match (self.inbox, self.fence) {
            (true, _) => migrate::inbox(&database).await,
            (false, true) => migrate::fence(&database).await,
            (false, false) => migrate::origin(&database).await,
        };
        let grants = grants.map_err(|error| explained(&what, &error))?;
        say!("the {} is installed in {place}", side.name);
        told(&database, grants, side.roles).await?;
        database.close().await;
        Ok(())
    }

    /// The printed SQL depends on what the table already has, so its database is asked in both cases.
    async fn map(&self, name: &str) -> anyhow::Result<()> {
        let flags = Flags {
            file: self.config.clone(),
            ..Flags::default()
        };
        let config = config::load(&flags, &Environment::of_process())?;
        let origin = config.origins.into_iter().find(|o| o.name.as_str() == name);
        let origin = origin.with_context(|| format!("the configuration has no origin `{name}`"))?;
        let mapping = origin.mapping.with_context(|| {
            format!("the origin `{name}` maps no table: install its outbox without --map")
        })?;
        let database = Database::new(&self.url()?, 2)?;
        let place = database.place();
        let what = format!("the table cannot be mapped in {place}");
        let server = server::look(&database).await;
        let server = server.map_err(|error| explained(&what, &error))?;
        if let Some(reason) = server.refusal() {
            anyhow::bail!("{what}: {reason}");
        }
        if self.print {
            return super::print(&mapped::install::script(&database, &mapping).await?);
        }
        let grants = mapped::install::install(&database, &mapping).await?;
        say!("the table {} is mapped in {place}", mapping.table);
        told(&database, grants, &[("relay", "the relay's user")]).await?;
        database.close().await;
        Ok(())
    }
}

/// One line: what cannot be done, why, and what to do about it.
fn explained(what: &str, error: &store::Error) -> anyhow::Error {
    anyhow::anyhow!("{what}: {}", error.explained())
}
