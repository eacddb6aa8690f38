"""The GPU benchmark of the head, without a GPU: it runs, its bound is what the plans do, peers are not hidden."""

import json
import math
import subprocess
import sys

import pytest
import torch
from head_bench import BENCHES, COPY, LLAMA, RATE, importable, main_of_head, tiny

benches = pytest.fixture(scope="module", autouse=True)(importable)


def both(planned):
    return planned.forward + planned.backward


# ---- the arithmetic of the bound, against numbers worked out by hand ----


@pytest.mark.parametrize(
    ("model", "fold", "dz", "two"),
    [
        (LLAMA, 0.98, 1.95, 21.8),
        ((3584, 152_064), 1.16, 2.32, 22.6),
        ((3584, 256_000), 1.95, 3.90, 38.1),
        ((896, 151_936), 1.16, 2.32, 5.6),
    ],
    ids=["Llama-3-8B", "Qwen2.5-7B", "Gemma-2-9B", "Qwen2.5-0.5B"],
)
def test_bytes_and_flops_of_16384_rows(model, fold, dz, two):
    import rulers

    H, V = model
    whole = slice(0, 16_384)

    def milliseconds(kind):
        return rulers.logit_bytes([rulers.Step(kind, whole)], V, 2) / COPY / 1e6

    assert milliseconds("fold") == pytest.approx(fold, abs=0.006)
    assert milliseconds("dz") == pytest.approx(dz, abs=0.006)
    for kind in rulers.PRODUCTS:
        assert milliseconds(kind) == 0
        product = rulers.flops([rulers.Step(kind, whole)], H, V) / RATE / 1e9
        assert product == pytest.approx(two, abs=0.05)


@pytest.mark.parametrize(
    ("plan", "kept", "products", "bound"),
    [
        # 2MHV is 21.79 ms, fold 0.977, dz 1.955; a chunk of 4096 rows that is kept saves 5.45 ms
        ("no gradient", 0, 2.0, 21.79 + 0.98),
        ("frozen", 0, 4.0, 43.58 + 2.93),
        ("pairwise", 0, 6.0, 65.37 + 2.93),
        ("recompute", 0, 8.0, 87.17 + 2.93),
        ("recompute", 1, 7.5, 81.72 + 2.93),
    ],
)
def test_bounds_of_the_plans_at_llama_3_8b(plan, kept, products, bound):
    import rulers

    M, (H, V) = 16_384, LLAMA
    offsets = list(range(0, M + 1, 512))
    of = both(rulers.steps(plan, M, 4096, offsets, kept_chunks=kept))
    work = rulers.flops(of, H, V)
    assert work == products * M * H * V
    got = rulers.bound_ms(work / RATE / 1e9, rulers.logit_bytes(of, V, 2), COPY)
    assert got == pytest.approx(bound, abs=0.02)


def test_a_chunk_that_is_kept_is_multiplied_three_times_by_recompute():
    import rulers

    forward, backward = rulers.steps("recompute", 100, 4096, kept_chunks=1)
    assert [step.kind for step in forward] == ["logits", "fold"]
    assert [step.kind for step in backward] == ["dz", "dx", "dw"]


def test_a_pair_longer_than_a_chunk_is_multiplied_again():
    import rulers

    steps, backward = rulers.steps("pairwise", 12, 4, [0, 3, 6, 8, 10, 11, 12])
    assert backward == []
    logits = [step.rows for step in steps if step.kind == "logits"]
    long, short = [slice(0, 4), slice(4, 6)], [slice(6, 10), slice(10, 12)]
    assert logits == [*long, *long, *short]
    assert [step.rows for step in steps if step.kind == "dw"] == [*long, *short]
    with pytest.raises(ValueError, match="no plan 'fast'"):
        rulers.steps("fast", 1, 1)


def test_documented_memory_is_a_chunk_and_the_gradients():
    import rulers

    H, V = LLAMA
    scratch, dx, dw = 4096 * V * 2, 16_384 * H * 2, 4 * H * V
    size = (16_384, 4096, H, V, 2)
    assert rulers.documented_bytes("no gradient", *size) == scratch
    assert rulers.documented_bytes("frozen", *size) == scratch + dx
    assert rulers.documented_bytes("pairwise", *size) == scratch + dx + dw
    assert scratch < 1.1e9
    assert dw == pytest.approx(2.10e9, rel=2e-3)


