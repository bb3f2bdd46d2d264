"""Results in words: each benchmark with its interval, beside the paper's rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from ril_jax.evaluation.benchmarks import BENCHMARKS
from ril_jax.evaluation.paper import METHODS, paper_model, paper_rows


def result_table(model: str, results: Mapping[str, Mapping[str, Any]], *, paper: str = "") -> str:
    """A line a benchmark and one for the average; columns of the paper for the student `paper`, or the one that the
    model's name speaks of. Averages are over the benchmarks that have a score, the paper's over the same ones.
    """
    student = paper or paper_model(model)
    beside = [row for row in paper_rows() if row.model == student and row.method in METHODS]
    names = [name for name in BENCHMARKS if name in results]
    scored = [name for name in names if results[name]["score"] is not None]
    head = ["benchmark", "score", "95 % interval", "questions", "no answer", "cut off", "tokens"]
    head += [f"{row.model} {row.method.removeprefix('RL ')}" for row in beside]
    lines = [head]
    for name in names:
        r = results[name]
        low, high = r["interval"] or (0.0, 0.0)
        lines.append(
            [
                r["title"],
                "-" if r["score"] is None else f"{r['score']:.1f}",
                f"{low:.1f} to {high:.1f}" if r["interval"] else "-",
                f"{r['questions']:,}",
                f"{r['unparsed'] / max(r['samples'], 1):.1%}",
                f"{r['cut_off'] / max(r['samples'], 1):.1%}",
                f"{r['mean_tokens']:.0f}",
                *(f"{row.scores[r['title']]:.1f}" for row in beside),
            ]
        )
    if scored:
        titles = [results[name]["title"] for name in scored]
        average = sum(results[name]["score"] for name in scored) / len(scored)
        what = "average" if len(scored) == len(BENCHMARKS) else f"average of {len(scored)}"
        lines.append([what, f"{average:.1f}", "", "", "", "", "", *(f"{row.average(titles):.1f}" for row in beside)])
    rows = aligned(lines)
    notes = [f"{results[name]['title']}: {note}" for name in names for note in results[name]["notes"]]
    if beside:
        notes.append("the paper's rows: arXiv 2510.19307; it names neither its prompts nor its judge of benchmarks")
    elif not paper:
        students = ", ".join(dict.fromkeys(row.model for row in paper_rows()))
        notes.append(f"for the paper's rows give --paper with one of its students: {students}")
    return "\n".join([f"{model}", *rows, *notes])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal columns, the first one to the left; a rule under the head, which is the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])]
