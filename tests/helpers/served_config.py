"""The config file of `served`, for servers that are started from a command line: long contexts, few programs."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("served", Path(__file__).with_name("served.py"))
_served = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_served)


def get_config(folder: str = ""):
    c = _served.served_config(folder)
    c.engine.max_model_len, c.engine.decode_steps, c.engine.slots = 2048, 1, 2
    return c
