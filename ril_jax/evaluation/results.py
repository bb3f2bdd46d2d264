"""From answers to scores: every sample with its parse and score, a benchmark's numbers, and the folder that has them.

OUTPUT/results.json                     the numbers of all benchmarks, as `benchmark_result` gives them
OUTPUT/table.txt                        beside the paper's rows
OUTPUT/NAME/job.json                    what defines the answers; another model in the same folder is refused
OUTPUT/NAME/answers-I-of-N.jsonl        responses of shard I, each as it came
OUTPUT/NAME/judge-WHO-I-of-N.jsonl      what the judge said of them
OUTPUT/NAME/samples.jsonl               every sample: prompt, right answer, response, parse, who parsed it, score
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ril_jax import files
from ril_jax.errors import InputError
from ril_jax.evaluation.statistics import bootstrap_interval, mean_of_parts
from ril_jax.evaluation.tasks import Task, messages_json, prompt_text
from ril_jax.files import write_atomically

RESULTS_FILE, SAMPLES_FILE, TABLE_FILE = "results.json", "samples.jsonl", "table.txt"


@dataclass(frozen=True)
class Sample:
    """One row of a benchmark as it was answered.

    by: who found the parse: "rule", "judge", or "" where there is none. score: None where only a judge could tell.
    """

    key: str
    group: str
    prompt: str
    answer: str
    response: str
    tokens: int
    finish: str
    failed: str
    parsed: str | None
    by: str
    score: float | None
    categories: list[str]
    judge: str = ""


def judge_key(task: Task, row: Any, response: str) -> tuple[str, str]:
    """(what a reply is kept under, the messages as JSON) of the question to a judge about a response."""
    prompt = messages_json(task.benchmark.judge_messages(row, response))
    return hashlib.blake2b(prompt.encode("utf-8", "replace"), digest_size=16).hexdigest(), prompt


def needs_judge(task: Task, row: Any, answer: Mapping[str, Any]) -> bool:
    """Whether a judge, if there is one, is to be asked about an answer."""
    if task.benchmark.judge == "no" or answer["failed"] or not answer["text"].strip():
        return False
    return task.benchmark.judge == "must" or task.benchmark.parse(row, answer["text"]) is None


def samples_of(
    task: Task, answers: Mapping[str, Mapping[str, Any]], replies: Mapping[str, Mapping[str, Any]] | None
) -> list[Sample]:
    """Every row that was answered. replies: of the judge by `judge_key`; None where there is no judge."""
    found = []
    for row in task.rows:
        answer = answers.get(row.key)
        if answer is None:
            continue
        parsed, by, said, benchmark = None, "", "", task.benchmark
        unread = False
        if not answer["failed"]:
            parsed = benchmark.parse(row, answer["text"])
            by = "" if parsed is None else "rule"
            if needs_judge(task, row, answer):
                reply = None if replies is None else replies.get(judge_key(task, row, answer["text"])[0])
                if reply is not None:
                    said = reply["text"]
                    parsed = benchmark.read_judge(row, said)
                    by = "" if parsed is None else "judge"
                unread = reply is None and benchmark.judge == "must"
        score = None if unread else 0.0 if parsed is None else benchmark.score(row, parsed)
        found.append(
            Sample(
                row.key, benchmark.group(row), prompt_text(benchmark.prompt(row)), benchmark.answer(row),
                answer["text"], answer["tokens"], answer["finish"], answer["failed"], parsed, by, score,
                benchmark.categories(row), said,
            )
        )  # fmt: skip
    return found


def benchmark_result(task: Task, samples: Sequence[Sample], *, resamples: int, judge: str) -> dict[str, Any]:
    """The numbers of a benchmark, scores in percent; `score` is None where a judge must grade and there was none."""
    benchmark = task.benchmark
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    graded = all(sample.score is not None for sample in samples)
    scores = {group: min(s.score or 0.0 for s in members) for group, members in groups.items()}
    parts: dict[str, list[float]] = {}
    categories: dict[str, list[float]] = {}
    for group, score in scores.items():
        parts.setdefault(group.partition("/")[0], []).append(score)
        for name in groups[group][0].categories:
            categories.setdefault(name, []).append(score)
    notes = list(task.notes)
    if benchmark.judge == "must" and not judge:
        notes.append("a model must grade it: set config.evaluate.judge")
    if benchmark.name.startswith("mmbench") and len(groups) == len(samples):
        notes.append("the file has no rotations, so this is no circular evaluation")
    low, high = bootstrap_interval(list(parts.values()), resamples=resamples) if graded else (0.0, 0.0)
    percent = lambda value: round(100 * value, 4)  # noqa: E731
    return {
        "title": benchmark.title,
        "score": percent(mean_of_parts(list(parts.values()))) if graded else None,
        "interval": [percent(low), percent(high)] if graded else None,
        "questions": len(groups),
        "samples": len(samples),
        "parsed_by_rule": sum(s.by == "rule" for s in samples),
        "parsed_by_judge": sum(s.by == "judge" for s in samples),
        "unparsed": sum(not s.by for s in samples),
        "failed": sum(bool(s.failed) for s in samples),
        "cut_off": sum(s.finish == "length" for s in samples),
        "mean_tokens": round(sum(s.tokens for s in samples) / len(samples), 2),
        "by_part": {name: {"score": percent(sum(v) / len(v)), "questions": len(v)} for name, v in parts.items()}
        if graded and len(parts) > 1
        else {},
        "by_category": {
            name: {"score": percent(sum(v) / len(v)), "questions": len(v)} for name, v in sorted(categories.items())
        }
        if graded
        else {},
        "judge": judge if benchmark.judge != "no" else "",
        "rule": benchmark.rule,
        "source": benchmark.source,
        "data": [str(file.path) for file in task.files],
        "notes": notes,
    }  # fmt: skip


def write_samples(folder: Path, samples: Sequence[Sample]) -> None:
    lines = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(folder / SAMPLES_FILE, lines.encode("utf-8", "replace"))


def read_samples(folder: Path) -> list[Sample]:
    """Of one benchmark. Raises InputError where the folder has none, or they are damaged."""
    path = folder / SAMPLES_FILE
    try:
        return [Sample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); run ril_jax.evaluate again, which writes it") from error


def read_results(output: Path) -> dict[str, Any]:
    """results.json of a folder. Raises InputError where there is none."""
    path = output / RESULTS_FILE
    if not path.exists():
        raise InputError(f"{output} holds no {RESULTS_FILE}; name a folder that ril_jax.evaluate has finished")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); run ril_jax.evaluate again, which writes it") from error


def write_results(output: Path, model: str, results: Mapping[str, Mapping[str, Any]], table: str) -> None:
    """The numbers, added to those of benchmarks that the folder has already, and the table."""
    content = {"model": model, "benchmarks": results}
    write_atomically(output / RESULTS_FILE, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    write_atomically(output / TABLE_FILE, (table + "\n").encode())


def claim(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Take a benchmark's folder for these answers. Raises InputError where it has those of another model or file."""
    changed = files.claim(folder / "job.json", fingerprint, mend=f"name another --output, or delete {folder}")
    if changed:
        raise InputError(f"{folder} has other answers: {'; '.join(changed)}; name another --output")


def answers_path(folder: Path, number: int, count: int) -> Path:
    return folder / f"answers-{number}-of-{count}.jsonl"


def judge_path(folder: Path, judge: str, number: int, count: int) -> Path:
    return folder / f"judge-{re.sub(r'[^A-Za-z0-9._-]+', '_', judge)}-{number}-of-{count}.jsonl"
