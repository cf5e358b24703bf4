//! What an operator sees: Prometheus metrics ([`Metrics`]) and a line a request ([`AccessLog`]).
//!
//! Labels are bounded: endpoints, reasons, limits and nodes are the program's and the configuration's, providers only
//! those the operator names. Nothing a stranger writes makes a new time series.

mod access_log;

pub use access_log::{AccessLog, Line};

use crate::admission::{LimitCounters, Policy, Scope};
use crate::dialect::{self, Endpoint};
use crate::limiter::{OnFailure, fleet};
use crate::privacypass;
use crate::problem;
use prometheus::core::Collector;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::time::Duration;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Decision {
    /// It went to the Delivery Service, whose answer came back.
    Forwarded,
    /// The gateway answered it by itself.
    Answered,
    /// The gateway refused it.
    Refused,
    /// The client went away.
    #[default]
    Aborted,
}

impl Decision {
    /// Its label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Forwarded => "forwarded",
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::Aborted => "aborted",
        }
    }
}

/// The label of requests to no endpoint, and of providers that the configuration does not name.
const OTHER: &str = "other";

/// Why connections are refused.
const REFUSED_CONNECTIONS: &[&str] = &[
    "max",
    "per-ip",
    "per-provider",
    "handshake-rate",
    "handshakes-at-once",
    "proxy-protocol",
    "certificate-expired",
    "certificate-chain",
    "http2-abuse",
];

