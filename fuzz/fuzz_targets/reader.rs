//! Any octets, at every endpoint of every dialect: the reader does not panic; what it accepts it accepts from `decided_at`
//! octets on, with the same fields; what it has not decided it says truly how much it needs of. The head is fuzzed too: the
//! first octet says which endpoint, the second how many of the rest are the path's parameter, with `From` and `Host` that are
//! good or made of what follows.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moh_gateway::dialect::{self, Head};
use moh_gateway::wire::Error;

fuzz_target!(|octets: &[u8]| {
    let [choice, length, rest @ ..] = octets else { return };
    let endpoints: Vec<_> = dialect::endpoints().filter(|e| e.takes_body()).collect();
    let endpoint = endpoints[usize::from(*choice) % endpoints.len()];
    let (parameter, body) = rest.split_at(usize::from(*length & 0x7f).min(rest.len()));
    let Ok(parameter) = std::str::from_utf8(parameter) else { return };
    let head = match length & 0x80 {
        0 => Head { host: "b.example", from: Some(b"mimi@a.example"), parameter },
        _ => Head { host: parameter, from: Some(parameter.as_bytes()), parameter },
    };
    match endpoint.read(&head, body) {
        Ok(envelope) => {
            assert!(envelope.decided_at <= body.len());
            assert!(envelope.group_id.is_none_or(|group| !group.is_empty()));
            assert!(envelope.cost >= 1);
            assert_eq!(endpoint.read(&head, &body[..envelope.decided_at]), Ok(envelope));
            if let Some(less) = envelope.decided_at.checked_sub(1) {
                assert!(endpoint.read(&head, &body[..less]).is_err_and(|e| e.is_incomplete()));
            }
        }
        Err(Error::Incomplete { offset, need, .. }) => {
            assert!(offset <= body.len() && need > body.len());
        }
        Err(malformed @ Error::Malformed { .. }) => {
            // Nothing that follows makes it right.
            let longer = [body, &[0; 64]].concat();
            assert_eq!(endpoint.read(&head, &longer), Err(malformed));
        }
    }
});
