#!/usr/bin/env bash
# What scanners see of a listener: testssl.sh, sslscan and openssl against the real binary. `make test-tls` runs it; it
# takes about a minute and no network. It fails on every finding of testssl.sh above LOW, and on every check that could
# not be made, unless it is explained below; and on anything but what docs/tls.md says is spoken.
#
#   MOH_GATEWAY=target/release/moh-gateway   another binary (default: target/debug/moh-gateway)
#   KEEP=1                                   leaves configuration, logs and reports behind, and says where
set -euo pipefail

readonly NAME=ds.b.example

# Findings that are as they should be, by testssl.sh's ids: docs/tls.md ("What scanners find") says why of each.
readonly EXPLAINED=(
  engine_problem           # of the openssl that testssl.sh runs, which has no GOST engine; not of the gateway
  sessionresumption_ticket # its client goes before the ticket comes, now and then; tickets are tried here by openssl
)

# What docs/tls.md says is spoken. Neither scanner knows X25519MLKEM768: tests/e2e/tls.rs holds that it is first.
readonly SUITES='TLS_AES_128_GCM_SHA256 TLS_AES_256_GCM_SHA384 TLS_CHACHA20_POLY1305_SHA256'
readonly GROUPS_SPOKEN='secp256r1 secp384r1 x25519'

cd "$(dirname "${BASH_SOURCE[0]}")/.."
gateway=${MOH_GATEWAY:-target/debug/moh-gateway}
begun=$SECONDS
failures=0
gateway_pid=
scanner_pid=

say() { printf '%3ds  %s\n' "$((SECONDS - begun))" "$*"; }
fail() {
  say "FAILED: $*" >&2
  failures=$((failures + 1))
}
die() {
  say "FAILED: $*" >&2
  exit 1
}

# === What is needed ===================================================================================================

for tool in openssl jq timeout sslscan; do
  command -v "$tool" >/dev/null || die "$tool is missing: make setup-test"
done
# Debian's package calls it testssl, others testssl.sh.
testssl=$(command -v testssl || command -v testssl.sh) || die "testssl.sh is missing: make setup-test"
[ -x "$gateway" ] || die "$gateway is missing: make build"
gateway=$(realpath "$gateway")

dir=$(mktemp -d "${TMPDIR:-/tmp}/moh-gateway-tls.XXXXXX")

# Ends the gateway: by SIGTERM, or after two seconds without asking.
stop() {
  [ -n "$gateway_pid" ] || return 0
  kill "$gateway_pid" 2>/dev/null || true
  for _ in {1..20}; do
    kill -0 "$gateway_pid" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "$gateway_pid" 2>/dev/null || true
  wait "$gateway_pid" 2>/dev/null || true
  gateway_pid=
}

# shellcheck disable=SC2317 # the trap calls it
clean_up() {
  local status=$?
  trap - EXIT
  [ -z "$scanner_pid" ] || kill "$scanner_pid" 2>/dev/null || true
  stop
  if [ -n "${KEEP:-}" ]; then say "left behind: $dir"; else rm -rf "$dir"; fi
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# === A gateway with a certificate of each kind ========================================================================

# Authorities as a federation has them, and certificates as they would issue them: short-lived, with a place for their
# CRL (which nothing here asks for).
certificates() {
  cd "$dir"
  cat >extensions <<END
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:$NAME,DNS:b.example
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
crlDistributionPoints = URI:http://crl.example/ca.crl
END
  for kind in ecdsa rsa; do
    case $kind in
      ecdsa) key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256) ;;
      rsa) key=(-newkey rsa:2048) ;;
    esac
    openssl req -x509 "${key[@]}" -nodes -sha256 -days 365 -keyout $kind-ca.key -out $kind-ca.pem \
      -subj "/CN=Throw-away $kind CA of test-tls" \
      -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign
    openssl req -new "${key[@]}" -nodes -sha256 -keyout $kind.key -out $kind.csr -subj "/CN=$NAME"
    openssl x509 -req -in $kind.csr -CA $kind-ca.pem -CAkey $kind-ca.key -CAcreateserial -sha256 -days 90 \
      -extfile extensions -out $kind.pem
  done
  cat ecdsa-ca.pem rsa-ca.pem >ca.pem
}
(certificates) >"$dir/certificates.log" 2>&1 || { cat "$dir/certificates.log" >&2; die "no certificates"; }
say "an ECDSA P-256 and an RSA-2048 certificate for $NAME"

# Nothing is asked of the Delivery Service: there is none at this address.
configure() { # PORT ADMIN_PORT
  cat >"$dir/gateway.toml" <<END
[provider]
names = ["b.example"]
ds_domain = "$NAME"

[[listener]]
address = "127.0.0.1:$1"
client_certificates = "optional"
client_ca = "ca.pem"

[[certificate]]
chain = "ecdsa.pem"
key = "ecdsa.key"

[[certificate]]
chain = "rsa.pem"
key = "rsa.key"

[[delivery_service.node]]
address = "127.0.0.1:9"

[[limit]]
name = "ip"
key = ["ip"]
rate = "1000/s"
burst = 10000

[admin]
address = "127.0.0.1:$2"

[access_log]
path = "access.log"

[runtime]
threads = 2
END
}

