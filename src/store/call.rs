//! Calls of the broker's functions with their arguments by name. The database refuses a name that the function does not have, and a
//! call that leaves one out, so two neighbours of one type cannot change places unseen.

use std::sync::OnceLock;

use sqlx::encode::Encode;
use sqlx::error::BoxDynError;
use sqlx::postgres::PgArguments;
use sqlx::query::{Query, QueryAs, QueryScalar};
use sqlx::{Arguments as _, Postgres, Type};

/// A function of the schema `postroad_broker`, as one place of the program calls it.
#[derive(Debug)]
pub(super) struct Function {
    name: &'static str,
    columns: &'static str,
    text: OnceLock<String>,
}

/// A call that is being made.
#[derive(Debug)]
pub(super) struct Call {
    function: &'static Function,
    names: Vec<&'static str>,
    values: Result<PgArguments, BoxDynError>,
}

impl Function {
    /// `columns`: the results that are read, in their order.
    pub(super) const fn new(name: &'static str, columns: &'static str) -> Self {
        Self {
            name,
            columns,
            text: OnceLock::new(),
        }
    }

    /// Begins a call.
    pub(super) fn call(&'static self) -> Call {
        Call {
            function: self,
            names: Vec::with_capacity(64),
            values: Ok(PgArguments::default()),
        }
    }

    /// The statement. It is made once, so that the server prepares it once.
    fn text(&'static self, names: &[&str]) -> &'static str {
        self.text.get_or_init(|| {
            let arguments: Vec<String> = (1..)
                .zip(names)
                .map(|(number, name)| format!("{name} => ${number}"))
                .collect();
            format!(
                "select {} from postroad_broker.{}({})",
                self.columns,
                self.name,
                arguments.join(", ")
            )
        })
    }
}

impl Call {
    /// Adds an argument. Every call of a function adds the same ones, in the same order.
    pub(super) fn with<'t, T>(mut self, name: &'static str, value: T) -> Self
    where
        T: Encode<'t, Postgres> + Type<Postgres>,
    {
        self.names.push(name);
        if let Ok(values) = &mut self.values
            && let Err(error) = values.add(value)
        {
            self.values = Err(error);
        }
        self
    }

    fn parts(self) -> Result<(&'static str, PgArguments), sqlx::Error> {
        let text = self.function.text(&self.names);
        debug_assert_eq!(text.matches(" => ").count(), self.names.len(), "{text}");
        Ok((text, self.values.map_err(sqlx::Error::Encode)?))
    }

    /// Its results as a row.
    pub(super) fn query_as<O>(
        self,
    ) -> Result<QueryAs<'static, Postgres, O, PgArguments>, sqlx::Error>
    where
        O: for<'r> sqlx::FromRow<'r, sqlx::postgres::PgRow>,
    {
        let (text, values) = self.parts()?;
        Ok(sqlx::query_as_with(text, values))
    }

    /// Its one result.
    pub(super) fn query_scalar<O>(
        self,
    ) -> Result<QueryScalar<'static, Postgres, O, PgArguments>, sqlx::Error>
    where
        (O,): for<'r> sqlx::FromRow<'r, sqlx::postgres::PgRow>,
    {
        let (text, values) = self.parts()?;
        Ok(sqlx::query_scalar_with(text, values))
    }

    /// Without results.
    pub(super) fn query(self) -> Result<Query<'static, Postgres, PgArguments>, sqlx::Error> {
        let (text, values) = self.parts()?;
        Ok(sqlx::query_with(text, values))
    }
}
