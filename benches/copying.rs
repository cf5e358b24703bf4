//! What it costs to copy a record's octets to a little above where they come from, within a page: at once, as glibc does it, and by
//! pieces. On AMD's Zen 3 and 4, the first takes sixteen times as long from 1 to 15 octets above; elsewhere they are to be equal.
#![allow(clippy::indexing_slicing, missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moh_gateway::copying::copy;
use moh_gateway::tls::RECORD;
use std::hint::black_box;

const PAGE: usize = 4096;

fn copying(c: &mut Criterion) {
    let mut group = c.benchmark_group("copying");
    group.throughput(Throughput::Bytes(RECORD as u64));
    let (from, mut to) = (vec![7; RECORD + PAGE], vec![0; RECORD + 2 * PAGE]);
    let from = &from[from.as_ptr().align_offset(PAGE)..][..RECORD];
    let page = to.as_ptr().align_offset(PAGE);
    for behind in [0, 5, 9, 16, 64] {
        let to = &mut to[page + behind..][..RECORD];
        group.bench_function(BenchmarkId::new("at once", behind), |b| {
            b.iter(|| black_box(&mut *to).copy_from_slice(black_box(from)));
        });
        group.bench_function(BenchmarkId::new("by pieces", behind), |b| {
            b.iter(|| copy(black_box(from), &mut black_box(&mut *to)));
        });
    }
    group.finish();
}

criterion_group!(benches, copying);
criterion_main!(benches);