accepts() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
lives() { [ -n "$gateway_pid" ] && kill -0 "$gateway_pid" 2>/dev/null; }

# Ports below those that the system gives to clients. One that is taken ends the gateway with an error, and others are
# tried.
start() {
  local attempt
  for attempt in 1 2 3 4 5; do
    port=$((20000 + RANDOM % 6000 * 2))
    configure "$port" $((port + 1))
    "$gateway" run --config "$dir/gateway.toml" >"$dir/gateway.log" 2>&1 &
    gateway_pid=$!
    for _ in {1..100}; do
      lives || break
      if accepts "$port"; then
        # It may be another's that was there before: then ours has ended by now, or will.
        sleep 0.2
        lives && return
        break
      fi
      sleep 0.1
    done
    stop
    say "it does not start at port $port (attempt $attempt)"
  done
  cat "$dir/gateway.log" >&2
  die "the gateway does not start"
}
start
say "$gateway at 127.0.0.1:$port"

# A scanner, whose output is kept. In the background, so that a signal ends it and us at once.
scan() { # LOG COMMAND...
  local log=$1 status=0
  shift
  timeout --kill-after=5 600 "$@" </dev/null >"$dir/$log" 2>&1 &
  scanner_pid=$!
  wait "$scanner_pid" || status=$?
  scanner_pid=
  return "$status"
}

# === openssl: versions and certificates ===============================================================================

# The lowest security level, or openssl would not even offer what is old.
connect() { # ARGUMENTS...
  timeout 20 openssl s_client -connect "127.0.0.1:$port" -servername "$NAME" -CAfile "$dir/ca.pem" \
    -verify_return_error -verify_hostname "$NAME" -alpn h2,http/1.1 "$@" </dev/null 2>&1 | tr -d '\0'
}

