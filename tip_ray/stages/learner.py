"""LearnerActor: SELECTED -> an update of the student, its weights by version, its export.

One actor is one FSDP2 rank. Methods marked collective must be called on every rank, in the same
order; a rank that is missing makes the others fail after rendezvous.GROUP_TIMEOUT.

    step    SELECTED of this rank -> micro-batches -> forward, backward, gradients summed over ranks
            -> clip -> AdamW. The weights of kept tokens hold all normalisation, so the step's loss
            is the plain sum over kept tokens, micro-batches and ranks.
    publish masters -> student.dtype -> one WeightGroup a layer group, from rank 0
    export  the same, as a Hugging Face directory
    save, load  masters and AdamW's moments of each rank's own rows, bit for bit
"""

from __future__ import annotations

import itertools
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tip_ray.compute.packing import MicroBatches, empty_micro_batch, micro_batches
from tip_ray.contract.errors import ReplicaError, TableError
from tip_ray.contract.headers import LearnerReport
from tip_ray.contract.seeds import derive_seed
from tip_ray.contract.spec import LearnerSpec, LossSpec, StudentSpec
from tip_ray.contract.tables import Targets, concat, newest_attempts, selected_schema, tried
from tip_ray.runtime.weights import WeightGroup
from tip_ray.stages import fsdp, rendezvous, state
from tip_ray.stages.export import write_export
from tip_ray.stages.models import path_on_this_node
from tip_ray.stages.schedule import learning_rate
from tip_ray.stages.state import SavedFile

