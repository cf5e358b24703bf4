//! Which endpoint a request is for, and the parameter of its path.
//!
//! Paths are [`Template`]s, since servers differ in them (`wire.md`, "Dialect `mimi`"): exact ones, found by a hash
//! map, and ones with a parameter, of which there are few. The gateway and the Delivery Service both read the path, and
//! a path that one of them decodes or shortens more than the other gets past a check. So a path is compared as it came,
//! octet for octet; only its parameter is decoded, once; and what another server may take for another path is refused,
//! not put right.

use super::{Dialect, Endpoint};
use crate::wire;
use http::Method;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

const DOTS: &str = "one of its segments is . or ..";
const CONTROL: &str = "its parameter holds a control character";

/// Why no endpoint serves a method and path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoRoute {
    /// No endpoint has this path.
    UnknownPath,
    /// Endpoints have it, with other methods.
    WrongMethod {
        /// One that it has.
        allow: &'static Method,
    },
    /// Servers read this path differently, or its parameter cannot be decoded. The field is `path`; the offset counts
    /// octets of it.
    Ambiguous(wire::Error),
}

/// Why a text is no template of a path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidTemplate(pub String);

/// A path, or all paths that differ in one segment: `/v1/update/{roomId}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    whole: String,
    parameter: Option<Parameter>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Parameter {
    name: String,
    /// What stands before it, up to a slash.
    prefix: String,
    /// What stands after it: nothing, or a slash and more.
    suffix: String,
}

impl Template {
    /// Reads a template: segments of characters that need no encoding in a path, of which one may be a `{parameter}`.
    ///
    /// # Errors
    /// Says what is wrong, for who has written it.
    pub fn parse(path: &str) -> Result<Self, InvalidTemplate> {
        let Some(segments) = path.strip_prefix('/') else {
            return Err(InvalidTemplate("it does not begin with /".to_owned()));
        };
        let is_literal = |c: &char| u8::try_from(*c).is_ok_and(is_plain);
        let mut parameters = 0;
        let mut rest = segments.split('/').peekable();
        while let Some(segment) = rest.next() {
            if let Some(name) = segment.strip_prefix('{').and_then(|name| name.strip_suffix('}')) {
                if name.is_empty() || !name.bytes().all(|octet| octet.is_ascii_alphanumeric() || octet == b'_') {
                    return Err(InvalidTemplate(format!("the name of {segment} is not of letters, digits and _")));
                }
                parameters += 1;
            } else if segment.is_empty() && rest.peek().is_some() {
                return Err(InvalidTemplate("it has an empty segment".to_owned()));
            } else if is_dots(segment) {
                return Err(InvalidTemplate("it has a segment . or ..".to_owned()));
            } else if segment.contains(['{', '}']) {
                return Err(InvalidTemplate("its parameter is not a whole segment: /{name}".to_owned()));
            } else if let Some(other) = segment.chars().find(|c| !is_literal(c)) {
                return Err(InvalidTemplate(format!("it holds {other:?}, which a path cannot hold or only encoded")));
            }
        }
        if parameters > 1 {
            return Err(InvalidTemplate("it has more than one parameter".to_owned()));
        }
        Ok(Self::split(path))
    }

    /// The template that a path is known to be.
    fn split(path: &str) -> Self {
        let parameter = path.split_once('{').and_then(|(prefix, rest)| {
            let (name, suffix) = rest.split_once('}')?;
            Some(Parameter { name: name.to_owned(), prefix: prefix.to_owned(), suffix: suffix.to_owned() })
        });
        Self { whole: path.to_owned(), parameter }
    }

    /// The name of its parameter, if it has one.
    pub fn parameter(&self) -> Option<&str> {
        self.parameter.as_ref().map(|parameter| parameter.name.as_str())
    }

    /// The path with `raw`, one segment encoded as it came, in the parameter's place. Without a parameter: itself.
    pub fn fill(&self, raw: &str) -> String {
        match &self.parameter {
            Some(Parameter { prefix, suffix, .. }) => [prefix.as_str(), raw, suffix.as_str()].concat(),
            None => self.whole.clone(),
        }
    }

    /// The template as it was written.
    pub fn as_str(&self) -> &str {
        &self.whole
    }

