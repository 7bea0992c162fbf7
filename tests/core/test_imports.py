"""What must be light is light: no torch, no transformers below the engine."""

import subprocess
import sys

import pytest

LIGHT = ["core", "wire", "planning", "protocol", "identity", "transport", "swarm"]

PROGRAM = """
import importlib, pkgutil, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing them now raises ImportError
package = importlib.import_module("farflung." + sys.argv[1])
names = [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


@pytest.mark.parametrize("package", LIGHT)
def test_imports_without_torch(package: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, package], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
