"""Measure the rules and the judge of a run by responses that people have labelled.

    python -m ril_jax.rewards agreement --config=configs/qwen7b.py --input=LABELLED.jsonl \\
        --config.reward.judge.base_url=http://judge:8000/v1 [--output=VERDICTS.jsonl] [--workdir=DIR]

A row has `prompt`, `solution`, `response` and `label` (1 or true: right, 0 or false: wrong), and an `id` if you like.
With --workdir the verdicts of that run are used, and new ones kept there. docs/rewards.md tells how to read the table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ril_jax import cli
from ril_jax.data.importer import read_rows
from ril_jax.data.records import Question, plain_prompt
from ril_jax.data.rows import Row
from ril_jax.errors import InputError
from ril_jax.rewards.agreement import report
from ril_jax.rewards.judge import JudgeItem, RulesJudge, make_judge, open_judge

FLAGS = (
    cli.Flag("input", help="labelled responses: a .jsonl or .parquet file, or a folder of such"),
    cli.Flag("output", help="a .jsonl file for all verdicts; none where it is not given"),
    cli.Flag("listed", int, 20, "how many responses are shown on which not all agree"),
)
_LABELS = {"0": False, "1": True, "false": False, "true": True}


def main(args: SimpleNamespace) -> int:
    """Judge every row and print the table. Raises InputError, naming the row, for one that cannot be used."""
    judge = open_judge(args.config, args.workdir)
    settings = args.config.reward.judge.to_dict() | {"kind": "rules"}
    rules_judge = make_judge(settings)
    assert rules_judge is not None
    items, labels = read_labelled(args.input)
    rules = rules_judge(items)
    verdicts = None if judge is None or isinstance(judge, RulesJudge) else judge(items)
    if args.output:
        with Path(args.output).open("w", encoding="utf-8") as file:
            for i, item in enumerate(items):
                line: dict[str, Any] = {"id": item.id, "label": int(labels[i]), "rules": int(rules[i].score)}
                if verdicts is not None:
                    line |= {"judge": int(verdicts[i].score), "explanation": verdicts[i].explanation}
                    line |= {"error": verdicts[i].error}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(report(items, labels, rules, verdicts, listed=args.listed))
    return 0


def read_labelled(source: str) -> tuple[list[JudgeItem], list[bool]]:
    """Responses to be judged, and whether people call them right."""
    items, labels = [], []
    for row in read_rows(source):
        item, label = _read(row)
        items.append(item)
        labels.append(label)
    if not items:
        raise InputError(f"{source} holds no rows; give it labelled responses")
    return items, labels


def _read(row: Row) -> tuple[JudgeItem, bool]:
    where = f"{row.file}:{row.number}"
    if row.fields is None:
        raise InputError(f"{where}: {row.error}")
    fields = {name: value for name, value in row.fields.items() if value is not None}
    if absent := [name for name in ("prompt", "solution", "response", "label") if name not in fields]:
        raise InputError(f"{where} has no {' and no '.join(absent)}; give prompt, solution, response and label")
    label = _LABELS.get(str(fields["label"]).strip().lower().removesuffix(".0"))
    if label is None:
        raise InputError(f"{where}: `label` is {fields['label']!r}; give 1 (right) or 0 (wrong)")
    if not isinstance(fields["response"], str):
        raise InputError(f"{where}: `response` is {fields['response']!r}; give it as text")
    solution = str(fields["solution"])
    if not solution.strip():
        raise InputError(f"{where}: `solution` is empty; write the right answer, or leave the row out")
    prompt, id_ = fields["prompt"], str(fields.get("id", row.default_id))
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    try:
        question = plain_prompt(Question(id_, text, (), solution))
    except (LookupError, TypeError) as error:
        raise InputError(f"{where}: `prompt` is neither text nor chat messages; write the question") from error
    return JudgeItem(question, solution, fields["response"], id_), label


if __name__ == "__main__":
    if sys.argv[1:2] == ["agreement"]:
        sys.argv[:2] = ["python -m ril_jax.rewards agreement"]
    elif not any(word in ("-h", "--help", "-help") for word in sys.argv[1:]):
        print("error: name the command: python -m ril_jax.rewards agreement --config=... --input=...", file=sys.stderr)
        sys.exit(cli.USAGE_STATUS)
    cli.run(main, required=("config", "input"), flags=FLAGS)
