//! Streams: the group-commit appender, the tail in memory, the reader of the log.
