"""`verify props`: the laws of attention against one kernel."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from verify.commands import options
from verify.kernels.errors import nearest
from verify.machine.command_line import typed_again
from verify.machine.environment import describe, prepare_torch
from verify.machine.errors import UsageError
from verify.machine.exits import EXIT_INTERRUPTED
from verify.machine.jsontext import to_json_text
from verify.machine.outfile import check_new_folder, check_writable
from verify.reports.ci import cases_of_laws, check_ci_options, hand_over

if TYPE_CHECKING:
    from verify.laws import Law, Subject
    from verify.laws.run import LawResult

DEFAULT_SPEC, DEFAULT_EXAMPLES = "flash", 100


def command(
    context: typer.Context,
    spec: Annotated[str, typer.Argument(help="kernel specification")] = DEFAULT_SPEC,
    law: Annotated[
        list[str] | None, typer.Option("--law", help="this law, or group of laws; may be repeated")
    ] = None,
    examples: Annotated[
        int, typer.Option("--examples", min=1, help="cases to try of each law")
    ] = DEFAULT_EXAMPLES,
    seed: Annotated[
        int | None, typer.Option("--seed", help="of the cases; default: new ones each time")
    ] = None,
    case: Annotated[
        str | None, typer.Option("--case", help="try this case alone, as a failure prints it (JSON)")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", help="engine: a fixed grid of the calls that engines make, within budget"),
    ] = None,
    junit: options.JUnit = None,
    format_: options.Format = "text",
    strict: options.Strict = False,
    device: options.Device = None,
    out: options.Out = None,
    json_: options.Json = False,
) -> int:
    """Run the command. Exit 0 if every law holds that applies, 1 if one is broken, 3 if none applies."""
    import torch

    from verify.laws import subject_of
    from verify.machine.devices import chosen_device, default_device
    from verify.reports.props import exit_code, print_results, to_json, write_junit
    from verify.reports.writing import write_run

    screen = sys.stderr if json_ else sys.stdout

    check_ci_options(format_, junit)
    check_new_folder(out)
    prepare_torch()
    if profile is not None:
        if profile != "engine":
            raise UsageError(f"--profile {profile}: expected engine")
        if law or case is not None:
            raise UsageError("--profile engine: has its own law and cases, expected no --law or --case")
        found, code = _engine_profile(spec, junit, device, json_)
        write_run(out, found, typed_again(context), screen)
        return code
    laws = chosen_laws(law or [])
    if case is not None and len(laws) != 1:
        raise UsageError("--case: needs the --law that it is a case of")
    if junit is not None:
        check_writable("--junit", junit)
    on = chosen_device(device or default_device())
    subject = subject_of(spec, on, strict=strict, identify=True)
    threads = torch.get_num_threads()
    # Tensors are small here: threads would mostly wait for each other.
    torch.set_num_threads(1)
    try:
        if case is not None:
            results = [_one_case(laws[0], subject, case)]
        else:
            results = _run(laws, subject, examples, seed)
        notes = [*subject.kernel.notes, *subject.said]
    finally:
        torch.set_num_threads(threads)
        subject.close()
    print_results(results, spec, str(on), screen)
    for note in notes:
        print(f"verify: {note}", file=sys.stderr)
    if junit is not None:
        try:
            write_junit(results, spec, str(on), junit)
        except OSError as error:
            raise UsageError(f"--junit {junit}: cannot be written: {error.strerror or error}") from None
    hand_over(cases_of_laws(results), f"verify props {spec}", format_, None)
    content = to_json(results, spec, str(on), describe(str(on))) if json_ or out is not None else {}
    write_run(out, content, typed_again(context), screen)
    if json_:
        print(to_json_text(content), end="")
    if len(results) < len(laws):
        print(f"verify: interrupted after {len(results)} of {len(laws)} laws", file=sys.stderr)
        return EXIT_INTERRUPTED
    return exit_code(results)


def _engine_profile(
    spec: str, junit: Path | None, device: str | None, json_: bool
) -> tuple[dict[str, Any], int]:
    """The operator test: every cell of the grid, as JSON, and the exit code, as for laws."""
    import torch

    from verify.laws import subject_of
    from verify.laws.engine_grid import run_grid
    from verify.machine.devices import chosen_device, default_device
    from verify.reports.engine_grid import grid_json, print_grid, write_grid_junit
    from verify.reports.progress import progress_of
    from verify.reports.props import exit_code

    if junit is not None:
        check_writable("--junit", junit)
    on = str(chosen_device(device or default_device()))
    subject = subject_of(spec, on)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with progress_of(f"operator test of {spec}") as progress:
            found = run_grid(subject, on_cell=progress or (lambda done, total: None))
    finally:
        torch.set_num_threads(threads)
        subject.close()
    print_grid(found, spec, on, sys.stderr if json_ else sys.stdout)
    if junit is not None:
        write_grid_junit(found, spec, on, junit)
    content = grid_json(found, spec, on, describe(on))
    if json_:
        print(to_json_text(content), end="")
    return content, exit_code([result for _, result in found])


def chosen_laws(names: Sequence[str]) -> list[Law]:
    """Laws by their names and those of groups; all if none is given. Raises UsageError."""
    from verify.laws import GROUPS, LAWS

    for name in names:
        if name not in LAWS and name not in GROUPS:
            known = [*LAWS, *GROUPS]
            raise UsageError(
                f"--law {name}: unknown law{nearest(name, known)} (known: {', '.join(LAWS)};"
                f" groups: {', '.join(GROUPS)})"
            )
    return [each for each in LAWS.values() if not names or each.name in names or each.group in names]


def _run(laws: Sequence[Law], subject: Subject, examples: int, seed: int | None) -> list[LawResult]:
    """Every law, with progress; those that were tried before an interruption."""
    from verify.laws.run import kept_examples, run_law
    from verify.reports.progress import progress_bar

    results = []
    bar = progress_bar()
    with bar, suppress(KeyboardInterrupt):
        all_laws = bar.add_task("laws", total=len(laws))
        cases = bar.add_task("", total=examples)
        for each in laws:
            bar.reset(cases, total=examples, description=each.name)
            done = run_law(
                each,
                subject,
                examples=examples,
                seed=seed,
                database=kept_examples(),
                on_case=lambda count: bar.update(cases, completed=count),
            )
            results.append(done)
            bar.advance(all_laws)
            if bar.disable:
                print(f"  {each.name}: {done.state}, {done.seconds:.1f} s", file=sys.stderr, flush=True)
    return results


def _one_case(law: Law, subject: Subject, text: str) -> LawResult:
    from verify.laws.run import try_case

    case = law.case_type.from_json(text)
    return try_case(law, subject, case)
