"""SegAN's networks: segmentor and critic."""
