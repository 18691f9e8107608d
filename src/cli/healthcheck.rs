//! `postroad healthcheck`: for Docker and the like, so that an image needs no curl.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;

use super::flags::ConfigFlags;
use crate::config::{self, Environment};

#[derive(Debug, Args)]
pub(super) struct Healthcheck {
    /// The broker's base URL; by default the address in the configuration
    #[arg(long)]
    url: Option<String>,
    /// Ask whether the process is alive, not whether it is ready: for a supervisor that restarts it
    #[arg(long)]
    live: bool,
    #[command(flatten)]
    config: ConfigFlags,
}

impl Healthcheck {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let base = match self.url {
            Some(url) => url,
            None => {
                let config = config::load(&self.config.0, &Environment::of_process())?;
                format!("http://{}", reachable(config.bind))
            }
        };
        let path = if self.live { "healthz" } else { "readyz" };
        let url = format!("{}/{path}", base.trim_end_matches('/'));
        let client = reqwest::Client::builder()
            .timeout(Duration::from_secs(5))
            // Docker gives containers the proxy of its machine, which does not reach what listens here.
            .no_proxy()
            .build()
            .context("making the HTTP client failed")?;
        let answer = client
            .get(&url)
            .send()
            .await
            .with_context(|| format!("{url} does not answer"))?;
        if !answer.status().is_success() {
            bail!("{url} answers {}", answer.status());
        }
        super::print(if self.live { "alive\n" } else { "ready\n" })
    }
}

/// The address to ask when the broker listens on all of them.
fn reachable(bind: SocketAddr) -> SocketAddr {
    let ip = match bind.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, bind.port())
}
