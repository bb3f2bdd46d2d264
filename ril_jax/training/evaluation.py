"""Held-out accuracy: greedy answers of the student, graded by rule (or by the run's judge)."""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ril_jax import processes, sharding
from ril_jax.data.records import Question, plain_prompt
from ril_jax.models.parameters import Params
from ril_jax.rewards.judge import Judge
from ril_jax.rewards.verdict import JudgeItem
from ril_jax.sampling.logits import SamplingParams
from ril_jax.training.run import Run


def evaluate(run: Run, params: Params, questions: Sequence[Question], judge: Judge) -> dict[str, Any]:
    """Greedy responses to all questions; of several processes each decodes and judges its own.

    Returns: accuracy, its 95 % interval (normal approximation), mean response length in tokens, the number of
    questions, and accuracy by the `type` column where the questions have one.
    """
    size = run.config.eval.batch_size
    batch = sharding.full_batch(size, run.mesh)
    rows = run.buckets.layout(batch).positions
    mine: dict[str, list] = {}  # place -> [score, length, type], of the questions of this process
    params = run.for_sampling(params)
    engine = run.student_groups(params)
    longest, greedy = run.config.sampling.max_completion_length, SamplingParams(temperature=0.0)
    asked: dict[str, Any] = dict(num_samples=1, max_tokens=longest, sampling=greedy)
    for start in range(0, len(questions), size):
        places = [start + i for i in rows if start + i < min(start + size, len(questions))]
        chunk = [questions[i] for i in places]
        encoded = [run.encoder(q) for q in chunk]
        keys: np.ndarray = np.zeros((len(rows), 2), np.uint32)
        if engine is not None:
            samples = engine(params, encoded, keys, **asked)
        else:
            prompts = run.buckets.pack_prompts(encoded, batch=batch)
            samples = run.sample_batch(run.sampler, run.programs, params, prompts, keys, **asked)
            samples = sharding.own_rows(samples, run.mesh)
        texts = [run.student.chat.decode(samples.token_ids[b, 0][samples.mask[b, 0]]) for b in range(len(chunk))]
        lengths = [int(samples.mask[b, 0].sum()) for b in range(len(chunk))]
        items = [JudgeItem(plain_prompt(q), q.solution, text, q.id) for q, text in zip(chunk, texts, strict=True)]
        for place, question, length, verdict in zip(places, chunk, lengths, judge(items), strict=True):
            mine[str(place)] = [verdict.score, length, str(json.loads(question.extra).get("type", ""))]
    answers = {place: answer for answers in processes.gather(mine, "evaluation") for place, answer in answers.items()}
    scores, all_lengths, types = zip(*(answers[str(place)] for place in range(len(questions))), strict=True)
    by_type: dict[str, list[float]] = defaultdict(list)
    for score, kind in zip(scores, types, strict=True):
        by_type[kind].append(score)
    accuracy = float(np.mean(scores))
    margin = 1.96 * (accuracy * (1 - accuracy) / len(scores)) ** 0.5
    result: dict[str, Any] = {
        "accuracy": accuracy,
        "interval": [max(accuracy - margin, 0.0), min(accuracy + margin, 1.0)],
        "mean_length": float(np.mean(all_lengths)),
        "questions": len(scores),
    }
    if set(by_type) != {""}:
        result["by_type"] = {name: float(np.mean(values)) for name, values in sorted(by_type.items())}
    return result


def held_out_questions(run: Run) -> Sequence[Question]:
    """The first config.eval.num_questions of config.data.eval; none where that is empty."""
    if not run.config.data.eval:
        return []
    questions, count = run.dataset("eval"), run.config.eval.num_questions
    return questions[:count] if count else questions
