//! Arrays that Python lends and is given.

use numpy::{IntoPyArray, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::encode::Ragged;

pub(super) type Ids<'py> = PyReadonlyArray1<'py, i32>;
pub(super) type Offsets<'py> = PyReadonlyArray1<'py, i64>;
pub(super) type Out<'py, T> = PyReadwriteArray1<'py, T>;

/// Lists as (values, offsets).
pub(super) fn ragged_tuple(py: Python<'_>, ragged: Ragged) -> PyResult<Bound<'_, PyTuple>> {
    (ragged.values.into_pyarray(py), ragged.offsets.into_pyarray(py)).into_pyobject(py)
}
