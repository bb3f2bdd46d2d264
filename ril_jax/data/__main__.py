"""Import questions: python -m ril_jax.data --input=FILE_OR_FOLDER --output=DIR [--strict] [--overwrite].

    python -m ril_jax.data merge --help    # join several teachers' data sets
    python -m ril_jax.data score --help    # log-probabilities of responses under a model
    python -m ril_jax.data select --help   # choose questions by difficulty

Exit status 0: a data set was written (refused rows, if any, are listed). 2: nothing was written, one line says why.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ril_jax import cli
from ril_jax.data.importer import import_questions
from ril_jax.errors import InputError

COMMANDS = {
    "merge": "ril_jax.generation.merging",
    "score": "ril_jax.generation.scoring",
    "select": "ril_jax.generation.selection",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the import with the given command-line arguments and return the exit status.

    A first word of COMMANDS runs that command and leaves the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        command = importlib.import_module(COMMANDS[words[0]])
        program = [f"python -m ril_jax.data {words[0]}", *words[1:]]
        cli.run(command.main, required=command.REQUIRED, flags=command.FLAGS, argv=program)
    parser = argparse.ArgumentParser(
        prog="python -m ril_jax.data",
        description="Check questions in JSONL, parquet or TFDS form and write them as a TFDS/ArrayRecord data set. "
        "Columns: prompt (text with <image> placeholders, or chat messages), images (paths beside the file, bytes, "
        "data URLs), solution (or answer, ground_truth), id (optional); further columns are kept. "
        f"With a first word {', '.join(COMMANDS)} it is another command: python -m ril_jax.data merge --help.",
    )
    parser.add_argument("--input", required=True, help="a .jsonl or .parquet file, a folder of them, or a TFDS folder")
    parser.add_argument("--output", required=True, help="folder of the new data set")
    parser.add_argument("--name", help="name of the new data set (default: the output folder's)")
    parser.add_argument("--split", default="train", help="split to read of a TFDS folder (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="write nothing if any row is refused")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set that is at --output")
    parser.add_argument("--threads", type=int, help="threads that check rows (default: one a core, at most 8)")
    arguments = parser.parse_args(words)
    try:
        summary = import_questions(
            arguments.input,
            arguments.output,
            name=arguments.name,
            split=arguments.split,
            strict=arguments.strict,
            overwrite=arguments.overwrite,
            num_threads=arguments.threads,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error}; nothing was written", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
