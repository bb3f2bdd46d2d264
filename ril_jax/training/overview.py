"""What a person reads: the plan of a run before it starts, and its summary at the end."""

import math
from typing import Any

import jax
import numpy as np

from ril_jax import config as config_lib
from ril_jax import processes
from ril_jax.progress import duration
from ril_jax.training.run import Run
from ril_jax.training.state import split_frozen

__all__ = ["announce", "describe_start", "duration", "summarise"]


def describe_start(run: Run) -> str:
    """The resolved config, the devices, and the batch arithmetic; what needs the student's files comes with a stage."""
    c = run.config
    device = jax.devices()[0]
    shape = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    lines = [
        "config",
        *(f"  {line}" for line in _fields(c.to_dict())),
        f"devices: {jax.device_count()} x {device.device_kind} ({device.platform}), {processes.count()} processes; "
        f"mesh {shape}",
        f"workdir: {run.workdir}",
        f"stages: {', '.join(config_lib.stages(c))}"
        + (f"; arms of ril: {', '.join(config_lib.arms(c))}" if c.arms else ""),
        *_batch_arithmetic(run),
    ]
    return "\n".join(lines)


def announce(run: Run, label: str) -> None:
    """Print what a stage is about to do: parameters, programs and memory for the stages that train the student."""
    processes.say(f"\n== {label} ==")
    if label == "sft" or label.startswith("ril/"):
        processes.say("\n".join(_model_lines(run, label)))


def summarise(run: Run) -> dict[str, Any]:
    """The run's summary: held-out accuracy of the student before RIL and after each arm that is done."""
    arms: dict[str, Any] = {}
    if (
        run.is_done("sft")
        and run.config.data.eval
        and any(run.is_done(f"ril/{a}") for a in config_lib.arms(run.config))
    ):
        arms["sft student"] = _sft_result(run)
    for arm in config_lib.arms(run.config):
        if run.is_done(f"ril/{arm}"):
            arms[arm] = run.result(f"ril/{arm}")
    return {"seed": run.config.seed, "arms": arms}


def _sft_result(run: Run) -> dict[str, Any]:
    from ril_jax.rewards.judge import RulesJudge
    from ril_jax.training.evaluation import evaluate

    if run.is_done("sft_eval"):
        return run.result("sft_eval")
    held_out = run.dataset("eval")
    count = run.config.eval.num_questions
    result = evaluate(run, run.pi_init(), held_out[:count] if count else held_out, RulesJudge())
    run.mark_done("sft_eval", result)
    return result


def _fields(value: Any, prefix: str = "") -> list[str]:
    if isinstance(value, dict) and value:
        return [
            line for key, child in value.items() for line in _fields(child, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [f"{prefix} = {value!r}"]


def _batch_arithmetic(run: Run) -> list[str]:
    c = run.config
    ril = c.ril
    rows = ril.num_generations + ril.num_teacher_generations
    micro = ril.micro_batch_size or ril.batch_size
    teachers = len(c.teachers) or 1
    return [
        "batch arithmetic of a RIL step:",
        f"  {ril.batch_size} questions x ({ril.num_generations} student + {ril.num_teacher_generations} teacher"
        f" responses from {len(c.teachers)} teachers, {ril.num_teacher_generations // teachers} each)"
        f" = {ril.batch_size * rows} responses",
        f"  {ril.batch_size // micro} micro-batches of {micro} questions; {ril.num_iterations} update(s) a batch (mu);"
        f" loss normaliser {rows} x {ril.batch_size} x {c.sampling.max_completion_length}"
        f" = {rows * ril.batch_size * c.sampling.max_completion_length}",
        f"  {ril.steps} steps see {ril.steps * ril.batch_size} questions",
    ]


def _model_lines(run: Run, label: str) -> list[str]:
    specs = run.student.network.specs
    sizes = {name: math.prod(spec.shape) for name, spec in specs.items()}
    vision = sum(size for name, size in sizes.items() if name.startswith("vision."))
    total = sum(sizes.values())
    settings = run.config.sft if label == "sft" else run.config.ril
    kept, _ = split_frozen(sizes, train_vision=settings.train_vision, train_projector=settings.train_projector)
    trained = sum(kept.values())
    lines = [
        f"student: {total:,} parameters ({vision:,} in the vision tower), {trained:,} of them trained; "
        f"compute in {run.config.student.dtype}, master weights and moments in float32"
    ]
    return lines + _program_lines(run, label) + _memory_lines(run, label, total, trained)


def _program_lines(run: Run, label: str) -> list[str]:
    b = run.buckets
    prompts, responses, rungs = len(b.prompts), len(b.responses), len(b.rungs)
    if label == "sft":
        return [
            f"programs to compile, at most: {prompts * responses * (rungs + 1)} updates "
            f"({prompts} prompt x {responses} response lengths x {rungs} image rungs and text only)"
        ]
    parts = {"encode": rungs, "sample": prompts * (rungs + 1), "update": prompts * responses * (rungs + 1)}
    if run.config.ril.beta:
        parts["reference log-probs"] = prompts * responses * (rungs + 1)
    if run.config.discriminator.enabled:
        per_d = len(run.config.discriminator.prompt_buckets) * responses
        parts |= {"discriminator update": per_d, "discriminator scores": per_d}
    return ["programs to compile, at most: " + ", ".join(f"{count} {name}" for name, count in parts.items())]


def _memory_lines(run: Run, label: str, total: int, trained: int) -> list[str]:
    """Bytes that stay on the devices through the stage; activations come on top."""
    width = np.dtype(run.config.student.dtype).itemsize
    parts = {"master weights": 4 * total, "moments": 8 * trained, "gradients": 4 * trained}
    if label != "sft":
        config = config_lib.arm_config(run.config, label.partition("/")[2])
        if width != 4:
            parts["compute copy"] = width * total
        if config.ril.beta:
            parts["reference"] = width * total
        if config.discriminator.enabled:
            parts["discriminator with moments and gradients"] = 16 * trained
        text = run.student.config.text
        rows = config.ril.batch_size * config.ril.num_generations
        tokens = config.ril.batch_size * max(run.buckets.prompts) + rows * config.sampling.max_completion_length
        parts["KV cache"] = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * width * tokens
    shards = run.mesh.shape["fsdp"] * run.mesh.shape["tensor"]
    sum_ = sum(parts.values())
    listed = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
    return [
        f"memory (estimate, without activations): {_bytes(sum_)} in all, {_bytes(sum_ / shards)} a device over "
        f"{shards} shard(s): {listed}"
    ]


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    raise AssertionError
