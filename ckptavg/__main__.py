"""`ckptavg`, and `python -m ckptavg`."""

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line. An interruption while it is imported ends it with one line, too."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # it is ignored in the background of a shell script
        signal.signal(signal.SIGINT, _leave)
    from ckptavg.cli import main as run  # noqa: PLC0415

    signal.signal(signal.SIGINT, handler)
    run()


def _leave(_number: int, _frame: FrameType | None) -> None:
    """End at once: an exception in an import may come out as another one."""
    signal.signal(signal.SIGINT, lambda *_: None)  # of a second one nothing is said
    os.write(2, b"ckptavg: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
