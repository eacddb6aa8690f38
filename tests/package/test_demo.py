"""The demo: its world keeps its promises, its measures are right, and its checks can fail."""

from __future__ import annotations

import dataclasses
import gzip
import html
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from dpo_ext import DataError, DpoExtError, PairDataset, Tokenizer, cli, demo  # noqa: E402
from dpo_ext.demo import findings, live, measure, report, source, train, world  # noqa: E402

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
        f"{metrics['heldout']['loss_floor']:.3f}",
    ):
        assert shown in page, shown
    assert "prefers-color-scheme:dark" in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()


def test_report_says_first_what_dpo_is_and_who_is_trained(quick):
    _, page, _ = quick
    assert page.index("Direct Preference Optimization") < page.index('id="glance"')
    assert page.index('class="formula"') < page.index("−log σ(") < page.index('id="glance"')
    assert page.index("Victor") < page.index('id="glance"')
    assert "docs/derivation.md" in page
    assert page.index('id="next"') > page.index('id="how"')


def test_report_links_the_derivation_where_both_lie_in_one_checkout(tmp_path):
    root = Path(demo.__file__).resolve().parents[3]
    assert demo.derivation(root / "demo_out") == "../docs/derivation.md"
    assert demo.derivation(tmp_path) is None


def test_score_chips_have_the_colour_that_their_legend_says(quick):
    _, page, _ = quick
    chips = re.findall(r'class="score (\w+)">([+−][0-9.]+)<', page)
    assert len(chips) > 20
    for css, text in chips:
        value = float(text.replace("−", "-"))
        expected = "good" if value > 2 else "bad" if value < -2 else "middling"
        assert css == expected, text
    assert "above +2" in page
    assert "below −2" in page


def test_heldout_is_measured_at_the_start_and_at_equal_distances_to_the_last_step(quick):
    recipe, evaluations = quick[0]["recipe"], quick[0]["dpo"]["evaluations"]
    steps = [e["step"] for e in evaluations]
    assert (steps[0], steps[-1]) == (0, recipe["dpo_steps"])
    assert len(steps) == len(set(steps)) == recipe["evaluations"] + 1
    gaps = np.diff(steps)
    assert gaps.max() - gaps.min() <= 1


def test_no_expected_loss_is_below_the_floor():
    rng = np.random.default_rng(0)
    margin = rng.normal(size=300) * 3
    p = 1 / (1 + np.exp(-margin))
    floor = measure.expected_loss(margin, p)
    assert floor == pytest.approx(-(p * np.log(p) + (1 - p) * np.log1p(-p)).mean())
    for _ in range(20):
        assert measure.expected_loss(margin + rng.normal(size=300), p) > floor
    assert measure.expected_loss(np.array([800.0]), np.array([1.0])) == 0.0


def test_all_curves_of_the_report_start_where_policy_and_reference_are_equal(quick):
    metrics, page, _ = quick
    training = page.split('id="training"')[1].split("</section>")[0]
    for chart in training.split("<figure>")[1:4]:  # loss, margin, accuracy
        starts = {
            re.match(r"[^ ]*", points).group(0)
            for points in re.findall(r'<polyline[^>]*points="([^"]*)"', chart)
        }
        assert len(starts) == 1, starts
    dots = training.split("<figure>")[1].count("<circle")
    assert dots == len(metrics["dpo"]["evaluations"])
    assert training.count("loss floor") == 1
    assert training.count("best reachable</text>") == 1


def test_run_leaves_the_rows_the_tokenizer_and_a_list_of_what_is_there(quick):
    metrics, _, out = quick
    rows = gzip.decompress((out / "pairs.jsonl.gz").read_bytes()).splitlines()
    assert len(rows) == metrics["train_pairs"] + metrics["heldout_pairs"]
    assert metrics["data_counts"] == {"read": len(rows), "kept": len(rows)}
    assert (out / "tokenizer" / "tokenizer.json").exists()
    listed = (out / "contents.txt").read_text()
    for path in out.iterdir():
        assert path.name in listed or path.name == "contents.txt", path


