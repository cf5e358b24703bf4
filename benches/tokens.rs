//! What Privacy Pass costs: verification beside that of the libraries under it and of the `privacypass` crate, in one run; a
//! redemption with all that belongs to it; a challenge; and what spent tokens take of memory and disk.
//! Bar (issue 4): a redemption of type 2 at most 1.3 times a verification by aws-lc-rs alone.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

#[path = "../tests/support/tokens.rs"]
mod tokens;

use async_trait::async_trait;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, measurement::WallTime};
use http::{HeaderMap, HeaderValue, header};
use moh_gateway::privacypass::{
    BoundTo, Challenges, Issuer, Key, Origin, Purpose, Settings, Spent, SpentIn, Token, credential, unix_now,
};
use moh_gateway::telemetry::Metrics;
use p384::NistP384;
use privacypass::auth::authorize;
use privacypass::private_tokens::{Ristretto255, server::Server};
use privacypass::public_tokens::server::{OriginKeyStore as _, OriginServer};
use privacypass::public_tokens::{PublicKey, PublicToken, public_key_to_truncated_token_key_id};
use privacypass::test_utils::private_memory_store::MemoryKeyStoreVoprf;
use privacypass::test_utils::public_memory_store::OriginMemoryKeyStore;
use privacypass::{Deserialize as _, Nonce, NonceStore, TokenType};
use prometheus::IntGauge;
use std::hint::black_box;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

const KINDS: [TokenType; 3] = [TokenType::Public, TokenType::PrivateP384, TokenType::PrivateRistretto255];

/// Tokens under way at once.
const AT_ONCE: usize = 64;

/// No token was ever spent: what is measured of the crate is its verification.
struct Nothing;

#[async_trait]
impl NonceStore for Nothing {
    async fn reserve(&self, _: &Nonce) -> bool {
        true
    }
    async fn commit(&self, _: &Nonce) {}
    async fn release(&self, _: &Nonce) {}
}

/// Not of this bench's, so that one pass of `cargo test` is quick.
fn is_test() -> bool {
    std::env::args().any(|arg| arg == "--test")
}

fn now<F: Future>(future: F) -> F::Output {
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("it waits"),
    }
}

/// An issuer, the same as an Origin knows it, and a key file's content.
fn issuer(kind: TokenType) -> (tokens::Issuer, Issuer, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let issuer = tokens::Issuer::of("issuer.example", kind);
    let file = std::fs::read(issuer.write(dir.path(), "key")).unwrap();
    let ours = Issuer::of_keys("issuer.example".into(), kind, Key::read_all(kind, &file).unwrap());
    (issuer, ours, file)
}

fn purpose() -> Purpose<'static> {
    Purpose { endpoint: "connection_request", of_endpoint: true, ..Purpose::default() }
}

fn challenges(issuers: Vec<Arc<Issuer>>) -> Challenges {
    Challenges::new("ds.b.example".into(), Duration::from_secs(24 * 3600), BoundTo::Origin, &[7; 32], issuers)
}

fn challenge(value: HeaderValue) -> tokens::Challenge {
    tokens::challenges(&[(header::WWW_AUTHENTICATE, value)].into_iter().collect()).remove(0)
}

fn fields(token: &[u8]) -> HeaderMap {
    let value = HeaderValue::from_str(&tokens::authorization(token)).unwrap();
    [(header::AUTHORIZATION, value)].into_iter().collect()
}

