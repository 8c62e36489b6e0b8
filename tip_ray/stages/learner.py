"""LearnerActor: SELECTED -> an update of the student, its weights by version, its export.

One actor is one FSDP2 rank. Methods marked collective must be called on every rank, in the same
order; a rank that is missing makes the others fail after GROUP_TIMEOUT.

    step    SELECTED of this rank -> micro-batches -> forward, backward, gradients summed over ranks
            -> clip -> AdamW. The weights of kept tokens hold all normalisation, so the step's loss
            is the plain sum over kept tokens, micro-batches and ranks.
    publish masters -> student.dtype -> one WeightGroup a layer group, from rank 0
    export  the same, as a Hugging Face directory
"""

from __future__ import annotations

import math
import resource
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import pyarrow as pa
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tip_ray.compute.packing import MicroBatch, empty_micro_batch, micro_batches
from tip_ray.contract.errors import ReplicaError, TableError
from tip_ray.contract.headers import LearnerReport
from tip_ray.contract.seeds import derive_seed
from tip_ray.contract.spec import LearnerSpec, LossSpec, StudentSpec
from tip_ray.contract.tables import concat, newest_attempts, selected_schema
from tip_ray.runtime.weights import WeightGroup
from tip_ray.stages import fsdp
from tip_ray.stages.export import write_export
from tip_ray.stages.schedule import learning_rate

# A float16 gradient below 6e-8 is 0, and a token's weight is one over the step's kept tokens. What
# overflows instead is not finite, so that the update is skipped.
FLOAT16_LOSS_SCALE = 4096.0
GROUP_TIMEOUT = timedelta(minutes=30)  # the slowest rank's rows, or a slow consumer of publish


@dataclass(frozen=True)
class _Sums:
    """What one rank adds up over its micro-batches."""

    loss: float
    tokens: int
    kept: int
    gap_sum: float
    gap_max: float


@dataclass(frozen=True)
class _Group:
    """What exists once a rank has joined its group."""

    root: fsdp.KeptStudent
    prefixes: tuple[str, ...]
    optimizer: torch.optim.Optimizer
    device: torch.device
    loss_scale: float


