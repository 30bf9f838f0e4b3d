"""Image segmentation: data, networks, losses, metrics, scoring, trained models."""
