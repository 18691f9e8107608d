//! The connection of one task: made when it is first needed, and anew after it was lost.

use super::{Connection, Database, Error, stream};

/// A session of its own in a database, for one task. Cheap until it is used.
#[derive(Debug)]
pub struct Link {
    database: Database,
    settings: Settings,
    connection: Option<Connection>,
}

/// What a session is set up for.
#[derive(Debug, Clone, Copy)]
enum Settings {
    Plain,
    Reader,
    SharedReader,
    Tail,
    Catalogue,
    Duty,
    Appender { is_lane: bool },
}

impl Link {
    fn set_up(database: &Database, settings: Settings) -> Self {
        Self {
            database: database.clone(),
            settings,
            connection: None,
        }
    }

    /// As [`Database::connect`] makes it.
    #[must_use]
    pub fn plain(database: &Database) -> Self {
        Self::set_up(database, Settings::Plain)
    }

    /// For reads of the log: see [`stream::connect_reader`].
    #[must_use]
    pub fn of_reader(database: &Database) -> Self {
        Self::set_up(database, Settings::Reader)
    }

    /// For reads of all streams: see [`stream::connect_shared_reader`].
    #[must_use]
    pub fn of_shared_reader(database: &Database) -> Self {
        Self::set_up(database, Settings::SharedReader)
    }

    /// For the tails of all streams: see [`stream::connect_tail`].
    #[must_use]
    pub fn of_tail(database: &Database) -> Self {
        Self::set_up(database, Settings::Tail)
    }

    /// For changes of streams, and looks at all of them: see [`stream::connect_catalogue`].
    #[must_use]
    pub fn of_catalogue(database: &Database) -> Self {
        Self::set_up(database, Settings::Catalogue)
    }

    /// For a duty on the log: see [`stream::connect_duty`].
    #[must_use]
    pub fn of_duty(database: &Database) -> Self {
        Self::set_up(database, Settings::Duty)
    }

    /// For appends: see [`stream::connect_appender`].
    #[must_use]
    pub fn of_appender(database: &Database, is_lane: bool) -> Self {
        Self::set_up(database, Settings::Appender { is_lane })
    }

    /// With a connection of its kind that is there already.
    #[must_use]
    pub fn with(mut self, connection: Connection) -> Self {
        self.connection = Some(connection);
        self
    }

    /// The connection, made if there is none.
    ///
    /// # Errors
    /// The server cannot be reached or refuses.
    pub async fn get(&mut self) -> Result<&mut Connection, Error> {
        if self.connection.is_none() {
            self.connection = Some(self.connect().await?);
        }
        Ok(self.connection.as_mut().expect("connected just above"))
    }

    /// The connection that there is.
    pub const fn existing(&mut self) -> Option<&mut Connection> {
        self.connection.as_mut()
    }

    /// Lends the connection, made if there is none, for work that may fail halfway. It is kept for the next only if it is
    /// given back by [`Link::keep`].
    ///
    /// # Errors
    /// The server cannot be reached or refuses.
    pub async fn lend(&mut self) -> Result<Connection, Error> {
        match self.connection.take() {
            Some(connection) => Ok(connection),
            None => self.connect().await,
        }
    }

    /// Takes back what was lent.
    pub fn keep(&mut self, connection: Connection) {
        self.connection = Some(connection);
    }

    /// Ends the connection: the next use makes another.
    pub fn cut(&mut self) {
        self.connection = None;
    }

    /// Ends the connection if this error says that it is of no more use.
    pub fn heed(&mut self, error: &Error) {
        if error.is_connection_spent() {
            self.cut();
        }
    }

    /// Whether there is a connection, as far as known.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.connection.is_some()
    }

    async fn connect(&self) -> Result<Connection, Error> {
        let database = &self.database;
        match self.settings {
            Settings::Plain => database.connect().await,
            Settings::Reader => stream::connect_reader(database).await,
            Settings::SharedReader => stream::connect_shared_reader(database).await,
            Settings::Tail => stream::connect_tail(database).await,
            Settings::Catalogue => stream::connect_catalogue(database).await,
            Settings::Duty => stream::connect_duty(database).await,
            Settings::Appender { is_lane } => stream::connect_appender(database, is_lane).await,
        }
    }
}
