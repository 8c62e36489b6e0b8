"""Formulas of the plan: bytes on a device, and seconds by a device's data sheet.

    weights              dtype P                      P parameters
    KV cache a token     2 dtype L C                  keys and values of every layer
    masters, gradients   4 P / R each                 float32, sharded over R ranks by FSDP2
    Adam                 8 P / R                      two float32 moments, from the first update
    compute copies       dtype (P_root + 2 P_layer)   the root stays gathered; of the layers one
                                                      computes while the next arrives
    activations          T L a                        what autograd saves of T tokens, a in a layer
    with checkpointing   T (L dtype D + a)            the layers' inputs, one layer recomputed
    loss                 N D (dtype + 4) + 4 V D      kept hidden states, their gradient and the
                         + 4 buffers c V              head's in float32, c rows of logits
    root's gradients     (dtype + 4) P_root           as computed, and in float32 to be summed

The loss and the root's gradients are never alive together. FLOPs are 2 P a token for a forward, 6 P
for forward and backward, 8 P where the forward is made twice (Kaplan et al. 2020, arXiv
2001.08361; attention's own products left out). A decoded token waits until all weights and the
cache of its batch have been read once.

L  layers    D  hidden width    V  rows of the head    C  width of all key heads    P  parameters
T  tokens    N  kept tokens     R  ranks
"""

from __future__ import annotations

from dataclasses import dataclass

from tip_ray.control.plan_models import Architecture

FLOAT32_BYTES = 4
HEAD_CHUNK_ROWS = 512  # rows of the learner's logits alive at once
# Of [rows, V] in float32 at once, in the loss: log-probabilities and their gradient, and what
# log-softmax makes between; with the teacher's full distribution two more.
LOSS_BUFFERS = 3
FULL_LOSS_BUFFERS = 5
SCORING_BUFFERS = 3


@dataclass(frozen=True)
class Device:
    """A device's data sheet, and the shares of it that are reached: an estimate, not a promise."""

    name: str
    memory_bytes: float
    flops: float  # a second, dense, bfloat16
    bytes_a_second: float  # of its memory
    training_share: float = 0.4  # of flops, in forward and backward
    scoring_share: float = 0.5  # of flops, in a forward
    decoding_share: float = 0.5  # of bytes_a_second


H100 = Device("H100 SXM 80 GB", 80e9, 989e12, 3.35e12)


def weight_bytes(model: Architecture, dtype_bytes: int) -> int:
    """Of the whole model in one dtype."""
    return model.parameters * dtype_bytes


def kv_bytes_a_token(model: Architecture, dtype_bytes: int) -> int:
    """Keys and values of one token in every layer."""
    return 2 * model.layers * model.kv_width * dtype_bytes


@dataclass(frozen=True)
class TrainingBytes:
    """Of one learner rank, from the first update on."""

    masters: float
    gradients: float
    adam: float
    copies: float  # gathered weights in the compute dtype
    activations: float
    loss: float  # or the root's gradients, where they are more

    @property
    def total(self) -> float:
        resident = self.masters + self.gradients + self.adam + self.copies
        return resident + self.activations + self.loss


def training_bytes(
    model: Architecture,
    *,
    ranks: int,
    dtype_bytes: int,
    tokens: int,
    kept: int,
    checkpointing: bool,
    teacher_head: int = 0,
) -> TrainingBytes:
    """Of a rank that trains `tokens` tokens at once, `kept` of them kept.

    Args:
        teacher_head: parameters of the teacher's head, where the targets are hidden states.
    """
    shard = FLOAT32_BYTES * model.parameters / ranks
    gathered = model.root_parameters + (2 if ranks > 1 else 1) * model.layer_parameters
    saved = activation_bytes(model, tokens, dtype_bytes, checkpointing=checkpointing)
    loss: float = loss_bytes(model, kept, dtype_bytes, full=teacher_head > 0)
    if teacher_head:  # its shard, and the whole while the loss runs
        loss += dtype_bytes * teacher_head * (1 + 1 / ranks)
    # The root's gradients come last, when the activations are gone.
    of_root = (dtype_bytes + FLOAT32_BYTES) * model.root_parameters
    return TrainingBytes(
        masters=shard,
        gradients=shard,
        adam=2 * shard,
        copies=dtype_bytes * gathered,
        activations=saved,
        loss=max(loss, of_root - saved),
    )


