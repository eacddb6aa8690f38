"""One contender of `benches/train.py`: DPO steps, each at a word from outside, timed by part.

A contender is a process. It builds what a scenario says, then takes one step a word of its parent,
so that contenders take turns step by step while each has a peak memory of its own. N pairs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer as Tokens
from tokenizers import models
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from trl.trainer import utils as trl_utils

from dpo_ext import PairDataset, Tokenizer
from dpo_ext.layout.batch import LAYOUTS
from dpo_ext.torch import PairLoader, attach_scoring
from dpo_ext.trl import DPOTrainer
from dpo_ext.trl.collator import SERVED

PARTS = ("data", "reference", "forward", "head", "loss", "backward", "optimizer", "other")
STOCK, COMPACT, BARE, LOOP = "stock", "stock compact", "bare loop", "loop "
CONTENDERS = (STOCK, COMPACT, *LAYOUTS, *(LOOP + name for name in LAYOUTS), BARE)
BETA, RATE, RANK = 0.1, 1e-4, 8
SHARED = Path(__file__).resolve().parents[2] / "shared"
PAIRS = SHARED / "data" / "harmless-test.jsonl.gz"
FOLDERS = {50_257: "gpt2", 151_936: "qwen2.5"}
# Tenths of the lengths of HH harmless-test under GPT-2's tokenizer: prompts, completions.
PROMPTS = (11, 18, 24, 45, 70, 95, 120, 148, 185, 265, 505)
SIDES = (2, 10, 15, 20, 26, 33, 42, 53, 69, 97, 400)


@dataclass(frozen=True)
class Scenario:
    """What is trained, on what, how often."""

    vocabulary: int
    longest: int
    training: str = "full"  # or "lora": adapters on all layers, the head frozen
    reference: str = "live"  # or "precomputed"
    pairs: int = 16
    steps: int = 9
    part_rounds: int = 0  # the last steps, if they alone are timed by part; 0: all are
    layers: int = 4
    hidden: int = 128
    inner: int = 352
    heads: int = 4
    key_heads: int = 2
    spread: float = 0.2  # of the weights: with 0.02 a wrong label would go unseen
    tied: bool = False
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def cast(self) -> Any:
        """The autocast of a step; none in float32."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device, getattr(torch, self.dtype))


def network(scenario: Scenario) -> Any:
    """A Llama with random weights, the same in every process."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=scenario.vocabulary,
        hidden_size=scenario.hidden,
        intermediate_size=scenario.inner,
        num_hidden_layers=scenario.layers,
        num_attention_heads=scenario.heads,
        num_key_value_heads=scenario.key_heads,
        max_position_embeddings=max(2048, 2 * scenario.longest),
        initializer_range=scenario.spread,
        tie_word_embeddings=scenario.tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device(scenario.device):
        dtype = getattr(torch, scenario.dtype)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def adapters() -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=RANK, lora_dropout=0.0)


def same_adapters(model: nn.Module) -> None:
    """Weights that do not depend on what was drawn before."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.data.copy_(drawn)


