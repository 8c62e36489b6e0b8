"""Makes the two demo checkpoints again from scratch: `python -m tip_ray.demo.train --output DIR`.

Both are the same Qwen3 architecture (334 k parameters, input and output embeddings tied), trained
from the same seed on solutions of `tip_ray.demo.carry`: the teacher's are correct, the student's
drop each carry nine times in ten. The loss is on the tokens of the solution and its end token only.

Greedy accuracy on `carry-eval`: teacher 100 %, student 42 % (the carry-free problems).
"""

import argparse
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tip_ray.demo.carry import (
    CHARACTERS,
    additions,
    corrupted_solution,
    problem_text,
    problems,
    worked_solution,
)

END = "<eos>"
END_ID = len(CHARACTERS)
VOCABULARY_SIZE = len(CHARACTERS) + 1
IGNORED = -100
"""Label of a position without loss."""

MAX_RESPONSE_TOKENS = 48
Solve = Callable[[int, int], str]


@dataclass(frozen=True)
class Recipe:
    """Supervised training of one checkpoint."""

    steps: int = 650
    problems_per_step: int = 128
    peak_lr: float = 3e-3
    warmup_steps: int = 50
    grad_clip: float = 1.0
    seed: int = 0


TEACHER = Recipe()
STUDENT = Recipe()


def carry_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, ids in the order of `CHARACTERS`, then the end token; adds nothing.

    Decoding joins without spaces. A character outside the alphabet is an error.
    """
    ids = {token: index for index, token in enumerate([*CHARACTERS, END])}
    tokenizer = Tokenizer(models.WordLevel(ids))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def carry_config() -> Qwen3Config:
    """334,080 parameters."""
    return Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )


def train(recipe: Recipe, solve: Solve) -> Qwen3ForCausalLM:
    """A float32 model trained on `solve`'s solutions of training problems; the end token closes."""
    torch.manual_seed(recipe.seed)
    model = Qwen3ForCausalLM(carry_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.peak_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(recipe, step))
    for step, (ids_BL, labels_BL) in enumerate(_batches(recipe, solve)):
        loss = _response_loss(model, ids_BL, labels_BL)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"  step {step}: {loss.item():.4f} nats a response token", flush=True)
    return model.eval()


@torch.inference_mode()
def greedy_responses(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> list[str]:
    """The model's greedy responses, special tokens removed; one batch, padded on the left."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    ids_BL = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=MAX_RESPONSE_TOKENS,
        do_sample=False,
    )
    new_ids = ids_BL[:, batch["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(new_ids, skip_special_tokens=True))


def greedy_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> float:
    """Fraction of `rows` whose greedy response is the whole worked solution."""
    responses = greedy_responses(model, tokenizer, [row["problem"] for row in rows])
    right = sum(text.strip() == row["answer"] for text, row in zip(responses, rows, strict=True))
    return right / len(rows)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Writes a Hugging Face checkpoint with bfloat16 weights; rounds `model` in place."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=END_ID)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo student and teacher.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write both to")
    output: Path = parser.parse_args().output
    torch.set_num_threads(1)  # the result depends on the order of sums
    drops = random.Random(STUDENT.seed)

    def solve_badly(left: int, right: int) -> str:
        return corrupted_solution(left, right, drops)

    _make(output / "carry-teacher", TEACHER, worked_solution)
    _make(output / "carry-student", STUDENT, solve_badly)


def _make(path: Path, recipe: Recipe, solve: Solve) -> None:
    print(f"{path.name}: {recipe}", flush=True)
    model, tokenizer = train(recipe, solve), carry_tokenizer()
    save(model, tokenizer, path)
    accuracy = greedy_accuracy(model, tokenizer, problems("carry-eval"))
    print(f"{path.name}: greedy accuracy on carry-eval {accuracy:.1%}, in bfloat16", flush=True)


def _lr_factor(recipe: Recipe, step: int) -> float:
    """Linear warm-up to 1, then linear decay to 0 at the last step."""
    warm = (step + 1) / recipe.warmup_steps
    return min(warm, (recipe.steps - step) / (recipe.steps - recipe.warmup_steps))


def _batches(recipe: Recipe, solve: Solve) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels [B, L], padded on the right; prompts and padding have no loss."""
    tokenizer = carry_tokenizer()
    stream = additions(random.Random(recipe.seed), held_out=False)
    for _ in range(recipe.steps):
        pairs = islice(stream, recipe.problems_per_step)
        yield _padded([_row(tokenizer, *pair, solve) for pair in pairs])


def _row(
    tokenizer: PreTrainedTokenizerFast, left: int, right: int, solve: Solve
) -> tuple[list[int], list[int]]:
    prompt = tokenizer.encode(problem_text(left, right))
    response = [*tokenizer.encode(solve(left, right)), END_ID]
    return prompt + response, [IGNORED] * len(prompt) + response


def _padded(rows: Iterable[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    ids, labels = zip(*rows, strict=True)
    return _stacked(ids, END_ID), _stacked(labels, IGNORED)


def _stacked(rows: Iterable[list[int]], fill: int) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def _response_loss(model: Qwen3ForCausalLM, ids_BL: Tensor, labels_BL: Tensor) -> Tensor:
    """Mean cross-entropy in nats. Padding follows the row, so that causality alone hides it."""
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    return cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=IGNORED
    )


if __name__ == "__main__":
    main()
