"""The demo: its world keeps its promises, its measures are right, and its checks can fail."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import random
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from dpo_ext import DataError, DpoExtError, cli, demo  # noqa: E402
from dpo_ext.demo import measure, report, source, train, world  # noqa: E402
from dpo_ext.demo.live import PlainShow  # noqa: E402
from dpo_ext.pages import charts  # noqa: E402

pytestmark = pytest.mark.slow

LOG_2 = math.log(2.0)


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    return stopped.value.code


def short(size, **recipe):
    """A size whose recipe takes seconds."""
    fast = {"sft_steps": 2, "dpo_steps": 2, "evaluations": 1, "hidden": 32}
    return dataclasses.replace(
        size,
        train_pairs=64,
        heldout_pairs=16,
        answers=4,
        new_tokens=8,
        recipe=dataclasses.replace(size.recipe, **{**fast, **recipe}),
    )


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(demo, "WORLD_QUICK", short(demo.WORLD_QUICK))
    monkeypatch.setattr(demo, "FILE_QUICK", short(demo.FILE_QUICK))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run through the command line: metrics and page."""
    out = tmp_path_factory.mktemp("demo")
    assert run_cli("demo", "--quick", "--out", str(out)) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    return json.loads((out / "metrics.json").read_text()), page, out


# the world


def test_labels_are_drawn_with_the_probability_of_bradley_and_terry():
    train_pairs, heldout = world.draw_world(0, 4000, 1000)
    pairs = [*train_pairs, *heldout]
    # of pairs whose label had probability p, a share p was drawn: compare in bins of |margin|
    margins = np.array([pair.margin for pair in pairs])
    for low, high in ((0.2, 1.0), (1.0, 2.0), (2.0, 4.0), (4.0, 99.0)):
        inside = (np.abs(margins) >= low) & (np.abs(margins) < high)
        count, expected = inside.sum(), (1 / (1 + np.exp(-np.abs(margins[inside])))).mean()
        error = math.sqrt(expected * (1 - expected) / count)
        assert count > 100
        assert abs((margins[inside] > 0).mean() - expected) < 4 * error


def test_margins_are_differences_of_true_rewards():
    for pair in world.draw_world(1, 50, 10)[0]:
        a, b = (world.reward(pair.task, text) for text in (pair.chosen, pair.rejected))
        assert pair.margin == pytest.approx(a - b, abs=1e-9)
        strengths = math.exp(a), math.exp(b)
        assert pair.p_label == pytest.approx(strengths[0] / sum(strengths), rel=1e-6)


def test_no_heldout_prompt_is_trained_on():
    train_pairs, heldout = world.draw_world(2, 3000, 500)
    assert not {p.task.prompt for p in train_pairs} & {p.task.prompt for p in heldout}


def test_a_seed_gives_the_same_file_twice_and_another_seed_another(tmp_path):
    contents = []
    for i, seed in enumerate((3, 3, 4)):
        folder = tmp_path / str(i)
        folder.mkdir()
        source.generate(folder, seed, 30, 10)
        contents.append((folder / "pairs.jsonl.gz").read_bytes())
    assert contents[0] == contents[1] != contents[2]
    rows = [json.loads(line) for line in gzip.decompress(contents[0]).splitlines()]
    assert len(rows) == 40
    assert all(sorted(row) == ["chosen", "prompt", "rejected"] for row in rows)


def test_what_the_teacher_says_is_never_garbled():
    rng = random.Random(0)
    for pair in world.draw_world(5, 200, 10)[0]:
        answer = world.sample_answer(rng, pair.task)
        assert world.features(pair.task, answer)["garbled"] == 0, answer


@pytest.mark.parametrize(
    "worse",
    [
        "Gladly, Ada! Draw it along a wet stone.",  # no kind closing
        "Gladly, Ben! Draw it along a wet stone. Good luck!",  # someone else's name
        "Gladly, Ada! It depends. Good luck!",
        "Gladly, Ada! Wrap it in a clean cloth. Good luck!",
        "Gladly, Ada! Draw it along a wet stone. But where was I? Good luck!",
        "Gladly, Ada! Good luck!",  # no advice
        "Gladly, Ada! Draw it along a wet stone. Draw it along a wet stone. Good luck!",
        "Gladly, Ada! Draw it along a wet stone. Good luck! Good luck!",
        "Gladly, Ada! Draw it along a wet stone. Good luck! Good",
        "Gladly, Ada! Draw stone. Good luck!",
        "",
    ],
)
def test_nothing_beats_the_best_answer(worse):
    task = world.Task("Ada", "sharpen a knife", world.ASKING[0])
    best = "Gladly, Ada! Draw it along a wet stone. Good luck!"
    assert world.reward(task, best) == pytest.approx(world.best_reward())
    assert world.reward(task, worse) < world.reward(task, best)


