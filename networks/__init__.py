"""Networks, gates and ensembles by name. A new one is one new file (or object) and one line here."""

NETWORKS = {
    "deeplabv3plus": "networks.deeplab:DeepLabV3Plus",
    "frrn": "networks.frrn:FRRN",
    "smp": "networks.smp:SMP",
    "external": "networks.external:External",
}

CLASSIFIERS = {
    "cnn": "networks.cnn_moe.model:CNN",
    "cnn_moe": "networks.cnn_moe.model:CNNMoE",
    "sparse_cnn": "networks.cnn_moe.sparse:SparseCNN",
}

GUEST_CLASSIFIERS = {  # which bring their own weights
    "external": "networks.external:ExternalClassifier",
}

GATES = {
    "simple": "networks.gates:SimpleGate",
    "classwise": "networks.gates:ClasswiseGate",
    "spatial": "networks.spatial_gate:SpatialGate",
    "uniform": "networks.gates:UniformGate",
}

ENSEMBLES = {
    "mean": "networks.ensemble:mean",
    "max": "networks.ensemble:max",
    "mean_probs": "networks.ensemble:mean_probs",
    "vote": "networks.ensemble:vote",
}
