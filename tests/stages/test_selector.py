"""The selector and the cut against a row-by-row reference in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from tests.tables_made import MadeStep, made_step, row_tokens
from tip_ray.compute.columns import Columns
from tip_ray.contract import tables
from tip_ray.contract.errors import DataError, SpecError, TableError
from tip_ray.contract.headers import QuadrantThresholds
from tip_ray.contract.spec import BUILTIN_RULES, LossSpec, SelectionSpec
from tip_ray.stages.cut import cut
from tip_ray.stages.selector import SelectorActor

VOCAB = 50


def selector(
    rule: str = "soft_or",
    *,
    ranks: int = 1,
    samples: int = 2,
    normalize: str = "token",
    retention: float = 0.5,
    reward_weight: float = 0.0,
    sample_weight: str = "none",
    **more: object,
) -> SelectorActor:
    options = more if rule == "all" else {"retention": retention, **more}
    return SelectorActor(
        SelectionSpec(rule=rule, **options),
        LossSpec(normalize=normalize, reward_weight=reward_weight, sample_weight=sample_weight),
        vocab_size=VOCAB,
        ranks=ranks,
        samples=samples,
        seed=3,
    )


def reference_kept(made: MadeStep, retention: float) -> dict[tables.Key, list[int]]:
    """soft_or by the formulas of TIP, token by token."""
    rows = made.scores.to_pylist()
    flat = [
        (entropy / math.log(VOCAB), divergence)
        for row in rows
        for entropy, divergence, mask in zip(
            row["student_entropy"], row["reverse_kl"], row["loss_mask"], strict=True
        )
        if mask
    ]
    clip = sorted(h for h, _ in flat)[math.floor(0.98 * (len(flat) - 1))]
    low_h, high_h = min(min(h, clip) for h, _ in flat), clip
    low_d, high_d = min(d for _, d in flat), max(d for _, d in flat)
    kept = {}
    for key, row in zip(tables.keys(made.scores), rows, strict=True):
        scored = []
        for position, mask in enumerate(row["loss_mask"]):
            if mask:
                h = min(row["student_entropy"][position] / math.log(VOCAB), clip)
                h = (h - low_h) / (high_h - low_h)
                d = (row["reverse_kl"][position] - low_d) / (high_d - low_d)
                scored.append((-(1 - (1 - h) * (1 - d)), position))
        count = math.floor(retention * len(scored) + 1e-9)
        count = max(count, min(1, len(scored)))
        kept[key] = sorted(position for _, position in sorted(scored)[:count])
    return kept


@pytest.fixture
def made() -> MadeStep:
    return made_step(np.random.default_rng(0), rows=12, vocab_size=VOCAB)


def test_soft_or_keeps_what_the_formulas_say(made: MadeStep) -> None:
    header, keep = selector().select(row_tokens(made.rollouts), {}, None, made.scores)
    expected = reference_kept(made, 0.5)
    found = dict(zip(tables.keys(keep), keep.column("kept").to_pylist(), strict=True))
    assert found == expected
    assert header.kept_tokens == sum(map(len, expected.values()))
    assert header.loss_tokens == int(tables.column(made.scores, "loss_mask").sum())


@pytest.mark.parametrize("rule", BUILTIN_RULES)
def test_order_and_sharding_of_scores_change_nothing(made: MadeStep, rule: str) -> None:
    shuffled = made.scores.take(np.random.default_rng(1).permutation(made.scores.num_rows))
    parts = [shuffled.slice(0, 5), shuffled.slice(5)]
    one = selector(rule).select(row_tokens(made.rollouts), {}, None, made.scores)[1]
    many = selector(rule).select(
        row_tokens(made.rollouts), {}, None, *parts, made.scores.slice(2, 1)
    )
    assert many[1].equals(one)


@pytest.mark.parametrize("rule", ["random", "entropy_sample"])
def test_draws_belong_to_the_rollout_and_not_to_its_place(made: MadeStep, rule: str) -> None:
    asked = row_tokens(made.rollouts)
    whole = dict(_kept(selector(rule).select(asked, {}, None, made.scores)[1]))
    gone = tables.keys(made.scores)[3]  # quarantined, say
    rest = {key: tokens for key, tokens in asked.items() if key != gone}
    scores = made.scores.filter(pa.array([key != gone for key in tables.keys(made.scores)]))
    found = dict(_kept(selector(rule).select(rest, {}, None, scores)[1]))
    assert found == {key: kept for key, kept in whole.items() if key != gone}
    later = made_step(np.random.default_rng(0), rows=12, vocab_size=VOCAB, step=2)
    other = dict(
        _kept(selector(rule).select(row_tokens(later.rollouts), {}, None, later.scores)[1])
    )
    assert {key[1:]: kept for key, kept in other.items()} != {
        key[1:]: kept for key, kept in whole.items()
    }


@pytest.mark.parametrize("scope", ["rollout", "batch"])
@pytest.mark.parametrize("rule", BUILTIN_RULES)
def test_full_retention_is_the_rule_all(made: MadeStep, rule: str, scope: str) -> None:
    asked = row_tokens(made.rollouts)
    everything = selector("all").select(asked, {}, None, made.scores)[1]
    found = selector(rule, retention=1.0, scope=scope).select(asked, {}, None, made.scores)[1]
    assert found.equals(everything)


def test_masked_tokens_are_never_kept_and_have_no_quadrant(made: MadeStep) -> None:
    _, keep = selector("all").select(row_tokens(made.rollouts), {}, None, made.scores)
    for kept, quadrant, mask in zip(
        keep.column("kept").to_pylist(),
        keep.column("quadrant").to_pylist(),
        made.scores.column("loss_mask").to_pylist(),
        strict=True,
    ):
        assert kept == [position for position, one in enumerate(mask) if one]
        assert [q > 0 for q in quadrant] == [bool(one) for one in mask]


def teachers_doubt(columns: Columns) -> np.ndarray:
    assert columns.teacher_entropy_N is not None
    return columns.teacher_entropy_N


def test_a_users_rule_reads_the_columns_of_scores(made: MadeStep) -> None:
    rule = f"{__name__}:teachers_doubt"
    _, keep = selector(rule).select(row_tokens(made.rollouts), {}, None, made.scores)
    for kept, row in zip(keep.column("kept").to_pylist(), made.scores.to_pylist(), strict=True):
        loss = [position for position, mask in enumerate(row["loss_mask"]) if mask]
        count = max(len(loss) // 2, min(1, len(loss)))
        loss.sort(key=lambda position: (-row["teacher_entropy"][position], position))
        assert kept == sorted(loss[:count])


def test_a_users_rule_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(SpecError, match=r"selection\.rule"):
        selector("no_such_package.rules:best")


def test_prefix_needs_inputs_up_to_its_last_token_only(made: MadeStep) -> None:
    asked = row_tokens(made.rollouts)
    _, keep = selector("prefix").select(asked, {}, None, made.scores)
    _, _, selected = cut([0], keep, made.scores, made.targets, made.rollouts)
    rollout = dict(zip(tables.keys(made.rollouts), made.rollouts.to_pylist(), strict=True))
    mask = dict(zip(tables.keys(made.scores), made.scores.to_pylist(), strict=True))
    for key, row in zip(tables.keys(selected), selected.to_pylist(), strict=True):
        loss = [place for place, one in enumerate(mask[key]["loss_mask"]) if one]
        last = loss[max(len(loss) // 2, 1) - 1]
        assert len(row["input_ids"]) == len(rollout[key]["prompt_ids"]) + last


@pytest.mark.parametrize("normalize", ["token", "rollout"])
def test_inverse_inclusion_weights_divide_by_all_loss_tokens(
    made: MadeStep, normalize: str
) -> None:
    chosen = selector("random", retention=0.25, normalize=normalize, reweight="inclusion")
    _, keep = chosen.select(row_tokens(made.rollouts), {}, None, made.scores)
    loss = [sum(mask) for mask in made.scores.column("loss_mask").to_pylist()]
    rows = sum(count > 0 for count in loss)
    for count, row in zip(loss, keep.column("weight").to_pylist(), strict=True):
        divisor = sum(loss) if normalize == "token" else count * rows
        assert row == pytest.approx([4 / max(divisor, 1)] * len(row))


@pytest.mark.parametrize("normalize", ["token", "rollout"])
def test_weights_hold_the_normalisation(made: MadeStep, normalize: str) -> None:
    _, keep = selector(normalize=normalize).select(row_tokens(made.rollouts), {}, None, made.scores)
    weights = [row for row in keep.column("weight").to_pylist() if row]
    total = sum(map(len, weights))
    for row in weights:
        expected = 1 / total if normalize == "token" else 1 / (len(row) * len(weights))
        assert row == pytest.approx([expected] * len(row))


@pytest.mark.parametrize("normalize", ["token", "rollout"])
def test_rewards_weigh_rollouts_and_divisors_still_count(made: MadeStep, normalize: str) -> None:
    asked = row_tokens(made.rollouts)
    plain = selector(normalize=normalize).select(asked, {}, None, made.scores)[1]
    weighed = selector(normalize=normalize, reward_weight=2.0)
    rewards = {key: float(key[2]) for key in asked}  # the second sample of each prompt passed
    keep = weighed.select(asked, rewards, None, made.scores)[1]
    share = 2 / (1 + math.exp(-2.0))
    for key, before, after in zip(
        tables.keys(keep),
        plain.column("weight").to_pylist(),
        keep.column("weight").to_pylist(),
        strict=True,
    ):
        factor = share if key[2] else 2 - share
        assert after == pytest.approx([factor * one for one in before])
    with pytest.raises(TableError, match="no reward of"):
        weighed.select(asked, {}, None, made.scores)


def test_a_step_whose_prompts_all_pass_weighs_nothing(made: MadeStep) -> None:
    asked = row_tokens(made.rollouts)
    chosen = selector(sample_weight="pass_rate")
    header, keep = chosen.select(asked, dict.fromkeys(asked, 1.0), None, made.scores)
    assert not tables.column(keep, "weight").any()
    assert header.kept_tokens > 0
    assert header.weight_sum == 0.0
    assert tables.column(keep, "rank").tolist() == [-1] * keep.num_rows
    assert header.nothing_kept == tables.tried(keep)
    assert set(header.rank_of.values()) == {-1}
    mixed, _ = chosen.select(asked, {key: float(key[2]) for key in asked}, None, made.scores)
    assert mixed.weight_sum > 0.0


@pytest.mark.parametrize("normalize", ["token", "rollout"])
def test_rows_without_weight_stay_behind_and_divisors_still_count_them(
    made: MadeStep, normalize: str
) -> None:
    asked = row_tokens(made.rollouts)
    chosen = selector(normalize=normalize, sample_weight="pass_rate", ranks=2)
    rewards = {key: float(key[2] == 0 or key[1] == 2) for key in asked}  # both of slot 2 passed
    header, keep = chosen.select(asked, rewards, None, made.scores)
    plain_header, plain = selector(normalize=normalize).select(asked, {}, None, made.scores)
    assert keep.column("kept").equals(plain.column("kept"))
    assert header.kept_tokens == plain_header.kept_tokens
    for key, row, before in zip(
        tables.keys(keep), keep.to_pylist(), plain.column("weight").to_pylist(), strict=True
    ):
        factor = 0.0 if key[1] == 2 else 0.25
        assert row["weight"] == pytest.approx([factor * one for one in before])
        assert (row["rank"] == -1) == (key[1] == 2 or not row["kept"])
    stays = {(2, 0), (2, 1)} | {key[1:] for key, one in _kept(keep) if not one}
    assert {(slot, sample) for slot, sample, _ in header.nothing_kept} == stays
    _, _, *selected = cut(range(2), keep, made.scores, made.targets, made.rollouts)
    sent = {key[1:] for table in selected for key in tables.keys(table)}
    assert sent == {key[1:] for key in asked} - stays


def _kept(keep: pa.Table) -> list[tuple[tables.Key, list[int]]]:
    return list(zip(tables.keys(keep), keep.column("kept").to_pylist(), strict=True))


def _replaced(table: pa.Table, name: str, values: list[list[float]]) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.column_names.index(name), field, pa.array(values, field.type))


@pytest.mark.parametrize("rule", ["all", "random", "soft_or"])
def test_scores_that_are_no_numbers_or_of_other_lengths_are_refused(
    made: MadeStep, rule: str
) -> None:
    asked = row_tokens(made.rollouts)
    for name in ("student_entropy", "reverse_kl", "forward_kl", "teacher_entropy"):
        for bad in (math.nan, math.inf, -math.inf):
            values = made.scores.column(name).to_pylist()
            place = made.scores.column("loss_mask").to_pylist()[4].index(1)
            values[4][place] = bad
            with pytest.raises(DataError, match=rf"{name}.*{bad}.*\(1, 2, 0\)"):
                selector(rule).select(asked, {}, None, _replaced(made.scores, name, values))
        values = made.scores.column(name).to_pylist()
        values[0].append(values[1].pop())
        with pytest.raises(TableError, match=rf"{name}.*lengths differ"):
            selector(rule).select(asked, {}, None, _replaced(made.scores, name, values))


def test_frozen_thresholds_are_those_of_the_first_step(made: MadeStep) -> None:
    first, _ = selector().select(row_tokens(made.rollouts), {}, None, made.scores)
    assert first.frozen_shares == first.quadrant_shares
    given = QuadrantThresholds(entropy=2.0, divergence=5.0)  # nothing is above them
    later, _ = selector().select(row_tokens(made.rollouts), {}, given, made.scores)
    assert later.frozen_shares == (0.0, 0.0, 0.0, 1.0)
    assert later.frozen_thresholds == given
    assert later.quadrant_shares == first.quadrant_shares


def test_rows_are_balanced_over_ranks_by_the_inputs_they_need(made: MadeStep) -> None:
    _, keep = selector(ranks=3).select(row_tokens(made.rollouts), {}, None, made.scores)
    loads = [0, 0, 0]
    longest = 0
    for row, made_row in zip(keep.to_pylist(), made.rollouts.to_pylist(), strict=True):
        if row["kept"]:
            inputs = len(made_row["prompt_ids"]) + row["kept"][-1]
            loads[row["rank"]] += inputs
            longest = max(longest, inputs)
        else:
            assert row["rank"] == -1
    assert max(loads) - min(loads) <= longest


def test_missing_and_unasked_scores_are_refused(made: MadeStep) -> None:
    asked = row_tokens(made.rollouts)
    with pytest.raises(TableError, match="no scores of"):
        selector().select(asked, {}, None, made.scores.slice(1))
    asked.pop((1, 0, 0))
    with pytest.raises(TableError, match="unasked"):
        selector().select(asked, {}, None, made.scores)


@pytest.fixture(params=["topk", "hidden"])
def cut_made(request: pytest.FixtureRequest) -> tuple[MadeStep, pa.Table, tuple]:
    made = made_step(np.random.default_rng(5), rows=10, targets=request.param)
    _, keep = selector(ranks=2, samples=3).select(row_tokens(made.rollouts), {}, None, made.scores)
    order = np.random.default_rng(2).permutation(made.rollouts.num_rows)
    parts = [made.rollouts.take(order[:4]), made.rollouts.take(order[4:])]
    return made, keep, cut(range(2), keep, made.scores, made.targets, *parts)


def compared_in(made: MadeStep) -> tuple[str, ...]:
    """Columns of TARGETS that the loss reads."""
    if "teacher_hidden" in made.targets.column_names:
        return ("teacher_hidden",)
    return ("support_ids", "teacher_logprobs", "teacher_tail_logprob")


def test_selected_holds_just_what_kept_tokens_need(cut_made: tuple) -> None:
    made, keep, (_, _, *selected) = cut_made
    by_key = dict(zip(tables.keys(keep), keep.to_pylist(), strict=True))
    rollout = dict(zip(tables.keys(keep), made.rollouts.to_pylist(), strict=True))
    target = dict(zip(tables.keys(keep), made.targets.to_pylist(), strict=True))
    seen = []
    for rank, table in enumerate(selected):
        for key, row in zip(tables.keys(table), table.to_pylist(), strict=True):
            seen.append(key)
            kept = by_key[key]["kept"]
            assert by_key[key]["rank"] == rank
            whole = rollout[key]["prompt_ids"] + rollout[key]["response_ids"]
            prompt = len(rollout[key]["prompt_ids"])
            assert row["input_ids"] == whole[: prompt + kept[-1]]
            assert row["kept_positions"] == [prompt + position - 1 for position in kept]
            assert row["kept_weight"] == by_key[key]["weight"]
            assert row["sampled_ids"] == [whole[prompt + position] for position in kept]
            for ours, source in (
                ("student_logprob", rollout),
                *((name, target) for name in compared_in(made)),
            ):
                assert row[ours] == [source[key][ours][position] for position in kept]
    assert sorted(seen) == sorted(key for key, row in by_key.items() if row["kept"])


def test_policy_gradient_gets_the_sampled_token_alone(made: MadeStep) -> None:
    place = made.targets.schema.get_field_index("teacher_sampled_logprob")
    field = made.targets.schema.field(place)
    logprobs = [[-1.0 - one for one in row] for row in made.targets.column(place).to_pylist()]
    logprobs[0][0] = 0.0  # a teacher that is sure
    targets = made.targets.set_column(place, field, pa.array(logprobs, type=field.type))
    _, keep = selector("all").select(row_tokens(made.rollouts), {}, None, made.scores)
    header, _, whole = cut([0], keep, made.scores, targets, made.rollouts)
    narrow_header, _, narrow = cut(
        [0], keep, made.scores, targets, made.rollouts, sampled_only=True
    )
    assert narrow.schema == tables.selected_schema(1)
    sampled = tables.column(narrow, "sampled_ids")
    assert tables.column(narrow, "support_ids")[:, 0].tolist() == sampled.tolist()
    flat = dict(zip(tables.keys(targets), logprobs, strict=True))
    kept = dict(zip(tables.keys(keep), keep.column("kept").to_pylist(), strict=True))
    expected = [flat[key][place] for key in tables.keys(narrow) for place in kept[key]]
    found = tables.column(narrow, "teacher_logprobs")[:, 0]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    tail = tables.column(narrow, "teacher_tail_logprob")
    assert np.exp(tail) + np.exp(found) == pytest.approx(np.ones(len(tail)), rel=1e-6)
    for name in ("input_ids", "kept_positions", "kept_weight", "student_logprob", "sampled_ids"):
        assert narrow.column(name).equals(whole.column(name))
    assert narrow_header.selected_bytes[0] == header.selected_bytes[0] - 3 * 8 * len(sampled)
    assert narrow_header.unpruned_bytes == header.unpruned_bytes - 3 * 8 * len(sampled)


def test_samples_are_whole_rows_with_their_kept_tokens_marked(cut_made: tuple) -> None:
    made, keep, (_, samples, *_) = cut_made
    assert samples.num_rows == 3
    by_key = dict(zip(tables.keys(keep), keep.to_pylist(), strict=True))
    rollout = dict(zip(tables.keys(keep), made.rollouts.to_pylist(), strict=True))
    for key, row in zip(tables.keys(samples), samples.to_pylist(), strict=True):
        assert row["response_ids"] == rollout[key]["response_ids"]
        kept = [position for position, one in enumerate(row["kept"]) if one]
        assert kept == by_key[key]["kept"]
        assert [ids[:4] for ids in row["student_top_ids"]] == rollout[key]["student_topk_ids"]
        assert all(ids[4] == -1 for ids in row["student_top_ids"])  # K is 4


@pytest.mark.parametrize("targets", ["topk", "hidden"])
def test_bytes_left_out_are_what_keeping_all_would_have_sent(targets: tables.Targets) -> None:
    made = made_step(np.random.default_rng(6), rows=12, width=32, targets=targets)
    asked = row_tokens(made.rollouts)
    _, half = selector("soft_or").select(asked, {}, None, made.scores)
    _, whole = selector("all").select(asked, {}, None, made.scores)
    pruned, *_ = cut([0], half, made.scores, made.targets, made.rollouts)
    all_kept, *_ = cut([0], whole, made.scores, made.targets, made.rollouts)
    assert sum(pruned.selected_bytes) < 0.75 * sum(all_kept.selected_bytes)
    # An unkept last token leaves its row's inputs shorter by what follows the last kept one.
    assert pruned.unpruned_bytes == pytest.approx(sum(all_kept.selected_bytes), rel=0.05)


def test_a_step_in_which_nothing_is_kept_still_cuts(made: MadeStep) -> None:
    masks = [[0] * len(row) for row in made.scores.column("loss_mask").to_pylist()]
    place = made.scores.schema.get_field_index("loss_mask")
    field = tables.SCORES.field("loss_mask")
    scores = made.scores.set_column(place, field, pa.array(masks, type=field.type))
    header, keep = selector(ranks=2).select(row_tokens(made.rollouts), {}, None, scores)
    assert header.kept_tokens == 0
    _, samples, *selected = cut(range(2), keep, scores, made.targets, made.rollouts)
    assert [table.num_rows for table in selected] == [0, 0]
    assert samples.num_rows == 2


def test_tables_that_do_not_belong_together_are_not_cut(made: MadeStep) -> None:
    _, keep = selector().select(row_tokens(made.rollouts), {}, None, made.scores)
    whole = {"keep": keep, "scores": made.scores, "targets": made.targets}

    def refused(says: str, rollouts: pa.Table = made.rollouts, **changed: pa.Table) -> None:
        given = whole | changed
        with pytest.raises(TableError, match=says) as caught:
            cut([0], given["keep"], given["scores"], given["targets"], rollouts)
        assert "\n" not in str(caught.value)

    def moved(table: pa.Table, name: str) -> pa.Table:
        values = table.column(name).to_pylist()
        values[0].append(values[1].pop())
        return _replaced(table, name, values)

    for name in ("support_ids", "teacher_logprobs", "teacher_tail_logprob"):
        refused(rf"{name}.*lengths differ.*\(1, 0, 0\)", targets=moved(made.targets, name))
    refused("student_logprob.*lengths differ", rollouts=moved(made.rollouts, "student_logprob"))
    refused("reverse_kl.*lengths differ", scores=moved(made.scores, "reverse_kl"))
    refused("quadrant.*lengths differ", keep=moved(keep, "quadrant"))
    refused("weight.*lengths differ from kept", keep=moved(keep, "weight"))
    refused(r"no rollout of \(1, 0, 0\)", rollouts=made.rollouts.slice(1))
    refused("SCORES of other rollouts", scores=made.scores.slice(1))
    for outside in (-1, 99):
        kept = keep.column("kept").to_pylist()
        kept[3][0] = outside
        refused(rf"'kept': {outside} .*\(1, 1, 1\)", keep=_replaced(keep, "kept", kept))


def test_a_rollout_made_twice_is_not_cut_by_the_other_tries_length(made: MadeStep) -> None:
    """Two tries of one key: the later table wins, and TARGETS may be of the earlier one."""
    _, keep = selector().select(row_tokens(made.rollouts), {}, None, made.scores)
    again = made_step(np.random.default_rng(5), rows=12, vocab_size=VOCAB).rollouts
    with pytest.raises(TableError, match="lengths differ"):
        cut([0], keep, made.scores, made.targets, made.rollouts, again)
