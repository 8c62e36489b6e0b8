"""How well scores on the student's top K ids stand in for exact ones over the whole vocabulary.

SmolLM2 answers GSM8K problems at temperature 1, as a student near its teacher (the teacher's own
weights with a little relative noise) and as the raw 18-layer cut. Student and teacher read those
answers in float32. Exact: divergences over all ids, in float64. Top K: what the stages record, at
several K.

    python -m tip_ray.demo.smollm2 --output models/smollm2
    python -m tests.benchmarks.bench_support --problems DIR --output outputs/bench

N  response tokens        V  shared vocabulary        K  ids of a token's support
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks import real_rows
from tests.benchmarks.common import print_table, write_json
from tests.benchmarks.memory import in_fresh_process
from tests.benchmarks.real_rows import Scores
from tip_ray.compute.divergence import (
    row_statistics,
    support_divergence,
    tail_logprob,
    token_divergence,
)
from tip_ray.contract import tables
from tip_ray.contract.spec import RunSpec
from tip_ray.stages.pair_checks import check_pair

CHUNK_ROWS = 128


def main() -> int:
    options = _options()
    if gone := real_rows.absent(options):
        print(f"support: left out, there is no {gone}; see the top of this file")  # noqa: T201
        return 0
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for noise in options.noise:
            near = Path(folder) / f"noise-{noise}"
            in_fresh_process(save_noisy, options.models / "teacher", near, noise)
            figures += measure(f"teacher, {noise:.3g} noise", near, options)
    figures += measure("18-layer cut", options.models / "student", options)
    write_json(options.output, "support", figures, rules="Jaccard of the kept sets")
    print_table([_row(one) for one in figures])
    return 0


def _options() -> argparse.Namespace:
    parser = real_rows.parser(__doc__.splitlines()[0])
    parser.add_argument("--noise", type=float, nargs="*", default=[0.03])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--response-tokens", type=int, default=128)
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 32, 64, 128, 512])
    return parser.parse_args()


def save_noisy(teacher: Path, path: Path, noise: float) -> None:
    """The teacher with every weight multiplied by 1 + noise x a normal draw, in float32."""
    from tip_ray.stages.models import load_causal_lm

    shutil.copytree(teacher, path)
    model = load_causal_lm(str(teacher), "float32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)


def measure(name: str, student: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record a K for one student."""
    overrides = {
        "student.model": str(student),
        "prompts.prompts_per_step": options.prompts,
        "rollout.max_response_tokens": options.response_tokens,
        "support.k": max(options.k),
    }
    spec = real_rows.smollm2_spec(options, overrides)
    table = real_rows.rollouts(spec, 1)[0]
    columns = score(spec, table, options.k)
    offsets = tables.offsets(table, "response_ids")
    entropy_N = columns["entropy"].numpy()

    def scores(kind: str | int) -> Scores:
        return Scores(
            entropy_N,
            columns[f"reverse_kl {kind}"],
            columns[f"forward_kl {kind}"],
            offsets,
            columns["vocab_size"],
        )

    exact = scores("exact")
    about = {
        "student": name,
        "rollouts": table.num_rows,
        "tokens": len(entropy_N),
        "student_entropy": float(entropy_N.mean()),
    }
    return [about | _errors(exact, scores(k), columns, k) for k in options.k]


def _errors(exact: Scores, found: Scores, columns: dict[str, Any], k: int) -> dict[str, Any]:
    """What scores at K lack; a support's divergence is never above the exact one."""
    record: dict[str, Any] = {"k": k}
    for letter, name in (("delta", "reverse_kl_N"), ("phi", "forward_kl_N")):
        exact_N, found_N = getattr(exact, name), getattr(found, name)
        missing_N = exact_N - found_N
        record[letter] = {
            "mean": float(exact_N.mean()),
            "p98": float(np.quantile(exact_N, 0.98)),
            "max": float(exact_N.max()),
            "error_mean": float(missing_N.mean()),
            "error_p95": float(np.quantile(missing_N, 0.95)),
            "error_least": float(missing_N.min()),
        }
    for side in ("student", "teacher"):
        outside_N = columns[f"{side} outside {k}"].exp()
        record[f"{side}_outside"] = float(outside_N.mean())
    return record | {"jaccard": real_rows.jaccards(exact, found)}


@torch.inference_mode()
def score(spec: RunSpec, table: Any, ks: list[int]) -> dict[str, Any]:
    """Columns [N] of `table`'s response tokens: exact ones and, by K, those on the top K."""
    facts = check_pair(spec)
    torch.set_num_threads(spec.teacher.num_cpus)
    student, teacher = (
        real_rows.hidden_states(path, "float32", table, facts.vocab_size)
        for path in (facts.student_path, facts.teacher_path)
    )
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(student[0]), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        logits = (hidden_ND[rows] @ head_VD.T for hidden_ND, head_VD in (student, teacher))
        parts.append(_chunk(*logits, ks, spec.loss.tail_floor_nats))
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return columns | {"vocab_size": facts.vocab_size}


def _chunk(
    student_NV: Tensor, teacher_NV: Tensor, ks: list[int], floor_nats: float
) -> dict[str, Tensor]:
    exact = token_divergence(student_NV.double(), teacher_NV.double(), beta=1.0)
    found = {
        "entropy": exact.entropy,
        "reverse_kl exact": exact.reverse_kl,
        "forward_kl exact": exact.forward_kl,
    }
    widest = row_statistics(student_NV, max(ks), student_NV.shape[1])
    teacher_NV = teacher_NV.log_softmax(-1)
    on_teacher_NK = teacher_NV.gather(1, widest.topk_ids_NK)
    teacher_tail_N = tail_logprob(teacher_NV, widest.topk_ids_NK)
    for k in ks:
        student = _narrower(widest.topk_logprobs_NK, widest.tail_logprob_N, k)
        teacher = _narrower(on_teacher_NK, teacher_tail_N, k)
        reverse_N, forward_N = support_divergence(*student, *teacher, floor_nats)
        found |= {f"reverse_kl {k}": reverse_N, f"forward_kl {k}": forward_N}
        found |= {f"student outside {k}": student[1], f"teacher outside {k}": teacher[1]}
    return found


def _narrower(logprobs_NK: Tensor, tail_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first `k` ids of a support, the others moved into its tail."""
    outside_NJ = torch.cat([logprobs_NK[:, k:], tail_N[:, None]], dim=1)
    return logprobs_NK[:, :k], outside_NJ.logsumexp(-1)


def _row(one: dict[str, Any]) -> dict[str, Any]:
    delta, phi = one["delta"], one["phi"]
    return {
        "student": one["student"],
        "K": one["k"],
        "mass outside, student / teacher": f"{one['student_outside']:.3f} / "
        f"{one['teacher_outside']:.3f}",
        "delta": delta["mean"],
        "its error, mean / p95": f"{delta['error_mean']:.2g} / {delta['error_p95']:.2g}",
        "phi": phi["mean"],
        "error, mean / p95": f"{phi['error_mean']:.2g} / {phi['error_p95']:.2g}",
        **{name: f"{value:.3f}" for name, value in one["jaccard"].items()},
    }


if __name__ == "__main__":
    sys.exit(main())
