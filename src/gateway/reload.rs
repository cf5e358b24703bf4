//! Reload: on SIGHUP, or when the admin listener is asked to, the configuration is read again, checked whole, and takes the
//! place of the one in use; and files that it names are looked at every so often, and taken when they have changed.
//!
//! A file that is wrong changes nothing, and what is wrong with it is said. Requests under way end with what they began with.
//! What a limit has counted stays where neither its name, its key nor its rate is another.

use super::Shared;
use super::download::Downloads;
use super::live::{Live, LiveEgress, Tls};
use crate::admission::Admission;
use crate::config::Config;
use crate::limiter::fleet::{self, Fleet};
use crate::limiter::memory::Memory;
use crate::privacypass::{self, Origin};
use crate::telemetry::AccessLog;
use crate::tls::{self, Watch};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

/// What came of a reload: the generation in use now, or all that is wrong.
pub(super) type Outcome = Result<i64, Vec<String>>;

/// Asks for reloads.
pub(super) type Asker = mpsc::Sender<oneshot::Sender<Outcome>>;

/// A store that nobody has heard of yet has so long to answer before requests ask it.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// An [`Asker`] that comes once there is something to reload.
pub(super) type Later = Arc<OnceLock<Asker>>;

/// What only a restart or an upgrade can change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fixed {
    listeners: Vec<SocketAddr>,
    admin: SocketAddr,
    egress: Option<SocketAddr>,
}

/// What the limits are kept in.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stores {
    memory: usize,
    fleet: Option<(fleet::Settings, [u8; 16])>,
}

impl Stores {
    pub(super) fn of(config: &Config) -> Self {
        Self { memory: config.limit_memory, fleet: config.limit_store.clone() }
    }
}

impl Fixed {
    pub(super) fn of(config: &Config) -> Self {
        let mut listeners: Vec<_> = config.listeners.iter().map(|listener| listener.address).collect();
        listeners.sort_unstable();
        Self { listeners, admin: config.admin, egress: config.egress.as_ref().map(|egress| egress.address) }
    }

    /// What is another in `next`.
    fn differences(&self, next: &Self) -> Vec<&'static str> {
        let all = [
            (self.listeners != next.listeners, "addresses of listeners"),
            (self.admin != next.admin, "admin.address"),
            (self.egress != next.egress, "egress.address"),
        ];
        all.into_iter().filter(|(differs, _)| *differs).map(|(_, what)| what).collect()
    }
}

/// What the limits are kept in from a reload on.
struct Kept {
    /// Another table.
    memory: Option<Memory>,
    fleet: Option<Arc<Fleet>>,
    secret: [u8; 16],
}

/// Origins that another came after, or none, and when: their configuration may come back, and each knows which of its tokens are
/// spent, and which are in hand.
#[derive(Default)]
struct Left(Vec<(Arc<Origin>, Instant)>);

/// Reloads, one at a time, in a thread of their own.
struct Reloader {
    file: PathBuf,
    shared: Arc<Shared>,
    fixed: Fixed,
    stores: Stores,
    left: Left,
    watch: Watch,
    /// Files that have changed and could not be taken: tried again at every look, for what was wrong may be in another file.
    pending: HashSet<PathBuf>,
}

/// Begins to reload when asked, for as long as the process lives.
pub(super) fn start(file: PathBuf, shared: Arc<Shared>, fixed: Fixed, stores: Stores) -> std::io::Result<Asker> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut hangup = {
        let _inside = runtime.enter();
        signal(SignalKind::hangup())?
    };
    let (asker, mut asked) = mpsc::channel::<oneshot::Sender<Outcome>>(4);
    let watch = Watch::new(files(&shared.live.load()));
    shared.live.load().privacy_pass.iter().for_each(|origin| origin.begin());
    let left = Left::default();
    let mut reloader = Reloader { file, shared, fixed, stores, left, watch, pending: HashSet::new() };
    reloader.watch_anew();
    std::thread::Builder::new().name("reload".into()).spawn(move || {
        runtime.block_on(async {
            loop {
                let every = reloader.shared.live.load().watch_every;
                tokio::select! {
                    came = hangup.recv() => match came {
                        Some(()) => drop(reloader.reload().await),
                        None => return,
                    },
                    Some(answer) = asked.recv() => drop(answer.send(reloader.reload().await)),
                    () = tokio::time::sleep(every) => reloader.look().await,
                }
            }
        });
    })?;
    Ok(asker)
}

