"""The version of Betty, checked before anything is built on it: importing this module checks it.

betty-ml 0.2.x declares Python below 3.11, so pip on a newer Python falls back to
0.1.1 without a word. That version moves the lower problem's weights with every
hypergradient: validation data leaks into the segmentor and nothing looks wrong.
uv ignores the upper bound and installs 0.2.1.
"""

import gc
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

_MEND = "install it with uv (pip on Python 3.11+ can't): uv pip install 'betty-ml>=0.2.1,<0.3'"


def require_betty() -> None:
    """Check that the installed betty-ml is at least 0.2.1 and below 0.3, and import it quietly.

    Raises:
        ImportError: it is missing or another version; one line that says what to install.
    """
    try:
        found = version("betty-ml")
    except PackageNotFoundError:
        raise ImportError(f"mlseg needs betty-ml, which is not installed; {_MEND}") from None
    numbers = re.match(r"0\.2\.(\d+)(?!\.?(?:a|b|rc|dev))", found)
    if numbers is None or int(numbers[1]) < 1:
        raise ImportError(f"mlseg needs betty-ml 0.2.1 or a later 0.2.x, not {found}; {_MEND}")
    # Its dependency `higher` compares with a literal by `is`, which Python remarks on
    # stderr whenever it compiles the file; a command's stderr is for the user's mistakes.
    with warnings.catch_warnings(), _collector_off():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        import_module("betty.engine")
        import_module("betty.problems")


@contextmanager
def _collector_off() -> Iterator[None]:
    """Without Python's garbage collector, which would walk all that modules make, over and over.

    That takes a third of the time, and finds nothing: modules stay.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:
            # Counts it all among what is old, or the first collection would walk it after all.
            gc.freeze()
            gc.unfreeze()
        gc.enable()


require_betty()
