"""Stage 2: N responses per question from the student and from every teacher, cached as one data set.

Every model's responses are written in small parts, each whole or not there, so a killed run repeats at most one part.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ril_jax import processes, sharding
from ril_jax.data.records import Question, QuestionDataset, Response, read_dataset, write_dataset
from ril_jax.errors import InputError
from ril_jax.files import write_atomically
from ril_jax.models.parameters import hash_name
from ril_jax.pretrained import Pretrained
from ril_jax.progress import Progress, of_bytes
from ril_jax.sampling.rollouts import EngineSampler
from ril_jax.sampling.sampler import Samples
from ril_jax.training.batches import PromptEncoder
from ril_jax.training.run import Run

STUDENT = "student"


def run_collect(run: Run) -> None:
    """Sample everyone and write workdir/responses, the teacher data set with the student's responses beside them.

    With config.data.teacher_data only the student is sampled, on the questions of that data set.
    """
    questions = _questions(run)
    teachers = [] if run.config.data.teacher_data else [*run.config.teachers]
    models = teachers + ([STUDENT] if run.config.collect.student else [])
    if not models:
        raise InputError(
            "there is no teacher to sample and config.collect.student is false: there is nothing to collect"
        )
    summary = {name: _collect_model(run, name, questions) for name in models}
    target = run.workdir / "responses"

    def write() -> None:
        if not target.exists():
            write_dataset(target, _merged(run, models, questions), name="responses")

    processes.by_first(write, "collected responses")
    run.mark_done("collect", summary)


def response_dataset(run: Run) -> QuestionDataset:
    """Questions with all responses collected in this workdir. Raises InputError where the stage has not run."""
    if not (run.workdir / "responses").exists():
        raise InputError(f"{run.workdir}: no responses collected yet; add 'collect' to config.stages")
    return read_dataset(run.workdir / "responses")


def teacher_dataset(run: Run) -> QuestionDataset:
    """The questions with the teachers' responses: config.data.teacher_data if given, else those collected here."""
    if run.config.data.teacher_data:
        return run.dataset("teacher_data")
    return response_dataset(run)


class Subset(Sequence):
    """Some of the questions, read when they are asked for."""

    def __init__(self, source: Sequence[Question], keep: Sequence[int]):
        self.source, self.keep = source, keep

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, index):
        return self.source[self.keep[index]]


def question_key(seed: int, purpose: str, question_id: str) -> np.ndarray:
    """A PRNG key that depends on these three alone, [2] uint32."""
    words = np.random.SeedSequence([seed, hash_name(purpose), hash_name(question_id)]).generate_state(2)
    return words.astype(np.uint32)


def _collect_model(run: Run, name: str, questions: Sequence[Question]) -> dict[str, float]:
    """All parts of one model; returns its summary."""
    size = run.config.collect.batch_size
    starts = range(0, len(questions), size)
    todo = processes.decide(lambda: [s for s in starts if not _part(run, name, s).exists()], f"parts of {name} to do")
    if todo:
        _sample_parts(run, name, questions, todo)
    return processes.decide(lambda: _summary(run, name, starts), f"responses of {name}")


def _summary(run: Run, name: str, starts: Sequence[int]) -> dict[str, float]:
    responses = [r for start in starts for row in _read_part(run, name, start).values() for r in row]
    lengths = np.array([r["token_count"] for r in responses])
    truncated = np.mean([r["finish_reason"] == "length" for r in responses])
    return {
        "responses": len(responses),
        "mean_tokens": float(lengths.mean()),
        "max_tokens": int(lengths.max()),
        "truncated": float(truncated),
        "tokens": int(lengths.sum()),
    }


def _sample_parts(run: Run, name: str, questions: Sequence[Question], todo: list[int]) -> None:
    """Sample these parts; of several processes each encodes its own rows, and the first writes what all sampled."""
    config, size = run.config, run.config.collect.batch_size
    if name == STUDENT:
        model, settings, sampler = run.student, config.student, run.sampler
        params = run.for_sampling(run.pi_init())
    else:
        settings = config.teachers[name]
        model = run.open_model(f"config.teachers.{name}", settings)
        sampler, params = (
            run.make_sampler(model, settings, run.teacher_mesh),
            model.load_params(run.teacher_mesh, dtype=jnp.dtype(settings.dtype), progress=of_bytes(f"load {name}")),
        )
    programs = run.make_programs(model, settings)
    encoder = PromptEncoder(model.chat, max_length=max(config.data.prompt_buckets))
    buckets, batch = run.make_buckets(model), sharding.full_batch(size, run.mesh)
    rows = buckets.layout(batch).positions
    if name == STUDENT:
        engine = run.student_groups(params)
    else:
        made = run.make_engine(model, settings, params, run.teacher_mesh)
        engine = None if made is None else EngineSampler(made, model.chat)
    asked: dict[str, Any] = dict(
        num_samples=config.collect.num_generations, max_tokens=config.sampling.max_completion_length,
        sampling=run.sampling_params(),
    )  # fmt: skip
    left = sum(min(size, len(questions) - start) for start in todo)
    progress = Progress(f"collect {name}", len(questions), start=len(questions) - left, enabled=processes.is_first())
    for start in todo:
        run.stop_if_asked()
        places = range(start, min(start + size, len(questions)))
        chunk = [questions[start + i] for i in rows if start + i in places]
        encoded = [encoder(q) for q in chunk]
        keys: np.ndarray = np.zeros((len(rows), 2), np.uint32)
        for i, question in enumerate(chunk):
            keys[i] = question_key(config.seed, f"collect/{name}", question.id)
        if engine is not None:
            samples = engine(params, encoded, keys, **asked)
        else:
            prompts = buckets.pack_prompts(encoded, batch=batch)
            samples = run.sample_batch(sampler, programs, params, prompts, keys, **asked)
            samples = sharding.gathered(samples, run.mesh)
        if processes.is_first():
            part = {questions[i].id: _row(model, samples, b) for b, i in enumerate(places)}
            write_atomically(_part(run, name, start), json.dumps(part).encode())
        progress.advance(len(places))
    progress.close()


def _row(model: Pretrained, samples: Samples, b: int) -> list[dict]:
    """The responses to one question of a batch, as they are kept in a part."""
    row = []
    for g in range(samples.token_ids.shape[1]):
        ids = np.asarray(samples.token_ids[b, g][samples.mask[b, g]])
        reason = "stop" if samples.finished[b, g] else "length"
        row.append({"text": model.chat.decode(ids), "token_count": len(ids), "finish_reason": reason})
    return row


def _merged(run: Run, models: list[str], questions: Sequence[Question]) -> Iterator[Question]:
    size = run.config.collect.batch_size
    for start in range(0, len(questions), size):
        parts = {name: _read_part(run, name, start) for name in models}
        for q in (questions[i] for i in range(start, min(start + size, len(questions)))):
            before = [r for r in q.responses if r.model not in models]
            sampled = [Response(model=name, **r) for name in models for r in parts[name][q.id]]
            yield Question(q.id, q.prompt, q.images, q.solution, (*before, *sampled), q.extra)


def _questions(run: Run) -> Sequence[Question]:
    source = run.dataset("teacher_data" if run.config.data.teacher_data else "questions")
    count = run.config.collect.num_questions or len(source)
    return Subset(source, range(min(count, len(source))))


def _part(run: Run, name: str, start: int) -> Path:
    folder = run.workdir / "collect" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"part-{start:07d}.json"


def _read_part(run: Run, name: str, start: int) -> dict[str, list[dict]]:
    return json.loads(_part(run, name, start).read_text())
