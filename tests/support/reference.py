"""The float64 oracle of the log-probs, in NumPy, written from the equations one token at a time.

The package never imports it; it imports nothing of the package. M scored tokens, S sequences,
R rows, V vocabulary, H hidden. Everything is float64, so a number here is right to about 1e-14.

    y = logit_scale * z;  y = softcap * tanh(y / softcap) if softcap;  y = y / temperature
    m = max_v y_v          S = sum_v exp(y_v - m)          p_v = exp(y_v - m) / S
    logp     = (y_t - m) - log S          entropy    = -sum_v p_v log p_v     (0 log 0 = 0)
    mean     = sum_v y_v / V              log_sum_sq = log sum_v p_v^2        top1: lowest argmax is t
    d logp / d z_j = (I(j = t) - p_j) * dy_j/dz_j
"""

from __future__ import annotations

import itertools
import math

import numpy as np

IGNORE = -100


def transform(z, *, logit_scale=1.0, softcap=None, temperature=1.0):
    """(y, dy/dz) of raw logits z, elementwise."""
    z = np.asarray(z, dtype=np.float64)
    y = logit_scale * z
    slope = np.full_like(y, logit_scale)
    if softcap is not None:
        t = np.tanh(y / softcap)
        y = softcap * t
        slope = slope * (1.0 - t) * (1.0 + t)
    return y / temperature, slope / temperature


def row(y, target):
    """Statistics of one transformed row and the probabilities: (dict, p, 1 - p_target)."""
    m = y.max()
    if not np.isfinite(m):  # all -inf, any +inf, any NaN: nothing is defined
        nan = math.nan
        stats = {"logp": nan, "entropy": nan, "mean_logit": y.mean(), "log_sum_sq": nan}
        return stats | {"is_top1": False}, np.full_like(y, nan), nan
    e = np.exp(y - m)
    others = np.delete(e, target)
    rest, e_target = math.fsum(others), e[target]
    total = rest + e_target
    logp = -math.log1p(rest) if y[target] == m else (y[target] - m) - math.log(total)
    p = e / total
    seen = e > 0
    stats = {
        "logp": logp,
        "entropy": math.log(total) - math.fsum(e[seen] * (y - m)[seen]) / total,
        "mean_logit": -math.inf if np.isneginf(y).any() else math.fsum(y) / len(y),
        "log_sum_sq": math.log(math.fsum(e * e)) - 2.0 * math.log(total),
        "is_top1": bool(np.flatnonzero(y == m)[0] == target),
    }
    return stats, p, rest / total


def token_stats(logits, logit_rows, targets, **how):
    """Dict of (M,) arrays: logp, entropy, mean_logit, log_sum_sq float64, is_top1 bool.

    Not scored (-100): 0. Target outside [0, V) or row outside [0, R): logp NaN, and so are the rest.
    """
    R, V = np.shape(logits)
    M = len(targets)
    out = {name: np.zeros(M) for name in ("logp", "entropy", "mean_logit", "log_sum_sq")}
    out["is_top1"] = np.zeros(M, dtype=bool)
    for i, (r, t) in enumerate(zip(logit_rows, targets, strict=True)):
        if t == IGNORE:
            continue
        if not (0 <= t < V and 0 <= r < R):
            for name in ("logp", "entropy", "mean_logit", "log_sum_sq"):
                out[name][i] = math.nan
            continue
        y, _ = transform(logits[r], **how)
        for name, value in row(y, t)[0].items():
            out[name][i] = value
    return out


def segment_sum(values, weights, seq_offsets):
    """(S,) exactly rounded sums of w * v; a weight of exactly 0 selects nothing, even of NaN."""
    values = np.asarray(values, dtype=np.float64)
    w = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    product = np.zeros_like(values)
    product[w != 0] = w[w != 0] * values[w != 0]
    sums = []
    for a, b in itertools.pairwise(seq_offsets):
        part = product[a:b]
        sums.append(math.fsum(part) if np.isfinite(part).all() else float(np.sum(part)))
    return np.array(sums)


def sequence_logps(logits, table, **how):
    """(n_groups, group_size) sums of w * logp; `table` is a dict with the fields of a score table."""
    logp = token_stats(logits, table["logit_rows"], table["targets"], **how)["logp"]
    sums = segment_sum(logp, table.get("weights"), table["seq_offsets"])
    return sums.reshape(-1, table.get("group_size", 2))


def token_upstream(upstream, weights, seq_offsets):
    """(M,) dL/dlogp of each token from dL/d(sequence log-prob), any shape in sequence order."""
    g = np.repeat(np.asarray(upstream, dtype=np.float64).ravel(), np.diff(seq_offsets))
    return g if weights is None else g * np.asarray(weights, dtype=np.float64)


def logits_grad(logits, logit_rows, targets, grad, **how):
    """(R, V) dL/dlogits for dL/dlogp = `grad` (M,); exactly 0 in rows that no scored token names."""
    R, V = np.shape(logits)
    out = np.zeros((R, V))
    for r, t, g in zip(logit_rows, targets, grad, strict=True):
        if t == IGNORE or g == 0 or not 0 <= r < R:
            continue
        if not 0 <= t < V:
            out[r] += math.nan
            continue
        y, slope = transform(logits[r], **how)
        _, p, complement = row(y, t)
        step = -p
        step[t] = complement
        out[r] += g * step * slope
    return out


def linear_grads(hidden, weight, bias, logit_rows, targets, grad, **how):
    """(dX (R, H), dW (V, H), db (V,)) of z = X W^T + b, from dL/dlogp of each token."""
    hidden, weight = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
    scored = sorted({int(r) for r, t in zip(logit_rows, targets, strict=True) if t != IGNORE})
    x = np.zeros_like(hidden)
    x[scored] = hidden[scored]  # what is not scored is not looked at
    z = x @ weight.T + (0.0 if bias is None else np.asarray(bias, np.float64))
    dz = logits_grad(z, logit_rows, targets, grad, **how)
    return dz @ weight, dz.T @ x, dz.sum(axis=0)


def table_from_labels(labels):
    """The score table of HF labels (2N, T), chosen rows first: position t predicts labels[t + 1].

    Compact: only what is scored. Interleaved: chosen 0, rejected 0, chosen 1, ...
    """
    rows, T = np.shape(labels)
    logit_rows, targets, offsets = [], [], [0]
    for pair in range(rows // 2):
        for r in (pair, rows // 2 + pair):
            for t in range(T - 1):
                if labels[r][t + 1] != IGNORE:
                    logit_rows.append(r * T + t)
                    targets.append(int(labels[r][t + 1]))
            offsets.append(len(targets))
    return {
        "logit_rows": np.array(logit_rows, dtype=np.int64),
        "targets": np.array(targets, dtype=np.int32),
        "seq_offsets": np.array(offsets, dtype=np.int32),
    }
