"""Claims about the plan: the real TPU compiler takes every program, and the counts behind the estimates are right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import hf_internvl, hf_models
from jax.sharding import NamedSharding, PartitionSpec

from ril_jax import config as config_lib
from ril_jax import sharding
from ril_jax.errors import InputError
from ril_jax.models import attention, paged, paged_writes
from ril_jax.models.config import ModelConfig
from ril_jax.planning.arguments import chip_bytes, model_config
from ril_jax.planning.chips import CHIPS, Topology
from ril_jax.planning.compiling import Compiled, Program, compile_program, low_effort
from ril_jax.planning.costs import flops
from ril_jax.planning.serving import ServingPlan
from ril_jax.planning.training import TrainingPlan
from ril_jax.sampling.logits import SamplingParams, filter_logits
from ril_jax.training.batches import micro_rows

pytest.importorskip("libtpu")


def test_flops_count_loops_as_often_as_they_run():
    a, b = jnp.ones((8, 16)), jnp.ones((16, 16))

    def scanned(x, w):
        y, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ w), (0, y))[1]

    one = 2 * 8 * 16 * 16
    assert flops(jax.make_jaxpr(scanned)(a, b), while_trips=3) == (5 + 3) * one
    checkpointed = jax.checkpoint(lambda x: jnp.tanh(x @ b) @ b)
    gradient = jax.make_jaxpr(jax.grad(lambda x: checkpointed(x).sum()))(a)
    assert flops(gradient) >= 4 * one  # two forward, and two for the gradient of x
    mesh = Topology.parse("v5e:2x2").mesh(data=1, fsdp=2, tensor=2)  # what lies over other axes is whole in the body
    for axes in ({"fsdp"}, {"data", "fsdp", "tensor"}):
        spec = PartitionSpec("fsdp")
        divided = jax.shard_map(
            lambda x: x @ b, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes, check_vma=False
        )
        twice = 2 if "tensor" in axes else 1  # every device of tensor does the same
        assert flops(jax.make_jaxpr(divided)(a)) == twice * one
    batched = jax.make_jaxpr(lambda x: jnp.einsum("bij,bjk->bik", x, x))(jnp.ones((3, 4, 4)))
    assert flops(batched) == 2 * 3 * 4 * 4 * 4


def test_micro_batches_spread_over_the_devices_where_they_can():
    assert micro_rows(144, 4, 1) == 4
    assert micro_rows(144, 4, 16) == 16
    assert micro_rows(144, 0, 8) == 144
    assert micro_rows(144, 5, 1) == 6
    assert micro_rows(144, 4, 64) == 4  # no number divides: every device has all rows


def test_released_models_are_known_by_name_and_others_refused(tiny_text):
    assert model_config("Qwen/Qwen2.5-VL-7B-Instruct") == ModelConfig.qwen2_5_vl("7b")
    assert model_config("OpenGVLab/InternVL3-78B-hf") == ModelConfig.internvl3("78b")
    assert model_config("Qwen/Qwen2.5-32B-Instruct") == ModelConfig.qwen2_5("32b")
    assert model_config(str(tiny_text.folder)) == ModelConfig.from_folder(tiny_text.folder)
    with pytest.raises(InputError, match="no folder and no released model"):
        model_config("someone/else")


@pytest.mark.parametrize("text", ["v5e", "v9:2x2", "v5e:2xb"])
def test_unknown_slices_are_refused(text):
    with pytest.raises(InputError, match="--topology"):
        Topology.parse(text)


def tiny_run(tmp_path, family):
    """The config of a run whose student is of `family`, with a teacher of the other."""
    hf_models.save_qwen2_5_vl(tmp_path / "qwen")
    hf_internvl.save_internvl(tmp_path / "internvl")
    c = config_lib.default_config()
    c.student.checkpoint = str(tmp_path / family)
    other = "internvl" if family == "qwen" else "qwen"
    config_lib.add_teacher(c, "big", str(tmp_path / other))
    c.sft.batch_size = c.ril.batch_size = c.discriminator.batch_size = 8
    c.collect.batch_size, c.collect.num_generations = 3, 2
    c.data.prompt_buckets, c.data.response_buckets, c.discriminator.prompt_buckets = (128,), (128,), (128,)
    c.data.max_pixels, c.data.max_tiles = 112 * 112, 1
    c.data.vision_rungs = ((128, 2, 64), (512, 8, 64), (4,), (16,))
    c.sampling.max_completion_length = 128
    return c


def plan_of(c):
    topology = Topology.parse("v5e:2x2")
    return TrainingPlan(c, topology, topology.mesh(data=1, fsdp=2, tensor=2)), topology


RIL = {"encode images", "sample", "reference log-probs", "discriminator update", "RIL update"}
COLLECT = {f"collect: {what} {who}" for what in ("encode images", "sample") for who in ("big", "student")}


@pytest.mark.parametrize("family", ["qwen", "internvl"])
def test_every_program_of_a_run_compiles_for_a_slice(family, tmp_path):
    c = tiny_run(tmp_path, family)
    c.sampling.layout = "tensor" if family == "qwen" else "training"
    c.collect.layout = "replicated" if family == "qwen" else "training"
    c.collect.student = family == "qwen"
    plan, topology = plan_of(c)
    names = set()
    for program in plan.all():
        compiled = compile_program(program, topology)
        assert compiled.fits, (program.name, compiled.error)
        assert compiled.flops > 0 or program.name == "move weights"
        assert compiled.peak > compiled.beside
        names.add(program.name)
    collect = COLLECT if family == "qwen" else {name for name in COLLECT if name.endswith("big")}
    assert names == RIL | collect | {"sft update"} | ({"move weights"} if family == "qwen" else set())


def test_the_collect_stage_is_planned_as_it_is_asked_for(tmp_path):
    c = tiny_run(tmp_path, "qwen")
    c.stages = "collect"
    programs = {p.name: p for p in plan_of(c)[0].all()}
    assert set(programs) == COLLECT
    assert all(p.beside == 0 for p in programs.values())  # neither the discriminator nor a reference is there yet
    sample = programs["collect: sample big"]
    assert sample.shapes == "4 prompts of 128, 2 x 128 tokens each"  # 3 questions, and a row for the other device
    assert sample.tokens == 4 * 2 * 128
    weights = lambda program: chip_bytes(  # noqa: E731
        {name: array for name, array in program.arguments[0].items() if name.startswith("text.")}
    )
    c.collect.layout = "replicated"
    moved = {p.name: p for p in plan_of(c)[0].all()}["collect: sample big"]
    assert weights(moved) > 1.5 * weights(sample)  # no longer over fsdp
    c.data.teacher_data = "responses"
    assert {p.name for p in plan_of(c)[0].all()} == {n for n in COLLECT if n.endswith("student")}
    c.collect.student = False
    with pytest.raises(InputError, match="no stage of it has a program"):
        plan_of(c)[0].all()


def test_responses_are_scored_by_whom_the_objective_asks(tmp_path):
    c = tiny_run(tmp_path, "qwen")
    c.stages, c.ril.num_iterations = "ril", 2
    programs = {p.name: p for p in plan_of(c)[0].all()}
    assert set(programs) == RIL | {"old log-probs"}
    kept = programs["encode images"].beside
    c.ril.beta, c.ril.num_iterations = 0.0, 1
    programs = {p.name: p for p in plan_of(c)[0].all()}
    assert set(programs) == RIL - {"reference log-probs"}
    assert programs["encode images"].beside < kept  # no reference


def test_the_engine_of_a_run_is_planned_where_it_samples(tmp_path):
    c = tiny_run(tmp_path, "qwen")
    c.sampling.backend, c.collect.layout, c.stages = "engine", "replicated", "collect,ril"
    c.sampling.engine.update({"slots": 4, "page_size": 16, "decode_steps": 2, "prefill": ((64, 2),)})
    c.sampling.engine.update({"attention_block": 64, "feature_rows": 512})
    plan, topology = plan_of(c)
    programs = {p.name: p for p in plan.all()}
    engine = {"encode an image", "prefill", "decode", "decode with filters"}
    ours = {f"collect: {name} {who}" for name in engine for who in ("big", "student")}
    assert set(programs) == (RIL - {"sample"}) | engine | ours
    assert programs["decode"].beside > 0 == programs["collect: decode student"].beside
    for name in ("collect: prefill big", "collect: decode big"):
        assert programs[name].mesh.shape == {"data": 2, "fsdp": 1, "tensor": 2}
        assert compile_program(programs[name], topology).fits


def test_arguments_that_a_program_does_not_read_lie_beside_it():
    topology = Topology.parse("v5e:2x2")
    mesh = topology.mesh(data=1, fsdp=4, tensor=1)
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    read, unread = (jax.ShapeDtypeStruct((n, 256), jnp.float32, sharding=where) for n in (1024, 4096))
    program = Program("p", "", jax.jit(lambda t: t["a"] @ t["a"].T), ({"a": read, "b": unread, "c": None},), beside=7)
    compiled = compile_program(program, topology)
    assert compiled.beside == 7 + 4 * 4096 * 256 / 4
    assert compiled.peak > compiled.beside


def test_every_program_of_the_engine_compiles_for_a_slice(tiny_vl):
    c = config_lib.serving_config()
    c.checkpoint = str(tiny_vl.folder)
    c.engine.update({"slots": 4, "small_slots": 0, "max_model_len": 512, "page_size": 16, "decode_steps": 2})
    c.engine.update({"prefill": ((64, 2),), "attention_block": 64, "feature_rows": 256})
    topology = Topology.parse("v6e:2x2")
    plan = ServingPlan(c, topology, topology.mesh(data=1, fsdp=1, tensor=-1))
    compiled = [compile_program(program, topology) for program in plan.all()]
    assert [c.program.name for c in compiled] == ["encode an image", "prefill", "decode", "decode with filters"]
    assert all(c.fits for c in compiled)


def compiled_for(mesh, function, *arguments):
    """`function` with gradients of its first three arguments; each argument is (shape, dtype, partition)."""
    abstract = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, PartitionSpec(*p))) for s, d, p in arguments]
    loss = jax.grad(lambda *a: jnp.sum(function(*a).astype(jnp.float32) ** 2), argnums=(0, 1, 2))
    return compile_program(Program("layer", "", jax.jit(loss), tuple(abstract)), Topology.parse("v5e:2x2"))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "tensor"),
    [(14, 2, 64, 2), (28, 4, 128, 2), (8, 2, 128, 4)],
    ids=["InternVL3-1B", "Qwen2.5-VL-7B", "a key-value head for two devices"],
)
def test_the_group_kernel_compiles_and_keeps_scores_on_the_chip(heads, kv_heads, width, tensor):
    mesh = Topology.parse("v5e:2x2").mesh(data=1, fsdp=4 // tensor, tensor=tensor)
    sharding.use(mesh)
    assert attention.backend() == "pallas"  # by the mesh of absent chips, on this machine without any
    P, S, R, B = 640, 4, 256, 2
    rows = ("data", "fsdp"), None
    at = "tensor" if kv_heads % tensor == 0 else None
    group = functools.partial(attention.group_attention, prompt_len=P, num_responses=S)
    shapes = [((B, P + S * R, n, width), jnp.bfloat16, (*rows, where)) for n, where in
              ((heads, "tensor"), (kv_heads, at), (kv_heads, at))]  # fmt: skip
    compiled = compiled_for(mesh, group, *shapes, ((B, P + S * R), jnp.bool_, rows))
    assert compiled.fits, compiled.error
    scores = 4 * B * heads * (P * P + S * R * (P + R)) / 4  # float32, a chip's share
    assert compiled.peak < scores
    # Two products forward and seven backward, in blocks of 128: 15 of the prompt, and for each half of a response 5 of
    # the prompt and 1 or 2 of its own; and the product of each output with its gradient. With a key-value head for
    # two devices too: a device counts its own query heads.
    blocks = 15 + S * (5 + 1 + 5 + 2)
    assert compiled.flops * 4 == 2 * width * B * heads * (9 * blocks * 128**2 + P + S * R)


def test_the_kernels_of_the_towers_compile():
    mesh = Topology.parse("v5e:2x2").mesh(data=1, fsdp=4, tensor=1)
    sharding.use(mesh)
    groups = (("data", "fsdp"),)
    over_groups = functools.partial(jax.vmap, spmd_axis_name=sharding.batch_axes(4))
    for heads, width in ((16, 64), (25, 128)):  # InternViT 300M and 6B
        tiles = ((4, 2, 1025, heads, width), jnp.bfloat16, groups)
        assert compiled_for(mesh, over_groups(attention.full_attention), tiles, tiles, tiles).fits
    X, M = 2048, 1024
    buffer = ((4, X, 16, 80), jnp.bfloat16, groups)
    tables = ((4, X // M, M), jnp.int32, groups), ((4, X), jnp.int32, groups)
    assert compiled_for(mesh, over_groups(attention.frame_attention), buffer, buffer, buffer, *tables).fits


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(14, 2, 64), (28, 4, 128)])
def test_the_paged_kernel_compiles_over_a_mesh(heads, kv_heads, width):
    topology = Topology.parse("v5e:2x2")
    mesh = topology.mesh(data=1, fsdp=2, tensor=2)
    sharding.use(mesh)
    text = dataclasses.replace(
        ModelConfig.qwen2_5("0.5b").text, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=width,
    )  # fmt: skip
    where = lambda *parts: NamedSharding(mesh, PartitionSpec(*parts))  # noqa: E731
    shape = paged.PagePool.shape(text, 64, 64)
    assert shape[-1] == 128
    pool = paged.PagePool(*[jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where("tensor"))] * 2)
    q = jax.ShapeDtypeStruct((8, 1, heads, 128), jnp.bfloat16, sharding=where())
    table, one = (jax.ShapeDtypeStruct(s, jnp.int32, sharding=where()) for s in ((8, 16), (8,)))
    at = jax.ShapeDtypeStruct((8, 1), jnp.int32, sharding=where())
    decode = jax.jit(functools.partial(paged.paged_attention, block=256))
    assert compile_program(Program("decode", "", decode, (q, pool, table, at, one)), topology).fits


@pytest.mark.parametrize(("tokens", "unit"), [(1, 1), (128, 64)], ids=["decode", "prefill"])
def test_pages_are_written_where_they_lie(tokens, unit):
    """Around a write and what reads it, of two heads a chip, the compiler keeps no second pool in another layout."""
    mesh = Topology.parse("v5e:2x2").mesh(data=1, fsdp=2, tensor=2)
    sharding.use(mesh)
    where = lambda *parts: NamedSharding(mesh, PartitionSpec(*parts))  # noqa: E731
    heads = jax.ShapeDtypeStruct((8, tokens, 4, 128), jnp.bfloat16, sharding=where(None, None, "tensor"))
    queries = jax.ShapeDtypeStruct((8, tokens, 16, 128), jnp.bfloat16, sharding=where(None, None, "tensor"))
    pool = paged.PagePool(
        *[jax.ShapeDtypeStruct((4, 4096, 64, 128), jnp.bfloat16, sharding=where("tensor"))] * 2
    )  # fmt: skip
    table, place, context = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where()) for shape in ((8, 16), (8, tokens), (8,))
    )

    def layers(q, k, pool, table, place, context):
        def layer(_, carry):
            q, pool = carry
            written = paged.PagePool(*paged_writes.write(pool, (k, k), place // 64, place % 64, unit=unit))
            return paged.paged_attention(q, written, table, place, context, block=256), written

        return jax.lax.fori_loop(0, 3, layer, (q, pool))

    compiled = (
        jax.jit(layers, donate_argnums=2)
        .trace(queries, heads, pool, table, place, context)
        .lower(lowering_platforms=("tpu",)).compile(low_effort())
    )  # fmt: skip
    assert compiled.memory_analysis().temp_size_in_bytes < chip_bytes(pool) / 2


def test_top_k_does_not_sort_the_vocabulary():
    mesh = Topology.parse("v5e:2x2").mesh(data=1, fsdp=2, tensor=2)
    logits = jax.ShapeDtypeStruct(
        (4, 4, 20_000), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor"))
    )
    filtered = jax.jit(lambda x: filter_logits(x, None, SamplingParams(top_k=50, top_p=0.95)))
    text = filtered.trace(logits).lower(lowering_platforms=("tpu",)).compile(low_effort()).as_text()
    assert 'custom_call_target="TopK"' in text
    assert not [line for line in text.splitlines() if " sort(" in line and ("20000" in line or "10000" in line)]


def test_what_does_not_fit_is_told_in_the_compilers_words():
    topology = Topology.parse("v5e:2x2")
    mesh = topology.mesh(data=1, fsdp=4, tensor=1)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    large = jax.ShapeDtypeStruct((40_000, 70_000), jnp.float32, sharding=whole)
    result = compile_program(Program("too large", "", jax.jit(lambda x: jnp.sort(x) + 1), (large,)), topology)
    assert not result.fits
    assert "memory" in result.error


def test_what_arguments_alone_do_not_fit_is_told_without_compiling():
    topology = Topology.parse("v6e:1x1")  # of one chip, as Colab lends them
    here = jax.sharding.SingleDeviceSharding(topology.mesh(data=1, fsdp=-1, tensor=1).devices.item())
    add = jax.jit(lambda x: x[:8] + 1)
    for gib, held in ((20, ""), (32, "what it reads and what lies beside it take 33.00 of 31.25 GiB")):
        large = jax.ShapeDtypeStruct((gib * 2**21, 128), jnp.float32, sharding=here)
        result = compile_program(Program("large", "", add, (large,), beside=2.0**30), topology)
        assert (result.error, result.fits) == (held, not held)


def test_the_floor_is_the_longest_part():
    chip = CHIPS["v5e"]
    program = Program(
        "p", "", jax.jit(lambda: 0), (), hbm_bytes=chip.hbm_bandwidth, network_bytes=chip.ici_bandwidth / 2
    )
    compiled = Compiled(program, Topology(chip, "4x4"), 0.0, 0.0, 3 * chip.flops)
    assert compiled.parts == {"compute": 3.0, "memory": 1.0, "network": 0.5}
    assert compiled.roofline == 3.0
    assert np.isclose(compiled.headroom, chip.hbm)