    /// The segment of `path` that is the parameter, where all else of the path is this template.
    #[inline]
    fn segment<'p>(&self, path: &'p str) -> Option<&'p str> {
        let Parameter { prefix, suffix, .. } = self.parameter.as_ref()?;
        let raw = path.strip_prefix(prefix.as_str())?.strip_suffix(suffix.as_str())?;
        (!raw.is_empty() && !raw.contains('/')).then_some(raw)
    }

    /// Octets before the parameter.
    fn before(&self) -> usize {
        self.parameter.as_ref().map_or(0, |parameter| parameter.prefix.len())
    }

    /// Whether there is a path that is both this and `other`.
    fn meets(&self, other: &Self) -> bool {
        let is_parameter = |segment: &str| segment.starts_with('{');
        let (mut ours, mut theirs) = (self.whole.split('/'), other.whole.split('/'));
        loop {
            match (ours.next(), theirs.next()) {
                (None, None) => return true,
                (Some(a), Some(b)) if a == b => {}
                (Some(a), Some(b)) if is_parameter(a) && !b.is_empty() => {}
                (Some(a), Some(b)) if is_parameter(b) && !a.is_empty() => {}
                _ => return false,
            }
        }
    }
}

/// What the configuration says of an endpoint's paths, by the endpoint's name: the one it is served at, and the one
/// that the Delivery Service is asked at. Where it does not say the first, the draft's is meant; the second, the first.
pub type Paths<'a> = &'a dyn Fn(&str) -> (Option<Template>, Option<Template>);

/// An endpoint at a path.
#[derive(Debug, Clone)]
pub struct Route {
    /// What is served there.
    pub endpoint: &'static Endpoint,
    /// The dialect it is of.
    pub dialect: &'static Dialect,
    path: Template,
    upstream: Option<Template>,
}

impl Route {
    /// The path that it is served at.
    pub fn path(&self) -> &Template {
        &self.path
    }

    /// The path that the Delivery Service is asked at. `raw` is the parameter as it came, still encoded: nobody is to
    /// read what another has encoded anew.
    pub fn upstream_path(&self, raw: &str) -> Cow<'_, str> {
        let path = self.upstream.as_ref().unwrap_or(&self.path);
        if path.parameter.is_some() { Cow::Owned(path.fill(raw)) } else { Cow::Borrowed(path.as_str()) }
    }
}

/// Two endpoints of one method, and a path that could mean either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a path could mean {first} as well as {second}")]
pub struct Clash {
    /// The name of an endpoint.
    pub first: &'static str,
    /// The name of the other.
    pub second: &'static str,
}

/// What is served, and at which paths.
#[derive(Debug, Default, Clone)]
pub struct Routes {
    all: Vec<Arc<Route>>,
    /// Those without a parameter, by their path: one for each method.
    exact: HashMap<String, Vec<Arc<Route>>>,
    /// Those with one.
    templated: Vec<Arc<Route>>,
}

/// The endpoint that a request is for.
#[derive(Debug, Clone)]
pub struct Found<'r, 'p> {
    /// The endpoint and its path.
    pub route: &'r Arc<Route>,
    /// The path's parameter as it came; empty where the path has none.
    pub raw: &'p str,
    /// The same, percent-decoded once: neither empty nor `.` nor `..`, without control characters. It may hold slashes.
    pub parameter: Cow<'p, str>,
}