# A float16 gradient below 6e-8 is 0, and a token's weight is one over the step's kept tokens. What
# overflows instead is not finite, so that the update is skipped.
FLOAT16_LOSS_SCALE = 4096.0


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
    world_size: int
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
        width: int,
        steps: int,
        rank: int,
        seed: int,
        teacher: fsdp.TeacherModel | None = None,
    ) -> None:
        """Keep the rank's part of the spec; nothing is loaded before `join`.

        `model_path` is a local checkpoint directory, `vocab_size` the number of ids that student
        and teacher share, `width` that of the targets in SELECTED, `seed` the run's. With
        `teacher` the targets are its hidden states: the ranks hold its head, sharded over them.
        """
        self._student, self._learner, self._loss = student, learner, loss
        self._model_path, self._vocab_size, self._teacher = model_path, vocab_size, teacher
        self._targets: tuple[int, Targets] = (width, "hidden" if teacher else "topk")
        self._steps, self._rank, self._seed = steps, rank, seed
        self._store: dist.TCPStore | None = None
        self._group: _Group | None = None
        self._report: LearnerReport | None = None  # of the last step trained; it names every row
        self._step = 0  # the last step trained

    def open_port(self) -> int:
        """Open the group's rendezvous on this node (rank 0 only) and say on which port."""
        self._store = rendezvous.open_store()
        return self._store.port

    def join(self, host: str, port: int, world_size: int) -> None:
        """Form the group and shard the student over it. Collective.

        Raises:
            SpecError: the student or the teacher's head cannot be read, or logits of one are not
                hidden @ head.
            NotSupportedError: its architecture does not say which modules are its layers.
        """
        torch.set_num_threads(self._learner.num_cpus)
        device = torch.device("cuda" if self._learner.num_gpus else "cpu")
        model = fsdp.load_master(
            self._on_this_node(self._model_path),
            self._student,
            gradient_checkpointing=self._learner.gradient_checkpointing,
        )
        prefixes = fsdp.layer_prefixes(model)
        store = self._store or dist.TCPStore(host, port, is_master=False)
        rendezvous.meet(store, self._rank, world_size, device)
        mesh = init_device_mesh(device.type, (world_size,))
        theirs = self._teacher and fsdp.teacher_head(self._teacher, self._vocab_size, mesh)
        root = fsdp.KeptStudent(model, self._loss, self._vocab_size, theirs)
        fsdp.shard(root, prefixes, mesh, getattr(torch, self._student.dtype))
        scale = FLOAT16_LOSS_SCALE if self._student.dtype == "float16" else 1.0
        self._group = _Group(root, prefixes, self._adamw(root), device, world_size, scale)
        self._report, self._step = None, 0

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

        The last step, asked for again, answers with its first report and changes nothing. A
        non-finite loss or gradient on any rank skips the update on all; so does a gradient of
        exactly zero (nothing was kept), which is not reported as skipped.

        Raises:
            TableError: a part does not conform, or holds rows of another step.
            ReplicaError: `step` does not follow the last one trained.
        """
        if self._report is not None and step == self._report.step:
            return self._report
        if step != self._step + 1:
            raise ReplicaError(
                f"learner rank {self._rank}: asked for step {step} after step {self._step}; "
                "load the checkpoint before it"
            )
        started = time.perf_counter()
        group = self._joined()
        torch.manual_seed(derive_seed(self._seed, "learner", step, self._rank))  # dropout
        table = self._own_rows(step, selected)
        batches = micro_batches(table, self._learner.micro_batch_tokens)
        count = fsdp.max_over_ranks(len(batches), group.device)
        sums = self._accumulate(batches, count)
        loss, norm, skipped = self._update(step, sums.loss)
        self._report = LearnerReport(
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
            trained=tried(table),
        )
        self._step = step
        return self._report

    def _own_rows(self, step: int, selected: Sequence[pa.Table]) -> pa.Table:
        """One row a rollout, however often it was sent."""
        table = newest_attempts(concat(selected, selected_schema(*self._targets)))
        foreign = set(table.column("step").to_pylist()) - {step}
        if foreign:
            raise TableError(f"column 'step': rows of step {min(foreign)}, expected step {step}")
        return table

    def _accumulate(self, batches: MicroBatches, count: int) -> _Sums:
        """Forward and backward of `count` micro-batches: ranks must make the same collectives.

        Every micro-batch reduces its gradients: that costs traffic, but between micro-batches a
        rank holds its own shard of them only.
        """
        group = self._joined()
        losses, gaps, tokens = [], [], 0  # read at the end: a GPU need not wait in between
        padding = [empty_micro_batch(*self._targets)] * (count - len(batches))
        for batch in itertools.chain(batches, padding):
            batch = batch.to(group.device)
            batch = replace(batch, weight_N=batch.weight_N * group.loss_scale)
            loss, stats = group.root(batch)
            loss.backward()
            tokens += batch.tokens
            losses.append(loss.detach().double())
            gaps.append((batch.student_logprob_N - stats.sampled_logprob_N).abs().double())
        all_gaps = torch.cat(gaps).tolist() if gaps else []
        return _Sums(
            loss=sum(torch.stack(losses).tolist()) / group.loss_scale if losses else 0.0,
            tokens=tokens,
            kept=len(all_gaps),
            gap_sum=sum(all_gaps),
            gap_max=max(all_gaps, default=0.0),
        )

    def _update(self, step: int, local_loss: float) -> tuple[float, float, bool]:
        """Clip and step, or skip; the summed loss, the gradient's norm, and whether skipped."""
        group = self._joined()
        gradients = fsdp.local_gradients(group.root)
        square = float(torch.nn.utils.get_total_norm(gradients)) ** 2
        loss, square = fsdp.sum_over_ranks(local_loss, square, device=group.device)
        norm = math.sqrt(square) / group.loss_scale
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and norm > 0:
            factor = min(1.0, self._learner.grad_clip / norm) / group.loss_scale
            for gradient in gradients:
                gradient.mul_(factor)
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
        self._check_at(version, "version")
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
        return write_export(
            url, self._on_this_node(model_path, weights=False), groups, self._student.dtype
        )

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
        rendezvous.part()

    def save(self, url: str, step: int) -> SavedFile:
        """Write this rank's part of the training state after `step` into the directory `url`.

        Every rank must, in any order. The schedule is a function of the step, and random numbers
        come from the run's seed: neither is state.

        Raises:
            ReplicaError: the state here is that of another step.
        """
        self._check_at(step, "the state of step")
        group = self._joined()
        rows = fsdp.training_rows(group.root, group.optimizer)
        header = state.Header(
            step=step,
            updates=fsdp.updates_made(group.optimizer),
            rank=self._rank,
            ranks=group.world_size,
            shapes=fsdp.whole_shapes(group.root),
        )
        flat = {f"{kind}/{name}": own for kind in rows for name, own in rows[kind].items()}
        return state.save_rows(url, header, flat)

    def load(self, url: str, names: Sequence[str] | None = None) -> int:
        """Take up the state that any number of ranks saved in `url`; returns its step.

        Of the files there, `names` are read: those that the manifest lists.

        Every rank must, before it trains on.

        Raises:
            RunDirectoryError: it is missing, incomplete, broken, or another student's.
        """
        group = self._joined()
        rows = fsdp.training_rows(group.root, group.optimizer)
        header = state.load_rows(url, self._rank, group.world_size, rows, names)
        fsdp.set_updates_made(group.optimizer, header.updates)
        self._report, self._step = None, header.step
        return header.step

    def _check_at(self, step: int, what: str) -> None:
        if step != self._step:
            raise ReplicaError(
                f"learner rank {self._rank}: asked for {what} {step} after step {self._step}; "
                "ask for what was trained last"
            )

    def _on_this_node(self, model_path: str, *, weights: bool = True) -> str:
        model, revision = self._student.model, self._student.revision
        return path_on_this_node(model_path, model, revision, "student.model", weights=weights)

    def _joined(self) -> _Group:
        if self._group is None:
            raise ReplicaError(f"learner rank {self._rank}: in no group yet; call join first")
        return self._group


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