def heldout_logps(folder, pairs):
    from transformers import AutoModelForCausalLM

    from dpo_ext.torch import attach_scoring

    model = attach_scoring(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    return train.pair_logps(model, pairs)


def test_saved_models_are_the_ones_that_were_measured(quick):
    metrics, _, out = quick
    tokenizer = Tokenizer.from_pretrained(out / "model")
    pairs = PairDataset.from_files(out / "pairs.jsonl.gz", tokenizer, max_length=None)
    heldout = pairs[metrics["train_pairs"] :]
    policy, reference = (heldout_logps(out / name, heldout) for name in ("model", "reference"))
    margin = measure.margins(policy, reference, metrics["recipe"]["beta"])
    np.testing.assert_allclose(margin, metrics["heldout"]["margins"], atol=1e-4)
    assert np.abs(margin).max() > 0.1


def test_the_saved_folder_is_the_path_to_model_of_the_readme(quick):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo_ext.torch import (
        PairLoader,
        assert_packing_safe,
        linear_sequence_logps,
        preference_loss,
    )

    out = quick[2]
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    tokenizer = Tokenizer.from_pretrained(out / "model")
    pairs = PairDataset.from_files(out / "pairs.jsonl.gz", tokenizer, max_length=512)
    theirs = AutoTokenizer.from_pretrained(out / "model")
    text = "Ada asks: how do I sharpen a knife?\n"
    assert theirs(text)["input_ids"] == list(tokenizer.encode(text))
    assert_packing_safe(model)

    def score(batch):
        hidden = model.model(**batch.model_inputs).last_hidden_state
        return linear_sequence_logps(hidden, model.lm_head.weight, batch.table)

    plan = pairs[:64].plan(layout="packed", tokens_per_batch=1024, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in PairLoader(plan, device="cpu"):
        with torch.no_grad():
            before = score(batch)
        losses = []
        for _ in range(2):
            out = preference_loss(score(batch), before, loss="dpo", beta=0.1)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.item())
        assert losses[0] == pytest.approx(LOG_2, abs=1e-5)
        assert losses[1] < losses[0]
        break


def test_the_snippet_of_the_report_runs_beside_it(quick, monkeypatch, capsys):
    _, page, out = quick
    snippet = html.unescape(re.search(r"<pre id=snippet>(.*?)</pre>", page, re.DOTALL).group(1))
    monkeypatch.chdir(out)
    exec(compile(snippet, "snippet", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    losses = [float(line.split()[1]) for line in lines]
    assert losses[0] == pytest.approx(LOG_2, abs=1e-5)
    assert np.abs(np.array(losses[1:]) - LOG_2).max() > 1e-3  # the policy leaves its start


@pytest.mark.parametrize("name", ["model", "reference", "pairs.jsonl.gz"])
def test_what_others_put_into_the_folder_is_not_replaced(fast, tmp_path, name, capsys):
    mine = tmp_path / name
    mine.write_text("mine")
    assert run_cli("demo", "--quick", "--out", str(tmp_path)) == 2
    assert f"{mine}: was not written by this demo" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [mine]


def test_pairs_beside_the_report_are_no_hindrance_where_they_are_the_data(fast, tmp_path):
    data = tmp_path / "pairs.jsonl.gz"
    data.write_bytes(gzip.compress(Path(write(tmp_path / "rows", text_rows(90))).read_bytes()))
    before = data.read_bytes()
    assert run_cli("demo", "--quick", "--data", str(data), "--out", str(tmp_path)) == 0
    assert data.read_bytes() == before


def test_a_second_run_replaces_the_first(fast, tmp_path):
    for seed in (0, 1):
        demo.run_demo(None, tmp_path, quick=True, seed=seed)
    assert not list(tmp_path.glob("*.new"))
    assert json.loads((tmp_path / "metrics.json").read_text())["seed"] == 1


@pytest.mark.parametrize(("load", "threads"), [(99.0, 1), (0.1, 3)])
def test_a_busy_machine_gets_one_thread_and_both_are_restored(
    fast, tmp_path, monkeypatch, load, threads
):
    before, seen = torch.get_num_threads(), []
    fine_tune = train.fine_tune

    def seeing(*arguments):
        seen.append(torch.get_num_threads())
        return fine_tune(*arguments)

    monkeypatch.setattr(train, "fine_tune", seeing)
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    try:
        torch.set_num_threads(3)
        demo.run_demo(None, tmp_path, quick=True)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [threads]


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

    monkeypatch.setattr("dpo_ext.torch.forward.linear_sequence_logps", skips_a_token)
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
        assert findings.NO_REWARD in page.split(f'id="{key}"')[1].split("</section>")[0]
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


# the view


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


def test_plain_view_prints_lines_where_there_is_no_terminal(capsys):
    show = live.open_show("title", ("one",), "two minutes")
    assert type(show) is live.PlainShow
    with show, show.stage("one", 1):
        show.step(1, loss=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert any("1/1  loss 0.500" in line for line in lines)
    assert any("about two minutes" in line for line in lines)
    assert "\x1b" not in "".join(lines)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_log_has_a_line_each_ten_seconds_with_the_time_left(capsys):
    clock = Clock()
    show = live.PlainShow("title", ("one",), clock=clock)
    with show.stage("one", 100):
        clock.now += 30.0  # the first step warms up: the time left must not follow it
        for step in range(1, 101):
            show.step(step)
            clock.now += 2.0
    said = [line.split("] ")[1].strip() for line in capsys.readouterr().out.splitlines()]
    inside = [line for line in said if "/100" in line]
    assert inside[0] == "1/100"
    assert inside[1] == "6/100  3 min 8 s left"  # 94 steps of two seconds
    assert inside[2] == "11/100  2 min 58 s left"
    assert inside[-1] == "100/100"
    assert len(inside) == 21


def test_rich_view_shows_the_time_left_of_a_stage():
    from rich.console import Console

    console = Console(record=True, width=110, force_terminal=True)
    clock = Clock()
    show = live.RichShow("title", ("one",), console, "two minutes", clock)
    with show.stage("one", 10):
        for step in (1, 2, 3):
            show.step(step, loss=1.0)
            clock.now += 5.0
        console.print(show._draw())
    text = console.export_text()
    assert "52 s left" in text  # 15 s for two steps behind the first, seven to go
    assert "15 s of about two minutes" in text
