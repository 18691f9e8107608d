//! The account that runs the server: our own, or, since Postgres refuses root, an unprivileged one.

use super::Error;

/// An account of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Main group's id.
    pub gid: u32,
}

/// Whether this process runs as root.
pub(super) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The account to switch to; `None` when the server can run as ourselves.
pub(super) fn server_account() -> Result<Option<Account>, Error> {
    if !is_root() {
        return Ok(None);
    }
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    ["postgres", "nobody"]
        .iter()
        .find_map(|name| find(&passwd, name))
        .map(Some)
        .ok_or(Error::NoAccount)
}

fn find(passwd: &str, wanted: &str) -> Option<Account> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        (name == wanted && uid != 0).then(|| Account {
            name: name.to_owned(),
            uid,
            gid,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found_by_name_and_never_root() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\n# comment\npostgres:x:101:104::/:/bin/sh\nfake:x:0:0::/:\n";
        let postgres = Account {
            name: "postgres".into(),
            uid: 101,
            gid: 104,
        };
        assert_eq!(find(passwd, "postgres"), Some(postgres));
        assert_eq!(find(passwd, "fake"), None);
        assert_eq!(find(passwd, "nobody"), None);
    }
}
