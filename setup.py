"""Which packages there are. All else stands in setup.cfg."""

from setuptools import find_packages, setup

# setup.cfg's package_dir. Its ``find:`` doesn't see packages that are moved, and a list there
# would name every system, each of which may be removed with its folder.
FOLDERS = {"mlseg": "mlseg", "mlseg.problems": "problems", "mlseg.engines": "engines"}

setup(
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in (name, *(f"{name}.{below}" for below in find_packages(folder)))
    ]
)
