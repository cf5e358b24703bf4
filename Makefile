# Two commands are the whole set-up: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
CARGO ?= cargo
NODE_MODULES := tests/interop/node_modules/.package-lock.json
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: help setup setup-test setup-tls setup-peers build release demo test test-tls lint bench bench-peers bench-growth soak flood picture fuzz clean

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: ## What the build needs beside a Rust toolchain, gcc, make and git (cmake, by apt)
	@command -v cmake >/dev/null || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -yq cmake; }
	@$(CARGO) fmt --version >/dev/null 2>&1 || rustup component add rustfmt
	@$(CARGO) clippy --version >/dev/null 2>&1 || rustup component add clippy

setup-test: setup $(NODE_MODULES) ## What the tests need beside that: redis-server, which they start themselves, and node (both by apt), with a library (by npm)
	@command -v redis-server >/dev/null || { $(SUDO) apt-get update -q && $(SUDO) env RUNLEVEL=1 apt-get install -yq redis-server; }

# A Privacy Pass client and issuer of others' making (tests/interop)
$(NODE_MODULES): tests/interop/package-lock.json
	@command -v npm >/dev/null || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -yq --no-install-recommends nodejs npm; }
	npm ci --prefix tests/interop --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

build: setup ## A debug build
	$(CARGO) build --locked

release: setup ## The program as it is deployed: target/release/moh-gateway (about 4 minutes on 2 cores)
	$(CARGO) build --locked --release

demo: setup ## A federation in small: Delivery Service, issuer, gateway, MLS clients; KEEP=1 leaves it running
	$(CARGO) build --locked --bin moh-gateway --example demo
	target/debug/examples/demo $(if $(KEEP),--keep)

lint: setup ## Formatting and clippy
	$(CARGO) fmt --check
	rustfmt --edition 2024 --check src/dialect/*.rs
	$(CARGO) clippy --locked --all-targets -- -D warnings

test: setup-test lint ## Formatting, clippy, and all tests; MOH_VECTORS=DIR has the shared vectors read, too
	$(CARGO) test --locked --bench copying --bench gateway --bench limits --bench tokens -- --test
	$(CARGO) test --locked --lib --bins --tests

setup-tls: setup ## What test-tls needs: testssl.sh, sslscan, jq and openssl (by apt)
	@command -v testssl >/dev/null && command -v sslscan >/dev/null && command -v jq >/dev/null && command -v openssl >/dev/null || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -yq --no-install-recommends testssl.sh sslscan jq openssl; }

test-tls: setup-tls build ## What scanners see of a listener: testssl.sh, sslscan and openssl against the real binary (1 min)
	scripts/test-tls.sh

picture: setup ## docs/limits.svg: what a limit admits of a burst, a flood and at a window's edge, measured (15 s)
	$(CARGO) build --locked --bin moh-gateway --example picture
	target/debug/examples/picture --out docs/limits.svg

flood: setup ## Whether a flood of bad tokens holds up requests without one, measured (2 min, and 8 for its build)
	$(CARGO) build --locked --profile bench --bin moh-gateway --example flood
	target/release/examples/flood --type 2 --rounds 9
	target/release/examples/flood --type 1 --rounds 9

bench: setup-test ## The benchmarks (criterion): target/criterion/report/index.html
	$(CARGO) bench --locked

setup-peers: setup ## What bench-peers needs: NGINX and HAProxy (by apt)
	@export PATH=$$PATH:/usr/sbin; command -v nginx >/dev/null && command -v haproxy >/dev/null || { $(SUDO) apt-get update -q && $(SUDO) env RUNLEVEL=1 apt-get install -yq --no-install-recommends nginx-light haproxy; }

bench-peers: setup-peers ## A request beside NGINX, HAProxy and a bare Pingora, into docs/performance.md (45 min, and 12 for its build); QUICK=1 takes 3, and prints
	$(CARGO) build --locked --release --bin moh-gateway --example peers
	ulimit -n 65536 2>/dev/null || ulimit -n $$(ulimit -Hn); target/release/examples/peers $(if $(QUICK),--quick)

bench-growth: setup ## A request with more limits, keys, connections, nodes and threads, into docs/performance.md (5 min, and 12 for its build); FULL=1 takes 15, for 10,000,000 keys; CORES=N on a larger machine; QUICK=1 takes 2, and prints
	$(CARGO) build --locked --release --bin moh-gateway --example peers
	ulimit -n 65536 2>/dev/null || ulimit -n $$(ulimit -Hn); target/release/examples/peers growth $(if $(FULL),--full) $(if $(CORES),--cores $(CORES)) $(if $(QUICK),--quick)

soak: setup ## MINUTES (10) at half load, with reloads and restarts of nodes: all answered, and memory as it was; into docs/performance.md (and 12 for its build)
	$(CARGO) build --locked --release --bin moh-gateway --example peers
	ulimit -n 65536 2>/dev/null || ulimit -n $$(ulimit -Hn); target/release/examples/peers soak --minutes $(or $(MINUTES),10)

fuzz: setup ## The readers and the paths, for SECONDS (60) each, with cargo-fuzz on a nightly toolchain
	@command -v cargo-fuzz >/dev/null || $(CARGO) install --locked cargo-fuzz
	$(CARGO) +nightly fuzz run reader -- -max_total_time=$(or $(SECONDS),60) -max_len=4096
	$(CARGO) +nightly fuzz run path -- -max_total_time=$(or $(SECONDS),60) -max_len=512

clean: ## Everything built
	$(CARGO) clean
