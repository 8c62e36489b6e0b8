"""Toy students, SELECTED tables, runs of LearnerActor, and a dense reference for all of them.

T  input tokens of a row    k  kept tokens of a row    V  shared vocabulary    K  support
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tip_ray.contract.headers import LearnerReport
from tip_ray.contract.spec import LearnerSpec, LossSpec, StudentSpec
from tip_ray.contract.tables import build, concat, selected_schema
from tip_ray.runtime.weights import named_tensors
from tip_ray.stages.learner import LearnerActor
from tip_ray.stages.schedule import learning_rate
from tip_ray.stages.state import SavedFile

# The head is padded: ids from 37 on belong to nobody; its odd rows do not divide among two ranks.
VOCAB, HEAD_ROWS, K = 37, 41, 5
TOKENS = 16  # rows below have 9 to 16 tokens: each is a micro-batch of its own
RUN_STEPS = 6
TAIL_FLOOR = LossSpec().tail_floor_nats

Parts = Sequence[pa.Table]  # one a rank


def save_student(folder: Path, architecture: str, *, tied: bool, seed: int = 0) -> str:
    """A random two-layer student whose logits are far from flat."""
    shape: dict[str, Any] = {
        "vocab_size": HEAD_ROWS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(seed)
    if architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=8, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    model.generation_config = GenerationConfig(eos_token_id=1, temperature=0.6, do_sample=True)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return str(folder)


def selected(
    step: int, rows: int, seed: int, *, slot: int = 0, kept: int | None = None
) -> pa.Table:
    """`rows` random rows; teacher targets from random distributions over the vocabulary."""
    rng = np.random.default_rng(seed)
    made = [_row(rng, kept) for _ in range(rows)]
    keys = {
        "step": [step] * rows,
        "slot": list(range(slot, slot + rows)),
        "sample_index": [0] * rows,
        "attempt": [1] * rows,
        "prompt_uid": ["p"] * rows,
        "weight_version": [step - 1] * rows,
    }
    schema = selected_schema(K)
    columns = {name: [row[name] for row in made] for name in schema.names if name not in keys}
    return build(schema, keys | columns)


def _row(rng: np.random.Generator, kept: int | None) -> dict[str, Any]:
    length = int(rng.integers(9, TOKENS + 1))
    count = int(rng.integers(1, 6)) if kept is None else kept
    positions = np.sort(rng.choice(length, count, replace=False))
    logits = torch.from_numpy(rng.normal(0, 2, (count, VOCAB)))
    ids = torch.from_numpy(
        np.stack([rng.permutation(VOCAB)[:K] for _ in range(count)] or [[0] * K])
    )
    logprobs, tail = support(logits, ids[:count].long())
    return {
        "input_ids": rng.integers(0, VOCAB, length).tolist(),
        "kept_positions": positions.tolist(),
        "kept_weight": rng.uniform(0.02, 0.1, count).tolist(),
        "support_ids": ids[:count].tolist(),
        "teacher_logprobs": logprobs.tolist(),
        "teacher_tail_logprob": tail.tolist(),
        "sampled_ids": rng.integers(0, VOCAB, count).tolist(),
        "student_logprob": rng.uniform(-4, 0, count).tolist(),
    }


def support(logits_kV: torch.Tensor, ids_kK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities at the ids, and the log-mass of all others, in the logits' own type."""
    logprobs_kV = logits_kV.log_softmax(-1)
    outside_kV = logprobs_kV.scatter(-1, ids_kK, float("-inf"))
    return logprobs_kV.gather(-1, ids_kK), outside_kV.logsumexp(-1)


