"""The embedded default's own stage: data, tokenizer, and models that other runs bring with them, made from a seed.

Leaves under workdir/prepare: `data/{sft,questions,eval}` (TFDS data sets), and one HF folder a model of
config.prepare.models. A model is trained from scratch, or on from another one, by the same supervised loop as SFT.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from ril_jax import processes, sharding
from ril_jax.data import synthetic
from ril_jax.data.records import Question, Response, write_dataset
from ril_jax.data.tiles import TileImageProcessor
from ril_jax.data.tiny_tokenizer import build_tokenizer
from ril_jax.errors import InputError
from ril_jax.models import hub, sizes
from ril_jax.models.config import InternVisionConfig, ModelConfig, QwenVisionConfig, TextConfig
from ril_jax.pretrained import Pretrained, make_network, save_folder
from ril_jax.rewards import discriminator
from ril_jax.training import workers
from ril_jax.training.run import Run
from ril_jax.training.sft import train_supervised
from ril_jax.training.state import fresh_params


def run_prepare(run: Run) -> None:
    """Make what is missing under workdir/prepare; models that do not build on each other side by side."""
    folder, models = run.workdir / "prepare", run.config.prepare.models
    processes.by_first(lambda: _write_data(run, folder / "data"), "prepared data")
    chains = _chains(models)
    count = workers.count(run, len(chains))
    if count > 1:

        def ready(chain: list[str]) -> Callable[[], bool]:
            base = models[chain[0]].base
            return lambda: not base or (folder / base / "config.json").exists()

        workers.run_tasks(run, {"prepare:" + "+".join(chain): ready(chain) for chain in chains}, processes=count)
    else:
        for name in (name for chain in chains for name in chain):
            run.stop_if_asked()
            make_model(run, name)
    run.mark_done("prepare", {"models": list(models)})


class SyntheticSource(Sequence):
    """Drawn examples as questions with responses in `manners`, or where there are none, in the one that was drawn."""

    def __init__(self, examples: Sequence[synthetic.SyntheticExample], manners: Sequence[str] = ()):
        self.examples, self.manners = examples, manners

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Question:  # type: ignore[override]  # one at a time, no slices
        return with_responses(self.examples[index], self.manners)


def with_responses(example: synthetic.SyntheticExample, manners: Sequence[str] = ()) -> Question:
    """The question of an example with its response, or with one in each of `manners`."""
    said = {manner: synthetic.STYLES[manner](example.scene, example.ask) for manner in manners}
    q, said = example.question, said or {example.style: example.response}
    responses = tuple(Response(manner, text, len(text.split()), "stop") for manner, text in said.items())
    return Question(q.id, q.prompt, q.images, q.solution, responses, q.extra)


def _write_data(run: Run, folder: Path) -> None:
    c, seed = run.config.prepare, run.config.seed
    draws = {
        "sft": lambda: map(with_responses, _mixture(c.sft_mixture).draw(seed, c.num_sft, split="sft")),
        "questions": lambda: (e.question for e in synthetic.RIL.draw(seed, c.num_questions, split="ril")),
        "eval": lambda: (e.question for e in synthetic.RIL.draw(seed, c.num_eval, split="test")),
    }
    for name, questions in draws.items():
        if not (folder / name).exists():
            write_dataset(folder / name, questions(), name=name)


def _chains(models: ConfigDict) -> list[list[str]]:
    """Models in chains, each on from the one before; a chain may begin where an earlier one has been."""
    chains: list[list[str]] = []
    left = list(models)
    while left:
        made = {name for chain in chains for name in chain}
        starts = [name for name in left if not models[name].base or models[name].base in made]
        if not starts:
            listed = ", ".join(f"{name} (base {models[name].base!r})" for name in left)
            raise InputError(f"config.prepare.models: the base of {listed} is not among the models")
        # New models first: the work that others wait for, then the longest.
        name = max(
            starts, key=lambda n: (not models[n].base, sum(m.base == n for m in models.values()), _work(models[n]))
        )
        chain = [name]
        left.remove(name)
        while heirs := [n for n in left if models[n].base == chain[-1]]:
            chain.append(max(heirs, key=lambda n: _work(models[n])))
            left.remove(chain[-1])
        chains.append(chain)
    return chains


def _work(model: ConfigDict) -> int:
    return sum(phase.steps * phase.batch_size * model.hidden_size for phase in model.phases.values())


def make_model(run: Run, name: str) -> None:
    """Train one model of config.prepare.models and leave it as an HF folder, unless it is there."""
    folder, settings = run.workdir / "prepare", run.config.prepare.models[name]
    if processes.decide((folder / name / "config.json").exists, f"is {name} made"):
        return
    label = f"prepare/{name}"
    start = _new_folder(run, folder, name, settings) if not settings.base else folder / settings.base
    model = Pretrained.open(start)
    programs = run.make_programs(model, run.config.student)
    shardings = sharding.param_shardings(model.network.specs, run.mesh)
    params = None
    for phase, training in settings.phases.items():
        examples = _mixture(training.mixture).draw(run.config.seed, training.num_examples, split=training.split)
        load = (
            (lambda p=params: p)
            if params is not None
            else lambda: hub.load_params(start, model.network, shardings=shardings)
        )
        params = train_supervised(
            run, f"{label}/{phase}", model, programs, load, SyntheticSource(examples, tuple(training.manners)), training
        )
    assert params is not None, f"config.prepare.models.{name} has no phases"
    save_folder(folder / name, model, params)


def _new_folder(run: Run, folder: Path, name: str, settings: ConfigDict) -> Path:
    """An HF folder with fresh weights and the tokenizer of the task, in the form of the model's family."""
    start = folder / f".{name}.start"
    processes.by_first(lambda: _write_around(start, settings), f"tokenizer of {name}")
    network = make_network(ModelConfig.from_folder(start))
    params = fresh_params(network, int(np.uint32(run.config.seed)), run.mesh, scheme="fan_in")
    hub.save_params(start, network, params, family=settings.family)
    processes.by_first(lambda: None, f"fresh weights of {name}")
    return start


