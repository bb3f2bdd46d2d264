"""Verdicts that were given before, in memory and in a JSONL file that outlives the run."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ril_jax.errors import InputError
from ril_jax.rewards.verdict import Verdict


class VerdictCache:
    """A map from `key(...)` to Verdict that keeps the `size` used last, and appends to `path` if there is one.

    A line that a killed run left half-written is skipped and told of. Raises InputError if the file cannot be used.
    """

    def __init__(self, path: str | Path, size: int, notify: Callable[[str], None]):
        self._path = Path(path) if path else None
        self._size = size
        self._verdicts: OrderedDict[str, Verdict] = OrderedDict()
        if self._path:
            self._load(self._path, notify)

    @staticmethod
    def key(*parts: Any) -> str:
        """A hash of parts that JSON can hold; the same in every run."""
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def get(self, key: str) -> Verdict | None:
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
        return self._verdicts.get(key)

    def put(self, key: str, verdict: Verdict) -> None:
        self._remember(key, verdict)
        if self._path:
            line = json.dumps({"key": key, "score": verdict.score, "explanation": verdict.explanation})
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:
                raise InputError(f"judge.cache_path {self._path} cannot be written: {error}.") from error

    def _remember(self, key: str, verdict: Verdict) -> None:
        self._verdicts[key] = verdict
        self._verdicts.move_to_end(key)
        if len(self._verdicts) > self._size:
            self._verdicts.popitem(last=False)

    def _load(self, path: Path, notify: Callable[[str], None]) -> None:
        broken = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+", encoding="utf-8", errors="replace") as file:
                file.seek(0)
                line = "\n"
                for line in file:
                    try:
                        entry = json.loads(line)
                        verdict = Verdict({0: 0.0, 1: 1.0}[entry["score"]], str(entry["explanation"]))
                        self._remember(str(entry["key"]), verdict)
                    except (ValueError, LookupError, TypeError):
                        broken += 1
                if not line.endswith("\n"):
                    file.write("\n")  # so that the next entry does not continue a half-written one
        except OSError as error:
            raise InputError(f"judge.cache_path {path} cannot be used: {error}.") from error
        if broken:
            notify(
                f"judge.cache_path {path}: {broken} unreadable lines are left out; those verdicts are asked for again."
            )
