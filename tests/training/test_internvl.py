"""configs/tiny_internvl.py made small: students and teachers of two families, each with its own tokenizer, all stages.

Two runs: an InternVL student whose discriminator sees the pictures, and a Qwen2.5-VL student. Both have the same two
teachers, a Qwen2.5-VL and an InternVL. Everything is sampled greedily, so that what a teacher said can be said again.
"""

import dataclasses
import functools
import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from helpers import small_run
from helpers.parity import assert_gradients_match, gradients_by_name
from ml_collections import ConfigDict
from transformers import AutoTokenizer, InternVLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

from ril_jax import cli
from ril_jax import config as config_lib
from ril_jax.data import synthetic
from ril_jax.data.chat import ChatTokenizer
from ril_jax.data.images import decode_image
from ril_jax.data.records import Question
from ril_jax.errors import InputError
from ril_jax.export import export
from ril_jax.training.collect import response_dataset
from ril_jax.training.metrics import read_metrics
from ril_jax.training.ril import Ril, run_ril
from ril_jax.training.run import Run

CONFIG = "configs/tiny_internvl.py"
TEACHERS = ("a", "b")
B = small_run.BATCH


def small(student: str, **changes) -> ConfigDict:
    """Greedy everywhere; the teachers learn a little, so that they say words and not only bytes."""
    fields = {"ril.steps": 8, "checkpoint.every": 5, "sampling.temperature": 0.0}
    c = small_run.small_config(f"{CONFIG}:{student}", **fields | changes)
    for name, model in c.prepare.models.items():
        # All of a family are made by one program, which is also that of the SFT stage.
        model.vision_kind = "300m"
        model.phases.b_answer.update({"manners": (), "responses_per_question": 1, "adam_b2": 0.999})
        model.phases.b_answer.steps = 2 if name == "student" else 30
    return c


def train(config: ConfigDict, workdir: Path) -> Run:
    """All stages; returns the run itself, with its compiled programs."""
    runs, start = [], Run.start

    def begin(*arguments):
        runs.append(start(*arguments))
        return runs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "start", begin)
        small_run.train_here(workdir, config)
    return runs[0]


@pytest.fixture(scope="module")
def internvl(small_runs, tmp_path_factory) -> Run:
    """The run of an InternVL student, all stages done; its discriminator sees the pictures."""
    sees = {"discriminator.context": "question_image", "discriminator.prompt_buckets": (96,)}
    return train(small("internvl", **sees), tmp_path_factory.mktemp("internvl") / "workdir")


@pytest.fixture(scope="module")
def mixed(internvl, tmp_path_factory) -> Run:
    """The run of a Qwen2.5-VL student; data, teachers and what they said are those that are there."""
    workdir = tmp_path_factory.mktemp("mixed") / "workdir"
    shared = ["prepare/data", *(f"{kind}{name}" for kind in ("prepare/teacher_", "collect/") for name in TEACHERS)]
    for folder in shared:
        shutil.copytree(internvl.workdir / folder, workdir / folder)
    return train(small("qwen", **{"data.eval": ""}), workdir)


@pytest.fixture
def run(request, internvl, mixed) -> Run:
    """The run that a parameter names."""
    return {"internvl": internvl, "mixed": mixed}[request.param]


@pytest.fixture
def variant(internvl, tmp_path):
    """A function: changed fields of the config -> the InternVL student's run before its RIL stage, in a copy."""

    def make(**changes) -> Run:
        run = small_run.variant(internvl, tmp_path / "workdir", changes)
        for left in ("ril", "metrics/ril", "samples"):
            shutil.rmtree(run.workdir / left)
        return run

    return make


# --- families and tokenizers ---


@pytest.mark.parametrize(
    ("run", "families"),
    [("internvl", ("internvl", "qwen2_5_vl", "internvl")), ("mixed", ("qwen2_5_vl", "qwen2_5_vl", "internvl"))],
    indirect=["run"],
)
def test_every_stage_runs_with_a_student_and_teachers_of_both_families(run, families):
    made = [json.loads((folder(run, name) / "config.json").read_text()) for name in ("student", *made_teachers())]
    assert tuple(config["model_type"] for config in made) == families
    for stage in ("sft", "discriminator", "ril/ril"):
        losses = [line["loss"] for line in read_metrics(run.workdir / "metrics" / f"{stage}.jsonl")]
        assert len(losses) >= 4
        assert np.isfinite(losses).all()
    for question in response_dataset(run):
        assert sorted(r.model for r in question.responses) == ["a"] * 4 + ["b"] * 4 + ["student"] * 4
    assert set(json.loads((run.workdir / "summary.json").read_text())["arms"]) >= {"ril"}
    assert (run.workdir / "ril" / "ril" / "model" / "config.json").exists()


