//! `check`, `explain`, `--help`: as an operator uses them.

use crate::harness::{Setup, binary, ca, config, send_message};
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

pub fn run(args: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(binary())
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join().unwrap();
    output
}

/// Whether a configuration is good, and what is said of it.
pub fn check(path: &Path) -> (bool, String) {
    let output = run(&["check", "--config", path.to_str().unwrap()], b"");
    (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

#[test]
fn help_helps() {
    for args in [&["--help"][..], &["run", "--help"], &["check", "--help"], &["explain", "--help"]] {
        let output = run(args, b"");
        assert!(output.status.success());
        assert!(String::from_utf8(output.stdout).unwrap().contains("Usage: moh-gateway"));
    }
    assert!(!run(&["frobnicate"], b"").status.success());
}

#[test]
fn the_shipped_configurations_are_good() {
    let dir = tempfile::tempdir().unwrap();
    let pki = dir.path().join("pki");
    std::fs::create_dir(&pki).unwrap();
    ca().write(&pki, "federation-ca");
    let identity = ca().issue(&["ds.b.example", "b.example"]);
    std::fs::write(pki.join("ds.b.example.pem"), &identity.chain_pem).unwrap();
    std::fs::write(pki.join("ds.b.example.key"), &identity.key_pem).unwrap();
    crate::support::tokens::Issuer::generate("issuer.example").write(&pki, "issuer.pub");
    std::fs::write(pki.join("privacy-pass.secret"), [7; 32]).unwrap();
    std::fs::write(pki.join("limits.secret"), [8; 32]).unwrap();
    std::fs::write(pki.join("redis.password"), "correct horse").unwrap();
    ca().write(&pki, "redis-ca");
    ca().write(&pki, "ds-ca");
    for name in ["gateway", "b.example"] {
        ca().issue(&[name]).write(&pki, name);
    }
    std::fs::write(pki.join("tickets.secret"), [9; 32]).unwrap();
    std::fs::write(pki.join("federation.crl"), ca().crl(&[])).unwrap();
    std::fs::write(pki.join("ds.b.example.ocsp"), ca().ocsp(&identity)).unwrap();
    for name in ["gateway.toml", "minimal.toml"] {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("conf").join(name)).unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, &text).unwrap();
        let (ok, said) = check(&path);
        assert!(ok, "{said}");
        // What is commented out as an example is good, too.
        let lines: Vec<_> = text
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(rest)
                    if rest.starts_with('[') || rest.split_once(" = ").is_some_and(|(key, _)| !key.contains(' ')) =>
                {
                    rest
                }
                _ => line,
            })
            .collect();
        std::fs::write(&path, lines.join("\n")).unwrap();
        let (ok, said) = check(&path);
        assert!(ok, "{said}");
    }
}

/// What `check` says of a configuration that is good.
fn hints(more: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("secret"), b"sixteen octets, or more").unwrap();
    let address: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let admin: SocketAddr = "127.0.0.1:2".parse().unwrap();
    let path = config(dir.path(), address, admin, &Setup::of_nodes(&[address]).with(more));
    let (ok, said) = check(&path);
    assert!(ok, "{said}");
    // The certificate of the harness does not hold all names, which is another hint.
    said.lines().filter(|line| !line.contains(": certificate: ")).collect::<Vec<_>>().join("\n")
}

