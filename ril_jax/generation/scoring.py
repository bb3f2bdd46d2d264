"""Log-probabilities of a data set's responses under a model: how likely a student finds what a teacher said.

    python -m ril_jax.data score --config=configs/teacher_qwen72b.py --config.checkpoint=HF_DIR \\
        --input=DIR --output=scores.jsonl [--model=NAME] [--responses=N] [--shard=i/n]

One line a question, when all its responses are scored; stopped and started again it goes on where it was. With --shard
every host writes a file of its own. `python -m ril_jax.data select` reads such files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ril_jax import cli
from ril_jax.data.chat import ChatTokenizer, EncodedPrompt
from ril_jax.data.images import decode_image
from ril_jax.data.merge import open_responses, parse_shard
from ril_jax.data.records import Question, Response, question_prompt
from ril_jax.data.threads import map_in_threads
from ril_jax.errors import InputError
from ril_jax.models import hub
from ril_jax.models.digest import checkpoint_digest
from ril_jax.progress import Progress, of_bytes
from ril_jax.sampling.gather import run_each
from ril_jax.sampling.local import load_engine
from ril_jax.sampling.requests import ScoreRequest

REQUIRED = ("config", "input", "output")
FLAGS = (
    cli.Flag("input", help="a data set of responses, or the folder of its parts"),
    cli.Flag("output", help="a .jsonl file, begun or gone on with"),
    cli.Flag("model", help="score the responses of this model alone"),
    cli.Flag("responses", int, 0, "score the first so many of each model's responses to a question; 0 for all"),
    cli.Flag("shard", help="i/n: this host's part of the questions, i from 0 to n - 1"),
)

Score = tuple[float, int]  # log-probability of all tokens of a response together, and how many they are


def main(args: SimpleNamespace) -> int:
    """Score what is not scored yet."""
    config, path, (number, count) = args.config, Path(args.output), parse_shard(args.shard)
    dataset = open_responses(args.input)
    if not config.checkpoint:
        raise InputError("config.checkpoint is empty; name the Hugging Face folder or hub id of who scores")
    folder = hub.resolve(config.checkpoint)
    limits = [config.min_pixels, config.max_pixels, config.max_tiles]
    header = {"checkpoint": checkpoint_digest(folder), "dtype": config.dtype, "image limits": limits}
    done = _begin(path, header)
    wanted = _Wanted(args.model, args.responses)
    mine = range(number, len(dataset), count)

    def todo() -> Iterator[Question]:
        for i in mine:
            question = dataset[i]
            if wanted(question).keys() - done.get(question.id, {}).keys():
                yield question

    config.checkpoint = str(folder)
    model, engine = load_engine(config, loading=of_bytes("load"))
    progress = Progress("score", len(mine), start=min(len(done), len(mine)))
    scored = 0
    with path.open("a", encoding="utf-8") as file:
        for id_, scores in score_questions(
            engine, model.chat, todo(), wanted, threads=config.generate.threads, notify=progress.message
        ):  # fmt: skip
            file.write(json.dumps({"id": id_, "scores": scores}) + "\n")
            file.flush()
            scored += len(scores)
            progress.advance(1)
    engine.close()
    progress.close()
    print(f"scored {scored:,} responses; {path} has those of {progress.done:,} of {len(mine):,} questions")
    return 0


def response_key(response: Response) -> str:
    """What a response is called in a file of scores: 16 hex digits of who said it and what."""
    return hashlib.blake2b(f"{response.model}\0{response.text}".encode(), digest_size=8).hexdigest()


def score_questions(
    engine: Any,
    chat: ChatTokenizer,
    questions: Iterator[Question],
    wanted: Callable[[Question], dict[str, Response]],
    *,
    threads: int,
    notify: Callable[[str], None],
) -> Iterator[tuple[str, dict[str, Score]]]:
    """(id, scores by `response_key`) of each question when all of its wanted responses have one.

    engine: without a thread of its own. The end of a response counts as a token where it ended by itself. `notify` is
    told of questions that the model cannot read; they are left out.
    """
    scores: dict[str, dict[str, Score]] = {}
    left: dict[str, int] = {}  # requests of a question that have not ended
    ended: deque[str] = deque()

    def prepare(question: Question) -> list[tuple[str, ScoreRequest]] | InputError:
        try:
            return list(_requests(chat, question, wanted(question)))
        except InputError as error:
            return error

    def requests() -> Iterator[tuple[tuple[str, str], ScoreRequest]]:
        for question, prepared in map_in_threads(prepare, questions, num_threads=threads):
            if isinstance(prepared, InputError):
                notify(f"{question.id} cannot be scored: {prepared}")
                continue
            left[question.id], scores[question.id] = len(prepared), {}
            for key, request in prepared:
                yield (question.id, key), request

    def end(id_: str) -> None:
        left[id_] -= 1
        if not left[id_]:
            ended.append(id_)

    def refuse(place: tuple[str, str], error: InputError) -> None:
        notify(f"{place[0]}: a response cannot be scored: {error}")
        end(place[0])

    def whole() -> Iterator[tuple[str, dict[str, Score]]]:
        while ended:
            id_ = ended.popleft()
            del left[id_]
            if found := scores.pop(id_):
                yield id_, found

    in_flight = 2 * max(rows for _, rows in engine.shapes.prefill) + 2
    for (id_, key), result in run_each(engine, chat, requests(), in_flight=in_flight, refused=refuse):
        scores[id_][key] = (float(np.sum(result.logprobs)), len(result.logprobs))
        end(id_)
        yield from whole()
    yield from whole()


def read_scores(paths: Sequence[str]) -> dict[str, dict[str, Score]]:
    """Scores by question's id and `response_key`, of several files. Raises InputError for what is no such file."""
    scores: dict[str, dict[str, Score]] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise InputError(f"{path} does not exist; make it with python -m ril_jax.data score")
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                value = json.loads(line)
                if number > 1:
                    found = {key: (float(total), int(count)) for key, (total, count) in value["scores"].items()}
                    scores.setdefault(str(value["id"]), {}).update(found)
                elif "checkpoint" not in value:
                    raise ValueError("its first line names no checkpoint")
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path}:{number} is no line of python -m ril_jax.data score ({error}); finish that, or delete it"
                ) from error
    return scores


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which responses of a question are scored, by their key."""

    model: str | None
    most: int

    def __call__(self, question: Question) -> dict[str, Response]:
        counts: Counter[str] = Counter()
        found = {}
        for response in question.responses:
            counts[response.model] += 1
            if self.model in (None, "", response.model) and (not self.most or counts[response.model] <= self.most):
                found[response_key(response)] = response
        return found


def _requests(
    chat: ChatTokenizer, question: Question, responses: dict[str, Response]
) -> Iterator[tuple[str, ScoreRequest]]:
    name = f"question {question.id}"
    images = [decode_image(data, name=f"{name}, image {i}") for i, data in enumerate(question.images)]
    prompt = chat.encode_prompt(chat.messages(question_prompt(question), len(images), name=name), images, name=name)
    for key, response in responses.items():
        tokens = chat.encode_response(response.text, finished=response.finish_reason == "stop")
        if len(tokens):
            whole = EncodedPrompt(np.concatenate([prompt.token_ids, tokens]), prompt.images)
            yield key, ScoreRequest(whole, first=len(prompt.token_ids))


def _begin(path: Path, header: dict[str, Any]) -> dict[str, dict[str, Score]]:
    """What stands in the file; begins it where it is not there. A line that a kill left half-written is cut off."""
    if path.suffix != ".jsonl":
        raise InputError(f"--output={path}: name a file that ends with .jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes() if path.exists() else b""
    good = data.rfind(b"\n") + 1
    if good < len(data):
        with path.open("r+b") as file:
            file.truncate(good)
    if not good:
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return {}
    try:
        theirs = json.loads(data.partition(b"\n")[0])
    except ValueError:
        theirs = None
    if theirs != json.loads(json.dumps(header)):
        raise InputError(f"{path} holds something else, or scores of another model or other images; name another file")
    return read_scores([str(path)])
