"""`ckptavg`, and `python -m ckptavg`."""

import os
import signal
from types import FrameType

_WORDS = {
    signal.SIGINT: b"interrupted",
    signal.SIGTERM: b"terminated",
    signal.SIGHUP: b"terminated",
}


def main() -> None:
    """Run the command line. A signal while it is imported ends it with one line, too."""
    handlers = {
        number: handler
        for number in _WORDS
        # Some are ignored: in the background of a shell script, or under nohup.
        if (handler := signal.getsignal(number)) in (signal.default_int_handler, signal.SIG_DFL)
    }
    for number in handlers:
        signal.signal(number, _leave)
    from ckptavg.cli import main as run  # noqa: PLC0415

    for number, handler in handlers.items():
        signal.signal(number, handler)
    run()


def _leave(number: int, _frame: FrameType | None) -> None:
    """End at once: an exception in an import may come out as another one."""
    for each in _WORDS:
        signal.signal(each, lambda *_: None)  # of a second one nothing is said
    os.write(2, b"ckptavg: %s\n" % _WORDS[signal.Signals(number)])
    os._exit(128 + number)


if __name__ == "__main__":
    main()
