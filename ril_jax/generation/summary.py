"""What a job has done, in words: answers, tokens, lengths, and what was not answered."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ril_jax.data.merge import part_folders
from ril_jax.errors import InputError
from ril_jax.generation.folder import FAILED_FILE, Facts, read_facts

_BARS, _WIDTH, _LISTED = 12, 40, 10


def summary_of_folder(folder: Path) -> str:
    """Of a job, or of all parts of one that lie in `folder`. Raises InputError where there is none."""
    folders = [folder] if (folder / "job.json").exists() else part_folders(folder)
    facts = [f for one in folders for f in read_facts(one)]
    if not folders:
        raise InputError(f"{folder} holds no job; name the folder that --output named")
    return summary(facts, folder)


def summary(facts: Sequence[Facts], folder: Path) -> str:
    """Lines for people."""
    questions, rows = sum(f.questions for f in facts), sum(f.rows for f in facts)
    lengths: Counter[int] = Counter()
    for f in facts:
        lengths.update(f.lengths)
    responses, tokens = sum(lengths.values()), sum(length * count for length, count in lengths.items())
    prompt_tokens = sum(f.prompt_tokens for f in facts)
    truncated, with_truncated = sum(f.truncated for f in facts), sum(f.questions_truncated for f in facts)
    failed = [entry for f in facts for entry in f.failed]
    refused = sum(entry["refused"] for entry in failed)
    lines = [
        f"{folder}: {questions:,} of {rows:,} rows answered, with {responses:,} responses; "
        f"{refused:,} rows refused, {len(failed) - refused:,} questions failed",
    ]
    if responses:
        lines += [
            f"tokens: {prompt_tokens:,} in ({prompt_tokens / questions:,.1f} a question), "
            f"{tokens:,} out ({tokens / responses:,.1f} a response)",
            f"cut off: {truncated / responses:.1%} of responses, in {with_truncated / questions:.1%} of questions",
            f"tokens a response: median {_quantile(lengths, 0.5)}, 90 % within {_quantile(lengths, 0.9)}, "
            f"longest {max(lengths)}",
            *_histogram(lengths),
        ]
    for entry in failed[:_LISTED]:
        lines.append(f"{'refused' if entry['refused'] else 'failed'} {entry['id']}: {entry['reason']}")
    if len(failed) > _LISTED:
        lines.append(f"and {len(failed) - _LISTED:,} more, at the end all in {folder / FAILED_FILE}")
    return "\n".join(lines)


def _histogram(lengths: Counter[int]) -> list[str]:
    width = -(-(max(lengths) + 1) // _BARS)
    bars: Counter[int] = Counter()
    for length, count in lengths.items():
        bars[length // width] += count
    most, total = max(bars.values()), sum(bars.values())
    digits = len(str(max(lengths)))
    return [
        f"  {i * width:>{digits}} to {(i + 1) * width - 1:>{digits}}  "
        f"{'█' * round(_WIDTH * bars[i] / most):<{_WIDTH}}  {bars[i] / total:.1%}"
        for i in range(max(bars) + 1)
    ]


def _quantile(lengths: Counter[int], share: float) -> int:
    """The least length that so many responses do not exceed."""
    wanted, seen = share * sum(lengths.values()), 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= wanted:
            return length
    return max(lengths)
