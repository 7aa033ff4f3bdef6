"""What is made of the figures of `benchmarks.reliability`: the goals that they reach, tables, and reliability.png."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attacks import attack_line, is_harmless
from benchmarks.probes import is_whole

GOALS: dict[str, dict[str, Callable[[Mapping[str, Any]], bool]]] = {
    "sustained": {
        "no errors": lambda found: found["wrong"] + found["failed"] == 0,
        "rate held within 2% in each window": lambda found: found["least_rate"] >= 0.98 * found["rate"],
        "p99 of the last lap at most 1.25 times the second's": lambda found: found["p99_growth"] <= 1.25,
        "memory grows by less than 5% after the first lap": lambda found: found["memory_growth"] < 0.05,
    },
    "burst": {
        "p99 of the 503s within 100 ms": lambda found: found["refused_p99_ms"] <= 100,
        "full speed again within 2 s": lambda found: found["full_speed_seconds"] <= 2,
        "nothing but good responses and 503s": lambda found: found["others"] == 0,
        "the Python client gets each prediction, once and correct": lambda found: is_whole(found["client"]),
    },
    "faults": {
        "the Python client gets each prediction, once and correct": lambda found: all(
            is_whole(one["client"]) for one in found.values() if "skipped" not in one
        ),
    },
    "attacks": {
        "no neighbour waits or fails, no worker is replaced, memory is bounded": lambda found: all(
            map(is_harmless, found.values())
        ),
    },
}


# The parts


def table(results: Mapping[str, Any]) -> str:
    lines = []
    if found := results.get("sustained"):
        lines += sustained_lines(found)
    if found := results.get("start"):
        lines += ["", f"start: median {found['median']:.2f} s of {', '.join(f'{one:.2f}' for one in found['seconds'])}"]
    if found := results.get("burst"):
        lines += [
            "",
            f"burst: {found['connections']} connections; "
            f"{found['refused_share']:.1%} of {found['responses']} responses are 503, "
            f"p50 {found['refused_p50_ms']:.1f} ms, p99 {found['refused_p99_ms']:.1f} ms; "
            f"{found['good']:.0f} good/s (before: {found['before']:.0f}/s), p99 {found['good_p99_ms']:.0f} ms; "
            f"{found['others']} others; full speed after {found['full_speed_seconds']:.1f} s",
            f"  the Python client beside it: {said(found['client'])}, {found['client']['refused']} times 503",
        ]
    if found := results.get("faults"):
        lines += ["", "faults: by itself? s without any good response, to the last disturbed one, to all workers ready"]
        lines += [line for name, one in found.items() for line in fault_lines(name, one)]
    if found := results.get("attacks"):
        lines += ["", "attacks: four connections at once, with good neighbours"]
        lines += [f"  {attack_line(name, one)}" for name, one in found.items()]
    lines += [""]
    for part in [part for part in GOALS if part in results]:
        lines += [
            f"{'reached' if is_reached(results[part]) else 'MISSED '}  {part}: {goal}"
            for goal, is_reached in GOALS[part].items()
        ]
    return "\n".join(lines)


def sustained_lines(found: Mapping[str, Any]) -> list[str]:
    first, last, samples = found["laps"][1], found["laps"][-1], found["samples"]
    lines = [
        "",
        f"sustained: {found['seconds']} s at {found['rate']:.0f}/s, "
        f"{found['rate'] / found['peak']:.0%} of {found['peak']:.0f}/s; {found['responses']} responses, "
        f"{found['wrong']} wrong {found['said'][:100]}, {found['failed']} failed; "
        f"slowest window {found['least_rate']:.0f}/s",
        f"  second lap: p50 {first['p50_ms']:.2f} ms, p99 {first['p99_ms']:.2f} ms; "
        f"last: p50 {last['p50_ms']:.2f} ms, p99 {last['p99_ms']:.2f} ms",
        f"  memory {found['memory_growth']:+.1%} from the second lap to the last",
    ]
    lines += [
        f"  {name:12}" + " ".join(f"{samples[i][name]:7.0f}" for i in range(0, len(samples), len(samples) // 8))
        for name in ("mebibytes", "descriptors", "threads", "logs")
    ]
    return lines


def fault_lines(name: str, found: Mapping[str, Any]) -> list[str]:
    if "skipped" in found:
        return [f"  {name:44} skipped: {found['skipped']}"]
    times = [found["silent"], found["calm"], found["whole"]]
    hung = f", {found['hung']} hung" if found["hung"] else ""
    shown = " ".join("  never" if one is None else f"{one:7.1f}" for one in times)
    failed = ", ".join(f"{count} × {status}" for status, count in found["failed"].items()) or "none failed"
    ping = "; /ping said unhealthy" if found["unhealthy"] else ""
    return [
        f"  {name:44} {'yes' if found['by_itself'] else 'NO '} {shown}   {failed}, {found['slow']} slow{hung}{ping}",
        f"  {'':44} client: {said(found['client'])}",
        *(f"  {'':44} {remark}" for remark in found["remarks"]),
    ]


def said(verdict: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{verdict[key]} {key}" for key in ("lost", "doubled", "wrong"))
    return f"{verdict['images']} images, {counts} {verdict['said'][:150]}".strip()


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Throughput, p99 and memory over time; the faults one after the other, each marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        3, 2, figsize=(15, 8), sharex="col", width_ratios=(2, 3), layout="constrained", squeeze=False
    )
    _plot_sustained(axes[:, 0], results["sustained"])
    _plot_faults(axes[:, 1], results["faults"])
    axes[0, 0].set_ylabel("good responses/s")
    axes[1, 0].set_ylabel("ms")
    axes[2, 0].set_ylabel("memory of the server, MiB (PSS)")
    axes[1, 1].set_yscale("log")
    for axis in (*axes[0], *axes[2], axes[1, 0]):
        axis.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)


def _plot_sustained(axes: Any, sustained: Mapping[str, Any]) -> None:
    minutes = [window["at"] / 60 for window in sustained["windows"]]
    axes[0].plot(minutes, [window["rate"] for window in sustained["windows"]])
    for name in ("p50_ms", "p99_ms"):
        axes[1].plot(minutes, [window[name] for window in sustained["windows"]], label=name.removesuffix("_ms"))
    axes[2].plot([one["at"] / 60 for one in sustained["samples"]], [one["mebibytes"] for one in sustained["samples"]])
    share = sustained["rate"] / sustained["peak"]
    axes[0].set_title(f"{sustained['rate']:.0f} requests/s, {share:.0%} of the peak", fontsize=10)
    axes[1].legend(fontsize=8)
    axes[2].set_xlabel("minutes")


def _plot_faults(axes: Any, faults: Mapping[str, Any]) -> None:
    start = 0.0
    for number, found in enumerate(faults.values(), 1):
        if "skipped" in found:
            continue
        rows = np.array(found["series"], dtype=float)
        at = start - rows[0, 0]
        for row in range(3):
            axes[row].plot(rows[:, 0] + at, rows[:, row + 1], color="#1f5fa8", lw=1)
            axes[row].axvline(at, color="#c0562b", ls="--", lw=1)
        axes[0].annotate(str(number), (at, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
        start = at + rows[-1, 0] + 3
    axes[2].set_xlabel("s; " + "; ".join(f"{number} {name}" for number, name in enumerate(faults, 1)), wrap=True)
