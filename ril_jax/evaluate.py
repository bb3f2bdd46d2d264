"""Evaluate a model on the paper's 14 benchmarks, from their files as they are published (docs/evaluation.md).

    python -m ril_jax.evaluate --config=configs/evaluate.py --checkpoint=DIR --data=FOLDER --output=DIR \\
        [--benchmarks=ai2d,chartqa] [--shard=i/n] [--limit=N] [--summary]

Killed at any moment and started again it goes on where it was. Many hosts share the work, each with a model of its own
and all into the same --output: by --shard=0/n to n-1/n, or as the processes of one run (ril_jax/distributed.py), which
divide it themselves. Whoever finds every shard answered writes the scores. ril_jax.compare shows two such folders.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from ril_jax import cli, processes
from ril_jax.errors import InputError
from ril_jax.evaluation.benchmarks import chosen
from ril_jax.evaluation.paper import paper_rows
from ril_jax.evaluation.run import Evaluation
from ril_jax.evaluation.tasks import Task
from ril_jax.generation.outcomes import ResponseSource
from ril_jax.generation.share import own_part
from ril_jax.generation.sources import open_source

FLAGS = (
    cli.Flag("checkpoint", help="Hugging Face folder or hub id, instead of config.checkpoint"),
    cli.Flag("data", help="folder with the benchmarks' files"),
    cli.Flag("output", help="folder of the results"),
    cli.Flag("benchmarks", list, ["all"], help="comma-separated names"),
    cli.Flag("shard", help="i/n: this host's part of the questions, i from 0 to n - 1"),
    cli.Flag("limit", int, 0, help="the first so many questions of each file; 0 for all"),
    cli.Flag("paper", help="whose rows of the paper's table stand beside; found in the model's name if it is there"),
    cli.Flag("summary", bool, False, "tell the scores of what has been answered up to now, and do nothing"),
)


def main(args: SimpleNamespace) -> int:
    config, (number, count) = args.config, own_part(args.shard)
    if args.checkpoint:
        config.checkpoint = args.checkpoint
    _check(config, args)
    data = Path(args.data)
    tasks = [Task.open(benchmark, data, limit=args.limit) for benchmark in chosen(args.benchmarks)]
    with contextlib.ExitStack() as judging, contextlib.ExitStack() as answering:
        name, fields, begin = open_source(_student(config), answering, _tell)
        judge, begin_judge = _judge(config, judging)
        run = Evaluation(
            Path(args.output), tasks, number=number, count=count, model=name, judge=judge,
            resamples=config.evaluate.bootstrap, notify=_tell,
        )  # fmt: skip
        paper = args.paper or ""
        if args.summary:
            processes.say(run.table(paper=paper))
            return 0
        processes.by_first(lambda: run.claim(_sampling(config) | fields), "claim the output")
        ask = {"concurrency": config.generate.concurrency, "threads": config.generate.threads}
        run.answer(begin, **ask)
        answering.close()
        gc.collect()  # so that the judge has the device's memory
        if begin_judge is not None:
            run.ask_judge(begin_judge, **ask)
        processes.gather(None, "all shards are answered")
        if not processes.is_first():
            return 0
        if missing := run.missing_shards():
            _tell(f"shard {number}/{count} is done; {run.output} still waits for {', '.join(missing)}")
        else:
            run.write(paper=paper)
            print(run.table(paper=paper))
    return 0


def _check(config: ConfigDict, args: SimpleNamespace) -> None:
    if "evaluate" not in config:
        raise InputError("--config: it has no evaluate; start from ril_jax.config.serving_config()")
    e = config.evaluate
    if e.judge.kind not in ("none", "openai", "engine"):
        raise InputError(f"config.evaluate.judge.kind is {e.judge.kind!r}; use none, openai or engine")
    if e.judge.kind == "openai" and not e.judge.base_url:
        raise InputError(
            "config.evaluate.judge.base_url is empty; name the judge's endpoint, or use another judge.kind"
        )
    if e.judge.kind == "engine" and not e.judge.checkpoint:
        raise InputError(
            "config.evaluate.judge.checkpoint is empty; name the judge's folder, or use another judge.kind"
        )
    for field, least in (("max_tokens", 1), ("bootstrap", 1)):
        if e[field] < least:
            raise InputError(f"config.evaluate.{field} is {e[field]}; give {least} or more")
    if e.judge.max_tokens < 1:
        raise InputError(f"config.evaluate.judge.max_tokens is {e.judge.max_tokens}; give 1 or more")
    if args.limit < 0:
        raise InputError(f"--limit={args.limit}: give 0 or more")
    students = dict.fromkeys(row.model for row in paper_rows())
    if args.paper and args.paper not in students:
        raise InputError(f"--paper={args.paper} is no student of the paper; its students are {', '.join(students)}")


def _student(config: ConfigDict) -> ConfigDict:
    """The config of the model that answers."""
    e = config.evaluate
    c = ConfigDict(config.to_dict())
    c.sampling.update(
        temperature=e.temperature, top_p=e.top_p, top_k=e.top_k, repetition_penalty=e.repetition_penalty,
        max_completion_length=e.max_tokens,
    )  # fmt: skip
    c.generate.num_generations = 1
    path = Path(c.checkpoint)
    if path.name in ("model", "best") and not c.generate.model_name and not c.generate.base_url:
        c.generate.model_name = "/".join(path.resolve().parts[-4:])  # of a run: WORKDIR/ril/ARM/model
    return c


def _judge(config: ConfigDict, stack: contextlib.ExitStack) -> tuple[str, Callable[[], ResponseSource] | None]:
    """The judge's name, "" for none, and how to begin with it."""
    j = config.evaluate.judge
    if j.kind == "none":
        return "", None
    c = ConfigDict(config.to_dict())
    c.sampling.update(
        temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, max_completion_length=j.max_tokens
    )  # fmt: skip
    c.generate.num_generations, c.generate.model_name = 1, j.model
    c.checkpoint, c.dtype = j.checkpoint, j.dtype
    c.generate.base_url = j.base_url if j.kind == "openai" else ""
    c.generate.endpoint_model, c.generate.api_key_env = j.model, j.api_key_env
    if j.kind == "openai" and j.model:
        return j.model, lambda: open_source(c, stack, _tell)[2]()
    name, _, begin = open_source(c, stack, _tell)
    return name, begin


def _sampling(config: ConfigDict) -> dict[str, Any]:
    """What the answers depend on besides the model."""
    e = config.evaluate
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens")
    fields = {name: e[name] for name in names}
    return fields | ({"seed": config.seed} if e.temperature > 0 else {})


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    cli.run(main, required=("config", "data", "output"), flags=FLAGS, processes=True)
