"""Stage 4, the RIL loop: Algorithm 2 of the paper, line by line in `Ril.step`.

The baselines are the same loop by config: Dr.GRPO and GRPO have no teacher rows and no discriminator.
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ril_jax import objectives, processes, sharding
from ril_jax.config import arm_config
from ril_jax.data.packing import PromptBatch
from ril_jax.data.pipeline import make_iterator
from ril_jax.data.records import Question, Response
from ril_jax.errors import InputError
from ril_jax.models.parameters import Params, cast
from ril_jax.pretrained import save_folder
from ril_jax.progress import Progress
from ril_jax.rewards.judge import JudgeInterrupted, RulesJudge
from ril_jax.rewards.overlap import Verdicts
from ril_jax.sampling.gather import Result
from ril_jax.training import discriminator as discriminator_lib
from ril_jax.training.batches import flatten_features, flatten_micro, micro_rows, put
from ril_jax.training.best import BestModel
from ril_jax.training.collect import STUDENT, Subset, question_key, teacher_dataset
from ril_jax.training.evaluation import evaluate, held_out_questions
from ril_jax.training.metrics import Sample, SampleResponse, SampleTable
from ril_jax.training.rewards import RewardModel, Rewards, judge_items
from ril_jax.training.run import Run, Stopped
from ril_jax.training.sft import not_finite
from ril_jax.training.state import (
    TrainState,
    init_state,
    make_optimizer,
    make_update,
    split_frozen,
    split_micro,
)

T = TypeVar("T")


class RilState(NamedTuple):
    """Everything on the devices that training changes: student and discriminator (None where the arm has none)."""

    student: TrainState
    discriminator: TrainState | None


class Group(NamedTuple):
    """The G student responses and the teachers' responses of every question of a batch, student first.

    tokens, texts: B lists of S. models: S names a question. finished, sampled_logprobs: of the student's, [B, G(, R)].
    advantages: [B, S], once they are known.
    """

    tokens: list[list[np.ndarray]]
    texts: list[list[str]]
    models: list[list[str]]
    finished: np.ndarray
    sampled_logprobs: np.ndarray
    advantages: np.ndarray | None = None


class Ril:
    """One arm of the RIL stage."""

    def __init__(self, run: Run, arm: str):
        self.run, self.arm = run, arm
        self.config = arm_config(run.config, arm)
        c = self.config.ril
        self.G, self.num_teacher, self.B = c.num_generations, c.num_teacher_generations, c.batch_size
        self.micro = micro_rows(c.batch_size, c.micro_batch_size, run.buckets.shards)
        self.layout = run.buckets.layout(self.B, self.micro)  # of the rows of a batch that this process has
        self.L = self.config.sampling.max_completion_length
        self.sees_anew = c.train_vision or c.train_projector  # image features change with every update
        self.rewards = RewardModel(run, self.config)
        self.optimizer = _optimizer(_optimizer_settings(c))
        pi_init = run.pi_init()
        params, self.frozen = split_frozen(pi_init, train_vision=c.train_vision, train_projector=c.train_projector)
        # pi_ref is the second copy of the weights that Eq. 2 asks for; in the compute dtype, and not at all without KL.
        self.pi_ref = cast(pi_init, run.programs.dtype) if c.beta else None
        student = init_state({name: p.copy() for name, p in params.items()}, self.optimizer, run.mesh)
        self.discriminator = (
            discriminator_lib.Discriminator(run, self.config) if self.config.discriminator.enabled else None
        )
        state_d = None
        if self.discriminator is not None:
            d = self.config.discriminator
            self.d_optimizer = _optimizer(_optimizer_settings(d), d.ril_learning_rate)
            params_d, self.d_frozen = discriminator_lib.pretrained_params(run, self.discriminator)
            state_d = init_state(params_d, self.d_optimizer, run.mesh)
        self.state = RilState(student, state_d)
        self.update = _policy_update(
            run.programs, self.optimizer, self.G, c.epsilon, c.epsilon_high, c.beta, c.loss_type
        )

    # --- Algorithm 2 --------------------------------------------------------------------------------------------------

    def step(self, step: int, questions: Sequence[Question]) -> tuple[dict[str, float], Group, Rewards | None]:
        """One batch of questions: sample, draw, update D, reward, update pi. Returns metrics and what was seen.

        Of several processes each has its own rows of the batch (`layout`), and sees those; the metrics are of all.
        """
        run, mu = self.run, self.config.ril.num_iterations
        prompts = run.buckets.pack_prompts([run.encoder(q) for q in questions], batch=self.B, micro=self.micro)
        pi_old = run.for_sampling(self.state.student.params | self.frozen)
        run.expect(f"ril/{self.arm}/sample", prompts)
        vision = put(prompts.vision, run.mesh)
        features = run.programs.encode(pi_old, vision) if vision is not None else None
        prompts = prompts._replace(vision=None)

        with self.rewards.judging() as verdicts:  # whatever has its text is judged beside what follows
            # Sample G student responses per question from pi_old; draw as many cached teacher responses.
            places = self.layout.positions.tolist()
            drawn = [self.draw_teachers(step, b, q) for b, q in zip(places, questions, strict=True)]
            self.ask(verdicts, questions, [[r.text for r in row[: self.num_teacher]] for row in drawn])
            group = self.sample(step, questions, drawn, prompts, pi_old, features, verdicts)
            del pi_old  # in the compute dtype it is a copy, which the updates need not hold
            self.ask(verdicts, questions, [texts[: self.G] for texts in group.texts])
            metrics: dict[str, float] = {}

            # Repeat mu times: update D on these responses (Eq. 1). Then reward all with the updated D and the judge.
            logits = None
            if self.discriminator is not None:
                logits, d_metrics = self.discriminate(step, questions, group, mu)
                metrics |= d_metrics
            group = self.without_extra_teachers(group)
            rewards = self.reward(questions, group, logits, verdicts)
        seen, judge_metrics = self.seen_by_all(group, rewards, logits)
        if logits is not None and "discriminator/accuracy" not in metrics:
            student, teacher = seen["logits"][:, : self.G], seen["logits"][:, self.G :]
            metrics["discriminator/accuracy"] = float(objectives.discriminator_accuracy(student, teacher))
        advantages = np.asarray(objectives.group_advantages(seen["total"], scale=self.config.ril.scale_rewards))
        group = group._replace(advantages=advantages[self.layout.positions])

        # Repeat mu times: update pi on all of them (Eq. 2).
        metrics |= self.update_policy(step, prompts, vision, features, group)
        return metrics | self.group_metrics(seen) | judge_metrics, group, rewards

    def ask(self, verdicts: Verdicts | None, questions: Sequence[Question], responses: Sequence[Sequence[str]]) -> None:
        if verdicts is not None:
            verdicts.ask(judge_items(self.owned(questions), self.owned(responses)))

    def owned(self, rows: Sequence[T]) -> Sequence[T]:
        """Those of this process's rows for which it answers."""
        return [row for row, own in zip(rows, self.layout.owned, strict=True) if own]

    def reward(
        self, questions: Sequence[Question], group: Group, logits: np.ndarray | None, verdicts: Verdicts | None
    ) -> Rewards | None:
        """Rewards of the rows for which this process answers; None if there are none."""
        own = self.layout.owned
        if not own.any():
            return None
        logits = None if logits is None else logits[own, : len(group.texts[0])]
        return self.rewards(self.owned(questions), self.owned(group.texts), logits, verdicts)

    def seen_by_all(
        self, group: Group, rewards: Rewards | None, logits: np.ndarray | None
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """What metrics are made of, of all rows of the batch, and the judge's own metrics.

        `rewards` are those of this process's own rows; None if it has none.
        """
        own = self.layout.owned
        lengths = np.array([[len(t) for t in row[: self.G]] for row in group.tokens])
        mine = {"lengths": lengths[own], "finished": group.finished[own]}
        if logits is not None:
            mine["logits"] = logits[own]
        if rewards is not None:
            mine |= {"total": rewards.total} | {f"rewards/{name}": part for name, part in rewards.parts.items()}
        judge = self.rewards.judge.pop_metrics() if self.rewards.judge is not None else {}
        judged = (judge, 0 if rewards is None else rewards.total.size)
        positions = self.layout.positions[own]
        seen, judges = processes.gather_rows(mine, positions, self.B, "rewards of a batch", beside=judged)
        return seen, _judge_metrics(judges)

    def sample(
        self,
        step: int,
        questions: Sequence[Question],
        drawn: Sequence[Sequence[Response]],
        prompts: PromptBatch,
        pi_old: Params,
        features,
        verdicts: Verdicts | None = None,
    ) -> Group:
        """G student responses to every question, and beside them the teachers' that were drawn."""
        run = self.run
        places = self.layout.positions.tolist()
        keys = [question_key(run.config.seed, f"ril/{step}/{b}", q.id) for b, q in zip(places, questions, strict=True)]
        samples: Any
        asked: dict[str, Any] = dict(num_samples=self.G, max_tokens=self.L, sampling=run.sampling_params())
        engine = run.student_groups(pi_old, self.rewards.launching)
        if engine is not None:  # what has ended is judged beside what is still being sampled

            def ended(b: int, results: Sequence[Result]) -> None:
                if verdicts is not None:
                    verdicts.ask(judge_items([questions[b]], [[result.text for result in results]]))

            samples = engine(pi_old, [run.encoder(q) for q in questions], np.stack(keys), ended=ended, **asked)
        else:
            with self.rewards.launching():
                samples = run.sampler(
                    pi_old, put(flatten_micro(prompts, self.layout.groups), run.mesh, micro=False),
                    flatten_features(features), put(self.layout.flat(np.stack(keys)), run.mesh, micro=False),
                    **asked,
                )  # fmt: skip
            samples = sharding.own_rows(samples._replace(steps=None), run.mesh)
            samples = jax.tree.map(self.layout.in_order, samples)
        chat = run.student.chat
        tokens, texts, models = [], [], []
        for b, teachers in enumerate(drawn):
            own = [samples.token_ids[b, g][samples.mask[b, g]] for g in range(self.G)]
            tokens.append(
                own + [chat.encode_response(r.text, finished=r.finish_reason == "stop")[: self.L] for r in teachers]
            )
            texts.append([chat.decode(t) for t in own] + [r.text for r in teachers])
            models.append([STUDENT] * self.G + [r.model for r in teachers])
        return Group(tokens, texts, models, samples.finished, samples.logprobs)

    def draw_teachers(self, step: int, b: int, question: Question) -> list[Response]:
        """Cached teacher responses, drawn without replacement, the same number from every teacher, fresh each visit."""
        count = self.num_drawn
        if not count:
            return []
        names = list(self.config.teachers) or sorted({r.model for r in question.responses if r.model != STUDENT})
        generator = np.random.default_rng([self.run.config.seed, step, b])
        drawn = []
        for name in names:
            cached = [r for r in question.responses if r.model == name]
            if not cached:
                raise InputError(
                    f"question {question.id} has no cached response of teacher {name!r}; collect them first"
                )
            drawn += discriminator_lib.pick(cached, count // len(names), generator)
        return drawn

    @property
    def num_drawn(self) -> int:
        """Teacher responses drawn a question: those of the group, or those that only D learns from."""
        return self.num_teacher or (self.G if self.discriminator is not None else 0)

    def without_extra_teachers(self, group: Group) -> Group:
        """The group of Eq. 2; an arm without teacher rows has drawn them for D only."""
        keep = self.G + self.num_teacher
        cut = lambda rows: [row[:keep] for row in rows]  # noqa: E731
        return group._replace(tokens=cut(group.tokens), texts=cut(group.texts), models=cut(group.models))

    def discriminate(
        self, step: int, questions: Sequence[Question], group: Group, mu: int
    ) -> tuple[np.ndarray, dict[str, float]]:
        """mu updates of D on the group (none if it is frozen), then the logits [B, S] of the updated D."""
        discriminator, run = self.discriminator, self.run
        assert discriminator is not None
        assert self.state.discriminator is not None
        rows = [
            discriminator.prompts.rows(q, run.encoder(q), texts)
            for q, texts in zip(questions, group.texts, strict=True)
        ]
        wanted = self.config.discriminator.micro_batch_size
        micro = micro_rows(self.B, wanted if wanted and self.B % wanted == 0 else self.micro, run.buckets.shards)
        batch = put(discriminator.pack(rows, batch=self.B, micro=micro), run.mesh)
        run.expect(f"ril/{self.arm}/discriminator", batch)
        state, metrics = self.state.discriminator, {}
        if not self.config.discriminator.frozen:
            update = discriminator.make_update(self.d_optimizer, self.G)
            count = sharding.put(np.full((self.B // micro,), self.B // micro, np.float32), run.mesh)
            for _ in range(mu):
                with self.rewards.launching():
                    state, values = update(state, self.d_frozen, (*batch, count))
            values = {name: float(value) for name, value in jax.device_get(values).items()}
            if not values.pop("finite"):
                raise not_finite(run, f"ril/{self.arm}/discriminator", step, values, batch)
            metrics = {f"discriminator/{name}": value for name, value in values.items()}
        with self.rewards.launching():
            logits = discriminator.logits(state.params, self.d_frozen, batch)
        self.state = self.state._replace(discriminator=state)
        return sharding.own_rows(logits, run.mesh, axis=1).reshape(len(questions), -1), metrics

    def update_policy(self, step: int, prompts: PromptBatch, vision, features, group: Group) -> dict[str, float]:
        """mu updates of pi by Eq. 2 in the group-shared form."""
        run, c = self.run, self.config.ril
        responses = run.buckets.pack_responses(group.tokens, batch=self.B, micro=self.micro)
        mask = responses.mask
        if c.mask_truncated_completions:
            whole: np.ndarray = np.ones(mask.shape[:3], bool)
            whole[:, :, : self.G] = group.finished.reshape(whole.shape[0], -1, self.G)
            mask = mask & whole[..., None]
        sampled: np.ndarray = np.zeros((len(group.tokens), self.G, mask.shape[-1]), np.float32)
        width = min(self.L, mask.shape[-1])
        sampled[..., :width] = group.sampled_logprobs[..., :width]
        per_row = [split_micro(values, self.B // self.micro) for values in (sampled, group.advantages)]
        rows = put((prompts, responses, mask, *per_row), run.mesh)
        run.expect(f"ril/{self.arm}/update", rows, features)
        prompts, responses = rows[:2]
        ref = old = None
        if self.pi_ref is not None:
            moved = self.sees_anew and vision is not None  # then pi_ref sees with another tower than pi_old
            seen = run.programs.encode(self.pi_ref, vision) if moved else features
            ref, _ = run.programs.score(self.pi_ref, prompts, responses, seen)
        if c.num_iterations > 1:
            pi = self.state.student.params | self.frozen
            old, _ = run.programs.score(pi, prompts, responses, features)
        tower = vision if self.sees_anew else None  # what the update needs to encode the images itself
        normalizer = sharding.put(self.normalizer(mask.shape[0]), run.mesh)
        student = self.state.student
        for _ in range(c.num_iterations):
            batch = (*rows, features, tower, old, ref, normalizer)
            student, values = self.update(student, self.frozen, batch)
        self.state = self.state._replace(student=student)
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        if not values.pop("finite"):
            raise not_finite(run, f"ril/{self.arm}", step, values, {"rows": rows, "advantages": group.advantages})
        tokens = max(values.pop("tokens"), 1.0)
        student_tokens = max(values.pop("student_tokens"), 1.0)
        for name in ("entropy", "sampling/logp_difference_mean"):
            values[name] /= student_tokens
        for name in ("kl", "ratio_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"):
            if name in values:
                values[name] /= tokens
        return values | {"num_tokens": tokens}

    def normalizer(self, micro_batches: int) -> np.ndarray:
        """2G * B * L for Dr.GRPO, the number of rows for GRPO; one copy a micro-batch."""
        rows = self.B * (self.G + self.num_teacher)
        value = rows * self.L if self.config.ril.loss_type == "dr_grpo" else rows
        return np.full((micro_batches,), value, np.float32)

    # --- what is told of a step ---------------------------------------------------------------------------------------

    def group_metrics(self, seen: dict[str, np.ndarray]) -> dict[str, float]:
        """Metrics by the names of the field; rewards of student and teachers apart, completions of the student only."""
        G, total, lengths, finished = self.G, seen["total"], seen["lengths"], seen["finished"]
        metrics = {
            "reward": float(total[:, :G].mean()),
            "reward_std": float(total.std(axis=1).mean()),
            "frac_reward_zero_std": float((total.std(axis=1) == 0).mean()),
            "completions/mean_length": float(lengths.mean()),
            "completions/clipped_ratio": float(1.0 - finished.mean()),
            "completions/mean_terminated_length": float(lengths[finished].mean()) if finished.any() else 0.0,
        }
        for name, part in seen.items():
            if name.startswith("rewards/"):
                metrics[f"{name}/mean"] = _mean(part[:, :G])
                metrics[f"{name}/std"] = float(np.nanstd(part[:, :G])) if np.isfinite(part[:, :G]).any() else 0.0
                if part.shape[1] > G:
                    metrics[f"{name}/teacher_mean"] = _mean(part[:, G:])
        return metrics

    def sample_rows(self, questions: Sequence[Question], group: Group, rewards: Rewards) -> list[Sample]:
        """The first questions of a batch, for the table of samples."""
        assert group.advantages is not None
        similarity, answer = rewards.parts.get("similarity"), rewards.parts.get("answer")
        table = []
        for b, question in enumerate(questions[: self.config.ril.samples_count]):
            responses = [
                SampleResponse(
                    model=group.models[b][s],
                    text=group.texts[b][s],
                    similarity=None if similarity is None else float(similarity[b, s]),
                    answer=None if answer is None else float(answer[b, s]),
                    judge=rewards.explanations[b][s],
                    advantage=float(group.advantages[b, s]),
                )
                for s in range(len(group.texts[b]))
            ]
            table.append(Sample(question.id, question.prompt, question.solution, question.images, responses))
        return table


def run_ril(run: Run, arm: str) -> dict[str, Any]:
    """Train one arm; its student ends in workdir/ril/<arm>/model as an HF folder. Returns its held-out result."""
    label, config = f"ril/{arm}", run.config
    ril = Ril(run, arm)
    questions = _ril_questions(run, ril)
    held_out = held_out_questions(run)
    iterator = make_iterator(
        questions, batch_size=ril.B, rows=ril.layout.positions, seed=config.seed,
        transform=lambda q: (run.encoder(q), q)[1],
        prefetch=config.data.prefetch, num_threads=config.data.threads,
    )  # fmt: skip
    checkpointer, metrics = run.checkpointer(label), run.metrics(label)
    best = BestModel(run.workdir / label, run.student) if held_out and config.eval.keep_best else None
    table = SampleTable(run.workdir, label, every=ril.config.ril.samples_every)
    restored = checkpointer.restore_latest(jax.tree.map(_abstract, ril.state))
    start = 0
    if restored is not None:
        ril.state, start = restored.arrays, restored.step
        iterator.set_state(restored.host["iterator"])
    metrics.rewind(start)
    table.rewind(start)
    steps = ril.config.ril.steps
    progress = Progress(label, steps, "steps", start=start, enabled=processes.is_first())
    for step in range(start + 1, steps + 1):
        batch, began = next(iterator), time.monotonic()
        try:
            values, group, rewards = ril.step(step, batch)
        except JudgeInterrupted:  # asked to stop while the judge was away: this step did not happen
            raise Stopped(run.stop.exit_status) from None
        values["step_time"] = time.monotonic() - began
        values["tokens_per_second"] = values["num_tokens"] / values["step_time"]
        if table.due(step) and rewards is not None:
            table.write(step, ril.sample_rows(batch, group, rewards))
        if held_out and config.eval.every and (step % config.eval.every == 0 and step < steps):
            with progress.pause("evaluation"), run.counter.expected():
                params = ril.state.student.params | ril.frozen
                values["eval/accuracy"] = evaluate(run, params, held_out, RulesJudge())["accuracy"]
                if best is not None:
                    best.offer(step, values["eval/accuracy"], params)
        run.counter.warm(label)
        metrics.write(step, values)
        progress.advance(1, {k: values[k] for k in _SHOWN if k in values})
        stopping = run.stop.should_stop()
        if checkpointer.due(step) or stopping or step == steps:
            with progress.pause("checkpoint"), run.counter.expected():
                metrics.flush()
                checkpointer.save(step, ril.state, {"iterator": iterator.get_state()}, force=True)
        if stopping and step < steps:
            checkpointer.close()
            raise Stopped(run.stop.exit_status)
    run.counter.cold()
    checkpointer.close()
    metrics.close()
    params = ril.state.student.params | ril.frozen
    result = {"steps": steps}
    if held_out:
        with progress.pause("evaluation"):
            result |= evaluate(run, params, held_out, RulesJudge())
            if best is not None:
                best.offer(steps, result["accuracy"], params)
                result |= best.facts()
    progress.close()
    run.timer.add(label, parts=progress.seconds())
    save_folder(run.workdir / label / "model", run.student, params)
    run.mark_done(label, result)
    return result


_OPTIMIZER_FIELDS = (
    "steps", "learning_rate", "final_learning_rate", "warmup_steps", "weight_decay", "max_grad_norm",
    "adam_b1", "adam_b2",
)  # fmt: skip
_SHOWN = ("reward", "rewards/similarity/mean", "rewards/answer/mean", "kl", "eval/accuracy")


def _ril_questions(run: Run, ril: Ril) -> Sequence[Question]:
    """The questions of RIL, with cached teacher responses where the arm needs them; truncated ones are left out."""
    if not ril.num_drawn:
        return run.dataset("questions")
    source = teacher_dataset(run)
    if not ril.config.ril.drop_truncated_teachers:
        return source
    mine = range(processes.index(), len(source), processes.count())
    whole = [i for i in mine if not _truncated(source[i], ril.config.teachers)]
    keep = sorted(i for found in processes.gather(whole, "questions without truncated responses") for i in found)
    if not keep:
        raise InputError(
            "every question has a truncated teacher response; raise config.sampling.max_completion_length or set "
            "config.ril.drop_truncated_teachers=False"
        )
    return Subset(source, keep)


def _truncated(question: Question, teachers: ConfigDict) -> bool:
    mine = [r for r in question.responses if r.model in teachers] if teachers else question.responses
    return any(r.finish_reason == "length" for r in mine if r.model != STUDENT)


@functools.cache
def _policy_update(programs, optimizer, num_student, epsilon, epsilon_high, beta, loss_type):
    """The jitted update of Eq. 2; shared by the arms that agree in these values."""

    def loss(params: Params, frozen: Params, micro):
        prompts, responses, mask, sampled, advantages, features, tower, old, ref, normalizer = micro
        params = cast(params | frozen, programs.dtype)
        if tower is not None:
            model = programs.network.bind(params)
            features = model.encode(tower, dtype=programs.dtype, remat=programs.remat, unroll=programs.unroll)
        new, entropy = programs.logprobs(params, prompts, responses, features)
        rows, R = new.shape[0] * new.shape[1], new.shape[2]
        flat: Callable[[Any], Any] = lambda a: None if a is None else a.reshape(rows, R)  # noqa: E731
        value, metrics = objectives.policy_loss(
            flat(new), flat(old), flat(ref), advantages.reshape(rows), flat(mask),
            epsilon=epsilon, epsilon_high=epsilon_high, beta=beta, normalizer=normalizer, loss_type=loss_type,
        )  # fmt: skip
        tokens = metrics.pop("num_tokens")
        sums = {name: mean * tokens for name, mean in metrics.items()}
        own = mask[:, :num_student]
        sums |= {"tokens": tokens, "student_tokens": jnp.sum(own, dtype=jnp.float32)}
        sums["entropy"] = jnp.sum(jnp.where(own, entropy[:, :num_student], 0.0))
        apart = jnp.abs((new if old is None else old)[:, :num_student] - sampled)  # sampler and trainer, one model
        sums["sampling/logp_difference_mean"] = jax.lax.stop_gradient(jnp.sum(jnp.where(own, apart, 0.0)))
        return value, sums

    return make_update(loss, optimizer)


def _optimizer_settings(stage: ConfigDict) -> str:
    """What `make_optimizer` reads, as JSON."""
    return json.dumps({name: stage[name] for name in _OPTIMIZER_FIELDS})


@functools.cache
def _optimizer(settings: str, learning_rate: float | None = None):
    """One object for equal settings (as JSON), so that arms share the programs that are compiled around it."""
    return make_optimizer(ConfigDict(json.loads(settings)), learning_rate=learning_rate)


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _judge_metrics(judges: Sequence[tuple[dict[str, float], int]]) -> dict[str, float]:
    """The metrics of one judge a process as those of one judge; each comes with the number of its verdicts."""
    total = max(sum(count for _, count in judges), 1)
    return {
        name: sum(values[name] * (count / total if name.endswith("_rate") else 1) for values, count in judges)
        for name in judges[0][0]
    }


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else 0.0
