"""What tells one checkpoint from another, wherever it lies: a digest of what its folder holds."""

import hashlib
from pathlib import Path

_ENDS = 1 << 16
# Besides the weights: what decides how a model reads and answers.
_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.json",
    "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def checkpoint_digest(folder: str | Path) -> str:
    """16 hex digits: of small files their content; of weights their names, sizes, and first and last 64 KiB.

    A file of weights begins with the table of its tensors. Reading all of a large model would take minutes, and no
    training leaves both ends of every file as they were.
    """
    folder = Path(folder)
    state = hashlib.blake2b(digest_size=8)
    paths = [folder / name for name in _FILES if (folder / name).is_file()]
    for path in [*paths, *sorted(folder.glob("*.safetensors"))]:
        state.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        if path.suffix == ".safetensors":
            state.update(file_ends(path, _ENDS))
        else:
            state.update(path.read_bytes())
    return state.hexdigest()


def file_ends(path: Path, size: int) -> bytes:
    """The first and the last `size` bytes of a file."""
    with path.open("rb") as file:
        first = file.read(size)
        file.seek(max(path.stat().st_size - size, len(first)))
        return first + file.read(size)
