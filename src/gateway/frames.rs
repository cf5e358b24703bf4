//! The frames of an HTTP/2 connection, counted as they come (RFC 9113 §4, §10.5): those that move no request on have a
//! rate of their own, because each costs its sender next to nothing and us an answer, a lookup or a wake-up.
//!
//! Only frame heads are looked at, and nothing is kept but where in a frame the connection is. What h2 bounds by itself
//! (streams at once, fields, CONTINUATION) it still does.

use crate::limiter::gcra::Gcra;
use std::time::Instant;

/// The preface is no frame (§3.4).
const PREFACE: usize = 24;

/// Octets that a frame begins with.
pub(super) const HEAD: usize = 9;

/// A reset costs as much as two other frames: what it resets has been begun. Not more, for clients give up when a Delivery
/// Service is slow, many at a time.
pub(super) const RESET: u32 = 2;

/// Octets sent to the client for which it may send one WINDOW_UPDATE: some open their windows by little.
const OCTETS_AN_UPDATE: u64 = 512;

/// WINDOW_UPDATE frames that a request is good for: some open their windows for each answer, however short.
const UPDATES_A_REQUEST: u64 = 2;

/// As many as may be saved up.
const MOST_UPDATES: u64 = 16_384;

/// More control frames than a connection may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Abuse;

/// The count.
#[derive(Debug)]
pub(super) struct Frames {
    control: Gcra,
    began: Instant,
    tat: u64,
    /// Octets of what is skipped: the preface, or a frame's payload.
    skip: usize,
    head: [u8; HEAD],
    filled: usize,
    /// WINDOW_UPDATE frames that are free.
    updates: u64,
    /// Octets that were sent, and are not yet good for one.
    sent: u64,
}

impl Frames {
    pub(super) fn new(control: Gcra) -> Self {
        Self { control, began: Instant::now(), tat: 0, skip: PREFACE, head: [0; HEAD], filled: 0, updates: 0, sent: 0 }
    }

    /// Octets went to the client.
    pub(super) fn sent(&mut self, octets: usize) {
        self.sent = self.sent.saturating_add(octets as u64);
        self.updates = (self.updates + self.sent / OCTETS_AN_UPDATE).min(MOST_UPDATES);
        self.sent %= OCTETS_AN_UPDATE;
    }

    /// Octets that are to come of a frame that has begun, once its head has.
    pub(super) fn left(&self) -> usize {
        self.skip
    }