# the measures


def test_no_scorer_exceeds_the_best_reachable_accuracy():
    rng = np.random.default_rng(0)
    margin = rng.normal(size=500) * 2
    p = 1 / (1 + np.exp(-margin))
    best = measure.best_accuracy(p)
    assert measure.expected_accuracy(margin, p) == pytest.approx(best)
    assert measure.expected_accuracy(-margin, p) == pytest.approx(1 - best)
    for _ in range(20):
        assert measure.expected_accuracy(rng.normal(size=500), p) < best


def test_accuracy_counts_ties_half():
    assert measure.drawn_accuracy(np.array([1.0, -1.0, 0.0, 0.0])) == 0.5
    assert measure.expected_accuracy(np.array([0.0]), np.array([0.9])) == 0.5


def tiny_llama(seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, initializer_range=0.8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_kl_of_answers_is_the_sum_over_their_tokens_and_their_tokens_alone():
    policy, other = tiny_llama(0), tiny_llama(1)
    answers = measure.Answers(["", ""], [[2, 3], [4]], [[5, 1], [6, 5, 3, 1]], 1.0)
    totals = []
    for prompt, answer in zip(answers.prompt_ids, answers.answer_ids, strict=True):
        ids, total = [*prompt, *answer], 0.0
        for t in range(len(prompt) - 1, len(ids) - 1):
            with torch.no_grad():
                p, q = (
                    m(input_ids=torch.tensor([ids[: t + 1]])).logits[0, -1].double().softmax(-1)
                    for m in (policy, other)
                )
            total += float((p * (p / q).log()).sum())
        totals.append(total)
    found = measure.sequence_kl(policy, other, answers, pad_id=0)
    assert found.value == pytest.approx(np.mean(totals), rel=1e-5)
    assert found.error == pytest.approx(np.std(totals, ddof=1) / math.sqrt(2), rel=1e-4)
    assert abs(measure.sequence_kl(policy, policy, answers, pad_id=0).value) < 1e-6


def test_sampled_answers_follow_the_model_and_stop_at_its_end():
    model = tiny_llama(2)
    prompts = [[2, 3], [4, 5, 6, 2]] * 400
    answers = measure.sample_answers(model, str, prompts, max_new_tokens=3, seed=0)
    firsts = np.array([row[0] for row in answers.answer_ids])
    for k in range(2):  # left padding must not disturb the shorter prompt
        with torch.no_grad():
            p = model(input_ids=torch.tensor([prompts[k]])).logits[0, -1].softmax(-1).numpy()
        share = np.bincount(firsts[k::2], minlength=7) / 400
        assert np.abs(share - p).max() < 4 * math.sqrt(0.25 / 400)
    assert all(1 not in row[:-1] for row in answers.answer_ids)
    ended = np.mean([row[-1] == 1 for row in answers.answer_ids])
    assert answers.finished == pytest.approx(ended)


def test_learned_weights_return_the_weights_of_a_linear_reward():
    _, pairs = world.draw_world(0, 10, 400)
    exact = measure.learned_weights(pairs, np.array([0.5 * pair.margin for pair in pairs]))
    for name, weight in exact.items():
        assert weight == pytest.approx(0.5 * world.WEIGHTS[name], abs=1e-6), name


# the run


def test_step_zero_is_log_two_with_the_gradient_of_float64(quick):
    zero = quick[0]["step_zero"]
    assert abs(zero["loss"] - LOG_2) <= 1e-6
    assert abs(zero["loss_float64"] - LOG_2) <= 1e-12
    assert zero["gradient_norm"] > 1e-3
    assert zero["gradient_error"] <= 1e-5
    assert zero["gradient_cosine"] > 1 - 1e-9
    assert zero["passed"]


def test_quick_run_learns_something(quick):
    metrics = quick[0]
    held = metrics["heldout"]
    assert 0.6 < held["expected_accuracy"] <= held["best_accuracy"] < 1
    assert held["expected_accuracy"] / held["best_accuracy"] == metrics["checks"][0]["value"]
    start, *_, end = metrics["dpo"]["evaluations"]
    assert start["loss"] == pytest.approx(LOG_2, abs=1e-5)
    assert end["loss"] < start["loss"]
    assert metrics["dpo"]["loss"][0] == metrics["step_zero"]["loss"]


def test_metrics_hold_every_number_and_all_are_finite(quick):
    metrics = quick[0]
    for name in (
        "source", "seed", "recipe", "versions", "step_zero", "sft", "dpo", "heldout", "kl",
        "reward", "learned_weights", "checks", "data_report", "seconds", "limits",
    ):  # fmt: skip
        assert name in metrics, name
    assert list(metrics["seconds"]) == [name for name in demo.STAGES if name != "report"]
    assert len(metrics["dpo"]["loss"]) == metrics["recipe"]["dpo_steps"]

    def walk(value, path):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}")
        elif isinstance(value, list):
            for inner in value:
                walk(inner, path)
        elif isinstance(value, float):
            assert math.isfinite(value), path

    walk(metrics, "metrics")


