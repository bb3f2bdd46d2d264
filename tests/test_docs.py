"""Claims about what users read: the docs name every config field and nothing that is not there."""

import json
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from ril_jax import cli
from ril_jax import config as config_lib

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "launch" / "README.md",
]
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
# Sections of several stages or models are told once, under the name of the first.
TOLD_AS = {"discriminator": "sft", "ril": "sft"}


def test_every_config_field_is_told():
    training = set(config_lib.training(batch_size=1, steps=1, learning_rate=1.0, final_learning_rate=1.0))
    wanted = set()
    for name in fields(config_lib.default_config()):
        section, _, leaf = name.partition(".")
        if ".engine." in name:  # every engine has the same fields
            wanted |= {name[: name.index(".engine.")] + ".engine", name[name.index("engine.") :]}
            continue
        wanted.add(f"{TOLD_AS[section]}.{leaf}" if section in TOLD_AS and leaf in training else name)
    config_lib.add_teacher(teachers := config_lib.default_config(), "t", "")
    assert set(teachers.teachers.t) == set(teachers.student)  # a teacher's fields are told as the student's
    assert sorted(wanted - told()) == []


def test_every_serving_field_is_told():
    assert sorted(set(fields(config_lib.serving_config())) - told()) == []


def test_no_field_is_told_that_is_not_there():
    known = set(fields(config_lib.default_config())) | set(fields(config_lib.serving_config())) | {"prepare.models"}
    known |= {name[: name.index(".engine.")] + ".engine" for name in known if ".engine." in name}
    assert sorted(told() - known) == []


def test_made_models_and_phases_are_told():
    made = config_lib.made_model()
    phase = config_lib.phase("X", num_examples=1, batch_size=1, steps=1, learning_rate=1.0, final_learning_rate=1.0)
    words = set(re.findall(r"`(\w+)`", CONFIGURATION)) | {name.partition(".")[2] for name in told()}
    assert sorted((set(made) | set(phase)) - words) == []


@pytest.mark.parametrize("arm", config_lib.ARMS)
def test_every_arm_is_told(arm):
    assert f"| `{arm}` |" in CONFIGURATION


def test_told_defaults_are_the_defaults():
    """Of plain values; those that are told in words, or for several stages at once, are left to the reader."""
    values = fields(config_lib.serving_config()) | fields(config_lib.default_config())
    for name, text in re.findall(r"^\| `([\w.]+)` \| ([^|]+?) \|", CONFIGURATION, re.MULTILINE):
        text = text.strip("`")
        if name in values and re.fullmatch(r"-?\d*\.?\d*(e-?\d+)?(?<=\d)|True|False|None|\([\d, ]*\)", text):
            assert values[name] == eval(text, {}), f"{name} is {values[name]!r}, and told as {text}"
        elif name in values and isinstance(values[name], str) and " " not in text:
            assert values[name] == text.strip('"'), f"{name} is {values[name]!r}, and told as {text}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_are_there(page):
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:ril_jax|configs|docs|launch|notebooks|tests|benchmarks)/[\w./-]+\.\w+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_modules_and_fields_that_are_there(page):
    text = page.read_text()
    modules = set(re.findall(r"python -m (ril_jax[\w.]*)", text))
    folder = lambda module: ROOT.joinpath(*module.split("."))  # noqa: E731
    assert [m for m in modules if not folder(m).with_suffix(".py").exists() and not folder(m).is_dir()] == []
    known = fields(config_lib.default_config()) | fields(config_lib.serving_config())
    used = set(re.findall(r"--config\.([a-z_.]+[a-z_])", text))
    assert sorted(name for name in used if name not in known) == []


def test_notebook_is_valid_and_its_code_compiles():
    """Structure after the nbformat 4.5 schema: what Jupyter and Colab refuse a notebook for."""
    notebook = json.loads((ROOT / "notebooks" / "tiny_ril.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        required = {"cell_type", "id", "metadata", "source"}
        code = cell["cell_type"] == "code"
        assert set(cell) == required | ({"execution_count", "outputs"} if code else set())
        assert all(isinstance(line, str) for line in cell["source"])
        if code:
            assert (cell["execution_count"], cell["outputs"]) == (None, []), "commit the notebook without outputs"
            compile("".join(cell["source"]), cell["id"], "exec")


def test_notebook_shortens_every_stage():
    """Its `steps_of`, run as it stands, finds the steps of all stages and of all made models."""
    notebook = json.loads((ROOT / "notebooks" / "tiny_ril.ipynb").read_text())
    source = next(text for cell in notebook["cells"] if "def steps_of" in (text := "".join(cell["source"])))
    definition = source[source.index("def steps_of") : source.index("steps = ")]
    exec(definition, scope := {})
    config = cli.load_config(str(ROOT / "configs" / "tiny.py"))
    found = scope["steps_of"](config)
    assert found == {name: value for name, value in fields(config).items() if name.endswith(".steps")}
    assert {"sft.steps", "discriminator.steps", "ril.steps"} < set(found)


def told() -> set[str]:
    """Dotted names in the first column of the tables."""
    names = set()
    for cell in re.findall(r"^\| (`[^|]+`) \|", CONFIGURATION, re.MULTILINE):
        names |= set(re.findall(r"`([\w.]+)`", cell))
    return {name for name in names if name not in config_lib.ARMS}


def fields(config: ConfigDict, prefix: str = "") -> dict:
    """Dotted names of all leaves with their values."""
    leaves = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            leaves |= fields(value, f"{prefix}{key}.")
        elif not isinstance(value, ConfigDict):
            leaves[prefix + key] = value
    return leaves