impl Routes {
    /// All endpoints of `dialects`, at the paths that `paths` gives them.
    ///
    /// # Errors
    /// Names two endpoints of one method, where there is a path that could mean both.
    pub fn new(dialects: &[&'static Dialect], paths: Paths<'_>) -> Result<Self, Clash> {
        let routes = Self::assemble(dialects, paths);
        let mut rest = routes.all.as_slice();
        while let [first, after @ ..] = rest {
            for second in after {
                if first.endpoint.method == second.endpoint.method && first.path.meets(&second.path) {
                    return Err(Clash { first: first.endpoint.name, second: second.endpoint.name });
                }
            }
            rest = after;
        }
        Ok(routes)
    }

    /// All endpoints of `dialects`, at their drafts' paths, which do not clash.
    pub fn of(dialects: &[&'static Dialect]) -> Self {
        Self::assemble(dialects, &drafts)
    }

    fn assemble(dialects: &[&'static Dialect], paths: Paths<'_>) -> Self {
        let mut routes = Self::default();
        for &dialect in dialects {
            for &endpoint in dialect.endpoints {
                let (path, upstream) = paths(endpoint.name);
                let path = path.unwrap_or_else(|| Template::split(endpoint.path));
                let route = Arc::new(Route { endpoint, dialect, path, upstream });
                routes.all.push(route.clone());
                if route.path.parameter.is_some() {
                    routes.templated.push(route);
                } else {
                    routes.exact.entry(route.path.whole.clone()).or_default().push(route);
                }
            }
        }
        routes
    }

    /// All of them: dialect by dialect, in the order of each one's endpoints.
    pub fn routes(&self) -> impl Iterator<Item = &Route> {
        self.all.iter().map(|route| &**route)
    }

    /// Finds the endpoint for a method and a path: the path as it came, without query and fragment.
    ///
    /// # Errors
    /// [`NoRoute`] where there is none.
    pub fn find<'r, 'p>(&'r self, method: &Method, path: &'p str) -> Result<Found<'r, 'p>, NoRoute> {
        let mut other_method = None;
        for route in self.exact.get(path).into_iter().flatten() {
            let endpoint = route.endpoint;
            if endpoint.method == *method {
                return Ok(Found { route, raw: "", parameter: Cow::Borrowed("") });
            }
            other_method = Some(&endpoint.method);
        }
        for route in &self.templated {
            let Some(raw) = route.path.segment(path) else { continue };
            let endpoint = route.endpoint;
            if endpoint.method == *method {
                let parameter = decoded(raw, route.path.before()).map_err(NoRoute::Ambiguous)?;
                return Ok(Found { route, raw, parameter });
            }
            other_method = Some(&endpoint.method);
        }
        Err(match other_method {
            Some(allow) => NoRoute::WrongMethod { allow },
            None => self.unknown(path),
        })
    }

    /// What is to be said of a path that no endpoint has. Where another server may see one that an endpoint has, that
    /// is said: it is no innocent mistake.
    #[cold]
    fn unknown(&self, path: &str) -> NoRoute {
        let seen = self.templated.iter().find_map(|route| {
            let prefix = &route.path.parameter.as_ref()?.prefix;
            ambiguity(path.strip_prefix(prefix.as_str())?, prefix.len())
        });
        seen.map_or(NoRoute::UnknownPath, NoRoute::Ambiguous)
    }
}

/// The drafts' paths, everywhere.
fn drafts(_endpoint: &str) -> (Option<Template>, Option<Template>) {
    (None, None)
}

/// An octet that stands for itself in a segment: `pchar` of RFC 3986 §3.3, but for `pct-encoded`.
#[inline]
fn is_plain(octet: u8) -> bool {
    let is_sub_delim = matches!(octet, b'!' | b'$' | b'&'..=b',' | b';' | b'=');
    octet.is_ascii_alphanumeric() || is_sub_delim || matches!(octet, b'-' | b'.' | b'_' | b'~' | b':' | b'@')
}

/// Whether a segment is `.` or `..`, whichever of its dots are encoded.
fn is_dots(segment: &str) -> bool {
    fn without_dot(text: &str) -> Option<&str> {
        [".", "%2e", "%2E"].into_iter().find_map(|dot| text.strip_prefix(dot))
    }
    without_dot(segment).is_some_and(|rest| rest.is_empty() || without_dot(rest) == Some(""))
}

#[cold]
fn ambiguous(offset: usize, reason: &'static str) -> wire::Error {
    wire::Error::Malformed { field: "path", offset, reason }
}

/// Percent-decodes a parameter, once. `offset` is where it begins in its path.
fn decoded(raw: &str, offset: usize) -> wire::Result<Cow<'_, str>> {
    let text = if raw.bytes().all(is_plain) {
        Cow::Borrowed(raw)
    } else {
        let mut octets = Vec::with_capacity(raw.len());
        let mut rest = raw.as_bytes();
        while let [first, after @ ..] = rest {
            let at = offset + (raw.len() - rest.len());
            let octet = match (first, after) {
                (b'%', [high, low, after @ ..]) => {
                    rest = after;
                    hex(*high).zip(hex(*low)).map(|(high, low)| (high << 4) | low)
                }
                (b'%', _) => None,
                (plain, after) => {
                    if !is_plain(*plain) {
                        return Err(ambiguous(at, "its parameter holds an octet that is not encoded"));
                    }
                    rest = after;
                    Some(*plain)
                }
            };
            let Some(octet) = octet else {
                return Err(ambiguous(at, "its parameter holds a % without two hex digits after it"));
            };
            if octet.is_ascii_control() {
                return Err(ambiguous(at, CONTROL));
            }
            octets.push(octet);
        }
        let text = String::from_utf8(octets).map_err(|_| ambiguous(offset, "its parameter is not UTF-8"))?;
        // Those of ASCII are found above, where their place is known.
        if !text.is_ascii() && text.chars().any(char::is_control) {
            return Err(ambiguous(offset, CONTROL));
        }
        Cow::Owned(text)
    };
    if text == "." || text == ".." { Err(ambiguous(offset, DOTS)) } else { Ok(text) }
}

/// The value of a hex digit.
#[inline]
fn hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

/// What lets another server see another path, in what is left of a path after the prefix of a template: its first
/// segment would be the parameter. `offset` is where that begins in its path.
fn ambiguity(rest: &str, mut offset: usize) -> Option<wire::Error> {
    for (place, segment) in rest.split('/').enumerate() {
        if is_dots(segment) {
            return Some(ambiguous(offset, DOTS));
        }
        if place > 0
            && let Some(at) = separator(segment.as_bytes())
        {
            return Some(ambiguous(offset + at, "it holds a backslash, or an encoded slash or backslash"));
        }
        offset += segment.len() + 1;
    }
    None
}

/// Where a segment holds what other servers take for a slash.
fn separator(segment: &[u8]) -> Option<usize> {
    let is_one = |at: &usize| {
        matches!(segment.get(*at..), Some([b'\\', ..] | [b'%', b'2', b'f' | b'F', ..] | [b'%', b'5', b'c' | b'C', ..]))
    };
    (0..segment.len()).find(is_one)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::DIALECTS;

    const ROOM: &str = "mimi%3A%2F%2Fb.example%2Fr%2Froom0";

    /// The routes of all drafts, `path` being the path of `endpoint`, and `upstream` the Delivery Service's.
    fn with(endpoint: &str, path: &str, upstream: Option<&str>) -> Result<Routes, Clash> {
        Routes::new(DIALECTS, &|name: &str| match name == endpoint {
            true => (Some(Template::parse(path).unwrap()), upstream.map(|path| Template::parse(path).unwrap())),
            false => (None, None),
        })
    }

    /// Name, parameter as it came, and parameter.
    fn find(routes: &Routes, method: &Method, path: &str) -> Result<(&'static str, String, String), NoRoute> {
        let found = routes.find(method, path)?;
        Ok((found.route.endpoint.name, found.raw.to_owned(), found.parameter.into_owned()))
    }

    /// The offset of what is ambiguous.
    fn place(routes: &Routes, path: &str) -> usize {
        match routes.find(&Method::POST, path).unwrap_err() {
            NoRoute::Ambiguous(wire::Error::Malformed { field: "path", offset, .. }) => offset,
            no => panic!("{path}: {no:?}"),
        }
    }

    #[test]
    fn the_paths_of_the_drafts_are_templates_and_do_not_clash() {
        Routes::new(DIALECTS, &drafts).unwrap();
        let routes = Routes::of(DIALECTS);
        assert_eq!(routes.routes().count(), crate::dialect::endpoints().count());
        for route in routes.routes() {
            assert_eq!(Template::parse(route.endpoint.path).as_ref(), Ok(route.path()));
            assert_eq!(route.path().as_str(), route.endpoint.path);
            assert!(route.dialect.endpoints.iter().any(|endpoint| endpoint.name == route.endpoint.name));
            let filled = route.path().fill("x");
            assert_eq!(find(&routes, &route.endpoint.method, &filled).unwrap().0, route.endpoint.name);
        }
    }

    #[test]
    fn exact_paths() {
        let routes = Routes::of(DIALECTS);
        let found = routes.find(&Method::POST, "/group_operation").unwrap();
        assert_eq!((found.route.endpoint.name, found.raw, &*found.parameter), ("group_operation", "", ""));
        assert_eq!(found.route.upstream_path(""), "/group_operation");
        assert!(matches!(found.route.upstream_path(""), Cow::Borrowed(_)));
        let wrong = routes.find(&Method::POST, "/welcome_information").unwrap_err();
        assert!(matches!(wrong, NoRoute::WrongMethod { allow } if *allow == Method::GET));
        for path in [
            "/",
            "",
            "group_operation",
            "/group_operation/",
            "//group_operation",
            "/Group_operation",
            "/group%5foperation",
            "/group_operation%00",
            "/group_operation/../group_operation",
            "/./group_operation",
            "/.well-known/mimi%2Fds-domain",
        ] {
            assert_eq!(routes.find(&Method::POST, path).unwrap_err(), NoRoute::UnknownPath, "{path}");
        }
        assert_eq!(Routes::default().find(&Method::POST, "/group_operation").unwrap_err(), NoRoute::UnknownPath);
    }

    #[test]
    fn parameters_are_decoded_once() {
        let routes = Routes::of(DIALECTS);
        for (raw, parameter) in [
            (ROOM, "mimi://b.example/r/room0"),
            ("b.example", "b.example"),
            ("im:bob@b.example", "im:bob@b.example"),
            ("-._~!$&'()*+,;=:@", "-._~!$&'()*+,;=:@"),
            ("%2541", "%41"),
            ("%252e%252E", "%2e%2E"),
            ("...", "..."),
            (".%2e.", "..."),
            ("%2E%2e%2Fx", "../x"),
            ("%C3%bc", "ü"),
            ("%20%7B%5c", " {\\"),
            ("a+b", "a+b"),
        ] {
            let found = find(&routes, &Method::POST, &format!("/update/{raw}"));
            assert_eq!(found, Ok(("update", raw.to_owned(), parameter.to_owned())));
        }
        let path = format!("/update/{ROOM}");
        let found = routes.find(&Method::POST, &path).unwrap();
        assert_eq!(found.route.upstream_path(found.raw), path);
        assert!(matches!(routes.find(&Method::POST, "/update/x").unwrap().parameter, Cow::Borrowed("x")));
        let wrong = routes.find(&Method::GET, &path).unwrap_err();
        assert!(matches!(wrong, NoRoute::WrongMethod { allow } if *allow == Method::POST));
    }

    #[test]
    fn what_servers_read_differently_is_refused() {
        let routes = Routes::of(DIALECTS);
        for (path, offset) in [
            ("/update/.", 8),
            ("/update/..", 8),
            ("/update/%2e", 8),
            ("/update/.%2E", 8),
            ("/update/%2e%2e", 8),
            ("/update/../notify", 8),
            ("/update/x/..", 10),
            ("/update/x/%2E./notify/x", 10),
            ("/update/x/y/.", 12),
            ("/update//..", 9),
            ("/update/x/y%2fz", 11),
            ("/update/x/%2F", 10),
            ("/update/x/y%5Cz", 11),
            ("/update/x/%5c", 10),
            ("/update/x/y\\z", 11),
            ("/update/x\\y", 9),
            ("/update/x%00", 9),
            ("/update/%0a", 8),
            ("/update/%1F", 8),
            ("/update/x%7f", 9),
            ("/update/%C2%85", 8),
            ("/update/x%ff", 8),
            ("/update/%C3", 8),
            ("/update/%ED%A0%80", 8),
            ("/update/%C0%AF", 8),
            ("/update/x%", 9),
            ("/update/x%2", 9),
            ("/update/x%2g", 9),
            ("/update/x%%41", 9),
            ("/update/x%u0041", 9),
            ("/update/x y", 9),
            ("/update/\"", 8),
            ("/update/{roomId}", 8),
            ("/update/x|", 9),
            ("/update/[x]", 8),
            ("/update/x^", 9),
            ("/update/ü", 8),
            ("/update/x?y", 9),
            ("/update/x#y", 9),
            ("/update/x\0", 9),
        ] {
            assert_eq!(place(&routes, path), offset, "{path}");
        }
    }

    #[test]
    fn what_is_no_path_of_an_endpoint_is_unknown() {
        let routes = Routes::of(DIALECTS);
        for path in [
            "/update",
            "/update/",
            "/update//",
            "/update//x",
            "//update/x",
            "/update/x/",
            "/update/x/y",
            "/updates/x",
            "/Update/x",
            "/%75pdate/x",
            "/update%2Fx",
            "/update\\x",
            "/v1/update/x",
            "/../update/x",
            "/x/../update/x",
            "update/x",
            "/update/a%2Fb/c",
        ] {
            assert_eq!(routes.find(&Method::POST, path).unwrap_err(), NoRoute::UnknownPath, "{path}");
        }
    }

    #[test]
    fn paths_of_the_configuration() {
        let routes = with("update", "/mimi/pl/update/{room}/now", Some("/{roomId}/internal")).unwrap();
        let path = format!("/mimi/pl/update/{ROOM}/now");
        let found = routes.find(&Method::POST, &path).unwrap();
        assert_eq!((found.route.endpoint.name, found.raw), ("update", ROOM));
        assert_eq!(found.parameter, "mimi://b.example/r/room0");
        assert_eq!(found.route.upstream_path(found.raw), format!("/{ROOM}/internal"));
        for path in ["/update/x", "/mimi/pl/update/x", "/mimi/pl/update/x/now/", "/mimi/pl/update//now"] {
            assert_eq!(routes.find(&Method::POST, path).unwrap_err(), NoRoute::UnknownPath, "{path}");
        }
        assert_eq!(place(&routes, "/mimi/pl/update/x/now/.."), 22);
        assert_eq!(place(&routes, "/mimi/pl/update/%zz/now"), 16);
        let routes = with("group_operation", "/moh/group", Some("/group_operation")).unwrap();
        let found = routes.find(&Method::POST, "/moh/group").unwrap();
        assert_eq!(found.route.upstream_path(found.raw), "/group_operation");
        assert_eq!(routes.find(&Method::POST, "/group_operation").unwrap_err(), NoRoute::UnknownPath);
    }

    #[test]
    fn one_path_for_several_methods() {
        // Exact and exact, exact and template, template and template: each finds its own, and names a method it has.
        let routes = with("group_operation", "/welcome_information", None).unwrap();
        assert_eq!(find(&routes, &Method::POST, "/welcome_information").unwrap().0, "group_operation");
        assert_eq!(find(&routes, &Method::GET, "/welcome_information").unwrap().0, "welcome_information");
        assert!(matches!(routes.find(&Method::PUT, "/welcome_information"), Err(NoRoute::WrongMethod { .. })));
        let routes = with("welcome_information", "/update/welcome", None).unwrap();
        assert_eq!(find(&routes, &Method::POST, "/update/welcome").unwrap().0, "update");
        assert_eq!(find(&routes, &Method::GET, "/update/welcome").unwrap().0, "welcome_information");
        let routes = with("proxyDownload", "/update/{downloadUrl}", None).unwrap();
        assert_eq!(find(&routes, &Method::POST, "/update/x").unwrap().0, "update");
        assert_eq!(find(&routes, &Method::GET, "/update/x").unwrap().0, "proxyDownload");
    }

    #[test]
    fn clashes() {
        for (endpoint, path, other) in [
            ("update", "/notify/{x}", "notify"),
            ("update", "/notify/all", "notify"),
            ("update", "/group_operation", "group_operation"),
            ("update", "/{x}", "group_operation"),
            ("notify", "/{x}/welcome", "keyMaterial"),
        ] {
            let Clash { first, second } = with(endpoint, path, None).unwrap_err();
            assert!((first, second) == (endpoint, other) || (first, second) == (other, endpoint), "{first} {second}");
        }
        for (endpoint, path) in
            [("update", "/notify/"), ("update", "/notify"), ("update", "/v1/notify/{x}"), ("update", "/{x}/a/b")]
        {
            with(endpoint, path, None).unwrap();
        }
    }

    #[test]
    fn templates() {
        for (path, parameter) in [
            ("/", None),
            ("/a", None),
            ("/a/", None),
            ("/.well-known/mimi-protocol-directory", None),
            ("/v1/update/{roomId}", Some("roomId")),
            ("/{a_1}", Some("a_1")),
            ("/{x}/a", Some("x")),
            ("/a/{x}/", Some("x")),
            ("/a;b=c:@/{x}", Some("x")),
        ] {
            let template = Template::parse(path).unwrap();
            assert_eq!(template.parameter(), parameter, "{path}");
            assert_eq!(template.as_str(), path);
        }
        assert_eq!(Template::parse("/a/{x}/b").unwrap().fill("%2F"), "/a/%2F/b");
        assert_eq!(Template::parse("/a").unwrap().fill("x"), "/a");
        for path in [
            "",
            "a",
            "{x}",
            "//",
            "//a",
            "/a//b",
            "/a//",
            "/.",
            "/../a",
            "/a/..",
            "/%2e/a",
            "/a%20b",
            "/a b",
            "/a?b",
            "/a#b",
            "/a\\b",
            "/ü",
            "/{}",
            "/{a b}",
            "/{a-b}",
            "/{a}{b}",
            "/{a",
            "/a}",
            "/x{a}",
            "/{a}x",
            "/{{a}}",
            "/{a}/{b}",
            "https://b.example/a",
        ] {
            let wrong = Template::parse(path).unwrap_err();
            assert!(!wrong.to_string().is_empty(), "{path}");
        }
    }
}