def test_other_bytes_are_those_of_gathers_and_gradients():
    """M 2, R 5, H 3, V 7, bfloat16: rows of 6 bytes in the hidden dtype, of 12 in float32."""
    import rulers

    gather, dx, zeros, cast = 2 * 2 * 6, 2 * (12 + 6), 3 * 6, 7 * 3 * (4 + 2)
    size = (2, 5, 3, 7, 2)
    assert rulers.other_bytes("no gradient", *size) == gather
    scaled = 4 * 2 * 6
    assert rulers.other_bytes("frozen", *size) == gather + dx + zeros + scaled
    assert rulers.other_bytes("pairwise", *size) == gather + dx + zeros + scaled + cast
    assert rulers.other_bytes("recompute", *size) == 2 * gather + dx + zeros + cast
    # dW of float32 is not rounded, and is read and written by its factor
    in_float32 = (*size[:4], 4)
    more = rulers.other_bytes("pairwise", *in_float32) - rulers.other_bytes("frozen", *in_float32)
    assert more == 2 * 7 * 3 * 4


# ---- how it times -------------------------------------------------------


def test_in_each_round_every_job_has_one_turn():
    import rulers

    said = []
    jobs = [
        rulers.Job(name, lambda name=name: said.append(name) or name, said.append) for name in "abc"
    ]
    times = rulers.take_turns(jobs, torch.device("cpu"), seconds=0.0, warm_up=1)
    assert said[:6] == list("aabbcc")  # the warm-up; backward gets what forward gave
    assert said[6:] == list("aabbcc") + list("bbccaa") + list("ccaabb")
    for took in times.values():
        assert len(took.both) == 3
        assert took.both == [f + b for f, b in zip(*took, strict=True)]


def test_spread_is_median_and_deciles():
    import rulers

    assert rulers.Spread.of([float(n) for n in range(11)]) == (5.0, 1.0, 9.0)
    assert rulers.Spread.of([2.0]) == (2.0, 2.0, 2.0)


# ---- what it verifies ---------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_oracle_is_autograd_in_float64(softcap):
    case = tiny(softcap=softcap)
    g = torch.randn(case.M, dtype=torch.float64)
    x = case.hidden[case.rows].double().requires_grad_()
    w = case.weight.double().requires_grad_()
    z = x @ w.t()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    logps = z.log_softmax(-1)[torch.arange(case.M), case.table.targets.long()]
    dx, dw = torch.autograd.grad(logps, (x, w), g)
    some, ids = torch.tensor([0, 5, 63]), torch.tensor([0, 7, 299])
    torch.testing.assert_close(case.oracle.logps, logps.detach())
    torch.testing.assert_close(case.oracle.dx(some, g), dx[some])
    torch.testing.assert_close(case.oracle.dw(ids, g), dw[ids])
    assert (case.oracle.sequences - logps.view(-1, 16).sum(1).view(-1, 2)).abs().max() < 1e-9


@pytest.mark.parametrize("plan", ["frozen", "recompute", "pairwise"])
def test_the_steps_of_a_plan_are_the_products_it_runs(plan):
    case = tiny()
    (candidate,) = [c for c in case.ours() if c.plan == plan]
    assert case.verify(candidate) == []


def test_steps_that_are_not_the_plans_own_are_said(monkeypatch):
    import cases

    case = tiny()
    frozen = case.ours()[0]
    monkeypatch.setattr(case, "steps", lambda plan: cases.steps("no gradient", 64, 24))
    (warning,) = case.verify(frozen)
    assert "forward multiplied [16, 16, 24, 24, 24, 24] rows, its steps say [16, 24, 24]" in warning


@pytest.mark.parametrize("fault", ["a value", "dX", "an unscored row", "dW", "NaN"])
def test_what_float64_does_not_say_is_refused(fault):
    from cases import WrongError

    case = tiny()
    honest = case.ours()[1]

    def broken(x, w):
        if fault == "dX":
            x = x * 0.5 + x.detach() * 0.5
        if fault == "dW":
            w = w * 0.5 + w.detach() * 0.5
        y = honest.run(x, w)
        if fault == "a value":
            return y + 0.1
        if fault == "NaN":
            return y * math.nan
        return y + (x[0].sum() * 0.01 - x[0].sum().detach() * 0.01) * (fault == "an unscored row")

    said = {"a value": "values", "NaN": "values", "an unscored row": "not scored"}.get(fault, fault)
    with pytest.raises(WrongError, match=said):
        case.verify(honest._replace(run=broken, plan=None))


def test_a_scalar_is_held_to_the_scale_of_its_sequences():
    from cases import WrongError

    case = tiny()
    pairwise = case.ours()[2]
    off = pairwise._replace(run=lambda x, w: pairwise.run(x, w) + 1e-3, plan=None)
    with pytest.raises(WrongError, match=r"values are off by 1\.00e-03"):
        case.verify(off)


