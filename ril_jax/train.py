"""Train a student by RIL: the stages sft -> collect -> discriminator -> ril, each resumable.

    python -m ril_jax.train --config=configs/qwen7b.py --workdir=DIR [--config.stages=ril] [--config.a.b=value]

Started again in the same workdir it goes on where it was; a stage that is done is not run again.
"""

import functools
import json
import os
import time
from types import SimpleNamespace

from ril_jax import cli, processes
from ril_jax import config as config_lib


def main(args: SimpleNamespace) -> int:
    from ril_jax.compilation import enable_persistent_cache
    from ril_jax.files import write_atomically
    from ril_jax.report import terminal_summary, write_report
    from ril_jax.training import overview
    from ril_jax.training.run import Run
    from ril_jax.training.stopping import StopSignal
    from ril_jax.training.workdir import claim_folder

    started = time.monotonic()
    config, workdir = args.config, args.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    if config.xla_flags:  # read when the backend starts, here and in worker processes
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {config.xla_flags}".strip()
    if config.logging.compile_cache:
        enable_persistent_cache()
    with StopSignal() as stop:
        run = Run.start(config, workdir, stop)
        with run.counter:  # however the run ends, it warns of no compilation after it
            claim = functools.partial(claim_folder, workdir, run.fingerprint(), allow_change=config.allow_config_change)
            processes.by_first(claim, "claim the workdir")
            processes.say(overview.describe_start(run))
            for stage in config_lib.stages(config):
                _run_stage(run, stage)
            summary = overview.summarise(run)
            if processes.is_first():
                write_atomically(workdir / "summary.json", json.dumps(summary, indent=2).encode())
                run.timer.save()
                page = write_report(workdir)
                print(terminal_summary(workdir))
                print(f"\nreport: {page}\nall of it took {overview.duration(time.monotonic() - started)}", flush=True)
    return 0


def _run_stage(run, stage: str) -> None:
    from ril_jax.training import overview
    from ril_jax.training.collect import run_collect
    from ril_jax.training.discriminator import run_discriminator
    from ril_jax.training.prepare import run_prepare
    from ril_jax.training.sft import run_sft

    if stage == "ril":
        _run_arms(run)
        return
    if run.is_done(stage):
        processes.say(f"{stage}: done before")
        return
    overview.announce(run, stage)
    runs = {"prepare": run_prepare, "sft": run_sft, "collect": run_collect, "discriminator": run_discriminator}
    with run.timer.stage(stage):
        runs[stage](run)


def _run_arms(run) -> None:
    from ril_jax.training import overview, workers
    from ril_jax.training.ril import run_ril

    todo = [arm for arm in config_lib.arms(run.config) if not run.is_done(f"ril/{arm}")]
    for arm in config_lib.arms(run.config):
        if arm not in todo:
            processes.say(f"ril/{arm}: done before")
    count = workers.count(run, len(todo))
    if count > 1:
        overview.announce(run, f"ril/{todo[0]}")
        with run.timer.stage("ril"):
            workers.run_tasks(run, {f"ril:{arm}": lambda: True for arm in todo}, processes=count)
        return
    for arm in todo:
        overview.announce(run, f"ril/{arm}")
        with run.timer.stage(f"ril/{arm}"):
            run_ril(run, arm)


if __name__ == "__main__":
    cli.run(main, processes=True)
