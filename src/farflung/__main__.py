"""``python -m farflung`` is ``farflung``."""

from farflung.cli.app import main

if __name__ == "__main__":
    main()
