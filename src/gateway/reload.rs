//! Reload: on SIGHUP the configuration is read again, checked whole, and its limits take the place of those in use.
//!
//! A file that is wrong changes nothing, and what is wrong with it is said. What a limit has counted stays where neither its
//! name, its key nor its rate is another. Everything but limits, what tokens do for them, and whose
//! tokens are taken takes a restart.

use super::Shared;
use crate::config::Config;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};

/// Reloads on every SIGHUP, for as long as the process lives.
pub(super) fn on_hangup(file: PathBuf, shared: Arc<Shared>) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut hangup = {
        let _inside = runtime.enter();
        signal(SignalKind::hangup())?
    };
    std::thread::Builder::new().name("reload".into()).spawn(move || {
        runtime.block_on(async {
            while hangup.recv().await.is_some() {
                let result = if reload(&file, &shared) { "ok" } else { "failed" };
                shared.metrics.reloads.with_label_values(&[result]).inc();
            }
        });
    })?;
    Ok(())
}

fn reload(file: &Path, shared: &Shared) -> bool {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(errors) => {
            errors.iter().for_each(|e| tracing::error!("not reloaded: {e}"));
            return false;
        }
    };
    if config.privacy_pass.is_some() != shared.privacy_pass.is_some() {
        tracing::error!("not reloaded: {}: to begin or end with [privacy_pass] takes a restart", file.display());
        return false;
    }
    if let (Some(origin), Some(settings)) = (&shared.privacy_pass, config.privacy_pass)
        && let Err(e) = origin.reload(settings)
    {
        tracing::error!("not reloaded: {}: privacy_pass: {e}", file.display());
        return false;
    }
    let before = shared.admission.load_full();
    let limits = config.policy.scopes().count();
    if *before.policy() == config.policy {
        tracing::info!(
            "reloaded {}: issuers and their keys; the limits are what they were, the rest takes a restart",
            file.display()
        );
    } else {
        let counters = shared.metrics.limits(&config.policy);
        shared.admission.store(Arc::new(before.succeed(config.policy, counters)));
        tracing::info!(
            limits,
            "reloaded {}: limits, tokens, issuers and their keys; the rest takes a restart",
            file.display()
        );
    }
    shared.metrics.generation.inc();
    true
}
