import subprocess
import sys

from attacks import ATTACKS
from engine.components import description
from engine.config import signature_of


def test_python_m_attacks_lists_every_name_and_key_without_torch():
    code = (
        "import runpy, sys\n"
        "runpy.run_module('attacks', run_name='__main__'); sys.exit('torch' in sys.modules)"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    described = {line.split()[0] for line in text.splitlines() if len(line.split()) > 3}
    for name, spec in ATTACKS.items():
        assert name in described and set(signature_of(spec).types) <= described, name
    assert 'loss = "ce"' in text and "steps = 20" in text and "step_size = null" in text


def test_every_key_is_described():
    for name, spec in ATTACKS.items():
        signature = signature_of(spec)
        assert all(description(signature.docstring, key) for key in signature.types), name