def test_no_two_models_of_a_run_number_words_alike(internvl, mixed):
    vocabularies = [tokenizer(internvl, name).get_vocab() for name in ("student", *made_teachers())]
    for one, other in itertools.combinations(vocabularies, 2):
        words = [word for word in one if len(word) > 2 and word in other]
        assert sum(one[word] != other[word] for word in words) > len(words) / 4
    own = set(vocabularies[0]) - set(tokenizer(mixed, "student").get_vocab())
    assert own == {"<img>", "</img>", "<IMG_CONTEXT>", "<video>"}


@pytest.mark.parametrize(
    ("teacher", "kind"), [("a", Qwen2_5_VLForConditionalGeneration), ("b", InternVLForConditionalGeneration)]
)
def test_a_teacher_reads_and_speaks_in_its_own_tokens(teacher, kind, internvl):
    """What it said in the collect stage, greedily, is what transformers makes of its folder."""
    chat = ChatTokenizer.from_pretrained(folder(internvl, f"teacher_{teacher}"))
    theirs = kind.from_pretrained(folder(internvl, f"teacher_{teacher}")).eval()
    misread = 0
    for question in [*response_dataset(internvl)][:B]:
        said = generate(theirs, chat, question)
        text = chat.tokenizer.decode(said, skip_special_tokens=True)
        finish = "stop" if said[-1] in chat.eos_token_ids else "length"
        for response in question.responses:
            if response.model == teacher:
                got = (response.text, response.token_count, response.finish_reason)
                assert got == (text, len(said), finish)
        misread += tokenizer(internvl, "student").decode(said, skip_special_tokens=True) != text
    assert misread, "the student's tokenizer reads the teacher's tokens alike: the test would not see a mix-up"


@pytest.mark.parametrize("run", ["internvl", "mixed"], indirect=True)
def test_the_student_learns_what_teachers_said_in_its_own_tokens(run):
    questions = [*response_dataset(run)][:B]
    _, group, _ = Ril(run, "ril").step(1, questions)
    own, end = tokenizer(run, "student"), run.student.chat.end_of_turn_token_id
    others = {name: tokenizer(run, f"teacher_{name}") for name in TEACHERS}
    assert group.models[0] == ["student"] * 4 + ["a", "a", "b", "b"]
    differ = 0
    for question, *row in zip(questions, group.models, group.texts, group.tokens, strict=True):
        for model, text, tokens in zip(*row, strict=True):
            if model == "student":
                assert text == own.decode(tokens, skip_special_tokens=True)
                continue
            said = next(r for r in question.responses if (r.model, r.text) == (model, text))
            ids = own(text)["input_ids"]
            assert tokens.tolist() == (ids + [end] * (said.finish_reason == "stop"))[:14]
            differ += ids != others[model](text)["input_ids"]
    assert differ > 2 * B


def test_discriminator_of_internvl_sees_the_picture(internvl):
    """Its logits of the same responses to the same question change with the picture, and with the response."""
    ril = Ril(internvl, "ril")
    d, params = ril.discriminator, ril.state.discriminator.params
    assert any(name.startswith("vision.") for name in d.network.specs)
    examples = [e for e in synthetic.RIL.draw(3, 60, split="ril") if e.image.shape == (84, 84, 3)]
    logits = []
    for part in (examples[:B], examples[B : 2 * B]):
        asked = [dataclasses.replace(e.question, prompt="how many rings?") for e in part]
        rows = [d.prompts.rows(q, internvl.encoder(q), ["so red", "so two"]) for q in asked]
        assert all(len(prompt.images) == 1 for prompt, _ in rows)
        logits.append(np.asarray(d.logits(params, ril.d_frozen, d.pack(rows, batch=B, micro=B)))[0])
    assert logits[0].shape == (B, 2)
    assert (np.abs(logits[0] - logits[1]) > 1e-6).all()
    assert (np.abs(np.diff(np.concatenate(logits), axis=1)) > 1e-6).all()