#[test]
fn hints_say_what_is_always_refused_and_what_is_never_asked() {
    let limit = |more: &str| hints(&format!("[[limit]]\nname = \"l\"\nkey = [\"ip\"]\n{more}"));
    let said = limit("endpoints = [\"group_key_packages\"]\nrate = \"10/s\"\nburst = 20");
    assert!(said.contains("limit[0].burst: group_key_packages costs as much as it asks for at once; for more than this burst, 20, it is always refused (a hint)"), "{said}");
    assert!(!limit("endpoints = [\"group_key_packages\"]\nrate = \"10/s\"\nburst = 2000").contains("hint"));
    assert!(!limit("endpoints = [\"verification_key\"]\nrate = \"10/s\"\nburst = 1").contains("hint"));
    let said = limit("endpoints = [\"group_operation\"]\nrate = \"1MiB/s\"\nburst = \"4MiB\"");
    assert!(
        said.contains("a body of group_operation may have 8388608 octets; of more than this burst, 4194304"),
        "{said}"
    );
    let said = limit("endpoints = [\"verification_key\"]\nrate = \"1/s\"\nburst = 1\non_store_failure = \"closed\"");
    assert!(said.contains("limit[0].on_store_failure: there is no [limits.redis]"), "{said}");
    let said = limit(
        "endpoints = [\"verification_key\"]\nrate = \"1/s\"\nburst = 1\n[limits.redis]\nnodes = [\"[::1]:6379\"]\nsecret_file = \
         \"secret\"\npartition = \"provider\"\nlease_share = 4",
    );
    assert!(said.contains("limit[0].key: with limits.redis.partition = \"provider\" this counts each"), "{said}");
    assert!(said.contains("limits.redis.lease_share: it is for mode = \"leased\" (a hint)"), "{said}");
}

#[test]
fn limits_of_every_kind_say_what_is_wrong_with_them() {
    let limit = |more: &str| said(|text| text + "\n[[limit]]\nname = \"l\"\nkey = [\"ip\"]\n" + more);
    let redis = |more: &str| said(|text| text + "\n[limits.redis]\n" + more);
    let at_end = |said: String, key: &str| assert!(said.contains(key), "{key} in {said}");
    at_end(limit("rate = \"1/s\""), "limit[0].rate: a limit has a rate and a burst, or it has concurrent");
    at_end(limit("rate = \"1/s\"\nburst = 1\nconcurrent = 1"), "limit[0].rate: a limit has a rate and a burst");
    at_end(limit("concurrent = 0"), "limit[0].concurrent: no request could pass");
    at_end(limit("concurrent = 1\ntoken = \"required\""), "limit[0].token: a token helps with rates");
    at_end(limit("concurrent = 1\non_store_failure = \"open\""), "limit[0].on_store_failure: what is under way");
    at_end(limit("rate = \"1MiB/s\"\nburst = 5"), "limit[0].burst: rate and burst count the same");
    at_end(limit("rate = \"1/s\"\nburst = \"5MiB\""), "limit[0].burst: rate and burst count the same");
    at_end(limit("rate = \"1MiB/s\"\nburst = \"5GiB\""), "a burst is less than 4GiB");
    at_end(
        limit("rate = \"1/s\"\nburst = 1\nexempt = [\"10.0.0.0/33\"]"),
        "limit[0].exempt: \"10.0.0.0/33\" is no network",
    );
    let other = "\n[[limit.override]]\nprovider = \"a.example\"\n";
    at_end(
        limit(&format!("rate = \"1/s\"\nburst = 1{other}concurrent = 1")),
        "limit[0].override[0].rate: this limit has",
    );
    at_end(limit(&format!("concurrent = 1{other}rate = \"1/s\"\nburst = 1")), "limit[0].override[0].concurrent");
    at_end(
        limit(&format!("rate = \"1/s\"\nburst = 1{other}rate = \"1MiB/s\"\nburst = \"1MiB\"")),
        "override[0].rate: the limit counts",
    );
    at_end(redis("nodes = []\nsecret_file = \"ca.pem\""), "limits.redis.nodes: at least one is needed");
    at_end(
        redis("nodes = [\"localhost\"]\nsecret_file = \"ca.pem\""),
        "limits.redis.nodes: \"localhost\" is no host:port",
    );
    at_end(redis("nodes = [\"localhost:1\"]"), "missing field `secret_file`");
    at_end(redis("nodes = [\"localhost:1\"]\nsecret_file = \"nowhere\""), "limits.redis.secret_file: ");
    at_end(
        redis("nodes = [\"localhost:1\"]\nsecret_file = \"ca.pem\"\ntls_ca = \"server.key\""),
        "limits.redis.tls_ca: ",
    );
    at_end(redis("nodes = [\"localhost:1\"]\nsecret_file = \"ca.pem\"\nprefix = \"{x}\""), "limits.redis.prefix: ");
    at_end(
        redis("nodes = [\"localhost:1\"]\nsecret_file = \"ca.pem\"\nconnections = 0"),
        "limits.redis.connections: 1 to 16",
    );
}

