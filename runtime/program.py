"""What the main functions of all programs share."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

from runtime.errors import UserError, error_message
from runtime.text import use_utf8

REFUSED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141  # exit codes; the last two are a shell's for SIGINT and SIGPIPE


def program(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate a main function, whose first parameter is the arguments of the command line and which returns the exit
    code.

    What the user can mend is printed as one line. Ctrl-C and a reader that closes the pipe end it without a word.
    """

    @wraps(main)
    def run(argv: list[str] | None = None, *others: Any) -> int:
        use_utf8()
        try:
            code = main(sys.argv[1:] if argv is None else argv, *others)
            sys.stdout.flush()  # here, where a closed pipe is noticed quietly
            return code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at its exit
            return PIPE_CLOSED
        except (UserError, ImportError, OSError) as error:
            print(f"error: {error_message(error)}", file=sys.stderr)
            return REFUSED
        except (RuntimeError, MemoryError) as error:
            from runtime.hardware import out_of_memory

            if not out_of_memory(error):
                raise
            print(f"error: out of memory: {error}", file=sys.stderr)
            return REFUSED
        except KeyboardInterrupt:
            return INTERRUPTED

    return run


def leave(code: int) -> NoReturn:
    """End the process as `sys.exit` does: threads are waited for, exit functions called, streams flushed. But let the
    system free its memory: that Python takes torch apart, module by module, takes a second."""
    threading._shutdown()  # these are multiprocessing's ways to end its own processes
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # one that was closed at the start is None
        stream.flush()
    os._exit(code)
