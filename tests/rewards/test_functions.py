"""Users' reward functions: loaded by path, given what they ask for, and held to one finite number a completion."""

import asyncio
import math
import textwrap

import numpy as np
import pytest

from ril_jax.errors import InputError
from ril_jax.rewards.functions import RewardFunction, load_reward_function, load_reward_functions

BATCH = {"prompts": ["p", "q"], "completions": ["a", "bb"], "solutions": ["a", "b"]}


def write(folder, name, source):
    path = folder / name
    path.write_text(textwrap.dedent(source))
    return path


def run(function, **more):
    return RewardFunction(function, "mine.f")(**{**BATCH, **more})


def test_function_is_loaded_from_a_file_and_from_a_module(tmp_path, monkeypatch):
    source = "def length(completions): return [len(c) for c in completions]\n"
    file = write(tmp_path, "rewards_of_mine.py", source)
    (tmp_path / "my_package_xyz").mkdir()
    write(tmp_path / "my_package_xyz", "inner.py", source)
    monkeypatch.syspath_prepend(str(tmp_path))
    for path in (f"{file}:length", "rewards_of_mine.length", "my_package_xyz.inner.length"):
        function = load_reward_function(path)
        assert function.name == "length"
        assert function(**BATCH) == [1.0, 2.0]


def test_two_files_of_one_name_stay_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = write(tmp_path / "a", "r.py", "def one(completions): return [1 for _ in completions]\n")
    two = write(tmp_path / "b", "r.py", "def two(completions): return [2 for _ in completions]\n")
    functions = load_reward_functions([f"{one}:one", f"{two}:two"])
    assert [f(**BATCH) for f in functions] == [[1.0, 1.0], [2.0, 2.0]]


def test_function_gets_only_what_it_names():
    def reward(completions, solutions, level, weight=2.0):
        return [weight * (c == s) + n for c, s, n in zip(completions, solutions, level, strict=True)]

    assert run(reward, columns={"level": [0, 10], "unused": [1, 2]}) == [2.0, 10.0]


def test_function_with_kwargs_gets_everything():
    seen = {}

    def reward(completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(completions)

    run(reward, columns={"level": (0, 10)})
    assert seen == {"prompts": ["p", "q"], "solutions": ["a", "b"], "solution": ["a", "b"], "level": [0, 10]}


def test_solution_column_has_its_singular_name_too():
    def accuracy(completions, solution):
        return [float(c == s) for c, s in zip(completions, solution, strict=True)]

    assert run(accuracy) == [1.0, 0.0]


def test_a_function_cannot_change_the_lists_of_the_next_one():
    completions = ["a", "bb"]

    def greedy(completions):
        completions.clear()
        return [1, 1]

    run(greedy, completions=completions)
    assert completions == ["a", "bb"]


def test_async_functions_run_also_inside_a_running_loop():
    async def reward(completions):
        await asyncio.sleep(0)
        return [len(c) for c in completions]

    async def notebook_cell():
        return run(reward)

    assert run(reward) == [1.0, 2.0]
    assert asyncio.run(notebook_cell()) == [1.0, 2.0]


@pytest.mark.parametrize(
    "given", [[1, None], (True, None), np.array([1.0, np.e]), [np.float32(1), None], iter([1.0, 0.5])]
)
def test_numbers_of_every_kind_and_none_become_floats_and_none(given):
    rewards = run(lambda completions: given)
    assert rewards[0] == 1.0
    assert all(r is None or type(r) is float for r in rewards)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "1 rewards for 2 completions"),
        ([1.0, 2.0, 3.0], "3 rewards for 2"),
        ([1.0, math.nan], "nan for completion 1"),
        ([math.inf, 1.0], "inf for completion 0"),
        ([1.0, "1"], "'1' for completion 1"),
        ([[1.0], 2.0], "for completion 0"),
        (np.ones((2, 2)), "for completion 0"),
        ("ab", "gave a str"),
        (1.0, "gave a float"),
        (None, "gave a NoneType"),
        ({"a": 1, "b": 2}, "gave a dict"),
    ],
)
def test_anything_but_one_finite_number_a_completion_is_refused(given, message):
    with pytest.raises(InputError, match=message) as error:
        run(lambda completions: given)
    assert "mine.f" in str(error.value)


def test_missing_columns_clashes_and_wrong_lengths_are_named():
    with pytest.raises(InputError, match=r"wants 'level'.*there are prompts, completions, solutions, solution, kind"):
        run(lambda completions, level: [0, 0], columns={"kind": [1, 2]})
    with pytest.raises(InputError, match="'completions' has the name"):
        run(lambda completions: [0, 0], columns={"completions": [1, 2]})
    with pytest.raises(InputError, match="'kind' has 1 values for 2"):
        run(lambda completions: [0, 0], columns={"kind": [1]})
    with pytest.raises(InputError, match="keyword"):
        RewardFunction(lambda completions, /: [0, 0], "mine.f")


def test_an_error_inside_the_function_tells_its_line(tmp_path):
    file = write(
        tmp_path,
        "broken.py",
        """\
        def reward(completions):
            return divide(completions)

        def divide(completions):
            return 1 / 0
        """,
    )
    with pytest.raises(InputError, match=r"ZeroDivisionError: division by zero \(.*broken\.py, line 5\)"):
        load_reward_function(f"{file}:reward")(**BATCH)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("length", "package.module.function"),
        ("module:length", "package.module.function"),
        ("", "package.module.function"),
        ("no_such_package_xyz.length", "no module 'no_such_package_xyz'"),
        ("no/such/file.py:length", "there is no file no/such/file.py"),
        ("math.no_such_function", "no 'no_such_function' in math"),
        ("math.pi", "is a float, not a function"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(path, message):
    with pytest.raises(InputError, match=message):
        load_reward_function(path)


def test_a_file_that_does_not_run_is_named_with_the_line(tmp_path):
    file = write(tmp_path, "r.py", "import math\nimport no_such_package_xyz\n")
    with pytest.raises(InputError, match=r"No module named 'no_such_package_xyz' \(.*r\.py, line 2\)"):
        load_reward_function(f"{file}:f")
    file.write_text("def f(:\n")
    with pytest.raises(InputError, match="SyntaxError"):
        load_reward_function(f"{file}:f")
    file.write_text("def f(completions): return [1, 2]  # mended, as in a notebook that goes on\n")
    assert load_reward_function(f"{file}:f")(**BATCH) == [1.0, 2.0]


def test_two_functions_of_one_name_are_refused(tmp_path):
    files = [write(tmp_path, name, "def f(completions): return [0, 0]\n") for name in ("one.py", "two.py")]
    with pytest.raises(InputError, match="both named f"):
        load_reward_functions([f"{file}:f" for file in files])
