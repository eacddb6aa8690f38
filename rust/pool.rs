//! The thread pool: one per process, built lazily, so that it survives a fork.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::error::{Error, Result};

static POOLS: Mutex<Vec<(u32, usize, Arc<rayon::ThreadPool>)>> = Mutex::new(Vec::new());

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
/// [`Error::Internal`] if the system refuses to start threads.
pub fn pool(n: usize) -> Result<Arc<rayon::ThreadPool>> {
    let pid = std::process::id();
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, _, pool)) = pools.iter().find(|(p, size, _)| *p == pid && *size == n) {
        return Ok(Arc::clone(pool));
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(n)
        .thread_name(|i| format!("dpo_ext-{i}"))
        .build()
        .map_err(|e| Error::Internal(format!("cannot start {n} threads: {e}")))?;
    let pool = Arc::new(pool);
    // Pools of a parent process have no threads here and joining them would hang: they are leaked on purpose.
    pools.retain_mut(|(p, _, old)| {
        let ours = *p == pid;
        if !ours {
            std::mem::forget(Arc::clone(old));
        }
        ours
    });
    pools.push((pid, n, Arc::clone(&pool)));
    Ok(pool)
}

/// How long the caller of [`run`] waits between two calls of `tick`.
pub const TICK: Duration = Duration::from_millis(40);

/// Runs `work` on the pool of `n` threads while the caller waits and calls `tick` at least every 40 ms.
///
/// If `tick` fails, `run` returns its error at once: the work is told by `tick` itself to stop, and whatever it still
/// returns is thrown away. A panic of `work` becomes [`Error::Internal`].
///
/// # Errors
/// Those of `work` and `tick`, and [`Error::Internal`].
pub fn run<T: Send + 'static>(
    n: usize,
    work: impl FnOnce() -> Result<T> + Send + 'static,
    mut tick: impl FnMut() -> Result<()>,
) -> Result<T> {
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    pool(n)?.spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(work))
            .unwrap_or_else(|payload| Err(Error::Internal(panic_text(payload.as_ref()))));
        // Nobody listens after an interrupt.
        let _ = sender.send(result);
    });
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

/// As [`run`], for work that borrows: it is waited for, after a failed `tick` too.
///
/// # Errors
/// Those of `work` and `tick`, and [`Error::Internal`].
pub fn run_scoped<T: Send>(
    n: usize,
    work: impl FnOnce() -> Result<T> + Send,
    mut tick: impl FnMut() -> Result<()>,
) -> Result<T> {
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    pool(n)?.in_place_scope(|scope| {
        scope.spawn(move |_| {
            let result = catch_unwind(AssertUnwindSafe(work))
                .unwrap_or_else(|payload| Err(Error::Internal(panic_text(payload.as_ref()))));
            // Nobody listens after an interrupt.
            let _ = sender.send(result);
        });
        loop {
            match receiver.recv_timeout(TICK) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) => tick()?,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Internal("a thread of the pool ended".to_owned()));
                }
            }
        }
    })
}

/// What a panic said.
pub fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic".to_owned())
}