# --- what is frozen ---


def sides(names) -> set[str]:
    """Which of the vision side's two parts are among the parameters."""
    return {
        "projector" if name.startswith("vision.projector") else "tower" for name in names if name.startswith("vision.")
    }


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({}, set()),
        ({"ril__train_projector": True}, {"projector"}),
        ({"ril__train_vision": True}, {"projector", "tower"}),
    ],
    ids=["frozen", "projector", "tower"],
)
def test_what_is_frozen_has_neither_gradient_nor_moments_and_what_is_not_moves(fields, trained, variant):
    """An update takes gradients of the parameters of the state, and of no others."""
    ril = Ril(variant(**fields), "ril")
    state = ril.state.student
    moments = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.opt) if is_key(path[-1])]
    assert Counter(moments) == {name: 2 for name in state.params}
    assert sides(state.params) == trained
    assert sides(ril.frozen) == {"projector", "tower"} - trained
    assert state.params.keys() | ril.frozen.keys() == ril.run.student.network.specs.keys()
    before = jax.device_get(state.params | ril.frozen)
    ril.step(1, [*response_dataset(ril.run)][:B])
    after = jax.device_get(ril.state.student.params | ril.frozen)
    moved = {name for name in before if (after[name] != before[name]).any()}
    assert any(name.startswith("text.") for name in moved)
    assert sides(moved) == trained
    if trained:
        assert "vision.projector_in.kernel" in moved
    if "tower" in trained:
        assert moved >= {"vision.patch_embed.kernel", "vision.cls_token", "vision.positions", "vision.blocks.q.kernel"}


def is_key(entry) -> bool:
    return isinstance(entry, jax.tree_util.DictKey)


def test_sft_trains_the_tower_and_ril_leaves_it_as_it_is(internvl):
    folders = [folder(internvl, "student"), *(internvl.workdir / stage / "model" for stage in ("sft", "ril/ril"))]
    made, sft, ril = ({n: np.asarray(p) for n, p in internvl.student_params(path).items()} for path in folders)
    assert sides(name for name in sft if (sft[name] != made[name]).any()) == {"projector", "tower"}
    moved = {name for name in sft if (sft[name] != ril[name]).any()}
    assert sides(moved) == set()
    assert any(name.startswith("text.") for name in moved)


# --- against transformers ---


@pytest.fixture(scope="module")
def exported(internvl, tmp_path_factory):
    """The student before RIL, exported: as transformers loads it, and the folder."""
    target = tmp_path_factory.mktemp("export") / "hf"
    export(internvl.workdir / "sft", target, dtype="float32")
    theirs, info = InternVLForConditionalGeneration.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return theirs.eval(), target


def test_transformers_samples_the_same_tokens_from_an_exported_student(exported, internvl):
    """The first RIL step samples from that student, greedily."""
    theirs, target = exported
    chat = ChatTokenizer.from_pretrained(target)
    questions = [*response_dataset(internvl)][:B]
    _, group, _ = Ril(internvl, "ril").step(1, questions)
    for question, tokens in zip(questions, group.tokens, strict=True):
        assert internvl.encoder(question).images[0].num_tokens in (7, 10, 13)  # a token a cell, and the thumbnail
        for sampled in tokens[:4]:
            assert sampled.tolist() == generate(theirs, chat, question)


def generate(theirs, chat: ChatTokenizer, question: Question) -> list[int]:
    """Greedy tokens of a transformers model, of those that its tokenizer knows."""
    image = decode_image(question.images[0], name="image")
    prompt = chat.encode_prompt(chat.messages(question.prompt, 1, name="question"), [image], name="question")
    ids = torch.tensor(prompt.token_ids)[None].long()
    given = {"attention_mask": torch.ones_like(ids)}
    if isinstance(theirs, InternVLForConditionalGeneration):
        given["pixel_values"] = pixels(prompt.images)
    else:
        theirs.model.rope_deltas = None  # stale from the call before
        given |= {
            "mm_token_type_ids": (ids == chat.image_token_id).long(),
            "pixel_values": torch.tensor(prompt.images[0].patches),
            "image_grid_thw": torch.tensor([prompt.images[0].grid]),
        }
    with torch.no_grad():
        out = theirs.generate(
            input_ids=ids, **given, max_new_tokens=14, do_sample=False,
            suppress_tokens=list(range(chat.vocab_size, theirs.config.text_config.vocab_size)),
        )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def pixels(images) -> torch.Tensor:
    """What transformers calls `pixel_values`: [tiles, 3, 28, 28], from patches of 14 pixels."""
    patches = np.concatenate([image.patches for image in images])
    T, n, _ = patches.shape
    side = math.isqrt(n)
    cut = patches.reshape(T, side, side, 3, 14, 14)
    return torch.tensor(np.einsum("tijcpq->tcipjq", cut).reshape(T, 3, 14 * side, 14 * side))


