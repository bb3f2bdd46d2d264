"""The state of one trained network, and the update program that every stage with an optimiser uses."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ril_jax import sharding
from ril_jax.models.parameters import Network, Params


class TrainState(NamedTuple):
    """Trained parameters (float32 masters), optimiser state, and the number of updates made ([] int32)."""

    params: Params
    opt: Any
    step: jax.Array


def make_optimizer(settings: ConfigDict, *, learning_rate: float | None = None) -> optax.GradientTransformation:
    """AdamW after clipping by global norm; the learning rate goes linearly to its final value.

    A `learning_rate` given here is constant (the RIL rates, ril_paper.md section 5).
    """
    first, last = settings.learning_rate, settings.final_learning_rate
    if learning_rate is not None:
        first = last = learning_rate
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.scale_by_adam(b1=settings.adam_b1, b2=settings.adam_b2),
        optax.add_decayed_weights(settings.weight_decay),
        scale_by_linear_schedule(first, last, warmup=settings.warmup_steps, steps=settings.steps),
    )


class LinearScheduleState(NamedTuple):
    """Updates made, and the schedule itself; all are arrays of shape []."""

    done: jax.Array
    first: jax.Array
    last: jax.Array
    warmup: jax.Array
    decay: jax.Array


def scale_by_linear_schedule(first: float, last: float, *, warmup: int, steps: int) -> optax.GradientTransformation:
    """Scale by minus the learning rate: linear warm-up to `first`, then linear to `last` at `steps`.

    The schedule is state and not a constant of the program, so stages that differ in it share one compiled update.
    """

    def init(params):
        del params
        values = (first, last, warmup, max(steps - warmup, 1))
        return LinearScheduleState(jnp.zeros((), jnp.int32), *(jnp.asarray(v, jnp.float32) for v in values))

    def update(updates, state, params=None):
        del params
        done = state.done.astype(jnp.float32)
        share = jnp.clip((done - state.warmup) / state.decay, 0.0, 1.0)
        rate = (state.first + share * (state.last - state.first)) * jnp.where(
            done < state.warmup, done / jnp.maximum(state.warmup, 1.0), 1.0
        )
        return jax.tree.map(lambda u: -rate * u, updates), state._replace(done=state.done + 1)

    return optax.GradientTransformation(init, update)


# What turns the tower's features into the decoder's: InternVL's projector, Qwen2.5-VL's merger.
_PROJECTOR = ("vision.projector_", "vision.merger_")
T = TypeVar("T")


def split_frozen(
    params: Mapping[str, T], *, train_vision: bool, train_projector: bool = False
) -> tuple[dict[str, T], dict[str, T]]:
    """(trained, frozen) of parameters by name; what is frozen carries no gradient and no optimiser state.

    With `train_vision` nothing is; without it the vision tower is, and its projector too unless `train_projector`.
    """

    def is_trained(name: str) -> bool:
        return not name.startswith("vision.") or train_vision or (train_projector and name.startswith(_PROJECTOR))

    trained = {name: value for name, value in params.items() if is_trained(name)}
    return trained, {name: value for name, value in params.items() if name not in trained}


def init_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh state around `params`; moments are sharded as their parameters."""
    opt = jax.jit(optimizer.init, out_shardings=opt_shardings(params, optimizer, mesh))(params)
    return TrainState(params, opt, sharding.put(jnp.int32(0), mesh))


def abstract_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`, for restoring a checkpoint."""
    shapes = jax.eval_shape(optimizer.init, params)
    opt = jax.tree.map(_with_sharding, shapes, opt_shardings(params, optimizer, mesh))
    abstract = {name: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding) for name, p in params.items()}
    step = _with_sharding(jax.ShapeDtypeStruct((), jnp.int32), sharding.replicated(mesh))
    return TrainState(abstract, opt, step)  # type: ignore[arg-type]  # shapes where the state has arrays


def opt_shardings(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Shardings of the optimiser state: a moment lies as its parameter does, everything else is replicated."""
    shapes = jax.eval_shape(optimizer.init, params)

    def of(path, leaf):
        name = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else None
        if name in params and leaf.shape == params[name].shape:
            return params[name].sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, shapes)


def make_update(
    loss_fn: Callable[[Params, Any, Any], tuple[jax.Array, Mapping[str, jax.Array]]],
    optimizer: optax.GradientTransformation,
    *,
    donate: bool = True,
):
    """A jitted update (state, shared, batch) -> (state, metrics) that sums gradients over micro-batches.

    Args:
      loss_fn: (params, shared, micro-batch) -> (loss, metrics). Loss and metrics are *sums* with constant normalisers
        applied, so that adding them over micro-batches gives what the whole batch would give.

    `shared` is passed whole (frozen parameters, image features), every leaf of `batch` has a leading micro-batch axis.
    Where loss or gradient norm is not finite the state stays as it was, and `metrics["finite"]` is 0.
    """

    def update(state: TrainState, shared, batch):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        count = jax.tree.leaves(batch)[0].shape[0]
        one = functools.partial(jax.tree.map, lambda a: a[0])
        if count == 1:
            (loss, sums), grads = grad_fn(state.params, shared, one(batch))
        else:
            shapes = jax.eval_shape(grad_fn, state.params, shared, one(batch))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

            def add(total, micro):
                return jax.tree.map(jnp.add, total, grad_fn(state.params, shared, micro)), None

            ((loss, sums), grads), _ = jax.lax.scan(add, zeros, batch)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def apply(operand):
            params, opt = operand
            updates, opt = optimizer.update(grads, opt, params)
            return optax.apply_updates(params, updates), opt

        params, opt = jax.lax.cond(finite, apply, lambda operand: operand, (state.params, state.opt))
        metrics = dict(sums) | {"loss": loss, "grad_norm": norm, "finite": finite.astype(jnp.float32)}
        return TrainState(params, opt, state.step + 1), metrics

    return Update(update, donate=donate)


class Update:
    """A jitted (state, shared, batch) -> (state, metrics) whose state stays where it is, on every mesh.

    Left to itself, XLA may give the new state other shardings than the old one had, and the next call compiles anew.
    """

    def __init__(self, function: Callable, *, donate: bool):
        self._function, self._donate = function, donate
        self._programs: dict[Any, Any] = {}

    def __call__(self, state: TrainState, shared: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        return self._program(state)(state, shared, batch)

    def trace(self, state: Any, shared: Any, batch: Any) -> Any:
        """As of a jitted function; the arguments may be abstract."""
        return self._program(state).trace(state, shared, batch)

    def _program(self, state: Any) -> Any:
        leaves, structure = jax.tree.flatten(state)
        where = tuple(getattr(leaf, "sharding", None) for leaf in leaves)
        if (structure, where) not in self._programs:
            self._programs[structure, where] = jax.jit(
                self._function,
                donate_argnums=(0,) if self._donate else (),
                out_shardings=(jax.tree.unflatten(structure, where), None),
            )
        return self._programs[structure, where]


def fresh_params(network: Network, seed: int, mesh: Mesh, *, scheme: str = "normal") -> Params:
    """Randomly initialised float32 parameters in their sharding; `scheme` as in `Network.init`."""
    shardings = sharding.param_shardings(network.specs, mesh)
    init = functools.partial(network.init, scheme=scheme)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def split_micro(tree: Any, count: int) -> Any:
    """Leaves [B, ...] as [count, B / count, ...]."""
    return jax.tree.map(lambda a: a.reshape(count, a.shape[0] // count, *a.shape[1:]), tree)


def _with_sharding(shape: jax.ShapeDtypeStruct, where) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
