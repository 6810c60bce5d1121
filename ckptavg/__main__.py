"""`python -m ckptavg` is `ckptavg`."""

from ckptavg.cli import main

if __name__ == "__main__":
    main()
