"""Claims about the server as a process: what it says, when it answers, and how it ends."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from helpers import hf_models
from helpers.served import served_config
from helpers.small_run import environment
from helpers.tokenizer_folder import build_tokenizer_folder

from ril_jax import cli, serve
from ril_jax.errors import InputError

CONFIG = Path(__file__).parent / "helpers" / "served_config.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text model of one layer that reads long contexts."""
    folder = tmp_path_factory.mktemp("served_text")
    hf_models.save_qwen2(folder, vocab_size=294, num_hidden_layers=1, max_position_embeddings=4096)
    return build_tokenizer_folder(folder, vision=False, vocab_size=285)


def start(folder, *words):
    command = [sys.executable, "-m", "ril_jax.serve", f"--config={CONFIG}", f"--config.checkpoint={folder}", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def test_sigterm_lets_a_stream_end_and_takes_nothing_new(folder):
    """The whole life of a server: it answers at once that it loads, serves, and ends with 0 and nothing cut off."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start(folder, f"--port={port}")
    try:
        url, states = f"http://127.0.0.1:{port}", set()
        while "ready" not in states:
            assert process.poll() is None, process.communicate()
            try:
                response = httpx.get(f"{url}/ready")
                state = response.json()["status"]
                assert response.status_code == (200 if state == "ready" else 503)
                states.add(state)
                assert httpx.get(f"{url}/health").status_code == 200
            except httpx.ConnectError:
                assert not states  # once it is open it stays open
            time.sleep(0.1)
        assert states == {"loading", "ready"}

        tokens, tokens_after, last, sent = 0, 0, "", False
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1200, "stream": True, "ignore_eos": True, "logprobs": 0}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            assert response.status_code == 200
            for line in filter(None, response.iter_lines()):
                last = line
                if line.startswith("data: {"):
                    new = len(json.loads(line.removeprefix("data: "))["choices"][0]["logprobs"]["tokens"])
                    tokens += new
                    tokens_after += new if sent and _refuses(port) else 0
                if tokens >= 5 and not sent:
                    process.send_signal(signal.SIGTERM)
                    sent = True
        assert last == "data: [DONE]"
        assert tokens == 1200
        assert tokens_after > 0  # they came when nobody else could connect any more
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
    finally:
        process.kill()
    assert "Traceback" not in err
    assert re.search(r"program 1 of (\d+): .*\n", out)
    assert re.search(r"\d+ programs are compiled, .* after the start\nmemory: weights .*B, cache .*B", out)
    assert "serving tiny (qwen2, " in out
    assert f"at {url}/v1" in out
    assert "SIGTERM: no new requests" in out
    assert out.endswith("stopped\n")


def _refuses(port):
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) != 0


def test_a_signal_while_it_loads_ends_it_at_once(folder):
    process = start(folder, "--port=0")
    try:
        for line in process.stdout:
            if line.startswith("program"):
                break
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "stopped" in out
    assert "serving" not in out


def run_main(folder, *words, **changes):
    """`serve.main` up to the point where it would serve."""
    words = ["serve", f"--config={CONFIG}", f"--config.checkpoint={folder}", *words]
    flags = (cli.Flag("port", int, None),)
    args = cli.parse_arguments(words, required=("config",), flags=flags)
    return serve.main(args)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--config.server.api_key_env=NO_SUCH_KEY"], "names NO_SUCH_KEY, which is not set; export it"),
        (["--config.server.default_sampling=greedy"], "use openai or config"),
        (["--config.server.timeout=0"], r"config.server.timeout is 0(\.0)?; give a number above 0"),
        (["--config.server.host=256.1.1.1"], "cannot be listened on"),
        (["--port=99999"], "--port=99999: .* cannot be listened on"),
        (["--config.checkpoint="], "config.checkpoint is empty"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_loaded(folder, words, line):
    with pytest.raises(InputError, match=line):
        run_main(folder, *words)


def test_a_port_that_is_taken_is_told(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port={port}: 127.0.0.1:{port} cannot be listened on"):
            run_main(folder, f"--port={port}")


def test_a_config_of_another_kind_is_refused(folder, tmp_path):
    other = tmp_path / "training.py"
    other.write_text("from ril_jax.config import default_config\n\n\ndef get_config():\n    return default_config()\n")
    args = cli.parse_arguments(["serve", f"--config={other}"], required=("config",), flags=(cli.Flag("port", int),))
    with pytest.raises(InputError, match=r"it has no dtype; start from ril_jax.config.serving_config\(\)"):
        serve.main(args)


def test_a_checkpoint_that_cannot_be_loaded_ends_the_server(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        run_main(tmp_path, "--port=0")


@pytest.mark.parametrize(
    ("host", "key", "warned"), [("127.0.0.1", "", False), ("0.0.0.0", "", True), ("0.0.0.0", "KEY", False)]
)
def test_an_open_server_without_a_key_is_warned_of(tmp_path, capsys, monkeypatch, host, key, warned):
    monkeypatch.setenv("KEY", "secret")
    with pytest.raises(InputError):  # there is no checkpoint; the warning comes before
        run_main(tmp_path, "--port=0", f"--config.server.host={host}", f"--config.server.api_key_env={key}")
    err = capsys.readouterr().err
    assert ("warning: 0.0.0.0 is open to other machines, and no API key is asked for" in err) == warned
    assert err.count("\n") == warned


def test_the_failure_of_the_engine_ends_the_server_with_1(capsys):
    import asyncio
    from types import SimpleNamespace

    service = SimpleNamespace(failure="", app=None, close=lambda: None)
    server = serve._Server(service, served_config(Path("x")).server)
    asyncio.run(server._look())
    asyncio.run(server._look())
    assert not server.should_exit
    service.failure = "the engine has failed: the device is gone"
    asyncio.run(server._look())
    assert not server.should_exit  # those that wait are answered, and /health is seen
    asyncio.run(server._look())
    assert server.should_exit
    loader = SimpleNamespace(error=None, is_alive=lambda: False)
    assert serve._finish(service, loader) == 1
    assert capsys.readouterr().err == "error: the engine has failed: the device is gone\n"


@pytest.mark.parametrize(
    ("checkpoint", "name", "expected"),
    [
        ("{folder}", "", "{name}"),
        ("{folder}/", "", "{name}"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "", None),
        ("x", "y", "y"),
    ],
)
def test_the_name_of_the_model(folder, checkpoint, name, expected):
    config = served_config(Path(checkpoint.format(folder=folder)))
    config.checkpoint, config.server.model_name = checkpoint.format(folder=folder), name
    assert serve._model_name(config) == (expected or checkpoint).format(name=folder.name)


def test_sizes_are_said_with_three_digits():
    assert [serve._short(n) for n in (5, 1234, 7.6155e9, 2**40)] == ["5 ", "1.23 k", "7.62 G", "1.1 T"]