def dense_loss(model: torch.nn.Module, table: pa.Table) -> tuple[torch.Tensor, list[float]]:
    """Weighted sum of dense float64 reverse KL with tail, row by row; and the log-prob gaps."""
    total = torch.zeros((), dtype=torch.float64)
    gaps: list[float] = []
    for row in table.to_pylist():
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits
        logits_kV = logits[0, row["kept_positions"], :VOCAB].double()
        ids_kK = torch.tensor(row["support_ids"]).long().view(-1, K)
        student_kK, tail_k = support(logits_kV, ids_kK)
        teacher_kK = torch.tensor(row["teacher_logprobs"]).double().view(-1, K)
        tail_k = tail_k.clamp_min(TAIL_FLOOR)
        teacher_tail_k = torch.tensor(row["teacher_tail_logprob"]).double().clamp_min(TAIL_FLOOR)
        kl_k = (student_kK.exp() * (student_kK - teacher_kK)).sum(-1)
        kl_k = kl_k + tail_k.exp() * (tail_k - teacher_tail_k)
        total = total + (torch.tensor(row["kept_weight"]).double() * kl_k).sum()
        sampled = torch.tensor(row["sampled_ids"]).long().view(-1, 1)
        own_k = logits_kV.log_softmax(-1).gather(-1, sampled)[:, 0].detach()
        gaps += (own_k - torch.tensor(row["student_logprob"]).double()).abs().tolist()
    return total, gaps


@dataclass
class Played:
    """What a run of steps showed: by step, and the weights by name."""

    reports: list[LearnerReport] = field(default_factory=list)
    gradients: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    weights: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    saved: SavedFile | None = None
    moments: dict[str, torch.Tensor] = field(default_factory=dict)  # of AdamW, at the end


@dataclass(frozen=True)
class Scenario:
    """One student and what its ranks are given, step by step."""

    name: str
    path: str
    steps: Sequence[Parts]
    learner: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    export: str = ""
    load: str = ""  # a checkpoint to start from
    save: str = ""  # where to leave one at the end

    def spec(self) -> LearnerSpec:
        # A large eps keeps AdamW from dividing rounding noise by itself.
        # Without clipping, which would hide a wrong scale of the gradients.
        default = {"lr": 0.01, "eps": 1e-3, "micro_batch_tokens": TOKENS, "weight_decay": 0.1}
        default["grad_clip"] = 1e3
        return LearnerSpec(**(default | self.learner))

    def actor(self, rank: int) -> LearnerActor:
        student = StudentSpec(model=self.path, dtype=self.dtype)
        return LearnerActor(
            student, self.spec(), LossSpec(), self.path, VOCAB, K, RUN_STEPS, rank, seed=3
        )

    def on_one_rank(self) -> Scenario:
        merged = [[concat(parts, selected_schema(K))] for parts in self.steps]
        return replace(self, steps=merged)


def play(scenario: Scenario, actor: LearnerActor, rank: int) -> Played:
    """Every step, with gradients as the optimizer sees them and published weights."""
    played = Played()
    start = step = actor.load(scenario.load) if scenario.load else 0
    played.weights[start] = published(actor, start)

    def keep_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        named = actor._group.root.model.named_parameters()
        played.gradients[step] = {name: p.grad.full_tensor().clone() for name, p in named}

    actor._group.optimizer.register_step_pre_hook(keep_gradients)
    for step, parts in enumerate(scenario.steps, start=start + 1):
        played.reports.append(actor.train_step(step, parts[rank]))
        played.weights[step] = published(actor, step)
    if scenario.export:
        played.files = actor.export(scenario.export, scenario.path)
    if scenario.save:
        played.saved = actor.save(scenario.save, step)
    played.moments = whole_moments(actor)
    return played


def whole_moments(actor: LearnerActor) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter and name, gathered: a collective."""
    group = actor._group
    found = {}
    for name, parameter in group.root.model.named_parameters():
        for kind, own in group.optimizer.state[parameter].items():
            found[f"{kind}/{name}"] = own.full_tensor() if isinstance(own, DTensor) else own.clone()
    return found


def published(actor: LearnerActor, version: int) -> dict[str, torch.Tensor]:
    """The weights that the actor yields, by name; empty on every rank but 0."""
    yielded = list(actor.publish(version))
    groups = yielded[1::2]
    assert [group.nbytes for group in groups] == yielded[::2]
    return dict(named_tensors(groups))


def play_on_one(scenario: Scenario) -> Played:
    """The scenario on a single rank in this process."""
    merged = scenario.on_one_rank()
    actor = merged.actor(0)
    try:
        actor.join("localhost", actor.open_port(), 1)
        return play(merged, actor, 0)
    finally:
        actor.close()


def play_on_two(scenarios: Sequence[Scenario], folder: Path) -> dict[str, list[Played]]:
    """Every scenario on two ranks, each a process; by name, the two ranks' results."""
    on_ranks(2, _play_all, list(scenarios), folder)
    with torch.serialization.safe_globals([Played, LearnerReport, SavedFile]):
        return {
            one.name: [torch.load(folder / f"{one.name}-{rank}") for rank in (0, 1)]
            for one in scenarios
        }