def pairs_of(scenario: Scenario) -> PairDataset:
    """The pairs of all steps and one more: of HH, or of ids drawn with the lengths of HH."""
    count, rng = scenario.pairs * (scenario.steps + 1), np.random.default_rng(0)
    folder = SHARED / "tokenizers" / FOLDERS.get(scenario.vocabulary, "none")
    if PAIRS.exists() and folder.exists():
        kept: Any = {"on_bad": "skip", "on_useless": "keep", "boundary": "trl"}
        tokenizer = Tokenizer.from_pretrained(folder)
        pairs = PairDataset.from_files(PAIRS, tokenizer, max_length=scenario.longest, **kept)
        order = rng.permutation(len(pairs))
        return pairs.select(np.resize(order, count))
    scale = scenario.longest / 512

    def ids(tenths: tuple[int, ...]) -> list[list[int]]:
        drawn = np.interp(rng.random(count), np.linspace(0, 1, len(tenths)), tenths) * scale
        lengths = np.clip(drawn.astype(int), 2, scenario.longest // 2)
        return [rng.integers(2, scenario.vocabulary, n).tolist() for n in lengths]

    return PairDataset.from_ids(ids(PROMPTS), ids(SIDES), ids(SIDES), pad_id=0)


# ---- time ----------------------------------------------------------------------------------------


class Clock:
    """Seconds of a step by part; what a part has inside it is not counted twice.

    On a CPU the process's own time, which other processes do not stop; on a GPU the wall's, and
    each border waits for the device, so that steps which are timed as a whole have no borders.
    """

    def __init__(self, device: str) -> None:
        self.device, self.cuts = device, True
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.open, self.last = ["other"], 0.0

    def start(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.open, self.last = ["other"], self._now()

    def enter(self, part: str) -> None:
        self._cut()
        self.open.append(part)

    def leave(self, *_: Any) -> None:
        self._cut()
        self.open.pop()

    def _cut(self) -> None:
        if self.cuts:
            now = self._now()
            self.spent[self.open[-1]] += now - self.last
            self.last = now

    stop = _cut

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        if self.cuts:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def watch(self, model: Any, reference: Any = None) -> None:
        """A model's forward is its head's, but for its backbone's; without gradient both are the
        reference's.
        """
        inner = model.get_base_model() if hasattr(model, "peft_config") else model

        def begins(part: str) -> Callable[..., None]:
            return lambda *_: self.enter(part if torch.is_grad_enabled() else "reference")

        for module, part in ((model, "head"), (inner.base_model, "forward")):
            module.register_forward_pre_hook(begins(part))
            module.register_forward_hook(self.leave)
        if reference is not None:
            reference.register_forward_pre_hook(begins("reference"))
            reference.register_forward_hook(self.leave)


class End(Exception):  # noqa: N818 - no error
    """No more steps are wanted."""


class Steps:
    """Waits for the word for a step, and sends what the step took."""

    def __init__(self, connection: Any, scenario: Scenario, tokens: np.ndarray) -> None:
        self.clock = Clock(scenario.device)
        self.connection, self.scenario, self.tokens = connection, scenario, tokens
        self.taken, self.runs, self.over = 0, False, False
        self.facts: dict[str, float] = {}
        self.how: dict[str, Any] = {}

    def ready(self) -> None:
        if self.scenario.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
        self.connection.send({"ready": True, **self.how})

    def next(self) -> None:
        """The end of one step and, at the word, the beginning of another."""
        self.finish()
        word = self.connection.recv()
        if word in ("end", None):
            self.over = word is None
            raise End
        self.clock.cuts = word == "parts"
        self.runs, self.facts = True, {}
        self.before, self.wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        self.clock.start()

    def finish(self) -> None:
        if not self.runs:
            return
        if self.scenario.device == "cuda":
            torch.cuda.synchronize()
        self.clock.stop()
        wall, now = time.perf_counter() - self.wall, resource.getrusage(resource.RUSAGE_SELF)
        user = now.ru_utime - self.before.ru_utime
        pairs = slice(self.taken * self.scenario.pairs, (self.taken + 1) * self.scenario.pairs)
        self.runs, self.taken = False, self.taken + 1
        self.connection.send(
            {
                "wall": wall,
                "user": user,
                "cpu": user + now.ru_stime - self.before.ru_stime,
                "tokens": int(self.tokens[pairs].sum()),
                "parts": dict(self.clock.spent),
                **{name: float(value) for name, value in self.facts.items()},
            }
        )

    def peak_megabytes(self) -> float:
        if self.scenario.device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3


# ---- TRL's trainers ------------------------------------------------------------------------------


def timed(kind: type, steps: Steps) -> type:
    """A trainer's class, whose steps wait for the word and are timed by part."""
    clock = steps.clock

    class Timed(kind):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # encoded beforehand, for all alike

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.log_history:
                said = self.state.log_history[-1]
                steps.facts |= {name: said[name] for name in FACTS if name in said}
            steps.next()
            with clock.part("data"):
                return super().get_batch_samples(*args, **kwargs)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            with clock.part("loss"):
                return super().compute_loss(*args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            clock.enter("optimizer")
            return loss

    return Timed


FACTS = ("loss", "grad_norm", "logps/chosen", "logps/rejected")


def trainer_of(name: str, scenario: Scenario, pairs: PairDataset, steps: Steps) -> Any:
    """Stock TRL's trainer, or ours with a layout."""
    stock = name in (STOCK, COMPACT)
    kind: Any = timed(trl.DPOTrainer if stock else DPOTrainer, steps)
    lora, live = scenario.training == "lora", scenario.reference == "live"
    args = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="dpo_ext-train-"),
        max_steps=scenario.steps + 1,  # the word comes before the last
        per_device_train_batch_size=scenario.pairs,
        precompute_ref_batch_size=scenario.pairs,
        max_length=scenario.longest,
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=not live,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        beta=BETA,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        use_cpu=scenario.device == "cpu",
        bf16=scenario.dtype == "bfloat16",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    vocabulary = {"<pad>": 0, "<eos>": 1}
    fast = Tokens(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>"
    )
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    data = datasets.Dataset.from_dict({n: [row.tolist() for row in getattr(pairs, n)] for n in ids})
    trainer = kind(
        network(scenario),
        ref_model=network(scenario) if live and not lora else None,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=adapters() if lora else None,
        **({} if stock else {"layout": name}),
    )
    same_adapters(trainer.model)
    steps.clock.watch(trainer.model, trainer.ref_model)
    trainer.accelerator.backward = steps.clock.around("backward", trainer.accelerator.backward)

    class EndOfStep(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.clock.leave()

    trainer.add_callback(EndOfStep())
    steps.how = {"how": "trainer", "steps_back": dict(getattr(trainer, "steps_back", {}))}
    return trainer


@contextmanager
def scoring_rows_alone(wanted: bool) -> Iterator[None]:
    """Stock TRL's switch for it, which is on where there is Triton for the device."""
    before = trl_utils._use_triton
    trl_utils._use_triton = (lambda _: True) if wanted else before
    try:
        yield
    finally:
        trl_utils._use_triton = before


# ---- loops ---------------------------------------------------------------------------------------


def loop(name: str, scenario: Scenario, pairs: PairDataset, steps: Steps) -> None:
    """The same training in a plain loop: `PairLoader` and `attach_scoring`, or torch alone."""
    layout: Any = "padded" if name == BARE else name.removeprefix(LOOP)
    score = torch_alone if name == BARE else fused
    lora, live = scenario.training == "lora", scenario.reference == "live"
    model = network(scenario)
    if lora:
        from peft import get_peft_model

        model = get_peft_model(model, adapters())
        same_adapters(model)
    reference = network(scenario) if live and not lora else model
    if name != BARE:
        attach_scoring(model, loss={"loss": "dpo", "beta": BETA})
        if reference is not model:
            attach_scoring(reference)

    def ref_logps(batch: Any) -> Tensor:
        adapter = reference.disable_adapter() if lora else nullcontext()
        with torch.no_grad(), adapter, scenario.cast, steps.clock.part("reference"):
            return score(reference, batch, None)[0]

    def batches(pairs: PairDataset) -> Iterator[Any]:
        plan = pairs.plan(layout=layout, pairs_per_batch=scenario.pairs, shuffle=False)
        return iter(PairLoader(plan, device=scenario.device))

    if not live:
        values = torch.empty(len(pairs), 2, dtype=torch.float64)
        for batch in batches(pairs):
            values[batch.pair_index.long().cpu()] = ref_logps(batch).double().cpu()
        pairs = pairs.with_ref_logps(values.numpy())
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    steps.clock.watch(model, reference if reference is not model else None)
    steps.how = {"how": "loop", "steps_back": {}}
    steps.ready()
    given, part = batches(pairs), steps.clock.part
    while True:
        steps.next()
        with part("data"):
            batch = next(given)
        ref = ref_logps(batch) if live else batch.ref_logps
        with part("loss"), scenario.cast:
            logps, loss = score(model, batch, ref)
        with part("backward"):
            loss.backward()
        with part("optimizer"):
            norm = nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        chosen, rejected = logps.detach().mean(0).tolist()
        values = (loss.item(), norm.item(), chosen, rejected)
        steps.facts |= dict(zip(FACTS, values, strict=True))


def fused(model: Any, batch: Any, ref: Tensor | None) -> tuple[Tensor, Tensor | None]:
    inputs = batch.inputs_for(model)
    if ref is None:
        scores = model(**inputs, score_table=batch.table)
    else:
        scores = model(**inputs, score_table=batch.table, ref_logps=ref.float())
    return scores.logps, scores.loss


def torch_alone(model: Any, batch: Any, ref: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a user writes who scores completion tokens alone."""
    table = batch.table
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    hidden = inner.model(**batch.model_inputs).last_hidden_state
    logits = hidden.flatten(0, 1)[table.logit_rows] @ inner.lm_head.weight.T
    tokens = logits.float().log_softmax(-1).gather(1, table.targets.long()[:, None])[:, 0]
    sequence = torch.repeat_interleave(table.lengths.flatten())
    logps = tokens.new_zeros(table.n_sequences).index_add(0, sequence, tokens).view(-1, 2)
    if ref is None:
        return logps, None
    chosen, rejected = (logps - ref).unbind(1)
    return logps, -logsigmoid(BETA * (chosen - rejected)).mean()


# ---- the process ---------------------------------------------------------------------------------


def work(connection: Any, name: str) -> None:
    """A contender's process."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    with contextlib.redirect_stdout(None):  # every step's log
        serve(connection, name)


def serve(connection: Any, name: str) -> None:
    """A scenario comes, then words for its steps; ``None`` ends it, and so does an error."""
    try:
        with scoring_rows_alone(name == COMPACT):
            while (scenario := connection.recv()) is not None:
                if _run(connection, name, scenario):
                    return
    except Exception:
        connection.send({"error": traceback.format_exc()})


def _run(connection: Any, name: str, scenario: Scenario) -> bool:
    """Whether the word was that all is over."""
    if scenario.device == "cpu":
        torch.set_num_threads(1)
    pairs = pairs_of(scenario)
    steps = Steps(connection, scenario, np.asarray(pairs.tokens))
    with contextlib.suppress(End):
        if name in (STOCK, COMPACT, *SERVED):
            trainer = trainer_of(name, scenario, pairs, steps)
            steps.ready()
            trainer.train()
        else:
            loop(name, scenario, pairs, steps)
    if not steps.over:
        connection.send({"peak": steps.peak_megabytes()})
    return steps.over
