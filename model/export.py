"""Export to Hugging Face's format, to llama.cpp's and to one whole checkpoint, and import from the first.

    python -m model.export --run out/small --to DIR           # for transformers
    python -m model.export --run out/small --to model.gguf    # for llama.cpp
    python -m model.export --run out/small --to whole.pt      # last.pt and its shards, to resume from
    python -m model.export --from DIR --run out/new

The models are those of model/huggingface.py. The exported tokenizer gives equal ids.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import EOT, Tokenizer, published_tokenizer
from model import checkpoint
from model.gguf import export_gguf
from model.gpt import ModelConfig
from model.huggingface import ExportError, to_huggingface
from model.load import load_run
from model.pretrained import open_pretrained
from runtime.config import Parser
from runtime.files import new_folder
from runtime.program import leave, program
from runtime.run import RunError, find, run_folder


def export_run(run: Path, target: Path) -> None:
    """Export a run's best model and its tokenizer: to the new file `target` if its suffix is .gguf, or else to the
    folder `target`, which must be new or empty. If the suffix is .pt, write the run's last checkpoint, optimizers
    included, as one new file. Raises `ExportError`, `CheckpointError` or `WriteError`."""
    to_file = target.suffix in (".gguf", ".pt")
    if to_file and target.exists():
        raise ExportError(f"{target} exists: choose a new file")
    if not to_file and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ExportError(f"{target} exists and is not an empty folder: choose a new one")
    if target.suffix == ".pt":
        if not target.parent.is_dir():
            raise ExportError(f"{target} cannot be written: {target.parent} is not a folder")
        checkpoint.save_whole(run / "last.pt", target)
        return
    model, tokenizer = load_run(run, torch.device("cpu"))
    export = export_gguf if to_file else export_folder
    export(target, model.config, model.state_dict(), tokenizer)


def export_folder(folder: Path, config: ModelConfig, weights: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write a model in Hugging Face's format, of our resolved config and weights. Raises `ExportError`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    theirs, tensors = to_huggingface(config, weights, tokenizer.eot)
    special = {"bos_token": EOT, "eos_token": EOT, "pad_token": EOT}
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.seq_len, **special}
    ids = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    try:
        with new_folder(folder) as partial:
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            tokenizer.to_huggingface().save(str(partial / "tokenizer.json"))
            for name, value in (("config", theirs), ("tokenizer_config", tokens), ("generation_config", ids)):
                (partial / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    except SafetensorError as error:
        raise ExportError(f"{folder} cannot be written: {error}") from error


def import_run(source: str, run: Path) -> None:
    """Import a model in Hugging Face's format as the new run folder `run`, to generate from.

    Raises `ExportError`, `DataError` or `RunError`."""
    if run.exists():
        raise RunError(f"{run} exists: choose a new name")
    pretrained = open_pretrained(source)
    if pretrained.is_run:
        raise ExportError(f"{source} is a run already")
    config, weights = pretrained.weights()
    if not (name := pretrained.tokenizer()):
        raise ExportError(f"{source} has no tokenizer.json")
    tokenizer = published_tokenizer(name)
    if tokenizer.vocab_size > config.vocab_size:
        raise ExportError(
            f"{source} has {tokenizer.vocab_size} tokens in tokenizer.json, {config.vocab_size} in its weights"
        )
    with new_folder(run) as partial:
        tokenizer.save(partial / "tokenizer.json")
        checkpoint.save(partial, {"model_config": asdict(config), "model": weights, "step": 0})
        text = json.dumps({"imported": source, "model": asdict(config)}, indent=2)
        (partial / "config.json").write_text(text + "\n")


@program
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m model.export", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", required=True, help="the run's folder, such as out/small, or its name in out/")
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--to",
        metavar="DIR|FILE.gguf|FILE.pt",
        help="export the run's best model there, or to .pt its last checkpoint whole; gguf: to a file beside the run",
    )
    direction.add_argument(
        "--from", metavar="DIR", dest="source", help="import the model in this folder, or hub:org/name, as the run"
    )
    args = parser.parse_args(argv)
    if args.source is not None:
        written = run_folder(args.run)
        import_run(args.source, written)
    else:
        run = find(args.run)
        written = run.with_name(f"{run.name}.gguf") if args.to == "gguf" else Path(args.to)
        export_run(run, written)
    print(f"wrote {written}")
    return 0


if __name__ == "__main__":
    leave(main())
