//! What one thread hands to others: some of it waits, then the giver does.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::Result;

struct State<T> {
    waiting: VecDeque<T>,
    is_closed: bool,
    is_left: bool,
}

/// A queue of at most so many.
pub struct Feed<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    room: usize,
}

/// What became of something that was given.
#[derive(Debug)]
pub enum Offer<T> {
    /// It waits, or was taken.
    Taken,
    /// There is no room yet.
    Full(T),
    /// Nobody takes anything any more.
    Left,
}

/// Between two looks at whether to go on waiting.
const PAUSE: Duration = Duration::from_millis(40);

impl<T> Feed<T> {
    /// An empty one with room for so many.
    pub fn new(room: usize) -> Self {
        let state = State { waiting: VecDeque::new(), is_closed: false, is_left: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), room }
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives something, without waiting.
    pub fn give(&self, item: T) -> Offer<T> {
        let mut state = self.state();
        if state.is_left {
            return Offer::Left;
        }
        if state.waiting.len() >= self.room {
            return Offer::Full(item);
        }
        state.waiting.push_back(item);
        drop(state);
        self.changed.notify_all();
        Offer::Taken
    }

    /// Waits until there is room or nobody takes anything any more, and not for long.
    pub fn wait(&self) {
        let state = self.state();
        let is_full = |state: &mut State<T>| state.waiting.len() >= self.room && !state.is_left;
        drop(self.changed.wait_timeout_while(state, PAUSE, is_full));
    }

    /// Nothing more is given.
    pub fn close(&self) {
        self.state().is_closed = true;
        self.changed.notify_all();
    }

    /// Nothing more is taken.
    pub fn leave(&self) {
        self.state().is_left = true;
        self.changed.notify_all();
    }

    /// All that waits, or what comes next; `None` at the end.
    ///
    /// # Errors
    /// Those of `check`, which is asked while nothing comes.
    pub fn take(&self, check: impl Fn() -> Result<()>) -> Result<Option<VecDeque<T>>> {
        let mut state = self.state();
        loop {
            if !state.waiting.is_empty() {
                let taken = std::mem::take(&mut state.waiting);
                drop(state);
                self.changed.notify_all();
                return Ok(Some(taken));
            }
            if state.is_closed {
                return Ok(None);
            }
            check()?;
            let waited = self.changed.wait_timeout(state, PAUSE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