def test_report_is_one_file_with_every_section_and_no_link(quick):
    metrics, page, _ = quick
    for key, title in report.SECTIONS.items():
        assert f'<section id="{key}"><h2>{title}' in page
    assert not re.search(r"https?:|src=|href=|<script|url\(|@import|<link", page)
    held = metrics["heldout"]
    for shown in (
        f"{held['expected_accuracy']:.4f}",
        f"{held['best_accuracy']:.4f}",
        f"{metrics['step_zero']['loss']:.9f}",
        f"{metrics['reward']['win_rate']['mean']:.1%}",
        f"{metrics['kl']['policy_reference']['mean']:.2f}",
        f"{metrics['kl']['reference_policy']['mean']:.2f}",
    ):
        assert shown in page, shown
    assert "prefers-color-scheme:dark" in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()


def test_run_leaves_the_rows_and_the_tokenizer(quick):
    metrics, _, out = quick
    rows = gzip.decompress((out / "pairs.jsonl.gz").read_bytes()).splitlines()
    assert len(rows) == metrics["train_pairs"] + metrics["heldout_pairs"]
    assert metrics["data_counts"] == {"read": len(rows), "kept": len(rows)}
    assert (out / "tokenizer" / "tokenizer.json").exists()


def flipped(logps, ref_logps, **options):
    from dpo_ext.torch import preference_loss

    return preference_loss(logps.flip(1), ref_logps.flip(1), **options)


def halved(logps, ref_logps, **options):
    from dpo_ext.torch import preference_loss

    return preference_loss(logps, ref_logps, **{**options, "beta": options["beta"] / 2})