/// Waits for a store that was begun with a moment ago: requests are not to find it without a connection. One that does not
/// answer is put in use all the same, as at a start.
async fn until_it_answers(fleet: &Fleet) {
    let until = Instant::now() + ANSWERS_WITHIN;
    while !fleet.is_up() && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The files of what is in use.
fn files(live: &Live) -> Vec<PathBuf> {
    let mut files = live.tls.files();
    files.extend(live.watched.iter().cloned());
    files
}

// === impl Left ===

impl Left {
    /// One that can become this.
    fn find(&self, settings: &privacypass::Settings) -> Option<&Arc<Origin>> {
        self.0.iter().map(|(origin, _)| origin).find(|origin| origin.can_become(settings))
    }

    /// Puts one in the place of another. What is said of both is then said of the one.
    fn exchange(&mut self, before: Option<&Arc<Origin>>, now: Option<&Arc<Origin>>) {
        let is_other = |of: &&Arc<Origin>| now.is_none_or(|now| !Arc::ptr_eq(of, now));
        if let Some(before) = before.filter(is_other) {
            before.leave(now);
            self.0.push((before.clone(), Instant::now()));
        }
        if let Some(now) = now {
            self.0.retain(|(of, _)| !Arc::ptr_eq(of, now));
            now.begin();
        }
    }

    /// Lets go those of which no token is taken any more, unless a request is in them still.
    fn forget(&mut self) {
        self.0.retain(|(of, since)| since.elapsed() < of.known_for() || Arc::strong_count(of) > 1);
    }
}

// === impl Reloader ===

impl Reloader {
    async fn reload(&mut self) -> Outcome {
        let outcome = self.try_reload().await;
        let metrics = &self.shared.metrics;
        let generation = metrics.generation.get();
        let status = match &outcome {
            Ok(generation) => {
                metrics.reloads.with_label_values(&["ok"]).inc();
                tracing::info!(generation, "reloaded {}", self.file.display());
                format!("generation {generation} of the configuration")
            }
            Err(errors) => {
                metrics.reloads.with_label_values(&["failed"]).inc();
                errors.iter().for_each(|e| tracing::error!("not reloaded: {e}"));
                format!("generation {generation} of the configuration; the last reload failed")
            }
        };
        sd_notify::notify(&[sd_notify::NotifyState::Status(&status)]).ok();
        outcome
    }

    async fn try_reload(&mut self) -> Outcome {
        let at = self.file.display().to_string();
        let mut config =
            Config::load(&self.file).map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        let fixed = Fixed::of(&config);
        let differences = self.fixed.differences(&fixed);
        if !differences.is_empty() {
            let another =
                |what: &&str| format!("{at}: {what}: to change this takes a restart, or an upgrade (SIGUSR2)");
            return Err(differences.iter().map(another).collect());
        }
        for hint in &config.hints {
            tracing::warn!("{hint} (a hint)");
        }
        let before = self.shared.live.load_full();
        let failed = |what: &str, e: &dyn std::fmt::Display| vec![format!("{at}: {what}: {e}")];
        let tls = Tls::new(&config, self.shared.own_secret).map_err(|e| failed("TLS", &e))?;
        let egress = LiveEgress::new(&config, before.egress.as_deref()).map_err(|e| failed("egress", &e))?;
        let downloads = Downloads::of(config.proxy_download.as_ref(), before.downloads.as_ref());
        let downloads = downloads.map_err(|e| failed("proxy_download", &e))?;
        let stores = Stores::of(&config);
        let kept = self.kept(&before, &stores).map_err(|e| failed("limits", &e))?;
        let fleet = kept.fleet.clone();
        self.shared.nodes.resolve_ahead(&config.upstream).await;
        let access_log = AccessLog::open(&config.access_log).map_err(|e| failed("access_log", &e))?;
        let other_fleet = fleet.as_ref().map(Arc::as_ptr) != before.fleet.as_ref().map(Arc::as_ptr);
        if let Some(fleet) = fleet.as_ref().filter(|_| other_fleet) {
            until_it_answers(fleet).await;
        }
        // The last that can fail: what is in use is changed by it.
        let privacy_pass = self.privacy_pass(&before, config.privacy_pass.take(), fleet.as_ref());
        let privacy_pass = privacy_pass.map_err(|e| failed("privacy_pass", &e))?;
        // From here on nothing fails.
        self.left.exchange(before.privacy_pass.as_ref(), privacy_pass.as_ref());
        self.shared.access_log.exchange(&access_log);
        if other_fleet {
            before.fleet.iter().for_each(|fleet| fleet.retire());
            fleet.iter().for_each(|fleet| fleet.begin());
        }
        let threads = config.threads;
        self.shared.nodes.reload(config.upstream.clone());
        self.shared.metrics.file_broken.reset();
        // As late as can be: what is charged from here on is not known to another table.
        let admission = self.admission(&before, &config, &stores, kept);
        self.begin(Live::new(config, admission, privacy_pass, fleet, Arc::new(tls), egress, downloads));
        self.shared.threads.send_replace(threads);
        self.watch_anew();
        (self.fixed, self.stores) = (fixed, stores);
        self.shared.metrics.generation.inc();
        Ok(self.shared.metrics.generation.get())
    }

    /// What the limits are kept in: as it was, another table, or another store.
    fn kept(&self, before: &Live, stores: &Stores) -> std::io::Result<Kept> {
        let metrics = &self.shared.metrics;
        let memory = match stores.memory == self.stores.memory {
            true => None,
            false => Some(Memory::new(stores.memory, metrics.limits_overflowed.clone())?),
        };
        let (fleet, secret) = match &stores.fleet {
            same if *same == self.stores.fleet => (before.fleet.clone(), before.admission.secret()),
            Some((settings, secret)) => {
                let metrics = self.shared.store_metrics().map_err(std::io::Error::other)?;
                (Some(Arc::new(Fleet::start(settings.clone(), metrics)?)), *secret)
            }
            None => (None, before.admission.secret()),
        };
        Ok(Kept { memory, fleet, secret })
    }

    /// The limits: another table takes over what the one in use knows.
    fn admission(&self, before: &Live, config: &Config, stores: &Stores, kept: Kept) -> Arc<Admission> {
        let counters = || self.shared.metrics.limits(&config.policy);
        if *stores == self.stores {
            return match *before.admission.policy() == config.policy {
                true => before.admission.clone(),
                false => Arc::new(before.admission.succeed(config.policy.clone(), counters())),
            };
        }
        let of_limits = kept.fleet.filter(|fleet| fleet.keeps_limits());
        let limiter = Arc::new(before.admission.limiter().succeed(kept.memory, of_limits));
        Arc::new(Admission::new(config.policy.clone(), limiter, kept.secret, counters()))
    }

    /// The Origin: as it was, with what is another in the configuration, one that was left, begun with, or none any more.
    fn privacy_pass(
        &mut self,
        before: &Live,
        settings: Option<privacypass::Settings>,
        fleet: Option<&Arc<Fleet>>,
    ) -> std::io::Result<Option<Arc<Origin>>> {
        self.left.forget();
        let Some(settings) = settings else { return Ok(None) };
        let in_use = before.privacy_pass.as_ref().filter(|origin| origin.can_become(&settings));
        if let Some(origin) = in_use.or_else(|| self.left.find(&settings)).cloned() {
            origin.reload(settings, fleet.cloned())?;
            return Ok(Some(origin));
        }
        // Of another epoch or secret no token of before is taken, so what is known of spent ones is of no use.
        let metrics = self.shared.privacy_pass_metrics().map_err(std::io::Error::other)?;
        Ok(Some(Arc::new(Origin::start(settings, fleet.cloned(), metrics)?)))
    }

    /// Puts another in use.
    fn begin(&mut self, live: Live) {
        let live = Arc::new(live);
        self.shared.live.store(live.clone());
        let cut = self.shared.connections.review(&live);
        if cut > 0 {
            tracing::info!(connections = cut, "ended: their peers are not admitted any more");
        }
    }

    /// Watches the files of what is in use from now on. One that has changed since it was read is not missed: all are read once
    /// more, and of what cannot be read now nothing is said before it changes again.
    fn watch_anew(&mut self) {
        let live = self.shared.live.load_full();
        self.watch = Watch::new(files(&live));
        self.pending.clear();
        let mut again = (*live).clone();
        if let Ok(tls) = live.tls.refreshed(|_| true, |_| {}) {
            again.tls = Arc::new(tls);
        }
        if !live.watched.is_empty()
            && let Err(why) = self.look_again(&live, &mut again)
        {
            tracing::debug!("{why}");
        }
        self.begin(again);
        self.say_expiries();
    }

    /// Looks at the files, and takes those that have changed.
    async fn look(&mut self) {
        self.left.forget();
        let news: HashSet<PathBuf> = self.watch.changed().into_iter().collect();
        if news.is_empty() && self.pending.is_empty() {
            return;
        }
        let changed: HashSet<PathBuf> = self.pending.drain().chain(news.iter().cloned()).collect();
        let before = self.shared.live.load_full();
        let mut live = (*before).clone();
        let mut broken = vec![];
        let said = |said: Result<PathBuf, tls::FileError>| match said {
            Ok(file) => self.said_ok(&file),
            Err(e) => broken.push((e.file.clone(), e.to_string())),
        };
        match before.tls.refreshed(|file| changed.contains(file), said) {
            Ok(tls) => live.tls = Arc::new(tls),
            Err(e) => tracing::error!("TLS: {e}"),
        }
        if before.watched.iter().any(|file| changed.contains(file)) {
            match self.look_again(&before, &mut live) {
                Ok(()) => {
                    before.watched.iter().filter(|file| changed.contains(*file)).for_each(|file| self.said_ok(file))
                }
                Err(why) => {
                    let files = before.watched.iter().filter(|file| changed.contains(*file));
                    broken.extend(files.map(|file| (file.clone(), why.clone())));
                }
            }
        }
        for (file, why) in broken {
            // What is tried again and again is said once.
            if !news.is_empty() {
                self.said_broken(&file, &why);
            }
            // Together with those that it belongs to: a certificate and its key.
            self.pending.extend(changed.iter().cloned());
        }
        self.begin(live);
        self.say_expiries();
    }

    /// Files of nodes, egress or tickets have changed: the configuration in use is resolved again, from its text as it was read.
    fn look_again(&self, before: &Live, live: &mut Live) -> Result<(), String> {
        let config = Config::parse(&self.file, &before.text)
            .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))?;
        let tickets = Tls::tickets_of(&config, self.shared.own_secret);
        let tls = live.tls.with_tickets(tickets).map_err(|e| e.to_string())?;
        let egress = LiveEgress::new(&config, before.egress.as_deref()).map_err(|e| e.to_string())?;
        let downloads = Downloads::of(config.proxy_download.as_ref(), before.downloads.as_ref());
        live.downloads = downloads.map_err(|e| e.to_string())?;
        live.tls = Arc::new(tls);
        live.egress = egress;
        self.shared.nodes.reload(config.upstream);
        Ok(())
    }

    fn said_ok(&self, file: &Path) {
        let metrics = &self.shared.metrics;
        let name = file.display().to_string();
        metrics.file_reloads.with_label_values(&["ok"]).inc();
        metrics.file_broken.with_label_values(&[name.as_str()]).set(0);
        tracing::info!(file = %name, "read again: it has changed");
    }

    fn said_broken(&self, file: &Path, why: &str) {
        let metrics = &self.shared.metrics;
        let name = file.display().to_string();
        metrics.file_reloads.with_label_values(&["failed"]).inc();
        metrics.file_broken.with_label_values(&[name.as_str()]).set(1);
        tracing::error!("it has changed and is not taken; what was there before stays in use: {why}");
    }

    fn say_expiries(&mut self) {
        let live = self.shared.live.load_full();
        let metrics = &self.shared.metrics;
        for (listener, until) in live.tls.crls_until() {
            let left = until.duration_since(SystemTime::now()).unwrap_or_default();
            metrics.crl_expiry.with_label_values(&[listener.to_string().as_str()]).set(unix(until));
            if left < std::time::Duration::from_secs(86_400) {
                tracing::warn!(%listener, "a list of revoked certificates ends within a day: nobody gets in after that");
            }
        }
        metrics.certificate_expiry.reset();
        metrics.ocsp_expiry.reset();
        for (files, certificate) in live.tls.certificates() {
            let name = files.chain.display().to_string();
            metrics.certificate_expiry.with_label_values(&[name.as_str()]).set(unix(certificate.not_after()));
            if let Some(file) = &files.ocsp {
                let why = certificate.ocsp_problem();
                if let Some(why) = why {
                    tracing::warn!(file = %file.display(), "this OCSP response is not stapled: {why}");
                }
                let name = file.display().to_string();
                metrics.file_broken.with_label_values(&[name.as_str()]).set(i64::from(why.is_some()));
            }
            if let (Some(file), Some(until)) = (&files.ocsp, certificate.ocsp_until()) {
                metrics.ocsp_expiry.with_label_values(&[file.display().to_string().as_str()]).set(unix(until));
            }
            let left = certificate.not_after().duration_since(SystemTime::now()).unwrap_or_default();
            if left < std::time::Duration::from_secs(7 * 86_400) {
                tracing::warn!(file = %name, "this certificate ends in {} days", left.as_secs() / 86_400);
            }
        }
    }
}