/// The line of the first error, and what is said.
fn said(change: impl Fn(String) -> String) -> String {
    let dir = tempfile::tempdir().unwrap();
    let address: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let admin: SocketAddr = "127.0.0.1:2".parse().unwrap();
    let path = config(dir.path(), address, admin, &Setup::of_nodes(&[address]));
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, change(text)).unwrap();
    let (ok, said) = check(&path);
    assert!(!ok, "{said}");
    said.replace(path.to_str().unwrap(), "FILE")
}

#[test]
fn errors_say_file_line_and_key() {
    let replace = |from: &'static str, to: &'static str| {
        said(|text| {
            assert!(text.contains(from));
            text.replace(from, to)
        })
    };
    let append = |more: &'static str| said(|text| text + more);
    let at_end = |key: &str, said: &str| assert!(said.contains(key), "{key} in {said}");

    let unknown = replace("names = [\"b.example\", \"also-b.example\"]", "names = [\"b.example\"]\nnmae = 1");
    assert!(unknown.starts_with("FILE:4: ") && unknown.contains("unknown field `nmae`"), "{unknown}");
    let typed = replace("client_certificates = \"optional\"", "client_certificates = \"maybe\"");
    assert!(typed.starts_with("FILE:7: listener[0].client_certificates: "), "{typed}");
    let name = replace("ds_domain = \"ds.b.example\"", "ds_domain = \"ds_b.example\"");
    assert!(name.starts_with("FILE:4: provider.ds_domain: "), "{name}");
    let missing = replace("client_ca = \"ca.pem\"", "client_ca = \"nowhere.pem\"");
    assert!(missing.starts_with("FILE:8: listener[0].client_ca: ") && missing.contains("nowhere.pem"), "{missing}");
    let syntax = append("\n[oh no");
    assert!(syntax.starts_with("FILE:") && !syntax.starts_with("FILE:1:"), "{syntax}");

    let limit = "\n[[limit]]\nname = \"l\"\nkey = [\"group\"]\nrate = \"1/s\"\nburst = 1\n";
    at_end("limit[0].key: verification_key never says a group", &append(limit));
    at_end(
        "limit[0].rate: \"fast\" is no rate",
        &append("\n[[limit]]\nname = \"l\"\nkey = []\nrate = \"fast\"\nburst = 1\n"),
    );
    at_end(
        "limit[0].burst: a burst is at least 1",
        &append("\n[[limit]]\nname = \"l\"\nkey = []\nrate = \"1/s\"\nburst = 0\n"),
    );
    at_end(
        "limit[0].endpoints: no endpoint \"group_opration\"",
        &append("\n[[limit]]\nname = \"l\"\nendpoints = [\"group_opration\"]\nkey = []\nrate = \"1/s\"\nburst = 1\n"),
    );
    at_end(
        "limit[0].token: top-up needs",
        &append("\n[[limit]]\nname = \"l\"\nkey = []\nrate = \"1/s\"\nburst = 1\ntoken = \"top-up\"\n"),
    );
    at_end("endpoints.nowhere: no such endpoint", &append("\n[endpoints.nowhere]\n"));
    at_end("privacy_pass: missing", &append("\n[endpoints.connection_request]\ntoken = \"required\"\n"));
    let off = said(|text| {
        let text = text.replace("client_certificates = \"optional\"\nclient_ca = \"ca.pem\"", "");
        text + "\n[[limit]]\nname = \"l\"\nkey = [\"provider\"]\nrate = \"1/s\"\nburst = 1\n"
    });
    at_end("limit[0].key: no listener asks for client certificates", &off);
    for (more, expected) in [
        (
            "[[limit]]\nname = \"l\"\nendpoints = []\nkey = []\nrate = \"1/s\"\nburst = 1",
            "limit[0].endpoints: this limit covers nothing",
        ),
        (
            "[[limit]]\nname = \"l\"\nkey = []\nrate = \"1/d\"\nburst = 4000000000",
            "limit[0].burst: a burst is at least 1",
        ),
        (
            "[[limit]]\nname = \"l\"\nkey = []\nrate = \"1/s\"\nburst = 1\nmode = \"shadow\"\ntoken = \"required\"",
            "limit[0].token: a shadow",
        ),
        ("[endpoints.ds_domain]\nmax_body = 5", "endpoints.ds_domain.max_body"),
    ] {
        let text = said(|text| text + "\n" + more);
        assert!(text.contains(expected), "{expected} in {text}");
    }
    for (from, to, expected) in [
        ("memory = \"1MiB\"", "memory = \"1MiB\"\nipv6_prefix = 0", "limits.ipv6_prefix"),
        ("memory = \"1MiB\"", "memory = 0", "limits.memory"),
        ("threads = 2", "threads = 100000", "runtime.threads"),
        ("shutdown = \"5s\"", "shutdown = \"0s\"", "timeouts.shutdown"),
        ("headers = \"1s\"", "headers = \"18446744073709551615s\"", "timeouts.headers"),
        (
            "[admin]\naddress = \"127.0.0.1:2\"",
            "[admin]\naddress = \"127.0.0.1:1\"",
            "admin.address: a listener is at this address",
        ),
        (
            "protocol = \"http1\"",
            "protocol = \"http1\"\n[[delivery_service.node]]\naddress = \"127.0.0.1:1\"",
            "node[1].address: another node",
        ),
        (
            "client_certificates = \"optional\"",
            "client_certificates = \"off\"",
            "listener[0].client_ca: client_certificates is off",
        ),
    ] {
        let text = said(|text| text.replace(from, to));
        assert!(text.contains(expected), "{expected} in {text}");
    }
    let two = said(|text| {
        text.replace("chain = ", "chain = \"nowhere.pem\" #")
            .replace("address = \"127.0.0.1:1\"\nclient", "address = \"here\"\nclient")
    });
    assert_eq!(two.lines().count(), 2, "all that is wrong, not only the first: {two}");
}

