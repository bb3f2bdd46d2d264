"""Join data sets of responses: every question once, by its id, with everybody's responses.

    python -m ril_jax.data merge --input=DIR_1,DIR_2 --output=DIR [--missing=drop] [--drop_overlong]

A folder of parts that `python -m ril_jax.generate --shard=i/n` left counts as one data set; alone, its parts are
joined. docs/teacher_data.md tells of the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from ril_jax import cli
from ril_jax.data.merge import merge_responses, open_responses
from ril_jax.data.records import Question, write_dataset

REQUIRED = ("input", "output")
FLAGS = (
    cli.Flag("input", list, help="data sets, or folders of one's parts, divided by commas"),
    cli.Flag("output", help="folder of the new data set"),
    cli.Flag(
        "missing", default="refuse", help="a question to which a model gave no response: refuse all, keep or drop"
    ),
    cli.Flag("drop_overlong", bool, False, "leave out responses that were cut off; then they are missing"),
    cli.Flag("name", help="name of the new data set; that of its folder where none is given"),
    cli.Flag("overwrite", bool, False, "replace the data set that is at --output"),
)


def main(args: SimpleNamespace) -> int:
    """Merge, and say what came of it."""
    merged = merge_responses(
        [open_responses(folder) for folder in args.input], missing=args.missing, drop_overlong=args.drop_overlong
    )
    counts: Counter[str] = Counter()

    def questions() -> Iterator[Question]:
        for question in merged:
            counts.update(response.model for response in question.responses)
            yield question

    name = args.name or Path(args.output).name
    written = write_dataset(args.output, questions(), name=name, overwrite=args.overwrite)
    responses = ", ".join(f"{counts[model]:,} of {model}" for model in merged.models)
    print(f"wrote {written:,} questions with {counts.total():,} responses ({responses}) to {args.output}")
    if args.drop_overlong:
        print(f"left out: {merged.num_overlong:,} responses that were cut off")
    if merged.missing:
        done = "dropped" if args.missing == "drop" else "kept"
        print(f"{done}: {len(merged.missing):,} questions to which a model gave no response")
    return 0
