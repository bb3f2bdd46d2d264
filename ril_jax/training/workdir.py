"""A folder belongs to one config."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ril_jax import processes
from ril_jax.errors import InputError
from ril_jax.files import differing_fields, write_atomically

logger = logging.getLogger("ril_jax.checkpoints")


def claim_folder(folder: str | os.PathLike[str], fingerprint: Mapping[str, Any], *, allow_change: bool = False) -> None:
    """Write `fingerprint` (config fields that define a run) to folder/config.json, or compare it with that file.

    Raises InputError listing the fields that differ; with `allow_change` they are logged, the old file is kept as
    config.N.json and the new one takes its place.
    """
    folder = Path(folder).absolute()
    path = folder / "config.json"
    ours = json.loads(json.dumps(fingerprint, default=str))
    if not processes.is_first():
        return
    if path.exists():
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(
                f"{path} is not valid JSON ({error}); choose another --workdir or delete the file"
            ) from error
        differing = differing_fields(theirs, ours)
        if not differing:
            return
        if not allow_change:
            raise InputError(
                f"{folder} belongs to a run of another config: {'; '.join(differing)}; choose another --workdir, or go "
                "on with the new values by --config.allow_config_change=true"
            )
        logger.warning("config of %s changed: %s", folder, "; ".join(differing))
        number = len(list(folder.glob("config.*.json")))
        path.rename(folder / f"config.{number}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(ours, indent=2, sort_keys=True) + "\n").encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another --workdir") from error
