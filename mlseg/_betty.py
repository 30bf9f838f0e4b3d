"""The version of Betty, checked before anything is built on it.

betty-ml 0.2.x declares Python below 3.11, so pip on a newer Python falls back to
0.1.1 without a word. That version moves the lower problem's weights with every
hypergradient: validation data leaks into the segmentor and nothing looks wrong.
uv ignores the upper bound and installs 0.2.1.
"""

import re
import warnings
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        import_module("betty")
        import_module("higher")