    /// Octets came from the client, and there is room for so many of them: how many of them go there. Of a frame that has no room
    /// only its head does: whoever reads that makes room for the frame, and what came before it would have to be moved.
    pub(super) fn came(&mut self, octets: &[u8], room: usize) -> Result<usize, Abuse> {
        let mut rest = octets.get(..room).unwrap_or(octets);
        let (mut cost, mut passed) = (0u32, 0);
        loop {
            let skipped = self.skip.min(rest.len());
            self.skip -= skipped;
            passed += skipped;
            rest = rest.get(skipped..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
            let wanted = self.head.get_mut(self.filled..).unwrap_or_default();
            let taken = wanted.len().min(rest.len());
            for (to, from) in wanted.iter_mut().zip(rest) {
                *to = *from;
            }
            self.filled += taken;
            passed += taken;
            rest = rest.get(taken..).unwrap_or_default();
            if self.filled == HEAD {
                self.filled = 0;
                let [a, b, c, kind, flags, ..] = self.head;
                self.skip = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                cost = cost.saturating_add(self.cost(kind, flags));
                if self.skip > room - passed {
                    break;
                }
            }
        }
        self.charge(cost).map(|()| passed)
    }

    fn cost(&mut self, kind: u8, flags: u8) -> u32 {
        const END_STREAM: u8 = 0x1;
        const PADDED: u8 = 0x8;
        match kind {
            // DATA: some of a body, or its end. Padding may be all there is.
            0 if flags & PADDED == 0 && (self.skip > 0 || flags & END_STREAM != 0) => 0,
            // HEADERS: a request, which has its own limits.
            1 => {
                self.updates = (self.updates + UPDATES_A_REQUEST).min(MOST_UPDATES);
                0
            }
            // RST_STREAM
            3 => RESET,
            // WINDOW_UPDATE
            8 => match self.updates.checked_sub(1) {
                Some(left) => {
                    self.updates = left;
                    0
                }
                None => 1,
            },
            _ => 1,
        }
    }

    fn charge(&mut self, cost: u32) -> Result<(), Abuse> {
        if cost == 0 {
            return Ok(());
        }
        let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.tat = self.control.take(self.tat, now, cost).map_err(|_| Abuse)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    /// There is room for whatever comes.
    const ALL: usize = usize::MAX;

    fn frames(burst: u32) -> Frames {
        let mut frames = Frames::new(Gcra::new(1, Duration::from_secs(3600), burst).unwrap());
        frames.came(&[b'P'; PREFACE], ALL).unwrap();
        frames
    }

    fn frame(kind: u8, flags: u8, length: usize) -> Vec<u8> {
        let mut octets = (length as u32).to_be_bytes()[1..].to_vec();
        octets.extend([kind, flags, 0, 0, 0, 1]);
        octets.resize(HEAD + length, 7);
        octets
    }

    #[test]
    fn requests_are_free_and_what_moves_none_on_is_not() {
        let mut all = frames(10);
        for _ in 0..1000 {
            all.came(&frame(1, 4, 60), ALL).unwrap();
            all.came(&frame(0, 0, 1000), ALL).unwrap();
            all.came(&frame(0, 1, 0), ALL).unwrap();
        }
        for (kind, flags, length, most) in [
            (6, 0, 8, 10),
            (4, 0, 0, 10),
            (2, 0, 5, 10),
            (8, 0, 4, 10),
            (0, 0, 0, 10),
            (0, 8, 9, 10),
            (9, 0, 9, 10),
            (77, 0, 3, 10),
            (3, 0, 4, 5),
        ] {
            let mut counted = frames(10);
            for _ in 0..most {
                counted.came(&frame(kind, flags, length), ALL).unwrap();
            }
            assert_eq!(counted.came(&frame(kind, flags, length), ALL), Err(Abuse), "type {kind}");
        }
    }

    #[test]
    fn of_a_frame_that_has_no_room_only_the_head_passes() {
        let mut all = frames(10);
        let small = [frame(1, 4, 20), frame(0, 0, 5)].concat();
        let octets = [&small[..], &frame(0, 0, 1000), &frame(0, 1, 7)].concat();
        assert_eq!(all.came(&octets, 500), Ok(small.len() + HEAD));
        assert_eq!(all.left(), 1000);
        // Room is made for it then.
        let octets = &octets[small.len() + HEAD..];
        assert_eq!(all.came(&octets[..600], 1000), Ok(600));
        assert_eq!((all.came(&octets[600..], 400), all.left()), (Ok(400), 0));
        assert_eq!((all.came(&octets[1000..], 5), all.left()), (Ok(5), 0), "of its head");
        assert_eq!((all.came(&octets[1005..], 5), all.left()), (Ok(4), 7));
        assert_eq!((all.came(&octets[1009..], 7), all.left()), (Ok(7), 0));
    }

    #[test]
    fn windows_may_be_opened_for_what_was_sent() {
        let mut counted = frames(1);
        counted.sent(512 * 100);
        for _ in 0..101 {
            counted.came(&frame(8, 0, 4), ALL).unwrap();
        }
        assert_eq!(counted.came(&frame(8, 0, 4), ALL), Err(Abuse));
    }

    proptest! {
        #[test]
        fn however_the_octets_are_cut(cuts in prop::collection::vec((1usize..40, 1usize..60), 1..60)) {
            let mut octets = vec![b'P'; PREFACE];
            for n in 0..20 {
                octets.extend(frame(n % 10, 0, usize::from(n) * 3));
            }
            let control = Gcra::new(1, Duration::from_secs(3600), 1000).unwrap();
            let (mut whole, mut cut) = (Frames::new(control), Frames::new(control));
            prop_assert_eq!(whole.came(&octets, ALL), Ok(octets.len()));
            // Where their heads end, and how long they are.
            let heads = (0..20).scan(PREFACE, |at, n| {
                let (head, length) = (*at + HEAD, n * 3);
                *at = head + length;
                Some((head, length))
            });
            let heads = Vec::from_iter(heads);
            let mut rest = &octets[..];
            for (length, room) in cuts.iter().cycle() {
                let now = &rest[..(*length).min(rest.len())];
                let (at, most) = (octets.len() - rest.len(), now.len().min(*room));
                let too_large = heads.iter().find(|(head, length)| {
                    (at + 1..=at + most).contains(head) && *length > at + room - head
                });
                let passed = cut.came(now, *room).unwrap();
                prop_assert_eq!(passed, too_large.map_or(most, |(head, _)| head - at));
                rest = &rest[passed..];
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!((whole.skip, whole.filled, whole.updates), (cut.skip, cut.filled, cut.updates));
            prop_assert_eq!(whole.tat / 3_600_000_000_000, cut.tat / 3_600_000_000_000);
        }
    }
}
