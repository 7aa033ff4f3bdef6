"""Our trainer on photographs against a logistic regression on features, a timm script and fastai, image by image.

    python -m benchmarks.photographs --data clothing.tar --minutes 3 --folds 5 --peers .venv-peers/bin/python
    python -m benchmarks.photographs --data clothing.tar --split own --seeds 3 --only ours,timm
    python -m benchmarks.photographs --data clothing.tar --ablate --epochs 3

All start from the same ImageNet weights, EfficientNet-Lite0's. The images, whatever split they bring, are cut into
stratified folds; each rival trains on all but one and predicts that one, so that each image is predicted once by a
network that never saw it. `--split own` takes the data's own test split. Ours is first in each fold, and the others,
in an order that rotates, get as many seconds as it took where that is more than --minutes. Seconds run from the end of
the imports to the final weights, reading and features included; whoever exceeds --minutes is shown with what it took.

Intervals are of the images (paired.py), for these runs: folds share training images, so they say little about another
collection. Finished predictions stay in --work, and a run that was stopped goes on from there. Writes
benchmarks/results/photographs.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe, keep
from benchmarks.photographs.cuts import cut_folds, link_fold, own_split, write_images
from benchmarks.photographs.paired import compare, interval, macro_f1
from benchmarks.photographs.rivals import (
    ABLATIONS,
    AS_IT_IS,
    OURS,
    PEERS,
    RIVALS,
    Predictions,
    python_of,
    run,
)
from predictor.files import write_text

Runs = dict[str, list[list[Predictions]]]  # of each rival: by seed, by fold


def measure(options: argparse.Namespace, wanted: list[str]) -> Runs:
    """Runs all rivals on all folds, in turns."""
    entries, files = write_images(options.data, options.work / "images")
    own = options.split == "own"
    assigned = own_split(entries) if own else cut_folds(entries, options.folds, options.split_seed)
    found: Runs = {name: [] for name in wanted}
    for seed in range(options.seeds):
        for runs in found.values():
            runs.append([])
        for fold in range(max(assigned) + 1):
            folder = link_fold(files, assigned, fold, options.work / f"fold{fold}")
            minutes = options.minutes
            for name in in_turn(wanted, seed + fold):
                one = run_one(name, folder, options, minutes, seed)
                found[name][seed].append(one)
                if name == OURS:
                    minutes = max(minutes, one.facts["seconds"] / 60)
                say(f"seed {seed}  fold {fold}", name, one)
    return found


def in_turn(names: list[str], number: int) -> list[str]:
    """Ours first, if it takes part; the others in an order that rotates."""
    first, others = [n for n in names if n == OURS], [n for n in names if n != OURS]
    start = number % len(others) if others else 0
    return first + others[start:] + others[:start]


def run_one(name: str, folder: Path, options: argparse.Namespace, minutes: float, seed: int) -> Predictions:
    out = options.work / "predictions" / name.replace(" ", "-") / f"{folder.name}-seed{seed}.npz"
    changed = ("--epochs", str(options.epochs), *ABLATIONS[name]) if options.ablate else ()
    module = RIVALS[OURS if options.ablate else name]
    python = python_of(OURS if options.ablate else name, options.peers)
    given: dict[str, Any] = {"minutes": minutes, "seed": seed, "threads": options.threads, "options": changed}
    return run(module, folder, out, python=python, **given)


def say(place: str, name: str, one: Predictions) -> None:
    accuracy = float((one.targets == one.predicted).mean())
    print(f"{place}  {name:22} {accuracy:.2%}, {one.facts['seconds']:.0f} s", flush=True)


def joined(runs: list[list[Predictions]]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Targets (N,), predictions (S, N) and names of all folds together, in the order of the names."""
    names = [name for one in runs[0] for name in one.names]
    order = np.argsort(names)
    targets = np.concatenate([one.targets for one in runs[0]])[order]
    predicted = np.stack([np.concatenate([one.predicted for one in folds])[order] for folds in runs])
    return targets, predicted, [names[index] for index in order]


def summarise(found: Runs, base: str) -> dict[str, Any]:
    """Accuracy, macro-F1 and seconds of each, and what `base` is worth against each of the others.

    Raises:
        ValueError: two rivals have predicted different images.
    """
    rows: dict[str, Any] = {}
    joint = {name: joined(runs) for name, runs in found.items()}
    for name, (targets, predicted, names) in joint.items():
        correct = predicted == targets
        accuracy, low, high = interval(correct.mean(axis=0))
        facts = [one.facts for folds in found[name] for one in folds]
        rows[name] = {
            "accuracy": accuracy,
            "low": max(low, 0.0),
            "high": min(high, 1.0),
            "macro_f1": float(np.mean([macro_f1(targets, row, int(targets.max()) + 1) for row in predicted])),
            "images": len(targets),
            **{key: float(np.median([fact[key] for fact in facts])) for key in facts[0]},
        }
        if base in joint and name != base:
            other_targets, other, other_names = joint[base]
            if other_names != names:
                raise ValueError(f"{base} and {name} have predicted different images; give another --work")
            rows[name]["against"] = compare(other == other_targets, correct)
    return rows