def _write_around(start: Path, settings: ConfigDict) -> None:
    """All of the folder but the weights: tokenizer, image processor, config."""
    if start.exists():
        shutil.rmtree(start)
    texts = synthetic.vocabulary_texts(settings.vocabulary_seed)
    texts += [discriminator.SYSTEM, discriminator.OPTIONS, "<response>\n</response>"]
    texts += [discriminator.QUESTION, "\nsystem\nuser\nassistant\n"]
    # One cell of a picture is one tile, and so one token, as it is one token of Qwen2.5-VL.
    images = TileImageProcessor(tile_size=synthetic.CELL) if settings.family == "internvl" else None
    build_tokenizer(start, texts, images=images)
    vocab = {t["content"]: t["id"] for t in json.loads((start / "tokenizer.json").read_text())["added_tokens"]}
    config = _model_config(settings, vocab)
    ends = {"bos_token_id": None, "eos_token_id": vocab["<|im_end|>"], "pad_token_id": vocab["<|endoftext|>"]}
    raw = config.to_hf()
    raw |= ends | {"text_config": raw["text_config"] | ends}
    (start / "config.json").write_text(json.dumps(raw, indent=2))


def _model_config(settings: ConfigDict, special: dict[str, int]) -> ModelConfig:
    """The network of a made model; what its size leaves open is as in the family's released models."""
    s, tiled = settings, settings.family == "internvl"
    head_dim = s.hidden_size // s.num_heads
    text = TextConfig(
        vocab_size=-(-(max(special.values()) + 1) // 16) * 16,
        hidden_size=s.hidden_size,
        intermediate_size=s.intermediate_size,
        num_hidden_layers=s.num_layers,
        num_attention_heads=s.num_heads,
        num_key_value_heads=s.num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope_theta=s.rope_theta,
        mrope_section=None if tiled else (head_dim // 4, head_dim // 8, head_dim // 2 - head_dim // 4 - head_dim // 8),
        rope_dynamic_factor=2.0 if tiled else None,
        tie_word_embeddings=not tiled,
        max_position_embeddings=1024,
    )
    if tiled:
        size = sizes.INTERN_VIT[s.vision_kind]._replace(
            hidden_size=s.vision_hidden_size,
            intermediate_size=s.vision_intermediate_size,
            num_hidden_layers=s.vision_depth,
            num_attention_heads=s.vision_heads,
        )
        tile = (synthetic.CELL, synthetic.CELL)
        tower = InternVisionConfig(**size._asdict(), out_hidden_size=s.hidden_size, image_size=tile)
        return ModelConfig(
            "internvl", text, tower, image_token_id=special["<IMG_CONTEXT>"], vision_start_token_id=special["<img>"],
            vision_end_token_id=special["</img>"],
        )  # fmt: skip
    vision = QwenVisionConfig(
        depth=s.vision_depth,
        hidden_size=s.vision_hidden_size,
        intermediate_size=s.vision_intermediate_size,
        num_heads=s.vision_heads,
        out_hidden_size=s.hidden_size,
        fullatt_block_indexes=(s.vision_depth - 1,),
    )
    return ModelConfig(
        "qwen2_5_vl", text, vision, special["<|image_pad|>"], special["<|video_pad|>"], special["<|vision_start|>"],
        special["<|vision_end|>"],
    )  # fmt: skip


def _mixture(name: str) -> synthetic.Mixture:
    mixture = getattr(synthetic, name, None)
    if not isinstance(mixture, synthetic.Mixture):
        known = [key for key, value in vars(synthetic).items() if isinstance(value, synthetic.Mixture)]
        raise InputError(f"mixture {name!r} is not known; known are {', '.join(known)}")
    return mixture
