"""The prediction of benches/head: its limits by numbers worked out by hand, and a prediction for every row that is timed."""

from __future__ import annotations

import itertools
import json
import math
import sys

import pytest
import torch
from head_bench import COPY, LLAMA, RATE, importable, main_of_head

benches = pytest.fixture(scope="module", autouse=True)(importable)


@pytest.fixture
def h200():
    import model

    device = model.device_called("NVIDIA H200")
    assert (device.sms, device.arch) == (132, "sm_90")
    return device


@pytest.mark.parametrize(
    ("blocks", "share"), [(400, 51), (512, 65), (800, 67), (1024, 86), (4096, 94), (396, 100), (1, 0)]
)  # fmt: skip
def test_waves_of_396_slots(blocks, share):
    import model

    assert round(100 * model.efficiency(blocks, 3 * 132)) == share


def test_a_rate_is_the_least_of_bytes_instructions_and_special_functions(h200):
    import model

    # 132 SMs x 128 lanes x 1.8 GHz: 3.04e13 instructions a second, of which 90 % are filled.
    rate = lambda instructions, special: model.column_rate(h200, model.Code(instructions, special, 3), 2)  # noqa: E731  # fmt: skip
    assert rate(9.4, 1.0) == 4300e9 / 2
    assert rate(19.7, 1.0) == pytest.approx(2.737e13 / 19.7, rel=1e-3)
    assert rate(19.7, 1.0) * 2 / 4300e9 == pytest.approx(0.646, abs=1e-3)
    # 132 x 16 x 1.8 GHz: 3.80e12 exponentials a second
    assert rate(1.0, 3.0) == pytest.approx(3.802e12 / 3, rel=1e-3)
    assert rate(1.0, 0.0) == 4300e9 / 2


def test_a_kernel_takes_its_waves_and_each_launch_a_gap(h200, monkeypatch):
    import model

    monkeypatch.setattr(model, "code", lambda: {("fold", "sm_90"): model.Code(1.0, 0.0, 3)})
    of = [model.Launch("fold", 400), model.Launch("finish", 2)]
    # 400 rows of 100,000 columns of 2 bytes: 80 MB at 4300 GB/s, 2 waves of 396 of which half is empty,
    # 2.5 us a wave and 2 us a launch
    full = 80e6 / 4300e9 * 1e3
    got = model.kernel_ms(h200, of, 40_000_000, 80e6)
    assert got == pytest.approx(full * 792 / 400 + 0.005 + 0.004, rel=1e-9)
    whole = model.kernel_ms(h200, [model.Launch("fold", 3960)], 40_000_000, 80e6)
    assert whole == pytest.approx(full + 0.025 + 0.002, rel=1e-9)
    # of 800 blocks the half returns at once
    half = model.kernel_ms(h200, [model.Launch("fold", 792)], 40_000_000, 80e6, share=0.5)
    assert half == pytest.approx(full + 0.0025 + 0.002, rel=1e-9)
    with pytest.raises(LookupError, match="expected one kernel"):
        model.kernel_ms(h200, of[1:], 40_000_000, 80e6)


def test_a_product_is_bound_by_its_flops_or_by_its_weight(h200):
    import model
    from rulers import Step

    of = model.Projection(*LLAMA)
    device = h200._replace(copy_gbps=COPY, tflops=RATE, share=1.0)
    many, one = slice(0, 16_384), slice(0, 1)
    assert model.product_ms(device, Step("logits", many), of) == pytest.approx(21.79, abs=0.01)
    # the weight, 1.05 GB, at 4300 GB/s; its float32 gradient is twice that, and read too when it is added to
    assert model.product_ms(device, Step("logits", one), of) == pytest.approx(0.244, abs=1e-3)
    assert model.product_ms(device, Step("dw", one), of) == pytest.approx(0.489, abs=1e-3)
    assert model.product_ms(device, Step("dw", one), of, False) == pytest.approx(0.977, abs=1e-3)


def test_the_bound_and_the_other_bytes_of_llama_3_8b(h200):
    """Frozen: rows of 8 KB read and written by a gather, as float32 dX to two bytes, scaled and put in place: 18 bytes an
    element, 1.21 GB."""
    import model
    from cases import Layout
    from rulers import steps

    device = h200._replace(copy_gbps=COPY, tflops=RATE, share=1.0)
    layout = Layout.of(16_384, 1.0, 512)
    planned = steps("frozen", 16_384, 4096, layout.offsets)
    found = model.plan_ms(device, "frozen", planned, model.Projection(*LLAMA), 16_384, 16_384)
    assert found.bound == pytest.approx(46.5, abs=0.06)
    kernels = sum(
        model.fold_ms(device, model.Logits(4096, LLAMA[1]))
        + model.gradient_ms(device, model.Logits(4096, LLAMA[1]))
        for _ in range(4)
    )
    gaps = model.LAUNCH_US / 1e3 * 4 * 2
    assert found.total - found.products - kernels - gaps == pytest.approx(0.281, abs=0.002)


