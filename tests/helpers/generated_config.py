"""The config file of `generated`, for jobs that are started from a command line."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("generated", Path(__file__).with_name("generated.py"))
_generated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_generated)


def get_config(folder: str = ""):
    return _generated.generated_config(folder)
