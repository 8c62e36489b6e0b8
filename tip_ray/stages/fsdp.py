"""The student on FSDP2: one root module, gradients summed over ranks, full tensors gathered back.

The root's forward is trunk, kept rows and kept loss together: inside it the head's weight is a
plain full tensor, so the head never sees a dropped row and the loss makes its gradients there.
A teacher's head is no part of the module: sharded rows that are gathered for a loss and dropped.

B  rows of a micro-batch    T  padded input tokens of a row    N  kept tokens of a micro-batch
D  hidden width             V  rows of the head                E  the teacher's hidden width
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from tip_ray.compute.loss import KeptStats, hidden_loss_with_stats, kept_loss_with_stats
from tip_ray.compute.packing import HiddenTargets, MicroBatch
from tip_ray.contract.errors import NotSupportedError
from tip_ray.contract.spec import LossSpec, StudentSpec, TeacherSpec
from tip_ray.stages.head_weight import head_weight
from tip_ray.stages.models import load_causal_lm, path_on_this_node
from tip_ray.stages.state import MOMENTS, PARAMETER, first_row

LOSS_CHUNK_ROWS = 512  # rows of [rows, V] logits alive at once; results do not depend on it
REST = ""  # the layer group of everything outside the decoder layers


@dataclass(frozen=True)
class TeacherModel:
    """Whose hidden states the student is compared with."""

    spec: TeacherSpec
    path: str  # the local checkpoint directory that the driver resolved


class KeptStudent(nn.Module):
    """The FSDP root: a causal language model that answers with its loss on kept tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        loss: LossSpec,
        vocab_size: int,
        teacher_head_VE: torch.Tensor | None = None,
    ) -> None:
        """`teacher_head_VE` is what hidden targets need, whole or as `teacher_head` gives it."""
        super().__init__()
        self.model = model
        self._teacher_head_VE = teacher_head_VE
        self._loss = loss
        self._vocab_size = vocab_size

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, KeptStats]:
        """The micro-batch's weighted sum of divergences (nats), and what it saw per kept token."""
        # Right-padded rows under a causal mask need no mask of their own, and with the cache off
        # sdpa keeps its causal kernel.
        trunk = self.model.base_model(input_ids=batch.input_ids_BT, use_cache=False)
        hidden_ND = trunk.last_hidden_state.flatten(0, 1).index_select(0, batch.kept_rows_N)
        head_VD = self.model.get_output_embeddings().weight
        common: dict[str, Any] = {
            "weight_N": batch.weight_N,
            "kind": self._loss.kind,
            "chunk_rows": LOSS_CHUNK_ROWS,
            "sampled_ids_N": batch.sampled_ids_N,
            "beta": self._loss.beta,
            "tail_floor_nats": self._loss.tail_floor_nats,
            "vocab_size": self._vocab_size,
        }
        if isinstance(batch.targets, HiddenTargets):
            assert self._teacher_head_VE is not None, "hidden targets without the teacher's head"
            teacher = (batch.targets.hidden_NE, whole(self._teacher_head_VE))
            return hidden_loss_with_stats(hidden_ND, head_VD, *teacher, **common)
        return kept_loss_with_stats(
            hidden_ND,
            head_VD,
            batch.targets.ids_NK,
            batch.targets.logprobs_NK,
            teacher_tail_logprob_N=batch.targets.tail_N,
            student_logprob_N=batch.student_logprob_N,
            clip=self._loss.clip,
            **common,
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


def teacher_head(teacher: TeacherModel, vocab_size: int, mesh: DeviceMesh) -> DTensor:
    """The teacher's LM head [V, E] in its own dtype, sharded over `mesh`; each rank reads its rows.

    Raises:
        SpecError: the checkpoint cannot be found, or has no plain linear head.
    """
    spec = teacher.spec
    rank, ranks = mesh.get_local_rank(), mesh.size()
    own_VE = head_weight(
        path_on_this_node(teacher.path, spec.model, spec.revision, "teacher.model"),
        spec.dtype,
        slice(first_row(vocab_size, rank, ranks), first_row(vocab_size, rank + 1, ranks)),
        spec.trust_remote_code,
        "teacher.model",
        "use teacher.targets topk",
    )
    width = own_VE.shape[1]
    return DTensor.from_local(
        own_VE.to(mesh.device_type),
        mesh,
        [Shard(0)],
        run_check=False,
        shape=torch.Size((vocab_size, width)),
        stride=(width, 1),  # named: ranks may hold unequal numbers of rows
    )


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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows of a sharded tensor; collective. A plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
