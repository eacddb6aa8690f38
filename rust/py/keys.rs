//! Keys of sequences, and the table from keys to rows.

// PyO3 extracts arguments as owned values.
#![allow(clippy::needless_pass_by_value)]

use std::sync::atomic::Ordering;

use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::arrays::{Ids, Offsets};
use super::wait::{detached, waited_scoped};
use crate::encode::Progress;
use crate::error::{Error, Result};
use crate::layout::Lists;
use crate::layout::keys::{Key, KeyTable, Side, digest, sequence_keys};

/// More sequences than these go to the pool, where a signal stops them.
const FEW: usize = 4096;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(example_keys, m)?)?;
    m.add_function(wrap_pyfunction!(hash_bytes, m)?)?;
    m.add_class::<Keys>()
}

/// Runs `work` without the GIL; what is long is stopped by a signal.
fn run<T: Send>(
    py: Python<'_>,
    n: usize,
    work: impl FnOnce(&(dyn Fn() -> bool + Sync)) -> Result<T> + Send,
) -> PyResult<T> {
    if n <= FEW {
        return detached(py, || work(&|| false));
    }
    let progress = Progress::default();
    waited_scoped(py, None, &progress, None, || work(&|| progress.cancel.load(Ordering::Relaxed)))
}

/// 16 bytes, a digest of (n,) uint8.
#[pyfunction]
fn hash_bytes<'py>(
    py: Python<'py>,
    bytes: PyReadonlyArray1<'py, u8>,
) -> PyResult<Bound<'py, PyBytes>> {
    let bytes = bytes.as_slice()?;
    let found = run(py, bytes.len() / 256, |stop| digest(bytes, stop))?;
    Ok(PyBytes::new(py, &found))
}

type SideIn<'py> = (Ids<'py>, Offsets<'py>, Option<PyReadonlyArray1<'py, f32>>);

/// (2 * examples * sides,) uint64: the keys of the examples `index`, two numbers a key, the sides of one together.
#[pyfunction]
fn example_keys<'py>(
    py: Python<'py>,
    prompt: (Ids<'py>, Offsets<'py>),
    sides: Vec<SideIn<'py>>,
    index: PyReadonlyArray1<'py, i64>,
) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let index = index.as_slice()?;
    let prompt = Lists::trusted(prompt.0.as_slice()?, prompt.1.as_slice()?);
    let sides = sides
        .iter()
        .map(|(ids, offsets, weights)| {
            Ok(Side {
                ids: Lists::trusted(ids.as_slice()?, offsets.as_slice()?),
                weights: weights.as_ref().map(PyReadonlyArray1::as_slice).transpose()?,
            })
        })
        .collect::<PyResult<Vec<_>>>()?;
    let out = PyArray1::<u64>::zeros(py, 2 * index.len() * sides.len(), false);
    {
        let mut lent = out.try_readwrite()?;
        let keys = in_pairs_mut(lent.as_slice_mut()?);
        run(py, keys.len(), |stop| sequence_keys(prompt, &sides, index, keys, stop))?;
    }
    Ok(out)
}

/// Rows by key: each new key gets the next row.
#[pyclass(name = "KeyTable", module = "dpo_ext._core")]
struct Keys(KeyTable);

#[pymethods]
impl Keys {
    #[new]
    fn new() -> Self {
        Self(KeyTable::default())
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// Makes room for so many more rows.
    fn reserve(&mut self, py: Python<'_>, more: usize) -> PyResult<()> {
        let table = &mut self.0;
        detached(py, || table.reserve(more))
    }

    /// (n,) int64: the row of each key, a new one for a key that was not there.
    fn add<'py>(
        &mut self,
        py: Python<'py>,
        keys: PyReadonlyArray1<'py, u64>,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let keys = in_pairs(keys.as_slice()?)?;
        let out = PyArray1::<i64>::zeros(py, keys.len(), false);
        {
            let mut lent = out.try_readwrite()?;
            let rows = lent.as_slice_mut()?;
            let table = &mut self.0;
            run(py, keys.len(), |stop| table.add(keys, rows, stop))?;
        }
        Ok(out)
    }

    /// (n,) int64: the row of each key, -1 for a key that is not there.
    fn find<'py>(
        &self,
        py: Python<'py>,
        keys: PyReadonlyArray1<'py, u64>,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let keys = in_pairs(keys.as_slice()?)?;
        let out = PyArray1::<i64>::zeros(py, keys.len(), false);
        {
            let mut lent = out.try_readwrite()?;
            let rows = lent.as_slice_mut()?;
            let table = &self.0;
            run(py, keys.len(), |stop| table.find(keys, rows, stop))?;
        }
        Ok(out)
    }
}

fn in_pairs(numbers: &[u64]) -> PyResult<&[Key]> {
    match numbers.as_chunks() {
        (keys, []) => Ok(keys),
        _ => Err(Error::Value("expected two numbers a key".to_owned()).into()),
    }
}

fn in_pairs_mut(numbers: &mut [u64]) -> &mut [Key] {
    numbers.as_chunks_mut().0
}
