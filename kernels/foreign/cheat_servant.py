"""The servant of `verify judge`: a kernel nobody trusts, and the checks of `cheats` beside it in its process.

Imports nothing of ours but what lies beside it. What torch is, is kept before the kernel's file is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from worker import Refusal, module_beside  # type: ignore[import-not-found]

forms, cheats = module_beside("forms"), module_beside("cheats")


def load(arguments: dict[str, Any]) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    """The greeting says the form that was found; each question names a check. Raises Refusal."""
    before = cheats.snapshot()
    try:
        function = forms.load_callable(
            arguments["where"],
            arguments["names"],
            arguments=arguments["arguments"],
            method=arguments["method"],
        )
        form = forms.form_of(function, arguments["name"], forms.Wanted(**arguments["wanted"]))
        reference = None
        if arguments["reference"]:
            theirs = forms.load_callable(arguments["where"], arguments["reference"])
            reference = forms.form_of(theirs, arguments["reference"], forms.Wanted(**arguments["wanted"]))
    except forms.FormError as error:
        raise Refusal(str(error)) from error
    bench = cheats.bench_of(
        form,
        forms.plain_softmax,
        before,
        reference=reference,
        sizes=arguments["sizes"],
        dtype=arguments["dtype"],
        device=arguments["device"],
    )

    def answer(question: dict[str, Any], memory: Any) -> dict[str, Any]:
        if question["check"] == "timing":
            return {"seconds": cheats.timed(bench)}
        if cheats.CHEATS[question["check"]].cuda and not bench.cuda:
            return {"not_run": "needs a CUDA device"}
        said = cheats.CHEATS[question["check"]].check(bench)
        return {} if said is None else {"caught": said}

    return {"way": form.way, "layout": form.layout, "said": form.said}, answer
