"""The rooms below the verl glue work where verl, ray, vllm and hydra are out of reach."""

import subprocess
import sys

import pytest

BLOCKED = ("verl", "ray", "vllm", "hydra", "omegaconf", "transformers", "peft")
SCRIPT = """
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
for module in {modules}:
    importlib.import_module("verl_grad_routing." + module)
assert not set(sys.modules) & set({blocked}), set(sys.modules) & set({blocked})
"""


@pytest.mark.parametrize(
    "modules",
    [["directions", "fingerprints", "detectors", "detectors.evaluation", "gates", "interventions"], ["routing"]],
    ids=["signals", "routing"],
)
def test_import_without_verl(modules):
    blocked = BLOCKED if modules != ["routing"] else BLOCKED[:4]
    script = SCRIPT.format(blocked=blocked, modules=modules)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
