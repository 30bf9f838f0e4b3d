"""LoAd's controller, and the engine that obeys it."""
