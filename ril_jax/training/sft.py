"""Stage 1, supervised fine-tuning, and the loop that it shares with the discriminator's pre-training.

The targets of a question are its responses if the data set has any (all of them in one row that shares the prompt),
else its solution.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from ril_jax import processes
from ril_jax.data.pipeline import make_iterator
from ril_jax.data.records import Question
from ril_jax.errors import InputError
from ril_jax.models.parameters import Params
from ril_jax.pretrained import Pretrained, save_folder
from ril_jax.progress import Progress
from ril_jax.rewards.judge import RulesJudge
from ril_jax.training.batches import PromptEncoder, micro_rows, put
from ril_jax.training.best import BestModel
from ril_jax.training.evaluation import evaluate, held_out_questions
from ril_jax.training.failed_batch import save_failed_batch
from ril_jax.training.programs import Programs
from ril_jax.training.run import Run, Stopped
from ril_jax.training.state import TrainState, abstract_state, init_state, make_optimizer, make_update, split_frozen


def run_sft(run: Run) -> None:
    """Train the student on config.data.sft and leave it in workdir/sft/model as an HF folder: pi_init.

    Every config.eval.sft_every steps its held-out accuracy is logged, and the best of them kept in workdir/sft/best.
    """
    every = run.config.eval.sft_every
    held_out = held_out_questions(run) if every else []
    best = BestModel(run.workdir / "sft", run.student) if held_out and run.config.eval.keep_best else None

    def look(step: int, params: Params) -> dict[str, float]:
        if not held_out or step % every:
            return {}
        accuracy = evaluate(run, params, held_out, RulesJudge())["accuracy"]
        if best is not None:
            best.offer(step, accuracy, params)
        return {"eval/accuracy": accuracy}

    params = train_supervised(
        run,
        "sft",
        run.student,
        run.programs,
        lambda: run.student_params(run.student.folder),
        run.dataset("sft"),
        run.config.sft,
        look,
    )
    save_folder(run.workdir / "sft" / "model", run.student, params)
    run.mark_done("sft", {"steps": run.config.sft.steps} | (best.facts() if best is not None else {}))


def train_supervised(
    run: Run,
    label: str,
    model: Pretrained,
    programs: Programs,
    load: Callable[[], Params],
    source: Sequence[Question],
    settings: ConfigDict,
    look: Callable[[int, Params], dict[str, float]] | None = None,
) -> Params:
    """Train `model` on the responses of `source` from the parameters that `load` gives; returns the final ones.

    look(step, parameters), called after every step, gives what else is logged of it.
    """
    encoder = PromptEncoder(model.chat, max_length=max(run.config.data.prompt_buckets))
    buckets, batch = run.make_buckets(model), settings.batch_size
    micro = micro_rows(batch, settings.micro_batch_size, buckets.shards)

    def encode(question: Question):
        targets = [(r.text, r.finish_reason == "stop") for r in question.responses] or [(question.solution, True)]
        targets = targets[:slots]
        return encoder(question), [model.chat.encode_response(text, finished=finished) for text, finished in targets]

    def pack(items):
        prompts, responses, tokens = buckets.pack(
            [p for p, _ in items], [r for _, r in items], batch=batch, micro=micro, slots=slots
        )
        return prompts, responses, np.full((batch // micro,), max(tokens, 1), np.float32)

    slots = max(settings.responses_per_question, 1)
    params, frozen = split_frozen(load(), train_vision=settings.train_vision, train_projector=settings.train_projector)
    optimizer = make_optimizer(settings)
    update, rows = make_update(programs.sft_loss, optimizer), buckets.layout(batch, micro).positions
    state = run_loop(
        run, label, source, rows, encode, pack, settings, params, optimizer, update, frozen,
        look=None if look is None else lambda step, state: look(step, state.params | frozen),
    )  # fmt: skip
    return state.params | frozen


def run_loop(
    run: Run,
    label: str,
    source: Sequence[Any],
    rows: np.ndarray,
    encode: Callable[[Any], Any],
    pack: Callable[[Sequence[Any]], Any],
    settings: ConfigDict,
    params: Params,
    optimizer: optax.GradientTransformation,
    update: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]],
    shared: Any,
    look: Callable[[int, TrainState], dict[str, float]] | None = None,
) -> TrainState:
    """`settings.steps` updates on batches of `source`, resumable: `encode` an item in a thread, `pack` a batch of them.

    Of every batch this process reads the items at the places `rows`. `look`: as in `train_supervised`.
    Raises InputError where a loss is not finite (its batch is saved), Stopped when a signal came (all is saved).
    """
    iterator = make_iterator(
        source,
        batch_size=settings.batch_size,
        seed=run.config.seed,
        rows=rows,
        transform=encode,
        prefetch=run.config.data.prefetch,
        num_threads=run.config.data.threads,
    )
    checkpointer, metrics = run.checkpointer(label), run.metrics(label)
    restored = checkpointer.restore_latest(abstract_state(params, optimizer, run.mesh))
    if restored is None:
        state, start = init_state(params, optimizer, run.mesh), 0
    else:
        state, start = restored.arrays, restored.step
        iterator.set_state(restored.host["iterator"])
    metrics.rewind(start)
    progress = Progress(label, settings.steps, "steps", start=start, enabled=processes.is_first())
    batch = pack(next(iterator)) if start < settings.steps else None
    for step in range(start + 1, settings.steps + 1):
        position = iterator.get_state()
        run.expect(label, batch)
        state, sums = update(state, shared, put(batch, run.mesh))
        run.counter.warm(label)
        ahead = pack(next(iterator)) if step < settings.steps else None  # while the device computes
        values = {name: float(value) for name, value in jax.device_get(sums).items()}
        if not values.pop("finite"):
            raise not_finite(run, label, step, values, batch)
        if look is not None:
            with progress.pause("evaluation"), run.counter.expected():
                values |= look(step, state)
        metrics.write(step, values)
        progress.advance(1, {"loss": values["loss"]})
        batch = ahead
        stopping = run.stop.should_stop()
        if checkpointer.due(step) or stopping or step == settings.steps:
            with progress.pause("checkpoint"), run.counter.expected():
                metrics.flush()
                checkpointer.save(step, state, {"iterator": position}, force=True)
        if stopping and step < settings.steps:
            checkpointer.close()
            raise Stopped(run.stop.exit_status)
    run.counter.cold()  # what follows is another stage's
    checkpointer.close()
    metrics.close()
    progress.close()
    run.timer.add(label, parts=progress.seconds())
    return state


def not_finite(run: Run, label: str, step: int, values: dict[str, float], batch: Any) -> InputError:
    """The error of a step whose loss or gradient is NaN or infinite; saves the first process's part of its batch."""
    note = {"step": step, "stage": label, "metrics": repr(values)}
    where = processes.decide(
        lambda: str(save_failed_batch(run.workdir / label / "failed", batch, note)), "where the failed batch is"
    )
    return InputError(
        f"{label}: the loss of step {step} is {values['loss']} (gradient norm {values['grad_norm']}); its batch is in "
        f"{where}; lower the learning rate or look at that batch. The last checkpoint is good"
    )
