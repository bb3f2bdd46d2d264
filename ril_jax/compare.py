"""Two or more result folders of ril_jax.evaluate side by side: scores, flipped answers, lengths, pictures.

    python -m ril_jax.compare A B [C ...] [--output=FILE.html] [--samples=N] [--data=FOLDER]

Prints tables whose columns are A, B, C, ..., with a legend of the folders above, and writes a page (compare.html in the
first folder unless --output says otherwise). Differences are those of the others to the first folder, over the
questions that all of them answered; averages are over the benchmarks that all of them have.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from ril_jax import cli
from ril_jax.errors import InputError
from ril_jax.evaluation.comparison import compare, open_sides, terminal_text
from ril_jax.evaluation.comparison_page import comparison_page
from ril_jax.files import write_atomically

FLAGS = (
    cli.Flag("output", help="the page; compare.html in the first folder by default"),
    cli.Flag("samples", int, 6, "flipped questions on the page, for each benchmark and folder gained and lost"),
    cli.Flag("data", help="folder with the benchmarks' files, for the pictures, if they have moved"),
)


def main(folders: Sequence[str], args: SimpleNamespace) -> int:
    if args.samples < 0:
        raise InputError(f"--samples={args.samples}: give 0 or more")
    sides = open_sides([Path(folder) for folder in folders])
    compared = compare(sides)
    path = Path(args.output) if args.output else sides[0].folder / "compare.html"
    if path.is_dir():
        raise InputError(f"--output={path} is a folder; name a file, such as {path / 'compare.html'}")
    page = comparison_page(sides, compared, samples=args.samples, data=Path(args.data) if args.data else None)
    try:
        write_atomically(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(f"--output={path} cannot be written ({error.strerror}); name another file") from error
    print(terminal_text(sides, compared))
    print(f"page: {path}")
    return 0


def run(argv: Sequence[str]) -> None:
    """The command line: folders are plain words, everything else is a flag."""
    folders = [word for word in argv[1:] if not word.startswith("-")]
    flags = [word for word in argv[1:] if word.startswith("-")]
    cli.run(lambda args: main(folders, args), required=(), flags=FLAGS, argv=[argv[0], *flags])


if __name__ == "__main__":
    run(sys.argv)
