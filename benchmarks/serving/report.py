"""What is made of the figures: tables for a terminal, and serving.png."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def table(results: Mapping[str, Any]) -> str:
    lines = []
    for part in ("small", "several", "large", "gpu"):
        if part not in results:
            continue
        lines += ["", f"{part}: images/s, p50 and p99 in ms, CPU s per 1,000 images; MiB (PSS)"]
        for label, found in results[part]["servers"].items():
            loads = "   ".join(
                f"{number:>3} conn. {row['images_per_second']:7.0f}/s {row['p50_ms']:7.2f} {row['p99_ms']:7.2f} "
                f"{row['cpu_seconds_per_1000']:6.2f}" + (f" ({row['wrong']:.0f} WRONG)" if row["wrong"] else "")
                for number, row in found["loads"].items()
            )
            lines.append(f"  {label:22} {loads}   {found['mebibytes']['pss']:6.0f} MiB")
        lines.append(f"  ceiling in process, by batch: {json.dumps(results[part]['ceiling'])}")
    for part in ("latency", "start"):
        if part in results:
            lines += ["", f"{part}: {json.dumps(results[part])}"]
    for name, rows in results.get("growth", {}).items():
        lines += ["", f"ours, by {name}:"]
        lines += [
            f"  {key:>5} {row['images_per_second']:7.0f}/s  p99 {row['p99_ms']:8.2f} ms" for key, row in rows.items()
        ]
    return "\n".join(lines)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Throughput and p99 against what grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(15, 6.5), sharey="row", layout="constrained")
    for column, (name, rows) in enumerate(results["growth"].items()):
        xs, ys = [int(key) for key in rows], list(rows.values())
        for axis, key in zip(axes[:, column], ("images_per_second", "p99_ms"), strict=True):
            axis.plot(xs, [row[key] for row in ys], "o-", color="#1f5fa8", label="ours")
            axis.set_xscale("log", base=2)
            axis.set_xticks(xs, [str(x) for x in xs])
            axis.set_xlabel(name)
            axis.grid(alpha=0.3)
        if name == "connections" and "small" in results:
            _plot_peers(axes[:, column], results["small"]["servers"])
    axes[0, 0].set_ylabel("images/s")
    axes[1, 0].set_ylabel("p99, ms")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_yscale("log")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("Serving simplecnn at 32 px; where not said otherwise 64 connections, 1 kB JPEG files, as shipped")
    figure.savefig(path, dpi=80)


def _plot_peers(axes: Any, found: Mapping[str, Any]) -> None:
    colours = iter(("#8a8a8a", "#c0562b", "#e0a072", "#4d8b57", "#9cc5a1"))
    for label, server in sorted(found.items(), key=lambda item: item[0] != "stock TorchServe"):
        if label == "ours":
            continue
        style = {"color": next(colours), "label": label, "ms": 4}
        connections = [int(number) for number in server["loads"]]
        for axis, key in zip(axes, ("images_per_second", "p99_ms"), strict=True):
            axis.plot(connections, [row[key] for row in server["loads"].values()], "s--", **style)
