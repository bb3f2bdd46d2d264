"""The config file of `small_run`, for runs that are started from a command line."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("small_run", Path(__file__).with_name("small_run.py"))
_small_run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_small_run)


def get_config():
    return _small_run.small_config()
