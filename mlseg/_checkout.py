"""The parts of mlseg come from one place, or it says so.

``problems/`` and ``engines/`` stand beside ``mlseg/`` in a checkout and are found by what an
editable install has noted, ``mlseg`` itself by ``sys.path``. With an install of one checkout and
another one on ``sys.path`` (by ``PYTHONPATH``, or because Python was started there), Python takes
some modules from the one and some from the other, and says nothing.
"""

import os
from importlib.util import find_spec

PARTS = ("engines", "problems")
"""Packages below ``mlseg`` that stand beside it in a checkout."""


def require_one_checkout() -> None:
    """Check where the parts would be imported from; imports none of them.

    Raises:
        ImportError: from another place than ``mlseg``, or from nowhere although they lie beside it;
            one line with the mend.
    """
    for part in PARTS:
        spec = find_spec(f"mlseg.{part}")
        if spec is not None and spec.origin is not None:
            require_part(spec.name, spec.origin)
        elif os.path.exists(os.path.join(os.path.dirname(_home()), part, "__init__.py")):
            raise ImportError(
                f"mlseg was found at {_home()}, mlseg.{part} nowhere: a checkout has to be "
                f"installed; {_mend()}"
            )


def require_part(name: str, file: str) -> None:
    """Check the place of one part; each calls it for itself.

    Args:
        name: its ``__name__``.
        file: its ``__file__``.

    Raises:
        ImportError: as above; or the part is imported by the name of its folder in a checkout.
    """
    if not name.startswith("mlseg."):
        raise ImportError(
            f"'import {name}' makes every class of it a second time; write 'import mlseg.{name}'"
        )
    place, home = os.path.dirname(file), _home()
    parent, real = os.path.dirname(place), os.path.dirname(os.path.realpath(place))
    installed = os.path.abspath(parent) == os.path.abspath(home)  # links stay links
    if installed or real in (os.path.realpath(home), os.path.dirname(os.path.realpath(home))):
        return
    raise ImportError(
        f"two copies of mlseg are mixed: mlseg comes from {home}, but {name} from {place}; "
        f"{_mend()}"
    )


def _home() -> str:
    return os.path.dirname(__file__)


def _mend() -> str:
    root = os.path.dirname(os.path.abspath(_home()))
    return (
        f"take {root} off PYTHONPATH and start Python elsewhere, or install it: "
        f"uv pip install --editable {root}"
    )
