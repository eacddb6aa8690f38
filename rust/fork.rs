//! A fork waits for what the child could not finish: a thread that is not there any more ends nothing that it began.
//!
//! What is made once for a process (a table, a regex, a pool) is guarded by locks of this crate and of others, and a
//! fork copies a lock that another thread holds as held for ever. So such work is done in a [`section`], a fork waits
//! until no other thread is in one ([`before`]), and sections wait for a fork. All of it is atomics, no lock.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Threads that are in a section.
static INSIDE: AtomicUsize = AtomicUsize::new(0);
/// Whether a fork waits for them, or is going on.
static FORKING: AtomicBool = AtomicBool::new(false);
/// Whether this process was forked while a thread was in a section that did not end.
static TORN: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Sections that this thread is in.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// How long a fork waits at most. Who forks inside of a section that waits for it would wait for ever.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(1);

/// Work that no fork cuts in two, as long as this lives.
#[derive(Debug)]
#[must_use]
pub struct Section(PhantomData<*const ()>); // of its thread

/// Begins a section. Sections of one thread may be inside each other.
///
/// # Errors
/// [`Error::Internal`] in a child whose parent forked in the middle of one: what it was making stays half made.
pub fn section() -> Result<Section> {
    if DEPTH.get() == 0 {
        loop {
            INSIDE.fetch_add(1, Ordering::SeqCst);
            if !FORKING.load(Ordering::SeqCst) {
                break;
            }
            INSIDE.fetch_sub(1, Ordering::SeqCst);
            std::thread::sleep(PAUSE);
        }
        if TORN.load(Ordering::SeqCst) {
            INSIDE.fetch_sub(1, Ordering::SeqCst);
            return Err(Error::Internal(
                "this process was forked while another thread of its parent was loading, and what was half made then \
                 stays so\nhint: fork before, or start processes by spawn"
                    .to_owned(),
            ));
        }
    }
    DEPTH.set(DEPTH.get() + 1);
    Ok(Section(PhantomData))
}

impl Section {
    /// Leaves the section to go on until this thread calls [`end`].
    pub fn go_on(self) {
        std::mem::forget(self);
    }
}

impl Drop for Section {
    fn drop(&mut self) {
        end();
    }
}

/// Ends a section of this thread.
pub fn end() {
    let depth = DEPTH.get();
    DEPTH.set(depth.saturating_sub(1));
    if depth == 1 {
        INSIDE.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Before a fork: waits until no other thread is in a section, and keeps them out.
pub fn before() {
    FORKING.store(true, Ordering::SeqCst);
    let start = Instant::now();
    while INSIDE.load(Ordering::SeqCst) > own() && start.elapsed() < PATIENCE {
        std::thread::sleep(PAUSE);
    }
}

/// After a fork, in the parent.
pub fn after_in_parent() {
    FORKING.store(false, Ordering::SeqCst);
}

/// After a fork, in the child, which has this thread alone.
pub fn after_in_child() {
    if INSIDE.swap(own(), Ordering::SeqCst) > own() {
        TORN.store(true, Ordering::SeqCst);
    }
    FORKING.store(false, Ordering::SeqCst);
}

fn own() -> usize {
    usize::from(DEPTH.get() > 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_fork_waits_for_sections_and_sections_wait_for_a_fork() {
        let outer = section().unwrap();
        let inner = section().unwrap();
        before(); // its own sections do not count
        let other = std::thread::spawn(|| {
            let begun = Instant::now();
            drop(section().unwrap());
            begun.elapsed()
        });
        std::thread::sleep(Duration::from_millis(50));
        after_in_parent();
        assert!(other.join().unwrap() > Duration::from_millis(20));
        drop((outer, inner));
        let (ready, told) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || {
            let section = section().unwrap();
            ready.send(()).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            drop(section);
        });
        told.recv().unwrap();
        let begun = Instant::now();
        before();
        assert!(begun.elapsed() > Duration::from_millis(20));
        after_in_parent();
        other.join().unwrap();
    }
}
