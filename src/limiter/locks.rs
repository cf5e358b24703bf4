//! What the stores of a node lock with: parking_lot's mutexes, or in a test those of a scheduler that tries many ways in
//! which threads may meet (shuttle).

use std::ops::DerefMut;

/// A family of mutexes.
pub trait Locks: 'static {
    /// A mutex.
    type Mutex<T: Send>: Send + Sync;
    /// Who holds one.
    type Guard<'a, T: Send + 'a>: DerefMut<Target = T>;

    /// A mutex that nobody holds.
    fn mutex<T: Send>(of: T) -> Self::Mutex<T>;

    /// Waits for a mutex.
    fn lock<T: Send>(mutex: &Self::Mutex<T>) -> Self::Guard<'_, T>;
}

/// parking_lot: one octet and no system call where nobody waits.
#[derive(Debug, Clone, Copy)]
pub struct ParkingLot;

impl Locks for ParkingLot {
    type Mutex<T: Send> = parking_lot::Mutex<T>;
    type Guard<'a, T: Send + 'a> = parking_lot::MutexGuard<'a, T>;

    fn mutex<T: Send>(of: T) -> Self::Mutex<T> {
        parking_lot::Mutex::new(of)
    }

    #[inline]
    fn lock<T: Send>(mutex: &Self::Mutex<T>) -> Self::Guard<'_, T> {
        mutex.lock()
    }
}
