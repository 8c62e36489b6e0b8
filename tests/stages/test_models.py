"""Finding, downloading and loading models; the head; and what a pair must have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, PhiConfig

from tests.stages.toys import WORDS, save_config, save_model, toy_config, toy_tokenizer
from tip_ray import demo
from tip_ray.contract.errors import ModelMismatchError, SpecError
from tip_ray.contract.spec import RunSpec
from tip_ray.contract.spec_check import parse_spec
from tip_ray.stages.models import (
    has_weights,
    load_causal_lm,
    load_config,
    load_tokenizer,
    local_model_path,
    path_on_this_node,
    trunk_and_head,
)
from tip_ray.stages.pair_checks import check_pair, describe_first_prompt

SHAPES = [
    {"kind": kind, "tie_word_embeddings": tied}
    for kind in ("qwen3", "llama", "qwen2")
    for tied in (True, False)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIP_RAY_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    return tmp_path / "cache" / "models"


def upload(directory: str, url: str) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    for path in Path(directory).rglob("*"):
        fs.pipe_file(f"{root}/{path.relative_to(directory)}", path.read_bytes())


def refused(model: str, revision: str | None = None) -> SpecError:
    with pytest.raises(SpecError) as caught:
        local_model_path(model, revision, "student.model")
    assert "\n" not in str(caught.value)
    return caught.value


# Where a model lies


def test_directories_and_demo_checkpoints_are_used_where_they_lie(tmp_path: Path) -> None:
    path = save_config(tmp_path / "m")
    assert local_model_path(path) == local_model_path(f"file://{path}") == path
    expected = str(demo.checkpoint_path("carry-student").resolve())
    assert local_model_path("demo:carry-student") == expected
    assert refused("demo:carry").expected == "demo:carry-student | demo:carry-teacher"


def test_url_is_downloaded_once_and_loads(tmp_path: Path, cache: Path) -> None:
    original = save_model(tmp_path / "m")
    upload(original, "memory://models/once")
    fsspec.filesystem("memory").pipe_file("/models/once/pytorch_model.bin", b"pickle")
    path = local_model_path("memory://models/once")
    assert Path(path).parent == cache
    assert not (Path(path) / "pytorch_model.bin").exists()
    ours = load_causal_lm(path, "float32").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(original).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    (Path(path) / "mark").touch()
    assert local_model_path("memory://models/once") == path
    assert (Path(path) / "mark").exists()


def test_changed_url_is_another_model(tmp_path: Path) -> None:
    upload(save_config(tmp_path / "a"), "memory://models/changes")
    before = local_model_path("memory://models/changes")
    upload(save_config(tmp_path / "b", vocab_size=300), "memory://models/changes")
    after = local_model_path("memory://models/changes")
    assert load_config(before).vocab_size == 32
    assert load_config(after).vocab_size == 300


def test_half_a_download_is_not_used(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(save_config(tmp_path / "m"), "memory://models/half")
    memory = type(fsspec.filesystem("memory"))
    whole = memory.get_file
    fetched: list[str] = []

    def breaks(self: Any, remote: str, local: str, **options: Any) -> None:
        if fetched:
            raise ConnectionError("the line went dead")
        fetched.append(remote)
        whole(self, remote, local, **options)

    monkeypatch.setattr(memory, "get_file", breaks)
    assert "the line went dead" in refused("memory://models/half").found
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("TIP_RAY_CACHE", str(cache.parent))
    assert load_config(local_model_path("memory://models/half")).vocab_size == 32


def test_what_cannot_be_found_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "does not exist" in refused(str(tmp_path / "none")).found
    assert "does not exist" in refused("./none").found
    assert "the hub gave" in refused("some/model-that-is-nowhere").found
    assert "no config.json" in refused(str(tmp_path)).found
    assert "nothing at memory://models/none" in refused("memory://models/none").found
    assert "nosuch" in refused("nosuch://bucket/model").found
    assert refused("demo:carry-student", "main").field == "student.revision"
    assert refused("none/none").field == "student.model"


def test_another_machine_fetches_for_itself(tmp_path: Path) -> None:
    path, url = save_model(tmp_path / "m"), "memory://models/elsewhere"
    upload(path, url)
    there = path_on_this_node("/only/on/the/driver", url, None, "f")
    assert load_config(there).vocab_size == 32
    assert path_on_this_node(path, url, None, "f") == path
    looked_at = local_model_path(url, weights=False)
    assert not list(Path(looked_at).glob("*.safetensors"))
    assert path_on_this_node(looked_at, url, None, "f") == there
    assert path_on_this_node(looked_at, url, None, "f", weights=False) == looked_at


def test_a_part_of_the_shards_is_not_a_checkpoint(tmp_path: Path) -> None:
    whole = Path(save_model(tmp_path / "m"))
    assert has_weights(str(whole))
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    assert has_weights(str(tmp_path / "shards"))
    shards[-1].unlink()
    assert not has_weights(str(tmp_path / "shards"))
    (tmp_path / "shards/model.safetensors.index.json").unlink()  # as when it comes last
    assert not has_weights(str(tmp_path / "shards"))


# Loading


@pytest.mark.parametrize("shape", SHAPES, ids=lambda one: "-".join(map(str, one.values())))
def test_logits_are_trunk_times_head(shape: dict[str, Any], tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", **shape)
    model = load_causal_lm(path, "float32")
    trunk, head_VD = trunk_and_head(model)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        hidden_ND = trunk(input_ids=ids).last_hidden_state[0]
        expected_NV = AutoModelForCausalLM.from_pretrained(path)(ids).logits[0]
    torch.testing.assert_close(hidden_ND @ head_VD.T, expected_NV)
    tied = head_VD is model.get_input_embeddings().weight
    assert (tied, model.training, model.config.use_cache) == (
        shape["tie_word_embeddings"],
        False,
        False,
    )


def test_device_map_changes_no_logits(tmp_path: Path) -> None:
    path, ids = save_model(tmp_path / "m"), torch.arange(10)[None]
    with torch.no_grad():
        spread = load_causal_lm(path, "float32", device_map="balanced")(ids).logits
        torch.testing.assert_close(spread, load_causal_lm(path, "float32")(ids).logits)


def test_dtype_is_as_asked(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m")
    for name in ("bfloat16", "float16", "float32"):
        assert {one.dtype for one in load_causal_lm(path, name).parameters()} == {
            getattr(torch, name)
        }


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    path = Path(save_model(tmp_path / "m"))
    (path / "model.safetensors").unlink()
    torch.save(
        AutoModelForCausalLM.from_config(toy_config()).state_dict(), path / "pytorch_model.bin"
    )
    with pytest.raises(SpecError, match=r"teacher\.model: .*safetensors"):
        load_causal_lm(str(path), "float32", field="teacher.model")


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    path = Path(save_model(tmp_path / "m"))
    (path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(SpecError, match="a readable safetensors"):
        load_causal_lm(str(path), "float32")
    (path / "config.json").write_text("{")
    with pytest.raises(SpecError, match="a readable config"):
        load_config(str(path))
    for broken in ("{", '{"version": "1.0"}', '{"model": {"type": "none"}}'):
        (path / "tokenizer.json").write_text(broken)
        with pytest.raises(SpecError, match="a readable tokenizer"):
            load_tokenizer(str(path))


def test_code_that_comes_with_a_model_does_not_run_unasked(tmp_path: Path) -> None:
    path = Path(save_config(tmp_path / "m"))
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(SpecError) as caught:
        load_config(str(path))
    assert "set trust_remote_code" in caught.value.cure
    assert not (tmp_path / "ran").exists()


SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Gemma2Config(**SMALL, head_dim=16), "final_logit_softcapping: 30.0"),
        (CohereConfig(**SMALL), "logit_scale: 0.0625"),
        (PhiConfig(**SMALL), "PhiForCausalLM whose LM head has a bias"),
    ],
)
def test_heads_that_are_not_ours_are_refused(config: Any, named: str) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(SpecError, match=named):
        trunk_and_head(model)


# Pairs


def pair(student: str, teacher: str, **changes: Any) -> RunSpec:
    raw: dict[str, Any] = {
        "name": "pair",
        "steps": 1,
        "student": {"model": student},
        "teacher": {"model": teacher},
        "prompts": {"source": changes.pop("source", None), **changes.pop("prompts", {})},
        "rollout": {"max_prompt_tokens": 16, "max_response_tokens": 48},
    }
    return parse_spec({**raw, **changes})


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"problem": "what is 1 + 2 ?"}) + "\n")
    return str(path)


def mismatch(spec: RunSpec) -> str:
    with pytest.raises(ModelMismatchError) as caught:
        check_pair(spec)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pair_with_padded_heads_shares_the_smaller(tmp_path: Path, prompts: str) -> None:
    student = save_config(tmp_path / "s", vocab_size=24, eos=[2, 0])
    teacher = save_config(tmp_path / "t", vocab_size=32, eos=2, kind="llama")
    facts = check_pair(pair(student, teacher, source=prompts, support={"k": 100}))
    assert (facts.student_path, facts.teacher_path) == (student, teacher)
    assert (facts.vocab_size, facts.support_k) == (24, 24)
    assert facts.eos_ids == (0, 2)  # generation config, config and tokenizer together
    assert (facts.pad_id, facts.template_differs) == (0, False)
    assert check_pair(pair(student, teacher, source=prompts)).support_k == 16


def test_demo_pair() -> None:
    facts = check_pair(pair("demo:carry-student", "demo:carry-teacher", source="demo:carry"))
    assert (facts.vocab_size, facts.support_k, facts.eos_ids) == (15, 15, (14,))


def test_first_differing_token_is_named(tmp_path: Path, prompts: str) -> None:
    student = save_config(tmp_path / "s")
    words = [*WORDS]
    words[5], words[9] = words[9], words[5]
    teacher = save_config(tmp_path / "t", toy_tokenizer(words))
    line = mismatch(pair(student, teacher, source=prompts))
    assert "tokenizers differ at id 5: student '2', teacher '6'" in line


def test_missing_token_is_named(tmp_path: Path, prompts: str) -> None:
    student = save_config(tmp_path / "s")
    teacher = save_config(tmp_path / "t", toy_tokenizer(WORDS[:-1]))
    line = mismatch(pair(student, teacher, source=prompts))
    assert f"id {len(WORDS) - 1}: student 'system', teacher nothing" in line


def test_token_outside_the_smaller_head_is_named(tmp_path: Path, prompts: str) -> None:
    student = save_config(tmp_path / "s", vocab_size=len(WORDS) - 2)
    teacher = save_config(tmp_path / "t")
    line = mismatch(pair(student, teacher, source=prompts))
    assert "student id 19 ('user') is outside the 19 ids" in line
    assert "student 19, teacher 32 rows" in line


def test_same_vocabulary_cut_otherwise(tmp_path: Path, prompts: str) -> None:
    from tokenizers import normalizers

    other = toy_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Replace("0", "1")
    student, teacher = save_config(tmp_path / "s"), save_config(tmp_path / "t", other)
    assert "tokenizers cut" in mismatch(pair(student, teacher, source=prompts))


def test_other_eos_ids_are_named(tmp_path: Path, prompts: str) -> None:
    student = save_config(tmp_path / "s")
    teacher = save_config(tmp_path / "t", eos=[0, 2])
    line = mismatch(pair(student, teacher, source=prompts))
    assert "EOS ids differ: student 0 ('<eos>'), teacher 0 ('<eos>'), 2 ('<end>')" in line


def test_other_chat_template_needs_permission(tmp_path: Path, prompts: str) -> None:
    student = save_config(tmp_path / "s")
    other = toy_tokenizer(chat_template="user {{ messages[0].content }} -")
    teacher = save_config(tmp_path / "t", other)
    line = mismatch(pair(student, teacher, source=prompts, prompts={"chat": {}}))
    assert "from its token 7 on: student '<end>=', teacher '-'" in line
    assert "prompts.allow_template_mismatch" in line
    allowed = {"chat": {}, "allow_template_mismatch": True}
    assert check_pair(pair(student, teacher, source=prompts, prompts=allowed)).template_differs
    assert not check_pair(pair(student, teacher, source=prompts)).template_differs


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_lengths_must_fit_both(role: str, tmp_path: Path, prompts: str) -> None:
    short, long = (
        save_config(tmp_path / "a", max_position_embeddings=63),
        save_config(tmp_path / "b"),
    )
    models = (short, long) if role == "student" else (long, short)
    with pytest.raises(SpecError, match=f"at most 63, the positions of the {role}"):
        check_pair(pair(*models, source=prompts))


def test_evaluation_lengths_must_fit_the_student_alone(tmp_path: Path, prompts: str) -> None:
    long, longer = (
        save_config(tmp_path / "a"),
        save_config(tmp_path / "b", max_position_embeddings=65),
    )
    entry = {"name": "e", "source": prompts, "max_response_tokens": 49}
    with pytest.raises(SpecError, match=r"evaluation\.e\.max_response_tokens: .*at most 64"):
        check_pair(pair(long, longer, source=prompts, evaluation=[entry]))
    check_pair(pair(longer, long, source=prompts, evaluation=[entry]))


def test_foreign_heads_are_refused_before_weights_are_read(tmp_path: Path, prompts: str) -> None:
    student, teacher = save_config(tmp_path / "s"), tmp_path / "t"
    Gemma2Config(**SMALL, head_dim=16).save_pretrained(teacher)
    toy_tokenizer().save_pretrained(teacher)
    with pytest.raises(SpecError, match=r"teacher\.model: .*final_logit_softcapping"):
        check_pair(pair(student, str(teacher), source=prompts))


def test_model_without_eos_is_refused(tmp_path: Path, prompts: str) -> None:
    student, tokenizer = save_config(tmp_path / "s"), toy_tokenizer()
    tokenizer.eos_token = None
    teacher = save_config(tmp_path / "t", tokenizer, eos=None, eos_token_id=None)
    with pytest.raises(SpecError, match="without an EOS id"):
        check_pair(pair(student, teacher, source=prompts))


def test_described_prompt_shows_text_ids_and_stops() -> None:
    tokenizer = toy_tokenizer()
    lines = describe_first_prompt(tokenizer, [13, 14, 4], [0, 2], [3] * 50)
    assert lines[0].startswith("first prompt (3 tokens): ")
    assert lines[1] == "  ids: [13, 14, 4]"
    assert lines[2].startswith("the teacher reads (50 tokens): ")
    assert lines[3].endswith(", ...]")
    assert lines[-1] == "stop ids: 0 '<eos>', 2 '<end>'"