def test_grids_and_names_are_those_of_the_launch_layer(h200):
    import model

    from dpo_ext.torch.logps import cuda as kernels

    own = kernels.launch, kernels.processors
    few = model.Logits(100, 128_256).fold(h200)
    assert few[0].blocks == 100 * kernels.tiles(128_256).number
    many = model.Logits(5000, 128_256, torch.float32, 30.0).fold(h200, stats=True)
    assert [launch.blocks for launch in many] == [5000]
    assert many[0].kernel.startswith("token_stats<float, ")
    assert few[0].kernel.startswith("token_stats<__nv_bfloat16, ")
    assert model.Logits(5000, 128_256).gradient(h200)[-1].blocks == 5000
    assert (kernels.launch, kernels.processors) == own


def everything(size):
    """Milliseconds of every row of ours."""
    import model

    head = main_of_head()
    for device in model.DEVICES:
        for shape in head.shapes(size, size.scored, False):
            for plan in head.PLANS:
                label = (device.name, plan, *shape)
                yield label, head.predict_plan(device, shape, plan, size).total
        for of, rows, share, dtype in head.given_shapes(size, False):
            for name, call in model.GIVEN.items():
                logits = model.Logits(
                    rows, of.vocabulary, head.DTYPES[dtype], None, round(rows * share)
                )
                yield (device.name, name, of, rows, share, dtype), call(device, logits)


def test_more_rows_never_take_less_and_a_better_device_never_longer():
    import model

    head = main_of_head()
    size = head.QUICK._replace(shares=(1.0,))
    llama = size.models[0]
    for device, plan in itertools.product(model.DEVICES, head.PLANS):
        took = [
            head.predict_plan(device, head.Shape(llama, rows, 1.0, "bfloat16"), plan, size).total
            for rows in (512, *range(1024, 16_385, 1024), 65_536)
        ]
        assert took == sorted(took)
        shape = head.Shape(llama, 4096, 1.0, "bfloat16")
        base = head.predict_plan(device, shape, plan, size)
        assert base.total > base.bound > base.products
        for field in ("ghz", "copy_gbps", "tflops", "share"):
            better = device._replace(**{field: 1.2 * getattr(device, field)})
            assert head.predict_plan(better, shape, plan, size).total <= base.total
        faster = device._replace(copy_gbps=1e9, ghz=1e9)
        limit = head.predict_plan(faster, shape, plan, size)
        assert limit.total == pytest.approx(base.products, rel=0.02)  # gaps and waves are left


def test_every_row_that_is_timed_has_a_prediction():
    head = main_of_head()
    for size in (head.FULL, head.SMOKE):
        found = dict(everything(size))
        plans = len(head.PLANS) * len(list(head.shapes(size, size.scored, False)))
        given = 4 * len(list(head.given_shapes(size, False)))
        assert len(found) == 4 * (plans + given)
        assert all(0 < took < math.inf for took in found.values())


def test_the_printed_tables_have_all_of_them(capsys, monkeypatch):
    head = main_of_head()
    monkeypatch.setattr(sys, "argv", ["benches/head", "--predict", "--quick"])
    head.main()
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| H200 | Llama-3-8B | ")]
    assert len(rows) == 3 + 3
    assert rows[0].count("(") == len(head.SCORED)
    assert "A100: 108 SMs at 1.41 GHz" in text
    monkeypatch.setattr(sys, "argv", ["benches/head", "--predict", "h200", "--quick"])
    head.main()
    assert "A100" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        head.parse(["--predict", "V100"])
    assert "the devices are ['H200'" in capsys.readouterr().err


@pytest.mark.slow
def test_each_measured_row_of_ours_has_its_prediction_beside_it(h200, monkeypatch, tmp_path):
    head = main_of_head()
    import model

    monkeypatch.setattr(model, "device_called", lambda name: h200 if name == "cpu" else None)
    monkeypatch.setattr(head, "head_peers", lambda *_: [])
    monkeypatch.setattr(head, "given_peers", lambda *_: [])
    small = head.SMOKE._replace(models=(head.TINY,), scored=(64,), shares=(1.0,))
    monkeypatch.setattr(head, "SMOKE", small)
    file = tmp_path / "times.json"
    command = ["benches/head", "--device", "cpu", "--smoke", "--only", "fused", "given"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(file)])
    with pytest.raises(SystemExit) as ended:
        head.main()
    assert ended.value.code == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    ours = [ratio for what, _, _, ratio in rows if "peers" not in what]
    assert len(ours) == 3 + 4
    assert all("predicted 0." in ratio and "measured / predicted" in ratio for ratio in ours)
    assert model.beside(2.0, None) == "no prediction for this device"
    assert model.beside(3.0, 2.0) == "predicted 2.000 ms, measured / predicted 1.50"
