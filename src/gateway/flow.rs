//! How much of a connection of HTTP/2 is read at once, and when it is not.
//!
//! Its windows are as large as the way to another provider asks for, and uploads whose nodes do not take them fill these, in our
//! memory. While a connection is not read, the same octets wait with the system instead. So a connection has turns: some of it is
//! read, its requests pass it on, and all others have their turn before more is read; and an upload that its node does not take
//! comes before what is not read. It does not hold up those beside it for longer than [`STILL`]: one that stands still has its
//! place within the windows, and counts no more.

use super::stream::Clock;
use crate::tls::Read;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Context;
use std::time::{Duration, Instant};

/// Octets of a connection that are read in a turn: at first; at most, twice as many after each turn that took all of them; and
/// when nodes hold something up, here or for many others.
const FIRST: usize = 64 * 1024;
const AMPLE: usize = 128 * 1024;
const SCARCE: usize = 16 * 1024;

/// Uploads that are held up, of all connections, from which on each connection waits for its own.
const MANY: usize = 4;

/// For how long an upload may hold up those beside it.
const STILL: Duration = Duration::from_millis(20);

/// Uploads that are held up, of all connections, when their turns were over.
static ALL: AtomicUsize = AtomicUsize::new(0);

/// What is known of a connection. Its requests are of its task, so that nobody else writes it.
#[derive(Debug)]
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
    /// Octets that were read in this turn, and how many may be where nothing is held up.
    came: AtomicUsize,
    room: AtomicUsize,
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

impl Default for Flow {
    fn default() -> Self {
        let none = || AtomicUsize::new(0);
        Self {
            on_their_way: none(),
            still: none(),
            times: none(),
            moves: AtomicBool::new(false),
            counted: none(),
            came: none(),
            room: AtomicUsize::new(FIRST),
        }
    }
}

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

    /// So many octets were read.
    pub(super) fn came(&self, octets: usize) {
        self.came.store(self.came.load(Ordering::Relaxed).saturating_add(octets), Ordering::Relaxed);
    }

    /// What may be read now.
    pub(super) fn may_read(&self) -> May {
        let (held_up, are_many) = (self.held_up(), ALL.load(Ordering::Relaxed) >= MANY);
        let is_scarce = held_up > 0 || are_many;
        let room = if is_scarce { SCARCE } else { self.room.load(Ordering::Relaxed) };
        if held_up > usize::from(!are_many) {
            May::Wait
        } else if self.came.load(Ordering::Relaxed) >= room {
            May::TakeTurns
        } else if is_scarce {
            May::Read(Read::Record)
        } else {
            May::Read(Read::Amply)
        }
    }

    fn end_turn(&self) {
        let came = self.came.swap(0, Ordering::Relaxed);
        let room = match self.room.load(Ordering::Relaxed) {
            _ if self.held_up() > 0 => FIRST,
            room if came >= room => (2 * room).min(AMPLE),
            room => room,
        };
        self.room.store(room, Ordering::Relaxed);
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
    const RECORD: May = May::Read(Read::Record);

    #[tokio::test]
    async fn a_turn_has_an_end_and_grows_while_all_is_taken() {
        let _alone = ALONE.lock().await;
        let (flow, mut pace) = (Flow::default(), Pace::default());
        for room in [FIRST, 2 * FIRST, AMPLE, AMPLE] {
            flow.came(room - 1);
            assert_eq!(flow.may_read(), AMPLY);
            flow.came(1);
            assert_eq!(flow.may_read(), May::TakeTurns);
            turn(&mut pace, &flow).await;
        }
        flow.came(1);
        turn(&mut pace, &flow).await;
        flow.came(AMPLE - 1);
        assert_eq!(flow.may_read(), AMPLY, "a short turn takes nothing away");
        let since = flow.sets_out();
        turn(&mut pace, &flow).await;
        flow.is_gone(since);
        turn(&mut pace, &flow).await;
        flow.came(FIRST);
        assert_eq!(flow.may_read(), May::TakeTurns, "it begins anew where something was held up");
    }

    #[tokio::test]
    async fn what_is_held_up_comes_before_what_is_not_read_until_it_stands_still() {
        let _alone = ALONE.lock().await;
        let (flow, mut pace) = (Flow::default(), Pace::default());
        let stands = flow.sets_out();
        turn(&mut pace, &flow).await;
        assert_eq!(flow.may_read(), RECORD, "one does not hold up others");
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
        assert_eq!(flow.may_read(), RECORD);
        flow.came(SCARCE);
        assert_eq!(flow.may_read(), May::TakeTurns);
        flow.sets_out();
        assert_eq!(flow.may_read(), May::Wait);
        drop(other);
        assert_eq!(ALL.load(Ordering::Relaxed), 0);
        assert_eq!(flow.may_read(), May::TakeTurns);
    }
}
