"""The config file of `evaluated`, for evaluations that are started from a command line: of an endpoint."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("evaluated", Path(__file__).with_name("evaluated.py"))
_evaluated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_evaluated)


def get_config(url: str = ""):
    return _evaluated.evaluated_config(url=url)
