//! Log-probs of pairs in, losses and means out. A batch of pairs takes microseconds, so the GIL stays.

// PyO3 extracts arguments as owned values.
#![allow(clippy::needless_pass_by_value)]

use numpy::{
    Element as NumpyElement, IntoPyArray, PyArray, PyArray0, PyArray1, PyArray2, PyArrayMethods,
    PyReadonlyArray2,
};
use pyo3::prelude::*;

use crate::error::Error;
use crate::loss::{Dpo, Real, means};

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(dpo_loss, m)?)?;
    m.add_function(wrap_pyfunction!(pair_means, m)?)
}

/// An array of pairs in either dtype.
#[derive(FromPyObject)]
enum Pairs<'py> {
    Single(PyReadonlyArray2<'py, f32>),
    Double(PyReadonlyArray2<'py, f64>),
}

fn of_two_dtypes() -> PyErr {
    Error::Tensor("`ref_logps` must have the dtype of `logps`".into()).into()
}

/// Total, loss of each pair (N), slopes (N, 2).
type Losses<'py, T> = (Bound<'py, PyArray0<T>>, Bound<'py, PyArray1<T>>, Bound<'py, PyArray2<T>>);

fn losses<'py, T: Real + NumpyElement>(
    py: Python<'py>,
    dpo: Dpo,
    logps: &PyReadonlyArray2<'py, T>,
    ref_logps: &PyReadonlyArray2<'py, T>,
) -> PyResult<Losses<'py, T>> {
    let loss = dpo.of_pairs(logps.as_slice()?, ref_logps.as_slice()?)?;
    let n = loss.per_pair.len();
    let total = PyArray::from_owned_array(py, numpy::ndarray::arr0(loss.total));
    Ok((total, loss.per_pair.into_pyarray(py), loss.slopes.into_pyarray(py).reshape((n, 2))?))
}

#[pyfunction]
#[pyo3(signature = (logps, ref_logps, beta, margin=0.0, label_smoothing=0.0))]
fn dpo_loss<'py>(
    py: Python<'py>,
    logps: Pairs<'py>,
    ref_logps: Pairs<'py>,
    beta: f64,
    margin: f64,
    label_smoothing: f64,
) -> PyResult<Bound<'py, PyAny>> {
    let dpo = Dpo { beta, margin, label_smoothing };
    let made = match (&logps, &ref_logps) {
        (Pairs::Single(logps), Pairs::Single(ref_logps)) => {
            losses(py, dpo, logps, ref_logps)?.into_pyobject(py)?
        }
        (Pairs::Double(logps), Pairs::Double(ref_logps)) => {
            losses(py, dpo, logps, ref_logps)?.into_pyobject(py)?
        }
        _ => return Err(of_two_dtypes()),
    };
    Ok(made.into_any())
}

#[pyfunction]
fn pair_means<'py>(
    py: Python<'py>,
    logps: Pairs<'py>,
    ref_logps: Option<Pairs<'py>>,
    scale: f64,
) -> PyResult<Bound<'py, PyAny>> {
    fn of<'py, T: Real + NumpyElement>(
        py: Python<'py>,
        logps: &PyReadonlyArray2<'py, T>,
        ref_logps: Option<&PyReadonlyArray2<'py, T>>,
        scale: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let ref_logps = ref_logps.map(PyReadonlyArray2::as_slice).transpose()?;
        Ok(means(logps.as_slice()?, ref_logps, scale)?.to_vec().into_pyarray(py).into_any())
    }
    match (&logps, &ref_logps) {
        (Pairs::Single(logps), None) => of(py, logps, None, scale),
        (Pairs::Single(logps), Some(Pairs::Single(other))) => of(py, logps, Some(other), scale),
        (Pairs::Double(logps), None) => of(py, logps, None, scale),
        (Pairs::Double(logps), Some(Pairs::Double(other))) => of(py, logps, Some(other), scale),
        _ => Err(of_two_dtypes()),
    }
}
