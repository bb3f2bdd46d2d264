"""A training loop of a few numbers, as the stages have it, for runs of several processes.

python -m helpers.process_loop --workdir=DIR --steps=N [--pause=SECONDS] [--fail_at=STEP]

Writes workdir/losses.jsonl (the first process does), and workdir/read/<process> with the items that a process read.
"""

import json
import time
from pathlib import Path
from types import SimpleNamespace

from ril_jax import cli
from ril_jax.errors import InputError

BATCH, ITEMS, WIDTH = 8, 40, 16


class Items:
    """Rows of numbers; notes which ones are read."""

    def __init__(self, notes: Path):
        notes.parent.mkdir(parents=True, exist_ok=True)
        self._notes = notes.open("a")

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index):
        import numpy as np

        self._notes.write(f"{index}\n")
        self._notes.flush()
        return np.random.default_rng(int(index)).normal(size=WIDTH).astype(np.float32)


def main(args: SimpleNamespace) -> int | None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    from ril_jax import processes, sharding
    from ril_jax.data.pipeline import make_iterator
    from ril_jax.training.batches import put
    from ril_jax.training.checkpoints import Checkpointer
    from ril_jax.training.state import abstract_state, init_state, make_update
    from ril_jax.training.stopping import StopSignal

    workdir, losses = Path(args.workdir), Path(args.workdir) / "losses.jsonl"
    mesh = sharding.make_mesh()
    shards, mine = sharding.num_shards(mesh), sharding.part(mesh)
    held = range(shards) if mine is None else mine.held
    places = np.arange(BATCH).reshape(shards, -1)[list(held)].reshape(-1)
    kernel = jax.make_array_from_callback(
        (WIDTH, 4),
        NamedSharding(mesh, PartitionSpec("fsdp")),
        lambda index: np.full((WIDTH, 4), 0.1, np.float32)[index],
    )

    def loss(params, shared, batch):
        difference = batch @ params["kernel"] - batch[:, :4]
        return jnp.mean(difference**2), {}

    optimizer = optax.adam(0.01)
    params = {"kernel": kernel}
    update = make_update(loss, optimizer)
    with StopSignal() as stop:
        source = Items(workdir / "read" / str(processes.index()))
        iterator = make_iterator(source, batch_size=BATCH, rows=places, seed=3, prefetch=0)
        checkpointer = Checkpointer(workdir / "checkpoints", every=2)
        restored = checkpointer.restore_latest(abstract_state(params, optimizer, mesh))
        state, start = init_state(params, optimizer, mesh), 0
        if restored is not None:
            state, start = restored.arrays, restored.step
            iterator.set_state(restored.host["iterator"])
        for step in range(start + 1, args.steps + 1):
            batch = np.stack(next(iterator))
            if step == args.fail_at and processes.index() == 1:
                raise InputError("row 7 is corrupt; mend it")
            state, values = update(state, None, put(batch[None], mesh))
            if processes.is_first():
                with losses.open("a") as file:
                    file.write(json.dumps([step, float(values["loss"])]) + "\n")
            time.sleep(args.pause)
            stopping = stop.should_stop()
            if checkpointer.due(step) or stopping or step == args.steps:
                checkpointer.save(step, state, {"iterator": iterator.get_state()}, force=True)
            if stopping:
                checkpointer.close()
                return stop.exit_status
        checkpointer.close()
    return 0


if __name__ == "__main__":
    flags = (cli.Flag("steps", int, 6), cli.Flag("pause", float, 0.0), cli.Flag("fail_at", int, 0))
    cli.run(main, required=("workdir",), flags=flags, processes=True)
