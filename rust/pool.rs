//! The thread pool: one per process, built lazily, so that it survives a fork.

use std::sync::{Arc, Mutex, PoisonError};

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
