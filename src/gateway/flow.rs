//! How much of a connection of HTTP/2 is read at once, and when it is not.
//!
//! Its windows are as large as the way to another provider asks for, and uploads whose nodes do not take them fill these, in our
//! memory. While a connection is not read, the same octets wait with the system instead. So a connection has turns: some of it is
//! read, its requests pass it on, and all others have their turn before more is read; and an upload that its node does not take
//! comes before what is not read. It does not hold up those beside it for longer than [`STILL`]: one that stands still has its
//! place within the windows, and counts no more.

use super::frames::HEAD;
use super::http2::FRAME;
use super::stream::Clock;
use crate::tls::{RECORD, Read};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Context;
use std::time::{Duration, Instant};

/// Octets of a connection that are read in a turn; and when nodes hold something up, here or for many others.
const AMPLE: usize = 64 * 1024;
const SCARCE: usize = RECORD;

/// Octets that may be read beyond these, for a frame that has begun to come: nobody can pass that on before all of it is there, and
/// it would wait in our memory for the next turn.
const BEYOND: usize = FRAME as usize + HEAD;

/// Uploads that are held up, of all connections, from which on each connection waits for its own.
const MANY: usize = 4;

/// For how long an upload may hold up those beside it.
const STILL: Duration = Duration::from_millis(20);

/// Uploads that are held up, of all connections, when their turns were over.
static ALL: AtomicUsize = AtomicUsize::new(0);

/// What is known of a connection. Its requests are of its task, so that nobody else writes it.
#[derive(Debug, Default)]
pub(super) struct Flow {
    /// Uploads of which a piece is on its way to a node.
    on_their_way: AtomicUsize,
    /// Of these, those that stand still, and how often it was said that all do.
    still: AtomicUsize,
    times: AtomicUsize,
    /// Since others have gone on.
    moves: AtomicBool,
    /// Those that do not, as they are counted with those of all connections.
    counted: AtomicUsize,
    /// Octets that were read in this turn, and those that are to come of a frame that has begun.
    came: AtomicUsize,
    left: AtomicUsize,
}

/// When a piece of an upload has set out.
pub(super) struct Since(usize);

/// Says of what is on its way that it stands still.
#[derive(Default)]
pub(super) struct Pace(Clock);

/// What may be read of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum May {
    /// So much.
    Read(Read),
    /// Nothing, until [`Pace::end_turn`] says so or what is held up has gone on.
    Wait,
    /// Nothing, before others had their turn.
    TakeTurns,
}

// === impl Flow ===