#[test]
fn privacy_pass_says_what_is_wrong_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, octets: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, octets).unwrap();
        path.display().to_string()
    };
    let public = crate::support::tokens::Issuer::generate("issuer.example");
    let public = public.write(dir.path(), "public").display().to_string();
    let (secret, short) = (write("secret", &[7; 32]), write("short", &[7; 31]));
    let issuer =
        format!("[[privacy_pass.issuer]]\nname = \"issuer.example\"\ntoken_type = 2\nkey_file = \"{public}\"\n");
    let directory = |url: &str| issuer.replace("key_file = ", &format!("directory = \"{url}\" #"));
    for (settings, issuers, expected) in [
        (
            format!("secret_file = \"{short}\""),
            issuer.clone(),
            "privacy_pass.secret_file: a secret has 32 octets or more",
        ),
        (
            format!("secret_file = \"{secret}\""),
            issuer.clone(),
            "privacy_pass.secret_file: with spent = \"memory\" its",
        ),
        ("spent = \"files\"".into(), issuer.clone(), "privacy_pass.spent: \"files\" needs secret_file"),
        (format!("spent = \"files\"\nsecret_file = \"{secret}\""), issuer.clone(), "\"files\" needs state"),
        (format!("spent = \"redis\"\nsecret_file = \"{secret}\""), issuer.clone(), "\"redis\" needs [limits.redis]"),
        ("spent = \"disk\"".into(), issuer.clone(), "privacy_pass.spent: unknown variant `disk`"),
        ("on_store_failure = \"local\"".into(), issuer.clone(), "on_store_failure: it is for spent = \"redis\""),
        ("on_store_failure = \"open\"".into(), issuer.clone(), "to take a token that may be spent"),
        ("spent_tokens = 0".into(), issuer.clone(), "privacy_pass.spent_tokens: 1 to 100000000"),
        ("spent_tokens = 100000001".into(), issuer.clone(), "privacy_pass.spent_tokens: 1 to 100000000"),
        ("epoch = \"10ms\"".into(), issuer.clone(), "privacy_pass.epoch: an epoch is a second or more"),
        ("threads = 0".into(), issuer.clone(), "privacy_pass.threads: 1 to 256"),
        ("max_wait = \"1m\"".into(), issuer.clone(), "privacy_pass.max_wait: 1ms to 5s"),
        ("context = \"member\"".into(), issuer.clone(), "privacy_pass.context: unknown variant"),
        ("origin = \"*\"".into(), issuer.clone(), "privacy_pass.origin: "),
        (String::new(), "issuer = []".into(), "privacy_pass.issuer: at least one is needed"),
        (String::new(), issuer.repeat(9), "privacy_pass.issuer: 8 are the most"),
        (String::new(), issuer.repeat(2), "privacy_pass.issuer[1].name: another issuer has this name"),
        (
            String::new(),
            issuer.clone() + &issuer.replace("issuer.example", "other.example"),
            "privacy_pass.issuer[1].key_file: another issuer has a key of these",
        ),
        (String::new(), issuer.replace("= 2", "= 3"), "token_type: 1 (VOPRF P-384), 2 (Blind RSA) or 5"),
        (
            String::new(),
            issuer.replace("= 2", "= 1"),
            "key_file: FILES/public: it is not the private key of a VOPRF: 48 octets",
        ),
        (
            String::new(),
            issuer.replace("public\"", "secret\""),
            "key_file: FILES/secret: it is not a SubjectPublicKeyInfo",
        ),
        (String::new(), issuer.replace("key_file", "# key_file"), "key_file: an issuer has a key_file or a directory"),
        (String::new(), directory("http://i.example/"), "directory: \"http://i.example/\" is no https URL"),
        (
            String::new(),
            directory("https://i.example/").replace("= 2", "= 5"),
            "directory: a directory has public keys",
        ),
        (
            String::new(),
            directory("https://i.example/") + "directory_ca = \"nowhere.pem\"\n",
            "privacy_pass.issuer[0].directory_ca: ",
        ),
        (String::new(), issuer.clone() + "directory_ca = \"ca.pem\"\n", "directory_ca: it is for directory"),
    ] {
        let text = said(|text| format!("{text}\n[privacy_pass]\n{settings}\n{issuers}"));
        let text = text.replace(dir.path().to_str().unwrap(), "FILES");
        assert!(text.contains(expected), "{expected} in {text}");
    }
}

