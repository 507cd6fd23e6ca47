"""`python -m selfsight` is the `selfsight` command."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
