"""Claims about the launcher: what a user may write on the command line and what each mistake answers."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ril_jax import cli
from ril_jax.errors import InputError

CONFIG = """
from ml_collections import config_dict
def get_config(arg="plain"):
    if arg == "broken":
        raise RuntimeError("two\\nlines")
    c = config_dict.ConfigDict()
    c.arg = arg
    c.steps = 5
    c.ril = config_dict.ConfigDict(dict(learning_rate=1e-6, num_generations=8, scale="none", widths=(1, 2), on=True))
    c.limit = config_dict.placeholder(int)
    c.nothing = None
    c.names = ["a"]
    return c
"""

PROGRAM = """
import sys, time
from ril_jax import cli
from ril_jax.errors import InputError

def main(args):
    if args.mode == "input_error":
        raise InputError("row 7: image is corrupt;\\nremove it")
    if args.mode == "bug":
        raise KeyError("a bug")
    if args.mode == "sleep":
        print("ready", flush=True)
        time.sleep(60)
    print(args.config.to_json(), args.workdir, args.port)
    return 3 if args.mode == "three" else None

if __name__ == "__main__":
    cli.run(main, flags=[cli.Flag("mode", help="what to do"), cli.Flag("port", int, 80)])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.py").write_text(CONFIG)
    (folder / "program.py").write_text(PROGRAM)
    return folder


def start(folder, *words):
    return subprocess.run(
        [sys.executable, "program.py", *words], cwd=folder, capture_output=True, text=True, timeout=60
    )


def mistake(config, *words):
    with pytest.raises(InputError) as caught:
        cli.parse_arguments(["prog", f"--config={config}", "--workdir=w", *words])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config(folder):
    return str(folder / "small.py")


def test_main_receives_the_overridden_config_and_the_flags(folder):
    done = start(
        folder,
        "--config=small.py:big",
        "--workdir=out",
        "--port=9",
        "--config.ril.learning_rate=0.5",
        "--config.steps",
        "7",
    )
    assert done.returncode == 0, done.stderr
    assert '"learning_rate": 0.5' in done.stdout
    assert '"steps": 7' in done.stdout
    assert '"arg": "big"' in done.stdout
    assert done.stdout.strip().endswith("out 9")