@pytest.mark.slow
def test_a_wrong_result_of_ours_is_not_timed_and_ends_in_status_1(monkeypatch, tmp_path):
    head = main_of_head()
    import cases
    import given

    honest = cases.linear_sequence_logps
    monkeypatch.setattr(cases, "linear_sequence_logps", lambda *a, **k: honest(*a, **k) + 1)
    monkeypatch.setattr(given.GivenCase, "verify_ours", lambda _: _refuse("the gradient"))
    monkeypatch.setattr(head, "head_peers", lambda *_: [])
    size = head.SMOKE._replace(models=(head.TINY,), scored=(64,), shares=(1.0,))
    monkeypatch.setattr(head, "SMOKE", size)
    file = tmp_path / "times.json"
    command = ["benches/head", "--device", "cpu", "--smoke", "--only", "given", "fused"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(file)])
    with pytest.raises(SystemExit) as ended:
        head.main()
    assert ended.value.code == 1
    found = json.loads(file.read_text(encoding="utf-8"))
    assert len(found["wrong"]) == 3
    assert [what.split(": ")[-1] for what in found["wrong"][1:]] == [
        "ours, frozen",
        "ours, recompute",
    ]
    (case,) = found["cases"]
    assert [bound["plan"] for bound in case["bounds"]] == ["pairwise"]


def _refuse(what):
    from cases import WrongError

    raise WrongError(what)


def test_products_are_the_calls_of_the_head_on_its_chunks():
    case = tiny()
    products = case.products()
    planned = case.steps("recompute")
    products.run(planned.forward)
    last = slice(48, 64)
    torch.testing.assert_close(
        products.scratch[:16], case.hidden[case.rows][last] @ case.weight.t()
    )
    products.run(planned.backward)
    expected = sum(
        products.dz[: rows.stop - rows.start].t() @ products.x[rows]
        for kind, rows in planned.backward
        if kind == "dw"
    )
    torch.testing.assert_close(products.dw, expected)
    products.run(planned.backward)  # a second run begins anew
    torch.testing.assert_close(products.dw, expected)


def test_a_peer_that_cannot_be_had_is_named_with_its_reason(monkeypatch):
    import peers

    hidden = ("liger_kernel", "quack", "trl")  # the others ask for a GPU first
    loaded = [name for name in sys.modules if name.split(".")[0] in hidden]
    for name in (*hidden, *loaded):  # another test may have loaded what lies below
        monkeypatch.setitem(sys.modules, name, None)
    missing = {}
    found = list(peers.head_peers(tiny(), missing.__setitem__))
    assert {p.name for p in found} >= {"torch, same dtype", "torch, float32 upcast"}
    names = [
        "TRL chunked head",
        "Liger fused scaled CE",
        "Liger fused linear DPO",
        "QuACK chunked CE",
        "CCE",
        "FlashInfer chunked head",
    ]
    assert list(missing) == names
    assert all("ModuleNotFoundError" in missing[name] for name in names[:4])
    assert "needs a GPU" in missing["CCE"]
    assert "sm_100" in missing["FlashInfer chunked head"]


# ---- the whole run ------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    file = tmp_path_factory.mktemp("head") / "times.json"
    command = [sys.executable, str(BENCHES / "head"), "--device", "cpu", "--smoke"]
    command += ["--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_smoke_run_measures_every_part(smoke):
    said, found = smoke
    assert (found["warnings"], found["wrong"]) == ([], [])
    parts = [case["part"] for case in found["cases"]]
    assert {part: parts.count(part) for part in parts} == {"given": 2, "fused": 8, "small": 1}
    for case in found["cases"]:
        for times in case["ms"].values():
            assert len(times["forward"]) == len(times["backward"]) >= 3
            assert all(t >= 0 for t in times["forward"] + times["backward"])
        if case["part"] != "fused":
            continue
        assert [bound["plan"] for bound in case["bounds"]] == ["frozen", "recompute", "pairwise"]
        for bound in case["bounds"]:
            assert 0 < bound["products_ms"] < bound["bound_ms"]
            assert f"products, {bound['plan']}" in case["ms"]
        assert {"copy", "torch, same dtype", "torch, float32 upcast"} <= set(case["ms"])
    assert "x its bound, products" in said
    assert "softcap 5" in said


@pytest.mark.slow
def test_the_smoke_run_says_what_was_left_out_and_records_nothing(smoke):
    said, found = smoke
    for name in ("Liger fused linear DPO", "QuACK chunked CE"):
        assert any(name in what and why for what, why in found["left_out"])
        assert f"{name}: " in said
    facts = found["facts"]
    assert facts["device"] == "cpu"
    assert {"commit", "command", "torch", "cupy", "nvrtc", "clocks_before", "peers"} <= set(facts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "needs --smoke"),
        (["--smoke", "--record"], "never recorded"),
        (["--model", "BERT"], "the names are"),
        (["--scored", "1000"], "whole pairs"),
    ],
)
def test_what_would_measure_nothing_is_refused(arguments, message, capsys):
    head = main_of_head()

    with pytest.raises(SystemExit):
        head.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_recorded_run_is_a_table_with_the_columns_of_the_file(tmp_path, monkeypatch):
    import report

    results = tmp_path / "RESULTS.md"
    results.write_text("before\n", encoding="utf-8")
    monkeypatch.setattr(report, "RESULTS", results)
    run = report.Report(torch.device("cpu"), ["benches/head"])
    run.row("what", "1 ms", "bound 1 ms", "1.00x")
    run.left_out("QuACK", "not installed")
    run.finish(str(tmp_path / "times.json"), record=True)
    text = results.read_text(encoding="utf-8")
    columns = (BENCHES / "RESULTS.md").read_text(encoding="utf-8")
    wanted = next(line for line in columns.splitlines() if line.startswith("| date"))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count(" | ") for row in rows} == {wanted.count(" | ")}
    assert "| what | 1 ms | bound 1 ms | 1.00x | `python benches/head` |" in text
    assert text.startswith("before\n")
    assert "- left out, QuACK: not installed" in text


