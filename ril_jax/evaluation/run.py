"""An evaluation: a shard's questions are answered, a judge is asked what the rules leave open, and all is scored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ril_jax.data.records import Question
from ril_jax.errors import InputError
from ril_jax.evaluation import results
from ril_jax.evaluation.journal import Journal, read_journal
from ril_jax.evaluation.loop import ask_all
from ril_jax.evaluation.rows import Row
from ril_jax.evaluation.table import result_table
from ril_jax.evaluation.tasks import Task
from ril_jax.generation.outcomes import Outcome, ResponseSource
from ril_jax.progress import Progress


class Evaluation:
    """The benchmarks of one command, and shard `number` of `count` of their questions. Steps are resumable."""

    def __init__(
        self,
        output: Path,
        tasks: Sequence[Task],
        *,
        number: int,
        count: int,
        model: str,
        judge: str,
        resamples: int,
        notify: Callable[[str], None],
    ):
        self.output, self._tasks = output, tasks
        self._number, self._count = number, count
        self._model, self._judge = model, judge
        self._resamples, self._notify = resamples, notify

    def claim(self, fields: Mapping[str, Any]) -> None:
        """Take the folders of the benchmarks for answers of this model. Raises InputError where they have others."""
        for task in self._tasks:
            job = {"model": self._model, "data": task.digest(), "shards": self._count, **fields}
            results.claim(self._folder(task), job)

    def answer(self, begin: Callable[[], ResponseSource], *, concurrency: int, threads: int) -> None:
        """Ask the model that `begin` loads every question of this shard that has no answer yet."""
        with self._journals(results.answers_path) as journals:
            left = {
                task.name: {row.key for row in self._mine(task) if row.key not in journals[task.name].entries}
                for task in self._tasks
            }
            questions = (
                question
                for task in self._tasks
                for question in task.questions(lambda row, left=left[task.name]: row.key in left)  # type: ignore[misc]
            )

            def keep(key: str, outcome: Outcome) -> None:
                name, _, row = key.partition("/")
                response = outcome.responses[0] if outcome.responses else None
                entry = {
                    "text": response.text if response else "", "tokens": response.token_count if response else 0,
                    "finish": response.finish_reason if response else "", "failed": outcome.failed,
                }  # fmt: skip
                journals[name].add(row, entry)

            total = sum(len(self._mine(task)) for task in self._tasks)
            self._ask("answer", begin, questions, keep, sum(map(len, left.values())), total, concurrency, threads)

    def ask_judge(self, begin: Callable[[], ResponseSource], *, concurrency: int, threads: int) -> None:
        """Ask the judge that `begin` loads about this shard's answers, as far as their rules leave it open."""
        asked: dict[str, tuple[str, str]] = {}  # by key: benchmark and prompt
        with self._journals(lambda folder, i, n: results.judge_path(folder, self._judge, i, n)) as journals:
            for task in self._tasks:
                answers = read_journal(results.answers_path(self._folder(task), self._number, self._count))
                for row in self._mine(task):
                    if results.needs_judge(task, row, answers[row.key]):
                        key, prompt = results.judge_key(task, row, answers[row.key]["text"])
                        if key not in journals[task.name].entries:
                            asked[f"{task.name}/{key}"] = (key, prompt)
            questions = (Question(key, prompt, (), "") for key, (_, prompt) in asked.items())

            def keep(key: str, outcome: Outcome) -> None:
                name, _, entry = key.partition("/")
                if outcome.failed:
                    raise InputError(f"the judge cannot be asked about an answer of {name}: {outcome.failed}")
                journals[name].add(entry, {"text": outcome.responses[0].text})

            self._ask("judge", begin, questions, keep, len(asked), len(asked), concurrency, threads)

    def missing_shards(self) -> list[str]:
        """Shards of which an answer, or the judge's word on it, is missing."""
        missing = []
        for number in range(self._count):
            if not all(self._is_whole(task, number) for task in self._tasks):
                missing.append(f"shard {number}/{self._count}")
        return missing

    def results(self) -> dict[str, tuple[list[results.Sample], dict[str, Any]]]:
        """(samples, numbers) by benchmark, of what has been answered; benchmarks without any answer are left out."""
        found = {}
        for task in self._tasks:
            answers: dict[str, dict[str, Any]] = {}
            replies: dict[str, dict[str, Any]] = {}
            for number in range(self._count):
                answers |= read_journal(results.answers_path(self._folder(task), number, self._count))
                replies |= self._replies(task, number)
            samples = results.samples_of(task, answers, replies if self._judge else None)
            if samples:
                numbers = results.benchmark_result(task, samples, resamples=self._resamples, judge=self._judge)
                found[task.name] = (samples, numbers)
        return found

    def write(self, *, paper: str) -> None:
        """The samples and numbers, beside those of benchmarks that were evaluated into this folder before."""
        before: dict[str, Any] = {}
        with contextlib.suppress(InputError):
            before = results.read_results(self.output)["benchmarks"]
        ours = self.results()
        for name, (samples, _) in ours.items():
            results.write_samples(self.output / name, samples)
        numbers = before | {name: number for name, (_, number) in ours.items()}
        results.write_results(self.output, self._model, numbers, result_table(self._model, numbers, paper=paper))

    def table(self, *, paper: str) -> str:
        """The numbers of this command's benchmarks in words."""
        numbers = {name: number for name, (_, number) in self.results().items()}
        if not numbers:
            raise InputError(f"{self.output} has no answers of these benchmarks yet; leave out --summary")
        return result_table(self._model, numbers, paper=paper)

    def _ask(
        self,
        what: str,
        begin: Callable[[], ResponseSource],
        questions: Iterator[Question],
        keep: Callable[[str, Outcome], None],
        left: int,
        total: int,
        concurrency: int,
        threads: int,
    ) -> None:
        if not left:
            return
        source = begin()
        progress = Progress(f"{what} {source.name}", total, start=total - left)
        ask_all(source, questions, keep, concurrency=concurrency, threads=threads, progress=progress)
        progress.close()

    @contextlib.contextmanager
    def _journals(self, path: Callable[[Path, int, int], Path]) -> Iterator[dict[str, Journal]]:
        with contextlib.ExitStack() as stack:
            yield {
                task.name: stack.enter_context(
                    Journal.open(path(self._folder(task), self._number, self._count), self._notify)
                )
                for task in self._tasks
            }

    def _folder(self, task: Task) -> Path:
        return self.output / task.name

    def _mine(self, task: Task, number: int | None = None) -> tuple[Row, ...]:
        """A shard's rows, this one's by default."""
        return task.rows[self._number if number is None else number :: self._count]

    def _replies(self, task: Task, number: int) -> dict[str, dict[str, Any]]:
        if not self._judge:
            return {}
        return read_journal(results.judge_path(self._folder(task), self._judge, number, self._count))

    def _is_whole(self, task: Task, number: int) -> bool:
        answers = read_journal(results.answers_path(self._folder(task), number, self._count))
        rows = self._mine(task, number)
        if any(row.key not in answers for row in rows):
            return False
        if not self._judge:
            return True
        replies = self._replies(task, number)
        asked = (row for row in rows if results.needs_judge(task, row, answers[row.key]))
        return all(results.judge_key(task, row, answers[row.key]["text"])[0] in replies for row in asked)