fn unix(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::privacypass::{BoundTo, SpentIn};

    fn settings(secret: &[u8], epoch: Duration) -> privacypass::Settings {
        privacypass::Settings {
            origin: "o.example".into(),
            epoch,
            bound_to: BoundTo::Origin,
            secret: Some(secret.into()),
            issuers: vec![],
            spent: SpentIn::Memory,
            spent_tokens: 10,
            threads: 1,
            max_wait: Duration::from_secs(5),
        }
    }

    #[test]
    fn an_origin_that_was_left_comes_back_as_long_as_it_knows_what_others_do_not() {
        let metrics = crate::telemetry::Metrics::new(&[]).unwrap().privacy_pass().unwrap();
        let start =
            |secret: &[u8], epoch| Arc::new(Origin::start(settings(secret, epoch), None, metrics.clone()).unwrap());
        let (hour, moment) = (Duration::from_secs(3600), Duration::from_millis(10));
        let (one, two, short) = (start(b"one", hour), start(b"two", hour), start(b"one", moment));
        let mut left = Left::default();
        left.exchange(Some(&one), Some(&one));
        assert!(left.0.is_empty(), "it goes on");
        left.exchange(Some(&one), Some(&short));
        left.exchange(Some(&short), Some(&two));
        left.exchange(Some(&two), None);
        let back = |left: &Left, secret: &[u8], epoch| left.find(&settings(secret, epoch)).cloned();
        assert!(back(&left, b"one", hour).is_some_and(|of| Arc::ptr_eq(&of, &one)));
        assert!(back(&left, b"three", hour).is_none());
        std::thread::sleep(4 * moment);
        left.forget();
        assert!(back(&left, b"one", moment).is_some(), "a request may be in it still");
        drop((short, one));
        left.forget();
        assert!(back(&left, b"one", moment).is_none() && back(&left, b"one", hour).is_some());
        left.exchange(None, Some(&two));
        assert!(back(&left, b"two", hour).is_none() && left.0.len() == 1, "it is in use");
    }
}
