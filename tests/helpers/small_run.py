"""The embedded default made small: its stages in seconds, in this process or in one of their own.

Nothing is learned at this size. What is tested on it is what a run does: files, metrics, going on after a kill, words.
"""

import copy
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

import ril_jax
from ril_jax import cli, train
from ril_jax import config as config_lib

if TYPE_CHECKING:
    from ril_jax.training.run import Run

ROOT = Path(ril_jax.__file__).parent.parent
BATCH = 4


def small_config(file: str = "configs/tiny.py", **changes: Any) -> ConfigDict:
    """An embedded default with one-layer models and a few steps on a few questions; `changes` are dotted fields."""
    c = cli.load_config(str(ROOT / file))
    c.workers = 1
    c.arms = "ril"
    c.prepare.num_sft, c.prepare.num_questions, c.prepare.num_eval = 32, 12, 6
    student = Path(c.student.checkpoint).name
    sizes = dict(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=48)
    sizes |= dict(vision_hidden_size=24, vision_depth=1, vision_heads=2, vision_intermediate_size=32)
    with c.prepare.models.unlocked():
        for name in [n for n in c.prepare.models if n not in (student, *(f"teacher_{t}" for t in c.teachers))]:
            del c.prepare.models[name]
    for model in c.prepare.models.values():
        model.update(sizes | dict(base=student if model.base else ""))
        *others, last = model.phases
        with model.phases.unlocked():
            for phase in others:
                del model.phases[phase]
        model.phases[last].update(dict(batch_size=BATCH, steps=2, num_examples=8, warmup_steps=0))
    patches = c.data.max_pixels // 14**2
    c.data.vision_rungs = ((BATCH * patches, BATCH, patches), (BATCH * 13,))
    c.sft.update({"batch_size": BATCH, "steps": 12})
    c.collect.update({"batch_size": BATCH, "num_generations": 4})
    c.discriminator.update({"batch_size": BATCH, "steps": 6})
    c.ril.update({"batch_size": BATCH, "steps": 6, "samples_every": 2, "samples_count": 2})
    # An untrained model seldom ends a response, and a response cut off would drop its question.
    c.ril.drop_truncated_teachers = False
    c.eval.every, c.eval.batch_size = 0, BATCH
    c.checkpoint.every = 2
    c.reward.functions = ("helpers.small_run.spread",)
    for field, value in changes.items():
        set_field(c, field, value)
    return c


def spread(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between responses whatever a model of this size says: something to learn."""
    return [zlib.crc32(text.encode()) % 8 / 8 for text in completions]


def set_field(config: ConfigDict, field: str, value: Any) -> None:
    *sections, leaf = field.split(".")
    for section in sections:
        config = config[section]
    config[leaf] = value


def variant(base: "Run", workdir: Path, changes: dict[str, Any]) -> "Run":
    """A run with changed fields (`__` for a dot) in a copy of the workdir; it shares what `base` has compiled."""
    run = copy.copy(base)
    run.config = ConfigDict(copy.deepcopy(base.config.to_dict()))
    for field, value in changes.items():
        set_field(run.config, field.replace("__", "."), value)
    config_lib.validate(run.config)
    run.workdir = Path(shutil.copytree(base.workdir, workdir))
    return run


def train_here(workdir: Path, config: ConfigDict, stages: str = "") -> None:
    """Run stages in this process."""
    if stages:
        config.stages = stages
    train.main(SimpleNamespace(config=config, workdir=Path(workdir)))


def command(workdir: Path, *overrides: str) -> list[str]:
    """The command line of a run with the small config; `overrides` are FIELD=VALUE."""
    config = Path(__file__).parent / "small_run_config.py"
    words = [f"--config.{override}" for override in overrides]
    return [sys.executable, "-m", "ril_jax.train", f"--config={config}", f"--workdir={workdir}", *words]


def train_apart(workdir: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Run it in a process of its own, to its end."""
    return subprocess.run(command(workdir, *overrides), capture_output=True, text=True, env=environment(), timeout=600)


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
