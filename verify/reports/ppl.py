"""The reports of `verify ppl`: a page with pictures, and a comment for a pull request, with one verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from verify.reports.pictures import pictures
from verify.reports.record import RunRecord, command_line
from verify.reports.split_mode import shared_out
from verify.reports.templating import TEMPLATES, figure, flat

# What a run need not have measured.
_OPTIONAL: dict[str, Any] = {"by_n_kv": [], "top1_changes": [], "noise": [], "power": None}


def report_html(record: RunRecord) -> str:
    """report.html: one file, everything in it."""
    missing = dict.fromkeys(("distance", "drift", "drift by position", "own error", "nll", "kld", "noise"))
    drawn = {**missing, **pictures(record)}
    return TEMPLATES.get_template("ppl.html.j2").render(**_content(record), pictures=drawn)


def report_markdown(record: RunRecord) -> str:
    """report.md: short enough for a comment."""
    return TEMPLATES.get_template("report.md.j2").render(**_content(record))


def _content(record: RunRecord) -> dict[str, Any]:
    run = _OPTIONAL | record.run
    return {
        "run": run,
        "seen": list(_coverage_sentences(run)),
        "detectable": list(_detectable_sentences(run)),
        "subject": _subject(run),
        "kind": (run["pairs"] or [{}])[0].get("distance_kind", "free-running"),
        "several_paths": len({arm["path"] for arm in run["arms"]}) > 1,
        "most_tokens": max((arm.get("tokens") or 0 for arm in run["arms"]), default=0),
        "any_frozen": any(arm.get("frozen") for arm in run["arms"]),
        "controls": [arm["name"] for arm in run["arms"] if arm["role"] == "control"],
        "repeats": [arm["name"] for arm in run["arms"] if arm["role"] in ("control", "noise")],
        "pair_of": {pair["candidate"]: pair for pair in run["pairs"]},
        "command": command_line(run),
        "facts": _facts(run),
    }


def _subject(run: dict[str, Any]) -> str:
    model, corpus = run["model"], run["corpus"]
    return (
        f"Model {model['name'] or model['path']} ({model['architecture']}, {model['layers']} layers,"
        f" {model['heads']} query heads over {model['kv_heads']} KV heads, r = {model['ratio']}); text"
        f" {corpus['name']}, {corpus['windows']} windows of {corpus['n_ctx']} tokens,"
        f" {corpus['scored_per_window']} scored in each.{shared_out(run)}"
    )


def _coverage_sentences(run: dict[str, Any]) -> Iterator[str]:
    """How much of the run the changed path was, for each candidate."""
    for pair in run["pairs"]:
        whose = f" of {pair['candidate']}" if len(run["pairs"]) > 1 else ""
        at = pair.get("changed_n_kv")
        where = f", at n_kv {at[0]} to {at[1]}" if at else ""
        yield f"{pair['coverage']:.1%} of the scored tokens{whose} went through the changed plan{where}."


def _detectable_sentences(run: dict[str, Any]) -> Iterator[str]:
    """The smallest effects that this run would have shown; what it could not have shown, too."""
    for pair in run["pairs"]:
        known = run["detectable"].get(pair["candidate"])
        found = known if isinstance(known, dict) else {"distance_ratio": known}
        whose = f"{pair['candidate']}: " if len(run["pairs"]) > 1 else ""
        scope = f", about {pair['distance_scope']}" if pair.get("distance_scope") else ""
        if found.get("distance_ratio") is not None:
            yield (
                f"{whose}could have seen a distance ratio from {found['distance_ratio']:.3g},"
                f" on {pair.get('measured_tokens', pair['tokens'])} tokens{scope}"
            )
        if found.get("scale_by_gain") is not None:
            yield (
                f"{whose}could have seen a scale error of the attention output from"
                f" {found['scale_by_gain']:.1e}, by its gain"
            )
        if found.get("dnll") is not None:
            meant = found.get("scale_by_nll")
            same = f", which takes a scale error of at least {meant:.0e}" if meant is not None else ""
            file = found.get("logits_file_nats")
            coarse = (
                f"; the 16-bit logits file of llama-perplexity resolves {file:.0e} nats a token"
                if file is not None
                else ""
            )
            yield (
                f"{whose}perplexity alone would have shown a difference from {found['dnll']:.1e} nats a"
                f" token{same}{coarse}"
            )
    smallest = (run.get("power") or {}).get("smallest") or {}
    if smallest:
        said = ", ".join(f"{name} from {figure(size, '%.0e')}" for name, size in smallest.items() if size)
        blind = ", ".join(name for name, size in smallest.items() if not size)
        none = f"; seen at no size by {blind}" if blind else ""
        yield f"scale errors planted in the baseline were seen by {said or 'no detector'}{none}"


def _facts(run: dict[str, Any]) -> list[tuple[str, Any]]:
    """What the run ran on: hashes, versions, device, seed."""
    model, corpus = run["model"], run["corpus"]
    return [
        ("model", f"{model['path']} ({model['bytes']} bytes, fingerprint {model['fingerprint'][:16]})"),
        ("text", f"{corpus['source']} ({corpus['bytes']} bytes, sha256 {corpus['sha256'][:16]})"),
        ("seed", run["settings"].get("seed")),
        *flat(run["environment"]),
    ]
