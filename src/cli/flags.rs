//! The flags of the configuration, made from its table of keys.

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches, value_parser};

use crate::config::{Flags, KEYS};

/// `--config` and a flag for every key.
#[derive(Debug, Clone)]
pub(super) struct ConfigFlags(pub(super) Flags);

impl Args for ConfigFlags {
    fn augment_args(command: Command) -> Command {
        let file = Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(value_parser!(PathBuf))
            .help("The configuration file; by default postroad.toml in the working folder, if it exists [env: POSTROAD_CONFIG]");
        KEYS.iter().fold(command.arg(file), |command, key| {
            let default = match key.default {
                "" => String::new(),
                default => format!(" [default: {default}]"),
            };
            let flag = Arg::new(key.name)
                .long(key.flag())
                .value_name("VALUE")
                .help(format!("{} [env: {}]{default}", key.about, key.variable()));
            command.arg(if key.is_switch() {
                flag.num_args(0..=1)
                    .require_equals(true)
                    .default_missing_value("true")
            } else {
                flag
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for ConfigFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let values = KEYS.iter().filter_map(|key| {
            let value: &String = matches.get_one(key.name)?;
            Some((key.name, value.clone()))
        });
        Ok(Self(Flags {
            file: matches.get_one::<PathBuf>("config").cloned(),
            values: values.collect(),
        }))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
