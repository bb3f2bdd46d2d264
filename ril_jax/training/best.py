"""The model that did best on the held-out questions: kept beside the last one, whatever comes after it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ril_jax import processes
from ril_jax.errors import InputError
from ril_jax.files import write_atomically
from ril_jax.models.parameters import Params
from ril_jax.pretrained import Pretrained, save_folder


class BestModel:
    """STAGE/best, an HF folder, and STAGE/best.json: {"step", "accuracy"} of what is in it.

    Of equal accuracies the first is kept, so a run that goes on from a checkpoint and repeats some steps keeps what it
    had. Where several processes run, all must call `offer` with the same accuracy. Raises InputError for a best.json
    that was damaged.
    """

    def __init__(self, stage: Path, student: Pretrained):
        self.folder, self._facts, self._student = stage / "best", stage / "best.json", student
        self.step, self.accuracy = -1, -np.inf
        if facts := processes.decide(self._read, "the best model up to now"):
            self.step, self.accuracy = facts["step"], facts["accuracy"]

    def offer(self, step: int, accuracy: float, params: Params) -> bool:
        """Keep these parameters if none did better; says whether it did."""
        if not accuracy > self.accuracy:
            return False
        save_folder(self.folder, self._student, params)
        self.step, self.accuracy = step, accuracy
        if processes.is_first():
            write_atomically(self._facts, json.dumps({"step": step, "accuracy": accuracy}).encode())
        return True

    def facts(self) -> dict[str, Any]:
        """For the stage's result; nothing where nothing was evaluated."""
        return {"best_step": self.step, "best_accuracy": self.accuracy} if self.step >= 0 else {}

    def _read(self) -> dict[str, Any]:
        if not self._facts.exists() or not self.folder.exists():
            return {}
        try:
            facts = json.loads(self._facts.read_text())
            return {"step": int(facts["step"]), "accuracy": float(facts["accuracy"])}
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{self._facts} is damaged ({error}); delete it and {self.folder}") from error
