import subprocess
import sys

from engine.components import description
from engine.config import signature_of
from networks import CLASSIFIERS, ENSEMBLES, GATES, NETWORKS
from networks.cnn_moe import ARCHITECTURES


def test_python_m_networks_lists_every_name_and_key_without_torch():
    code = (
        "import runpy, sys\n"
        "runpy.run_module('networks', run_name='__main__'); sys.exit('torch' in sys.modules)"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in text.splitlines() if line.strip()]
    described = {words[0] for words in lines if len(words) > 3}
    for spec_of in (NETWORKS, GATES, ENSEMBLES, CLASSIFIERS):
        for name, spec in spec_of.items():
            assert name in described
            assert set(signature_of(spec).types) <= described, name
    assert [words[0] for words in lines[-len(ARCHITECTURES) :]] == [*ARCHITECTURES]
    assert 'backbone = "resnet101"' in text and "grid = [8, 8]" in text


def test_every_key_is_described():
    for table in (NETWORKS, GATES, ENSEMBLES, CLASSIFIERS):
        for spec in table.values():
            signature = signature_of(spec)
            assert all(description(signature.docstring, key) for key in signature.types), spec
