//! Finds the server's programs: where the packages of Debian, Homebrew and the RPM systems put them, and on PATH.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Error, Settings, folder::Folder};

/// Folders that hold one installation per version, as (parent, child's prefix, rest).
const PLACES: [(&str, &str, &str); 7] = [
    ("/usr/lib/postgresql", "", "bin"),
    ("/opt/homebrew/opt", "postgresql", "bin"),
    ("/usr/local/opt", "postgresql", "bin"),
    ("/home/linuxbrew/.linuxbrew/opt", "postgresql", "bin"),
    ("/usr", "pgsql-", "bin"),
    ("/usr/local", "pgsql", "bin"),
    ("/Applications/Postgres.app/Contents/Versions", "", "bin"),
];

/// One installation of Postgres.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    /// The folder of `postgres` and `initdb`.
    pub bin_dir: PathBuf,
    /// `15.18`, as `postgres --version` says it.
    pub version: String,
}

impl Installation {
    /// `15` of `15.18` and of `15beta1`.
    #[must_use]
    pub fn major(&self) -> &str {
        let digits = self.version.bytes().take_while(u8::is_ascii_digit).count();
        &self.version[..digits]
    }

    fn at(bin_dir: &Path) -> Option<Self> {
        if !bin_dir.join("initdb").is_file() {
            return None;
        }
        let output = Command::new(bin_dir.join("postgres"))
            .arg("--version")
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text
            .split_whitespace()
            .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
        Some(Self {
            bin_dir: bin_dir.to_owned(),
            version: version.to_owned(),
        })
    }
}

/// All installations, newest first. With `POSTROAD_POSTGRES_BIN` set, that one alone.
#[must_use]
pub fn find() -> Vec<Installation> {
    if let Some(folder) = std::env::var_os("POSTROAD_POSTGRES_BIN").filter(|v| !v.is_empty()) {
        return Installation::at(Path::new(&folder)).into_iter().collect();
    }
    let mut folders: Vec<PathBuf> = std::env::var_os("PATH")
        .map(|path| std::env::split_paths(&path).collect())
        .unwrap_or_default();
    for (parent, prefix, rest) in PLACES {
        let Ok(children) = std::fs::read_dir(parent) else {
            continue;
        };
        folders.extend(
            children
                .flatten()
                .filter(|child| child.file_name().to_string_lossy().starts_with(prefix))
                .map(|child| child.path().join(rest)),
        );
    }
    let mut found: Vec<Installation> = folders
        .iter()
        .filter_map(|folder| Installation::at(folder))
        .collect();
    // Stable, so that among equals PATH comes first.
    found.sort_by_key(|installation| {
        std::cmp::Reverse(installation.major().parse::<u32>().unwrap_or(0))
    });
    found
}

/// The installation to use: of the data's own major version, or the newest for a new folder.
pub(super) fn choose(settings: &Settings, folder: &Folder) -> Result<Installation, Error> {
    let found = match &settings.bin_dir {
        Some(bin_dir) => Installation::at(bin_dir).into_iter().collect(),
        None => find(),
    };
    if found.is_empty() {
        let places = PLACES.map(|(parent, prefix, rest)| format!("{parent}/{prefix}*/{rest}"));
        return Err(Error::NotFound {
            places: settings
                .bin_dir
                .as_ref()
                .map_or_else(|| places.join(", "), |dir| dir.display().to_string()),
        });
    }
    let Some(needed) = folder.cluster_version() else {
        return Ok(found.into_iter().next().expect("checked: not empty"));
    };
    let majors = || {
        let majors: Vec<&str> = found.iter().map(Installation::major).collect();
        majors.join(", ")
    };
    found
        .iter()
        .find(|installation| installation.major() == needed)
        .cloned()
        .ok_or_else(|| Error::Version {
            data_dir: folder.cluster_dir.clone(),
            needed,
            found: majors(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn major_versions_are_read() {
        for (version, major) in [("15.18", "15"), ("18beta1", "18"), ("9.6.24", "9")] {
            let installation = Installation {
                bin_dir: PathBuf::new(),
                version: version.to_owned(),
            };
            assert_eq!(installation.major(), major);
        }
    }
}
