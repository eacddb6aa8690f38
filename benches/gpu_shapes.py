"""Small shapes for compute-sanitizer, each compared with float64: run by benches/gpu_check.py.

- `smoke`: one launch of every kernel in every form, few rows and many, over dtypes and caps;
- `kernels`: every kernel over dtypes, caps, widths, strides and alignments (K4, K5), targets and
  rows out of range (K1), nothing to do (K3), special values (K6), NaN in rows that are not scored
  (K7); more than 2^31 elements (K2) are in tests/test_gpu.py: a sanitizer has no room for them;
- `plans`: each plan of the fused head, in chunks, with a pair longer than a chunk;
- `streams`: two streams at a time give the bits of one (K10).

    python benches/gpu_shapes.py {smoke,kernels,plans,streams} [--device cpu]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from dpo_ext.torch import ScoreTable, linear_preference_loss, linear_sequence_logps
from dpo_ext.torch.logps import cuda, ops

sys.path.append(str(Path(__file__).parent / "head"))
from elements import first_wrong

assert ops.DTYPES  # importing registers the operators
OPS = torch.ops.dpo_ext
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (1.0, 0.0, 1.0)
LAYOUTS = (  # columns, elements past an aligned address, gap between rows
    (1, 0, 0), (7, 1, 0), (8, 0, 0), (33, 1, 3), (129, 5, 0), (1000, 0, 8), (8193, 1, 0),
    (32_768, 0, 0), (40_003, 3, 5), (70_000, 0, 0),
)  # fmt: skip
FAR = 2**62
INF, NAN = math.inf, math.nan


class Shapes:
    """Runs shapes on one device and counts them."""

    def __init__(self, device: str) -> None:
        self.device, self.count = device, 0

    def tensor(self, values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def check(self, logits: Tensor, rows: list[int], targets: list[int], softcap: float) -> None:
        """Log-probs, gradients fresh and in place, and sums, against float64."""
        how = (1.0, softcap, 1.0)
        place, t = self.tensor(rows, torch.int64), self.tensor(targets, torch.int32)
        scores = OPS.token_stats(logits, place, t, *how, True)
        grad = torch.ones(len(rows), device=self.device)
        before = logits.clone()
        saved = (place, t, *scores[1:3], grad)
        fresh = OPS.logits_grad(logits, *saved, *how)
        OPS.logits_grad_(logits, *saved, *how)
        same("in place", logits, fresh)
        height, columns = before.shape
        for token, (row, target) in enumerate(zip(rows, targets, strict=True)):
            got = scores[0][token].item()
            if target == -100:
                want = 0.0
            elif not (0 <= row < height and 0 <= target < columns):
                want = NAN
            else:
                leaf = before[row].double().requires_grad_()
                y = softcap * torch.tanh(leaf / softcap) if softcap else leaf
                logp = y.log_softmax(-1)[target]
                logp.backward()
                want, eps = logp.item(), max(torch.finfo(before.dtype).eps, 1e-5)
                error = (fresh[row].double() - leaf.grad).norm().item()
                allowed = eps * leaf.grad.norm().item() + 1e-6
                if not error <= allowed:
                    where = first_wrong(fresh[row], leaf.grad, eps * leaf.grad.abs().max().item())
                    raise AssertionError(
                        f"gradient of row {row}, off by {error}, allowed {allowed}: {where}"
                    )
            near(f"log-prob of token {token}", got, want, 1e-5 * max(1.0, abs(want)))
        unscored = [r for r in range(height) if r not in rows or targets[rows.index(r)] == -100]
        same("rows that are not scored", fresh[unscored], torch.zeros_like(fresh[unscored]))
        # Offsets that fall or lie outside give NaN and touch nothing (K1), an empty one 0 (K3).
        offsets = self.tensor([0, 0, 2, 2, len(rows) + 1, 0, -1], torch.int32)
        sums = OPS.segment_sum(scores[0], None, offsets).tolist()
        near("sum of nothing", sums[0] + sums[2], 0.0, 0.0)
        near("sum of two", sums[1], scores[0][:2].double().sum().item(), 1e-5)
        for wrong in sums[3:]:
            near("sum of what does not exist", wrong, NAN, 0.0)
        self.count += 1

    def smoke(self) -> None:
        """Every kernel in every form: asked of the launch layer, whatever the operators choose."""
        torch.manual_seed(0)
        many = 8 * cuda.processors(torch.device(self.device))
        for dtype in DTYPES:
            for softcap in (0.0, 5.0):
                for stats in (False, True):
                    for count in (3, many):
                        self.launch(dtype, softcap, stats, count)

    def launch(self, dtype: torch.dtype, softcap: float, stats: bool, count: int) -> None:
        columns, how = 32_800, (1.0, softcap, 1.0)
        logits = torch.randn(count, columns, device=self.device).to(dtype)
        rows = torch.arange(count, device=self.device)
        targets = torch.randint(0, columns, (count,), device=self.device).int()
        logps, row_max, row_rest, *_ = cuda.token_stats(logits, rows, targets, *how, stats)
        dz, grad = torch.empty_like(logits), torch.ones_like(logps)
        cuda.logits_grad(logits, rows, targets, row_max, row_rest, grad, *how, dz)
        sums = cuda.segment_sum(logps, None, self.tensor([0, count], torch.int32))
        y = logits.double()
        y = softcap * torch.tanh(y / softcap) if softcap else y
        want = y.log_softmax(-1).gather(1, targets.long()[:, None])[:, 0]
        what = f"{dtype}, softcap {softcap}, stats {stats}, {count} rows"
        if not ((logps - want).abs() <= 1e-4).all():
            raise AssertionError(f"log-probs, {what}: {first_wrong(logps, want, 1e-4)}")
        # A row of gradients adds up to 0, but for its roundings and the slope of a cap.
        total = dz.double().sum(-1)
        if not softcap and not (total.abs() <= 0.02).all():
            where = first_wrong(total, torch.zeros_like(total), 0.02)
            raise AssertionError(f"sums of gradients, {what}: {where}")
        near(f"sum of log-probs, {what}", sums.item(), want.sum().item(), 1e-4 * count)
        self.count += 1

    def kernels(self) -> None:
        torch.manual_seed(0)
        for dtype in DTYPES:
            for softcap in (0.0, 5.0):
                for columns, offset, gap in LAYOUTS:
                    stride = columns + gap
                    flat = torch.randn(offset + 3 * stride + columns, device=self.device).to(dtype)
                    logits = flat.as_strided((4, columns), (stride, 1), offset)
                    logits[1] = NAN  # not scored: never read
                    far = columns if columns % 2 else 2**31 - 1
                    targets = [columns - 1, -100, far, 0]
                    self.check(logits, [2, 1, 0, FAR if softcap else 9], targets, softcap)
            self.nothing(dtype)
            self.specials(dtype)

    def nothing(self, dtype: torch.dtype) -> None:
        """No tokens, no rows, no columns to speak of, no sequences."""
        for rows in (0, 3):
            logits = torch.zeros(rows, 9, dtype=dtype, device=self.device)
            none = self.tensor([], torch.int64), self.tensor([], torch.int32)
            scores = OPS.token_stats(logits, *none, *PLAIN, True)
            if any(len(column) for column in scores):
                raise AssertionError("statistics of no tokens")
            saved = (*none, *scores[1:3], scores[0])
            same("no tokens", OPS.logits_grad(logits, *saved, *PLAIN), logits)
            OPS.logits_grad_(logits, *saved, *PLAIN)
            for sequences in (0, 2):
                offsets = self.tensor([0] * (sequences + 1), torch.int32)
                sums = OPS.segment_sum(scores[0], None, offsets)
                same("sums of nothing", sums, torch.zeros_like(sums))
            self.count += 1

    def specials(self, dtype: torch.dtype) -> None:
        """NaN and infinities stay in their row: targets, other columns, first and last."""
        columns = 4099
        logits = torch.randn(6, columns, device=self.device).to(dtype)
        logits[0, columns - 1] = NAN
        logits[1, 5] = -INF
        logits[2, 0], logits[3] = -INF, -INF
        logits[4, 17] = INF
        targets, want = [3, 5, 7, 0, 3, 9], [NAN, -INF, None, NAN, NAN, None]
        rows = self.tensor(list(range(6)), torch.int64)
        t = self.tensor(targets, torch.int32)
        scores = OPS.token_stats(logits, rows, t, *PLAIN, True)
        for row, expected in enumerate(want):
            if expected is None:
                expected = logits[row].double().log_softmax(-1)[targets[row]].item()
            got = scores[0][row].item()
            # A row of -inf alone has no log-prob, and one with +inf has none for the others.
            if row == 3 or row == 4:
                if math.isfinite(got):
                    raise AssertionError(f"special row {row}: found {got}")
                continue
            near(f"special row {row}", got, expected, 1e-4)
        dz = OPS.logits_grad(logits, rows, t, *scores[1:3], torch.ones_like(scores[0]), *PLAIN)
        for row in (2, 5):
            if not torch.isfinite(dz[row]).all():
                column = int((~torch.isfinite(dz[row])).int().argmax())
                found = f"element [{row}, {column}]: found {dz[row, column].item()}"
                raise AssertionError(f"NaN or infinity has left its row: {found}")
        self.count += 1

    def plans(self) -> None:
        torch.manual_seed(0)
        for dtype in DTYPES:
            for plan in ("frozen", "recompute", "pairwise"):
                for columns, chunk in ((33, 1), (129, 5), (1000, 8)):
                    self.head(dtype, plan, columns, chunk)

    def head(self, dtype: torch.dtype, plan: str, columns: int, chunk: int) -> None:
        """Two pairs, one longer than a chunk; NaN in hidden rows that are not scored."""
        hidden = torch.randn(16, 24, device=self.device).to(dtype)
        weight = (torch.randn(columns, 24, device=self.device) / 24**0.5).to(dtype)
        rows = torch.arange(1, 12, device=self.device)
        targets = torch.randint(0, columns, (11,), device=self.device).int()
        targets[3] = -100
        offsets = self.tensor([0, 4, 8, 9, 11], torch.int32)
        table = ScoreTable(logit_rows=rows, targets=targets, seq_offsets=offsets)
        dirty = hidden.clone()
        dirty[0], dirty[4], dirty[12:] = NAN, NAN, NAN
        found = []
        for x, w, impl in ((dirty, weight, "auto"), (hidden.double(), weight.double(), "torch")):
            x, w = x.clone().requires_grad_(), w.clone().requires_grad_(plan != "frozen")
            options = {"plan": plan, "chunk_rows": chunk, "impl": impl}
            if plan == "pairwise":
                reference = torch.zeros(2, 2, device=self.device)
                value = linear_preference_loss(x, w, table, reference, **options).loss
            else:
                value = linear_sequence_logps(x, w, table, **options).sum()
            value.backward()
            found.append([value.detach(), x.grad, *([] if w.grad is None else [w.grad])])
        allowed = 1e-4 if dtype == torch.float32 else 0.1
        parts = ("value", "dX", "dW")
        for part, ours, want in zip(parts, *found, strict=False):
            error = ((ours.double() - want).norm() / want.norm()).item()
            if not error <= allowed:
                where = first_wrong(ours, want, allowed * want.abs().max().item())
                raise AssertionError(
                    f"{part} of {plan}, {dtype}, V {columns}: off by {error}, "
                    f"allowed {allowed}: {where}"
                )
        self.count += 1

    def streams(self) -> None:
        """Two streams at a time, 500 rounds, each with its own buffers: the bits of one alone."""
        if self.device != "cuda":
            raise SystemExit("streams: a CPU has none")
        torch.manual_seed(0)
        rows = torch.arange(64, device="cuda")
        both = []
        for _ in range(2):
            values = torch.randn(64, 50_257, device="cuda").bfloat16()
            targets = torch.randint(0, 50_257, (64,), device="cuda").int()
            both.append((torch.cuda.Stream(), values, targets, torch.empty_like(values)))

        def work(values: Tensor, targets: Tensor, out: Tensor) -> Tensor:
            out.copy_(values)
            scores = OPS.token_stats(out, rows, targets, *PLAIN, False)
            grad = torch.ones(64, device="cuda")
            OPS.logits_grad_(out, rows, targets, *scores[1:3], grad, *PLAIN)
            return scores[0]

        alone = [(work(*rest), rest[2].clone()) for _, *rest in both]
        torch.cuda.synchronize()
        for _ in range(500):
            got = []
            for stream, *rest in both:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(10_000)
                    got.append(work(*rest))
            torch.cuda.synchronize()
            for (logps, dz), mine, (_, _, _, out) in zip(alone, got, both, strict=True):
                same("log-probs of two streams", mine, logps)
                same("gradients of two streams", out, dz)
        self.count += 2


def near(what: str, got: float, want: float, allowed: float) -> None:
    if math.isnan(want) and math.isnan(got):
        return
    if got != want and not abs(got - want) <= allowed:
        raise AssertionError(f"{what}: found {got}, expected {want}")


def same(what: str, got: Tensor, want: Tensor) -> None:
    if not torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)):
        raise AssertionError(f"{what}: {first_wrong(got, want, 0.0)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=["smoke", "kernels", "plans", "streams"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    shapes = Shapes(arguments.device)
    getattr(shapes, arguments.group)()
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    print(f"{shapes.count} shapes agree with float64")


if __name__ == "__main__":
    main()
