"""The command line: `verify COMMAND`. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import sys

from verify.machine.environment import prepare_variables

# Before torch is loaded: its libraries read these when they start.
prepare_variables()


def main() -> None:
    """Entry point of the console script."""
    import typer

    from verify.commands import app
    from verify.judge.verdict import EXIT_INTERRUPTED, EXIT_VOID
    from verify.machine.errors import INPUT_ERRORS
    from verify.machine.terminal import outlast_readers, unwritten

    # An option of every command, for whoever follows up an internal error.
    debug = "--debug" in sys.argv
    outlast_readers()
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        code = app(args=arguments, standalone_mode=False)
    except INPUT_ERRORS as error:
        code = _refuse(str(error))
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("verify: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except Exception as error:
        # The command line's own usage errors; typer may carry its click inside, so the class is not named.
        if hasattr(error, "format_message"):
            code = _refuse(error.format_message())
        elif debug:
            raise
        elif isinstance(error, OSError) and error.filename is not None:
            code = _refuse(f"{error.filename}: {error.strerror or error}")
        else:
            said = f"{type(error).__name__}: {error}"
            print(
                f"verify: internal error, nothing was measured: {said} (--debug shows where)", file=sys.stderr
            )
            code = EXIT_VOID
    if (lost := unwritten()) is not None:
        code = _refuse(f"standard output: {lost.strerror}; what a command keeps in a folder is kept")
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(message: str) -> int:
    from verify.judge.verdict import EXIT_USAGE

    print(f"verify: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    main()