def layer_activation_bytes(model: Architecture, dtype_bytes: int) -> int:
    """What autograd saves of one token in one layer, with attention that saves no scores.

    A norm: its float32 input, the normalised values and the output. Then queries, keys, values and
    the attention's output; two halves of the MLP, the activated half and their product.
    """
    norm = FLOAT32_BYTES + 2 * dtype_bytes
    attention = dtype_bytes * (2 * model.query_width + 2 * model.kv_width)
    heads = model.qk_norm * norm * (model.query_width + model.kv_width)
    return 2 * norm * model.hidden + attention + heads + 4 * dtype_bytes * model.intermediate


def activation_bytes(
    model: Architecture, tokens: int, dtype_bytes: int, *, checkpointing: bool
) -> int:
    """What autograd saves of a micro-batch's trunk."""
    layer = layer_activation_bytes(model, dtype_bytes)
    last_norm = (FLOAT32_BYTES + 2 * dtype_bytes) * model.hidden
    if checkpointing:
        return tokens * (model.layers * dtype_bytes * model.hidden + layer + last_norm)
    return tokens * (model.layers * layer + last_norm)


def loss_bytes(model: Architecture, kept: int, dtype_bytes: int, *, full: bool = False) -> int:
    """Of the fused head and loss: kept rows, gradients, one chunk of logits."""
    rows = kept * model.hidden * (dtype_bytes + FLOAT32_BYTES)
    buffers = FULL_LOSS_BUFFERS if full else LOSS_BUFFERS
    chunk = buffers * FLOAT32_BYTES * min(kept, HEAD_CHUNK_ROWS) * model.vocab
    return rows + FLOAT32_BYTES * model.head_parameters + chunk


def scoring_bytes(
    model: Architecture, *, devices: int, dtype_bytes: int, tokens: int, chunk_rows: int
) -> tuple[float, float, float]:
    """(weights, activations, head chunk) of one device of a teacher spread over `devices`.

    Nothing is saved: a forward holds one layer's inputs, and the MLP's three halves.
    """
    live = tokens * dtype_bytes * (4 * model.hidden + 3 * model.intermediate)
    chunk = SCORING_BUFFERS * FLOAT32_BYTES * chunk_rows * model.vocab
    return weight_bytes(model, dtype_bytes) / devices, live, chunk


def training_seconds(
    model: Architecture, tokens: int, ranks: int, device: Device, *, checkpointing: bool
) -> float:
    """Forward and backward of a step's tokens."""
    flops = (8 if checkpointing else 6) * model.parameters * tokens
    return flops / (ranks * device.flops * device.training_share)


def scoring_seconds(
    model: Architecture, tokens: int, replicas: int, tensor_parallel: int, device: Device
) -> float:
    """One forward of a step's tokens. A model spread by layers computes on one device at a time."""
    flops = 2 * model.parameters * tokens
    return flops / (replicas * tensor_parallel * device.flops * device.scoring_share)


def decoding_seconds(
    model: Architecture,
    *,
    rows: int,
    at_once: int,
    prompt_tokens: int,
    response_tokens: int,
    dtype_bytes: int,
    devices: int,
    device: Device,
) -> float:
    """Of one engine that decodes `rows` responses, `at_once` of them together."""
    waves = -(-rows // at_once)
    cached = (prompt_tokens + response_tokens / 2) * kv_bytes_a_token(model, dtype_bytes)
    read = weight_bytes(model, dtype_bytes) + min(rows, at_once) * cached
    return (
        waves * response_tokens * read / (devices * device.bytes_a_second * device.decoding_share)
    )
