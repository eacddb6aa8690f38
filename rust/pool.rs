//! The thread pool: one per process, built lazily, so that it survives a fork.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::fork;

/// A pool, whose it is, and its number of threads.
type Entry = (u32, usize, Arc<rayon::ThreadPool>);

/// Never waited for: a fork may copy a slot while another thread holds it, and then it stays locked for ever in the child.
static SLOTS: [Mutex<Option<Entry>>; 16] = [const { Mutex::new(None) }; 16];

/// How many threads to use: `threads` if given, else `RAYON_NUM_THREADS`, else what affinity and the cgroup allow.
pub fn threads(threads: Option<usize>) -> usize {
    let from_variable =
        || std::env::var("RAYON_NUM_THREADS").ok()?.parse().ok().filter(|&n: &usize| n > 0);
    threads
        .filter(|&n| n > 0)
        .or_else(from_variable)
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

/// The pool of this process with `n` threads. A child of a fork finds its own pid missing and builds its own.
///
/// # Errors
/// [`Error::Internal`] if the system refuses to start threads; those of [`fork::section`].
pub fn pool(n: usize) -> Result<Arc<rayon::ThreadPool>> {
    let pid = std::process::id();
    // A slot that another thread holds is free again in a moment, unless it was copied by a fork.
    for _ in 0..3 {
        if let Some(pool) = find(pid, n) {
            return Ok(pool);
        }
        if SLOTS.iter().all(|slot| !matches!(slot.try_lock(), Err(TryLockError::WouldBlock))) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let _whole = fork::section()?;
    // The threads of every pool share what this makes once.
    drop(crossbeam_epoch::pin());
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(n)
        .thread_name(|i| format!("dpo_ext-{i}"))
        .build()
        .map_err(|e| Error::Internal(format!("cannot start {n} threads: {e}")))?;
    let pool = Arc::new(pool);
    // Without a free slot the pool serves this call alone.
    for slot in &SLOTS {
        let Some(mut slot) = held(slot) else { continue };
        let free = slot.as_ref().is_none_or(|(owner, _, _)| *owner != pid);
        if free {
            // The threads of a parent are not here, and joining them would hang: its pool is leaked on purpose.
            std::mem::forget(slot.replace((pid, n, Arc::clone(&pool))));
            break;
        }
    }
    Ok(pool)
}

fn find(pid: u32, n: usize) -> Option<Arc<rayon::ThreadPool>> {
    SLOTS.iter().find_map(|slot| match held(slot)?.as_ref() {
        Some((owner, size, pool)) if *owner == pid && *size == n => Some(Arc::clone(pool)),
        _ => None,
    })
}

fn held(slot: &Mutex<Option<Entry>>) -> Option<MutexGuard<'_, Option<Entry>>> {
    match slot.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// How long who waits for work waits between two calls of `tick`.
pub const TICK: Duration = Duration::from_millis(40);

/// Work on a pool.
#[derive(Debug)]
pub struct Running<T>(Receiver<Result<T>>);

impl<T> Running<T> {
    /// Waits for the work, and calls `tick` at least every 40 ms; if that fails, no longer.
    ///
    /// # Errors
    /// Those of the work and of `tick`, and [`Error::Internal`].
    pub fn wait(self, tick: &mut impl FnMut() -> Result<()>) -> Result<T> {
        awaited(&self.0, tick)
    }
}

/// Begins `work` on the pool of `n` threads. After an interrupt the work is told to stop, and whatever it still returns
/// is thrown away. A panic of it becomes [`Error::Internal`].
///
/// # Errors
/// Those of [`pool`].
pub fn start<T: Send + 'static>(
    n: usize,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<Running<T>> {
    let (sender, receiver) = sync_channel(1);
    let pool = pool(n)?;
    WANTED.fetch_add(1, Ordering::Relaxed);
    pool.spawn(move || {
        WANTED.fetch_sub(1, Ordering::Relaxed);
        sent(work, &sender);
    });
    Ok(Running(receiver))
}

/// Calls whose work no thread has begun yet.
static WANTED: AtomicUsize = AtomicUsize::new(0);

/// Whether some call waits for a thread, so that long work had better yield.
pub fn is_wanted() -> bool {
    WANTED.load(Ordering::Relaxed) > 0
}

/// Runs `work` that borrows on the pool of `n` threads, while the caller waits as in [`Running::wait`], after a failed
/// `tick` too.
///
/// # Errors
/// Those of `work` and `tick`, and [`Error::Internal`].
pub fn run_scoped<T: Send>(
    n: usize,
    work: impl FnOnce() -> Result<T> + Send,
    mut tick: impl FnMut() -> Result<()>,
) -> Result<T> {
    let (sender, receiver) = sync_channel(1);
    let pool = pool(n)?;
    pool.in_place_scope(|scope| {
        WANTED.fetch_add(1, Ordering::Relaxed);
        scope.spawn(move |_| {
            WANTED.fetch_sub(1, Ordering::Relaxed);
            sent(work, &sender);
        });
        awaited(&receiver, &mut tick)
    })
}

/// Runs `work` on a thread of its own, for what one thread does, while the caller waits as in [`Running::wait`].
///
/// # Errors
/// Those of `work` and `tick`, and [`Error::Internal`].
pub fn alone<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
    mut tick: impl FnMut() -> Result<()>,
) -> Result<T> {
    let (sender, receiver) = sync_channel(1);
    thread().spawn(move || sent(work, &sender)).map_err(not_started)?;
    awaited(&receiver, &mut tick)
}

/// As [`alone`], for work that borrows: it is waited for, after a failed `tick` too.
///
/// # Errors
/// Those of `work` and `tick`, and [`Error::Internal`].
pub fn alone_scoped<T: Send>(
    work: impl FnOnce() -> Result<T> + Send,
    mut tick: impl FnMut() -> Result<()>,
) -> Result<T> {
    let (sender, receiver) = sync_channel(1);
    std::thread::scope(|scope| {
        thread().spawn_scoped(scope, move || sent(work, &sender)).map_err(not_started)?;
        awaited(&receiver, &mut tick)
    })
}

/// A thread with the stack of a main thread: code of others recurses as it likes.
fn thread() -> std::thread::Builder {
    std::thread::Builder::new().name("dpo_ext-alone".to_owned()).stack_size(8 << 20)
}

#[allow(clippy::needless_pass_by_value)] // as `map_err` gives it
fn not_started(error: std::io::Error) -> Error {
    Error::Internal(format!("cannot start a thread: {error}"))
}

/// Does the work on a thread of the pool.
fn sent<T>(work: impl FnOnce() -> Result<T>, sender: &SyncSender<Result<T>>) {
    // Nobody listens after an interrupt.
    let _ = sender.send(caught(work));
}

/// Waits for the work, and calls `tick` in between.
fn awaited<T>(receiver: &Receiver<Result<T>>, tick: &mut impl FnMut() -> Result<()>) -> Result<T> {
    loop {
        match receiver.recv_timeout(TICK) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Timeout) => tick()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::Internal("a thread of the pool ended".to_owned()));
            }
        }
    }
}

/// What `work` gives; a panic becomes an error.
///
/// # Errors
/// Those of `work`, and [`Error::Internal`].
pub fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|payload| Err(Error::Internal(panic_text(payload.as_ref()))))
}

/// What a panic said.
pub fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic".to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn slots_that_are_locked_for_ever_do_not_block() {
        let held: Vec<_> = SLOTS.iter().take(15).map(|slot| slot.lock().unwrap()).collect();
        let pool = pool(2).unwrap();
        assert_eq!(pool.current_num_threads(), 2);
        drop(held);
    }
}
