//! What tests and demo share: a certificate authority, an encoder of requests, MLS clients, a Delivery Service, a
//! federation client, an issuer of Privacy Pass tokens, and a real Redis. None of it uses the gateway's own code.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

pub mod client;
pub mod delivery;
pub mod ds;
pub mod ds_process;
pub mod encode;
pub mod frames;
pub mod issuing;
pub mod mimi;
pub mod mls;
pub mod pki;
pub mod program;
pub mod proxy_protocol;
pub mod redis;
pub mod tokens;
