//! Any path, at the routes of every dialect: nothing panics; a path that is found is found at one endpoint, its parameter has
//! no control character and is no dot segment, and what the Delivery Service is asked holds it octet for octet.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moh_gateway::dialect::{DIALECTS, Routes};
use std::sync::LazyLock;

static ROUTES: LazyLock<Routes> = LazyLock::new(|| Routes::of(DIALECTS));

fuzz_target!(|path: &str| {
    for method in [http::Method::GET, http::Method::POST] {
        let Ok(found) = ROUTES.find(&method, path) else { continue };
        assert_eq!(found.route.endpoint.method, method);
        assert!(!found.parameter.chars().any(char::is_control));
        assert!(found.parameter != "." && found.parameter != "..");
        assert_eq!(found.route.upstream_path(found.raw), path);
        assert!(!path.split('/').any(|segment| segment == "." || segment == ".."));
    }
});
