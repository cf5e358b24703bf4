//! A proxy of Pingora's that adds nothing: the least that the gateway could cost. It is this program, started again.

use std::net::SocketAddr;

use async_trait::async_trait;
use pingora_core::listeners::tls::TlsSettings;
use pingora_core::server::Server;
use pingora_core::server::configuration::{Opt, ServerConf};
use pingora_core::upstreams::peer::HttpPeer;
use pingora_proxy::{ProxyHttp, Session, http_proxy_service};

use crate::Error;

/// What the proxy is told.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Where it listens
    #[arg(long)]
    listen: SocketAddr,
    /// Where it sends requests on to
    #[arg(long)]
    node: SocketAddr,
    /// PEM: its certificate
    #[arg(long, value_name = "PATH")]
    certificate: String,
    /// PEM: the certificate's key
    #[arg(long, value_name = "PATH")]
    key: String,
}

struct Bare {
    node: SocketAddr,
}

#[async_trait]
impl ProxyHttp for Bare {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _: &mut Session, _: &mut Self::CTX) -> pingora_core::Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.node, false, String::new())))
    }
}

/// Proxies until it is killed: with one thread, over TLS 1.3 by the same library as the gateway.
pub fn run(arguments: &Arguments) -> Result<(), Error> {
    let _ = moh_gateway::tls::provider().install_default();
    let conf =
        ServerConf { threads: 1, work_stealing: false, upstream_keepalive_pool_size: 1024, ..ServerConf::default() };
    let mut server = Server::new_with_opt_and_conf(Opt::default(), conf);
    server.bootstrap();
    let mut tls = TlsSettings::intermediate(&arguments.certificate, &arguments.key)?;
    tls.enable_h2();
    let mut proxy = http_proxy_service(&server.configuration, Bare { node: arguments.node });
    proxy.add_tls_with_settings(&arguments.listen.to_string(), None, tls);
    server.add_service(proxy);
    server.run_forever()
}