#[test]
fn run_says_why_it_cannot() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let free = "127.0.0.1:0".parse().unwrap();
    let path = config(dir.path(), address, free, &Setup::of_nodes(&[address]));
    let output = run(&["run", "--config", path.to_str().unwrap()], b"");
    assert!(!output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains(&address.to_string()) && said.contains("in use"), "{said}");
}

#[test]
fn explain_for_a_person() {
    let output = run(&["explain", "--path", "/group_operation"], &send_message());
    let said = String::from_utf8(output.stdout).unwrap();
    for line in ["outcome  accept", "operation  send_message", "sender  a.example", "member  leaf_index 1"] {
        assert!(said.contains(line), "{line} in {said}");
    }
    let hex = hex::encode(&send_message()[..30]);
    let output = run(&["explain", "--hex", "--path", "/group_operation"], hex.as_bytes());
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("400 malformed") && said.contains("MLSMessage.wire_format"), "{said}");
    let output = run(&["explain", "--peer", "c.example", "--path", "/group_operation"], &send_message());
    assert!(String::from_utf8(output.stdout).unwrap().contains("403 sender-mismatch"));
}

/// The vectors hold others' data and are not in this project: `$MOH_VECTORS` says where they are.
#[test]
fn explain_agrees_with_the_vectors() {
    let Some(folder) = std::env::var_os("MOH_VECTORS") else {
        eprintln!("MOH_VECTORS is not set: the vectors are not read (tests/corpus.rs is the project's own)");
        return;
    };
    let text = std::fs::read(Path::new(&folder).join("moh.json")).unwrap();
    let vectors: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let cases = vectors["cases"].as_array().unwrap();
    assert!(cases.len() > 300);
    let lines: Vec<String> = cases.iter().map(serde_json::Value::to_string).collect();
    let output = run(&["explain", "--jsonl"], lines.join("\n").as_bytes());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said: Vec<serde_json::Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(said.len(), cases.len());
    for (case, said) in cases.iter().zip(said) {
        assert_eq!(said, case["expect"], "{}", case["name"]);
    }
}
