"""Scores recorded at rollout against the learner's own, by how many updates lie between them.

What selects tokens is recorded where they are drawn: a bfloat16 vLLM engine, with weights up to
max_lag updates old. The learner trains with newer float32 masters. Here three steps are drawn with
the initial weights; the first two are trained on, by a real LearnerActor; the third is measured:
before, after one and after two updates (lag 0, 1, 2) the learner's weights read its tokens, and
the same teacher scores both sides on their own top K ids.

    python -m tip_ray.demo.smollm2 --output models/smollm2
    python -m tests.benchmarks.bench_recorded --problems DIR --output outputs/bench

N  response tokens        V  shared vocabulary        K  ids of a token's support
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tests.benchmarks import real_rows
from tests.benchmarks.common import print_table, write_json
from tests.benchmarks.real_rows import Scores
from tests.tables_made import row_tokens
from tip_ray.compute.divergence import row_statistics
from tip_ray.contract import tables
from tip_ray.contract.spec import RunSpec
from tip_ray.control.spec_file import load_spec
from tip_ray.stages import fsdp
from tip_ray.stages.cut import cut
from tip_ray.stages.export import write_export
from tip_ray.stages.learner import LearnerActor
from tip_ray.stages.pair_checks import PairFacts, check_pair
from tip_ray.stages.selector import SelectorActor
from tip_ray.stages.teacher import TeacherActor

LAGS = 3  # 0, 1 and 2 updates
CHUNK_ROWS = 512


def main() -> int:
    parser = real_rows.parser(__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8, help="of a step of SmolLM2's")
    options = parser.parse_args()
    here = {"learner.replicas": 1, "learner.num_cpus": 2, "teacher.num_cpus": 2}
    here["rollout.num_cpus"] = 2
    specs = {"carry": load_spec(real_rows.SPECS / "quickstart.yaml", here)}
    if gone := real_rows.absent(options):
        print(f"recorded: SmolLM2 left out, there is no {gone}; see this file")  # noqa: T201
    else:
        specs["SmolLM2"] = real_rows.smollm2_spec(
            options, here | {"prompts.prompts_per_step": options.prompts}
        )
    figures = [one for name, spec in specs.items() for one in measure(name, spec)]
    write_json(options.output, "recorded", figures)
    print_table([_row(one) for one in figures])
    return 0


def measure(name: str, spec: RunSpec) -> list[dict[str, Any]]:
    """A record for each lag and each dtype in which the learner computes."""
    *trained, measured = real_rows.rollouts(spec, LAGS)
    facts = check_pair(spec)
    teacher = _teacher(spec, facts)
    recorded = _scores(teacher, measured, facts)
    selected = [_selected(spec, facts, teacher, table) for table in trained]
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        masters = Path(folder) / "masters"
        for lag, (rate, learner) in enumerate(_updates(spec, facts, selected)):
            write_export(str(masters), facts.student_path, learner.masters(), "float32")
            for dtype in ("float32", "bfloat16"):
                own = _own_view(measured, masters, dtype, facts)
                record = {"pair": name, "lag": lag, "learning_rate": rate, "computes_in": dtype}
                record |= _compared(measured, own, recorded, _scores(teacher, own, facts))
                figures.append(record)
    return figures


class _Learner(LearnerActor):
    def masters(self) -> Iterator[dict[str, Tensor]]:
        """The float32 weights, a layer group at a time."""
        group = self._joined()
        return fsdp.gather_groups(group.root, group.prefixes, torch.float32)


def _updates(
    spec: RunSpec, facts: PairFacts, selected: list[pa.Table]
) -> Iterator[tuple[float | None, _Learner]]:
    """The learner before its first update and after each, with the last learning rate."""
    learner = _Learner(
        spec.student,
        spec.learner,
        spec.loss,
        facts.student_path,
        facts.vocab_size,
        spec.selected_width(facts.support_k),
        spec.steps,
        rank=0,
        seed=spec.seed,
    )
    learner.join("localhost", learner.open_port(), 1)
    try:
        yield None, learner
        for step, table in enumerate(selected, start=1):
            report = learner.train_step(step, table)
            assert not report.skipped, f"update {step} was skipped"
            yield report.learning_rate, learner
    finally:
        learner.close()


def _teacher(spec: RunSpec, facts: PairFacts) -> TeacherActor:
    return TeacherActor(
        spec.teacher,
        facts.teacher_path,
        facts.vocab_size,
        facts.support_k,
        spec.support_source,
        spec.loss.tail_floor_nats,
        spec.rollout.max_prompt_tokens + spec.rollout.max_response_tokens,
    )


def _selected(
    spec: RunSpec, facts: PairFacts, teacher: TeacherActor, rollouts: pa.Table
) -> pa.Table:
    """SELECTED of a step for one learner rank."""
    _, scores, targets = teacher.score(rollouts)
    selector = SelectorActor(
        spec.selection,
        spec.loss,
        vocab_size=facts.vocab_size,
        ranks=1,
        samples=0,
        seed=spec.seed,
    )
    _, keep = selector.select(row_tokens(rollouts), {}, None, scores)
    return cut([0], keep, scores, targets, rollouts)[2]


def _own_view(measured: pa.Table, path: Path, dtype: str, facts: PairFacts) -> pa.Table:
    """ROLLOUTS as the model at `path` would have recorded them; the head as the kept loss has it.

    Weights of `dtype`, but logits in float32.
    """
    hidden_ND, head_VD = real_rows.hidden_states(path, dtype, measured, facts.vocab_size)
    sampled_N = torch.from_numpy(tables.column(measured, "response_ids").astype(np.int64))
    head_VD, parts = head_VD.float(), []
    for start in range(0, len(hidden_ND), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        logits_NV = hidden_ND[rows].float() @ head_VD.T
        found = row_statistics(logits_NV, facts.support_k, facts.vocab_size)
        logit_N = logits_NV.gather(1, sampled_N[rows, None]).squeeze(1)
        parts.append(
            {
                "student_logprob": logit_N - found.log_normalizer_N,
                "student_entropy": found.entropy_N,
                "student_topk_ids": found.topk_ids_NK.int(),
                "student_topk_logprobs": found.topk_logprobs_NK,
                "student_tail_logprob": found.tail_logprob_N,
            }
        )
    columns: dict[str, Any] = {one: measured.column(one) for one in measured.column_names}
    offsets = tables.offsets(measured, "response_ids")
    for column in parts[0]:
        values = torch.cat([part[column] for part in parts]).numpy()
        columns[column] = tables.list_array(values, offsets, measured.schema.field(column).type)
    return tables.build(measured.schema, columns)


def _scores(teacher: TeacherActor, rollouts: pa.Table, facts: PairFacts) -> Scores:
    header, scores, _ = teacher.score(rollouts)
    assert not header.quarantined, header.quarantined[0].reason
    names = ("student_entropy", "reverse_kl", "forward_kl")
    columns = (tables.column(scores, name) for name in names)
    return Scores(*columns, tables.offsets(scores, "loss_mask"), facts.vocab_size)


def _compared(
    measured: pa.Table, own: pa.Table, recorded: Scores, own_scores: Scores
) -> dict[str, Any]:
    found, expected = (tables.column(one, "student_logprob") for one in (measured, own))
    gap_N = np.abs(found.astype(np.float64) - expected)
    record: dict[str, Any] = {"rollouts": measured.num_rows, "tokens": len(gap_N)}
    record["logprob_gap"] = {"mean": float(gap_N.mean()), "max": float(gap_N.max())}
    for name in ("reverse_kl", "forward_kl"):
        ours_N, theirs_N = (getattr(one, f"{name}_N") for one in (own_scores, recorded))
        error_N = np.abs(ours_N - theirs_N)
        record[name] = {
            "mean_recorded": float(theirs_N.mean()),
            "mean_own": float(ours_N.mean()),
            "error_mean": float(error_N.mean()),
            "error_p95": float(np.quantile(error_N, 0.95)),
        }
    return record | {"jaccard": real_rows.jaccards(recorded, own_scores)}


def _row(one: dict[str, Any]) -> dict[str, Any]:
    return {
        "pair": one["pair"],
        "lag": str(one["lag"]),
        "learner computes in": one["computes_in"],
        "its KL": one["reverse_kl"]["mean_own"],
        "KL error, mean": one["reverse_kl"]["error_mean"],
        "forward KL error, mean": one["forward_kl"]["error_mean"],
        "log-probability gap, mean": one["logprob_gap"]["mean"],
        **{name: f"{value:.3f}" for name, value in one["jaccard"].items()},
    }


if __name__ == "__main__":
    sys.exit(main())
