//! A private Postgres server for a run without `DATABASE_URL`, and for the tests.
