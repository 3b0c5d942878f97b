"""Metrics by name: functions of a confusion matrix [K, K] (rows: truth, columns: prediction) -> figure."""

METRICS = {
    "miou": "metrics.confusion:miou",
    "aacc": "metrics.confusion:aacc",
    "macc": "metrics.confusion:macc",
    "fwiou": "metrics.confusion:fwiou",
}