# ---- the check on a GPU, as far as it goes without one ------------------


@pytest.mark.parametrize(("group", "count"), [("kernels", 69), ("plans", 27)])
def test_the_shapes_of_the_sanitizer_agree_with_float64(group, count):
    import gpu_shapes

    shapes = gpu_shapes.Shapes("cpu")
    getattr(shapes, group)()
    assert shapes.count == count


def test_shapes_that_differ_are_refused():
    import gpu_shapes

    for got, want in ((1.0, 2.0), (math.nan, 1.0), (1.0, math.nan), (-math.inf, 1.0)):
        with pytest.raises(AssertionError, match="it: found"):
            gpu_shapes.near("it", got, want, 0.5)
    with pytest.raises(AssertionError, match=r"it: element \[1\]: found 0.0, expected 1.0"):
        gpu_shapes.same("it", torch.zeros(2), torch.tensor([0.0, 1.0]))
    gpu_shapes.near("it", math.nan, math.nan, 0.0)


def test_files_with_gpu_tests_are_found_by_their_text():
    import gpu_check

    names = {path.stem for path in gpu_check.gpu_files()}
    assert {"test_gpu", "test_linear", "test_pairwise", "test_logps", "test_ring"} <= names
    assert not {"test_losses", "test_conftest", "test_bench_head"} & names


def test_modules_that_are_not_installed_are_named(tmp_path, monkeypatch):
    import gpu_check

    monkeypatch.setattr(gpu_check, "TESTS", tmp_path)
    (tmp_path / "support").mkdir()
    (tmp_path / "test_a.py").write_text("import os\nimport cases\nfrom dpo_ext import x\n")
    (tmp_path / "support" / "cases.py").write_text(
        "from no_such.deep import y\nimport also_not, numpy\n"
    )
    assert gpu_check.missing_modules(tmp_path / "test_a.py") == {"no_such", "also_not"}
    monkeypatch.undo()
    assert gpu_check.missing_modules(gpu_check.TESTS / "logps" / "test_gpu.py") == set()


@pytest.mark.slow
def test_what_did_not_run_is_counted_with_its_reason(tmp_path):
    import gpu_check

    (tmp_path / "test_gpu.py").write_text(
        "import pytest\n"
        "def test_runs(): pass\n"
        "@pytest.mark.skip(reason='needs 12 GB')\n"
        "def test_big(): pass\n"
    )
    (tmp_path / "test_other.py").write_text(
        "import pytest\n"
        "@pytest.mark.skip(reason='no ring')\n"
        "def test_skips(): pass\n"
        "def test_fails(): assert 0\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_errs(broken): pass\n"
    )
    (tmp_path / "test_rest.py").write_text(
        "import pytest\npytest.importorskip('no_such')\n\ndef test_never(): pass\n"
    )
    junit = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", str(tmp_path)]
    command += [f"--rootdir={tmp_path}", "-p", "no:cacheprovider"]  # names begin at the file
    subprocess.run(command, capture_output=True, check=False)
    found = gpu_check.outcomes(junit)
    texts = {name: outcome.text(name) for name, outcome in found.items()}
    assert texts["test_gpu"] == "FAILED: 1 passed, 0 failed, 1 did not run (1 x needs 12 GB)"
    assert texts["test_other"] == "FAILED: 0 passed, 2 failed, 1 did not run (1 x no ring)"
    assert texts["test_rest"].startswith("0 passed, 0 failed, 1 did not run (1 x ")
    alone = found["test_other"]._replace(failed=0)
    assert alone.text("test_gpu_faults").startswith("FAILED: 0 passed")
    assert not alone.text("test_ring").startswith("FAILED")
