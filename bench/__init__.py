"""Speed of this machine, each bench in one run beside what it is compared with. ``python -m bench`` runs all."""
