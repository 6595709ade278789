"""The reports of `verify gen`, and what it shows on the screen."""

from __future__ import annotations

import math
import shlex
from typing import Any

import numpy as np

from verify.machine.terminal import counted
from verify.reports.drawing import Picture, finish, legend, new_figure, plain_powers
from verify.reports.record import RunRecord
from verify.reports.split_mode import shared_out
from verify.reports.templating import TEMPLATES, figure, flat, interval


def gen_html(record: RunRecord) -> str:
    """report.html: one file, everything in it."""
    told = [{**c, "picture": _margins(record, c["pair"])} for c in _told(record.run)]
    return TEMPLATES.get_template("gen.html.j2").render(**_content(record.run), told=told)


def gen_markdown(record: RunRecord) -> str:
    """report.md: short enough for a comment."""
    return TEMPLATES.get_template("gen.md.j2").render(**_content(record.run), told=_told(record.run))


def pair_sentences(pair: dict[str, Any]) -> list[str]:
    """What a reader needs to know about one candidate, the first difference before all else."""
    first, tokens = pair["first_difference"], pair["tokens"]
    if first is not None:
        said = list(first["sentences"])
        said.append(
            "given the baseline's tokens, the candidate prefers another one at"
            f" {len(pair['disagreements'])} of {tokens} steps"
        )
    else:
        said = [f"the same {counted(tokens, 'token')}" if tokens else "no token was written with it"]
        margin = (pair["closest"] or {}).get("margin")
        if margin is not None and math.isfinite(margin):
            said.append(
                f"closest at token {pair['closest']['step'] + 1}: the two top tokens were"
                f" {figure(margin, '%.2g')} nats apart"
            )
    moved, floor = pair["margin_moved_rms"], pair["margin_moved_rms_floor"]
    if moved is not None and math.isfinite(moved):
        said.append(
            f"over all steps the candidate moves the two top tokens by {figure(moved, '%.2g')} nats (rms);"
            f" one rounding of noise moves them by {figure(floor, '%.2g')}"
        )
    if pair["distance_ratio"] is not None:
        said.append(
            f"error of the attention output over the baseline's: {figure(pair['distance_ratio'])}"
            f" (99.9 %: {interval(pair['distance_ratio_ci'])}; could have seen a ratio from"
            f" {figure(pair['detectable_distance_ratio'])})"
        )
    said.append(f"{pair['coverage']:.1%} of the tokens went through the changed plan")
    return said


def command_line(run: dict[str, Any]) -> str:
    """The command that makes the run again."""
    s = run["settings"]
    words = ["verify", "gen"]
    for flag, value in (
        ("-m", s["model"]),
        ("-f", file) if (file := s.get("prompt_file")) else ("-p", s["prompt"]),
        ("-n", s["n_predict"]),
        ("--baseline", s["baseline"]),
        *(("--candidate", spec) for spec in s["candidates"]),
        ("--cache-type", s["cache_type"]),
        ("--device", s["device"]),
        *((("--split-mode", s["split_mode"]), ("--gpus", s["gpus"])) if s.get("gpus", 1) > 1 else ()),
        ("--margin", s.get("margin")),
        ("--min-coverage", s.get("min_coverage")),
        ("--seed", s["seed"]),
    ):
        if value is not None:
            words += [flag, shlex.quote(str(value))]
    return " ".join([*words, *(["--ignore-eos"] if s["ignore_eos"] else [])])


def _told(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Each candidate: its pair, its arm, what is said, and the logits at the first difference."""
    told = []
    for pair in run["pairs"]:
        first = pair["first_difference"]
        lines = []
        for name in ("exact", "floor", "baseline", pair["candidate"]) if first else ():
            if name in first["logits"]:
                figures = {k: first[k][name] for k in ("logits", "probabilities")}
                lines.append({"arm": name, "margin": first["margins"][name], **figures})
        arm = next(a for a in run["arms"] if a["name"] == pair["candidate"])
        told.append(
            {"pair": pair, "arm": arm, "first": first, "lines": lines, "sentences": pair_sentences(pair)}
        )
    return told


def _content(run: dict[str, Any]) -> dict[str, Any]:
    model = run["model"]
    heads = f"{model['heads']} query heads over {model['kv_heads']} KV heads, r = {model['ratio']}"
    return {
        "run": run,
        "subject": (
            f"Model {model['name'] or model['path']} ({model['architecture']}, {model['layers']} layers,"
            f" {heads}); a prompt of {run['prompt']['tokens']} tokens, greedy.{shared_out(run)}"
        ),
        "command": command_line(run),
        "facts": [
            ("model", f"{model['path']} ({model['bytes']} bytes, fingerprint {model['fingerprint'][:16]})"),
            *flat(run["environment"]),
        ],
    }


def _margins(record: RunRecord, pair: dict[str, Any]) -> Picture | None:
    """How close the top two tokens were at each step, and where the candidate disagreed."""
    margin = record.column("baseline", "top1_margin")
    if not margin.size:
        return None
    steps = np.arange(1, len(margin) + 1)
    drawn, axis = new_figure()
    axis.plot(steps, np.maximum(margin, 1e-7), ".-", lw=0.8, color="#1f5fa8", label="margin of the top two")
    at = [d["step"] for d in pair["disagreements"]]
    if at:
        axis.plot(steps[at], np.maximum(margin[at], 1e-7), "D", color="#c2410c", label="disagrees")
    for value, name, colour in (
        (pair["margin_moved_rms"], "moved by the candidate", "#c2410c"),
        (pair["margin_moved_rms_floor"], "moved by rounding", "#9a9a9a"),
    ):
        if value:
            axis.axhline(value, color=colour, ls="--", lw=1, label=name)
    axis.set(yscale="log", xlabel="token", ylabel="nats")
    plain_powers(axis)
    legend(axis, 4)
    return finish(
        pair["candidate"],
        drawn,
        "Margin between the baseline's two most likely tokens, token by token. Where it lies under the dashed"
        " lines, either token was as good.",
    )
