//! Waiting for Rust without the GIL: signals and progress, and panics that never reach Python.

use std::sync::atomic::Ordering;

use pyo3::prelude::*;

use crate::encode::Progress;
use crate::error::{Error, Result};
use crate::pool::{self, Running};

/// Runs `work` without the GIL; a panic becomes an internal error and never reaches Python.
pub(super) fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    py.detach(|| pool::caught(work)).map_err(PyErr::from)
}

/// Tells the callback how far the work is.
pub(super) fn report(py: Python<'_>, progress: &Progress, callback: &Py<PyAny>) -> PyResult<()> {
    let done = progress.bytes.load(Ordering::Relaxed);
    let rows = progress.rows.load(Ordering::Relaxed);
    callback.call1(py, (done, rows)).map(drop)
}

/// Waits for work on the pool without the GIL; attaches at least every 50 ms for signals and the progress callback.
pub(super) fn waited<T: Send + 'static>(
    py: Python<'_>,
    threads: Option<usize>,
    progress: &Progress,
    callback: Option<&Py<PyAny>>,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> PyResult<T> {
    let running = pool::start(pool::threads(threads), work)?;
    awaited(py, running, progress, callback)
}

/// Waits for work that was started; as [`waited`].
pub(super) fn awaited<T: Send>(
    py: Python<'_>,
    running: Running<T>,
    progress: &Progress,
    callback: Option<&Py<PyAny>>,
) -> PyResult<T> {
    ticking(py, progress, callback, |mut tick| running.wait(&mut tick))
}

/// As [`waited`], for work that borrows: an interrupt, too, waits until it stops.
pub(super) fn waited_scoped<T: Send>(
    py: Python<'_>,
    threads: Option<usize>,
    progress: &Progress,
    callback: Option<&Py<PyAny>>,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    let threads = pool::threads(threads);
    ticking(py, progress, callback, |tick| pool::run_scoped(threads, work, tick))
}

/// Whether work was told to stop.
pub(super) type Stop<'a> = &'a (dyn Fn() -> bool + Sync);

/// Work of one thread that borrows, and asks its argument now and then; a signal stops what `is_long`.
pub(super) fn stoppable<T: Send>(
    py: Python<'_>,
    is_long: bool,
    work: impl FnOnce(Stop<'_>) -> Result<T> + Send,
) -> PyResult<T> {
    if !is_long {
        return detached(py, || work(&|| false));
    }
    let progress = Progress::default();
    let stop = || progress.cancel.load(Ordering::Relaxed);
    ticking(py, &progress, None, |tick| pool::alone_scoped(|| work(&stop), tick))
}

/// Work of one thread that owns what it needs; a signal does not wait for what `is_long`.
pub(super) fn left<T: Send + 'static>(
    py: Python<'_>,
    is_long: bool,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> PyResult<T> {
    if !is_long {
        return detached(py, work);
    }
    ticking(py, &Progress::default(), None, |tick| pool::alone(work, tick))
}

/// Calls `run` without the GIL, with a function that attaches for signals and the progress callback.
fn ticking<T: Send>(
    py: Python<'_>,
    progress: &Progress,
    callback: Option<&Py<PyAny>>,
    run: impl FnOnce(&mut (dyn FnMut() -> Result<()> + Send)) -> Result<T> + Send,
) -> PyResult<T> {
    let mut raised: Option<PyErr> = None;
    let result = py.detach(|| {
        run(&mut || {
            Python::attach(|py| {
                let called = py.check_signals().and_then(|()| match callback {
                    Some(callback) => report(py, progress, callback),
                    None => Ok(()),
                });
                called.map_err(|e| {
                    raised = Some(e);
                    progress.cancel.store(true, Ordering::Relaxed);
                    Error::Interrupted
                })
            })
        })
    });
    match raised {
        Some(e) => Err(e),
        None => Ok(result?),
    }
}
