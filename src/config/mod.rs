//! Configuration: `postroad.toml`, `POSTROAD_*` variables and flags.