def test_loss_and_gradients_of_rows_that_share_a_prompt_equal_transformers(exported, internvl):
    """One row a question, `[prompt with tiles | response 1 | response 2]`, against a row a response; tower included."""
    theirs, target = exported
    prompts = [internvl.encoder(example.question) for example in synthetic.RIL.draw(6, 3, split="test")]
    said = [["so two", "tally + . - so one"], ["walk below d so red", "so"], ["bars", "rows one two so three"]]
    tokens = [[internvl.student.chat.encode_response(text, finished=True) for text in row] for row in said]
    total = sum(len(ids) for row in tokens for ids in row)
    packed = internvl.buckets.pack_prompts(prompts, batch=B), internvl.buckets.pack_responses(tokens, batch=B, slots=2)
    micro = jax.tree.map(lambda leaf: leaf[0], (*packed, np.full((1,), total, np.float32)))
    loss_of = jax.jit(jax.value_and_grad(lambda params: internvl.programs.sft_loss(params, {}, micro)[0]))
    loss, gradients = loss_of(internvl.student_params(target))

    reference = torch.zeros(())
    for prompt, row in zip(prompts, tokens, strict=True):
        for response in row:
            ids = torch.tensor(np.concatenate([prompt.token_ids, response]))[None].long()
            given = {"attention_mask": torch.ones_like(ids), "pixel_values": pixels(prompt.images)}
            logits = theirs(input_ids=ids, **given).logits[0, -len(response) - 1 : -1]
            reference = reference - torch.log_softmax(logits, dim=-1).gather(1, ids[0, -len(response) :, None]).sum()
    np.testing.assert_allclose(loss, reference.item() / total, rtol=1e-5)
    assert_gradients_match(internvl.student.network, gradients, gradients_by_name(theirs, reference / total))


# --- going on, and words ---


def test_a_run_that_breaks_off_in_ril_ends_as_one_that_did_not(internvl, variant, monkeypatch):
    run, steps, spread = variant(), [], small_run.spread

    @functools.wraps(spread)
    def breaks_off(completions, **given):
        steps.append(len(completions))
        if len(steps) == 7:  # the last checkpoint is of the fifth step
            raise KeyboardInterrupt
        return spread(completions, **given)

    with monkeypatch.context() as patch:
        patch.setattr(small_run, "spread", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            run_ril(run, "ril")
    assert not (run.workdir / "ril" / "ril" / "model").exists()
    run_ril(run, "ril")
    for name in ("ril/ril/model/model.safetensors", "ril/ril/done.json"):
        assert (run.workdir / name).read_bytes() == (internvl.workdir / name).read_bytes(), name
    lines = [read_metrics(r.workdir / "metrics" / "ril" / "ril.jsonl", wall_clock=False) for r in (run, internvl)]
    assert len(lines[0]) == 8
    assert len(steps) == 7
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("config", "field", "message"),
    [
        (f"{CONFIG}:gpt", "", "student 'gpt' is not known; known are internvl"),
        (CONFIG, "prepare.models.teacher_b.family=llava", "teacher_b.family='llava' is not known; use one of qwen2_5"),
        (CONFIG, "prepare.models.student.vision_kind=1b", "student.vision_kind='1b' is not known; use one of 300m, 6b"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(config, field, message):
    with pytest.raises(InputError, match=message) as refusal:
        config_lib.validate(cli.load_config(str(small_run.ROOT / config), [field] if field else []))
    assert "\n" not in str(refusal.value)


def made_teachers() -> list[str]:
    return [f"teacher_{name}" for name in TEACHERS]


def folder(run: Run, name: str) -> Path:
    """Of a made model."""
    return run.workdir / "prepare" / name


def tokenizer(run: Run, name: str):
    return AutoTokenizer.from_pretrained(folder(run, name))