@pytest.mark.parametrize("wrong", [flipped, halved])
def test_a_wrong_loss_is_log_two_at_step_zero_and_still_caught(
    wrong, fast, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(train, "preference_loss", wrong)
    assert run_cli("demo", "--quick", "--out", str(tmp_path)) == 1
    message = capsys.readouterr().err
    assert "step 0: the gradient must be within" in message
    assert "Traceback" not in message
    assert not (tmp_path / "report.html").exists()


def test_a_wrong_log_prob_is_caught(fast, monkeypatch, tmp_path):
    from dpo_ext.torch.logps import linear

    scored = linear.linear_sequence_logps

    def skips_a_token(hidden, weight, table, **options):
        weights = torch.ones(table.n_tokens)
        weights[3] = 0
        kept = type(table)(
            logit_rows=table.logit_rows, targets=table.targets, seq_offsets=table.seq_offsets,
            weights=weights,
        )  # fmt: skip
        return scored(hidden, weight, kept, **options)

    monkeypatch.setattr("dpo_ext.torch.scoring.linear_sequence_logps", skips_a_token)
    with pytest.raises(DpoExtError, match="step 0"):
        demo.run_demo(None, tmp_path, quick=True)


def test_a_reference_that_is_not_the_policy_is_caught(fast, monkeypatch, tmp_path):
    exact = train.pair_logps

    def shifted(model, pairs, show=None):
        values = exact(model, pairs, show)
        values[:, 0] += 1e-3
        return values

    monkeypatch.setattr(train, "pair_logps", shifted)
    with pytest.raises(DpoExtError, match="the loss must be log 2"):
        demo.run_demo(None, tmp_path, quick=True)


def test_a_missed_target_ends_with_code_one(fast, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "WORLD", demo.WORLD_QUICK)  # two steps reach nothing
    assert run_cli("demo", "--out", str(tmp_path)) == 1
    assert "missed" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


# a user's file


def text_rows(count):
    rng = random.Random(0)
    words = ("red", "green", "blue", "seven", "lamp", "river", "stone", "bright", "quiet")

    def some(n):
        return " ".join(rng.choice(words) for _ in range(n))

    return [
        {"prompt": f"zanzibar{i} {some(4)}:", "chosen": " " + some(6), "rejected": " " + some(5)}
        for i in range(count)
    ]


def message_rows(count):
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in text_rows(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("rows", [text_rows, message_rows])
def test_a_users_file_runs_and_none_of_its_text_is_shown(rows, fast, tmp_path, capsys):
    data = write(tmp_path / "mine.jsonl", [*rows(90), {"prompt": 3}])
    out = tmp_path / "out"
    assert run_cli("demo", "--quick", "--data", data, "--out", str(out)) == 0
    page, stored = (out / "report.html").read_text(), (out / "metrics.json").read_text()
    metrics = json.loads(stored)
    assert metrics["step_zero"]["passed"]
    assert metrics["data_counts"] == {"read": 91, "kept": 90}
    assert "1 dropped" in page
    for key in ("reward", "learned"):
        assert key not in metrics or key == "learned"
        assert report.NO_REWARD in page.split(f'id="{key}"')[1].split("</section>")[0]
    for text in (page, stored, capsys.readouterr().out):
        assert "zanzibar" not in text
    config = json.loads((out / "tokenizer" / "tokenizer_config.json").read_text())
    assert ("chat_template" in config) == (rows is message_rows)


def test_samples_of_a_users_file_are_shown_when_asked_for(fast, tmp_path):
    data = write(tmp_path / "mine.jsonl", text_rows(90))
    out = tmp_path / "out"
    assert run_cli("demo", "--quick", "--data", data, "--out", str(out), "--show-samples") == 0
    assert "zanzibar" in (out / "report.html").read_text()


def test_a_long_file_is_cut_and_the_report_says_so(fast, monkeypatch, tmp_path):
    monkeypatch.setattr(source, "ROWS_READ", 100)
    data = write(tmp_path / "mine.jsonl", text_rows(130))
    metrics = demo.run_demo(data, tmp_path / "out", quick=True)
    assert metrics["data_counts"]["read"] == 100
    assert any("first 100 rows" in text for text in metrics["limits"])
    assert any("drawn at random" in text for text in metrics["limits"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(text in page for text in metrics["limits"])


def test_too_few_pairs_are_refused_with_the_report(fast, tmp_path, capsys):
    data = write(tmp_path / "few.jsonl", text_rows(5))
    with pytest.raises(DataError, match="expected at least 40 usable pairs, found 5"):
        demo.run_demo(data, tmp_path / "out", quick=True)
    assert run_cli("demo", "--quick", "--data", data, "--out", str(tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "found 5" in message
    assert "Traceback" not in message


def test_a_missing_file_is_named(tmp_path, capsys):
    path = str(tmp_path / "absent.jsonl")
    assert run_cli("demo", "--data", path, "--out", str(tmp_path / "out")) == 2
    assert capsys.readouterr().err == f"error: {path}: no such file or directory\n"


def test_real_conversations_run_without_showing_a_row(fast, shared_dir, tmp_path, capsys):
    path = shared_dir / "data" / "harmless-test.jsonl.gz"
    out = tmp_path / "out"
    assert run_cli("demo", "--quick", "--data", str(path), "--out", str(out)) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["step_zero"]["passed"]
    assert metrics["data_counts"]["read"] == 2312
    texts = (out / "report.html").read_text() + capsys.readouterr().out
    assert "Human:" not in texts


# the pieces of the page and of the view


def test_charts_escape_names_and_stay_in_their_frame():
    chart = charts.line_chart(
        [charts.Series("a<b", [1.0, 5.0, 3.0], "policy", [0, 1, 2])],
        x_label="x", y_label="y", levels=[charts.Level("top", 9.0)],
    )  # fmt: skip
    assert "a&lt;b" in chart
    points = re.search(r'points="([^"]*)"', chart).group(1).split()
    for point in points:
        x, y = map(float, point.split(","))
        assert charts.LEFT <= x <= charts.WIDTH - charts.RIGHT
        assert charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM


def test_charts_of_constant_values_do_not_divide_by_zero():
    charts.line_chart([charts.Series("a", [1.0], "policy", [0])], x_label="x", y_label="y")
    charts.histogram([charts.Series("a", [2.0, 2.0], "policy")], x_label="x")
    charts.scatter([0.0], [0.0], x_label="x", y_label="y", diagonal="d")
    charts.bars([("a", 0.0)], unit="s")


def test_rich_view_draws_every_stage_and_the_followed_answer():
    from rich.console import Console

    from dpo_ext.demo.live import RichShow

    console = Console(record=True, width=110, force_terminal=True)
    with RichShow("title", ("one", "two"), console) as show:
        with show.stage("one", 3):
            for k in range(1, 4):
                show.step(k, loss=1.0 / k)
            show.note("a finding")
            show.answer("How?\n", "Like this.", 2.5)
        with show.stage("two"):
            pass
    text = console.export_text()
    for word in ("one", "two", "loss", "0.333", "a finding", "How?", "Like this.", "+2.5"):
        assert word in text, word


def test_plain_view_prints_lines_where_there_is_no_terminal(capsys, monkeypatch):
    from dpo_ext.demo.live import open_show

    show = open_show("title", ("one",))
    assert type(show) is PlainShow
    with show, show.stage("one", 1):
        show.step(1, loss=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert any("1/1  loss 0.500" in line for line in lines)
    assert "\x1b" not in "".join(lines)
