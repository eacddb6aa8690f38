//! What a fork of this process waits for.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::fork;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(begin_section, m)?)?;
    m.add_function(wrap_pyfunction!(end_section, m)?)?;
    let py = m.py();
    // Windows does not fork.
    if let Ok(register) = py.import("os")?.getattr("register_at_fork") {
        let hooks = PyDict::new(py);
        hooks.set_item("before", wrap_pyfunction!(before_fork, py)?)?;
        hooks.set_item("after_in_parent", wrap_pyfunction!(after_fork_in_parent, py)?)?;
        hooks.set_item("after_in_child", wrap_pyfunction!(after_fork_in_child, py)?)?;
        register.call((), Some(&hooks))?;
    }
    Ok(())
}

/// Holds forks of other threads off until `end_section`, which this thread must call.
#[pyfunction]
fn begin_section(py: Python<'_>) -> PyResult<()> {
    Ok(py.detach(|| fork::section().map(fork::Section::go_on))?)
}

#[pyfunction]
fn end_section() {
    fork::end();
}

#[pyfunction]
fn before_fork(py: Python<'_>) {
    py.detach(fork::before);
}

#[pyfunction]
fn after_fork_in_parent() {
    fork::after_in_parent();
}

#[pyfunction]
fn after_fork_in_child() {
    fork::after_in_child();
}