def table(rows: dict[str, Any], base: str) -> str:
    lines = [f"{'':22} accuracy (95%)         macro-F1  seconds   {base} - it (95%)         only {base} / only it"]
    for name, row in rows.items():
        line = f"{name:22} {row['accuracy']:.2%} ({row['low']:.1%}..{row['high']:.1%})  {row['macro_f1']:.4f}"
        line += f"  {row['seconds']:7.0f}"
        if pair := row.get("against"):
            p = f", p {pair['p']:.2g}" if "p" in pair else ""
            line += f"   {100 * pair['difference']:+.2f} ({100 * pair['low']:+.2f}..{100 * pair['high']:+.2f}) points"
            line += f"   {pair['only_ours']} / {pair['only_other']}{p}"
        lines.append(line)
    return "\n".join(lines)


def claim(work: Path, settings: dict[str, Any]) -> None:
    """Takes the folder for a comparison of these settings, or goes on with one.

    Raises:
        ValueError: it holds one of other settings.
    """
    path, text = work / "settings.json", json.dumps(settings, indent=1)
    work.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text() != text:
        raise ValueError(f"--work {work}: holds predictions of other settings ({path}); give another folder")
    write_text(path, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    names = list(ABLATIONS if options.ablate else RIVALS)
    without = set() if options.peers or options.ablate else PEERS
    wanted = options.only.split(",") if options.only else [name for name in names if name not in without]
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--only: nothing is called {unknown[0]!r}; there are {', '.join(names)}")
    base = AS_IT_IS if options.ablate else OURS
    options.work = options.work or Path(f"runs/photographs-{'ablate-' * options.ablate}{options.split}")
    keys = ("data", "split", "split_seed", "threads", *(("epochs",) if options.ablate else ("minutes",)))
    settings = {key: getattr(options, key) for key in keys} | {"folds": options.folds * (options.split == "folds")}
    try:
        claim(options.work, settings)
        rows = summarise(measure(options, wanted), base)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"benchmarks.photographs: {error}", file=sys.stderr)
        return 2
    machine = describe("torch", "torchvision", "timm", "scikit-learn", "pillow") | _peers(options.peers)
    length = f"{options.epochs} epochs" if options.ablate else f"{options.minutes:g} minutes"
    cut = "own test split" if options.split == "own" else f"{options.folds} folds"
    part = f"{Path(options.data).stem}, {cut}, {length}, seeds: {options.seeds}, threads: {options.threads}"
    keep(options.json, machine, f"{'ablations, ' * options.ablate}{part}", rows)
    print(json.dumps(machine))
    print(table(rows, base))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.photographs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="photographs, as train.py's --data")
    parser.add_argument("--minutes", type=float, default=3, help="of each training (3)")
    parser.add_argument("--split", choices=("folds", "own"), default="folds", help="what is predicted (folds)")
    parser.add_argument("--folds", type=int, default=5, help="of all images together (5)")
    parser.add_argument("--split-seed", type=int, default=0, help="of the folds (0)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each rival on each fold (1)")
    parser.add_argument("--only", help=f"of {', '.join(RIVALS)}, separated by commas (all; fastai with --peers)")
    parser.add_argument("--peers", type=Path, help="python of the environment of benchmarks/peers/requirements.lock")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, for each rival (2)")
    parser.add_argument("--ablate", action="store_true", help="ours alone, with one option changed at a time")
    parser.add_argument("--epochs", type=int, default=3, help="of each training of --ablate (3)")
    parser.add_argument("--work", type=Path, help="folder (runs/photographs-folds, -own, -ablate-folds or -ablate-own)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/photographs.json"))
    return parser


def _peers(python: Path | None) -> dict[str, str]:
    """fastai's version, and those of what it computes with, where they are not those of this environment."""
    if python is None:
        return {}
    code = "import importlib.metadata as m; print(*(m.version(p) for p in ('fastai', 'torch', 'timm')))"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(("fastai", "torch of the peers", "timm of the peers"), said, strict=True))


if __name__ == "__main__":
    sys.exit(main())
