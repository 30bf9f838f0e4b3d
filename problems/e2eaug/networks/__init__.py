"""E2EAug's networks: generator with its cells, discriminator, architecture."""
