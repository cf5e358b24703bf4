//! Any octets, at every endpoint: the reader does not panic; what it accepts it accepts from `decided_at` octets on, with
//! the same fields; what it has not decided it says truly how much it needs of.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moh_gateway::dialect;
use moh_gateway::wire::Error;

fuzz_target!(|octets: &[u8]| {
    let Some((choice, body)) = octets.split_first() else { return };
    let endpoints: Vec<_> = dialect::endpoints().filter(|e| e.reader.is_some()).collect();
    let endpoint = endpoints[usize::from(*choice) % endpoints.len()];
    match endpoint.read(body) {
        Ok(envelope) => {
            assert!(envelope.decided_at <= body.len());
            assert!(envelope.group_id.is_none_or(|group| !group.is_empty()));
            assert_eq!(endpoint.read(&body[..envelope.decided_at]), Ok(envelope));
            if let Some(less) = envelope.decided_at.checked_sub(1) {
                assert!(endpoint.read(&body[..less]).is_err_and(|e| e.is_incomplete()));
            }
        }
        Err(Error::Incomplete { offset, need, .. }) => {
            assert!(offset <= body.len() && need > body.len());
        }
        Err(malformed @ Error::Malformed { .. }) => {
            // Nothing that follows makes it right.
            let longer = [body, &[0; 64]].concat();
            assert_eq!(endpoint.read(&longer), Err(malformed));
        }
    }
});
