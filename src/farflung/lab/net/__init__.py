"""A wide-area network on one machine: Linux network namespaces and an emulator of IP links between them.

Real programs, real TCP and UDP, unmodified; only the way between them is made. ``Lab`` is the way in.
"""

from farflung.lab.net.lab import Lab
from farflung.lab.net.process import Finished, LabProcess
from farflung.lab.net.topology import Topology, parse_topology, read_topology

__all__ = ["Finished", "Lab", "LabProcess", "Topology", "parse_topology", "read_topology"]