impl Flow {
    /// A piece of an upload is on its way: what is to be said when it is gone.
    pub(super) fn sets_out(&self) -> Since {
        self.on_their_way.store(self.on_their_way.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        Since(self.times.load(Ordering::Relaxed))
    }

    /// It has gone on, or will not.
    pub(super) fn is_gone(&self, since: Since) {
        self.on_their_way.store(self.on_their_way.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
        if since.0 == self.times.load(Ordering::Relaxed) {
            self.moves.store(true, Ordering::Relaxed);
        } else {
            self.still.store(self.still.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
        }
    }

    /// Uploads that may hold up those beside them.
    pub(super) fn held_up(&self) -> usize {
        self.on_their_way.load(Ordering::Relaxed).saturating_sub(self.still.load(Ordering::Relaxed))
    }

    /// So many octets were read, and so many are to come of a frame that has begun.
    pub(super) fn came(&self, octets: usize, left: usize) {
        self.left.store(left, Ordering::Relaxed);
        self.came.store(self.came.load(Ordering::Relaxed).saturating_add(octets), Ordering::Relaxed);
    }

    /// What may be read now.
    pub(super) fn may_read(&self) -> May {
        let (held_up, are_many) = (self.held_up(), ALL.load(Ordering::Relaxed) >= MANY);
        let is_scarce = held_up > 0 || are_many;
        if held_up > usize::from(!are_many) {
            return May::Wait;
        }
        let room = if is_scarce { SCARCE } else { AMPLE };
        let (came, left) = (self.came.load(Ordering::Relaxed), self.left.load(Ordering::Relaxed));
        if came >= room + BEYOND || (came >= room && left == 0) {
            return May::TakeTurns;
        }
        if came < room && !is_scarce {
            return May::Read(Read::Amply);
        }
        // A whole one, where none has begun.
        let wanted = if left == 0 { BEYOND } else { left };
        May::Read(Read::Octets(wanted.min(room + BEYOND - came)))
    }

    fn end_turn(&self) {
        self.came.store(0, Ordering::Relaxed);
        self.count(self.held_up());
    }

    fn count(&self, held_up: usize) {
        let counted = self.counted.load(Ordering::Relaxed);
        if held_up != counted {
            self.counted.store(held_up, Ordering::Relaxed);
            ALL.fetch_add(held_up.wrapping_sub(counted), Ordering::Relaxed);
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.count(0);
    }
}

// === impl Pace ===

impl Pace {
    /// A connection's requests have had their turn. What is held up then stands still if it does so for long, and whoever asks is
    /// woken to read on.
    pub(super) fn end_turn(&mut self, cx: &mut Context<'_>, flow: &Flow) {
        if flow.held_up() == 0 || flow.moves.swap(false, Ordering::Relaxed) {
            self.0.stop();
        }
        if flow.held_up() > 0 {
            if !self.0.is_set() {
                self.0.set(Instant::now() + STILL);
            }
            if self.0.poll(cx).is_ready() {
                self.0.stop();
                flow.still.store(flow.on_their_way.load(Ordering::Relaxed), Ordering::Relaxed);
                flow.times.store(flow.times.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
                cx.waker().wake_by_ref();
            }
        }
        flow.end_turn();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::task::Poll;

    /// What all connections have is of the process: one test at a time.
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    async fn turn(pace: &mut Pace, flow: &Flow) {
        poll_fn(|cx| {
            pace.end_turn(cx, flow);
            Poll::Ready(())
        })
        .await;
    }

    const AMPLY: May = May::Read(Read::Amply);
    const A_FRAME: May = May::Read(Read::Octets(BEYOND));

    fn octets(count: usize) -> May {
        May::Read(Read::Octets(count))
    }

    #[tokio::test]
    async fn a_turn_has_an_end_where_a_frame_has_one() {
        let _alone = ALONE.lock().await;
        let (flow, mut pace) = (Flow::default(), Pace::default());
        for _ in 0..2 {
            flow.came(AMPLE - 1, 0);
            assert_eq!(flow.may_read(), AMPLY);
            flow.came(1, 0);
            assert_eq!(flow.may_read(), May::TakeTurns);
            turn(&mut pace, &flow).await;
        }
        flow.came(AMPLE, BEYOND);
        assert_eq!(flow.may_read(), A_FRAME, "a frame has begun");
        flow.came(BEYOND - 10, 10);
        assert_eq!(flow.may_read(), octets(10));
        flow.came(9, 1 << 23);
        assert_eq!(flow.may_read(), octets(1));
        // However large they are, or however many: some end where others begin.
        flow.came(1, 1 << 23);
        assert_eq!(flow.may_read(), May::TakeTurns);
    }

    #[tokio::test]
    async fn what_is_held_up_comes_before_what_is_not_read_until_it_stands_still() {
        let _alone = ALONE.lock().await;
        let (flow, mut pace) = (Flow::default(), Pace::default());
        let stands = flow.sets_out();
        turn(&mut pace, &flow).await;
        assert_eq!(flow.may_read(), A_FRAME, "one does not hold up others");
        flow.came(RECORD, 9);
        assert_eq!(flow.may_read(), octets(9));
        flow.came(9, 0);
        assert_eq!(flow.may_read(), May::TakeTurns);
        let mut moves = flow.sets_out();
        for _ in 0..3 {
            turn(&mut pace, &flow).await;
            assert_eq!(flow.may_read(), May::Wait);
            assert_eq!(ALL.load(Ordering::Relaxed), 2);
            tokio::time::sleep(STILL - Duration::from_millis(2)).await;
            flow.is_gone(moves);
            moves = flow.sets_out();
        }
        turn(&mut pace, &flow).await;
        assert_eq!(flow.may_read(), May::Wait, "one of them moves");
        tokio::time::sleep(STILL + Duration::from_millis(2)).await;
        turn(&mut pace, &flow).await;
        assert_eq!(flow.may_read(), AMPLY, "both stand still");
        assert_eq!(ALL.load(Ordering::Relaxed), 0, "and are nobody else's business");
        flow.is_gone(moves);
        let (moves, other) = (flow.sets_out(), flow.sets_out());
        assert_eq!(flow.held_up(), 2, "what sets out again does not");
        flow.is_gone(other);
        assert_eq!(flow.held_up(), 1);
        flow.is_gone(stands);
        assert_eq!(flow.held_up(), 1);
        flow.is_gone(moves);
        assert_eq!(flow.held_up(), 0);
    }

    #[tokio::test]
    async fn where_many_are_held_up_each_connection_waits_for_its_own() {
        let _alone = ALONE.lock().await;
        let (flow, other, mut pace) = (Flow::default(), Flow::default(), Pace::default());
        for _ in 0..MANY {
            other.sets_out();
        }
        turn(&mut pace, &other).await;
        assert_eq!(flow.may_read(), A_FRAME);
        flow.came(SCARCE, 0);
        assert_eq!(flow.may_read(), May::TakeTurns);
        flow.sets_out();
        assert_eq!(flow.may_read(), May::Wait);
        drop(other);
        assert_eq!(ALL.load(Ordering::Relaxed), 0);
        assert_eq!(flow.may_read(), May::TakeTurns);
    }
}
