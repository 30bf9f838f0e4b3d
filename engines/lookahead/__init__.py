"""LoAd's controller, and the part of an engine that obeys it."""
