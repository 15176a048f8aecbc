"""Trains a network and writes its weights with a card: `python -m models.train`."""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from . import datasets, networks, serialization
from .training import OPTIMIZERS, Recipe, accuracy, fit


def main(argv: Sequence[str] | None = None) -> None:
    """Trains a network, and writes its weights and a card that says how they were made and how good they are.

    Args:
        argv: Command line arguments; those of the process if not given. `--help` lists them.

    Raises:
        SystemExit: With code 2 if an argument is invalid.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        data = datasets.load(args.dataset, args.data_dir)
        recipe = dataclasses.replace(
            networks.recipe(args.model, args.dataset),
            **{
                field.name: getattr(args, field.name)
                for field in dataclasses.fields(Recipe)
                if getattr(args, field.name) is not None
            },
        )
        model = networks.make(args.model, data, seed=args.seed)
        path = args.out / f"{args.model}-{args.dataset}-{args.seed}.safetensors"
        checkpoint = path.with_suffix(".checkpoints")
        if importlib.util.find_spec("orbax") is None:
            if args.resume:
                raise ImportError("argument --resume: needs orbax: pip install 'jaxcode[train]'")
            print("No checkpoints are written: orbax is not installed (pip install 'jaxcode[train]').", flush=True)
            checkpoint = None
        print(f"{args.model} on {len(data.x_train):,} {data.noun} of {args.dataset}: {recipe}", flush=True)
        teacher = networks.load_teacher(recipe, data, args.dataset, args.out)
        if checkpoint is not None and not args.resume:
            shutil.rmtree(checkpoint, ignore_errors=True)
        losses = fit(model, data, recipe, teacher=teacher, seed=args.seed, checkpoint=checkpoint)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    serialization.save(model, path)
    card = {
        "network": args.model,
        "dataset": args.dataset,
        "accuracy": round(accuracy(model, data.x_test, data.y_test), 4),
        "test_inputs": len(data.x_test),
        "training_inputs": len(data.x_train),
        "parameters": serialization.num_parameters(model),
        "seed": args.seed,
        "recipe": dataclasses.asdict(recipe),
        "final_loss": round(float(losses[-1]), 4),
        "command": "python -m models.train " + shlex.join(_without_folders(sys.argv[1:] if argv is None else argv)),
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "date": datetime.date.today().isoformat(),
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    if checkpoint is not None:
        shutil.rmtree(checkpoint, ignore_errors=True)
    print(f"Accuracy {card['accuracy']:.2%} on {len(data.x_test):,} test {data.noun}. Weights and card: {path}, .json")


def _without_folders(words: Sequence[str]) -> list[str]:
    """Removes the arguments that do not change the result: folders of this machine, and whether a run is resumed."""
    kept = []
    remaining = iter(words)
    for word in remaining:
        if word in ("--data-dir", "--out"):
            next(remaining, None)
        elif word != "--resume" and not word.startswith(("--data-dir=", "--out=")):
            kept.append(word)
    return kept


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.train",
        description="Trains a network. Settings that are not given are those of its recipe in models/networks.py.",
    )
    parser.add_argument("model", choices=sorted(networks.NETWORKS))
    parser.add_argument("--dataset", choices=datasets.NAMES, required=True)
    parser.add_argument("--data-dir", type=Path, help=f"folder with data files (default: ${datasets.VARIABLE})")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of weights, order and augmentation (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/weights"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run of the same command")
    for field in dataclasses.fields(Recipe):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction)
        elif field.type is int:
            parser.add_argument(name, type=int, metavar="n")
        elif field.name == "optimizer":
            parser.add_argument(name, choices=OPTIMIZERS)
        elif field.type is str:
            parser.add_argument(name, metavar="network")
        else:
            parser.add_argument(name, type=float, metavar="x")
    return parser


if __name__ == "__main__":
    main()
