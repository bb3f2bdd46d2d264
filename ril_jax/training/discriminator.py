"""Stage 3, the discriminator's pre-training on cached responses, and the update and scoring that RIL uses (Eq. 1)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from ril_jax import objectives
from ril_jax.data.packing import PromptBatch, ResponseBatch
from ril_jax.data.records import Question
from ril_jax.errors import InputError
from ril_jax.models.parameters import Network, Params, cast
from ril_jax.pretrained import Pretrained
from ril_jax.rewards.discriminator import DiscriminatorPrompts, initial_params, make_discriminator
from ril_jax.training.batches import Buckets, micro_rows
from ril_jax.training.collect import STUDENT, response_dataset
from ril_jax.training.programs import Programs
from ril_jax.training.run import Run
from ril_jax.training.sft import run_loop
from ril_jax.training.state import abstract_state, make_optimizer, make_update, split_frozen


class Discriminator:
    """D's programs: `update` on responses of the student and the teachers, `logits` of any responses.

    A batch is (prompts, responses): micro-batches of questions, the student's responses in front.
    """

    def __init__(self, run: Run, config: ConfigDict):
        self.settings = config.discriminator
        self.context = self.settings.context
        data = run.config.data
        self.prompts = DiscriminatorPrompts(
            run.student.chat, context=self.context, max_response=max(data.response_buckets)
        )
        self.network = _network(run.student, self.context)
        self.buckets = Buckets(
            run.student.config,
            tuple(self.settings.prompt_buckets),
            tuple(r + self.prompts.extra for r in data.response_buckets),
            run.buckets.rungs,
            run.buckets.shards,
            run.buckets.part,
        )
        self.programs = _programs(run.programs, self.network)

    def initial(self, run: Run) -> tuple[Params, Params]:
        """(trained, frozen) parameters before any training: pi_init's weights with a zero head."""
        return split_frozen(initial_params(self.network, run.pi_init(), run.mesh), train_vision=False)

    def pack(self, rows: Sequence[tuple[Any, list[np.ndarray]]], *, batch: int, micro: int):
        """Arrays of `DiscriminatorPrompts.rows` of every question of a batch (of this process's part of it)."""
        return self.buckets.pack([p for p, _ in rows], [r for _, r in rows], batch=batch, micro=micro)[:2]

    def make_update(self, optimizer: optax.GradientTransformation, num_student: int):
        """Jitted (state, frozen, batch) -> (state, metrics): one step of Eq. 1, or of GAD's pair loss."""
        return _make_update(self.programs, optimizer, self.settings.loss, num_student)

    @functools.cached_property
    def logits(self):
        """Jitted (params, frozen, batch) -> logits [M, b, S]; D(o) is their sigmoid."""
        return _make_logits(self.programs)


def run_discriminator(run: Run) -> None:
    """Pre-train D on everyone's cached responses; its parameters stay in workdir/discriminator."""
    config = run.config
    discriminator = Discriminator(run, config)
    settings, count = config.discriminator, config.ril.num_generations
    source = response_dataset(run)
    micro = micro_rows(settings.batch_size, settings.micro_batch_size, run.buckets.shards)

    def encode(question: Question):
        generator = np.random.default_rng([config.seed, *question.id.encode()])
        student = [r for r in question.responses if r.model == STUDENT]
        teacher = [r for r in question.responses if r.model != STUDENT]
        if not student or not teacher:
            raise InputError(
                f"question {question.id} has {len(student)} responses of the student and {len(teacher)} of teachers; "
                "the discriminator learns from both: collect them with config.collect.student=True and a teacher, or "
                "leave its stage out"
            )
        student, teacher = pick(student, count, generator), pick(teacher, count, generator)
        prompt = run.encoder(question)
        return discriminator.prompts.rows(question, prompt, [r.text for r in [*student, *teacher]])

    def pack(items):
        batch = discriminator.pack(items, batch=settings.batch_size, micro=micro)
        return *batch, np.full((settings.batch_size // micro,), settings.batch_size // micro, np.float32)

    params, frozen = discriminator.initial(run)
    optimizer = make_optimizer(settings)
    update = discriminator.make_update(optimizer, count)
    rows = discriminator.buckets.layout(settings.batch_size, micro).positions
    run_loop(run, "discriminator", source, rows, encode, pack, settings, params, optimizer, update, frozen)
    run.mark_done("discriminator", {"steps": settings.steps})


def pretrained_params(run: Run, discriminator: Discriminator) -> tuple[Params, Params]:
    """D after its pre-training in this workdir, or before any where that stage was left out."""
    params, frozen = discriminator.initial(run)
    if not run.is_done("discriminator"):
        return params, frozen
    checkpointer = run.checkpointer("discriminator")
    restored = checkpointer.restore_latest(abstract_state(params, make_optimizer(run.config.discriminator), run.mesh))
    checkpointer.close()
    return (restored.arrays.params if restored is not None else params), frozen


def pick(responses: Sequence[Any], count: int, generator: np.random.Generator) -> list[Any]:
    """`count` responses drawn without replacement, as far as there are so many."""
    if len(responses) >= count:
        return [responses[i] for i in generator.choice(len(responses), count, replace=False)]
    return [responses[i % len(responses)] for i in generator.permutation(count)]


# Cached, so that the arms of a run share one network and what is compiled for it.
@functools.cache
def _network(student: Pretrained, context: str) -> Network:
    return make_discriminator(student.config, context=context)


@functools.cache
def _programs(student: Programs, network: Network) -> Programs:
    return dataclasses.replace(student, network=network)


@functools.cache
def _make_update(programs, optimizer, loss_name: str, num_student: int):
    def loss(params: Params, frozen: Params, batch):
        prompts, responses, micro_batches = batch
        logits = _logits(programs, params, frozen, prompts, responses)
        student, teacher = logits[:, :num_student], logits[:, num_student:]
        if loss_name == "gail":
            value = objectives.discriminator_loss(student, teacher)
            accuracy = objectives.discriminator_accuracy(student, teacher)
        else:
            value = objectives.gad_pair_loss(student, teacher)
            accuracy = (teacher > student).mean()
        # Micro-batches are of one size, so the mean over all is the sum of their means over their number.
        return value / micro_batches, {"accuracy": accuracy / micro_batches}

    return make_update(loss, optimizer)


@functools.cache
def _make_logits(programs):
    def logits(params: Params, frozen: Params, batch: tuple[PromptBatch, ResponseBatch]):
        return jax.lax.map(lambda micro: _logits(programs, params, frozen, *micro), batch)

    return jax.jit(logits)


def _logits(programs, params: Params, frozen: Params, prompts: PromptBatch, responses: ResponseBatch):
    params = cast(params | frozen, programs.dtype)
    features = None
    if prompts.vision is not None:
        model = programs.network.bind(params)
        features = model.encode(prompts.vision, dtype=programs.dtype, unroll=programs.unroll)
    return programs.logits_of_responses(params, prompts._replace(vision=None), responses, features)
