//! End to end: real TLS to the real binary, real MLS messages, a real Delivery Service behind it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    unreachable_pub
)]

#[path = "../support/mod.rs"]
mod support;

mod abuse;
mod command_line;
mod data_path;
mod download;
mod egress;
mod federation;
mod fleet;
mod forwarding;
mod harness;
mod hostile;
mod http1;
mod interop;
mod issuers;
mod learned;
mod limits;
mod mimi;
mod nodes;
mod outside;
mod refusals;
mod spent;
mod tls;
mod tokens;
mod upgrade;