/// The same token, verified by the library alone, by us, and by the crate.
fn verify(c: &mut Criterion) {
    for kind in KINDS {
        let (issuer, ours, file) = issuer(kind);
        let key = ours.advertised(Duration::from_secs(1)).unwrap();
        let of = challenges(vec![Arc::new(ours)]);
        let token = issuer.token(&challenge(of.www_authenticate(&purpose(), unix_now()).unwrap())).unwrap();
        let read = Token::read(token.clone()).unwrap();
        let mut group = c.benchmark_group(format!("verify, type {}", kind as u16));
        if kind == TokenType::Public {
            let (_, spki) = x509_parser::prelude::FromDer::from_der(key.token_key()).unwrap();
            let spki: x509_parser::x509::SubjectPublicKeyInfo<'_> = spki;
            let algorithm = &aws_lc_rs::signature::RSA_PSS_2048_8192_SHA384;
            let raw =
                aws_lc_rs::signature::ParsedPublicKey::new(algorithm, spki.subject_public_key.data.as_ref()).unwrap();
            let (input, authenticator) = read.parts();
            group.bench_function("aws-lc-rs alone", |b| {
                b.iter(|| raw.verify_sig(black_box(input), black_box(authenticator)).unwrap());
            });
        }
        group.bench_function("ours", |b| b.iter(|| assert!(key.verifies(black_box(&read)))));
        match kind {
            TokenType::Public => {
                let public = PublicKey::from_spki(key.token_key()).unwrap();
                let keys = OriginMemoryKeyStore::default();
                now(keys.insert(public_key_to_truncated_token_key_id(&public).unwrap(), public));
                let parsed = PublicToken::tls_deserialize(&mut token.as_slice()).unwrap();
                let server = OriginServer::new();
                group.bench_function("the crate", |b| {
                    b.iter_batched(
                        || parsed.clone(),
                        |token| now(server.redeem_token(&keys, &Nothing, token)).unwrap(),
                        BatchSize::SmallInput,
                    );
                });
            }
            TokenType::PrivateP384 => of_crate::<NistP384, hybrid_array::typenum::U48>(&mut group, &token, &file),
            TokenType::PrivateRistretto255 => {
                of_crate::<Ristretto255, hybrid_array::typenum::U64>(&mut group, &token, &file);
            }
        }
        group.finish();
    }
}

fn of_crate<CS: privacypass::common::private::PrivateCipherSuite, Nk: hybrid_array::ArraySize>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    token: &[u8],
    file: &[u8],
) {
    let keys: MemoryKeyStoreVoprf<CS> = tokens::voprf_store(&hex::decode(file).unwrap());
    let server = Server::<CS>::new();
    group.bench_function("the crate", |b| {
        b.iter_batched(
            || authorize::Token::<Nk>::tls_deserialize(&mut &*token).unwrap(),
            |token| now(server.redeem_token(&keys, &Nothing, token)).unwrap(),
            BatchSize::SmallInput,
        );
    });
}

/// All that a redemption is: first without the threads, on one; then as requests meet it, many at once.
fn redeem(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for kind in KINDS {
        let (issuer, ours, _) = issuer(kind);
        let of = challenges(vec![Arc::new(ours)]);
        let token = issuer.token(&challenge(of.www_authenticate(&purpose(), unix_now()).unwrap())).unwrap();
        let one = fields(&token);
        let spent = Arc::new(Spent::new(1_000_000, (1, 2), IntGauge::new("s", "s").unwrap()));
        let mut group = c.benchmark_group(format!("redeem, type {}", kind as u16));
        group.bench_function("one, without threads", |b| {
            b.iter(|| {
                let token = Token::read(credential(black_box(&one)).unwrap().unwrap()).unwrap();
                let known = of.recognise(&token, &purpose(), unix_now()).unwrap();
                assert!(spent.problem(token.nonce()).is_none() && known.key.verifies(&token));
                // The reservation is dropped, so that the same token can be taken again.
                Spent::reserve(&spent, *token.nonce(), known.epoch, known.current).unwrap()
            });
        });
        let origin = origin(kind, &issuer);
        let challenge = challenge(origin.challenge(&purpose()).unwrap());
        let all = (0..AT_ONCE).map(|_| fields(&issuer.token(&challenge).unwrap()));
        let (origin, all) = (Arc::new(origin), all.collect::<Arc<[_]>>());
        group.throughput(Throughput::Elements(AT_ONCE as u64));
        group.bench_function(format!("{AT_ONCE} at once, one thread"), |b| {
            b.iter(|| {
                runtime.block_on(async {
                    let mut tasks = JoinSet::new();
                    for n in 0..AT_ONCE {
                        let (origin, all) = (origin.clone(), all.clone());
                        tasks.spawn(async move { drop(origin.redeem(&all[n], &purpose()).await.unwrap()) });
                    }
                    assert_eq!(tasks.join_all().await.len(), AT_ONCE);
                });
            });
        });
        group.throughput(Throughput::Elements(1));
        let mut bad = issuer.token(&challenge).unwrap();
        *bad.last_mut().unwrap() ^= 1;
        let bad = fields(&bad);
        group.bench_function("a bad one again", |b| {
            b.iter(|| runtime.block_on(origin.redeem(black_box(&bad), &purpose())).unwrap_err());
        });
        group.finish();
    }
}

