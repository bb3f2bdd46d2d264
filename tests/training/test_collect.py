"""Claims about what the collect stage writes, with models whose responses stand in its part files already."""

import json
from types import SimpleNamespace

import pytest

from ril_jax.config import add_teacher, default_config
from ril_jax.data.records import Question, Response, read_dataset, write_dataset
from ril_jax.errors import InputError
from ril_jax.training.collect import response_dataset, run_collect, teacher_dataset


def questions(*responses):
    return [Question(f"q{i}", f"question {i} ?", (), "1", responses) for i in range(3)]


@pytest.fixture
def run(tmp_path):
    """A run with two questions to a part; `sampled` writes the parts of a model, so that nothing is left to sample."""
    config = default_config()
    config.collect.batch_size, config.collect.num_generations = 2, 1
    config.data.questions = str(tmp_path / "questions")
    write_dataset(config.data.questions, questions())

    def sampled(model):
        for start, ids in ((0, ("q0", "q1")), (2, ("q2",))):
            part = {i: [{"text": f"{model} on {i}", "token_count": 3, "finish_reason": "stop"}] for i in ids}
            path = tmp_path / "collect" / model / f"part-{start:07d}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(part))

    return SimpleNamespace(
        config=config,
        workdir=tmp_path,
        sampled=sampled,
        dataset=lambda field: read_dataset(config.data[field]),
        mark_done=lambda label, summary: None,
    )


def texts(dataset):
    return [[(r.model, r.text) for r in question.responses] for question in dataset]


def test_responses_of_teachers_and_student_stand_together(run):
    add_teacher(run.config, "a", "folder")
    for model in ("a", "student"):
        run.sampled(model)
    run_collect(run)
    assert texts(response_dataset(run)) == [[("a", f"a on q{i}"), ("student", f"student on q{i}")] for i in range(3)]
    assert texts(teacher_dataset(run)) == texts(response_dataset(run))


def test_teacher_data_is_joined_with_the_students_responses(run):
    """What the discriminator is pre-trained on; no teacher is sampled, whichever teachers the config names."""
    add_teacher(run.config, "big", "a folder that is not there")
    run.config.data.teacher_data = str(run.workdir / "teachers")
    write_dataset(run.config.data.teacher_data, questions(Response("big", "so 1", 2, "stop", 1.0)), name="teachers")
    run.sampled("student")
    run_collect(run)
    assert texts(response_dataset(run)) == [[("big", "so 1"), ("student", f"student on q{i}")] for i in range(3)]
    assert response_dataset(run)[0].responses[0].judge == 1.0


def test_nobody_to_sample_is_refused(run):
    run.config.collect.student = False
    with pytest.raises(InputError, match="nothing to collect"):
        run_collect(run)