class LearnerActor:
    """One FSDP2 rank: float32 master weights, compute in the student's dtype, AdamW."""

    def __init__(
        self,
        student: StudentSpec,
        learner: LearnerSpec,
        loss: LossSpec,
        model_path: str,
        vocab_size: int,
        k_width: int,
        steps: int,
        rank: int,
        seed: int,
    ) -> None:
        """Keep the rank's part of the spec; nothing is loaded before `join`.

        `model_path` is a local checkpoint directory, `vocab_size` the number of ids that student
        and teacher share, `k_width` the support width of SELECTED, `seed` the run's.
        """
        self._student, self._learner, self._loss = student, learner, loss
        self._model_path, self._vocab_size, self._k_width = model_path, vocab_size, k_width
        self._steps, self._rank, self._seed = steps, rank, seed
        self._store: dist.TCPStore | None = None
        self._group: _Group | None = None
        self._reports: dict[int, LearnerReport] = {}
        self._step = 0  # the last step trained

    def address(self) -> tuple[str, int]:
        """Open the group's rendezvous on this node (rank 0 only) and say where it is."""
        self._store = dist.TCPStore(
            "localhost",  # for this rank's own connection; the store listens on every interface
            0,
            is_master=True,
            wait_for_workers=False,
            timeout=GROUP_TIMEOUT,
        )
        return _node_ip(), self._store.port

    def join(self, host: str, port: int, world_size: int) -> None:
        """Form the group and shard the student over it. Collective.

        Raises:
            NotSupportedError: the student's architecture cannot be trained this way.
        """
        torch.set_num_threads(self._learner.num_cpus)
        device = torch.device("cuda" if self._learner.num_gpus else "cpu")
        store = self._store or dist.TCPStore(host, port, is_master=False, timeout=GROUP_TIMEOUT)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=self._rank,
            world_size=world_size,
            timeout=GROUP_TIMEOUT,
        )
        model = fsdp.load_master(
            self._model_path,
            self._student,
            gradient_checkpointing=self._learner.gradient_checkpointing,
        )
        prefixes = fsdp.layer_prefixes(model)
        root = fsdp.KeptStudent(model, self._loss, self._vocab_size)
        mesh = init_device_mesh(device.type, (world_size,))
        fsdp.shard(root, prefixes, mesh, getattr(torch, self._student.dtype))
        scale = FLOAT16_LOSS_SCALE if self._student.dtype == "float16" else 1.0
        self._group = _Group(root, prefixes, self._adamw(root), device, scale)
        self._reports, self._step = {}, 0

    def _adamw(self, root: fsdp.KeptStudent) -> torch.optim.Optimizer:
        learner = self._learner
        return torch.optim.AdamW(
            root.parameters(),
            lr=learner.lr,
            betas=learner.betas,
            eps=learner.eps,
            weight_decay=learner.weight_decay,
            fused=True,
        )

    def train_step(self, step: int, *selected: pa.Table) -> LearnerReport:
        """Train update `step` (the first is 1) on this rank's SELECTED parts. Collective.

        A step that was trained already answers with its first report and changes nothing. A
        non-finite loss or gradient on any rank skips the update on all; so does a gradient of
        exactly zero (nothing was kept), which is not reported as skipped.

        Raises:
            TableError: a part does not conform, or holds rows of another step.
            ReplicaError: `step` does not follow the last one trained.
        """
        if step in self._reports:
            return self._reports[step]
        if step != self._step + 1:
            raise ReplicaError(
                f"learner rank {self._rank}: asked for step {step} after step {self._step}; "
                "load the checkpoint before it"
            )
        started = time.perf_counter()
        group = self._joined()
        torch.manual_seed(derive_seed(self._seed, "learner", step, self._rank))  # dropout
        batches = self._micro_batches(step, selected)
        count = fsdp.max_over_ranks(len(batches), group.device)
        sums = self._accumulate(batches, count)
        loss, norm, skipped = self._update(step, sums.loss)
        self._reports[step] = LearnerReport(
            step=step,
            loss=loss,
            grad_norm=norm,
            learning_rate=learning_rate(self._learner, step, self._steps),
            skipped=skipped,
            tokens=sums.tokens,
            kept=sums.kept,
            logprob_gap_sum=sums.gap_sum,
            logprob_gap_max=sums.gap_max,
            peak_bytes=_peak_bytes(group.device),
            busy_s=time.perf_counter() - started,
            micro_batches=len(batches),
        )
        self._step = step
        return self._reports[step]

    def _micro_batches(self, step: int, selected: Sequence[pa.Table]) -> list[MicroBatch]:
        table = newest_attempts(concat(selected, selected_schema(self._k_width)))
        foreign = set(table.column("step").to_pylist()) - {step}
        if foreign:
            raise TableError(f"column 'step': rows of step {min(foreign)}, expected step {step}")
        return list(micro_batches(table, self._learner.micro_batch_tokens))

    def _accumulate(self, batches: Sequence[MicroBatch], count: int) -> _Sums:
        """Forward and backward of `count` micro-batches: ranks must make the same collectives.

        Every micro-batch reduces its gradients: that costs traffic, but between micro-batches a
        rank holds its own shard of them only.
        """
        group = self._joined()
        losses, gaps = [], []  # read at the end: a GPU need not wait in between
        padding = [empty_micro_batch(self._k_width)] * (count - len(batches))
        for batch in (*batches, *padding):
            batch = batch.to(group.device)
            batch = replace(batch, weight_N=batch.weight_N * group.loss_scale)
            loss, stats = group.root(batch)
            loss.backward()
            losses.append(loss.detach().double())
            gaps.append((batch.student_logprob_N - stats.sampled_logprob_N).abs().double())
        all_gaps = torch.cat(gaps).tolist() if gaps else []
        return _Sums(
            loss=sum(torch.stack(losses).tolist()) / group.loss_scale if losses else 0.0,
            tokens=sum(batch.tokens for batch in batches),
            kept=len(all_gaps),
            gap_sum=sum(all_gaps),
            gap_max=max(all_gaps, default=0.0),
        )

    def _update(self, step: int, local_loss: float) -> tuple[float, float, bool]:
        """Clip and step, or skip; the summed loss, the gradient's norm, and whether skipped."""
        group = self._joined()
        gradients = fsdp.local_gradients(group.root)
        for gradient in gradients:
            gradient.div_(group.loss_scale)
        square = float(torch.nn.utils.get_total_norm(gradients)) ** 2
        loss, square = fsdp.sum_over_ranks(local_loss, square, device=group.device)
        norm = math.sqrt(square)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and norm > 0:
            for gradient in gradients:
                gradient.mul_(min(1.0, self._learner.grad_clip / norm))
            for parameters in group.optimizer.param_groups:
                parameters["lr"] = learning_rate(self._learner, step, self._steps)
            group.optimizer.step()
        group.optimizer.zero_grad(set_to_none=True)
        return loss, norm, not finite

    def publish(self, version: int) -> Iterator[int | WeightGroup]:
        """The student's weights after step `version`, a group a decoder layer. Collective.

        A generator that must be walked to its end: rank 0 yields bytes, group, bytes, group ...,
        the other ranks only take part.

        Raises:
            ReplicaError: the weights here are of another version.
        """
        if version != self._step:
            raise ReplicaError(
                f"learner rank {self._rank}: asked for version {version} after step {self._step}; "
                "publish what was trained last"
            )
        for tensors in self._whole_groups():
            packed = WeightGroup.pack(tensors)
            yield packed.nbytes
            yield packed

    def export(self, url: str, model_path: str) -> list[str]:
        """Write the student as a Hugging Face directory at `url`. Collective.

        Config, tokenizer and the like come from `model_path`. Rank 0 writes, and returns the
        file names; the other ranks return nothing.
        """
        groups = self._whole_groups()
        if self._rank:
            list(groups)  # take part in the gathering
            return []
        return write_export(url, model_path, groups, self._student.dtype)

    def _whole_groups(self) -> Iterator[dict[str, torch.Tensor]]:
        """Layer groups in the student's dtype on the CPU of rank 0; nothing on the others."""
        group = self._joined()
        dtype = getattr(torch, self._student.dtype)
        for tensors in fsdp.gather_groups(group.root, group.prefixes, dtype):
            if self._rank == 0:
                yield {name: tensor.cpu() for name, tensor in tensors.items()}

    def close(self) -> None:
        """Leave the group; the actor can join another."""
        self._group = self._store = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _joined(self) -> _Group:
        if self._group is None:
            raise ReplicaError(f"learner rank {self._rank}: in no group yet; call join first")
        return self._group


def _node_ip() -> str:
    """The address under which other nodes reach this one; loopback where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.254.254.254", 1))  # picks a route; sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
