"""The folder that a job writes: whatever moment it is killed at, what was finished is there, and once.

job.json                              what defines the job; another job is refused
job.lock                              held while a job writes here
NAME-train.array_record-I-of-N        a shard, which appears when every row of it has an outcome
shard-I.json                          what is told of it; from here on it counts
journal-I.jsonl                       finished questions of a shard that is not whole yet, one a line
failed.jsonl                          at the end: rows without responses, and why
dataset_info.json, features.json      at the end: what makes the folder a data set
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ril_jax.data import records
from ril_jax.data.records import Question
from ril_jax.data.rows import Refusal
from ril_jax.errors import InputError
from ril_jax.files import claim, lock, write_atomically
from ril_jax.generation.outcomes import Outcome

FAILED_FILE = "failed.jsonl"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is told of a finished shard.

    rows: of the input. questions, num_bytes: in its file. ids: of all rows that had a question. prompt_tokens: paid
    for. lengths: responses by token count. truncated, questions_truncated: responses that were cut off, and questions
    with one. failed: rows without responses, {"id", "reason", "refused"}.
    """

    rows: int = 0
    questions: int = 0
    num_bytes: int = 0
    ids: list[str] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    lengths: dict[int, int] = dataclasses.field(default_factory=dict)
    truncated: int = 0
    questions_truncated: int = 0
    failed: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, outcomes: Sequence[tuple[str, Outcome | Refusal]], num_bytes: int = 0) -> "Facts":
        """Of (id, what came of it) of every row."""
        answered = [o for _, o in outcomes if isinstance(o, Outcome) and not o.failed]
        responses = [response for outcome in answered for response in outcome.responses]
        failed = [
            {"id": id_, "reason": o.reason if isinstance(o, Refusal) else o.failed, "refused": isinstance(o, Refusal)}
            for id_, o in outcomes
            if isinstance(o, Refusal) or o.failed
        ]
        cut = [any(r.finish_reason == "length" for r in o.responses) for o in answered]
        return cls(
            rows=len(outcomes),
            questions=len(answered),
            num_bytes=num_bytes,
            ids=[id_ for id_, outcome in outcomes if isinstance(outcome, Outcome)],
            prompt_tokens=sum(o.prompt_tokens for _, o in outcomes if isinstance(o, Outcome)),
            lengths=dict(sorted(Counter(response.token_count for response in responses).items())),
            truncated=sum(response.finish_reason == "length" for response in responses),
            questions_truncated=sum(cut),
            failed=failed,
        )

    @classmethod
    def read(cls, path: Path) -> "Facts":
        """Raises InputError for a file that was damaged."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            value["lengths"] = {int(length): count for length, count in value["lengths"].items()}
            return cls(**value)
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}); delete it, and its shard is made again") from error


@dataclasses.dataclass(frozen=True)
class Finished:
    """A question whose outcome stands in a journal; digest: of what was asked."""

    id: str
    digest: str
    outcome: Outcome


class JobFolder:
    """A job's folder; make one with `open`.

    Attributes: `num_rows` of the input, `rows_per_shard`, `num_shards`; `facts` of finished shards by number.
    """

    def __init__(self, folder: Path, name: str, num_rows: int, rows_per_shard: int, notify: Callable[[str], None]):
        self.folder, self.num_rows, self.rows_per_shard = folder, num_rows, rows_per_shard
        self.num_shards = -(-num_rows // rows_per_shard)
        self._name, self._notify = records.dataset_name(name), notify
        self.facts: dict[int, Facts] = {}
        self._journals: dict[int, Any] = {}  # open files

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        folder: str | os.PathLike[str],
        fingerprint: Mapping[str, Any],
        *,
        name: str,
        num_rows: int,
        rows_per_shard: int,
        notify: Callable[[str], None],
    ) -> Iterator["JobFolder"]:
        """Take a folder for a job, new or to be gone on with; name: of the data set; notify: for what is odd.

        Raises InputError where another process writes it, it belongs to another job, or it holds something else.
        """
        folder = Path(folder)
        records.load_tfds()  # before questions are under way
        with _locked(folder, notify):
            _claim(folder, fingerprint)
            job = cls(folder, name, num_rows, rows_per_shard, notify)
            try:
                job._look()
                yield job
            finally:
                for file in job._journals.values():
                    file.close()

    @property
    def is_finished(self) -> bool:
        return self.is_whole and records.is_tfds_folder(self.folder)

    @property
    def is_whole(self) -> bool:
        """Whether every shard is there."""
        return len(self.facts) == self.num_shards

    def shard_of(self, row: int) -> int:
        return row // self.rows_per_shard

    def rows_of(self, shard: int) -> range:
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.num_rows))

    def read_journal(self, shard: int) -> dict[int, Finished]:
        """Outcomes of a shard that is not whole, by row. What a kill left half-written at its end is cut off."""
        path = self._journal_path(shard)
        if not path.exists():
            return {}
        finished, good = {}, 0
        data = path.read_bytes()
        for line in data.splitlines(keepends=True):
            try:
                value = json.loads(line)
                row = int(value["row"])
                entry = Finished(value["id"], value["digest"], Outcome.from_json(value))
            except (ValueError, LookupError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            finished[row] = entry
            good += len(line)
        if good < len(data):
            self._notify(f"{path}: {len(data) - good} bytes at its end are unreadable; those questions are asked again")
            with path.open("r+b") as file:
                file.truncate(good)
        return finished

    def record(self, row: int, finished: Finished) -> None:
        """Keep the outcome of a question; it is on the disk when this returns."""
        shard = self.shard_of(row)
        if shard not in self._journals:
            self._journals[shard] = self._journal_path(shard).open("ab")
            _sync(self.folder)
        file = self._journals[shard]
        value = {"row": row, "id": finished.id, "digest": finished.digest, **finished.outcome.to_json()}
        file.write(json.dumps(value).encode() + b"\n")
        file.flush()
        os.fdatasync(file.fileno())

    def publish(self, shard: int, rows: Sequence[tuple[str, Question | None, Outcome | Refusal]]) -> None:
        """Let a shard appear: (id, question with its responses, what came of it) of all its rows, in order."""
        path = records.shard_path(self.folder, self._name, shard, self.num_shards)
        unfinished = path.with_name(f".{path.name}.incomplete")
        num_bytes = records.write_shard(unfinished, (question for _, question, _ in rows if question is not None))
        _sync(unfinished)
        os.replace(unfinished, path)
        facts = Facts.of([(id_, outcome) for id_, _, outcome in rows], num_bytes)
        write_atomically(self._facts_path(shard), json.dumps(dataclasses.asdict(facts)).encode())
        _sync(self.folder)  # the names too, before the journal goes
        self.facts[shard] = facts
        self._drop_journal(shard)

    def finish(self) -> None:
        """Make a data set of the shards, all of which are whole. Raises InputError where no question was answered."""
        facts = [self.facts[shard] for shard in range(self.num_shards)]
        if not any(f.questions for f in facts):
            reasons = [entry["reason"] for f in facts for entry in f.failed]
            raise InputError(f"{self.folder}: no row could be used, and no data set was made; the first: {reasons[0]}")
        failed = [entry for shard in facts for entry in shard.failed]
        write_atomically(
            self.folder / FAILED_FILE, "".join(json.dumps(entry) + "\n" for entry in failed).encode("utf-8")
        )
        # The description makes the folder a data set, so it is written aside (where TFDS wants to see shards of these
        # names) and appears file by file, dataset_info.json last.
        aside = self.folder / ".metadata"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        counts, num_bytes = [f.questions for f in facts], sum(f.num_bytes for f in facts)
        for shard in range(self.num_shards):
            records.shard_path(aside, self._name, shard, self.num_shards).touch()
        records.write_metadata(aside, self._name, counts, num_bytes)
        for path in sorted(aside.glob("*.json"), key=lambda path: path.name == "dataset_info.json"):
            _sync(path)
            os.replace(path, self.folder / path.name)
        shutil.rmtree(aside)
        _sync(self.folder)

    def _look(self) -> None:
        """What an earlier start left."""
        for shard in range(self.num_shards):
            if self._facts_path(shard).exists():
                self.facts[shard] = Facts.read(self._facts_path(shard))
                self._drop_journal(shard)
        for path in self.folder.glob(".*.incomplete"):
            path.unlink()

    def _drop_journal(self, shard: int) -> None:
        if shard in self._journals:
            self._journals.pop(shard).close()
        self._journal_path(shard).unlink(missing_ok=True)

    def _facts_path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.json"

    def _journal_path(self, shard: int) -> Path:
        return self.folder / f"journal-{shard:05d}.jsonl"


def read_facts(folder: Path) -> list[Facts]:
    """Of every finished shard, and of what the journals of the others hold; also while the job runs."""
    facts = [Facts.read(path) for path in sorted(folder.glob("shard-*.json"))]
    for path in sorted(folder.glob("journal-*.jsonl")):
        if (folder / f"shard-{path.stem.removeprefix('journal-')}.json").exists():
            continue
        outcomes = []
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, LookupError, TypeError):  # a line that is being written
                value = json.loads(line)
                outcomes.append((str(value["id"]), Outcome.from_json(value)))
        facts.append(Facts.of(outcomes))
    return facts


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some mounted buckets know no folders
            raise
    finally:
        os.close(number)


@contextlib.contextmanager
def _locked(folder: Path, notify: Callable[[str], None]) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "job.lock").open("a+")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); name another --output") from error
    with file:
        lock(file, folder, notify, holder=lambda: (folder / "job.lock").read_text().strip() or "another process")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _claim(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    path = folder / "job.json"
    if not path.exists():
        others = [entry.name for entry in folder.iterdir() if entry.name not in ("job.lock", ".job.json.tmp")]
        if others:
            raise InputError(f"{folder} also holds {sorted(others)[0]}, and no job began it; name an empty --output")
    changed = claim(path, fingerprint, mend="name another --output, or delete the folder")
    if changed:
        raise InputError(f"{folder} belongs to another job: {'; '.join(changed)}; name another --output")
