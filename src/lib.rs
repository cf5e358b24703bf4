//! moh-gateway
