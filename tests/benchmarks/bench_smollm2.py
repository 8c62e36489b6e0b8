"""Does SmolLM2's cut student come closer to its teacher? Reverse KL on held-out prompts.

The initial student answers held-out problems once; then the mean reverse KL to the teacher, over
the full vocabulary, at every token of those same answers is taken for the initial and for the
trained student. Plain transformers in float32: nothing of the pipeline is used to measure.

    python -m tip_ray.demo.smollm2 --output models/smollm2
    python -m tests.benchmarks.bench_smollm2 --problems DIR --output outputs/bench

DIR holds gsm8k_train.jsonl and gsm8k_test.jsonl with rows {"problem", "answer"}. The training is
job_specs/smollm2-gsm8k-cpu.yaml, unless --trained names a model.

B  rows    T  prompt and response tokens, padded on the left    V  vocabulary
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks.common import print_table, write_json

SPEC = Path(__file__).parents[2] / "job_specs" / "smollm2-gsm8k-cpu.yaml"
ROWS = 8  # a batch


def main() -> int:
    options = _options()
    absent = [one for one in _needed(options) if not one.exists()]
    if absent:
        print(f"smollm2: left out, there is no {absent[0]}; see the top of this file")  # noqa: T201
        return 0
    torch.manual_seed(0)
    trained, seconds = options.trained, None
    if trained is None:
        began = time.monotonic()
        trained = _train(options)
        seconds = time.monotonic() - began
    tokenizer = AutoTokenizer.from_pretrained(options.models / "teacher", padding_side="left")
    before = _model(options.models / "student")
    batches = [
        _rollouts(before, tokenizer, rows, options.response_tokens) for rows in _problems(options)
    ]
    teacher = _model(options.models / "teacher")
    found: dict[str, Any] = {
        "prompts": options.prompts,
        "response_tokens": sum(int(one["mask"].sum()) for one in batches),
        "steps": options.steps if options.trained is None else None,
        "training_seconds": seconds,
        "reverse_kl_nats_before": mean_reverse_kl(before, teacher, batches),
        "reverse_kl_nats_after": mean_reverse_kl(_model(trained), teacher, batches),
    }
    write_json(options.output, "smollm2", found)
    print_table([{"figure": name, "value": value} for name, value in found.items()])
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--problems", type=Path, default=Path("data"))
    parser.add_argument("--trained", type=Path, help="a trained student; default: train one")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=64)
    return parser.parse_args()


def _needed(options: argparse.Namespace) -> list[Path]:
    models = [options.models / "teacher", options.models / "student"]
    trained = options.trained or options.problems / "gsm8k_train.jsonl"
    return [*models, options.problems / "gsm8k_test.jsonl", trained]


def _train(options: argparse.Namespace) -> Path:
    """The export of a run of the job spec."""
    settings = {
        "steps": options.steps,
        "prompts.source": (options.problems / "gsm8k_train.jsonl").resolve(),
        "student.model": (options.models / "student").resolve(),
        "teacher.model": (options.models / "teacher").resolve(),
    }
    assignments = [f"--set={name}={value}" for name, value in settings.items()]
    run_id, root = f"bench-{int(time.time())}", (options.output / "runs").resolve()
    command = [sys.executable, "-m", "tip_ray.cli", "run", str(SPEC), *assignments]
    subprocess.run([*command, "--run-id", run_id, "--run-root", str(root)], check=True)
    return root / run_id / "export"


def _model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _problems(options: argparse.Namespace) -> list[list[str]]:
    lines = (options.problems / "gsm8k_test.jsonl").read_text().splitlines()[: options.prompts]
    texts = [str(json.loads(line)["problem"]) for line in lines]
    return [texts[start : start + ROWS] for start in range(0, len(texts), ROWS)]


@torch.inference_mode()
def _rollouts(student: Any, tokenizer: Any, problems: list[str], most: int) -> dict[str, Any]:
    """Sampled answers: ids [B, T], attention [B, T], and mask [B, response] of real tokens."""
    chats = [[{"role": "user", "content": problem}] for problem in problems]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    ids_BT = student.generate(
        **prompts, max_new_tokens=most, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    response = ids_BT[:, prompts["input_ids"].shape[1] :]
    ended = (response == tokenizer.eos_token_id).int()
    mask = ended.cumsum(1) - ended == 0  # up to the first end token, itself included
    attention = torch.cat([prompts["attention_mask"], mask.long()], 1)
    return {"ids": ids_BT, "attention": attention, "mask": mask}


@torch.inference_mode()
def mean_reverse_kl(student: Any, teacher: Any, batches: list[dict[str, Any]]) -> float:
    """Mean over response tokens of KL(student || teacher), full vocabulary, nats."""
    total, tokens = 0.0, 0
    for batch in batches:
        q, p = (_logprobs(model, batch) for model in (student, teacher))
        kl = (q.exp() * (q - p)).sum(-1)
        total += float((kl * batch["mask"]).double().sum())
        tokens += int(batch["mask"].sum())
    return total / tokens


def _logprobs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities [B, response, V] of every response token's distribution."""
    count = batch["mask"].shape[1]
    positions = (batch["attention"].cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=batch["ids"],
        attention_mask=batch["attention"],
        position_ids=positions,
        use_cache=False,
        logits_to_keep=count + 1,
    ).logits[:, :-1]
    return torch.log_softmax(logits, -1)


if __name__ == "__main__":
    sys.exit(main())
