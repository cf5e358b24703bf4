//! The addresses of names: many at once, each within its time.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::task::JoinSet;

/// A host and a port.
pub(super) type Name = (String, u16);

/// What a look-up came to: addresses, in order and each once.
pub(super) type Answer = (Name, io::Result<Vec<SocketAddr>>);

/// Names that are looked up at once: each takes a thread of the system's resolver.
const AT_ONCE: usize = 32;

/// For a name.
const PATIENCE: Duration = Duration::from_secs(5);

/// Addresses of a name that are used.
const MOST: usize = 64;

/// Looks names up, as the system does.
pub(super) async fn look_up(names: Vec<Name>) -> Vec<Answer> {
    let mut names = names.into_iter();
    let mut under_way = JoinSet::new();
    let mut answers = vec![];
    loop {
        while under_way.len() < AT_ONCE
            && let Some(name) = names.next()
        {
            under_way.spawn(one(name));
        }
        match under_way.join_next().await {
            Some(answer) => answers.extend(answer.ok()),
            None => return answers,
        }
    }
}

async fn one((host, port): Name) -> Answer {
    let answer = match tokio::time::timeout(PATIENCE, tokio::net::lookup_host((host.as_str(), port))).await {
        Ok(Ok(found)) => in_order(found.collect()),
        Ok(Err(e)) => Err(e),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    ((host, port), answer)
}

/// Resolvers give addresses in a new order every time, which is no change.
fn in_order(mut found: Vec<SocketAddr>) -> io::Result<Vec<SocketAddr>> {
    found.sort_unstable();
    found.dedup();
    found.truncate(MOST);
    if found.is_empty() { Err(io::Error::new(io::ErrorKind::NotFound, "it has no address")) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_that_resolve_do_and_others_do_not() {
        let names = vec![("localhost".to_owned(), 80), ("no-such-name.invalid".to_owned(), 80)];
        let mut answers = look_up(names).await;
        answers.sort_by(|a, b| a.0.cmp(&b.0));
        let [(local, found), (other, none)] = &answers[..] else { panic!("{answers:?}") };
        assert_eq!((local.0.as_str(), other.0.as_str()), ("localhost", "no-such-name.invalid"));
        assert!(found.as_ref().unwrap().iter().all(|address| address.ip().is_loopback() && address.port() == 80));
        assert!(none.is_err());
    }

    #[tokio::test]
    async fn more_names_than_are_looked_up_at_once() {
        let names: Vec<Name> = (0..100).map(|i| (format!("127.0.0.{i}"), 80)).collect();
        let answers = look_up(names).await;
        assert_eq!(answers.len(), 100);
        assert!(answers.iter().all(|(name, found)| found.as_ref().unwrap()[0].ip().to_string() == name.0));
    }

    #[test]
    fn the_order_of_an_answer_is_no_change() {
        let [a, b, c]: [SocketAddr; 3] = ["127.0.0.1:1", "127.0.0.2:1", "127.0.0.3:1"].map(|a| a.parse().unwrap());
        assert_eq!(in_order(vec![c, a, b, a]).unwrap(), in_order(vec![b, c, a]).unwrap());
        assert_eq!(
            in_order((0..1000).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect()).unwrap().len(),
            MOST
        );
        assert!(in_order(vec![]).is_err());
    }
}