/// An Origin at work.
fn origin(kind: TokenType, issuer: &tokens::Issuer) -> Origin {
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::read(issuer.write(dir.path(), "key")).unwrap();
    let settings = Settings {
        origin: "ds.b.example".into(),
        epoch: Duration::from_secs(24 * 3600),
        bound_to: BoundTo::Origin,
        secret: None,
        issuers: vec![Issuer::of_keys("issuer.example".into(), kind, Key::read_all(kind, &file).unwrap())],
        spent: SpentIn::Memory,
        spent_tokens: 1_000_000,
        threads: 1,
        max_wait: Duration::from_secs(5),
    };
    Origin::start(settings, None, Metrics::new(&[]).unwrap().privacy_pass().unwrap()).unwrap()
}

fn challenge_costs(c: &mut Criterion) {
    let mut group = c.benchmark_group("challenge");
    for kinds in [&KINDS[..1], &KINDS[..]] {
        let of = challenges(kinds.iter().map(|kind| Arc::new(issuer(*kind).1)).collect());
        let n = kinds.len();
        group.bench_function(format!("of {n} issuers"), |b| {
            b.iter(|| of.www_authenticate(black_box(&purpose()), unix_now()).unwrap());
        });
    }
    // One of ours by its key, and of no challenge that we ever sent.
    let (issuer, ours, _) = issuer(TokenType::Public);
    let of = challenges(vec![Arc::new(ours)]);
    let mut token = issuer.token(&challenge(of.www_authenticate(&purpose(), unix_now()).unwrap())).unwrap();
    token[40] ^= 1;
    let token = Token::read(token).unwrap();
    group.bench_function("a token of none", |b| {
        b.iter(|| of.recognise(black_box(&token), &purpose(), unix_now()).unwrap_err());
    });
    group.finish();
}

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// What a million spent tokens take: printed.
fn per_million() {
    let tokens: u64 = if is_test() { 20_000 } else { 1_000_000 };
    let nonce = |n: u64| {
        let mut nonce = [0; 32];
        nonce[..8].copy_from_slice(&n.to_be_bytes());
        nonce
    };
    let million = |octets: u64| octets as f64 / tokens as f64 * 1e6 / f64::from(1 << 20);
    let before = resident();
    let gauge = || IntGauge::new("s", "s").unwrap();
    let spent = Arc::new(Spent::new(tokens as usize, (1, 2), gauge()));
    // The epochs that are accepted, and the next.
    let (epoch, then) = (Duration::from_secs(60), Duration::from_secs(61));
    spent.make_room(epoch, then);
    let empty = resident() - before;
    let began = Instant::now();
    for n in 0..tokens {
        Spent::reserve(&spent, nonce(n), 1, 1).unwrap().keep();
    }
    let each = began.elapsed().as_nanos() as f64 / tokens as f64;
    println!("{tokens} spent tokens, as MiB a million:");
    println!(
        "  memory: {:.1} ({:.1} before the first), {each:.0} ns each",
        million(resident() - before),
        million(empty)
    );

    let dir = tempfile::tempdir().unwrap();
    let files = Arc::new(
        Spent::new(tokens as usize, (1, 2), gauge()).with_files(dir.path(), [0; 16], 1, Duration::ZERO).unwrap(),
    );
    files.make_room(epoch, then);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let began = Instant::now();
    runtime.block_on(async {
        for n in 0..tokens {
            let token = Spent::reserve(&files, nonce(n), 1, 1).unwrap();
            token.claim(Duration::from_secs(60)).await.unwrap().keep();
        }
    });
    let each = began.elapsed().as_nanos() as f64 / tokens as f64;
    let octets: u64 = std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
    drop(files);
    let began = Instant::now();
    let again =
        Spent::new(tokens as usize, (1, 2), gauge()).with_files(dir.path(), [0; 16], 1, Duration::ZERO).unwrap();
    let took = began.elapsed();
    assert!(again.problem(&nonce(0)).is_some() && again.problem(&nonce(tokens)).is_none());
    println!("  files: {:.1}, {each:.0} ns each, one after another; read again in {took:.0?}", million(octets));
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(50)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3));
    targets = verify, redeem, challenge_costs
}

fn main() {
    let listed = std::env::args().any(|arg| arg == "--list");
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    if !listed && filter.as_ref().is_none_or(|filter| filter.contains("memory")) {
        per_million();
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
