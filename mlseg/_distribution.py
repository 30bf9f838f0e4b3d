"""The installed distribution: ours, whose name isn't that of the package.

On the public index the name ``mlseg`` belongs to another project (a segmenter of Malayalam words),
which installs a package ``mlseg`` as well. Ours was called so too, before it had a name of its own.
"""

from importlib.metadata import Distribution, distributions

NAME = "mlseg-betty"
"""Of the distribution; what is imported, and the command, are ``mlseg``."""


def require_own_distribution() -> None:
    """Check that no distribution ``mlseg`` is installed.

    Raises:
        ImportError: it is, the other project's or an old one of ours; one line with the mend.
    """
    for found in distributions(name="mlseg"):
        if not _is_ours(found):
            raise ImportError(
                f"a distribution mlseg {found.version} of another project is installed here "
                f"({found.metadata['Summary']}), and its files lie among those of {NAME}; in the "
                "checkout run: uv pip uninstall mlseg && uv pip install --reinstall ."
            )
        # What a build leaves in a checkout is no install, though it is found from there.
        if found.read_text("PKG-INFO") is None:
            raise ImportError(
                f"mlseg is installed under its old name, it is the distribution {NAME} now; in the "
                "checkout run: uv pip uninstall mlseg && uv pip install --editable . (or make)"
            )


def _is_ours(found: Distribution) -> bool:
    return any(requirement.startswith("betty-ml") for requirement in found.requires or ())
