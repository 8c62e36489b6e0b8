"""The student on FSDP2: one root module, gradients summed over ranks, full tensors gathered back.

The root's forward is trunk, kept rows and kept loss together: inside it the head's weight is a
plain full tensor, so the head never sees a dropped row and the loss makes its gradients there.

B  rows of a micro-batch    T  padded input tokens of a row    N  kept tokens of a micro-batch
D  hidden width             V  rows of the head                K  ids at which the loss compares
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tip_ray.compute.loss import KeptStats, kept_loss_with_stats
from tip_ray.compute.packing import MicroBatch
from tip_ray.contract.errors import NotSupportedError
from tip_ray.contract.spec import LossSpec, StudentSpec
from tip_ray.stages.models import load_causal_lm
from tip_ray.stages.state import MOMENTS, PARAMETER

LOSS_CHUNK_ROWS = 512  # rows of [rows, V] logits alive at once; results do not depend on it
REST = ""  # the layer group of everything outside the decoder layers


class KeptStudent(nn.Module):
    """The FSDP root: a causal language model that answers with its loss on kept tokens."""

    def __init__(self, model: PreTrainedModel, loss: LossSpec, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self._vocab_size = vocab_size

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, KeptStats]:
        """The micro-batch's weighted sum of divergences (nats), and what it saw per kept token."""
        # Right-padded rows under a causal mask need no mask of their own, and with the cache off
        # sdpa keeps its causal kernel.
        trunk = self.model.base_model(input_ids=batch.input_ids_BT, use_cache=False)
        hidden_ND = trunk.last_hidden_state.flatten(0, 1).index_select(0, batch.kept_rows_N)
        return kept_loss_with_stats(
            hidden_ND,
            self.model.get_output_embeddings().weight,
            batch.support_ids_NK,
            batch.teacher_logprobs_NK,
            batch.weight_N,
            kind=self._loss.kind,
            chunk_rows=LOSS_CHUNK_ROWS,
            teacher_tail_logprob_N=batch.teacher_tail_N,
            student_logprob_N=batch.student_logprob_N,
            sampled_ids_N=batch.sampled_ids_N,
            tail_floor_nats=self._loss.tail_floor_nats,
            beta=self._loss.beta,
            clip=self._loss.clip,
            vocab_size=self._vocab_size,
        )


def load_master(
    path: str, student: StudentSpec, *, gradient_checkpointing: bool
) -> PreTrainedModel:
    """The student of a local checkpoint directory in float32, on the CPU, ready to train.

    Raises:
        SpecError: it cannot be read, or its logits are not hidden @ head.
    """
    model = load_causal_lm(path, "float32", student.trust_remote_code, field="student.model")
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def layer_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the decoder layers, in order; ask before sharding, which renames the classes.

    Raises:
        NotSupportedError: the architecture does not say which modules are its layers.
    """
    kinds = set(model._no_split_modules or ())
    names = (name for name, part in model.named_modules() if type(part).__name__ in kinds)
    found = tuple(names)
    if not found:
        raise NotSupportedError(
            f"student {type(model).__name__}: no decoder layers found to shard; "
            "choose an architecture whose transformers class fills _no_split_modules"
        )
    return found


def shard(
    root: KeptStudent, prefixes: Iterable[str], mesh: DeviceMesh, param_dtype: torch.dtype
) -> None:
    """Shard each decoder layer, then the rest, over `mesh`; gradients are summed, in float32."""
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the loss weights stay float32
    )
    layers = [root.model.get_submodule(prefix) for prefix in prefixes]
    for module in (*layers, root):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):  # neither call recurses
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it sums


def local_gradients(root: KeptStudent) -> list[torch.Tensor]:
    """This rank's shards of all gradients there are, sharing their memory."""
    gradients = (parameter.grad for parameter in root.parameters())
    return [local(gradient) for gradient in gradients if gradient is not None]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a sharded tensor, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_over_ranks(*values: float, device: torch.device) -> tuple[float, ...]:
    """Each value summed over all ranks, in float64; NaN anywhere is NaN everywhere."""
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals, dist.ReduceOp.SUM)
    return tuple(totals.tolist())


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest value of all ranks."""
    largest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest.item())


def gather_groups(
    root: KeptStudent, prefixes: Iterable[str], dtype: torch.dtype
) -> Iterator[dict[str, torch.Tensor]]:
    """Full parameters in `dtype`, layer group by layer group, under the Hugging Face file's names.

    Collective: every rank must walk it to its end; one group is whole in memory at a time.
    """
    root.reshard()  # a forward without a backward leaves the root's own parameters whole
    by_group: dict[str, list[tuple[str, DTensor]]] = {REST: []} | {name: [] for name in prefixes}
    for name, parameter in root.model.named_parameters():  # a tied head comes once
        group = next((one for one in by_group if one and name.startswith(f"{one}.")), REST)
        by_group[group].append((name, parameter))
    for members in by_group.values():
        # Cast before gathering: half the bytes travel.
        yield {name: shard.detach().to(dtype).full_tensor() for name, shard in members}


def training_rows(
    root: KeptStudent, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, torch.Tensor]]:
    """This rank's rows of parameters and AdamW's moments, by kind and name, sharing their memory.

    Moments that AdamW has not made yet are made as it would: zeros.
    """
    root.reshard()
    named = dict(root.model.named_parameters())
    for parameter in named.values():
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }
    with torch.no_grad():
        rows = {PARAMETER: {name: local(own) for name, own in named.items()}}
        for moment in MOMENTS:
            rows[moment] = {
                name: local(optimizer.state[own][moment]) for name, own in named.items()
            }
    return rows


def updates_made(optimizer: torch.optim.Optimizer) -> int:
    """AdamW's own count, the same for every parameter."""
    return int(next(iter(optimizer.state.values()))["step"].item())


def set_updates_made(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set AdamW's own count."""
    for moments in optimizer.state.values():
        moments["step"].fill_(updates)


def whole_shapes(root: KeptStudent) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter over all ranks."""
    return {name: tuple(own.shape) for name, own in root.model.named_parameters()}
