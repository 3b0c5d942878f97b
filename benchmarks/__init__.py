"""One script per claim about speed: our way and the plain way side by side in one run."""
