//! moh-gateway: the gateway in front of the Delivery Services of a MIMI/MLS messaging provider.
//!
//! A request goes one way: listener → route → peek → identify → admit → forward → account. Each step is a module that a
//! test calls without a socket; only [`gateway`] knows Pingora. `docs/architecture.md` has the picture.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod admission;
pub mod cli;
pub mod config;
pub mod copying;
pub mod dialect;
pub mod download;
pub mod egress;
pub mod files;
pub mod forward;
pub mod gateway;
pub mod http1;
pub mod issuer;
pub mod limiter;
pub mod privacypass;
pub mod problem;
pub mod telemetry;
pub mod tls;
pub mod upstream;
pub mod wire;
