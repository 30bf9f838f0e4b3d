"""E2EAug's generators at a size that trains in a second, for images of 32 pixels."""

from typing import Any

GENERATORS: dict[str, dict[str, Any]] = {
    "pix2pix": {"generator": {"channels": 4, "levels": 3}},
    "spade": {"generator": {"name": "spade", "channels": 2, "levels": 3, "hidden": 4}},
    "asapnet": {
        "generator": {
            "name": "asapnet",
            "channels": 4,
            "deep_channels": 8,
            "mlp_channels": 4,
            "grid": 4,
            "levels": 3,
        }
    },
}
"""By name, as changes to a tiny config; the discriminator is the one that they bring."""

OTHERS = ("spade", "asapnet")