/// All metrics of a gateway.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    /// Of it, those that most requests are among.
    forwarded: Vec<(&'static str, IntCounter)>,
    providers: IntCounterVec,
    limits: IntCounterVec,
    gateway_seconds: Vec<(&'static str, Histogram)>,
    ds_seconds: Vec<(&'static str, Histogram)>,
    /// Decisions about keys that the limits' table had no room for.
    pub limits_overflowed: IntCounter,
    /// Configurations read while running, by what came of it.
    pub reloads: IntCounterVec,
    /// How many configurations there have been.
    pub generation: IntGauge,
    without_store: IntCounterVec,
    /// TLS handshakes, by how they ended.
    pub handshakes: IntCounterVec,
    /// Connections open.
    pub connections: IntGauge,
    /// Requests under way.
    pub in_flight: IntGauge,
    /// Connections refused before there was a request on them, by why.
    pub connections_refused: IntCounterVec,
    /// Open connections ended because their peer is no longer admitted.
    pub connections_cut: IntCounter,
    /// Nodes left out because they refused connections or did not answer.
    pub ejections: IntCounterVec,
    /// Whether a node's active checks succeed.
    pub node_healthy: IntGaugeVec,
    /// Addresses of the Delivery Service's nodes.
    pub nodes: IntGauge,
    /// When a certificate of ours ends, by the Unix clock.
    pub certificate_expiry: IntGaugeVec,
    /// When a stapled OCSP response ends.
    pub ocsp_expiry: IntGaugeVec,
    /// When the first of a listener's lists of revoked certificates ends.
    pub crl_expiry: IntGaugeVec,
    /// Files that were read again because they had changed, by what came of it.
    pub file_reloads: IntCounterVec,
    /// 1 while the newest content of a file is not in use because it is broken.
    pub file_broken: IntGaugeVec,
    /// Octets of bodies that are held until it is known what they are.
    pub held: IntGauge,
    /// Requests of this provider's nodes to others, by how they ended.
    pub egress: IntCounterVec,
    /// Access log lines lost because the writer could not keep up.
    pub log_lines_lost: IntCounter,
}

/// From 10 µs to 5 s.
const BUCKETS: &[f64] = &[
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
    0.5, 1.0, 5.0,
];

/// A metric, in a registry.
fn registered<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

impl Metrics {
    /// Metrics in a registry of their own, all series of the program's own labels there from the start.
    ///
    /// # Errors
    /// A name is taken twice: a fault of this function.
    pub fn new(named_providers: &[String]) -> Result<Self, prometheus::Error> {
        let registry = Registry::new_custom(Some("moh_gateway".into()), None)?;
        let counters = |name: &str, help: &str, labels: &[&str]| {
            registered(&registry, IntCounterVec::new(Opts::new(name, help), labels)?)
        };
        let counter = |name: &str, help: &str| registered(&registry, IntCounter::new(name, help)?);
        let gauge = |name: &str, help: &str| registered(&registry, IntGauge::new(name, help)?);
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            registered(&registry, IntGaugeVec::new(Opts::new(name, help), labels)?)
        };
        let histograms = |name: &str, help: &str| -> Result<Vec<(&'static str, Histogram)>, prometheus::Error> {
            let options = HistogramOpts::new(name, help).buckets(BUCKETS.to_vec());
            let vec = registered(&registry, HistogramVec::new(options, &["endpoint"])?)?;
            Ok(dialect::endpoints().map(|e| (e.name, vec.with_label_values(&[e.name]))).collect())
        };
        let requests = counters(
            "requests_total",
            "Requests by endpoint, decision and reason of a refusal.",
            &["endpoint", "decision", "reason"],
        )?;
        for endpoint in dialect::endpoints() {
            for reason in problem::REASONS {
                let _ = requests.with_label_values(&[endpoint.name, "refused", reason]);
            }
        }
        let forwarded = dialect::endpoints()
            .map(|endpoint| (endpoint.name, requests.with_label_values(&[endpoint.name, "forwarded", ""])))
            .collect();
        let providers = counters(
            "provider_requests_total",
            "Requests of authenticated providers, those of [peers] named by name.",
            &["provider", "decision"],
        )?;
        for provider in named_providers.iter().map(String::as_str).chain([OTHER]) {
            let _ = providers.with_label_values(&[provider, "forwarded"]);
        }
        let build = IntGauge::with_opts(
            Opts::new("build_info", "1, with the version.").const_label("version", env!("CARGO_PKG_VERSION")),
        )?;
        build.set(1);
        registry.register(Box::new(build))?;
        Ok(Self {
            requests,
            forwarded,
            providers,
            limits: counters(
                "limit_decisions_total",
                "What limits said: allowed, refused (a shadow's refusal refuses nobody), topped-up and exempted (of the refused, let in by a token).",
                &["limit", "mode", "outcome"],
            )?,
            gateway_seconds: histograms(
                "gateway_seconds",
                "What the gateway takes to decide, without waiting for the client's body or the Delivery Service.",
            )?,
            ds_seconds: histograms("ds_seconds", "From forwarding to the head of the Delivery Service's answer.")?,
            limits_overflowed: counter(
                "limit_overflow_decisions_total",
                "Decisions for keys that the table of limits had no room for, made in a bucket they share.",
            )?,
            reloads: counters(
                "config_reloads_total",
                "Reloads of the configuration by result: ok, failed.",
                &["result"],
            )?,
            generation: gauge("config_generation", "How many configurations have been in use; the first is 1.")?,
            without_store: counters(
                "limit_decisions_without_store_total",
                "Decisions made without the store that limits are kept in, by what the limit does then.",
                &["limit", "on_store_failure"],
            )?,
            handshakes: counters(
                "tls_handshakes_total",
                "TLS handshakes by result: ok, failed, timeout.",
                &["result"],
            )?,
            connections: gauge("connections", "Connections open after their handshake.")?,
            in_flight: gauge("requests_in_flight", "Requests under way.")?,
            connections_refused: {
                let refused = counters(
                    "connections_refused_total",
                    "Connections ended before they had a request, or for their HTTP/2 frames, by reason.",
                    &["reason"],
                )?;
                for reason in REFUSED_CONNECTIONS {
                    let _ = refused.with_label_values(&[*reason]);
                }
                refused
            },
            connections_cut: counter(
                "connections_cut_total",
                "Open connections ended because their peer is not admitted any more.",
            )?,
            ejections: counters(
                "node_ejections_total",
                "Delivery Service nodes left out: connections refused, or answers that did not come.",
                &["node"],
            )?,
            node_healthy: gauges("node_healthy", "1 while a node's active checks succeed.", &["node"])?,
            nodes: gauge("nodes", "Addresses that nodes of the Delivery Service have.")?,
            certificate_expiry: gauges(
                "certificate_expiry_seconds",
                "When a certificate of this gateway ends, by the Unix clock.",
                &["file"],
            )?,
            ocsp_expiry: gauges(
                "ocsp_expiry_seconds",
                "When a stapled OCSP response ends, by the Unix clock.",
                &["file"],
            )?,
            crl_expiry: gauges(
                "crl_expiry_seconds",
                "When the first of a listener's lists of revoked certificates ends, by the Unix clock: nobody gets in after that.",
                &["listener"],
            )?,
            file_reloads: counters(
                "file_reloads_total",
                "Files of certificates, keys, roots and lists that were read again because they had changed, by result: \
                 ok, failed (what was there before stays in use).",
                &["result"],
            )?,
            file_broken: gauges(
                "file_broken",
                "1 while what a file holds now is not in use because it is broken.",
                &["file"],
            )?,
            held: gauge(
                "held_body_octets",
                "Octets of bodies that are held until enough of them has come to decide; see connections.held_bodies.",
            )?,
            egress: counters(
                "egress_requests_total",
                "Requests of this provider's own nodes to other providers by result: forwarded, or why not.",
                &["result"],
            )?,
            log_lines_lost: counter(
                "access_log_lost_total",
                "Access log lines lost because their writer fell behind.",
            )?,
            registry,
        })
    }

    /// The counters of a limit.
    pub fn limit(&self, scope: &Scope, on_store_failure: OnFailure) -> LimitCounters {
        let mode = if scope.enforce { "enforce" } else { "shadow" };
        let of = |outcome| self.limits.with_label_values(&[scope.name.as_str(), mode, outcome]);
        let behaviour = match on_store_failure {
            OnFailure::Local => "local",
            OnFailure::Open => "open",
            OnFailure::Closed => "closed",
        };
        LimitCounters {
            allowed: of("allowed"),
            refused: of("refused"),
            topped_up: of("topped-up"),
            exempted: of("exempted"),
            without_store: self.without_store.with_label_values(&[scope.name.as_str(), behaviour]),
        }
    }

    /// The counters of all limits of a policy, in its order.
    pub fn limits(&self, policy: &Policy) -> Vec<LimitCounters> {
        let rates = policy.limits.iter().map(|limit| self.limit(&limit.scope, limit.on_store_failure));
        // A node counts what is under way by itself.
        let concurrency = policy.concurrency.iter().map(|limit| self.limit(&limit.scope, OnFailure::Local));
        rates.chain(concurrency).collect()
    }

    /// Metrics of the store that a fleet keeps its limits in.
    ///
    /// # Errors
    /// They are registered twice.
    pub fn store(&self) -> Result<fleet::Metrics, prometheus::Error> {
        let calls = Opts::new(
            "limit_store_calls_total",
            "Calls to the limits' store by result: ok, error, timeout, skipped (it is known not to answer).",
        );
        let seconds = HistogramOpts::new("limit_store_seconds", "How long calls to the limits' store take.");
        let up = IntGauge::new("limit_store_up", "1 while requests ask the limits' store, 0 while it is left out.")?;
        let opened = IntCounter::new("limit_store_failures_total", "How often the limits' store was given up.")?;
        let calls = registered(&self.registry, IntCounterVec::new(calls, &["result"])?)?;
        Ok(fleet::Metrics {
            up: registered(&self.registry, up)?,
            opened: registered(&self.registry, opened)?,
            ok: calls.with_label_values(&["ok"]),
            errors: calls.with_label_values(&["error"]),
            timeouts: calls.with_label_values(&["timeout"]),
            skipped: calls.with_label_values(&["skipped"]),
            seconds: registered(&self.registry, Histogram::with_opts(seconds.buckets(BUCKETS.to_vec()))?)?,
        })
    }

    /// Metrics of the Origin.
    ///
    /// # Errors
    /// They are registered twice.
    pub fn privacy_pass(&self) -> Result<privacypass::Metrics, prometheus::Error> {
        let redeemed = Opts::new("tokens_redeemed_total", "Privacy Pass tokens spent, by their type.");
        let redeemed = registered(&self.registry, IntCounterVec::new(redeemed, &["type"])?)?;
        let seconds = HistogramOpts::new(
            "token_seconds",
            "What it takes to tell whether a token is good, its wait for a thread and the store included.",
        );
        let counter = |name: &str, help: &str| registered(&self.registry, IntCounter::new(name, help)?);
        let directories =
            Opts::new("issuer_directory_fetches_total", "Questions to issuers' directories by result: ok, failed.");
        let heard = Opts::new("issuer_directory_heard_seconds", "When a directory last answered, by the Unix clock.");
        let spent = IntGauge::new("tokens_spent_held", "Spent tokens that this node remembers.")?;
        Ok(privacypass::Metrics {
            redeemed: privacypass::TYPES.map(|kind| redeemed.with_label_values(&[(kind as u16).to_string()])),
            seconds: registered(&self.registry, Histogram::with_opts(seconds.buckets(BUCKETS.to_vec()))?)?,
            shed: counter("tokens_shed_total", "Tokens refused because too many were waiting to be verified.")?,
            refused_again: counter(
                "tokens_refused_again_total",
                "Bad and spent tokens that came again, refused from memory.",
            )?,
            spent: registered(&self.registry, spent)?,
            directories: registered(&self.registry, IntCounterVec::new(directories, &["issuer", "result"])?)?,
            heard: registered(&self.registry, IntGaugeVec::new(heard, &["issuer"])?)?,
        })
    }

    /// Counts a request that has ended.
    pub fn request(&self, endpoint: Option<&Endpoint>, decision: Decision, reason: &str, provider: Option<&str>) {
        let endpoint = endpoint.map_or(OTHER, |e| e.name);
        let forwarded = self.forwarded.iter().find(|(name, _)| *name == endpoint && decision == Decision::Forwarded);
        match forwarded.filter(|_| reason.is_empty()) {
            Some((_, counter)) => counter.inc(),
            None => self.requests.with_label_values(&[endpoint, decision.label(), reason]).inc(),
        }
        if let Some(provider) = provider {
            self.providers.with_label_values(&[provider, decision.label()]).inc();
        }
    }

    /// The label of a provider: its name if the operator named it.
    pub fn provider_label<'a>(named: &'a [String], provider: &str) -> &'a str {
        named.iter().find(|name| *name == provider).map_or(OTHER, |name| name.as_str())
    }

    /// Notes what the gateway took.
    pub fn gateway_took(&self, endpoint: &Endpoint, took: Duration) {
        if let Some((_, histogram)) = self.gateway_seconds.iter().find(|(name, _)| *name == endpoint.name) {
            histogram.observe(took.as_secs_f64());
        }
    }

    /// Notes what the Delivery Service took.
    pub fn ds_took(&self, endpoint: &Endpoint, took: Duration) {
        if let Some((_, histogram)) = self.ds_seconds.iter().find(|(name, _)| *name == endpoint.name) {
            histogram.observe(took.as_secs_f64());
        }
    }

    /// The text that Prometheus scrapes.
    pub fn render(&self) -> Vec<u8> {
        let mut text = vec![];
        // Writing to a Vec does not fail, and what is registered has a valid name.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        text
    }
}
