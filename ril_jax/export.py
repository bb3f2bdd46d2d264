"""Write a trained student as a Hugging Face folder, which transformers and vLLM load as it is.

    python -m ril_jax.export --checkpoint=DIR --output=HF_DIR [--dtype=bfloat16] [--overwrite]

`--checkpoint` is an HF folder (such as WORKDIR/ril/ril/model), a stage folder of a workdir, or a whole workdir (its
last arm).
"""

from pathlib import Path
from types import SimpleNamespace

from ril_jax import cli
from ril_jax.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")


def main(args: SimpleNamespace) -> int:
    export(args.checkpoint, args.output, dtype=args.dtype, overwrite=args.overwrite)
    print(f"wrote {args.output}")
    return 0


def export(checkpoint: str | Path, output: str | Path, *, dtype: str = "bfloat16", overwrite: bool = False) -> None:
    """Write the checkpoint in the hub layout with config, generation config, tokenizer and processor files.

    Raises InputError for a checkpoint without weights, an unknown dtype, or an output that is there already.
    """
    import jax.numpy as jnp

    from ril_jax.pretrained import Pretrained, save_folder
    from ril_jax.progress import of_bytes

    if dtype not in DTYPES:
        raise InputError(f"--dtype={dtype} is not known; use one of {', '.join(DTYPES)}")
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise InputError(f"--output={output} exists and is not empty; name another folder or add --overwrite")
        if not (output / "config.json").exists():
            raise InputError(f"--output={output} is not a model folder, so --overwrite does not replace it")
    model = Pretrained.open(model_folder(checkpoint))
    # From file to file: no parameter is on a device, and one tensor at a time on the host.
    save_folder(output, model, {}, dtype=jnp.dtype(dtype), progress=of_bytes("export"))


def model_folder(checkpoint: str | Path) -> Path:
    """The HF folder that `checkpoint` stands for. Raises InputError where there is none."""
    path = Path(checkpoint)
    if not path.is_dir():
        raise InputError(f"--checkpoint={checkpoint}: no such folder")
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        return path
    if (path / "model" / "config.json").exists():
        return path / "model"
    arms = sorted(path.glob("ril/*/model"), key=lambda p: p.stat().st_mtime)
    if arms:
        return arms[-1]
    if (path / "sft" / "model").is_dir():
        return path / "sft" / "model"
    raise InputError(
        f"--checkpoint={checkpoint}: no model in it; name a Hugging Face folder, a stage folder or a workdir"
    )


if __name__ == "__main__":
    cli.run(
        main,
        required=("checkpoint", "output"),
        flags=(
            cli.Flag("checkpoint", help="what to export"),
            cli.Flag("output", help="the folder to write"),
            cli.Flag("dtype", default="bfloat16", help="of the weights: " + ", ".join(DTYPES)),
            cli.Flag("overwrite", bool, False, help="replace a model folder that is there"),
        ),
    )
