"""The command line: `verify COMMAND`. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import sys
import traceback

from verify.machine.exits import EXIT_INTERRUPTED, EXIT_USAGE, EXIT_VOID
from verify.machine.standing import Ended, open_standard_streams


def main() -> None:
    """Entry point of the console script."""
    # An option of every command, for whoever follows up an internal error.
    debug = "--debug" in sys.argv
    open_standard_streams()
    with Ended() as ended:
        try:
            code = _answer([word for word in sys.argv[1:] if word != "--debug"])
        except KeyboardInterrupt:
            print("verify: interrupted", file=sys.stderr)
            code = EXIT_INTERRUPTED
        except Exception as error:
            # A broken installation ends here too: whatever is wrong, it is no verdict on a kernel.
            if debug:
                traceback.print_exc()
            broken = "broken installation" if isinstance(error, ImportError) else "internal error"
            said = f"{broken}, nothing was measured: {type(error).__name__}: {error}"
            code = _refuse(f"{said} (--debug shows where)", EXIT_VOID)
        if code == EXIT_INTERRUPTED:
            code = ended.code(code)
    sys.exit(code if isinstance(code, int) else 0)


def _answer(arguments: list[str]) -> int | None:
    """Run the command that the arguments name; its exit code. What was no fault of ours is said in a line."""
    from verify.machine.environment import prepare_variables

    # Before torch is loaded: its libraries read these when they start.
    prepare_variables()
    import typer

    from verify.commands import app
    from verify.kernels.errors import MachineFailure
    from verify.machine.errors import INPUT_ERRORS
    from verify.machine.terminal import outlast_readers, unwritten

    outlast_readers()
    try:
        code = app(args=arguments, standalone_mode=False)
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
            code = _refuse(error.format_message())
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


def _refuse(message: str, code: int = EXIT_USAGE) -> int:
    from verify.kernels.said import one_line

    print(f"verify: {one_line(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