# TLS 1.2 is told that it is too old; what is older does not say which signatures it knows, and is refused for that.
for version in 'tls1 (handshake failure|protocol version)' 'tls1_1 (handshake failure|protocol version)' \
  'tls1_2 protocol version'; do
  alert=${version#* } version=${version%% *}
  if answer=$(connect "-$version" -cipher 'ALL:@SECLEVEL=0'); then
    fail "openssl: $version is spoken"
  elif ! said=$(grep -oEm1 "alert $alert" <<<"$answer"); then
    fail "openssl: $version is not refused with an alert '$alert': $(head -n 2 <<<"$answer" | tr '\n' ' ')"
  else
    say "openssl: $version refused ($said)"
  fi
done

# A client that verifies one kind of signature only is shown a certificate of this kind, and verifies it.
for kind in ECDSA+SHA256 RSA-PSS+SHA256:RSA+SHA256; do
  if ! answer=$(connect -tls1_3 -sigalgs "$kind"); then
    fail "openssl: no certificate for clients that know $kind only: $(head -n 1 <<<"$answer")"
  elif ! grep -q '^Verification: OK' <<<"$answer" || ! grep -q '^ALPN protocol: h2' <<<"$answer"; then
    fail "openssl: $kind: not verified, or no h2"
  else
    say "openssl: TLS 1.3, $kind, h2, verified"
  fi
done

# A ticket comes after the handshake, so the first connection waits for it.
if ! { sleep 1; } | timeout 20 openssl s_client -connect "127.0.0.1:$port" -servername "$NAME" -CAfile "$dir/ca.pem" \
  -verify_return_error -tls1_3 -sess_out "$dir/session" >"$dir/session.log" 2>&1; then
  fail "openssl: no session: $(head -n 1 "$dir/session.log")"
elif ! [ -s "$dir/session" ]; then
  fail "openssl: no ticket"
elif ! answer=$(connect -tls1_3 -sess_in "$dir/session") || ! grep -q '^Reused, TLSv1.3' <<<"$answer"; then
  fail "openssl: the ticket is not taken"
elif ! grep -q 'Max Early Data: 0' "$dir/session.log" || grep -q 'Max Early Data: [1-9]' "$dir/session.log"; then
  fail "openssl: the ticket offers early data"
else
  say "openssl: resumed by a ticket, which offers no early data"
fi

# === sslscan ==========================================================================================================

if ! scan sslscan.log sslscan --no-colour --xml="$dir/sslscan.xml" --sni-name="$NAME" "127.0.0.1:$port"; then
  fail "sslscan: $(tail -n 1 "$dir/sslscan.log")"
fi
touch "$dir/sslscan.xml"
xml() { grep -E "$1" "$dir/sslscan.xml" || true; }
none() { # WHAT LINES
  [ -z "$2" ] || fail "sslscan: $1: $(tr -s ' \n' ' ' <<<"$2" | cut -c 1-300)"
}
# The values of an attribute, sorted, on a line.
values() { # ATTRIBUTE, lines on standard input
  sed -nE "s/.* $1=\"([^\" ]+)[^\"]*\".*/\1/p" | sort -u | tr '\n' ' ' | sed 's/ $//'
}

[ "$(xml '<protocol type="tls" version="1.3" enabled="1"' | wc -l)" = 1 ] || fail "sslscan: it does not see TLS 1.3"
none "older than TLS 1.3" "$(xml '<protocol .*enabled="1"' | grep -v 'type="tls" version="1.3"' || true)"
none "a cipher that is weak" "$(xml '<cipher ' | grep -vE 'strength="(strong|acceptable)"' || true)"
none "a cipher of an older version" "$(xml '<cipher ' | grep -v 'sslversion="TLSv1.3"' || true)"
none "compression" "$(xml '<compression .*supported="1"')"
none "renegotiation" "$(xml '<renegotiation ' | grep -v 'supported="0"' || true)"
none "heartbleed" "$(xml '<heartbleed ' | grep -v 'vulnerable="0"' || true)"
none "a weak key" "$(xml '<pk error="true"')"
for check in renegotiation heartbleed pk; do
  [ -n "$(xml "<$check ")" ] || fail "sslscan: it says nothing of $check"
done
suites=$(xml '<cipher ' | values cipher)
[ "$suites" = "$SUITES" ] || fail "sslscan: cipher suites are '$suites', and not '$SUITES'"
groups=$(xml '<group ' | values name)
[ "$groups" = "$GROUPS_SPOKEN" ] || fail "sslscan: groups are '$groups', and not '$GROUPS_SPOKEN'"
say "sslscan: TLS 1.3; $suites; $groups"

# === testssl.sh =======================================================================================================

say "testssl.sh: all of its checks, about 45 s"
# Nothing is looked up, and nobody else is asked (that takes --phone-out).
status=0
scan testssl.log "$testssl" --quiet --color 0 --warnings batch --nodns none --ip 127.0.0.1 --add-ca "$dir/ca.pem" \
  --jsonfile "$dir/testssl.json" "$NAME:$port" || status=$?
# Below 50 it is how many checks could not be made, and these are among the findings.
if [ "$status" -ge 50 ]; then
  fail "testssl.sh ended with $status: $(tail -n 1 "$dir/testssl.log")"
fi
if jq -e 'type == "array" and length > 50' "$dir/testssl.json" >/dev/null 2>&1; then
  # Of two certificates it marks ids with "<cert#1>" and "<cert#2>"; explained is either.
  findings=$(jq -r --arg explained " ${EXPLAINED[*]} " '
    .[] | select(.severity | IN("OK", "INFO", "LOW", "DEBUG") | not)
    | (.id | sub(" ?<.*>$"; "")) as $id
    | [if $explained | contains(" \($id) ") then "explained" else "FAILED" end, .severity, .id, .finding] | @tsv
  ' "$dir/testssl.json")
  while IFS=$'\t' read -r verdict severity id finding; do
    case $verdict in
      explained) say "testssl.sh: explained in docs/tls.md: $severity $id: $finding" ;;
      FAILED) fail "testssl.sh: $severity $id: $finding" ;;
    esac
  done <<<"$findings"
  while IFS=$'\t' read -r severity id finding; do
    [ -z "$severity" ] || say "testssl.sh: $severity $id: $finding"
  done < <(jq -r '.[] | select(.severity == "LOW") | [.severity, .id, .finding] | @tsv' "$dir/testssl.json")
  # That it found nothing wrong is worth something only if it found the gateway.
  for seen in 'TLS1_3 offered with final' 'TLS1_2 not offered' 'ALPN_HTTP2 h2' 'heartbleed not vulnerable' \
    'cert_chain_of_trust passed' 'scanTime '; do
    jq -e --arg id "${seen%% *}" --arg says "${seen#* }" \
      'any(.[]; (.id | sub(" ?<.*>$"; "")) == $id and (.finding | startswith($says)))' "$dir/testssl.json" >/dev/null ||
      fail "testssl.sh: it does not say '$seen'"
  done
  say "testssl.sh: $(jq length "$dir/testssl.json") findings"
else
  fail "testssl.sh: no report: $(tail -n 1 "$dir/testssl.log")"
fi

# === And after all that ===============================================================================================

lives || fail "the gateway has not survived it: $(tail -n 3 "$dir/gateway.log")"
if grep -nE 'panicked' "$dir/gateway.log" >&2; then fail "the gateway panicked"; fi
connect -tls1_3 >/dev/null || fail "the gateway does not answer any more"

[ "$failures" = 0 ] || die "$failures of the above"
say "ok"
