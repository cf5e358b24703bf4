//! The three loads, and what became of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Method;
use tokio::task::JoinSet;

use crate::support::client::Client;
use crate::support::encode;
use crate::{BURST, Error, WINDOW};

/// Requests, and when each is to be sent.
pub struct Load {
    pub name: &'static str,
    pub title: &'static str,
    /// Seconds that the picture shows.
    pub span: f64,
    /// Whether there is always more to admit.
    pub floods: bool,
    /// Where a fixed window would have an edge, in seconds.
    pub edge: Option<f64>,
    plan: Vec<Duration>,
}

/// A load that has been sent. Times are seconds from when the first request was due, in order.
pub struct Run {
    pub load: Load,
    /// When each request was sent.
    pub offered: Vec<f64>,
    /// When each that was admitted had its answer.
    pub admitted: Vec<f64>,
    /// When the last answer came.
    pub ended: f64,
}

impl Load {
    pub fn all() -> [Load; 3] {
        let burst = Load {
            name: "burst",
            title: "300 requests at once, then 20/s for 4 s",
            span: 5.0,
            floods: false,
            edge: None,
            plan: [vec![Duration::ZERO; 300], evenly(80, Duration::from_millis(50), Duration::from_millis(50))]
                .concat(),
        };
        let flood = Load {
            name: "flood",
            title: "2,000/s for 5 s",
            span: 5.0,
            floods: true,
            edge: None,
            plan: evenly(10_000, Duration::ZERO, Duration::from_micros(500)),
        };
        // Nine tenths of each 100 ms: none slips over the edge.
        let hundred = |from| evenly(100, Duration::from_millis(from), Duration::from_micros(900));
        let edge = Load {
            name: "edge",
            title: "100 requests in the last 100 ms of a second, 100 in the first of the next; 2 s later again",
            span: 2.5,
            floods: false,
            edge: Some(0.1),
            plan: [0, 100, 2000, 2100].map(hundred).concat(),
        };
        [burst, flood, edge]
    }

    /// Sends every request when it is due, whatever became of those before it.
    ///
    /// # Panics
    /// On any other answer than 200 or 429.
    pub async fn drive(self, clients: &[Arc<Client>]) -> Result<Run, Error> {
        let begin = Instant::now() + Duration::from_millis(10);
        let mut tasks = JoinSet::new();
        for (due, client) in self.plan.iter().zip(clients.iter().cycle()) {
            tokio::time::sleep_until((begin + *due).into()).await;
            let client = client.clone();
            tasks.spawn(async move {
                let offered = begin.elapsed();
                let status = ask(&client).await?;
                Ok::<_, Error>((offered, status, begin.elapsed()))
            });
        }
        let mut run = Run { load: self, offered: Vec::new(), admitted: Vec::new(), ended: 0.0 };
        while let Some(done) = tasks.join_next().await {
            let (offered, status, answered) = done??;
            assert!(matches!(status, 200 | 429), "{}: a request was answered {status}", run.load.name);
            let answered = answered.as_secs_f64();
            run.offered.push(offered.as_secs_f64());
            if status == 200 {
                run.admitted.push(answered);
            }
            run.ended = run.ended.max(answered);
        }
        run.offered.sort_by(f64::total_cmp);
        run.admitted.sort_by(f64::total_cmp);
        Ok(run)
    }
}

impl Run {
    /// When the last request was sent.
    pub fn offered_in(&self) -> f64 {
        self.offered.last().copied().unwrap_or_default()
    }

    /// What a counter for each window of time would have admitted with the same quota.
    pub fn fixed_window(&self) -> Option<Vec<f64>> {
        let edge = self.load.edge?;
        let (mut window, mut taken) = (None, 0);
        let admit = |at: &f64| {
            let now = Some(((at - edge) / WINDOW).floor() as i64);
            if window != now {
                (window, taken) = (now, 0);
            }
            taken += 1;
            taken <= BURST
        };
        Some(self.offered.iter().copied().filter(admit).collect())
    }
}

/// The cheapest request that goes all the way to the Delivery Service: the status of its answer.
pub async fn ask(client: &Client) -> Result<u16, Error> {
    let body = encode::verification_key_request("a.example", "b.example");
    Ok(client.send(Method::GET, "/verification_key", body).await?.status.as_u16())
}

/// So many, at equal distances.
fn evenly(count: u32, from: Duration, apart: Duration) -> Vec<Duration> {
    (0..count).map(|i| from + apart * i).collect()
}