def on_ranks(size: int, work: Callable[..., None], *args: Any) -> None:
    """`work(rank, meet, *args)` in one process a rank; `meet` is a queue for addresses."""
    for again in (True, False):
        meet = mp.get_context("spawn").SimpleQueue()
        try:
            mp.spawn(_one_thread, (work, meet, *args), nprocs=size)
            break
        except mp.ProcessExitedException as error:
            # Seen once in a dozen suites, where a rank leaves gloo: "free(): invalid pointer".
            if not again or error.signal_name != "SIGABRT":
                raise
            warnings.warn(f"tried again: {error}", stacklevel=2)


def _one_thread(rank: int, work: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    work(rank, *args)


def joined(scenario: Scenario, rank: int, size: int, meet: Any) -> LearnerActor:
    """This rank's actor, in its group."""
    actor = scenario.actor(rank)
    if rank == 0:
        address = ("localhost", actor.open_port())
        for _ in range(size - 1):
            meet.put(address)
    else:
        address = meet.get()
    actor.join(*address, size)
    return actor


def _play_all(rank: int, meet: Any, scenarios: Sequence[Scenario], folder: Path) -> None:
    for scenario in scenarios:
        actor = joined(scenario, rank, 2, meet)
        torch.save(play(scenario, actor, rank), folder / f"{scenario.name}-{rank}")
        actor.close()


def play_densely(scenario: Scenario) -> Played:
    """The same steps with plain transformers, dense float64 divergences and torch's AdamW."""
    model = AutoModelForCausalLM.from_pretrained(scenario.path, dtype=torch.float32)
    spec, played = scenario.spec(), Played()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=spec.lr,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        foreach=False,
    )
    for step, parts in enumerate(scenario.steps, start=1):
        table = concat(parts, selected_schema(K))
        loss, gaps = dense_loss(model, table)
        norm = 0.0
        if table.num_rows and gaps:
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), spec.grad_clip))
            played.gradients[step] = {n: p.grad.clone() for n, p in model.named_parameters()}
            optimizer.param_groups[0]["lr"] = learning_rate(spec, step, RUN_STEPS)
            optimizer.step()
            optimizer.zero_grad()
        played.weights[step] = {n: p.detach().clone() for n, p in model.named_parameters()}
        tokens = sum(len(ids) for ids in table.column("input_ids").to_pylist())
        played.reports.append(
            LearnerReport(
                step=step,
                loss=loss.item(),
                grad_norm=norm,
                learning_rate=learning_rate(spec, step, RUN_STEPS),
                skipped=False,
                tokens=tokens,
                kept=len(gaps),
                logprob_gap_sum=sum(gaps),
                logprob_gap_max=max(gaps, default=0.0),
                peak_bytes=0,
                busy_s=0.0,
            )
        )
    return played


def dense_gradients(scenario: Scenario, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gradients of the first step with the whole plain model in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(scenario.path, dtype=dtype)
    table = concat(scenario.steps[0], selected_schema(K))
    dense_loss(model, table)[0].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def whole_distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The relative error of all tensors together, in the norm."""
    assert found.keys() == expected.keys()
    wrong = sum(
        float((found[name].double() - own.double()).square().sum())
        for name, own in expected.items()
    )
    return math.sqrt(wrong / sum(float(own.double().square().sum()) for own in expected.values()))


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a tensor, in the norm; names must agree."""
    assert found.keys() == expected.keys()
    errors = [
        float((found[name].double() - own.double()).norm() / own.double().norm().clamp_min(1e-9))
        for name, own in expected.items()
    ]
    return max(errors)