def test_exit_status_is_what_main_returns(folder):
    assert start(folder, "--config=small.py", "--workdir=out", "--mode=three").returncode == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config=small.py", "--workdir=w", "--config.ril.lerning_rate=1"], "config.ril.learning_rate"),
        (["--config=small.py", "--workdir=w", "--mode=input_error"], "row 7: image is corrupt; remove it"),
        (["--config=small.py:broken", "--workdir=w"], "RuntimeError: two lines"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(folder, words, said):
    done = start(folder, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_bug_keeps_its_traceback(folder):
    done = start(folder, "--config=small.py", "--workdir=w", "--mode=bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a bug" in done.stderr


def test_ctrl_c_ends_with_130_and_no_traceback(folder):
    words = [sys.executable, "program.py", "--config=small.py", "--workdir=w", "--mode=sleep"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_help_lists_flags_and_the_fields_of_the_config(folder):
    done = start(folder, "--config=small.py", "--help")
    assert done.returncode == 0
    assert "--port" in done.stdout
    assert "what to do" in done.stdout
    assert "num_generations: 8" in done.stdout


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--config.ril.num_generation=4", "did you mean config.ril.num_generations?"),
        ("--config.learning_rate=4", "did you mean config.ril.learning_rate?"),
        ("--config.rl.scale=std", "did you mean config.ril.scale?"),
        ("--config.steps.x=1", "config.steps is a number and has no fields"),
        ("--wrkdir=x", "unknown flag --wrkdir; did you mean --workdir?"),
        ("--confg.steps=1", "unknown flag --confg.steps; did you mean --config.steps?"),
        ("--config.steps=many", "--config.steps=many"),
        ("--config.steps=1.5", "--config.steps=1.5"),
        ("--config.ril.learning_rate=fast", "--config.ril.learning_rate=fast"),
        ("--config.ril.on=perhaps", "--config.ril.on=perhaps"),
        ("--config.ril=5", "--config.ril=5"),
        ("--config.limit=x", "--config.limit=x"),
        ("--config.nothing=1", "config_dict.placeholder"),
        ("--config.names=(1,)", "make it a tuple"),
        ("stray", "unexpected word 'stray'"),
        ("--config=other.py", "--config is given 2 times"),
    ],
)
def test_mistakes_on_the_command_line_name_themselves_and_the_mend(config, word, said):
    assert said in mistake(config, word)


def test_values_take_the_type_of_their_field(config):
    loaded = cli.load_config(
        config, ["ril.widths=(3,4,5)", "ril.on=false", "limit=3", "ril.learning_rate=1", "steps=2"]
    )
    assert loaded.ril.widths == (3, 4, 5)
    assert loaded.ril.on is False
    assert loaded.limit == 3
    assert loaded.steps == 2
    assert isinstance(loaded.ril.learning_rate, float)


def test_a_loaded_config_refuses_new_fields(config):
    loaded = cli.load_config(config)
    with pytest.raises(AttributeError):
        loaded.fresh = 1


def test_two_configs_loaded_one_after_the_other_do_not_share_state(config):
    first = cli.load_config(config, ["steps=9"])
    assert cli.load_config(config).steps == 5
    assert first.steps == 9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config():\n  return 3\n", "returned int"),
        ("x = 1\n", "has no function get_config()"),
        ("def get_config(:\n", "line 1: SyntaxError"),
        ("def get_config():\n  return {}['a']\n", "line 2: KeyError: a"),
        ("import no_such_module\n", "No module named 'no_such_module'"),
        ("import sys\nsys.exit(0)\n", "line 2: SystemExit"),
    ],
)
def test_a_broken_config_file_is_named_with_its_line(tmp_path, text, said):
    path = tmp_path / "bad.py"
    path.write_text(text)
    message = mistake(path)
    assert said in message
    assert str(path) in message


def test_a_missing_config_file_is_named_with_the_nearest_one(config):
    assert "did you mean" in mistake(config.replace("small.py", "smal.py"))
    assert "there is no file" in mistake("/no/such/place.py")


def test_an_argument_for_a_config_without_one_is_refused(tmp_path):
    (tmp_path / "c.py").write_text("def get_config():\n  return {'a': 1}\n")
    assert "takes no argument" in mistake(f"{tmp_path / 'c.py'}:x")


def test_required_flags_are_asked_for(config):
    with pytest.raises(InputError, match="--workdir=DIR is missing"):
        cli.parse_arguments(["prog", f"--config={config}"])
    with pytest.raises(InputError, match="no --config=FILE is given"):
        cli.parse_arguments(["prog", "--workdir=w", "--config.steps=1"])
    assert cli.parse_arguments(["prog"], required=()).config is None


# --- libtpu without a TPU ---


def test_jax_looks_for_no_tpu_where_only_its_compiler_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("libtpu")
    env: dict[str, str] = {}
    assert cli.look_for_no_absent_tpu(env, tmp_path)
    assert env == {"JAX_PLATFORMS": "cpu"}
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert not cli.look_for_no_absent_tpu({}, tmp_path)


@pytest.mark.parametrize("device", ["accel0", "vfio/1", "nvidia0", "kfd"])
def test_an_accelerator_that_is_there_is_left_to_jax(tmp_path, device):
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    env: dict[str, str] = {}
    assert not cli.look_for_no_absent_tpu(env, tmp_path)
    assert env == {}


@pytest.mark.parametrize("name", ["JAX_PLATFORMS", "TPU_NAME"])
def test_a_platform_that_is_chosen_stays(tmp_path, name):
    env = {name: "tpu"}
    assert not cli.look_for_no_absent_tpu(env, tmp_path)
    assert env == {name: "tpu"}
