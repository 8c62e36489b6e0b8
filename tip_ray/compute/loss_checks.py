"""What the public losses refuse before they compute.

N  kept tokens        D  hidden size        V  rows of the head        K  ids of a token's support
E  hidden size of the teacher
"""

from __future__ import annotations

import torch
from torch import Tensor

from tip_ray.compute.loss_full import FULL_KINDS, HiddenTeacher
from tip_ray.compute.loss_kinds import KINDS, NEG_INF, Options, Support, SupportTeacher
from tip_ray.contract.errors import DataError, SpecError


def support_teacher(
    hidden_ND: Tensor,
    lm_head_VD: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_N: Tensor | None,
    recorded_N: Tensor | None,
    options: Options,
    **per_token: Tensor,
) -> SupportTeacher:
    """The teacher's side, once everything fits together; `per_token` is checked along with it."""
    columns = {"teacher_tail_logprob_N": tail_N, "student_logprob_N": recorded_N, **per_token}
    n, width = len(hidden_ND), ids_NK.shape[-1]
    _check_shapes(
        ("lm_head_VD", lm_head_VD, (len(lm_head_VD), hidden_ND.shape[-1])),
        ("hidden_ND", hidden_ND, (n, lm_head_VD.shape[-1])),
        ("support_ids_NK", ids_NK, (n, width)),
        ("teacher_logprobs_NK", logprobs_NK, (n, width)),
        *((name, one, (n,)) for name, one in columns.items()),
    )
    if options.kind == "policy_gradient" and (recorded_N is None or width != 1):
        found = "no student_logprob_N" if recorded_N is None else f"K = {width}"
        raise SpecError("loss.kind policy_gradient", found, "K = 1 and what it was drawn with")
    ids_NK = _checked_ids(ids_NK, options.vocab_size)
    if tail_N is None:
        real_NK = ids_NK >= 0
        mass_N = logprobs_NK.double().exp().masked_fill(~real_NK, 0.0).sum(-1)
        tail_N = torch.log1p(-mass_N.clamp(max=1.0))
        tail_N = tail_N.masked_fill(real_NK.sum(-1) == options.vocab_size, NEG_INF)
    return SupportTeacher(Support(ids_NK, logprobs_NK, tail_N, recorded_N), options)


def hidden_teacher(
    hidden_ND: Tensor,
    lm_head_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    options: Options,
    **per_token: Tensor,
) -> HiddenTeacher:
    """The teacher's side, once everything fits together; `per_token` is checked along with it."""
    n = len(hidden_ND)
    _check_shapes(
        ("lm_head_VD", lm_head_VD, (len(lm_head_VD), hidden_ND.shape[-1])),
        ("hidden_ND", hidden_ND, (n, lm_head_VD.shape[-1])),
        ("teacher_hidden_NE", teacher_hidden_NE, (n, teacher_head_VE.shape[-1])),
        *((name, one, (n,)) for name, one in per_token.items()),
    )
    if options.kind not in FULL_KINDS:
        expected = f"{' | '.join(FULL_KINDS)} on hidden states"
        raise SpecError("loss.kind", repr(options.kind), expected)
    return HiddenTeacher(teacher_hidden_NE, teacher_head_VE, options)


def _check_shapes(*given: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    for name, tensor, shape in given:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise SpecError(name, f"shape {tuple(tensor.shape)}", f"{shape}, as its fellows")


def _checked_ids(ids_NK: Tensor, vocab_size: int) -> Tensor:
    """int64, each -1 or in the vocabulary."""
    if ids_NK.is_floating_point() or ids_NK.dtype == torch.bool:
        raise SpecError("support_ids_NK", str(ids_NK.dtype), "whole numbers")
    if ids_NK.numel():
        low, high = (int(one) for one in torch.stack(ids_NK.aminmax()).tolist())
        if low < -1 or high >= vocab_size:
            found = f"id {low if low < -1 else high}"
            raise SpecError("support_ids_NK", found, f"ids below {vocab_size}, or -1 for padding")
    return ids_NK.long()


def check_values(teacher: SupportTeacher | HiddenTeacher, weight_N: Tensor) -> None:
    """What would end as a NaN that nobody can place.

    Raises:
        DataError: naming the first.
    """
    fine = {"weight_N": weight_N.isfinite(), **_fine_values(teacher)}
    for name, fine_N in fine.items():
        if not fine_N.all():
            row = int(fine_N.int().argmin())
            raise DataError(f"{name}: found NaN or an infinity in row {row}, expected numbers")


def _fine_values(teacher: SupportTeacher | HiddenTeacher) -> dict[str, Tensor]:
    """bool [N] by the name of what is looked at."""
    if isinstance(teacher, HiddenTeacher):
        return {"teacher_hidden_NE": teacher.hidden_NE.isfinite().all(-1)}
    known = teacher.support
    impossible_NK = (known.logprobs_NK == NEG_INF) | (known.ids_NK < 0)
    fine = {
        "teacher_logprobs_NK": (known.logprobs_NK.isfinite() | impossible_NK).all(-1),
        "teacher_tail_logprob_N": known.tail_N.isfinite() | (known.tail_N == NEG_INF),
    }
    if known.recorded_N is not None:
        fine["student_logprob_N"] = known.recorded_N.isfinite()
    return fine


def checked_options(
    rows: int,
    kind: str,
    chunk_rows: int,
    beta: float,
    tail_floor_nats: float,
    vocab_size: int | None,
    clip: float = 0.2,
) -> Options:
    """What does not change from row to row; `rows` are the head's, or the smaller head's."""
    vocab_size = rows if vocab_size is None else vocab_size
    if kind not in KINDS:
        raise SpecError("loss.kind", repr(kind), " | ".join(KINDS))
    for name, value, fits, expected in (
        ("chunk_rows", chunk_rows, chunk_rows >= 1, "at least 1"),
        ("loss.beta", beta, 0 <= beta <= 1, "a number from 0 to 1"),
        ("loss.clip", clip, 0 < clip < 1, "a number between 0 and 1"),
        ("tail_floor_nats", tail_floor_nats, NEG_INF < tail_floor_nats < 0, "a number below 0"),
        ("vocab_size", vocab_size, 1 <= vocab_size <= rows, f"1 to the head's {rows} rows"),
    ):
        if not fits:
            raise SpecError(name, str(value), expected)
    with_grad = torch.is_grad_enabled()
    return Options(kind, chunk_rows, beta, clip, tail_floor_nats, vocab_size, with_grad)
