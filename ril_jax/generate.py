"""Collect a teacher's responses to questions: the paper's 16 each, by a model on this machine or by an endpoint.

    python -m ril_jax.generate --config=configs/teacher_qwen72b.py --config.checkpoint=HF_DIR \\
        --input=QUESTIONS --output=DIR [--shard=i/n] [--summary]

Killed at any moment and started again it goes on where it was. Many hosts share the work, each with a model of its own
and into its own part of DIR: by --shard=0/n to n-1/n, or as the processes of one run (ril_jax/distributed.py), which
divide it themselves. docs/teacher_data.md tells of the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from ml_collections import ConfigDict

from ril_jax import cli, processes
from ril_jax.data.importer import count_rows, input_files, read_rows, repeated_ids
from ril_jax.data.merge import parse_shard, part_name
from ril_jax.data.rows import Row
from ril_jax.errors import InputError
from ril_jax.generation.folder import JobFolder
from ril_jax.generation.job import REPEATED, run_job
from ril_jax.generation.share import own_part, stopping_together
from ril_jax.generation.sources import open_source
from ril_jax.generation.summary import summary_of_folder
from ril_jax.models.digest import file_ends

FLAGS = (
    cli.Flag("input", help="questions: a data set, a .jsonl or .parquet file, or a folder of such"),
    cli.Flag("output", help="folder of the data set; with --shard, of the parts"),
    cli.Flag("split", default="train", help="split to read where the input is a TFDS data set"),
    cli.Flag("shard", help="i/n: this host's part of the questions, i from 0 to n - 1"),
    cli.Flag("summary", bool, False, "tell what has been collected up to now, and do nothing"),
)


def main(args: SimpleNamespace) -> int:
    config, folder = args.config, Path(args.output)
    named = parse_shard(args.shard)
    _check(config)
    if args.summary:
        processes.say(summary_of_folder(folder / part_name(*named) if args.shard else folder))
        return 0
    if not args.input:
        raise InputError("--input=QUESTIONS is missing")
    number, count = own_part(args.shard)
    with stopping_together():
        part = folder / part_name(number, count) if args.shard or processes.count() > 1 else folder
        _collect(config, args, part, number, count)
        processes.gather(None, "all parts are collected")
    return 0


def _collect(config: ConfigDict, args: SimpleNamespace, output: Path, number: int, count: int) -> None:
    num_rows = len(range(number, count_rows(args.input, args.split), count))
    if not num_rows:
        raise InputError(f"{args.input} holds no rows for --shard={number}/{count}; give it questions")

    # Alone, the job finds them itself; they may also lie in another host's part.
    repeated = repeated_ids(args.input, args.split) if count > 1 else {}

    def read(wanted: Callable[[int], bool]) -> Iterator[tuple[int, Row]]:
        for row in read_rows(args.input, args.split, wanted=lambda i: i % count == number and wanted(i // count)):
            if row.index in repeated:
                row = replace(row, fields=None, error=REPEATED, default_id=repeated[row.index])
            yield row.index // count, row

    with contextlib.ExitStack() as stack:
        name, fields, begin = open_source(config, stack, _tell)
        fingerprint = {
            "input": _input_digest(args.input, args.split), "shard": f"{number}/{count}", "rows": num_rows,
            "model_name": name, "seed": config.seed, "num_generations": config.generate.num_generations,
            "questions_per_shard": config.generate.questions_per_shard,
            **{f"sampling.{field}": value for field, value in config.sampling.items()},
            **fields,
        }  # fmt: skip
        folder = stack.enter_context(
            JobFolder.open(
                output, fingerprint, name=name, num_rows=num_rows, notify=_tell,
                rows_per_shard=config.generate.questions_per_shard,
            )
        )  # fmt: skip
        if folder.is_finished:
            _tell(f"{output} is finished")
        else:
            if not folder.is_whole:
                g = config.generate
                run_job(folder, read, begin(), concurrency=g.concurrency, threads=g.threads)
            folder.finish()
        print(summary_of_folder(output))


def _check(config: ConfigDict) -> None:
    for field in ("num_generations", "concurrency", "questions_per_shard", "threads"):
        if config.generate[field] < 1:
            raise InputError(f"config.generate.{field} is {config.generate[field]}; give 1 or more")
    if config.sampling.max_completion_length < 1:
        raise InputError("config.sampling.max_completion_length must be 1 or more")


def _input_digest(source: str, split: str) -> str:
    """What tells one input from another: names, sizes and both ends of its files."""
    state = hashlib.blake2b(split.encode(), digest_size=8)
    for path in input_files(source):
        state.update(f"{path.name}\0{path.stat().st_size}\0".encode() + file_ends(path, 1 << 16))
    return state.hexdigest()


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    cli.run(main, required=("config", "output"), flags=FLAGS, processes=True)
