"""The command line: `verify COMMAND`. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import sys

# Nothing else is imported out here: an interrupt is caught from the first line of `main` on.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from verify.machine.standing import Ended


def main() -> None:
    """Entry point of the console script."""
    try:
        code = _guarded()
    except KeyboardInterrupt:
        # Before there was anything to end.
        print("verify: interrupted", file=sys.stderr)
        code = 130
    if code is not None and code > 128:
        # An interrupt that came through an `exec` (of a dataclass, say) leaves Python a mark by which it dies
        # of SIGINT, whatever the exit code is. The next exec takes the mark away.
        exec("")
    sys.exit(code if isinstance(code, int) else 0)


def _guarded() -> int | None:
    """The command's exit code; interrupts and errors that nobody expected are one line and a code, too."""
    import atexit

    from verify.machine.exits import EXIT_INTERRUPTED, EXIT_VOID
    from verify.machine.standing import Ended, open_standard_streams

    atexit.unregister(_end_without_search)
    atexit.register(_end_without_search)
    # An option of every command, for whoever follows up an internal error.
    debug = "--debug" in sys.argv
    open_standard_streams()
    with Ended() as ended:
        try:
            code = _answer([word for word in sys.argv[1:] if word != "--debug"], ended)
        except KeyboardInterrupt:
            print("verify: interrupted", file=sys.stderr)
            code = EXIT_INTERRUPTED
        except Exception as error:
            # A broken installation ends here too: whatever is wrong, it is no verdict on a kernel.
            if debug:
                import traceback

                traceback.print_exc()
            if ended.came:
                # What is interrupted while it is imported may say that it cannot be.
                print("verify: interrupted", file=sys.stderr)
                code = EXIT_INTERRUPTED
            else:
                broken = "broken installation" if isinstance(error, ImportError) else "internal error"
                said = f"{broken}, nothing was measured: {type(error).__name__}: {error}"
                code = _refuse(f"{said} (--debug shows where)", EXIT_VOID)
        if code == EXIT_INTERRUPTED:
            code = ended.code(code)
    return code


def _end_without_search() -> None:
    """Keep Python from searching what is left for cycles when it ends: behind torch that is half a second.

    Not with Triton loaded, whose binding (nanobind, Triton 3.9) says on stderr what was not taken apart.
    """
    import gc

    if "triton" not in sys.modules:
        gc.freeze()


def _answer(arguments: list[str], ended: Ended) -> int | None:
    """Run the command that the arguments name; its exit code. What was no fault of ours is said in a line."""
    from verify.machine.environment import prepare_variables
    from verify.machine.heap import keep_freed_memory

    # Before torch is loaded: its libraries read these when they start.
    prepare_variables()
    keep_freed_memory()
    import typer

    from verify.commands import app
    from verify.commands.help_pages import instead_of, likelier, with_value
    from verify.kernels.errors import MachineFailure
    from verify.machine.errors import INPUT_ERRORS
    from verify.machine.exits import EXIT_VOID
    from verify.machine.terminal import outlast_readers, unwritten

    outlast_readers()
    try:
        try:
            code = app(args=arguments, standalone_mode=False)
        except (typer.Exit, typer.Abort):
            raise
        except Exception:
            if ended.came:
                # What an interrupt cut short may call that bad input, or too little memory.
                raise KeyboardInterrupt from None
            raise
    except INPUT_ERRORS as error:
        code = _refuse(str(error))
    except MachineFailure as error:
        code = _refuse(f"nothing was measured, the machine failed: {error}", EXIT_VOID)
    except typer.Exit as stop:
        code = stop.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # The command line's own usage errors; typer may carry its click inside, so the class is not named.
        if hasattr(error, "format_message"):
            code = _refuse(instead_of(arguments) or likelier(with_value(error.format_message(), arguments)))
        elif isinstance(error, OSError) and error.filename is not None and "--debug" not in sys.argv:
            code = _refuse(f"{error.filename}: {error.strerror or error}")
        elif _memory_ran_out(error) and "--debug" not in sys.argv:
            code = _refuse("nothing was measured: too little memory (--debug shows where)", EXIT_VOID)
        else:
            raise
    if (lost := unwritten()) is not None:
        code = _refuse(f"standard output: {lost.strerror}; what a command keeps in a folder is kept")
    return code


def _memory_ran_out(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from verify.machine.devices import is_out_of_memory

    return is_out_of_memory(error)


def _refuse(message: str, code: int = 2) -> int:
    """Say why in a line; the exit code, which is that of bad input (`EXIT_USAGE`) unless another is given."""
    from verify.kernels.said import one_line

    print(f"verify: {one_line(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
