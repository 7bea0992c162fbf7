"""``farflung ...``: one module per command group. Modules here import at the top only what ``--help`` needs."""
