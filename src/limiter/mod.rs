//! Limits' state: how many cells a key has left, decided for all limits of a request at once.
//!
//! [`gcra`] is the algorithm, in one place, with time as an argument. [`Store`] is where keys' state lives; [`memory`] is
//! the one of a single node. A store is asked with the [`Check`]s of a whole request and answers for all of them: they
//! pass together or not at all, and what does not pass is charged to none of those that enforce.

pub mod gcra;
pub mod memory;

use gcra::Gcra;
use smallvec::SmallVec;
use std::time::Duration;

/// A keyed 128-bit hash of a limit and of the attributes in its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub u128);

/// What is asked of one limit.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// Whose state.
    pub key: Key,
    /// The rate and the burst.
    pub gcra: Gcra,
    /// Cells the request takes.
    pub cost: u32,
    /// Whether a refusal refuses the request; a shadow's does not.
    pub enforce: bool,
    /// Which overflow bucket stands in when the store has no room for the key: one a limit.
    pub overflow: usize,
    /// The second limit, asked where the first refuses and a token was brought.
    pub top_up: Option<TopUp>,
}

/// The second limit of a [`Check`].
#[derive(Debug, Clone, Copy)]
pub struct TopUp {
    /// Whose state.
    pub key: Key,
    /// The rate and the burst.
    pub gcra: Gcra,
    /// Which overflow bucket stands in.
    pub overflow: usize,
}

/// What one limit says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It lets the request pass.
    Allowed,
    /// The second limit does, where the first would not.
    ToppedUp,
    /// It does not. None: it never will, the cost is above the burst.
    Refused(Option<Duration>),
}

/// What each limit of a request says, in the order they were asked.
pub type Outcomes = SmallVec<[Outcome; 12]>;

/// Where the state of limits lives.
pub trait Store: Send + Sync {
    /// Asks all checks together at `now` (nanoseconds of the store's clock). Charges them, if `charge` is set and every
    /// enforced one lets the request pass: those that do, and of the shadows those that would. Returns whether all
    /// enforced ones do.
    fn decide(&self, now: u64, checks: &[Check], charge: bool, outcomes: &mut Outcomes) -> bool;
}
