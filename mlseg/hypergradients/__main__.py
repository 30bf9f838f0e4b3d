"""Write the tables of methods into pages of the documentation, from the methods' classes.

python -m mlseg.hypergradients docs/how-to-choose.md
"""

import sys
from pathlib import Path

from mlseg.hypergradients.tables import rewritten

if __name__ == "__main__":
    if not sys.argv[1:] or any(argument.startswith("-") for argument in sys.argv[1:]):
        sys.exit((__doc__ or "").strip())
    for page in map(Path, sys.argv[1:]):
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
